"""Calibrated from disk to disk: inputs are those of the 16-bit network, and a stopped run ends in the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_flux import CONFIG, PLAN, dense_config
from diffusers import FluxTransformer2DModel
from torch import Tensor

from support import relative_error
from tonfa.checkpoint.tensors import TensorFolder
from tonfa.errors import CheckpointError, FormatError, UnsupportedError
from tonfa.models.flux.sampling import choose_pictures
from tonfa.models.flux.walk import FluxWalk
from tonfa.plan import BlockPlan, LinearPlan
from tonfa.quantizer import learned, memory
from tonfa.quantizer.calibration import Collector
from tonfa.quantizer.memory import check_host_memory, enough_memory
from tonfa.quantizer.recipe import Recipe
from tonfa.quantizer.samples import Samples
from tonfa.quantizer.smoothing import SEARCH_TOKENS
from tonfa.quantizer.stream import Report, quantize_checkpoint

RECIPE = Recipe(16, iterations=1)
COUNT, TEXT, IMAGE = 6, 24, 40
LINEARS = [linear.name for linear in PLAN.linears()]


@pytest.fixture(scope="module", autouse=True)
def short_learning() -> Iterator[None]:
    """How good the smoothing gets is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "STEPS", 5)
        yield


def write_samples(folder: Path) -> Samples:
    samples = Samples(folder, COUNT)
    generator = torch.Generator().manual_seed(3)
    for i in range(COUNT):
        ids = torch.zeros(IMAGE, 3)
        ids[:, 1], ids[:, 2] = torch.arange(IMAGE) // 8, torch.arange(IMAGE) % 8
        inputs = {
            "hidden_states": torch.randn(1, IMAGE, CONFIG["in_channels"], generator=generator),
            "encoder_hidden_states": torch.randn(1, TEXT, CONFIG["joint_attention_dim"], generator=generator),
            "pooled_projections": torch.randn(1, CONFIG["pooled_projection_dim"], generator=generator),
            "timestep": torch.tensor([(i + 1) / COUNT]),
            "guidance": torch.tensor([3.5]),
            "img_ids": ids,
            "txt_ids": torch.zeros(TEXT, 3),
        }
        samples.write(i, {name: t.bfloat16() for name, t in inputs.items()})
    return samples


class Stored:
    """A calibration without a pipeline."""

    def __init__(self, sequential: bool = False, activations: str = "int4", device: str = "cpu") -> None:
        self.sequential, self._activations, self._device = sequential, activations, torch.device(device)
        self.opened = 0

    def identity(self) -> dict[str, Any]:
        return {"samples": COUNT, "sequential": self.sequential}

    def nbytes(self) -> int:
        return 1

    def open(self, folder: Path) -> FluxWalk:
        self.opened += 1
        options = {"rank": 16, "activations": self._activations, "device": self._device, "dtype": torch.bfloat16}
        return FluxWalk(CONFIG, PLAN, write_samples(folder), **options)


def quantize(dense: Path, out: Path, calibration: Stored | None, recipe: Recipe = RECIPE, **options: Any) -> Report:
    """In three shards: the outer tensors, the double block, the single block."""
    options = {"max_shard_size": "300KB", "calibration": calibration, **options}
    return quantize_checkpoint(TensorFolder(dense), PLAN, dense_config(dense), out, recipe, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def inputs_in_diffusers(dense: Path, samples: Samples) -> dict[str, Tensor]:
    """What each planned linear's first source reads in Diffusers' own model, in float32."""
    model = FluxTransformer2DModel.from_pretrained(dense, torch_dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {}
    for linear in PLAN.linears():
        if linear.kind == "svdq":

            def hook(_: Any, args: tuple[Tensor], kwargs: Any, linear: LinearPlan = linear) -> None:
                columns = slice(None) if linear.columns is None else slice(*linear.columns)
                seen.setdefault(linear.name, []).append(args[0][..., columns].flatten(0, -2))

            model.get_submodule(linear.sources[0]).register_forward_pre_hook(hook, with_kwargs=True)
    for i in range(samples.count):
        model(**{name: t.float() for name, t in samples.read(i).items()})
    return {name: torch.cat(batches) for name, batches in seen.items()}


def test_inputs_are_those_of_diffusers(dense: Path, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples")
    options = {"rank": 16, "activations": "int4", "device": torch.device("cpu"), "dtype": torch.float32}
    walk = FluxWalk(CONFIG, PLAN, samples, **options)
    source, found = TensorFolder(dense), {}
    for block in PLAN.blocks:
        tensors = {target: source[name].float() for target, name in block.copies}
        for linear in block.linears:
            columns = slice(None) if linear.columns is None else slice(*linear.columns)
            weight = torch.cat([source[f"{name}.weight"].float()[:, columns] for name in linear.sources])
            bias = torch.cat([source[f"{name}.bias"].float() for name in linear.sources])
            tensors[f"{linear.name}.weight"] = weight
            tensors[f"{linear.name}.bias"] = bias if linear.source_bias else torch.zeros_like(bias)
        collector = Collector(block, torch.float32, 0)
        walk.run(block, tensors, quantized=False, observe=collector, keep=True)
        found |= collector.moments
    expected = inputs_in_diffusers(dense, samples)
    assert set(found) == set(expected) - {"single_transformer_blocks.0.ff.up"}
    for name, moments in found.items():
        x = expected[name]
        assert moments.tokens == len(x), name
        assert len(moments.sample) == min(len(x), SEARCH_TOKENS)
        assert relative_error(moments.second, x.T.double() @ x.double()) < 1e-4, name
        assert torch.allclose(moments.absmax, x.abs().amax(dim=0), rtol=1e-3), name


def test_calibrated_differs_by_order_and_from_the_weights_alone(
    dense: Path, whole: dict[bool, Path], tmp_path: Path
) -> None:
    report = quantize(dense, tmp_path / "free", None)
    assert list(report.errors) == LINEARS
    folders = {"free": tmp_path / "free", "16-bit": whole[False], "sequential": whole[True]}
    made = {name: dict(TensorFolder(folder)) for name, folder in folders.items()}
    first, last = f"{LINEARS[1]}.qweight", f"{LINEARS[-1]}.qweight"
    assert not torch.equal(made["free"][first], made["16-bit"][first])
    assert torch.equal(made["16-bit"][first], made["sequential"][first])  # both read the embeddings alone
    assert not torch.equal(made["16-bit"][last], made["sequential"][last])
    modulation = f"{LINEARS[0]}.qweight"
    assert torch.equal(made["free"][modulation], made["16-bit"][modulation])


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints of runs that nothing stopped, by whether they were sequential."""
    folder = tmp_path_factory.mktemp("whole")
    for sequential in (False, True):
        quantize(dense, folder / str(sequential), Stored(sequential))
    return {sequential: folder / str(sequential) for sequential in (False, True)}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", [LINEARS[0], LINEARS[10], LINEARS[-1]])
def test_resumes_in_the_same_bytes(
    dense: Path, whole: dict[bool, Path], tmp_path: Path, name: str, sequential: bool
) -> None:
    def stop(linear: str, done: int, total: int) -> None:
        if linear == name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "out", Stored(sequential), progress=stop)
    report = quantize(dense, tmp_path / "out", Stored(sequential))
    assert report.resumed == LINEARS.index(name) // 10 * 10
    assert files(tmp_path / "out") == files(whole[sequential])


@pytest.mark.gpu
@pytest.mark.parametrize("sequential", [False, True])
def test_a_gpu_makes_nearly_the_same(dense: Path, whole: dict[bool, Path], tmp_path: Path, sequential: bool) -> None:
    quantize(dense, tmp_path / "out", Stored(sequential, device="cuda"), device="cuda")
    found, expected = TensorFolder(tmp_path / "out"), TensorFolder(whole[sequential])
    for name in LINEARS:
        if f"{name}.smooth_factor" in expected:
            assert relative_error(found[f"{name}.smooth_factor"], expected[f"{name}.smooth_factor"]) < 0.1, name


def test_samples_are_not_dropped_for_other_settings(dense: Path, tmp_path: Path) -> None:
    def stop(linear: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "out", Stored(), progress=stop)
    with pytest.raises(CheckpointError, match="another calibration sequential "):
        quantize(dense, tmp_path / "out", Stored(True))
    with pytest.raises(CheckpointError, match="another calibration "):
        quantize(dense, tmp_path / "out", None)
    again = Stored(True)
    quantize(dense, tmp_path / "out", again, overwrite=True)
    assert again.opened == 1


def test_a_rank_that_does_not_fit_is_refused_before_samples_are_drawn(dense: Path, tmp_path: Path) -> None:
    calibration = Stored()
    with pytest.raises(FormatError, match=r"to_qkv\.weight: rank 144 exceeds the smaller side of 384 x 128"):
        quantize(dense, tmp_path / "out", calibration, Recipe(144, 0))
    assert calibration.opened == 0 and not list(tmp_path.iterdir())


def block(*linears: LinearPlan) -> BlockPlan:
    return BlockPlan("block", linears)


def test_collector_keeps_one_set_for_a_shared_input_and_names_what_is_missing() -> None:
    first = LinearPlan("a", ("a",), 64, 64)
    collector = Collector(block(first, LinearPlan("b", ("b",), 64, 64, shares_input="a")), torch.float32, 0)
    with pytest.raises(FormatError, match="a: no calibration input has reached it"):
        collector.check()
    x = torch.randn(10, 64)
    collector("a", x)
    collector("b", x)
    assert list(collector.moments) == ["a"] and collector.moments["a"].tokens == 10
    collector.check()
    collector("a", torch.full((1, 64), torch.nan))
    with pytest.raises(FormatError, match="a: 64 channels of its calibration inputs hold NaN"):
        collector.check()


def test_samples_come_back_and_refuse_what_is_not_finite(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "new", 2)
    x = torch.randn(3, 4).bfloat16()
    assert not samples.has(0)
    samples.write(0, {"x": x})
    assert samples.has(0) and not samples.has(1) and torch.equal(samples.read(0)["x"], x)
    with pytest.raises(FormatError, match="sample 1: x holds NaN or Inf"):
        samples.write(1, {"x": torch.tensor([torch.inf])})
    path = next(samples.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert not samples.has(0)


def test_pictures_cover_prompts_and_the_schedule() -> None:
    prompts = [str(i) for i in range(40)]
    options = {"steps": 30, "per_picture": 4, "seed": 5}
    pictures = choose_pictures(prompts, [], lambda _: (64, 48), samples=128, **options)
    assert len(pictures) == 32 and len({p.prompt for p in pictures}) == 32
    assert len({p.seed for p in pictures}) == 32
    for i, picture in enumerate(pictures):
        assert picture.first == 4 * i and (picture.height, picture.width) == (64, 48)
        for step, low, high in zip(picture.steps, (0, 7, 15, 22), (7, 15, 22, 30), strict=True):
            assert low <= step < high
    assert len({step for p in pictures for step in p.steps}) > 25
    assert pictures == choose_pictures(prompts, [], lambda _: (64, 48), samples=128, **options)
    again = choose_pictures(prompts[:3], [], lambda _: (64, 48), samples=30, **options)
    assert [len(p.steps) for p in again] == [4] * 7 + [2]
    assert len({p.prompt for p in again}) == 3 and len({p.seed for p in again}) == 8


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory while at it; do less"),
        (MemoryError(), "out of memory while at it; do less"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory while at it; do less"),
    ],
)
def test_exhausted_memory_is_explained(error: BaseException, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message), enough_memory("at it", "do less"):
        raise error
    with pytest.raises(RuntimeError, match="^other$"), enough_memory("at it", "do less"):
        raise RuntimeError("other")


def test_too_little_host_memory_is_noticed_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:  9000000 kB\nMemAvailable:    2000000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", table)
    check_host_memory(2_000_000_000, "the samples", "lower --samples")
    with pytest.raises(UnsupportedError, match="the samples take 3.0 GB .* 2.0 GB are free; lower --samples"):
        check_host_memory(3_000_000_000, "the samples", "lower --samples")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    check_host_memory(10**18, "the samples", "lower --samples")

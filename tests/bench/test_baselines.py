"""What is compared: shared weights, the settings of the compiled ones, and what is said where one cannot run."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bench_cases import CPU, TINY, VARIANT, request
from diffusers import FluxTransformer2DModel
from torch.nn import functional

from support import random_weights, relative_error
from tonfa.bench import dense, step, variant
from tonfa.bench.attention import check as check_attention
from tonfa.bench.comfy import LAYOUT, comfy_linear
from tonfa.bench.dense import COMPILED, EAGER, EAGER_CUDNN, TORCHAO, DenseModels
from tonfa.bench.linear import COMFY, baseline
from tonfa.bench.linear import check as check_linear
from tonfa.bench.memory import tensor_gib
from tonfa.bench.protocol import Timing
from tonfa.bench.step import StepBench
from tonfa.bench.synthetic import outlier_input, quantized_model, random_linear, step_inputs
from tonfa.bench.variant import CHECK_BOUND, Variant, check
from tonfa.dispatch import bind
from tonfa.errors import TonfaError, UnsupportedError
from tonfa.layers.linear import SVDQLinear


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What models were asked to compile with, without compiling them."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda _, **options: calls.append(options))
    return calls


def test_cudnn_alone_compiles_nothing(compiled: list[dict[str, object]]) -> None:
    models = DenseModels(TINY, CPU)
    twin = models.build(EAGER_CUDNN)
    assert compiled == [] and twin is not models.build(EAGER)
    assert dense.attention_backend(EAGER_CUDNN, torch.device("cuda")) == "cudnn"


def test_compiled_shares_the_weights_of_eager(compiled: list[dict[str, object]]) -> None:
    models = DenseModels(TINY, CPU)
    eager, twin = models.build(EAGER), models.build(COMPILED)
    assert compiled == [{"fullgraph": True, "dynamic": False}]
    assert twin is not eager
    assert {p.data_ptr() for p in eager.parameters()} == {p.data_ptr() for p in twin.parameters()}
    inputs = step_inputs(TINY, 32, 48, text_tokens=8)
    with torch.no_grad():
        assert torch.equal(eager(**inputs)[0], twin(**inputs)[0])


def test_eager_keeps_its_attention_beside_compiled_on_a_gpu(
    compiled: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(
        FluxTransformer2DModel, "set_attention_backend", lambda model, name: asked.append((id(model), name))
    )
    models = DenseModels(TINY, CPU)
    models._device = torch.device("cuda")
    twin = models.build(COMPILED)
    eager = models.build(EAGER)
    assert asked == [(id(eager), "native"), (id(twin), "_native_cudnn"), (id(eager), "native")]
    assert [dense.attention_backend(name, models._device) for name in (EAGER, COMPILED)] == ["sdpa", "cudnn"]


def test_torchao_quantizes_the_linears_of_blocks(
    compiled: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def quantize_(model: torch.nn.Module, config: tuple[str, object], filter_fn: object) -> None:
        assert config == ("config", "row")
        seen.extend(name for name, module in model.named_modules() if filter_fn(module, name))  # type: ignore[operator]

    fake = ModuleType("torchao.quantization")
    fake.quantize_, fake.PerRow = quantize_, lambda: "row"  # type: ignore[attr-defined]
    fake.Float8DynamicActivationFloat8WeightConfig = lambda granularity: ("config", granularity)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    model = DenseModels(TINY, CPU).build(TORCHAO)
    expected = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "transformer_blocks" in n]
    assert seen == expected and len(seen) > 10 and "proj_out" not in seen
    assert len(compiled) == 1


def test_torchao_that_lacks_the_api_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", ModuleType("torchao.quantization"))
    with pytest.raises(UnsupportedError, match="this torchao cannot be used"):
        DenseModels(TINY, CPU).build(TORCHAO)


def test_bytes_of_tensors_that_wrap_others() -> None:
    inner = torch.zeros(3, dtype=torch.uint8)
    wrapper = SimpleNamespace(__tensor_flatten__=lambda: (["inner"], None), inner=inner)
    model = SimpleNamespace(state_dict=lambda: {"a": torch.zeros(5, dtype=torch.bfloat16), "b": wrapper})
    assert tensor_gib(model) * 2**30 == 13


def test_right_kernels_pass_the_check() -> None:
    assert 0 < check(VARIANT, TINY, CPU, 0) < CHECK_BOUND / 2


@pytest.mark.parametrize("part", ["lowrank", "scales"])
def test_wrong_kernels_are_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SVDQLinear._bind

    def wrong(layer: SVDQLinear) -> object:
        binding = right(layer)
        if layer.backend != "reference":
            layer.proj_up.data.zero_() if part == "lowrank" else layer.wscales.data.mul_(1.3)
        return right(layer) if layer.backend != "reference" else binding

    monkeypatch.setattr(SVDQLinear, "_bind", wrong)
    with pytest.raises(TonfaError, match=r"is off by .*no speed is recorded"):
        list(StepBench(request(), print).run())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_not_timed(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> torch.nn.Module:
        model = quantized_model(*arguments, **options)
        model.proj_out.bias.data[3] = bad
        return model

    monkeypatch.setattr(step, "check", lambda *_: 0.0)
    monkeypatch.setattr(variant.synthetic, "quantized_model", broken)
    with pytest.raises(TonfaError, match="not finite; no speed is recorded"):
        list(StepBench(request(), print).run())


def test_a_residency_that_is_missing_is_skipped_beside_another() -> None:
    said: list[str] = []
    both = [VARIANT, Variant("fp8", "int8", 32, graph=True)]
    records = list(StepBench(request(variants=both), said.append).run())
    assert [r["settings"]["weights"] for r in records] == ["int4"]
    assert any("skipped tonfa fp8 weights, int8 activations: weights='fp8': the cpu backend" in line for line in said)


def test_a_baseline_that_fails_is_skipped_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck\nat line 3")

    monkeypatch.setattr(FluxTransformer2DModel, "forward", fail)
    said: list[str] = []
    records = list(StepBench(request(baselines=[EAGER], explicit=False), said.append).run())
    assert len(records) == 1 and records[0]["baselines"] == {}
    assert "skipped baseline bf16-eager fails at 32 x 48, batch 1: RuntimeError: out of luck" in said
    with pytest.raises(UnsupportedError, match="out of luck"):
        list(StepBench(request(baselines=[EAGER]), said.append).run())


def test_ratio_to_rank_0_is_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {"tonfa int4 weights, int8 activations": Timing(10.0, 9.0, 11.0, 1), "rank-0": Timing(9.5, 9.0, 10.0, 1)}
    monkeypatch.setattr(step, "interleaved", lambda candidates, *_, **__: {name: timings[name] for name in candidates})
    ours, without = StepBench(request(baselines=["rank-0"]), lambda _: None).run()
    assert ours["ratios"] == {"rank-0": 0.95} and without["value"] == 9.5
    assert (ours["case"]["rank"], without["case"]["rank"]) == (32, 0)
    assert ours["memory_gib"]["weights"] > without["memory_gib"]["weights"]


@pytest.mark.parametrize("policy", ["none", "int8", "fp8", "int4"])
def test_a_linear_passes_its_bound_and_a_wrong_one_does_not(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = random_linear(192, 256, 32, CPU, generator, policy)
    x = outlier_input(64, 256, generator)
    weight, bias = layer.weights().dense()
    assert 0 < check_linear(layer, x, weight, bias, policy) < 0.12
    with pytest.raises(TonfaError, match="no speed is recorded"):
        check_linear(layer, x, weight * 1.3, bias, policy)


def test_attention_that_is_wrong_is_not_timed() -> None:
    q, k, v = (torch.randn(1, 2, 32, 16).bfloat16() for _ in range(3))
    kernels = bind(CPU, "int8")
    assert 0 < check_attention(kernels.attention, (q, k, v)) < 0.01
    with pytest.raises(TonfaError, match="no speed is recorded"):
        check_attention(lambda q, k, v: kernels.attention(q, k * 1.2, v), (q, k, v))


def test_comfy_kitchen_gets_our_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is ours but for the dtype of codes; a stand-in computes with what it was given."""
    w = random_weights(128, 192, 16, generator=torch.Generator().manual_seed(0))

    class Layout:
        Params = SimpleNamespace

    def quantized(codes: torch.Tensor, layout: str, params: SimpleNamespace) -> torch.Tensor:
        assert (layout, codes.dtype, params.orig_shape) == (LAYOUT, torch.int8, (128, 192))
        packed = codes.view(torch.uint8)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1).short()
        values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
        residual = values * params.scale.float().T.repeat_interleave(64, dim=1) / params.smooth_factor.float()
        return residual + params.proj_up.float() @ params.proj_down.float().T

    fake = ModuleType("comfy_kitchen.tensor")
    fake.QuantizedTensor, fake.TensorCoreSVDQuantW4A4Layout = quantized, Layout  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_kitchen", ModuleType("comfy_kitchen"))
    monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", fake)
    x = torch.randn(8, 192)
    found = comfy_linear(SimpleWeights(w))(x)
    assert relative_error(found, functional.linear(x, *w.dense())) < 1e-5


class SimpleWeights:
    """The same weights with a float32 bias, as the stand-in multiplies in float32."""

    def __init__(self, w: object) -> None:
        self._w, self.bias = w, w.bias.float()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._w, name)


def test_comfy_kitchen_without_its_kernels_is_not_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, cuda = ModuleType("comfy_kitchen.tensor"), ModuleType("comfy_kitchen.backends.cuda")
    tensor.QuantizedTensor = tensor.TensorCoreSVDQuantW4A4Layout = object  # type: ignore[attr-defined]
    cuda._EXT_AVAILABLE, cuda._EXT_ERROR = False, "no such file"  # type: ignore[attr-defined]
    backends = ModuleType("comfy_kitchen.backends")
    backends.cuda = cuda  # type: ignore[attr-defined]
    for name, module in (("", ModuleType("comfy_kitchen")), (".tensor", tensor), (".backends", backends)):
        monkeypatch.setitem(sys.modules, f"comfy_kitchen{name}", module)
    on_a_gpu = SimpleNamespace(qweight=SimpleNamespace(device=torch.device("cuda")))
    with pytest.raises(UnsupportedError, match="CUDA kernels are not loaded: no such file"):
        comfy_linear(on_a_gpu)


def fails(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("wrong\nlayout")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x.new_ones(x.shape[0], 128), r"off by .* from float64"),
        (fails, "fails with RuntimeError: wrong layout"),
    ],
)
def test_others_that_compute_something_else_are_not_measured(
    broken: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = random_linear(128, 192, 16, CPU, generator)
    x = outlier_input(8, 192, generator)
    monkeypatch.setattr("tonfa.bench.linear.comfy_linear", lambda w: broken)
    with pytest.raises(UnsupportedError, match=message):
        baseline(COMFY, layer, *layer.weights().dense(), [x])
    right = SVDQLinear.from_weights(layer.weights(), activations="int4")
    monkeypatch.setattr("tonfa.bench.linear.comfy_linear", lambda w: right)
    (run,) = baseline(COMFY, layer, *layer.weights().dense(), [x])
    assert torch.equal(run(), right(x))


def test_comfy_kitchen_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    w = random_weights(128, 192, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="pip install comfy-kitchen"):
        comfy_linear(w)

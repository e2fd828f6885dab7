"""CUDA graphs: a replay is the eager step, whatever the inputs; what moves the weights is noticed."""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from flux_models import dense_model, inputs, run
from torch import Tensor, nn

from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe
from tonfa.runtime import graphs
from tonfa.runtime.graphs import Graphs
from tonfa.runtime.stamp import WeightsStamp


@pytest.fixture(scope="module")
def quantized() -> SVDQFluxTransformer2DModel:
    return SVDQFluxTransformer2DModel.from_dense(dense_model(dtype=torch.bfloat16), Recipe(iterations=1))


@pytest.fixture
def model(quantized: SVDQFluxTransformer2DModel) -> SVDQFluxTransformer2DModel:
    return copy.deepcopy(quantized).to("cuda")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The first input of every replay."""
    replays = []
    original = graphs._Recorded.__call__

    def replay(self: graphs._Recorded, values: dict[str, Tensor]) -> Tensor:
        replays.append(values["hidden_states"])
        return original(self, values)

    monkeypatch.setattr(graphs._Recorded, "__call__", replay)
    return replays


def steps(model: nn.Module, count: int = 3, **options: object) -> list[dict[str, Tensor]]:
    """Inputs that differ in everything from step to step."""
    made = [inputs(model, dtype=torch.bfloat16, **options) for _ in range(count)]
    generator = torch.Generator().manual_seed(3)
    for i, values in enumerate(made):
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            values[name] = torch.randn(values[name].shape, generator=generator).bfloat16()
        values["timestep"] = values["timestep"] / (i + 1)
        values["guidance"] = values["guidance"] + i
    return made


def eager(model: SVDQFluxTransformer2DModel, values: dict[str, Tensor]) -> Tensor:
    return run(copy.deepcopy(model).set_cuda_graphs(False), values)


def test_on_the_cpu_nothing_is_recorded() -> None:
    calls: list[int] = []
    runner, module = Graphs(), nn.Linear(2, 2)

    def compute(values: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return module(values["x"])

    x = torch.ones(1, 2)
    for _ in range(3):
        assert torch.equal(runner.run(module, compute, {"x": x}), module(x))
    assert len(calls) == 3


def test_the_stamp_breaks_when_weights_move_or_are_replaced(quantized: SVDQFluxTransformer2DModel) -> None:
    model = copy.deepcopy(quantized)
    changes = [
        lambda: model.to(torch.float16),
        lambda: model.set_activations("none"),
        lambda: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda: setattr(model.x_embedder, "weight", nn.Parameter(model.x_embedder.weight.clone())),
    ]
    for change in changes:
        stamp = WeightsStamp(model)
        assert stamp.holds()
        change()
        assert not stamp.holds()
    stamp = WeightsStamp(model)
    model.x_embedder.weight.data.mul_(2)
    assert stamp.holds()


@pytest.mark.gpu
def test_replays_equal_eager_steps_bit_for_bit(model: SVDQFluxTransformer2DModel, recorded: list[Tensor]) -> None:
    for values in steps(model, 5):
        assert torch.equal(run(model, values), eager(model, values))
    assert len(recorded) == 4


@pytest.mark.gpu
def test_each_shape_has_its_graph_and_the_oldest_goes(
    model: SVDQFluxTransformer2DModel, recorded: list[Tensor]
) -> None:
    shapes = [{"image": (4, 4 + i)} for i in range(graphs.LIMIT + 1)]
    for _ in range(2):
        for options in shapes[:2]:
            for values in steps(model, 2, **options):
                assert torch.equal(run(model, values), eager(model, values))
    assert len(recorded) == 6
    for options in shapes:
        for values in steps(model, 2, **options):
            run(model, values)
    assert len(model._graphs._seen) == graphs.LIMIT
    mask = torch.ones(1, 13 + 35, dtype=torch.bool)
    mask[:, 5:9] = False
    masked = [{**values, "joint_attention_kwargs": {"attention_mask": mask.cuda()}} for values in steps(model, 3)]
    for values in masked:
        assert torch.equal(run(model, values), eager(model, values))


@pytest.mark.gpu
def test_moved_weights_and_new_policies_are_recorded_anew(
    model: SVDQFluxTransformer2DModel, recorded: list[Tensor]
) -> None:
    first, second, third = steps(model)
    for policy in ("int8", "fp8"):
        model.set_activations(policy)
        for values in (first, second, third):
            assert torch.equal(run(model, values), eager(model, values))
    assert len(recorded) == 4
    model.cpu().cuda()
    for values in (first, second, third):
        assert torch.equal(run(model, values), eager(model, values))
    assert len(recorded) == 6


@pytest.mark.gpu
def test_two_models_and_two_streams(model: SVDQFluxTransformer2DModel) -> None:
    other = copy.deepcopy(model).set_activations("none")
    expected = {id(m): [eager(m, values) for values in steps(m, 4)] for m in (model, other)}
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i, values in enumerate(steps(model, 4)):
        for m in (model, other):
            with torch.cuda.stream(streams[i % 2]):
                assert torch.equal(run(m, values), expected[id(m)][i])


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_and_says_why(
    model: SVDQFluxTransformer2DModel, recorded: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    values = steps(model, 3)
    expected = [eager(model, v) for v in values]
    model.cpu()
    cpu_offload(model, torch.device("cuda"))
    moved = [{name: t.cuda() for name, t in v.items()} for v in values]
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for v, e in zip(moved, expected, strict=True):
            assert torch.equal(model(**v, return_dict=False)[0].cpu(), e)
    assert not recorded and caplog.text.count("offloading hooks") == 1


@pytest.mark.gpu
def test_a_failed_recording_falls_back(model: SVDQFluxTransformer2DModel, caplog: pytest.LogCaptureFixture) -> None:
    values = {"x": torch.ones(3, device="cuda")}
    runner = Graphs()

    def compute(given: dict[str, Tensor]) -> Tensor:
        return given["x"] * given["x"].sum().item()  # waits for the device, which no recording allows

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(runner.run(model, compute, values), torch.full((3,), 3.0, device="cuda"))
    assert caplog.text.count("recording failed") == 1


def test_graphs_of_two_threads_are_recorded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = [0, 0]  # now, and at most
    monkeypatch.setattr(graphs, "_recordable", lambda _: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    class Slow(graphs._Recorded):
        def __init__(self, module: nn.Module, *_: object) -> None:
            under_way[0] += 1
            under_way[1] = max(under_way)
            time.sleep(0.05)
            under_way[0] -= 1
            self.stamp = WeightsStamp(module)

        def __call__(self, inputs: graphs.Inputs) -> Tensor:
            return inputs["x"] + 1

    monkeypatch.setattr(graphs, "_Recorded", Slow)

    def record() -> None:
        runner, values = Graphs(), {"x": torch.zeros(2)}
        for _ in range(3):
            runner.run(nn.Identity(), lambda given: given["x"] + 1, values)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(record) for _ in range(4)]:
            done.result()
    assert under_way == [0, 1]

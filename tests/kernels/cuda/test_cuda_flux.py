"""A whole step of a small FLUX on the CUDA kernels: as near to exact as the reference, the same in every run and graph.

4-bit codes turn one rounding into a step of a seventh, so two correct runs of one model differ by several percent. What
the reference's own output moves by when its input changes in the last bit is the measure for that.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from support import relative_error
from tonfa.bench import synthetic
from tonfa.kernels.cuda import compiler
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import W4A16Linear
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(compiler.problem() is not None, reason=compiler.problem() or ""),
    pytest.mark.usefixtures("poisoned"),
]
GPU = "cuda"
SMALL = {**synthetic.DEMO, "num_layers": 2, "num_single_layers": 2}
"""Heads of 128 channels, as in every FLUX."""


def model_of(rank: int, dtype: torch.dtype) -> SVDQFluxTransformer2DModel:
    model = synthetic.quantized_model(SMALL, rank, torch.device("cpu")).set_cuda_graphs(False)
    torch.nn.Module.to(model, dtype)
    return model.to(GPU)


def inputs_of(size: tuple[int, int], text: int, dtype: torch.dtype, seed: int = 1) -> dict[str, Any]:
    return synthetic.step_inputs(SMALL, *size, batch=2, text_tokens=text, device=GPU, dtype=dtype, seed=seed)


def run(model: SVDQFluxTransformer2DModel, values: dict[str, Any], *policy: str) -> Tensor:
    with torch.no_grad():
        return model.set_activations(*policy)(**values)[0]


def nudged(values: dict[str, Any]) -> dict[str, Any]:
    """The image tokens a rounding away."""
    x, generator = values["hidden_states"], torch.Generator().manual_seed(2)
    noise = torch.randn(x.shape, generator=generator).to(x.device) * torch.finfo(x.dtype).eps / 2
    return {**values, "hidden_states": (x.float() * (1 + noise)).to(x.dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rank", "size", "text"), [(32, (80, 112), 13), (48, (272, 304), 77)])
def test_a_step(rank: int, size: tuple[int, int], text: int, dtype: torch.dtype) -> None:
    model, values = model_of(rank, dtype), inputs_of(size, text, dtype)
    found = run(model, values, "int4", "cuda")
    bound = {m.binding().kernels.backend for m in model.modules() if isinstance(m, SVDQLinear | W4A16Linear)}
    assert bound == {"cuda"} and found.dtype == dtype
    assert torch.equal(run(model, values, "int4", "cuda"), found)

    expected = run(model, values, "int4", "reference")
    own = relative_error(run(model, nudged(values), "int4", "reference"), expected)
    assert relative_error(found, expected) < 1.5 * own
    single = {name: v.float() if isinstance(v, Tensor) else v for name, v in values.items()}
    exact = run(copy.deepcopy(model).float(), single, "none", "reference")
    assert relative_error(found, exact) < 1.1 * relative_error(expected, exact)


def test_graphs_replay_it_bit_for_bit() -> None:
    model = model_of(32, torch.bfloat16)
    steps = [inputs_of((80, 112), 13, torch.bfloat16, seed) for seed in range(4)]
    expected = [run(model, values, "int4", "cuda") for values in steps]
    recorded = copy.deepcopy(model).set_cuda_graphs(True).set_activations("int4", "cuda")
    with torch.no_grad():
        for values, eager in zip(steps, expected, strict=True):
            assert torch.equal(recorded(**values)[0], eager)
    assert not torch.equal(expected[0], expected[1])

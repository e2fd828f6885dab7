"""The kernels of attention against their specifications: in 16 bits everywhere, in FP8 on a GPU that has it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from flux_models import dense_model, inputs, run
from torch import Tensor

from support import DEVICES, attention_inputs, attention_norms, relative_error
from tonfa.kernels.attention import choices, sdpa
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.ops import attention, attention_fp8
from tonfa.quantizer.recipe import Recipe

HERE = Path(__file__).parent
HALVES = (torch.bfloat16, torch.float16)
CASES = [
    ((1, 24, 4608, 128), torch.bfloat16),
    ((1, 2, 320, 128), torch.bfloat16),
    ((1, 3, 4608 + 77, 128), torch.float16),
    ((2, 4, 1024, 128), torch.bfloat16),
    ((1, 4, 640, 64), torch.float16),
]
"""FLUX at 1024 x 1024, the demo model, a length that no tile divides, a batch, small heads."""


def cuda(*tensors: Tensor) -> list[Tensor]:
    return [t.cuda() for t in tensors]


def cuda_norms(kind: str, size: int) -> list[list[Tensor]]:
    return [cuda(*norms) for norms in attention_norms(kind, size)]


@pytest.fixture
def fp8() -> object:
    """The module, where FP8 attention runs; elsewhere the test is skipped with dispatch's own reason."""
    reason = choices.FP8.reason_against(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    from tonfa.kernels.attention import fp8

    return fp8


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_quantizers_in_tritons_interpreter() -> None:
    tests = HERE.parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, HERE / "interpreted_quantize.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (77, 64), (256, 64), (77, 100), (1, 128), (77, 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_16_bit_attention_is_as_exact_as_torchs_own(
    device: str, dtype: torch.dtype, tokens: int, size: int, masked: bool
) -> None:
    """Also of q, k and v that lie in memory as (B, L, H, D), as products write them."""
    q, k, v = (t.to(device) for t in attention_inputs("gaussian", 2, 3, tokens, size, dtype))
    mask = None
    if masked:
        mask = (torch.arange(tokens) % 3 != 1)[None, None, None].to(device)
    exact = attention.reference(q.double(), k.double(), v.double(), mask)
    torchs = attention.reference(q, k, v, mask)
    by_tokens = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for operands in ((q, k, v), by_tokens):
        found = sdpa.attention(*operands, mask)
        assert found.shape == (2, tokens, 3 * size) and found.dtype == dtype
        assert relative_error(found, exact) <= 2 * relative_error(torchs, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_16_bit_attention_compiles_as_one_graph(device: str) -> None:
    q, k, v = (t.to(device) for t in attention_inputs("gaussian", 1, 2, 40, 64))
    compiled = torch.compile(sdpa.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), sdpa.attention(q, k, v))
    asked = torch.compile(lambda x: x + 1 if sdpa._cudnn_runs(x.device) else x - 1, fullgraph=True, backend="eager")
    assert torch.equal(asked(q), q + 1 if sdpa._cudnn_runs(q.device) else q - 1)


@pytest.mark.gpu
def test_16_bit_attention_asks_for_cudnn() -> None:
    if torch.cuda.get_device_capability() not in sdpa.CAPABILITIES:
        pytest.skip("torch's own choice is taken on this GPU")
    q, k, v = cuda(*attention_inputs("gaussian", 1, 2, 77, 64))
    assert sdpa._takes(q, k, v)
    assert not sdpa._takes(q.float(), k.float(), v.float())
    assert not sdpa._takes(q[..., :60], k[..., :60], v[..., :60])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        sdpa.attention(q, k, v)
    assert any("_scaled_dot_product_cudnn_attention" in event.key for event in profile.key_averages())


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "common", "center", "zeros"])
def test_quantizers_on_the_gpu(fp8, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    q, k, v = attention_inputs(kind, *shape, dtype)
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    found = fp8.quantize(*cuda(q, strided, v), *cuda_norms(kind, shape[3]))
    center = found.center.cpu()
    torch.testing.assert_close(center, attention_fp8.center(v), rtol=1e-2, atol=1e-5)
    rest = attention_fp8.centered(v, center)
    scales = attention_fp8.exponents(rest, *attention_norms(kind, shape[3]))
    for x, y, exponent in ((found.q, q, scales.q), (found.k, k, scales.k), (found.v, rest, scales.v)):
        assert torch.equal(x.cpu().view(torch.uint8), attention_fp8.quantize(y, exponent).view(torch.uint8))
    out = torch.randn(shape[0], shape[2], shape[1], shape[3]).to(torch.float8_e4m3fn)
    back = fp8.dequantize(out.cuda(), found.descale, found.center).flatten(2).cpu()
    assert torch.equal(back, attention_fp8.dequantize(out, scales.v, center, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "common", "center"])
def test_fp8_attention_keeps_to_its_specification(
    fp8, shape: tuple[int, ...], dtype: torch.dtype, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = cuda(*attention_inputs(kind, *shape, dtype))
    norms = cuda_norms(kind, shape[3])
    found = fp8.attention(q, k, v, None, *norms)
    assert not caplog.records
    exact = attention.reference(q.float(), k.float(), v.float())
    specified = attention_fp8.reference(q, k, v, *norms)
    assert relative_error(found, exact) <= 1.2 * relative_error(specified, exact)
    assert relative_error(found, specified) < 0.06  # other roundings of P and O alone
    assert torch.equal(fp8.attention(q, k, v, None, *norms), found)


@pytest.mark.gpu
def test_a_replayed_graph_is_the_eager_call(fp8) -> None:
    norms = cuda_norms("gaussian", 128)
    for tokens in (320, 4685):
        first, second = (cuda(*attention_inputs(kind, 1, 2, tokens, 128)) for kind in ("gaussian", "common"))
        expected = [fp8.attention(*x, None, *norms) for x in (first, second)]
        held = [t.clone() for t in first]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fp8.attention(*held, None, *norms)
        for given, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
            for to, x in zip(held, given, strict=True):
                to.copy_(x)
            graph.replay()
            assert torch.equal(out, wanted)


@pytest.mark.gpu
def test_streams_and_compilation(fp8) -> None:
    q, k, v = cuda(*attention_inputs("outliers", 1, 2, 500, 128))
    norms = cuda_norms("outliers", 128)
    expected = fp8.attention(q, k, v, None, *norms)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = fp8.attention(q, k, v, None, *norms)
    stream.synchronize()
    assert torch.equal(found, expected)
    compiled = torch.compile(fp8.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, None, *norms), expected)


@pytest.mark.gpu
def test_what_fp8_cannot_take_runs_in_16_bits_and_says_why_once(
    fp8, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "_said", set())
    q, k, v = cuda(*attention_inputs("gaussian", 1, 2, 33, 64))
    norms = cuda_norms("gaussian", 64)
    mask = (torch.arange(33, device="cuda") > 4)[None, None, None]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(fp8.attention(q, k, v, mask, *norms), sdpa.attention(q, k, v, mask))
            wide = [t.float() for t in (q, k, v)]
            assert torch.equal(fp8.attention(*wide, None, *norms), sdpa.attention(*wide))
    assert caplog.text.count("a mask was given") == caplog.text.count("not all bfloat16") == 1


WIDE = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "batch"), [({}, 1), (WIDE, 1), (WIDE, 2)], ids=["64", "128", "128 of two"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_models_steps_with_fp8_attention(
    fp8,
    sizes: dict[str, object],
    batch: int,
    dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of 128 leave the product in e4m3 on the Hopper backend, so that nothing is left to round."""
    model = SVDQFluxTransformer2DModel.from_dense(dense_model(dtype=dtype, **sizes), Recipe(iterations=1)).cuda()
    values = inputs(model, batch, (9, 31), dtype=dtype)
    exact = run(model.set_attention("sdpa"), values)
    model.set_cuda_graphs(False).set_attention("fp8")
    backend = model.transformer_blocks[0].attn.to_qkv.binding().kernels
    if sizes and backend.product_norm_rope_fp8 is not None:
        with monkeypatch.context() as without:
            without.setattr(fp8, "takes", lambda shape, device: False)
            model.set_attention("fp8")
            apart = run(model, values)
        model.set_attention("fp8")
        monkeypatch.delattr(fp8, "quantize")
        assert relative_error(run(model, values), apart) < 0.05
    eager = run(model, values)
    assert 0 < relative_error(eager, exact) < 0.1
    model.set_cuda_graphs(True)
    assert all(torch.equal(run(model, values), eager) for _ in range(3))
    other = {**values, "hidden_states": values["hidden_states"] * 3}
    replayed = run(model, other)
    assert torch.equal(replayed, run(model.set_cuda_graphs(False), other))  # scales are not of the recorded step
    assert torch.equal(run(model.set_attention("sdpa"), values), exact)
    assert not caplog.records

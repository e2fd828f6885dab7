"""A block's attention hands rounded heads on where backend and attention can, else 16-bit ones: on the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from flux_models import dense_model, inputs, run

from support import relative_error
from tonfa import dispatch
from tonfa.layers import attention as layer
from tonfa.layers import linear
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.ops import attention, attention_fp8
from tonfa.ops.activation import ScaledFP8
from tonfa.ops.attention_fp8 import Exponents, QuantizedHeads
from tonfa.ops.fused import Projection
from tonfa.ops.table import AttentionKernels
from tonfa.quantizer.recipe import Recipe

CPU = torch.device("cpu")


class Fake:
    """The reference backend with heads in e4m3, and an attention of them; counts what is called."""

    def __init__(self) -> None:
        self.kernels = replace(dispatch.bind(CPU, "int8", "reference"), product_norm_rope_fp8=self.project)
        self.takes_shapes, self.projects = True, True
        self.shapes: list[torch.Size] = []
        self.rounded = self.plain = 0
        self.exponents: Exponents | None = None

    def bind(self, *_: object) -> dispatch.Kernels:
        return self.kernels

    def bind_attention(self, *_: object) -> AttentionKernels:
        return AttentionKernels(self.attention, self.takes, self.attend)

    def project(self, projections: Sequence[Projection]) -> QuantizedHeads | None:
        if not self.projects:
            return None
        parts = [self.kernels.product_norm_rope(p.x, p.w, p.norm_q, p.norm_k, p.rotary) for p in projections]
        q, k, v = (torch.cat(same, 2) for same in zip(*parts, strict=True))
        norm_q, norm_k = [p.norm_q for p in projections], [p.norm_k for p in projections]
        center = attention_fp8.center(v)
        self.exponents = attention_fp8.exponents(attention_fp8.centered(v, center), norm_q, norm_k)
        return attention_fp8.round_heads(q, k, v, center, self.exponents)

    def takes(self, shape: torch.Size, device: torch.device) -> bool:
        self.shapes.append(shape)
        return self.takes_shapes

    def attend(self, x: QuantizedHeads, dtype: torch.dtype) -> ScaledFP8:
        assert self.exponents is not None
        self.rounded += 1
        out = attention_fp8.attend(x.q, x.k, x.v, self.exponents)
        return ScaledFP8(out.flatten(2), x.descale, x.center, dtype)

    def attention(self, q, k, v, mask, norm_q, norm_k) -> torch.Tensor:
        self.plain += 1
        if mask is not None:
            return attention.reference(q, k, v, mask)
        return attention_fp8.reference(q, k, v, norm_q, norm_k)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr(linear, "bind", found.bind)
    monkeypatch.setattr(layer, "bind_attention", found.bind_attention)
    return found


@pytest.mark.parametrize("batch", [1, 2])
def test_rounded_heads_give_what_rounding_them_later_gives(fake: Fake, batch: int) -> None:
    model = SVDQFluxTransformer2DModel.from_dense(dense_model(dtype=torch.bfloat16), Recipe(iterations=1))
    values = inputs(model, batch, dtype=torch.bfloat16)
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    found = run(model, values)
    assert (fake.rounded, fake.plain) == (blocks, 0)
    assert set(fake.shapes) == {(batch, 2, 13 + 35, 64)}
    for refusal in ("takes_shapes", "projects"):
        fake.rounded = fake.plain = 0
        fake.takes_shapes = fake.projects = True
        setattr(fake, refusal, False)
        assert relative_error(run(model, values), found) < 1e-5
        assert (fake.rounded, fake.plain) == (0, blocks)
    fake.takes_shapes = fake.projects = True
    masked = {**values, "joint_attention_kwargs": {"attention_mask": torch.ones(batch, 13 + 35, dtype=torch.bool)}}
    assert 0 < relative_error(run(model, masked), found) < 0.1
    assert fake.rounded == 0

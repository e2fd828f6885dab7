"""The work of a step against numbers worked out by hand."""

from __future__ import annotations

import pytest

from tonfa.bench.synthetic import DEMO, FULL
from tonfa.bench.work import flux_work

H = 3072
BLOCKS = 19 + 38


def test_flux_at_1024() -> None:
    work = flux_work(FULL, 1024, 1024, 1, 512, 32)
    tokens = 4096 + 512
    assert work.rows == tokens
    assert sorted(work.shapes) == [(H, H), (H, 4 * H), (3 * H, H), (4 * H, H)]
    # Each block multiplies every token with 12 H^2 weights: q, k, v, out, and 4 + 4 of the MLP.
    assert work.linear_flops == 2 * 12 * H**2 * tokens * BLOCKS
    assert work.linear_flops == pytest.approx(59.5e12, rel=1e-3)
    # q k^T and the product with v, of all heads together.
    assert work.attention_flops == 2 * 2 * tokens**2 * H * BLOCKS
    assert work.attention_flops == pytest.approx(14.9e12, rel=2e-3)
    # (N + K) R twice: qkv 4 H, out 2 H, up 5 H, down 5 H.
    assert work.lowrank_flops == 2 * 32 * 16 * H * tokens * BLOCKS
    # 4-bit codes, and a 16-bit scale for each 64 of them.
    assert work.packed_bytes == pytest.approx((0.5 + 2 / 64) * (12 * H**2) * (2 * 19 + 38))
    # Modulations: 12 H^2 in a double block, 3 H^2 in a single one, with scales and zeros.
    assert work.modulation_bytes == pytest.approx((0.5 + 4 / 64) * H**2 * (12 * 19 + 3 * 38))
    # qkv (with the MLP's first in a single block) and out; the MLP's first apart in a double block.
    assert work.quantize_bytes == 3 * H * tokens * (3 * 19 + 2 * 38)
    assert work.outer_flops == 2 * H * (4096 * (128 + 64) + 512 * 4096)


def test_batch_multiplies_and_rank_0_has_no_branch() -> None:
    one, four = (flux_work(DEMO, 256, 512, batch, 64, 0) for batch in (1, 4))
    assert one.lowrank_flops == 0 and one.rows == 16 * 32 + 64
    for name in ("rows", "linear_flops", "attention_flops", "outer_flops", "quantize_bytes"):
        assert getattr(four, name) == 4 * getattr(one, name)
    assert (four.packed_bytes, four.modulation_bytes) == (one.packed_bytes, one.modulation_bytes)

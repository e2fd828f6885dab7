"""`layers` of config.json: what it changes in a plan, and what is refused."""

from __future__ import annotations

import pytest

from tonfa.checkpoint.deviations import with_deviations
from tonfa.errors import CheckpointError
from tonfa.models.flux.plan import FluxDims, flux_plan

PLAN = flux_plan(FluxDims(128, 1, 1, True))
QKV, UP, DOWN = ("transformer_blocks.0." + name for name in ("attn.to_qkv", "ff.up", "ff.down"))
NORM = "single_transformer_blocks.0.norm.linear"


def test_only_the_named_linears_change() -> None:
    layers = {QKV: {"parts": 3}, UP: {"rank": 48}, DOWN: {"rank": 64, "unsigned": False}, NORM: {"plus_one": False}}
    before, after = ({x.name: x for x in p.linears()} for p in (PLAN, with_deviations(PLAN, layers, "config.json")))
    assert {name for name in before if before[name] != after[name]} == layers.keys()
    assert (after[QKV].parts, after[UP].rank, after[DOWN].rank) == (3, 48, 64)
    assert before[DOWN].unsigned and not after[DOWN].unsigned
    assert before[NORM].plus_one == ((128, 256),) and after[NORM].plus_one == ()


def test_nothing_changes_nothing() -> None:
    assert with_deviations(PLAN, None, "config.json") == with_deviations(PLAN, {}, "config.json") == PLAN


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers is list, expected an object"),
        ({"transformer_blocks.1.ff.up": {}}, r"names transformer_blocks\.1\.ff\.up, which this model does not have"),
        ({"proj_out": {"rank": 16}}, "proj_out"),
        ({UP: 16}, r"ff\.up is int, expected an object"),
        ({UP: {"ranks": 16}}, "ranks 16 means nothing"),
        ({UP: {"rank": 0}}, "rank 0 means nothing"),
        ({UP: {"rank": 10**9}}, "rank 1000000000 means nothing"),
        ({UP: {"rank": True}}, "rank True means nothing"),
        ({UP: {"rank": 16.0}}, r"rank 16\.0 means nothing"),
        ({UP: {"parts": 3}}, "parts 3 means nothing"),
        ({QKV: {"parts": 2}}, "parts 2 means nothing"),
        ({QKV: {"unsigned": False}}, "unsigned False means nothing"),
        ({DOWN: {"unsigned": True}}, "unsigned True means nothing"),
        ({DOWN: {"plus_one": False}}, "plus_one False means nothing"),
        ({NORM: {"plus_one": True}}, "plus_one True means nothing"),
        ({NORM: {"rank": 16}}, "rank 16 means nothing"),
    ],
)
def test_what_means_nothing_is_refused(layers: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        with_deviations(PLAN, layers, "config.json")

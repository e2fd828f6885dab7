"""The path of every element from the canonical layouts to the tensor cores and back, followed on the CPU.

ldmatrix and mma are restated from the PTX ISA (fragments of m16n8k64 with 4-bit operands, of m16n8k16 with 16-bit
ones); index functions are taken from the device code's own text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

import numpy as np
import pytest
import torch

from tonfa.formats import INT4, UINT4

DEVICE = files("tonfa.kernels.cuda") / "device"
LANES = np.arange(32)
ROW, QUARTER = LANES // 4, LANES % 4
TILE = 128


def device_function(file: str, name: str) -> Callable[..., int]:
    """A one-line integer function of the device code; C's division of non-negative integers is Python's `//`."""
    text = (DEVICE / file).read_text()
    found = re.search(rf"inline int {name}\(([^)]*)\) {{\s*return ([^;]*);\s*}}", text)
    assert found, name
    parameters = [p.split()[-1] for p in found[1].split(",")]
    expression = " ".join(found[2].replace("/", "//").split())
    return eval(f"lambda {', '.join(parameters)}: {expression}")


channel_of_slot = device_function("product.cuh", "channel_of_slot")
operand_offset = device_function("product.cuh", "operand_offset")


def nibbles(words: np.ndarray, unsigned: bool) -> np.ndarray:
    """(...,) uint32 -> (..., 8) values, the first in the lowest bits."""
    values = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(np.int64)
    return values if unsigned else (values ^ 8) - 8


def mma_m16n8k64(a: np.ndarray, b: np.ndarray, unsigned: bool) -> np.ndarray:
    """Registers a (32 lanes, 4), b (32, 2) of eight codes each -> c (32, 4) integers."""
    A, B = np.zeros((16, 64), np.int64), np.zeros((64, 8), np.int64)
    for lane in LANES:
        for i, values in enumerate(nibbles(a[lane], unsigned)):
            k = 8 * QUARTER[lane] + 32 * (i // 2)
            A[ROW[lane] + 8 * (i % 2), k : k + 8] = values
        for i, values in enumerate(nibbles(b[lane], unsigned=False)):
            k = 8 * QUARTER[lane] + 32 * i
            B[k : k + 8, ROW[lane]] = values
    return of_lanes(A @ B)


def mma_m16n8k16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Registers a (32, 4, 2), b (32, 2, 2) of two values each -> c (32, 4)."""
    A, B = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in LANES:
        for i in range(4):
            k = 2 * QUARTER[lane] + 8 * (i // 2)
            A[ROW[lane] + 8 * (i % 2), k : k + 2] = a[lane, i]
        for i in range(2):
            k = 2 * QUARTER[lane] + 8 * i
            B[k : k + 2, ROW[lane]] = b[lane, i]
    return of_lanes(A @ B)


def of_lanes(C: np.ndarray) -> np.ndarray:
    """(16, 8) -> each lane's four elements."""
    return np.stack([C[ROW + 8 * (i // 2), 2 * QUARTER + i % 2] for i in range(4)], axis=1)


def ldmatrix(memory: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """Four 8 x 8 matrices of 16 bits, rows at the lanes' addresses -> (32, 4) words."""
    out = np.zeros((32, 4), np.uint32)
    for lane in LANES:
        for i in range(4):
            start = addresses[8 * i + lane // 4] + 4 * (lane % 4)
            out[lane, i] = memory[start : start + 4].view(np.uint32)[0]
    return out


def banks_differ(addresses: np.ndarray) -> bool:
    """Whether the eight 16-byte rows of each of the four matrices lie in different banks."""
    return all(len(set((addresses[8 * i : 8 * i + 8] // 16) % 8)) == 8 for i in range(4))


@pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])
def test_a_group_of_a_tile(unsigned: bool) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 16, (TILE, 64)) if unsigned else random.integers(-8, 8, (TILE, 64))
    w = random.integers(-8, 8, (TILE, 64))
    packed_x = (UINT4 if unsigned else INT4).pack(torch.from_numpy(x)).numpy()
    packed_w = INT4.pack(torch.from_numpy(w)).numpy()

    memory_x, memory_w = np.full(TILE * 32, 0xEE, np.uint8), np.full(TILE * 32, 0xEE, np.uint8)
    for thread in range(128):
        slot, half = thread // 2, thread % 2
        for later in (0, 64):
            for memory, rows, row in (
                (memory_x, packed_x, slot + later),
                (memory_w, packed_w, channel_of_slot(slot) + later),
            ):
                at = operand_offset(slot, half) + later * 32
                memory[at : at + 16] = rows[row, 16 * half : 16 * half + 16]

    found = np.full((TILE, TILE), -(10**6))
    x_lanes = np.array([operand_offset(lane % 16, lane // 16) for lane in LANES])
    w_lanes = np.array([operand_offset(lane // 16 * 8 + lane % 8, lane // 8 % 2) for lane in LANES])
    assert banks_differ(x_lanes) and banks_differ(w_lanes)
    for warp in range(4):
        for m in range(2):
            a = ldmatrix(memory_x, x_lanes + warp * 32 * 32 + m * 16 * 32)
            for b in range(4):
                for pair in range(2):
                    words = ldmatrix(memory_w, w_lanes + (2 * b + pair) * 16 * 32)
                    for t in range(2):
                        j = 2 * pair + t
                        c = mma_m16n8k64(a, words[:, 2 * t : 2 * t + 2], unsigned)
                        for i in range(4):
                            rows = warp * 32 + 16 * m + 8 * (i // 2) + ROW
                            found[rows, 32 * b + 8 * QUARTER + 2 * j + i % 2] = c[:, i]
    assert np.array_equal(found, x @ w.T)


def test_slots_are_a_permutation_that_keeps_64_apart() -> None:
    slots = np.arange(TILE)
    channels = np.array([channel_of_slot(int(s)) for s in slots])
    assert sorted(channels) == list(slots)
    assert np.array_equal(channels[64:], channels[:64] + 64)
    at = np.array([[operand_offset(int(s), half) for half in (0, 1)] for s in slots])
    assert sorted(at.ravel()) == list(range(0, TILE * 32, 16)) and np.array_equal(at[64:], at[:64] + 64 * 32)


def test_up_projection() -> None:
    """16 ranks: a lane takes ranks 4 q to 4 q + 3 of both operands."""
    random = np.random.default_rng(0)
    lowrank, up = random.standard_normal((16, 16)), random.standard_normal((32, 16))
    found = np.full((16, 32), np.nan)
    for t in range(4):
        a = np.stack(
            [lowrank[(ROW + 8 * (i % 2))[:, None], 4 * QUARTER[:, None] + 2 * (i // 2) + [0, 1]] for i in range(4)], 1
        )
        n = np.array([channel_of_slot(int(r)) for r in ROW]) + 2 * t
        b = np.stack([up[n[:, None], 4 * QUARTER[:, None] + 2 * i + [0, 1]] for i in range(2)], 1)
        c = mma_m16n8k16(a, b)
        for i in range(4):
            found[ROW + 8 * (i // 2), 8 * QUARTER + 2 * t + i % 2] = c[:, i]
    np.testing.assert_allclose(found, lowrank @ up.T)


def test_down_projection() -> None:
    """32 channels: a lane has channels 8 q to 8 q + 7 of both operands, and multiplies them in two steps."""
    random = np.random.default_rng(0)
    x, down = random.standard_normal((16, 32)), random.standard_normal((8, 32))
    c = np.zeros((32, 4))
    lane_x = [x[(ROW + 8 * i)[:, None], 8 * QUARTER[:, None] + np.arange(8)].reshape(32, 4, 2) for i in range(2)]
    lane_down = down[ROW[:, None], 8 * QUARTER[:, None] + np.arange(8)].reshape(32, 4, 2)
    for step in (0, 2):
        a = np.stack([lane_x[0][:, step], lane_x[1][:, step], lane_x[0][:, step + 1], lane_x[1][:, step + 1]], 1)
        c += mma_m16n8k16(a, lane_down[:, step : step + 2])
    np.testing.assert_allclose(c, of_lanes(x @ down.T))


@pytest.mark.parametrize("bits", [8, 11], ids=["bf16", "fp16"])
def test_integers_become_floats_without_error(bits: int) -> None:
    """fma(1.5 * 2^23 + p, s, -1.5 * 2^23 * s) has one rounding, and p * s fits 24 bits: it is exact."""
    magic = 1.5 * 2**23
    assert np.array([magic], np.float32).view(np.int32)[0] == 0x4B400000
    p = np.arange(-64 * 8 * 8, 64 * 15 * 8 + 1)
    assert np.array_equal((p + 0x4B400000).astype(np.int32).view(np.float32), (magic + p).astype(np.float32))
    for mantissa in (2 ** (bits - 1), 2 ** (bits - 1) + 1, 2**bits - 1):
        scale = np.float64(mantissa)
        assert np.float32(magic * scale) == magic * scale
        assert np.array_equal((p * scale).astype(np.float32), p * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_division_by_the_reciprocal_is_a_true_division(dtype: torch.dtype) -> None:
    """All mantissas of 16-bit x and factor; float64 stands in for the fma, whose product is exact in it."""
    step = torch.finfo(dtype).eps
    mantissas = torch.arange(1, 2, step, dtype=torch.float64)
    if dtype == torch.float16:
        mantissas = torch.cat((mantissas[::7], mantissas[-16:]))
    x, s = mantissas[:, None], mantissas[None, :]
    reciprocal = (1 / s).float().double()
    quotient = (x * reciprocal).float().double()
    remainder = (x - quotient * s).float().double()
    corrected = (quotient + remainder * reciprocal).float()
    assert torch.equal(corrected.to(dtype), (x.float() / s.float()).to(dtype))

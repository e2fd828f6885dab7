"""The product's device code on the CPU, alone and in clusters of two blocks whose threads and copies take random turns.

What cluster.hpp models: barriers with arrivals and bytes, multicast copies, blocks that return, wgmma. What it cannot
show: the order of memory accesses of a GPU, and time.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from support import outlier_input, random_weights, relative_error
from tonfa import dispatch
from tonfa.formats import INT4
from tonfa.kernels.cuda.kernel import Kernel, Struct, _device_code
from tonfa.kernels.hopper import inputs, layout, packed_product, product, product_kernel, product_norm_rope, tiles
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.weights import SVDQWeights

HERE = Path(__file__).parent
BF16, FP16 = torch.bfloat16, torch.float16
STATUS = (
    "fine",
    "threads wait for ever",
    "a barrier is used before it is initialized",
    "a copy is misaligned",
    "a block is written to that has returned",
    "too many arrive",
    "too many bytes arrive",
    "a stage is read or loaded while it is loaded",
    "copies or barriers are left unfinished",
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
Changes = tuple[tuple[str, str], ...]


@lru_cache(maxsize=64)
def library(kernel: Kernel, folder: Path, changes: Changes = ()) -> Any:
    """The kernel as a function of the CPU; `changes`: parts of its source, and what stands there instead."""
    place = folder / re.sub(r"\W+", "_", f"{kernel}{changes}")[:200]
    place.mkdir(exist_ok=True)
    changed = 0
    for name, text in _device_code("tonfa.kernels.hopper").items():
        for old, new in changes:
            changed += text.count(old)
            text = text.replace(old, new)
        text = re.sub(r"extern __shared__ .*? raw\[\];", "char* raw = memory_of_block();", text)
        (place / name).write_text(re.sub(r"#pragma (unroll|once)", "", text))
    assert changed == len(changes), "the source is another: let the changes follow"
    for name in ("asynchronous.cuh", "numbers.cuh", "instructions.cuh"):
        (place / name).write_text("")
    (struct,) = kernel.parameters
    (place / "main.cpp").write_text(
        f'#include "simt.hpp"\n#include "cluster.hpp"\nstatic float __frcp_rn(float x) {{ return 1 / x; }}\n'
        f'#include "{kernel.name}.cu"\n{struct.layout()}'
        'extern "C" int run(unsigned blocks, unsigned threads, unsigned seed, void* parameter) {\n'
        f"  auto& a = *static_cast<{struct.__name__}*>(parameter);\n"
        f"  return run_clusters(blocks, threads, seed, [&] {{ {kernel.name}(a); }});\n}}\n"
    )
    options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]
    defines = [f"-D{name}={value}" for name, value in kernel.defines]
    folders = [f"-I{place}", f"-I{HERE}", f"-I{HERE.parent / 'cuda'}"]
    command = ["g++", *options, *defines, *folders, "-o", str(place / "run.so"), str(place / "main.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:5000]
    return ctypes.CDLL(str(place / "run.so")).run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("product")


class Device:
    """A GPU of a few multiprocessors; `statuses` are what its launches said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.multiprocessors, self.seed = 2, 1
        self.changes: Changes = ()
        self.statuses: list[str] = []
        self.clusters: list[int] = []

    def launch(self, kernel: Kernel, device: torch.device, grid: tuple[int, ...], parameter: Struct) -> None:
        assert grid[0] % kernel.cluster == 0
        run = library(kernel, self.folder, self.changes)
        self.statuses.append(STATUS[run(grid[0], kernel.threads, self.seed, ctypes.byref(parameter))])
        self.clusters.append(kernel.cluster)


@pytest.fixture
def device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device(folder)
    monkeypatch.setattr(product_kernel, "launch", device.launch)
    for module in (product_kernel, product):
        monkeypatch.setattr(module, "multiprocessors", lambda _: device.multiprocessors)
    monkeypatch.setattr(tiles, "choose", lambda *_: 32)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    yield device
    torch.use_deterministic_algorithms(False)


def packed(w: SVDQWeights) -> packed_product.PackedProduct:
    """With the weights expanded as expand.cu does it."""
    done = packed_product.pack_product(w)
    n = done.columns
    ratios = (
        done.wscales.T.float() * torch.nn.functional.pad(done.inverse_scales, (0, n - w.out_features))[:, None]
    ).half()
    values = INT4.unpack(done.qweight).unflatten(1, (-1, 64)).half() * ratios.unsqueeze(2)
    codes = values.flatten(1).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return replace(done, wide=layout.pack_codes(codes))


def quantized(x: Tensor, w: SVDQWeights) -> tuple[QuantizedActivation, HopperActivation]:
    """As the reference has it, and in this backend's layout with NaN in all padding."""
    plain = REFERENCE.quantize(x, InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "fp8"))
    assert plain.scales is not None and plain.lowrank is not None
    m, rank, padded = x.shape[0], w.rank, -(-x.shape[0] // 8) * 8
    codes = layout.pack_codes(plain.codes)
    codes[:, m:] = 0x7F
    scales = torch.full((padded,), torch.nan)
    scales[:m] = plain.scales[:, 0]
    lowrank = torch.full((padded, -(-rank // 64) * 64), torch.nan, dtype=BF16)
    lowrank[:m, :rank] = plain.lowrank / plain.scales
    stored = layout.swizzle(lowrank.view(padded, -1, 64).permute(1, 0, 2).contiguous().view(torch.uint8)).view(BF16)
    norms = torch.zeros(padded)
    norms[:m] = (plain.codes.float() * plain.scales).norm(dim=1) * 1.01
    rounded = lowrank[:m, :rank].float() * plain.scales
    return replace(plain, lowrank=rounded), HopperActivation(
        codes, scales[:m], stored, x.dtype, m, x.shape[1], 0, rank, norms
    )


REFERENCE = dispatch.bind(torch.device("cpu"), "fp8", "reference")


def make(m: int, n: int, k: int, rank: int, dtype: torch.dtype = BF16) -> tuple[SVDQWeights, Tensor]:
    generator = torch.Generator().manual_seed(m + n + k + rank)
    w = random_weights(n, k, max(rank, 1), generator=generator, dtype=dtype)
    if rank == 0:
        w = replace(w, proj_down=w.proj_down[:, :0], proj_up=w.proj_up[:, :0])
    return w, outlier_input(m, k, generator, dtype)


def alone_and_in_clusters(device: Device, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], seeds: int) -> Any:
    """The results of `call` with blocks alone; in clusters they are equal to the bit in any order of things."""
    monkeypatch.setattr(tiles, "CLUSTER", 1)
    alone = call()
    monkeypatch.setattr(tiles, "CLUSTER", 2)
    for seed in range(1, seeds + 1):
        device.seed = seed * 7919
        for found, expected in zip(call(), alone, strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (seed, device.statuses)
    assert set(device.statuses) == {"fine"} and device.clusters == [1] + [2] * seeds
    return alone


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "multiprocessors", "dtype"),
    [
        (1, 256, 64, 16, 2, BF16),
        (77, 256, 1216, 0, 4, BF16),  # more steps than stages; three tiles of tokens in two clusters
        (37, 448, 192, 80, 2, FP16),  # the last tile has 64 channels, the last tokens are 8
        (100, 512, 128, 32, 6, BF16),
    ],
)
def test_product(
    m: int, n: int, k: int, rank: int, multiprocessors: int, dtype: torch.dtype, device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    w, x = make(m, n, k, rank, dtype)
    plain, stored = quantized(x, w)
    weights = packed(w)
    device.multiprocessors = multiprocessors
    (found,) = alone_and_in_clusters(device, monkeypatch, lambda: [product.product(stored, weights)], 4)
    assert relative_error(found, REFERENCE.product(plain, REFERENCE.pack_product(w))) < 1e-2


def test_product_of_a_part_of_the_ranks(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = make(40, 256, 128, 96)
    plain, stored = quantized(x, w)
    assert plain.lowrank is not None
    weights = replace(w, proj_down=w.proj_down[:, 48:], proj_up=w.proj_up[:, 48:])
    own, part = packed(weights), stored.split((48, 48))[1]
    (found,) = alone_and_in_clusters(device, monkeypatch, lambda: [product.product(part, own)], 2)
    plain = replace(plain, lowrank=plain.lowrank[:, 48:])
    assert relative_error(found, REFERENCE.product(plain, REFERENCE.pack_product(weights))) < 1e-2


def test_product_gate_residual(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = make(2 * 21, 256, 192, 16)
    plain, stored = quantized(x, w)
    residual, gate = torch.randn(2, 21, 256).bfloat16(), torch.randn(2, 256).bfloat16()
    weights = packed(w)
    (found,) = alone_and_in_clusters(
        device, monkeypatch, lambda: [product.product_gate_residual(stored, weights, residual, gate)], 2
    )
    expected = REFERENCE.product_gate_residual(plain, REFERENCE.pack_product(w), residual, gate)
    assert relative_error(found, expected) < 1e-2


def test_product_norm_rope(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = make(33, 6 * 128, 128, 16)
    plain, stored = quantized(x, w)
    norms = [torch.rand(128).bfloat16() + 0.5 for _ in range(2)]
    angles = torch.rand(33, 64).repeat_interleave(2, 1) * 6
    rotary, weights = (angles.cos(), angles.sin()), packed(w)
    found = alone_and_in_clusters(
        device, monkeypatch, lambda: product_norm_rope.product_norm_rope(stored, weights, *norms, rotary), 2
    )
    expected = REFERENCE.product_norm_rope(plain, REFERENCE.pack_product(w), *norms, rotary)
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, expected, strict=True))


@dataclass
class Mlp:
    """Two linears with a GELU between them; `run` tiles of 64 tokens share their sums."""

    up: SVDQWeights
    down: SVDQWeights
    x: QuantizedActivation
    call: Callable[[], list[Tensor]]
    """Codes, scales and partial sums of the second one's input."""


@pytest.fixture
def mlp(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mlp]:
    def build(m: int, k: int, inner: int, rank: int, run: int, dtype: torch.dtype = BF16) -> Mlp:
        (up, x), (down, _) = make(m, inner, k, 16, dtype), make(1, 64, inner, rank, dtype)
        plain, stored = quantized(x, up)
        following = InputWeights(down.smooth_factor, down.proj_down, False, "fp8")
        sums: list[Tensor] = []
        monkeypatch.setattr(product, "add_lowrank", lambda partial, result: sums.append(partial[:, : result.rows]))
        monkeypatch.setattr(tiles, "choose_run", lambda *_: (64, run))
        weights, next_input = packed(up), inputs.pack_input(following)

        def call() -> list[Tensor]:
            found = product.product_gelu_quantize(stored, weights, next_input)
            assert isinstance(found, HopperActivation)
            return [found.codes[:, :m], found.scales, sums[-1]]

        return Mlp(up, down, plain, call)

    return build


@pytest.mark.parametrize(
    ("m", "k", "rank", "run", "dtype"),
    [(90, 320, 16, 2, BF16), (9, 192, 64, 1, FP16), (130, 320, 0, 3, BF16), (70, 832, 32, 3, BF16)],
)
def test_product_gelu_quantize(
    m: int, k: int, rank: int, run: int, dtype: torch.dtype, device: Device, mlp: Callable[..., Mlp],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two blocks, so that one has several runs of tiles; 1536 channels or less are four, six or twelve of them."""
    inner = 256 * run * 2
    made = mlp(m, k, inner, rank, run, dtype)
    codes, scales, partial = alone_and_in_clusters(device, monkeypatch, made.call, 3)
    y = REFERENCE.product(made.x, REFERENCE.pack_product(made.up)).float()
    exact = torch.nn.functional.gelu(y, approximate="tanh")
    values = layout.unpack_codes(codes, m, inner).float() * scales[:, None]
    assert relative_error(values, exact / made.down.smooth_factor.float()) < 4e-2
    if rank:
        assert relative_error(partial.sum(0), exact @ made.down.proj_down.float()) < 1e-2


def test_one_step_leaves_the_projection_to_another_kernel(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    (up, x), (down, _) = make(9, 256, 128, 16), make(1, 64, 256, 16)
    plain, stored = quantized(x, up)
    following = inputs.pack_input(InputWeights(down.smooth_factor, down.proj_down, False, "fp8"))
    monkeypatch.setattr(product, "quantize_known", lambda y, w, absmax, arrived: (y, absmax))
    y, absmax = cast(tuple[Tensor, Tensor], product.product_gelu_quantize(stored, packed(up), following))
    exact = torch.nn.functional.gelu(REFERENCE.product(plain, REFERENCE.pack_product(up)).float(), approximate="tanh")
    assert device.statuses == ["fine"] and relative_error(y, exact) < 1e-2
    assert torch.equal(absmax, (y.float() * following.inverse).abs().amax(1))


MISTAKES: dict[str, Changes] = {
    "barriers of one block alone": (("shared.empty(i), 8 * CLUSTER", "shared.empty(i), 8"),),
    "stages that the other block has not read": (
        ("shared.empty(i), 8 * CLUSTER", "shared.empty(i), 8"),
        ("if (lane < CLUSTER) barrier_arrive_at(empty, lane);", "if (lane == 0) barrier_arrive(empty);"),
    ),
    "stages that are being read": (("    wgmma_wait<1>();\n    if (pending)", "    if (pending)"),),
    "one tile's scales over those of the one before": (("SCALE_SLOTS = STAGES + 1", "SCALE_SLOTS = 1"),),
    "half of the bytes expected": (("barrier_expect(bar, x_bytes +", "barrier_expect(bar, x_bytes / CLUSTER +"),),
    "its own half for itself alone": (("(1 << CLUSTER) - 1", "1 << rank_in_cluster()"),),
    "the same half twice": (("first = rank_in_cluster() * part", "first = 0"),),
    "stages that are not full": (
        ("    barrier_wait(shared.full(ring.at), ring.phase);\n    wgmma_fence", "    wgmma_fence"),
    ),
    "a block that returns first": (
        ("    for (int i = 0; i < STAGES; ++i, ring.next()) barrier_wait", "    if (0) barrier_wait"),
    ),
    "blocks that do not wait for each other's barriers": (("    sync_cluster();", "    __syncthreads();"),),
    "more tiles in one block": (("first = blockIdx.x / CLUSTER", "first = blockIdx.x"),),
}


MISTAKES_BEHIND_A_GELU: dict[str, Changes] = {
    "a tile that is projected before its GELU": (("    barrier_wait(shared.taken(), phase);\n", ""),),
    "a down-projection that is not there": (("    barrier_wait(shared.down_full(), phase);\n", ""),),
    "a tile over one that is being projected": (
        ("    if (behind) down.wait_for_all();\n", "    down.phase ^= behind;\n"),
    ),
    "the next down-projection over one that is used": (
        ("    epilogue.prepare(tile);", "    epilogue.load_down(tile);\n    epilogue.prepare(tile);"),
        ("    const int m0 = tile.m0();\n    load_down(tile);", "    const int m0 = tile.m0();"),
    ),
    "sums that begin with those of the run before": (("!first || j > 0", "1"),),
}


def seen(device: Device, mistake: Changes, call: Callable[[], list[Tensor]]) -> bool:
    """In the status or the result of one of a few orders of things."""
    expected = call()
    device.changes = mistake
    assert device.statuses == ["fine"]
    for seed in range(1, 25):
        device.seed = seed * 7919
        found = call()
        equal = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))
        if device.statuses[-1] != "fine" or not equal:
            return True
    return False


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, device: Device) -> None:
    """Those that this protocol could have."""
    w, x = make(150, 256, 896, 16)  # as many steps as stages
    stored, weights = quantized(x, w)[1], packed(w)
    assert seen(device, MISTAKES[mistake], lambda: [product.product(stored, weights)])


@pytest.mark.parametrize("mistake", MISTAKES_BEHIND_A_GELU)
def test_mistakes_behind_a_gelu_are_seen(mistake: str, device: Device, mlp: Callable[..., Mlp]) -> None:
    assert seen(device, MISTAKES_BEHIND_A_GELU[mistake], mlp(130, 832, 1024, 16, 2).call)

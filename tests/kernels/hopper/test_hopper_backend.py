"""The Hopper kernels against the reference, at every shape of FLUX and at odd ones; their layouts on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support import outlier_input, random_modulation, random_weights, relative_error
from tonfa import dispatch
from tonfa.errors import FormatError
from tonfa.formats import FP8, INT4
from tonfa.kernels.hopper import expanded, layout, quantize, tiles
from tonfa.kernels.hopper.activation import HopperActivation, empty_activation
from tonfa.kernels.hopper.expand import expand, wide_shape
from tonfa.kernels.hopper.packed_product import pack_product
from tonfa.kernels.hopper.product_norm_rope_fp8 import product_norm_rope_fp8
from tonfa.ops import attention_fp8, fused
from tonfa.ops.activation import InputWeights, QuantizedActivation, ScaledFP8
from tonfa.weights import SVDQWeights, W4A16Weights

FLUX = [(4608, 9216, 3072, 32), (4608, 3072, 3072, 32), (4608, 12288, 3072, 32), (4608, 3072, 12288, 32)]
ODD = [(1, 128, 64, 16), (17, 384, 192, 48), (255, 64, 256, 32), (300, 200, 1024, 128), (4685, 3072, 3072, 0)]
DTYPES = [torch.bfloat16, torch.float16]


def make(n: int, k: int, rank: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> SVDQWeights:
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(n, k, max(rank, 1), generator=generator, dtype=dtype)
    moved = {name: t.cuda() for name, t in weights.tensors().items()}
    moved["proj_down"], moved["proj_up"] = moved["proj_down"][:, :rank], moved["proj_up"][:, :rank]
    moved["wscales"] = moved["wscales"] * torch.where(torch.rand(moved["wscales"].shape) < 0.3, -1, 1).cuda()
    return SVDQWeights(**moved)


def rows(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return outlier_input(m, k, torch.Generator().manual_seed(seed), dtype).cuda()


def input_of(w: SVDQWeights) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "fp8")


def kernels(name: str = "hopper") -> dispatch.Kernels:
    return dispatch.bind(torch.device("cuda"), "fp8", name)


def plain(x: QuantizedActivation) -> QuantizedActivation:
    """A Hopper input as the reference has it."""
    assert isinstance(x, HopperActivation) and x.scales is not None and x.lowrank is not None
    codes = layout.unpack_codes(x.codes, x.rows, x.channels)
    lowrank = torch.zeros(x.rows, 0, device=codes.device)
    if x.rank:
        lowrank = layout.unpack_lowrank(x.lowrank, x.rows, x.rank_start + x.rank)[:, x.rank_start :].float()
    return QuantizedActivation(codes, x.scales[:, None], lowrank * x.scales[:, None], x.dtype)


def check_quantized(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    found = plain(found)
    assert expected.scales is not None and expected.lowrank is not None and found.lowrank is not None
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
    alike = (found.codes.view(torch.uint8) == expected.codes.view(torch.uint8)).float().mean()
    assert alike > 0.999
    assert relative_error(found.codes.float(), expected.codes.float()) < 4e-3
    if expected.lowrank.numel():
        assert relative_error(found.lowrank, expected.lowrank) < 4e-3


def check_norms(x: QuantizedActivation, loosest: float | None = None) -> None:
    """At least the codes' own norm, and no looser than that."""
    assert isinstance(x, HopperActivation) and x.norms is not None
    parts = plain(x)
    assert parts.scales is not None
    exact = (parts.codes.double() * parts.scales.double()).norm(dim=1)
    assert (x.norms >= exact).all() and x.norms.isfinite().all()
    if loosest is not None:
        assert (x.norms <= loosest * exact).all()


def test_layouts_are_permutations() -> None:
    assert sorted(layout.channel_of_byte().tolist()) == list(range(128))
    codes = FP8.quantize(torch.randn(13, 192))[0]
    stored = layout.pack_codes(codes)
    assert stored.shape == (2, 16, 128)
    assert torch.equal(layout.unpack_codes(stored, 13, 192).view(torch.uint8), codes.view(torch.uint8))
    up = torch.arange(128 * 32).view(128, 32).to(torch.float64)
    fragments = layout.pack_up(up).view(1, 2, 2, 4, 32, 4, 2)
    # PTX ISA, fragment A of m64k16: register 0 holds row lane / 4, columns 2 (lane % 4) and the next
    assert fragments[0, 1, 1, 2, 13, 0].tolist() == [up[64 + 32 + 3, 16 + 2].item(), up[64 + 32 + 3, 16 + 3].item()]
    assert fragments[0, 0, 0, 0, 6, 3].tolist() == [up[8 + 1, 8 + 4].item(), up[8 + 1, 8 + 5].item()]


@pytest.mark.parametrize("tokens", tiles.TOKENS)
@pytest.mark.parametrize("down_rank", [None, 0, 64])
def test_tiles_fit_shared_memory(tokens: int, down_rank: int | None) -> None:
    if down_rank is not None and tokens > 192:
        return  # not with so few finishers
    assert 3 <= tiles.stages(tokens, down_rank) <= 8
    assert tiles.shared_bytes(tokens, down_rank) <= 232_448


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(4608, 12288), (512, 12288), (18432, 12288), (1, 256), (40000, 256)])
def test_runs_cover_the_channels_and_fill_the_gpu(rows: int, columns: int, cluster: int) -> None:
    tokens, run = tiles.choose_run(rows, columns, 3072, 132, 32, cluster)
    m_tiles, n_tiles = -(-rows // tokens), -(-columns // 128)
    assert tiles.cluster(columns, 132, run) >= cluster
    units = m_tiles * -(-n_tiles // run)
    waves = -(-units // 132)
    assert 1 <= run <= n_tiles and tokens % 64 == 0
    assert waves * run * tokens * 132 <= 1.35 * max(rows * n_tiles, 132 * 192)


@pytest.mark.parametrize(
    ("columns", "multiprocessors", "run", "expected"),
    [(9216, 132, 1, 2), (192, 132, 1, 2), (128, 132, 1, 1), (384, 132, 1, 1), (9216, 131, 1, 1), (12288, 132, 9, 1)],
)
def test_clusters_where_tiles_go_in_pairs(columns: int, multiprocessors: int, run: int, expected: int) -> None:
    assert tiles.cluster(columns, multiprocessors, run) == expected


@pytest.fixture(params=[1, 2])
def _clusters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CLUSTER", request.param)


def with_norms(x: QuantizedActivation) -> HopperActivation:
    """Bounds of the rows' norms, should the quantizer not have written them."""
    assert isinstance(x, HopperActivation)
    q = plain(x)
    assert q.scales is not None
    norms = (q.codes.float() * q.scales).norm(dim=1) * 1.01
    return replace(x, norms=torch.nn.functional.pad(norms, (0, x.codes.shape[1] - x.rows)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(9216, 3072), (64, 64), (192, 1088)])
def test_expand(n: int, k: int, dtype: torch.dtype) -> None:
    w = make(n, k, 16, dtype)
    packed = pack_product(w)
    out = torch.full(wide_shape(n, k), 0x7F, dtype=torch.uint8, device="cuda")
    expand(packed.qweight, packed.wscales, packed.inverse_scales, out)
    ratios = (w.wscales.T.float() * packed.inverse_scales[:n, None]).half().unsqueeze(2)
    values = INT4.unpack(w.qweight).unflatten(1, (-1, 64)).half() * ratios
    expected = values.flatten(1).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    found = layout.unpack_codes(out, n, k)
    assert torch.equal(found.float(), expected.float())


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "hidden"), [(4608, 3072), (4096, 3072), (512, 3072), (1, 256), (300, 256), (4685, 512)])
def test_clusters_give_the_same(m: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, one after another and overlapping: no stage is read too early, none is loaded too early."""
    ours, three, four = kernels(), make(3 * hidden, hidden, 32), make(4 * hidden, hidden, 32)
    one, back = make(hidden, hidden, 16, seed=4), make(hidden, 4 * hidden, 32, seed=5)
    x, wide = rows(m, hidden), rows(m, 4 * hidden)
    residual, gate = (
        torch.randn(1, m, hidden, device="cuda").bfloat16(),
        torch.randn(1, hidden, device="cuda").bfloat16(),
    )
    norms = [torch.rand(128, device="cuda").bfloat16() + 0.5 for _ in range(2)]
    angles = torch.rand(m, 64, device="cuda").repeat_interleave(2, 1) * 6
    rotary = (angles.cos(), angles.sin())
    packed = [ours.pack_product(w) for w in (three, four, one, back)]
    quantized = [ours.quantize(x, ours.pack_input(input_of(w))) for w in (three, four, one)]
    quantized.append(ours.quantize(wide, ours.pack_input(input_of(back))))
    known = with_norms(quantized[1])
    behind = [ours.pack_input(input_of(make(64, 4 * hidden, rank, seed=2))) for rank in (32, 80)]
    chosen = tiles.choose_run(m, 4 * hidden, hidden, 132, 32, 2)
    monkeypatch.setattr(tiles, "choose_run", lambda *_: chosen)  # sums of other runs are rounded otherwise

    def step() -> tuple[list[Tensor], list[QuantizedActivation]]:
        found = [ours.product(q, w) for q, w in zip(quantized, packed, strict=True)]
        found += ours.product_norm_rope(quantized[0], packed[0], *norms, rotary)
        found.append(ours.product_gate_residual(quantized[2], packed[2], residual, gate))
        found.append(ours.product_gate_residual(quantized[3], packed[3], residual, gate))
        return found, [ours.product_gelu_quantize(known, packed[1], following) for following in behind]

    def check(found: tuple[list[Tensor], list[QuantizedActivation]]) -> None:
        for part, expected in zip(found[0], alone[0], strict=True):
            assert torch.equal(part, expected)
        for activation, expected in zip(found[1], alone[1], strict=True):
            mine, theirs = plain(activation), plain(expected)
            assert torch.equal(mine.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
            assert mine.scales is not None and theirs.scales is not None and torch.equal(mine.scales, theirs.scales)
            assert mine.lowrank is not None and theirs.lowrank is not None and torch.equal(mine.lowrank, theirs.lowrank)

    monkeypatch.setattr(tiles, "CLUSTER", 1)
    alone = step()
    monkeypatch.setattr(tiles, "CLUSTER", 2)
    for _ in range(5):
        check(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(5):
        graph.replay()
        check(captured)


@pytest.mark.gpu
def test_weights_that_stay_expanded_give_the_same() -> None:
    w, x = make(9216, 3072, 32), rows(512, 3072)
    ours = kernels()
    quantized = ours.quantize(x, ours.pack_input(input_of(w)))
    assert ours.pack_product_expanded is not None
    found = ours.product(quantized, ours.pack_product_expanded(w))
    assert torch.equal(found, ours.product(quantized, ours.pack_product(w)))


@pytest.mark.parametrize(("rows", "channels", "expected"), [(4608, 3072, 35), (4096, 3072, 32), (512, 3072, 4)])
def test_rows_of_a_block(rows: int, channels: int, expected: int) -> None:
    assert quantize.rows_of_block(rows, channels, 132) == expected
    assert quantize.rows_of_block(3 * rows, channels, 132) <= 40
    assert quantize.rows_of_block(1, channels, 132) == 1


def test_fragments_of_down() -> None:
    down = torch.arange(32 * 192).view(32, 192).to(torch.float64)
    fragments = layout.pack_fragments(down)
    assert fragments.shape == (2, 2, 8, 32, 8)
    # PTX ISA, fragment A of m16n8k16: registers hold row lane / 4, row + 8, then both again for the upper 8 of k
    lane, ranks, channels = 13, (16 + 3, 16 + 3 + 8), 32 + 8 * 1 + 4
    found = fragments[0, 1, 2 * 1 + 1, lane].view(2, 2, 2)
    for high in (0, 1):
        for half in (0, 1):
            assert found[high, half].tolist() == [down[ranks[half], channels + 2 * high + i].item() for i in (0, 1)]
    assert not fragments[1, :, 4:].any() and torch.equal(fragments.sum(), down.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "rank"),
    [
        (1, 64, 16),
        (77, 192, 0),
        (300, 3072, 32),
        (4608, 3072, 64),
        (4096, 3072, 32),
        (512, 3072, 32),
        (7, 3072, 256),
        (9300, 1024, 48),
        (40, 8192, 96),
        (50, 12288, 32),
    ],
)
def test_quantize(m: int, k: int, rank: int, dtype: torch.dtype) -> None:
    w, x = make(64, k, rank, dtype), rows(m, k, dtype)
    x[m // 2 + 1 :] = 0
    weights = input_of(w)
    ours, theirs = kernels(), kernels("reference")
    found = ours.quantize(x, ours.pack_input(weights))
    check_quantized(found, theirs.quantize(x, weights))
    again = ours.quantize(x, ours.pack_input(weights))
    assert torch.equal(plain(found).codes.view(torch.uint8), plain(again).codes.view(torch.uint8))
    if k <= 8192:
        check_norms(found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "k", "rank"),
    [
        (1, 4608, 3072, 64),
        (1, 4096, 3072, 32),
        (1, 512, 3072, 32),
        (2, 2304, 3072, 32),
        (1, 7, 3072, 32),
        (1, 1, 3072, 128),
        (3, 37, 256, 32),
        (2, 5, 192, 16),
        (64, 1, 64, 16),
        (1, 9, 8192, 16),
        (1, 9, 12288, 16),
    ],
)
def test_norm_modulate_quantize(batch: int, length: int, k: int, rank: int, dtype: torch.dtype) -> None:
    weights = input_of(make(64, k, rank, dtype))
    x = rows(batch * length, k, dtype).view(batch, length, k)
    x[:, length // 2 + 1 :] = 0
    modulation = torch.randn(batch, 3 * k, device="cuda").to(dtype)
    shift, scale, _ = modulation.chunk(3, dim=1)
    ours, theirs = kernels(), kernels("reference")
    found = ours.norm_modulate_quantize(x, scale, shift, ours.pack_input(weights))
    expected = theirs.norm_modulate_quantize(x, scale, shift, weights)
    check_quantized(found, expected)
    strided = torch.cat([x, x], dim=1)[:, :length]
    check_quantized(ours.norm_modulate_quantize(strided, scale, shift, ours.pack_input(weights)), expected)
    if k <= 8192:
        check_norms(found)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_norms_are_tight(norm: bool) -> None:
    weights, x = input_of(make(64, 3072, 32)), torch.randn(1, 600, 3072, device="cuda").bfloat16()
    ours = kernels()
    one, nothing = torch.ones(1, 3072, device="cuda").bfloat16(), torch.zeros(1, 3072, device="cuda").bfloat16()
    packed = ours.pack_input(weights)
    found = ours.norm_modulate_quantize(x, one, nothing, packed) if norm else ours.quantize(x, packed)
    check_norms(found, 1.10)
    for part in found.split((16, 16)):
        assert isinstance(part, HopperActivation) and isinstance(found, HopperActivation) and part.norms is found.norms


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_sizes(size: float) -> None:
    weights = input_of(make(64, 3072, 32))
    x = (rows(40, 3072).float() * size).bfloat16()
    x[3, 1:] = 0  # one value alone
    ours = kernels()
    found = ours.quantize(x, ours.pack_input(weights))
    check_quantized(found, kernels("reference").quantize(x, weights))
    check_norms(found)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others() -> None:
    weights, x = input_of(make(64, 3072, 32)), rows(700, 3072).view(1, 700, 3072)
    scale, shift = torch.randn(2, 1, 3072, device="cuda").bfloat16()
    ours = kernels()
    packed = ours.pack_input(weights)
    whole = plain(ours.norm_modulate_quantize(x, scale, shift, packed))
    for start, stop in ((0, 1), (3, 10), (100, 700)):
        part = plain(ours.norm_modulate_quantize(x[:, start:stop], scale, shift, packed))
        assert torch.equal(part.codes.view(torch.uint8), whole.codes[start:stop].view(torch.uint8))
        assert part.lowrank is not None and whole.lowrank is not None
        assert torch.equal(part.lowrank, whole.lowrank[start:stop])


@pytest.mark.gpu
@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize(("m", "n", "k", "rank"), FLUX + ODD)
def test_product(m: int, n: int, k: int, rank: int) -> None:
    w, x = make(n, k, rank), rows(m, k)
    ours, theirs = kernels(), kernels("reference")
    quantized = ours.quantize(x, ours.pack_input(input_of(w)))
    packed = ours.pack_product(w)
    found = ours.product(quantized, packed)
    assert found.shape == (m, n) and found.isfinite().all()
    assert relative_error(found, theirs.product(plain(quantized), theirs.pack_product(w))) < 1e-2
    assert torch.equal(found, ours.product(quantized, packed))


@pytest.mark.gpu
@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "heads", "k"), [(1, 4608, 24, 3072), (2, 35, 2, 256)])
def test_product_norm_rope(batch: int, length: int, heads: int, k: int, dtype: torch.dtype) -> None:
    w, x = make(3 * heads * 128, k, 32, dtype), rows(batch * length, k, dtype)
    ours, theirs = kernels(), kernels("reference")
    quantized = ours.quantize(x, ours.pack_input(input_of(w)))
    norm_q, norm_k = (torch.rand(128, device="cuda").to(dtype) + 0.5 for _ in range(2))
    angles = torch.rand(length, 64, device="cuda").repeat_interleave(2, 1) * 6
    rotary = (angles.cos(), angles.sin())
    found = ours.product_norm_rope(quantized, ours.pack_product(w), norm_q, norm_k, rotary)
    expected = theirs.product_norm_rope(plain(quantized), theirs.pack_product(w), norm_q, norm_k, rotary)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 1e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "lengths", "heads", "k"),
    [(1, (512, 4096), 24, 3072), (1, (4608,), 24, 3072), (2, (7, 35), 2, 256), (3, (77,), 2, 192)],
)
def test_product_norm_rope_fp8(batch: int, lengths: tuple[int, ...], heads: int, k: int, dtype: torch.dtype) -> None:
    ours, theirs = kernels(), kernels("reference")
    assert ours.product_norm_rope_fp8 is not None
    projections, expected = [], []
    for i, length in enumerate(lengths):
        w, x = make(3 * heads * 128, k, 32, dtype, seed=i), rows(batch * length, k, dtype, seed=i)
        quantized, packed = with_norms(ours.quantize(x, ours.pack_input(input_of(w)))), ours.pack_product(w)
        norm_q, norm_k = (torch.rand(128, device="cuda").to(dtype) + 0.5 for _ in range(2))
        angles = torch.rand(length, 64, device="cuda").repeat_interleave(2, 1) * 6
        rotary = (angles.cos(), angles.sin())
        projections.append(fused.Projection(quantized, packed, norm_q, norm_k, rotary))
        expected.append(theirs.product_norm_rope(plain(quantized), theirs.pack_product(w), norm_q, norm_k, rotary))
    found = ours.product_norm_rope_fp8(projections)
    assert found is not None
    q, k_, v = (torch.cat(parts, 2) for parts in zip(*expected, strict=True))
    norms = [p.norm_q for p in projections], [p.norm_k for p in projections]
    bounds = [attention_fp8.norm_bound(norms[0]), attention_fp8.norm_bound(norms[1]), found.descale[0] * 448]
    scales = attention_fp8.Exponents(*map(attention_fp8.largest_exponents, bounds))
    assert v.abs().amax() <= bounds[2] <= 2000 * v.abs().amax()
    mean, deviation = attention_fp8.center(v).float(), v.float().std()
    assert (found.center.float() - mean).abs().amax() < 2 * deviation and found.center.dtype == dtype
    shift = torch.nn.functional.pad(found.center.float(), (2 * heads * 128, 0))
    plain_heads = [
        ours.product_norm_rope(p.x, replace(p.w, bias=p.w.bias - shift), p.norm_q, p.norm_k, p.rotary)
        for p in projections
    ]
    again = [torch.cat(parts, 2) for parts in zip(*plain_heads, strict=True)]
    specified = attention_fp8.round_heads(*again, torch.zeros_like(found.center), scales)
    assert torch.equal(found.scalars[:, 0], specified.scalars[:, 0]) and torch.equal(found.descale, specified.descale)
    rest = attention_fp8.centered(v, found.center)
    for codes, exact, exponent in ((found.q, q, scales.q), (found.k, k_, scales.k), (found.v, rest, scales.v)):
        assert codes.transpose(1, 2).is_contiguous()
        assert relative_error(torch.ldexp(codes.float(), -exponent), exact) < 4e-2
    for codes, wanted in ((found.q, specified.q), (found.k, specified.k)):  # wanted were rounded to 16 bits before
        assert (codes.view(torch.uint8) == wanted.view(torch.uint8)).float().mean() > 0.95
    assert torch.equal(found.v.float(), specified.v.float())
    unknown = [replace(p, x=replace(p.x, norms=None)) for p in projections]
    assert ours.product_norm_rope_fp8(unknown) is None


@pytest.mark.parametrize(("heads", "batch"), [(1, 1), (2, 2)])
def test_heads_that_do_not_go_together(heads: int, batch: int) -> None:
    def projection(heads: int, batch: int, length: int) -> fused.Projection:
        w = random_weights(3 * heads * 128, 64, 16, generator=torch.Generator().manual_seed(0))
        x = empty_activation(batch * length, 64, 16, torch.bfloat16, torch.device("cpu"), torch.ones(batch * length))
        table, norm = torch.ones(length, 128), torch.ones(128)
        return fused.Projection(x, pack_product(w), norm, norm, (table, table))

    with pytest.raises(FormatError, match="expected 2 images of 1 heads each, got"):
        product_norm_rope_fp8([projection(1, 2, 7), projection(heads, batch, 5)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "k", "rank"), [(1, 4608, 3072, 32), (2, 35, 256, 16), (1, 9, 12288, 32)])
def test_quantize_fp8(batch: int, length: int, k: int, rank: int, dtype: torch.dtype) -> None:
    w = make(64, k, rank, dtype)
    w = replace(w, smooth_factor=w.smooth_factor * torch.linspace(1, 1.01, k, device="cuda").to(dtype))
    codes = (rows(batch * (length + 5), k, torch.float32) * 20).clamp(-448, 448).view(batch, length + 5, k)
    center = torch.linspace(-50, 40, k, device="cuda").to(dtype)
    x = ScaledFP8(codes.to(torch.float8_e4m3fn), torch.tensor([0.125], device="cuda"), center, dtype)[:, 5:]
    ours, theirs = kernels(), kernels("reference")
    found, expected = ours.quantize_fp8(x, ours.pack_input(input_of(w))), theirs.quantize_fp8(x, input_of(w))
    found, exact = plain(found), x.dequantize().float().flatten(0, 1) / w.smooth_factor.float()
    assert found.scales is not None and expected.scales is not None and found.lowrank is not None
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
    errors = [relative_error(y.codes.float() * y.scales, exact) for y in (found, expected) if y.scales is not None]
    assert errors[0] < 1.01 * errors[1] and relative_error(found.lowrank, expected.lowrank) < 4e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 16, 32, 64, 80])
@pytest.mark.parametrize(("m", "hidden", "inner"), [(4608, 3072, 12288), (77, 256, 1024), (300, 192, 1152)])
def test_product_gelu_quantize(m: int, hidden: int, inner: int, rank: int, dtype: torch.dtype) -> None:
    """A scale from a bound costs no precision: codes are as near to the exact input as the reference's."""
    up, down = make(inner, hidden, 32, dtype), make(64, inner, rank, dtype, seed=2)
    x = rows(m, hidden, dtype)
    x[m // 2] = 0
    ours, theirs = kernels(), kernels("reference")
    quantized = with_norms(ours.quantize(x, ours.pack_input(input_of(up))))
    following, next_input = input_of(down), ours.pack_input(input_of(down))
    packed = ours.pack_product(up)
    found = plain(ours.product_gelu_quantize(quantized, packed, next_input))
    reference = theirs.product_gelu_quantize(plain(quantized), theirs.pack_product(up), following)
    exact = torch.nn.functional.gelu(
        theirs.product(plain(quantized), theirs.pack_product(up)).float(), approximate="tanh"
    )
    exact = exact / down.smooth_factor.float()
    errors = [relative_error(q.codes.float() * q.scales, exact) for q in (found, reference) if q.scales is not None]
    assert errors[0] < 1.05 * errors[1] + 1e-3
    assert found.lowrank is not None and reference.lowrank is not None
    if rank:
        assert relative_error(found.lowrank, reference.lowrank) < 1e-2
    again = plain(ours.product_gelu_quantize(quantized, packed, next_input))
    assert torch.equal(found.codes.view(torch.uint8), again.codes.view(torch.uint8))
    assert again.lowrank is not None and torch.equal(found.lowrank, again.lowrank)


@pytest.mark.gpu
@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize(
    ("batch", "length", "n", "k"), [(1, 4608, 3072, 3072), (1, 4608, 3072, 12288), (3, 29, 256, 1024), (2, 7, 72, 64)]
)
def test_product_gate_residual(batch: int, length: int, n: int, k: int) -> None:
    w, x = make(n, k, 32), rows(batch * length, k)
    ours, theirs = kernels(), kernels("reference")
    quantized = ours.quantize(x, ours.pack_input(input_of(w)))
    residual = torch.randn(batch, length, n, device="cuda").bfloat16()
    gate = torch.randn(batch, 3 * n, device="cuda").bfloat16()[:, n : 2 * n]
    found = ours.product_gate_residual(quantized, ours.pack_product(w), residual, gate)
    expected = theirs.product_gate_residual(plain(quantized), theirs.pack_product(w), residual, gate)
    assert found.isfinite().all() and relative_error(found, expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("_clusters")
def test_shared_input_takes_its_own_columns() -> None:
    first, second = make(128, 256, 32), make(192, 256, 48, seed=3)
    ours, theirs = kernels(), kernels("reference")
    joint = InputWeights(first.smooth_factor, torch.cat([first.proj_down, second.proj_down], 1), False, "fp8")
    second = SVDQWeights(**{**second.tensors(), "smooth_factor": first.smooth_factor})
    parts = ours.quantize(rows(40, 256), ours.pack_input(joint)).split((32, 48))
    for part, w in zip(parts, (first, second), strict=True):
        expected = theirs.product(plain(part), theirs.pack_product(w))
        assert relative_error(ours.product(part, ours.pack_product(w)), expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.bfloat16), (32, torch.float32)])
def test_other_layers_go_through_triton(rank: int, dtype: torch.dtype) -> None:
    w, x = make(128, 256, rank, dtype), rows(33, 256, dtype)
    ours, theirs = kernels(), kernels("reference")
    found = ours.product(ours.quantize(x, ours.pack_input(input_of(w))), ours.pack_product(w))
    expected = theirs.product(theirs.quantize(x, input_of(w)), theirs.pack_product(w))
    assert relative_error(found, expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_modulations(batch: int, dtype: torch.dtype) -> None:
    """The CUDA backend's kernel, Triton's for float32."""
    generator = torch.Generator().manual_seed(0)
    made = [random_modulation(n, 3072, generator=generator, dtype=dtype) for n in (18432, 9216, 384)]
    weights = [W4A16Weights(**{name: t.cuda() for name, t in w.tensors().items()}) for w in made]
    x = rows(batch, 3072, dtype)
    ours = kernels()
    packed = [ours.pack_w4a16(w) for w in weights]
    found = ours.w4a16_group(x, ours.pack_w4a16_group(packed))
    for y, p, w in zip(found, packed, weights, strict=True):
        assert torch.equal(y, ours.w4a16(x, p))
        weight, bias = w.dense(torch.float64)
        exact = x.double() @ weight.T + bias
        rounded = exact.to(dtype) if dtype != torch.float32 else kernels("reference").w4a16(x, w)
        assert relative_error(y, exact) <= 2 * relative_error(rounded, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "graph"])
def test_weights_expanded_beside_the_kernel_in_front(recorded: bool) -> None:
    """Many layers one behind another through one buffer: each product has its own weights, and all of its input."""
    ours, dtype = kernels(), torch.bfloat16
    x = rows(4608, 3072, dtype)
    layers = [make(3072, 3072, 32, dtype, seed=seed) for seed in range(4)]
    packed = [(ours.pack_input(input_of(w)), ours.pack_product(w)) for w in layers]

    def outputs(wait: bool) -> list[Tensor]:
        found = []
        for given, weights in packed * 4:
            quantized = ours.quantize(x, given)
            if wait:
                torch.cuda.synchronize()
            found.append(ours.product(quantized, weights))
        return found

    expected = outputs(wait=True)
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = outputs(wait=False)
        graph.replay()
    else:
        found = outputs(wait=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize(
    ("in_front", "where", "beside"),
    [("quantize", 0, True), ("add_lowrank", 0, True), ("product", 0, False), (None, 0, False), ("quantize", 1, False)],
)
def test_which_kernels_weights_are_expanded_beside(
    in_front: str | None, where: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that read them, nor where the buffer is memory that was something else before."""
    w = pack_product(random_weights(64, 64, 16, generator=torch.Generator().manual_seed(0)))
    buffers, flags = torch.empty(2, 128 * 64, dtype=torch.uint8), []
    monkeypatch.setattr(expanded, "latest", lambda device: (7, in_front))
    monkeypatch.setattr(expanded, "_buffer", lambda device, nbytes: buffers[where])
    monkeypatch.setattr(expanded, "_written", {(torch.device("cpu"), 7): buffers[0].data_ptr()})
    monkeypatch.setattr(expanded, "expand", lambda *arguments: flags.append(arguments[-1]))
    expanded.expanded(w, torch.device("cpu"))
    assert flags == [beside] and expanded._written[torch.device("cpu"), 7] == buffers[where].data_ptr()

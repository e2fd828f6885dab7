"""PSNR, SSIM, LPIPS, estimates, edges and colors against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import save_random_lpips
from tonfa.errors import CheckpointError, FormatError
from tonfa.evaluate.adherence import ColorTable, edge_scores, image_edges, lab, object_colors
from tonfa.evaluate.lpips import MEAN, STD, Lpips
from tonfa.evaluate.similarity import C1, C2, psnr, ssim, to_unit
from tonfa.evaluate.statistics import estimate, geometric_mean, interval, ratio_interval


def test_psnr_of_known_errors() -> None:
    a = torch.zeros(3, 3, 12, 16)
    b = a.clone()
    b[1] += 0.1
    b[2, :, :6] += 1
    assert psnr(a, b).tolist() == pytest.approx([math.inf, 20, 10 * math.log10(2)], abs=1e-5)
    with pytest.raises(FormatError, match="one shape"):
        psnr(a, b[:1])


def test_ssim_of_constants_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 16, 20), 0.2), torch.full((1, 3, 16, 20), 0.7)
    expected = (2 * 0.2 * 0.7 + C1) / (0.2**2 + 0.7**2 + C1)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-12)


def test_ssim_of_one_window_is_the_formula() -> None:
    """A picture of 11 x 11 has one window: weighted moments, one value."""
    rng = np.random.default_rng(0)
    x, y = rng.random((11, 11)), rng.random((11, 11))
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + C1) * (2 * cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
    found = ssim(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None])
    assert found.item() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(FormatError, match="11 x 11"):
        ssim(torch.zeros(1, 1, 10, 30), torch.zeros(1, 1, 10, 30))


def test_to_unit() -> None:
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0, 0.2, 1]


def test_estimate_leaves_infinite_values_out_and_counts_them() -> None:
    found = estimate([1.0, 2.0, 3.0, math.inf])
    assert (found.mean, found.count, found.infinite) == (2.0, 3, 1)
    assert found.values == (1.0, 2.0, 3.0, None)
    assert (found.percentile_5, found.median) == (pytest.approx(1.1), 2)
    assert found.low is not None and found.high is not None and 1 <= found.low < 2 < found.high <= 3
    assert estimate([math.inf, math.inf]).mean is None and estimate([math.inf, math.inf]).infinite == 2
    one = estimate([5.0])
    assert (one.mean, one.low, one.high) == (5.0, None, None)
    with pytest.raises(FormatError, match="NaN"):
        estimate([1.0, math.nan])


def test_interval_repeats_covers_and_shrinks() -> None:
    def mean(rows: np.ndarray) -> float:
        return float(rows.mean())

    rng = np.random.default_rng(1)
    few, many = rng.normal(3, 1, (25, 1)), rng.normal(3, 1, (400, 1))
    low, high = interval(many, mean, seed=0) or (0, 0)
    assert (low, high) == interval(many, mean, seed=0) != interval(many, mean, seed=1)
    standard_error = many.std() / 20
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    wide = interval(few, mean, seed=0) or (0, 0)
    assert wide[1] - wide[0] > 2 * (high - low)
    assert interval(np.full((5, 2), 0.25), mean, seed=0) == (0.25, 0.25)
    assert interval(few[:1], mean, seed=0) is None
    covered = 0
    for _ in range(60):
        found = interval(rng.normal(0, 1, (60, 1)), mean, seed=0) or (0, 0)
        covered += found[0] <= 0 <= found[1]
    assert covered >= 50  # 57 expected


def test_ratios_of_the_same_samples_are_surer_than_of_others() -> None:
    rng = np.random.default_rng(0)
    baseline = np.exp(rng.normal(0, 1, 30))
    values = 0.7 * baseline * np.exp(rng.normal(0, 0.01, 30))
    low, high = ratio_interval(values, baseline, seed=0) or (0, 0)
    assert 0.69 < low < 0.7 < high < 0.71
    mixed = ratio_interval(values, baseline[::-1], seed=0) or (0, 0)
    assert mixed[1] - mixed[0] > 20 * (high - low)
    assert ratio_interval(values[:1], baseline[:1], seed=0) is None


def test_geometric_mean() -> None:
    assert geometric_mean([0.1, 0.4]) == pytest.approx(0.2)
    assert geometric_mean([0.1, 0.0]) == 0


def test_lab_of_known_colors() -> None:
    """White is (100, 0, 0), black 0; sRGB red has (53.24, 80.09, 67.20)."""
    rgb = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0]], dtype=torch.uint8)[:, :, None, None]
    expected = torch.tensor([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]])
    torch.testing.assert_close(lab(rgb)[:, :, 0, 0], expected, atol=0.1, rtol=0)


def test_image_edges_are_where_the_step_is() -> None:
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., 8:] = 255
    assert image_edges(image)[0].any(0).nonzero()[:, 0].tolist() in ([7, 8], [7], [8])


def test_edge_scores_of_a_square() -> None:
    mask = torch.zeros(2, 32, 32, dtype=torch.uint8)
    mask[:, 8:24, 8:24] = 1
    right = mask[:, None].expand(-1, 3, -1, -1) * 255
    pictures = right.clone()
    pictures[1] = 0  # nothing is drawn
    scores = edge_scores(pictures, mask)
    assert scores["recall"].tolist() == [1, 0] and scores["precision"].tolist() == [1, 0]
    assert scores["f1"].tolist() == pytest.approx([1, 0])


def test_colors_are_named_by_their_neighbors() -> None:
    table = ColorTable(
        ("dark", "light"), torch.tensor([[5.0, 0, 0]] * 3 + [[90.0, 0, 0]] * 3), torch.tensor([0] * 3 + [1] * 3)
    )
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, :30], mask[0, 40:44, :2] = 1, 2  # the second is too small to be scored
    pictures = torch.full((1, 3, 64, 64), 240, dtype=torch.uint8)
    (found,) = object_colors(pictures, mask, [2])
    assert (found.picture, found.index) == (0, 0)
    assert table.classify(found.feature[None]).tolist() == [1]
    with pytest.raises(ValueError, match="no index"):
        ColorTable(("dark",), torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="make a table"):
        ColorTable(("dark",), torch.zeros(2, 2), torch.tensor([0, 0]))


@pytest.fixture
def lpips_files(tmp_path: Path) -> tuple[Path, Path]:
    return save_random_lpips(tmp_path)


def test_lpips_is_its_formula(lpips_files: tuple[Path, Path]) -> None:
    """The network as torchvision writes it, layer by layer, in float64."""
    from safetensors.torch import load_file
    from torch import nn

    weights, heads = (load_file(path) for path in lpips_files)
    relu, pool = nn.ReLU(), nn.MaxPool2d(3, 2)
    network = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool,
        nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu,
        nn.Conv2d(256, 256, 3, padding=1), relu,
    )  # fmt: skip
    own = {n.removeprefix("features."): t for n, t in weights.items() if n.startswith("features.")}
    network.load_state_dict(own)
    network.double()
    a, b = torch.rand(2, 3, 64, 72, dtype=torch.float64), torch.rand(2, 3, 64, 72, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    x, y = (2 * a - 1 - mean) / std, (2 * b - 1 - mean) / std
    expected, relus = torch.zeros(2, dtype=torch.float64), 0
    with torch.no_grad():
        for layer in network:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                f, g = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
                expected += ((f - g) ** 2 * heads[f"lin{relus}.model.1.weight"].double()).sum(1).mean((1, 2))
                relus += 1
    lpips = Lpips.from_files(*lpips_files)
    torch.testing.assert_close(lpips.distance(a, b).double(), expected, rtol=1e-4, atol=0)
    assert lpips.distance(a, a).tolist() == [0, 0]
    assert lpips.distance(a[..., :31, :31], b[..., :31, :31]).min() > 0
    with pytest.raises(FormatError, match="31 x 31"):
        lpips.distance(a[..., :30], b[..., :30])


def test_lpips_refuses_other_files(lpips_files: tuple[Path, Path], tmp_path: Path) -> None:
    backbone, heads = lpips_files
    with pytest.raises(CheckpointError, match=r"missing: features\.0\.bias"):
        Lpips.from_files(heads, heads)
    (tmp_path / "pickle.pth").write_bytes(b"PK\x03\x04...")
    with pytest.raises(CheckpointError, match="pickled"):
        Lpips.from_files(tmp_path / "pickle.pth", heads)
    with pytest.raises(CheckpointError, match="no such file"):
        Lpips.from_files(backbone, tmp_path / "nowhere.safetensors")

"""Do pictures follow their depth map and their prompt? Edges against true outlines, colors against true names.

Both need scenes whose objects are known: a mask (H, W) uint8 that is 0 on the background and k + 1 where object k is
seen, and the name of each object's color. Nothing here was learned from other pictures than the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.errors import FormatError

MIN_PIXELS = 150
"""At 256 x 256; objects with fewer visible pixels are not scored."""
EDGE_CONTRAST = 12.0
"""Change of Lab over two pixels that counts as an edge in the picture."""
TOLERANCE = 2
"""Pixels that an edge may be off."""
NEAREST = 5
"""Samples of a color table that vote."""


def lab(
    rgb: Tensor,  # (B, 3, H, W) uint8 sRGB
) -> Tensor:  # (B, 3, H, W) float32
    """CIE Lab, D65."""
    x = rgb.float() / 255
    x = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("ij,bjhw->bihw", matrix, x) / torch.tensor([0.9505, 1.0, 1.089])[:, None, None]
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def silhouettes(mask: Tensor) -> Tensor:
    """(B, H, W) bool: pixels where an object borders something else."""
    edge = torch.zeros_like(mask, dtype=torch.bool)
    edge[:, :, 1:] |= mask[:, :, 1:] != mask[:, :, :-1]
    edge[:, 1:, :] |= mask[:, 1:, :] != mask[:, :-1, :]
    return edge


def image_edges(rgb: Tensor) -> Tensor:
    """(B, H, W) bool: local maxima of the Lab gradient, one or two pixels wide."""
    values = functional.pad(lab(rgb), (1, 1, 1, 1), mode="replicate")
    gx = (values[:, :, 1:-1, 2:] - values[:, :, 1:-1, :-2]).norm(dim=1)
    gy = (values[:, :, 2:, 1:-1] - values[:, :, :-2, 1:-1]).norm(dim=1)
    wide = functional.max_pool2d(gx[:, None], (1, 3), 1, (0, 1))[:, 0]
    tall = functional.max_pool2d(gy[:, None], (3, 1), 1, (1, 0))[:, 0]
    return ((gx >= wide) & (gx > EDGE_CONTRAST) & (gx >= gy)) | ((gy >= tall) & (gy > EDGE_CONTRAST) & (gy >= gx))


def edge_scores(
    rgb: Tensor,  # (B, 3, H, W) uint8
    mask: Tensor,  # (B, H, W) uint8
) -> dict[str, Tensor]:
    """Per picture (B,): share of true silhouette pixels with an edge nearby, the converse, and their F1.

    Floor patterns and shadows are edges without a silhouette, so even a perfect picture has a low precision.
    """

    def near(edges: Tensor) -> Tensor:
        return functional.max_pool2d(edges.float()[:, None], 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0] > 0

    true, found = silhouettes(mask), image_edges(rgb)
    recall = (true & near(found)).sum((1, 2)) / true.sum((1, 2)).clamp_min(1)
    precision = (found & near(true)).sum((1, 2)) / found.sum((1, 2)).clamp_min(1)
    f1 = 2 * recall * precision / (recall + precision).clamp_min(1e-6)
    return {"recall": recall, "precision": precision, "f1": f1}


@dataclass(frozen=True)
class ObjectColor:
    """One object that is large enough to score."""

    picture: int
    index: int
    """k of the mask's value k + 1."""
    feature: Tensor  # (3,) median Lab inside the true mask


def object_colors(
    rgb: Tensor,  # (B, 3, H, W) uint8
    mask: Tensor,  # (B, H, W) uint8
    counts: Iterable[int],
) -> list[ObjectColor]:
    """The median color inside each object's true mask, less a border of one pixel; `counts` are objects by picture."""
    values = lab(rgb)
    enough = MIN_PIXELS * (mask.shape[-1] / 256) ** 2
    found = []
    for b, count in enumerate(counts):
        for k in range(count):
            own = (mask[b] == k + 1).float()[None, None]
            inner = (functional.avg_pool2d(own, 3, 1, 1) > 0.99)[0, 0]
            if inner.sum() >= enough:
                found.append(ObjectColor(b, k, values[b][:, inner].median(1).values))
    return found


@dataclass(frozen=True)
class ColorTable:
    """Measured colors of objects whose names are known."""

    names: Sequence[str]
    features: Tensor  # (N, 3) Lab
    labels: Tensor  # (N,) index in names

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.shape != (len(self.labels), 3) or len(self.labels) == 0:
            raise FormatError(f"features (N, 3) with N labels make a table, got {tuple(self.features.shape)}")
        if self.labels.is_floating_point() or not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(
            self.names
        ):
            raise FormatError(f"a label is no index of one of {len(self.names)} names")

    def classify(
        self,
        features: Tensor,  # (M, 3)
    ) -> Tensor:  # (M,) int64
        """The name that most of the five nearest samples have, by its index."""
        nearest = torch.cdist(features, self.features).topk(min(NEAREST, len(self.labels)), largest=False).indices
        return functional.one_hot(self.labels[nearest], len(self.names)).sum(1).argmax(1)

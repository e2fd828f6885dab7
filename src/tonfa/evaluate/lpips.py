"""LPIPS with AlexNet, from weights that the user has: Zhang, Isola, Efros, Shechtman, Wang, CVPR 2018, section 3.

    d(a, b) = sum over layers of the mean over places of w . (f(a) - f(b))^2

f are a layer's features, divided by their norm at each place; w are the "lin" heads, one weight a channel. The network
is torchvision's `alexnet` up to its fifth ReLU, the heads are those of version 0.1 of the package `lpips`. Nothing is
downloaded, and files are safetensors. Written from the paper and the published tensor names; it was tested against the
formula with random weights, not against the package with the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.checkpoint.strict import Spec, check
from tonfa.checkpoint.tensors import TensorFiles
from tonfa.errors import FormatError

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the network's input, for pictures from -1 to 1."""
EPS = 1e-10
LAYERS = (
    (0, 64, 3, 11, 4, 2),
    (3, 192, 64, 5, 1, 2),
    (6, 384, 192, 3, 1, 1),
    (8, 256, 384, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
"""Index in torchvision's `features`, out channels, in channels, kernel, stride, padding."""
POOLED = (3, 6)
"""Convolutions after a maximum over 3 x 3 at a stride of 2."""

SMALLEST = 31
"""Pixels a side, below which the last layers have nothing to read."""


def _backbone_spec() -> Spec:
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for index, out, into, kernel, _, _ in LAYERS:
        spec[f"features.{index}.weight"] = ((out, into, kernel, kernel), torch.float32)
        spec[f"features.{index}.bias"] = ((out,), torch.float32)
    return spec


def _heads_spec() -> Spec:
    return {f"lin{i}.model.1.weight": ((1, layer[1], 1, 1), torch.float32) for i, layer in enumerate(LAYERS)}


class Lpips:
    """The distance, 0 for equal pictures; larger is less alike."""

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        self._convolutions = [(backbone[f"features.{n}.weight"], backbone[f"features.{n}.bias"]) for n, *_ in LAYERS]
        self._heads = [heads[f"lin{i}.model.1.weight"].flatten() for i in range(len(LAYERS))]

    @classmethod
    def from_files(cls, backbone: Path, heads: Path) -> Lpips:
        """Read both as safetensors in float32. Raises CheckpointError for missing or misshapen tensors.

        The backbone may hold torchvision's `classifier` too, which is not read.
        """
        read = []
        for path, spec in ((backbone, _backbone_spec()), (heads, _heads_spec())):
            source = TensorFiles([path])
            found = {name: entry for name, entry in source.spec().items() if not name.startswith("classifier.")}
            check(found, spec, str(path))
            read.append({name: source[name].float() for name in spec})
        return cls(*read)

    @torch.no_grad()
    def distance(
        self,
        a: Tensor,  # (B, 3, H, W) float from 0 to 1
        b: Tensor,  # (B, 3, H, W) float from 0 to 1
    ) -> Tensor:  # (B,) float32
        """One distance for each pair. Raises FormatError for pictures that are too small."""
        if min(a.shape[2:]) < SMALLEST:
            raise FormatError(f"LPIPS needs pictures of {SMALLEST} x {SMALLEST} pixels, got {tuple(a.shape[2:])}")
        total = torch.zeros(len(a))
        for f, g, w in zip(self._features(a), self._features(b), self._heads, strict=True):
            total += torch.einsum("bchw,c->bhw", (f - g).square(), w).mean(dim=(1, 2))
        return total

    def _features(self, pictures: Tensor) -> list[Tensor]:
        x = (2 * pictures.float() - 1 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        found = []
        for (weight, bias), (index, _, _, _, stride, padding) in zip(self._convolutions, LAYERS, strict=True):
            if index in POOLED:
                x = functional.max_pool2d(x, 3, 2)
            x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
            found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPS))
        return found

"""The weights of one quantized linear in the canonical layout: row-major, in logical order, nothing a kernel wants.

Checkpoints are read into this layout and written from it; kernels re-pack it once, when a layer is placed on a device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import GELU_SHIFT, GROUP_SIZE, INT4, UINT4

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise FormatError(f"{what}: expected {names} of shape {shape}, got {found} of shape {tuple(tensor.shape)}")


class PackedWeights:
    """What 4-bit weights of either kind have in common: `qweight` (N, K/2) and scales `wscales` (K/G, N)."""

    qweight: Tensor
    wscales: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[1] * 2

    def _check_packed(self, name: str) -> None:
        if self.qweight.ndim != 2 or self.in_features % GROUP_SIZE:
            shape = tuple(self.qweight.shape)
            raise FormatError(f"{name}.qweight: expected (N, K/2) with K a multiple of {GROUP_SIZE}, got shape {shape}")
        n, k = self.out_features, self.in_features
        _expect(f"{name}.qweight", self.qweight, (n, k // 2), (torch.uint8,))
        _expect(f"{name}.wscales", self.wscales, (k // GROUP_SIZE, n), FLOAT_DTYPES)


@dataclass(frozen=True)
class SVDQWeights(PackedWeights):
    """One SVDQuant linear, y = Q(x / smooth_factor) (codes * wscales)^T + (x proj_down) proj_up^T + bias.

    The activation is divided by `smooth_factor`; `proj_down` holds that division already and reads the raw x.
    `unsigned` marks a layer behind a GELU: its 4-bit activations are UINT4 of x + GELU_SHIFT, and `bias` holds the
    correction for that shift (SVDQuant, arXiv 2411.05007; Nunchaku's checkpoint format).
    """

    qweight: Tensor  # (N, K/2) uint8, two codes a byte as formats.INT4 packs them
    wscales: Tensor  # (K/G, N) 16-bit
    smooth_factor: Tensor  # (K,) 16-bit
    proj_down: Tensor  # (K, R) 16-bit
    proj_up: Tensor  # (N, R) 16-bit
    bias: Tensor  # (N,) 16-bit
    unsigned: bool = False

    @property
    def rank(self) -> int:
        """R, the width of the low-rank branch."""
        return self.proj_down.shape[1]

    def check(self, name: str = "SVDQWeights") -> None:
        """Raise FormatError, naming the tensor, unless all shapes and dtypes belong together."""
        self._check_packed(name)
        n, k, r = self.out_features, self.in_features, self.proj_down.shape[-1]
        dtypes = (self.wscales.dtype,)
        _expect(f"{name}.smooth_factor", self.smooth_factor, (k,), dtypes)
        _expect(f"{name}.proj_down", self.proj_down, (k, r), dtypes)
        _expect(f"{name}.proj_up", self.proj_up, (n, r), dtypes)
        _expect(f"{name}.bias", self.bias, (n,), dtypes)

    def codes(self) -> Tensor:
        """(N, K) int8 in [-8, 7]."""
        return INT4.unpack(self.qweight)

    def residual(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K): the 4-bit part, codes times scales, which multiplies the smoothed activation."""
        return INT4.dequantize(self.codes(), self.wscales.T, dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The linear that this approximates: weight (N, K) and bias (N,), acting on the raw, unshifted x."""
        quantized = self.residual(dtype) / self.smooth_factor.to(dtype)
        bias = self.bias.to(dtype)
        if self.unsigned:
            bias = bias + GELU_SHIFT * quantized.sum(dim=1)
        return quantized + self.proj_up.to(dtype) @ self.proj_down.to(dtype).T, bias

    def unshifted(self) -> SVDQWeights:
        """The same linear for formats with a sign: no GELU_SHIFT, its correction taken out of the bias (float32)."""
        if not self.unsigned:
            return self
        return replace(self, bias=self.bias.float() + self._shift_correction(), unsigned=False)

    def shifted(self) -> SVDQWeights:
        """The inverse of `unshifted`: the same linear behind a GELU with its input shifted (bias in float32)."""
        if self.unsigned:
            return self
        return replace(self, bias=self.bias.float() - self._shift_correction(), unsigned=True)

    def _shift_correction(self) -> Tensor:
        """(N,) float32: what GELU_SHIFT in every channel adds to the output."""
        return GELU_SHIFT * (self.residual() / self.smooth_factor.float()).sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, as a checkpoint holds them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unsigned"}


@dataclass(frozen=True)
class StackedWeights:
    """Linears that read one input and smooth it differently, so that each quantizes it; their outputs are joined."""

    parts: tuple[SVDQWeights, ...]

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The weight (N, K) and bias (N,) of all parts."""
        weights, biases = zip(*(part.dense(dtype) for part in self.parts), strict=True)
        return torch.cat(weights), torch.cat(biases)


@dataclass(frozen=True)
class W4A16Weights(PackedWeights):
    """A linear with asymmetric 4-bit weights and 16-bit activations: w = code * wscales + wzeros, codes 0..15.

    FLUX's modulations are stored so. Rows are in Diffusers' order.
    """

    qweight: Tensor  # (N, K/2) uint8, two codes a byte as formats.UINT4 packs them
    wscales: Tensor  # (K/G, N) 16-bit
    wzeros: Tensor  # (K/G, N) 16-bit
    bias: Tensor  # (N,) 16-bit

    def check(self, name: str = "W4A16Weights") -> None:
        """Raise FormatError, naming the tensor, unless all shapes and dtypes belong together."""
        self._check_packed(name)
        n, k = self.out_features, self.in_features
        _expect(f"{name}.wzeros", self.wzeros, (k // GROUP_SIZE, n), (self.wscales.dtype,))
        _expect(f"{name}.bias", self.bias, (n,), (self.wscales.dtype,))

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Weight (N, K) and bias (N,) of `dtype`."""
        codes = UINT4.unpack(self.qweight).to(dtype).unflatten(1, (-1, GROUP_SIZE))
        scales, zeros = self.wscales.T.to(dtype), self.wzeros.T.to(dtype)
        return (codes * scales.unsqueeze(2) + zeros.unsqueeze(2)).flatten(1), self.bias.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, as a checkpoint holds them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

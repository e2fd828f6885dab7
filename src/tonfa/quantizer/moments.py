"""What the solvers need to know of one linear's input, gathered from batches: second moments, extremes, some tokens.

Everything but the sample costs the same for any number of tokens, so 590 thousand of them, as SVDQuant calibrates with,
take K^2 floats: 38 MB for 3072 channels, 604 MB for 12288. Parts of the tokens may be gathered apart and merged.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from tonfa.checkpoint.shards import write_tensors
from tonfa.checkpoint.tensors import open_file
from tonfa.errors import CheckpointError, FormatError
from tonfa.weights import FLOAT_DTYPES

SAMPLE = 8192
"""Tokens that are kept."""
CHUNK = 4096
"""Tokens a float32 product: sums of products are added to the total in float32."""


@dataclass
class InputMoments:
    """Sums over the tokens of a linear's raw input, before smoothing and before the shift of an unsigned layer.

    `sample` are tokens drawn evenly from all that were added, with random `keys` that make merging even too: the
    tokens of largest key stay, in the order of their keys, so that its first tokens are a sample too. All tensors are
    on one device.
    """

    name: str
    tokens: int
    absmax: Tensor  # (K,) float32
    total: Tensor  # (K,) float64: sum of x
    second: Tensor  # (K, K) float32: sum of x x^T
    sample: Tensor  # (S, K) of the input's dtype, S <= `kept`
    keys: Tensor  # (S,) float64 in [0, 1)
    kept: int = SAMPLE
    seed: int = 0

    @classmethod
    def empty(
        cls,
        name: str,
        channels: int,
        *,
        kept: int = SAMPLE,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> InputMoments:
        """No tokens yet. Parts that will be merged need different seeds, or their samples are drawn alike."""
        zeros = torch.zeros(channels, device=device)
        second, sample = zeros.new_zeros(channels, channels), zeros.new_zeros(0, channels, dtype=dtype)
        return cls(name, 0, zeros, zeros.double(), second, sample, sample.new_zeros(0, dtype=torch.float64), kept, seed)

    @property
    def channels(self) -> int:
        """K."""
        return self.absmax.shape[0]

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs (..., K). What is not finite is found by `check`, without a wait for the GPU here."""
        if x.shape[-1:] != (self.channels,) or x.dtype not in FLOAT_DTYPES:
            found = f"{x.dtype} of shape {tuple(x.shape)}"
            raise FormatError(f"{self.name}: expected float inputs of {self.channels} channels, got {found}")
        rows = x.detach().reshape(-1, self.channels)
        if len(rows) == 0:
            return
        for chunk in rows.split(CHUNK):
            self.absmax = torch.maximum(self.absmax, chunk.abs().amax(dim=0).float())
            self.total += chunk.sum(dim=0, dtype=torch.float64)
            self._add_products(chunk)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name} {self.seed} {self.tokens}".encode()))
        keys = torch.rand(len(rows), dtype=torch.float64, generator=generator).to(rows.device)
        self.tokens += len(rows)
        self._keep(rows, keys)

    def _add_products(self, chunk: Tensor) -> None:
        """Tensor cores multiply 16-bit numbers exactly and add in float32, ten times as fast as float32 products."""
        if chunk.is_cuda and chunk.dtype in (torch.bfloat16, torch.float16):
            self.second += torch.mm(chunk.T, chunk, out_dtype=torch.float32)
        else:
            values = chunk.float()
            self.second.addmm_(values.T, values)

    def merge(self, other: InputMoments) -> None:
        """Add what another part of the tokens has gathered."""
        if (self.name, self.channels) != (other.name, other.channels):
            raise FormatError(
                f"{self.name} with {self.channels} channels cannot be merged with {other.name} with {other.channels}"
            )
        self.tokens += other.tokens
        self.absmax = torch.maximum(self.absmax, other.absmax.to(self.absmax.device))
        self.total += other.total.to(self.total.device)
        self.second += other.second.to(self.second.device)
        self._keep(other.sample.to(self.sample.device), other.keys.to(self.keys.device))

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        keys, chosen = keys.topk(min(self.kept, len(keys)))
        keys = torch.cat([self.keys, keys])
        rows = torch.cat([self.sample, rows[chosen].to(self.sample.dtype)])
        self.keys, chosen = keys.topk(min(self.kept, len(keys)))
        self.sample = rows[chosen]

    def check(self, channels: int | None = None) -> None:
        """Raise FormatError, naming the linear, without tokens, for NaN or Inf, or if K is not `channels`."""
        if channels is not None and channels != self.channels:
            raise FormatError(f"{self.name}: has {channels} input channels, its moments are of {self.channels}")
        if self.tokens == 0 or len(self.sample) == 0:
            raise FormatError(f"{self.name}: no calibration input has reached it; give prompts that use this layer")
        for what in (self.absmax, self.total, self.second.diagonal(), self.sample):
            bad = ~torch.isfinite(what).reshape(-1, self.channels).all(dim=0)
            if bad.any():
                raise FormatError(
                    f"{self.name}: {int(bad.sum())} channels of its calibration inputs hold NaN or Inf, "
                    f"the first is channel {int(bad.nonzero()[0])}; the model or its dtype overflows"
                )

    def rms(self) -> Tensor:
        """(K,) float32."""
        return (self.second.diagonal().double() / self.tokens).sqrt().float()

    def mean(self) -> Tensor:
        """(K,) float32."""
        return (self.total / self.tokens).float()

    def covariance(self, centered: bool = False, shrunk: bool = True) -> Tensor:
        """(K, K) float64: E[x x^T], or of x - E[x].

        Off the diagonal, K / (K + tokens) of it is taken away if `shrunk`: sampled products of channels that have
        nothing in common are not zero, and a solver would fit them. With 8 tokens a channel this lowers the held-out
        error of 4-bit weights by 2 to 4 %; with hundreds it does nothing.
        """
        second = self.second.double() / self.tokens
        if centered:
            mean = self.total / self.tokens
            second.addr_(mean, mean, alpha=-1)
        if shrunk:
            diagonal = second.diagonal().clone()
            second *= self.tokens / (self.channels + self.tokens)
            second.diagonal().copy_(diagonal)
        return second

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> InputMoments:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write a safetensors file, under another name first. Raises FormatError for moments that `check` refuses."""
        self.check()
        numbers = {"name": self.name, "tokens": str(self.tokens), "kept": str(self.kept), "seed": str(self.seed)}
        write_tensors(path, self._tensors(), metadata=numbers)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> InputMoments:
        """Read a file that `save` wrote. Raises CheckpointError for any other."""
        with open_file(path) as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            expected = {"absmax", "total", "second", "sample", "keys"}
            if names != expected or not {"name", "tokens", "kept", "seed"} <= set(metadata):
                raise CheckpointError(f"{path}: holds no moments of a calibration; collect them anew")
            tensors = {name: file.get_tensor(name).to(device) for name in expected}
        tokens, kept, seed = (int(metadata[name]) for name in ("tokens", "kept", "seed"))
        return cls(metadata["name"], tokens, **tensors, kept=kept, seed=seed)

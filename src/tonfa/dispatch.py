"""Choosing kernels: once for each layer when it is placed on a device, never in a call.

A backend is taken whole, because its kernels read the weights in its own layout; fused ops that it lacks are composed
of its `quantize` and `product`. `report` lists what can run on a device and why the rest cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tonfa.errors import UnsupportedError
from tonfa.kernels import dense, reference
from tonfa.kernels.attention.choices import CHOICES, automatic
from tonfa.kernels.cpu import backend as cpu
from tonfa.kernels.cuda import backend as cuda
from tonfa.kernels.gpu import reason_against_gpu
from tonfa.kernels.hopper import backend as hopper
from tonfa.kernels.triton import backend as triton
from tonfa.ops import fused, w4a16
from tonfa.ops.activation import Activations, QuantizedActivation, parse_activations
from tonfa.ops.attention_fp8 import QuantizedHeads
from tonfa.ops.choice import parse
from tonfa.ops.fused import Projection
from tonfa.ops.table import AUTO, OPS, AttentionKernels, Backend, parse_attention

BACKENDS: tuple[Backend, ...] = (cpu.BACKEND, cuda.BACKEND, hopper.BACKEND, triton.BACKEND, reference.BACKEND)
"""In order of preference."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The callables of one backend for one activation policy: an attribute for each op in `ops.table.OPS`."""

    backend: str
    activations: Activations
    pack_input: Callable[..., Any]
    pack_product: Callable[..., Any]
    pack_w4a16: Callable[..., Any]
    pack_w4a16_group: Callable[..., Any]
    quantize: Callable[..., QuantizedActivation]
    quantize_fp8: Callable[..., QuantizedActivation]
    product: Callable[..., Tensor]
    product_gelu_quantize: Callable[..., QuantizedActivation]
    product_norm_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    product_gate_residual: Callable[..., Tensor]
    norm_modulate_quantize: Callable[..., QuantizedActivation]
    w4a16: Callable[..., Tensor]
    w4a16_group: Callable[..., tuple[Tensor, ...]]
    attention: Callable[..., Tensor]
    product_norm_rope_into: Callable[..., None] | None = None
    """product_norm_rope that writes to a part of a larger (3, B, H, L, D); None if the backend has no such kernel."""
    product_norm_rope_fp8: Callable[[Sequence[Projection]], QuantizedHeads | None] | None = None
    """product_norm_rope of all tokens that attend to each other, rounded for FP8 attention; the result is None where
    the kernel does not take the inputs."""
    pack_product_expanded: Callable[..., Any] | None = None
    """pack_product that keeps the weights in 8 bits too; None if the backend multiplies 4-bit weights only."""


@dataclass(frozen=True)
class Availability:
    """One row of `report`: whether a backend runs an op on a device, and how or why not."""

    op: str
    backend: str
    runs: bool
    note: str


def usable_device(device: torch.device | str | int) -> torch.device:
    """The device of this name or number. Raises UnsupportedError where none holds weights and computes."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"device={device!r} is none that PyTorch has here; try 'cpu' or 'cuda': {error}"
        ) from error
    reason = reason_against_gpu(place) if place.type == "cuda" else None
    if place.type == "meta":
        reason = "it keeps no weights, so that nothing can be loaded to it"
    if reason is not None:
        raise UnsupportedError(f"device={device!r}: {reason}; 'cpu' runs everywhere")
    return place


def default_activations(device: torch.device) -> Activations:
    """The policy that is taken where the user names none: the fastest that can be computed natively here.

    Raises UnsupportedError for a GPU that is not there.
    """
    if device.type == "cuda":
        reason = reason_against_gpu(device)
        if reason is not None:
            raise UnsupportedError(f"nothing computes on {device}: {reason}")
        capability = torch.cuda.get_device_capability(device)
        if capability in cuda.NATIVE:
            lacking = cuda.BACKEND.missing()
            if lacking is None:
                return "int4"
            _warn_once(f"activations are quantized to int8 instead of int4 on {device}: {lacking}")
        return "fp8" if capability >= (9, 0) else "int8"
    return "int8"


def _reason_against(backend: Backend, device: torch.device, activations: Activations) -> str | None:
    if activations not in backend.activations:
        return f"activations={activations!r} is not among its {', '.join(backend.activations)}"
    return backend.reason_against(device, activations)


@lru_cache(maxsize=32)
def _warn_once(text: str) -> None:
    _logger.warning(text)


def _complete(name: str, activations: Activations, kernels: Mapping[str, Callable[..., Any]]) -> Kernels:
    alone: dict[str, Callable[..., Any]] = {
        "pack_w4a16_group": tuple,
        "w4a16_group": partial(w4a16.group, kernels["w4a16"]),
    }
    table = {**alone, **kernels}
    primitives = type("Primitives", (), {name: staticmethod(table[name]) for name in ("quantize", "product")})
    for op in OPS:
        if op not in table:
            table[op] = partial(getattr(fused, op), primitives)
    return Kernels(name, activations, **table)


@lru_cache(maxsize=64)
def _kernels(backend: Backend, activations: Activations) -> Kernels:
    return _complete(backend.name, activations, backend.table(activations))


@lru_cache(maxsize=1)
def bind_dense() -> Kernels:
    """The kernels of 16-bit weights, on any device."""
    return _complete("dense", "none", dense.TABLE)


def bind(device: torch.device, activations: str, backend: str | None = None) -> Kernels:
    """The kernels of the first backend that runs on `device` with this policy, or of the one that is named.

    Raises UnsupportedError with the reason of every backend that was tried.
    """
    policy = parse_activations(activations)
    if backend is not None:
        parse("backend", backend, (b.name for b in BACKENDS))
    reasons, lacking = [], []
    for candidate in BACKENDS:
        if backend is not None and candidate.name != backend:
            continue
        reason = _reason_against(candidate, device, policy)
        if reason is None and backend is None:
            reason = candidate.reason_to_wait(device)
        if reason is None:
            reason = candidate.missing()
            lacking += [reason] if reason else []
        if reason is None:
            if lacking:
                tried = "; ".join(lacking)
                _warn_once(f"activations={policy!r} on {device}: backend {candidate.name} computes, because {tried}")
            return _kernels(candidate, policy)
        reasons.append(f"{candidate.name}: {reason}")
    raise UnsupportedError(f"nothing computes activations={activations!r} on {device}: " + "; ".join(reasons))


_PACKING = ("pack_input", "pack_product", "pack_w4a16", "pack_product_expanded")
_ALONE = (*_PACKING, "quantize", "product", "w4a16", "attention")


@lru_cache(maxsize=8)
def composed(kernels: Kernels) -> Kernels:
    """The same kernels with nothing fused: every other op composed of these. For measuring what fusing gains."""
    return _complete(kernels.backend, kernels.activations, {name: getattr(kernels, name) for name in _ALONE})


def resolve_attention(device: torch.device, attention: str) -> str:
    """The name itself, or what "auto" stands for on this device. Raises UnsupportedError for an unknown one."""
    name = parse_attention(attention)
    return automatic(device) if name == AUTO else name


def bind_attention(device: torch.device, attention: str) -> AttentionKernels | None:
    """The kernels of this choice; None if they are those of the layers' backend.

    Raises UnsupportedError with the reason where it cannot run on `device`.
    """
    name = resolve_attention(device, attention)
    (choice,) = (c for c in CHOICES if c.name == name)
    reason = choice.reason_against(device)
    if reason is not None:
        raise UnsupportedError(f"attention={name!r} does not run on {device}: {reason}")
    return None if choice.load is None else choice.load()


def report(device: torch.device, activations: str) -> list[Availability]:
    """Every op and backend, and every choice of attention: whether it runs on `device` with this policy."""
    policy = parse_activations(activations)
    rows = []
    for backend in BACKENDS:
        reason = _reason_against(backend, device, policy) or backend.reason_to_wait(device) or backend.missing()
        present = set() if reason else set(backend.table(policy))
        for op in OPS:
            note = reason or ("kernel" if op in present else "composed of other ops")
            rows.append(Availability(op, backend.name, reason is None, note))
    for choice in CHOICES:
        if choice.load is not None:
            reason = choice.reason_against(device)
            rows.append(Availability("attention", choice.name, reason is None, reason or "kernel"))
    return rows

"""Calibration inputs: what reaches the linears of a model while samples run through it.

The model computes in full precision throughout, so that the order in which its linears are quantized does not matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.errors import FormatError
from tonfa.formats import GELU_SHIFT
from tonfa.quantizer.moments import InputMoments
from tonfa.weights import FLOAT_DTYPES

Sample = tuple[Sequence[Any], Mapping[str, Any]]
"""The arguments of one call of the model, by position and by name."""


def check_samples(inputs: Collection[Any]) -> list[Sample]:
    """Raise FormatError unless each item is (args, kwargs), and there is one."""
    samples = list(inputs)
    for i, item in enumerate(samples):
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        if not pair or not isinstance(item[0], (tuple, list)) or not isinstance(item[1], Mapping):
            raise FormatError(f"inputs: item {i} is {type(item).__name__}, expected a pair (args, kwargs)")
    if not samples:
        raise FormatError("inputs: there is none; give some, or None to quantize without calibration data")
    return samples


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run(
    model: nn.Module,
    samples: Sequence[Sample],
    linears: Mapping[str, nn.Linear],
    see: Callable[[str, Tensor], None],
) -> None:
    """Call the model with each sample and `see` with the name and input of each of the linears, as they are reached."""

    def hook(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else kwargs["input"])

        return seen

    with ExitStack() as stack:
        for name, linear in linears.items():
            handle = linear.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_evaluating(model))
        for args, kwargs in samples:
            model(*args, **kwargs)


class _Identities:
    """Numbers tensors so that the same numbers in the same memory, seen again unchanged, have the same number."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def number(self, x: Tensor) -> int:
        version = 0 if x.is_inference() else x._version
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version)
        # Memory of a tensor that is gone may have been given to another.
        known = self._seen.get(key)
        if known is not None and known[0]() is not None:
            return known[1]
        self._count += 1
        self._seen[key] = (weakref.ref(x), self._count)
        return self._count


def shared_inputs(model: nn.Module, linears: Mapping[str, nn.Linear], sample: Sample) -> dict[str, str]:
    """For each linear that is given the same tensors as one before it, in every call, the name of that one.

    Tensors are the same if they are the same memory, unchanged in between. A view made anew for each linear is
    recognized only while the first one lives; linears that are not recognized are smoothed apart, which costs nothing
    but time.
    """
    identities = _Identities()
    read: dict[str, list[int]] = {name: [] for name in linears}
    run(model, [sample], linears, lambda name, x: read[name].append(identities.number(x)))
    first: dict[tuple[int, ...], str] = {}
    followers = {}
    for name, numbers in read.items():
        leader = first.setdefault(tuple(numbers), name) if numbers else name
        if leader != name:
            followers[name] = leader
    return followers


def gather_moments(
    model: nn.Module, linears: Mapping[str, nn.Linear], samples: Sequence[Sample], unsigned: Collection[str] = ()
) -> dict[str, InputMoments]:
    """The moments of these linears' inputs, on the inputs' devices.

    Raises FormatError, naming the linear, if no input reaches it, if one holds NaN or Inf, and if one of `unsigned`
    is not what comes out of a GELU.
    """
    found: dict[str, InputMoments] = {}
    least: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in found:
            if x.dtype not in FLOAT_DTYPES:
                raise FormatError(f"{name}: its calibration input is {x.dtype}, expected bfloat16, float16 or float32")
            found[name] = InputMoments.empty(name, x.shape[-1], device=x.device, dtype=x.dtype)
        found[name].add(x)
        if name in unsigned and x.numel():
            low = x.detach().amin().float()
            least[name] = torch.minimum(least[name], low) if name in least else low

    run(model, samples, linears, see)
    for name in linears:
        if name not in found:
            raise FormatError(f"{name}: no calibration input has reached it; exclude it, or give inputs that use it")
        found[name].check(linears[name].in_features)
        if name in least and float(least[name]) < -GELU_SHIFT:
            raise FormatError(
                f"{name}: its inputs fall to {float(least[name]):.4g}, so they do not come from a GELU, which stays "
                f"above {-GELU_SHIFT}; its rule must not say unsigned"
            )
    return found

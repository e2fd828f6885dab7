"""Modules that run on kernels chosen once for the device that their parameters are on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tonfa.dispatch import Kernels


@dataclass(frozen=True, eq=False)
class Binding:
    """The kernels chosen for a layer, and its weights as they want them."""

    kernels: Kernels
    input_weights: Any
    product_weights: Any
    key: Tensor
    """The parameter that was packed: another one in its place (moved by an offloading hook) needs a new binding."""


def _unbind(module: nn.Module, _: Any) -> None:
    if isinstance(module, BoundModule):
        module.unbind()


class BoundModule(nn.Module):
    """Keeps a binding for as long as the parameters stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self._binding: Binding | None = None
        self.register_load_state_dict_post_hook(_unbind)

    @abstractmethod
    def _bind(self) -> Binding:
        """Kernels for the device that the parameters are on, weights packed for them."""

    @abstractmethod
    def _key(self) -> Tensor:
        """The largest parameter."""

    def binding(self) -> Binding:
        """The kernels and packed weights for the present device, chosen when first needed there."""
        if self._binding is None or self._binding.key is not self._key():
            self._binding = self._bind()
        return self._binding

    def change_kernels(self, change: Callable[[Kernels], Kernels]) -> None:
        """Compute by others, which read what is packed already, until the next binding."""
        bound = self.binding()
        self._binding = replace(bound, kernels=change(bound.kernels))

    def unbind(self) -> None:
        """Forget the kernels and what they packed; the next call chooses anew."""
        self._binding = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BoundModule:
        self.unbind()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_binding": None}

"""Whether a module's weights are still where they were: what a recorded graph depends on."""

from __future__ import annotations

from torch import Tensor, nn

from tonfa.layers.bound import BoundModule


class WeightsStamp:
    """The bindings of all bound layers and the addresses of every other parameter and buffer.

    Anything that moves or replaces weights (`.to()`, loading, offloading hooks, another activation policy) breaks it;
    writing other values into the same memory does not.
    """

    def __init__(self, module: nn.Module) -> None:
        self._bound = [(m, m.binding()) for m in module.modules() if isinstance(m, BoundModule)]
        self._tensors = [
            (tensors, name, tensor.data_ptr())
            for m in module.modules()
            if not isinstance(m, BoundModule)
            for tensors in (m._parameters, m._buffers)
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        ]

    def holds(self) -> bool:
        """Whether nothing was moved or replaced."""
        return all(m._binding is b and b.key is m._key() for m, b in self._bound) and all(
            (tensor := tensors.get(name)) is not None and tensor.data_ptr() == address
            for tensors, name, address in self._tensors
        )

"""Blocks under accelerate's offloading hooks, which bring a module's parameters when the module is called.

The fused blocks read parameters of linears and norms without calling these modules; this calls the hooks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from tonfa.layers.bound import BoundModule


def offloadable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a block's forward so that all its parameters are in place while it runs, and packed copies go afterwards."""

    @wraps(forward)
    def wrapper(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        readable = (module for module in block.modules() if isinstance(module, BoundModule | nn.RMSNorm))
        hooked: list[tuple[nn.Module, Any]] = [(m, m._hf_hook) for m in readable if hasattr(m, "_hf_hook")]
        for module, hook in hooked:
            hook.pre_forward(module)
        try:
            return forward(block, *args, **kwargs)
        finally:
            for module, hook in hooked:
                hook.post_forward(module, None)
            for module in block.modules() if hooked else ():
                if isinstance(module, BoundModule):
                    module.unbind()

    return wrapper

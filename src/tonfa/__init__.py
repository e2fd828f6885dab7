"""SVDQuant 4-bit FLUX transformers for Diffusers.

Public names are imported when they are first used: `import tonfa` loads neither PyTorch nor Diffusers and needs no GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tonfa.errors import CheckpointError, FormatError, TonfaError, UnsupportedError
from tonfa.version import __version__

if TYPE_CHECKING:
    from tonfa.layers.linear import SVDQLinear
    from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

__all__ = [
    "CheckpointError",
    "FormatError",
    "SVDQFluxTransformer2DModel",
    "SVDQLinear",
    "TonfaError",
    "UnsupportedError",
    "__version__",
]

_LAZY = {
    "SVDQFluxTransformer2DModel": "tonfa.models.flux.transformer",
    "SVDQLinear": "tonfa.layers.linear",
    # A saved pipeline names `tonfa` as the library of its transformer. When Diffusers loads the pipeline again it looks
    # for its own base classes as attributes of that library, to learn which methods save and load the component.
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""SVDQuant 4-bit weights for FLUX transformers in Diffusers, and for the linears of any other model.

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
    from tonfa.models.generic.checkpoint import load_model, save_model
    from tonfa.models.generic.plan import LinearRule, Plan
    from tonfa.models.generic.quantize import quantize, set_activations
    from tonfa.quantizer.recipe import Recipe

__all__ = [
    "CheckpointError",
    "FormatError",
    "LinearRule",
    "Plan",
    "Recipe",
    "SVDQFluxTransformer2DModel",
    "SVDQLinear",
    "TonfaError",
    "UnsupportedError",
    "__version__",
    "load_model",
    "quantize",
    "save_model",
    "set_activations",
]

_LAZY = {
    "LinearRule": "tonfa.models.generic.plan",
    "Plan": "tonfa.models.generic.plan",
    "Recipe": "tonfa.quantizer.recipe",
    "SVDQFluxTransformer2DModel": "tonfa.models.flux.transformer",
    "SVDQLinear": "tonfa.layers.linear",
    "load_model": "tonfa.models.generic.checkpoint",
    "quantize": "tonfa.models.generic.quantize",
    "save_model": "tonfa.models.generic.checkpoint",
    "set_activations": "tonfa.models.generic.quantize",
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

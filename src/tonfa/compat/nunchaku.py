"""Scripts written for Nunchaku: `tonfa.compat.nunchaku.install()` lets them import their names from here.

    import tonfa.compat.nunchaku
    tonfa.compat.nunchaku.install()

    from nunchaku import NunchakuFluxTransformer2dModel      # as before
    from nunchaku.utils import get_precision
    from image_gen_aux import DepthPreprocessor              # unless that package is there

Nothing is replaced: `install` refuses where the real package can be imported.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tonfa.errors import UnsupportedError
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.preprocess import DepthPreprocessor

_MARK = "__tonfa_stand_in__"
_ATTENTION = ("flashattn2", "nunchaku-fp16")
_PRECISIONS = ("auto", "int4")


class NunchakuFluxTransformer2dModel(SVDQFluxTransformer2DModel):
    """`SVDQFluxTransformer2DModel` with the options of Nunchaku's class."""

    __module__ = "tonfa"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str | int | None = None,
        torch_dtype: torch.dtype | str | None = torch.bfloat16,
        precision: str | None = None,
        offload: bool = False,
        return_metadata: bool = False,
        **options: Any,
    ) -> NunchakuFluxTransformer2dModel:
        """Load a checkpoint onto the GPU, or onto the CPU where there is none. `precision` can only be INT4."""
        if precision not in (None, *_PRECISIONS):
            raise UnsupportedError(f"precision={precision!r}: only INT4 checkpoints run here")
        if offload:
            raise UnsupportedError("offload=True: call enable_sequential_cpu_offload() on the pipeline instead")
        if return_metadata:
            raise UnsupportedError("return_metadata=True: read the metadata with safetensors.safe_open")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return super().from_pretrained(pretrained_model_name_or_path, device=device, torch_dtype=torch_dtype, **options)

    def set_attention_impl(self, impl: str) -> None:
        """Accepted for Nunchaku's own choices; the attention belongs to the kernels of the device here."""
        if impl not in _ATTENTION:
            raise UnsupportedError(f"attention {impl!r} is unknown; Nunchaku's are {', '.join(_ATTENTION)}")

    def update_lora_params(self, *_: Any) -> None:
        """Not offered yet."""
        self.load_lora_adapter()


def get_precision(precision: str = "auto", device: torch.device | str | int = "cuda") -> str:
    """The precision of the checkpoints that run here, "int4", on every device; for names such as `svdq-{precision}`."""
    if precision not in _PRECISIONS:
        raise UnsupportedError(f"precision={precision!r}: only INT4 checkpoints run here")
    return "int4"


def is_turing(device: torch.device | str | int = "cuda") -> bool:
    """Whether the GPU is of compute capability 7.5, which computes no bfloat16."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (7, 5)


_MODELS = {
    "NunchakuFluxTransformer2dModel": NunchakuFluxTransformer2dModel,
    "NunchakuFluxTransformer2DModelV2": NunchakuFluxTransformer2dModel,
}
_MODULES: dict[str, dict[str, Any]] = {
    "nunchaku": _MODELS,
    "nunchaku.models": _MODELS,
    "nunchaku.models.transformer_flux": _MODELS,
    "nunchaku.models.transformers": _MODELS,
    "nunchaku.models.transformers.transformer_flux": _MODELS,
    "nunchaku.models.transformers.transformer_flux_v2": _MODELS,
    "nunchaku.utils": {"get_precision": get_precision, "is_turing": is_turing},
    "image_gen_aux": {"DepthPreprocessor": DepthPreprocessor},
}


def _present(package: str) -> bool:
    """Whether the real package can be imported."""
    loaded = sys.modules.get(package)
    if loaded is not None:
        return not hasattr(loaded, _MARK)
    return find_spec(package) is not None


def install() -> None:
    """Make `import nunchaku` (and `image_gen_aux`, if absent) find the names of this module.

    Raises UnsupportedError if the real nunchaku is installed: scripts would not know which of the two they use.
    """
    if _present("nunchaku"):
        raise UnsupportedError("the package nunchaku is installed; uninstall it, or import tonfa's names directly")
    modules = {n: names for n, names in _MODULES.items() if n != "image_gen_aux" or not _present("image_gen_aux")}
    for name, names in modules.items():
        module = ModuleType(name, f"tonfa's stand-in for {name}")
        module.__dict__.update({**names, _MARK: True, "__path__": []})
        sys.modules[name] = module
    for name in modules:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def uninstall() -> None:
    """Take the stand-ins away again."""
    for name in _MODULES:
        if hasattr(sys.modules.get(name), _MARK):
            del sys.modules[name]

"""DepthPreprocessor: photographs to the depth maps that FLUX.1-Depth is controlled by.

The interface is that of image_gen_aux's class of this name. Images go through the model's own image processor, so that
the network sees the size and the normalization that it was trained with, whatever the size of the photograph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tonfa.checkpoint.reading import check_regular
from tonfa.errors import CheckpointError, FormatError, UnsupportedError
from tonfa.ops.choice import parse

DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"
"""The depth estimator of FLUX.1-Depth-dev's model card."""

ImageLike = Image.Image | np.ndarray[Any, Any] | Tensor


class DepthPreprocessor:
    """Images in, depth maps of the same sizes out: near is white, far is black, each image spans 0 to 255."""

    def __init__(self, model: Any, image_processor: Any) -> None:
        self.model = model.eval()
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls, pretrained_model_or_path: str | Path = DEPTH_MODEL, *, dtype: torch.dtype | None = None, **hub: Any
    ) -> DepthPreprocessor:
        """Load a depth estimator of Transformers that predicts inverse depth, from a folder or from the Hub.

        `hub` holds `revision`, `token`, `cache_dir`, `local_files_only` and the like.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        name = str(pretrained_model_or_path)
        if _is_path(name) and not Path(name).is_dir():
            raise CheckpointError(f"depth model: no folder {name}; give a folder or a Hub id such as {DEPTH_MODEL}")
        try:
            # The backend is named because the default of some processors is torchvision, which is no requirement here.
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", **hub)
            model = AutoModelForDepthEstimation.from_pretrained(name, dtype=dtype, **hub)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"depth model {name}: it does not load: {reason}") from error
        return cls(model, processor)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DepthPreprocessor:
        """Move the model; returns itself."""
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        invert: bool = False,
        batch_size: int = 1,
        return_type: Literal["pil", "np", "pt"] = "pil",
    ) -> list[Any]:
        """One depth map for each image: gray PIL images, or float arrays or tensors (H, W) from 0 to 1.

        Takes PIL images, arrays (H, W), (H, W, C) or (B, H, W, C), tensors (H, W), (C, H, W) or (B, C, H, W), or a list
        of these; integers count to 255, floats to 1. `invert` makes far white. Images are estimated one by one unless
        `batch_size` is raised; those of one size then share a pass.
        """
        if batch_size < 1:
            raise UnsupportedError(f"batch_size = {batch_size} must be at least 1")
        parse("return_type", return_type, ("pil", "np", "pt"))
        images = [picture for item in _as_list(image) for picture in to_rgb(item)]
        pixels = [self.image_processor(images=i, return_tensors="pt")["pixel_values"] for i in images]
        depths: list[Tensor] = []
        while len(depths) < len(pixels):
            start = len(depths)
            stop = start + 1
            while stop < min(start + batch_size, len(pixels)) and pixels[stop].shape == pixels[start].shape:
                stop += 1
            depths += self._estimate(torch.cat(pixels[start:stop]))
        maps = [_normalize(d, i.height, i.width) for d, i in zip(depths, images, strict=True)]
        return [_convert(1 - m if invert else m, return_type) for m in maps]

    def _estimate(
        self,
        pixels: Tensor,  # (B, 3, H, W)
    ) -> list[Tensor]:
        depth = self.model(pixels.to(self.model.device, self.model.dtype)).predicted_depth
        if not torch.isfinite(depth).all():
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise UnsupportedError(f"the depth model returned NaN or Inf in {dtype}; run it in float32")
        return list(depth.float().cpu())


def open_rgb(path: Path) -> Image.Image:
    """A file's picture upright, in RGB. Raises CheckpointError where it is missing or no complete picture."""
    check_regular(path)
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))[0]
    except UnidentifiedImageError as error:
        raise CheckpointError(f"{path}: is no picture in a known format") from error
    except FormatError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{path}: is damaged or too large: {error}") from error


def to_rgb(image: Any) -> list[Image.Image]:
    """Every image in `image` as RGB: one, or all of a batch."""
    if isinstance(image, Image.Image):
        return [_pil_to_rgb(image)]
    if isinstance(image, Tensor):
        array = image.detach().cpu()
        array = array.float() if array.is_floating_point() else array
        if array.ndim >= 3:
            array = array.movedim(-3, -1)
        return _array_to_rgb(array.numpy(), "tensor", tuple(image.shape), "(H, W), (C, H, W) or (B, C, H, W)")
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image, "array", image.shape, "(H, W), (H, W, C) or (B, H, W, C)")
    raise FormatError(f"a {type(image).__name__} is no image; give PIL images, NumPy arrays or tensors")


def _is_path(name: str) -> bool:
    """Hub ids have one slash at most, and no part of them is a dot."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()


def _as_list(image: Any) -> list[Any]:
    items = list(image) if isinstance(image, Iterable) and isinstance(image, list | tuple) else [image]
    if not items:
        raise FormatError("the list of images is empty")
    return items


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise FormatError(f"an image of {image.width} x {image.height} pixels has nothing to show")
    if image.mode.startswith("I"):
        # 16-bit gray, the usual form of measured depth: Pillow's own conversion would clip everything above 255.
        gray = np.asarray(image).astype(np.float32)
        if gray.min() < 0 or gray.max() > 65535:
            raise FormatError(
                f"an image of integers from {gray.min():.0f} to {gray.max():.0f} is neither of 8 nor of 16 bits; "
                "scale it to 0 to 65535"
            )
        scaled = gray / 257 if gray.max() > 255 else gray
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        return _array_to_rgb(np.asarray(image), "image", image.size, "values from 0 to 1")[0]
    return image.convert("RGB")


def _array_to_rgb(
    array: np.ndarray[Any, Any],  # channels last
    what: str,
    shape: tuple[int, ...],
    expected: str,
) -> list[Image.Image]:
    gray = array.ndim == 2
    if not (gray or (array.ndim in (3, 4) and array.shape[-1] in (1, 3, 4))):
        raise FormatError(f"an {what} of shape {shape} is no image; expected {expected} with 1, 3 or 4 channels")
    if array.size == 0:
        raise FormatError(f"an {what} of shape {shape} has nothing to show")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise FormatError(f"an {what} of floats must lie between 0 and 1; it spans {array.min()} to {array.max()}")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise FormatError(f"an {what} of {array.dtype} is no image; give uint8 or floats between 0 and 1")
    batch = array[None] if array.ndim <= 3 else array
    if not gray and batch.shape[-1] == 1:
        batch = batch[..., 0]
    return [Image.fromarray(np.ascontiguousarray(picture)).convert("RGB") for picture in batch]


def _normalize(
    depth: Tensor,  # (H', W') inverse depth
    height: int,
    width: int,
) -> Tensor:
    """(height, width) from 0 to 1; 0 everywhere where the depth is flat."""
    resized = F.interpolate(depth[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    low, high = resized.min(), resized.max()
    return (resized - low) / (high - low) if high > low else torch.zeros_like(resized)


def _convert(depth: Tensor, return_type: str) -> Any:
    if return_type == "pt":
        return depth
    if return_type == "np":
        return depth.numpy()
    return Image.fromarray((depth * 255).round().to(torch.uint8).numpy())

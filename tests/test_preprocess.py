"""DepthPreprocessor: known depths come out as known grays; shapes, lists and bad inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import save_tiny_depth_model
from tonfa.errors import CheckpointError, FormatError, TonfaError, UnsupportedError
from tonfa.preprocess import DepthPreprocessor, to_rgb


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colors."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class KnownDepth(torch.nn.Module):
    """Depth is a function of the pixels that the test gives."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, depth: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.depth, self.batches = depth, []

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        self.batches.append(len(pixels))
        return SimpleNamespace(predicted_depth=self.depth(pixels))


def raw_pixels(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
    assert return_tensors == "pt"
    return {"pixel_values": torch.from_numpy(np.asarray(images).copy()).movedim(-1, 0)[None].float()}


def known(depth: Callable[[torch.Tensor], torch.Tensor]) -> DepthPreprocessor:
    return DepthPreprocessor(KnownDepth(depth), raw_pixels)


@pytest.fixture(scope="session")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_depth_model(tmp_path_factory.mktemp("depth-model"))


def test_model_of_transformers(depth_model: Path) -> None:
    processor = DepthPreprocessor.from_pretrained(depth_model)
    image = photograph(40, 100)
    depths = processor(image)
    assert isinstance(depths, list) and len(depths) == 1
    assert depths[0].size == image.size and depths[0].mode == "L"
    assert depths[0].getextrema() == (0, 255)
    assert depths[0].convert("RGB").mode == "RGB"
    assert processor(image)[0].tobytes() == depths[0].tobytes()


def test_the_model_sees_what_its_image_processor_makes(depth_model: Path) -> None:
    processor = DepthPreprocessor.from_pretrained(str(depth_model))
    image = photograph(40, 100)
    pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2] % 14 == 0 and pixels.shape[-1] % 14 == 0
    assert pixels.min() < 0, "normalized with mean and standard deviation"
    with torch.inference_mode():
        raw = processor.model(pixels).predicted_depth[None]
        raw = torch.nn.functional.interpolate(raw, (40, 100), mode="bilinear")[0, 0]
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    torch.testing.assert_close(processor(image, return_type="pt")[0], expected)


def test_lists_keep_order_and_sizes(depth_model: Path) -> None:
    processor = DepthPreprocessor.from_pretrained(depth_model)
    images = [photograph(40, 100, 1), photograph(64, 32, 2), photograph(64, 32, 3)]
    singles = [processor(i)[0] for i in images]
    assert [d.size for d in singles] == [i.size for i in images]
    assert [d.tobytes() for d in processor(images)] == [d.tobytes() for d in singles]
    for together, single in zip(processor(images, batch_size=3), singles, strict=True):
        # A batch may sum in another order: one gray level at most.
        assert np.abs(np.asarray(together, dtype=int) - np.asarray(single, dtype=int)).max() <= 1


def test_moving_and_dtype(depth_model: Path) -> None:
    processor = DepthPreprocessor.from_pretrained(depth_model)
    assert processor.to("cpu", torch.bfloat16) is processor
    assert processor.model.dtype == torch.bfloat16
    assert processor(photograph(32, 32))[0].getextrema() == (0, 255)
    assert DepthPreprocessor.from_pretrained(depth_model, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_near_is_white_and_the_order_of_depths_is_kept() -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    near = known(lambda pixels: 3 + 5 * pixels[:, 0])  # inverse depth grows with brightness
    assert (np.asarray(near(gray)[0]) == gray).all()
    assert (np.asarray(near(gray, invert=True)[0]) == 255 - gray).all()
    curved = known(lambda pixels: torch.exp(pixels[:, 0] / 64))
    levels = np.asarray(curved(gray)[0]).astype(int).ravel()
    assert levels[0] == 0 and levels[-1] == 255 and (np.diff(levels) >= 0).all()


def test_each_image_has_its_own_range() -> None:
    processor = known(lambda pixels: pixels[:, 0])
    dark = np.linspace(0, 50, 64).astype(np.uint8).reshape(8, 8)
    bright = dark + np.uint8(200)
    maps = processor([dark, bright], batch_size=2)
    assert [m.getextrema() for m in maps] == [(0, 255), (0, 255)]


def test_flat_depth_is_black() -> None:
    flat = known(lambda pixels: torch.full_like(pixels[:, 0], 7.0))
    assert flat(photograph(8, 8))[0].getextrema() == (0, 0)


def test_return_types_agree() -> None:
    processor = known(lambda pixels: pixels[:, 1])
    image = photograph(8, 12)
    pil, array, tensor = (processor(image, return_type=t)[0] for t in ("pil", "np", "pt"))
    assert array.dtype == np.float32 and array.shape == (8, 12)
    assert (array == tensor.numpy()).all()
    assert (np.asarray(pil) == np.round(array * 255)).all()


def test_batches_hold_equal_sizes_only() -> None:
    processor = known(lambda pixels: pixels[:, 0])
    images = [photograph(8, 8), photograph(8, 8), photograph(8, 8), photograph(8, 16), photograph(8, 8)]
    processor(images, batch_size=2)
    assert processor.model.batches == [2, 1, 1, 1]


@pytest.mark.parametrize(
    "convert",
    [
        lambda rgb: Image.fromarray(rgb),
        lambda rgb: Image.fromarray(rgb).convert("RGBA"),
        lambda rgb: rgb,
        lambda rgb: rgb[None],
        lambda rgb: rgb.astype(np.float32) / 255,
        lambda rgb: torch.from_numpy(rgb).movedim(-1, 0),
        lambda rgb: torch.from_numpy(rgb).movedim(-1, 0)[None],
        lambda rgb: torch.from_numpy(rgb).movedim(-1, 0).float() / 255,
    ],
    ids=["pil", "rgba", "array", "array-batch", "array-float", "tensor", "tensor-batch", "tensor-float"],
)
def test_forms_of_one_image(convert: Callable[[Any], Any]) -> None:
    rgb = np.asarray(photograph(6, 10))
    (result,) = to_rgb(convert(rgb.copy()))
    assert result.mode == "RGB" and (np.asarray(result) == rgb).all()


def test_gray_forms() -> None:
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8)
    deep = Image.fromarray(gray.astype(np.uint16) * 257 + 2000)
    for form in (gray, gray[..., None], torch.from_numpy(gray), torch.from_numpy(gray)[None], Image.fromarray(gray)):
        (result,) = to_rgb(form)
        assert (np.asarray(result) == gray[..., None]).all()
    assert (np.asarray(to_rgb(deep)[0])[..., 0] == np.round(gray + 2000 / 257)).all()


def test_a_batch_is_taken_apart() -> None:
    batch = np.stack([np.asarray(photograph(8, 8, seed)) for seed in range(3)])
    processor = known(lambda pixels: pixels[:, 0])
    assert len(processor(batch)) == 3
    assert len(processor([batch, batch[0]])) == 4


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "the list of images is empty"),
        ("photo.jpg", "a str is no image"),
        (None, "a NoneType is no image"),
        ([None], "a NoneType is no image"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
        (np.zeros((0, 4, 3), np.uint8), "nothing to show"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((3, 4, 5), np.uint8), "expected \\(H, W\\), \\(H, W, C\\)"),
        (torch.zeros(5, 4, 3), "expected \\(H, W\\), \\(C, H, W\\)"),
        (torch.zeros(1), "no image"),
        (np.full((4, 4, 3), 2.0), "between 0 and 1"),
        (np.full((4, 4), np.nan), "between 0 and 1"),
        (np.zeros((4, 4, 3), np.int64), "give uint8 or floats"),
    ],
)
def test_bad_images_are_named(image: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        known(lambda pixels: pixels[:, 0])(image)


def test_bad_options() -> None:
    processor = known(lambda pixels: pixels[:, 0])
    with pytest.raises(UnsupportedError, match="batch_size = 0"):
        processor(photograph(8, 8), batch_size=0)
    with pytest.raises(UnsupportedError, match="choose one of pil, np, pt"):
        processor(photograph(8, 8), return_type="jpeg")  # type: ignore[arg-type]


def test_nan_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="NaN or Inf in float32"):
        known(lambda pixels: pixels[:, 0] * float("nan"))(photograph(8, 8))


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        DepthPreprocessor.from_pretrained(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="does not load"):
        DepthPreprocessor.from_pretrained(tmp_path)
    with pytest.raises(TonfaError, match="someone/no-such-depth-model"):
        DepthPreprocessor.from_pretrained("someone/no-such-depth-model", local_files_only=True)

"""The captions and depth maps that come with the package are those that the script writes."""

from pathlib import Path

import numpy as np
from PIL import Image

from calibration_set import KINDS, calibration_captions, depth_maps

DATA = Path(__file__).parents[2] / "src" / "tonfa" / "data"


def test_captions_are_the_scripts():
    captions = calibration_captions()
    assert (DATA / "captions.txt").read_text(encoding="utf-8").splitlines() == captions
    assert calibration_captions(20) == captions[:20]
    words = {word.strip(',."') for caption in captions for word in caption.split()}
    assert len(words) > 900 and len(KINDS) == 18


def test_depth_maps_are_the_scripts():
    for i, made in enumerate(depth_maps(2)):
        with Image.open(DATA / "depth" / f"{i:02d}.png") as kept:
            assert kept.mode == "L"
            apart = np.asarray(kept, dtype=int) - np.asarray(made, dtype=int)
        assert np.abs(apart).mean() < 0.5
        assert (np.asarray(made).min(), np.asarray(made).max()) == (0, 255)

"""Scripts written for Nunchaku run unchanged once the stand-in is asked for, and never in place of the real package."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_flux_nunchaku import TINY, legacy_folder
from typer.testing import CliRunner

from tiny_models import save_tiny_depth_model
from tonfa.cli.app import app
from tonfa.compat import nunchaku
from tonfa.errors import CheckpointError, UnsupportedError
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


@pytest.fixture
def stand_in() -> Iterator[None]:
    nunchaku.install()
    yield
    nunchaku.uninstall()


@pytest.mark.usefixtures("stand_in")
def test_names_that_scripts_import(tmp_path: Path) -> None:
    from nunchaku import NunchakuFluxTransformer2dModel
    from nunchaku.models.transformer_flux import NunchakuFluxTransformer2dModel as Same
    from nunchaku.models.transformers.transformer_flux_v2 import NunchakuFluxTransformer2DModelV2
    from nunchaku.utils import get_precision

    assert Same is NunchakuFluxTransformer2dModel
    assert get_precision() == "int4"
    folder = legacy_folder(tmp_path / f"svdq-{get_precision()}-tiny")
    first = NunchakuFluxTransformer2dModel.from_pretrained(folder, precision="int4", device="cpu")
    second = NunchakuFluxTransformer2DModelV2.from_pretrained(TINY, torch_dtype=torch.bfloat16, device="cpu")
    first.set_attention_impl("nunchaku-fp16")
    assert isinstance(first, SVDQFluxTransformer2DModel)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.usefixtures("stand_in")
def test_what_nunchaku_has_beyond_is_refused_by_name() -> None:
    from nunchaku import NunchakuFluxTransformer2dModel as Model

    for options in ({"precision": "fp4"}, {"offload": True}, {"return_metadata": True}):
        with pytest.raises(UnsupportedError, match=next(iter(options))):
            Model.from_pretrained(TINY, **options)
    model = Model.from_pretrained(TINY, device="cpu")
    with pytest.raises(UnsupportedError, match="LoRA"):
        model.update_lora_params("lora.safetensors")
    with pytest.raises(UnsupportedError, match="'sage'"):
        model.set_attention_impl("sage")
    with pytest.raises(CheckpointError, match="no such file"):
        Model.from_pretrained("nowhere.safetensors")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nunchaku.caching")


def test_the_real_package_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("nunchaku")
    monkeypatch.setitem(sys.modules, "nunchaku", real)
    with pytest.raises(UnsupportedError, match="nunchaku is installed"):
        nunchaku.install()
    assert sys.modules["nunchaku"] is real
    nunchaku.uninstall()
    assert sys.modules["nunchaku"] is real


def test_image_gen_aux_is_served_only_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("image_gen_aux")
    monkeypatch.setitem(sys.modules, "image_gen_aux", real)
    nunchaku.install()
    assert sys.modules["image_gen_aux"] is real
    nunchaku.uninstall()
    monkeypatch.delitem(sys.modules, "image_gen_aux")
    nunchaku.install()
    from image_gen_aux import DepthPreprocessor

    from tonfa.preprocess import DepthPreprocessor as Ours

    assert DepthPreprocessor is Ours
    nunchaku.uninstall()
    assert "image_gen_aux" not in sys.modules


CARD = """
import torch
from diffusers import FluxControlPipeline
from diffusers.utils import load_image
from image_gen_aux import DepthPreprocessor

from nunchaku.models.transformer_flux import NunchakuFluxTransformer2dModel

transformer = NunchakuFluxTransformer2dModel.from_pretrained("mit-han-lab/svdq-int4-flux.1-depth-dev")

pipe = FluxControlPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-Depth-dev",
    transformer=transformer,
    torch_dtype=torch.bfloat16,
).to("cuda")

prompt = "A robot made of exotic candies and chocolates of different kinds."
control_image = load_image("https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/robot.png")

processor = DepthPreprocessor.from_pretrained("LiheYoung/depth-anything-large-hf")
control_image = processor(control_image)[0].convert("RGB")

image = pipe(
    prompt=prompt, control_image=control_image, height=1024, width=1024, num_inference_steps=30, guidance_scale=10.0
).images[0]
image.save("flux.1-depth-dev.png")
"""


def run_card(transformer: Path, folder: Path, imported: str) -> np.ndarray:
    """The card's picture, with local paths for its ids and the CPU for its GPU."""
    photo = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(photo)
    code = CARD
    for old, new in {
        "mit-han-lab/svdq-int4-flux.1-depth-dev": str(transformer),
        "black-forest-labs/FLUX.1-Depth-dev": str(DEMO),
        "LiheYoung/depth-anything-large-hf": str(save_tiny_depth_model(folder / "depth")),
        "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/robot.png": str(photo),
        '"cuda"': '"cpu"',
        "height=1024, width=1024, num_inference_steps=30": "height=64, width=64, num_inference_steps=2",
        "from nunchaku.models.transformer_flux import NunchakuFluxTransformer2dModel": imported,
    }.items():
        assert old in code
        code = code.replace(old, new)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Diffusers deprecates the model card's torch_dtype
        names: dict[str, Any] = {}
        exec(compile(code, "card", "exec"), names)
    return np.asarray(names["image"])


@pytest.mark.usefixtures("stand_in")
def test_the_published_script_runs_and_conversion_changes_no_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model, quantized here, as a native folder and written as a Nunchaku legacy folder."""
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["quantize", str(DEMO), "--out", "native", "--iterations", "0"],
        ["convert", "native", "legacy", "--to", "nunchaku-folder"],
        ["convert", "legacy", "back", "--to", "native"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    published = "from nunchaku.models.transformer_flux import NunchakuFluxTransformer2dModel"
    ours = "from tonfa import SVDQFluxTransformer2DModel as NunchakuFluxTransformer2dModel"
    picture = run_card(tmp_path / "legacy", tmp_path, published)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 1
    for folder in ("native", "back"):
        assert np.array_equal(run_card(tmp_path / folder, tmp_path, ours), picture)

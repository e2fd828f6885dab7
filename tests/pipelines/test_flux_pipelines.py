"""Diffusers' own FLUX pipelines run with our transformer in place of theirs, and give the same pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from flux_models import VARIANTS, dense_model
from PIL import Image

from support import DEVICES, relative_error
from tiny_models import flux_scheduler, tiny_vae
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
TEXT = {"prompt_embeds": (1, 13, 32), "pooled_prompt_embeds": (1, 24)}


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def components(transformer: torch.nn.Module) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"vae": tiny_vae(), "scheduler": flux_scheduler(), "transformer": transformer, **NO_TEXT}


def controlnet() -> FluxControlNetModel:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Diffusers' ControlNet uses a name that Diffusers deprecates
        model = FluxControlNetModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(8, 28, 28),
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "text": (FluxPipeline, "dev", {}),
    "schnell": (FluxPipeline, "schnell", {}),
    "depth": (FluxControlPipeline, "depth", {"control_image": picture(0)}),
    "fill": (FluxFillPipeline, "fill", {"image": picture(0), "mask_image": picture(1, "L")}),
    "kontext": (FluxKontextPipeline, "dev", {"image": picture(0), "_auto_resize": False}),
    "controlnet": (FluxControlNetPipeline, "dev", {"control_image": picture(0)}),
}


def generate(pipeline: Any, steps: int = 2, batch: int = 1, **arguments: Any) -> torch.Tensor:
    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    generator = torch.Generator().manual_seed(3)
    text = {
        name: torch.randn(shape, generator=generator).to(device, dtype).repeat_interleave(batch, 0)
        for name, shape in TEXT.items()
    }
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Diffusers' and transformers' own deprecations
        output = pipeline(
            height=48,
            width=80,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(i) for i in range(batch)],
            output_type="pt",
            **text,
            **arguments,
        )
    return output.images.float().cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_pictures_equal_those_of_diffusers_transformer(case: str, device: str) -> None:
    pipeline_class, variant, arguments = CASES[case]
    dense = dense_model(**VARIANTS[variant])
    parts = components(dense) | ({"controlnet": controlnet()} if case == "controlnet" else {})
    expected = generate(pipeline_class(**parts).to(device), **arguments)
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    found = generate(pipeline_class(**{**parts, "transformer": fused}).to(device), **arguments)
    assert expected.std() > 0.01
    tolerance = 1e-4 if device == "cpu" else 2e-2  # TF32-free float32, but other kernels and their order of sums
    assert relative_error(found, expected) < tolerance


@pytest.fixture
def quantized() -> SVDQFluxTransformer2DModel:
    return SVDQFluxTransformer2DModel.from_dense(dense_model(dtype=torch.bfloat16), Recipe(rank=32, iterations=1))


@pytest.mark.parametrize("device", DEVICES)
def test_quantized_pictures_are_reproducible_and_batches_equal_singles(
    quantized: SVDQFluxTransformer2DModel, device: str
) -> None:
    pipeline = FluxControlPipeline(**components(quantized)).to(device, torch.bfloat16)
    images = generate(pipeline, batch=2, control_image=picture(0))
    assert images.isfinite().all()
    assert images.std() > 0.01
    assert torch.equal(generate(pipeline, batch=2, control_image=picture(0)), images)
    assert relative_error(generate(pipeline, control_image=picture(0)), images[:1]) < 5e-2
    assert relative_error(generate(pipeline, control_image=picture(1)), images[:1]) > 1e-3


def test_a_saved_pipeline_loads_again(quantized: SVDQFluxTransformer2DModel, tmp_path: Path) -> None:
    pipeline = FluxControlPipeline(**components(quantized)).to(torch.bfloat16)
    expected = generate(pipeline, control_image=picture(0))
    pipeline.save_pretrained(tmp_path / "pipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16, **NO_TEXT)
    assert isinstance(loaded, FluxControlPipeline)
    assert isinstance(loaded.transformer, SVDQFluxTransformer2DModel)
    assert torch.equal(generate(loaded, control_image=picture(0)), expected)


def test_a_pipeline_takes_a_loaded_transformer(
    quantized: SVDQFluxTransformer2DModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized.save_pretrained(tmp_path / "int4")
    FluxControlPipeline(**components(dense_model())).save_pretrained(tmp_path / "pipeline")
    transformer = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "int4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxControlPipeline.from_pretrained(
            tmp_path / "pipeline", transformer=transformer, torch_dtype=torch.bfloat16, **NO_TEXT
        )
    assert pipeline.transformer is transformer
    assert "Expected types" not in caplog.text
    assert generate(pipeline, control_image=picture(0)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(quantized: SVDQFluxTransformer2DModel, how: str) -> None:
    pipeline = FluxControlPipeline(**components(quantized)).to("cuda", torch.bfloat16)
    expected = generate(pipeline, control_image=picture(0))
    pipeline.to("cpu")
    getattr(pipeline, how)()
    assert relative_error(generate(pipeline, control_image=picture(0)), expected) < 2e-2


def test_callbacks_and_interruption(quantized: SVDQFluxTransformer2DModel) -> None:
    pipeline = FluxControlPipeline(**components(quantized)).to(torch.bfloat16)
    steps = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    generate(pipeline, steps=4, control_image=picture(0), callback_on_step_end=callback)
    assert steps == [0, 1]

"""The quantized FLUX: close to the dense one under every policy, the same after saving, wherever it runs."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from flux_models import dense_model, inputs, run
from safetensors.torch import load_file, save_file

from support import DEVICES, relative_error
from tonfa.errors import CheckpointError, UnsupportedError
from tonfa.layers.bound import BoundModule
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import SharedConditioning, W4A16Linear
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

RECIPE = Recipe(rank=32, iterations=2)


@pytest.fixture(scope="module")
def quantized() -> SVDQFluxTransformer2DModel:
    return SVDQFluxTransformer2DModel.from_dense(dense_model(dtype=torch.bfloat16), RECIPE)


@pytest.fixture
def folder(quantized: SVDQFluxTransformer2DModel, tmp_path: Path) -> Path:
    quantized.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("activations", "bound"), [("none", 0.12), ("int8", 0.12), ("fp8", 0.14), ("int4", 0.35)])
def test_every_policy_is_close_to_the_dense_model(
    quantized: SVDQFluxTransformer2DModel, activations: str, bound: float, device: str
) -> None:
    dense = dense_model()
    expected = run(dense, inputs(dense, 2))
    model = copy.deepcopy(quantized).set_activations(activations).to(device)
    found = run(model, inputs(dense, 2, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_4_bit_model_equals_the_dense_model_of_its_weights(quantized: SVDQFluxTransformer2DModel, device: str) -> None:
    """With unquantized activations only rounding is left between the 4-bit model and its dequantized twin."""
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(), recipe=None)
    model = copy.deepcopy(quantized).float().set_activations("none").to(device)
    layers = dict(model.named_modules())
    state = fused.state_dict()
    for name in state:
        owner, _, kind = name.rpartition(".")
        layer = layers[owner]
        if hasattr(layer, "weights"):
            weight, bias = layer.weights().dense()
            state[name] = (weight if kind == "weight" else bias).cpu().clone()
            if kind == "bias" and isinstance(layer, W4A16Linear):
                chunks = layer.out_features // 128
                for chunk in {1, chunks - 2}:
                    state[name][chunk * 128 : (chunk + 1) * 128] -= 1
        else:
            state[name] = getattr(layer, kind).detach().cpu()
    fused.load_state_dict(state)
    values = inputs(model, 2)
    assert relative_error(run(model, values), run(fused, values)) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_parameters_may_stay_on_the_host_between_blocks(
    quantized: SVDQFluxTransformer2DModel, activations: str, device: str
) -> None:
    """Sequential offloading: parameters come with each call and go after it, packed copies too."""
    model = copy.deepcopy(quantized).set_activations(activations)
    values = inputs(model, dtype=torch.bfloat16)
    expected = run(copy.deepcopy(model).to(device), values)
    cpu_offload(model, torch.device(device))
    moved = {name: t.to(device) for name, t in values.items()}
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(**moved, return_dict=False)[0].cpu(), expected)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert not any(m._binding for m in model.modules() if isinstance(m, BoundModule))


@pytest.mark.parametrize("device", DEVICES)
def test_modulations_ahead_of_all_blocks_are_those_of_each(
    quantized: SVDQFluxTransformer2DModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(quantized).to(device)
    values = inputs(model, 3, dtype=torch.bfloat16)
    counts = []
    together = SharedConditioning.__call__

    def counting(self, modulations, conditioning):
        counts.append(sum(joined is not None for joined in together(self, modulations, conditioning)))
        return together(self, modulations, conditioning)

    monkeypatch.setattr(SharedConditioning, "__call__", counting)
    found = run(model, values)
    monkeypatch.setattr(SharedConditioning, "__call__", lambda self, modulations, x: [None] * len(modulations))
    assert torch.equal(run(model, values), found)
    assert counts == [2 * len(model.transformer_blocks) + len(model.single_transformer_blocks)]


def test_deterministic_and_batch_equals_singles(quantized: SVDQFluxTransformer2DModel) -> None:
    model = copy.deepcopy(quantized).set_activations("int8")
    values = inputs(model, 3, dtype=torch.bfloat16)
    whole = run(model, values)
    assert torch.equal(run(model, values), whole)
    for i in range(3):
        single = {k: v if k.endswith("ids") else v[i : i + 1] for k, v in values.items()}
        assert relative_error(run(model, single), whole[i : i + 1]) < 2e-2


def test_saved_and_loaded_model_is_equal_to_the_bit(quantized: SVDQFluxTransformer2DModel, folder: Path) -> None:
    loaded = SVDQFluxTransformer2DModel.from_pretrained(folder)
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    values = inputs(quantized, dtype=torch.bfloat16)
    assert torch.equal(run(loaded, values), run(quantized, values))
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config.quantization_config["rank"] == 32
    assert (loaded.config.in_channels, loaded.config.guidance_embeds) == (128, True)


def test_loading_casts_floats_and_chooses_the_policy(folder: Path) -> None:
    model = SVDQFluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float16, activations="none")
    assert model.dtype == torch.float16
    layer = model.transformer_blocks[0].attn.to_qkv
    assert isinstance(layer, SVDQLinear)
    assert (layer.qweight.dtype, layer.wscales.dtype, layer.activations) == (torch.uint8, torch.float16, "none")
    stored = SVDQFluxTransformer2DModel.from_pretrained(folder).dtype
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32), ("auto", stored)):
        assert SVDQFluxTransformer2DModel.from_pretrained(folder, torch_dtype=name).dtype == dtype


def test_weights_are_4_bit_in_memory(quantized: SVDQFluxTransformer2DModel) -> None:
    layer = quantized.single_transformer_blocks[0].ff.up
    bits = 8 * sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if n in ("qweight", "wscales"))
    assert bits / (layer.in_features * layer.out_features) == 4.25


def test_moving_and_casting_follow(quantized: SVDQFluxTransformer2DModel) -> None:
    model = copy.deepcopy(quantized).set_activations("int8")
    bf16 = run(model, inputs(model, dtype=torch.bfloat16))
    half = run(model.to(torch.float16), inputs(model, dtype=torch.float16))
    assert half.dtype == torch.float16
    assert relative_error(half, bf16) < 3e-2


def test_a_model_that_has_run_can_be_pickled(quantized: SVDQFluxTransformer2DModel) -> None:
    model = copy.deepcopy(quantized).set_activations("int8", "reference")
    values = inputs(model, dtype=torch.bfloat16)
    found = run(model, values)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(again, values), found)
    assert again.transformer_blocks[0].attn.to_qkv.binding().kernels.backend == "reference"


def edit_tensors(folder: Path, change) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "single_transformer_blocks.1.ff.down.wscales"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), "expected"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), "int8"),
    ],
    ids=["missing", "extra", "misshapen", "wrong dtype"],
)
def test_a_wrong_checkpoint_is_refused_by_name(folder: Path, change, message: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as error:
        SVDQFluxTransformer2DModel.from_pretrained(folder)
    assert message == "extra" or NAME in str(error.value)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors"):
        SVDQFluxTransformer2DModel.from_pretrained(folder)


def test_what_is_no_4_bit_flux_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "nowhere")
    dense_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="tonfa quantize"):
        SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": "many"}))
    with pytest.raises(CheckpointError, match="config"):
        SVDQFluxTransformer2DModel.from_pretrained(folder)


def test_unknown_and_unsupported_options(folder: Path) -> None:
    with pytest.raises(TypeError, match="no option 'actvations'"):
        SVDQFluxTransformer2DModel.from_pretrained(folder, actvations="int8")
    with pytest.raises(UnsupportedError, match="device_map='auto'"):
        SVDQFluxTransformer2DModel.from_pretrained(folder, device_map="auto")
    with pytest.raises(UnsupportedError, match="activations='int3'"):
        SVDQFluxTransformer2DModel.from_pretrained(folder, activations="int3")
    with pytest.raises(UnsupportedError, match="dtype='half' is unknown; choose one of bfloat16, float16, float32"):
        SVDQFluxTransformer2DModel.from_pretrained(folder, torch_dtype="half")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device='gpu' is none that PyTorch has here; try 'cpu' or 'cuda'"),
        (77, "device=77"),  # the number of a GPU, as are all numbers
        ("cuda:77", "device='cuda:77': no CUDA device"),
        ("meta", "device='meta': it keeps no weights"),
        ([], "is none that PyTorch has here"),
    ],
)
def test_devices_that_are_not_there(tmp_path: Path, device: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):  # before the folder is looked for
        SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "nowhere", device=device)


def test_the_device_of_number_0_is_a_gpu(folder: Path) -> None:
    if torch.cuda.is_available():
        assert SVDQFluxTransformer2DModel.from_pretrained(folder, device=0).device == torch.device("cuda", 0)
    else:
        with pytest.raises(UnsupportedError, match="device=0"):
            SVDQFluxTransformer2DModel.from_pretrained(folder, device=0)


def test_a_folder_may_be_named_like_a_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "int4.safetensors")
    loaded = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "int4.safetensors").state_dict()
    for name, tensor in SVDQFluxTransformer2DModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(loaded[name], tensor), name

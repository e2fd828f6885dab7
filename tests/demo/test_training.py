"""The demo model's tokenizers, optimizer and a whole training in miniature."""

import json

import pytest
import torch

from captions import full_captions
from components import TINY, build_text_encoders, build_tokenizers
from evaluate import color_names, evaluate, load_pipeline, make_problems, scored_objects
from flow_training import SHORT
from muon import orthogonalize
from scenes import sample_scenes
from train import main, pack_parts

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(scope="module")
def tokenizers():
    return build_tokenizers()


def test_tokenizers_have_a_token_per_word(tokenizers):
    clip, t5 = tokenizers
    assert (clip.model_max_length, t5.model_max_length) == (77, 512)
    for text in full_captions(sample_scenes(9, 50)):
        ids = t5(text).input_ids
        assert len(ids) <= SHORT and t5.unk_token_id not in ids
        assert t5.decode(ids, skip_special_tokens=True) == text
        words = text.replace(",", " ,").replace(":", " :").split()
        assert len(ids) == len(words) + 1
        assert len(clip(text).input_ids) == len(words) + 2


def test_tokenizers_spell_unknown_words(tokenizers):
    clip, t5 = tokenizers
    text = "A zebra's Quartz vase, 42 of them!"
    assert t5.decode(t5(text).input_ids, skip_special_tokens=True) == text
    spelled = clip.decode(clip(text).input_ids, skip_special_tokens=True)
    assert spelled.replace(" ", "") == text.lower().replace(" ", "")


def test_t5_tells_the_order_of_words_from_the_start(tokenizers):
    """As a bag of words it gives a word the same feature in both prompts, and colors cannot be bound to objects."""
    torch.manual_seed(0)
    t5 = build_text_encoders(TINY, *tokenizers)[1].eval()
    tokenizer = tokenizers[1]
    for length in (SHORT, 512):
        texts = ["a red cube and a blue cone", "a blue cube and a red cone"]
        ids = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            first, second = t5(ids).last_hidden_state
        assert ids[0, 1] == ids[1, 5]  # red
        assert (first[1] - second[5]).norm() > 0.2 * first[1].norm()
        assert (first[1] - first[5]).norm() > 0.2 * first[1].norm()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64)])
def test_orthogonalize(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(x).float())
    assert singular.min() > 0.4 and singular.max() < 1.3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "model"
    arguments = (
        "--size tiny --resolution 64 --scenes 8 --vae-batch 4 --batch 2 --vae-steps 2 --flow-steps 2 --distill 0.5"
    )
    main([*arguments.split(), "--out", str(out), "--no-compile", "--device", "cpu"])
    return out


def test_training_gives_a_pipeline(trained):
    record = json.loads((trained / "training.json").read_text())
    assert (record["vae_steps"], record["flow_steps"], record["scenes"]) == (2, 2, 8)
    pipeline = load_pipeline(trained, None, "cpu", torch.bfloat16)
    names = [
        type(getattr(pipeline, n)).__name__ for n in ("tokenizer", "text_encoder", "text_encoder_2", "transformer")
    ]
    assert names == ["CLIPTokenizer", "CLIPTextModel", "T5EncoderModel", "FluxTransformer2DModel"]
    problems = make_problems(4, 64)
    result, images = evaluate(pipeline, problems, color_names(64, scenes=16), steps=2, max_sequence_length=64)
    assert images.shape == (4, 3, 64, 64)
    assert set(result) == {"ceiling", "model", "control_of_another_scene", "prompt_of_another_scene"}
    assert result["ceiling"]["silhouette_recall"] > 0.9
    assert result["ceiling"]["psnr_to_rendering"] > 60 > result["model"]["psnr_to_rendering"]


def test_training_goes_on_with_new_text_encoders(trained, tmp_path):
    arguments = "--stage flow --size tiny --resolution 64 --scenes 8 --batch 2 --flow-steps 1 --new-text --no-compile"
    folders = ["--vae", str(trained / "vae"), "--continue-from", str(trained), "--out", str(tmp_path / "model")]
    main([*arguments.split(), *folders, "--device", "cpu"])
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["flow_steps"] == 1 and record["continued_from"]["flow_steps"] == 2
    load_pipeline(tmp_path / "model", None, "cpu", torch.bfloat16)


def test_parts_restore_the_folder(trained, tmp_path):
    pack_parts(trained / "vae", tmp_path, part_bytes=100_000)
    parts = sorted(tmp_path.glob("model.tar.*"))
    assert all(p.stat().st_size <= 100_000 for p in parts)
    weights = (trained / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights in b"".join(p.read_bytes() for p in parts)


def test_color_names_know_renderings():
    problems, names = make_problems(24, 64), color_names(64, scenes=96)
    objects = scored_objects(problems.truth.rgb, problems.truth.mask, problems.scenes)
    assert (names.classify(objects.feature) == objects.color).float().mean() > 0.85

"""The committed tiny models: real LLaVA folders that load without our code, small, and able to
see."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import common
from vlmdiag.model.decoding import generate
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes.questions import (
    AXES,
    ask_caption,
    ask_color,
    ask_presence,
    ask_shape,
    relation,
    relations,
)
from vlmdiag.scenes.scene import floor_scene, render

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
NAMES = ["tiny-llava", "tiny-llava-normWmean", "tiny-llava-multilayerNorm"]
ALL = [*NAMES, *(f"tiny-llava-scale{i}" for i in (1, 2, 3, 4))]


@pytest.fixture(scope="module")
def tiny_model():
    loaded = {}

    def get(name):
        assert (CHECKPOINTS / name / "config.json").exists(), (
            f"checkpoints/{name} is missing: python checkpoints/train_tiny.py makes it"
        )
        if name not in loaded:
            loaded[name] = common.load_model(CHECKPOINTS / name)  # with the self-check
        return loaded[name]

    return get


@pytest.mark.parametrize("name", ALL)
def test_a_folder_is_small_and_whole(tiny_model, name):
    tiny_model(name)
    assert sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir()) <= 5_000_000
    assert (CHECKPOINTS / name / "tokenizer.json").exists()
    assert (CHECKPOINTS / name / "chat_template.jinja").exists()


ALONE = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
chat = [{"role": "user", "content": content}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
picture = Image.new("RGB", (50, 40))
inputs = processor(images=picture, text=prompt, return_tensors="pt")
print(type(model).__name__, len(model.generate(**inputs, max_new_tokens=3)[0]))
"""


def test_the_base_loads_with_nothing_of_ours():
    command = [sys.executable, "-c", ALONE, str(CHECKPOINTS / "tiny-llava")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LlavaForConditionalGeneration"), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_models_see(tiny_model, name):
    """A small sample of what the model card measures on many more scenes."""
    vlm, rng, asked = tiny_model(name), Random("small sample"), []
    for i in range(24):
        scene = floor_scene(rng, 2 + i % 3, square=True)
        picture = render(scene)
        for kind in AXES:
            asked += [(relation(kind, a, b), picture) for a, b in relations(scene, kind, 0.2)[:2]]
        asked += [
            (question, picture)
            for ask in (ask_presence, ask_color, ask_shape, ask_caption)
            if (question := ask(rng, scene)) is not None
        ]
    right, count = {}, {}
    for start in range(0, len(asked), 40):
        rows = asked[start : start + 40]
        batch = vlm.encode(
            [Sample("0", None, question.text) for question, _ in rows],
            [picture for _, picture in rows],
        )
        for ids, (question, _) in zip(generate(vlm, batch, 40).ids, rows, strict=True):
            right[question.kind] = right.get(question.kind, 0) + (
                vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() == question.answer
            )
            count[question.kind] = count.get(question.kind, 0) + 1
    accuracy = {kind: right[kind] / count[kind] for kind in count}
    for kind in ("left_right", "above_below", "far_close", "color", "shape", "yes_no"):
        assert accuracy[kind] >= 0.8, accuracy
    assert accuracy["caption"] >= 0.6, accuracy


def test_vision_tokens_enter_as_the_paper_says(tiny_model):
    """Far longer than text tokens in the base; all of one length in the variants (RMS norm, clip,
    scale: Beyond Semantics)."""
    picture = render(floor_scene(Random(1), 3, square=True))
    norms = {}
    for name in NAMES:
        vlm = tiny_model(name)
        batch = vlm.encode([Sample("0", None, "Describe the image.")], [picture])
        with torch.no_grad():
            norms[name] = vlm.vision(batch).pooler_output[0].norm(dim=-1)
        text = (
            vlm.model.get_input_embeddings()
            .weight[vlm.tokenizer.encode("The image shows a red circle.")]
            .norm(dim=-1)
        )
        if name == "tiny-llava":
            assert norms[name].median() > 3 * text.median()
        else:
            settings = vlm.model.config.vision_embed_norm
            assert torch.allclose(
                norms[name], torch.tensor(settings["max_norm"] * settings["scale"]), rtol=2e-2
            )


def test_the_variants_are_read_by_our_family_and_refused_by_none(tiny_model):
    assert AutoProcessor.from_pretrained(CHECKPOINTS / NAMES[1]) is not None
    # transformers alone leaves the norm out
    plain = AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / NAMES[1])
    ours = tiny_model(NAMES[1])
    assert not hasattr(plain.model.multi_modal_projector, "norm")
    assert ours.model.model.multi_modal_projector.norm.weight.shape == (128,)

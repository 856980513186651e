"""What the tools measure on smol-llava, whose decoder is a published language model: against eager
attention in float32 and bfloat16, transformers' own answers, and what the model was trained to do.

The folder is built by `python checkpoints/build_smol_llava.py`; without it these tests are skipped,
and `SMOL_TESTS=required`, as in CI, demands them.
"""

import os
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from common import capture, generate, load_model
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import GroupMass, HiddenStates
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.scenes import evaluation
from vlmdiag.scenes.scene import floor_scene, render

pytestmark = pytest.mark.smol

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
FOLDER = Path(os.environ.get("SMOL_LLAVA", CHECKPOINTS / "smol-llava-135m"))
QUESTIONS = ("Describe the image.", "What color is the circle? Answer with only one word.")
BOS = GROUPS.index("bos")


@pytest.fixture(scope="module")
def folder():
    if not (FOLDER / "config.json").exists():
        reason = f"no {FOLDER.name}: python checkpoints/build_smol_llava.py makes it"
        if os.environ.get("SMOL_TESTS") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return FOLDER


@pytest.fixture(scope="module")
def exact(folder):
    """In float32; the self-check has passed."""
    return load_model(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def picture():
    return render(floor_scene(Random("smol-llava"), 3))


def encode(vlm, picture):
    """Two questions of different lengths, so one row is padded on the left."""
    samples = [Sample(str(i), AT_HAND, text) for i, text in enumerate(QUESTIONS)]
    batch = vlm.encode(samples, [picture] * len(samples))
    assert len(set(batch.lengths)) == len(samples)
    return batch


@torch.no_grad()
def of_eager_attention(vlm, batch):
    """transformers' own forward of each prompt alone, with its own positions and eager attention:
    (attention mass of the last row (L, B, H, G), the states of the residual stream at that row
    (L, B, d), which the final norm has not touched) in float32."""
    masses, states = [], []
    vlm.parts.decoder.set_attn_implementation("eager")
    try:
        for row, pixels in enumerate(batch.image_inputs["pixel_values"]):
            kept = batch.attention_mask[row].bool()
            out = vlm.model(
                input_ids=batch.input_ids[row : row + 1, kept],
                pixel_values=pixels[None].to(vlm.dtype),
                output_attentions=True,
                output_hidden_states=True,
            )
            groups = batch.groups[row, kept]
            last = torch.stack(out.attentions)[:, 0, :, -1].float()
            of_groups = [last[..., groups == code].sum(-1) for code in range(len(GROUPS))]
            masses.append(torch.stack(of_groups, -1))
            states.append(torch.stack(out.hidden_states[:-1])[:, 0, -1].float())
    finally:
        vlm.parts.decoder.set_attn_implementation("sdpa")
    return torch.stack(masses, 1), torch.stack(states, 1)


def captured(vlm, batch):
    """The same by capture(), of the padded batch."""
    mass, hidden = GroupMass(batch), HiddenStates()
    with capture(vlm, [mass, hidden]):
        prefill(vlm, batch)
    layers = range(len(vlm.parts.layers))
    return mass.mass[0], torch.stack([hidden.states[layer][:, -1].float() for layer in layers])


def relative(ours, wanted):
    """Greatest difference of the states of a layer, relative to their length."""
    return float(((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def test_float32_equals_eager_attention(exact, picture):
    batch = encode(exact, picture)
    mass, states = captured(exact, batch)
    wanted_mass, wanted_states = of_eager_attention(exact, batch)
    assert torch.allclose(mass, wanted_mass, atol=1e-5)
    assert relative(states, wanted_states) < 1e-4
    shifted = wanted_mass.roll(1, dims=0)  # a layer too far must not pass
    assert not torch.allclose(mass, shifted, atol=1e-2)


def test_bfloat16_is_as_near_to_eager_attention_as_bfloat16_is_to_float32(folder, exact, picture):
    vlm = load_model(str(folder), dtype="bfloat16")
    batch = encode(vlm, picture)
    eager_mass, eager_states = of_eager_attention(vlm, batch)
    true_mass, true_states = of_eager_attention(exact, batch)
    mass, states = captured(vlm, batch)
    noise = float((eager_mass - true_mass).abs().max())
    assert noise < 0.1
    assert float((mass - eager_mass).abs().max()) < 1.5 * noise
    assert relative(states, eager_states) < 1.5 * relative(eager_states, true_states)


def test_answers_are_those_of_transformers(exact, folder, picture):
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    batch = encode(exact, picture)
    ours = [
        exact.tokenizer.decode(ids, skip_special_tokens=True)
        for ids in generate(exact, batch, 24).ids
    ]
    for question, text in zip(QUESTIONS, ours, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        told = ids[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(told, skip_special_tokens=True) == text


def test_the_lens_ends_in_the_models_own_logits(exact, picture):
    batch = encode(exact, picture)
    with capture(exact, [hidden := HiddenStates()]):
        logits = prefill(exact, batch).logits[:, -1]
    Lens(exact).check(hidden.states[len(exact.parts.layers)][:, -1], logits)


def test_a_real_language_model_has_an_attention_sink_and_massive_activations(exact, picture):
    """Xiao et al., arXiv 2309.17453; Sun et al., arXiv 2402.17762: the first token draws much of
    the attention that looks nowhere, and its state is hundreds of times as long as others'."""
    batch = encode(exact, picture)
    mass, _ = captured(exact, batch)
    with capture(exact, [hidden := HiddenStates()]):
        prefill(exact, batch)
    middle = len(exact.parts.layers) // 2
    lengths = hidden.states[middle][0].norm(dim=-1)
    is_vision = batch.groups[0] == VISION
    is_first = batch.groups[0] == BOS
    assert lengths[is_first].item() > 20 * lengths[is_vision].mean().item()
    assert mass[middle, 0, :, BOS].mean() > 0.3


def test_it_answers_questions_about_scenes_it_never_saw(folder):
    vlm = load_model(str(folder), dtype="bfloat16", self_check=False)
    found = evaluation.evaluate(vlm, 3, seed=77, batch_size=24)
    for group in ("yes_no", "color", "shape", "left_right", "above_below"):
        assert found.right[group] >= 0.8 * found.asked[group] > 0, group

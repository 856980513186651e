"""Prompts of several pictures and several turns are what the model's own processor and forward make
of them, and each token belongs to the picture and the turn that it says."""

import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps

import common
from tests.random_models import gemma3, idefics3, internvl, llava, llava_next, mistral3, qwen_vl
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import extended
from vlmdiag.model.probes import Probe
from vlmdiag.model.selfcheck import own_inputs
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Chat, Sample, Turn
from vlmdiag.relevancy.gradients import trace
from vlmdiag.relevancy.methods import relevancy
from vlmdiag.scenes.scene import floor_scene, render

BUILDERS = llava.MODELS | qwen_vl.MODELS | llava_next.MODELS | idefics3.MODELS
BUILDERS |= internvl.MODELS | gemma3.MODELS | mistral3.MODELS
NAMES = [
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "llava_next",
    "llava_onevision",
    "idefics3",
    "internvl-qwen2",
    "gemma3-window",
    "mistral3",
    "pixtral",
]
FILES = tuple(Path(f"{name}.png") for name in "abc")
CHAT = Chat(
    FILES,
    (
        Turn("user", (None, None, "Which of them has a red circle?")),
        Turn("assistant", ("The second one.",)),
        Turn("user", (None, "And this one?")),
    ),
)
SHORT = Chat(FILES[:1], (Turn("user", (None, "Describe the image.")),))


@pytest.fixture(scope="module")
def pictures():
    """Three pictures of different shapes."""
    rng = random.Random(5)
    square, wide, tall = (render(floor_scene(rng, 3, square=shape)) for shape in (1, 0, 0))
    return square, wide, tall.rotate(90, expand=True)


@pytest.fixture(scope="module", params=NAMES)
def vlm(request, tmp_path_factory):
    folder = BUILDERS[request.param](tmp_path_factory.mktemp("chats") / request.param)
    return common.load_model(folder, self_check=False)


@pytest.fixture(scope="module")
def tiny():
    return common.load_model(Path(__file__).parents[1] / "checkpoints/tiny-llava")


def encoded(vlm, pictures, chats=(CHAT, SHORT)):
    samples = [Sample(str(i), FILES[0], "", chat=chat) for i, chat in enumerate(chats)]
    return vlm.encode(samples, [pictures[: len(chat.images)] for chat in chats])


def messages_of(vlm, chat):
    """The turns as transformers' chat messages, with the system prompt that LLaVA is asked with."""
    messages = []
    if vlm.family.default_system is not None:
        text = importlib.import_module("vlmdiag.families.llava").SYSTEM
        messages.append({"role": "system", "content": [{"type": "text", "text": text}]})
    for turn in chat.turns:
        content = [
            {"type": "text", "text": part} if part else {"type": "image"} for part in turn.parts
        ]
        messages.append({"role": turn.role, "content": content})
    return messages


class Rows(Probe):
    """The last row of each layer's attention at the prefill."""

    def __init__(self):
        self.rows = {}

    def attention(self, layer, row):
        self.rows[layer] = row.weights.float()


@pytest.mark.types
@torch.inference_mode()
def test_it_is_the_models_own_word(vlm, pictures):
    """Text, ids, logits and attention rows of transformers' own forward on its processor's output,
    in a batch of prompts of different lengths."""
    batch = encoded(vlm, pictures)
    with capture(vlm, [probe := Rows()]):
        logits = prefill(vlm, batch).logits[:, -1]
    for row, chat in enumerate((CHAT, SHORT)):
        text = vlm.processor.apply_chat_template(messages_of(vlm, chat), add_generation_prompt=True)
        assert batch.prompts[row] == text
        inputs = own_inputs(vlm, [*pictures[: len(chat.images)]], text)
        start = batch.input_ids.shape[1] - batch.lengths[row]
        assert inputs["input_ids"][0].tolist() == batch.input_ids[row, start:].tolist()
        vlm.parts.decoder.set_attn_implementation("eager")
        own = vlm.model(**inputs, output_attentions=True)
        vlm.parts.decoder.set_attn_implementation("sdpa")
        assert torch.allclose(own.logits[0, -1], logits[row], atol=1e-3, rtol=1e-3)
        for layer, rows in probe.rows.items():
            attention = own.attentions[layer][0, :, -1]
            assert torch.allclose(attention, rows[row, :, start:], atol=1e-5)
    other = encoded(vlm, (pictures[1], pictures[0], pictures[2]))
    assert not torch.allclose(prefill(vlm, other).logits[0, -1], logits[0], atol=1e-3, rtol=1e-3)


@pytest.mark.types
@torch.inference_mode()
def test_changing_a_picture_changes_the_tokens_of_its_number(vlm, pictures):
    batch = encoded(vlm, pictures)
    before = vlm.vision(batch).pooler_output[0]
    numbers = batch.numbers[0][batch.groups[0] == VISION]
    assert numbers.tolist() == sorted(numbers.tolist()) and set(numbers.tolist()) == {0, 1, 2}
    for number in range(3):
        changed = list(pictures)
        changed[number] = ImageOps.invert(changed[number])
        after = vlm.vision(encoded(vlm, tuple(changed))).pooler_output[0]
        moved = (after - before).abs().amax(-1) > 1e-4
        # newlines of rows are the same in every picture
        assert not moved[numbers != number].any() and moved[numbers == number].float().mean() > 0.8
        assert moved[(numbers + 1) % 3 == number].float().mean() < 0.2  # a mutant
    for grid, count, picture in zip(batch.grids, numbers.bincount().tolist(), pictures):
        assert len(grid.boxes) == count and grid.size == picture.size


@pytest.mark.types
def test_a_turns_tokens_are_its_words_and_marks(vlm, pictures):
    batch = encoded(vlm, pictures)
    for row, chat in enumerate((CHAT, SHORT)):
        turns, ids, groups = batch.turns[row], batch.input_ids[row], batch.groups[row]
        real = batch.attention_mask[row] == 1
        assert (turns[~real] == -1).all() and (batch.numbers[row][~real] == -1).all()
        in_order = turns[real].tolist()
        texts = [
            vlm.processor.apply_chat_template(messages_of(vlm, chat), add_generation_prompt=opens)
            for opens in (False, True)
        ]
        opens_the_answer = texts[0] != texts[1]  # Mistral's does not
        assert in_order == sorted(in_order)
        assert in_order[-1] == len(chat.turns) - (not opens_the_answer)
        for number, turn in enumerate(chat.turns):
            group = GROUPS.index("user" if turn.role == "user" else "generated")
            words = vlm.tokenizer.decode(ids[(turns == number) & (groups == group)])
            assert words.split() == turn.text.split()
        of_turn = [{0, 1}, set(), {2}] if row == 0 else [{0}]
        for number, wanted in enumerate(of_turn):
            found = set(batch.numbers[row][turns == number].tolist()) - {-1}
            assert found == wanted
        said = (groups == GROUPS.index("user")) | (groups == GROUPS.index("generated"))
        assert not said[turns == len(chat.turns)].any()


@pytest.mark.types
def test_relevancy_goes_on_to_each_pictures_own_patches(vlm, pictures):
    """A vision token depends on the tower's output at its sources and nowhere else."""
    if not vlm.parts.vision_blocks:
        pytest.skip("relevancy stops at the vision tokens")
    twice = Chat((FILES[1], FILES[0], FILES[0]), CHAT.turns)
    sample = Sample("0", FILES[0], "", chat=twice)
    batch = vlm.encode([sample], [(pictures[1], pictures[0], pictures[0])])
    run = trace(vlm, batch, [20, 21])
    numbers = batch.numbers[0, run.vision]
    sources = run.tower.sources
    for number in range(3):
        places = (numbers == number).nonzero()[:, 0]
        for token in places[:: max(1, len(places) // 4)].tolist():
            outputs = [block.output for block in run.tower.blocks]
            gradients = torch.autograd.grad(
                run.tower.pooled[token].square().sum(),
                outputs,
                retain_graph=True,
                allow_unused=True,
            )
            last = [gradient for gradient in gradients if gradient is not None]
            known = set(sources[token].tolist()) - {-1}
            if not last:  # a newline
                assert not known
                continue
            reached = last[-1].abs().amax(-1).flatten().nonzero()[:, 0].tolist()
            assert set(reached) <= known and len(known) <= max(1, 2 * len(reached))
    maps = relevancy(run, [0, 1])
    assert np.isfinite(maps.picture).all() and maps.picture.shape[-1] == len(numbers)


def test_an_answer_is_the_turn_behind_the_last(tiny, pictures):
    batch = encoded(tiny, pictures)
    longer = extended(batch, [5, 6])
    assert longer.turns[:, -2:].tolist() == [[3, 3], [1, 1]]
    assert (longer.numbers[:, -2:] == -1).all()
    assert longer.turns.shape == longer.numbers.shape == longer.input_ids.shape


def test_one_question_about_one_picture_is_encoded_alike(tiny, pictures):
    """As a chat and as the simple sample, typed special strings included."""
    for question in ("Why?", "Is <image> a tag </s> here?", "<image>\nWhy?"):
        chat = Chat(FILES[:1], (Turn("user", (None, question)),))
        simple = tiny.encode([Sample("0", FILES[0], question)], [pictures[0]])
        as_chat = encoded(tiny, pictures, [chat])
        assert simple.prompts == as_chat.prompts and simple.numbers is None
        for name in ("input_ids", "groups", "position_ids", "next_position"):
            assert torch.equal(getattr(simple, name), getattr(as_chat, name)), name


def test_special_strings_typed_in_any_turn_stay_text(tiny, pictures):
    said = ("See </s> and <image>?", "A <s>, USER: no", "<image> in <image> twice <image>")
    turns = [Turn("user", (None, said[0])), Turn("assistant", said[1:2]), Turn("user", (said[2],))]
    batch = encoded(tiny, pictures, [Chat(FILES[:1], tuple(turns))])
    assert int((batch.input_ids == tiny.image_token_id).sum()) == 144
    wanted = (said[0], said[1], "in <image> twice")  # at the edges it is the picture's placeholder
    for number, words in enumerate(wanted):
        group = GROUPS.index(("user", "generated", "user")[number])
        inside = (batch.turns[0] == number) & (batch.groups[0] == group)
        assert tiny.tokenizer.decode(batch.input_ids[0][inside]).strip() == words


def test_a_system_message_of_the_chat_is_the_system_prompt(tiny, pictures):
    own = encoded(tiny, pictures, [Chat(FILES[:1], SHORT.turns, system="Be brief.")])
    assert own.prompts[0].startswith("Be brief. USER:")
    system = own.input_ids[0][own.groups[0] == GROUPS.index("system")]
    assert tiny.tokenizer.decode(system).strip() == "Be brief."
    assert own.turns[0][own.groups[0] == GROUPS.index("system")].unique().tolist() == [-1]


def test_the_same_picture_twice_runs_the_tower_once(tiny, pictures):
    chat = Chat((FILES[0], FILES[0]), (Turn("user", (None, None, "Alike?")),))
    batch = tiny.encode([Sample("0", FILES[0], "", chat=chat)], [(pictures[0], pictures[0])])
    seen = []
    hook = tiny.parts.tower.register_forward_hook(
        lambda m, a, kw, o: seen.append(kw), with_kwargs=True
    )
    first, second = tiny.vision(batch).pooler_output[0].chunk(2)
    hook.remove()
    assert len(set(batch.pictures)) == 1 and len(seen) == 1
    assert torch.equal(first, second)


def test_a_model_without_a_chat_template_says_so(tiny, pictures):
    bare = common.load_model(tiny.path, self_check=False, prompt_template="{image} {question}:")
    with pytest.raises(UsageError, match="llava takes one question about one picture") as error:
        encoded(bare, pictures)
    assert "\n" not in str(error.value) and "--prompt_template" in str(error.value)


@pytest.mark.parametrize("name", ["molmo2", "nvila-lite"])
def test_a_processor_of_one_picture_is_named(name, tmp_path, pictures):
    module = importlib.import_module(f"tests.random_models.{name.split('-')[0]}")
    one = common.load_model(module.MODELS[name](tmp_path / name), self_check=False)
    with pytest.raises(UsageError, match=one.family.name) as error:
        encoded(one, pictures)
    assert "\n" not in str(error.value)

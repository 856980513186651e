"""Token groups come from ids and offsets of the real prompt: any question, special strings
included, any picture size."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
from tests.conftest import without_picture_at_the_edges
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS, PAD
from vlmdiag.model import processed
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample

NAMES = ["llava", "qwen"]
SPECIAL = [
    "<image>",
    "</s>",
    "<s>",
    "USER:",
    "ASSISTANT:",
    "<|image_pad|>",
    "<|im_end|>",
    "<pad>",
    "\n",
    "  ",
    "é",
    "✓",
    "\ue014",
]
questions = (
    st.lists(
        st.one_of(st.sampled_from(SPECIAL), st.text(alphabet="abc ?.<>|/\n0é", max_size=8)),
        min_size=1,
        max_size=6,
    )
    .map(" ".join)
    .filter(str.strip)
)


def one(vlm, question, size=(60, 50), **options):
    return vlm.encode(
        [Sample("0", None, question)], [Image.new("RGB", size, (90, 120, 60))], **options
    )


def text_of(vlm, batch, group):
    return vlm.tokenizer.decode(
        batch.input_ids[0][batch.groups[0] == GROUPS.index(group)], skip_special_tokens=False
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(question=questions)
def test_the_question_and_nothing_else_is_the_user_group(load, name, question):
    vlm = load(name)
    plain, batch = one(vlm, "Hi?"), one(vlm, question)
    for group in ("bos", "system", "vision", "image_markup"):
        assert torch.equal(
            batch.input_ids[0][batch.groups[0] == GROUPS.index(group)],
            plain.input_ids[0][plain.groups[0] == GROUPS.index(group)],
        ), group
    user = batch.input_ids[0][batch.groups[0] == GROUPS.index("user")].tolist()
    assert not set(user) & set(vlm.tokenizer.all_special_ids), (
        "special strings typed in a question stay text"
    )
    asked = without_picture_at_the_edges(question, vlm.processor.image_token)
    assert "".join(text_of(vlm, batch, "user").split()) == "".join(asked.split())
    assert (batch.groups != PAD).all()
    spans = batch.spans(0)
    assert sorted(
        i for parts in spans.values() for start, end in parts for i in range(start, end)
    ) == list(range(batch.lengths[0]))


def test_the_groups_of_a_known_prompt(load):
    vlm = load("llava")
    batch = one(vlm, "Is there a red circle?")
    assert batch.prompts[0].endswith(
        "USER: <image>\nIs there a red circle? ASSISTANT:"
    ) and batch.prompts[0].startswith("A chat between a curious human")
    assert text_of(vlm, batch, "system").startswith("A chat between") and text_of(
        vlm, batch, "system"
    ).endswith("questions.")
    assert text_of(vlm, batch, "user") == "Is there a red circle?"
    assert text_of(vlm, batch, "template").split() == ["USER:", "ASSISTANT:"]
    assert int((batch.groups == GROUPS.index("vision")).sum()) == vlm.model.config.image_seq_length
    assert batch.spans(0)["bos"] == [[0, 1]]


def test_the_markup_of_qwen_is_a_group_of_its_own(load):
    vlm = load("qwen")
    batch = one(vlm, "Is there a red circle?", size=(140, 84))
    assert text_of(vlm, batch, "image_markup") == "<|vision_start|><|vision_end|>"
    assert text_of(vlm, batch, "system") == "You are a helpful assistant."
    rows, columns = batch.grids[0].shape
    assert int((batch.groups == GROUPS.index("vision")).sum()) == rows * columns


@pytest.mark.parametrize("name", NAMES)
def test_stripping_leaves_no_system_token(load, name):
    vlm = load(name)
    batch = one(vlm, "Hi?", strip_system=True)
    assert "system" not in batch.spans(0)
    assert (
        prompt_for(vlm, "Hi?", strip_system=True)[1] is None
        and prompt_for(vlm, "Hi?")[1] is not None
    )


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_on_the_left_and_in_no_group(load, batch_of, name):
    vlm = load(name)
    batch = batch_of(vlm)
    for row, length in enumerate(batch.lengths):
        pad = batch.groups.shape[1] - length
        assert (batch.groups[row, :pad] == PAD).all() and (batch.groups[row, pad:] != PAD).all()
        assert batch.attention_mask[row].tolist() == [0] * pad + [1] * length
        alone = batch_of(vlm, (row,))
        assert torch.equal(alone.input_ids[0], batch.input_ids[row, pad:])
        assert torch.equal(alone.position_ids[..., 0, :], batch.position_ids[..., row, pad:])
        assert alone.next_position[0] == batch.next_position[row]
        assert alone.spans(0) == batch.spans(row)


def test_a_prompt_of_ones_own(folders):
    vlm = common.load_model(
        folders["llava"],
        prompt_template="{system}|{image}|{question}|END",
        system_prompt="Be brief.",
        self_check=False,
    )
    text, system, question = prompt_for(vlm, "Why?")
    assert (
        text == "Be brief.|<image>|Why?|END"
        and text[slice(*system)] == "Be brief."
        and text[slice(*question)] == "Why?"
    )
    batch = one(vlm, "Why?")
    assert "".join(text_of(vlm, batch, "user").split()) == "Why?"
    with pytest.raises(UsageError, match="no {question}"):
        common.load_model(folders["llava"], prompt_template="{image}", self_check=False)


def test_the_pad_aspect_shows_the_whole_picture(folders):
    vlm = common.load_model(folders["llava"], self_check=False)
    assert vlm.processor.image_processor.do_pad  # the tiny models pad, as LLaVA-1.5 was trained
    grid = one(vlm, "Hi?", size=(200, 100)).grids[0]
    assert grid.boxes[0].tolist() == pytest.approx([0, -50, 200 / 12, -50 + 200 / 12])
    vlm.processor.image_processor.do_pad = False
    grid = one(vlm, "Hi?", size=(200, 100)).grids[0]
    assert grid.boxes[0].tolist() == pytest.approx([50, 0, 50 + 100 / 12, 100 / 12])
    with pytest.raises(UsageError, match="--image_aspect pad"):
        common.load_model(folders["qwen"], image_aspect="pad", self_check=False)


@pytest.mark.parametrize("name", [*NAMES, "qwen3"])
def test_a_picture_is_processed_once_for_all_prompts_about_it(load, name, monkeypatch):
    vlm = load(name)
    made, kind = [], type(vlm.processor.image_processor)
    call = kind.__call__

    def noting(self, images, **options):
        made.append(1)
        return call(self, images, **options)

    pictures = [
        Image.effect_noise((70, 50), 90).convert("RGB"),
        Image.new("RGB", (70, 50), (90, 120, 60)),
    ]
    samples = [Sample(str(n), None, f"Is there a {word}?") for n, word in enumerate("abc")]
    alone = [vlm.encode([sample], [pictures[n % 2].copy()]) for n, sample in enumerate(samples)]
    monkeypatch.setattr(kind, "__call__", noting)
    together = [vlm.encode([sample], [pictures[n % 2]]) for n, sample in enumerate(samples)]
    assert len(made) == 2, "the third question is about the first picture"
    for ours, theirs in zip(together, alone):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert ours.pictures == theirs.pictures
        assert ours.image_inputs.keys() == theirs.image_inputs.keys()
        for part, value in ours.image_inputs.items():
            assert torch.equal(value, theirs.image_inputs[part])
    assert together[0].pictures != together[1].pictures
    pictures[0].putpixel((3, 4), (1, 2, 3))
    changed = vlm.encode(samples[:1], [pictures[0]])
    assert len(made) == 3 and changed.pictures != together[0].pictures
    monkeypatch.setattr(vlm.processor.image_processor, "image_mean", [0.1, 0.2, 0.3])
    other = vlm.encode(samples[:1], [pictures[0]])
    assert len(made) == 4 and other.pictures != changed.pictures


def test_what_is_known_of_a_picture_goes_with_it(load):
    vlm = load("llava")
    before = len(processed._kept)
    picture = Image.new("RGB", (70, 50))
    batch = vlm.encode([Sample("0", None, "a"), Sample("1", None, "b")], [picture, picture])
    assert len(processed._kept) == before + 1
    assert batch.pictures[0] == batch.pictures[1]
    del picture
    gc.collect()
    assert len(processed._kept) == before


def test_models_with_equal_processors_look_at_a_picture_once(load, folders, monkeypatch):
    first, second = load("llava"), common.load_model(folders["llava"], self_check=False)
    picture = Image.new("RGB", (70, 50), (90, 120, 60))
    ours = first.encode([Sample("0", None, "a")], [picture])
    kept = len(processed._kept)
    theirs = second.encode([Sample("0", None, "b")], [picture])
    assert len(processed._kept) == kept
    assert torch.equal(ours.image_inputs["pixel_values"], theirs.image_inputs["pixel_values"])
    monkeypatch.setattr(second.processor.image_processor, "image_mean", [0.1, 0.2, 0.3])
    other = second.encode([Sample("0", None, "b")], [picture])
    assert len(processed._kept) == kept + 1 and other.pictures != theirs.pictures


def test_other_options_and_other_processors_are_other_work():
    class Processor:
        def __init__(self):
            self.image_processor = self.process
            self.seen = []

        def process(self, images, **options):
            self.seen.append((images, options))
            return {"sizes": [1, 2], "options": options}

        def __call__(self, images, **options):
            inputs = processed.once(self).image_processor(images, **options)
            inputs["sizes"].clear()  # as processors take theirs apart
            return inputs

    picture, other = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3))
    first, second = Processor(), Processor()
    for _ in range(2):
        for images in (picture, [picture], [[picture], [other]], [picture, other]):
            for options in ({}, {"size": 3}):
                assert first(images, **options)["options"] == options
                assert second(images, **options)["sizes"] == []
    assert len(first.seen) == len(second.seen) == 8
    assert processed.once(first).image_processor([picture], size=3)["sizes"] == [1, 2]
    array = np.zeros((2, 2, 3))
    for _ in range(2):
        first([array])
    assert len(first.seen) == 10, "an array may have changed in its place"

"""Answers that a file gives to samples: which ids count, how image ids are written, and what is no
answer."""

import json
from functools import partial
from pathlib import Path

import pytest

from diagnostic_tools.run_coco_diagnostics import text_of_ids
from vlmdiag.cli import UsageError
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.limits import context_of
from vlmdiag.pictures.given import with_answers
from vlmdiag.pictures.samples import Sample


@pytest.fixture
def read(tmp_path):
    """read(entries, ids of images) -> what is given to the samples of these images."""

    def given(entries, image_ids=(1,), field="caption", **options):
        path = tmp_path / "given.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        samples = [Sample(str(id), Path("x.png"), "", extra={"image_id": id}) for id in image_ids]
        return [
            sample.given for sample in with_answers(samples, "--answers", path, field, **options)
        ]

    return given


def of_ids(ids):
    """A model with ten words, which it reads as digits."""
    return "".join(map(str, ids)) if max(ids) < 10 else None


def entry(**more):
    return [{"image_id": 1} | more]


def test_ids_count_where_the_model_reads_the_text_in_them(read):
    def one(**more):
        return read(entry(**more), text_of=of_ids)[0]

    assert one(generated_ids=[1, 2]) == one(generated_ids=[1, 2], caption="12") == (1, 2)
    assert one(generated_ids=[1, 2], caption="a cat") == "a cat"
    assert one(generated_ids=[1, 20], caption="a cat") == "a cat"
    assert one(generated_ids=[], caption="a cat") == one(caption="a cat") == "a cat"
    assert one(generated_ids=None, caption="a cat") == "a cat"
    # without a model that has ids they are one field more
    assert read(entry(answer="a cat", generated_ids="?"), field="answer") == ["a cat"]


@pytest.mark.parametrize("written", [1, 1.0, "1", "000000000001", "COCO_val2014_000000000001"])
def test_image_ids_are_read_however_they_are_written(read, written):
    entries = [{"image_id": written, "caption": "a"}, {"image_id": 2, "caption": "b"}]
    assert read(entries, (2, "000000000001", 1)) == ["b", "a", "a"]
    assert read("\n".join(map(json.dumps, entries))) == ["a"], "JSON lines"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (entry(), "entry 0 (image 1) has no caption"),
        (entry(caption=None), "has no caption"),
        (entry(caption=3), "is no text: 3"),
        (entry(caption=["a"]), "is no text: ['a']"),
        (entry(caption="a \ud800 b"), "is no text"),
        ('[{"image_id": 1, "caption": NaN}]', "is no text: nan"),
        (entry(caption="  "), "has an empty caption"),
        (entry(generated_ids=[]), "has no caption"),
        (entry(generated_ids=[1, 20]), "ids that the model does not have"),
        (entry(caption="a", generated_ids=["ab"]), "no list of token ids: ['ab']"),
        (entry(generated_ids="56"), "no list of token ids: '56'"),
        (entry(generated_ids=[5.7]), "no list of token ids"),
        (entry(generated_ids=[True]), "no list of token ids"),
        (entry(generated_ids=[-1]), "no list of token ids"),
        (entry(generated_ids={"a": 1}), "no list of token ids"),
        ('[{"image_id": 1, "generated_ids": [NaN]}]', "no list of token ids"),
        ('[{"image_id": 1, "generated_ids": [1e400]}]', "no list of token ids"),
        (entry(caption="a") + entry(caption="b"), "entry 1 has a second caption for image 1"),
        ([{"image_id": 2, "caption": "a"}], "no caption for 1 of 1 images that are measured"),
        ([{"image_id": True, "caption": "a"}], "an id was wanted"),
        ([{"image_id": [1], "caption": "a"}], "an id was wanted"),
        ([{"caption": "a"}], "entry 0 has no image_id"),
        (["a"], "entry 0 is a str"),
        ({"1": "a"}, "a list of objects was wanted"),
        ([], "the list is empty"),
        ("", "not readable JSON"),
    ],
)
def test_what_is_no_answer_is_said_in_one_line(read, entries, words):
    with pytest.raises(UsageError) as error:
        read(entries, text_of=of_ids)
    assert words in str(error.value) and str(error.value).startswith("--answers: ")
    assert "that are measured" in words or "image_id and caption" in str(error.value)


def test_the_same_answer_twice_and_an_empty_caption_are_none_of_these(read):
    assert read(entry(caption="a") * 2) == ["a"]
    assert read(entry(caption=""), may_be_empty=True) == [""]


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_model_reads_only_ids_that_it_can_say(load, name):
    vlm = load(name)
    text_of = partial(text_of_ids, vlm)
    ids = tuple(vlm.tokenizer("a red circle", add_special_tokens=False)["input_ids"])
    assert text_of(ids) == vlm.text(ids) == text_of((*ids, vlm.end_id))
    head = vlm.parts.lm_head.out_features
    assert text_of((*ids, head)) is None and text_of((10**9,)) is None
    unknown = [id for id in range(head) if vlm.tokenizer.convert_ids_to_tokens(id) is None]
    assert all(text_of((id,)) is None for id in unknown)


def test_an_id_as_it_is_written_comes_first(read):
    entries = [{"image_id": "1", "caption": "a"}, {"image_id": "01", "caption": "b"}]
    assert read(entries, ("01", "1")) == ["b", "a"]
    with pytest.raises(UsageError, match="no caption for 1 of 2 images"):
        read(entries, ("1", "001"))


def test_drafts_may_lack_images_but_not_all(read, capsys):
    entries = [{"image_id": 2, "caption": "a"}]
    assert read(entries, (1, 2), may_lack=True) == ["", "a"]
    assert "no caption for 1 of 2 images" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no caption for 2 of 2"):
        read(entries, (1, 3), may_lack=True)


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_special_strings_in_an_answer_are_text(load, pictures, name):
    """But for the one that ends an answer, at its end; an empty answer is that alone."""
    vlm = load(name)
    prompt = vlm.encode([Sample("0", None, "What is it?")], pictures[:1]).prompts[0]
    tokenizer = vlm.tokenizer
    end, of_picture = (
        tokenizer.convert_ids_to_tokens(id) for id in (vlm.end_id, vlm.image_token_id)
    )
    special = {vlm.end_id, vlm.image_token_id, *tokenizer.all_special_ids}
    plain = answer_ids(vlm, prompt, "a red circle")
    assert plain[-1] == vlm.end_id and not special & {*plain[:-1]}
    assert answer_ids(vlm, prompt, f"a red circle{end}") == plain
    for typed in (f"a {end} b", f"a {of_picture} b", f"{of_picture}", f"a {end}{of_picture}{end}"):
        ids = answer_ids(vlm, prompt, typed)
        assert ids[-1] == vlm.end_id and not special & {*ids[:-1]}
        words = typed.removesuffix(end) if typed.count(end) > 1 else typed
        assert vlm.text(ids).replace(" ", "") == words.replace(" ", "")
    assert answer_ids(vlm, prompt, "") == answer_ids(vlm, prompt, "  ") == [vlm.end_id]


def test_an_answer_that_the_context_has_no_room_for_fails(load, pictures):
    vlm = load("llava")
    batch = vlm.encode([Sample("0", None, "What is it?")], pictures[:1])
    room = context_of(vlm.model.config) - batch.lengths[0]
    assert int(generate(vlm, batch, 1, answers=[[20] * room]).steps[0]) == room
    with pytest.raises(ValueError, match=f"has {room + 1} tokens behind a prompt"):
        generate(vlm, batch, 1, answers=[[20] * (room + 1)])

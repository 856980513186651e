"""Folders in the form of published models, without weights: written from the tables of facts.py
with stand-in tokenizers, or copied from the folder that PUBLISHED_FILES names."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig

import common
from tests.published.facts import MODELS
from vlmdiag.model import configs, loading

PUBLISHED = os.environ.get("PUBLISHED_FILES")
# what a folder of PUBLISHED_FILES lacks and another one has
BORROWED = {
    "Qwen2.5-VL": ("Qwen2-VL", "vocab.json", "merges.txt"),
    "Qwen3-VL": ("Qwen2-VL", "vocab.json", "merges.txt"),
    "Molmo-7B-D-0924": ("Qwen2-VL", "merges.txt"),
    "instructblip-vicuna-7b": ("llava-1.5-7b-hf", "tokenizer.json"),
    "llava-phi-3-mini-hf": ("llava-1.5-7b-hf", "tokenizer.json"),
}
REAL_TOKENIZERS = {"llava-1.5-7b-hf", "Qwen2-VL", *BORROWED}


class VLM(common.VLM):
    """A model without weights; its inputs are made on the CPU."""

    device = torch.device("cpu")


def published_file(*parts):
    """A path in PUBLISHED_FILES; the test is skipped where it is not at hand."""
    if not PUBLISHED:
        pytest.skip("PUBLISHED_FILES names no folder of published files")
    path = Path(PUBLISHED, *parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not in PUBLISHED_FILES")
    return path


def write_json(file, content):
    file.write_text(json.dumps(content))


def added(special):
    """Special tokens as tokenizer.json lists them."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": id, "content": token, "special": True, **flags} for token, id in special.items()]


def beginning_with(token, special):
    """tokenizer.json's step that writes a BOS before each text."""
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, sequence],
        "pair": [piece, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [special[token]], "tokens": [token]}},
    }


def write_stand_in(folder, facts):
    """tokenizer.json of bytes, with the published special ids and a filler at every other id."""
    taken = set(facts.special.values())
    free = (id for id in itertools.count() if id not in taken)
    vocab = {char: next(free) for char in sorted(ByteLevel.alphabet())}
    vocab |= {f"filler{id}": id for id in itertools.takewhile(max(taken).__gt__, free)}
    bos = facts.tokenizer.get("bos_token")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(facts.special),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab | facts.special, "merges": []},
    }
    if facts.tokenizer.get("add_bos_token"):
        tokenizer["post_processor"] = beginning_with(bos, facts.special)
    write_json(folder / "tokenizer.json", tokenizer)
    own = {"tokenizer_class": "PreTrainedTokenizerFast", **facts.tokenizer}
    write_json(folder / "tokenizer_config.json", own)


def write_bert(folder):
    """A small stand-in for the tokenizer of InstructBLIP's Q-Former."""
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz?"
    (folder / "vocab.txt").write_text(
        "\n".join([*special, *letters, *(f"##{letter}" for letter in letters)])
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})


def from_table(folder, facts):
    """A model's folder, written from its facts."""
    folder.mkdir(parents=True)
    files = {
        "config.json": facts.config,
        "preprocessor_config.json": facts.images,
        "processor_config.json": facts.processor,
        "generation_config.json": facts.generation,
        "chat_template.json": {"chat_template": facts.template} if facts.template else {},
    }
    for name, content in files.items():
        if content:
            write_json(folder / name, content)
    write_stand_in(folder, facts)
    return folder


def from_files(folder, name):
    """A model's folder, of the published files; with a stand-in where they have no tokenizer."""
    published = published_file(name)
    facts = MODELS[name]
    if name in REAL_TOKENIZERS:
        folder.mkdir(parents=True)
    else:
        from_table(folder, facts)
    for file in published.iterdir():
        if file.name != "model.safetensors.index.json":  # the weights it lists are not there
            shutil.copyfile(file, folder / file.name)
    owner, *files = BORROWED.get(name, ("",))
    for file in files:
        shutil.copyfile(published_file(owner, file), folder / file)
    if "tokenizer.json" in files:  # Llama's, with the tokens that this model adds
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        names = {id: token for token, id in facts.special.items()}
        gap = set(range(32000, max(names))) - set(
            names
        )  # ids count on where a file leaves some out
        names |= {id: f"filler{id}" for id in gap}
        tokenizer["added_tokens"] = added({names[id]: id for id in sorted(names)})
        bos = facts.tokenizer["bos_token"]
        tokenizer["post_processor"] = beginning_with(bos, facts.special)
        write_json(folder / "tokenizer.json", tokenizer)
    return folder


def without_weights(folder, name):
    """The model of a folder as its family loads it, on the meta device."""
    facts = MODELS[name]
    if facts.family == "molmo":  # its weights are read before the model is made
        save_file({}, folder / "model.safetensors")
    if facts.family.startswith("instructblip"):
        write_bert(folder / "qformer_tokenizer")
    config, family = configs.read_config(folder)
    with loading.without_weights():
        model, processor = loading.load_family(family, str(folder), config, dtype=torch.float16)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return VLM(model, processor, family, str(folder), {})


def parameters(model):
    """How many numbers a model has; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())

"""The config of a folder or hub id, the family that describes it, and whether its numbers hold
together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmdiag.cli import UsageError
from vlmdiag.families import (
    family_of_file,
    find_family,
    generic,
    known_types,
    read_folder,
    variant_of,
)
from vlmdiag.families.folders import form_of, layout_of, read_object, refuse_no_folder
from vlmdiag.model.adapters import Sources
from vlmdiag.model.errors import as_usage_error
from vlmdiag.types import Record

if TYPE_CHECKING:
    from vlmdiag.families import Family


def read_config(
    path: str | Path, trust_remote_code: bool = False, family_file: str | Path | None = None
) -> tuple[PreTrainedConfig, Family]:
    """A model's config and its family, that of family_file where one is given; UsageError in one
    line where there is none."""
    refuse_no_folder(path)
    own = family_of_file(Path(family_file).resolve()) if family_file else None
    what = "the config cannot be read"
    with as_usage_error(path, what, lambda: form_of(path)):
        raw = _read_raw(path, own)
    with as_usage_error(path, what):
        check_raw(path, raw)
        generation = Path(path) / "generation_config.json"
        if generation.exists():  # transformers passes over one that it cannot read
            read_object(generation)
    known = raw.get("model_type") in CONFIG_MAPPING_NAMES
    advice = "" if known else f"; known types: {', '.join(known_types())}"
    with as_usage_error(path, what, lambda: layout_of(raw, trust_remote_code), advice):
        if own is not None:
            family = variant_of(own, raw)
        else:
            family = find_family(raw) or generic.FAMILY
        if family.read_config is not None:
            config = family.read_config(str(path), raw)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if family.read_config is None:
        with as_usage_error(path, what):
            check_config(path, raw, config)
    # A kernel that was chosen where the config was written, such as FlashAttention, may be missing
    # here, and attention is computed by vlmdiag.model.attention anyway.
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation = None
    return config, family


def config_of(
    sources: Sources, trust_remote_code: bool = False, family_file: str | Path | None = None
) -> tuple[PreTrainedConfig, Family, Record]:
    """Config and family of what sources_of found, and the config.json of LLaVA's own LoRA training,
    {} where there is none: that describes the whole model where its base is a plain Llama or in
    the same layout, and the base's config describes all other ones."""
    folder = sources.adapter
    try:
        config, family = read_config(sources.base, trust_remote_code, family_file)
    except UsageError as error:
        if folder is None or str(folder) == sources.base:
            raise
        raise UsageError(
            f"{folder} is an adapter, and its base cannot be read: {error}; give --base_model"
        ) from error
    if folder is None or str(folder) == sources.base or not (folder / "config.json").exists():
        return config, family, {}
    adapted, of_adapter = read_config(folder)
    if not of_adapter.trained:
        return config, family, {}
    if family.name in (of_adapter.name, generic.FAMILY.name):
        return adapted, of_adapter, adapted.original_layout
    return config, family, adapted.original_layout


def _read_raw(path: str | Path, own: Family | None) -> Record:
    """What config.json says, or a family makes of a folder without one."""
    if not os.path.isdir(path) or (Path(path) / "config.json").exists():
        return PreTrainedConfig.get_config_dict(path)[0]
    raw: Record | None = None
    if own is None:
        raw = read_folder(path)
    elif own.reads is not None:
        raw = own.reads(str(path))
    if raw is None:
        form = form_of(path)
        because = f"; this is {form}" if form else ""
        raise UsageError(f"{path}: no config.json in this folder, so it is no model{because}")
    return raw


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "patch_size",
    "image_size",
)


def check_raw(path: str | Path, raw: Record) -> None:
    """UsageError for what no config.json can say, where transformers would take its default without
    a word, or fail far from the cause."""
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: config.json holds a {type(raw).__name__}, wanted is an object")
    for name in ("text_config", "vision_config", None):
        part = raw if name is None else raw.get(name, {})
        if part is None and raw.get("model_type") not in CONFIG_MAPPING_NAMES:
            continue  # a layout of its authors' own, whose family knows the default
        if not isinstance(part, dict):
            said = json.dumps(part)[:60]
            raise UsageError(f"{path}: config.json: {name} is {said}, wanted is an object")
        for size in SIZES:
            value = part.get(size)
            where = size if name is None else f"{name}.{size}"
            if isinstance(value, (int, float)) and value < 1:
                raise UsageError(f"{path}: config.json: {where} is {value}, wanted is 1 or more")


def check_config(path: str | Path, raw: Record, config: PreTrainedConfig) -> None:
    """UsageError for a config whose parts do not fit each other, or that leaves out what it is
    to describe: transformers would then build a model of 7B parameters."""
    has_text = isinstance(raw.get("text_config"), dict) or set(SIZES) & set(raw)
    if "text_config" in getattr(config, "sub_configs", {}) and not has_text:
        raise UsageError(f"{path}: config.json has no text_config, so the decoder is not described")
    token = getattr(config, "image_token_id", None)
    if isinstance(token, int) and token < 0:
        raise UsageError(f"{path}: config.json: the image token's id is {token}, no id of a token")
    depth = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    layers = getattr(config, "vision_feature_layer", None)
    for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
        if isinstance(layer, int) and isinstance(depth, int) and not -depth - 2 < layer <= depth:
            raise UsageError(
                f"{path}: config.json: vision_feature_layer is {layer}, the tower has {depth}"
                " layers"
            )


def refuse_larger_than(path: str, config: PreTrainedConfig) -> None:
    """ValueError where a config describes a far larger model than the folder's files can hold:
    transformers would make all of it before it says that the files do not fit."""
    folder = Path(path)
    files = []
    if folder.is_dir():
        files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    held = sum(file.stat().st_size for file in files)
    if held < 2**16:  # none, or pointers in their place: transformers says so at once
        return
    for part in (config.get_text_config(), getattr(config, "vision_config", config)):
        width, inner, layers, rows = (
            getattr(part, name, None)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        )
        if not (isinstance(width, int) and isinstance(inner, int) and isinstance(layers, int)):
            continue
        # at least; two bits a number are the fewest that are in use
        numbers = layers * width * (width + inner) + width * (rows if isinstance(rows, int) else 0)
        if numbers > 8 * held + 10**7:
            raise ValueError(
                f"config.json describes a {part.model_type} of {numbers:,} parameters or more, and"
                f" the weight files hold {held:,} bytes"
            )


def shorten_decoder(config: PreTrainedConfig, layers: int) -> None:
    """Keep only the first layers of the decoder in a config: for what only tower and connector
    compute (0), loading takes a tenth of the memory."""
    config.layers_kept = layers  # families.weights: parameters of the others have no place
    decoder = config.get_text_config()
    decoder.num_hidden_layers = layers
    if getattr(decoder, "layer_types", None) is not None:
        decoder.layer_types = decoder.layer_types[:layers]


KNOWN_TYPES = "; known types: {}; for another one write models/<family>.py (models/README.md)"

"""What a folder or hub id is that cannot be loaded as it is, and the step that is missing: steps of
a training, adapters, files of other programs, unfinished downloads, text-only models, the authors'
own layouts of models that are read in transformers' layout only."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError
from vlmdiag.families.files import is_hub_id, reason, weight_files
from vlmdiag.types import Fields, Record

LISTED = 5000  # names of a folder that are looked at
POINTER = b"version https://git-lfs"

# files that hold a JSON object
JSON = re.compile(
    r".*config\.json|(tokenizer|special_tokens_map|added_tokens|chat_template|vocab)\.json"
    r"|.*\.index\.json"
)
# weights under the names that transformers gives them
WEIGHTS = re.compile(r"(model|pytorch_model)([.-][\w.-]+)?\.(safetensors|bin)(\.index\.json)?")
# (a name that is among the files, what the folder then is), the first that fits; these folders have
# no weights of those names
FORMS = (
    (
        r"adapter_config\.json",
        "an adapter, whose base is wanted too: give --base_model, or merge the adapter first",
    ),
    (
        r"adapter_model\..*",
        "an adapter without its adapter_config.json, which says how it is applied: copy that too",
    ),
    (
        r"(.*/)?(zero_to_fp32\.py|global_step\d+/?|.*_(model|optim)_states\.pt)",
        "a step of a DeepSpeed training: join its parts with `python zero_to_fp32.py . OUT` and"
        " copy config and tokenizer to OUT",
    ),
    (
        r"(.*/)?(.*\.distcp|pytorch_model_fsdp.*)",
        "shards of an FSDP training: join them with `accelerate merge-weights`, with config and"
        " tokenizer beside them",
    ),
    (
        r"mm_projector\.bin|non_lora_trainables\.bin",
        "a projector only, from LLaVA's first stage of training: the weights of the language model"
        " are not in it",
    ),
    (
        r".*\.gguf",
        "GGUF, the format of llama.cpp: the checkpoint it was made from is wanted, in safetensors",
    ),
    (
        r"(.*/)?.*\.(onnx|h5|msgpack|mlpackage/?|tflite|engine|nemo)|openvino_.*\.xml",
        "a model for another program (ONNX, TensorFlow, Flax, OpenVINO, ...): a checkpoint of"
        " PyTorch in safetensors or .bin is wanted",
    ),
    (
        r"consolidated.*\.(pth|safetensors)",
        "weights in their authors' own layout (consolidated): the conversion to transformers is"
        " wanted, config.json and model.safetensors",
    ),
    (
        r"checkpoint-\d+/",
        "the folder of a training run: give one of the checkpoint-<step> folders in it",
    ),
    (
        r"snapshots/",
        "a folder of the hub's cache: give the folder in snapshots/, or the model's hub id",
    ),
    (r".*\.(incomplete|part|aria2|crdownload)", "an unfinished download: fetch it again"),
)

# model_type -> what it is, in its authors' layout
LAYOUTS = {
    "multi_modality": "DeepSeek-VL or Janus in the authors' layout (multi_modality): take the"
    " conversion, such as deepseek-community/Janus-Pro-1B or"
    " deepseek-community/deepseek-vl-1.3b-chat",
    "internvl_chat": "InternVL in the authors' layout (internvl_chat): take the conversion, whose"
    " name ends in -hf, such as OpenGVLab/InternVL3-1B-hf",
}


def refuse_no_folder(path: str | Path) -> None:
    """UsageError for a path that is a file, or that is meant as a folder and is none: no hub id, or
    one whose owner is a folder here and which the hub's cache does not have."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            gguf = file.read(4) == b"GGUF" or str(path).endswith(".gguf")
        what = "a file in GGUF, the format of llama.cpp" if gguf else "a file"
        raise UsageError(
            f"{path}: this is {what}, wanted is the folder of a checkpoint (config.json and"
            " weights in safetensors or .bin) or a hub id"
        )
    if Path(path).is_dir() and str(path):
        return
    parent = Path(path).parent
    if is_hub_id(str(path)) and str(path).count("/") == 1:
        cached = Path(HF_HUB_CACHE) / f"models--{str(path).replace('/', '--')}"
        if cached.is_dir() or not parent.is_dir():
            return
    siblings = [file for file in (parent, CHECKOUT / "checkpoints") if file.is_dir()]
    folders = [folder for place in siblings for folder in place.iterdir() if folder.is_dir()]
    names = {folder.name: os.path.relpath(folder) for folder in folders}
    nearest = [names[name] for name in difflib.get_close_matches(Path(path).name, names, 2)]
    advice = f", nearest: {', '.join(nearest)}" if nearest else ""
    raise UsageError(
        f"{str(path)!r}: no such folder{advice}; a hub id is owner/name, and has to be downloaded"
        " first where a folder has the owner's name (hf download owner/name)"
    )


def names_of(path: str | Path) -> list[str]:
    """Names in a folder and in its subfolders, those of folders with a slash behind; of a hub id as
    the cache or the hub has it, [] where neither does."""
    folder = Path(path)
    if not folder.is_dir():
        if not is_hub_id(str(path)):
            return []
        try:
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except (OSError, ValueError):
            with contextlib.suppress(Exception):  # no network, no such name, no access
                return list_repo_files(str(path))
            return []
    found = chain(folder.iterdir(), folder.glob("*/*"))
    return sorted(
        file.relative_to(folder).as_posix() + "/" * file.is_dir() for file in islice(found, LISTED)
    )


def form_of(path: str | Path) -> str | None:
    """What a folder or hub id is by its files; None for a whole checkpoint, or where it cannot be
    said."""
    names = names_of(path)
    if "model_index.json" in names:
        return "a pipeline of diffusers, which makes pictures: a model that reads them is wanted"
    if Path(path).is_dir():
        if not names:
            return "an empty folder"
        broken = broken_files(Path(path), names)
        if broken is not None:
            return broken
    if any(WEIGHTS.fullmatch(name) for name in names):
        return None
    for pattern, what in FORMS:
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return what
    if "config.json" in names:
        return "a config without weights: no model.safetensors, no pytorch_model.bin, no shards"
    inside = [name.split("/")[0] for name in names if re.fullmatch(r"[^/]+/config\.json", name)]
    return (
        f"a folder of folders: give the one of the model, such as {inside[0]}" if inside else None
    )


def broken_files(folder: Path, names: Sequence[str]) -> str | None:
    """What is wrong with files that are there by name only, or not what their names say: pointers,
    empty ones, missing shards, JSON that is none."""
    for name in names:
        file = folder / name
        if not file.is_file():
            continue
        size = file.stat().st_size
        if 0 < size < 1024 and file.read_bytes().startswith(POINTER):
            return f"{name} is a pointer of git-lfs, not the file itself: run `git lfs pull` there"
        if size == 0 and WEIGHTS.fullmatch(name):
            return f"{name} is empty: the copy or download is unfinished"
        if JSON.fullmatch(name):
            try:
                read_object(file)
            except ValueError as error:
                return str(error)
    try:
        weight_files(folder)
    except ValueError as error:
        return str(error) if "missing" in str(error) else None
    except (KeyError, TypeError, AttributeError):
        return "the index of the weight files has no weight_map from parameters to files"
    return None


def read_object(file: Path) -> Record:
    """The object of a JSON file; ValueError that names the file where it holds none."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not readable JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds a {type(content).__name__}, wanted is an object")
    return content


def layout_of(raw: Fields, trust_remote_code: bool = False) -> str | None:
    """What a config.json describes that is not read here; None where that is not known."""
    kind = str(raw.get("model_type"))
    if kind in LAYOUTS:
        return LAYOUTS[kind]
    if any(key in raw for key in ("llm_cfg", "vision_tower_cfg")):
        return (
            "VILA's layout: of it NVILA is read, with a Qwen2 decoder and a SigLIP tower, and not"
            " VILA-1.5 with a Llama"
        )
    if any(key in raw for key in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")):
        tiled = str(raw.get("image_aspect_ratio")).startswith("anyres")
        if tiled or str(raw.get("mm_patch_merge_type")).startswith("spatial"):
            return (
                "tiled LLaVA (1.6, OneVision) in the authors' layout: take the conversion, such as"
                " llava-hf/llava-v1.6-vicuna-7b-hf"
            )
        if re.fullmatch(r"llava_(?!llama)\w+", kind):
            return (
                f"LLaVA on another decoder than Llama in the authors' layout ({kind}): take a"
                " conversion, such as those of llava-hf"
            )
        return None
    if kind in ("llava_llama", "vila") and "LlavaLlamaModel" in (raw.get("architectures") or ()):
        return "VILA-1.5, which is not read; of VILA's layout NVILA is"
    if "auto_map" in raw and kind not in CONFIG_MAPPING_NAMES:
        return None if trust_remote_code else "it needs its own code: give --trust_remote_code"
    if kind not in CONFIG_MAPPING_NAMES or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return None
    writes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if writes or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or "text" in kind:
        return f"text only ({kind}), no vision tower"
    if "vision" in kind or "image_size" in raw:
        return f"a vision tower only ({kind}), no language model"
    return f"a model of type {kind}, which does not read a picture and write text"

"""Folders and weight files of published checkpoints: where they are, and their tensors."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

State = dict[str, Tensor]  # parameters by name
Rename = Callable[[str], str | None]  # a stored name -> ours, None for what is not wanted

FILES = ("*.json", "*.model", "*.safetensors", "*.bin")  # of one folder without subfolders


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def fetch(name: str, patterns: Iterable[str] = FILES) -> Path:
    """A folder with the files of a hub id, from the cache or the network."""
    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def folder_of(path: str, patterns: Iterable[str] = FILES) -> Path:
    """The checkpoint's folder, fetched where `path` is a hub id."""
    return Path(path) if Path(path).is_dir() else fetch(path, patterns)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before .bin; ValueError for what its index lists
    and the folder lacks."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(names)} weight files of {index.name} are missing in"
                    f" {folder}, such as {missing[0]}"
                )
            return [folder / name for name in names]
        if (folder / f"{stem}.{ending}").exists():
            return [folder / f"{stem}.{ending}"]
    raise ValueError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of several"
    )


def read_weights(folder: Path, rename: Rename) -> State:
    """{new name: tensor} of a folder's weight files, mapped from disk wherever that can be.
    ValueError where a file cannot be read."""
    state: State = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            state |= _read_safetensors(file, rename)
        else:
            state |= renamed(read_pickle(file), rename)
    return state


def renamed(state: State, rename: Rename) -> State:
    """A state dict under new names, without what is not wanted."""
    after: State = {}
    for key, tensor in state.items():
        name = rename(key)
        if name is not None:
            after[name] = tensor
    return after


def base_name(key: str) -> str:
    """A parameter's name in the files of the base, of what peft calls it."""
    return re.sub(r"^base_model\.(model\.)?", "", key)


def _read_safetensors(file: Path, rename: Rename) -> State:
    """{new name: tensor} of one file; only what is wanted is read."""
    state: State = {}
    try:
        with safe_open(file, "pt") as stored:
            names = stored.keys()
            for key in names:
                name = rename(key)
                if name is not None:
                    state[name] = stored.get_tensor(key)
    except (SafetensorError, RuntimeError) as error:
        raise _unreadable(file, error) from error
    return state


def read_pickle(file: Path) -> State:
    """The state dict of a .bin, .pt or .pth file, mapped from disk wherever that can be. Only
    tensors are unpickled. ValueError where it cannot be read."""
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is not readable ({reason(error)})")


def reason(error: Exception) -> str:
    """An error's message on one line, cut at 120 characters."""
    return " ".join(str(error).split())[:120]


def generation_settings(folder: Path) -> dict[str, object]:
    """What the folder's generation_config.json says; {} where there is none."""
    file = folder / "generation_config.json"
    return json.loads(file.read_text()) if file.exists() else {}

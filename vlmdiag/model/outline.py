"""A model without its weights: what config, tokenizer, processor and the headers of its weight
files say of it.

The checkpoint's small files are put into a temporary folder together with one pytorch_model.bin for
each folder of weights, whose tensors are on the meta device: names, shapes and types, no numbers.
The family loads that folder as it loads every other, so its own conversion of names and parameters,
and that of transformers, decides what is missing, has no place or another shape. Shapes come from
the headers of the files; from a hub id only these headers are fetched. Where there is an index
alone, names are compared and shapes are not.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import huggingface_hub
import tokenizers
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from vlmdiag.cli import UsageError
from vlmdiag.families import files
from vlmdiag.families.weights import checked
from vlmdiag.model import configs, loading
from vlmdiag.model.adapters import sources_of, with_own_processor
from vlmdiag.model.check import family_of
from vlmdiag.runs.disk import read_json
from vlmdiag.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

    from vlmdiag.families import Family
    from vlmdiag.families.contract import LoadOptions
    from vlmdiag.families.files import State

# of a hub id; custom code is only run where --trust_remote_code allows it
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.yaml", "*.py")
LAYOUTS = (("model", "safetensors"), ("pytorch_model", "bin"))
# Sides of a tensor whose shape is not known. Conversions part tensors in 2, by heads or by experts,
# which this number allows; no parameter is as long.
UNKNOWN = 2**7 * 3**2 * 5 * 7 * 11 * 13
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# of the HTTP library that the installed huggingface_hub works with: httpx, since 2.0 httpx2
_HTTP_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_OFFLINE = (OSError, ValueError, HfHubHTTPError, HFValidationError, _HTTP_ERROR)
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError)
# the loading info of a model that fits
NOTHING_AMISS: Record = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}
# what a tokenizer without its files raises
_NO_TOKENIZER = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
)


@dataclass
class Outline:
    """What can be said of a model without its weights.

    model: on the meta device, with input embeddings of no row on the CPU; None where its class
    could not be made. processor: None where it could not be made. stored: {"names", "named_only",
    "parameters" by type, "bytes"} of the files, None where no file says anything. Lists of names:
    missing (in no file), unexpected (without a place), misshapen. problems: lines, each of which
    would end load_model(); unknown: what cannot be said here.
    """

    path: str
    family: Family
    chosen: Record  # of check.family_of()
    model: PreTrainedModel | None = None
    processor: ProcessorMixin | None = None
    has_tokenizer: bool = True
    dtype: torch.dtype = torch.float32  # of the config
    parameters: int = 0
    index_bytes: int | None = None  # total_size of an index of weight files
    not_compared: str = ""  # why names and shapes of the files are not
    stored: Record | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


# --- names and shapes of files --------------------------------------------------------------------


def tensor(shape: Sequence[int], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor that has a shape and no numbers."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def header_of(file: Path) -> State:
    """The tensors of a weight file, on the meta device. UsageError where it cannot be read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
                return {
                    name: tensor(part.get_shape(), TYPES.get(part.get_dtype(), torch.uint8))
                    for name, part in slices.items()
                }
        try:
            loaded = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            loaded = torch.load(file, map_location="meta", weights_only=True)
        loaded = loaded.get("model", loaded)
        return {name: value.to("meta") for name, value in loaded.items() if torch.is_tensor(value)}
    except _UNREADABLE as error:
        raise UsageError(f"{file} is not readable ({files.reason(error)})") from error


def tensors_of(folder: Path) -> State | None:
    """The tensors of a folder's weight files, those of absent files of its index of UNKNOWN sides;
    None where it has neither files nor an index."""
    for stem, ending in LAYOUTS:
        index = folder / f"{stem}.{ending}.index.json"
        single = folder / f"{stem}.{ending}"
        if index.exists():
            places: dict[str, str] = read_json(index).get("weight_map") or {}
            state = {
                name: tensor((UNKNOWN, UNKNOWN))
                for name, file in places.items()
                if not (folder / file).exists()
            }
            for name in sorted(set(places.values())):
                if (folder / name).exists():
                    state |= header_of(folder / name)
            return state
        if single.exists():
            return header_of(single)
    return None


def headers_of_hub(name: str) -> dict[str, State]:
    """{folder in the repository: its tensors} by the headers of a hub id's safetensors files, {}
    where it has none."""
    try:
        of_files = huggingface_hub.get_safetensors_metadata(name).files_metadata
    except NotASafetensorsRepoError:  # at its root, that is
        api = huggingface_hub.HfApi()
        names = [file for file in api.list_repo_files(name) if file.endswith(".safetensors")]
        of_files = {file: api.parse_safetensors_file_metadata(name, file) for file in names}
    states: dict[str, State] = {}
    for file, header in of_files.items():
        state = states.setdefault(str(Path(file).parent), {})
        for key, found in header.tensors.items():
            state[key] = tensor(found.shape, TYPES.get(found.dtype, torch.uint8))
    return states


def mirrored(path: str, place: Path) -> tuple[Path, State]:
    """A folder within `place` that has the small files of a folder or hub id, and its weights as
    tensors without numbers; and these tensors by "folder/name". UsageError where a hub id cannot be
    read."""
    of_hub: dict[str, State] = {}
    if Path(path).is_dir():
        root = Path(path).absolute()
    else:
        try:
            root = Path(huggingface_hub.snapshot_download(path, allow_patterns=list(SMALL)))
            fetched = tensors_of(root)  # of a snapshot that was fetched before
            if fetched is None or any(UNKNOWN in value.shape for value in fetched.values()):
                of_hub = headers_of_hub(path)
        except _OFFLINE as error:
            raise UsageError(
                f"{path}: neither a folder nor a hub id that can be read here"
                f" ({files.reason(error)})"
            ) from error
    top = Path(tempfile.mkdtemp(dir=place)) / root.name
    if Path(path).is_dir():  # a tower or a tokenizer may lie beside the checkpoint
        for beside in root.parent.iterdir():
            if beside.is_dir() and beside != root:
                (top.parent / beside.name).symlink_to(beside)
    found: State = {}
    for folder, inner, names in os.walk(root):
        # caches, and what a training left
        inner[:] = [name for name in inner if not name.startswith((".", "checkpoint-"))]
        here = Path(folder)
        there = top / here.relative_to(root)
        there.mkdir(parents=True, exist_ok=True)
        relative = str(here.relative_to(root))
        state = of_hub.get(relative)
        if state is None:
            state = tensors_of(here)
        of_pickles: State = {}
        for name in names if state is None else ():
            if name.endswith((".pt", ".pth")):  # read as they are
                of_pickles |= header_of(here / name)
        known = of_pickles if state is None else state
        found |= {f"{relative}/{name}": value for name, value in known.items()}
        for name in names:
            if not _is_of_weights(name):
                (there / name).symlink_to((here / name).resolve())
        if "config.json" in names:  # a family may want its file, be it empty
            torch.save(state or {}, there / "pytorch_model.bin")
    return top, found


def _is_of_weights(name: str) -> bool:
    """Whether a file is what tensors_of() reads; other pickles, such as a projector's, are not."""
    is_index = name.endswith(("safetensors.index.json", "bin.index.json"))
    return is_index or name.endswith(".safetensors") or name.startswith("pytorch_model")


# --- the family's loading, on these ---------------------------------------------------------------


def outlined(
    path: str,
    trust_remote_code: bool = False,
    family_file: str | None = None,
    vision_tower_path: str | None = None,
    conv_mode: str | None = None,
    base_model: str | None = None,
) -> Outline:
    """What can be said of a model without its weights; of an adapter, of its base. UsageError where
    its config cannot be read."""
    sources = sources_of(path, base_model, to_merge=False)
    if sources.adapter is not None and sources.base != path:
        is_local = Path(sources.base).is_dir()
        with with_own_processor(sources) if is_local else nullcontext(sources.base) as whole:
            found = outlined(whole, trust_remote_code, family_file, vision_tower_path, conv_mode)
        found.path = path
        found.problems = [line.replace(whole, sources.base) for line in found.problems]
        if not is_local:
            found.unknown.append("whether tokenizer and template of the adapter are others")
        found.unknown.append(f"whether the adapter {path} fits its base {sources.base}")
        return found
    with tempfile.TemporaryDirectory() as place:
        folder, tensors = mirrored(path, Path(place))
        try:
            config, family = configs.read_config(folder, trust_remote_code, family_file)
        except UsageError as error:
            raise UsageError(str(error).replace(str(folder), path)) from error
        dtype = getattr(config, "dtype", None) or torch.float32
        options: LoadOptions = {
            "dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            "vision_tower_path": vision_tower_path,
            "conv_mode": conv_mode,
            "trust_remote_code": trust_remote_code,
        }
        start = Outline(
            path=path,
            family=family,
            chosen=family_of(family, str(folder), family_file),
            dtype=options["dtype"],
            stored=stored_of(tensors),
            index_bytes=index_bytes(Path(path)),
        )
        if start.stored is None:
            start.not_compared = "there is no weight file and no index here"
        found = filled(start, folder, config, options)
        if found.model is None and start.stored is not None and start.stored["named_only"]:
            for file in folder.rglob("pytorch_model.bin"):
                torch.save({}, file)
            start.not_compared = "its conversion wants shapes, and only names are known here"
            found = filled(start, folder, config, options)
    if found.model is not None:
        # where a prompt's ids go, which have no place on the meta device
        found.model.get_input_embeddings().weight = nn.Parameter(
            torch.empty(0, dtype=found.model.get_input_embeddings().weight.dtype)
        )
    return found


def filled(start: Outline, folder: Path, config: PreTrainedConfig, options: LoadOptions) -> Outline:
    """A copy of `start` with model and processor of the family's own loading, and what it said.
    folder: of mirrored()."""
    found = copy.deepcopy(start)
    try:
        with comparing(found, folder.parent):
            _, found.processor = loading.load_family(
                found.family, str(folder), copy.deepcopy(config), **options
            )
    except (UsageError, IndexError, TypeError) as error:
        line = str(error).replace(str(folder), found.path)
        line = re.sub(r"^.*? cannot be loaded[^:]*: ", "", line)  # what it is of is said above
        if found.model is not None:
            line = f"its processor cannot be made ({line.split('. ')[0]})"
        # without these it may fail for that reason, which is known
        if found.has_tokenizer and (found.stored or found.model is not None):
            found.problems.append(line)
        elif found.model is None:
            found.unknown.append(f"its parameters and its prompt: {line}")
    if found.processor is not None and found.has_tokenizer:
        check_vocabulary(found)
    if found.model is not None and found.not_compared:
        found.unknown.append(f"whether its weights fit: {found.not_compared}")
    return found


def index_bytes(folder: Path) -> int | None:
    """total_size of the index of a folder's weight files, None where there is none."""
    for stem, ending in LAYOUTS:
        index = folder / f"{stem}.{ending}.index.json"
        if index.exists():
            size = (read_json(index).get("metadata") or {}).get("total_size")
            return None if size is None else int(size)
    return None


def check_vocabulary(found: Outline) -> None:
    """Say so where a tokenizer was made without its vocabulary."""
    assert found.processor is not None
    if loading.has_no_vocabulary(found.processor.tokenizer):
        found.has_tokenizer = False
        found.problems.append(loading.NO_VOCABULARY)


@contextlib.contextmanager
def comparing(found: Outline, place: Path) -> Iterator[None]:
    """Within the context from_pretrained() makes models on the meta device and tells `found` how
    the names and shapes of the files fit; a tokenizer that cannot be read is an empty one; of
    further hub ids (a vision tower's) the small files are fetched."""
    read_tokenizer = AutoTokenizer.from_pretrained
    read_model = PreTrainedModel.__dict__["from_pretrained"].__func__

    def compare(
        cls: type[PreTrainedModel],
        path: str | None = None,
        /,
        *_: object,
        config: PreTrainedConfig,
        state_dict: State | None = None,
        dtype: torch.dtype | None = None,
        **__: object,
    ) -> object:
        state = tensors_of(Path(path)) if path is not None else state_dict
        found.model = fitted(found, functools.partial(read_model, cls), config, state, dtype)
        found.parameters = sum(weight.numel() for weight in found.model.parameters())
        with contextlib.suppress(OSError):
            if path is not None:
                found.model.generation_config = GenerationConfig.from_pretrained(path)
        return found.model, NOTHING_AMISS

    def tokenizer_of(*args: object, **options: object) -> PreTrainedTokenizerBase:
        try:
            return read_tokenizer(*args, **options)
        except _NO_TOKENIZER as error:
            if found.has_tokenizer:
                found.problems.append(f"its tokenizer cannot be read ({files.reason(error)})")
            found.has_tokenizer = False
            return PreTrainedTokenizerFast(
                tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token="</s>"
            )

    def small_files(name: str, **_: object) -> str:
        try:
            return str(mirrored(name, place)[0])
        except UsageError as error:  # the family says what it needs it for
            raise OSError(str(error)) from error

    with (
        patch.object(PreTrainedModel, "from_pretrained", classmethod(compare)),
        patch.object(AutoTokenizer, "from_pretrained", tokenizer_of),
        patch.object(files, "snapshot_download", small_files),
    ):
        yield


def fitted(
    found: Outline,
    read: Callable[..., tuple[PreTrainedModel, Record]],
    config: PreTrainedConfig,
    state: State | None,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model of read(), a class's from_pretrained(), with the tensors of `state` on the meta
    device; how they fit goes into `found`."""
    config = copy.deepcopy(config)
    packed = getattr(config, "quantization_config", None)
    state = state or {}
    if packed is not None:
        del config.quantization_config
        method = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        found.not_compared = f"they are stored quantised ({method}), packed in other shapes"
    given = {} if found.not_compared else state
    model, info = read(
        None,
        config=config,
        state_dict={name: value.to("meta") for name, value in given.items()},
        dtype=dtype,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if given:
        compare_with(found, model, info)
    # a file that holds both of two tied parameters is believed to hold the same twice
    model.tie_weights()
    return model


def stored_of(state: State) -> Record | None:
    """{names, named_only, parameters {type: count}, bytes} of the tensors of files, None for none.
    named_only: how many have no known shape; they count nowhere else."""
    if not state:
        return None
    shaped = [value for value in state.values() if UNKNOWN not in value.shape]
    parameters: Counter[str] = Counter()
    for value in shaped:
        parameters[str(value.dtype).removeprefix("torch.")] += value.numel()
    return {
        "names": len(state),
        "named_only": len(state) - len(shaped),
        "parameters": dict(parameters),
        "bytes": sum(value.numel() * value.element_size() for value in shaped),
    }


def compare_with(found: Outline, model: PreTrainedModel, info: Record) -> None:
    """Put into `found` what loading said of names and shapes, and whether the family refuses it."""
    # what is made of a tensor of unknown shape has long sides too
    misshapen = [
        (name, stored, wanted)
        for name, stored, wanted in info["mismatched_keys"]
        if max(stored, default=0) < UNKNOWN // 16
    ]
    found.missing = sorted(info["missing_keys"])
    found.unexpected = sorted(info["unexpected_keys"])
    found.misshapen = [
        f"{name} is {tuple(stored)} in the file, {tuple(wanted)} in the model"
        for name, stored, wanted in sorted(misshapen)
    ]
    try:
        checked((model, info | {"mismatched_keys": misshapen}))
    except ValueError as error:
        found.problems.append(f"its weights do not fit: {error}")

"""Which model a folder or hub id holds, how its weights are rounded, and what tells it from
another."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from vlmdiag.cli import UsageError
from vlmdiag.families import (
    family_of_file,
    find_family,
    generic,
    known_types,
    read_folder,
    variant_of,
)
from vlmdiag.runs.rundirs import slug
from vlmdiag.types import Record

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from typing_extensions import Unpack

    from vlmdiag.families import Family
    from vlmdiag.families.contract import LoadOptions
    from vlmdiag.types import VLM

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_of(name: str | None) -> torch.device:
    """The device of --device; without a name a GPU where there is one. UsageError where it is not
    there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU is visible here; use --device cpu")
    return device


def dtype_of(
    name: str, quantize_type: str | None, device: torch.device, config: PreTrainedConfig
) -> torch.dtype:
    """The dtype of --dtype and --quantize_type; auto: float32 on a CPU, else the checkpoint's."""
    if quantize_type == "fp16":
        return torch.float16
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return getattr(config, "dtype", None) or torch.float16


def shorten_decoder(config: PreTrainedConfig, layers: int) -> None:
    """Keep only the first layers of the decoder in a config: for what only tower and connector
    compute (0), loading takes a tenth of the memory."""
    config.layers_kept = layers  # families.checked: parameters of the others have no place
    decoder = config.get_text_config()
    decoder.num_hidden_layers = layers
    if getattr(decoder, "layer_types", None) is not None:
        decoder.layer_types = decoder.layer_types[:layers]


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within the context transformers' from_pretrained() makes models on the meta device and reads
    no weight: a family's own loading then gives its processor, and the model's shapes."""
    read = PreTrainedModel.__dict__["from_pretrained"]

    def empty(
        cls: Callable[..., PreTrainedModel], /, *_: object, config: PreTrainedConfig, **__: object
    ) -> object:
        with torch.device("meta"):
            nothing_missing = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}
            return cls(config), nothing_missing

    PreTrainedModel.from_pretrained = classmethod(empty)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = read


def load_family(
    family: Family, path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor by the family's own loader; UsageError in one line where it fails."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        return family.load(path, config, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        ImportError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:400]
        known = ""
        if family.name == "generic":
            known = (
                f"; known types: {', '.join(known_types())}; for another one write"
                " models/<family>.py (README, 'your own model')"
            )
        raise UsageError(
            f"{path} (type {config.model_type!r}) cannot be loaded: {reason}{known}"
        ) from error


def pad_to_square(vlm: VLM) -> None:
    """--image_aspect pad. UsageError where the image processor cannot."""
    image_processor = vlm.processor.image_processor
    if not hasattr(image_processor, "do_pad") or "square-pad" not in vlm.family.has:
        raise UsageError(
            f"{vlm.path}: --image_aspect pad works for LLaVA-type image processors only"
        )
    image_processor.do_pad = True


def quantization(kind: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' quantization config for --quantize_type, None for fp16 and None.

    Products of 4-bit weights are made in dtype. Linear layers of the decoder are quantised and
    nothing else: tower, connector and LM head stay as they are. UsageError without bitsandbytes.
    """
    if kind not in ("4bit", "int8"):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--quantize_type {kind} needs bitsandbytes (pip install bitsandbytes); --dtype float16"
            " does without"
        )
    # It says at every int8 product that float32 becomes float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    not_quantised = [r"(?!.*\b(language_model|text_model)\.).*", "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=not_quantised)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=not_quantised
    )


def _quantised(module: nn.Module) -> list[nn.Module]:
    """The layers of bitsandbytes in a module."""
    return [
        layer for layer in module.modules() if type(layer).__module__.startswith("bitsandbytes.")
    ]


def check_quantized(vlm: VLM) -> None:
    """UsageError where no linear layer of the decoder was quantised."""
    if not _quantised(vlm.parts.decoder):
        raise UsageError(
            f"{vlm.path}: --quantize_type 4bit and int8 find no linear layer in"
            f" {type(vlm.parts.decoder).__name__}; --dtype float16 does without"
        )
    for layer in _quantised(vlm.model):
        # That kernel has no gradient, and packs the weights for good at the first pass.
        setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010 -- a plain attribute


def read_config(
    path: str | Path, trust_remote_code: bool = False, family_file: str | Path | None = None
) -> tuple[PreTrainedConfig, Family]:
    """A model's config and its family, that of family_file where one is given; UsageError in one
    line where there is none."""
    raw: Record | None = None
    own = family_of_file(Path(family_file).resolve()) if family_file else None
    is_folder = os.path.isdir(path)
    if is_folder and not (Path(path) / "config.json").exists():
        try:
            if own is None:
                raw = read_folder(path)
            elif own.reads is not None:
                raw = own.reads(str(path))
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        if raw is None:
            raise UsageError(f"{path}: no config.json in this folder, so it is no model")
    looks_like_folder = str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_like_folder and not is_folder:
        raise UsageError(f"{path}: no such folder")
    try:
        if raw is None:
            raw = PreTrainedConfig.get_config_dict(path)[0]
        if own is not None:
            family = variant_of(own, raw)
        else:
            family = find_family(raw) or generic.FAMILY
        if family.read_config is not None:
            return family.read_config(str(path), raw), family
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), family
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{path}: the config cannot be read ({reason}); known types: {', '.join(known_types())}"
        ) from error


def fingerprint(path: str | Path) -> str:
    """A digest that tells one model from another: config, weight index, and size, first and last
    bytes of each weight file of a folder and its subfolders; the name of a hub id."""
    if not os.path.isdir(path):
        return f"hub:{path}"
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
        name = str(file.relative_to(path))
        if file.name in ("config.json", "config.yaml") or file.name.endswith(".index.json"):
            digest.update(name.encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            with open(file, "rb") as stream:
                head = stream.read(65536)
                stream.seek(max(0, file.stat().st_size - 65536))
                digest.update(f"{name} {file.stat().st_size}".encode() + head + stream.read())
    return digest.hexdigest()[:16]


def identity_of(vlm: VLM) -> dict[str, str]:
    """What a run keeps of its model, and goes on only with the same: {model_name, fingerprint,
    dtype}; dtype says how weights are rounded too. A family file of the user's is part of it."""
    quantize_type = vlm.options.get("quantize_type")
    dtype = str(vlm.dtype).removeprefix("torch.")
    if quantize_type in ("4bit", "int8"):
        dtype += f" {quantize_type}"
    identity = {"model_name": slug(vlm.path), "fingerprint": fingerprint(vlm.path), "dtype": dtype}
    file = vlm.family.file
    if file is not None:
        identity["family_file"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return identity

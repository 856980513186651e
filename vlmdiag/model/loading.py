"""Which model a folder or hub id holds, how its weights are rounded, and what tells it from
another."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging as hf_logging

from vlmdiag.cli import UsageError
from vlmdiag.families import find_family, generic, known_types, read_folder
from vlmdiag.runs.rundirs import slug

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlmdiag.families import Family
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


def load_family(
    family: Family, path: str, config: PreTrainedConfig, **options: Any
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


def quantization(kind, dtype):
    """transformers' quantization config for --quantize_type, None for fp16 and None; products of
    4-bit weights are made in dtype. Linear layers of the decoder are quantised and nothing else:
    tower, connector and LM head stay as they are. UsageError without bitsandbytes.
    """
    if kind not in ("4bit", "int8"):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--quantize_type {kind} needs bitsandbytes (pip install bitsandbytes); --dtype float16"
            " does without"
        )
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it tells at every int8 product that float32 becomes float16
    kept = [r"(?!.*\b(language_model|text_model)\.).*", "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def check_quantized(vlm):
    """UsageError where no linear layer of the decoder was quantised."""
    of = lambda model: [
        module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")
    ]
    if not of(vlm.parts.decoder):
        raise UsageError(
            f"{vlm.path}: --quantize_type 4bit and int8 find no linear layer in"
            f" {type(vlm.parts.decoder).__name__}; --dtype float16 does without"
        )
    for layer in of(vlm.model):
        layer.support_avx512bf16_for_cpu = (
            False  # that kernel has no gradient, and packs the weights for good at the first pass
        )


def read_config(path, trust_remote_code=False):
    """A model's config and its family; UsageError in one line where there is none."""
    raw = None
    if os.path.isdir(path) and not (Path(path) / "config.json").exists():
        try:
            raw = read_folder(path)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        if raw is None:
            raise UsageError(f"{path}: no config.json in this folder, so it is no model")
    if not os.path.isdir(path) and (
        str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    ):
        raise UsageError(f"{path}: no such folder")
    try:
        raw = raw or PreTrainedConfig.get_config_dict(path)[0]
        family = find_family(raw) or generic.FAMILY
        if family.read_config is not None:
            return family.read_config(str(path), raw), family
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), family
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: the config cannot be read ({' '.join(str(error).split())[:300]}); known"
            f" types: {', '.join(known_types())}"
        ) from error


def fingerprint(path):
    """What tells one model from another: config, weight index, and size, first and last bytes of
    each weight file of a folder and its subfolders; the name of a hub id."""
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


def identity_of(vlm):
    """What a run keeps of its model and goes on with only if it is the same: {model_name,
    fingerprint, dtype}; dtype says how weights are rounded too."""
    kind = vlm.options.get("quantize_type")
    dtype = str(vlm.dtype).removeprefix("torch.") + (f" {kind}" if kind in ("4bit", "int8") else "")
    return {"model_name": slug(vlm.path), "fingerprint": fingerprint(vlm.path), "dtype": dtype}

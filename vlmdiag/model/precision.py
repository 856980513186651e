"""Where and in which type weights are held: --device, --dtype, --quantize_type, and checkpoints
that are quantised already."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from vlmdiag.cli import UsageError

if TYPE_CHECKING:
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


def quantization(kind: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' quantization config for --quantize_type, None for fp16 and None.

    Products of 4-bit weights are made in dtype. Linear layers of the decoder are quantised and
    nothing else: tower, connector and LM head stay as they are. UsageError without bitsandbytes.
    """
    if kind not in ("4bit", "int8"):
        return None
    _quiet_bitsandbytes(f"--quantize_type {kind}")
    not_quantised = [r"(?!.*\b(language_model|text_model)\.).*", "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=not_quantised)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=not_quantised
    )


def stored_quantization(
    path: str | Path, config: PreTrainedConfig, quantize_type: str | None, dtype: torch.dtype
) -> str | None:
    """How a checkpoint's weights are quantised already: "4bit" or "int8" by bitsandbytes, another
    method's name, or None. Products of 4-bit weights are made in dtype, as those of
    quantization(). UsageError where --quantize_type would quantise them again."""
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(), "quantization_config", None)
    if not stored:
        return None
    if not isinstance(stored, dict):
        stored = stored.to_dict()
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        kind = "4bit" if stored.get("load_in_4bit") else "int8"
        _quiet_bitsandbytes(f"{path} is stored in {kind} and")
        stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    else:
        kind = str(stored.get("quant_method"))
        if kind not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise UsageError(f"{path}: config.json: the quant_method {kind!r} is not known")
    if quantize_type in ("4bit", "int8"):
        raise UsageError(
            f"{path}: --quantize_type {quantize_type}: the checkpoint is quantised already"
            f" ({kind}); leave the flag out"
        )
    return kind


def _quiet_bitsandbytes(who: str) -> None:
    """UsageError where bitsandbytes is not installed. Where it is, it says no more at every int8
    product that float32 becomes float16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{who} needs bitsandbytes (pip install bitsandbytes)")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _quantised(module: nn.Module) -> list[nn.Module]:
    """The layers of bitsandbytes in a module."""
    return [
        layer for layer in module.modules() if type(layer).__module__.startswith("bitsandbytes.")
    ]


def check_quantized(vlm: VLM, stored: bool, dtype: torch.dtype) -> None:
    """Prepare a model with layers of bitsandbytes for passes and gradients. stored: its files hold
    them so. UsageError where no linear layer of the decoder was quantised."""
    layers = set(_quantised(vlm.model))
    if not stored and not _quantised(vlm.parts.decoder):
        raise UsageError(
            f"{vlm.path}: --quantize_type 4bit and int8 find no linear layer in"
            f" {type(vlm.parts.decoder).__name__}; --dtype float16 does without"
        )
    for layer in layers:
        # That kernel has no gradient, and packs the weights for good at the first pass.
        setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010 -- a plain attribute
        if stored and layer.weight.dtype in PLAIN and not getattr(layer.weight, "quant_state", 0):
            raise UsageError(
                f"{vlm.path}: config.json says that the weights are quantised, and the files hold"
                " them whole: take quantization_config out"
            )
    if stored:
        _cast_plain(vlm.model, dtype, layers)


PLAIN = tuple(DTYPES.values())


def _cast_plain(model: nn.Module, dtype: torch.dtype, layers: Container[nn.Module]) -> None:
    """Bring the parameters that are not quantised to dtype; of a quantised checkpoint transformers
    leaves them in the type of their file. layers: those of bitsandbytes, whose 4-bit weights may be
    stored as if they were floats."""
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if module in layers:
            del parameters["weight"]
        if all(parameter.dtype in PLAIN for parameter in parameters.values()):
            for parameter in parameters.values():
                parameter.data = parameter.data.to(dtype)

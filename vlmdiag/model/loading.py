"""Which model a folder or hub id holds, how it is loaded, and how its weights are rounded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from vlmdiag.cli import UsageError
from vlmdiag.families import (
    family_of_file,
    find_family,
    generic,
    known_types,
    llava_original,
    read_folder,
    variant_of,
)
from vlmdiag.families.folders import form_of, layout_of, read_object, refuse_no_folder
from vlmdiag.model.adapters import Sources, load_trained, merge
from vlmdiag.model.encoding import never_cut
from vlmdiag.model.prompts import guessed_prompt, prompt_for
from vlmdiag.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from typing_extensions import Unpack

    from vlmdiag.families import Family
    from vlmdiag.families.contract import LoadOptions
    from vlmdiag.types import VLM

KNOWN = "; known types: {}; for another one write models/<family>.py (README, 'your own model')"
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


# errors whose messages say what is wrong
SAYS_ALL = (OSError, ValueError, ImportError, RuntimeError, StrictDataclassError)


@contextlib.contextmanager
def one_line(
    path: str | Path,
    what: str = "cannot be loaded",
    explain: Callable[[], str | None] | None = None,
    advice: str = "",
) -> Iterator[None]:
    """Within the context an error of any kind becomes a UsageError in one line: a checkpoint can be
    wrong in more ways than can be listed. explain() may say what the checkpoint is; `advice`
    follows the reason where it does not. The traceback is logged at the level DEBUG."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("%s: %s", path, what, exc_info=True)
        reason = _reason(error)
        form = explain() if explain else None
        said = f"{form} ({reason[:200]})" if form else f"{reason}{advice}"
        raise UsageError(f"{path}: {what}: {said}") from error


def _reason(error: BaseException) -> str:
    """An error's message on one line; its type and where it arose too, where a message such as
    'list index out of range' says nothing without them."""
    message = " ".join(str(error).split())[:400]
    if isinstance(error, SAYS_ALL) and message:
        return message
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename)
    where = f"{file.parent.name}/{file.name}".removeprefix("/")
    return f"{type(error).__name__}: {message} (in {where})"


def load_family(
    family: Family, path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor by the family's own loader; UsageError in one line where it fails, which
    says what the folder is where that can be told."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()

    def form() -> str | None:
        raw = getattr(config, "original_layout", None) or config.to_dict()
        return layout_of(raw, options.get("trust_remote_code", False)) or form_of(path)

    what = f"cannot be loaded as type {config.model_type!r}"
    advice = KNOWN.format(", ".join(known_types())) if family.name == "generic" else ""
    with one_line(path, what, form, advice):
        return family.load(path, config, **options)


def name_in_memory(model: PreTrainedModel) -> str:
    """What a model in memory is called in messages and runs: where it came from, or its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def in_memory(
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    name: str | Path,
    family_file: str | Path | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin, Family]:
    """A model and processor of the user's as their family has them. Of a PeftModel it is the model
    within, whose layers have the adapters. UsageError where its family reads a layout of its
    own."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if processor is None:
        raise UsageError(f"{name}: a model in memory needs its processor too: processor=...")
    raw = model.config.to_dict()
    raw["architectures"] = [type(model).__name__]
    if family_file is not None:
        family = variant_of(family_of_file(Path(family_file).resolve()), raw)
    else:
        family = find_family(raw) or generic.FAMILY
    if family.read_config is not None and family.file is None:
        raise UsageError(
            f"{name}: {family.name} is read from the files of its authors only: give the folder"
        )
    model, processor = load_family(
        family, str(name), model.config, dtype=model.dtype, in_memory=(model, processor)
    )
    return model, processor, family


PROMPT_SECONDS = 20  # a template takes milliseconds


def check_prompt(vlm: VLM) -> str | None:
    """A line about a prompt that is a guess, see guessed_prompt(). UsageError where the model's
    template does not come to an end: it is a program of the checkpoint's, and its loops are bounded
    one by one only. It runs in a thread, which is ended from here."""
    ended: list[Exception | None] = []

    def render() -> None:
        try:
            prompt_for(vlm, "?")
            ended.append(None)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(PROMPT_SECONDS)
    if not ended:
        # raised in the thread at its next step; jinja's loops are loops of Python
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError)
        )
        raise UsageError(
            f"{vlm.path}: the chat template does not end within {PROMPT_SECONDS} seconds; give"
            " --prompt_template"
        )
    if ended[0] is not None:
        raise ended[0]
    return guessed_prompt(vlm)


NO_VOCABULARY = "its tokenizer has no vocabulary: the file that holds it is missing"


def has_no_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has hardly more than its added tokens: from tokenizer_config.json alone
    transformers makes such a one."""
    return len(tokenizer) - len(tokenizer.get_added_vocab()) < 10


def prepare(vlm: VLM) -> None:
    """Make a model ready to be measured: dropout off, prompts never cut, --image_aspect. UsageError
    where its tokenizer has no vocabulary."""
    if has_no_vocabulary(vlm.tokenizer):
        raise UsageError(f"{vlm.path}: {NO_VOCABULARY}")
    vlm.model.eval()
    never_cut(vlm.tokenizer)
    if vlm.options.get("image_aspect") == "pad":
        pad_to_square(vlm)


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


def read_config(
    path: str | Path, trust_remote_code: bool = False, family_file: str | Path | None = None
) -> tuple[PreTrainedConfig, Family]:
    """A model's config and its family, that of family_file where one is given; UsageError in one
    line where there is none."""
    refuse_no_folder(path)
    own = family_of_file(Path(family_file).resolve()) if family_file else None
    what = "the config cannot be read"
    with one_line(path, what, lambda: form_of(path)):
        raw = _read_raw(path, own)
    with one_line(path, what):
        check_raw(path, raw)
        generation = Path(path) / "generation_config.json"
        if generation.exists():  # transformers passes over one that it cannot read
            read_object(generation)
    known = raw.get("model_type") in CONFIG_MAPPING_NAMES
    advice = "" if known else f"; known types: {', '.join(known_types())}"
    with one_line(path, what, lambda: layout_of(raw, trust_remote_code), advice):
        if own is not None:
            family = variant_of(own, raw)
        else:
            family = find_family(raw) or generic.FAMILY
        if family.read_config is not None:
            config = family.read_config(str(path), raw)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if family.read_config is None:
        with one_line(path, what):
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
    config, family = read_config(sources.base, trust_remote_code, family_file)
    folder = sources.adapter
    if folder is None or str(folder) == sources.base or not (folder / "config.json").exists():
        return config, family, {}
    adapted, of_adapter = read_config(folder)
    if not of_adapter.trained:
        return config, family, {}
    if family.name in (of_adapter.name, generic.FAMILY.name):
        return adapted, of_adapter, adapted.original_layout
    return config, family, adapted.original_layout


def apply_adapter(vlm: VLM, sources: Sources, adapted: Record) -> None:
    """Merge the adapter that sources_of found into the model. adapted: what config_of gave."""
    if sources.adapter is None:
        return
    layouts = [name for name in (vlm.family.names,) if name is not None]
    if adapted and not vlm.family.trained:  # LLaVA's training, on a base in transformers' layout
        layouts.append(llava_original.hf_name)
        if adapted.get("image_aspect_ratio") == "pad":
            pad_to_square(vlm)
    if sources.trained is not None and not vlm.family.trained:
        load_trained(vlm.model, sources.trained, layouts)
    vlm.model = merge(vlm.model, sources.adapter, layouts).eval().requires_grad_(False)
    print(f"{vlm.path}: adapter merged into {sources.base}")


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

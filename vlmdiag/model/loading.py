"""A model and its processor by its family's loader, from files or memory, ready to be measured."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging as hf_logging

from vlmdiag.cli import UsageError
from vlmdiag.families import (
    family_of_file,
    find_family,
    generic,
    known_types,
    llava_original,
    variant_of,
)
from vlmdiag.families.folders import form_of, layout_of
from vlmdiag.model.adapters import Sources, load_trained, merge
from vlmdiag.model.configs import KNOWN_TYPES
from vlmdiag.model.encoding import never_cut
from vlmdiag.model.errors import as_usage_error
from vlmdiag.model.prompts import guessed_prompt, prompt_for
from vlmdiag.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from typing_extensions import Unpack

    from vlmdiag.families import Family
    from vlmdiag.families.contract import LoadOptions
    from vlmdiag.types import VLM


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
    """Model and processor by the family's own loader; UsageError in one line where it fails, which
    says what the folder is where that can be told."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()

    def form() -> str | None:
        raw = getattr(config, "original_layout", None) or config.to_dict()
        return layout_of(raw, options.get("trust_remote_code", False)) or form_of(path)

    what = f"cannot be loaded as type {config.model_type!r}"
    advice = KNOWN_TYPES.format(", ".join(known_types())) if family.name == "generic" else ""
    with as_usage_error(path, what, form, advice):
        return family.load(path, config, **options)


def name_in_memory(model: PreTrainedModel) -> str:
    """What a model in memory is called in messages and runs: where it came from, or its class."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__


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
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{name}: a model in memory is a PreTrainedModel or a PeftModel, this is a"
            f" {type(model).__name__}"
        )
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
    # a copy, because a family completes it and --image_aspect changes it
    model, processor = load_family(
        family,
        str(name),
        model.config,
        dtype=model.dtype,
        in_memory=(model, copy.deepcopy(processor)),
    )
    return model, processor, family


PROMPT_SECONDS = 20  # a template takes milliseconds


# what transformers' generate() does to logits besides, by what does nothing
PENALTIES = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
}


def left_out_of_decoding(vlm: VLM) -> str | None:
    """A line about settings of the checkpoint's generation config under which generate() would not
    be plain greedy decoding, which is what is measured; None without such."""
    config = vlm.model.generation_config
    set_ones = [
        name
        for name, nothing in PENALTIES.items()
        if getattr(config, name, nothing) not in (nothing, None, [], 0)
    ]
    if not set_ones:
        return None
    return (
        f"its generation config sets {', '.join(set_ones)}, which answers here are without: they"
        " are plain greedy decoding"
    )


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
    eos = vlm.model.generation_config.eos_token_id
    if not all(isinstance(id, int) for id in (eos if isinstance(eos, list) else [eos or 0])):
        raise UsageError(
            f"{vlm.path}: eos_token_id of the generation config is {eos!r}, wanted are numbers"
        )
    vlm.model.eval()
    never_cut(vlm.tokenizer)
    if vlm.options.get("image_aspect") == "pad":
        pad_to_square(vlm)


def pad_to_square(vlm: VLM) -> None:
    """--image_aspect pad. UsageError where the image processor cannot."""
    if "square-pad" not in vlm.family.has:
        raise UsageError(
            f"{vlm.path}: --image_aspect pad works for LLaVA-type image processors only"
        )
    images = vlm.processor.image_processor
    if not hasattr(images, "pad_to_square"):  # CLIP's, as published for LLaVA-1.5
        settings = {
            name: value
            for name, value in images.to_dict().items()
            if name not in ("image_processor_type", "processor_class")
        }
        vlm.processor.image_processor = images = LlavaImageProcessorPil(**settings)
    images.do_pad = True


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

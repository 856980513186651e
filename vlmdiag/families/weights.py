"""Whether the parameters of a checkpoint's files are those of its model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vlmdiag.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parameters of files that no module takes, where that does no harm. transformers has taken out
# those that the model's class names in _keys_to_ignore_on_load_unexpected.
HARMLESS = re.compile(
    r"(^|[._])inv_freq$"  # buffers that every model computes by itself
    r"|(^|\.)position_ids$"
    r"|\.attn\.(masked_)?bias$"  # GPT-2's and GPT-NeoX's causal masks
    r"|\.num_batches_tracked$"
    r"|\.embed_positions\.(weights|_float_tensor)$"  # sines
    # what a tower is trained with and no vision token passes: contrastive heads, pooling
    r"|(^|\.)(logit_scale|logit_bias)$"
    r"|(^|\.)(text|visual)_projection\.weight$"
    r"|(^|\.)vision_(tower|model)\.(.+\.)?head\."
)
# what keys without a place say of their file
HINTS = {
    r"^(module|_orig_mod|base_model\.model)\.": (
        "they were saved from a wrapped model (DataParallel, torch.compile, peft): take the prefix"
        " off their names"
    ),
    r"lora_|\.base_layer\.": "lora_A/lora_B are an adapter's: merge the adapter first",
    r"\.(absmax|quant_state|SCB|qweight|qzeros|scales|weight_scale(_inv)?|weight_packed)\b": (
        "the weights are quantised in a way that is not read here"
    ),
}


def checked(loaded: tuple[PreTrainedModel, Record]) -> PreTrainedModel:
    """The model of from_pretrained(..., output_loading_info=True); ValueError that names parameters
    that no file filled, that are of another shape, or that have no place in the model."""
    model, info = loaded
    layers_kept = getattr(model.config, "layers_kept", None)
    unknown = [
        key
        for key in sorted(info["unexpected_keys"])
        if not HARMLESS.search(key) and not left_out(key, layers_kept)
    ]
    missing = sorted(info["missing_keys"])
    mismatched = [
        f"{key} {tuple(stored)} instead of {tuple(wanted)}"
        for key, stored, wanted in sorted(info["mismatched_keys"])
    ]
    problems = []
    for names, what in (
        (unknown, "have no place in this model"),
        (missing, "are in no file"),
        (mismatched, "are of another shape"),
    ):
        if names:
            examples = ", ".join(names[:3])
            problems.append(f"{len(names)} parameters {what}, such as {examples}")
    for pattern, hint in HINTS.items():
        if any(re.search(pattern, key) for key in unknown):
            problems.append(hint)
    if problems:
        raise ValueError("; ".join(problems))
    return model


def left_out(key: str, layers_kept: int | None) -> bool:
    """Whether a parameter is one of the layers that load_model(decoder_layers=...) leaves out."""
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", key)]
    return layers_kept is not None and any(number >= layers_kept for number in numbers)

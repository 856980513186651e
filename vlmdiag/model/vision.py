"""How the picture enters the decoder: its features as inputs, the pass over the prompt."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from vlmdiag.batch import joined
from vlmdiag.cli import UsageError
from vlmdiag.groups import VISION

if TYPE_CHECKING:
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM, ImageFeatures


def _takes(model, name):
    return name in inspect.signature(model.forward).parameters


def image_features(vlm: VLM, batch: Batch) -> ImageFeatures:
    """The output of get_image_features, its pooler_output a list of (P, d) per sample; the tower
    runs once per picture of the batch. ValueError where prompts and tower disagree on P."""
    pictures = list(dict.fromkeys(batch.pictures))
    first_rows = [batch.pictures.index(picture) for picture in pictures]
    inputs = joined([batch.image_rows[row] for row in first_rows])
    wanted = inspect.signature(vlm.model.get_image_features).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
    on_device = {}
    for name, value in inputs.items():
        if takes_all or name in wanted:
            value = value.to(vlm.device)
            on_device[name] = value.to(vlm.dtype) if value.is_floating_point() else value
    features = vlm.model.get_image_features(**on_device, return_dict=True)
    # some families take it back as one tensor, see prefill()
    features.was_tensor = torch.is_tensor(features.pooler_output)
    pooled = torch.cat([part.flatten(0, -2) for part in features.pooler_output])
    counts = [int((batch.groups[row] == VISION).sum()) for row in first_rows]
    if sum(counts) != len(pooled):
        raise ValueError(
            f"the prompts have {sum(counts)} vision tokens, get_image_features of"
            f" {vlm.family.name} gives {len(pooled)}"
        )

    def per_sample(tokens: Tensor) -> list[Tensor]:
        """(N, d) of the distinct pictures -> (P, d) for each sample."""
        of_picture = dict(zip(pictures, tokens.split(counts), strict=True))
        return [of_picture[picture] for picture in batch.pictures]

    features.pooler_output = per_sample(pooled)
    if vlm.family.deepstack:
        features.deepstack_features = [
            per_sample(torch.cat(list(part))) for part in features.deepstack_features
        ]
    return features


def entries(vlm, features):
    """Where the decoder gets the picture, as lists (P, d) per sample that may be changed in place:
    its input and, with deepstack, its first layers."""
    return [features.pooler_output, *(features.deepstack_features if vlm.family.deepstack else ())]


def entered(vlm, features):
    """What the decoder gets for each vision token of a batch, (N, d); with deepstack (N, (1 + K)
    d): behind the input what is added to the outputs of the first K layers."""
    return torch.cat([torch.cat(list(tokens)) for tokens in entries(vlm, features)], -1)


def embeddings(vlm, batch, features=None):
    """What the decoder reads: token embeddings with the image features in their places, (B, T, d).
    UsageError where that is not all that it gets."""
    if vlm.family.deepstack:
        raise UsageError(
            f"{vlm.path}: {vlm.family.name} adds the picture in its decoder's first layers too"
            " (deepstack), so embeddings alone do not show it"
        )
    with entering(
        vlm, batch, entered(vlm, vlm.vision(batch) if features is None else features)
    ) as embeds:
        return embeds


@contextlib.contextmanager
def entering(vlm, batch, rows):
    """The decoder's inputs (B, T, d) with rows (N, d) or (N, (1 + K) d), see entered(), for the
    vision tokens of the batch. With deepstack they hold within the context only, see deepened()."""
    embeds, seen = vlm.model.get_input_embeddings()(batch.input_ids), batch.groups == VISION
    width = embeds.shape[-1]
    with deepened(vlm, seen, rows[:, width:]):
        yield embeds.masked_scatter(seen[..., None], rows[:, :width].to(embeds))


@contextlib.contextmanager
def deepened(vlm, seen, rows):
    """Within the context rows (N, K d) are added to the outputs of the first K layers at the N
    places of seen (B, T), in passes over (B, T) positions."""

    def add(module, args, output, own):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[:2] != seen.shape:  # a later step
            return None
        here = seen.to(states.device)[..., None]
        states = states + torch.zeros_like(states).masked_scatter(here, own.to(states))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    width = vlm.model.get_input_embeddings().weight.shape[1]
    parts = rows.split(width, -1) if rows.shape[1] else ()
    hooks = [
        vlm.parts.layers[layer].register_forward_hook(lambda *all, own=own: add(*all, own))
        for layer, own in enumerate(parts)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def more_inputs(vlm, batch, start=0):
    """What else the model's forward takes over the prompts from position `start` on, {name: (B, T -
    start)}."""
    return (
        {name: value[..., start:] for name, value in vlm.family.inputs(vlm, batch).items()}
        if vlm.family.inputs
        else {}
    )


def prefill(vlm, batch, features=None, cache=None, embeds=None):
    """One pass over the prompt. Returns the model's output with a cache.

    features: vlm.vision(batch) if it was computed before. embeds (B, T, d): inputs in place of the
    batch's own, see embeddings(). cache: keys and values of the first positions, which are not
    computed again (see first_positions); the rest runs."""
    start = 0 if cache is None or embeds is None else cache.get_seq_length()
    positions = batch.position_ids[..., start:].contiguous()  # some models take a view of them
    options = {
        "attention_mask": batch.attention_mask,
        "position_ids": positions,
        "use_cache": True,
        "past_key_values": cache,
    }
    options |= more_inputs(vlm, batch, start)
    if _takes(vlm.model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    if embeds is not None:
        return vlm.model(inputs_embeds=embeds[:, start:], **options)
    features = vlm.vision(batch) if features is None else features
    if _takes(vlm.model, "mm_encoder_outputs"):
        if getattr(features, "was_tensor", False):
            features = SimpleNamespace(
                **dict(features) | {"pooler_output": torch.cat(features.pooler_output)}
            )
        return vlm.model(
            input_ids=batch.input_ids, mm_encoder_outputs={"image": features}, **options
        )
    return vlm.model(inputs_embeds=embeddings(vlm, batch, features), **options)

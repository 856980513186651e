"""How the picture enters the decoder: its features as inputs, the pass over the prompt.

Shapes: B rows of a batch, T prompt length with padding, P vision tokens of a sample, N of a batch,
d width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmdiag.batch import joined
from vlmdiag.cli import UsageError
from vlmdiag.families.generic import seeing
from vlmdiag.groups import VISION
from vlmdiag.model.attention import check_edit
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from transformers import Cache, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM, ImageFeatures


def image_features(vlm: VLM, batch: Batch) -> ImageFeatures:
    """The output of get_image_features, its pooler_output a list of (P, d) per sample; the tower
    runs once per picture of the batch. ValueError where prompts and tower disagree on P."""
    pictures = list(dict.fromkeys(batch.pictures))
    first_rows = [batch.pictures.index(picture) for picture in pictures]
    rows = [batch.image_rows[row] for row in first_rows]
    seen = [_seen(vlm, row) for row in ([[row] for row in rows] if vlm.family.alone else [rows])]
    features = seen[0]
    # some families take it back as one tensor, see prefill()
    features.was_tensor = torch.is_tensor(features.pooler_output)
    pooled_parts: list[Any] = [part.pooler_output for part in seen]
    shapes = {part.shape[1:] for part in pooled_parts if isinstance(part, Tensor)}
    features.of_picture = shapes.pop() if len(shapes) == 1 else ()
    pooled = torch.cat([_tokens(part) for part in pooled_parts])
    in_pictures = list(batch.in_pictures())
    counts = [int(in_pictures[row].sum()) for row in first_rows]
    if sum(counts) != len(pooled):
        raise ValueError(
            f"the prompts have {sum(counts)} vision tokens, get_image_features of"
            f" {vlm.family.name} gives {len(pooled)}"
        )

    def per_sample(tokens: Tensor) -> list[Tensor]:
        """(N, d) of the distinct pictures -> (P, d) for each sample."""
        of_picture = dict(zip(pictures, tokens.split(counts), strict=True))
        of_pictures = [of_picture[picture] for picture in batch.pictures]
        if batch.numbers is None:
            return of_pictures
        rows = range(len(batch.samples))
        return [torch.cat(of_pictures[batch.of_sample(row)]) for row in rows]

    features.pooler_output = per_sample(pooled)
    if vlm.family.deepstack:
        features.deepstack_features = [
            per_sample(torch.cat(list(part))) for part in features.deepstack_features
        ]
    return features


def _tokens(pooled: Tensor | Sequence[Tensor]) -> Float[Tensor, "N d"]:
    """The vectors of all vision tokens, one after the other."""
    if isinstance(pooled, Tensor):
        return pooled.flatten(0, -2)
    return torch.cat([part.flatten(0, -2) for part in pooled])


def _seen(vlm: VLM, rows: list[dict[str, Tensor]]) -> ImageFeatures:
    """The output of get_image_features for the image inputs of some pictures; UsageError where it
    has no vectors of vision tokens."""
    owner = seeing(vlm.model)
    wanted = inspect.signature(owner.get_image_features).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
    on_device = {}
    for name, value in joined(rows).items():
        if takes_all or name in wanted:
            value = value.to(vlm.device)
            on_device[name] = value.to(vlm.dtype) if value.is_floating_point() else value
    if vlm.family.features is not None:
        return vlm.family.features(vlm, on_device)
    features = owner.get_image_features(**on_device, return_dict=True)
    if getattr(features, "pooler_output", None) is None:
        raise UsageError(
            f"{vlm.path}: {vlm.model.config.model_type} does not give its decoder one vector per"
            " vision token (get_image_features has no pooler_output), which the measures need"
        )
    return features


def entries(vlm: VLM, features: ImageFeatures) -> list[list[Tensor]]:
    """Where the decoder gets the picture, as lists (P, d) per sample that may be changed in place:
    its input and, with deepstack, some of its layers."""
    deepstack = features.deepstack_features if vlm.family.deepstack else []
    return [features.pooler_output, *deepstack]


def entered(vlm: VLM, features: ImageFeatures) -> Float[Tensor, "N d_in"]:
    """What the decoder gets for each of the N vision tokens of a batch: (N, d); with deepstack (N,
    (1 + K) d), behind the input what is added to the outputs of K layers."""
    return torch.cat([torch.cat(list(tokens)) for tokens in entries(vlm, features)], -1)


def need_embeddings(vlm: VLM) -> None:
    """UsageError for a decoder that reads the ids of a prompt in its layers too (per-layer inputs):
    vectors in place of its tokens are then not all that it gets."""
    config = vlm.parts.decoder.config
    if getattr(config, "hidden_size_per_layer_input", None):
        raise UsageError(
            f"{vlm.path}: {vlm.family.name} reads the ids of a prompt in every layer (per-layer"
            " inputs), and this measure gives the decoder vectors"
        )


@contextlib.contextmanager
def entering(
    vlm: VLM, batch: Batch, vision: Float[Tensor, "N d_in"]
) -> Iterator[Float[Tensor, "B T d"]]:
    """The decoder's inputs with given vectors for the vision tokens of the batch, in the form of
    entered(). With deepstack they hold within the context only, see deepened()."""
    need_embeddings(vlm)
    embeds = vlm.model.get_input_embeddings()(batch.input_ids)
    in_picture = batch.groups == VISION
    width = embeds.shape[-1]
    with deepened(vlm, in_picture, vision[:, width:]):
        yield embeds.masked_scatter(in_picture[..., None], vision[:, :width].to(embeds))


@contextlib.contextmanager
def deepened(
    vlm: VLM, in_picture: Bool[Tensor, "B T"], vision: Float[Tensor, "N K*d"], begin: int = 0
) -> Iterator[None]:
    """Within the context the K vectors of each of the N vision tokens are added to the outputs of
    the layers of Family.deepstack at its place, in passes over all T positions or, behind a cache,
    over the last of them and any further ones.

    begin: the position of the cached sequence at which in_picture begins.
    """
    width = vlm.model.get_input_embeddings().weight.shape[1]
    deep = vlm.family.deepstack
    if deep is None or not vision.shape[1]:
        yield
        return
    before = 0  # positions of in_picture that a pass finds in its cache

    def look(module: nn.Module, args: tuple[object, ...], kwargs: Record) -> None:
        nonlocal before
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else cache.get_seq_length() - begin

    def adding(vectors: Float[Tensor, "N d"]) -> Callable[..., object]:
        places = in_picture.to(vectors.device)[..., None]
        added = vectors.new_zeros(*in_picture.shape, width).masked_scatter(places, vectors)

        def add(
            module: nn.Module, args: tuple[object, ...], output: Tensor | tuple[Tensor, ...]
        ) -> object:
            states = output[0] if isinstance(output, tuple) else output
            more = added[:, before : before + states.shape[1]].to(states)
            if not more.shape[1]:  # a later step
                return None
            states = states + nn.functional.pad(more, (0, 0, 0, states.shape[1] - more.shape[1]))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return add

    hooks = [vlm.parts.decoder.register_forward_pre_hook(look, with_kwargs=True)]
    for number, vectors in zip(deep(vlm), vision.split(width, -1), strict=True):
        hooks.append(vlm.parts.layers[number].register_forward_hook(adding(vectors)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def more_inputs(vlm: VLM, batch: Batch, start: int = 0) -> dict[str, Tensor]:
    """What else the model's forward takes over the prompts from position `start` on, {name: (B, T -
    start)}."""
    inputs = dict(batch.token_inputs)
    if vlm.family.inputs is not None:
        inputs |= vlm.family.inputs(vlm, batch)
    return {name: value[..., start:] for name, value in inputs.items()}


def decoder_inputs(vlm: VLM, batch: Batch, start: int = 0) -> dict[str, Tensor]:
    """more_inputs() for passes that begin at the decoder: without what only the whole model takes
    of the processor's."""
    inputs = more_inputs(vlm, batch, start)
    of_model = [name for name in batch.token_inputs if not _takes(vlm.parts.decoder, name)]
    declared = vlm.family.inputs(vlm, batch) if vlm.family.inputs is not None else {}
    return {
        name: value for name, value in inputs.items() if name in declared or name not in of_model
    }


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def last_logits(vlm: VLM, count: int) -> int | Tensor:
    """logits_to_keep of at least the last `count` positions. As a number it would let Gemma's
    layers that share keys and values leave out all other positions; as indices it has to lie where
    the last states do, and goes where the model's inputs go: over several devices all are kept."""
    if not getattr(vlm.parts.decoder.config, "num_kv_shared_layers", 0):
        return count
    last_states = next(vlm.parts.norm.parameters(), None)
    if last_states is not None and last_states.device not in (vlm.device, torch.device("meta")):
        return 0
    return torch.arange(-count, 0, device=vlm.device)


def new_cache(vlm: VLM) -> Cache | None:
    """For a decoder that makes none itself, else None."""
    return DynamicCache(config=vlm.parts.decoder.config) if vlm.family.makes_no_cache else None


def prefill(
    vlm: VLM,
    batch: Batch,
    features: ImageFeatures | None = None,
    cache: Cache | None = None,
    embeds: Float[Tensor, "B T d"] | None = None,
    last: int = 1,
) -> CausalLMOutputWithPast:
    """One pass over the prompt. Returns the model's output with a cache.

    features: vlm.vision(batch) if it was computed before. embeds: inputs in place of the batch's
    own, see entering(). cache: keys and values of the first positions, which are not computed
    again (see prefix.first_positions()); the others are. last: of how many positions the logits
    are wanted at least.
    """
    start = 0 if cache is None or embeds is None else cache.get_seq_length()
    check_edit(start)
    options: Record = {
        "attention_mask": batch.attention_mask,
        # contiguous, because some models take a view of them
        "position_ids": batch.position_ids[..., start:].contiguous(),
        "use_cache": True,
        "past_key_values": new_cache(vlm) if cache is None else cache,
        **more_inputs(vlm, batch, start),
    }
    if _takes(vlm.model, "logits_to_keep"):
        options["logits_to_keep"] = last_logits(vlm, last)
    if embeds is not None:
        return vlm.model(inputs_embeds=embeds[:, start:], **options)
    if features is None:
        features = vlm.vision(batch)
    if vlm.family.features is not None or not _takes(vlm.model, "mm_encoder_outputs"):
        with entering(vlm, batch, entered(vlm, features)) as embeds:
            return vlm.model(inputs_embeds=embeds, **options)
    encoded: object = features
    if features.was_tensor:
        fields = dict(cast(Any, features))
        pooled = torch.cat(features.pooler_output)
        fields["pooler_output"] = pooled.view(-1, *features.of_picture[:-1], pooled.shape[-1])
        encoded = SimpleNamespace(**fields)
    return vlm.model(input_ids=batch.input_ids, mm_encoder_outputs={"image": encoded}, **options)

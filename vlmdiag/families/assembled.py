"""What models written here share: a decoder of transformers behind rows of image features, a
processor that puts a picture's tokens in the place of its placeholder, weights that are already in
memory or mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModel, BatchFeature, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmdiag.cli import UsageError
from vlmdiag.families import generic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BaseImageProcessor, Cache, PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from vlmdiag.families.contract import LoadOptions
    from vlmdiag.families.files import State

IMAGE = "<image>"


# --- the model ------------------------------------------------------------------------------------


def with_features(
    embeds: Float[Tensor, "B T d"],
    places: Bool[Tensor, "B T"],
    features: Float[Tensor, "... d"] | Sequence[Float[Tensor, "... d"]],
) -> Float[Tensor, "B T d"]:
    """Token embeddings with image features, in their order, at `places`; ValueError where there are
    not as many."""
    if not torch.is_tensor(features):
        features = torch.cat([of_picture.flatten(0, -2) for of_picture in features])
    rows = features.flatten(0, -2).to(embeds)
    if len(rows) != places.sum():
        raise ValueError(
            f"{int(places.sum())} image tokens in the prompts, {len(rows)} rows of image features"
        )
    return embeds.masked_scatter(places[..., None], rows)


class Assembled(PreTrainedModel, GenerationMixin):
    """A decoder of transformers that reads the rows of get_image_features() in place of its image
    tokens' embeddings.

    config: text_config, image_token_id, perhaps embedding_rows. A subclass makes tower and
    connector, calls post_init() and defines get_image_features(**image inputs). The LM head has
    text_config.vocab_size rows, the embedding table embedding_rows, else as many as the image
    token's id needs.
    """

    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        text = config.text_config
        rows = getattr(config, "embedding_rows", config.image_token_id + 1)
        self.language_model = AutoModel.from_config(text)
        if rows > text.vocab_size:
            self.language_model.embed_tokens = nn.Embedding(rows, text.hidden_size)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding table."""
        return self.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The LM head."""
        return self.lm_head

    def get_decoder(self) -> PreTrainedModel:
        """The decoder."""
        return self.language_model

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B K"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_values: Float[Tensor, "n c height width"] | None = None,
        tile_grids: Int[Tensor, "pictures 2"] | None = None,
        image_masks: Float[Tensor, "n patches"] | None = None,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, vocabulary) and keys and values. pixel_values,
        tile_grids, image_masks: what get_image_features takes of them; a pass without image tokens,
        such as a decoding step, leaves them alone. mm_encoder_outputs: {"image": what
        get_image_features gave}, in their place.
        """
        if inputs_embeds is None:
            pictures = {
                "pixel_values": pixel_values,
                "tile_grids": tile_grids,
                "image_masks": image_masks,
            }
            ids = cast("Tensor", input_ids)
            inputs_embeds = self._embeds(ids, pictures, mm_encoder_outputs)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _embeds(
        self,
        input_ids: Int[Tensor, "B T"],
        pictures: dict[str, Tensor | None],
        encoded: dict[str, BaseModelOutputWithPooling] | None,
    ) -> Float[Tensor, "B T d"]:
        """Token embeddings with image features in their places, where there are any."""
        embeds = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_id
        given = {name: tensor for name, tensor in pictures.items() if tensor is not None}
        if not places.any() or not (given or encoded):
            return embeds
        features = encoded["image"] if encoded else self.get_image_features(**given)
        return with_features(embeds, places, features.pooler_output)


# --- weights --------------------------------------------------------------------------------------


def assembled(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: State, options: LoadOptions
) -> PreTrainedModel:
    """The model of a class with the parameters of `state`; ValueError for what is missing, of
    another shape, or has no place."""
    return generic.load_model_class(model_class, None, config, options, state_dict=state)


def complete_embeddings(state: State, table: str, lm_head: str, rows: int, tied: bool) -> None:
    """Give the embedding table of that name in `state` a row of zeros for each id that it lacks up
    to `rows`; where the two are tied, the LM head is the table as it was."""
    if table in state:
        if tied:
            state[lm_head] = state[table]
        state[table] = longer(state[table], rows)


def longer(table: Float[Tensor, "n d"], rows: int) -> Float[Tensor, "rows d"]:
    """An embedding table with rows of zeros behind it, (max(n, rows), d)."""
    if rows <= len(table):
        return table
    return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])


def without(state: State, prefix: str) -> State:
    """`state` without the parameters whose names begin with `prefix`: a decoder whose layers are
    left out on purpose (load_model(decoder_layers=0)) has no place for them."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


# --- the processor --------------------------------------------------------------------------------


class Expanding:
    """A processor that puts a picture's tokens in the place of its placeholder: offsets count in
    the text with the placeholder written out.

    A subclass has picture(image) -> (text that stands for a placeholder, tokens of each IMAGE in it
    as [(id, text)], image tensors {name: (n, ...)}).
    """

    image_token = IMAGE

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def picture(self, image: Image) -> tuple[str, list[tuple[int, str]], dict[str, Tensor]]:
        """What a picture adds to the prompt, see the class."""
        raise NotImplementedError

    def __call__(
        self,
        images: Image,
        text: str,
        return_tensors: str = "pt",
        return_offsets_mapping: bool = False,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """One picture and one prompt with one placeholder: input_ids and attention_mask (1, T),
        offset_mapping (1, T, 2), and the image tensors. A token that stands for no text of its own
        has the offsets of the one before it."""
        if text.count(self.image_token) != 1:
            raise UsageError(
                f"the prompt has {text.count(self.image_token)} places for a picture, wanted 1:"
                " give --prompt_template one {image}"
            )
        written, tokens, inputs = self.picture(images.convert("RGB"))
        encoded = self.tokenizer(
            text.replace(self.image_token, written),
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
        )
        ids, offsets = self._expanded(encoded["input_ids"], encoded["offset_mapping"], tokens)
        data: dict[str, Any] = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            **inputs,
        }
        if return_offsets_mapping:
            data["offset_mapping"] = torch.tensor([offsets])
        return BatchFeature(data)

    def _expanded(
        self, ids: list[int], offsets: list[tuple[int, int]], tokens: list[tuple[int, str]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets with `tokens` [(id, text)] in place of each placeholder."""
        placeholder = self.tokenizer.convert_tokens_to_ids(self.image_token)
        ids_after: list[int] = []
        offsets_after: list[tuple[int, int]] = []
        shift = 0  # characters by which the text has grown so far
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token != placeholder:
                ids_after.append(token)
                offsets_after.append((start + shift, end + shift))
                continue
            at = start + shift
            for image_id, string in tokens:
                ids_after.append(image_id)
                offsets_after.append((at, at + len(string)) if string else offsets_after[-1])
                at += len(string)
            shift = at - end
        return ids_after, offsets_after

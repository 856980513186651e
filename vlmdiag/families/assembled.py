"""What models written here share: a decoder of transformers behind rows of image features, a
processor that puts a picture's tokens in the place of its placeholder, weights that are already in
memory or mapped."""

import torch
from torch import nn
from transformers import AutoModel, BatchFeature, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmdiag.cli import UsageError
from vlmdiag.families import checked

IMAGE = "<image>"


class Assembled(PreTrainedModel, GenerationMixin):
    """A decoder of transformers that reads the rows of get_image_features() in place of its image
    tokens' embeddings.

    config: text_config, image_token_id, perhaps embedding_rows. A subclass makes tower and
    connector, calls post_init() and defines get_image_features(**image inputs). The LM head has
    text_config.vocab_size rows, the embedding table embedding_rows, else as many as the image
    token's id needs."""

    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        text, rows = (
            config.text_config,
            getattr(config, "embedding_rows", config.image_token_id + 1),
        )
        self.language_model = AutoModel.from_config(text)
        if rows > text.vocab_size:
            self.language_model.embed_tokens = nn.Embedding(rows, text.hidden_size)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.language_model

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        output_attentions=None,
        output_hidden_states=None,
        pixel_values=None,
        tile_grids=None,
        image_masks=None,
        **_,
    ):
        """Logits (B, T or logits_to_keep, vocabulary) and keys and values. pixel_values,
        tile_grids, image_masks: what get_image_features takes of them; a pass without image tokens,
        such as a decoding step, leaves them alone. mm_encoder_outputs: {"image": what
        get_image_features gave}, in their place.
        """
        if inputs_embeds is None:
            inputs_embeds, places = (
                self.get_input_embeddings()(input_ids),
                input_ids == self.config.image_token_id,
            )
            pictures = {
                "pixel_values": pixel_values,
                "tile_grids": tile_grids,
                "image_masks": image_masks,
            }
            pictures = {name: value for name, value in pictures.items() if value is not None}
            if places.any() and (pictures or mm_encoder_outputs):
                features = (
                    mm_encoder_outputs["image"]
                    if mm_encoder_outputs
                    else self.get_image_features(**pictures)
                ).pooler_output
                features = torch.cat([part.flatten(0, -2) for part in features]).to(inputs_embeds)
                if len(features) != places.sum():
                    raise ValueError(
                        f"{int(places.sum())} image tokens in the prompts, {len(features)} rows of"
                        " image features"
                    )
                inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features)
        found = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )


def assembled(kind, config, state, dtype, device_map=None, quantization_config=None):
    """The model of class `kind` with the parameters of `state` {name: tensor}; ValueError for what
    is missing, of another shape, or has no place."""
    with torch.device("meta"):
        wanted = set(kind(config).state_dict())
    if unknown := sorted(set(state) - wanted):
        raise ValueError(
            f"{len(unknown)} parameters have no place in this model, such as"
            f" {', '.join(unknown[:3])}"
        )
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    return checked(
        kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    )


def longer(table, rows):
    """An embedding table (n, d) with rows of zeros behind it, (max(n, rows), d)."""
    return (
        torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])
        if rows > len(table)
        else table
    )


class Expanding:
    """A processor that puts a picture's tokens in the place of its placeholder: offsets count in
    the text with the placeholder written out.

    A subclass has picture(image) -> (text that stands for a placeholder, tokens of each IMAGE in it
    as [(id, text)], image tensors {name: (n, ...)}).
    """

    image_token = IMAGE

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(
        self,
        images,
        text,
        return_tensors="pt",
        return_offsets_mapping=False,
        add_special_tokens=True,
    ):
        """One picture and one prompt with one placeholder: input_ids and attention_mask (1, T),
        offset_mapping (1, T, 2), and the image tensors. A token that stands for no text of its own
        has the offsets of the one before it."""
        if text.count(self.image_token) != 1:
            raise UsageError(
                f"the prompt has {text.count(self.image_token)} places for a picture, wanted 1:"
                " give --prompt_template one {image}"
            )
        written, tokens, inputs = self.picture(images.convert("RGB"))
        found = self.tokenizer(
            text.replace(self.image_token, written),
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
        )
        image, ids, offsets, moved = (
            self.tokenizer.convert_tokens_to_ids(self.image_token),
            [],
            [],
            0,
        )
        for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token != image:
                ids.append(token)
                offsets.append((start + moved, end + moved))
                continue
            at = start + moved
            for own, string in tokens:
                ids.append(own)
                offsets.append((at, at + len(string)) if string else offsets[-1])
                at += len(string)
            moved = at - end
        data = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        } | inputs
        return BatchFeature(
            data | ({"offset_mapping": torch.tensor([offsets])} if return_offsets_mapping else {})
        )

"""Kosmos-2 (arXiv 2306.14824): a CLIP ViT whose patches are read by 64 learned queries, and a
Magneto text decoder that writes boxes as pairs of patch indices.

Layout of the prompt: <s>, <image>, 64 places of the queries, </image>, then the text: "Question:
{question} Answer:", no chat template. The processor fills the places with ids of ordinary words and
says in a mask where they are; Processor below puts one id there, that of </chunk>, a tag which no
prompt holds, so that the ids alone say it. "<grounding>" at the text's beginning (--prompt_template
"<grounding> Question: {question} Answer:") asks for boxes.

A vision token is a query that read the whole picture in one layer of attention, one softmax over
the projected ViT positions (CLS and patches) and the queries themselves. So it has no box, and this
family does not declare `grid`; what leads from it back to the picture is in Parts.qformer and
patches(). The decoder has sinusoidal positions, counted from pad_token_id + 1 and added to its
inputs, so there is no `rotary`. Inputs are scaled by sqrt(d) inside the decoder, vision tokens as
well. Its masks are additive. Earlier positions do not depend on later ones.

transformers' forward takes the queries as image_embeds with their mask, and a picture at every
step; Kosmos2 below takes what the other families' models take. Its queries come before the patches
among the keys of the resampler, where transformers has them behind: keys have no order. Tested on a
small random model with a processor made in the tests: ids against transformers' own processor,
logits and greedy answers against transformers' own class, boxes against its arithmetic and against
the patches. Not tested: we had no published weights or tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Kosmos2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from vlmdiag.families import Family, Parts, QFormer, generic
from vlmdiag.families.assembled import with_features
from vlmdiag.families.blip2 import patches, prompt
from vlmdiag.groups import VISION

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL.Image import Image
    from torch import Tensor
    from transformers import Kosmos2Config, PreTrainedConfig, PreTrainedModel, ProcessorMixin
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, ModelOutput
    from typing_extensions import Unpack

    from vlmdiag.batch import Batch
    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions
    from vlmdiag.types import VLM


# --- the model ------------------------------------------------------------------------------------


class Resampler(Kosmos2ImageToTextProjection):
    """The queries' attention over the picture, with the queries before the patches."""

    def forward(
        self, features: Float[Tensor, "B S d_v"]
    ) -> tuple[Float[Tensor, "B q d"], Float[Tensor, "B H q q+S"] | None]:
        """Vision tokens from the tower's features, and the weights (with eager attention)."""
        queries = self.latent_query.expand(len(features), -1, -1)
        keys = torch.cat([queries, self.dense(features)], 1)
        return self.x_attn(queries, encoder_hidden_states=keys)


class Kosmos2(Kosmos2ForConditionalGeneration):
    """transformers' class with get_image_features, and a forward over token ids or embeddings that
    needs no picture."""

    def __init__(self, config: Kosmos2Config) -> None:
        super().__init__(config)
        self.image_to_text_projection = Resampler(config)

    def get_image_features(
        self, pixel_values: Float[Tensor, "B c height width"], return_dict: bool = True
    ) -> BaseModelOutputWithPooling:
        """pooler_output (B, q, d); last_hidden_state (B, S, d_v) of unit length."""
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        states = self.vision_model.model.post_layernorm(states)
        states = torch.nn.functional.normalize(states, dim=-1)
        tokens, _ = self.image_to_text_projection(states)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=tokens)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int = 0,
        pixel_values: Float[Tensor, "B c height width"] | None = None,
        image_embeds_position_mask: Int[Tensor, "B T"] | None = None,
        **inputs: object,
    ) -> ModelOutput | CausalLMOutputWithCrossAttentions:
        """With pixel_values transformers' own forward; else the decoder's output over token ids,
        with a picture from mm_encoder_outputs {"image": ...}, or over embeddings."""
        inputs["logits_to_keep"] = logits_to_keep
        if pixel_values is not None:
            return super().forward(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                image_embeds_position_mask=image_embeds_position_mask,
                **inputs,
            )
        if mm_encoder_outputs is not None:
            inputs_embeds = with_features(
                self.get_input_embeddings()(input_ids),
                input_ids == self.config.image_token_id,
                mm_encoder_outputs["image"].pooler_output,
            )
        if inputs_embeds is not None:
            input_ids = None
        return self.text_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)


# --- the processor --------------------------------------------------------------------------------


class Processor:
    """Kosmos-2's processor for one picture and one text: its ids, with `place` where the queries
    stand. Offsets count from the start of all that is read."""

    image_token = ""  # a prompt has no placeholder
    chat_template = None

    def __init__(self, processor: ProcessorMixin, queries: int) -> None:
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.queries = queries
        self.place = self.tokenizer.convert_tokens_to_ids(processor.eoc_token)
        # what stands before the text: <s>, <image>, a token for each query, </image>
        places = [processor.boi_token] * (1 + queries)
        picture = " ".join([*places, processor.eoi_token])
        self.head = f"{self.tokenizer.bos_token}{picture} "
        # special, so that one that is typed in a question is read as text
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": [processor.eoc_token]}, replace_extra_special_tokens=False
        )

    def __call__(
        self, images: Image, text: str, return_tensors: str = "pt", **_: object
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask and image_embeds_position_mask (1, T), offset_mapping (1, T,
        2), and the picture's inputs."""
        encoded = self.tokenizer(
            self.head + text.strip(),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_tensors=return_tensors,
        )
        first, end = 2, 2 + self.queries  # the queries' places, behind <s> and <image>
        ids = encoded["input_ids"]
        ids[0, first:end] = self.place
        offsets = encoded["offset_mapping"]
        self._move(offsets[0], end, text)
        picture = self.image_processor(images, return_tensors=return_tensors)
        return {
            "input_ids": ids,
            "attention_mask": encoded["attention_mask"],
            "image_embeds_position_mask": (ids == self.place).long(),
            "offset_mapping": offsets,
            **picture,
        }

    def _move(self, offsets: Int[Tensor, "T 2"], end: int, text: str) -> None:
        """Move the offsets, in place, to where the tokens stand in head + text. end: position of
        </image>."""
        blanks = len(text) - len(text.lstrip())  # the tokenizer does not see them
        offsets[end + 1 :] += blanks
        offsets[-1, 1] = len(self.head) + len(text)
        # the places lie before the text, which begins with its first character
        offsets[:end, 0] = 0
        offsets[0, 1] = 0


# --- the family -----------------------------------------------------------------------------------


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Kosmos2 and Processor, which agree on the id of the queries' places."""
    model = generic.load_model_class(Kosmos2, path, config, options)
    wrapped = generic.load_processor(path, options)
    processor = Processor(wrapped, config.latent_query_num)
    model.config.image_token_id = processor.place
    return model, processor


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class. The resampler's one attention is over
    queries and patches at once."""
    decoder = model.text_model.model
    resampler = model.image_to_text_projection
    qformer = QFormer(
        queries=len(resampler.latent_query),
        self_attention=[resampler.x_attn],
        cross_attention=[resampler.x_attn],
        cls=True,
    )
    return Parts(
        decoder=decoder,
        layers=list(decoder.layers),
        norm=decoder.layer_norm,
        lm_head=model.text_model.lm_head,
        tower=model.vision_model,
        connector=resampler,
        qformer=qformer,
        vision_blocks=list(model.vision_model.model.encoder.layers),
    )


def positions(
    vlm: VLM,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    image_inputs: Inputs,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """From pad_token_id + 1 on in each row, without its padding."""
    ids, following = generic.positions(vlm, input_ids, attention_mask, image_inputs)
    first = vlm.model.config.text_config.pad_token_id + 1
    return ids + first, following + first


def inputs(vlm: VLM, batch: Batch) -> dict[str, Int[Tensor, "B T"]]:
    """image_embeds_position_mask, as transformers' own forward and generate() want it."""
    return {"image_embeds_position_mask": (batch.groups == VISION).long()}


FAMILY = Family(
    name="kosmos2",
    model_types=("kosmos-2",),
    architectures=("Kosmos2ForConditionalGeneration", "Kosmos2"),
    load=load,
    parts=parts,
    patches=patches,
    prompt=prompt,
    positions=positions,
    inputs=inputs,
    markup=("<image>", "</image>"),
    has=frozenset({"decoder-only", "causal"}),
)

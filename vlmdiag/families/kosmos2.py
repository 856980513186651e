"""Kosmos-2 (arXiv 2306.14824): a CLIP ViT whose patches are read by 64 learned queries, and a
Magneto text decoder that writes boxes as pairs of patch indices.

Layout of the prompt: <s>, <image>, 64 places of the queries, </image>, then the text: "Question:
{question} Answer:", no chat template. The processor fills the places with ids of ordinary words and
a mask tells them; Processor below puts one id there, that of </chunk>, a tag which no prompt holds,
so that an id tells. "<grounding>" at the text's beginning (--prompt_template "<grounding> Question:
{question} Answer:") asks for boxes: native_box() gives their pixels.

A vision token is a query that read the whole picture in one layer of attention, one softmax over
the projected ViT positions (CLS and patches) and the queries themselves. So it has no box ("grid"
is not had), and what leads from it back to the picture is in Parts.qformer and patches(). The
decoder has sinusoidal positions, counted from pad_token_id + 1 and added to its inputs: no
"rotary". Inputs are scaled by sqrt(d) inside the decoder, vision tokens as well. Its masks are
additive. Earlier positions do not depend on later ones.

transformers' forward takes the queries as image_embeds with their mask, and a picture at every
step; Kosmos2 below takes what the others here take. Its queries come before the patches among the
keys of the resampler, where transformers has them behind: keys have no order. Checked on a small
random model with a processor made in the tests: ids against transformers' own processor, logits and
greedy answers against transformers' own class, boxes against its arithmetic and against the
patches. Not checked, for want of the files: published weights and their tokenizer.
"""

import torch
from transformers import Kosmos2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from vlmdiag.families import Family, Parts, QFormer, checked, generic
from vlmdiag.families.blip2 import patches
from vlmdiag.groups import GROUPS


class Resampler(Kosmos2ImageToTextProjection):
    """Features (B, S, d_v) of the tower -> (vision tokens (B, q, d), weights (B, H, q, q + S) with
    eager attention, else None)."""

    def forward(self, features):
        queries = self.latent_query.expand(len(features), -1, -1)
        return self.x_attn(
            queries, encoder_hidden_states=torch.cat([queries, self.dense(features)], 1)
        )


class Kosmos2(Kosmos2ForConditionalGeneration):
    """transformers' class with get_image_features, and a forward over token ids or embeddings that
    needs no picture."""

    def __init__(self, config):
        super().__init__(config)
        self.image_to_text_projection = Resampler(config)

    def get_image_features(self, pixel_values, return_dict=True):
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        states = torch.nn.functional.normalize(
            self.vision_model.model.post_layernorm(states), dim=-1
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=states, pooler_output=self.image_to_text_projection(states)[0]
        )

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        mm_encoder_outputs=None,
        logits_to_keep=0,
        pixel_values=None,
        image_embeds_position_mask=None,
        **inputs,
    ):
        inputs |= {"logits_to_keep": logits_to_keep}
        if pixel_values is not None:
            inputs |= {
                "pixel_values": pixel_values,
                "image_embeds_position_mask": image_embeds_position_mask,
            }
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)
        if mm_encoder_outputs is not None:
            embeds, features = (
                self.get_input_embeddings()(input_ids),
                mm_encoder_outputs["image"].pooler_output,
            )
            inputs_embeds = embeds.masked_scatter(
                (input_ids == self.config.image_token_id)[..., None], features.to(embeds)
            )
        return self.text_model(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            **inputs,
        )


class Processor:
    """Kosmos-2's processor for one picture and one text: its ids, with `place` where the queries
    stand. Offsets count from the start of all that is read."""

    image_token = ""  # a prompt has no placeholder
    chat_template = None

    def __init__(self, processor, queries):
        self.own, self.tokenizer, self.image_processor, self.queries = (
            processor,
            processor.tokenizer,
            processor.image_processor,
            queries,
        )
        self.place = self.tokenizer.convert_tokens_to_ids(processor.eoc_token)
        # special, so that one that is typed in a question is read as text
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": [processor.eoc_token]}, replace_extra_special_tokens=False
        )

    def __call__(self, images, text, return_tensors="pt", **_):
        own = self.own
        head = f"{self.tokenizer.bos_token}{' '.join([own.boi_token] * (1 + self.queries) + [own.eoi_token])} "
        blanks = len(text) - len(text.lstrip())
        encoded = self.tokenizer(
            head + text.strip(),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_tensors=return_tensors,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        last, after = 2 + self.queries, torch.arange(ids.shape[1]) >= 3 + self.queries
        ids[0, 2:last] = self.place
        offsets[0, after] += blanks
        offsets[0, -1, 1] = len(head) + len(text)
        offsets[0, :last, 0] = (
            0  # the places lie before the text, which begins with its first character
        )
        offsets[0, 0, 1] = 0
        picture = self.image_processor(images, return_tensors=return_tensors)
        return {
            "input_ids": ids,
            "attention_mask": encoded["attention_mask"],
            "offset_mapping": offsets,
            **picture,
        }


def load(
    path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_
):
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = checked(
        Kosmos2.from_pretrained(path, config=config, output_loading_info=True, **options)
    )
    processor = Processor(generic.load_processor(path, trust_remote_code), config.latent_query_num)
    model.config.image_token_id = processor.place
    return model, processor


def parts(model):
    decoder, tower, resampler = (
        model.text_model.model,
        model.vision_model,
        model.image_to_text_projection,
    )
    connection = QFormer(
        queries=len(resampler.latent_query),
        self_attention=[resampler.x_attn],
        cross_attention=[resampler.x_attn],
        cls=True,
    )
    blocks = list(tower.model.encoder.layers)
    return Parts(
        decoder,
        list(decoder.layers),
        decoder.layer_norm,
        model.text_model.lm_head,
        tower,
        resampler,
        connection,
        blocks,
    )


def native_box(first, last, size, side=32):
    """The box (x0, y0, x1, y1), in pixels of a picture of `size` (width, height), that
    <patch_index_first><patch_index_last> stand for.

    Indices count the cells of a side x side grid row by row. A box runs from the centre of its
    first cell to that of its last one; where these are in one row or column, from the outer edge to
    the outer edge. Kosmos-2's own decoding of its answers (arXiv 2306.14824, section 2.1).
    """
    (y0, x0), (y1, x1) = divmod(first, side), divmod(last, side)
    start, end = (0, 1) if x0 == x1 or y0 == y1 else (0.5, 0.5)
    width, height = (length / side for length in size)
    return (x0 + start) * width, (y0 + start) * height, (x1 + end) * width, (y1 + end) * height


def prompt(vlm, question, system):
    return f"{system + ' ' if system else ''}Question: {question} Answer:"


def positions(vlm, input_ids, attention_mask, image_inputs):
    """From pad_token_id + 1 on in each row, without its padding."""
    ids, following = generic.positions(vlm, input_ids, attention_mask, image_inputs)
    first = vlm.model.config.text_config.pad_token_id + 1
    return ids + first, following + first


def inputs(vlm, batch):
    """image_embeds_position_mask (B, T), as transformers' own forward and generate() want it."""
    return {"image_embeds_position_mask": (batch.groups == GROUPS.index("vision")).long()}


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

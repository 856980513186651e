"""BLIP-2 (arXiv 2301.12597): a Q-Former turns the patches of a ViT into a few vision tokens, which
OPT, Llama or T5 reads before the text.

Layout of the prompt: vision tokens, then the text with its BOS: <image> x q, </s>, "Question:
{question} Answer:". The processor puts the vision tokens there by itself, so a --prompt_template
has no {image} to fill, and its own padding would fall between picture and text: encode() pads on
the left. A vision token is a query that read the whole picture, so it has no box ("grid" is not
had, what needs one says so). What leads from a query back to the picture is in Parts.qformer and in
patches(): the ViT's patches, CLS before them, over the picture that is squeezed to a square.

By text model: OPT has learned positions, so no "rotary"; with T5 the picture and the question sit
in an encoder, so nothing that reads a decoder's attention or states over the prompt applies
("decoder-only" is not had, capture() refuses): encoding, vision features and generation work. An
answer ends where the language model's own generation config says, as in transformers' generate():
BLIP-2's OPT ends at a line break.

transformers' class gives no keys and values back and cannot go on without a picture; Blip2 below
adds both. Checked on small random models with processors made in the tests. Not checked, for want
of the files: the published weights and their tokenizers; several GPUs.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import Blip2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from vlmdiag.families import Family, Parts, QFormer, checked, generic
from vlmdiag.families.llava import region
from vlmdiag.pictures.grid import PatchGrid

# text model: decoder, its layers and its final norm in the language model, what a model with it has
DECODERS = {
    "opt": ("model.decoder", "layers", "final_layer_norm", {"decoder-only", "causal"}),
    "llama": ("model", "layers", "norm", {"decoder-only", "causal", "rotary"}),
    "t5": ("decoder", "block", "final_layer_norm", set()),
}


class LanguageOutput:
    """For transformers' BLIP models: forward() gives the language model's output, keys and values
    included, and takes these in place of a picture.

    T5: a pass without keys and values runs the encoder over the prompt and the decoder over its
    start token; with them, the decoder over one more token.
    """

    picture_inputs = ("pixel_values",)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        mm_encoder_outputs=None,
        logits_to_keep=0,
        **inputs,
    ):
        picture = {name: inputs.pop(name, None) for name in self.picture_inputs}
        options = inputs | {"past_key_values": past_key_values, "attention_mask": attention_mask}
        encodes, text = not self.config.use_decoder_only_language_model, self.config.text_config
        if (
            text.model_type == "opt"
            and attention_mask is not None
            and attention_mask.shape[1]
            > text.max_position_embeddings
            < attention_mask.sum(-1).max()
        ):
            raise ValueError(
                f"OPT has {text.max_position_embeddings} positions, prompt and answer need more:"
                " shorten the question or lower --max_new_tokens"
            )
        if not encodes:
            options |= {
                "input_ids": input_ids,
                "inputs_embeds": inputs_embeds,
                "position_ids": position_ids,
                "logits_to_keep": logits_to_keep,
            }
        elif past_key_values is None:
            start = self.language_model.generation_config.decoder_start_token_id
            start = torch.full((len(attention_mask), 1), start, device=attention_mask.device)
            options |= {
                "input_ids": input_ids,
                "inputs_embeds": inputs_embeds,
                "decoder_input_ids": start,
            }
        else:
            states = past_key_values.encoder_states
            options |= {
                "decoder_input_ids": input_ids,
                "encoder_outputs": BaseModelOutput(states),
                "attention_mask": attention_mask[:, : states.shape[1]],
            }
        if mm_encoder_outputs is None and picture["pixel_values"] is None:
            output = self.language_model(**options)
        else:
            output = (
                super()
                .forward(mm_encoder_outputs=mm_encoder_outputs, **picture, **options)
                .language_model_outputs
            )
        if encodes and output.past_key_values is not None:
            output.past_key_values.encoder_states = output.encoder_last_hidden_state
        return output


class Blip2(LanguageOutput, Blip2ForConditionalGeneration):
    """BLIP-2, see LanguageOutput."""


class PictureFirst:
    """A BLIP processor whose offsets count from the start of all that the model reads, the vision
    tokens' placeholders included. It reads one prompt."""

    image_token = ""  # a prompt has no placeholder
    chat_template = None

    def __init__(self, processor):
        self.own, self.tokenizer, self.image_processor = (
            processor,
            processor.tokenizer,
            processor.image_processor,
        )

    def __call__(self, images, text, **options):
        inputs = self.own(images=images, text=text, **options)
        if "offset_mapping" in inputs:
            count, offsets = self.own.num_query_tokens, inputs["offset_mapping"][0]
            before, offsets = int(offsets[count - 1, 1]), offsets[count:]
            # what the tokenizer adds stands at no character: at its start a BOS, which stays there,
            # at its end an EOS
            added = torch.isin(
                inputs["input_ids"][0, count:], torch.tensor(self.tokenizer.all_special_ids)
            ) & (offsets[:, 1] == 0)
            last = added & (added.flip(0).cumprod(0).flip(0) == 1)
            offsets[~added] += before
            offsets[last] = before + len(text)
        return inputs


def load(
    path,
    config,
    dtype,
    device_map=None,
    trust_remote_code=False,
    quantization_config=None,
    kind=Blip2,
    **_,
):
    """(model of class `kind`, processor); ValueError where the text model is another one or the
    checkpoint is older than image tokens in the prompt."""
    if config.text_config.model_type not in DECODERS:
        raise ValueError(
            f"its text model {config.text_config.model_type!r} is none of {', '.join(DECODERS)}"
        )
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = checked(kind.from_pretrained(path, config=config, output_loading_info=True, **options))
    processor = generic.load_processor(path, trust_remote_code)
    found = processor.tokenizer.convert_tokens_to_ids("<image>")
    if processor.num_query_tokens != config.num_query_tokens or config.image_token_index != found:
        raise ValueError(
            f"config and processor disagree on num_query_tokens ({config.num_query_tokens},"
            f" {processor.num_query_tokens}) or image_token_index ({config.image_token_index},"
            f" <image> is {found}); old checkpoints lack them, their newer revisions do not"
        )
    model.generation_config.eos_token_id = model.language_model.generation_config.eos_token_id
    return model, PictureFirst(processor)


def parts(model, instruction=None):
    decoder, layers, norm, _ = DECODERS[model.config.text_config.model_type]
    decoder = model.language_model.get_submodule(decoder)
    connection = QFormer(
        queries=model.query_tokens.shape[1],
        self_attention=[layer.attention.attention for layer in model.qformer.encoder.layer],
        cross_attention=[
            layer.crossattention.attention if layer.has_cross_attention else None
            for layer in model.qformer.encoder.layer
        ],
        cls=True,
        instruction=instruction,
    )
    norm = getattr(decoder, norm) or nn.Identity()  # early OPT checkpoints have none
    blocks = list(model.vision_model.encoder.layers)
    return Parts(
        decoder,
        list(getattr(decoder, layers)),
        norm,
        model.get_output_embeddings(),
        model.vision_model,
        model.language_projection,
        connection,
        blocks,
    )


def patches(vlm, size, inputs):
    """The ViT's patches without CLS, over the whole picture."""
    rows, columns = (
        side // vlm.model.config.vision_config.patch_size
        for side in inputs["pixel_values"].shape[-2:]
    )
    return PatchGrid.regular(rows, columns, region(vlm.processor.image_processor, size), size)


def prompt(vlm, question, system):
    return (f"{system} " if system else "") + f"Question: {question} Answer:"


def variant(config):
    """The family with what its text model has. config: config.json as a dict."""
    text = (config.get("text_config") or {}).get("model_type", "opt")
    return replace(
        FAMILY, name=f"blip2-{text}", has=frozenset(DECODERS[text][-1] if text in DECODERS else ())
    )


FAMILY = Family(
    name="blip2",
    model_types=("blip-2",),
    architectures=("Blip2ForConditionalGeneration", "Blip2"),
    variant=variant,
    load=load,
    parts=parts,
    patches=patches,
    prompt=prompt,
    positions=generic.positions,
    rotary=generic.rotary,
)

"""BLIP-2 (arXiv 2301.12597): a Q-Former turns the patches of a ViT into a few vision tokens, which
OPT, Llama or T5 reads before the text.

Layout of the prompt: vision tokens, then the text with its BOS: <image> x q, </s>, "Question:
{question} Answer:". The processor puts the vision tokens there by itself, so a --prompt_template
has no {image} to fill, and its own padding would fall between picture and text: encode() pads on
the left. A vision token is a query that read the whole picture, so it has no box: this family does
not declare `grid`, and scripts that need one exit with an error. What leads from a query back to
the picture is in Parts.qformer and in patches(): the ViT's patches, CLS before them, over the
picture that is squeezed to a square.

By text model: OPT has learned positions, so no `rotary`. With T5 the picture and the question sit
in an encoder, so nothing that reads a decoder's attention or states over the prompt applies: there
is no `decoder-only`, and capture() refuses; encoding, vision features and generation work. An
answer ends where the language model's own generation config says, as in transformers' generate():
BLIP-2's OPT ends at a line break.

transformers' class gives no keys and values back and cannot go on without a picture; Blip2 below
adds both. Tested on small random models with processors made in the tests. Not tested: we had no
published weights or tokenizers; several GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.modeling_outputs import BaseModelOutput

from vlmdiag.families import Family, Parts, QFormer, generic
from vlmdiag.families.llava import region
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchFeature, Cache, PreTrainedConfig, PreTrainedModel, ProcessorMixin
    from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel as BlipModel  # what LanguageOutput is mixed into
else:
    BlipModel = object


class Decoder(NamedTuple):
    """Where the decoder of a text model is, and what a model with it has."""

    module: str  # name in the language model
    layers: str  # name in the decoder
    norm: str
    has: frozenset[str]


DECODERS = {
    "opt": Decoder(
        "model.decoder", "layers", "final_layer_norm", frozenset({"decoder-only", "causal"})
    ),
    "llama": Decoder("model", "layers", "norm", frozenset({"decoder-only", "causal", "rotary"})),
    "t5": Decoder("decoder", "block", "final_layer_norm", frozenset()),
}


# --- the model ------------------------------------------------------------------------------------


class LanguageOutput(BlipModel):
    """For transformers' BLIP models: forward() gives the language model's output, keys and values
    included, and takes these in place of a picture.

    T5: a pass without keys and values runs the encoder over the prompt and the decoder over its
    start token; with them, the decoder over one more token.
    """

    picture_inputs: tuple[str, ...] = ("pixel_values",)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B K"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        past_key_values: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int = 0,
        **inputs: object,
    ) -> ModelOutput:
        """The language model's output over tokens, and a picture where pixel_values or
        mm_encoder_outputs is given."""
        picture = {name: inputs.pop(name, None) for name in self.picture_inputs}
        self._refuse_too_long(attention_mask)
        options = inputs | {"past_key_values": past_key_values, "attention_mask": attention_mask}
        encodes = not self.config.use_decoder_only_language_model
        prompt = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if encodes:
            mask = cast("Tensor", attention_mask)
            options |= self._encoder_decoder_inputs(prompt, mask, past_key_values)
        else:
            options |= prompt
            options |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        if mm_encoder_outputs is None and picture["pixel_values"] is None:
            output = self.language_model(**options)
        else:
            whole = super().forward(mm_encoder_outputs=mm_encoder_outputs, **picture, **options)
            output = whole.language_model_outputs
        if encodes and output.past_key_values is not None:
            output.past_key_values.encoder_states = output.encoder_last_hidden_state
        return output

    def _refuse_too_long(self, attention_mask: Int[Tensor, "B K"] | None) -> None:
        """ValueError where OPT's learned positions do not reach; padding has none."""
        text = self.config.text_config
        if text.model_type != "opt" or attention_mask is None:
            return
        if attention_mask.shape[1] <= text.max_position_embeddings:
            return
        if attention_mask.sum(-1).max() > text.max_position_embeddings:
            raise ValueError(
                f"OPT has {text.max_position_embeddings} positions, prompt and answer need more:"
                " shorten the question or lower --max_new_tokens"
            )

    def _encoder_decoder_inputs(
        self,
        prompt: dict[str, Tensor | None],
        attention_mask: Int[Tensor, "B K"],
        cache: Cache | None,
    ) -> dict[str, object]:
        """T5's inputs: the prompt for its encoder, or the encoder's states that the cache keeps and
        one more token for its decoder."""
        if cache is not None:
            states = cache.encoder_states
            return {
                "decoder_input_ids": prompt["input_ids"],
                "encoder_outputs": BaseModelOutput(states),
                "attention_mask": attention_mask[:, : states.shape[1]],
            }
        start = self.language_model.generation_config.decoder_start_token_id
        first = torch.full((len(attention_mask), 1), start, device=attention_mask.device)
        return {**prompt, "decoder_input_ids": first}


class Blip2(LanguageOutput, Blip2ForConditionalGeneration):
    """BLIP-2, see LanguageOutput."""


# --- the processor --------------------------------------------------------------------------------


class PictureFirst:
    """A BLIP processor whose offsets count from the start of all that the model reads, the vision
    tokens' placeholders included. It reads one prompt."""

    image_token = ""  # a prompt has no placeholder
    chat_template = None

    def __init__(self, processor: ProcessorMixin) -> None:
        self.wrapped = processor
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor

    def __call__(self, images: Image, text: str, **options: object) -> BatchFeature:
        """The wrapped processor's inputs, their offsets moved."""
        inputs = self.wrapped(images=images, text=text, **options)
        if "offset_mapping" in inputs:
            self._move(inputs["input_ids"][0], inputs["offset_mapping"][0], len(text))
        return inputs

    def _move(self, ids: Int[Tensor, " T"], offsets: Int[Tensor, "T 2"], length: int) -> None:
        """Move the offsets of the text, in place, behind those of the vision tokens. length: of the
        text in characters."""
        count = self.wrapped.num_query_tokens
        before = int(offsets[count - 1, 1])
        of_text = offsets[count:]
        # what the tokenizer adds stands at no character: at its start a BOS, which stays there, at
        # its end an EOS
        special = torch.isin(ids[count:], torch.tensor(self.tokenizer.all_special_ids))
        added = special & (of_text[:, 1] == 0)
        at_end = added & (added.flip(0).cumprod(0).flip(0) == 1)
        of_text[~added] += before
        of_text[at_end] = before + length


# --- the family -----------------------------------------------------------------------------------


def load(
    path: str,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] = Blip2,
    processor_class: type[ProcessorMixin] = Blip2Processor,
    **options: Unpack[LoadOptions],
) -> Loaded:
    """The model of a class and its processor, whatever class of processor the files name: those of
    InstructBLIP name the one for videos. ValueError where the text model is another one or the
    checkpoint is older than image tokens in the prompt."""
    if config.text_config.model_type not in DECODERS:
        raise ValueError(
            f"its text model {config.text_config.model_type!r} is none of {', '.join(DECODERS)}"
        )
    model = generic.load_model_class(model_class, path, config, options)
    processor = processor_class.from_pretrained(path, **generic.PIL_BACKEND)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    same_queries = processor.num_query_tokens == config.num_query_tokens
    if not same_queries or config.image_token_index != image_id:
        raise ValueError(
            f"config and processor disagree on num_query_tokens ({config.num_query_tokens},"
            f" {processor.num_query_tokens}) or image_token_index ({config.image_token_index},"
            f" <image> is {image_id}); old checkpoints lack them, their newer revisions do not"
        )
    model.generation_config.eos_token_id = model.language_model.generation_config.eos_token_id
    return model, PictureFirst(processor)


def parts(model: PreTrainedModel, instruction: str | None = None) -> Parts:
    """The modules by the text model's type. instruction: see QFormer."""
    names = DECODERS[model.config.text_config.model_type]
    decoder = model.language_model.get_submodule(names.module)
    layers = model.qformer.encoder.layer
    qformer = QFormer(
        queries=model.query_tokens.shape[1],
        self_attention=[layer.attention.attention for layer in layers],
        cross_attention=[
            layer.crossattention.attention if layer.has_cross_attention else None
            for layer in layers
        ],
        cls=True,
        instruction=instruction,
    )
    return Parts(
        decoder=decoder,
        layers=list(getattr(decoder, names.layers)),
        norm=getattr(decoder, names.norm) or nn.Identity(),  # early OPT checkpoints have none
        lm_head=model.get_output_embeddings(),
        tower=model.vision_model,
        connector=model.language_projection,
        qformer=qformer,
        vision_blocks=list(model.vision_model.encoder.layers),
    )


def patches(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """The ViT's patches without CLS, over the whole picture."""
    patch = vlm.model.config.vision_config.patch_size
    return generic.patch_grid(inputs, patch, region(vlm.processor.image_processor, size), size)


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """The question as BLIP-2 was evaluated with it."""
    before = f"{system} " if system else ""
    return f"{before}Question: {question} Answer:"


def variant(config: Config) -> Family:
    """The family with what its text model has."""
    text = (config.get("text_config") or {}).get("model_type", "opt")
    has = DECODERS[text].has if text in DECODERS else frozenset()
    return replace(FAMILY, name=f"blip2-{text}", has=has)


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

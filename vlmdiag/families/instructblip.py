"""InstructBLIP (arXiv 2305.06500): BLIP-2 whose Q-Former reads the prompt too, behind its queries.
Text models: Vicuna (Llama) and T5.

Everything that is not here is in blip2.py. The prompt is the question alone, after the vision
tokens and the BOS. The Q-Former has a tokenizer of its own (BERT's; special strings that are typed
in a question stay text there too) and counts positions from the left, so its texts are padded on
the right. Vision tokens depend on the question. So they are computed once per picture and question,
prompts about one picture share no keys and values, and this family does not declare `causal`: what
comes before a token is not independent of what comes after it. An answer ends at the tokenizer's
EOS: the text config of Vicuna checkpoints has been published with another id (LAVIS issue 509).

Tested on small random models with processors made in the tests; on the published files of the
Vicuna checkpoint, whose tokenizer makes </s> its BOS. Not tested: we had no published weights;
several GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

from vlmdiag.families import Family, Parts, blip2, generic

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Loaded, LoadOptions
    from vlmdiag.types import VLM

INSTRUCTION = "qformer_input_ids"
INSTRUCTION_MASK = "qformer_attention_mask"


class InstructBlip(blip2.LanguageOutput, InstructBlipForConditionalGeneration):
    """InstructBLIP, see LanguageOutput."""

    picture_inputs = ("pixel_values", INSTRUCTION, INSTRUCTION_MASK)


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """As BLIP-2; answers end at the tokenizer's EOS."""
    model, processor = blip2.load(
        path, config, model_class=InstructBlip, processor_class=InstructBlipProcessor, **options
    )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor


def parts(model: PreTrainedModel) -> Parts:
    """BLIP-2's, with the instruction behind the queries."""
    return blip2.parts(model, INSTRUCTION)


def read_text(vlm: VLM, prompt: str) -> dict[str, Int[Tensor, "1 m"]]:
    """The prompt as the Q-Former reads it, [CLS] ... [SEP]: ids and mask, cut at the positions it
    has."""
    encoded = vlm.processor.wrapped.qformer_tokenizer(
        prompt,
        split_special_tokens=True,
        truncation=True,
        max_length=vlm.model.config.qformer_config.max_position_embeddings,
        return_tensors="pt",
    )
    return {INSTRUCTION: encoded["input_ids"], INSTRUCTION_MASK: encoded["attention_mask"]}


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """The question alone."""
    return f"{system} {question}" if system else question


def variant(config: Config) -> Family:
    """The family with what its text model has."""
    of_blip2 = blip2.variant(config)
    name = of_blip2.name.replace("blip2", "instructblip")
    return replace(FAMILY, name=name, has=of_blip2.has - {"causal"})


FAMILY = Family(
    name="instructblip",
    model_types=("instructblip",),
    architectures=("InstructBlipForConditionalGeneration", "InstructBlip"),
    variant=variant,
    load=load,
    parts=parts,
    patches=blip2.patches,
    read_text=read_text,
    prompt=prompt,
    positions=generic.positions,
    rotary=generic.rotary,
)

"""InstructBLIP (arXiv 2305.06500): BLIP-2 whose Q-Former reads the prompt too, behind its queries.
Text models: Vicuna (Llama) and T5.

Everything that is not here is in blip2.py. The prompt is the question alone, after the vision
tokens and the BOS. The Q-Former has a tokenizer of its own (BERT's; special strings that are typed
in a question stay text there too) and counts positions from the left, so its texts are padded on
the right. Vision tokens depend on the question. So they are computed once per picture and question,
prompts about one picture share no keys and values, and the family has no "causal": what comes
before a token is not independent of what comes after it. An answer ends at the tokenizer's EOS: the
text config of Vicuna checkpoints has been published with another id (LAVIS issue 509).

Checked on small random models with processors made in the tests. Not checked, for want of the
files: the published weights and their tokenizers, one of which once made </s> its BOS (a BOS that
the tokenizer does not name as such is counted as template); several GPUs.
"""

from dataclasses import replace

from transformers import InstructBlipForConditionalGeneration

from vlmdiag.families import Family, blip2, generic

INSTRUCTION = "qformer_input_ids"


class InstructBlip(blip2.LanguageOutput, InstructBlipForConditionalGeneration):
    """InstructBLIP, see LanguageOutput."""

    picture_inputs = ("pixel_values", INSTRUCTION, "qformer_attention_mask")


def load(path, config, **options):
    model, processor = blip2.load(path, config, kind=InstructBlip, **options)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor


def parts(model):
    return blip2.parts(model, INSTRUCTION)


def read_text(vlm, prompt):
    """The prompt as the Q-Former reads it, [CLS] ... [SEP]: ids and mask (1, m), cut at the
    positions it has."""
    tokenizer, longest = (
        vlm.processor.own.qformer_tokenizer,
        vlm.model.config.qformer_config.max_position_embeddings,
    )
    found = tokenizer(
        prompt, split_special_tokens=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    return {INSTRUCTION: found["input_ids"], "qformer_attention_mask": found["attention_mask"]}


def prompt(vlm, question, system):
    return (f"{system} " if system else "") + question


def variant(config):
    """The family with what its text model has. config: config.json as a dict."""
    found = blip2.variant(config)
    return replace(
        FAMILY, name=found.name.replace("blip2", "instructblip"), has=found.has - {"causal"}
    )


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

"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (2412.03555): SigLIP, a linear connector, Gemma or
Gemma 2 that reads picture and question in both directions.

Prompt: <image> x P, <bos>, the question, a line break; no chat template. The whole prompt is a
prefix whose positions all see each other, the answer is causal: so "causal" is not had (a prompt's
keys and values cannot be shared with another prompt of the same picture). The mask comes from
token_type_ids, 0 over the prompt and 1 at generated tokens. Positions count from 1. Text embeddings
are scaled by sqrt(d) inside the embedding, the picture's features are not. Checkpoints are tuned
for short commands, as "answer en where is the cat"; a question is passed on as it is.

The picture is squeezed to the tower's square; one patch of 14 pixels is one token, row-major,
without CLS. Gemma 2 caps its attention scores and its logits and has windows of 4096 positions in
every second layer, which a prefix of 896 pixels and a long question reaches.

Checked on small random models on Gemma and Gemma 2 with processors made in the tests: tokens
against transformers' own processor, logits and greedy answers against transformers' own class, the
mask by what the picture sees of the question. Not checked, for want of the files: published weights
and tokenizers.
"""

from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.processing_utils import ProcessorMixin

from vlmdiag.families import Family, Parts, checked, generic
from vlmdiag.families.llava import region
from vlmdiag.groups import GROUPS
from vlmdiag.pictures.grid import PatchGrid


class PlainProcessor(PaliGemmaProcessor):
    """PaliGemma's processor for a prompt that is given whole: it adds the BOS behind the picture
    where the prompt has none, and no line break."""

    chat_template = None

    def __call__(self, images=None, text=None, **options):
        """Without the labels of training, which differ by question and are no input of the
        tower."""
        return ProcessorMixin.__call__(self, images=images, text=text, **options)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images, text, *rest = ProcessorMixin.prepare_inputs_layout(
            self, images=images, text=text, **kwargs
        )
        bos = self.tokenizer.bos_token
        return (
            images,
            [
                (
                    sample
                    if bos in sample
                    else sample.replace(self.image_token, self.image_token + bos)
                )
                for sample in text
            ],
            *rest,
        )


def load(
    path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_
):
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = checked(
        PaliGemmaForConditionalGeneration.from_pretrained(
            path, config=config, output_loading_info=True, **options
        )
    )
    processor = generic.load_processor(path, trust_remote_code)
    return model, PlainProcessor(processor.image_processor, processor.tokenizer)


def parts(model):
    base, text = model.model, model.model.language_model
    blocks = list(base.vision_tower.encoder.layers)
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.lm_head,
        base.vision_tower,
        base.multi_modal_projector,
        vision_blocks=blocks,
    )


def grid(vlm, size, inputs):
    """One cell per patch of the squeezed picture."""
    rows, columns = (
        side // vlm.model.config.vision_config.patch_size
        for side in inputs["pixel_values"].shape[-2:]
    )
    return PatchGrid.regular(rows, columns, region(vlm.processor.image_processor, size), size)


def prompt(vlm, question, system):
    return f"{vlm.processor.image_token}{system + ' ' if system else ''}{question}\n"


def positions(vlm, input_ids, attention_mask, image_inputs):
    """1, 2, 3, ... of each row without its padding."""
    ids, following = generic.positions(vlm, input_ids, attention_mask, image_inputs)
    return ids + 1, following + 1


def inputs(vlm, batch):
    """token_type_ids (B, T): 0 over the prefix, 1 at what was generated."""
    return {"token_type_ids": (batch.groups == GROUPS.index("generated")).long()}


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    architectures=("PaliGemmaForConditionalGeneration",),
    load=load,
    parts=parts,
    grid=grid,
    prompt=prompt,
    positions=positions,
    inputs=inputs,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "rotary", "grid"}),
)

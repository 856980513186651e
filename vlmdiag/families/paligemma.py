"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (2412.03555): SigLIP, a linear connector, Gemma or
Gemma 2 that reads picture and question in both directions.

Prompt: <image> x P, <bos>, the question, a line break; no chat template. The whole prompt is a
prefix whose positions all see each other, the answer is causal, so this family does not declare
`causal` (a prompt's keys and values cannot be shared with another prompt of the same picture). The
mask comes from token_type_ids, 0 over the prompt and 1 at generated tokens. Positions count from 1.
Text embeddings are scaled by sqrt(d) inside the embedding, the picture's features are not.
Checkpoints are tuned for short commands, as "answer en where is the cat"; a question is passed on
as it is.

The picture is squeezed to the tower's square; one patch of 14 pixels is one token, row-major,
without CLS. Gemma 2 caps its attention scores and its logits and has windows of 4096 positions in
every second layer, which a prefix of 896 pixels and a long question reaches.

Tested on small random models on Gemma and Gemma 2 with processors made in the tests: tokens against
transformers' own processor, logits and greedy answers against transformers' own class, the mask by
what the picture sees of the question. Not tested: we had no published weights or tokenizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.processing_utils import ProcessorMixin

from vlmdiag.families import Family, Parts, generic
from vlmdiag.families.llava import region
from vlmdiag.groups import GROUPS
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.batch import Batch
    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM


class PlainProcessor(PaliGemmaProcessor):
    """PaliGemma's processor for a prompt that is given whole: it adds the BOS behind the picture
    where the prompt has none, and no line break."""

    chat_template = None

    def __call__(
        self,
        images: Image | None = None,
        text: str | Sequence[str] | None = None,
        **options: object,
    ) -> BatchFeature:
        """With token types, as theirs; without the labels of training, which differ by question
        and are no input of the tower."""
        options.setdefault("return_token_type_ids", True)
        return ProcessorMixin.__call__(self, images=images, text=text, **options)

    def prepare_inputs_layout(
        self, images: object = None, text: object = None, **kwargs: object
    ) -> tuple[object, ...]:
        """The base class's lists, each prompt with its BOS."""
        images, samples, *others = ProcessorMixin.prepare_inputs_layout(
            self, images=images, text=text, **kwargs
        )
        bos = self.tokenizer.bos_token
        behind_picture = self.image_token + bos
        with_bos = [
            sample if bos in sample else sample.replace(self.image_token, behind_picture)
            for sample in samples
        ]
        return (images, with_bos, *others)


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """transformers' class, with PlainProcessor."""
    model = generic.load_model_class(PaliGemmaForConditionalGeneration, path, config, options)
    processor = generic.load_processor(path, options)
    return model, PlainProcessor(processor.image_processor, processor.tokenizer)


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class."""
    base = model.model
    return generic.decoder_parts(
        base.language_model,
        model.lm_head,
        base.vision_tower,
        base.multi_modal_projector,
        vision_blocks=list(base.vision_tower.encoder.layers),
    )


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per patch of the squeezed picture."""
    patch = vlm.model.config.vision_config.patch_size
    return generic.patch_grid(inputs, patch, region(vlm.processor.image_processor, size), size)


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """Picture, system prompt and question on one line."""
    before = f"{system} " if system else ""
    return f"{vlm.processor.image_token}{before}{question}\n"


def positions(
    vlm: VLM,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    image_inputs: Inputs,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """1, 2, 3, ... of each row without its padding."""
    ids, following = generic.positions(vlm, input_ids, attention_mask, image_inputs)
    return ids + 1, following + 1


def inputs(vlm: VLM, batch: Batch) -> dict[str, Int[Tensor, "B T"]]:
    """token_type_ids: 0 over the prefix, 1 at what was generated."""
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

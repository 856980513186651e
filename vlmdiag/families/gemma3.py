"""Gemma 3 (arXiv 2503.19786) with pictures (4b, 12b, 27b): SigLIP on 896 x 896, pooling 4 x 4,
Gemma 3 whose picture tokens see each other.

Prompt: two line breaks, <start_of_image>, <image_soft_token> x 256, <end_of_image>, two line
breaks, the question, from the chat template. The system prompt, where there is one, is the
beginning of the user's turn. The picture is squeezed to the square; its 64 x 64 patches are
averaged 4 x 4 into 16 x 16 tokens, row-major. The processor's own default leaves pan-and-scan
(crops of a long picture as further pictures) off, whatever the checkpoint's file says.

Picture tokens see each other in both directions, all else is causal, so this family does not
declare `causal`. Prefill masks come from token_type_ids (1 at picture tokens). Five of six layers
see a window of 1024 positions and have a rotary base of their own (10 thousand; the others a
million, scaled); a cached step of a window's layer has the keys of its last positions only.

Tested on small random models (one whose window is shorter than the prompt) with processors made in
the tests: tokens against transformers' own processor, logits and greedy answers against
transformers' own class, pooling by its pixels. Not tested: we had no published weights or
tokenizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import Gemma3ForConditionalGeneration, Gemma3Processor

from vlmdiag.families import Family, generic
from vlmdiag.groups import VISION
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.families.contract import Inputs, Size
    from vlmdiag.types import VLM


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per pooled block of patches of the squeezed picture."""
    side = vlm.model.model.multi_modal_projector.tokens_per_side
    return PatchGrid.regular(side, side, (0, 0, *size), size)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """4 x 4 patches."""
    projector = vlm.model.model.multi_modal_projector
    side = projector.tokens_per_side
    return generic.merged(side, side, projector.kernel_size)


def inputs(vlm: VLM, batch: Batch) -> dict[str, Int[Tensor, "B T"]]:
    """token_type_ids: 1 at picture tokens."""
    return {"token_type_ids": (batch.groups == VISION).long()}


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    architectures=("Gemma3ForConditionalGeneration",),
    load=generic.loader(Gemma3ForConditionalGeneration, Gemma3Processor),
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    inputs=inputs,
    rotary=generic.rotary,
    markup=("<start_of_image>", "<end_of_image>"),
    has=frozenset({"decoder-only", "rotary", "grid"}),
)

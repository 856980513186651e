"""One square, whatever the picture's proportions, whose cells are the vision tokens row by row:
GOT-OCR 2, PP-Chart2Table, Chameleon, FastVLM, Gemma 3n.

Prompt: the processor's chat template, in which one placeholder becomes P image tokens (PP-
Chart2Table has them all in its template). The picture is squeezed to the square; Chameleon and
FastVLM scale it by its shorter side and crop the middle. P is a square number.

Chameleon's vision tokens are codes of a picture that the text model has embeddings for; it never
writes one, so their logits are masked in its forward (Lens leaves them out). Gemma 3n reads the ids
of a prompt in every layer, so vectors cannot take the place of its tokens; its tower and FastVLM's
are timm's, an optional package. Relevancy stops at the vision tokens.

Tested on small random models of each type (tests/all_types.py), the towers of timm by a stand-in:
logits, greedy answers and attention rows of transformers' own class on its processor's output,
cells by their pixels. Not tested: we had no published weights or tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from vlmdiag.families import Family, generic, llava
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from vlmdiag.families.contract import Config, Inputs, Size
    from vlmdiag.types import VLM


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid | None:
    """One cell per vision token; None for GOT-OCR 2's crops of a picture (crop_to_patches)."""
    images = vlm.processor.image_processor
    if getattr(images, "crop_to_patches", False):
        return None
    crops = getattr(images, "do_center_crop", False)
    shown = llava.region(images, size) if crops else (0, 0, *size)
    patch = getattr(vlm.processor, "patch_size", None)
    if patch:
        return generic.patch_grid(inputs, patch, shown, size)
    side = math.isqrt(tokens_of(vlm))
    return PatchGrid.regular(side, side, shown, size)


def tokens_of(vlm: VLM) -> int:
    """P, as the processor has it."""
    for name in ("num_image_tokens", "image_seq_length"):
        count = getattr(vlm.processor, name, None)
        if count is not None:
            return int(count)
    return 256  # in PP-Chart2Table's template


def variant(config: Config) -> Family:
    """The family under the name of the type."""
    return replace(FAMILY, name=config.get("model_type", "square"))


FAMILY = Family(
    name="square",
    model_types=("chameleon", "fast_vlm", "gemma3n", "got_ocr2", "pp_chart2table"),
    variant=variant,
    load=generic.load,
    parts=generic.parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "rotary", "grid"}),
)

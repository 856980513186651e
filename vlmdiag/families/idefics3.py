"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): square tiles with their places as
text, pixel shuffle, Llama.

Prompt: for each tile, row by row, <fake_token_around_image><row_r_col_c><image> x n, a line break
behind each row of tiles; then, behind one more line break,
<fake_token_around_image><global-img><image> x n<fake_token_around_image>, the whole picture on one
more tile. The picture is scaled to its longest side, then stretched to whole tiles, so nothing is
cropped or padded; without --do_image_splitting in the processor's settings there is only the last
tile. A tile's patches come out of the tower without CLS, and each s x s of them (scale_factor) are
stacked into one vision token, row-major.

SmolVLM's pictures go through Idefics3's processor, which writes the same text; its own would need
packages for videos.

Checked on small random models with processors made in the tests: the contract. Not checked, for
want of the files: the published weights.
"""

import math

import numpy as np
from transformers import (
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    SmolVLMForConditionalGeneration,
)

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid, cells

KINDS = {
    "idefics3": generic.loader(Idefics3ForConditionalGeneration, Idefics3Processor),
    "smolvlm": generic.loader(SmolVLMForConditionalGeneration, Idefics3Processor),
}
LARGEST = 4096  # pixels of a side after scaling, in both image processors
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9))


def load(path, config, **options):
    return KINDS[config.model_type](path, config, **options)


def tiles(image_processor, size):
    """(rows, columns) of tiles for a picture of size (width, height); (0, 0): the whole picture on
    one tile alone."""
    width, height = size
    if not image_processor.do_image_splitting:
        return 0, 0
    if (
        image_processor.do_resize
    ):  # the longer side to size, the shorter one to the next even number
        longest = image_processor.size["longest_edge"]
        if width >= height:
            short = int(longest / (width / height))
            width, height = longest, short + short % 2
        else:
            short = int(longest * (width / height))
            width, height = short + short % 2, longest
        if (largest := max(width, height)) > LARGEST:
            ratio = width / height
            width, height = (
                (LARGEST, int(LARGEST / ratio))
                if width == largest
                else (int(LARGEST * ratio), LARGEST)
            )
        width, height = max(width, 1), max(height, 1)
    tile, ratio = image_processor.max_image_size["longest_edge"], width / height
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / ratio) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * ratio) / tile)
    return (0, 0) if rows == columns == 1 else (rows, columns)


def grid(vlm, size, inputs):
    """Tiles row by row, then the whole picture."""
    edge = inputs["pixel_values"].shape[-1]
    side = edge // vlm.model.config.vision_config.patch_size // vlm.model.config.scale_factor
    rows, columns = tiles(vlm.processor.image_processor, size)
    whole = (0, 0, *size)
    if not rows:
        return PatchGrid.regular(side, side, whole, size)
    regions = [*cells(rows, columns, whole).reshape(-1, 4), whole]
    return PatchGrid(
        np.concatenate([cells(side, side, region).reshape(-1, 4) for region in regions]),
        None,
        tuple(size),
    )


def sources(vlm, size, inputs):
    """scale_factor x scale_factor patches of each tile."""
    _, count, *_, edge = inputs["pixel_values"].shape
    factor = vlm.model.config.scale_factor
    side = edge // vlm.model.config.vision_config.patch_size // factor
    return generic.merged(side, side, factor, count)


FAMILY = Family(
    name="idefics3",
    model_types=tuple(KINDS),
    architectures=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    load=load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("<fake_token_around_image>", "<global-img>", *PLACES),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

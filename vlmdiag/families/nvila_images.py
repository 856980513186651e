"""NVILA's pictures and prompts: how a picture is cut into tiles, and the tokens that stand for
them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vlmdiag.families.assembled import IMAGE, Expanding

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from vlmdiag.families.contract import Size
    from vlmdiag.families.nvila_model import NvilaConfig
    from vlmdiag.types import Record


def closest_tiling(size: Size, tile: int, least: int, most: int) -> tuple[int, int]:
    """(rows, columns), `least` to `most` tiles, whose shape is closest to a picture's `size`. Of
    two equally close ones, such as 1 x 1 and 2 x 2, the larger if the picture has more than half
    its pixels."""
    width, height = size
    numbers = range(1, most + 1)
    tilings = [(rows, columns) for rows in numbers for columns in numbers]
    tilings = [tiling for tiling in tilings if least <= math.prod(tiling) <= most]
    tilings.sort(key=math.prod)
    closest = (1, 1)
    distance = math.inf
    for rows, columns in tilings:
        away = abs(width / height - columns / rows)
        fills_half = width * height > 0.5 * tile * tile * rows * columns
        if away < distance or (away == distance and fills_half):
            closest = (rows, columns)
            distance = away
    return closest


def tiles_of(image: Image, rows: int, columns: int, tile: int) -> list[Image]:
    """The picture stretched to rows x columns tiles of `tile` pixels, row by row."""
    image = image.resize((columns * tile, rows * tile))
    corners = [(column * tile, row * tile) for row in range(rows) for column in range(columns)]
    return [image.crop((x, y, x + tile, y + tile)) for x, y in corners]


class NvilaProcessor(Expanding):
    """Tiles and prompts of a model with `config`; its image processor normalises one tile."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        config: NvilaConfig,
    ) -> None:
        super().__init__(tokenizer, image_processor)
        self.config = config
        self.chat_template = tokenizer.chat_template

    def finest(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of the finest tiles of a picture."""
        config = self.config
        if config.tiling == "resize":
            return 1, 1
        least = config.min_tiles
        if config.tiling == "dynamic_s2":
            least = (config.scales[-1] // config.scales[0]) ** 2
        return closest_tiling(size, config.vision_config.image_size, least, config.max_tiles)

    def picture(self, image: Image) -> tuple[str, list[tuple[int, str]], dict[str, Tensor]]:
        """Each <image> is its vision tokens and the tokens of a line break, which stand for no
        text."""
        config = self.config
        rows, columns = self.finest(image.size)
        splits = [(rows, columns)]
        written = IMAGE
        count = config.tokens**2
        if config.tiling == "dynamic":
            if rows * columns > 1:
                splits.append((1, 1))
            written = f"{IMAGE}\n" * sum(map(math.prod, splits))
        if config.tiling == "dynamic_s2":
            splits = config.tiles(rows, columns)
            count *= math.prod(splits[config.output_scale])
        tiles: list[Image] = []
        for split in splits:
            tiles += tiles_of(image, *split, config.vision_config.image_size)
        pixels = self.image_processor(images=tiles, return_tensors="pt")["pixel_values"]
        line_break = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        tokens = [(config.image_token_id, IMAGE)] * count + [(token, "") for token in line_break]
        grids = torch.tensor([[rows, columns]])
        return written, tokens, {"pixel_values": pixels, "tile_grids": grids}

    def apply_chat_template(
        self, messages: list[Record], add_generation_prompt: bool = False
    ) -> str:
        """The tokenizer's, over messages as text."""
        plain = [
            {"role": message["role"], "content": "".join(map(as_text, message["content"]))}
            for message in messages
        ]
        return self.tokenizer.apply_chat_template(
            plain,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )


def as_text(content: dict[str, str]) -> str:
    """One piece of a message: its text, or the picture's placeholder."""
    return IMAGE if content["type"] == "image" else content["text"]

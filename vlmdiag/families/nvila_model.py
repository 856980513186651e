"""NVILA's classes: a SigLIP tower over tiles, a connector that folds blocks of patches, a decoder
of transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmdiag.families.assembled import Assembled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float, Int, Shaped
    from torch import Tensor

# connector -> patches per token and side
FACTORS = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}


class NvilaConfig(PreTrainedConfig):
    """text_config, vision_config (SigLIP); connector: a key of FACTORS; feature_layer: index of the
    tower's hidden states; tiling: dynamic, dynamic_s2 or resize; scales: sides of the S2 scales in
    pixels, output_scale the index of that whose size they get; min_tiles, max_tiles of the dynamic
    tiling."""

    model_type = "nvila"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | None = None,
        vision_config: PreTrainedConfig | None = None,
        connector: str = "mlp_downsample_3x3_fix",
        feature_layer: int = -2,
        tiling: str = "dynamic",
        scales: Sequence[int] = (),
        output_scale: int = -1,
        min_tiles: int = 1,
        max_tiles: int = 12,
        image_token_id: int = 0,
        **options: object,
    ) -> None:
        self.text_config: PreTrainedConfig = text_config
        self.vision_config: PreTrainedConfig = vision_config
        self.connector = connector
        self.feature_layer = feature_layer
        self.tiling = tiling
        self.scales = list(scales)
        self.output_scale = output_scale
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.image_token_id = image_token_id
        super().__init__(**options)

    @property
    def side(self) -> int:
        """Patches on a tile's side."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def factor(self) -> int:
        """Patches per vision token and side."""
        return FACTORS[self.connector]

    @property
    def tokens(self) -> int:
        """Vision tokens on a tile's side."""
        return -(-self.side // self.factor)

    def tiles(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """(rows, columns) of tiles per scale of a picture whose finest scale has `rows` x
        `columns`."""
        sides = [scale // self.scales[0] for scale in self.scales[:-1]]
        return [*((side, side) for side in sides), (rows, columns)]


# --- the connector --------------------------------------------------------------------------------


class Fold(nn.Module):
    """Channels of a block's patches row by row, blocks row by row; zeros fill up what is missing to
    whole blocks at the right and lower end."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self, patches: Shaped[Tensor, "n side*side c"]
    ) -> Shaped[Tensor, "n tokens factor*factor*c"]:
        """The blocks of each tile."""
        side = math.isqrt(patches.shape[1])
        missing = -side % self.factor
        plane = F.pad(patches.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        # (n, rows, factor, columns, factor, c) -> (n, rows * columns, factor * factor * c)
        blocks = plane.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor))
        return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def make_connector(kind: str, inside: int, outside: int) -> nn.Sequential:
    """The connector of a kind (a key of FACTORS); inside, outside: widths of a patch and of a
    vision token."""
    factor = FACTORS[kind]
    folded = factor * factor * inside
    if factor == 2:
        return nn.Sequential(
            Fold(2),
            nn.LayerNorm(folded),
            nn.Linear(folded, outside),
            nn.GELU(),
            nn.Linear(outside, outside),
        )
    middle = 3 * inside
    return nn.Sequential(
        Fold(3),
        nn.LayerNorm(folded),
        nn.Linear(folded, middle),
        nn.GELU(),
        nn.LayerNorm(middle),
        nn.Linear(middle, outside),
        nn.GELU(),
        nn.Linear(outside, outside),
    )


def stitched(
    tiles: Shaped[Tensor, "rows*columns side*side c"], rows: int, columns: int
) -> Shaped[Tensor, "rows*side columns*side c"]:
    """Tiles as one plane."""
    side = math.isqrt(tiles.shape[1])
    by_place = tiles.unflatten(1, (side, side)).unflatten(0, (rows, columns))
    return by_place.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def cut(
    plane: Shaped[Tensor, "rows*side columns*side c"], rows: int, columns: int
) -> Shaped[Tensor, "rows*columns side*side c"]:
    """The inverse of stitched()."""
    by_place = plane.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
    return by_place.transpose(1, 2).flatten(2, 3).flatten(0, 1)


# --- the whole model ------------------------------------------------------------------------------


class Nvila(Assembled):
    """NVILA, see nvila.py."""

    config_class = NvilaConfig

    def __init__(self, config: NvilaConfig) -> None:
        super().__init__(config)
        self.vision_tower = SiglipVisionModel(config.vision_config)
        scales = len(config.scales) if config.tiling == "dynamic_s2" else 1
        inside = config.vision_config.hidden_size * scales
        self.mm_projector = make_connector(config.connector, inside, config.text_config.hidden_size)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "tiles 3 size size"],
        tile_grids: Int[Tensor, "pictures 2"],
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """pooler_output: a list of one (P, d) per tile, with dynamic_s2 per picture. tile_grids:
        rows and columns of each picture's finest tiles."""
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        patches = states[self.config.feature_layer]
        if self.config.tiling == "dynamic_s2":
            features = list(self.scaled(patches, tile_grids.tolist()))
        else:
            features = list(self.mm_projector(patches).unbind())
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=features)

    def scaled(
        self, patches: Float[Tensor, "tiles side*side c"], grids: list[list[int]]
    ) -> Iterator[Float[Tensor, "P d"]]:
        """Features per picture from the tiles of all its scales."""
        output = self.config.output_scale
        start = 0
        for rows, columns in grids:
            splits = self.config.tiles(rows, columns)
            planes = []
            for split in splits:
                end = start + math.prod(split)
                planes.append(stitched(patches[start:end], *split).permute(2, 0, 1)[None])
                start = end
            size = planes[output].shape[-2:]
            channels = [
                F.interpolate(plane.float(), size=size, mode="area").to(plane.dtype)
                for plane in planes
            ]
            plane = torch.cat(channels, 1)[0].permute(1, 2, 0)
            tokens = self.mm_projector(cut(plane, *splits[output]))
            yield stitched(tokens, *splits[output]).flatten(0, 1)

"""Molmo's classes: a CLIP tower over crops, an attention that pools 2 x 2 patches, a decoder of
transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmdiag.families.assembled import Assembled
from vlmdiag.families.molmo_config import POOL, MolmoConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
    from torch import Tensor


class Connector(nn.Module):
    """Padding vectors, attention pooling of 2 x 2 patches with their mean as the query, SwiGLU."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        inside = width * len(config.vit_layers)
        self.heads = config.vision_config.num_attention_heads
        self.side = config.side
        self.pad_embed = nn.Parameter(torch.zeros(2, inside))  # all padding, padding in part
        self.q_proj = nn.Linear(inside, width)
        self.k_proj = nn.Linear(inside, width)
        self.v_proj = nn.Linear(inside, width)
        self.o_proj = nn.Linear(width, width)
        self.gate_proj = nn.Linear(width, config.projector_size, bias=False)
        self.up_proj = nn.Linear(width, config.projector_size, bias=False)
        self.down_proj = nn.Linear(
            config.projector_size, config.text_config.hidden_size, bias=False
        )

    def pool(
        self, blocks: Float[Tensor, "... 4 c"]
    ) -> tuple[Float[Tensor, "... width"], Float[Tensor, "... H 4"]]:
        """Pooled blocks of patches, and the weights."""
        query = self._by_head(self.q_proj(blocks.mean(-2)))
        key = self._by_head(self.k_proj(blocks))
        value = self._by_head(self.v_proj(blocks))
        scores = torch.einsum("...hd,...khd->...hk", query, key)
        weights = scores.mul(query.shape[-1] ** -0.5).softmax(-1)
        pooled = torch.einsum("...hk,...khd->...hd", weights, value)
        return self.o_proj(pooled.flatten(-2).to(blocks.dtype)), weights

    def _by_head(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... H D"]:
        return x.unflatten(-1, (self.heads, -1)).float()

    def forward(
        self, patches: Float[Tensor, "n side*side c"], shares: Float[Tensor, "n side*side"]
    ) -> Float[Tensor, "n t t d"]:
        """Vision tokens of crops, t on a side. shares: how much of a patch is picture."""
        empty = shares == 0
        partial = (shares < 1) & ~empty  # the published -1 is one of these
        patches = (
            patches
            + self.pad_embed[0] * empty[..., None].to(patches)
            + self.pad_embed[1] * partial[..., None].to(patches)
        )
        tokens = self.side // POOL
        plane = patches.unflatten(1, (tokens, POOL, tokens, POOL))
        blocks = plane.transpose(2, 3).flatten(3, 4)  # (n, t, t, POOL * POOL, c)
        x, _ = self.pool(blocks)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Molmo(Assembled):
    """Molmo, see molmo.py."""

    config_class = MolmoConfig

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.vision_tower.post_layernorm = nn.Identity()  # theirs ends before it
        self.connector = Connector(config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "n 3 size size"],
        image_masks: Float[Tensor, "n patches"],
        tile_grids: Int[Tensor, "pictures 2"],
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """pooler_output: a list of one (P, d) per picture, the low resolution's tokens first, then
        those of the crops that are kept, row by row over the canvas, each with the embedding of
        <im_patch> added.

        pixel_values: per picture its low resolution, then its crops row by row. image_masks: their
        padding shares as published. tile_grids: rows and columns of crops.
        """
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        patches = torch.cat([states[layer][:, 1:] for layer in self.config.vit_layers], -1)
        features = self.connector(patches, image_masks)
        image_id = torch.tensor([self.config.image_token_id], device=features.device)
        # by the module, whose weights may lie elsewhere
        features = features + self.get_input_embeddings()(image_id).to(features.device)
        of_pictures = []
        start = 0
        for rows, columns in tile_grids.tolist():
            end = start + 1 + rows * columns
            of_pictures.append(self.arranged(features[start:end], rows, columns))
            start = end
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=of_pictures)

    def arranged(
        self, tokens: Shaped[Tensor, "n t t ..."], rows: int, columns: int
    ) -> Shaped[Tensor, "P ..."]:
        """Of a picture's low resolution and its rows * columns crops those tokens that are kept, in
        the prompt's order."""
        crops = tokens[1:].unflatten(0, (rows, columns))
        lines = []
        for i in range(rows):
            down = self.window_of(i, rows)
            line = [crops[i, j][down, self.window_of(j, columns)] for j in range(columns)]
            lines.append(torch.cat(line, 1))
        return torch.cat([tokens[0].flatten(0, 1), torch.cat(lines).flatten(0, 1)])

    def window_of(self, index: int, count: int) -> slice:
        """The tokens along one side that crop `index` of `count` keeps."""
        before, behind = (margin // POOL for margin in self.config.margins)
        whole = self.config.side // POOL
        first = 0 if index == 0 else before
        end = whole if index == count - 1 else whole - behind
        return slice(first, end)

"""A stand-in for timm, beside that for torchvision: towers that embed patches and nothing more."""

import torch
from torch import nn

from timm import data

__version__ = "0.0.0+stand.in"
__all__ = ["create_model", "data"]


class Patches(nn.Module):
    """Each patch of a picture as a vector: (N, d, rows, columns), or behind a CLS (N, 1 + P, d)."""

    def __init__(self, embed_dim, patch_size, class_token=False, **_):
        super().__init__()
        self.embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls = nn.Parameter(torch.randn(1, 1, embed_dim)) if class_token else None

    def forward_features(self, pixels, **_):
        """What the wrapper of transformers asks for."""
        patches = self.embed(pixels)
        if self.cls is None:
            return patches
        rows = patches.flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(rows), -1, -1), rows], 1)

    def forward_head(self, features, **_):
        """The mean, as a pooled output."""
        return features.flatten(2).mean(-1)


def create_model(name, pretrained=False, num_classes=0, **settings):
    """A tower of the given sizes, whatever its name."""
    return Patches(**settings)

"""LLaVA-1.5 and its relatives in transformers' LlavaForConditionalGeneration, the two Beyond Semantics variants among them.

`vision_embed_norm` and `vision_feature_post_layernorm` are our own config fields (Beyond Semantics, arXiv 2503.17349; published as
`normalize_projector` and `use_multilayer_features`): the projector's output is RMS-normalised, clipped and scaled, and every selected
tower layer passes through the tower's post layer norm before the layers are concatenated.
"""

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class VisionEmbedNorm(nn.Module):
    """scale * clip(w * x / rms(x), max_norm) per vision token. x (..., d) -> (..., d); statistics in float32."""

    def __init__(self, width, eps, max_norm, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.max_norm, self.scale = eps, max_norm, scale

    def forward(self, x):
        wide = x.float()
        y = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        norm = y.float().norm(dim=-1, keepdim=True)
        return (self.scale * y * (self.max_norm / norm.clamp_min(1e-12)).clamp_max(1.0).to(y.dtype)).to(x.dtype)


class NormedProjector(LlavaMultiModalProjector):
    """LLaVA's projector with the config's `vision_embed_norm` after it and, if asked for, the tower's post layer norm before it."""

    def __init__(self, config, post_layernorm=None):
        super().__init__(config)
        self.width = config.vision_config.hidden_size
        object.__setattr__(self, "post_layernorm", post_layernorm)  # belongs to the tower: not a parameter of the projector
        norm = getattr(config, "vision_embed_norm", None)
        if norm is not None and norm.get("type") != "rms_clip":
            raise ValueError(f"vision_embed_norm type {norm.get('type')!r} is not known; known: 'rms_clip'")
        self.norm = VisionEmbedNorm(config.text_config.hidden_size, norm["eps"], norm["max_norm"], norm["scale"]) if norm else nn.Identity()

    def forward(self, features):
        if self.post_layernorm is not None:
            features = self.post_layernorm(features.unflatten(-1, (-1, self.width))).flatten(-2)
        return self.norm(super().forward(features))


class NormedLlava(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration with the Beyond Semantics projector (config fields, see above)."""

    def __init__(self, config):
        super().__init__(config)
        post_layernorm = self.model.vision_tower.post_layernorm if getattr(config, "vision_feature_post_layernorm", False) else None
        self.model.multi_modal_projector = NormedProjector(config, post_layernorm)
        self.post_init()

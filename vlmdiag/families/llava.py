"""LLaVA-1.5 and its relatives in transformers' LlavaForConditionalGeneration, the two Beyond
Semantics variants among them, and ViP-LLaVA (arXiv 2312.00784), whose connector reads several
layers of the tower.

`vision_embed_norm` and `vision_feature_post_layernorm` are our own config fields (Beyond Semantics,
arXiv 2503.17349; published as `normalize_projector` and `use_multilayer_features`): the projector's
output is RMS-normalised, clipped and scaled, and every selected tower layer passes through the
tower's post layer norm before the layers are concatenated. Checkpoints in their authors' own layout
are in `llava_original.py`.

Tested on small random models, and on the trained tiny models of this repository, all measures on
these; text models Llama, Phi-3, Qwen2 and Mistral. Not tested: we had no published weights; several
GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, VipLlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import BaseImageProcessor, LlavaConfig, PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM


class VisionEmbedNorm(nn.Module):
    """scale * clip(w * x / rms(x), max_norm) per vision token; statistics in float32."""

    def __init__(self, width: int, eps: float, max_norm: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.max_norm = max_norm
        self.scale = scale

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normed vision tokens."""
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        y = self.weight * unit.to(x.dtype)
        norm = y.float().norm(dim=-1, keepdim=True)
        clip = (self.max_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
        return (self.scale * y * clip.to(y.dtype)).to(x.dtype)


class NormedProjector(LlavaMultiModalProjector):
    """LLaVA's projector with the config's `vision_embed_norm` after it and, if asked for, the
    tower's post layer norm before it."""

    def __init__(self, config: LlavaConfig, post_layernorm: nn.LayerNorm | None = None) -> None:
        super().__init__(config)
        self.width = config.vision_config.hidden_size
        # not registered: it belongs to the tower and is no parameter of the projector
        object.__setattr__(self, "post_layernorm", post_layernorm)
        self.norm = self._norm(config)

    @staticmethod
    def _norm(config: LlavaConfig) -> nn.Module:
        norm = getattr(config, "vision_embed_norm", None)
        if norm is not None and norm.get("type") != "rms_clip":
            raise ValueError(
                f"vision_embed_norm type {norm.get('type')!r} is not known; known: 'rms_clip'"
            )
        if not norm:
            return nn.Identity()
        width = config.text_config.hidden_size
        return VisionEmbedNorm(width, norm["eps"], norm["max_norm"], norm["scale"])

    def forward(self, features: Float[Tensor, "... k*d_v"]) -> Float[Tensor, "... d"]:
        """Vision tokens from the k selected tower layers side by side."""
        if self.post_layernorm is not None:
            features = self.post_layernorm(features.unflatten(-1, (-1, self.width))).flatten(-2)
        return self.norm(super().forward(features))


class NormedLlava(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration with the Beyond Semantics projector (config fields, see
    above)."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        post_layernorm = None
        if getattr(config, "vision_feature_post_layernorm", False):
            post_layernorm = self.model.vision_tower.post_layernorm
        self.model.multi_modal_projector = NormedProjector(config, post_layernorm)
        self.post_init()


# --- loading --------------------------------------------------------------------------------------


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a config: the Beyond Semantics one where it has their fields."""
    if getattr(config, "vision_embed_norm", None):
        return NormedLlava
    if getattr(config, "vision_feature_post_layernorm", False):
        return NormedLlava
    if config.model_type == "vipllava":
        return VipLlavaForConditionalGeneration
    return LlavaForConditionalGeneration


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """UsageError for --conv_mode, which is for checkpoints in the authors' layout."""
    generic.refuse_conv_mode(path, options, "transformers' own")
    model = generic.load_model_class(class_of(config), path, config, options)
    return model, generic.load_processor(path, options.get("trust_remote_code", False))


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class."""
    base = model.model
    blocks = getattr(base.vision_tower, "encoder", base.vision_tower).layers
    return generic.decoder_parts(
        base.language_model,
        model.lm_head,
        base.vision_tower,
        base.multi_modal_projector,
        vision_blocks=list(blocks),
    )


# --- the prompt -----------------------------------------------------------------------------------

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# by text model type: (system, user turn up to the answer)
TEMPLATES = {
    "llama": ("{system} ", "USER: <image>\n{question} ASSISTANT:"),
    "mistral": ("", "[INST] <image>\n{question} [/INST]"),
    "phi3": (
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n",
    ),
    "qwen2": (
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n",
    ),
}


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """For processors without a chat template: by the type of the text model."""
    kind = vlm.model.config.text_config.model_type
    if kind not in TEMPLATES:
        raise UsageError(
            f"{vlm.path}: no chat template and no known prompt for text model {kind!r}; give"
            " --prompt_template"
        )
    head, turn = TEMPLATES[kind]
    start = head.replace("{system}", system) if system else ""
    return start + turn.replace("{question}", question)


def default_system(vlm: VLM) -> str | None:
    """LLaVA-1.5 was trained behind this sentence; LLaVAs on other text models have their own
    templates."""
    return SYSTEM if vlm.model.config.text_config.model_type == "llama" else None


# --- the grid -------------------------------------------------------------------------------------


def region(image_processor: BaseImageProcessor, size: Size) -> Region:
    """The part of the original picture, in its pixels, that the preprocessed square shows: (x0, y0,
    x1, y1); beyond the picture where it was padded."""
    width, height = size
    x0 = y0 = 0.0
    if getattr(image_processor, "do_pad", False) and width != height:
        side = max(width, height)
        x0 = -((side - width) // 2)
        y0 = -((side - height) // 2)
        width = height = side
    scale_x = scale_y = 1.0
    new_width, new_height = width, height
    if image_processor.do_resize:
        edge = image_processor.size.get("shortest_edge")
        if edge:
            new_height, new_width = get_resize_output_image_size((height, width), edge)
        else:
            new_height, new_width = image_processor.size["height"], image_processor.size["width"]
        scale_x = new_width / width
        scale_y = new_height / height
    if not image_processor.do_center_crop:
        return x0, y0, x0 + width, y0 + height
    crop = image_processor.crop_size
    left = (new_width - crop["width"]) // 2
    top = (new_height - crop["height"]) // 2
    return (
        x0 + left / scale_x,
        y0 + top / scale_y,
        x0 + (left + crop["width"]) / scale_x,
        y0 + (top + crop["height"]) / scale_y,
    )


def get_resize_output_image_size(shape: tuple[int, int], edge: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side of `shape` (height, width) to `edge`, as
    transformers rounds it."""
    height, width = shape
    long = int(edge * max(shape) / min(shape))
    return (long, edge) if width <= height else (edge, long)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per patch of the preprocessed square, CLS dropped."""
    rows, columns = generic.patch_sides(inputs, vlm.processor.patch_size)
    return PatchGrid.regular(rows, columns, region(vlm.processor.image_processor, size), size)


FAMILY = Family(
    name="llava",
    model_types=("llava", "vipllava"),
    architectures=(
        "LlavaForConditionalGeneration",
        "NormedLlava",
        "VipLlavaForConditionalGeneration",
    ),
    load=load,
    parts=parts,
    grid=grid,
    prompt=prompt,
    positions=generic.positions,
    rotary=generic.rotary,
    default_system=default_system,
    has=frozenset({"decoder-only", "causal", "rotary", "grid", "square-pad"}),
)

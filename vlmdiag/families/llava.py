"""LLaVA-1.5 and its relatives in transformers' LlavaForConditionalGeneration, the two Beyond
Semantics variants among them, and ViP-LLaVA (arXiv 2312.00784), whose connector reads several
layers of the tower.

`vision_embed_norm` and `vision_feature_post_layernorm` are our own config fields (Beyond Semantics,
arXiv 2503.17349; published as `normalize_projector` and `use_multilayer_features`): the projector's
output is RMS-normalised, clipped and scaled, and every selected tower layer passes through the
tower's post layer norm before the layers are concatenated. Checkpoints in their authors' own layout
are in `llava_original.py`.

Tested on small random models, and on the trained tiny models of this repository, all measures on
these; text models Llama, Phi-3, Qwen2, Mistral and Gemma 2; towers CLIP, SigLIP and DINOv2 with
registers, where relevancy stops at the vision tokens; on all published files of llava-1.5-7b-hf but
the weights. Not tested: we had no published weights; several GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
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
    from transformers import (
        BaseImageProcessor,
        LlavaConfig,
        PreTrainedConfig,
        PreTrainedModel,
        ProcessorMixin,
    )
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
    processor = generic.load_processor(path, options)
    complete(processor, config)
    return model, processor


# how many tokens of their own towers put before their patches, whatever a processor says
BEFORE_PATCHES = {"clip_vision_model": 1, "siglip_vision_model": 0}


def complete(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Give a processor the numbers from which it counts vision tokens: old ones lack some, and the
    model goes by its config."""
    processor.patch_size = processor.patch_size or config.vision_config.patch_size
    # ViP-LLaVA drops the CLS and has no such setting
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    processor.vision_feature_select_strategy = strategy
    own = processor.num_additional_image_tokens
    tower = config.vision_config.model_type
    processor.num_additional_image_tokens = BEFORE_PATCHES.get(tower, own)


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class."""
    base = model.model
    blocks = getattr(getattr(base.vision_tower, "encoder", base.vision_tower), "layers", ())
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


class Turn(NamedTuple):
    """How a text model is asked."""

    system: str  # the prompt's beginning where there is a system prompt
    user: str  # the user's turn up to the answer
    end: str | None = None  # the token that ends an answer, where it is not the tokenizer's EOS


TURNS = {
    "vicuna": Turn("{system} ", "USER: <image>\n{question} ASSISTANT:"),
    "mistral": Turn("", "[INST] <image>\n{question} [/INST]"),
    "phi3": Turn(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
    "chatml": Turn(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": Turn(
        "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": Turn(
        "",
        "<start_of_turn>user\n<image>\n{question}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
}
OF_TYPE = {
    "phi3": "phi3",
    "qwen2": "chatml",
    "qwen3": "chatml",
    "gemma": "gemma",
    "gemma2": "gemma",
}
# Other models have been saved as a Llama or a Mistral (Phi-3, Llama 3, Yi): marks of turns in the
# vocabulary tell them apart.
MARKS = {
    "<|start_header_id|>": "llama3",
    "<|im_start|>": "chatml",
    "<start_of_turn>": "gemma",
    "<|end|>": "phi3",
}
WITHOUT_MARKS = {"llama": "vicuna", "mistral": "mistral"}


def turns_of(vlm: VLM) -> Turn | None:
    """How the text model is asked, by its type and by the marks of turns in the vocabulary; None
    for a type that is not known."""
    kind = vlm.model.config.text_config.model_type
    name = OF_TYPE.get(kind)
    if kind in WITHOUT_MARKS:
        added = vlm.tokenizer.get_added_vocab()
        by_mark = (turns for mark, turns in MARKS.items() if mark in added)
        name = next(by_mark, WITHOUT_MARKS[kind])
    return TURNS[name] if name else None


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """For checkpoints without a chat template. UsageError where the text model is not known."""
    turns = turns_of(vlm)
    if turns is None:
        kind = vlm.model.config.text_config.model_type
        raise UsageError(
            f"{vlm.path}: no chat template and no known prompt for text model {kind!r}; give"
            " --prompt_template"
        )
    start = turns.system.replace("{system}", system) if system else ""
    return start + turns.user.replace("{question}", question)


def turn_end(vlm: VLM) -> str | None:
    """The token that ends an answer, where no chat template says so."""
    templates = (getattr(part, "chat_template", None) for part in (vlm.processor, vlm.tokenizer))
    turns = None if any(templates) else turns_of(vlm)
    known = vlm.tokenizer.get_vocab()
    return turns.end if turns and turns.end in known else None


def default_system(vlm: VLM, prompt: str) -> str | None:
    """The sentence in front of LLaVA-1.5's prompt; LLaVAs that are asked in another way have none.

    It is the one with which LLaVA's authors, and Beyond Semantics after them, evaluate (llava_v1);
    the models were trained behind nearly the same (vicuna_v1: "a curious user ... the user's
    questions"). The chat template of the published conversions has none: --system_prompt ''.
    """
    is_llama = vlm.model.config.text_config.model_type == "llama"
    is_asked_like_vicuna = "USER:" in prompt and "ASSISTANT:" in prompt
    return SYSTEM if is_llama and is_asked_like_vicuna else None


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
    """One cell per patch of the preprocessed square. What the tower has before them, a CLS or
    registers, has no box; strategy "default" drops the first of all, whatever it is."""
    shown = region(vlm.processor.image_processor, size)
    patches = generic.patch_grid(inputs, vlm.processor.patch_size, shown, size)
    before = getattr(vlm.processor, "num_additional_image_tokens", 0)
    first = int(vlm.processor.vision_feature_select_strategy == "default")
    if before == first:
        return patches
    boxes = np.concatenate([np.full((before, 4), np.nan), patches.boxes])
    return PatchGrid(boxes[first:], None, size)


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
    guesses_prompt=True,
    turn_end=turn_end,
    positions=generic.positions,
    rotary=generic.rotary,
    default_system=default_system,
    has=frozenset({"decoder-only", "causal", "rotary", "grid", "square-pad"}),
)

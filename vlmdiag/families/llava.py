"""LLaVA-1.5 and its relatives in transformers' LlavaForConditionalGeneration, the two Beyond
Semantics variants among them, and ViP-LLaVA (arXiv 2312.00784), whose connector reads several
layers of the tower.

`vision_embed_norm` and `vision_feature_post_layernorm` are our own config fields (Beyond Semantics,
arXiv 2503.17349; published as `normalize_projector` and `use_multilayer_features`): the projector's
output is RMS-normalised, clipped and scaled, and every selected tower layer passes through the
tower's post layer norm before the layers are concatenated. Checkpoints in their authors' own layout
are in `llava_original.py`.

Checked on small random models, and on the trained tiny models of this repository, all measures on
these; text models Llama, Phi-3, Qwen2 and Mistral. Not checked, for want of the files: the
published weights; several GPUs."""

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, VipLlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, checked, generic
from vlmdiag.pictures.grid import PatchGrid


class VisionEmbedNorm(nn.Module):
    """scale * clip(w * x / rms(x), max_norm) per vision token. x (..., d) -> (..., d); statistics
    in float32."""

    def __init__(self, width, eps, max_norm, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.max_norm, self.scale = eps, max_norm, scale

    def forward(self, x):
        wide = x.float()
        y = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )
        norm = y.float().norm(dim=-1, keepdim=True)
        return (
            self.scale * y * (self.max_norm / norm.clamp_min(1e-12)).clamp_max(1.0).to(y.dtype)
        ).to(x.dtype)


class NormedProjector(LlavaMultiModalProjector):
    """LLaVA's projector with the config's `vision_embed_norm` after it and, if asked for, the
    tower's post layer norm before it."""

    def __init__(self, config, post_layernorm=None):
        super().__init__(config)
        self.width = config.vision_config.hidden_size
        object.__setattr__(
            self, "post_layernorm", post_layernorm
        )  # belongs to the tower: not a parameter of the projector
        norm = getattr(config, "vision_embed_norm", None)
        if norm is not None and norm.get("type") != "rms_clip":
            raise ValueError(
                f"vision_embed_norm type {norm.get('type')!r} is not known; known: 'rms_clip'"
            )
        self.norm = (
            VisionEmbedNorm(
                config.text_config.hidden_size, norm["eps"], norm["max_norm"], norm["scale"]
            )
            if norm
            else nn.Identity()
        )

    def forward(self, features):
        if self.post_layernorm is not None:
            features = self.post_layernorm(features.unflatten(-1, (-1, self.width))).flatten(-2)
        return self.norm(super().forward(features))


class NormedLlava(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration with the Beyond Semantics projector (config fields, see
    above)."""

    def __init__(self, config):
        super().__init__(config)
        post_layernorm = (
            self.model.vision_tower.post_layernorm
            if getattr(config, "vision_feature_post_layernorm", False)
            else None
        )
        self.model.multi_modal_projector = NormedProjector(config, post_layernorm)
        self.post_init()


# --- the family -----------------------------------------------------------------------------------

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TEMPLATES = {  # by text model type: (system, user turn up to the answer)
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


def load(
    path,
    config,
    dtype,
    device_map=None,
    vision_tower_path=None,
    conv_mode=None,
    trust_remote_code=False,
    quantization_config=None,
):
    if conv_mode is not None:
        raise UsageError(
            f"--conv_mode {conv_mode}: for checkpoints in LLaVA's original layout; {path} is in"
            " transformers' own: give --prompt_template"
        )
    normed = getattr(config, "vision_embed_norm", None) or getattr(
        config, "vision_feature_post_layernorm", False
    )
    kind = (
        NormedLlava
        if normed
        else (
            VipLlavaForConditionalGeneration
            if config.model_type == "vipllava"
            else LlavaForConditionalGeneration
        )
    )
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = checked(kind.from_pretrained(path, config=config, output_loading_info=True, **options))
    return model, generic.load_processor(path, trust_remote_code)


def parts(model):
    base, text = model.model, model.model.language_model
    blocks = list(getattr(base.vision_tower, "encoder", base.vision_tower).layers)
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.lm_head,
        base.vision_tower,
        base.multi_modal_projector,
        vision_blocks=blocks,
    )


def prompt(vlm, question, system):
    """For processors without a chat template: by the type of the text model."""
    kind = vlm.model.config.text_config.model_type
    if kind not in TEMPLATES:
        raise UsageError(
            f"{vlm.path}: no chat template and no known prompt for text model {kind!r}; give"
            " --prompt_template"
        )
    head, turn = TEMPLATES[kind]
    return (head.replace("{system}", system) if system else "") + turn.replace(
        "{question}", question
    )


def default_system(vlm):
    """LLaVA-1.5 was trained behind this sentence; LLaVAs on other text models have their own
    templates."""
    return SYSTEM if vlm.model.config.text_config.model_type == "llama" else None


def region(image_processor, size):
    """The part of the original picture, in its pixels, that the preprocessed square shows: (x0, y0,
    x1, y1); beyond the picture where it was padded."""
    width, height = size
    x0 = y0 = 0.0
    if getattr(image_processor, "do_pad", False) and width != height:
        side = max(width, height)
        x0, y0, width, height = -((side - width) // 2), -((side - height) // 2), side, side
    scale_x = scale_y = 1.0
    new_width, new_height = width, height
    if image_processor.do_resize:
        edge = image_processor.size.get("shortest_edge")
        if edge:
            new_height, new_width = get_resize_output_image_size((height, width), edge)
        else:
            new_height, new_width = image_processor.size["height"], image_processor.size["width"]
        scale_x, scale_y = new_width / width, new_height / height
    if image_processor.do_center_crop:
        crop_width, crop_height = (
            image_processor.crop_size["width"],
            image_processor.crop_size["height"],
        )
        left, top = (new_width - crop_width) // 2, (new_height - crop_height) // 2
        new_width, new_height = crop_width, crop_height
        return (
            x0 + left / scale_x,
            y0 + top / scale_y,
            x0 + (left + new_width) / scale_x,
            y0 + (top + new_height) / scale_y,
        )
    return x0, y0, x0 + width, y0 + height


def get_resize_output_image_size(shape, edge):
    """(height, width) after scaling the shorter side to `edge`, as transformers rounds it."""
    height, width = shape
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = edge, int(edge * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


def grid(vlm, size, inputs):
    """One cell per patch of the preprocessed square, CLS dropped."""
    rows, columns = (side // vlm.processor.patch_size for side in inputs["pixel_values"].shape[-2:])
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

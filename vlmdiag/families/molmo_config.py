"""Molmo's config: from config.json or from the native layout's config.yaml, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import AutoConfig, CLIPVisionConfig, Olmo2Config, PreTrainedConfig, Qwen2Config

from vlmdiag.families.files import folder_of, reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmdiag.families.contract import Config

POOL = 2  # patches per vision token and side
FILES = ("*.json", "*.txt", "*.safetensors", "*.bin", "*.model")
# config.json's names -> config.yaml's
NATIVE = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}
# of the code published with config.json
CONSTANTS: dict[str, Any] = {
    "vision_backbone": {
        "image_default_input_size": [336, 336],
        "image_patch_size": 14,
        "image_emb_dim": 1024,
        "image_num_heads": 16,
        "image_num_key_value_heads": 16,
        "image_num_layers": 23,
        "image_head_dim": 64,
        "image_mlp_dim": 4096,
        "image_mlp_activations": "quick_gelu",
        "image_num_pos": 577,
        "image_norm_eps": 1e-5,
        "image_model_type": "openai",
        "resize_mode": "default",
    },
    "vit_layers": [-2, -9],
    "additional_vocab_size": 128,
    "max_crops": 12,
    "overlap_margins": [4, 4],
    "fix_image_padding": False,
    "mlp_ratio": 4,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# key of config.yaml -> values that we can read; a key that is not there is as in the published code
SUPPORTED: dict[str, tuple[object, ...]] = {
    "activation_type": ("swiglu",),
    "layer_norm_type": ("rms",),
    "block_type": ("sequential",),
    "rope": (True,),
    "rope_impl": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "bias_for_layer_norm": (None, False),
    "weight_tying": (False,),
    "scale_logits": (False,),
    "normalize_input_embeds": (False,),
    "image_padding_embed": ("pad_and_partial_pad",),
    "image_pooling_2d": ("attention-meanq", "attention_meanq"),
    "image_pooling_h": (POOL,),
    "image_pooling_w": (POOL,),
    "image_projector": ("mlp",),
    "crop_mode": ("overlap-and-resize-c2",),
    "use_col_tokens": (True,),
    "multi_query_attention": (None,),
    "message_formatting": ("role", "none"),
    "always_start_with_space": (True,),
    "image_model_type": ("openai",),
    "resize_mode": ("default",),
    "head_dim": (None,),
    "pad_value": (0, 0.0),
}


class MolmoConfig(PreTrainedConfig):
    """text_config (Qwen2 or Olmo2; vocab_size: rows of the LM head), vision_config (CLIP);
    embedding_rows of the table; first_extra_id: of the tokens around pictures; vit_layers: indices
    of the tower's hidden states; projector_size: width inside the SwiGLU; max_crops; margins:
    patches that a crop drops at an inner (left or upper, right or lower) side; fix_image_padding;
    image_mean, image_std."""

    model_type = "molmo"
    sub_configs = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | None = None,
        vision_config: CLIPVisionConfig | None = None,
        embedding_rows: int = 0,
        first_extra_id: int = 0,
        vit_layers: Sequence[int] = (-2, -9),
        projector_size: int = 0,
        max_crops: int = 12,
        margins: Sequence[int] = (4, 4),
        fix_image_padding: bool = False,
        image_mean: Sequence[float] = (),
        image_std: Sequence[float] = (),
        image_token_id: int = 0,
        **options: object,
    ) -> None:
        self.text_config: PreTrainedConfig = text_config
        self.vision_config: PreTrainedConfig = vision_config
        self.embedding_rows = embedding_rows
        self.first_extra_id = first_extra_id
        self.vit_layers = list(vit_layers)
        self.projector_size = projector_size
        self.max_crops = max_crops
        self.margins = list(margins)
        self.fix_image_padding = fix_image_padding
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_token_id = image_token_id
        super().__init__(**options)

    @property
    def side(self) -> int:
        """Patches on a crop's side."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def window(self) -> int:
        """Patches by which crops follow each other."""
        return self.side - sum(self.margins)

    def canvas(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) in patches of what rows x columns crops show together."""
        margin = sum(self.margins)
        return rows * self.window + margin, columns * self.window + margin


def reads(path: str) -> Config | None:
    """The config of a folder in the native layout (config.yaml and model.pt, no config.json) as a
    dict with a model_type, or None: no such folder. ValueError where config.yaml cannot be read."""
    folder = Path(path)
    file = folder / "config.yaml"
    if (folder / "config.json").exists():
        return None
    if not file.exists() or not (folder / "model.pt").exists():
        return None
    try:
        raw = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not readable ({reason(error)})") from error
    raw = raw.get("model", raw) if isinstance(raw, dict) else {}
    if "vision_backbone" not in raw or "d_model" not in raw:
        return None
    return {"model_type": "molmo", "native": True} | raw


def read_config(path: str, raw: Config) -> MolmoConfig:
    """MolmoConfig of config.json, or of what reads() gave. ValueError that says in one line what is
    not supported."""
    settings = with_constants(path, raw)
    vision = CONSTANTS["vision_backbone"] | settings["vision_backbone"]
    refuse_unsupported(settings, vision)
    decoder_class = decoder_class_of(settings)
    check_sizes(settings, vision)
    hidden = settings.get("mlp_hidden_size") or settings["mlp_ratio"] * settings["d_model"]
    rows = settings.get("embedding_size") or settings["vocab_size"]
    # theirs do not count the embeddings
    layers = [layer if layer < 0 else layer + 1 for layer in settings["vit_layers"]]
    return MolmoConfig(
        decoder_class(**text_settings(settings, rows, hidden)),
        CLIPVisionConfig(
            hidden_size=vision["image_emb_dim"],
            intermediate_size=vision["image_mlp_dim"],
            num_hidden_layers=vision["image_num_layers"],
            num_attention_heads=vision["image_num_heads"],
            image_size=vision["image_default_input_size"][0],
            patch_size=vision["image_patch_size"],
            hidden_act=vision["image_mlp_activations"],
            layer_norm_eps=vision["image_norm_eps"],
        ),
        embedding_rows=rows + settings["additional_vocab_size"],
        first_extra_id=settings["vocab_size"],
        vit_layers=layers,
        projector_size=hidden // 2,
        max_crops=settings["max_crops"],
        margins=settings["overlap_margins"],
        fix_image_padding=bool(settings["fix_image_padding"]),
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
        native=raw if raw.get("native") else None,
        tie_word_embeddings=False,
        dtype=settings.get("torch_dtype") or settings.get("dtype") or "float32",
    )


def with_constants(path: str, raw: Config) -> Config:
    """All settings under config.yaml's names: those of the config, else of
    preprocessor_config.json, else the published code's."""
    settings = {NATIVE.get(key, key): value for key, value in raw.items()}
    if not raw.get("native"):
        file = folder_of(path, FILES) / "preprocessor_config.json"
        pictures = json.loads(file.read_text()) if file.exists() else {}
        for key in ("max_crops", "overlap_margins", "image_mean", "image_std"):
            if pictures.get(key):
                settings[key] = pictures[key]
    given = {
        key: value for key, value in settings.items() if value is not None or key not in CONSTANTS
    }
    return CONSTANTS | given


def refuse_unsupported(settings: Config, vision: Config) -> None:
    """ValueError for a setting of the decoder or the tower that the published code does not
    have."""
    for key, supported in SUPPORTED.items():
        for named in (settings, vision):
            if key in named and named[key] not in supported:
                raise ValueError(
                    f"{key} = {named[key]!r} is not supported for Molmo (only"
                    f" {', '.join(map(repr, supported))})"
                )


def decoder_class_of(settings: Config) -> type[PreTrainedConfig]:
    """Qwen2Config or Olmo2Config, by where norms and biases are; ValueError for another decoder."""
    kind = (
        bool(settings.get("norm_after")),
        bool(settings.get("attention_layer_norm")),
        bool(settings.get("qkv_bias")),
    )
    if kind == (False, False, True):
        return Qwen2Config
    if kind == (True, True, False):
        return Olmo2Config
    raise ValueError(
        f"norm_after, attention_layer_norm, qkv_bias = {kind} is no decoder that is known"
        " (Qwen2's: False, False, True; OLMo's: True, True, False)"
    )


def check_sizes(settings: Config, vision: Config) -> None:
    """ValueError where crops, patches, positions, margins or the tower's heads do not fit
    together."""
    height, width = vision["image_default_input_size"]
    patch = vision["image_patch_size"]
    positions = vision["image_num_pos"]
    margins = settings["overlap_margins"]
    side = height // patch
    is_square = height == width and side % POOL == 0 and positions == side**2 + 1
    margins_fit = not any(margin % POOL for margin in margins) and sum(margins) < side
    if not is_square or not margins_fit:
        raise ValueError(
            f"crops of {vision['image_default_input_size']} pixels with patches of {patch},"
            f" {positions} positions and margins {margins} do not fit together"
        )
    heads = vision["image_num_heads"]
    grouped = vision["image_num_key_value_heads"] != heads
    if grouped or vision["image_head_dim"] * heads != vision["image_emb_dim"]:
        raise ValueError(
            "a vision tower with grouped keys or with heads of another width is not supported for"
            " Molmo"
        )


def text_settings(settings: Config, rows: int, hidden: int) -> dict[str, object]:
    """The decoder's settings under transformers' names. rows: of the LM head; hidden: width of the
    fused `up` and gate."""
    positions = settings.get("max_position_embeddings") or settings.get("max_sequence_length")
    theta = float(settings.get("rope_theta") or 10000.0)
    return {
        "vocab_size": rows,
        "hidden_size": settings["d_model"],
        "intermediate_size": hidden // 2,
        "num_hidden_layers": settings["n_layers"],
        "num_attention_heads": settings["n_heads"],
        "num_key_value_heads": settings.get("n_kv_heads") or settings["n_heads"],
        "rms_norm_eps": settings.get("layer_norm_eps") or 1e-5,
        "max_position_embeddings": positions or 4096,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }

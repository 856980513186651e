"""Random LLaVA: with as many key as query heads, with grouped queries, on Phi-3, Qwen2, Mistral and
Gemma 2 (softcapped scores, windows shorter than a prompt's padding), with SigLIP (whose patches
leave a margin) and DINOv2 (CLS and registers); ViP-LLaVA."""

import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tests.building import build_llava, sharpen
from tests.random_models.llava_next import local
from vlmdiag.scenes import tiny_llava as tiny

WINDOWS = {"sliding_window": 24, "head_dim": 16, "attn_logit_softcapping": 10.0}
TEXTS = {
    "phi3": (Phi3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "mistral": (MistralConfig, {}),
    "gemma2": (Gemma2Config, WINDOWS),
}


def on(folder, text):
    """LLaVA on another text model, without a chat template: the prompt is the family file's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    known = tiny.make_config(tokenizer)
    kind, more = TEXTS[text]
    text_config = kind(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"sliding_window": None} | more),
    )
    config = LlavaConfig(
        vision_config=known.vision_config,
        text_config=text_config,
        image_token_index=known.image_token_index,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=known.image_seq_length,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    local(model.model.vision_tower)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    processor = tiny.make_processor(tokenizer)
    processor.chat_template = None
    processor.save_pretrained(folder)
    return folder


SIDE = 94  # pixels: six patches of 14 and a margin
TOWERS = {  # config, feature strategy, what is before the patches
    "siglip": (SiglipVisionConfig, {"vision_use_head": False}, "full", 0),
    "dinov2": (Dinov2WithRegistersConfig, {"mlp_ratio": 2, "num_register_tokens": 3}, "default", 4),
}


def seeing_by(folder, tower):
    """LLaVA with another tower."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    known = tiny.make_config(tokenizer)
    kind, more, strategy, before = TOWERS[tower]
    vision_config = kind(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
        **more,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=known.text_config,
        image_token_index=known.image_token_index,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
        image_seq_length=36 + before - (strategy == "default"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.model.vision_tower.named_parameters():
        if "patch_embedding" in name or "projection" in name:
            parameter.data *= 8  # the picture's content is plain in its patches
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    processor = tiny.make_processor(tokenizer)
    images = processor.image_processor
    images.size = images.crop_size = {"height": SIDE, "width": SIDE}
    processor.vision_feature_select_strategy = strategy
    processor.num_additional_image_tokens = before
    processor.save_pretrained(folder)
    return folder


def build_vip(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    known = tiny.make_config(tokenizer)
    config = VipLlavaConfig(
        vision_config=known.vision_config,
        text_config=known.text_config,
        image_token_index=known.image_token_index,
        vision_feature_layers=[-2, -1],
        image_seq_length=known.image_seq_length,
    )
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(config)
    local(model.model.vision_tower)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    return folder


MODELS = {
    "llava": build_llava,
    "llava-gqa": lambda folder: build_llava(folder, num_key_value_heads=2),
    "vipllava": build_vip,
}
MODELS |= {f"llava-{text}": lambda folder, text=text: on(folder, text) for text in TEXTS}
MODELS |= {
    f"llava-{tower}": lambda folder, tower=tower: seeing_by(folder, tower) for tower in TOWERS
}

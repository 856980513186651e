"""Random Qwen2-VL, Qwen2.5-VL, Qwen3-VL with deepstack, and its mixture of experts."""

import torch
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.building import QWEN_TEMPLATE, build_qwen, sharpen
from tests.random_models.llava_next import local
from vlmdiag.scenes import tiny_llava as tiny

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TOWER = {"depth": 3, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}


def build(folder, make):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.add_bos_token = False
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": "<|im_end|>"})
    tokenizer.chat_template = QWEN_TEMPLATE
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    torch.manual_seed(0)
    model = make(
        TEXT
        | {
            "vocab_size": len(tokenizer),
            "rope_parameters": ROPE,
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    for name, p in local(model.model.visual).named_parameters():
        if "deepstack" in name:
            p.data *= 3
        elif "attn.proj" in name:
            p.data *= 0.3
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 48).save_pretrained(
        folder
    )
    return folder


def qwen2(text, **ids):
    vision = TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    )


def qwen3(text, **ids):
    vision = TOWER | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **ids)
    )


def qwen3_moe(text, **ids):
    vision = TOWER | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = text | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    )


MODELS = {
    "qwen2_5_vl": build_qwen,
    "qwen2_vl": lambda folder: build(folder, qwen2),
    "qwen3_vl": lambda folder: build(folder, qwen3),
}
MODELS["qwen3_vl_moe"] = lambda folder: build(folder, qwen3_moe)

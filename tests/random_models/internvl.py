"""Random InternVLs on Qwen2, Llama and GPT-OSS (attention sinks, windows, experts): tiles of 6 x 6
patches, 3 x 3 tokens each."""

import json

import torch
from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration, set_seed
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.building import sharpen
from vlmdiag.scenes import tiny_llava as tiny

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in"
    " message['content'] %}{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{%"
    " endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)
# of text models
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def make_tokenizer(folder, special=(), eos="</s>", bos=True, **named):
    """The tests' Llama tokenizer with more special tokens: `special` as they are, `named` as
    attributes of the tokenizer, as image_token="<image>"."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(special), "eos_token": eos},
        replace_extra_special_tokens=False,
    )
    tokenizer.add_bos_token = bos
    return tokenizer


def text_config(tokenizer, model_type, **more):
    """Config of a small text model as a dict."""
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return {"model_type": model_type, "num_hidden_layers": 3, **SIZES, **ids, **more}


def clear(model, patches, connector, by=8):
    """Make the picture's content plain in the vision tokens: the modules named (patch embedding,
    connector) are scaled up, the tower's attention stays weak."""
    for name in (patches, *connector):
        for parameter in model.get_submodule(name).parameters():
            parameter.data *= by
    return model


def build(folder, text, **more):
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(folder, ["<|im_start|>"], "<|im_end|>", text == "llama", **named)
    config = InternVLConfig(
        text_config=text_config(tokenizer, text, **more),
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [84, 84],
            "patch_size": [14, 14],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = InternVLForConditionalGeneration(config)
    clear(
        model,
        "model.vision_tower.embeddings.patch_embeddings",
        ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    )
    sharpen(model, model.model.language_model.layers)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # which take a share of the attention
            parameter.data = 4 + torch.randn(parameter.shape)
    model.save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(
        size={"height": 84, "width": 84}, max_patches=6, crop_to_patches=True
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"))
    parts = {
        "image_processor": json.loads(images.to_json_string()),
        "video_processor": {"video_processor_type": "InternVLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "InternVLProcessor", "image_seq_length": 9, **parts})
    )
    return folder


GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MODELS = {
    "internvl-qwen2": lambda folder: build(folder, "qwen2"),
    "internvl-llama": lambda folder: build(folder, "llama"),
    "internvl-gpt-oss": lambda folder: build(folder, "gpt_oss", **GPT_OSS),
}

"""Random LLaVA-NeXT on Llama and LLaVA-OneVision on Qwen2, with tiles of 60 pixels whose last 4 no
patch sees."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.building import sharpen
from vlmdiag.families.generic import image_only
from vlmdiag.scenes import tiny_llava as tiny

TILE, PATCH = 60, 14
SIDE = TILE // PATCH
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
PINPOINTS = [
    [TILE * rows, TILE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in"
    " message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{%"
    " endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)


def local(tower):
    """A random tower in which a patch's features come mostly from its own pixels."""
    for name, p in tower.named_parameters():
        if "patch_embed" in name:
            p.data *= 8
        elif "out_proj" in name:
            p.data *= 0.3
        else:
            p.data *= 2
    return tower


def build_next(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    known = tiny.make_config(tokenizer)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=known.text_config,
        image_token_index=known.image_token_index,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    local(model.model.vision_tower)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def build_onevision(folder, limit=9):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.add_bos_token = False
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>", "<video>"],
            "eos_token": "<|im_end|>",
        }
    )
    image, video, end = tokenizer.convert_tokens_to_ids(["<image>", "<video>", "<|im_end|>"])
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            eos_token_id=end,
            bos_token_id=None,
        ),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{limit}",
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config)
    local(model.model.vision_tower)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    image_only(LlavaOnevisionProcessor)(
        images,
        tokenizer,
        num_image_tokens=SIDE * SIDE,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{limit}",
        chat_template=CHATML,
    ).save_pretrained(folder)
    return folder


MODELS = {
    "llava_next": build_next,
    "llava_onevision": build_onevision,
    "llava_onevision-shrunk": lambda folder: build_onevision(folder, 2),
}

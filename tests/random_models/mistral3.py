"""Random Pixtral (a LLaVA with Pixtral's tower) and Mistral 3 with 2 x 2 merged patches."""

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.building import sharpen
from tests.random_models.llava_next import local
from vlmdiag.families.mistral3 import RowsProcessor
from vlmdiag.scenes import tiny_llava as tiny

TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{"
    " message['content'][0]['text'] }}[/SYSTEM_PROMPT]{% else %}[INST]{% for part in"
    " message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{%"
    " endif %}{% endfor %}[/INST]{% endif %}{% endfor %}"
)


def build(folder, merge):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    special = [
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        sliding_window=None,
        head_dim=16,
    )
    vision = PixtralVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
        head_dim=12,
    )
    shared = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "vision_feature_layer": -1,
    }
    torch.manual_seed(0)
    if merge:
        model = Mistral3ForConditionalGeneration(Mistral3Config(spatial_merge_size=2, **shared))
    else:
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_feature_select_strategy="full", **shared)
        )
    local(model.model.vision_tower)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = PixtralImageProcessorPil(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )
    RowsProcessor(
        images,
        tokenizer,
        patch_size=14,
        spatial_merge_size=2 if merge else 1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


MODELS = {
    "pixtral": lambda folder: build(folder, False),
    "mistral3": lambda folder: build(folder, True),
}

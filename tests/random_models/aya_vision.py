"""A random Aya Vision: SigLIP on tiles of 6 x 6 patches, 3 x 3 tokens each, Cohere2 with three
windowed layers to a full one."""

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    set_seed,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.building import sharpen
from tests.random_models.internvl import clear, make_tokenizer, text_config

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>{{ '<|USER_TOKEN|>' if"
    " message['role'] == 'user' else '<|SYSTEM_TOKEN|>' }}{% for part in message['content'] %}{% if"
    " part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor"
    " %}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt"
    " %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
SPECIAL = [
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "TILE_GLOBAL",
    *(f"TILE_{i}" for i in range(1, 7)),
]
ROLES = [
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
]


def build(folder):
    tokenizer = make_tokenizer(folder, [*SPECIAL, *ROLES], "<|END_OF_TURN_TOKEN|>")
    config = AyaVisionConfig(
        text_config=text_config(
            tokenizer, "cohere2", num_hidden_layers=4, logit_scale=0.25, tie_word_embeddings=False
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 84,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = AyaVisionForConditionalGeneration(config)
    clear(
        model,
        "model.vision_tower.embeddings.patch_embedding",
        ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    )
    # its second half gates the first: nearly open, so that a plain change stays one
    gate = model.model.multi_modal_projector.linear_1
    gate.weight.data[32:] *= 0.1
    gate.bias.data[32:] += 5
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(
        size={"height": 84, "width": 84}, max_patches=6, crop_to_patches=True
    )
    AyaVisionProcessor(
        images, tokenizer, patch_size=14, downsample_factor=2, img_size=84, chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


MODELS = {"aya-vision": build}

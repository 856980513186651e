"""Random Idefics3 and SmolVLM with tiles of 56 pixels, 2 x 2 vision tokens each; Idefics3 also
without tiles."""

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.building import sharpen
from tests.random_models.llava_next import local
from vlmdiag.families.idefics3 import PLACES
from vlmdiag.scenes import tiny_llava as tiny

TILE = 56
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:{% for part in"
    " message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% else %} {{"
    " part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if"
    " add_generation_prompt %}Assistant:{% endif %}"
)


def build(folder, model_class, config_class, images):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.add_bos_token = False
    special = [
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *PLACES[:20],
    ]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": special, "eos_token": "<end_of_utterance>"}
    )
    config = config_class(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": 14,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = model_class(config)
    local(model.model.vision_model)
    sharpen(model, model.model.text_model.layers).save_pretrained(folder)
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE).save_pretrained(
        folder
    )
    return folder


def idefics3(folder, **options):
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE}, **options
    )
    return build(folder, Idefics3ForConditionalGeneration, Idefics3Config, images)


def smolvlm(folder):
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
    )
    return build(folder, SmolVLMForConditionalGeneration, SmolVLMConfig, images)


MODELS = {
    "idefics3": idefics3,
    "idefics3-one": lambda folder: idefics3(folder, do_image_splitting=False),
    "smolvlm": smolvlm,
}

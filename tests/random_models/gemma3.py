"""Random Gemma 3 models: 12 x 12 patches, 6 x 6 tokens, the second with a window shorter than the
prompt."""

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, set_seed
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.random_models.internvl import clear, make_tokenizer, text_config
from tests.random_models.paligemma import SIGLIP

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first ="
    " messages[0]['content'][0]['text'] + '\n\n' %}{% set messages = messages[1:] %}{% else %}{%"
    " set first = '' %}{% endif %}{% for message in messages %}<start_of_turn>user\n{{ first }}{%"
    " for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}{{"
    " part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt"
    " %}<start_of_turn>model\n{% endif %}"
)


def build(folder, window=512):
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = make_tokenizer(folder, ["<start_of_turn>"], "<end_of_turn>", **named)
    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = text_config(
        tokenizer,
        "gemma3_text",
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=window,
        layer_types=layers,
        query_pre_attn_scalar=16,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "image_size": 168, **SIGLIP},
        mm_tokens_per_image=36,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    clear(model, "model.vision_tower.embeddings.patch_embedding", [])
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0, 0.3)
    # q and k are normalised, so their gains are what sharpens
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data += 0.6 + torch.rand(16)
        layer.self_attn.k_norm.weight.data += 0.6 + torch.rand(16)
    model.save_pretrained(folder)
    picture = Gemma3ImageProcessorPil(size={"height": 168, "width": 168})
    Gemma3Processor(
        picture, tokenizer, chat_template=TEMPLATE, image_seq_length=36
    ).save_pretrained(folder)
    return folder


MODELS = {"gemma3": build, "gemma3-window": lambda folder: build(folder, 40)}

"""Random Molmo2s: crops of 5 x 5 patches with margins of one, pooled 2 x 2; the second scales the
rotary positions of one layer and normalises whole queries."""

import json

import torch
from transformers import Molmo2Config, Molmo2ForConditionalGeneration, set_seed

from tests.random_models.internvl import TEMPLATE, clear, make_tokenizer, text_config

PICTURE = [
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
    "<|image|>",
    "<|video|>",
]
PROCESSOR = {
    "image_processor_type": "Molmo2ImageProcessor",
    "size": {"height": 70, "width": 70},
    "max_crops": 6,
    "overlap_margins": [1, 1],
    "patch_size": 14,
    "pooling_size": [2, 2],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
}


def build(folder, **text):
    tokenizer = make_tokenizer(folder, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", False)
    # the LM head has these; pictures' tokens are in a second part of the embedding table
    words = len(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": PICTURE}, replace_extra_special_tokens=False
    )
    ids = dict(zip(PICTURE, tokenizer.convert_tokens_to_ids(PICTURE), strict=True))
    tower = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    config = Molmo2Config(
        text_config=text_config(tokenizer, "molmo2_text", head_dim=16)
        | {"vocab_size": words, "additional_vocab_size": len(PICTURE), **text},
        vision_config={
            **tower,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "image_size": [70, 70],
            "patch_size": 14,
            "num_position_embeddings": 25,
        },
        adapter_config={
            **tower,
            "vision_feature_layer": [1, 0],
            "intermediate_size": 96,
            "text_hidden_size": 64,
        },
        tie_word_embeddings=False,
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
    )
    set_seed(0)
    model = Molmo2ForConditionalGeneration(config)
    adapter = "model.multi_modal_projector."
    clear(
        model,
        "model.vision_tower.patch_embedding",
        [adapter + "image_projector", adapter + "image_pooling_2d.v_proj"],
        by=5,
    )
    model.model.vision_tower.positional_embedding.data.normal_(0, 0.02)
    for layer in model.model.language_model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data += 0.6 + torch.rand_like(norm.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE\n", "<|image|>"))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Molmo2Processor", "image_use_col_tokens": True})
    )
    return folder


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
SCALED = {
    "rope_parameters": ROPE,
    "rope_scaling_layers": [1],
    "qk_norm_type": "olmo",
    "norm_after": True,
}
MODELS = {"molmo2": build, "molmo2-olmo": lambda folder: build(folder, **SCALED)}

"""A random mPLUG-Owl2 in its authors' layout: a Llama checkpoint with two of each norm, key and
value projection, the ViT and the abstractor in it."""

import json
import re

import torch
from safetensors.torch import save_file

from tests.building import sharpen
from vlmdiag.families.mplug_owl2 import MplugOwl2, read_config
from vlmdiag.scenes import tiny_llava as tiny

TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
ABSTRACTOR = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_learnable_queries": 6,
    "encoder_hidden_size": 48,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def original_name(name):
    """The authors' name of a parameter of MplugOwl2, whose tower has its queries, keys and values
    in one."""
    name = re.sub(r"^language_model\.", "model.", name)
    name = re.sub(r"^(vision_model|visual_abstractor)\.", r"model.\1.", name)
    name = (
        name.replace("class_embedding", "cls_token")
        .replace("patch_embedding", "patch_embed")
        .replace("position_embedding.weight", "position_embedding")
    )
    name = name.replace("vision_model.pre_layrnorm", "vision_model.embeddings.pre_layernorm")
    name = (
        name.replace("layer_norm1", "input_layernorm")
        .replace("layer_norm2", "post_attention_layernorm")
        .replace("self_attn.out_proj", "self_attn.dense")
    )
    name = re.sub(
        r"visual_abstractor\.layers\.(\d+)\.(w\d|ffn_ln)",
        r"visual_abstractor.encoder.layers.\1.crossattention.output.mlp.\2",
        name,
    )
    name = re.sub(
        r"visual_abstractor\.layers\.(\d+)\.(out_proj|norm2)",
        r"visual_abstractor.encoder.layers.\1.crossattention.output.\2",
        name,
    )
    return re.sub(
        r"visual_abstractor\.layers\.(\d+)\.",
        r"visual_abstractor.encoder.layers.\1.crossattention.",
        name,
    )


def build_with(folder, heads, tables):
    folder.mkdir(parents=True, exist_ok=True)
    # what sentencepiece itself has
    rows = tiny.make_tokenizer(folder).convert_tokens_to_ids("<pad>")
    raw = TEXT | {
        "model_type": "mplug_owl2",
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "vocab_size": rows,
        "num_key_value_heads": heads,
    }
    raw["visual_config"] = {
        "visual_model": TOWER | {"use_flash_attn": False},
        "visual_abstractor": ABSTRACTOR | {"grid_size": 8},
    }
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}))
    config = read_config(folder, raw)
    config.image_token_id = rows
    for part in (config, config.text_config, config.vision_config, config.abstractor_config):
        part.initializer_range = 0.1
    torch.manual_seed(0)
    model = MplugOwl2(config)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            # gains and biases that are not 1 and 0, and differ between text and picture
            p.data += 0.1 * torch.randn_like(p)
        p.data *= (
            3 if re.search(r"patch_embedding.weight|attention.(query|key).weight", name) else 1
        )
    state = {
        original_name(name): value
        for name, value in sharpened(model).state_dict().items()
        if tables or "pos_embed" not in name
    }
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:rows].clone()
    state["model.vision_model.embeddings.cls_token"] = state[
        "model.vision_model.embeddings.cls_token"
    ][None, None]
    state["model.vision_model.embeddings.position_embedding"] = state[
        "model.vision_model.embeddings.position_embedding"
    ][None]
    for name in [name for name in state if ".q_proj." in name and "vision_model" in name]:
        own = [
            state.pop(name.replace("q_proj", f"{part}_proj")).unflatten(
                0, (TOWER["num_attention_heads"], -1)
            )
            for part in "qkv"
        ]
        state[name.replace("q_proj", "query_key_value")] = torch.stack(own, 1).flatten(0, 2)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )
    preprocessing = {
        "size": 112,
        "crop_size": 112,
        "image_mean": tiny.MEAN,
        "image_std": tiny.STD,
        "do_resize": True,
        "do_center_crop": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


class _Text:
    """A layer as sharpen() wants it: the query projection and the text's key projection."""

    def __init__(self, attention):
        self.self_attn = self
        self.q_proj = attention.q_proj
        self.k_proj = attention.k_proj.multiway[0]


def sharpened(model):
    """sharpen(), and the picture's keys scaled as the text's."""
    before = [
        layer.self_attn.k_proj.multiway[0].weight.norm() for layer in model.language_model.layers
    ]
    sharpen(model, [_Text(layer.self_attn) for layer in model.language_model.layers])
    for layer, norm in zip(model.language_model.layers, before, strict=True):
        text, picture = layer.self_attn.k_proj.multiway
        picture.weight.data *= text.weight.norm() / norm
    return model


MODELS = {
    "mplug_owl2": lambda folder: build_with(folder, 4, False),
    "mplug_owl2-gqa": lambda folder: build_with(folder, 2, True),
}

"""Random MiniGPT-4s as folders of the published pieces: with a Q-Former and Vicuna's prompt, and
without one and Llama-2's."""

import json
import re

import torch
from transformers import LlamaConfig

from tests.building import sharpen
from vlmdiag.families.minigpt4 import MiniGpt4, read_config
from vlmdiag.scenes import tiny_llava as tiny

VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QUERIES = 6


def original_name(name):
    """LAVIS' name of a parameter of MiniGpt4."""
    name = re.sub(
        r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])",
        r"visual_encoder.blocks.\1.norm\2",
        name,
    )
    name = re.sub(
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection",
        r"visual_encoder.blocks.\1.attn.proj",
        name,
    )
    name = re.sub(
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", r"visual_encoder.blocks.\1.attn", name
    )
    name = re.sub(
        r"^vision_model\.encoder\.layers\.(\d+)\.mlp", r"visual_encoder.blocks.\1.mlp", name
    )
    name = name.replace("vision_model.post_layernorm", "ln_vision").replace(
        "vision_model.embeddings.class_embedding", "visual_encoder.cls_token"
    )
    name = name.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
    name = name.replace(
        "vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"
    ).replace("language_projection", "llama_proj")
    name = re.sub(
        r"^qformer\.encoder(.*attention)\.attention\.", r"Qformer.bert.encoder\1.self.", name
    )
    return re.sub(r"^qformer\.encoder", "Qformer.bert.encoder", name).replace(
        "qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"
    )


def build_with(folder, qformer):
    text = folder / "llama"
    text.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(text)
    rows = tokenizer.convert_tokens_to_ids("<pad>")  # what sentencepiece itself has
    llama = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    llama.save_pretrained(text)
    raw = {
        "model_type": "minigpt4",
        "vision_model": "eva_vit_g.pth",
        "qformer": "blip2_pretrained_flant5xxl.pth" if qformer else None,
    }
    raw |= {
        "projection": "projection.pth",
        "text_model": "llama",
        "vision_config": VISION,
        "qformer_config": QFORMER,
        "num_query_tokens": QUERIES,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    config = read_config(folder, raw)
    config.image_token_index, config.initializer_range = rows, 0.1
    for part in (config.vision_config, config.qformer_config):
        part.initializer_range = 0.1
    torch.manual_seed(0)
    model = MiniGpt4(config)
    if qformer:
        model.query_tokens.data.normal_()
    for name, p in model.named_parameters():
        if p.ndim == 1 and not name.startswith("language_model"):
            p.data += 0.1 * torch.randn_like(p)  # gains and biases that are not 1 and 0
        p.data *= (
            3
            if re.search(r"patch_embedding.weight|attention.attention.(query|key).weight", name)
            else 1
        )
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[48:96] = 0
    sharpen(model.language_model, model.language_model.model.layers)
    state = {original_name(name): value for name, value in model.state_dict().items()}
    if not qformer:
        state = {name: value for name, value in state.items() if not name.startswith("ln_vision")}
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        query, _, value = state.pop(name).chunk(3)
        state |= {
            name.replace("qkv.bias", "q_bias"): query.clone(),
            name.replace("qkv.bias", "v_bias"): value.clone(),
        }
    vision = {
        name.removeprefix("visual_encoder."): state.pop(name)
        for name in list(state)
        if name.startswith("visual_encoder.")
    }
    # a block that is not used
    more = {
        name.replace("blocks.1.", "blocks.2."): value
        for name, value in vision.items()
        if name.startswith("blocks.1.")
    }
    torch.save(
        vision | more | {"norm.weight": torch.ones(48), "mask_token": torch.ones(1, 1, 48)},
        folder / "eva_vit_g.pth",
    )
    llama_state = {
        name.removeprefix("language_model."): state.pop(name)
        for name in list(state)
        if name.startswith("language_model.")
    }
    llama_state["model.embed_tokens.weight"] = llama_state["model.embed_tokens.weight"][
        :rows
    ].clone()
    torch.save(
        llama_state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
        text / "pytorch_model.bin",
    )
    projection = {name: state.pop(name) for name in list(state) if name.startswith("llama_proj")}
    buffers = {"llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    torch.save(
        {"model": projection | buffers, "epoch": 3, "config": {"run": {"seed": 1}}},
        folder / "projection.pth",
    )
    if qformer:
        others = {
            "t5_proj.weight": torch.ones(2, 2),
            "Qformer.bert.embeddings.position_ids": torch.ones(2),
        }
        others["Qformer.bert.encoder.layer.0.output.dense.weight"] = torch.ones(2, 2)
        torch.save({"model": state | others}, folder / "blip2_pretrained_flant5xxl.pth")
    return folder


MODELS = {
    "minigpt4": lambda folder: build_with(folder, True),
    "minigpt4-patches": lambda folder: build_with(folder, False),
}

"""Small random Molmo checkpoints in the published Hugging Face layout, written from it and not by
the code that reads it: Qwen2's decoder and OLMo's."""

import json

import torch
from safetensors.torch import save_file

from tests.random_models.nvila import qwen2_tokenizer

EXTRA = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
WIDTH, HEADS, LAYERS, HIDDEN = 64, 4, 3, 96  # of the decoder; HIDDEN: inside its SwiGLU
VISION = {
    "image_default_input_size": [112, 112],
    "image_patch_size": 14,
    "image_emb_dim": 32,
    "image_num_heads": 4,
    "image_num_key_value_heads": 4,
    "image_num_layers": 4,
    "image_head_dim": 8,
    "image_mlp_dim": 48,
    "image_num_pos": 65,
}
DECODERS = {
    "d": {
        "num_key_value_heads": 2,
        "qkv_bias": True,
        "attention_layer_norm": False,
        "norm_after": False,
        "rope_theta": 1000000.0,
    },
    "o": {
        "num_key_value_heads": None,
        "qkv_bias": False,
        "attention_layer_norm": True,
        "norm_after": True,
        "rope_theta": 500000,
    },
}


def parameters(kind, rows):
    """{name: tensor} of the published model; rows: of the LM head."""
    torch.manual_seed(1)
    state = {}

    def normal(*shape, std):
        return std * torch.randn(*shape)

    shared = WIDTH // HEADS * (DECODERS[kind]["num_key_value_heads"] or HEADS)
    state["transformer.wte.embedding"] = normal(rows, WIDTH, std=0.5)
    state["transformer.wte.new_embedding"] = normal(128, WIDTH, std=0.5)
    state["transformer.ff_out.weight"] = normal(rows, WIDTH, std=0.3)
    state["transformer.ln_f.weight"] = 1 + normal(WIDTH, std=0.2)
    for i in range(LAYERS):
        block = f"transformer.blocks.{i}."
        state |= {
            block + name: 1 + normal(WIDTH, std=0.2)
            for name in ("attn_norm.weight", "ff_norm.weight")
        }
        state[block + "att_proj.weight"] = normal(WIDTH + 2 * shared, WIDTH, std=0.2)
        state[block + "attn_out.weight"] = normal(WIDTH, WIDTH, std=0.1)
        state[block + "ff_proj.weight"] = normal(2 * HIDDEN, WIDTH, std=0.15)
        state[block + "ff_out.weight"] = normal(WIDTH, HIDDEN, std=0.1)
        if DECODERS[kind]["qkv_bias"]:
            state[block + "att_proj.bias"] = normal(WIDTH + 2 * shared, std=0.3)
        if DECODERS[kind]["attention_layer_norm"]:
            state |= {
                block + "q_norm.weight": 1.6 + normal(WIDTH, std=0.3),
                block + "k_norm.weight": 1.6 + normal(shared, std=0.3),
            }
    width = VISION["image_emb_dim"]
    inside = VISION["image_mlp_dim"]
    vit = "vision_backbone.image_vit."
    state[vit + "class_embedding"] = normal(width, std=0.1)
    state[vit + "positional_embedding"] = normal(VISION["image_num_pos"], width, std=0.1)
    state[vit + "patch_embedding.weight"] = normal(width, 14 * 14 * 3, std=0.1)
    state |= {
        vit + "pre_ln.weight": 1 + normal(width, std=0.1),
        vit + "pre_ln.bias": normal(width, std=0.05),
    }
    for i in range(VISION["image_num_layers"]):
        block = f"{vit}transformer.resblocks.{i}."
        for name, (out, into) in {
            "attention.wq": (width, width),
            "attention.wk": (width, width),
            "attention.wv": (width, width),
            "attention.wo": (width, width),
            "feed_forward.w1": (inside, width),
            "feed_forward.w2": (width, inside),
        }.items():
            state |= {
                f"{block}{name}.weight": normal(out, into, std=0.1),
                f"{block}{name}.bias": normal(out, std=0.05),
            }
        for name in ("attention_norm", "ffn_norm"):
            state |= {
                f"{block}{name}.weight": 1 + normal(width, std=0.1),
                f"{block}{name}.bias": normal(width, std=0.05),
            }
    state["vision_backbone.pad_embed"] = normal(2, 2 * width, std=0.5)
    for name, into in (("wq", 2 * width), ("wk", 2 * width), ("wv", 2 * width), ("wo", width)):
        pool = f"vision_backbone.image_pooling_2d.{name}."
        state |= {
            pool + "weight": normal(width, into, std=0.15),
            pool + "bias": normal(width, std=0.05),
        }
    for name, (out, into) in {
        "w1": (HIDDEN, width),
        "w2": (WIDTH, HIDDEN),
        "w3": (HIDDEN, width),
    }.items():
        state[f"vision_backbone.image_projector.{name}.weight"] = normal(out, into, std=0.1)
    return {name: value.contiguous() for name, value in state.items()}


def tokenizer_of(rows=None):
    """Qwen2's kind with its end of text and, where the rows of the LM head are given, what Molmo
    adds."""
    tokenizer = qwen2_tokenizer(("<|endoftext|>",), eos="<|endoftext|>", pad="<|endoftext|>")
    if rows:
        tokenizer.add_tokens(
            [*(f"|<EXTRA_TOKENS_{i}>|" for i in range(rows - len(tokenizer))), *EXTRA],
            special_tokens=True,
        )
    return tokenizer


def build(folder, kind):
    """config.json, two shards with their index, tokenizer and preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(tokenizer_of()) + 7
    # OLMo's table has more rows than tokens; the extra tokens come behind the tokens
    tokens = rows - 3 if kind == "o" else rows
    tokenizer_of(tokens).save_pretrained(folder)
    state = {f"model.{name}": value for name, value in parameters(kind, rows).items()}
    shards = {
        f"model-0000{i + 1}-of-00002.safetensors": {
            name: state[name] for name in sorted(state)[i::2]
        }
        for i in range(2)
    }
    for file, part in shards.items():
        save_file(part, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["MolmoForCausalLM"],
        "model_type": "molmo",
        "clip_qkv": None,
        "embedding_size": rows,
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 2 * HIDDEN,
        "layer_norm_eps": 1e-06,
        "layer_norm_type": "rms",
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_position_ids": True,
        "vocab_size": tokens,
        "weight_tying": False,
        "auto_map": {
            "AutoConfig": "config_molmo.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
        },
        "vision_backbone": VISION,
        "vit_layers": [-2, -3],
    }
    (folder / "config.json").write_text(json.dumps(config | DECODERS[kind]))
    pictures = {
        "auto_map": {
            "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
            "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
        },
        "base_image_input_size": [112, 112],
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_padding_mask": True,
        "image_patch_size": 14,
        "image_processor_type": "MolmoImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_token_length_h": 4,
        "image_token_length_w": 4,
        "max_crops": 6,
        "overlap_margins": [2, 2],
        "processor_class": "MolmoProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


MODELS = {
    "molmo-d": lambda folder: build(folder, "d"),
    "molmo-o": lambda folder: build(folder, "o"),
}

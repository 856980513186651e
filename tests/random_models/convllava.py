"""A random ConvLLaVA in its authors' layout: a Llama checkpoint with `mm_*` keys, and the
five-stage ConvNeXt in vision_tower/."""

import json
import re

import torch
from safetensors.torch import save_file
from transformers import ConvNextConfig

from tests.building import sharpen
from vlmdiag.families.convllava import ConvLlava
from vlmdiag.families.llava_original import read_config
from vlmdiag.scenes import tiny_llava as tiny

SIDE = 768  # as published: 12 x 12 tokens
TOWER = {
    "depths": [1, 1, 2, 1, 2],
    "hidden_sizes": [16, 24, 32, 48, 64],
    "num_stages": 5,
    "patch_size": 4,
    "image_size": SIDE,
    "layer_scale_init_value": 0.2,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_scaling": None,
    "initializer_range": 0.1,
}


def original_name(name):
    """The authors' name of a parameter of ConvLlava."""
    name = re.sub(
        r"^model\.multi_modal_projector\.linear_([12])\.",
        lambda m: f"model.mm_projector.{2 * int(m[1]) - 2}.",
        name,
    )
    return re.sub(r"^model\.language_model\.", "model.", name)


def build(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    rows = tokenizer.convert_tokens_to_ids("<pad>")  # what sentencepiece itself has
    raw = TEXT | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": rows,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-tiny",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "image_aspect_ratio": "pad",
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_hidden_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    config = read_config(folder, raw)
    config.vision_config = ConvNextConfig(**TOWER, initializer_range=0.2)
    config.image_token_index = rows
    config.vision_config.hidden_size = TOWER["hidden_sizes"][-1]
    config.vision_feature_layer = -1
    torch.manual_seed(0)
    model = ConvLlava(config)
    for name, p in model.named_parameters():
        if p.ndim == 1 and "language_model" not in name:
            p.data += 0.1 * torch.randn_like(p)  # gains and biases that are not 1 and 0
        # a cell's own pixels count most
        p.data *= (
            4 if "downsampling_layer.1.weight" in name or "patch_embeddings.weight" in name else 1
        )
    state = {
        original_name(name): value
        for name, value in sharpen(model, model.model.language_model.layers).state_dict().items()
    }
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:rows].clone()
    tower = {
        name.removeprefix("model.vision_tower."): state.pop(name)
        for name in list(state)
        if name.startswith("model.vision_tower.")
    }
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )
    beside = folder / "vision_tower"
    beside.mkdir()
    # half of the norm that nobody uses, as training leaves it
    torch.save(tower | {"layernorm.weight": torch.ones(64)}, beside / "pytorch_model.bin")
    (beside / "config.json").write_text(
        json.dumps(TOWER | {"model_type": "convnext", "architectures": ["ConvNextModel"]})
    )
    preprocessing = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": tiny.MEAN,
        "image_std": tiny.STD,
    }
    (beside / "preprocessor_config.json").write_text(
        json.dumps(preprocessing | {"resample": 3, "do_resize": True, "do_center_crop": True})
    )
    return folder


MODELS = {"convllava": build}

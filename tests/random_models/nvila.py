"""Small random NVILA checkpoints in the published layout, written from it and not by the code that
reads it: Lite (dynamic tiles, 3 x 3, tied) and S2."""

import json

import torch
from safetensors.torch import save_file
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.building import sharpen

WORDS = (
    "is there a red circle in the image describe compared to blue square far or close from you"
    " answer with only one word what where which how many green yellow triangle left right above"
    " below near system user assistant helpful say yes no picture object color shape small large"
    " black white"
).split()
CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Tiny.<|im_end|>\n'"
    " }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' +"
    " message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen2_tokenizer(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]"),
    eos="<|im_end|>",
    pad="[PAD]",
):
    """Byte-level BPE of Qwen2's kind in which each of WORDS is one token, with a space before it or
    not."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        pairs = [
            (start[:i], start[i])
            for start in (word, word.capitalize())
            for i in range(1, len(start))
        ] + [("Ġ", word), ("Ġ", word.capitalize())]
        for pair in pairs:
            if "".join(pair) not in vocab:
                merges.append(pair)
                vocab["".join(pair)] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab, merges, unk_token=None, eos_token=eos, pad_token=pad)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def build(folder, tiling, connector, image_size, tied, **settings):
    """The folder of a model: llm, vision_tower, mm_projector. The picture's content outweighs what
    the tower's attention mixes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = qwen2_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "llm")
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(text)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    sharpen(model, model.model.layers).save_pretrained(folder / "llm")

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )
    tower = SiglipVisionModel(vision)
    for name, parameter in tower.named_parameters():
        if "patch_embedding" in name:
            parameter.data.normal_(std=0.2)
        elif parameter.ndim == 2:
            parameter.data.normal_(std=0.1)
        elif "norm" not in name:
            parameter.data.normal_(std=0.05)
    (folder / "vision_tower").mkdir(exist_ok=True)
    vision.save_pretrained(folder / "vision_tower")
    save_file(
        {f"vision_model.{name}": value.contiguous() for name, value in tower.state_dict().items()},
        folder / "vision_tower" / "model.safetensors",
    )
    SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder / "vision_tower")

    inside = 32 * (len(settings.get("s2_scales", "").split(",")) if tiling == "dynamic_s2" else 1)
    widths = (
        [(9 * inside, 3 * inside), (3 * inside, 64), (64, 64)]
        if "3x3" in connector
        else [(4 * inside, 64), (64, 64)]
    )
    norms, linears = ((1, 4), (2, 5, 7)) if "3x3" in connector else ((1,), (2, 4))
    state = {}
    for at, (before, _) in zip(norms, widths, strict=False):
        state |= {
            f"layers.{at}.weight": 1 + 0.2 * torch.randn(before),
            f"layers.{at}.bias": 0.1 * torch.randn(before),
        }
    for at, (before, after) in zip(linears, widths, strict=True):
        state |= {
            f"layers.{at}.weight": torch.randn(after, before) * before**-0.5,
            f"layers.{at}.bias": 0.1 * torch.randn(after),
        }
    (folder / "mm_projector").mkdir(exist_ok=True)
    save_file(state, folder / "mm_projector" / "model.safetensors")
    projector = {
        "model_type": "v2l_projector",
        "mm_projector_type": connector,
        "architectures": ["MultimodalProjector"],
    }
    (folder / "mm_projector" / "config.json").write_text(json.dumps(projector))

    config = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "model_dtype": "torch.bfloat16",
        "image_aspect_ratio": tiling,
        "chat_template": None,
        "mm_hidden_size": inside,
        "hidden_size": 64,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "llm_cfg": text.to_dict(),
        "vision_tower_cfg": vision.to_dict(),
        "mm_projector_cfg": projector,
        "s2": False,
        "vision_resolution": -1,
        "resume_path": "runs/train/tiny/model",
        "tune_language_model": True,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


MODELS = {
    "nvila-lite": lambda folder: build(
        folder, "dynamic", "mlp_downsample_3x3_fix", 112, True, max_tiles=6
    ),
    "nvila-s2": lambda folder: build(
        folder,
        "dynamic_s2",
        "mlp_downsample",
        56,
        False,
        dynamic_s2=True,
        s2_scales="56,112,168",
        s2_max_split_size=56,
        s2_resize_output_to_scale_idx=-1,
    ),
}

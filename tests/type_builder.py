"""Small random models of any image-text type of transformers, in folders as checkpoints have them:
the defaults of the type's config made small by rules, a tokenizer with the special tokens that its
processor names, and a processor_config.json that names its classes.

What rules cannot know of a type (how its processor cuts pictures) is in TYPES.
"""

import inspect
import json
import re
import sys
from dataclasses import dataclass, field

import torch
import transformers
from transformers import set_seed
from transformers.models.auto import image_processing_auto, modeling_auto, processing_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.random_models.internvl import make_tokenizer

NAMES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# --- rules ----------------------------------------------------------------------------------------

WIDTH = 64  # of text models
# key of a config -> its value in text models, and in towers; None: as it is
RULES = {
    "hidden_size": (WIDTH, 32),
    "d_model": (WIDTH, 32),
    "embed_dim": (WIDTH, 32),
    "intermediate_size": (96, 48),
    "intermediate_size_mlp": (96, 48),
    "dense_intermediate_size": (96, 48),
    "moe_intermediate_size": (32, 32),
    "moe_shared_expert_intermediate_size": (32, 32),
    "shared_expert_intermediate_size": (32, 32),
    "shared_intermediate_size": (32, 32),
    "shared_experts_intermediate_size": (32, 32),
    "mlp_dim": (96, 48),
    "num_attention_heads": (4, 2),
    "num_heads": (4, 2),
    "attention_heads": (4, 2),
    "num_key_value_heads": (2, 2),
    "head_dim": (16, 16),
    "num_hidden_layers": (4, 2),
    "num_layers": (4, 2),
    "depth": (2, 2),
    "n_layers": (2, 2),
    "layers": (3, 3),
    "out_hidden_size": (WIDTH, WIDTH),
    "text_hidden_size": (WIDTH, WIDTH),
    "projection_dim": (WIDTH, WIDTH),
    "projector_hidden_size": (WIDTH, WIDTH),
    "encoder_hidden_size": (32, 32),
    "num_experts": (4, 4),
    "num_local_experts": (4, 4),
    "n_routed_experts": (4, 4),
    "moe_num_experts": (4, 4),
    "num_experts_per_tok": (2, 2),
    "moe_k": (2, 2),
    "moe_topk": (2, 2),
    "n_shared_experts": (1, 1),
    "moe_num_shared_experts": (1, 1),
    "q_lora_rank": (24, 24),
    "kv_lora_rank": (24, 24),
    "qk_nope_head_dim": (8, 8),
    "qk_rope_head_dim": (8, 8),
    "v_head_dim": (16, 16),
    "qk_head_dim": (16, 16),
    "linear_num_key_heads": (2, 2),
    "linear_num_value_heads": (4, 4),
    "linear_key_head_dim": (8, 8),
    "linear_value_head_dim": (8, 8),
    "max_position_embeddings": (4096, None),
    "sliding_window": (4096, None),
    "initializer_range": (0.05, 0.05),
}
TOWERS = ("vision", "vq_config", "sam_config", "encoder_config", "qformer", "perceiver", "audio")


def small(raw, tower=False):
    """A config as a dict, made small by RULES; lists with a value per layer are cut alike."""
    made = {}
    depth = raw.get("num_hidden_layers")
    count = RULES["num_hidden_layers"][tower]
    kept = some_of_each(raw.get("layer_types") or [0] * (depth or 0), count)
    for key, value in raw.items():
        if key == "per_layer_config":  # made of the others
            continue
        if isinstance(value, dict) and key not in ("id2label", "label2id", "rope_parameters"):
            made[key] = small(value, tower or any(part in key for part in TOWERS))
        elif isinstance(value, list) and len(value) == depth:
            made[key] = [value[i] for i in kept]
        elif key in RULES and isinstance(value, (int, float)) and not isinstance(value, bool):
            rule = RULES[key][tower]
            made[key] = value if rule is None else rule
        else:
            made[key] = value
    return made


def some_of_each(kinds, count):
    """The numbers of `count` layers that follow each other in which each type of `kinds` occurs, as
    far as may be: 3 linear and 1 full of 48 and 16."""
    first = max((kinds.index(kind) for kind in kinds), default=0)
    start = max(0, min(first + 1 - count, len(kinds) - count))
    return range(start, min(start + count, len(kinds)))


# --- tokens ---------------------------------------------------------------------------------------

MARK = r"""["'](<[^"'\s]+>|\[[A-Z_]+\])["']"""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is"
    " string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if"
    " part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif"
    " %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokens_of(processor_class, more, image_token=None):
    """({attribute of the tokenizer: token}, {name of a token: token}, other tokens) that a
    processor's code names. more: {attribute: token} that it does not name."""
    module = sys.modules.get(getattr(processor_class, "__module__", ""))
    source = inspect.getsource(module) if module else ""
    named = {}
    attributes = re.findall(r"tokenizer(?:\.|, \")(\w+?_token)(?:_id)?\b", source)
    ordinary = {"bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token"}
    for attribute in attributes:
        if attribute not in ordinary and not attribute.startswith("add_"):
            named[attribute] = f"<{attribute.removesuffix('_token')}>"
    named |= more
    by_name = {}
    for name, token in re.findall(r"(\w+_token)\b[^\"'\n]*" + MARK, source):
        by_name.setdefault(name, token)
    by_name |= named
    if image_token:
        by_name["image_token"] = image_token
    others = [token for token in re.findall(MARK, source) if token not in ("<s>", "</s>")]
    return named, by_name, list(dict.fromkeys([*others, *by_name.values()]))


def with_ids(raw, tokenizer, by_name):
    """A config whose ids of tokens are those of the tokenizer; a token of its own for each id that
    the processor does not name."""
    made = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            made[key] = with_ids(value, tokenizer, by_name)
            continue
        made[key] = value
        stem = re.fullmatch(r"(\w+?)_(token_id|token_index)", str(key))
        if key == "vocab_size":
            made[key] = 0  # filled in when all tokens are there
        if not stem:
            continue
        name = stem[1]
        if name in ("bos", "eos", "pad", "unk", "sep", "cls", "decoder_start"):
            own = {"decoder_start": "bos"}.get(name, name)
            if value is not None:
                made[key] = getattr(tokenizer, f"{own}_token_id", None)
        elif value is not None or name == "image":
            other = {"vision_start": "vision_bos", "vision_end": "vision_eos"}.get(name, name)
            token = by_name.get(f"{name}_token") or by_name.get(f"{other}_token", f"<|{name}|>")
            if token not in tokenizer.get_vocab():
                tokenizer.add_special_tokens(
                    {"additional_special_tokens": [token]}, replace_extra_special_tokens=False
                )
            made[key] = tokenizer.convert_tokens_to_ids(token)
    return made


def filled(raw, size):
    """A config with the number of tokens."""
    made = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            made[key] = filled(value, size)
        else:
            made[key] = size if key == "vocab_size" else value
    return made


# --- types ----------------------------------------------------------------------------------------


@dataclass
class Small:
    """What rules do not know of a type."""

    config: dict = field(default_factory=dict)  # laid over the small config
    images: dict = field(default_factory=dict)  # settings of the image processor
    processor: dict = field(default_factory=dict)  # and of the processor
    tokens: dict = field(default_factory=dict)  # {attribute of the tokenizer: token}
    image_token: str | None = None  # where the processor's code does not name it
    placeholder: str | None = None  # in the template; None: the image token
    processor_class: str | None = None
    image_class: str | None = None
    model_class: str | None = None  # that wrote the checkpoint; None: of transformers' table
    mend: object = None  # (raw config) -> raw config, as the last step
    after: object = None  # (model) -> None


def rope(section=(2, 3, 3), **more):
    """Rotary positions with sections for time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*section], **more}


def square(side):
    """The size of square pictures."""
    return {"height": side, "width": side}


# pixels of pictures that are stretched to whole patches
AREA = {"size": {"shortest_edge": 3136, "longest_edge": 40000}}


def in_rows(text=None, tower=None, **more):
    """A type whose picture is stretched to whole groups of patches, image_grid_thw."""
    more = {"images": AREA, "processor_class": None, **more}
    return Small(config={"text_config": text or {}, "vision_config": tower or {}}, **more)


SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


CODES = 40  # of pictures, the last ids of the vocabulary


def letters(number):
    """A number as Chameleon's vocabulary writes it."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


def with_codes(name):
    """A config with the tokens of a picture's codes, name(number), in its vocabulary_map."""

    def mend(raw):
        text = raw.get("text_config", raw)
        first = text["vocab_size"]
        text["vocab_size"] += CODES
        numbered = {name(number): first + number for number in range(CODES)}
        special = {"<image>": raw["image_token_id"], "<|extra_200|>": 5}
        return raw | {"vocabulary_map": numbered | special}

    return mend


def graded_codes(model):
    """Codes of a picture in an order: the more pixels change, the farther the code and its
    embedding move. What would mix the whole picture in a random VQ-VAE, and does not in a trained
    one, is made weak."""
    vq = model.model.vqmodel
    for name, parameter in vq.named_parameters():
        if ("attn" in name and ("proj_out" in name or "out_proj" in name)) or "conv2" in name:
            parameter.data *= 0
        if "down" in name and "downsample.conv.weight" in name:  # of the cell's own pixels
            parameter.data[..., 2, :] = 0
            parameter.data[..., 2] = 0
        elif parameter.ndim > 3 and parameter.shape[-1] == 3:
            parameter.data[..., 1, 1] *= 12
    latents = []
    hook = vq.quantize.register_forward_pre_hook(lambda _, args: latents.append(args[0]))
    side = 128
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        model.eval()
        if "image_sizes" in inspect.signature(vq.encode).parameters:
            vq.encode(noise, torch.tensor([[side, side]]))
        else:
            vq.encode(noise)
    hook.remove()
    codebook = vq.quantize.embedding.weight
    channels = codebook.shape[1]
    axis = next(i for i, size in enumerate(latents[0].shape) if size == channels)
    latents = latents[0].movedim(axis, -1).reshape(-1, channels)
    middle = latents.mean(0)
    _, sizes, directions = torch.linalg.svd(latents - middle, full_matrices=False)
    steps = torch.linspace(-4, 4, CODES)[:, None]
    codebook.data = middle + steps * sizes[0] / len(latents) ** 0.5 * directions[:1]
    table = model.get_input_embeddings().weight
    table.data[-CODES:] = steps * torch.randn(1, table.shape[1])


MROPE = {"rope_parameters": rope()}
QWEN3 = {"processor_class": "Qwen3VLProcessor", "image_class": "Qwen2VLImageProcessorPil"}
OMNI = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": WIDTH,
}
DEEP = {"deepstack_visual_indexes": [0, 1]}
TYPES = {
    "cohere_compass": in_rows(
        {
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": {"full_attention": rope(), "sliding_attention": rope()},
        },
        DEEP,
        tokens={"image_token": "<|IMAGE_PAD|>"},
    ),
    "cosmos3_edge": in_rows(MROPE),
    "cosmos3_omni": in_rows(MROPE, DEEP, **QWEN3),
    "dots3_note": in_rows(
        {"num_key_value_heads": 4, "head_dim": 16},
        {"adapter_in_dim": 32, "adapter_out_dim": WIDTH, "head_dim": 16},
        images=AREA | {"temporal_patch_size": 1},
        mend=lambda raw: laid_over(
            raw, {"audio_config": {"adapter_input_size": 32, "adapter_out_dim": WIDTH}}
        ),
    ),
    "ernie4_5_vl_moe": in_rows({"rope_parameters": rope((3, 3, 2))}),
    "exaone4_5": in_rows(),
    "glm46v": in_rows(MROPE),
    "glm4v": in_rows(MROPE),
    "glm4v_moe": in_rows(
        {"rope_parameters": rope((1, 1, 2), partial_rotary_factor=0.5)},
        image_class="Glm4vImageProcessorPil",
    ),
    "glm5_next": in_rows({"num_key_value_heads": 4, "qk_rope_head_dim": 0}),
    "glm_ocr": in_rows(
        MROPE, processor_class="Glm46VProcessor", image_class="Glm46VImageProcessorPil"
    ),
    "glmga": in_rows(MROPE, processor_class="Glm46VProcessor"),
    "hunyuan_vl": in_rows(
        {"head_dim": 16, "rope_parameters": rope((2, 2, 2, 2))},
        placeholder="<image_start><image><image_end>",
    ),
    "hyperclovax_vision_v2": in_rows({}, {"fullatt_block_indexes": [1], "window_size": 56}),
    "lfm3_vl": in_rows(),
    "minimax_m3_vl": in_rows(
        image_token="]<]image[>[", mend=lambda raw: raw | {"merged_hidden_size": 4 * WIDTH}
    ),
    "muse_glimmer": in_rows(mend=lambda raw: raw | {"out_hidden_size": 128}),
    "muse_spark": in_rows(mend=lambda raw: raw | {"out_hidden_size": 128}),
    "paddleocr_vl": in_rows(MROPE),
    "qwen2_5_omni_thinker": Small(
        placeholder="<vision_bos><image><vision_eos>",
        config={
            "vision_start_token_id": 1,
            "audio_config": OMNI,
            "text_config": MROPE,
            "vision_config": {"fullatt_block_indexes": [1], "window_size": 56},
        },
        images=AREA,
        processor_class="Qwen2_5OmniProcessor",
        image_class="Qwen2VLImageProcessorPil",
    ),
    "qwen3_5": in_rows({"rope_parameters": rope((1, 1, 0), partial_rotary_factor=0.25)}),
    "qwen3_5_moe": in_rows({"rope_parameters": rope((1, 1, 0), partial_rotary_factor=0.25)}),
    "qwen3_omni_moe_thinker": Small(
        placeholder="<vision_bos><image><vision_eos>",
        config={
            "vision_start_token_id": 1,
            "audio_config": OMNI,
            "text_config": MROPE,
            "vision_config": DEEP,
        },
        images=AREA,
        processor_class="Qwen3OmniMoeProcessor",
        image_class="Qwen2VLImageProcessorPil",
    ),
    "qwen4_exp": in_rows(
        MROPE
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 16,
        }
    ),
    "video_llama_3": in_rows(),
    "granite_docling": Small(config={"text_config": {"attention_multiplier": 0.25}}),
    "fuyu": Small(tokens={"speaker_token": "|SPEAKER|", "newline_token": "|NEWLINE|"}),
    "got_ocr2": Small(images={"size": square(1024)}),
    "fast_vlm": Small(
        config={
            "vision_config": {"model_args": {"embed_dim": 32, "patch_size": 16}, "hidden_size": 32},
            "image_seq_length": 16,
        },
        images={"size": {"shortest_edge": 64}, "crop_size": square(64)},
        processor={"patch_size": 16, "vision_feature_select_strategy": "full"},
        processor_class="LlavaProcessor",
        image_class="CLIPImageProcessorPil",
    ),
    "gemma3n": Small(
        config={
            "text_config": {
                "intermediate_size": 96,
                "vocab_size_per_layer_input": 3000,
                "hidden_size_per_layer_input": 8,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "laurel_rank": 8,
            },
            "vision_config": {"model_args": {"embed_dim": 32, "patch_size": 14}, "hidden_size": 32},
            "audio_config": {"conf_num_attention_heads": 2, "conf_num_hidden_layers": 1},
        },
        placeholder="<image>",
    ),
    "perception_lm": Small(
        config={
            "vision_config": {
                "model_args": {"embed_dim": 32, "patch_size": 14, "class_token": True}
            },
            "projector_pooling_ratio": 2,
        },
        images={"size": square(56), "tile_size": 56, "max_num_tiles": 6},
        processor={"patch_size": 14, "pooling_ratio": 2},
    ),
    "mistral_large4": Small(
        tokens={
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        config={"text_config": {"num_key_value_heads": 4, "head_dim": 8}},
        processor={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "pp_chart2table": Small(
        images={"size": square(1024)}, image_token="<imgpad>", placeholder="<imgpad>" * 256
    ),
    "aria": Small(
        config={
            "vision_config": {"image_size": 56, "patch_size": 14},
            "projector_patch_to_query_dict": {"1225": 8, "4900": 16, "576": 8, "16": 8},
        },
        images={"max_image_size": 490},
        processor={"size_conversion": {"490": 8, "980": 16}},
    ),
    "chameleon": Small(
        config={
            "vq_config": {
                "resolution": 128,
                "base_channels": 32,
                "embed_dim": 16,
                "latent_channels": 16,
                "num_embeddings": CODES,
                "num_res_blocks": 1,
                "channel_multiplier": [1, 1, 1, 1, 1],
            }
        },
        images={"size": {"shortest_edge": 128}, "crop_size": square(128)},
        processor={"image_seq_length": 64},
        mend=with_codes(lambda number: f"IMGIMG{letters(number)}Z"),
        after=graded_codes,
    ),
    "emu3": Small(
        config={
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "codebook_size": CODES,
                "embed_dim": 1,
            }
        },
        images={"min_pixels": 4096, "max_pixels": 16384},
        mend=with_codes(lambda number: f"<|visual token {number:06d}|>"),
        after=graded_codes,
    ),
    "cohere2_vision": Small(
        config={
            "vision_config": {"image_size": 56, "patch_size": 14},
            "alignment_intermediate_size": 64,
        },
        images={"size": square(56), "patch_size": 2, "max_patches": 6},
    ),
    "llama4": Small(
        config={
            "vision_config": {
                "image_size": 56,
                "patch_size": 14,
                "intermediate_size": 128,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            }
        },
        images={"size": square(56), "max_patches": 6},
        processor={"patch_size": 14},
        image_token="<|patch|>",
        placeholder="<|image|>",
    ),
    "lfm2_vl": Small(
        config={
            "vision_config": {"num_patches": 16},
            "text_config": {
                "layer_types": ["conv", "conv", "full_attention", "conv"],
                "full_attn_idxs": None,
            },
        },
        images={
            "size": square(64),
            "tile_size": 64,
            "min_image_tokens": 2,
            "max_image_tokens": 4,
            "max_num_patches": 16,
            "max_tiles": 6,
        },
    ),
    "step3p7": Small(
        config={
            "vision_config": {"image_size": 112},
            "text_config": {
                "sliding_window": 512,
                "num_sliding_attention_heads": 4,
                "share_expert_dim": 32,
            },
        },
        images={"size": square(112), "patch_size": 56, "max_image_size": 1000},
    ),
    "kimi_k25": in_rows(
        {"head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
        mend=lambda raw: raw | {"projection_hidden_size": 32},
        images={"size": {"max_height": 280, "max_width": 280}},
    ),
    "llava_next_video": Small(
        config={
            "vision_config": {"image_size": 56, "patch_size": 14},
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        images={
            "size": {"shortest_edge": 56},
            "crop_size": square(56),
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        processor={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "gemma4": Small(
        config={
            # layers that share keys and values, pictures that see themselves in both directions
            "text_config": {
                "global_head_dim": 32,
                "vocab_size_per_layer_input": 2000,
                "hidden_size_per_layer_input": 8,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "use_bidirectional_attention": "vision",
            },
            "vision_config": {
                "model_type": "gemma4_vision",
                **SMALL_TOWER,
                "position_embedding_size": 64,
            },
        },
        images={"max_soft_tokens": 70},
        processor={"image_seq_length": 70},
    ),
    "gemma4_unified": Small(
        config={
            "text_config": {"global_head_dim": 32},
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "mm_embed_dim": 32,
                "mm_posemb_size": 64,
                "output_proj_dims": 32,
            },
        },
        images={"max_soft_tokens": 70},
    ),
    "deepseek_vl_hybrid": Small(
        config={
            "vision_config": {"image_size": 384},
            "high_res_vision_config": {
                "image_size": 1024,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "mlp_dim": 32,
                "global_attn_indexes": [1],
                "output_channels": 16,
            },
        }
    ),
    "shieldgemma2": Small(
        config={"vision_config": {"image_size": 56, "patch_size": 14}, "mm_tokens_per_image": 4},
        images={"size": square(56)},
        processor={"image_seq_length": 4},
        model_class="ShieldGemma2ForImageClassification",
        placeholder="<boi>",
    ),
    "qianfan_ocr": Small(
        config={"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}},
        images={"size": square(56), "max_patches": 6},
        processor={"image_seq_length": 4},
        image_token="<context_image>",
        placeholder="<image>",
    ),
    "minicpmv4_6": Small(
        config={"vision_config": {"image_size": 112, "patch_size": 14}},
        images={"scale_resolution": 112, "max_slice_nums": 4},
    ),
    "minicpmv4_7": Small(
        config={"vision_config": {"image_size": 112, "patch_size": 14}},
        images={"scale_resolution": 112, "max_slice_nums": 4},
    ),
    "granite4_vision": Small(
        config={
            "vision_config": {"image_size": 56, "patch_size": 14, "hidden_size": 64},
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [1, 2, 2, 3],
            "downsample_rate": "1/2",
        },
        images={
            "size": {"shortest_edge": 56},
            "crop_size": square(56),
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        processor={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "downsample_rate": "1/2",
        },
    ),
    "deepseek_ocr2": Small(
        config={
            "text_config": {
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "num_experts_per_tok": 2,
            },
            "vision_config": {
                "sam_config": {
                    "output_channels": 16,
                    "downsample_channels": [24, 32],
                    "image_size": 1024,
                }
            },
        }
    ),
    "unlimited_ocr": Small(
        config={
            "text_config": {"num_key_value_heads": 4},
            "vision_config": {
                "sam_config": {"output_channels": 16, "downsample_channels": [24, 32]}
            },
        }
    ),
    "nemotron_h_omni": Small(
        config={"vision_hidden_size": 32, "vision_config": {"patch_size": 16}}
    ),
    "diffusion_gemma": Small(
        config={
            "text_config": {
                "num_experts": 4,
                "top_k_experts": 2,
                "global_head_dim": 32,
                "moe_intermediate_size": 32,
            },
            "vision_config": {**SMALL_TOWER, "position_embedding_size": 64},
        },
        image_class="Gemma4ImageProcessorPil",
    ),
}


def laid_over(raw, over):
    """raw with the values of `over`, dicts within dicts."""
    made = dict(raw)
    for key, value in over.items():
        inside = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = laid_over(made[key], value) if inside else value
    return made


def small_of(kind):
    """The entry of a type."""
    return TYPES.get(kind, Small())


def processor_class_of(kind):
    """The processor's class, by its name where transformers' table has none."""
    name = small_of(kind).processor_class or processing_auto.PROCESSOR_MAPPING_NAMES.get(kind)
    return getattr(transformers, name) if name else None


def image_processors_of(kind):
    """{backend: class name}."""
    named = small_of(kind).image_class
    if named:
        return {"pil": named} if named.endswith("Pil") else {"torchvision": named}
    return image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}


TIMM = ("fast_vlm", "gemma3n", "perception_lm")  # towers of timm, which needs torchvision


def needs_torchvision(kind):
    """Whether a type cannot be loaded without torchvision, for its image processor or its tower."""
    backends = image_processors_of(kind)
    return kind in TIMM or (bool(backends) and "pil" not in backends)


def config_of(kind, tokenizer, by_name):
    """The small config of a type."""
    entry = small_of(kind)
    config_class = CONFIG_MAPPING[kind]
    raw = laid_over(config_class().to_dict(), {})
    raw = with_ids(laid_over(small(raw), entry.config), tokenizer, by_name)
    raw = filled(raw, len(tokenizer))
    if entry.mend:
        raw = entry.mend(raw)
    return config_class.from_dict(raw)


def of_tower(config, image_class):
    """Settings of an image processor that the tower has too."""
    tower = getattr(config, "vision_config", None)
    settings = {}
    for name, names in (
        ("patch_size", ("patch_size",)),
        ("merge_size", ("spatial_merge_size", "merge_size")),
        ("temporal_patch_size", ("temporal_patch_size", "patch_temporal")),
    ):
        values = [getattr(tower, other) for other in names if hasattr(tower, other)]
        if isinstance(getattr(image_class, name, None), int) and values:
            settings[name] = values[0]
    return settings


# of attention: what makes queries and keys, or scales them where they are normalised
QUERIES = r"(q_proj|k_proj|q_b_proj|kv_b_proj|q_norm|k_norm|q_layernorm|k_layernorm|query|key)"
TEXT = r"(language_model|text_model|model\.layers|llm)\b"


def sharpen(model, by=2.5):
    """Scale queries and keys of the decoder: attention of random weights is nearly uniform and
    hides errors."""
    for name, parameter in model.named_parameters():
        of_queries = re.search(rf"{QUERIES}\w*\.weight$", name)
        if of_queries and re.search(TEXT, name) and not re.search("vision|audio|linear", name):
            is_norm = parameter.ndim == 1
            parameter.data *= 1.6 if is_norm else by
            if is_norm and not parameter.data.any():  # Gemma's norms scale by 1 + weight
                parameter.data += 1


def build(folder, kind):
    """A small random model of a type with its processor's files; returns the folder."""
    entry = small_of(kind)
    processor_class = processor_class_of(kind)
    named, by_name, others = tokens_of(processor_class, entry.tokens, entry.image_token)
    tokenizer = make_tokenizer(
        folder, ["<|im_start|>", "<|im_end|>", *others], "<|im_end|>", False, **named
    )
    config = config_of(kind, tokenizer, by_name)
    set_seed(0)
    model = getattr(transformers, entry.model_class or NAMES[kind])(config)
    sharpen(model)
    if entry.after:
        entry.after(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "hyperclovax_vision_v2":  # transformers would take its own class for the type
        file = folder / "tokenizer_config.json"
        own = json.loads(file.read_text()) | {"add_prefix_space": False}
        file.write_text(json.dumps(own))
    image_token = entry.placeholder or by_name.get("image_token", "<image>")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", image_token))
    settings = {"processor_class": processor_class.__name__} if processor_class else {}
    backends = image_processors_of(kind)
    if backends:
        name = backends.get("torchvision") or backends["pil"]
        image_class = getattr(transformers, backends.get("pil") or name)
        images = of_tower(config, image_class) | entry.images
        settings["image_processor"] = {"image_processor_type": name, **images}
    known = processor_class and not getattr(processor_class, "is_dummy", False)
    attributes = processor_class.get_attributes() if known else []
    for part in ("video_processor", "feature_extractor"):
        if part in attributes:  # as published: of a class that is not installed here, or not used
            settings[part] = {f"{part}_type": "NotInstalledHere"}
    (folder / "processor_config.json").write_text(json.dumps(settings | entry.processor))
    return folder

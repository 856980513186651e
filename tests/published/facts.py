"""What files of published models say, as tables of our own: sizes, ids, prompts, names.
test_facts.py compares our code with them, and with the files themselves where they are at hand.

The columns of docs/families.md's table of published models are STATES; each says

    published file   compared with the published file or code, or with its facts in these tables
    stand-in         compared with a file that the tests make in the published form
    not checked
"""

from dataclasses import dataclass, field

STATES = ("config", "tokenizer", "key names", "prompt", "token counts")
FILE, STAND_IN, NOT = "published file", "stand-in", "not checked"
QUESTION = "What is unusual about this image?"


@dataclass(frozen=True)
class Published:
    """Facts of one published model."""

    family: str  # name of the family that is to read it
    states: tuple[str, ...]  # as STATES
    config: dict  # config.json, without what has no say
    parameters: int | float  # of the whole model; in billions, four places, where not known exactly
    special: dict[str, int]  # token -> id
    eos: set[int]  # that end an answer
    prompt: str  # without system prompt of the user's
    counts: dict[tuple[int, int], int]  # (width, height) of a picture -> vision tokens
    images: dict = field(default_factory=dict)  # preprocessor_config.json
    processor: dict = field(default_factory=dict)  # processor_config.json
    tokenizer: dict = field(default_factory=dict)  # tokenizer_config.json
    generation: dict = field(default_factory=dict)  # generation_config.json
    template: str = ""  # of chat_template.json, in a form of ours
    begins: tuple[int, ...] = ()  # ids of the prompt up to the picture, with the real tokenizer
    ends: tuple[int, ...] = ()  # ids behind the picture, with the real tokenizer
    keys: dict[str, tuple] = field(default_factory=dict)  # name -> shape; N counts layers
    layers: dict[str, int] = field(default_factory=dict)  # beginning of a name -> its layers
    total_size: int = 0  # bytes of all weights, two each


# --- LLaVA ----------------------------------------------------------------------------------------

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
BLOCK = "language_model.model.layers.N."
VIT = "vision_tower.vision_model.encoder.layers.N."
LLAVA_KEYS = {
    "language_model.lm_head.weight": (32064, 4096),
    "language_model.model.embed_tokens.weight": (32064, 4096),
    "language_model.model.norm.weight": (4096,),
    **{f"{BLOCK}self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"},
    BLOCK + "mlp.gate_proj.weight": (11008, 4096),
    BLOCK + "mlp.up_proj.weight": (11008, 4096),
    BLOCK + "mlp.down_proj.weight": (4096, 11008),
    BLOCK + "input_layernorm.weight": (4096,),
    BLOCK + "post_attention_layernorm.weight": (4096,),
    "multi_modal_projector.linear_1.weight": (4096, 1024),
    "multi_modal_projector.linear_1.bias": (4096,),
    "multi_modal_projector.linear_2.weight": (4096, 4096),
    "multi_modal_projector.linear_2.bias": (4096,),
    "vision_tower.vision_model.embeddings.class_embedding": (1024,),
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
    **{
        f"vision_tower.vision_model.{norm}.{part}": (1024,)
        for norm in ("pre_layrnorm", "post_layernorm")
        for part in ("weight", "bias")
    },
    **{f"{VIT}self_attn.{name}_proj.weight": (1024, 1024) for name in ("q", "k", "v", "out")},
    **{f"{VIT}self_attn.{name}_proj.bias": (1024,) for name in ("q", "k", "v", "out")},
    VIT + "mlp.fc1.weight": (4096, 1024),
    VIT + "mlp.fc1.bias": (4096,),
    VIT + "mlp.fc2.weight": (1024, 4096),
    VIT + "mlp.fc2.bias": (1024,),
    **{f"{VIT}layer_norm{i}.{part}": (1024,) for i in (1, 2) for part in ("weight", "bias")},
}
LLAVA_LAYERS = {"language_model.": 32, "vision_tower.": 24}
LLAVA = Published(
    family="llava",
    states=(FILE, FILE, FILE, FILE, FILE),
    config={
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-05},
        "vision_config": CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
    parameters=14126854144 // 2,
    special={"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001},
    eos={2},
    prompt="USER: <image>\n{question} ASSISTANT:",
    counts={(336, 336): 576, (640, 427): 576, (20, 400): 576},
    images=CLIP_IMAGES,
    processor={
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
    },
    tokenizer={
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    },
    generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    template=(
        "{% for m in messages %}{{ '' if m.role == 'system' else m.role.upper() + ': ' }}{% for part in"
        " m.content %}{{ '<image>\n' if part.type == 'image' else part.text + ' ' }}{% endfor %}{%"
        " endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    begins=(1, 3148, 1001, 29901, 29871),
    ends=(29871, 13, 5618, 338, 22910, 1048, 445, 1967, 29973, 319, 1799, 9047, 13566, 29901),
    keys=LLAVA_KEYS,
    layers=LLAVA_LAYERS,
    total_size=14126854144,
)
PHI3_NAMES = (
    "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|>"
    " <|placeholder4|> <|system|> <|end|> <|placeholder5|> <|placeholder6|> <|user|>"
).split()
# As xtuner's converter writes it, with Phi-3's weights under Llama's names: without a chat template
# and without processor_config.json. Llama's tokenizer with Phi-3's tokens.
LLAVA_PHI3 = Published(
    family="llava",
    states=(STAND_IN, STAND_IN, NOT, STAND_IN, STAND_IN),
    config={
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32038,
        "pad_token_id": 32039,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "vocab_size": 32064,
        },
        "vision_config": CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    parameters=3821079552 + 303507456 + 12589056,  # Phi-3-mini, the tower, two linear layers
    special={
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{name: 32000 + i for i, name in enumerate(PHI3_NAMES)},
        "<image>": 32038,
        "<pad>": 32039,
    },
    eos={32007},
    prompt="<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n",
    counts={(336, 336): 576, (640, 427): 576},
    images=CLIP_IMAGES,
    tokenizer={
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    },
)

# --- Qwen-VL --------------------------------------------------------------------------------------

QWEN_NAMES = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>"
    " <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>"
    " <|image_pad|> <|video_pad|>"
).split()
QWEN_SPECIAL = {name: 151643 + i for i, name in enumerate(QWEN_NAMES)}
QWEN_TURN = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# of what the tokenizer has of its own: no pictures in it
TEXT_ONLY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if DEFAULT and loop.first and m.role != 'system' %}"
    + QWEN_SYSTEM
    + "{% endif %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image'"
    " %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor"
    " %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif"
    " %}"
)
QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN_ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
QWEN_GENERATION = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643}
QWEN_TOKENIZER = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
QWEN_SYSTEM_IDS = (151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198)
QWEN_USER_IDS = (151644, 872, 198, 151652)
QWEN_ENDS = (151653, 3838, 374, 18511, 911, 419, 2168, 30, 151645, 198, 151644, 77091, 198)
QWEN2 = Published(
    family="qwen2_vl",
    states=(FILE, FILE, NOT, FILE, FILE),
    config={
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "eos_token_id": 151645,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": QWEN_ROPE,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": {"hidden_size": 1536, "in_chans": 3, "spatial_patch_size": 14},
        **QWEN_IDS,
    },
    parameters=2.2090,
    special=QWEN_SPECIAL,
    eos={151645, 151643},
    prompt=QWEN_SYSTEM + QWEN_TURN,
    # whole groups of 28 pixels: 23 x 15, 2 x 2, 43 x 29 (of the 73 x 49 that are too many)
    counts={(640, 427): 345, (56, 56): 4, (2044, 1372): 1247},
    images={
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 1003520,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    tokenizer=QWEN_TOKENIZER | {"chat_template": QWEN_TEMPLATE.replace("DEFAULT", "true")},
    generation=QWEN_GENERATION,
    template=QWEN_TEMPLATE.replace("DEFAULT", "true"),
    begins=QWEN_SYSTEM_IDS + QWEN_USER_IDS,
    ends=QWEN_ENDS,
)
QWEN2_5 = Published(
    family="qwen2_5_vl",
    states=(FILE, FILE, NOT, FILE, FILE),
    config={
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "eos_token_id": 151645,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": QWEN_ROPE,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "temporal_patch_size": 2,
        },
        **QWEN_IDS,
    },
    parameters=3.7546,
    special=QWEN_SPECIAL,
    eos={151645, 151643},
    prompt=QWEN_SYSTEM + QWEN_TURN,
    counts={(640, 427): 345, (2044, 1372): 98 * 146 // 4},
    images={
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    tokenizer=QWEN_TOKENIZER | {"chat_template": TEXT_ONLY},
    generation=QWEN_GENERATION,
    template=QWEN_TEMPLATE.replace("DEFAULT", "true"),
    begins=QWEN_SYSTEM_IDS + QWEN_USER_IDS,
    ends=QWEN_ENDS,
)
QWEN3 = Published(
    family="qwen3_vl",
    states=(FILE, FILE, NOT, FILE, FILE),
    config={
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {
            "model_type": "qwen3_vl_text",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **QWEN_IDS,
    },
    parameters=4.4378,
    special=QWEN_SPECIAL,
    eos={151645, 151643},
    prompt=QWEN_TURN,
    # whole groups of 32 pixels: 20 x 13, 64 x 43; a small picture is enlarged to 256 x 256
    counts={(640, 427): 260, (2044, 1372): 2752, (64, 64): 64},
    images={
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    tokenizer=QWEN_TOKENIZER | {"chat_template": QWEN_TEMPLATE.replace("DEFAULT", "false")},
    generation=QWEN_GENERATION,
    template=QWEN_TEMPLATE.replace("DEFAULT", "false"),
    begins=QWEN_USER_IDS,
    ends=QWEN_ENDS,
)

# --- Molmo ----------------------------------------------------------------------------------------

MOLMO_NAMES = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
MOLMO_IMAGES = {
    "image_processor_type": "MolmoImageProcessor",
    "base_image_input_size": [336, 336],
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_padding_mask": True,
    "image_patch_size": 14,
    "image_token_length_h": 12,
    "image_token_length_w": 12,
    "max_crops": 12,
    "overlap_margins": [4, 4],
}
# 12 x 12 of the low resolution; (16 r + 8) x (16 c + 8) patches of r x c crops, 2 x 2 a token
MOLMO_COUNTS = {(336, 336): 144 + 12 * 12, (640, 427): 144 + 20 * 28}
MOLMO_VIT = "vision_backbone.image_vit.transformer.resblocks.N."


def molmo_keys(width, inside, rows, of_keys, biases, norms):
    """Names and shapes of the published class. rows: of the embedding table; inside: of the fused
    gate and up matrix; of_keys: width of all keys."""
    block = "transformer.blocks.N."
    of_block = {
        "attn_norm.weight": (width,),
        "ff_norm.weight": (width,),
        "att_proj.weight": (width + 2 * of_keys, width),
        "attn_out.weight": (width, width),
        "ff_proj.weight": (inside, width),
        "ff_out.weight": (width, inside // 2),
    }
    if biases:
        of_block["att_proj.bias"] = (width + 2 * of_keys,)
    if norms:
        of_block |= {"q_norm.weight": (width,), "k_norm.weight": (of_keys,)}
    square = [f"attention.w{name}" for name in "qkvo"]
    pooling = [f"vision_backbone.image_pooling_2d.w{name}" for name in "qkvo"]
    vit = "vision_backbone.image_vit."
    projector = "vision_backbone.image_projector."
    return {
        "transformer.wte.embedding": (rows, width),
        "transformer.wte.new_embedding": (128, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ff_out.weight": (rows, width),
        **{block + name: shape for name, shape in of_block.items()},
        vit + "class_embedding": (1024,),
        vit + "positional_embedding": (577, 1024),
        vit + "patch_embedding.weight": (1024, 588),
        vit + "pre_ln.weight": (1024,),
        vit + "pre_ln.bias": (1024,),
        **{f"{MOLMO_VIT}{name}.weight": (1024, 1024) for name in square},
        **{f"{MOLMO_VIT}{name}.bias": (1024,) for name in square},
        MOLMO_VIT + "feed_forward.w1.weight": (4096, 1024),
        MOLMO_VIT + "feed_forward.w1.bias": (4096,),
        MOLMO_VIT + "feed_forward.w2.weight": (1024, 4096),
        MOLMO_VIT + "feed_forward.w2.bias": (1024,),
        **{
            f"{MOLMO_VIT}{norm}.{part}": (1024,)
            for norm in ("attention_norm", "ffn_norm")
            for part in ("weight", "bias")
        },
        "vision_backbone.pad_embed": (2, 2048),
        **{f"{name}.weight": (1024, 1024 if name.endswith("o") else 2048) for name in pooling},
        **{f"{name}.bias": (1024,) for name in pooling},
        projector + "w1.weight": (inside // 2, 1024),
        projector + "w2.weight": (width, inside // 2),
        projector + "w3.weight": (inside // 2, 1024),
    }


MOLMO_D = Published(
    family="molmo",
    states=(FILE, FILE, FILE, FILE, FILE),
    config={
        "model_type": "molmo",
        "architectures": ["MolmoForCausalLM"],
        "attention_layer_norm": False,
        "clip_qkv": None,
        "embedding_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 37888,
        "layer_norm_eps": 1e-06,
        "layer_norm_type": "rms",
        "max_position_embeddings": 4096,
        "norm_after": False,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "qkv_bias": True,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
        "weight_tying": False,
    },
    parameters=8.0210,
    special={
        "<|endoftext|>": 151643,
        **{f"|<EXTRA_TOKENS_{i}>|": 151646 + i for i in range(418)},
        **{name: 152064 + i for i, name in enumerate(MOLMO_NAMES)},
    },
    eos={151643},
    prompt="<|image|> User: {question} Assistant:",
    counts=MOLMO_COUNTS,
    images=MOLMO_IMAGES,
    tokenizer={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": None},
    begins=(151643, 152064),
    ends=(152065, 2657, 25, 3555, 374, 18511, 911, 419, 2168, 30, 21388, 25),
    keys=molmo_keys(3584, 37888, 152064, 512, biases=True, norms=False),
    layers={"transformer.": 28, "vision_backbone.": 23},
)
# of dolma2's tokenizer, which counts to 100278
DOLMA_NAMES = [
    "<|extra_id_0|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "|||PHONE_NUMBER|||",
    "|||EMAIL_ADDRESS|||",
    "|||IP_ADDRESS|||",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_id_{i}|>" for i in range(1, 11)),
    "<|endofprompt|>",
    "<|pad|>",
]
MOLMO_O = Published(
    family="molmo",
    states=(FILE, STAND_IN, FILE, FILE, FILE),
    config={
        "model_type": "molmo",
        "architectures": ["MolmoForCausalLM"],
        "attention_layer_norm": True,
        "clip_qkv": None,
        "embedding_size": 100352,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "layer_norm_eps": 1e-06,
        "layer_norm_type": "rms",
        "max_position_embeddings": 4096,
        "norm_after": True,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "qkv_bias": False,
        "rope_theta": 500000.0,
        "vocab_size": 100278,
        "weight_tying": False,
    },
    parameters=7.6650,
    special={name: 100256 + i for i, name in enumerate([*DOLMA_NAMES, *MOLMO_NAMES])},
    eos={100257},
    prompt="<|image|> User: {question} Assistant:",
    counts=MOLMO_COUNTS,
    images=MOLMO_IMAGES,
    tokenizer={
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|endoftext|>",
    },
    keys=molmo_keys(4096, 22016, 100352, 4096, biases=False, norms=True),
    layers={"transformer.": 32, "vision_backbone.": 23},
)

# --- BLIP -----------------------------------------------------------------------------------------

BLIP2 = Published(
    family="blip2-opt",
    states=(FILE, STAND_IN, NOT, STAND_IN, STAND_IN),
    config={
        "model_type": "blip-2",
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_text_hidden_size": 256,
        "image_token_index": 50265,
        "num_query_tokens": 32,
        "qformer_config": {"model_type": "blip_2_qformer"},
        "text_config": {
            "model_type": "opt",
            "eos_token_id": 50118,
            "ffn_dim": 10240,
            "hidden_size": 2560,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "vocab_size": 50304,
            "word_embed_proj_dim": 2560,
        },
        "use_decoder_only_language_model": True,
        "vision_config": {"model_type": "blip_2_vision_model"},
    },
    parameters=3.7448,
    special={"<pad>": 1, "</s>": 2, "<image>": 50265},
    eos={50118},
    prompt="Question: {question} Answer:",
    counts={(224, 224): 32, (640, 427): 32},
    images={"image_processor_type": "BlipImageProcessor", "size": {"height": 224, "width": 224}},
    processor={"processor_class": "Blip2Processor", "num_query_tokens": 32},
    tokenizer={
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
    },
)
# Its processor_config.json names the processor of videos, whose files are not there.
INSTRUCTBLIP = Published(
    family="instructblip-llama",
    states=(FILE, FILE, NOT, FILE, FILE),
    config={
        "model_type": "instructblip",
        "architectures": ["InstructBlipForConditionalGeneration"],
        "image_token_index": 32001,
        "num_query_tokens": 32,
        "qformer_config": {"model_type": "instructblip_qformer", "vocab_size": 30523},
        "text_config": {
            "model_type": "llama",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pad_token_id": 32000,
            "rms_norm_eps": 1e-06,
            "vocab_size": 32064,
        },
        "use_decoder_only_language_model": True,
        "vision_config": {"model_type": "instructblip_vision_model"},
    },
    parameters=7.9137,
    special={"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": 32000, "<image>": 32001, "<video>": 32002},
    eos={2},
    prompt="{question}",
    counts={(224, 224): 32, (640, 427): 32},
    images={"image_processor_type": "BlipImageProcessor", "size": {"height": 224, "width": 224}},
    processor={"processor_class": "InstructBlipVideoProcessor", "num_query_tokens": 32},
    tokenizer={
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "[PAD]",
        "unk_token": "</s>",
        "add_bos_token": True,
    },
    ends=(2, 1724, 338, 22910, 1048, 445, 1967, 29973),
)

# --- Mistral 3, PaliGemma -------------------------------------------------------------------------

TEKKEN_NAMES = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]"
    " [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]"
    " [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
MISTRAL3 = Published(
    family="mistral3",
    states=(FILE, FILE, NOT, FILE, FILE),
    config={
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "model_type": "pixtral",
            "head_dim": 64,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 1540,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
    },
    parameters=23.34,
    special={name: i for i, name in enumerate(TEKKEN_NAMES)},
    eos={2},
    prompt="<s>[INST][IMG]{question}[/INST]",
    # whole groups of 28 pixels: 23 x 16; 2044 x 1372 becomes 1540 x 1033: 55 x 37
    counts={(640, 427): 368, (2044, 1372): 2035},
    images={
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": {"height": 14, "width": 14},
        "size": {"longest_edge": 1540},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    processor={
        "processor_class": "PixtralProcessor",
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
    tokenizer={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11},
    template=(
        "<s>{% for m in messages %}{% set text %}{% for part in m.content %}{{ '[IMG]' if part.type =="
        " 'image' else part.text }}{% endfor %}{% endset %}{% if m.role == 'system'"
        " %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]{{ text"
        " }}[/INST]{% else %}{{ text }}</s>{% endif %}{% endfor %}"
    ),
)
# In transformers a LLaVA with a tower of its own; its files take 25.37 GB.
PIXTRAL = Published(
    family="mistral3",
    states=(FILE, FILE, NOT, FILE, FILE),
    config={
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 10,
        "text_config": {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "vision_config": {
            "model_type": "pixtral",
            "head_dim": 64,
            "hidden_size": 1024,
            "image_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 16,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    parameters=12682739712,
    special={name: i for i, name in enumerate(TEKKEN_NAMES[:17])},
    eos={2},
    prompt=MISTRAL3.prompt,
    # 40 x 27 patches of 16 pixels; 2044 x 1372 becomes 1024 x 687: 64 x 43
    counts={(640, 427): 1080, (2044, 1372): 2752},
    images=MISTRAL3.images
    | {"patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 1024}},
    processor=MISTRAL3.processor | {"patch_size": 16, "spatial_merge_size": 1},
    tokenizer=MISTRAL3.tokenizer,
    generation=MISTRAL3.generation,
    template=MISTRAL3.template,
)
PALIGEMMA = Published(
    family="paligemma",
    states=(FILE, STAND_IN, NOT, STAND_IN, STAND_IN),
    config={
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "image_token_index": 257152,
        "pad_token_id": 0,
        "projection_dim": 2048,
        "text_config": {
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "vocab_size": 257216,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_image_tokens": 256,
            "patch_size": 14,
            "projection_dim": 2048,
            "vision_use_head": False,
        },
    },
    parameters=2.9235,
    special={"<pad>": 0, "<eos>": 1, "<bos>": 2, "<image>": 257152},
    eos={1},
    prompt="<image>{question}\n",
    counts={(224, 224): 256, (640, 427): 256},
    images={
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 256,
        "size": {"height": 224, "width": 224},
    },
    processor={"processor_class": "PaliGemmaProcessor"},
    tokenizer={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
)

GEMMA3 = Published(
    family="gemma3",
    states=(FILE, STAND_IN, NOT, STAND_IN, FILE),
    config={
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    parameters=4.3001,
    special={
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<start_of_turn>": 105,
        "<end_of_turn>": 106,
        "<start_of_image>": 255999,
        "<end_of_image>": 256000,
        "<image_soft_token>": 262144,
    },
    eos={1, 106},
    prompt=(
        "<bos><start_of_turn>user\n<start_of_image>{question}<end_of_turn>\n<start_of_turn>model\n"
    ),
    counts={(896, 896): 256, (640, 427): 256},
    images={
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 256,
        "size": {"height": 896, "width": 896},
    },
    processor={"processor_class": "Gemma3Processor", "image_seq_length": 256},
    tokenizer={
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    },
    generation={"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0},
    template=(
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role"
        " }}\n{% for part in m.content %}{{ '<start_of_image>' if part.type == 'image' else part.text"
        " }}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}{{"
        " '<start_of_turn>model\n' }}{% endif %}"
    ),
)

# by the names of their folders in PUBLISHED_FILES
MODELS = {
    "llava-1.5-7b-hf": LLAVA,
    "llava-phi-3-mini-hf": LLAVA_PHI3,
    "Qwen2-VL": QWEN2,
    "Qwen2.5-VL": QWEN2_5,
    "Qwen3-VL": QWEN3,
    "Molmo-7B-D-0924": MOLMO_D,
    "Molmo-7B-O-0924": MOLMO_O,
    "blip2-opt-2.7b": BLIP2,
    "instructblip-vicuna-7b": INSTRUCTBLIP,
    "Mistral-Small-3.1": MISTRAL3,
    "pixtral-12b": PIXTRAL,
    "paligemma-3b-mix-224": PALIGEMMA,
    "gemma-3-4b-it": GEMMA3,
}

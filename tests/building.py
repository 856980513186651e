"""Small random models in real folders, built from configs. Attention of random weights is nearly
uniform and hides errors, so q and k are scaled up."""

import json
import re
import string
from types import SimpleNamespace

import tokenizers
import torch
from tokenizers import trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GPT2Tokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5Tokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.conftest import QUESTIONS, ROOT
from vlmdiag.scenes import tiny_llava as tiny

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system'"
    " %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{"
    " message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image'"
    " %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor"
    " %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_processor(images, patch):
    """What a grid asks of the processor of a LLaVA whose tower is CLIP's."""
    return SimpleNamespace(
        image_processor=images,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def sharpen(model, layers):
    """Scale q and k until the median entropy of the attention rows is under half of uniform."""
    ids = torch.randint(10, 500, (1, 60), generator=torch.Generator().manual_seed(0))
    decoder = model.get_decoder()
    before = model.get_decoder().config._attn_implementation
    decoder.set_attn_implementation("eager")
    for _ in range(40):
        with torch.no_grad():
            maps = torch.stack(
                decoder(
                    inputs_embeds=model.get_input_embeddings()(ids), output_attentions=True
                ).attentions
            )[:, 0, :, 30:]
        entropy = -(maps * maps.clamp_min(1e-20).log()).sum(-1) / torch.arange(31, 61).log()
        if entropy.median() < 0.5:
            break
        for layer in layers:
            attention = layer.self_attn
            if hasattr(attention, "qkv_proj"):  # Phi-3: rows of q, then k, then v
                values = decoder.config.num_key_value_heads * attention.head_dim
                attention.qkv_proj.weight.data[:-values] *= 1.3
            elif hasattr(attention, "q_norm"):  # what is normalised has no scale of its own
                attention.q_norm.weight.data *= 1.3
            else:
                attention.q_proj.weight.data *= 1.3
                attention.k_proj.weight.data *= 1.3
    else:
        raise AssertionError("attention stayed flat")
    decoder.set_attn_implementation(before)
    return model


def build_llava(folder, **text):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    config = tiny.make_config(tokenizer)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for name, p in model.model.vision_tower.named_parameters():
        # different patches are to get different features, each mostly from its own pixels
        p.data *= 0.3 if "out_proj" in name else 3
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    return folder


def build_qwen(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.add_bos_token = False
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": "<|im_end|>"})
    tokenizer.chat_template = QWEN_TEMPLATE
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for p in model.model.visual.parameters():
        p.data *= 3
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 48).save_pretrained(
        folder
    )
    return folder


def blip_tokenizer(text):
    """A small tokenizer as the language model `text` has it: OPT's byte-level BPE, Llama's of
    tiny-llava, T5's unigram."""
    if text == "llama":
        return AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "tiny-llava")
    words = [word for question in (*QUESTIONS, "Question: Answer:") for word in question.split()]
    if text == "opt":
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        own = tokenizers.Tokenizer(tokenizers.models.BPE())
        own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        own.train_from_iterator([*QUESTIONS, *words, "Question: Answer:"] * 3, trainer)
        model = json.loads(own.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        return GPT2Tokenizer(
            model["vocab"],
            merges,
            unk_token="</s>",
            bos_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
            add_bos_token=True,
        )
    # not trained: the trainer gives another vocabulary each time
    pieces = dict.fromkeys(
        [
            "▁",
            *"".join(words),
            *string.ascii_letters,
            *string.digits,
            *".,:?/|[]>",
            *("▁" + word.strip("?.,") for word in words),
        ]
    )
    return T5Tokenizer(
        [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            *((piece, -2.0 - 3.0 * (len(piece) == 1)) for piece in pieces),
        ],
        extra_ids=10,
    )


def language_config(text, tokenizer):
    """The config of BLIP's language model `text`."""
    size = {
        "vocab_size": max(len(tokenizer), 520),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": {"opt": 3, "llama": 1, "t5": 1}[text],
    }
    if text == "opt":
        return OPTConfig(
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            bos_token_id=2,
            init_std=0.1,
            **size,
        )
    if text == "llama":
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            **size,
        )
    return T5Config(
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **size,
    )


def build_blip(folder, instruct, text):
    """A random BLIP-2 or InstructBLIP with 6 queries, 4 x 4 patches, 4 Q-Former layers. OPT ends
    its answers at id 3, no EOS of its tokenizer; the Llama config names its BOS as EOS, as Vicuna
    checkpoints do."""
    tokenizer = blip_tokenizer(text)
    queries = 6
    images = BlipImageProcessorPil(size={"height": 56, "width": 56})
    letters = [*string.ascii_lowercase, *string.digits, *"?.,:<>|/[]"]
    words = sorted(
        {word for question in QUESTIONS for word in re.findall("[a-z]+", question.lower())}
    )
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), *words]),
    ]
    bert = BertTokenizer({piece: i for i, piece in enumerate(pieces)})
    processor = (
        InstructBlipProcessor(images, tokenizer, bert, queries)
        if instruct
        else Blip2Processor(images, tokenizer, queries)
    )
    processor.save_pretrained(folder)
    config = (InstructBlipConfig if instruct else Blip2Config)(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "initializer_range": 0.1,
        },
        qformer_config={
            "vocab_size": len(bert),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "initializer_range": 0.1,
        },
        text_config=language_config(text, tokenizer),
        num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = (InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration)(
        config
    )
    model.query_tokens.data.normal_()
    for name, p in model.named_parameters():
        p.data *= (
            3
            if "query.weight" in name or "key.weight" in name or "vision_model.embeddings" in name
            else 1
        )
        # a random T5 says one token over and over
        p.data *= 5 if ".block." in name and p.ndim == 2 and "relative" not in name else 1
    if text != "t5":
        decoder = (
            model.language_model.model.decoder if text == "opt" else model.language_model.model
        )
        sharpen(model.language_model, decoder.layers)
    model.save_pretrained(folder)
    return folder

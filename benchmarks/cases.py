"""What the benchmarks measure on: a random LLaVA of a given size, and pictures of noise.

Nothing heavy is imported before a model is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlmdiag.pictures.samples import Sample, load_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from common import VLM
    from vlmdiag.batch import Batch

QUESTION = "Describe the image."
PATCH = 14
SCORE_DEVIATION = 3
STEADY = 10  # times larger than usual are the text's embeddings, to outweigh the picture's
SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


class Size(NamedTuple):
    """The shape of a model."""

    decoder: tuple[int, ...]  # as in SHAPE
    tower: tuple[int, ...]
    vocabulary: int | None = None  # None: the tokenizer's
    key_value_heads: int | None = None  # None: as many as heads


SIZES = {
    "quick": Size((2, 64, 2, 96), (2, 32, 2, 48)),
    "small": Size((12, 512, 8, 1376), (4, 128, 4, 256)),
    # checkpoints/smol-llava-135m, --prompt 181 as there
    "smol": Size((30, 576, 9, 1536), (5, 96, 4, 192), 49153, 3),
    "7b": Size((32, 4096, 32, 11008), (24, 1024, 16, 4096), 32064),
}


@dataclass
class Case:
    """A model, its samples, and a folder for what a variant writes."""

    vlm: VLM
    samples: list[Sample]
    new_tokens: int
    folder: Path


def decoder_shape(size: str) -> dict[str, int]:
    """The decoder's part of SIZES by name, for a report."""
    return dict(zip(SHAPE, SIZES[size].decoder, strict=True))


def build(
    size: str | Size,
    prompt: int,
    device: str,
    folder: Path,
    dtype: torch.dtype | None = None,
    four_bit: bool = False,
    steady: bool = False,
) -> VLM:
    """A random LLaVA with prompts of about `prompt` tokens. No special token is ever the likeliest,
    so that no answer ends by itself.

    size: a name of SIZES or a shape. dtype: None is float32. four_bit: the decoder's linear layers
    as --quantize_type 4bit makes them. steady: every token has one that it makes likeliest after
    it, whatever the picture, so that answers are hardly changed by an ablation.
    """
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from common import VLM
    from vlmdiag.families import find_family
    from vlmdiag.families.llava import SYSTEM
    from vlmdiag.model.precision import check_quantized
    from vlmdiag.scenes import tiny_llava as tiny

    shape = SIZES[size] if isinstance(size, str) else size
    decoder, tower, vocabulary, key_value_heads = shape
    tokenizer = tiny.make_tokenizer(folder)
    text_ids = tokenizer(f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:").input_ids
    # the picture's tokens fill up what the text leaves, as a square
    side = round((prompt - len(text_ids) + 1) ** 0.5)
    pixels = side * PATCH
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    tower_shape = dict(zip(SHAPE, tower, strict=True))
    vision = CLIPVisionConfig(**tower_shape, image_size=pixels, patch_size=PATCH)
    text = LlamaConfig(
        **dict(zip(SHAPE, decoder, strict=True)),
        vocab_size=vocabulary or len(tokenizer),
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    text.update({name: getattr(tokenizer, name) for name in special})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=side * side,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype or torch.float32)
    model.eval().requires_grad_(False)
    # scores with a deviation of about 3: attention of random weights is nearly uniform and hides
    # errors
    factor = (SCORE_DEVIATION / (text.initializer_range**2 * text.hidden_size)) ** 0.5
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight *= factor
    if steady:
        embeddings = model.get_input_embeddings().weight
        embeddings *= STEADY
        follower = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0))
        model.lm_head.weight += torch.nn.functional.normalize(embeddings, dim=-1)[follower]
    model.lm_head.weight[sorted({*tokenizer.all_special_ids, image_id})] = 0
    if four_bit:
        quantise(model.model.language_model, device)
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": pixels},
        crop_size={"height": pixels, "width": pixels},
        image_mean=tiny.MEAN,
        image_std=tiny.STD,
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.CHAT_TEMPLATE,
    )
    name = size if isinstance(size, str) else "-".join(map(str, decoder))
    vlm = VLM(model, processor, find_family({"model_type": "llava"}), f"random-{name}")
    if four_bit:
        check_quantized(vlm, False, vlm.dtype)
    return vlm


def quantise(decoder: PreTrainedModel, device: str) -> None:
    """Put 4-bit linear layers in the places of the decoder's own. UsageError without
    bitsandbytes."""
    from torch import nn

    from vlmdiag.model.precision import quantization

    quantization("4bit", decoder.dtype)
    import bitsandbytes as bnb

    linear = {
        name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
    }
    for name, module in linear.items():
        four_bit = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=module.weight.dtype,
            device="cpu",
        )
        four_bit.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        # the weights are quantised on their way to the device
        setattr(decoder.get_submodule(parent), child, four_bit.to(device))


def make_samples(folder: Path, count: int) -> list[Sample]:
    """Samples about pictures of coarse noise, which are written into the folder."""
    import numpy as np
    from PIL import Image

    samples = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        noise = np.random.default_rng(index).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.NEAREST)
        picture.save(path, quality=95)
        samples.append(Sample(str(index), path, QUESTION, extra={"image_id": index}))
    return samples


def encode_samples(vlm: VLM, samples: list[Sample]) -> Batch:
    """The prompts of samples about their pictures, read from their files."""
    return vlm.encode(samples, [load_image(sample.image) for sample in samples])


def model_inputs(vlm: VLM, batch: Batch) -> dict[str, Tensor]:
    """What transformers' own forward and generate() want of a batch: ids, mask, pixels."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.image_inputs["pixel_values"].to(vlm.device, vlm.dtype),
    }

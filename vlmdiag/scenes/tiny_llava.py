"""What the tiny models are made of: tokenizer, processor, configs, and pictures as the processor
sees them with what each patch shows.

Shapes: B pictures, P = 144 patches (12 x 12), H = W = 168 pixels.
"""

from __future__ import annotations

import re
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import sentencepiece
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmdiag.families.llava import SYSTEM
from vlmdiag.scenes.questions import Mix, ask, ask_camera, ask_protocol, ask_relation
from vlmdiag.scenes.scene import (
    COLORS,
    CORRIDOR_COLORS,
    CORRIDOR_SHAPES,
    SHAPES,
    Scene,
    corridor_scene,
    floor_scene,
    instance_map,
    render,
)

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64, UInt8
    from torch import Tensor

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ (message['content'] if"
    " message['content'] is string else message['content'][0]['text']) + ' ' }}{% else %}{{"
    " message['role'].upper() + ': ' }}{% if message['content'] is string %}{{ message['content']"
    " }}{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n'"
    " }}{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text']"
    " }}{% endfor %}{% endif %}{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endif"
    " %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# words that no question of the training mix has, each one token as well
EXTRA_WORDS = (
    "under beneath behind front near nearby distant largest smallest top bottom corner middle"
    " object objects detail details one two three four five zero Left Right Above Below Far Close"
    " yes no Can you see any Which What where Why how many this picture scene photo visible both"
    " neither same different"
)
VOCABULARY = 928
IMAGE_SIZE = 168
PATCH = 14
SIDE = IMAGE_SIZE // PATCH
TOKENS = SIDE * SIDE
TOWER_WIDTH = 96
WIDTH = 128
LAYERS = 6
HEADS = 4
ALL_COLORS = list(dict.fromkeys([*COLORS, *CORRIDOR_COLORS]))
ALL_SHAPES = [*SHAPES, *CORRIDOR_SHAPES]
# CLIP's
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
LEAST_SHARE = 0.25  # of a patch that an object covers to be what the patch shows

SceneTask = tuple[str, int, int | str, float]  # what make_scene takes


# --- tokenizer, processor, config -----------------------------------------------------------------


def _training_words() -> list[str]:
    """Every word that occurs in a sample of the training mix, and EXTRA_WORDS."""
    rng = Random(0)
    texts = [SYSTEM, "USER ASSISTANT", EXTRA_WORDS, " ".join(ALL_COLORS + ALL_SHAPES)]
    for i in range(6000):
        mix: Mix | None = None
        if i % 4 == 0:
            scene = corridor_scene(rng)
            mix = {ask_camera: 1}
        else:
            scene = floor_scene(rng, rng.randint(1, 4))
            if i % 4 == 1:
                mix = {ask_protocol: 1, ask_relation: 1}
        question = ask(rng, scene, mix)
        texts += [question.text, question.answer]
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})


def _train_sentencepiece(words: Sequence[str]) -> bytes:
    """The bytes of a tokenizer.model in which each word is one token."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "words.txt"
        # with and without a space before: a word may follow a line break
        corpus.write_text("".join(f"{word} ?{word}\n" * 20 for word in words))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=f"{scratch}/tokenizer",
            model_type="bpe",
            vocab_size=VOCABULARY - 2,
            byte_fallback=True,
            split_digits=True,
            num_threads=1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            required_chars=string.printable.strip(),
            pad_id=-1,
            minloglevel=2,
        )
        return (Path(scratch) / "tokenizer.model").read_bytes()


def make_tokenizer(folder: str | Path) -> LlamaTokenizer:
    """A Llama tokenizer (BPE, byte fallback) in which every word of the training mix is one token;
    writes tokenizer.model and tokenizer_config.json."""
    words = _training_words()
    (Path(folder) / "tokenizer.model").write_bytes(_train_sentencepiece(words))
    (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = LlamaTokenizer.from_pretrained(str(folder))
    tokenizer.add_bos_token = True
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    for word in words:
        if len(tokenizer.encode(f"? {word}")) != len(tokenizer.encode("?")) + 1:
            raise ValueError(f"{word!r} is not one token; raise VOCABULARY")
    return tokenizer


def word_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The id of a word inside a sentence; of its first piece if it is no single token."""
    before = tokenizer.encode("?", add_special_tokens=False)
    return int(tokenizer.encode(f"? {word}", add_special_tokens=False)[len(before)])


def make_processor(tokenizer: LlamaTokenizer) -> LlavaProcessor:
    """CLIP preprocessing that pads to a square, as LLaVA-1.5 was trained."""
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(
    tokenizer: LlamaTokenizer, vision_feature_layer: int | list[int] = -2, **extra: object
) -> LlavaConfig:
    """The config of a tiny model; extra: further fields of LlavaConfig."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
        **extra,
    )


# --- pictures -------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A picture to train on, with what each of its P patches shows."""

    scene: Scene
    pixels: UInt8[np.ndarray, "H W 3"]
    color: Int64[np.ndarray, " P"]  # 1 + index in ALL_COLORS, 0: no object
    shape: Int64[np.ndarray, " P"]  # 1 + index in ALL_SHAPES, 0: no object
    center: Float32[np.ndarray, "P 2"]  # of the patch's object, -1 to 1 of the padded picture


def square(picture: Image.Image, fill: int | tuple[int, ...]) -> Image.Image:
    """Centred on a square of its longer side, as the image processor pads."""
    side = max(picture.size)
    padded = Image.new(picture.mode, (side, side), fill)
    padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return padded


def object_of_patch(scene: Scene) -> Int64[np.ndarray, " P"]:
    """Index of the object that covers each patch most, -1 for none: at least a quarter of the
    patch, or the object's best patch."""
    padded = np.asarray(square(Image.fromarray(instance_map(scene)), 0))
    patch_row = np.arange(len(padded)) * SIDE // len(padded)  # of each pixel row, or column
    counts = np.zeros((len(scene.things) + 1, SIDE, SIDE))
    np.add.at(counts, (padded, patch_row[:, None], patch_row[None, :]), 1)
    share = counts[1:].reshape(len(scene.things), TOKENS) / (len(padded) / SIDE) ** 2
    covering = np.where(share.max(0) >= LEAST_SHARE, share.argmax(0), -1)
    for i in range(len(scene.things)):
        covering[share[i].argmax()] = i
    return covering


def example(scene: Scene) -> Example:
    """The picture as the processor gives it to the tower, and what its patches show."""
    background = tuple(int(mean * 255) for mean in MEAN)
    picture = square(render(scene), background)
    pixels = np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    side = max(scene.width, scene.height)
    offset = np.array([side - scene.width, side - scene.height]) / 2  # of the padding
    # the first entry of each stands for no object
    colors = [0]
    shapes = [0]
    centers: list[tuple[float, ...]] = [(0.0, 0.0)]
    for thing in scene.things:
        colors.append(1 + ALL_COLORS.index(thing.color))
        shapes.append(1 + ALL_SHAPES.index(thing.shape))
        centers.append(tuple((np.array([thing.x, thing.y]) + offset) / side * 2 - 1))
    covering = object_of_patch(scene) + 1
    return Example(
        scene,
        pixels,
        np.array(colors)[covering].astype(np.int64),
        np.array(shapes)[covering].astype(np.int64),
        np.array(centers)[covering].astype(np.float32),
    )


def make_scene(task: SceneTask) -> Scene:
    """(seed, index, kind, correlation of height and depth) -> scene; kind: number of shapes on a
    floor, or 'corridor', where the two are always free."""
    seed, index, kind, correlation = task
    rng = Random(f"{seed}-{kind}-{index}")
    if isinstance(kind, str):
        return corridor_scene(rng)
    return floor_scene(rng, kind, correlation)


def make_example(task: SceneTask) -> Example:
    """The example of make_scene's scene."""
    return example(make_scene(task))


def normalized(pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[Tensor, "B 3 H W"]:
    """The pixels as the processor gives them."""
    zero_to_one = torch.tensor(np.asarray(pixels)).float() / 255
    standard = (zero_to_one - torch.tensor(MEAN)).div(torch.tensor(STD))
    return standard.permute(0, 3, 1, 2)

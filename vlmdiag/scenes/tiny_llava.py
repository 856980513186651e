"""What the tiny models are made of: tokenizer, processor, configs, pictures as the processor sees
them, and packed question turns."""

import re
import string
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import sentencepiece
import torch
from PIL import Image
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmdiag.families.llava import SYSTEM
from vlmdiag.scenes.questions import ask, ask_camera, ask_protocol, ask_relation
from vlmdiag.scenes.scene import (
    COLORS,
    CORRIDOR_COLORS,
    CORRIDOR_SHAPES,
    SHAPES,
    corridor_scene,
    floor_scene,
    instance_map,
    render,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ (message['content'] if"
    " message['content'] is string else message['content'][0]['text']) + ' ' }}{% else %}{{"
    " message['role'].upper() + ': ' }}{% if message['content'] is string %}{{ message['content']"
    " }}{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n'"
    " }}{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text']"
    " }}{% endfor %}{% endif %}{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endif"
    " %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
EXTRA_WORDS = [
    "under",
    "beneath",
    "behind",
    "front",
    "near",
    "nearby",
    "distant",
    "largest",
    "smallest",
    "top",
    "bottom",
    "corner",
    "middle",
    "object",
    "objects",
    "detail",
    "details",
    "one",
    "two",
    "three",
    "four",
    "five",
    "zero",
    "Left",
    "Right",
    "Above",
    "Below",
    "Far",
    "Close",
    "yes",
    "no",
    "Can",
    "you",
    "see",
    "any",
    "Which",
    "What",
    "where",
    "Why",
    "how",
    "many",
    "this",
    "picture",
    "scene",
    "photo",
    "visible",
    "both",
    "neither",
    "same",
    "different",
]
VOCABULARY = 928
IMAGE_SIZE, PATCH = 168, 14
SIDE = IMAGE_SIZE // PATCH
TOKENS = SIDE * SIDE
TOWER_WIDTH, WIDTH, LAYERS, HEADS = 96, 128, 6, 4
ALL_COLORS = list(dict.fromkeys([*COLORS, *CORRIDOR_COLORS]))
ALL_SHAPES = [*SHAPES, *CORRIDOR_SHAPES]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


def make_tokenizer(folder):
    """A Llama tokenizer (BPE, byte fallback) in which every word of the training mix is one token;
    writes tokenizer.model and tokenizer.json."""
    rng, texts = (
        Random(0),
        [SYSTEM, "USER ASSISTANT", " ".join(EXTRA_WORDS), " ".join(ALL_COLORS + ALL_SHAPES)],
    )
    for i in range(6000):
        scene = corridor_scene(rng) if i % 4 == 0 else floor_scene(rng, rng.randint(1, 4))
        question = ask(
            rng,
            scene,
            (
                {ask_camera: 1}
                if i % 4 == 0
                else {ask_protocol: 1, ask_relation: 1}
                if i % 4 == 1
                else None
            ),
        )
        texts += [question.text, question.answer]
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "words.txt"
        corpus.write_text(
            "".join(f"{word} ?{word}\n" * 20 for word in words)
        )  # with and without a space before: a word may follow a line break
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
        (Path(folder) / "tokenizer.model").write_bytes(
            (Path(scratch) / "tokenizer.model").read_bytes()
        )
    (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = LlamaTokenizer.from_pretrained(str(folder))
    tokenizer.add_bos_token = True
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    for word in words:
        if len(tokenizer.encode(f"? {word}")) != len(tokenizer.encode("?")) + 1:
            raise ValueError(f"{word!r} is not one token; raise VOCABULARY")
    return tokenizer


def make_processor(tokenizer):
    """CLIP preprocessing that pads to a square, as LLaVA-1.5 was trained."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=size,
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer, **extra):
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
        vision_feature_layer=extra.pop("vision_feature_layer", -2),
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
        **extra,
    )


# --- pictures -------------------------------------------------------------------------------------


def square(picture, fill):
    """Centred on a square of its longer side, as the image processor pads."""
    side = max(picture.size)
    out = Image.new(picture.mode, (side, side), fill)
    out.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return out


def example(scene):
    """(pixels (168, 168, 3) uint8, colour (P,), shape (P,), centre (P, 2)): per patch the object
    that covers it most (0 = none; at least a quarter of the patch, or the object's best patch) and
    that object's centre in [-1, 1] of the padded picture."""
    pixels = np.asarray(
        square(render(scene), tuple(int(m * 255) for m in MEAN)).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC
        )
    )
    padded = np.asarray(square(Image.fromarray(instance_map(scene)), 0))
    cell = np.arange(len(padded)) * SIDE // len(padded)
    counts = np.zeros((len(scene.things) + 1, SIDE, SIDE))
    np.add.at(counts, (padded, cell[:, None], cell[None, :]), 1)
    share = counts[1:].reshape(len(scene.things), TOKENS) / (len(padded) / SIDE) ** 2
    best = np.where(share.max(0) >= 0.25, share.argmax(0), -1)
    for i in range(len(scene.things)):
        best[share[i].argmax()] = i
    color = np.array([0] + [1 + ALL_COLORS.index(thing.color) for thing in scene.things])[best + 1]
    shape = np.array([0] + [1 + ALL_SHAPES.index(thing.shape) for thing in scene.things])[best + 1]
    offset = (
        np.array(
            [
                max(scene.width, scene.height) - scene.width,
                max(scene.width, scene.height) - scene.height,
            ]
        )
        / 2
    )
    centres = np.array(
        [(0.0, 0.0)]
        + [
            tuple((np.array([thing.x, thing.y]) + offset) / max(scene.width, scene.height) * 2 - 1)
            for thing in scene.things
        ]
    )
    return (
        pixels,
        color.astype(np.int64),
        shape.astype(np.int64),
        centres[best + 1].astype(np.float32),
    )


def make_scene(task):
    """(seed, index, kind, correlation of height and depth) -> scene; kind: number of shapes on a
    floor, or 'corridor', where the two are always free."""
    seed, index, kind, correlation = task
    rng = Random(f"{seed}-{kind}-{index}")
    return corridor_scene(rng) if kind == "corridor" else floor_scene(rng, kind, correlation)


def make_example(task):
    scene = make_scene(task)
    return (scene, *example(scene))


def normalized(pixels):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) as the processor gives it."""
    return (
        (torch.tensor(np.asarray(pixels)).float() / 255 - torch.tensor(MEAN))
        .div(torch.tensor(STD))
        .permute(0, 3, 1, 2)
    )


# --- packed turns ---------------------------------------------------------------------------------


class Packer:
    """Packs single-turn prompts of one picture into one row: slots of equal length behind a shared
    prefix (system, picture). With `packed_attention` a slot sees the prefix and itself only, at the
    positions it would have alone, so each turn is trained exactly as it will be asked.
    """

    LAYOUTS = {"short": (10, 28), "long": (3, 90)}  # slots, tokens a slot

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        heads = (tokenizer.encode("USER: <image>"), tokenizer.encode(f"{SYSTEM} USER: <image>"))
        self.heads = [head[: head.index(self.image)] for head in heads]

    def turn(self, question):
        """(prompt ids after the picture, answer ids with </s>)."""
        key = (question.text, question.answer)
        if key not in self.cache:
            prompt = f"USER: <image>\n{question.text} ASSISTANT:"
            ids = self.tokenizer.encode(prompt)
            full = self.tokenizer.encode(f"{prompt} {question.answer}") + [
                self.tokenizer.eos_token_id
            ]
            if full[: len(ids)] != ids:
                raise ValueError(f"the answer changes the prompt's tokens: {key}")
            start = ids.index(self.image) + 1
            self.cache[key] = ids[start:], full[len(ids) :]
        return self.cache[key]

    def row(self, rng, scene, system, layout, mix=None):
        """ids, targets (-100 = none), loss weights and positions, each (prefix + slots * size,);
        and the questions."""
        slots, size = self.LAYOUTS[layout]
        head = self.heads[system]
        prefix = len(head) + TOKENS
        length = prefix + slots * size
        ids, targets, weights = (
            np.zeros(length, np.int64),
            np.full(length, -100),
            np.zeros(length, np.float32),
        )
        ids[:prefix] = head + [self.image] * TOKENS
        positions = np.concatenate(
            [np.arange(prefix), np.tile(np.arange(prefix, prefix + size), slots)]
        )
        questions = []
        while len(questions) < slots:
            question = ask(rng, scene, mix)
            prompt, answer = self.turn(question)
            if len(prompt) + len(answer) > size:
                continue
            start = prefix + len(questions) * size
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            ids[start:end], targets[middle:end], weights[middle:end] = (
                prompt + answer,
                answer,
                len(answer) ** -0.5,
            )
            questions.append(question)
        return (ids, targets, weights, positions), questions


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, packed=None, **kwargs
):
    """Causal attention of rows made by Packer: query, key, value (B, H, T, D); packed: (prefix
    length, slots, slot length)."""
    prefix, slots, size = packed
    causal = torch.ones(
        max(prefix, size), max(prefix, size), dtype=torch.bool, device=query.device
    ).triu(1)

    def fold(x):  # (B, H, slots * size, ...) -> (B, H, slots, size, ...)
        return x.unflatten(2, (slots, size))

    query = query * scaling
    shared_key, shared_value = key[:, :, :prefix], value[:, :, :prefix]
    before = (query[:, :, :prefix] @ shared_key.mT).masked_fill(
        causal[:prefix, :prefix], -1e4
    ).softmax(-1, dtype=query.dtype) @ shared_value
    turns, turn_keys, turn_values = (
        query[:, :, prefix:],
        fold(key[:, :, prefix:]),
        fold(value[:, :, prefix:]),
    )
    own = (fold(turns) @ turn_keys.mT).masked_fill(causal[:size, :size], -1e4).flatten(2, 3)
    weights = torch.cat([turns @ shared_key.mT, own], -1).softmax(-1, dtype=query.dtype)
    after = weights[..., :prefix] @ shared_value + (
        fold(weights[..., prefix:]) @ turn_values
    ).flatten(2, 3)
    return torch.cat([before, after], 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed_turns", packed_attention)
AttentionMaskInterface.register("packed_turns", lambda *args, **kwargs: None)

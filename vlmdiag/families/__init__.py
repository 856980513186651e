"""What the tools know of a model family: where its parts are, how its prompt and image grid are
laid out, what it has and lacks.

One file per family defines FAMILY. A new model needs one new file here, listed in FAMILIES below;
`generic.py` serves every other type that follows the conventions of transformers 5."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FAMILIES = (
    "nvila",
    "convllava",
    "llava_original",
    "mistral3",
    "llava",
    "llava_next",
    "idefics3",
    "internvl",
    "aya_vision",
    "paligemma",
    "gemma3",
    "qwen_vl",
    "blip2",
    "instructblip",
    "minigpt4",
    "mplug_owl2",
    "molmo",
    "molmo2",
    "ovis2",
    "deepseek_vl",
    "janus",
    "kosmos2",
)


@dataclass(frozen=True)
class Family:
    """Data and a few small functions. Those that take `vlm` get the loaded common.VLM."""

    name: str
    model_types: tuple  # config.model_type
    architectures: tuple = ()  # config.architectures, for types that share a model_type
    recognises: Callable = (
        None  # (config.json as a dict) -> bool, where types and architectures do not tell
    )
    # (config.json as a dict) -> Family, where it depends on the text model what such a model has
    variant: Callable = None
    # (folder) -> the config as a dict, for folders without a config.json; None: not of this family
    reads: Callable = None
    read_config: Callable = (
        None  # (path, config.json as a dict) -> config, for layouts that transformers does not read
    )
    load: Callable = None  # (path, config, **options) -> (model, processor)
    parts: Callable = None  # (model) -> Parts
    # (vlm, image size (width, height), image inputs of one sample) -> grid.PatchGrid, or None: the
    # grid is unknown
    grid: Callable = None
    # (vlm, image size, image inputs of one sample) -> PatchGrid of the tower's patches, where
    # vision tokens are mixed from them
    patches: Callable = None
    # (vlm, image size, image inputs) -> (P, k) positions in the tower's output that a vision token
    # is made of, its tiles one after
    sources: Callable = None
    # the other with their CLS, -1 where there are fewer; None: one position each, in the same
    # order, behind a CLS or not
    # (vlm, prompt) -> more image inputs of one sample, {name: (1, m) ids or mask}, for connectors
    # that read the prompt
    read_text: Callable = None
    # (vlm, input_ids, attention_mask, image inputs) -> (positions as the model takes them, next
    # position (B,))
    positions: Callable = None
    # (vlm, batch) -> more inputs of the model's forward over a prompt, {name: (B, T)}: token types,
    # a mask of the picture's positions
    inputs: Callable = None
    # features.deepstack_features are added to the outputs of the decoder's first layers, so its
    # inputs are not all that it gets
    deepstack: bool = False
    rotary: Callable = None  # (vlm) -> Rotary, or None: no rotary positions
    default_system: Callable = None  # (vlm) -> system prompt where the user gives none, or None
    prompt: Callable = (
        None  # (vlm, question, system) -> text, for processors without a chat template
    )
    markup: tuple = ()  # token strings that stand around or between image tokens
    has: frozenset = field(default_factory=lambda: frozenset({"decoder-only"}))


@dataclass(frozen=True)
class Parts:
    """Modules of a loaded model, and the vision token count's source: `decoder` is the module that
    gets inputs_embeds and position_ids."""

    decoder: object
    layers: list
    norm: object
    lm_head: object
    tower: object
    connector: object
    qformer: object = (
        None  # QFormer, where the vision tokens are queries that read the tower's output
    )
    # the tower's blocks, where its positions are the vision tokens' (Family.sources), or what a
    # QFormer reads
    vision_blocks: list = ()


@dataclass(frozen=True)
class QFormer:
    """Attention modules between patches and vision tokens. P: patches; S: vision sequence, the
    patches and, first, CLS where `cls` is True; m: instruction tokens behind the queries. Each list
    has one module per layer; a module's call gives (output, weights), weights only with eager
    attention. A module that is in both lists has one map (B, H, q, q + S) over the queries and,
    behind them, S."""

    queries: int  # q: the first q vision tokens; those behind them are made of no patch
    self_attention: list  # (B, H, q + m, q + m)
    cross_attention: (
        list  # (B, H, q, S): instruction tokens do not read the picture; None in layers without
    )
    cls: bool
    instruction: str | None = (
        # name in Batch.image_rows of the instruction's ids (1, m) by the processor's
        # qformer_tokenizer; None: m = 0
        None
    )


@dataclass(frozen=True)
class Rotary:
    """Rotary positions. inv_freq (h,): dimension j turns with j + h (half-split) by position *
    inv_freq[j]; dimensions past 2h do not turn."""

    inv_freq: torch.Tensor

    def turn(self, x, delta):
        """x (..., D) rotated by `delta` positions, in float32."""
        half = len(self.inv_freq)
        angle = delta * self.inv_freq.to(x.device)
        a, b = x[..., :half].float(), x[..., half : 2 * half].float()
        return torch.cat(
            [
                a * angle.cos() - b * angle.sin(),
                b * angle.cos() + a * angle.sin(),
                x[..., 2 * half :].float(),
            ],
            -1,
        )

    def rate(self, x):
        """Derivative of turn(x, delta) with respect to delta at 0."""
        half = len(self.inv_freq)
        speed = self.inv_freq.to(x.device)
        a, b = x[..., :half].float(), x[..., half : 2 * half].float()
        return torch.cat(
            [-b * speed, a * speed, torch.zeros_like(x[..., 2 * half :], dtype=torch.float32)], -1
        )


def find_family(config):
    """The family of a config.json (a dict); None where no file describes it."""
    for name in FAMILIES:
        family = importlib.import_module(f"vlmdiag.families.{name}").FAMILY
        named = config.get("model_type") in family.model_types or set(
            config.get("architectures") or ()
        ) & set(family.architectures)
        if family.recognises(config) if family.recognises else named:
            return family.variant(config) if family.variant else family
    return None


def read_folder(folder):
    """The config as a dict of a folder without config.json that a family knows how to read; None
    where none does."""
    for name in FAMILIES:
        family = importlib.import_module(f"vlmdiag.families.{name}").FAMILY
        if family.reads and (found := family.reads(folder)) is not None:
            return found
    return None


def checked(loaded):
    """The model of from_pretrained(..., output_loading_info=True); ValueError that names parameters
    no file filled."""
    model, info = loaded
    missing, mismatched = (
        sorted(info["missing_keys"]),
        sorted(str(key) for key in info["mismatched_keys"]),
    )
    if missing or mismatched:
        names = missing or mismatched
        raise ValueError(
            f"{len(names)} parameters are {'in no file' if missing else 'of another shape'}, such"
            f" as {', '.join(names[:3])}"
        )
    return model


def known_types():
    """All model types that have a file here, sorted."""
    return sorted(
        {
            t
            for name in FAMILIES
            for t in importlib.import_module(f"vlmdiag.families.{name}").FAMILY.model_types
        }
    )

"""What the tools know of a model family: where its parts are, how its prompt and image grid are laid out, what it has and lacks.

One file per family defines FAMILY. A new model needs one new file here, listed in FAMILIES below; `generic.py` serves every other type that
follows the conventions of transformers 5."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

FAMILIES = ("llava_original", "llava", "qwen2_5_vl")


@dataclass(frozen=True)
class Family:
    """Data and a few small functions. Those that take `vlm` get the loaded common.VLM."""

    name: str
    model_types: tuple  # config.model_type
    architectures: tuple = ()  # config.architectures, for types that share a model_type
    read_config: Callable = None  # (path, config.json as a dict) -> config, for layouts that transformers does not read
    load: Callable = None  # (path, config, **options) -> (model, processor)
    parts: Callable = None  # (model) -> Parts
    grid: Callable = None  # (vlm, image size (width, height), image inputs of one sample) -> grid.PatchGrid, or None: the grid is unknown
    positions: Callable = None  # (vlm, input_ids, attention_mask, image inputs) -> (positions as the model takes them, next position (B,))
    rotary: Callable = None  # (vlm) -> capturing.Rotary, or None: no rotary positions
    default_system: Callable = None  # (vlm) -> system prompt where the user gives none, or None
    prompt: Callable = None  # (vlm, question, system) -> text, for processors without a chat template
    markup: tuple = ()  # token strings that stand around or between image tokens
    has: frozenset = field(default_factory=lambda: frozenset({"decoder-only"}))


@dataclass(frozen=True)
class Parts:
    """Modules of a loaded model, and the vision token count's source: `decoder` is the module that gets inputs_embeds and position_ids."""

    decoder: object
    layers: list
    norm: object
    lm_head: object
    tower: object
    connector: object


def find_family(model_type, architectures=()):
    """The family of a config; None where no file describes it."""
    for name in FAMILIES:
        family = importlib.import_module(f"models.{name}").FAMILY
        if model_type in family.model_types or set(architectures or ()) & set(family.architectures):
            return family
    return None


def known_types():
    """All model types that have a file here, sorted."""
    return sorted({t for name in FAMILIES for t in importlib.import_module(f"models.{name}").FAMILY.model_types})

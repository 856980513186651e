"""What the tools know of a model family: where its parts are, how its prompt and image grid are
laid out, what it has and lacks.

A family is data and a few small functions; those that take `vlm` get the loaded model
(vlmdiag.types.VLM). Shapes: B rows of a batch, T prompt length with padding, P vision tokens of one
sample, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.types import VLM, ImageFeatures

Config = dict[str, Any]  # config.json
Inputs = Mapping[str, Tensor]  # image inputs of one sample, or joined of a batch
Size = tuple[int, int]  # width, height of a picture
Loaded = tuple["PreTrainedModel", "ProcessorMixin"]


class LoadOptions(TypedDict, total=False):
    """How common.load_model() wants a model loaded; dtype is always given."""

    dtype: torch.dtype
    device_map: str | dict[str, Any] | None
    vision_tower_path: str | None
    conv_mode: str | None
    trust_remote_code: bool
    quantization_config: BitsAndBytesConfig | None
    # a file of whole parameters in place of the checkpoint's (Family.trained)
    trained: Path | None
    # model and processor that the user has in memory: nothing is read of files
    in_memory: Loaded | None


@dataclass(frozen=True)
class Parts:
    """Modules of a loaded model. `decoder` is the module that gets inputs_embeds and
    position_ids."""

    decoder: PreTrainedModel
    layers: list[nn.Module]
    norm: nn.Module
    lm_head: nn.Linear
    tower: nn.Module | None
    connector: nn.Module | None
    # where the vision tokens are queries that read the tower's output
    qformer: QFormer | None = None
    # the tower's blocks, where its positions are the vision tokens' (Family.sources), or what a
    # QFormer reads
    vision_blocks: Sequence[nn.Module] = ()
    # layers without attention: what they are, such as "linear_attention", by their number
    without_attention: Mapping[int, str] = field(default_factory=dict)

    @property
    def attending(self) -> list[int]:
        """Numbers of the layers that attend."""
        return [i for i in range(len(self.layers)) if i not in self.without_attention]


@dataclass(frozen=True)
class QFormer:
    """Attention modules between patches and vision tokens.

    P: patches; S: vision sequence, the patches and, first, CLS where `cls` is True; q: queries; m:
    instruction tokens behind them. Each list has one module per layer; a module's call gives
    (output, weights), weights only with eager attention. A module that is in both lists has one map
    (B, H, q, q + S) over the queries and, behind them, S.
    """

    queries: int  # q: the first q vision tokens; those behind them are made of no patch
    self_attention: list[nn.Module]  # (B, H, q + m, q + m)
    # (B, H, q, S): instruction tokens do not read the picture; None in layers without
    cross_attention: list[nn.Module | None]
    cls: bool
    # name in Batch.image_rows of the instruction's ids (1, m) by the processor's
    # qformer_tokenizer; None: m = 0
    instruction: str | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of a layer: of the 2h dimensions from `start` on (negative: from the end of
    the head), dimension j turns with j + h (half-split) or 2j with 2j + 1 (interleaved) by position
    * inv_freq[j]; the others do not turn."""

    inv_freq: Float[Tensor, " h"]
    interleaved: bool = False
    start: int = 0

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is before the dimensions that turn, the two of each pair, what is behind, in
        float32."""
        x = x.float()
        half = len(self.inv_freq)
        start = self.start % x.shape[-1]
        end = start + 2 * half
        turning = x[..., start:end]
        if self.interleaved:
            return x[..., :start], turning[..., 0::2], turning[..., 1::2], x[..., end:]
        return x[..., :start], turning[..., :half], turning[..., half:], x[..., end:]

    def _together(self, before: Tensor, a: Tensor, b: Tensor, behind: Tensor) -> Tensor:
        """The inverse of _apart()."""
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([before, turned, behind], -1)

    def turn(self, x: Float[Tensor, "... D"], delta: float) -> Float[Tensor, "... D"]:
        """x rotated by `delta` positions, in float32."""
        angle = delta * self.inv_freq.to(x.device)
        before, a, b, behind = self._apart(x)
        cos, sin = angle.cos(), angle.sin()
        return self._together(before, a * cos - b * sin, b * cos + a * sin, behind)

    def rate(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Derivative of turn(x, delta) with respect to delta at 0."""
        speed = self.inv_freq.to(x.device)
        before, a, b, behind = self._apart(x)
        still = (torch.zeros_like(before), torch.zeros_like(behind))
        return self._together(still[0], -b * speed, a * speed, still[1])


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. `has` names its capabilities: decoder-only, causal, rotary, grid,
    square-pad (docs/families.md)."""

    name: str
    model_types: tuple[str, ...]  # config.model_type

    # --- which models are of this family, and how they are loaded ---
    # config.architectures, for types that share a model_type
    architectures: tuple[str, ...] = ()
    # where types and architectures do not decide
    recognises: Callable[[Config], bool] | None = None
    # where it depends on the text model what such a model has
    variant: Callable[[Config], Family] | None = None
    # (folder) -> config, for folders without a config.json; None: not of this family
    reads: Callable[[str], Config | None] | None = None
    # (path, config.json) -> config, for layouts that transformers does not read
    read_config: Callable[[str, Config], PreTrainedConfig] | None = None
    # (path, config, **LoadOptions) -> model and processor
    load: Callable[..., Loaded]
    parts: Callable[[PreTrainedModel], Parts]
    # (stored name of a parameter) -> the model's, for layouts that transformers does not read:
    # where an adapter's tensors belong
    names: Callable[[str], str | None] | None = None
    # load() takes the option `trained`: LLaVA's non_lora_trainables.bin
    trained: bool = False

    # --- the prompt ---
    # (vlm, prompt without a system prompt) -> system prompt where neither the user nor the template
    # gives one, or None
    default_system: Callable[[VLM, str], str | None] | None = None
    # (vlm, question, system) -> text, for processors without a chat template
    prompt: Callable[[VLM, str, str | None], str] | None = None
    # `prompt` is a guess, so a chat template of the tokenizer's comes before it
    guesses_prompt: bool = False
    # (vlm) -> the token that ends an answer, where no chat template says so
    turn_end: Callable[[VLM], str | None] | None = None
    # token strings that stand around or between image tokens
    markup: tuple[str, ...] = ()
    # (vlm, prompt) -> more image inputs of one sample, {name: (1, m)}, for connectors that read it
    read_text: Callable[[VLM, str], dict[str, Tensor]] | None = None
    # (vlm, ids (B, T), mask (B, T), image inputs) -> positions as the model takes them, next (B,)
    positions: Callable[
        [VLM, Tensor, Tensor, Inputs], tuple[Int[Tensor, "... B T"], Int[Tensor, " B"]]
    ]
    # (vlm, batch) -> more inputs of the forward over a prompt, {name: (B, T)}: token types, masks
    inputs: Callable[[VLM, Batch], dict[str, Tensor]] | None = None

    # --- where vision tokens come from ---
    # the tower gets one picture at a time: transformers' class takes several of different sizes in
    # another form than joined by vlmdiag.batch
    alone: bool = False
    # (vlm, image inputs on the device) -> image features, for classes of transformers whose
    # get_image_features does not give what enters the decoder; prompts then enter as embeddings
    features: Callable[[VLM, Inputs], ImageFeatures] | None = None
    # (vlm, picture size, image inputs of one sample) -> a box per vision token; None: unknown
    grid: Callable[[VLM, Size, Inputs], PatchGrid | None] | None = None
    # the same for the tower's patches, where vision tokens are mixed from them
    patches: Callable[[VLM, Size, Inputs], PatchGrid] | None = None
    # (vlm, picture size, image inputs) -> (P, k) positions in the tower's output that a vision
    # token is made of, its tiles one after the other with their CLS, -1 where there are fewer;
    # None: one position each, in the same order, behind a CLS or not
    sources: Callable[[VLM, Size, Inputs], Int[np.ndarray, "P k"]] | None = None
    # its decoder makes no cache of keys and values by itself
    makes_no_cache: bool = False
    # (vlm) -> the layers to whose outputs features.deepstack_features are added, one each
    deepstack: Callable[[VLM], Sequence[int]] | None = None

    # (vlm) -> the ways in which positions may turn queries and keys, of which each layer's own is
    # found by its keys (vlmdiag.model.rotary); none: no rotary positions
    rotary: Callable[[VLM], Sequence[Rotary]] | None = None
    has: frozenset[str] = field(default_factory=lambda: frozenset({"decoder-only"}))
    file: Path | None = None  # a user's own file, set where it is found

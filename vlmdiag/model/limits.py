"""What a model takes: prompts of so many positions, pictures that its processor does not blow up.
What is larger is refused before it takes the memory, or is measured where the model was never
trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM

SCALED_LIMIT = 12_000_000  # pixels of a picture at the size to which a processor brings it
ANSWER_LIMIT = (
    131_072  # tokens of an answer of a model that does not say how many positions it reads
)
# scalings of rotary positions that leave max_position_embeddings as it was before them
_STRETCHED = ("linear", "dynamic")


def context_of(config: PretrainedConfig) -> int | None:
    """The positions that a model's decoder reads, None where its config does not say."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in _STRETCHED:
        positions = int(positions * rope.get("factor", 1))
    return positions


def check_lengths(vlm: VLM, lengths: Sequence[int]) -> None:
    """ValueError where a prompt leaves no position for an answer. lengths: in tokens."""
    context = context_of(vlm.model.config)
    if context is not None and max(lengths) >= context:
        raise ValueError(
            f"the prompt has {max(lengths)} tokens, the model reads {context}: the question, the"
            " system prompt or the picture has to be smaller"
        )


def steps_that_fit(vlm: VLM, batch: Batch, wanted: int) -> int:
    """So many of the wanted new tokens as the context has room for after the longest prompt."""
    context = context_of(vlm.model.config)
    return min(wanted, ANSWER_LIMIT if context is None else context - max(batch.lengths))


def check_answers(vlm: VLM, batch: Batch, answers: Sequence[Sequence[int]]) -> None:
    """ValueError where a given answer is longer than what the model reads behind its prompt."""
    context = context_of(vlm.model.config)
    for length, ids in zip(batch.lengths, answers, strict=True):
        if context is not None and length + len(ids) > context:
            raise ValueError(
                f"the given answer has {len(ids)} tokens behind a prompt of {length}, the model"
                f" reads {context}"
            )


def check_scaled(vlm: VLM, size: tuple[int, int]) -> None:
    """ValueError for a strip that the processor would make huge, because it brings the shorter side
    to a length of its own. size: (width, height)."""
    processor = getattr(vlm.processor, "image_processor", None)
    wanted = getattr(processor, "size", None) or {}
    shorter, longer = sorted(size)
    edge = wanted.get("shortest_edge")
    # with a longest edge the result is bounded, and a picture that is made a square is no strip
    pads = getattr(processor, "do_pad", False)
    is_squared = pads and type(processor).__name__.startswith("LlavaImage")
    if not isinstance(edge, int) or wanted.get("longest_edge") or is_squared:
        return
    scaled = edge * edge * longer // shorter
    if scaled > SCALED_LIMIT:
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels: the model's processor brings the shorter"
            f" side to {edge}, which makes {scaled / 1e6:.0f} million pixels, more than"
            f" {SCALED_LIMIT // 10**6} million"
        )

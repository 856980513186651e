"""About how much memory a model takes, from its sizes: its weights, and what the commands hold
beside them.

    weights  = parameters x bytes of the type; --quantize_type: the decoder's linear layers take 1
               (int8) or 1/2 + 4/64 (4bit: a float32 scale for 64 weights), all others 2
    cache    = 2 L B K H_kv D x bytes of the type
    captured = what a measure keeps until its batch is done, see MEASURES

L layers, H heads, H_kv key-value heads, D head dimension, d width, T prompt length, P vision tokens
of it, N new tokens, K = T + N, B prompts in a batch. Beside these come the activations of one layer
and of the tower, and what CUDA takes for itself (about 1 GB): keep a fifth of a GPU free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from vlmdiag.types import Record

if TYPE_CHECKING:
    from vlmdiag.families import Parts

BYTES = {"float32": 4, "bfloat16": 2}  # float16 is as long as bfloat16
QUANTISED = {"int8": 1.0, "4bit": 0.5 + 4 / 64}
ROW = 4  # bytes of a captured number, float32
GRADIENTS = 128 * 2**20  # bytes that relevancy holds at once, or those of one token


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder and of a prompt."""

    layers: int
    heads: int
    shared_heads: int  # H_kv
    depth: int  # D
    width: int
    prompt: int
    vision: int


class Measure(NamedTuple):
    """A kind of measure: the command with its flags, B, N, and what it keeps in bytes. captured:
    (sizes, B, N, bytes of the type) -> bytes."""

    command: str
    batch: int
    new: int
    captured: Callable[[Sizes, int, int, int], float]


def attention_rows(sizes: Sizes, batch: int, new: int, of_type: int) -> float:
    """At most a row of each layer and head: L B H K."""
    return sizes.layers * batch * sizes.heads * (sizes.prompt + new) * ROW


def hidden_states(sizes: Sizes, batch: int, new: int, of_type: int) -> float:
    """All hidden states of the prompt: (L + 1) B T d."""
    return (sizes.layers + 1) * batch * sizes.prompt * sizes.width * of_type


def gradients(sizes: Sizes, batch: int, new: int, of_type: int) -> float:
    """The input of each layer, (L + 1) K d, and GRADIENTS, or what one token takes: its gradient
    and rows, K (d + 3 L), and half an MLP and of maps (see vlmdiag.relevancy.blocks)."""
    length = sizes.prompt + new
    of_one = length * (sizes.width * of_type + 3 * sizes.layers * ROW)
    of_one += ROW * length * (12 * sizes.width + 4 * 128)
    return (sizes.layers + 1) * length * sizes.width * of_type + max(GRADIENTS, of_one)


def largest(sizes: Sizes, batch: int, new: int, of_type: int) -> float:
    """The 3 largest over layers of each step's attention to the picture: 3 N B H P."""
    return 3 * new * batch * sizes.heads * sizes.vision * ROW


def full_tensors(sizes: Sizes, batch: int, new: int, of_type: int) -> float:
    """The same, and all layers: (3 + L) N B H P."""
    layers = new * sizes.layers * batch * sizes.heads * sizes.vision * ROW
    return largest(sizes, batch, new, of_type) + layers


# with the batch sizes of the READMEs, else the defaults, and the default --max_new_tokens
MEASURES = (
    Measure("diagnostic_tools/run_coco_diagnostics.py --batch_size 8", 8, 64, attention_rows),
    Measure("scripts/logit_lens/create_logit_lens.py", 1, 0, hidden_states),
    Measure("diagnostic_tools/relevancy_maps.py", 1, 32, gradients),
    Measure("visualize/run_volcano_with_image_attention.py", 4, 1024, largest),
    Measure("visualize/run_volcano_with_image_attention.py --full_tensors", 4, 1024, full_tensors),
)


def weights_of(total: int, decoder: nn.Module) -> dict[str, float]:
    """Bytes of the weights of a model of `total` parameters by --dtype and --quantize_type."""
    linear = sum(
        module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear)
    )
    bytes_of: dict[str, float] = {name: total * size for name, size in BYTES.items()}
    for name, size in QUANTISED.items():
        bytes_of[name] = linear * size + (total - linear) * BYTES["bfloat16"]
    return bytes_of


def sizes_of(parts: Parts, prompt: int, vision: int) -> Sizes:
    """The sizes of a decoder for a prompt of so many tokens, `vision` of them the picture's."""
    config = parts.decoder.config.get_text_config()
    heads = config.num_attention_heads
    return Sizes(
        layers=len(parts.layers),
        heads=heads,
        shared_heads=getattr(config, "num_key_value_heads", None) or heads,
        depth=getattr(config, "head_dim", None) or config.hidden_size // heads,
        width=config.hidden_size,
        prompt=prompt,
        vision=vision,
    )


def cache_of(sizes: Sizes, batch: int, new: int, of_type: int) -> float:
    """Bytes of the keys and values of all layers."""
    length = sizes.prompt + new
    return 2 * sizes.layers * batch * length * sizes.shared_heads * sizes.depth * of_type


def measures_of(weights: dict[str, float], sizes: Sizes) -> list[Record]:
    """[{command, batch, new_tokens, bytes {type: {"weights", "cache", "captured", "total"}}}]."""
    records = []
    for measure in MEASURES:
        of_types = {}
        for name, of_type in BYTES.items():
            cache = cache_of(sizes, measure.batch, measure.new, of_type)
            captured = measure.captured(sizes, measure.batch, measure.new, of_type)
            of_types[name] = {
                "weights": weights[name],
                "cache": cache,
                "captured": captured,
                "total": weights[name] + cache + captured,
            }
        records.append(
            {
                "command": measure.command,
                "batch": measure.batch,
                "new_tokens": measure.new,
                "bytes": of_types,
            }
        )
    return records

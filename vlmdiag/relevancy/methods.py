"""Which vision and text tokens made an answer's tokens: gradient relevancy and the methods it is
held against, under one signature.

    run = trace(vlm, batch, answer_ids)
    maps = relevancy(run, targets)               # rows per layer, image part, image part through
                                                 # connector and tower
    scores = METHODS[name](run, targets, seed)   # (T, P): a score of every vision token for each
                                                 # target

targets: indices into the answer. Definitions in rules.py; sources with each method. Shapes: T
targets, C of them taken together, K layers, N positions of prompt and answer, P vision tokens, S
positions of the tower's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmdiag.relevancy import gradients, rules
from vlmdiag.relevancy.gradients import BUDGET, QFormerPass, TowerPass, Trace

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class Relevancy:
    """Relevancy of T targets at K layers, float32 on the CPU."""

    layers: list[int]  # (K,) ascending
    # row p of R_l - I over prompt and answer, 0 after p
    rows: Float[np.ndarray, "T K N"]
    image: Float[np.ndarray, "T K P"]  # its part over vision tokens
    # that part through connector and vision tower: over the tower's patches behind a Q-Former, else
    # S = P, each vision token with what arrives at its patches; None where the family does not
    # name them
    cells: Float[np.ndarray, "T K S"] | None
    # its part over the instruction that a Q-Former reads beside the picture, None without one
    instruction: Float[np.ndarray, "T K m"] | None
    last: Float[np.ndarray, "T P"]  # Ā of the last layer alone
    input: Float[np.ndarray, "T P"]  # input x gradient, summed over the width

    @property
    def picture(self) -> Float[np.ndarray, "T K S"]:
        """Over the picture's cells, as far towards the pixels as it is known."""
        return self.image if self.cells is None else self.cells


class _Chunk(NamedTuple):
    """The same of some targets, as tensors."""

    rows: Tensor
    image: Tensor
    cells: Tensor | None
    instruction: Tensor | None
    last: Tensor
    input: Tensor


# ---- gradient relevancy ----


def _bytes_of_one(run: Trace) -> int:
    """Of a target's gradient at one layer and of its rows, what they began with and what Ā makes of
    them, at every layer."""
    return run.length * (run.layers[0].input[0, 0].nbytes + 3 * 4 * len(run.layers))


def chunk_size(run: Trace, budget: int = BUDGET) -> int:
    """How many targets go down the layers together: their gradients and rows take half of `budget`
    bytes at most, so that the rest holds what a block makes of some of them."""
    return max(1, budget // 2 // _bytes_of_one(run))


def chunks(
    run: Trace, targets: Sequence[int], budget: int = BUDGET
) -> Iterator[tuple[list[int], int]]:
    """The targets in lists of chunk_size(), and what each leaves of the budget."""
    size = chunk_size(run, budget)
    for start in range(0, len(targets), size):
        chunk = list(targets[start : start + size])
        yield chunk, budget - len(chunk) * _bytes_of_one(run)


def relevancy(
    run: Trace,
    targets: Sequence[int],
    layers: Sequence[int] | None = None,
    tower: bool = True,
    budget: int = BUDGET,
) -> Relevancy:
    """Rules 5 to 10 for some targets at some decoder layers (None: all).

    Layer l: gathered from the first layer up to l. tower: go on through connector and tower.
    """
    layers = list(range(len(run.layers))) if layers is None else sorted(layers)
    of_chunks = [
        _chunk(run, chunk, layers, tower, rest) for chunk, rest in chunks(run, targets, budget)
    ]
    arrays: list[Any] = [_joined(tensors) for tensors in zip(*of_chunks, strict=True)]
    return Relevancy(layers, *arrays)


def _joined(tensors: Sequence[Tensor | None]) -> Float[np.ndarray, "T ..."] | None:
    """The same field of all chunks, in one array; None where it is not there."""
    arrays = [tensor.detach().float().cpu().numpy() for tensor in tensors if tensor is not None]
    return np.concatenate(arrays) if arrays else None


def _chunk(run: Trace, targets: list[int], layers: list[int], tower: bool, budget: int) -> _Chunk:
    device = run.rows.device
    producing = run.rows[targets]  # (C,)
    count = torch.arange(len(targets), device=device)
    # e_p of each target, once for each layer asked for
    start = torch.zeros(len(targets), len(layers), run.length, device=device)
    start[count, :, producing] = 1.0
    rows = start.clone()
    descent = run.descend(targets, budget)
    last = descent.step(start[:, :1])  # row p of the last layer's Ā
    if layers[-1] == descent.layer:
        rows[:, -1:] += last
    while descent.layer:
        # R_l starts at its own layer, so the rows of lower ones stay e_p so far
        begun = sum(asked < descent.layer - 1 for asked in layers)
        rows[:, begun:] += descent.step(rows[:, begun:])
    rows -= start
    image = rows[:, :, run.vision]
    gradient = descent.vision_gradient  # (C, P, d)
    inputs = _products(gradient, run.features.detach())
    cells = instruction = None
    if tower and run.tower is not None:
        size = max(1, budget // (2 * run.tower.bytes_of_one))
        pairs = zip(image.split(size), gradient.split(size), strict=True)
        parts = [onto_patches(run.tower, *pair, budget // 2) for pair in pairs]
        cells = torch.cat([of_cells for of_cells, _ in parts])
        if parts[0][1] is not None:
            instruction = torch.cat([words for _, words in parts if words is not None])
    return _Chunk(rows, image, cells, instruction, last[:, 0, run.vision], inputs)


def onto_patches(
    tower: TowerPass,
    image: Float[Tensor, "C K P"],
    gradient: Float[Tensor, "C P d"],
    budget: int = BUDGET,
) -> tuple[Float[Tensor, "C K S"], Float[Tensor, "C K m"] | None]:
    """Image relevancy of vision tokens carried on: (over the tower's patches, over a Q-Former's
    instruction or None). gradient: of the vision tokens."""
    if isinstance(tower, QFormerPass):
        return through_queries(tower, image, gradient, budget)
    return through_tiles(tower, image, gradient, budget), None


def through_tiles(
    tower: TowerPass, image: Float[Tensor, "C K P"], gradient: Float[Tensor, "C P d"], budget: int
) -> Float[Tensor, "C K P"]:
    """r_img C R_vit C' through the tower's self-attention, tile by tile (a picture as a whole is
    one tile).

    C shares a vision token's relevancy equally among the patches that it is made of, and C' what
    arrives at a patch among the tokens that it makes, so that S = P and nothing counts twice.
    """
    sources = tower.sources  # (P, k)
    known = sources >= 0
    places = tower.tiles * tower.positions
    # C: each token's equal shares onto its patches
    share = image / known.sum(-1).clamp_min(1)
    rows = image.new_zeros(*image.shape[:2], places)
    for position, real in zip(sources.T, known.T, strict=True):
        rows.index_add_(2, position[real], share[..., real])
    # R_vit: a tile reads itself alone
    rows = rows.unflatten(2, (tower.tiles, tower.positions))
    for tile in range(tower.tiles):
        rows[:, :, tile] = tower.carry(rows[:, :, tile], gradient, tile, budget)
    # C': each patch's equal shares onto the tokens that it makes
    makes = torch.bincount(sources[known], minlength=places).clamp_min(1)
    arrived = (rows.flatten(2) / makes)[..., sources.clamp(min=0)] * known  # (C, K, P, k)
    return arrived.sum(-1)


def through_queries(
    tower: QFormerPass, image: Float[Tensor, "C K P"], gradient: Float[Tensor, "C P d"], budget: int
) -> tuple[Float[Tensor, "C K S"], Float[Tensor, "C K m"] | None]:
    """r_img R_qi and r_img R_qq by rules 6, 7 and 10, over the tower's patches without CLS and over
    the instruction. Vision tokens behind the queries are made of no patch."""
    eye = torch.eye(tower.positions, device=image.device)
    whole = eye.expand(len(image), -1, -1)
    patches = tower.carry(whole, gradient, budget=budget)  # R_ii (C, S, S)
    self_maps, cross_maps = zip(*tower.query_maps(gradient), strict=True)
    r_qq, r_qi = rules.queries_to_patches(self_maps, cross_maps, patches, tower.joint)
    q = tower.former.queries
    of_queries = image[..., :q]
    first_patch = 1 if tower.former.cls else 0
    cells = (of_queries @ r_qi[:, :q])[..., first_patch:]
    if r_qq.shape[-1] == q:
        return cells, None
    return cells, of_queries @ r_qq[:, :q, q:]


# ---- what it is held against ----


@torch.no_grad()
def raw_attention(
    run: Trace, targets: Sequence[int], layers: Sequence[int] | None = None
) -> Float[np.ndarray, "T K N"]:
    """Mean attention over heads of the producing rows, each layer by itself."""
    producing = run.rows[list(targets)]
    chosen = range(len(run.layers)) if layers is None else layers
    of_layers = [run.layers[layer].attention(producing) for layer in chosen]
    return np.stack([rows.float().cpu().numpy() for rows in of_layers], 1)


@torch.no_grad()
def rollout(run: Trace, targets: Sequence[int]) -> Float[np.ndarray, "T N"]:
    """Attention rollout over all layers (arXiv 2005.00928)."""
    rows = torch.nn.functional.one_hot(run.rows[list(targets)], run.length).float()
    for block in reversed(run.layers):
        rows = rules.rollout_step(rows, block.attention().to(rows.device))
    return rows.cpu().numpy()


def input_gradient(
    run: Trace, targets: Sequence[int], budget: int = BUDGET
) -> Float[np.ndarray, "T P"]:
    """Gradient of the logit times the vision token, summed over the width."""
    return _gradient_times(run, targets, run.features.detach(), budget)


def integrated_gradients(
    run: Trace, targets: Sequence[int], steps: int = 16, budget: int = BUDGET
) -> Float[np.ndarray, "T P"]:
    """Integrated gradients (arXiv 1703.01365) of the vision tokens from their mean over the
    picture, by the midpoint rule."""
    features = run.features.detach()
    mean = features.mean(0, keepdim=True).expand_as(features)
    change = features - mean
    total = np.zeros((len(targets), len(features)), np.float32)
    for step in range(steps):
        point = mean + (step + 0.5) / steps * change
        at_point = gradients.trace(run.vlm, run.prompt, run.ids, tower=False, features=point)
        total = total + _gradient_times(at_point, targets, change, budget)
    return total / steps


def _gradient_times(
    run: Trace, targets: Sequence[int], change: Float[Tensor, "P d"], budget: int
) -> Float[np.ndarray, "T P"]:
    """Gradient of the logit times a change of the vision tokens, summed over the width."""
    products = []
    for chunk, rest in chunks(run, targets, budget):
        gradient = run.descend(chunk, rest).vision_gradient
        products.append(_products(gradient, change).cpu().numpy())
    return np.concatenate(products)


def _products(
    gradient: Float[Tensor, "C P d"], change: Float[Tensor, "P d"]
) -> Float[Tensor, "C P"]:
    """Gradients times a change, summed over the width, one by one for the memory's sake."""
    change = change.float()
    return torch.stack([(of_one.float() * change).sum(-1) for of_one in gradient])


def noise(run: Trace, targets: Sequence[int], seed: int = 0) -> Float[np.ndarray, "T P"]:
    """Uniform random scores of (seed, sample, target)."""
    scores = []
    for target in targets:
        rng = Random(f"{seed}|{run.prompt.samples[0].id}|{target}")
        scores.append([rng.random() for _ in range(len(run.vision))])
    return np.array(scores)


# ---- all under one signature ----


def _last_layer(run: Trace) -> list[int]:
    return [len(run.layers) - 1]


def _relevancy(run: Trace, targets: Sequence[int], seed: int) -> Float[np.ndarray, "T S"]:
    return relevancy(run, targets, _last_layer(run)).picture[:, -1]


def _relevancy_decoder(run: Trace, targets: Sequence[int], seed: int) -> Float[np.ndarray, "T P"]:
    return relevancy(run, targets, _last_layer(run), tower=False).image[:, -1]


def _gradient_attention(run: Trace, targets: Sequence[int], seed: int) -> Float[np.ndarray, "T P"]:
    return relevancy(run, targets, _last_layer(run), tower=False).last


def _raw_attention(run: Trace, targets: Sequence[int], seed: int) -> Float[np.ndarray, "T P"]:
    rows = raw_attention(run, targets, _last_layer(run))[:, 0]
    return rows[:, run.vision.cpu().numpy()]


def _rollout(run: Trace, targets: Sequence[int], seed: int) -> Float[np.ndarray, "T P"]:
    return rollout(run, targets)[:, run.vision.cpu().numpy()]


def _input_gradient(run: Trace, targets: Sequence[int], seed: int) -> Float[np.ndarray, "T P"]:
    return input_gradient(run, targets)


def _integrated_gradients(
    run: Trace, targets: Sequence[int], seed: int
) -> Float[np.ndarray, "T P"]:
    return integrated_gradients(run, targets)


# name -> (run, targets, seed) -> (T, P) scores of the vision tokens, a higher one for a token that
# counts more
METHODS: dict[str, Callable[[Trace, Sequence[int], int], np.ndarray]] = {
    "relevancy": _relevancy,
    "relevancy_decoder": _relevancy_decoder,
    "gradient_attention": _gradient_attention,
    "raw_attention": _raw_attention,
    "rollout": _rollout,
    "input_gradient": _input_gradient,
    "integrated_gradients": _integrated_gradients,
    "random": noise,
}

"""Which vision and text tokens made an answer's tokens: gradient relevancy and the methods it is
held against, under one signature.

    run = trace(vlm, batch, answer_ids)
    found = relevancy(run, targets)              # rows per layer, image part, image part through
    connector and tower
    scores = METHODS[name](run, targets, seed)   # (T, P): a score of every vision token for each
    target

targets: indices into the answer. Definitions in relevancy.py; sources with each method."""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from vlmdiag.relevancy import gradients, rules

BUDGET = 128 * 2**20  # bytes of one layer's maps that are held at once


@dataclass
class Relevancy:
    """Of T targets at K layers, float32 on the CPU. layers (K,) ascending.

    rows (T, K, N): row p of R_l - I over prompt and answer, N positions, 0 after p; image (T, K,
    P): its part over vision tokens; cells (T, K, S): that part through connector and vision tower,
    over the tower's patches behind a Q-Former, else S = P, each vision token with what arrives at
    its patches; None where the family does not tell them; instruction (T, K, m): its part over the
    instruction that a Q-Former reads beside the picture, None without one; last (T, P): Ā of the
    last layer alone; input (T, P): input x gradient, summed over the width."""

    layers: list
    rows: np.ndarray
    image: np.ndarray
    cells: np.ndarray | None
    instruction: np.ndarray | None
    last: np.ndarray
    input: np.ndarray

    @property
    def picture(self):
        """(T, K, P): over the picture's cells, as far towards the pixels as it is known."""
        return self.image if self.cells is None else self.cells


def chunk_size(run, budget=BUDGET):
    """How many targets are taken together: maps and states of one block fit into the budget."""
    width = run.features.shape[1]
    return max(1, budget // (4 * run.length * (4 * run.length + 12 * width)))


def relevancy(run, targets, layers=None, tower=True, budget=BUDGET):
    """Rules 5 to 10 for some targets at some decoder layers (None: all). Layer l: gathered from the
    first layer up to l."""
    targets, depth = list(targets), len(run.layers)
    layers = list(range(depth)) if layers is None else sorted(layers)
    found, size = [], chunk_size(run, budget)
    for start in range(0, len(targets), size):
        found.append(_chunk(run, targets[start : start + size], layers, tower))
    parts = [
        np.concatenate(part) if part[0] is not None else None for part in zip(*found, strict=True)
    ]
    return Relevancy(layers, *parts)


def _chunk(run, targets, layers, tower):
    where, count = run.rows[targets], torch.arange(len(targets), device=run.rows.device)
    start = torch.zeros(len(targets), len(layers), run.length, device=run.rows.device)
    start[count, :, where] = 1.0
    rows, last, gradient = start.clone(), None, None
    for layer, attention in run.descend(targets):
        if layer is None:
            gradient = attention
            continue
        last = attention[count, where][:, run.vision] if last is None else last
        begun = sum(own < layer for own in layers)  # R_l starts at its own layer
        rows[:, begun:] = rules.carry(rows[:, begun:], attention)
    rows -= start
    image = rows[:, :, run.vision]
    cells, instruction = onto_patches(run, image, gradient) if tower and run.tower else (None, None)
    inputs = (gradient.float() * run.features.detach().float()).sum(-1)
    return [
        None if part is None else part.float().cpu().numpy()
        for part in (rows, image, cells, instruction, last, inputs)
    ]


def onto_patches(run, image, gradient):
    """Image relevancy (C, K, P) of vision tokens carried on: (over the tower's patches without CLS
    (C, K, S), over a Q-Former's instruction (C, K, m) or None).

    r_img C R_vit C' through the tower's self-attention, tile by tile; C shares a vision token's
    relevancy equally among the patches that it is made of, and C' what arrives at a patch among the
    tokens that it makes, so that S = P and nothing counts twice. Through a Q-Former first, r_img
    R_qi and r_img R_qq by rules 6, 7 and 10, over the tower's patches; vision tokens behind its
    queries are made of no patch.
    """
    size, instruction = run.tower[0].input.shape[1], None
    if run.queries:
        patches = torch.eye(size, device=image.device).expand(len(image), -1, -1)
        for _, attention in run.descend_tower(gradient):
            patches = rules.carry(patches, attention)
        own, onto = rules.queries_to_patches(
            *zip(*run.query_maps(gradient), strict=True), patches, run.joint
        )
        count = run.vlm.parts.qformer.queries
        image = image[..., :count]
        instruction = image @ own[:, :count, count:] if own.shape[-1] > count else None
        return (image @ onto[:, :count])[..., 1 if run.vlm.parts.qformer.cls else 0 :], instruction
    tiles, known = len(run.tower[0].input), run.sources >= 0
    part = image / known.sum(-1).clamp_min(1)
    rows = image.new_zeros(*image.shape[:2], tiles * size)
    for index, real in zip(run.sources.T, known.T, strict=True):
        rows.index_add_(2, index[real], part[..., real])
    rows = rows.unflatten(2, (tiles, size))
    for tile in range(tiles):
        for _, attention in run.descend_tower(gradient, tile):
            rows[:, :, tile] = rules.carry(rows[:, :, tile], attention)
    makes = torch.bincount(run.sources[known], minlength=tiles * size).clamp_min(1)
    found = (rows.flatten(2) / makes)[..., run.sources.clamp(min=0)] * known
    return found.sum(-1), instruction


@torch.no_grad()
def raw_attention(run, targets, layers=None):
    """(T, K, N) mean attention over heads of the producing rows, each layer by itself."""
    layers = range(len(run.layers)) if layers is None else layers
    return np.stack(
        [
            run.layers[layer].attention()[run.rows[list(targets)]].float().cpu().numpy()
            for layer in layers
        ],
        1,
    )


@torch.no_grad()
def rollout(run, targets):
    """(T, N) attention rollout over all layers (arXiv 2005.00928)."""
    rows = torch.nn.functional.one_hot(run.rows[list(targets)], run.length).float()
    for block in reversed(run.layers):
        rows = rules.rollout_step(rows, block.attention())
    return rows.cpu().numpy()


def input_gradient(run, targets, budget=BUDGET):
    """(T, P) gradient of the logit times the vision token, summed over the width."""
    return _gradient(run, targets, run.features.detach(), budget)


def integrated_gradients(run, targets, steps=16, budget=BUDGET):
    """(T, P) integrated gradients (arXiv 1703.01365) of the vision tokens from their mean over the
    picture, by the midpoint rule."""
    features = run.features.detach()
    mean = features.mean(0, keepdim=True).expand_as(features)
    total = 0
    for step in range(steps):
        point = mean + (step + 0.5) / steps * (features - mean)
        total = total + _gradient(
            gradients.trace(run.vlm, run.prompt, run.ids, tower=False, features=point),
            targets,
            features - mean,
            budget,
        )
    return total / steps


def _gradient(run, targets, change, budget):
    found, targets, size = [], list(targets), chunk_size(run, budget)
    for start in range(0, len(targets), size):
        *_, (_, gradient) = run.descend(targets[start : start + size], maps=False)
        found.append((gradient.float() * change.float()).sum(-1).cpu().numpy())
    return np.concatenate(found)


def noise(run, targets, seed=0):
    """(T, P) uniform random scores of (seed, sample, target)."""
    count = len(run.vision)
    return np.array(
        [
            [rng.random() for _ in range(count)]
            for rng in (Random(f"{seed}|{run.prompt.samples[0].id}|{target}") for target in targets)
        ]
    )


def _vision(values, run):
    return values[..., run.vision.cpu().numpy()]


# name -> (run, targets, seed) -> (T, P) scores of the vision tokens, a higher one for a token that
# counts more
METHODS = {
    "relevancy": (
        lambda run, targets, seed: relevancy(run, targets, [len(run.layers) - 1]).picture[:, -1]
    ),
    "relevancy_decoder": (
        lambda run, targets, seed: relevancy(
            run, targets, [len(run.layers) - 1], tower=False
        ).image[:, -1]
    ),
    "gradient_attention": (
        lambda run, targets, seed: relevancy(run, targets, [len(run.layers) - 1], tower=False).last
    ),
    "raw_attention": lambda run, targets, seed: _vision(
        raw_attention(run, targets, [len(run.layers) - 1])[:, 0], run
    ),
    "rollout": lambda run, targets, seed: _vision(rollout(run, targets), run),
    "input_gradient": lambda run, targets, seed: input_gradient(run, targets),
    "integrated_gradients": lambda run, targets, seed: integrated_gradients(run, targets),
    "random": noise,
}

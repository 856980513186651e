"""Answers to questions with the vision tokens in order and shuffled, for the position sensitivity
index.

Beyond Semantics (arXiv 2503.17349); docs/studies/beyond_semantics.md, section 2.8. The shuffles and
the index: position_sensitivity.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmdiag.answers import is_right, read
from vlmdiag.beyond_semantics.position_sensitivity import shuffled
from vlmdiag.cli import UsageError
from vlmdiag.model.decoding import generate
from vlmdiag.model.vision import entries
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Int
    from PIL.Image import Image

    from vlmdiag.pictures.samples import Sample
    from vlmdiag.types import VLM

Arrays = dict[str, "np.ndarray"]


def make_process(
    vlm: VLM, num_permutations: int, seed: int, max_new_tokens: int, vision_scale: float = 1.0
) -> Callable[[Sequence[tuple[Sample, Image]]], list[tuple[Record, Arrays]]]:
    """process([(sample, picture), ...]) -> [(record, {}), ...]: each question answered with its
    vision tokens in order and num_permutations times shuffled; the vision tower runs once per
    batch. UsageError for a model whose vision tokens stand for no known places."""

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Sample, Image]]) -> list[tuple[Record, Arrays]]:
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images)
        grids = [grid for grid in batch.grids if grid is not None and grid.has_box.sum() >= 2]
        if len(grids) < len(samples):
            raise UsageError(
                f"{vlm.path}: the vision tokens of {vlm.family.name} stand for no known places, so"
                " there is no order to shuffle"
            )
        features = vlm.vision(batch)
        # for each tensor of the features and each sample: the scaled tokens in their own order
        in_order = [[rows * vision_scale for rows in entry] for entry in entries(vlm, features)]

        def answers(
            orders: Sequence[Int[np.ndarray, " P"]], drafts: list[list[int]] | None = None
        ) -> list[list[int]]:
            """Generated ids of each sample, its vision tokens in the given order. drafts: answers
            that are likely."""
            for entry, ordered in zip(entries(vlm, features), in_order, strict=True):
                entry[:] = [
                    rows[torch.from_numpy(order).to(rows.device)]
                    for rows, order in zip(ordered, orders, strict=True)
                ]
            return generate(vlm, batch, max_new_tokens, features=features, drafts=drafts).ids

        rounds = [answers([np.arange(len(grid.boxes)) for grid in grids])]
        for k in range(num_permutations):
            orders = [
                shuffled(grid, seed, sample.id, k)
                for grid, sample in zip(grids, samples, strict=True)
            ]
            rounds.append(answers(orders, drafts=rounds[0]))
        results: list[tuple[Record, Arrays]] = []
        for row, sample in enumerate(samples):
            ids_by_round = [ids[row] for ids in rounds]
            results.append((record(sample, ids_by_round, batch.prompts[row]), {}))
        return results

    def judged(ids: list[int], expected: str) -> Record:
        text = vlm.text(ids)
        return {
            "text": text,
            "read_as": read(text, expected),
            "correct": is_right(text, expected),
            "ids": ids,
        }

    def record(sample: Sample, ids_by_round: list[list[int]], prompt: str) -> Record:
        original, *permuted = [judged(ids, str(sample.answer)) for ids in ids_by_round]
        return {
            "image_id": sample.extra["image_id"],
            "file_name": sample.image.name,
            "question": sample.question,
            "answer": sample.answer,
            "kind": str(sample.extra.get("kind") or "question"),
            "prompt": prompt,
            "caption": original["text"],
            "original": original,
            "permuted": permuted,
        }

    return process

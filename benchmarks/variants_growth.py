"""The experiments of bench_growth.py: experiment(point, folder) -> work(), one run of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import (
    variants_diagnostics,
    variants_interventions,
    variants_relevancy,
    variants_swap,
    variants_volcano,
)
from benchmarks.cases import Case, Size, build, encode_samples, make_samples
from vlmdiag.beyond_semantics import shuffled_answers, token_norms
from vlmdiag.interp import lens_measures
from vlmdiag.pictures.samples import load_image
from vlmdiag.relevancy.methods import BUDGET

WIDTH = (128, 4, 344)  # hidden size, heads, intermediate size
TOWER = (2, 64, 2, 96)
TEXT = 40  # about how many tokens of a prompt are not of the picture
PERMUTATIONS = 4

Work = Callable[[], object]


class Point(NamedTuple):
    """How large the work is."""

    picture: int  # tokens of a picture
    layers: int
    batch: int
    new_tokens: int

    @property
    def size(self) -> Size:
        return Size((self.layers, *WIDTH), TOWER)


def _case(point: Point, folder: Path) -> Case:
    vlm = build(point.size, point.picture + TEXT, "cpu", folder)
    return Case(vlm, make_samples(folder, point.batch), point.new_tokens, folder)


def diagnostics(point: Point, folder: Path) -> Work:
    """run_coco_diagnostics.py with its files."""
    return variants_diagnostics.ours(_case(point, folder))[1]


def norms(point: Point, folder: Path) -> Work:
    """vlm_token_norms.py: tower and connector only."""
    case = _case(point, folder)
    captions = {sample.id: [sample.question] for sample in case.samples}
    settings = (1.0, point.batch, 1)  # scale of the pictures, batch, workers
    return partial(token_norms.measure, case.vlm, case.samples, captions, *settings)


def psi(point: Point, folder: Path) -> Work:
    """psi.py: answers in order and with shuffled vision tokens."""
    case = _case(point, folder)
    samples = [replace(sample, answer="yes") for sample in case.samples]
    process = shuffled_answers.make_process(case.vlm, PERMUTATIONS, 0, point.new_tokens)
    return lambda: process([(sample, load_image(sample.image)) for sample in samples])


def lens(point: Point, folder: Path) -> Work:
    """create_logit_lens.py without its pages; its answer has 32 tokens."""
    case = _case(point, folder)
    process = lens_measures.make_page_process(case.vlm, 5)
    return lambda: process([(sample, load_image(sample.image)) for sample in case.samples])


def knockout(point: Point, folder: Path) -> Work:
    """36 knockouts of one picture."""
    case = _case(point, folder)
    plan = variants_interventions.make_plan(case, point.new_tokens)
    return partial(variants_interventions.knockouts_ours, case, plan)


def ablation(point: Point, folder: Path) -> Work:
    """18 ablations of one picture."""
    case = _case(point, folder)
    plan = variants_interventions.make_plan(case, point.new_tokens)
    return partial(variants_interventions.ablation_ours, case, plan)


def swap(point: Point, folder: Path) -> Work:
    """States of pairs with their quads; answers of one word."""
    prompt = point.picture + TEXT
    case = variants_swap.make_case(point.size, prompt, point.batch, "cpu", folder)
    case.answer_by(variants_swap.ENDS)
    return partial(variants_swap.ours, case, True)


def relevancy(point: Point, folder: Path) -> Work:
    """Maps of every token of an answer, at every layer, through decoder and tower."""
    case = _case(point, folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (point.new_tokens,), generator=generator).tolist()
    batch = encode_samples(case.vlm, case.samples[:1])
    traced = variants_relevancy.Case(case.vlm, batch, ids, BUDGET)
    return partial(variants_relevancy.ours, traced)


def volcano(point: Point, folder: Path) -> Work:
    """One round of the critique loop with measured attention."""
    return partial(variants_volcano.ours, _case(point, folder))


PICTURE, LAYERS, BATCH, NEW_TOKENS = Point._fields
# what each can grow with: knockouts, ablations and relevancy take one picture at a time; the answer
# of knockouts, swap pairs and lens pages has a length of its own, and norms have no decoder
EXPERIMENTS: dict[str, tuple[Callable[[Point, Path], Work], tuple[str, ...]]] = {
    "diagnostics": (diagnostics, Point._fields),
    "token norms": (norms, (PICTURE, BATCH)),
    "PSI": (psi, Point._fields),
    "lens page": (lens, (PICTURE, LAYERS, BATCH)),
    "knockouts": (knockout, (PICTURE, LAYERS)),
    "ablations": (ablation, (PICTURE, LAYERS, NEW_TOKENS)),
    "swap": (swap, (PICTURE, LAYERS, BATCH)),
    "relevancy": (relevancy, (PICTURE, LAYERS, NEW_TOKENS)),
    "Volcano": (volcano, Point._fields),
}

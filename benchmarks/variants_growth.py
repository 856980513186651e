"""The experiments of bench_growth.py and bench_fits.py: experiment(case) -> work(), one run of it.
A swap case plants its answers in the model, so it comes last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import (
    variants_diagnostics,
    variants_interventions,
    variants_relevancy,
    variants_swap,
    variants_volcano,
)
from benchmarks.cases import Case, encode_samples
from vlmdiag.beyond_semantics import shuffled_answers, token_norms
from vlmdiag.interp import lens_measures
from vlmdiag.pictures.samples import load_image
from vlmdiag.relevancy.gradients import BUDGET

PERMUTATIONS = 4

Work = Callable[[], object]


class Point(NamedTuple):
    """How large the work is."""

    picture: int  # tokens of a picture
    layers: int
    batch: int
    new_tokens: int


def diagnostics(case: Case) -> Work:
    """run_coco_diagnostics.py with its files."""
    return lambda: variants_diagnostics.ours(case)[1]()


def norms(case: Case) -> Work:
    """vlm_token_norms.py: tower and connector only."""
    captions = {sample.id: [sample.question] for sample in case.samples}
    settings = (1.0, len(case.samples), 1)  # scale of the pictures, batch, workers
    return partial(token_norms.measure, [case.vlm], case.samples, captions, *settings)


def psi(case: Case) -> Work:
    """psi.py: answers with the vision tokens in order and shuffled."""
    samples = [replace(sample, answer="yes") for sample in case.samples]
    process = shuffled_answers.make_process(case.vlm, PERMUTATIONS, 0, case.new_tokens)
    return lambda: process([(sample, load_image(sample.image)) for sample in samples])


def lens(case: Case) -> Work:
    """create_logit_lens.py without its pages; its answer has 32 tokens."""
    process = lens_measures.make_page_process(case.vlm, 5)
    return lambda: process([(sample, load_image(sample.image)) for sample in case.samples])


def knockout(case: Case) -> Work:
    """36 knockouts of one picture."""
    plan = variants_interventions.make_plan(case, case.new_tokens)
    return partial(variants_interventions.knockouts_ours, case, plan)


def ablation(case: Case) -> Work:
    """18 ablations of one picture."""
    plan = variants_interventions.make_plan(case, case.new_tokens)
    return partial(variants_interventions.ablation_ours, case, plan)


def swap(case: Case) -> Work:
    """States of pairs with their quads; answers of one word."""
    of_pairs = variants_swap.case_of(case.vlm, len(case.samples), case.folder)
    of_pairs.answer_by(variants_swap.ENDS)
    return partial(variants_swap.ours, of_pairs, True)


def relevancy(case: Case) -> Work:
    """Maps of every token of an answer about one picture, at every layer, through decoder and
    tower."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (case.new_tokens,), generator=generator).tolist()
    batch = encode_samples(case.vlm, case.samples[:1])
    return partial(variants_relevancy.ours, variants_relevancy.Case(case.vlm, batch, ids, BUDGET))


def volcano(case: Case) -> Work:
    """One round of the critique loop with measured attention."""
    return partial(variants_volcano.ours, case)


PICTURE, LAYERS, BATCH, NEW_TOKENS = Point._fields
# with what each can grow: knockouts, ablations and relevancy take one picture at a time; knockouts
# and norms have no answer, that of a swap pair ends by itself, that of a lens page has 32 tokens
EXPERIMENTS: dict[str, tuple[Callable[[Case], Work], tuple[str, ...]]] = {
    "diagnostics": (diagnostics, Point._fields),
    "token norms": (norms, (PICTURE, BATCH)),
    "PSI": (psi, Point._fields),
    "lens page": (lens, (PICTURE, LAYERS, BATCH)),
    "knockouts": (knockout, (PICTURE, LAYERS)),
    "ablations": (ablation, (PICTURE, LAYERS, NEW_TOKENS)),
    "relevancy": (relevancy, (PICTURE, LAYERS, NEW_TOKENS)),
    "Volcano": (volcano, Point._fields),
    "swap": (swap, (PICTURE, LAYERS, BATCH)),
}

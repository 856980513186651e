"""How often do our 95 % intervals hold the truth?

    python benchmarks/coverage.py                        # the table, some minutes
    python benchmarks/coverage.py --out docs/intervals.md  # into the page, in place of its table

Samples of n images are drawn from distributions whose mean is known, and given to the functions of
vlmdiag/figures/stats.py that every figure and table uses. Printed is the share of intervals that
hold the true mean; its own error is 0.005 at 2,000 samples. Proportions are enumerated exactly: the
least coverage over all true proportions.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from vlmdiag import cli
from vlmdiag.beyond_semantics.position_sensitivity import psi_interval
from vlmdiag.figures import stats
from vlmdiag.stethoscope.calibration import auroc_interval
from vlmdiag.swap.metrics import pairwise_cosine, vd_entanglement

SIZES = (5, 10, 30, 200)
DIRECTIONS = 32  # dimensions of the vectors whose pairs' cosines are averaged
LEANS = {0.0: "truth 0", 2.0: "truth 0.11", 5.0: "truth 0.44"}
SENSITIVITIES = {"": (0.9, 0.7, 0.3), ": nearly all right": (0.95, 0.99, 0.99)}
AXES = 8  # dimensions of the vectors whose cosines are averaged
MARK = "<!-- coverage: written by benchmarks/coverage.py -->"
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


class Case(NamedTuple):
    """A distribution of what an image has."""

    draw: Draw  # (generator, shape) -> values
    truth: float  # its mean
    bounds: tuple[float, float] | None
    discrete: bool = False


def cosines(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Cosines with a direction of vectors that lean towards it."""
    vectors = rng.normal(size=(*shape, AXES))
    vectors[..., 0] += 1
    return vectors[..., 0] / np.linalg.norm(vectors, axis=-1)


def cases() -> dict[str, Case]:
    """By name. The mean of cosines is that of four million."""
    of_cosines = float(cosines(np.random.default_rng(1), (4_000_000 // 8, 8)).mean())
    return {
        "normal": Case(lambda rng, shape: rng.normal(size=shape), 0.0, None),
        "cosines": Case(cosines, of_cosines, (-1, 1)),
        "lognormal, sigma 0.5": Case(
            lambda r, shape: r.lognormal(0, 0.5, shape), np.exp(1 / 8), None
        ),
        "lognormal, sigma 1": Case(
            lambda rng, shape: rng.lognormal(0, 1, shape), np.exp(0.5), None
        ),
        "shares near 1, beta(0.5, 0.1)": Case(
            lambda rng, shape: rng.beta(0.5, 0.1, shape), 0.5 / 0.6, (0, 1)
        ),
        "0 or 1, p = 0.95": Case(
            lambda rng, shape: (rng.random(shape) < 0.95) * 1.0, 0.95, (0, 1), True
        ),
    }


def coverage(case: Case, n: int, samples: int, seed: int) -> float:
    """Share of intervals that hold the truth, each ten of which have resamples of their own."""
    values = case.draw(np.random.default_rng([seed, n]), (n, samples))
    held = []
    for index, part in enumerate(np.array_split(np.arange(samples), max(1, samples // 10))):
        found = stats.mean_interval(
            values[:, part], seed=index, bounds=case.bounds, discrete=case.discrete
        )
        held.append((found.low <= case.truth) & (case.truth <= found.high))
    return float(np.concatenate(held).mean())


def coverage_of_pairs(n: int, samples: int, seed: int) -> float:
    """The same of the difference of two accuracies on the same images, 0.9 and 0.8, where the
    second is right only where the first is."""
    rng = np.random.default_rng([seed, n])
    first = (rng.random((n, samples)) < 0.9) * 1.0
    second = first * (rng.random((n, samples)) < 0.8 / 0.9)
    found = stats.paired_difference(first, second, bounds=(-1, 1), discrete=True)
    return float(((found.low <= 0.1) & (found.high >= 0.1)).mean())


def coverage_of_ratios(n: int, samples: int, seed: int) -> float:
    """The same of a ratio of two means over the same images, 0.8, of lognormals with a part in
    common."""
    rng = np.random.default_rng([seed, n])
    held = 0
    for index in range(samples):
        common = np.exp(rng.normal(size=n) * 0.5)
        under, over = (common * np.exp(rng.normal(size=n) * 0.4) for _ in range(2))
        found = stats.ratio_interval(0.8 * over, under, seed=index // 10)
        held += bool(found.low <= 0.8 <= found.high)
    return held / samples


def coverage_of_coherence(lean: float, n: int, samples: int, seed: int) -> float:
    """The same of the mean cosine of pairs, of vectors that lean towards a direction by `lean`
    standard deviations; the truth is the squared length of the mean unit vector."""
    rng = np.random.default_rng([seed, n])

    def units(count: int) -> np.ndarray:
        vectors = rng.normal(size=(count, DIRECTIONS))
        vectors[:, 0] += lean
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    truth = float(np.square(units(300_000).mean(0)).sum()) if lean else 0.0
    held = 0
    for _ in range(samples):
        found = pairwise_cosine(units(n))
        held += bool(found["low"] <= truth <= found["high"])
    return held / samples


def coverage_of_psi(of_right: Sequence[float], n: int, samples: int, seed: int) -> float:
    """The same of the sensitivity to order. of_right: the share of answers that are right in order,
    and when shuffled of these and of the others, each the mean of two shuffles."""
    rng = np.random.default_rng([seed, n])
    right, still, then = of_right
    truth = 1 - (right * still + (1 - right) * then) / right
    held = 0
    for index in range(samples):
        original = (rng.random(n) < right) * 1.0
        chance = np.where(original > 0, still, then)
        permuted = (rng.random((n, 2)) < chance[:, None]).mean(1)
        found = psi_interval(original, permuted, seed=index // 10)
        held += bool(found.low <= truth <= found.high)
    return held / samples


def coverage_of_auroc(n: int, samples: int, seed: int) -> float:
    """The same of the AUROC of normal scores one standard deviation apart, 0.760: four words an
    image, 0.3 of them positive."""
    rng = np.random.default_rng([seed, n])
    truth = float(ndtr(np.sqrt(0.5)))
    images = np.repeat(np.arange(n), 4)
    held = 0
    for _ in range(samples):
        labels = rng.random(4 * n) < 0.3
        labels[:2] = True, False  # of no sample without both kinds an AUROC is known
        found = auroc_interval(labels + rng.normal(size=4 * n), labels, images)
        held += found["low"] <= truth <= found["high"]
    return held / samples


def coverage_of_entanglement(form: str, n: int, samples: int, seed: int) -> float:
    """The same of cross-fitted entanglement, 0.6, of one vertical and one distance pair an image
    whose deltas lean by 1.5 standard deviations of each dimension; among the samples that have an
    interval, NaN where fewer than half do."""
    rng = np.random.default_rng([seed, n])
    axes = np.zeros((2, DIRECTIONS))
    axes[:, 0] = 1.5 * np.array([1, 0.6])
    axes[1, 1] = 1.5 * 0.8
    names = (("under", "above"), ("close", "far"))
    held = []
    for index in range(samples):
        signs = rng.integers(2, size=(2, n))
        deltas = (2 * signs[:, :, None] - 1) * axes[:, None] + rng.normal(size=(2, n, DIRECTIONS))
        categories = [of_axis[sign] for of_axis, row in zip(names, signs) for sign in row]
        found = vd_entanglement(
            deltas.reshape(2 * n, 1, DIRECTIONS), categories, [*range(n)] * 2, seed=index // 10
        )[form]
        low, high = found["crossfit_low"][0], found["crossfit_high"][0]
        if np.isfinite(low):
            held.append(low <= 0.6 <= high)
    return float(np.mean(held)) if len(held) > samples / 2 else np.nan


def least_of_proportions(n: int) -> float:
    """The least coverage of a proportion's interval over all true proportions, by enumeration."""
    counts = np.arange(n + 1)
    found = stats.proportion_interval(counts, np.full(n + 1, n))
    truths = np.linspace(0.0005, 0.9995, 1999)
    logs = np.concatenate([[0.0], np.log(np.arange(1, n + 1)).cumsum()])
    binomial = logs[n] - logs[counts] - logs[n - counts]
    chance = np.exp(
        binomial + counts * np.log(truths)[:, None] + (n - counts) * np.log1p(-truths)[:, None]
    )
    holds = (found.low <= truths[:, None]) & (truths[:, None] <= found.high)
    return float((chance * holds).sum(1).min())


def table(samples: int, seed: int) -> str:
    """The coverages as Markdown."""
    header = ["of 95 % intervals", *(f"n = {n}" for n in SIZES)]
    rows = [header, ["---"] * len(header)]
    for name, case in cases().items():
        shares = (coverage(case, n, samples, seed) for n in SIZES)
        rows.append([f"mean: {name}", *(f"{share:.3f}" for share in shares)])
    pairs = (coverage_of_pairs(n, samples, seed) for n in SIZES)
    rows.append(["paired difference: 0 or 1, p = 0.9 and 0.8", *(f"{s:.3f}" for s in pairs)])
    ratios = (coverage_of_ratios(n, samples, seed) for n in SIZES)
    rows.append(["ratio of two means: lognormals", *(f"{share:.3f}" for share in ratios)])
    for lean, name in LEANS.items():
        shares = (coverage_of_coherence(lean, n, samples // 4, seed) for n in SIZES)
        rows.append([f"mean cosine of pairs: {name}", *(f"{share:.3f}" for share in shares)])
    for name, of_right in SENSITIVITIES.items():
        shares = (coverage_of_psi(of_right, n, samples, seed) for n in SIZES)
        rows.append([f"sensitivity to order (PSI){name}", *(f"{share:.3f}" for share in shares)])
    shares = (coverage_of_auroc(n, samples, seed) for n in SIZES)
    rows.append(["AUROC", *(f"{share:.3f}" for share in shares)])
    for form, name in (("eq3_raw", "equation 3"), ("group_cosine_raw", "cosine of groups")):
        shares = (coverage_of_entanglement(form, n, samples // 4, seed) for n in SIZES)
        text = ("none" if np.isnan(share) else f"{share:.3f}" for share in shares)
        rows.append([f"entanglement, cross-fitted: {name}", *text])
    least = (least_of_proportions(n) for n in SIZES)
    rows.append(["proportion, the least over all p", *(f"{share:.3f}" for share in least)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--samples", type=cli.whole(10), default=2000, help="of each distribution and size"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the random draws")
    parser.add_argument("--out", default=None, help="page whose table is replaced")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    measured = table(args.samples, args.seed)
    print(measured, end="")
    if args.out is not None:
        page = Path(args.out)
        text = page.read_text()
        pattern = re.compile(rf"{re.escape(MARK)}\n(?:\|.*\n)*")
        page.write_text(pattern.sub(f"{MARK}\n{measured}", text))
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""The headline claims of the five papers, each as a measured quantity and the range in which the
claim holds, and what runs say of them.

The ranges were fixed before the runs. Where the paper prints the size of its effect, a claim holds
from half of it on; where it prints a direction only, from no effect on. A claim holds where the
whole interval lies in the range and does not hold where the whole interval lies outside; else it is
not decided. Intervals are over pictures and simultaneous: with m tests in a table, each is at level
1 - 0.05 / m (Bonferroni), so that all of them together are right 95 times in 100.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import ndtri

from vlmdiag.beyond_semantics.position_sensitivity import psi_interval
from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.figures.stats import Interval
from vlmdiag.interp import summary
from vlmdiag.report.catalog import Subject
from vlmdiag.runs import rundirs

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import Record

# of a simultaneous interval, whose tails are thin
RESAMPLES = 10_000
FEWEST = 5  # pictures, below which a claim is not decided
INF = float("inf")
NORMALISED = ("-normWmean", "-multilayerNorm")  # how the paper calls its variants
INDEPENDENT = "-independent"  # of ours: height and distance were drawn independently


class NotTestable(Exception):
    """Why a claim cannot be tested on a model."""


class Claim(NamedTuple):
    """A headline claim in the paper's sense, in our words."""

    wording: str
    paper: str


CLAIMS = {
    1: Claim(
        "Vision tokens enter the decoder far longer than text tokens; where the connector"
        " normalises them, they enter as long.",
        "Beyond Semantics, arXiv 2503.17349",
    ),
    2: Claim(
        "Models with normalised vision tokens react more to where a token stands.",
        "Beyond Semantics, arXiv 2503.17349",
    ),
    3: Claim(
        "The tokens on an object carry the answer about it; as many others do not.",
        "llava-interp, arXiv 2410.07149",
    ),
    4: Claim(
        "Late layers decode the tokens on an object to its name.", "llava-interp, arXiv 2410.07149"
    ),
    5: Claim(
        "What is on an object goes to the last position in the middle and late layers, not first"
        " to the last row of the picture.",
        "llava-interp, arXiv 2410.07149",
    ),
    6: Claim(
        "Models trained on perspective pictures entangle height and distance; where the two are"
        " independent in training, models do not.",
        "Why Far Looks Up, arXiv 2605.30161",
    ),
    7: Claim(
        "While it criticises its answer, the model attends more to the picture than while it first"
        " answers.",
        "Volcano, arXiv 2311.07362",
    ),
    8: Claim(
        "Gradient relevancy is more faithful than raw attention, rollout and chance.",
        "LVLM-Interpret, arXiv 2404.03118, and arXiv 2103.15679",
    ),
}

Level = float


class Sample(NamedTuple):
    """The models that a part is measured on: its own, and the one without normalisation that it is
    compared with."""

    subject: Subject
    base: Subject | None


@dataclass(frozen=True)
class Part:
    """A measured part of a claim. low, high: the range in which it holds; who: the models that it
    speaks of; source: where the range comes from."""

    claim: int
    quantity: str
    low: float
    high: float
    source: str
    measure: Callable[[Sample, Level], Interval]
    who: str = "any"


@dataclass(frozen=True)
class Finding:
    """What one model's runs say of a part. interval: simultaneous; usual: the 95 % interval of
    this part alone."""

    part: Part
    model: str
    verdict: str
    interval: Interval | None = None
    usual: Interval | None = None
    why: str = ""


HOLDS, FAILS, OPEN, UNTESTABLE = "holds", "does not hold", "not decided", "not testable"


# --- measures -------------------------------------------------------------------------------------


def _run(subject: Subject, experiment: str) -> Run:
    run = subject.runs.get(experiment)
    command = rundirs.COMMANDS.get(experiment, experiment)
    if experiment in subject.unclear:
        several = ", ".join(subject.unclear[experiment])
        raise NotTestable(f"several runs of {command} and none without --run_name: {several}")
    if run is None or not run.ids():
        raise NotTestable(f"no run of {command}")
    return run


def _arrays(subject: Subject, *names: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Arrays of a run of run_coco_diagnostics.py, as numbers of 64 bits."""
    run = _run(subject, rundirs.COCO)
    lacking = sorted(set(names) - set(run.arrays(run.ids()[0])))
    if lacking:
        raise NotTestable(f"its run of run_coco_diagnostics.py has no {', '.join(lacking)}")
    ids, arrays = run.stack(list(names))
    return ids, {name: array.astype(np.float64) for name, array in arrays.items()}


def _norm_ratio(sample: Sample, level: Level) -> Interval:
    _, norms = _arrays(sample.subject, "hidden_norms_vision", "hidden_norms_user_text")
    vision, text = (norms[f"hidden_norms_{name}"][:, 0] for name in ("vision", "user_text"))
    return stats.ratio_interval(vision, text, level, RESAMPLES)


def _base(sample: Sample) -> Subject:
    assert sample.base is not None
    return sample.base


def _position_index(sample: Sample, level: Level) -> Interval:
    """PSI of the variant minus that of the base, over the pictures that both were asked about."""
    found = []
    for subject in (sample.subject, _base(sample)):
        right: dict[str, list[tuple[float, float]]] = {}
        for record in _run(subject, "psi").records():
            shuffled = float(np.mean([answer["correct"] for answer in record["permuted"]]))
            pair = (float(record["original"]["correct"]), shuffled)
            right.setdefault(str(record["image_id"]), []).append(pair)
        found.append({image: np.mean(pairs, 0) for image, pairs in right.items()})
    shared = sorted(set(found[0]) & set(found[1]))
    if not shared:
        raise NotTestable(f"no picture was asked about in {_base(sample).name} too")
    indices = []
    for of_image in found:
        original, permuted = np.array([of_image[image] for image in shared]).T
        indices.append(psi_interval(original, permuted, level, RESAMPLES))
    return stats.difference_of(*indices)


def _rope_ratio(sample: Sample, level: Level) -> Interval:
    """Mean |change of vision logits| of the variant over that of the base, same pictures."""
    values = []
    for subject in (sample.subject, _base(sample)):
        ids, arrays = _arrays(subject, "delta_gv")
        change = stats.measured_mean(np.abs(arrays["delta_gv"]), (1, 2))
        values.append(dict(zip(ids, change, strict=True)))
    shared = sorted(set(values[0]) & set(values[1]))
    if not shared:
        raise NotTestable(f"no picture was measured in {_base(sample).name} too")
    variant, base = (np.array([of_image[id] for id in shared]) for of_image in values)
    return stats.ratio_interval(variant, base, level, RESAMPLES)


def _records(subject: Subject, experiment: str) -> list[Record]:
    records = [record for record in _run(subject, experiment).records() if record["eligible"]]
    if not records:
        raise NotTestable("no answer is right before the intervention")
    return records


def _destroyed(records: Sequence[Record], setting: str, condition: str) -> Float[np.ndarray, " n"]:
    """Share of a picture's right answers that a condition makes wrong."""
    drawn = summary.by_condition(records).get(condition)
    if drawn is None:
        raise NotTestable(f"its run has no {condition}")
    return summary.destroyed(records, setting, drawn)


def _ablated(experiment: str, setting: str) -> Callable[[Sample, Level], Interval]:
    """Destroyed by the object's tokens and one row around, minus by as many random ones."""

    def measure(sample: Sample, level: Level) -> Interval:
        records = _records(sample.subject, experiment)
        lost = _destroyed(records, setting, "patch_1")
        of_random = _destroyed(records, setting, "random_matched_1")
        return stats.paired_difference(
            lost, of_random, level, RESAMPLES, bounds=stats.DIFFERENCES, discrete=True
        )

    return measure


def _lens(sample: Sample, level: Level) -> Interval:
    """Own name minus another picture's, at the layer chosen on the other half of the pictures."""
    from vlmdiag.interp.lens_curves import best_layers, name_shares

    shares = name_shares(_run(sample.subject, "lens_accuracy"), seed=0)
    own, shuffled = shares["own"], shares["shuffled"]
    fitted = best_layers(own, seed=0)["cross_fitted"]
    others = _at(shuffled, fitted.states)
    return stats.paired_difference(
        fitted.shares, others, level, RESAMPLES, bounds=stats.DIFFERENCES, discrete=True
    )


def _at(values: Float[np.ndarray, "n L+1"], states: np.ndarray) -> Float[np.ndarray, " n"]:
    return values[np.arange(len(values)), states]


def _lens_is_late(sample: Sample, level: Level) -> Interval:
    """Last third of the hidden states minus the first third."""
    from vlmdiag.interp.lens_curves import name_shares

    own = name_shares(_run(sample.subject, "lens_accuracy"), seed=0)["own"]
    third = own.shape[1] // 3
    if not third:
        raise NotTestable("the decoder has fewer than two layers")
    late, early = own[:, -third:].mean(1), own[:, :third].mean(1)
    return stats.paired_difference(
        late, early, level, RESAMPLES, bounds=stats.DIFFERENCES, discrete=True
    )


def _knockout_is_late(sample: Sample, level: Level) -> Interval:
    """Destroyed by object + 1 to the last token in the mid-late window, minus in the early one."""
    records = _records(sample.subject, "knockout")
    late, early = (
        _destroyed(records, "vqa", f"object+1:last_token:{window}")
        for window in ("mid_late", "early")
    )
    return stats.paired_difference(
        late, early, level, RESAMPLES, bounds=stats.DIFFERENCES, discrete=True
    )


def _last_row(sample: Sample, level: Level) -> Interval:
    """Destroyed by picture to its last row, in all layers."""
    records = _records(sample.subject, "knockout")
    lost = _destroyed(records, "vqa", "image-last_row:last_row:all")
    return stats.mean_interval(lost, level, RESAMPLES, bounds=stats.SHARES, discrete=True)


def _swap_results(sample: Sample) -> tuple[Path, str, int]:
    """Folder and scale of a model's swap results, and how many pictures they are of."""
    run = _run(sample.subject, "swap_analysis")
    if sample.subject.results is None:
        raise NotTestable("no results of swap_analysis.py; give their folder as --results_dir")
    pictures = len({str(record["image_id"]) for record in run.records()})
    return (*sample.subject.results, pictures)


def _at_level(level: Level, value: float, low: float, high: float, n: int) -> Interval:
    """A cosine or a difference of shares, whose 95 % limits are stored: those of another level are
    as many standard errors away."""
    wider = float(ndtri((1 + level) / 2) / ndtri(0.975))
    ends = max(-1.0, value - wider * (value - low)), min(1.0, value + wider * (high - value))
    return stats.interval_of(value, *ends, n)


def _entangled(sample: Sample, level: Level) -> Interval:
    """VD-EI by equation 3, at the recommended layer."""
    from vlmdiag.swap import saved

    folder, scale, pictures = _swap_results(sample)
    layer = (saved.read_json(folder, f"recommended_layer_{scale}") or {}).get("recommended")
    cells = saved.read_json(folder, f"vd_ei_{scale}") or {}
    of_layer = cells.get(f"L{layer}", {})
    cell = of_layer.get("eq3_raw")
    if not cell or cell.get("too_few") or cell.get("low") is None:
        raise NotTestable("too few pairs for VD-EI at the recommended layer")
    pictures = int(of_layer.get("n_images") or pictures)  # with a pair of the two axes
    return _at_level(level, cell["value"], cell["low"], cell["high"], pictures)


def _gap(sample: Sample, level: Level) -> Interval:
    """Distance pairs right in both orders: consistent minus counter."""
    from vlmdiag.swap import saved

    folder, scale, pictures = _swap_results(sample)
    gap = (saved.read_json(folder, f"pred_stats_{scale}") or {}).get("gap_both")
    if not gap or gap.get("too_few") or gap.get("low") is None:
        raise NotTestable("too few pairs in which the farther object is lower in the picture")
    fewest = min([pictures, *gap.get("n", ())])
    return _at_level(level, gap["value"], gap["low"], gap["high"], fewest)


def _feedback(sample: Sample, level: Level) -> Interval:
    """Attention to the picture in the feedback over that in the first answer, equal lengths."""
    from vlmdiag.volcano import stages
    from vlmdiag.volcano.stage_statistics import STATISTICS, by_image

    run = _run(sample.subject, "volcano")
    records, _ = stages.select(run, "all")
    comparison = stages.measure(run, records, "top_k_mean", 1, 0)[0]["feedback"]
    if not comparison.ids:
        raise NotTestable("no instance has a feedback")
    images = [str(records[id]["image_id"]) for id in comparison.ids]
    observed = by_image(np.array(comparison.observed), images)
    first, other = observed[..., STATISTICS.index("equal_length")].T
    return stats.ratio_interval(other, first, level, RESAMPLES)


def _faithful(rival: str) -> Callable[[Sample, Level], Interval]:
    """Gap of gradient relevancy minus that of a rival."""

    def measure(sample: Sample, level: Level) -> Interval:
        from vlmdiag.relevancy.evaluation_tables import AREAS, Evaluation

        try:
            evaluation = Evaluation(_run(sample.subject, "evaluate_relevancy"))
        except UsageError as error:
            raise NotTestable(str(error)) from error
        if not {"relevancy", rival} <= set(evaluation.methods):
            raise NotTestable(f"its run has no {rival.replace('_', ' ')}")
        gaps = evaluation.areas(evaluation.removal[0], evaluation.tokens("all", 1.0))
        own, other = (
            gaps[:, evaluation.methods.index(name), AREAS.index("gap")]
            for name in ("relevancy", rival)
        )
        return stats.paired_difference(own, other, level, RESAMPLES)

    return measure


# --- the table, fixed before the first run --------------------------------------------------------

PARTS = (
    Part(
        1,
        "norm of vision tokens / of user text tokens at the decoder's input",
        10,
        INF,
        "figure 3: vision tokens about 10 to 1000, text about 0.3 to 1, so a factor of 10 where"
        " they are nearest",
        _norm_ratio,
        "not normalised",
    ),
    Part(
        1,
        "the same with a normalising connector",
        0.5,
        2,
        "figure 4: 1.4 (log10 0.15) with both variants; as long is within a factor of 2",
        _norm_ratio,
        "normalised",
    ),
    Part(
        2,
        "position sensitivity index, normalised minus base",
        0,
        INF,
        "table 2: higher in nine of ten cells, by 0.0001 to 0.2, so the direction",
        _position_index,
        "normalised",
    ),
    Part(
        2,
        "mean |change of vision logits| under shifted keys, normalised / base",
        1,
        INF,
        "figure 8: the variants are higher in the first layers, so the direction",
        _rope_ratio,
        "normalised",
    ),
    Part(
        3,
        "right answers destroyed (description): object and one row around, minus random",
        0.35,
        INF,
        "table 1: 71.8 % minus 2.4 %, half of it",
        _ablated("ablation", "generative"),
    ),
    Part(
        3,
        "right answers destroyed (yes/no): object and one row around, minus random",
        0.26,
        INF,
        "table 1: 51.3 % minus 0 %, half of it",
        _ablated("ablation", "polling"),
    ),
    Part(
        3,
        "right answers destroyed (question): object and one row around, minus random",
        0.43,
        INF,
        "table 1: 86.7 % minus 0 %, half of it",
        _ablated("ablation_vqa", "vqa"),
    ),
    Part(
        4,
        "object patches that decode to its name at the best layer, minus to another's",
        0.12,
        INF,
        "section 5: 23.7 % at the best layer, half of it",
        _lens,
    ),
    Part(
        4,
        "object patches that decode to its name, last third of hidden states minus first",
        0,
        INF,
        "section 5: best at hidden state 25.7 of 33 on average, so the direction",
        _lens_is_late,
    ),
    Part(
        5,
        "right answers destroyed, object and one row around to last token: mid-late layers minus"
        " early ones",
        0.09,
        INF,
        "table 2: relative accuracy 0.82 in layers 15 to 24, half of that loss",
        _knockout_is_late,
    ),
    Part(
        5,
        "right answers destroyed, picture to its last row, all layers",
        -INF,
        0.09,
        "table 2: relative accuracy 1.00 in every window; below half of the loss above",
        _last_row,
    ),
    Part(
        6,
        "entanglement VD-EI (equation 3) at the recommended layer",
        0.14,
        INF,
        "table 5: 0.279 to 0.606 in models trained on photographs, half of the least. Its sign"
        " depends on the wording of the questions too (README of the swap analysis)",
        _entangled,
        "not independent",
    ),
    Part(
        6,
        "distance pairs right in both orders: farther object higher minus lower in the picture",
        0,
        INF,
        "table 1: more by 0.07 to 0.5 in all models, so the direction",
        _gap,
        "not independent",
    ),
    Part(
        6,
        "entanglement VD-EI of a model with independent height and distance",
        -0.14,
        0.14,
        "below half of the least of table 5",
        _entangled,
        "independent",
    ),
    Part(
        6,
        "the gap of such a model between farther object higher and lower",
        -INF,
        0.1,
        "below half of 0.2, what the models of table 1 have about the middle",
        _gap,
        "independent",
    ),
    Part(
        7,
        "attention to the picture, feedback / first answer, texts cut to equal length",
        1,
        INF,
        "figure 5: more, without a number that is fair to length, so the direction",
        _feedback,
    ),
    *(
        Part(
            8,
            f"gap between perturbation curves, gradient relevancy minus {words}",
            0,
            INF,
            "ICCV paper, tables 1 and 2: better in both tests, so the direction",
            _faithful(rival),
        )
        for rival, words in (
            ("raw_attention", "raw attention"),
            ("rollout", "rollout"),
            ("random", "a random order"),
        )
    ),
)


# --- verdicts -------------------------------------------------------------------------------------


def verdict_of(interval: Interval, low: float, high: float) -> str:
    """What an interval says of a range without its ends."""
    if interval.n < FEWEST or not interval.low <= interval.high:  # NaN
        return OPEN
    if low < interval.low and interval.high < high:
        return HOLDS
    return FAILS if interval.high <= low or interval.low >= high else OPEN


def bases_of(subjects: Sequence[Subject], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """{normalised variant: the model without normalisation}: those given, and those that the
    paper's names tell."""
    names = {subject.name for subject in subjects}
    told = {
        name: name.removesuffix(ending)
        for name in names
        for ending in NORMALISED
        if name.endswith(ending)
    }
    found = told | dict(given or {})
    unknown = sorted({*(given or {}), *(given or {}).values()} - names)
    if unknown:
        raise UsageError(f"--normalised: no run is of {', '.join(unknown)}")
    return found


def findings(
    subjects: Sequence[Subject],
    normalised: Mapping[str, str] | None = None,
    independent: Sequence[str] = (),
) -> list[Finding]:
    """What the runs of the models say of every part, in the order of PARTS."""
    bases = bases_of(subjects, normalised)
    by_name = {subject.name: subject for subject in subjects}
    apart = {*independent, *(name for name in by_name if name.endswith(INDEPENDENT))}
    asked = []
    for part in PARTS:
        for subject in subjects:
            is_normalised, is_independent = subject.name in bases, subject.name in apart
            wanted = {
                "any": True,
                "normalised": is_normalised,
                "not normalised": not is_normalised,
                "independent": is_independent,
                "not independent": not is_independent,
            }[part.who]
            if wanted:
                asked.append((part, subject))

    def measured(part: Part, subject: Subject, level: Level) -> Interval | str:
        base = by_name.get(bases.get(subject.name, ""))
        if part.claim == 2 and base is None:
            return f"no runs of {bases[subject.name]}, which it is compared with"
        try:
            return part.measure(Sample(subject, base), level)
        except NotTestable as error:
            return str(error)

    usual = [measured(part, subject, 0.95) for part, subject in asked]
    tests = sum(isinstance(found, Interval) for found in usual)
    found = []
    for (part, subject), at_95 in zip(asked, usual, strict=True):
        if isinstance(at_95, str):
            found.append(Finding(part, subject.name, UNTESTABLE, why=at_95))
            continue
        interval = measured(part, subject, 1 - 0.05 / tests)
        assert isinstance(interval, Interval)
        verdict = verdict_of(interval, part.low, part.high)
        few = f"too few: n = {int(interval.n)}" if interval.n < FEWEST else ""
        found.append(Finding(part, subject.name, verdict, interval, at_95, few))
    return found


def of_claim(found: Sequence[Finding]) -> str:
    """The verdict of a claim on one model from those of its parts: it holds where all tested parts
    do, and does not where one does not."""
    verdicts = {finding.verdict for finding in found} - {UNTESTABLE}
    if not verdicts:
        return UNTESTABLE
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts == {HOLDS} else OPEN


def as_json(found: Sequence[Finding]) -> str:
    """The table, for other programs; NaN and infinite ends as null."""

    def numbers(interval: Interval | None) -> dict[str, float | int | None] | None:
        if interval is None:
            return None
        plain = {name: float(value) for name, value in interval._asdict().items()}
        return {name: value if np.isfinite(value) else None for name, value in plain.items()}

    rows = [
        {
            "claim": finding.part.claim,
            "wording": CLAIMS[finding.part.claim].wording,
            "paper": CLAIMS[finding.part.claim].paper,
            "quantity": finding.part.quantity,
            "model": finding.model,
            "holds_above": finding.part.low if np.isfinite(finding.part.low) else None,
            "holds_below": finding.part.high if np.isfinite(finding.part.high) else None,
            "source": finding.part.source,
            "interval_95": numbers(finding.usual),
            "simultaneous": numbers(finding.interval),
            "verdict": finding.verdict,
            "why": finding.why,
        }
        for finding in found
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"

"""What a run measured, as numbers of each picture: the one form from which the report's tables,
its CSV and comparisons of models or settings are made.

Shapes: n pictures, L layers, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.figures.layers import state_tick
from vlmdiag.figures.stats import Interval
from vlmdiag.interp import summary
from vlmdiag.report.catalog import experiment_of
from vlmdiag.runs import rundirs
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.runs.rundirs import Run

STREAMS = {  # of hidden norms
    "user_text": "user text tokens",
    "vision": "vision tokens",
    "sys": "system prompt tokens",
    "bos": "the first token",
}
Axis = tuple[str, Sequence[object]]  # what the cells count, and the name of each


class Quantity(NamedTuple):
    """Numbers of n pictures. values: (n, *cells), NaN where a picture has none."""

    name: str
    unit: str
    ids: list[str]
    values: Float[np.ndarray, "n ..."]
    axes: tuple[Axis, ...] = ()  # of the cells
    bounds: tuple[float, float] | None = None
    discrete: bool = False

    def interval(self, level: float = 0.95) -> Interval:
        """Its mean over pictures, of the shape of the cells."""
        return stats.mean_interval(self.values, level, bounds=self.bounds, discrete=self.discrete)


def quantities_of(run: Run) -> list[Quantity]:
    """What a run measured; nothing of experiments that make pages or maps. UsageError where it has
    no finished item."""
    reader = READERS.get(experiment_of(run))
    if reader is None:
        return []
    if not run.ids():
        raise UsageError(f"{run.path} has no finished item yet; run its command again")
    return list(reader(run))


def cells_of(quantity: Quantity) -> list[str]:
    """The name of each cell, as 'layer 3, head 2', in the order of its ravelled values."""
    names = [name for name, _ in quantity.axes]
    places = itertools.product(*(ticks for _, ticks in quantity.axes))
    return [
        ", ".join(f"{name} {tick}" for name, tick in zip(names, place, strict=True))
        for place in places
    ]


def table_of(label: str, experiment: str, quantity: Quantity) -> pd.DataFrame:
    """A row for each cell: model, experiment, quantity, unit, cell, mean, low, high, n."""
    columns = {
        "model": label,
        "experiment": experiment,
        "quantity": quantity.name,
        "unit": quantity.unit,
        "cell": cells_of(quantity),
    }
    numbers = {name: np.ravel(value) for name, value in quantity.interval()._asdict().items()}
    return pd.DataFrame(columns | numbers)


# --- Beyond Semantics -----------------------------------------------------------------------------


def _stacked(run: Run, name: str) -> tuple[list[str], np.ndarray] | None:
    """One array of all items that have it; None where none has."""
    if name not in run.arrays(run.ids()[0]):
        return None
    ids, arrays = run.stack(name)
    return ids, arrays[name].astype(np.float64)


def _numbered(name: str, count: int) -> Axis:
    return name, range(count)


def _states(count: int) -> Axis:
    """Hidden states by what they are the output of."""
    return "after layer", [state_tick(state) for state in range(count)]


def _of_coco(run: Run) -> Iterator[Quantity]:
    if found := _stacked(run, "head_vision_share"):
        ids, values = found
        heads = (_numbered("layer", values.shape[1]), _numbered("head", values.shape[2]))
        name = "cross-modality balance"
        yield Quantity(f"{name}, heads", "share", ids, values, heads, stats.SHARES)
        layers = stats.measured_mean(values, 2)
        yield Quantity(name, "share", ids, layers, heads[:1], stats.SHARES)
        yield Quantity(
            f"{name}, whole model",
            "share",
            ids,
            stats.measured_mean(values, (1, 2)),
            (),
            stats.SHARES,
        )
    if found := _stacked(run, "group_mass"):
        ids, values = found
        groups = run.record(ids[0])["groups"]
        of_layers = values.mean(-1)
        there = [k for k in range(len(groups)) if np.nanmax(of_layers[:, k], initial=0.0) > 0]
        axes = (("group", [groups[k] for k in there]), _numbered("layer", values.shape[2]))
        name = "attention of the answer"
        yield Quantity(name, "share", ids, of_layers[:, there], axes, stats.SHARES)
    norms = {}
    for stream, words in STREAMS.items():
        found = _stacked(run, f"hidden_norms_{stream}")
        if found and np.isfinite(found[1]).any():
            norms[stream] = found
            states = (_states(found[1].shape[1]),)
            yield Quantity(f"norm of {words}", "L2", *found, states)
    if {"user_text", "vision"} <= set(norms):
        (ids, vision), (_, text) = norms["vision"], norms["user_text"]
        ratio = np.divide(vision, text, out=np.full_like(vision, np.nan), where=text > 0)
        yield Quantity(
            "norm of vision / user text tokens", "ratio", ids, ratio, (_states(ratio.shape[1]),)
        )
    for name, words in (
        ("delta_gv", "|change of vision logits|"),
        ("delta_alphaV", "change of attention to vision"),
    ):
        if found := _stacked(run, name):
            ids, values = found
            values = np.abs(values) if name == "delta_gv" else values
            of_layers = stats.measured_mean(values, 2)
            unit = "logits per position" if name == "delta_gv" else "share"
            yield Quantity(
                f"{words}, shifted keys",
                unit,
                ids,
                of_layers,
                (_numbered("layer", of_layers.shape[1]),),
            )


def _by_picture(
    records: Sequence[Record], columns: Sequence[str], rows: Sequence[tuple[int, str, float]]
) -> tuple[list[str], np.ndarray]:
    """(picture ids, means (n, C) over a picture's rows) of (record, column, value)."""
    ids = list(dict.fromkeys(str(record["image_id"]) for record in records))
    row_of, column_of = (
        {id: row for row, id in enumerate(ids)},
        {name: k for k, name in enumerate(columns)},
    )
    sums, counts = np.zeros((2, len(ids), len(columns)))
    for index, column, value in rows:
        place = row_of[str(records[index]["image_id"])], column_of[column]
        sums[place] += value
        counts[place] += 1
    return ids, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _of_psi(run: Run) -> Iterator[Quantity]:
    records = run.records()
    kinds = ["all", *sorted({record["kind"] for record in records})]
    right: dict[str, Callable[[Record], float]] = {
        "right answers": lambda record: float(record["original"]["correct"]),
        "right answers, vision tokens shuffled": lambda record: float(
            np.mean([answer["correct"] for answer in record["permuted"]])
        ),
    }
    for name, value in right.items():
        rows = [
            (index, kind, value(record))
            for index, record in enumerate(records)
            for kind in ("all", record["kind"])
        ]
        ids, values = _by_picture(records, kinds, rows)
        yield Quantity(name, "share", ids, values, (("kind", kinds),), stats.SHARES, True)


# --- llava-interp ---------------------------------------------------------------------------------


def _of_interventions(run: Run) -> Iterator[Quantity]:
    records = [record for record in run.records() if record["eligible"]]
    if not records:
        return
    ids = list(dict.fromkeys(str(record["image_id"]) for record in records))
    for setting in summary.SETTINGS[experiment_of(run)]:
        conditions = summary.by_condition(records)
        lost = [summary.destroyed(records, setting, drawn) for drawn in conditions.values()]
        name = f"right answers destroyed, {setting}"
        axes = (("condition", list(conditions)),)
        yield Quantity(name, "share", ids, np.stack(lost, 1), axes, stats.SHARES, True)


def _of_lens(run: Run) -> Iterator[Quantity]:
    from vlmdiag.interp.lens_curves import name_shares

    words = {
        "own": "object patches that decode to the object's name",
        "shuffled": "object patches that decode to another picture's name",
        "elsewhere": "other patches that decode to the object's name",
    }
    for name, values in name_shares(run, seed=0).items():
        states = (_states(values.shape[1]),)
        yield Quantity(words[name], "share", run.ids(), values, states, stats.SHARES, True)


# --- relevancy, swap analysis, Volcano ------------------------------------------------------------


def _of_relevancy(run: Run) -> Iterator[Quantity]:
    from vlmdiag.relevancy.evaluation_tables import AREAS, Evaluation

    evaluation = Evaluation(run)
    ids = [id for id, record in zip(run.ids(), run.records(), strict=True) if record["targets"]]
    methods = [name.replace("_", " ") for name in evaluation.methods]
    axes = (("method", methods), ("area", AREAS))
    for removal in evaluation.removal:
        values = evaluation.areas(removal, evaluation.tokens("all", 1.0))
        name = f"area under perturbation curves, removed: {removal}"
        yield Quantity(name, "share of p(0)", ids, values, axes)


def _of_swap(run: Run) -> Iterator[Quantity]:
    records = run.records()
    categories = sorted({record["category"] for record in records})
    rows = [
        (index, record["category"], float(record["is_correct_orig"] and record["is_correct_swap"]))
        for index, record in enumerate(records)
    ]
    ids, values = _by_picture(records, categories, rows)
    axes = (("category", categories),)
    yield Quantity("right in both orders", "share", ids, values, axes, stats.SHARES, True)


def _of_volcano(run: Run) -> Iterator[Quantity]:
    from vlmdiag.volcano import stages
    from vlmdiag.volcano.stage_statistics import STATISTICS, by_image

    records, _ = stages.select(run, "all")
    comparisons, _ = stages.measure(run, records, "top_k_mean", 1, 0)
    for stage, comparison in comparisons.items():
        if not comparison.ids:
            continue
        images = [str(records[id]["image_id"]) for id in comparison.ids]
        of_image = by_image(np.array(comparison.observed), images)  # (m, 2, statistics)
        axes = (
            ("text", ("initial answer", stage)),
            ("statistic", [name.replace("_", " ") for name in STATISTICS]),
        )
        name = f"attention to the picture, {stage} and initial answer"
        yield Quantity(name, "share", sorted(set(images)), of_image, axes)


READERS: dict[str, Callable[[Run], Iterator[Quantity]]] = {
    rundirs.COCO: _of_coco,
    "psi": _of_psi,
    "ablation": _of_interventions,
    "ablation_vqa": _of_interventions,
    "knockout": _of_interventions,
    "lens_accuracy": _of_lens,
    "evaluate_relevancy": _of_relevancy,
    "swap_analysis": _of_swap,
    "volcano": _of_volcano,
}

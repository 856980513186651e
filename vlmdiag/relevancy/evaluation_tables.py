"""Runs of diagnostic_tools/evaluate_relevancy.py as tables: areas under perturbation curves,
pointing game and mask energy of every method, with the priors.

    area       mean over the shares s of p(s) / p(0), p of the fixed token: positive, lower is
               better; negative, higher is better
    gap        negative - positive area: 0 where the order says nothing

A value of an image is the mean over its tokens; means, intervals and paired differences are over
images. docs/studies/stethoscope.md, section 4.3. Shapes: n images, M methods, T targets of an
image, K shares.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.relevancy import perturbation
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

GROUPS = ("all", "seeing", "knowing", "first", "later")  # of tokens
AREAS = ("positive", "negative", "gap")
RIVALS = ("random", "relevancy")  # whose differences to every method are in the table of areas
PRIORS = ("area", "centre", "relevancy")  # the same of the table of localisation
LOCAL = {"pointing": "highest part on the object", "energy": "share of the map on the object"}
BOUNDS = {"": "mean", "_low": "low", "_high": "high"}  # endings of a table's columns

Chosen = Sequence["Bool[np.ndarray, ' T']"]  # which targets of each image count


class Evaluation:
    """A run as arrays over its n images with targets."""

    records: list[Record]
    methods: list[str]
    shares: Float[np.ndarray, " K"]
    removal: list[str]
    curves: dict[str, list[Float[np.ndarray, "M T 2 K"]]]  # {removal: one an image}
    # pointing, energy (M, T), area_pointing, area_energy (T,) of each image, empty where the
    # places of the vision tokens are unknown
    local: list[dict[str, np.ndarray]]
    # nats that each token of an image loses without the picture
    needs: list[Float[np.ndarray, " T"]]
    left_out: dict[str, int]  # mentions of objects, and images without a target

    def __init__(self, run: Run) -> None:
        settings = run.meta["settings"]
        self.shares = np.array(settings["shares"])
        self.removal = settings["removal"]
        records = run.records()
        ids = [id for id, record in zip(run.ids(), records, strict=True) if record["targets"]]
        if not ids:
            raise UsageError(
                f"{run.path}: none of its {len(records)} answers names an object that is in the"
                " picture once, so there is nothing to evaluate"
            )
        self.records = [record for record in records if record["targets"]]
        self.left_out = {
            reason: sum(record["left_out"][reason] for record in records)
            for reason in records[0]["left_out"]
        }
        self.left_out["images"] = len(records) - len(ids)
        self.methods = self.records[0]["methods"]
        of_images = [run.arrays(id) for id in ids]
        self.curves = {
            removal: [arrays[f"curves_{removal}"].astype(float) for arrays in of_images]
            for removal in self.removal
        }
        names = ("pointing", "energy", "area_pointing", "area_energy")
        self.local = []
        for arrays in of_images:
            there = names if "pointing" in arrays else ()
            self.local.append({name: arrays[name].astype(float) for name in there})
        self.needs = [arrays["logprob"] - arrays["without_picture"] for arrays in of_images]

    def tokens(self, group: str, dependence: float) -> Chosen:
        """The targets of a group. dependence: nats that a 'seeing' token loses, at least."""
        chosen = []
        for needs, record in zip(self.needs, self.records, strict=True):
            words = np.array([target["word"] for target in record["targets"]])
            of_group = {
                "all": words >= 0,
                "seeing": needs >= dependence,
                "knowing": needs < dependence,
                "first": words == 0,
                "later": words > 0,
            }
            chosen.append(of_group[group])
        return chosen

    def per_image(
        self, values: Sequence[Float[np.ndarray, "M T *cells"]], chosen: Chosen
    ) -> Float[np.ndarray, "n M *cells"]:
        """Means over the chosen targets; NaN for an image without one."""
        means = []
        for of_image, counts in zip(values, chosen, strict=True):
            mask = counts.reshape(-1, *[1] * (of_image.ndim - 2))
            means.append(stats.measured_mean(np.where(mask, of_image, np.nan), 1))
        return np.stack(means)

    def areas(
        self, removal: str, chosen: Chosen, measure: str = "ratio"
    ) -> Float[np.ndarray, "n M 3"]:
        """Positive area, negative area and their gap, means over the chosen tokens of an image."""
        of_curve = perturbation.MEASURES[measure]
        areas = []
        for curves in self.curves[removal]:
            both = perturbation.area(of_curve(curves), self.shares)  # (M, T, 2)
            areas.append(np.concatenate([both, both[..., 1:] - both[..., :1]], -1))
        return self.per_image(areas, chosen)

    def located(
        self, measure: str, chosen: Chosen
    ) -> tuple[Float[np.ndarray, "n M"], Float[np.ndarray, " n"]]:
        """Pointing or energy (of the methods, of the area prior): means over the chosen tokens of
        an image."""
        of_methods = self.per_image([arrays[measure] for arrays in self.local], chosen)
        of_prior = [arrays[f"area_{measure}"][None] for arrays in self.local]
        return of_methods, self.per_image(of_prior, chosen)[:, 0]


def against(
    values: Float[np.ndarray, "n M *cells"],
    methods: Sequence[str],
    name: str,
    bounds: tuple[float, float] | None = None,
    discrete: bool = False,
) -> Interval | None:
    """Paired difference to one of the methods, an Interval of shape (M, ...), 0 for itself; None
    where the run lacks it. bounds, discrete: as of stats.paired_difference()."""
    if name not in methods:
        return None
    own = methods.index(name)
    rival = np.broadcast_to(values[:, [own]], values.shape)
    found = stats.paired_difference(values, rival, bounds=bounds, discrete=discrete)
    found.low[own] = found.high[own] = 0.0 * found.mean[own]  # NaN where nothing was measured
    return found


def count_of(chosen: Chosen) -> int:
    """How many tokens are chosen."""
    return int(sum(counts.sum() for counts in chosen))


def columns_of(name: str, interval: Interval | None, cell: tuple[int, ...]) -> dict[str, float]:
    """One cell of an interval as three columns <name>, <name>_low, <name>_high; NaN for none."""
    return {
        f"{name}{ending}": np.nan if interval is None else getattr(interval, bound)[cell]
        for ending, bound in BOUNDS.items()
    }


def area_table(evaluation: Evaluation, label: str, dependence: float) -> pd.DataFrame:
    """Rows of perturbation_auc.csv: one for each way of removal, group of tokens, measure and
    method."""
    return pd.DataFrame(_area_rows(evaluation, label, dependence))


def _area_rows(evaluation: Evaluation, label: str, dependence: float) -> Iterator[Record]:
    for removal in evaluation.removal:
        for group in GROUPS:
            chosen = evaluation.tokens(group, dependence)
            for measure in perturbation.MEASURES:
                values = evaluation.areas(removal, chosen, measure)
                areas = stats.mean_interval(values)
                changes = {rival: against(values, evaluation.methods, rival) for rival in RIVALS}
                for m, method in enumerate(evaluation.methods):
                    row: Record = {
                        "run": label,
                        "removal": removal,
                        "tokens": group,
                        "measure": measure,
                        "method": method,
                        "n_images": int(areas.n[m].max()),
                        "n_tokens": count_of(chosen),
                    }
                    for index, name in enumerate(AREAS):
                        row |= columns_of(name, areas, (m, index))
                        for rival, change in changes.items():
                            row |= columns_of(f"{name}_minus_{rival}", change, (m, index))
                    yield row


def local_table(evaluation: Evaluation, label: str, dependence: float) -> pd.DataFrame:
    """Rows of localisation.csv: one for each measure, group of tokens and method; none where the
    places of the vision tokens are unknown."""
    return pd.DataFrame(_local_rows(evaluation, label, dependence))


def _local_rows(evaluation: Evaluation, label: str, dependence: float) -> Iterator[Record]:
    if not all(evaluation.local):
        return
    for measure in LOCAL:
        for group in GROUPS:
            chosen = evaluation.tokens(group, dependence)
            of_methods, of_prior = evaluation.located(measure, chosen)
            values = np.concatenate([of_methods, of_prior[:, None]], 1)
            methods = [*evaluation.methods, "area"]
            is_hit = measure == "pointing"
            means = stats.mean_interval(values, bounds=stats.SHARES, discrete=is_hit)
            changes = {
                prior: against(values, methods, prior, stats.DIFFERENCES, is_hit)
                for prior in PRIORS
            }
            for m, method in enumerate(methods):
                row: Record = {
                    "run": label,
                    "measure": measure,
                    "tokens": group,
                    "method": method,
                    "n_images": int(means.n[m]),
                    "n_tokens": count_of(chosen),
                }
                row |= columns_of("value", means, (m,))
                for prior, change in changes.items():
                    row |= columns_of(f"minus_{prior}", change, (m,))
                yield row


def lines_of(table: pd.DataFrame) -> list[str]:
    """Rows of one of the tables as lines of text."""
    names: tuple[str, ...]
    if "removal" in table:
        first = "removal"
        width = 6
        names = ("positive", "negative", "gap", "gap_minus_random", "gap_minus_relevancy")
    else:
        first = "measure"
        width = 9
        names = ("value", "minus_area", "minus_centre", "minus_relevancy")
    lines = []
    for row in table.to_dict("records"):
        cells = "".join(_cell(name, row) for name in names)
        lines.append(
            f"{row[first]:{width}s}{row['tokens']:8s}{row['method']:21s}{cells}n ="
            f" {row['n_images']} images, {row['n_tokens']} tokens"
        )
    return lines


def _cell(name: str, row: Mapping[Hashable, float]) -> str:
    return f"{name} {row[name]:6.3f} [{row[f'{name}_low']:6.3f}, {row[f'{name}_high']:6.3f}]  "

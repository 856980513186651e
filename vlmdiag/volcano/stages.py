"""Attention of the stages of a run, compared: what each instance's texts give, and the numbers of
each comparison.

Volcano (arXiv 2311.07362), figure 5; docs/studies/volcano.md, sections 2.4, 2.9 and N3. Used by
visualize/analyze_attention_by_stage.py; statistics in stage_statistics.py, drawing in figures.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from vlmdiag.cli import UsageError
from vlmdiag.figures.stats import holm, p_text
from vlmdiag.types import Record
from vlmdiag.volcano.maps import counted, top_l_mean
from vlmdiag.volcano.stage_statistics import (
    STATISTICS,
    by_image,
    checked,
    compare,
    statistics_over_images,
)
from vlmdiag.volcano.tensors import STAGES

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.runs.rundirs import Run

COMPARED = ("feedback", "revision")  # with the initial answer


class TextAttention(NamedTuple):
    """Attention of the T tokens of a text that count."""

    c: Float[np.ndarray, "T P"]
    mass: Float[np.ndarray, " T"]


@dataclass
class Comparison:
    """What compare() gave for the instances that have both texts, one entry each."""

    ids: list[str] = field(default_factory=list)
    observed: list[Float[np.ndarray, "2 4"]] = field(default_factory=list)
    null: list[Float[np.ndarray, "B 2 4"]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)  # of the initial answer, the other
    missing: list[str] = field(default_factory=list)  # ids without such a text
    empty: list[str] = field(default_factory=list)  # ids with a text without a token


@dataclass
class StageMaps:
    """Maps of the instances that have all three texts."""

    ids: list[str] = field(default_factory=list)
    values: list[Float[np.ndarray, "2 3 P"]] = field(default_factory=list)


# --- reading --------------------------------------------------------------------------------------


def passes(record: Record, chosen: str) -> bool:
    """Whether an instance passes --filter."""
    if chosen == "corrected":
        return record["correct"]["initial"] is False and record["correct"]["final"] is True
    return chosen == "all" or bool(record["enhanced"])


def select(run: Run, chosen: str) -> tuple[dict[str, Record], int]:
    """({id: record} of the instances that pass --filter, how many there are in all); UsageError
    where none passes."""
    records = dict(zip(run.ids(), run.records()))
    if not records:
        raise UsageError(
            f"{run.path} has no finished instance yet; run the command that makes it again"
        )
    for id, record in records.items():
        if not {"image_id", "stages", "enhanced", "correct"} <= set(record):
            raise UsageError(
                f"{run.path / 'per_image' / id}.json lacks image_id, stages, enhanced or"
                " correct; make the run again"
            )
    selected = {id: record for id, record in records.items() if passes(record, chosen)}
    if not selected:
        unknown = sum(None in record["correct"].values() for record in records.values())
        reason = ""
        if chosen == "corrected" and unknown:
            reason = f"; {unknown} cannot be judged by their gold answer"
        raise UsageError(
            f"--filter {chosen} leaves none of the {len(records)} instances of {run.path}{reason};"
            " try another --filter"
        )
    return selected, len(records)


def texts_of(run: Run, id: str, record: Record, pool: str) -> dict[str, TextAttention]:
    """The texts of an instance that are stored, without the tokens that ended them."""
    arrays = run.arrays(id)
    texts = {}
    for stage in STAGES:
        if record["stages"].get(stage) is None:
            continue
        names = (f"{stage}_{pool}", f"{stage}_mean")
        lacking = [name for name in names if name not in arrays]
        if lacking:
            raise UsageError(
                f"{run.path}: {id} has no {lacking[0]}; it was made without it, choose another"
                " --pool_method or make the run again"
            )
        try:
            c, plain = (checked(arrays[name], name) for name in names)
        except ValueError as error:
            raise UsageError(
                f"{run.path}: {id}: {error}; delete its files in per_image/ and run the command"
                " that made it again"
            ) from error
        steps = counted(len(c), record["stages"][stage]["ended"])
        texts[stage] = TextAttention(c[:steps], plain[:steps].sum(1, dtype=np.float64))
    return texts


def grid_of(records: Sequence[Record]) -> tuple[int, int] | None:
    """(rows, columns) of the patches if all the pictures have the same, else None."""
    shapes = {tuple((record.get("grid") or {}).get("shape") or ()) for record in records}
    if len(shapes) != 1:
        return None
    shape = shapes.pop()
    return (shape[0], shape[1]) if shape else None


# --- measuring ------------------------------------------------------------------------------------


def measure(
    run: Run, records: Mapping[str, Record], pool: str, num_permutations: int, seed: int
) -> tuple[dict[str, Comparison], StageMaps]:
    """({stage: comparison with the initial answer}, maps of the three stages)."""
    comparisons = {stage: Comparison() for stage in COMPARED}
    maps = StageMaps()
    for id, record in tqdm(records.items(), desc="instances", unit="instance", disable=None):
        texts = texts_of(run, id, record, pool)
        for number, (stage, comparison) in enumerate(comparisons.items()):
            if "initial" not in texts or stage not in texts:
                comparison.missing.append(id)
                continue
            initial = texts["initial"]
            other = texts[stage]
            if not len(initial.c) or not len(other.c):
                comparison.empty.append(id)
                continue
            if initial.c.shape[1] != other.c.shape[1]:
                raise UsageError(
                    f"{run.path}: {id} has {initial.c.shape[1]} patches in its initial answer and"
                    f" {other.c.shape[1]} in its {stage}"
                )
            rng = np.random.default_rng([seed, zlib.crc32(id.encode()), number])
            observed, null = compare(
                initial.c, other.c, initial.mass, other.mass, num_permutations, rng
            )
            comparison.ids.append(id)
            comparison.observed.append(observed)
            comparison.null.append(null)
            comparison.tokens.append((len(initial.c), len(other.c)))
        if all(stage in texts and len(texts[stage].c) for stage in STAGES):
            maps.ids.append(id)
            maps.values.append(stage_maps({stage: text.c for stage, text in texts.items()}))
    return comparisons, maps


def stage_maps(c: Mapping[str, Float[np.ndarray, "T P"]]) -> Float[np.ndarray, "2 3 P"]:
    """Top-l mean and plain mean over tokens of the three stages; l is the shorter of initial answer
    and feedback, as published, and for the revision at most its own length."""
    shorter = min(len(c["initial"]), len(c["feedback"]))
    top = [top_l_mean(c[stage].astype(np.float64), min(shorter, len(c[stage]))) for stage in STAGES]
    return np.array([top, [c[stage].mean(0, dtype=np.float64) for stage in STAGES]])


def mean_maps(
    maps: StageMaps, records: Mapping[str, Record], grid: tuple[int, int]
) -> Float[np.ndarray, "2 3 rows columns"]:
    """Mean over images of the maps."""
    rows, columns = grid
    values = np.array(maps.values)[..., : rows * columns]
    images = [str(records[id]["image_id"]) for id in maps.ids]
    return by_image(values, images).mean(0).reshape(2, 3, rows, columns)


def summarise(comparison: Comparison, records: Mapping[str, Record], stage: str) -> Record:
    """One comparison: its instances and lengths, and {statistic: numbers}."""
    names = ("initial", stage)
    images = [str(records[id]["image_id"]) for id in comparison.ids]
    prompt_tokens = np.array(
        [
            [records[id]["stages"][name].get("prompt_tokens", np.nan) for name in names]
            for id in comparison.ids
        ],
        float,
    )
    return {
        "instances": len(images),
        "images": len(set(images)),
        "mean_tokens": dict(zip(names, np.mean(comparison.tokens, 0))),
        "mean_prompt_tokens": dict(zip(names, prompt_tokens.mean(0))),
        "statistics": statistics_over_images(
            np.array(comparison.observed), np.array(comparison.null), images
        ),
    }


def correct(summaries: Mapping[str, Record]) -> None:
    """Give every statistic of all comparisons its p_holm: they are read together."""
    of_all = [
        numbers for summary in summaries.values() for numbers in summary["statistics"].values()
    ]
    for numbers, p in zip(of_all, holm([numbers["p"] for numbers in of_all]), strict=True):
        numbers["p_holm"] = p


# --- what comes out -------------------------------------------------------------------------------


def show(summaries: Mapping[str, Record]) -> None:
    """Print one table for each comparison. p is corrected for all of them (Holm)."""
    for stage, summary in summaries.items():
        initial, other = (f"{summary['mean_tokens'][name]:.1f}" for name in ("initial", stage))
        print(
            f"\n{stage} against initial answer (n = {summary['instances']} instances,"
            f" {summary['images']} images; mean length {other} against {initial} tokens)"
        )
        print(
            f"{'statistic':14s}{'initial':>10s}{stage:>10s} "
            f" {'ratio [95 %]':22s}{'if tokens are exchanged':25s}{'p':>9s}{'p (Holm)':>10s}"
        )
        for name, numbers in summary["statistics"].items():
            ratio, null = (
                f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
                for interval in (numbers["ratio"], numbers["null_ratio"])
            )
            print(
                f"{name:14s}{numbers['initial']:10.5f}{numbers['other']:10.5f} "
                f" {ratio:22s}{null:25s}{p_text(numbers['p'], numbers['permutations']):>9s}"
                f"{numbers['p_holm']:10.2g}"
            )


def table_of(summaries: Mapping[str, Record]) -> dict[str, list[object]]:
    """The tables as columns of a CSV, a row for each comparison and statistic."""
    columns: dict[str, list[object]] = {}
    for stage, summary in summaries.items():
        for name in STATISTICS:
            numbers = summary["statistics"][name]
            row = {
                "comparison": f"{stage}/initial",
                "statistic": name,
                "instances": summary["instances"],
                "images": summary["images"],
                "initial": numbers["initial"],
                "other": numbers["other"],
            }
            for measure_name in ("ratio", "difference", "null_ratio", "null_difference"):
                interval = numbers[measure_name]
                row[measure_name] = interval["mean"]
                row[f"{measure_name}_low"] = interval["low"]
                row[f"{measure_name}_high"] = interval["high"]
            row["p"] = numbers["p"]
            row["p_holm"] = numbers["p_holm"]
            for column, value in row.items():
                columns.setdefault(column, []).append(value)
    return columns

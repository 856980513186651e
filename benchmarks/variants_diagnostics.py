"""The variants of bench_diagnostics.py: variant(case) -> (where its results will be, work()); and
that their outputs are equal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.cases import Case, encode_samples, model_inputs
from benchmarks.published_procedure import PROBED, diagnose
from vlmdiag.beyond_semantics import diagnostics
from vlmdiag.pictures.samples import Sample, with_picture
from vlmdiag.runs import engine, rundirs

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TOLERANCE = 1e-4
Results = dict[str, Any]  # name: number, list or array


def floor(case: Case) -> tuple[list[list[int]], Callable[[], None]]:
    """Plain generate(); the results are the answers' ids."""
    answers: list[list[int]] = []

    @torch.inference_mode()
    def work() -> None:
        inputs = model_inputs(case.vlm, encode_samples(case.vlm, case.samples))
        ids = case.vlm.model.generate(**inputs, max_new_tokens=case.new_tokens, do_sample=False)
        answers[:] = ids[:, inputs["input_ids"].shape[1] :].tolist()

    return answers, work


def ours(case: Case, paper_compat: bool = False) -> tuple[Path, Callable[[], None]]:
    """run_coco_diagnostics.py's process() and files; the results are in the folder per_image."""
    measures = diagnostics.Measures(
        max_new_tokens=case.new_tokens,
        restrict_to_past=True,
        probe_hidden_norms=True,
        paper_compat=paper_compat,
    )
    settings = dataclasses.asdict(measures)
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), rundirs.COCO, settings)
    process = diagnostics.make_process(case.vlm, measures)

    def work() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            counts = engine.run_items(
                run, case.samples, with_picture, process, len(case.samples), num_workers=2
            )
        if counts["done"] != len(case.samples):
            raise RuntimeError(f"items failed: {run.failed()}")

    return run.path / "per_image", work


def published(case: Case) -> tuple[Path, Callable[[], None]]:
    """The published procedure; the results are in a folder."""
    folder = Path(tempfile.mkdtemp(dir=case.folder))

    def work() -> None:
        for sample in case.samples:
            diagnose(case.vlm, sample, case.new_tokens, folder)

    return folder, work


VARIANTS: dict[str, Callable[[Case], tuple[Any, Callable[[], None]]]] = {
    "floor": floor,
    "ours": ours,
    "published": published,
}


# --- equal outputs --------------------------------------------------------------------------------


def check(case: Case) -> dict[str, float]:
    """{quantity: largest difference, relative where numbers exceed 1}; AssertionError unless the
    variants agree within TOLERANCE."""
    answers, run_floor = floor(case)
    published_folder, run_published = published(case)
    timed_folder, run_timed = ours(case)
    compat_folder, run_compat = ours(case, paper_compat=True)
    for run in (run_floor, run_published, run_timed, run_compat):
        run()
    worst: dict[str, float] = {}
    for sample, answer in zip(case.samples, answers, strict=True):
        wanted = _results(published_folder, sample)
        for label, folder in (("as timed", timed_folder), ("--paper_compat", compat_folder)):
            results = _results(folder, sample)
            _check_captions(label, results["generated_ids"], answer, wanted["generated_ids"], case)
            for name in _compared(wanted, label):
                quantity = f"{name} ({label})"
                # the published last point of the norms is after the final norm
                is_shorter = label == "as timed" and name.startswith("hidden_norms")
                last = -1 if is_shorter else None
                gap = _gap(quantity, results[name], wanted[name], last)
                worst[quantity] = max(worst.get(quantity, 0.0), gap)
    return worst


def _results(folder: Path, sample: Sample) -> Results:
    record = json.loads((folder / f"{sample.id}.json").read_text())
    with np.load(folder / f"{sample.id}.npz") as arrays:
        return {**arrays, **record}


def _compared(wanted: Results, label: str) -> list[str]:
    """Names of the arrays and mean shares that are to agree."""
    names = [
        name
        for name, entry in wanted.items()
        if isinstance(entry, np.ndarray) or name.startswith("mean_")
    ]
    if label == "as timed":
        # the published probe looks from an EOS token, ours from the prompt's last
        names = [name for name in names if name not in PROBED]
    return names


def _check_captions(
    label: str, ours: list[int], floor: list[int], published: list[int], case: Case
) -> None:
    if ours == floor == published and len(floor) == case.new_tokens:
        return
    raise AssertionError(
        f"other captions ({label}): ours {ours}, floor {floor}, published {published}"
    )


def _gap(quantity: str, ours: ArrayLike, published: ArrayLike, last: int | None) -> float:
    """The largest difference; AssertionError where it is too large. last: points up to this one."""
    mine = np.asarray(ours)
    wanted = np.asarray(published)
    if last is not None:
        mine = mine[:last]
        wanted = wanted[:last]
    gap = float((np.abs(mine - wanted) / np.maximum(1, np.abs(wanted))).max())
    # a NaN is not <= either
    if mine.shape != wanted.shape or not gap <= TOLERANCE:
        raise AssertionError(
            f"{quantity}: ours {mine.shape} and the published procedure {wanted.shape} differ by"
            f" {gap:.2g}, more than {TOLERANCE:g}"
        )
    return gap

"""Reads what results.py saved below results/<model>: json, csv and npz of each scale. No model, no
drawing; one line says what is broken or missing."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import disk
from vlmdiag.swap.layer_keys import key_of, layers_of, taken_apart
from vlmdiag.swap.relations import CATEGORIES, SYNONYMS
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# {"layer": (K,), field: (K,) float} of one series
Curve = dict[str, "np.ndarray"]

# folder under plots/ -> tag of the files it reads
CONDITIONS = {"all": "all_pairs", "both_correct": "both_correct", "all_with_validity": "all_pairs"}


class Consistency(NamedTuple):
    """One of the two measures of consistency."""

    stem: str  # of the JSON file
    figure: str  # file name of the figure
    title: str
    ylabel: str


# by folder under plots/
FAMILIES = {
    "sign_corrected_consistency": Consistency(
        "sign_corrected_consistency",
        "sign_corrected",
        "Axis coherence (sign-corrected)",
        "mean pairwise cosine of deltas",
    ),
    "within_cat_consistency": Consistency(
        "within_cat_consistency",
        "within_cat",
        "Within-category consistency",
        "mean pairwise cosine of deltas",
    ),
}


class Vectors(NamedTuple):
    """States and deltas of N pairs at one layer."""

    orig: Float[np.ndarray, "N d"]
    swap: Float[np.ndarray, "N d"]
    delta: Float[np.ndarray, "N d"]
    groups: np.ndarray
    categories: np.ndarray
    both: Bool[np.ndarray, " N"]  # answered right in both orders

    def of(self, rows: Bool[np.ndarray, " N"]) -> Vectors:
        """Those of some pairs."""
        return Vectors(*(values[rows] for values in self))


def parse_args(doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the scripts that draw what is saved."""
    parser = cli.parser(doc)
    parser.add_argument(
        "--results_dir",
        default="results",
        help="the --out_dir of swap_analysis.py: one folder a model",
    )
    parser.add_argument("--model", help="folder name of one model; None: every model")
    parser.add_argument("--scales", nargs="+", help="scales to draw; None: all that were saved")
    return parser.parse_args(argv)


def models(results_dir: str | Path, model: str | None = None) -> list[Path]:
    """The model folders under results_dir, or the one that --model names. UsageError where there is
    none."""
    root = Path(results_dir)
    if model is not None:
        if not (root / model).is_dir():
            names = sorted(path.name for path in root.glob("*/"))
            there = ", ".join(names) or "nothing" if root.is_dir() else "no such folder"
            raise UsageError(
                f"--model {model}: {root} has {there}; make it with swap_analysis.py --out_dir"
                f" {root}"
            )
        return [root / model]
    folders = sorted(
        path for path in root.glob("*/") if (path / "json").is_dir() or (path / "npz").is_dir()
    )
    if not folders:
        raise UsageError(
            f"{root} holds no model's results (folders with json/ or npz/); make them with"
            f" swap_analysis.py --out_dir {root}"
        )
    return folders


def by_samples(scale: str) -> tuple[bool, float, str]:
    """Sorts scales by their data, names without a number last."""
    samples = samples_seen(scale)
    return bool(np.isnan(samples)), float(np.nan_to_num(samples)), scale


def find_scales(
    folder: str | Path, wanted: Sequence[str] | None = None, kind: str = "json/pred_stats"
) -> list[str]:
    """The scales that have a file <kind>_{scale}, in the order of --scales, else by data scale with
    names that hold no number last. UsageError where one is missing."""
    ending, stem = kind.split("/")

    paths = Path(folder, ending).glob(f"{stem}_*.{ending}")
    scales = sorted((path.stem[len(stem) + 1 :] for path in paths), key=by_samples)
    missing = [scale for scale in wanted or () if scale not in scales]
    if missing or not scales:
        asked = f"--scales {' '.join(missing)}: " if missing else ""
        raise UsageError(
            f"{asked}{folder} has {kind}_* for {', '.join(scales) or 'no scale'}; make"
            f" them with python swap_analysis/swap_analysis.py --model_type {Path(folder).name}"
            f" --scales {' '.join(f'{scale}=MODEL' for scale in missing) or 'NAME=MODEL'}"
            f" --out_dir {Path(folder).parent}"
        )
    return list(dict.fromkeys(wanted)) if wanted else scales


def samples_seen(scale: str) -> float:
    """Fine-tuning samples by a scale's name: vanilla 0, 80k 80000, 2m 2000000, step50 50, full
    infinite; NaN for any other name."""
    if scale == "vanilla":
        return 0.0
    if scale == "full":
        return np.inf
    match = re.fullmatch(r"[^\d]*?(\d+(?:\.\d+)?)([km]?)", scale.lower())
    if not match:
        return np.nan
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]]


# --- JSON -----------------------------------------------------------------------------------------


def read_json(folder: str | Path, name: str) -> Record | None:
    """json/<name>.json as a dict, None where there is no such file, UsageError where it is
    broken."""
    path = Path(folder, "json", f"{name}.json")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); delete it and run swap_analysis.py again"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} holds a {type(content).__name__} where an object was wanted; delete it and run"
            " swap_analysis.py again"
        )
    return content


def number(value: object) -> float:
    """A number of a JSON file, NaN for null and all else."""
    return float(value) if isinstance(value, (int, float)) else np.nan


def read_layers(folder: str | Path, name: str) -> dict[str, dict[int, Record]] | None:
    """{series: {layer: cell}} of json/<name>.json, layers sorted; None without the file."""
    content = read_json(folder, name)
    if content is None:
        return None
    by_series: dict[str, dict[int, Record]] = {}
    for (series, layer), cell in taken_apart(content).items():
        by_series.setdefault(SYNONYMS.get(series, series), {})[layer] = cell
    return {series: dict(sorted(cells.items())) for series, cells in by_series.items()}


def curve_of(layers: Sequence[int], cells: Sequence[Fields]) -> Curve:
    """Every field of the cells as an array over the layers, NaN where one lacks it; mean in any
    case."""
    fields = dict.fromkeys(["mean", *(field for cell in cells for field in cell)])
    curve = {field: np.array([number(cell.get(field)) for cell in cells]) for field in fields}
    return curve | {"layer": np.array(layers)}


def read_curves(folder: str | Path, name: str) -> dict[str, Curve] | None:
    """{series: curve} of json/<name>.json; every series has every layer of the file, NaN where it
    has no value. None without the file."""
    by_series = read_layers(folder, name)
    if by_series is None:
        return None
    layers = sorted({layer for cells in by_series.values() for layer in cells})
    curves = {}
    for series, cells in by_series.items():
        # a bare number is the mean
        filled = [cells.get(layer, {}) for layer in layers]
        curves[series] = curve_of(
            layers, [cell if isinstance(cell, dict) else {"mean": cell} for cell in filled]
        )
    return curves


def unreliable(folder: str | Path, scale: str) -> dict[str, tuple[float, float]]:
    """{category: (acc_orig, acc_swap)} of those that category_validity calls unreliable."""
    validity = read_json(folder, f"category_validity_{scale}") or {}
    flagged = {
        SYNONYMS.get(name, name): cell
        for name, cell in validity.items()
        if isinstance(cell, dict) and not cell.get("reliable", True)
    }
    return {
        name: (number(flagged[name].get("acc_orig")), number(flagged[name].get("acc_swap")))
        for name in CATEGORIES
        if name in flagged
    }


def alignment_file(scale: str, condition: str) -> str:
    """Name of the JSON file of the cross-group alignment."""
    name = f"cross_alignment_{scale}"
    return f"{name}_both_correct" if condition == "both_correct" else name


# --- CSV, NPZ -------------------------------------------------------------------------------------


def read_matrix(path: str | Path) -> Float[np.ndarray, "6 6"]:
    """A labelled square CSV in the order of CATEGORIES, NaN for what it lacks. UsageError where it
    is none."""
    try:
        with open(path, newline="") as file:
            header, *lines = [line for line in csv.reader(file) if line]
        columns = [SYNONYMS.get(name, name) for name in header[1:]]
        cells = {}
        for label, *values in lines:
            for column, value in zip(columns, values):
                cells[SYNONYMS.get(label, label), column] = float(value or "nan")
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(
            f"{path} is no labelled matrix ({error}); delete it and run swap_analysis.py again"
        ) from error
    return np.array(
        [[cells.get((row, column), np.nan) for column in CATEGORIES] for row in CATEGORIES]
    )


def read_vectors(folder: str | Path, scale: str) -> Iterator[tuple[int, Vectors]]:
    """(layer, vectors) of npz/vectors_{scale}.npz. Pairs with a value that is not finite are left
    out. UsageError where it cannot be read."""
    path = Path(folder, "npz", f"vectors_{scale}.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            for layer in layers_of(archive.files, "delta"):
                yield layer, _vectors_at(archive, layer)
    except disk.BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        raise UsageError(
            f"{path} cannot be read ({reason}); run swap_analysis.py for scale {scale} again"
        ) from error


def _vectors_at(archive: Mapping[str, np.ndarray], layer: int) -> Vectors:
    """The vectors of one layer that are finite."""

    def column(name: str) -> np.ndarray:
        return archive[key_of(name, layer)]

    categories = [SYNONYMS.get(str(name), str(name)) for name in column("categories")]
    vectors = Vectors(
        column("orig").astype(np.float64),
        column("swap").astype(np.float64),
        column("delta").astype(np.float64),
        column("groups"),
        np.array(categories, dtype="U16"),
        column("is_correct_orig") & column("is_correct_swap"),
    )
    finite = np.isfinite(vectors.orig).all(1) & np.isfinite(vectors.swap).all(1)
    return vectors.of(finite & np.isfinite(vectors.delta).all(1))


def representative(folder: str | Path, scale: str) -> list[int] | None:
    """Layers of npz/vectors_{scale}.npz, None without the file."""
    path = Path(folder, "npz", f"vectors_{scale}.npz")
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            return layers_of(archive.files, "delta")
    except disk.BROKEN as error:
        raise UsageError(
            f"{path} cannot be read ({error}); run swap_analysis.py for scale {scale} again"
        ) from error

"""Reads what results.py saved below results/<model>: json, csv and npz of each scale. No model, no
drawing; one line says what is broken or missing."""

import csv
import json
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError

GROUPS = {
    "horizontal": ("left", "right"),
    "vertical": ("above", "under"),
    "distance": ("far", "close"),
}  # the canonical category first
CATEGORIES = tuple(name for pair in GROUPS.values() for name in pair)
SPLITS = ("consistent", "counter", "ambiguous")
SAME = {"below": "under", "beneath": "under", "near": "close"}
CONDITIONS = {
    "all": "all_pairs",
    "both_correct": "both_correct",
    "all_with_validity": "all_pairs",
}  # folder under plots/ -> tag of the files it reads
# the two consistency families: folder under plots/ -> (JSON file, file name, title, y axis)
FAMILIES = {
    "sign_corrected_consistency": (
        "sign_corrected_consistency",
        "sign_corrected",
        "Axis coherence (sign-corrected)",
        "mean pairwise cosine of deltas",
    ),
    "within_cat_consistency": (
        "within_cat_consistency",
        "within_cat",
        "Within-category consistency",
        "mean pairwise cosine of deltas",
    ),
}


def parse_args(doc, argv=None):
    """Flags of the scripts that draw what is saved."""
    parser = cli.parser(doc)
    parser.add_argument(
        "--results_dir",
        default="results",
        help="the --output_dir of swap_analysis.py: one folder a model",
    )
    parser.add_argument("--model", help="folder name of one model; None: every model")
    parser.add_argument("--scales", nargs="+", help="scales to draw; None: all that were saved")
    return parser.parse_args(argv)


def models(results_dir, model=None):
    """The model folders under results_dir, or the one that --model names. UsageError where there is
    none."""
    root = Path(results_dir)
    if model is not None:
        if not (root / model).is_dir():
            there = (
                ", ".join(sorted(path.name for path in root.glob("*/"))) or "nothing"
                if root.is_dir()
                else "no such folder"
            )
            raise UsageError(
                f"--model {model}: {root} has {there}; make it with swap_analysis.py --output_dir"
                f" {root}"
            )
        return [root / model]
    found = sorted(
        path for path in root.glob("*/") if (path / "json").is_dir() or (path / "npz").is_dir()
    )
    if not found:
        raise UsageError(
            f"{root} holds no model's results (folders with json/ or npz/); make them with"
            f" swap_analysis.py --output_dir {root}"
        )
    return found


def find_scales(folder, wanted=None, kind="json/pred_stats"):
    """The scales that have a file <kind>_{scale}, in the order of --scales, else by data scale with
    names that hold no number last."""
    family, stem = kind.split("/")
    there = [path.stem[len(stem) + 1 :] for path in Path(folder, family).glob(f"{stem}_*.{family}")]
    there = sorted(
        there,
        key=lambda scale: (
            np.isnan(samples_seen(scale)),
            np.nan_to_num(samples_seen(scale)),
            scale,
        ),
    )
    missing = [scale for scale in wanted or () if scale not in there]
    if missing or not there:
        what = f"--scales {' '.join(missing)}: " if missing else ""
        raise UsageError(
            f"{what}{folder} has {kind}_* for {', '.join(there) or 'no scale'}; run"
            " swap_analysis.py for the scales that are wanted"
        )
    return list(dict.fromkeys(wanted)) if wanted else there


def samples_seen(scale):
    """Fine-tuning samples by a scale's name: vanilla 0, 80k 80000, 2m 2000000, step50 50, full
    infinite; NaN for any other name."""
    number = re.fullmatch(r"[^\d]*?(\d+(?:\.\d+)?)([km]?)", scale.lower())
    if scale in ("vanilla", "full"):
        return {"vanilla": 0.0, "full": np.inf}[scale]
    return float(number[1]) * {"": 1, "k": 1e3, "m": 1e6}[number[2]] if number else np.nan


def read_json(folder, name):
    """json/<name>.json as a dict, None where there is no such file, UsageError where it is
    broken."""
    path = Path(folder, "json", f"{name}.json")
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); delete it and run swap_analysis.py again"
        ) from error
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} holds a {type(value).__name__} where an object was wanted; delete it and run"
            " swap_analysis.py again"
        )
    return value


def number(value):
    return float(value) if isinstance(value, (int, float)) else np.nan


def read_curves(folder, name):
    """{series: {"layer": (K,), field: (K,) float}} of json/<name>.json with keys "series_L{n}",
    "L{n}" or "{n}" (series ""); every series has every layer of the file, NaN where it has no
    value. None without the file."""
    values, found = read_json(folder, name), {}
    for key, value in (values or {}).items():
        parts = re.fullmatch(r"(?:(.+)_)?L?(\d+)", key)
        if parts:
            series = SAME.get(parts[1], parts[1]) or ""
            found.setdefault(series, {})[int(parts[2])] = (
                value if isinstance(value, dict) else {"mean": value}
            )
    layers = sorted({layer for cells in found.values() for layer in cells})
    curves = {}
    for series, cells in found.items():
        fields = {field for cell in cells.values() for field in cell}
        curves[series] = {
            field: np.array([number(cells.get(layer, {}).get(field)) for layer in layers])
            for field in fields
        }
        curves[series] = (
            {"mean": np.full(len(layers), np.nan)} | curves[series] | {"layer": np.array(layers)}
        )
    return None if values is None else curves


def unreliable(folder, scale):
    """{category: (acc_orig, acc_swap)} of those that category_validity calls unreliable."""
    validity = read_json(folder, f"category_validity_{scale}") or {}
    flagged = {
        SAME.get(name, name): cell
        for name, cell in validity.items()
        if isinstance(cell, dict) and not cell.get("reliable", True)
    }
    return {
        name: (number(flagged[name].get("acc_orig")), number(flagged[name].get("acc_swap")))
        for name in CATEGORIES
        if name in flagged
    }


def read_matrix(path):
    """A labelled square CSV -> (6, 6) float in the order of CATEGORIES, NaN for what it lacks."""
    try:
        with open(path, newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        cells = {
            (SAME.get(row[0], row[0]), SAME.get(name, name)): float(cell or "nan")
            for row in rows
            for name, cell in zip(header[1:], row[1:])
        }
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(
            f"{path} is no labelled matrix ({error}); delete it and run swap_analysis.py again"
        ) from error
    return np.array(
        [[cells.get((row, column), np.nan) for column in CATEGORIES] for row in CATEGORIES]
    )


def read_vectors(folder, scale):
    """npz/vectors_{scale}.npz -> iterator of (layer, {"orig", "swap", "delta" (N, d) float64,
    "groups", "categories" (N,) str, "both" (N,) bool}). Pairs with a value that is not finite are
    left out."""
    path = Path(folder, "npz", f"vectors_{scale}.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            layers = sorted(
                int(key[7:]) for key in archive.files if re.fullmatch(r"delta_L\d+", key)
            )
            for layer in layers:
                cell = {
                    name: archive[f"{name}_L{layer}"]
                    for name in (
                        "orig",
                        "swap",
                        "delta",
                        "groups",
                        "categories",
                        "is_correct_orig",
                        "is_correct_swap",
                    )
                }
                states = {name: cell[name].astype(np.float64) for name in ("orig", "swap", "delta")}
                keep = np.logical_and.reduce(
                    [np.isfinite(values).all(axis=1) for values in states.values()]
                )
                labels = {
                    "groups": cell["groups"],
                    "categories": np.array(
                        [SAME.get(str(name), str(name)) for name in cell["categories"]], dtype="U16"
                    ),
                }
                labels["both"] = cell["is_correct_orig"] & cell["is_correct_swap"]
                yield layer, {name: values[keep] for name, values in (states | labels).items()}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"{type(error).__name__}: {error}"
        )
        raise UsageError(
            f"{path} cannot be read ({reason}); run swap_analysis.py for scale {scale} again"
        ) from error


def representative(folder, scale):
    """Layers of npz/vectors_{scale}.npz, None without the file."""
    path = Path(folder, "npz", f"vectors_{scale}.npz")
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            return sorted(int(key[7:]) for key in archive.files if re.fullmatch(r"delta_L\d+", key))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); run swap_analysis.py for scale {scale} again"
        ) from error


def alignment_file(folder, scale, condition):
    """Name of the JSON file of the cross-group alignment."""
    return f"cross_alignment_{scale}" + "_both_correct" * (condition == "both_correct")

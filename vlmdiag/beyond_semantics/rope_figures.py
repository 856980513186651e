"""How attention to the image depends on where the image stands: numbers and figures of the RoPE
probe over the images of a run.

Beyond Semantics (arXiv 2503.17349), figure 8; docs/studies/beyond_semantics.md, sections 1.4 and
2.6. Used by diagnostic_tools/analyze_coco_diagnostics.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.figures.layers import LAYER_AXIS
from vlmdiag.runs import selection
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

DRAWN = {  # title and axis of each drawn quantity, left panel first
    "delta_alphaV": (
        "Change of the attention mass on the image",
        r"mean $\Delta\alpha_V$ (share of attention)",
    ),
    "abs_delta_gv": (
        "RoPE sensitivity of the vision logits",
        r"mean $|\Delta g_V|$ (logits per position)",
    ),
}
Curves = dict[str, "Interval"]  # {drawn quantity: Interval (L,)}


class Probe(NamedTuple):
    """What one run says at one shift D in positions. means: {quantity: (L, H)} over images;
    of_layers, of_images: {drawn quantity: (n, L), (n,)}, an image's mean over heads, and over
    layers too. A head that gives an image no mass counts in no mean."""

    step: float
    means: dict[str, Float[np.ndarray, "L H"]]
    of_layers: dict[str, Float[np.ndarray, "n L"]]
    of_images: dict[str, Float[np.ndarray, " n"]]


def read_probe(run: Run, delta_steps: float | None) -> Probe:
    """One run at one shift, None: the run's first; read a part of the images at a time. UsageError
    for a shift that was not measured."""
    measured = [float(step) for step in run.meta["settings"].get("delta_steps") or ()]
    advice = "make them with run_coco_diagnostics.py --delta_steps on a model with rotary positions"
    names = ["alphaV", "delta_gv_all", "delta_alphaV_all", "delta_gv_derivative"]
    parts = selection.read_parts(run, names, advice)
    step = measured[0] if delta_steps is None else delta_steps
    if step not in measured:
        raise UsageError(
            f"--delta_steps {step:g}: {run.path} was measured with"
            f" {', '.join(f'{each:g}' for each in measured)}; choose one of these"
        )
    index = measured.index(step)
    means: dict[str, stats.MeasuredMean] = {}
    of_layers: dict[str, list[np.ndarray]] = {name: [] for name in DRAWN}
    of_images: dict[str, list[np.ndarray]] = {name: [] for name in DRAWN}
    for _, arrays in parts:
        delta_gv = arrays["delta_gv_all"][:, index]
        values = {
            "alphaV": arrays["alphaV"],
            "delta_gv": delta_gv,
            "abs_delta_gv": np.abs(delta_gv),
            "delta_alphaV": arrays["delta_alphaV_all"][:, index],
            "delta_gv_derivative": arrays["delta_gv_derivative"],
        }
        for name, array in values.items():
            means.setdefault(name, stats.MeasuredMean()).add(array)
        for name in DRAWN:
            of_layers[name].append(stats.measured_mean(values[name], axis=2))
            of_images[name].append(stats.measured_mean(values[name], axis=(1, 2)))
    return Probe(
        step,
        {name: mean.mean() for name, mean in means.items()},
        {name: np.concatenate(parts) for name, parts in of_layers.items()},
        {name: np.concatenate(parts) for name, parts in of_images.items()},
    )


def common_step(steps: Sequence[float]) -> float:
    """The one shift that all runs were read at; UsageError where their first shifts differ."""
    different = sorted(set(steps))
    if len(different) > 1:
        raise UsageError(
            f"the runs' first shifts differ ({', '.join(f'{step:g}' for step in different)}"
            " positions); choose one that all have with --delta_steps"
        )
    return different[0]


def summarise(run: Run, probe: Probe) -> Curves:
    """Write avg_*.npy and summary.json into <run>/analysis/; returns the curves of the two drawn
    quantities."""
    layers, heads = probe.means["alphaV"].shape
    settings = run.meta["settings"]
    summary: Record = {
        "images_used": len(probe.of_images["abs_delta_gv"]),
        "L": layers,
        "H": heads,
        "run_dir": str(run.path),
        "model_name": settings["model_name"],
        "strip_system_prompt": settings["strip_system_prompt"],
        "delta_steps": probe.step,
    }
    for name in DRAWN:
        interval = stats.mean_interval(probe.of_images[name])
        for ending, value in zip(("", "_low", "_high"), interval):
            summary[f"mean_avg_{name}{ending}"] = None if np.isnan(value) else float(value)
    analysis = run.path / "analysis"
    try:
        analysis.mkdir(exist_ok=True)
        for name, mean in probe.means.items():
            np.save(analysis / f"avg_{name}.npy", mean)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or analysis}: {error.strerror or error}"
        ) from error
    plots.write_file(analysis / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return curves_of(probe)


def curves_of(probe: Probe) -> Curves:
    """The curves of the two drawn quantities, heads averaged within each image."""
    return {name: stats.mean_interval(probe.of_layers[name]) for name in DRAWN}


def draw_layers(
    axis: Axes, curves: Mapping[str, Curves], name: str, colors: Mapping[str, str]
) -> None:
    """Draw one quantity of every run against the layer. curves, colors: by the run's label."""
    title, ylabel = DRAWN[name]
    for label, intervals in curves.items():
        interval = intervals[name]
        layers = np.arange(len(interval.mean))
        plots.line_with_band(axis, layers, interval, label, colors[label])
    if name == "delta_alphaV":
        axis.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
    else:
        axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel=LAYER_AXIS, ylabel=ylabel)


def layers_figure(curves: Mapping[str, Curves], names: Sequence[str], step: float) -> Figure:
    """One panel for each of the named quantities, a line a run."""
    colors = plots.model_colors(list(curves))
    width = 7.5 if len(names) == 1 else 6 * len(names)
    figure, axes = plt.subplots(1, len(names), figsize=(width, 4.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        draw_layers(axis, curves, name, colors)
    plots.legends(list(axes[0]))
    positions = "position" if abs(step) == 1 else "positions"
    figure.suptitle(
        f"vision keys moved {step:+g} {positions} towards the query; mean over heads and images,"
        " bands: 95 % over images",
        fontsize=9,
    )
    return figure


def save_curves(path: str | Path, curves: Mapping[str, Curves]) -> None:
    """Write the drawn numbers as CSV, one row a layer."""
    depth = max(len(intervals["abs_delta_gv"].mean) for intervals in curves.values())
    columns: Record = {"layer": range(depth)}
    for label, intervals in curves.items():
        for name in DRAWN:
            for ending, values in zip(("", "_low", "_high", "_n"), intervals[name]):
                columns[f"{label}_{name}{ending}"] = values
    plots.save_csv(path, columns)

"""Averaged maps over a run, and the comparison of the stages. Volcano (arXiv 2311.07362), figure 5;
docs/studies/volcano.md, sections 2.4 and 2.9."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from vlmdiag.figures import plots
from vlmdiag.figures.stats import p_text
from vlmdiag.types import Record
from vlmdiag.volcano.maps import counted, top_l_mean
from vlmdiag.volcano.stage_statistics import STATISTICS
from vlmdiag.volcano.tensors import STAGES

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.runs.rundirs import Run


STATISTIC_NAMES = {
    "top_l": "top-l mean over tokens\n(published)",
    "token_mean": "mean over tokens",
    "image_mass": "attention on the picture\nper token",
    "equal_length": "top half of tokens,\ntexts cut to equal length",
}
CHOSEN = {
    "enhanced": "the model preferred a revision",
    "corrected": "the revision turned a wrong answer right",
    "all": "all of the run",
}
TICKS = (0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5, 8, 12, 20, 50, 100)


# --- the published figure of a run ----------------------------------------------------------------


def average_maps(
    run: Run, records: Mapping[str, Record], pool: str
) -> tuple[dict[str, Float[np.ndarray, "rows columns"]], int]:
    """({stage: map}, how many instances it is the mean of): per patch the mean of the l largest
    steps (l: the shorter of initial answer and critique, without stop tokens), over the instances
    in which the model preferred a revision and whose grid is that of the first of them."""
    maps: dict[str, list[Float[np.ndarray, " P"]]] = {stage: [] for stage in STAGES}
    shape = None
    for id, record in records.items():
        steps = {
            stage: counted(len(text["tokens"]), text["ended"])
            for stage, text in record["stages"].items()
            if text
        }
        grid = record["grid"]
        if not record["enhanced"] or not grid or not grid["shape"] or min(steps.values()) < 1:
            continue
        if shape not in (None, grid["shape"]):
            continue
        shape = grid["shape"]
        shorter = min(steps["initial"], steps["feedback"])
        arrays = run.arrays(id)
        for stage, count in steps.items():
            c = arrays[f"{stage}_{pool}"][:count]
            maps[stage].append(top_l_mean(c, min(count, shorter)))
    if shape is None:
        return {}, 0
    rows, columns = shape
    means = {
        stage: np.mean(of_instances, 0)[: rows * columns].reshape(rows, columns)
        for stage, of_instances in maps.items()
    }
    return means, len(maps["initial"])


def draw_average(
    label: str, means: Mapping[str, Float[np.ndarray, "rows columns"]], count: int, pool: str
) -> Figure:
    """The maps of average_maps(), all on one scale."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    low = min(mean.min() for mean in means.values())
    high = max(mean.max() for mean in means.values())
    for ax, (stage, mean) in zip(axes, means.items()):
        title = f"{stage.capitalize()} (mean {mean.mean():.4f})"
        image = plots.heatmap(ax, mean, title, low, high, "patch column", "patch row")
        ax.set_aspect("equal")
    fig.colorbar(
        image,
        ax=axes,
        label=(
            f"attention to the patch, {pool.replace('_', '-')}\nover layers and heads,"
            " top-l over tokens"
        ),
    )
    fig.suptitle(
        f"{label}: {count} {'instance' if count == 1 else 'instances'} in which the model preferred"
        " its revision",
        fontsize=10,
    )
    return fig


# --- comparison of the stages ---------------------------------------------------------------------


def draw_ratios(label: str, comparisons: Mapping[str, Record], chosen: str, pool: str) -> Figure:
    """Ratios with intervals, one panel for each comparison; grey: where the ratio lies when the
    tokens of the two texts are exchanged. chosen: a key of CHOSEN."""
    fig, axes = plt.subplots(
        1, len(comparisons), figsize=(2.4 + 4.3 * len(comparisons), 4.3), sharey=True, squeeze=False
    )
    places = np.arange(len(STATISTICS))[::-1]
    for ax, (stage, comparison) in zip(axes[0], comparisons.items()):
        _ratio_panel(ax, stage, comparison, places, plots.color_of(label))
    axes[0, 0].set_yticks(places, [STATISTIC_NAMES[name] for name in STATISTICS])
    fig.suptitle(
        f"{label}: attention to the picture, {CHOSEN[chosen]} ({pool.replace('_', '-')} over"
        " layers and heads)",
        fontsize=11,
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return fig


def p_of(statistic: Record) -> str:
    """'p = 0.03 (Holm)', or '<=' where no permutation was as far. Old files have no corrected p."""
    corrected: float = statistic["p_holm"] if "p_holm" in statistic else statistic["p"]
    at_floor = p_text(statistic["p"], statistic["permutations"]).startswith("<=")
    name = " (Holm)" if "p_holm" in statistic else ""
    return f"p {'<=' if at_floor and corrected < 1 else '='} {corrected:.2g}{name}"


def _ratio_panel(
    ax: Axes, stage: str, comparison: Record, places: Int[np.ndarray, " s"], color: str
) -> None:
    of_statistics = [comparison["statistics"][name] for name in STATISTICS]

    def column(measure: str, end: str) -> Float[np.ndarray, " s"]:
        return np.array([statistic[measure][end] for statistic in of_statistics])

    null_low = column("null_ratio", "low")
    null_high = column("null_ratio", "high")
    ax.axvline(1, color=plots.EVEN_COLOR, linewidth=1, zorder=0)
    ax.barh(
        places,
        null_high - null_low,
        0.5,
        null_low,
        color="#C4C4C4",
        label="tokens of the two texts exchanged: mean and 95 %",
    )
    null_mean = column("null_ratio", "mean")
    ax.plot(null_mean, places, "|", color="#555555", markersize=17, markeredgewidth=1.6)
    ratio = column("ratio", "mean")
    low = column("ratio", "low")
    high = column("ratio", "high")
    ax.errorbar(
        ratio,
        places,
        xerr=np.clip([ratio - low, high - ratio], 0, None),
        fmt="o",
        color=color,
        capsize=3,
        markersize=6,
        label="measured, 95 % interval over images",
    )
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    for y, x, statistic in zip(places, ratio, of_statistics):
        if np.isfinite(x):
            text = f"{x:.2f}, {p_of(statistic)}"
            ax.text(x, y + 0.31, text, ha="center", va="bottom", fontsize=8, bbox=box)

    tokens = comparison["mean_tokens"]
    images = comparison["images"]
    on_images = "" if images == comparison["instances"] else f" on {images} images"
    ax.set_title(
        f"{stage.capitalize()} against initial answer\nn = {comparison['instances']}{on_images};"
        f" on average {tokens[stage]:.0f} against {tokens['initial']:.0f} tokens"
    )
    ax.set(
        xscale="log", xlabel=f"ratio {stage} / initial answer", ylim=(-0.6, len(STATISTICS) - 0.3)
    )
    ends = np.concatenate([null_low, null_high, ratio, low, high, [0.9, 1.1]])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(TICKS if ends.max() / ends.min() > 2 else np.arange(1, 31) / 10)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlim(ends.min() / 1.18, ends.max() * 1.18)
    ax.grid(False, axis="y")


def draw_stage_maps(
    label: str, maps: Float[np.ndarray, "2 3 rows columns"], n: int, chosen: str, pool: str
) -> Figure:
    """Figure 5 with the revision, and below it the mean over tokens; one scale a row."""
    height = 2.7 * maps.shape[2] / maps.shape[3]
    fig, axes = plt.subplots(2, len(STAGES), figsize=(10.2, 2 * max(height, 1.5) + 1.3))
    bar_labels = ("top-l mean over tokens\n(published)", "mean over tokens")
    for axes_of_row, of_stages, bar_label in zip(axes, maps, bar_labels):
        for ax, mean, stage in zip(axes_of_row, of_stages, STAGES):
            title = f"{stage.capitalize()}: mean {mean.mean():.4f}"
            image = plots.heatmap(ax, mean, title, of_stages.min(), of_stages.max(), "", "")
            ax.set_aspect("equal")
        fig.colorbar(image, ax=axes_of_row, label=bar_label, aspect=18)
    fig.suptitle(
        f"{label}: attention to each patch ({pool.replace('_', '-')} over layers and heads)\n"
        f"n = {n}, {CHOSEN[chosen]}",
        fontsize=11,
    )
    fig.supxlabel("patch column", fontsize=10)
    fig.supylabel("patch row", fontsize=10)
    return fig

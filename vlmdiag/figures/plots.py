"""One figure style for the whole project: colours, bands, heatmaps, and files with reproducible
bytes that carry their settings.

Figures are drawn without a window; a script with --show calls use_windows() before it makes its
figure.
"""

import csv
import io
import json
import os
import unicodedata
import zlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk

plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "font.size": 10,
        "axes.titlesize": 10.5,
        "legend.fontsize": 8.5,
        "legend.framealpha": 0.85,
        "lines.linewidth": 1.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.xmargin": 0.02,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "image.cmap": "viridis",
    }
)

# Okabe and Ito's colour-blind-safe palette (its yellow darkened to be seen on white), then three
# that keep apart from it in lightness.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#B8A800",
)
CYCLE = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, "#332288", "#661100", "#7F7F7F"]
GROUP_COLORS = {
    "bos": "#999999",
    "system": PURPLE,
    "vision": BLUE,
    "image_markup": SKY,
    "user": ORANGE,
    "template": YELLOW,
    "generated": GREEN,
    "pad": "#DDDDDD",
}
MODEL_COLORS = {
    "normWmean": VERMILION,
    "multilayerNorm": GREEN,
    "tiny-llava": BLUE,
    "llava-v1.5-7b": BLUE,
}  # by the end of the model's name
MISSING = "#BBBBBB"  # cells that were not measured
EVEN_COLOR = "#555555"  # reference lines: chance, zero
BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"  # drawn for a line break


def visible(text):
    """Text on one line: line breaks as arrows; other control characters, and those that turn the
    direction of what follows, as boxes."""
    shown = {
        c: "\N{WHITE SQUARE}"
        for c in text
        if unicodedata.category(c) == "Cc"
        or unicodedata.bidirectional(c)[:2] in ("LR", "RL", "PD", "FS")
    }
    return "".join((shown | dict.fromkeys("\n\u2028\u2029", BREAK)).get(c, c) for c in text)


def drawable(text):
    """visible(text) with a box for each character that the figures' font lacks."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in visible(text))


def _preferred_color(label):
    """The fixed colour of a known model, else one drawn from the label itself, so that no figure's
    other labels have a say in it."""
    name = label.split("__")[0].split(" (")[0]
    fixed = [color for ending, color in MODEL_COLORS.items() if name.endswith(ending)]
    return (fixed or [CYCLE[zlib.crc32(name.encode()) % len(CYCLE)]])[0], bool(fixed)


def color_of(label):
    """The colour of a token group or of a model's label, the same in every figure."""
    return GROUP_COLORS.get(label) or _preferred_color(label)[0]


def model_colors(labels):
    """{label: colour} for the runs of one figure. Each label keeps color_of(label) unless another
    label of the figure has it; who gives way does not depend on the order of the labels: known
    models first, then the alphabet. Beyond ten labels colours repeat.
    """
    colors = {}
    for label in sorted(set(labels), key=lambda name: (not _preferred_color(name)[1], name)):
        free = [color for color in CYCLE if color not in colors.values()]
        wanted = _preferred_color(label)[0]
        colors[label] = wanted if wanted in free or not free else free[0]
    return {label: colors[label] for label in labels}


# ---- which runs and images a figure shows ----


def run_labels(runs):
    """One label a run: its own, whatever the order of the arguments; runs of one name in several
    folders are told apart by the folder."""
    labels = [run.label for run in runs]
    labels = [
        f"{label}, {run.path.parent}" if labels.count(label) > 1 else label
        for label, run in zip(labels, runs)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"the run {label} is given more than once")
    return labels


def select_runs(runs, models):
    """The runs that --models names, in that order: by folder name, label or model name. For None
    all of them, sorted by label."""
    if models is None:
        return sorted(runs, key=lambda run: run.label)
    chosen = []
    for model in models:
        found = [
            run
            for run in runs
            if model in (run.path.name, run.path.name.split("__sp-")[0], run.label)
        ]
        if not found or found[0] in chosen:
            what = "is named twice" if found else "is not among the runs"
            raise UsageError(
                f"--models {model} {what}; there are"
                f" {', '.join(run.path.name.split('__sp-')[0] for run in runs)}"
            )
        chosen.append(found[0])
    return chosen


def read_arrays(run, keys, advice):
    """run.stack(keys), or a UsageError with the advice that says how to make what the run lacks."""
    ids = run.ids()
    if not ids:
        raise UsageError(
            f"{run.path} has no finished image yet; run the command that makes it again"
        )
    missing = sorted(set(keys) - set(run.arrays(ids[0])))
    if missing:
        raise UsageError(f"{run.path} has no {', '.join(missing)}; {advice}")
    return run.stack(keys)


def comparison_path(runs, name):
    """Where a figure that compares runs goes: beside the first of them, '<name>_sp1' if none of
    them had a system prompt."""
    return Path(os.path.abspath(runs[0].path)).parent / (
        name + "_sp1" * all(str(run.path).endswith("__sp-1") for run in runs)
    )


def shared_ids(runs, ids):
    """The sorted item ids that every run has. ids: one list a run. UsageError if there are none."""
    shared = sorted(set(ids[0]).intersection(*ids[1:]))
    if not shared:
        raise UsageError(
            f"no image was measured in all of {', '.join(run.label for run in runs)}; select fewer"
            " with --models or measure the same images"
        )
    return shared


def find_id(ids, image_key=None, npz_basename=None):
    """The one id that --npz_basename names exactly or --image_key is a part of; an id that equals
    the key wins. UsageError lists a few where it is not one."""
    key = npz_basename.removesuffix(".npz") if npz_basename else image_key
    found = [id for id in ids if id == key] or (
        [] if npz_basename else [id for id in ids if key in id]
    )
    if len(found) == 1:
        return found[0]
    few = ", ".join((found or ids)[:5]) + (", ..." if len(found or ids) > 5 else "")
    flag = "--npz_basename" if npz_basename else "--image_key"
    raise UsageError(
        f"{flag} {key!r} fits {len(found)} of the {len(ids)} images that all shown runs have; give"
        f" one of: {few}"
    )


# ---- drawing ----


def with_n(label, n):
    """'label (n = 20)', or the smallest and largest n where cells differ; cells that nothing was
    measured in do not count."""
    n = np.asarray(n)[np.asarray(n) > 0]
    return (
        f"{label} (n = 0)"
        if not n.size
        else (
            f"{label} (n = {n.min()})"
            if n.min() == n.max()
            else f"{label} (n = {n.min()} to {n.max()})"
        )
    )


def line_with_band(ax, x, interval, label, color, **line):
    """A mean with its interval as a band, n in the legend. x (K,), interval of shape (K,); no band
    where there is one image only."""
    (drawn,) = ax.plot(x, interval.mean, color=color, label=with_n(label, interval.n), **line)
    ax.fill_between(x, interval.low, interval.high, color=color, alpha=0.2, linewidth=0)
    layer_ticks(ax)
    return drawn


def layer_ticks(ax):
    """Whole numbers on the x axis: there is no layer 2.5."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def legends(axes, titles=None, below=None):
    """The legends of a row of axes: inside while they are small, else below the axes, for which the
    figure grows. titles: one each; below decides itself."""
    entries = [len(ax.get_legend_handles_labels()[0]) for ax in axes]
    longest = max(len(label) for ax in axes for label in ax.get_legend_handles_labels()[1])
    below = max(entries) > 5 or longest > 48 if below is None else below
    if below:
        fig = axes[0].figure
        fig.set_figheight(fig.get_figheight() + 0.25 + 0.19 * (max(entries) + bool(titles)))
    for ax, title in zip(axes, titles or [None] * len(axes)):
        place = (
            {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False} if below else {}
        )
        if below:  # under the axis label, whatever the height of the axes
            place["bbox_transform"] = ax.transAxes + ScaledTranslation(
                0, -46 / 72, ax.figure.dpi_scale_trans
            )
        ax.legend(title=title, title_fontsize=8.5, **place)


def heatmap(ax, matrix, title, vmin=None, vmax=None, xlabel="head", ylabel="layer", cmap=None):
    """A matrix as coloured cells, row 0 at the top, NaN in grey. matrix (rows, columns) -> the
    image, to hang a colour bar on."""
    colors = plt.get_cmap(cmap).with_extremes(bad=MISSING)
    image = ax.imshow(
        np.ma.masked_invalid(matrix),
        vmin=vmin,
        vmax=vmax,
        cmap=colors,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return image


def use_windows():
    """Draw the figures that follow on the screen's toolkit, for --show."""
    for backend in (
        os.environ.get("MPLBACKEND", ""),
        "macosx",
        "qtagg",
        "gtk4agg",
        "gtk3agg",
        "tkagg",
        "wxagg",
    ):
        if backend and backend.lower() != "agg":
            try:
                return plt.switch_backend(backend)
            except (
                ImportError,
                ValueError,
            ):  # toolkit not installed, no screen, or an unknown name
                continue
    raise UsageError(
        "--show: no window can be opened here (no screen or no toolkit); leave it out and look at"
        " the files"
    )


# ---- files ----


def save(fig, path, settings, show=False, quiet=False):
    """Write a figure as PNG and PDF and print both paths unless quiet; path may end in .png, in
    .pdf or in neither. Then close it, or show it first.

    settings: dict, written as JSON into the PNG's text field "settings" and the PDF's Subject. The
    bytes depend on the figure and the settings only.
    """
    stem = _stem(path)
    text = json.dumps(settings, sort_keys=True, default=str)
    written = [Path(f"{stem}.png"), Path(f"{stem}.pdf")]
    metadata = [
        {"Software": None, "Title": stem.name, "settings": text},
        {"Title": stem.name, "Subject": text, "CreationDate": None, "ModDate": None},
    ]
    for file, fields in zip(written, metadata):
        buffer = io.BytesIO()
        fig.savefig(buffer, format=file.suffix[1:], metadata=fields)
        write_file(file, buffer.getvalue(), quiet)
    if show:
        plt.show()
    plt.close(fig)
    return written


def save_csv(path, columns, quiet=False):
    """Write {column name: values (K,)} as CSV with all digits and print the path unless quiet. A
    shorter column and a NaN leave their cells empty."""
    columns = {name: list(values) for name, values in columns.items()}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(columns)
    for row in range(max(map(len, columns.values()), default=0)):
        cells = [values[row] if row < len(values) else "" for values in columns.values()]
        rows.writerow(
            "" if isinstance(cell, (float, np.floating)) and np.isnan(cell) else cell
            for cell in cells
        )
    write_file(path, text.getvalue().encode(), quiet)
    return Path(path)


def write_file(path, data, quiet=False):
    """Write bytes in one step, with the folder, and print the path unless quiet; UsageError where
    that cannot be."""
    disk.write_bytes(path, data)
    if not quiet:
        print(f"wrote {path}")


def _stem(path):
    """A path without its .png or .pdf; a dot within a name such as llava-v1.5-7b stays."""
    path = Path(path)
    if path.suffix.lower() in (
        ".svg",
        ".eps",
        ".ps",
        ".jpg",
        ".jpeg",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".bmp",
    ):
        raise UsageError(
            f"{path}: figures are written as PNG and PDF; end the name in .png or .pdf, or in"
            " neither"
        )
    return path.with_suffix("") if path.suffix.lower() in (".png", ".pdf") else path

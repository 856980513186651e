"""One figure style for the whole project: colours, bands, heatmaps, and files with reproducible
bytes that carry their settings.

Figures are drawn without a window; a script with --show calls use_windows() before it makes its
figure.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from vlmdiag.cli import UsageError
from vlmdiag.figures.layers import LAYER_AXIS
from vlmdiag.runs import disk
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from numpy.typing import ArrayLike

    from vlmdiag.figures.stats import Interval

plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "savefig.dpi": 200,
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
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
YELLOW = "#B8A800"
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
# by the end of the model's name
MODEL_COLORS = {
    "normWmean": VERMILION,
    "multilayerNorm": GREEN,
    "tiny-llava": BLUE,
    "llava-v1.5-7b": BLUE,
}
MISSING = "#BBBBBB"  # cells that were not measured
NO_VALUE = "no value, as in layers without attention"
EVEN_COLOR = "#555555"  # reference lines: chance, zero
BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"  # drawn for a line break
BOX = "\N{WHITE SQUARE}"  # drawn for a character that cannot be


def visible(text: str) -> str:
    """Text on one line: line breaks as arrows; other control characters, and those that turn the
    direction of what follows, as boxes."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\u2028\u2029":
        return BREAK
    turns = unicodedata.bidirectional(character)[:2] in ("LR", "RL", "PD", "FS")
    return BOX if turns or unicodedata.category(character) == "Cc" else character


def drawable(text: str) -> str:
    """visible(text) with a box for each character that the figures' font lacks."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else BOX for c in visible(text))


def _fixed_color(name: str) -> str | None:
    """The colour of a known model."""
    return next((color for ending, color in MODEL_COLORS.items() if name.endswith(ending)), None)


def _preferred_color(label: str) -> str:
    """The fixed colour of a known model, else one drawn from the label itself, so that no figure's
    other labels have a say in it."""
    name = _model_of(label)
    return _fixed_color(name) or CYCLE[zlib.crc32(name.encode()) % len(CYCLE)]


def _model_of(label: str) -> str:
    return label.split("__")[0].split(" (")[0]


def color_of(label: str) -> str:
    """The colour of a token group or of a model's label, the same in every figure."""
    return GROUP_COLORS.get(label) or _preferred_color(label)


def model_colors(labels: Iterable[str]) -> dict[str, str]:
    """{label: colour} for the runs of one figure. Each label keeps color_of(label) unless another
    label of the figure has it; who gives way does not depend on the order of the labels: known
    models first, then the alphabet. Beyond ten labels colours repeat.
    """
    labels = list(labels)
    colors: dict[str, str] = {}
    for label in sorted(set(labels), key=lambda name: (not _fixed_color(_model_of(name)), name)):
        free = [color for color in CYCLE if color not in colors.values()]
        wanted = _preferred_color(label)
        colors[label] = wanted if wanted in free or not free else free[0]
    return {label: colors[label] for label in labels}


# ---- drawing ----


def with_n(label: str, n: ArrayLike) -> str:
    """'label (n = 20)', or the smallest and largest n where cells differ; cells that nothing was
    measured in do not count."""
    counts = np.asarray(n)
    counts = counts[counts > 0]
    if not counts.size:
        return f"{label} (n = 0)"
    if counts.min() == counts.max():
        return f"{label} (n = {counts.min()})"
    return f"{label} (n = {counts.min()} to {counts.max()})"


def line_with_band(
    ax: Axes, x: ArrayLike, interval: Interval, label: str, color: str, **line: Any
) -> Line2D:
    """A mean with its interval as a band, n in the legend. x (K,), interval of shape (K,); no band
    where there is one image only. What has no value, such as a layer without attention, is left out
    as in line_of()."""
    (mean,) = line_of(ax, x, interval.mean, color=color, label=with_n(label, interval.n), **line)
    has_value = np.isfinite(interval.mean) | ~np.isfinite(interval.mean).any()
    low, high = (np.asarray(end)[has_value] for end in (interval.low, interval.high))
    ax.fill_between(np.asarray(x)[has_value], low, high, color=color, alpha=0.2, linewidth=0)
    layer_ticks(ax)
    return mean


def line_of(ax: Axes, x: ArrayLike, values: ArrayLike, **line: Any) -> list[Line2D]:
    """A line through the values (K,) that there are. Where some are missing, as in layers without
    attention, those that are there get a dot each and the others a grey strip."""
    places = np.asarray(x)
    numbers = np.asarray(values, float)
    missing = ~np.isfinite(numbers)
    if missing.any() and not missing.all():
        for place in places[missing]:
            ax.axvspan(place - 0.5, place + 0.5, color=MISSING, alpha=0.4, linewidth=0, zorder=0)
        ax.set_xlim(places.min() - 0.5, places.max() + 0.5)
        places, numbers = places[~missing], numbers[~missing]
        line = {"marker": "o", "markersize": 4, **line}
        if NO_VALUE not in ax.get_legend_handles_labels()[1]:
            ax.fill_between([], [], [], color=MISSING, alpha=0.4, label=NO_VALUE)
    return ax.plot(places, numbers, **line)


def layer_ticks(ax: Axes) -> None:
    """Whole numbers on the x axis: there is no layer 2.5."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def legends(
    axes: Sequence[Axes], titles: Sequence[str | None] | None = None, below: bool | None = None
) -> None:
    """The legends of a row of axes: inside while they are small, else below the axes, for which the
    figure grows. titles: one each; below decides itself."""
    labels = [ax.get_legend_handles_labels()[1] for ax in axes]
    entries = max(map(len, labels))
    longest = max(len(label) for of_axis in labels for label in of_axis)
    if below is None:
        below = entries > 5 or longest > 48
    if below:
        figure = axes[0].get_figure(root=True)
        assert figure is not None  # they are drawn
        rows = entries + 1 if titles else entries
        figure.set_figheight(figure.get_figheight() + 0.25 + 0.19 * rows)
    for ax, title in zip(axes, titles or [None] * len(axes)):
        place: Record = {}
        if below:  # under the axis label, whatever the height of the axes
            down = ScaledTranslation(0, -46 / 72, ax.figure.dpi_scale_trans)
            place = {
                "loc": "upper center",
                "bbox_to_anchor": (0.5, 0),
                "bbox_transform": ax.transAxes + down,
                "frameon": False,
            }
        ax.legend(title=title, title_fontsize=8.5, **place)


def heatmap(
    ax: Axes,
    matrix: Float[np.ndarray, "rows columns"],
    title: str,
    vmin: float | None = None,
    vmax: float | None = None,
    xlabel: str = "head",
    ylabel: str = LAYER_AXIS,
    cmap: str | None = None,
) -> AxesImage:
    """A matrix as coloured cells, row 0 at the top, NaN in grey. Returns the image, to hang a
    colour bar on."""
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


def use_windows() -> None:
    """Draw the figures that follow on the screen's toolkit, for --show. UsageError where there is
    none."""
    chosen = os.environ.get("MPLBACKEND", "")
    for backend in (chosen, "macosx", "qtagg", "gtk4agg", "gtk3agg", "tkagg", "wxagg"):
        if not backend or backend.lower() == "agg":
            continue
        try:
            plt.switch_backend(backend)
        except (ImportError, ValueError):  # toolkit not installed, no screen, or an unknown name
            continue
        return
    raise UsageError(
        "--show: no window can be opened here (no screen or no toolkit); leave it out and look at"
        " the files"
    )


# ---- files ----


def save(
    fig: Figure, path: str | Path, settings: Fields, show: bool = False, quiet: bool = False
) -> list[Path]:
    """Write a figure as PNG and PDF and print both paths unless quiet; path may end in .png, in
    .pdf or in neither. Then close it, or show it first.

    settings: written as JSON into the PNG's text field "settings" and the PDF's Subject. The bytes
    depend on the figure and the settings only. UsageError for another ending, or where the files
    cannot be written.
    """
    stem = _stem(path)
    text = json.dumps(settings, sort_keys=True, default=str)
    files: dict[str, dict[str, str | None]] = {
        "png": {"Software": None, "Title": stem.name, "settings": text},
        "pdf": {"Title": stem.name, "Subject": text, "CreationDate": None, "ModDate": None},
    }
    written = []
    for ending, metadata in files.items():
        buffer = io.BytesIO()
        fig.savefig(buffer, format=ending, metadata=metadata)
        written.append(Path(f"{stem}.{ending}"))
        write_file(written[-1], buffer.getvalue(), quiet)
    if show:
        plt.show()
    plt.close(fig)
    return written


def save_csv(
    path: str | Path, columns: Mapping[str, Iterable[object]], quiet: bool = False
) -> Path:
    """Write {column name: values (K,)} as CSV with all digits and print the path unless quiet. A
    shorter column and a NaN leave their cells empty."""
    lists = {name: list(values) for name, values in columns.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(lists)
    for row in range(max(map(len, lists.values()), default=0)):
        writer.writerow(_cell(values, row) for values in lists.values())
    write_file(path, text.getvalue().encode(), quiet)
    return Path(path)


def _cell(values: Sequence[object], row: int) -> object:
    """A value of a column, empty past its end and for NaN."""
    value = values[row] if row < len(values) else ""
    if isinstance(value, np.ndarray):
        value = value[()]  # of shape ()
    is_nan = isinstance(value, (float, np.floating)) and np.isnan(value)
    return "" if is_nan else value


def write_file(path: str | Path, data: bytes, quiet: bool = False) -> None:
    """Write bytes in one step, with the folder, and print the path unless quiet; UsageError where
    that cannot be."""
    disk.write_bytes(path, data)
    if not quiet:
        print(f"wrote {path}")


OTHER_FORMATS = (".svg", ".eps", ".ps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".gif", ".bmp")


def _stem(path: str | Path) -> Path:
    """A path without its .png or .pdf; a dot within a name such as llava-v1.5-7b stays."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending in OTHER_FORMATS:
        raise UsageError(
            f"{path}: figures are written as PNG and PDF; end the name in .png or .pdf, or in"
            " neither"
        )
    return path.with_suffix("") if ending in (".png", ".pdf") else path

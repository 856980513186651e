"""Figures of the llava-interp scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vlmdiag.figures import plots
from vlmdiag.figures.layers import OUTPUT_AXIS, mean_state_name, state_tick
from vlmdiag.figures.stats import Interval
from vlmdiag.interp.summary import is_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.interp.summary import Effects

SETTING_COLORS = {"generative": plots.BLUE, "polling": plots.ORANGE, "vqa": plots.GREEN}
MOST_WINDOWS = 12  # whose cells have room for their numbers


def draw_lens_accuracy(
    label: str, curves: Mapping[str, Interval], chosen: Mapping[str, tuple[Interval, float]]
) -> Figure:
    """Share of object patches whose top-1 token names the object, by the layer that was read.

    curves: own, shuffled, elsewhere, intervals of shape (L + 1,); chosen: what the ways to choose a
    layer give, with its hidden state (lens_curves.best_layers()).
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    lines = {
        "own": ("object's own name", plots.BLUE),
        "shuffled": ("another picture's name", plots.ORANGE),
        "elsewhere": ("own name, other patches", plots.EVEN_COLOR),
    }
    for name, (words, color) in lines.items():
        states = np.arange(len(curves[name].mean))
        plots.line_with_band(axis, states, curves[name], words, color)
    interval, state = chosen["cross_fitted"]
    axis.axhline(
        interval.mean,
        color=plots.GREEN,
        linestyle="--",
        linewidth=1.2,
        label=f"best layer, cross-fitted: {interval.mean:.2f} ({mean_state_name(state)})",
    )
    interval, _ = chosen["per_picture"]
    axis.axhline(
        interval.mean,
        color=plots.VERMILION,
        linestyle=":",
        linewidth=1.2,
        label=f"best layer of each picture, as published: {interval.mean:.2f}",
    )
    axis.set(title=f"Logit lens on object patches: {label}", xlabel=OUTPUT_AXIS, ylim=(-0.02, 1.02))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda state, _: state_tick(round(state))))
    axis.set_ylabel("share of object patches whose\ntop-1 token names the object")
    plots.legends([axis])
    return figure


# --- token ablation -------------------------------------------------------------------------------

Ablations = Mapping[str, Mapping[str, "Effects"]]  # run -> setting -> effects


def draw_ablation(runs: Ablations) -> Figure:
    """Bars with intervals, one panel a run: conditions that are no plain count, those with the
    fewest tokens first, by setting."""
    heights = [1.5 + 0.34 * len(_in_order(settings)) for settings in runs.values()]
    figure, axes = plt.subplots(
        len(runs), 1, figsize=(9, sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, (label, settings) in zip(axes[:, 0], runs.items()):
        of_first = next(iter(settings.values()))
        names = _in_order(settings)
        height = 0.8 / len(settings)
        for k, (setting, effects) in enumerate(settings.items()):
            shares = [effects[name].destroyed for name in names]
            means = np.array([share.mean for share in shares])
            below = means - [share.low for share in shares]
            above = [share.high for share in shares] - means
            axis.barh(
                np.arange(len(names)) + (k - (len(settings) - 1) / 2) * height,
                means,
                height,
                xerr=np.clip([below, above], 0, None),
                color=SETTING_COLORS[setting],
                label=plots.with_n(setting, [share.n for share in shares]),
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        rows = [f"{condition_words(name)} ({of_first[name].tokens:.0f} tokens)" for name in names]
        axis.set_yticks(range(len(names)), rows, fontsize=9)
        axis.set(
            title=f"Token ablation: {label}",
            xlabel="destroyed share of the answers that were right\n(95 % interval over pictures)",
            xlim=(0, 1.02),
            ylim=(len(names) - 0.4, -0.6),
        )
        axis.grid(axis="y", visible=False)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _in_order(settings: Mapping[str, Effects]) -> list[str]:
    """The conditions that are no plain count, by their number of tokens; behind the object the sets
    of as many tokens that it is compared with."""
    effects = next(iter(settings.values()))

    def place(name: str) -> tuple[float, int]:
        matched = f"patch_{name[-1]}" if "_matched_" in name else name
        return effects.get(matched, effects[name]).tokens, KINDS.index(_kind(name))

    return sorted((name for name in effects if not is_count(name)), key=place)


KINDS = ("register", "patch", "gradient", "blob", "random", "all")


def _kind(name: str) -> str:
    return name.split("_")[0]


def condition_words(name: str) -> str:
    """What a condition of conditions.py replaces: 'object and 1 patch around it' of patch_1."""
    words = {
        "patch_0": "object",
        "patch_1": "object and 1 patch around it",
        "patch_2": "object and 2 patches around it",
        "gradient": "as many, highest gradient",
        "blob": "as many, one piece elsewhere",
        "random": "as many, at random elsewhere",
        "register": "register tokens (outlying norm)",
        "all": "all tokens of the picture",
    }
    return words.get(name) or words[_kind(name)]


def has_counts(runs: Ablations) -> bool:
    """Whether any condition is a given number of tokens."""
    all_effects = [effects for settings in runs.values() for effects in settings.values()]
    return any(is_count(name) for effects in all_effects for name in effects)


def draw_counts(runs: Ablations) -> Figure:
    """Destroyed share over the number of tokens, gradient against random, with the object's own
    sets as points; one panel a run."""
    figure, axes = plt.subplots(1, len(runs), figsize=(6.5 * len(runs), 4.6), squeeze=False)
    for axis, (label, settings) in zip(axes[0], runs.items()):
        for k, (setting, effects) in enumerate(settings.items()):
            _draw_counts_of(axis, setting, effects, 1.04 ** (k - (len(settings) - 1) / 2))
        axis.set(
            title=f"Token ablation by number of tokens: {label}",
            xlabel="ablated tokens (log scale)",
            ylabel="destroyed share, 95 % interval over pictures",
            xscale="log",
            ylim=(-0.02, 1.02),
        )
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    plots.legends(list(axes[0]), below=True)
    return figure


def _draw_counts_of(axis: Axes, setting: str, effects: Effects, aside: float) -> None:
    """The curves of one setting; its points stand aside by a factor, so that none hides another."""
    color = SETTING_COLORS[setting]
    for kind, line in (("gradient", "-"), ("random", "--")):
        of_kind = [
            effects[name] for name in effects if is_count(name) and name.startswith(f"{kind}_")
        ]
        if of_kind:
            shares = [effect.destroyed for effect in of_kind]
            fields = [[getattr(share, name) for share in shares] for name in Interval._fields]
            curve = Interval(*(np.array(numbers) for numbers in fields))
            tokens = [effect.tokens for effect in of_kind]
            plots.line_with_band(axis, tokens, curve, f"{setting}, {kind}", color, linestyle=line)
    patches = [effect for name, effect in effects.items() if name.startswith("patch_")]
    means = np.array([effect.destroyed.mean for effect in patches])
    ends = np.array([(effect.destroyed.low, effect.destroyed.high) for effect in patches])
    axis.errorbar(
        [aside * effect.tokens for effect in patches],
        means,
        yerr=np.clip([means - ends[:, 0], ends[:, 1] - means], 0, None) if patches else None,
        fmt="D",
        color=color,
        markerfacecolor="white",
        capsize=2.5,
        elinewidth=1,
        zorder=3,
        label=f"{setting}, object with 0 to 2 patches around it",
    )


# --- attention knockout ---------------------------------------------------------------------------


PLACES = {
    "object": "object",
    "object+1": "object and 1 patch around it",
    "object+2": "object and 2 patches around it",
    "other": "other patches",
    "image": "image",
    "image-last_row": "image without its last row",
    "last_row": "last row of the image",
    "question": "question",
    "template": "role strings",
    "last_token": "last token",
}


def draw_knockout(
    runs: Mapping[str, Effects], windows: Mapping[str, Mapping[str, list[int]]]
) -> Figure:
    """Relative accuracy with its interval, pairs x windows, one panel a run. windows {run: {window:
    (first, last)}}."""
    keys = [key.split(":", 2) for effects in runs.values() for key in effects]
    pairs = list(dict.fromkeys((source, target) for source, target, _ in keys))
    names = list(dict.fromkeys(window for _, _, window in keys))
    has_room = len(names) <= MOST_WINDOWS
    height = 1.6 + 0.52 * len(pairs)
    width = max(8.0, 3.4 + 1.15 * len(names)) if has_room else 8 + 0.2 * len(names)
    figure, axes = plt.subplots(len(runs), 1, figsize=(width, height * len(runs)), squeeze=False)
    for axis, (label, effects) in zip(axes[:, 0], runs.items()):
        matrix = np.full((len(pairs), len(names)), np.nan)
        texts = np.full(matrix.shape, "", dtype=object)
        for row, (source, target) in enumerate(pairs):
            for column, window in enumerate(names):
                effect = effects.get(f"{source}:{target}:{window}")
                if effect is not None:
                    mean, low, high, _ = effect.relative_accuracy
                    matrix[row, column] = mean
                    texts[row, column] = f"{mean:.2f}\n{low:.2f} to {high:.2f}"
        n = plots.with_n(label, [effect.relative_accuracy.n for effect in effects.values()])
        ticks = names
        if has_room:
            ends = [windows[label][window] for window in names]
            spans = [f"{first}-{last}" for first, last in ends]
            called = [window.replace("_", "-") for window in names]
            # a window of its own has its ends as its name
            ticks = [f"{a}\n{b}" if a != b else a for a, b in zip(called, spans, strict=True)]
        seaborn.heatmap(
            matrix,
            vmin=0,
            vmax=1,
            cmap="viridis",
            annot=texts if has_room else False,
            fmt="",
            annot_kws={"fontsize": 7.5},
            ax=axis,
            xticklabels=ticks,
            yticklabels=[f"{PLACES[a]} \u2192 {PLACES[b]}" for a, b in pairs],
            cbar_kws={"label": "share that stays right"},
        )
        axis.set_xticklabels(ticks, rotation=0 if has_room else 90)
        axis.set_facecolor(plots.MISSING)
        axis.grid(False)
        what = ", 95 % intervals" if has_room else ""
        axis.set(
            title=f"Accuracy under attention knockout: {n}{what}",
            xlabel="layers in which attention is cut, from 0",
            ylabel="hidden keys \u2192\nrows that do not see them",
        )
    return figure

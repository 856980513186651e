"""Figures of the llava-interp scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
    """Bars with intervals, one panel a run: conditions that are no plain count, by setting."""
    figure, axes = plt.subplots(len(runs), 1, figsize=(11, 4.2 * len(runs)), squeeze=False)
    for axis, (label, settings) in zip(axes[:, 0], runs.items()):
        of_first = next(iter(settings.values()))
        names = [name for name in of_first if not is_count(name)]
        width = 0.8 / len(settings)
        for k, (setting, effects) in enumerate(settings.items()):
            shares = [effects[name].destroyed for name in names]
            means = np.array([share.mean for share in shares])
            below = means - [share.low for share in shares]
            above = [share.high for share in shares] - means
            axis.bar(
                np.arange(len(names)) + (k - (len(settings) - 1) / 2) * width,
                means,
                width,
                yerr=np.clip([below, above], 0, None),
                color=SETTING_COLORS[setting],
                label=plots.with_n(setting, [share.n for share in shares]),
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        ticks = [
            f"{name.replace('_', ' ')}\n({of_first[name].tokens:.0f} tokens)" for name in names
        ]
        axis.set_xticks(np.arange(len(names)), ticks, rotation=45, ha="right", fontsize=8)
        axis.set(
            title=f"Token ablation: {label}",
            ylabel="destroyed share of the\ninitially correct answers",
            ylim=(0, 1.2),
        )
        axis.legend(loc="upper right", ncols=2)
    return figure


def has_counts(runs: Ablations) -> bool:
    """Whether any condition is a given number of tokens."""
    all_effects = [effects for settings in runs.values() for effects in settings.values()]
    return any(is_count(name) for effects in all_effects for name in effects)


def draw_counts(runs: Ablations) -> Figure:
    """Destroyed share over the number of tokens, gradient against random, with the object's own
    sets as points; one panel a run."""
    figure, axes = plt.subplots(1, len(runs), figsize=(6.5 * len(runs), 4.6), squeeze=False)
    for axis, (label, settings) in zip(axes[0], runs.items()):
        for setting, effects in settings.items():
            _draw_counts_of(axis, setting, effects)
        axis.set(
            title=f"Token ablation by number of tokens: {label}",
            xlabel="ablated tokens",
            ylabel="destroyed share",
            ylim=(-0.02, 1.05),
        )
    plots.legends(list(axes[0]), below=True)
    return figure


def _draw_counts_of(axis: Axes, setting: str, effects: Effects) -> None:
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
    axis.scatter(
        [effect.tokens for effect in patches],
        [effect.destroyed.mean for effect in patches],
        color=color,
        marker="D",
        zorder=3,
        label=f"{setting}, object with 0 to 2 buffers",
    )


# --- attention knockout ---------------------------------------------------------------------------


def draw_knockout(
    runs: Mapping[str, Effects], windows: Mapping[str, Mapping[str, list[int]]]
) -> Figure:
    """Relative accuracy, pairs x windows, one panel a run. windows {run: {window: (first,
    last)}}."""
    keys = [key.split(":", 2) for effects in runs.values() for key in effects]
    pairs = list(dict.fromkeys((source, target) for source, target, _ in keys))
    names = list(dict.fromkeys(window for _, _, window in keys))
    height = 1.6 + 0.5 * len(pairs)
    width = max(7.0, 1.5 + 1.1 * len(names))
    has_room = len(names) <= MOST_WINDOWS
    figure, axes = plt.subplots(len(runs), 1, figsize=(width, height * len(runs)), squeeze=False)
    for axis, (label, effects) in zip(axes[:, 0], runs.items()):
        matrix = np.full((len(pairs), len(names)), np.nan)
        for row, (source, target) in enumerate(pairs):
            for column, window in enumerate(names):
                effect = effects.get(f"{source}:{target}:{window}")
                if effect is not None:
                    matrix[row, column] = effect.relative_accuracy.mean
        n = plots.with_n(label, [effect.relative_accuracy.n for effect in effects.values()])
        ticks = names
        if has_room:
            ends = [windows[label][window] for window in names]
            ticks = [
                f"{window.replace('_', '-')}\n{first}-{last}"
                for window, (first, last) in zip(names, ends)
            ]
        seaborn.heatmap(
            matrix,
            vmin=0,
            vmax=1,
            cmap="viridis",
            annot=has_room,
            fmt=".2f",
            ax=axis,
            xticklabels=ticks,
            yticklabels=[f"{a} \u2192 {b}".replace("_", " ") for a, b in pairs],
            cbar_kws={"label": "share that stays right"},
        )
        axis.set_xticklabels(ticks, rotation=0 if has_room else 90)
        axis.set_facecolor(plots.MISSING)
        axis.set(
            title=f"Accuracy under attention knockout: {n}",
            xlabel="layers in which attention is cut, from 0",
        )
    return figure

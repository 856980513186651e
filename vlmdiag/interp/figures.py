"""Figures of the llava-interp scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval


def draw_lens_accuracy(
    label: str, curves: Mapping[str, Interval], chosen: Mapping[str, tuple[Interval, float]]
) -> Figure:
    """Share of object patches whose top-1 token names the object, by hidden state.

    curves: own, shuffled, elsewhere, intervals of shape (L + 1,); chosen: what the ways to choose a
    layer give, with that layer (lens_measures.best_layers()).
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    lines = {
        "own": ("object's own name", plots.BLUE),
        "shuffled": ("another picture's name", plots.ORANGE),
        "elsewhere": ("own name, other patches", plots.EVEN_COLOR),
    }
    for name, (words, color) in lines.items():
        layers = np.arange(len(curves[name].mean))
        plots.line_with_band(axis, layers, curves[name], words, color)
    interval, layer = chosen["cross_fitted"]
    axis.axhline(
        interval.mean,
        color=plots.GREEN,
        linestyle="--",
        linewidth=1.2,
        label=f"best layer, cross-fitted: {interval.mean:.2f} (layer {layer:.3g})",
    )
    interval, _ = chosen["per_picture"]
    axis.axhline(
        interval.mean,
        color=plots.VERMILION,
        linestyle=":",
        linewidth=1.2,
        label=f"best layer of each picture, as published: {interval.mean:.2f}",
    )
    axis.set(
        title=f"Logit lens on object patches: {label}",
        xlabel="hidden state (0 = embeddings, l = after layer l)",
        ylim=(-0.02, 1.02),
    )
    axis.set_ylabel("share of object patches whose\ntop-1 token names the object")
    plots.legends([axis])
    return figure

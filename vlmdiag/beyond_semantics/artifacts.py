"""Figures of one image's measurements, as the published driver draws them with
--save_hidden_plots.

Beyond Semantics (arXiv 2503.17349); docs/studies/beyond_semantics.md, section 1.1.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots
from vlmdiag.figures.layers import LAYER_AXIS, STATE_AXIS
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.figure import Figure

# name in the arrays -> label in the figure, token group whose colour it has
NORMS = {
    "sys": ("system", "system"),
    "user_text": ("user text", "user"),
    "vision": ("vision", "vision"),
}
# share in the record -> label in the figure, token group whose colour it has
TWO_SHARES = {"vision": ("vision", "vision"), "text": ("user text", "user")}
THREE_SHARES = {
    "sys": ("system", "system"),
    "vision_withsys": ("vision", "vision"),
    "text_withsys": ("user text", "user"),
}


@dataclass(frozen=True)
class Curve:
    """One line of a figure. values: one a layer, hidden state or step."""

    label: str
    values: Sequence[float] | np.ndarray
    color: str


def draw_artifacts(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    grid: Float[np.ndarray, "states T"],
    record: Fields,
) -> None:
    """Write the figures and tables of one image.

    arrays, record: its NPZ and its JSON. grid: norm of every prompt position in each of the L + 1
    hidden states.
    """
    kind = record["hidden_norms"]["kind"]
    settings = {"image_id": record["image_id"], "prompt": record["prompt"]}
    norms = {name: arrays[f"hidden_norms_{name}"] for name in NORMS}
    states = np.arange(len(grid))
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"hidden_state_norms_{kind}"
    plots.write_file(Path(f"{stem}.npz"), _npz({"grid": grid} | norms), quiet=True)
    plots.save_csv(Path(f"{stem}.csv"), {"hidden_state": states} | norms, quiet=True)

    def save(figure: Figure, name: str) -> None:
        plots.save(figure, folder / name, settings, quiet=True)

    figure = curves_figure(
        f"Mean {kind} norm of hidden states, one image",
        STATE_AXIS,
        f"{kind} norm",
        states,
        curves_of(norms, NORMS),
    )
    save(figure, f"hidden_state_norms_{kind}_layerwise")
    save(norm_grid_figure(grid, kind, record), f"hidden_state_norms_{kind}_heatmap")

    steps = np.arange(record["n_steps"])
    for name, title, shares in (
        (
            "decode_time_modality_shares_system_masked",
            "Attention to vision and user text, of their sum",
            TWO_SHARES,
        ),
        (
            "decode_time_attention_totals_system_masked",
            "Attention to system, vision and user text, of their sum",
            THREE_SHARES,
        ),
    ):
        curves = curves_of(record["shares"], shares)
        save(curves_figure(title, "producing step", "share", steps, curves), name)

    head_share = arrays["head_vision_share"]
    figure = head_map_figure(head_share, "Vision share V / (V + U) per head, mean over steps")
    save(figure, "mean_vision_share_per_head_masked_heatmap")
    attends = ~np.isnan(head_share).all(1)  # (L,)
    of_layers = np.full(len(head_share), np.nan)
    of_layers[attends] = np.nanmean(head_share[attends], 1)
    mean_share = Curve("vision share", of_layers, plots.color_of("vision"))
    figure = curves_figure(
        "Vision share V / (V + U), mean over heads and steps",
        LAYER_AXIS,
        "share",
        np.arange(len(head_share)),
        [mean_share],
    )
    save(figure, "mean_vision_share_per_head_masked")

    mass = dict(zip(record["groups"], arrays["group_mass"], strict=True))
    total = mass["vision"] + mass["system"]
    undefined = np.full_like(total, np.nan)
    of_system = np.divide(mass["vision"], total, out=undefined, where=total > 0)
    figure = head_map_figure(of_system, "Vision share of vision + system per head")
    save(figure, "mean_sys_vision_share_per_head_masked_heatmap")


def curves_of(
    values: Mapping[str, Sequence[float] | np.ndarray], wanted: Mapping[str, tuple[str, str]]
) -> list[Curve]:
    """The wanted values as curves. wanted: {name: (label, token group)}."""
    return [
        Curve(label, values[name], plots.color_of(group)) for name, (label, group) in wanted.items()
    ]


def curves_figure(
    title: str, xlabel: str, ylabel: str, x: np.ndarray, curves: Sequence[Curve]
) -> Figure:
    """Lines over whole numbers x (K,); a line without any finite value is left out."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for curve in curves:
        values = np.asarray(curve.values, float)
        if np.isfinite(values).any():
            plots.line_of(axis, x, values, label=curve.label, color=curve.color)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    plots.layer_ticks(axis)
    if len(curves) > 1:
        axis.legend()
    return figure


def head_map_figure(matrix: Float[np.ndarray, "L H"], title: str) -> Figure:
    """A share of each layer and head, from 0 to 1."""
    figure, axis = plt.subplots(figsize=(6, 5))
    image = plots.heatmap(axis, matrix, title, 0, 1)
    figure.colorbar(image, label="share of attention")
    return figure


def norm_grid_figure(grid: Float[np.ndarray, "states T"], kind: str, record: Fields) -> Figure:
    """The norm of every prompt position in every hidden state, vision tokens marked."""
    figure, axis = plt.subplots(figsize=(8, 4))
    logs = np.log10(np.maximum(grid, 1e-12))
    image = axis.imshow(logs, aspect="auto", origin="lower", interpolation="nearest")
    for span in record["spans"].get("vision", []):
        for edge in span:
            axis.axvline(edge - 0.5, color="white", linestyle="--")
    axis.set(
        title=f"{kind} norm of hidden states, vision tokens between the dashed lines",
        xlabel="prompt position",
        ylabel=STATE_AXIS,
    )
    figure.colorbar(image, label="log10 norm")
    return figure


def _npz(arrays: Record) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()

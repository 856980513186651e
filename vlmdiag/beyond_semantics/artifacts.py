"""Figures of one image's measurements, as the published driver draws them with
--save_hidden_plots."""

import io

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots

CURVES = {
    "sys": ("system", "system"),
    "user_text": ("user text", "user"),
    "vision": ("vision", "vision"),
}


def draw_artifacts(folder, arrays, grid, record):
    """Write the figures and tables of one image. arrays: its NPZ; grid (L + 1, T): norm of every
    prompt position; record: its JSON."""
    kind, steps = record["hidden_norms"]["kind"], np.arange(record["n_steps"])
    settings = {"image_id": record["image_id"], "prompt": record["prompt"]}
    norms = {name: arrays[f"hidden_norms_{name}"] for name in CURVES}
    folder.mkdir(parents=True, exist_ok=True)
    plots.write_file(
        folder / f"hidden_state_norms_{kind}.npz", _npz({"grid": grid} | norms), quiet=True
    )
    plots.save_csv(
        folder / f"hidden_state_norms_{kind}.csv",
        {"layer": np.arange(len(grid))} | norms,
        quiet=True,
    )

    def curves(name, title, ylabel, x, lines, xlabel):
        figure, axis = plt.subplots(figsize=(7, 4))
        for label, values, color in lines:
            if np.isfinite(np.asarray(values, float)).any():
                axis.plot(x, np.asarray(values, float), label=label, color=color)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        plots.layer_ticks(axis)
        if len(lines) > 1:
            axis.legend()
        plots.save(figure, folder / name, settings, quiet=True)

    curves(
        f"hidden_state_norms_{kind}_layerwise",
        f"Mean {kind} norm of hidden states, one image",
        f"{kind} norm",
        np.arange(len(grid)),
        [(label, norms[name], plots.color_of(color)) for name, (label, color) in CURVES.items()],
        "hidden state (0 = embeddings)",
    )
    figure, axis = plt.subplots(figsize=(8, 4))
    image = axis.imshow(
        np.log10(np.maximum(grid, 1e-12)), aspect="auto", origin="lower", interpolation="nearest"
    )
    for start, end in record["spans"].get("vision", []):
        for edge in (start, end):
            axis.axvline(edge - 0.5, color="white", linestyle="--")
    axis.set(
        title=f"{kind} norm of hidden states, vision tokens between the dashed lines",
        xlabel="prompt position",
        ylabel="hidden state (0 = embeddings)",
    )
    figure.colorbar(image, label="log10 norm")
    plots.save(figure, folder / f"hidden_state_norms_{kind}_heatmap", settings, quiet=True)

    shares = record["shares"]
    two = [
        (name, shares[key], plots.color_of(color))
        for name, key, color in (("vision", "vision", "vision"), ("user text", "text", "user"))
    ]
    three = [
        (label, shares[key], plots.color_of(color))
        for label, key, color in (
            ("system", "sys", "system"),
            ("vision", "vision_withsys", "vision"),
            ("user text", "text_withsys", "user"),
        )
    ]
    curves(
        "decode_time_modality_shares_system_masked",
        "Attention to vision and user text, of their sum",
        "share",
        steps,
        two,
        "producing step",
    )
    curves(
        "decode_time_attention_totals_system_masked",
        "Attention to system, vision and user text, of their sum",
        "share",
        steps,
        three,
        "producing step",
    )
    figure, axis = plt.subplots(figsize=(6, 5))
    plots.heatmap(
        axis,
        arrays["head_vision_share"],
        "Vision share V / (V + U) per head, mean over steps",
        0,
        1,
    )
    plots.save(figure, folder / "mean_vision_share_per_head_masked_heatmap", settings, quiet=True)
    layers = np.arange(len(arrays["head_vision_share"]))
    share = [("vision share", np.nanmean(arrays["head_vision_share"], 1), plots.color_of("vision"))]
    curves(
        "mean_vision_share_per_head_masked",
        "Vision share V / (V + U), mean over heads and steps",
        "share",
        layers,
        share,
        "layer",
    )
    mass = dict(zip(record["groups"], arrays["group_mass"], strict=True))
    figure, axis = plt.subplots(figsize=(6, 5))
    total = mass["vision"] + mass["system"]
    plots.heatmap(
        axis,
        np.divide(mass["vision"], total, out=np.full_like(total, np.nan), where=total > 0),
        "Vision share of vision + system per head",
        0,
        1,
    )
    plots.save(
        figure, folder / "mean_sys_vision_share_per_head_masked_heatmap", settings, quiet=True
    )


def _npz(arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()

"""How much does attention to the image depend on where the image stands in the prompt?

Reads runs of run_coco_diagnostics.py, in which RoPE moved the keys of all vision tokens D positions
towards the query, in each layer for itself:
    delta_gv     = attention-weighted mean change of the vision logits, per position (signed)
    delta_alphaV = alpha_V after - alpha_V before, alpha_V = attention mass on the vision tokens
    (not divided by D)
Beyond Semantics (arXiv 2503.17349), figure 8.

    python analyze_coco_diagnostics.py \\
        --run_dir runs/llava-v1.5-7b__sp-0 runs/llava-v1.5-7b-multilayerNorm__sp-0

Per run, in <run>/analysis/: avg_alphaV.npy, avg_delta_gv.npy, avg_abs_delta_gv.npy (absolute value
per image, then the mean), avg_delta_alphaV.npy, avg_delta_gv_derivative.npy, each (L, H), and
summary.json. Beside the first run, as PNG and PDF: compare_abs_delta_gv_layerwise_mean and
compare_delta_alphaV_and_abs_delta_gv_layerwise_mean. Lines are means over heads, then images; bands
are bootstrap 95 % intervals over images.
"""

import json

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs

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


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", nargs="+", required=True, help="run directories of run_coco_diagnostics.py"
    )
    parser.add_argument(
        "--delta_steps",
        type=float,
        help="which of the run's shifts D to read, in token positions; None: the run's first",
    )
    parser.add_argument(
        "--save_csv", action="store_true", help="also write the plotted numbers as CSV"
    )
    return parser.parse_args(argv)


def read_probe(run, delta_steps):
    """One run's RoPE measurements at one shift -> (shift, {name: (n, L, H)}), NaN where a head
    gives the image no mass."""
    measured = [float(step) for step in run.meta["settings"].get("delta_steps") or ()]
    advice = "make them with run_coco_diagnostics.py --delta_steps on a model with rotary positions"
    _, arrays = plots.read_arrays(
        run, ["alphaV", "delta_gv_all", "delta_alphaV_all", "delta_gv_derivative"], advice
    )
    step = measured[0] if delta_steps is None else delta_steps
    if step not in measured:
        raise UsageError(
            f"--delta_steps {step:g}: {run.path} was measured with"
            f" {', '.join(f'{each:g}' for each in measured)}; choose one of these"
        )
    delta_gv, delta_alphaV = (
        arrays[key][:, measured.index(step)] for key in ("delta_gv_all", "delta_alphaV_all")
    )
    values = {
        "alphaV": arrays["alphaV"],
        "delta_gv": delta_gv,
        "abs_delta_gv": np.abs(delta_gv),
        "delta_alphaV": delta_alphaV,
    }
    return step, values | {"delta_gv_derivative": arrays["delta_gv_derivative"]}


def summarise(run, step, values):
    """Write avg_*.npy and summary.json into <run>/analysis/; return {name: Interval (L,)} of the
    two drawn ones, heads averaged within each image."""
    count, layers, heads = values["alphaV"].shape
    summary = {
        "images_used": count,
        "L": layers,
        "H": heads,
        "run_dir": str(run.path),
        "model_name": run.meta["settings"]["model_name"],
    }
    summary |= {
        "strip_system_prompt": run.meta["settings"]["strip_system_prompt"],
        "delta_steps": step,
    }
    for name in DRAWN:
        interval = stats.mean_interval(stats.measured_mean(values[name], axis=(1, 2)))
        found = zip(("", "_low", "_high"), interval)
        summary |= {
            f"mean_avg_{name}{part}": None if np.isnan(value) else float(value)
            for part, value in found
        }
    analysis = run.path / "analysis"
    try:
        analysis.mkdir(exist_ok=True)
        for name, array in values.items():
            np.save(analysis / f"avg_{name}.npy", stats.measured_mean(array))
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or analysis}: {error.strerror or error}"
        ) from error
    plots.write_file(analysis / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return {name: stats.mean_interval(stats.measured_mean(values[name], axis=2)) for name in DRAWN}


def draw_layers(ax, curves, name, colors):
    """Draw one quantity of every run against the layer. curves: {label: {name: Interval (L,)}}."""
    title, ylabel = DRAWN[name]
    for label, intervals in curves.items():
        plots.line_with_band(
            ax, np.arange(len(intervals[name].mean)), intervals[name], label, colors[label]
        )
    if name == "delta_alphaV":
        ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
    else:
        ax.set_ylim(bottom=0)
    ax.set(title=title, xlabel="decoder layer", ylabel=ylabel)


def main(argv=None):
    args = parse_args(argv)
    runs = [rundirs.read_run(path, rundirs.COCO) for path in args.run_dir]
    labels = plots.run_labels(runs)
    probes = [read_probe(run, args.delta_steps) for run in runs]
    steps = sorted({step for step, _ in probes})
    if len(steps) > 1:
        raise UsageError(
            f"the runs' first shifts differ ({', '.join(f'{step:g}' for step in steps)} positions);"
            " choose one that all have with --delta_steps"
        )
    curves = {label: summarise(run, *probe) for label, run, probe in zip(labels, runs, probes)}

    colors, settings = plots.model_colors(labels), vars(args) | {"delta_steps": steps[0]}
    moved = (
        f"vision keys moved {steps[0]:+g} position{'s' * (abs(steps[0]) != 1)} towards the query;"
        " mean over heads and images, bands: 95 % over images"
    )
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    draw_layers(ax, curves, "abs_delta_gv", colors)
    plots.legends([ax])
    fig.suptitle(moved, fontsize=9)
    plots.save(fig, plots.comparison_path(runs, "compare_abs_delta_gv_layerwise_mean"), settings)
    fig, axes = plots.plt.subplots(1, 2, figsize=(12, 4.6))
    for ax, name in zip(axes, DRAWN):
        draw_layers(ax, curves, name, colors)
    plots.legends(axes)
    fig.suptitle(moved, fontsize=9)
    both = plots.comparison_path(runs, "compare_delta_alphaV_and_abs_delta_gv_layerwise_mean")
    plots.save(fig, both, settings)
    if args.save_csv:
        columns = {
            "layer": range(
                max(len(intervals["abs_delta_gv"].mean) for intervals in curves.values())
            )
        }
        for label, intervals in curves.items():
            columns |= {
                f"{label}_{name}{part}": value
                for name in DRAWN
                for part, value in zip(("", "_low", "_high", "_n"), intervals[name])
            }
        plots.save_csv(f"{both}.csv", columns)
    return 0


if __name__ == "__main__":
    cli.run(main)

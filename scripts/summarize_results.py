"""The paper's two tables and their figures from finished runs of the ablation and knockout
experiments.

    python scripts/summarize_results.py \\
        --run_dir runs/ablation/tiny-llava runs/ablation_vqa/tiny-llava runs/knockout/tiny-llava \\
        --out_dir outputs/llava_interp

Ablation (table1.csv, .md; ablation.png, .pdf): destroyed = share of the initially correct answers
that an ablation makes wrong, by setting, with the mean number of tokens, and the paired difference
to as many random tokens. Knockout (table2.csv, .md; knockout.png, .pdf): relative accuracy = share
of the initially correct answers that stay so, 1 = no effect. Each picture counts once: questions
and random draws of a picture are averaged first. Intervals are 95 %: Wilson's with n pictures, and
bootstrap over pictures for paired differences and changes of log-probability. The published summary
divides by all pictures, those wrong before too, and subtracts probabilities of different tokens.
arXiv 2410.07149, tables 1 and 2; our study's 1.9 and 5.

On 1 to 3 objects a picture, as published, tiny-llava loses nearly every answer with its object's
tokens and none with as many random ones.
"""

import csv
import io
import re
from pathlib import Path

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs

SETTINGS = {"ablation": ("generative", "polling"), "ablation_vqa": ("vqa",), "knockout": ("vqa",)}
LOGPROBS = {"polling": "logprob_yes", "vqa": "logprob_first_token"}
SETTING_COLORS = {"generative": plots.BLUE, "polling": plots.ORANGE, "vqa": plots.GREEN}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir",
        nargs="+",
        required=True,
        help="run directories of the two ablation experiments and the knockout experiment",
    )
    parser.add_argument(
        "--out_dir", default="outputs/llava_interp", help="where tables and figures go"
    )
    return parser.parse_args(argv)


def read(path):
    """(run, records of the items that were right at first) of one run directory."""
    found = [experiment for experiment in SETTINGS if _is(path, experiment)]
    run = rundirs.read_run(path, found[0] if found else "ablation")
    records = [record for record in run.records() if record["eligible"]]
    if not records:
        raise UsageError(
            f"{run.path} has no item that was answered right without intervention, so nothing can"
            " be destroyed"
        )
    return run, records


def _is(path, experiment):
    try:
        rundirs.read_run(path, experiment)
    except UsageError:
        return False
    return True


def pooled(name):
    """Condition without its draw: random_matched_1_2 -> random_matched_1."""
    return re.sub(r"^((?:random|blob)_matched_\d+)_\d+$", r"\1", name)


def per_picture(records, setting, conditions, value):
    """(n,) mean over a picture's questions and the conditions' draws, NaN where a picture has none;
    records right at first in this setting only."""
    pictures, found = {}, {}
    for record in records:
        pictures.setdefault(str(record["image_id"]), len(pictures))
        if record["conditions"]["none"][setting]["correct"]:
            parts = [
                record["conditions"][name] for name in conditions if name in record["conditions"]
            ]
            if parts:
                found.setdefault(str(record["image_id"]), []).append(
                    np.mean([value(part, record) for part in parts])
                )
    out = np.full(len(pictures), np.nan)
    for image, values in found.items():
        out[pictures[image]] = np.mean(values)
    return out


def share(values):
    """Mean of per-picture shares with Wilson's interval for as many pictures; draws averaged within
    a picture make it wider than it need be, never narrower."""
    values = values[~np.isnan(values)]
    return stats.wilson_interval(values.sum(), len(values))


def summarise(records, setting):
    """{condition: row} of one run and setting, rows with tokens, destroyed, relative_accuracy,
    paired_to_random, change_of_logprob as Intervals."""
    names = list(
        dict.fromkeys(name for record in records for name in record["conditions"] if name != "none")
    )
    groups = {}
    for name in names:
        groups.setdefault(pooled(name), []).append(name)

    def destroyed(conditions):
        return per_picture(
            records, setting, conditions, lambda part, record: 1.0 - part[setting]["correct"]
        )

    rows, logprob = {}, LOGPROBS.get(setting)

    def changed(part, record):
        return part[setting][logprob] - record["conditions"]["none"][setting][logprob]

    for name, conditions in groups.items():
        values = destroyed(conditions)
        row = {
            "tokens": stats.measured_mean(
                per_picture(records, setting, conditions, lambda part, record: part["tokens"])
            ),
            "destroyed": share(values),
        }
        row["relative_accuracy"] = share(1 - values)
        control = re.sub(
            r"^(patch|gradient_matched|blob_matched)_(\d)$", r"random_matched_\2", name
        )
        row["minus_random"] = (
            stats.paired_difference(values, destroyed(groups[control]))
            if control != name and control in groups
            else None
        )
        if logprob:
            row["change_of_logprob"] = stats.mean_interval(
                per_picture(records, setting, conditions, changed)
            )
        rows[name] = row
    return rows


# --- tables ---------------------------------------------------------------------------------------


def write_table(stem, columns, rows):
    """CSV with all digits and Markdown of the same cells. columns: {name: format or None}; rows:
    lists of values, Interval or None."""
    header = [name for name in columns]
    flat = [
        [f"{name}{part}" for part in ("", "_low", "_high", "_n")] if form == "interval" else [name]
        for name, form in columns.items()
    ]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([name for some in flat for name in some])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            (list(value) if value is not None else [""] * 4) if form == "interval" else [value]
            for value, form in zip(row, columns.values(), strict=True)
        ]
        table.writerow([cell for some in cells for cell in some])
        lines.append(
            "| "
            + " | ".join(
                _shown(value, form) for value, form in zip(row, columns.values(), strict=True)
            )
            + " |"
        )
    plots.write_file(f"{stem}.csv", text.getvalue().encode())
    plots.write_file(f"{stem}.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def _shown(value, form):
    if value is None:
        return ""
    if form == "interval":
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}] (n = {value.n})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


# --- figures --------------------------------------------------------------------------------------


def draw_ablation(found):
    """Bars with intervals, one panel a run: conditions that are no plain count, by setting."""
    fig, axes = plots.plt.subplots(len(found), 1, figsize=(11, 4.2 * len(found)), squeeze=False)
    for ax, (label, settings) in zip(axes[:, 0], found.items()):
        names = [
            name
            for name in next(iter(settings.values()))
            if not re.fullmatch(r"(random|gradient)_\d+", name)
        ]
        for k, (setting, rows) in enumerate(settings.items()):
            x = np.arange(len(names)) + (k - (len(settings) - 1) / 2) * 0.8 / len(settings)
            shares = [rows[name]["destroyed"] for name in names]
            means = np.array([one.mean for one in shares])
            error = np.clip(
                [means - [one.low for one in shares], [one.high for one in shares] - means], 0, None
            )
            n = plots.with_n(setting, [one.n for one in shares])
            ax.bar(
                x,
                means,
                0.8 / len(settings),
                yerr=error,
                color=SETTING_COLORS[setting],
                label=n,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        tokens = next(iter(settings.values()))
        ticks = [
            f"{name.replace('_', ' ')}\n({tokens[name]['tokens']:.0f} tokens)" for name in names
        ]
        ax.set_xticks(np.arange(len(names)), ticks, rotation=45, ha="right", fontsize=8)
        ax.set(
            title=f"Token ablation: {label}",
            ylabel="destroyed share of the\ninitially correct answers",
            ylim=(0, 1.2),
        )
        ax.legend(loc="upper right", ncols=2)
    return fig


def draw_counts(found):
    """Destroyed share over the number of tokens, gradient against random, with the object's own
    sets as points; one panel a run."""
    fig, axes = plots.plt.subplots(1, len(found), figsize=(6.5 * len(found), 4.6), squeeze=False)
    for ax, (label, settings) in zip(axes[0], found.items()):
        for setting, rows in settings.items():
            for kind, line in (("gradient", "-"), ("random", "--")):
                names = [name for name in rows if re.fullmatch(kind + r"_\d+", name)]
                if names:
                    parts = [rows[name]["destroyed"] for name in names]
                    curve = stats.Interval(
                        *(
                            np.array([getattr(part, field) for part in parts])
                            for field in stats.Interval._fields
                        )
                    )
                    x = [rows[name]["tokens"] for name in names]
                    plots.line_with_band(
                        ax, x, curve, f"{setting}, {kind}", SETTING_COLORS[setting], linestyle=line
                    )
            patches = [rows[name] for name in rows if name.startswith("patch_")]
            ax.scatter(
                [row["tokens"] for row in patches],
                [row["destroyed"].mean for row in patches],
                color=SETTING_COLORS[setting],
                marker="D",
                zorder=3,
                label=f"{setting}, object with 0 to 2 buffers",
            )
        ax.set(
            title=f"Token ablation by number of tokens: {label}",
            xlabel="ablated tokens",
            ylabel="destroyed share",
            ylim=(-0.02, 1.05),
        )
    plots.legends(list(axes[0]), below=True)
    return fig


def draw_knockout(found, layers):
    """Relative accuracy, pairs x windows, one panel a run. layers {run: {window: (first,
    last)}}."""
    pairs, windows = (
        [
            *dict.fromkeys(
                key.split(":", 2)[2] if k else ":".join(key.split(":")[:2])
                for rows in found.values()
                for key in rows
            )
        ]
        for k in (0, 1)
    )
    height = 1.6 + 0.5 * len(pairs)
    fig, axes = plots.plt.subplots(
        len(found),
        1,
        figsize=(max(7.0, 1.5 + 1.1 * len(windows)), height * len(found)),
        squeeze=False,
    )
    for ax, (label, rows) in zip(axes[:, 0], found.items()):
        cell = lambda key, rows=rows: rows[key]["relative_accuracy"].mean if key in rows else np.nan
        matrix = np.array([[cell(f"{pair}:{window}") for window in windows] for pair in pairs])
        n = plots.with_n(label, [row["relative_accuracy"].n for row in rows.values()])
        image = plots.heatmap(
            ax,
            matrix,
            f"Accuracy under attention knockout: {n}",
            0,
            1,
            "layers in which attention is cut",
            "",
        )
        names = [
            f"{window.replace('_', '-')}\n{layers[label][window][0]}-{layers[label][window][1]}"
            for window in windows
        ]
        ax.set_xticks(
            range(len(windows)),
            names if len(windows) <= 12 else windows,
            rotation=90 if len(windows) > 12 else 0,
        )
        ax.set_yticks(
            range(len(pairs)), [pair.replace(":", " \u2192 ").replace("_", " ") for pair in pairs]
        )
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                if np.isfinite(value) and len(windows) <= 12:
                    ax.text(
                        column,
                        row,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        color="black" if value > 0.55 else "white",
                        fontsize=9,
                    )
        fig.colorbar(image, ax=ax, label="share that stays right")
    return fig


def main(argv=None):
    args = parse_args(argv)
    read_runs = [read(path) for path in args.run_dir]
    out = Path(args.out_dir)
    ablations, knockouts, layers = {}, {}, {}
    for run, records in read_runs:
        experiment = run.meta["experiment"]
        rows = {setting: summarise(records, setting) for setting in SETTINGS[experiment]}
        label = f"{run.label} ({experiment})" if experiment != "knockout" else run.label
        if label in (knockouts if experiment == "knockout" else ablations):
            raise UsageError(f"two runs have the name {label}; give each its own --run_name")
        if experiment == "knockout":
            knockouts[label], layers[label] = rows["vqa"], run.meta["settings"]["windows"]
        else:
            ablations[label] = rows
    settings = vars(args) | {"runs": [str(run.path) for run, _ in read_runs]}
    if ablations:
        columns = {"run": None, "setting": None, "condition": None, "tokens": None}
        columns |= dict.fromkeys(("destroyed", "minus_random", "change_of_logprob"), "interval")
        rows = [
            [
                label,
                setting,
                name,
                float(row["tokens"]),
                row["destroyed"],
                row["minus_random"],
                row.get("change_of_logprob"),
            ]
            for label, by_setting in ablations.items()
            for setting, found in by_setting.items()
            for name, row in found.items()
        ]
        write_table(out / "table1", columns, rows)
        plots.save(draw_ablation(ablations), out / "ablation", settings)
        if any(
            re.fullmatch(r"(random|gradient)_\d+", name)
            for by_setting in ablations.values()
            for found in by_setting.values()
            for name in found
        ):
            plots.save(draw_counts(ablations), out / "ablation_by_tokens", settings)
    if knockouts:
        columns = {
            "run": None,
            "from": None,
            "to": None,
            "layers": None,
            "relative_accuracy": "interval",
            "change_of_logprob": "interval",
        }
        rows = [
            [label, *key.split(":", 2), row["relative_accuracy"], row["change_of_logprob"]]
            for label, found in knockouts.items()
            for key, row in found.items()
        ]
        write_table(out / "table2", columns, rows)
        plots.save(draw_knockout(knockouts, layers), out / "knockout", settings)
    return 0


if __name__ == "__main__":
    cli.run(main)

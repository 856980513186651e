"""Which map over the picture is right? Perturbation curves, the areas under them, pointing game and
mask energy of every method, with the priors.

    python diagnostic_tools/relevancy_evaluation_plot.py \\
        --run_dirs runs/evaluate_relevancy/tiny-llava
    python diagnostic_tools/relevancy_evaluation_plot.py --run_dirs runs/evaluate_relevancy/* \\
        --out_dir outputs/relevancy

    area       mean over the shares s of p(s) / p(0), p of the fixed token: positive, lower is
               better; negative, higher is better
    gap        negative - positive area: 0 where the order says nothing
    needs      l(0) - l(every vision token at the picture's mean) of a token, nats: 'seeing' tokens
               have at least --dependence, 'knowing' tokens less;
               'first' tokens write the first word of an object's name, 'later' tokens the others

Reads runs of evaluate_relevancy.py, loads no model. A value of an image is the mean over its
tokens; means, 95 % bootstrap intervals and paired differences, to random and to relevancy, are over
images. Writes into analysis/ (of several runs: beside the first, or --out_dir) perturbation_auc.csv
and localisation.csv with all groups of tokens and for each run, of the group --tokens, the figures
<run>_curves, <run>_auc and <run>_localisation, where the priors are lines. On tiny-llava the curves
of a good method fall at once (positive) and stay at 1 until the end (negative).
"""

import itertools
from pathlib import Path

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.relevancy import perturbation
from vlmdiag.runs import rundirs

EXPERIMENT = "evaluate_relevancy"
COLORS = {
    "relevancy": plots.VERMILION,
    "relevancy_decoder": plots.ORANGE,
    "gradient_attention": plots.YELLOW,
    "raw_attention": plots.BLUE,
    "rollout": plots.SKY,
    "input_gradient": plots.GREEN,
    "integrated_gradients": plots.PURPLE,
    "random": plots.EVEN_COLOR,
    "centre": "#999999",
    "object": "#332288",
}
STYLES = {"random": "--", "centre": ":", "object": "-."}
GROUPS = ("all", "seeing", "knowing", "first", "later")
WHICH = {
    "all": "",
    "seeing": " that lose at least {:g} nats without the picture",
    "knowing": " that lose less than {:g} nats without the picture",
    "first": " of the names' first words",
    "later": " of the names' later words",
}
WAYS = ("positive", "negative")
HOW = {
    "mean": "replaced by the picture's mean",
    "drop": "left out of the sequence",
    "blur": "blurred in the picture",
}
ENDS = {"": "mean", "_low": "low", "_high": "high"}  # endings of a table's columns
RIVALS = ("random", "relevancy")  # whose differences to every method are in the table of areas
LOCAL = {"pointing": "highest part on the object", "energy": "share of the map on the object"}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dirs", nargs="+", required=True, help="runs of evaluate_relevancy.py"
    )
    parser.add_argument("--out_dir", default=None, help="where tables and figures go")
    parser.add_argument("--tokens", choices=GROUPS, default="seeing", help="tokens in the figures")
    parser.add_argument(
        "--dependence",
        type=float,
        default=1.0,
        help="nats that a 'seeing' token loses without the picture, at least",
    )
    return parser.parse_args(argv)


class Evaluation:
    """A run as arrays over its n images with targets.

    methods (M,), shares (K,); curves {removal: (M, T, 2, K)} an image; local {pointing, energy: (M,
    T), area_pointing, area_energy: (T,)} an image, empty where the places of the vision tokens are
    unknown; needs (T,) an image."""

    def __init__(self, run):
        self.run, self.shares, self.removal = (
            run,
            np.array(run.meta["settings"]["shares"]),
            run.meta["settings"]["removal"],
        )
        records = run.records()
        ids = [id for id, record in zip(run.ids(), records, strict=True) if record["targets"]]
        if not ids:
            raise UsageError(
                f"{run.path}: none of its {len(records)} answers names an object that is in the"
                " picture once, so there is nothing to evaluate"
            )
        self.records, arrays = (
            [record for record in records if record["targets"]],
            [run.arrays(id) for id in ids],
        )
        self.left_out = {
            name: sum(record["left_out"][name] for record in records)
            for name in records[0]["left_out"]
        } | {"images": len(records) - len(ids)}
        self.methods = self.records[0]["methods"]
        self.curves = {
            removal: [part[f"curves_{removal}"].astype(float) for part in arrays]
            for removal in self.removal
        }
        self.local = [
            (
                {
                    name: part[name].astype(float)
                    for name in ("pointing", "energy", "area_pointing", "area_energy")
                }
                if "pointing" in part
                else {}
            )
            for part in arrays
        ]
        self.needs = [part["logprob"] - part["without_picture"] for part in arrays]

    def tokens(self, group, dependence):
        """[(T,) bool, ...] an image: the targets of a group."""
        own = {
            "all": lambda needs, words: words >= 0,
            "seeing": lambda needs, words: needs >= dependence,
            "knowing": lambda needs, words: needs < dependence,
            "first": lambda needs, words: words == 0,
            "later": lambda needs, words: words > 0,
        }[group]
        return [
            own(needs, np.array([target["word"] for target in record["targets"]]))
            for needs, record in zip(self.needs, self.records, strict=True)
        ]

    def per_image(self, values, chosen):
        """(n, ...) means over the chosen targets of values [(M, T, ...), ...]; NaN for an image
        without one."""
        return np.stack(
            [
                stats.measured_mean(
                    np.where(own.reshape(-1, *[1] * (part.ndim - 2)), part, np.nan), 1
                )
                for part, own in zip(values, chosen)
            ]
        )


def areas(evaluation, removal, chosen, measure="ratio"):
    """(n, M, 3): positive area, negative area and their gap, means over the chosen tokens of an
    image."""
    own = [
        perturbation.area(perturbation.MEASURES[measure](curves), evaluation.shares)
        for curves in evaluation.curves[removal]
    ]
    return evaluation.per_image(
        [np.concatenate([part, part[..., 1:] - part[..., :1]], -1) for part in own], chosen
    )


def against(values, methods, name):
    """Paired difference of (n, M, ...) to one of the methods, an Interval of shape (M, ...); None
    where the run lacks it."""
    if name not in methods:
        return None
    other = values[:, [methods.index(name)]]
    return stats.paired_difference(values, np.broadcast_to(other, values.shape))


def auc_rows(evaluation, label, dependence):
    """Rows of perturbation_auc.csv."""
    for removal in evaluation.removal:
        for group in GROUPS:
            chosen = evaluation.tokens(group, dependence)
            for measure in perturbation.MEASURES:
                values = areas(evaluation, removal, chosen, measure)
                found, changes = (
                    stats.mean_interval(values),
                    {name: against(values, evaluation.methods, name) for name in RIVALS},
                )
                for m, method in enumerate(evaluation.methods):
                    row = {
                        "run": label,
                        "removal": removal,
                        "tokens": group,
                        "measure": measure,
                        "method": method,
                    }
                    row |= {"n_images": int(found.n[m].max()), "n_tokens": count_of(chosen)}
                    for part, what in enumerate(("positive", "negative", "gap")):
                        row |= {
                            f"{what}{end}": getattr(found, name)[m, part]
                            for end, name in ENDS.items()
                        }
                        for other, change in changes.items():
                            row |= {
                                f"{what}_minus_{other}{end}": (
                                    getattr(change, name)[m, part] if change else np.nan
                                )
                                for end, name in ENDS.items()
                            }
                    yield row


def located(evaluation, what, chosen):
    """((n, M) of the methods, (n,) of the area prior): means over the chosen tokens of an image."""
    prior = evaluation.per_image([part[f"area_{what}"][None] for part in evaluation.local], chosen)
    return evaluation.per_image([part[what] for part in evaluation.local], chosen), prior[:, 0]


def local_rows(evaluation, label, dependence):
    """Rows of localisation.csv."""
    for what, group in itertools.product(LOCAL if all(evaluation.local) else (), GROUPS):
        chosen = evaluation.tokens(group, dependence)
        values, prior = located(evaluation, what, chosen)
        values = np.concatenate([values, prior[:, None]], 1)
        methods = [*evaluation.methods, "area"]
        found, changes = (
            stats.mean_interval(values),
            {name: against(values, methods, name) for name in ("area", "centre", "relevancy")},
        )
        for m, method in enumerate(methods):
            row = {
                "run": label,
                "measure": what,
                "tokens": group,
                "method": method,
                "n_images": int(found.n[m]),
                "n_tokens": count_of(chosen),
            }
            row |= {f"value{end}": getattr(found, name)[m] for end, name in ENDS.items()}
            for other, change in changes.items():
                row |= {
                    f"minus_{other}{end}": getattr(change, name)[m] if change else np.nan
                    for end, name in ENDS.items()
                }
            yield row


def count_of(chosen):
    return int(sum(own.sum() for own in chosen))


# --- figures --------------------------------------------------------------------------------------


def draw_curves(evaluation, label, chosen, title):
    """p(s) / p(0) over s: a row of axes for each way of removal, positive and negative beside each
    other."""
    lines = len(evaluation.removal)
    fig, axes = plots.plt.subplots(
        lines, 2, figsize=(10.5, 3.4 * lines + 1.6), sharex=True, sharey=True, squeeze=False
    )
    for row, removal in zip(axes, evaluation.removal, strict=True):
        ratios = [perturbation.MEASURES["ratio"](curves) for curves in evaluation.curves[removal]]
        found = stats.mean_interval(evaluation.per_image(ratios, chosen))
        for way, ax in enumerate(row):
            for m, method in enumerate(evaluation.methods):
                if found.n[m].max() == 0:
                    continue
                own = stats.Interval(*(part[m, way] for part in found))
                ax.plot(
                    evaluation.shares,
                    own.mean,
                    color=COLORS[method],
                    linestyle=STYLES.get(method, "-"),
                    label=plots.with_n(method, own.n),
                )
                ax.fill_between(
                    evaluation.shares,
                    own.low,
                    own.high,
                    color=COLORS[method],
                    alpha=0.13,
                    linewidth=0,
                )
            first, good = (("most", "lower"), ("least", "higher"))[way]
            ax.set_title(f"{WAYS[way]}: {first} relevant first, {good} is better\n{HOW[removal]}")
            ax.set_ylabel("p(s) / p(0) of the token" if way == 0 else "")
    for ax in axes[-1]:
        ax.set_xlabel("share s of the vision tokens removed")
    lines = {
        name: handle
        for ax in axes[:, 0]
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    fig.suptitle(f"{label}: {title}", fontsize=10.5)
    return fig


def _points(ax, methods, found):
    """A mean with its interval for each method, one below the other."""
    for m, method in enumerate(methods):
        ax.errorbar(
            found.mean[m],
            m,
            xerr=(
                [[found.mean[m] - found.low[m]], [found.high[m] - found.mean[m]]]
                if found.n[m] > 1
                else None
            ),
            fmt="o",
            color=COLORS[method],
            capsize=3,
            markersize=5,
        )
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_yticks(range(len(methods)), methods)


def draw_auc(evaluation, label, chosen, title):
    """Areas of p(s) / p(0): positive, negative, gap, and the gap's paired difference to random."""
    lines = len(evaluation.removal)
    fig, axes = plots.plt.subplots(
        lines,
        4,
        figsize=(13, 1.1 + lines * (0.4 + 0.26 * len(evaluation.methods))),
        sharex="col",
        sharey=True,
        squeeze=False,
    )
    for row, removal in zip(axes, evaluation.removal, strict=True):
        values = areas(evaluation, removal, chosen)
        found, change = stats.mean_interval(values), against(values, evaluation.methods, "random")
        for part, ax in enumerate(row[:3]):
            _points(ax, evaluation.methods, stats.Interval(*(values[:, part] for values in found)))
        if change:
            _points(
                row[3], evaluation.methods, stats.Interval(*(values[:, 2] for values in change))
            )
            row[3].axvline(0, color=plots.EVEN_COLOR, linestyle="--", linewidth=1.2)
        row[0].set_ylabel(f"{HOW[removal]}\nn = {found.n.max()} images", fontsize=8.5)
    titles = (
        "positive area (lower is better)",
        "negative area (higher is better)",
        "gap: negative - positive",
        "gap - gap of random, paired",
    )
    for first, last, name in zip(axes[0], axes[-1], titles, strict=True):
        first.set_title(name)
        last.set_xlabel("difference" if first is axes[0, 3] else "mean of p(s) / p(0) over s")
    fig.suptitle(f"{label}: {title}", fontsize=10.5)
    return fig


def draw_local(evaluation, label, chosen, title):
    """Pointing and energy of every method; the priors are lines."""
    methods = [method for method in evaluation.methods if method not in ("centre", "object")]
    fig, axes = plots.plt.subplots(1, 2, figsize=(10.5, 1.6 + 0.3 * len(methods)), sharey=True)
    for ax, (what, name) in zip(axes, LOCAL.items(), strict=True):
        values, prior = located(evaluation, what, chosen)
        found = stats.mean_interval(values)
        at = [evaluation.methods.index(method) for method in methods]
        _points(ax, methods, stats.Interval(*(part[at] for part in found)))
        ax.barh(
            range(len(methods)),
            found.mean[at],
            color=[COLORS[method] for method in methods],
            alpha=0.45,
        )
        lines = {
            "area prior": (stats.measured_mean(prior), "--"),
            "centre prior": (found.mean[evaluation.methods.index("centre")], ":"),
        }
        if what == "energy":
            lines["the object's own mask"] = found.mean[evaluation.methods.index("object")], "-."
        for line, (value, style) in lines.items():
            ax.axvline(
                value, color="black", linestyle=style, linewidth=1.2, label=f"{line} {value:.3f}"
            )
        ax.set(
            xlabel=name,
            title=(
                f"{'pointing game' if what == 'pointing' else 'mask energy'}, n = {found.n.max()}"
                " images"
            ),
            xlim=(0, None),
        )
    plots.legends(list(axes), below=True)
    fig.suptitle(f"{label}: {title}", fontsize=10.5)
    return fig


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def show(rows):
    """Rows of the tables as lines."""
    for row in rows:
        what = (
            f"{row['removal']:6s}{row['tokens']:8s}"
            if "removal" in row
            else f"{row['measure']:9s}{row['tokens']:8s}"
        )
        keys = (
            ("positive", "negative", "gap", "gap_minus_random", "gap_minus_relevancy")
            if "removal" in row
            else ("value", "minus_area", "minus_centre", "minus_relevancy")
        )
        cells = "".join(
            f"{key} {row[key]:6.3f} [{row[key + '_low']:6.3f}, {row[key + '_high']:6.3f}]  "
            for key in keys
        )
        print(
            f"{what}{row['method']:21s}{cells}n = {row['n_images']} images, {row['n_tokens']}"
            " tokens"
        )


def main(argv=None):
    args = parse_args(argv)
    runs = [rundirs.read_run(folder, EXPERIMENT) for folder in args.run_dirs]
    labels, evaluations = plots.run_labels(runs), [Evaluation(run) for run in runs]
    out = (
        Path(args.out_dir)
        if args.out_dir
        else runs[0].path / "analysis"
        if len(runs) == 1
        else runs[0].path.parent
    )
    area_table, local_table = [], []
    for run, label, evaluation in zip(runs, labels, evaluations, strict=True):
        print(
            f"{label}: {len(evaluation.records)} images; left out: "
            + ", ".join(f"{count} {name}" for name, count in evaluation.left_out.items())
        )
        area_table += auc_rows(evaluation, label, args.dependence)
        local_table += local_rows(evaluation, label, args.dependence)
        chosen = evaluation.tokens(args.tokens, args.dependence)
        title = f"{count_of(chosen)} tokens{WHICH[args.tokens].format(args.dependence)}"
        settings = run.meta["settings"] | {
            "tokens": args.tokens,
            "dependence": args.dependence,
            "images": len(evaluation.records),
        }
        if not count_of(chosen):
            print(f"{label}: no figures, for want of {title[2:]}")
            continue
        plots.save(
            draw_curves(evaluation, label, chosen, title), out / f"{run.label}_curves", settings
        )
        plots.save(draw_auc(evaluation, label, chosen, title), out / f"{run.label}_auc", settings)
        if all(evaluation.local):
            plots.save(
                draw_local(evaluation, label, chosen, title),
                out / f"{run.label}_localisation",
                settings,
            )
    plots.save_csv(out / "perturbation_auc.csv", columns(area_table))
    if local_table:
        plots.save_csv(out / "localisation.csv", columns(local_table))
    show(
        [
            row
            for row in area_table + local_table
            if row["measure"] in ("ratio", *LOCAL) and row["tokens"] == args.tokens
        ]
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

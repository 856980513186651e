"""Which signals tell hallucinated object words from grounded ones, and can the probability be
believed? Drawn from the report of hallucination_warning.py test.

    python diagnostic_tools/viz_hallucination.py \\
        --run_dir runs/hallucination_warning/tiny-llava__test

Left: AUROC of each signal and of all together on words that were not fitted on, 95 % interval over
pictures; dotted: plain token probability. A signal whose difference to it has an interval above 0
is marked. Right: predicted against observed share of hallucinated words, bins of equal count.
"""

import json

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.runs import rundirs

EXPERIMENT = "hallucination_warning"
BASELINE = "log_probability"
LABELS = {
    "log_probability": "token probability",
    "llr": "log-likelihood ratio",
    "visual_share": "visual share",
    "relevancy_mass": "relevancy mass",
    "lens": "logit lens",
    "all": "all together",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--run_dir", required=True, help="run of hallucination_warning.py test")
    parser.add_argument(
        "--kind", default="captions", choices=["captions", "pope"], help="which object words"
    )
    return parser.parse_args(argv)


def draw(found, kind, title, path):
    part = found[kind]
    fig, (bars, curve) = plots.plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    names = [name for name in LABELS if name in part["signals"]]
    for place, name in enumerate(reversed(names)):
        row = part["signals"][name]
        score, better = row["auroc"], row["beats_baseline"]
        color = plots.EVEN_COLOR if name == BASELINE else plots.BLUE if better else plots.SKY
        bars.barh(
            place,
            score["value"],
            color=color,
            xerr=[[score["value"] - score["low"]], [score["high"] - score["value"]]],
            error_kw={"elinewidth": 1},
            height=0.65,
        )
        gain = row["over_baseline"]
        said = (
            ""
            if name == BASELINE
            else f"{gain['value']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
            + (" *" if better else "")
        )
        bars.text(1.02, place, said, va="center", fontsize=8)
    bars.axvline(part["signals"][BASELINE]["auroc"]["value"], color=plots.EVEN_COLOR, linestyle=":")
    bars.axvline(0.5, color=plots.EVEN_COLOR, linewidth=0.8)
    bars.set_yticks(range(len(names)), [LABELS[name] for name in reversed(names)])
    bars.set(
        xlim=(0, 1),
        xlabel="AUROC (0.5: chance)",
        title="hallucinated or not; right: over token probability",
    )
    bars.grid(axis="y", visible=False)
    rows = part["reliability"]
    curve.plot([0, 1], [0, 1], color=plots.EVEN_COLOR, linestyle=":", label="calibrated")
    curve.plot(
        [row["predicted"] for row in rows],
        [row["observed"] for row in rows],
        "o-",
        color=plots.BLUE,
        label=plots.with_n("all together", [row["n"] for row in rows]),
    )
    curve.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="predicted",
        ylabel="observed share",
        title=f"calibration, ECE {part['signals']['all']['ece']:.3f}",
        aspect="equal",
    )
    curve.legend(loc="upper left")
    fig.suptitle(
        f"{title}, {kind}: {part['n_hallucinated']} of {part['n_words']} object words hallucinated"
        f" in {part['n_images']} pictures",
        fontsize=10,
    )
    return plots.save(fig, path, {"run": title, "kind": kind})


def main(argv=None):
    args = parse_args(argv)
    run = rundirs.read_run(args.run_dir, EXPERIMENT)
    path = run.path / "analysis" / "report.json"
    try:
        found = json.loads(path.read_bytes())
        part = found[args.kind]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{path} has no {args.kind} words ({type(error).__name__}); run"
            " hallucination_warning.py test first"
        ) from error
    if part["too_few"]:
        raise UsageError(
            f"{path}: {part['n_hallucinated']} of {part['n_words']} words of {args.kind} are"
            " hallucinated; both kinds are needed"
        )
    draw(found, args.kind, run.label, run.path / "analysis" / f"hallucination_{args.kind}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Does the model look at the picture more while it criticises or revises than while it first
answers, or is its text only longer?

    c[t, p] = attention of the step that wrote token t to vision token p, pooled over layers and
    heads (mean of the 3 largest of each, as published)
    ratio   = mean over images of a statistic of the feedback's (revision's) c / the same of the
            initial answer's
Volcano (arXiv 2311.07362), figure 5; sections 2.4, 2.9 and N3 of our study.

    python visualize/analyze_attention_by_stage.py --run_dir runs/volcano/tiny-llava --filter all

Side by side: the published top-l mean (per patch, the l largest over tokens, l = length of the
shorter text: a mean for that text, nearly a maximum for the longer one), the mean over tokens, the
picture's share of the attention per token, and the top half of texts cut to equal length. Each with
bootstrap 95 % intervals over images and a permutation null: the tokens of the two texts pooled and
split again at their lengths. Where the null of the published statistic lies well above 1, that much
of its ratio is length alone. The token that ended a text counts in none. Into <run>/analysis/:
attention_by_stage.json, .csv, .png, .pdf and, where all pictures share one grid, stage_maps.png,
.pdf (figure 5, with the revision and with the mean over tokens below it).

--filter enhanced: instances where the model preferred a revision at least once (published, its own
judgement); corrected: first answer wrong and final answer right by the gold answer; all. The
feedback and revision are those that the run stored, the last accepted ones.

On tiny-llava the published ratio of the feedback is well above 1 but below its null, and all the
fair ones are below 1.
"""

import zlib
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator
from tqdm import tqdm

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.runs import rundirs
from vlmdiag.volcano.maps import counted, top_l_mean
from vlmdiag.volcano.stage_statistics import (
    STATISTICS,
    by_image,
    checked,
    compare,
    statistics_over_images,
)

EXPERIMENT = "volcano"
STAGES = ("initial", "feedback", "revision")
NAMES = {
    "top_l": "top-l mean over tokens\n(published)",
    "token_mean": "mean over tokens",
    "image_mass": "attention on the picture\nper token",
    "equal_length": "top half of tokens,\ntexts cut to equal length",
}
TICKS = (0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5, 8, 12, 20, 50, 100)
CHOSEN = {
    "enhanced": "the model preferred a revision",
    "corrected": "the revision turned a wrong answer right",
    "all": "all of the run",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", required=True, help="a run directory of run_volcano_with_image_attention.py"
    )
    parser.add_argument(
        "--filter", choices=CHOSEN, default="enhanced", help="which instances count"
    )
    parser.add_argument(
        "--pool_method",
        choices=("top_k_mean", "mean", "max"),
        default="top_k_mean",
        help="pool over layers and heads",
    )
    parser.add_argument(
        "--num_permutations", type=int, default=200, help="of the tokens of each pair of texts"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the permutations")
    args = parser.parse_args(argv)
    if args.num_permutations < 1 or args.seed < 0:
        parser.error("--num_permutations counts from 1 and --seed from 0")
    return args


# --- reading --------------------------------------------------------------------------------------


def keeps(record, filter):
    """Whether an instance passes --filter."""
    if filter == "corrected":
        return record["correct"]["initial"] is False and record["correct"]["final"] is True
    return filter == "all" or bool(record["enhanced"])


def select(run, filter):
    """{id: record} of the instances that pass; UsageError where none does."""
    records = dict(zip(run.ids(), run.records()))
    if not records:
        raise UsageError(
            f"{run.path} has no finished instance yet; run the command that makes it again"
        )
    lacking = [
        id
        for id, record in records.items()
        if not {"image_id", "stages", "enhanced", "correct"} <= set(record)
    ]
    if lacking:
        raise UsageError(
            f"{run.path / 'per_image' / lacking[0]}.json lacks image_id, stages, enhanced or"
            " correct; make the run again"
        )
    chosen = {id: record for id, record in records.items() if keeps(record, filter)}
    if not chosen:
        unknown = sum(None in record["correct"].values() for record in records.values())
        more = (
            f"; {unknown} cannot be judged by their gold answer"
            if filter == "corrected" and unknown
            else ""
        )
        raise UsageError(
            f"--filter {filter} leaves none of the {len(records)} instances of {run.path}{more};"
            " try another --filter"
        )
    return chosen, len(records)


def texts(run, id, record, pool):
    """{stage: (c (T, P), mass (T,))} of an instance's stages, without the token that ended the
    text."""
    arrays, found = run.arrays(id), {}
    for stage in STAGES:
        if record["stages"].get(stage) is None:
            continue
        names = f"{stage}_{pool}", f"{stage}_mean"
        lacking = [name for name in names if name not in arrays]
        if lacking:
            raise UsageError(
                f"{run.path}: {id} has no {lacking[0]}; it was made without it, choose another"
                " --pool_method or make the run again"
            )
        try:
            c, plain = (checked(arrays[name], name) for name in names)
        except ValueError as error:
            raise UsageError(
                f"{run.path}: {id}: {error}; delete its files in per_image/ and run the command"
                " that made it again"
            ) from error
        steps = counted(len(c), record["stages"][stage]["ended"])
        found[stage] = c[:steps], plain[:steps].sum(1, dtype=np.float64)
    return found


def grid_of(records):
    """(rows, columns) of the patches if all the pictures have the same, else None."""
    shapes = {tuple((record.get("grid") or {}).get("shape") or ()) for record in records}
    return shapes.pop() or None if len(shapes) == 1 else None


# --- measuring ------------------------------------------------------------------------------------


def measure(run, records, args):
    """({stage: rows}, maps): what compare() gives for each instance that has both texts, and per
    instance the maps of the three stages, top-l and mean."""
    rows = {
        stage: {"ids": [], "observed": [], "null": [], "tokens": [], "missing": [], "empty": []}
        for stage in STAGES[1:]
    }
    maps = {"ids": [], "values": []}
    for id, record in tqdm(records.items(), desc="instances", unit="instance", disable=None):
        found = texts(run, id, record, args.pool_method)
        for number, (stage, row) in enumerate(rows.items()):
            if not {"initial", stage} <= set(found):
                row["missing"].append(id)
                continue
            pair = [found[name] for name in ("initial", stage)]
            if not all(len(c) for c, _ in pair):
                row["empty"].append(id)
                continue
            if pair[0][0].shape[1] != pair[1][0].shape[1]:
                raise UsageError(
                    f"{run.path}: {id} has {pair[0][0].shape[1]} patches in its initial answer and"
                    f" {pair[1][0].shape[1]} in its {stage}"
                )
            rng = np.random.default_rng([args.seed, zlib.crc32(id.encode()), number])
            observed, null = compare(
                *(c for c, _ in pair), *(mass for _, mass in pair), args.num_permutations, rng
            )
            for name, value in (
                ("ids", id),
                ("observed", observed),
                ("null", null),
                ("tokens", [len(c) for c, _ in pair]),
            ):
                row[name].append(value)
        if all(len(found.get(stage, [[]])[0]) for stage in STAGES):
            maps["ids"].append(id)
            maps["values"].append(stage_maps({stage: c for stage, (c, _) in found.items()}))
    return rows, maps


def stage_maps(c):
    """(2, 3, P): top-l mean and plain mean over tokens of the three stages; l is the shorter of
    initial answer and feedback, as published, and for the revision at most its own length. c
    {stage: (T, P)}."""
    shorter = min(len(c["initial"]), len(c["feedback"]))
    top = [top_l_mean(c[stage].astype(np.float64), min(shorter, len(c[stage]))) for stage in STAGES]
    return np.array([top, [c[stage].mean(0, dtype=np.float64) for stage in STAGES]])


def summarise(row, records, stage):
    """One comparison: its instances and lengths, and {statistic: numbers}."""
    names = ("initial", stage)
    stages = [records[id]["stages"] for id in row["ids"]]
    prompts = np.array(
        [[some[name].get("prompt_tokens", np.nan) for name in names] for some in stages], float
    )
    images = [str(records[id]["image_id"]) for id in row["ids"]]
    found = {
        "instances": len(images),
        "images": len(set(images)),
        "mean_tokens": dict(zip(names, np.mean(row["tokens"], 0))),
    }
    found |= {"mean_prompt_tokens": dict(zip(names, prompts.mean(0)))}
    return found | {
        "statistics": statistics_over_images(
            np.array(row["observed"]), np.array(row["null"]), images
        )
    }


# --- what comes out -------------------------------------------------------------------------------


def show(found):
    """Print one table for each comparison."""
    for stage, part in found.items():
        lengths = [f"{part['mean_tokens'][name]:.1f}" for name in ("initial", stage)]
        n = f"n = {part['instances']} instances, {part['images']} images"
        print(
            f"\n{stage} against initial answer ({n}; mean length {lengths[1]} against {lengths[0]}"
            " tokens)"
        )
        print(
            f"{'statistic':14s}{'initial':>10s}{stage:>10s} "
            f" {'ratio [95 %]':22s}{'if tokens are exchanged':25s}{'p':>6s}"
        )
        for name, row in part["statistics"].items():
            cells = [
                f"{row[key]['mean']:.2f} [{row[key]['low']:.2f}, {row[key]['high']:.2f}]"
                for key in ("ratio", "null_ratio")
            ]
            print(
                f"{name:14s}{row['initial']:10.5f}{row['other']:10.5f} "
                f" {cells[0]:22s}{cells[1]:25s}{row['p']:6.3f}"
            )


def write_table(path, found):
    """The table as CSV, a row for each comparison and statistic."""
    columns = {}
    for stage, part in found.items():
        for name, row in part["statistics"].items():
            cells = {
                "comparison": f"{stage}/initial",
                "statistic": name,
                "instances": part["instances"],
                "images": part["images"],
            }
            cells |= {"initial": row["initial"], "other": row["other"]}
            for key in ("ratio", "difference", "null_ratio", "null_difference"):
                cells |= {
                    key + ending: row[key][part_name]
                    for ending, part_name in (("", "mean"), ("_low", "low"), ("_high", "high"))
                }
            for key, value in (cells | {"p": row["p"]}).items():
                columns.setdefault(key, []).append(value)
    plots.save_csv(path, columns)


def draw(run, found, filter, pool):
    """Ratios with intervals, one panel for each comparison; grey: where the ratio lies when the
    tokens of the two texts are exchanged."""
    fig, axes = plots.plt.subplots(
        1, len(found), figsize=(2.4 + 4.3 * len(found), 4.3), sharey=True, squeeze=False
    )
    places = np.arange(len(STATISTICS))[::-1]
    for ax, (stage, part) in zip(axes[0], found.items()):
        rows = [part["statistics"][name] for name in STATISTICS]
        low, mean, high = (
            np.array([row["null_ratio"][key] for row in rows]) for key in ("low", "mean", "high")
        )
        ax.axvline(1, color=plots.EVEN_COLOR, linewidth=1, zorder=0)
        ax.barh(
            places,
            high - low,
            0.5,
            low,
            color="#C4C4C4",
            label="tokens of the two texts exchanged: mean and 95 %",
        )
        ax.plot(mean, places, "|", color="#555555", markersize=17, markeredgewidth=1.6)
        value, down, up = (
            np.array([row["ratio"][key] for row in rows]) for key in ("mean", "low", "high")
        )
        error = np.clip([value - down, up - value], 0, None)
        ax.errorbar(
            value,
            places,
            xerr=error,
            fmt="o",
            color=plots.color_of(run.label),
            capsize=3,
            markersize=6,
            label="measured, 95 % interval over images",
        )
        for y, x, row in zip(places, value, rows):
            if np.isfinite(x):
                label = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
                ax.text(
                    x,
                    y + 0.31,
                    f"{x:.2f}, p = {row['p']:.3f}",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    bbox=label,
                )
        lengths = (
            f"{part['mean_tokens'][stage]:.0f} against {part['mean_tokens']['initial']:.0f} tokens"
        )
        images = "" if part["images"] == part["instances"] else f" on {part['images']} images"
        ax.set_title(
            f"{stage.capitalize()} against initial answer\nn = {part['instances']}{images}; on"
            f" average {lengths}"
        )
        ax.set(
            xscale="log",
            xlabel=f"ratio {stage} / initial answer",
            ylim=(-0.6, len(STATISTICS) - 0.3),
        )
        ends = np.concatenate(
            [
                low,
                high,
                value[np.isfinite(value)],
                down[np.isfinite(down)],
                up[np.isfinite(up)],
                [0.9, 1.1],
            ]
        )
        ends = ends[np.isfinite(ends) & (ends > 0)]
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(TICKS if ends.max() / ends.min() > 2 else np.arange(1, 31) / 10)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set_xlim(ends.min() / 1.18, ends.max() * 1.18)
        ax.grid(False, axis="y")
    axes[0, 0].set_yticks(places, [NAMES[name] for name in STATISTICS])
    fig.suptitle(
        f"{run.label}: attention to the picture, {CHOSEN[filter]} ({pool.replace('_', '-')} over"
        " layers and heads)",
        fontsize=11,
    )
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    return fig


def draw_maps(run, mean, n, filter, pool):
    """Figure 5 with the revision, and below it the mean over tokens; one scale a row. mean (2, 3,
    rows, columns)."""
    height = 2.7 * mean.shape[2] / mean.shape[3]
    fig, axes = plots.plt.subplots(2, len(STAGES), figsize=(10.2, 2 * max(height, 1.5) + 1.3))
    for row, values, how in zip(
        axes, mean, ("top-l mean over tokens\n(published)", "mean over tokens")
    ):
        for ax, part, stage in zip(row, values, STAGES):
            image = plots.heatmap(
                ax,
                part,
                f"{stage.capitalize()}: mean {part.mean():.4f}",
                values.min(),
                values.max(),
                "",
                "",
            )
            ax.set_aspect("equal")
        fig.colorbar(image, ax=row, label=how, aspect=18)
    pool = pool.replace("_", "-")
    fig.suptitle(
        f"{run.label}: attention to each patch ({pool} over layers and heads)\nn = {n},"
        f" {CHOSEN[filter]}",
        fontsize=11,
    )
    fig.supxlabel("patch column", fontsize=10)
    fig.supylabel("patch row", fontsize=10)
    return fig


def main(argv=None):
    args = parse_args(argv)
    run = rundirs.read_run(args.run_dir, EXPERIMENT)
    records, total = select(run, args.filter)
    rows, maps = measure(run, records, args)
    print(f"{run.label}: {len(records)} of {total} instances, {CHOSEN[args.filter]}")
    for stage, row in rows.items():
        if row["missing"]:
            print(
                f"{stage}: {len(row['missing'])} left out that have none stored, because no"
                " revision was accepted"
            )
        if row["empty"]:
            print(
                f"{stage}: {len(row['empty'])} left out in which a text has no token but the one"
                " that ends it"
            )
    found = {stage: summarise(row, records, stage) for stage, row in rows.items() if row["ids"]}
    if not found:
        raise UsageError(
            f"{run.path}: none of the {len(records)} instances has a token both in its initial"
            " answer and in a feedback or revision"
        )
    show(found)
    settings = run.meta["settings"] | {
        key: getattr(args, key) for key in ("filter", "pool_method", "num_permutations", "seed")
    }
    out = Path(run.path) / "analysis"
    content = {
        "definitions": {name: text.replace("\n", " ") for name, text in NAMES.items()},
        "settings": settings,
        "instances_in_run": total,
    }
    content |= {
        "instances": len(records),
        "left_out": {
            stage: {key: row[key] for key in ("missing", "empty")} for stage, row in rows.items()
        },
    }
    rundirs.write_json(out / "attention_by_stage.json", content | {"comparisons": found})
    print(f"\nwrote {out / 'attention_by_stage.json'}")
    write_table(out / "attention_by_stage.csv", found)
    plots.save(
        draw(run, found, args.filter, args.pool_method), out / "attention_by_stage", settings
    )
    grid = grid_of([records[id] for id in maps["ids"]])
    if grid is None:
        why = (
            "the pictures have no regular grid, or not all the same"
            if maps["ids"]
            else "no instance has all three texts"
        )
        print(f"no stage_maps: {why}")
        for ending in (".png", ".pdf"):
            (out / f"stage_maps{ending}").unlink(
                missing_ok=True
            )  # of an earlier call with another --filter
        return 0
    values = np.array(maps["values"])[..., : grid[0] * grid[1]]
    mean = (
        by_image(values, [str(records[id]["image_id"]) for id in maps["ids"]])
        .mean(0)
        .reshape(2, 3, *grid)
    )
    plots.save(
        draw_maps(run, mean, len(values), args.filter, args.pool_method),
        out / "stage_maps",
        settings | {"vmin": mean.min(), "vmax": mean.max()},
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

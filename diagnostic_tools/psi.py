"""How much does a model's answer depend on where its vision tokens stand? Position sensitivity
index over a list of questions.

    PSI = (accuracy - accuracy with shuffled vision tokens) / accuracy
0: the vision tokens are a bag of features, their order says nothing; 1: every right answer needed
it. Beyond Semantics (arXiv 2503.17349), table 2.

    python diagnostic_tools/psi.py --model_path checkpoints/tiny-llava \\
        --questions data/shapes/questions.json --num_permutations 5
    python diagnostic_tools/psi.py --model_path checkpoints/tiny-llava --analyze_only

The tokens that stand for a place in the picture exchange their contents before the decoder reads
them, at unchanged positions; each of --num_permutations shuffles depends on (--seed, item id, its
number) only. Decoding is greedy. Runs land in <out_root>/psi/<model>[__<run_name>]/; an interrupted
run goes on by the same command. At the end analysis/psi.json and psi.png/.pdf: accuracy per kind of
question with bootstrap 95 % intervals over images, PSI with a paired one. Read it by kind: a
question about a place can lose only what lies above guessing (PSI at most about 0.5 with two
answers), and where the tower itself knows the place of what it sees, as in the tiny models, it
loses nothing. The paper has 1.1 % on VQAv2 and 41 % on questions about places in drawn scenes for
LLaVA-1.5, 61 % for normWmean."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.answers import is_right, read
from vlmdiag.beyond_semantics.position_sensitivity import permutation, psi_interval
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.model.decoding import generate
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.model.vision import entries
from vlmdiag.pictures.samples import load_image, read_questions
from vlmdiag.runs import engine, rundirs

EXPERIMENT = "psi"
QUESTIONS = Path(__file__).resolve().parents[1] / "data" / "shapes" / "questions.json"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        action="append",
        required=True,
        help="folder or hub id; may be given several times",
    )
    parser.add_argument(
        "--questions",
        default=str(QUESTIONS),
        help="JSON list of {image_id, image, question, answer, kind}",
    )
    parser.add_argument(
        "--num_permutations", type=int, default=5, help="shuffles of the vision tokens per question"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles")
    parser.add_argument(
        "--vision_scale",
        type=float,
        default=1.0,
        help="scale the vision embeddings (dose-response)",
    )
    parser.add_argument("--max_questions", type=int, default=None, help="only the first so many")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=1)
    cli.add_run_arguments(parser, "batch", "; then --analyze_only")
    parser.add_argument(
        "--analyze_only",
        action="store_true",
        help="no model: analyse what the run directories hold",
    )
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    for name in ("num_permutations", "max_questions", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} counts from 1")
    if args.overwrite and (args.analyze_only or args.shard != (0, 1)):
        advice = (
            "with --shard start again with --overwrite --max_questions 1 first, with --analyze_only"
            " leave it out"
        )
        raise UsageError(f"--overwrite removes finished results: {advice}")
    return args


def read_list(args):
    """Samples of --questions, each with its answer."""
    if args.questions == str(QUESTIONS) and not QUESTIONS.exists():
        raise UsageError(
            f"{QUESTIONS} is missing: make it with python data/make_shapes.py, or give --questions"
        )
    samples = read_questions(args.questions)[: args.max_questions]
    without = [sample.id for sample in samples if not sample.answer]
    if without:
        raise UsageError(
            f"{args.questions}: {len(without)} questions have no answer to compare with, such as"
            f" {without[0]}"
        )
    return samples


# --- measuring ------------------------------------------------------------------------------------


def shuffled(grid, seed, item_id, k):
    """(P,) which vision token's content each place gets; tokens that stand for no place (row ends)
    stay."""
    order, places = np.arange(len(grid.boxes)), np.flatnonzero(grid.has_box)
    order[places] = places[permutation(seed, item_id, k, len(places))]
    return torch.from_numpy(order)


def make_process(args, vlm):
    """process([(sample, picture), ...]) -> [(record, {}), ...]; the vision tower runs once per
    batch."""

    @torch.inference_mode()
    def process(loaded):
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images)
        if any(grid is None or grid.has_box.sum() < 2 for grid in batch.grids):
            raise UsageError(
                f"{vlm.path}: the vision tokens of {vlm.family.name} stand for no known places, so"
                " there is no order to shuffle"
            )
        features = vlm.vision(batch)
        plain = [[part * args.vision_scale for part in tokens] for tokens in entries(vlm, features)]

        def answer(orders):
            for tokens, own in zip(entries(vlm, features), plain, strict=True):
                tokens[:] = [
                    part[order.to(part.device)] for part, order in zip(own, orders, strict=True)
                ]
            return generate(vlm, batch, args.max_new_tokens, features=features).ids

        rounds = [answer([torch.arange(len(grid.boxes)) for grid in batch.grids])]
        for k in range(args.num_permutations):
            rounds.append(
                answer(
                    [
                        shuffled(grid, args.seed, sample.id, k)
                        for grid, sample in zip(batch.grids, samples, strict=True)
                    ]
                )
            )
        return [
            (record(sample, [ids[row] for ids in rounds], batch.prompts[row]), {})
            for row, sample in enumerate(samples)
        ]

    def judged(ids, answer):
        text = vlm.text(ids)
        return {
            "text": text,
            "read_as": read(text, answer),
            "correct": is_right(text, answer),
            "ids": ids,
        }

    def record(sample, rounds, prompt):
        original, *permuted = (judged(ids, sample.answer) for ids in rounds)
        facts = {
            "image_id": sample.extra["image_id"],
            "file_name": sample.image.name,
            "question": sample.question,
            "answer": sample.answer,
        }
        facts |= {
            "kind": str(sample.extra.get("kind") or "question"),
            "prompt": prompt,
            "caption": original["text"],
        }
        return facts | {"original": original, "permuted": permuted}

    return process


def run_model(args, path):
    """One run directory; returns the engine's counts and the run."""
    samples = read_list(args)
    vlm = load_from_args(args, path)
    vlm.need("decoder-only", "grid")
    names = ("num_permutations", "seed", "vision_scale", "max_new_tokens", "image_aspect")
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt_for(vlm, "QUESTION")[0],
        "questions": "/".join(Path(args.questions).parts[-2:]),
    }
    identity |= {name: getattr(args, name) for name in names}
    free = {
        "model_path": path,
        "questions_file": args.questions,
        "max_questions": args.max_questions,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
    }
    where = rundirs.run_path(args.out_root, path, EXPERIMENT, args.run_name)
    run = rundirs.open_run(where, EXPERIMENT, identity, free, args.overwrite)
    print(
        f"{run.path}: {len(samples)} questions, {args.num_permutations} shuffles each,"
        f" {vlm.family.name} on {vlm.device}, {identity['dtype']}"
    )
    process = make_process(args, vlm)
    counts = engine.run_items(
        run,
        samples,
        lambda s: (s, load_image(s.image)),
        process,
        args.batch_size,
        args.shard,
        args.num_workers,
        progress="questions",
    )
    run.finish()
    return counts, run


# --- analysis -------------------------------------------------------------------------------------


def summarise(records):
    """Accuracy, accuracy with shuffled tokens and PSI of some items, each image counting once.
    Means and intervals over images."""
    right = np.array([record["original"]["correct"] for record in records], float)
    shuffles = np.array(
        [[answer["correct"] for answer in record["permuted"]] for record in records], float
    )
    _, image = np.unique([str(record["image_id"]) for record in records], return_inverse=True)

    def per_image(values):
        return np.bincount(image, values) / np.bincount(image)

    original, permuted = per_image(right), per_image(shuffles.mean(1))
    answers = [[record["original"], *record["permuted"]] for record in records]
    unread = np.array([[answer["read_as"] is None for answer in told] for told in answers], float)
    return {
        "questions": len(records),
        "images": len(original),
        "accuracy": stats.mean_interval(original),
        "accuracy_permuted": stats.mean_interval(permuted),
        "psi": psi_interval(original, permuted),
        "accuracy_by_permutation": [per_image(column).mean() for column in shuffles.T],
        "share_without_a_known_answer": {
            "original": unread[:, 0].mean(),
            "permuted": unread[:, 1:].mean(),
        },
    }


def analyse(run):
    """{'all' or kind: summary}; prints the table, writes analysis/psi.json and the figure."""
    records = run.records()
    if not records:
        raise UsageError(
            f"{run.path} has no finished question yet; run the command that makes it again, without"
            " --analyze_only"
        )
    kinds = sorted({record["kind"] for record in records})
    found = {"all": summarise(records)} | {
        kind: summarise([record for record in records if record["kind"] == kind])
        for kind in kinds
        if len(kinds) > 1
    }
    print(
        f"{run.label}: mean [95 % interval over"
        f" images]\n{'kind':14s}{'questions':>10s}{'images':>8s} "
        f" {'accuracy':20s}{'shuffled':20s}PSI"
    )
    for kind, row in found.items():
        cells = "".join(
            f"{_shown(row[name]):20s}" for name in ("accuracy", "accuracy_permuted", "psi")
        )
        print(f"{kind:14s}{row['questions']:10d}{row['images']:8d}  {cells}".rstrip())
    plain = {
        kind: {name: _plain(value) for name, value in row.items()} for kind, row in found.items()
    }
    content = {
        "definition": "PSI = (accuracy - accuracy_permuted) / accuracy, each image counting once",
        "settings": run.meta["settings"],
        "kinds": plain,
    }
    plots.write_file(
        run.path / "analysis" / "psi.json",
        (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(),
    )
    plots.save(
        draw(run, found),
        run.path / "analysis" / "psi",
        run.meta["settings"] | {"questions_used": len(records)},
    )
    return found


def _shown(interval):
    return f"{interval.mean:.3f} [{interval.low:.2f}, {interval.high:.2f}]"


def _plain(value):
    """Intervals and numpy numbers as JSON holds them, NaN as null."""
    if isinstance(value, stats.Interval):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(run, found):
    """Two bars per kind with intervals: accuracy in order and shuffled; PSI above them."""
    figure, axis = plots.plt.subplots(figsize=(max(5.2, 1.8 + 1.15 * len(found)), 4.6))
    place = np.arange(len(found)) + np.where(
        np.arange(len(found)) > 0, 0.25, 0.0
    )  # all questions stand apart from the kinds
    shuffled_label = f"shuffled (mean of {run.meta['settings']['num_permutations']})"
    for shift, name, label, opacity in (
        (-0.2, "accuracy", "vision tokens in order", 1.0),
        (0.2, "accuracy_permuted", shuffled_label, 0.4),
    ):
        mean, low, high = (
            np.array([row[name][part] for row in found.values()]) for part in range(3)
        )
        error = np.clip([mean - low, high - mean], 0, None)
        axis.bar(
            place + shift, mean, 0.38, color=plots.color_of(run.label), alpha=opacity, label=label
        )
        axis.errorbar(
            place + shift, mean, error, fmt="none", ecolor="#222222", elinewidth=1, capsize=2.5
        )
    for x, row in zip(place, found.values()):
        score = row["psi"]
        interval = "" if math.isnan(score.low) else f"\n[{score.low:.2f}, {score.high:.2f}]"
        text = (
            "PSI undefined\n(none right)"
            if math.isnan(score.mean)
            else f"PSI {score.mean:.2f}{interval}"
        )
        axis.text(x, 1.12, text, ha="center", va="top", fontsize=7.5)
    names = [
        f"{kind.replace('_', ' ')}\n{_counted(row['questions'], 'question')}\n{_counted(row['images'], 'image')}"
        for kind, row in found.items()
    ]
    axis.set_xticks(place, names, fontsize=8)
    axis.set(
        xlim=(min(-0.55, place[-1] / 2 - 1.3), max(place[-1] + 0.55, place[-1] / 2 + 1.3)),
        ylim=(0, 1.24),
    )
    axis.set(
        ylabel="accuracy (95 % interval over images)",
        title=f"{run.label}\nRight answers with vision tokens in order and shuffled",
    )
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.grid(False, axis="x")
    axis.set_axisbelow(True)
    axis.legend(loc="upper right", ncols=2, frameon=False, borderaxespad=0)
    return figure


def _counted(number, thing):
    return f"{number} {thing}{'s' * (number != 1)}"


def main(argv=None):
    args = parse_args(argv)
    code = 0
    for path in args.model_path:
        if args.analyze_only:
            analyse(
                rundirs.read_run(
                    rundirs.run_path(args.out_root, path, EXPERIMENT, args.run_name), EXPERIMENT
                )
            )
            continue
        counts, run = run_model(args, path)
        if args.shard != (0, 1):
            print(
                f"shard {args.shard[0]} of {args.shard[1]} is done; after the last one: the same"
                " command with --analyze_only in place of --shard"
            )
        elif run.ids():
            analyse(run)
        code = max(code, engine.exit_code(counts, run))
    return code


if __name__ == "__main__":
    cli.run(main)

"""Does a model tell depth from height in the picture? Two objects on a corridor's walls, the
farther one as often lower as higher, four yes/no questions.

    python data/make_shapes.py --out_dir data/shapes-tunnel --scene tunnel
    python swap_analysis/spatial_tunnel.py --model_path checkpoints/tiny-llava \\
        --data_dir data/shapes-tunnel
    python swap_analysis/spatial_tunnel_plot.py --run_dir runs/spatial_tunnel/tiny-llava

    p = sigmoid(logit Yes - logit No) at the first generated position, v = p where Yes is right and
    1 - p where No is, averaged over the four questions
    gap = v_consistent - v_counter: pictures whose far object is higher by more than 5 % of the
    height, less those where it is lower
Why Far Looks Up (arXiv 2605.30161), SpatialTunnel. Nothing is generated: one pass over the prompt,
shared by the four questions up to the end of the picture. runs/spatial_tunnel/<model>/ holds
per_image/<id>.json and analysis/summary.json: v and exact match, split, per wording, per cell of
angles, per size. A model without a clue has v = 0.5 throughout; one that reads height off the
picture v_consistent near 1 and v_counter near 0.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.model.decoding import answer_ids
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prefix import first_positions, padded_after, shared_start
from vlmdiag.model.prompts import prompt_for
from vlmdiag.model.vision import embeddings, prefill
from vlmdiag.pictures.samples import Sample, with_picture
from vlmdiag.runs import engine, rundirs
from vlmdiag.scenes.tunnel import ANGLES, SIZES, WORDINGS

EXPERIMENT = "spatial_tunnel"
SPLITS = ("consistent", "counter", "ambiguous")
FIELDS = ("image_id", "image", "part", "instance", "cell", "split", "far", "near", "questions")
HEADLINE = ("v", "v_consistent", "v_counter", "gap")


@dataclass(frozen=True)
class Item:
    """A picture as the engine takes it. entry: its part of tunnel.json."""

    id: str
    image: Path
    entry: dict


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--data_dir",
        default="data/shapes-tunnel",
        help="a set of data/make_shapes.py --scene tunnel",
    )
    parser.add_argument(
        "--max_images",
        type=int,
        default=None,
        help="only the first so many pictures, the grid of angles before the sweep; None: all",
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="pictures in a batch, four prompts each"
    )
    cli.add_run_arguments(parser)
    args = parser.parse_args(argv)
    if args.batch_size < 1 or (args.max_images is not None and args.max_images < 1):
        parser.error("--batch_size and --max_images count from 1")
    return args


def read_set(folder, max_images=None):
    """(items, settings of the set that the pictures depend on). UsageError where the folder is no
    finished tunnel set."""
    folder = Path(folder)
    again = f"make it with data/make_shapes.py --scene tunnel --out_dir {folder}"
    try:
        manifest, entries = (
            json.loads((folder / name).read_bytes()) for name in ("manifest.json", "tunnel.json")
        )
        settings = {name: manifest["settings"][name] for name in ("schema", "scene", "seed")}
        missing = [name for entry in entries for name in FIELDS if name not in entry]
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} is no finished SpatialTunnel set, it has no {Path(error.filename).name};"
            f" {again}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} has a manifest.json or tunnel.json that cannot be read"
            f" ({type(error).__name__}: {error}); {again} --overwrite"
        ) from error
    if missing or not manifest.get("complete"):
        what = (
            f"its tunnel.json lacks {missing[0]}"
            if missing
            else "its manifest.json says that it is not complete"
        )
        raise UsageError(f"{folder} is no finished SpatialTunnel set, {what}; {again}")
    return [
        Item(f"{entry['image_id']:012d}", folder / entry["image"], entry)
        for entry in entries[:max_images]
    ], settings


# --- the model ------------------------------------------------------------------------------------


def yes_no_ids(vlm, prompt):
    """{"Yes": ids, "No": ids}: the first token of each word as it can be spelled after the prompt,
    with a space before it and without."""
    found, lead = {}, vlm.tokenizer(prompt[-1], add_special_tokens=False)["input_ids"]
    for word in ("Yes", "No"):
        spelled = [
            vlm.tokenizer(f"{prompt[-1]}{space}{word}", add_special_tokens=False)["input_ids"]
            for space in ("", " ")
        ]
        found[word] = {answer_ids(vlm, prompt, word)[0]} | {
            ids[len(lead)] for ids in spelled if ids[: len(lead)] == lead and len(ids) > len(lead)
        }
    both = found["Yes"] & found["No"]  # a bare space tells nothing
    if found["Yes"] <= both or found["No"] <= both:
        raise UsageError(
            f"{vlm.path}: Yes and No begin with the same token after its prompt, so their first"
            " tokens cannot be compared"
        )
    return {word: sorted(ids - both) for word, ids in found.items()}


@torch.inference_mode()
def first_logits(vlm, images, questions):
    """Logits of the first generated position, (B, Q, V) float32. images: B pictures; questions: B
    lists of Q texts. The tower runs once a picture. The first question's pass leaves the keys and
    values of the prompt up to the end of the picture, from which the others go on, all in one pass;
    in a family that is not known to be causal each question is a pass over whole prompts."""
    size, numbers = len(images), range(len(questions[0]))

    def encoded(numbers):
        """A batch of these questions of every picture, picture by picture."""
        asked = [
            Sample(f"{row}-{number}", None, questions[row][number])
            for row in range(size)
            for number in numbers
        ]
        return vlm.encode(asked, [images[row] for row in range(size) for _ in numbers])

    if "causal" not in vlm.family.has:
        logits, pictures = [], None
        for batch in (encoded([number]) for number in numbers):
            if (
                pictures != batch.pictures
            ):  # where a connector reads the question, each has features of its own
                pictures, features = batch.pictures, vlm.vision(batch)
            logits.append(prefill(vlm, batch, features).logits[:, -1].float())
        return torch.stack(logits, 1)
    first, others = encoded(numbers[:1]), encoded(numbers[1:])
    if start := shared_start([first, others]):
        first, others = padded_after(first, start), padded_after(others, start)
    features, rows = (
        vlm.vision(first).pooler_output,
        [row for row in range(size) for _ in numbers[1:]],
    )
    output = prefill(
        vlm, first, embeds=embeddings(vlm, first, SimpleNamespace(pooler_output=features))
    )
    cache = None
    if start and torch.equal(
        others.input_ids[:, :start], first.input_ids[rows, :start]
    ):  # else the question stands before the picture
        cache = first_positions(vlm, output.past_key_values, start, rows=torch.tensor(rows))
    embeds = embeddings(vlm, others, SimpleNamespace(pooler_output=[features[row] for row in rows]))
    rest = prefill(vlm, others, cache=cache, embeds=embeds).logits[:, -1]
    return torch.cat([output.logits[:, -1:].float(), rest.float().unflatten(0, (size, -1))], 1)


def make_process(vlm, words):
    """process([(item, picture), ...]) -> [(record, {}), ...]. words: of yes_no_ids."""

    def process(loaded):
        items, images = zip(*loaded, strict=True)
        logits = first_logits(
            vlm,
            images,
            [[asked["question"] for asked in item.entry["questions"]] for item in items],
        )
        yes, no = (logits[..., words[word]].logsumexp(-1) for word in ("Yes", "No"))
        margins, tops = (yes - no).double().cpu().tolist(), logits.argmax(-1).cpu().tolist()
        return [
            (score(item.entry, *row), {}) for item, *row in zip(items, margins, tops, strict=True)
        ]

    def score(entry, margins, tops):
        """An item's record. p (4,), v its mean share of the right answer; said: the first token of
        a greedy answer."""
        answers = [asked["answer"] for asked in entry["questions"]]
        p = [1 / (1 + np.exp(-margin)) for margin in np.clip(margins, -700, 700)]
        shares = [
            value if answer == "Yes" else 1 - value
            for value, answer in zip(p, answers, strict=True)
        ]
        said = [
            next((word for word, ids in words.items() if top in ids), vlm.tokenizer.decode([top]))
            for top in tops
        ]
        known = {
            name: entry[name] for name in ("image_id", "image", "part", "instance", "cell", "split")
        }
        known |= {
            "s1": entry["far"]["size"],
            "s2": entry["near"]["size"],
            "questions": [asked["question"] for asked in entry["questions"]],
        }
        return known | {
            "answers": answers,
            "margin": margins,
            "p": p,
            "v_each": shares,
            "v": float(np.mean(shares)),
            "said": said,
        }

    return process


# --- the summary ----------------------------------------------------------------------------------


def per_question(records):
    """{measure: (n, 4) float} of records: v of each question; accuracy: whether it is over a half;
    exact_match: whether the most probable of all tokens is the right word's; said_yes_or_no:
    whether it is one of the two. NaN where the model gave no number.
    """
    shape, rows = (
        (len(records), len(WORDINGS)),
        lambda tell: [
            [tell(*pair) for pair in zip(r["said"], r["answers"], strict=True)] for r in records
        ],
    )
    v = np.array(
        [[np.nan if value is None else value for value in record["v_each"]] for record in records],
        float,
    ).reshape(shape)
    exact = np.array(rows(lambda said, answer: said == answer), float).reshape(shape)
    spoken = np.array(rows(lambda said, answer: said in ("Yes", "No")), float).reshape(shape)
    return {
        "v": v,
        "accuracy": np.where(np.isnan(v), np.nan, v > 0.5),
        "exact_match": exact,
        "said_yes_or_no": spoken,
    }


def told(interval):
    """An interval as JSON holds it."""
    return {name: np.asarray(value).tolist() for name, value in interval._asdict().items()}


def gap_of(high, low, num_resamples=2000, seed=0):
    """Difference of the means of two groups of pictures (n,) and its bootstrap interval, each group
    resampled by itself. n: of both."""
    high, low = (group[~np.isnan(group)] for group in (high, low))
    mean, ends, rng = (
        stats.measured_mean(high) - stats.measured_mean(low),
        (np.nan, np.nan),
        np.random.default_rng(seed),
    )
    if min(len(high), len(low)) > 1:
        drawn = [
            group[rng.integers(0, len(group), (num_resamples, len(group)))].mean(1)
            for group in (high, low)
        ]
        ends = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return {
        "mean": float(mean),
        "low": float(ends[0]),
        "high": float(ends[1]),
        "n": [len(high), len(low)],
    }


def grid_of(records, values):
    """Values (n,) of pictures as (instances, 16, 16), rows: the far object's angle; NaN where a
    cell has no picture."""
    grid = np.full(
        (max((record["instance"] for record in records), default=-1) + 1, ANGLES, ANGLES), np.nan
    )
    for record, value in zip(records, values, strict=True):
        far, near = record["cell"]
        grid[record["instance"], far, near] = value
    return grid


def summarize(records):
    """What analysis/summary.json says, from the records of a run: everything but "sizes" is about
    the grid of angles. Intervals: bootstrap over pictures, in the sweep over scenes."""
    grid = [record for record in records if record["part"] == "angles"]
    sweep = [record for record in records if record["part"] == "sizes"]
    asked, split = per_question(grid), np.array([record["split"] for record in grid])
    images = {name: stats.measured_mean(values, 1) for name, values in asked.items()} | {
        "all_four_right": asked["exact_match"].all(1).astype(float)
    }
    summary = {}
    for name, values in images.items():
        summary[name] = told(stats.mean_interval(values))
        summary |= {
            f"{name}_{kind}": told(stats.mean_interval(values[split == kind])) for kind in SPLITS
        }
    summary["gap"] = gap_of(images["v"][split == "consistent"], images["v"][split == "counter"])
    wordings = {name: stats.mean_interval(values) for name, values in asked.items()}
    summary["questions"] = {
        name: {"wording": list(WORDINGS)} | told(interval) for name, interval in wordings.items()
    }
    summary["cells"] = told(stats.mean_interval(grid_of(grid, images["v"])))
    sizes = np.full(
        (max((record["instance"] for record in sweep), default=-1) + 1, len(SIZES)), np.nan
    )
    column = {s1: n for n, (s1, _) in enumerate(SIZES)}
    for record, value in zip(sweep, stats.measured_mean(per_question(sweep)["v"], 1), strict=True):
        sizes[record["instance"], column[record["s1"]]] = value
    overall, by_size = (
        stats.mean_interval(stats.measured_mean(sizes, 1)),
        stats.mean_interval(sizes),
    )
    return summary | {"sizes": {"s1": list(column), "v": told(overall), "v_by_s1": told(by_size)}}


def main(argv=None):
    args = parse_args(argv)
    items, made = read_set(args.data_dir, args.max_images)
    vlm = load_from_args(args)
    vlm.need("decoder-only")
    prompt = prompt_for(vlm, "QUESTION")[0]
    words = yes_no_ids(vlm, prompt)
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt,
        "image_aspect": args.image_aspect,
        "data": made,
        "answer_ids": words,
    }
    free = {
        "model_path": args.model_path,
        "data_dir": args.data_dir,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
    }
    run = rundirs.open_run(
        rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name),
        EXPERIMENT,
        identity,
        free,
        args.overwrite,
    )
    print(f"{run.path}: {len(items)} pictures, {vlm.family.name} on {vlm.device}")
    counts = engine.run_items(
        run,
        items,
        with_picture,
        make_process(vlm, words),
        args.batch_size,
        args.shard,
        args.num_workers,
    )
    run.finish()
    summary = summarize(run.records())
    rundirs.write_json(run.path / "analysis" / "summary.json", summary)
    shown = ", ".join(
        f"{name} {summary[name]['mean']:.3f} ({summary[name]['low']:.3f} to"
        f" {summary[name]['high']:.3f})"
        for name in HEADLINE
    )
    print(f"{run.path / 'analysis' / 'summary.json'}: n = {summary['v']['n']}: {shown}")
    return engine.exit_code(counts, run)


if __name__ == "__main__":
    cli.run(main)

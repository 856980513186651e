"""How much does the model look at the picture while it answers, criticises its answer and revises
it?

    python visualize/run_volcano_with_image_attention.py --model-path checkpoints/tiny-llava \\
        --input data/shapes/mmhal_shapes.json \\
        --output-dir outputs/volcano --log runs/volcano.json --visualize-avg-attention-all

Initial answer; then up to --max_iterations times critique, revision and the model's own decision
between current and revised answer (A or B). Each step is a prompt of its own with the picture.
Measured is a[t, l, h, p], the attention of the step that produced token t to vision token p: per
patch the mean of the --hidden-top-k largest over layers, then over heads (top_k_mean), the mean and
the maximum over both. Volcano (arXiv 2311.07362), section 5 and algorithm 1.

The run directory <out_root>/volcano/<model>[__<run_name>]/ holds texts, decisions and the reduced
attention of the initial answer and of the last accepted critique and revision (where none was
accepted: the last ones); an interrupted run goes on by the same command. --log: all texts as one
JSON list. --visualize-avg-attention-all: the published figure, maps averaged over the instances
that the model says it improved. --output-visualization-tensors: <output-dir>/<idx>_<image_id>/ for
text_attention_heatmap.py and image_attention_heatmap.py. analyze_attention_by_stage.py compares the
stages, also without the published figure's length bias."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.answers import is_right, token_spans
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample, load_image, read_mmhal
from vlmdiag.runs import engine, rundirs
from vlmdiag.volcano.conversation import Asker, converse
from vlmdiag.volcano.downloads import picture_of
from vlmdiag.volcano.maps import counted, top_l_mean
from vlmdiag.volcano.protocol import judged

EXPERIMENT = "volcano"
STAGES = ("initial", "feedback", "revision")
POOLS = ("top_k_mean", "mean", "max")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--model_path", default="kaist-ai/volcano-7b", help="folder or hub id")
    parser.add_argument(
        "--input",
        required=True,
        help="JSON list of {image_id, image_src, question, gold_answer or gt_answer}",
    )
    parser.add_argument(
        "--image_root", default=None, help="folder of local pictures; None: the list's"
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="figures, and the folders of --output-visualization-tensors",
    )
    parser.add_argument(
        "--log", default="./logs.json", help="all texts as one JSON list; '' for none"
    )
    parser.add_argument(
        "--instance_idx", default=None, help="comma list of positions in the list, from 0"
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="sample initial answer, critique and revision; the decision is always greedy",
    )
    parser.add_argument("--temperature", type=float, default=0.5, help="of --sample")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and --order random")
    parser.add_argument(
        "--engineered_prompt",
        action="store_true",
        help="critique and revision prompts that forbid the words 'reference answer'",
    )
    parser.add_argument("--max_iterations", type=int, default=3)
    parser.add_argument(
        "--order",
        choices=["fixed", "random"],
        default="fixed",
        help="fixed: A is the current answer; random: by a seeded coin, as in the paper",
    )
    parser.add_argument(
        "--answers",
        default=None,
        help=(
            "JSON list of {image_id, answer}: initial answers that are given, read by teacher"
            " forcing"
        ),
    )
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument(
        "--visualize_avg_attention_all",
        action="store_true",
        help="draw the maps averaged over instances",
    )
    parser.add_argument(
        "--output_visualization_tensors",
        action="store_true",
        help="write what the heatmap scripts read",
    )
    parser.add_argument(
        "--full_tensors",
        action="store_true",
        help="also the attention of every layer and head, (T, L, H, P)",
    )
    parser.add_argument(
        "--pool_method",
        choices=POOLS,
        default="top_k_mean",
        help="over layers and heads, for the averaged maps",
    )
    parser.add_argument(
        "--hidden_top_k", type=int, default=3, help="k of the largest over layers, and over heads"
    )
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published reading of a decision: any letter b accepts",
    )
    parser.add_argument(
        "--allow_private",
        action="store_true",
        help="download from private and loopback addresses too",
    )
    parser.add_argument(
        "--download_dir", default="data/mmhal/downloads", help="where downloaded pictures are kept"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="instances in a batch")
    cli.add_run_arguments(parser)
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    for name in ("max_iterations", "max_new_tokens", "hidden_top_k", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} counts from 1")
    return args


def read_instances(args):
    """Samples of the list that --instance-idx names, or all; id '<position>_<image id>', extra
    'index'."""
    listed = read_mmhal(args.input, args.image_root)
    wanted = range(len(listed))
    if args.instance_idx is not None:
        try:
            wanted = sorted({int(part) for part in args.instance_idx.split(",")})
        except ValueError:
            raise UsageError(
                f"--instance-idx {args.instance_idx}: a comma list of positions was wanted, such as"
                " 3,88"
            ) from None
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(listed):
            raise UsageError(
                f"--instance-idx {args.instance_idx}: {args.input} has {len(listed)} instances,"
                " counted from 0"
            )
    return [
        Sample(
            f"{i}_{listed[i].extra['image_id']}",
            listed[i].image,
            listed[i].question,
            listed[i].answer,
            listed[i].extra | {"index": i},
        )
        for i in wanted
    ]


def read_given(path, instances):
    """{sample id: initial answer} of --answers."""
    try:
        given = {
            str(entry["image_id"]): str(entry["answer"])
            for entry in json.loads(Path(path).read_text())
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--answers {path}: a JSON list of objects with image_id and answer was wanted"
            f" ({error})"
        ) from error
    missing = [
        sample.id
        for sample in instances
        if not given.get(str(sample.extra["image_id"]), "").strip()
    ]
    if missing:
        raise UsageError(
            f"--answers {path} has no answer for {len(missing)} instances, such as {missing[0]}"
        )
    return {sample.id: given[str(sample.extra["image_id"])] for sample in instances}


# --- measuring ------------------------------------------------------------------------------------


def make_process(args, vlm, given):
    @torch.inference_mode()
    def process(loaded):
        samples, images = zip(*loaded, strict=True)
        ask = Asker(args, vlm, samples, images)
        talks = converse(args, ask, samples, given)
        return [
            result(sample, talk, grid)
            for sample, talk, grid in zip(samples, talks, ask.grids, strict=True)
        ]

    def told(answer):
        text, spans = token_spans(
            answer.ids,
            lambda some: vlm.tokenizer.decode(
                some, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
        )
        special = set(vlm.tokenizer.all_special_ids)
        tokens = [
            vlm.tokenizer.decode([i]) if i in special else text[a:b]
            for i, (a, b) in zip(answer.ids, spans, strict=True)
        ]
        facts = {
            "text": text,
            "tokens": tokens,
            "spans": [list(span) for span in spans],
            "ids": answer.ids,
            "ended": answer.ended,
            "prompt": answer.prompt,
        }
        return facts | {
            "prompt_tokens": answer.prompt_tokens,
            "vision_tokens": answer.attention["mean"].shape[1],
        }

    def result(sample, talk, grid):
        extra = {name: sample.extra[name] for name in ("index", "image_id", "image_src")}
        record = extra | {
            "image": str(sample.image),
            "question": sample.question,
            "gold_answer": sample.answer,
            "caption": talk.current,
        }
        record |= {
            "outputs": talk.outputs,
            "feedback": talk.feedbacks,
            "revision": talk.revisions,
            "stop_iter": talk.stop_iter,
        }
        record |= {
            "decisions": talk.decisions,
            "accepted": talk.accepted,
            "enhanced": bool(talk.accepted),
            "given": given is not None,
        }
        told_of = {"initial": talk.outputs[0], "revision": talk.revisions[0], "final": talk.current}
        record["correct"] = {
            name: judged(text, sample.answer, is_right) for name, text in told_of.items()
        }
        record["grid"] = grid and {"shape": grid.shape, "size": grid.size}
        stages = {name: getattr(talk, name) for name in STAGES}
        record["stages"] = {name: answer and told(answer) for name, answer in stages.items()}
        arrays = {} if grid is None else {"boxes": grid.boxes}
        for name, answer in stages.items():
            if answer is not None:
                top = answer.attention["topk"]  # (T, k, H, P)
                heads = np.sort(top.mean(1), axis=1)[:, -args.hidden_top_k :].mean(1)
                arrays |= {
                    f"{name}_top_k_mean": heads,
                    f"{name}_mean": answer.attention["mean"],
                    f"{name}_max": answer.attention["max"],
                }
                if args.output_visualization_tensors:
                    arrays[f"{name}_topk"] = top
                if args.full_tensors:
                    arrays[f"{name}_layers"] = answer.attention["layers"]
        return record, arrays

    return process


# --- what comes out -------------------------------------------------------------------------------


def write_tensors(args, run, sample, vision):
    """<output-dir>/<idx>_<image_id>/visualization_tensors.npz and tokens.json of one instance."""
    record, arrays = run.record(sample.id), run.arrays(sample.id)
    folder = Path(args.output_dir) / sample.id
    kept = {
        name: array
        for name, array in arrays.items()
        if name == "boxes" or name.endswith(("_topk", "_layers"))
    }
    names = ("index", "image_id", "image", "question", "gold_answer", "accepted", "stages", "grid")
    content = {
        "schema": 1,
        "model": run.meta["settings"]["model_name"],
        "hidden_top_k": run.meta["settings"]["hidden_top_k"],
        "vision_encoder": vision,
    }
    rundirs.write_npz(folder / "visualization_tensors.npz", kept)
    own = {name: record[name] for name in names} | {"image": os.path.abspath(record["image"])}
    rundirs.write_json(folder / "tokens.json", content | own)


def write_log(args, run, instances):
    """--log: one object per finished instance, in the list's order."""
    names = (
        "image_id",
        "image_src",
        "question",
        "gold_answer",
        "outputs",
        "feedback",
        "revision",
        "stop_iter",
        "accepted",
        "decisions",
        "correct",
    )
    rows = [
        {name: run.record(sample.id)[name] for name in names}
        for sample in instances
        if run.is_done(sample.id)
    ]
    rundirs.write_json(args.log, rows)
    print(f"wrote {args.log}")


def print_counts(run, instances):
    """What became of right and wrong first answers, in the first revision and in the final answer,
    where the gold answer tells."""
    found = [run.record(sample.id)["correct"] for sample in instances if run.is_done(sample.id)]
    for name in ("revision", "final"):
        pairs = [
            (one["initial"], one[name]) for one in found if None not in (one["initial"], one[name])
        ]
        counts = {
            words: pairs.count(pair)
            for words, pair in (
                ("right stayed right", (True, True)),
                ("right made wrong", (True, False)),
                ("wrong made right", (False, True)),
                ("wrong stayed wrong", (False, False)),
            )
        }
        print(
            f"initial answer to {name}:"
            f" {', '.join(f'{count} {words}' for words, count in counts.items())}"
            f" ({len(found) - len(pairs)} not judged)"
        )


def draw_average(args, run, instances):
    """The published figure: per patch the mean of the l largest steps (l: the shorter of initial
    answer and critique, without stop tokens), averaged over the instances in which the model
    preferred a revision."""
    maps, shape = {name: [] for name in STAGES}, None
    done = [sample.id for sample in instances if run.is_done(sample.id)]
    for id in done:
        record = run.record(id)
        own = {
            name: counted(len(part["tokens"]), part["ended"])
            for name, part in record["stages"].items()
            if part
        }
        if (
            not record["enhanced"]
            or not record["grid"]
            or not record["grid"]["shape"]
            or min(own.values()) < 1
        ):
            continue
        if shape not in (None, record["grid"]["shape"]):
            continue  # another grid cannot be averaged with the first
        shape, arrays = record["grid"]["shape"], run.arrays(id)
        for name, steps in own.items():
            values = arrays[f"{name}_{args.pool_method}"][:steps]
            maps[name].append(top_l_mean(values, min(steps, own["initial"], own["feedback"])))
    count = len(maps["initial"])
    print(
        f"{count} of {len(done)} instances have an accepted revision and a regular grid of one"
        " shape"
    )
    if not count:
        print("so there is no averaged map to draw")
        return
    fig, axes = plots.plt.subplots(1, 3, figsize=(11, 3.9))
    means = {
        name: np.mean(parts, 0)[: shape[0] * shape[1]].reshape(shape)
        for name, parts in maps.items()
    }
    low, high = (
        min(mean.min() for mean in means.values()),
        max(mean.max() for mean in means.values()),
    )
    for ax, (name, mean) in zip(axes, means.items()):
        image = plots.heatmap(
            ax,
            mean,
            f"{name.capitalize()} (mean {mean.mean():.4f})",
            low,
            high,
            "patch column",
            "patch row",
        )
        ax.set_aspect("equal")
    fig.colorbar(
        image,
        ax=axes,
        label=(
            f"attention to the patch, {args.pool_method.replace('_', '-')}\nover layers and heads,"
            " top-l over tokens"
        ),
    )
    fig.suptitle(
        f"{run.label}: {count} instances in which the model preferred its revision", fontsize=10
    )
    tag = ("sample" if args.sample else "greedy") + "_engineered" * args.engineered_prompt
    plots.save(
        fig,
        Path(args.output_dir) / f"{tag}_image_attention_{args.pool_method}",
        run.meta["settings"] | {"instances": count},
    )


def main(argv=None):
    args = parse_args(argv)
    instances = read_instances(args)
    given = read_given(args.answers, instances) if args.answers else None
    vlm = load_from_args(args)
    vlm.need("decoder-only")
    if args.hidden_top_k > len(vlm.parts.layers):
        raise UsageError(
            f"--hidden-top-k {args.hidden_top_k}: {args.model_path} has {len(vlm.parts.layers)}"
            " layers"
        )
    names = (
        "sample",
        "temperature",
        "seed",
        "engineered_prompt",
        "max_iterations",
        "order",
        "max_new_tokens",
        "hidden_top_k",
        "paper_compat",
        "image_aspect",
    )
    names += ("output_visualization_tensors", "full_tensors")
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt_for(vlm, "QUESTION")[0],
        "input": Path(args.input).name,
        "answers": args.answers and Path(args.answers).name,
    }
    identity |= {name: getattr(args, name) for name in names}
    free = {
        "model_path": args.model_path,
        "input_file": args.input,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
    }
    where = rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name)
    run = rundirs.open_run(where, EXPERIMENT, identity, free, args.overwrite)
    print(
        f"{run.path}: {len(instances)} instances, {vlm.family.name} on {vlm.device},"
        f" {identity['dtype']}"
    )

    def load(sample):
        path = picture_of(
            sample.extra["image_src"],
            args.image_root or Path(args.input).parent,
            args.download_dir,
            allow_private=args.allow_private,
        )
        return replace(sample, image=path), load_image(path)

    process = make_process(args, vlm, given)
    counts = engine.run_items(
        run,
        instances,
        load,
        process,
        args.batch_size,
        args.shard,
        args.num_workers,
        progress="instances",
    )
    run.finish()
    if args.output_visualization_tensors:
        encoder = getattr(vlm.model.config, "vision_config", None)
        vision = {
            name: (
                getattr(encoder, name, None)
                if isinstance(getattr(encoder, name, None), int)
                else None
            )
            for name in ("image_size", "patch_size")
        }
        for sample in instances:
            if run.is_done(sample.id):
                write_tensors(args, run, sample, vision)
        print(
            "wrote visualization_tensors.npz and tokens.json of"
            f" {sum(run.is_done(sample.id) for sample in instances)} instances to {args.output_dir}"
        )
    print_counts(run, instances)
    if args.visualize_avg_attention_all:
        draw_average(args, run, instances)
    if args.log:
        write_log(args, run, instances)
    return engine.exit_code(counts, run)


if __name__ == "__main__":
    cli.run(main)

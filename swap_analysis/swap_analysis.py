"""Do hidden states encode spatial axes? Two questions about a picture that differ only in the order
of their objects; the difference of their hidden states should point along one direction for each
relation.

    python swap_analysis/swap_analysis.py --model_type tiny \\
        --data_path data/shapes/swap_pairs_ready.tsv --bbox_file data/shapes/bboxes.json
    python swap_analysis/swap_analysis.py --model_type tiny --merge

    delta = h(swapped) - h(original) at the last prompt token, per layer
    within-category consistency: mean cosine of pairs of deltas; axis coherence: the same after
    right, under and close are flipped;
    vertical-distance entanglement: cosine of the deltas of 'above' and 'far', sign-corrected, in
    quads about the same two objects
Why Far Looks Up (arXiv 2605.30161). Stages, each resumed or run alone by --stage: pairs (the
table), states (the model; memory-mapped, committed pair by pair), metrics and plots. Stages live in
<out_root>/swap_analysis/<model_type>_<scale>/, results in <output_dir>/<model_type>/ (csv, json,
npz, plots). --scales names checkpoints of the table below, or NAME=PATH."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.runs import engine, rundirs
from vlmdiag.swap import figures, figures_scales, metrics, pairs, results
from vlmdiag.swap.saved import find_scales, read_curves, read_json
from vlmdiag.swap.states import load_picture, make_process, open_states

EXPERIMENT = "swap_analysis"
STAGES = ("pairs", "states", "metrics", "plots")
QWEN, NVILA = (
    "ch-min/Qwen2.5-VL-3B-Instruct-data_scale_exp_{}",
    "ch-min/NVILA-Lite-2B-DATA_SCALE_EXP_{}",
)
CHECKPOINTS = {  # by model type: scale -> folder or hub id, as published
    "tiny": (
        {f"scale{n}": f"checkpoints/tiny-llava-scale{n}" for n in (1, 2, 3, 4)}
        | {"full": "checkpoints/tiny-llava"}
    ),
    "known": {
        "correlated": "checkpoints/tiny-llava-scale4",
        "independent": "checkpoints/tiny-llava-independent",
    },
    "qwen": (
        {"vanilla": "Qwen/Qwen2.5-VL-3B-Instruct"}
        | {s: QWEN.format(f"{s}-20251114_120221") for s in ("80k", "400k", "800k")}
        | {"2m": QWEN.format("2m-20260109_120517")}
    ),
    "nvila": (
        {"vanilla": "Efficient-Large-Model/NVILA-Lite-2B"}
        | {s.lower(): NVILA.format(f"{s}-20251108_180221") for s in ("80K", "400K", "800K")}
        | {"2m": NVILA.format("2M-20260205_003632"), "roborefer": "Zhoues/RoboRefer-2B-SFT"}
    ),
    "molmo": {"vanilla": "allenai/Molmo-7B-O-0924"},
    "qwen3": {"32b": "Qwen/Qwen3-VL-32B-Instruct", "235b": "Qwen/Qwen3-VL-235B-A22B-Instruct"},
    "molmo2": {"8b": "allenai/Molmo2-8B"},
    "paligemma": {"3b-pt": "google/paligemma-3b-pt-224", "3b-mix": "google/paligemma-3b-mix-224"},
}


@dataclass(frozen=True)
class Item:
    """A pair as the engine takes it. row: its place in the states."""

    pair: dict
    row: int

    @property
    def id(self):
        return self.pair["id"]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data_path",
        default="data/EmbSpatial-Bench.tsv",
        help="table of ready swap pairs, or of EmbSpatial-Bench",
    )
    parser.add_argument(
        "--model_type",
        required=True,
        help=f"names the results; scales are known for {', '.join(CHECKPOINTS)}",
    )
    parser.add_argument(
        "--scales",
        nargs="+",
        default=None,
        help="which checkpoints, each a known name or NAME=PATH; None: all known ones",
    )
    parser.add_argument(
        "--output_dir",
        default="results",
        help="where csv, json, npz and plots go, in a folder of the model type",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="no model: figures and summary over the scales that have results",
    )
    parser.add_argument(
        "--merge_output_dir",
        default=None,
        help="where a merge goes, in a folder of --group_name; None: the model type's own results",
    )
    parser.add_argument(
        "--group_name",
        default=None,
        help=(
            "folder of a merge, below --merge_output_dir or <output_dir>/compare; None: the model"
            " type"
        ),
    )
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=list(STAGES), help="only these stages"
    )
    parser.add_argument(
        "--phase1_only",
        action="store_true",
        help="no figures: pairs, states, metrics; with --merge only the summary",
    )
    parser.add_argument(
        "--rebuild_metrics",
        action="store_true",
        help="no model: metrics and figures again from the states",
    )
    parser.add_argument(
        "--recommend_layer",
        action="store_true",
        help="no model: print the layer at which the axes are clearest, from saved results",
    )
    parser.add_argument("--recommend_k", type=int, default=3, help="layers that are recommended")
    parser.add_argument(
        "--recommend_frac",
        type=float,
        default=0.07,
        help="share of the last layers that is never recommended",
    )
    parser.add_argument("--max_samples_per_category", type=int, default=200, help="0: all")
    parser.add_argument(
        "--bbox_file",
        default=None,
        help=(
            "boxes of the objects by question id: strata, and quads of vertical and distance"
            " questions"
        ),
    )
    parser.add_argument(
        "--skip_cross_group",
        action="store_true",
        help="no quads, only strata, unless --run_phase_b is given",
    )
    parser.add_argument(
        "--run_phase_b", action="store_true", help="quads are wanted: --bbox_file must be there"
    )
    parser.add_argument("--skip_phase_b", action="store_true", help="no quads, only strata")
    parser.add_argument(
        "--question_type",
        choices=["short_answer", "mcq"],
        default="short_answer",
        help="mcq: the two words as options (A) and (B)",
    )
    parser.add_argument(
        "--no_filtering",
        action="store_true",
        help="keep distance rows about objects called 'unknown' and the like",
    )
    parser.add_argument(
        "--ambiguous_band",
        type=float,
        default=0.05,
        help="difference of heights, a share of the picture's, up to which a pair is ambiguous",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=None,
        help="layers whose states are kept; None: all",
    )
    parser.add_argument(
        "--rep_layers",
        type=int,
        nargs="+",
        default=None,
        help="layers of the vectors and their plots; None: five across the depth",
    )
    parser.add_argument("--state_dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--max_new_tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--seed", type=int, default=42, help="of the draws of pairs and references")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs in a batch")
    cli.add_run_arguments(parser, "batch of the states")
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.max_new_tokens < 1 or args.max_samples_per_category < 0:
        parser.error(
            "--batch_size and --max_new_tokens count from 1, --max_samples_per_category from 0"
        )
    if args.recommend_k < 1 or not 0 <= args.recommend_frac < 1:
        parser.error("--recommend_k counts from 1, --recommend_frac is a share from 0 to below 1")
    if args.run_phase_b and not args.bbox_file:
        parser.error("--run_phase_b needs the objects' boxes: give --bbox_file")
    if args.rebuild_metrics:
        args.stage = ["metrics", "plots"]
    if args.phase1_only:
        args.stage = [stage for stage in args.stage if stage != "plots"]
    return args


def scales_of(args):
    """{scale: folder or hub id} that --scales names."""
    known = CHECKPOINTS.get(args.model_type, {})
    found = {}
    for name in args.scales or known:
        scale, _, path = name.partition("=")
        if not path and scale not in known:
            raise UsageError(
                f"--scales {scale}: known for {args.model_type} are {', '.join(known) or 'none'};"
                f" give others as {scale}=PATH"
            )
        found[scale] = path or known[scale]
    if not found:
        raise UsageError(
            f"--model_type {args.model_type} has no known checkpoint; give --scales NAME=PATH"
        )
    return found


def representative(layers):
    """Five layers across the depth, the last one among them."""
    return sorted({layers[round(share * (len(layers) - 1))] for share in (0.2, 0.4, 0.6, 0.8, 1.0)})


# --- stages ---------------------------------------------------------------------------------------


def read_table(args):
    """(pairs, quads) of --data_path and --bbox_file, rows that gave none reported."""
    choice = args.question_type == "mcq"
    found, left_out = pairs.read_pairs(
        args.data_path, args.seed, args.max_samples_per_category, choice, args.no_filtering
    )
    for why, count in left_out.items():
        print(f"{count} rows left out: {why}")
    quads = []
    if args.bbox_file:
        heights = {
            pair["id"]: pairs.picture_at(args.data_path, pair["offset"]).height
            for pair in found
            if pair["group"] == "distance"
        }
        quads, left_out = pairs.place(
            found, pairs.read_boxes(args.bbox_file), heights, args.ambiguous_band
        )
        for why, count in left_out.items():
            print(f"{count} distance pairs without a quad: {why}")
    if args.skip_phase_b or (args.skip_cross_group and not args.run_phase_b):
        quads = []
    for pair in found:
        pair.setdefault("split", None)
    return found, [quad | {"row": row} for row, quad in enumerate(quads)]


def extract(args, scale, path):
    """The states of one checkpoint; returns the engine's counts and the run."""
    vlm = load_from_args(args, path)
    vlm.need("decoder-only")
    found, quads = read_table(args)
    layers = args.layers or list(range(len(vlm.parts.layers)))
    if not set(layers) <= set(range(len(vlm.parts.layers))):
        raise UsageError(
            f"--layers {layers}: {path} has {len(vlm.parts.layers)} layers, counted from 0"
        )
    identity = identity_of(vlm) | {"scale": scale}
    identity |= {
        "prompt": prompt_for(vlm, "QUESTION")[0],
        "data": args.data_path.rsplit("/", 1)[-1],
        "layers": layers,
        "total_layers": len(vlm.parts.layers),
    }
    identity |= {
        "pairs": len(found),
        "quads": len(quads),
        "boxes": args.bbox_file and args.bbox_file.rsplit("/", 1)[-1],
        "answers": "up to the sentence that decides",
    }
    names = (
        "seed",
        "max_samples_per_category",
        "state_dtype",
        "max_new_tokens",
        "ambiguous_band",
        "image_aspect",
        "question_type",
        "no_filtering",
    )
    identity |= {name: getattr(args, name) for name in names}
    free = {
        "model_path": path,
        "data_path": args.data_path,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
    }
    run = rundirs.open_run(run_of(args, scale), EXPERIMENT, identity, free, args.overwrite)
    for name in ("states.npy", "quad_states.npy") if args.overwrite else ():
        (run.path / name).unlink(missing_ok=True)
    write_lines(run.path / "pairs.jsonl", found)
    write_lines(run.path / "quads.jsonl", quads)
    width = vlm.model.get_input_embeddings().weight.shape[1]
    try:
        states = open_states(
            run.path / "states.npy", (len(found), 2, len(layers), width), args.state_dtype
        )
        quad_states = (
            open_states(
                run.path / "quad_states.npy", (len(quads), 4, len(layers), width), args.state_dtype
            )
            if quads
            else None
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; --overwrite starts again") from error
    process = make_process(
        vlm, layers, states, quad_states, {quad["id"]: quad for quad in quads}, args.max_new_tokens
    )
    items = [Item(pair, row) for row, pair in enumerate(found)]
    print(
        f"{run.path}: {len(found)} pairs, {len(quads)} quads, {len(layers)} layers,"
        f" {vlm.family.name} on {vlm.device}"
    )
    counts = engine.run_items(
        run,
        items,
        load_picture(args.data_path),
        process,
        args.batch_size,
        args.shard,
        args.num_workers,
        progress="pairs",
    )
    run.finish()
    return counts, run


def run_of(args, scale):
    return rundirs.run_path(args.out_root, f"{args.model_type}_{scale}", EXPERIMENT, args.run_name)


def write_lines(path, rows):
    rundirs.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); run --stage pairs states again"
        ) from error


def measure(args, scale):
    """csv, json and npz of one scale from its states."""
    run = rundirs.read_run(run_of(args, scale), EXPERIMENT)
    found, quads, layers = (
        read_lines(run.path / "pairs.jsonl"),
        read_lines(run.path / "quads.jsonl"),
        run.meta["settings"]["layers"],
    )
    done = [run.is_done(pair["id"]) for pair in found]
    if not any(done):
        raise UsageError(f"{run.path} has no finished pair yet; run --stage states first")
    states = np.load(run.path / "states.npy", mmap_mode="r")
    answers = [
        run.record(pair["id"]) if there else None for pair, there in zip(found, done, strict=True)
    ]
    finished = {pair["id"] for pair, there in zip(found, done, strict=True) if there}
    quad_states = np.load(run.path / "quad_states.npy", mmap_mode="r") if quads else None
    quad_done = np.array([quad["id"] in finished for quad in quads], bool)
    results.write_results(
        folder_of(args),
        scale,
        found,
        states,
        answers,
        layers,
        args.rep_layers or representative(layers),
        quads or None,
        quad_states,
        mask=np.array(done),
        quad_mask=quad_done if quads else None,
        total_layers=run.meta["settings"]["total_layers"],
        k=args.recommend_k,
        frac=args.recommend_frac,
    )
    print(
        f"{folder_of(args)}: results of {scale} from {sum(done)} of {len(found)} pairs and"
        f" {quad_done.sum()} quads"
    )


def folder_of(args):
    return Path(args.output_dir) / (
        args.model_type + (f"__{args.run_name}" if args.run_name else "")
    )


def merge(args):
    """Figures and summary over scales, beside the results or, from copies of their JSON files, in a
    folder of the group."""
    folder = folder_of(args)
    order = [*CHECKPOINTS.get(args.model_type, {}), *find_scales(folder)]
    wanted = (
        [scale.partition("=")[0] for scale in args.scales]
        if args.scales
        else list(dict.fromkeys(order))
    )
    scales = [scale for scale in wanted if scale in find_scales(folder)]
    if not scales:
        raise UsageError(
            f"{folder} has no results of {', '.join(wanted)}; run without --merge first"
        )
    if args.merge_output_dir or args.group_name:
        target = Path(args.merge_output_dir or Path(args.output_dir) / "compare") / (
            args.group_name or args.model_type
        )
        (target / "json").mkdir(parents=True, exist_ok=True)
        for path in (folder / "json").iterdir():
            if any(
                re.search(rf"_{re.escape(scale)}(_all_pairs|_both_correct)?\.json$", path.name)
                for scale in scales
            ):
                shutil.copyfile(path, target / "json" / path.name)
        folder = target
    results.write_summary(folder)
    if not args.phase1_only:
        figures_scales.draw_merge(folder, scales, quiet=True)
    print(
        f"{folder}: merged {', '.join(scales)} into csv/summary.csv"
        + (", plots/accuracy and plots/*/cross_scale" if not args.phase1_only else "")
    )
    return 0


def recommend(args):
    """Print the recommended layer of every scale from its saved curves."""
    folder = folder_of(args)
    for scale in find_scales(
        folder, [scale.partition("=")[0] for scale in args.scales] if args.scales else None
    ):
        curves = read_curves(folder, f"sign_corrected_consistency_{scale}_all_pairs")
        before = read_json(folder, f"recommended_layer_{scale}")
        if not curves or not before:
            raise UsageError(
                f"{folder}/json lacks the coherence of {scale}; run --stage metrics again"
            )
        coherence = {
            group: dict(zip(curve["layer"].tolist(), curve["mean"].tolist(), strict=True))
            for group, curve in curves.items()
        }
        found = metrics.recommend_layer(
            coherence,
            before["criteria_applied"]["total_layers"],
            args.recommend_k,
            args.recommend_frac,
        )
        layers = ", ".join(
            f"{one['layer']} ({one['score']:.2f} of the weakest axis' peak)"
            for one in found["top_k"]
        )
        print(
            f"{scale}: layer {layers or 'none'}; candidates {found['candidate_range']}, last one"
            f" allowed {found['cutoff_layer']}"
        )
        for warning in found["warnings"]:
            print(f"{scale}: {warning}")
    return 0


def main(argv=None):
    args = parse_args(argv)
    if args.merge or args.recommend_layer:
        return merge(args) if args.merge else recommend(args)
    worst = 0
    for scale, path in scales_of(args).items():
        try:
            if "states" in args.stage:
                worst = max(worst, engine.exit_code(*extract(args, scale, path)))
            elif "pairs" in args.stage:
                found, quads = read_table(args)
                print(f"{len(found)} pairs, {len(quads)} quads")
            if "metrics" in args.stage:
                measure(args, scale)
            if "plots" in args.stage:
                figures.draw_scale(folder_of(args), scale, quiet=True)
                print(f"{folder_of(args) / 'plots'}: figures of {scale}")
        except UsageError as error:  # the other scales still count
            if len(scales_of(args)) == 1:
                raise
            print(f"error: {scale}: {error}")
            worst = max(worst, 3)
    return worst


if __name__ == "__main__":
    cli.run(main)

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
<out_root>/swap_analysis/<model_type>_<scale>/, results in <out_dir>/<model_type>/ (csv, json,
npz, plots, and index.html, which says what each figure answers). --scales names checkpoints of the
table below, or NAME=PATH."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import disk, rundirs
from vlmdiag.runs.experiment import Worker, run_worker, worker_for
from vlmdiag.runs.inputs import file_digest
from vlmdiag.swap import pairs
from vlmdiag.swap.saved import find_scales, read_curves, read_json

if TYPE_CHECKING:
    from vlmdiag.swap.pairs import Pair, Quad

EXPERIMENT = "swap_analysis"
STAGES = ("pairs", "states", "metrics", "plots")
QWEN = "ch-min/Qwen2.5-VL-3B-Instruct-data_scale_exp_{}"
NVILA = "ch-min/NVILA-Lite-2B-DATA_SCALE_EXP_{}"
# by model type: scale -> folder or hub id, as published
CHECKPOINTS: dict[str, dict[str, str]] = {
    "tiny": (
        {f"scale{n}": f"checkpoints/tiny-llava-scale{n}" for n in (1, 2, 3, 4)}
        | {"full": "checkpoints/tiny-llava"}
    ),
    "known": {
        "correlated": "checkpoints/tiny-llava-scale4",
        "independent": "checkpoints/tiny-llava-independent",
    },
    "smol": {
        "350": "checkpoints/smol-llava-135m-stage2-350",
        "700": "checkpoints/smol-llava-135m-stage2-700",
        "full": "checkpoints/smol-llava-135m",
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


# flags that the states depend on
SETTINGS = (
    "seed",
    "max_samples_per_category",
    "state_dtype",
    "max_new_tokens",
    "ambiguous_band",
    "image_aspect",
    "question_type",
    "no_filtering",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
        "--out_dir",
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
            "folder of a merge, below --merge_output_dir or <out_dir>/compare; None: the model type"
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
        "--all_figures",
        action="store_true",
        help="every figure of every condition and layer; else the few that answer the question",
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
    parser.add_argument(
        "--recommend_k", type=cli.positive, default=3, help="layers that are recommended"
    )
    parser.add_argument(
        "--recommend_frac",
        type=cli.number(0, 0.999),
        default=0.07,
        help="layers behind round(number of layers x (1 - this)) are never recommended",
    )
    parser.add_argument("--max_samples_per_category", type=cli.count, default=200, help="0: all")
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
        type=cli.share,
        default=0.05,
        help="difference of heights, a share of the picture's, up to which a pair is ambiguous",
    )
    parser.add_argument(
        "--layers",
        type=cli.count,
        nargs="+",
        default=None,
        help="layers whose states are kept; None: all",
    )
    parser.add_argument(
        "--rep_layers",
        type=cli.count,
        nargs="+",
        default=None,
        help="layers of the vectors and their plots; None: five across the depth",
    )
    parser.add_argument(
        "--state_dtype",
        choices=["float16", "float32"],
        default="float16",
        help="type in which hidden states are stored",
    )
    parser.add_argument("--max_new_tokens", type=cli.positive, default=8, help="of an answer")
    parser.add_argument(
        "--seed", type=cli.seed, default=42, help="of the draws of pairs and references"
    )
    parser.add_argument("--batch_size", type=cli.positive, default=8, help="pairs in a batch")
    cli.add_run_arguments(parser, "batch of the states")
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if args.run_phase_b and not args.bbox_file:
        parser.error("--run_phase_b needs the objects' boxes: give --bbox_file")
    if args.rebuild_metrics:
        args.stage = ["metrics", "plots"]
    if args.phase1_only:
        args.stage = [stage for stage in args.stage if stage != "plots"]
    return args


def scales_of(args: argparse.Namespace) -> dict[str, str]:
    """{scale: folder or hub id} that --scales names."""
    known = CHECKPOINTS.get(args.model_type, {})
    paths = {}
    for name in args.scales or known:
        scale, _, path = name.partition("=")
        if not path and scale not in known:
            raise UsageError(
                f"--scales {scale}: known for {args.model_type} are {', '.join(known) or 'none'};"
                f" give others as {scale}=PATH"
            )
        paths[scale] = path or known[scale]
    if not paths:
        raise UsageError(
            f"--model_type {args.model_type} has no known checkpoint; give --scales NAME=PATH"
        )
    return paths


def wanted_scales(args: argparse.Namespace) -> list[str] | None:
    """The names of --scales without their paths, None where it is not given."""
    return [name.partition("=")[0] for name in args.scales] if args.scales else None


def representative(layers: Sequence[int]) -> list[int]:
    """Five layers across the depth, the last one among them."""
    return sorted({layers[round(share * (len(layers) - 1))] for share in (0.2, 0.4, 0.6, 0.8, 1.0)})


def run_of(args: argparse.Namespace, scale: str) -> Path:
    """The run directory of a scale's states."""
    return rundirs.run_path(args.out_root, f"{args.model_type}_{scale}", EXPERIMENT, args.run_name)


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of all scales' results."""
    name = f"{args.model_type}__{args.run_name}" if args.run_name else args.model_type
    return Path(args.out_dir) / name


# --- stages ---------------------------------------------------------------------------------------


def read_table(args: argparse.Namespace) -> tuple[list[Pair], list[Quad]]:
    """(pairs, quads) of --data_path and --bbox_file, rows that gave none reported."""
    is_choice = args.question_type == "mcq"
    of_table, left_out = pairs.read_pairs(
        args.data_path, args.seed, args.max_samples_per_category, is_choice, args.no_filtering
    )
    for why, count in left_out.items():
        print(f"{count} rows left out: {why}")
    quads: list[Quad] = []
    if args.bbox_file:
        boxes, sizes = pairs.read_boxes(args.bbox_file)
        heights = pairs.heights_of(args.data_path, of_table, sizes)
        quads, left_out = pairs.place(of_table, boxes, heights, args.ambiguous_band)
        for why, count in left_out.items():
            print(f"{count} distance pairs without a quad: {why}")
    if args.skip_phase_b or (args.skip_cross_group and not args.run_phase_b):
        quads = []
    for pair in of_table:
        pair.setdefault("split", None)
    for row, quad in enumerate(quads):
        quad["row"] = row
    return of_table, quads


def make_worker(args: argparse.Namespace) -> Worker:
    """The states of the checkpoint --model_path, named args.scale."""
    from vlmdiag.runs import engine
    from vlmdiag.swap.states import Item, States, load_picture, make_process, open_states

    scale, path = args.scale, args.model_path
    of_table, quads = read_table(args)
    vlm = load_from_args(args, path)
    vlm.need("decoder-only")
    total_layers = len(vlm.parts.layers)
    layers = args.layers or list(range(total_layers))
    if not set(layers) <= set(range(total_layers)):
        raise UsageError(f"--layers {layers}: {path} has {total_layers} layers, counted from 0")
    if not set(args.rep_layers or layers) <= set(layers):
        raise UsageError(
            f"--rep_layers {args.rep_layers}: the layers whose states are kept are {layers}"
        )
    settings: dict[str, Any] = {
        "scale": scale,
        "data": args.data_path.rsplit("/", 1)[-1],
        "layers": layers,
        "total_layers": total_layers,
        "pairs": len(of_table),
        "quads": len(quads),
        "boxes": args.bbox_file and args.bbox_file.rsplit("/", 1)[-1],
        "boxes_digest": args.bbox_file and file_digest(Path(args.bbox_file)),
        "answers": "up to the sentence that decides",
    }
    settings |= {name: getattr(args, name) for name in SETTINGS}
    free = {"data_path": args.data_path, "batch_size": args.batch_size}
    where = run_of(args, scale)
    states = States(where / "states.npy", args.state_dtype)
    quad_states = States(where / "quad_states.npy", args.state_dtype)
    items = [Item(pair, row) for row, pair in enumerate(of_table)]
    width = vlm.model.get_input_embeddings().weight.shape[1]
    quad_of = {quad["id"]: quad for quad in quads}

    def prepare(run: rundirs.Run, _: Sequence[Item]) -> None:
        if args.overwrite:
            states.path.unlink(missing_ok=True)
            quad_states.path.unlink(missing_ok=True)
        done = engine.done_before(run, items)
        write_lines(run.path / "pairs.jsonl", of_table)
        write_lines(run.path / "quads.jsonl", quads)
        try:
            size = (len(items), 2, len(layers), width)
            open_states(states.path, size, args.state_dtype, len(done))
            if quads:
                size = (len(quads), 4, len(layers), width)
                with_quads = len(done & set(quad_of))
                open_states(quad_states.path, size, args.state_dtype, with_quads)
        except (OSError, ValueError) as error:
            raise UsageError(f"{error}; --overwrite starts again") from error

    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        load_picture(args.data_path),
        make_process(vlm, layers, states, quad_states, quad_of, args.max_new_tokens),
        settings,
        free,
        where,
        args.batch_size,
        "pairs",
        prepare,
    )


def write_lines(path: Path, records: Sequence[Pair] | Sequence[Quad]) -> None:
    """One JSON object a line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    rundirs.write_bytes(path, text.encode())


def read_lines(path: Path) -> list[Any]:
    """What write_lines() wrote."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not all(isinstance(line, dict) and "id" in line for line in lines):
            raise ValueError("its lines are no pairs")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); run --stage pairs states again"
        ) from error
    return lines


def read_states(path: Path, shape: tuple[int, ...], done: np.ndarray) -> np.ndarray:
    """The states of the finished rows, whose states cannot all be zeros. UsageError for a file
    that is missing, damaged or of other pairs."""
    again = "run --stage states again with --overwrite"
    try:
        states: np.ndarray = np.load(path, mmap_mode="r")
    except disk.BROKEN as error:
        raise UsageError(f"{path} cannot be read ({error}); {again}") from error
    if states.shape[:3] != shape or states.ndim != 4 or states.dtype.kind != "f":
        raise UsageError(
            f"{path} has shape {states.shape} and {states.dtype}, numbers of shape"
            f" ({', '.join(map(str, shape))}, d) were wanted; {again}"
        )
    empty = [row for row in np.flatnonzero(done) if not states[row].any()]
    if empty:
        raise UsageError(f"{path} has only zeros for {len(empty)} finished pairs; {again}")
    return states


def measure(args: argparse.Namespace, scale: str) -> None:
    """csv, json and npz of one scale from its states."""
    run = rundirs.read_run(run_of(args, scale), EXPERIMENT)
    of_table: list[Pair] = read_lines(run.path / "pairs.jsonl")
    quads: list[Quad] = read_lines(run.path / "quads.jsonl")
    layers = run.meta["settings"]["layers"]
    is_done = {pair["id"]: run.is_done(pair["id"]) for pair in of_table}
    if not any(is_done.values()):
        raise UsageError(f"{run.path} has no finished pair yet; run --stage states first")
    from vlmdiag.swap import results

    quads_done = np.array([is_done.get(quad["id"], False) for quad in quads], bool)
    if run.meta["settings"]["pairs"] != len(of_table):
        raise UsageError(
            f"{run.path / 'pairs.jsonl'} has {len(of_table)} of {run.meta['settings']['pairs']}"
            " pairs; run --stage pairs states again"
        )
    pairs_done = np.array(list(is_done.values()))
    size = (len(of_table), 2, len(layers))
    states = read_states(run.path / "states.npy", size, pairs_done)
    quad_states = None
    if quads:
        size = (len(quads), 4, len(layers))
        quad_states = read_states(run.path / "quad_states.npy", size, quads_done)
    results.write_results(
        folder_of(args),
        scale,
        of_table,
        states,
        [run.record(id) if done else None for id, done in is_done.items()],
        layers,
        args.rep_layers or representative(layers),
        quads or None,
        quad_states,
        mask=pairs_done,
        quad_mask=quads_done if quads else None,
        total_layers=run.meta["settings"]["total_layers"],
        k=args.recommend_k,
        frac=args.recommend_frac,
    )
    print(
        f"{folder_of(args)}: results of {scale} from {sum(is_done.values())} of {len(of_table)}"
        f" pairs and {quads_done.sum()} quads"
    )


# --- from saved results ---------------------------------------------------------------------------


def merge(args: argparse.Namespace) -> int:
    """Figures and summary over scales, beside the results or, from copies of their JSON files, in a
    folder of the group."""
    folder = folder_of(args)
    saved_scales = find_scales(folder)
    in_order = list(dict.fromkeys([*CHECKPOINTS.get(args.model_type, {}), *saved_scales]))
    wanted = wanted_scales(args) or in_order
    scales = [scale for scale in wanted if scale in saved_scales]
    if not scales:
        raise UsageError(
            f"{folder} has no results of {', '.join(wanted)}; run without --merge first"
        )
    from vlmdiag.swap import figures_scales, index_page, results

    if args.merge_output_dir or args.group_name:
        parent = Path(args.merge_output_dir or Path(args.out_dir) / "compare")
        target = parent / (args.group_name or args.model_type)
        copy_json(folder, target, scales)
        folder = target
    results.write_summary(folder)
    written = "csv/summary.csv"
    if not args.phase1_only:
        figures_scales.draw_merge(folder, scales, quiet=True, all_figures=args.all_figures)
        index_page.write_index(folder)
        written += ", plots/accuracy, plots/*/cross_scale and index.html"
    print(f"{folder}: merged {', '.join(scales)} into {written}")
    return 0


def copy_json(folder: Path, target: Path, scales: Sequence[str]) -> None:
    """Copy the JSON files of some scales."""
    (target / "json").mkdir(parents=True, exist_ok=True)
    names = "|".join(re.escape(scale) for scale in scales)
    of_scales = re.compile(rf"_({names})(_all_pairs|_both_correct)?\.json$")
    for path in (folder / "json").iterdir():
        if of_scales.search(path.name):
            shutil.copyfile(path, target / "json" / path.name)


def recommend(args: argparse.Namespace) -> int:
    """Print the recommended layer of every scale from its saved curves."""
    folder = folder_of(args)
    for scale in find_scales(folder, wanted_scales(args)):
        curves = read_curves(folder, f"sign_corrected_consistency_{scale}_all_pairs")
        before = read_json(folder, f"recommended_layer_{scale}")
        if not curves or not before:
            raise UsageError(
                f"{folder}/json lacks the coherence of {scale}; run --stage metrics again"
            )
        from vlmdiag.swap.metrics import recommend_layer

        coherence = {
            group: dict(zip(curve["layer"].tolist(), curve["mean"].tolist(), strict=True))
            for group, curve in curves.items()
        }
        total_layers = before["criteria_applied"]["total_layers"]
        chosen = recommend_layer(coherence, total_layers, args.recommend_k, args.recommend_frac)
        layers = [
            f"{best['layer']} ({best['score']:.2f} of the weakest axis' peak)"
            for best in chosen["top_k"]
        ]
        print(
            f"{scale}: layer {', '.join(layers) or 'none'}; candidates"
            f" {chosen['candidate_range']}, last one allowed {chosen['cutoff_layer']}"
        )
        for warning in chosen["warnings"]:
            print(f"{scale}: {warning}")
    return 0


def run_scale(args: argparse.Namespace, scale: str, path: str) -> int:
    """The stages of one scale; returns the exit code."""
    code = 0
    if "states" in args.stage:
        code = run_worker(cli.changed(args, scale=scale, model_path=path), make_worker)
    elif "pairs" in args.stage:
        of_table, quads = read_table(args)
        print(f"{len(of_table)} pairs, {len(quads)} quads")
    if "metrics" in args.stage:
        measure(args, scale)
    if "plots" in args.stage:
        from vlmdiag.swap import figures, index_page

        folder = folder_of(args)
        figures.draw_scale(folder, scale, quiet=True, all_figures=args.all_figures)
        print(f"{folder / 'plots'}: figures of {scale}, see {index_page.write_index(folder)}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.merge:
        return merge(args)
    if args.recommend_layer:
        return recommend(args)
    scales = scales_of(args)
    if {"pairs", "states"} & {*args.stage} and not Path(args.data_path).is_file():
        raise UsageError(f"--data_path {args.data_path} cannot be read (no such file)")
    worst = 0
    for scale, path in scales.items():
        try:
            worst = max(worst, run_scale(args, scale, path))
        except UsageError as error:
            # the other scales still count
            if len(scales) == 1:
                raise
            print(f"error: {scale}: {error}")
            worst = max(worst, 3)
    return worst


if __name__ == "__main__":
    cli.run(main)

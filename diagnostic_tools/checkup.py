"""What does my model do? All five diagnoses of one model or several, then one report of them.

    python diagnostic_tools/checkup.py                                  # the embedded models
    python diagnostic_tools/checkup.py --model_path llava-hf/llava-1.5-7b-hf --size paper
    python diagnostic_tools/checkup.py --model_path my/llava --images my/pictures

Each measurement is an ordinary command, printed with --dry_run; its output is in <out>/logs. A
checkup that was stopped goes on where it was. --images: a folder in COCO's layout (val2017/,
annotations/, and clean_questions.json and questions.json if there are any) or one of pictures
alone, which are only described; what needs more, such as swapped questions about places, is asked
about drawn scenes. At the end <out>/report/index.html. Exit code 3: some items failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmdiag import CHECKOUT, cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import PICTURES
from vlmdiag.runs import disk, rundirs

TINY = "checkpoints/tiny-llava"
EMBEDDED = [TINY, f"{TINY}-normWmean", f"{TINY}-multilayerNorm", f"{TINY}-independent"]
BEAT = 60.0  # seconds between lines of a log that is no terminal
# pictures or items of each experiment
SIZES = {
    "quick": {
        "coco": 24,
        "psi": 140,
        "lens": 40,
        "knockout": 24,
        "ablation": 16,
        "relevancy": 12,
        "swap": 16,
        "volcano": 20,
    },
    "paper": {
        "coco": 500,
        "psi": 1000,
        "lens": 500,
        "knockout": 500,
        "ablation": 170,
        "relevancy": 100,
        "swap": 200,
        "volcano": 96,
    },
}


class Step(NamedTuple):
    """One command: what it does, its words after the interpreter."""

    title: str
    words: list[str]


class Data(NamedTuple):
    """The pictures of a checkup. pictures, captions: of attention and lengths; interp: COCO's
    layout; questions, curated: question lists, None where there are none."""

    pictures: Path
    captions: Path
    interp: Path
    questions: Path | None
    curated: Path | None
    shapes: Path  # drawn scenes, for what needs them


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        nargs="+",
        help="folders or hub ids; None: the embedded tiny models, each with the diagnoses that its"
        " variant is about",
    )
    parser.add_argument("--images", help="folder of pictures; None: drawn scenes")
    parser.add_argument(
        "--size", choices=SIZES, default="quick", help="a first look, or numbers to report"
    )
    parser.add_argument("--runs_dir", default="runs", help="run directories")
    parser.add_argument("--results_dir", default="results", help="results of swap_analysis.py")
    parser.add_argument("--out", default="outputs/checkup", help="logs, figures and the report")
    parser.add_argument("--batch_size", type=cli.positive, default=8, help="prompts in a batch")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands and run none of them"
    )
    return parser.parse_args(argv)


# --- the commands ---------------------------------------------------------------------------------


def data_of(args: argparse.Namespace) -> Data:
    """Where the pictures are. UsageError for a folder without any."""
    shapes, interp = CHECKOUT / "data" / "shapes", CHECKOUT / "data" / "shapes-interp"
    if args.images is None:
        return Data(
            shapes / "val2017",
            shapes / "annotations" / "captions_val2017.json",
            interp,
            shapes / "questions.json",
            interp / "clean_questions.json",
            shapes,
        )
    root = Path(args.images).resolve()
    if not root.is_dir():
        raise UsageError(f"--images {args.images}: no such folder")

    def there(path: Path, otherwise: Path | None) -> Path | None:
        return path if path.is_file() else otherwise

    if (root / "annotations" / "instances_val2017.json").is_file():
        return Data(
            root / "val2017",
            root / "annotations" / "captions_val2017.json",
            root,
            there(root / "questions.json", None),
            there(root / "clean_questions.json", None),
            shapes,
        )
    names = sorted(path.name for path in root.iterdir() if path.suffix.lower() in PICTURES)
    if not names:
        raise UsageError(
            f"--images {args.images}: no pictures ({', '.join(sorted(PICTURES))}) in it"
        )
    listed = Path(args.out) / "pictures.json"
    # a folder may grow: pictures that were there before keep their ids
    known = disk.read_json(listed)["images"] if listed.is_file() else []
    ids = {image["file_name"]: image["id"] for image in known}
    for name in names:
        ids.setdefault(name, 1 + max(ids.values(), default=-1))
    images = [{"id": id, "file_name": name} for name, id in ids.items() if name in names]
    rundirs.write_json(listed, {"images": images, "annotations": []})
    return Data(
        root,
        listed.resolve(),
        interp,
        shapes / "questions.json",
        interp / "clean_questions.json",
        shapes,
    )


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """All commands, in their order."""
    data, size = data_of(args), SIZES[args.size]
    shapes = ["data/make_shapes.py", "--out_dir"]
    yield Step("drawn scenes", [*shapes, str(data.shapes), "--num_images", "200", "--seed", "0"])
    scenes = str(CHECKOUT / "data" / "shapes-interp")
    yield Step(
        "drawn scenes with objects",
        [*shapes, scenes, "--num_images", "500", "--num_train", "400", "--seed", "1"],
    )
    swap = CHECKOUT / "data" / "shapes-swap"
    yield Step(
        "drawn scenes for swapped questions",
        [*shapes, str(swap), "--num_images", "400", "--num_train", "0", "--seed", "2"]
        + ["--height_depth_correlation", "0.5"],
    )
    for path in args.model_path or [str(CHECKOUT / model) for model in EMBEDDED]:
        name = rundirs.slug(path)
        all_of_it = args.model_path is not None or path.endswith(TINY)
        if all_of_it or not name.endswith("-independent"):
            yield from beyond_semantics(args, data, size, path)
        if all_of_it:
            yield from interventions(args, data, size, path)
            yield from others(args, data, size, path)
        if all_of_it or name.endswith("-independent"):
            common = ["swap_analysis/swap_analysis.py", "--model_type", name]
            common += ["--scales", f"full={path}", "--out_root", args.runs_dir]
            common += ["--out_dir", args.results_dir, "--bbox_file", str(swap / "bboxes.json")]
            common += ["--data_path", str(swap / "swap_pairs_ready.tsv")]
            limit = ["--max_samples_per_category", str(size["swap"])]
            yield Step(f"swapped questions: {name}", [*common, *limit])
    words = ["diagnostic_tools/report.py", "--runs_dir", args.runs_dir, "--csv"]
    words += ["--results_dir", args.results_dir, "--out", str(Path(args.out) / "report")]
    yield Step("report", words)


def beyond_semantics(
    args: argparse.Namespace, data: Data, size: dict[str, int], path: str
) -> Iterator[Step]:
    name = rundirs.slug(path)
    measure = ["diagnostic_tools/run_coco_diagnostics.py", "--model_path", path]
    measure += ["--image_dir", str(data.pictures), "--ann_file", str(data.captions)]
    measure += ["--out_root", args.runs_dir, "--max_images", str(size["coco"])]
    measure += ["--restrict_to_past", "--max_new_tokens", "32", "--probe_hidden_norms"]
    measure += ["--hidden_norm_kind", "l2", "--batch_size", str(args.batch_size)]
    yield Step(f"attention, lengths, positions: {name}", measure)
    if data.questions is not None:
        psi = ["diagnostic_tools/psi.py", "--model_path", path, "--num_permutations", "2"]
        psi += ["--question_file", str(data.questions), "--out_root", args.runs_dir]
        psi += ["--max_images", str(size["psi"]), "--batch_size", str(args.batch_size)]
        yield Step(f"order of vision tokens: {name}", psi)


def interventions(
    args: argparse.Namespace, data: Data, size: dict[str, int], path: str
) -> Iterator[Step]:
    name, runs = rundirs.slug(path), Path(args.runs_dir)
    common = ["--model_path", path, "--coco_root", str(data.interp), "--out_root", args.runs_dir]

    def limit(experiment: str) -> list[str]:
        return ["--max_images", str(size[experiment])]

    lens = ["scripts/logit_lens/lens_accuracy.py", *common, *limit("lens")]
    yield Step(f"logit lens: {name}", lens)
    mean = runs / "mean_vector" / name
    train = data.interp / "train2017"
    pictures = train if train.is_dir() or data.interp.name == "shapes-interp" else data.pictures
    save = ["scripts/save_post_adapter_acts.py", "--model_path", path, "--image_dir", str(pictures)]
    yield Step(
        f"vision tokens for their mean: {name}",
        [*save, "--out_dir", str(mean), "--max_images", "400"],
    )
    yield Step(f"mean vision token: {name}", ["scripts/calculate_mean_vector.py", str(mean)])
    replaced = ["--mean_tensor", str(mean / "mean_vector.pt"), *limit("ablation")]
    yield Step(
        f"token ablation, descriptions: {name}",
        ["scripts/ablation_experiment.py", *common, *replaced],
    )
    if data.curated is None:
        return
    curated = ["--question_file", str(data.curated)]
    yield Step(
        f"token ablation, questions: {name}",
        ["scripts/ablation_experiment_curate.py", *common, *replaced, *curated],
    )
    knockout = ["scripts/attention_experiment_curate.py", *common, *limit("knockout"), *curated]
    yield Step(f"attention knockout: {name}", knockout)


def others(args: argparse.Namespace, data: Data, size: dict[str, int], path: str) -> Iterator[Step]:
    """Relevancy and Volcano."""
    name = rundirs.slug(path)
    relevancy = ["diagnostic_tools/evaluate_relevancy.py", "--model_path", path]
    relevancy += ["--image_dir", str(data.interp / "val2017"), "--out_root", args.runs_dir]
    relevancy += ["--ann_file", str(data.interp / "annotations" / "instances_val2017.json")]
    relevancy += ["--removal", "mean", "--targets_per_image", "1"]
    yield Step(
        f"faithfulness of relevancy: {name}", [*relevancy, "--max_images", str(size["relevancy"])]
    )
    volcano = ["visualize/run_volcano_with_image_attention.py", "--model_path", path]
    volcano += ["--input", str(data.shapes / "mmhal_shapes.json"), "--log", ""]
    volcano += ["--output_dir", str(Path(args.out) / "volcano"), "--out_root", args.runs_dir]
    yield Step(
        f"answer, criticism, revision: {name}", [*volcano, "--max_images", str(size["volcano"])]
    )


# --- running them ---------------------------------------------------------------------------------


def last_line(log: Path) -> str:
    """What a command said last; of a progress bar its last state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    return next((line for line in reversed(lines) if line), "")


def run_step(number: int, count: int, step: Step, log: Path) -> int:
    """One command, its output in a log; one line on the screen."""
    started = shown = time.monotonic()
    is_terminal = sys.stdout.isatty()
    head = f"[{number:2d} of {count}] {step.title}"
    print(head, end="" if is_terminal else "\n", flush=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *step.words],
            cwd=CHECKOUT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
                now = time.monotonic()
                if is_terminal and now - shown > 1:
                    state = f"{head}: {now - started:.0f} s  {last_line(log)}"
                    print(f"\r\x1b[K{state[:118]}", end="", flush=True)
                    shown = now
                elif not is_terminal and now - shown > BEAT:
                    print(f"  {now - started:.0f} s  {last_line(log)[:100]}", flush=True)
                    shown = now
        except KeyboardInterrupt:
            process.wait()
            raise
    seconds = time.monotonic() - started
    state = {0: "done", 3: "done, some items failed"}.get(code, f"ended with {code}")
    print(f"\r\x1b[K{head}: " if is_terminal else "  ", end="")
    print(f"{state}, {seconds:.0f} s", flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # the commands run in the checkout
    for name in ("runs_dir", "results_dir", "out"):
        setattr(args, name, str(Path(getattr(args, name)).resolve()))
    args.model_path = args.model_path and [
        str(Path(path).resolve()) if Path(path).exists() else path for path in args.model_path
    ]
    planned = list(steps(args))
    if args.dry_run:
        for step in planned:
            print(f"# {step.title}\npython {shlex.join(step.words)}")
        return 0
    logs = Path(args.out) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    worst = 0
    stopped: list[str] = []
    for number, step in enumerate(planned, 1):
        log = logs / f"{number:02d}_{re.sub(r'[^a-z0-9]+', '-', step.title.lower())}.txt"
        code = run_step(number, len(planned), step, log)
        if code in (130, -2):
            raise KeyboardInterrupt
        if code not in (0, 3):
            stopped.append(step.title)
            print(f"  {last_line(log)}\n  its output: {log}")
        worst = max(worst, 3 if code else 0)
    if stopped:
        print(f"not measured: {', '.join(stopped)}")
    print(f"report: {Path(args.out) / 'report' / 'index.html'}")
    return worst


if __name__ == "__main__":
    cli.run(main)

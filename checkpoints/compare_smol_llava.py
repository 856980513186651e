"""What do the five systems say of a published language model that learned to see, beside the tiny
model that was trained from scratch?

    python checkpoints/compare_smol_llava.py              # measures, then writes docs/smol_llava.md
    python checkpoints/compare_smol_llava.py --page_only  # the page again from what was measured

Builds what is missing of smol-llava's folders (build_smol_llava.py), runs the ordinary commands of
each system on both models, and writes the page and its figures. Run again, it goes on where it was:
every command resumes. --images is the size of the smallest experiments; the others are multiples of
it. Some hours on two cores; --only names systems.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmdiag import cli

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODELS = ("tiny-llava", "smol-llava-135m")
# further models of the logit lens: what the warm start planted, and what its control shows
LENS_ONLY = (
    "smol-llava-135m-stage1",
    "smol-llava-135m-permuted-stage1",
    "smol-llava-135m-permuted",
)
BUILT = {  # flags of build_smol_llava.py for each folder
    "smol-llava-135m": [],
    "smol-llava-135m-stage1": ["--stage", "stage1"],
    "smol-llava-135m-stage2-350": ["--stage", "stage2-350"],
    "smol-llava-135m-stage2-700": ["--stage", "stage2-700"],
    "smol-llava-135m-permuted": ["--control"],
    "smol-llava-135m-permuted-stage1": ["--control", "--stage", "stage1"],
}
SYSTEMS = ("semantics", "lens", "interventions", "relevancy", "swap", "volcano")


class Step(NamedTuple):
    """One command. variables: of the environment, for the shell scripts."""

    words: list[str]
    variables: dict[str, str]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--max_images",
        "--images",
        type=cli.whole(2),
        default=20,
        help="pictures of the smallest experiments",
    )
    parser.add_argument(
        "--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="only these systems"
    )
    parser.add_argument("--runs", default="runs/smol_llava", help="run directories")
    parser.add_argument(
        "--out", default="outputs/smol_llava", help="tables and figures of commands"
    )
    parser.add_argument(
        "--page", default=str(ROOT / "docs" / "smol_llava.md"), help="page that is written"
    )
    parser.add_argument("--page_only", action="store_true", help="measure nothing")
    parser.add_argument("--gguf", help="as in build_smol_llava.py, for folders that are missing")
    return parser.parse_args(argv)


def steps(system: str, args: argparse.Namespace) -> Iterator[Step]:
    """The commands of one system on all models."""
    runs, out = Path(args.runs).resolve(), Path(args.out).resolve()

    def shell(script: str, images: int, **variables: str) -> Step:
        common = {"RUNS": str(runs), "MAX_IMAGES": str(images), "PYTHON": sys.executable}
        return Step(["bash", str(ROOT / script)], common | variables)

    folders = {name: str(HERE / name) for name in present((*MODELS, *LENS_ONLY))}
    many, few = 5 * args.max_images, args.max_images
    data = ROOT / "data" / "shapes-interp"
    if system == "semantics":
        both = " ".join(folders[name] for name in MODELS)
        yield shell("diagnostic_tools/run_beyond_semantics.sh", many, MODEL=both, OUT=str(out))
    elif system == "lens":
        make = [sys.executable, str(ROOT / "data/make_shapes.py"), "--out_dir", str(data)]
        yield Step([*make, "--num_images", "500", "--num_train", "400", "--seed", "1"], {})
        for name in folders:
            command = [sys.executable, str(ROOT / "scripts/logit_lens/lens_accuracy.py")]
            command += ["--model_path", folders[name], "--coco_root", str(data)]
            yield Step([*command, "--max_images", str(many), "--out_root", str(runs)], {})
    elif system == "interventions":
        for name in MODELS:
            where = {"MODEL": folders[name], "OUT": str(out / "llava_interp" / name)}
            yield shell("scripts/run_knockout.sh", many, **where)
            yield shell("scripts/run_ablation.sh", few, **where)
    elif system == "relevancy":
        shapes = ROOT / "data" / "shapes-evaluate"
        make = [sys.executable, str(ROOT / "data/make_shapes.py"), "--out_dir", str(shapes)]
        yield Step([*make, "--num_images", "60", "--seed", "3"], {})
        for name in MODELS:
            command = [sys.executable, str(ROOT / "diagnostic_tools/evaluate_relevancy.py")]
            command += ["--model_path", folders[name], "--image_folder", str(shapes / "val2017")]
            command += ["--ann_file", str(shapes / "annotations/instances_val2017.json")]
            command += ["--targets_per_image", "1", "--num_images", str(few)]
            yield Step([*command, "--removal", "mean", "--out_root", str(runs)], {})
    elif system == "swap":
        for kind in ("tiny", "smol"):
            yield shell(
                "swap_analysis/run_tiny.sh",
                few,
                MODEL_TYPE=kind,
                SAMPLES=str(3 * few),
                OUT=str(out / "swap"),
            )
    elif system == "volcano":
        questions = ROOT / "data" / "shapes" / "mmhal_shapes.json"
        for name in MODELS:
            command = [sys.executable, str(ROOT / "visualize/run_volcano_with_image_attention.py")]
            command += ["--model_path", folders[name], "--input", str(questions)]
            command += ["--instance_idx", ",".join(map(str, range(many)))]
            command += ["--output_dir", str(out / "volcano"), "--log", ""]
            yield Step([*command, "--out_root", str(runs), "--visualize_avg_attention_all"], {})
            analyse = [sys.executable, str(ROOT / "visualize/analyze_attention_by_stage.py")]
            yield Step([*analyse, "--run_dir", str(runs / "volcano" / name), "--filter", "all"], {})


def build(args: argparse.Namespace) -> None:
    """The folders that are missing. A part that was not trained is left out, and said."""
    for name, flags in BUILT.items():
        if (HERE / name / "config.json").exists():
            continue
        command = [sys.executable, str(HERE / "build_smol_llava.py"), *flags]
        command += ["--gguf", args.gguf] if args.gguf else []
        try:
            call(Step(command, {}))
        except cli.UsageError as error:
            print(f"{name} is left out: {error}")


def present(names: Sequence[str]) -> list[str]:
    """The models whose folders are there."""
    return [name for name in names if (HERE / name / "config.json").exists()]


def call(step: Step) -> None:
    """Run a command; exit code 3 means that some items failed."""
    start = time.monotonic()
    print(f"\n== {' '.join(Path(word).name for word in step.words[:2])}", flush=True)
    done = subprocess.run(step.words, cwd=ROOT, env=os.environ | step.variables, check=False)
    if done.returncode not in (0, 3):
        raise cli.UsageError(f"{' '.join(step.words)} ended with {done.returncode}")
    print(f"== {time.monotonic() - start:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.page_only:
        build(args)
        for system in args.only:
            for step in steps(system, args):
                call(step)
    from common import load_model
    from vlmdiag.scenes import comparison

    runs, out = Path(args.runs), Path(args.out)
    studies = [
        comparison.Study(HERE / name, runs, out, out / "swap" / name.split("-")[0])
        for name in MODELS
    ]
    for study in studies:
        vlm = load_model(str(study.folder), decoder_layers=0, self_check=False)
        study.before_connector = comparison.norms_before_connector(vlm)
    lens = studies + [comparison.Study(HERE / name, runs, out, out) for name in present(LENS_ONLY)]
    page = Path(args.page)
    page.write_text(comparison.write(studies, lens, page.parent / "figures"))
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Does another commit measure the same to the byte? One command of each kind, run on both.

    # this working tree against a commit
    python benchmarks/same_bytes.py 42be86b
    python benchmarks/same_bytes.py 42be86b --only coco relevancy --keep /tmp/bytes

The commit is checked out beside (git worktree) and every command runs on both trees by its own
command line, on tiny-llava and a few generated pictures, at most two at a time. Compared: every
file that a command writes, byte by byte; of meta.json the settings, in any order. Pictures of
figures are listed apart, for a library that draws is no part of a measurement. Exit code 0: all
alike but for pictures; 3: the files that differ are listed, with the largest difference of arrays
and of numbers in JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlmdiag import CHECKOUT, cli

MODEL = "checkpoints/tiny-llava"
SHAPES, SWAP = "shapes", "shapes-swap"
RUN = f"--model_path {MODEL} --out_root runs"
COCO_FILES = f"--image_dir {SHAPES}/val2017 --ann_file {SHAPES}/annotations/captions_val2017.json"
COCO_FLAGS = "--restrict_to_past --max_new_tokens 24 --probe_hidden_norms --batch_size 3"
OBJECTS = f"--coco_root {SHAPES} --mean_tensor runs/mean_vector/tiny-llava/mean_vector.pt"
CURATED = f"{OBJECTS} --clean_questions_file {SHAPES}/clean_questions.json --max_images 3"
# kind -> commands, each behind what it needs; scripts by their paths in the repository
COMMANDS = {
    "data": [
        f"data/make_shapes.py --out_dir {SHAPES} --num_images 12 --num_train 40 --seed 3",
        f"data/make_shapes.py --out_dir {SWAP} --num_images 40 --num_train 0 --seed 2"
        " --height_depth_correlation 0.5",
    ],
    "coco": [
        f"diagnostic_tools/run_coco_diagnostics.py {RUN} {COCO_FILES} {COCO_FLAGS}"
        " --save_hidden_grid",
        f"diagnostic_tools/run_coco_diagnostics.py {RUN} {COCO_FILES} {COCO_FLAGS}"
        " --strip_system_prompt --paper_compat",
        "diagnostic_tools/analyze_coco_diagnostics.py --run_dir runs/tiny-llava__sp-0",
        "diagnostic_tools/system_prompt_plot.py --run_dir runs/tiny-llava__sp-0",
    ],
    "norms": [
        f"diagnostic_tools/vlm_token_norms.py --model_path {MODEL} --max_images 12"
        f" --caption_file {SHAPES}/annotations/captions_val2017.json"
        f" --image_dir {SHAPES}/val2017 --out_dir outputs/norms"
    ],
    "relevancy": [
        f"diagnostic_tools/relevancy_maps.py {RUN} --image_folder {SHAPES}/val2017 --num_images 4",
        "diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava"
        f" --image_folder {SHAPES}/val2017",
        f"diagnostic_tools/evaluate_relevancy.py {RUN} --image_folder {SHAPES}/val2017"
        f" --ann_file {SHAPES}/annotations/instances_val2017.json --num_images 2"
        " --max_new_tokens 12",
    ],
    "psi": [
        f"diagnostic_tools/psi.py {RUN} --questions {SHAPES}/questions.json --num_permutations 2"
        " --max_questions 12 --batch_size 4"
    ],
    "lens": [
        f"scripts/logit_lens/create_logit_lens.py {RUN} --image_folder {SHAPES}/val2017"
        " --save_folder outputs/lens --num_images 3",
        f"scripts/logit_lens/lens_accuracy.py {RUN} --coco_root {SHAPES} --max_images 6",
    ],
    "mean vector": [
        f"scripts/save_post_adapter_acts.py --model_path {MODEL} --image_dir {SHAPES}/train2017"
        " --save_path runs/mean_vector/tiny-llava",
        "scripts/calculate_mean_vector.py runs/mean_vector/tiny-llava",
    ],
    "ablation": [
        f"scripts/ablation_experiment.py {RUN} {OBJECTS} --max_images 3",
        f"scripts/ablation_experiment_curate.py {RUN} {CURATED}",
    ],
    "knockout": [
        f"scripts/attention_experiment_curate.py {RUN} --coco_root {SHAPES} --max_images 3"
        f" --clean_questions_file {SHAPES}/clean_questions.json",
        "scripts/summarize_results.py --run_dir runs/knockout/tiny-llava --out_dir outputs/interp",
    ],
    "volcano": [
        f"visualize/run_volcano_with_image_attention.py {RUN} --input {SHAPES}/mmhal_shapes.json"
        " --output-dir outputs/volcano --log runs/volcano.json --instance-idx 2 --run_name both"
        " --output-visualization-tensors",
        "visualize/analyze_attention_by_stage.py --run_dir runs/volcano/tiny-llava__both",
        "visualize/text_attention_heatmap.py --input-dir outputs/volcano"
        " --output-dir outputs/volcano --instance-idx 2",
    ],
    "swap": [
        "swap_analysis/swap_analysis.py --model_type tiny --scales scale1 scale4"
        " --output_dir results --out_root runs --max_samples_per_category 12"
        f" --data_path {SWAP}/swap_pairs_ready.tsv --bbox_file {SWAP}/bboxes.json",
        "swap_analysis/swap_analysis.py --model_type tiny --scales scale1 scale4"
        " --output_dir results --out_root runs --merge",
    ],
}
NEEDS = {"ablation": ["mean vector"]}
PICTURES = {".png", ".pdf"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("commit", help="the commit to compare this working tree with")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), help="some kinds of run")
    parser.add_argument("--keep", default=None, help="folder that keeps what both trees wrote")
    return parser.parse_args(argv)


def run_all(tree: Path, folder: Path, kinds: Sequence[str]) -> None:
    """The commands of some kinds on one tree, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").symlink_to(tree / "checkpoints")  # scales are named from there
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    for kind in kinds:
        for command in COMMANDS[kind]:
            script, *flags = command.split()
            words = [sys.executable, str(tree / script), *flags]
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True
            )
            print(f"{tree.name}: {kind}: {script} -> {done.returncode}", flush=True)
            if done.returncode not in (0, 3):
                raise cli.UsageError(f"{tree}: {command}\n{done.stdout}\n{done.stderr}")


def numbers_of(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(place, leaf) of a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_of(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers_of(item, f"{path}[{index}]")
    else:
        yield path, value


def json_difference(old: object, new: object) -> str | None:
    """How two JSON values differ, None if they do not; the order of keys does not count."""
    left, right = dict(numbers_of(old)), dict(numbers_of(new))
    if left.keys() != right.keys():
        names = sorted(left.keys() ^ right.keys())
        return f"{len(names)} places are in one only, such as {names[0]}"
    largest, place = 0.0, ""
    for name, value in left.items():
        other = right[name]
        if isinstance(value, float) and isinstance(other, float):
            if abs(value - other) > largest:
                largest, place = abs(value - other), name
        elif value != other:
            return f"{name}: {value!r} became {other!r}"
    return f"largest difference {largest:.1e} at {place}" if largest else None


def array_difference(old: Path, new: Path) -> str:
    """How two NPZ or NPY files differ."""
    left, right = (np.load(path, allow_pickle=False) for path in (old, new))
    if old.suffix == ".npy":
        left, right = {"array": left}, {"array": right}
    if set(left) != set(right):
        return f"arrays {sorted(set(left) ^ set(right))} are in one only"
    largest = 0.0
    for name in left:
        if left[name].shape != right[name].shape or left[name].dtype != right[name].dtype:
            return f"{name}: {left[name].dtype}{left[name].shape} became {right[name].dtype}"
        if left[name].dtype.kind in "fc":
            gap = np.abs(left[name].astype(float) - right[name].astype(float))
            largest = max(largest, float(np.nanmax(gap, initial=0.0)))
        elif not np.array_equal(left[name], right[name]):
            return f"{name} differs"
    return f"largest difference {largest:.1e}"


def difference(name: Path, before: Path, after: Path) -> str | None:
    """How a file of two folders differs, None if it is alike. Paths of the folders themselves in
    JSON do not count."""
    old, new = before / name, after / name

    def content(folder: Path) -> object:
        return json.loads((folder / name).read_text().replace(str(folder), "."))

    if old.name == "meta.json":
        settings = [json.loads(path.read_text())["settings"] for path in (old, new)]
        for each in settings:
            each.pop("versions", None)
        return json_difference(*settings)
    if old.read_bytes() == new.read_bytes():
        return None
    if old.suffix == ".json":
        contents = [content(folder) for folder in (before, after)]
        if json.dumps(contents[0]) == json.dumps(contents[1]):
            return None
        return json_difference(*contents) or "the same values in other bytes"
    if old.suffix in (".npz", ".npy"):
        return array_difference(old, new)
    return "other bytes"


def is_list_of_times(path: Path) -> bool:
    """Whether a file is a run's cache, which is keyed by the times of files, or says how long the
    run took."""
    is_cache = path.name.startswith("stack-") or path.name == ".checked.json"
    return is_cache or path.parent.name == "counters"


def compare(old: Path, new: Path) -> tuple[list[str], list[str], int]:
    """(differences, figures with other pixels, files compared) of two folders."""
    files = [
        {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file()
            and "checkpoints" not in path.relative_to(folder).parts
            and not is_list_of_times(path)
        }
        for folder in (old, new)
    ]
    lines = [f"{name}: written by one only" for name in sorted(files[0] ^ files[1])]
    pictures = []
    for name in sorted(files[0] & files[1]):
        found = difference(name, old, new)
        if found is not None and name.suffix in PICTURES:
            pictures.append(str(name))
        elif found is not None:
            lines.append(f"{name}: {found}")
    return lines, pictures, len(files[0] & files[1])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    wanted = args.only or list(COMMANDS)
    needed = {other for kind in wanted for other in [*NEEDS.get(kind, []), "data"]}
    kinds = [kind for kind in COMMANDS if kind in {*wanted, *needed}]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary).resolve()
        tree = Path(temporary) / "old"
        git = ["git", "-C", str(CHECKOUT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), args.commit], check=True)
        try:
            with ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(run_all, tree, folder / "before", kinds),
                    pool.submit(run_all, CHECKOUT, folder / "after", kinds),
                ]
                for job in jobs:
                    job.result()
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        lines, pictures, count = compare(folder / "before", folder / "after")
    print(f"{count} files of {', '.join(kinds)} compared with {args.commit}")
    if pictures:
        print(f"{len(pictures)} figures have other bytes: {', '.join(pictures)}")
    print("\n".join(lines) or "all others are alike, byte for byte")
    return 3 if lines else 0


if __name__ == "__main__":
    cli.run(main)

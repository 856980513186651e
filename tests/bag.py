"""A bag of malformed inputs over all scripts: JSON, tables, pictures, runs and model folders, made
of a few kinds of damage and every flag that takes such a thing.

    python -m tests.bag                     # all of it
    python -m tests.bag --every 29          # every 29th case: what the quick tests run

Wanted of each: exit code 2 with one line, or 3 with a failure file; no traceback, less than 4 GB.
Every case is a fork of this process, which has imported torch and transformers. Exit code 0: all
right; 3: the cases that are not, listed.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.kills import MODEL, spawn
from vlmdiag import cli

MEMORY = 4 * 2**30
SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """A command whose flag gets what make(path) puts at a path. may_pass: what is wrong may lie in
    what the command does not read."""

    name: str
    command: str
    make: Callable[[Path], object]
    ending: str = ".json"
    may_pass: bool = False


# --- kinds of damage ------------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'[{"image_id": 1, "image"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "zeros": bytes(100),
    "latin": b'["\xe9\xff"]',
    "number": b"7",
    "text": b'"x"',
    "nothing": b"null",
    "numbers": b"[1, 2, 3]",
    "nulls": b"[null, null]",
    "lists": b"[[], [[]]]",
    "huge number": b'[{"id": 1' + b"0" * 5000 + b"}]",
    "foreign": b'{"hello": [{"x": 1}]}',
    "wrong types": b'{"images": [{"id": [1], "file_name": 3}], "annotations": "x",'
    b' "categories": [{"id": {}, "name": 5}]}',
    "wrong fields": b'[{"image_id": [], "image": {}, "image_src": 4, "question": [],'
    b' "answer": {}}]',
}


def put(data: bytes) -> Callable[[Path], object]:
    """make() that writes bytes."""
    return lambda path: path.write_bytes(data)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says that it has a size, with what may be no picture data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


PICTURES: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no picture",
    "zeros": bytes(1000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "jpeg head": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01",
    "strip": png(60_000, 2, zlib.compress(bytes(60_000))),
    "bomb": png(40_000, 40_000, zlib.compress(bytes(10**6))),
    "no size": png(0, 0),
    "gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    "bmp": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 10**9, 0, 0, 54, 40, -5, 2**30, 1, 24, 9, 0, 0, 0, 0, 0),
}
BASE = (
    "index\tcategory\tgroup\toriginal_question\tswapped_question\toriginal_answer\tswapped_answer"
)
QUESTIONS = (
    "Is the red circle left or right of the blue square?\tIs the blue square left or right of the"
    " red circle?\tleft\tright"
)


def table(cell: bytes) -> bytes:
    """A table of one pair with a picture cell."""
    row = f"\n0\tleft\thorizontal\t{QUESTIONS}\t".encode()
    return f"{BASE}\timage_base64".encode() + row + cell + b"\n"


TABLES: dict[str, bytes] = {
    "empty": b"",
    "header": f"{BASE}\timage_base64\n".encode(),
    "json": b'[{"image_id": 1}]',
    "zeros": bytes(500),
    "binary": bytes(range(256)) * 4,
    "columns": b"a\tb\tc\n1\t2\t3\n",
    "carriage": table(b"a\rb"),
    "quote": table(b'"unclosed'),
    "no picture": table(b""),
    "bad base64": table(b"%%%%"),
    "short row": f"{BASE}\timage_base64\n0\tleft\n".encode(),
    **{f"picture {name}": table(base64.b64encode(data) or b"-") for name, data in PICTURES.items()},
}


# --- cases ----------------------------------------------------------------------------------------

MODEL_FLAG = f"--model_path {MODEL}"
PICS = "--image_dir {data}/val2017"
ANN = "{data}/annotations/instances_val2017.json"
VOLCANO = (
    f"visualize/run_volcano_with_image_attention.py {MODEL_FLAG} --output_dir {{out}} --log ''"
)
# flags that take a JSON file -> the rest of the command; scripts are in diagnostic_tools/ where
# nothing else is said
JSONS = {
    "coco ann_file": f"run_coco_diagnostics.py {MODEL_FLAG} {PICS} --ann_file {{bad}}",
    "coco answers": f"run_coco_diagnostics.py {MODEL_FLAG} {PICS} --ann_file {ANN}"
    " --answers {bad}",
    "token norms": f"vlm_token_norms.py {MODEL_FLAG} {PICS} --caption_file {{bad}}",
    "relevancy": f"relevancy_maps.py {MODEL_FLAG} {PICS} --question_file {{bad}}",
    "evaluate ann": f"evaluate_relevancy.py {MODEL_FLAG} {PICS} --ann_file {{bad}}",
    "evaluate questions": f"evaluate_relevancy.py {MODEL_FLAG} {PICS} --ann_file {ANN}"
    " --question_file {bad}",
    "psi": f"psi.py {MODEL_FLAG} --question_file {{bad}}",
    "hallucination": f"hallucination_warning.py fit {MODEL_FLAG} {PICS} --ann_file {{bad}}",
    "calibration": f"hallucination_warning.py test {MODEL_FLAG} {PICS} --ann_file {ANN}"
    " --calibration {bad}",
    "volcano": f"{VOLCANO} --input {{bad}}",
    "volcano answers": f"{VOLCANO} --input {{data}}/mmhal_shapes.json --answers {{bad}}",
    "curate": f"scripts/ablation_experiment_curate.py {MODEL_FLAG} --coco_root {{data}}"
    " --replacement zeros --question_file {bad}",
    "knockout": f"scripts/attention_experiment_curate.py {MODEL_FLAG} --coco_root {{data}}"
    " --question_file {bad}",
    "boxes": f"swap_analysis/swap_analysis.py --model_type t --scales s={MODEL} --stage pairs"
    " --data_path {data}/swap_pairs_ready.tsv --bbox_file {bad}",
    "convert": "data/convert_questions.py {bad} --out {out}/q.json",
    "meta": "analyze_coco_diagnostics.py --run_dir {folder}",
}
LENS = "scripts/logit_lens/create_logit_lens.py --save_folder {out}/p --out_root {out}"
TARGETS = {
    "lens": f"{LENS} {MODEL_FLAG} --image_dir {{folder}}",
    "relevancy": f"relevancy_maps.py {MODEL_FLAG} --image_dir {{folder}} --max_new_tokens 2"
    " --out_root {out}",
    "acts": f"scripts/save_post_adapter_acts.py {MODEL_FLAG} --image_dir {{folder}}"
    " --save_path {out}/acts",
    "acts size": f"scripts/estimate_acts_size.py {MODEL_FLAG} --image_dir {{folder}}",
    "score": f"hallucination_warning.py score {MODEL_FLAG} --image {{bad}}",
    "attention": f"viz_attention_image.py {MODEL_FLAG} --image {{bad}} --target_word a"
    " --out_dir {out}",
}
SHOW = "check_model.py {folder} --no_weights"
LOAD = f"{LENS} --model_path {{folder}} {PICS} --max_images 1"
WEIGHTS = {"empty": b"", "text": b"weights", "zeros": bytes(2000), "header": b"\xff" * 8 + b"{}"}


def model_with(name: str, data: bytes) -> Callable[[Path], object]:
    """make() of the tiny model's folder with one file in other bytes, the rest as links."""

    def make(path: Path) -> None:
        for file in MODEL.iterdir():
            if file.name != name:
                (path.parent / file.name).symlink_to(file)
        (path.parent / name).write_bytes(data)

    return make


def run_with(ending: str, data: bytes) -> Callable[[Path], object]:
    """make() of a run directory with one file in other bytes."""

    def make(path: Path) -> None:
        run = path.parent
        shutil.copytree(run.parent / "run", run, dirs_exist_ok=True)
        sorted((run / "per_image").glob(f"*.{ending}"))[0].write_bytes(data)

    return make


READERS = {
    "analyze": "diagnostic_tools/analyze_coco_diagnostics.py --run_dir {folder}",
    "shares": "diagnostic_tools/system_prompt_plot.py --run_dir {folder}",
    "grow": f"diagnostic_tools/viz_relevancy.py --run_dir {{folder}} {PICS}",
}


def cases() -> Iterator[Case]:
    """All of them."""
    for flag, command in JSONS.items():
        for kind, data in TEXTS.items():
            out = "" if "{out}" in command or "--run_dir" in command else " --out_root {out}"
            out = out if "out_root" not in command and "data/" not in command[:5] else ""
            if "vlm_token_norms" in command:
                out = " --out_dir {out}"
            name = "meta.json" if flag == "meta" else "bad.json"
            yield Case(f"{flag}: {kind}", command + out, put(data), name)
    for kind, data in TABLES.items():
        command = (
            f"swap_analysis/swap_analysis.py --model_type t --scales s={MODEL} --stage pairs states"
            " --data_path {bad} --out_root {out} --output_dir {out}/results"
        )
        yield Case(f"table: {kind}", command, put(data), "bad.tsv")
    for target, command in TARGETS.items():
        for kind, data in PICTURES.items():
            yield Case(f"{target}: picture {kind}", command, put(data), "bad.png")
    for file in (
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
    ):
        for kind in ("empty", "cut", "deep", "number", "nulls", "foreign", "zeros"):
            # what a file lacks, transformers may know by itself
            may_pass = file != "config.json"
            make = model_with(file, TEXTS[kind])
            yield Case(f"model {file}: {kind}", LOAD, make, "x", may_pass)
            if file == "config.json":
                yield Case(f"outline {file}: {kind}", SHOW, make, "x")
    for kind, data in WEIGHTS.items():
        yield Case(f"model weights: {kind}", LOAD, model_with("model.safetensors", data), "x")
    for reader, command in READERS.items():
        for ending in ("json", "npz"):
            for kind in ("empty", "cut", "deep", "number", "foreign", "zeros"):
                make = run_with(ending, TEXTS[kind])
                yield Case(f"{reader} {ending}: {kind}", command, make, "x", ending == "json")


# --- running --------------------------------------------------------------------------------------


def problem_of(case: Case, work: Path, data: Path) -> str | None:
    """What is wrong with how a command takes a case, None if nothing is."""
    folder = Path(tempfile.mkdtemp(dir=work))
    out = Path(tempfile.mkdtemp(dir=work))
    bad = folder / case.ending
    case.make(bad)
    places = {"bad": bad, "folder": folder, "out": out, "data": data}
    words = [word.format(**places).strip("'") for word in case.command.split()]
    if "/" not in words[0]:
        words[0] = f"diagnostic_tools/{words[0]}"
    log = out / "log"
    child = spawn(words, log)
    code, memory = waited(child)
    said = log.read_text(errors="replace")
    shutil.rmtree(folder, ignore_errors=True)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    shutil.rmtree(out, ignore_errors=True)
    if "Traceback" in said or code not in (0, 2, 3):
        return f"exit code {code}: {said[-300:]}"
    if memory > MEMORY:
        return f"{memory / 2**30:.1f} GB"
    if code == 0 and not case.may_pass:
        return f"taken without a word: {said[-200:]}"
    if code == 2 and len(errors) != 1:
        return f"{len(errors)} lines of error: {said[-300:]}"
    if code == 2 and "--help lists the flags" in errors[0]:
        return f"the command of the case is wrong: {errors[0]}"
    if code == 2 and len(errors[0]) > 1500:
        return f"a line of {len(errors[0])} characters: {errors[0][:200]}"
    return None


def waited(child: int) -> tuple[int, int]:
    """(exit code, most memory in bytes) of a process; one that hangs is killed."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.wait4(child, 0)
    return -signal.SIGKILL, 0


def main(argv: list[str] | None = None) -> int:
    """Run the cases; returns the exit code."""
    parser = cli.parser(__doc__)
    parser.add_argument("--every", type=cli.positive, default=1, help="only every n-th case")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    args = parser.parse_args(argv)
    import matplotlib.pyplot  # noqa: F401 -- so that the forks have them
    import transformers.models.llava.modeling_llava  # noqa: F401

    chosen = [case for case in list(cases())[:: args.every] if args.only in case.name]
    wrong = []
    with tempfile.TemporaryDirectory(prefix="bag-") as scratch:
        work, data = Path(scratch), Path(scratch) / "shapes"
        prepare(work, data)
        for case in chosen:
            problem = problem_of(case, work, data)
            if problem:
                wrong.append(case.name)
                print(f"{case.name}: {problem}", flush=True)
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} malformed inputs are answered in one line")
    return 3 if wrong else 0


def prepare(work: Path, data: Path) -> None:
    """Drawn scenes, and a run over two of them to damage."""
    made = f"data/make_shapes.py --out_dir {data} --num_images 4 --num_train 0 --seed 0".split()
    flags = f"{MODEL_FLAG} --image_dir {data}/val2017"
    flags += f" --ann_file {data}/annotations/captions_val2017.json"
    measured = f"diagnostic_tools/run_coco_diagnostics.py {flags} --max_images 2 --max_new_tokens 2"
    for words in (made, [*measured.split(), "--out_root", str(work / "runs")]):
        code, _ = waited(spawn(words, work / "log"))
        if code:
            raise RuntimeError((work / "log").read_text())
    shutil.copytree(next((work / "runs").glob("*__sp-0")), work / "run")


if __name__ == "__main__":
    sys.exit(main())

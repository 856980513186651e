"""Does a run that is killed anywhere end with the bytes of one that was not?

    python -m tests.kills                                   # every kind of run, six trials each
    python -m tests.kills --kinds coco swap --trials 25 --seed 3

A trial: one or two calls die by SIGKILL, at the n-th file operation (before it, after it, or with
half of the bytes of the n-th file written) or at a random time, alone or as a shard; then the run
goes on, in one call, in shards one after the other, or twice at once; then its bytes are compared
with those of an uninterrupted run. Every call is a fork of this process, which has imported torch
and transformers, so a trial takes seconds. Exit code 0: all alike; 3: problems, listed.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import hashlib
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdiag import CHECKOUT, cli
from vlmdiag.runs import leases

MODEL = CHECKOUT / "checkpoints" / "tiny-llava"
OPERATIONS = ("replace", "fsync", "link", "unlink", "mkdir", "rename")
MODES = ("before", "after", "half")
TIMEOUT = 180.0  # seconds, for one call
KEPT = ("preds.json", ".npy", ".jsonl", ".safetensors", ".pt")


@dataclass(frozen=True)
class Kind:
    """A kind of run: commands that write into a folder, one after the other."""

    commands: Callable[[str, Path], list[list[str]]]  # (folder, data) -> [script, flag, ...]


def _coco(folder: str, data: Path) -> list[list[str]]:
    flags = f"--model_path {MODEL} --image_dir {data}/val2017 --max_images 10 --batch_size 2"
    flags += f" --ann_file {data}/annotations/captions_val2017.json --out_root {folder}"
    flags += " --restrict_to_past --max_new_tokens 4 --probe_hidden_norms"
    return [["diagnostic_tools/run_coco_diagnostics.py", *flags.split()]]


def _swap(folder: str, data: Path) -> list[list[str]]:
    flags = f"--model_type t --scales s={MODEL} --data_path {data}/swap_pairs_ready.tsv"
    flags += f" --bbox_file {data}/bboxes.json --max_samples_per_category 3 --stage states"
    flags += f" --max_new_tokens 2 --batch_size 2 --out_root {folder} --output_dir {folder}/results"
    return [["swap_analysis/swap_analysis.py", *flags.split()]]


def _relevancy(folder: str, data: Path) -> list[list[str]]:
    flags = f"--model_path {MODEL} --image_folder {data}/val2017 --num_images 6 --max_new_tokens 3"
    return [["diagnostic_tools/relevancy_maps.py", *f"{flags} --out_root {folder}".split()]]


def _ablation(folder: str, data: Path) -> list[list[str]]:
    flags = f"--model_path {MODEL} --coco_root {data} --replacement zeros --max_new_tokens 8"
    flags += " --max_images 4 --gradient_steps 2 --draws 1 --min_area 100 --max_area 9000"
    return [["scripts/ablation_experiment.py", *f"{flags} --out_root {folder}".split()]]


def _mean(folder: str, data: Path) -> list[list[str]]:
    flags = f"--model_path {MODEL} --image_dir {data}/train2017 --save_path {folder}/sums"
    return [
        ["scripts/save_post_adapter_acts.py", *f"{flags} --keep_acts".split()],
        ["scripts/calculate_mean_vector.py", f"{folder}/sums"],
    ]


KINDS = {
    "coco": Kind(_coco),
    "swap": Kind(_swap),
    "relevancy": Kind(_relevancy),
    "ablation": Kind(_ablation),
    "mean": Kind(_mean),
}


# --- one call in a fork ---------------------------------------------------------------------------


def die_at(mode: str, nth: int) -> None:
    """In a child: die by SIGKILL at the n-th file operation."""
    count = 0

    def is_due() -> bool:
        nonlocal count
        count += 1
        return count == nth

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            due = is_due()
            if due and mode == "before":
                die()
            result = function(*args, **options)
            if due and mode == "after":
                die()
            return result

        return call

    class HalfWritten:
        """A file of which the first write puts half of its bytes there."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> HalfWritten:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    opened = builtins.open

    def opening(file: Any, how: str = "r", *args: Any, **options: Any) -> Any:
        handle = opened(file, how, *args, **options)
        if set(how) & set("wxa") and str(file) != os.devnull:
            if is_due():
                if mode != "half":
                    die()
                return HalfWritten(handle)
        return handle

    if mode != "half":
        for name in OPERATIONS:
            setattr(os, name, wrapped(getattr(os, name)))
    builtins.open = opening


def spawn(
    command: Sequence[str],
    log: Path,
    kill: tuple[str, int] | None = None,
    before: Callable[[], object] | None = None,
) -> int:
    """Run a script in a fork, `before` first; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [str(CHECKOUT / command[0]), *command[1:]]
        if before is not None:
            before()
        if kill is not None:
            die_at(*kill)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except Exception:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float = TIMEOUT) -> int:
    """Exit code, -signal if a signal ended it; a call that hangs is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """{file: digest} of what a run measured; where and when it ran is in other files."""
    kept = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.name.startswith("."):
            continue  # what a killed call left: removed once it is certainly dead
        if file.is_file() and ("/per_image/" in f"/{name}" or name.endswith(KEPT)):
            kept[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return kept


# --- trials ---------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """Trials of one kind of run."""

    name: str
    data: Path
    work: Path
    rng: random.Random
    kills: int = 0  # calls that died

    def commands(self, folder: Path, shard: str | None = None) -> list[list[str]]:
        """The commands of a run; --shard for the first of them."""
        commands = KINDS[self.name].commands(str(folder), self.data)
        if shard:
            commands[0] += ["--shard", shard]
        return commands

    def reference(self) -> tuple[dict[str, str], float, int]:
        """Bytes of an uninterrupted run, its seconds, and about how many files it opens."""
        folder = self.work / "reference"
        folder.mkdir(parents=True)
        started = time.monotonic()
        codes = [wait(spawn(command, self.work / "log")) for command in self.commands(folder)]
        if any(codes):
            raise cli.UsageError(f"{self.name} fails by itself, see {self.work / 'log'}")
        files = digests(folder)
        return files, time.monotonic() - started, 3 * len(files)

    def interrupted(self, folder: Path, seconds: float, operations: int) -> str:
        """One call that dies; returns how."""
        shard = self.rng.choice((None, None, "0/2", "1/2"))
        command = self.commands(folder, shard)[0]
        if self.rng.random() < 0.3:
            delay = self.rng.random() * seconds
            child = spawn(command, self.work / "log")
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            how = f"after {delay:.2f} s"
        else:
            kill = (self.rng.choice(MODES), self.rng.randrange(1, operations))
            code = wait(spawn(command, self.work / "log", kill))
            how = f"{kill[0]} operation {kill[1]}"
        self.kills += code == -signal.SIGKILL
        return f"shard {shard}, {how}: {code}"

    def trial(self, number: int, seconds: float, operations: int) -> tuple[Path, str, list[int]]:
        """Interrupt, go on; returns folder, story and exit codes of the calls that went on."""
        folder = self.work / f"trial-{number}"
        folder.mkdir()
        calls = self.rng.choice((1, 1, 2))
        story = [self.interrupted(folder, seconds, operations) for _ in range(calls)]
        how = self.rng.choice(("one call", "shards in turn", "twice at once"))
        first = self.commands(folder)[0]
        if how == "shards in turn":
            shards = [self.commands(folder, shard)[0] for shard in ("0/2", "1/2")]
            codes = [wait(spawn(command, self.work / "log")) for command in shards]
        else:
            children = [
                spawn(first, self.work / "log") for _ in range(1 if how == "one call" else 2)
            ]
            codes = [wait(child) for child in children]
        codes += [wait(spawn(command, self.work / "log")) for command in self.commands(folder)[1:]]
        return folder, f"{'; '.join(story)}; then {how}", codes

    def run(self, trials: int) -> list[str]:
        """Lines about trials that did not end in the reference's bytes."""
        reference, seconds, operations = self.reference()
        problems = []
        for number in range(trials):
            folder, story, codes = self.trial(number, seconds, operations)
            files = digests(folder)
            differ = [n for n in {*reference, *files} if reference.get(n) != files.get(n)]
            if differ or any(codes):
                problems.append(f"{self.name}: {story}: exit codes {codes}, {sorted(differ)[:5]}")
            else:
                shutil.rmtree(folder)
        print(
            f"{self.name}: {trials - len(problems)} of {trials} trials end in the same bytes,"
            f" {self.kills} calls killed",
            flush=True,
        )
        return problems


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--trials", type=int, default=6, help="of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of what is interrupted where")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    leases.PERIOD, leases.BEAT = 2.0, 0.2  # so that no call waits a minute for one that was killed
    import torch
    import transformers.models.llava.modeling_llava  # noqa: F401 -- once for all forks

    torch.set_num_threads(1)
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "shapes"
        flags = ["--num_images", "24", "--num_train", "70", "--seed", "0"]
        make = [sys.executable, str(CHECKOUT / "data" / "make_shapes.py"), "--out_dir", str(data)]
        subprocess.run([*make, *flags], check=True, capture_output=True)
        for kind in args.kinds:
            rng = random.Random(f"{args.seed}|{kind}")
            work = Path(temporary) / kind
            problems += Campaign(kind, data, work, rng).run(args.trials)
    print("\n".join(problems) or "no problem")
    return 3 if problems else 0


if __name__ == "__main__":
    cli.run(main)

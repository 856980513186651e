"""Command lines: one parser, one error for wrong usage, one exit-code rule (0 done, 2 usage or
missing input, 3 done with failures).

Kept free of torch, so that --help and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vlmdiag import CHECKOUT

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # a disk, or a quota


class UsageError(Exception):
    """Wrong usage or missing input: printed as one line that says what to do, exit code 2."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The words of a flag, with its default where it has one that says something."""
        if action.required or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _spellings(flag: str) -> list[str]:
    """--model_path and --model-path, the given one first."""
    name = flag[2:]
    return [flag, "--" + name.replace("_", "-"), "--" + name.replace("-", "_")]


class _Parser(argparse.ArgumentParser):
    _given: Sequence[str] = ()  # what is being parsed

    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        """Every long flag is accepted in both spellings: --model_path and --model-path."""
        if flags and flags[0].startswith("--"):
            both = [spelling for flag in flags for spelling in _spellings(flag)]
            flags = tuple(dict.fromkeys(both))
            options.setdefault("dest", flags[0][2:].replace("-", "_"))
        return super().add_argument(*flags, **options)

    def parse_known_args(  # type: ignore[override]  # typeshed's is for any class of namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Keeps what is given, for error()."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line that names the nearest flag for a mistyped one, which may be the very one that
        is missing; exit code 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            message += self._nearest(message.removeprefix(prefix).split())
        elif message.startswith("the following arguments are required: "):
            flags = [word.split("=")[0] for word in self._given if word.startswith("--")]
            unknown = [flag for flag in flags if flag not in self._option_string_actions]
            if unknown:
                message = f"{prefix}{' '.join(unknown)}{self._nearest(unknown)}; {message}"
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

    def _nearest(self, words: list[str]) -> str:
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            nearest = difflib.get_close_matches(word.split("=")[0], known, 1)
            if word.startswith("--") and nearest:
                return f"; did you mean {nearest[0]}?"
        return ""


def parser(description: str | None) -> argparse.ArgumentParser:
    """An ArgumentParser for a script's docstring: defaults in --help, both flag spellings, no
    abbreviations."""
    return _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)


# --- what a flag takes ----------------------------------------------------------------------------


def whole(low: int, high: int = 10**9) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is no whole number from {low} to {high}"
            )
        return value

    return parse


def number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """The type of a flag that takes a number from low (above: more than low) to high, which NaN and
    infinities are not."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            wanted = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is no number {wanted}")
        return value

    return parse


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


positive = whole(1)
count = whole(0)
seed = whole(0, 2**32 - 1)  # what NumPy takes
workers = whole(0, 256)
share = number(0, 1)
temperature = number(0, 1000, above=True)
scale = number(0, 10_000)


def device(text: str) -> str:
    """The type of --device: cpu, cuda, cuda:1 and the like."""
    if not re.fullmatch(r"cpu|(cuda|mps|xpu)(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{_short(text)} is none of cpu, cuda, cuda:N, mps, xpu")
    return text


def device_map(text: str) -> str:
    """The type of --device_map: one of accelerate's ways to spread a model, or a device."""
    if text in ("auto", "balanced", "balanced_low_0", "sequential"):
        return text
    try:
        return device(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{_short(text)} is none of auto, balanced, balanced_low_0, sequential, nor a device"
        ) from None


def ray_workers(text: str) -> int | None:
    """'auto' -> None, else a number of workers."""
    return None if text == "auto" else whole(1, 100_000)(text)


def shard(text: str) -> tuple[int, int]:
    """'i/n' -> (i, n) with 0 <= i < n; 'auto': what SLURM or torchrun say (runs.shards)."""
    if text == "auto":
        from vlmdiag.runs import shards as launchers

        try:
            return launchers.auto(os.environ)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    try:
        index, shards = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{_short(text)} is not of the form i/n, such as 0/4, nor auto"
        ) from None
    if not 0 <= index < shards:
        raise argparse.ArgumentTypeError(
            f"{_short(text)}: shards count from 0, so 0 <= i < n is needed"
        )
    return index, shards


RAY_FLAGS = ("ray_workers", "gpus_per_worker", "cpus_per_worker", "ray_address", "batch_timeout")


def add_claim_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models are variants that a claim is about, where their names do not tell."""
    parser.add_argument(
        "--normalised",
        nargs=2,
        action="append",
        metavar=("VARIANT", "BASE"),
        help=(
            "a model whose connector normalises vision tokens, and the same without; names that end"
            " in -normWmean or -multilayerNorm are known"
        ),
    )
    parser.add_argument(
        "--independent",
        nargs="+",
        metavar="MODEL",
        help=(
            "models that were trained with independent height and distance; names that end in"
            " -independent are known"
        ),
    )


def add_run_arguments(parser: argparse.ArgumentParser, part: str = "batch", then: str = "") -> None:
    """Flags of the scripts that fill a run directory. part: what --shard counts; then: what has to
    follow."""
    add_engine_arguments(parser, part, then)
    parser.add_argument("--out_root", default="runs", help="folder of all run directories")
    parser.add_argument(
        "--run_name", default=None, help="a further part of the run directory's name"
    )


def add_engine_arguments(
    parser: argparse.ArgumentParser, part: str = "batch", then: str = ""
) -> None:
    """Flags that say where the work runs (runs.experiment.run_worker), and --overwrite."""
    parser.add_argument(
        "--num_workers", type=workers, default=2, help="threads that decode pictures"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default="0/1",
        help=f"i/n: only every n-th {part}, from the i-th; auto: as SLURM or torchrun say{then}",
    )
    parser.add_argument(
        "--overwrite", "--no_resume", action="store_true", help="start again instead of going on"
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="local: this process; ray: several processes, on several machines (docs/scale.md)",
    )
    parser.add_argument(
        "--ray_workers",
        type=ray_workers,
        default=None,
        help="processes with a model each, or auto; None: auto, as many as there is room for",
    )
    parser.add_argument(
        "--gpus_per_worker",
        type=number(0, 1024),
        default=None,
        help="GPUs of a worker, 0.5: two share one; None: 1 where there are GPUs",
    )
    parser.add_argument(
        "--cpus_per_worker", type=whole(1, 4096), default=None, help="CPU cores of one; None: 2"
    )
    parser.add_argument(
        "--ray_address",
        default=None,
        help="of a Ray cluster; None: RAY_ADDRESS, else Ray on this machine for this call",
    )
    parser.add_argument(
        "--batch_timeout",
        type=number(0, 10**7, above=True),
        default=None,
        help="seconds after which a batch's worker is ended (--engine ray); None: no limit",
    )


def changed(args: argparse.Namespace, **values: object) -> argparse.Namespace:
    """The arguments with some values in place of what they were: of a script's models one."""
    return argparse.Namespace(**vars(args) | values)


def call(command: str, arguments: Sequence[str]) -> int:
    """Exit code of another command of the checkout, run with these arguments in this folder."""
    return subprocess.run([sys.executable, str(CHECKOUT / command), *arguments]).returncode


CHATS = ("images", "messages", "video")
CHAT_COMMANDS = (
    "check_model.py",
    "create_logit_lens.py",
    "relevancy_maps.py",
    "run_coco_diagnostics.py",
    "viz_attention_image.py",
)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the scripts that take prompts of several pictures or turns (CHAT_COMMANDS)."""
    parser.add_argument("--images", nargs="+", help="several pictures, for one prompt about all")
    parser.add_argument(
        "--messages",
        help="JSON list of {messages, images}: transformers' chat messages, of several turns too",
    )
    parser.add_argument("--video", help="video, for one prompt about its frames (pip install av)")
    parser.add_argument(
        "--frames", type=positive, default=8, help="frames of a video, evenly spaced"
    )


def check_chat(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    instead: Sequence[str] = (),
    not_with: Sequence[str] = (),
) -> None:
    """One way to name the pictures: usage errors where two of CHATS are given, one of them with a
    flag of not_with, or none and a flag of `instead` is missing."""
    given = [name for name in CHATS if getattr(args, name)]
    if not given:
        missing = [f"--{name}" for name in instead if getattr(args, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
    others = [name for name in not_with if getattr(args, name)]
    if len(given) > 1 or given and others:
        parser.error(f"--{given[0]} and --{[*given[1:], *others][0]} name different pictures")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call main() and end the process with its exit code; a UsageError becomes one line and exit
    code 2, and so does an error of any kind where a run that was read turns out to be damaged."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold any bytes
            stream.reconfigure(errors="backslashreplace")
    if "vlmdiag.runs.rundirs" in sys.modules:  # another command ran in this process before
        sys.modules["vlmdiag.runs.rundirs"].READ.clear()
    code: int | None
    try:
        code = main()
        sys.stdout.flush()
    except UsageError as error:
        _complain(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to go on")
        code = 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        code = 141
    except Exception as error:
        # a broken run or our mistake? a run that was read tells whether it is as it was written
        runs = sys.modules.get("vlmdiag.runs.rundirs")
        line = _about_files(error) or (runs and runs.damage())
        if not line:
            raise
        _complain(f"error: {line}")
        code = 2
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what is still to be printed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code or 0)


def _complain(line: str) -> None:
    """Print a line to the standard error, unless a full disk is its file's too."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _about_files(error: Exception) -> str | None:
    """The line for a file that the system does not let us have, whatever command asked for it: no
    permission, a name of more than 255 bytes, a full disk. None for other errors."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in FULL:
        where = f": {error.filename}" if error.filename else ""
        return f"the disk is full or a size limit is reached ({error.strerror}){where}"
    if error.filename is None or isinstance(error, FileNotFoundError):
        return None
    return f"{str(error.filename):.300} cannot be used ({error.strerror})"

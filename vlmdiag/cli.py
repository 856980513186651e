"""Command lines: one parser, one error for wrong usage, one exit-code rule (0 done, 2 usage or
missing input, 3 done with failures).

Kept free of torch, so that --help and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """Wrong usage or missing input: printed as one line that says what to do, exit code 2."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _spellings(flag: str) -> list[str]:
    """--model_path and --model-path, the given one first."""
    name = flag[2:]
    return [flag, "--" + name.replace("_", "-"), "--" + name.replace("-", "_")]


class _Parser(argparse.ArgumentParser):
    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        """Every long flag is accepted in both spellings: --model_path and --model-path."""
        if flags and flags[0].startswith("--"):
            both = [spelling for flag in flags for spelling in _spellings(flag)]
            flags = tuple(dict.fromkeys(both))
            options.setdefault("dest", flags[0][2:].replace("-", "_"))
            # a flag without words still shows its default
            options.setdefault("help", options["dest"].replace("_", " "))
        return super().add_argument(*flags, **options)

    def error(self, message: str) -> NoReturn:
        """One line that names the nearest flag for a mistyped one; exit code 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            message += self._nearest(message.removeprefix(prefix).split())
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


def shard(text: str) -> tuple[int, int]:
    """'i/n' -> (i, n) with 0 <= i < n."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n, such as 0/4") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r}: shards count from 0, so 0 <= i < n is needed")
    return index, count


def add_run_arguments(parser: argparse.ArgumentParser, part: str = "batch", then: str = "") -> None:
    """Flags of the scripts that fill a run directory. part: what --shard counts; then: what has to
    follow."""
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode pictures")
    parser.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        help=f"i/n: only every n-th {part}, from the i-th{then}",
    )
    parser.add_argument("--out_root", default="runs", help="folder of all run directories")
    parser.add_argument(
        "--run_name", default=None, help="a further part of the run directory's name"
    )
    parser.add_argument(
        "--overwrite", "--no_resume", action="store_true", help="start again instead of going on"
    )


TALKS = ("images", "messages", "video")
TALK_COMMANDS = (
    "check_model.py",
    "create_logit_lens.py",
    "relevancy_maps.py",
    "run_coco_diagnostics.py",
    "viz_attention_image.py",
)


def add_talk_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the scripts that take prompts of several pictures or turns (TALK_COMMANDS)."""
    parser.add_argument("--images", nargs="+", help="several pictures, for one prompt about all")
    parser.add_argument(
        "--messages",
        help="JSON list of {messages, images}: transformers' chat messages, of several turns too",
    )
    parser.add_argument("--video", help="video, for one prompt about its frames (pip install av)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a video, evenly spaced")


def check_talk(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    instead: Sequence[str] = (),
    not_with: Sequence[str] = (),
) -> None:
    """One way to name the pictures: usage errors where two of TALKS are given, one of them with a
    flag of not_with, or none and a flag of `instead` is missing."""
    given = [name for name in TALKS if getattr(args, name)]
    if not given:
        missing = [f"--{name}" for name in instead if getattr(args, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
    others = [name for name in not_with if getattr(args, name)]
    if len(given) > 1 or given and others:
        parser.error(f"--{given[0]} and --{[*given[1:], *others][0]} name different pictures")
    if args.frames < 1:
        parser.error("--frames counts from 1")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call main() and end the process with its exit code; a UsageError becomes one line and exit
    code 2."""
    code: int | None
    try:
        code = main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code or 0)

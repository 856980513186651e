"""Does the stethoscope's page keep its memory while it is asked?

    python benchmarks/page_memory.py --num_questions 200 --visitors 20

starts the page on the tiny model, lets visitors after one another choose a picture, ask, and at
times open the panel that keeps most (relevancy), and prints the resident memory of the server as
it goes. "Flat" is the mean of the last quarter of the questions against the second quarter: the
first one fills what is kept.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmdiag import cli

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "diagnostic_tools" / "demo_meta.py"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path", default=str(ROOT / "checkpoints" / "tiny-llava"), help="folder of the model"
    )
    parser.add_argument(
        "--num_questions", type=cli.whole(8), default=200, help="questions of all visitors"
    )
    parser.add_argument("--visitors", type=cli.positive, default=20, help="who share the questions")
    parser.add_argument(
        "--relevancy_every",
        type=cli.positive,
        default=5,
        help="questions, of which one looks at relevancy",
    )
    parser.add_argument(
        "--session_memory",
        type=cli.number(0, 10**9, above=True),
        default=16,
        help="MiB, as of demo_meta.py",
    )
    args = parser.parse_args(argv)
    if args.visitors > args.num_questions:
        parser.error("--visitors is at most --num_questions")
    return args


def resident(pid: int) -> float:
    """MiB of a process's resident memory (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from benchmarks.page_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--model-name", args.model_path, "--port", str(port)]
    command += ["--session_memory", str(args.session_memory), "--no_self_check"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        while "open http" not in server.stdout.readline():
            if server.poll() is not None:
                raise cli.UsageError("the page did not start")
        visitors = [Client(f"http://127.0.0.1:{port}") for _ in range(args.visitors)]
        memory = []
        started = time.monotonic()
        for number in range(args.num_questions):
            visitor = visitors[number * args.visitors // args.num_questions]
            visitor.pick(number % 3)
            visitor.ask(f"Describe the image. ({number})")
            if number % args.relevancy_every == 0:
                visitor.send("compute")
                visitor.send("show", open_panel="relevancy")
            memory.append(resident(server.pid))
            if (number + 1) % max(1, args.num_questions // 10) == 0:
                seconds = time.monotonic() - started
                print(f"{number + 1} questions, {seconds:.0f} s: {memory[-1]:.0f} MiB", flush=True)
    finally:
        server.terminate()
        server.wait(60)
    second, last = (np.array_split(memory, 4)[part].mean() for part in (1, 3))
    print(f"second quarter {second:.0f} MiB, last {last:.0f} MiB: {last - second:+.0f} MiB")
    return 0


if __name__ == "__main__":
    cli.run(main)

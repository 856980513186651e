"""An interpreter for scripts that starts at once: half of a short command's time is the import of
torch and transformers, so a server imports them once and runs every script in a fork of itself.

    with warm.interpreter() as python:  # path of a program to use in place of sys.executable
        subprocess.run([python, "diagnostic_tools/psi.py", "--help"])

The script gets its own arguments, folder, environment, output and exit code, `-W` options too. What
does not begin with the path of a script (`-c`, `-m`) goes to the real interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator


def request(address: str, arguments: list[str]) -> int:
    """Have the server run a script; returns its exit code. Called in a bare interpreter, so only
    the modules above are imported."""
    filters = []
    while arguments[:1] == ["-W"]:
        filters.append(arguments[1])
        arguments = arguments[2:]
    if not arguments or arguments[0].startswith("-"):
        flags = [word for name in filters for word in ("-W", name)]
        os.execv(sys.executable, [sys.executable, *flags, *arguments])
    filters += [name for name in os.environ.get("PYTHONWARNINGS", "").split(",") if name]
    asked = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "filters": filters,
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"."], [1, 2])
        server.sendall(json.dumps(asked).encode())
        server.shutdown(socket.SHUT_WR)
        answer = server.recv(16)
    return int(answer) if answer else 1  # the script's process was killed


def serve(address: str) -> None:
    """Run what is asked for, each in a fork, until the standard input closes."""
    import select
    import signal

    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no one waits for a fork
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            caller, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                answer(caller)
            caller.close()


def prepare() -> None:
    """Import what most scripts import, and draw once, so that the forks have it."""
    import io

    import matplotlib.pyplot as plt
    import pandas  # noqa: F401
    import seaborn  # noqa: F401
    import transformers.models.llava.image_processing_pil_llava
    import transformers.models.llava.modeling_llava
    import transformers.models.llava.processing_llava
    import transformers.models.vipllava.modeling_vipllava  # noqa: F401 -- as loading asks for it

    import common  # noqa: F401
    from vlmdiag.model import loading, selfcheck  # noqa: F401

    figure, axes = plt.subplots()
    axes.set_yscale("log")  # labels with exponents: another font
    for ending in ("png", "pdf"):
        figure.savefig(io.BytesIO(), format=ending)
    plt.close(figure)


def answer(caller: socket.socket) -> None:
    """Run one script and end this process."""
    _, descriptors, _, _ = socket.recv_fds(caller, 1, 2)
    with caller.makefile("rb") as message:
        asked = json.load(message)
    for wanted, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    code = 1
    try:
        code = run(**asked)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):  # a caller that was killed
            caller.send(str(code).encode())
        os._exit(code)


def run(arguments: list[str], folder: str, environment: dict[str, str], filters: list[str]) -> int:
    """Exit code of the script `arguments[0]`, as an interpreter that was started for it."""
    import runpy
    import traceback
    import warnings

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = arguments
    more = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.dirname(os.path.abspath(arguments[0])), *filter(None, more)]
    sys.executable = environment.get("WARM_PYTHON", sys.executable)
    for name in filters:
        if name != "error":
            raise ValueError(f"-W {name}: only -W error is known here")
        warnings.simplefilter("error")
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def interpreter() -> Iterator[str]:
    """Path of a program that runs scripts as sys.executable does."""
    import shutil
    import subprocess
    import tempfile
    from pathlib import Path

    # a socket's path is short: pytest's folders are too deep for it
    folder = Path(tempfile.mkdtemp(prefix="warm-", dir="/tmp"))
    address, program = folder / "socket", folder / "python"
    program.write_text(
        f'#!/bin/sh\nWARM_PYTHON="$0" exec "{sys.executable}" -I -S "{__file__}" "{address}" "$@"\n'
    )
    program.chmod(0o755)
    command = [sys.executable, "-m", "tests.warm", "--serve", str(address)]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        if server.stdout.readline() != "ready\n":
            raise RuntimeError("the server of scripts did not start")
        yield str(program)
        assert server.stdin is not None
        server.stdin.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(request(sys.argv[1], sys.argv[2:]))

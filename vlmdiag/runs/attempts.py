"""What was tried, for items that may end the process which computes them.

    <run>/attempts/<first id>[+<how many more>].txt    a line of JSON before a batch begins; the
                                                       file is gone when the batch is done

An item that ended its process is known by what is left there, also by a call that starts later:
batches of which an item was tried before are told by `tried()`. Kept free of torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from vlmdiag.runs import disk
from vlmdiag.types import Record

FOLDER = "attempts"
HOST = platform.node().split(".")[0] or "host"  # to be read by people


def begin(run: Path, ids: Sequence[str]) -> None:
    """Note that a batch is about to be computed. UsageError where that cannot be written."""
    file = _file(run, ids)
    about = {"ids": list(ids), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "on": HOST}
    try:
        file.parent.mkdir(exist_ok=True)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(about | {"process": os.getpid()}) + "\n")
    except OSError as error:
        raise disk.cannot_write(file, error) from error


def done(run: Path, ids: Sequence[str]) -> None:
    """Forget a batch: nothing in it ended its process."""
    with contextlib.suppress(OSError):
        _file(run, ids).unlink(missing_ok=True)


def undo(run: Path, ids: Sequence[str]) -> None:
    """Forget the last attempt of a batch, which the caller itself broke off."""
    lines = _lines(_file(run, ids))[:-1]
    if not lines:
        done(run, ids)
        return
    with contextlib.suppress(OSError):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        _file(run, ids).write_text(text, encoding="utf-8")


def last(run: Path, ids: Sequence[str]) -> Record:
    """When and where a batch was tried last, {} where that is not seen here."""
    return _about(_lines(_file(run, ids))[-1:] or [{}])[0]


def tried(run: Path) -> dict[str, list[Record]]:
    """{id: its attempts that came to no end}, of the calls before too."""
    attempts: dict[str, list[Record]] = defaultdict(list)
    for file in sorted((run / FOLDER).glob("*.txt")):
        for line in _lines(file):
            for id in line["ids"]:
                attempts[id] += _about([line])
    return attempts


def clear(run: Path, ids: Collection[str]) -> None:
    """Remove what is left of some items, at the end of a call that has been through all of them."""
    for file in (run / FOLDER).glob("*.txt"):
        if any(id in ids for line in _lines(file) for id in line["ids"]):
            with contextlib.suppress(OSError):
                file.unlink()
    with contextlib.suppress(OSError):
        (run / FOLDER).rmdir()


def _file(run: Path, ids: Sequence[str]) -> Path:
    behind = f"+{len(ids) - 1}" if len(ids) > 1 else ""
    return run / FOLDER / f"{ids[0]}{behind}.txt"


def _about(lines: Sequence[Record]) -> list[Record]:
    """Attempts without the items that they were of."""
    return [{name: line[name] for name in line if name != "ids"} for line in lines]


def _lines(file: Path) -> list[Record]:
    """The attempts in a file; a line that was cut short is none."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                attempt = json.loads(line)
                if isinstance(attempt, dict) and isinstance(attempt.get("ids"), list):
                    found.append(attempt)
    return found

"""What was found whole before, so that a call that goes on reads it only once: sizes and times of
an item's files, of packs and of pictures, with what is wanted of them.

    .checked.json

A file that has another size or time now than then is read again; so is one that had been written
less than two seconds before this list, by the file server's clock, because within that time a file
may change and keep both. Kept free of torch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk
from vlmdiag.types import Record

NAME = ".checked.json"  # in the run directory
SCHEMA = 1
RECENT = 2 * 10**9  # nanoseconds; FAT counts time in steps of two seconds
CHECKS = "checks"  # in an item's JSON: digests of its record, of its NPZ and of its inputs

Sign = tuple[int, int, int]  # size, time of content, time of any change


class Facts(NamedTuple):
    """What a call that goes on wants to know of a finished item: the digest of its inputs, and
    [image_id, caption] if it has a caption."""

    inputs: str | None
    pred: list[object] | None


def facts_of(id: str, content: Record) -> Facts:
    """The facts of an item by its JSON."""
    checks = content.get(CHECKS)
    inputs = checks.get("inputs") if isinstance(checks, dict) else None
    caption = content.get("caption")
    return Facts(inputs, None if caption is None else [content.get("image_id", id), caption])


def sign(stat: os.stat_result) -> Sign:
    """What tells that a file was changed."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def signs_of(json_path: Path, npz_path: Path) -> tuple[Sign, Sign]:
    """The signs of an item's files. OSError where one is not there."""
    return sign(json_path.stat()), sign(npz_path.stat())


def scan(folder: Path) -> dict[str, Sign]:
    """{name: sign} of the JSON and NPZ files of a folder, by one walk through it."""
    found: dict[str, Sign] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith((".json", ".npz")) and name[0] != ".":
                try:
                    found[name] = sign(entry.stat())
                except FileNotFoundError:
                    continue
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Many small objects that all stay: looking for garbage among them takes half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Checked:
    """The list of a run. items: {id: (sign of JSON, sign of NPZ, Facts)}; files: {path: (signs,
    what was found of it)}, of packs and pictures."""

    def __init__(self, path: Path) -> None:
        """path: the run directory."""
        self.path = path / NAME
        self.items: dict[str, tuple[Sign, Sign, Facts]] = {}
        self.files: dict[str, tuple[Sign, object]] = {}
        self._gone: set[str] = set()  # items that have no files any more
        self._lock = threading.Lock()
        self._is_read = False
        self._is_new = False  # since it was read or written

    def read(self) -> None:
        """Add what is on the disk, once; a damaged list is none."""
        if self._is_read:
            return
        self._is_read = True
        with _no_collection():
            for kind, name, value in self._on_disk():
                known = self.items if kind == "items" else self.files
                known.setdefault(name, value)  # type: ignore[arg-type]

    def _on_disk(self) -> Iterator[tuple[str, str, tuple[object, ...]]]:
        """(items or files, name, value) of all that is old enough to be believed."""
        try:
            latest = self.path.stat().st_mtime_ns - RECENT
            content = json.loads(self.path.read_bytes())
            if content["schema"] != SCHEMA:
                return
            for id, (of_json, of_npz, *facts) in content["items"].items():
                if id not in self._gone and max(*of_json[1:], *of_npz[1:]) < latest:
                    yield "items", id, (tuple(of_json), tuple(of_npz), Facts(*facts))
            for name, (of_file, value) in content["files"].items():
                if max(of_file[1:]) < latest:
                    yield "files", name, (tuple(of_file), value)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return

    def facts(self, id: str, signs: Mapping[str, Sign]) -> Facts | None:
        """The facts of an item that was found whole as it is now. signs: of scan()."""
        known = self.items.get(id)
        if known is None or known[0] != signs.get(f"{id}.json"):
            return None
        return known[2] if known[1] == signs.get(f"{id}.npz") else None

    def note(self, id: str, signs: tuple[Sign, Sign], facts: Facts) -> None:
        """An item was written, or read to its end. signs: of its files, before they were read."""
        with self._lock:
            self._gone.discard(id)
            self.items[id] = *signs, facts
            self._is_new = True

    def forget(self, ids: Iterable[str]) -> None:
        """These items have no files of their own any more."""
        with self._lock:
            self._gone.update(ids)
            for id in self._gone & self.items.keys():
                del self.items[id]
            self._is_new = True

    def file(self, path: str | Path) -> object:
        """What was found of a file that is as it was then, else None. OSError where it is not
        there."""
        known = self.files.get(os.fspath(path))
        return known[1] if known and known[0] == sign(os.stat(path)) else None

    def note_file(self, path: str | Path, of_file: Sign, value: object) -> None:
        """A file that had this sign before it was read."""
        with self._lock:
            self.files[os.fspath(path)] = of_file, value
            self._is_new = True

    def save(self) -> None:
        """Write the list, with what others found meanwhile. A folder that may only be read has
        none."""
        if not self._is_new:
            return
        self._is_read = False
        self.read()
        with self._lock:
            items = {id: (*signs, *facts) for id, (*signs, facts) in self.items.items()}
            content = {"schema": SCHEMA, "items": items, "files": self.files}
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            self._is_new = False
        with contextlib.suppress(UsageError):
            disk.write(self.path, text.encode("utf-8", "backslashreplace"))

"""Finished items of a run in packs of a thousand, for runs of so many items that a file system is
slow to list and open them.

    packed/<number>-<token>.zip      the NPZ of each item as it was, uncompressed beside the others
    packed/<number>-<token>.jsonl    the record of each item, one a line: {"id", "record"}
    packed/<number>-<token>.json     where each item lies in the two, with checksums; marks the pack
                                     whole

Written, flushed, read back and compared before the files of its items are removed, so that a
process may be killed at any point. An item that lies beside the packs too, because it was computed
again, counts as it is there; of two packs the one with the larger number. Kept free of torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk
from vlmdiag.types import Record

FOLDER = "packed"
SIZE = 1000  # items in a pack
SCHEMA = 1
OPEN = 8  # files that are kept open for the next item
ENDINGS = (".json", ".jsonl", ".zip")  # in the order in which they are removed


class Entry(NamedTuple):
    """Where an item lies in its pack: first byte, size and checksum of its line and of its NPZ; the
    time of its JSON in nanoseconds; the digest of its inputs, and image_id and caption, if it has
    them."""

    line_at: int
    line_size: int
    line_crc: int
    npz_at: int
    npz_size: int
    npz_crc: int
    time: int
    inputs: str | None
    pred: list[object] | None


@dataclass(frozen=True)
class Pack:
    """A pack. stem: its files without their endings."""

    stem: Path
    items: Mapping[str, Entry]

    def file(self, ending: str) -> Path:
        """One of its files."""
        return self.stem.with_name(self.stem.name + ending)

    def data_files(self) -> tuple[Path, Path]:
        """Those of the records and of the arrays."""
        return self.file(".jsonl"), self.file(".zip")

    @property
    def number(self) -> int:
        """Of two packs that have an item the one with the larger number counts."""
        return int(self.stem.name.split("-")[0])

    def remove(self) -> None:
        """Delete its files."""
        for ending in ENDINGS:
            self.file(ending).unlink(missing_ok=True)


class Row(NamedTuple):
    """An item that is to be packed: its line, and the rest as in Entry."""

    id: str
    line: bytes
    npz: bytes
    time: int
    inputs: str | None
    pred: list[object] | None


class Item(NamedTuple):
    """An item as its two files hold it."""

    id: str
    json: bytes
    npz: bytes
    time: int


def line_of(id: str, content: bytes) -> bytes:
    """The line of a record, from which json_of() makes the same bytes again. ValueError where that
    cannot be, of a file that is no JSON."""
    record = json.loads(content)
    of_record: Record = {"id": id, "record": record}
    if disk.json_bytes(record) != content:  # of another version, or written by hand
        of_record = {"id": id, "text": content.decode()}
    text = json.dumps(of_record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    if json.loads(line) != of_record:
        raise ValueError("its bytes cannot be made again from a line")
    return line


def json_of(line: bytes) -> bytes:
    """The JSON file of a line."""
    of_record = json.loads(line)
    return (
        of_record["text"].encode() if "text" in of_record else disk.json_bytes(of_record["record"])
    )


def write_pack(folder: Path, number: int, rows: Iterable[Row]) -> Pack:
    """Write a pack and read it back. UsageError where it cannot be written, or is not what was
    written."""
    stem = folder / f"{number:05d}-{secrets.token_hex(4)}"
    entries: dict[str, Entry] = {}
    pack = Pack(stem, entries)
    with (
        disk.in_one_step(pack.file(".zip")) as zip_path,
        disk.in_one_step(pack.file(".jsonl")) as lines_path,
    ):
        with zipfile.ZipFile(zip_path, "w") as archive, open(lines_path, "wb") as lines:
            assert archive.fp is not None  # it is open
            for row in rows:
                archive.writestr(zipfile.ZipInfo(f"{row.id}.npz"), row.npz)
                npz_at = archive.fp.tell() - len(row.npz)
                of_line = (lines.tell(), len(row.line), zlib.crc32(row.line))
                of_npz = (npz_at, len(row.npz), zlib.crc32(row.npz))
                entries[row.id] = Entry(*of_line, *of_npz, row.time, row.inputs, row.pred)
                lines.write(row.line)
        for path in (zip_path, lines_path):
            disk.from_disk(path)
        if _damaged(entries, lines_path, zip_path):
            raise UsageError(f"{stem}: what was written cannot be read back; nothing was removed")
    content = {"schema": SCHEMA, "items": entries}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    disk.write(pack.file(".json"), text.encode("utf-8", "backslashreplace") + b"\n")
    return pack


def read_pack(index: Path) -> Pack:
    """A pack by its index file. UsageError names one that is damaged or of another version."""
    content = disk.read_json(index)
    items = content.get("items")
    try:
        if content.get("schema") != SCHEMA or not isinstance(items, dict):
            raise ValueError(f"schema {content.get('schema')!r} where {SCHEMA} was wanted")
        entries = {id: Entry(*values) for id, values in items.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{index} cannot be read ({error}); {disk.AGAIN}") from error
    return Pack(index.with_suffix(""), entries)


def damaged_items(pack: Pack) -> set[str]:
    """The items of a pack of which a byte has changed since, both files read from end to end."""
    return _damaged(pack.items, *pack.data_files())


def _damaged(entries: Mapping[str, Entry], lines_path: Path, zip_path: Path) -> set[str]:
    damaged = set()
    try:
        with open(lines_path, "rb") as lines, open(zip_path, "rb") as archive:
            for id, entry in entries.items():
                lines.seek(entry.line_at)
                archive.seek(entry.npz_at)
                is_right = zlib.crc32(lines.read(entry.line_size)) == entry.line_crc
                if not is_right or zlib.crc32(archive.read(entry.npz_size)) != entry.npz_crc:
                    damaged.add(id)
    except OSError:
        return set(entries)
    return damaged


class _Reader:
    """A file that stays open for the next item."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, at: int, size: int) -> bytes:
        os.lseek(self._file, at, os.SEEK_SET)
        return os.read(self._file, size)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._file)


class Packs:
    """The packs of a run, read when they are first asked for."""

    def __init__(self, path: Path) -> None:
        """path: the run directory."""
        self.path = path
        self.folder = path / FOLDER
        self.packs: dict[str, Pack] = {}  # by stem
        self.loose: set[str] = set()  # packed items that lie beside the packs too
        self.damaged: set[str] = set()  # ids, found by this process
        self._of: dict[str, Pack] = {}
        self._time: int | None = -1  # of the folder when it was listed
        self._readers: dict[Path, _Reader] = {}
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Read packs that appeared, forget those that went away."""
        try:
            time = os.stat(self.folder).st_mtime_ns
        except OSError:
            time = None
        if time == self._time:
            return
        with self._lock:
            names = [] if time is None else os.listdir(self.folder)
            stems = {name[:-5] for name in names if name.endswith(".json") and name[0] != "."}
            packs = {stem: self.packs.get(stem) for stem in sorted(stems)}
            self.packs = {
                stem: pack or read_pack(self.folder / f"{stem}.json")
                for stem, pack in packs.items()
            }
            self._of = {id: pack for pack in self.packs.values() for id in pack.items}
            beside = os.listdir(self.path / "per_image") if self._of else []
            self.loose = {name[:-5] for name in beside if name.endswith(".json")} & self._of.keys()
            self._time = time
            self._readers.clear()

    def find(self, id: str) -> Pack | None:
        """The pack that an item is to be read from; None for one that lies beside the packs, or
        nowhere whole. UsageError for a pack that cannot be read."""
        if self._time == -1:
            self.refresh()
        pack = self._of.get(id)
        return None if pack is None or id in self.loose or id in self.damaged else pack

    def ids(self) -> set[str]:
        """The ids of all items that are to be read from packs."""
        self.refresh()
        return self._of.keys() - self.loose - self.damaged

    def written(self, id: str) -> None:
        """An item has files of its own now."""
        if id in self._of:
            self.loose.add(id)

    def live(self, pack: Pack) -> list[str]:
        """The items that are to be read from a pack."""
        return [id for id in pack.items if self.find(id) is pack]

    def line(self, pack: Pack, id: str) -> bytes:
        """An item's line. UsageError where it is damaged."""
        entry = pack.items[id]
        return self._read(pack, ".jsonl", id, entry.line_at, entry.line_size, entry.line_crc)

    def npz(self, pack: Pack, id: str) -> bytes:
        """An item's NPZ. UsageError where it is damaged."""
        entry = pack.items[id]
        return self._read(pack, ".zip", id, entry.npz_at, entry.npz_size, entry.npz_crc)

    def content(self, pack: Pack, id: str) -> Record:
        """What an item's JSON file held."""
        of_record = json.loads(self.line(pack, id))
        return json.loads(of_record["text"]) if "text" in of_record else of_record["record"]

    def item(self, pack: Pack, id: str) -> Item:
        """The two files of an item."""
        json_file = json_of(self.line(pack, id))
        return Item(id, json_file, self.npz(pack, id), pack.items[id].time)

    def _read(self, pack: Pack, ending: str, id: str, at: int, size: int, crc: int) -> bytes:
        path = pack.file(ending)
        try:
            with self._lock:
                if path not in self._readers:
                    while len(self._readers) >= OPEN:
                        del self._readers[next(iter(self._readers))]
                    self._readers[path] = _Reader(path)
                data = self._readers[path].read(at, size)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror or error})") from error
        if zlib.crc32(data) != crc:
            raise UsageError(
                f"{path} cannot be read ({id} is damaged); the command that made it computes it"
                " again"
            )
        return data

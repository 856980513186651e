"""Puts the finished items of a run into packs (runs.packs), and takes them out again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmdiag.cli import UsageError
from vlmdiag.runs import checked, disk, leases
from vlmdiag.runs.packs import ENDINGS, SIZE, Pack, Row, line_of, write_pack
from vlmdiag.runs.rundirs import Run


class Outcome(NamedTuple):
    """What pack() or unpack() did: how many items were put into packs or taken out, how many packs
    there are now, and {id: why} of items that were left where they were."""

    items: int
    packs: int
    left: dict[str, str]


def pack(run: Run) -> Outcome:
    """Pack the finished items that have files of their own, together with packs that are not full,
    and remove what was packed once it has been read back.

    A damaged item is left for the command that made the run, which computes it again. UsageError
    where a pack cannot be written.
    """
    store = run.packed
    try:
        store.folder.mkdir(exist_ok=True)
        leases.sweep(store.folder)
    except OSError as error:
        raise disk.cannot_write(store.folder, error) from error
    loose = run.loose_ids()
    whole = run.finished(loose)
    left = {id: "it is damaged" for id in loose if id not in whole}
    before = list(store.packs.values())
    small = [pack for pack in before if len(store.live(pack)) < SIZE]
    moved = {id: pack for pack in small for id in store.live(pack)}
    ids = sorted({*whole, *moved})
    is_needed = whole or len(small) > 1 or any(len(pack.items) != len(moved) for pack in small)
    number = max((pack.number for pack in before), default=-1)
    for start in range(0, len(ids) if is_needed else 0, SIZE):
        number += 1
        packed = write_pack(
            store.folder, number, _rows(run, ids[start : start + SIZE], moved, left)
        )
        for file in packed.data_files():
            run.known.note_file(file, checked.sign(file.stat()), True)
        run.known.forget(packed.items)
        for id, entry in packed.items.items():
            if id not in moved:
                _remove_files(run, id, entry.time)
    if is_needed:
        for pack in small:
            pack.remove()
    store.refresh()
    _remove_leftovers(run)
    run.known.save()
    return Outcome(len(whole) - sum(id in whole for id in left), len(store.packs), left)


def unpack(run: Run) -> Outcome:
    """Give every packed item its two files again, to the byte and with the time that they had, and
    remove the packs; one with a damaged item stays. UsageError where they cannot be written."""
    store = run.packed
    store.refresh()
    count = 0
    left: dict[str, str] = {}
    for pack in list(store.packs.values()):
        is_damaged = False
        for id in store.live(pack):
            try:
                item = store.item(pack, id)
            except UsageError as error:
                left[id] = str(error)
                is_damaged = True
                continue
            json_path, npz_path = run.files(id)
            disk.write(npz_path, item.npz)
            disk.write(json_path, item.json)
            os.utime(json_path, ns=(item.time, item.time))
            count += 1
        if not is_damaged:
            pack.remove()
    store.refresh()
    with contextlib.suppress(OSError):
        store.folder.rmdir()
    return Outcome(count, len(store.packs), left)


def _rows(
    run: Run, ids: Sequence[str], moved: dict[str, Pack], left: dict[str, str]
) -> Iterator[Row]:
    """The items of a pack to be; those that cannot be packed are added to `left`."""
    for id in ids:
        if id in moved:
            entry = moved[id].items[id]
            data = run.packed.line(moved[id], id), run.packed.npz(moved[id], id)
            yield Row(id, *data, entry.time, entry.inputs, entry.pred)
            continue
        try:
            yield _row(id, *run.files(id))
        except (OSError, ValueError) as error:
            left[id] = str(error)


def _row(id: str, json_path: Path, npz_path: Path) -> Row:
    time = json_path.stat().st_mtime_ns
    content, npz = json_path.read_bytes(), npz_path.read_bytes()
    record = json.loads(content)
    facts = checked.facts_of(id, record)
    checks = record.get(checked.CHECKS)
    if isinstance(checks, dict) and checks.get("npz") != hashlib.sha256(npz).hexdigest()[:16]:
        raise ValueError("its NPZ is not as it was written")
    return Row(id, line_of(id, content), npz, time, *facts)


def _remove_files(run: Run, id: str, time: int) -> None:
    """Remove the files of an item, unless it was written again meanwhile."""
    json_path, npz_path = run.files(id)
    with contextlib.suppress(FileNotFoundError):
        if json_path.stat().st_mtime_ns == time:
            json_path.unlink()
            npz_path.unlink(missing_ok=True)


def _remove_leftovers(run: Run) -> None:
    """Remove what a call that was killed left: NPZ of packed items whose JSON it had removed, and
    old halves of packs."""
    names = checked.scan(run.path / "per_image")
    for name in names:
        id, ending = os.path.splitext(name)
        if ending == ".npz" and f"{id}.json" not in names and run.packed.find(id):
            run.files(id)[1].unlink(missing_ok=True)
    now = run.packed.folder.stat().st_mtime
    for file in run.packed.folder.iterdir():
        is_half = file.suffix in ENDINGS and file.stem not in run.packed.packs
        if is_half and now - file.stat().st_mtime > leases.AGE:
            file.unlink(missing_ok=True)

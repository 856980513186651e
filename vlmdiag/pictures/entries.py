"""JSON lists that people bring: read, checked entry by entry; how their image ids are written."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

from vlmdiag.cli import UsageError
from vlmdiag.types import Record

Entry = Record  # an object of a JSON list
JSON_LIMIT = 2**30  # bytes; COCO's largest file, instances_train2017.json, has 448 MiB


def read_json(path: str | Path) -> object:
    """The content of a JSON file. UsageError where it cannot be read."""
    return _parsed(path, _bytes(path))


def read_list(path: str | Path) -> object:
    """What a JSON file holds, of JSON lines the list of their objects. UsageError where it cannot
    be read."""
    content = _bytes(path)
    lines = [line for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    if len(lines) > 1 and all(line.lstrip()[:1] == b"{" for line in lines):
        return [_parsed(f"{path}, line {n},", line) for n, line in enumerate(lines, 1)]
    return _parsed(path, content)


def _bytes(path: str | Path) -> bytes:
    try:
        size = Path(path).stat().st_size
        if size > JSON_LIMIT:
            raise UsageError(
                f"{path} has {size / 2**20:.0f} MiB, at most {JSON_LIMIT // 2**20} MiB are read"
                " (parsed, it would take ten times that in memory); give a part of it"
            )
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from error


def _parsed(path: str | Path, content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path} is not readable JSON ({error})") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not readable JSON (nested too deeply)") from error


def entries_of(
    path: str | Path, entries: object, wanted: Sequence[str | tuple[str, ...]], name: str = "entry"
) -> list[Entry]:
    """The list of objects in a file, each checked for its fields; a tuple of fields: one of
    them."""
    if not isinstance(entries, list):
        raise UsageError(f"{path}: a list of objects was wanted, found {type(entries).__name__}")
    if not entries:
        raise UsageError(f"{path}: the list is empty")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise UsageError(f"{path}: {name} {n} is a {kind}, an object was wanted")
        for fields in wanted:
            alternatives = fields if isinstance(fields, tuple) else (fields,)
            if all(entry.get(field) in (None, "") for field in alternatives):
                raise UsageError(f"{path}: {name} {n} has no {' or '.join(alternatives)}")
    return entries


def text_id(image_id: object) -> str:
    """000000006818 for 6818; what is not an integer stays as it is, as text."""
    return f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)


def image_key(image_id: object) -> str:
    """What an image id says, however it is written: '6818' for 6818, 6818.0, '6818.0',
    '000000006818' and COCO's own 'COCO_val2014_000000006818'."""
    if isinstance(image_id, float) and image_id.is_integer():
        image_id = int(image_id)
    text = re.sub(r"^COCO_[a-z]+\d{4}_(?=\d{12}$)|(?<=\d)\.0+$", "", str(image_id).strip())
    return (text.lstrip("0") or "0") if text.isdecimal() else text


def checked_id(path: str | Path, what: str, id: object) -> int | str:
    if isinstance(id, float) and id.is_integer():  # as pandas writes them
        return int(id)
    if isinstance(id, (int, str)) and not isinstance(id, bool):
        return id
    raise UsageError(f"{path}: {what} {id!r:.60} is a {type(id).__name__}, an id was wanted")

"""Files written in one step, and read with an error that names them.

Bytes go to a temporary name in the same folder, are flushed to the disk and renamed, so a process
may be killed at any point and no reader sees half a file. Kept free of torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from vlmdiag.cli import FULL, UsageError
from vlmdiag.runs import leases
from vlmdiag.types import Record

# a file of a run that is larger was not written by us: its content as JSON, its arrays in memory
JSON_LIMIT = 2**28
NPZ_LIMIT = 2**31
AT_ONCE = 2**22  # bytes of an NPZ that are read as a whole, of a larger one what is wanted
NAME_LIMIT = 150  # bytes of a name that a temporary one holds; file systems take 255
# what reading a damaged NPZ raises, also one that is encrypted, lies about its sizes or has no
# header; the last two: an .npy where an NPZ was wanted
BROKEN = (
    MemoryError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    TypeError,
)
Arrays = Mapping[str, "np.ndarray"]
# of a ZIP file: its end, and an entry of its directory, in which the time is passed over; the bytes
# of an entry before a member
END = struct.Struct("<4s4H2IH")
CENTRAL = struct.Struct("<4s2s2sHH4xIIIHHH8xI")
LOCAL = 30


# --- writing --------------------------------------------------------------------------------------


def temporary(path: Path) -> contextlib.AbstractContextManager[Path]:
    """A context with an empty temporary file in the folder of path, which nobody else removes until
    its end: see leases.temporary(). Its name has the one of path in it, of a long one a digest."""
    name = path.name
    if len(name.encode("utf-8", "replace")) > NAME_LIMIT:
        name = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    return leases.temporary(path, name)


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the context it is flushed and becomes path.

    With an exception nothing is left behind and path stays as it was. UsageError where the file
    cannot be written.
    """
    try:
        with temporary(path) as file:
            yield file
            _flush(file)
            os.replace(file, path)
            _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UsageError:
    """The line for a file that cannot be written, which says if the disk is full."""
    is_full = error.errno in FULL
    what = "the disk is full or a size limit is reached" if is_full else "cannot write"
    return UsageError(
        f"{what} ({error.strerror or error}): {path}; nothing already computed is lost, the same"
        " command goes on from there"
    )


def write(path: Path, data: bytes) -> None:
    """Put bytes at path, whose folder is there. UsageError where that cannot be."""
    try:
        _write(path, data)
    except UsageError as error:
        # stopped for so long that its temporary file was taken for a dead process's
        if not isinstance(error.__cause__, FileNotFoundError) or not path.parent.is_dir():
            raise
        _write(path, data)


def _write(path: Path, data: bytes) -> None:
    with in_one_step(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_once(path: Path, data: bytes) -> bool:
    """Put bytes at path only if nothing is there yet; whether they were written. Of several
    processes that do so at once exactly one does, see leases.publish()."""
    try:
        with temporary(path) as whole:
            whole.write_bytes(data)
            return publish(whole, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def publish(whole: Path, path: Path) -> bool:
    """Flush a finished file and rename it to path unless something is there: leases.publish()."""
    _flush(whole)
    is_first = leases.publish(whole, path)
    _flush_folder(path.parent)
    return is_first


def _flush(file: Path) -> None:
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def from_disk(file: Path) -> None:
    """Bring a file to the disk and out of memory, so that it is read from there."""
    with open(file, "rb") as written:
        os.fsync(written.fileno())
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flush_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system knows how: a file that was renamed may
    else be gone after a power cut."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """The folder of a file, with those above it. UsageError where it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def out_folder(path: str | Path) -> Path:
    """A folder for results, made where it is not there. UsageError where it cannot be, before
    anything is computed for it."""
    folder = Path(path)
    make_folder(folder / "file")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to {folder}: permission denied")
    return folder


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, with the folder. UsageError where that cannot be."""
    make_folder(Path(path))
    write(Path(path), data)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file, with its folder. UsageError where that cannot be."""
    write_bytes(path, json_bytes(value))


def write_npz(path: str | Path, arrays: Arrays) -> None:
    """Write an NPZ file, with its folder; equal arrays give equal bytes. UsageError where that
    cannot be."""
    write_bytes(path, npz_bytes(arrays))


def write_large_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write an uncompressed NPZ of arrays that are made one after the other. UsageError where that
    cannot be."""
    with in_one_step(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


# --- contents -------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """What JSON can hold: numpy to python, paths to text, NaN and infinities to null."""
    if isinstance(value, dict):
        return {
            key.item() if isinstance(key, np.generic) else key: plain(item)
            for key, item in value.items()
        }
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def json_bytes(value: object) -> bytes:
    """A value as the text of a JSON file."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # a lone surrogate becomes its \uXXXX escape, which JSON reads back
    return text.encode("utf-8", "backslashreplace")


def npz_bytes(arrays: Arrays, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Bytes of an NPZ file: equal arrays give equal bytes, because every member carries the same
    date (np.savez promises none)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            date = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(date, member.getvalue(), compression)
    return buffer.getvalue()


# --- reading --------------------------------------------------------------------------------------

AGAIN = "delete it and run the command that made it again"


def read_json(path: Path, advice: str = AGAIN) -> Record:
    """The object of a JSON file. UsageError names a file that cannot be read or holds none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"it has more than {JSON_LIMIT // 2**20} MiB")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} cannot be read ({reason}); {advice}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UsageError(f"{path} holds a {kind} where an object was wanted; {advice}")
    return value


def read_npz(
    path: Path, keys: Sequence[str] | None = None, data: bytes | None = None
) -> dict[str, np.ndarray] | None:
    """Arrays of an NPZ file, all or the named ones; None if it lacks one of those. data: its bytes
    where they are at hand. UsageError names a file that cannot be read."""
    try:
        if data is None and path.stat().st_size <= AT_ONCE:
            data = path.read_bytes()
        if data is not None:
            members = _members(data)
            if members is not None:
                names = list(members) if keys is None else keys
                if not set(names) <= set(members):
                    return None
                return {name: _array(data, *members[name]) for name in names}
        with (
            open(path, "rb") if data is None else io.BytesIO(data) as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            names = archive.files if keys is None else keys
            if not set(names) <= set(archive.files):
                return None
            check_size(archive, names)
            return {name: archive[name] for name in names}
    except BROKEN as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


Member = tuple[int, int, int, int, int]  # method, checksum, size in the file, size, first byte


def _members(data: bytes) -> dict[str, Member] | None:
    """{array: where it lies} of an NPZ as npz_bytes() writes it; None for any other, which
    zipfile reads, five times slower."""
    end = len(data) - END.size
    if end < 0:
        return None
    mark, *disks, count, total, size, at, comment = END.unpack_from(data, end)
    if mark != b"PK\5\6" or any(disks) or count != total or at + size != end or comment:
        return None
    members: dict[str, Member] = {}
    used = 0
    for _ in range(count):
        if at + CENTRAL.size > end:
            return None
        mark, *_, flags, method, crc, packed, whole, length, extra, note, start = (
            CENTRAL.unpack_from(data, at)
        )
        name = data[at + CENTRAL.size : at + CENTRAL.size + length]
        local = data[start : start + LOCAL + length]
        is_ours = mark == b"PK\1\2" and not flags and not extra and not note
        # the same again before the member itself
        expected = b"PK\3\4" + data[at + 6 : at + 32] + name
        if not is_ours or start != used or local != expected or not name.endswith(b".npy"):
            return None
        used = start + LOCAL + length + packed
        if not name.isascii() or method not in (0, 8) or used > end or whole > NPZ_LIMIT:
            return None
        members[name[:-4].decode()] = method, crc, packed, whole, used - packed
        at += CENTRAL.size + length
    return members if at == end and len(members) == count else None


def _content(data: bytes, method: int, crc: int, packed: int, whole: int, start: int) -> bytes:
    """A member's bytes. ValueError, zlib.error where they are damaged."""
    content = data[start : start + packed]
    if method == 8:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, whole + 1)
    if len(content) != whole or zlib.crc32(content) != crc:
        raise ValueError("a checksum is wrong")
    return content


def _array(data: bytes, *member: int) -> np.ndarray:
    content = _content(data, *member)
    length = 10 + int.from_bytes(content[8:10], "little")
    if content[:8] != b"\x93NUMPY\1\0":
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    shape, is_fortran, dtype = _header(content[8:length])
    if dtype.hasobject:
        raise ValueError("it holds objects")
    array = np.frombuffer(content, dtype, math.prod(shape), length)
    return array.reshape(shape, order="F" if is_fortran else "C").copy("K")


@functools.lru_cache(1024)
def _header(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_1_0(io.BytesIO(text))


def check_size(archive: NpzFile, names: Sequence[str]) -> None:
    """ValueError where the named arrays would take more than NPZ_LIMIT bytes."""
    assert archive.zip is not None  # it is open
    members = {info.filename.removesuffix(".npy"): info for info in archive.zip.infolist()}
    size = sum(members[name].file_size for name in names if name in members)
    if size > NPZ_LIMIT:
        raise ValueError(
            f"its arrays take {size / 2**30:.1f} GiB, at most {NPZ_LIMIT / 2**30:.0f} GiB are read"
        )


def looks_whole(path: Path, begins: bytes, ends: bytes, behind: int = 0) -> bool:
    """Whether a file begins and ends as its kind does: false for one that is missing, empty, cut
    short or filled up with zeros. behind: bytes that may follow `ends`."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            first = file.read(len(begins))
            file.seek(max(0, size - len(ends) - behind))
            return first == begins and file.read(len(ends)) == ends
    except OSError:
        return False


def check_npz(path: Path, data: bytes | None = None) -> None:
    """ValueError and the like (BROKEN) for an NPZ of which a member's checksum is wrong. data: its
    bytes where they are at hand."""
    if data is None and path.stat().st_size <= AT_ONCE:
        data = path.read_bytes()
    members = None if data is None else _members(data)
    if data is not None and members is not None:
        for member in members.values():
            _content(data, *member)
        return
    with zipfile.ZipFile(path if data is None else io.BytesIO(data)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")

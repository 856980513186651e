"""Run directories: the settings of a run, one NPZ + JSON per item, the items that failed, and the
sums that analyses cache.

    runs/<model>[__<run_name>]__sp-<0|1>/        experiment 'coco_diagnostics'
    runs/<experiment>/<model>[__<run_name>]/     every other experiment
        meta.json  preds.json  per_image/<id>.json + <id>.npz  failures/<id>.json
                   counters/<key>.txt  analysis/

Every file is written under a temporary name in its folder, flushed and renamed, the NPZ before the
JSON, and the JSON marks an item done: a process may be killed at any point. Several processes may
share a run (shards). Kept free of torch so that the plotting scripts start at once.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import time
import traceback
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError

SCHEMA = 1
COCO = "coco_diagnostics"
OWNED = (
    "per_image",
    "failures",
    "analysis",
    "counters",
    "preds.json",
    "meta.json",
)  # meta.json last: a run half removed is still known for what it is
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)  # what reading a damaged NPZ raises
_HOST = platform.node().split(".")[0] or "host"
_UNSET = object()
_numbers = itertools.count()


# ---- names ----


def slug(name):
    """Folder name for a model: the last component of its path or hub id, 'parent_checkpoint-n' for
    a folder 'checkpoint-n'."""
    path = Path(os.path.abspath(name))
    last = f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
    return _clean(last)


def _clean(text):
    return re.sub(r"""[ :/\\|*?"'<>]""", "-", text)


def run_path(out_root, model, experiment=None, run_name=None, sp=None):
    """Where a run lives. With sp (0 = with system prompt, 1 = without):
    out_root/<slug>[__<run_name>]__sp-<sp>, else out_root/<experiment>/<slug>[__<run_name>]."""
    name = slug(model) + (f"__{_clean(run_name)}" if run_name else "")
    if sp is not None:
        return Path(out_root) / f"{name}__sp-{int(sp)}"
    if not experiment:
        raise ValueError("run_path needs an experiment or sp")
    return Path(out_root) / experiment / name


def _checked(id):
    id = str(id)
    if (
        not id
        or id.startswith(".")
        or re.search(r"[/\\\0]", id)
        or len(id.encode("utf-8", "replace")) > 180
    ):
        raise UsageError(
            f"{id!r} cannot be an item id: ids become file names, so no /, \\ or leading dot, and 1"
            " to 180 bytes"
        )
    return id


# ---- bytes on disk ----


def _plain(value):
    """What JSON can hold: numpy to python, paths to text, NaN and infinities to null."""
    if isinstance(value, dict):
        return {
            (key.item() if isinstance(key, np.generic) else key): _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _json(value):
    text = json.dumps(_plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return text.encode(
        "utf-8", "backslashreplace"
    )  # a lone surrogate becomes its \uXXXX escape, which JSON reads back


def _npz(arrays, compression=zipfile.ZIP_DEFLATED):
    """Bytes of an NPZ file: equal arrays give equal bytes, because every member carries the same
    date (np.savez promises none)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{key}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue(), compression
            )
    return buffer.getvalue()


def _write(path, data, exclusive=False):
    """Put bytes at path in one step. exclusive: only if nothing is there yet. Returns whether it
    was written; UsageError where it cannot be."""
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}-{next(_numbers)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            return _link(temporary, path)
        os.replace(temporary, path)
        return True
    except OSError as error:
        what = (
            "the disk is full or a size limit is reached" if error.errno in FULL else "cannot write"
        )
        raise UsageError(
            f"{what} ({error.strerror or error}): {path}; nothing already computed is lost, the"
            " same command goes on from there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file in one step, with its folder. UsageError where it cannot be."""
    _write_with_folder(Path(path), _json(value))


def write_npz(path, arrays):
    """Write an NPZ file in one step, with its folder; equal arrays give equal bytes. UsageError
    where it cannot be."""
    _write_with_folder(Path(path), _npz(arrays))


def write_bytes(path, data):
    """Write bytes in one step, with the folder. UsageError where it cannot be."""
    _write_with_folder(Path(path), data)


def _write_with_folder(path, data):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    _write(path, data)


def _link(temporary, path):
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    # a file system without hard links: exclusive creation, whose reader may see the file before its
    # bytes (_read_meta waits)
    except OSError:
        try:
            with open(path, "xb", buffering=0) as file:
                file.write(temporary.read_bytes())
        except FileExistsError:
            return False
    return True


def _read_json(path, advice="delete it and run the command that made it again"):
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} holds a {type(value).__name__} where an object was wanted; {advice}"
        )
    return value


def _read_npz(path, keys=None):
    """Arrays of an NPZ file, all or the named ones; None if it lacks one of those."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if keys is not None and not set(keys) <= set(archive.files):
                return None
            return {key: archive[key] for key in (archive.files if keys is None else keys)}
    except (
        *BROKEN,
        AttributeError,
        TypeError,
    ) as error:  # the last two: an .npy where an NPZ was wanted
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it and run the"
            " command that made it again"
        ) from error


def _sweep(folder):
    """Remove temporary files that killed processes left: of this machine and not running any more,
    or a day old."""
    for temporary in folder.glob(".*.tmp"):
        _, host, process, _ = (
            temporary.name.rsplit(".", 3) if temporary.name.count(".") >= 4 else (None,) * 4
        )
        with contextlib.suppress(OSError):
            if process and (
                time.time() - temporary.stat().st_mtime > 86400
                or host == _HOST
                and not _running(process.split("-")[0])
            ):
                temporary.unlink()


def _running(pid):
    if os.name != "posix" or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


# ---- settings ----


def _versions():
    found = {"python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    here = CHECKOUT
    if (here / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(here), "rev-parse", "--verify", "HEAD"]
            found["commit"] = subprocess.run(
                command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
            ).stdout.strip()
    return found


def _flat(settings, prefix=""):
    """Nested settings as {'outer.inner': value}, so that a difference is named by itself."""
    flat = {}
    for key, value in settings.items():
        flat.update(
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat


def _differences(now, then):
    """['key: value now, value then'] for every setting that differs."""
    now, then = _flat(now), _flat(then)
    different = [
        key for key in dict.fromkeys([*now, *then]) if now.get(key, _UNSET) != then.get(key, _UNSET)
    ]
    return [f"{key}: now {_shown(now, key)}, there {_shown(then, key)}" for key in different]


def _shown(settings, key):
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "not set"


def _read_meta(path):
    """meta.json of a run folder, checked for its schema."""
    file, advice = path / "meta.json", "use another --run_name, or remove the folder by hand"
    for _ in range(20):  # up to a second: see _link
        if file.exists() and file.stat().st_size == 0:
            time.sleep(0.05)
    meta = _read_json(file, advice)
    if meta.get("schema") != SCHEMA or not isinstance(meta.get("settings"), dict):
        raise UsageError(
            f"{file} has schema {meta.get('schema')!r} where {SCHEMA} was wanted: another version"
            f" of these tools wrote it; {advice}"
        )
    return meta


def _clear(path):
    """Remove what a run directory owns, and nothing else."""
    if not path.exists() or not any(path.iterdir()):
        return
    meta = path / "meta.json"
    if not meta.exists() or b'"experiment"' not in meta.read_bytes():
        raise UsageError(
            f"--overwrite: {path} is not empty and not a run directory (no meta.json of a run); use"
            " another --run_name or --out_root"
        )
    for name in OWNED:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)


def open_run(path, experiment, identity, free=None, overwrite=False):
    """Create a run directory, or open it again with the same settings.

    identity: settings that the numbers depend on, compared key by key with those in meta.json
    (after a JSON round trip); free: settings that may differ between calls, stored by the call that
    creates the run. overwrite: start again; with shards, in one call before the others start. Of
    several processes that open a new run at once exactly one creates meta.json, the others compare.
    UsageError: other settings, experiment or schema, results without meta.json, a place that cannot
    be written."""
    path = Path(path)
    meta = {"schema": SCHEMA, "experiment": experiment, "settings": identity, "free": free or {}}
    settings = json.loads(_json(identity))
    try:
        if overwrite:
            _clear(path)
        path.mkdir(parents=True, exist_ok=True)
        orphans = (path / "per_image").is_dir() and any(
            not name.startswith(".") for name in os.listdir(path / "per_image")
        )
        if not (path / "meta.json").exists():
            if orphans:  # looked at before meta.json, which another shard may have made in between
                raise UsageError(
                    f"{path} holds results but no meta.json, so their settings are unknown; use"
                    " another --run_name, or remove the folder by hand"
                )
            _write(
                path / "meta.json",
                _json(
                    meta
                    | {"versions": _versions(), "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                ),
                exclusive=True,
            )
        meta = _read_meta(path)
        if meta.get("experiment") != experiment:
            raise UsageError(
                f"{path} belongs to experiment {meta.get('experiment')!r}, not {experiment!r}; use"
                " another --run_name or --out_root"
            )
        different = _differences(settings, meta["settings"])
        if different:
            raise UsageError(
                f"{path} was made with other settings ({'; '.join(different)}); use --overwrite to"
                " start again or another --run_name"
            )
        for name in ("per_image", "failures", "analysis"):
            (path / name).mkdir(exist_ok=True)
            _sweep(path / name)
        _sweep(path)
        probe = path / "per_image" / f".writable.{_HOST}.{os.getpid()}-{next(_numbers)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write a run to {path} ({error.strerror or error}); choose another --out_root"
        ) from error
    run = Run(path, meta)
    meta["counters"] = run.counters()
    return run


# ---- a run ----


@dataclass
class Run:
    """A run directory. path: its folder; meta: meta.json, with the counters as they were when it
    was opened."""

    path: Path
    meta: dict

    @property
    def label(self):
        """Name in figures: the folder's, for coco runs '<model>[__<run_name>]' and whether the
        system prompt was taken out."""
        name = Path(os.path.abspath(self.path)).name
        match = (
            re.fullmatch(r"(.+)__sp-([01])", name) if self.meta.get("experiment") == COCO else None
        )
        return match[1] + (" (no system prompt)" if match[2] == "1" else "") if match else name

    def _file(self, id, ending):
        return self.path / "per_image" / f"{_checked(id)}{ending}"

    def is_done(self, id):
        """True if the item is finished. Its JSON marks it done; an NPZ deleted by hand makes it
        missing again."""
        return self._file(id, ".json").exists() and self._file(id, ".npz").exists()

    def write(self, id, record, arrays=None, keep=True):
        """Commit an item: its arrays {name: array} as NPZ, then its record (dict) as JSON; its
        failure file goes away.

        Returns True if written, False if it was done already (keep=False writes it anyway).
        UsageError on a full disk.
        """
        written = not (keep and self.is_done(id))
        if written:
            contents = {
                ".npz": _npz(arrays or {}),
                ".json": _json(record),
            }  # both made before either is written
            for ending, data in contents.items():
                _write(self._file(id, ending), data)
        (self.path / "failures" / f"{_checked(id)}.json").unlink(missing_ok=True)
        return written

    def fail(self, id, error, **facts):
        """Note why an item that is not done could not be computed, in failures/<id>.json."""
        if self.is_done(id):
            return
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        failure = {
            "type": type(error).__name__,
            "message": str(error),
            "facts": facts,
            "traceback": trace,
        }
        _write(self.path / "failures" / f"{_checked(id)}.json", _json(failure))

    def failed(self):
        """{id: failure} of the items that failed and are not done."""
        folder = self.path / "failures"
        return {
            id: _read_json(folder / f"{id}.json") for id in _stems(folder) if not self.is_done(id)
        }

    def count(self, key, by=1):
        """Add to a counter of the run, such as oom_halvings; safe between shards."""
        try:
            (self.path / "counters").mkdir(exist_ok=True)
            with open(self.path / "counters" / f"{_checked(key)}.txt", "ab", buffering=0) as file:
                file.write(b"%d\n" % by)
        except OSError as error:
            raise UsageError(
                f"cannot write ({error.strerror or error}): {self.path / 'counters'}; nothing"
                " already computed is lost"
            ) from error

    def counters(self):
        """{key: sum} of everything counted so far."""
        folder = self.path / "counters"
        return {
            file.name[:-4]: sum(
                int(line) for line in re.findall(rb"^\d+$", file.read_bytes(), re.MULTILINE)
            )
            for file in sorted(folder.glob("*.txt"))
        }

    def finish(self):
        """Rebuild preds.json, [{"image_id", "caption"}] sorted by item id, from the done items that
        have a caption. Returns its path."""
        preds, ids = self.path / "preds.json", None
        while (
            ids != (ids := self.ids())
        ):  # once more if another shard committed items meanwhile, whose own preds.json this one may have replaced
            records = [{"image_id": id} | self.record(id) for id in ids]
            captions = [
                {"image_id": record["image_id"], "caption": record["caption"]}
                for record in records
                if record.get("caption") is not None
            ]
            _write(preds, _json(captions))
        for id in _stems(self.path / "failures"):
            if self.is_done(id):
                (self.path / "failures" / f"{id}.json").unlink(missing_ok=True)
        return preds

    def ids(self):
        """Sorted ids of the done items."""
        return _stems(self.path / "per_image")

    def record(self, id):
        """The JSON record of an item. UsageError names a broken file."""
        return _read_json(self._file(id, ".json"))

    def records(self):
        """The records of all done items, in the order of ids()."""
        return [self.record(id) for id in self.ids()]

    def arrays(self, id):
        """{name: array} of an item. UsageError names a broken file."""
        return _read_npz(self._file(id, ".npz"))

    def stack(self, keys):
        """(ids, {key: array (n, ...)}): NPZ arrays of the n items that have all the keys, in the
        order of ids().

        Cached in analysis/ for as long as no file changes. UsageError: no item has the keys, shapes
        that differ between items, a broken file.
        """
        keys = [keys] if isinstance(keys, str) else list(keys)
        files = [self._file(id, ".npz") for id in self.ids()]
        try:
            state = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        except OSError as error:
            raise UsageError(
                f"{error.filename} is missing; run the command that made {self.path} again"
            ) from error
        digest = hashlib.sha256(json.dumps([SCHEMA, keys, state]).encode()).hexdigest()
        cache = (
            self.path
            / "analysis"
            / f"stack-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]}.npz"
        )
        names = [f"array_{n}" for n in range(len(keys))]
        with contextlib.suppress(UsageError):  # no cache, or a broken one: made again below
            cached = _read_npz(cache, ["digest", "ids", *names])
            if cached and str(cached["digest"]) == digest:
                return cached["ids"].tolist(), dict(zip(keys, (cached[name] for name in names)))
        found = [
            (file.name[:-4], arrays)
            for file in files
            if (arrays := _read_npz(file, keys)) is not None
        ]
        if not found:
            known = (
                f"; the first has {', '.join(sorted(_read_npz(files[0]))) or 'no arrays'}"
                if files
                else ""
            )
            raise UsageError(
                f"{self.path}: none of its {len(files)} items has all of {', '.join(keys)}{known}"
            )
        first_id, first = found[0]
        for id, arrays in found:
            for key in keys:
                if arrays[key].shape != first[key].shape:
                    shapes = f"{first[key].shape} for {first_id} but {arrays[key].shape} for {id}"
                    raise UsageError(
                        f"{self.path}: {key} has shape {shapes}, so they cannot be stacked"
                    )
        ids = [id for id, _ in found]
        stacked = {key: np.stack([arrays[key] for _, arrays in found]) for key in keys}
        with contextlib.suppress(UsageError):  # a folder that may only be read has no cache
            contents = {"digest": np.array(digest), "ids": np.array(ids)} | dict(
                zip(names, stacked.values())
            )
            _write(cache, _npz(contents, zipfile.ZIP_STORED))
        return ids, stacked


def _stems(folder):
    """Sorted names of a folder's finished JSON files, without ending."""
    if not folder.is_dir():
        return []
    return sorted(
        name[:-5]
        for name in os.listdir(folder)
        if name.endswith(".json") and not name.startswith(".")
    )


# ---- readers ----


def read_run(path, experiment):
    """Open a run for reading. UsageError names the folder or file that is missing, broken or of
    another experiment."""
    path = Path(path)
    if not (path / "meta.json").is_file():
        raise UsageError(
            f"{path} is not a run directory: "
            + ("it has no meta.json" if path.is_dir() else "no such folder")
        )
    meta = _read_meta(path)
    if meta.get("experiment") != experiment:
        raise UsageError(
            f"{path} holds experiment {meta.get('experiment')!r}, and {experiment!r} was wanted"
        )
    run = Run(path, meta)
    meta["counters"] = run.counters()
    return run


def find_runs(runs_dir, sp):
    """The coco runs <runs_dir>/*__sp-<sp>, sorted by folder name. UsageError if there are none."""
    folders = sorted(
        folder
        for folder in Path(runs_dir).glob(f"*__sp-{int(sp)}")
        if (folder / "meta.json").is_file()
    )
    runs = [
        read_run(folder, COCO) for folder in folders if _read_meta(folder).get("experiment") == COCO
    ]
    if not runs:
        command = "python diagnostic_tools/run_coco_diagnostics.py --model_path MODEL" + (
            " --strip_system_prompt" if int(sp) else ""
        )
        raise UsageError(
            f"no runs with --sp {int(sp)} in {runs_dir}; make one with: {command} --out_root"
            f" {runs_dir}"
        )
    return runs

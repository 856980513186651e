"""Run directories: the settings of a run, one NPZ + JSON per item, the items that failed, and the
sums that analyses cache.

    runs/<model>[__<run_name>]__sp-<0|1>/        experiment 'coco_diagnostics'
    runs/<experiment>/<model>[__<run_name>]/     every other experiment
        meta.json  preds.json  per_image/<id>.json + <id>.npz  failures/<id>.json
                   counters/<key>.<token>.txt  attempts/<id>.txt  analysis/  packed/

An item's NPZ is written before its JSON, and the JSON marks it done: a process may be killed at any
point. Several processes may share a run (shards). Many finished items may be packed
(runs.packs); a run is read the same way then. Kept free of torch so that the plotting scripts start
at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError
from vlmdiag.runs import checked, disk, leases, packs
from vlmdiag.runs.checked import CHECKS, Checked, Facts, Sign
from vlmdiag.runs.disk import write_bytes, write_json, write_npz
from vlmdiag.runs.packs import Pack, Packs
from vlmdiag.types import Fields, Record

__all__ = [
    "COCO",
    "Run",
    "find_runs",
    "open_run",
    "read_run",
    "run_path",
    "slug",
    "write_bytes",
    "write_json",
    "write_npz",
]

SCHEMA = 1
# settings that runs of older versions lack: not compared there
ADDED = ("ann_digest", "boxes_digest")
COCO = "coco_diagnostics"
PART = 1000  # items whose arrays are read at a time
# What a run directory owns. meta.json last: a run half removed is still known for what it is.
OWNED = (
    "per_image",
    packs.FOLDER,
    "failures",
    "analysis",
    "counters",
    "attempts",
    checked.NAME,
    "preds.json",
    "meta.json",
)
# what makes a run of an experiment
COMMANDS = {
    COCO: "diagnostic_tools/run_coco_diagnostics.py",
    "psi": "diagnostic_tools/psi.py",
    "relevancy": "diagnostic_tools/relevancy_maps.py",
    "evaluate_relevancy": "diagnostic_tools/evaluate_relevancy.py",
    "hallucination_warning": "diagnostic_tools/hallucination_warning.py",
    "swap_analysis": "swap_analysis/swap_analysis.py",
    "spatial_tunnel": "swap_analysis/spatial_tunnel.py",
    "volcano": "visualize/run_volcano_with_image_attention.py",
    "logit_lens": "scripts/logit_lens/create_logit_lens.py",
    "lens_accuracy": "scripts/logit_lens/lens_accuracy.py",
    "mean_vector": "scripts/save_post_adapter_acts.py",
    "ablation": "scripts/ablation_experiment.py",
    "ablation_vqa": "scripts/ablation_experiment_curate.py",
    "knockout": "scripts/attention_experiment_curate.py",
}
READ: list[Run] = []  # runs that read_run() opened
TOKEN = secrets.token_hex(8)  # of this process
OTHER_NAME = "use another --run_name, or remove the folder by hand"
_UNSET = object()

Array = np.ndarray


# --- names ----------------------------------------------------------------------------------------


def slug(name: str | Path) -> str:
    """Folder name for a model: the last component of its path or hub id, 'parent_checkpoint-n' for
    a folder 'checkpoint-n'."""
    path = Path(os.path.abspath(name))
    if path.name.startswith("checkpoint-"):
        return _clean(f"{path.parent.name}_{path.name}")
    return _clean(path.name)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _clean(text: str) -> str:
    return re.sub(r"""[ :/\\|*?"'<>]""", "-", text)


def run_path(
    out_root: str | Path,
    model: str | Path,
    experiment: str | None = None,
    run_name: str | None = None,
    sp: int | None = None,
) -> Path:
    """Where a run lives. With sp (0 = with system prompt, 1 = without):
    out_root/<slug>[__<run_name>]__sp-<sp>, else out_root/<experiment>/<slug>[__<run_name>]."""
    name = slug(model)
    if run_name:
        name += f"__{_clean(run_name)}"
    if sp is not None:
        return Path(out_root) / f"{name}__sp-{int(sp)}"
    if not experiment:
        raise ValueError("run_path needs an experiment or sp")
    return Path(out_root) / experiment / name


def _is_text(name: str) -> bool:
    """Whether a name can be written: a lone surrogate cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(id: object) -> str:
    """An item's id, which becomes a file name."""
    name = str(id)
    is_safe = (
        name and _is_text(name) and not name.startswith(".") and not re.search(r"[/\\\0]", name)
    )
    if not is_safe or len(name.encode("utf-8", "replace")) > 180:
        raise UsageError(
            f"{name!r} cannot be an item id: ids become file names, so no /, \\, lone surrogate or"
            " leading dot, and 1 to 180 bytes"
        )
    return name


# --- settings -------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if (CHECKOUT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(CHECKOUT), "rev-parse", "--verify", "HEAD"]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            versions["commit"] = done.stdout.strip()
    return versions


def _flat(settings: Fields, prefix: str = "") -> Record:
    """Nested settings as {'outer.inner': value}, so that a difference is named by itself."""
    flat: Record = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _differences(now: Fields, then: Fields) -> list[str]:
    """['key: value now, value then'] for every setting that differs."""
    now, then = _flat(now), _flat(then)
    lines = []
    for key in dict.fromkeys([*now, *then]):
        if now.get(key, _UNSET) != then.get(key, _UNSET):
            lines.append(f"{key}: now {_shown(now, key)}, there {_shown(then, key)}")
    return lines


def _shown(settings: Fields, key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "not set"


def _read_meta(path: Path) -> Record:
    """meta.json of a run folder that has one, checked for its schema."""
    file = path / "meta.json"

    def is_there() -> bool:
        try:
            return file.read_bytes() != b""
        except OSError as error:
            return error.errno not in leases.NOT_THERE

    leases.wait_until(is_there, file)
    meta = disk.read_json(file, OTHER_NAME)
    if meta.get("schema") != SCHEMA or not isinstance(meta.get("settings"), dict):
        raise UsageError(
            f"{file} has schema {meta.get('schema')!r} where {SCHEMA} was wanted: another version"
            f" of these tools wrote it; {OTHER_NAME}"
        )
    return meta


def _clear(path: Path) -> None:
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


def open_run(
    path: str | Path,
    experiment: str,
    identity: Fields,
    free: Fields | None = None,
    overwrite: bool = False,
) -> Run:
    """Create a run directory, or open it again with the same settings.

    identity: settings that the numbers depend on, compared key by key with those in meta.json
    (after a JSON round trip); free: settings that may differ between calls, stored by the call that
    creates the run. overwrite: start again; with shards, in one call before the others start. Of
    several processes that open a new run at once exactly one creates meta.json, the others compare.
    UsageError: other settings, experiment or schema, results without meta.json, a place that cannot
    be written.
    """
    path = Path(path)
    try:
        if overwrite:
            _clear(path)
        path.mkdir(parents=True, exist_ok=True)
        _make_meta(path, experiment, identity, free or {})
        meta = _checked_meta(path, experiment, identity, free or {})
        for name in ("per_image", "failures", "analysis"):
            (path / name).mkdir(exist_ok=True)
        for folder in (path, *(file for file in path.iterdir() if file.is_dir())):
            leases.sweep(folder)
    except OSError as error:
        raise UsageError(
            f"cannot write a run to {path} ({error.strerror or error}); choose another --out_root"
        ) from error
    run = Run(path, meta)
    meta["counters"] = run.counters()
    return run


def _has_results(path: Path) -> bool:
    """Whether a folder holds results of a run."""
    for name in ("per_image", packs.FOLDER):
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with missing, os.scandir(path / name) as entries:
            if any(not entry.name.startswith(".") for entry in entries):
                return True
    return False


def _make_meta(path: Path, experiment: str, identity: Fields, free: Fields) -> None:
    """Write meta.json unless it is there."""
    # looked at before meta.json, which another shard may make in between
    has_results = _has_results(path)
    file = path / "meta.json"
    if not leases.is_empty(file):
        return
    if has_results:
        if leases.is_missing(file):
            raise UsageError(
                f"{path} holds results but no meta.json, so their settings are unknown;"
                f" {OTHER_NAME}"
            )
        return  # another machine has made it, which is not seen here yet
    meta = {
        "schema": SCHEMA,
        "experiment": experiment,
        "settings": dict(identity),
        "free": dict(free),
        "versions": _versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    meta["digest"] = _meta_digest(meta)
    disk.write_once(file, disk.json_bytes(meta))


def _checked_meta(path: Path, experiment: str, identity: Fields, free: Fields) -> Record:
    """meta.json; UsageError where it is of another experiment or has other settings."""
    meta = _read_meta(path)
    if meta.get("experiment") != experiment:
        raise UsageError(
            f"{path} belongs to experiment {meta.get('experiment')!r}, not {experiment!r}; use"
            " another --run_name or --out_root"
        )
    now = json.loads(disk.json_bytes(dict(identity)))
    for name in ADDED:
        if name not in meta["settings"]:
            now.pop(name, None)
    different = _differences(now, meta["settings"])
    if different:
        raise UsageError(
            f"{path} was made with other settings ({'; '.join(different)}); use --overwrite to"
            f" start again or another --run_name{_how_to_go_on(identity, free, meta)}"
        )
    return meta


def _how_to_go_on(identity: Fields, free: Fields, meta: Record) -> str:
    """What else to do, or to know, where the prompt or the model's files differ."""
    hints = ""
    there = meta["settings"]
    system = meta["free"].get("system_prompt")
    if identity.get("prompt") != there.get("prompt") and system:
        hints += f"; to go on with the system prompt of this run: --system_prompt {system!r}"
    files, files_there = free.get("model_files"), meta["free"].get("model_files")
    if identity.get("fingerprint") != there.get("fingerprint") and files and files_there:
        names = sorted(files | files_there)
        changed = [name for name in names if files.get(name) != files_there.get(name)]
        hints += f"; files of the model that are others now: {', '.join(changed[:5])}"
    return hints


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run directory. path: its folder; meta: meta.json, with the counters as they were when it
    was opened."""

    path: Path
    meta: Record
    packed: Packs = field(init=False, repr=False, compare=False)
    known: Checked = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.packed = Packs(self.path)
        self.known = Checked(self.path)

    @property
    def label(self) -> str:
        """Name in figures: the folder's, for coco runs '<model>[__<run_name>]' and whether the
        system prompt was taken out."""
        name = Path(os.path.abspath(self.path)).name
        match = re.fullmatch(r"(.+)__sp-([01])", name)
        if match is None or self.meta.get("experiment") != COCO:
            return name
        return f"{match[1]} (no system prompt)" if match[2] == "1" else match[1]

    def _file(self, id: str, ending: str) -> Path:
        return self.path / "per_image" / f"{_checked(id)}{ending}"

    def files(self, id: str) -> tuple[Path, Path]:
        """Where JSON and NPZ of an item are that is in no pack."""
        return self._file(id, ".json"), self._file(id, ".npz")

    def loose_ids(self) -> list[str]:
        """Sorted ids of the done items with files of their own."""
        return _stems(self.path / "per_image")

    def _failure(self, id: str) -> Path:
        return self.path / "failures" / f"{_checked(id)}.json"

    def _pack(self, id: str) -> Pack | None:
        """The pack that an item is to be read from, None for one with files of its own."""
        return self.packed.find(_checked(id))

    def is_done(self, id: str) -> bool:
        """True if the item is finished: its JSON, or its pack, marks it done. One of which a file
        is missing, empty or cut short is not."""
        if self._pack(id):
            return True
        # the end of a ZIP file is 22 bytes long
        if disk.looks_whole(self._file(id, ".json"), b"{", b"}\n") and disk.looks_whole(
            self._file(id, ".npz"), b"PK", b"PK\x05\x06", behind=18
        ):
            return True
        self.packed.refresh()  # packed a moment ago?
        return self._pack(id) is not None

    def is_whole(self, id: str) -> bool:
        """True if a finished item can be read to the last byte; a damaged one is unfinished from
        now on."""
        return self._whole(id) is not None

    def _whole(self, id: str) -> Facts | None:
        """The facts of an item that was read to the last byte, None for a damaged one."""
        files = self.files(id)
        try:
            signs = None if self._pack(id) else checked.signs_of(*files)
            content = self._content(id)
            disk.check_npz(files[1], self._npz(id))
        except (UsageError, *disk.BROKEN):
            self.undo(id)
            return None
        facts = checked.facts_of(id, content)
        if signs:
            self.known.note(id, signs, facts)
        return facts

    def undo(self, id: str) -> None:
        """Make a finished item unfinished. One in a pack is for this process, and once it is
        written again."""
        if self._pack(id):
            self.packed.damaged.add(id)
        else:
            with contextlib.suppress(OSError):
                self._file(id, ".json").unlink()

    def finished(self, ids: Iterable[str]) -> dict[str, str | None]:
        """{id: digest of its inputs, None where an older version wrote it} of those items that are
        finished and can be read to the last byte; damaged ones are unfinished from now on. What
        was found whole before and has not changed is not read again."""
        self.known.read()
        self.packed.refresh()
        self._check_packs()
        signs = checked.scan(self.path / "per_image")
        found: dict[str, str | None] = {}
        for id in ids:
            pack = self.packed.find(id)
            if pack:
                found[id] = pack.items[id].inputs
                continue
            facts = self.known.facts(id, signs)
            if facts is None and self.is_done(id):
                facts = self._whole(id)
            if facts is not None:
                found[id] = facts.inputs
        return found

    def _check_packs(self) -> None:
        """Find the damaged items of packs that have not been read to their end yet."""
        for pack in self.packed.packs.values():
            files = pack.data_files()
            with contextlib.suppress(OSError):
                if all(self.known.file(file) for file in files):
                    continue
            signs = [checked.sign(file.stat()) for file in files if file.exists()]
            damaged = packs.damaged_items(pack)
            self.packed.damaged |= damaged & set(self.packed.live(pack))
            if not damaged:
                for file, of_file in zip(files, signs):
                    self.known.note_file(file, of_file, True)

    def inputs(self, id: str) -> str | None:
        """The digest of what a finished item was made of, None where an older version wrote it."""
        return checked.facts_of(id, self._content(id)).inputs

    def changed(self, id: str) -> float:
        """When a finished item was written, in seconds since 1970 by the clock of its disk."""
        pack = self._pack(id)
        return pack.items[id].time / 1e9 if pack else self._file(id, ".json").stat().st_mtime

    def write(
        self,
        id: str,
        record: Record,
        arrays: disk.Arrays | None = None,
        keep: bool = True,
        inputs: str | None = None,
    ) -> bool:
        """Commit an item: its arrays as NPZ, then its record as JSON; its failure file goes away.

        inputs: what the item was made of (runs.inputs). Returns True if written, False if it was
        done already (keep=False writes it anyway). UsageError on a full disk.
        """
        written = not (keep and self.is_done(id))
        if written:
            # both made before either is written
            npz = disk.npz_bytes(arrays or {})
            checks = {"npz": _digest(npz), "record": _digest(disk.json_bytes(record))}
            if inputs is not None:
                checks["inputs"] = inputs
            text = disk.json_bytes(dict(record) | {CHECKS: checks})
            files = self.files(id)
            disk.write(files[1], npz)
            disk.write(files[0], text)
            self.packed.written(id)
            with contextlib.suppress(OSError):
                facts = checked.facts_of(id, json.loads(text))
                self.known.note(id, checked.signs_of(*files), facts)
        self._failure(id).unlink(missing_ok=True)
        return written

    def fail(self, id: str, error: BaseException, **facts: object) -> None:
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
        disk.write(self._failure(id), disk.json_bytes(failure))

    def failed(self) -> dict[str, Record]:
        """{id: failure} of the items that failed and are not done."""
        ids = _stems(self.path / "failures")
        return {id: disk.read_json(self._failure(id)) for id in ids if not self.is_done(id)}

    def count(self, key: str, by: int = 1) -> None:
        """Add to a counter of the run, such as oom_halvings, or offer a value to one that begins
        with peak_, which keeps the largest; safe between shards."""
        folder = self.path / "counters"
        # of this process alone: on a network's file system two that append lose lines
        file = folder / f"{_checked(key)}.{TOKEN}.txt"
        try:
            folder.mkdir(exist_ok=True)
            with open(file, "ab", buffering=0) as lines:
                lines.write(b"%d\n" % by)
        except OSError as error:
            raise UsageError(
                f"cannot write ({error.strerror or error}): {folder}; nothing already computed is"
                " lost"
            ) from error

    def counters(self) -> dict[str, int]:
        """{key: sum} of everything counted so far, of a peak_ the largest."""
        sums: dict[str, int] = {}
        for file in sorted((self.path / "counters").glob("*.txt")):
            try:
                lines = re.findall(rb"^\d{1,18}$", file.read_bytes(), re.MULTILINE)
            except OSError as error:
                raise UsageError(f"{file} cannot be read ({error.strerror}); delete it") from error
            key = re.sub(r"(\.[0-9a-f]{16})?\.txt$", "", file.name)
            both = max if key.startswith("peak_") else int.__add__
            for line in lines:
                sums[key] = both(sums.get(key, 0), int(line))
        return sums

    def finish(self) -> Path:
        """Rebuild preds.json, [{"image_id", "caption"}] sorted by item id, from the done items that
        have a caption; where none has, there is no such file. Returns its path."""
        path = self.path / "preds.json"
        ids = None
        # once more if another shard committed items meanwhile, whose own preds.json this one may
        # have replaced
        while ids != (ids := self.ids()):
            preds = [facts.pred for facts in self._facts(ids) if facts.pred is not None]
            if preds:
                disk.write(path, _preds(preds))
            else:
                path.unlink(missing_ok=True)
        self.known.save()
        for id in _stems(self.path / "failures"):
            if self.is_done(id):
                self._failure(id).unlink(missing_ok=True)
        return path

    def _facts(self, ids: Iterable[str]) -> Iterator[Facts]:
        """The facts of done items. UsageError names a broken file."""
        self.known.read()
        signs = checked.scan(self.path / "per_image")
        for id in ids:
            pack = self.packed.find(id)
            if pack:
                yield Facts(pack.items[id].inputs, pack.items[id].pred)
                continue
            facts = self.known.facts(id, signs)
            yield facts or checked.facts_of(id, self._content(id))

    def ids(self) -> list[str]:
        """Sorted ids of the done items."""
        packed = self.packed.ids()
        loose = self.loose_ids()
        return sorted(packed.union(loose)) if packed else loose

    def _content(self, id: str) -> Record:
        """What the JSON of an item holds. UsageError names a broken file."""
        pack = self._pack(id)
        if pack:
            return self.packed.content(pack, id)
        file = self._file(id, ".json")
        try:
            return disk.read_json(file)
        except UsageError as error:
            self.packed.refresh()  # packed a moment ago?
            pack = self._pack(id)
            if pack is None or not isinstance(error.__cause__, FileNotFoundError):
                raise
            return self.packed.content(pack, id)

    def _npz(self, id: str) -> bytes | None:
        """The NPZ of an item in a pack, None for one that has a file. UsageError where it is
        damaged."""
        pack = self._pack(id)
        if pack is None and not self._file(id, ".npz").exists():
            self.packed.refresh()  # packed a moment ago?
            pack = self._pack(id)
        return self.packed.npz(pack, id) if pack else None

    def record(self, id: str) -> Record:
        """The JSON record of an item. UsageError names a broken file."""
        record = self._content(id)
        record.pop(CHECKS, None)
        return record

    def records(self) -> list[Record]:
        """The records of all done items, in the order of ids()."""
        return [self.record(id) for id in self.ids()]

    def arrays(self, id: str) -> dict[str, Array]:
        """{name: array} of an item. UsageError names a broken file."""
        return self._arrays(id) or {}

    def _arrays(self, id: str, keys: Sequence[str] | None = None) -> dict[str, Array] | None:
        """Arrays of an item, None if it lacks one of the keys."""
        return disk.read_npz(self._file(id, ".npz"), keys, self._npz(id))

    def stack(self, keys: str | Sequence[str]) -> tuple[list[str], dict[str, Array]]:
        """(ids, {key: array (n, ...)}): NPZ arrays of the n items that have all the keys, in the
        order of ids().

        Cached in analysis/ for as long as no file changes. UsageError: no item has the keys, shapes
        that differ between items, a broken file.
        """
        keys = [keys] if isinstance(keys, str) else list(keys)
        ids = self.ids()
        found: list[str] = []
        stacked: dict[str, Array] = {}
        for of_part, part in self._parts(ids, keys):
            for key, array in part.items():
                if key not in stacked:
                    stacked[key] = np.empty((len(ids), *array.shape[1:]), array.dtype)
                elif array.dtype != stacked[key].dtype:
                    dtype = np.result_type(array, stacked[key])
                    stacked[key] = stacked[key].astype(dtype)
                stacked[key][len(found) : len(found) + len(array)] = array
            found += of_part
        return found, {key: stacked[key][: len(found)] for key in keys}

    def parts(self, keys: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Array]]]:
        """What stack() gives, of at most PART items at a time: of many items the arrays of all take
        gigabytes."""
        return self._parts(self.ids(), list(keys))

    def _parts(
        self, ids: Sequence[str], keys: Sequence[str]
    ) -> Iterator[tuple[list[str], dict[str, Array]]]:
        cache = self._cached(ids, keys)
        if cache is None:
            yield from self._stacked(ids, keys)
            return
        with np.load(cache, allow_pickle=False) as archive:
            for part in range(int(archive["parts"])):
                arrays = {key: archive[f"array_{n}_{part}"] for n, key in enumerate(keys)}
                yield archive[f"ids_{part}"].tolist(), arrays

    def _cached(self, ids: Sequence[str], keys: Sequence[str]) -> Path | None:
        """The file of the parts, made where there is none of these items; None where it cannot be,
        as in a folder that may only be read."""
        state = [SCHEMA, PART, keys, self._state_of(ids)]
        digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        name = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
        cache = self.path / "analysis" / f"stack-{name}.npz"
        with contextlib.suppress(UsageError, *disk.BROKEN):  # none, or a broken one
            cached = disk.read_npz(cache, ["digest"])
            if cached and str(cached["digest"]) == digest:
                disk.check_npz(cache)
                return cache

        def members() -> Iterator[tuple[str, Array]]:
            count = 0
            for of_part, part in self._stacked(ids, keys):
                yield f"ids_{count}", np.array(of_part)
                for n, key in enumerate(keys):
                    yield f"array_{n}_{count}", part[key]
                count += 1
            yield "parts", np.array(count)
            yield "digest", np.array(digest)

        with contextlib.suppress(UsageError):  # also of a broken item, which _stacked() names
            disk.write_large_npz(cache, members())
            return cache
        return None

    def _state_of(self, ids: Sequence[str]) -> list[tuple[str, Sign]]:
        """Names, sizes and times of the items' NPZ: what a cache of them is valid for."""
        signs = checked.scan(self.path / "per_image")
        state = {}
        for id in ids:
            pack = self.packed.find(id)
            file = pack.file(".zip") if pack else self._file(id, ".npz")
            if file.name in state:
                continue
            try:
                state[file.name] = checked.sign(file.stat()) if pack else signs[file.name]
            except (KeyError, OSError) as error:
                raise UsageError(
                    f"{file} is missing; run the command that made {self.path} again"
                ) from error
        return list(state.items())

    def _stacked(
        self, ids: Sequence[str], keys: Sequence[str]
    ) -> Iterator[tuple[list[str], dict[str, Array]]]:
        """parts(), read from the items."""
        first: tuple[str, dict[str, Array]] | None = None
        for start in range(0, len(ids), PART):
            found: list[str] = []
            rows: dict[str, list[Array]] = {key: [] for key in keys}
            for id in ids[start : start + PART]:
                arrays = self._arrays(id, keys)
                if arrays is None:
                    continue
                first = first or (id, arrays)
                for key, array in arrays.items():
                    shape = first[1][key].shape
                    if array.shape != shape:
                        raise UsageError(
                            f"{self.path}: {key} has shape {shape} for {first[0]} but {array.shape}"
                            f" for {id}, so they cannot be stacked"
                        )
                    rows[key].append(array)
                found.append(id)
            if found:
                yield found, {key: np.stack(rows[key]) for key in keys}
        if first is None:
            known = ""
            if ids:
                known = f"; the first has {', '.join(sorted(self.arrays(ids[0]))) or 'no arrays'}"
            raise UsageError(
                f"{self.path}: none of its {len(ids)} items has all of {', '.join(keys)}{known}"
            )


def _stems(folder: Path) -> list[str]:
    """Sorted names of a folder's finished JSON files, without ending."""
    if not folder.is_dir():
        return []
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name[:-5] for name in names if name.endswith(".json"))


def _preds(preds: Sequence[Sequence[object]]) -> bytes:
    """preds.json of [image_id, caption]; as disk.json_bytes(), of what is text or a number without
    the walk through every value, which takes most of the time for 100,000 of them."""
    if not all(type(value) in (str, int) for pred in preds for value in pred):
        names = ("image_id", "caption")
        return disk.json_bytes([dict(zip(names, pred, strict=True)) for pred in preds])
    text_of = json.JSONEncoder(ensure_ascii=False).encode
    entries = [
        f' {{\n  "image_id": {text_of(image_id)},\n  "caption": {text_of(caption)}\n }}'
        for image_id, caption in preds
    ]
    text = "[\n" + ",\n".join(entries) + "\n]\n"
    return text.encode("utf-8", "backslashreplace")


# --- readers --------------------------------------------------------------------------------------


def read_run(path: str | Path, experiment: str | None = None) -> Run:
    """Open a run for reading. experiment: None takes any. UsageError names the folder or file that
    is missing, broken or of another experiment."""
    path = _without_system(Path(path))
    if not (path / "meta.json").is_file():
        reason = "it has no meta.json" if path.is_dir() else "no such folder"
        raise UsageError(f"{path} is not a run directory: {reason}{_where_else(path, experiment)}")
    meta = _read_meta(path)
    if experiment not in (None, meta.get("experiment")):
        raise UsageError(
            f"{path} holds experiment {meta.get('experiment')!r}, and {experiment!r} was wanted,"
            f" which python {COMMANDS.get(experiment or '', 'another command')} makes"
        )
    run = Run(path, meta)
    meta["counters"] = run.counters()
    READ.append(run)
    return run


def damage() -> str | None:
    """What is wrong with a file of the runs that this process reads, None where nothing is: a
    record or an NPZ that is another one now than was written, or of an older version one that lacks
    what most of them have. For a command that met what it cannot explain (cli.run)."""
    for run in READ:
        fields: dict[str, tuple[str, ...]] = {}
        unsure: list[str] = []
        for id in run.ids():
            files = run.files(id)
            try:
                content, npz = run._content(id), run._npz(id)
                arrays = disk.read_npz(files[1], None, npz) or {}
            except UsageError as error:
                return str(error)
            checks = content.pop(CHECKS, {})  # an older version wrote none
            fields[id] = (*sorted(content), *sorted(arrays))
            if not checks:  # nothing says what was written, but that the others have it too
                unsure.append(id)
            if not isinstance(checks, dict):
                return f"{files[0]} is not as it was written; {disk.AGAIN}"
            if npz is None:
                npz = files[1].read_bytes()
            contents = (disk.json_bytes(content), npz)
            for file, data, name in zip(files, contents, ("record", "npz"), strict=True):
                if checks and checks.get(name) != _digest(data):
                    return f"{file} is not as it was written; {disk.AGAIN}"
        usual = Counter(fields.values()).most_common(1)
        for id in unsure:
            if fields[id] != usual[0][0]:
                odd = sorted({*fields[id]} ^ {*usual[0][0]})
                return (
                    f"{run.path / 'per_image' / id}.json and .npz differ from the others in"
                    f" {', '.join(odd[:5])}; {disk.AGAIN}"
                )
        if run.meta.get("digest", None) not in (None, _meta_digest(run.meta)):
            return f"{run.path / 'meta.json'} is not as it was written; {OTHER_NAME}"
    return None


def _meta_digest(meta: Record) -> str:
    names = ("schema", "experiment", "settings", "free", "versions", "created")
    return _digest(disk.json_bytes({name: meta.get(name) for name in names}))


def _without_system(path: Path) -> Path:
    """<model>__sp-1 in place of a <model>__sp-0 that is not there: the published tools give both
    the same name. A line says so."""
    other = path.with_name(path.name.removesuffix("0") + "1")
    if not path.name.endswith("__sp-0") or path.exists() or not (other / "meta.json").is_file():
        return path
    print(f"{path}: no such run; read is {other}, made with --strip_system_prompt")
    return other


def _where_else(path: Path, experiment: str | None) -> str:
    """The runs of an experiment in a folder, or beside it, that were meant perhaps, and the command
    that makes one."""
    place = path if path.is_dir() else path.parent
    mark = b'"experiment"' if experiment is None else f'"{experiment}"'.encode()
    runs = [
        str(file.parent)
        for file in sorted([*place.glob("*/meta.json"), *place.glob("*/*/meta.json")])[:200]
        if mark in file.read_bytes()
    ]
    if runs:
        return f"; there are {', '.join(runs[:4])}{', ...' * (len(runs) > 4)}"
    command = COMMANDS.get(experiment or "")
    return f"; make one with python {command} --model_path MODEL" if command else ""


def find_runs(runs_dir: str | Path, sp: int) -> list[Run]:
    """The coco runs <runs_dir>/*__sp-<sp>, sorted by folder name; those without a system prompt
    where there are none with one, and a line says so. UsageError if there are none at all."""
    runs = _coco_runs(Path(runs_dir), sp)
    if not runs and not sp and (runs := _coco_runs(Path(runs_dir), 1)):
        print(f"{runs_dir} has no run with --sp 0; read are those with 1, without a system prompt")
    if not runs:
        command = "python diagnostic_tools/run_coco_diagnostics.py --model_path MODEL"
        if int(sp):
            command += " --strip_system_prompt"
        raise UsageError(
            f"no runs with --sp {int(sp)} in {runs_dir}; make one with: {command} --out_root"
            f" {runs_dir}"
        )
    return runs


def _coco_runs(runs_dir: Path, sp: int) -> list[Run]:
    return [
        read_run(folder, COCO)
        for folder in sorted(runs_dir.glob(f"*__sp-{int(sp)}"))
        if (folder / "meta.json").is_file() and _read_meta(folder).get("experiment") == COCO
    ]

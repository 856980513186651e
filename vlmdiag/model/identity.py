"""What tells one model from another: everything of its files that can change a number."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from huggingface_hub import try_to_load_from_cache

from vlmdiag.runs.rundirs import slug
from vlmdiag.types import Record

if TYPE_CHECKING:
    from vlmdiag.types import VLM

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# configs, processors, tokenizers, templates, the checkpoint's own code
SETTINGS = (".json", ".yaml", ".jinja", ".model", ".tiktoken", ".py")
WORDS = ("vocab.txt", "merges.txt")
# what a training leaves beside a model, and other models below it
NOT_READ = re.compile(
    r"(trainer_state|(all|train|eval)_results)\.json"
    r"|(training_args|optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*\.(bin|pt|pth|pkl)"
)
# of which one makes a folder below a model a part of it, whose JSON files count
PART = re.compile(r"(|.*_)config\.json|tokenizer.*\.json|.*\.(safetensors|bin|pt|pth)")
OTHER_FOLDERS = ("checkpoint-", "global_step", "runs", ".")

BLOCKS = 8  # of a tensor that are sampled
BLOCK = 256  # bytes
# tables of which each row is sampled: a fine-tune may have changed a few words only
TABLES = re.compile(r"embed_tokens|word_embeddings|\bwte\b|lm_head|^shared\.")
ROW_BLOCK = 16  # bytes


def fingerprint(path: str | Path) -> str:
    """A digest of all files of a folder that can change a number, see file_digests(); of a hub id
    its name and, where it is in the cache, its commit."""
    if not os.path.isdir(path):
        cached = None
        with contextlib.suppress(ValueError):  # a path that is no hub id
            cached = try_to_load_from_cache(str(path), "config.json")
        commit = Path(cached).parent.name if isinstance(cached, str) else ""
        return f"hub:{path}" + (f"@{commit}" if commit else "")
    return _digest_of(file_digests(path))


def _digest_of(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def file_digests(path: str | Path) -> dict[str, str]:
    """{file: digest} of what is read of a folder: settings whole; of weights the size, the header,
    and sampled bytes of each tensor, so that weights that were merged in place are others. {} for a
    hub id."""
    root = Path(path)
    if not root.is_dir():
        return {}
    digests = {}
    for file in sorted(_files_of(root)):
        digest = hashlib.sha256()
        if file.suffix not in WEIGHTS:
            digest.update(file.read_bytes())
        else:
            for piece in _sampled(file):
                digest.update(piece)
        digests[file.relative_to(root).as_posix()] = digest.hexdigest()[:16]
    return digests


def _files_of(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(OTHER_FOLDERS)]
        # results that somebody keeps below a model are no part of it
        is_part = Path(folder) == root or any(map(PART.fullmatch, names))
        for name in names:
            file = Path(folder, name)
            is_read = file.suffix in SETTINGS + WEIGHTS or name in WORDS
            is_read &= is_part or file.suffix != ".json"
            if is_read and not NOT_READ.fullmatch(name) and file.is_file():
                yield file


def _sampled(file: Path) -> Iterator[bytes]:
    """Size, header and samples of a weight file."""
    size = file.stat().st_size
    yield str(size).encode()
    if file.suffix != ".safetensors":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            # torch's format holds a checksum of each tensor
            for entry in archive.infolist():
                yield f"{entry.filename} {entry.file_size} {entry.CRC}".encode()
        with open(file, "rb") as stream:
            yield from _blocks(stream, 0, size, 32 * BLOCKS)
        return
    with open(file, "rb") as stream:
        header = _header(stream, size)
        yield header
        start = 8 + len(header)
        try:
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            places = [
                (
                    *map(int, entry["data_offsets"]),
                    int(entry["shape"][0]) if TABLES.search(name) else 0,
                )
                for name, entry in tensors.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            places = [(0, size - start, 0)]  # no safetensors file, which loading says
        for first, end, rows in places:
            count, block = (rows, ROW_BLOCK) if rows else (BLOCKS, BLOCK)
            yield from _blocks(stream, start + first, start + end, count, block)


def _header(stream: BinaryIO, size: int) -> bytes:
    """The JSON header of a safetensors file; what there is of one in a broken file."""
    length = stream.read(8)
    if len(length) < 8:
        return b""
    return stream.read(min(struct.unpack("<Q", length)[0], size))


def _blocks(
    stream: BinaryIO, start: int, end: int, count: int, block: int = BLOCK
) -> Iterator[bytes]:
    """`count` blocks spread evenly over [start, end), the first and the last bytes among them; all
    of it where it is short."""
    length = end - start
    if length <= count * block:
        stream.seek(start)
        yield stream.read(max(0, length))
        return
    for number in range(count):
        stream.seek(start + (length - block) * number // (count - 1))
        yield stream.read(block)


def fingerprint_in_memory(vlm: VLM) -> str:
    """The same of a model that was not read from files here: config, tokenizer, image processor,
    chat template, and sampled values of each parameter."""
    settings = vlm.model.config.to_dict()
    for name in ("_name_or_path", "use_cache", "transformers_version"):
        settings.pop(name, None)
    pieces = {"config": json.dumps(settings, sort_keys=True, default=str)}
    for part in ("tokenizer", "image_processor"):
        pieces[part] = repr(getattr(vlm.processor, part, None))
    if vlm.tokenizer.is_fast:
        pieces["vocabulary"] = vlm.tokenizer.backend_tokenizer.to_str()
    pieces["template"] = str(getattr(vlm.processor, "chat_template", None))
    pieces["ends"] = str(vlm.model.generation_config.eos_token_id)
    for name, module in vlm.model.named_modules():
        if hasattr(module, "base_layer"):  # peft's
            state = (module.active_adapters, module.disable_adapters, module.merged)
            pieces[f"adapters of {name}"] = f"{state} {getattr(module, 'scaling', '')}"
    for name, tensor in vlm.model.state_dict().items():
        flat = tensor.detach().flatten()
        step = max(1, len(flat) // (BLOCKS * BLOCK))
        sampled = tensor.detach()[:, :8].flatten() if TABLES.search(name) else flat[::step]
        values = sampled.float().cpu().numpy().tobytes()
        pieces[name] = f"{tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"
    return _digest_of(pieces)


def identity_of(vlm: VLM) -> Record:
    """What a run keeps of its model, and goes on only with the same: model_name, fingerprint,
    dtype, which says how weights are rounded too; where there is one, fingerprints of adapter, base
    model and vision tower, the family file of the user's, and another image_aspect than the
    processor's."""
    dtype = str(vlm.dtype).removeprefix("torch.")
    quantize_type = vlm.options.get("quantize_type")
    if quantize_type is not None and quantize_type != "fp16":
        dtype += f" {quantize_type}"
    in_memory = vlm.options.get("in_memory")
    digest = fingerprint_in_memory(vlm) if in_memory else fingerprint(vlm.path)
    identity = {"model_name": slug(vlm.path), "fingerprint": digest, "dtype": dtype}
    for part in ("adapter", "base_model", "vision_tower_path"):
        place = vlm.options.get(part)
        if place and not in_memory and str(place) != vlm.path:
            identity[part.removesuffix("_path")] = fingerprint(place)
    if vlm.options.get("image_aspect", "processor") != "processor":
        identity["image_aspect"] = vlm.options["image_aspect"]
    file = vlm.family.file
    if file is not None:
        identity["family_file"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return identity

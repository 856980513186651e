"""The mean of all vision tokens, the vector that token ablation puts in place of a token. arXiv
2410.07149; docs/studies/llava_interp.md, section 1.6.

    python scripts/calculate_mean_vector.py runs/mean_vector/tiny-llava

directory: what save_post_adapter_acts.py wrote, all shards of it, or a cache of the published form,
batch_<n>.pt with tensors (pictures, P, d). Every vision token weighs the same, so pictures with
more tokens weigh more. Sums are merged in order in float64, so equal input gives equal bytes.

Writes into the directory: mean_vector.pt, a bare float32 tensor (d,) that loads with
weights_only=True; variance_vector.pt, the same for the variance of each dimension over tokens
(divided by their number); mean_vector.json, where they come from: model, pictures, tokens, list of
pictures, settings, versions, and a summary. A second run reads none of them. For LLaVA-1.5 over
ImageNet the published vector has norm 25.57; tiny-llava's over data/shapes/train2017 has about 7 to
8, a sixth of its tokens' mean square."""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import disk, rundirs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EXPERIMENT = "mean_vector"
LARGEST = 2**27  # numbers of one picture: 1 GiB in float64


class Sums(NamedTuple):
    """Of n vectors, float64: their mean and the sums of squared deviations from it."""

    n: int
    mean: Float[np.ndarray, " d"]
    m2: Float[np.ndarray, " d"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "directory", help="what save_post_adapter_acts.py wrote, or a folder of batch_<n>.pt"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the tensors of a batch_<n>.pt cache are summed",
        type=cli.device,
    )
    return parser.parse_args(argv)


def merged(parts: Iterable[Sums]) -> Sums:
    """The sums of all parts together. Chan, Golub and LeVeque 1979."""
    total: int = 0
    mean: Any = 0.0
    m2: Any = 0.0
    for part in parts:
        if part.n:
            whole = total + part.n
            step = part.mean - mean
            m2 = m2 + part.m2 + step**2 * (total * part.n / whole)
            mean = mean + step * (part.n / whole)
            total = whole
    return Sums(total, mean, m2)


def sums_of_run(directory: Path) -> tuple[Sums, dict[str, Any]]:
    """(sums, provenance) of a run directory. UsageError where blocks are missing."""
    run = rundirs.read_run(directory, EXPERIMENT)
    settings = run.meta["settings"]
    ids = run.ids()
    wanted = -(-settings["pictures"] // settings["block"])
    if len(ids) < wanted:
        raise UsageError(
            f"{directory}: {wanted - len(ids)} of {wanted} blocks of pictures are missing; run"
            " save_post_adapter_acts.py again with its flags, every shard of it"
        )
    records = [run.record(id) for id in ids]

    def blocks() -> Iterator[Sums]:
        counted = [record["vectors"] for record in records]
        for id, vectors in zip(tqdm(ids, desc="blocks", disable=None), counted, strict=True):
            arrays = run.arrays(id)
            if not np.isfinite(arrays["mean"]).all():
                raise UsageError(
                    f"{run.path / 'per_image' / id}.npz: the activations of this block are not"
                    " finite; compute them with --dtype float32"
                )
            if int(arrays["count"]) != vectors or not (arrays["m2"] >= 0).all():
                raise UsageError(
                    f"{run.path / 'per_image' / id}.npz does not fit its record; {disk.AGAIN}"
                )
            yield Sums(int(arrays["count"]), arrays["mean"], arrays["m2"])

    return merged(blocks()), {
        "source": "save_post_adapter_acts.py",
        "images": sum(record["pictures"] for record in records),
        "unreadable": [name for record in records for name in record["unreadable"]],
        "settings": settings,
        "free": run.meta["free"],
        "versions": run.meta["versions"],
    }


def sums_of_cache(directory: Path, device: str) -> tuple[Sums, dict[str, Any]]:
    """(sums, provenance) of batch_<n>.pt files, each a tensor (pictures, P, d) or (P, d), or a list
    of such."""
    import torch

    files = sorted(directory.glob("batch_*.pt"), key=_by_number)
    if not files:
        raise UsageError(
            f"{directory} is no run directory of save_post_adapter_acts.py (no meta.json), and has"
            " no batch_<n>.pt either"
        )
    digest = hashlib.sha256()
    widths: list[int] = []  # one a picture

    def pictures() -> Iterator[Sums]:
        for file in tqdm(files, desc="files", disable=None):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for tensor in read_batch(file, device):
                width = tensor.shape[-1]
                if widths and width != widths[0]:
                    raise UsageError(
                        f"{file}: vectors of width {width}, those before have {widths[0]}"
                    )
                widths.extend([width] * len(tensor))
                for tokens in map(torch.Tensor.double, tensor):
                    mean = tokens.mean(0)
                    if not mean.isfinite().all():
                        raise UsageError(f"{file}: its activations are not finite")
                    m2 = (tokens - mean).square().sum(0)
                    yield Sums(len(tokens), mean.cpu().numpy(), m2.cpu().numpy())

    sums = merged(pictures())
    return sums, {
        "source": "batch_<n>.pt",
        "images": len(widths),
        "files": len(files),
        "list_digest": digest.hexdigest()[:16],
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
    }


def _by_number(file: Path) -> list[int | str]:
    pieces = re.split(r"(\d+)", file.name)
    return [int(piece) if piece.isdigit() else piece for piece in pieces]


def read_batch(file: Path, device: str) -> list[Float[Tensor, "pictures P d"]]:
    """The tensors of a file."""
    import torch

    try:
        content = torch.load(file, weights_only=True, map_location=device)
    except Exception as error:  # noqa: BLE001 -- pickle, zip and disk errors of every kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{file} cannot be read ({reason})") from error
    tensors = content if isinstance(content, (list, tuple)) else [content]
    for tensor in tensors:
        kind = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
        is_wanted = torch.is_tensor(tensor) and tensor.dim() in (2, 3)
        is_wanted = is_wanted and tensor.is_floating_point() and tensor.numel() > 0
        if not is_wanted:
            raise UsageError(f"{file}: tensors of shape (pictures, P, d) were wanted, found {kind}")
        if tensor.shape[-2:].numel() > LARGEST:
            raise UsageError(
                f"{file}: a tensor of shape {kind} has more numbers for a picture than {LARGEST}"
            )
    return [tensor if tensor.dim() == 3 else tensor[None] for tensor in tensors]


def summary_of(mean: Float[np.ndarray, " d"], variance: Float[np.ndarray, " d"]) -> dict[str, Any]:
    """Numbers that tell one mean vector from another."""
    largest = np.argsort(-np.abs(mean), kind="stable")[:5]
    energy = np.sum(mean**2)
    return {
        "norm": np.linalg.norm(mean),
        "mean": mean.mean(),
        "std": mean.std(),
        "min": mean.min(),
        "max": mean.max(),
        "largest": [[int(k), mean[k]] for k in largest],
        "total_variance": variance.sum(),
        "median_variance": np.median(variance),
        "max_variance": variance.max(),
        "share_of_mean": energy / max(energy + variance.sum(), 1e-300),
    }


def write_tensor(path: Path, values: Float[np.ndarray, " d"]) -> str:
    """A bare float32 tensor, in one step. Returns the digest of its bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.asarray(values, np.float32)), buffer)
    disk.write_bytes(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    folder = Path(args.directory)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    if (folder / "meta.json").is_file():
        sums, provenance = sums_of_run(folder)
    else:
        sums, provenance = sums_of_cache(folder, args.device)
    if not sums.n:
        raise UsageError(f"{folder} holds no vision token: none of its pictures could be used")
    mean, variance = sums.mean, sums.m2 / sums.n
    summary = summary_of(mean, variance)
    write_tensor(folder / "variance_vector.pt", variance)
    facts = {
        "definition": "mean over all vision tokens of the connector's output",
        "sha256": write_tensor(folder / "mean_vector.pt", mean),
        "width": len(mean),
        "vectors": sums.n,
    }
    rundirs.write_json(folder / "mean_vector.json", facts | provenance | {"summary": summary})
    print(
        f"wrote {folder / 'mean_vector.pt'}: {sums.n} vision tokens of"
        f" {provenance['images']} pictures, d = {len(mean)}"
    )
    print(
        f"norm of the mean {summary['norm']:.4f}; root of the total variance"
        f" {summary['total_variance'] ** 0.5:.4f}"
    )
    unreadable = provenance.get("unreadable")
    if unreadable:
        print(
            f"left out: {len(unreadable)} pictures that could not be used, such as {unreadable[0]}"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)

"""The mean of all vision tokens, the vector that token ablation puts in place of a token. arXiv
2410.07149; our study's 1.6.

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

import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs

EXPERIMENT = "mean_vector"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "directory", help="what save_post_adapter_acts.py wrote, or a folder of batch_<n>.pt"
    )
    parser.add_argument(
        "--device", default="cpu", help="where the tensors of a batch_<n>.pt cache are summed"
    )
    return parser.parse_args(argv)


def merged(parts):
    """(count, mean (d,), m2 (d,)) of several such parts: m2 is the sum of squared deviations from
    the mean. Chan, Golub and LeVeque 1979."""
    total, mean, m2 = 0, 0.0, 0.0
    for count, part_mean, part_m2 in parts:
        if count:
            step = part_mean - mean
            m2 = m2 + part_m2 + step**2 * (total * count / (total + count))
            mean = mean + step * (count / (total + count))
            total += count
    return total, mean, m2


def sums_of_run(directory):
    """(sums, provenance) of a run directory. UsageError where blocks are missing."""
    run = rundirs.read_run(directory, EXPERIMENT)
    settings, ids = run.meta["settings"], run.ids()
    wanted = -(-settings["pictures"] // settings["block"])
    if len(ids) < wanted:
        again = "run save_post_adapter_acts.py again with its flags, every shard of it"
        raise UsageError(
            f"{directory}: {wanted - len(ids)} of {wanted} blocks of pictures are missing; {again}"
        )
    records = [run.record(id) for id in ids]

    def parts():
        for id in tqdm(ids, desc="blocks", disable=None):
            arrays = run.arrays(id)
            if not np.isfinite(arrays["mean"]).all():
                raise UsageError(
                    f"{run.path / 'per_image' / id}.npz: the activations of this block are not"
                    " finite; compute them with --dtype float32"
                )
            yield int(arrays["count"]), arrays["mean"], arrays["m2"]

    unreadable = [name for record in records for name in record["unreadable"]]
    provenance = {
        "source": "save_post_adapter_acts.py",
        "images": sum(record["pictures"] for record in records),
        "unreadable": unreadable,
    }
    return merged(parts()), provenance | {
        "settings": settings,
        "free": run.meta["free"],
        "versions": run.meta["versions"],
    }


def sums_of_cache(directory, device):
    """(sums, provenance) of batch_<n>.pt files, each a tensor (pictures, P, d) or (P, d), or a list
    of such."""
    files = sorted(
        Path(directory).glob("batch_*.pt"),
        key=lambda file: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)
        ],
    )
    if not files:
        raise UsageError(
            f"{directory} is no run directory of save_post_adapter_acts.py (no meta.json), and has"
            " no batch_<n>.pt either"
        )
    digest, images, width = hashlib.sha256(), 0, None

    def parts():
        nonlocal images, width
        for file in tqdm(files, desc="files", disable=None):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for pictures in read_batch(file, device):
                if width not in (None, pictures.shape[-1]):
                    raise UsageError(
                        f"{file}: vectors of width {pictures.shape[-1]}, those before have {width}"
                    )
                images, width = images + len(pictures), pictures.shape[-1]
                for tokens in pictures:
                    tokens = tokens.double()
                    mean = tokens.mean(0)
                    if not mean.isfinite().all():
                        raise UsageError(f"{file}: its activations are not finite")
                    yield (
                        len(tokens),
                        mean.cpu().numpy(),
                        (tokens - mean).square().sum(0).cpu().numpy(),
                    )

    sums = merged(parts())
    provenance = {
        "source": "batch_<n>.pt",
        "images": images,
        "files": len(files),
        "list_digest": digest.hexdigest()[:16],
    }
    return sums, provenance | {"versions": {"numpy": np.__version__, "torch": torch.__version__}}


def read_batch(file, device):
    """The tensors of a file, each (pictures, P, d)."""
    try:
        content = torch.load(file, weights_only=True, map_location=device)
    except Exception as error:  # noqa: BLE001 -- pickle, zip and disk errors of every kind
        raise UsageError(
            f"{file} cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})"
        ) from error
    tensors = content if isinstance(content, (list, tuple)) else [content]
    for tensor in tensors:
        if (
            not torch.is_tensor(tensor)
            or tensor.dim() not in (2, 3)
            or not tensor.is_floating_point()
        ):
            found = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
            raise UsageError(
                f"{file}: tensors of shape (pictures, P, d) were wanted, found {found}"
            )
    return [tensor if tensor.dim() == 3 else tensor[None] for tensor in tensors]


def summary_of(mean, variance):
    """Numbers that tell one mean vector from another."""
    largest = np.argsort(-np.abs(mean), kind="stable")[:5]
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
        "share_of_mean": np.sum(mean**2) / max(np.sum(mean**2) + variance.sum(), 1e-300),
    }


def write_tensor(path, values):
    """A bare float32 tensor, in one step. Returns the digest of its bytes."""
    torch.save(torch.from_numpy(np.asarray(values, np.float32)), stream := io.BytesIO())
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(stream.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror or error})") from error
    return hashlib.sha256(stream.getvalue()).hexdigest()


def main(argv=None):
    args = parse_args(argv)
    folder = Path(args.directory)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = (
        sums_of_run(folder)
        if (folder / "meta.json").is_file()
        else sums_of_cache(folder, args.device)
    )
    (count, mean, m2), provenance = found
    if not count:
        raise UsageError(f"{folder} holds no vision token: none of its pictures could be used")
    variance, summary = m2 / count, summary_of(mean, m2 / count)
    write_tensor(folder / "variance_vector.pt", variance)
    digest = write_tensor(folder / "mean_vector.pt", mean)
    facts = {
        "definition": "mean over all vision tokens of the connector's output",
        "sha256": digest,
        "width": len(mean),
        "vectors": count,
    }
    rundirs.write_json(folder / "mean_vector.json", facts | provenance | {"summary": summary})
    print(
        f"wrote {folder / 'mean_vector.pt'}: {count} vision tokens of {provenance['images']}"
        f" pictures, d = {len(mean)}"
    )
    print(
        f"norm of the mean {summary['norm']:.4f}; root of the total variance"
        f" {summary['total_variance'] ** 0.5:.4f}"
    )
    if provenance.get("unreadable"):
        print(
            f"left out: {len(provenance['unreadable'])} pictures that could not be used, such as"
            f" {provenance['unreadable'][0]}"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)

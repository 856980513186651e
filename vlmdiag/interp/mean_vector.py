"""The mean of all vision tokens of a folder of pictures, the vector that token ablation puts in
place of a token: sums by blocks of pictures, and how they merge.

    mean = sum_t x_t / n,   m2 = sum_t (x_t - mean)^2 per dimension, x_t (d,) a vision token as the
                            decoder gets it; float64, merged picture by picture

arXiv 2410.07149; docs/studies/llava_interp.md, sections 1.5 and 1.6. Merging: Chan, Golub and
LeVeque 1979. Used by scripts/save_post_adapter_acts.py and calculate_mean_vector.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import Sample, id_of
from vlmdiag.runs import disk
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from PIL.Image import Image

    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import VLM

QUESTION = "Describe the image."  # any: vision tokens do not depend on it

Picture = "Image | Exception"  # or the error that it is unreadable by
Result = tuple[Record, dict[str, "np.ndarray | int"]]


@dataclass(frozen=True)
class Block:
    """The item: some pictures, by file name."""

    id: str
    names: tuple[str, ...]
    folder: Path = Path()

    @property
    def inputs(self) -> list[object]:
        """The pictures, as files."""
        return [[name, self.folder / name] for name in self.names]


WITHOUT_FLOAT64 = {"mps"}  # types of devices


class Sums(NamedTuple):
    """Of n vectors, float64: their mean and the sums of squared deviations from it."""

    n: int
    mean: Float[Tensor, " d"]
    m2: Float[Tensor, " d"]


def add(total: Sums | None, tokens: Float[Tensor, "P d"]) -> Sums:
    """The sums with the tokens of one more picture; None: of no token yet."""
    if tokens.device.type in WITHOUT_FLOAT64:
        tokens = tokens.cpu()
    tokens = tokens.double()
    count = len(tokens)
    mean = tokens.mean(0)
    m2 = (tokens - mean).square().sum(0)
    if total is None:
        return Sums(count, mean, m2)
    whole = total.n + count
    step = mean - total.mean
    return Sums(
        whole,
        total.mean + step * (count / whole),
        total.m2 + m2 + step.square() * (total.n * count / whole),
    )


def vision_tokens(
    vlm: VLM, pictures: Sequence[tuple[str, Image]]
) -> list[Float[Tensor, "P d"] | Exception]:
    """Of each named picture its vision tokens, or the ValueError that the processor raises for
    it."""
    samples = [Sample(name, Path(name), QUESTION) for name, _ in pictures]
    try:
        batch = vlm.encode(samples, [picture for _, picture in pictures])
    except ValueError as error:
        if len(pictures) == 1:
            return [error]
        return [vision_tokens(vlm, [picture])[0] for picture in pictures]
    return list(vlm.vision(batch).pooler_output)


def make_process(
    vlm: VLM, run: Run, image_dir: Path, batch_size: int, keep_acts: bool
) -> Callable[[Sequence[tuple[Block, Fields]]], list[Result]]:
    """process([(block, {name: picture or error}), ...]) -> [(record, arrays), ...]. Notes pictures
    that cannot be used in failures/ and in their block's record."""
    width = vlm.model.config.get_text_config().hidden_size

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Block, Fields]]) -> list[Result]:
        sums: dict[str, Sums] = {}
        acts: dict[str, dict[str, Tensor]] = {block.id: {} for block, _ in loaded}
        errors: dict[str, dict[str, Exception]] = {block.id: {} for block, _ in loaded}
        readable: list[tuple[Block, str, Image]] = []
        for block, pictures in loaded:
            for name, picture in pictures.items():
                if isinstance(picture, Exception):
                    errors[block.id][name] = picture
                else:
                    readable.append((block, name, picture))
        for start in range(0, len(readable), batch_size):
            part = readable[start : start + batch_size]
            of_pictures = vision_tokens(vlm, [(name, picture) for _, name, picture in part])
            for (block, name, _), tokens in zip(part, of_pictures, strict=True):
                if isinstance(tokens, Exception):
                    errors[block.id][name] = tokens
                    continue
                sums[block.id] = add(sums.get(block.id), tokens)
                if keep_acts:
                    acts[block.id][name] = tokens.cpu().contiguous()
        results = []
        for block, _ in loaded:
            for name, error in errors[block.id].items():
                run.fail(failure_id(name), error, stage="load", image=str(image_dir / name))
            if keep_acts:
                write_acts(run.path / "acts" / f"{block.id}.safetensors", acts[block.id])
            none = Sums(0, torch.zeros(width), torch.zeros(width))
            results.append(_result(block, sums.get(block.id, none), sorted(errors[block.id])))
        return results

    return process


def _result(block: Block, sums: Sums, unreadable: list[str]) -> Result:
    record = {
        "pictures": len(block.names) - len(unreadable),
        "vectors": sums.n,
        "first": block.names[0],
        "last": block.names[-1],
        "unreadable": unreadable,
    }
    return record, {
        "count": sums.n,
        "mean": sums.mean.double().cpu().numpy(),
        "m2": sums.m2.double().cpu().numpy(),
    }


def failure_id(name: str) -> str:
    """A picture's name as the name of its failure file."""
    return f"picture-{id_of(name)}"


def key_of(name: str) -> str:
    """A picture's name as its tensor's, which is text: \\udcff for a byte that is none."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_acts(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One block's activations, {file name: (P, d)}, in one step."""
    path.parent.mkdir(exist_ok=True)
    # equal pictures share a tensor, which safetensors takes for a mistake
    own = {key_of(name): tensor.clone() for name, tensor in tensors.items()}
    try:
        with disk.in_one_step(path) as temporary:
            save_file(own, temporary)
    except SafetensorError as error:
        raise UsageError(
            f"cannot write {path} ({error}); finished blocks are kept, the same command goes on"
            " from there"
        ) from error


def has_acts(run: Run, block: Block, names: Set[str]) -> bool:
    """Whether the activations of these pictures of a block are there, in a whole file."""
    try:
        with safe_open(run.path / "acts" / f"{block.id}.safetensors", "pt") as file:
            return set(file.keys()) == {key_of(name) for name in names}
    except (OSError, SafetensorError):
        return False


def reopen(run: Run, blocks: Sequence[Block], keep_acts: bool) -> None:
    """Make those blocks unfinished again that lack a picture, which may be readable by now, or
    their activations with --keep_acts."""
    for block in blocks:
        if not run.is_done(block.id) or not run.is_whole(block.id):
            continue
        unreadable = run.record(block.id)["unreadable"]
        names = set(block.names) - set(unreadable)
        if unreadable or (keep_acts and not has_acts(run, block, names)):
            run.undo(block.id)
            for name in unreadable:
                (run.path / "failures" / f"{failure_id(name)}.json").unlink(missing_ok=True)

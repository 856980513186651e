"""How long vision tokens and text tokens are when they enter the language model.

    vision: ||connector(tower(picture))_p|| of every vision token, as the decoder gets it
    text:   ||E[id]|| of every token of the pictures' captions

L2 norms. Beyond Semantics (arXiv 2503.17349), figure 3; docs/studies/beyond_semantics.md, section
2.2. Used by diagnostic_tools/vlm_token_norms.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.model import towers
from vlmdiag.pictures.samples import KEPT_PIXELS, load_image
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.pictures.samples import Sample
    from vlmdiag.types import VLM

GROUPS = ("text", "vision")
IDS = 4096  # of the vocabulary at once


class ImageNorms(NamedTuple):
    """Norms of one picture's vision tokens and of the tokens of its captions, float64."""

    vision: Float[np.ndarray, " P"]
    text: Float[np.ndarray, " tokens"]


# ---- measuring ----


def enlarged(image: Image.Image, scale: float) -> Image.Image:
    """The picture, each side so many times as long. ValueError where that takes the memory."""
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    if width * height > KEPT_PIXELS:
        raise ValueError(
            f"enlarged by --scale {scale:g} it has {width} x {height} pixels, more than"
            f" {KEPT_PIXELS // 10**6} million"
        )
    return image.resize((width, height), Image.Resampling.LANCZOS)


def open_picture(sample: Sample, scale: float) -> Image.Image | Exception:
    """A picture, or the error that says why it cannot be read."""
    try:
        return enlarged(load_image(sample.image), scale)
    except (OSError, ValueError) as error:
        return error


def pictures_ahead(
    samples: Sequence[Sample], scale: float, batch_size: int, num_workers: int
) -> Iterator[list[tuple[Sample, Image.Image | Exception]]]:
    """The samples with their pictures in batches; the next batch is decoded while one is used."""
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    with ThreadPoolExecutor(num_workers) as pool:
        coming = [pool.submit(open_picture, sample, scale) for sample in batches[0]]
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            pictures = [future.result() for future in coming]
            coming = [pool.submit(open_picture, sample, scale) for sample in following]
            yield list(zip(batch, pictures, strict=True))


@torch.inference_mode()
def measure(
    vlms: Sequence[VLM],
    samples: Sequence[Sample],
    captions: Mapping[str, Sequence[str]],
    scale: float,
    batch_size: int,
    num_workers: int,
) -> tuple[list[dict[str, ImageNorms]], dict[str, str]]:
    """(of each model {sample id: norms}, {sample id: error}). vlms: one model, or several with
    equal towers (towers.equal()), which runs once for all; captions: texts by sample id; scale: of
    the pictures before the processor sees them."""
    # the norm of each id of the vocabulary, so that a caption is a look-up
    tables = [id_norms(vlm) for vlm in vlms]
    norms: list[dict[str, ImageNorms]] = [{} for _ in vlms]
    failed: dict[str, str] = {}
    with tqdm(total=len(samples), desc="pictures", unit="img", disable=None) as bar:
        for batch_pictures in pictures_ahead(samples, scale, batch_size, num_workers):
            readable = []
            for sample, picture in batch_pictures:
                if isinstance(picture, Exception):
                    failed[sample.id] = str(picture)
                else:
                    readable.append((sample, picture))
            if readable:
                with towers.sharing(vlms):
                    for vlm, table, of_model in zip(vlms, tables, norms, strict=True):
                        of_model |= norms_of_batch(vlm, table, readable, captions)
            bar.update(len(batch_pictures))
    return norms, failed


def id_norms(vlm: VLM) -> Float[np.ndarray, " vocabulary"]:
    """The norm of what the embedding gives for each id, float64. Some embeddings scale their rows
    (Gemma 3), and some are not here as a whole (accelerate's offloading)."""
    embedding = vlm.model.get_input_embeddings()
    ids = torch.arange(vlm.vocabulary, device=vlm.device)
    norms = [
        torch.linalg.vector_norm(embedding(some), dim=-1, dtype=torch.float32).cpu()
        for some in ids.split(IDS)
    ]
    return torch.cat(norms).double().numpy()


def norms_of_batch(
    vlm: VLM,
    table: Float[np.ndarray, " vocabulary"],
    pictures: Sequence[tuple[Sample, Image.Image]],
    captions: Mapping[str, Sequence[str]],
) -> dict[str, ImageNorms]:
    """{sample id: norms} of some pictures. table: id_norms() of the model."""
    samples, images = zip(*pictures, strict=True)
    batch = vlm.encode(samples, images)
    features = vlm.vision(batch).pooler_output
    # each caption has a BOS of its own where the model's prompts have one
    bos = [vlm.tokenizer.bos_token_id] if "bos" in batch.spans(0) else []
    norms = {}
    for (sample, _), tokens in zip(pictures, features, strict=True):
        ids: list[int] = []
        for text in captions[sample.id]:
            ids += bos + vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
        vision = torch.linalg.vector_norm(tokens.float(), dim=-1)
        norms[sample.id] = ImageNorms(vision.cpu().double().numpy(), table[ids])
    return norms


# ---- numbers ----


def summarize(norms: Sequence[Float[np.ndarray, " tokens"]]) -> Record:
    """Numbers of one group over all tokens, and the mean over images of the image means.

    norms: one array an image. UsageError where no token was measured.
    """
    pooled = np.concatenate(norms)
    if not len(pooled):
        raise UsageError("no token was measured")
    interval = stats.mean_interval([of_image.mean() for of_image in norms if len(of_image)])
    q25, median, q75 = np.quantile(pooled, (0.25, 0.5, 0.75))
    numbers = {
        "tokens": len(pooled),
        "mean": pooled.mean(),
        "min": pooled.min(),
        "max": pooled.max(),
        "q25": q25,
        "median": median,
        "q75": q75,
        "images": interval.n,
        "mean_over_images": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
    return {name: plain(value) for name, value in numbers.items()}


def plain(value: float | np.generic) -> float | int | None:
    """A number as JSON holds it, NaN as null."""
    if np.isnan(value):
        return None
    number: float | int = value.item() if isinstance(value, np.generic) else value
    return number


def vision_over_text(norms: Mapping[str, ImageNorms]) -> Record:
    """Mean over images of the ratio of the image's mean norms, with its interval."""
    ratios = [
        of_image.vision.mean() / of_image.text.mean()
        for of_image in norms.values()
        if len(of_image.text)
    ]
    interval = stats.mean_interval(ratios)
    return {name: plain(value) for name, value in interval._asdict().items()}


def table_of(summary: Fields) -> str:
    """The numbers of a model's two groups as lines of text."""
    names = ("mean", "min", "q25", "median", "q75", "max")
    lines: list[tuple[str, ...]] = [
        (summary["model"], "tokens", *names, "images", "mean over images [95 %]")
    ]
    for group in GROUPS:
        numbers = summary[group]
        over_images = f"{numbers['mean_over_images']:.4g}"
        if numbers["low"] is not None:
            over_images += f" [{numbers['low']:.4g}, {numbers['high']:.4g}]"
        cells = [f"{numbers[name]:.4g}" for name in names]
        tokens, images = str(numbers["tokens"]), str(numbers["images"])
        lines.append((group, tokens, *cells, images, over_images))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )

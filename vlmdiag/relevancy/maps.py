"""What a run of diagnostic_tools/relevancy_maps.py measures of one picture: relevancy of every
token of the answer over the picture and over the words.

Transformer-MM-Explainability (arXiv 2103.15679); docs/studies/stethoscope.md, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmdiag.groups import GROUPS
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.lens import vocabulary
from vlmdiag.pictures.chats import record_of
from vlmdiag.relevancy import methods, rules
from vlmdiag.relevancy.gradients import BUDGET, trace
from vlmdiag.types import Record

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Pictures, Sample
    from vlmdiag.relevancy.gradients import Trace
    from vlmdiag.relevancy.methods import Relevancy
    from vlmdiag.types import VLM

Arrays = dict[str, "np.ndarray"]
TEXT = (GROUPS.index("user"), GROUPS.index("generated"))  # of the visual share


def answer_of(vlm: VLM, batch: Batch, given: str | None, max_new_tokens: int) -> list[int]:
    """Ids of the answer to a batch of one prompt: of a given text, else generated."""
    if given is not None:
        return answer_ids(vlm, batch.prompts[0], given)
    return generate(vlm, batch, max_new_tokens).ids[0]


def places_of(vlm: VLM, batch: Batch, picture: Image) -> PatchGrid | None:
    """Where the cells of a relevancy map lie: the grid of the vision tokens, else of the patches
    behind a Q-Former, else None."""
    if batch.grids[0] is not None:
        return batch.grids[0]
    if vlm.family.patches is None:
        return None
    return vlm.family.patches(vlm, picture.size, batch.image_rows[0])


def make_process(
    vlm: VLM,
    layers: Sequence[int],
    max_new_tokens: int,
    use_answers: bool = False,
    tower: bool = True,
    budget: int = BUDGET,
) -> Callable[[Sequence[tuple[Sample, Pictures]]], list[tuple[Record, Arrays]]]:
    """process([(sample, picture), ...]) -> [(record, arrays), ...].

    layers: up to which relevancy is gathered. use_answers: measure each sample's answer by teacher
    forcing. tower: go on through connector and tower. budget: bytes of gradients and maps that
    are held at once.
    """

    def measure(sample: Sample, picture: Pictures) -> tuple[Record, Arrays]:
        batch = vlm.encode([sample], [picture])
        given = sample.answer if use_answers else None
        ids = answer_of(vlm, batch, given, max_new_tokens)
        run = trace(vlm, batch, ids, tower=tower)
        targets = range(len(ids))
        relevancy = methods.relevancy(run, targets, layers, budget=budget)
        arrays = {"rows": relevancy.rows}
        if relevancy.cells is not None:
            arrays["cells"] = relevancy.cells
        attention = methods.raw_attention(run, targets, layers)
        arrays["raw_attention"] = attention[..., run.vision.cpu().numpy()]
        arrays["vision_norms"] = run.tokens.float().norm(dim=-1).cpu().numpy()
        arrays = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
        record = _record(run, sample, relevancy)
        if isinstance(picture, tuple):
            places, of_places = batch.places(0)
            shares = picture_shares(run, relevancy)
            record |= places | record_of(sample) | batch.parts(0) | {"picture_share": shares}
            return record, arrays | of_places
        grid = places_of(vlm, batch, picture)
        if grid is not None:
            arrays["boxes"] = grid.boxes
        record["grid"] = None if grid is None else {"shape": grid.shape, "size": grid.size}
        return record, arrays

    def process(loaded: Sequence[tuple[Sample, Pictures]]) -> list[tuple[Record, Arrays]]:
        return [measure(sample, picture) for sample, picture in loaded]

    return process


def _record(run: Trace, sample: Sample, relevancy: Relevancy) -> Record:
    """What the run's JSON says of one picture, but the grid."""
    codes = run.batch.groups[0].cpu()
    words = vocabulary(run.vlm.tokenizer, run.batch.input_ids[0].tolist())
    labels = [words[int(i)] for i in run.batch.input_ids[0]]
    probabilities = run.logits.softmax(-1)[torch.arange(len(run.ids)), run.ids]
    return {
        "image_id": str(sample.extra.get("image_id", sample.id)),
        "file_name": sample.image.name,
        "question": sample.question,
        "prompt": run.prompt.prompts[0],
        "caption": run.vlm.text(run.ids),
        "generated_ids": run.ids,
        "tokens": labels[-len(run.ids) :],
        "labels": labels,
        "groups": [GROUPS[code] for code in codes.tolist()],
        "producing": run.rows.tolist(),
        "layers": relevancy.layers,
        "probabilities": probabilities.tolist(),
        "visual_share": visual_share(run, relevancy),
    }


def visual_share(run: Trace, relevancy: Relevancy) -> list[list[float]]:
    """max R_img / (max R_img + max R_text) of each token at each layer; text: question and earlier
    answer."""
    is_text = torch.isin(run.batch.groups[0].cpu(), torch.tensor(TEXT))
    of_text = torch.from_numpy(relevancy.rows)[..., is_text]
    return rules.share(torch.from_numpy(relevancy.image), of_text).tolist()


def picture_shares(run: Trace, relevancy: Relevancy) -> list[list[list[float]]]:
    """The same of each picture of a chat, [token][layer][picture]: max R of its own vision tokens /
    (max R_img + max R_text), of which the largest is the visual share."""
    is_text = torch.isin(run.batch.groups[0].cpu(), torch.tensor(TEXT))
    of_text = torch.from_numpy(relevancy.rows)[..., is_text].amax(-1)
    image = torch.from_numpy(relevancy.image)
    assert run.batch.numbers is not None
    numbers = run.batch.numbers[0, run.vision].cpu()
    of_pictures = [image[..., numbers == number].amax(-1) for number in numbers.unique().tolist()]
    whole = (image.amax(-1) + of_text)[..., None]
    return (torch.stack(of_pictures, -1) / whole).where(whole > 0, float("nan")).tolist()

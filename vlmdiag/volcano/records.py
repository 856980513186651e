"""What a run of the critique - revise - decide loop keeps of an instance, and what it writes beside
its run directory.

Volcano (arXiv 2311.07362); docs/studies/volcano.md, sections 2.2 to 2.8 and 3. Used by
visualize/run_volcano_with_image_attention.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmdiag.answers import is_right, token_spans
from vlmdiag.runs import disk
from vlmdiag.types import Record
from vlmdiag.volcano.conversation import Asker, converse
from vlmdiag.volcano.protocol import judged
from vlmdiag.volcano.tensors import SCHEMA

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Sample
    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import VLM
    from vlmdiag.volcano.conversation import Answer, Settings, Talk

    class RecordSettings(Settings):
        """What records.py reads of the flags beside."""

        output_visualization_tensors: bool


Arrays = dict[str, "np.ndarray"]


def make_process(
    args: RecordSettings, vlm: VLM
) -> Callable[[Sequence[tuple[Sample, Image]]], list[tuple[Record, Arrays]]]:
    """process([(sample, picture), ...]) -> [(record, arrays), ...]. Initial answers that samples
    are given are measured by teacher forcing in place of generated ones."""

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Sample, Image]]) -> list[tuple[Record, Arrays]]:
        samples, images = zip(*loaded, strict=True)
        ask = Asker(args, vlm, samples, images)
        talks = converse(args, ask, samples)
        return [
            (_record(vlm, sample, talk, grid), _arrays(args, talk, grid))
            for sample, talk, grid in zip(samples, talks, ask.grids, strict=True)
        ]

    return process


def _answers(talk: Talk) -> dict[str, Answer | None]:
    """The three texts whose attention is kept."""
    return {"initial": talk.initial, "feedback": talk.feedback, "revision": talk.revision}


def _record(vlm: VLM, sample: Sample, talk: Talk, grid: PatchGrid | None) -> Record:
    """What the JSON of an instance says."""
    texts = {"initial": talk.outputs[0], "revision": talk.revisions[0], "final": talk.current}
    return {
        "index": sample.extra["index"],
        "image_id": sample.extra["image_id"],
        "image_src": sample.extra["image_src"],
        "image": str(sample.image),
        "question": sample.question,
        "gold_answer": sample.answer,
        "caption": talk.current,
        "outputs": talk.outputs,
        "feedback": talk.feedbacks,
        "revision": talk.revisions,
        "stop_iter": talk.stop_iter,
        "decisions": talk.decisions,
        "accepted": talk.accepted,
        "enhanced": bool(talk.accepted),
        "given": sample.given is not None,
        "correct": {name: judged(text, sample.answer, is_right) for name, text in texts.items()},
        "grid": grid and {"shape": grid.shape, "size": grid.size},
        "stages": {name: answer and _stage(vlm, answer) for name, answer in _answers(talk).items()},
    }


def _stage(vlm: VLM, answer: Answer) -> Record:
    """A text and its tokens; special ones as they are written."""

    def decode(ids: Sequence[int]) -> str:
        return str(
            vlm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    text, spans = token_spans(answer.ids, decode)
    special = set(vlm.tokenizer.all_special_ids)
    tokens = [
        vlm.tokenizer.decode([token]) if token in special else text[start:end]
        for token, (start, end) in zip(answer.ids, spans, strict=True)
    ]
    return {
        "text": text,
        "tokens": tokens,
        "spans": [list(span) for span in spans],
        "ids": answer.ids,
        "ended": answer.ended,
        "prompt": answer.prompt,
        "prompt_tokens": answer.prompt_tokens,
        "vision_tokens": answer.attention["mean"].shape[1],
    }


def _arrays(args: RecordSettings, talk: Talk, grid: PatchGrid | None) -> Arrays:
    """<stage>_top_k_mean, _mean, _max (T, P) and, on request, _topk (T, k, H, P) and _layers (T, L,
    H, P); boxes (P, 4)."""
    arrays: Arrays = {} if grid is None else {"boxes": grid.boxes}
    for stage, answer in _answers(talk).items():
        if answer is None:
            continue
        topk = answer.attention["topk"]
        of_heads = np.sort(topk.mean(1), axis=1)
        arrays[f"{stage}_top_k_mean"] = of_heads[:, -args.hidden_top_k :].mean(1)
        arrays[f"{stage}_mean"] = answer.attention["mean"]
        arrays[f"{stage}_max"] = answer.attention["max"]
        if args.output_visualization_tensors:
            arrays[f"{stage}_topk"] = topk
        if args.full_tensors:
            arrays[f"{stage}_layers"] = answer.attention["layers"]
    return arrays


# --- what is written beside the run ---------------------------------------------------------------


def done_records(run: Run, instances: Sequence[Sample]) -> dict[str, Record]:
    """{id: record} of the finished instances, in the list's order."""
    return {sample.id: run.record(sample.id) for sample in instances if run.is_done(sample.id)}


def vision_encoder_of(vlm: VLM) -> dict[str, int | None]:
    """image_size and patch_size as the model's config has them."""
    config = getattr(vlm.model.config, "vision_config", None)
    sizes = {name: getattr(config, name, None) for name in ("image_size", "patch_size")}
    return {name: size if isinstance(size, int) else None for name, size in sizes.items()}


def write_tensors(
    folder: Path, run: Run, sample_id: str, vision_encoder: Mapping[str, int | None]
) -> None:
    """<folder>/<idx>_<image id>/visualization_tensors.npz and tokens.json of one instance, which
    tensors.py reads."""
    record = run.record(sample_id)
    arrays = {
        name: array
        for name, array in run.arrays(sample_id).items()
        if name == "boxes" or name.endswith(("_topk", "_layers"))
    }
    settings = run.meta["settings"]
    content = {
        "schema": SCHEMA,
        "model": settings["model_name"],
        "hidden_top_k": settings["hidden_top_k"],
        "vision_encoder": dict(vision_encoder),
        "index": record["index"],
        "image_id": record["image_id"],
        "image": os.path.abspath(record["image"]),
        "question": record["question"],
        "gold_answer": record["gold_answer"],
        "accepted": record["accepted"],
        "stages": record["stages"],
        "grid": record["grid"],
    }
    disk.write_npz(folder / sample_id / "visualization_tensors.npz", arrays)
    disk.write_json(folder / sample_id / "tokens.json", content)


def write_log(path: str | Path, records: Sequence[Record]) -> None:
    """All texts as one JSON list, one object per finished instance."""
    names = (
        "image_id",
        "image_src",
        "question",
        "gold_answer",
        "outputs",
        "feedback",
        "revision",
        "stop_iter",
        "accepted",
        "decisions",
        "correct",
    )
    disk.write_json(path, [{name: record[name] for name in names} for record in records])


def print_counts(records: Sequence[Record]) -> None:
    """What became of right and wrong first answers, in the first revision and in the final answer,
    where the gold answer says."""
    outcomes = {
        "right stayed right": (True, True),
        "right made wrong": (True, False),
        "wrong made right": (False, True),
        "wrong stayed wrong": (False, False),
    }
    for name in ("revision", "final"):
        changes = [(record["correct"]["initial"], record["correct"][name]) for record in records]
        judged_ones = [change for change in changes if None not in change]
        counts = [f"{judged_ones.count(change)} {words}" for words, change in outcomes.items()]
        print(
            f"initial answer to {name}: {', '.join(counts)}"
            f" ({len(records) - len(judged_ones)} not judged)"
        )

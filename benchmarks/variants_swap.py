"""The variants of bench_swap.py, its table of pairs with planted answers, and that outputs are
equal.

Shapes: n pairs, L layers, d width.
"""

from __future__ import annotations

import base64
import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.cases import build, make_samples, model_inputs
from vlmdiag.model.decoding import answer_ids
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.runs import engine, rundirs
from vlmdiag.swap import pairs, states
from vlmdiag.swap.relations import OPPOSITE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from common import VLM
    from vlmdiag.batch import Batch

TOLERANCE = 1e-4  # of the largest state of a layer
PUBLISHED_TOKENS = 20
PUBLISHED_PAIRS = 2  # of a batch; they stand for all
TOKENS = 8
WORD = "far"  # what the model answers
ENDS = "ends"
GOES_ON = "goes on"
NAMES = ("red circle", "blue square")
BOXES = {NAMES[0]: (100, 20, 40, 40), NAMES[1]: (300, 300, 90, 90)}
PICTURE_HEIGHT = 480
COLUMNS = (
    "index",
    "question_id",
    "group",
    "category",
    "original_question",
    "swapped_question",
    "original_answer",
    "swapped_answer",
    "image_base64",
)
# what counts for a word, by category: docs/studies/swap_analysis.md, section 1.6
SUBSTRINGS = {"far": ("far", "distant"), "close": ("close", "near", "nearby")}

Predictions = list[tuple[str, str]]  # answers to original and swapped question


class Extracted(NamedTuple):
    """What a variant gives."""

    pairs: Float[np.ndarray, "n 2 L d"]
    quads: Float[np.ndarray, "n 4 L d"] | None
    answers: Predictions


@dataclass
class Case:
    """A model, a table of pairs with their quads, and a folder for what a variant writes."""

    vlm: VLM
    table: Path
    items: list[states.Item]
    quads: list[dict[str, Any]]  # each with the row of its pair
    folder: Path
    answer_by: Callable[[str], None]  # (ENDS or GOES_ON): from now on the model answers so


# --- the case -------------------------------------------------------------------------------------


def write_table(table: Path, samples: Sequence[Sample]) -> None:
    """One distance pair about each picture."""
    questions = [pairs.question_about("distance", *names) for names in (NAMES, NAMES[::-1])]
    lines = ["\t".join(COLUMNS)]
    for sample in samples:
        picture = base64.b64encode(sample.image.read_bytes()).decode()
        cells = [sample.id, sample.id, "distance", "far", *questions, "far", "close", picture]
        lines.append("\t".join(cells))
    table.write_text("\n".join(lines) + "\n")


def make_case(size: str, prompt: int, batch: int, device: str, folder: Path) -> Case:
    """A random LLaVA with planted answers, and a table of `batch` distance pairs with their
    quads."""
    return case_of(build(size, prompt, device, folder), batch, folder)


def case_of(vlm: VLM, batch: int, folder: Path) -> Case:
    """The same of a model, in which the answers are planted."""
    table = folder / "pairs.tsv"
    write_table(table, make_samples(folder, batch))
    of_table, _ = pairs.read_pairs(table, limit=0)
    boxes = {pair["question_id"]: list(BOXES.items()) for pair in of_table}
    heights = {pair["id"]: PICTURE_HEIGHT for pair in of_table}
    quads, _ = pairs.place(of_table, boxes, heights)
    items = [states.Item(pair, row) for row, pair in enumerate(of_table)]
    with_row: list[dict[str, Any]] = [{**quad, "row": row} for row, quad in enumerate(quads)]
    return Case(vlm, table, items, with_row, folder, plant(vlm))


@torch.inference_mode()
def plant(vlm: VLM) -> Callable[[str], None]:
    """Make the word follow the prompt's last token, and EOS or a full stop the word: both tokens
    get a direction of their own in the residual stream, as long as the rest of it, which their
    follower's row of the LM head reads. Returns answer_by(ENDS or GOES_ON).
    """
    ids = vlm.tokenizer("USER: Is it far? ASSISTANT:", return_tensors="pt").input_ids.to(vlm.device)
    embeddings = vlm.model.get_input_embeddings().weight
    head = vlm.parts.lm_head.weight
    output = vlm.parts.decoder(inputs_embeds=embeddings[ids], output_hidden_states=True)
    last_state = output.hidden_states[-2][0, -1]
    word, stop = answer_ids(vlm, "ASSISTANT:", f"{WORD}.")[:2]
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(len(last_state), 2, generator=generator))[0]
    of_last, of_word = directions.T.to(embeddings)
    embeddings[ids[0, -1]] += of_last * last_state.norm()
    embeddings[word] += of_word * last_state.norm()
    head[word] = of_last

    @torch.inference_mode()
    def answer_by(answer: str) -> None:
        for token, kind in ((min(vlm.eos_ids), ENDS), (stop, GOES_ON)):
            head[token] = of_word.to(head) if kind == answer else 0

    return answer_by


def encode(case: Case, items: Sequence[states.Item], way: int = 0) -> Batch:
    """A question about each picture: original, swapped, and the quad's vertical two."""
    load = states.load_picture(str(case.table))
    samples = []
    for index, item in enumerate(items):
        questions = [*item.pair["questions"], *case.quads[item.row]["questions"]]
        samples.append(Sample(str(index), AT_HAND, questions[way]))
    return case.vlm.encode(samples, [load(item)[1] for item in items])


# --- variants: variant(case, has_quad) ------------------------------------------------------------


@torch.inference_mode()
def floor(case: Case, has_quad: bool) -> None:
    """generate() with one question after the other; nothing is kept."""
    for way in range(4 if has_quad else 2):
        inputs = model_inputs(case.vlm, encode(case, case.items, way))
        ids = case.vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers = ids[:, inputs["input_ids"].shape[1] :]
        case.vlm.tokenizer.batch_decode(answers, skip_special_tokens=True)


def ours(case: Case, has_quad: bool) -> Extracted:
    """swap_analysis.py's process(), with its files."""
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), "swap_analysis", {})
    count = len(case.items)
    layers = list(range(len(case.vlm.parts.layers)))
    shape = (len(layers), case.vlm.model.get_input_embeddings().weight.shape[1])
    pair_states = states.open_states(run.path / "states.npy", (count, 2, *shape), "float32")
    quad_states = None
    quad_of = {}
    if has_quad:
        quad_states = states.open_states(
            run.path / "quad_states.npy", (count, 4, *shape), "float32"
        )
        quad_of = {quad["id"]: quad for quad in case.quads}
    process = states.make_process(case.vlm, layers, pair_states, quad_states, quad_of, TOKENS)
    load = states.load_picture(str(case.table))
    with contextlib.redirect_stdout(io.StringIO()):
        counts = engine.run_items(run, case.items, load, process, count, num_workers=2)
    if counts["done"] != count:
        raise RuntimeError(f"pairs failed: {run.failed()}")
    answers = [(record["pred_orig"], record["pred_swap"]) for record in run.records()]
    kept = np.load(pair_states.path)
    return Extracted(kept, np.load(quad_states.path) if quad_states else None, answers)


@torch.inference_mode()
def published(case: Case, has_quad: bool) -> Extracted:
    """One query at a time, of the first pairs; the whole table with its pictures stays in
    memory."""
    with open(case.table, encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split("\t")
        rows = [dict(zip(columns, line.rstrip("\n").split("\t"), strict=True)) for line in file]
    pair_states = []
    answers: Predictions = []
    for row in rows[:PUBLISHED_PAIRS]:
        original, original_text = _query(case.vlm, row["image_base64"], row["original_question"])
        swapped, swapped_text = _query(case.vlm, row["image_base64"], row["swapped_question"])
        pair_states.append([original, swapped])
        answers.append((original_text, swapped_text))
    if not has_quad:
        return Extracted(np.array(pair_states), None, answers)
    quad_states = []
    for quad in case.quads[:PUBLISHED_PAIRS]:
        row = rows[quad["row"]]
        # the pair's two questions are asked again
        questions = (*quad["questions"], row["original_question"], row["swapped_question"])
        of_quad = [_query(case.vlm, row["image_base64"], question)[0] for question in questions]
        quad_states.append(of_quad)
    return Extracted(np.array(pair_states), np.array(quad_states), answers)


def _query(vlm: VLM, picture: str, question: str) -> tuple[Float[np.ndarray, "L d"], str]:
    """(states of all layers at the last prompt token, answer) of one question."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    prompt = prompt_for(vlm, question)[0]
    inputs = vlm.processor(images=image, text=prompt, return_tensors="pt")
    inputs = inputs.to(vlm.device, vlm.dtype)
    with _last_states(vlm.parts.layers) as kept:
        ids = vlm.model.generate(**inputs, max_new_tokens=PUBLISHED_TOKENS, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    text = vlm.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return torch.stack([kept[layer] for layer in sorted(kept)]).numpy(), text


@contextlib.contextmanager
def _last_states(layers: Sequence[nn.Module]) -> Iterator[Mapping[int, Float[Tensor, " d"]]]:
    """Inside, hooks copy the prefill's last position to the CPU: {layer: state}."""
    kept: dict[int, Tensor] = {}

    def keeping(layer: int) -> Callable[[object, object, Any], None]:
        def hook(module: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] > 1:
                kept[layer] = hidden[:, -1, :].detach().cpu().float().squeeze(0)

        return hook

    hooks = [layer.register_forward_hook(keeping(index)) for index, layer in enumerate(layers)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


VARIANTS: dict[str, Callable[[Case, bool], Extracted | None]] = {
    "floor": floor,
    "ours": ours,
    "published": published,
}


# --- equal outputs --------------------------------------------------------------------------------


def _first_of(text: str, words: Sequence[str]) -> int | None:
    """Where the first of some words begins, as plain substrings; None where none occurs."""
    places = [text.lower().find(word) for word in words]
    return min((place for place in places if place >= 0), default=None)


def contains(text: str, category: str) -> bool:
    """Whether the published check calls an answer right: the expected word or a synonym occurs,
    before any of the opposite. Plain substrings."""
    wanted = _first_of(text, SUBSTRINGS[category])
    opposite = _first_of(text, SUBSTRINGS[OPPOSITE[category]])
    if wanted is None:
        return False
    return opposite is None or wanted < opposite


def _gap(
    quantity: str, ours: Float[np.ndarray, "n q L d"], published: Float[np.ndarray, "m q L d"]
) -> float:
    """The largest difference of a layer's states, relative to the layer's largest; AssertionError
    where it is too large."""
    mine = ours[: len(published)]
    gaps = np.abs(mine - published).max((0, 1, 3)) / np.abs(published).max((0, 1, 3))
    # a NaN is not <= either
    if mine.shape != published.shape or not gaps.max() <= TOLERANCE:
        raise AssertionError(
            f"{quantity} differ by {gaps.max():.1e} in layer {gaps.argmax()}, more than"
            f" {TOLERANCE:g}"
        )
    return float(gaps.max())


def _reading(texts: tuple[str, str]) -> list[tuple[str | None, bool]]:
    """What our reading and the published check make of the answers to a pair's two questions."""
    original, swapped = texts
    return [
        (pairs.read_answer(original, "far")[0], contains(original, "far")),
        (pairs.read_answer(swapped, "far")[0], contains(swapped, "close")),
    ]


def check(case: Case, answer: str) -> float:
    """The largest difference of a layer's states, relative to the layer's largest; AssertionError
    unless states and read answers agree. answer: how the model is to answer, ENDS or GOES_ON."""
    pair_states, quad_states, answers = ours(case, True)
    wanted = published(case, True)
    worst = _gap("states", pair_states, wanted.pairs)
    worst = max(worst, _gap("quad states", quad_states, wanted.quads))
    for mine, other in zip(answers, wanted.answers, strict=False):
        read = _reading(mine)
        read_of_other = _reading(other)
        if read != read_of_other or read[0] != (WORD, True):
            raise AssertionError(
                f"other answers: ours {mine} read as {read}, published {other} read as"
                f" {read_of_other}; planted {WORD!r}"
            )
        if (other[0] == WORD) != (answer == ENDS):
            wanted_end = "end after a word" if answer == ENDS else "go on"
            raise AssertionError(f"the published answer {other[0]!r} was to {wanted_end}")
    return worst

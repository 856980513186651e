"""Does a map over the picture name what a token needs, and does it lie on the object that the token
names? Orders, curves and areas, pointing game and mask energy on arrays, and three ways to take
parts of the picture away from a model.

    order      parts from the highest score to the lowest, equal scores at random; positive removal
               starts at the front, negative at the back
    curve      log-probability l(s) of the fixed token, teacher-forced, with the share s of the
               parts removed
    area       A[f] = trapezoids of f over s / (s_last - s_first), f one of MEASURES: the mean of f
               over s
    pointing   is the centre of the highest part within `tolerance` pixels of the object? Equal
               maxima count by their share of hits
    energy     sum_c max(r_c, 0) coverage_c / sum_c max(r_c, 0)

Curves: Transformer-MM-Explainability (arXiv 2103.15679), docs/studies/stethoscope.md, section 4.3;
pointing: arXiv 1608.00507; energy: arXiv 1910.01279.

Shapes: P vision tokens; U parts that are removed: vision tokens, or boxes of the picture where it
is blurred; M maps, T targets, K shares, n patterns of what is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from vlmdiag.answers import find_word
from vlmdiag.groups import VISION
from vlmdiag.model.vision import deepened, entered, entering, last_logits, more_inputs
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.relevancy.gradients import Trace

# gone (n, U) -> log-probabilities (n, T)
Measure = Callable[["Bool[np.ndarray, 'n U']"], "Float[np.ndarray, 'n T']"]
Annotation = Fields


# ---- what is averaged over the shares ----


def log_ratio(curve: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... K"]:
    """l(s) - l(0) in nats; its area is the log of the geometric mean of p(s) / p(0)."""
    return curve - curve[..., :1]


def ratio(curve: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... K"]:
    """p(s) / p(0): 1 where nothing is removed."""
    return np.exp(log_ratio(curve))


def logprob(curve: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... K"]:
    """l(s) itself."""
    return curve


# of log-probabilities (..., K) at the shares s_0 = 0 ... s_K-1
MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ratio": ratio,
    "log_ratio": log_ratio,
    "probability": np.exp,
    "logprob": logprob,
}


# ---- orders and curves ----


def order(scores: Float[np.ndarray, " U"], rng: np.random.Generator) -> Int[np.ndarray, " U"]:
    """Parts from the highest score to the lowest, equal scores in random order. ValueError for
    NaN."""
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(
            f"scores of shape {scores.shape} with {np.isnan(scores).sum()} NaN: one number a part"
            " is wanted"
        )
    return np.lexsort((rng.random(len(scores)), -scores))


def removed(
    ordered: Int[np.ndarray, " U"], shares: Float[np.ndarray, " K"] | Sequence[float]
) -> Bool[np.ndarray, "K U"]:
    """Which parts are gone at each share: the first of `ordered`; int((1 - s) U) stay, as in the
    published code."""
    count = len(ordered)
    rank = np.empty(count, int)
    rank[ordered] = np.arange(count)
    # the small number keeps (1 - 0.9) * 10 from being 0.999...
    staying = np.floor((1 - np.asarray(shares, float)) * count + 1e-9).astype(int)
    return rank < (count - staying)[:, None]


def curves(
    measure: Measure,
    orders: Int[np.ndarray, "M T U"],
    shares: Float[np.ndarray, " K"] | Sequence[float],
) -> Float[np.ndarray, "M T 2 K"]:
    """Log-probabilities at K shares of positive and negative removal, by the orders of M maps for
    each of T targets.

    measure(gone (n, U) bool) -> (n, T): every target's log-probability for each pattern; a pattern
    that occurs more than once is measured once.
    """
    orders = np.asarray(orders)
    maps, targets, parts = orders.shape
    gone = np.empty((maps, targets, 2, len(shares), parts), bool)
    for m, t in np.ndindex(maps, targets):
        gone[m, t, 0] = removed(orders[m, t], shares)
        gone[m, t, 1] = removed(orders[m, t, ::-1], shares)
    patterns, pattern_of = np.unique(gone.reshape(-1, parts), axis=0, return_inverse=True)
    measured = np.asarray(measure(patterns))[pattern_of.ravel()]
    of_all_targets = measured.reshape(maps, targets, 2, len(shares), -1)
    return np.einsum("mtdkt->mtdk", of_all_targets)  # each target in its own order


def area(
    curve: Float[np.ndarray, "... K"], shares: Float[np.ndarray, " K"] | Sequence[float]
) -> Float[np.ndarray, "*batch"]:
    """Mean of a curve over the shares: its trapezoids over their range."""
    curve = np.asarray(curve, float)
    shares = np.asarray(shares, float)
    trapezoids = (curve[..., 1:] + curve[..., :-1]) / 2 * np.diff(shares)
    return trapezoids.sum(-1) / (shares[-1] - shares[0])


# ---- maps against known objects ----


def objects_named_once(
    text: str,
    spans: Sequence[tuple[int, int]],
    annotations: Sequence[Annotation],
    names: Sequence[str],
) -> tuple[list[tuple[list[int], Annotation]], dict[str, int]]:
    """([(tokens, annotation), ...], counts of mentions left out) for the objects that an answer
    names and that are in the picture once.

    text, spans: as answers.token_spans gives them. annotations: of the picture, each with
    'category'; names: all categories looked for. A name counts if the picture has exactly one such
    object, no crowd, and at its first mention; else it is 'absent', 'ambiguous' or 'repeated'.
    Longer names go first.
    """
    named: list[tuple[list[int], Annotation]] = []
    left_out = {"absent": 0, "ambiguous": 0, "repeated": 0}
    taken: set[int] = set()
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        of_name = [annotation for annotation in annotations if annotation["category"] == name]
        mentions = [tokens for tokens in find_word(text, spans, name) if not taken & set(tokens)]
        for mention, tokens in enumerate(mentions):
            taken |= set(tokens)
            if not of_name:
                left_out["absent"] += 1
            elif len(of_name) > 1 or of_name[0].get("iscrowd"):
                left_out["ambiguous"] += 1
            elif mention:
                left_out["repeated"] += 1
            else:
                written = [i for i in tokens if text[slice(*spans[i])].strip()]
                named.append((written, of_name[0]))
    return sorted(named, key=lambda pair: pair[0]), left_out


def centre_scores(grid: PatchGrid) -> Float[np.ndarray, " U"]:
    """The centre prior: 1 at the picture's centre, 0 at the farthest part's, linear in the
    distance; 0 for parts without a box."""
    centres = (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2
    distance = np.hypot(*(centres - np.array(grid.size) / 2).T)
    return np.nan_to_num(1 - distance / max(np.nanmax(distance), 1e-9))


def hits(
    grid: PatchGrid, mask: Bool[np.ndarray, "height width"], tolerance: float = 0.0
) -> Bool[np.ndarray, " U"]:
    """Parts whose centre lies in the mask or at most `tolerance` pixels from the middle of one of
    its pixels."""
    is_hit = np.zeros(len(grid.boxes), bool)
    reach = int(np.ceil(tolerance)) + 1
    height, width = mask.shape
    for part in np.flatnonzero(grid.has_box):
        x, y = (grid.boxes[part, :2] + grid.boxes[part, 2:]) / 2
        row, column = int(np.floor(y)), int(np.floor(x))
        inside = 0 <= row < height and 0 <= column < width and bool(mask[row, column])
        near = False
        if tolerance > 0:
            # only the mask's pixels around the centre can be that near
            top, left = max(0, row - reach), max(0, column - reach)
            bottom, right = max(0, row + reach + 1), max(0, column + reach + 1)
            ys, xs = np.nonzero(mask[top:bottom, left:right])
            distances = np.hypot(ys + top + 0.5 - y, xs + left + 0.5 - x)
            near = bool((distances <= tolerance).any())
        is_hit[part] = inside or near
    return is_hit


def pointing(scores: Float[np.ndarray, " U"], hit: Bool[np.ndarray, " U"]) -> float:
    """1 if the highest of the scores is a hit, 0 if not; of several equally high ones the share
    that are hits."""
    scores = np.asarray(scores, float)
    return float(hit[scores == scores.max()].mean())


def energy(scores: Float[np.ndarray, " U"], coverage: Float[np.ndarray, " U"]) -> float:
    """Share of the positive scores that lies in a mask that covers `coverage` of each part; NaN
    where no score is positive."""
    positive = np.clip(np.asarray(scores, float), 0, None)
    total = positive.sum()
    return float((positive * coverage).sum() / total) if total > 0 else float("nan")


# ---- taking parts of the picture away ----


@torch.inference_mode()
def logprobs(
    run: Trace,
    targets: Sequence[int],
    embeds: Float[Tensor, "n N d"],
    positions: Int[Tensor, "... n N"],
    more: Mapping[str, Tensor],
) -> Float[np.ndarray, "n T"]:
    """Log-probabilities, float64, of the answer's tokens `targets` behind inputs that end in the
    answer.

    run: of the whole prompt and answer. positions: as the model takes them, (n, N) or (axes, n, N).
    more: see vision.more_inputs.
    """
    first = min(targets)
    options: Record = {
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        "position_ids": positions,
        "use_cache": False,
        **more,
    }
    count = len(run.ids) + 1 - first
    output = run.vlm.model(
        inputs_embeds=embeds, logits_to_keep=last_logits(run.vlm, count), **options
    )
    logits = output.logits[:, -count:].float()
    rows = torch.tensor(list(targets), device=logits.device) - first
    ids = torch.tensor([run.ids[target] for target in targets], device=logits.device)
    logs = logits[:, rows].log_softmax(-1)  # (n, T, V)
    return logs[:, torch.arange(len(rows)), ids].cpu().double().numpy()


def _chunks(
    gone: Bool[np.ndarray, "n U"], size: int
) -> Iterator[tuple[slice, Bool[np.ndarray, "m U"]]]:
    for start in range(0, len(gone), size):
        yield slice(start, start + size), gone[start : start + size]


@torch.inference_mode()
def mean_replaced(
    run: Trace, targets: Sequence[int], gone: Bool[np.ndarray, "n P"], per_pass: int = 8
) -> Float[np.ndarray, "n T"]:
    """Log-probabilities with some vision tokens replaced by the mean of the picture's own."""
    features = run.features.detach()
    measured = np.empty((len(gone), len(targets)))
    for rows, patterns in _chunks(gone, per_pass):
        is_gone = torch.from_numpy(patterns).to(features.device)[..., None]
        filled = torch.where(is_gone, features.mean(0), features)  # (m, P, d)
        whole = run.batch.repeat(len(patterns))
        with entering(run.vlm, whole, filled.flatten(0, 1)) as embeds:
            more = more_inputs(run.vlm, whole)
            measured[rows] = logprobs(run, targets, embeds, whole.position_ids, more)
    return measured


@torch.inference_mode()
def dropped(
    run: Trace, targets: Sequence[int], gone: Bool[np.ndarray, "n P"], per_pass: int = 8
) -> Float[np.ndarray, "n T"]:
    """Log-probabilities with some vision tokens left out of the sequence; the others keep their
    positions."""
    features = run.features.detach()
    with entering(run.vlm, run.batch, features) as whole:
        embeds = whole[0]  # (N, d)
    measured = np.empty((len(gone), len(targets)))
    counts = gone.sum(1)
    for count in np.unique(counts):  # sequences of one length need no padding
        same = np.flatnonzero(counts == count)
        for rows, patterns in _chunks(gone[same], per_pass):
            stays = torch.from_numpy(~patterns).to(embeds.device)  # (m, P)
            in_sequence = torch.ones(
                len(patterns), run.length, dtype=torch.bool, device=embeds.device
            )
            in_sequence[:, run.vision] = stays
            index = in_sequence.nonzero()[:, 1].view(len(patterns), -1)  # (m, N - count)
            positions = run.batch.position_ids[..., 0, :][..., index]
            inputs = more_inputs(run.vlm, run.batch)
            more = {name: value[0, index] for name, value in inputs.items()}
            deep = features[:, embeds.shape[1] :].expand(len(patterns), -1, -1)[stays]
            with deepened(run.vlm, run.batch.groups[0, index] == VISION, deep):
                logs = logprobs(run, targets, embeds[index], positions, more)
            measured[same[rows]] = logs
    return measured


def blur_boxes(
    picture: Image.Image, grid: PatchGrid, gone: Bool[np.ndarray, "n U"], radius: float
) -> list[Image.Image]:
    """Pictures, one for each pattern, with the boxes of its parts out of the blurred picture.

    radius: of the Gaussian, in pixels.
    """
    sharp = np.asarray(picture)
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))
    pictures = []
    for pattern in gone:
        pixels = sharp.copy()
        boxes = np.round(grid.boxes[pattern & grid.has_box]).astype(int).clip(0)
        for x0, y0, x1, y1 in boxes:
            pixels[y0:y1, x0:x1] = soft[y0:y1, x0:x1]
        pictures.append(Image.fromarray(pixels))
    return pictures


@torch.inference_mode()
def blurred(
    run: Trace,
    targets: Sequence[int],
    gone: Bool[np.ndarray, "n U"],
    picture: Image.Image,
    grid: PatchGrid,
    radius: float,
    per_pass: int = 8,
) -> Float[np.ndarray, "n T"]:
    """Log-probabilities with some boxes of the grid blurred before the tower sees the picture."""
    sample = run.prompt.samples[0]
    measured = np.empty((len(gone), len(targets)))
    for rows, patterns in _chunks(gone, per_pass):
        pictures = blur_boxes(picture, grid, patterns, radius)
        batch = run.vlm.encode([sample] * len(patterns), pictures)
        whole = run.batch.repeat(len(patterns))
        features = entered(run.vlm, run.vlm.vision(batch))
        with entering(run.vlm, whole, features) as embeds:
            more = more_inputs(run.vlm, whole)
            measured[rows] = logprobs(run, targets, embeds, whole.position_ids, more)
    return measured

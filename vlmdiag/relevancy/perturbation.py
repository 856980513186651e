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

Curves: Transformer-MM-Explainability (arXiv 2103.15679), section 4.3 of our study; pointing: arXiv
1608.00507; energy: arXiv 1910.01279. P vision tokens; U parts that are removed: vision tokens, or
boxes of the picture where it is blurred."""

import numpy as np
import torch
from PIL import Image, ImageFilter

from vlmdiag.beyond_semantics.attention_map import find_word
from vlmdiag.groups import VISION
from vlmdiag.model.vision import deepened, entered, entering, more_inputs

MEASURES = {  # of log-probabilities (..., K) at the shares s_0 = 0 ... s_K-1
    "ratio": lambda curve: np.exp(
        curve - curve[..., :1]
    ),  # p(s) / p(0): 1 where nothing is removed
    "log_ratio": (
        lambda curve: curve - curve[..., :1]
    ),  # nats; its area is the log of the geometric mean of p(s) / p(0)
    "probability": np.exp,
    "logprob": lambda curve: curve,
}

# --- orders and curves ----------------------------------------------------------------------------


def order(scores, rng):
    """Parts (U,) from the highest score to the lowest, equal scores in random order. scores (U,)
    without NaN; rng: numpy Generator."""
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(
            f"scores of shape {scores.shape} with {np.isnan(scores).sum()} NaN: one number a part"
            " is wanted"
        )
    return np.lexsort((rng.random(len(scores)), -scores))


def removed(ordered, shares):
    """Which parts are gone at each share, (K, U) bool: the first of `ordered` (U,), kept are int((1
    - s) U) as in the published code."""
    rank = np.empty(len(ordered), int)
    rank[ordered] = np.arange(len(ordered))
    kept = np.floor((1 - np.asarray(shares, float)) * len(ordered) + 1e-9).astype(int)
    return rank < (len(ordered) - kept)[:, None]


def curves(measure, orders, shares):
    """Log-probabilities (M, T, 2, K) at K shares of positive and negative removal by orders (M, T,
    U): M maps for each of T targets.

    measure(gone (n, U) bool) -> (n, T): every target's log-probability for each pattern; a pattern
    that occurs more than once is measured once.
    """
    gone = np.array(
        [[[removed(way, shares) for way in (one, one[::-1])] for one in some] for some in orders]
    )
    patterns, where = np.unique(gone.reshape(-1, gone.shape[-1]), axis=0, return_inverse=True)
    found = np.asarray(measure(patterns))[where.ravel()].reshape(*gone.shape[:-1], -1)
    return np.einsum("mtdkt->mtdk", found)  # each target in its own order


def area(curve, shares):
    """Mean of a curve (..., K) over the shares (K,): its trapezoids over their range."""
    curve, shares = np.asarray(curve, float), np.asarray(shares, float)
    return ((curve[..., 1:] + curve[..., :-1]) / 2 * np.diff(shares)).sum(-1) / (
        shares[-1] - shares[0]
    )


# --- maps against known objects -------------------------------------------------------------------


def named_objects(text, spans, annotations, names):
    """([(tokens, annotation), ...], counts of mentions left out) for the objects that an answer
    names.

    text, spans: as answers.token_spans gives them. annotations: of the picture, each with
    'category'; names: all categories looked for. A name counts if the picture has exactly one such
    object, no crowd, and at its first mention; else it is 'absent', 'ambiguous' or 'repeated'.
    Longer names go first.
    """
    found, left_out, taken = [], {"absent": 0, "ambiguous": 0, "repeated": 0}, set()
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        own = [annotation for annotation in annotations if annotation["category"] == name]
        free = [tokens for tokens in find_word(text, spans, name) if not taken & set(tokens)]
        for mention, tokens in enumerate(free):
            taken |= set(tokens)
            if not own:
                left_out["absent"] += 1
            elif len(own) > 1 or own[0].get("iscrowd"):
                left_out["ambiguous"] += 1
            elif mention:
                left_out["repeated"] += 1
            else:
                found.append(([i for i in tokens if text[slice(*spans[i])].strip()], own[0]))
    return sorted(found, key=lambda pair: pair[0]), left_out


def centre_scores(grid):
    """The centre prior (U,): 1 at the picture's centre, 0 at the farthest part's, linear in the
    distance; 0 for parts without a box."""
    centres = (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2
    distance = np.hypot(*(centres - np.array(grid.size) / 2).T)
    return np.nan_to_num(1 - distance / max(np.nanmax(distance), 1e-9))


def hits(grid, mask, tolerance=0.0):
    """Parts (U,) bool whose centre lies in a mask (height, width) bool or at most `tolerance`
    pixels from the middle of one of its pixels."""
    found = np.zeros(len(grid.boxes), bool)
    reach = int(np.ceil(tolerance)) + 1
    for part in np.flatnonzero(grid.has_box):
        x, y = (grid.boxes[part, :2] + grid.boxes[part, 2:]) / 2
        row, column = int(np.floor(y)), int(np.floor(x))
        inside = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]
        top, left = max(0, row - reach), max(0, column - reach)
        ys, xs = np.nonzero(mask[top : max(0, row + reach + 1), left : max(0, column + reach + 1)])
        found[part] = inside or (
            tolerance > 0 and (np.hypot(ys + top + 0.5 - y, xs + left + 0.5 - x) <= tolerance).any()
        )
    return found


def pointing(scores, hit):
    """1 if the highest of the scores (U,) is a hit (U,) bool, 0 if not; of several equally high
    ones the share that are hits."""
    scores = np.asarray(scores, float)
    return float(hit[scores == scores.max()].mean())


def energy(scores, coverage):
    """Share of the positive scores (U,) that lies in a mask that covers `coverage` (U,) of each
    part; NaN where no score is positive."""
    positive = np.clip(np.asarray(scores, float), 0, None)
    return (
        float((positive * coverage).sum() / positive.sum()) if positive.sum() > 0 else float("nan")
    )


# --- taking parts of the picture away -------------------------------------------------------------


@torch.inference_mode()
def logprobs(run, targets, embeds, positions, more):
    """Log-probabilities (n, T) of the answer's tokens `targets` behind inputs embeds (n, N, d) that
    end in the answer, as (n, T) float64 numpy.

    run: gradients.Trace of the whole prompt and answer. positions: as the model takes them, (n, N)
    or (axes, n, N). more: see capturing.more_inputs.
    """
    options = {
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        "position_ids": positions,
        "use_cache": False,
    } | more
    first = min(targets)
    logits = run.vlm.model(
        inputs_embeds=embeds, logits_to_keep=len(run.ids) + 1 - first, **options
    ).logits.float()
    rows, ids = (
        torch.tensor(list(targets), device=logits.device) - first,
        torch.tensor([run.ids[t] for t in targets], device=logits.device),
    )
    return logits[:, rows].log_softmax(-1)[:, torch.arange(len(rows)), ids].double().cpu().numpy()


def _chunks(gone, size):
    for start in range(0, len(gone), size):
        yield slice(start, start + size), gone[start : start + size]


@torch.inference_mode()
def mean_replaced(run, targets, gone, per_pass=8):
    """Log-probabilities (n, T) with some vision tokens replaced by the mean of the picture's own.
    gone (n, P) bool."""
    features, found = run.features.detach(), np.empty((len(gone), len(targets)))
    for where, some in _chunks(gone, per_pass):
        filled = torch.where(
            torch.from_numpy(some).to(features.device)[..., None], features.mean(0), features
        )
        whole = run.batch.repeat(len(some))
        with entering(run.vlm, whole, filled.flatten(0, 1)) as embeds:
            found[where] = logprobs(
                run, targets, embeds, whole.position_ids, more_inputs(run.vlm, whole)
            )
    return found


@torch.inference_mode()
def dropped(run, targets, gone, per_pass=8):
    """Log-probabilities (n, T) with some vision tokens left out of the sequence; the others keep
    their positions. gone (n, P) bool."""
    features = run.features.detach()
    with entering(run.vlm, run.batch, features) as whole:
        embeds = whole[0]
    found, counts = np.empty((len(gone), len(targets))), gone.sum(1)
    for count in np.unique(counts):  # sequences of one length need no padding
        same = np.flatnonzero(counts == count)
        for where, some in _chunks(gone[same], per_pass):
            stay = torch.ones(len(some), run.length, dtype=torch.bool, device=embeds.device)
            stay[:, run.vision] = left = torch.from_numpy(~some).to(embeds.device)
            kept = stay.nonzero()[:, 1].view(len(some), -1)
            positions = run.batch.position_ids[..., 0, :][..., kept]
            more = {name: value[0, kept] for name, value in more_inputs(run.vlm, run.batch).items()}
            deep = features[:, embeds.shape[1] :].expand(len(some), -1, -1)[left]
            with deepened(run.vlm, run.batch.groups[0, kept] == VISION, deep):
                found[same[where]] = logprobs(run, targets, embeds[kept], positions, more)
    return found


def blur_boxes(picture, grid, gone, radius):
    """Pictures, one for each row of gone (n, U) bool, with the boxes of its parts out of the
    blurred picture. radius: of the Gaussian, in pixels."""
    sharp, blurred = (
        np.asarray(picture),
        np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))),
    )
    made = []
    for some in gone:
        pixels = sharp.copy()
        for x0, y0, x1, y1 in np.round(grid.boxes[some & grid.has_box]).astype(int).clip(0):
            pixels[y0:y1, x0:x1] = blurred[y0:y1, x0:x1]
        made.append(Image.fromarray(pixels))
    return made


@torch.inference_mode()
def blurred(run, targets, gone, picture, grid, radius, per_pass=8):
    """Log-probabilities (n, T) with some boxes of the picture blurred before the tower sees it.
    gone (n, U) bool for the U boxes of `grid`."""
    found, sample = np.empty((len(gone), len(targets))), run.prompt.samples[0]
    for where, some in _chunks(gone, per_pass):
        batch = run.vlm.encode([sample] * len(some), blur_boxes(picture, grid, some, radius))
        whole = run.batch.repeat(len(some))
        with entering(run.vlm, whole, entered(run.vlm, run.vlm.vision(batch))) as embeds:
            found[where] = logprobs(
                run, targets, embeds, whole.position_ids, more_inputs(run.vlm, whole)
            )
    return found

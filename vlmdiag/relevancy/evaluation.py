"""What a run of diagnostic_tools/evaluate_relevancy.py measures of one picture: perturbation curves
and localisation of every method's map, for the tokens that name an object.

Transformer-MM-Explainability (arXiv 2103.15679); docs/studies/stethoscope.md, section 4.3.
Definitions in perturbation.py. Shapes: M maps, T targets, U parts, K shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlmdiag.answers import token_spans
from vlmdiag.cli import UsageError
from vlmdiag.interp.objects import object_mask, rng_for
from vlmdiag.pictures.entries import image_key
from vlmdiag.pictures.samples import turn_of
from vlmdiag.relevancy import perturbation
from vlmdiag.relevancy.gradients import trace
from vlmdiag.relevancy.maps import answer_of, places_of
from vlmdiag.relevancy.methods import METHODS
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from PIL.Image import Image

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Sample
    from vlmdiag.relevancy.gradients import Trace
    from vlmdiag.relevancy.perturbation import Annotation
    from vlmdiag.types import VLM

Arrays = dict[str, "np.ndarray"]
Scores = dict[str, "np.ndarray"]  # {map: (T, U)}
Span = tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """How maps are evaluated, by the flags of evaluate_relevancy.py."""

    max_new_tokens: int
    use_answers: bool  # measure each sample's answer by teacher forcing
    methods: Sequence[str]
    removal: Sequence[str]  # mean, drop, blur
    shares: Sequence[float]
    targets_per_image: int | None  # so many, drawn by the seed; None: all
    blur_radius: float  # in sides of the picture (the longer one)
    tolerance: float  # pixels that the pointing game forgives
    seed: int
    per_pass: int  # removals that run together


class Target(NamedTuple):
    """A token of an answer that names an object: which word of the name it writes, from 0."""

    token: int
    word: int
    annotation: Annotation


def draw_targets(
    named: Sequence[tuple[Sequence[int], Annotation]],
    text: str,
    spans: Sequence[Span],
    count: int | None,
    rng: np.random.Generator,
) -> list[Target]:
    """The tokens of named objects, all or `count` drawn by rng, in the order of the answer."""
    targets = []
    for tokens, annotation in named:
        start = spans[tokens[0]][0]
        for token in tokens:
            words = text[start : spans[token][1]].split()
            targets.append(Target(token, len(words) - 1, annotation))
    if count is None or count >= len(targets):
        return targets
    chosen = np.sort(rng.choice(len(targets), count, replace=False))
    return [targets[i] for i in chosen]


def localise(
    scores: Mapping[str, Float[np.ndarray, "T U"]],
    places: PatchGrid,
    masks: Sequence[Bool[np.ndarray, "height width"]],
    tolerance: float,
) -> tuple[Scores, Arrays]:
    """(the maps with the two references beside them, pointing and energy (M, T) of each on the T
    objects' masks with the area prior's two (T,)).

    'centre': the centre prior; 'object': the share of a box that the object covers. NaN for maps
    that are not over the boxes; an object outside all boxes is NaN throughout.
    """
    coverage = np.stack([places.coverage(mask) for mask in masks])  # (T, U)
    hit = np.stack([perturbation.hits(places, mask, tolerance) for mask in masks])  # (T, U)
    boxed = places.has_box
    all_scores = dict(scores)
    all_scores["centre"] = np.tile(perturbation.centre_scores(places), (len(masks), 1))
    all_scores["object"] = coverage
    pointing = np.full((len(all_scores), len(masks)), np.nan)
    energy = pointing.copy()
    in_view = coverage.any(1)  # (T,)
    for m, maps in enumerate(all_scores.values()):
        if maps.shape != coverage.shape:
            continue
        for t in np.flatnonzero(in_view):
            of_boxes = maps[t, boxed]
            pointing[m, t] = perturbation.pointing(of_boxes, hit[t, boxed])
            energy[m, t] = perturbation.energy(of_boxes, coverage[t, boxed])
    measured = np.where(in_view, 1.0, np.nan)
    return all_scores, {
        "pointing": pointing,
        "energy": energy,
        "area_pointing": hit[:, boxed].mean(1) * measured,
        "area_energy": coverage[:, boxed].mean(1) * measured,
    }


def removal_curves(
    measure: perturbation.Measure,
    scores: Scores,
    units: int,
    targets: Sequence[int],
    sample_id: str,
    protocol: Protocol,
) -> Float[np.ndarray, "M T 2 K"]:
    """Log-probabilities by every map of `units` parts, NaN for the others. measure: of patterns of
    removed parts, see perturbation.curves()."""
    logprobs = np.full((len(scores), len(targets), 2, len(protocol.shares)), np.nan)
    fitting = []
    orders = []
    for m, (name, maps) in enumerate(scores.items()):
        if maps.shape[1] != units:
            continue
        fitting.append(m)
        of_map = []
        for i, target in enumerate(targets):
            rng = rng_for(protocol.seed, sample_id, name, target)
            of_map.append(perturbation.order(maps[i], rng))
        orders.append(of_map)
    if fitting:
        logprobs[fitting] = perturbation.curves(measure, np.array(orders), protocol.shares)
    return logprobs


def make_process(
    vlm: VLM, protocol: Protocol, annotations: Mapping[int | str, Sequence[Annotation]]
) -> Callable[[Sequence[tuple[Sample, Image]]], list[tuple[Record, Arrays]]]:
    """process([(sample, picture), ...]) -> [(record, arrays), ...]. annotations: {image id: of the
    picture's objects}; their categories are the names that are looked for."""
    of_pictures = {image_key(image_id): objects for image_id, objects in annotations.items()}
    names = sorted({item["category"] for objects in annotations.values() for item in objects})

    def decode(ids: Sequence[int]) -> str:
        return vlm.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def process(loaded: Sequence[tuple[Sample, Image]]) -> list[tuple[Record, Arrays]]:
        return [evaluate(sample, picture) for sample, picture in loaded]

    def evaluate(sample: Sample, picture: Image) -> tuple[Record, Arrays]:
        batch = vlm.encode([sample], [picture])
        given = sample.answer if protocol.use_answers else None
        ids = answer_of(vlm, batch, given, protocol.max_new_tokens)
        text, spans = token_spans(ids, decode)
        objects = of_pictures.get(image_key(sample.extra["image_id"]), [])
        named, left_out = perturbation.objects_named_once(text, spans, objects, names)
        rng = rng_for(protocol.seed, sample.id, "targets")
        targets = draw_targets(named, text, spans, protocol.targets_per_image, rng)
        record: Record = {
            "image_id": str(sample.extra["image_id"]),
            "file_name": sample.image.name,
            "question": sample.question,
            "prompt": batch.prompts[0],
            "caption": text.strip(),
            "generated_ids": ids,
            "methods": list(protocol.methods),
            "left_out": left_out,
            "targets": [
                {
                    "token": target.token,
                    "text": text[slice(*spans[target.token])].strip(),
                    "word": target.word,
                    "name": target.annotation["category"],
                    "annotation": target.annotation.get("id"),
                }
                for target in targets
            ],
        }
        if not targets:
            return record, {}
        run = trace(vlm, batch, ids)
        arrays, record["methods"] = measure(run, batch, sample, picture, targets)
        return record, arrays

    def measure(
        run: Trace, batch: Batch, sample: Sample, picture: Image, targets: Sequence[Target]
    ) -> tuple[Arrays, list[str]]:
        """(arrays, names of the maps in them)."""
        tokens = [target.token for target in targets]
        scores: Scores = {
            name: METHODS[name](run, tokens, protocol.seed) for name in protocol.methods
        }
        arrays = {f"scores_{name}": maps for name, maps in scores.items()}
        places = places_of(vlm, batch, picture)
        if places is not None:
            turn = turn_of(picture)
            masks = [object_mask(target.annotation, picture.size, turn) for target in targets]
            scores, local = localise(scores, places, masks, protocol.tolerance)
            arrays |= local
            arrays["boxes"] = places.boxes
        elif "blur" in protocol.removal:
            raise UsageError(
                f"{vlm.path}: --removal blur needs to know where the vision tokens lie (grid), and"
                f" {vlm.family.name} does not tell"
            )
        vision = len(run.vision)
        all_gone, none_gone = np.ones((1, vision), bool), np.zeros((1, vision), bool)
        arrays["without_picture"] = perturbation.mean_replaced(run, tokens, all_gone)[0]
        arrays["logprob"] = perturbation.mean_replaced(run, tokens, none_gone)[0]
        for removal in protocol.removal:
            units = vision
            if removal == "blur" and places is not None:
                units = len(places.boxes)
            remove = remover(run, tokens, removal, picture, places)
            arrays[f"curves_{removal}"] = removal_curves(
                remove, scores, units, tokens, sample.id, protocol
            )
        single = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
        return single, list(scores)

    def remover(
        run: Trace, tokens: Sequence[int], removal: str, picture: Image, places: PatchGrid | None
    ) -> perturbation.Measure:
        """gone (n, U) -> log-probabilities (n, T) with these parts removed."""

        def remove(gone: Bool[np.ndarray, "n U"]) -> Float[np.ndarray, "n T"]:
            if removal == "mean":
                return perturbation.mean_replaced(run, tokens, gone, protocol.per_pass)
            if removal == "drop":
                return perturbation.dropped(run, tokens, gone, protocol.per_pass)
            assert places is not None
            radius = protocol.blur_radius * max(picture.size)
            return perturbation.blurred(
                run, tokens, gone, picture, places, radius, protocol.per_pass
            )

        return remove

    return process

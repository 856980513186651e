"""What diagnostic_tools/hallucination_warning.py asks, measures, fits and reports.

Object words are category names in descriptions, and the Yes of questions in POPE's form (arXiv
2305.10355). A word is hallucinated if the picture has no such instance. Signals:
warning_signals.py; fit and AUROC: calibration.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vlmdiag.cli import UsageError
from vlmdiag.figures.stats import holm
from vlmdiag.model.decoding import generate
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes.questions import article
from vlmdiag.stethoscope import calibration
from vlmdiag.stethoscope.warning_signals import SIGNALS, measure, object_words, tokens_of
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import VLM

CORRUPTIONS = ("none", "noise", "blur", "covered")
BASELINE = "log_probability"


@dataclass(frozen=True)
class Item:
    """One picture and one prompt."""

    id: str
    image: Path
    question: str
    image_id: str
    corruption: str
    name: str | None  # the object asked about, None in a description
    objects: tuple[str, ...]  # names of the picture's instances


# ---- what is asked ----


def items_of(
    samples: Sequence[Sample],
    objects: Mapping[str, tuple[str, ...]],
    names: Sequence[str],
    kinds: Collection[str],
    corrupt: Collection[str],
    questions_per_image: int,
    seed: int,
) -> list[Item]:
    """The prompts about each picture, whose corruption and objects asked about are drawn by (seed,
    image id).

    samples: a description each. objects: {image id: names of its instances}; names: all that are
    asked about. kinds: captions, pope.
    """
    items = []
    for sample in samples:
        image_id = str(sample.extra["image_id"])
        there = objects.get(image_id, ())
        rng = Random(f"{seed}|{image_id}")
        corruption = rng.choice(sorted(corrupt, key=CORRUPTIONS.index))
        questions: list[tuple[int, str, str | None]] = []
        if "captions" in kinds:
            questions.append((0, sample.question, None))
        if "pope" in kinds:
            absent = [name for name in names if name not in there]
            count = min(questions_per_image // 2, len(there))
            asked = rng.sample(list(there), count)
            asked += rng.sample(absent, min(questions_per_image - count, len(absent)))
            for n, name in enumerate(asked, 1):
                questions.append((n, f"Is there {article(name)} in the image?", name))
        for n, question, about in questions:
            items.append(
                Item(
                    id=f"{sample.id}-{n}",
                    image=sample.image,
                    question=question,
                    image_id=image_id,
                    corruption=corruption,
                    name=about,
                    objects=there,
                )
            )
    return items


def corrupted(picture: Image.Image, kind: str, seed: str) -> Image.Image:
    """The picture with noise over it, blurred, or with two thirds of it covered in grey
    rectangles."""
    rng = Random(seed)
    width, height = picture.size
    if kind == "noise":
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 70, (height, width, 3))
        noisy = np.clip(np.asarray(picture, float) + noise, 0, 255)
        return Image.fromarray(noisy.astype(np.uint8))
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 24))
    if kind == "covered":
        picture = picture.copy()
        draw = ImageDraw.Draw(picture)
        for _ in range(6):
            x = rng.uniform(-0.1, 0.8) * width
            y = rng.uniform(-0.1, 0.8) * height
            draw.rectangle([x, y, x + 0.4 * width, y + 0.4 * height], fill=(127, 127, 127))
    return picture


# ---- measuring ----


def words_of(
    vlm: VLM, ids: list[int], item: Item, names: Collection[str]
) -> tuple[str, list[tuple[str, list[int]]]]:
    """(text, [(name, indices of its tokens), ...]) of an answer: object names in a description, the
    Yes of a question."""
    text = vlm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if item.name is None:
        spans = [(name, start, end) for name, start, end in object_words(text, names)]
    else:
        spans = [(item.name, start, end) for _, start, end in object_words(text, ["yes"])[:1]]
    words = []
    for name, start, end in spans:
        tokens = tokens_of(vlm, ids, start, end)
        if tokens:
            words.append((name, tokens))
    return text.strip(), words


def make_process(
    vlm: VLM, names: Collection[str], max_new_tokens: int, seed: int
) -> Callable[[Sequence[tuple[Item, Image.Image]]], list[tuple[Record, dict[str, np.ndarray]]]]:
    """process([(item, picture), ...]) -> [(record, {}), ...]. names: object words of descriptions;
    seed: of the corruptions."""

    def process(
        loaded: Sequence[tuple[Item, Image.Image]],
    ) -> list[tuple[Record, dict[str, np.ndarray]]]:
        return [(ask(item, picture), {}) for item, picture in loaded]

    def ask(item: Item, picture: Image.Image) -> Record:
        kind = item.corruption
        picture = corrupted(picture, kind, f"{seed}|{item.image_id}|{kind}")
        batch = vlm.encode([Sample(item.id, item.image, item.question)], [picture])
        ids = generate(vlm, batch, max_new_tokens if item.name is None else 4).ids[0]
        text, words = words_of(vlm, ids, item, names)
        values = measure(vlm, batch, ids, [tokens for _, tokens in words]) if words else []
        measured = []
        for (name, tokens), signals in zip(words, values, strict=True):
            hallucinated = name not in item.objects
            measured.append(
                {"word": name, "tokens": tokens, "hallucinated": hallucinated, "signals": signals}
            )
        return {
            "image_id": item.image_id,
            "kind": "captions" if item.name is None else "pope",
            "question": item.question,
            "corruption": item.corruption,
            "caption": text,
            "objects": list(item.objects),
            "words": measured,
        }

    return process


# ---- fit and test ----


class Words(NamedTuple):
    """All object words of a run, or those of one kind."""

    signals: Float[np.ndarray, "n J"]
    hallucinated: Bool[np.ndarray, " n"]
    image_ids: np.ndarray  # (n,) text
    kinds: np.ndarray  # (n,) text

    def of_kind(self, kind: str) -> Words:
        """The words of descriptions or of questions."""
        chosen = self.kinds == kind
        return Words(*(column[chosen] for column in self))

    def counts(self) -> dict[str, int]:
        """How many words and images there are, and how many are hallucinated."""
        return {
            "n_words": len(self.hallucinated),
            "n_hallucinated": int(self.hallucinated.sum()),
            "n_images": len(set(self.image_ids)),
        }


def table(run: Run) -> Words:
    """All object words of a run."""
    words = [(record, word) for record in run.records() for word in record["words"]]
    signals = [[word["signals"][name] for name in SIGNALS] for _, word in words]
    return Words(
        np.array(signals, float).reshape(len(words), len(SIGNALS)),
        np.array([word["hallucinated"] for _, word in words], bool),
        np.array([record["image_id"] for record, _ in words], str),
        np.array([record["kind"] for record, _ in words], str),
    )


def calibrate(run: Run) -> Record:
    """The calibration of a run's words, for each kind of its own: all signals together, each alone,
    and their AUROC on the same words. UsageError where no kind can be calibrated."""
    all_words = table(run)
    kinds = {}
    for kind in sorted(set(all_words.kinds)):
        words = all_words.of_kind(kind)
        truth = words.hallucinated
        try:
            models = {"all": calibration.fit(words.signals, truth)}
            for j, name in enumerate(SIGNALS):
                models[name] = calibration.fit(words.signals[:, [j]], truth)
        except ValueError as error:
            print(
                f"{kind}: {error}; more pictures (--max_images) or harder ones (--corrupt) are"
                " needed"
            )
            continue
        # a low signal is the sign of a hallucination
        scores = {
            name: calibration.auroc_interval(-words.signals[:, j], truth, words.image_ids)
            for j, name in enumerate(SIGNALS)
        }
        kinds[str(kind)] = words.counts() | {"models": models, "auroc_fit": scores}
    if not kinds:
        raise UsageError(
            f"{run.path}: neither descriptions nor questions have both hallucinated and grounded"
            " object words, so nothing is calibrated"
        )
    settings = run.meta["settings"]
    return {
        "model": settings["model_name"],
        "fingerprint": settings["fingerprint"],
        "signals": list(SIGNALS),
        "kinds": kinds,
        "names": settings["names"],
    }


def report(run: Run, fitted: Fields) -> dict[str, Record]:
    """What a calibration is worth on words that it was not fitted on, for each kind."""
    all_words = table(run)
    reports: dict[str, Record] = {}
    for kind in sorted(set(all_words.kinds)):
        words = all_words.of_kind(kind)
        both = 0 < words.hallucinated.sum() < len(words.hallucinated)
        too_few = not both or kind not in fitted["kinds"]
        reports[str(kind)] = words.counts() | {"too_few": too_few}
        if not too_few:
            reports[str(kind)] |= _report_of(words, fitted["kinds"][kind]["models"])
    correct(reports)
    return reports


def correct(reports: Mapping[str, Record]) -> None:
    """Give every signal of all kinds its p_holm and beats_baseline: they are read together."""
    of_all = [
        scores
        for numbers in reports.values()
        for name, scores in numbers.get("signals", {}).items()
        if name != BASELINE
    ]
    ps = holm([scores["over_baseline"]["p"] for scores in of_all])
    for scores, p in zip(of_all, ps, strict=True):
        scores["p_holm"] = p
        scores["beats_baseline"] = bool(p <= 0.05 and scores["over_baseline"]["value"] > 0)


def _report_of(words: Words, models: Mapping[str, calibration.Model]) -> Record:
    """{signals: {name: scores}, reliability} of the words of one kind."""
    truth = words.hallucinated
    predicted = {
        name: calibration.predict(models[name], words.signals[:, [j]])
        for j, name in enumerate(SIGNALS)
    }
    predicted["all"] = calibration.predict(models["all"], words.signals)
    signals = {}
    for name, scores in predicted.items():
        gain = calibration.auroc_difference(scores, predicted[BASELINE], truth, words.image_ids)
        signals[name] = {
            "auroc": calibration.auroc_interval(scores, truth, words.image_ids),
            "ece": calibration.expected_calibration_error(scores, truth),
            "over_baseline": gain,
            "brier": float(((scores - truth) ** 2).mean()),
        }
    return {"signals": signals, "reliability": calibration.reliability(predicted["all"], truth)}


def lines_of_fit(fitted: Fields) -> list[str]:
    """A calibration as lines of text."""
    lines = []
    for kind, numbers in fitted["kinds"].items():
        lines.append(_counts_line(kind, numbers))
        for name, score in numbers["auroc_fit"].items():
            lines.append(
                f"  {name}: AUROC {_span(score)} on the words of the fit, a low value as a sign"
            )
    return lines


def lines_of_report(reports: Mapping[str, Record]) -> list[str]:
    """A report as lines of text."""
    lines = []
    for kind, numbers in reports.items():
        few = ", too few or not calibrated" if numbers["too_few"] else ""
        lines.append(_counts_line(kind, numbers) + few)
        for name, scores in numbers.get("signals", {}).items():
            verdict = "does not beat token probability"
            if name == BASELINE:
                verdict = "baseline"
            elif scores["beats_baseline"]:
                verdict = "beats token probability"
            if name != BASELINE:
                verdict += f" (p {scores['p_holm']:.2g}, Holm's over all signals)"
            lines.append(
                f"  {name}: AUROC {_span(scores['auroc'])}, difference"
                f" {_span(scores['over_baseline'], '+')}: {verdict}; ECE {scores['ece']:.3f}"
            )
    return lines


def _counts_line(kind: str, numbers: Fields) -> str:
    hallucinated = f"{numbers['n_hallucinated']} of {numbers['n_words']}"
    return f"{kind}: {hallucinated} object words hallucinated"


def _span(score: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (f"{score[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"

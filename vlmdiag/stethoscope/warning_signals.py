"""What a model's insides say about each object word of its answer: is there anything of it in the
picture?

    log_probability   mean over the word's tokens of log p(token)
                      the baseline
    llr               log p(token | picture) - log p(token | every vision token replaced by their
                      mean)      image-conditioned log-likelihood ratio
    visual_share      max R_img / (max R_img + max R_text) at the last layer
                      (vlmdiag/relevancy/rules.py), the largest of the word's tokens
    relevancy_mass    sum of R_img at the last layer, the largest of the word's tokens
    lens              largest p(token) that the logit lens reads at any vision token after any layer
                      but the last, the largest of the word's tokens
                      (arXiv 2410.02762 takes it as the model's confidence that the object is there)

High values are meant to speak for a grounded word; the calibration learns the sign.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vlmdiag.answers import token_spans
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.identity import fingerprint
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.vision import prefill
from vlmdiag.relevancy import methods, rules
from vlmdiag.relevancy.gradients import trace
from vlmdiag.runs import rundirs
from vlmdiag.stethoscope import calibration
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM

EXPERIMENT = "hallucination_warning"
SIGNALS = ("log_probability", "llr", "visual_share", "relevancy_mass", "lens")
TEXT = tuple(GROUPS.index(name) for name in ("user", "generated"))


class ObjectWord(NamedTuple):
    """An object's name in a text, at the characters [start, end)."""

    name: str
    start: int
    end: int


def object_words(text: str, names: Collection[str]) -> list[ObjectWord]:
    """The object names that stand in a text as whole words, longer names first, none inside
    another. Case and a plural s are ignored."""
    words: list[ObjectWord] = []
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        pattern = rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)"
        for match in re.finditer(pattern, text, re.IGNORECASE):
            start, end = match.span()
            if not any(word.start < end and start < word.end for word in words):
                words.append(ObjectWord(name, start, end))
    return sorted(words, key=lambda word: word.start)


def tokens_of(vlm: VLM, ids: Sequence[int], start: int, end: int) -> list[int]:
    """Indices of the generated tokens that wrote the characters [start, end) of the answer."""

    def decode(token_ids: Sequence[int]) -> str:
        return vlm.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    spans = token_spans(ids, decode)[1]
    return [
        i for i, (first, last) in enumerate(spans) if first < end and last > start and last > first
    ]


def measure(
    vlm: VLM, batch: Batch, ids: list[int], words: Sequence[Sequence[int]]
) -> list[dict[str, float]]:
    """[{signal: value}, ...] of words, each a list of indices into ids. batch: one prompt."""
    run = trace(vlm, batch, ids, tower=False)
    chosen = torch.tensor(ids, device=run.logits.device)[:, None]
    logs = run.logits.log_softmax(-1).gather(1, chosen)[:, 0]
    mean = run.features.detach().mean(0, keepdim=True).expand_as(run.features)
    blank = trace(vlm, batch, ids, tower=False, features=mean)
    blank_logs = blank.logits.log_softmax(-1).gather(1, chosen)[:, 0]

    targets = sorted({target for word in words for target in word})
    relevancy = methods.relevancy(run, targets, [len(run.layers) - 1], tower=False)
    is_text = torch.isin(run.batch.groups[0].cpu(), torch.tensor(TEXT))
    image = torch.from_numpy(relevancy.image[:, 0])
    text = torch.from_numpy(relevancy.rows[:, 0])[:, is_text]
    shares = rules.share(image, text).numpy()
    mass = relevancy.image[:, 0].sum(-1)
    lens = seen_by_lens(vlm, batch, [ids[target] for target in targets])

    row_of = {target: row for row, target in enumerate(targets)}
    values = []
    for word in words:
        tokens = list(word)
        rows = [row_of[target] for target in tokens]
        values.append(
            {
                "log_probability": float(logs[tokens].mean()),
                "llr": float((logs - blank_logs)[tokens].mean()),
                "visual_share": float(np.nan_to_num(shares[rows]).max()),
                "relevancy_mass": float(mass[rows].max()),
                "lens": float(lens[rows].max()),
            }
        )
    return values


@torch.inference_mode()
def seen_by_lens(vlm: VLM, batch: Batch, ids: Sequence[int]) -> Float[np.ndarray, " n"]:
    """For each of n ids, the largest probability that the lens gives it at a vision token, over the
    embeddings and all layers but the last."""
    last = len(vlm.parts.layers)
    lens = Lens(vlm)
    best = torch.zeros(len(ids), device=vlm.device)
    probe = HiddenStates(lambda index: index < last)
    with capture(vlm, [probe]):
        prefill(vlm, batch)
    # so many vision tokens at a time: a row of logits is as long as the vocabulary
    at_once = max(1, 2**24 // lens.head.weight.shape[0])
    for index in range(last):
        states = probe.states.pop(index)[0]
        states = states[batch.vision_positions(0).to(states.device)]
        for chunk in states.split(at_once):
            logits = lens.logits(chunk)
            probs = (logits[:, list(ids)] - logits.logsumexp(-1, keepdim=True)).exp()
            best = torch.maximum(best, probs.amax(0).to(best.device))
    return best.cpu().numpy()


def find_calibration(
    model_path: str, out_root: str | Path = "runs", path: str | Path | None = None
) -> Record | None:
    """The calibration of a model, None where there is none; UsageError where --calibration names a
    broken one or another model's."""
    if path is not None:
        chosen = Path(path)
    else:
        run = rundirs.run_path(out_root, model_path, EXPERIMENT, "fit")
        chosen = run / "analysis" / "calibration.json"
    if not chosen.exists():
        if path is None:
            return None
        raise UsageError(
            f"--calibration {path}: no such file; make it with hallucination_warning.py fit"
        )
    try:
        content: Record = json.loads(chosen.read_bytes())
        models = [kind["models"]["all"] for kind in content["kinds"].values()]
        fitted_on = content["fingerprint"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(
            f"{chosen} is no calibration ({error}); make it again with hallucination_warning.py fit"
        ) from error
    same_model = fitted_on == fingerprint(model_path)
    if not same_model or content["signals"] != list(SIGNALS) or not models:
        raise UsageError(
            f"{chosen} was fitted on another model or with other signals; calibrate {model_path}"
            " with hallucination_warning.py fit"
        )
    return content


def warnings_for(
    vlm: VLM, batch: Batch, ids: list[int], names: Collection[str], fitted: Fields | None
) -> list[Record]:
    """[{word, tokens, signals, probability}, ...] of a description's object words; probability None
    where the calibration `fitted` does not have them."""
    models = None
    if fitted:
        models = fitted["kinds"].get("captions", {}).get("models")
    text = vlm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    words = []
    for name, start, end in object_words(text, names):
        tokens = tokens_of(vlm, ids, start, end)
        if tokens:
            words.append((name, tokens))
    if not words:
        return []
    warnings = []
    values = measure(vlm, batch, ids, [tokens for _, tokens in words])
    for (name, tokens), signals in zip(words, values, strict=True):
        probability = None
        if models:
            row = np.array([[signals[signal] for signal in SIGNALS]])
            probability = float(calibration.predict(models["all"], row)[0])
        warnings.append(
            {"word": name, "tokens": tokens, "signals": signals, "probability": probability}
        )
    return warnings

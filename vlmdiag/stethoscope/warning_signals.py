"""What a model's insides say about each object word of its answer: is there anything of it in the
picture?

    log_probability   mean over the word's tokens of log p(token)
                      the baseline
    llr               log p(token | picture) - log p(token | every vision token replaced by their
                      mean)      image-conditioned log-likelihood ratio
    visual_share      max R_img / (max R_img + max R_text) at the last layer (relevancy.py), the
                      largest of the word's tokens
    relevancy_mass    sum of R_img at the last layer, the largest of the word's tokens
    lens              largest p(token) that the logit lens reads at any vision token after any layer
                      but the last, the largest of the word's tokens
                      (arXiv 2410.02762 takes it as the model's confidence that the object is there)
High values are meant to speak for a grounded word; the calibration learns the sign."""

import json
import re
from pathlib import Path

import numpy as np
import torch

from vlmdiag.answers import token_spans
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.lens import Lens
from vlmdiag.model.loading import fingerprint
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.vision import prefill
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy import rules
from vlmdiag.relevancy.gradients import trace
from vlmdiag.runs import rundirs
from vlmdiag.stethoscope import calibration

EXPERIMENT = "hallucination_warning"
SIGNALS = ("log_probability", "llr", "visual_share", "relevancy_mass", "lens")
TEXT = tuple(GROUPS.index(name) for name in ("user", "generated"))


def named_objects(text, names):
    """[(name, start, end), ...] of the object names that stand in a text as whole words, longer
    names first, none inside another. Case and a plural s are ignored."""
    found, taken = [], []
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)", text, re.IGNORECASE):
            if not any(start < match.end() and match.start() < end for start, end in taken):
                taken.append(match.span())
                found.append((name, *match.span()))
    return sorted(found, key=lambda one: one[1])


def tokens_of(vlm, ids, start, end):
    """Indices of the generated tokens that wrote the characters [start, end) of the answer."""
    _, spans = token_spans(
        ids,
        lambda some: vlm.tokenizer.decode(
            some, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
    )
    return [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]


def measure(vlm, batch, ids, words):
    """[{signal: value}, ...] of words, each a list of indices into ids. batch: one prompt."""
    run = trace(vlm, batch, ids, tower=False)
    targets = sorted({target for word in words for target in word})
    place = {target: i for i, target in enumerate(targets)}
    chosen = torch.tensor(ids, device=run.logits.device)[:, None]
    logs = run.logits.log_softmax(-1).gather(1, chosen)[:, 0]
    mean = run.features.detach().mean(0, keepdim=True).expand_as(run.features)
    blank = (
        trace(vlm, batch, ids, tower=False, features=mean)
        .logits.log_softmax(-1)
        .gather(1, chosen)[:, 0]
    )
    found = attribution.relevancy(run, targets, [len(run.layers) - 1], tower=False)
    text = torch.isin(run.batch.groups[0].cpu(), torch.tensor(TEXT))
    shares = rules.share(
        torch.from_numpy(found.image[:, 0]), torch.from_numpy(found.rows[:, 0])[:, text]
    ).numpy()
    mass = found.image[:, 0].sum(-1)
    lens = seen_by_lens(vlm, batch, [ids[target] for target in targets])
    values = []
    for word in words:
        rows = [place[target] for target in word]
        values.append(
            {
                "log_probability": float(logs[word].mean()),
                "llr": float((logs - blank)[word].mean()),
                "visual_share": float(np.nan_to_num(shares[rows]).max()),
                "relevancy_mass": float(mass[rows].max()),
                "lens": float(lens[rows].max()),
            }
        )
    return values


@torch.inference_mode()
def seen_by_lens(vlm, batch, ids):
    """(n,) for each of n ids, the largest probability that the lens gives it at a vision token,
    over the embeddings and all layers but the last."""
    last, lens, best = len(vlm.parts.layers), Lens(vlm), torch.zeros(len(ids), device=vlm.device)
    with capture(vlm, [probe := HiddenStates(lambda index: index < last)]):
        prefill(vlm, batch)
    for index in range(last):
        states = probe.states.pop(index)[0, batch.vision_positions(0)]
        for part in states.split(max(1, 2**24 // lens.head.weight.shape[0])):
            logits = lens.logits(part)
            best = torch.maximum(
                best,
                (logits[:, ids] - logits.logsumexp(-1, keepdim=True)).exp().amax(0).to(best.device),
            )
    return best.cpu().numpy()


def find_calibration(model_path, out_root="runs", path=None):
    """The calibration of a model, None where there is none; UsageError where --calibration names a
    broken one or another model's."""
    chosen = (
        Path(path)
        if path
        else rundirs.run_path(out_root, model_path, EXPERIMENT, "fit")
        / "analysis"
        / "calibration.json"
    )
    if not chosen.exists():
        if path:
            raise UsageError(
                f"--calibration {path}: no such file; make it with hallucination_warning.py fit"
            )
        return None
    try:
        found = json.loads(chosen.read_bytes())
        models, own = (
            [kind["models"]["all"] for kind in found["kinds"].values()],
            found["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{chosen} is no calibration ({error}); make it again with hallucination_warning.py fit"
        ) from error
    if own != fingerprint(model_path) or found["signals"] != list(SIGNALS) or not models:
        raise UsageError(
            f"{chosen} was fitted on another model or with other signals; calibrate {model_path}"
            " with hallucination_warning.py fit"
        )
    return found


def warnings_for(vlm, batch, ids, names, found):
    """[{word, tokens, signals, probability}, ...] of a description's object words; probability None
    where found (the calibration) does not have them."""
    models = found["kinds"].get("captions", {}).get("models") if found else None
    text = vlm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    words = [
        (name, tokens_of(vlm, ids, start, end)) for name, start, end in named_objects(text, names)
    ]
    words = [(name, tokens) for name, tokens in words if tokens]
    values = measure(vlm, batch, ids, [tokens for _, tokens in words]) if words else []
    out = []
    for (name, tokens), signals in zip(words, values, strict=True):
        risk = (
            float(calibration.predict(models["all"], [[signals[key] for key in SIGNALS]])[0])
            if models
            else None
        )
        out.append({"word": name, "tokens": tokens, "signals": signals, "probability": risk})
    return out

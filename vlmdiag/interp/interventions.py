"""Ablation of vision tokens: what replaces a token, and many conditions of one picture in few
passes; integrated gradients.

arXiv 2410.07149; docs/studies/llava_interp.md, sections 2.5 to 2.8. Which tokens: conditions.py;
attention knockouts: knockout.py; what counts as an answer: criteria.py. Shapes: P vision tokens, d
width, d_in = d or, with deepstack, (1 + K) d (see vision.entered()), T prompt length, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmdiag.cli import UsageError
from vlmdiag.interp.objects import rng_for
from vlmdiag.model.attention import one_mask
from vlmdiag.model.decoding import Generation, generate
from vlmdiag.model.prefix import Inputs, SharedPicture, first_positions
from vlmdiag.model.vision import entered, entering, prefill

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import DynamicCache

    from vlmdiag.batch import Batch
    from vlmdiag.interp.conditions import Tokens
    from vlmdiag.types import VLM, ImageFeatures


# --- what a token is replaced by ------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """What replaces vision tokens. kind: mean, zeros or noise."""

    kind: str
    mean: Float[Tensor, " d"] | None = None
    provenance: object = None  # where the mean vector comes from

    def values(self, vision: Float[Tensor, "P d"], seed: int, item_id: str) -> Float[Tensor, "P d"]:
        """What to put in place of a picture's vision tokens. noise: normal, with the mean and
        deviation of each dimension over the picture's tokens, seeded by the item."""
        if self.kind == "zeros":
            return torch.zeros_like(vision)
        if self.mean is not None:
            return self.mean.to(vision).expand_as(vision)
        rng = rng_for(seed, item_id, "noise")
        noise = torch.from_numpy(rng.standard_normal(tuple(vision.shape), dtype=np.float32))
        in_float = vision.float()
        drawn = in_float.mean(0).addcmul(noise.to(vision.device), in_float.std(0))
        return drawn.to(vision)


def load_mean(path: str | Path, width: int) -> tuple[Float[Tensor, " d"], object]:
    """(float32 mean vector, provenance or None) from a .pt file and the .json beside it.
    UsageError: unreadable, another width."""
    try:
        mean = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 -- pickle errors of every kind
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--mean_tensor {path} cannot be read ({reason})") from error
    is_dense = torch.is_tensor(mean) and not mean.is_meta and mean.layout == torch.strided
    if torch.is_tensor(mean) and not (is_dense and mean.is_floating_point()):
        found = str(mean.dtype) if is_dense else f"a tensor of {mean.layout} on {mean.device}"
        raise UsageError(f"--mean_tensor {path}: real numbers were wanted, found {found}")
    if not torch.is_tensor(mean) or mean.shape != (width,):
        found = str(tuple(getattr(mean, "shape", ())) or type(mean).__name__)
        raise UsageError(
            f"--mean_tensor {path}: a tensor of shape ({width},) was wanted, found {found}"
        )
    if not mean.isfinite().all():
        raise UsageError(f"--mean_tensor {path}: not all of its numbers are finite")
    beside = Path(path).with_suffix(".json")
    try:
        provenance = json.loads(beside.read_text()) if beside.exists() else None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{beside} is not readable JSON ({error})") from error
    written = provenance.get("sha256") if isinstance(provenance, dict) else None
    if written and sha256(Path(path).read_bytes()).hexdigest() != written:
        raise UsageError(
            f"--mean_tensor {path} is not the vector that {beside} was written for; make both again"
            f" with python scripts/calculate_mean_vector.py {Path(path).parent}"
        )
    return mean.float(), provenance


def replacement_of(vlm: VLM, kind: str, mean_tensor: str | None) -> Replacement:
    """The replacement of --replacement and --mean_tensor. UsageError without a mean vector."""
    if kind != "mean":
        return Replacement(kind)
    if mean_tensor is None:
        raise UsageError("a mean vector is needed where the mean replaces a token")
    width = vlm.model.get_input_embeddings().weight.shape[1]
    mean, provenance = load_mean(mean_tensor, width)
    if provenance is None:
        print(f"{mean_tensor}: provenance unknown (no .json beside it)")
    if not isinstance(provenance, dict) or not provenance.get("sha256"):
        # a run that goes on has to tell this vector from another one of the same name
        digest = sha256(Path(mean_tensor).read_bytes()).hexdigest()
        provenance = {"written": provenance or "unknown", "sha256": digest}
    return Replacement(kind, mean, provenance)


def _as_wide_as(vision: Tensor, values: Float[Tensor, "P d"]) -> Float[Tensor, "P d_in"]:
    """Values for the decoder's input, with 0 for what deepstack adds in its first layers."""
    return torch.nn.functional.pad(values, (0, vision.shape[-1] - values.shape[-1]))


# --- running --------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """One prompt of one picture, ready to be continued."""

    batch: Batch  # one row
    features: ImageFeatures
    vision: Float[Tensor, "P d_in"]  # what the decoder gets for each vision token
    embeds: Float[Tensor, "1 T d"]  # the decoder's inputs
    cache: DynamicCache  # keys and values of all positions
    positions: Int[Tensor, " P"]  # of its vision tokens
    logits: Float[Tensor, " V"]  # of the token after the prompt, float32

    def inputs(self, vlm: VLM) -> Inputs:
        """What generate() gets beside the batch to go on from the pass that was made over it, as
        far as that can be."""
        cache = first_positions(vlm, self.cache, self.embeds.shape[1] - 1)
        if cache is None:
            return {"features": self.features}
        return {"embeds": self.embeds, "cache": cache}


@torch.no_grad()
def prepare(
    vlm: VLM, batch: Batch, features: ImageFeatures, shared: SharedPicture | None = None
) -> Prompt:
    """Read a prompt. shared: keeps the keys and values up to the end of the picture of a prompt
    that began alike, which are not computed again."""
    vision = entered(vlm, features)
    cache = None if shared is None else shared.cache_of(batch, [0])
    with entering(vlm, batch, vision) as embeds:
        output = prefill(vlm, batch, cache=cache, embeds=embeds)
    return Prompt(
        batch=batch,
        features=features,
        vision=vision,
        embeds=embeds,
        cache=output.past_key_values,
        positions=batch.vision_positions(0),
        logits=output.logits[0, -1].float(),
    )


class Answer(NamedTuple):
    """One answer under one condition: ids, log-probabilities (N,) of the chosen ids, and (V,) of
    the first step."""

    ids: list[int]
    logprobs: Float[Tensor, " N"]
    first: Float[Tensor, " V"]


Ask = Callable[..., Generation]  # (vlm, batch, **options of generate()) -> Generation


def asking(limit: int, draft: Sequence[int] = ()) -> Ask:
    """Greedy decoding of at most `limit` tokens. draft: an answer that is likely, such as the one
    without the intervention."""

    def ask(vlm: VLM, batch: Batch, **options: Any) -> Generation:
        drafts = [draft] * len(batch.samples) if draft else None
        return generate(vlm, batch, limit, drafts=drafts, **options)

    return ask


def naming(ids: Sequence[int]) -> Ask:
    """The given ids after the prompt by teacher forcing."""

    def ask(vlm: VLM, batch: Batch, **options: Any) -> Generation:
        answers = [list(ids)] * len(batch.samples)
        return generate(vlm, batch, len(ids), answers=answers, **options)

    return ask


def answers_of(generation: Generation) -> list[Answer]:
    """The answers of all rows."""
    rows = zip(generation.ids, generation.logprobs, generation.first, strict=True)
    return [Answer(ids, logprobs, first) for ids, logprobs, first in rows]


def run_conditions(
    vlm: VLM,
    prompts: Sequence[Prompt],
    asks: Sequence[Ask],
    sets: Mapping[str, Tokens],
    values: Float[Tensor, "P d"],
    per_pass: int,
) -> dict[str, list[Answer]]:
    """{condition: [answer to each prompt]} with its tokens replaced by values.

    prompts: of one picture, all alike up to the end of the picture; asks: how each is answered.
    With deepstack a replaced token, like one of text, has nothing added in the first layers.
    Conditions are ordered by their first token, the last one first, and run `per_pass` at a time:
    what comes before the first of a pass is not computed again, and the picture's part serves all
    prompts.
    """
    lead = prompts[0]
    end_of_picture = int(lead.positions[-1]) + 1
    wide = _as_wide_as(lead.vision, values).to(lead.vision.device)
    order = sorted(sets, key=lambda name: -int(sets[name].min()))
    answers: dict[str, list[Answer]] = {}
    for at in range(0, len(order), per_pass):
        names = order[at : at + per_pass]
        first_token = min(int(sets[name].min()) for name in names)
        start = int(lead.positions[first_token])
        cache = first_positions(vlm, lead.cache, start, len(names))
        for prompt, ask in zip(prompts, asks, strict=True):
            vision = prompt.vision.repeat(len(names), 1, 1)
            for row, name in enumerate(names):
                tokens = torch.from_numpy(sets[name]).to(vision.device)
                vision[row, tokens] = wide[tokens].to(vision)
            batch = prompt.batch.repeat(len(names))
            with one_mask(vlm), entering(vlm, batch, vision.flatten(0, 1)) as embeds:
                generation = ask(vlm, batch, embeds=embeds, cache=cache)
            for name, answer in zip(names, answers_of(generation), strict=True):
                answers.setdefault(name, []).append(answer)
            # the next prompt goes on from the picture as this one read it
            cache = first_positions(vlm, generation.cache, end_of_picture)
    return answers


# --- integrated gradients -------------------------------------------------------------------------


def integrated_gradients(
    vlm: VLM,
    prompt: Prompt,
    baseline: Float[Tensor, "P d"],
    target: int,
    steps: int = 50,
    per_pass: int = 4,
    paper_compat: bool = False,
) -> tuple[Float[np.ndarray, " P"], float]:
    """(scores, completeness error): attribution of the logit of `target` after the prompt to its
    vision tokens, from a baseline x0 to the tokens x.

        IG = (x - x0) * mean over alpha of d logit / d x at x0 + alpha (x - x0)
        scores = sum over d of |IG|
        completeness error = |sum of IG - (logit(x) - logit(x0))| / |logit(x) - logit(x0)|

    alpha: midpoints of `steps` equal parts; paper_compat: both ends included, as published (whose
    target was the BOS id and whose span was one token too long; that is not reproduced).
    Sundararajan, Taly and Yan 2017, eq. 3; docs/studies/llava_interp.md, section 2.7. Parameters
    are frozen, so no gradient of theirs is made.
    """
    x = prompt.vision
    x0 = _as_wide_as(x, baseline).to(x)
    start = int(prompt.positions[0])
    alphas = (torch.arange(steps) + 0.5) / steps
    if paper_compat:
        alphas = torch.linspace(0, 1, steps)

    def logits_at(points: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Tensor]:
        """The target's logits at x0 + alpha (x - x0), and the points that carry the gradient."""
        batch = prompt.batch.repeat(len(points))
        between = x0 + points.to(x)[:, None, None] * (x - x0)
        between.requires_grad_(torch.is_grad_enabled())
        cache = first_positions(vlm, prompt.cache, start, len(points))
        with one_mask(vlm), entering(vlm, batch, between.flatten(0, 1)) as embeds:
            output = prefill(vlm, batch, cache=cache, embeds=embeds)
        return output.logits[:, -1, target].float(), between

    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for at in range(0, steps, per_pass):
        with torch.enable_grad():
            logits, between = logits_at(alphas[at : at + per_pass])
            (gradient,) = torch.autograd.grad(logits.sum(), between)
        total += gradient.float().sum(0)
    attribution = total / steps * (x - x0).float()
    with torch.no_grad():
        gain = float(prompt.logits[target] - logits_at(torch.zeros(1))[0][0])
    error = abs(float(attribution.sum()) - gain) / max(abs(gain), 1e-12)
    return attribution.abs().sum(-1).cpu().numpy(), error

"""Ablation of vision tokens: which tokens, replaced by what, and many conditions of one picture in
few passes. arXiv 2410.07149, sections 2.5 to 2.8 of our study. Attention knockouts are in
knockout.py, index sets in objects.py, what counts as an answer in criteria.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlmdiag.cli import UsageError
from vlmdiag.interp.objects import buffered, random_blob, random_tokens, register_tokens, rng_for
from vlmdiag.model.decoding import generate
from vlmdiag.model.prefix import first_positions
from vlmdiag.model.vision import entered, entering, prefill

SIZES = (5, 10, 20, 40, 60, 100, 250)


def condition_sets(grid, norms, scores, tokens, sizes, draws, seed, item_id, paper_compat=False):
    """{condition: vision-token indices, or the reason why it cannot be made (str)}.

    norms (P,): of the vision embeddings; scores (P,) or None: integrated gradients; tokens: the
    object's. Conditions: register, patch_<b> (object with b buffers, b = 0, 1, 2), gradient_<n>,
    random_<n>, and as many tokens as patch_<b> has: gradient_matched_<b>,
    random_matched_<b>_<draw>, blob_matched_<b>_<draw> (one compact piece), all. Random sets never
    touch the object and its buffer (matched: that of b, else of 1); paper_compat: they may, and
    gradient sets are as published."""
    count = len(grid.boxes)
    sets = {"register": register_tokens(norms)}
    patches = {b: buffered(grid, tokens, b) for b in (0, 1, 2)}
    sets |= {f"patch_{b}": found for b, found in patches.items()}
    order = None if scores is None else np.argsort(-scores, kind="stable")
    free = {b: np.setdiff1d(np.flatnonzero(grid.has_box), found) for b, found in patches.items()}
    for n in sizes:
        if order is not None:
            sets[f"gradient_{n}"] = (
                np.sort(order[:n]) if n <= count else f"there are {count} vision tokens"
            )
        candidates = np.arange(count) if paper_compat else free[1]
        found = random_tokens(rng_for(seed, item_id, f"random_{n}"), n, candidates)
        sets[f"random_{n}"] = (
            f"{len(candidates)} tokens lie outside the object and its buffer"
            if found is None
            else found
        )
    for b, patch in patches.items():
        if order is not None:
            sets[f"gradient_matched_{b}"] = np.sort(order[: len(patch)])
        for draw in range(draws):
            for kind, choose in (
                ("random", random_tokens),
                ("blob", lambda rng, n, some: random_blob(rng, grid, n, some)),
            ):
                name = f"{kind}_matched_{b}_{draw}"
                found = choose(rng_for(seed, item_id, name), len(patch), free[b])
                sets[name] = (
                    f"no {len(patch)} tokens outside the object and its buffer"
                    if found is None
                    else found
                )
    sets["all"] = np.arange(count)
    return {
        name: found if isinstance(found, str) or len(found) else "no token"
        for name, found in sets.items()
    }


def add_ablation_arguments(parser):
    """Flags of both ablation scripts."""
    parser.add_argument(
        "--mean_tensor",
        default=None,
        help="mean vector (.pt) that replaces a token, see calculate_mean_vector.py",
    )
    parser.add_argument(
        "--replacement",
        choices=["mean", "zeros", "noise"],
        default="mean",
        help="what replaces a token",
    )
    parser.add_argument(
        "--zero_ablation", action="store_true", help="the same as --replacement zeros"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        default=list(SIZES),
        help="how many gradient and random tokens",
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="random and compact sets of each matched size"
    )
    parser.add_argument(
        "--gradient_steps", type=int, default=50, help="of integrated gradients; 0 leaves them out"
    )


# --- what a token is replaced by ------------------------------------------------------------------


def load_mean(path, width):
    """((d,) float32 mean vector, provenance dict or None) from a .pt file and the .json beside it.
    UsageError: unreadable, another width."""
    try:
        mean = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 -- pickle errors of every kind
        raise UsageError(
            f"--mean_tensor {path} cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    if not torch.is_tensor(mean) or mean.shape != (width,):
        raise UsageError(
            f"--mean_tensor {path}: a tensor of shape ({width},) was wanted, found"
            f" {tuple(getattr(mean, 'shape', ())) or type(mean).__name__}"
        )
    beside = Path(path).with_suffix(".json")
    try:
        provenance = json.loads(beside.read_text()) if beside.exists() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{beside} is not readable JSON ({error})") from error
    return mean.float(), provenance


def replacement_of(args, vlm):
    """(kind, mean vector or None, provenance) from the flags."""
    kind = "zeros" if args.zero_ablation else args.replacement
    if kind != "mean":
        return kind, None, None
    if args.mean_tensor is None:
        raise UsageError(
            "--mean_tensor is needed: make it with save_post_adapter_acts.py and"
            " calculate_mean_vector.py, or take --replacement zeros or noise"
        )
    mean, provenance = load_mean(args.mean_tensor, vlm.model.get_input_embeddings().weight.shape[1])
    if provenance is None:
        print(f"{args.mean_tensor}: provenance unknown (no .json beside it)")
    return kind, mean, provenance or "unknown"


def replacement(kind, mean, features, seed, item_id):
    """(P, d) values to put in place of a picture's vision tokens (features (P, d)). noise: normal,
    with the mean and deviation of each dimension over the picture's tokens, seeded by the item."""
    if kind == "mean":
        return mean.to(features).expand_as(features)
    if kind == "zeros":
        return torch.zeros_like(features)
    noise = rng_for(seed, item_id, "noise").standard_normal(tuple(features.shape), dtype=np.float32)
    return (
        features.float()
        .mean(0)
        .addcmul(torch.from_numpy(noise).to(features.device), features.float().std(0))
        .to(features)
    )


def beside(values, rows):
    """values (P, d) for the decoder's input with nothing for what is added in its first layers, as
    wide as rows (..., d) or (..., (1 + K) d)."""
    return torch.nn.functional.pad(values, (0, rows.shape[-1] - values.shape[-1]))


# --- running --------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """One prompt of one picture, ready to be continued: its batch (one row), image features and
    what the decoder gets of them (P, d) or (P, (1 + K) d), see capturing.entered, the decoder's
    inputs (1, T, d), keys and values, positions of its vision tokens.
    """

    batch: object
    features: object
    rows: torch.Tensor
    embeds: torch.Tensor
    cache: object
    vision: torch.Tensor
    logits: torch.Tensor  # (V,) float32, of the token after the prompt


@torch.no_grad()
def prepare(vlm, batch, features, shared=None):
    """A Prompt; shared: another Prompt whose tokens up to the end of the picture are the same, so
    that they are not computed again."""
    vision, rows, cache = batch.vision_positions(0), entered(vlm, features), None
    if shared is not None:
        same = int(vision[-1]) + 1
        if torch.equal(batch.input_ids[:, :same], shared.batch.input_ids[:, :same]):
            cache = first_positions(vlm, shared.cache, same)
    with entering(vlm, batch, rows) as embeds:
        output = prefill(vlm, batch, cache=cache, embeds=embeds)
    return Prompt(
        batch, features, rows, embeds, output.past_key_values, vision, output.logits[0, -1].float()
    )


def run(vlm, prompts, sets, values, per_pass, what):
    """Results of every condition: {condition: [result of each prompt]}.

    prompts: Prompts of one picture that share everything up to the end of the picture, in the order
    of `what`: for each a function (vlm, batch, **options for generate) -> Generation. sets
    {condition: token indices}; values (P, d) of the decoder's input; with deepstack a replaced
    token, like one of text, has nothing added in the first layers. Conditions are ordered by their
    first token and run `per_pass` at a time; what comes before the first of them is not computed
    again, and the picture's part serves all prompts.
    """
    lead, results = prompts[0], {}
    order = sorted(sets, key=lambda name: -int(sets[name].min()))
    for at in range(0, len(order), per_pass):
        names = order[at : at + per_pass]
        start = int(lead.vision[min(int(sets[name].min()) for name in names)])
        cache, rounds = first_positions(vlm, lead.cache, start, len(names)), []
        for prompt, ask in zip(prompts, what, strict=True):
            rows, batch = prompt.rows.repeat(len(names), 1, 1), prompt.batch.repeat(len(names))
            for row, name in enumerate(names):
                index = torch.from_numpy(sets[name]).to(rows.device)
                rows[row, index] = beside(values, rows)[index].to(rows)
            with entering(vlm, batch, rows.flatten(0, 1)) as embeds:
                found = ask(vlm, batch, embeds=embeds, cache=cache)
            rounds.append(found)
            cache = first_positions(vlm, found.cache, int(lead.vision[-1]) + 1)
        for row, name in enumerate(names):
            results[name] = [
                (found.ids[row], found.logprobs[row], found.first[row]) for found in rounds
            ]
    return results


def asking(limit):
    """Greedy decoding of at most `limit` tokens, for run()."""
    return lambda vlm, batch, **options: generate(vlm, batch, limit, **options)


def naming(ids):
    """The given ids after the prompt by teacher forcing, for run()."""
    return lambda vlm, batch, **options: generate(
        vlm, batch, len(ids), answers=[ids] * len(batch.samples), **options
    )


# --- integrated gradients -------------------------------------------------------------------------


def integrated_gradients(vlm, prompt, baseline, target, steps=50, per_pass=4, paper_compat=False):
    """Attribution of the logit of `target` after the prompt to its vision tokens, from baseline (P,
    d): (scores (P,) = sum over d of |attribution|, completeness = |sum of attributions - (logit -
    logit at the baseline)| / |that difference|).

    Midpoints of `steps` equal parts; paper_compat: both ends included, as published (whose target
    was the BOS id and whose span was one token too long; that is not reproduced). Sundararajan,
    Taly and Yan 2017, eq. 3; arXiv 2410.07149, section 2.7 of our study. Parameters are frozen, so
    no gradient of theirs is made."""
    start, high = int(prompt.vision[0]), prompt.rows
    low = beside(baseline, high).to(high)
    alphas = torch.linspace(0, 1, steps) if paper_compat else (torch.arange(steps) + 0.5) / steps

    def logit_at(points):
        """Logits of the target with the picture at low + alpha (high - low), (n,), and the points
        that carry the gradient."""
        batch = prompt.batch.repeat(len(points))
        here = (low + points.to(high)[:, None, None] * (high - low)).requires_grad_(
            torch.is_grad_enabled()
        )
        with entering(vlm, batch, here.flatten(0, 1)) as embeds:
            output = prefill(
                vlm,
                batch,
                cache=first_positions(vlm, prompt.cache, start, len(points)),
                embeds=embeds,
            )
        return output.logits[:, -1, target].float(), here

    total = torch.zeros(high.shape, dtype=torch.float32, device=high.device)
    for at in range(0, steps, per_pass):
        with torch.enable_grad():
            logits, here = logit_at(alphas[at : at + per_pass])
            total += torch.autograd.grad(logits.sum(), here)[0].float().sum(0)
    attribution = total / steps * (high - low).float()
    with torch.no_grad():
        gain = (prompt.logits[target] - logit_at(torch.zeros(1))[0][0]).item()
    error = abs(attribution.sum().item() - gain) / max(abs(gain), 1e-12)
    return attribution.abs().sum(-1).cpu().numpy(), error

"""Does what the tools assume of a model hold? A few short passes on a noise picture after loading;
each check fails in one clear line."""

from dataclasses import replace

import numpy as np
import torch

from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import Probe
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample

SIZE = (168, 126)
QUESTIONS = ("Is there a red circle in the image?", "Describe the image.")


def noise_picture(size=SIZE, seed=0):
    from PIL import Image

    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


class _Seen(Probe):
    """Which layers ran, in which order, by attention and by residual stream."""

    wants_hidden = True

    def __init__(self):
        self.layers, self.states = [], []

    def attention(self, layer, row):
        if self.step == 0:
            self.layers.append(layer)

    def hidden(self, index, states):
        if self.step == 0:
            self.states.append(index)


class _Keys(Probe):
    """The keys of each layer, prefill only."""

    def __init__(self):
        self.keys = {}

    def attention(self, layer, row):
        self.keys[layer] = row.key.float()


def exact(vlm):
    """Whether products are made in float32; int8 rounds what enters a layer too."""
    return vlm.dtype == torch.float32 and not getattr(vlm.model, "is_loaded_in_8bit", False)


@torch.inference_mode()
def check(vlm):
    """UsageError that names the first assumption which does not hold. Returns a line about vision
    tokens without a box, or None. A model without a file in models/ whose positions do not turn as
    most models' do loses "rotary"."""
    tolerance = 1e-4 if exact(vlm) else 3e-2
    picture = noise_picture()
    samples = [Sample(str(i), None, question) for i, question in enumerate(QUESTIONS)]
    batch = vlm.encode(samples, [picture, picture])

    def fail(what):
        raise UsageError(
            f"{vlm.path} ({vlm.family.name}): self-check failed: {what}; mend its file in models/"
            " or give --no_self_check"
        )

    answers = [[20, 21], [20, 21]]
    found = (
        _check_capture(vlm, batch, answers, tolerance, fail)
        if "decoder-only" in vlm.family.has
        else generate(vlm, batch, 2, answers=answers)
    )
    logits = prefill(vlm, batch).logits[:, -1].float()
    for i, sample in enumerate(samples):
        alone = prefill(vlm, vlm.encode([sample], [picture])).logits[:, -1].float()[0]
        difference = ((alone - logits[i]).abs().max() / alone.abs().max()).item()
        if difference > tolerance * 10:
            fail(
                "the logits of a left-padded batch differ from those of the prompt alone by"
                f" {difference:.1e} (relative)"
            )
    if not found.logprobs.isfinite().all():
        fail("log-probabilities are not finite")
    if {"rotary", "decoder-only"} <= vlm.family.has and not _turns(vlm, samples[0], picture):
        if vlm.family.name != "generic":
            fail("moving all positions does not turn the keys as the family's rotary says")
        vlm.family = replace(vlm.family, has=vlm.family.has - {"rotary"}, rotary=None)
    return _check_grid(vlm, batch, picture, fail)


def _turns(vlm, sample, picture, delta=7):
    """Whether moving all positions by delta turns the keys of every layer as Rotary.turn does."""
    if vlm.family.rotary is None or vlm.family.rotary(vlm) is None:
        return False
    batch, found = vlm.encode([sample], [picture]), []
    for moved in (0, delta):
        with capture(vlm, [probe := _Keys()]):
            prefill(vlm, replace(batch, position_ids=batch.position_ids + moved))
        found.append(probe.keys)
    tolerance = 1e-2 if exact(vlm) else 0.1
    return all(
        (vlm.rotary.turn(found[0][layer], delta) - keys).norm() < tolerance * keys.norm()
        for layer, keys in found[1].items()
    )


def _check_capture(vlm, batch, answers, tolerance, fail):
    """Decoder layers and captured attention; returns the Generation of the answers."""
    seen, worst = _Seen(), {}

    def compare(layer, row, value, output):
        rows, heads, _ = row.weights.shape
        weights = row.weights.view(rows, value.shape[1], heads // value.shape[1], -1)
        expected = (weights @ value.float()).flatten(1, 2)
        found = output[:, -1].float()
        worst[seen.step] = max(
            worst.get(seen.step, 0.0),
            ((expected - found).abs().max() / found.abs().max().clamp_min(1e-6)).item(),
        )

    with capture(vlm, [seen], inspect=compare):
        found = generate(vlm, batch, 2, answers=answers)
    count = len(vlm.parts.layers)
    alike = sum(type(module) is type(vlm.parts.layers[0]) for module in vlm.parts.decoder.modules())
    if alike != count:
        fail(f"{count} decoder layers found, but the decoder has {alike} layers of that class")
    if seen.states != list(range(count + 1)):
        fail(
            f"of {count} decoder layers found, those that run are"
            f" {[i - 1 for i in seen.states[1:]]}"
        )
    if seen.layers != list(range(count)):
        missing = sorted(set(range(count)) - set(seen.layers)) or seen.layers
        fail(
            f"attention of layers {missing} does not go through transformers' AttentionInterface"
            " once per pass"
        )
    for step, name in ((0, "prefill"), (1, "a cached step")):
        if worst[step] > tolerance:
            fail(
                f"captured attention times V differs from the attention output at {name} by"
                f" {worst[step]:.1e} (relative; allowed {tolerance:.0e})"
            )
    return found


def _check_grid(vlm, batch, picture, fail):
    grid = batch.grids[0]
    if grid is None:
        return None
    boxed, tokens = grid.has_box, int((batch.groups[0] == GROUPS.index("vision")).sum())
    if len(boxed) != tokens:
        fail(f"{tokens} vision tokens, but a grid of {len(boxed)}")
    changed, chosen = [], []
    low, high = grid.boxes[:, :2], grid.boxes[:, 2:]
    area = (high - low).prod(-1)
    for cell in boxed.nonzero()[0][:: max(1, int(boxed.sum()) // 9)].tolist():
        x0, y0, x1, y1 = (round(v) for v in grid.boxes[cell])
        x0, y0, x1, y1 = max(0, x0), max(0, y0), min(picture.width, x1), min(picture.height, y1)
        if x1 > x0 and y1 > y0:  # else padding
            chosen.append(cell)
            changed.append(picture.copy())
            changed[-1].paste((255, 0, 0), (x0, y0, x1, y1))
    plain = vlm.vision(batch).pooler_output[0].float()
    others = vlm.vision(vlm.encode([batch.samples[0]] * len(changed), changed)).pooler_output

    def is_hit(
        other, cell
    ):  # among boxes of about its size, for a thumbnail's box lies over many of a tile's; one that is mostly the same place counts
        alike = torch.from_numpy(boxed & (area > area[cell] / 2) & (area < area[cell] * 2)).to(
            plain.device
        )
        most = int((other.float() - plain).norm(dim=-1).masked_fill(~alike, -1).argmax())
        shared = (
            (np.minimum(high[most], high[cell]) - np.maximum(low[most], low[cell])).clip(0).prod()
        )
        return most == cell or shared > 0.5 * area[cell]

    hits = [is_hit(other, cell) for other, cell in zip(others, chosen, strict=True)]
    if sum(hits) * 2 <= len(hits):
        fail(
            "changing the pixels of a cell does not change most the vision token that the grid"
            " gives it"
        )
    without = int((~boxed).sum())
    return f"{without} of {tokens} vision tokens have no box of their own" if without else None

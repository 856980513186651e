"""What a capture measures: group mass, norms and states of the residual stream, the RoPE probe,
attention to the picture."""

import torch

from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS, PAD, VISION


class Probe:
    """What a capture calls; a probe overrides what it needs. step counts forward passes: 0 is the
    prefill."""

    wants_hidden = False
    step = -1

    def begin(self):
        self.step += 1

    def attention(self, layer, row):
        pass

    def hidden(self, index, states):
        pass

    def end(self):
        pass


def group_columns(groups, length):
    """One-hot groups of the keys (B, length, G) float32; positions after the prompt are generated
    tokens, padding is in no group."""
    codes = torch.nn.functional.pad(
        groups, (0, length - groups.shape[1]), value=GROUPS.index("generated")
    )
    return (
        torch.nn.functional.one_hot(codes.clamp(min=0), len(GROUPS)).float()
        * (codes != PAD)[..., None]
    )


class GroupMass(Probe):
    """Attention mass of each token group in the last row of every pass. mass: a list over steps of
    (L, B, H, G) float32; sums to 1 over G."""

    def __init__(self, batch, max_new_tokens=0):
        self.columns = group_columns(batch.groups, batch.groups.shape[1] + max_new_tokens)
        self.mass = []

    def begin(self):
        super().begin()
        self.layers = {}

    def attention(self, layer, row):
        self.layers[layer] = (
            row.weights @ self.columns[:, : row.key.shape[2]].to(row.key.device)
        ).to(self.columns.device)

    def end(self):
        self.mass.append(torch.stack([self.layers[layer] for layer in sorted(self.layers)]))


class HiddenNorms(Probe):
    """L2 norms of the residual stream at every prompt position, prefill only. norms (B, L + 1, T)
    float32: index 0 the embeddings, l + 1 the output of layer l before the final norm; final: a
    norm to apply to the last one, as Hugging Face's hidden_states do. Beyond Semantics, section 2.3
    of our study; rms = l2 / sqrt(d)."""

    wants_hidden = True

    def __init__(self, kind="l2", final=None, num_layers=None):
        self.kind, self.final, self.num_layers, self._states = kind, final, num_layers, {}

    def hidden(self, index, states):
        if self.step == 0:
            if self.final is not None and index == self.num_layers:
                states = self.final(states)
            norm = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
            norm = norm.to(self._states[0].device) if self._states else norm
            self._states[index] = norm / states.shape[-1] ** 0.5 if self.kind == "rms" else norm

    @property
    def norms(self):
        return torch.stack([self._states[index] for index in sorted(self._states)], 1)


class HiddenStates(Probe):
    """The residual stream at every prompt position, prefill only: states[index] (B, T, d) as the
    model computes it, index 0 the embeddings, l + 1 the output of layer l before the final norm.
    keep(index) -> whether an index is wanted (default: all)."""

    wants_hidden = True

    def __init__(self, keep=lambda index: True):
        self.keep, self.states = keep, {}

    def hidden(self, index, states):
        if self.step == 0 and self.keep(index):
            self.states[index] = states


class LastStates(Probe):
    """The residual stream at the last prompt position after chosen layers: states (B, layers, d) as
    the model computes it, prefill only."""

    wants_hidden = True

    def __init__(self, layers):
        self.layers, self._found = list(layers), {}

    def hidden(self, index, states):
        if self.step == 0 and index - 1 in self.layers:
            self._found[index - 1] = states[:, -1]

    @property
    def states(self):
        device = self._found[self.layers[0]].device
        return torch.stack([self._found[layer].to(device) for layer in self.layers], 1)


class RopeShift(Probe):
    """How the last prompt row reacts when all vision tokens move `delta` positions towards it; each
    layer alone, nothing propagates.

    q . R(delta) k = R(-delta) q . k, so one more row of scores per delta suffices. Gives (L, B, H)
    float32 tensors: alphaV, share_prod_notV, and with a leading axis over deltas delta_gv = sum_v
    alpha_v / alphaV (z'_v - z_v) / delta and delta_alphaV = alphaV' - alphaV; and
    delta_gv_derivative, the limit of delta_gv. NaN where alphaV is 0. keep (B, K) bool: keys that
    count (default all; the paper's --restrict_to_past leaves out the row's own key). Beyond
    Semantics, section 2.6 of our study."""

    def __init__(self, batch, rotary, deltas, restrict_to_past=False):
        self.rotary, self.deltas, self.restrict = rotary, list(deltas), restrict_to_past
        self.vision = batch.groups == VISION
        self._found = {}

    def attention(self, layer, row):
        if self.step > 0:
            return
        if row.softcap is not None:
            raise UsageError(
                "the closed form of the RoPE probe does not hold for softcapped scores"
            )
        scores, plain = row.scores, row.dot(row.query)
        if self.restrict:
            scores = scores.clone()
            scores[..., -1] = float("-inf")
        weights = scores.softmax(-1)
        vision = self.vision[:, None].to(weights.device)
        alpha = (weights * vision).sum(-1)
        inside = weights * vision / alpha[..., None]

        def mean_over_vision(change):
            return (inside * change).nan_to_num().sum(-1).where(alpha > 0, float("nan"))

        found = {
            "alphaV": alpha,
            "share_prod_notV": alpha * (1 - alpha),
            "delta_gv": [],
            "delta_alphaV": [],
        }
        for delta in self.deltas:
            change = row.dot(self.rotary.turn(row.query, -delta)) - plain
            found["delta_gv"].append(
                mean_over_vision(change) / delta if delta else torch.zeros_like(alpha)
            )
            found["delta_alphaV"].append(
                ((scores + change * vision).softmax(-1) * vision).sum(-1) - alpha
            )
        found["delta_gv"], found["delta_alphaV"] = (
            torch.stack(found["delta_gv"]),
            torch.stack(found["delta_alphaV"]),
        )
        found["delta_gv_derivative"] = mean_over_vision(-row.dot(self.rotary.rate(row.query)))
        self._found[layer] = {name: value.to(self.vision.device) for name, value in found.items()}

    def __getitem__(self, name):
        """alphaV, share_prod_notV, delta_gv_derivative: (L, B, H); delta_gv, delta_alphaV: (deltas,
        L, B, H)."""
        values = [self._found[layer][name] for layer in sorted(self._found)]
        return torch.stack(values, 1 if values[0].ndim == 3 else 0)


class VisionRows(Probe):
    """Attention of each step's row to every vision token, averaged over heads and layers after BOS
    is left out and the rest renormalised per layer.

    rows: a list over steps of (B, T) float32 over the padded prompt, 0 off the vision tokens.
    Beyond Semantics, section 2.7 of our study.
    """

    def __init__(self, batch, num_layers):
        self.bos, self.vision, self.num_layers = (
            batch.groups == GROUPS.index("bos"),
            batch.groups == VISION,
            num_layers,
        )
        self.rows = []

    def begin(self):
        super().begin()
        self.sum = 0

    def attention(self, layer, row):
        mean = row.weights.mean(1).to(self.bos.device)
        prompt = mean[:, : self.bos.shape[1]]
        rest = (prompt * ~self.bos).sum(-1, keepdim=True) + mean[:, self.bos.shape[1] :].sum(
            -1, keepdim=True
        )  # not 1 - bos, which loses its digits
        self.sum = self.sum + prompt * self.vision / rest

    def end(self):
        self.rows.append(self.sum / self.num_layers)


class ImageAttention(Probe):
    """Attention of each step's row to every vision token, reduced layer by layer: the k largest
    over layers of each head and token (a running top-k, equal to that over all layers at once), and
    mean and maximum over layers and heads. Volcano (arXiv 2311.07362), sections 2.2 and 2.3 of our
    study.

    Lists over steps: topk (k, B, H, P) largest first, mean and largest (B, P), float32 on the
    model's device; P: most vision tokens of a row, 0 past a row's own. whole=True: the whole (L, B,
    H, P) too, in `layers`."""

    def __init__(self, batch, k, whole=False):
        vision, size = batch.groups == VISION, len(batch.groups)
        count = int(vision.sum(1).max())
        self.index = torch.full((size, count), -1, device=vision.device)
        for row in range(size):
            own = vision[row].nonzero()[:, 0]
            self.index[row, : len(own)] = own
        self.k, self.whole, self.topk, self.mean, self.largest, self.layers = (
            k,
            whole,
            [],
            [],
            [],
            [],
        )

    def begin(self):
        super().begin()
        self._top, self._sum, self._max, self._all = None, 0, None, {}

    def attention(self, layer, row):
        index = self.index.to(row.key.device)
        here = row.weights.gather(
            -1, index.clamp(min=0)[:, None].expand(-1, row.weights.shape[1], -1)
        ).masked_fill((index < 0)[:, None], 0)
        here = here.to(self.index.device)
        self._top = here[None] if self._top is None else torch.cat([self._top, here[None]])
        if len(self._top) > self.k:
            self._top = self._top.topk(self.k, 0).values
        self._sum = self._sum + here.mean(1)
        self._max = here.amax(1) if self._max is None else torch.maximum(self._max, here.amax(1))
        self.seen = getattr(self, "seen", 0) + (self.step == 0)
        if self.whole:
            self._all[layer] = here

    def end(self):
        if len(self._top) < self.k:
            raise UsageError(f"the {self.k} largest of {len(self._top)} layers were asked for")
        self.topk.append(self._top.sort(0, descending=True).values)
        self.mean.append(self._sum / self.seen)
        self.largest.append(self._max)
        if self.whole:
            self.layers.append(torch.stack([self._all[layer] for layer in sorted(self._all)]))

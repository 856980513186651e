"""What a capture measures: attention mass of token groups, norms and states of the residual stream,
the RoPE probe, attention to the picture.

A probe is written once and given to capture():

    class Entropy(Probe):
        def attention(self, layer, row):
            self.sums[layer] = -(row.weights * row.weights.clamp_min(1e-20).log()).sum(-1)

Shapes: B rows of a batch, L layers, H heads, K keys, T prompt length with padding, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS, PAD, VISION

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from vlmdiag.batch import Batch
    from vlmdiag.families import Rotary
    from vlmdiag.model.attention import Row


class Probe:
    """What a capture calls; a probe overrides what it needs. step counts forward passes, of which
    0 is the prefill; one over several of an answer's tokens is told as one for each. wants_hidden:
    whether hidden() is called; "index": also where the layers carry more than one residual stream,
    and then of passes as they are made."""

    wants_hidden: bool | str = False
    step = -1
    num_layers: int  # of the decoder, set by capture()

    def begin(self) -> None:
        """A forward pass of the decoder begins."""
        self.step += 1

    def attention(self, layer: int, row: Row) -> None:
        """The last query row of a layer, once per layer and pass."""

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        """The residual stream: index 0 is the embeddings, l + 1 the output of layer l."""

    def end(self) -> None:
        """The forward pass is over."""


def every_layer(of_layer: Mapping[int, Tensor], num_layers: int, dim: int = 0) -> Tensor:
    """One tensor per layer stacked along `dim`, so that each has its own number; NaN in layers that
    do not attend, and for heads that a layer lacks and others have. UsageError where none attends.
    """
    if not of_layer:
        raise UsageError("no layer of the decoder attends")
    shapes = [tensor.shape for tensor in of_layer.values()]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    nothing = next(iter(of_layer.values())).new_full(largest, float("nan"))

    def whole(tensor: Tensor) -> Tensor:
        if tensor.shape == nothing.shape:
            return tensor
        filled = nothing.clone()
        filled[tuple(slice(size) for size in tensor.shape)] = tensor
        return filled

    layers = [whole(of_layer.get(layer, nothing)) for layer in range(num_layers)]
    return torch.stack(layers, dim)


def group_columns(groups: Int[Tensor, "B T"], length: int) -> Float[Tensor, "B length G"]:
    """One-hot groups of the keys; positions after the prompt are generated tokens, padding is in no
    group."""
    grown = (0, length - groups.shape[1])
    codes = nn.functional.pad(groups, grown, value=GROUPS.index("generated"))
    one_hot = nn.functional.one_hot(codes.clamp(min=0), len(GROUPS)).float()
    return one_hot * (codes != PAD)[..., None]


class GroupMass(Probe):
    """Attention mass of each token group in the last row of every pass.

    mass: a list over steps of (L, B, H, G) float32 that sums to 1 over G, with attention sinks to
    less; NaN in layers that do not attend.
    """

    def __init__(self, batch: Batch, max_new_tokens: int = 0) -> None:
        self.columns = group_columns(batch.groups, batch.groups.shape[1] + max_new_tokens)
        self.mass: list[Float[Tensor, "L B H G"]] = []
        self._of_layer: dict[int, Tensor] = {}

    def begin(self) -> None:
        super().begin()
        self._of_layer = {}

    def attention(self, layer: int, row: Row) -> None:
        columns = self.columns[:, : row.key.shape[2]].to(row.key.device)
        self._of_layer[layer] = (row.weights @ columns).to(self.columns.device)

    def end(self) -> None:
        self.mass.append(every_layer(self._of_layer, self.num_layers))


class ChatMass(GroupMass):
    """The same of each picture's vision tokens, and of each group in each turn, for batches of
    chats.

    pictures: K, most pictures of a row; turns: S, most turns of a row and 2, what is before the
    first turn and the answer, as in Batch.parts(). mass: a list over steps of (L, B, H, K + S G).
    """

    def __init__(self, batch: Batch, max_new_tokens: int = 0) -> None:
        super().__init__(batch, max_new_tokens)
        chats = [sample.chat for sample in batch.samples]
        answers = [1 if chat is None else len(chat.turns) for chat in chats]
        assert batch.numbers is not None and batch.turns is not None
        device = batch.groups.device
        in_picture = batch.numbers.where(batch.groups == VISION, -1)
        turns = nn.functional.pad(batch.turns, (0, max_new_tokens))
        turns[:, batch.groups.shape[1] :] = torch.tensor(answers, device=device)[:, None]
        self.pictures = int(in_picture.max()) + 1
        self.turns = max(answers) + 2
        by_turn = nn.functional.one_hot(turns + 1, self.turns).float()
        numbers = nn.functional.pad(in_picture, (0, max_new_tokens), value=-1)
        by_picture = nn.functional.one_hot(numbers + 1, self.pictures + 1)[..., 1:].float()
        # (B, length, S, G); padding is in no group
        by_both = by_turn[..., None] * self.columns[..., None, :]
        self.columns = torch.cat([by_picture, by_both.flatten(2)], -1)

    def split(self) -> tuple[Float[Tensor, "N L B H K"], Float[Tensor, "N L B H S G"]]:
        """Mass of the pictures, and of the groups in the turns, of all steps."""
        mass = torch.stack(self.mass)
        return (
            mass[..., : self.pictures],
            mass[..., self.pictures :].unflatten(-1, (self.turns, len(GROUPS))),
        )


class HiddenNorms(Probe):
    """L2 norms of the residual stream at every prompt position, prefill only; rms = l2 / sqrt(d).

    norms: index 0 the embeddings, l + 1 the output of layer l before the final norm. final: a norm
    to apply to the last one, as Hugging Face's hidden_states do. Beyond
    Semantics, docs/studies/beyond_semantics.md, section 2.3.
    """

    wants_hidden = True

    def __init__(self, kind: str = "l2", final: nn.Module | None = None) -> None:
        self.kind = kind
        self.final = final
        self._of_index: dict[int, Tensor] = {}

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        if self.step > 0:
            return
        if self.final is not None and index == self.num_layers:
            states = self.final(states)
        norm = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
        if self._of_index:  # on several devices: where the embeddings are
            norm = norm.to(self._of_index[0].device)
        if self.kind == "rms":
            norm = norm / states.shape[-1] ** 0.5
        self._of_index[index] = norm

    @property
    def norms(self) -> Float[Tensor, "B L+1 T"]:
        """Norms of all prompt positions, float32."""
        return torch.stack([self._of_index[index] for index in sorted(self._of_index)], 1)


class HiddenStates(Probe):
    """The residual stream at every prompt position, prefill only.

    states[index]: (B, T, d) as the model computes it, index 0 the embeddings, l + 1 the output of
    layer l before the final norm. keep(index): whether an index is wanted, by default all.
    """

    wants_hidden = True

    def __init__(self, keep: Callable[[int], bool] | None = None) -> None:
        self.keep = keep
        self.states: dict[int, Float[Tensor, "B T d"]] = {}

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        if self.step == 0 and (self.keep is None or self.keep(index)):
            self.states[index] = states


class LastStates(Probe):
    """The residual stream at the last prompt position after chosen layers, prefill only."""

    wants_hidden = True

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self._after_layer: dict[int, Tensor] = {}

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        if self.step == 0 and index - 1 in self.layers:
            # a copy: a view would hold the states of all positions
            self._after_layer[index - 1] = states[:, -1].clone()

    @property
    def states(self) -> Float[Tensor, "B layers d"]:
        """As the model computes them, in the order of `layers`."""
        device = self._after_layer[self.layers[0]].device
        return torch.stack([self._after_layer[layer].to(device) for layer in self.layers], 1)


class RopeShift(Probe):
    """How the last prompt row reacts when all vision tokens move `delta` positions towards it; each
    layer alone, nothing propagates.

    q . R(delta) k = R(-delta) q . k, so one more row of scores per delta suffices. Gives
    (L, B, H) float32: alphaV, share_prod_notV = alphaV (1 - alphaV), and with a leading axis over
    deltas

        delta_gv     = sum_v alpha_v / alphaV (z'_v - z_v) / delta
        delta_alphaV = alphaV' - alphaV

    and delta_gv_derivative, the limit of delta_gv for delta -> 0. NaN where alphaV is 0.
    restrict_to_past leaves out the row's own key, as the paper's flag does. UsageError for
    softcapped scores, for which the closed form does not hold. Beyond Semantics,
    docs/studies/beyond_semantics.md, section 2.6.
    """

    def __init__(
        self,
        batch: Batch,
        rotary: Mapping[int, Rotary],
        deltas: Sequence[float],
        restrict_to_past: bool = False,
    ) -> None:
        self.rotary = rotary
        self.deltas = list(deltas)
        self.restrict_to_past = restrict_to_past
        self.vision: Bool[Tensor, "B T"] = batch.groups == VISION
        self._of_layer: dict[int, dict[str, Tensor]] = {}

    def attention(self, layer: int, row: Row) -> None:
        if self.step > 0:
            return
        if row.softcap is not None:
            raise UsageError(
                "the closed form of the RoPE probe does not hold for softcapped scores"
            )
        rotary = self.rotary[layer]
        z, products = row.scores, row.dot(row.query)  # (B, H, K)
        if self.restrict_to_past:
            z = z.clone()
            z[..., -1] = float("-inf")
        alpha = row.softmax(z)
        vision = self.vision[:, None].to(alpha.device)
        alpha_v = (alpha * vision).sum(-1)  # (B, H)
        within = alpha * vision / alpha_v[..., None]  # alpha_v / alphaV of each vision token

        def mean_over_vision(change: Tensor) -> Tensor:
            return (within * change).nan_to_num().sum(-1).where(alpha_v > 0, float("nan"))

        delta_gv, delta_alpha = [], []
        for delta in self.deltas:
            change = row.dot(rotary.turn(row.query, -delta)) - products  # z' - z
            no_shift = torch.zeros_like(alpha_v)
            delta_gv.append(mean_over_vision(change) / delta if delta else no_shift)
            shifted = row.softmax(z + change * vision)
            delta_alpha.append((shifted * vision).sum(-1) - alpha_v)
        rate = mean_over_vision(-row.dot(rotary.rate(row.query)))
        measured = {
            "alphaV": alpha_v,
            "share_prod_notV": alpha_v * (1 - alpha_v),
            "delta_gv": torch.stack(delta_gv),
            "delta_alphaV": torch.stack(delta_alpha),
            "delta_gv_derivative": rate,
        }
        device = self.vision.device
        self._of_layer[layer] = {name: value.to(device) for name, value in measured.items()}

    def __getitem__(self, name: str) -> Float[Tensor, "... L B H"]:
        """alphaV, share_prod_notV, delta_gv_derivative: (L, B, H); delta_gv, delta_alphaV: (deltas,
        L, B, H). NaN in layers that do not attend."""
        of_layer = {layer: measured[name] for layer, measured in self._of_layer.items()}
        dim = 1 if name in ("delta_gv", "delta_alphaV") else 0
        return every_layer(of_layer, self.num_layers, dim)


class VisionRows(Probe):
    """Attention of each step's row to every vision token, averaged over heads and the layers that
    attend after BOS is left out and the rest renormalised per layer.

    rows: a list over steps of (B, T) float32 over the padded prompt, 0 off the vision tokens.
    Beyond Semantics, docs/studies/beyond_semantics.md, section 2.7.
    """

    def __init__(self, batch: Batch) -> None:
        self.bos: Bool[Tensor, "B T"] = batch.groups == GROUPS.index("bos")
        self.vision: Bool[Tensor, "B T"] = batch.groups == VISION
        self.rows: list[Float[Tensor, "B T"]] = []
        self._sum = torch.zeros(())
        self._layers_seen = 0

    def begin(self) -> None:
        super().begin()
        self._sum = torch.zeros((), device=self.bos.device)
        self._layers_seen = 0

    def attention(self, layer: int, row: Row) -> None:
        mean = row.weights.mean(1).to(self.bos.device)  # (B, K)
        prompt_length = self.bos.shape[1]
        prompt = mean[:, :prompt_length]
        # summed, because 1 - alpha_bos would lose the digits of what is left
        prompt_rest = (prompt * ~self.bos).sum(-1, keepdim=True)
        rest = prompt_rest + mean[:, prompt_length:].sum(-1, keepdim=True)
        self._sum = self._sum + prompt * self.vision / rest
        self._layers_seen += 1

    def end(self) -> None:
        self.rows.append(self._sum / self._layers_seen)


class ImageAttention(Probe):
    """Attention of each step's row to every vision token, reduced layer by layer: the k largest
    over layers of each head and token, and mean and maximum over layers and heads.

    A running top-k equals that over all layers at once. Lists over steps: topk (k, B, H, P) largest
    first, mean and largest (B, P), float32 on the model's device; P: most vision tokens of a row, 0
    past a row's own. whole=True: the whole (L, B, H, P) too, in `layers`, NaN in layers that do not
    attend. UsageError where k exceeds the layers that do. Volcano (arXiv 2311.07362),
    docs/studies/volcano.md, sections 2.2 and 2.3.
    """

    def __init__(self, batch: Batch, k: int, whole: bool = False) -> None:
        vision = batch.groups == VISION
        self.k = k
        self.whole = whole
        self.topk: list[Float[Tensor, "k B H P"]] = []
        self.mean: list[Float[Tensor, "B P"]] = []
        self.largest: list[Float[Tensor, "B P"]] = []
        self.layers: list[Float[Tensor, "L B H P"]] = []
        # positions of each row's vision tokens, -1 past its own
        self.index = torch.full(
            (len(vision), int(vision.sum(1).max())), -1, device=vision.device, dtype=torch.long
        )
        for row, in_picture in enumerate(vision):
            positions = in_picture.nonzero()[:, 0]
            self.index[row, : len(positions)] = positions
        self._reset()

    def _reset(self) -> None:
        self._top: Tensor | None = None
        self._sum = torch.zeros((), device=self.index.device)
        self._max: Tensor | None = None
        self._of_layer: dict[int, Tensor] = {}
        self._layers_seen = 0

    def begin(self) -> None:
        super().begin()
        self._reset()

    def attention(self, layer: int, row: Row) -> None:
        index = self.index.to(row.key.device)
        wanted = index.clamp(min=0)[:, None].expand(-1, row.weights.shape[1], -1)
        to_picture = row.weights.gather(-1, wanted).masked_fill((index < 0)[:, None], 0)
        to_picture = to_picture.to(self.index.device)  # (B, H, P)
        top = to_picture[None]
        if self._top is not None:
            if self._top.shape[2] != top.shape[2]:
                raise UsageError(
                    f"layers have different numbers of heads ({self._top.shape[2]},"
                    f" {top.shape[2]}), and this measure compares each head over layers"
                )
            top = torch.cat([self._top, top])
        self._top = top.topk(self.k, 0).values if len(top) > self.k else top
        self._sum = self._sum + to_picture.mean(1)
        largest = to_picture.amax(1)
        self._max = largest if self._max is None else torch.maximum(self._max, largest)
        self._layers_seen += 1
        if self.whole:
            self._of_layer[layer] = to_picture

    def end(self) -> None:
        if self._top is None or self._max is None or len(self._top) < self.k:
            count = 0 if self._top is None else len(self._top)
            raise UsageError(f"the {self.k} largest of {count} layers were asked for")
        self.topk.append(self._top.sort(0, descending=True).values)
        self.mean.append(self._sum / self._layers_seen)
        self.largest.append(self._max)
        if self.whole:
            self.layers.append(every_layer(self._of_layer, self.num_layers))

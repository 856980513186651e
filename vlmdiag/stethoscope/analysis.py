"""What the stethoscope shows of one picture and question, without any page: each part is computed
when it is first asked for, once, and kept.

    model = Model(load_model("checkpoints/tiny-llava"))
    analysis = Analysis(model, picture, "Describe the image.")
    for text in analysis.answer(): print(text)
    analysis.evolution().probs[3]         # the fourth token's likeliest ids after every layer
    for done in analysis.relevancy_steps(): print(f"{done:.0%}")
    analysis.contribution("max", "share")[3]

One lock per model surrounds every pass and is given free between the tokens' chunks, so several
people wait for each other but never see each other's state: what belongs to a person is in a
Session (sessions.py). LVLM-Stethoscope (docs/studies/stethoscope.md, section 1), with its defects
of section 5.3 left out.

Shapes: T tokens of the answer, L layers, H heads, P vision tokens, N positions of prompt and
answer, S cells of a map over the picture.
"""

from __future__ import annotations

import io
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from vlmdiag.answers import token_spans
from vlmdiag.beyond_semantics.balance import chance_vision_share, user_text
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.limits import context_of
from vlmdiag.model.probes import Probe
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.relevancy import methods, rules
from vlmdiag.relevancy.gradients import trace
from vlmdiag.stethoscope.limits import FILE_LIMIT, PIXEL_LIMIT, QUESTION_LIMIT, TOKEN_LIMIT
from vlmdiag.stethoscope.warning_signals import warnings_for
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from PIL.Image import Image

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.relevancy.gradients import Trace
    from vlmdiag.relevancy.methods import Relevancy
    from vlmdiag.types import VLM

CHUNK = 8  # tokens between two signs of progress
TOP = 10  # alternatives that are kept
ATTENTION_BUDGET = 64 * 2**20  # bytes of raw attention that an analysis keeps
ROWS_BUDGET = 512 * 2**20  # bytes of relevancy that an analysis keeps
TEXT = ("user", "generated")

Made = TypeVar("Made")
Nested = Any  # tensors, or tuples, lists and dictionaries of them


@dataclass(frozen=True)
class Decoding:
    """How an answer is made. Sampling noise depends on (seed, step) only."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


class Model:
    """A loaded VLM, the lock around its passes, and its path from hidden states to words.

    calibration: of hallucination_warning.py fit; to_calibrate: what to do where there is none.
    UsageError for models that are not decoder-only.
    """

    def __init__(self, vlm: VLM, calibration: Record | None = None, to_calibrate: str = "") -> None:
        vlm.need("decoder-only", "every-layer")
        self.vlm = vlm
        self.calibration = calibration
        self.to_calibrate = to_calibrate
        self.lock = threading.RLock()
        self.lens = Lens(vlm)
        text_config = vlm.model.config.get_text_config()
        self.depth = len(vlm.parts.layers)
        self.heads: int = text_config.num_attention_heads
        self.context = context_of(vlm.model.config)


# ---- a part of the model on another device ----


def part_on_cpu(vlm: VLM) -> bool:
    """Run vision tower and connector on the CPU in float32 and the rest where it is:
    `--part-on-cpu`. Returns whether anything moved."""
    if vlm.device.type == "cpu":
        return False
    modules = [vlm.parts.tower, vlm.parts.connector]
    compute_on(modules, torch.device("cpu"), torch.float32, vlm.device, vlm.dtype)
    return True


def compute_on(
    modules: Sequence[nn.Module | None],
    there: torch.device,
    exact: torch.dtype,
    home: torch.device,
    dtype: torch.dtype,
) -> None:
    """Move modules to a device and floating type; what goes into them follows, what comes out goes
    home."""

    def follow(module: nn.Module, args: Nested, options: Nested) -> tuple[Nested, Nested]:
        return sent(args, there, exact), sent(options, there, exact)

    def go_home(module: nn.Module, args: Nested, output: Nested) -> Nested:
        return sent(output, home, dtype)

    named = [module for module in modules if module is not None]
    for module in named:
        if not any(_is_inside(module, other) for other in named):
            module.to(there, exact)
            module.register_forward_pre_hook(follow, with_kwargs=True, prepend=True)
            module.register_forward_hook(go_home)


def _is_inside(module: nn.Module, other: nn.Module) -> bool:
    return module is not other and any(module is inner for inner in other.modules())


def sent(value: Nested, device: torch.device, dtype: torch.dtype) -> Nested:
    """Tensors on a device, those of floating type in the given one; containers of them alike."""
    if torch.is_tensor(value):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):  # ModelOutput is one
        return type(value)(**{name: sent(entry, device, dtype) for name, entry in value.items()})
    if type(value) in (tuple, list):
        return type(value)(sent(entry, device, dtype) for entry in value)
    return value


# ---- what is read and kept ----


def read_picture(path: str | Path) -> Image:
    """An uploaded picture, upright RGB; UsageError in one line where it is too large or none."""
    from PIL import Image

    path = Path(path)
    if path.stat().st_size > FILE_LIMIT:
        raise UsageError(
            f"the file has {path.stat().st_size / 2**20:.0f} MiB, at most {FILE_LIMIT / 2**20:.0f}"
            " MiB are read"
        )
    content = io.BytesIO(path.read_bytes())
    try:
        with Image.open(content) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise UsageError(
                    f"the picture has {image.width} x {image.height} pixels, at most"
                    f" {PIXEL_LIMIT // 10**6} million are read"
                )
        return load_image(content)
    except ValueError as error:
        raise UsageError(f"the {error}") from error
    except (OSError, SyntaxError) as error:
        raise UsageError(
            "this file is not a readable picture (PNG, JPEG, WebP, BMP, GIF and TIFF are)"
        ) from error


class ProducingStates(Probe):
    """The residual stream of some positions of one prompt: states[index] (T, d), index 0 the
    embeddings, l + 1 after layer l, before the final norm."""

    wants_hidden = True

    def __init__(self, rows: Int[Tensor, " T"]) -> None:
        self.rows = rows
        self.states: dict[int, Float[Tensor, "T d"]] = {}

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        self.states[index] = states[0, self.rows.to(states.device)]


@dataclass
class Evolution:
    """The lens at the producing rows of the tokens, after the embeddings (0) and after layer l
    (l + 1), the final norm applied once everywhere. The last entry is the model's own distribution,
    before temperature and top-p."""

    ids: Int[np.ndarray, "T states k"]  # likeliest ids
    probs: Float[np.ndarray, "T states k"]  # their probabilities
    chosen: Float[np.ndarray, "T states"]  # probability of the token that was produced
    rank: Int[np.ndarray, "T states"]  # its rank, 1 = likeliest
    entropy: Float[np.ndarray, "T states"]  # of the distribution over the vocabulary, in bits
    words: dict[int, str]  # text of every id


@dataclass
class Heads:
    """How much each head looks at the picture while it produces each token.

    mass: attention on all vision tokens, of 1. balance: CMB, mass / (mass + attention on the
    question's tokens), NaN where a head looks at neither; chance: the balance of even attention
    (vlmdiag/beyond_semantics/balance.py).
    """

    mass: Float[np.ndarray, "T L H"]
    balance: Float[np.ndarray, "T L H"]
    chance: float


class Analysis:
    """One picture and question. What the answer consists of stands once answer() is through."""

    # set by answer()
    text: str
    spans: list[tuple[int, int]]  # characters of each token in the text
    tokens: list[str]
    labels: list[str]  # text of each position of prompt and answer
    groups: np.ndarray  # (N,) names of the positions' groups
    vision: Int[np.ndarray, " P"]  # positions of the vision tokens
    producing: Int[np.ndarray, " T"]  # positions that produced the tokens
    probabilities: Float[np.ndarray, " T"]

    def __init__(
        self, model: Model, picture: Image, question: str, decoding: Decoding | None = None
    ) -> None:
        question = question.strip()
        if not question:
            raise UsageError("type a question first")
        if len(question) > QUESTION_LIMIT:
            raise UsageError(
                f"the question has {len(question)} characters, at most {QUESTION_LIMIT} are read"
            )
        self.model = model
        self.picture = picture
        self.question = question
        self.decoding = decoding or Decoding()
        if not 1 <= self.decoding.max_new_tokens <= TOKEN_LIMIT:
            raise UsageError(
                f"{self.decoding.max_new_tokens} tokens: 1 to {TOKEN_LIMIT} can be generated"
            )
        self.ids: list[int] | None = None  # of the answer
        self.patches: set[int] = set()  # the picture's patches that are selected now
        self._parts: dict[Any, Any] = {}
        self._attention: OrderedDict[int, Float[np.ndarray, "T H P"]] = OrderedDict()
        self._guard = threading.RLock()
        self._work: tuple[Trace, list[Relevancy]] | None = None
        try:
            with model.lock:
                sample = Sample("0", Path("picture.png"), question)
                self.batch = model.vlm.encode([sample], [picture])
        except ValueError as error:  # a prompt or picture that the model does not take
            raise UsageError(str(error)) from error
        self.prompt_length = self.batch.input_ids.shape[1]

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """make() for the first caller of a key, what it gave for all others."""
        if key not in self._parts:  # what is there is read without waiting for what is being made
            with self._guard:
                if key not in self._parts:
                    self._parts[key] = make()
        return cast(Made, self._parts[key])

    # ---- the answer ----

    @property
    def answer_ids(self) -> list[int]:
        """Ids of the answer; ValueError before answer() is through."""
        if self.ids is None:
            raise ValueError("there is no answer yet")
        return self.ids

    @property
    def limit(self) -> int:
        """Tokens that fit: as many as the decoding allows and the model's context has room for."""
        if not self.model.context:
            return self.decoding.max_new_tokens
        return min(self.decoding.max_new_tokens, self.model.context - self.prompt_length)

    def answer(self) -> Iterator[str]:
        """Yield the text so far after every token. To stop listening ends the generation, and
        nothing is kept."""
        if self.ids is not None:
            yield self.text
            return
        # the text after every token, then None, or the error that ended it
        messages: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        listener_gone = threading.Event()
        worker = threading.Thread(
            target=self._generate, args=(messages, listener_gone), daemon=True
        )
        worker.start()
        try:
            message = messages.get()
            while isinstance(message, str):
                yield message
                message = messages.get()
            if message is not None:
                raise message
        finally:
            listener_gone.set()

    def _generate(
        self,
        messages: queue.SimpleQueue[str | BaseException | None],
        listener_gone: threading.Event,
    ) -> None:
        vlm = self.model.vlm
        decoding = self.decoding

        def stop(rows: Sequence[Sequence[int]]) -> list[bool]:
            messages.put(vlm.tokenizer.decode(rows[0], skip_special_tokens=True))
            return [listener_gone.is_set()]

        def decode(ids: Sequence[int]) -> str:
            return vlm.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )

        try:
            with self.model.lock:
                generation = generate(
                    vlm,
                    self.batch,
                    self.limit,
                    decoding.do_sample,
                    decoding.temperature,
                    decoding.top_p,
                    decoding.seed,
                    stop=stop,
                )
                if listener_gone.is_set():
                    return
                ids = generation.ids[0]
                self.text, self.spans = token_spans(ids, decode)
                whole = extended(self.batch, ids)
                words = vocabulary(vlm.tokenizer, whole.input_ids[0].tolist())
            self.labels = [words[int(i)] for i in whole.input_ids[0]]
            self.groups = np.array([GROUPS[code] for code in whole.groups[0].tolist()])
            self.vision = np.flatnonzero(self.groups == "vision")
            self.tokens = self.labels[-len(ids) :]
            self.producing = np.arange(len(ids)) + self.prompt_length - 1
            self.probabilities = generation.logprobs[0].exp().cpu().numpy()
            self.ids = ids  # last: whoever sees it finds everything else
            messages.put(None)
        except BaseException as error:  # told to whoever listens
            messages.put(error)

    # ---- parts ----

    def evolution(self) -> Evolution:
        """Evolution of all tokens, by one more pass over prompt and answer."""
        return self.once("evolution", self._evolution)

    @torch.inference_mode()
    def _evolution(self) -> Evolution:
        vlm = self.model.vlm
        lens = self.model.lens
        ids = torch.tensor(self.answer_ids)
        of_states = []  # of each hidden state what _read_off() gives, (T, ...) each
        with self.model.lock:
            whole = extended(self.batch, self.answer_ids)
            probe = ProducingStates(torch.from_numpy(self.producing))
            with capture(vlm, [probe]):
                prefill(vlm, whole)
            for index in sorted(probe.states):
                # 64 tokens at a time: a row of probabilities is as long as the vocabulary
                pieces = zip(probe.states[index].split(64), ids.split(64), strict=True)
                read = [_read_off(lens, states, produced) for states, produced in pieces]
                columns = zip(*read, strict=True)
                of_states.append([torch.cat(column).cpu().numpy() for column in columns])
            arrays = [np.stack(column, 1) for column in zip(*of_states, strict=True)]
            words = vocabulary(vlm.tokenizer, np.unique(arrays[0]).tolist())
            ids_of, probs, chosen, rank, entropy = arrays
            return Evolution(ids_of, probs, chosen, rank, entropy, words)

    def relevancy(self) -> Relevancy:
        """Relevancy of all tokens at all layers."""
        for _ in self.relevancy_steps():
            pass
        return cast("Relevancy", self._parts["relevancy"])

    @property
    def has_relevancy(self) -> bool:
        """Is it computed already?"""
        return "relevancy" in self._parts

    def relevancy_steps(self) -> Iterator[float]:
        """Compute it in chunks of tokens, yielding the share that is done. Several callers work on
        the same computation."""
        while "relevancy" not in self._parts:
            try:
                with self._guard:
                    done = self._advance()
                yield done
            except BaseException:
                # the listener has gone, or a pass failed: the kept pass over the answer is large
                self._work = None
                raise

    def _advance(self) -> float:
        """One chunk, or the pass that comes before them. Share done."""
        if "relevancy" in self._parts:
            return 1.0
        count = len(self.answer_ids)
        if self._work is None:
            size = 4 * count * self.model.depth * len(self.labels)
            if size > ROWS_BUDGET:
                raise UsageError(
                    f"relevancy of {count} tokens would take {size / 2**20:.0f} MiB,"
                    f" {ROWS_BUDGET / 2**20:.0f} are allowed: generate fewer tokens"
                )
            with self.model.lock:
                run = trace(self.model.vlm, self.batch, self.answer_ids)
            self._parts["norms"] = run.tokens.float().norm(dim=-1).cpu().numpy()
            self._work = (run, [])
            return 0.0
        run, chunks = self._work
        start = sum(len(chunk.rows) for chunk in chunks)
        stop = min(start + min(CHUNK, methods.chunk_size(run)), count)
        with self.model.lock:
            chunks.append(methods.relevancy(run, range(start, stop)))
        done = start + len(chunks[-1].rows)
        if done == count:
            self._parts["relevancy"] = joined(chunks)
            self._work = None
        return done / count

    def attention(self, layer: int) -> Float[np.ndarray, "T H P"]:
        """Raw attention of the producing rows to the vision tokens in one layer. Layers are kept up
        to ATTENTION_BUDGET."""
        maps = self._attention.get(layer)
        if maps is not None:
            return maps
        with self._guard:
            if layer not in self._attention:
                self._read_attention(layer)
            return self._attention[layer]

    def looking_heads(self) -> Heads:
        """How much the heads of all layers look at the picture."""
        if "heads" not in self._parts:
            with self._guard:
                if "heads" not in self._parts:
                    self._read_attention(self.model.depth - 1)
        return cast(Heads, self._parts["heads"])

    @torch.no_grad()
    def _read_attention(self, layer: int) -> None:
        """One pass that keeps the maps of all layers where they fit, else of the one that is asked
        for. The first pass also sums up all heads."""
        size = 4 * len(self.answer_ids) * self.model.heads * len(self.vision)
        room = max(1, ATTENTION_BUDGET // max(1, size))
        every_layer = range(self.model.depth)
        kept = every_layer if room >= self.model.depth else [layer]
        sums = []  # of each layer: (H, T, groups)
        with self.model.lock:
            run = trace(self.model.vlm, self.batch, self.answer_ids, tower=False)
            in_group = torch.from_numpy(np.array(GROUPS) == self.groups[:, None]).float()
            for index in kept if "heads" in self._parts else every_layer:
                block = run.layers[index]
                call = block.run(block.input.detach())[1][0]
                rows, _ = call.weights(slice(None), run.rows)  # (H, T, N)
                sums.append((rows @ in_group.to(rows.device)).cpu())
                if index in kept:
                    of_heads = rows[..., run.vision.to(rows.device)].transpose(0, 1)
                    self._attention[index] = of_heads.cpu().numpy()
        if "heads" not in self._parts:
            self._parts["heads"] = self._heads(torch.stack(sums).permute(2, 0, 1, 3))
        while len(self._attention) > room:
            self._attention.popitem(last=False)

    def _heads(self, mass: Float[Tensor, "T L H G"]) -> Heads:
        """From the attention of every head to each group of tokens."""
        picture = mass[..., GROUPS.index("vision")]
        both = picture + user_text(mass)
        names, counts = np.unique(self.groups[: self.prompt_length], return_counts=True)
        chance = chance_vision_share(dict(zip(names.tolist(), counts.tolist(), strict=True)))
        balance = (picture / both).where(both > 1e-8, float("nan"))
        return Heads(picture.numpy(), balance.numpy(), chance)

    # ---- what follows from the parts ----

    def visible_text(self, token: int) -> Int[np.ndarray, " positions"]:
        """Positions of the question and of the answer before a token: all text that its producing
        row sees, the row itself included."""
        is_text = np.isin(self.groups, TEXT)
        is_seen = np.arange(len(self.groups)) <= self.producing[token]
        return np.flatnonzero(is_text & is_seen)

    def contribution(self, how: str = "max", kind: str = "share") -> Float[np.ndarray, "T L"]:
        """Visual contribution: rules.share or, kind 'ratio', the published agg(R_img) /
        agg(R_text); how: max, sum or mean."""

        def make() -> Float[np.ndarray, "T L"]:
            relevancy = self.relevancy()
            measure = rules.share if kind == "share" else rules.ratio_of
            rows = []
            for token in range(len(self.answer_ids)):
                image = torch.from_numpy(relevancy.image[token])
                text = torch.from_numpy(relevancy.rows[token][:, self.visible_text(token)])
                rows.append(measure(image, text, how).numpy())
            return np.stack(rows)

        return self.once(("contribution", how, kind), make)

    def place(self, count: int) -> PatchGrid | None:
        """The grid of `count` cells over the picture, vision tokens or the tower's patches; None:
        where they lie is unknown."""
        family = self.model.vlm.family
        grids = [self.batch.grids[0]]
        if family.patches is not None:
            rows = self.batch.image_rows[0]
            grids.append(family.patches(self.model.vlm, self.picture.size, rows))
        for grid in grids:
            if grid is not None and len(grid.boxes) == count:
                return grid
        return None

    def norms(self) -> Float[np.ndarray, " P"]:
        """Norms of the vision tokens as the decoder reads them."""
        self.relevancy()
        return cast("np.ndarray", self._parts["norms"])

    def sinks(self) -> Bool[np.ndarray, " P"]:
        """Vision tokens of outlying norm, see rules.sinks; they glow whatever is asked."""
        return rules.sinks(torch.from_numpy(self.norms())).numpy()

    def looked_at(
        self,
        patches: Collection[int],
        source: str = "attention",
        layer: int | None = None,
        head: int | None = None,
    ) -> Float[np.ndarray, " T"]:
        """How much each token looked at some cells.

        source 'attention': what the producing row puts on them in one layer (None: the last), mean
        over heads for head None; 'relevancy': their share of the token's relevancy over the
        picture, gathered up to the layer, 0 where the picture has none.
        """
        layer = self.model.depth - 1 if layer is None else layer
        cells = sorted(patches)
        if source == "attention":
            maps = self.attention(layer)
            of_head = maps.mean(1) if head is None else maps[:, head]
            return of_head[:, cells].sum(-1)
        picture = self.relevancy().picture[:, layer]
        total = picture.sum(-1)
        return np.where(total > 0, picture[:, cells].sum(-1) / np.where(total > 0, total, 1), 0.0)

    def missing(self) -> list[str]:
        """What this model does not tell, one line each."""
        vlm = self.model.vlm
        lines = []
        if self.batch.grids[0] is None:
            lines.append(
                f"{vlm.family.name}: where the vision tokens lie in the picture is unknown, so"
                " their attention is not drawn on it."
            )
        if not vlm.parts.vision_blocks:
            lines.append(
                f"{vlm.family.name}: relevancy stops at the vision tokens, for the tower's"
                " attention is not known."
            )
        return lines


def _read_off(
    lens: Lens, states: Float[Tensor, "t d"], produced: Int[Tensor, " t"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(likeliest ids (t, k), their probabilities (t, k), probability (t,) and rank (t,) of the
    tokens that were produced, entropy (t,) in bits) by the lens."""
    probs = lens.logits(states).softmax(-1)
    best = probs.topk(min(TOP, probs.shape[-1]))
    chosen = probs.gather(-1, produced.to(probs.device)[:, None])
    rank = (probs > chosen).sum(-1) + 1
    entropy = torch.special.entr(probs).sum(-1) / math.log(2)
    return best.indices, best.values, chosen[:, 0], rank, entropy


def joined(chunks: Sequence[Relevancy]) -> Relevancy:
    """Relevancy of all targets from that of chunks of them."""

    def whole(name: str) -> np.ndarray | None:
        arrays = [getattr(chunk, name) for chunk in chunks]
        return None if arrays[0] is None else np.concatenate(arrays)

    names = ("rows", "image", "cells", "instruction", "last", "input")
    arrays: Record = {name: whole(name) for name in names}
    return methods.Relevancy(chunks[0].layers, **arrays)


def hallucination_warning(analysis: Analysis) -> str:
    """Text of the panel 'Hallucination warning': the probability of each object word of the answer,
    by the model's calibration."""
    model = analysis.model
    calibration = model.calibration
    if calibration is None:
        return f"not calibrated: {model.to_calibrate}"

    def make() -> list[Record]:
        with model.lock:
            return warnings_for(
                model.vlm, analysis.batch, analysis.answer_ids, calibration["names"], calibration
            )

    risks = [
        f"{word['word']} {word['probability']:.0%}"
        for word in analysis.once("warnings", make)
        if word["probability"] is not None
    ]
    if not risks:
        return "no object that the calibration knows is named"
    return "Probability that it is not in the picture: " + ", ".join(risks)

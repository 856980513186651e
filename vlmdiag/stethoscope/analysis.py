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
Session. LVLM-Stethoscope (section 1 of our study), with its defects of section 5.3 left out.
"""

import hashlib
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlmdiag.answers import token_spans
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.probes import Probe
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy import rules
from vlmdiag.relevancy.gradients import trace
from vlmdiag.stethoscope.warning_signals import warnings_for

QUESTION_LIMIT = 1536  # characters, as LVLM-Interpret cuts them
TOKEN_LIMIT = 1024  # generated tokens
FILE_LIMIT = 20 * 2**20  # bytes of an uploaded picture
PIXEL_LIMIT = 50_000_000
CHUNK = 8  # tokens between two signs of progress
KEPT = 3  # analyses of a session
TOP = 10  # alternatives that are kept
ATTENTION_BUDGET = 64 * 2**20  # bytes of raw attention that an analysis keeps
ROWS_BUDGET = 512 * 2**20  # bytes of relevancy that an analysis keeps
TEXT = ("user", "generated")


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
    UsageError for models that are not decoder-only."""

    def __init__(self, vlm, calibration=None):
        vlm.need("decoder-only")
        self.calibration = calibration  # of hallucination_warning.py fit
        self.vlm, self.lock, self.lens = vlm, threading.RLock(), Lens(vlm)
        text = vlm.model.config.get_text_config()
        self.depth, self.heads = len(vlm.parts.layers), text.num_attention_heads
        self.context = getattr(text, "max_position_embeddings", None)


def part_on_cpu(vlm):
    """Run vision tower and connector on the CPU in float32 and the rest where it is:
    `--part-on-cpu`. Returns whether anything moved."""
    if vlm.device.type != "cpu":
        compute_on(
            [vlm.parts.tower, vlm.parts.connector],
            torch.device("cpu"),
            torch.float32,
            vlm.device,
            vlm.dtype,
        )
    return vlm.device.type != "cpu"


def compute_on(modules, there, exact, home, dtype):
    """Move modules to a device and floating type; what goes into them follows, what comes out goes
    home."""

    def sent(value, device, kind):
        if torch.is_tensor(value):
            return value.to(device, kind) if value.is_floating_point() else value.to(device)
        if isinstance(value, dict):  # ModelOutput is one
            return type(value)(**{name: sent(part, device, kind) for name, part in value.items()})
        return (
            type(value)(sent(part, device, kind) for part in value)
            if type(value) in (tuple, list)
            else value
        )

    modules = [module for module in modules if module is not None]
    for module in [
        m
        for m in modules
        if not any(m is inner for other in modules if other is not m for inner in other.modules())
    ]:
        module.to(there, exact)
        module.register_forward_pre_hook(
            lambda _, args, options: (sent(args, there, exact), sent(options, there, exact)),
            with_kwargs=True,
            prepend=True,
        )
        module.register_forward_hook(lambda _, args, output: sent(output, home, dtype))


def read_picture(path):
    """An uploaded picture, upright RGB; UsageError in one line where it is too large or none."""
    path = Path(path)
    if path.stat().st_size > FILE_LIMIT:
        raise UsageError(
            f"the file has {path.stat().st_size / 2**20:.0f} MiB, at most {FILE_LIMIT / 2**20:.0f}"
            " MiB are read"
        )
    try:
        from PIL import Image

        with Image.open(path) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise UsageError(
                    f"the picture has {image.width} x {image.height} pixels, at most"
                    f" {PIXEL_LIMIT // 10**6} million are read"
                )
        return load_image(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(
            "this file is not a readable picture (PNG, JPEG, WebP, BMP, GIF and TIFF are)"
        ) from error


class ProducingStates(Probe):
    """The residual stream of some positions of one prompt: states[index] (T, d), index 0 the
    embeddings, l + 1 after layer l, before the final norm."""

    wants_hidden = True

    def __init__(self, rows):
        self.rows, self.states = rows, {}

    def hidden(self, index, states):
        self.states[index] = states[0, self.rows.to(states.device)]


@dataclass
class Evolution:
    """The lens at the producing rows of T tokens. ids, probs (T, L + 1, k): likeliest ids after the
    embeddings (0) and after layer l (l + 1), the final norm applied once everywhere; chosen, rank
    (T, L + 1): probability and rank (1 = likeliest) of the token that was produced; words: {id:
    text}. The last entry is the model's own distribution, before temperature and top-p."""

    ids: np.ndarray
    probs: np.ndarray
    chosen: np.ndarray
    rank: np.ndarray
    words: dict


class Analysis:
    """One picture and question. tokens, ids, probabilities (T,) stand once answer() is through;
    patches: the picture's patches that are selected now."""

    def __init__(self, model, picture, question, decoding=None):
        question = question.strip()
        if not question:
            raise UsageError("type a question first")
        if len(question) > QUESTION_LIMIT:
            raise UsageError(
                f"the question has {len(question)} characters, at most {QUESTION_LIMIT} are read"
            )
        self.model, self.picture, self.question, self.decoding = (
            model,
            picture,
            question,
            decoding or Decoding(),
        )
        if not 1 <= self.decoding.max_new_tokens <= TOKEN_LIMIT:
            raise UsageError(
                f"{self.decoding.max_new_tokens} tokens: 1 to {TOKEN_LIMIT} can be generated"
            )
        self.ids, self.patches, self._parts = None, set(), {}
        self._guard, self._attention, self._work = threading.RLock(), OrderedDict(), None
        with model.lock:
            self.batch = model.vlm.encode([Sample("0", Path("picture.png"), question)], [picture])
        self.prompt_length = self.batch.input_ids.shape[1]
        if model.context and self.prompt_length >= model.context:
            raise UsageError(
                f"the prompt has {self.prompt_length} tokens, the model reads {model.context}:"
                " shorten the question"
            )

    def once(self, key, make):
        """make() for the first caller of a key, what it gave for all others."""
        if key not in self._parts:  # what is there is read without waiting for what is being made
            with self._guard:
                if key not in self._parts:
                    self._parts[key] = make()
        return self._parts[key]

    # ---- the answer ----

    @property
    def limit(self):
        """Tokens that fit: the decoding's, or what is left of the model's context."""
        return (
            self.decoding.max_new_tokens
            if not self.model.context
            else min(self.decoding.max_new_tokens, self.model.context - self.prompt_length)
        )

    def answer(self):
        """Yield the text so far after every token. To stop listening ends the generation, and
        nothing is kept."""
        if self.ids is not None:
            yield self.text
            return
        said, gone = queue.SimpleQueue(), threading.Event()
        worker = threading.Thread(target=self._generate, args=(said, gone), daemon=True)
        worker.start()
        try:
            while isinstance(piece := said.get(), str):
                yield piece
            if piece is not None:
                raise piece
        finally:
            gone.set()

    def _generate(self, said, gone):
        vlm, how = self.model.vlm, self.decoding

        def stop(rows):
            said.put(vlm.tokenizer.decode(rows[0], skip_special_tokens=True))
            return [gone.is_set()]

        try:
            with self.model.lock:
                found = generate(
                    vlm,
                    self.batch,
                    self.limit,
                    how.do_sample,
                    how.temperature,
                    how.top_p,
                    how.seed,
                    stop=stop,
                )
                if gone.is_set():
                    return
                ids = found.ids[0]
                self.text, self.spans = token_spans(
                    ids,
                    lambda some: vlm.tokenizer.decode(
                        some, skip_special_tokens=True, clean_up_tokenization_spaces=False
                    ),
                )
                whole = extended(self.batch, ids)
                words = vocabulary(vlm.tokenizer, whole.input_ids[0].tolist())
            self.labels = [words[int(i)] for i in whole.input_ids[0]]
            self.groups = np.array([GROUPS[code] for code in whole.groups[0].tolist()])
            self.vision = np.flatnonzero(self.groups == "vision")
            self.tokens, self.producing = (
                self.labels[-len(ids) :],
                np.arange(len(ids)) + self.prompt_length - 1,
            )
            self.probabilities = found.logprobs[0].exp().cpu().numpy()
            self.ids = ids  # last: who sees it finds the rest
            said.put(None)
        except BaseException as error:  # told to whoever listens
            said.put(error)

    # ---- parts ----

    def evolution(self):
        """Evolution of all tokens, by one more pass over prompt and answer."""
        return self.once("evolution", self._evolution)

    @torch.inference_mode()
    def _evolution(self):
        vlm, lens, ids, found = self.model.vlm, self.model.lens, torch.tensor(self.ids), []
        with self.model.lock:
            whole = extended(self.batch, self.ids)
            with capture(vlm, [probe := ProducingStates(torch.from_numpy(self.producing))]):
                prefill(vlm, whole)
            for index in sorted(probe.states):
                parts = []
                for states, own in zip(probe.states[index].split(64), ids.split(64)):
                    probs = lens.logits(states).softmax(-1)
                    best, chosen = (
                        probs.topk(min(TOP, probs.shape[-1])),
                        probs.gather(-1, own.to(probs.device)[:, None]),
                    )
                    parts.append(
                        (best.indices, best.values, chosen[:, 0], (probs > chosen).sum(-1) + 1)
                    )
                found.append([torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)])
            arrays = [np.stack(part, 1) for part in zip(*found, strict=True)]
            return Evolution(*arrays, vocabulary(vlm.tokenizer, np.unique(arrays[0]).tolist()))

    def relevancy(self):
        """attribution.Relevancy of all tokens at all layers."""
        for _ in self.relevancy_steps():
            pass
        return self._parts["relevancy"]

    def relevancy_steps(self):
        """Compute it in chunks of tokens, yielding the share that is done. Several callers work on
        the same computation."""
        while "relevancy" not in self._parts:
            try:
                with self._guard:
                    done = self._advance()
                yield done
            except (
                BaseException
            ):  # the listener has gone, or a pass failed: the kept pass over the answer is large
                self._work = None
                raise

    def _advance(self):
        """One chunk, or the pass that comes before them. Share done."""
        count = len(self.ids)
        if "relevancy" in self._parts:
            return 1.0
        if self._work is None:
            if (size := 4 * count * self.model.depth * len(self.labels)) > ROWS_BUDGET:
                raise UsageError(
                    f"relevancy of {count} tokens would take {size / 2**20:.0f} MiB,"
                    f" {ROWS_BUDGET / 2**20:.0f} are allowed: generate fewer tokens"
                )
            with self.model.lock:
                run = gathered(trace(self.model.vlm, self.batch, self.ids))
            self._parts["norms"] = run.tokens.float().norm(dim=-1).cpu().numpy()
            self._work = run, []
            return 0.0
        run, parts = self._work
        start = sum(len(part.rows) for part in parts)
        with self.model.lock:
            parts.append(
                attribution.relevancy(
                    run, range(start, min(start + min(CHUNK, attribution.chunk_size(run)), count))
                )
            )
        done = start + len(parts[-1].rows)
        if done == count:
            arrays = {
                name: [getattr(part, name) for part in parts]
                for name in ("rows", "image", "cells", "instruction", "last", "input")
            }
            whole = {
                name: None if some[0] is None else np.concatenate(some)
                for name, some in arrays.items()
            }
            self._parts["relevancy"], self._work = (
                attribution.Relevancy(parts[0].layers, **whole),
                None,
            )
        return done / count

    def attention(self, layer):
        """Raw attention (T, H, P) of the producing rows to the vision tokens in one layer, float32.
        Layers are kept up to ATTENTION_BUDGET."""
        if (kept := self._attention.get(layer)) is not None:
            return kept
        with self._guard:
            if layer not in self._attention:
                self._read_attention(layer)
            return self._attention[layer]

    @torch.no_grad()
    def _read_attention(self, layer):
        size = 4 * len(self.ids) * self.model.heads * len(self.vision)
        room = max(1, ATTENTION_BUDGET // max(1, size))
        with self.model.lock:
            run = trace(self.model.vlm, self.batch, self.ids, tower=False)
            for index in range(self.model.depth) if room >= self.model.depth else [layer]:
                core = run.layers[index].run(run.layers[index].input.detach())[1][0]
                maps = [
                    core.weights(head)[0][run.rows][:, run.vision]
                    for head in range(core.query.shape[1])
                ]
                self._attention[index] = torch.stack(maps, 1).float().cpu().numpy()
        while len(self._attention) > room:
            self._attention.popitem(last=False)

    # ---- what follows from the parts ----

    def visible_text(self, token):
        """Positions of the question and of the answer before a token: all text that its producing
        row sees, the row itself included."""
        return np.flatnonzero(
            np.isin(self.groups, TEXT) & (np.arange(len(self.groups)) <= self.producing[token])
        )

    def contribution(self, how="max", kind="share"):
        """Visual contribution (T, L): relevancy.share or, kind 'ratio', the published agg(R_img) /
        agg(R_text); how: max, sum or mean."""

        def make():
            found, measure = self.relevancy(), rules.share if kind == "share" else rules.ratio_of
            rows = [
                measure(
                    torch.from_numpy(found.image[t]),
                    torch.from_numpy(found.rows[t][:, self.visible_text(t)]),
                    how,
                ).numpy()
                for t in range(len(self.ids))
            ]
            return np.stack(rows)

        return self.once(("contribution", how, kind), make)

    def place(self, count):
        """PatchGrid of `count` cells over the picture, vision tokens or the tower's patches, or
        None: where they lie is unknown."""
        vlm = self.model.vlm
        for grid in (
            self.batch.grids[0],
            vlm.family.patches
            and vlm.family.patches(vlm, self.picture.size, self.batch.image_rows[0]),
        ):
            if grid is not None and len(grid.boxes) == count:
                return grid
        return None

    def norms(self):
        """(P,) norms of the vision tokens as the decoder reads them, float32."""
        self.relevancy()
        return self._parts["norms"]

    def sinks(self):
        """(P,) bool: vision tokens of outlying norm, see relevancy.sinks; they glow whatever is
        asked."""
        return rules.sinks(torch.from_numpy(self.norms())).numpy()

    def looked_at(self, patches, source="attention", layer=None, head=None):
        """(T,) how much each token looked at some cells. attention: what the producing row puts on
        them in one layer, mean over heads for head None; relevancy: their share of the token's
        relevancy over the picture, gathered up to the layer, 0 where the picture has none.
        """
        layer, patches = self.model.depth - 1 if layer is None else layer, sorted(patches)
        if source == "attention":
            maps = self.attention(layer)
            return (maps.mean(1) if head is None else maps[:, head])[:, patches].sum(-1)
        picture = self.relevancy().picture[:, layer]
        total = picture.sum(-1)
        return np.where(total > 0, picture[:, patches].sum(-1) / np.where(total > 0, total, 1), 0.0)

    def missing(self):
        """What this model does not tell, one line each."""
        vlm, lines = self.model.vlm, []
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


def gathered(run):
    """A trace whose maps of tower and Q-Former come to the decoder's device, for a tower that runs
    on another."""
    if run.tower and run.tower[0].input.device != run.rows.device:
        home, down, across = run.rows.device, run.descend_tower, run.query_maps
        run.descend_tower = lambda gradients, tile=0: (
            (index, attention.to(home)) for index, attention in down(gradients, tile)
        )
        run.query_maps = lambda gradients: [
            tuple(None if weights is None else weights.to(home) for weights in pair)
            for pair in across(gradients)
        ]
    return run


class Session:
    """What one visitor has asked: the last KEPT analyses by content, and the one that is shown;
    turn: how many pictures were chosen so far."""

    def __init__(self):
        self.kept, self.current, self.turn = OrderedDict(), None, 0

    def analysis(self, model, picture, question, decoding):
        """A kept one of the same picture, question and decoding, or a new one; the oldest goes."""
        digest = hashlib.blake2b(
            f"{picture.size}|{question.strip()}|{decoding}".encode() + picture.tobytes()
        ).hexdigest()
        found = self.kept.pop(digest, None) or Analysis(model, picture, question, decoding)
        self.kept[digest] = found
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return found


def hallucination_warning(analysis):
    """Text of the panel 'Hallucination warning': the probability of each object word of the answer,
    by the model's calibration."""
    model, found = analysis.model, analysis.model.calibration
    if found is None:
        return "not calibrated: run hallucination_warning.py fit for this model"

    def make():
        with model.lock:
            return warnings_for(model.vlm, analysis.batch, analysis.ids, found["names"], found)

    words = analysis.once("warnings", make)
    risks = [
        f"{one['word']} {one['probability']:.0%}" for one in words if one["probability"] is not None
    ]
    return (
        "Probability that it is not in the picture: " + ", ".join(risks)
        if risks
        else "no object that the calibration knows is named"
    )

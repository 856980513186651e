"""Training of smol-llava: the stream of scenes, the warm start, the two stages, the text that
keeps its English. checkpoints/train_smol.py is the command, and says why."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmdiag import cli
from vlmdiag.scenes.questions import (
    AXES,
    Mix,
    Question,
    absent,
    article,
    ask_camera,
    ask_caption,
    ask_color,
    ask_confusable,
    ask_count,
    ask_presence,
    ask_protocol,
    ask_relation,
    ask_shape,
    ask_what,
    ask_where,
    camera_questions,
    margin,
    relation,
    relations,
    split,
)
from vlmdiag.scenes.scene import Scene, corridor_scene, floor_scene
from vlmdiag.scenes.smol_llava import (
    ENGLISH,
    OWN_SYSTEM,
    SYSTEMS,
    Adapters,
    Connector,
    Packer,
    answer_logits,
    fetch_gguf,
    hidden_states,
    load_language_model,
    load_tower,
    write_part,
)
from vlmdiag.scenes.tiny_llava import ALL_COLORS, ALL_SHAPES, example, normalized, word_id
from vlmdiag.types import Record

SIMPLE_MIX: Mix = {ask_caption: 30, ask_where: 20, ask_presence: 20, ask_color: 15, ask_shape: 15}
FLOOR_MIX: Mix = {
    ask_relation: 34,
    ask_where: 8,
    ask_presence: 8,
    ask_confusable: 10,
    ask_color: 8,
    ask_shape: 8,
    ask_what: 4,
    ask_count: 5,
    ask_caption: 16,
    ask_protocol: 5,
}
CORRIDOR_MIX: Mix = {
    ask_camera: 35,
    ask_relation: 20,
    ask_where: 6,
    ask_presence: 8,
    ask_confusable: 5,
    ask_color: 6,
    ask_shape: 6,
    ask_caption: 20,
}
MIXES: dict[int, dict[str, Mix]] = {
    1: {"floor": SIMPLE_MIX, "corridor": SIMPLE_MIX},
    2: {"floor": FLOOR_MIX, "corridor": CORRIDOR_MIX},
}
# objects on a floor, or a corridor: shares of the scenes
SCENES: dict[int, dict[int | str, int]] = {
    1: {1: 20, 2: 25, 3: 25, 4: 15, "corridor": 15},
    2: {1: 8, 2: 28, 3: 28, 4: 20, "corridor": 16},
}
SNAPSHOTS = (350, 700)  # steps of stage 2 of which a part is kept, beside the last
LEARNING_RATES = {1: {"connector": 1e-3}, 2: {"connector": 1e-3, "adapters": 5e-4}}
WARMUP_STEPS = 30
DECAY_FROM = 0.5  # share of a stage after which the learning rate falls, along a cosine
LAST_RATE = 0.02  # where it ends, as a share of the full rate
WARM_SCENES, WARM_BATCH = 1500, 32
SHARPNESS = 12.0  # of the cosines of the warm start
LOG_EVERY = 10
TEXT_EVERY = 8
TEXT_STRIDE = 4  # the divergence is computed at every fourth position
IDENTITY = (
    "seed", "warm_start", "warm_steps", "stage1_steps", "stage2_steps",
    "pictures", "row_length", "dtype",
)  # fmt: skip

# what the untouched model is asked, and begins, to write text that holds the adapted one to it
TOPICS = (
    "the sea", "a small village", "bread", "trains", "the human heart", "an old friend",
    "mathematics", "winter", "a garden", "the history of paper", "birds", "a lost letter",
    "rivers", "learning a language", "the moon", "work",
)  # fmt: skip
REQUESTS = ("Tell me about {}.", "Write a short story about {}.")
BEGINNINGS = (
    "A long time ago people thought about {} in another way.",
    "This chapter is about {}.",
)


# --- pictures and questions ---------------------------------------------------------------------


def draw_scene(rng: Random, stage: int) -> Scene:
    shares = SCENES[stage]
    kind = rng.choices(list(shares), weights=list(shares.values()))[0]
    return corridor_scene(rng) if isinstance(kind, str) else floor_scene(rng, kind)


def held_out_questions(rng: Random, scene: Scene) -> list[tuple[str, Question]]:
    """[(name in the log, Question)]: every kind that the scene allows; as many Yes as No."""
    if scene.kind == "corridor":
        return [("camera", question) for question in camera_questions(*scene.things)]
    out = []
    for kind, (axis, _, _) in AXES.items():
        pairs = [pair for pair in relations(scene, kind) if margin(*pair, axis, scene) >= 0.12]
        for a, b in rng.sample(pairs, min(2, len(pairs))):
            far, near = (a, b) if a.z > b.z else (b, a)
            name = f"{kind}, {split(far, near, scene)}" if kind == "far_close" else kind
            out.append((name, relation(kind, a, b)))
    for name, answer in ((rng.choice(scene.things).name, "Yes"), (absent(rng, scene), "No")):
        out.append(
            ("yes_no", Question("yes_no", f"Is there {article(name)} in the image?", answer))
        )
    for ask in (ask_color, ask_shape, ask_what, ask_count, ask_where, ask_caption, ask_protocol):
        question = ask(rng, scene)
        if question is not None:
            out.append((question.kind, question))
    return out


# --- text that holds the adapted model to the untouched one -------------------------------------


def text_rows(ids: Tensor) -> dict[str, Tensor]:
    """Rows of plain text (B, T) in the form of packed rows: all prefix, so causal attention."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return {"ids": ids, "positions": positions, "turns": torch.zeros_like(ids)}


def text_log_shares(model: PreTrainedModel, ids: Tensor, asked: slice) -> Tensor:
    """Log probabilities of the next word (n, vocabulary) at some positions of one row (1, T)."""
    hidden = hidden_states(model, text_rows(ids), None)[0, asked]
    return model.lm_head(hidden).float().log_softmax(-1)


@torch.no_grad()
def write_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> Tensor:
    """What the language model itself says and writes about TOPICS, one stream cut into rows (n,
    length) of ids; sampled at temperature 1, so that it is the model's own idea of text."""
    pad, device = tokenizer.pad_token_id, model.device
    chat = f"{Packer.head(OWN_SYSTEM)}{{}}<|im_end|>\n<|im_start|>assistant\n"
    starts = [chat.format(request.format(topic)) for request in REQUESTS for topic in TOPICS]
    starts += [beginning.format(topic) for beginning in BEGINNINGS for topic in TOPICS]
    torch.manual_seed(seed)
    stream = []
    for first in range(0, len(starts), 16):
        group = [
            tokenizer.encode(text, add_special_tokens=False) for text in starts[first : first + 16]
        ]
        longest = max(map(len, group))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in group], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in group], device=device
        )
        done = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=300, pad_token_id=pad
        )
        for start, written in zip(group, done[:, longest:].tolist(), strict=True):
            # the pad is also the end of an answer: what comes after the first one is filling
            end = written.index(pad) + 1 if pad in written else len(written)
            stream += start + written[:end]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).view(rows, length)


class Trainer:
    """The model in training: what is frozen, what is trained, the optimizer, and where the run
    stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        base = Path(args.gguf) if args.gguf else fetch_gguf(Path(args.state_dir))
        self.model, self.tokenizer = load_language_model(base, self.dtype)
        self.model.to(args.device).eval().requires_grad_(False)
        self.model.set_attn_implementation("packed_rows")
        self.tower = load_tower().to(args.device)
        torch.manual_seed(args.seed)
        width = self.model.config.hidden_size
        self.connector = Connector(self.tower.config.hidden_size, width).to(args.device)
        self.adapters = Adapters(self.model, seed=args.seed)
        self.model.to(args.device)  # the adapters are in it
        self.packer = Packer(self.tokenizer)
        self.folder = Path(args.state_dir) / args.warm_start
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stage, self.step = 1, 0
        self.losses: list[float] = []  # since the last line of the log
        self.optimizer: torch.optim.Optimizer  # of the stage, by begin()
        self.english = self.english_loss()  # of the untouched language model
        self.own_text: Tensor  # from stage 2 on

    # --- state ---

    def settings(self) -> Record:
        return {name: getattr(self.args, name) for name in IDENTITY}

    def begin(self, stage: int) -> None:
        """A stage's optimizer, and whether the adapters take part."""
        self.stage, self.step = stage, 0
        self.adapters.switch(stage == 2)
        trained = {
            "connector": list(self.connector.parameters()),
            "adapters": list(self.adapters.trained().values()),
        }
        groups = [
            {"params": trained[name], "lr": rate, "full_rate": rate}
            for name, rate in LEARNING_RATES[stage].items()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        if stage == 2:
            self.own_text = self.load_text()

    def save(self) -> None:
        """The whole state in one file, replaced at once: a kill leaves the old one or the new
        one."""
        state = {
            "settings": self.settings(),
            "stage": self.stage,
            "step": self.step,
            "losses": self.losses,
            "connector": self.connector.state_dict(),
            "adapters": self.adapters.trained(),
            "optimizer": self.optimizer.state_dict(),
        }
        scratch = self.folder / "state.tmp"
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.folder / "state.pt")

    def load(self) -> bool:
        """Go on from the saved state; False if there is none."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        differ = [f"{k} {v}" for k, v in state["settings"].items() if v != getattr(self.args, k)]
        if differ:
            raise cli.UsageError(
                f"{path} was made with {', '.join(differ)}; use the same, or another --state_dir"
            )
        self.begin(state["stage"])
        self.step, self.losses = state["step"], state["losses"]
        self.connector.load_state_dict(state["connector"])
        with torch.no_grad():
            for name, value in self.adapters.trained().items():
                value.copy_(state["adapters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        return True

    # --- data ---

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.args.device) for key, value in batch.items()}

    @torch.no_grad()
    def features(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """What the connector reads: (n, P, tower width) float32, of the tower's layer before the
        last."""
        batch = normalized(np.stack(pixels)).to(self.args.device)
        states = self.tower(batch, output_hidden_states=True).hidden_states
        return states[-2][:, 1:]

    def draw(self, stage: int, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """The packed rows and the tower's features of one step; both depend on (seed, stage, step)
        alone."""
        rng = Random(f"{self.args.seed}-smol-{stage}-{step}")
        system = rng.choices(SYSTEMS, weights=[40, 30, 30])[0]
        rows, pixels = [], []
        for _ in range(self.args.pictures):
            scene = draw_scene(rng, stage)
            questions = self.packer.fill(
                rng, scene, MIXES[stage][scene.kind], system, self.args.row_length
            )
            rows.append(self.packer.row(system, questions))
            pixels.append(example(scene).pixels)
        batch = self.packer.batch(rows, self.args.row_length)
        return self.on_device(batch), self.features(pixels)

    def load_text(self) -> Tensor:
        """The untouched model's own text, written once and kept in the run's folder."""
        path = self.folder / "own_text.pt"
        if not path.exists():
            self.adapters.switch(False)
            self.model.set_attn_implementation("sdpa")
            text = write_text(self.model, self.tokenizer, self.args.row_length, self.args.seed)
            self.model.set_attn_implementation("packed_rows")
            self.adapters.switch(True)
            torch.save(text, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        return torch.load(path, map_location=self.args.device, weights_only=True)

    # --- warm start ---

    def warm_start(self) -> None:
        """Patches of objects point at words among the embeddings, by cosine; the norm starts at
        that of text."""
        args, rng = self.args, Random(f"{self.args.seed}-smol-warm")
        examples = [example(draw_scene(rng, 1)) for _ in range(WARM_SCENES)]
        pixels = [row.pixels for row in examples]
        starts = range(0, len(pixels), 50)
        features = torch.cat([self.features(pixels[start : start + 50]) for start in starts])
        self.connector.mean.copy_(features.mean((0, 1)))
        self.connector.std.copy_(features.std((0, 1)))
        if args.warm_start == "none":
            return
        embeddings = self.model.get_input_embeddings().weight.float()
        norm = embeddings.norm(dim=-1).mean()
        directions = []
        for words in (ALL_COLORS, ALL_SHAPES):
            # the control's code tells objects apart as well, by words of other colours and shapes
            shift = len(words) // 2 if args.warm_start == "permuted" else 0
            ids = [word_id(self.tokenizer, word) for word in words[shift:] + words[:shift]]
            directions.append(F.normalize(embeddings[ids], dim=-1))
        labels = [
            torch.from_numpy(np.stack(label)).to(args.device)
            for label in ([row.color for row in examples], [row.shape for row in examples])
        ]
        optimizer = torch.optim.AdamW(self.connector.parameters(), lr=2e-3, weight_decay=0.0)
        for step in range(args.warm_steps):
            rows = [rng.randrange(len(examples)) for _ in range(WARM_BATCH)]
            vision = self.connector(features[rows])
            on = labels[0][rows] > 0
            pointing = F.normalize(vision[on], dim=-1)
            loss = 0.01 * (vision.norm(dim=-1) - norm).pow(2).mean()
            for code, label in zip(directions, labels, strict=True):
                loss = loss + F.cross_entropy(SHARPNESS * pointing @ code.T, label[rows][on] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 99:
                print(f"warm start {step + 1}: loss {loss.item():.3f}", flush=True)

    # --- one step ---

    def rate(self, steps: int) -> float:
        """Share of the full learning rate: linear warm-up, constant, then half a cosine."""
        share = max(0.0, self.step / steps - DECAY_FROM) / (1 - DECAY_FROM)
        falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2
        return falling * min(1.0, (self.step + 1) / WARMUP_STEPS)

    def train_step(self, steps: int) -> None:
        """One update. The loss on the answers is cross entropy, each answer weighted by the root of
        its length."""
        batch, features = self.draw(self.stage, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * self.rate(steps)
        self.optimizer.zero_grad()
        logits, labels, place = answer_logits(self.model, batch, self.connector(features))
        weights = batch["weights"][:, 1:][place]
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        if self.stage == 2 and self.step % TEXT_EVERY == TEXT_EVERY - 1:
            self.divergence().backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())

    def divergence(self) -> Tensor:
        """KL(untouched || adapted) of the next word on one row of the untouched model's own
        text."""
        turn = self.step // TEXT_EVERY
        row = self.own_text[turn % len(self.own_text)][None]
        asked = slice(turn % TEXT_STRIDE, None, TEXT_STRIDE)
        with torch.no_grad():
            self.adapters.switch(False)
            wanted = text_log_shares(self.model, row, asked)
            self.adapters.switch(True)
        found = text_log_shares(self.model, row, asked)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    # --- measures ---

    @torch.no_grad()
    def english_loss(self) -> float:
        """Mean cross entropy of the next word on the page of English."""
        ids = torch.tensor([self.packer.encode(ENGLISH)], device=self.args.device)
        log_shares = text_log_shares(self.model, ids, slice(None, -1))
        return F.nll_loss(log_shares, ids[0, 1:]).item()

    @torch.no_grad()
    def evaluate(self) -> Record:
        """Accuracy by kind of question on held-out scenes, English and the length of vision tokens
        beside that of text."""
        rng = Random(f"{self.args.seed}-smol-held-out")
        hits, norms = defaultdict(list), []
        for start in range(0, self.args.eval_scenes, 4):
            scenes = [floor_scene(rng, count) for count in (2, 3, 4)] + [corridor_scene(rng)]
            system = SYSTEMS[start // 4 % 2]
            asked = [held_out_questions(rng, scene) for scene in scenes]
            rows = [self.packer.row(system, [question for _, question in named]) for named in asked]
            batch = self.on_device(self.packer.batch(rows))
            vision = self.connector(self.features([example(scene).pixels for scene in scenes]))
            norms.append(vision.norm(dim=-1).mean().item())
            logits, labels, place = answer_logits(self.model, batch, vision)
            right = torch.ones_like(place)
            right[place] = logits.argmax(-1) == labels
            turns = batch["turns"][:, 1:]
            for i, named in enumerate(asked):
                for number, (name, _) in enumerate(named, 1):
                    hits[name].append(bool(right[i][turns[i] == number].all()))
        text_norm = self.model.get_input_embeddings().weight.float().norm(dim=-1).mean().item()
        return {
            "accuracy": {
                name: round(sum(found) / len(found), 3) for name, found in sorted(hits.items())
            },
            "asked": {name: len(found) for name, found in sorted(hits.items())},
            "english": round(self.english_loss() / self.english, 4),
            "vision_norm": round(sum(norms) / len(norms) / text_norm, 2),
        }


class Log:
    """log.jsonl, without the lines after the saved state: those steps come again."""

    def __init__(self, path: Path, stage: int, step: int):
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if self.is_before(line, stage, step)]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(kept))
        scratch.replace(path)

    @staticmethod
    def is_before(line: str, stage: int, step: int) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
            return False
        return (entry["stage"], entry["step"]) <= (stage, step)

    def write(self, **entry: object) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(line + "\n")


def run_stage(trainer: Trainer, steps: int, left_after: int, log: Log, deadline: float) -> bool:
    """Train until the stage's last step; False if the deadline came first."""
    args, out = trainer.args, Path(trainer.args.out) / trainer.args.warm_start
    snapshots: dict[int, str] = {}
    if trainer.stage == 2:
        snapshots = {step: f"stage2-{step}" for step in SNAPSHOTS} | {steps: "stage2"}
    began = saved = time.monotonic()
    first = trainer.step
    while trainer.step < steps:
        trainer.train_step(steps)
        step, now = trainer.step, time.monotonic()
        if step % LOG_EVERY == 0 or step == steps:
            seconds = (now - began) / (step - first)
            entry = {
                "stage": trainer.stage,
                "step": step,
                "loss": round(float(np.mean(trainer.losses)), 4),
                "seconds_a_step": round(seconds, 2),
                "hours_left": round(seconds * (steps - step + left_after) / 3600, 2),
            }
            if step % args.eval_every == 0 or step == steps:
                entry |= trainer.evaluate()
            log.write(**entry)
            trainer.losses = []
        if step in snapshots:
            write_part(out / snapshots[step], trainer.connector, trainer.adapters)
        if now - saved > 60 * args.save_every or now > deadline:
            trainer.save()
            saved = time.monotonic()
        if now > deadline and step < steps:
            return False
    if trainer.stage == 1:
        write_part(out / "stage1", trainer.connector, None)
    trainer.save()
    return True

"""How the tiny models are trained: pictures, the state of a stage, the tower's dense loss.

Projector and decoder are in decoder_training.py; checkpoints/train_tiny.py says in which order.

Everything random comes from (seed, stage, step), so a stage that goes on from its saved state gives
the same weights as one that was never stopped.

Shapes: B pictures of a batch, H, W their pixels, P patches, d width.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk
from vlmdiag.scenes.tiny_llava import (
    ALL_COLORS,
    ALL_SHAPES,
    TOWER_WIDTH,
    Example,
    SceneTask,
    make_example,
    normalized,
)

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Float32, Int64
    from transformers import CLIPVisionModel, LlavaForConditionalGeneration

Pool = list[Example]

# height in the picture and depth in floor scenes, as in photographs; 0 for the independent twin
CORRELATION = 0.8
POOL_SHARES: dict[int | str, float] = {1: 0.15, 2: 0.25, 3: 0.25, 4: 0.2, "corridor": 0.15}
HELD_OUT = 640  # pictures that are not trained on
TOWER_BATCH = 48
TOWER_REPORT = 250  # steps between two reports
LABELS = [len(ALL_COLORS) + 1, len(ALL_SHAPES) + 1]  # colours and shapes, with "no object"


@dataclass(frozen=True)
class Options:
    """What all stages share."""

    folder: Path  # of the states and of the drawn pictures
    seed: int
    device: str
    deadline: float  # time.monotonic() after which a stage stops at its next report


# --- pictures -------------------------------------------------------------------------------------


def make_pool(
    count: int, options: Options, correlation: float = CORRELATION, held_out: bool = False
) -> Pool:
    """About `count` examples by kind: one object, two to four, corridor. Kept in a file."""
    name = f"pictures-{count}-{options.seed}-{correlation}-{held_out}.pkl"
    path = options.folder / name
    if path.exists():
        pool: Pool = pickle.loads(path.read_bytes())
        return pool
    part = f"{options.seed}-{'test' if held_out else 'train'}"
    tasks: list[SceneTask] = [
        (part, index, kind, correlation)
        for kind, share in POOL_SHARES.items()
        for index in range(round(count * share))
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        examples = workers.map(make_example, tasks, chunksize=50)
        pool = list(tqdm(examples, total=len(tasks), desc="pictures", disable=held_out))
    disk.write_bytes(path, pickle.dumps(pool))
    return pool


def held_out_pool(options: Options, correlation: float) -> Pool:
    """Pictures that are not trained on, in a fixed random order."""
    pool = make_pool(HELD_OUT, options, correlation, held_out=True)
    Random(0).shuffle(pool)
    return pool


def column(pool: Pool, indices: Sequence[int], field: str, device: str) -> Tensor:
    """One field of some examples, (B, ...)."""
    arrays = [getattr(pool[index], field) for index in indices]
    return torch.from_numpy(np.stack(arrays)).to(device)


def _pixels(examples: Sequence[Example], device: str) -> Float32[Tensor, "B 3 H W"]:
    return normalized(np.stack([example.pixels for example in examples])).to(device)


# --- the state of a stage -------------------------------------------------------------------------


class Stage:
    """The state of one training stage: what is trained, its optimizers and the step, kept in one
    file."""

    warmup = 50  # steps
    decay_from = 0.5  # share of the steps after which the learning rate falls

    def __init__(
        self,
        options: Options,
        name: str,
        steps: int,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.options = options
        self.name = name
        self.steps = steps
        self.modules = modules
        self.optimizers = optimizers
        self.step = 0
        # what has a state_dict, in the order of the file
        self.holders: list[nn.Module | torch.optim.Optimizer] = [*modules, *optimizers]
        self.path = options.folder / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=options.device, weights_only=True)
            self.step = state["step"]
            for holder, part in zip(self.holders, state["parts"], strict=True):
                holder.load_state_dict(part)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("base_lr", group["lr"])

    def set_learning_rate(self) -> None:
        """Linear warm-up, then constant, then linear to zero."""
        share = self.step / self.steps
        rising = min(1, (self.step + 1) / self.warmup)
        falling = min(1, max(0.01, (1 - share) / (1 - self.decay_from)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * (rising * falling)

    def save(self) -> None:
        """Write the state, in one step."""
        state = {"step": self.step, "parts": [holder.state_dict() for holder in self.holders]}
        disk.make_folder(self.path)
        with disk.in_one_step(self.path) as temporary:
            torch.save(state, temporary)

    def run(
        self, loss_of: Callable[[int], Tensor], every: int, report: Callable[[int, float], None]
    ) -> bool:
        """Train on loss_of(step) until done; report and save every `every` steps. False if the time
        is up first."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        parameters = [
            parameter
            for module in self.modules
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        while self.step < self.steps:
            self.set_learning_rate()
            loss = loss_of(self.step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            bar.update()
            if self.step % every == 0 or self.step == self.steps:
                report(self.step, loss.item())
                self.save()
                if time.monotonic() > self.options.deadline and self.step < self.steps:
                    return False
        return True


def load_part(folder: Path, stage: str, module: nn.Module) -> None:
    """Load what an earlier stage trained. UsageError where it was not run."""
    path = folder / f"{stage}.pt"
    if not path.exists():
        raise UsageError(f"{path} is missing: run the stage {stage!r} first")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["parts"][0])


def optimizers_for(modules: Sequence[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks, AdamW for embeddings, norms and biases."""
    matrices: list[nn.Parameter] = []
    others: dict[int, nn.Parameter] = {}  # by identity: the LM head is the embedding
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
                matrices.append(parameter)
            else:
                others[id(parameter)] = parameter
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(list(others.values()), lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


# --- tower ----------------------------------------------------------------------------------------


def train_tower(options: Options, steps: int, tower: CLIPVisionModel, pool: Pool) -> bool:
    """Dense loss on the layer that LLaVA reads (-2) and, through the post layer norm, on the last
    one. Returns whether it is done."""
    device = options.device
    outputs = sum(LABELS) + 2  # and the centre
    heads = nn.ModuleList([nn.Linear(TOWER_WIDTH, outputs) for _ in range(2)]).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01)
    stage = Stage(options, "tower", steps, [tower, heads], [optimizer])
    tower.train().requires_grad_(True)
    measured: dict[str, float] = {}  # accuracies of the last step, by the second head

    def loss_of(step: int) -> Tensor:
        rng = Random(f"{options.seed}-tower-{step}")
        indices = rng.sample(range(len(pool)), TOWER_BATCH)
        color = column(pool, indices, "color", device)
        shape = column(pool, indices, "shape", device)
        center = column(pool, indices, "center", device)
        with torch.autocast(device, dtype=torch.bfloat16):
            pixels = _pixels([pool[index] for index in indices], device)
            states = tower(pixels, output_hidden_states=True).hidden_states
        has_object = color > 0
        weight = torch.where(has_object, 1.0, 0.1).flatten()
        loss = torch.zeros((), device=device)
        read_states = (states[-2], tower.post_layernorm(states[-1]))
        for head, state in zip(heads, read_states, strict=True):
            patches = head(state[:, 1:].float())  # without the CLS token
            color_logits, shape_logits, place = patches.split([*LABELS, 2], -1)
            for logits, target in ((color_logits, color), (shape_logits, shape)):
                flat = logits.flatten(0, 1)
                entropy = F.cross_entropy(flat, target.flatten(), reduction="none")
                loss = loss + 3 * (entropy * weight).mean()
            error = (place - center)[has_object]
            loss = loss + 6 * (error**2).mean()
            measured["color"] = _accuracy(color_logits[has_object], color[has_object])
            measured["shape"] = _accuracy(shape_logits[has_object], shape[has_object])
            measured["centre"] = error.abs().mean().item()
        return loss

    def report(step: int, loss: float) -> None:
        figures = " ".join(f"{name} {number:.3f}" for name, number in measured.items())
        tqdm.write(f"tower {step} loss {loss:.3f} {figures}")

    return stage.run(loss_of, TOWER_REPORT, report)


def _accuracy(logits: Float[Tensor, "n C"], target: Int64[Tensor, " n"]) -> float:
    return (logits.argmax(-1) == target).float().mean().item()


@torch.no_grad()
def tower_features(
    options: Options, model: LlavaForConditionalGeneration, pool: Pool
) -> BFloat16[Tensor, "n P d"]:
    """What the projector reads, computed once for the frozen tower."""
    tower = model.model.vision_tower.eval().requires_grad_(False)
    layers = model.config.vision_feature_layer
    if isinstance(layers, int):
        layers = [layers]
    batches = []
    for start in tqdm(range(0, len(pool), 64), desc="features"):
        pixels = _pixels(pool[start : start + 64], options.device)
        states = tower(pixels, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer][:, 1:] for layer in layers], -1)
        batches.append(features.bfloat16().cpu())
    return torch.cat(batches)

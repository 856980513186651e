"""How the tiny models are trained: pictures, the state of a stage, the tower's dense loss, question
turns for projector and decoder. checkpoints/train_tiny.py says in which order.

Everything random comes from (seed, stage, step), so a stage that goes on from its saved state gives
the same weights as one that was never stopped.

Shapes: B pictures of a batch, P patches, T positions of a packed row, d width, A answer tokens.
"""

from __future__ import annotations

import collections
import json
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from vlmdiag.cli import UsageError
from vlmdiag.families.llava import NormedLlava
from vlmdiag.runs import disk
from vlmdiag.scenes.packing import NO_TARGET, PACKED, Packed, Packer
from vlmdiag.scenes.questions import (
    Mix,
    Question,
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
)
from vlmdiag.scenes.tiny_llava import (
    ALL_COLORS,
    ALL_SHAPES,
    TOWER_WIDTH,
    WIDTH,
    Example,
    SceneTask,
    make_config,
    make_example,
    normalized,
    word_id,
)

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Float32, Int64
    from transformers import CLIPVisionModel, LlavaProcessor

Pool = list[Example]
Mixes = Mapping[str, Mix]  # by kind of scene; a kind without one takes the training mix

# height in the picture and depth in floor scenes, as in photographs; 0 for the independent twin
CORRELATION = 0.8
POOL_SHARES: dict[int | str, float] = {1: 0.15, 2: 0.25, 3: 0.25, 4: 0.2, "corridor": 0.15}
HELD_OUT = 640  # pictures that are not trained on
TOWER_BATCH = 48
DECODER_BATCH = 20
FROM_SCRATCH = ("base", "independent")
SNAPSHOTS = (1000, 1500, 2000, 2500)  # steps of the base run: tiny-llava-scale1..4
ONE_OBJECT_STEPS = 400  # mostly one-object scenes, naming and place questions
# patches are named through a head that is thrown away; from then to half of the run through the LM
# head; then not at all
OWN_HEAD_STEPS = 1000
TOWER_REPORT = 250  # steps between two reports
DECODER_REPORT = 500
LABELS = [len(ALL_COLORS) + 1, len(ALL_SHAPES) + 1]  # colours and shapes, with "no object"

PROTOCOL_MIX: Mix = {ask_protocol: 1}
NAMING_MIX: Mix = {
    ask_where: 50,
    ask_presence: 15,
    ask_color: 8,
    ask_shape: 8,
    ask_caption: 9,
    ask_relation: 10,
}
LATE_MIX: Mix = {
    ask_relation: 25,
    ask_where: 8,
    ask_presence: 10,
    ask_confusable: 35,
    ask_color: 4,
    ask_shape: 4,
    ask_what: 4,
    ask_count: 5,
    ask_caption: 8,
}
LATE_CORRIDOR_MIX: Mix = {
    ask_camera: 60,
    ask_relation: 20,
    ask_where: 5,
    ask_presence: 5,
    ask_confusable: 10,
    ask_caption: 5,
}


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


def _column(pool: Pool, indices: Sequence[int], field: str, device: str) -> Tensor:
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
        color = _column(pool, indices, "color", device)
        shape = _column(pool, indices, "shape", device)
        center = _column(pool, indices, "center", device)
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


# --- projector and decoder ------------------------------------------------------------------------


class Decoder(nn.Module):
    """The trained parts of a LLaVA model behind its tower, with packed attention."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.image = model.config.image_token_id
        self.language_model.set_attn_implementation(PACKED)

    def forward(
        self,
        features: Float[Tensor, "B P f"],
        ids: Int64[Tensor, "B T"],
        positions: Int64[Tensor, "B T"],
        packed: Packed,
    ) -> Float[Tensor, "B T d"]:
        """Last hidden states of all positions."""
        text = self.language_model.embed_tokens(ids)
        vision = self.projector(features).to(text.dtype)
        is_image = ids == self.image
        # which vision token stands at each image position; elsewhere a number that is not used
        index = (is_image.cumsum(1) - 1).clamp(min=0)
        spread = vision.gather(1, index[..., None].expand(-1, -1, text.shape[-1]))
        embeds = torch.where(is_image[..., None], spread, text)
        output = self.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, packed=packed
        )
        states: Tensor = output.last_hidden_state
        return states


class PackedBatch(NamedTuple):
    """Packed rows with what the decoder reads."""

    features: Float[Tensor, "B P f"]
    ids: Int64[Tensor, "B T"]
    positions: Int64[Tensor, "B T"]
    packed: Packed
    targets: Int64[Tensor, "B T"]
    weights: Float32[Tensor, "B T"]
    questions: list[list[Question]]  # row by row


class DecoderTraining:
    """Question turns over frozen features.

    In the first half of a run from scratch each object patch is to name its colour and shape as
    well, by a head that is thrown away at first, then by the LM head; in the second half nothing
    asks for it.
    """

    def __init__(
        self,
        options: Options,
        name: str,
        steps: int,
        lr: float,
        model: LlavaForConditionalGeneration,
        pool: Pool,
        held_out: Pool,
        packer: Packer,
        save: Callable[[str], None],
    ) -> None:
        """save(folder's name): write the model as it is."""
        self.options = options
        self.name = name
        self.steps = steps
        self.pool = pool
        self.held_out = held_out
        self.packer = packer
        self.save = save
        self.features = tower_features(options, model, pool)
        self.held_out_features = tower_features(options, model, held_out)
        device = options.device
        self.decoder = Decoder(model).to(device).train()
        self.naming = nn.Linear(WIDTH, sum(LABELS)).to(device)
        modules = [self.decoder, self.naming]
        self.stage = Stage(options, name, steps, modules, optimizers_for(modules, lr))
        self.is_from_scratch = name in FROM_SCRATCH
        self.indices: dict[str, list[int]] = collections.defaultdict(list)  # by kind of scene
        for index, example in enumerate(pool):
            is_single = len(example.scene.things) == 1
            self.indices["one" if is_single else example.scene.kind].append(index)
        tokenizer = packer.tokenizer
        self.color_ids = torch.tensor([word_id(tokenizer, word) for word in ALL_COLORS]).to(device)
        self.shape_ids = torch.tensor([word_id(tokenizer, word) for word in ALL_SHAPES]).to(device)
        self.losses: collections.deque[float] = collections.deque(maxlen=100)  # without naming

    def run(self) -> bool:
        """Train; whether it is done."""
        return self.stage.run(self.loss_of, DECODER_REPORT, self.report)

    def _batch(
        self,
        rng: Random,
        pool: Pool,
        features: BFloat16[Tensor, "n P f"],
        indices: Sequence[int],
        layout: str,
        mixes: Mixes,
    ) -> PackedBatch:
        """Packed rows about the pictures with these indices."""
        system = rng.random() < 0.35
        rows = []
        questions = []
        for index in indices:
            scene = pool[index].scene
            row, of_row = self.packer.row(rng, scene, system, layout, mixes.get(scene.kind))
            rows.append(row)
            questions.append(of_row)
        ids, targets, weights, positions = (
            torch.from_numpy(np.stack(arrays)).to(self.options.device)
            for arrays in zip(*rows, strict=True)
        )
        slots, size = self.packer.LAYOUTS[layout]
        packed = (ids.shape[1] - slots * size, slots, size)
        of_pictures = features[indices].to(self.options.device)
        return PackedBatch(of_pictures, ids, positions, packed, targets, weights, questions)

    def _states(self, batch: PackedBatch) -> Float[Tensor, "B T d"]:
        states: Tensor = self.decoder(batch.features, batch.ids, batch.positions, batch.packed)
        return states

    def _training_batch(self, step: int) -> tuple[PackedBatch, list[int]]:
        """The batch of a step, and the indices of its pictures."""
        rng = Random(f"{self.options.seed}-{self.name}-{step}")
        is_early = self.is_from_scratch and step < ONE_OBJECT_STEPS
        share_of_long = 0.06 if self.is_from_scratch else 0.3
        is_long = not is_early and rng.random() < share_of_long
        mixes: Mixes = {}
        if is_early:
            weights = [80, 20, 0]
            mixes = {"floor": NAMING_MIX}
        elif is_long:
            weights = [8, 92, 0]
            mixes = {"floor": PROTOCOL_MIX}
        elif self.is_from_scratch:
            weights = [8, 80, 12]
        else:
            weights = [5, 60, 35]
            mixes = {"floor": LATE_MIX, "corridor": LATE_CORRIDOR_MIX}
        kinds = rng.choices(["one", "floor", "corridor"], weights=weights, k=DECODER_BATCH)
        indices = [rng.choice(self.indices[kind]) for kind in kinds]
        layout = "long" if is_long else "short"
        return self._batch(rng, self.pool, self.features, indices, layout, mixes), indices

    def loss_of(self, step: int) -> Tensor:
        """Cross-entropy of the answers' tokens, and in the first half the naming loss."""
        batch, indices = self._training_batch(step)
        is_answer = batch.targets[:, 1:] != NO_TARGET
        with torch.autocast(self.options.device, dtype=torch.bfloat16):
            states = self._states(batch)
            logits = self.decoder.lm_head(states[:, :-1][is_answer]).float()  # (A, V)
        entropy = F.cross_entropy(logits, batch.targets[:, 1:][is_answer], reduction="none")
        loss = (entropy * batch.weights[:, 1:][is_answer]).sum() / batch.weights.sum()
        self.losses.append(loss.item())
        if self.is_from_scratch and step / self.steps < 0.5:
            return loss + 0.2 * self._naming_loss(step, batch, states, indices)
        # so that the head has a gradient of 0, and its optimizer goes on alike
        return loss + 0.0 * self.naming.weight.sum()

    def _naming_loss(
        self, step: int, batch: PackedBatch, states: Float[Tensor, "B T d"], indices: Sequence[int]
    ) -> Tensor:
        """Cross-entropy of colour and shape at the patches of objects."""
        color = _column(self.pool, indices, "color", self.options.device)
        shape = _column(self.pool, indices, "shape", self.options.device)
        has_object = color > 0
        is_image = batch.ids == self.decoder.image
        patches = states[is_image].float().unflatten(0, color.shape)[has_object]
        if step < OWN_HEAD_STEPS:
            color_logits, shape_logits = self.naming(patches).split(LABELS, -1)
            color_target = color[has_object]
            shape_target = shape[has_object]
        else:
            color_logits = shape_logits = self.decoder.lm_head(patches)
            color_target = self.color_ids[color[has_object] - 1]
            shape_target = self.shape_ids[shape[has_object] - 1]
        return F.cross_entropy(color_logits, color_target) + F.cross_entropy(
            shape_logits, shape_target
        )

    @torch.no_grad()
    def report(self, step: int, _: float) -> None:
        """Print and log the accuracy on held-out pictures by kind of question; write the snapshots
        of the base run."""
        accuracy = self._held_out_accuracy()
        loss = float(np.mean(self.losses))
        tqdm.write(f"{self.name} {step} loss {loss:.4f} held out {json.dumps(accuracy)}")
        with open(self.options.folder / f"{self.name}.log", "a") as log:
            log.write(json.dumps({"step": step, "loss": loss, **accuracy}) + "\n")
        if self.name == "base" and step in SNAPSHOTS:
            self.save(f"tiny-llava-scale{SNAPSHOTS.index(step) + 1}")

    def _held_out_accuracy(self) -> dict[str, float]:
        """{kind of question: share of turns with every token of the answer right}: 320 pictures
        with short questions, 80 with those of the critique loop."""
        rng = Random("held-out")
        right: collections.Counter[str] = collections.Counter()
        asked: collections.Counter[str] = collections.Counter()
        for start in range(0, min(len(self.held_out), 400), 20):
            indices = list(range(start, start + 20))
            layout = "short"
            mixes: Mixes = {}
            if start >= 320:
                layout = "long"
                mixes = {"floor": PROTOCOL_MIX}
                indices = [index for index in indices if self.held_out[index].scene.kind == "floor"]
            batch = self._batch(rng, self.held_out, self.held_out_features, indices, layout, mixes)
            with torch.autocast(self.options.device, dtype=torch.bfloat16):
                guess = self.decoder.lm_head(self._states(batch))[:, :-1].argmax(-1)
            targets = batch.targets[:, 1:]
            is_good = (guess == targets) | (targets == NO_TARGET)
            prefix, slots, size = batch.packed
            by_turn = is_good[:, prefix - 1 :].unflatten(1, (slots, size)).all(-1)
            for of_row, questions in zip(by_turn.tolist(), batch.questions, strict=True):
                for is_right, question in zip(of_row, questions, strict=True):
                    right[question.kind] += is_right
                    asked[question.kind] += 1
        return {kind: round(right[kind] / count, 3) for kind, count in sorted(asked.items())}


# --- variants and files ---------------------------------------------------------------------------


def text_norms(model: LlavaForConditionalGeneration, packer: Packer) -> tuple[float, float]:
    """Mean and maximum L2 norm of the embeddings of caption tokens: the constants that the papers
    took as 0.83 and 1.22."""
    rng = Random(0)
    ids: list[int] = []
    for index in range(200):
        example = make_example(("norms", index, 2 + index % 3, CORRELATION))
        ids += packer.turn(ask_caption(rng, example.scene))[1]
    norms = model.get_input_embeddings().weight.detach()[ids].norm(dim=-1)
    return norms.mean().item(), norms.max().item()


def make_variant(
    name: str, base: LlavaForConditionalGeneration, packer: Packer, device: str
) -> LlavaForConditionalGeneration:
    """plain, normWmean or multilayerNorm (Beyond Semantics), with the base's weights wherever the
    shapes agree."""
    mean, largest = text_norms(base, packer)
    norm = {"type": "rms_clip", "eps": 1e-6, "max_norm": largest, "scale": mean}
    if name == "plain":
        variant = LlavaForConditionalGeneration(make_config(packer.tokenizer))
    elif name == "normWmean":
        variant = NormedLlava(make_config(packer.tokenizer, vision_embed_norm=norm))
    else:
        config = make_config(
            packer.tokenizer,
            vision_feature_layer=[2, 3, 4, 5],
            vision_embed_norm=norm,
            vision_feature_post_layernorm=True,
        )
        variant = NormedLlava(config)
    variant = variant.to(device)
    shapes = {key: weight.shape for key, weight in variant.state_dict().items()}
    weights = {
        key: weight
        for key, weight in base.state_dict().items()
        if key in shapes and shapes[key] == weight.shape
    }
    variant.load_state_dict(weights, strict=False)
    return variant


def save_model(
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    tokenizer_model: Path,
) -> None:
    """Write the model in bfloat16 without touching the weights that go on being trained."""
    weights = {
        name: weight.to(torch.bfloat16)
        for name, weight in model.state_dict().items()
        if weight.is_floating_point()
    }
    model.save_pretrained(folder, state_dict=weights)
    config = json.loads((folder / "config.json").read_text())
    for section in (config, config["text_config"], config["vision_config"]):
        section["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    tqdm.write(f"wrote {folder}")

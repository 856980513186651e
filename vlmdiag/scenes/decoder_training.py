"""How projector and decoder of the tiny models are trained: question turns over frozen tower
features. Pictures, the state of a stage and the tower are in training.py.

Shapes: B pictures of a batch, P patches, f width of the tower's features, T positions of a packed
row, d width, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from vlmdiag.families.llava import NormedLlava
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
    WIDTH,
    make_config,
    make_example,
    word_id,
)
from vlmdiag.scenes.training import (
    CORRELATION,
    LABELS,
    Options,
    Pool,
    Stage,
    column,
    optimizers_for,
    tower_features,
)

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Float32, Int64
    from transformers import LlavaProcessor

Mixes = Mapping[str, Mix]  # by kind of scene; a kind without one takes the training mix

DECODER_BATCH = 20
DECODER_REPORT = 500  # steps between two reports
FROM_SCRATCH = ("base", "independent")
SNAPSHOTS = (1000, 1500, 2000, 2500)  # steps of the base run: tiny-llava-scale1..4
ONE_OBJECT_STEPS = 400  # mostly one-object scenes, naming and place questions
# patches are named through a head that is thrown away; from then to half of the run through the LM
# head; then not at all
OWN_HEAD_STEPS = 1000

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
        color = column(self.pool, indices, "color", self.options.device)
        shape = column(self.pool, indices, "shape", self.options.device)
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

"""Train the tiny models of this folder: real LLaVA models, small enough for a laptop, on pictures
whose content is known.

    # all of them, one after the other; run again to go on after an interruption
    python checkpoints/train_tiny.py
    # only some stages; --stop_after MINUTES ends in time and keeps the state
    python checkpoints/train_tiny.py --stages tower base

Stages, each resumed from checkpoints/.train/<stage>.pt and written to checkpoints/<model>/ at its
end:
    tower         CLIP tower by a dense loss: colour, shape and centre of the object at each patch
                  (stands in for CLIP's pretraining; no depth)
    base          projector and decoder on packed question turns over frozen tower features ->
                  tiny-llava-scale1..4 on the way
    late          the base goes on with more corridors, more critique, revise and decide prompts,
                  and absent objects in the colour of one that is there
    plain, normWmean, multilayerNorm   the same goes on alike: as it is, behind a normalised
                                       projector, and behind one on four tower layers
                  (Beyond Semantics) -> tiny-llava, tiny-llava-<stage>
    independent   the twin of the base run, on floor scenes whose height in the picture says nothing
                  about depth -> tiny-llava-independent

Relations come last and suddenly; held-out accuracy by kind is printed on the way. Everything random
comes from (--seed, step).
"""

import collections
import json
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from vlmdiag import cli
from vlmdiag.families.llava import NormedLlava
from vlmdiag.scenes.questions import (
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
    Packer,
    make_config,
    make_example,
    make_processor,
    make_tokenizer,
    normalized,
)

HERE = Path(__file__).resolve().parent
NAMING_MIX = {
    ask_where: 50,
    ask_presence: 15,
    ask_color: 8,
    ask_shape: 8,
    ask_caption: 9,
    ask_relation: 10,
}
ONE_OBJECT_STEPS = 400  # mostly one-object scenes, naming and place questions
# patches are named through a head that is thrown away; from then to half of the run through the LM
# head; then not at all
OWN_HEAD_STEPS = 1000
LATE_MIX = {
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
LATE_CORRIDOR_MIX = {
    ask_camera: 60,
    ask_relation: 20,
    ask_where: 5,
    ask_presence: 5,
    ask_confusable: 10,
    ask_caption: 5,
}
STAGES = ["tower", "base", "late", "plain", "normWmean", "multilayerNorm", "independent"]
FROM_SCRATCH = ("base", "independent")
# of height in the picture and depth in floor scenes, as in photographs; 0 for the independent twin
CORRELATION = 0.8
SNAPSHOTS = (1000, 1500, 2000, 2500)  # steps of the base run: tiny-llava-scale1..4
BATCH = {"tower": 48, "decoder": 20}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--scenes", type=int, default=16000, help="pictures to train on")
    parser.add_argument("--tower_steps", type=int, default=2500)
    parser.add_argument("--base_steps", type=int, default=3500)
    parser.add_argument(
        "--independent_steps",
        type=int,
        default=5000,
        help="relations come later where height does not give depth away",
    )
    parser.add_argument("--late_steps", type=int, default=1000)
    parser.add_argument("--variant_steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop_after",
        type=float,
        default=110,
        help="minutes after which the state is kept and the run ends",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out_dir", default=str(HERE), help="folder of the models; the state is in its .train"
    )
    return parser.parse_args(argv)


def make_pool(scenes, seed, folder, correlation=CORRELATION, held_out=False):
    """Examples by kind: one object, two to four, corridor. Each: (scene, pixels, colour, shape,
    centre). Kept in folder."""
    shares = {1: 0.15, 2: 0.25, 3: 0.25, 4: 0.2, "corridor": 0.15}
    kept = folder / f"pictures-{scenes}-{seed}-{correlation}-{held_out}.pkl"
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    part = f"{seed}-{'test' if held_out else 'train'}"
    tasks = [
        (part, i, kind, correlation)
        for kind, share in shares.items()
        for i in range(round(scenes * share))
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        pool = list(
            tqdm(
                workers.map(make_example, tasks, chunksize=50),
                total=len(tasks),
                desc="pictures",
                disable=held_out,
            )
        )
    scratch = kept.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(pickle.dumps(pool))
    scratch.replace(kept)
    return pool


def columns(pool, rows, i, device):
    return torch.from_numpy(np.stack([pool[row][i] for row in rows])).to(device)


class Stage:
    """The state of one training stage: what is trained, its optimizers and the step, kept in one
    file."""

    def __init__(self, args, name, steps, modules, optimizers, warmup=50, decay_from=0.5):
        self.args, self.name, self.steps, self.modules, self.optimizers = (
            args,
            name,
            steps,
            modules,
            optimizers,
        )
        self.warmup, self.decay_from, self.step = warmup, decay_from, 0
        self.path = Path(args.out_dir) / ".train" / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            self.step = state["step"]
            for own, kept in zip((*modules, *optimizers), state["parts"], strict=True):
                own.load_state_dict(kept)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("base_lr", group["lr"])

    def set_lr(self):
        """Linear warm-up, then constant, then linear to zero."""
        share = self.step / self.steps
        factor = min(1, (self.step + 1) / self.warmup) * min(
            1, max(0.01, (1 - share) / (1 - self.decay_from))
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        torch.save(
            {
                "step": self.step,
                "parts": [part.state_dict() for part in (*self.modules, *self.optimizers)],
            },
            scratch,
        )
        scratch.replace(self.path)

    def run(self, one_step, every, report):
        """Call one_step(step) until done; report and save every `every` steps. False if the time is
        up first."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        while self.step < self.steps:
            self.set_lr()
            loss = one_step(self.step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(
                [p for module in self.modules for p in module.parameters() if p.requires_grad], 1.0
            )
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            bar.update()
            if self.step % every == 0 or self.step == self.steps:
                report(self.step, loss.item())
                self.save()
                if time.monotonic() > self.args.deadline and self.step < self.steps:
                    return False
        return True


def optimizers_for(modules, lr):
    """Muon for the matrices inside the networks, AdamW for embeddings, norms and biases."""
    named = [
        (name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad
    ]
    matrix = [
        p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    ids = {id(p) for p in matrix}
    rest = list({id(p): p for _, p in named if id(p) not in ids}.values())
    return [
        torch.optim.Muon(matrix, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


# --- tower ----------------------------------------------------------------------------------------


def train_tower(args, tower, pool):
    """Dense loss on the layer that LLaVA reads (-2) and, through the post layer norm, on the last
    one. Returns whether it is done."""
    heads = nn.ModuleList(
        [nn.Linear(TOWER_WIDTH, len(ALL_COLORS) + len(ALL_SHAPES) + 4) for _ in range(2)]
    ).to(args.device)
    stage = Stage(
        args,
        "tower",
        args.tower_steps,
        [tower, heads],
        [
            torch.optim.AdamW(
                [*tower.parameters(), *heads.parameters()], lr=1.5e-3, weight_decay=0.01
            )
        ],
    )
    tower.train().requires_grad_(True)
    seen = {}

    def one_step(step):
        rows = Random(f"{args.seed}-tower-{step}").sample(range(len(pool)), BATCH["tower"])
        color, shape, centre = (columns(pool, rows, i, args.device) for i in (2, 3, 4))
        with torch.autocast(args.device, dtype=torch.bfloat16):
            states = tower(
                normalized(np.stack([pool[row][1] for row in rows])).to(args.device),
                output_hidden_states=True,
            ).hidden_states
        on, loss = color > 0, 0
        weight = torch.where(on, 1.0, 0.1).flatten()
        for head, state in zip(heads, (states[-2], tower.post_layernorm(states[-1])), strict=True):
            color_logits, shape_logits, place = head(state[:, 1:].float()).split(
                [len(ALL_COLORS) + 1, len(ALL_SHAPES) + 1, 2], -1
            )
            for logits, target in ((color_logits, color), (shape_logits, shape)):
                loss = (
                    loss
                    + 3
                    * (
                        F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
                        * weight
                    ).mean()
                )
            loss = loss + 6 * ((place - centre)[on] ** 2).mean()
            seen.update(
                color=(color_logits.argmax(-1) == color)[on].float().mean().item(),
                shape=(shape_logits.argmax(-1) == shape)[on].float().mean().item(),
                centre=(place - centre)[on].abs().mean().item(),
            )
        return loss

    return stage.run(
        one_step,
        250,
        lambda step, loss: tqdm.write(
            f"tower {step} loss {loss:.3f} " + " ".join(f"{k} {v:.3f}" for k, v in seen.items())
        ),
    )


@torch.no_grad()
def tower_features(args, model, pool):
    """What the projector reads, (n, P, width) in bfloat16, computed once for the frozen tower."""
    model.model.vision_tower.eval().requires_grad_(False)
    layers = model.config.vision_feature_layer
    layers, out = [layers] if isinstance(layers, int) else layers, []
    for start in tqdm(range(0, len(pool), 64), desc="features"):
        pixels = normalized(np.stack([example[1] for example in pool[start : start + 64]])).to(
            args.device
        )
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        out.append(torch.cat([states[layer][:, 1:] for layer in layers], -1).bfloat16().cpu())
    return torch.cat(out)


# --- projector and decoder ------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.projector, self.language_model, self.lm_head = (
            model.model.multi_modal_projector,
            model.model.language_model,
            model.lm_head,
        )
        self.image = model.config.image_token_id
        self.language_model.set_attn_implementation("packed_turns")

    def forward(self, features, ids, positions, packed):
        """Last hidden states of all positions (B, T, d)."""
        text, vision = self.language_model.embed_tokens(ids), self.projector(features)
        place = ids == self.image
        index = (place.cumsum(1) - 1).clamp(min=0)
        embeds = torch.where(
            place[..., None],
            vision.to(text.dtype).gather(1, index[..., None].expand(-1, -1, text.shape[-1])),
            text,
        )
        return self.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, packed=packed
        ).last_hidden_state


def train_decoder(args, name, steps, model, pool, test, packer, lr, save):
    """Question turns over frozen features. In the first half of the base run each object patch is
    to name its colour and shape as well, by a head that is thrown away at first, then by the LM
    head; in the second half nothing asks for it. Returns whether it is done.
    """
    features, test_features = tower_features(args, model, pool), tower_features(args, model, test)
    decoder = Decoder(model).to(args.device).train()
    naming = nn.Linear(WIDTH, len(ALL_COLORS) + len(ALL_SHAPES) + 2).to(args.device)
    stage = Stage(args, name, steps, [decoder, naming], optimizers_for([decoder, naming], lr))
    groups = collections.defaultdict(list)
    for i, (scene, *_) in enumerate(pool):
        groups["one" if len(scene.things) == 1 else scene.kind].append(i)
    losses, scratch = collections.deque(maxlen=100), name in FROM_SCRATCH
    color_ids, shape_ids = (
        torch.tensor(
            [packer.tokenizer.encode(f"? {word}")[-1] for word in names], device=args.device
        )
        for names in (ALL_COLORS, ALL_SHAPES)
    )

    def batch(rng, rows, source, source_features, layout, mix=None):
        """Decoder inputs, targets and weights of one batch, and its questions row by row."""
        system = rng.random() < 0.35
        packed, questions = zip(
            *(
                packer.row(
                    rng, source[row][0], system, layout, mix and mix.get(source[row][0].kind, mix)
                )
                for row in rows
            ),
            strict=True,
        )
        ids, targets, weights, positions = (
            torch.from_numpy(np.stack(column)).to(args.device)
            for column in zip(*packed, strict=True)
        )
        slots, size = packer.LAYOUTS[layout]
        return (
            (
                source_features[rows].to(args.device),
                ids,
                positions,
                (ids.shape[1] - slots * size, slots, size),
            ),
            targets,
            weights,
            questions,
        )

    def one_step(step):
        rng, share = Random(f"{args.seed}-{name}-{step}"), step / steps
        early = scratch and step < ONE_OBJECT_STEPS
        layout = "long" if not early and rng.random() < (0.06 if scratch else 0.3) else "short"
        kinds = rng.choices(
            ["one", "floor", "corridor"],
            weights=(
                [80, 20, 0]
                if early
                else [8, 92, 0]
                if layout == "long"
                else [8, 80, 12]
                if scratch
                else [5, 60, 35]
            ),
            k=BATCH["decoder"],
        )
        rows = [rng.choice(groups[kind]) for kind in kinds]
        inputs, targets, weights, _ = batch(
            rng,
            rows,
            pool,
            features,
            layout,
            (
                NAMING_MIX
                if early
                else (
                    {ask_protocol: 1}
                    if layout == "long"
                    else None
                    if scratch
                    else {"floor": LATE_MIX, "corridor": LATE_CORRIDOR_MIX}
                )
            ),
        )
        asked = targets[:, 1:] != -100
        with torch.autocast(args.device, dtype=torch.bfloat16):
            hidden = decoder(*inputs)
            logits = decoder.lm_head(hidden[:, :-1][asked]).float()
        entropy = F.cross_entropy(logits, targets[:, 1:][asked], reduction="none")
        loss = (entropy * weights[:, 1:][asked]).sum() / weights.sum()
        losses.append(loss.item())
        if share < 0.5 and scratch:
            color, shape = columns(pool, rows, 2, args.device), columns(pool, rows, 3, args.device)
            patches, on = (
                hidden[inputs[1] == decoder.image].float().unflatten(0, color.shape),
                color > 0,
            )
            if step < OWN_HEAD_STEPS:
                color_logits, shape_logits = naming(patches[on]).split(
                    [len(ALL_COLORS) + 1, len(ALL_SHAPES) + 1], -1
                )
                loss = loss + 0.2 * (
                    F.cross_entropy(color_logits, color[on])
                    + F.cross_entropy(shape_logits, shape[on])
                )
            else:
                words = decoder.lm_head(patches[on])
                loss = loss + 0.2 * (
                    F.cross_entropy(words, color_ids[color[on] - 1])
                    + F.cross_entropy(words, shape_ids[shape[on] - 1])
                )
        else:
            loss = loss + 0.0 * naming.weight.sum()
        return loss

    @torch.no_grad()
    def report(step, _):
        right, rng = collections.defaultdict(lambda: [0, 0]), Random("held-out")
        for start in range(0, min(len(test), 400), 20):
            rows = list(range(start, start + 20))
            long = start >= 320
            rows = [row for row in rows if not long or test[row][0].kind == "floor"]
            inputs, targets, _, questions = batch(
                rng,
                rows,
                test,
                test_features,
                "long" if long else "short",
                {ask_protocol: 1} if long else None,
            )
            with torch.autocast(args.device, dtype=torch.bfloat16):
                guess = decoder.lm_head(decoder(*inputs))[:, :-1].argmax(-1)
            prefix, slots, size = inputs[3]
            hit = (
                ((guess == targets[:, 1:]) | (targets[:, 1:] == -100))[:, prefix - 1 :]
                .unflatten(1, (slots, size))
                .all(-1)
            )
            for row_hits, row_questions in zip(hit.tolist(), questions, strict=True):
                for good, question in zip(row_hits, row_questions, strict=True):
                    right[question.kind][0] += good
                    right[question.kind][1] += 1
        accuracy = {kind: round(a / n, 3) for kind, (a, n) in sorted(right.items())}
        tqdm.write(f"{name} {step} loss {np.mean(losses):.4f} held out {json.dumps(accuracy)}")
        with open(stage.path.parent / f"{name}.log", "a") as log:
            log.write(json.dumps({"step": step, "loss": float(np.mean(losses)), **accuracy}) + "\n")
        if name == "base":
            if step in SNAPSHOTS:
                save(f"tiny-llava-scale{SNAPSHOTS.index(step) + 1}")

    return stage.run(one_step, 500, report)


def text_norms(model, packer):
    """Mean and maximum L2 norm of the embeddings of caption tokens: the constants that the papers
    took as 0.83 and 1.22."""
    rng, ids = Random(0), []
    for i in range(200):
        ids += packer.turn(ask_caption(rng, make_example(("norms", i, 2 + i % 3, CORRELATION))[0]))[
            1
        ]
    norms = model.get_input_embeddings().weight.detach()[ids].norm(dim=-1)
    return norms.mean().item(), norms.max().item()


def main(argv=None):
    args = parse_args(argv)
    args.deadline = time.monotonic() + 60 * args.stop_after
    out = Path(args.out_dir)
    (out / ".train").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    scratch = out / ".train" / "tokenizer"
    scratch.mkdir(exist_ok=True)
    tokenizer = make_tokenizer(scratch)
    packer, processor = Packer(tokenizer), make_processor(tokenizer)
    model = LlavaForConditionalGeneration(make_config(tokenizer)).to(args.device)
    pools = {}

    def scenes_for(name):
        """(training pictures, held-out pictures in a fixed random order) of a stage."""
        correlation = 0.0 if name == "independent" else CORRELATION
        if correlation not in pools:
            pools.clear()
            pools[correlation] = [
                make_pool(n, args.seed, out / ".train", correlation, held_out=held)
                for n, held in ((args.scenes, False), (640, True))
            ]
            Random(0).shuffle(pools[correlation][1])
        return pools[correlation]

    def save(folder, model):
        """Write the model in bfloat16 without touching the weights that go on being trained."""
        model.save_pretrained(
            out / folder,
            state_dict={
                name: value.to(torch.bfloat16)
                for name, value in model.state_dict().items()
                if value.is_floating_point()
            },
        )
        config = json.loads((out / folder / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "bfloat16"
        (out / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        processor.save_pretrained(out / folder)
        (out / folder / "tokenizer.model").write_bytes((scratch / "tokenizer.model").read_bytes())
        tqdm.write(f"wrote {out / folder}")

    for name in args.stages:
        pool, test = scenes_for(name)
        if name == "tower":
            done = train_tower(args, model.model.vision_tower, pool)
        else:
            load_part(out, "tower", model.model.vision_tower)
            if name in (*FROM_SCRATCH, "late"):
                if name == "independent":  # starts where the base run started
                    torch.manual_seed(args.seed)
                    model = LlavaForConditionalGeneration(make_config(tokenizer)).to(args.device)
                    load_part(out, "tower", model.model.vision_tower)
                steps = {
                    "base": args.base_steps,
                    "late": args.late_steps,
                    "independent": args.independent_steps,
                }[name]
                current, lr, extra = model, 1.5e-3 if name == "late" else 2e-3, {}
                if name == "late":
                    load_part(out, "base", Decoder(model))
            else:
                load_part(out, "late", Decoder(model))
                mean, largest = text_norms(model, packer)
                extra = (
                    {}
                    if name == "plain"
                    else {
                        "vision_embed_norm": {
                            "type": "rms_clip",
                            "eps": 1e-6,
                            "max_norm": largest,
                            "scale": mean,
                        }
                    }
                )
                if name == "multilayerNorm":
                    extra |= {
                        "vision_feature_layer": [2, 3, 4, 5],
                        "vision_feature_post_layernorm": True,
                    }
                current, lr, steps = (
                    (NormedLlava if extra else LlavaForConditionalGeneration)(
                        make_config(tokenizer, **extra)
                    ).to(args.device),
                    1e-3,
                    args.variant_steps,
                )
                own = current.state_dict()
                current.load_state_dict(
                    {
                        k: v
                        for k, v in model.state_dict().items()
                        if k in own and own[k].shape == v.shape
                    },
                    strict=False,
                )
            done = train_decoder(
                args,
                name,
                steps,
                current,
                pool,
                test,
                packer,
                lr,
                lambda folder, current=current: save(folder, current),
            )
            if done and name not in ("base", "late"):
                save("tiny-llava" if name == "plain" else f"tiny-llava-{name}", current)
        if not done:
            print(f"time is up in stage {name}; run the same command again to go on")
            return 3
    return 0


def load_part(out, stage, module):
    """Load what an earlier stage trained."""
    path = out / ".train" / f"{stage}.pt"
    if not path.exists():
        raise cli.UsageError(f"{path} is missing: run the stage {stage!r} first")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["parts"][0])


if __name__ == "__main__":
    cli.run(main)

"""What can a tiny model do? Accuracy by kind of question on scenes of another seed, the logit lens
by layer, and the model card from both.

    python checkpoints/evaluate_tiny.py checkpoints/tiny-llava checkpoints/tiny-llava-normWmean
    checkpoints/tiny-llava-multilayerNorm

Nothing is filtered: relations are asked for every ordered pair of objects whose centres are at
least 12 % apart along the asked axis (5 % is reported too), so both answers come equally often;
half of the absent objects share colour or shape with one that is there. An answer counts if the
first of the possible words in it is the right one; a caption if it names every object with colour
and shape and no other. Intervals are Wilson's, 95 %. Lens: share of patches well inside an object
whose top-1 token, by final norm and LM head, is the object's colour or shape.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from common import load_model
from vlmdiag import cli
from vlmdiag.figures.stats import wilson_interval
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import Probe
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes.questions import (
    AXES,
    ONE_WORD,
    Question,
    absent,
    article,
    ask_caption,
    ask_color,
    ask_count,
    ask_protocol,
    ask_shape,
    ask_what,
    ask_where,
    camera_questions,
    margin,
    relation,
    relations,
    split,
)
from vlmdiag.scenes.scene import corridor_scene, floor_scene, instance_map, render
from vlmdiag.scenes.tiny_llava import ALL_COLORS, ALL_SHAPES

BARS = {
    "yes_no": 0.95,
    "color": 0.95,
    "shape": 0.95,
    "left_right": 0.9,
    "above_below": 0.9,
    "far_close, consistent": 0.9,
    "caption": 0.8,
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("model_path", nargs="+")
    parser.add_argument(
        "--scenes",
        type=int,
        default=150,
        help="floor scenes of two to four objects; a third as many corridors",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1000,
        help="scenes that training never saw: its seeds are named differently",
    )
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--no_card", action="store_true", help="print only")
    return parser.parse_args(argv)


def questions_of(rng, scene):
    """[(group in the table, Question)] for one scene."""
    out = []
    if scene.kind == "corridor":
        for question in camera_questions(*scene.things):
            out.append((f"camera, {split(*scene.things, scene)}", question))
        return out
    for kind, (axis, _, _) in AXES.items():
        for a, b in relations(scene, kind, 0.05):
            name = kind if margin(a, b, axis, scene) >= 0.12 else f"{kind}, 5 to 12 % apart"
            if kind == "far_close" and name == kind:
                far, near = (a, b) if a.z > b.z else (b, a)
                name = f"{kind}, {split(far, near, scene)}"
            out.append((name, relation(kind, a, b)))
    there = rng.choice(scene.things).name
    for name, answer in ((there, "Yes"), (absent(rng, scene), "No")):
        out.append(
            (
                "yes_no",
                Question(
                    "yes_no",
                    f"Is there {article(name)} in {rng.choice(['the', 'this'])} image?",
                    answer,
                    (name,),
                ),
            )
        )
    for ask in (ask_color, ask_shape, ask_what, ask_count, ask_where, ask_caption):
        question = ask(rng, scene)
        if question is not None:
            out.append((question.kind, question))
    for _ in range(2):
        question = ask_protocol(rng, scene)
        if question is not None:
            out.append((question.kind, question))
    return [
        (
            name,
            (
                question
                if i % 2 or question.kind not in (*AXES, "yes_no")
                else Question(question.kind, question.text + ONE_WORD, question.answer)
            ),
        )
        for i, (name, question) in enumerate(out)
    ]


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def is_right(question, answer, scene):
    """Whether a generated answer is right; by whole words."""
    said = words(answer)
    if question.kind == "caption":
        pairs = {
            (a, b)
            for a, b in zip(said, said[1:], strict=False)
            if a in ALL_COLORS and b in ALL_SHAPES
        }
        return pairs == {(thing.color, thing.shape) for thing in scene.things}
    if question.kind in ("where", "revise", "critique"):
        return said == words(question.answer)
    choices = {
        "color": ALL_COLORS,
        "shape": ALL_SHAPES,
        "what": ALL_SHAPES,
        "count": list("0123456789"),
        "decide": ["a", "b"],
        "yes_no": ["yes", "no"],
        "camera": ["yes", "no"],
    } | {kind: list(parts[1:]) for kind, parts in AXES.items()}
    wanted = words(question.answer)[-1] if question.kind == "what" else question.answer.lower()
    return next((word for word in said if word in choices[question.kind]), None) == wanted


class Lens(Probe):
    """Top-1 token of every vision token at every layer of the prefill. top (B, L + 1, P)."""

    wants_hidden = True

    def __init__(self, vlm, batch):
        self.vlm, self.where, self.found = vlm, batch.groups == GROUPS.index("vision"), []

    def hidden(self, index, states):
        if self.step == 0:
            vision = states[self.where].unflatten(0, (len(states), -1))
            self.found.append(self.vlm.parts.lm_head(self.vlm.parts.norm(vision)).argmax(-1))


def lens_hits(vlm, scene, picture, batch, top):
    """(L + 1, 3) hits of colour, shape, either, and the number of patches at least 60 % inside an
    object."""
    objects, hits, count = instance_map(scene), torch.zeros(len(top), 3), 0
    ids = {word: vlm.tokenizer.encode(f"? {word}")[-1] for word in ALL_COLORS + ALL_SHAPES}
    for i, thing in enumerate(scene.things):
        patches = torch.from_numpy(batch.grids[0].coverage(objects == i + 1) >= 0.6)
        color, shape = (top[:, patches] == ids[word] for word in (thing.color, thing.shape))
        hits += torch.stack([color.sum(-1), shape.sum(-1), (color | shape).sum(-1)], -1)
        count += int(patches.sum())
    return hits, count


@torch.inference_mode()
def evaluate(vlm, args):
    """({group: (right, n)}, lens (L + 1, 3), number of patches)."""
    rng, right, asked = Random(f"evaluate-{args.seed}"), defaultdict(lambda: [0, 0]), []
    scenes = [floor_scene(rng, 2 + i % 3) for i in range(args.scenes)] + [
        corridor_scene(rng) for _ in range(args.scenes // 3)
    ]
    hits, patches = 0, 0
    for scene in tqdm(scenes, desc="lens"):
        picture = render(scene)
        features = None
        questions = questions_of(rng, scene)
        if scene.kind == "floor":
            batch = vlm.encode([Sample("0", None, "Describe the image.")], [picture])
            with capture(vlm, [lens := Lens(vlm, batch)]):
                generate(vlm, batch, 1, features=features)
            found, count = lens_hits(vlm, scene, picture, batch, torch.stack(lens.found, 1)[0])
            hits, patches = hits + found, patches + count
        asked += [(name, question, scene, picture) for name, question in questions]
    asked.sort(key=lambda row: len(row[1].text))
    for start in tqdm(range(0, len(asked), args.batch_size), desc="questions"):
        rows = asked[start : start + args.batch_size]
        batch = vlm.encode(
            [Sample(str(i), None, question.text) for i, (_, question, _, _) in enumerate(rows)],
            [picture for *_, picture in rows],
        )
        longest = (
            40
            if any(question.kind in ("caption", "critique", "revise") for _, question, _, _ in rows)
            else 10
        )
        for ids, (name, question, scene, _) in zip(
            generate(vlm, batch, longest).ids, rows, strict=True
        ):
            good = is_right(question, vlm.tokenizer.decode(ids, skip_special_tokens=True), scene)
            right[name][0] += good
            right[name][1] += 1
    return dict(right), hits / max(patches, 1), patches


def card(path, right, lens, patches, args):
    """The model card as markdown."""
    lines = [f"# {Path(path).name}", ""]
    config = json.loads((Path(path) / "config.json").read_text())
    parameters = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 2e6
    norm = config.get("vision_embed_norm")
    what = (
        "A LLaVA model small enough for a laptop, trained from scratch on generated pictures by"
        " `checkpoints/train_tiny.py`; for tests and demonstrations."
    )
    lines += [
        what,
        "",
        (
            f"{parameters:.1f} M parameters in bfloat16, {config['image_seq_length']} vision"
            f" tokens, {config['text_config']['num_hidden_layers']} decoder layers."
        ),
    ]
    if norm:
        layers = config["vision_feature_layer"]
        extra = (
            f" on tower layers {layers} through the post layer norm"
            if isinstance(layers, list)
            else ""
        )
        lines += [
            "",
            (
                "Beyond Semantics variant: projector output RMS-normalised, clipped at"
                f" {norm['max_norm']:.3f} and scaled by {norm['scale']:.3f}{extra}."
            ),
        ]
    lines += [
        "",
        (
            f"`python checkpoints/evaluate_tiny.py` on {args.scenes} floor scenes and"
            f" {args.scenes // 3} corridors of seed {args.seed}, greedy, float32:"
        ),
        "",
    ]
    lines += ["| question | n | accuracy | 95 % interval | to reach |", "|---|---|---|---|---|"]
    for name, (good, n) in sorted(right.items()):
        low, high = wilson_interval(good, n)[1:3]
        lines.append(
            f"| {name} | {n} | {good / n:.3f} | {low:.3f} to {high:.3f} | {BARS.get(name, '')} |"
        )
    lines += [
        "",
        (
            f"Logit lens on {patches} patches inside objects (`Describe the image.`): top-1 token"
            " is the object's"
        ),
        "",
    ]
    lines += ["| hidden state (0 = embeddings) | colour | shape | either |", "|---|---|---|---|"]
    lines += [
        f"| {i} | " + " | ".join(f"{value:.3f}" for value in row) + " |"
        for i, row in enumerate(lens.tolist())
    ]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_args(argv)
    for path in args.model_path:
        vlm = load_model(path)
        text = card(path, *evaluate(vlm, args), args)
        print(text)
        if not args.no_card:
            (Path(path) / "README.md").write_text(text)
    return 0


if __name__ == "__main__":
    cli.run(main)

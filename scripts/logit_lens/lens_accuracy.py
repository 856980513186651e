"""How often is the object's name the likeliest token on the object's own patches, layer by layer?

    python scripts/logit_lens/lens_accuracy.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes
    python scripts/logit_lens/lens_accuracy.py --model_path checkpoints/tiny-llava --analyze_only

For each object (pictures pass the object filter) and each hidden state (0: embeddings, l: after
layer l): share of the object's vision tokens whose top-1 token of the logit lens is a word of one
of its names, or the first piece, of three letters or more, of a word that is no single token.
Beside it the share under the names of another picture's object (shuffled), and the object's own
names on the picture's other tokens. The paper takes the best layer of each picture, the luckiest of
L + 1 numbers; here that figure stands beside the best layer over all pictures, and that layer
chosen on the other half of them (cross-fitted). arXiv 2410.07149 has 23.7 % on LLaVA-1.5 by its
choice, at layer 25.7 of 33; our study's 2.3.

Runs land in <out_root>/lens_accuracy/<model>[__<run_name>]/, analysis/lens_accuracy.json, .csv,
.png, .pdf among them.
"""

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.interp.criteria import names
from vlmdiag.interp.targets import add_arguments, load, load_vlm, open_run, read_targets, tokens_of
from vlmdiag.model.attention import capture
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.vision import prefill
from vlmdiag.runs import engine, rundirs

EXPERIMENT = "lens_accuracy"
LEAST = 3  # letters of a piece that stands for a word


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add_arguments(parser)
    add_model_arguments(parser, path=False)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument(
        "--analyze_only", action="store_true", help="no model: analyse what the run directory holds"
    )
    return parser.parse_args(argv)


# --- measuring ------------------------------------------------------------------------------------


def name_ids(tokenizer, words, category):
    """Ids that say a category: every spelling of a word of its names as one token, the first piece
    of a word that is none. words {id: text}."""
    wanted = {word for name in names(category) for word in name.split()}
    found = {id: text.strip().lower() for id, text in words.items()}
    ids = {id for id, text in found.items() if text in wanted}
    for word in wanted - {found[id] for id in ids}:
        piece = tokenizer.encode(f" {word}", add_special_tokens=False)
        piece = next((id for id in piece if found.get(id)), None)
        if piece is not None and len(found[piece]) >= LEAST and word.startswith(found[piece]):
            ids.add(piece)
    return sorted(ids)


def make_process(args, vlm):
    lens, words = Lens(vlm), vocabulary(vlm.tokenizer, range(len(vlm.tokenizer)))

    @torch.inference_mode()
    def process(loaded):
        items, images, masks = zip(*loaded, strict=True)
        batch = vlm.encode([item.sample for item in items], images)
        with capture(vlm, [probe := HiddenStates()]):
            logits = prefill(vlm, batch).logits[:, -1]
        last = len(vlm.parts.layers)
        lens.check(probe.states[last][:, -1], logits)
        positions = [batch.vision_positions(row) for row in range(len(items))]
        found = [
            [
                lens.top_k(probe.states[index][row, where.to(probe.states[index].device)], 1)[0][
                    :, 0
                ]
                for index in range(last + 1)
            ]
            for row, where in enumerate(positions)
        ]
        top = [
            torch.stack([part.to(vlm.device) for part in parts]).cpu().numpy().astype(np.int32)
            for parts in found
        ]
        return [result(item, batch, row, masks[row], top[row]) for row, item in enumerate(items)]

    def result(item, batch, row, mask, top):
        one = type(batch)(**{**vars(batch), "grids": [batch.grids[row]]})
        tokens = tokens_of(args, vlm, one, mask)
        ids = name_ids(vlm.tokenizer, words, item.category)
        if not ids:
            raise ValueError(f"no token of the vocabulary says {item.category!r}")
        record = {
            "image_id": item.sample.extra["image_id"],
            "file_name": item.image.name,
            "category": item.category,
            "name_ids": ids,
        }
        record |= {
            "name_tokens": [words[id] for id in ids],
            "object_tokens": len(tokens),
            "vision_tokens": top.shape[1],
        }
        return record, {"top1": top, "tokens": tokens.astype(np.int32)}

    return process


# --- analysis -------------------------------------------------------------------------------------


def shares(run, seed):
    """{own, shuffled, elsewhere: (n, L + 1)} of a run's pictures. shuffled: names of another
    picture whose object has another category; NaN without one."""
    ids = run.ids()
    if not ids:
        raise UsageError(
            f"{run.path} has no finished picture yet; run the command that makes it again, without"
            " --analyze_only"
        )
    records, found = [run.record(id) for id in ids], {"own": [], "shuffled": [], "elsewhere": []}
    for row, id in enumerate(ids):
        arrays = run.arrays(id)
        top, tokens = arrays["top1"], arrays["tokens"]
        others = [record for record in records if record["category"] != records[row]["category"]]
        rng = np.random.default_rng([seed, row])
        other = others[rng.integers(len(others))]["name_ids"] if others else None
        elsewhere = np.setdiff1d(np.arange(top.shape[1]), tokens)
        found["own"].append(np.isin(top[:, tokens], records[row]["name_ids"]).mean(1))
        found["shuffled"].append(
            np.isin(top[:, tokens], other).mean(1) if other else np.full(len(top), np.nan)
        )
        found["elsewhere"].append(
            np.isin(top[:, elsewhere], records[row]["name_ids"]).mean(1)
            if len(elsewhere)
            else np.full(len(top), np.nan)
        )
    return {name: np.stack(values) for name, values in found.items()}


def best_layers(own, seed):
    """What choosing a layer does to the figure: {choice: (shares (n,), layer or mean layer)}. own
    (n, L + 1).

    per picture: the paper's, a picture without a hit has its first layer; over all pictures;
    cross-fitted: for each half the layer chosen on the other.
    """
    pictures = np.arange(len(own))
    each, overall = own.argmax(1), int(own.mean(0).argmax())
    halves = np.array_split(np.random.default_rng(seed).permutation(len(own)), 2)
    fitted = np.empty(len(own), int)
    for half, other in (halves, halves[::-1]):
        fitted[half] = own[other].mean(0).argmax() if len(other) else overall
    return {
        "per_picture": (own[pictures, each], each.mean()),
        "overall": (own[:, overall], overall),
        "cross_fitted": (own[pictures, fitted], fitted.mean()),
    }


def analyse(run, seed):
    """Prints the table; writes analysis/lens_accuracy.*."""
    found = shares(run, seed)
    curves = {name: stats.mean_interval(values) for name, values in found.items()}
    chosen = {
        name: (stats.mean_interval(values), float(layer))
        for name, (values, layer) in best_layers(found["own"], seed).items()
    }
    print(
        f"{run.label}: {len(found['own'])} objects; share of object patches whose top-1 token names"
        " the object, mean [95 % interval over pictures]"
    )
    for name, (interval, layer) in chosen.items():
        print(
            f"{'best layer ' + name.replace('_', ' '):28s}{interval.mean:.3f} [{interval.low:.3f},"
            f" {interval.high:.3f}]  layer {layer:.3g}"
        )
    first = curves["own"]
    print(
        f"{'layer 0 (embeddings)':28s}{first.mean[0]:.3f} [{first.low[0]:.3f}, {first.high[0]:.3f}]"
    )
    plain = lambda interval: {
        name: np.asarray(part).tolist() for name, part in interval._asdict().items()
    }
    content = {
        "settings": run.meta["settings"],
        "objects": len(found["own"]),
        "by_layer": {name: plain(interval) for name, interval in curves.items()},
    }
    content["best_layer"] = {
        name: {"layer": layer} | plain(interval) for name, (interval, layer) in chosen.items()
    }
    folder = run.path / "analysis"
    rundirs.write_json(folder / "lens_accuracy.json", content)
    columns = {"layer": range(found["own"].shape[1])}
    for name, interval in curves.items():
        columns |= {
            f"{name}{part}": value for part, value in zip(("", "_low", "_high", "_n"), interval)
        }
    plots.save_csv(folder / "lens_accuracy.csv", columns)
    plots.save(draw(run, curves, chosen), folder / "lens_accuracy", run.meta["settings"])


def draw(run, curves, chosen):
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    words = {
        "own": ("object's own name", plots.BLUE),
        "shuffled": ("another picture's name", plots.ORANGE),
    }
    words["elsewhere"] = "own name, other patches", plots.EVEN_COLOR
    for name, (label, color) in words.items():
        plots.line_with_band(ax, np.arange(len(curves[name].mean)), curves[name], label, color)
    interval, layer = chosen["cross_fitted"]
    ax.axhline(
        interval.mean,
        color=plots.GREEN,
        linestyle="--",
        linewidth=1.2,
        label=f"best layer, cross-fitted: {interval.mean:.2f} (layer {layer:.3g})",
    )
    interval, layer = chosen["per_picture"]
    ax.axhline(
        interval.mean,
        color=plots.VERMILION,
        linestyle=":",
        linewidth=1.2,
        label=f"best layer of each picture, as published: {interval.mean:.2f}",
    )
    ax.set(
        title=f"Logit lens on object patches: {run.label}",
        xlabel="hidden state (0 = embeddings, l = after layer l)",
        ylim=(-0.02, 1.02),
    )
    ax.set_ylabel("share of object patches whose\ntop-1 token names the object")
    plots.legends([ax])
    return fig


def main(argv=None):
    args = parse_args(argv)
    if args.analyze_only:
        analyse(
            rundirs.read_run(
                rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name),
                EXPERIMENT,
            ),
            args.seed,
        )
        return 0
    items, vlm = read_targets(args), load_vlm(args, load_from_args)
    run = open_run(args, EXPERIMENT, vlm, ())
    print(
        f"{run.path}: {len(items)} pictures pass the object filter, {vlm.family.name} on"
        f" {vlm.device}"
    )
    counts = engine.run_items(
        run, items, load, make_process(args, vlm), args.batch_size, args.shard, args.num_workers
    )
    run.finish()
    analyse(run, args.seed)
    return engine.exit_code(counts, run)


if __name__ == "__main__":
    cli.run(main)

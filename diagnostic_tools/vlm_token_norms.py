"""How long are vision tokens and text tokens when they enter the language model?

    vision: ||connector(tower(picture))_p|| of every vision token, as the decoder gets it, a norm
    after the connector included
    text:   ||E[id]|| of every token of the pictures' captions, each caption with its BOS where the
            model's prompts have one
L2 norms. Beyond Semantics (arXiv 2503.17349), figure 3: on COCO LLaVA-1.5's vision tokens lie at 10
to 1000, text tokens at 0.3 to 1.3 (mean 0.83).

    python vlm_token_norms.py --model_path ../checkpoints/llava-v1.5-7b \\
        --vision_tower_path ../checkpoints/clip-vit-large-patch14-336 \\
        --coco_root ../data/COCO --device cuda --weights_type bin --max_images 20 --save_vectors
        --out_dir outputs/token_norms
    python vlm_token_norms.py --model_path ../checkpoints/tiny-llava --coco_root ../data/shapes \\
        --max_images 20

Writes <out_dir>/<output_prefix>.png, .pdf and .json (n, mean with a bootstrap 95 % interval over
images, quartiles, range) and prints the same as a table; --save_vectors adds <vectors_file> with
txt and img, one float64 norm a token. The decoder's layers are never read from a folder. On the
tiny model the vision violin stands right of the text violin; on tiny-llava-normWmean and
-multilayerNorm it is a spike at max_norm * scale: every vision token has one norm.

Published and here: the published script enlarges each picture three times before the processor
shrinks it again, which changes pixels: --scale 3 does the same, the default 1 gives the model the
pictures that it gets elsewhere. It cannot read the multi-layer model and estimates densities of the
norms themselves, shown on a logarithmic axis; ours are densities of log10 norms."""

import contextlib
import io
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.pictures.samples import load_image, read_coco
from vlmdiag.runs import rundirs

ENDINGS = {"bin": ".bin", "safetensors": ".safetensors"}
GROUPS = ("text", "vision")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--coco_root",
        default=None,
        help="folder with annotations/captions_val2017.json and val2017/",
    )
    parser.add_argument(
        "--caption_file", default=None, help="COCO captions json in place of the one in --coco_root"
    )
    parser.add_argument(
        "--image_dir", default=None, help="picture folder in place of the one in --coco_root"
    )
    parser.add_argument("--out_dir", default="outputs/token_norms")
    parser.add_argument(
        "--output_prefix",
        default="token_norms_comparison",
        help="name of the figure and of the summary",
    )
    parser.add_argument(
        "--save_vectors", action="store_true", help="also write the norm of every token"
    )
    parser.add_argument(
        "--vectors_file", default="vectors.npz", help="name of that file in --out_dir"
    )
    parser.add_argument(
        "--max_images", type=int, default=0, help="only the first so many pictures; 0: all"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help=(
            "enlarge pictures so many times (Lanczos) before the processor sees them; published: 3"
        ),
    )
    parser.add_argument(
        "--weights_type",
        choices=list(ENDINGS),
        default=None,
        help="which weight files of a folder to read; None: those that are there",
    )
    parser.add_argument(
        "--safetensors_index",
        default=None,
        help="check that model-<this>.safetensors, such as 00003-of-00003, holds the connector",
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="pictures at a time in the vision tower"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode pictures")
    args = parser.parse_args(argv)
    if args.coco_root is None and not (args.caption_file and args.image_dir):
        raise UsageError("--coco_root is needed, or --caption_file and --image_dir")
    if args.max_images < 0 or args.batch_size < 1 or args.num_workers < 1 or not args.scale > 0:
        raise UsageError(
            "--batch_size and --num_workers count from 1, --max_images from 0, and --scale is"
            " above 0"
        )
    args.caption_file = args.caption_file or str(
        Path(args.coco_root) / "annotations" / "captions_val2017.json"
    )
    args.image_dir = args.image_dir or str(Path(args.coco_root) / "val2017")
    return args


# --- loading tower, connector and embedding table -------------------------------------------------


def check_weights(args):
    """UsageError where --weights_type or --safetensors_index do not fit the folder. Returns the
    ending to leave out, or None."""
    folder = Path(args.model_path)
    if not folder.is_dir():
        if args.weights_type or args.safetensors_index:
            raise UsageError(
                "--weights_type and --safetensors_index look into a folder, and there is none at"
                f" {folder}"
            )
        return None
    there = [kind for kind, ending in ENDINGS.items() if any(folder.glob(f"*{ending}"))]
    if args.weights_type and there and args.weights_type not in there:
        missing = ENDINGS[args.weights_type]
        raise UsageError(
            f"--weights_type {args.weights_type}: {folder} has no {missing} file; use"
            f" --weights_type {there[0]}, or leave it out"
        )
    if args.safetensors_index:
        if args.weights_type == "bin":
            raise UsageError("--safetensors_index is for --weights_type safetensors")
        shard = folder / f"model-{args.safetensors_index}.safetensors"
        if not shard.exists():
            names = (
                ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:5])
                or "no safetensors file"
            )
            raise UsageError(
                f"--safetensors_index {args.safetensors_index}: no {shard.name} in {folder}, which"
                f" has {names}"
            )
        if not holds_connector(shard):
            right = ", ".join(
                file.stem.removeprefix("model-")
                for file in sorted(folder.glob("model-*.safetensors"))
                if holds_connector(file)
            )
            raise UsageError(
                f"--safetensors_index {args.safetensors_index}: {shard.name} does not hold the"
                f" connector; use {right or 'none'} or leave it out"
            )
    return next(
        (ENDINGS[kind] for kind in there if args.weights_type and kind != args.weights_type), None
    )


def holds_connector(shard):
    names = ("mm_projector", "multi_modal_projector", "connector", "merger", "aligner")
    with safe_open(shard, "pt") as file:
        return any(name in key for key in file.keys() for name in names)  # noqa: SIM118 -- no dict


def headless_view(folder, view, left_out):
    """Links to a model's files in `view`, without those that end in left_out, and with a config
    whose decoder has no layers. False if it names none."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    if not isinstance(text, dict) or not (text is not config or "num_hidden_layers" in text):
        return False
    for part in (
        (text, config) if "num_hidden_layers" in config else (text,)
    ):  # older Qwen-VL configs have the decoder's keys at the top
        part |= {"num_hidden_layers": 0} | ({"layer_types": []} if "layer_types" in part else {})
    for file in folder.iterdir():
        if file.name != "config.json" and not (left_out and left_out in file.suffixes):
            os.symlink(file.resolve(), view / file.name)
    (view / "config.json").write_text(json.dumps(config))
    return True


def load(args):
    """The model without its decoder layers: (VLM, whether the decoder was left out)."""
    left_out, folder = check_weights(args), Path(args.model_path)
    args.no_self_check = True  # its checks are about the decoder
    if (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(UsageError):
            view = Path(scratch) / rundirs.slug(args.model_path)
            view.mkdir()
            if headless_view(folder, view, left_out):
                return load_from_args(args, str(view)), True
    vlm = load_from_args(args)
    if left_out:
        raise UsageError(
            f"--weights_type {args.weights_type}: this model is loaded as a whole, by transformers'"
            " own choice of files; leave it out"
        )
    print("the decoder's layers could not be left out for this model, so all of it was loaded")
    return vlm, False


# --- measuring ------------------------------------------------------------------------------------


def read_captions(path, samples):
    """{sample id: its captions} of a COCO captions file."""
    annotations = json.loads(Path(path).read_bytes()).get("annotations")
    if not isinstance(annotations, list) or not all(
        isinstance(entry, dict) and "image_id" in entry for entry in annotations
    ):
        raise UsageError(
            f"{path} has no list 'annotations' of objects with image_id and caption, so it is no"
            " captions file"
        )
    captions = {sample.extra["image_id"]: [] for sample in samples}
    for entry in annotations:
        if entry["image_id"] in captions and isinstance(entry.get("caption"), str):
            captions[entry["image_id"]].append(entry["caption"])
    if not any(captions.values()):
        raise UsageError(
            f"{path} has no caption of the first {len(samples)} images; give a captions file with"
            " --caption_file"
        )
    return {sample.id: captions[sample.extra["image_id"]] for sample in samples}


def enlarged(image, scale):
    return (
        image
        if scale == 1
        else image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.LANCZOS,
        )
    )


def open_picture(sample, scale):
    """A picture, or the error that it is unreadable by."""
    try:
        return enlarged(load_image(sample.image), scale)
    except (OSError, ValueError) as error:
        return error


@torch.inference_mode()
def measure(vlm, samples, captions, scale, batch_size, num_workers):
    """({sample id: (norms of its vision tokens, norms of its caption tokens)}, {sample id: error}),
    float64."""
    table = (
        torch.linalg.vector_norm(
            vlm.model.get_input_embeddings().weight, dim=-1, dtype=torch.float32
        )
        .double()
        .cpu()
        .numpy()
    )
    found, failed = {}, {}
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=len(samples), desc="pictures", unit="img", disable=None) as bar,
    ):
        groups = [
            samples[start : start + batch_size] for start in range(0, len(samples), batch_size)
        ]
        coming = [pool.submit(open_picture, sample, scale) for sample in groups[0]]
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            opened = [future.result() for future in coming]
            coming = [
                pool.submit(open_picture, sample, scale) for sample in following
            ]  # while the tower works
            failed |= {
                sample.id: str(picture)
                for sample, picture in zip(group, opened, strict=True)
                if isinstance(picture, Exception)
            }
            good = [
                (sample, picture)
                for sample, picture in zip(group, opened, strict=True)
                if not isinstance(picture, Exception)
            ]
            bar.update(len(group))
            if not good:
                continue
            batch = vlm.encode(*zip(*good, strict=True))
            features = vlm.vision(batch).pooler_output
            bos = [vlm.tokenizer.bos_token_id] if "bos" in batch.spans(0) else []
            for (sample, _), tokens in zip(good, features, strict=True):
                ids = [
                    i
                    for text in captions[sample.id]
                    for i in bos + vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
                ]
                found[sample.id] = (
                    torch.linalg.vector_norm(tokens.float(), dim=-1).double().cpu().numpy(),
                    table[ids],
                )
    return found, failed


def summarize(norms):
    """Numbers of one group over all tokens, and the mean over images of the image means. norms: one
    array (tokens,) an image."""
    pooled = np.concatenate(norms)
    if not len(pooled):
        raise UsageError("no token was measured")
    interval = stats.mean_interval([part.mean() for part in norms if len(part)])
    numbers = {
        "tokens": len(pooled),
        "mean": pooled.mean(),
        "min": pooled.min(),
        "max": pooled.max(),
    }
    numbers |= dict(
        zip(("q25", "median", "q75"), np.quantile(pooled, (0.25, 0.5, 0.75)), strict=True)
    )
    numbers |= {
        "images": interval.n,
        "mean_over_images": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
    return {
        name: None if np.isnan(value) else value.item() if isinstance(value, np.generic) else value
        for name, value in numbers.items()
    }


# --- figure ---------------------------------------------------------------------------------------


def log_density(norms, bins=2048):
    """Gaussian kernel density of log10 norms: (log10 norm (bins,), density per decade (bins,)).
    Silverman's bandwidth, at least 0.01 decades."""
    logs = np.log10(norms[norms > 0])
    spread = min(logs.std(), np.subtract(*np.quantile(logs, (0.75, 0.25))) / 1.349 or np.inf)
    width = max(0.9 * spread * len(logs) ** -0.2, 0.01)
    counts, edges = np.histogram(logs, bins, (logs.min() - 4 * width, logs.max() + 4 * width))
    step = edges[1] - edges[0]
    offsets = np.arange(-int(4 * width / step), int(4 * width / step) + 1) * step
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    return (edges[:-1] + edges[1:]) / 2, np.convolve(
        counts / len(logs), kernel / kernel.sum(), "same"
    ) / step


def draw(pooled, summary, model):
    """One violin a group over a logarithmic axis, each as wide as its own peak; quartiles inside,
    mean over images with its interval below."""
    fig, ax = plots.plt.subplots(figsize=(8.4, 4.6))
    for row, group in enumerate(GROUPS):
        numbers, color = summary[group], plots.color_of("user" if group == "text" else group)
        at, density = log_density(pooled[group])
        half = 0.38 * density / density.max()
        label = (
            f"{group}: n = {numbers['tokens']:,} tokens of {numbers['images']} images, mean"
            f" {numbers['mean']:.3g}"
        )
        ax.fill_between(
            10**at, row - half, row + half, color=color, alpha=0.55, linewidth=0.8, label=label
        )
        for name, line in (("q25", "--"), ("median", "-"), ("q75", "--")):
            reach = np.interp(np.log10(max(numbers[name], 1e-30)), at, half)
            ax.plot(
                [numbers[name]] * 2,
                [row - reach, row + reach],
                color="#222222",
                linewidth=1.6 if name == "median" else 0.9,
                linestyle=line,
            )
        mean = numbers["mean_over_images"]
        sides = (
            [[mean - numbers["low"]], [numbers["high"] - mean]]
            if numbers["low"] is not None
            else None
        )
        ax.errorbar(
            [mean],
            [row - 0.45],
            xerr=sides,
            color=color,
            marker="o",
            markersize=4,
            capsize=3,
            linestyle="none",
        )
    ax.set(xscale="log", ylim=(-0.6, len(GROUPS) - 0.45))
    ax.set_yticks(
        range(len(GROUPS)),
        ["text tokens\n(embedding table)", "vision tokens\n(after the connector)"],
    )
    ax.set(
        xlabel="L2 norm of a token at the decoder's input (log scale)",
        title=f"Norms of vision and text tokens as they enter the language model, {model}",
    )
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.grid(axis="y", visible=False)
    handles = ax.get_legend_handles_labels()[0][::-1]  # in the order of the rows, top first
    key = (
        "width: density per decade, scaled to its peak; lines: quartiles; dot: mean over images, 95"
        " % interval"
    )
    fig.legend(handles=handles, loc="outside lower center", title=key, title_fontsize=8.5)
    return fig


def table_of(summary):
    rows = [
        (
            "",
            "tokens",
            "mean",
            "min",
            "q25",
            "median",
            "q75",
            "max",
            "images",
            "mean over images [95 %]",
        )
    ]
    for group, numbers in summary.items():
        if group in GROUPS:
            span = (
                f" [{numbers['low']:.4g}, {numbers['high']:.4g}]"
                if numbers["low"] is not None
                else ""
            )
            values = [
                f"{numbers[name]:.4g}" for name in ("mean", "min", "q25", "median", "q75", "max")
            ]
            rows.append(
                (
                    group,
                    str(numbers["tokens"]),
                    *values,
                    str(numbers["images"]),
                    f"{numbers['mean_over_images']:.4g}{span}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main(argv=None):
    args = parse_args(argv)
    samples = read_coco(args.image_dir, args.caption_file, args.max_images or None)
    captions = read_captions(args.caption_file, samples)
    name = rundirs.slug(args.model_path)
    settings = vars(args) | {"model_name": name}
    vlm, headless = load(args)
    found, failed = measure(vlm, samples, captions, args.scale, args.batch_size, args.num_workers)
    for id, error in failed.items():
        print(f"{id} failed: {error}")
    if not found:
        raise UsageError(f"none of the {len(samples)} pictures of {args.image_dir} could be read")
    vision, text = zip(*found.values(), strict=True)
    summary = {"text": summarize(text), "vision": summarize(vision)}
    ratio = stats.mean_interval([v.mean() / t.mean() for v, t in found.values() if len(t)])
    summary |= {
        "model": name,
        "scale": args.scale,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "decoder_left_out": headless,
        "failed": failed,
    }
    summary["vision_over_text"] = {
        key: None if np.isnan(value) else value.item() for key, value in ratio._asdict().items()
    }
    print(table_of(summary))
    out, pooled = (
        Path(args.out_dir),
        {"text": np.concatenate(text), "vision": np.concatenate(vision)},
    )
    plots.save(draw(pooled, summary, name), out / f"{args.output_prefix}.png", settings)
    plots.write_file(
        out / f"{args.output_prefix}.json", (json.dumps(summary, indent=2) + "\n").encode()
    )
    if args.save_vectors:
        np.savez(vectors := io.BytesIO(), txt=pooled["text"], img=pooled["vision"])
        plots.write_file(out / args.vectors_file, vectors.getvalue())
    return 3 if failed else 0


if __name__ == "__main__":
    cli.run(main)

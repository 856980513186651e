"""Where in the picture does a model look when it says a word? Attention of one generated token to
every vision token, drawn over the picture.

    a_v = mean over layers and heads of the attention to vision token v, BOS left out and the rest
    renormalised per layer
    normalised entropy = -sum p log2 p / log2 P, p = a / sum a: 1 = spread
    evenly over the P tokens, 0 = all on one
Beyond Semantics (arXiv 2503.17349), table 8: 0.7 to 0.9 on LLaVA-1.5 and its variants.

    python diagnostic_tools/viz_attention_image.py
    python diagnostic_tools/viz_attention_image.py --model_path checkpoints/llava-v1.5-7b \\
        --image bear.jpg \\
        --prompt_text "Where is the teddy bear" --target_word teddy

Without arguments it compares the tiny models of checkpoints/ on a drawn picture that they describe.
--step producing (default) takes the row that predicted the token, query the row one step later,
where the token itself asks. Writes attention_comparison and attention_overlay_<model> (.png, .pdf)
and attention_<model> (.json, .npz) to --out_dir. Purple, on the tiny models, should lie on the
object that the word names. In a notebook:

    from diagnostic_tools.viz_attention_image import extract_attention_for_token
    from vlmdiag.beyond_semantics.attention_overlay import visualize_attention_overlay
    result = extract_attention_for_token(
        "checkpoints/tiny-llava", "picture.jpg", "Describe the image.", target_word="circle"
    )
    visualize_attention_overlay(result)
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from common import add_model_arguments, load_from_args, load_model
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures import chats
from vlmdiag.pictures.samples import given_image, given_pictures
from vlmdiag.runs import rundirs

if TYPE_CHECKING:
    from vlmdiag.beyond_semantics.attention_overlay import AttentionVisualizationResult
    from vlmdiag.pictures.samples import Chat, Pictures, Sample
    from vlmdiag.scenes.scene import Scene
    from vlmdiag.types import VLM

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
TINY = ("tiny-llava", "tiny-llava-normWmean", "tiny-llava-multilayerNorm")
PROMPT = "Describe the image."
DEMO_SEED = 54


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        action="append",
        help="folder or hub id; may be given several times; None: the tiny models of checkpoints/",
    )
    parser.add_argument(
        "--image", help="picture; None: a drawn one, whose first shape is the default --target_word"
    )
    cli.add_chat_arguments(parser)
    parser.add_argument("--prompt_text", default=PROMPT, help="question")
    parser.add_argument(
        "--target_word", help="word of the answer, whole word, case ignored; its first token counts"
    )
    parser.add_argument(
        "--token_position",
        type=cli.count,
        help="index of the generated token, from 0, in place of a word",
    )
    parser.add_argument(
        "--occurrence", type=cli.positive, default=1, help="which occurrence of the word, from 1"
    )
    step = (
        "row that predicted the token, or row where it is the query; None: producing, query with"
        " --paper_compat"
    )
    parser.add_argument("--step", choices=["producing", "query"], help=step)
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=512, help="most tokens of an answer"
    )
    parser.add_argument(
        "--strip_system_prompt", action="store_true", help="leave the system prompt out"
    )
    parser.add_argument(
        "--alpha", type=cli.share, default=0.85, help="opacity of the overlay where it is strongest"
    )
    parser.add_argument("--out_dir", default=".", help="where the files go")
    parser.add_argument("--show", action="store_true", help="open the comparison in a window too")
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published token, row and normalisation, see README",
    )
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    cli.check_chat(parser, args, not_with=["image"])
    given = next((name for name in ("image", *cli.CHATS) if getattr(args, name)), None)
    if given and args.target_word is None and args.token_position is None:
        parser.error(
            f"--{given} needs --target_word or --token_position: which word of the answer to look"
            " at"
        )
    return args


def demo_scene() -> Scene:
    """The picture of a call without arguments: three shapes on a floor."""
    from vlmdiag.scenes.scene import floor_scene

    return floor_scene(Random(DEMO_SEED), 3, square=True)


def extract_attention_for_token(
    model_path: str | Path | VLM,
    image_path: str | Path | Pictures,
    prompt_text: str = PROMPT,
    target_word: str | None = None,
    token_position: int | None = None,
    device: str | None = None,
    max_new_tokens: int = 512,
    conv_mode: str | None = None,
    verbose: bool = False,
    occurrence: int = 1,
    step: str | None = None,
    strip_system_prompt: bool = False,
    paper_compat: bool = False,
    chat: Chat | None = None,
    **load_options: Any,
) -> AttentionVisualizationResult:
    """token_attention() of a model and a picture by their paths, for notebooks.

    model_path: folder, hub id, or a loaded VLM; image_path: a path or a PIL picture, of a chat the
    tuple of its pictures. verbose: print the answer. load_options go to common.load_model.
    UsageError: see token_attention().
    """
    from vlmdiag.beyond_semantics.token_attention import check_token, token_attention

    check_token(target_word, token_position, step, paper_compat)
    if isinstance(model_path, (str, Path)):
        vlm = load_model(model_path, device=device, conv_mode=conv_mode, **load_options)
    else:
        vlm = model_path
    image = given_image(image_path) if isinstance(image_path, (str, Path)) else image_path
    result = token_attention(
        vlm,
        image,
        prompt_text,
        target_word,
        token_position,
        max_new_tokens,
        occurrence,
        step,
        strip_system_prompt,
        paper_compat,
        chat,
    )
    if verbose:
        print(f"{rundirs.slug(vlm.path)}: {result.generated_text.strip()}")
    return result


def given_chat(args: argparse.Namespace) -> Sample | None:
    """The prompt of --images, --messages or --video; UsageError for a list of several."""
    samples = chats.given_samples(args)
    if len(samples) > 1:
        raise UsageError(f"--messages {args.messages}: one prompt was wanted, not {len(samples)}")
    return samples[0] if samples else None


def picture_and_word(
    args: argparse.Namespace, sample: Sample | None
) -> tuple[Pictures, str | None]:
    """The pictures of the chat, else --image, and --target_word; without them the drawn picture,
    whose first shape is the word."""
    if sample is not None:
        return given_pictures(sample), args.target_word
    if args.image is not None:
        return given_image(args.image), args.target_word
    from vlmdiag.scenes.scene import render

    scene = demo_scene()
    word = args.target_word
    if word is None and args.token_position is None:
        word = scene.things[0].shape
    return render(scene), word


def model_paths(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Paths of the models, and a name for each that no other has."""
    paths = args.model_path
    if not paths:
        folders = [CHECKPOINTS / name for name in TINY]
        paths = [str(folder) for folder in folders if (folder / "config.json").exists()]
    if not paths:
        raise UsageError(
            f"no tiny model in {CHECKPOINTS}; train them with python checkpoints/train_tiny.py, or"
            " give --model_path"
        )
    short = [rundirs.slug(path) for path in paths]
    names = []
    for name, path in zip(short, paths):
        if short.count(name) > 1:
            name = f"{rundirs.slug(Path(path).absolute().parent)}_{name}"
        names.append(name)
    if len(set(names)) < len(names):
        raise UsageError(f"--model_path: the same model is given twice ({', '.join(names)})")
    return paths, names


def measured(
    args: argparse.Namespace,
    paths: Sequence[str],
    names: Sequence[str],
    image: Pictures,
    word: str | None,
    chat: Chat | None,
) -> Iterator[AttentionVisualizationResult]:
    """A result a model. The answer of one model may lack the word that another's has: its error is
    printed and the others go on; UsageError for the only one."""
    for path, name in zip(paths, names):
        vlm = load_from_args(args, path)
        try:
            result = extract_attention_for_token(
                vlm,
                image,
                args.prompt_text,
                word,
                args.token_position,
                max_new_tokens=args.max_new_tokens,
                occurrence=args.occurrence,
                step=args.step,
                strip_system_prompt=args.strip_system_prompt,
                paper_compat=args.paper_compat,
                chat=chat,
                verbose=True,
            )
        except UsageError as error:
            if len(paths) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        result.model_name = name
        token = result.tokens[result.token_position]
        print(
            f"{name}: token {result.token_position} {token!r}, {result.step} step, normalised"
            f" entropy {result.normalized_entropy:.3f}"
        )
        yield result


def write_numbers(
    result: AttentionVisualizationResult,
    out_dir: Path,
    args: argparse.Namespace,
    sample: Sample | None,
) -> None:
    """attention_<model>.json and .npz, of a chat with the sum and the boxes of each picture."""
    from vlmdiag.figures import plots

    weights = result.attention_map.ravel()
    entropy = result.normalized_entropy
    record = {
        "model_name": result.model_name,
        "prompt": result.prompt,
        "tokens": result.tokens,
        "target_word": result.target_word,
        "token_position": result.token_position,
        "step": result.step,
        "paper_compat": result.paper_compat,
        "answer": result.generated_text.strip(),
        "question": args.prompt_text,
        "image": args.image,
        "occurrence": args.occurrence,
        "normalized_entropy": None if math.isnan(entropy) else entropy,
        "map_shape": list(result.attention_map.shape),
        "min": weights.min(),
        "max": weights.max(),
        "sum": weights.sum(),
        "share_on_padding": result.outside_share,
    }
    arrays = {"map": weights, "boxes": result.grid.boxes}
    if sample is not None:
        counts = [len(grid.boxes) for grid in result.grids]
        record |= chats.record_of(sample) | {"sum_by_picture": result.picture_sums}
        arrays["boxes"] = np.concatenate([grid.boxes for grid in result.grids])
        arrays["picture"] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    stem = f"attention_{result.model_name}"
    plots.write_file(out_dir / f"{stem}.json", text.encode("utf-8", "backslashreplace"))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    plots.write_file(out_dir / f"{stem}.npz", buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.beyond_semantics import attention_overlay
    from vlmdiag.figures import plots

    paths, names = model_paths(args)
    if args.show:
        plots.use_windows()
    sample = given_chat(args)
    image, word = picture_and_word(args, sample)
    settings = vars(args) | {"target_word": word, "models": names}
    out_dir = Path(args.out_dir)
    results = []
    for result in measured(args, paths, names, image, word, sample and sample.chat):
        results.append(result)
        write_numbers(result, out_dir, args, sample)
        path = out_dir / f"attention_overlay_{result.model_name}"
        attention_overlay.save_attention_overlay(result, path, args.alpha, settings)
    if not results:
        raise UsageError("none of the models could be drawn, see above")
    question = args.prompt_text if sample is None else sample.question
    figure = attention_overlay.plot_attention_comparison(results, question, args.alpha)
    plots.save(figure, out_dir / "attention_comparison", settings, args.show)
    return 3 if len(results) < len(paths) else 0


if __name__ == "__main__":
    cli.run(main)

"""Where in the picture does a model look when it says a word? Attention of one generated token to
every vision token, drawn over the picture.

    a_v = mean over layers and heads of the attention to vision token v, BOS left out and the rest
    renormalised per layer normalised entropy = -sum p log2 p / log2 P, p = a / sum a: 1 = spread
    evenly over the P tokens, 0 = all on one
Beyond Semantics (arXiv 2503.17349), table 8: 0.7 to 0.9 on LLaVA-1.5 and its variants.

    python diagnostic_tools/viz_attention_image.py
    python diagnostic_tools/viz_attention_image.py --model_path checkpoints/llava-v1.5-7b \\
        --image bear.jpg \\
        --prompt_text "Where is the teddy bear" --target_word teddy

Without arguments it compares the tiny models of checkpoints/ on a drawn picture that they describe.
--step producing (default) takes the row that predicted the token, query the row one step later,
where the token itself asks. Writes attention_comparison and attention_overlay_<model> (.png, .pdf)
and attention_<model> (.json, .npz) to --out_dir. Warm colours, on the tiny models, should lie on
the object that the word names. In a notebook:

    from attention_overlay import visualize_attention_overlay
    result = extract_attention_for_token("checkpoints/tiny-llava", "picture.jpg", "Describe the
    image.", target_word="circle")
    visualize_attention_overlay(result)"""

import io
import json
import math
import sys
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from common import VLM, add_model_arguments, load_from_args, load_model
from vlmdiag import cli
from vlmdiag.answers import token_spans
from vlmdiag.beyond_semantics.attention_map import find_word, normalized_entropy
from vlmdiag.beyond_semantics.attention_overlay import (
    AttentionVisualizationResult,
    plot_attention_comparison,
    save_attention_overlay,
)
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import VisionRows
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import rundirs
from vlmdiag.scenes.scene import floor_scene, render

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
TINY = ("tiny-llava", "tiny-llava-normWmean", "tiny-llava-multilayerNorm")
PROMPT = "Describe the image."
DEMO_SEED = 54


# --- one model ------------------------------------------------------------------------------------


def demo_scene():
    """The picture of a call without arguments: three shapes on a floor."""
    return floor_scene(Random(DEMO_SEED), 3, square=True)


def extract_attention_for_token(
    model_path,
    image_path,
    prompt_text=PROMPT,
    target_word=None,
    token_position=None,
    device=None,
    max_new_tokens=512,
    conv_mode=None,
    verbose=False,
    occurrence=1,
    step=None,
    strip_system_prompt=False,
    paper_compat=False,
    **load_options,
):
    """Let a model answer and take the attention of one generated token to the picture ->
    AttentionVisualizationResult.

    model_path: folder, hub id, or a loaded VLM; image_path: a path or a PIL picture. The token: the
    first one of the occurrence-th target_word (whole word, case ignored), or token_position. step:
    'producing' (default) or 'query'. paper_compat: as published, the query row of the first token
    in the answer that equals the word's first one, map and entropy with 1e-10. load_options go to
    common.load_model. UsageError: word not in the answer, no such row, no grid.
    """
    if (target_word is None) == (token_position is None):
        raise UsageError(
            "give the token as a word of the answer (--target_word) or by its index"
            " (--token_position), one of the two"
        )
    step = step or ("query" if paper_compat else "producing")
    if paper_compat and step != "query":
        raise UsageError(
            "the published code takes the query row: leave --step producing or --paper_compat out"
        )
    vlm = (
        model_path
        if isinstance(model_path, VLM)
        else load_model(model_path, device=device, conv_mode=conv_mode, **load_options)
    )
    image = image_path if isinstance(image_path, Image.Image) else _picture(image_path)
    vlm.need("decoder-only", "grid")
    batch = vlm.encode([Sample("0", None, prompt_text)], [image], strip_system=strip_system_prompt)
    if batch.grids[0] is None:
        raise UsageError(
            f"{vlm.path}: where the vision tokens of {vlm.family.name} lie in the picture (grid) is"
            " unknown, so their attention cannot be drawn"
        )
    if strip_system_prompt and prompt_for(vlm, prompt_text)[1] is None:
        raise UsageError(
            f"{vlm.path}: --strip_system_prompt, but its prompt has no system prompt to leave out"
        )
    with capture(vlm, [probe := VisionRows(batch, len(vlm.parts.layers))]):
        ids = generate(vlm, batch, max_new_tokens).ids[0]

    def decode(some):
        return vlm.tokenizer.decode(
            some, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    text, spans = token_spans(ids, decode)
    tokens = [vlm.tokenizer.decode([token]) for token in ids]
    position, span = _choose(
        vlm, ids, tokens, text, spans, target_word, token_position, occurrence, paper_compat
    )
    row = position + (step == "query")
    if row >= len(probe.rows):
        more = "" if ids[-1] in vlm.eos_ids else " or more --max_new_tokens"
        last = f"generation ended with token {position} ({tokens[position]!r})"
        raise UsageError(
            f"{vlm.path}: {last}, so no later step has it as query; use --step producing{more}"
        )
    weights = probe.rows[row][0, batch.vision_positions(0)].cpu().numpy().astype(np.float64)
    if not np.isfinite(weights).all():
        raise UsageError(
            f"{vlm.path}: the attention of token {position} is not finite; load the model with"
            " --dtype float32"
        )
    grid, values = batch.grids[0], weights
    if paper_compat:
        values = (weights - weights.min()) / (weights.max() - weights.min() + 1e-10)
    regular = grid.shape is not None and math.prod(grid.shape) == len(weights)
    inside = grid.coverage(np.ones((image.height, image.width), bool))
    outside = (
        float((weights * (1 - inside))[grid.has_box].sum() / weights.sum())
        if weights.sum() > 0
        else 0.0
    )
    entropy = normalized_entropy(weights, 1e-10 if paper_compat else 0.0)
    if verbose:
        print(f"{rundirs.slug(vlm.path)}: {text.strip()}")
    return AttentionVisualizationResult(
        text,
        values.reshape(grid.shape) if regular else values,
        np.asarray(image),
        entropy,
        position,
        target_word,
        step,
        tokens,
        span,
        grid,
        outside,
        rundirs.slug(vlm.path),
        batch.prompts[0],
        paper_compat,
    )


def _picture(path):
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _choose(vlm, ids, tokens, text, spans, word, position, occurrence, paper_compat):
    """(index of the generated token, the characters it stands for); UsageError that lists the
    generated tokens."""
    listed = ", ".join(f"{i} {token!r}" for i, token in enumerate(tokens))
    if position is not None:
        if not 0 <= position < len(ids):
            raise UsageError(
                f"--token_position {position}: {vlm.path} generated {len(ids)} tokens, counted from"
                f" 0: {listed}"
            )
        return position, spans[position]
    if paper_compat:
        first = vlm.tokenizer(word, add_special_tokens=False)["input_ids"][:1]
        found = [[i] for i, token in enumerate(ids) if [token] == first]
    else:
        found = find_word(text, spans, word)
    if not 1 <= occurrence <= len(found):
        times = (
            f"{len(found)} time{'s' * (len(found) != 1)}, and occurrence {occurrence} was asked for"
            if found
            else "not there"
        )
        raise UsageError(
            f"the word {word!r} in the answer of {vlm.path}: {times}; the generated tokens are"
            f" {listed}"
        )
    chosen = found[occurrence - 1]
    return chosen[0], (spans[chosen[0]][0], spans[chosen[-1]][1])


# --- command line ---------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        action="append",
        help="folder or hub id; may be given several times; None: the tiny models of checkpoints/",
    )
    parser.add_argument(
        "--image", help="picture; None: a drawn one, whose first shape is the default --target_word"
    )
    parser.add_argument("--prompt_text", default=PROMPT, help="question")
    parser.add_argument(
        "--target_word", help="word of the answer, whole word, case ignored; its first token counts"
    )
    parser.add_argument(
        "--token_position",
        type=int,
        help="index of the generated token, from 0, in place of a word",
    )
    parser.add_argument(
        "--occurrence", type=int, default=1, help="which occurrence of the word, from 1"
    )
    step = (
        "row that predicted the token, or row where it is the query; None: producing, query with"
        " --paper_compat"
    )
    parser.add_argument("--step", choices=["producing", "query"], help=step)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument(
        "--strip_system_prompt", action="store_true", help="leave the system prompt out"
    )
    parser.add_argument("--alpha", type=float, default=0.55, help="opacity of the overlay")
    parser.add_argument("--out_dir", default=".", help="where the files go")
    parser.add_argument("--show", action="store_true", help="open the comparison in a window too")
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published token, row and normalisation, see README",
    )
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.occurrence < 1:
        parser.error("--max_new_tokens and --occurrence count from 1")
    if not 0 <= args.alpha <= 1:
        parser.error("--alpha is between 0 and 1")
    if args.image is not None and args.target_word is None and args.token_position is None:
        parser.error(
            "--image needs --target_word or --token_position: which word of the answer to look at"
        )
    return args


def model_paths(args):
    """Paths of the models, and a name for each that no other has."""
    paths = args.model_path or [
        str(CHECKPOINTS / name) for name in TINY if (CHECKPOINTS / name / "config.json").exists()
    ]
    if not paths:
        raise UsageError(
            f"no tiny model in {CHECKPOINTS}; train them with python checkpoints/train_tiny.py, or"
            " give --model_path"
        )
    names = [rundirs.slug(path) for path in paths]
    names = [
        f"{rundirs.slug(Path(path).absolute().parent)}_{name}" if names.count(name) > 1 else name
        for name, path in zip(names, paths)
    ]
    if len(set(names)) < len(names):
        raise UsageError(f"--model_path: the same model is given twice ({', '.join(names)})")
    return paths, names


def write_numbers(result, out_dir, args):
    """attention_<model>.json and .npz."""
    weights = result.attention_map.ravel()
    record = {
        name: getattr(result, name)
        for name in (
            "model_name",
            "prompt",
            "tokens",
            "target_word",
            "token_position",
            "step",
            "paper_compat",
        )
    }
    record |= {
        "answer": result.generated_text.strip(),
        "question": args.prompt_text,
        "image": args.image,
        "occurrence": args.occurrence,
    }
    entropy = None if math.isnan(result.normalized_entropy) else result.normalized_entropy
    record |= {"normalized_entropy": entropy, "map_shape": list(result.attention_map.shape)}
    record |= {
        "min": weights.min(),
        "max": weights.max(),
        "sum": weights.sum(),
        "share_on_padding": result.outside_share,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    plots.write_file(
        out_dir / f"attention_{result.model_name}.json", text.encode("utf-8", "backslashreplace")
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, map=weights, boxes=result.grid.boxes)
    plots.write_file(out_dir / f"attention_{result.model_name}.npz", buffer.getvalue())


def main(argv=None):
    args = parse_args(argv)
    paths, names = model_paths(args)
    if args.show:
        plots.use_windows()
    scene = demo_scene() if args.image is None else None
    image = render(scene) if scene else _picture(args.image)
    word = (
        scene.things[0].shape
        if scene and args.target_word is None and args.token_position is None
        else args.target_word
    )
    settings = vars(args) | {"target_word": word, "models": names}
    results, failed, out_dir = [], 0, Path(args.out_dir)
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
                verbose=True,
            )
        except UsageError as error:
            if len(paths) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)  # another model's answer may have the word
            failed += 1
            continue
        result.model_name = name
        token = result.tokens[result.token_position]
        print(
            f"{name}: token {result.token_position} {token!r}, {result.step} step, normalised"
            f" entropy {result.normalized_entropy:.3f}"
        )
        write_numbers(result, out_dir, args)
        save_attention_overlay(
            result, out_dir / f"attention_overlay_{result.model_name}", args.alpha, settings
        )
        results.append(result)
    if not results:
        raise UsageError("none of the models could be drawn, see above")
    plots.save(
        plot_attention_comparison(results, args.prompt_text, args.alpha),
        out_dir / "attention_comparison",
        settings,
        args.show,
    )
    return 3 if failed else 0


if __name__ == "__main__":
    cli.run(main)

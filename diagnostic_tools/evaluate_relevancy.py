"""Is a relevancy map right? Take away what it calls most, or least, relevant and see what becomes
of the token; see whether it lies on the named object.

    python diagnostic_tools/evaluate_relevancy.py --model_path checkpoints/tiny-llava \\
        --image_folder data/shapes/val2017 \\
        --ann_file data/shapes/annotations/instances_val2017.json --removal mean drop --num_images
        20
    python diagnostic_tools/relevancy_evaluation_plot.py \\
        --run_dirs runs/evaluate_relevancy/tiny-llava

The model answers, or is given an answer; targets are the tokens that name an object which is there
once. Every method of attribution.py scores the vision tokens once, on the full input. Then l(s),
the log-probability of the same token behind the same tokens (teacher forcing), is measured with the
share s of the vision tokens removed: most relevant first (positive: the lower the area under the
curve the better) or least relevant first (negative: the higher).

    mean    replaced by the mean of the picture's vision tokens        drop    left out of the
            sequence, the others keep their positions
    blur    their boxes blurred in the picture, which the tower reads again

Pointing game and mask energy hold the map against the object's mask. Beside the methods stand
'centre', 1 - d / d_max with d the distance of a box to the picture's centre, and 'object', the
share of a box that the object covers: what a map that knows the object alone would reach. Area
prior: a uniform map's expectation, the share of boxes that are hits and the mean coverage.
Protocol: Transformer-MM-Explainability (arXiv 2103.15679), our study's 4.3; definitions in
perturbation.py. On tiny-llava gradient relevancy beats random in all of them; what beats it stands
in the README."""

import functools
from pathlib import Path

import numpy as np

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.answers import token_spans
from vlmdiag.interp.objects import object_mask, rng_for
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import read_coco, read_instances, read_questions, with_picture
from vlmdiag.relevancy import perturbation
from vlmdiag.relevancy.gradients import trace
from vlmdiag.relevancy.methods import METHODS
from vlmdiag.runs import engine, rundirs

EXPERIMENT = "evaluate_relevancy"
REFERENCES = ("centre", "object")
SHARES = (0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1)  # finer at both ends, where maps differ


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--image_folder", required=True, help="folder of pictures")
    parser.add_argument(
        "--ann_file",
        required=True,
        help="COCO instances json: masks and names of the pictures' objects",
    )
    parser.add_argument(
        "--question_file",
        default=None,
        help=(
            "JSON list of {image, question, answer}; None: --prompt_text about every picture of"
            " --ann_file"
        ),
    )
    parser.add_argument("--prompt_text", default="Describe the image.", help="question")
    parser.add_argument(
        "--use_answers",
        action="store_true",
        help="measure the answers of --question_file by teacher forcing instead of generating",
    )
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        help="maps that are compared",
    )
    parser.add_argument(
        "--removal",
        nargs="+",
        choices=["mean", "drop", "blur"],
        default=["mean"],
        help="how vision tokens are taken away",
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=list(SHARES), help="shares removed, from 0 to 1"
    )
    parser.add_argument(
        "--targets_per_image",
        type=int,
        default=None,
        help="so many targets, drawn by --seed; None: all",
    )
    parser.add_argument(
        "--blur_radius",
        type=float,
        default=0.1,
        help="of the Gaussian, in sides of the picture (the longer one)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=15.0, help="pixels that the pointing game forgives"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random map, of ties and of the targets drawn"
    )
    parser.add_argument("--per_pass", type=int, default=8, help="removals that run together")
    parser.add_argument("--num_images", type=int, default=None, help="only the first so many")
    cli.add_run_arguments(parser, "picture")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.methods, args.removal = (
        list(dict.fromkeys(args.methods)),
        list(dict.fromkeys(args.removal)),
    )
    if (
        min(
            count
            for count in (
                args.max_new_tokens,
                args.per_pass,
                args.num_images,
                args.targets_per_image,
            )
            if count is not None
        )
        < 1
    ):
        parser.error(
            "--max_new_tokens, --per_pass, --num_images and --targets_per_image count from 1"
        )
    if args.shares[0] != 0 or args.shares[-1] != 1 or sorted(set(args.shares)) != args.shares:
        parser.error(
            f"--shares {' '.join(f'{share:g}' for share in args.shares)}: ascending shares from 0"
            " to 1 are wanted, such as 0 0.25 0.5 1"
        )
    if args.blur_radius <= 0 or args.tolerance < 0:
        parser.error("--blur_radius has to be over 0 and --tolerance at least 0")
    if args.use_answers and not args.question_file:
        parser.error("--use_answers needs --question_file")
    return args


def read_samples(args):
    """A Sample per question of the list, or per picture of the annotation file."""
    if args.question_file:
        return read_questions(args.question_file, args.image_folder)[: args.num_images]
    return read_coco(args.image_folder, args.ann_file, args.num_images, args.prompt_text)


def key(image_id):
    """1, '1' and '000000000001' are one picture."""
    return str(image_id).lstrip("0")


def draw(named, text, spans, count, rng):
    """[(token, which word of the name, annotation), ...] of [(tokens, annotation), ...]: all, or
    `count` drawn by rng, in the order of the answer."""
    flat = [
        (token, len(text[spans[tokens[0]][0] : spans[token][1]].split()) - 1, annotation)
        for tokens, annotation in named
        for token in tokens
    ]
    if count is None or count >= len(flat):
        return flat
    return [flat[i] for i in np.sort(rng.choice(len(flat), count, replace=False))]


def localise(scores, places, masks, tolerance):
    """Pointing and energy (M, T) of maps {name: (T, U)} on the T objects' masks, NaN for maps that
    are not over the boxes; the area prior's two (T,); coverage (T, U). An object outside all boxes
    is NaN throughout."""
    coverage = np.stack([places.coverage(mask) for mask in masks])
    hit = np.stack([perturbation.hits(places, mask, tolerance) for mask in masks])
    scores = scores | {
        "centre": np.tile(perturbation.centre_scores(places), (len(masks), 1)),
        "object": coverage,
    }
    found, boxed = np.full((2, len(scores), len(masks)), np.nan), places.has_box
    for m, maps in enumerate(scores.values()):
        for t in np.flatnonzero(coverage.any(1)) if maps.shape == coverage.shape else ():
            where = maps[t, boxed]
            found[:, m, t] = (
                perturbation.pointing(where, hit[t, boxed]),
                perturbation.energy(where, coverage[t, boxed]),
            )
    seen = np.where(coverage.any(1), 1.0, np.nan)
    return scores, {
        "pointing": found[0],
        "energy": found[1],
        "area_pointing": hit[:, boxed].mean(1) * seen,
        "area_energy": coverage[:, boxed].mean(1) * seen,
    }


def perturb(args, run, targets, sample, scores, removal, units, picture, places):
    """Log-probabilities (M, T, 2, K) by every map of `units` parts, NaN for the others."""
    measure = {
        "mean": functools.partial(perturbation.mean_replaced, run, targets, per_pass=args.per_pass),
        "drop": functools.partial(perturbation.dropped, run, targets, per_pass=args.per_pass),
        "blur": functools.partial(
            perturbation.blurred,
            run,
            targets,
            picture=picture,
            grid=places,
            radius=args.blur_radius * max(picture.size),
            per_pass=args.per_pass,
        ),
    }[removal]
    found = np.full((len(scores), len(targets), 2, len(args.shares)), np.nan)
    fits = [m for m, maps in enumerate(scores.values()) if maps.shape[1] == units]
    names = list(scores)
    orders = [
        [
            perturbation.order(scores[names[m]][i], rng_for(args.seed, sample.id, names[m], target))
            for i, target in enumerate(targets)
        ]
        for m in fits
    ]
    if fits:
        found[fits] = perturbation.curves(measure, np.array(orders), args.shares)
    return found


def make_process(args, vlm, annotations):
    names = sorted({annotation["category"] for some in annotations.values() for annotation in some})
    annotations = {key(image_id): some for image_id, some in annotations.items()}

    def decode(ids):
        return vlm.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def process(loaded):
        return [one(sample, picture) for sample, picture in loaded]

    def one(sample, picture):
        batch = vlm.encode([sample], [picture])
        ids = (
            answer_ids(vlm, batch.prompts[0], sample.answer)
            if args.use_answers
            else generate(vlm, batch, args.max_new_tokens).ids[0]
        )
        text, spans = token_spans(ids, decode)
        named, left_out = perturbation.named_objects(
            text, spans, annotations.get(key(sample.extra["image_id"]), []), names
        )
        chosen = draw(
            named, text, spans, args.targets_per_image, rng_for(args.seed, sample.id, "targets")
        )
        record = {
            "image_id": str(sample.extra["image_id"]),
            "file_name": sample.image.name,
            "question": sample.question,
            "prompt": batch.prompts[0],
        }
        record |= {
            "caption": text.strip(),
            "generated_ids": ids,
            "methods": args.methods,
            "left_out": left_out,
        }
        record["targets"] = [
            {
                "token": token,
                "text": text[slice(*spans[token])].strip(),
                "word": word,
                "name": annotation["category"],
                "annotation": annotation.get("id"),
            }
            for token, word, annotation in chosen
        ]
        return record, measure(sample, picture, batch, ids, chosen, record) if chosen else {}

    def measure(sample, picture, batch, ids, chosen, record):
        run, targets = trace(vlm, batch, ids), [token for token, *_ in chosen]
        scores = {name: METHODS[name](run, targets, args.seed) for name in args.methods}
        arrays = {f"scores_{name}": maps for name, maps in scores.items()}
        places = batch.grids[0] or (
            vlm.family.patches and vlm.family.patches(vlm, picture.size, batch.image_rows[0])
        )
        if places is not None:
            masks = [object_mask(annotation, picture.size) for *_, annotation in chosen]
            scores, found = localise(scores, places, masks, args.tolerance)
            arrays |= found | {"boxes": places.boxes}
            record["methods"] = list(scores)
        elif "blur" in args.removal:
            raise cli.UsageError(
                f"{vlm.path}: --removal blur needs to know where the vision tokens lie (grid), and"
                f" {vlm.family.name} does not tell"
            )
        vision = len(run.vision)
        arrays["without_picture"] = perturbation.mean_replaced(
            run, targets, np.ones((1, vision), bool)
        )[0]
        arrays["logprob"] = perturbation.mean_replaced(run, targets, np.zeros((1, vision), bool))[0]
        for removal in args.removal:
            units = len(places.boxes) if removal == "blur" else vision
            arrays[f"curves_{removal}"] = perturb(
                args, run, targets, sample, scores, removal, units, picture, places
            )
        return {name: np.asarray(values, np.float32) for name, values in arrays.items()}

    return process


def main(argv=None):
    args = parse_args(argv)
    samples, annotations = read_samples(args), read_instances(args.ann_file)
    vlm = load_from_args(args)
    vlm.need("decoder-only")
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt_for(vlm, args.prompt_text)[0],
        "image_aspect": args.image_aspect,
        "annotations": Path(args.ann_file).name,
    }
    identity["questions"] = args.question_file and Path(args.question_file).name
    names = (
        "max_new_tokens use_answers methods removal shares targets_per_image blur_radius tolerance"
        " seed"
    )
    identity |= {name: getattr(args, name) for name in names.split()}
    free = {
        "model_path": args.model_path,
        "image_folder": args.image_folder,
        "device": str(vlm.device),
        "per_pass": args.per_pass,
    }
    run = rundirs.open_run(
        rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name),
        EXPERIMENT,
        identity,
        free,
        args.overwrite,
    )
    counts = engine.run_items(
        run,
        samples,
        with_picture,
        make_process(args, vlm, annotations),
        1,
        args.shard,
        args.num_workers,
    )
    run.finish()
    print(
        f"{run.path}: tables and figures by python diagnostic_tools/relevancy_evaluation_plot.py"
        f" --run_dirs {run.path}"
    )
    return engine.exit_code(counts, run)


if __name__ == "__main__":
    cli.run(main)

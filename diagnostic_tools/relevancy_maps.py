"""Which parts of the picture, and which words, made a model say what it says? Gradient relevancy of
every generated token, for many pictures.

    python diagnostic_tools/relevancy_maps.py --model_path checkpoints/tiny-llava \\
        --image_folder data/shapes/val2017 --num_images 4
    python diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava

    Ā_l = E_h[(dy/dA_l * A_l)+]      R <- R + Ā_l R from the first layer up; row of the producing
                                     position, without the identity
    y: raw logit of the generated token; picture: the row's part over vision tokens, through
    connector and tower (relevancy.py)
Transformer-MM-Explainability (arXiv 2103.15679), as LVLM-Stethoscope shows it; layer l: gathered
from the first layer up to l. One pass over prompt and answer, then one sweep down the layers for
all tokens together. Per picture: rows (T, K, N) of T tokens at K layers over N positions, cells (T,
K, S) over the tower's patches, raw_attention (T, K, P) beside them, probability and visual share
max R_img / (max R_img + max R_text) of each token, text: question and earlier answer. On tiny-llava
the warm patches of a colour or shape word lie on its object."""

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.groups import GROUPS
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.lens import vocabulary
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample, list_pictures, read_questions, with_picture
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy import rules
from vlmdiag.relevancy.gradients import trace
from vlmdiag.runs import engine, rundirs

EXPERIMENT = "relevancy"
TEXT = tuple(GROUPS.index(name) for name in ("user", "generated"))


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--image_folder", required=True, help="folder of pictures")
    parser.add_argument(
        "--question_file",
        default=None,
        help="JSON list of {image, question, answer}; None: --prompt_text about every picture",
    )
    parser.add_argument("--prompt_text", default="Describe the image.", help="question")
    parser.add_argument(
        "--use_answers",
        action="store_true",
        help="measure the answers of --question_file by teacher forcing instead of generating",
    )
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=None,
        help="decoder layers up to which relevancy is gathered; None: all",
    )
    parser.add_argument("--no_tower", action="store_true", help="stop at the vision tokens")
    parser.add_argument(
        "--memory", type=int, default=128, help="MiB of one layer's maps that are held at once"
    )
    parser.add_argument("--num_images", type=int, default=None, help="only the first so many")
    cli.add_run_arguments(parser, "picture")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if (
        min(args.max_new_tokens, args.memory, args.num_images if args.num_images is not None else 1)
        < 1
    ):
        parser.error("--max_new_tokens, --memory and --num_images count from 1")
    if args.use_answers and not args.question_file:
        parser.error("--use_answers needs --question_file")
    return args


def read_samples(args):
    """A Sample per question of the list, or per picture of the folder."""
    if args.question_file:
        return read_questions(args.question_file, args.image_folder)[: args.num_images]
    return [
        Sample(file.stem, file, args.prompt_text, extra={"image_id": file.stem})
        for file in list_pictures(args.image_folder)[: args.num_images]
    ]


def make_process(args, vlm, layers):
    def process(loaded):
        return [one(sample, picture) for sample, picture in loaded]

    def one(sample, picture):
        batch = vlm.encode([sample], [picture])
        ids = (
            answer_ids(vlm, batch.prompts[0], sample.answer)
            if args.use_answers
            else generate(vlm, batch, args.max_new_tokens).ids[0]
        )
        run = trace(vlm, batch, ids, tower=not args.no_tower)
        targets = range(len(ids))
        found = attribution.relevancy(run, targets, layers, budget=args.memory * 2**20)
        arrays = {"rows": found.rows} | ({"cells": found.cells} if found.cells is not None else {})
        arrays["raw_attention"] = attribution.raw_attention(run, targets, layers)[
            ..., run.vision.cpu().numpy()
        ]
        arrays["vision_norms"] = run.tokens.float().norm(dim=-1).cpu().numpy()
        codes = run.batch.groups[0].cpu()
        text = torch.isin(codes, torch.tensor(TEXT))
        shares = rules.share(torch.from_numpy(found.image), torch.from_numpy(found.rows)[..., text])
        probabilities = run.logits.softmax(-1)[torch.arange(len(ids)), ids]
        words = vocabulary(vlm.tokenizer, run.batch.input_ids[0].tolist())
        labels = [words[int(i)] for i in run.batch.input_ids[0]]
        grid = batch.grids[0] or (
            vlm.family.patches and vlm.family.patches(vlm, picture.size, batch.image_rows[0])
        )
        record = {
            "image_id": str(sample.extra.get("image_id", sample.id)),
            "file_name": sample.image.name,
            "question": sample.question,
            "prompt": batch.prompts[0],
        }
        record |= {
            "caption": vlm.text(ids),
            "generated_ids": ids,
            "tokens": labels[-len(ids) :],
            "labels": labels,
        }
        record |= {
            "groups": [GROUPS[code] for code in codes.tolist()],
            "producing": run.rows.tolist(),
            "layers": found.layers,
        }
        record |= {
            "probabilities": probabilities.tolist(),
            "visual_share": shares.tolist(),
            "grid": grid and {"shape": grid.shape, "size": grid.size},
        }
        return record, {name: np.asarray(values, np.float32) for name, values in arrays.items()} | (
            {"boxes": grid.boxes} if grid is not None else {}
        )

    return process


def main(argv=None):
    args = parse_args(argv)
    samples = read_samples(args)
    vlm = load_from_args(args)
    vlm.need("decoder-only")
    depth = len(vlm.parts.layers)
    layers = sorted(set(args.layers)) if args.layers else list(range(depth))
    if not 0 <= layers[0] <= layers[-1] < depth:
        raise cli.UsageError(
            f"--layers {layers}: {args.model_path} has {depth} layers, counted from 0"
        )
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt_for(vlm, args.prompt_text)[0],
        "layers": layers,
        "image_aspect": args.image_aspect,
    }
    identity |= {
        name: getattr(args, name) for name in ("max_new_tokens", "no_tower", "use_answers")
    }
    identity["questions"] = args.question_file and args.question_file.rsplit("/", 1)[-1]
    free = {
        "model_path": args.model_path,
        "image_folder": args.image_folder,
        "device": str(vlm.device),
        "memory": args.memory,
    }
    run = rundirs.open_run(
        rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name),
        EXPERIMENT,
        identity,
        free,
        args.overwrite,
    )
    counts = engine.run_items(
        run, samples, with_picture, make_process(args, vlm, layers), 1, args.shard, args.num_workers
    )
    run.finish()
    print(
        f"{run.path}: figures by python diagnostic_tools/viz_relevancy.py --run_dir {run.path}"
        f" --image_folder {args.image_folder}"
    )
    return engine.exit_code(counts, run)


if __name__ == "__main__":
    cli.run(main)

"""The ablation experiment on questions: does the model still complete "It is a" with the object's
name?

    python scripts/ablation_experiment_curate.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes \\
        --clean_questions_file data/shapes/clean_questions.json --mean_tensor
        runs/mean_vector/tiny-llava/mean_vector.pt

Each item is one question of --clean_questions_file about one object, asked as "<question>" with the
answer's beginning "It is a" given. Conditions as in ablation_experiment.py; integrated gradients of
the first token of the right name. A result holds whether the completion names the object (whole
words), the likeliest next token, and the log-probabilities of the name's first token and of the
whole name. arXiv 2410.07149, table 1, VQA.

Runs land in <out_root>/ablation_vqa/<model>[__<run_name>]/; an interrupted run goes on by the same
command."""

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp.criteria import mentions, prefix_published
from vlmdiag.interp.interventions import (
    add_ablation_arguments,
    asking,
    condition_sets,
    integrated_gradients,
    naming,
    prepare,
    replacement,
    replacement_of,
    run,
)
from vlmdiag.interp.targets import (
    add_arguments,
    load,
    load_vlm,
    open_run,
    read_curated_targets,
    tokens_of,
    write_results,
)
from vlmdiag.model.decoding import answer_ids, extended
from vlmdiag.runs import engine

EXPERIMENT = "ablation_vqa"
START = "It is a"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add_arguments(parser)
    add_model_arguments(parser, path=False)
    add_ablation_arguments(parser)
    parser.add_argument(
        "--clean_questions_file",
        required=True,
        help='JSON: {"<image id>": [question or {"question", "answer", "category"}, ...]}',
    )
    parser.add_argument("--max_new_tokens", type=int, default=8)
    return parser.parse_args(argv)


def make_process(args, vlm, kind, mean):
    @torch.no_grad()
    def process(loaded):
        return [one(*parts) for parts in loaded]

    def one(item, image, mask):
        plain = vlm.encode([item.sample], [image])
        batch = extended(plain, answer_ids(vlm, plain.prompts[0], START)[:-1], "template")
        name = answer_ids(vlm, plain.prompts[0] + " " + START, item.answer)[:-1]
        tokens = tokens_of(args, vlm, batch, mask)
        prompt = prepare(vlm, batch, vlm.vision(batch))
        record = {
            "image_id": item.sample.extra["image_id"],
            "file_name": item.image.name,
            "category": item.category,
            "annotation": item.annotation.get("id"),
        }
        record |= {
            "question": item.sample.question,
            "answer": item.answer,
            "prompt": f"{plain.prompts[0]} {START}",
        }
        record |= {"object_tokens": len(tokens), "vision_tokens": len(prompt.vision)}
        first_piece = vlm.tokenizer.convert_ids_to_tokens(name[0])

        def result(completed, named):
            (ids, _, first), (_, logprobs, _) = completed, named
            text, best = vlm.text(ids), int(first.argmax())
            token = vlm.tokenizer.decode([best])
            right = (
                prefix_published(token, first_piece)
                if args.paper_compat
                else mentions(text, item.answer)
            )
            facts = {
                "correct": bool(right),
                "text": text,
                "generated_token": token,
                "generated_token_prob": first[best].exp().item(),
            }
            return facts | {
                "logprob_first_token": first[name[0]].item(),
                "logprob_name": logprobs.sum().item(),
            }

        what = [asking(args.max_new_tokens), naming(name)]
        found = [ask(vlm, batch, features=prompt.features) for ask in what]
        record["conditions"] = {
            "none": {
                "vqa": result(*((part.ids[0], part.logprobs[0], part.first[0]) for part in found)),
                "tokens": 0,
            }
        }
        record["caption"], record["eligible"] = (
            record["conditions"]["none"]["vqa"]["text"],
            record["conditions"]["none"]["vqa"]["correct"],
        )
        if not record["eligible"]:
            return record, {}
        vision = torch.cat(prompt.features.pooler_output)
        values, scores = replacement(kind, mean, vision, args.seed, item.id), None
        if args.gradient_steps:
            baseline = values if kind != "noise" else torch.zeros_like(vision)
            scores, record["gradient_completeness_error"] = integrated_gradients(
                vlm,
                prompt,
                baseline,
                name[0],
                args.gradient_steps,
                args.per_pass,
                args.paper_compat,
            )
        norms = vision.float().norm(dim=-1).cpu().numpy()
        sets = condition_sets(
            batch.grids[0],
            norms,
            scores,
            tokens,
            args.sizes,
            args.draws,
            args.seed,
            item.id,
            args.paper_compat,
        )
        record["skipped"] = {name: why for name, why in sets.items() if isinstance(why, str)}
        sets = {name: index for name, index in sets.items() if not isinstance(index, str)}
        results = run(vlm, [prompt, prompt], sets, values, args.per_pass, what)
        record["conditions"] |= {
            name: {"vqa": result(*results[name]), "tokens": len(index)}
            for name, index in sets.items()
        }
        return record, {
            f"tokens_{name}": index.astype(np.int32) for name, index in sets.items()
        } | {"vision_positions": prompt.vision.cpu().numpy()}

    return process


def published_form(run_dir, names):
    """By item id: baseline and experiments, each with is_correct, generated_token and its
    probability, correct_token and its probability."""
    content = {}
    for id in run_dir.ids():
        record = run_dir.record(id)
        parts = {
            names(name): {
                "is_correct": part["vqa"]["correct"],
                "generated_token": part["vqa"]["generated_token"],
                "generated_token_prob": part["vqa"]["generated_token_prob"],
                "correct_token": record["answer"],
                "correct_token_prob": float(np.exp(part["vqa"]["logprob_first_token"])),
            }
            for name, part in record["conditions"].items()
        }
        content[id] = {"baseline": parts.pop("baseline"), "experiments": parts}
    return content


def published_name(name):
    kind, _, rest = name.partition("_")
    fixed = {
        "none": "baseline",
        "all": "image_ablation",
        "register": "register_ablation",
        "patch_0": "patch_ablation",
    }
    return (
        fixed.get(name)
        or {"patch_1": "patch_plus_one_ablation", "patch_2": "patch_plus_two_ablation"}.get(name)
        or f"{kind}_ablation_{rest}"
    )


def main(argv=None):
    args = parse_args(argv)
    items, vlm = read_curated_targets(args), load_vlm(args, load_from_args)
    kind, mean, provenance = replacement_of(args, vlm)
    more = {
        "replacement": kind,
        "mean_provenance": provenance,
        "questions": args.clean_questions_file.rsplit("/", 1)[-1],
        "start": START,
    }
    run_dir = open_run(
        args, EXPERIMENT, vlm, ("sizes", "draws", "gradient_steps", "max_new_tokens"), more
    )
    print(f"{run_dir.path}: {len(items)} questions, {vlm.family.name} on {vlm.device}")
    counts = engine.run_items(
        run_dir,
        items,
        load,
        make_process(args, vlm, kind, mean),
        1,
        args.shard,
        args.num_workers,
        progress="questions",
    )
    run_dir.finish()
    if args.results_file:
        write_results(args.results_file, published_form(run_dir, published_name))
    return engine.exit_code(counts, run_dir)


if __name__ == "__main__":
    cli.run(main)

"""Where does the model keep what it knows of an object? Vision tokens are replaced before the
decoder reads them, and the object is asked for again.

    python scripts/ablation_experiment.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes --mean_tensor runs/mean_vector/tiny-llava/mean_vector.pt

Two settings: generative ("Describe this image.": is the object named?) and polling ("Is there a
<object> in this image?": Yes?). Pictures pass the object filter, are named unablated, and not when
noise covers the object. Conditions, one result each: register tokens (norm above mean + 2 standard
deviations); the object's tokens with 0 to 2 buffers; the tokens with the largest integrated
gradients; random tokens, of given numbers and as many as the object has; compact random pieces;
all. arXiv 2410.07149 (Towards Interpreting Visual Information Processing in VLMs), table 1.

Runs land in <out_root>/ablation/<model>[__<run_name>]/; an interrupted run goes on by the same
command. summarize_results.py makes the table. On tiny-llava see README.md."""

import numpy as np
import torch
from PIL import Image

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp.criteria import mentions, mentions_published, says_yes, says_yes_published
from vlmdiag.interp.interventions import (
    add_ablation_arguments,
    asking,
    condition_sets,
    integrated_gradients,
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
    read_targets,
    tokens_of,
    write_results,
)
from vlmdiag.model.decoding import answer_ids
from vlmdiag.pictures.samples import Sample
from vlmdiag.runs import engine

EXPERIMENT = "ablation"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add_arguments(parser)
    add_model_arguments(parser, path=False)
    add_ablation_arguments(parser)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument(
        "--no_noise_filter",
        action="store_true",
        help="also pictures whose object is named although noise covers it",
    )
    return parser.parse_args(argv)


def covered_by_noise(image, grid, tokens, seed):
    """The picture with the boxes of the tokens overwritten by one patch of uniform noise
    (published: unseeded)."""
    pixels = np.array(image)
    for x0, y0, x1, y1 in grid.boxes[tokens]:
        rows, columns = (
            slice(max(0, int(np.floor(a))), max(0, int(np.ceil(b))))
            for a, b in ((y0, y1), (x0, x1))
        )
        part = pixels[rows, columns]
        part[:] = np.random.default_rng(seed).integers(0, 256, part.shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def make_process(args, vlm, mean):
    kind, mean, _ = mean

    @torch.no_grad()
    def process(loaded):
        return [one(*parts) for parts in loaded]

    def one(item, image, mask):
        described, polled = (
            item.sample,
            Sample(item.id, item.image, f"Is there {article(item.category)} in this image?"),
        )
        batch, asked = (vlm.encode([sample], [image]) for sample in (described, polled))
        tokens, features = tokens_of(args, vlm, batch, mask), vlm.vision(batch)
        limit = {"generative": args.max_new_tokens, "polling": 10}
        first = prepare(vlm, batch, features)
        prompts = {"generative": first, "polling": prepare(vlm, asked, features, first)}
        yes = answer_ids(vlm, asked.prompts[0], "Yes")[0]
        record = {
            "image_id": item.sample.extra["image_id"],
            "file_name": item.image.name,
            "category": item.category,
            "annotation": item.annotation.get("id"),
        }
        record |= {
            "prompt": batch.prompts[0],
            "polling_prompt": asked.prompts[0],
            "object_tokens": len(tokens),
            "vision_tokens": len(first.vision),
        }

        def result(name, ids, logprobs, first_step, prompt):
            text = vlm.text(ids)
            if name == "generative":
                named = (
                    mentions_published(prompt + text, item.category)
                    if args.paper_compat
                    else mentions(text, item.category)
                )
                return {"correct": bool(named), "text": text}
            said = says_yes_published(text) if args.paper_compat else says_yes(text)
            return {"correct": said is True, "text": text, "logprob_yes": first_step[yes].item()}

        def all_results(found):
            return {
                name: result(name, *part, prompts[name].batch.prompts[0])
                for name, part in zip(prompts, found, strict=True)
            }

        plain = []
        for name, prompt in prompts.items():
            found = asking(limit[name])(vlm, prompt.batch, features=prompt.features)
            plain.append((found.ids[0], found.logprobs[0], found.first[0]))
        record["conditions"] = {"none": all_results(plain) | {"tokens": 0}}
        record["caption"] = record["conditions"]["none"]["generative"]["text"]
        record["eligible"] = record["conditions"]["none"]["generative"]["correct"]
        if record["eligible"] and not args.no_noise_filter:
            noisy = vlm.encode(
                [described], [covered_by_noise(image, batch.grids[0], tokens, args.seed)]
            )
            found = asking(args.max_new_tokens)(vlm, noisy)
            record["under_noise"] = result("generative", found.ids[0], None, None, noisy.prompts[0])
            record["eligible"] = not record["under_noise"]["correct"]
        if not record["eligible"]:
            return record, {}
        vision = torch.cat(features.pooler_output)
        values = replacement(kind, mean, vision, args.seed, item.id)
        scores = None
        if args.gradient_steps:
            baseline = values if kind != "noise" else torch.zeros_like(vision)
            scores, record["gradient_completeness_error"] = integrated_gradients(
                vlm,
                prompts["polling"],
                baseline,
                yes,
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
        found = run(
            vlm,
            list(prompts.values()),
            sets,
            values,
            args.per_pass,
            [asking(limit[name]) for name in prompts],
        )
        record["conditions"] |= {
            name: all_results(found[name]) | {"tokens": len(index)} for name, index in sets.items()
        }
        return record, {
            f"tokens_{name}": index.astype(np.int32) for name, index in sets.items()
        } | {"vision_positions": first.vision.cpu().numpy()}

    return process


def article(name):
    """'a cat', 'an apple'."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def published_form(run):
    """The run in the form of the published results file: by image id, each condition with
    generative, polling, description, and the token positions."""
    content = {"cfg": {"zero_ablation": run.meta["settings"]["replacement"] == "zeros"}}
    for id in run.ids():
        record, arrays = run.record(id), run.arrays(id)
        if not record["eligible"]:
            continue
        parts = {published_name(name): part for name, part in record["conditions"].items()}
        own = {
            name: {
                "generative": part["generative"]["correct"],
                "polling": part["polling"]["correct"],
                "description": part["generative"]["text"],
            }
            for name, part in parts.items()
        }
        indices = {
            published_name(name[7:]): arrays["vision_positions"][index].tolist()
            for name, index in arrays.items()
            if name.startswith("tokens_")
        }
        content[str(record["image_id"])] = own | {"indices": indices}
    return content


def published_name(name):
    kind, _, rest = name.partition("_")
    fixed = {"none": "no_ablation", "all": "image_ablation", "register": "register_ablation"}
    return fixed.get(name) or f"{kind}_ablation_{rest}"


def main(argv=None):
    args = parse_args(argv)
    items, vlm = read_targets(args), load_vlm(args, load_from_args)
    kind, mean, provenance = replacement_of(args, vlm)
    names = ("sizes", "draws", "gradient_steps", "max_new_tokens", "no_noise_filter")
    run_dir = open_run(
        args, EXPERIMENT, vlm, names, {"replacement": kind, "mean_provenance": provenance}
    )
    print(
        f"{run_dir.path}: {len(items)} pictures pass the object filter, {vlm.family.name} on"
        f" {vlm.device}"
    )
    process = make_process(args, vlm, (kind, mean, provenance))
    counts = engine.run_items(run_dir, items, load, process, 1, args.shard, args.num_workers)
    run_dir.finish()
    if args.results_file:
        write_results(args.results_file, published_form(run_dir))
    return engine.exit_code(counts, run_dir)


if __name__ == "__main__":
    cli.run(main)

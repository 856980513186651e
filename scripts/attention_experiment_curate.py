"""How does what the model knows of an object reach its answer? Attention between two groups of
tokens is cut in a window of layers.

    python scripts/attention_experiment_curate.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes \\
        --clean_questions_file data/shapes/clean_questions.json

Questions and criteria are those of ablation_experiment_curate.py. Default are the paper's 36
knockouts: object, object + 1 and + 2 buffers, and the other image tokens -> last token; object + 1
buffer, and the image without its last row -> last row of the image; each in 6 windows. --pairs and
--windows take any others. A query row that is cut renormalises over what is left. arXiv 2410.07149,
table 2.

Rows before the first cut query are the same in every layer, so the unblocked pass's keys and values
serve; only later rows run, all knockouts of a picture in one pass (capturing.branches). Runs land
in <out_root>/knockout/<model>[__<run_name>]/; an interrupted run goes on by the same command."""

import numpy as np
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp.criteria import names, prefix_published
from vlmdiag.interp.interventions import prepare
from vlmdiag.interp.knockout import (
    PAPER_PAIRS,
    PAPER_WINDOWS,
    PUBLISHED,
    blocks_for,
    layer_windows,
    parse_pair,
    positions_of,
)
from vlmdiag.interp.objects import buffered
from vlmdiag.interp.targets import (
    add_arguments,
    load,
    load_vlm,
    open_run,
    read_curated_targets,
    tokens_of,
    write_results,
)
from vlmdiag.model.attention import edit
from vlmdiag.model.decoding import answer_ids, extended, generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.prefix import branches, first_positions
from vlmdiag.runs import engine

EXPERIMENT = "knockout"
START = "It is a"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add_arguments(parser)
    add_model_arguments(parser, path=False)
    parser.add_argument(
        "--clean_questions_file",
        required=True,
        help='JSON: {"<image id>": [question or {"question", "answer", "category"}, ...]}',
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=parse_pair,
        default=list(PAPER_PAIRS),
        help="FROM:TO, keys that are hidden and queries they are hidden from",
    )
    parser.add_argument(
        "--windows",
        nargs="+",
        default=list(PAPER_WINDOWS),
        help="names, a-b, single, sliding:width[:stride]",
    )
    return parser.parse_args(argv)


def make_process(args, vlm):
    lens, windows = Lens(vlm), layer_windows(args.windows, len(vlm.parts.layers))

    @torch.no_grad()
    def process(loaded):
        return [one(*parts) for parts in loaded]

    def one(item, image, mask):
        plain = vlm.encode([item.sample], [image])
        lead, name = (
            answer_ids(vlm, plain.prompts[0], START)[:-1],
            answer_ids(vlm, plain.prompts[0] + " " + START, item.answer)[:-1],
        )
        batch = extended(plain, lead, "template")
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
        right_ids = {
            answer_ids(vlm, plain.prompts[0] + " " + START, other)[0]
            for other in names(item.answer)
        }

        def result(logits):
            first = logits.float().log_softmax(-1)
            best = int(first.argmax())
            token = vlm.tokenizer.decode([best])
            right = prefix_published(token, first_piece) if args.paper_compat else best in right_ids
            facts = {
                "correct": bool(right),
                "generated_token": token,
                "generated_token_prob": first[best].exp().item(),
            }
            return facts | {"logprob_first_token": first[name[0]].item()}

        record["conditions"] = {"none": {"vqa": result(prompt.logits)}}
        record["caption"] = record["conditions"]["none"]["vqa"]["generated_token"]
        record["eligible"] = record["conditions"]["none"]["vqa"]["correct"]
        if not record["eligible"]:
            return record, {}
        groups, length = batch.groups[0].cpu().numpy(), batch.groups.shape[1]
        positions = positions_of(
            groups, batch.grids[0], {b: buffered(batch.grids[0], tokens, b) for b in (0, 1, 2)}
        )
        blocks = blocks_for(positions, args.pairs, windows, length)
        record["skipped"] = [
            f"{a}:{b}" for a, b in args.pairs if not any(key[:2] == (a, b) for key in blocks)
        ]
        logits = knocked_out(prompt, blocks)
        record["conditions"] |= {
            ":".join(key): {"vqa": result(logits[key]), "tokens": int(blocks[key].keys.sum())}
            for key in blocks
        }
        return record, {
            f"positions_{name}": some.astype(np.int32) for name, some in positions.items()
        }

    def knocked_out(prompt, blocks):
        """{key: logits (V,) after the prompt} of every knockout; those with the same first query
        share a pass."""
        starts, logits = {}, {}
        for key, block in blocks.items():
            starts.setdefault(int(block.queries[0].nonzero()[0]), []).append(key)
        for start, keys in starts.items():
            cache = first_positions(vlm, prompt.cache, start, 1)
            length = prompt.batch.groups.shape[1]
            ways = max(1, 2 * length // (length - start))  # a pass of at most two prompts' rows
            for at in range(0, len(keys), ways):
                some = keys[at : at + ways]
                if cache is None:
                    for key in some:
                        with edit(vlm, blocks=[blocks[key]]):
                            logits[key] = generate(
                                vlm, prompt.batch, 1, features=prompt.features
                            ).first[0]
                    continue
                states = branches(
                    vlm, prompt.batch, cache, prompt.embeds, start, [[blocks[key]] for key in some]
                )
                logits |= dict(zip(some, lens.logits(states[:, -1], normed=True)))
        return logits

    return process


def published_form(run_dir):
    """By item id: baseline and attn_block_results, under the published names where a knockout has
    one."""
    content = {}
    for id in run_dir.ids():
        record = run_dir.record(id)

        def part(found, answer=record["answer"]):
            facts = {
                "is_correct": found["correct"],
                "generated_token": found["generated_token"],
                "generated_token_prob": found["generated_token_prob"],
            }
            return facts | {
                "correct_token": answer,
                "correct_token_prob": float(np.exp(found["logprob_first_token"])),
            }

        results = {}
        for key, found in record["conditions"].items():
            if key != "none":
                source, target, window = key.split(":", 2)
                prefix = PUBLISHED.get((source, target), f"{source}_to_{target}")
                results[f"{prefix}_{'ALL_LAYERS' if window == 'all' else window.upper()}"] = part(
                    found["vqa"]
                )
        content[id] = {
            "baseline": part(record["conditions"]["none"]["vqa"]),
            "attn_block_results": results,
        }
    return content


def main(argv=None):
    args = parse_args(argv)
    items, vlm = read_curated_targets(args), load_vlm(args, load_from_args)
    more = {
        "pairs": [":".join(pair) for pair in args.pairs],
        "questions": args.clean_questions_file.rsplit("/", 1)[-1],
        "start": START,
    }
    more["windows"] = {
        name: list(some)
        for name, some in layer_windows(args.windows, len(vlm.parts.layers)).items()
    }
    run_dir = open_run(args, EXPERIMENT, vlm, (), more)
    print(
        f"{run_dir.path}: {len(items)} questions, {len(more['pairs']) * len(more['windows'])}"
        f" knockouts each, {vlm.family.name} on {vlm.device}"
    )
    counts = engine.run_items(
        run_dir,
        items,
        load,
        make_process(args, vlm),
        1,
        args.shard,
        args.num_workers,
        progress="questions",
    )
    run_dir.finish()
    if args.results_file:
        write_results(args.results_file, published_form(run_dir))
    return engine.exit_code(counts, run_dir)


if __name__ == "__main__":
    cli.run(main)

"""How does a vision-language model balance picture and text while it describes a picture? One run
over COCO, one NPZ + JSON per image.

    python diagnostic_tools/run_coco_diagnostics.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/val2017 \\
        --ann_file data/shapes/annotations/captions_val2017.json --out_root runs \\
        --restrict_to_past --max_new_tokens 32 --probe_hidden_norms --hidden_norm_kind l2 \\
        --max_images 20

From one prefill and one cached generation per batch:
    CMB            head_vision_share (L, H): mean over steps of V / (V + U), attention of the
                   producing row to vision and to user text
    group_mass     (groups, L, H): the row's whole attention, sums to 1
    shares         system / vision / user text per step, and per layer (layer_shares)
    RoPE probe     alphaV, delta_gv, delta_alphaV (L, H): vision keys moved by delta positions, seen
                   from the last prompt row
    of chats       picture_mass (pictures, L, H), turn_mass (turns, groups, L, H): the same mass by
                   picture and turn (--images, --messages, --video)
    hidden norms   hidden_norms_<group> (L + 1): mean norm of the residual stream, 0 = embeddings,
                   before the final norm
Beyond Semantics (arXiv 2503.17349). Runs land in <out_root>/<model>[__<run_name>]__sp-<0|1>/ (1: no
system prompt in what the model saw); an interrupted run goes on by the same command. On tiny-llava
the vision share rises from 0.76 in the first layer to 0.95 in the last, and vision tokens enter
about ten times as long as text tokens."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures import chats
from vlmdiag.pictures.coco import read_coco
from vlmdiag.pictures.given import with_answers
from vlmdiag.pictures.samples import with_pictures
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.types import VLM


# flags that may differ when a run goes on
FREE = ("image_dir", "ann_file", "max_images", "batch_size")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        action="append",
        required=True,
        help="folder or hub id; may be given several times",
    )
    parser.add_argument("--image_dir", help="folder of the pictures of --ann_file or --messages")
    parser.add_argument("--ann_file", help="COCO json; gives image ids and file names")
    cli.add_chat_arguments(parser)
    parser.add_argument(
        "--strip_system_prompt", action="store_true", help="leave the system prompt out"
    )
    parser.add_argument(
        "--prompt_text", default="Describe the image.", help="question asked about every picture"
    )
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=64, help="most tokens of an answer"
    )
    parser.add_argument(
        "--do_sample", action="store_true", help="sample instead of greedy decoding"
    )
    parser.add_argument(
        "--temperature", type=cli.temperature, default=1.0, help="of --do_sample, above 0"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the sampling noise")
    parser.add_argument(
        "--answers",
        default=None,
        help=(
            "preds.json-like list: measure these captions, and that they end there, by teacher"
            " forcing instead of generating"
        ),
    )
    parser.add_argument(
        "--drafts",
        default=None,
        help=(
            "preds.json-like list of answers that are likely, such as those of another"
            " --vision_scale or snapshot: the same answers in fewer passes"
        ),
    )
    parser.add_argument(
        "--delta_steps",
        type=cli.number(-1_000_000, 1_000_000),
        nargs="+",
        default=[1.0],
        help="shifts of the RoPE probe in positions; the (L, H) arrays are for the first",
    )
    parser.add_argument(
        "--restrict_to_past", action="store_true", help="RoPE probe: leave out the query's own key"
    )
    parser.add_argument(
        "--vision_scale",
        type=cli.scale,
        default=1.0,
        help="scale the vision embeddings (dose-response)",
    )
    parser.add_argument(
        "--max_images", type=cli.positive, default=None, help="only the first so many; None: all"
    )
    cli.add_run_arguments(parser)
    parser.add_argument("--pos_only", action="store_true", help="only the RoPE probe")
    parser.add_argument(
        "--no_rope",
        action="store_true",
        help="all but the RoPE probe, for models without rotary positions",
    )
    parser.add_argument(
        "--probe_hidden_norms",
        action="store_true",
        help="also measure the norms of hidden states by group",
    )
    parser.add_argument(
        "--hidden_norm_kind",
        choices=["l2", "rms"],
        default="l2",
        help="l2: length of a vector; rms: length over the root of its width",
    )
    parser.add_argument(
        "--save_hidden_grid",
        action="store_true",
        help="norm of every position, hidden_norms_grid (L + 1, T)",
    )
    parser.add_argument(
        "--save_hidden_plots",
        action="store_true",
        help="figures of each image in per_image/<id>_artifacts/",
    )
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published definitions where they differ, see README",
    )
    parser.add_argument("--batch_size", type=cli.positive, default=1, help="prompts in a batch")
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    cli.check_chat(parser, args, ["image_dir", "ann_file"], ["ann_file"])
    if (args.save_hidden_grid or args.save_hidden_plots) and not args.probe_hidden_norms:
        parser.error("--save_hidden_grid and --save_hidden_plots need --probe_hidden_norms")
    if args.overwrite and args.shard != (0, 1):
        parser.error(
            "--overwrite with --shard would remove what other shards wrote: start again with"
            " --overwrite --max_images 1 first"
        )
    if args.drafts is not None and (args.answers is not None or args.do_sample or args.pos_only):
        parser.error(
            "--drafts are of greedy answers: leave --answers, --do_sample and --pos_only out"
        )
    if args.answers is not None and args.do_sample:
        parser.error("--answers are measured as they are: leave --do_sample out")
    if args.delta_steps[0] == 0 and not args.no_rope:
        parser.error("--delta_steps: the first, which figures show, is a move by no position")
    if args.pos_only and args.no_rope:
        parser.error("--pos_only and --no_rope leave nothing to measure")
    return args


def text_of_ids(vlm: VLM, ids: tuple[int, ...]) -> str | None:
    """The text of an answer's ids, None where the model has one of them not."""
    head = vlm.parts.lm_head
    count = getattr(head, "out_features", len(head.weight))
    if max(ids) >= count or None in vlm.tokenizer.convert_ids_to_tokens(ids):
        return None
    return vlm.text(ids)


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of the model --model_path."""
    from vlmdiag.beyond_semantics.diagnostics import Measures, check_model, make_process
    from vlmdiag.model.prompts import chat_for, prompt_for

    path = args.model_path
    names = [field.name for field in dataclasses.fields(Measures)]
    measures = Measures(**{name: getattr(args, name) for name in names})
    vlm = load_from_args(args, path)
    check_model(vlm, measures)
    samples = chats.given_samples(args, args.image_dir)[: args.max_images]
    if not samples:
        samples = read_coco(args.image_dir, args.ann_file, args.max_images, args.prompt_text)
    strip = args.strip_system_prompt
    if strip and prompt_for(vlm, args.prompt_text)[1] is None:
        raise UsageError(
            f"{path}: --strip_system_prompt, but its prompt has no system prompt to leave out"
        )
    prompt, system, _ = prompt_for(vlm, args.prompt_text, strip)
    if samples[0].chat is not None:
        prompt, system, *_ = chat_for(vlm, samples[0].chat, strip)
    where = rundirs.run_path(args.out_root, path, run_name=args.run_name, sp=int(system is None))
    settings: dict[str, Any] = {"strip_system_prompt": strip, "prompt": prompt}
    settings |= {"prompt_text": args.prompt_text}
    settings |= {name: getattr(args, name) for name in names if name != "no_rope"}
    of_chats = chats.settings_of(args)
    names_of_lists = () if of_chats else ("image_dir", "ann_file")
    settings |= {name: Path(getattr(args, name)).name for name in names_of_lists} | of_chats
    settings["image_aspect"] = args.image_aspect
    for name in ("answers", "drafts"):
        path_of_list = getattr(args, name)
        if path_of_list is not None:
            text_of = partial(text_of_ids, vlm)
            samples = with_answers(
                samples,
                f"--{name}",
                path_of_list,
                "caption",
                text_of,
                may_be_empty=True,
                may_lack=name == "drafts",
            )
            settings[name] = Path(path_of_list).name
    if args.no_rope:
        settings["no_rope"] = True
    process = make_process(vlm, measures, strip, where / "per_image", args.drafts is not None)
    free = {name: getattr(args, name) for name in FREE}
    return worker_for(
        args,
        vlm,
        rundirs.COCO,
        samples,
        with_pictures,
        process,
        settings,
        free,
        path=where,
        batch_size=args.batch_size,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    models = [cli.changed(args, model_path=path) for path in args.model_path]
    return max(run_worker(model, make_worker) for model in models)


if __name__ == "__main__":
    cli.run(main)

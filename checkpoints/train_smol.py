"""Train smol-llava: does a published language model learn to read the tokens of a small tower?

    python checkpoints/train_smol.py        # the model; the same command goes on after a stop
    python checkpoints/train_smol.py --warm_start permuted  # its control
    python checkpoints/build_smol_llava.py  # afterwards: the folder checkpoints/smol-llava-135m

As LLaVA was trained, on a stream of generated scenes that never repeats. The tower is tiny-llava's,
frozen.
    warm start  400 steps without the language model: the patches of an object point at the words of
                its colour and shape among the language model's own embeddings (cosines); then off,
                and nothing asks for it again. It makes the difference between hours and days, but
                it plants what a logit lens looks for in the first layers. So there are controls:
                `permuted` points at the words of other colours and shapes, `none` leaves it out.
    stage 1     the connector alone, the language model frozen: captions and simple questions
    stage 2     connector and low-rank adapters (LoRA, rank 8) on the question mix of the five
                studies. Every eighth step also holds the adapted model to the untouched one (KL
                divergence) on text that the untouched one wrote, so that it keeps its English.
Written to --out/<warm start>/: stage1, then stage2-350 and stage2-700 (after so many steps
of the stage) and stage2.

--state_dir/<warm start>/ holds state.pt, saved every ten minutes, and log.jsonl. What a step sees
depends on its number alone, so going on gives the weights of a run that was never stopped, at the
same number of threads. The log has a line every ten steps, every hundred with accuracies on
held-out scenes (teacher forcing, the whole answer right) and the loss on a page of English relative
to the untouched language model. On one core of an AMD EPYC in bfloat16 a step of 3 pictures and 36
questions takes some 3.5 s.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli

HERE = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--warm_start",
        choices=["words", "permuted", "none"],
        default="words",
        help="what the language model begins with",
    )
    parser.add_argument(
        "--out",
        default=str(HERE / "smol-llava"),
        help="folder of the parts, one for each warm start",
    )
    parser.add_argument("--state_dir", default=str(HERE / ".train" / "smol"), help="state and log")
    parser.add_argument(
        "--gguf",
        help="GGUF file of the language model, or a folder of it; by default it is downloaded",
    )
    parser.add_argument("--warm_steps", type=cli.count, default=400, help="steps of the warm start")
    parser.add_argument(
        "--stage1_steps", type=cli.count, default=300, help="steps of the connector alone"
    )
    parser.add_argument(
        "--stage2_steps", type=cli.count, default=1400, help="steps of connector and adapters"
    )
    parser.add_argument(
        "--pictures",
        type=cli.positive,
        default=3,
        help="pictures a step, each with about 12 questions",
    )
    parser.add_argument(
        "--row_length",
        type=cli.positive,
        default=432,
        help="tokens of a picture with its questions",
    )
    parser.add_argument(
        "--eval_every",
        type=cli.positive,
        default=100,
        help="steps between accuracies on held-out scenes",
    )
    parser.add_argument(
        "--eval_scenes",
        type=cli.positive,
        default=32,
        help="held-out scenes, every fourth a corridor",
    )
    parser.add_argument(
        "--save_every",
        type=cli.number(0, 10**6),
        default=10,
        help="minutes between two savings of the state",
    )
    parser.add_argument(
        "--stop_after",
        type=cli.number(0, math.inf),
        default=math.inf,
        help="minutes after which to save and end",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the random draws")
    parser.add_argument("--threads", type=cli.whole(1, 1024), default=1, help="of PyTorch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1", type=cli.device)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the language model"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from vlmdiag.scenes.smol_training import Log, Trainer, run_stage

    deadline = time.monotonic() + 60 * args.stop_after
    torch.set_num_threads(args.threads)
    trainer = Trainer(args)
    if not trainer.load():
        trainer.warm_start()
        trainer.begin(1)
        trainer.save()
    log = Log(trainer.folder / "log.jsonl", trainer.stage, trainer.step)
    steps = {1: args.stage1_steps, 2: args.stage2_steps}
    for stage in range(trainer.stage, 3):
        if stage != trainer.stage:
            trainer.begin(stage)
        left_after = steps[2] if stage == 1 else 0
        if not run_stage(trainer, steps[stage], left_after, log, deadline):
            print("time is up; run the same command again to go on")
            return 3
    return 0


if __name__ == "__main__":
    cli.run(main)

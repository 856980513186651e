"""Train the tiny models of this folder: real LLaVA models, small enough for a laptop, on pictures
whose content is known.

    # all of them, one after the other; run again to go on after an interruption
    python checkpoints/train_tiny.py
    # only some stages; --stop_after MINUTES ends in time and keeps the state
    python checkpoints/train_tiny.py --stages tower base

Stages, each resumed from checkpoints/.train/<stage>.pt and written to checkpoints/<model>/ at its
end:
    tower         CLIP tower by a dense loss: colour, shape and centre of the object at each patch
                  (stands in for CLIP's pretraining; no depth)
    base          projector and decoder on packed question turns over frozen tower features ->
                  tiny-llava-scale1..4 on the way
    late          the base goes on with more corridors, more critique, revise and decide prompts,
                  and absent objects in the colour of one that is there
    plain, normWmean, multilayerNorm   the same goes on alike: as it is, behind a normalised
                                       projector, and behind one on four tower layers
                  (Beyond Semantics) -> tiny-llava, tiny-llava-<stage>
    independent   the twin of the base run, on floor scenes whose height in the picture says nothing
                  about depth -> tiny-llava-independent

Relations come last and suddenly; held-out accuracy by kind is printed on the way. Everything random
comes from (--seed, step).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import cli

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from vlmdiag.scenes.training import Options, Pool

HERE = Path(__file__).resolve().parent
STAGES = ["tower", "base", "late", "plain", "normWmean", "multilayerNorm", "independent"]
LEARNING_RATES = {"base": 2e-3, "independent": 2e-3, "late": 1.5e-3}
VARIANT_LEARNING_RATE = 1e-3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--stages", nargs="+", default=STAGES, choices=STAGES, help="only these stages"
    )
    parser.add_argument("--scenes", type=cli.positive, default=16000, help="pictures to train on")
    parser.add_argument("--tower_steps", type=cli.count, default=2500, help="steps of the tower")
    parser.add_argument(
        "--base_steps",
        type=cli.count,
        default=3500,
        help="steps of the model that the variants begin from",
    )
    parser.add_argument(
        "--independent_steps",
        type=cli.count,
        default=5000,
        help="relations come later where height does not give depth away",
    )
    parser.add_argument("--late_steps", type=cli.count, default=1000, help="steps after them")
    parser.add_argument(
        "--variant_steps", type=cli.count, default=700, help="steps of each variant"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the random draws")
    parser.add_argument(
        "--stop_after",
        type=cli.number(0, 10**6),
        default=110,
        help="minutes after which the state is kept and the run ends",
    )
    parser.add_argument(
        "--device", default=None, help="None: a GPU where there is one", type=cli.device
    )
    parser.add_argument(
        "--out_dir", default=str(HERE), help="folder of the models; the state is in its .train"
    )
    return parser.parse_args(argv)


class Run:
    """The models and pictures that the stages hand on to each other."""

    def __init__(self, args: argparse.Namespace, options: Options) -> None:
        from vlmdiag.scenes.packing import Packer
        from vlmdiag.scenes.tiny_llava import make_processor, make_tokenizer

        self.args = args
        self.options = options
        self.tokenizer_folder = options.folder / "tokenizer"
        self.tokenizer_folder.mkdir(exist_ok=True)
        self.tokenizer = make_tokenizer(self.tokenizer_folder)
        self.packer = Packer(self.tokenizer)
        self.processor = make_processor(self.tokenizer)
        self.model = self.new_model()
        self.pools: tuple[float, Pool, Pool] | None = None

    def new_model(self) -> LlavaForConditionalGeneration:
        """A model of random weights, by the state of torch's generator."""
        from transformers import LlavaForConditionalGeneration

        from vlmdiag.scenes.tiny_llava import make_config

        model = LlavaForConditionalGeneration(make_config(self.tokenizer))
        return model.to(self.options.device)

    def pools_of(self, stage: str) -> tuple[Pool, Pool]:
        """(training pictures, held-out pictures) of a stage."""
        from vlmdiag.scenes.training import CORRELATION, held_out_pool, make_pool

        correlation = 0.0 if stage == "independent" else CORRELATION
        if self.pools is None or self.pools[0] != correlation:
            self.pools = None  # two sets at once would not fit in a small memory
            pool = make_pool(self.args.scenes, self.options, correlation)
            self.pools = (correlation, pool, held_out_pool(self.options, correlation))
        return self.pools[1], self.pools[2]

    def save(self, folder: str, model: LlavaForConditionalGeneration) -> None:
        """Write a model with its processor."""
        from vlmdiag.scenes.decoder_training import save_model

        tokenizer_model = self.tokenizer_folder / "tokenizer.model"
        save_model(Path(self.args.out_dir) / folder, model, self.processor, tokenizer_model)

    def train(self, stage: str) -> bool:
        """Run one stage; whether it is done."""
        from vlmdiag.scenes.training import train_tower

        pool, held_out = self.pools_of(stage)
        if stage == "tower":
            tower = self.model.model.vision_tower
            return train_tower(self.options, self.args.tower_steps, tower, pool)
        return self.train_decoder(stage, pool, held_out)

    def train_decoder(self, stage: str, pool: Pool, held_out: Pool) -> bool:
        """Run a stage behind the tower and write its model; whether it is done."""
        import torch

        from vlmdiag.scenes.decoder_training import Decoder, DecoderTraining, make_variant
        from vlmdiag.scenes.training import load_part

        folder = self.options.folder
        load_part(folder, "tower", self.model.model.vision_tower)
        if stage in LEARNING_RATES:
            if stage == "independent":  # starts where the base run started
                torch.manual_seed(self.args.seed)
                self.model = self.new_model()
                load_part(folder, "tower", self.model.model.vision_tower)
            elif stage == "late":
                load_part(folder, "base", Decoder(self.model))
            model = self.model
            steps = getattr(self.args, f"{stage}_steps")
        else:
            load_part(folder, "late", Decoder(self.model))
            model = make_variant(stage, self.model, self.packer, self.options.device)
            steps = self.args.variant_steps

        def save(name: str) -> None:
            self.save(name, model)

        lr = LEARNING_RATES.get(stage, VARIANT_LEARNING_RATE)
        training = DecoderTraining(
            self.options, stage, steps, lr, model, pool, held_out, self.packer, save
        )
        is_done = training.run()
        if is_done and stage not in ("base", "late"):
            save("tiny-llava" if stage == "plain" else f"tiny-llava-{stage}")
        return is_done


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from vlmdiag.scenes.training import Options

    deadline = time.monotonic() + 60 * args.stop_after
    folder = Path(args.out_dir) / ".train"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(args, Options(folder, args.seed, device, deadline))
    for stage in args.stages:
        if not run.train(stage):
            print(f"time is up in stage {stage}; run the same command again to go on")
            return 3
    return 0


if __name__ == "__main__":
    cli.run(main)

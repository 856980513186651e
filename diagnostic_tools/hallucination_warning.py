"""Does a model name things that are not in the picture, and can its insides tell? A calibrated
probability for each object word of an answer.

    python diagnostic_tools/hallucination_warning.py fit --model_path checkpoints/tiny-llava \\
        --image_folder data/shapes/val2017 \\
        --ann_file data/shapes/annotations/instances_val2017.json
    python diagnostic_tools/hallucination_warning.py test --model_path checkpoints/tiny-llava \\
        --image_folder data/shapes-test/val2017 \\
        --ann_file data/shapes-test/annotations/instances_val2017.json
    python diagnostic_tools/hallucination_warning.py score --model_path checkpoints/tiny-llava \\
        --image picture.jpg --prompt_text "Describe the image."

Object words: category names of the instances file in descriptions (--kinds captions), and the Yes
of questions in POPE's form (arXiv 2305.10355), "Is there a <name> in the image?", about objects
that are there and as many that are not (--kinds pope). A word is hallucinated if the picture has no
such instance. --corrupt draws one of none, noise, blur and covered for each picture, so that a
model that is rarely wrong is wrong often enough. Signals: warning_signals.py; fit() and AUROC:
calibration.py. fit writes runs/hallucination_warning/<model>__fit/analysis/calibration.json, which
test and score (and the app) read; test writes analysis/report.json: AUROC of each signal and of all
together, each against plain token probability on the same words, and calibration. Words of
descriptions and the Yes of questions are calibrated each for themselves."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.model.decoding import generate
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample, load_image, read_coco, read_instances, with_picture
from vlmdiag.runs import engine, rundirs
from vlmdiag.scenes.questions import article
from vlmdiag.stethoscope import calibration
from vlmdiag.stethoscope.warning_signals import (
    EXPERIMENT,
    SIGNALS,
    find_calibration,
    measure,
    named_objects,
    tokens_of,
    warnings_for,
)

CORRUPTIONS = ("none", "noise", "blur", "covered")
BASELINE = "log_probability"


@dataclass(frozen=True)
class Item:
    """One picture and one prompt. name: the object asked about, None in a description; there:
    whether it is in the picture."""

    id: str
    image: Path
    question: str
    image_id: str
    corruption: str
    name: str | None
    objects: tuple  # names of the picture's instances


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "command",
        choices=["fit", "test", "score"],
        help="calibrate, test a calibration on other pictures, score one answer",
    )
    parser.add_argument("--image_folder", default=None, help="fit, test: folder of pictures")
    parser.add_argument("--ann_file", default=None, help="fit, test: COCO instances file")
    parser.add_argument("--image", default=None, help="score: picture")
    parser.add_argument(
        "--prompt_text", default="Describe the image.", help="prompt of descriptions"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=["captions", "pope"], default=["captions", "pope"]
    )
    parser.add_argument(
        "--questions_per_image",
        type=int,
        default=4,
        help="pope: half of them about objects that are not there",
    )
    parser.add_argument(
        "--corrupt",
        nargs="+",
        choices=CORRUPTIONS,
        default=list(CORRUPTIONS),
        help="one of these is drawn for each picture",
    )
    parser.add_argument(
        "--calibration",
        default=None,
        help="calibration.json of fit; None: that of this model in --out_root",
    )
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--num_images", type=int, default=None, help="only the first so many")
    parser.add_argument("--seed", type=int, default=0, help="of corruptions and questions")
    cli.add_run_arguments(parser, "item")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.command == "score" and not args.image:
        parser.error("score needs --image")
    if args.command != "score" and not (args.image_folder and args.ann_file):
        parser.error(f"{args.command} needs --image_folder and --ann_file")
    if (
        min(
            args.max_new_tokens,
            args.questions_per_image,
            args.num_images if args.num_images is not None else 1,
        )
        < 1
    ):
        parser.error("--max_new_tokens, --questions_per_image and --num_images count from 1")
    return args


# --- what is asked --------------------------------------------------------------------------------


def read_items(args):
    """(items, all object names of the file)."""
    instances = read_instances(args.ann_file)
    names = sorted(
        {
            category["name"]
            for category in json.loads(Path(args.ann_file).read_bytes())["categories"]
        }
    )
    by_id = {
        str(key): tuple(sorted({one["category"] for one in own})) for key, own in instances.items()
    }
    items = []
    for sample in read_coco(args.image_folder, args.ann_file, args.num_images, args.prompt_text):
        image_id = str(sample.extra["image_id"])
        there, rng = by_id.get(image_id, ()), Random(f"{args.seed}|{image_id}")
        corruption = rng.choice(sorted(args.corrupt, key=CORRUPTIONS.index))
        known = {
            "image": sample.image,
            "image_id": image_id,
            "corruption": corruption,
            "objects": there,
        }
        if "captions" in args.kinds:
            items.append(Item(f"{sample.id}-0", question=args.prompt_text, name=None, **known))
        if "pope" in args.kinds:
            absent = [name for name in names if name not in there]
            count = min(args.questions_per_image // 2, len(there))
            asked = rng.sample(list(there), count) + rng.sample(
                absent, min(args.questions_per_image - count, len(absent))
            )
            items += [
                Item(
                    f"{sample.id}-{n}",
                    question=f"Is there {article(name)} in the image?",
                    name=name,
                    **known,
                )
                for n, name in enumerate(asked, 1)
            ]
    return items, names


def corrupted(picture, kind, seed):
    """The picture with noise over it, blurred, or with two thirds of it covered in grey
    rectangles."""
    rng = Random(seed)
    if kind == "noise":
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 70, (*picture.size[::-1], 3))
        return Image.fromarray(np.clip(np.asarray(picture, float) + noise, 0, 255).astype(np.uint8))
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 24))
    if kind == "covered":
        picture, (width, height) = picture.copy(), picture.size
        draw = ImageDraw.Draw(picture)
        for _ in range(6):
            x, y = rng.uniform(-0.1, 0.8) * width, rng.uniform(-0.1, 0.8) * height
            draw.rectangle([x, y, x + 0.4 * width, y + 0.4 * height], fill=(127, 127, 127))
    return picture


# --- measuring ------------------------------------------------------------------------------------


def words_of(vlm, ids, item, names):
    """[(name, indices of its tokens), ...] of an answer: object names in a description, the Yes of
    a question."""
    text = vlm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    found = (
        named_objects(text, names)
        if item.name is None
        else [(item.name, *place) for _, *place in named_objects(text, ["yes"])[:1]]
    )
    listed = [(name, tokens_of(vlm, ids, start, end)) for name, start, end in found]
    return text.strip(), [(name, tokens) for name, tokens in listed if tokens]


def make_process(args, vlm, names):
    def process(loaded):
        return [one(item, picture) for item, picture in loaded]

    def one(item, picture):
        picture = corrupted(
            picture, item.corruption, f"{args.seed}|{item.image_id}|{item.corruption}"
        )
        batch = vlm.encode([Sample(item.id, None, item.question)], [picture])
        ids = generate(vlm, batch, args.max_new_tokens if item.name is None else 4).ids[0]
        text, words = words_of(vlm, ids, item, names)
        values = measure(vlm, batch, ids, [tokens for _, tokens in words]) if words else []
        listed = [
            {
                "word": name,
                "tokens": tokens,
                "hallucinated": name not in item.objects,
                "signals": signals,
            }
            for (name, tokens), signals in zip(words, values, strict=True)
        ]
        record = {
            "image_id": item.image_id,
            "kind": "captions" if item.name is None else "pope",
            "question": item.question,
            "corruption": item.corruption,
        }
        return record | {"caption": text, "objects": list(item.objects), "words": listed}, {}

    return process


def measured(args, vlm, part):
    """(counts of the engine, run) of the items of fit or test."""
    items, names = read_items(args)
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt_for(vlm, args.prompt_text)[0],
        "ann_file": Path(args.ann_file).name,
        "image_aspect": args.image_aspect,
        "names": names,
    }
    identity |= {
        name: getattr(args, name)
        for name in ("kinds", "questions_per_image", "corrupt", "max_new_tokens", "seed")
    }
    free = {
        "model_path": args.model_path,
        "image_folder": args.image_folder,
        "device": str(vlm.device),
    }
    run = rundirs.open_run(path_of(args, part), EXPERIMENT, identity, free, args.overwrite)
    counts = engine.run_items(
        run,
        items,
        with_picture,
        make_process(args, vlm, names),
        1,
        args.shard,
        args.num_workers,
        progress="prompts",
    )
    run.finish()
    return counts, run


def path_of(args, part):
    name = f"{args.run_name}-{part}" if args.run_name else part
    return rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, name)


def table(run):
    """(signals (n, J), hallucinated (n,) bool, image ids (n,), kinds (n,)) of all object words of a
    run."""
    rows = [(record, word) for record in run.records() for word in record["words"]]
    signals = np.array(
        [[word["signals"][name] for name in SIGNALS] for _, word in rows], float
    ).reshape(len(rows), len(SIGNALS))
    labels = np.array([word["hallucinated"] for _, word in rows], bool)
    return (
        signals,
        labels,
        np.array([record["image_id"] for record, _ in rows], str),
        np.array([record["kind"] for record, _ in rows], str),
    )


# --- fit, test, score -----------------------------------------------------------------------------


def calibrate(run):
    """The calibration of a run's words, for each kind of its own: all signals together, each alone,
    and their AUROC on the same words."""
    signals, labels, images, kinds = table(run)
    found = {}
    for kind in sorted(set(kinds)):
        mine = kinds == kind
        values, truth, drawn = signals[mine], labels[mine], calibration.draws(images[mine])
        facts = {
            "n_words": len(truth),
            "n_hallucinated": int(truth.sum()),
            "n_images": len(set(images[mine])),
        }
        try:
            models = {"all": calibration.fit(values, truth)} | {
                name: calibration.fit(values[:, [j]], truth) for j, name in enumerate(SIGNALS)
            }
        except ValueError as error:
            print(
                f"{kind}: {error}; more pictures (--num_images) or harder ones (--corrupt) are"
                " needed"
            )
            continue
        found[kind] = facts | {
            "models": models,
            "auroc_fit": {
                name: calibration.auroc_interval(-values[:, j], truth, drawn)
                for j, name in enumerate(SIGNALS)
            },
        }
    if not found:
        raise UsageError(
            f"{run.path}: neither descriptions nor questions have both hallucinated and grounded"
            " object words, so nothing is calibrated"
        )
    return {
        "model": run.meta["settings"]["model_name"],
        "fingerprint": run.meta["settings"]["fingerprint"],
        "signals": list(SIGNALS),
        "kinds": found,
    }


def report(run, found):
    """What a calibration is worth on words that it was not fitted on, for each kind."""
    signals, labels, images, kinds = table(run)
    out = {}
    for kind in sorted(set(kinds)):
        mine = kinds == kind
        values, truth, drawn = signals[mine], labels[mine], calibration.draws(images[mine])
        facts = {
            "n_words": len(truth),
            "n_hallucinated": int(truth.sum()),
            "n_images": len(set(images[mine])),
            "too_few": not 0 < truth.sum() < len(truth),
        }
        if facts["too_few"] or kind not in found["kinds"]:
            out[kind] = facts | {"too_few": True}
            continue
        models = found["kinds"][kind]["models"]
        predicted = {
            name: calibration.predict(models[name], values[:, [j]])
            for j, name in enumerate(SIGNALS)
        }
        predicted["all"] = calibration.predict(models["all"], values)
        rows = {}
        for name, scores in predicted.items():
            rows[name] = {
                "auroc": calibration.auroc_interval(scores, truth, drawn),
                "ece": calibration.expected_calibration_error(scores, truth),
            }
            rows[name]["over_baseline"] = calibration.auroc_difference(
                scores, predicted[BASELINE], truth, drawn
            )
            rows[name]["beats_baseline"] = bool(rows[name]["over_baseline"]["low"] > 0)
            rows[name]["brier"] = float(((scores - truth) ** 2).mean())
        out[kind] = facts | {
            "signals": rows,
            "reliability": calibration.reliability(predicted["all"], truth),
        }
    return out


def main(argv=None):
    args = parse_args(argv)
    vlm = load_from_args(args)
    vlm.need("decoder-only")
    if args.command == "fit":
        counts, run = measured(args, vlm, "fit")
        found = calibrate(run) | {"names": run.meta["settings"]["names"]}
        rundirs.write_json(run.path / "analysis" / "calibration.json", found)
        for kind, part in found["kinds"].items():
            print(
                f"{kind}: {part['n_hallucinated']} of {part['n_words']} object words hallucinated"
            )
            for name, score in part["auroc_fit"].items():
                print(
                    f"  {name}: AUROC {score['value']:.3f} ({score['low']:.3f} to"
                    f" {score['high']:.3f}) on the words of the fit, a low value as a sign"
                )
        print(f"wrote {run.path / 'analysis' / 'calibration.json'}")
        return engine.exit_code(counts, run)
    found = find_calibration(args.model_path, args.out_root, args.calibration)
    if args.command == "test":
        if found is None:
            raise UsageError(
                f"{args.model_path} is not calibrated in {args.out_root}; run"
                " hallucination_warning.py fit first, on other pictures"
            )
        counts, run = measured(args, vlm, "test")
        written = report(run, found)
        rundirs.write_json(run.path / "analysis" / "report.json", written)
        for kind, part in written.items():
            print(
                f"{kind}: {part['n_hallucinated']} of {part['n_words']} object words hallucinated"
                + ", too few or not calibrated" * part["too_few"]
            )
            for name, row in part.get("signals", {}).items():
                gain, score = row["over_baseline"], row["auroc"]
                verdict = (
                    "baseline"
                    if name == BASELINE
                    else (
                        "beats token probability"
                        if row["beats_baseline"]
                        else "does not beat token probability"
                    )
                )
                print(
                    f"  {name}: AUROC {score['value']:.3f} ({score['low']:.3f} to"
                    f" {score['high']:.3f}), difference {gain['value']:+.3f} ({gain['low']:+.3f} to"
                    f" {gain['high']:+.3f}): {verdict}; ECE {row['ece']:.3f}"
                )
        return engine.exit_code(counts, run)
    picture = load_image(args.image)
    batch = vlm.encode([Sample("0", None, args.prompt_text)], [picture])
    ids = generate(vlm, batch, args.max_new_tokens).ids[0]
    print(vlm.text(ids))
    if found is None:
        print(f"not calibrated: run hallucination_warning.py fit for {args.model_path}")
        return 0
    for word in warnings_for(vlm, batch, ids, found["names"], found):
        risk = (
            "not calibrated for descriptions"
            if word["probability"] is None
            else f"P(hallucinated) = {word['probability']:.2f}"
        )
        print(
            f"{word['word']}: {risk}  "
            + "  ".join(f"{name} {value:.2f}" for name, value in word["signals"].items())
        )
    return 0


if __name__ == "__main__":
    cli.run(main)

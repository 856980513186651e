r"""Make a question list, which every experiment reads, of a list in another form.

    python data/convert_questions.py v2_OpenEnded_mscoco_val2014_questions.json \
        --annotations v2_mscoco_val2014_annotations.json --out data/vqa/questions.json
    python data/convert_questions.py llava_v1_5_mix665k.json --out data/llava/questions.json
    python data/convert_questions.py testdev_balanced_questions.json --out data/gqa/questions.json
    python data/convert_questions.py MMBench_DEV_EN.tsv --out data/mmbench/questions.json

The forms are told apart by what the file holds: VQA's questions (answers are in --annotations),
LLaVA's conversations (one question for each turn about a picture), GQA's questions by their id, and
a table with pictures in it as VLMEvalKit and EmbSpatial-Bench write it, TSV or JSON (a hint stands
in front of its question); its pictures are written beside the list. Other pictures are named,
relative to the list's folder or --image_folder of the script that reads it, and nothing is
downloaded. Entries without a picture, or about several, are left out and counted. The list:
docs/data.md.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures import samples, table
from vlmdiag.pictures.entries import read_json, read_list
from vlmdiag.runs import disk, rundirs
from vlmdiag.types import Fields, Record

OPTIONS = "ABCDEFGH"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("input", help="the list in another form")
    parser.add_argument("--out", required=True, help="the question list to write")
    parser.add_argument("--annotations", default=None, help="VQA: the file with the answers")
    parser.add_argument(
        "--max_images",
        "--max_questions",
        type=cli.positive,
        default=None,
        help="only the first so many",
    )
    return parser.parse_args(argv)


# --- forms ----------------------------------------------------------------------------------------


def of_vqa(args: argparse.Namespace, content: Fields) -> Iterator[Record | str]:
    """VQA: {"data_subtype", "questions": [{"image_id", "question", "question_id"}]}, and
    {"annotations": [{"question_id", "answers": [{"answer"}], "answer_type"}]}."""
    answered: dict[object, Fields] = {}
    if args.annotations:
        annotations = read_json(args.annotations)
        if not isinstance(annotations, dict) or "annotations" not in annotations:
            raise UsageError(f"{args.annotations}: an object with a list annotations was wanted")
        answered = {entry["question_id"]: entry for entry in annotations["annotations"]}
    part = content.get("data_subtype")
    for entry in content["questions"]:
        image_id = entry["image_id"]
        converted = {"image_id": image_id, "question": entry["question"]}
        if part:
            converted["image"] = f"COCO_{part}_{str(image_id).zfill(12)}.jpg"
        annotation = answered.get(entry["question_id"])
        if annotation is not None:
            converted["answers"] = [vote["answer"] for vote in annotation["answers"]]
            converted["kind"] = annotation.get("answer_type") or "question"
        yield converted | {"question_id": entry["question_id"]}


def of_llava(content: Sequence[Fields]) -> Iterator[Record | str]:
    """LLaVA: [{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]}]."""
    for entry in content:
        if not entry.get("image"):
            yield "a conversation without a picture"
            continue
        if isinstance(entry["image"], list) and len(entry["image"]) > 1:
            yield "a conversation about several pictures (--messages)"
            continue
        turns = entry["conversations"]
        for question, answer in zip(turns[::2], turns[1::2]):
            if (question["from"], answer["from"]) != ("human", "gpt"):
                yield "a turn that is no question with its answer"
                continue
            text = question["value"].replace("<image>", "").strip()
            if not text:
                yield "a turn that is a picture alone"
                continue
            yield {"image": entry["image"], "question": text, "answer": answer["value"]}


def of_gqa(content: Fields) -> Iterator[Record | str]:
    """GQA: {question id: {"imageId", "question", "answer"}}."""
    for question_id, entry in content.items():
        image = f"{entry['imageId']}.jpg"
        converted = {"image": image, "question": entry["question"], "question_id": question_id}
        yield converted | {"answer": entry.get("answer")}


def of_table(args: argparse.Namespace) -> Iterator[Record | str]:
    """A table whose rows have a picture, a question, options A, B, ... and an answer; the options
    are put behind the question. Each picture is written once, as the table has it."""
    pictures = table.Pictures()
    entries: list[tuple[str, Record] | str] = []
    for number, (offset, row) in enumerate(table.rows_of(args.input)):
        try:
            pictures.add(str(number), row, offset)
        except ValueError as error:
            entries.append(str(error))
            continue
        options = {letter: row[letter] for letter in OPTIONS if row.get(letter)}
        hint = row.get("hint", "").strip()
        hints = [hint] if hint.lower() not in ("", "nan", "none") else []
        lines = [
            *hints,
            row["question"],
            *(f"{letter}. {text}" for letter, text in options.items()),
        ]
        answer = row.get("answer", "").strip()
        letter = table.letter_of(answer, options) if options and answer else ""
        answer = letter if letter in options else answer or None
        entry = {"question": "\n".join(lines), "answer": answer}
        entries.append((str(number), entry | {"kind": row.get("category") or "question"}))
    names: dict[str, str] = {}  # of pictures, by their digest
    for entry_or_reason in entries:
        if isinstance(entry_or_reason, str):
            yield entry_or_reason
            continue
        key, entry = entry_or_reason
        try:
            offset, digest = pictures.of(key)
            if digest not in names:
                names[digest] = saved(args, offset, len(names))
        except ValueError as error:
            yield str(error)
            continue
        yield {"image": names[digest]} | entry


def saved(args: argparse.Namespace, offset: int, number: int) -> str:
    """The path of a row's picture as the list names it; one that is in the table is written.
    ValueError where it is none."""
    folder = Path(args.out).resolve().parent
    file = table.picture_file(args.input, offset)
    if isinstance(file, Path):
        return os.path.relpath(file.resolve(), folder)
    data = file.getvalue()
    name = f"pictures/{number:06d}.{samples.format_of(data)}"
    disk.write_bytes(folder / name, data)
    return name


# --- the list -------------------------------------------------------------------------------------


def converted(args: argparse.Namespace) -> Iterator[Record | str]:
    """Each entry of the question list, or why there is none."""
    if args.input.lower().endswith(".tsv"):
        return of_table(args)
    content = read_list(args.input)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        return of_vqa(args, content)
    entries = list(content.values()) if isinstance(content, dict) else content
    first = entries[0] if isinstance(entries, list) and entries else None
    if not isinstance(first, dict):
        raise UsageError(f"{args.input} is in none of the forms that --help names")
    if "conversations" in first:
        return of_llava(entries)
    if "imageId" in first and isinstance(content, dict):
        return of_gqa(content)
    if not set(first).isdisjoint(table.PICTURE_COLUMNS) and "question" in first:
        return of_table(args)
    raise UsageError(f"{args.input} is in none of the forms that --help names")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    entries: list[Record] = []
    left_out: Counter[str] = Counter()
    read = 0
    try:
        for entry in converted(args):
            read += 1
            if isinstance(entry, str):
                left_out[entry] += 1
                continue
            entries.append(entry)
            if len(entries) == args.max_images:
                break
    except (KeyError, TypeError, AttributeError) as error:
        what = f"has no {error.args[0]}" if isinstance(error, KeyError) else f"is odd: {error}"
        raise UsageError(f"{args.input}: entry {read} {what}") from error
    except OSError as error:
        raise UsageError(f"{args.input} cannot be read ({error.strerror or error})") from error
    for why, count in left_out.items():
        print(f"{count} entries left out: {why}")
    if not entries:
        raise UsageError(f"{args.input} gives no question")
    rundirs.write_json(args.out, entries)
    print(f"wrote {args.out}: {len(entries)} questions")
    return 0


if __name__ == "__main__":
    cli.run(main)

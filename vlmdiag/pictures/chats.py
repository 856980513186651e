"""Lists of pictures, lists of messages and videos -> Sample with a chat: what --images, --messages
and --video give; what a run keeps of chats, and where figures find the pictures again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vlmdiag.cli import UsageError
from vlmdiag.pictures.entries import Entry, checked_id, entries_of, read_list, text_id
from vlmdiag.pictures.questions import as_text
from vlmdiag.pictures.samples import Chat, Sample, Turn, id_of
from vlmdiag.pictures.video import Frame, frames_of
from vlmdiag.types import Fields, Record

Source = Path | Frame
# of an entry's fields, those that make the prompt
_OF_PROMPT = ("id", "image_id", "images", "messages", "answer")
# in a part of a message: where its picture or video is
MARK = "<image>"
_PLACES = ("path", "url", "image", "image_url", "video")


def given_samples(args: Namespace, folder: str | Path | None = None) -> list[Sample]:
    """The samples of --images, --messages or --video (cli.add_chat_arguments), [] where none of
    them is given. folder: where relative paths of --messages start, None: at its file."""
    if args.images:
        return [about([Path(path) for path in args.images], args.prompt_text)]
    if args.video:
        return [about(frames_of(args.video, args.frames), args.prompt_text)]
    samples = read_messages(args.messages, folder, args.frames) if args.messages else []
    answered = sum(sample.answer is not None for sample in samples)
    if answered and not hasattr(args, "use_answers"):
        print(
            f"{args.messages}: last messages of the assistant, {answered} in all, are left out: the"
            " model answers itself"
        )
    return samples


def settings_of(args: Namespace) -> Record:
    """What tells one run of chats from another, for its settings; {} without chats."""
    if args.images:
        return {"images": [Path(path).name for path in args.images]}
    if args.video:
        return {"video": Path(args.video).name, "frames": args.frames}
    return {"messages": Path(args.messages).name} if args.messages else {}


def about(images: Sequence[Source], question: str) -> Sample:
    """One question about several pictures, which stand in front of it. id: the first one's name and
    how many more there are."""
    chat = Chat(tuple(images), (Turn("user", (*[None] * len(images), question)),))
    first = images[0]
    path = first.video if isinstance(first, Frame) else first
    id = f"{id_of(path.stem)}+{len(images) - 1}"
    return Sample(id, path, question, extra={"image_id": id}, chat=chat)


def read_messages(
    path: str | Path, folder: str | Path | None = None, frames: int = 8
) -> list[Sample]:
    """Samples of a JSON list, or of JSON lines, of {"messages": [...], "images": [...], "id"}.

    messages: transformers' chat messages, {"role": user, assistant or system, "content": a text or
    a list of {"type": "text", "text"}, {"type": "image", "path"} and {"type": "video", "path"}, of
    which `frames` frames count}. Pictures without a path are those of "images" in order; where no
    message has one, they stand where the user's texts have MARK, else in front of the first user's
    words. A last message of the assistant
    is the sample's answer. id: "id" or "image_id", else '<first picture>-<n of the entry>'. extra:
    image_id and every other field. UsageError names the entry that has another form.
    """
    root = Path(folder) if folder is not None else Path(path).parent
    content = read_list(path)
    if isinstance(content, dict) and "messages" in content:
        content = [content]
    samples = []
    for n, entry in enumerate(entries_of(path, content, ["messages"])):
        where = f"{path}: entry {n}"
        try:
            chat, answer = _chat_of(entry, root, frames)
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"{where}: {error}") from error
        first = chat.images[0]
        image = first.video if isinstance(first, Frame) else first
        id = entry.get("id", entry.get("image_id", f"{id_of(image.stem)}-{n}"))
        id = checked_id(path, f"the id of entry {n},", id)
        extra = {"image_id": id} | {k: v for k, v in entry.items() if k not in _OF_PROMPT}
        question = chat.turns[-1].text
        samples.append(Sample(text_id(id), image, question, answer, extra, chat))
    return samples


def _chat_of(entry: Entry, root: Path, frames: int) -> tuple[Chat, str | None]:
    """The chat of an entry, and the answer that its last message gives. ValueError and TypeError
    for another form."""
    listed: list[Source] = [root / _text(name, "an image") for name in entry.get("images") or ()]
    of_list = iter(listed)
    images: list[Source] = []
    turns: list[Turn] = []
    system = None
    if not isinstance(entry["messages"], list):
        raise TypeError("its messages are no list")
    for role, parts in _placed(list(map(_parts_of, entry["messages"])), len(listed)):
        if role == "system":
            if turns or system is not None or any(part["type"] != "text" for part in parts):
                raise ValueError("a system message of text comes first, and once")
            system = " ".join(part["text"] for part in parts)
            continue
        said: list[str | None] = []
        for part in parts:
            if part["type"] == "text":
                said.append(_text(part.get("text"), "a text"))
                continue
            if role != "user":
                raise ValueError("pictures belong to messages of the user")
            sources = _sources(part, root, frames)
            images += sources or [next(of_list, Path())]
            said += [None] * max(1, len(sources))
        turns.append(Turn(role, tuple(said)))
    answer = turns.pop().text if len(turns) > 1 and turns[-1].role == "assistant" else None
    roles = [turn.role for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(f"messages of user and assistant in turn were wanted, not {roles}")
    if listed and not images:
        images = list(of_list)
        turns[0] = Turn("user", (*[None] * len(images), *turns[0].parts))
    if Path() in images or next(of_list, None) is not None:
        raise ValueError(f"it lists {len(listed)} images, and its messages have places for others")
    if not images:
        raise ValueError("it has no picture")
    if "answer" in entry:
        answer = as_text(entry["answer"])
    return Chat(tuple(images), tuple(turns), system), answer


def _placed(
    messages: list[tuple[str, list[Record]]], listed: int
) -> list[tuple[str, list[Record]]]:
    """Messages in whose texts MARK stands for the listed pictures, as files for training have it,
    with parts in its places; others as they are. ValueError for another number of marks."""
    of_user = [part for role, parts in messages if role == "user" for part in parts]
    if not listed or any(part["type"] != "text" for part in of_user):
        return messages
    marks = sum(str(part.get("text")).count(MARK) for part in of_user)
    if not marks:
        return messages
    if marks != listed:
        raise ValueError(f"it lists {listed} images, and its texts have {MARK} {marks} times")
    placed: list[tuple[str, list[Record]]] = []
    for role, parts in messages:
        split: list[Record] = []
        for part in parts if role == "user" else ():
            for n, text in enumerate(_text(part.get("text"), "a text").split(MARK)):
                split += [{"type": "image"}] * (n > 0)
                split += [{"type": "text", "text": text.strip("\n")}] * bool(text.strip())
        placed.append((role, split if role == "user" else parts))
    return placed


def _parts_of(message: object) -> tuple[str, list[Record]]:
    """(role, parts) of a chat message, a text as one part."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
        raise TypeError(f"{str(message)[:60]} is no message of user, assistant or system")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise TypeError("the content of a message is a text or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image", "video"):
            raise TypeError(f"{str(part)[:60]} is no part of type text, image or video")
    return message["role"], content


def _sources(part: Fields, root: Path, frames: int) -> list[Source]:
    """The pictures of a part that names where they are; [] for one that does not."""
    name = next((part[key] for key in _PLACES if part.get(key)), None)
    if name is None and part["type"] == "image":
        return []
    path = root / _text(name, f"the path of a {part['type']}")
    return list(frames_of(path, frames)) if part["type"] == "video" else [path]


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {type(value).__name__}, a text was wanted")
    return value


# --- in records -----------------------------------------------------------------------------------


def record_of(sample: Sample) -> Record:
    """What a record says of a sample's chat: "images", the paths, of a frame '<video>#<n>', and
    "messages"; {} where it has none."""
    if sample.chat is None:
        return {}
    messages: list[Record] = []
    if sample.chat.system is not None:
        messages.append({"role": "system", "content": sample.chat.system})
    for turn in sample.chat.turns:
        content = [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in turn.parts
        ]
        messages.append({"role": turn.role, "content": content})
    return {"images": [str(image) for image in sample.chat.images], "messages": messages}


def recorded_sources(images: Sequence[str], folder: str | Path | None = None) -> list[Source]:
    """The pictures of a record's "images"; those that are not there any more under their name in
    `folder`."""
    sources: list[Source] = []
    for image in images:
        name, mark, index = image.rpartition("#")
        is_frame = bool(mark) and index.isdecimal() and not Path(image).exists()
        path = Path(name if is_frame else image)
        if folder is not None and not path.exists():
            path = Path(folder) / path.name
        sources.append(Frame(path, int(index)) if is_frame else path)
    return sources

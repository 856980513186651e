"""Question lists as they are published, the converter of others, and the scripts that download
them."""

import base64
import io
import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

from data import convert_questions
from tests.conftest import ROOT
from vlmdiag.answers import is_right
from vlmdiag.cli import UsageError
from vlmdiag.pictures.chats import read_messages
from vlmdiag.pictures.questions import read_curated, read_mmhal, read_questions
from vlmdiag.pictures.samples import load_image

pytestmark = pytest.mark.fast


def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(*entries, end="\n"):
    return "\n".join(json.dumps(entry) for entry in entries) + end


POPE = [
    {
        "question_id": n,
        "image": f"COCO_val2014_{n:012d}.jpg",
        "text": "Is there a cat?",
        "label": ["yes", "no"][n % 2],
    }
    for n in (1, 1, 7)
]


# --- lists as they are published ------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        json.dumps(POPE),
        lines(*POPE),
        lines(*POPE, end=""),
        lines(*POPE, end="\n\n \n"),
        "\ufeff" + lines(*POPE),
        lines(*POPE).replace("\n", "\r\n"),
        "\n" + lines(*POPE),
    ],
)
def test_popes_lists_are_read(tmp_path, form):
    found = read_questions(put(tmp_path / "coco_pope_random.json", form))
    assert [sample.answer for sample in found] == ["no", "no", "no"]
    assert {sample.question for sample in found} == {"Is there a cat?"}
    assert [sample.id for sample in found] == [
        "COCO_val2014_000000000001-0",
        "COCO_val2014_000000000001-1",
        "COCO_val2014_000000000007-0",
    ]
    assert found[0].image == tmp_path / "COCO_val2014_000000000001.jpg"
    assert found[0].extra["question_id"] == 1
    assert is_right("No, there isn't.", found[0].answer)


def test_a_list_of_one_line_is_a_list(tmp_path):
    assert len(read_questions(put(tmp_path / "q.jsonl", lines(POPE[0])))) == 1


@pytest.mark.parametrize("broken", [2, 3])
def test_a_broken_line_is_named(tmp_path, broken):
    text = lines(*POPE).split("\n")
    text[broken - 1] = text[broken - 1][:-3]
    with pytest.raises(UsageError, match=f"q.jsonl, line {broken}, is not readable JSON"):
        read_questions(put(tmp_path / "q.jsonl", "\n".join(text)))


VOTES = [
    {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate("2 3 2".split())
]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (True, "Yes"),
        (False, "No"),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        ("red", "red"),
        ("", ""),
        (None, None),
        (float("nan"), None),
        (["Yes"] * 10, "Yes"),
        (["no", "yes", "yes"], "yes"),
        (["blue", "red"], "blue"),
        ([True, True, False], "Yes"),
        ([3, "3", 4], "3"),
        ([], None),
        ([None, "cat"], "cat"),
        (VOTES, "2"),
    ],
)
@pytest.mark.parametrize("name", ["answer", "label", "gold_answer", "gt_answer", "answers"])
def test_an_answer_is_text_whatever_it_is_in_the_list(tmp_path, name, answer, text):
    entry = {"image_id": 1, "question": "Is it?", name: answer}
    file = put(tmp_path / "q.json", [entry])
    for read in (read_questions, read_mmhal):
        assert read(file)[0].answer == text
    assert read_curated(file)["1"][0]["answer"] == text
    if isinstance(answer, list) and answer:
        assert read_questions(file)[0].extra["answers"] == json.loads(json.dumps(answer))


@pytest.mark.parametrize("answer", [{"yes": 1}, [{"text": "yes"}], [["yes"], {}]])
def test_an_answer_of_another_form_names_its_entry(tmp_path, answer):
    entries = [{"image_id": 1, "question": "a"}, {"image_id": 2, "question": "b", "answer": answer}]
    with pytest.raises(UsageError, match="q.json: the answer of entry 1 is a dict") as caught:
        read_questions(put(tmp_path / "q.json", entries))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "image"),
    [
        ({"image": "b/cat.png"}, "b/cat.png"),
        ({"image": ["cat.png"]}, "cat.png"),
        ({"image_src": "https://a.example/x/cat%20two.png?y=1"}, "cat two.png"),
        ({"image": "http://[/cat.png"}, "cat.png"),
        ({"file_name": "cat.png"}, "cat.png"),
        ({"image_id": 7}, "000000000007.jpg"),
        ({"image_id": 7.0}, "000000000007.jpg"),
        ({"image_id": None, "image": "cat.png"}, "cat.png"),
        ({"image_id": 7, "image": "cat.png"}, "cat.png"),
    ],
)
def test_a_picture_is_named_as_lists_name_it(tmp_path, entry, image):
    file = put(tmp_path / "q.json", [entry | {"question": "What?"}])
    assert read_questions(file)[0].image == tmp_path / image
    assert read_mmhal(file)[0].image == tmp_path / image


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"image": ["a.png", "b.png"], "question": "x"}], "entry 0 has 2 pictures"),
        ([{"image": {"bytes": "x"}, "question": "x"}], "the image of entry 0 is a dict"),
        ([{"image_id": [1], "question": "x"}], "the image_id of entry 0, .* is a list"),
        ([{"image": "a.png", "conversations": []}], "in LLaVA's form; .*convert_questions"),
        ({"questions": [{"image_id": 1, "question": "x"}]}, "in VQA's form; .*convert_questions"),
        ("[" * 100_000, "nested too deeply"),
        ({"a": 1}, "a list of objects was wanted"),
        ([{"image": "a.png"}], "entry 0 has no question or text"),
    ],
)
def test_a_list_that_cannot_be_read_says_why_in_one_line(tmp_path, content, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_questions(put(tmp_path / "q.json", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("question", "what"),
    [
        (float("nan"), "a float"),
        (5, "a int"),
        (["a", "b"], "a list"),
        ({}, "a dict"),
        (" ", "empty"),
    ],
)
@pytest.mark.parametrize("read", [read_questions, read_mmhal, read_curated])
def test_a_question_that_is_no_text_names_its_entry(tmp_path, read, question, what):
    entries = [{"image_id": 1, "question": "a"}, {"image_id": 2, "question": question}]
    with pytest.raises(UsageError, match=f"q.json: the question of entry 1 is {what}"):
        read(put(tmp_path / "q.json", entries))


def test_an_id_of_a_truth_value_is_none(tmp_path):
    with pytest.raises(UsageError, match="True is a bool, an id was wanted"):
        read_questions(put(tmp_path / "q.json", [{"image_id": True, "question": "a"}]))


@pytest.mark.parametrize(
    ("answer", "text"), [(True, "Yes"), (3.0, "3"), (float("nan"), None), (["b", "a", "b"], "b")]
)
def test_the_answer_to_messages_is_text_as_in_a_question_list(tmp_path, answer, text):
    entry = {"images": ["a.jpg"], "messages": [{"role": "user", "content": "Is it?"}]}
    file = put(tmp_path / "m.json", [entry | {"answer": answer}])
    assert read_messages(file)[0].answer == text
    with pytest.raises(UsageError, match="m.json: entry 0: a dict"):
        read_messages(put(file, [entry | {"answer": {"yes": 1}}]))


def test_one_list_serves_every_reader(tmp_path):
    entry = {"image_id": 4, "image": "a.jpg", "question": "What is it?", "answer": "cat"}
    file = put(tmp_path / "q.json", [entry | {"category": "cat"}, entry])
    mmhal = read_mmhal(file)
    assert [sample.id for sample in mmhal] == ["000000000004", "000000000004-1"]
    assert mmhal[0].extra == {"image_id": 4, "image_src": "a.jpg", "category": "cat"}
    assert read_curated(file)["4"][0]["category"] == "cat"
    assert read_questions(file)[1].answer == mmhal[1].answer == "cat"


# --- the converter --------------------------------------------------------------------------------


def picture(color, form="JPEG"):
    Image.new("RGB", (8, 6), color).save(stream := io.BytesIO(), form)
    return base64.b64encode(stream.getvalue()).decode()


def converted(tmp_path, name, content, *flags):
    file = put(tmp_path / name, content)
    out = tmp_path / "list" / "questions.json"
    assert convert_questions.main([str(file), "--out", str(out), *map(str, flags)]) == 0
    return read_questions(out)


def test_vqas_questions_get_the_answer_given_most_often(tmp_path):
    questions = [
        {"image_id": 42, "question": "How many?", "question_id": 420},
        {"image_id": 42, "question": "Which?", "question_id": 421},
    ]
    votes = put(
        tmp_path / "a.json",
        {"annotations": [{"question_id": 420, "answers": VOTES, "answer_type": "number"}]},
    )
    content = {"data_subtype": "val2014", "questions": questions}
    found = converted(tmp_path, "v2_questions.json", content, "--annotations", votes)
    assert [sample.answer for sample in found] == ["2", None]
    assert found[0].image.name == "COCO_val2014_000000000042.jpg"
    assert found[0].extra["kind"] == "number" and found[0].extra["answers"] == ["2", "3", "2"]


def test_llavas_conversations_become_a_question_a_turn(tmp_path, capsys):
    said = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]
    turns = [{"from": who, "value": text} for who, text in said]
    content = [
        {"id": "1", "image": "a.jpg", "conversations": turns},
        {"id": "2", "conversations": turns},
    ]
    found = converted(tmp_path, "mix.json", content)
    assert [(s.question, s.answer) for s in found] == [("What?", "A cat."), ("Sure?", "Yes.")]
    assert "1 entries left out: a conversation without a picture" in capsys.readouterr().out


def test_gqas_questions_keep_their_pictures(tmp_path):
    content = {"201": {"imageId": "n1", "question": "Who?", "answer": "man"}}
    sample = converted(tmp_path, "gqa.json", content)[0]
    assert (sample.image.name, sample.answer, sample.extra["question_id"]) == (
        "n1.jpg",
        "man",
        "201",
    )


def test_a_tables_pictures_are_written_once_and_its_options_asked(tmp_path, capsys):
    rows = [
        ["0", picture("red"), "What colour?", "A", "red", "blue", "kinds"],
        ["1", "0", "Which one?", "1", "red", "blue", ""],
        ["2", "77", "Which one?", "1", "red", "blue", ""],
        ["3", picture("blue", "PNG"), "What is it?", "a square", "", "", ""],
        ["4", base64.b64encode(b"nothing" * 20).decode(), "What?", "A", "x", "y", ""],
    ]
    header = "index image question answer A B category".split()
    text = "\n".join("\t".join(row) for row in [header, *rows])
    found = converted(tmp_path, "bench.tsv", text)
    assert [sample.question for sample in found] == [
        "What colour?\nA. red\nB. blue",
        "Which one?\nA. red\nB. blue",
        "What is it?",
    ]
    assert [sample.answer for sample in found] == ["A", "B", "a square"]
    assert [sample.image.name for sample in found] == ["000000.jpg", "000000.jpg", "000001.png"]
    assert load_image(found[0].image).getpixel((3, 3))[0] > 200
    said = capsys.readouterr().out
    assert "1 entries left out: its picture is that of a row" in said and "wrote" in said


def test_embspatials_records_become_questions(tmp_path):
    record = {
        "question_id": "q1",
        "question": "Which is closest?",
        "relation": "close",
        "answer": 1,
        "answer_options": ["cup", "pan", "bed", "lamp"],
        "image": picture("red"),
    }
    sample = converted(tmp_path, "bench.json", [record])[0]
    assert (sample.answer, sample.extra["kind"]) == ("B", "close")
    assert sample.question.endswith("D. lamp")


def test_a_table_that_names_files_keeps_them(tmp_path):
    (tmp_path / "a.png").write_bytes(base64.b64decode(picture("red", "PNG")))
    text = "index\timage_path\tquestion\tanswer\n0\ta.png\tWhat?\tred\n"
    assert load_image(converted(tmp_path, "t.tsv", text)[0].image).size == (8, 6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable JSON"),
        ("[]", "none of the forms"),
        ([3], "none of the forms"),
        ([{"a": 1}], "none of the forms"),
        ({"questions": [{"question": "x"}]}, "entry 0 has no image_id"),
        ({"questions": [3]}, "entry 0 is odd"),
        ([{"image": "a.jpg", "conversations": [{}, {}]}], "entry 0 has no from"),
        ([{"conversations": []}], "gives no question"),
        ({"1": {"imageId": "x"}}, "entry 0 has no question"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, content, words):
    with pytest.raises(UsageError, match=words) as caught:
        converted(tmp_path, "x.json", content)
    assert "\n" not in str(caught.value) and "x.json" in str(caught.value)


# --- downloads ------------------------------------------------------------------------------------


def shell(script, *arguments, path=None, **more):
    env = {"PATH": str(path), **more} if path else dict(os.environ)
    return subprocess.run(
        ["/bin/bash", str(script), *arguments], capture_output=True, text=True, timeout=20, env=env
    )


@pytest.fixture(params=["wget", "curl"])
def net(request, tmp_path):
    """A folder that stands in for the network, and the tools that a script may use."""
    for folder in ("data", "bin", "net"):
        (tmp_path / folder).mkdir()
    for name in "dirname mkdir mv rm rmdir cp cat grep ls head tail tr wc sort".split():
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    fake = tmp_path / "bin" / request.param
    fake.write_text(
        f"""#!/bin/bash
url="${{@: -1}}"; echo "$url" >> {tmp_path}/urls; name="${{url##*/}}"
for word in "$@"; do
    case "$previous" in --output) to="$word" ;; esac
    case "$word" in --directory-prefix=*) to="${{word#*=}}/$name" ;; esac
    previous="$word"
done
[ -e {tmp_path}/net/$name ] || exit 4
cp {tmp_path}/net/$name "$to"
"""
    )
    fake.chmod(0o755)
    return tmp_path / "net"


def test_download_embspatial_fetches_the_table_and_the_boxes(net):
    root = net.parent
    script = shutil.copy(ROOT / "data/download_embspatial.sh", root / "data")
    run = lambda: shell(script, path=root / "bin")  # noqa: E731
    failed = run()
    assert failed.returncode == 1 and "could not be downloaded; run the same" in failed.stderr
    (net / "EmbSpatial-Bench.tsv").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is not EmbSpatial-Bench's" in run().stderr
    assert not (root / "data/EmbSpatial-Bench.tsv").exists()
    (net / "EmbSpatial-Bench.tsv").write_text("index\tquestion\n" + "x" * 3_000_000)
    (net / "embspatial_bench.json").write_text('[{"question_id": "1"}]')
    done = run()
    assert done.returncode == 0 and done.stdout.count("is ready") == 2, done.stderr
    assert run().stdout.count("nothing to do") == 2
    assert sorted(file.name for file in (root / "data").iterdir()) == [
        "EmbSpatial-Bench.tsv",
        "download_embspatial.sh",
        "embspatial_bench.json",
    ]
    hub = "https://huggingface.co/datasets"
    assert set((root / "urls").read_text().split()) == {
        f"{hub}/ch-min/EmbSpatial-Bench-tsv/resolve/main/EmbSpatial-Bench.tsv",
        f"{hub}/Phineas476/EmbSpatial-Bench/resolve/main/embspatial_bench.json",
    }


def test_download_pope_fetches_lists_and_the_pictures_that_they_name(net):
    root = net.parent
    script = shutil.copy(ROOT / "data/download_pope.sh", root / "data")
    run = lambda *names: shell(script, *names, path=root / "bin")  # noqa: E731
    assert "has no list yet" in run("pictures").stderr
    assert "could not be downloaded; run the same" in run("random").stderr
    (net / "coco_pope_random.json").write_text("404: Not Found")
    assert "is not POPE's list" in run("random").stderr
    assert not (root / "data/pope/coco_pope_random.json").exists()
    (net / "coco_pope_random.json").write_text(lines(*POPE))
    assert "is ready" in run("random").stdout
    (net / "COCO_val2014_000000000001.jpg").write_bytes(b"picture")
    failed = run("random", "pictures")
    assert failed.returncode == 1 and "COCO_val2014_000000000007.jpg could not" in failed.stderr
    (net / "COCO_val2014_000000000007.jpg").write_bytes(b"picture")
    done = run("random", "pictures")
    assert done.returncode == 0 and "1 pictures fetched" in done.stdout, done.stderr
    assert "0 pictures fetched" in run("pictures").stdout
    found = read_questions(root / "data/pope/coco_pope_random.json")
    assert all(sample.image.read_bytes() == b"picture" for sample in found)
    assert not (root / "data/pope/.downloading").exists()
    assert (
        "http://images.cocodataset.org/val2014/COCO_val2014_000000000007.jpg"
        in (root / "urls").read_text()
    )


@pytest.mark.parametrize("name", ["embspatial", "pope"])
def test_the_download_scripts_name_what_is_wrong(tmp_path, name):
    script = ROOT / f"data/download_{name}.sh"
    helped = shell(script, "-h")
    assert helped.returncode == 0 and "usage:" in helped.stdout
    wrong = shell(script, "everything")
    assert wrong.returncode == 2 and "'everything'" in wrong.stderr.splitlines()[-1]
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    arguments = ["all"] if name == "pope" else []
    found = shell(script, *arguments, path=tmp_path)
    assert found.returncode == 2 and "neither wget nor curl" in found.stderr


@pytest.mark.parametrize("coding", ["cp1252", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("place", ["header", "row"])
def test_a_table_in_another_coding_than_utf8_is_one_line(tmp_path, coding, place):
    header = "index\tquestion\timage" + "\tGröße" * (place == "header")
    row = "0\tWo ist das Café?\ta.jpg" + "\t1" * (place == "header")
    (tmp_path / "t.tsv").write_bytes(f"{header}\n{row}\n".encode(coding))
    with pytest.raises(UsageError, match=r"t\.tsv is no UTF-8 table .*; save it as UTF-8"):
        convert_questions.main([str(tmp_path / "t.tsv"), "--out", str(tmp_path / "q.json")])


def test_a_table_whose_lines_end_with_carriage_returns_only_is_one_line(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"index\timage\r0\ta.jpg\r")
    with pytest.raises(UsageError, match=r"t\.tsv: its first line is no header of a table"):
        convert_questions.main([str(tmp_path / "t.tsv"), "--out", str(tmp_path / "q.json")])


def test_ids_that_end_like_a_second_question_stay_apart(tmp_path):
    ids = ["a", "a", "a-1", "a-1", "a", "a-1-1"]
    entries = [{"image_id": id, "question": f"{n}?"} for n, id in enumerate(ids)]
    for read in (read_mmhal, read_questions):
        found = read(put(tmp_path / "q.json", entries))
        assert len({sample.id for sample in found}) == len(ids)
    assert [sample.id for sample in read_mmhal(tmp_path / "q.json")][:3] == ["a", "a-1", "a-1-1"]


def test_pictures_of_one_name_in_several_folders_are_several(tmp_path):
    """Without an image_id, or with an empty one; pictures of names of their own keep these."""
    names = ["a/frame_1.jpg", "b/frame_1.jpg", "a/frame_1.jpg", "b/frame_2.jpg", "frame_3.png"]
    entries = [
        {"image": name, "question": f"{n}?", "answer": "yes", **({"image_id": ""} if n else {})}
        for n, name in enumerate(names)
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    found = [sample.extra["image_id"] for sample in read_questions(tmp_path / "q.json")]
    assert found[0] == found[2] and len(set(found)) == 4
    assert found[3:] == ["frame_2", "frame_3"]


def chat_of(tmp_path, images, *contents):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": messages, "images": list(images)}]))
    return read_messages(path)[0].chat


def test_marks_in_the_texts_of_a_training_file_are_the_places_of_its_pictures(tmp_path):
    chat = chat_of(tmp_path, "ab", "<image>\nWhat?", "A.", "And in\n<image>\nthis one?")
    assert [turn.parts for turn in chat.turns] == [
        (None, "What?"),
        ("A.",),
        ("And in", None, "this one?"),
    ]
    assert [path.name for path in chat.images] == ["a", "b"]
    two = chat_of(tmp_path, "ab", "<image><image>Which is red?")
    assert two.turns[0].parts == (None, None, "Which is red?")
    with pytest.raises(UsageError, match="lists 2 images, and its texts have <image> 3 times"):
        chat_of(tmp_path, "ab", "<image><image>\nWhat?", "A.", "<image>?")
    # without a mark in front of all, and what the assistant wrote is text
    plain = chat_of(tmp_path, "ab", "What?", "An <image>.", "Why?")
    assert plain.turns[0].parts == (None, None, "What?")
    assert plain.turns[1].parts == ("An <image>.",)


def made_of(tmp_path, content, name="list.json"):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    out = tmp_path / "out" / "questions.json"
    assert convert_questions.main([str(tmp_path / name), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_an_options_text_comes_before_its_index_and_a_hint_before_its_question(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    rows = [
        ("How many?", "1", "2", "3", "4", "2", "Count."),
        ("Many?", "1", "2", "3", "4", "4", ""),
    ]
    header = "index\tquestion\tA\tB\tC\tD\tanswer\thint\timage"
    lines = [f"{n}\t" + "\t".join(row) + f"\t{picture}" for n, row in enumerate(rows)]
    found = made_of(tmp_path, "\n".join([header, *lines]) + "\n", "t.tsv")
    assert [entry["answer"] for entry in found] == ["B", "D"]
    assert found[0]["question"].startswith("Count.\nHow many?\nA. 1")
    assert found[1]["question"].startswith("Many?\nA. 1")


def test_what_no_reader_takes_is_left_out_and_counted(tmp_path, capsys):
    def entry(image, *texts):
        said = zip(["human", "gpt"] * len(texts), texts, strict=False)
        return {"image": image, "conversations": [{"from": who, "value": t} for who, t in said]}

    content = [
        entry("a.jpg", "<image>\nWhat?", "A cat.", "<image>", "?"),
        entry(["a.jpg", "b.jpg"], "<image><image>Which?", "A."),
    ]
    assert [one["question"] for one in made_of(tmp_path, content)] == ["What?"]
    said = capsys.readouterr().out
    assert "picture alone" in said and "several pictures" in said
    votes = {"questions": [{"image_id": "7", "question": "What?", "question_id": 1}]}
    (found,) = made_of(tmp_path, votes | {"data_subtype": "val2014"})
    assert found["image"] == "COCO_val2014_000000000007.jpg"

"""Runs that cannot lie: items of other inputs are refused, states are never made anew under
finished pairs, what is damaged is made again, and a reader of a tampered run names the file in one
line."""

import json
import os
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, in_process
from tests.kills import KINDS
from vlmdiag.cli import UsageError
from vlmdiag.interp.interventions import replacement_of
from vlmdiag.pictures import chats
from vlmdiag.pictures.chats import read_messages
from vlmdiag.pictures.samples import Sample, list_pictures, load_image
from vlmdiag.pictures.video import Frame
from vlmdiag.runs import disk, engine, rundirs
from vlmdiag.runs.inputs import digest_of, file_digest
from vlmdiag.runs.rundirs import open_run
from vlmdiag.swap.states import open_states

COCO = in_process(ROOT / "diagnostic_tools/run_coco_diagnostics.py")


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode() * 10)
    return tmp_path


@pytest.fixture
def measure(folder):
    """measure(questions) -> counts of a run over three pictures, whose numbers are their length."""

    def run(*questions, **settings):
        samples = [
            Sample(name, folder / f"{name}.jpg", question)
            for name, question in zip("abc", questions, strict=True)
        ]
        run = open_run(folder / "run", "demo", settings)

        def process(items):
            return [({"n": len(item.question)}, {"x": np.ones(3)}) for item in items]

        return engine.run_items(run, samples, lambda item: item, process)

    return run


@pytest.mark.fast
@pytest.mark.parametrize("what", ["picture", "question"])
def test_items_of_another_picture_or_question_are_refused_by_name(measure, folder, what):
    assert measure("A?", "B?", "C?")["done"] == 3
    assert measure("A?", "B?", "C?")["skipped"] == 3
    if what == "picture":
        (folder / "b.jpg").write_bytes(b"another")
    with pytest.raises(UsageError, match="1 of its finished items .* such as b"):
        measure("A?", "B?" if what == "picture" else "B or not?", "C?")


@pytest.mark.fast
def test_a_picture_at_another_place_is_the_same(folder):
    moved = shutil.copytree(folder, folder / "moved")
    here, there = (Sample("a", place / "a.jpg", "A?") for place in (folder, moved))
    assert digest_of(here) == digest_of(there)
    assert digest_of(here) != digest_of(Sample("a", folder / "b.jpg", "A?"))


def chat_of(folder, entry):
    """The sample of one entry of a list of messages; a video has its frames by its name."""
    path = folder / "list.json"
    path.write_text(json.dumps([entry]))
    return read_messages(path, frames=2)[0]


@pytest.mark.fast
def test_chats_differ_by_every_turn_picture_and_system_message(folder, monkeypatch):
    monkeypatch.setattr(
        chats, "frames_of", lambda video, count: [Frame(video, 2 * n) for n in range(count)]
    )
    words = ["Be brief.", "What is it?", "A cat.", "Where?"]

    def entry(words=words, pictures=("a.jpg", "b.jpg"), video=None):
        system, first, answer, last = words
        more = [{"type": "video", "path": video}] if video else []
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": [*more, {"type": "text", "text": first}]},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": last},
        ]
        return {"id": "x", "messages": messages} | ({} if video else {"images": list(pictures)})

    others = [entry([*words[:n], "Other.", *words[n + 1 :]]) for n in range(4)]
    others += [entry(pictures=pair) for pair in (("b.jpg", "a.jpg"), ("a.jpg", "c.jpg"))]
    others += [entry(pictures=("a.jpg",)), entry(video="a.jpg"), entry(video="b.jpg")]
    digests = [digest_of(chat_of(folder, each)) for each in (entry(), *others)]
    assert len(set(digests)) == len(digests)
    moved = shutil.copytree(folder, folder / "moved")
    assert digest_of(chat_of(moved, entry())) == digests[0]
    (folder / "b.jpg").write_bytes(b"another")
    assert digest_of(chat_of(folder, entry())) != digests[0]


@pytest.mark.fast
def test_given_answers_are_part_of_what_an_item_is_made_of(folder):
    plain = Sample("a", folder / "a.jpg", "A?")
    given = [replace(plain, given=what) for what in (None, "red", "blue", (5, 6), (5, 7))]
    digests = [digest_of(sample) for sample in given]
    # a plain one as before there were given answers, written out
    assert digests[0] == digest_of(["A?", None, file_digest(folder / "a.jpg")])
    assert len(set(digests)) == len(digests)


@dataclass
class Asked:
    """An item about a sample, as those of ablations and knockouts."""

    id: str
    sample: Sample
    tokens: list[int]


@pytest.mark.fast
def test_items_about_a_sample_are_those_of_a_version_without_given_answers(folder):
    """Written out as it was then."""
    sample = Sample("a", folder / "a.jpg", "A?")
    image = file_digest(folder / "a.jpg")
    then = {"image": image, "question": "A?", "answer": None, "chat": None}
    assert digest_of(Asked("x", sample, [1])) == digest_of({"sample": then, "tokens": [1]})
    other = Asked("x", replace(sample, given="red"), [1])
    assert digest_of(other) != digest_of(Asked("x", sample, [1]))


@pytest.mark.parametrize("flag", ["--answers", "--drafts"])
def test_another_list_of_answers_under_the_same_name_is_refused(flag, tmp_path):
    """Not one that has more pictures."""
    images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 2, 3)]
    for image in images:
        Image.new("RGB", (40, 30), (60 * image["id"], 0, 0)).save(tmp_path / image["file_name"])
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"images": images, "annotations": []}))
    given = tmp_path / "given.json"

    def measured(*texts, images):
        entries = [{"image_id": n + 1, "caption": text} for n, text in enumerate(texts)]
        given.write_text(json.dumps(entries))
        return COCO(
            "--model_path", ROOT / "checkpoints" / "tiny-llava", "--image_dir", tmp_path,
            "--ann_file", captions, "--out_root", tmp_path, "--max_images", images,
            "--max_new_tokens", 4, "--no_rope", flag, given,
        )  # fmt: skip

    assert measured("A red circle.", "A cross.", images=2).returncode == 0
    more = measured("A red circle.", "A cross.", "A square.", images=3)
    assert more.returncode == 0 and "2 done before" in more.stdout
    other = measured("A red circle.", "A blue cross.", "A square.", images=3)
    assert other.returncode == 2
    assert "1 of its finished items were made of other questions, answers or pictures" in (
        other.stderr
    )


@pytest.mark.fast
@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 2**17, 2**17 + 5])
def test_large_pictures_differ_by_their_size_and_both_ends(tmp_path, size):
    digests = set()
    for name, at in (("same", None), ("first", 0), ("last", size - 1), ("longer", size)):
        data = bytearray(size + (name == "longer"))
        if at is not None:
            data[at] = 1
        (tmp_path / name).write_bytes(data)
        digests.add(digest_of(Sample("a", tmp_path / name, "")))
    assert len(digests) == 4


@pytest.mark.fast
def test_a_run_of_an_older_version_goes_on(measure, folder):
    assert measure("A?", "B?", "C?")["done"] == 3
    for file in (folder / "run" / "per_image").glob("*.json"):
        record = json.loads(file.read_text())
        record.pop("checks")
        file.write_bytes(disk.json_bytes(record))
    assert measure("A?", "another?", "C?")["skipped"] == 3


@pytest.mark.fast
@pytest.mark.parametrize("ending", ["npz", "json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "zeros within", "garbage"])
def test_a_damaged_item_is_computed_again_to_the_same_bytes(measure, folder, ending, damage):
    measure("A?", "B?", "C?")
    file = folder / "run" / "per_image" / f"b.{ending}"
    whole = file.read_bytes()
    data = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
        "zeros within": whole[:40] + bytes(30) + whole[70:],
        "garbage": b"{]" + whole[2:],
    }[damage]
    file.write_bytes(data)
    counts = measure("A?", "B?", "C?")
    assert counts == {"done": 1, "skipped": 2, "failed": 0}
    assert file.read_bytes() == whole


@pytest.mark.fast
def test_states_are_made_only_while_no_pair_is_done(tmp_path):
    path, shape = tmp_path / "states.npy", (4, 2, 3, 5)
    with pytest.raises(ValueError, match="missing, which has the states of 2 finished pairs"):
        open_states(path, shape, "float16", done=2)
    assert not path.exists()
    kept = open_states(path, shape, "float16")
    for row in range(4):
        kept[row] = np.ones((2, 3, 5))
    data = path.read_bytes()
    path.write_bytes(data[:-64])
    with pytest.raises(ValueError):
        open_states(path, shape, "float16", done=2)
    assert len(path.read_bytes()) == len(data) - 64


@pytest.mark.fast
def test_folders_are_flushed_after_a_file_was_renamed_into_them(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda at: flushed.append(os.readlink(f"/proc/self/fd/{at}")))
    disk.write(tmp_path / "a.json", b"{}")
    assert flushed[-1] == str(tmp_path)


# --- readers of tampered runs ---------------------------------------------------------------------


def swapped(array):
    return array.T if array.ndim > 1 else array[:-1]


RECORDS = {
    "empty": lambda record: {},
    "lists cut": lambda record: {k: v[:1] if isinstance(v, list) else v for k, v in record.items()},
    "text": lambda record: {k: "x" if not isinstance(v, str) else v for k, v in record.items()},
    "nulls, digests too": lambda record: dict.fromkeys([*record, "checks"]),
}
ARRAYS = {
    "turned": lambda arrays: {name: swapped(array) for name, array in arrays.items()},
    "scalars": lambda arrays: {name: np.zeros(()) for name in arrays},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, warm_python):
    """A folder with the runs that readers read, and the pictures."""
    import subprocess

    folder = tmp_path_factory.mktemp("honest")
    flags = ["--out_dir", str(folder / "shapes"), "--num_images", "10", "--num_train", "12"]
    subprocess.run([warm_python, ROOT / "data/make_shapes.py", *flags], check=True)
    for kind in ("coco", "relevancy"):
        for command in KINDS[kind].commands(str(folder / "runs"), folder / "shapes"):
            subprocess.run([warm_python, ROOT / command[0], *command[1:]], check=True)
    return folder


READERS = {
    "analyze_coco_diagnostics": "--run_dir {coco}",
    "system_prompt_plot": "--run_dir {coco}",
    "viz_cmb_panel": "--runs_dir {runs} --sp 0 --out {out}/a.png",
    "viz_hidden_norms": "--runs_dir {runs} --sp 0 --out {out}/b.png",
    "viz_relevancy": "--run_dir {relevancy} --image_dir {pictures} --max_images 6",
}


@pytest.mark.parametrize("name", READERS)
def test_readers_of_tampered_runs_name_the_file_in_one_line(name, runs, tmp_path):
    command = in_process(ROOT / f"diagnostic_tools/{name}.py")
    cases = [("json", how, change) for how, change in RECORDS.items()]
    cases += [("npz", how, change) for how, change in ARRAYS.items()]
    for ending, how, change in cases:
        work = tmp_path / f"{ending}-{how.replace(' ', '-')}"
        shutil.copytree(runs / "runs", work)
        of_kind = "tiny-llava__sp-0" if "relevancy" not in name else "relevancy/tiny-llava"
        file = sorted((work / of_kind / "per_image").glob(f"*.{ending}"))[1]
        if ending == "json":
            record = json.loads(file.read_text())
            checks = {"checks": record.pop("checks")} if how != "empty" else {}
            file.write_bytes(disk.json_bytes(checks | change(record)))
        else:
            file.write_bytes(disk.npz_bytes(change(disk.read_npz(file))))
        places = {"runs": work, "coco": work / "tiny-llava__sp-0", "out": tmp_path}
        places |= {"relevancy": work / "relevancy/tiny-llava"}
        places |= {"pictures": runs / "shapes/val2017"}
        done = command(*READERS[name].format(**places).split())
        line = done.stderr
        assert "Traceback" not in line, (ending, how, line)
        if done.returncode:
            assert done.returncode == 2 and line.count("\n") == 1, (ending, how, line)
            assert str(work) in line, (ending, how, line)
        else:  # what this reader does not read of the file
            assert ending == "json", (ending, how)


def test_a_mean_vector_that_is_not_the_one_it_was_written_as_is_refused(tmp_path):
    from vlmdiag.interp.interventions import load_mean

    path = tmp_path / "mean_vector.pt"
    for mean, why in (
        (torch.full((4,), torch.nan), "finite"),
        (torch.zeros(4, dtype=torch.complex64), "real numbers"),
        (torch.zeros(4, device="meta"), "real numbers|cannot be read"),
        (torch.ones(4).to_sparse(), "real numbers"),
        (torch.ones(4, dtype=torch.int8), "real numbers"),
        (torch.zeros(5), "shape"),
    ):
        torch.save(mean, path)
        with pytest.raises(UsageError, match=why):
            load_mean(path, 4)
    torch.save(torch.ones(4), path)
    path.with_suffix(".json").write_text('{"sha256": "0"}')
    with pytest.raises(UsageError, match="calculate_mean_vector.py"):
        load_mean(path, 4)


@pytest.mark.fast
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("beside", [None, {}, {"count": 3}, ["?"]])
def test_another_mean_vector_of_the_same_name_has_another_provenance(load, beside, tmp_path):
    """Also one that no file, or an old one, says anything of."""
    vlm = load("llava")
    path = tmp_path / "mean.pt"
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))
    found = []
    for value in (1.0, 2.0, 1.0):
        torch.save(torch.full((vlm.model.get_input_embeddings().weight.shape[1],), value), path)
        found.append(replacement_of(vlm, "mean", str(path)).provenance)
    assert found[0] == found[2] != found[1]
    assert found[0]["written"] == (beside or "unknown")


def test_a_pipe_among_pictures_is_none_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert [file.name for file in list_pictures(tmp_path)] == ["b.jpg"]
    with pytest.raises(ValueError, match="no file"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.fast
def test_a_place_for_results_that_is_none_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").touch()
    assert disk.out_folder(tmp_path / "a" / "b").is_dir()
    for place in ("file", "file/below"):
        with pytest.raises(UsageError, match="cannot write"):
            disk.out_folder(tmp_path / place)


@pytest.mark.fast
@pytest.mark.parametrize("change", [{"count": -5}, {"count": 7}, {"m2": -np.ones(4)}, {}])
def test_sums_that_do_not_fit_their_record_give_no_mean(tmp_path, change):
    from scripts.calculate_mean_vector import sums_of_run

    run = open_run(tmp_path / "run", "mean_vector", {"pictures": 1, "block": 32})
    record = {"pictures": 1, "vectors": 9, "unreadable": []}
    sums = {"count": np.array(9), "mean": np.ones(4), "m2": np.ones(4)}
    run.write("block-000000", record, sums)
    run.files("block-000000")[1].write_bytes(disk.npz_bytes(sums | change))
    if not change:
        assert sums_of_run(run.path)[0].n == 9
        return
    with pytest.raises(UsageError, match="block-000000.npz does not fit its record"):
        sums_of_run(run.path)


def test_an_item_of_other_fields_that_is_as_it_was_written_is_no_damage(tmp_path):
    """Such as a picture that an experiment leaves out."""
    run = rundirs.open_run(tmp_path / "run", "demo", {})
    for number in range(4):
        fields = {"left_out": "no object"} if number == 2 else {"right": True, "words": []}
        run.write(str(number), fields, {"norms": np.ones(3)} if number != 2 else {})
    rundirs.READ.clear()
    rundirs.read_run(tmp_path / "run")
    assert rundirs.damage() is None
    file = tmp_path / "run" / "per_image" / "2.json"
    record = json.loads(file.read_text())
    del record["checks"]  # of an older version
    file.write_bytes(disk.json_bytes(record))
    assert "differ from the others" in rundirs.damage()

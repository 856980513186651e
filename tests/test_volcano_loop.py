"""The critique - revise - decide loop and the attention that it measures: against eager maps,
scripted answers, and its own command line."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import make_shapes
from tests.conftest import ROOT, embeddings, in_process
from vlmdiag.groups import GROUPS
from vlmdiag.model import drafts
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.prefix import SharedPicture, after_picture, first_positions
from vlmdiag.model.probes import ImageAttention
from vlmdiag.options import chosen
from vlmdiag.pictures.samples import Sample
from vlmdiag.pictures.spread import normalized_entropy
from vlmdiag.runs import rundirs
from vlmdiag.volcano import maps
from vlmdiag.volcano.conversation import Asker, converse
from vlmdiag.volcano.protocol import decision_published, judged, order_of

SCRIPT = ROOT / "visualize" / "run_volcano_with_image_attention.py"
TINY = ROOT / "checkpoints" / "tiny-llava"
volcano = in_process(SCRIPT)
NAMES = ["llava", "llava-gqa", "qwen"]


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_streamed_attention_is_that_of_the_eager_maps(load, batch_of, name):
    vlm = load(name)
    batch, layers = batch_of(vlm), len(vlm.parts.layers)
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(20, 600, (3, 4), generator=generator).tolist()
    with capture(vlm, [probe := ImageAttention(batch, 2, whole=True)]):
        generate(vlm, batch, 4, answers=answers)
    ids = torch.cat([batch.input_ids, torch.tensor(answers)], 1)
    mask = torch.cat([batch.attention_mask, torch.ones(3, 4, dtype=torch.long)], 1)
    more = batch.next_position[:, None] + torch.arange(4)
    positions = torch.cat(
        [
            batch.position_ids,
            more if batch.position_ids.ndim == 2 else more[None].expand(3, -1, -1),
        ],
        -1,
    )
    vlm.parts.decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            embeds = torch.cat(
                [embeddings(vlm, batch), vlm.model.get_input_embeddings()(torch.tensor(answers))], 1
            )
            out = vlm.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                output_attentions=True,
            )
    finally:
        vlm.parts.decoder.set_attn_implementation("sdpa")
    eager = torch.stack(out.attentions)  # (L, B, H, T, T)
    assert ids.shape[1] == eager.shape[-1] and len(probe.topk) == 4
    for row in range(3):
        vision, prompt = batch.vision_positions(row), batch.input_ids.shape[1]
        a = (
            eager[:, row, :, prompt - 1 : prompt + 3][..., vision].permute(2, 0, 1, 3).numpy()
        )  # (T, L, H, P)
        found = {
            key: torch.stack([part.select(axis, row) for part in parts])[..., : len(vision)].numpy()
            for key, parts, axis in (
                ("topk", probe.topk, 1),
                ("mean", probe.mean, 0),
                ("largest", probe.largest, 0),
                ("layers", probe.layers, 1),
            )
        }
        assert np.allclose(found["layers"], a, atol=1e-5) and a.shape[1] == layers
        assert np.array_equal(
            found["topk"], maps.pool_layers(found["layers"], 2)
        )  # streaming equals all layers at once, bit for bit
        assert np.allclose(found["mean"], a.mean((1, 2)), atol=1e-6) and np.allclose(
            found["largest"], a.max((1, 2)), atol=1e-5
        )
        assert (a.sum(-1) <= 1 + 1e-5).all() and np.allclose(
            eager[:, row, :, -1].sum(-1), 1, atol=1e-5
        )


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_shared_prefix_changes_nothing(load, batch_of, pictures, name):
    vlm = load(name)
    batch = batch_of(vlm)
    moved, start = after_picture(batch)
    assert start > 144 and (batch.groups[:, :5] == -1).any()
    assert (moved.groups[:, :start] == moved.groups[0, :start]).all() and moved.groups[
        0, start - 1
    ] == GROUPS.index("vision")
    plain, other = generate(vlm, batch, 5), generate(vlm, moved, 5)
    assert plain.ids == other.ids and torch.allclose(plain.first, other.first, atol=1e-4)
    questions = [
        "A longer question about what there is in this picture, please?",
        "Where?",
        "Is it?",
    ]
    samples = [Sample(str(i), None, question) for i, question in enumerate(questions)]
    again, _ = after_picture(
        vlm.encode([samples[2], samples[0]], [pictures[2], pictures[0]]), start
    )
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        features = vlm.vision(again)
        embeds = embeddings(vlm, again, features)
    with capture(vlm, [shared := ImageAttention(again, 2)]):
        one = generate(
            vlm, again, 4, embeds=embeds, cache=first_positions(vlm, other.cache, start, rows=rows)
        )
    with capture(vlm, [full := ImageAttention(again, 2)]):
        two = generate(vlm, again, 4, embeds=embeds)
    assert one.ids == two.ids and torch.allclose(
        torch.stack(shared.topk), torch.stack(full.topk), atol=1e-5
    )


@torch.inference_mode()
def test_pictures_with_unlike_grids_share_too(load, batch_of, pictures):
    vlm = load("qwen")
    batch = batch_of(vlm)
    assert len({len(batch.vision_positions(row)) for row in range(3)}) > 1
    shared = SharedPicture(vlm, batch)
    first, inputs = shared.ask(batch, [0, 1, 2])
    assert inputs["cache"] is None
    whole = generate(vlm, first, 5, **inputs)
    assert whole.ids == generate(vlm, batch, 5).ids
    shared.keep(whole.cache)
    samples = [Sample(str(row), None, "Where is it?") for row in (2, 0)]
    again = vlm.encode(samples, [pictures[2], pictures[0]])
    going_on, inputs = shared.ask(again, [2, 0])
    assert inputs["cache"].get_seq_length() == shared.start
    found = generate(vlm, going_on, 5, **inputs)
    plain = generate(vlm, again, 5)
    assert found.ids == plain.ids
    assert torch.allclose(found.first, plain.first, atol=1e-4)
    # the same prompts about other pictures have nothing to go on from
    assert shared.ask(again, [0, 2])[1]["cache"] is None


def test_more_than_there_are_layers_is_refused(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm, (0,))
    with pytest.raises(Exception, match="largest of"), capture(vlm, [ImageAttention(batch, 99)]):
        generate(vlm, batch, 1)


def test_pooling_against_loops_and_its_refusals():
    rng = np.random.default_rng(0)
    a = rng.random((5, 4, 3, 7))
    c = maps.pool_heads(maps.pool_layers(a, 3), 2)
    for t in range(5):
        for p in range(7):
            b = [np.mean(sorted(a[t, :, h, p])[-2:]) for h in range(3)]
            assert c[t, p] == pytest.approx(np.mean(sorted(b)[-2:]))
    assert maps.top_l_mean(c, 5) == pytest.approx(c.mean(0)) and maps.top_l_mean(
        c, 1
    ) == pytest.approx(c.max(0))
    for call in (
        lambda: maps.pool_layers(a, 5),
        lambda: maps.pool_heads(a, 4),
        lambda: maps.top_l_mean(c, 0),
        lambda: maps.top_l_mean(c, 6),
    ):
        with pytest.raises(ValueError, match="largest of"):
            call()
    assert (
        maps.coverage(np.array([4.0, 3, 2, 1]), 0.5) == 0.5
        and maps.coverage(np.array([1.0, 0, 0, 0]), 0.9) == 0.25
        and np.isnan(maps.coverage(np.zeros(3), 0.5))
    )
    assert (
        normalized_entropy(np.ones(9)) == pytest.approx(1) and normalized_entropy(np.eye(9)[0]) == 0
    )


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read", "published"),
    [
        ("A", "A", "A"),
        ("B.", "B", "B"),
        ("(b)", "B", "B"),
        ("Option B", "B", "B"),
        ("Both", None, "B"),
        ("", None, None),
        ("The answer is A because b is worse.", "A", "B"),
        ("A. It is red.", "A", "A"),
        ("A red circle", None, "A"),
        ("b", "B", "B"),
        ('"B"', "B", "B"),
        ("I choose (A).", "A", "A"),
        ("probably A.", "A", "B"),
        ("Neither", None, None),
        ("Answer: B", "B", "B"),
        ("B) because", "B", "B"),
        ("C", None, None),
        ("Be careful", None, "B"),
        ("answer about it", None, "B"),
    ],
)
def test_decisions_are_read_strictly_and_as_published(text, read, published):
    assert chosen(text) == read and decision_published(text) == published


def test_gold_answers_and_orders():
    from vlmdiag.answers import is_right

    assert (
        judged("Yes, there is.", "Yes", is_right) is True
        and judged("No.", "Yes", is_right) is False
        and judged("x", None, is_right) is None
    )
    assert judged("It is red.", "The sheep in front of the other sheep is white.", is_right) is None
    orders = {order_of(0, "a", i, True) for i in range(20)}
    assert (
        len(orders) == 2
        and order_of(0, "a", 3, True) == order_of(0, "a", 3, True)
        and order_of(5, "a", 3, False) == ("current", "revision")
    )


def scripted(answers):
    """An asker that takes the next answer of each instance from a list: {row: {tag: text}}."""
    asked = []

    def ask(rows, texts, tag, measure=False, given=None, drafts=None):
        asked.append((tag, tuple(rows), texts))
        expected.append((tag, drafts and ["".join(map(chr, ids)) for ids in drafts]))
        out = []
        for k, row in enumerate(rows):
            if given:
                text = given[k]
            elif tag == "decide":
                text = answers[row]["decide"].pop(0)
            else:
                text = answers[row][tag]
            out.append(SimpleNamespace(text=text, ids=list(map(ord, text))))
        return out

    expected = ask.expected = []
    return ask, asked


def loop(answers, samples=None, given=None, **options):
    args = SimpleNamespace(
        **(
            {
                "engineered_prompt": False,
                "max_iterations": 3,
                "order": "fixed",
                "seed": 0,
                "paper_compat": False,
                "sample": False,
            }
            | options
        )
    )
    ask, asked = scripted(answers)
    samples = samples or [Sample(str(i), None, f"question {i}?") for i in range(len(answers))]
    if given:
        samples = [replace(sample, given=given[sample.id]) for sample in samples]
    return converse(args, ask, samples), asked


def test_a_revision_is_expected_to_be_what_it_revises_and_a_critique_the_last_one():
    ask, _ = scripted([says(["B", "A"]), says(["B", "?", "B"])])
    args = SimpleNamespace(
        engineered_prompt=False,
        max_iterations=3,
        order="fixed",
        seed=0,
        paper_compat=False,
        sample=True,
    )
    converse(args, ask, [Sample(str(i), None, "q?") for i in range(2)])
    expected = dict(ask.expected)
    assert expected["initial"] is None and expected["decide"] is None
    assert expected["feedback-1"] == ["", ""] and expected["revision-1"] == ["first", "first"]
    assert expected["feedback-2"] == ["feedback 1"] * 2
    assert expected["revision-2"] == ["revision 1"] * 2
    assert expected["feedback-3"] == ["feedback 1"]  # the second revision was not accepted
    assert expected["revision-3"] == ["revision 1"]


@pytest.mark.parametrize("name", ["llava", "llava-gqa"])
def test_the_loop_measures_with_drafts_what_it_measures_without(load, pictures, monkeypatch, name):
    """The same answers and attention, some of it from passes over several tokens."""
    args = SimpleNamespace(
        sample=False,
        temperature=1.0,
        seed=0,
        engineered_prompt=False,
        max_iterations=2,
        order="random",
        max_new_tokens=12,
        hidden_top_k=2,
        full_tensors=True,
        paper_compat=False,
    )
    vlm = load(name)
    samples = [Sample(str(i), Path("x.png"), f"Is it {i}?") for i in range(3)]

    def talks():
        asker = Asker(args, vlm, samples, pictures)
        return converse(args, asker, samples)

    drafts.counted()
    found = talks()
    assert drafts.counted()["draft_agreed"] > 0
    monkeypatch.setattr(drafts, "can_verify", lambda vlm, cache: False)
    for one, other in zip(found, talks(), strict=True):
        for answer, plain in (
            (one.initial, other.initial),
            (one.feedback, other.feedback),
            (one.revision, other.revision),
        ):
            assert answer.ids == plain.ids and len(answer.attention["mean"]) == len(plain.ids)
            for key, values in plain.attention.items():
                assert np.allclose(answer.attention[key], values, atol=1e-5), key


def says(decide, **more):
    return (
        {"initial": "first", "decide": list(decide)}
        | {f"{kind}-{i}": f"{kind} {i}" for kind in ("feedback", "revision") for i in (1, 2, 3)}
        | more
    )


def test_a_refused_revision_ends_the_loop_and_an_accepted_one_goes_on():
    talks, asked = loop([says("A"), says(["B", "A"]), says(["B", "B", "B"]), says(["?"])])
    assert [talk.stop_iter for talk in talks] == [1, 2, 3, 1]
    assert [talk.current for talk in talks] == [
        "first",
        "revision 1",
        "revision 3",
        "first",
    ] and talks[1].outputs == ["first", "revision 1"]
    assert (
        [talk.accepted for talk in talks] == [[], [1], [1, 2, 3], []]
        and talks[0].feedback.text == "feedback 1"
        and talks[2].feedback.text == "feedback 3"
    )
    assert talks[3].decisions[0]["choice"] == "unparsed" and talks[0].decisions[0] == {
        "answer": "A",
        "letter": "A",
        "order": ["current", "revision"],
        "choice": "current",
    }
    assert [rows for tag, rows, _ in asked if tag.startswith("feedback")] == [
        (0, 1, 2, 3),
        (1, 2),
        (2,),
    ]
    text = next(texts for tag, rows, texts in asked if tag == "feedback-2")[0]
    assert "Question: question 1?" in text and text.endswith("Initial answer: revision 1")
    decided = next(texts for tag, rows, texts in asked if tag == "decide")[0]
    assert (
        decided
        == "question 0?\nA. first\nB. revision 1\nAnswer with the option's letter from the given"
        " choices directly."
    )


def test_random_orders_are_read_back_and_unparsed_ones_asked_again():
    samples = [Sample(str(i), None, "q?") for i in range(8)]
    talks, asked = loop([says(["B", "?", "?"]) for _ in samples], samples, order="random")
    swapped = [order_of(0, sample.id, 1, True)[0] == "revision" for sample in samples]
    assert any(swapped) and not all(swapped)
    for talk, flipped in zip(talks, swapped, strict=True):
        assert (
            talk.decisions[0]["choice"] == ("current" if flipped else "revision")
            and talk.decisions[0]["letter"] == "B"
        )
        assert talk.stop_iter == (1 if flipped else 3)
    shown = next(texts for tag, rows, texts in asked if tag == "decide")
    assert ["A. revision 1" in text for text in shown] == swapped


def test_given_answers_and_engineered_prompts():
    talks, asked = loop([says("A")], given={"0": "given text"}, engineered_prompt=True)
    assert (
        talks[0].outputs == ["given text"]
        and "Initial response: given text" in asked[1][2][0]
        and "reference answer" in asked[1][2][0]
    )


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volcano") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "6",
                "--num_train",
                "1",
                "--seed",
                "2",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder / "mmhal_shapes.json"


def files(run):
    return {path.name: path.read_bytes() for path in (run / "per_image").iterdir()}


def test_the_command_line_measures_resumes_and_writes_everything(bench, tmp_path):
    command = (
        "--model-path",
        TINY,
        "--input",
        bench,
        "--output-dir",
        tmp_path / "out",
        "--no_self_check",
        "--max_new_tokens",
        40,
        "--batch_size",
        3,
    )
    command += ("--visualize-avg-attention-all", "--output-visualization-tensors", "--full_tensors")
    done = volcano(*command, "--out_root", tmp_path / "a", "--log", tmp_path / "log.json")
    assert done.returncode == 0, done.stderr
    run = rundirs.read_run(tmp_path / "a/volcano/tiny-llava__tensors-full", "volcano")
    log = json.loads((tmp_path / "log.json").read_text())
    assert len(run.ids()) == len(log) == 6 and set(log[0]) >= {
        "image_id",
        "image_src",
        "question",
        "gold_answer",
        "outputs",
        "feedback",
        "revision",
        "stop_iter",
    }
    for id in run.ids():
        record, arrays = run.record(id), run.arrays(id)
        first = record["stages"]["initial"]
        assert arrays["initial_mean"].shape == arrays["initial_top_k_mean"].shape == (
            len(first["tokens"]),
            144,
        ) and len(first["ids"]) == len(first["tokens"])
        whole = arrays["initial_layers"]
        assert (
            np.allclose(arrays["initial_mean"], whole.mean((1, 2)), atol=1e-6)
            and (whole.sum(-1) <= 1 + 1e-5).all()
        )
        assert np.allclose(
            maps.pool_heads(maps.pool_layers(whole, 3), 3), arrays["initial_top_k_mean"], atol=1e-6
        )
        assert (
            "".join(first["tokens"]).replace("</s>", "") == first["text"]
            and first["ended"]
            and len(record["decisions"]) == record["stop_iter"]
        )
        kept = json.loads((tmp_path / "out" / id / "tokens.json").read_text())
        with np.load(
            tmp_path / "out" / id / "visualization_tensors.npz", allow_pickle=False
        ) as tensors:
            assert tensors["initial_topk"].shape == (len(first["tokens"]), 3, 4, 144) and tensors[
                "boxes"
            ].shape == (144, 4)
        assert (
            kept["stages"]["initial"]["tokens"] == first["tokens"]
            and kept["hidden_top_k"] == 3
            and kept["vision_encoder"]["patch_size"] == 14
        )
        assert (
            kept["stages"]["feedback"]["text"].strip()
            == record["feedback"][(record["accepted"] or [len(record["feedback"])])[-1] - 1]
        )
    if any(run.record(id)["enhanced"] for id in run.ids()):
        assert (tmp_path / "out/greedy_image_attention_top_k_mean.png").exists()
    before = files(run.path)
    for id in run.ids()[1:4]:
        (run.path / "per_image" / f"{id}.json").unlink()
    assert (
        volcano(*command, "--out_root", tmp_path / "a", "--log", "").returncode == 0
        and files(run.path) == before
    )
    for shard in ("0/2", "1/2"):
        assert (
            volcano(
                *command, "--out_root", tmp_path / "b", "--log", "", "--shard", shard
            ).returncode
            == 0
        )
    assert files(tmp_path / "b/volcano/tiny-llava__tensors-full") == before


def test_batches_sampling_and_instances(bench, tmp_path):
    command = (
        "--model-path",
        TINY,
        "--input",
        bench,
        "--output-dir",
        tmp_path,
        "--no_self_check",
        "--max_new_tokens",
        24,
        "--log",
        "",
        "--sample",
    )
    texts = {}
    for name, more in (
        ("one", ("--batch_size", 1)),
        ("three", ("--batch_size", 3)),
        ("seed", ("--seed", 1)),
    ):
        done = volcano(*command, *more, "--out_root", tmp_path / name, "--instance-idx", "4,0,2")
        assert done.returncode == 0, done.stderr
        run = rundirs.read_run(tmp_path / name / "volcano/tiny-llava__sample", "volcano")
        assert [int(id.split("_")[0]) for id in run.ids()] == [0, 2, 4]
        texts[name] = [run.record(id)["outputs"] + run.record(id)["feedback"] for id in run.ids()]
    assert texts["one"] == texts["three"]  # noise depends on seed, item and step only


def test_wrong_usage_and_pictures_that_fail(bench, tmp_path):
    command = (
        "--model-path",
        TINY,
        "--output-dir",
        tmp_path,
        "--no_self_check",
        "--max_new_tokens",
        4,
        "--log",
        "",
        "--out_root",
        tmp_path,
    )
    for more, why in (
        (("--input", bench, "--instance-idx", "3,99"), "6 instances"),
        (("--input", bench, "--instance-idx", "x"), "comma list"),
        (("--input", tmp_path / "none.json"), "no such file"),
        (("--input", bench, "--hidden-top-k", 7), "has 6 layers"),
        (("--input", bench, "--answers", bench), "--answers"),
    ):
        done = volcano(*command, *more)
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )
    rows = json.loads(bench.read_text())[:3]
    rows[1]["image_src"], rows[2]["image_src"] = "gone.jpg", "http://127.0.0.1:9/x.jpg"
    rows[0]["image_src"] = str(bench.parent / rows[0]["image_src"])
    (tmp_path / "list.json").write_text(json.dumps(rows))
    done = volcano(
        *command,
        "--input",
        tmp_path / "list.json",
        "--max_iterations",
        1,
        "--download_dir",
        tmp_path / "cache",
    )
    run = rundirs.read_run(tmp_path / "volcano/tiny-llava", "volcano")
    failed = {id: failure["message"] for id, failure in run.failed().items()}
    assert done.returncode == 3 and len(run.ids()) == 1 and len(failed) == 2
    assert any("no such picture" in message for message in failed.values()) and any(
        "private" in message or "loopback" in message for message in failed.values()
    )


def test_given_first_answers_are_read_by_teacher_forcing(bench, tmp_path):
    given = [
        {"image_id": row["image_id"], "answer": "purple"} for row in json.loads(bench.read_text())
    ]
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = (
        "--model-path",
        TINY,
        "--input",
        bench,
        "--output-dir",
        tmp_path,
        "--no_self_check",
        "--max_new_tokens",
        24,
        "--log",
        "",
        "--out_root",
        tmp_path,
    )
    done = volcano(
        *command,
        "--answers",
        tmp_path / "given.json",
        "--max_iterations",
        1,
        "--instance-idx",
        "0,1",
    )
    assert done.returncode == 0, done.stderr
    run = rundirs.read_run(tmp_path / "volcano/tiny-llava", "volcano")
    for id in run.ids():
        record = run.record(id)
        assert (
            record["given"]
            and record["outputs"][0] == "purple"
            and record["stages"]["initial"]["text"].strip() == "purple"
        )

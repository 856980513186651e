"""States and answers of swap pairs: against a plain pass per prompt, alone and in batches; how
often tower, decoder and transfer run; when an answer is decided; killed runs."""

import dataclasses
import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from data import make_shapes
from tests.conftest import ROOT
from vlmdiag.cli import UsageError
from vlmdiag.model import prompts
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import Probe
from vlmdiag.pictures import table
from vlmdiag.pictures.samples import Sample
from vlmdiag.runs import disk, engine, rundirs
from vlmdiag.swap import pairs, states
from vlmdiag.swap.relations import OPPOSITE

LAYERS = [0, 2, 3]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap-states") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "8",
                "--num_train",
                "1",
                "--seed",
                "3",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def work(shapes):
    """(items, quads by id, pictures by id): two pairs a category, with pictures of several sizes,
    so that Qwen's prompts differ in their vision tokens."""
    path = shapes / "swap_pairs_ready.tsv"
    found, _ = pairs.read_pairs(path, limit=2)
    order = [found[k] for k in (8, 0, 9, 4, 10, 11)]  # distance pairs among others
    pictures = {pair["id"]: table.picture_at(path, pair["offset"]) for pair in order}
    quads, _ = pairs.place(
        order,
        pairs.read_boxes(shapes / "bboxes.json")[0],
        {pair["id"]: pictures[pair["id"]].height for pair in order},
    )
    assert len(quads) >= 2
    sizes = [(168, 168), (140, 252), (224, 112), (168, 168)]
    pictures = {
        key: picture.resize(sizes[k % 4]) for k, (key, picture) in enumerate(pictures.items())
    }
    return (
        [SimpleNamespace(pair=pair, row=row, id=pair["id"]) for row, pair in enumerate(order)],
        {quad["id"]: quad | {"row": row} for row, quad in enumerate(quads)},
        pictures,
    )


@pytest.fixture(scope="module")
def models(load):
    """models(name) -> VLM of conftest, or tiny-llava."""
    tiny = common.load_model(ROOT / "checkpoints" / "tiny-llava", self_check=False)
    return lambda name: tiny if name == "tiny-llava" else load(name)


def measured(vlm, work, folder, batch, tokens=3, layers=LAYERS):
    """(states, quad states, records) of all items in batches."""
    items, quads, pictures = work
    width = vlm.model.get_input_embeddings().weight.shape[1]
    kept = states.open_states(
        folder / f"{batch}.npy", (len(items), 2, len(layers), width), "float32"
    )
    quad_kept = states.open_states(
        folder / f"{batch}-quads.npy", (len(quads), 4, len(layers), width), "float32"
    )
    process = states.make_process(vlm, layers, kept, quad_kept, quads, tokens)
    loaded = [(item, pictures[item.id]) for item in items]
    records = [
        record
        for at in range(0, len(items), batch)
        for record, _ in process(loaded[at : at + batch])
    ]
    return np.load(kept.path), np.load(quad_kept.path), records


def plain(vlm, question, picture, layers=LAYERS):
    """States (layers, d) at the last prompt token, and logits there, of one ordinary forward pass
    of the whole prompt."""
    batch, kept = vlm.encode([Sample("0", None, question)], [picture]), []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, -1])
        )
        for layer in vlm.parts.layers
    ]
    try:
        with torch.no_grad():
            out = vlm.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                mm_encoder_outputs={"image": vlm.vision(batch)},
            )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([kept[layer] for layer in layers]).numpy(), out.logits[0, -1].log_softmax(-1)


def assert_plain(vlm, work, found):
    """States and margins are those of a plain pass for every prompt."""
    kept, quad_kept, records = found
    items, quads, pictures = work

    def close(mine, question, picture):
        wanted, logits = plain(vlm, question, picture)
        assert np.abs(mine - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())
        return logits

    for item, record in zip(items, records, strict=True):
        for k, name in enumerate(("orig", "swap")):
            logits = close(kept[item.row, k], item.pair["questions"][k], pictures[item.id])
            if "llava" in vlm.family.name:  # whose prompt ends without a space
                mass = {
                    category: logits[first_ids(vlm, item.pair["questions"][k], forms)].logsumexp(0)
                    for category, forms in pairs.spellings(item.pair).items()
                }
                want = item.pair["category"] if k == 0 else OPPOSITE[item.pair["category"]]
                assert record[f"margin_{name}"] == pytest.approx(
                    (mass[want] - mass[OPPOSITE[want]]).item(), abs=1e-3
                )
        if item.id in quads:
            quad = quads[item.id]
            for k, question in enumerate(quad["questions"]):
                close(quad_kept[quad["row"], k], question, pictures[item.id])
            assert np.array_equal(quad_kept[quad["row"], 2:], kept[item.row])


def first_ids(vlm, question, forms):
    """First token of each answer, by tokenizing the whole prompt with it."""
    prompt = prompts.prompt_for(vlm, question)[0]
    start = len(vlm.tokenizer(prompt).input_ids)
    return sorted({vlm.tokenizer(f"{prompt} {form}").input_ids[start] for form in forms})


@pytest.mark.parametrize("name", ["tiny-llava", "llava-gqa", "qwen"])
def test_states_are_those_of_plain_passes_alone_and_in_batches(models, work, tmp_path, name):
    vlm = models(name)
    many, single = (measured(vlm, work, tmp_path, batch) for batch in (4, 1))
    assert_plain(vlm, work, many)
    for a, b in zip(many[:2], single[:2], strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())
    assert [record["pred_orig"] for record in many[2]] == [
        record["pred_orig"] for record in single[2]
    ]


def watched(vlm, monkeypatch):
    """Counts of what runs: pictures through the tower, positions through the decoder, tensors that
    leave the device."""
    seen = SimpleNamespace(pictures=0, tower=0, positions=0, moved=[])
    features, cpu = type(vlm.model).get_image_features, torch.Tensor.cpu

    def tower(self, *args, **kwargs):
        seen.tower += 1
        found = features(self, *args, **kwargs)
        seen.pictures += len(found.pooler_output)
        return found

    def decoder(module, args, kwargs):
        seen.positions += kwargs["inputs_embeds"].shape[:2].numel()

    monkeypatch.setattr(type(vlm.model), "get_image_features", tower)
    monkeypatch.setattr(
        torch.Tensor,
        "cpu",
        lambda self, *args: seen.moved.append(tuple(self.shape)) or cpu(self, *args),
    )
    return seen, vlm.parts.decoder.register_forward_pre_hook(decoder, with_kwargs=True)


@pytest.mark.parametrize("name", ["llava-gqa", "qwen"])
def test_a_batch_runs_the_tower_once_a_picture_the_shared_beginning_once_and_moves_once(
    models, work, tmp_path, monkeypatch, name
):
    vlm = models(name)
    items, quads, pictures = work
    batch = vlm.encode(
        [Sample("0", None, item.pair["questions"][0]) for item in items],
        [pictures[item.id] for item in items],
    )
    rest = max(
        batch.lengths[row]
        - (batch.groups[row] >= 0).nonzero()[0, 0]
        - batch.vision_positions(row)[-1]
        for row in range(len(items))
    )
    seen, hook = watched(vlm, monkeypatch)
    measured(vlm, work, tmp_path, len(items), tokens=1)
    hook.remove()
    assert seen.tower == 1 and seen.pictures == len(set(batch.pictures))
    width = vlm.model.get_input_embeddings().weight.shape[1]
    assert [shape for shape in seen.moved if shape[-1] == width] == [
        (2, len(items) + len(quads), len(LAYERS), width)
    ]
    begin = batch.groups.shape[1]
    asked = 2 * (len(items) + len(quads))
    assert seen.positions <= len(items) * begin + asked * (rest + 12)  # not asked * begin
    assert seen.positions < 0.6 * asked * begin


def test_a_family_that_is_not_causal_runs_whole_prompts(models, work, tmp_path, monkeypatch):
    vlm = models("llava-gqa")
    other = dataclasses.replace(
        vlm, family=dataclasses.replace(vlm.family, has=vlm.family.has - {"causal"})
    )
    seen, hook = watched(other, monkeypatch)
    found = measured(other, work, tmp_path, len(work[0]))
    hook.remove()
    assert seen.tower == 2  # for all pictures, and for those with a quad
    assert_plain(vlm, work, found)
    assert [record["pred_swap"] for record in found[2]] == [
        record["pred_swap"] for record in measured(vlm, work, tmp_path, 4)[2]
    ]


def test_a_picture_after_the_question_shares_nothing_and_is_right(models, work, tmp_path):
    vlm = models("llava-gqa")
    turned = dataclasses.replace(
        vlm, options=vlm.options | {"prompt_template": "USER: {question} {image} ASSISTANT:"}
    )
    assert_plain(turned, work, measured(turned, work, tmp_path, 4))


def test_a_wrong_row_or_layer_is_noticed(models, work, tmp_path):
    vlm = models("llava-gqa")
    kept, quad_kept, records = measured(vlm, work, tmp_path, 4)
    for wrong in (np.roll(kept, 1, 0), kept[:, ::-1], np.roll(kept, 1, 2)):
        with pytest.raises(AssertionError):
            assert_plain(vlm, work, (wrong, quad_kept, records))
    with pytest.raises(AssertionError):
        assert_plain(vlm, work, (kept, quad_kept[:, [1, 0, 2, 3]], records))


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("", False),
        ("left", False),
        ("left ", False),
        ("left.", True),
        ("Left\n", True),
        ("leftmost.", False),
        ("left or", False),
        ("left or right", False),
        ("left or right,", True),
        ("left, right", False),
        ("left, right.", True),
        ("not left.", False),
        ("It is not left, it is clearly right.", True),
        ("To the left of the", False),
        ("It is red. It is right!", True),
        ("It is red.", False),
        ("neither left nor right.", False),
        ("left 3.", False),
        ("left\ufffd", False),
        ("left。", True),
    ],
)
def test_an_answer_is_decided_when_its_sentence_is(text, decided):
    assert states.is_decided(text, "left") is decided


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("A", False),
        ("(A", False),
        ("(A)", True),
        ("A.", True),
        ("B)", True),
        ("A red", False),
        ("left.", True),
    ],
)
def test_a_letter_is_decided_when_it_is_closed(text, decided):
    assert states.is_decided(text, "left", {"A": "left", "B": "right"}) is decided


PIECES = [
    "left",
    "right",
    " left",
    " right",
    " or",
    " not",
    "most",
    " neither",
    " the",
    ".",
    ",",
    " x.",
    "\n",
    " 3",
    "!",
    " nor",
    " Right",
    "er",
    "\ufffd",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=5), st.lists(st.sampled_from(PIECES), max_size=5))
def test_a_decided_answer_is_read_the_same_whatever_follows(begin, more):
    text, whole = "".join(begin), "".join(begin + more)
    if states.is_decided(text, "left"):
        read, note = pairs.read_answer(text, "left")
        assert pairs.read_answer(whole, "left")[0] == read or (
            note != "tie" and pairs.read_answer(whole, "left")[1] == "tie" and " or" in whole
        )
        assert states.is_decided(whole, "left")


def test_stopping_changes_no_answer_of_a_trained_model(models, work, tmp_path, monkeypatch):
    vlm = models("tiny-llava")
    early = measured(vlm, work, tmp_path / "early", 4, tokens=8)
    monkeypatch.setattr(states, "is_decided", lambda *args: False)
    late = measured(vlm, work, tmp_path / "late", 4, tokens=8)
    assert early[2] == late[2] and np.array_equal(early[0], late[0])
    monkeypatch.setattr(
        states, "is_decided", lambda *args: True
    )  # the rule does reach the decoding
    first = measured(vlm, work, tmp_path / "first", 4, tokens=8)
    assert all(
        b["pred_orig"].startswith(a["pred_orig"]) and len(a["pred_orig"].split()) <= 1
        for a, b in zip(first[2], late[2], strict=True)
    )
    assert np.array_equal(first[0], late[0])


def test_rows_stop_by_themselves_and_the_passes_end_with_the_last(models, batch_of):
    vlm = models("llava-gqa")
    batch, limits = batch_of(vlm), [3, 1, 2]
    full = generate(vlm, batch, 6)
    assert min(len(ids) for ids in full.ids) > 3
    asked = []

    def stop(ids):
        asked.append(ids)
        return [
            len(own) == limit for own, limit in zip(ids, limits, strict=True)
        ]  # true once: it must hold

    with capture(vlm, [probe := Probe()]):
        found = generate(vlm, batch, 6, stop=stop)
    assert (
        found.ids == [ids[:limit] for ids, limit in zip(full.ids, limits, strict=True)]
        and found.steps.tolist() == limits
    )
    assert probe.step + 1 == len(asked) == 3 and asked[2] == found.ids
    wanted = torch.stack(
        [
            torch.where(torch.arange(3) < limit, row[:3], torch.nan)
            for row, limit in zip(full.logprobs, limits, strict=True)
        ]
    )
    assert torch.allclose(found.logprobs, wanted, atol=1e-6, equal_nan=True)


# --- files ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """What the engine must not catch."""


def test_a_killed_and_resumed_run_gives_the_same_bytes(models, work, tmp_path, monkeypatch):
    """Killed at every point in turn: before each pass, within the writing of a row (half of it
    written), before and after each file."""
    vlm, (items, quads, pictures) = models("llava-gqa"), work
    items = sorted(items, key=lambda item: item.id not in quads)[1:3]
    items = [SimpleNamespace(pair=item.pair, row=row, id=item.id) for row, item in enumerate(items)]
    quads = {
        item.id: quads[item.id] | {"row": k}
        for k, item in enumerate(item for item in items if item.id in quads)
    }
    points = SimpleNamespace(left=None, seen=0)

    def point(effect=lambda: None):
        points.seen += 1
        if points.left is not None and points.seen > points.left:
            effect()
            raise Killed

    def run(folder):
        own = rundirs.open_run(folder, "swap_analysis", {"seed": 1})
        kept = states.open_states(folder / "states.npy", (len(items), 2, 3, 128), "float16")
        quad_kept = states.open_states(
            folder / "quad_states.npy", (len(quads), 4, 3, 128), "float16"
        )
        process = states.make_process(vlm, LAYERS, kept, quad_kept, quads, 2)
        engine.run_items(own, items, lambda item: (item, pictures[item.id]), process, 1)
        contents = {path.name: path.read_bytes() for path in (folder / "per_image").iterdir()}
        return contents | {
            name: (folder / name).read_bytes() for name in ("states.npy", "quad_states.npy")
        }

    def before(owner, name, after=False):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            point()
            found = original(*args, **kwargs)
            if after:
                point()
            return found

        monkeypatch.setattr(owner, name, wrapped)

    put = states.States.__setitem__

    def torn(self, row, values):
        half = np.where(np.arange(values.size).reshape(values.shape) % 2, values, 7)
        point(lambda: put(self, row, half))
        put(self, row, values)

    before(states, "generate")
    before(disk, "write", after=True)
    before(os, "ftruncate", after=True)
    monkeypatch.setattr(states.States, "__setitem__", torn)
    wanted, count = run(tmp_path / "whole"), points.seen
    assert len(wanted) == 2 * len(items) + 2 and count > 15 and quads
    for left in range(count):
        points.left, points.seen = left, 0
        folder = tmp_path / f"killed-{left}"
        with pytest.raises(Killed):
            run(folder)
        points.left = None
        assert run(folder) == wanted, f"killed at point {left}"


def test_two_that_begin_at_once_use_one_array(tmp_path, monkeypatch):
    real, fives = os.ftruncate, np.full((2, 1, 4), 5, np.float32)
    path, shape = tmp_path / "s.npy", (2, 2, 1, 4)

    def truncate(*args):
        monkeypatch.setattr(os, "ftruncate", real)
        states.open_states(path, shape, "float32")[0] = fives  # another shard is first
        real(*args)

    monkeypatch.setattr(os, "ftruncate", truncate)
    states.open_states(path, shape, "float32")[1] = 2 * fives
    assert np.array_equal(np.load(path), [fives, 2 * fives])
    np.save(tmp_path / "whole.npy", np.load(path))
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_an_array_that_a_killed_shard_has_begun_is_made_up_for(tmp_path):
    path, shape = tmp_path / "s.npy", (2, 2, 1, 4)
    states.open_states(path, shape, "float32")
    whole = path.read_bytes()
    for size in (0, 10, 128, 150):
        path.write_bytes(whole[:size])
        states.open_states(path, shape, "float32")
        assert path.read_bytes() == whole, size


def test_a_row_of_another_shape_is_refused_and_a_full_disk_is_one_line(tmp_path, monkeypatch):
    kept = states.open_states(tmp_path / "s.npy", (2, 2, 1, 4), "float32")
    with pytest.raises(ValueError, match="a row of .* has shape"):
        kept[0] = np.ones((2, 4), np.float32)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match="the disk is full"):
        kept[0] = np.ones((2, 1, 4), np.float32)


def test_states_that_do_not_fit_into_float16_are_an_error():
    assert states.on_cpu(torch.tensor([1.5, -3e4]), np.dtype("float16")).dtype == np.float16
    with pytest.raises(ValueError, match="1e.05.*float32 holds more"):
        states.on_cpu(torch.tensor([1e5]), np.dtype("float16"))


def test_multiple_choice_answers_are_read_and_weighed_by_letters(models, shapes, work, tmp_path):
    vlm = models("tiny-llava")
    found, _ = pairs.read_pairs(shapes / "swap_pairs_ready.tsv", limit=1, multiple_choice=True)
    items = [
        SimpleNamespace(pair=pair | {"split": None}, row=row, id=pair["id"])
        for row, pair in enumerate(found)
    ]
    pictures = {
        item.id: table.picture_at(shapes / "swap_pairs_ready.tsv", item.pair["offset"])
        for item in items
    }
    _, _, records = measured(vlm, (items, {}, pictures), tmp_path, 4)
    for item, record in zip(items, records, strict=True):
        logits = plain(vlm, item.pair["questions"][0], pictures[item.id])[1]
        right, wrong = (
            logits[first_ids(vlm, item.pair["questions"][0], forms)].item()
            for forms in pairs.spellings(item.pair).values()
        )
        assert record["margin_orig"] == pytest.approx(right - wrong, abs=1e-3)

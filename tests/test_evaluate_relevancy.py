"""Evaluation of maps over the picture: areas, pointing and energy on planted data, removal against
slow forward passes, the scripts by their command lines."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data import make_shapes
from tests.conftest import in_process
from vlmdiag.answers import token_spans
from vlmdiag.groups import VISION
from vlmdiag.model.decoding import generate
from vlmdiag.pictures.coco import read_instances
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import perturbation
from vlmdiag.relevancy.gradients import trace

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, PLOT = (
    ROOT / "diagnostic_tools" / name
    for name in ("evaluate_relevancy.py", "relevancy_evaluation_plot.py")
)
MODEL = ROOT / "checkpoints" / "tiny-llava"
SHARES = np.linspace(0, 1, 11)

# --- planted data ---------------------------------------------------------------------------------


def needs(parts, size=40):
    """measure() of one target whose log-probability falls by 1 with each of some parts that is
    gone."""
    weight = np.isin(np.arange(size), parts).astype(float)
    return lambda gone: -(gone * weight).sum(1, keepdims=True)


def areas_of(order, measure, what="ratio"):
    found = perturbation.curves(measure, np.array([[order]]), SHARES)[0, 0]
    return perturbation.area(perturbation.MEASURES[what](found), SHARES)


def test_the_ideal_order_has_the_ideal_areas_and_random_lies_between():
    parts, rng = [3, 17, 22, 39], np.random.default_rng(0)
    measure = needs(parts)
    ideal = areas_of(perturbation.order(np.isin(np.arange(40), parts), rng), measure)
    worst = areas_of(perturbation.order(-np.isin(np.arange(40), parts).astype(float), rng), measure)
    chance = np.mean([areas_of(rng.permutation(40), measure) for _ in range(200)], 0)
    low = np.exp(-4.0)  # all four parts are in the first, or the last, tenth
    assert np.allclose(
        ideal, [0.05 * (1 + low) + 0.9 * low, 0.9 + 0.05 * (1 + low)]
    ) and np.allclose(worst, ideal[::-1])
    assert (
        ideal[0] < chance[0] < worst[0]
        and worst[1] < chance[1] < ideal[1]
        and abs(chance[0] - chance[1]) < 0.05
    )
    assert np.allclose(
        areas_of(perturbation.order(np.isin(np.arange(40), parts), rng), measure, "log_ratio"),
        [-0.05 * 4 - 0.9 * 4, -0.05 * 4],
    )


def test_areas_are_means_over_the_shares_whatever_their_spacing():
    shares = np.array([0, 0.1, 0.5, 1])
    assert np.isclose(perturbation.area(3 * shares + 1, shares), 2.5) and np.allclose(
        perturbation.area(np.ones((2, 4)), shares), 1
    )
    curve = np.log([[0.5, 0.25, 0.1, 0.05]])
    assert np.allclose(perturbation.MEASURES["ratio"](curve), [[1, 0.5, 0.2, 0.1]]) and np.allclose(
        perturbation.MEASURES["probability"](curve), np.exp(curve)
    )
    assert (
        np.allclose(perturbation.MEASURES["log_ratio"](curve)[0, -1], np.log(0.1))
        and perturbation.MEASURES["logprob"](curve) is curve
    )


def test_shares_count_as_published_and_the_two_ways_share_no_part():
    order = np.array([4, 2, 0, 1, 3, 5, 6])
    gone = perturbation.removed(order, [0, 0.1, 0.5, 0.9, 1])
    assert gone.sum(1).tolist() == [7 - int((1 - s) * 7) for s in (0, 0.1, 0.5, 0.9, 1)] and gone[
        1
    ].nonzero()[0].tolist() == [4]
    assert perturbation.removed(np.arange(10), [0.1, 0.3, 0.7, 0.9]).sum(1).tolist() == [
        1,
        3,
        7,
        9,
    ]  # 0.1 * 10 is 1 and (1 - 0.9) * 10 too
    assert not (perturbation.removed(order, [0.4]) & perturbation.removed(order[::-1], [0.4])).any()


def test_equal_scores_are_ordered_at_random_and_reproducibly():
    scores = np.array([0.0] * 20 + [1.0] * 5)
    one, other = (perturbation.order(scores, np.random.default_rng(seed)) for seed in (0, 1))
    assert set(one[:5]) == set(other[:5]) == set(range(20, 25)) and one.tolist() != other.tolist()
    assert one.tolist() == perturbation.order(scores, np.random.default_rng(0)).tolist() and sorted(
        one
    ) == list(range(25))
    assert perturbation.order(-np.arange(4.0), np.random.default_rng(0)).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="1 NaN"):
        perturbation.order([0.0, np.nan], np.random.default_rng(0))


def test_each_target_is_read_in_its_own_order_and_no_pattern_is_measured_twice():
    seen, rng = [], np.random.default_rng(0)
    orders = np.stack([np.stack([rng.permutation(6) for _ in range(2)]) for _ in range(3)])
    orders[2] = orders[1]

    def measure(gone):
        seen.extend(map(bytes, gone))
        return np.stack(
            [-(gone * 2.0 ** np.arange(6)).sum(1), -(gone * 3.0 ** np.arange(6)).sum(1)], 1
        )

    found = perturbation.curves(measure, orders, [0, 0.5, 1])
    assert (
        found.shape == (3, 2, 2, 3)
        and len(seen) == len(set(seen))
        and np.array_equal(found[1], found[2])
    )
    for m in range(3):
        for t in range(2):
            for way, order in enumerate((orders[m, t], orders[m, t][::-1])):
                assert np.isclose(found[m, t, way, 1], -((2.0, 3.0)[t] ** order[:3]).sum())


TEXT = "A teddy bear, a bear and a dog; the dog sees two cats."


def test_names_are_found_once_each_where_they_are_not_ambiguous():
    words = [TEXT[i : i + 3] for i in range(0, len(TEXT), 3)]  # tokens of three characters
    text, spans = token_spans(range(len(words)), lambda ids: "".join(words[i] for i in ids))
    there = [{"category": name, "id": n} for n, name in enumerate(["teddy bear", "dog", "sofa"])]
    names = ["bear", "teddy bear", "dog", "cat", "sofa"]
    found, left_out = perturbation.objects_named_once(text, spans, there, names)
    said = {
        annotation["category"]: "".join(words[i] for i in tokens) for tokens, annotation in found
    }
    assert (
        text == TEXT
        and set(said) == {"teddy bear", "dog"}
        and "teddy bear" in said["teddy bear"]
        and "dog" in said["dog"]
    )
    assert found[0][0] < found[1][0] and found[1][0][-1] * 3 < TEXT.index(
        "; the"
    )  # in the answer's order, the first mention
    assert left_out == {
        "absent": 1,
        "ambiguous": 0,
        "repeated": 1,
    }  # the bear alone; the second dog; "cats" is no cat
    for more in ({"category": "dog", "id": 9}, None):
        twice = there + [more] if more else [there[0], there[1] | {"iscrowd": 1}]
        found, left_out = perturbation.objects_named_once(text, spans, twice, names)
        assert [annotation["category"] for _, annotation in found] == ["teddy bear"] and left_out[
            "ambiguous"
        ] == 2
    apart = perturbation.objects_named_once("teddy  bear", [(0, 5), (5, 7), (7, 11)], there, names)
    assert apart[0][0][0] == [0, 2]  # blanks alone are no target


def square(size=8, cells=4):
    return PatchGrid.regular(
        cells, cells, (0, 0, size * cells, size * cells), (size * cells, size * cells)
    )


def test_pointing_and_energy_on_a_planted_object():
    grid, mask = square(), np.zeros((32, 32), bool)
    mask[8:16, 0:12] = True  # all of cell 4 and half of cell 5
    coverage, hit = grid.coverage(mask), perturbation.hits(grid, mask)
    assert (
        np.flatnonzero(hit).tolist() == [4]
        and np.allclose(coverage[[4, 5]], [1, 0.5])
        and np.isclose(coverage.sum(), 1.5)
    )
    assert np.flatnonzero(perturbation.hits(grid, mask, 1)).tolist() == [
        4,
        5,
    ]  # centre at x = 12, the mask's last pixel's middle at 11.5
    assert np.flatnonzero(perturbation.hits(grid, mask, 4.6)).tolist() == [0, 1, 4, 5, 8, 9]
    scores = np.zeros(16)
    scores[4], scores[5], scores[0] = 2, 1, -5
    assert perturbation.pointing(scores, hit) == 1 and np.isclose(
        perturbation.energy(scores, coverage), 2.5 / 3
    )
    scores[9] = 2
    assert perturbation.pointing(scores, hit) == 0.5  # two equal maxima
    assert np.isnan(perturbation.energy(-np.ones(16), coverage)) and np.isclose(
        perturbation.energy(np.ones(16), coverage), mask.mean()
    )


def test_pointing_forgives_what_the_nearest_pixel_is_away():
    """hits() looks into a window around each centre; here every pixel of the mask."""
    rng, grid = np.random.default_rng(1), PatchGrid.regular(5, 7, (-6, 3, 64, 53), (60, 50))
    mask = rng.random((50, 60)) < 0.004
    centres = (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2
    ys, xs = np.nonzero(mask)
    distance = np.hypot(centres[:, :1] - xs - 0.5, centres[:, 1:] - ys - 0.5).min(1)
    for tolerance in (3.0, 7.5, 20.0):
        found = perturbation.hits(grid, mask, tolerance)
        assert found.any() and np.array_equal(found, distance <= tolerance)


def test_the_centre_prior_falls_with_the_distance():
    found = perturbation.centre_scores(square()).reshape(4, 4)
    assert (
        np.isclose(found[0, 0], 0)
        and np.allclose(found, found.T)
        and np.allclose(found[1:3, 1:3], found.max())
        and np.allclose(found, found[::-1])
    )
    grid = PatchGrid(np.vstack([square().boxes, np.full((1, 4), np.nan)]), None, (32, 32))
    assert (
        perturbation.centre_scores(grid)[-1] == 0
        and not perturbation.hits(grid, np.ones((32, 32), bool))[-1]
    )


# --- removal against slow forward passes ----------------------------------------------------------


@pytest.fixture(scope="module", params=["llava-gqa", "qwen", "qwen3"])
def run(request, load, pictures):
    vlm = load(request.param)
    batch = vlm.encode([Sample("0", None, "What color is the circle?")], [pictures[1]])
    return trace(vlm, batch, generate(vlm, batch, 5).ids[0])


@pytest.fixture(scope="module")
def gone(run):
    rng, size = np.random.default_rng(0), len(run.vision)
    return np.array(
        [
            np.zeros(size, bool),
            np.ones(size, bool),
            rng.random(size) < 0.5,
            rng.random(size) < 0.1,
            rng.random(size) < 0.9,
        ]
    )


TARGETS = [1, 4]


def slow(run, read, positions, mask=None):
    """(T,) by the model's own forward pass over one sequence, all logits kept; deepstack by the
    decoder's own arguments."""
    embeds, seen, deep = read
    mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    deepstack = {"visual_pos_masks": seen, "deepstack_visual_embeds": deep} if deep else {}
    with torch.no_grad():
        decoder = run.vlm.parts.decoder
        states = decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            **deepstack,
        ).last_hidden_state
        logits = run.vlm.parts.lm_head(states)[0].float()
    start = embeds.shape[1] - len(run.ids) - 1
    return np.array([logits[start + t].log_softmax(-1)[run.ids[t]].item() for t in TARGETS])


def inputs(run, features):
    """(decoder inputs (1, N, d), where the vision tokens are (1, N), [what its first layers add to
    them (P, d), ...])."""
    seen, embeds = (
        run.batch.groups == VISION,
        run.vlm.model.get_input_embeddings()(run.batch.input_ids),
    )
    first, *deep = features.split(embeds.shape[-1], -1)
    return embeds.masked_scatter(seen[..., None], first), seen, deep


def without(run, read, keep):
    """The same of some positions only."""
    embeds, seen, deep = read
    stay = torch.tensor([position in keep for position in run.vision.tolist()], dtype=torch.bool)
    return embeds[:, keep], seen[:, keep], [part[stay] for part in deep]


def test_mean_replacement_is_the_forward_pass_with_those_tokens_replaced(run, gone):
    features = run.features.detach()
    found = perturbation.mean_replaced(run, TARGETS, gone, per_pass=2)
    for some, own in zip(gone, found, strict=True):
        changed = features.clone()
        for part in np.flatnonzero(some):
            changed[part] = features.mean(0)
        assert np.allclose(own, slow(run, inputs(run, changed), run.batch.position_ids), atol=1e-4)
    plain = run.logits.log_softmax(-1)
    assert np.allclose(
        found[0], [plain[t, run.ids[t]].item() for t in TARGETS], atol=1e-4
    )  # nothing removed: the answer as it was
    assert np.abs(found[1] - found[0]).max() > 1e-3
    assert np.allclose(
        found, perturbation.mean_replaced(run, TARGETS, gone, per_pass=16), atol=1e-4
    )


def test_dropping_is_the_forward_pass_over_the_shorter_sequence_at_the_old_positions(run, gone):
    read, vision = inputs(run, run.features.detach()), run.vision.tolist()
    found, moved = (
        perturbation.dropped(run, TARGETS, np.concatenate([gone, gone[2:3, ::-1]]), per_pass=2)[
            : len(gone)
        ],
        [],
    )
    for some, own in zip(gone, found, strict=True):
        out = {vision[part] for part in np.flatnonzero(some)}
        keep = [i for i in range(run.length) if i not in out]
        assert np.allclose(
            own, slow(run, without(run, read, keep), run.batch.position_ids[..., keep]), atol=1e-4
        )
        mask = torch.tensor([[int(i not in out) for i in range(run.length)]])
        assert np.allclose(
            own, slow(run, read, run.batch.position_ids, mask), atol=1e-4
        )  # what cannot be read is not there
        moved.append(slow(run, without(run, read, keep), run.batch.position_ids[..., : len(keep)]))
    assert (
        np.abs(found - np.array(moved))[1:].max() > 1e-3
    )  # the places that the others kept matter
    assert np.allclose(found[0], perturbation.mean_replaced(run, TARGETS, gone[:1])[0], atol=1e-4)


def test_blurring_is_a_pass_over_the_picture_with_those_boxes_blurred(run, gone, pictures):
    grid, picture = run.prompt.grids[0], pictures[1]
    found = perturbation.blurred(run, TARGETS, gone, picture, grid, 12.0, per_pass=3)
    soft = picture.filter(ImageFilter.GaussianBlur(12.0))
    for some, own in zip(gone, found, strict=True):
        changed = picture.copy()
        for part in np.flatnonzero(some):
            box = tuple(max(0, round(edge)) for edge in grid.boxes[part])
            box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
            if box[0] < box[2] and box[1] < box[3]:  # some lie in what the processor padded
                changed.paste(soft.crop(box), box[:2])
        batch = run.vlm.encode(run.prompt.samples, [changed])
        logits = trace(run.vlm, batch, run.ids).logits.log_softmax(-1)
        assert np.allclose(own, [logits[t, run.ids[t]].item() for t in TARGETS], atol=1e-4)
    assert np.abs(found[1] - found[0]).max() > 1e-4
    one = perturbation.blur_boxes(picture, grid, gone[:1], 12.0)[0]
    assert isinstance(one, Image.Image) and np.array_equal(np.asarray(one), np.asarray(picture))


# --- the scripts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(root),
                "--num_images",
                "12",
                "--num_train",
                "0",
                "--seed",
                "5",
                "--num_workers",
                "0",
            ]
        )
        == 0
    )
    return root


def arguments(shapes, out, *more, model=MODEL, images=3):
    where = [
        "--image_folder",
        shapes / "val2017",
        "--ann_file",
        shapes / "annotations" / "instances_val2017.json",
        "--out_root",
        out,
    ]
    return ["--model_path", model, *where, "--num_images", images, "--no_self_check", *more]


SMALL = [
    "--methods",
    "relevancy",
    "raw_attention",
    "random",
    "--removal",
    "mean",
    "drop",
    "blur",
    "--shares",
    "0",
    "0.2",
    "0.8",
    "1",
    "--targets_per_image",
    "1",
]


@pytest.fixture(scope="module")
def command():
    return in_process(SCRIPT)


@pytest.fixture(scope="module")
def plot():
    return in_process(PLOT)


@pytest.fixture(scope="module")
def three(shapes, tmp_path_factory, warm_python):
    """The run of three pictures by the real command line."""
    out = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [warm_python, "-W", "error", SCRIPT, *map(str, arguments(shapes, out, *SMALL))],
        capture_output=True,
        text=True,
        cwd=ROOT / "data",
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    return out / "evaluate_relevancy" / "tiny-llava"


def files(run):
    return {path.name: path.read_bytes() for path in sorted((run / "per_image").iterdir())}


def test_a_run_holds_maps_curves_and_places(three, shapes):
    annotations = read_instances(shapes / "annotations" / "instances_val2017.json")
    assert len(files(three)) == 6
    for path in sorted((three / "per_image").glob("*.json")):
        record, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        (target,) = record["targets"]
        (own,) = [
            annotation
            for annotation in annotations[int(record["image_id"])]
            if annotation["id"] == target["annotation"]
        ]
        assert (
            target["text"] == target["name"].split()[target["word"]]
            and own["category"] == target["name"]
            and target["name"] in record["caption"]
        )
        assert record["methods"] == ["relevancy", "raw_attention", "random", "centre", "object"]
        for removal in ("mean", "drop", "blur"):
            found = arrays[f"curves_{removal}"]
            assert found.shape == (5, 1, 2, 4) and np.isfinite(found).all()
            assert (
                np.allclose(found[..., 0], arrays["logprob"][0], atol=1e-4)
                and np.ptp(found[..., -1]) < 1e-4
            )  # the ends are the same for all
        assert np.allclose(arrays["curves_mean"][..., -1], arrays["without_picture"][0], atol=1e-4)
        assert arrays["scores_relevancy"].shape == (1, 144) and arrays["pointing"].shape == arrays[
            "energy"
        ].shape == (5, 1)
        visible = arrays["area_energy"][0]
        assert (
            0 < visible < 0.3
            and arrays["energy"][4, 0] > visible
            and arrays["pointing"][4, 0] > 0.5
        )  # the object's own mask


def test_resumed_and_sharded_runs_have_the_same_bytes(three, shapes, command, tmp_path):
    again = tmp_path / "evaluate_relevancy" / "tiny-llava"
    shutil.copytree(three, again)
    (again / "per_image" / "000000000002.json").unlink()
    done = command(*arguments(shapes, tmp_path, *SMALL))
    assert (
        done.returncode == 0
        and "1 computed, 2 done before" in done.stdout
        and files(again) == files(three)
    )
    for shard in ("0/2", "1/2"):
        assert (
            command(
                *arguments(shapes, tmp_path, *SMALL, "--run_name", "b", "--shard", shard)
            ).returncode
            == 0
        )
    assert files(again.with_name("tiny-llava__b")) == files(three)
    other = command(*arguments(shapes, tmp_path, *SMALL, "--seed", "1"))
    assert other.returncode == 2 and "seed: now 1, there 0" in other.stderr


def test_given_answers_are_measured(shapes, command, tmp_path):
    found = read_instances(shapes / "annotations" / "instances_val2017.json")[1]
    name = found[0]["category"]
    wrong = "green sphere"
    entries = [
        {
            "image_id": 1,
            "image": "000000000001.jpg",
            "question": "What is there?",
            "answer": f"A {name} and a {wrong}.",
        }
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    more = [
        "--question_file",
        tmp_path / "q.json",
        "--use_answers",
        "--methods",
        "random",
        "--shares",
        "0",
        "1",
    ]
    assert command(*arguments(shapes, tmp_path, *more)).returncode == 0
    record = json.loads(
        (
            tmp_path / "evaluate_relevancy" / "tiny-llava" / "per_image" / "000000000001-0.json"
        ).read_text()
    )
    assert record["caption"] == entries[0]["answer"] and [
        (target["text"], target["word"]) for target in record["targets"]
    ] == list(zip(name.split(), (0, 1)))


def test_behind_a_q_former_a_map_is_judged_where_it_fits(
    shapes, command, plot, blip_folders, tmp_path
):
    """Maps over the tower's patches: the picture can be blurred by them; maps over the queries,
    which have no place: these can be replaced."""
    name = read_instances(shapes / "annotations" / "instances_val2017.json")[1][0]["category"]
    entries = [
        {
            "image_id": 1,
            "image": "000000000001.jpg",
            "question": "What is there?",
            "answer": f"A {name}.",
        }
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    more = [
        "--question_file",
        tmp_path / "q.json",
        "--use_answers",
        "--methods",
        "relevancy",
        "relevancy_decoder",
        "random",
        "--shares",
        "0",
        "0.5",
        "1",
    ]
    done = command(
        *arguments(
            shapes,
            tmp_path,
            *more,
            "--removal",
            "mean",
            "blur",
            "--targets_per_image",
            "2",
            model=blip_folders("blip2-opt"),
        )
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "evaluate_relevancy" / "blip2-opt"
    arrays, relevancy, decoder = np.load(run / "per_image" / "000000000001-0.npz"), 0, 1
    places = [f"scores_{method}" for method in ("relevancy", "relevancy_decoder")]
    assert [arrays[place].shape for place in places] == [(2, 16), (2, 6)] and len(
        arrays["boxes"]
    ) == 16
    for what, fits, other in (
        ("curves_mean", decoder, relevancy),
        ("curves_blur", relevancy, decoder),
        ("pointing", relevancy, decoder),
    ):
        assert np.isfinite(arrays[what][fits]).all() and np.isnan(arrays[what][other]).all()
    done = plot("--run_dirs", run, "--tokens", "all")
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_wrong_usage_is_one_line_and_code_2(shapes, command, plot, three, tmp_path):
    cases = [
        (["--shares", "0.1", "1"], "ascending shares from 0 to 1"),
        (["--shares", "0", "0.5", "0.4", "1"], "ascending shares"),
        (["--methods", "magic"], "invalid choice"),
        (["--removal", "burn"], "invalid choice"),
        (["--use_answers"], "needs --question_file"),
        (["--targets_per_image", "0"], "--targets_per_image"),
        (["--blur_radius", "0"], "--blur_radius"),
        (["--ann_file", tmp_path / "none.json"], "no such file"),
    ]
    for more, message in cases:
        done = command(*arguments(shapes, tmp_path, *more))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
            more,
            done.stderr,
        )
    assert not (tmp_path / "evaluate_relevancy").exists()
    done = plot("--run_dirs", tmp_path)
    assert done.returncode == 2 and "not a run directory" in done.stderr
    empty = tmp_path / "empty"
    shutil.copytree(three, empty)
    for path in (empty / "per_image").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"targets": []}))
    done = plot("--run_dirs", empty)
    assert done.returncode == 2 and "none of its 3 answers names an object" in done.stderr


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_tables_and_figures_come_from_the_run(three, plot, tmp_path):
    done = plot("--run_dirs", three, "--out_dir", tmp_path / "a", "--tokens", "all")
    assert done.returncode == 0 and not done.stderr, done.stderr
    names = {path.name for path in (tmp_path / "a").iterdir()}
    figures = {
        f"tiny-llava_{what}.{kind}"
        for what in ("curves", "auc", "localisation")
        for kind in ("png", "pdf")
    }
    assert names == figures | {"perturbation_auc.csv", "localisation.csv"}
    rows = table(tmp_path / "a" / "perturbation_auc.csv")
    assert len(rows) == 3 * 5 * 4 * 5  # removal, groups of tokens, measures, methods
    own = [np.load(path) for path in sorted((three / "per_image").glob("*.npz"))]
    shares = np.array([0, 0.2, 0.8, 1])
    for row in rows:
        if row["tokens"] == "all" and row["measure"] == "ratio":
            m = ["relevancy", "raw_attention", "random", "centre", "object"].index(row["method"])
            ratio = [
                np.exp(arrays[f"curves_{row['removal']}"][m, 0].astype(float)) for arrays in own
            ]
            value = np.mean(
                [[np.trapezoid(way / way[0], shares) for way in part] for part in ratio], 0
            )
            assert np.allclose(
                [float(row["positive"]), float(row["negative"]), float(row["gap"])],
                [*value, value[1] - value[0]],
                atol=1e-5,
            )
            assert (
                row["n_images"] == "3"
                and row["n_tokens"] == "3"
                and float(row["gap_low"]) <= float(row["gap"]) <= float(row["gap_high"])
            )
    local = {
        (row["measure"], row["method"]): row
        for row in table(tmp_path / "a" / "localisation.csv")
        if row["tokens"] == "all"
    }
    assert np.isclose(
        float(local["energy", "relevancy"]["value"]),
        np.mean([arrays["energy"][0] for arrays in own]),
    )
    assert np.isclose(
        float(local["pointing", "area"]["value"]),
        np.mean([arrays["area_pointing"] for arrays in own]),
    )
    assert float(local["energy", "area"]["minus_area"]) == 0 and set(local) >= {
        ("energy", "centre"),
        ("pointing", "object"),
    }
    again = plot("--run_dirs", three, "--out_dir", tmp_path / "b", "--tokens", "all")
    assert again.returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }


def test_groups_of_tokens_are_told_apart_by_what_they_lose(three, plot, tmp_path):
    for dependence, full, none in ((1e6, "knowing", "seeing"), (-1e6, "seeing", "knowing")):
        done = plot("--run_dirs", three, "--out_dir", tmp_path, "--dependence", dependence)
        rows = table(tmp_path / "perturbation_auc.csv")
        words = [
            target["word"]
            for path in (three / "per_image").glob("*.json")
            for target in json.loads(path.read_text())["targets"]
        ]
        for group, count in (("first", words.count(0)), ("later", len(words) - words.count(0))):
            assert {row["n_tokens"] for row in rows if row["tokens"] == group} == {str(count)}
        assert done.returncode == 0 and {
            row["n_tokens"] for row in rows if row["tokens"] == full
        } == {"3"}
        assert {
            (row["n_tokens"], row["n_images"], row["gap"]) for row in rows if row["tokens"] == none
        } == {("0", "0", "")}
        assert ("no figures, for there are no tokens" in done.stdout) == (none == "seeing")


def test_gradient_relevancy_beats_random_on_the_tiny_model(shapes, command, plot, tmp_path):
    """Twelve pictures, two tokens each, everything by the fixed seed."""
    more = [
        "--methods",
        "relevancy",
        "random",
        "--shares",
        "0",
        "0.1",
        "0.5",
        "0.9",
        "1",
        "--targets_per_image",
        "2",
    ]
    assert command(*arguments(shapes, tmp_path, *more, images=12)).returncode == 0
    assert (
        plot(
            "--run_dirs", tmp_path / "evaluate_relevancy" / "tiny-llava", "--out_dir", tmp_path
        ).returncode
        == 0
    )
    rows = table(tmp_path / "perturbation_auc.csv")
    row, chance = (
        next(
            r
            for r in rows
            if (r["measure"], r["tokens"], r["method"]) == ("ratio", "seeing", method)
        )
        for method in ("relevancy", "random")
    )
    assert int(row["n_images"]) >= 10 and float(row["gap_minus_random_low"]) > 0.25
    assert float(row["positive_minus_random_high"]) < 0 < float(row["negative_minus_random_low"])
    assert float(chance["gap_low"]) < 0.3 and float(chance["gap_minus_random"]) == 0
    local = {
        (row["measure"], row["method"]): row
        for row in table(tmp_path / "localisation.csv")
        if row["tokens"] == "all"
    }
    for what in ("pointing", "energy"):
        assert (
            float(local[what, "relevancy"]["minus_area_low"]) > 0.1
            and float(local[what, "relevancy"]["minus_centre_low"]) > 0.1
        )
        assert abs(float(local[what, "random"]["minus_area"])) < 0.12


def test_the_command_offers_every_method():
    from diagnostic_tools import evaluate_relevancy
    from vlmdiag.relevancy.methods import METHODS

    assert list(METHODS) == list(evaluate_relevancy.METHODS)

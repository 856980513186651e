"""Scripts by their real command lines on families whose traits break what holds for LLaVA: each
runs, with a number that a plain pass confirms, or says in one line which capability the family
lacks and writes nothing."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from data import make_shapes
from tests.conftest import in_process
from vlmdiag.beyond_semantics import position_sensitivity, shuffled_answers
from vlmdiag.groups import GROUPS
from vlmdiag.interp import ablation
from vlmdiag.model.attention import Block, capture, edit
from vlmdiag.model.decoding import answer_ids, extended, generate
from vlmdiag.model.probes import ImageAttention, LastStates
from vlmdiag.model.vision import entries, prefill
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.pictures.table import picture_at
from vlmdiag.runs import rundirs

pytestmark = pytest.mark.types

ROOT = Path(__file__).resolve().parents[1]
TRAITS = {  # file in random_models, name there: what is unlike LLaVA
    "internvl-qwen2": (
        "internvl"
    ),  # tiles and a thumbnail: boxes overlap, as many tokens as the picture's shape wants
    "idefics3": "idefics3",  # text between the tiles: vision tokens are not contiguous
    "nvila-lite": "nvila",  # line breaks between the tiles
    "paligemma": (
        "paligemma"
    ),  # the prompt sees itself in both directions, vision tokens before the BOS
    "aya-vision": "aya_vision",  # rotary positions of neighbours, and layers without any
    "qwen3_vl": "qwen_vl",  # deepstack, positions in three dimensions
    "mplug_owl2": "mplug_owl2",  # keys by modality, no grid
}
PLACED = [name for name in TRAITS if name != "mplug_owl2"]
script = {
    name: in_process(ROOT / path)
    for name, path in {
        "coco": "diagnostic_tools/run_coco_diagnostics.py",
        "psi": "diagnostic_tools/psi.py",
        "overlay": "diagnostic_tools/viz_attention_image.py",
        "relevancy": "diagnostic_tools/relevancy_maps.py",
        "evaluate": "diagnostic_tools/evaluate_relevancy.py",
        "hallucination": "diagnostic_tools/hallucination_warning.py",
        "acts": "scripts/save_post_adapter_acts.py",
        "mean": "scripts/calculate_mean_vector.py",
        "ablation": "scripts/ablation_experiment.py",
        "vqa": "scripts/ablation_experiment_curate.py",
        "knockout": "scripts/attention_experiment_curate.py",
        "lens": "scripts/logit_lens/create_logit_lens.py",
        "swap": "swap_analysis/swap_analysis.py",
        "volcano": "visualize/run_volcano_with_image_attention.py",
        "heatmap": "visualize/image_attention_heatmap.py",
        "size": "scripts/estimate_acts_size.py",
    }.items()
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family-shapes") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "6",
                "--num_train",
                "0",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """get(name) -> (folder, VLM), built once."""
    root, found = tmp_path_factory.mktemp("family-models"), {}

    def get(name):
        if name not in found:
            build = importlib.import_module(f"tests.random_models.{TRAITS[name]}").MODELS[name]
            with torch.inference_mode(False):  # parameters that gradients may pass
                folder = build(root / name)
                found[name] = folder, common.load_model(folder, self_check=False)
        return found[name]

    return get


@pytest.fixture
def run(models, tmp_path):
    """run(script, model, *flags) -> CompletedProcess; runs go to tmp_path."""

    def call(name, model, *flags):
        places = {"overlay": (), "acts": ("--save_path", tmp_path / "mean_vector" / model)}
        place = places.get(name, ("--out_root", tmp_path))
        return script[name]("--model_path", models(model)[0], *place, "--no_self_check", *flags)

    return call


def good(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done, tmp_path, *words):
    """One line with these words, exit code 2, and no run directory."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words), (
        done.stdout + done.stderr
    )
    assert not list(tmp_path.rglob("meta.json")), "nothing is written before a refusal"


def one(vlm, picture, question="Describe the image.", ids=()):
    """The batch of a single prompt, and of what goes on after it."""
    batch = vlm.encode([Sample("0", None, question)], [picture])
    return extended(batch, ids) if ids else batch


def picture_of(shapes, image_id):
    return load_image(shapes / "val2017" / f"{int(image_id):012d}.jpg")


def items(tmp_path, experiment, name, run_name=None):
    found = rundirs.read_run(rundirs.run_path(tmp_path, name, experiment, run_name), experiment)
    assert found.ids() and not list((found.path / "failures").glob("*.json"))
    return {id: (found.record(id), found.arrays(id)) for id in found.ids()}


# --- whole prompts --------------------------------------------------------------------------------


def coco_flags(shapes, *more):
    where = (
        "--image_dir",
        shapes / "val2017",
        "--ann_file",
        shapes / "annotations" / "captions_val2017.json",
    )
    return (
        *where,
        "--max_images",
        3,
        "--batch_size",
        3,
        "--max_new_tokens",
        2,
        "--probe_hidden_norms",
        *more,
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", TRAITS)
def test_shares_and_norms_are_of_the_tokens_that_show_the_picture(
    run, models, shapes, tmp_path, name
):
    """The third picture has another shape: its row has more or fewer vision tokens than the other
    two."""
    good(run("coco", name, *coco_flags(shapes)))
    (path,) = tmp_path.glob(f"{name}__sp-?")
    found, vlm = rundirs.read_run(path, rundirs.COCO), models(name)[1]
    assert len(found.ids()) == 3
    for id in found.ids():
        record, arrays = found.record(id), found.arrays(id)
        batch = one(vlm, picture_of(shapes, id))
        tokens = torch.cat(vlm.vision(batch).pooler_output).float()
        assert sum(end - start for start, end in record["spans"]["vision"]) == len(tokens)
        assert arrays["hidden_norms_vision"][0] == pytest.approx(
            tokens.norm(dim=-1).mean().item(), rel=1e-3
        )
        assert np.allclose(arrays["group_mass"].sum(0), 1, atol=1e-5)
        with capture(vlm, [probe := ImageAttention(batch, 1, whole=True)]):
            prefill(vlm, batch)
        assert np.allclose(arrays["alphaV"], probe.layers[0][:, 0].sum(-1), atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", TRAITS)
def test_the_lens_ends_in_the_models_own_answer_and_knows_every_box(
    run, models, shapes, tmp_path, name
):
    good(
        run(
            "lens",
            name,
            "--image_folder",
            shapes / "val2017",
            "--save_folder",
            tmp_path / "pages",
            "--num_images",
            5,
            "--batch_size",
            5,
        )
    )  # the fifth has another shape
    vlm = models(name)[1]
    for id, (record, arrays) in items(tmp_path, "logit_lens", name).items():
        batch = one(vlm, picture_of(shapes, id))
        best = prefill(vlm, batch).logits[0, -1].float().softmax(-1).max(-1)
        assert arrays["ids"][-1, -1, 0] == best.indices and arrays["probs"][
            -1, -1, 0
        ] == pytest.approx(best.values.item(), abs=1e-4)
        assert (record["grid"] is None) == (name == "mplug_owl2")
        if record["grid"]:
            assert len(arrays["boxes"]) == record["groups"].count("vision") and np.nanmax(
                arrays["boxes"]
            ) >= 0.9 * min(record["grid"]["size"])
        assert (tmp_path / "pages" / f"{name}_{id}_logit_lens.html").stat().st_size > 10_000


@torch.inference_mode()
@pytest.mark.parametrize("name", TRAITS)
def test_swap_states_of_shared_prompts_are_those_of_a_prompt_alone(
    run, models, shapes, tmp_path, name
):
    table = (
        "--data_path",
        shapes / "swap_pairs_ready.tsv",
        "--max_samples_per_category",
        1,
        "--batch_size",
        3,
        "--max_new_tokens",
        2,
    )
    where = (
        "--out_root",
        tmp_path,
        "--output_dir",
        tmp_path / "results",
        "--no_self_check",
        "--state_dtype",
        "float32",
    )
    good(
        script["swap"](
            "--model_type",
            name,
            "--scales",
            f"one={models(name)[0]}",
            *table,
            *where,
            "--stage",
            "pairs",
            "states",
        )
    )
    folder, vlm = tmp_path / "swap_analysis" / f"{name}_one", models(name)[1]
    states = np.load(folder / "states.npy")
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    layers = range(len(vlm.parts.layers))
    for row in (0, len(pairs) - 1):
        for way, question in enumerate(pairs[row]["questions"]):
            with capture(vlm, [probe := LastStates(layers)]):
                prefill(
                    vlm,
                    one(
                        vlm,
                        picture_at(shapes / "swap_pairs_ready.tsv", pairs[row]["offset"]),
                        question,
                    ),
                )
            assert np.allclose(
                states[row, way], probe.states[0], atol=1e-3 * np.abs(states[row]).max()
            )
        assert np.abs(states[row, 0] - states[row, 1]).max() > 1e-2 * np.abs(states[row]).max(), (
            "the two questions differ"
        )


@torch.inference_mode()
@pytest.mark.parametrize("name", ["idefics3", "paligemma", "qwen3_vl", "mplug_owl2"])
def test_attention_of_an_answer_is_that_of_its_own_steps(run, models, shapes, tmp_path, name):
    flags = (
        "--input",
        shapes / "mmhal_shapes.json",
        "--output-dir",
        tmp_path / "out",
        "--log",
        "",
        "--max_iterations",
        1,
        "--max_new_tokens",
        3,
    )
    more = ("--instance-idx", "0,4", "--batch_size", 2, "--output-visualization-tensors")
    done = run("volcano", name, *flags, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    vlm, found = models(name)[1], items(tmp_path, "volcano", name, "tensors")
    for record, arrays in found.values():
        stage = record["stages"]["initial"]
        batch = one(vlm, picture_of(shapes, record["image_id"]), record["question"])
        with capture(vlm, [probe := ImageAttention(batch, 3)]):
            assert generate(vlm, batch, 3).ids[0] == stage["ids"]
        for step in range(len(stage["ids"])):
            assert np.allclose(arrays["initial_mean"][step], probe.mean[step][0], atol=1e-5)
            assert np.allclose(arrays["initial_max"][step], probe.largest[step][0], atol=1e-5)
    if name not in ("idefics3", "mplug_owl2"):
        return
    done = script["heatmap"](
        "--input-dir", tmp_path / "out", "--output-dir", tmp_path / "out", "--instance-idx", 4
    )
    if name == "mplug_owl2":
        assert done.returncode == 2 and "is unknown, so no map" in done.stderr
    else:
        assert (
            done.returncode in (0, None)
            and Image.open(tmp_path / "out" / "image_heatmap_4_all.png").width > 500
        ), done.stderr


# --- measures that want a place in the picture ----------------------------------------------------


@pytest.mark.parametrize("name", PLACED)
def test_shuffles_reach_every_place_where_the_decoder_gets_the_picture(
    run, models, shapes, tmp_path, name, monkeypatch
):
    seen, vlm = [], models(name)[1]

    def kept(own, batch, *args, features, **options):
        deep = features.deepstack_features if own.family.deepstack else []
        seen.append(
            [[part.clone() for part in tokens] for tokens in (features.pooler_output, *deep)]
        )
        return generate(own, batch, *args, features=features, **options)

    monkeypatch.setattr(shuffled_answers, "generate", kept)
    good(
        run(
            "psi",
            name,
            "--questions",
            shapes / "questions.json",
            "--max_questions",
            2,
            "--num_permutations",
            1,
            "--max_new_tokens",
            2,
            "--batch_size",
            2,
        )
    )
    assert len(seen) == 2 and len(seen[0]) == (3 if name == "qwen3_vl" else 1)
    questions = json.loads((shapes / "questions.json").read_text())[:2]
    for row, id in enumerate(sorted(items(tmp_path, "psi", name))):
        grid = one(vlm, picture_of(shapes, questions[row]["image_id"])).grids[0]
        order = position_sensitivity.shuffled(grid, 0, id, 0)
        assert (order != np.arange(len(order))).sum() > 0.8 * grid.has_box.sum()
        for before, after in zip(*seen, strict=True):
            assert torch.equal(after[row], before[row][order])


def test_a_measure_of_places_says_that_there_are_none(run, shapes, tmp_path):
    questions = ("--coco_root", shapes, "--clean_questions_file", shapes / "clean_questions.json")
    zeros = ("--replacement", "zeros")  # the mean vector is looked for before the model
    for name, flags in {
        "psi": ("--questions", shapes / "questions.json"),
        "knockout": questions,
        "vqa": (*questions, *zeros),
        "ablation": ("--coco_root", shapes, *zeros),
        "overlay": ("--image", shapes / "val2017" / "000000000005.jpg", "--token_position", 0),
    }.items():
        refused(run(name, "mplug_owl2", *flags), tmp_path, "needs grid", "mplug_owl2")


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["internvl-qwen2", "idefics3", "nvila-lite", "paligemma", "aya-vision", "qwen3_vl"]
)
def test_ablated_tokens_are_gone_as_in_a_plain_pass(
    run, models, shapes, tmp_path, name, monkeypatch
):
    monkeypatch.setattr(ablation, "mentions", lambda *_: True)  # a random model names nothing
    flags = (
        "--replacement",
        "zeros",
        "--sizes",
        3,
        "--draws",
        1,
        "--gradient_steps",
        2,
        "--max_new_tokens",
        2,
        "--no_noise_filter",
        "--max_images",
        2,
    )
    good(run("ablation", name, "--coco_root", shapes, *flags))
    vlm = models(name)[1]
    for record, arrays in items(tmp_path, "ablation", name).values():
        what = record["category"]
        question = f"Is there {ablation.article(what)} in this image?"
        batch = one(vlm, picture_of(shapes, record["image_id"]), question)
        positions = batch.vision_positions(0)
        assert record["vision_tokens"] == len(positions) == record["conditions"]["all"]["tokens"]
        yes = answer_ids(vlm, batch.prompts[0], "Yes")[0]
        seen = []
        for condition in ("none", "patch_0", "random_3", "all"):
            features = vlm.vision(batch)
            for tokens in entries(vlm, features):
                tokens[0][arrays[f"tokens_{condition}"] if condition != "none" else []] = 0
            seen.append(
                prefill(vlm, batch, features).logits[0, -1].float().log_softmax(-1)[yes].item()
            )
            assert record["conditions"][condition]["polling"]["logprob_yes"] == pytest.approx(
                seen[-1], abs=2e-4
            ), condition
        assert abs(seen[0] - seen[-1]) > 4e-3, "without the picture the answer differs"


@torch.inference_mode()
@pytest.mark.parametrize("name", PLACED)
def test_a_knockout_is_the_blocked_pass_over_the_whole_prompt(
    run, models, shapes, tmp_path, name, monkeypatch
):
    monkeypatch.setattr(ablation, "prefix_published", lambda *_: True)
    pairs = ["object:last_token", "image:last_token", "image-last_row:last_row"]
    questions = ("--coco_root", shapes, "--clean_questions_file", shapes / "clean_questions.json")
    good(
        run(
            "knockout",
            name,
            *questions,
            "--paper_compat",
            "--max_images",
            2,
            "--pairs",
            *pairs,
            "--windows",
            "0-1",
            "all",
        )
    )
    vlm, moved = models(name)[1], 0.0
    for record, arrays in items(tmp_path, "knockout", name).values():
        picture, question = picture_of(shapes, record["image_id"]), record["question"]
        plain = one(vlm, picture, question)
        batch = one(vlm, picture, question, answer_ids(vlm, plain.prompts[0], ablation.START)[:-1])
        batch.groups[0, plain.groups.shape[1] :] = GROUPS.index("template")
        name_id = answer_ids(vlm, f"{plain.prompts[0]} {ablation.START}", record["answer"])[0]
        vision = batch.vision_positions(0).numpy()
        assert np.isin(arrays["positions_object"], vision).all() and np.array_equal(
            arrays["positions_image"], vision
        )
        for pair in pairs:
            source, target = (arrays[f"positions_{part}"] for part in pair.split(":"))
            rows = torch.zeros(2, 1, batch.groups.shape[1], dtype=torch.bool)
            rows[0, 0, target], rows[1, 0, source] = True, True
            with edit(vlm, blocks=[Block(rows[0], rows[1], frozenset({0, 1}))]):
                first = generate(vlm, batch, 1).first[0]
            assert record["conditions"][f"{pair}:0-1"]["vqa"][
                "logprob_first_token"
            ] == pytest.approx(first[name_id].item(), abs=2e-4), pair
        results = {
            key: part["vqa"]["logprob_first_token"] for key, part in record["conditions"].items()
        }
        moved = max(moved, abs(results["image:last_token:all"] - results["none"]))
    assert moved > 4e-3, "a cut changes the answer"


@pytest.mark.parametrize("name", ["internvl-qwen2", "nvila-lite", "mplug_owl2"])
def test_the_mean_vector_is_the_mean_of_all_vision_tokens(run, models, shapes, tmp_path, name):
    good(run("acts", name, "--image_dir", shapes / "val2017"))
    assert script["mean"](tmp_path / "mean_vector" / name).returncode == 0
    vlm, pictures = (
        models(name)[1],
        [load_image(file) for file in sorted((shapes / "val2017").iterdir())],
    )
    with torch.inference_mode():
        tokens = torch.cat(
            [torch.cat(vlm.vision(one(vlm, picture)).pooler_output) for picture in pictures]
        )
    mean = torch.load(tmp_path / "mean_vector" / name / "mean_vector.pt", weights_only=True)
    assert torch.allclose(mean, tokens.float().mean(0), atol=1e-4 * tokens.abs().max())
    told = script["size"](
        "--model_path",
        models(name)[0],
        "--image_dir",
        shapes / "val2017",
        "--sample_size",
        len(pictures),
    )
    assert (
        told.returncode == 0
        and f"mean {len(tokens) / len(pictures):.1f}" in told.stdout
        or name == "mplug_owl2"
        and "7; d =" in told.stdout
    ), told.stdout


def test_an_overlay_of_tiles_lies_on_the_picture(run, models, shapes, tmp_path):
    """Tiles and thumbnail each cover the whole picture, so a map of ones is one everywhere and
    attention adds up to its share."""
    picture = shapes / "val2017" / "000000000005.jpg"
    good(
        run(
            "overlay",
            "internvl-qwen2",
            "--image",
            picture,
            "--token_position",
            0,
            "--max_new_tokens",
            2,
            "--out_dir",
            tmp_path,
        )
    )
    found, facts = (tmp_path / f"attention_internvl-qwen2.{kind}" for kind in ("npz", "json"))
    with np.load(found) as arrays:
        grid = one(models("internvl-qwen2")[1], load_image(picture)).grids[0]
        assert (
            grid.shape is None
            and np.allclose(arrays["boxes"], grid.boxes)
            and len(arrays["map"]) == len(grid.boxes)
        )
        assert (
            np.nanmin(grid.paint(np.ones(len(grid.boxes)))) == 1
            and not np.isnan(grid.paint(arrays["map"])).any()
        )
        facts = json.loads(facts.read_text())
        assert (
            facts["share_on_padding"] < 1e-6
            and 0 < facts["sum"] < 1
            and facts["sum"] == pytest.approx(arrays["map"].sum())
        )


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_what_the_model_tells(models, shapes):
    from vlmdiag.stethoscope import views
    from vlmdiag.stethoscope.analysis import Analysis, Decoding, Model
    from vlmdiag.stethoscope.export import Shown, summary
    from vlmdiag.stethoscope.figures import draw_patches

    def asked(name):
        analysis = Analysis(
            Model(models(name)[1]),
            picture_of(shapes, 5),
            "Describe the image.",
            Decoding(max_new_tokens=3),
        )
        for _ in analysis.answer():
            pass
        return analysis

    tiles = asked("internvl-qwen2")
    view = views.canvas(tiles, len(tiles.vision))
    area = (view.grid.boxes[:, 2:] - view.grid.boxes[:, :2]).prod(-1)
    chosen = {view.cell(x, y) for x in (0.1, 0.5, 0.9) for y in (0.1, 0.5, 0.9)}
    assert area.max() > 3 * area.min() and len(chosen) == 9
    assert np.allclose(area[list(chosen)], area.min()), (
        "a click takes the tile's cell, not the thumbnail's"
    )
    assert tiles.missing() == [] and np.isfinite(tiles.relevancy().picture).all()
    deep = asked("qwen3_vl")
    assert "stops at the vision tokens" in deep.missing()[0] and deep.evolution().chosen[
        :, -1
    ] == pytest.approx(deep.probabilities, abs=1e-4)
    assert deep.relevancy().picture.max() > 0
    queries = asked("mplug_owl2")
    queries.patches = {30}  # of the tower's 36 patches; the picture is 7 tokens
    assert (
        views.selected(queries, "relevancy") == [30] and views.selected(queries, "attention") == []
    )
    assert (
        summary(queries, Shown(pat_source="attention"))["patches"]["looked_at"] is None
        and draw_patches(queries, Shown(pat_source="attention")) is None
    )
    assert len(summary(queries, Shown(pat_source="relevancy"))["patches"]["looked_at"]) == len(
        queries.ids
    )

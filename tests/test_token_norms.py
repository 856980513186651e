"""vlm_token_norms.py by its real command line, on three pictures with captions and small random
models of every layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from diagnostic_tools.vlm_token_norms import read_captions
from tests.building import build_llava, build_qwen
from tests.test_llava_original import (
    sources,  # noqa: F401 -- a fixture
    to_original,
    write_tower,
)
from tests.test_reading_scripts import script
from vlmdiag.beyond_semantics import token_norm_figure, token_norms
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.model import configs
from vlmdiag.pictures.samples import Sample, load_image

TOOL = Path(__file__).resolve().parents[1] / "diagnostic_tools" / "vlm_token_norms.py"
CAPTIONS = {
    139: ["A red circle.", "A blue square and a red circle"],
    285: ["A green triangle on the floor"],
    632: ["Nothing", "No objects", "A picture"],
}


SHARDS = [f"{i:05d}-of-00003" for i in (1, 2, 3)]


def connector_in(folder, index):
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return any(
        "mm_projector" in name and file == f"model-{index}.safetensors"
        for name, file in weights.items()
    )


@pytest.fixture(scope="module")
def coco(tmp_path_factory, pictures):
    """A folder like COCO's: three pictures of different shapes, six captions, one of them of a
    picture that is not listed."""
    root = tmp_path_factory.mktemp("coco")
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    for id, picture in zip(CAPTIONS, pictures, strict=True):
        picture.save(root / "val2017" / f"{id:012d}.png")
    content = {
        "images": [{"id": id, "file_name": f"{id:012d}.png"} for id in CAPTIONS],
        "annotations": [
            {"image_id": id, "caption": text}
            for id, texts in ({7: ["of no picture here"]} | CAPTIONS).items()
            for text in texts
        ],
    }
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory, sources):  # noqa: F811
    """{name: folder}: transformers' layout, two families; the authors' layout with sharded
    safetensors and .bin files, the latter with its tower beside it."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_tower(sources["base"], root / "tiny-tower")
    return {
        "llava": build_llava(root / "llava"),
        "qwen": build_qwen(root / "qwen"),
        "multilayerNorm": to_original(sources["multilayerNorm"], root / "multilayerNorm", shards=3),
        "bin": to_original(sources["base"], root / "bin", kind="bin", shards=2, tower=False),
        "tower": root / "tiny-tower",
    }


def run(*arguments, cwd, code=0):
    command = [sys.executable, "-W", "error", str(TOOL), *(str(part) for part in arguments)]
    environment = os.environ | {
        "PYTHONPATH": str(TOOL.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code != 2 else done.stderr


def in_process(*arguments):
    """The script's main in this process: (exit code, module)."""
    module = script("vlm_token_norms")
    return module.main([str(part) for part in arguments]), module


def of_one(module, arguments):
    """The arguments as the script hands them to the measuring of its one model."""
    args = module.parse_args(arguments)
    (args.model_path,) = args.model_path
    return args


@torch.no_grad()
def slow(folder, coco, tower=None):
    """The definition, one picture and one caption at a time, on the whole model."""
    vlm = common.load_model(folder, vision_tower_path=tower, self_check=False)
    images, texts = [], []
    for id, captions in CAPTIONS.items():
        batch = vlm.encode(
            [Sample("0", None, "?")], [load_image(coco / "val2017" / f"{id:012d}.png")]
        )
        inputs = {
            key: value
            for key, value in batch.image_inputs.items()
            if key in ("pixel_values", "image_grid_thw")
        }
        pooled = vlm.model.get_image_features(**inputs, return_dict=True).pooler_output
        images += [row.norm().item() for row in torch.cat(list(pooled)).flatten(0, -2)]
        for caption in captions:
            ids = ([1] if vlm.family.name != "qwen2_5_vl" else []) + vlm.tokenizer(
                caption, add_special_tokens=False
            )["input_ids"]
            texts += [vlm.model.get_input_embeddings()(torch.tensor(i)).norm().item() for i in ids]
    return np.array(texts), np.array(images)


def test_the_documented_command_measures_what_the_definition_says(models, coco, tmp_path):
    """As in the user's document, on the CPU: two weight shards in .bin, the tower in a folder of
    its own."""
    out = run(
        "--model_path",
        models["bin"],
        "--vision_tower_path",
        models["tower"],
        "--coco_root",
        coco,
        "--device",
        "cpu",
        "--weights_type",
        "bin",
        "--max_images",
        20,
        "--save_vectors",
        "--out_dir",
        "outputs/token_norms",
        cwd=tmp_path,
    )
    folder = tmp_path / "outputs" / "token_norms"
    assert {file.name for file in folder.iterdir()} == {
        *(f"token_norms_comparison.{ending}" for ending in ("png", "pdf", "json")),
        "vectors.npz",
    }
    vectors, summary = (
        np.load(folder / "vectors.npz"),
        json.loads((folder / "token_norms_comparison.json").read_text()),
    )
    text, vision = slow(models["bin"], coco, str(models["tower"]))
    assert vectors["txt"].dtype == vectors["img"].dtype == np.float64
    np.testing.assert_allclose(vectors["img"], vision, rtol=1e-5)
    np.testing.assert_allclose(vectors["txt"], text, rtol=1e-6)
    assert summary["decoder_left_out"] is True
    assert summary["vision"]["tokens"] == 3 * 144 == len(vision) and summary["text"][
        "tokens"
    ] == len(text)
    assert summary["text"]["median"] == pytest.approx(np.median(text)) and summary["vision"][
        "max"
    ] == pytest.approx(vision.max())
    assert (
        summary["vision"]["mean_over_images"] == pytest.approx(vision.mean())
        and summary["vision"]["low"] < vision.mean() < summary["vision"]["high"]
    )
    assert [
        line.split()[:2] for line in out.splitlines() if line.split()[0] in ("text", "vision")
    ] == [["text", str(len(text))], ["vision", "432"]]
    assert (
        Image.open(folder / "token_norms_comparison.png").text["settings"].count("tiny-tower") == 1
    )


@pytest.mark.parametrize("name", ["llava", "qwen", "multilayerNorm"])
def test_every_layout_agrees_with_the_whole_model(
    models, coco, tmp_path, name, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tower = str(models["tower"]) if name == "multilayerNorm" else None
    more = (
        [
            "--vision-tower-path",
            tower,
            "--safetensors-index",
            next(i for i in SHARDS if connector_in(models[name], i)),
        ]
        if tower
        else []
    )
    names = ["--save-vectors", "--vectors-file", "v.npz", "--output-prefix", "p", "--out-dir", "."]
    code, _ = in_process("--model-path", models[name], "--coco-root", coco, *names, *more)
    vectors, (text, vision) = np.load("v.npz"), slow(models[name], coco, tower)
    assert code == 0 and json.loads(Path("p.json").read_text())["decoder_left_out"]
    np.testing.assert_allclose(vectors["img"], vision, rtol=2e-5)
    np.testing.assert_allclose(vectors["txt"], text, rtol=1e-6)
    if name == "multilayerNorm":  # clipped: at most max_norm * scale
        assert vision.max() == pytest.approx(1.7 * 0.6, rel=1e-4)


def test_the_decoder_is_neither_built_nor_read(models, coco, monkeypatch):
    module = script("vlm_token_norms")
    for name in ("llava", "qwen", "multilayerNorm", "bin"):
        args = of_one(
            module,
            [
                "--model_path",
                str(models[name]),
                "--coco_root",
                str(coco),
                "--vision_tower_path",
                str(models["tower"]),
            ],
        )
        vlm = module.load_without_decoder(args, module.check_weights(args))
        assert vlm is not None and len(vlm.parts.layers) == 0
        assert not any(
            ".layers." in key and "vision" not in key and "visual" not in key
            for key in vlm.model.state_dict()
        )


def test_a_type_whose_decoder_has_no_known_name_is_loaded_whole(models, coco, monkeypatch, capsys):
    module = script("vlm_token_norms")

    def shorten(config, layers):
        raise UsageError("its decoder has no known name")

    monkeypatch.setattr(configs, "shorten_decoder", shorten)
    args = of_one(module, ["--model_path", str(models["llava"]), "--coco_root", str(coco)])
    assert module.load_without_decoder(args, None) is None
    assert len(module.load_whole(args, None).parts.layers) > 0
    assert "all of it was loaded" in capsys.readouterr().out


def test_of_two_kinds_of_files_the_one_asked_for_is_read(models, coco, sources, tmp_path):  # noqa: F811
    folder = to_original(sources["base"], tmp_path / "both")
    broken = {
        name: value * 2
        for name, value in torch.load(models["bin"] / "pytorch_model-00001-of-00002.bin").items()
    }
    broken |= {
        name: value * 2
        for name, value in torch.load(models["bin"] / "pytorch_model-00002-of-00002.bin").items()
    }
    torch.save(broken, folder / "pytorch_model.bin")
    module, sums = script("vlm_token_norms"), {}
    for kind in ("bin", "safetensors"):
        args = of_one(
            module,
            [
                "--model_path",
                str(folder),
                "--coco_root",
                str(coco),
                "--weights_type",
                kind,
                "--vision_tower_path",
                str(models["tower"]),
            ],
        )
        vlm = module.load_without_decoder(args, module.check_weights(args))
        sums[kind] = vlm.model.get_input_embeddings().weight.norm().item()
    assert sums["bin"] == pytest.approx(2 * sums["safetensors"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--weights_type", "safetensors"],
            "has no .safetensors file; use --weights_type bin, or leave it out",
        ),
        (
            ["--safetensors_index", "00001-of-00003"],
            "no model-00001-of-00003.safetensors in .*, which has no safetensors file",
        ),
        (
            ["--safetensors_index", "00001-of-00003", "--weights_type", "bin"],
            "--safetensors_index is for --weights_type safetensors",
        ),
        (["--caption_file", "nowhere.json"], "nowhere.json: no such file"),
        (["--image_dir", "nowhere"], "nowhere: no such image folder"),
    ],
)
def test_wrong_usage_is_one_line(models, coco, flags, message):
    module = script("vlm_token_norms")
    with pytest.raises(module.UsageError, match=message):
        module.main(["--model_path", str(models["bin"]), "--coco_root", str(coco), *flags])


def test_the_shard_without_the_connector_is_refused_by_name(models, coco):
    module = script("vlm_token_norms")
    without = [index for index in SHARDS if not connector_in(models["multilayerNorm"], index)]
    assert 0 < len(without) < len(SHARDS)
    for index in without:
        args = of_one(
            module,
            [
                "--model_path",
                str(models["multilayerNorm"]),
                "--coco_root",
                str(coco),
                "--safetensors_index",
                index,
            ],
        )
        with pytest.raises(module.UsageError, match="does not hold the connector; use"):
            module.check_weights(args)


def test_a_missing_model_is_one_line_and_exit_code_2(coco, tmp_path):
    error = run("--model_path", "no/such/folder/at/all", "--coco_root", coco, cwd=tmp_path, code=2)
    assert error.startswith("error: 'no/such/folder/at/all': no such folder")


def test_an_unreadable_picture_is_named_and_the_others_are_measured(
    models, coco, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "pictures"
    damaged.mkdir()
    for file in (coco / "val2017").iterdir():
        (damaged / file.name).write_bytes(
            file.read_bytes() if "285" not in file.name else b"no picture"
        )
    code, _ = in_process(
        "--model_path", models["llava"], "--coco_root", coco, "--image_dir", damaged, "--scale", 3
    )
    assert code == 3 and "000000000285 failed: " in capsys.readouterr().out
    summary = json.loads(Path("outputs/token_norms/token_norms_comparison.json").read_text())
    assert (
        list(summary["failed"]) == ["000000000285"]
        and summary["vision"]["images"] == 2
        and summary["scale"] == 3
    )


def test_pictures_are_enlarged_only_when_asked(pictures):
    assert token_norms.enlarged(pictures[1], 1.0) is pictures[1]
    larger = token_norms.enlarged(pictures[1], 3.0)
    assert larger.size == (3 * pictures[1].width, 3 * pictures[1].height)


def test_violins_are_densities_of_log10_norms():
    peak = 1 / (0.2 * np.sqrt(2 * np.pi))
    broad = 10 ** np.random.default_rng(0).normal(1.5, 0.2, 20000)
    figure, axis = plots.plt.subplots()
    token_norm_figure.draw_violins(axis, [("text", broad), ("vision", broad[:5000] * 10)])
    outlines = [violin.get_paths()[0].vertices for violin in axis.collections]
    plots.plt.close(figure)

    at, density = upper_half(outlines[0], row=0)
    density = density / np.trapezoid(density, at)  # drawn as wide as the peak wants
    assert at[density.argmax()] == pytest.approx(1.5, abs=0.05)
    assert density.max() == pytest.approx(peak, rel=0.05)
    at, density = upper_half(outlines[1], row=1)
    assert at[density.argmax()] == pytest.approx(2.5, abs=0.08)
    assert density.max() == pytest.approx(token_norm_figure.HALF, abs=0.01)  # rows do not touch


def test_norms_that_are_one_value_are_a_line_and_not_a_bump():
    broad = 10 ** np.random.default_rng(0).normal(1.5, 0.2, 2000)
    equal = np.full(100, 1.0126)  # as after the clip
    for rows in ([("text", broad), ("vision", equal)], [("vision", equal), ("vision", equal)]):
        figure, axis = plots.plt.subplots()
        token_norm_figure.draw_violins(axis, rows)
        plots.plt.close(figure)
        spikes = [line for line in axis.lines if list(line.get_xdata()) == [1.0126, 1.0126]]
        places = [row for row, (_, norms) in enumerate(rows) if norms is equal]
        assert [list(line.get_ydata()) for line in spikes] == [
            [row - token_norm_figure.HALF, row + token_norm_figure.HALF] for row in places
        ]
        assert len(axis.collections) == len(rows) - len(places)


def test_several_models_share_one_axis_in_the_order_of_the_arguments():
    norms = {"text": np.array([1.0, 1.2, 1.5, 2.0]), "vision": np.array([9.0, 10.0, 14.0, 20.0])}
    numbers = {"mean": 3.0, "tokens": 4, "images": 2, "mean_over_images": 3.0}
    summary = {group: numbers | {"low": 2.5, "high": 3.5} for group in norms}
    figure = token_norm_figure.draw({name: (norms, summary) for name in ("first", "second")})
    (axis,) = figure.axes
    plots.plt.close(figure)
    labels = [label.get_text().split(",")[0] for label in axis.get_yticklabels()][::-1]
    assert labels == [
        f"{model}\n{group} tokens" for model in ("first", "second") for group in ("vision", "text")
    ]


@torch.no_grad()
def changed_copy(folder, copy, part):
    """A checkpoint with other weights in some part of the model."""
    vlm = common.load_model(folder, self_check=False)
    for name, parameter in vlm.model.named_parameters():
        if part in name:
            parameter *= 1.5
    vlm.model.save_pretrained(copy)
    vlm.processor.save_pretrained(copy)
    return copy


def test_models_in_a_row_with_equal_towers_run_it_once_and_have_the_same_files(
    models, coco, tmp_path, monkeypatch
):
    first = models["llava"]
    paths = [
        first,
        changed_copy(first, tmp_path / "connector", "multi_modal_projector"),
        changed_copy(first, tmp_path / "tower", "vision_tower"),
        models["qwen"],
        changed_copy(models["qwen"], tmp_path / "decoder", "language_model"),
    ]
    passes, measure = [], token_norms.measure

    def counting(vlms, *args):
        inner = [next(vlm.parts.tower.children()) for vlm in vlms]  # runs whenever its tower does
        hooks = [part.register_forward_hook(lambda *_: passes.append(1)) for part in inner]
        before = len(passes)
        found = measure(vlms, *args)
        runs.append((len(vlms), len(passes) - before))
        for hook in hooks:
            hook.remove()
        return found

    runs = []
    monkeypatch.setattr(token_norms, "measure", counting)
    common_flags = ["--coco_root", coco, "--save_vectors", "--batch_size", 2]
    for path in paths:
        in_process("--model_path", path, *common_flags, "--out_dir", tmp_path / "alone" / path.name)
    assert runs == [(1, 2)] * 5, "three pictures in batches of two"
    runs.clear()
    several = [flag for path in paths for flag in ("--model_path", path)]
    assert in_process(*several, *common_flags, "--out_dir", tmp_path / "all")[0] == 0
    assert runs == [(2, 2), (1, 2), (2, 2)]
    for path in paths:
        files = [tmp_path / group / path.name for group in ("alone", "all")]
        for name in ("vectors.npz", "token_norms_comparison.json"):
            one, other = (folder / name for folder in files)
            assert one.read_bytes() == other.read_bytes()


def upper_half(outline, row):
    """(log10 norm, height over the middle of the row) of a violin's outline."""
    upper = outline[outline[:, 1] >= row]
    order = upper[:, 0].argsort()
    return np.log10(upper[order, 0]), upper[order, 1] - row


@pytest.mark.fast
def test_a_scale_that_would_take_the_memory_fails_the_picture(tmp_path):
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    for scale, size in ((11, (4400, 3300)), (12, None)):
        found = token_norms.open_picture(Sample("a", tmp_path / "a.png", ""), scale)
        if size is None:
            assert isinstance(found, ValueError) and "more than 16 million" in str(found)
        else:
            assert found.size == size


@pytest.mark.fast
@pytest.mark.parametrize("id", [139, "139", "000000000139", 139.0])
def test_captions_find_their_picture_however_its_id_is_written(tmp_path, id):
    others = [{"image_id": odd, "caption": "no"} for odd in ([1], {}, None, 5)]
    content = {"annotations": [*others, {"image_id": id, "caption": "yes"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    sample = Sample("000000000139", tmp_path / "a.png", "", extra={"image_id": 139})
    assert read_captions(str(tmp_path / "c.json"), [sample]) == {sample.id: ["yes"]}

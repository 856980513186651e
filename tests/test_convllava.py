"""ConvLLaVA against a forward pass written out from the published files' keys, and what its loader
takes, finds and refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from tests.random_models.convllava import SIDE, TEXT, TOWER, build
from vlmdiag import families as models
from vlmdiag.cli import UsageError
from vlmdiag.families import convllava
from vlmdiag.model import configs
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes import tiny_llava as tiny

QUESTION = "Is there a red circle in the image?"


@pytest.fixture(scope="module", autouse=True)
def listed():
    with pytest.MonkeyPatch.context() as patch:
        if "convllava" not in models.FAMILIES:
            patch.setattr(models, "FAMILIES", ("convllava", *models.FAMILIES))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("convllava") / "model")


@pytest.fixture(scope="module")
def vlm(folder):
    return common.load_model(folder)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    ).resize((300, 180))


def changed(folder, to, **keys):
    """A copy of a checkpoint with other keys in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | keys))
    return to


# --- the plain forward: dictionaries of weights, loops over heads and taps ------------------------


def layer_norm(x, w, name, eps=1e-6):
    """Over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def strided(x, w, name, size):
    """A convolution whose stride is its size: (rows, columns, c) -> (rows / size, columns / size,
    d)."""
    rows, columns, _ = x.shape
    blocks = (
        x.reshape(rows // size, size, columns // size, size, -1).permute(0, 2, 4, 1, 3).flatten(2)
    )
    return blocks @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def depthwise(x, w, name):
    """7 x 7 around each place, every channel alone. x (rows, columns, c)."""
    kernel = w[f"{name}.weight"][:, 0]
    rows, columns, _ = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 3, 3, 3, 3))
    taps = [
        padded[i : i + rows, j : j + columns] * kernel[:, i, j] for i in range(7) for j in range(7)
    ]
    return sum(taps) + w[f"{name}.bias"]


def plain_tower(w, pixels, depths, eps=1e-6):
    """(3, S, S) -> (rows, columns, d) of the last stage."""
    x = layer_norm(
        strided(pixels.permute(1, 2, 0), w, "embeddings.patch_embeddings", 4),
        w,
        "embeddings.layernorm",
    )
    for stage, depth in enumerate(depths):
        if stage:
            down = f"encoder.stages.{stage}.downsampling_layer"
            x = strided(layer_norm(x, w, f"{down}.0", eps), w, f"{down}.1", 2)
        for block in range(depth):
            name = f"encoder.stages.{stage}.layers.{block}"
            y = layer_norm(depthwise(x, w, f"{name}.dwconv"), w, f"{name}.layernorm", eps)
            x = x + w[f"{name}.layer_scale_parameter"] * linear(
                gelu(linear(y, w, f"{name}.pwconv1")), w, f"{name}.pwconv2"
            )
    return x


def plain_features(main, tower, pixels, depths=TOWER["depths"], row_major=True, normed=False):
    cells = plain_tower(tower, pixels, depths)
    cells = (cells if row_major else cells.transpose(0, 1)).flatten(0, 1)
    if normed:
        cells = (cells - cells.mean(-1, keepdim=True)) / cells.std(-1, correction=0, keepdim=True)
    return linear(gelu(linear(cells, main, "model.mm_projector.0")), main, "model.mm_projector.2")


def rms_norm(x, gain, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def turned(x, theta=10000.0):
    """Rotary positions 0, 1, 2, ... of one head (T, D), halves split."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    a = x[:, :half]
    b = x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def causal_attention(q, k, v, heads):
    """(T, d) each -> (T, d): one head after the other, every row over itself and what is before
    it."""
    out = []
    for q_h, k_h, v_h in zip(
        q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True
    ):
        scores = turned(q_h) @ turned(k_h).T / q_h.shape[-1] ** 0.5
        out.append(
            scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf")).softmax(-1) @ v_h
        )
    return torch.cat(out, -1)


def plain_llama(w, x, layers, heads, eps):
    """Embeddings (T, d) -> logits (T, V), by the keys of a Llama checkpoint."""
    for layer in range(layers):
        name = f"model.layers.{layer}"
        y = rms_norm(x, w[f"{name}.input_layernorm.weight"], eps)
        q, k, v = (linear(y, w, f"{name}.self_attn.{letter}_proj") for letter in "qkv")
        x = x + linear(causal_attention(q, k, v, heads), w, f"{name}.self_attn.o_proj")
        y = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        gate = linear(y, w, f"{name}.mlp.gate_proj")
        x = x + linear(
            gate * gate.sigmoid() * linear(y, w, f"{name}.mlp.up_proj"), w, f"{name}.mlp.down_proj"
        )
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def put_in(table, ids, features, image_id):
    """Embeddings of a prompt (T, d): rows of the table, and the features in order where the picture
    is."""
    rows = iter(features)
    return torch.stack(
        [next(rows) if token == image_id else table[token] for token in ids.tolist()]
    )


def test_features_and_logits_are_those_of_the_plain_forward(folder, vlm, picture):
    main = load_file(folder / "model.safetensors")
    tower = torch.load(folder / "vision_tower" / "pytorch_model.bin", weights_only=True)
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    pixels = batch.image_inputs["pixel_values"][0]
    with torch.no_grad():
        computed = vlm.vision(batch).pooler_output[0]
        logits = prefill(vlm, batch).logits[0, -1]
    features = plain_features(main, tower, pixels)
    embeds = put_in(
        main["model.embed_tokens.weight"], batch.input_ids[0], features, vlm.image_token_id
    )
    wanted = plain_llama(
        main, embeds, TEXT["num_hidden_layers"], TEXT["num_attention_heads"], TEXT["rms_norm_eps"]
    )[-1]
    assert computed.shape == ((SIDE // 64) ** 2, 64)
    assert torch.allclose(computed, features, atol=1e-4)
    assert torch.allclose(logits, wanted, atol=1e-4)
    assert logits.std() > 0.1 and features.std(0).mean() > 0.1
    for wrong in ({"row_major": False}, {"normed": True}, {"depths": [1, 1, 2, 1, 1]}):
        assert not torch.allclose(
            computed, plain_features(main, tower, pixels, **wrong), atol=1e-2
        ), wrong


def test_pixels_are_those_of_a_picture_padded_with_the_mean_colour(vlm, picture):
    square = Image.new("RGB", (300, 300), tuple(int(mean * 255) for mean in tiny.MEAN))
    square.paste(picture, (0, 60))
    wanted = (
        np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255 - tiny.MEAN
    ) / tiny.STD
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    np.testing.assert_allclose(
        batch.image_inputs["pixel_values"][0].permute(1, 2, 0).numpy(), wanted, atol=1e-5
    )
    grid = batch.grids[0]
    assert grid.shape == (12, 12)
    assert grid.boxes[0].tolist() == [0, -60, 25, -35]
    assert grid.boxes[-1].tolist() == [275, 215, 300, 240]


def test_select_layer_minus_two_leaves_out_the_last_block(folder, tmp_path, picture):
    vlm = common.load_model(
        changed(folder, tmp_path / "two", mm_vision_select_layer=-2), self_check=False
    )
    main = load_file(folder / "model.safetensors")
    tower = torch.load(folder / "vision_tower" / "pytorch_model.bin", weights_only=True)
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    with torch.no_grad():
        computed = vlm.vision(batch).pooler_output[0]
    wanted = plain_features(main, tower, batch.image_inputs["pixel_values"][0], [1, 1, 2, 1, 1])
    assert torch.allclose(computed, wanted, atol=1e-4)
    with pytest.raises(UsageError, match="mm_vision_select_layer = -3 is not known for ConvNeXt"):
        common.load_model(changed(folder, tmp_path / "three", mm_vision_select_layer=-3))


def test_the_configs_resolution_replaces_that_of_the_towers_preprocessing(
    folder, tmp_path, picture
):
    vlm = common.load_model(changed(folder, tmp_path / "model", mm_vision_resolution=320))
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    assert batch.image_inputs["pixel_values"].shape[-2:] == (320, 320)
    assert batch.grids[0].shape == (5, 5)
    assert len(batch.vision_positions(0)) == 25
    with pytest.raises(UsageError, match="330 x 330 pixels are not whole cells of 64 x 64"):
        common.load_model(changed(folder, tmp_path / "odd", mm_vision_resolution=330))


def test_a_tower_within_the_checkpoint_has_its_weights_from_there(folder, tmp_path, vlm, picture):
    copy = changed(folder, tmp_path / "model")
    tower = torch.load(copy / "vision_tower" / "pytorch_model.bin", weights_only=True)
    inside = {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
    save_file(load_file(copy / "model.safetensors") | inside, copy / "model.safetensors")
    torch.save(
        {name: value * 0 for name, value in tower.items()},
        copy / "vision_tower" / "pytorch_model.bin",
    )
    features = []
    for each in (vlm, common.load_model(copy, self_check=False)):
        with torch.no_grad():
            features.append(
                each.vision(each.encode([Sample("0", None, QUESTION)], [picture])).pooler_output[0]
            )
    assert torch.equal(*features)


def test_only_llava_configs_with_a_convnext_tower_are_taken(folder, tmp_path):
    named = {"model_type": "llava_llama", "mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-1536"}
    assert (
        models.find_family(named).name
        == models.find_family(named | {"model_type": "llava"}).name
        == "convllava"
    )
    assert (
        models.find_family(named | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}).name
        == "llava_original"
    )
    assert (
        models.find_family(named | {"mm_vision_tower": "my-convnext/clip"}).name == "llava_original"
    ), "a parent's name says nothing"
    assert (
        models.find_family(named | {"mm_vision_tower": str(folder / "vision_tower")}).name
        == "convllava"
    ), "by the config in that folder"
    assert (
        models.find_family(
            {"model_type": "llava", "vision_config": {"model_type": "convnext"}}
        ).name
        == "llava"
    )
    clip = tmp_path / "convnext-in-name-only"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    assert models.find_family(named | {"mm_vision_tower": str(clip)}).name == "llava_original"
    with pytest.raises(
        UsageError, match="a ConvNeXt vision tower was wanted, this is of type 'clip_vision_model'"
    ):
        common.load_model(folder, vision_tower_path=str(clip))


@pytest.mark.parametrize("where", ["flag", "path", "beside"])
def test_a_tower_in_a_folder_of_its_own_is_found(folder, tmp_path, where):
    tower = tmp_path / ("ConvLLaVA-ConvNeXt-tiny" if where == "beside" else "other")
    copy = changed(
        folder, tmp_path / "model", **({"mm_vision_tower": str(tower)} if where == "path" else {})
    )
    shutil.move(copy / "vision_tower", tower)
    assert (
        common.load_model(
            copy, vision_tower_path=str(tower) if where == "flag" else None, self_check=False
        ).family.name
        == "convllava"
    )


def test_the_tower_that_training_wrote_comes_before_the_one_that_it_began_with(folder, tmp_path):
    began = tmp_path / "began"
    copy = changed(folder, tmp_path / "model", mm_vision_tower=str(tmp_path / "began"))
    shutil.copytree(copy / "vision_tower", began)
    tower = torch.load(began / "pytorch_model.bin", weights_only=True)
    torch.save({name: value * 0 for name, value in tower.items()}, began / "pytorch_model.bin")
    taken = common.load_model(copy, self_check=False).model.model.vision_tower
    assert torch.equal(
        taken.embeddings.patch_embeddings.weight, tower["embeddings.patch_embeddings.weight"]
    )
    flagged = common.load_model(
        copy, self_check=False, vision_tower_path=str(began)
    ).model.model.vision_tower
    assert flagged.embeddings.patch_embeddings.weight.abs().max() == 0


def test_what_is_missing_is_said_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vlmdiag.families.files.snapshot_download",
        lambda name, **_: (_ for _ in ()).throw(OSError(f"no network for {name}")),
    )
    copy = changed(folder, tmp_path / "model")
    tower = torch.load(copy / "vision_tower" / "pytorch_model.bin", weights_only=True)
    for message, state in (
        (
            (
                "1 parameters are in no file, such as"
                " model.vision_tower.encoder.stages.4.layers.1.dwconv.bias"
            ),
            {k: v for k, v in tower.items() if k != "encoder.stages.4.layers.1.dwconv.bias"},
        ),
        (
            (
                "1 parameters have no place in this model, such as"
                " model.vision_tower.encoder.stages.5.bias"
            ),
            tower | {"encoder.stages.5.bias": torch.ones(1)},
        ),
    ):
        torch.save(state, copy / "vision_tower" / "pytorch_model.bin")
        with pytest.raises(UsageError, match=message):
            common.load_model(copy)
    shutil.rmtree(copy / "vision_tower")
    with pytest.raises(
        UsageError,
        match=(
            r"'ConvLLaVA/ConvLLaVA-ConvNeXt-tiny' was not found at .*vision_tower, .*the hub"
            r" \(OSError\); give --vision_tower_path"
        ),
    ):
        common.load_model(copy)


def test_a_decoder_without_layers_loads_for_scripts_that_need_only_its_inputs(folder, vlm, picture):
    config, family = configs.read_config(folder)
    config.text_config.num_hidden_layers = 0
    model, _ = convllava.load(str(folder), config, dtype=torch.float32)
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    with torch.no_grad():
        features = model.get_image_features(
            batch.image_inputs["pixel_values"], return_dict=True
        ).pooler_output[0]
        assert torch.equal(features, vlm.vision(batch).pooler_output[0])
    assert family.name == "convllava" and len(model.model.language_model.layers) == 0

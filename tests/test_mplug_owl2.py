"""mPLUG-Owl2 against a forward pass written out from the published files' keys; its prompt, its
modality, what its loader takes and refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from tests.random_models.mplug_owl2 import ABSTRACTOR, MODELS, TEXT, TOWER
from tests.test_convllava import layer_norm, linear, put_in, rms_norm, turned
from tests.test_minigpt4 import attention
from vlmdiag import families as models
from vlmdiag.cli import UsageError
from vlmdiag.families import mplug_owl2
from vlmdiag.model import configs
from vlmdiag.model.decoding import generate
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy.gradients import trace
from vlmdiag.scenes import tiny_llava as tiny

NAMES = list(MODELS)
QUERIES = ABSTRACTOR["num_learnable_queries"]
SIDE = TOWER["image_size"] // TOWER["patch_size"]


@pytest.fixture(scope="module", autouse=True)
def listed():
    with pytest.MonkeyPatch.context() as patch:
        if "mplug_owl2" not in models.FAMILIES:
            patch.setattr(models, "FAMILIES", ("mplug_owl2", *models.FAMILIES))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp(name) / "model") for name, build in MODELS.items()}


@pytest.fixture(scope="module")
def load(folders):
    """load(name) -> VLM, loaded with its self-check, once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = common.load_model(folders[name])
        return loaded[name]

    return get


# --- the plain forward ----------------------------------------------------------------------------


def plain_vit(w, pixels, by_head=True):
    """(3, S, S) -> (1 + patches, d) after the last norm. by_head: the fused matrix is (head, q k v,
    dimension), else (q k v, head, dimension)."""
    patch = TOWER["patch_size"]
    heads = TOWER["num_attention_heads"]
    eps = 1e-6
    name = "model.vision_model.embeddings"
    blocks = [
        pixels[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten()
        for i in range(SIDE)
        for j in range(SIDE)
    ]
    x = torch.cat(
        [
            w[f"{name}.cls_token"][0],
            torch.stack(blocks) @ w[f"{name}.patch_embed.weight"].flatten(1).T,
        ]
    )
    x = layer_norm(x + w[f"{name}.position_embedding"][0], w, f"{name}.pre_layernorm", eps)
    for layer in range(TOWER["num_hidden_layers"]):
        name = f"model.vision_model.encoder.layers.{layer}"
        fused = linear(
            layer_norm(x, w, f"{name}.input_layernorm", eps), w, f"{name}.self_attn.query_key_value"
        )
        width = fused.shape[1] // heads // 3

        def column(head, kind, width=width):
            return ((head * 3 + kind) if by_head else (kind * heads + head)) * width

        q, k, v = (
            torch.cat([fused[:, column(head, kind) :][:, :width] for head in range(heads)], 1)
            for kind in range(3)
        )
        x = x + linear(attention(q, k, v, heads), w, f"{name}.self_attn.dense")
        y = linear(layer_norm(x, w, f"{name}.post_attention_layernorm", eps), w, f"{name}.mlp.fc1")
        x = x + linear(y * (1.702 * y).sigmoid(), w, f"{name}.mlp.fc2")
    return layer_norm(x, w, "model.vision_model.post_layernorm", eps)


def wave(place, width):
    """Sines, then cosines, of a place."""
    angles = [place / 10000 ** (2 * i / width) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def plain_abstractor(w, patches, columns_first=True, normed=True, eos_last=True):
    """(1 + patches, d) -> (queries + 1, width of the decoder)."""
    width = ABSTRACTOR["hidden_size"]
    of_queries = torch.tensor([wave(place, width) for place in range(QUERIES)])
    cells = [
        wave(j if columns_first else i, width // 2) + wave(i if columns_first else j, width // 2)
        for i in range(SIDE)
        for j in range(SIDE)
    ]
    places = torch.cat([of_queries, torch.zeros(1, width), torch.tensor(cells)])
    x = w["model.visual_abstractor.query_embeds"][0]
    for layer in range(ABSTRACTOR["num_hidden_layers"]):
        name = f"model.visual_abstractor.encoder.layers.{layer}.crossattention"
        y = layer_norm(x, w, f"{name}.norm1", 1e-5)
        both = torch.cat([y, layer_norm(patches, w, f"{name}.normk", 1e-5)])
        q = linear(y + of_queries, w, f"{name}.attention.query")
        k = linear(both + places, w, f"{name}.attention.key")
        v = linear(both, w, f"{name}.attention.value")
        x = (y if normed else x) + linear(
            attention(q, k, v, ABSTRACTOR["num_attention_heads"]), w, f"{name}.output.out_proj"
        )
        y = layer_norm(x, w, f"{name}.output.norm2", 1e-5)
        gate = linear(y, w, f"{name}.output.mlp.w1")
        y = layer_norm(
            gate * gate.sigmoid() * linear(y, w, f"{name}.output.mlp.w3"),
            w,
            f"{name}.output.mlp.ffn_ln",
            1e-6,
        )
        x = x + linear(y, w, f"{name}.output.mlp.w2")
    tokens = linear(x, w, "model.visual_abstractor.visual_fc")
    eos = w["model.visual_abstractor.vit_eos"][0]
    return torch.cat([tokens, eos] if eos_last else [eos, tokens])


def plain_decoder(w, x, picture, grouped):
    """Embeddings (T, d) and for each token whether it is of the picture -> logits (T, V), token by
    token where there are two of a part."""
    heads = TEXT["num_attention_heads"]
    eps = TEXT["rms_norm_eps"]

    def chosen(apply, name):
        return torch.stack(
            [
                apply(row, f"{name}.multiway.{int(in_picture)}")
                for row, in_picture in zip(y, picture, strict=True)
            ]
        )

    def norm(row, name):
        return rms_norm(row, w[f"{name}.weight"], eps)

    def project(row, name):
        return linear(row, w, name)

    for layer in range(TEXT["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        y = x
        y = chosen(norm, f"{name}.input_layernorm")
        q = linear(y, w, f"{name}.self_attn.q_proj")
        k = chosen(project, f"{name}.self_attn.k_proj")
        v = chosen(project, f"{name}.self_attn.v_proj")
        out = []
        for head in range(heads):
            group = head * grouped // heads
            q_h = q.chunk(heads, -1)[head]
            k_h = k.chunk(grouped, -1)[group]
            v_h = v.chunk(grouped, -1)[group]
            scores = turned(q_h) @ turned(k_h).T / q_h.shape[-1] ** 0.5
            out.append(
                scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf")).softmax(-1)
                @ v_h
            )
        x = x + linear(torch.cat(out, -1), w, f"{name}.self_attn.o_proj")
        y = x
        y = chosen(norm, f"{name}.post_attention_layernorm")
        gate = linear(y, w, f"{name}.mlp.gate_proj")
        x = x + linear(
            gate * gate.sigmoid() * linear(y, w, f"{name}.mlp.up_proj"), w, f"{name}.mlp.down_proj"
        )
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits_are_those_of_the_plain_forward(folders, load, batch_of, name):
    vlm = load(name)
    w = load_file(folders[name] / "model.safetensors")
    batch = batch_of(vlm, (1,))
    grouped = 2 if name.endswith("gqa") else 4
    pixels = batch.image_inputs["pixel_values"][0]
    with torch.no_grad():
        computed = vlm.vision(batch).pooler_output[0]
        logits = prefill(vlm, batch).logits[0, -1]
    patches = plain_vit(w, pixels)
    features = plain_abstractor(w, patches)
    picture = batch.input_ids[0] == vlm.image_token_id
    embeds = put_in(
        w["model.embed_tokens.weight"], batch.input_ids[0], features, vlm.image_token_id
    )
    assert computed.shape == (QUERIES + 1, 64) and torch.allclose(computed, features, atol=1e-4)
    assert torch.allclose(logits, plain_decoder(w, embeds, picture, grouped)[-1], atol=1e-4)
    assert logits.std() > 0.1 and features[:-1].std(0).mean() > 0.05
    wrongs = [
        plain_abstractor(w, plain_vit(w, pixels, by_head=False)),
        *(
            plain_abstractor(w, patches, **{k: False})
            for k in ("columns_first", "normed", "eos_last")
        ),
    ]
    for i, wrong in enumerate(wrongs):
        assert not torch.allclose(computed, wrong, atol=1e-3), f"mutant {i} is told apart"
    for wrong in (~picture, torch.zeros_like(picture), picture.roll(1)):
        assert not torch.allclose(logits, plain_decoder(w, embeds, wrong, grouped)[-1], atol=1e-2)


def test_text_alone_goes_through_the_first_of_each_pair_with_or_without_modality(folders, load):
    vlm = load("mplug_owl2")
    w = load_file(folders["mplug_owl2"] / "model.safetensors")
    ids = torch.tensor([[1, 40, 77, 301, 52]])
    embeds = vlm.model.get_input_embeddings()(ids)
    wanted = plain_decoder(w, w["model.embed_tokens.weight"][ids[0]], [False] * 5, 4)
    with torch.no_grad():
        for inputs in (
            {"input_ids": ids},
            {"inputs_embeds": embeds},
            {"inputs_embeds": embeds, "modality": torch.zeros_like(ids)},
        ):
            assert torch.allclose(vlm.model(**inputs).logits[0], wanted, atol=1e-4)
        assert not torch.allclose(
            vlm.model(inputs_embeds=embeds, modality=torch.ones_like(ids)).logits[0],
            wanted,
            atol=1e-2,
        )


def test_generated_tokens_are_text_whose_logits_a_plain_pass_gives(load, batch_of):
    vlm = load("mplug_owl2")
    answer = [40, 77, 301, 52]
    batch = batch_of(vlm, (0,))
    logprobs = generate(vlm, batch, 4, answers=[answer]).logprobs[0]
    ids = torch.cat([batch.input_ids, torch.tensor([answer[:-1]])], 1)
    with torch.no_grad():
        logits = (
            vlm.model(input_ids=ids, pixel_values=batch.image_inputs["pixel_values"])
            .logits[0, -4:]
            .log_softmax(-1)
        )
    assert torch.allclose(
        logprobs, logits.gather(-1, torch.tensor(answer)[:, None])[:, 0], atol=1e-4
    )


# --- prompt and picture ---------------------------------------------------------------------------


def test_prompt_ids_are_those_of_the_pieces_around_the_picture_tokenised_apart(
    folders, load, pictures
):
    vlm = load("mplug_owl2")
    question = "Where  are the 12 blue squares?\nSay: é"
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folders["mplug_owl2"] / "tokenizer.model")
    )
    batch = vlm.encode([Sample("0", None, question)], pictures[:1])
    expected = [
        1,
        *pieces.encode("USER: "),
        *[vlm.image_token_id] * (QUERIES + 1),
        *pieces.encode(f"{question} ASSISTANT:"),
    ]
    assert batch.prompts[0] == f"USER: <image>{question} ASSISTANT:"
    assert batch.input_ids[0].tolist() == expected
    assert mplug_owl2.inputs(vlm, batch)["modality"][0].tolist() == [
        int(i == vlm.image_token_id) for i in expected
    ]


def test_pixels_are_those_of_a_picture_squeezed_to_a_square_of_its_longer_side_first(load):
    vlm = load("mplug_owl2")
    picture = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (90, 250, 3), dtype=np.uint8)
    )
    twice = picture.resize((250, 250), Image.Resampling.BICUBIC).resize(
        (112, 112), Image.Resampling.BICUBIC
    )
    pixels = (
        vlm.encode([Sample("0", None, "Hi?")], [picture])
        .image_inputs["pixel_values"][0]
        .permute(1, 2, 0)
        .numpy()
    )
    np.testing.assert_allclose(pixels, (np.asarray(twice) / 255 - tiny.MEAN) / tiny.STD, atol=1e-5)
    once = (
        np.asarray(picture.resize((112, 112), Image.Resampling.BICUBIC)) / 255 - tiny.MEAN
    ) / tiny.STD
    assert np.abs(pixels - once).max() > 0.01


# --- measuring ------------------------------------------------------------------------------------


def test_relevancy_reaches_the_patches_through_the_abstractor(load, batch_of):
    vlm = load("mplug_owl2")
    batch = batch_of(vlm, (1,))
    run = trace(vlm, batch, [40, 77])
    relevancy = attribution.relevancy(run, [0, 1])
    assert relevancy.image.shape == (2, 3, QUERIES + 1)
    assert relevancy.cells.shape == (2, 3, SIDE * SIDE)
    assert relevancy.cells.max() > 0
    with torch.no_grad():
        assert torch.allclose(
            run.logits[0], prefill(vlm, batch).logits[0, -1].float(), atol=1e-4
        ), "the traced pass knows the modality"
    with pytest.raises(UsageError, match="needs grid, which the family mplug_owl2 lacks"):
        vlm.need("grid")


@torch.inference_mode()
def test_a_bright_square_lies_where_the_grid_of_patches_says(load):
    vlm = load("mplug_owl2")
    noise = np.random.default_rng(2).integers(0, 60, (90, 250, 3), dtype=np.uint8)
    sample = Sample("0", None, "Hi?")
    states = []
    grid = vlm.family.patches(
        vlm, (250, 90), vlm.encode([sample], [Image.fromarray(noise)]).image_rows[0]
    )
    assert grid.shape == (SIDE, SIDE) and grid.boxes[-1].tolist() == [218.75, 78.75, 250, 90]
    for patch in (3, 29, 62):
        x0, y0, x1, y1 = grid.boxes[patch].round().astype(int)
        bright = noise.copy()
        bright[y0:y1, x0:x1] = 255
        states = [
            vlm.vision(vlm.encode([sample], [Image.fromarray(pixels)])).last_hidden_state[0, 1:]
            for pixels in (noise, bright)
        ]
        assert int((states[1] - states[0]).norm(dim=-1).argmax()) == patch


def test_a_layer_of_the_abstractor_gives_one_map_over_queries_and_patches(load, batch_of):
    vlm = load("mplug_owl2")
    maps = []
    abstractor = vlm.model.visual_abstractor
    hooks = [
        layer.attention.register_forward_hook(lambda module, args, out: maps.append(out[1]))
        for layer in abstractor.layers
    ]
    before = abstractor.config._attn_implementation
    with torch.no_grad():
        plain = vlm.vision(batch_of(vlm, (1,))).pooler_output[0]
        maps.clear()
        abstractor.set_attn_implementation("eager")
        eager = vlm.vision(batch_of(vlm, (1,))).pooler_output[0]
    abstractor.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    assert [tuple(weights.shape) for weights in maps] == [
        (1, 4, QUERIES, QUERIES + 1 + SIDE * SIDE)
    ] * 3
    assert torch.allclose(plain, eager, atol=1e-5)
    assert all(torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) for weights in maps)


# --- files ----------------------------------------------------------------------------------------


def copy_of(folder, to, visual=None, **keys):
    """A copy of a checkpoint with other keys in its config; visual: {part: keys of
    visual_config}."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | keys
    config["visual_config"] = {
        name: settings | (visual or {}).get(name, {})
        for name, settings in config["visual_config"].items()
    }
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_sine_tables_come_from_the_files_where_these_hold_them(folders, load, tmp_path):
    name = "model.visual_abstractor.encoder.layers.1.crossattention.attention.q_pos_embed"
    with_tables = load_file(folders["mplug_owl2-gqa"] / "model.safetensors")
    assert name in with_tables
    assert name not in load_file(folders["mplug_owl2"] / "model.safetensors")
    computed = [layer.attention for layer in load("mplug_owl2").model.visual_abstractor.layers]
    stored = [layer.attention for layer in load("mplug_owl2-gqa").model.visual_abstractor.layers]
    assert all(
        torch.equal(a.q_pos_embed, b.q_pos_embed) and torch.equal(a.k_pos_embed, b.k_pos_embed)
        for a, b in zip(computed, stored, strict=True)
    )
    copy = copy_of(folders["mplug_owl2-gqa"], tmp_path / "copy")
    save_file(with_tables | {name: torch.full((QUERIES, 48), 0.5)}, copy / "model.safetensors")
    assert (
        common.load_model(copy).model.visual_abstractor.layers[1].attention.q_pos_embed == 0.5
    ).all()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "missing",
            (
                "1 parameters are in no file, such as"
                " language_model.layers.1.self_attn.k_proj.multiway.1.weight"
            ),
        ),
        (
            "fused",
            (
                "3 parameters are in no file, such as"
                " vision_model.encoder.layers.0.self_attn.k_proj.bias"
            ),
        ),
        (
            "unknown",
            "1 parameters have no place in this model, such as visual_abstractor.layers.0.w4.bias",
        ),
        ("owl2.1", "mPLUG-Owl2.1 .Qwen. is not supported"),
        ("no cls", "use_cls_token = False in the config of visual_model is not supported"),
        ("grid", "grid_size or encoder_hidden_size does not fit a tower of 8 x 8 patches"),
        ("tokenizer", "has no tokenizer.model"),
    ],
)
def test_a_broken_folder_is_one_clear_line(folders, tmp_path, what, message):
    keys = {
        "owl2.1": {"model_type": "mplug_owl2_1"},
        "no cls": {"visual": {"visual_model": {"use_cls_token": False}}},
    }
    keys["grid"] = {"visual": {"visual_abstractor": {"grid_size": 32}}}
    copy = copy_of(folders["mplug_owl2"], tmp_path / "copy", **keys.get(what, {}))
    state = load_file(copy / "model.safetensors")
    if what == "missing":
        del state["model.layers.1.self_attn.k_proj.multiway.1.weight"]
    if what == "fused":
        del state["model.vision_model.encoder.layers.0.self_attn.query_key_value.bias"]
    if what == "unknown":
        state["model.visual_abstractor.encoder.layers.0.crossattention.output.mlp.w4.bias"] = (
            torch.ones(1)
        )
    save_file(state, copy / "model.safetensors")
    if what == "tokenizer":
        (copy / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match=message) as error:
        common.load_model(copy)
    assert "\n" not in str(error.value)


def test_norms_have_the_published_eps(load):
    model = load("mplug_owl2").model
    layer = model.visual_abstractor.layers[0]
    tower = model.vision_model
    assert (layer.norm1.eps, layer.normk.eps, layer.norm2.eps, layer.ffn_ln.eps) == (
        1e-5,
        1e-5,
        1e-5,
        1e-6,
    )
    assert (
        tower.pre_layrnorm.eps
        == tower.post_layernorm.eps
        == tower.encoder.layers[0].layer_norm1.eps
        == 1e-6
    )


def test_published_sizes_are_the_defaults():
    config = mplug_owl2.read_config(
        "x", {"model_type": "mplug_owl2", "hidden_size": 4096, "rope_theta": 20000.0}
    )
    tower, abstractor = config.vision_config, config.abstractor_config
    assert (
        tower.num_hidden_layers,
        tower.hidden_size,
        tower.num_attention_heads,
        tower.image_size,
        tower.patch_size,
    ) == (24, 1024, 16, 448, 14)
    assert (tower.hidden_act, tower.layer_norm_eps, tower.intermediate_size) == (
        "quick_gelu",
        1e-6,
        4096,
    )
    assert (
        abstractor.num_hidden_layers,
        abstractor.num_learnable_queries,
        abstractor.intermediate_size,
        abstractor.patches,
    ) == (6, 64, 2816, 1024)
    assert abstractor.width == 4096 and config.text_config.rope_parameters["rope_theta"] == 20000.0


def test_a_decoder_without_layers_loads_for_scripts_that_need_only_its_inputs(
    folders, load, batch_of
):
    config, _ = configs.read_config(folders["mplug_owl2"])
    config.get_text_config().num_hidden_layers = 0
    model, _ = mplug_owl2.load(str(folders["mplug_owl2"]), config, dtype=torch.float32)
    batch = batch_of(load("mplug_owl2"), (1,))
    with torch.no_grad():
        features = model.get_image_features(batch.image_inputs["pixel_values"]).pooler_output
        assert torch.equal(features[0], load("mplug_owl2").vision(batch).pooler_output[0])
    assert len(model.language_model.layers) == 0

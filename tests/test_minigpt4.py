"""MiniGPT-4 against a forward pass written out from the published pieces' keys, with a Q-Former and
without; its prompt, its files, what leads to patches."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch

import common
from tests.random_models.minigpt4 import MODELS, QFORMER, QUERIES, VISION
from tests.test_convllava import gelu, layer_norm, linear, plain_llama, put_in
from vlmdiag import families as models
from vlmdiag.cli import UsageError
from vlmdiag.families import minigpt4
from vlmdiag.model import configs
from vlmdiag.model.decoding import generate
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy.gradients import trace

NAMES = list(MODELS)
QUESTION = "Where  are the 12 blue squares?\nSay: é"


@pytest.fixture(scope="module", autouse=True)
def listed():
    with pytest.MonkeyPatch.context() as patch:
        if "minigpt4" not in models.FAMILIES:
            patch.setattr(models, "FAMILIES", ("minigpt4", *models.FAMILIES))
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


def stored(folder):
    """All tensors of a folder by their published names, the ViT's behind "visual_encoder.", Llama's
    as they are."""
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for key in ("vision_model", "qformer", "projection"):
        if config[key]:
            state = torch.load(folder / config[key], weights_only=True)
            weights |= {
                ("visual_encoder." if key == "vision_model" else "") + name: value
                for name, value in state.get("model", state).items()
            }
    return weights | torch.load(folder / "llama" / "pytorch_model.bin", weights_only=True)


# --- the plain forward ----------------------------------------------------------------------------


def attention(q, k, v, heads):
    """(Q, d), (K, d), (K, d) -> (Q, d), one head after the other."""
    by_head = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
    return torch.cat(
        [(q_h @ k_h.T / q_h.shape[-1] ** 0.5).softmax(-1) @ v_h for q_h, k_h, v_h in by_head], -1
    )


def plain_vit(w, pixels, order=(0, 1, 2)):
    """(3, S, S) -> (1 + patches, d) after `ln_vision` where there is one, else after a norm without
    gain and bias. order: of q, k, v in the fused matrix."""
    patch = VISION["patch_size"]
    side = VISION["image_size"]
    count = side // patch
    blocks = (
        pixels.reshape(3, count, patch, count, patch)
        .permute(1, 3, 0, 2, 4)
        .reshape(count * count, -1)
    )
    name = "visual_encoder.patch_embed.proj"
    patches = blocks @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]
    x = torch.cat([w["visual_encoder.cls_token"][0], patches]) + w["visual_encoder.pos_embed"][0]
    for block in range(VISION["num_hidden_layers"]):
        name = f"visual_encoder.blocks.{block}"
        fused = layer_norm(x, w, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T
        q, k, v = (fused.chunk(3, -1)[i] for i in order)
        y = attention(
            q + w[f"{name}.attn.q_bias"],
            k,
            v + w[f"{name}.attn.v_bias"],
            VISION["num_attention_heads"],
        )
        x = x + linear(y, w, f"{name}.attn.proj")
        x = x + linear(
            gelu(linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")),
            w,
            f"{name}.mlp.fc2",
        )
    return layer_norm(
        x,
        w if "ln_vision.weight" in w else {"ln_vision.weight": 1, "ln_vision.bias": 0},
        "ln_vision",
        1e-5,
    )


def plain_qformer(w, states):
    """Queries (q, d) that read states (1 + patches, d), in every second layer from the first on."""
    x = layer_norm(w["query_tokens"][0], w, "Qformer.bert.embeddings.LayerNorm", 1e-12)
    for layer in range(QFORMER["num_hidden_layers"]):
        name = f"Qformer.bert.encoder.layer.{layer}"
        for part, source in (("attention", None), ("crossattention", states)):
            if source is None or layer % 2 == 0:
                q, k, v = (
                    linear(
                        x if source is None or key == "query" else source,
                        w,
                        f"{name}.{part}.self.{key}",
                    )
                    for key in ("query", "key", "value")
                )
                y = linear(
                    attention(q, k, v, QFORMER["num_attention_heads"]),
                    w,
                    f"{name}.{part}.output.dense",
                )
                x = layer_norm(x + y, w, f"{name}.{part}.output.LayerNorm", 1e-12)
        y = linear(
            gelu(linear(x, w, f"{name}.intermediate_query.dense")), w, f"{name}.output_query.dense"
        )
        x = layer_norm(x + y, w, f"{name}.output_query.LayerNorm", 1e-12)
    return x


def plain_features(w, pixels, order=(0, 1, 2), across=False):
    """(tokens, d). across: four patches of a column in place of a row."""
    states = plain_vit(w, pixels, order)
    if "query_tokens" in w:
        return linear(plain_qformer(w, states), w, "llama_proj")
    count = VISION["image_size"] // VISION["patch_size"]
    patches = states[1:].reshape(count, count, -1)
    patches = (patches.transpose(0, 1) if across else patches).flatten(0, 1)
    return linear(
        torch.stack([torch.cat([*patches[i : i + 4]]) for i in range(0, len(patches), 4)]),
        w,
        "llama_proj",
    )


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits_are_those_of_the_plain_forward(folders, load, batch_of, name):
    vlm = load(name)
    w = stored(folders[name])
    batch = batch_of(vlm, (1,))
    pixels = batch.image_inputs["pixel_values"][0]
    with torch.no_grad():
        computed = vlm.vision(batch).pooler_output[0]
        logits = prefill(vlm, batch).logits[0, -1]
    features = plain_features(w, pixels)
    wanted = plain_llama(
        w,
        put_in(w["model.embed_tokens.weight"], batch.input_ids[0], features, vlm.image_token_id),
        3,
        4,
        1e-6,
    )[-1]
    assert len(computed) == (QUERIES if name == "minigpt4" else 16)
    assert torch.allclose(computed, features, atol=1e-4) and torch.allclose(
        logits, wanted, atol=1e-4
    )
    assert logits.std() > 0.1 and features.std(0).mean() > 0.05
    wrongs = [
        plain_features(w, pixels, order=(1, 0, 2)),
        plain_features(w, pixels, order=(0, 2, 1)),
    ]
    if name == "minigpt4":
        # without CLS
        wrongs.append(linear(plain_qformer(w, plain_vit(w, pixels)[1:]), w, "llama_proj"))
    else:
        wrongs.append(plain_features(w, pixels, across=True))
    for i, wrong in enumerate(wrongs):
        assert not torch.allclose(computed, wrong, atol=1e-3), f"mutant {i} is told apart"


# --- prompt ---------------------------------------------------------------------------------------

LAYOUTS = {
    "minigpt4": ("###Human: <Img>", "###Assistant: "),
    "minigpt4-patches": ("<s>[INST] <Img>", " [/INST] "),
}


@pytest.mark.parametrize("name", NAMES)
def test_prompt_ids_are_those_of_the_pieces_around_the_picture_tokenised_apart(
    folders, load, pictures, name
):
    vlm = load(name)
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folders[name] / "llama" / "tokenizer.model")
    )
    before, end = LAYOUTS[name]
    batch = vlm.encode([Sample("0", None, QUESTION)], pictures[:1])
    assert batch.prompts[0] == f"{minigpt4.SYSTEM}{before}<image></Img> {QUESTION}{end}"
    first, second = (
        f"{minigpt4.SYSTEM}{before}".split("<s>")
        if "<s>" in before
        else (f"{minigpt4.SYSTEM}{before}", None)
    )
    expected = [1, *pieces.encode(first), *([1, *pieces.encode(second)] if second else [])]
    expected += [vlm.image_token_id] * (QUERIES if name == "minigpt4" else 16) + pieces.encode(
        f"</Img> {QUESTION}{end}"
    )
    assert batch.input_ids[0].tolist() == expected
    without = vlm.encode([Sample("0", None, QUESTION)], pictures[:1], strip_system=True)
    assert without.prompts[0] == batch.prompts[0].removeprefix(minigpt4.SYSTEM)
    assert "system" not in without.spans(0)


def test_an_answer_ends_at_the_first_token_of_three_hashes(load, batch_of):
    vlm = load("minigpt4")
    batch = batch_of(vlm, (1,))
    hashes = vlm.tokenizer("a###", add_special_tokens=False)["input_ids"][1]
    assert vlm.eos_ids >= {2, hashes} and 1 not in vlm.eos_ids
    bias = vlm.model.language_model.lm_head.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([hashes]), 99.0)
    )
    generation = generate(vlm, batch, 5)
    bias.remove()
    assert generation.ids == [[hashes]]


# --- back to the picture --------------------------------------------------------------------------


def test_relevancy_reaches_the_patches_through_the_q_former(load, batch_of):
    vlm = load("minigpt4")
    batch = batch_of(vlm, (1,))
    relevancy = attribution.relevancy(trace(vlm, batch, [20, 31]), [0, 1])
    assert relevancy.cells.shape == (2, 3, 64)
    assert relevancy.image.shape == (2, 3, QUERIES)
    assert relevancy.cells.max() > 0
    assert vlm.family.patches(vlm, (60, 50), batch.image_rows[0]).shape == (8, 8)
    assert batch.grids[0] is None
    assert vlm.parts.qformer.queries == QUERIES and len(vlm.parts.vision_blocks) == 2


def test_a_token_without_a_q_former_lies_over_four_patches_of_a_row(load, pictures):
    vlm = load("minigpt4-patches")
    grid = vlm.encode([Sample("0", None, "Hi?")], [pictures[1].resize((160, 80))]).grids[0]
    assert grid.shape == (8, 2)
    assert grid.boxes[3].tolist() == [80, 10, 160, 20]
    assert vlm.parts.qformer is None
    assert vlm.family.patches is None
    assert vlm.need("grid") is None


def test_relevancy_without_a_q_former_reaches_the_four_patches_of_a_row(load, batch_of):
    vlm = load("minigpt4-patches")
    run = trace(vlm, batch_of(vlm, (1,)), [20, 31])
    assert run.tower.sources.shape == (16, 4) and run.tower.sources[3].tolist() == [
        13,
        14,
        15,
        16,
    ], "CLS is at 0, a row has 8 patches"
    relevancy = attribution.relevancy(run, [0, 1])
    assert relevancy.cells.shape == relevancy.image.shape == (2, 3, 16)
    assert not np.allclose(relevancy.cells, relevancy.image, rtol=1e-2)
    plain = attribution.relevancy(run, [0, 1], tower=False)
    assert plain.cells is None and np.array_equal(plain.image, relevancy.image)


def test_a_model_with_a_q_former_has_no_grid(load):
    with pytest.raises(UsageError, match="needs grid, which the family minigpt4 lacks"):
        load("minigpt4").need("grid")


# --- files ----------------------------------------------------------------------------------------


def copy_of(folder, to, **keys):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | keys
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_the_last_file_replaces_what_the_others_hold(folders, load, tmp_path, batch_of):
    copy = copy_of(folders["minigpt4"], tmp_path / "copy")
    last = torch.load(copy / "projection.pth", weights_only=True)
    last["model"] |= {"query_tokens": torch.zeros(1, QUERIES, 32), "ln_vision.bias": torch.ones(48)}
    torch.save(last, copy / "projection.pth")
    vlm = common.load_model(copy)
    assert vlm.model.query_tokens.abs().max() == 0
    assert (vlm.model.vision_model.post_layernorm.bias == 1).all()
    assert torch.equal(
        vlm.model.language_projection.weight, load("minigpt4").model.language_projection.weight
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "lora",
            (
                "llama_model.base_model.lora_A.weight of the projection's file has no place in this"
                " model"
            ),
        ),
        (
            "missing",
            (
                "1 parameters are in no file, such as"
                " qformer.encoder.layer.2.crossattention.attention.key.weight"
            ),
        ),
        (
            "bias",
            "2 parameters are in no file, such as vision_model.encoder.layers.0.self_attn.qkv.bias",
        ),
        (
            "text",
            "1 parameters have no place in this model, such as language_model.model.layers.7.x",
        ),
        ("gone", "'vision_model' is 'eva_vit_g.pth' in config.json, which is not there"),
        ("damaged", "projection.pth is not readable"),
        ("unnamed", "config.json names no 'projection'"),
        ("opt", "the text model is of type 'opt', a Llama was wanted"),
        ("groups", "rows of 7 patches are not whole groups of 4"),
    ],
)
def test_a_broken_folder_is_one_clear_line(folders, tmp_path, what, message):
    source = folders["minigpt4-patches" if what == "groups" else "minigpt4"]
    keys = {
        "unnamed": {"projection": None},
        "groups": {"vision_config": VISION | {"image_size": 98}},
    }.get(what, {})
    copy = copy_of(source, tmp_path / "copy", **keys)
    files = {
        "lora": "projection.pth",
        "missing": "blip2_pretrained_flant5xxl.pth",
        "bias": "eva_vit_g.pth",
        "text": "llama/pytorch_model.bin",
    }
    if what in files:
        state = torch.load(copy / files[what], weights_only=True)
        inner = state.get("model", state)
        if what == "lora":
            inner["llama_model.base_model.lora_A.weight"] = torch.ones(1)
        if what == "missing":
            del inner["Qformer.bert.encoder.layer.2.crossattention.self.key.weight"]
        if what == "bias":
            inner = state = {
                name: value
                for name, value in state.items()
                if "q_bias" not in name and "v_bias" not in name
            }
        if what == "text":
            inner["model.layers.7.x"] = torch.ones(1)
        torch.save(state, copy / files[what])
    if what == "gone":
        (copy / "eva_vit_g.pth").unlink()
    if what == "damaged":
        (copy / "projection.pth").write_bytes(b"not weights")
    if what == "opt":
        (copy / "llama" / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(UsageError, match=message) as error:
        common.load_model(copy)
    assert "\n" not in str(error.value)


def test_norms_have_the_published_eps(load):
    tower = load("minigpt4").model.vision_model
    assert tower.post_layernorm.eps == 1e-5
    assert {layer.layer_norm1.eps for layer in tower.encoder.layers} == {1e-6}
    assert load("minigpt4").model.qformer.layernorm.eps == 1e-12


def test_published_sizes_are_the_defaults(folders, tmp_path):
    copy = copy_of(
        folders["minigpt4"],
        tmp_path / "copy",
        vision_config=None,
        qformer_config=None,
        num_query_tokens=32,
    )
    config, family = configs.read_config(copy)
    vision, qformer = config.vision_config, config.qformer_config
    assert (
        vision.num_hidden_layers,
        vision.hidden_size,
        vision.num_attention_heads,
        vision.intermediate_size,
    ) == (39, 1408, 16, int(1408 * 4.3637))
    assert (vision.patch_size, vision.image_size, vision.layer_norm_eps, vision.qkv_bias) == (
        14,
        224,
        1e-6,
        True,
    )
    assert (
        qformer.num_hidden_layers,
        qformer.hidden_size,
        qformer.cross_attention_frequency,
        qformer.encoder_hidden_size,
    ) == (12, 768, 2, 1408)
    assert config.num_query_tokens == 32
    assert qformer.layer_norm_eps == 1e-12
    assert family.name == "minigpt4"


def test_a_decoder_without_layers_loads_for_scripts_that_need_only_its_inputs(
    folders, load, batch_of
):
    config, _ = configs.read_config(folders["minigpt4"])
    config.get_text_config().num_hidden_layers = 0
    model, _ = minigpt4.load(str(folders["minigpt4"]), config, dtype=torch.float32)
    batch = batch_of(load("minigpt4"), (1,))
    with torch.no_grad():
        features = model.get_image_features(batch.image_inputs["pixel_values"]).pooler_output
        assert torch.equal(features[0], load("minigpt4").vision(batch).pooler_output[0])
    assert len(model.language_model.model.layers) == 0

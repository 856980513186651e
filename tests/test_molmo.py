"""Molmo from both published layouts: the same numbers as a forward pass written out here from the
published facts, the prompt's layout, and what is refused."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import common
from tests.random_models.molmo import HIDDEN, LAYERS, MODELS, VISION, WIDTH, tokenizer_of
from vlmdiag.cli import UsageError
from vlmdiag.families import molmo
from vlmdiag.families.molmo_config import CONSTANTS, read_config, reads
from vlmdiag.families.molmo_images import EXTRA, choose_crops, region
from vlmdiag.families.molmo_model import Molmo
from vlmdiag.groups import GROUPS
from vlmdiag.model.selfcheck import noise_picture
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy.gradients import trace

QUESTION = "Is there a red circle in the image?"
SIZES = [(300, 180), (90, 260), (60, 50), (112, 112)]
MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
STD = np.float32([0.26862954, 0.26130258, 0.27577711])
CROP, PATCH, MARGIN, MOST = 112, 14, 2, 6  # pixels, pixels, patches, crops


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("molmo")
    return {name: build(root / name) for name, build in MODELS.items()}


@pytest.fixture(scope="module")
def load(folders):
    loaded = {name: common.load_model(folder) for name, folder in folders.items()}
    return loaded.get


def encode(vlm, size, question=QUESTION):
    return vlm.encode([Sample("0", None, question)], [noise_picture(size)])


def published(folder):
    """All parameters by their published names without "model."."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {key.removeprefix("model."): value for key, value in load_file(file).items()}
    return state


# --- the model a second time, from the files ------------------------------------------------------


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def rms(x, weight):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def on_canvas(picture, height, width):
    """Normalised (height, width, 3) and where the picture is, scaled by PIL."""
    scale = min(
        np.float32(width) / np.float32(picture.width),
        np.float32(height) / np.float32(picture.height),
    )
    h = int(np.float32(picture.height) * scale)
    w = int(np.float32(picture.width) * scale)
    bands = [
        Image.fromarray(band.astype(np.float32) / np.float32(255)).resize((w, h), Image.BILINEAR)
        for band in np.asarray(picture).transpose(2, 0, 1)
    ]
    canvas = np.zeros((height, width, 3), np.float32)
    mask = np.zeros((height, width), bool)
    top = (height - h) // 2
    left = (width - w) // 2
    canvas[top : top + h, left : left + w] = np.stack(
        [np.asarray(band) for band in bands], -1
    ).clip(0, 1)
    mask[top : top + h, left : left + w] = True
    return (canvas - MEAN) / STD, mask


def crop_counts(picture):
    """(rows, columns): of all grids of windows those that the picture need not be reduced for, the
    least enlarged, fewer crops first; else the largest."""
    window = CROP - 2 * MARGIN * PATCH
    best, chosen = None, None
    grids = sorted(
        (i * j, i, j) for i in range(1, MOST + 1) for j in range(1, MOST + 1) if i * j <= MOST
    )
    needs = {
        (i, j): min(
            np.float32(i * window) / np.float32(picture.height - 2 * MARGIN * PATCH),
            np.float32(j * window) / np.float32(picture.width - 2 * MARGIN * PATCH),
        )
        for _, i, j in grids
    }
    enlarged = {key: need for key, need in needs.items() if need >= 1}
    for key in enlarged or needs:
        better = best is None or (needs[key] < best if enlarged else needs[key] > best)
        best, chosen = (needs[key], key) if better else (best, chosen)
    return chosen


def clip(state, pixels, layers):
    """(patches, len(layers) * width) of one crop (s, s, 3), CLS dropped."""
    weights = {
        key.removeprefix("vision_backbone.image_vit."): value
        for key, value in state.items()
        if "image_vit" in key
    }
    side = CROP // PATCH
    heads = VISION["image_num_heads"]
    width = VISION["image_head_dim"]
    rows = [
        pixels[PATCH * i : PATCH * i + PATCH, PATCH * j : PATCH * j + PATCH].reshape(-1)
        for i in range(side)
        for j in range(side)
    ]
    x = (
        torch.stack(
            [
                weights["class_embedding"],
                *(weights["patch_embedding.weight"] @ torch.from_numpy(row) for row in rows),
            ]
        )
        + weights["positional_embedding"]
    )
    x = norm(x, weights, "pre_ln")
    states = []
    for i in range(VISION["image_num_layers"]):
        block = f"transformer.resblocks.{i}."
        y = norm(x, weights, block + "attention_norm")
        q, k, v = (linear(y, weights, f"{block}attention.w{name}") for name in "qkv")
        heads_of = [slice(h * width, h * width + width) for h in range(heads)]
        out = torch.cat(
            [(q[:, s] @ k[:, s].T / math.sqrt(width)).softmax(-1) @ v[:, s] for s in heads_of], -1
        )
        x = x + linear(out, weights, block + "attention.wo")
        y = linear(norm(x, weights, block + "ffn_norm"), weights, block + "feed_forward.w1")
        x = x + linear(y * torch.sigmoid(1.702 * y), weights, block + "feed_forward.w2")
        states.append(x)
    return torch.cat([states[layer][1:] for layer in layers], -1)


def pooled(state, patches, first_as_query=False):
    """(side / 2, side / 2, d) of one crop's patches."""
    side = CROP // PATCH
    heads = VISION["image_num_heads"]
    width = VISION["image_head_dim"]
    plane = patches.view(side, side, -1)
    cells = []
    for i in range(0, side, 2):
        for j in range(0, side, 2):
            four = torch.stack([plane[i, j], plane[i, j + 1], plane[i + 1, j], plane[i + 1, j + 1]])
            query = four[0] if first_as_query else four.mean(0)
            q, k, v = (
                linear(vectors, state, f"vision_backbone.image_pooling_2d.w{name}")
                for vectors, name in ((query, "q"), (four, "k"), (four, "v"))
            )
            heads_of = [slice(h * width, h * width + width) for h in range(heads)]
            cells.append(
                torch.cat(
                    [(k[:, s] @ q[s] / math.sqrt(width)).softmax(-1) @ v[:, s] for s in heads_of]
                )
            )
    x = linear(torch.stack(cells), state, "vision_backbone.image_pooling_2d.wo")
    w = {
        name: state[f"vision_backbone.image_projector.{name}.weight"] for name in ("w1", "w2", "w3")
    }
    return ((F.silu(x @ w["w1"].T) * (x @ w["w3"].T)) @ w["w2"].T).view(side // 2, side // 2, -1)


def decoder(state, config, x, gate_first=False):
    """Logits behind embeddings x (T, d)."""
    heads = config["num_attention_heads"]
    after = config["norm_after"]
    shared = config["num_key_value_heads"] or heads
    depth = WIDTH // heads
    length = len(x)
    angle = (
        torch.arange(length)[:, None]
        * config["rope_theta"] ** (-torch.arange(depth // 2) * 2 / depth)[None]
    )

    def turn(vectors):
        a = vectors[:, : depth // 2]
        b = vectors[:, depth // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for layer in range(LAYERS):
        weights = {
            key.removeprefix(f"transformer.blocks.{layer}."): value
            for key, value in state.items()
            if key.startswith(f"transformer.blocks.{layer}.")
        }
        fused = linear(x if after else rms(x, weights["attn_norm.weight"]), weights, "att_proj")
        q = fused[:, :WIDTH]
        k = fused[:, WIDTH : WIDTH + shared * depth]
        v = fused[:, WIDTH + shared * depth :]
        if config["attention_layer_norm"]:
            q = rms(q, weights["q_norm.weight"])
            k = rms(k, weights["k_norm.weight"])
        out = []
        for head in range(heads):
            at = slice(depth * head, depth * head + depth)
            kv = slice(depth * (head * shared // heads), depth * (head * shared // heads) + depth)
            scores = turn(q[:, at]) @ turn(k[:, kv]).T / math.sqrt(depth)
            scores[torch.ones(length, length).triu(1).bool()] = -math.inf
            out.append(scores.softmax(-1) @ v[:, kv])
        out = linear(torch.cat(out, -1), weights, "attn_out")
        x = x + (rms(out, weights["attn_norm.weight"]) if after else out)
        wide = linear(x if after else rms(x, weights["ff_norm.weight"]), weights, "ff_proj")
        up, gate = (
            (wide[:, HIDDEN:], wide[:, :HIDDEN])
            if gate_first
            else (wide[:, :HIDDEN], wide[:, HIDDEN:])
        )
        out = linear(F.silu(gate) * up, weights, "ff_out")
        x = x + (rms(out, weights["ff_norm.weight"]) if after else out)
    return rms(x[-1], state["transformer.ln_f.weight"]) @ state["transformer.ff_out.weight"].T


def by_hand(
    folder,
    picture,
    question,
    row_ends=True,
    crop_by_crop=False,
    masks_in_place=False,
    layers=(-2, -3),
    gate_first=False,
    add=True,
    **pooling,
):
    """What is added at the vision tokens, (P, d), and the logits behind the prompt."""
    state = published(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = tokenizer_of()
    side = CROP // PATCH
    half = CROP // PATCH // 2
    rows, columns = crop_counts(picture)
    step = CROP - 2 * MARGIN * PATCH
    low, low_mask = on_canvas(picture, CROP, CROP)
    canvas, mask = on_canvas(
        picture, rows * step + 2 * MARGIN * PATCH, columns * step + 2 * MARGIN * PATCH
    )
    corners = [(i, j) for i in range(rows) for j in range(columns)]
    crops = [
        low,
        *(canvas[i * step : i * step + CROP, j * step : j * step + CROP] for i, j in corners),
    ]

    def share(crop):
        means = [
            crop[PATCH * i : PATCH * i + PATCH, PATCH * j : PATCH * j + PATCH].mean()
            for i in range(side)
            for j in range(side)
        ]
        return torch.tensor(means)

    shares = [
        share(mask[i * step : i * step + CROP, j * step : j * step + CROP].astype(np.float64))
        for i, j in corners
    ]
    shares = (
        [share(low_mask.astype(np.float64)), *shares]
        if masks_in_place
        else [*shares, -torch.ones(side * side)]
    )
    of_crops = []
    for pixels, of_patches in zip(crops, shares, strict=True):
        patches = clip(state, np.ascontiguousarray(pixels), layers)
        pad = state["vision_backbone.pad_embed"]
        padded = []
        for row, shown in zip(patches, of_patches, strict=True):
            if shown == 0:
                row = row + pad[0]
            elif shown < 1:
                row = row + pad[1]
            padded.append(row)
        patches = torch.stack(padded)
        of_crops.append(pooled(state, patches, **pooling))
    tokens = []  # (canvas row, canvas column, vector) of what each crop keeps
    for (i, j), cells in zip(corners, of_crops[1:], strict=True):
        for a in range(half):
            for b in range(half):
                inner = (
                    (i > 0 and a < MARGIN // 2)
                    or (i < rows - 1 and a >= half - MARGIN // 2)
                    or (j > 0 and b < MARGIN // 2)
                    or (j < columns - 1 and b >= half - MARGIN // 2)
                )
                if not inner:
                    tokens.append(
                        (i * step // PATCH // 2 + a, j * step // PATCH // 2 + b, cells[a, b])
                    )
    height = canvas.shape[0] // PATCH // 2
    width = canvas.shape[1] // PATCH // 2
    assert sorted(token[:2] for token in tokens) == [
        (a, b) for a in range(height) for b in range(width)
    ], "the kept tokens cover the canvas once"
    ordered = tokens if crop_by_crop else sorted(tokens, key=lambda token: token[:2])
    features = torch.cat([of_crops[0].flatten(0, 1), torch.stack([token[2] for token in ordered])])

    table = torch.cat([state["transformer.wte.embedding"], state["transformer.wte.new_embedding"]])
    start, end, patch, column = range(config["vocab_size"], config["vocab_size"] + 4)

    def line(count):
        return [patch] * count + [column] * row_ends

    ids = [start, *line(half) * half, end, start, *line(width) * height, end]
    ids = [
        tokenizer.eos_token_id,
        *ids,
        *tokenizer(f" User: {question} Assistant:", add_special_tokens=False)["input_ids"],
    ]
    x = table[ids].clone()
    places = torch.tensor(ids) == patch
    x[places] = features + (x[places] if add else 0)
    return features, table[patch], ids, decoder(state, config, x, gate_first)


@torch.inference_mode()
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("size", SIZES)
def test_features_and_logits_are_those_of_the_model_written_out_by_hand(folders, load, name, size):
    vlm = load(name)
    batch = encode(load(name), size)
    features, placeholder, ids, logits = by_hand(folders[name], noise_picture(size), QUESTION)
    assert batch.input_ids[0].tolist() == ids
    assert (vlm.vision(batch).pooler_output[0] - placeholder - features).abs().max() < 1e-4
    assert (prefill(vlm, batch).logits[0, -1] - logits).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(
    "change",
    [
        {"first_as_query": True},
        {"crop_by_crop": True},
        {"masks_in_place": True},
        {"layers": (-3, -2)},
        {"layers": (-1, -3)},
        {"row_ends": False},
        {"add": False},
        {"gate_first": True},
    ],
)
def test_another_order_of_operations_is_told_apart(folders, load, name, change):
    vlm = load(name)
    batch = encode(load(name), SIZES[0])
    features, placeholder, _, logits = by_hand(
        folders[name], noise_picture(SIZES[0]), QUESTION, **change
    )
    assert (prefill(vlm, batch).logits[0, -1] - logits).abs().max() > 1e-2
    same = (vlm.vision(batch).pooler_output[0] - placeholder - features).abs().max() < 1e-4
    assert bool(same) == (next(iter(change)) in ("row_ends", "add", "gate_first"))


def test_molmo_7b_d_has_as_many_parameters_as_its_published_index_says(tmp_path):
    raw = {
        "model_type": "molmo",
        "attention_layer_norm": False,
        "embedding_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 37888,
        "layer_norm_eps": 1e-06,
        "layer_norm_type": "rms",
        "max_position_embeddings": 4096,
        "norm_after": False,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "qkv_bias": True,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
        "weight_tying": False,
    }
    config = read_config(str(tmp_path), raw)
    with torch.device("meta"):
        model = Molmo(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_021_025_280
    assert (config.side, config.window, config.canvas(2, 3)) == (24, 16, (40, 56))
    assert config.max_crops == 12


# --- crops and prompt -----------------------------------------------------------------------------


def test_the_crops_are_those_of_the_published_choice(load):
    config = load("molmo-d").model.config
    for width, height in np.random.default_rng(0).integers(20, 500, (300, 2)).tolist() + [
        (56, 56),
        (56, 90),
        (30, 200),
        (168, 112),
        (400, 400),
    ]:
        with np.errstate(divide="ignore"):
            assert choose_crops((width, height), config) == crop_counts(
                Image.new("RGB", (width, height))
            ), (width, height)
    assert choose_crops((112 + 56, 112), config) == (1, 2)
    assert choose_crops((1000, 1000), config) == (2, 2)


def test_the_prompt_is_laid_out_as_published(load):
    vlm, batch = load("molmo-d"), encode(load("molmo-d"), (300, 180))  # 2 x 3 crops, 6 x 8 tokens
    spans = batch.spans(0)
    ids = batch.input_ids[0].tolist()
    text = vlm.tokenizer.decode(ids)
    low = ("<im_patch>" * 4 + "<im_col>") * 4
    high = ("<im_patch>" * 8 + "<im_col>") * 6
    assert (
        text == f"<|endoftext|><im_start>{low}<im_end><im_start>{high}<im_end> User: {QUESTION}"
        " Assistant:"
    )
    assert spans["bos"] == [[0, 1]]
    assert vlm.tokenizer.decode(ids[slice(*spans["user"][0])]).strip() == QUESTION
    assert vlm.tokenizer.decode(ids[spans["template"][0][0] : spans["template"][0][1]]) == " User:"
    assert spans["image_markup"][0] == [1, 2]
    assert spans["image_markup"][-1][1] == spans["template"][0][0]
    with_system = replace(vlm, options={"system_prompt": "Be brief."})
    batch = encode(with_system, (60, 50), "Hi?")
    assert batch.prompts == ["<|image|> User: Be brief. Hi? Assistant:"]
    assert (
        vlm.tokenizer.decode(batch.input_ids[0][batch.groups[0] == GROUPS.index("system")]).strip()
        == "Be brief."
    )
    with pytest.raises(UsageError, match="0 places for a picture"):
        encode(replace(vlm, options={"prompt_template": "User: {question}"}), (60, 50))
    templated = encode(
        replace(vlm, options={"prompt_template": "{image} User: {question} Assistant:"}), (300, 180)
    )
    assert templated.input_ids[0].tolist() == ids
    assert (
        vlm.model.lm_head.out_features
        <= vlm.image_token_id
        < len(vlm.model.get_input_embeddings().weight)
    ), "no answer can hold it"


def test_boxes_have_the_padding_of_the_preprocessing(load):
    # low: half the size, 28 pixels above and below; 1 x 3 crops of 224 x 112 pixels
    boxes = encode(load("molmo-d"), (224, 112)).grids[0].boxes
    assert boxes[:2].tolist() == [[0, -56, 56, 0], [56, -56, 112, 0]]
    assert boxes[15].tolist() == [168, 112, 224, 168]
    assert len(boxes) == 16 + 4 * 8
    assert boxes[16].tolist() == [0, 0, 28, 28]
    assert boxes[-1].tolist() == [196, 84, 224, 112]


@pytest.mark.parametrize("size", SIZES)
def test_the_patches_that_a_token_is_made_of_lie_in_its_box(load, size):
    """By where each crop lies on the canvas: the mean of the patches' centres is the box's."""
    vlm = load("molmo-d")
    run = trace(vlm, encode(vlm, size), [20])
    config = vlm.model.config
    rows, columns = run.prompt.image_rows[0]["tile_grids"][0].tolist()
    side = config.side
    canvas = config.canvas(rows, columns)
    tile = run.tower.sources // (1 + side**2)
    patch = run.tower.sources % (1 + side**2) - 1
    assert (patch >= 0).all()
    assert tile.unique().tolist() == list(range(1 + rows * columns))
    assert (tile == tile[:, :1]).all()
    inside = torch.stack([patch % side, patch // side], -1) + 0.5
    corner = torch.stack([(tile - 1) % columns, (tile - 1) // columns], -1) * config.window
    places = torch.where((tile == 0)[..., None], inside, corner + inside).mean(1).numpy()
    low, high = (
        region(size, height * PATCH, width * PATCH) for height, width in ((side, side), canvas)
    )
    for place, crop, box in zip(
        places, tile[:, 0].tolist(), run.prompt.grids[0].boxes, strict=True
    ):
        (x0, y0, x1, y1), (height, width) = (high, canvas) if crop else (low, (side, side))
        centre = x0 + place[0] * (x1 - x0) / width, y0 + place[1] * (y1 - y0) / height
        assert np.allclose(centre, [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])


# --- the native layout ----------------------------------------------------------------------------

NAMES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}


def to_native(source, target, **changes):
    """config.yaml and model.pt of the folder `source`, the text model's tokenizer beside them."""
    target.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    left_out = (
        "architectures",
        "auto_map",
        "model_type",
        "torch_dtype",
        "use_cache",
        "initializer_range",
    )
    config = {NAMES.get(key, key): value for key, value in raw.items() if key not in left_out}
    config |= {
        "mlp_ratio": 4,
        "activation_type": "swiglu",
        "block_type": "sequential",
        "rope": True,
        "include_bias": False,
        "additional_vocab_size": 128,
        "max_crops": MOST,
        "crop_mode": "overlap-and-resize-c2",
        "overlap_margins": [2, 2],
        "image_padding_embed": "pad_and_partial_pad",
        "fix_image_padding": False,
        "image_pooling_h": 2,
        "image_pooling_w": 2,
        "image_pooling_2d": "attention-meanq",
        "image_projector": "mlp",
        "moe_num_experts": 8,
        "pad_tokenizer": True,
        "max_sequence_length": 1600,
        "vision_backbone": CONSTANTS["vision_backbone"] | VISION,
        "tokenizer": {"identifier": "Qwen/Qwen2-7B", "tokenizer_dir": None},
    }
    (target / "config.yaml").write_text(
        yaml.safe_dump({"run_name": "x", "model": config | changes, "seed": 1})
    )
    torch.save(published(source), target / "model.pt")
    tokenizer_of().save_pretrained(target.parent / "Qwen2-7B")
    return target


def load_native(folder):
    raw = reads(folder)
    config = read_config(str(folder), raw)
    model, processor = molmo.load(str(folder), config, dtype=torch.float32)
    return common.VLM(model.eval().requires_grad_(False), processor, molmo.FAMILY, str(folder))


@torch.inference_mode()
@pytest.mark.parametrize("name", list(MODELS))
def test_the_native_layout_is_the_same_model(folders, load, tmp_path, name):
    original = load(name)
    vlm = load_native(to_native(folders[name], tmp_path / "native"))
    state = original.model.state_dict()
    assert state.keys() == vlm.model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in vlm.model.state_dict().items())
    mine = encode(vlm, SIZES[0])
    theirs = encode(original, SIZES[0])
    assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.groups, theirs.groups)
    assert (prefill(vlm, mine).logits - prefill(original, theirs).logits).abs().max() < 1e-4
    assert reads(folders[name]) is None and reads(tmp_path) is None


@torch.inference_mode()
def test_padding_shares_are_put_right_where_the_config_says_so(folders, tmp_path):
    vlm = load_native(to_native(folders["molmo-d"], tmp_path / "native", fix_image_padding=True))
    features, placeholder, _, logits = by_hand(
        folders["molmo-d"], noise_picture(SIZES[0]), QUESTION, masks_in_place=True
    )
    batch = encode(vlm, SIZES[0])
    assert (vlm.vision(batch).pooler_output[0] - placeholder - features).abs().max() < 1e-4
    assert (prefill(vlm, batch).logits[0, -1] - logits).abs().max() < 1e-4


def test_the_prompt_is_as_config_yaml_formats_messages(folders, tmp_path):
    formats = {"role": "<|image|> User: Hi? Assistant:", "none": "<|image|> Hi?"}
    for name, expected in formats.items():
        assert encode(
            load_native(to_native(folders["molmo-d"], tmp_path / name, message_formatting=name)),
            (60, 50),
            "Hi?",
        ).prompts == [expected]
    with pytest.raises(ValueError, match="message_formatting = 'other' is not supported"):
        load_native(to_native(folders["molmo-d"], tmp_path / "other", message_formatting="other"))


def test_a_native_folder_without_a_tokenizer_says_what_to_do(folders, tmp_path):
    folder = to_native(folders["molmo-d"], tmp_path / "native", tokenizer={"identifier": None})
    with pytest.raises(
        UsageError, match="names no tokenizer that can be found .*; copy its files into the folder"
    ):
        load_native(folder)
    (folder / "model.pt").write_bytes(b"no weights")
    shutil.copytree(tmp_path / "Qwen2-7B", folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="model.pt is not readable"):
        load_native(folder)
    (folder / "config.yaml").write_text("model: [")
    with pytest.raises(ValueError, match="config.yaml is not readable"):
        reads(folder)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        ({"block_type": "moe"}, "block_type = 'moe' is not supported for Molmo"),
        ({"norm_after": True}, "is no decoder that is known"),
        ({"layer_norm_type": "default"}, "layer_norm_type = 'default' is not supported"),
        ({"image_pooling_2d": "none"}, "image_pooling_2d = 'none' is not supported"),
        (
            {"vision_backbone": VISION | {"image_model_type": "siglip"}},
            "image_model_type = 'siglip' is not supported",
        ),
        ({"vision_backbone": VISION | {"image_num_pos": 50}}, "do not fit together"),
    ],
)
def test_what_is_not_supported_is_said_in_a_line(folders, tmp_path, config, message):
    folder = tmp_path / "m"
    shutil.copytree(folders["molmo-d"], folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | config)
    )
    with pytest.raises(UsageError, match=message) as error:
        common.load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lost, message",
    [
        (
            "transformer.blocks.1.att_proj.bias",
            "3 parameters are in no file, such as language_model.layers.1.self_attn.k_proj.bias",
        ),
        (
            "transformer.wte.new_embedding",
            "parameters have no place in this model, such as transformer.wte.embedding",
        ),
        ("vision_backbone.pad_embed", "1 parameters are in no file, such as connector.pad_embed"),
    ],
)
def test_a_parameter_that_no_file_fills_is_named(folders, tmp_path, lost, message):
    folder = tmp_path / "m"
    shutil.copytree(folders["molmo-d"], folder)
    for file in folder.glob("*.safetensors"):
        save_file(
            {key: value for key, value in load_file(file).items() if key != f"model.{lost}"}, file
        )
    with pytest.raises(UsageError, match=message):
        common.load_model(folder)


def test_a_tokenizer_with_other_ids_is_refused(folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders["molmo-d"], folder)
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(list(EXTRA), special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="the ids of <im_start>, .* are .*, wanted"):
        common.load_model(folder)

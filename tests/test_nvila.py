"""NVILA from published folders: the same numbers as a forward pass written out here from the
published facts, the prompt's layout, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Qwen2Config, SiglipVisionConfig

import common
from tests.random_models.nvila import MODELS
from vlmdiag import families as models
from vlmdiag.cli import UsageError
from vlmdiag.families import llava_original, nvila
from vlmdiag.families.nvila_images import closest_tiling
from vlmdiag.families.nvila_model import Nvila, NvilaConfig
from vlmdiag.model.selfcheck import noise_picture
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy.gradients import trace

QUESTION = "Is there a red circle in the image?"
SIZES = [(300, 180), (70, 230), (100, 100)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("nvila")
    return {name: build(root / name) for name, build in MODELS.items()}


@pytest.fixture(scope="module")
def load(folders):
    loaded = {name: common.load_model(folder) for name, folder in folders.items()}
    return loaded.get


def encode(vlm, size, question=QUESTION):
    return vlm.encode([Sample("0", None, question)], [noise_picture(size)])


# --- the model a second time, from the files ------------------------------------------------------


def norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))


def rms(x, weight, eps=1e-6):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def siglip(state, pixels, heads=4, layer=-2):
    """Hidden states of one tile (3, s, s), a list over layers."""
    kernel = state["vision_model.embeddings.patch_embedding.weight"]
    side = pixels.shape[1] // 14
    patches = [
        pixels[:, 14 * i : 14 * i + 14, 14 * j : 14 * j + 14]
        for i in range(side)
        for j in range(side)
    ]
    x = (
        torch.stack([(kernel * patch).sum((1, 2, 3)) for patch in patches])
        + state["vision_model.embeddings.patch_embedding.bias"]
    )
    x = x + state["vision_model.embeddings.position_embedding.weight"]
    states = [x]
    while f"vision_model.encoder.layers.{len(states) - 1}.layer_norm1.weight" in state:
        weights = {
            key.split(f"layers.{len(states) - 1}.")[1]: value
            for key, value in state.items()
            if f"encoder.layers.{len(states) - 1}." in key
        }
        y = norm(x, weights, "layer_norm1", 1e-6)
        q, k, v = (linear(y, weights, f"self_attn.{name}_proj") for name in "qkv")
        width = q.shape[-1] // heads
        out = [
            ((q[:, s] @ k[:, s].T / math.sqrt(width)).softmax(-1) @ v[:, s])
            for s in (slice(h * width, h * width + width) for h in range(heads))
        ]
        x = x + linear(torch.cat(out, -1), weights, "self_attn.out_proj")
        y = linear(norm(x, weights, "layer_norm2", 1e-6), weights, "mlp.fc1")
        x = x + linear(F.gelu(y, approximate="tanh"), weights, "mlp.fc2")
        states.append(x)
    return states[layer]


def qwen2(state, x, heads=4, shared=2):
    """Logits at the last position of embeddings x (T, d)."""
    length = len(x)
    layer = 0
    # head width 16: pairs (j, j + 8)
    angle = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(8) / 8)[None]

    def turn(vectors):
        a = vectors[:, :8]
        b = vectors[:, 8:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    while f"model.layers.{layer}.input_layernorm.weight" in state:
        weights = {
            key.removeprefix(f"model.layers.{layer}."): value
            for key, value in state.items()
            if key.startswith(f"model.layers.{layer}.")
        }
        y = rms(x, weights["input_layernorm.weight"])
        q, k, v = (linear(y, weights, f"self_attn.{name}_proj") for name in "qkv")
        out = []
        for head in range(heads):
            at = slice(16 * head, 16 * head + 16)
            kv = slice(16 * (head * shared // heads), 16 * (head * shared // heads) + 16)
            scores = turn(q[:, at]) @ turn(k[:, kv]).T / 4
            scores[torch.ones(length, length).triu(1).bool()] = -math.inf
            out.append(scores.softmax(-1) @ v[:, kv])
        x = x + linear(torch.cat(out, -1), weights, "self_attn.o_proj")
        y = rms(x, weights["post_attention_layernorm.weight"])
        x = x + linear(
            F.silu(linear(y, weights, "mlp.gate_proj")) * linear(y, weights, "mlp.up_proj"),
            weights,
            "mlp.down_proj",
        )
        layer += 1
    return (
        rms(x[-1], state["model.norm.weight"])
        @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T
    )


def connect(state, plane, factor, columns_first=False, channels_by_column=False):
    """One tile's plane (side, side, c) -> its tokens, block by block."""
    side = plane.shape[0]
    width = plane.shape[2]
    count = math.ceil(side / factor)
    tokens = []
    for i in range(count):
        for j in range(count):
            i_, j_ = (j, i) if columns_first else (i, j)
            block = torch.zeros(factor, factor, width)
            inside = plane[i_ * factor : (i_ + 1) * factor, j_ * factor : (j_ + 1) * factor]
            block[: inside.shape[0], : inside.shape[1]] = inside
            tokens.append((block.transpose(0, 1) if channels_by_column else block).reshape(-1))
    x = norm(torch.stack(tokens), state, "layers.1", 1e-5)
    if factor == 2:
        return linear(F.gelu(linear(x, state, "layers.2")), state, "layers.4")
    x = norm(F.gelu(linear(x, state, "layers.2")), state, "layers.4", 1e-5)
    return linear(F.gelu(linear(x, state, "layers.5")), state, "layers.7")


def area(plane, height, width):
    """(h, w, c) -> (height, width, c): each cell the mean of the cells that it touches."""
    h, w, _ = plane.shape

    def span(i, old, new):
        return slice(i * old // new, -(-(i + 1) * old // new))

    cells = [
        plane[span(i, h, height), span(j, w, width)].mean((0, 1))
        for i in range(height)
        for j in range(width)
    ]
    return torch.stack(cells).unflatten(0, (height, width))


def tiling(size, tile, least, most):
    """(columns, rows), by trying all that have as many tiles."""
    width, height = size
    closest, off = None, math.inf
    for count in range(least, most + 1):
        for columns in (n for n in range(1, count + 1) if count % n == 0):
            away = abs(width / height - columns / (count // columns))
            if away < off or (away == off and width * height > tile * tile * count / 2):
                closest, off = (columns, count // columns), away
    return closest


def pixels(picture, columns, rows, tile):
    """(rows, columns) nested lists of tiles (3, tile, tile) in [-1, 1]."""
    whole = (
        torch.tensor(
            np.asarray(picture.resize((columns * tile, rows * tile), Image.BICUBIC)),
            dtype=torch.float32,
        )
        / 127.5
        - 1
    )
    return [
        [
            whole[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile].permute(2, 0, 1)
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def by_hand(
    folder, tokenizer, picture, question, newline=True, layer=-2, reverse_scales=False, **order
):
    """Image features, a list per <image>, and the logits behind the prompt."""
    config = json.loads((folder / "config.json").read_text())
    tower, connector, llm = (
        load_file(folder / subfolder / "model.safetensors")
        for subfolder in ("vision_tower", "mm_projector", "llm")
    )
    tile = config["vision_tower_cfg"]["image_size"]
    side = tile // 14

    def read(own):
        return siglip(tower, own, layer=layer).view(side, side, -1)

    between = ""
    if config["image_aspect_ratio"] == "resize":
        features = [connect(connector, read(pixels(picture, 1, 1, tile)[0][0]), 3, **order)]
    elif config["image_aspect_ratio"] == "dynamic":
        columns, rows = tiling(picture.size, tile, 1, config["max_tiles"])
        tiles = [own for line in pixels(picture, columns, rows, tile) for own in line] + (
            pixels(picture, 1, 1, tile)[0] if rows * columns > 1 else []
        )
        features = [connect(connector, read(own), 3, **order) for own in tiles]
        between = "\n"
    else:
        columns, rows = tiling(picture.size, tile, 9, 12)
        planes = []
        splits = ((1, 1), (2, 2), (columns, rows))
        for c, r in splits:
            planes.append(
                torch.cat(
                    [
                        torch.cat([read(own) for own in line], 1)
                        for line in pixels(picture, c, r, tile)
                    ]
                )
            )
        columns, rows = splits[config["s2_resize_output_to_scale_idx"]]
        planes = [area(plane, rows * side, columns * side) for plane in planes]
        plane = torch.cat(planes[::-1] if reverse_scales else planes, -1)
        blocks = [
            [
                connect(
                    connector,
                    plane[r * side : (r + 1) * side, c * side : (c + 1) * side],
                    2,
                    **order,
                )
                for c in range(columns)
            ]
            for r in range(rows)
        ]
        half = side // 2
        features = [
            torch.cat(
                [torch.cat([block.view(half, half, -1) for block in line], 1) for line in blocks]
            ).flatten(0, 1)
        ]
    table = llm["model.embed_tokens.weight"]

    def text(string):
        return table[tokenizer(string, add_special_tokens=False)["input_ids"]]

    x = [text("<|im_start|>system\nYou are Tiny.<|im_end|>\n<|im_start|>user\n")]
    for own in features:
        x += [own, *([text("\n")] if newline else []), *([text(between)] if between else [])]
    x.append(text(f"{question}<|im_end|>\n<|im_start|>assistant\n"))
    return features, qwen2(llm, torch.cat(x))


@torch.inference_mode()
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("size", SIZES)
def test_features_and_logits_are_those_of_the_model_written_out_by_hand(folders, load, name, size):
    vlm = load(name)
    batch = encode(load(name), size)
    features, logits = by_hand(folders[name], vlm.tokenizer, noise_picture(size), QUESTION)
    computed = vlm.vision(batch).pooler_output[0]
    assert computed.shape == torch.cat(features).shape
    assert (computed - torch.cat(features)).abs().max() < 1e-4
    assert (prefill(vlm, batch).logits[0, -1] - logits).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize(
    "name, change",
    [
        ("nvila-lite", {"columns_first": True}),
        ("nvila-lite", {"channels_by_column": True}),
        ("nvila-lite", {"newline": False}),
        ("nvila-lite", {"layer": -1}),
        ("nvila-s2", {"columns_first": True}),
        ("nvila-s2", {"channels_by_column": True}),
        ("nvila-s2", {"reverse_scales": True}),
        ("nvila-s2", {"newline": False}),
    ],
)
def test_another_order_of_operations_is_told_apart(folders, load, name, change):
    vlm = load(name)
    batch = encode(load(name), SIZES[0])
    features, logits = by_hand(
        folders[name], vlm.tokenizer, noise_picture(SIZES[0]), QUESTION, **change
    )
    assert (prefill(vlm, batch).logits[0, -1] - logits).abs().max() > 1e-2
    assert ("newline" in change) == bool(
        (vlm.vision(batch).pooler_output[0] - torch.cat(features)).abs().max() < 1e-4
    )


def test_tower_and_connector_of_nvila_lite_8b_are_as_large_as_the_published_files():
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=1,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=151648,
    )
    config = NvilaConfig(text, tower, "mlp_downsample_3x3_fix", image_token_id=151649)
    with torch.device("meta"):
        model = Nvila(config)
    megabytes = [
        2 * sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for module in (model.vision_tower, model.mm_projector)
    ]
    # bfloat16
    assert [round(size) for size in megabytes] == [827, 122]
    assert (config.side, config.tokens) == (32, 11)
    assert model.lm_head.out_features == 151648
    assert len(model.get_input_embeddings().weight) == 151650


# --- tiles and prompt -----------------------------------------------------------------------------


def test_the_tiling_is_the_closest_one():
    rng = np.random.default_rng(0)
    for least, most in ((1, 12), (9, 12), (1, 6)):
        for width, height in rng.integers(20, 900, (150, 2)).tolist() + [
            (448, 448),
            (600, 600),
            (1000, 1000),
            (448 * 3, 448 * 2),
        ]:
            assert (
                closest_tiling((width, height), 448, least, most)
                == tiling((width, height), 448, least, most)[::-1]
            )
    assert closest_tiling((400, 200), 448, 1, 12) == (1, 2)
    assert closest_tiling((900, 900), 448, 1, 12) == (2, 2)
    assert closest_tiling((2000, 1000), 448, 1, 12) == (2, 4)
    assert closest_tiling((100, 100), 448, 9, 12) == (3, 3)


def test_the_prompt_is_laid_out_as_published(load):
    vlm = load("nvila-lite")
    batch = encode(load("nvila-lite"), SIZES[0])
    newline = vlm.tokenizer("\n", add_special_tokens=False)["input_ids"]
    tile = [vlm.image_token_id] * 9 + newline + newline  # the features' line break and the text's
    ids = batch.input_ids[0].tolist()
    spans = batch.spans(0)
    start = spans["vision"][0][0]
    assert ids[start : start + 7 * 11] == tile * 7
    assert vlm.image_token_id not in ids[start + 7 * 11 :]
    assert vlm.image_token_id >= vlm.model.lm_head.out_features, "no answer can hold it"
    assert vlm.tokenizer.decode(ids[slice(*spans["user"][0])]) == QUESTION
    assert vlm.tokenizer.decode(ids[slice(*spans["system"][0])]) == "You are Tiny."
    assert [end for _, end in spans["image_markup"]][-1] == start + 7 * 11 - 1, (
        "the last line break of the text is the template's"
    )
    single = encode(vlm, (100, 100)).input_ids[0].tolist()
    assert single.count(vlm.image_token_id) == 9, "no thumbnail beside a single tile"
    s2 = encode(load("nvila-s2"), SIZES[0]).input_ids[0].tolist()
    last = max(i for i, token in enumerate(s2) if token == load("nvila-s2").image_token_id)
    assert s2[last + 1] == newline[0] and vlm.tokenizer.decode(s2[last + 2 :]).startswith(QUESTION)


def test_boxes_end_where_their_tile_does(load):
    # 1 x 2 tiles of 8 x 8 patches of 14 pixels, then both as one
    grid = encode(load("nvila-lite"), (224, 112)).grids[0]
    assert grid.boxes[:3].tolist() == [[0, 0, 42, 42], [42, 0, 84, 42], [84, 0, 112, 42]]
    assert grid.boxes[9].tolist() == [112, 0, 154, 42]
    assert grid.boxes[18].tolist() == [0, 0, 84, 42]
    assert grid.boxes[-1].tolist() == [168, 84, 224, 112]
    # 3 x 3 tiles of 4 x 4 patches, 2 x 2 each
    plane = encode(load("nvila-s2"), (168, 168)).grids[0]
    assert plane.shape == (6, 6)
    assert plane.boxes[7].tolist() == [28, 28, 56, 56]
    assert plane.boxes[2].tolist() == [56, 0, 84, 28]


def made_of(run):
    """Positions in the tower's output that each vision token depends on, by its gradient."""
    outputs = [block.output for block in run.tower.blocks]
    for token in run.tower.pooled:
        reached = [
            gradient
            for gradient in torch.autograd.grad(
                token.sum(), outputs, retain_graph=True, allow_unused=True
            )
            if gradient is not None
        ]
        assert len(reached) == 1, "the feature layer alone"
        yield (reached[0].flatten(0, 1).norm(dim=-1) > 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_a_token_of_s2_is_made_of_patches_of_all_scales(load, monkeypatch, scale):
    vlm = load("nvila-s2")
    for config in (vlm.model.config, vlm.processor.config):
        monkeypatch.setattr(config, "output_scale", scale)
    # 2 x 5 tiles of 4 x 4 patches, behind 1 and 4 tiles
    run = trace(vlm, encode(vlm, (300, 120)), [20])
    of_tokens = [sorted(patches[patches >= 0].tolist()) for patches in run.tower.sources]
    assert of_tokens == list(made_of(run))
    assert len(of_tokens) == [4, 16, 40][scale]
    assert len(run.tower.blocks[0].input) == 1 + 4 + 10
    assert all(
        patches[0] < 16 <= patches[-1]
        and any(16 <= patch < 80 for patch in patches)
        and patches[-1] >= 80
        for patches in of_tokens
    )


def test_a_token_at_a_border_is_made_of_fewer_patches(load):
    # 1 x 2 tiles and both as one, 8 x 8 patches each
    sources = trace(load("nvila-lite"), encode(load("nvila-lite"), (224, 112)), [20]).tower.sources
    assert [int((patches >= 0).sum()) for patches in sources] == [9, 9, 6, 9, 9, 6, 6, 6, 4] * 3
    assert sorted(sources[11][sources[11] >= 0].tolist()) == [
        64 + row * 8 + column for row in range(3) for column in (6, 7)
    ]


@pytest.mark.parametrize("name", list(MODELS))
def test_relevancy_through_the_tower_is_shared_and_not_multiplied(load, name):
    """A patch that makes several tokens shares what it gets: a tower that mixes nothing leaves the
    sum as it is."""
    vlm = load(name)
    run = trace(vlm, encode(vlm, SIZES[0]), [20])
    run.tower.carry = lambda rows, gradient, tile, budget: rows
    image = torch.rand(1, 2, len(run.features), generator=torch.Generator().manual_seed(0))
    cells, _ = attribution.onto_patches(run.tower, image, None)
    assert torch.allclose(cells.sum(-1), image.sum(-1))
    assert torch.allclose(cells, image) == (name == "nvila-lite")


# --- configs --------------------------------------------------------------------------------------


def test_nvila_and_llava_in_their_own_layouts_are_told_apart(folders):
    raw = json.loads((folders["nvila-lite"] / "config.json").read_text())
    llava = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip",
        "mm_projector_type": "mlp2x_gelu",
    }
    assert nvila.is_nvila(raw) and not nvila.is_nvila(llava)
    assert llava_original.is_original(llava) and llava_original.is_original(raw), (
        "NVILA's configs have mm_* keys too, so it has to come first"
    )
    assert models.find_family(raw).name == "nvila"
    assert models.find_family(raw | {"model_type": "vila"}).name == "nvila"
    assert models.find_family(llava).name == "llava_original"


def changed(source, target, **config):
    shutil.copytree(source, target)
    (target / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | config)
    )
    return target


@torch.inference_mode()
@pytest.mark.parametrize(
    "name, config, tokens, shape",
    [
        ("nvila-s2", {"s2_resize_output_to_scale_idx": 0}, 4, (2, 2)),
        ("nvila-s2", {"s2_resize_output_to_scale_idx": 1}, 16, (4, 4)),
        ("nvila-lite", {"image_aspect_ratio": "resize"}, 9, None),
    ],
)
def test_other_scales_and_a_picture_in_one_piece(folders, tmp_path, name, config, tokens, shape):
    folder = changed(folders[name], tmp_path / "m", **config)
    vlm = common.load_model(folder)
    batch = encode(vlm, SIZES[0])
    features, logits = by_hand(folder, vlm.tokenizer, noise_picture(SIZES[0]), QUESTION)
    assert (vlm.vision(batch).pooler_output[0] - torch.cat(features)).abs().max() < 1e-4
    assert (prefill(vlm, batch).logits[0, -1] - logits).abs().max() < 1e-4
    grid = batch.grids[0]
    assert len(grid.boxes) == tokens
    assert grid.shape == shape
    assert grid.boxes[0, :2].tolist() == [0, 0]
    assert grid.boxes[-1, 2:].tolist() == list(SIZES[0])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio = 'pad' is not supported"),
        ({"s2": True}, "s2 = True is not supported"),
        ({"chat_template": "mistral"}, "chat_template = 'mistral' is not supported"),
        (
            {"image_encoder": json.dumps(nvila.ENCODER | {"end_tokens": None})},
            "image_encoder = .* is not supported",
        ),
        (
            {"image_aspect_ratio": "dynamic_s2", "s2_scales": "60,120"},
            "are not whole multiples of the tower's 112 pixels",
        ),
    ],
)
def test_what_is_not_supported_is_said_in_a_line(folders, tmp_path, config, message):
    with pytest.raises(UsageError, match=message) as error:
        common.load_model(changed(folders["nvila-lite"], tmp_path / "m", **config))
    assert "\n" not in str(error.value)


def test_a_parameter_that_no_file_fills_is_named(folders, tmp_path):
    folder = changed(folders["nvila-lite"], tmp_path / "m")
    file = folder / "mm_projector" / "model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if key != "layers.5.bias"}, file)
    with pytest.raises(
        UsageError, match="1 parameters are in no file, such as mm_projector.5.bias"
    ):
        common.load_model(folder)
    save_file(state | {"layers.9.bias": torch.ones(3)}, file)
    with pytest.raises(
        UsageError, match="1 parameters have no place in this model, such as mm_projector.9.bias"
    ):
        common.load_model(folder)
    shutil.rmtree(folder / "vision_tower")
    with pytest.raises(UsageError, match="no vision_tower/config.json"):
        common.load_model(folder)


def test_roborefer_is_read_without_its_depth_part(folders, load, tmp_path):
    folder = changed(
        folders["nvila-lite"],
        tmp_path / "m",
        enable_depth=True,
        use_depth_tower=True,
        chat_template="qwen2",
    )
    shutil.copytree(folder / "vision_tower", folder / "depth_tower")
    shutil.copytree(folder / "mm_projector", folder / "depth_projector")
    vlm = common.load_model(folder, self_check=False)
    plain = load("nvila-lite")
    batch = encode(vlm, SIZES[0])
    assert batch.prompts[0].startswith(
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n<image>"
    )
    assert torch.equal(
        vlm.vision(batch).pooler_output[0], plain.vision(encode(plain, SIZES[0])).pooler_output[0]
    )


def test_weights_in_shards_are_read(folders, load, tmp_path):
    folder = changed(folders["nvila-s2"], tmp_path / "m")
    file = folder / "llm" / "model.safetensors"
    state = load_file(file)
    halves = {
        f"model-0000{i + 1}-of-00002.safetensors": {key: state[key] for key in sorted(state)[i::2]}
        for i in range(2)
    }
    for name, half in halves.items():
        save_file(half, folder / "llm" / name)
    index = {
        "metadata": {},
        "weight_map": {key: name for name, half in halves.items() for key in half},
    }
    (folder / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    vlm = common.load_model(folder, self_check=False)
    whole = load("nvila-s2")
    assert all(
        torch.equal(value, whole.model.state_dict()[name])
        for name, value in vlm.model.state_dict().items()
    )

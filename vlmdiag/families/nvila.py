"""NVILA and NVILA-Lite (arXiv 2412.04468): SigLIP reads tiles of the picture, a connector folds 2 x
2 or 3 x 3 patches into one vision token, Qwen2 reads them. Published as config.json with the
folders llm/, vision_tower/ and mm_projector/, each with its own config and safetensors (tokenizer
in llm/).

    llm           model.{embed_tokens,layers,norm}, lm_head (not there where it is tied)
                  Qwen2
    vision_tower  vision_model.{embeddings,encoder,post_layernorm}
                  SigLIP, features of layer -2, no CLS
    mm_projector  layers.{1,2,4} (2 x 2) or layers.{1,2,4,5,7} (3 x 3)
                  layer norms and linear layers

How the picture is cut stands in `image_aspect_ratio`:
    dynamic     (Lite) the picture is stretched to 1 to 12 tiles, as many columns and rows as come
                closest to its shape, and once more to a single tile if
                there are several. Every tile is an <image> in the prompt with a line break behind
                it: <image>\\n<image>\\n...Question.
    dynamic_s2  the picture as 1 x 1, 2 x 2 and 9 to 12 tiles of its shape; each scale is put
                together again, brought to the size of scale
                `s2_resize_output_to_scale_idx` by area means, and the three are the channels of one
                picture, which the connector reads tile by tile.
                One <image> in the prompt; its tokens go row by row over the whole picture.
    resize      one tile, one <image>.
The embedding of a line break stands behind the vision tokens of every <image>, as published. It is
the text's own embedding, so it is a token with that id here ("image_markup"), not a vision token.
Every vision token has a box; what the connector fills up with zeros at a tile's right and lower end
has none, so the last row and column of 3 x 3 tokens is 2 patches wide. Relevancy goes on through
the tower, as sources() says: a vision token is made of the patches of its block, the last row and
column of 3 x 3 tokens of fewer. With dynamic_s2 it is made of every patch of any scale that its
block's area means take, all alike: a coarse patch makes several tokens. SigLIP's blocks past the
feature layer are not read.

The system sentence is that of the tokenizer's template, of VILA's own where the config says
chat_template "qwen2". The prompt's <image> has an id past the LM head: the embedding table has rows
for it, the logits do not. RoboRefer (NVILA-Lite with a depth tower) is read without its depth part,
as it answers to a picture alone. VILA-1.5 (another text model, tokens of a tile column by column)
is refused.

Facts are those of the public VILA code at its NVILA release. Checked on small random models in this
layout, against a forward pass written apart from this file; tower and connector of NVILA-Lite-8B
have the size of the published files. Not checked, for want of the files: the published weights and
tokenizers; RoboRefer's; several GPUs."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, generic
from vlmdiag.families.assembled import IMAGE, Assembled, Expanding, assembled, longer
from vlmdiag.families.llava_original import read_weights
from vlmdiag.pictures.grid import PatchGrid, cells

ADDED = ("<vila/sentinel>", IMAGE, "<vila/video>")  # in the order in which VILA adds them
PARTS = ("llm", "vision_tower", "mm_projector")
FILES = tuple(
    f"{part}/{files}" for part in PARTS for files in ("*.json", "*.txt", "*.safetensors", "*.bin")
) + ("config.json",)
FACTORS = {
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}  # patches per token and side
TILINGS = ("dynamic", "dynamic_s2", "resize")
ENCODER = {
    "_target_": "llava.model.encoders.BasicImageEncoder"
}  # with its own settings, a line break behind the features and nothing before them
TEMPLATE = (
    "{{% if messages[0]['role'] != 'system' %}}{{{{ '<|im_start|>system\\n{sentence}<|im_end|>\\n'"
    " }}}}{{% endif %}}{{% for message in messages %}}{{{{ '<|im_start|>' ~ message['role'] ~ '\\n'"
    " ~ message['content'] ~ '<|im_end|>\\n' }}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{"
    " '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
QWEN2, VILA = (TEMPLATE.format(sentence="You are a helpful assistant" + end) for end in (".", ""))


# --- the model ------------------------------------------------------------------------------------


class NvilaConfig(PreTrainedConfig):
    """text_config, vision_config (SigLIP); connector: a key of FACTORS; feature_layer: index of the
    tower's hidden states; tiling: one of TILINGS; scales: sides of the S2 scales in pixels,
    output_scale the index of that whose size they get; min_tiles, max_tiles of the dynamic tiling.
    """

    model_type = "nvila"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        connector="mlp_downsample_3x3_fix",
        feature_layer=-2,
        tiling="dynamic",
        scales=(),
        output_scale=-1,
        min_tiles=1,
        max_tiles=12,
        image_token_id=0,
        **options,
    ):
        self.text_config, self.vision_config, self.connector, self.feature_layer = (
            text_config,
            vision_config,
            connector,
            feature_layer,
        )
        self.tiling, self.scales, self.output_scale, self.min_tiles, self.max_tiles = (
            tiling,
            list(scales),
            output_scale,
            min_tiles,
            max_tiles,
        )
        self.image_token_id = image_token_id
        super().__init__(**options)

    @property
    def side(self):
        """Patches on a tile's side."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens(self):
        """Vision tokens on a tile's side."""
        return -(-self.side // FACTORS[self.connector])

    def tiles(self, rows, columns):
        """(rows, columns) of tiles per scale of a picture whose finest scale has `rows` x
        `columns`."""
        return [(scale // self.scales[0],) * 2 for scale in self.scales[:-1]] + [(rows, columns)]


class Fold(nn.Module):
    """(n, side * side, c) patches -> (n, tokens, factor * factor * c): channels of a block's
    patches row by row, blocks row by row; zeros fill up what is missing to whole blocks at the
    right and lower end."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, patches):
        side, factor = math.isqrt(patches.shape[1]), self.factor
        missing = -side % factor
        plane = F.pad(patches.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        return (
            plane.unflatten(2, (-1, factor))
            .unflatten(1, (-1, factor))
            .transpose(2, 3)
            .flatten(3)
            .flatten(1, 2)
        )


def make_connector(kind, inside, outside):
    factor = FACTORS[kind]
    folded = factor * factor * inside
    if factor == 2:
        return nn.Sequential(
            Fold(2),
            nn.LayerNorm(folded),
            nn.Linear(folded, outside),
            nn.GELU(),
            nn.Linear(outside, outside),
        )
    middle = 3 * inside
    return nn.Sequential(
        Fold(3),
        nn.LayerNorm(folded),
        nn.Linear(folded, middle),
        nn.GELU(),
        nn.LayerNorm(middle),
        nn.Linear(middle, outside),
        nn.GELU(),
        nn.Linear(outside, outside),
    )


def stitched(tiles, rows, columns):
    """(rows * columns, side * side, c) tiles -> (rows * side, columns * side, c) one plane."""
    side = math.isqrt(tiles.shape[1])
    return (
        tiles.unflatten(1, (side, side))
        .unflatten(0, (rows, columns))
        .transpose(1, 2)
        .flatten(2, 3)
        .flatten(0, 1)
    )


def cut(plane, rows, columns):
    """The inverse of stitched()."""
    return (
        plane.unflatten(1, (columns, -1))
        .unflatten(0, (rows, -1))
        .transpose(1, 2)
        .flatten(2, 3)
        .flatten(0, 1)
    )


class Nvila(Assembled):
    """NVILA, see the module."""

    config_class = NvilaConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = SiglipVisionModel(config.vision_config)
        inside = config.vision_config.hidden_size * (
            len(config.scales) if config.tiling == "dynamic_s2" else 1
        )
        self.mm_projector = make_connector(config.connector, inside, config.text_config.hidden_size)
        self.post_init()

    def get_image_features(self, pixel_values, tile_grids, return_dict=True):
        """pixel_values (tiles of all pictures, 3, size, size), tile_grids (pictures, 2): rows and
        columns of each picture's finest tiles. pooler_output: a list of one (P, d) per tile, with
        dynamic_s2 per picture."""
        patches = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[
            self.config.feature_layer
        ]
        features = (
            self.scaled(patches, tile_grids.tolist())
            if self.config.tiling == "dynamic_s2"
            else self.mm_projector(patches).unbind()
        )
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=list(features))

    def scaled(self, patches, grids):
        """Features (P, d) per picture from the tiles of all its scales."""
        output, start = self.config.output_scale, 0
        for rows, columns in grids:
            splits, planes = self.config.tiles(rows, columns), []
            for split in splits:
                count = math.prod(split)
                planes.append(
                    stitched(patches[start : start + count], *split).permute(2, 0, 1)[None]
                )
                start += count
            size = planes[output].shape[-2:]
            plane = torch.cat(
                [
                    F.interpolate(plane.float(), size=size, mode="area").to(plane.dtype)
                    for plane in planes
                ],
                1,
            )[0].permute(1, 2, 0)
            yield stitched(self.mm_projector(cut(plane, *splits[output])), *splits[output]).flatten(
                0, 1
            )


# --- pictures and prompts -------------------------------------------------------------------------


def closest_tiling(size, tile, least, most):
    """(rows, columns), `least` to `most` tiles, whose shape is closest to a picture's `size`
    (width, height). Of two equally close ones, such as 1 x 1 and 2 x 2, the larger if the picture
    has more than half its pixels."""
    width, height = size
    tilings = sorted(
        (
            (rows, columns)
            for rows in range(1, most + 1)
            for columns in range(1, most + 1)
            if least <= rows * columns <= most
        ),
        key=math.prod,
    )
    best, off = (1, 1), math.inf
    for rows, columns in tilings:
        away = abs(width / height - columns / rows)
        if away < off or (away == off and width * height > 0.5 * tile * tile * rows * columns):
            best, off = (rows, columns), away
    return best


def tiles_of(image, rows, columns, tile):
    """The picture stretched to rows x columns tiles of `tile` pixels, row by row."""
    image = image.resize((columns * tile, rows * tile))
    corners = [(column * tile, row * tile) for row in range(rows) for column in range(columns)]
    return [image.crop((x, y, x + tile, y + tile)) for x, y in corners]


class NvilaProcessor(Expanding):
    """Tiles and prompts of a model with `config`; its image processor normalises one tile."""

    def __init__(self, tokenizer, image_processor, config):
        super().__init__(tokenizer, image_processor)
        self.config, self.chat_template = config, tokenizer.chat_template

    def picture(self, image):
        config, tile = self.config, self.config.vision_config.image_size
        least = (
            (config.scales[-1] // config.scales[0]) ** 2
            if config.tiling == "dynamic_s2"
            else config.min_tiles
        )
        rows, columns = (
            (1, 1)
            if config.tiling == "resize"
            else closest_tiling(image.size, tile, least, config.max_tiles)
        )
        splits, written, count = [(rows, columns)], IMAGE, config.tokens**2
        if config.tiling == "dynamic":
            splits += [(1, 1)] if rows * columns > 1 else []
            written = f"{IMAGE}\n" * sum(map(math.prod, splits))
        if config.tiling == "dynamic_s2":
            splits = config.tiles(rows, columns)
            count *= math.prod(splits[config.output_scale])
        tiles = [own for split in splits for own in tiles_of(image, *split, tile)]
        pixels = self.image_processor(images=tiles, return_tensors="pt")["pixel_values"]
        end = [(token, "") for token in self.tokenizer("\n", add_special_tokens=False)["input_ids"]]
        return (
            written,
            [(config.image_token_id, IMAGE)] * count + end,
            {"pixel_values": pixels, "tile_grids": torch.tensor([[rows, columns]])},
        )

    def apply_chat_template(self, messages, add_generation_prompt=False):
        plain = [
            {
                "role": m["role"],
                "content": "".join(
                    IMAGE if part["type"] == "image" else part["text"] for part in m["content"]
                ),
            }
            for m in messages
        ]
        return self.tokenizer.apply_chat_template(
            plain,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )


def averaged(plane, height, width):
    """(h, w) patch numbers -> (height, width, k) numbers of those that area means to that size
    take; 0 where there are fewer."""
    places = []
    for old, new in zip(plane.shape, (height, width), strict=True):
        first, end = torch.arange(new) * old // new, -(-(torch.arange(new) + 1) * old // new)
        at = first[:, None] + torch.arange(int((end - first).max()))
        places.append(torch.where(at < end[:, None], at, old))
    return F.pad(plane, (0, 1, 0, 1))[
        places[0][:, None, :, None], places[1][None, :, None, :]
    ].flatten(2)


def sources(vlm, size, inputs):
    """The patches of a token's block; with dynamic_s2 those of all scales that its area means
    take."""
    config, fold = vlm.model.config, Fold(FACTORS[vlm.model.config.connector])
    count = len(inputs["pixel_values"])
    numbers = torch.arange(1, count * config.side**2 + 1).view(
        count, -1, 1
    )  # 0 is what the connector fills up with
    if config.tiling != "dynamic_s2":
        return fold(numbers).flatten(0, 1).numpy() - 1
    splits = config.tiles(*inputs["tile_grids"][0].tolist())
    planes = [
        stitched(own, *split)[..., 0]
        for own, split in zip(
            numbers.split([math.prod(split) for split in splits]), splits, strict=True
        )
    ]
    shape, split = planes[config.output_scale].shape, splits[config.output_scale]
    plane = torch.cat([averaged(plane, *shape) for plane in planes], -1)
    found = stitched(fold(cut(plane, *split)), *split).flatten(0, 1).sort(-1).values
    found[:, 1:][found[:, 1:] == found[:, :-1]] = (
        0  # a coarse patch that several cells of a block take
    )
    found = found.sort(-1, descending=True).values
    return found[:, : int((found > 0).sum(-1).max())].numpy() - 1


def grid(vlm, size, inputs):
    """Blocks of factor x factor patches, cut at their tile's end. Tiles of `dynamic` one after the
    other, the whole picture as one tile last."""
    config, (rows, columns), (width, height) = (
        vlm.model.config,
        inputs["tile_grids"][0].tolist(),
        size,
    )
    side, count, reach = config.side, config.tokens, config.tokens * FACTORS[config.connector]
    if config.tiling == "dynamic_s2":
        rows, columns = config.tiles(rows, columns)[config.output_scale]

    def boxes(region):  # (count, count, 4)
        x0, y0, x1, y1 = region
        own = cells(
            count, count, (x0, y0, x0 + (x1 - x0) * reach / side, y0 + (y1 - y0) * reach / side)
        )
        return np.minimum(own, np.array([x1, y1, x1, y1]))

    tiles = np.array(
        [[boxes(region) for region in line] for line in cells(rows, columns, (0, 0, width, height))]
    )  # (rows, columns, count, count, 4)
    if config.tiling == "dynamic_s2":
        shape = (rows * count, columns * count) if reach == side else None
        return PatchGrid(tiles.transpose(0, 2, 1, 3, 4).reshape(-1, 4), shape, tuple(size))
    whole = [boxes((0, 0, width, height)).reshape(-1, 4)] if rows * columns > 1 else []
    return PatchGrid(
        np.concatenate([tiles.reshape(-1, 4), *whole]),
        (count, count) if rows * columns == 1 and reach == side else None,
        tuple(size),
    )


# --- reading a checkpoint -------------------------------------------------------------------------


def is_nvila(raw):
    """Whether a config.json (as a dict) is of this layout: it holds the configs of three folders.
    LLaVA's own layout, of the same model_type, has none."""
    return all(f"{part}_cfg" in raw for part in PARTS)


def folder_of(path):
    """The checkpoint's folder, fetched where `path` is a hub id."""
    return (
        Path(path)
        if Path(path).is_dir()
        else Path(snapshot_download(path, allow_patterns=list(FILES)))
    )


def read_config(path, raw):
    """NvilaConfig of the checkpoint in `path`. ValueError that says in one line what is not
    supported."""
    folder = folder_of(path)
    lacking = [part for part in PARTS if not (folder / part / "config.json").exists()]
    if lacking:
        raise ValueError(
            f"no {lacking[0]}/config.json: an NVILA checkpoint has the folders {', '.join(PARTS)}"
        )
    text, vision = (AutoConfig.from_pretrained(folder / part) for part in PARTS[:2])
    connector = json.loads((folder / "mm_projector" / "config.json").read_text()).get(
        "mm_projector_type"
    )
    tiling = raw.get("image_aspect_ratio") or "resize"
    template, encoder = raw.get("chat_template"), raw.get("image_encoder")
    for what, found, known in (
        ("the text model", text.model_type, ("qwen2",)),
        ("the vision tower", vision.model_type, ("siglip_vision_model",)),
        ("mm_projector_type", connector, tuple(FACTORS)),
        ("image_aspect_ratio", tiling, TILINGS),
        ("s2", bool(raw.get("s2")), (False,)),
        (
            "mm_vision_select_feature",
            raw.get("mm_vision_select_feature", "cls_patch"),
            ("cls_patch",),
        ),
        ("chat_template", template, (None, "qwen2")),
        (
            "image_encoder",
            json.loads(encoder) if isinstance(encoder, str) else encoder,
            (None, ENCODER),
        ),
    ):
        if found not in known:
            raise ValueError(
                f"{what} = {found!r} is not supported in NVILA's layout (only"
                f" {', '.join(map(repr, known))})"
            )
    vision.vision_use_head = False
    tied, text.tie_word_embeddings = text.tie_word_embeddings, False
    scales = raw.get("s2_scales") or ""
    scales = (
        sorted(map(int, scales.split(",") if isinstance(scales, str) else scales))
        if tiling == "dynamic_s2"
        else []
    )
    if tiling == "dynamic_s2" and (
        not scales or scales[0] != vision.image_size or any(scale % scales[0] for scale in scales)
    ):
        raise ValueError(
            f"s2_scales = {raw.get('s2_scales')!r} are not whole multiples of the tower's"
            f" {vision.image_size} pixels, itself first"
        )
    return NvilaConfig(
        text,
        vision,
        connector,
        raw.get("mm_vision_select_layer", -2),
        tiling,
        scales,
        raw.get("s2_resize_output_to_scale_idx", 0),
        raw.get("min_tiles") or 1,
        raw.get("max_tiles") or 12,
        tie_word_embeddings=False,
        original_tied=tied,
        original_template=template,
        dtype=raw.get("torch_dtype")
        or raw.get("dtype")
        or str(raw.get("model_dtype", "torch.float16")).removeprefix("torch."),
    )


def load_weights(folder, config):
    """State dict of Nvila(config) from the three folders."""
    state = read_weights(
        folder / "llm", lambda key: None if key.endswith("rotary_emb.inv_freq") else key
    )
    table = state.get("model.embed_tokens.weight")
    if table is not None:
        if config.original_tied:
            state["lm_head.weight"] = table
        state["model.embed_tokens.weight"] = longer(table, config.image_token_id + 1)
    state = {
        key if key.startswith("lm_head.") else "language_model." + key.removeprefix("model."): value
        for key, value in state.items()
    }
    tower = lambda key: (
        None
        if ".head." in key or key.endswith("position_ids")
        else "vision_tower." + key.removeprefix("vision_model.")
    )
    return (
        state
        | read_weights(folder / "vision_tower", tower)
        | read_weights(
            folder / "mm_projector", lambda key: "mm_projector." + key.removeprefix("layers.")
        )
    )


def load(
    path,
    config,
    dtype,
    device_map=None,
    vision_tower_path=None,
    conv_mode=None,
    trust_remote_code=False,
    quantization_config=None,
):
    if conv_mode is not None:
        raise UsageError(
            f"--conv_mode {conv_mode}: for checkpoints in LLaVA's original layout; {path} is in"
            " NVILA's: give --prompt_template"
        )
    folder = folder_of(path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    tokenizer.add_tokens(
        [token for token in ADDED if token not in tokenizer.get_vocab()], special_tokens=True
    )
    tokenizer.chat_template = (
        VILA if config.original_template == "qwen2" else tokenizer.chat_template or QWEN2
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = assembled(
        Nvila, config, load_weights(folder, config), dtype, device_map, quantization_config
    )
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")} - {None}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        sorted(ends),
        tokenizer.pad_token_id,
    )
    images = SiglipImageProcessorPil.from_pretrained(folder / "vision_tower")
    images.size = {
        "height": config.vision_config.image_size,
        "width": config.vision_config.image_size,
    }
    return model, NvilaProcessor(tokenizer, images, config)


def parts(model):
    decoder = model.language_model
    blocks = list(model.vision_tower.encoder.layers)
    return Parts(
        decoder,
        list(decoder.layers),
        decoder.norm,
        model.lm_head,
        model.vision_tower,
        model.mm_projector,
        vision_blocks=blocks,
    )


FAMILY = Family(
    name="nvila",
    model_types=("nvila", "vila"),
    recognises=is_nvila,
    read_config=read_config,
    load=load,
    parts=parts,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

"""NVILA and NVILA-Lite (arXiv 2412.04468): SigLIP reads tiles of the picture, a connector folds 2 x
2 or 3 x 3 patches into one vision token, Qwen2 reads them. Its classes and its processor are in
nvila_model.py and nvila_images.py. Published as config.json with the folders llm/, vision_tower/
and mm_projector/, each with its own config and safetensors (tokenizer in llm/).

    llm           model.{embed_tokens,layers,norm}, lm_head (not there where it is tied)
                  Qwen2
    vision_tower  vision_model.{embeddings,encoder,post_layernorm}
                  SigLIP, features of layer -2, no CLS
    mm_projector  layers.{1,2,4} (2 x 2) or layers.{1,2,4,5,7} (3 x 3)
                  layer norms and linear layers

How the picture is cut stands in `image_aspect_ratio`:

    dynamic     (Lite) the picture is stretched to 1 to 12 tiles, as many columns and rows as come
                closest to its shape, and once more to a single tile if there are several. Every
                tile is an <image> in the prompt with a line break behind it:
                <image>\\n<image>\\n...Question.
    dynamic_s2  the picture as 1 x 1, 2 x 2 and 9 to 12 tiles of its shape; each scale is put
                together again, brought to the size of scale `s2_resize_output_to_scale_idx` by area
                means, and the three are the channels of one picture, which the connector reads tile
                by tile. One <image> in the prompt; its tokens go row by row over the whole picture.
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

Facts are those of the public VILA code at its NVILA release. Tested on small random models in this
layout, against a forward pass written apart from these files; tower and connector of NVILA-Lite-8B
have the size of the published files. Not tested: we had no published weights or tokenizers, nor
RoboRefer's; several GPUs.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmdiag.families import Family, Parts, generic
from vlmdiag.families.assembled import IMAGE, assembled, complete_embeddings
from vlmdiag.families.files import folder_of, read_weights
from vlmdiag.families.nvila_images import NvilaProcessor
from vlmdiag.families.nvila_model import FACTORS, Fold, Nvila, NvilaConfig, cut, stitched
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.families.files import State
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM

ADDED = ("<vila/sentinel>", IMAGE, "<vila/video>")  # in the order in which VILA adds them
FOLDERS = ("llm", "vision_tower", "mm_projector")
ENDINGS = ("*.json", "*.txt", "*.safetensors", "*.bin")
FILES = (*(f"{folder}/{ending}" for folder in FOLDERS for ending in ENDINGS), "config.json")
TILINGS = ("dynamic", "dynamic_s2", "resize")
# with its own settings, a line break behind the features and nothing before them
ENCODER = {"_target_": "llava.model.encoders.BasicImageEncoder"}
TEMPLATE = (
    "{{% if messages[0]['role'] != 'system' %}}"
    "{{{{ '<|im_start|>system\\n{sentence}<|im_end|>\\n' }}}}"
    "{{% endif %}}"
    "{{% for message in messages %}}"
    "{{{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
QWEN2 = TEMPLATE.format(sentence="You are a helpful assistant.")
VILA = TEMPLATE.format(sentence="You are a helpful assistant")


# --- the grid, and what a vision token is made of -------------------------------------------------


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Blocks of factor x factor patches, cut at their tile's end. Tiles of `dynamic` one after the
    other, the whole picture as one tile last."""
    config = vlm.model.config
    rows, columns = inputs["tile_grids"][0].tolist()
    count = config.tokens
    if config.tiling == "dynamic_s2":
        rows, columns = config.tiles(rows, columns)[config.output_scale]
    tiles = [boxes_of_tile(config, region) for region in generic.regions(rows, columns, size)]
    by_tile = np.array(tiles).reshape(rows, columns, count, count, 4)
    is_whole = count * config.factor == config.side  # nothing is filled up at a tile's end
    if config.tiling == "dynamic_s2":
        shape = (rows * count, columns * count) if is_whole else None
        return PatchGrid(by_tile.transpose(0, 2, 1, 3, 4).reshape(-1, 4), shape, size)
    boxes = by_tile.reshape(-1, 4)
    if rows * columns > 1:
        whole = boxes_of_tile(config, (0, 0, *size))
        return PatchGrid(np.concatenate([boxes, whole.reshape(-1, 4)]), None, size)
    return PatchGrid(boxes, (count, count) if is_whole else None, size)


def boxes_of_tile(config: NvilaConfig, region: Region) -> Float[np.ndarray, "count count 4"]:
    """Boxes of the vision tokens of a tile that shows a region of the picture."""
    count = config.tokens
    reach = count * config.factor  # patches along a side, with those that are filled up
    x0, y0, x1, y1 = region
    end_x = x0 + (x1 - x0) * reach / config.side
    end_y = y0 + (y1 - y0) * reach / config.side
    boxes = cells(count, count, (x0, y0, end_x, end_y))
    return np.minimum(boxes, np.array([x1, y1, x1, y1]))


def averaged(plane: Int[Tensor, "h w"], height: int, width: int) -> Int[Tensor, "height width k"]:
    """The patch numbers of a plane that area means to that size take; 0 where there are fewer."""
    places = []
    for old, new in zip(plane.shape, (height, width), strict=True):
        first = torch.arange(new) * old // new
        end = -(-(torch.arange(new) + 1) * old // new)
        at = first[:, None] + torch.arange(int((end - first).max()))
        places.append(torch.where(at < end[:, None], at, old))
    padded = F.pad(plane, (0, 1, 0, 1))
    return padded[places[0][:, None, :, None], places[1][None, :, None, :]].flatten(2)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """The patches of a token's block; with dynamic_s2 those of all scales that its area means
    take."""
    config = vlm.model.config
    fold = Fold(config.factor)
    count = len(inputs["pixel_values"])
    # 0 is what the connector fills up with
    numbers = torch.arange(1, count * config.side**2 + 1).view(count, -1, 1)
    if config.tiling != "dynamic_s2":
        return fold(numbers).flatten(0, 1).numpy() - 1
    splits = config.tiles(*inputs["tile_grids"][0].tolist())
    of_scales = numbers.split([math.prod(split) for split in splits])
    planes = [
        stitched(of_scale, *split)[..., 0]
        for of_scale, split in zip(of_scales, splits, strict=True)
    ]
    height, width = planes[config.output_scale].shape
    split = splits[config.output_scale]
    plane = torch.cat([averaged(plane, height, width) for plane in planes], -1)
    taken = stitched(fold(cut(plane, *split)), *split).flatten(0, 1).sort(-1).values
    # a coarse patch that several cells of a block take counts once
    taken[:, 1:][taken[:, 1:] == taken[:, :-1]] = 0
    taken = taken.sort(-1, descending=True).values
    return taken[:, : int((taken > 0).sum(-1).max())].numpy() - 1


# --- config ---------------------------------------------------------------------------------------


def is_nvila(raw: Config) -> bool:
    """Whether a config.json is of this layout: it holds the configs of three folders. LLaVA's own
    layout, of the same model_type, has none."""
    return all(f"{folder}_cfg" in raw for folder in FOLDERS)


def read_config(path: str, raw: Config) -> NvilaConfig:
    """NvilaConfig of the checkpoint in `path`. ValueError that says in one line what is not
    supported."""
    folder = folder_of(path, FILES)
    lacking = [name for name in FOLDERS if not (folder / name / "config.json").exists()]
    if lacking:
        raise ValueError(
            f"no {lacking[0]}/config.json: an NVILA checkpoint has the folders {', '.join(FOLDERS)}"
        )
    text = AutoConfig.from_pretrained(folder / "llm")
    vision = AutoConfig.from_pretrained(folder / "vision_tower")
    projector = json.loads((folder / "mm_projector" / "config.json").read_text())
    connector = projector.get("mm_projector_type")
    tiling = raw.get("image_aspect_ratio") or "resize"
    refuse_unsupported(raw, text.model_type, vision.model_type, connector, tiling)
    vision.vision_use_head = False
    tied = text.tie_word_embeddings
    text.tie_word_embeddings = False
    model_dtype = str(raw.get("model_dtype", "torch.float16")).removeprefix("torch.")
    return NvilaConfig(
        text,
        vision,
        connector=connector,
        feature_layer=raw.get("mm_vision_select_layer", -2),
        tiling=tiling,
        scales=scales_of(raw, vision.image_size) if tiling == "dynamic_s2" else [],
        output_scale=raw.get("s2_resize_output_to_scale_idx", 0),
        min_tiles=raw.get("min_tiles") or 1,
        max_tiles=raw.get("max_tiles") or 12,
        tie_word_embeddings=False,
        original_tied=tied,
        original_template=raw.get("chat_template"),
        dtype=raw.get("torch_dtype") or raw.get("dtype") or model_dtype,
    )


def refuse_unsupported(
    raw: Config, text: str, vision: str, connector: str | None, tiling: str
) -> None:
    """ValueError for a part or a setting of another kind. text, vision: types of the models."""
    encoder = raw.get("image_encoder")
    if isinstance(encoder, str):
        encoder = json.loads(encoder)
    feature = raw.get("mm_vision_select_feature", "cls_patch")
    settings: list[tuple[str, object, tuple[object, ...]]] = [
        ("the text model", text, ("qwen2",)),
        ("the vision tower", vision, ("siglip_vision_model",)),
        ("mm_projector_type", connector, tuple(FACTORS)),
        ("image_aspect_ratio", tiling, TILINGS),
        ("s2", bool(raw.get("s2")), (False,)),
        ("mm_vision_select_feature", feature, ("cls_patch",)),
        ("chat_template", raw.get("chat_template"), (None, "qwen2")),
        ("image_encoder", encoder, (None, ENCODER)),
    ]
    for name, setting, supported in settings:
        if setting not in supported:
            raise ValueError(
                f"{name} = {setting!r} is not supported in NVILA's layout (only"
                f" {', '.join(map(repr, supported))})"
            )


def scales_of(raw: Config, image_size: int) -> list[int]:
    """Sides of the S2 scales in pixels, sorted; ValueError where the tower's tiles do not fill
    them."""
    given = raw.get("s2_scales") or ""
    scales = sorted(map(int, given.split(",") if isinstance(given, str) else given))
    if not scales or scales[0] != image_size or any(scale % scales[0] for scale in scales):
        raise ValueError(
            f"s2_scales = {raw.get('s2_scales')!r} are not whole multiples of the tower's"
            f" {image_size} pixels, itself first"
        )
    return scales


# --- weights, loading -----------------------------------------------------------------------------


def text_name(key: str) -> str | None:
    """The parameter of Nvila that one of llm/ is; None for a buffer that is computed."""
    if key.endswith("rotary_emb.inv_freq"):
        return None
    return key if key.startswith("lm_head.") else "language_model." + key.removeprefix("model.")


def tower_name(key: str) -> str | None:
    """The same for vision_tower/; None for the pooling head, which is not used."""
    if ".head." in key or key.endswith("position_ids"):
        return None
    return "vision_tower." + key.removeprefix("vision_model.")


def connector_name(key: str) -> str:
    """The same for mm_projector/."""
    return "mm_projector." + key.removeprefix("layers.")


def load_weights(folder: Path, config: NvilaConfig) -> State:
    """State dict of Nvila(config) from the three folders."""
    state = read_weights(folder / "llm", text_name)
    table = "language_model.embed_tokens.weight"
    rows = config.image_token_id + 1
    complete_embeddings(state, table, "lm_head.weight", rows, config.original_tied)
    state |= read_weights(folder / "vision_tower", tower_name)
    return state | read_weights(folder / "mm_projector", connector_name)


def make_tokenizer(folder: Path, template: str | None) -> PreTrainedTokenizerBase:
    """The text model's tokenizer with VILA's tokens and the chat template of that name."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    added = [token for token in ADDED if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(added, special_tokens=True)
    if template == "qwen2":
        tokenizer.chat_template = VILA
    else:
        tokenizer.chat_template = tokenizer.chat_template or QWEN2
    return tokenizer


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Nvila and its processor; ValueError for parameters that no file fills or that have no
    place."""
    generic.refuse_conv_mode(path, options, "NVILA's")
    folder = folder_of(path, FILES)
    tokenizer = make_tokenizer(folder, config.original_template)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = assembled(Nvila, config, load_weights(folder, config), options)
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = SiglipImageProcessorPil.from_pretrained(folder / "vision_tower")
    edge = config.vision_config.image_size
    images.size = {"height": edge, "width": edge}
    return model, NvilaProcessor(tokenizer, images, config)


def parts(model: PreTrainedModel) -> Parts:
    """The modules of Nvila."""
    return generic.decoder_parts(
        model.language_model,
        model.lm_head,
        model.vision_tower,
        model.mm_projector,
        vision_blocks=list(model.vision_tower.encoder.layers),
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

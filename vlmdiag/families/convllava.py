"""ConvLLaVA (arXiv 2405.15738): a ConvNeXt of five stages in place of LLaVA's ViT, one vision token
per 64 x 64 pixels of a padded square, then Vicuna.

The files are LLaVA's (`llava_original.py`: keys, config, tokenizer, prompts) without the tower,
which is a folder or hub id of its own in transformers' ConvNeXt layout: config.json,
preprocessor_config.json, weights with `embeddings.*`, `encoder.stages.*`. It is taken from
--vision_tower_path, from `vision_tower/` in the checkpoint, where the authors' training writes the
trained one, from the folder that `mm_vision_tower` names, from one of that name beside the
checkpoint, or from the hub. A tower that is in the checkpoint itself has its weights from there. A
config is ours where the tower's name holds "convnext" or its folder's config is of that type. With
four stages the same holds at 32 pixels.

Pictures of 768, 1024 or 1536 pixels, padded to a square with the mean colour, give 144, 256 or 576
tokens, row by row: the last stage's output as it is, without the tower's final norm (the authors'
own files lack part of it), through two linear layers with a GELU. `mm_vision_select_layer` -2 means
that the last block of the last stage is left out; `mm_vision_resolution` above 256 is the picture's
side, else the tower's preprocessing has it. A cell's box is what its convolutions stride over; 7 x
7 convolutions at every stage see far around it. There is no attention in the tower, so relevancy
stops at its cells.

Tested on small random models written in this layout, against a forward written out by hand from the
files' keys. Not tested: we had no published weights or configs; that their preprocessing is CLIP's
with `size` and `crop_size` of one side; a download from the hub; several GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, ConvNextModel, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, generic, llava_original
from vlmdiag.families.assembled import assembled, complete_embeddings, without
from vlmdiag.families.files import fetch, folder_of, is_hub_id, read_weights
from vlmdiag.families.llava import grid
from vlmdiag.families.llava_conversations import IMAGE, MARKUP, chat_template, conversation
from vlmdiag.families.llava_original import LAYERS, TOWER

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import (
        BaseImageProcessor,
        ConvNextConfig,
        LlavaConfig,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Loaded, LoadOptions
    from vlmdiag.families.files import State

# mm_vision_select_layer -> blocks of the last stage that are left out
SELECTED = {-1: 0, -2: 1}


def recognises(raw: Config) -> bool:
    """Whether a config.json is LLaVA's with a ConvNeXt tower, by the tower's name or by the config
    of the folder it names."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(name, str) or not llava_original.is_original(raw):
        return False
    of_tower = Path(name) / "config.json"
    if of_tower.exists():
        return json.loads(of_tower.read_text()).get("model_type") == "convnext"
    return "convnext" in Path(name).name.lower()


# --- the model ------------------------------------------------------------------------------------


class ConvTower(ConvNextModel):
    """ConvNeXt whose hidden_states are (cells,): the last stage's output (B, rows * columns, d) in
    row-major order, not normed."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        del self.layernorm

    def forward(
        self, pixel_values: Float[Tensor, "B c height width"], **_: object
    ) -> BaseModelOutputWithPooling:
        """The cells, as LLaVA's class reads them."""
        plane = self.encoder(self.embeddings(pixel_values)).last_hidden_state
        cells = plane.flatten(2).transpose(1, 2)  # (B, d, rows, columns) -> (B, rows * columns, d)
        return BaseModelOutputWithPooling(last_hidden_state=cells, hidden_states=(cells,))


class ConvLlava(llava_original.OriginalLlava):
    """LLaVA with that tower."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model.vision_tower = ConvTower(config.vision_config)
        self.post_init()


# --- files ----------------------------------------------------------------------------------------


def find_tower(
    path: str, folder: Path, raw: Config, vision_tower_path: str | None
) -> tuple[Path, ConvNextConfig]:
    """The tower's folder and its config; UsageError that names the places looked at."""
    tower, looked = llava_original.find_tower(path, raw, vision_tower_path)
    name = llava_original.name_of_tower(raw, vision_tower_path)
    if not vision_tower_path:
        trained = folder / "vision_tower"
        looked = [str(trained), *looked]
        if (trained / "config.json").exists():
            tower = trained
    if tower is None and is_hub_id(name):
        try:
            tower = fetch(name)
        except (OSError, ValueError) as error:
            looked.append(f"the hub ({type(error).__name__})")
    if tower is None:
        raise UsageError(
            f"{path}: the vision tower {name!r} was not found at"
            f" {', '.join(looked) or 'any place'}; give --vision_tower_path"
        )
    config = AutoConfig.from_pretrained(tower)
    if config.model_type != "convnext":
        raise UsageError(
            f"{tower}: a ConvNeXt vision tower was wanted, this is of type {config.model_type!r}"
        )
    config.hidden_size = config.hidden_sizes[-1]  # what LLaVA's projector reads
    return tower, config


def tower_name(key: str) -> str | None:
    """The parameter of ConvLlava that a parameter of the tower's own file is; None for the final
    norm, which is not used."""
    if key.startswith(("layernorm.", "convnext.layernorm.")):
        return None
    return TOWER + key.removeprefix("convnext.")


def our_name(key: str) -> str | None:
    """The parameter of ConvLlava that a parameter of the checkpoint is: LLaVA's, the tower's as in
    its own file."""
    name = llava_original.hf_name(key)
    if name is not None and name.startswith(TOWER):
        return tower_name(name.removeprefix(TOWER))
    return name


def load_weights(folder: Path, tower_folder: Path, config: LlavaConfig) -> State:
    """State dict of ConvLlava(config), from the checkpoint's files and the tower's."""
    state = read_weights(folder, our_name)
    if not any(name.startswith(TOWER) for name in state):
        state |= read_weights(tower_folder, tower_name)
    state = _without_blocks(state, config.vision_config)
    if config.text_config.num_hidden_layers == 0:
        state = without(state, LAYERS)
    table = "model.language_model.embed_tokens.weight"
    rows = config.image_token_index + 1
    complete_embeddings(state, table, "lm_head.weight", rows, config.original_tied)
    return state


def _without_blocks(state: State, vision: ConvNextConfig) -> State:
    """`state` without the last stage's blocks past its depth, which are left out."""
    stage = f"{TOWER}encoder.stages.{vision.num_stages - 1}.layers."
    depth = vision.depths[-1]

    def is_left_out(name: str) -> bool:
        return name.startswith(stage) and int(name[len(stage) :].split(".")[0]) >= depth

    return {name: tensor for name, tensor in state.items() if not is_left_out(name)}


def set_side(images: BaseImageProcessor, raw: Config, stride: int) -> int:
    """Give the preprocessing the side that the config wants, and return the number of vision
    tokens; ValueError where a picture is not whole cells."""
    side = raw.get("mm_vision_resolution") or 0
    if side > 256:
        images.size = {"shortest_edge": side}
        images.crop_size = {"height": side, "width": side}
    height = images.crop_size["height"]
    width = images.crop_size["width"]
    if height % stride or width % stride:
        raise ValueError(
            f"pictures of {height} x {width} pixels are not whole cells of {stride} x {stride}"
        )
    return height * width // stride**2


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """ConvLlava and its processor; ValueError for parameters that no file fills or that have no
    place."""
    folder = folder_of(path)
    raw = config.original_layout
    layer = raw.get("mm_vision_select_layer", -1)
    if layer not in SELECTED:
        raise ValueError(
            f"mm_vision_select_layer = {layer!r} is not known for ConvNeXt (only -1, -2)"
        )
    name = conversation(raw, options.get("conv_mode"))
    tower_folder, vision = find_tower(path, folder, raw, options.get("vision_tower_path"))
    vision.depths = [*vision.depths[:-1], vision.depths[-1] - SELECTED[layer]]
    tokenizer = llava_original.make_tokenizer(folder)
    pad = raw.get("image_aspect_ratio") == "pad"
    images = llava_original.make_image_processor(folder, tower_folder, vision.image_size, pad)
    stride = vision.patch_size * 2 ** (vision.num_stages - 1)
    config.image_seq_length = set_side(images, raw, stride)
    config.vision_config = vision
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    config.vision_feature_layer = -1
    config.vision_feature_select_strategy = "full"
    state = load_weights(folder, tower_folder, config)
    model = assembled(ConvLlava, config, state, options)
    llava_original.set_eos(model, folder, raw, tokenizer)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=stride,
        vision_feature_select_strategy="full",
        chat_template=chat_template(name, bool(raw.get("mm_use_im_start_end"))),
    )
    return model, processor


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' Llava; no blocks, the tower has no
    attention."""
    base = model.model
    return generic.decoder_parts(
        base.language_model, model.lm_head, base.vision_tower, base.multi_modal_projector
    )


FAMILY = Family(
    name="convllava",
    model_types=(),
    recognises=recognises,
    read_config=llava_original.read_config,
    load=load,
    parts=parts,
    names=our_name,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=MARKUP,
    has=frozenset({"decoder-only", "causal", "rotary", "grid", "square-pad"}),
)

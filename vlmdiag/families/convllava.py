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

Checked on small random models written in this layout, against a forward written out by hand from
the files' keys. Not checked, for want of the files: the published weights and configs; that their
preprocessing is CLIP's with `size` and `crop_size` of one side; a download from the hub; several
GPUs.
"""

import json
from pathlib import Path

from transformers import AutoConfig, ConvNextModel, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, generic, llava_original
from vlmdiag.families.assembled import assembled, longer
from vlmdiag.families.llava import grid

SELECTED = {-1: 0, -2: 1}  # mm_vision_select_layer: blocks of the last stage that are left out


def recognises(raw):
    """Whether a config.json (as a dict) is LLaVA's with a ConvNeXt tower, by the tower's name or by
    the config of the folder it names."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(name, str) or not llava_original.is_original(raw):
        return False
    own = Path(name) / "config.json"
    if own.exists():
        return json.loads(own.read_text()).get("model_type") == "convnext"
    return "convnext" in Path(name).name.lower()


class ConvTower(ConvNextModel):
    """ConvNeXt whose hidden_states are (cells,): the last stage's output (B, rows * columns, d) in
    row-major order, not normed."""

    def __init__(self, config):
        super().__init__(config)
        del self.layernorm

    def forward(self, pixel_values, **_):
        cells = (
            self.encoder(self.embeddings(pixel_values)).last_hidden_state.flatten(2).transpose(1, 2)
        )
        return BaseModelOutputWithPooling(last_hidden_state=cells, hidden_states=(cells,))


class ConvLlava(llava_original.OriginalLlava):
    """LLaVA with that tower."""

    def __init__(self, config):
        super().__init__(config)
        self.model.vision_tower = ConvTower(config.vision_config)
        self.post_init()


def find_tower(path, folder, raw, vision_tower_path):
    """The tower's folder and its config; UsageError that names the places looked at."""
    found, looked = llava_original.find_tower(path, raw, vision_tower_path)
    name = str(vision_tower_path or raw.get("mm_vision_tower") or raw.get("vision_tower"))
    if not vision_tower_path:
        trained = folder / "vision_tower"
        found, looked = (
            (trained if (trained / "config.json").exists() else found),
            [str(trained), *looked],
        )
    if found is None:
        try:
            found = llava_original.fetch(name) if llava_original.is_hub_id(name) else None
        except (OSError, ValueError) as error:
            looked.append(f"the hub ({type(error).__name__})")
    if found is None:
        raise UsageError(
            f"{path}: the vision tower {name!r} was not found at"
            f" {', '.join(looked) or 'any place'}; give --vision_tower_path"
        )
    config = AutoConfig.from_pretrained(found)
    if config.model_type != "convnext":
        raise UsageError(
            f"{found}: a ConvNeXt vision tower was wanted, this is of type {config.model_type!r}"
        )
    config.hidden_size = config.hidden_sizes[-1]  # what LLaVA's projector reads
    return found, config


def tower_name(key):
    """The parameter of ConvLlava that a parameter of the tower's own file is; None for the final
    norm, which is not used."""
    return (
        None
        if key.startswith(("layernorm.", "convnext.layernorm."))
        else "model.vision_tower." + key.removeprefix("convnext.")
    )


def load_weights(folder, tower_folder, config):
    """State dict of ConvLlava(config), from the checkpoint's files and the tower's."""

    def rename(key):
        name = llava_original.hf_name(key)
        return (
            None
            if name is None
            else (
                tower_name(name.removeprefix("model.vision_tower."))
                if name.startswith("model.vision_tower.")
                else name
            )
        )

    state = llava_original.read_weights(folder, rename)
    if not any(name.startswith("model.vision_tower.") for name in state):
        state |= llava_original.read_weights(tower_folder, tower_name)
    depth = config.vision_config.depths[-1]
    last = f"model.vision_tower.encoder.stages.{config.vision_config.num_stages - 1}.layers."
    state = {
        name: tensor
        for name, tensor in state.items()
        if not (name.startswith(last) and int(name[len(last) :].split(".")[0]) >= depth)
    }
    if config.text_config.num_hidden_layers == 0:  # left out on purpose, see llava_original
        state = {
            name: tensor
            for name, tensor in state.items()
            if not name.startswith("model.language_model.layers.")
        }
    table = state.get("model.language_model.embed_tokens.weight")
    if table is not None:
        if config.original_tied:
            state["lm_head.weight"] = table
        state["model.language_model.embed_tokens.weight"] = longer(
            table, config.image_token_index + 1
        )
    return state


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
    """(ConvLlava, processor); ValueError for parameters that no file fills or that have no
    place."""
    folder, raw = (
        (Path(path) if Path(path).is_dir() else llava_original.fetch(path)),
        config.original_layout,
    )
    if raw.get("mm_vision_select_layer", -1) not in SELECTED:
        raise ValueError(
            f"mm_vision_select_layer = {raw['mm_vision_select_layer']!r} is not known for ConvNeXt"
            " (only -1, -2)"
        )
    name = llava_original.conversation(raw, conv_mode)
    tower_folder, vision = find_tower(path, folder, raw, vision_tower_path)
    vision.depths = [
        *vision.depths[:-1],
        vision.depths[-1] - SELECTED[raw.get("mm_vision_select_layer", -1)],
    ]
    tokenizer = llava_original.make_tokenizer(folder)
    images = llava_original.make_image_processor(
        folder, tower_folder, vision.image_size, raw.get("image_aspect_ratio") == "pad"
    )
    side, stride = (
        raw.get("mm_vision_resolution") or 0,
        vision.patch_size * 2 ** (vision.num_stages - 1),
    )
    if side > 256:
        images.size, images.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    shape = images.crop_size["height"], images.crop_size["width"]
    if any(side % stride for side in shape):
        raise ValueError(
            f"pictures of {shape[0]} x {shape[1]} pixels are not whole cells of {stride} x {stride}"
        )
    config.vision_config, config.image_token_index = (
        vision,
        tokenizer.convert_tokens_to_ids(llava_original.IMAGE),
    )
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    config.image_seq_length = shape[0] * shape[1] // stride**2
    state = load_weights(folder, tower_folder, config)
    model = assembled(ConvLlava, config, state, dtype, device_map, quantization_config)
    settings = folder / "generation_config.json"
    own = json.loads(settings.read_text()) if settings.exists() else {}
    model.generation_config.eos_token_id = own.get(
        "eos_token_id", raw.get("eos_token_id", tokenizer.eos_token_id)
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=stride,
        vision_feature_select_strategy="full",
        chat_template=llava_original.chat_template(name, bool(raw.get("mm_use_im_start_end"))),
    )
    return model, processor


def parts(model):
    base, text = model.model, model.model.language_model
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.lm_head,
        base.vision_tower,
        base.multi_modal_projector,
    )


FAMILY = Family(
    name="convllava",
    model_types=(),
    recognises=recognises,
    read_config=llava_original.read_config,
    load=load,
    parts=parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=llava_original.MARKUP,
    has=frozenset({"decoder-only", "causal", "rotary", "grid", "square-pad"}),
)

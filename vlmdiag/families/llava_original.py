"""LLaVA-1.5 checkpoints in their authors' own layout, read into transformers' Llava:
haotian-liu/LLaVA, and what was trained with it, such as kaist-ai/volcano and the two Beyond
Semantics models (user074, arXiv 2503.17349).

Such a folder is a Llama checkpoint whose config carries `mm_*` keys; its model_type is
`llava_llama` or plainly `llava`, which transformers would take for its own type and fill with
random weights. Weights are .bin or .safetensors files, one or several with an index:

    model.{embed_tokens,layers,norm}, lm_head       the decoder
    model.mm_projector[.projector].{0,2}            the connector, mlp2x_gelu
    model.mm_projector.norm.weight                  gain of the clipped RMS norm
                                                    (`normalize_projector`)
    model.vision_tower.vision_tower[.vision_model]  the CLIP tower, where it was saved with the rest

A tower that is not in the checkpoint comes from --vision_tower_path, from the folder that
`mm_vision_tower` names, from one of that name beside the checkpoint or from the hub; one that is in
the checkpoint has its weights from there and its config from the same places. The prompt is the
config's conversation template, else --conv_mode, else llava_v1 (system sentence with "a curious
human"). Keys of our own in the config: `conv_mode`, `normalize_projector_max_norm` and
`normalize_projector_scale` (1.22 and 0.83 are constants of the published code),
`multilayer_features` (tower layers where they are not at 3/6, 4/6, 5/6 and 6/6 of its depth, as the
published 12, 16, 20, 24 of 24).

The picture's placeholder gets an id past the LM head: the embedding table has a row for it, the
logits do not. Text on both sides of the picture is tokenized on its own, as the authors do: "\\n"
after the picture becomes the two tokens "▁", "<0x0A>".

Tested on small random models written in this layout, and on sentencepiece's own ids. Not tested: we
had no published weights of LLaVA-1.5, Volcano and the Beyond Semantics models; a download from the
hub; the v1 models with <im_start>. Generation stops at </s>: the '###' that llava_v0 models write
between turns is text to us.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, generic
from vlmdiag.families.assembled import assembled, complete_embeddings, without
from vlmdiag.families.files import (
    base_name,
    fetch,
    folder_of,
    generation_settings,
    is_hub_id,
    read_pickle,
    read_weights,
    renamed,
    weight_files,
)
from vlmdiag.families.llava import NormedLlava, grid, parts
from vlmdiag.families.llava_conversations import IMAGE, MARKUP, chat_template, conversation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Loaded, LoadOptions
    from vlmdiag.families.files import State

ARCHITECTURES = ("LlavaLlamaForCausalLM",)
MODEL_TYPES = ("llava_llama",)
LAYERS = "model.language_model.layers."
TOWER = "model.vision_tower."
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": CLIP_LARGE | {"image_size": 224},
}
# config key -> values that we can read
SUPPORTED: dict[str, tuple[object, ...]] = {
    "mm_projector_type": (None, "mlp2x_gelu"),
    "mm_vision_select_feature": (None, "patch"),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "pad", "square"),
    "add_spatial_coordinates": (None, False),
    "compression_after_projection": (None, False),
    "add_registers": (None, False),
}


def is_original(raw: Config) -> bool:
    """Whether a config.json is of this layout."""
    if raw.get("model_type") in MODEL_TYPES:
        return True
    if set(raw.get("architectures") or ()) & set(ARCHITECTURES):
        return True
    return any(key in raw for key in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size"))


class OriginalLlava(NormedLlava):
    """NormedLlava with as many input embeddings as the placeholder's id needs and the LM head as it
    was."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        text = config.text_config
        rows = config.image_token_index + 1
        if rows > text.vocab_size:
            self.model.language_model.embed_tokens = nn.Embedding(rows, text.hidden_size)
            self.post_init()


# --- config ---------------------------------------------------------------------------------------


def llama_config(raw: Config) -> LlamaConfig:
    """The Llama of a config.json that carries keys of a picture's model too."""
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"}
    return LlamaConfig(**{key: value for key, value in raw.items() if key in known})


def read_config(path: str, raw: Config) -> LlavaConfig:
    """The config of transformers' Llava for a config of this layout. What only the tower and the
    tokenizer say is filled in by load()."""
    for key, supported in SUPPORTED.items():
        if raw.get(key) not in supported:
            raise ValueError(
                f"{key} = {raw[key]!r} is not supported in the original LLaVA layout (only"
                f" {', '.join(map(repr, supported))})"
            )
    text = llama_config(raw)
    tied = text.tie_word_embeddings
    text.tie_word_embeddings = False
    beyond_semantics: dict[str, object] = {}
    if raw.get("normalize_projector"):
        beyond_semantics["vision_embed_norm"] = {
            "type": "rms_clip",
            "eps": 1e-6,
            "max_norm": raw.get("normalize_projector_max_norm", 1.22),
            "scale": raw.get("normalize_projector_scale", 0.83),
        }
    if raw.get("use_multilayer_features"):
        beyond_semantics["vision_feature_post_layernorm"] = True
    return LlavaConfig(
        text_config=text,
        projector_hidden_act="gelu",
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=list(ARCHITECTURES),
        dtype=raw.get("torch_dtype") or raw.get("dtype"),
        original_layout=raw,
        original_tied=tied,
        **beyond_semantics,
    )


def multilayer(raw: Config, depth: int) -> list[int]:
    """Tower layers (hidden-state indices) of the multi-layer variant: 12, 16, 20, 24 of 24."""
    sixths = (3, 4, 5, 6)
    return list(raw.get("multilayer_features") or [round(depth * n / 6) for n in sixths])


# --- the tower ------------------------------------------------------------------------------------


def name_of_tower(raw: Config, vision_tower_path: str | None) -> str:
    """What --vision_tower_path or the config names; "" where neither does."""
    return str(vision_tower_path or raw.get("mm_vision_tower") or raw.get("vision_tower") or "")


def find_tower(
    path: str | Path, raw: Config, vision_tower_path: str | None
) -> tuple[Path | None, list[str]]:
    """The tower's folder, or None where only a hub id is left, and the places that were looked
    at."""
    if vision_tower_path and (Path(vision_tower_path) / "config.json").exists():
        return Path(vision_tower_path), []
    if vision_tower_path and not is_hub_id(vision_tower_path):
        raise UsageError(
            f"--vision_tower_path {vision_tower_path}: no config.json there, so it is no vision"
            " tower"
        )
    name = name_of_tower(raw, None)
    if vision_tower_path or not name:
        return None, []
    # beside the checkpoint, and beside what its files link to
    parents = (
        Path(path).absolute().parent,
        (Path(path) / "tokenizer.model").resolve().parent.parent,
    )
    folders = [Path(name), *(parent / Path(name).name for parent in parents)]
    folders = list(dict.fromkeys(folders))
    with_config = (folder for folder in folders if (folder / "config.json").exists())
    return next(with_config, None), [str(folder) for folder in folders]


def tower_of(
    path: str, raw: Config, vision_tower_path: str | None, inside: bool
) -> tuple[Path | None, CLIPVisionConfig]:
    """Folder (None: its files are not needed) and config of the vision tower. inside: its weights
    are in the checkpoint, so a known tower's config is enough."""
    folder, looked = find_tower(path, raw, vision_tower_path)
    name = name_of_tower(raw, vision_tower_path)
    if folder is None and inside and name in TOWERS:
        return None, CLIPVisionConfig(**TOWERS[name])
    if folder is None and is_hub_id(name):
        try:
            folder = fetch(name)
        except (OSError, ValueError) as error:
            looked.append(f"the hub ({type(error).__name__})")
    if folder is None:
        missing = "the config of the vision tower" if inside else "the vision tower"
        raise UsageError(
            f"{path}: {missing} {name!r} is not in the checkpoint and was not found at"
            f" {', '.join(looked) or 'any place'}; give --vision_tower_path"
        )
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise UsageError(
            f"{folder}: a CLIP vision tower was wanted, this is of type {config.model_type!r}"
        )
    return folder, config


# --- weights --------------------------------------------------------------------------------------


def hf_name(key: str) -> str | None:
    """The parameter of OriginalLlava that a parameter of this layout is; None for buffers that are
    computed.

    model.{embed_tokens,layers,norm}.            model.language_model.{...}.
    model.mm_projector[.projector].{0,2}.        model.multi_modal_projector.linear_{1,2}.
    model.mm_projector.norm.                     model.multi_modal_projector.norm.
    model.vision_tower.vision_tower[.vision_model].    model.vision_tower.
    """
    if re.search(r"rotary_emb\.inv_freq$|embeddings\.position_ids$", key):
        return None
    if key == "model.image_newline":
        return None
    linear = re.match(r"model\.mm_projector\.(projector\.)?([02])\.", key)
    if linear:
        number = 1 + int(linear[2]) // 2
        return f"model.multi_modal_projector.linear_{number}.{key[linear.end() :]}"
    key = re.sub(r"^model\.mm_projector\.norm\.", "model.multi_modal_projector.norm.", key)
    key = re.sub(r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", TOWER, key)
    return re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", key)


def trained_name(key: str) -> str | None:
    """The same for non_lora_trainables.bin, which names them as peft does."""
    return hf_name(base_name(key))


def tower_name(key: str) -> str | None:
    """The same for the file of a tower, which may be a whole CLIP model."""
    if re.match(r"text_model\.|text_projection|visual_projection|logit_scale", key):
        return None
    if key.endswith("position_ids"):
        return None
    return TOWER + key.removeprefix("vision_model.")


def has_tower(folder: Path) -> bool:
    """Whether the checkpoint's files hold the tower: by the index where there is one."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / name
        if index.exists():
            keys = json.loads(index.read_text())["weight_map"]
            return any(key.startswith(TOWER) for key in keys)
    state = read_weights(folder, lambda key: key if "vision_tower" in key else None)
    return any(key.startswith(TOWER) for key in state)


def load_weights(
    folder: Path, tower_folder: Path | None, config: LlavaConfig, trained: Path | None = None
) -> State:
    """State dict of OriginalLlava(config), with the parameters of the file `trained` in place of
    the folder's; the embedding table gets a row of zeros for each id that it lacks."""
    state = read_weights(folder, hf_name)
    if trained is not None:
        state |= renamed(read_pickle(trained), trained_name)
    if tower_folder is not None and not any(name.startswith(TOWER) for name in state):
        state |= read_weights(tower_folder, tower_name)
    if config.text_config.num_hidden_layers == 0:
        state = without(state, LAYERS)
    table = "model.language_model.embed_tokens.weight"
    rows = config.image_token_index + 1
    complete_embeddings(state, table, "lm_head.weight", rows, config.original_tied)
    return state


def set_eos(
    model: PreTrainedModel, folder: Path, raw: Config, tokenizer: PreTrainedTokenizerBase
) -> None:
    """An answer ends at what generation_config.json says, else config.json, else at the
    tokenizer's EOS."""
    eos = raw.get("eos_token_id", tokenizer.eos_token_id)
    eos = generation_settings(folder).get("eos_token_id", eos)
    model.generation_config.eos_token_id = eos


# --- tokenizer and pictures -----------------------------------------------------------------------


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The Llama tokenizer with BOS, the placeholder for pictures, and a word boundary at the start
    of each piece of text between special tokens."""
    if not (folder / "tokenizer.model").exists():
        raise ValueError(f"{folder} has no tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), legacy=True)
    tokenizer.add_bos_token = True
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="always", split=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


# keys of preprocessor_config.json that are CLIP's preprocessing
PREPROCESSING = (
    "size",
    "crop_size",
    "resample",
    "image_mean",
    "image_std",
    "rescale_factor",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
)


def make_image_processor(
    folder: Path, tower_folder: Path | None, image_size: int, pad: bool
) -> LlavaImageProcessorPil:
    """CLIP's preprocessing as the tower's folder (or the checkpoint's) has it, on the picture
    padded to a square if pad."""
    settings: dict[str, Any] = {"size": {"shortest_edge": image_size}, "crop_size": image_size}
    for place in (tower_folder, folder):
        if place is not None and (place / "preprocessor_config.json").exists():
            stored = json.loads((place / "preprocessor_config.json").read_text())
            settings |= {
                name: stored[name] for name in PREPROCESSING if stored.get(name) is not None
            }
            break
    if isinstance(settings["size"], int):
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings["crop_size"], int):
        settings["crop_size"] = {"height": settings["crop_size"], "width": settings["crop_size"]}
    return LlavaImageProcessorPil(do_pad=pad, **settings)


# --- loading --------------------------------------------------------------------------------------


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """OriginalLlava and its processor; ValueError for parameters that no file fills or that have no
    place, UsageError where the tower is not found."""
    folder = folder_of(path)
    raw = getattr(config, "original_layout", None)
    if raw is None:  # a hub id, whose config transformers read as its own
        raw = json.loads((folder / "config.json").read_text())
        config = read_config(path, raw)
    name = conversation(raw, options.get("conv_mode"))
    files = weight_files(folder)
    tower_folder, vision = tower_of(path, raw, options.get("vision_tower_path"), has_tower(folder))
    tokenizer = make_tokenizer(folder)
    config.vision_config = vision
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    if raw.get("use_multilayer_features"):
        config.vision_feature_layer = multilayer(raw, vision.num_hidden_layers)
    state = load_weights(folder, tower_folder, config, options.get("trained"))
    if not state:
        raise ValueError(f"{files[0]} holds no parameter")
    model = assembled(OriginalLlava, config, state, options)
    set_eos(model, folder, raw, tokenizer)
    pad = raw.get("image_aspect_ratio") == "pad"
    processor = LlavaProcessor(
        make_image_processor(folder, tower_folder, vision.image_size, pad),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(name, bool(raw.get("mm_use_im_start_end"))),
    )
    return model, processor


FAMILY = Family(
    name="llava_original",
    model_types=MODEL_TYPES,
    architectures=ARCHITECTURES,
    recognises=is_original,
    read_config=read_config,
    load=load,
    parts=parts,
    names=hf_name,
    trained=True,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=MARKUP,
    has=frozenset({"decoder-only", "causal", "rotary", "grid", "square-pad"}),
)

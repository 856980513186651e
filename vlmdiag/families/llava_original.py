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

Checked on small random models written in this layout, and on sentencepiece's own ids. Not checked,
for want of the files: the published weights of LLaVA-1.5, Volcano and the Beyond Semantics models;
a download from the hub; the v1 models with <im_start>. Generation stops at </s>: the '###' that
llava_v0 models write between turns is text to us."""

import json
import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
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
from vlmdiag.families import Family, checked, generic
from vlmdiag.families.llava import SYSTEM, NormedLlava, grid, parts

ARCHITECTURES = ("LlavaLlamaForCausalLM",)
MODEL_TYPES = ("llava_llama",)
IMAGE = "<image>"
MARKUP = ("<im_start>", "<im_end>")
FILES = ("*.json", "*.model", "*.safetensors", "*.bin")
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
UNSUPPORTED = {  # config key -> values that we can read
    "mm_projector_type": (None, "mlp2x_gelu"),
    "mm_vision_select_feature": (None, "patch"),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "pad", "square"),
    "add_spatial_coordinates": (None, False),
    "compression_after_projection": (None, False),
    "add_registers": (None, False),
}
USER = SYSTEM.replace("human", "user")
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
# name: (system sentence, start with a system sentence, start without one, user's turn up to the
# answer)
CONVERSATIONS = {
    "llava_v1": (SYSTEM, "{system} ", "", "USER: {image}{question} ASSISTANT:"),
    "vicuna_v1": (USER, "{system} ", "", "USER: {image}{question} ASSISTANT:"),
    "llava_v0": (SYSTEM, "{system}###", "", "Human: {image}{question}###Assistant:"),
    "llava_llama_2": (
        HELPFUL,
        "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        "[INST] ",
        "{image}{question} [/INST]",
    ),
    "plain": ("", "{system}", "", "{image}{question}\n"),
}
CONVERSATIONS["v1"] = CONVERSATIONS["vicuna_v1"]  # the authors' name for it in `--version v1`


def is_original(raw):
    """Whether a config.json (as a dict) is of this layout."""
    named = raw.get("model_type") in MODEL_TYPES or set(raw.get("architectures") or ()) & set(
        ARCHITECTURES
    )
    return bool(named) or any(
        key in raw for key in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
    )


class OriginalLlava(NormedLlava):
    """NormedLlava with as many input embeddings as the placeholder's id needs and the LM head as it
    was."""

    def __init__(self, config):
        super().__init__(config)
        text, rows = config.text_config, config.image_token_index + 1
        if rows > text.vocab_size:
            self.model.language_model.embed_tokens = nn.Embedding(rows, text.hidden_size)
            self.post_init()


# --- config ---------------------------------------------------------------------------------------


def read_config(path, raw):
    """The config of transformers' Llava for a config of this layout. What only the tower and the
    tokenizer tell is filled in by load()."""
    for key, values in UNSUPPORTED.items():
        if raw.get(key) not in values:
            raise ValueError(
                f"{key} = {raw[key]!r} is not supported in the original LLaVA layout (only"
                f" {', '.join(map(repr, values))})"
            )
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
        "transformers_version",
        "dtype",
        "_name_or_path",
    }
    text = LlamaConfig(**{key: value for key, value in raw.items() if key in known})
    tied, text.tie_word_embeddings = text.tie_word_embeddings, False
    extra = {}
    if raw.get("normalize_projector"):
        constants = {
            "max_norm": raw.get("normalize_projector_max_norm", 1.22),
            "scale": raw.get("normalize_projector_scale", 0.83),
        }
        extra["vision_embed_norm"] = {"type": "rms_clip", "eps": 1e-6} | constants
    if raw.get("use_multilayer_features"):
        extra["vision_feature_post_layernorm"] = True
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
        **extra,
    )


def multilayer(raw, depth):
    """Tower layers (hidden-state indices) of the multi-layer variant: 12, 16, 20, 24 of 24."""
    return list(
        raw.get("multilayer_features") or [round(depth * part / 6) for part in (3, 4, 5, 6)]
    )


# --- the tower ------------------------------------------------------------------------------------


def find_tower(path, raw, vision_tower_path):
    """The tower's folder, or None where only a hub id is left, and the places that were looked
    at."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower") or ""
    if vision_tower_path and (Path(vision_tower_path) / "config.json").exists():
        return Path(vision_tower_path), []
    if vision_tower_path and not is_hub_id(vision_tower_path):
        raise UsageError(
            f"--vision_tower_path {vision_tower_path}: no config.json there, so it is no vision"
            " tower"
        )
    beside = (
        Path(path).absolute().parent,
        (Path(path) / "tokenizer.model").resolve().parent.parent,
    )  # the second where the files are links
    folders = (
        list(dict.fromkeys([Path(name), *(parent / Path(name).name for parent in beside)]))
        if name and not vision_tower_path
        else []
    )
    return next((folder for folder in folders if (folder / "config.json").exists()), None), [
        str(folder) for folder in folders
    ]


def is_hub_id(name):
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def fetch(name):
    """A folder with the files of a hub id, from the cache or the network."""
    return Path(snapshot_download(name, allow_patterns=list(FILES)))


def tower_of(path, raw, vision_tower_path, inside):
    """(folder or None, CLIPVisionConfig) of the vision tower. inside: its weights are in the
    checkpoint, so a known tower's config is enough."""
    folder, looked = find_tower(path, raw, vision_tower_path)
    name = str(vision_tower_path or raw.get("mm_vision_tower") or raw.get("vision_tower") or "")
    if folder is None and inside and name in TOWERS:
        return None, CLIPVisionConfig(**TOWERS[name])
    if folder is None:
        try:
            folder = fetch(name) if is_hub_id(name) else None
        except (OSError, ValueError) as error:
            looked.append(f"the hub ({type(error).__name__})")
    if folder is None:
        what = "the config of the vision tower" if inside else "the vision tower"
        raise UsageError(
            f"{path}: {what} {name!r} is not in the checkpoint and was not found at"
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


def weight_files(folder):
    """The weight files of a folder, safetensors before .bin; ValueError for what its index lists
    and the folder lacks."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(names)} weight files of {index.name} are missing in"
                    f" {folder}, such as {missing[0]}"
                )
            return [folder / name for name in names]
        if (folder / f"{stem}.{ending}").exists():
            return [folder / f"{stem}.{ending}"]
    raise ValueError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of several"
    )


def read_weights(folder, rename):
    """{new name: tensor} of a folder's files; rename(key) is None for what is not wanted. Tensors
    are mapped from disk, not read, wherever that can be."""
    found = {}
    for file in weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as stored:
                    found |= {
                        name: stored.get_tensor(key)
                        for key in stored.keys()
                        if (name := rename(key)) is not None
                    }  # noqa: SIM118 -- no dict
            else:
                try:
                    stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # the format before torch 1.6 cannot be mapped
                    stored = torch.load(file, map_location="cpu", weights_only=True)
                found |= {
                    name: tensor
                    for key, tensor in stored.items()
                    if (name := rename(key)) is not None
                }
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(
                f"{file} is not readable ({' '.join(str(error).split())[:120]})"
            ) from error
    return found


def hf_name(key):
    """The parameter of OriginalLlava that a parameter of this layout is; None for buffers that are
    computed."""
    if (
        re.search(r"rotary_emb\.inv_freq$|embeddings\.position_ids$", key)
        or key == "model.image_newline"
    ):
        return None
    key = re.sub(
        r"^model\.mm_projector\.(projector\.)?([02])\.",
        lambda m: f"model.multi_modal_projector.linear_{1 + int(m[2]) // 2}.",
        key,
    )
    key = re.sub(r"^model\.mm_projector\.norm\.", "model.multi_modal_projector.norm.", key)
    key = re.sub(
        r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower.", key
    )
    return re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", key)


def tower_name(key):
    """The same for the file of a tower, which may be a whole CLIP model."""
    if re.match(r"text_model\.|text_projection|visual_projection|logit_scale", key) or key.endswith(
        "position_ids"
    ):
        return None
    return "model.vision_tower." + key.removeprefix("vision_model.")


def has_tower(folder):
    """Whether the checkpoint's files hold the tower: by the index where there is one."""
    indexes = [
        folder / name
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")
        if (folder / name).exists()
    ]
    keys = (
        json.loads(indexes[0].read_text())["weight_map"]
        if indexes
        else read_weights(folder, lambda key: key if "vision_tower" in key else None)
    )
    return any(key.startswith("model.vision_tower.") for key in keys)


def load_weights(folder, tower_folder, config):
    """State dict of OriginalLlava(config); the embedding table gets a row of zeros for each id that
    it lacks."""
    with torch.device("meta"):
        wanted = set(OriginalLlava(config).state_dict())
    state = read_weights(folder, hf_name)
    if tower_folder is not None and not any(
        name.startswith("model.vision_tower.") for name in state
    ):
        state |= read_weights(tower_folder, tower_name)
    if (
        config.text_config.num_hidden_layers == 0
    ):  # the decoder is left out on purpose: what remains is what makes the input embeddings
        state = {
            name: tensor
            for name, tensor in state.items()
            if not name.startswith("model.language_model.layers.")
        }
    table = state.get("model.language_model.embed_tokens.weight")
    if table is not None:
        if config.original_tied:
            state["lm_head.weight"] = table
        lacking = max(config.image_token_index + 1 - len(table), 0)
        state["model.language_model.embed_tokens.weight"] = (
            torch.cat([table, table.new_zeros(lacking, table.shape[1])]) if lacking else table
        )
    unknown = sorted(set(state) - wanted)
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters have no place in this model, such as"
            f" {', '.join(unknown[:3])}"
        )
    return state


# --- tokenizer, pictures, prompt ------------------------------------------------------------------


def make_tokenizer(folder):
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


def make_image_processor(folder, tower_folder, image_size, pad):
    """CLIP's preprocessing as the tower's folder (or the checkpoint's) has it, on the picture
    padded to a square if pad."""
    settings = {"size": {"shortest_edge": image_size}, "crop_size": image_size}
    for place in (tower_folder, folder):
        if place is not None and (place / "preprocessor_config.json").exists():
            own = json.loads((place / "preprocessor_config.json").read_text())
            names = (
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
            settings |= {name: own[name] for name in names if own.get(name) is not None}
            break
    if isinstance(settings["size"], int):
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings["crop_size"], int):
        settings["crop_size"] = {"height": settings["crop_size"], "width": settings["crop_size"]}
    return LlavaImageProcessorPil(do_pad=pad, **settings)


def conversation(raw, conv_mode=None):
    """The name of the conversation template: the config's, else --conv_mode, else llava_v1. The
    folder's name has no say in it."""
    own = (
        raw.get("conv_mode")
        or raw.get("conv_template")
        or (raw.get("version") if raw.get("version") in CONVERSATIONS else None)
    )
    for name in filter(None, (own, conv_mode)):
        if name not in CONVERSATIONS:
            known = ", ".join(sorted(CONVERSATIONS))
            raise UsageError(
                f"--conv_mode {name}: no such conversation template; known: {known} (another"
                " prompt: --prompt_template)"
            )
    if own and conv_mode and CONVERSATIONS[own] != CONVERSATIONS[conv_mode]:
        raise UsageError(
            f"--conv_mode {conv_mode}, but the checkpoint's config names {own}; leave it out, or"
            " give --prompt_template for another prompt"
        )
    return own or conv_mode or "llava_v1"


def chat_template(name, markup=False):
    """A conversation template as a processor's chat template, for one user turn. markup: <im_start>
    and <im_end> stand around the picture."""
    sentence, start, bare, turn = CONVERSATIONS[name]
    (before, after), (lead, rest) = start.split("{system}"), turn.split("{image}")
    image, end = (IMAGE.join(MARKUP) if markup else IMAGE) + "\n", rest.split("{question}")[1]
    text = (
        "message['content'] if message['content'] is string else (message['content'] |"
        " selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
    )
    return (
        f"{{% set own = namespace(system={json.dumps(sentence)}) %}}{{% for message in messages if"
        f" message['role'] == 'system' %}}{{% set own.system = {text} %}}{{% endfor %}}{{{{"
        f" {json.dumps(before)} ~ own.system ~ {json.dumps(after)} if own.system else"
        f" {json.dumps(bare)} }}}}{{% for message in messages if message['role'] == 'user' %}}{{%"
        " if not loop.first %}{{ raise_exception('one user turn only') }}{% endif %}{{"
        f" {json.dumps(lead)} }}}}{{% if message['content'] is not string %}}{{% for part in"
        f" message['content'] if part['type'] == 'image' %}}{{{{ {json.dumps(image)} }}}}{{% endfor"
        f" %}}{{% endif %}}{{{{ ({text}) ~ {json.dumps(end)} }}}}{{% endfor %}}"
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
    folder = Path(path) if Path(path).is_dir() else fetch(path)
    raw = getattr(config, "original_layout", None)
    if raw is None:  # a hub id, whose config transformers read as its own
        raw = json.loads((folder / "config.json").read_text())
        config = read_config(path, raw)
    name = conversation(raw, conv_mode)
    files = weight_files(folder)
    tower_folder, vision = tower_of(path, raw, vision_tower_path, has_tower(folder))
    tokenizer = make_tokenizer(folder)
    config.vision_config, config.image_token_index = vision, tokenizer.convert_tokens_to_ids(IMAGE)
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    if raw.get("use_multilayer_features"):
        config.vision_feature_layer = multilayer(raw, vision.num_hidden_layers)
    state = load_weights(folder, tower_folder, config)
    if not state:
        raise ValueError(f"{files[0]} holds no parameter")
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = checked(
        OriginalLlava.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    )
    settings = folder / "generation_config.json"
    own = json.loads(settings.read_text()) if settings.exists() else {}
    model.generation_config.eos_token_id = own.get(
        "eos_token_id", raw.get("eos_token_id", tokenizer.eos_token_id)
    )
    images = make_image_processor(
        folder, tower_folder, vision.image_size, raw.get("image_aspect_ratio") == "pad"
    )
    processor = LlavaProcessor(
        images,
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
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=MARKUP,
    has=frozenset({"decoder-only", "causal", "rotary", "grid", "square-pad"}),
)

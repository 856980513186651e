"""Molmo (arXiv 2409.17146), the first generation: CLIP ViT-L/14 at 336 pixels reads overlapping
crops and the whole picture, an attention over 2 x 2 patches makes a vision token, Qwen2-7B (7B-D)
or OLMo-7B-1024 (7B-O) reads them. transformers 5 has Molmo 2 only, whose weights are others.

Two layouts are read, both with the same parameters:
    Hugging Face   config.json (model_type molmo), safetensors, tokenizer, preprocessor_config.json;
                   keys model.transformer.*, model.vision_backbone.*
    native         config.yaml and model.pt; keys without "model."; the tokenizer is the one that
                   config.yaml names, from the folder, beside it, or the hub
The decoder is transformers' Qwen2 (layer norms before, biases on q, k, v) or Olmo2 (norm_after:
layer norms after, q and k normalised over their whole width). q, k, v are one matrix there, and so
are the MLP's `up` and gate (ff_proj), in this order.

Prompt: the end-of-text token as BOS, <im_start>, rows of <im_patch> each with <im_col> behind it,
<im_end> for the whole picture at low resolution, the same for all crops together, then " User:
{question} Assistant:" (" {question}" where config.yaml says message_formatting none). Rotary
positions are half-split. Crops: the picture is scaled to fit rows x columns windows (at most 12) of
16 x 16 patches plus 4 patches on every side, padded black in the middle. A crop is 24 x 24 patches;
neighbours overlap by 8, of which each keeps 4, so that the kept vision tokens cover the canvas
once, and stand in the prompt row by row over the whole canvas. Dropped ones are no tokens. Every
vision token has a box, past the picture where that was padded; the first 144 are those of the low
resolution. Features: layers -2 and -9 of the tower (which has 23 of CLIP's 24), concatenated; a
learned vector is added to patches that are all padding, another to those that are in part; 4
patches are pooled by an attention whose query is their mean; then a SwiGLU. The published
preprocessing has the padding shares of the crops one place too early (the low resolution gets those
of the first crop, the last crop counts as padded in part). The weights go with it, so it is the
same here, unless config.yaml sets `fix_image_padding`. So a vision token is made of 2 x 2 patches
of one crop or of the low resolution. sources() lets its relevancy go on through the tower, in equal
parts, from layer -2 down: what a token read at layer -9 counts in the gradients alone, and what
arrives at patches that no token keeps is not shown. The published model adds the features to the
embedding of <im_patch>; get_image_features() gives that sum, so a vision token is replaced by its
row.

128 embeddings of extra tokens have no row in the LM head: no answer can hold them.
Mixture-of-experts models (MolmoE) and other connectors are refused. Config keys of our own, for
small models in the first layout: those of config.yaml that the published code has as constants
(`vision_backbone`, ...).

Facts are those of the public code of both layouts (pictures scaled by torch: the oldest revisions
use tensorflow's, equal but for rounding). Checked on small random models in both layouts, against a
forward pass written apart from this file; 7B-D has as many parameters as its published index says.
Not checked, for want of the files: the published weights and tokenizers; several GPUs."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, generic
from vlmdiag.families.assembled import Assembled, Expanding, assembled
from vlmdiag.families.llava_original import is_hub_id, read_weights
from vlmdiag.pictures.grid import PatchGrid, cells

START, END, PATCH, COLUMN, IMAGE = EXTRA = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<|image|>",
)  # in the order of their ids
POOL = 2  # patches per vision token and side
FILES = ("*.json", "*.txt", "*.safetensors", "*.bin", "*.model")
NATIVE = {  # config.json's names -> config.yaml's
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}
CONSTANTS = {  # of the code published with config.json
    "vision_backbone": {
        "image_default_input_size": [336, 336],
        "image_patch_size": 14,
        "image_emb_dim": 1024,
        "image_num_heads": 16,
        "image_num_key_value_heads": 16,
        "image_num_layers": 23,
        "image_head_dim": 64,
        "image_mlp_dim": 4096,
        "image_mlp_activations": "quick_gelu",
        "image_num_pos": 577,
        "image_norm_eps": 1e-5,
        "image_model_type": "openai",
        "resize_mode": "default",
    },
    "vit_layers": [-2, -9],
    "additional_vocab_size": 128,
    "max_crops": 12,
    "overlap_margins": [4, 4],
    "fix_image_padding": False,
    "mlp_ratio": 4,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# key of config.yaml -> values that we can read; a key that is not there is as in the published code
SUPPORTED = {
    "activation_type": ("swiglu",),
    "layer_norm_type": ("rms",),
    "block_type": ("sequential",),
    "rope": (True,),
    "rope_impl": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "bias_for_layer_norm": (None, False),
    "weight_tying": (False,),
    "scale_logits": (False,),
    "normalize_input_embeds": (False,),
    "image_padding_embed": ("pad_and_partial_pad",),
    "image_pooling_2d": ("attention-meanq", "attention_meanq"),
    "image_pooling_h": (POOL,),
    "image_pooling_w": (POOL,),
    "image_projector": ("mlp",),
    "crop_mode": ("overlap-and-resize-c2",),
    "use_col_tokens": (True,),
    "multi_query_attention": (None,),
    "message_formatting": ("role", "none"),
    "always_start_with_space": (True,),
    "image_model_type": ("openai",),
    "resize_mode": ("default",),
    "head_dim": (None,),
    "pad_value": (0, 0.0),
}


# --- config ---------------------------------------------------------------------------------------


class MolmoConfig(PreTrainedConfig):
    """text_config (Qwen2 or Olmo2; vocab_size: rows of the LM head), vision_config (CLIP);
    embedding_rows of the table; vit_layers: indices of the tower's hidden states; projector_size:
    width inside the SwiGLU; max_crops; margins: patches that a crop drops at an inner (left or
    upper, right or lower) side; fix_image_padding; image_mean, image_std."""

    model_type = "molmo"
    sub_configs = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        embedding_rows=0,
        vit_layers=(-2, -9),
        projector_size=0,
        max_crops=12,
        margins=(4, 4),
        fix_image_padding=False,
        image_mean=(),
        image_std=(),
        image_token_id=0,
        **options,
    ):
        self.text_config, self.vision_config, self.embedding_rows = (
            text_config,
            vision_config,
            embedding_rows,
        )
        self.vit_layers, self.projector_size, self.max_crops, self.margins = (
            list(vit_layers),
            projector_size,
            max_crops,
            list(margins),
        )
        self.fix_image_padding, self.image_mean, self.image_std, self.image_token_id = (
            fix_image_padding,
            list(image_mean),
            list(image_std),
            image_token_id,
        )
        super().__init__(**options)

    @property
    def side(self):
        """Patches on a crop's side."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def window(self):
        """Patches by which crops follow each other."""
        return self.side - sum(self.margins)

    def canvas(self, rows, columns):
        """(height, width) in patches of what rows x columns crops show together."""
        return rows * self.window + sum(self.margins), columns * self.window + sum(self.margins)


def reads(path):
    """The config of a folder in the native layout (config.yaml and model.pt, no config.json) as a
    dict with a model_type, or None: no such folder. ValueError where config.yaml cannot be read."""
    folder = Path(path)
    if (
        (folder / "config.json").exists()
        or not (folder / "config.yaml").exists()
        or not (folder / "model.pt").exists()
    ):
        return None
    try:
        raw = yaml.safe_load((folder / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(
            f"{folder / 'config.yaml'} is not readable ({' '.join(str(error).split())[:120]})"
        ) from error
    raw = raw.get("model", raw) if isinstance(raw, dict) else {}
    return (
        {"model_type": "molmo", "native": True} | raw
        if "vision_backbone" in raw and "d_model" in raw
        else None
    )


def folder_of(path):
    """The checkpoint's folder, fetched where `path` is a hub id."""
    return (
        Path(path)
        if Path(path).is_dir()
        else Path(snapshot_download(path, allow_patterns=list(FILES)))
    )


def read_config(path, raw):
    """MolmoConfig of config.json, or of what reads() gave. ValueError that says in one line what is
    not supported."""
    own = {NATIVE.get(key, key): value for key, value in raw.items()}
    if not raw.get("native") and (file := folder_of(path) / "preprocessor_config.json").exists():
        pictures = json.loads(file.read_text())
        own |= {
            key: pictures[key]
            for key in ("max_crops", "overlap_margins", "image_mean", "image_std")
            if pictures.get(key)
        }
    own = CONSTANTS | {
        key: value for key, value in own.items() if value is not None or key not in CONSTANTS
    }
    vision = CONSTANTS["vision_backbone"] | own["vision_backbone"]
    for key, values in SUPPORTED.items():
        for found in (own, vision):
            if key in found and found[key] not in values:
                raise ValueError(
                    f"{key} = {found[key]!r} is not supported for Molmo (only"
                    f" {', '.join(map(repr, values))})"
                )
    kind = (
        bool(own.get("norm_after")),
        bool(own.get("attention_layer_norm")),
        bool(own.get("qkv_bias")),
    )
    if kind not in ((False, False, True), (True, True, False)):
        raise ValueError(
            f"norm_after, attention_layer_norm, qkv_bias = {kind} is no decoder that is known"
            " (Qwen2's: False, False, True; OLMo's: True, True, False)"
        )
    size, patch = vision["image_default_input_size"], vision["image_patch_size"]
    side, margins = size[0] // patch, own["overlap_margins"]
    if (
        size[0] != size[1]
        or side % POOL
        or any(margin % POOL for margin in margins)
        or sum(margins) >= side
        or vision["image_num_pos"] != side**2 + 1
    ):
        raise ValueError(
            f"crops of {size} pixels with patches of {patch}, {vision['image_num_pos']} positions"
            f" and margins {margins} do not fit together"
        )
    hidden = own.get("mlp_hidden_size") or own["mlp_ratio"] * own["d_model"]
    rows = own.get("embedding_size") or own["vocab_size"]
    text = {
        "vocab_size": rows,
        "hidden_size": own["d_model"],
        "intermediate_size": hidden // 2,
        "num_hidden_layers": own["n_layers"],
        "num_attention_heads": own["n_heads"],
        "num_key_value_heads": own.get("n_kv_heads") or own["n_heads"],
        "rms_norm_eps": own.get("layer_norm_eps") or 1e-5,
        "max_position_embeddings": (
            own.get("max_position_embeddings") or own.get("max_sequence_length") or 4096
        ),
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(own.get("rope_theta") or 10000.0),
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    tower = CLIPVisionConfig(
        hidden_size=vision["image_emb_dim"],
        intermediate_size=vision["image_mlp_dim"],
        num_hidden_layers=vision["image_num_layers"],
        num_attention_heads=vision["image_num_heads"],
        image_size=size[0],
        patch_size=patch,
        hidden_act=vision["image_mlp_activations"],
        layer_norm_eps=vision["image_norm_eps"],
    )
    if (
        vision["image_num_key_value_heads"] != vision["image_num_heads"]
        or vision["image_head_dim"] * vision["image_num_heads"] != vision["image_emb_dim"]
    ):
        raise ValueError(
            "a vision tower with grouped keys or with heads of another width is not supported for"
            " Molmo"
        )
    layers = [
        layer if layer < 0 else layer + 1 for layer in own["vit_layers"]
    ]  # theirs do not count the embeddings
    return MolmoConfig(
        (Olmo2Config if kind[0] else Qwen2Config)(**text),
        tower,
        rows + own["additional_vocab_size"],
        layers,
        hidden // 2,
        own["max_crops"],
        margins,
        bool(own["fix_image_padding"]),
        own["image_mean"],
        own["image_std"],
        native=raw if raw.get("native") else None,
        tie_word_embeddings=False,
        dtype=own.get("torch_dtype") or own.get("dtype") or "float32",
    )


# --- the model ------------------------------------------------------------------------------------


class Connector(nn.Module):
    """Padding vectors, attention pooling of 2 x 2 patches with their mean as the query, SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width, inside = (
            config.vision_config.hidden_size,
            config.vision_config.hidden_size * len(config.vit_layers),
        )
        self.heads, self.side = config.vision_config.num_attention_heads, config.side
        self.pad_embed = nn.Parameter(torch.zeros(2, inside))  # all padding, padding in part
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(inside, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)
        self.gate_proj, self.up_proj = (
            nn.Linear(width, config.projector_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(
            config.projector_size, config.text_config.hidden_size, bias=False
        )

    def pool(self, blocks):
        """blocks (..., 4, c) -> (pooled (..., width), weights (..., H, 4))."""
        query, key, value = self.q_proj(blocks.mean(-2)), self.k_proj(blocks), self.v_proj(blocks)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).float() for part in (query, key, value)
        )
        weights = (
            torch.einsum("...hd,...khd->...hk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
        )
        return (
            self.o_proj(
                torch.einsum("...hk,...khd->...hd", weights, value).flatten(-2).to(blocks.dtype)
            ),
            weights,
        )

    def forward(self, patches, shares):
        """patches (n, side * side, c), shares (n, side * side): how much of a patch is picture ->
        (n, tokens on a side, the same, d)."""
        empty = shares == 0
        partial = (shares < 1) & ~empty  # the published -1 is one of these
        patches = (
            patches
            + self.pad_embed[0] * empty[..., None].to(patches)
            + self.pad_embed[1] * partial[..., None].to(patches)
        )
        blocks = (
            patches.unflatten(1, (self.side // POOL, POOL, self.side // POOL, POOL))
            .transpose(2, 3)
            .flatten(3, 4)
        )
        x, _ = self.pool(blocks)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Molmo(Assembled):
    """Molmo, see the module."""

    config_class = MolmoConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.vision_tower.post_layernorm = nn.Identity()  # theirs ends before it
        self.connector = Connector(config)
        self.post_init()

    def get_image_features(self, pixel_values, image_masks, tile_grids, return_dict=True):
        """pixel_values (n, 3, size, size): per picture its low resolution, then its crops row by
        row; image_masks (n, patches): their padding shares as published; tile_grids (pictures, 2):
        rows and columns of crops. pooler_output: a list of one (P, d) per picture, the low
        resolution's tokens first, then the kept ones of the crops row by row over the canvas, each
        with the embedding of <im_patch> added.
        """
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        patches = torch.cat([states[layer][:, 1:] for layer in self.config.vit_layers], -1)
        features = (
            self.connector(patches, image_masks)
            + self.get_input_embeddings().weight[self.config.image_token_id]
        )
        found, start = [], 0
        for rows, columns in tile_grids.tolist():
            found.append(self.arranged(features[start : start + 1 + rows * columns], rows, columns))
            start += 1 + rows * columns
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=found)

    def arranged(self, tokens, rows, columns):
        """(1 + rows * columns, t, t, ...) of a picture's low resolution and crops -> (P, ...) those
        that are kept, in the prompt's order."""
        low, crops = tokens[0], tokens[1:].unflatten(0, (rows, columns))
        lines = [
            torch.cat(
                [crops[i, j][self.kept(i, rows), self.kept(j, columns)] for j in range(columns)], 1
            )
            for i in range(rows)
        ]
        return torch.cat([low.flatten(0, 1), torch.cat(lines).flatten(0, 1)])

    def kept(self, index, count):
        """The tokens along one side that crop `index` of `count` keeps."""
        before, behind = (margin // POOL for margin in self.config.margins)
        whole = self.config.side // POOL
        return slice(0 if index == 0 else before, whole if index == count - 1 else whole - behind)


# --- pictures and prompts -------------------------------------------------------------------------


def choose_crops(size, config):
    """(rows, columns) of crops for a picture of `size` (width, height): the least enlargement, or
    else the least reduction; in float32, as published."""
    patch, most = config.vision_config.patch_size, config.max_crops
    crops = sorted(
        (
            (rows, columns)
            for rows in range(1, most + 1)
            for columns in range(1, most + 1)
            if rows * columns <= most
        ),
        key=lambda n: (n[0] * n[1], n[0]),
    )
    wanted = np.array(size[::-1], np.float32) - np.float32(sum(config.margins) * patch)
    with np.errstate(divide="ignore"):  # a picture as small as the margins
        scale = (np.array(crops, np.float32) * np.float32(config.window * patch) / wanted).min(-1)
    best = (
        scale.argmax()
        if (scale < 1).all()
        else np.where(scale < 1, np.float32(10e9), scale).argmin()
    )
    return crops[int(best)]


def placed(size, height, width):
    """(left, top, width, height) in pixels of a picture of `size` (width, height) that is scaled to
    fit a canvas, in its middle; in float32, as published."""
    own_width, own_height = map(np.float32, size)
    scale = min(np.float32(width) / own_width, np.float32(height) / own_height)
    new_width, new_height = int(own_width * scale), int(own_height * scale)
    return (width - new_width) // 2, (height - new_height) // 2, new_width, new_height


def region(size, height, width):
    """A canvas in pixels of the picture on it: (x0, y0, x1, y1)."""
    left, top, new_width, new_height = placed(size, height, width)
    x, y = size[0] / new_width, size[1] / new_height
    return -left * x, -top * y, (width - left) * x, (height - top) * y


class MolmoImages:
    """Pictures of a model with `config` as crops."""

    def __init__(self, config):
        self.config = config

    def fit(self, image, height, width):
        """(3, height, width) normalised pixels on black, (height, width) float: 1 where the picture
        is."""
        left, top, new_width, new_height = placed(image.size, height, width)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(
            pixels, (new_height, new_width), mode="bilinear", antialias=True, align_corners=False
        )[0].clamp(0, 1)
        around = (left, width - left - new_width, top, height - top - new_height)
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (F.pad(pixels, around) - mean) / std, F.pad(
            torch.ones(new_height, new_width), around
        )

    def __call__(self, image):
        """A PIL picture -> pixel_values, image_masks and tile_grids (1, 2), see
        Molmo.get_image_features."""
        config, size, patch = (
            self.config,
            self.config.vision_config.image_size,
            self.config.vision_config.patch_size,
        )
        rows, columns = choose_crops(image.size, config)
        low, low_mask = self.fit(image, size, size)
        canvas, mask = self.fit(image, *(side * patch for side in config.canvas(rows, columns)))
        step = config.window * patch
        cut = lambda plane: [
            plane[..., i * step : i * step + size, j * step : j * step + size]
            for i in range(rows)
            for j in range(columns)
        ]
        share = lambda plane: (
            plane.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).mean((1, 3)).flatten()
        )
        masks = [share(part) for part in cut(mask)]
        masks = (
            [share(low_mask), *masks]
            if config.fix_image_padding
            else [*masks, torch.full_like(masks[0], -1)]
        )
        return {
            "pixel_values": torch.stack([low, *cut(canvas)]),
            "image_masks": torch.stack(masks),
            "tile_grids": torch.tensor([[rows, columns]]),
        }


class MolmoProcessor(Expanding):
    """Crops and prompts; the BOS token in front where special tokens are asked for."""

    image_token, chat_template = IMAGE, None

    def picture(self, image):
        inputs, config, extra = (
            self.image_processor(image),
            self.image_processor.config,
            self.tokenizer.convert_tokens_to_ids(list(EXTRA)),
        )
        token = {string: (own, string) for own, string in zip(extra, EXTRA, strict=True)}
        tokens = []
        for height, width in (
            (config.side, config.side),
            config.canvas(*inputs["tile_grids"][0].tolist()),
        ):
            tokens += [
                token[START],
                *([token[PATCH]] * (width // POOL) + [token[COLUMN]]) * (height // POOL),
                token[END],
            ]
        return IMAGE, tokens, inputs

    def __call__(self, images, text, add_special_tokens=True, **options):
        found = super().__call__(images, text, add_special_tokens=False, **options)
        if add_special_tokens:
            found["input_ids"] = F.pad(
                found["input_ids"], (1, 0), value=self.tokenizer.bos_token_id
            )
            found["attention_mask"] = F.pad(found["attention_mask"], (1, 0), value=1)
            if "offset_mapping" in found:
                found["offset_mapping"] = F.pad(found["offset_mapping"], (0, 0, 1, 0))
        return found


def prompt(vlm, question, system):
    said = f"{system} {question}" if system else question
    bare = (vlm.model.config.native or {}).get("message_formatting") == "none"
    return f"{IMAGE} {said}" if bare else f"{IMAGE} User: {said} Assistant:"


def grid(vlm, size, inputs):
    """2 x 2 patches of the low resolution, then of the canvas of crops."""
    config = vlm.model.config
    pixels, boxes = config.vision_config.patch_size, []
    for height, width in (
        (config.side, config.side),
        config.canvas(*inputs["tile_grids"][0].tolist()),
    ):
        boxes.append(
            cells(
                height // POOL, width // POOL, region(size, height * pixels, width * pixels)
            ).reshape(-1, 4)
        )
    return PatchGrid(np.concatenate(boxes), None, tuple(size))


def sources(vlm, size, inputs):
    """2 x 2 patches behind the CLS of the low resolution, then of the crop that keeps a token."""
    (rows, columns), side = inputs["tile_grids"][0].tolist(), vlm.model.config.side // POOL
    every = torch.from_numpy(generic.merged(side, side, POOL, 1 + rows * columns, cls=1))
    return vlm.model.arranged(every.view(-1, side, side, POOL**2), rows, columns).numpy()


# --- reading a checkpoint -------------------------------------------------------------------------


def converted(state, config):
    """State dict of Molmo(config) from the published parameters {name without "model.": tensor}.
    Parts of fused matrices are views."""
    text, found = config.text_config, {}
    after = text.model_type == "olmo2"
    head = text.hidden_size // text.num_attention_heads
    sizes = [text.hidden_size, head * text.num_key_value_heads, head * text.num_key_value_heads]
    block = {
        "attn_out": "self_attn.o_proj",
        "ff_out": "mlp.down_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "attn_norm": "post_attention_layernorm" if after else "input_layernorm",
        "ff_norm": "post_feedforward_layernorm" if after else "post_attention_layernorm",
    }
    vit = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.out_proj",
        "feed_forward.w1": "mlp.fc1",
        "feed_forward.w2": "mlp.fc2",
        "attention_norm": "layer_norm1",
        "ffn_norm": "layer_norm2",
    }
    pool = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    swiglu = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    plain = {
        "transformer.ff_out.weight": "lm_head.weight",
        "transformer.ln_f.weight": "language_model.norm.weight",
        "vision_backbone.pad_embed": "connector.pad_embed",
        "vision_backbone.image_vit.class_embedding": "vision_tower.embeddings.class_embedding",
        "vision_backbone.image_vit.positional_embedding": (
            "vision_tower.embeddings.position_embedding.weight"
        ),
        "vision_backbone.image_vit.pre_ln.weight": "vision_tower.pre_layrnorm.weight",
        "vision_backbone.image_vit.pre_ln.bias": "vision_tower.pre_layrnorm.bias",
    }
    tables = [
        state[key]
        for key in ("transformer.wte.embedding", "transformer.wte.new_embedding")
        if key in state
    ]
    if len(tables) == 2:
        found["language_model.embed_tokens.weight"] = torch.cat(tables)
    for key, tensor in state.items():
        if key.startswith("transformer.wte.") and len(tables) == 2:
            continue
        if key in plain:
            found[plain[key]] = tensor
        elif (
            key == "vision_backbone.image_vit.patch_embedding.weight"
        ):  # a row holds the pixels of a patch, each with its three colours
            patch = config.vision_config.patch_size
            found["vision_tower.embeddings.patch_embedding.weight"] = (
                tensor.reshape(len(tensor), patch, patch, 3).permute(0, 3, 1, 2).contiguous()
            )
        elif m := re.fullmatch(r"transformer\.blocks\.(\d+)\.att_proj\.(weight|bias)", key):
            found |= {
                f"language_model.layers.{m[1]}.self_attn.{n}_proj.{m[2]}": part
                for n, part in zip("qkv", tensor.split(sizes), strict=True)
            }
        elif m := re.fullmatch(r"transformer\.blocks\.(\d+)\.ff_proj\.weight", key):
            found |= {
                f"language_model.layers.{m[1]}.mlp.{n}_proj.weight": part
                for n, part in zip(("up", "gate"), tensor.chunk(2), strict=True)
            }
        elif (m := re.fullmatch(r"transformer\.blocks\.(\d+)\.(\w+)\.weight", key)) and m[
            2
        ] in block:
            found[f"language_model.layers.{m[1]}.{block[m[2]]}.weight"] = tensor
        elif (
            m := re.fullmatch(
                r"vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\.([\w.]+)\.(weight|bias)",
                key,
            )
        ) and m[2] in vit:
            found[f"vision_tower.encoder.layers.{m[1]}.{vit[m[2]]}.{m[3]}"] = tensor
        elif (
            m := re.fullmatch(r"vision_backbone\.image_pooling_2d\.(\w+)\.(weight|bias)", key)
        ) and m[1] in pool:
            found[f"connector.{pool[m[1]]}.{m[2]}"] = tensor
        elif (m := re.fullmatch(r"vision_backbone\.image_projector\.(\w+)\.weight", key)) and m[
            1
        ] in swiglu:
            found[f"connector.{swiglu[m[1]]}.weight"] = tensor
        else:
            found[key] = tensor  # has no place, which is an error that names it
    return found


def load_weights(folder, config):
    """State dict of Molmo(config) from the folder's files, mapped from disk."""
    if config.native is None:
        return converted(read_weights(folder, lambda key: key.removeprefix("model.")), config)
    try:
        return converted(
            torch.load(folder / "model.pt", map_location="cpu", weights_only=True, mmap=True),
            config,
        )
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'model.pt'} is not readable ({' '.join(str(error).split())[:120]})"
        ) from error


def make_tokenizer(folder, config):
    """The checkpoint's tokenizer. In the native layout the text model's, filled up to the embedding
    table and the extra tokens behind it."""
    place = folder
    if config.native is not None and not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")
    ):
        name = re.sub(
            r"^(hf|m)[-:]", "", str((config.native.get("tokenizer") or {}).get("identifier") or "")
        )
        beside = folder.absolute().parent / Path(name).name
        if not name or not (beside.is_dir() or is_hub_id(name)):
            raise UsageError(
                f"{folder}: config.yaml names no tokenizer that can be found ({name!r}); copy its"
                " files into the folder"
            )
        place = beside if beside.is_dir() else name
    tokenizer = AutoTokenizer.from_pretrained(
        place, config=config.text_config
    )  # the folder's own config asks for the checkpoint's code
    first = config.text_config.vocab_size
    if PATCH not in tokenizer.get_vocab():
        fill = [f"|<EXTRA_TOKENS_{i}>|" for i in range(first - len(tokenizer))]
        tokenizer.add_tokens([*fill, *EXTRA], special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(list(EXTRA))
    if found != list(range(first, first + len(EXTRA))):
        raise ValueError(
            f"the ids of {', '.join(EXTRA)} are {found}, wanted {first} and those after it"
        )
    tokenizer.bos_token = (
        tokenizer.bos_token or tokenizer.eos_token
    )  # neither text model has a BOS: its end of text stands there
    return tokenizer


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
            " Molmo's: give --prompt_template"
        )
    folder = folder_of(path)
    tokenizer = make_tokenizer(folder, config)
    config.image_token_id = tokenizer.convert_tokens_to_ids(PATCH)
    model = assembled(
        Molmo, config, load_weights(folder, config), dtype, device_map, quantization_config
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = (
        tokenizer.eos_token_id
    )
    return model, MolmoProcessor(tokenizer, MolmoImages(config))


def parts(model):
    decoder = model.language_model
    blocks = list(model.vision_tower.encoder.layers)
    return Parts(
        decoder,
        list(decoder.layers),
        decoder.norm,
        model.lm_head,
        model.vision_tower,
        model.connector,
        vision_blocks=blocks,
    )


FAMILY = Family(
    name="molmo",
    model_types=("molmo",),
    architectures=("MolmoForCausalLM",),
    reads=reads,
    read_config=read_config,
    load=load,
    parts=parts,
    grid=grid,
    sources=sources,
    prompt=prompt,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=(START, END, COLUMN),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

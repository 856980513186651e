"""Molmo (arXiv 2409.17146), the first generation: CLIP ViT-L/14 at 336 pixels reads overlapping
crops and the whole picture, an attention over 2 x 2 patches makes a vision token, Qwen2-7B (7B-D)
or OLMo-7B-1024 (7B-O) reads them. transformers 5 has Molmo 2 only, whose weights are others.

Two layouts are read, both with the same parameters:

    Hugging Face   config.json (model_type molmo), safetensors, tokenizer, preprocessor_config.json;
                   keys model.transformer.*, model.vision_backbone.*
    native         config.yaml and model.pt; keys without "model."; the tokenizer is the one that
                   config.yaml names, from the folder, beside it, or the hub

The decoder is transformers' Qwen2 (layer norms before, biases on q, k, v) or Olmo2 (norm_after:
layer norms after, q and k normalised over their whole width). Config, model, pictures and the
conversion of weights are in molmo_config.py, molmo_model.py, molmo_images.py, molmo_weights.py.

Prompt: the end-of-text token as BOS, <im_start>, rows of <im_patch> each with <im_col> behind it,
<im_end> for the whole picture at low resolution, the same for all crops together, then " User:
{question} Assistant:" (" {question}" where config.yaml says message_formatting none). Rotary
positions are half-split. Crops: the picture is scaled to fit rows x columns windows (at most 12) of
16 x 16 patches plus 4 patches on every side, padded black in the middle. A crop is 24 x 24 patches;
neighbours overlap by 8, of which each keeps 4, so that the kept vision tokens cover the canvas
once, and stand in the prompt row by row over the whole canvas. Dropped ones are no tokens. Every
vision token has a box, past the picture where that was padded; the first 144 are those of the low
resolution.

Features: layers -2 and -9 of the tower (which has 23 of CLIP's 24), concatenated; a learned vector
is added to patches that are all padding, another to those that are in part; 4 patches are pooled by
an attention whose query is their mean; then a SwiGLU. The published preprocessing has the padding
shares of the crops one place too early (the low resolution gets those of the first crop, the last
crop counts as padded in part). The weights go with it, so it is the same here, unless config.yaml
sets `fix_image_padding`. So a vision token is made of 2 x 2 patches of one crop or of the low
resolution. sources() lets its relevancy go on through the tower, in equal parts, from layer -2
down: what a token read at layer -9 counts in the gradients alone, and what arrives at patches that
no token keeps is not shown. The published model adds the features to the embedding of <im_patch>;
get_image_features() gives that sum, so a vision token is replaced by its row.

The tokens around pictures follow `vocab_size`. Where the embedding table of the text model ends
there too (7B-D) they are among 128 extra embeddings, which have no row in the LM head: no answer
can hold them. 7B-O's table has more rows, which they take.
Mixture-of-experts models (MolmoE) and other connectors are refused. Config keys of our own, for
small models in the first layout: those of config.yaml that the published code has as constants
(`vision_backbone`, ...).

Facts are those of the public code of both layouts (pictures scaled by torch: the oldest revisions
use tensorflow's, equal but for rounding). Tested on small random models in both layouts, against a
forward pass written apart from these files; on the published configs, and on the published
tokenizer of 7B-D. Not tested: we had no published weights, nor the tokenizer of 7B-O; several GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmdiag.families import Family, Parts, generic
from vlmdiag.families.assembled import assembled
from vlmdiag.families.files import folder_of
from vlmdiag.families.molmo_config import FILES, POOL, read_config, reads
from vlmdiag.families.molmo_images import (
    COLUMN,
    END,
    IMAGE,
    PATCH,
    START,
    MolmoImages,
    MolmoProcessor,
    region,
)
from vlmdiag.families.molmo_model import Molmo
from vlmdiag.families.molmo_weights import load_weights, make_tokenizer
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Molmo and its processor; ValueError for parameters that no file fills or that have no
    place."""
    generic.refuse_conv_mode(path, options, "Molmo's")
    folder = folder_of(path, FILES)
    tokenizer = make_tokenizer(folder, config)
    config.image_token_id = tokenizer.convert_tokens_to_ids(PATCH)
    model = assembled(Molmo, config, load_weights(folder, config), options)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model, MolmoProcessor(tokenizer, MolmoImages(config))


def parts(model: PreTrainedModel) -> Parts:
    """The modules of Molmo."""
    return generic.decoder_parts(
        model.language_model,
        model.lm_head,
        model.vision_tower,
        model.connector,
        vision_blocks=list(model.vision_tower.encoder.layers),
    )


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """The picture, then the question between the roles, or alone where config.yaml says so."""
    text = f"{system} {question}" if system else question
    native = vlm.model.config.native or {}
    if native.get("message_formatting") == "none":
        return f"{IMAGE} {text}"
    return f"{IMAGE} User: {text} Assistant:"


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """2 x 2 patches of the low resolution, then of the canvas of crops."""
    config = vlm.model.config
    patch = config.vision_config.patch_size
    canvas = config.canvas(*inputs["tile_grids"][0].tolist())
    boxes = []
    for height, width in ((config.side, config.side), canvas):
        shown = region(size, height * patch, width * patch)
        boxes.append(cells(height // POOL, width // POOL, shown).reshape(-1, 4))
    return PatchGrid(np.concatenate(boxes), None, size)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P 4"]:
    """2 x 2 patches behind the CLS of the low resolution, then of the crop that keeps a token."""
    rows, columns = inputs["tile_grids"][0].tolist()
    side = vlm.model.config.side // POOL
    of_all = torch.from_numpy(generic.merged(side, side, POOL, 1 + rows * columns, cls=1))
    by_place = of_all.view(-1, side, side, POOL**2)
    return vlm.model.arranged(by_place, rows, columns).numpy()


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

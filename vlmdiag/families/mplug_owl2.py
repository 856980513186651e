"""mPLUG-Owl2 (arXiv 2311.04257): 64 queries read the patches of a CLIP-like ViT in an abstractor,
and a Llama-2 has its own norms, keys and values for them. Its classes are in mplug_owl2_model.py.

Files: LLaVA-like, one folder with the authors' keys, config (`mplug_owl2`, `visual_config`),
preprocessor_config.json and tokenizer.model.

    model.{embed_tokens,norm},    Llama, where {input,post_attention}_layernorm, k_proj and v_proj
    model.layers, lm_head         are .multiway.0 (text), .1 (picture)
    model.vision_model            ViT-L/14 at 448 pixels with CLS and a norm at its end; queries,
                                  keys and values of a layer are one matrix, head by head: (head,
                                  q k v, dimension). Read into transformers' CLIP tower
    model.visual_abstractor       six layers, `visual_fc`, `vit_eos`

The abstractor's sine tables are taken from the files where these hold them. Behind the 64 queries
comes `vit_eos`, a learned vector: 65 vision tokens, all of them "picture" to the decoder; generated
tokens are text.

Prompt: "USER: " [65 vision tokens] "{question} ASSISTANT:", no system sentence, text before and
after the picture tokenised apart. The authors' sentinel <|image|> is <image> here. Pictures are
squeezed to a square of their longer side first, then preprocessed as CLIP's, two resizings as
published.

A token read the whole picture, so it has no box, `vit_eos` least of all, and this family does not
declare `grid`. What leads from a query back to the picture is in Parts.qformer and patches(). There
one softmax runs over queries and, behind them, CLS and patches, so
`visual_abstractor.layers[i].attention` is its self- and its cross-attention: weights (B, H, q, q +
1 + patches), with eager attention only. `vit_eos` is made of no patch; its relevancy goes no
further.

The decoder takes `modality` (B, T), 1 where the picture is; left out, it is read off the ids, and
inputs_embeds without it are text. mPLUG-Owl2.1 has another tower and decoder (Qwen) and is refused.

Tested on small random models written in this layout, against a forward written out by hand from the
files' keys. Not tested: we had no published weights or config; the fine-tuned relatives (q-align,
one-align); several GPUs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from transformers import CLIPVisionConfig

from vlmdiag.families import Family, Parts, QFormer, generic, llava_original, minigpt4
from vlmdiag.families.assembled import assembled, complete_embeddings, without
from vlmdiag.families.files import folder_of, read_weights
from vlmdiag.families.llava import region
from vlmdiag.families.llava_conversations import IMAGE
from vlmdiag.families.mplug_owl2_model import (
    AbstractorConfig,
    MplugOwl2,
    MplugOwl2Config,
    sine_tables,
)
from vlmdiag.groups import VISION
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from jaxtyping import Int
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.batch import Batch
    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.families.files import State
    from vlmdiag.types import VLM

# published; what config.json says replaces them
SIZES: dict[str, dict[str, Any]] = {
    "visual_model": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-6,
    },
    "visual_abstractor": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_learnable_queries": 64,
        "encoder_hidden_size": 1024,
        "layer_norm_eps": 1e-6,
    },
}
# keys of mPLUG-Owl2.1's visual_config -> values that we can read
SUPPORTED = {
    "use_cls_token": (None, True),
    "use_post_layernorm": (None, True),
    "add_v2t_pos_emb": (None, False),
}


# --- config ---------------------------------------------------------------------------------------


def read_config(path: str, raw: Config) -> MplugOwl2Config:
    """MplugOwl2Config with original_layout (config.json); the placeholder's id is filled in by
    load()."""
    if raw.get("model_type") == "mplug_owl2_1":
        raise ValueError("mPLUG-Owl2.1 (Qwen) is not supported, mPLUG-Owl2 (Llama) is")
    visual = raw.get("visual_config") or {}
    given = {name: sizes | (visual.get(name) or {}) for name, sizes in SIZES.items()}
    for name, settings in given.items():
        for key, supported in SUPPORTED.items():
            if settings.get(key) not in supported:
                raise ValueError(
                    f"{key} = {settings[key]!r} in the config of {name} is not supported (only"
                    f" {', '.join(map(repr, supported))})"
                )
    tower = {key: given["visual_model"][key] for key in SIZES["visual_model"]}
    abstractor = {key: given["visual_abstractor"][key] for key in SIZES["visual_abstractor"]}
    side = tower["image_size"] // tower["patch_size"]
    fits_tower = (given["visual_abstractor"].get("grid_size") or side) == side
    if not fits_tower or abstractor["hidden_size"] != abstractor["encoder_hidden_size"]:
        raise ValueError(
            f"the abstractor's grid_size or encoder_hidden_size does not fit a tower of {side} x"
            f" {side} patches"
        )
    text = llava_original.llama_config(raw)
    text.tie_word_embeddings = False
    return MplugOwl2Config(
        text,
        CLIPVisionConfig(**tower),
        AbstractorConfig(**abstractor, patches=side * side, width=text.hidden_size),
        original_layout=raw,
        tie_word_embeddings=False,
        dtype=raw.get("torch_dtype") or raw.get("dtype"),
    )


# --- weights --------------------------------------------------------------------------------------

# the authors' names and ours, in this order
NAMES = (
    (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.\1."),
    (r"^model\.(vision_model|visual_abstractor)\.", r"\1."),
    (r"^vision_model\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embed\.", "vision_model.embeddings.patch_embedding."),
    (
        r"^vision_model\.embeddings\.position_embedding$",
        "vision_model.embeddings.position_embedding.weight",
    ),
    (r"^vision_model\.embeddings\.pre_layernorm\.", "vision_model.pre_layrnorm."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.input_layernorm\.", r"\1.layer_norm1."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.post_attention_layernorm\.", r"\1.layer_norm2."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.self_attn\.dense\.", r"\1.self_attn.out_proj."),
    (
        r"^visual_abstractor\.encoder\.layers\.(\d+)\.crossattention\.(?:output\.(?:mlp\.)?)?",
        r"visual_abstractor.layers.\1.",
    ),
)


def our_name(key: str) -> str | None:
    """The parameter of MplugOwl2 that a parameter of the authors' is, the tower's queries, keys and
    values in one; None for buffers that are computed."""
    if key.endswith("rotary_emb.inv_freq"):
        return None
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    return key


def load_weights(folder: Path, config: MplugOwl2Config) -> State:
    """State dict of MplugOwl2(config): the tower's fused matrices apart, the sine tables where no
    file has them, a row of zeros for the placeholder."""
    state = read_weights(folder, our_name)
    if config.text_config.num_hidden_layers == 0:
        state = without(state, "language_model.layers.")
    split_fused(state, config.vision_config.num_attention_heads)
    flatten_embeddings(state)
    table = "language_model.embed_tokens.weight"
    complete_embeddings(state, table, "lm_head.weight", config.image_token_id + 1, tied=False)
    return computed_tables(config) | state


def split_fused(state: State, heads: int) -> None:
    """Part the tower's fused queries, keys and values, in place."""
    for name in [name for name in state if ".query_key_value." in name]:
        by_head = state.pop(name).unflatten(0, (heads, 3, -1))  # (heads * 3 * D, ...) before
        for i, letter in enumerate("qkv"):
            ours = name.replace("query_key_value", f"{letter}_proj")
            state[ours] = by_head[:, i].flatten(0, 1)


def flatten_embeddings(state: State) -> None:
    """Take the leading dimensions of 1 from CLS (d,) and the positions (n, d), in place."""
    cls = "vision_model.embeddings.class_embedding"
    places = "vision_model.embeddings.position_embedding.weight"
    if cls in state:
        state[cls] = state[cls].flatten()
    if places in state:
        state[places] = state[places].flatten(0, -2)


def computed_tables(config: MplugOwl2Config) -> State:
    """The sine tables of each layer of the abstractor."""
    tables = sine_tables(config.abstractor_config)
    state: State = {}
    for layer in range(config.abstractor_config.num_hidden_layers):
        for name, table in tables.items():
            state[f"visual_abstractor.layers.{layer}.attention.{name}"] = table
    return state


# --- the family -----------------------------------------------------------------------------------


class Processor(minigpt4.Processor):
    """LLaVA's processor with a fixed number of tokens, on the picture squeezed to a square of its
    longer side."""

    def __call__(self, images: Image, text: str, **options: object) -> BatchFeature:
        """LLaVA's inputs."""
        side = max(images.size)
        return super().__call__(images=images.resize((side, side)), text=text, **options)


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """MplugOwl2 and its processor; ValueError for parameters that no file fills or that have no
    place."""
    folder = folder_of(path)
    tokenizer = llava_original.make_tokenizer(folder)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = assembled(MplugOwl2, config, load_weights(folder, config), options)
    llava_original.set_eos(model, folder, config.original_layout, tokenizer)
    images = llava_original.make_image_processor(
        folder, None, config.vision_config.image_size, pad=False
    )
    return model, Processor(images, tokenizer, config.abstractor_config.num_learnable_queries + 1)


def parts(model: PreTrainedModel) -> Parts:
    """The modules of MplugOwl2; one attention over queries and patches at once."""
    abstractor = model.visual_abstractor
    reading = [layer.attention for layer in abstractor.layers]
    qformer = QFormer(
        queries=abstractor.query_embeds.shape[1],
        self_attention=reading,
        cross_attention=reading,
        cls=True,
    )
    return generic.decoder_parts(
        model.language_model,
        model.lm_head,
        model.vision_model,
        abstractor,
        vision_blocks=list(model.vision_model.encoder.layers),
        qformer=qformer,
    )


def patches(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """The ViT's patches without CLS, over the picture as its preprocessed square shows it."""
    width, height = size
    side = max(size)
    x0, y0, x1, y1 = region(vlm.processor.image_processor, (side, side))
    shown = (x0 * width / side, y0 * height / side, x1 * width / side, y1 * height / side)
    return generic.patch_grid(inputs, vlm.model.config.vision_config.patch_size, shown, size)


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """The published turns."""
    before = f"{system} " if system else ""
    return f"{before}USER: {IMAGE}{question} ASSISTANT:"


def inputs(vlm: VLM, batch: Batch) -> dict[str, Int[Tensor, "B T"]]:
    """The modality of every position."""
    return {"modality": (batch.groups == VISION).long()}


FAMILY = Family(
    name="mplug_owl2",
    model_types=("mplug_owl2", "mplug_owl2_1"),
    architectures=("MPLUGOwl2LlamaForCausalLM",),
    read_config=read_config,
    load=load,
    parts=parts,
    patches=patches,
    prompt=prompt,
    inputs=inputs,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary"}),
)

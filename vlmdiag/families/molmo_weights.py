"""Molmo's published parameters as those of transformers' classes, and its tokenizer.

transformer.                                    language_model.
  wte.embedding, wte.new_embedding                embed_tokens.weight, one behind the other
  blocks.N.att_proj                               layers.N.self_attn.{q,k,v}_proj, in this order
  blocks.N.ff_proj                                layers.N.mlp.{up,gate}_proj, in this order
  blocks.N.{attn_out,ff_out,..._norm}             see BLOCK and norms_of()
  ln_f                                            norm
  ff_out                                          lm_head (of the whole model)
vision_backbone.                                vision_tower., connector.
  image_vit.transformer.resblocks.N.              vision_tower.encoder.layers.N., see VIT
  image_vit.patch_embedding                       its rows hold the pixels of a patch, each with
                                                  its three colours
  image_pooling_2d.{wq,wk,wv,wo}                  connector.{q,k,v,o}_proj
  image_projector.{w1,w2,w3}                      connector.{gate,down,up}_proj
  pad_embed                                       connector.pad_embed
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from vlmdiag.cli import UsageError
from vlmdiag.families.files import is_hub_id, read_pickle, read_weights
from vlmdiag.families.molmo_images import EXTRA, PATCH

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vlmdiag.families.files import State
    from vlmdiag.families.molmo_config import MolmoConfig

PLAIN = {
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
BLOCK = {
    "attn_out": "self_attn.o_proj",
    "ff_out": "mlp.down_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
VIT = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.out_proj",
    "feed_forward.w1": "mlp.fc1",
    "feed_forward.w2": "mlp.fc2",
    "attention_norm": "layer_norm1",
    "ffn_norm": "layer_norm2",
}
POOLING = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
SWIGLU = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

TABLES = ("transformer.wte.embedding", "transformer.wte.new_embedding")
PATCH_EMBEDDING = "vision_backbone.image_vit.patch_embedding.weight"
FUSED_ATTENTION = re.compile(r"transformer\.blocks\.(\d+)\.att_proj\.(weight|bias)")
FUSED_MLP = re.compile(r"transformer\.blocks\.(\d+)\.ff_proj\.weight")


def norms_of(config: MolmoConfig) -> dict[str, str]:
    """A block's layer norms: before attention and MLP with Qwen2, behind them with Olmo2."""
    if config.text_config.model_type == "olmo2":
        return {"attn_norm": "post_attention_layernorm", "ff_norm": "post_feedforward_layernorm"}
    return {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}


def converted(state: State, config: MolmoConfig) -> State:
    """State dict of Molmo(config) from the published parameters, named without "model.". Parts of
    fused matrices are views. What has no place keeps its name, which is an error that names it."""
    ours: State = {}
    tables = [state[key] for key in TABLES if key in state]
    if len(tables) == 2:
        ours["language_model.embed_tokens.weight"] = torch.cat(tables)
    for key, tensor in state.items():
        if key.startswith("transformer.wte.") and len(tables) == 2:
            continue
        attention = FUSED_ATTENTION.fullmatch(key)
        mlp = FUSED_MLP.fullmatch(key)
        if attention:
            ours |= _split_attention(tensor, attention[1], attention[2], config)
        elif mlp:
            layer = f"language_model.layers.{mlp[1]}.mlp"
            up, gate = tensor.chunk(2)
            ours |= {f"{layer}.up_proj.weight": up, f"{layer}.gate_proj.weight": gate}
        elif key == PATCH_EMBEDDING:
            patch = config.vision_config.patch_size
            pixels = tensor.reshape(len(tensor), patch, patch, 3).permute(0, 3, 1, 2)
            ours["vision_tower.embeddings.patch_embedding.weight"] = pixels.contiguous()
        else:
            ours[_name(key, norms_of(config))] = tensor
    return ours


def _split_attention(tensor: Tensor, layer: str, kind: str, config: MolmoConfig) -> State:
    """Queries, keys and values of a decoder block. kind: weight or bias."""
    text = config.text_config
    of_keys = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    sizes = [text.hidden_size, of_keys, of_keys]
    return {
        f"language_model.layers.{layer}.self_attn.{letter}_proj.{kind}": rows
        for letter, rows in zip("qkv", tensor.split(sizes), strict=True)
    }


def _name(key: str, norms: dict[str, str]) -> str:
    """The parameter of Molmo that is stored as one; the key itself where there is none."""
    if key in PLAIN:
        return PLAIN[key]
    block = re.fullmatch(r"transformer\.blocks\.(\d+)\.(\w+)\.weight", key)
    if block and block[2] in BLOCK | norms:
        return f"language_model.layers.{block[1]}.{(BLOCK | norms)[block[2]]}.weight"
    vit = re.fullmatch(
        r"vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\.([\w.]+)\.(weight|bias)", key
    )
    if vit and vit[2] in VIT:
        return f"vision_tower.encoder.layers.{vit[1]}.{VIT[vit[2]]}.{vit[3]}"
    pooling = re.fullmatch(r"vision_backbone\.image_pooling_2d\.(\w+)\.(weight|bias)", key)
    if pooling and pooling[1] in POOLING:
        return f"connector.{POOLING[pooling[1]]}.{pooling[2]}"
    projector = re.fullmatch(r"vision_backbone\.image_projector\.(\w+)\.weight", key)
    if projector and projector[1] in SWIGLU:
        return f"connector.{SWIGLU[projector[1]]}.weight"
    return key


def load_weights(folder: Path, config: MolmoConfig) -> State:
    """State dict of Molmo(config) from the folder's files, mapped from disk."""
    if config.native is None:
        state = read_weights(folder, lambda key: key.removeprefix("model."))
    else:
        state = read_pickle(folder / "model.pt")
    return converted(state, config)


# --- tokenizer ------------------------------------------------------------------------------------


def tokenizer_place(folder: Path, config: MolmoConfig) -> str | Path:
    """The folder or hub id of the tokenizer: in the native layout the one that config.yaml names,
    unless the folder has one. UsageError where it cannot be found."""
    if config.native is None:
        return folder
    files = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
    if any((folder / name).exists() for name in files):
        return folder
    identifier = str((config.native.get("tokenizer") or {}).get("identifier") or "")
    name = re.sub(r"^(hf|m)[-:]", "", identifier)
    beside = folder.absolute().parent / Path(name).name
    if not name or not (beside.is_dir() or is_hub_id(name)):
        raise UsageError(
            f"{folder}: config.yaml names no tokenizer that can be found ({name!r}); copy its"
            " files into the folder"
        )
    return beside if beside.is_dir() else name


def make_tokenizer(folder: Path, config: MolmoConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. In the native layout the text model's, filled up to the config's
    vocab_size, and the extra tokens behind it. That is not behind the embedding table of the text
    model, which may have more rows (7B-O: 100352, its extra tokens start at 100278)."""
    # with a config of ours, because the folder's asks for the checkpoint's code
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_place(folder, config), config=config.text_config
    )
    first = config.first_extra_id
    if PATCH not in tokenizer.get_vocab():
        fill = [f"|<EXTRA_TOKENS_{i}>|" for i in range(first - len(tokenizer))]
        tokenizer.add_tokens([*fill, *EXTRA], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(EXTRA))
    if ids != list(range(first, first + len(EXTRA))):
        raise ValueError(
            f"the ids of {', '.join(EXTRA)} are {ids}, wanted {first} (vocab_size of the config)"
            " and those after it"
        )
    # neither text model has a BOS: its end of text stands there
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    return tokenizer

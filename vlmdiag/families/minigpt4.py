"""MiniGPT-4 (arXiv 2304.10592): BLIP-2's ViT and Q-Former, one linear layer, and a frozen Vicuna,
which reads the picture in the middle of its prompt. The Llama-2 version has no Q-Former: four
neighbouring patches side by side go through the linear layer as one token.

The authors publish no whole checkpoint but pieces. A folder of ours holds them as they are, and a
config.json that names them:

    {"model_type": "minigpt4",
     "vision_model": "eva_vit_g.pth",
     "qformer": "blip2_pretrained_flant5xxl.pth",
     "projection": "prerained_minigpt4_7b.pth",
     "text_model": "vicuna-7b"}

    vision_model   the ViT of EVA-CLIP, as LAVIS has it; its blocks past the 39th are not used
    qformer        LAVIS' Q-Former with its queries and `ln_vision`; null: the Llama-2 version
    projection     `llama_proj`, and whatever else was trained: it replaces what the files above
                   hold
    text_model     a folder with a Llama in transformers' layout and its tokenizer.model

Names are relative to the folder, or whole paths; text_model may be a hub id. "vision_config",
"qformer_config" and "num_query_tokens" are there for other sizes than the published ones. Without a
Q-Former no file has `ln_vision`, and the published code runs with gain 1 and bias 0: so do we.

Prompt: "{system}###Human: <Img>", 32 vision tokens, "</Img> {question}###Assistant: "; for Llama-2
"{system}<s>[INST] <Img>", 64 vision tokens, "</Img> {question} [/INST] "; both end in a blank. The
text before and after the picture is tokenised apart, BOS first; <Img> and </Img> are plain text of
several tokens (group "template"). Pictures are squeezed to a square of 224 x 224.

A token of the Q-Former read the whole picture, so it has no box: Parts.qformer and patches() lead
back to it, as in blip2.py. Without a Q-Former token t is made of patches 4t to 4t + 3 of the
row-major 16 x 16, a box of 1 x 4 patches, whose relevancy goes on through the tower (sources()). An
answer ends at </s> and at "###", written "▁###" or "##", "#": its first token ends it, so "##"
alone does too.

Tested on small random models written in this layout, against a forward written out by hand from the
files' keys. Not tested: we had no published weights, so that `llama_proj` is all that the last file
holds and that Llama-2's file has no `ln_vision` are assumptions; several GPUs.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, Blip2Config, Blip2ForConditionalGeneration, LlavaProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmdiag.families import Family, Parts, blip2, generic, llava_original
from vlmdiag.families.assembled import assembled, complete_embeddings, with_features, without
from vlmdiag.families.files import fetch, is_hub_id, read_pickle, read_weights, renamed
from vlmdiag.families.llava import region
from vlmdiag.families.llava_conversations import IMAGE
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import (
        BaseImageProcessor,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.families.files import Rename, State
    from vlmdiag.types import VLM

GROUPED = 4  # patches of one token, without a Q-Former
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I"
    " provide it to you. Please answer my questions."
)


# --- the model ------------------------------------------------------------------------------------


class MiniGpt4(Blip2ForConditionalGeneration):
    """BLIP-2 with a Llama; config.has_qformer False: without a Q-Former. The embedding table has a
    row for the placeholder's id, the logits do not."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        text = config.text_config
        # LAVIS' `ln_vision`; the ViT's own norms have 1e-6
        self.vision_model.post_layernorm.eps = 1e-5
        if not config.has_qformer:
            del self.qformer
            del self.query_tokens
            width = GROUPED * config.vision_config.hidden_size
            self.language_projection = nn.Linear(width, text.hidden_size)
        rows = config.image_token_index + 1
        if rows > text.vocab_size:
            self.language_model.model.embed_tokens = nn.Embedding(rows, text.hidden_size)
        self.post_init()

    def get_image_features(
        self, pixel_values: Float[Tensor, "B c height width"], return_dict: bool = True, **_: object
    ) -> BaseModelOutputWithPooling:
        """pooler_output (B, q, d). Source: encode_img of the published MiniGPT4 class."""
        if self.config.has_qformer:
            return super().get_image_features(pixel_values, return_dict=True)
        output = self.vision_model(pixel_values, return_dict=True)
        patches = output.last_hidden_state[:, 1:]
        side_by_side = patches.unflatten(1, (-1, GROUPED)).flatten(2)
        output.pooler_output = self.language_projection(side_by_side)
        return output

    def embeds(
        self, input_ids: Int[Tensor, "B T"], encoded: BaseModelOutputWithPooling
    ) -> Float[Tensor, "B T d"]:
        """Token embeddings with image features in their places."""
        embeds = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_index
        return with_features(embeds, places, encoded.pooler_output)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        pixel_values: Float[Tensor, "B c height width"] | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int = 0,
        **options: object,
    ) -> CausalLMOutputWithPast:
        """The language model's output; pixel_values or mm_encoder_outputs {"image": ...} where
        input_ids hold a picture."""
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        if mm_encoder_outputs is not None:
            inputs_embeds = self.embeds(cast("Tensor", input_ids), mm_encoder_outputs["image"])
            input_ids = None
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **options,
        )

    def generate(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "B c height width"],
        attention_mask: Int[Tensor, "B T"] | None = None,
        **options: object,
    ) -> Int[Tensor, "B N"]:
        """The language model's generate(), which gives the new tokens alone."""
        embeds = self.embeds(input_ids, self.get_image_features(pixel_values))
        return self.language_model.generate(
            inputs_embeds=embeds, attention_mask=attention_mask, **options
        )


class Processor(LlavaProcessor):
    """LLaVA's processor where a picture has `count` tokens whatever its size."""

    def __init__(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, count: int
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.count = count

    def replace_image_token(self, image_inputs: Inputs, image_idx: int, **_: object) -> str:
        """What stands for a picture in the prompt."""
        return self.image_token * self.count


# --- config ---------------------------------------------------------------------------------------


def place(path: str, raw: Config, key: str) -> Path:
    """The file or folder that config.json names under `key`; ValueError where it is not there."""
    if not raw.get(key):
        raise ValueError(f"config.json names no {key!r}")
    named = Path(path) / raw[key]
    if named.exists():
        return named
    if key == "text_model" and is_hub_id(raw[key]):
        return fetch(raw[key])
    raise ValueError(f"{key!r} is {raw[key]!r} in config.json, which is not there")


def read_config(path: str, raw: Config) -> Blip2Config:
    """Blip2Config with has_qformer, original_layout (config.json) and original_tied; the
    placeholder's id is filled in by load()."""
    text = AutoConfig.from_pretrained(place(path, raw, "text_model"))
    if text.model_type != "llama":
        raise ValueError(f"the text model is of type {text.model_type!r}, a Llama was wanted")
    tied = text.tie_word_embeddings
    text.tie_word_embeddings = False
    vision = raw.get("vision_config") or {}
    qformer = {"encoder_hidden_size": vision["hidden_size"]} if "hidden_size" in vision else {}
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer | (raw.get("qformer_config") or {}),
        text_config=text,
        num_query_tokens=raw.get("num_query_tokens", 32),
        tie_word_embeddings=False,
        has_qformer=raw.get("qformer") is not None,
        original_layout=raw,
        original_tied=tied,
    )


# --- weights --------------------------------------------------------------------------------------

# LAVIS' names, the ViT's behind "visual_encoder.", and ours
NAMES = (
    (r"visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (
        r"visual_encoder\.blocks\.(\d+)\.norm([12])\.",
        r"vision_model.encoder.layers.\1.layer_norm\2.",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision_model.encoder.layers.\1.self_attn.projection.",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.(qkv\.weight|q_bias|v_bias)$",
        r"vision_model.encoder.layers.\1.self_attn.\2",
    ),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.", r"vision_model.encoder.layers.\1.mlp.\2."),
    (r"ln_vision\.", "vision_model.post_layernorm."),
    (r"query_tokens$", "query_tokens"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"qformer.encoder.layer.\1.\2.attention.",
    ),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\."
        r"((?:attention|crossattention)\.output|intermediate_query|output_query)\.",
        r"qformer.encoder.layer.\1.\2.",
    ),
    (r"llama_proj\.", "language_projection."),
)


def lavis_name(key: str) -> str | None:
    """The parameter of MiniGpt4 that a parameter of LAVIS is, its query and value biases apart;
    None for those that are no part of it."""
    for pattern, name in NAMES:
        if re.match(pattern, key):
            return re.sub("^" + pattern, name, key)
    return None


def vit_name(key: str) -> str | None:
    """lavis_name for the ViT's own file."""
    return lavis_name("visual_encoder." + key)


def trained_name(key: str) -> str | None:
    """lavis_name, where a key that is no part of the model is an error."""
    name = lavis_name(key)
    if name is None and not re.search(r"inv_freq$|position_ids$|relative_position_index$", key):
        raise ValueError(f"{key} of the projection's file has no place in this model")
    return name


def text_name(key: str) -> str | None:
    """The parameter of MiniGpt4 that a parameter of the Llama is."""
    return None if key.endswith("rotary_emb.inv_freq") else "language_model." + key


def read_pth(file: Path, rename: Rename) -> State:
    """{new name: tensor} of a .pth file, whose state dict may be under "model"."""
    stored = read_pickle(file)
    state = cast("State", stored.get("model", stored))
    return renamed(state, rename)


def load_weights(path: str, raw: Config, config: Blip2Config) -> State:
    """State dict of MiniGpt4(config); the embedding table gets a row of zeros for each id that it
    lacks."""
    state: State = {}
    if not config.has_qformer:
        width = config.vision_config.hidden_size
        state["vision_model.post_layernorm.weight"] = torch.ones(width)
        state["vision_model.post_layernorm.bias"] = torch.zeros(width)
    state |= read_pth(place(path, raw, "vision_model"), vit_name)
    if config.has_qformer:
        state |= read_pth(place(path, raw, "qformer"), lavis_name)
    state |= read_pth(place(path, raw, "projection"), trained_name)
    join_biases(state)
    state = _without_blocks(state, config.vision_config.num_hidden_layers)
    state |= read_weights(place(path, raw, "text_model"), text_name)
    if config.text_config.num_hidden_layers == 0:
        state = without(state, "language_model.model.layers.")
    table = "language_model.model.embed_tokens.weight"
    head = "language_model.lm_head.weight"
    rows = config.image_token_index + 1
    complete_embeddings(state, table, head, rows, config.original_tied)
    return state


def join_biases(state: State) -> None:
    """Make q_bias and v_bias of a block one qkv.bias, in place; keys have no bias."""
    for name in [name for name in state if name.endswith(".q_bias")]:
        query = state.pop(name)
        value = state.pop(name.replace("q_bias", "v_bias"))
        joined = torch.cat([query, torch.zeros_like(query), value])
        state[name.replace("q_bias", "qkv.bias")] = joined


def _without_blocks(state: State, depth: int) -> State:
    """`state` without the ViT's blocks past its depth, which are not used."""

    def is_used(name: str) -> bool:
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        return block is None or int(block[1]) < depth

    return {name: tensor for name, tensor in state.items() if is_used(name)}


# --- the family -----------------------------------------------------------------------------------


def endings(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: </s>, and the first token of "###" at the start of a text and within
    one."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ends = {tokenizer.eos_token_id, ids("a###")[len(ids("a"))]}
    at_start = ids("###")
    if len(at_start) == 1:
        ends.add(at_start[0])
    return sorted(ends)


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """MiniGpt4 and its processor; ValueError for files that are missing, and for parameters that no
    file fills or that have no place."""
    raw = config.original_layout
    edge = config.vision_config.image_size
    side = edge // config.vision_config.patch_size
    if not config.has_qformer and side % GROUPED:
        raise ValueError(f"rows of {side} patches are not whole groups of {GROUPED}")
    tokenizer = llava_original.make_tokenizer(place(path, raw, "text_model"))
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    model = assembled(MiniGpt4, config, load_weights(path, raw, config), options)
    ends = endings(tokenizer)
    model.generation_config.eos_token_id = ends
    model.language_model.generation_config.eos_token_id = ends
    images = BlipImageProcessorPil(size={"height": edge, "width": edge})
    tokens = config.num_query_tokens if config.has_qformer else side**2 // GROUPED
    return model, Processor(images, tokenizer, tokens)


def parts(model: PreTrainedModel) -> Parts:
    """BLIP-2's, or without a Q-Former those of a tower and its projection."""
    if model.config.has_qformer:
        return blip2.parts(model)
    return generic.decoder_parts(
        model.language_model.model,
        model.language_model.lm_head,
        model.vision_model,
        model.language_projection,
        vision_blocks=list(model.vision_model.encoder.layers),
    )


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per row of four patches, over the whole picture."""
    patch = vlm.model.config.vision_config.patch_size
    shown = region(vlm.processor.image_processor, size)
    return generic.patch_grid(inputs, patch, shown, size, GROUPED)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """Four patches in a row behind CLS."""
    rows, columns = generic.patch_sides(inputs, vlm.model.config.vision_config.patch_size)
    return 1 + np.arange(rows * columns).reshape(-1, GROUPED)


def prompt(vlm: VLM, question: str, system: str | None) -> str:
    """Vicuna's turns, or Llama-2's."""
    start, end = "<s>[INST] ", " [/INST] "
    if vlm.model.config.has_qformer:
        start, end = "###Human: ", "###Assistant: "
    return f"{system or ''}{start}<Img>{IMAGE}</Img> {question}{end}"


def default_system(vlm: VLM, prompt: str) -> str:
    """The sentence of the published demo."""
    return SYSTEM


def variant(raw: Config) -> Family:
    """The family with what a model with or without a Q-Former has."""
    if raw.get("qformer") is not None:
        return FAMILY
    return replace(
        FAMILY,
        name="minigpt4-patches",
        patches=None,
        grid=grid,
        sources=sources,
        has=FAMILY.has | {"grid"},
    )


FAMILY = Family(
    name="minigpt4",
    model_types=("minigpt4",),
    variant=variant,
    read_config=read_config,
    load=load,
    parts=parts,
    patches=blip2.patches,
    prompt=prompt,
    default_system=default_system,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary"}),
)

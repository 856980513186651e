"""MiniGPT-4 (arXiv 2304.10592): BLIP-2's ViT and Q-Former, one linear layer, and a frozen Vicuna,
which reads the picture in the middle of its prompt. The Llama-2 version has no Q-Former: four
neighbouring patches side by side go through the linear layer as one token.

The authors publish no whole checkpoint but pieces. A folder of ours holds them as they are, and a
config.json that names them:
    {"model_type": "minigpt4",
     "vision_model": "eva_vit_g.pth",                      the ViT of EVA-CLIP, as LAVIS has it; its
     blocks past the 39th are not used
     "qformer": "blip2_pretrained_flant5xxl.pth",          LAVIS' Q-Former with its queries and
     `ln_vision`; null: the Llama-2 version
     "projection": "prerained_minigpt4_7b.pth",            `llama_proj`, and whatever else was
     trained: it replaces what the files above hold
     "text_model": "vicuna-7b"}                            a folder with a Llama in transformers'
     layout and its tokenizer.model
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

Checked on small random models written in this layout, against a forward written out by hand from
the files' keys. Not checked, for want of the files: the published weights, that `llama_proj` is all
that the last file holds, and that Llama-2's file has no `ln_vision`; several GPUs.
"""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, Blip2Config, Blip2ForConditionalGeneration, LlavaProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmdiag.families import Family, Parts, blip2, generic, llava_original
from vlmdiag.families.assembled import assembled, longer
from vlmdiag.families.llava import region
from vlmdiag.pictures.grid import PatchGrid

GROUPED = 4  # patches of one token, without a Q-Former
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I"
    " provide it to you. Please answer my questions."
)
NAMES = (  # LAVIS' names, the ViT's behind "visual_encoder.", and ours
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
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.((?:attention|crossattention)\.output|intermediate_query|output_query)\.",
        r"qformer.encoder.layer.\1.\2.",
    ),
    (r"llama_proj\.", "language_projection."),
)


class MiniGpt4(Blip2ForConditionalGeneration):
    """BLIP-2 with a Llama; config.has_qformer False: without a Q-Former. The embedding table has a
    row for the placeholder's id, the logits do not."""

    def __init__(self, config):
        super().__init__(config)
        text, rows = config.text_config, config.image_token_index + 1
        self.vision_model.post_layernorm.eps = (
            1e-5  # LAVIS' `ln_vision`; the ViT's own norms have 1e-6
        )
        if not config.has_qformer:
            del self.qformer, self.query_tokens
            self.language_projection = nn.Linear(
                GROUPED * config.vision_config.hidden_size, text.hidden_size
            )
        if rows > text.vocab_size:
            self.language_model.model.embed_tokens = nn.Embedding(rows, text.hidden_size)
        self.post_init()

    def get_image_features(self, pixel_values, return_dict=True, **_):
        """pooler_output (B, q, d). Source: encode_img of the published MiniGPT4 class."""
        if self.config.has_qformer:
            return super().get_image_features(pixel_values, return_dict=True)
        found = self.vision_model(pixel_values, return_dict=True)
        patches = found.last_hidden_state[:, 1:]
        found.pooler_output = self.language_projection(
            patches.unflatten(1, (-1, GROUPED)).flatten(2)
        )
        return found

    def embeds(self, input_ids, found):
        """Token embeddings (B, T, d) with image features in their places."""
        embeds = self.get_input_embeddings()(input_ids)
        features = (
            found.pooler_output
            if torch.is_tensor(found.pooler_output)
            else torch.cat(found.pooler_output)
        )
        return embeds.masked_scatter(
            (input_ids == self.config.image_token_index)[..., None], features.to(embeds)
        )

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        inputs_embeds=None,
        mm_encoder_outputs=None,
        logits_to_keep=0,
        **options,
    ):
        """The language model's output; pixel_values or mm_encoder_outputs {"image": ...} where
        input_ids hold a picture."""
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        if mm_encoder_outputs is not None:
            input_ids, inputs_embeds = None, self.embeds(input_ids, mm_encoder_outputs["image"])
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **options,
        )

    def generate(self, input_ids=None, pixel_values=None, attention_mask=None, **options):
        """The language model's generate(), which gives the new tokens alone."""
        embeds = self.embeds(input_ids, self.get_image_features(pixel_values))
        return self.language_model.generate(
            inputs_embeds=embeds, attention_mask=attention_mask, **options
        )


class Processor(LlavaProcessor):
    """LLaVA's processor where a picture has `count` tokens whatever its size."""

    def __init__(self, image_processor, tokenizer, count):
        super().__init__(image_processor, tokenizer)
        self.count = count

    def replace_image_token(self, image_inputs, image_idx, **_):
        return self.image_token * self.count


# --- files ----------------------------------------------------------------------------------------


def place(path, raw, key):
    """The file or folder that config.json names under `key`; ValueError where it is not there."""
    if not raw.get(key):
        raise ValueError(f"config.json names no {key!r}")
    found = Path(path) / raw[key]
    if found.exists():
        return found
    if key == "text_model" and llava_original.is_hub_id(raw[key]):
        return llava_original.fetch(raw[key])
    raise ValueError(f"{key!r} is {raw[key]!r} in config.json, which is not there")


def read_config(path, raw):
    """Blip2Config with has_qformer, original_layout (config.json) and original_tied; the
    placeholder's id is filled in by load()."""
    text = AutoConfig.from_pretrained(place(path, raw, "text_model"))
    if text.model_type != "llama":
        raise ValueError(f"the text model is of type {text.model_type!r}, a Llama was wanted")
    tied, text.tie_word_embeddings = text.tie_word_embeddings, False
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


def lavis_name(key):
    """The parameter of MiniGpt4 that a parameter of LAVIS is, its query and value biases apart;
    None for those that are no part of it."""
    return next(
        (re.sub("^" + pattern, name, key) for pattern, name in NAMES if re.match(pattern, key)),
        None,
    )


def read_pickle(file, rename):
    """{new name: tensor} of a .pth file, mapped from disk wherever that can be; rename(key) is None
    for what is not wanted."""
    try:
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{file} is not readable ({' '.join(str(error).split())[:120]})"
        ) from error
    stored = stored.get("model", stored)
    return {name: tensor for key, tensor in stored.items() if (name := rename(key)) is not None}


def trained_name(key):
    """lavis_name, where a key that is no part of the model is an error."""
    name = lavis_name(key)
    if name is None and not re.search(r"inv_freq$|position_ids$|relative_position_index$", key):
        raise ValueError(f"{key} of the projection's file has no place in this model")
    return name


def load_weights(path, raw, config):
    """State dict of MiniGpt4(config); the embedding table gets a row of zeros for each id that it
    lacks."""
    state = read_pickle(
        place(path, raw, "vision_model"), lambda key: lavis_name("visual_encoder." + key)
    )
    if config.has_qformer:
        state |= read_pickle(place(path, raw, "qformer"), lavis_name)
    state |= read_pickle(place(path, raw, "projection"), trained_name)
    for name in [name for name in state if name.endswith(".q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat(
            [query, torch.zeros_like(query), value]
        )
    depth = config.vision_config.num_hidden_layers
    past = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
    state = {
        name: tensor
        for name, tensor in state.items()
        if not ((found := past.match(name)) and int(found[1]) >= depth)
    }
    if not config.has_qformer:
        width = config.vision_config.hidden_size
        state = {
            "vision_model.post_layernorm.weight": torch.ones(width),
            "vision_model.post_layernorm.bias": torch.zeros(width),
        } | state
    left_out = r"rotary_emb\.inv_freq$" + (
        r"|^model\.layers\." if config.text_config.num_hidden_layers == 0 else ""
    )  # no layers: see llava_original
    state |= llava_original.read_weights(
        place(path, raw, "text_model"),
        lambda key: None if re.search(left_out, key) else "language_model." + key,
    )
    table = state.get("language_model.model.embed_tokens.weight")
    if table is not None:
        if config.original_tied:
            state["language_model.lm_head.weight"] = table
        state["language_model.model.embed_tokens.weight"] = longer(
            table, config.image_token_index + 1
        )
    return state


def endings(tokenizer):
    """Ids that end an answer: </s>, and the first token of "###" at the start of a text and within
    one."""
    start, lead, within = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("###", "a", "a###")
    )
    return sorted(
        {tokenizer.eos_token_id, within[len(lead)]} | ({start[0]} if len(start) == 1 else set())
    )


def load(path, config, dtype, device_map=None, quantization_config=None, **_):
    """(MiniGpt4, processor); ValueError for files that are missing, and for parameters that no file
    fills or that have no place."""
    raw, side = config.original_layout, config.vision_config.image_size
    patches = (side // config.vision_config.patch_size) ** 2
    if not config.has_qformer and side // config.vision_config.patch_size % GROUPED:
        raise ValueError(
            f"rows of {side // config.vision_config.patch_size} patches are not whole groups of"
            f" {GROUPED}"
        )
    tokenizer = llava_original.make_tokenizer(place(path, raw, "text_model"))
    config.image_token_index = tokenizer.convert_tokens_to_ids(llava_original.IMAGE)
    state = load_weights(path, raw, config)
    model = assembled(MiniGpt4, config, state, dtype, device_map, quantization_config)
    model.generation_config.eos_token_id = model.language_model.generation_config.eos_token_id = (
        endings(tokenizer)
    )
    images = BlipImageProcessorPil(size={"height": side, "width": side})
    return model, Processor(
        images, tokenizer, config.num_query_tokens if config.has_qformer else patches // GROUPED
    )


# --- the family -----------------------------------------------------------------------------------


def parts(model):
    if model.config.has_qformer:
        return blip2.parts(model)
    text = model.language_model.model
    blocks = list(model.vision_model.encoder.layers)
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.language_model.lm_head,
        model.vision_model,
        model.language_projection,
        vision_blocks=blocks,
    )


def grid(vlm, size, inputs):
    """One cell per row of four patches, over the whole picture."""
    rows, columns = (
        side // vlm.model.config.vision_config.patch_size
        for side in inputs["pixel_values"].shape[-2:]
    )
    return PatchGrid.regular(
        rows, columns // GROUPED, region(vlm.processor.image_processor, size), size
    )


def sources(vlm, size, inputs):
    """Four patches in a row behind CLS."""
    side = inputs["pixel_values"].shape[-1] // vlm.model.config.vision_config.patch_size
    return 1 + np.arange(side**2).reshape(-1, GROUPED)


def prompt(vlm, question, system):
    start, end = (
        ("###Human: ", "###Assistant: ")
        if vlm.model.config.has_qformer
        else ("<s>[INST] ", " [/INST] ")
    )
    return f"{system or ''}{start}<Img>{llava_original.IMAGE}</Img> {question}{end}"


def variant(raw):
    """The family with what a model with or without a Q-Former has. raw: config.json as a dict."""
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
    default_system=lambda vlm: SYSTEM,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary"}),
)

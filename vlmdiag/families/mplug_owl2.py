"""mPLUG-Owl2 (arXiv 2311.04257): 64 queries read the patches of a CLIP-like ViT in an abstractor,
and a Llama-2 has its own norms, keys and values for them.

Files: LLaVA-like, one folder with the authors' keys, config (`mplug_owl2`, `visual_config`),
preprocessor_config.json and tokenizer.model.
    model.{embed_tokens,norm}, model.layers, lm_head    Llama, where
    {input,post_attention}_layernorm, k_proj and v_proj are .multiway.0 (text), .1 (picture)
    model.vision_model                                  ViT-L/14 at 448 pixels with CLS and a norm
    at its end; queries, keys and values of a layer are one
                                                        matrix, head by head: (head, q k v,
                                                        dimension). Read into transformers' CLIP
                                                        tower
    model.visual_abstractor                             six layers, `visual_fc`, `vit_eos`
A layer of the abstractor: x = norm1(x); keys and values are of [x, normk(patches)], CLS first among
these, fixed sine positions are added to what makes queries and keys; x = x + out(attention); x = x
+ mlp(norm2(x)). So the residual stream is the normed one. The sine tables are taken from the files
where these hold them. Behind the 64 queries comes `vit_eos`, a learned vector: 65 vision tokens,
all of them "picture" to the decoder; generated tokens are text.

Prompt: "USER: " [65 vision tokens] "{question} ASSISTANT:", no system sentence, text before and
after the picture tokenised apart. The authors' sentinel <|image|> is <image> here. Pictures are
squeezed to a square of their longer side first, then preprocessed as CLIP's, two resizings as
published.

A token read the whole picture, so it has no box ("grid" is not had), `vit_eos` has none at all.
What leads from a query back to the picture is in Parts.qformer and patches(). There one softmax
runs over queries and, behind them, CLS and patches, so `visual_abstractor.layers[i].attention` is
its self- and its cross-attention: weights (B, H, q, q + 1 + patches), with eager attention only.
`vit_eos` is made of no patch; its relevancy goes no further.

The decoder takes `modality` (B, T), 1 where the picture is; left out, it is read off the ids, and
inputs_embeds without it are text. mPLUG-Owl2.1 has another tower and decoder (Qwen) and is refused.

Checked on small random models written in this layout, against a forward written out by hand from
the files' keys. Not checked, for want of the files: the published weights and config; the
fine-tuned relatives (q-align, one-align); several GPUs."""

import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward as eager_without_groups
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from vlmdiag.families import Family, Parts, QFormer, generic, llava_original, minigpt4
from vlmdiag.families.assembled import assembled, longer
from vlmdiag.families.llava import region
from vlmdiag.groups import GROUPS
from vlmdiag.pictures.grid import PatchGrid

SIZES = {  # published; what config.json says replaces them
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
UNSUPPORTED = {
    "use_cls_token": (None, True),
    "use_post_layernorm": (None, True),
    "add_v2t_pos_emb": (None, False),
}  # keys of mPLUG-Owl2.1's visual_config


class AbstractorConfig(PretrainedConfig):
    model_type = "mplug_owl2_abstractor"

    def __init__(
        self,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_learnable_queries=64,
        encoder_hidden_size=1024,
        layer_norm_eps=1e-6,
        patches=1024,
        width=4096,
        **options,
    ):
        self.hidden_size, self.intermediate_size, self.num_hidden_layers = (
            hidden_size,
            intermediate_size,
            num_hidden_layers,
        )
        self.num_attention_heads, self.num_learnable_queries, self.encoder_hidden_size = (
            num_attention_heads,
            num_learnable_queries,
            encoder_hidden_size,
        )
        self.layer_norm_eps, self.patches, self.width = layer_norm_eps, patches, width
        super().__init__(**options)


class MplugOwl2Config(PretrainedConfig):
    model_type = "mplug_owl2"
    sub_configs = {
        "text_config": LlamaConfig,
        "vision_config": CLIPVisionConfig,
        "abstractor_config": AbstractorConfig,
    }

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        abstractor_config=None,
        image_token_id=32000,
        **options,
    ):
        given = {
            "text_config": text_config,
            "vision_config": vision_config,
            "abstractor_config": abstractor_config,
        }
        for name, value in given.items():
            setattr(
                self,
                name,
                (
                    value
                    if isinstance(value, PretrainedConfig)
                    else self.sub_configs[name](**(value or {}))
                ),
            )
        self.image_token_id = image_token_id
        super().__init__(**options)


# --- the abstractor -------------------------------------------------------------------------------


def sines(positions, width):
    """Sine positions (n,) -> (n, width): the sines of all frequencies 10000^(-2i / width), then the
    cosines."""
    half = width // 2
    angles = positions[:, None].float() * 10000.0 ** -(torch.arange(half).float() / half)
    return torch.cat([angles.sin(), angles.cos()], -1)


def sine_tables(config):
    """{"q_pos_embed": (q, d), "k_pos_embed": (1 + patches, d)}: by number; zeros for CLS, then by
    column and row, in this order."""
    side, width = round(config.patches**0.5), config.hidden_size
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    places = torch.cat([sines(columns, width // 2), sines(rows, width // 2)], -1)
    return {
        "q_pos_embed": sines(torch.arange(config.num_learnable_queries), width),
        "k_pos_embed": torch.cat([torch.zeros(1, width), places]),
    }


class AbstractorAttention(nn.Module):
    """Queries (B, q, d) over themselves and patches, keys (B, q + S, d) -> (output (B, q, d),
    weights (B, H, q, q + S) or None)."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config, self.head_dim = config, config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.value = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        for name, table in sine_tables(config).items():
            self.register_buffer(name, table)

    def forward(self, states, keys):
        split = lambda x: x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        own = self.q_pos_embed.to(states)
        query, key, value = (
            self.query(states + own),
            self.key(keys + torch.cat([own, self.k_pos_embed.to(states)])),
            self.value(keys),
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_without_groups
        )
        output, weights = attend(
            self,
            split(query),
            split(key),
            split(value),
            None,
            scaling=self.head_dim**-0.5,
            dropout=0.0,
        )
        return output.flatten(2), weights


class AbstractorLayer(nn.Module):
    """See the module's docstring. Norms have eps 1e-5, the one inside the MLP the config's."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = AbstractorAttention(config)
        self.norm1, self.normk, self.norm2 = (
            nn.LayerNorm(size) for size in (width, config.encoder_hidden_size, width)
        )
        self.out_proj = nn.Linear(width, width)
        self.w1, self.w2, self.w3 = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            nn.Linear(width, inner),
        )
        self.ffn_ln = nn.LayerNorm(inner, eps=config.layer_norm_eps)

    def forward(self, states, patches):
        states = self.norm1(states)
        states = states + self.out_proj(
            self.attention(states, torch.cat([states, self.normk(patches)], 1))[0]
        )
        inner = self.norm2(states)
        return states + self.w2(self.ffn_ln(nn.functional.silu(self.w1(inner)) * self.w3(inner)))


class Abstractor(PreTrainedModel):
    """Patches with CLS (B, 1 + P, d) -> vision tokens (B, q + 1, width of the decoder)."""

    config_class = AbstractorConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.query_embeds = nn.Parameter(
            torch.randn(1, config.num_learnable_queries, config.hidden_size)
        )
        self.layers = nn.ModuleList(
            [AbstractorLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.visual_fc = nn.Linear(config.hidden_size, config.width)
        self.vit_eos = nn.Parameter(torch.randn(1, 1, config.width))
        self.post_init()

    def forward(self, patches):
        states = self.query_embeds.expand(len(patches), -1, -1)
        for layer in self.layers:
            states = layer(states, patches)
        return torch.cat([self.visual_fc(states), self.vit_eos.expand(len(patches), -1, -1)], 1)


# --- the decoder ----------------------------------------------------------------------------------


class Multiway(nn.Module):
    """Two modules of one kind: tokens (B, T, d) go through the first where modality (B, T) is 0 or
    None, through the second where it is 1."""

    def __init__(self, make):
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, states, modality):
        text = self.multiway[0](states)
        return (
            text
            if modality is None
            else torch.where(modality[..., None].bool(), self.multiway[1](states), text)
        )


class OwlAttention(LlamaAttention):
    """Llama's attention with two key and two value projections."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width = config.num_key_value_heads * self.head_dim
        make = lambda: nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj, self.v_proj = Multiway(make), Multiway(make)

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        modality=None,
        **options,
    ):
        split = lambda x: x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = (
            split(self.q_proj(hidden_states)),
            split(self.k_proj(hidden_states, modality)),
            split(self.v_proj(hidden_states, modality)),
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **options
        )
        return self.o_proj(output.flatten(2)), weights


class OwlLayer(LlamaDecoderLayer):
    """Llama's layer with that attention and two of each norm."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        make = lambda: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn, self.input_layernorm, self.post_attention_layernorm = (
            OwlAttention(config, layer_idx),
            Multiway(make),
            Multiway(make),
        )

    def forward(self, hidden_states, modality=None, **options):
        hidden_states = (
            hidden_states
            + self.self_attn(
                self.input_layernorm(hidden_states, modality), modality=modality, **options
            )[0]
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, modality))


class OwlDecoder(LlamaModel):
    """Llama of such layers, which get `modality` (B, T) from its forward."""

    def __init__(self, config, rows):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [OwlLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        if rows > config.vocab_size:
            self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.post_init()


class MplugOwl2(PreTrainedModel, GenerationMixin):
    """The whole model. The embedding table has a row for the placeholder's id, the logits do
    not."""

    config_class = MplugOwl2Config
    _supports_sdpa = _supports_attention_backend = True
    _no_split_modules = ["OwlLayer", "AbstractorLayer", "CLIPEncoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_abstractor = Abstractor(config.abstractor_config)
        self.language_model = OwlDecoder(config.text_config, config.image_token_id + 1)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.language_model

    def get_image_features(self, pixel_values, return_dict=True, **_):
        """pooler_output (B, q + 1, d), last_hidden_state (B, 1 + P, d of the tower) after its
        norm."""
        states = self.vision_model.post_layernorm(
            self.vision_model(pixel_values, return_dict=True).last_hidden_state
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=states, pooler_output=self.visual_abstractor(states)
        )

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        inputs_embeds=None,
        attention_mask=None,
        modality=None,
        mm_encoder_outputs=None,
        logits_to_keep=0,
        **options,
    ):
        """Logits and cache. pixel_values or mm_encoder_outputs {"image": ...} where input_ids hold
        a picture; modality (B, T): see the module's docstring."""
        if (
            modality is None and input_ids is not None and input_ids.shape[1] > 1
        ):  # a single token is a generated one
            modality = input_ids == self.config.image_token_id
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if mm_encoder_outputs is not None:
                pooled = mm_encoder_outputs["image"].pooler_output
                pooled = pooled if torch.is_tensor(pooled) else torch.cat(pooled)
                inputs_embeds = inputs_embeds.masked_scatter(
                    (input_ids == self.config.image_token_id)[..., None], pooled.to(inputs_embeds)
                )
        found = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, modality=modality, **options
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(found.last_hidden_state[:, -logits_to_keep:]),
            past_key_values=found.past_key_values,
        )

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        if not is_first_iteration:
            kwargs.pop("modality", None)
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )


# --- files ----------------------------------------------------------------------------------------

NAMES = (  # the authors' names and ours, in this order
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


def read_config(path, raw):
    """MplugOwl2Config with original_layout (config.json); the placeholder's id is filled in by
    load()."""
    if raw.get("model_type") == "mplug_owl2_1":
        raise ValueError("mPLUG-Owl2.1 (Qwen) is not supported, mPLUG-Owl2 (Llama) is")
    visual = raw.get("visual_config") or {}
    parts = {name: sizes | (visual.get(name) or {}) for name, sizes in SIZES.items()}
    for name, part in parts.items():
        for key, values in UNSUPPORTED.items():
            if part.get(key) not in values:
                raise ValueError(
                    f"{key} = {part[key]!r} in the config of {name} is not supported (only"
                    f" {', '.join(map(repr, values))})"
                )
    tower, abstractor = ({key: part[key] for key in SIZES[name]} for name, part in parts.items())
    side = tower["image_size"] // tower["patch_size"]
    if (parts["visual_abstractor"].get("grid_size") or side) != side or abstractor[
        "hidden_size"
    ] != abstractor["encoder_hidden_size"]:
        raise ValueError(
            f"the abstractor's grid_size or encoder_hidden_size does not fit a tower of {side} x"
            f" {side} patches"
        )
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
        "transformers_version",
        "dtype",
        "_name_or_path",
    }
    text = LlamaConfig(
        **{key: value for key, value in raw.items() if key in known}
        | {"tie_word_embeddings": False}
    )
    return MplugOwl2Config(
        text,
        CLIPVisionConfig(**tower),
        AbstractorConfig(**abstractor, patches=side * side, width=text.hidden_size),
        original_layout=raw,
        tie_word_embeddings=False,
        dtype=raw.get("torch_dtype") or raw.get("dtype"),
    )


def our_name(key):
    """The parameter of MplugOwl2 that a parameter of the authors' is, the tower's queries, keys and
    values in one; None for buffers that are computed."""
    if key.endswith("rotary_emb.inv_freq"):
        return None
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    return key


def load_weights(folder, config):
    """State dict of MplugOwl2(config): the tower's fused matrices apart, the sine tables where no
    file has them, a row of zeros for the placeholder."""
    state = llava_original.read_weights(folder, our_name)
    vision, none = (
        config.vision_config,
        config.text_config.num_hidden_layers == 0,
    )  # no decoder layers: left out on purpose, see llava_original
    state = {
        name: tensor
        for name, tensor in state.items()
        if not (none and name.startswith("language_model.layers."))
    }
    for name in [name for name in state if ".query_key_value." in name]:
        fused = state.pop(name)  # (heads * 3 * D, ...)
        heads = fused.unflatten(0, (vision.num_attention_heads, 3, -1))
        for i, part in enumerate("qkv"):
            state[name.replace("query_key_value", f"{part}_proj")] = heads[:, i].flatten(0, 1)
    cls, places = (
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
    )
    state |= {
        name: state[name].flatten(0, -2) if name == places else state[name].flatten()
        for name in (cls, places)
        if name in state
    }
    tables = sine_tables(config.abstractor_config)
    computed = {
        f"visual_abstractor.layers.{i}.attention.{name}": tables[name]
        for i in range(config.abstractor_config.num_hidden_layers)
        for name in tables
    }
    table = state.get("language_model.embed_tokens.weight")
    if table is not None:
        state["language_model.embed_tokens.weight"] = longer(table, config.image_token_id + 1)
    return computed | state


class Processor(minigpt4.Processor):
    """LLaVA's processor with a fixed number of tokens, on the picture squeezed to a square of its
    longer side."""

    def __call__(self, images, text, **options):
        side = max(images.size)
        return super().__call__(images=images.resize((side, side)), text=text, **options)


def load(path, config, dtype, device_map=None, quantization_config=None, **_):
    """(MplugOwl2, processor); ValueError for parameters that no file fills or that have no
    place."""
    folder, raw = (
        (Path(path) if Path(path).is_dir() else llava_original.fetch(path)),
        config.original_layout,
    )
    tokenizer = llava_original.make_tokenizer(folder)
    config.image_token_id = tokenizer.convert_tokens_to_ids(llava_original.IMAGE)
    state = load_weights(folder, config)
    model = assembled(MplugOwl2, config, state, dtype, device_map, quantization_config)
    settings = folder / "generation_config.json"
    own = json.loads(settings.read_text()) if settings.exists() else {}
    model.generation_config.eos_token_id = own.get(
        "eos_token_id", raw.get("eos_token_id", tokenizer.eos_token_id)
    )
    images = llava_original.make_image_processor(
        folder, None, config.vision_config.image_size, False
    )
    return model, Processor(images, tokenizer, config.abstractor_config.num_learnable_queries + 1)


# --- the family -----------------------------------------------------------------------------------


def parts(model):
    text = model.language_model
    reading = [layer.attention for layer in model.visual_abstractor.layers]
    connection = QFormer(
        queries=model.visual_abstractor.query_embeds.shape[1],
        self_attention=reading,
        cross_attention=reading,
        cls=True,
    )
    blocks = list(model.vision_model.encoder.layers)
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.lm_head,
        model.vision_model,
        model.visual_abstractor,
        connection,
        blocks,
    )


def patches(vlm, size, inputs):
    """The ViT's patches without CLS, over the picture as its preprocessed square shows it."""
    rows, columns = (
        side // vlm.model.config.vision_config.patch_size
        for side in inputs["pixel_values"].shape[-2:]
    )
    square = region(vlm.processor.image_processor, (max(size),) * 2)
    return PatchGrid.regular(
        rows,
        columns,
        [edge * own / max(size) for edge, own in zip(square, size * 2, strict=True)],
        size,
    )


def prompt(vlm, question, system):
    return (f"{system} " if system else "") + f"USER: {llava_original.IMAGE}{question} ASSISTANT:"


def inputs(vlm, batch):
    """The modality of every position, (B, T)."""
    return {"modality": (batch.groups == GROUPS.index("vision")).long()}


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

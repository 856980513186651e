"""mPLUG-Owl2's classes: an abstractor whose queries read the patches of a CLIP tower, and a Llama
that has its own norms, keys and values for the picture (mplug_owl2.py says how they are read from
the authors' files).

A layer of the abstractor:

    x = norm1(x)
    x = x + out(attention(x, [x, normk(patches)]))      CLS first among the patches
    x = x + mlp(norm2(x))

so the residual stream is the normed one. Fixed sine positions are added to what makes queries and
keys. Behind the queries comes `vit_eos`, a learned vector, as one more vision token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
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

from vlmdiag.families.assembled import with_features
from vlmdiag.types import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import Cache


# --- configs --------------------------------------------------------------------------------------


class AbstractorConfig(PreTrainedConfig):
    """Sizes of the abstractor; patches: of the tower, width: of the decoder."""

    model_type = "mplug_owl2_abstractor"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 16,
        num_learnable_queries: int = 64,
        encoder_hidden_size: int = 1024,
        layer_norm_eps: float = 1e-6,
        patches: int = 1024,
        width: int = 4096,
        **options: object,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_learnable_queries = num_learnable_queries
        self.encoder_hidden_size = encoder_hidden_size
        self.layer_norm_eps = layer_norm_eps
        self.patches = patches
        self.width = width
        super().__init__(**options)


class MplugOwl2Config(PreTrainedConfig):
    """The configs of tower, abstractor and decoder, each as such or as a dict."""

    model_type = "mplug_owl2"
    sub_configs = {
        "text_config": LlamaConfig,
        "vision_config": CLIPVisionConfig,
        "abstractor_config": AbstractorConfig,
    }

    def __init__(
        self,
        text_config: LlamaConfig | Record | None = None,
        vision_config: CLIPVisionConfig | Record | None = None,
        abstractor_config: AbstractorConfig | Record | None = None,
        image_token_id: int = 32000,
        **options: object,
    ) -> None:
        given = {
            "text_config": text_config,
            "vision_config": vision_config,
            "abstractor_config": abstractor_config,
        }
        for name, config in given.items():
            if not isinstance(config, PreTrainedConfig):
                config = self.sub_configs[name](**(config or {}))
            setattr(self, name, config)
        self.image_token_id = image_token_id
        super().__init__(**options)


# --- the abstractor -------------------------------------------------------------------------------


def sines(positions: Int[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Sine positions: the sines of all frequencies 10000^(-2i / width), then the cosines."""
    half = width // 2
    angles = positions[:, None].float() * 10000.0 ** -(torch.arange(half).float() / half)
    return torch.cat([angles.sin(), angles.cos()], -1)


def sine_tables(config: AbstractorConfig) -> dict[str, Float[Tensor, "n d"]]:
    """{"q_pos_embed": (q, d), "k_pos_embed": (1 + patches, d)}: by number; zeros for CLS, then by
    column and row, in this order."""
    side = round(config.patches**0.5)
    width = config.hidden_size
    rows = torch.arange(side).repeat_interleave(side)
    columns = torch.arange(side).repeat(side)
    places = torch.cat([sines(columns, width // 2), sines(rows, width // 2)], -1)
    return {
        "q_pos_embed": sines(torch.arange(config.num_learnable_queries), width),
        "k_pos_embed": torch.cat([torch.zeros(1, width), places]),
    }


def split_heads(x: Float[Tensor, "B T H*D"], head_dim: int) -> Float[Tensor, "B H T D"]:
    """Vectors by their heads."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class AbstractorAttention(nn.Module):
    """Attention of the queries over themselves and the patches."""

    is_causal = False
    q_pos_embed: Float[Tensor, "q d"]
    k_pos_embed: Float[Tensor, "S d"]

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.value = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        for name, table in sine_tables(config).items():
            self.register_buffer(name, table)

    def forward(
        self, states: Float[Tensor, "B q d"], keys: Float[Tensor, "B q+S d"]
    ) -> tuple[Float[Tensor, "B q d"], Float[Tensor, "B H q q+S"] | None]:
        """Output, and weights with eager attention. keys: the queries' states, then the patches."""
        of_queries = self.q_pos_embed.to(states)
        of_keys = torch.cat([of_queries, self.k_pos_embed.to(states)])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_without_groups
        )
        output, weights = attend(
            self,
            split_heads(self.query(states + of_queries), self.head_dim),
            split_heads(self.key(keys + of_keys), self.head_dim),
            split_heads(self.value(keys), self.head_dim),
            None,
            scaling=self.head_dim**-0.5,
            dropout=0.0,
        )
        return output.flatten(2), weights


class AbstractorLayer(nn.Module):
    """See the module's docstring. Norms have eps 1e-5, the one inside the MLP the config's."""

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.attention = AbstractorAttention(config)
        self.norm1 = nn.LayerNorm(width)
        self.normk = nn.LayerNorm(config.encoder_hidden_size)
        self.norm2 = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=config.layer_norm_eps)

    def forward(
        self, states: Float[Tensor, "B q d"], patches: Float[Tensor, "B S d"]
    ) -> Float[Tensor, "B q d"]:
        """The queries' next states."""
        states = self.norm1(states)
        keys = torch.cat([states, self.normk(patches)], 1)
        attended, _ = self.attention(states, keys)
        states = states + self.out_proj(attended)
        x = self.norm2(states)
        gated = nn.functional.silu(self.w1(x)) * self.w3(x)
        return states + self.w2(self.ffn_ln(gated))


class Abstractor(PreTrainedModel):
    """Vision tokens from the tower's patches."""

    config_class = AbstractorConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__(config)
        queries = torch.randn(1, config.num_learnable_queries, config.hidden_size)
        self.query_embeds = nn.Parameter(queries)
        self.layers = nn.ModuleList(
            [AbstractorLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.visual_fc = nn.Linear(config.hidden_size, config.width)
        self.vit_eos = nn.Parameter(torch.randn(1, 1, config.width))
        self.post_init()

    def forward(self, patches: Float[Tensor, "B S d_v"]) -> Float[Tensor, "B q+1 d"]:
        """The queries' vision tokens, then `vit_eos`. patches: CLS first."""
        states = self.query_embeds.expand(len(patches), -1, -1)
        for layer in self.layers:
            states = layer(states, patches)
        end = self.vit_eos.expand(len(patches), -1, -1)
        return torch.cat([self.visual_fc(states), end], 1)


# --- the decoder ----------------------------------------------------------------------------------


class Multiway(nn.Module):
    """Two modules of one kind: tokens go through the first where modality is 0 or None, through the
    second where it is 1."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(
        self, states: Float[Tensor, "B T d"], modality: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T d_out"]:
        """What each token's own module makes of it."""
        text = self.multiway[0](states)
        if modality is None:
            return text
        return torch.where(modality[..., None].bool(), self.multiway[1](states), text)


class OwlAttention(LlamaAttention):
    """Llama's attention with two key and two value projections."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.num_key_value_heads * self.head_dim

        def projection() -> nn.Linear:
            return nn.Linear(config.hidden_size, width, bias=config.attention_bias)

        self.k_proj = Multiway(projection)
        self.v_proj = Multiway(projection)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T d"],
        position_embeddings: tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        modality: Int[Tensor, "B T"] | None = None,
        **options: object,
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B H T K"] | None]:
        """Output, and weights with eager attention."""
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(hidden_states, modality), self.head_dim)
        value = split_heads(self.v_proj(hidden_states, modality), self.head_dim)
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

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)

        def norm() -> LlamaRMSNorm:
            return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.self_attn = OwlAttention(config, layer_idx)
        self.input_layernorm = Multiway(norm)
        self.post_attention_layernorm = Multiway(norm)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T d"],
        modality: Int[Tensor, "B T"] | None = None,
        **options: object,
    ) -> Float[Tensor, "B T d"]:
        """The tokens' next states."""
        normed = self.input_layernorm(hidden_states, modality)
        attended, _ = self.self_attn(normed, modality=modality, **options)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, modality))


class OwlDecoder(LlamaModel):
    """Llama of such layers, which get `modality` (B, T) from its forward. rows: of its embedding
    table, at least."""

    def __init__(self, config: LlamaConfig, rows: int) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            [OwlLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        if rows > config.vocab_size:
            self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.post_init()


# --- the whole model ------------------------------------------------------------------------------


class MplugOwl2(PreTrainedModel, GenerationMixin):
    """The whole model. The embedding table has a row for the placeholder's id, the logits do
    not."""

    config_class = MplugOwl2Config
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["OwlLayer", "AbstractorLayer", "CLIPEncoderLayer"]

    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_abstractor = Abstractor(config.abstractor_config)
        self.language_model = OwlDecoder(text, config.image_token_id + 1)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding table."""
        return self.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The LM head."""
        return self.lm_head

    def get_decoder(self) -> OwlDecoder:
        """The decoder."""
        return self.language_model

    def get_image_features(
        self, pixel_values: Float[Tensor, "B c height width"], return_dict: bool = True, **_: object
    ) -> BaseModelOutputWithPooling:
        """pooler_output (B, q + 1, d), last_hidden_state (B, 1 + P, d of the tower) after its
        norm."""
        output = self.vision_model(pixel_values, return_dict=True)
        states = self.vision_model.post_layernorm(output.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=states, pooler_output=self.visual_abstractor(states)
        )

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        pixel_values: Float[Tensor, "B c height width"] | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        attention_mask: Int[Tensor, "B K"] | None = None,
        modality: Int[Tensor, "B T"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int = 0,
        **options: object,
    ) -> CausalLMOutputWithPast:
        """Logits and cache. pixel_values or mm_encoder_outputs {"image": ...} where input_ids hold
        a picture; modality: 1 where the picture is, by the ids where it is left out."""
        if input_ids is not None:
            in_picture = input_ids == self.config.image_token_id
            # a single token is a generated one
            if modality is None and input_ids.shape[1] > 1:
                modality = in_picture
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if mm_encoder_outputs is not None:
                features = mm_encoder_outputs["image"].pooler_output
                inputs_embeds = with_features(inputs_embeds, in_picture, features)
        output = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, modality=modality, **options
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state[:, -logits_to_keep:]),
            past_key_values=output.past_key_values,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Int[Tensor, "B T"], is_first_iteration: bool = False, **kwargs: object
    ) -> Record:
        """transformers' own, the prompt's modality at its pass only."""
        if not is_first_iteration:
            kwargs.pop("modality", None)
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )

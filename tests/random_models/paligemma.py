"""Random PaliGemmas on Gemma and on Gemma 2 (capped scores, a window in every second layer), 6 x 6
patches."""

from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    set_seed,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.building import sharpen
from tests.random_models.internvl import clear, make_tokenizer, text_config

SIGLIP = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "vision_use_head": False,
}


def build(folder, text):
    tokenizer = make_tokenizer(folder, image_token="<image>")
    more = {"head_dim": 16} | (
        {"sliding_window": 4096, "query_pre_attn_scalar": 16} if text == "gemma2" else {}
    )
    images = SiglipImageProcessorPil(size={"height": 84, "width": 84}, image_seq_length=36)
    # it adds <loc0000> ... to the tokenizer
    PaliGemmaProcessor(images, tokenizer).save_pretrained(folder)
    config = PaliGemmaConfig(
        text_config=text_config(tokenizer, text, **more),
        vision_config={"model_type": "siglip_vision_model", "image_size": 84, **SIGLIP},
        projection_dim=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = PaliGemmaForConditionalGeneration(config)
    clear(
        model,
        "model.vision_tower.embeddings.patch_embedding",
        ["model.multi_modal_projector.linear"],
    )
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    return folder


MODELS = {
    "paligemma": lambda folder: build(folder, "gemma"),
    "paligemma2": lambda folder: build(folder, "gemma2"),
}

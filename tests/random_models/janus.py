"""A random Janus: 12 x 12 patches, Llama, the part that draws as small as can be."""

from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, set_seed
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from tests.building import sharpen
from tests.random_models.deepseek_vl import TEMPLATE
from tests.random_models.internvl import clear, make_tokenizer, text_config


def build(folder):
    named = {
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = make_tokenizer(folder, **named)
    config = JanusConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 168,
            "patch_size": 14,
            "mlp_ratio": 1.5,
            "projection_dim": 64,
            "num_image_tokens": 144,
        },
        vq_config={
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = JanusForConditionalGeneration(config)
    clear(model, "model.vision_model.embeddings.patch_embedding", ["model.aligner"], by=5)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = JanusImageProcessorPil(size={"height": 168, "width": 168})
    JanusProcessor(
        images,
        tokenizer,
        chat_template=TEMPLATE,
        num_image_tokens=144,
        use_default_system_prompt=True,
    ).save_pretrained(folder)
    return folder


MODELS = {"janus": build}

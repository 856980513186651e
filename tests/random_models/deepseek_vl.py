"""A random DeepSeek-VL: 12 x 12 patches, Llama."""

from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    set_seed,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)

from tests.building import sharpen
from tests.random_models.internvl import clear, make_tokenizer, text_config
from tests.random_models.paligemma import SIGLIP

SYSTEM = "You are a helpful language and vision assistant."
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'][0]['text'] }}\n\n{% else"
    " %}SYSTEM\n\n{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}User:"
    " {% for part in message['content'] %}{% if part['type'] == 'image' %}<image_placeholder>{%"
    " else %}{{ part['text'] }}{% endif %}{% endfor %}\n\n{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}Assistant:{% endif %}"
).replace("SYSTEM", SYSTEM)


def build(folder):
    tokenizer = make_tokenizer(folder, image_token="<image_placeholder>")
    config = DeepseekVLConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config={"model_type": "siglip_vision_model", "image_size": 168, **SIGLIP},
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = DeepseekVLForConditionalGeneration(config)
    clear(
        model,
        "model.vision_model.embeddings.patch_embedding",
        ["model.aligner.linear1", "model.aligner.linear2"],
        by=4,
    )
    # so that norms weaken a plain change no more than a small one
    model.model.vision_model.embeddings.position_embedding.weight.data.normal_(0, 5)
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = DeepseekVLImageProcessorPil(size={"height": 168, "width": 168})
    DeepseekVLProcessor(
        images, tokenizer, chat_template=TEMPLATE, num_image_tokens=144
    ).save_pretrained(folder)
    return folder


MODELS = {"deepseek-vl": build}

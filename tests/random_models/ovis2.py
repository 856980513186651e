"""Random Ovis 2 models: tiles of 6 x 6 patches, 3 x 3 tokens each; the second has its picture on
one tile."""

from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor, set_seed
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.building import sharpen
from tests.random_models.internvl import TEMPLATE, clear, make_tokenizer, text_config

INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


def build(folder, crop=True):
    tokenizer = make_tokenizer(
        folder,
        ["<|im_start|>", "<IMG_ATOM>", *INDICATORS],
        "<|im_end|>",
        False,
        image_token="<image>",
    )
    ids = tokenizer.convert_tokens_to_ids
    text = text_config(tokenizer, "qwen2", tie_word_embeddings=False)
    config = Ovis2Config(
        text_config=text,
        hidden_size=64,
        vocab_size=len(tokenizer),
        image_token_id=ids("<IMG_ATOM>"),
        visual_indicator_token_ids=ids(INDICATORS),
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 84,
            "patch_size": 14,
            "vocab_size": 69,
            "hidden_stride": 2,
        },
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = Ovis2ForConditionalGeneration(config)
    clear(
        model,
        "model.vision_tower.transformer.embeddings.patch_embedding",
        ["model.visual_embeddings_table"],
    )
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    images = Ovis2ImageProcessorPil(
        size={"height": 84, "width": 84}, max_patches=6, crop_to_patches=crop
    )
    Ovis2Processor(
        images, tokenizer, TEMPLATE.replace("IMAGE", "<image>"), image_seq_length=9
    ).save_pretrained(folder)
    return folder


MODELS = {"ovis2": build, "ovis2-one-tile": lambda folder: build(folder, crop=False)}

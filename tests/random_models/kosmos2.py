"""A random Kosmos-2: 4 x 4 patches read by 6 queries."""

from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor, set_seed
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.random_models.internvl import make_tokenizer

# of parameters by the end of their name, not those of the tower's blocks
SCALES = {
    "q_proj.weight": 8,
    "k_proj.weight": 8,
    "embed_tokens.weight": 6,
    "patch_embedding.weight": 8,
    "dense.weight": 20,
}


def build(folder):
    tokenizer = make_tokenizer(folder)
    square = {"height": 56, "width": 56}
    # it adds its tags to the tokenizer
    Kosmos2Processor(
        CLIPImageProcessorPil(size=square, crop_size=square), tokenizer
    ).save_pretrained(folder)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Kosmos2Config(
        text_config={
            "vocab_size": len(tokenizer),
            "embed_dim": 64,
            "layers": 3,
            "ffn_dim": 96,
            "attention_heads": 4,
            "tie_word_embeddings": False,
            **ids,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
        },
        latent_query_num=6,
        tie_word_embeddings=False,
        **ids,
    )
    set_seed(0)
    model = Kosmos2ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        for ending, scale in SCALES.items():
            if name.endswith(ending) and "encoder.layers" not in name:
                parameter.data *= scale
    model.save_pretrained(folder)
    return folder


MODELS = {"kosmos2": build}

"""LLaVA checkpoints in their authors' layout mean the same as the Hugging Face folder they were
made from; and what is wrong with one is said in a line.

The converter below is the inverse of vlmdiag/families/llava_original.py, written from the layout's
description, and exists only here.
"""

import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Qwen2Config,
)

import common
from tests.building import sharpen
from vlmdiag.cli import UsageError
from vlmdiag.families import llava_conversations, llava_original
from vlmdiag.families.files import read_weights
from vlmdiag.families.llava import NormedLlava
from vlmdiag.families.llava_conversations import CONVERSATIONS, USER
from vlmdiag.model import prompts
from vlmdiag.model.decoding import generate
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes import tiny_llava as tiny
from vlmdiag.scenes.scene import floor_scene, render

QUESTION = "Is there a red circle in the image? Where  are the 12 blue squares?\nSay: é"
EXTRAS = {
    "base": {},
    "normWmean": {
        "vision_embed_norm": {"type": "rms_clip", "eps": 1e-6, "max_norm": 1.7, "scale": 0.6}
    },
    "multilayerNorm": {
        "vision_embed_norm": {"type": "rms_clip", "eps": 1e-6, "max_norm": 1.7, "scale": 0.6},
        "vision_feature_post_layernorm": True,
        "vision_feature_layer": [2, 3, 4, 5],
    },
}
KEYS = {
    "base": {},
    "normWmean": {
        "normalize_projector": True,
        "normalize_projector_max_norm": 1.7,
        "normalize_projector_scale": 0.6,
    },
    "multilayerNorm": {
        "normalize_projector": True,
        "normalize_projector_max_norm": 1.7,
        "normalize_projector_scale": 0.6,
        "use_multilayer_features": True,
    },
}


def original_name(name, projector="", level="vision_model."):
    """The authors' name of a parameter of transformers' Llava."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    name = re.sub(r"^model\.vision_tower\.", f"model.vision_tower.vision_tower.{level}", name)
    name = re.sub(
        r"^model\.multi_modal_projector\.linear_([12])\.",
        lambda m: f"model.mm_projector.{projector}{2 * int(m[1]) - 2}.",
        name,
    )
    return re.sub(r"^model\.multi_modal_projector\.norm\.", "model.mm_projector.norm.", name)


def write_weights(folder, state, kind, shards):
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(state)
    size = -(-len(state) // shards)
    stored = [
        {name: state[name].clone().contiguous() for name in names[i * size :][:size]}
        for i in range(shards)
    ]
    files = (
        [f"{stem}.{ending}"]
        if shards == 1
        else [f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}" for i in range(shards)]
    )
    for file, shard in zip(files, stored, strict=True):
        if kind == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file, _use_new_zipfile_serialization=kind != "old bin")
    if shards > 1:
        index = {name: file for file, shard in zip(files, stored, strict=True) for name in shard}
        (folder / f"{stem}.{ending}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )


def to_original(
    source,
    folder,
    kind="safetensors",
    shards=1,
    tower=True,
    projector="",
    level="vision_model.",
    model_type="llava_llama",
    **config,
):
    """Write the Hugging Face model in `source` in the authors' layout. tower: its weights inside;
    else only its name is in the config."""
    folder.mkdir(parents=True)
    text = source.model.config.text_config
    rows = source.pieces.vocab_size()
    state = {
        original_name(name, projector, level): value
        for name, value in source.model.state_dict().items()
        if tower or "vision_tower" not in name
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:rows]
    # a buffer that old checkpoints hold
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    write_weights(folder, state, kind, shards)
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "hidden_act",
    )
    settings = {name: getattr(text, name) for name in names} | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_scaling": None,
    }
    settings |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": model_type,
        "vocab_size": rows,
        "tie_word_embeddings": False,
    }
    settings |= {
        "mm_vision_tower": "openai/tiny-tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    settings |= (
        {"torch_dtype": "float16", "image_aspect_ratio": "pad", "mm_use_im_start_end": False}
        | KEYS[source.variant]
        | config
    )
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value != "absent"})
    )
    bos = {"add_bos_token": True} if kind == "bin" else {}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False} | bos)
    )
    shutil.copy(source.spm, folder / "tokenizer.model")
    return folder


def write_tower(source, folder, kind="safetensors"):
    """The tower as a CLIP model of its own, with `vision_model.` in the names and a stray text
    part."""
    folder.mkdir(parents=True)
    tower = source.model.model.vision_tower
    state = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    state |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.bias": torch.ones(2)}
    write_weights(folder, state, kind, 1)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "clip",
                "vision_config": tower.config.to_diff_dict() | {"model_type": "clip_vision_model"},
            }
        )
    )
    preprocessing = {
        "size": 168,
        "crop_size": 168,
        "image_mean": tiny.MEAN,
        "image_std": tiny.STD,
        "do_resize": True,
        "do_center_crop": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(
        "vlmdiag.families.files.snapshot_download",
        lambda name, **_: (_ for _ in ()).throw(OSError(f"no network for {name}")),
    )


def make_source(folder, variant):
    """A model with random weights, its Hugging Face folder and its sentencepiece file."""
    extra = EXTRAS[variant]
    folder.mkdir(parents=True)
    tiny.make_tokenizer(folder)
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), legacy=True)
    tokenizer.add_bos_token = True
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    config = tiny.make_config(tokenizer, **extra)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = (NormedLlava if extra else LlavaForConditionalGeneration)(config).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 and ("vision_tower" in name or "projector" in name):
            p.data = p.data + 0.1 * torch.randn_like(p)  # gains and biases that are not 1 and 0
    model.model.vision_tower.embeddings.patch_embedding.weight.data *= (
        20  # a patch's own pixels are to count most in its token
    )
    sharpen(model, model.model.language_model.layers).save_pretrained(folder)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return SimpleNamespace(
        variant=variant, model=model, folder=folder, spm=folder / "tokenizer.model", pieces=pieces
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{variant: what make_source() gives}"""
    return {
        variant: make_source(tmp_path_factory.mktemp(variant) / "hf", variant) for variant in EXTRAS
    }


@pytest.fixture(scope="module")
def reference(sources, picture):
    """{variant: (prompt, ids, logits)} of the Hugging Face folders."""
    return {
        variant: answers_of(common.load_model(source.folder, self_check=False), picture)
        for variant, source in sources.items()
    }


@pytest.fixture(scope="module")
def picture():
    return render(floor_scene(random.Random(3), 3, square=False))


@torch.no_grad()
def answers_of(vlm, picture):
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    ids = batch.input_ids[0].tolist()
    logits = vlm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.image_inputs["pixel_values"],
    ).logits[0]
    return batch.prompts[0], ["image" if i == vlm.image_token_id else i for i in ids], logits


def assert_same(vlm, picture, expected, rows):
    prompt, ids, logits = answers_of(vlm, picture)
    assert prompt == expected[0]
    assert ids == expected[1]
    assert logits.shape[-1] == rows  # no logit for the placeholder
    torch.testing.assert_close(logits, expected[2][:, :rows], rtol=1e-5, atol=1e-5)


LAYOUTS = [
    {"kind": "safetensors", "shards": 1, "model_type": "llava"},
    {"kind": "bin", "shards": 2, "model_type": "llava", "projector": "projector."},
    {"kind": "safetensors", "shards": 3, "level": ""},
    {"kind": "old bin", "shards": 1, "architectures": "absent"},
]


@pytest.mark.parametrize("variant", EXTRAS)
@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: f"{layout['kind']}-{layout['shards']}"
)
def test_logits_and_prompt_ids_equal_those_of_the_source(
    sources, reference, picture, tmp_path, variant, layout
):
    folder = to_original(sources[variant], tmp_path / "anything", **layout)
    # for its config: the weights are in the checkpoint
    tower = write_tower(sources[variant], tmp_path / "tower")
    vlm = common.load_model(folder, vision_tower_path=str(tower), self_check=False)
    assert vlm.family.name == "llava_original"
    assert_same(vlm, picture, reference[variant], sources[variant].pieces.vocab_size())


@pytest.mark.parametrize("variant", EXTRAS)
@pytest.mark.parametrize("where", ["flag", "beside", "path"])
def test_a_tower_outside_the_checkpoint_is_found(
    sources, reference, picture, tmp_path, variant, where
):
    tower = write_tower(
        sources[variant], tmp_path / ("other" if where == "flag" else "tiny-tower"), kind="bin"
    )
    named = {"mm_vision_tower": str(tower)} if where == "path" else {}
    parent = tmp_path / "elsewhere" if where == "path" else tmp_path
    folder = to_original(sources[variant], parent / "model", tower=False, **named)
    vlm = common.load_model(
        folder, vision_tower_path=str(tower) if where == "flag" else None, self_check=False
    )
    assert_same(vlm, picture, reference[variant], sources[variant].pieces.vocab_size())


def test_a_tied_table_serves_as_lm_head_without_the_placeholder(sources, tmp_path):
    source = sources["base"]
    tower = str(write_tower(source, tmp_path / "tower"))
    folder = to_original(source, tmp_path / "tied", tie_word_embeddings=True)
    vlm = common.load_model(folder, vision_tower_path=tower, self_check=False)
    assert torch.equal(vlm.model.lm_head.weight, vlm.model.get_input_embeddings().weight[:-1])
    assert vlm.image_token_id == source.pieces.vocab_size()


def test_ids_are_those_of_the_authors_tokenization(sources, picture, tmp_path):
    """BOS, then sentencepiece on the text before and after the picture, each on its own."""
    source = sources["base"]
    vlm = common.load_model(
        to_original(source, tmp_path / "model"),
        vision_tower_path=str(write_tower(source, tmp_path / "tower")),
        self_check=False,
    )
    for mode, (sentence, *_) in CONVERSATIONS.items():
        vlm.processor.chat_template = llava_conversations.chat_template(mode)
        prompt, ids, _ = answers_of(vlm, picture)
        before, after = prompt.split("<image>")
        assert prompt.count(QUESTION) == 1 and (sentence in prompt)
        expected = [
            1,
            *(source.pieces.encode(before) if before else []),
            *["image"] * tiny.TOKENS,
            *source.pieces.encode(after),
        ]
        assert ids == expected, mode


PROMPTS = {
    "llava_v1": f"{tiny.SYSTEM} USER: <image>\nWhy? ASSISTANT:",
    "vicuna_v1": f"{USER} USER: <image>\nWhy? ASSISTANT:",
    "v1": f"{USER} USER: <image>\nWhy? ASSISTANT:",
    "llava_v0": f"{tiny.SYSTEM}###Human: <image>\nWhy?###Assistant:",
    "llava_llama_2": f"[INST] <<SYS>>\n{llava_conversations.HELPFUL}\n<</SYS>>\n\n"
    "<image>\nWhy? [/INST]",
    "plain": "<image>\nWhy?\n",
}


def test_conversation_templates_render_and_system_prompts_replace_or_leave(
    sources, picture, tmp_path
):
    source = sources["base"]
    assert set(PROMPTS) == set(CONVERSATIONS)
    vlm = common.load_model(
        to_original(source, tmp_path / "volcano-7b"),
        vision_tower_path=str(write_tower(source, tmp_path / "tower")),
        self_check=False,
    )
    assert prompts.prompt_for(vlm, "Why?")[0] == PROMPTS["llava_v1"]  # not by the folder's name
    for mode, prompt in PROMPTS.items():
        vlm.processor.chat_template = llava_conversations.chat_template(mode)
        vlm.options["system_prompt"] = None
        text, system, question = prompts.prompt_for(vlm, "Why?")
        assert text == prompt
        assert text[slice(*question)] == "Why?"
        assert (text[slice(*system)] if system else "") == CONVERSATIONS[mode][0]
        stripped, system, _ = prompts.prompt_for(vlm, "Why?", strip_system=True)
        bare = {"llava_llama_2": "[INST] <image>\nWhy? [/INST]"}.get(
            mode, prompt.removeprefix(CONVERSATIONS[mode][0]).removeprefix("###").lstrip(" ")
        )
        assert (stripped, system) == (bare, None)
        vlm.options["system_prompt"] = "Be brief."
        text, system, _ = prompts.prompt_for(vlm, "Why?")
        assert text[slice(*system)] == "Be brief."
        assert mode == "plain" or text.replace("Be brief.", CONVERSATIONS[mode][0]) == prompt


def test_the_conversation_template_comes_from_the_config_then_from_the_flag(sources, tmp_path):
    source = sources["base"]
    tower = str(write_tower(source, tmp_path / "tower"))

    def system(folder, **options):
        return prompts.prompt_for(
            common.load_model(folder, vision_tower_path=tower, self_check=False, **options), "Why?"
        )[0]

    plain = to_original(source, tmp_path / "v0")
    named = to_original(source, tmp_path / "named", conv_mode="llava_v0", version="1.0")
    assert system(plain, conv_mode="vicuna_v1") == PROMPTS["vicuna_v1"]
    assert system(named) == system(named, conv_mode="llava_v0") == PROMPTS["llava_v0"]
    with pytest.raises(UsageError, match="names llava_v0"):
        system(named, conv_mode="plain")
    with pytest.raises(
        UsageError,
        match=(
            "no_such: no such conversation template; known: llava_llama_2, llava_v0, llava_v1,"
            " plain"
        ),
    ):
        system(plain, conv_mode="no_such")


def test_image_start_and_end_markers_are_markup(sources, picture, tmp_path):
    source = sources["base"]
    folder = to_original(source, tmp_path / "model", mm_use_im_start_end=True)
    rows = source.pieces.vocab_size()
    (folder / "added_tokens.json").write_text(
        json.dumps({"<im_start>": rows, "<im_end>": rows + 1})
    )
    vlm = common.load_model(
        folder, vision_tower_path=str(write_tower(source, tmp_path / "tower")), self_check=False
    )
    batch = vlm.encode([Sample("0", None, "Why?")], [picture])
    assert batch.prompts[0].endswith("USER: <im_start><image><im_end>\nWhy? ASSISTANT:")
    markup = batch.spans(0)["image_markup"]
    start, end = batch.spans(0)["vision"][0]
    assert markup == [[start - 1, start], [end, end + 1]]
    assert batch.input_ids[0, [start - 1, start, end]].tolist() == [rows, rows + 2, rows + 1]
    assert vlm.image_token_id == rows + 2


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pictures_are_padded_only_where_the_config_says_so(sources, picture, tmp_path, aspect):
    source = sources["base"]
    folder = to_original(source, tmp_path / "model", image_aspect_ratio=aspect)
    vlm = common.load_model(
        folder, vision_tower_path=str(write_tower(source, tmp_path / "tower")), self_check=False
    )
    assert picture.width != picture.height
    seen = vlm.encode([Sample("0", None, "Why?")], [picture]).image_inputs["pixel_values"]
    images = tiny.make_processor(vlm.tokenizer).image_processor
    images.do_pad = aspect == "pad"
    torch.testing.assert_close(seen, images(picture, return_tensors="pt")["pixel_values"])
    assert (vlm.encode([Sample("0", None, "Why?")], [picture]).grids[0].boxes.min() < 0) == (
        aspect == "pad"
    )


def test_the_checks_after_loading_pass_and_the_placeholder_is_never_generated(
    sources, picture, tmp_path
):
    source = sources["multilayerNorm"]
    vlm = common.load_model(
        to_original(source, tmp_path / "model"),
        vision_tower_path=str(write_tower(source, tmp_path / "tower")),
    )
    batch = vlm.encode([Sample("0", None, "Describe the image.")], [picture])
    assert max(generate(vlm, batch, 8).ids[0]) < vlm.image_token_id


def test_published_constants_and_layers_are_the_defaults():
    raw = {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "normalize_projector": True,
        "use_multilayer_features": True,
    }
    assert llava_original.is_original(raw)
    assert not llava_original.is_original(
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    )
    config = llava_original.read_config("x", raw)
    assert config.vision_embed_norm == {
        "type": "rms_clip",
        "eps": 1e-6,
        "max_norm": 1.22,
        "scale": 0.83,
    }
    _, vision = llava_original.tower_of("nowhere/x", raw, None, inside=True)
    assert (vision.image_size, vision.num_hidden_layers) == (336, 24)
    assert llava_original.multilayer(raw, 24) == [12, 16, 20, 24]
    assert llava_original.multilayer(raw, 5) == [2, 3, 4, 5]
    assert llava_original.multilayer(raw | {"multilayer_features": [1, 5]}, 5) == [1, 5]


def broken(source, folder, what):
    """A checkpoint with one defect."""
    options = {
        "missing shard": {"shards": 3},
        "no tower": {"tower": False},
        "no tower config": {},
        "anyres": {"image_aspect_ratio": "anyres"},
    }.get(what, {})
    to_original(source, folder, **options)
    if what == "missing shard":
        (folder / "model-00002-of-00003.safetensors").unlink()
    if what in ("missing parameter", "unknown parameter"):
        state = read_weights(folder, lambda key: key)
        if what == "missing parameter":
            del state["model.mm_projector.2.bias"]
        else:
            state["model.mm_projector.4.bias"] = torch.ones(2)
        write_weights(folder, state, "safetensors", 1)
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    if what == "damaged":
        (folder / "model.safetensors").write_bytes(b"not weights at all")
    if what == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "missing shard",
            (
                "1 of 3 weight files of model.safetensors.index.json are missing in .*, such as"
                " model-00002-of-00003.safetensors"
            ),
        ),
        (
            "missing parameter",
            r"1 parameters are in no file, such as model.multi_modal_projector.linear_2.bias",
        ),
        (
            "unknown parameter",
            r"1 parameters have no place in this model, such as model.mm_projector.4.bias",
        ),
        ("no weights", "has neither model.safetensors nor pytorch_model.bin"),
        ("damaged", "model.safetensors is not readable"),
        ("no tokenizer", "has no tokenizer.model"),
        ("anyres", "image_aspect_ratio = 'anyres' is not supported"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(sources, tmp_path, what, message):
    tower = write_tower(sources["base"], tmp_path / "tower")
    with pytest.raises(UsageError, match=message) as error:
        common.load_model(
            broken(sources["base"], tmp_path / "model", what),
            vision_tower_path=str(tower),
            self_check=False,
        )
    assert "\n" not in str(error.value)


def test_a_tower_that_is_nowhere_is_one_clear_line(sources, tmp_path):
    folder = broken(sources["base"], tmp_path / "model", "no tower")
    with pytest.raises(
        UsageError,
        match=(
            r"'openai/tiny-tower' .* not found at openai/tiny-tower, .*tiny-tower, the hub"
            r" \(OSError\); give --vision_tower_path"
        ),
    ):
        common.load_model(folder, self_check=False)
    with pytest.raises(UsageError, match="--vision_tower_path /nowhere: no config.json there"):
        common.load_model(folder, vision_tower_path="/nowhere", self_check=False)
    with pytest.raises(UsageError, match="the config of the vision tower 'openai/tiny-tower'"):
        common.load_model(
            broken(sources["base"], tmp_path / "inside", "no tower config"), self_check=False
        )


# --- other decoders, in transformers' layout ------------------------------------------------------


@pytest.mark.parametrize("kind", ["phi3", "qwen2"])
def test_llava_with_other_decoders_loads_encodes_and_generates(tmp_path, picture, kind):
    tokenizer = tiny.make_tokenizer(tmp_path)
    tokenizer.add_tokens(
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>"],
        special_tokens=True,
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    text |= {
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=168,
        patch_size=14,
    )
    decoder = {"phi3": Phi3Config, "qwen2": Qwen2Config}[kind](**text)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=image,
        image_seq_length=tiny.TOKENS,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.embeddings.patch_embedding.weight.data *= 20
    model.save_pretrained(tmp_path)
    processor = tiny.make_processor(tokenizer)
    processor.chat_template = None
    processor.save_pretrained(tmp_path)
    vlm = common.load_model(tmp_path)  # with its checks
    batch = vlm.encode(
        [Sample("0", None, "Why?"), Sample("1", None, "Describe the image, please.")],
        [picture, picture],
    )
    start = {"phi3": "<|user|>\n", "qwen2": "<|im_start|>user\n"}[kind]
    assert batch.prompts[0].count(start) == 1 and "Why?<|" in batch.prompts[0]
    assert all(len(batch.vision_positions(row)) == tiny.TOKENS for row in (0, 1))
    assert {"vision", "user", "template"} <= set(batch.spans(0))
    generation = generate(vlm, batch, 4)
    assert all(1 <= len(ids) <= 4 for ids in generation.ids)
    with pytest.raises(
        UsageError, match="--conv_mode llava_v1: for checkpoints in LLaVA's original layout"
    ):
        common.load_model(tmp_path, conv_mode="llava_v1")

"""Types without a file in models/ are served by transformers' conventions: measured like any other,
but without a grid."""

import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import common
from tests.random_models.aya_vision import MODELS as AYAS
from tests.random_models.llava import MODELS as LLAVAS
from vlmdiag.cli import UsageError
from vlmdiag.families import generic
from vlmdiag.families.qwen_vl import KINDS
from vlmdiag.model import configs
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import GroupMass, HiddenNorms, RopeShift


@pytest.fixture
def unknown(monkeypatch):
    """Every type is one without a file."""
    monkeypatch.setattr(configs, "find_family", lambda config: None)


def test_a_type_without_a_file_is_loaded_checked_and_measured(tmp_path, unknown, batch_of):
    vlm = common.load_model(LLAVAS["vipllava"](tmp_path / "vip"))  # with the self-check
    assert vlm.family.name == "generic" and "rotary" in vlm.family.has
    batch = batch_of(vlm)
    probes = [GroupMass(batch, 3), HiddenNorms(), RopeShift(batch, vlm.rotary, [1.0])]
    with capture(vlm, probes):
        found = generate(vlm, batch, 3)
    assert len(found.ids) == 3 and torch.allclose(
        probes[0].mass[0].sum(-1), torch.ones(()), atol=1e-5
    )
    assert batch.grids == [None] * 3
    with pytest.raises(UsageError, match="grid.*generic lacks"):
        vlm.need("grid")


def test_positions_that_turn_neighbours_are_told_from_those_that_turn_halves(tmp_path, unknown):
    """Cohere's rotary positions turn dimensions 2j and 2j + 1, and its layers of full attention
    have none: without a file nothing says so, and the keys of each layer do."""
    name = next(iter(AYAS))
    vlm = common.load_model(AYAS[name](tmp_path / "aya"))
    assert vlm.family.name == "generic" and "rotary" in vlm.family.has
    kinds = vlm.parts.decoder.config.layer_types
    assert len({*kinds}) == 2
    for layer, kind in enumerate(kinds):
        turns = bool(vlm.rotary[layer].inv_freq.any())
        assert turns == (kind == "sliding_attention")
        assert vlm.rotary[layer].interleaved == turns


def test_multimodal_rotary_positions_are_the_models_own(folders, batch_of):
    """Without Qwen2-VL's file its positions are still three-dimensional, equal to what its own
    generate() uses."""
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen"])
    ids = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]
    )
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
            "eos_token_id": ids[4],
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    processor = KINDS["qwen2_vl"][1](
        Qwen2VLImageProcessorPil.from_pretrained(folders["qwen"]),
        tokenizer,
        chat_template=tokenizer.chat_template,
    )
    vlm = common.VLM(model, processor, generic.FAMILY, "random Qwen2-VL")
    batch = batch_of(vlm)
    assert batch.position_ids.shape[0] == 3 and not torch.equal(
        batch.position_ids[1], batch.position_ids[2]
    )
    own = generate(vlm, batch, 6)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "mm_token_type_ids": (batch.input_ids == ids[0]).int(),
    } | batch.image_inputs
    theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
        :, batch.input_ids.shape[1] :
    ].tolist()
    assert own.ids == [row[: len(mine)] for row, mine in zip(theirs, own.ids, strict=True)]

"""A model that is in memory already is measured as the same model from its files."""

import importlib.util

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import common
from tests.conftest import ROOT
from tests.random_models import qwen_vl
from vlmdiag.cli import UsageError
from vlmdiag.model.decoding import generate
from vlmdiag.model.identity import identity_of
from vlmdiag.model.probes import GroupMass
from vlmdiag.pictures.samples import Sample

TINY = str(ROOT / "checkpoints" / "tiny-llava")


def objects():
    model = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(TINY, backend="pil")


def measured(vlm):
    batch = vlm.encode([Sample("0", None, "Is there a red circle?")], [Image.new("RGB", (60, 50))])
    with common.capture(vlm, [mass := GroupMass(batch, 3)]):
        generation = generate(vlm, batch, 3)
    return generation.first, torch.stack(mass.mass)


def test_a_model_in_memory_gives_the_numbers_of_its_files():
    model, processor = objects()
    vlm = common.load_model(model=model, processor=processor)
    assert vlm.model is model
    assert vlm.family.name == "llava"
    for ours, theirs in zip(measured(vlm), measured(common.load_model(TINY)), strict=True):
        assert torch.equal(ours, theirs)


def test_another_weight_is_another_model():
    model, processor = objects()
    vlm = common.load_model(model=model, processor=processor, self_check=False)
    before = identity_of(vlm)
    assert identity_of(vlm) == before
    with torch.no_grad():
        vlm.parts.layers[1].mlp.down_proj.weight[:] *= 1.01
    assert identity_of(vlm)["fingerprint"] != before["fingerprint"]


def test_a_family_with_multimodal_positions_works_too(tmp_path):
    vlm = common.load_model(qwen_vl.MODELS["qwen2_5_vl"](tmp_path))
    again = common.load_model(model=vlm.model, processor=vlm.processor)
    assert again.family.name == vlm.family.name == "qwen2_5_vl"
    assert torch.equal(measured(again)[0], measured(vlm)[0])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_the_adapters_of_a_peft_model_are_at_work():
    from peft import LoraConfig, get_peft_model

    model, processor = objects()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    vlm = common.load_model(model=adapted, processor=processor)
    plain = common.load_model(TINY)
    assert not torch.allclose(measured(vlm)[0], measured(plain)[0], atol=1e-3)
    with adapted.disable_adapter():
        assert torch.allclose(measured(vlm)[0], measured(plain)[0], atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_what_an_adapter_is_at_is_part_of_the_identity():
    from peft import LoraConfig, get_peft_model

    model, processor = objects()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    vlm = common.load_model(model=adapted, processor=processor, self_check=False)
    seen = {identity_of(vlm)["fingerprint"]}
    adapted.disable_adapter_layers()
    seen.add(identity_of(vlm)["fingerprint"])
    adapted.enable_adapter_layers()
    for layer in adapted.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3)
    seen.add(identity_of(vlm)["fingerprint"])
    assert len(seen) == 3


def test_the_users_objects_stay_as_they_were():
    model, processor = objects()
    processor.image_processor.do_pad = False
    common.load_model(model=model, processor=processor, image_aspect="pad", self_check=False)
    assert processor.image_processor.do_pad is False
    assert all(parameter.requires_grad for parameter in model.parameters())
    for options in ({"quantize_type": "4bit"}, {"device": "cpu"}, {"decoder_layers": 1}):
        with pytest.raises(UsageError, match="taken as it is"):
            common.load_model(model=model, processor=processor, **options)
    with pytest.raises(UsageError, match="this is a DataParallel"):
        common.load_model(model=torch.nn.DataParallel(model), processor=processor)


def test_what_is_missing_is_said_in_a_line(tmp_path):
    model, processor = objects()
    with pytest.raises(UsageError, match="processor="):
        common.load_model(model=model)
    with pytest.raises(UsageError, match="takes a path"):
        common.load_model()
    from tests.building import build_blip

    folder = build_blip(tmp_path, False, "opt")
    from transformers import Blip2ForConditionalGeneration

    other = Blip2ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(UsageError, match="save it and load the folder"):
        common.load_model(model=other, processor=processor)

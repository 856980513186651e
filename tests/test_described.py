"""What is particular to the families that transformers has and models/ describes: masks, scales,
tiles, native boxes, against transformers' own classes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

import common
from tests.conftest import QUESTIONS, embeddings
from tests.random_models import (
    aya_vision,
    deepseek_vl,
    gemma3,
    internvl,
    janus,
    kosmos2,
    molmo2,
    ovis2,
    paligemma,
)
from vlmdiag.families import molmo2 as molmo2_family
from vlmdiag.families import ovis2 as ovis2_family
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.selfcheck import noise_picture
from vlmdiag.model.vision import more_inputs, prefill
from vlmdiag.pictures.samples import Sample

BUILDERS = {}
for _module in (
    aya_vision,
    deepseek_vl,
    gemma3,
    internvl,
    janus,
    kosmos2,
    molmo2,
    ovis2,
    paligemma,
):
    BUILDERS |= _module.MODELS
NAMES = sorted(BUILDERS)
# these two have processors that need torchvision
OWN = [name for name in NAMES if not name.startswith(("internvl", "molmo2"))]
SIZES = [(168, 126), (60, 130), (200, 90)]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """get(name) -> VLM, loaded once."""
    loaded = {}
    root = tmp_path_factory.mktemp("described")

    def get(name):
        if name not in loaded:
            loaded[name] = common.load_model(BUILDERS[name](root / name), self_check=False)
        return loaded[name]

    return get


def one(vlm, question=QUESTIONS[0], picture=None):
    return vlm.encode([Sample("0", None, question)], [picture or noise_picture()])


@pytest.mark.parametrize("name", OWN)
def test_the_model_reads_what_transformers_own_processor_makes(families, name):
    vlm = families(name)
    processor = AutoProcessor.from_pretrained(vlm.path, backend="pil")
    bos = vlm.tokenizer.bos_token
    processor.use_default_system_prompt = False  # of Janus: its own template writes one
    for question, size in zip(QUESTIONS, SIZES, strict=True):
        batch = one(vlm, question, picture := noise_picture(size))
        text = batch.prompts[0]
        options = {"add_special_tokens": not batch.prompts[0].startswith(bos)}
        if name.startswith("paligemma"):
            text = text.removesuffix("\n")  # it adds BOS and line break to the bare question
        if name == "kosmos2":
            options = {"num_image_tokens": 6}
        theirs = processor(images=picture, text=text, return_tensors="pt", **options)
        ids = theirs["input_ids"].clone()
        if name == "kosmos2":
            assert torch.equal(
                theirs["image_embeds_position_mask"], (batch.input_ids == vlm.image_token_id).long()
            )
            ids[theirs["image_embeds_position_mask"] == 1] = vlm.image_token_id
        assert torch.equal(batch.input_ids, ids)
        assert torch.equal(batch.image_inputs["pixel_values"], theirs["pixel_values"])


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_own_class_which_derives_masks_and_positions_itself(
    families, name
):
    vlm = families(name)
    model = AutoModelForImageTextToText.from_pretrained(vlm.path).eval()
    for question, size in zip(QUESTIONS, SIZES, strict=True):
        batch = one(vlm, question, noise_picture(size))
        theirs = model(
            **batch.image_inputs,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **more_inputs(vlm, batch),
        ).logits[:, -1]
        assert torch.allclose(prefill(vlm, batch).logits[:, -1], theirs, atol=1e-5, rtol=1e-4)
        assert torch.allclose(
            prefill(vlm, batch, embeds=embeddings(vlm, batch)).logits[:, -1],
            theirs,
            atol=1e-5,
            rtol=1e-4,
        )


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_norm_head_scale_and_cap_give_the_models_logits(families, name):
    vlm = families(name)
    batch = one(vlm)
    with capture(vlm, [hidden := HiddenStates()]):
        logits = prefill(vlm, batch).logits[:, -1]
    Lens(vlm).check(hidden.states[max(hidden.states)][:, -1], logits)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "picture_ahead", "question_ahead"),
    [
        ("paligemma", True, True),
        ("paligemma2", True, True),
        ("gemma3", True, False),
        ("gemma3-window", True, False),
        ("molmo2", True, False),
        ("internvl-qwen2", False, False),
        ("aya-vision", False, False),
        ("kosmos2", False, False),
    ],
)
def test_what_the_first_vision_token_sees_of_what_follows(
    families, name, picture_ahead, question_ahead
):
    """Of the last vision token, and of the question's last word. What is not ahead changes no
    earlier position: "causal"."""
    vlm = families(name)
    batch = one(vlm)
    places = batch.vision_positions(0)
    # 40 positions, of which 36 are the picture
    window = 36 if name == "gemma3-window" else len(places)
    embeds = embeddings(vlm, batch)

    def first_state(changed):
        with capture(vlm, [hidden := HiddenStates()]):
            prefill(vlm, batch, embeds=changed)
        return hidden.states[max(hidden.states)][0, places[0]]

    def with_other(place):
        changed = embeds.clone()
        changed[0, place] = changed[0, place].flip(0) + 1
        return (first_state(changed) - first_state(embeds)).abs().max() > 1e-5

    question = (batch.groups[0] == GROUPS.index("user")).nonzero()[-1, 0]
    assert bool(with_other(places[window - 1])) == picture_ahead
    assert bool(with_other(question)) == question_ahead
    assert ("causal" in vlm.family.has) == (not picture_ahead)


def test_all_have_rotary_positions_but_those_with_a_table_of_positions(families):
    lacking = {"kosmos2"}
    assert {name for name in NAMES if "rotary" not in families(name).family.has} == lacking


def test_tiles_lie_side_by_side_and_the_whole_picture_is_last_or_first(families):
    boxes = one(families("internvl-qwen2"), picture=noise_picture((168, 84))).grids[0].boxes
    assert len(boxes) == 27
    assert [boxes[i].tolist() for i in (0, 1, 3, 9, 18)] == [
        [0, 0, 28, 28],
        [28, 0, 56, 28],
        [0, 28, 28, 56],
        [84, 0, 112, 28],
        [0, 0, 56, 28],
    ]
    boxes = one(families("ovis2"), picture=noise_picture((252, 84))).grids[0].boxes
    processor = families("ovis2").processor.image_processor
    assert ovis2_family.tile_counts(processor, (252, 84)) == (1, 3) and len(boxes) == 36, (
        "transformers takes rows for columns"
    )
    assert [boxes[i].tolist() for i in (0, 9, 18)] == [
        [0, 0, 84, 28],
        [0, 0, 84, 28 / 3],
        [0, 28, 84, 28 + 28 / 3],
    ]


def test_a_padded_square_reaches_past_the_picture(families):
    for name in ("deepseek-vl", "janus"):
        grid = one(families(name), picture=noise_picture((200, 100))).grids[0]
        assert grid.shape == (12, 12)
        assert grid.boxes[0, :2].tolist() == [0, -50]
        assert grid.boxes[-1, 2:].tolist() == [200, 150]


@pytest.mark.parametrize("size", [(60, 50), (200, 90), (70, 300), (500, 480)])
def test_the_image_processor_of_molmo2_does_transformers_steps(families, size):
    class Steps:
        """transformers' image processor with torch's interpolation in torchvision's place."""

        _build_overlapping_crops = Molmo2ImageProcessor._build_overlapping_crops
        make = Molmo2ImageProcessor._image_batch_to_patches_and_grids

        def resize(self, image, size, resample, antialias):
            return torch.nn.functional.interpolate(
                image,
                (size.height, size.width),
                mode="bilinear",
                align_corners=False,
                antialias=antialias,
            )

        def rescale_and_normalize(self, image, do_rescale, factor, do_normalize, mean, std):
            return (image * factor - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(
                -1, 1, 1
            )

    for settings_ in (
        {"size": {"height": 70, "width": 70}, "overlap_margins": [1, 1]},
        {"size": {"height": 98, "width": 98}, "overlap_margins": [2, 1]},
        {},
    ):
        ours = molmo2_family.ImageProcessor(**settings_)
        picture = noise_picture(size)
        inputs = ours(picture, return_tensors="pt")
        image = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None]
        grids, patches, pooling = Steps().make(
            image,
            ours.max_crops,
            ours.overlap_margins,
            ours.size["height"],
            ours.resample,
            True,
            1 / 255,
            True,
            ours.image_mean,
            ours.image_std,
            14,
            2,
            2,
        )
        assert torch.equal(inputs["image_grids"], grids)
        assert torch.equal(inputs["image_token_pooling"], pooling[0])
        assert inputs["image_num_crops"].tolist() == [patches.shape[1]]
        assert torch.allclose(inputs["pixel_values"], patches[0], atol=1e-5)


def test_the_placeholder_of_molmo2_is_in_its_features(families):
    vlm = families("molmo2")
    batch = one(vlm)
    token = vlm.image_token_id
    plain = AutoModelForImageTextToText.from_pretrained(vlm.path).eval()
    with torch.no_grad():
        wanted = torch.cat(
            plain.get_image_features(
                **{k: v for k, v in batch.image_inputs.items() if k != "image_num_crops"}
            ).pooler_output
        )
        assert torch.allclose(
            vlm.vision(batch).pooler_output[0],
            wanted + plain.get_input_embeddings().weight[token],
            atol=1e-5,
        )
    assert (
        vlm.model.get_input_embeddings().weight[token].abs().max()
        == 0
        < plain.get_input_embeddings().weight[token].abs().max()
    )


def test_the_places_of_kosmos2_cannot_be_typed(families):
    vlm = families("kosmos2")
    batch = one(vlm, "Is </chunk> red?")
    assert int((batch.input_ids == vlm.image_token_id).sum()) == len(batch.vision_positions(0)) == 6
    assert (
        vlm.tokenizer.decode(batch.input_ids[0][batch.groups[0] == GROUPS.index("user")]).strip()
        == "Is </chunk> red?"
    )

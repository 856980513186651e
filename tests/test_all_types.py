"""tests/all_types.py on one type of each layout, and what its table says; all types on request:
python -m tests.all_types."""

import copy
import re

import pytest
import torch

import common
from tests import all_types, type_builder
from tests.all_types import line_of, states_of, table
from vlmdiag.groups import VISION
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.probes import GroupMass, HiddenNorms, HiddenStates, RopeShift
from vlmdiag.model.selfcheck import check, noise_picture
from vlmdiag.pictures.samples import Sample

pytestmark = pytest.mark.types

# one type for each layout and kind of decoder
RIGHT = {
    "glm4v": "rows",
    "qwen3_5": "rows",
    "ernie4_5_vl_moe": "rows",
    "gemma4": "rows",
    "chameleon": "square",
    "idefics2": "generic",
    "lighton_ocr": "mistral3",
    "granite4_vision": "llava_next",
}
ON_STAND_INS = {
    "llama4": "tiles",
    "lfm2_vl": "tiles",
    "perception_lm": "tiles",
    "gemma3n": "square",
}
REFUSED = {
    "mllama": "cross-attention",
    "t5gemma2": "decoder-only",
    "blip": "takes no image features",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """get(kind, **text) -> a folder with a small random model; text: laid over its text config."""
    root = tmp_path_factory.mktemp("types")

    def get(kind, **text):
        folder = root / "-".join([kind, *map(str, text)])
        if not folder.exists():
            entry = type_builder.small_of(kind)
            changed = copy.deepcopy(entry)
            changed.config.setdefault("text_config", {}).update(text)
            type_builder.TYPES[kind] = changed if text else entry
            try:
                with torch.inference_mode(False):
                    type_builder.build(folder, kind)
            finally:
                type_builder.TYPES[kind] = entry
        return folder

    return get


@pytest.mark.parametrize("kind", RIGHT)
def test_a_type_of_each_layout_is_right(kind):
    (found,) = states_of([kind], measures=False)
    assert found["state"] == "right", found
    assert found["file"] == RIGHT[kind]
    assert found["grid"] == (kind != "idefics2")
    assert found["compared"] == found["attending"], "each layer that attends gave an eager row"
    assert found["sharp"] > 2, "attention is flat, so a wrong row would look right"


def test_types_that_need_torchvision_are_right_on_stand_ins():
    states = states_of(list(ON_STAND_INS), measures=False)
    for found in states:
        assert found["state"] == "right", found
        assert found["file"] == ON_STAND_INS[found["type"]]
        assert found["grid"]
        assert "stand-in" in found["prepared by"]


def test_a_type_that_cannot_be_measured_says_what_it_lacks():
    for found in states_of(list(REFUSED), measures=False):
        assert found["state"] == "refuses", found
        assert re.search(REFUSED[found["type"]], found["said"])


def test_missing_packages_are_named(built):
    folder = built("cohere_compass")  # built and loaded without; a type on torchvision alone is not
    assert folder.exists()
    with pytest.raises(common.UsageError, match="torchvision, which is not installed.*extra"):
        raise_for_missing(folder)


def raise_for_missing(folder):
    """Loading with an image processor that is on torchvision alone."""
    settings = folder / "processor_config.json"
    text = settings.read_text().replace("CohereCompassImageProcessor", "Llama4ImageProcessor")
    settings.write_text(text)
    common.load_model(folder)


# --- token inputs ---------------------------------------------------------------------------------


@torch.inference_mode()
def test_token_types_that_are_dropped_are_found_by_the_self_check(built):
    """Gemma 4's pictures see themselves in both directions, ERNIE's go through experts of their
    own: without the processor's token types both would be causal text."""
    for kind in ("gemma4", "ernie4_5_vl_moe"):
        vlm = common.load_model(built(kind))
        batch = vlm.encode([Sample("0", None, "Is it red?")], [noise_picture()])
        assert batch.token_inputs
        for name, value in batch.token_inputs.items():
            assert value.shape == batch.input_ids.shape, name
        encode = vlm.encode

        def without(*args, encode=encode, **options):
            whole = encode(*args, **options)
            whole.token_inputs = {}
            return whole

        vlm.encode = without
        with pytest.raises(common.UsageError, match="own forward|attention differs"):
            check(vlm)


@torch.inference_mode()
def test_token_inputs_move_with_their_tokens(built):
    """Padded on the left, behind an answer, and where a special string is typed."""
    vlm = common.load_model(built("gemma4"), self_check=False)
    questions = ("Hi?", "Is it <image|> </s> or <|im_end|> red?")
    samples = [Sample(str(i), None, text) for i, text in enumerate(questions)]
    batch = vlm.encode(samples, [noise_picture()] * 2)
    longer = extended(batch, [20, 21])
    repeated = vlm.encode(samples[1:], [noise_picture()]).repeat(2)
    for one in (batch, longer, repeated):
        for types in one.token_inputs.values():
            assert types.shape == one.input_ids.shape
            assert torch.equal(types.bool(), one.groups == VISION)


# --- hybrid decoders ------------------------------------------------------------------------------


@torch.inference_mode()
def test_layers_keep_their_numbers_where_some_do_not_attend(built):
    vlm = common.load_model(built("qwen3_5"))
    assert vlm.parts.attending == [3]
    assert set(vlm.parts.without_attention.values()) == {"linear_attention"}
    batch = vlm.encode([Sample("0", None, "Is it red?")], [noise_picture()])
    probes = [GroupMass(batch, 2), RopeShift(batch, vlm.rotary, [1.0])]
    with capture(vlm, probes):
        generate(vlm, batch, 2)
    mass, rope = probes[0].mass[0], probes[1]["alphaV"]
    assert len(mass) == len(rope) == 4
    assert mass[:3].isnan().all() and not mass[3].isnan().any()
    assert torch.allclose(rope[3], mass[3, ..., VISION], atol=1e-6)
    assert rope[:3].isnan().all()
    with pytest.raises(common.UsageError, match="every layer, and layers 0, 1, 2 of 4"):
        vlm.need("decoder-only", "every-layer")


@torch.inference_mode()
def test_layers_that_share_keys_still_show_every_position(built):
    """transformers computes the last position only of Gemma 4's last layers in a prefill."""
    vlm = common.load_model(built("gemma4"))
    assert vlm.parts.decoder.config.num_kv_shared_layers == 2
    batch = vlm.encode([Sample("0", None, "Is it red?")], [noise_picture()])
    with capture(vlm, [norms := HiddenNorms()]):
        generate(vlm, batch, 1)
    assert norms.norms.shape == (1, 5, batch.input_ids.shape[1])


# --- rotary positions -----------------------------------------------------------------------------

ROTARY = {
    "glm4v": {},  # interleaved, three sections
    "qwen3_5": {},  # a quarter of each head
    "gemma4": {},  # two bases
    "ernie4_5_vl_moe": {},  # frequencies in an order of its own
    "exaone4_5": {},  # layers of full attention have no positions
    "lighton_ocr": {},  # half-split
}


@torch.inference_mode()
@pytest.mark.parametrize("kind", ROTARY)
def test_the_rope_probe_turns_as_the_models_own_positions_do(built, kind):
    """The probe's shift against scores of queries captured at moved positions: vision keys stay,
    the query is delta positions nearer to them."""
    vlm = common.load_model(built(kind), self_check=False)
    batch = vlm.encode([Sample("0", None, "Is it red?")], [noise_picture()])
    delta = 3
    rows = []

    def keep(layer, row, value, output):
        rows[-1][layer] = row

    for moved in (0, -delta):
        rows.append({})
        moved_batch = copy.copy(batch)
        moved_batch.position_ids = batch.position_ids + moved
        with capture(vlm, inspect=keep):
            generate(vlm, moved_batch, 1)
    probe = RopeShift(batch, vlm.rotary, [float(delta)])
    with capture(vlm, [probe]):
        generate(vlm, batch, 1)
    in_picture = batch.groups[0] == VISION
    turned = 0
    for layer, row in rows[0].items():
        # the model's own query delta positions earlier, with the keys where they are
        nearer = row.dot(rows[1][layer].query) - row.dot(row.query)
        alpha = row.scores.softmax(-1)[..., in_picture]
        within = alpha / alpha.sum(-1, keepdim=True)
        expected = (within * nearer[..., in_picture]).sum(-1) / delta
        own = probe["delta_gv"][0, layer, :, : row.query.shape[1]]
        assert torch.allclose(own, expected, atol=2e-3 * float(expected.abs().max()) + 1e-5), layer
        turned += bool(expected.abs().max() > 1e-4)
    assert turned, "no layer turned"


# --- other ends of the lens -----------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["chameleon", "gemma4", "granite_docling"])
def test_the_lens_ends_as_the_model_does(built, kind):
    """Masked codes, a softcap that is set, logits that are divided."""
    from vlmdiag.model.lens import Lens
    from vlmdiag.model.vision import prefill

    more = {"final_logit_softcapping": 3.0} if kind == "gemma4" else {}
    if kind == "granite_docling":
        more = {"logits_scaling": 7.0}
    vlm = common.load_model(built(kind, **more))
    batch = vlm.encode([Sample("0", None, "Is it red?")], [noise_picture()])
    with capture(vlm, [states := HiddenStates()]):
        logits = prefill(vlm, batch).logits[:, -1]
    lens = Lens(vlm)
    lens.check(states.states[len(vlm.parts.layers)][:, -1], logits)
    end = vlm.logit_end
    assert (end.masked is not None) == (kind == "chameleon")
    assert (end.softcap is not None) == (kind == "gemma4")
    assert (end.scale != 1) == (kind == "granite_docling")
    if end.masked is not None:
        ids, _ = lens.top_k(states.states[2], 5)
        assert not end.masked[ids].any(), "codes of pictures are never written"


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.fast
def test_the_table_counts_what_is_right_and_says_what_is_not():
    measures = dict.fromkeys(all_types.MEASURES, "yes")
    right = {
        "type": "a",
        "state": "right",
        "file": "rows",
        "grid": True,
        "layers": 4,
        "attending": 1,
        "measures": measures,
        "prepared by": "PIL",
        "said": "",
    }
    refused = {"type": "b", "state": "refuses", "said": "b lacks it", "prepared by": "PIL"}
    text = table([right, refused])
    assert "2 types, 1 refuses, 1 right; 1 with a grid" in text
    assert "| a | right | `rows.py` | yes | 1 of 4 | yes |" in text
    assert "- b (refuses): b lacks it" in text
    assert line_of(right).startswith("a | right | grid | 1 of 4 layers attend")

"""The contract that every family of vlmdiag/families keeps, on small random models built from their
configs (tests/random_models/).

    python -m tests.test_families     # writes what the models have into docs/families.md
"""

import copy
import importlib
import pkgutil
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
from data import make_shapes
from tests import random_models
from tests.conftest import ROOT, in_process
from tests.published.facts import MODELS as PUBLISHED
from tests.published.facts import NOT, STAND_IN, STATES
from vlmdiag import families as models
from vlmdiag.beyond_semantics.token_norms import id_norms
from vlmdiag.groups import GROUPS, PAD, VISION
from vlmdiag.model import drafts, processed, towers
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import GroupMass, HiddenNorms, Probe
from vlmdiag.model.vision import more_inputs, prefill
from vlmdiag.pictures.samples import Sample

pytestmark = pytest.mark.types

BUILDERS = {}  # of all models
FIRST = set()  # one model of each file
for _module in pkgutil.iter_modules(random_models.__path__):
    _models = importlib.import_module(f"tests.random_models.{_module.name}").MODELS
    BUILDERS |= _models
    FIRST.add(next(iter(_models)))
NAMES = sorted(BUILDERS)
STEPS = 3
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families: written by tests/test_families.py -->\n", "<!-- end of families -->\n"
PUBLISHED_BEGIN = "<!-- published models: written by tests/test_families.py -->\n"
PUBLISHED_END = "<!-- end of published models -->\n"
CAPABILITIES = ("decoder-only", "causal", "rotary", "grid")


def row(name, vlm):
    """A line of the table: what a loaded model is and has."""
    parts = vlm.parts
    mark = {True: "yes", False: "-"}
    onto = "-"
    if "decoder-only" in vlm.family.has:
        if parts.qformer:
            onto = "its Q-Former and tower"
        elif parts.vision_blocks:
            onto = "its tower"
    cells = [
        name,
        f"`{models.module_of(vlm.family)}.py`",
        *(mark[capability in vlm.family.has] for capability in CAPABILITIES),
        onto,
    ]
    return "| " + " | ".join(cells) + " |\n"


def checks():
    """What each family's file says was tested and was not, as lines of a list."""
    lines = []
    for family in models.FAMILIES:
        text = " ".join(importlib.import_module(f"vlmdiag.families.{family}").__doc__.split())
        at = text.find("Tested on")
        assert at >= 0, f"{family}.py does not say what was tested"
        lines.append(f"- `{family}.py`: {text[at:]}\n")
    return "".join(lines)


def published_rows():
    """The lines of the table of published models: their states (tests/published/facts.py), then the
    families of which no published file was at hand."""
    lines = []
    without = list(models.FAMILIES)
    for name, facts in PUBLISHED.items():
        file = models.module_of(models.find_family(facts.config))
        if file in without:
            without.remove(file)
        lines.append([name, f"`{file}.py`", *facts.states])
    for file in without:
        family = importlib.import_module(f"vlmdiag.families.{file}").FAMILY
        # names in transformers' own layout are those that its own class writes
        keys = STAND_IN if family.read_config else NOT
        lines.append(["none", f"`{file}.py`", STAND_IN, STAND_IN, keys, STAND_IN, STAND_IN])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


@pytest.fixture(scope="module", params=NAMES)
def vlm(request, tmp_path_factory):
    """A family's random model, loaded with the self-check. One at a time: the tests of a model
    follow each other."""
    folder = BUILDERS[request.param](tmp_path_factory.mktemp("families") / request.param)
    return common.load_model(folder)


def decoder_only(vlm):
    if "decoder-only" not in vlm.family.has:
        pytest.skip("the prompt is in an encoder: nothing to capture")


def test_every_family_has_a_random_model():
    """A family that no random model is loaded by is one that nothing checks."""
    sources = {module.name for module in pkgutil.iter_modules(random_models.__path__)}
    # instructblip's models are made by blip2.py; tests/test_all_types.py has those of tiles, which
    # need torchvision, and of square, whose small ones have codes that pictures share
    assert set(models.FAMILIES) - {"instructblip", "square", "tiles"} <= sources


def test_the_family_is_its_files(vlm):
    assert vlm.family.name != "generic"
    assert len(vlm.parts.layers) >= 2
    assert vlm.parts.lm_head is not None
    assert vlm.parts.tower is not None
    assert vlm.parts.connector is not None
    known = {"decoder-only", "causal", "rotary", "grid", "square-pad"}
    assert vlm.family.has <= known
    assert ("grid" in vlm.family.has) == (vlm.family.grid is not None)


def test_a_picture_that_was_processed_before_is_read_as_one_that_was_not(vlm):
    pictures = [Image.effect_noise((90, 60), 90).convert("RGB") for _ in range(2)]
    samples = [Sample(str(n), None, f"Is the {word} red?") for n, word in enumerate(("cat", "car"))]
    for sample in samples:
        first = vlm.encode([sample, samples[0]], pictures)
    processed._kept.clear()
    again = vlm.encode([samples[1], samples[0]], pictures)
    assert torch.equal(first.input_ids, again.input_ids) and first.pictures == again.pictures
    assert first.image_inputs.keys() == again.image_inputs.keys()
    for name, value in first.image_inputs.items():
        assert torch.equal(value, again.image_inputs[name])


@torch.inference_mode()
def test_token_norms_are_those_of_the_first_layers_inputs(vlm, batch_of):
    decoder_only(vlm)
    if vlm.family.name in ("blip2-opt", "kosmos2"):
        pytest.skip("its decoder adds positions to its inputs")
    batch = batch_of(vlm, rows=(0,))
    with capture(vlm, [probe := HiddenNorms()]):
        prefill(vlm, batch)
    entering = probe.norms[0, 0].double()
    in_picture = batch.groups[0] == VISION
    vision = vlm.vision(batch).pooler_output[0].float().norm(dim=-1)
    text = id_norms(vlm)[batch.input_ids[0, ~in_picture].numpy()]
    assert np.allclose(text, entering[~in_picture], rtol=1e-4)
    assert np.allclose(vision, entering[in_picture], rtol=1e-4)


def snapshot(vlm):
    """The model as a training would leave it that moved all but its tower and its decoder."""
    other = replace(vlm, model=copy.deepcopy(vlm.model))
    parts = other.parts
    frozen = {id(one) for of in (parts.tower, parts.decoder) for one in of.parameters()}
    with torch.no_grad():
        for parameter in other.model.parameters():
            if id(parameter) not in frozen:
                parameter *= 1.5
    return other


@torch.inference_mode()
def seen_by(vlm):
    """What a model's decoder gets of two pictures."""
    words = ("cat", "car")
    samples = [Sample(str(n), None, f"Is the {word} red?") for n, word in enumerate(words)]
    pictures = [Image.linear_gradient("L").resize((90, 60)).convert("RGB") for _ in words]
    for n, picture in enumerate(pictures):
        picture.paste((50 + n, 90, 200), (10, 10, 40 + 10 * n, 50))
    return [row.clone() for row in vlm.vision(vlm.encode(samples, pictures)).pooler_output]


def test_snapshots_with_equal_towers_run_one_for_all(vlm, monkeypatch):
    other, tower = snapshot(vlm), vlm.parts.tower
    alone = [seen_by(vlm), seen_by(other)]
    passes, forward = [], tower.forward

    def counting(*args, **options):
        passes.append(1)
        return forward(*args, **options)

    assert towers.equal(vlm, other)
    monkeypatch.setattr(tower, "forward", counting)
    seen_by(vlm)
    once = len(passes)
    towers.merge(vlm, other)
    for mine, theirs in zip(tower.parameters(), other.parts.tower.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    with towers.sharing([vlm, other]):
        together = [seen_by(vlm), seen_by(other)]
    assert len(passes) == 2 * once, "the second model's tower ran too"
    after = [seen_by(vlm), seen_by(other)]
    assert len(passes) == 3 * once, "outside the context each has its own again"
    for model in range(2):
        for row, picture in enumerate(alone[model]):
            assert torch.equal(picture, together[model][row])
            assert torch.equal(picture, after[model][row])
    with torch.no_grad():
        last = list(other.parts.tower.parameters())[-1]
        last.data = last + 1e-3
    assert not towers.equal(vlm, other)


def test_the_page_of_families_has_its_line(vlm, request):
    assert row(request.node.callspec.params["vlm"], vlm) in PAGE.read_text(), (
        "run python -m tests.test_families"
    )


def test_the_page_lists_the_families_there_are():
    text = PAGE.read_text()
    listed = [
        line.split(" | ")[0].removeprefix("| ")
        for line in text[text.index(BEGIN) : text.index(END)].splitlines()
        if line.startswith("| ")
    ]
    assert listed[1:] == NAMES and checks() in text, "run python -m tests.test_families"


def test_the_page_says_what_was_compared_with_published_files():
    assert published_rows() in PAGE.read_text(), "run python -m tests.test_families"


class Kept(Probe):
    """The whole last row of every pass and layer that attends, (L, B, H, K)."""

    def __init__(self):
        self.rows = []

    def begin(self):
        super().begin()
        self.rows.append([])

    def attention(self, layer, row):
        self.rows[-1].append(row.weights)


def forced(vlm, batch):
    """The same ids for every row, so that one plain pass is the oracle."""
    return torch.randint(
        20, 300, (len(batch.samples), STEPS), generator=torch.Generator().manual_seed(1)
    ).tolist()


def eager(vlm, batch, ids):
    """Attention maps (B, H, T, T) of each layer in one plain pass over prompt and answer, and its
    logits (B, T, V)."""
    from vlmdiag.model.decoding import extended

    size = len(batch.samples)
    whole = extended(batch, ids[0])
    assert all(row == ids[0] for row in ids) and whole.input_ids.shape[0] == size
    maps = {}
    hooks = []

    def keep(layer):
        def hook(module, args, output):
            outputs = output if isinstance(output, tuple) else ()
            weights = [item for item in outputs if torch.is_tensor(item) and item.ndim == 4]
            if weights and weights[-1].shape[-1] == whole.input_ids.shape[1]:
                maps[layer] = weights[-1]

        return hook

    for layer, block in enumerate(vlm.parts.layers):
        for module in block.modules():
            kind = type(module).__name__.lower()
            if "attn" in kind or "attention" in kind:
                hooks.append(module.register_forward_hook(keep(layer)))
    decoder = vlm.parts.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        features = vlm.vision(batch)
        if getattr(features, "was_tensor", False):
            pooled = torch.cat(features.pooler_output)
            pooled = pooled.view(-1, *features.of_picture[:-1], pooled.shape[-1])
            features = SimpleNamespace(**dict(features) | {"pooler_output": pooled})
        options = {
            "attention_mask": whole.attention_mask,
            "position_ids": whole.position_ids,
            "use_cache": False,
        } | more_inputs(vlm, whole)
        output = vlm.model(
            input_ids=whole.input_ids, mm_encoder_outputs={"image": features}, **options
        )
    finally:
        decoder.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return [maps[layer] for layer in vlm.parts.attending], output.logits


@torch.inference_mode()
@pytest.mark.parametrize("rows", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("in_steps", [True, False], ids=["token by token", "as it is"])
def test_captured_attention_is_that_of_the_eager_pass(vlm, batch_of, rows, in_steps, monkeypatch):
    decoder_only(vlm)
    if in_steps:  # a given answer is read in one pass where that can be
        monkeypatch.setattr(drafts, "can_verify", lambda vlm, cache: False)
    batch = batch_of(vlm, rows)
    ids = [forced(vlm, batch)[0]] * len(rows)
    probe = Kept()
    masses = GroupMass(batch, STEPS)
    with capture(vlm, [probe, masses]):
        generation = generate(vlm, batch, STEPS, answers=ids)
    maps, logits = eager(vlm, batch, ids)
    total = batch.groups.shape[1]
    has_sinks = any(name.endswith("sinks") for name, _ in vlm.parts.decoder.named_parameters())
    sharp = []
    for step in range(STEPS):
        for layer, row in enumerate(probe.rows[step]):
            oracle = maps[layer][:, :, total - 1 + step, : total + step]
            assert row.shape == oracle.shape, (step, layer)
            # rounding: 1.6e-5 in Gemma 4's sharpest rows on a CPU with AMX
            allowed = 3e-5 if vlm.family.name == "gemma4" else 1e-5
            assert torch.allclose(row, oracle, atol=allowed), (step, layer)
            if has_sinks:
                assert row.sum(-1).min() < 0.95, "sinks take a share that shows"
            else:
                assert torch.allclose(row.sum(-1), torch.ones(()), atol=1e-5)
            mass = masses.mass[step][vlm.parts.attending[layer], :, :, VISION]
            to_vision = (oracle[..., :total] * (batch.groups == VISION)[:, None]).sum(-1)
            assert torch.allclose(mass, to_vision, atol=1e-5)
            sharp.append(float(oracle.amax(-1).mean()) * (total + step))
    assert max(sharp) > 3, "attention is flat, so a wrong row would look right"
    logprobs = logits[:, total - 1 : -1].float().log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(ids)[..., None])[..., 0]
    assert torch.allclose(generation.logprobs, expected, atol=1e-4)
    wrong = maps[0][:, :, total - 2, : total - 1]
    assert not torch.allclose(probe.rows[0][0][..., : total - 1], wrong, atol=1e-3), (
        "a row above is told apart"
    )


@torch.inference_mode()
def test_a_batch_computes_what_single_prompts_do(vlm, batch_of):
    batch = batch_of(vlm)
    assert len(set(batch.lengths)) > 1
    together = prefill(vlm, batch).logits[:, -1].float()
    features = vlm.vision(batch).pooler_output
    size = together.abs().amax()
    for row, length in enumerate(batch.lengths):
        pad = batch.groups.shape[1] - length
        alone = batch_of(vlm, (row,))
        assert batch.attention_mask[row].tolist() == [0] * pad + [1] * length
        assert (batch.groups[row, :pad] == PAD).all()
        assert torch.equal(alone.input_ids[0], batch.input_ids[row, pad:])
        assert (prefill(vlm, alone).logits[0, -1].float() - together[row]).abs().max() < 1e-4 * size
        assert torch.allclose(
            vlm.vision(alone).pooler_output[0], features[row], atol=1e-4, rtol=1e-4
        )
    single = batch_of(vlm, (0,))
    other = batch_of(vlm, (1,))
    if torch.equal(single.input_ids, other.input_ids):
        return
    assert (together[0] - together[1]).abs().max() > 1e-3 * size, "prompts are told apart"


@torch.inference_mode()
def test_decoding_is_transformers_generate(vlm, batch_of):
    ours = generate(vlm, batch_of(vlm), 6)
    for row, ids in enumerate(ours.ids):
        alone = batch_of(vlm, (row,))
        inputs = {
            key: value.to(vlm.dtype) if value.is_floating_point() else value
            for key, value in alone.image_inputs.items()
        }
        inputs |= {
            "input_ids": alone.input_ids,
            "attention_mask": alone.attention_mask,
        } | more_inputs(vlm, alone)
        if hasattr(vlm.model, "get_rope_index") or hasattr(
            getattr(vlm.model, "model", None), "get_rope_index"
        ):
            inputs["mm_token_type_ids"] = (alone.input_ids == vlm.image_token_id).int()
        theirs = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
        if theirs[: alone.lengths[0]] == alone.input_ids[0].tolist():
            theirs = theirs[alone.lengths[0] :]
        elif "decoder-only" not in vlm.family.has:
            theirs = theirs[1:]  # the decoder's start token
        assert ids == theirs[: len(ids)], "the first tokens"
        assert len(ids) == 6 or ids[-1] in vlm.eos_ids


@torch.inference_mode()
def test_a_draft_changes_no_answer(vlm, batch_of):
    """Right, right but for a token in the middle or too short, and wrong at first."""
    batch = batch_of(vlm)
    plain = generate(vlm, batch, 10)
    first, second, third = plain.ids
    spoilt = [[*first[:4], 11, *first[5:]], second[:6], [7, *third]]
    for given in (plain.ids, spoilt):
        found = generate(vlm, batch, 10, drafts=given)
        assert found.ids == plain.ids
        assert torch.allclose(found.logprobs, plain.logprobs, atol=1e-5, equal_nan=True)
    assert bool(drafts.counted()) == drafts.can_verify(vlm, plain.cache)
    if "decoder-only" not in vlm.family.has:
        return
    masses = []
    for given in (None, spoilt):
        with capture(vlm, [mass := GroupMass(batch, 10)]):
            assert generate(vlm, batch, 10, drafts=given).ids == plain.ids
        of_rows = torch.stack(mass.mass).movedim(2, 0)
        masses.append([row[:steps] for row, steps in zip(of_rows, plain.steps, strict=True)])
    for one, other in zip(*masses, strict=True):
        assert torch.allclose(one, other, atol=1e-5, equal_nan=True)
    drafts.counted()


@torch.inference_mode()
def test_cached_keys_and_values_give_what_the_whole_prompt_gives(vlm, batch_of):
    """From behind the picture and from its middle."""
    decoder_only(vlm)
    from vlmdiag.model.prefix import first_positions
    from vlmdiag.model.vision import entered, entering

    batch = batch_of(vlm, (1,)).repeat(2)
    whole = prefill(vlm, batch)
    places = batch.vision_positions(0)
    starts = [int(places[-1]) + 1, int(places[len(places) // 2])]
    caches = [first_positions(vlm, whole.past_key_values, start) for start in starts]
    assert (caches[0] is None) >= ("causal" not in vlm.family.has)
    if caches[0] is None:
        return
    vision = entered(vlm, vlm.vision(batch))
    for cache in (None, *caches):
        with entering(vlm, batch, vision) as embeds:
            ours = prefill(vlm, batch, cache=cache, embeds=embeds)
        assert torch.allclose(
            ours.logits[0, -1].float(), whole.logits[0, -1].float(), atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize(
    "question", ["Is it <image> </s> red?", " a  b ", "USER: <|im_end|> x", "é 漢 ?"]
)
def test_the_question_is_the_user_group_and_nothing_else_is(vlm, question):
    picture = Image.new("RGB", (60, 50), (90, 30, 200))
    batch, plain = (vlm.encode([Sample("0", None, text)], [picture]) for text in (question, "Hi?"))
    assert (batch.groups != PAD).all()
    for group in ("vision", "image_markup", "system", "bos"):
        code = GROUPS.index(group)
        assert torch.equal(
            batch.input_ids[batch.groups == code], plain.input_ids[plain.groups == code]
        ), group
    user = batch.input_ids[batch.groups == GROUPS.index("user")].tolist()
    special = set(vlm.tokenizer.all_special_ids) - {vlm.tokenizer.unk_token_id}
    assert user and not set(user) & special, "special strings that are typed stay text"


def random_picture(rng):
    width, height = rng.choice(
        [
            (rng.randint(40, 90), rng.randint(40, 90)),
            (rng.randint(90, 260), rng.randint(60, 120)),
            (rng.randint(60, 120), rng.randint(90, 260)),
        ]
    )
    noise = np.random.default_rng(rng.randint(0, 9**9)).integers(
        0, 60, (height, width, 3), dtype=np.uint8
    )
    return Image.fromarray(noise)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(4))
def test_a_bright_square_lies_where_the_grid_says(vlm, seed):
    """Tokens whose boxes a bright square covers change most, those far from it least; and the map
    of the changes peaks on the square."""
    grid_of = vlm.family.grid
    if grid_of is None:
        pytest.skip("the family says that it has no grid")
    rng = random.Random(seed)
    picture = random_picture(rng)
    sample = Sample("0", None, "Hi?")
    before = vlm.encode([sample], [picture])
    grid = before.grids[0]
    boxes = grid.boxes
    inside = (
        grid.has_box
        & (boxes[:, 0] > -1)
        & (boxes[:, 1] > -1)
        & (boxes[:, 2] < picture.width + 1)
        & (boxes[:, 3] < picture.height + 1)
    )
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert inside.any() and (area[grid.has_box] > 0).all()
    smallest = np.flatnonzero(inside & (area < 1.5 * np.nanmin(area[inside])))
    cell = int(rng.choice(list(smallest)))
    x0, y0, x1, y1 = boxes[cell]
    square = [
        max(0, int(np.floor(x0))),
        max(0, int(np.floor(y0))),
        min(picture.width, int(np.ceil(x1))),
        min(picture.height, int(np.ceil(y1))),
    ]
    bright = picture.copy()
    bright.paste((255, 255, 255), tuple(square))
    after = vlm.encode([sample], [bright])
    assert np.array_equal(after.grids[0].boxes, boxes, equal_nan=True), (
        "the grid depends on the picture's size only"
    )
    plain, changed = (vlm.vision(batch).pooler_output[0].float() for batch in (before, after))
    change = (changed - plain).norm(dim=-1).numpy()
    alike = grid.has_box & (area > area[cell] / 2) & (area < area[cell] * 2)
    best = int(np.where(alike, change, -1).argmax())
    mask = np.zeros((picture.height, picture.width), bool)
    mask[square[1] : square[3], square[0] : square[2]] = True
    cover = grid.coverage(mask)
    assert cover[cell] > 0.9 and cover[best] > 0.4, (
        f"token {best} changed most, the square is on {cell}"
    )
    if (alike & (cover == 0)).any():
        far = change[alike & (cover == 0)]
        assert np.median(far) < 0.5 * change[cell]
    if alike.all():
        painted = grid.paint(change[: len(boxes)], smooth=False)
        y, x = np.unravel_index(np.nanargmax(painted), painted.shape)
        assert square[0] - (x1 - x0) <= x <= square[2] + (x1 - x0)
        assert square[1] - (y1 - y0) <= y <= square[3] + (y1 - y0)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(4))
def test_a_bright_square_changes_the_patches_under_it(vlm, seed):
    """Where vision tokens are made from patches by queries: what enters the tower's first block
    changes at the patches whose boxes the square touches."""
    if vlm.family.patches is None or vlm.parts.qformer is None:
        pytest.skip("vision tokens have boxes themselves, or none is known")
    rng = random.Random(seed)
    picture = random_picture(rng)
    x0 = rng.randint(0, picture.width - 20)
    y0 = rng.randint(0, picture.height - 20)
    bright = picture.copy()
    bright.paste((255, 255, 255), (x0, y0, x0 + 20, y0 + 20))
    entered = []
    hook = vlm.parts.vision_blocks[0].register_forward_pre_hook(
        lambda _, args, options: entered.append((args or (options["hidden_states"],))[0]),
        with_kwargs=True,
    )
    for shown in (picture, bright):
        batch = vlm.encode([Sample("0", None, "Hi?")], [shown])
        vlm.vision(batch)
    hook.remove()
    patches = vlm.family.patches(vlm, picture.size, batch.image_rows[0])
    plain, changed = entered
    change = (changed - plain)[0].float().norm(dim=-1).numpy()
    assert not vlm.parts.qformer.cls or change[0] < 1e-4 * change.max(), (
        "CLS comes first and is the same for all pictures"
    )
    change = change[1 if vlm.parts.qformer.cls else 0 :]
    assert len(change) == len(patches.boxes)
    mask = np.zeros((picture.height, picture.width), bool)
    mask[y0 : y0 + 20, x0 : x0 + 20] = True
    wide = np.zeros_like(mask)  # resizing mixes a patch with its neighbours' edges
    wide[max(0, y0 - 8) : y0 + 28, max(0, x0 - 8) : x0 + 28] = True
    cover = patches.coverage(mask)
    near = patches.coverage(wide) > 0
    assert change[~near].max(initial=0) < 0.02 * change.max()
    assert cover.max() == 0 or np.corrcoef(change, cover)[0, 1] > 0.9


@torch.inference_mode()
def test_tokens_without_a_box_do_not_depend_on_the_picture(vlm):
    """Newline and end tokens: the same vector whatever is shown, so NaN boxes hide no part of the
    picture."""
    if vlm.family.grid is None:
        pytest.skip("the family says that it has no grid")
    if getattr(getattr(vlm.model.config, "vision_config", None), "num_register_tokens", 0):
        pytest.skip("registers read the whole picture")
    sample = Sample("0", None, "Hi?")
    batches = [
        vlm.encode([sample], [random_picture(random.Random(seed)).resize((150, 90))])
        for seed in (5, 6)
    ]
    box = batches[0].grids[0].has_box
    first, second = (vlm.vision(batch).pooler_output[0].float() for batch in batches)
    differs = (first - second).norm(dim=-1).numpy() > 1e-4 * float(first.norm(dim=-1).max())
    assert differs[box].all()
    assert not differs[~box].any()


def test_vision_tokens_are_made_of_the_patches_that_the_family_names(vlm, pictures):
    """The connector map by its gradient: a vision token depends on the tower's output at its
    sources, and nowhere else."""
    if not vlm.parts.vision_blocks or vlm.parts.qformer:
        pytest.skip("relevancy stops at the vision tokens, or goes on through a Q-Former")
    from vlmdiag.relevancy.gradients import trace

    for picture in (pictures[1], random_picture(random.Random(1))):
        run = trace(vlm, vlm.encode([Sample("0", None, "Hi?")], [picture]), [20, 21])
        assert run.tower.sources.shape[0] == len(run.features) == len(run.vision)
        whole = [block.output for block in run.tower.blocks]
        for token in range(0, len(run.features), max(1, len(run.features) // 25)):
            given = torch.autograd.grad(
                run.tower.pooled[token].sum(), whole, retain_graph=True, allow_unused=True
            )
            reached = [part.flatten(0, 1).norm(dim=-1) for part in given if part is not None]
            own = run.tower.sources[token][run.tower.sources[token] >= 0].tolist()
            assert reached or not own
            for part in reached:
                assert (
                    (part > 1e-6 * part.max()).nonzero()[:, 0].tolist() == sorted(own)
                    if own
                    else part.max() == 0
                )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "3",
                "--num_train",
                "0",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


def test_an_interrupted_run_goes_on_with_the_same_bytes(vlm, shapes, tmp_path, request):
    if request.node.callspec.params["vlm"] not in FIRST:
        pytest.skip("another model of this file is run")
    decoder_only(vlm)
    where = (
        "--image_dir",
        shapes / "val2017",
        "--ann_file",
        shapes / "annotations" / "captions_val2017.json",
        "--out_root",
        tmp_path,
    )
    probes = ("--probe_hidden_norms", *(() if "rotary" in vlm.family.has else ("--no_rope",)))

    def run():
        return in_process(ROOT / "diagnostic_tools" / "run_coco_diagnostics.py")(
            *("--model_path", vlm.path),
            *where,
            *probes,
            *("--max_new_tokens", 2),
            *("--batch_size", 2),
            "--no_self_check",
        )

    assert (done := run()).returncode == 0, done.stderr
    (folder,) = tmp_path.glob("*__sp-?/per_image")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(before) == 6
    for suffix in (".json", ".npz"):
        (folder / sorted(before)[0]).with_suffix(suffix).unlink()
    assert (done := run()).returncode == 0, done.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


if __name__ == "__main__":
    import tempfile

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in NAMES:
            rows.append(row(name, common.load_model(BUILDERS[name](Path(scratch) / name))))
            print(rows[-1], end="", flush=True)
    head = (
        "| model | file | "
        + " | ".join(CAPABILITIES)
        + " | relevancy goes on into |\n"
        + "|---" * (len(CAPABILITIES) + 3)
        + "|\n"
    )
    table = head + "".join(rows) + "\n" + checks()
    head = f"| published model | file | {' | '.join(STATES)} |\n" + "|---" * 7 + "|\n"
    text = PAGE.read_text()
    for begin, content, end in (
        (BEGIN, table, END),
        (PUBLISHED_BEGIN, head + published_rows(), PUBLISHED_END),
    ):
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    PAGE.write_text(text)

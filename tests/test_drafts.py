"""Decoding with a draft against plain greedy decoding, on random models with as many key as query
heads, with grouped queries, and with positions on three axes."""

import copy
import dataclasses

import pytest
import torch

from vlmdiag.batch import Batch
from vlmdiag.groups import VISION
from vlmdiag.interp.interventions import asking, naming, prepare, run_conditions
from vlmdiag.model import decoding, drafts
from vlmdiag.model.attention import Block, Together, capture
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.model.probes import (
    GroupMass,
    HiddenNorms,
    ImageAttention,
    Probe,
    RopeShift,
    VisionRows,
)
from vlmdiag.runs import cost, rundirs

NAMES = ["llava", "llava-gqa", "qwen"]
LIMIT = 24
ROWS = (0, 1, 2, 0, 1, 2, 0, 1)


@pytest.fixture(params=NAMES)
def vlm(request, load):
    """A random model that does not say one token over and over: each says which comes next."""
    vlm = load(request.param)
    weight = vlm.parts.lm_head.weight
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    vlm.parts.lm_head.weight = torch.nn.Parameter(weight.detach()[order])
    yield vlm
    vlm.parts.lm_head.weight = weight


@pytest.fixture
def batch(vlm, batch_of):
    return batch_of(vlm, ROWS)


@pytest.fixture(autouse=True)
def nothing_counted():
    drafts.counted()


@pytest.fixture(params=[False, True], ids=["behind", "with_prompt"])
def is_ahead(request, monkeypatch):
    """Whether the drafts of a test are short enough to be read with the prompts."""
    monkeypatch.setattr(drafts, "SHORT", 200 if request.param else 0)
    return request.param


@pytest.fixture
def sizes(vlm):
    """How many positions each pass of the decoder reads."""
    read = []
    hook = vlm.parts.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield read
    hook.remove()


def gaps(vlm, batch, row, ids):
    """(best, distance to the second) of the logits at each step of an answer (N,), by one pass over
    prompt and answer."""
    longer = extended(batch, ids)
    with torch.inference_mode():
        logits = vlm.model(
            input_ids=longer.input_ids,
            attention_mask=longer.attention_mask,
            position_ids=longer.position_ids,
            mm_encoder_outputs={"image": vlm.vision(batch)},
        ).logits[row, -len(ids) - 1 : -1]
    best, second = logits.float().topk(2).values.unbind(-1)
    return best, best - second


def same(found, plain):
    """Whether two generations are equal but for rounding."""
    return (
        found.ids == plain.ids
        and torch.equal(found.steps, plain.steps)
        and found.logprobs.shape == plain.logprobs.shape
        and torch.allclose(found.logprobs, plain.logprobs, atol=1e-5, rtol=0, equal_nan=True)
        and torch.allclose(found.first, plain.first, atol=1e-5, rtol=0)
    )


def spoilt(answers):
    """Drafts that are right for none, some and all of the answers of eight rows."""
    return [
        [],
        answers[1],
        answers[2][:5],
        [7, *answers[3][1:]],
        [*answers[4][:6], 9, *answers[4][7:]],
        [*answers[5], *[3, 4, 5] * 20],
        [*answers[6][:4], *answers[6][9:]],
        [*answers[7][:8], 5, 6, *answers[7][8:]],
    ]


def test_rows_that_agree_with_their_drafts_for_different_lengths(vlm, batch, is_ahead):
    plain = generate(vlm, batch, LIMIT)
    assert min(gaps(vlm, batch, row, ids)[1].min() for row, ids in enumerate(plain.ids)) > 1e-4
    assert len({tuple(ids) for ids in plain.ids}) > 2 and len(set(plain.ids[0])) > 4
    assert same(generate(vlm, batch, LIMIT, drafts=spoilt(plain.ids)), plain)
    counts = drafts.counted()
    assert counts["draft_tokens"] == len(ROWS) * (LIMIT - (not is_ahead))
    assert counts["draft_agreed"] > counts["draft_tokens"] / 2
    assert counts["draft_near_ties"] == 0
    assert same(generate(vlm, batch, LIMIT, drafts=plain.ids), plain)
    # a token that is special in prompts, as random models say some, is not read with them
    assert drafts.counted()["draft_passes"] <= 1
    assert same(generate(vlm, batch, LIMIT, drafts=[[]] * len(ROWS)), plain)
    assert drafts.counted()["draft_agreed"] == 0


def test_an_answer_that_leaves_its_draft_goes_on_in_it(vlm, batch_of, is_ahead):
    """One row: a token that the draft lacks, one that it has too many, one in another's place."""
    batch = batch_of(vlm, (1,))
    plain = generate(vlm, batch, LIMIT)
    (ids,) = plain.ids
    for draft in ([*ids[:6], *ids[7:]], [*ids[:6], 9, *ids[6:]], [*ids[:6], 9, *ids[7:]]):
        assert same(generate(vlm, batch, LIMIT, drafts=[draft]), plain)
        assert drafts.counted()["draft_passes"] <= LIMIT // 2


def test_a_draft_ends_where_it_has_an_id_that_is_no_word(vlm, batch, is_ahead):
    plain = generate(vlm, batch, LIMIT)
    drafts.counted()
    given = [[*ids[:5], *more] for ids, more in zip(plain.ids, [[10**6], [-1]] * 4, strict=True)]
    assert same(generate(vlm, batch, LIMIT, drafts=given), plain)
    assert drafts.counted()["draft_agreed"] >= 4 * len(ROWS)


def test_drafts_and_answers_may_be_tensors(vlm, batch, monkeypatch):
    whole = generate(vlm, batch, LIMIT).ids
    monkeypatch.setattr(type(vlm), "eos_ids", property(lambda vlm: {whole[1][6]}))
    plain = generate(vlm, batch, LIMIT)
    given = [torch.tensor([*ids, 5, 6]) for ids in plain.ids]
    assert same(generate(vlm, batch, LIMIT, drafts=given), plain)
    forced = generate(vlm, batch, LIMIT, answers=[torch.tensor(ids) for ids in plain.ids])
    assert forced.ids == plain.ids


def test_an_answer_with_what_stands_for_a_picture_is_read_token_by_token(vlm, batch, sizes):
    """Some models (Kimi K2.5) read it otherwise among other tokens."""
    answers = [[20, vlm.image_token_id, 21, 22]] * len(ROWS)
    sizes.clear()
    generate(vlm, batch, 1, answers=answers)
    assert sizes[1:] == [1, 1, 1]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_tokens_than_were_asked_for(vlm, batch, limit, is_ahead):
    plain = generate(vlm, batch, limit)
    longer = generate(vlm, batch, LIMIT).ids
    assert same(generate(vlm, batch, limit, drafts=longer), plain)
    assert same(generate(vlm, batch, limit, drafts=spoilt(longer)), plain)


def test_no_more_positions_than_the_model_reads(vlm, batch, monkeypatch):
    config = vlm.model.config.get_text_config()
    whole = generate(vlm, batch, LIMIT).ids
    monkeypatch.setattr(config, "max_position_embeddings", max(batch.lengths) + 7)
    found = generate(vlm, batch, LIMIT, drafts=whole)
    assert same(found, generate(vlm, batch, LIMIT)) and int(found.steps.max()) == 7


def test_a_row_ends_at_its_eos_whatever_its_draft_and_the_others_say(
    vlm, batch, monkeypatch, is_ahead
):
    whole = generate(vlm, batch, LIMIT).ids
    ends = {whole[1][6], whole[2][11], whole[0][0]}
    monkeypatch.setattr(type(vlm), "eos_ids", property(lambda vlm: ends))
    plain = generate(vlm, batch, LIMIT)
    assert len({len(ids) for ids in plain.ids}) > 2
    for given in (whole, plain.ids, spoilt(whole), [ids[:3] for ids in whole]):
        assert same(generate(vlm, batch, LIMIT, drafts=given), plain)


def test_stop_ends_a_row_as_in_steps_of_one_token(vlm, batch, is_ahead):
    whole = generate(vlm, batch, LIMIT).ids
    ends = [9, 1, 4, LIMIT + 1, 2, 30, 14, 6]

    def stop(ids):
        # only at that very length: what was complete once stays complete
        return [len(row) == end for row, end in zip(ids, ends, strict=True)]

    plain = generate(vlm, batch, LIMIT, stop=stop)
    assert [len(ids) for ids in plain.ids] == [min(end, LIMIT) for end in ends]
    for given in (whole, spoilt(whole)):
        assert same(generate(vlm, batch, LIMIT, stop=stop, drafts=given), plain)


def test_ablated_answers_and_what_goes_on_from_their_cache(vlm, batch_of, is_ahead):
    """The second prompt goes on from the first one's cache, whose rows ended at different
    passes."""
    prompts = []
    with torch.no_grad():
        batch = batch_of(vlm, (0,))
        features = vlm.vision(batch)
        prompts.append(prepare(vlm, batch, features))
        shared = SharedPicture(vlm, batch)
        shared.keep(prompts[0].cache)
        longer = extended(batch_of(vlm, (0,)), [60, 61], "template")
        prompts.append(prepare(vlm, longer, features, shared))
    count = len(prompts[0].positions)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(count, prompts[0].embeds.shape[-1], generator=generator)
    values *= prompts[0].vision.std() * 4
    sets = {
        f"{start}-{size}": torch.arange(start, start + size).numpy()
        for start in (0, count // 2, count - 9)
        for size in (1, 4, 9)
    }

    def answers(draft):
        asks = [asking(LIMIT, draft), asking(LIMIT, draft), naming([70, 71])]
        return run_conditions(vlm, [*prompts, prompts[1]], asks, sets, values, 5)

    plain = answers(())
    with torch.no_grad():
        (unablated,) = generate(vlm, prompts[0].batch, LIMIT, **prompts[0].inputs(vlm)).ids
    found = answers(unablated)
    assert drafts.counted()["draft_agreed"] > 0
    assert len({tuple(of_set[0].ids) for of_set in plain.values()}) > 1, "some ablation shows"
    for name, of_set in plain.items():
        for one, other in zip(found[name], of_set, strict=True):
            assert one.ids == other.ids
            assert torch.allclose(one.logprobs, other.logprobs, atol=1e-5, equal_nan=True)
            assert torch.equal(one.first, other.first) or torch.allclose(
                one.first, other.first, atol=1e-5
            )


def test_the_answer_of_a_prepared_prompt_is_that_of_the_whole_prompt(vlm, batch_of):
    batch = batch_of(vlm, (1,))
    with torch.no_grad():
        prompt = prepare(vlm, batch, vlm.vision(batch))
        found = generate(vlm, batch, 6, **prompt.inputs(vlm))
    plain = generate(vlm, batch, 6)
    assert found.ids == plain.ids
    assert torch.allclose(found.logprobs, plain.logprobs, atol=1e-5)


def test_a_short_draft_is_read_with_the_prompt(vlm, batch_of, monkeypatch, sizes):
    """Up to what may stand for a picture in a prompt; a longer one is read behind it."""
    monkeypatch.setattr(drafts, "SHORT", 6)
    batch = batch_of(vlm, (0, 1))
    prompt = batch.input_ids.shape[1]
    picture = int(batch.input_ids[batch.groups == VISION][0])
    plain = generate(vlm, batch, 10)
    one, other = (ids[:4] for ids in plain.ids)
    assert not {*one, *other} & {picture, *vlm.tokenizer.all_special_ids}
    for given, first in (
        ([one, other], prompt + 4),
        ([[*one[:2], 9, 9, 9, 9], []], prompt + 6),
        ([[9], [other[0], picture, *other]], prompt + 1),
        ([[picture, *one], [picture]], prompt),
        ([one, plain.ids[1][:7]], prompt),
    ):
        sizes.clear()
        assert same(generate(vlm, batch, 10, drafts=given), plain)
        assert sizes[0] == first
    sizes.clear()
    assert same(generate(vlm, batch, 4, drafts=plain.ids), generate(vlm, batch, 4))
    assert sizes[0] == prompt + 3 and len(sizes) == 1 + 4


# --- measured: several steps in a pass ------------------------------------------------------------


class Hidden(Probe):
    """The residual stream of the last position of every pass, (L + 1, B, d) each."""

    wants_hidden = True

    def __init__(self):
        self.states = []

    def begin(self):
        super().begin()
        self.states.append({})

    def hidden(self, index, states):
        self.states[-1][index] = states[:, -1].clone()


def probes_of(vlm, batch):
    return [
        GroupMass(batch, LIMIT),
        VisionRows(batch),
        ImageAttention(batch, 2, whole=True),
        Hidden(),
        HiddenNorms(),
        RopeShift(batch, vlm.rotary, [1.0]),
    ]


def measured(vlm, batch, blocks=(), **options):
    """A generation and what six probes saw: {name: a tensor per step}."""
    probes = probes_of(vlm, batch)
    mass, vision, image, hidden, norms, rope = probes
    with capture(vlm, probes, blocks):
        generation = generate(vlm, batch, LIMIT, **options)
    seen = {"mass": mass.mass, "vision": vision.rows, "norms": [norms.norms]}
    seen |= {"top": image.topk, "mean": image.mean, "largest": image.largest}
    seen |= {"layers": image.layers, "rope": [rope["delta_gv"]]}
    seen["hidden"] = [
        torch.stack([of_step[index] for index in sorted(of_step)]) for of_step in hidden.states
    ]
    return generation, seen


def apart(found, plain, steps):
    """The largest difference of two times seen, over the steps that count (a row each)."""
    worst = 0.0
    for name, of_steps in plain.items():
        assert len(found[name]) == len(of_steps), name
        for step, (one, other) in enumerate(zip(found[name], of_steps, strict=True)):
            batch_at = {"mass": 1, "top": 1, "layers": 1, "hidden": 1, "rope": 2}.get(name, 0)
            rows = torch.arange(len(steps))[steps > step]
            one, other = (part.index_select(batch_at, rows) for part in (one, other))
            assert one.shape == other.shape, name
            size = other.abs().max().clamp_min(1) if name in ("hidden", "norms") else 1
            worst = max(worst, float((one - other).abs().max() / size))
    return worst


def of_one_token(patch):
    patch.setattr(decoding.known, "can_verify", lambda vlm, cache: False)


@pytest.mark.parametrize("width", [64, 5])
def test_given_answers_are_measured_as_in_steps_of_one_token(vlm, batch, monkeypatch, width):
    """Of lengths from 1 to LIMIT; in several passes too."""
    given = generate(vlm, batch, LIMIT).ids
    given = [ids[:length] for ids, length in zip(given, (1, 2, 6, 24, 11, 24, 5, 7), strict=True)]
    with monkeypatch.context() as patch:
        of_one_token(patch)
        plain, seen = measured(vlm, batch, answers=given)
    monkeypatch.setattr(drafts, "WIDTH", width)
    found, also = measured(vlm, batch, answers=given)
    assert found.ids == given and same(found, plain)
    assert apart(also, seen, plain.steps) < 1e-5
    assert same(generate(vlm, batch, LIMIT, answers=given), plain)
    assert not drafts.counted()


@pytest.mark.parametrize("rows", [(1,), ROWS])
def test_what_is_measured_with_a_draft_is_what_is_measured_without(vlm, batch_of, rows):
    batch = batch_of(vlm, rows)
    plain, seen = measured(vlm, batch)
    some = [[*ids[: 3 + row], 9, *ids[4 + row :]] for row, ids in enumerate(plain.ids)]
    for given, most in ((plain.ids, 1), (some, 15), ([[]] * len(rows), LIMIT)):
        drafts.counted()
        found, also = measured(vlm, batch, drafts=given)
        assert same(found, plain)
        assert apart(also, seen, plain.steps) < 1e-5
        assert drafts.counted()["draft_passes"] <= most


def test_measured_rows_that_end_before_others(vlm, batch, monkeypatch):
    whole = generate(vlm, batch, LIMIT).ids
    ends = {whole[1][6], whole[2][11], whole[0][0]}
    monkeypatch.setattr(type(vlm), "eos_ids", property(lambda vlm: ends))
    plain, seen = measured(vlm, batch)
    assert len({len(ids) for ids in plain.ids}) > 2
    for given in (whole, plain.ids, spoilt(whole), [ids[:3] for ids in whole]):
        found, also = measured(vlm, batch, drafts=given)
        assert same(found, plain)
        assert apart(also, seen, plain.steps) < 1e-5
    stopped = generate(vlm, batch, LIMIT, stop=lambda ids: [len(row) == 4 for row in ids])
    with capture(vlm, [probe := GroupMass(batch, LIMIT)]):
        options = {"stop": lambda ids: [len(row) == 4 for row in ids], "drafts": whole}
        assert same(generate(vlm, batch, LIMIT, **options), stopped)
    assert len(probe.mass) >= max(map(len, stopped.ids))


def test_blocks_reach_the_same_steps(vlm, batch):
    """From the third generated token on nothing of the picture is seen: under drafts that are
    wrong too, positions of the answer are those of the block."""
    length = batch.groups.shape[1]
    queries = torch.zeros(len(ROWS), length + LIMIT, dtype=torch.bool)
    queries[:, length + 2 :] = True
    keys = torch.nn.functional.pad(batch.groups == VISION, (0, LIMIT))
    blocks = [Block(queries, keys)]
    plain, seen = measured(vlm, batch, blocks)
    assert all(float(rows.sum()) == 0 for rows in seen["vision"][3:])
    assert all(float(rows.sum()) > 0 for rows in seen["vision"][:3])
    for given in (plain.ids, spoilt(plain.ids)):
        found, also = measured(vlm, batch, blocks, drafts=given)
        assert same(found, plain)
        assert apart(also, seen, plain.steps) < 1e-5


def measuring_mutants():
    def telling_the_row_above(patch):
        original = Together.tell
        patch.setattr(Together, "tell", lambda told, count, size: original(told, count, size + 1))

    def telling_all(patch):
        original = Together.tell
        patch.setattr(Together, "tell", lambda told, count, size: original(told, size, size))

    def leaving_what_was_wrong(patch):
        patch.setattr(drafts._Cache, "_cut", lambda state, mask: None)

    def each_row_for_itself(patch):
        patch.setattr(drafts, "is_capturing", lambda: False)

    return [telling_the_row_above, telling_all, leaving_what_was_wrong, each_row_for_itself]


@pytest.mark.parametrize("mutant", measuring_mutants(), ids=lambda mutant: mutant.__name__)
def test_wrong_steps_are_told_from_right_ones(vlm, batch, monkeypatch, mutant):
    plain, seen = measured(vlm, batch)
    mutant(monkeypatch)
    try:
        found, also = measured(vlm, batch, drafts=[[*ids[:5], 9, *ids[6:]] for ids in plain.ids])
        alike = same(found, plain) and apart(also, seen, plain.steps) < 1e-4
    except (RuntimeError, IndexError, AssertionError):
        return
    assert not alike


# --- where a draft is not used --------------------------------------------------------------------


def test_what_looks_at_passes_is_decoded_token_by_token(vlm, batch):
    """inspect() is told of a pass as it is made, with the values and the output."""
    plain = generate(vlm, batch, 5)
    sizes = []
    with capture(vlm, inspect=lambda layer, row, value, output: sizes.append(output.shape[1])):
        assert same(generate(vlm, batch, 5, drafts=plain.ids), plain)
        generate(vlm, batch, 5, answers=plain.ids)
    assert sizes.count(1) == 2 * 4 * len(vlm.parts.layers)
    assert not drafts.counted()


def test_sampled_and_given_answers_take_no_draft(vlm, batch):
    given = generate(vlm, batch, 5).ids
    for options in ({"do_sample": True, "temperature": 5.0}, {"answers": given[1:2] * 8}):
        plain = generate(vlm, batch, 5, **options)
        assert same(generate(vlm, batch, 5, drafts=given, **options), plain)
    assert not drafts.counted()


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
        {"layer_types": ["linear_attention"] * 4},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
    ],
)
def test_windows_states_and_moving_angles_are_not_drafted(load, batch_of, monkeypatch, config):
    vlm = load("llava")
    cache = generate(vlm, batch_of(vlm), 1).cache
    assert drafts.can_verify(vlm, cache)
    other = copy.deepcopy(vlm.parts.decoder.config)
    for name, value in config.items():
        setattr(other, name, value)
    monkeypatch.setattr(vlm.parts.decoder, "config", other)
    assert not drafts.can_verify(vlm, cache)


def test_a_family_that_is_not_causal_is_not_drafted(vlm, batch, monkeypatch):
    plain = generate(vlm, batch, 5)
    has = vlm.family.has - {"causal"}
    monkeypatch.setattr(vlm, "family", dataclasses.replace(vlm.family, has=has))
    assert same(generate(vlm, batch, 5, drafts=plain.ids), plain)
    assert not drafts.counted()


# --- rounding -------------------------------------------------------------------------------------


def test_in_bfloat16_a_draft_changes_only_what_rounding_decides(vlm, batch, is_ahead):
    """The first token that differs is one of two whose logits are within two steps of bfloat16."""
    own = dataclasses.replace(vlm, model=copy.deepcopy(vlm.model).to(torch.bfloat16))
    plain = generate(own, batch, LIMIT)
    found = generate(own, batch, LIMIT, drafts=spoilt(plain.ids))
    counts = drafts.counted()
    assert counts["draft_agreed"] > 0
    for row, (ids, others) in enumerate(zip(found.ids, plain.ids, strict=True)):
        differ = [n for n, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b]
        if differ:
            best, gap = (
                of_steps[-1] for of_steps in gaps(own, batch, row, others[: differ[0] + 1])
            )
            assert gap <= 2 * 2**-7 * 2 ** best.abs().log2().floor()
            assert counts["draft_near_ties"] > 0


def test_near_ties_are_within_two_steps_of_the_dtype():
    logits = torch.tensor([[3.0, 3.00005, 1.0], [3.0, 3.001, 1.0], [3.0, 3.03, 1.0]])
    assert int(drafts._near_ties(logits, torch.float32)) == 1
    # between 2 and 4 a step of bfloat16 is 2 ** -6
    assert int(drafts._near_ties(logits, torch.bfloat16)) == 3
    assert int(drafts._near_ties(logits + 0.02 * (logits > 3.02), torch.bfloat16)) == 2


# --- mutants --------------------------------------------------------------------------------------


def moved(monkeypatch, by):
    """Positions of the passes over drafts are moved."""
    original = Batch.text_positions
    monkeypatch.setattr(
        Batch, "text_positions", lambda batch, positions: original(batch, positions + by)
    )


def mutants():
    def keeping_all(patch):
        patch.setattr(drafts._Cache, "_keep", lambda state, counts: None)

    def taking_all(patch):
        patch.setattr(drafts, "_agreed", lambda said, guesses: len(guesses))

    def later(patch):
        moved(patch, 1)

    def other_rows(patch):
        original = drafts.first_positions
        patch.setattr(
            drafts,
            "first_positions",
            lambda vlm, cache, length, rows: original(vlm, cache, length, rows=rows.flip(0)),
        )

    return [keeping_all, taking_all, later, other_rows]


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.__name__)
def test_a_wrong_pass_is_told_from_a_right_one(vlm, batch, monkeypatch, mutant, is_ahead):
    whole = generate(vlm, batch, LIMIT).ids
    ends = {whole[1][6]}
    monkeypatch.setattr(type(vlm), "eos_ids", property(lambda vlm: ends))
    plain = generate(vlm, batch, LIMIT)
    mutant(monkeypatch)
    assert not same(generate(vlm, batch, LIMIT, drafts=spoilt(whole)), plain)


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_counts_its_drafts_and_near_ties(load, batch_of, tmp_path):
    vlm = load("llava")
    batch = batch_of(vlm)
    plain = generate(vlm, batch, 6).ids
    run = rundirs.open_run(tmp_path / "run", "demo", {}, {}, False)
    for _ in range(2):
        generate(vlm, batch, 6, drafts=plain)
        cost.note(run, 3, 1.0)
    cost.note(run, 3, 1.0)
    counters = run.counters()
    # read with the prompts: six tokens of three rows, of which the last is behind the draft's
    assert counters["draft_tokens"] == 2 * 18 and counters["draft_agreed"] == 2 * 15
    assert "draft_passes" not in counters

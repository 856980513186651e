"""Ablation, knockout and lens against slow, obvious computations: eager passes with explicit masks,
unshared passes, the model's own logits."""

import numpy as np
import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.conftest import embeddings
from vlmdiag.cli import UsageError
from vlmdiag.families import generic
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.interp import interventions, knockout, knockout_pairs
from vlmdiag.interp.conditions import condition_sets
from vlmdiag.interp.interventions import (
    Replacement,
    asking,
    integrated_gradients,
    naming,
    prepare,
    run_conditions,
)
from vlmdiag.model import attention
from vlmdiag.model.attention import Block, capture, edit
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.prefix import SharedPicture, branches, first_positions
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample

NAMES = ["llava", "llava-gqa", "qwen"]


@pytest.fixture(params=NAMES)
def vlm(request, load):
    return load(request.param)


@pytest.fixture
def prompt(vlm, batch_of):
    """One prompt, prepared."""
    batch = batch_of(vlm, (0,))
    with torch.no_grad():
        return prepare(vlm, batch, vlm.vision(batch))


def block(length, queries, keys, layers=None):
    rows = torch.zeros(2, 1, length, dtype=torch.bool)
    rows[0, 0, torch.as_tensor(queries)], rows[1, 0, torch.as_tensor(keys)] = True, True
    return Block(rows[0], rows[1], layers)


def examples(vlm, prompt):
    """Ways to block: last token, last vision tokens, both, in all layers and in some; and nothing
    before the first of their queries."""
    length, vision = prompt.embeds.shape[1], prompt.positions
    some = frozenset({1, 2})
    half = vision[: len(vision) // 2]
    ways = [
        [block(length, [length - 1], half, some)],
        [block(length, vision[-4:], vision[:-4], None)],
        [block(length, vision[-4:], half, some)],
    ]
    ways += [
        [block(length, [length - 1], vision, None), block(length, [length - 2], vision[:5], some)],
        [block(length, [length - 1], range(1, length - 1), frozenset({0}))],
    ]
    return ways, int(vision[-4])


@torch.no_grad()
def eager_states(vlm, prompt, blocks):
    """Last hidden states (T, d) of an eager pass with an additive mask of its own in every
    layer."""
    length, low = prompt.embeds.shape[1], torch.finfo(torch.float32).min
    causal = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), low)

    def hook(index):
        def replace(module, args, kwargs):
            mask = causal.clone()
            for one in blocks:
                if one.layers is None or index in one.layers:
                    mask[one.queries[0][:, None] & one.keys[0][None]] = low
            return args, kwargs | {"attention_mask": mask[None, None]}

        return replace

    hooks = [
        layer.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, layer in enumerate(vlm.parts.layers)
    ]
    vlm.parts.decoder.set_attn_implementation("eager")
    try:
        return vlm.parts.decoder(
            inputs_embeds=prompt.embeds, position_ids=prompt.batch.position_ids, use_cache=False
        ).last_hidden_state[0]
    finally:
        vlm.parts.decoder.set_attn_implementation("sdpa")
        for one in hooks:
            one.remove()


# --- knockout -------------------------------------------------------------------------------------


def test_branches_are_eager_passes_with_an_explicit_mask(vlm, prompt):
    ways, start = examples(vlm, prompt)
    before = [layer.keys.clone() for layer in prompt.cache.layers]
    states = branches(vlm, prompt.batch, prompt.cache, prompt.embeds, start, ways, prompt.vision)
    plain = eager_states(vlm, prompt, [])[start:]
    for found, blocks in zip(states, ways, strict=True):
        wanted = eager_states(vlm, prompt, blocks)[start:]
        assert torch.allclose(found, wanted, atol=2e-5 * wanted.abs().max())
        assert (
            wanted - plain
        ).abs().max() > 2e-4 * wanted.abs().max()  # the knockout does something
    assert all(
        torch.equal(a, layer.keys) for a, layer in zip(before, prompt.cache.layers, strict=True)
    )  # the unblocked cache is left as it was


def test_branches_equal_a_pass_under_edit_also_in_a_padded_batch(vlm, prompt, batch_of):
    ways, start = examples(vlm, prompt)
    lens, both = Lens(vlm), batch_of(vlm, (2, 0))
    pad = both.groups.shape[1] - prompt.embeds.shape[1]
    assert pad > 0
    for states, blocks in zip(
        branches(vlm, prompt.batch, prompt.cache, prompt.embeds, start, ways, prompt.vision),
        ways,
        strict=True,
    ):
        with torch.no_grad(), edit(vlm, blocks=blocks):
            alone = prefill(vlm, prompt.batch).logits[0, -1]
        moved = [
            Block(
                *(
                    torch.nn.functional.pad(rows, (pad, 0)).expand(2, -1)
                    & torch.tensor([[False], [True]])
                    for rows in (one.queries, one.keys)
                ),
                one.layers,
            )
            for one in blocks
        ]
        with torch.no_grad(), edit(vlm, blocks=moved):
            padded = prefill(vlm, both).logits[1, -1]
        found = lens.logits(states[-1], normed=True)
        for wanted in (alone, padded):
            assert torch.allclose(found, wanted, atol=2e-5 * wanted.abs().max())


def test_what_is_blocked_cannot_be_seen(vlm, prompt):
    """The embeddings of the hidden tokens may be anything: with every path to the last token cut,
    its state does not move."""
    length, vision = prompt.embeds.shape[1], prompt.positions
    after = torch.arange(int(vision[-1]) + 1, length)
    way = [block(length, after, vision)]
    changed = prompt.embeds.clone()
    changed[0, vision] = torch.randn(
        changed[0, vision].shape, generator=torch.Generator().manual_seed(0)
    )
    states = []
    for embeds in (prompt.embeds, changed):
        with torch.no_grad():
            cache = prefill(vlm, prompt.batch, embeds=embeds).past_key_values
        states.append(
            branches(vlm, prompt.batch, cache, embeds, int(after[0]), [way], prompt.vision)[0]
        )
    assert torch.equal(*states)


def test_a_query_without_keys_and_a_late_start_are_refused(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm, (0,))
    with torch.no_grad():
        prompt = prepare(vlm, batch, vlm.vision(batch))
    length = prompt.embeds.shape[1]
    with pytest.raises(UsageError, match="without any key"):
        branches(
            vlm,
            batch,
            prompt.cache,
            prompt.embeds,
            length - 1,
            [[block(length, [length - 1], range(length))]],
            prompt.vision,
        )
    with pytest.raises(ValueError, match="before start"):
        branches(
            vlm,
            batch,
            prompt.cache,
            prompt.embeds,
            length - 1,
            [[block(length, [length - 2], [0])]],
            prompt.vision,
        )


def test_windows_are_scaled_from_32_layers():
    assert (
        knockout_pairs.layer_windows(list(knockout_pairs.PAPER_WINDOWS), 32)
        == knockout_pairs.PAPER_WINDOWS
    )
    six = knockout_pairs.layer_windows([*knockout_pairs.PAPER_WINDOWS, "2-3", "sliding:3:2"], 6)
    assert (
        six["all"] == (0, 5)
        and six["early"] == (0, 1)
        and six["late"] == (4, 5)
        and six["2-3"] == (2, 3)
    )
    assert {"0-2", "2-4"} <= set(six) and "1-3" not in six
    assert list(knockout_pairs.layer_windows(["single"], 3).values()) == [(0, 0), (1, 1), (2, 2)]
    for wrong in ("5-2", "0-6", "x", "sliding:9", "sliding:0", "a-b", "sliding:x"):
        with pytest.raises(UsageError, match="--windows"):
            knockout_pairs.layer_windows([wrong], 6)
    with pytest.raises(UsageError, match="FROM:TO"):
        knockout_pairs.parse_pair("object:nowhere")


def test_the_groups_of_a_knockout_are_where_the_prompt_has_them(load, batch_of):
    vlm = load("llava")
    batch = extended(batch_of(vlm, (0,)), [50, 51], "template")
    groups, grid = batch.groups[0].numpy(), batch.grids[0]
    found = knockout.positions_of(
        groups, grid, {0: np.array([3]), 1: np.array([2, 3, 4]), 2: np.array([1, 2, 3, 4, 5])}
    )
    vision = np.flatnonzero(groups == GROUPS.index("vision"))
    assert (
        found["object"].tolist() == [vision[3]]
        and found["last_token"].tolist() == [len(groups) - 1]
        and found["last_row"].tolist() == vision[-12:].tolist()
    )
    assert len(found["other"]) == 141 and not set(found["other"]) & set(found["object+1"])
    assert len(found["image-last_row"]) == 132 and set(found["template"]) >= {
        len(groups) - 2,
        len(groups) - 1,
    }
    blocks = knockout.blocks_for(
        found, [("object", "last_token"), ("last_token", "object")], {"all": (0, 1)}, len(groups)
    )
    assert list(blocks) == [
        ("object", "last_token", "all")
    ]  # a later key is never seen, so there is nothing to cut


# --- ablation -------------------------------------------------------------------------------------


def test_no_edit_is_the_unedited_run_bit_for_bit(vlm, batch_of):
    batch = batch_of(vlm)
    plain = generate(vlm, batch, 4)
    with edit(vlm):
        edited = generate(vlm, batch, 4)
    assert (
        plain.ids == edited.ids
        and torch.equal(plain.first, edited.first)
        and torch.equal(plain.logprobs, edited.logprobs)
    )


def test_an_edit_behind_a_cache_is_of_the_prompts_positions_or_refused(vlm, batch_of):
    """The same as in a pass over the whole prompt; what the cache has does not run again."""
    batch = batch_of(vlm, (0,))
    with torch.no_grad():
        shared = SharedPicture(vlm, batch)
        shared.keep(generate(vlm, batch, 1).cache)
        behind, inputs = shared.ask(batch, [0])
    assert inputs["cache"] is not None
    start, total = inputs["cache"].get_seq_length(), behind.groups.shape[1]
    values = torch.randn(2, inputs["embeds"].shape[-1], generator=torch.Generator().manual_seed(0))
    question = torch.tensor([total - 4, total - 2])
    plain = generate(vlm, batch, 3)
    rows = torch.zeros(1, total, dtype=torch.bool)
    rows[0, -3:] = True
    for change in (
        {"embeddings": [(0, question, values)]},
        {"blocks": [Block(rows, behind.groups == VISION)]},
    ):
        with edit(vlm, **change):
            whole = generate(vlm, behind, 3)
            found = generate(vlm, behind, 3, **shared.ask(batch, [0])[1])
        assert (whole.first - plain.first).abs().max() > 1e-3
        assert found.ids == whole.ids
        assert torch.allclose(found.first, whole.first, atol=1e-4)
    early = torch.zeros(1, total, dtype=torch.bool)
    early[0, start - 1] = True
    for change in (
        {"embeddings": [(0, torch.tensor([start - 1, total - 1]), values)]},
        {"blocks": [Block(early, early)]},
    ):
        with edit(vlm, **change), pytest.raises(UsageError, match=f"positions before {start}"):
            generate(vlm, behind, 1, **shared.ask(batch, [0])[1])


def test_shared_prefixes_and_batched_conditions_change_nothing(vlm, prompt, batch_of):
    """Every condition against one plain pass of its own with the embeddings edited."""
    count = len(prompt.positions)
    other = batch_of(vlm, (0,))
    with torch.no_grad():
        shared = SharedPicture(vlm, prompt.batch)
        shared.keep(prompt.cache)
        second = prepare(vlm, extended(other, [60, 61], "template"), vlm.vision(other), shared)
    values = torch.randn(count, prompt.embeds.shape[-1], generator=torch.Generator().manual_seed(1))
    sets = {
        "one": np.array([count - 1]),
        "two": np.array([2, 7]),
        "all": np.arange(count),
        "first": np.array([0]),
        "late": np.array([count - 3, count - 2]),
    }
    found = run_conditions(vlm, [prompt, second], [asking(4), naming([70, 71])], sets, values, 2)
    for name, index in sets.items():
        for part, this, options in (
            (found[name][0], prompt, {}),
            (found[name][1], second, {"answers": [[70, 71]]}),
        ):
            with edit(
                vlm,
                embeddings=[
                    (0, this.positions[torch.from_numpy(index)], values[torch.from_numpy(index)])
                ],
            ):
                wanted = generate(vlm, this.batch, 4, **options)
            ids, logprobs, first = part
            assert ids == wanted.ids[0]
            assert torch.allclose(first, wanted.first[0], atol=1e-4) and torch.allclose(
                logprobs, wanted.logprobs[0], atol=1e-4, equal_nan=True
            )


def test_conditions_of_a_prompt_have_one_mask_for_all(vlm, prompt, monkeypatch):
    """None of its rows is padded where the others are not; with a mask a row the same bits."""
    count = len(prompt.positions)
    sets = {str(n): np.arange(n, count) for n in range(4)}
    values = torch.randn(count, prompt.embeds.shape[-1], generator=torch.Generator().manual_seed(1))
    shapes = []

    def noting(module, query, key, value, mask, **options):
        if query.shape[2] > 1:
            shapes.append((len(query), None if mask is None else len(mask)))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def shared():
        return run_conditions(vlm, [prompt], [asking(4)], sets, values, 4)

    monkeypatch.setattr(attention, "sdpa_attention_forward", noting)
    found = shared()
    assert {rows for rows, _ in shapes} >= {4} and {masks for _, masks in shapes} <= {None, 1}
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention.NAME, sdpa_mask)
    shapes.clear()
    with_rows = shared()
    assert (4, 4) in shapes
    for name in sets:
        for ours, theirs in zip(found[name][0][1:], with_rows[name][0][1:]):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert found[name][0][0] == with_rows[name][0][0]


def test_padded_rows_have_masks_of_their_own(vlm, batch_of):
    batch = batch_of(vlm, (0, 1))
    batch = extended(batch, [60], "template")
    shapes = []
    with capture(vlm, inspect=lambda layer, row, value, output: shapes.append(len(row.mask))):
        vlm.parts.decoder(
            inputs_embeds=embeddings(vlm, batch),
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        )
    is_padded = bool((batch.attention_mask == 0).any())
    assert is_padded and set(shapes) == {2}


def test_with_deepstack_a_replaced_token_is_gone_from_the_first_layers_too(load, batch_of):
    """Against transformers' own forward pass, which gets the changed features as a picture's; and
    integrated gradients are complete over all of them."""
    vlm = load("qwen3")
    batch = batch_of(vlm, (0,))
    with torch.no_grad():
        prompt = prepare(vlm, batch, vlm.vision(batch))
        shared = SharedPicture(vlm, batch)
        shared.keep(prompt.cache)
        second = prepare(vlm, extended(batch, [60, 61], "template"), prompt.features, shared)
        assert torch.allclose(prompt.logits, prefill(vlm, batch).logits[0, -1].float(), atol=1e-4)
    count = len(prompt.positions)
    values = torch.randn(count, prompt.embeds.shape[-1], generator=torch.Generator().manual_seed(1))
    sets = {"one": np.array([count - 1]), "two": np.array([2, 7]), "all": np.arange(count)}
    found = run_conditions(vlm, [prompt, second], [asking(4), naming([70, 71])], sets, values, 2)
    for name, index in sets.items():
        for part, this, options in (
            (found[name][0], prompt, {}),
            (found[name][1], second, {"answers": [[70, 71]]}),
        ):
            changed, kept = vlm.vision(batch), vlm.vision(batch)
            changed.pooler_output[0][index] = values[index]
            kept.pooler_output[0][index] = values[index]
            for layer in changed.deepstack_features:
                layer[0][index] = 0
            wanted, other = (
                generate(vlm, this.batch, 4, features=features, **options)
                for features in (changed, kept)
            )
            ids, logprobs, first = part
            assert ids == wanted.ids[0]
            assert torch.allclose(first, wanted.first[0], atol=1e-4) and torch.allclose(
                logprobs, wanted.logprobs[0], atol=1e-4, equal_nan=True
            )
            assert not torch.allclose(first, other.first[0], atol=1e-3), (
                "what the first layers add counts"
            )
    baseline = prompt.embeds[0, prompt.positions].mean(0).expand(count, -1)
    scores, error = integrated_gradients(
        vlm, prompt, baseline, int(prompt.logits.argmax()), steps=600, per_pass=60
    )
    assert scores.shape == (count,) and error < 0.01


@pytest.mark.parametrize("begin", ["in the picture", "behind it"])
def test_with_deepstack_knockouts_are_those_of_whole_passes(load, batch_of, begin):
    vlm = load("qwen3")
    batch = batch_of(vlm, (0,))
    with torch.no_grad():
        prompt = prepare(vlm, batch, vlm.vision(batch))
    length, vision = prompt.embeds.shape[1], prompt.positions
    first = int(vision[len(vision) // 2]) if begin == "in the picture" else length - 2
    blocks = {
        layers: block(length, range(first, length), vision[:5], layers)
        for layers in (None, frozenset({0}), frozenset({1}))
    }
    found = knockout.knocked_out(vlm, Lens(vlm), prompt, blocks)
    for layers, one in blocks.items():
        with torch.no_grad(), edit(vlm, blocks=[one]):
            wanted = prefill(vlm, batch).logits[0, -1]
        assert torch.allclose(found[layers], wanted, atol=2e-5 * wanted.abs().max())
    assert not torch.allclose(found[None], prompt.logits, atol=1e-3)


@torch.inference_mode()
def test_with_deepstack_prompts_of_a_picture_share_its_keys_and_values(load, pictures):
    vlm = load("qwen3")
    rows = [0, 1, 0, 1]
    texts = ["Is it red?", "What is it?", "Is there a circle on the left?", "Far?"]
    samples = [Sample(str(n), None, text) for n, text in enumerate(texts)]
    batch = vlm.encode(samples, [pictures[row] for row in rows])
    wanted = generate(vlm, batch, 4)
    together = SharedPicture(vlm, batch, rows)
    one_by_one = SharedPicture(vlm, vlm.encode(samples[:2], pictures[:2]))
    moved, inputs = one_by_one.ask(vlm.encode(samples[:2], pictures[:2]), [0, 1])
    assert "cache" not in inputs
    one_by_one.keep(generate(vlm, moved, 1, **inputs).cache)
    for shared in (together, one_by_one):
        moved, inputs = shared.ask(batch, rows)
        assert inputs["cache"].get_seq_length() == shared.start
        found = generate(vlm, moved, 4, **inputs)
        assert found.ids == wanted.ids
        assert torch.allclose(found.first, wanted.first, atol=1e-4)


def test_prefixes_are_shared_by_causal_families_only(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm, (0,))
    with torch.no_grad():
        cache = prefill(vlm, batch).past_key_values
    assert first_positions(vlm, cache, 7, 3).get_seq_length() == 7
    as_generic = type(vlm)(vlm.model, vlm.processor, generic.FAMILY, vlm.path)
    assert first_positions(as_generic, cache, 7, 3) is None


def test_conditions_keep_clear_of_the_object_and_match_its_size(load, batch_of):
    grid = batch_of(load("llava"), (0,)).grids[0]
    tokens, rng = np.array([65, 66, 77, 78]), np.random.default_rng(0)
    norms, scores = rng.random(144), rng.random(144)
    sets, skipped = condition_sets(grid, norms, scores, tokens, (5, 250), 2, 0, "7")
    assert sets["patch_0"].tolist() == tokens.tolist()
    assert len(sets["patch_1"]) == 16 and len(sets["patch_2"]) == 36
    for b in (0, 1, 2):
        patch = set(sets[f"patch_{b}"])
        for name in (f"random_matched_{b}_0", f"random_matched_{b}_1", f"blob_matched_{b}_0"):
            assert len(sets[name]) == len(patch) == len(set(sets[name]))
            assert not set(sets[name]) & patch
    assert sets["random_matched_0_0"].tolist() != sets["random_matched_0_1"].tolist()
    assert "144 vision tokens" in skipped["gradient_250"] and "random_250" in skipped
    assert not set(skipped) & set(sets)
    assert len(sets["gradient_5"]) == 5 and len(sets["all"]) == 144
    again, _ = condition_sets(grid, norms, None, tokens, (5,), 2, 0, "7")
    assert again["random_5"].tolist() == sets["random_5"].tolist() and "gradient_5" not in again
    other, _ = condition_sets(grid, norms, None, tokens, (5,), 2, 0, "8")
    assert other["random_5"].tolist() != sets["random_5"].tolist()


def test_replacements_and_mean_vectors(tmp_path):
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean = torch.arange(8.0)
    assert torch.equal(Replacement("mean", mean).values(features, 0, "1")[7], mean)
    assert not Replacement("zeros").values(features, 0, "1").any()
    noise = Replacement("noise").values(features, 0, "1")
    assert torch.equal(noise, Replacement("noise").values(features, 0, "1"))
    assert not torch.equal(noise, Replacement("noise").values(features, 0, "2"))
    assert (noise.mean(0) - features.mean(0)).abs().max() < 2 and (
        noise.std(0) / features.std(0)
    ).log().abs().max() < 0.5
    torch.save(mean, tmp_path / "mean.pt")
    assert interventions.load_mean(tmp_path / "mean.pt", 8)[1] is None
    (tmp_path / "mean.json").write_text('{"images": 3}')
    assert interventions.load_mean(tmp_path / "mean.pt", 8)[1] == {"images": 3}
    (tmp_path / "text.pt").write_text("no tensor")
    for path, width, why in (
        (tmp_path / "mean.pt", 9, "shape"),
        (tmp_path / "gone.pt", 8, "cannot be read"),
        (tmp_path / "text.pt", 8, "cannot be read"),
    ):
        with pytest.raises(UsageError, match=why):
            interventions.load_mean(path, width)


# --- integrated gradients -------------------------------------------------------------------------


def test_integrated_gradients_are_complete_and_find_the_planted_token(vlm, prompt):
    baseline = prompt.embeds[0, prompt.positions].mean(0).expand(len(prompt.positions), -1)
    target = int(prompt.logits.argmax())
    scores, error = integrated_gradients(vlm, prompt, baseline, target, steps=120, per_pass=40)
    assert scores.shape == (len(prompt.positions),) and (scores >= 0).all() and error < 0.01
    alike = baseline.clone()
    alike[:] = prompt.embeds[0, prompt.positions]
    alike[5] += 1
    scores, _ = integrated_gradients(vlm, prompt, alike, target, steps=4, per_pass=3)
    assert (
        scores.argmax() == 5 and np.delete(scores, 5).max() == 0
    )  # only token 5 differs from its baseline
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


# --- lens -----------------------------------------------------------------------------------------


def test_the_last_layer_of_the_lens_is_the_models_own_distribution(vlm, batch_of):
    batch, lens = batch_of(vlm), Lens(vlm)
    with torch.no_grad(), capture(vlm, [probe := HiddenStates()]):
        features = vlm.vision(batch)
        logits = prefill(vlm, batch, features).logits
    count = len(vlm.parts.layers)
    assert sorted(probe.states) == list(range(count + 1))
    with torch.no_grad():
        whole = vlm.model(
            inputs_embeds=embeddings(vlm, batch, features),
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
    assert torch.equal(lens.logits(probe.states[count]), whole)  # every position, exactly
    lens.check(probe.states[count][:, -1], logits[:, -1])
    ids, probs = lens.top_k(probe.states[count], 3)
    wanted = whole.softmax(-1).topk(3)
    assert torch.equal(ids, wanted.indices) and torch.allclose(probs, wanted.values, atol=1e-6)
    with pytest.raises(UsageError, match="differs from the model's logits"):
        lens.check(probe.states[count - 1][:, -1], logits[:, -1])
    assert torch.equal(
        probe.states[0][batch.groups != -1], embeddings(vlm, batch, features)[batch.groups != -1]
    )


@pytest.mark.parametrize(
    "name, value",
    [("final_logit_softcapping", 0.5), ("logit_scale", 0.25), ("logits_scaling", 4.0)],
)
@pytest.mark.parametrize("model_does", [True, False])
def test_scales_and_softcaps_are_part_of_the_lens_where_the_model_does_them(
    load, name, value, model_does
):
    """Aya Vision's and Cohere 2 Vision's configs have a logit_scale that transformers' classes
    leave out."""
    vlm = load("llava")
    width = vlm.parts.lm_head.weight.shape[1]
    states = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    ends = {
        "final_logit_softcapping": lambda logits: torch.tanh(logits / 0.5) * 0.5,
        "logit_scale": lambda logits: logits * 0.25,
        "logits_scaling": lambda logits: logits / 4,
    }
    plain = Lens(vlm).logits(states)

    def end(model, args, output):
        output.logits = ends[name](output.logits)
        return output

    hook = vlm.model.register_forward_hook(end) if model_does else None
    text = vlm.model.config.get_text_config()
    setattr(text, name, value)
    vlm.__dict__.pop("logit_end")  # found for the model as it was
    try:
        found = Lens(vlm).logits(states)
    finally:
        delattr(text, name)
        del vlm.__dict__["logit_end"]
        if hook is not None:
            hook.remove()
    assert torch.allclose(found, ends[name](plain) if model_does else plain)


def test_the_vocabulary_keeps_spaces_bytes_and_special_tokens(load):
    tokenizer = load("llava").tokenizer
    table = vocabulary(tokenizer, range(len(tokenizer)))
    assert (
        len(table) == len(tokenizer)
        and table[tokenizer.eos_token_id] == "</s>"
        and "<0x0A>" in table.values()
    )
    assert table[tokenizer.encode("a circle")[-1]] == " circle"

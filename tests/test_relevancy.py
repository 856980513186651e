"""Gradient relevancy: rules against whole matrices, gradients against transformers' eager
attention, planted dependencies, baselines."""

import numpy as np
import pytest
import torch
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

import common
from tests.conftest import embeddings
from tests.random_models import kosmos2, llava_next, molmo, mplug_owl2, nvila
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.selfcheck import noise_picture
from vlmdiag.model.vision import more_inputs
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import attention_gradient, rules
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy.gradients import trace

QUESTION = "What color is the circle?"
N = 35  # positions of an attention call


@pytest.fixture(scope="module", params=["llava-gqa", "qwen", "qwen3"])
def run(request, load, pictures):
    vlm = load(request.param)
    batch = vlm.encode([Sample("0", None, QUESTION)], [pictures[1]])
    return trace(vlm, batch, generate(vlm, batch, 5).ids[0])


def eager(run, targets):
    """Ā of every decoder and tower layer for each target by plain autograd through transformers'
    own eager attention: ({layer: (T, N, N)}, {block: ...})."""
    vlm, seen, hooks = run.vlm, {}, []
    vlm.model.set_attn_implementation("eager")
    try:
        for kind, blocks in (("layer", vlm.parts.layers), ("block", vlm.parts.vision_blocks)):
            for index, block in enumerate(blocks):

                def keep(module, args, output, key=(kind, index)):
                    seen[key] = output[1]

                hooks.append(block.self_attn.register_forward_hook(keep))
        rows = run.prompt.image_rows[0]
        pixels = rows["pixel_values"].clone().requires_grad_()
        inputs = run.prompt.image_inputs | {"pixel_values": pixels}
        options = (
            {"mm_token_type_ids": (run.batch.input_ids == vlm.model.config.image_token_id).int()}
            if vlm.family.name.startswith("qwen")
            else {}
        )
        logits = vlm.model(
            input_ids=run.batch.input_ids,
            attention_mask=run.batch.attention_mask,
            position_ids=run.batch.position_ids,
            use_cache=False,
            **inputs,
            **options,
        ).logits
        found = {key: [] for key in seen}
        for target in targets:
            chosen = logits[0, run.rows[target], run.ids[target]]
            maps = torch.autograd.grad(
                chosen, list(seen.values()), retain_graph=True, allow_unused=True
            )
            for (key, attention), gradient in zip(seen.items(), maps, strict=True):
                found[key].append(
                    None
                    if gradient is None
                    else rules.head_mean(attention[0], gradient[0]).detach()
                )
    finally:
        for hook in hooks:
            hook.remove()
        vlm.model.set_attn_implementation("sdpa")
    return found


def maps_of(run, targets):
    """{layer: Ā (T, N, N)}: what each layer makes of the rows of the identity."""
    descent = run.descend(targets)
    eye = torch.eye(run.length).expand(len(targets), -1, -1)
    maps = {}
    while descent.layer:
        carried = descent.step(eye)
        maps[descent.layer] = carried
    return maps


def tower_matrix(run, targets, tile=0):
    """R (T, S, S) of the tower on one tile."""
    eye = torch.eye(run.tower.positions).expand(len(targets), -1, -1)
    return run.tower.carry(eye, run.descend(targets).vision_gradient, tile)


def close(a, b, tolerance=1e-4):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp_min(1e-12))


def apart(a, b):
    return bool(b.isfinite().all()) and not close(a, b, 1e-3)


def test_maps_are_those_of_plain_autograd_through_eager_attention(run):
    targets = [0, 2, len(run.ids) - 1]
    oracle, layers = eager(run, targets), len(run.layers)
    found = maps_of(run, targets)
    for layer in range(layers):
        assert all(close(found[layer][i], oracle["layer", layer][i]) for i in range(3))
    assert not close(found[0][0], oracle["layer", 1][0]) and not close(
        found[0][0], oracle["layer", 0][1]
    )  # another layer, another target
    assert bool(run.tower) == bool(run.vlm.parts.vision_blocks)
    if run.tower:  # features come from hidden state -2: the last block has no gradient
        last = len(run.vlm.parts.vision_blocks) - 1
        assert oracle.get(("block", last), [None])[0] is None
        for i, matrix in enumerate(tower_matrix(run, targets)):
            maps = [oracle["block", block][i] for block in range(last)]
            assert close(matrix, rules.self_attention(maps))
            assert apart(matrix, rules.self_attention(maps[1:])), "the first block counts"


MASKS = {
    "none": None,
    "causal": torch.ones(N, N).tril().bool(),
    "window": torch.ones(N, N).tril().triu(-5).bool(),
    # a picture at the beginning sees itself whole
    "picture": torch.ones(N, N).tril().bool() | (torch.arange(N) < 9)[None],
    "numbers": torch.where(torch.ones(N, N).tril() == 1, 0.0, -1e9),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "softcap, has_bias, has_sinks",
    [(None, False, False), (2.0, False, False), (None, True, False), (None, False, True)],
)
@pytest.mark.parametrize("rows_at_once, heads_at_once", [(7, 1), (7, 3), (N, 4), (128, 2)])
def test_an_attention_call_is_differentiated_as_by_autograd(
    mask, softcap, has_bias, has_sinks, rows_at_once, heads_at_once, monkeypatch
):
    """Grouped queries, blocks of queries and of heads that do and do not divide their number, for 3
    gradients together."""
    monkeypatch.setattr(attention_gradient, "ROWS", rows_at_once)
    of_head = 4 * 3 * min(rows_at_once, N) * N  # bytes
    monkeypatch.setitem(attention_gradient.TOGETHER, "cpu", heads_at_once * of_head)
    make = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    q = normal(1, 4, N, 8).requires_grad_()
    k, v = (normal(1, 2, N, 8).requires_grad_() for _ in range(2))
    d_output, rows = normal(3, N, 4, 8), normal(3, 5, N)
    bias = normal(1, 4, N, N) if has_bias else None
    seen = MASKS[mask] if MASKS[mask] is None else MASKS[mask][None, None]
    products = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    if has_bias:
        products = products + bias
    if seen is not None and seen.dtype == torch.bool:
        products = products.masked_fill(~seen, float("-inf"))
    elif seen is not None:
        products = products + seen
    sinks = normal(4) if has_sinks else None
    if sinks is not None:  # a key of no value
        products = torch.cat([products, sinks[None, :, None, None].expand(1, 4, N, 1)], -1)
    A = products.softmax(-1)[..., :N]  # (1, H, N, K)
    output = (A @ v.repeat_interleave(2, 1)).transpose(1, 2)  # (1, N, H, D)
    call = attention_gradient.AttentionCall(q, k, v, output, seen, 0.3, softcap, bias, sinks)
    found = call.backward(d_output, rows)
    for i in range(3):
        dA, *wanted = torch.autograd.grad(
            output, [A, q, k, v], d_output[i][None], retain_graph=True
        )
        average = rules.head_mean(A, dA)[0].detach()
        assert close(found.carried[i], rows[i] @ average, 1e-5)
        for ours, theirs in zip(found[1:], wanted, strict=True):
            assert close(ours[i], theirs, 1e-5)
    some = torch.tensor([0, 30, 12])
    assert close(call.mean(some), A.detach().mean(1)[0, some], 1e-6)
    assert call.backward(d_output, rows[:, :0]).carried.shape == (3, 0, N)


def test_rows_are_those_of_the_matrix_recursion(run):
    targets, depth = [1, 3], len(run.layers)
    maps = maps_of(run, targets)
    found = attribution.relevancy(run, targets)
    assert found.layers == list(range(depth)) and found.rows.shape == (2, depth, run.length)
    eye = torch.eye(run.length)
    for k in range(depth):
        whole = rules.self_attention([maps[layer] for layer in range(k + 1)])
        for i, target in enumerate(targets):
            assert close(
                torch.from_numpy(found.rows[i, k]), (whole[i] - eye)[run.rows[target]], 1e-5
            )
    assert np.array_equal(found.image, found.rows[:, :, run.vision])
    for i, target in enumerate(
        targets
    ):  # nothing comes from positions that the producing row cannot see
        assert (
            found.rows[i, :, int(run.rows[target]) + 1 :].max(initial=0) == 0
            and found.rows.min() >= 0
        )
    if run.tower:
        tower = tower_matrix(run, targets)
        first = tower.shape[-1] - len(run.vision)
        for i in range(2):
            assert close(
                torch.from_numpy(found.cells[i]),
                torch.from_numpy(found.image[i]) @ tower[i][first:, first:],
                1e-5,
            )


def traced(vlm, picture, count=3):
    batch = vlm.encode([Sample("0", None, QUESTION)], [picture])
    return trace(vlm, batch, list(range(40, 40 + count)))


def plain(run, targets):
    """By plain autograd through transformers' own eager attention, with all parameters unfrozen as
    the published code has them: for each target {(kind, layer): Ā}, tiles of the tower along the
    first axis; the vision tokens (P, d) and the outputs of the tower's blocks, with their graph.
    """
    vlm, former, seen, states, hooks = run.vlm, run.vlm.parts.qformer, {}, [], []
    listed = {
        "decoder": [layer.self_attn for layer in vlm.parts.layers],
        "tower": [block.self_attn for block in vlm.parts.vision_blocks],
    }
    listed |= {"own": former.self_attention, "cross": former.cross_attention} if former else {}
    for kind, modules in listed.items():
        for index, module in enumerate(modules):
            if module is not None:
                hooks.append(
                    module.register_forward_hook(
                        lambda _, args, output, key=(kind, index): seen.__setitem__(key, output[1])
                    )
                )
    for block in vlm.parts.vision_blocks:
        hooks.append(
            block.register_forward_hook(
                lambda _, args, output: states.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
        )
    configs = {
        id(config): config
        for config in (
            module.config for modules in listed.values() for module in modules if module is not None
        )
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        vlm.model.requires_grad_(True)
        whole, features = run.batch, vlm.vision(run.prompt)
        options = {
            "attention_mask": whole.attention_mask,
            "position_ids": whole.position_ids,
            "use_cache": False,
        } | more_inputs(vlm, whole)
        logits = vlm.model(inputs_embeds=embeddings(vlm, whole, features), **options).logits
        found = []
        for target in targets:
            maps = torch.autograd.grad(
                logits[0, run.rows[target], run.ids[target]],
                list(seen.values()),
                retain_graph=True,
                allow_unused=True,
            )
            products = {
                key: rules.head_mean(attention, slope).detach()
                for (key, attention), slope in zip(seen.items(), maps, strict=True)
                if slope is not None
            }
            found.append(
                {
                    key: average if key[0] == "tower" else average[0]
                    for key, average in products.items()
                }
            )
    finally:
        for hook in hooks:
            hook.remove()
        vlm.model.requires_grad_(False)
        for key, config in configs.items():
            config._attn_implementation = before[key]
    return found, torch.cat(features.pooler_output), states


def through(average, kind):
    """R of a stack of self-attention, rule 6 by whole matrices."""
    relevancy = torch.eye(average[kind, 0].shape[-1])
    for index in range(sum(key[0] == kind for key in average)):
        relevancy = relevancy + average[kind, index] @ relevancy
    return relevancy


def from_vision(run, average, target):
    """Image relevancy (P,) after the last layer."""
    return (through(average, "decoder") - torch.eye(run.length))[run.rows[target], run.vision]


def scaled(relevancy):
    """Rules 8 and 9, row by row."""
    found = torch.eye(len(relevancy))
    for row, rest in enumerate(relevancy - torch.eye(len(relevancy))):
        found[row] += rest / rest.sum() if rest.sum() > 0 else 0
    return found


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-llama"])
def test_relevancy_goes_through_a_q_former(blip_folders, pictures, name):
    """Against transformers' own eager attention, plain autograd and whole matrices."""
    run = traced(common.load_model(blip_folders(name), self_check=False), pictures[1])
    found, former = attribution.relevancy(run, [0, 2]), run.vlm.parts.qformer
    for i, (average, target) in enumerate(zip(plain(run, [0, 2])[0], [0, 2], strict=True)):
        image = from_vision(run, average, target)
        assert close(torch.from_numpy(found.image[i, -1]), image)
        r_ii, n = through(average, "tower")[0], len(average["own", 0])
        r_qq, r_qi = torch.eye(n), torch.zeros(n, len(r_ii))
        for layer in range(len(former.self_attention)):
            r_qi, r_qq = r_qi + average["own", layer] @ r_qi, r_qq + average["own", layer] @ r_qq
            if ("cross", layer) in average:
                cross = torch.cat(
                    [average["cross", layer], torch.zeros(n - former.queries, len(r_ii))]
                )
                r_qi = r_qi + scaled(r_qq).T @ cross @ scaled(r_ii)
        assert close(torch.from_numpy(found.cells[i, -1]), image @ r_qi[: former.queries, 1:])
        if former.instruction:
            assert close(
                torch.from_numpy(found.instruction[i, -1]),
                image @ r_qq[: former.queries, former.queries :],
            )
    assert (
        (found.instruction is None) == (name == "blip2-opt")
        and found.cells.shape[-1] == 16
        and not run.tower.joint
    )


def test_relevancy_goes_through_queries_that_read_each_other_and_the_patches_by_one_softmax(
    tmp_path, pictures
):
    """mPLUG-Owl2, against the same and docs/studies/stethoscope.md, section 2.5; its last token is
    made of nothing."""
    run = traced(
        common.load_model(
            mplug_owl2.MODELS["mplug_owl2-gqa"](tmp_path / "model"), self_check=False
        ),
        pictures[1],
    )
    found, q = attribution.relevancy(run, [0, 2]), run.vlm.parts.qformer.queries
    assert (
        run.tower.joint
        and found.image.shape[-1] == q + 1
        and found.cells.shape[-1] == 64
        and found.instruction is None
    )
    for i, (average, target) in enumerate(zip(plain(run, [0, 2])[0], [0, 2], strict=True)):
        image, r_ii = from_vision(run, average, target), through(average, "tower")[0]

        def onto(late=False, average=average, r_ii=r_ii):
            r_qq, r_qi = torch.eye(q), torch.zeros(q, len(r_ii))
            for layer in range(3):
                own, cross = average["own", layer][:, :q], average["own", layer][:, q:]
                bar = scaled(r_qq + own @ r_qq if late else r_qq)
                r_qi, r_qq = r_qi + own @ r_qi + bar.T @ cross @ scaled(r_ii), r_qq + own @ r_qq
            return r_qi

        cells = torch.from_numpy(found.cells[i, -1])
        assert close(torch.from_numpy(found.image[i, -1]), image) and image[q] > 0
        assert close(cells, image[:q] @ onto()[:, 1:])
        assert apart(cells, image[:q] @ onto(late=True)[:, 1:]), (
            "rule 10 with the new R_qq is told apart"
        )
        assert apart(cells, (image[:q] @ onto() @ torch.linalg.inv(scaled(r_ii)))[1:]), (
            "and so is a tower that does not count"
        )
    gradient = run.descend([0]).vision_gradient
    only = torch.nn.functional.one_hot(torch.tensor([q]), q + 1).float()[None]
    assert attribution.onto_patches(run.tower, only, gradient)[0].abs().max() == 0


def test_relevancy_goes_through_kosmos2s_resampler(tmp_path, pictures):
    """One layer of queries that read CLS, patches and each other: against transformers' own module,
    where the queries' keys come last."""
    run = traced(
        common.load_model(kosmos2.MODELS["kosmos2"](tmp_path / "model"), self_check=False),
        pictures[1],
    )
    found, q, resampler = (
        attribution.relevancy(run, [0, 2]),
        run.vlm.parts.qformer.queries,
        run.vlm.parts.connector,
    )
    assert run.tower.joint and found.cells.shape[-1] == 16
    resampler.__class__ = Kosmos2ImageToTextProjection
    for i, (average, target) in enumerate(zip(plain(run, [0, 2])[0], [0, 2], strict=True)):
        image, r_ii = from_vision(run, average, target), through(average, "tower")[0]
        cells, reading = torch.from_numpy(found.cells[i, -1]), average["cross", 0]
        assert close(torch.from_numpy(found.image[i, -1]), image)
        assert close(cells, (image @ reading[:, :-q] @ scaled(r_ii))[1:])
        assert apart(cells, (image @ reading[:, q:] @ scaled(r_ii))[1:]), (
            "queries taken for patches are told apart"
        )


@pytest.mark.parametrize(
    "family, name",
    [
        ("llava_next", "llava_next"),
        ("nvila", "nvila-lite"),
        ("nvila", "nvila-s2"),
        ("molmo", "molmo-d"),
    ],
)
def test_relevancy_of_tiles_and_of_merged_patches_is_that_of_whole_matrices(tmp_path, family, name):
    """r C R C' with the tiles' R as blocks of one matrix and C from the gradient of the vision
    tokens with respect to the tower's output."""
    vlm = common.load_model(
        {m.__name__.rsplit(".")[-1]: m for m in (llava_next, molmo, nvila)}[family].MODELS[name](
            tmp_path / "model"
        ),
        self_check=False,
    )
    # towers of these models mix little, so that a bright square shows: here mixing is what is
    # tested
    for block in vlm.parts.vision_blocks:
        for part in (
            block.self_attn.q_proj,
            block.self_attn.k_proj,
            block.self_attn.v_proj,
            block.self_attn.out_proj,
        ):
            part.weight.data *= 3
    run, targets = traced(vlm, noise_picture((150, 90))), [0, 2]
    found = attribution.relevancy(run, targets)
    averages, pooled, states = plain(run, targets)
    reached = torch.autograd.grad(pooled.sum(), states, retain_graph=True, allow_unused=True)
    top = max(index for index, part in enumerate(reached) if part is not None)
    rows = [
        torch.autograd.grad(token.sum(), states[top], retain_graph=True)[0]
        .flatten(0, 1)
        .norm(dim=-1)
        for token in pooled
    ]
    made = torch.stack([row > 1e-6 * row.max() for row in rows]).float()  # (P, tiles * S)
    tiles, ways = len(states[top]), made / made.sum(1, keepdim=True).clamp_min(1)
    back = (made / made.sum(0).clamp_min(1)).T
    assert (
        tiles > 1
        and (made.sum(1).max() > 1) == (name != "llava_next")
        and (made.sum(0).max() > 1) == (name == "nvila-s2")
    )
    for i, (average, target) in enumerate(zip(averages, targets, strict=True)):
        image, blocks = from_vision(run, average, target), through(average, "tower")
        assert (
            len(blocks) == tiles and ("tower", top) in average and ("tower", top + 1) not in average
        )
        tower, cells = torch.block_diag(*blocks), torch.from_numpy(found.cells[i])
        assert close(torch.from_numpy(found.image[i, -1]), image)
        assert close(cells[-1], image @ ways @ tower @ back)
        assert close(cells[0], torch.from_numpy(found.image[i, 0]) @ ways @ tower @ back)
        wrongs = {
            "no tower": image @ ways @ back,
            "another tile": image @ ways @ torch.block_diag(*blocks.flip(0)) @ back,
        }
        wrongs["another order"] = image @ ways.roll(1, 1) @ tower @ back
        for wrong, values in wrongs.items():
            assert apart(cells[-1], values), wrong


def test_chunks_single_targets_and_a_second_call_give_the_same(run):
    targets = list(range(len(run.ids)))
    whole = attribution.relevancy(run, targets, budget=2**40)
    single = attribution.relevancy(run, targets, budget=1)  # one target at a time
    assert attribution.chunk_size(run, 1) == 1 and attribution.chunk_size(run, 2**40) >= len(
        targets
    )
    again = attribution.relevancy(run, targets, budget=2**40)
    for name in ("rows", "last", "input"):
        assert np.allclose(
            getattr(whole, name),
            getattr(single, name),
            rtol=1e-4,
            atol=1e-6 * np.abs(getattr(whole, name)).max(),
        )
        assert np.array_equal(
            getattr(whole, name), getattr(again, name)
        )  # no gradient is left over from the first call
    some = attribution.relevancy(run, targets[:2], layers=[1])
    assert np.allclose(some.rows[:, 0], whole.rows[:2, 1], rtol=1e-4, atol=1e-6 * whole.rows.max())


def test_frozen_and_unfrozen_parameters_give_the_same_and_nothing_is_left(run):
    vlm = run.vlm
    before = attribution.relevancy(run, [1]).rows
    vlm.model.requires_grad_(True)
    try:
        after = attribution.relevancy(trace(vlm, run.prompt, run.ids), [1]).rows
        assert all(p.grad is None for p in vlm.model.parameters())
    finally:
        vlm.model.requires_grad_(False)
    assert np.allclose(before, after, rtol=1e-4, atol=1e-6 * before.max())
    assert (
        vlm.parts.decoder.config._attn_implementation == "sdpa"
        and attention_gradient._calls.get() is None
    )
    assert not any(
        module._forward_hooks for module in vlm.parts.layers if "keep" in str(module._forward_hooks)
    )


def test_logits_and_rows_are_those_of_the_generation(run):
    assert run.logits.argmax(-1).tolist() == run.ids  # greedy
    vlm, whole = run.vlm, extended(run.prompt, run.ids)
    assert torch.equal(whole.input_ids, run.batch.input_ids) and run.rows.tolist() == [
        run.prompt.input_ids.shape[1] - 1 + t for t in range(len(run.ids))
    ]
    scores = generate(vlm, run.prompt, len(run.ids)).logprobs[0]
    own = run.logits.log_softmax(-1).gather(1, torch.tensor(run.ids)[:, None])[:, 0]
    assert torch.allclose(scores, own, atol=1e-4)


def test_baselines_have_their_definitions(run):
    targets = [0, 4]
    maps = []
    for block in run.layers:
        with torch.no_grad():
            maps.append(block.attention())
    raw = attribution.raw_attention(run, targets)
    assert raw.shape == (2, len(run.layers), run.length) and np.allclose(raw.sum(-1), 1, atol=1e-5)
    assert np.allclose(raw[1, 0], maps[0][run.rows[4]], atol=1e-7)
    whole = torch.eye(run.length)
    for attention in maps:
        whole = (0.5 * torch.eye(run.length) + 0.5 * attention) @ whole
    assert np.allclose(attribution.rollout(run, targets), whole[run.rows[targets]], atol=1e-6)
    found = attribution.relevancy(run, targets)
    assert np.allclose(
        found.input,
        attribution.input_gradient(run, targets),
        rtol=1e-4,
        atol=1e-6 * np.abs(found.input).max(),
    )
    top = maps_of(run, targets)[len(run.layers) - 1]
    assert np.allclose(found.last, top[[0, 1], run.rows[targets]][:, run.vision], atol=1e-7)
    one, other = (attribution.noise(run, targets, seed) for seed in (0, 1))
    assert (
        one.shape == (2, len(run.vision))
        and not np.array_equal(one, other)
        and np.array_equal(one, attribution.noise(run, targets, 0))
    )
    assert set(attribution.METHODS) >= {
        "relevancy",
        "raw_attention",
        "rollout",
        "gradient_attention",
        "input_gradient",
        "integrated_gradients",
        "random",
    }


def test_integrated_gradients_are_complete(run):
    """Their sum is the change of the logit between the picture's mean and the picture."""
    features = run.features.detach()
    blank = trace(
        run.vlm,
        run.prompt,
        run.ids,
        tower=False,
        features=features.mean(0, keepdim=True).expand_as(features),
    )
    change = (run.logits - blank.logits)[0, run.ids[0]].item()
    coarse, fine = (attribution.integrated_gradients(run, [0], steps).sum() for steps in (2, 16))
    assert (
        abs(fine - change) <= 0.15 * abs(change) + 1e-3
        and abs(fine - change) <= abs(coarse - change) + 1e-3
    )


def test_the_input_gradient_is_a_finite_difference(run):
    features, targets = run.features.detach(), [2]
    found = attribution.input_gradient(run, targets)[0]
    patch, step = int(np.abs(found).argmax()), 1e-3
    logits = []
    for sign in (1, -1):
        moved = features.clone()
        moved[patch] *= 1 + sign * step
        logits.append(
            trace(run.vlm, run.prompt, run.ids, tower=False, features=moved)
            .logits[2, run.ids[2]]
            .item()
        )
    assert (
        abs((logits[0] - logits[1]) / (2 * step) - found[patch]) <= 0.05 * abs(found[patch]) + 2e-3
    )


# --- rules without a model ------------------------------------------------------------------------


def test_rule_5_drops_negative_products_before_the_mean_over_heads():
    attention, gradient = torch.tensor([[[0.5]], [[0.5]]]), torch.tensor([[[2.0]], [[-1.0]]])
    assert rules.head_mean(attention, gradient).item() == 0.5  # 1 and 0, not 1 and -0.5


def test_normalised_rows_sum_to_two_or_one_and_are_never_nan():
    maps = [torch.rand(3, 4, 4).tril(-1) for _ in range(2)]
    found = rules.normalised(rules.self_attention(maps))
    rest = found - torch.eye(4)
    assert (
        torch.allclose(rest.sum(-1)[:, 1:], torch.ones(3, 3))
        and torch.equal(rest[:, 0], torch.zeros(3, 4))
        and not found.isnan().any()
    )


def test_q_former_rules():
    torch.manual_seed(0)
    queries, instruction, size = 3, 2, 5
    own = [torch.rand(queries + instruction, queries + instruction) for _ in range(3)]
    cross = [torch.rand(queries, size), None, torch.rand(queries, size)]
    patches = rules.self_attention([torch.rand(size, size)])
    qq, qi = rules.queries_to_patches(own, cross, patches)
    a, b = torch.eye(5), torch.zeros(5, size)  # by hand
    context = torch.eye(size) + (patches - torch.eye(size)) / (patches - torch.eye(size)).sum(
        1, keepdim=True
    )
    for map_s, map_c in zip(own, cross, strict=True):
        a, b = a + map_s @ a, b + map_s @ b
        if map_c is not None:
            rest = a - torch.eye(5)
            b = (
                b
                + (torch.eye(5) + rest / rest.sum(1, keepdim=True)).T
                @ torch.cat([map_c, torch.zeros(instruction, size)])
                @ context
            )
    assert torch.allclose(qq, a) and torch.allclose(qi, b)
    both = [
        torch.rand(queries, queries + size) for _ in range(3)
    ]  # one map over queries and patches: the old values throughout
    qq, qi = rules.queries_to_patches(
        [part[:, :queries] for part in both],
        [part[:, queries:] for part in both],
        patches,
        joint=True,
    )
    a, b = torch.eye(queries), torch.zeros(queries, size)
    for part in both:
        rest = a - torch.eye(queries)
        bar = torch.eye(queries) + (rest / rest.sum(1, keepdim=True)).nan_to_num()
        a, b = (
            a + part[:, :queries] @ a,
            b + part[:, :queries] @ b + bar.T @ part[:, queries:] @ context,
        )
    assert torch.allclose(qq, a) and torch.allclose(qi, b)
    assert not torch.allclose(
        qi,
        rules.queries_to_patches(
            [part[:, :queries] for part in both], [part[:, queries:] for part in both], patches
        )[1],
    )
    none = [torch.zeros(queries, size) if part is not None else None for part in cross]
    assert torch.equal(
        rules.queries_to_patches(own, none, patches)[1], torch.zeros(5, size)
    )  # no cross gradient, nothing from the picture
    still = [torch.zeros(5, 5)]
    assert torch.allclose(
        rules.queries_to_patches(still, cross[:1], patches)[1][:queries], cross[0] @ context
    )  # R_qq = I: the increment is Ā_c R̄_ii


def test_a_planted_dependency_is_ranked_first():
    """Two layers: the target reads token 4, token 4 has read token 1; the others are ignored."""
    maps = [torch.zeros(6, 6), torch.zeros(6, 6)]
    maps[0][4, 1], maps[1][5, 4] = 0.7, 0.5
    row = (rules.self_attention(maps) - torch.eye(6))[5]
    assert torch.allclose(row, torch.tensor([0, 0.35, 0, 0, 0.5, 0]))
    start = torch.nn.functional.one_hot(torch.tensor([5]), 6).float()
    rows = rules.carry(rules.carry(start, maps[1]), maps[0])[0]
    assert torch.allclose(rows - start[0], row)


def test_visual_share_and_ratio():
    image, text = torch.tensor([3.0, 1.0]), torch.tensor([1.0])
    assert (
        rules.share(image, text, "max").item() == 0.75
        and abs(rules.share(image, text, "sum").item() - 0.8) < 1e-6
    )
    assert rules.ratio_of(image, text, "mean").item() == 2 and torch.isnan(
        rules.share(image * 0, text[:0])
    )
    with pytest.raises(ValueError, match="max, sum or mean"):
        rules.share(image, text, "median")


def test_sinks_are_outliers_of_the_norm():
    norms = torch.cat([torch.linspace(9, 11, 50), torch.tensor([60.0, 25.0])])
    assert (
        rules.sinks(norms).nonzero()[:, 0].tolist() == [50, 51]
        and not rules.sinks(torch.ones(9)).any()
    )

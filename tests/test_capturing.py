"""Every captured quantity against a slow, obvious computation on eager attention maps; decoding
against transformers' generate()."""

import numpy as np
import pytest
import torch

from vlmdiag.groups import GROUPS, PAD
from vlmdiag.interp.lens_measures import AnswerStates
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import GroupMass, HiddenNorms, LastStates, Probe, RopeShift, VisionRows

NAMES = ["llava", "llava-gqa", "qwen"]
STEPS = 5


def features_of(vlm, batch):
    with torch.no_grad():
        return vlm.vision(batch)


def eager(vlm, batch, ids):
    """Attention maps (L, B, H, T + n, T + n) and hidden states of one plain pass over prompt and
    generated ids; before the final norm."""
    size, n = len(ids), len(ids[0])
    tokens = torch.cat([batch.input_ids, torch.tensor(ids)], 1)
    mask = torch.cat([batch.attention_mask, torch.ones(size, n, dtype=torch.long)], 1)
    more = batch.next_position[:, None] + torch.arange(n)
    positions = torch.cat(
        [
            batch.position_ids,
            more if batch.position_ids.ndim == 2 else more[None].expand(3, -1, -1),
        ],
        -1,
    )
    states = []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in vlm.parts.layers
    ]
    hooks.append(
        vlm.parts.layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    )
    vlm.parts.decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = vlm.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                mm_encoder_outputs={"image": features_of(vlm, batch)},
                output_attentions=True,
            )
    finally:
        vlm.parts.decoder.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    return torch.stack(out.attentions), states, out.logits


def captured(vlm, batch, probes, steps=STEPS, answers=None):
    with capture(vlm, probes):
        return generate(vlm, batch, steps, answers=answers)


def forced(vlm, batch, steps=STEPS):
    """The same ids for every row, so that one plain pass is the oracle."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(20, 600, (len(batch.samples), steps), generator=generator).tolist()


def slow_masses(maps, batch, step):
    """Group masses of the producing row of a step, by loops. (L, B, H, G)"""
    total = batch.groups.shape[1]
    row = maps[:, :, :, total - 1 + step]
    out = torch.zeros(*row.shape[:3], len(GROUPS))
    for b in range(row.shape[1]):
        for k in range(total + step):
            code = int(batch.groups[b, k]) if k < total else GROUPS.index("generated")
            if code != PAD:
                out[:, b, :, code] += row[:, b, :, k]
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_group_masses_of_every_step_are_those_of_the_eager_maps(load, batch_of, name, rows):
    vlm = load(name)
    batch = batch_of(vlm, rows)
    ids = forced(vlm, batch)
    probe = GroupMass(batch, STEPS)
    captured(vlm, batch, [probe], answers=ids)
    maps, _, _ = eager(vlm, batch, ids)
    assert len(probe.mass) == STEPS
    for step in range(STEPS):
        assert torch.allclose(probe.mass[step], slow_masses(maps, batch, step), atol=1e-5)
        assert torch.allclose(probe.mass[step].sum(-1), torch.ones(()), atol=1e-5)
    # mutants of the oracle must be told apart
    wrong = slow_masses(maps, batch, 1)
    assert not torch.allclose(probe.mass[0], wrong, atol=1e-3), "the step is not told apart"
    assert not torch.allclose(probe.mass[1].roll(1, 0), wrong, atol=1e-3), (
        "the layer is not told apart"
    )
    shifted = batch.groups.roll(1, 1)
    moved = type("Moved", (), {"groups": shifted})
    assert not torch.allclose(probe.mass[1], slow_masses(maps, moved, 1), atol=1e-3), (
        "a span shifted by one is not told apart"
    )


@pytest.mark.parametrize("name", NAMES)
def test_hidden_norms_are_those_of_the_residual_stream_before_the_final_norm(load, batch_of, name):
    vlm = load(name)
    batch = batch_of(vlm)
    probe, rms = HiddenNorms(), HiddenNorms("rms")
    captured(vlm, batch, [probe, rms])
    _, states, _ = eager(vlm, batch, forced(vlm, batch))
    total = batch.groups.shape[1]
    expected = torch.stack([state[:, :total].norm(dim=-1) for state in states], 1)
    real = batch.attention_mask.bool()[:, None].expand_as(expected)
    assert probe.norms.shape == (3, len(vlm.parts.layers) + 1, total)
    assert torch.allclose(probe.norms[real], expected[real], rtol=1e-5, atol=1e-5)
    assert torch.allclose(
        rms.norms[real] * states[0].shape[-1] ** 0.5, expected[real], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_vision_rows_are_the_mean_map_without_bos(load, batch_of, name):
    vlm = load(name)
    batch = batch_of(vlm)
    ids = forced(vlm, batch)
    probe = VisionRows(batch)
    captured(vlm, batch, [probe], answers=ids)
    maps, _, _ = eager(vlm, batch, ids)
    total = batch.groups.shape[1]
    for step in range(STEPS):
        row = maps[:, :, :, total - 1 + step].mean(2)
        bos = torch.nn.functional.pad(batch.groups == GROUPS.index("bos"), (0, STEPS))
        row = row.masked_fill(bos, 0)
        row = (row / row.sum(-1, keepdim=True)).mean(0)[:, :total] * (
            batch.groups == GROUPS.index("vision")
        )
        assert torch.allclose(probe.rows[step], row, atol=1e-5)


def moved_rope(vlm, batch, delta, restrict):
    """RoPE probe by brute force: queries and keys before rotation, turned by the model's own rotary
    module with the vision tokens moved by delta."""
    grabbed = {}

    def grab(layer, kind):
        return lambda m, a, out: grabbed.__setitem__((layer, kind), out)

    hooks = []
    for i, layer in enumerate(vlm.parts.layers):
        hooks += [
            layer.self_attn.q_proj.register_forward_hook(grab(i, "q")),
            layer.self_attn.k_proj.register_forward_hook(grab(i, "k")),
        ]
    with torch.no_grad():
        vlm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            mm_encoder_outputs={"image": features_of(vlm, batch)},
        )
    for hook in hooks:
        hook.remove()
    vision, real = batch.groups == GROUPS.index("vision"), batch.attention_mask.bool()
    config, decoder = vlm.parts.decoder.config, vlm.parts.decoder
    depth = config.hidden_size // config.num_attention_heads

    def turned(x, positions):
        cos, sin = decoder.rotary_emb(x, positions)
        x = x.unflatten(-1, (-1, depth)).transpose(1, 2)
        half = torch.cat([-x[..., depth // 2 :], x[..., : depth // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]

    out = []
    for layer in range(len(vlm.parts.layers)):
        rows = []
        for shift in (0.0, delta):
            positions = batch.position_ids.double() + shift * vision.double()
            q = turned(grabbed[layer, "q"], batch.position_ids.double())[:, :, -1]
            k = turned(grabbed[layer, "k"], positions)
            k = k.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
            scores = torch.einsum("bhd,bhkd->bhk", q, k) / depth**0.5
            allowed = real.clone()
            if restrict:
                allowed[:, -1] = False
            rows.append(scores.masked_fill(~allowed[:, None], float("-inf")))
        before, after = (r.softmax(-1) for r in rows)
        alpha = (before * vision[:, None]).sum(-1)
        change = (
            ((rows[1] - rows[0]).nan_to_num() * before * vision[:, None]).sum(-1) / alpha / delta
        )
        out.append((alpha, change, (after * vision[:, None]).sum(-1) - alpha))
    return [torch.stack(parts) for parts in zip(*out, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("restrict", [True, False])
def test_the_closed_form_of_the_rope_probe_is_the_models_own_rotation_at_shifted_positions(
    load, batch_of, name, restrict
):
    vlm = load(name)
    batch = batch_of(vlm)
    deltas = [1.0, -2.0, 0.01, 8.0]
    probe = RopeShift(batch, vlm.rotary, deltas, restrict)
    captured(vlm, batch, [probe], steps=1)
    for i, delta in enumerate(deltas):
        alpha, gv, change = moved_rope(vlm, batch, delta, restrict)
        assert torch.allclose(probe["alphaV"], alpha, atol=1e-5)
        assert torch.allclose(probe["delta_alphaV"][i], change, atol=1e-5)
        assert torch.allclose(probe["delta_gv"][i], gv, atol=2e-5 / min(1, abs(delta)), rtol=1e-4)
    assert torch.allclose(probe["share_prod_notV"], alpha * (1 - alpha), atol=1e-5)
    slope = (
        moved_rope(vlm, batch, 0.05, restrict)[1] + moved_rope(vlm, batch, -0.05, restrict)[1]
    ) / 2  # central difference
    assert torch.allclose(probe["delta_gv_derivative"], slope, atol=1e-3, rtol=1e-2)
    small = RopeShift(batch, vlm.rotary, [1e-3], restrict)
    captured(vlm, batch, [small], steps=1)
    first_order = probe["share_prod_notV"] * probe["delta_gv_derivative"] * 1e-3
    assert torch.allclose(small["delta_alphaV"][0], first_order, rtol=0.05, atol=3e-6), (
        "delta_alphaV -> alphaV (1 - alphaV) g delta"
    )


def test_a_shift_of_zero_moves_nothing(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm)
    probe = RopeShift(batch, vlm.rotary, [0.0])
    captured(vlm, batch, [probe], steps=1)
    assert probe["delta_gv"].abs().max() == 0 and probe["delta_alphaV"].abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decoding_is_transformers_generate(load, batch_of, name):
    vlm = load(name)
    batch = batch_of(vlm)
    own = generate(vlm, batch, 12)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": 1,
    } | batch.image_inputs
    if name == "qwen":
        inputs["mm_token_type_ids"] = (batch.input_ids == vlm.image_token_id).int()
    theirs = vlm.model.generate(**inputs)[:, batch.input_ids.shape[1] :].tolist()
    for ids, reference in zip(own.ids, theirs, strict=True):
        assert ids == reference[: len(ids)]
        assert len(ids) == 12 or ids[-1] in vlm.eos_ids


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_measures_what_single_prompts_do(load, batch_of, name):
    vlm = load(name)
    together, ids = batch_of(vlm), None
    ids = forced(vlm, together)
    both = GroupMass(together, STEPS)
    captured(vlm, together, [both], answers=ids)
    for i in range(3):
        single = batch_of(vlm, (i,))
        alone = GroupMass(single, STEPS)
        captured(vlm, single, [alone], answers=[ids[i]])
        for step in range(STEPS):
            assert torch.allclose(alone.mass[step][:, 0], both.mass[step][:, i], atol=1e-5)


def test_a_capture_leaves_no_trace(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm)

    class Failing(Probe):
        def attention(self, layer, row):
            raise ZeroDivisionError

    def state():
        modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]
        return (
            modules,
            vlm.parts.decoder.config._attn_implementation,
            [p.requires_grad for p in vlm.model.parameters()],
        )

    before = state()
    with pytest.raises(ZeroDivisionError):
        captured(vlm, batch, [Failing(), HiddenNorms()])
    assert state() == before
    captured(vlm, batch, [HiddenNorms()], steps=1)
    assert state() == before


def test_sampling_depends_on_seed_item_and_step_only(load, batch_of):
    vlm = load("llava")
    together = generate(vlm, batch_of(vlm), 6, do_sample=True, temperature=5.0, seed=3).ids
    alone = [
        generate(vlm, batch_of(vlm, (i,)), 6, do_sample=True, temperature=5.0, seed=3).ids[0]
        for i in range(3)
    ]
    assert together == alone
    assert generate(vlm, batch_of(vlm), 6, do_sample=True, temperature=5.0, seed=4).ids != together


def test_logprobs_of_a_given_answer_are_those_of_a_plain_pass(load, batch_of):
    vlm = load("qwen")
    batch = batch_of(vlm)
    ids = forced(vlm, batch)
    found = captured(vlm, batch, [], answers=ids)
    _, _, logits = eager(vlm, batch, ids)
    total = batch.groups.shape[1]
    expected = (
        logits[:, total - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(ids)[..., None])[..., 0]
    )
    assert torch.allclose(found.logprobs, expected, atol=1e-4)
    assert found.ids == ids and np.all(found.steps.numpy() == STEPS)


def test_a_probe_of_few_positions_does_not_hold_the_whole_prompt():
    last, answer = LastStates([0]), AnswerStates()
    for probe in (last, answer):
        probe.begin()
        probe.hidden(1, torch.randn(2, 100, 8))
    for kept, positions in ((last._after_layer[0], 1), (answer.states[1][0], 0)):
        assert kept.untyped_storage().nbytes() == 2 * positions * 8 * kept.element_size()

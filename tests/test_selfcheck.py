"""The self-check passes on sound models and names what is wrong with unsound ones; edits prove
themselves on the kernel's own output."""

import contextlib
from dataclasses import replace

import pytest
import torch

import common
from tests.random_models import internvl, llava, paligemma
from vlmdiag.cli import UsageError
from vlmdiag.families import Rotary
from vlmdiag.families import generic as generic_family
from vlmdiag.groups import GROUPS
from vlmdiag.model import attention, decoding, encoding, loading, rotary, selfcheck, vision
from vlmdiag.model.attention import Block, Row, capture, edit, scores
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import GroupMass
from vlmdiag.model.selfcheck import check, noise_picture
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.samples import AT_HAND, Sample

NAMES = ["llava", "llava-gqa", "qwen"]


@pytest.mark.parametrize("name", NAMES)
def test_sound_models_pass(load, name):
    assert check(load(name)) is None


@pytest.mark.parametrize("name", NAMES)
def test_checks_hold_rows_and_never_whole_maps_or_keys(load, name, monkeypatch):
    vlm, held, eager = load(name), [], selfcheck._eager

    @contextlib.contextmanager
    def noting(vlm):
        with eager(vlm) as rows:
            yield rows
        held.extend(rows.values())

    class Keys(rotary._Keys):
        def attention(self, layer, row):
            super().attention(layer, row)
            held.append(self.keys[layer])

    monkeypatch.setattr(selfcheck, "_eager", noting)
    monkeypatch.setattr(rotary, "_Keys", Keys)
    monkeypatch.setattr(rotary, "KEYS", 5)
    assert check(replace(vlm)) is None
    layers = len(vlm.parts.layers)
    assert len(held) == layers + 2 * layers
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert {keys.shape[2] for keys in held if keys.ndim == 4} == {5}


def broken(vlm, **changes):
    return replace(vlm, family=replace(vlm.family, **changes))


def test_missing_decoder_layers_are_found(load):
    vlm = load("llava")
    fewer = broken(vlm, parts=lambda model: replace(vlm.parts, layers=vlm.parts.layers[1:]))
    with pytest.raises(UsageError, match="layers of that class"):
        check(fewer)


def test_layers_in_the_wrong_order_are_found(load):
    vlm = load("llava")
    with pytest.raises(UsageError, match="decoder layers found"):
        check(broken(vlm, parts=lambda model: replace(vlm.parts, layers=vlm.parts.layers[::-1])))


def test_positions_that_ignore_padding_are_found(load):
    def wrong(vlm, input_ids, mask, inputs):
        ids = torch.arange(input_ids.shape[1]) * (
            1 + (mask == 0).any(-1, keepdim=True).long()
        )  # padded rows stretched
        return ids, ids[:, -1] + 1

    vlm = load("qwen")
    with pytest.raises(UsageError, match="left-padded batch"):
        check(broken(vlm, positions=wrong))


def test_positions_of_one_dimension_are_found_by_the_models_own_forward(load):
    """What Qwen-VL falls back to by itself where it is not told of the picture."""

    def flat(vlm, input_ids, mask, inputs):
        ids = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        return ids, ids[0, :, -1] + 1

    with pytest.raises(UsageError, match="own forward"):
        check(broken(load("qwen"), positions=flat))


def test_other_features_than_the_models_own_are_found(load, monkeypatch):
    def louder(vlm, batch):
        features = vision.image_features(vlm, batch)
        features.pooler_output = [1.2 * tokens for tokens in features.pooler_output]
        return features

    vlm = load("llava")
    monkeypatch.setattr(type(vlm), "vision", louder)
    with pytest.raises(UsageError, match="own forward"):
        check(vlm)


def test_token_types_that_are_left_out_are_found(tmp_path):
    vlm = common.load_model(paligemma.MODELS["paligemma"](tmp_path), self_check=False)
    with pytest.raises(UsageError, match="left-padded batch|own forward"):
        check(broken(vlm, inputs=lambda _, batch: {"token_type_ids": batch.groups * 0 + 1}))


def test_a_prompt_without_its_bos_is_found(load, monkeypatch):
    tokenize = encoding._tokenize_with_pictures

    def without_bos(vlm, image, text):
        tokens = tokenize(vlm, image, text)
        of_tokens = {name: row[1:] for name, row in tokens.token_inputs.items()}
        return encoding._Tokens(tokens.ids[1:], tokens.offsets[1:], tokens.image_inputs, of_tokens)

    monkeypatch.setattr(encoding, "_tokenize_with_pictures", without_bos)
    with pytest.raises(UsageError, match="own ids of the prompt differ from ours at token 0"):
        check(load("llava"))


def test_tokens_that_see_those_behind_them_in_a_pass_are_found(load, monkeypatch):
    """As where a model's mask is causal in the prompt alone: token by token nothing shows."""
    vlm = load("llava")

    def see_all(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs["past_key_values"].get_seq_length() and mask.shape[2] > 1:
            kwargs["attention_mask"] = mask[:, :, -1:].expand_as(mask)
        return args, kwargs

    hooks = [
        layer.self_attn.register_forward_pre_hook(see_all, with_kwargs=True)
        for layer in vlm.parts.layers
    ]
    try:
        with pytest.raises(UsageError, match="read in one pass behind a cache"):
            check(vlm)
    finally:
        for hook in hooks:
            hook.remove()
    assert check(vlm) is None


def test_penalties_of_a_checkpoint_are_no_fault(load, monkeypatch):
    """They are left out of what is measured, so of what it is compared with too."""
    vlm = load("llava")
    settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    for name, value in (settings | {"suppress_tokens": list(range(900))}).items():
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    assert check(vlm) is None
    assert vlm.model.generation_config.num_beams == 3


def test_settings_of_decoding_that_are_left_out_are_named(load, monkeypatch):
    vlm = load("llava")
    assert loading.left_out_of_decoding(vlm) is None
    config = vlm.model.generation_config
    for name, value in (("repetition_penalty", 1.05), ("bad_words_ids", [[3]]), ("min_length", 0)):
        monkeypatch.setattr(config, name, value)
    assert "sets repetition_penalty, bad_words_ids, which" in loading.left_out_of_decoding(vlm)


def test_another_greedy_answer_than_transformers_is_found(load, monkeypatch):
    def second_best(logits, step):
        return logits.topk(2).indices[:, min(step, 1)]

    monkeypatch.setattr(decoding, "_greedy", second_best)
    with pytest.raises(UsageError, match="token 1 of a greedy answer"):
        check(load("llava"))


def test_positions_that_turn_otherwise_are_found(load):
    for name in NAMES:
        vlm = load(name)
        slower = broken(vlm, rotary=lambda own, vlm=vlm: [Rotary(vlm.rotary[0].inv_freq * 0.9)])
        with pytest.raises(UsageError, match="rotary"):
            check(slower)


def test_a_transposed_grid_is_found(load):
    vlm = load("qwen")

    def wrong(vlm_, size, inputs):
        grid = vlm.family.grid(vlm, size, inputs)
        return PatchGrid(
            grid.boxes.reshape(*grid.shape, 4).transpose(1, 0, 2).reshape(-1, 4), None, grid.size
        )

    with pytest.raises(UsageError, match="the pixels of a cell"):
        check(broken(vlm, grid=wrong))


def test_attention_that_bypasses_the_interface_is_found(load, monkeypatch):
    vlm = load("llava")
    attention = vlm.parts.layers[2].self_attn
    own = type(attention).forward

    def eager_only(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        return hidden_states * 0, None

    monkeypatch.setattr(attention, "forward", eager_only.__get__(attention), raising=False)
    with pytest.raises(UsageError, match="AttentionInterface"):
        check(vlm)
    assert own is type(attention).forward


def test_a_wrong_weight_is_found_by_attention_times_v(load, monkeypatch):

    vlm = load("llava-gqa")
    monkeypatch.setattr(
        Row, "dot", lambda self, query: Row.__dict__["_true_dot"](self, query) * 1.5, raising=True
    )
    Row._true_dot = DOT
    with pytest.raises(UsageError, match="times V"):
        check(vlm)


DOT = Row.dot


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("build", "name", "mutant"),
    [
        (internvl.MODELS["internvl-gpt-oss"], "sinks_of", lambda options: None),
        (
            llava.MODELS["llava-gemma2"],
            "scores",
            lambda products, mask, *more: scores(products, mask),
        ),
    ],
    ids=["sinks", "softcap"],
)
def test_an_option_of_attention_that_is_passed_over_is_found_in_every_dtype(
    tmp_path, monkeypatch, build, name, mutant, dtype
):
    vlm = common.load_model(build(tmp_path / "model"), dtype=dtype, self_check=False)
    sample, picture = Sample("0", AT_HAND, "What is it?"), noise_picture()
    selfcheck._check_kernel(vlm, sample, picture)
    monkeypatch.setattr(attention, name, mutant)
    with pytest.raises(UsageError, match="differs from what the model's own function makes"):
        selfcheck._check_kernel(vlm, sample, picture)


@pytest.mark.parametrize("name", NAMES)
def test_generic_reads_the_same_numbers_as_the_family_file(load, batch_of, name):
    vlm = load(name)
    generic = replace(vlm.family, parts=generic_family.parts, rotary=generic_family.rotary)
    other = replace(vlm, family=generic)
    batch = batch_of(vlm)
    a, b = GroupMass(batch), GroupMass(batch)
    with capture(vlm, [a]):
        generate(vlm, batch, 1)
    with capture(other, [b]):
        generate(other, batch, 1)
    assert torch.equal(a.mass[0], b.mass[0])


# ---- edits ----


def logits_under(vlm, batch, **options):
    with torch.inference_mode(), edit(vlm, **options):
        return prefill(vlm, batch).logits[:, -1]


@pytest.mark.parametrize("name", NAMES)
def test_a_blocked_key_is_out_of_the_kernels_own_output(load, batch_of, name):
    vlm = load(name)
    batch = batch_of(vlm)
    size, total = batch.groups.shape
    keys = batch.groups == GROUPS.index("vision")
    queries = torch.zeros(size, total, dtype=torch.bool)
    queries[:, -1] = True
    layer = 2
    block = Block(queries, keys, frozenset([layer]))
    outputs, masses = [], []
    for scale in (0.0, 50.0):  # whatever V of the blocked keys is, the output row stays

        def poison(module, args, out, scale=scale):
            return out + scale * keys[..., None]

        hook = vlm.parts.layers[layer].self_attn.v_proj.register_forward_hook(poison)
        rows, probe = {}, GroupMass(batch)

        def keep(at, row, value, output, rows=rows):
            rows[at] = output.clone()

        try:
            with torch.inference_mode(), capture(vlm, [probe], [block], inspect=keep):
                prefill(vlm, batch)
        finally:
            hook.remove()
        outputs.append(rows[layer])
        masses.append(probe.mass[0][layer])
    assert torch.equal(outputs[0][:, -1], outputs[1][:, -1])
    assert not torch.equal(outputs[0][:, -2], outputs[1][:, -2]), "an open row does see the change"
    assert masses[0][..., GROUPS.index("vision")].abs().max() == 0
    assert torch.allclose(masses[0].sum(-1), torch.ones(()), atol=1e-5)


def test_rows_before_the_first_blocked_query_are_bit_identical(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm, (0,))
    total = batch.groups.shape[1]
    queries = torch.zeros(1, total, dtype=torch.bool)
    queries[:, -5:] = True
    states = []
    for blocks in ([], [Block(queries, batch.groups == GROUPS.index("vision"))]):
        kept = []
        hook = vlm.parts.layers[-1].register_forward_hook(
            lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.inference_mode(), edit(vlm, blocks=blocks):
            prefill(vlm, batch)
        hook.remove()
        states.append(kept[0])
    assert torch.equal(states[0][:, : total - 5], states[1][:, : total - 5])
    assert not torch.allclose(states[0][:, -5:], states[1][:, -5:])


def test_blocking_a_generated_step(load, batch_of):
    vlm = load("qwen")
    batch = batch_of(vlm, (0,))
    total = batch.groups.shape[1]
    queries = torch.zeros(1, total + 3, dtype=torch.bool)
    queries[:, total + 1] = True
    probe = GroupMass(batch, 4)
    with edit(vlm, blocks=[Block(queries, batch.groups == GROUPS.index("vision"))], probes=[probe]):
        generate(vlm, batch, 4, answers=[[20, 21, 22, 23]])
    vision = [mass[..., GROUPS.index("vision")].max().item() for mass in probe.mass]
    assert vision[2] == 0 and min(vision[0], vision[1], vision[3]) > 0


def test_replaced_embeddings_are_what_the_decoder_reads(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm, (0, 1))
    places = batch.vision_positions(0)[:7]
    values = torch.randn(7, vlm.model.config.text_config.hidden_size)
    plain = logits_under(vlm, batch)
    changed = logits_under(vlm, batch, embeddings=[(0, places, values)])
    with torch.inference_mode():
        features = vlm.vision(batch)
        features.pooler_output[0] = features.pooler_output[0].clone()
        features.pooler_output[0][:7] = values
        expected = prefill(vlm, batch, features).logits[:, -1]
    assert torch.equal(changed, expected)
    assert torch.equal(changed[1], plain[1]) and not torch.allclose(changed[0], plain[0])


def test_a_block_that_leaves_a_row_without_keys_is_refused(load, batch_of):
    vlm = load("llava")
    batch = batch_of(vlm, (0,))
    everything = torch.ones_like(batch.groups, dtype=torch.bool)
    with pytest.raises(UsageError, match="without any key"):
        logits_under(vlm, batch, blocks=[Block(everything, everything)])


def test_turning_and_its_rate_agree():
    rotary, x = Rotary(torch.tensor([1.0, 0.3])), torch.randn(2, 6)
    assert torch.allclose(
        (rotary.turn(x, 1e-3) - rotary.turn(x, -1e-3)) / 2e-3, rotary.rate(x), atol=1e-3
    )
    assert torch.allclose(rotary.turn(rotary.turn(x, 2.0), -2.0), x, atol=1e-6)


def test_an_unknown_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        common.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing-like-it"}')
    with pytest.raises(UsageError, match="known types: .*llava"):
        common.load_model(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        common.load_model(tmp_path / "nowhere")

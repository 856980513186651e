"""BLIP-2 and InstructBLIP on small random models: what every family must do, against transformers'
own classes, and what leads back to the picture."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
)

import common
from data import make_shapes
from tests.conftest import QUESTIONS, ROOT, embeddings, in_process, without_picture_at_the_edges
from tests.test_capturing import slow_masses
from tests.test_encode import questions
from vlmdiag.cli import UsageError
from vlmdiag.families import known_types
from vlmdiag.groups import GROUPS, PAD
from vlmdiag.model import configs
from vlmdiag.model.attention import Block, capture, edit
from vlmdiag.model.decoding import generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import GroupMass, HiddenNorms, RopeShift
from vlmdiag.model.selfcheck import check
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample

NAMES = ["blip2-opt", "blip2-t5", "instructblip-llama", "instructblip-t5"]
DECODERS = ["blip2-opt", "instructblip-llama"]
STEPS = 4
tool = {
    name: in_process(ROOT / path)
    for name, path in {
        "norms": "diagnostic_tools/vlm_token_norms.py",
        "coco": "diagnostic_tools/run_coco_diagnostics.py",
        "lens": "scripts/logit_lens/create_logit_lens.py",
        "knockout": "scripts/attention_experiment_curate.py",
        "swap": "swap_analysis/swap_analysis.py",
        "tokens": "diagnostic_tools/check_model.py",
    }.items()
}


@pytest.fixture(scope="session")
def blip(blip_folders):
    """get(name) -> VLM, loaded with its self-check, once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = common.load_model(blip_folders(name))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def originals(blip_folders):
    """get(name) -> transformers' own model and processor of the same folder."""
    loaded = {}

    def get(name):
        if name not in loaded:
            kind = (
                InstructBlipForConditionalGeneration
                if name.startswith("instruct")
                else Blip2ForConditionalGeneration
            )
            loaded[name] = (
                kind.from_pretrained(blip_folders(name)).eval(),
                AutoProcessor.from_pretrained(blip_folders(name), backend="pil"),
            )
        return loaded[name]

    return get


def one(vlm, question, size=(60, 50)):
    return vlm.encode([Sample("0", None, question)], [Image.new("RGB", size, (90, 120, 60))])


def text_of(vlm, batch, group):
    return vlm.tokenizer.decode(
        batch.input_ids[0][batch.groups[0] == GROUPS.index(group)], skip_special_tokens=False
    )


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_family_has_what_its_text_model_has(blip, name):
    vlm = blip(name)
    text = name.split("-")[1]
    expected = {
        "opt": {"decoder-only", "causal"},
        "llama": {"decoder-only", "rotary"},
        "t5": set(),
    }[text]
    assert vlm.family.name == name
    assert vlm.family.has == expected
    assert {"blip-2", "instructblip"} <= set(known_types())
    for lacking in {"decoder-only", "rotary", "grid"} - expected:
        with pytest.raises(UsageError, match=f"needs {lacking}, which the family {name} lacks"):
            vlm.need(lacking)
    if "rotary" not in expected:
        with pytest.raises(UsageError, match="no rotary positions"):
            vlm.rotary  # noqa: B018
    if "decoder-only" not in expected:
        with pytest.raises(UsageError, match="needs decoder-only"), capture(vlm):
            raise AssertionError("not reached")


def test_an_instruct_blip_shares_no_keys_between_questions(blip):
    assert "causal" not in blip("instructblip-llama").family.has


def test_unsound_checkpoints_are_refused_in_one_line(blip_folders, tmp_path):
    folder = shutil.copytree(blip_folders("blip2-opt"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": None}))
    with pytest.raises(
        UsageError, match="disagree on num_query_tokens .6, 6. or image_token_index .None"
    ):
        common.load_model(folder)
    other = config | {
        "text_config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2}
    }
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="'gpt2' is none of opt, llama, t5"):
        common.load_model(folder)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_positions_that_ignore_padding_are_found_by_the_self_check(blip, name):
    vlm = blip(name)

    def wrong(vlm_, input_ids, mask, inputs):
        mask.fill_(1)
        return torch.arange(input_ids.shape[1]).expand(len(input_ids), -1), torch.full(
            (len(input_ids),), input_ids.shape[1]
        )

    assert check(vlm) is None
    with pytest.raises(UsageError, match="left-padded batch.*family file of your own"):
        check(replace(vlm, family=replace(vlm.family, positions=wrong)))


# --- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_model_reads_what_its_own_processor_makes(blip, originals, pictures, name):
    vlm = blip(name)
    _, processor = originals(name)
    for question, picture in zip(QUESTIONS, pictures, strict=True):
        batch = vlm.encode([Sample("0", None, question)], [picture])
        text = question if name.startswith("instruct") else f"Question: {question} Answer:"
        encoded = processor(images=picture, text=text, return_tensors="pt")
        assert batch.prompts == [text] and torch.equal(batch.input_ids, encoded["input_ids"])
        for key, value in batch.image_inputs.items():
            assert torch.equal(value, encoded[key]), key
        assert set(batch.image_inputs) == set(encoded) - {"input_ids", "attention_mask"}
        assert batch.grids == [None]


def test_the_groups_of_a_known_prompt(blip):
    vlm = blip("blip2-opt")
    batch = one(vlm, "Is there a red circle?")
    vision = vlm.parts.qformer.queries
    bos = batch.spans(0)["bos"]
    assert batch.spans(0)["vision"] == [[0, vision]] and bos == [[vision, vision + 1]], (
        "the picture stands before the BOS"
    )
    assert text_of(vlm, batch, "user").strip() == "Is there a red circle?"
    assert text_of(vlm, batch, "template").split() == ["Question:", "Answer:"]
    vlm = blip("blip2-t5")
    batch = one(vlm, "Describe the image.")
    assert "bos" not in batch.spans(0) and text_of(vlm, batch, "template").endswith("Answer:</s>")
    assert text_of(vlm, batch, "user").strip() == "Describe the image."
    vlm = blip("instructblip-llama")
    assert one(vlm, "Why?").spans(0) == {
        "vision": [[0, vision]],
        "bos": [[vision, vision + 1]],
        "user": [[vision + 1, one(vlm, "Why?").lengths[0]]],
    }


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(question=questions, more=st.sampled_from(["", " [SEP]", "</s>", "<extra_id_3>", "<image>"]))
def test_the_question_and_nothing_else_is_the_user_group(blip, name, question, more):
    vlm = blip(name)
    question = question + more
    plain = one(vlm, "Hi?")
    batch = one(vlm, question)
    for group in ("bos", "vision", "template"):
        assert torch.equal(
            batch.input_ids[0][batch.groups[0] == GROUPS.index(group)],
            plain.input_ids[0][plain.groups[0] == GROUPS.index(group)],
        ), group
    user = set(batch.input_ids[0][batch.groups[0] == GROUPS.index("user")].tolist())
    # T5's small vocabulary has no "<"
    unknown = {vlm.tokenizer.unk_token_id} if name.endswith("t5") else set()
    assert user and not (user - unknown) & set(vlm.tokenizer.all_special_ids)
    if not name.endswith("t5"):
        asked = without_picture_at_the_edges(question)
        assert "".join(text_of(vlm, batch, "user").split()) == "".join(asked.split())
    assert (batch.groups != PAD).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_ones_own_has_the_picture_first_too(blip_folders, name):
    vlm = common.load_model(
        blip_folders(name),
        prompt_template="{system}{image}Tell me: {question}",
        system_prompt="Be brief. ",
        self_check=False,
    )
    batch = one(vlm, "Is it red?")
    assert batch.prompts == ["Be brief. Tell me: Is it red?"]
    assert batch.spans(0)["vision"] == [[0, 6]]
    assert {"system", "template", "user"} <= set(batch.spans(0))
    if not name.endswith("t5"):
        assert text_of(vlm, batch, "system").strip() == "Be brief."
        assert text_of(vlm, batch, "user").strip() == "Is it red?"
    named = common.load_model(blip_folders(name), system_prompt="Be brief.", self_check=False)
    assert one(named, "Is it red?").prompts[0].startswith("Be brief. ")
    assert "system" in one(named, "Is it red?").spans(0)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_on_the_left_and_a_batch_computes_what_single_prompts_do(blip, batch_of, name):
    vlm = blip(name)
    batch = batch_of(vlm)
    assert len(set(batch.lengths)) == 3
    with torch.no_grad():
        together = prefill(vlm, batch).logits[:, -1]
        features = vlm.vision(batch).pooler_output
    for row, length in enumerate(batch.lengths):
        pad = batch.groups.shape[1] - length
        alone = batch_of(vlm, (row,))
        assert batch.attention_mask[row].tolist() == [0] * pad + [1] * length
        assert (batch.groups[row, :pad] == PAD).all()
        assert torch.equal(alone.input_ids[0], batch.input_ids[row, pad:])
        assert torch.equal(alone.position_ids[0], batch.position_ids[row, pad:])
        with torch.no_grad():
            # T5's scaled weights magnify rounding
            assert torch.allclose(
                prefill(vlm, alone).logits[0, -1], together[row], atol=3e-4, rtol=1e-4
            )
            assert torch.allclose(vlm.vision(alone).pooler_output[0], features[row], atol=1e-5)
    if not name.endswith("t5"):
        cut = replace(batch, attention_mask=torch.ones_like(batch.attention_mask))
        with torch.no_grad():
            assert not torch.allclose(prefill(vlm, cut).logits[1, -1], together[1], atol=1e-2), (
                "padding that is read is told apart"
            )


# --- the forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_own_class_which_derives_positions_itself(
    blip, originals, batch_of, name
):
    vlm = blip(name)
    model, _ = originals(name)
    batch = batch_of(vlm)
    more = {"decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)} if name.endswith("t5") else {}
    with torch.no_grad():
        theirs = model(
            **batch.image_inputs,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **more,
        ).logits[:, -1]
        ours = prefill(vlm, batch).logits[:, -1]
        direct = prefill(vlm, batch, embeds=embeddings(vlm, batch)).logits[:, -1]
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    assert torch.allclose(direct, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decoding_is_transformers_generate_of_the_single_prompt(
    blip, originals, batch_of, name
):
    vlm = blip(name)
    model, _ = originals(name)
    ours = generate(vlm, batch_of(vlm), 12)
    for row, ids in enumerate(ours.ids):
        alone = batch_of(vlm, (row,))
        inputs = alone.image_inputs | {
            "input_ids": alone.input_ids,
            "attention_mask": alone.attention_mask,
        }
        theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
        if name.endswith("t5"):
            theirs = theirs[1:]  # the decoder's start
        elif len(theirs) > 12:
            theirs = theirs[alone.input_ids.shape[1] :]  # the prompt
        assert ids == theirs[: len(ids)] and (len(ids) == 12 or ids[-1] in vlm.eos_ids)
    assert max(len(set(ids)) for ids in ours.ids) > 3, "one token over and over shows little"


def test_answers_end_where_the_language_model_ends_them(blip):
    assert blip("blip2-opt").answer_ends == {
        3: ["the generation config"],
        2: ["the tokenizer's EOS"],
    }, "a line break, and OPT's own </s>"
    assert (
        blip("instructblip-llama").eos_ids
        == {blip("instructblip-llama").tokenizer.eos_token_id}
        == {2}
    ), "the config of Vicuna names another id"
    assert blip("blip2-t5").eos_ids == blip("instructblip-t5").eos_ids == {1}


def test_forced_answers_have_the_log_probabilities_of_one_plain_pass(blip, originals, batch_of):
    for name in ("blip2-opt", "blip2-t5"):
        vlm = blip(name)
        model, _ = originals(name)
        batch = batch_of(vlm, (0, 1))
        answer = [20, 31, 22, 45]
        logprobs = generate(vlm, batch, STEPS, answers=[answer] * 2).logprobs
        for row in range(2):
            alone = batch_of(vlm, (row,))
            if name == "blip2-t5":
                more = {
                    "input_ids": alone.input_ids,
                    "decoder_input_ids": torch.tensor([[0, *answer[:-1]]]),
                }
            else:
                more = {"input_ids": torch.cat([alone.input_ids, torch.tensor([answer[:-1]])], 1)}
            with torch.no_grad():
                logits = model(**alone.image_inputs, **more).logits[0, -STEPS:].log_softmax(-1)
            assert torch.allclose(
                logprobs[row], logits.gather(-1, torch.tensor(answer)[:, None])[:, 0], atol=1e-4
            )


def test_a_prompt_longer_than_opts_positions_is_an_error_that_says_so(blip):
    vlm = blip("blip2-opt")
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, the model reads 2048"):
        one(vlm, "a " * 2100)


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_runs_once_per_picture_and_its_edited_features_are_what_is_read(
    blip, pictures, name
):
    vlm = blip(name)
    batch = vlm.encode(
        [Sample(str(i), None, QUESTIONS[0]) for i in range(3)],
        [pictures[0], pictures[1], pictures[0]],
    )
    seen = []
    hook = vlm.parts.tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    with torch.no_grad():
        features = vlm.vision(batch)
        plain = generate(vlm, batch, 3, features=features).first
        features.pooler_output = [tokens * 0.5 for tokens in features.pooler_output]
        half = generate(vlm, batch, 3, features=features).first
    hook.remove()
    assert seen == [2]
    assert [tokens.shape[0] for tokens in features.pooler_output] == [vlm.parts.qformer.queries] * 3
    assert torch.allclose(plain[0], plain[2], atol=1e-5)
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)
    assert not torch.allclose(plain, half, atol=1e-3)


# --- measuring ------------------------------------------------------------------------------------


def eager(vlm, batch, ids):
    """Attention maps (L, B, H, T + n, T + n), the residual stream before every layer and after the
    last, logits: one plain pass of the language model."""
    size = len(ids)
    n = len(ids[0])
    mask = torch.cat([batch.attention_mask, torch.ones(size, n, dtype=torch.long)], 1)
    positions = torch.cat([batch.position_ids, batch.next_position[:, None] + torch.arange(n)], 1)
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
            embeds = torch.cat(
                [embeddings(vlm, batch), vlm.model.get_input_embeddings()(torch.tensor(ids))], 1
            )
            out = vlm.model.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                output_attentions=True,
            )
    finally:
        vlm.parts.decoder.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    return torch.stack(out.attentions), states, out.logits


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_what_is_captured_is_the_eager_map_at_prefill_and_every_cached_step(
    blip, batch_of, name, rows
):
    vlm = blip(name)
    batch = batch_of(vlm, rows)
    ids = torch.randint(
        20, 340, (len(rows), STEPS), generator=torch.Generator().manual_seed(1)
    ).tolist()
    mass = GroupMass(batch, STEPS)
    norms = HiddenNorms()
    with capture(vlm, [mass, norms]):
        generation = generate(vlm, batch, STEPS, answers=ids)
    maps, states, logits = eager(vlm, batch, ids)
    total = batch.groups.shape[1]
    spread = maps[:, 0, :, total - 1, :total]
    entropy = (
        -(spread * spread.clamp_min(1e-20).log()).sum(-1) / torch.tensor(batch.lengths[0]).log()
    )
    assert entropy.median() < 0.75, "nearly uniform attention hides errors"
    for step in range(STEPS):
        wanted = slow_masses(maps, batch, step)
        assert torch.allclose(mass.mass[step], wanted, atol=1e-5)
        assert torch.allclose(wanted.sum(-1), torch.ones(()), atol=1e-5)
    wrong = slow_masses(maps, batch, 1)  # mutants: step, layer, spans shifted by one
    assert not torch.allclose(mass.mass[0], wrong, atol=1e-3)
    assert not torch.allclose(mass.mass[1].roll(1, 0), wrong, atol=1e-3)
    assert not torch.allclose(
        mass.mass[1],
        slow_masses(maps, replace(batch, groups=batch.groups.roll(1, 1)), 1),
        atol=1e-3,
    )
    real = batch.attention_mask.bool()
    expected = torch.stack([state[:, :total].norm(dim=-1) for state in states], 1)
    assert torch.allclose(
        norms.norms.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-5, atol=1e-5
    )
    wanted = (
        logits[:, total - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(ids)[..., None])[..., 0]
    )
    assert torch.allclose(generation.logprobs, wanted, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_the_final_norm_and_head_give_the_models_logits(blip, batch_of, name):
    vlm = blip(name)
    batch = batch_of(vlm)
    _, states, logits = eager(vlm, batch, [[20]] * 3)
    Lens(vlm).check(states[-1][:, -1], logits[:, -1])


@pytest.mark.parametrize("name", DECODERS)
def test_a_block_takes_the_picture_out_of_the_last_row(blip, batch_of, name):
    vlm = blip(name)
    batch = batch_of(vlm)
    queries = torch.zeros_like(batch.groups, dtype=torch.bool)
    queries[:, -1] = True
    mass = GroupMass(batch)
    with (
        torch.no_grad(),
        edit(
            vlm,
            blocks=[Block(queries, batch.groups == GROUPS.index("vision"), frozenset([1]))],
            probes=[mass],
        ),
    ):
        prefill(vlm, batch)
    vision = mass.mass[0][..., GROUPS.index("vision")]
    assert vision[1].max() == 0
    assert vision[0].min() > 0
    assert torch.allclose(mass.mass[0].sum(-1), torch.ones(()), atol=1e-5)


def test_the_rope_probe_runs_where_there_are_rotary_positions(blip, batch_of):
    vlm = blip("instructblip-llama")
    batch = batch_of(vlm)
    with capture(vlm, [probe := RopeShift(batch, vlm.rotary, [1.0])]):
        generate(vlm, batch, 1)
    assert probe["delta_gv"].isfinite().all() and probe["delta_alphaV"].abs().max() > 1e-4


# --- from the vision tokens back to the picture ---------------------------------------------------


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-llama"])
def test_the_q_former_parts_are_the_attention_that_runs_layer_by_layer(blip, batch_of, name):
    vlm = blip(name)
    batch = batch_of(vlm, (0,))
    former = vlm.parts.qformer
    shapes = []
    m = batch.image_rows[0][former.instruction].shape[1] if former.instruction else 0
    assert (m > 2) == name.startswith("instruct")
    assert former.queries == vlm.model.config.num_query_tokens == len(batch.vision_positions(0))
    assert [module is not None for module in former.cross_attention] == [
        True,
        False,
        True,
        False,
    ], "every second layer reads the picture"
    tower = [block.self_attn for block in vlm.parts.vision_blocks]
    given = [*tower, *former.self_attention, *filter(None, former.cross_attention)]
    kinds = {type(tower[0]), type(former.self_attention[0])}
    assert {id(module) for module in given} == {
        id(module) for module in vlm.model.modules() if type(module) in kinds
    }, "all there are"
    hooks = [
        module.register_forward_hook(
            lambda module, args, out: shapes.append((module, out[1].shape))
        )
        for module in given
    ]
    for encoder in (vlm.parts.tower, vlm.model.qformer):
        encoder.set_attn_implementation("eager")
    with torch.no_grad():
        vlm.vision(batch)
    for encoder in (vlm.parts.tower, vlm.model.qformer):
        encoder.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    rows, columns = vlm.family.patches(vlm, (60, 50), batch.image_rows[0]).shape
    heads = 4
    q = former.queries
    s = rows * columns + former.cls
    expected = [(module, (1, heads, s, s)) for module in tower]
    for attention, cross in zip(former.self_attention, former.cross_attention, strict=True):
        expected += [(attention, (1, heads, q + m, q + m))] + (
            [(cross, (1, heads, q, s))] if cross is not None else []
        )
    assert [(id(module), tuple(shape)) for module, shape in shapes] == [
        (id(module), shape) for module, shape in expected
    ]


@pytest.mark.parametrize("size", [(60, 50), (200, 90)])
def test_patches_lie_where_their_pixels_are_and_behind_cls(blip, size):
    vlm = blip("blip2-opt")
    states = []
    hook = vlm.parts.tower.embeddings.register_forward_hook(
        lambda module, args, out: states.append(out[0])
    )
    picture = Image.new("RGB", size, (90, 120, 60))

    def embedded(picture):
        batch = vlm.encode([Sample("0", None, "Hi?")], [picture])
        with torch.no_grad():
            vlm.vision(batch)
        return states[-1], vlm.family.patches(vlm, picture.size, batch.image_rows[0])

    plain, grid = embedded(picture)
    assert grid.shape == (4, 4)
    assert grid.size == size
    assert len(plain) == 1 + len(grid.boxes)
    assert grid.boxes[0, :2].tolist() == [0, 0] and grid.boxes[-1, 2:].tolist() == list(size)
    for cell in (0, 3, 6, 9, 15):
        changed = picture.copy()
        changed.paste((255, 0, 0), tuple(round(v) for v in grid.boxes[cell]))
        difference = (embedded(changed)[0] - plain).norm(dim=-1)
        assert difference[0] == 0 and int(difference.argmax()) == 1 + cell
    hook.remove()


# --- command lines --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip-shapes") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "4",
                "--num_train",
                "1",
                "--seed",
                "1",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_script_runs_or_names_what_the_model_lacks(blip_folders, shapes, tmp_path, name):
    model = ("--model_path", blip_folders(name))
    annotations = shapes / "annotations" / "instances_val2017.json"
    picture = next((shapes / "val2017").iterdir())
    runs = {
        "tokens": tool["tokens"](blip_folders(name), picture, "Is it red?"),
        "norms": tool["norms"](*model, "--coco_root", shapes, "--out_dir", tmp_path / "norms"),
        "coco": tool["coco"](
            *model,
            "--image_dir",
            shapes / "val2017",
            "--ann_file",
            annotations,
            "--max_images",
            2,
            "--max_new_tokens",
            3,
            "--out_root",
            tmp_path,
        ),
        "lens": tool["lens"](
            *model,
            "--image_folder",
            shapes / "val2017",
            "--save_folder",
            tmp_path / "pages",
            "--num_images",
            1,
            "--out_root",
            tmp_path,
        ),
        "knockout": tool["knockout"](
            *model,
            "--coco_root",
            shapes,
            "--clean_questions_file",
            shapes / "clean_questions.json",
            "--out_root",
            tmp_path,
        ),
        "swap": tool["swap"](
            "--model_type",
            "x",
            "--scales",
            f"base={blip_folders(name)}",
            "--data_path",
            shapes / "swap_pairs_ready.tsv",
            "--max_samples_per_category",
            2,
            "--out_root",
            tmp_path,
            "--output_dir",
            tmp_path / "results",
            "--stage",
            "pairs",
            "states",
        ),
    }
    has = configs.read_config(blip_folders(name))[1].has
    needs = {
        "coco": {"decoder-only", "rotary"},
        "knockout": {"decoder-only", "grid"},
        "lens": {"decoder-only"},
        "swap": {"decoder-only"},
        "tokens": set(),
        "norms": set(),
    }
    for script, done in runs.items():
        lacking = [
            word for word in ("decoder-only", "rotary", "grid") if word in needs[script] - has
        ]
        assert done.returncode == (2 if lacking else 0), (script, done.stdout + done.stderr)
        if lacking:
            assert (
                f"this measure needs {', '.join(lacking)}, which the family {name} lacks"
                in done.stderr
                and done.stderr.count("\n") == 1
            ), script

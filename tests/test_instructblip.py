"""InstructBLIP's own part: the Q-Former reads the prompt. What it shares with BLIP-2, and the
scripts, are in test_blip2.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

import common
from data import make_shapes
from tests.conftest import QUESTIONS, ROOT, in_process
from vlmdiag.model.attention import capture
from vlmdiag.model.prefix import first_positions
from vlmdiag.model.probes import LastStates
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import rundirs
from vlmdiag.volcano.conversation import Asker

NAMES = ["instructblip-llama", "instructblip-t5"]


@pytest.fixture(scope="module")
def blip(blip_folders):
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = common.load_model(blip_folders(name), self_check=False)
        return loaded[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_vision_tokens_depend_on_the_question_and_are_computed_once_for_each(blip, pictures, name):
    vlm = blip(name)
    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
    batch = vlm.encode(
        [Sample(str(i), None, question) for i, question in enumerate(asked)], [pictures[0]] * 3
    )
    assert batch.pictures[0] == batch.pictures[2] != batch.pictures[1]
    seen = []
    hook = vlm.model.qformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        found = vlm.vision(batch).pooler_output
    hook.remove()
    assert len(seen) == 1 and seen[0][0] == 2
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_instructions_are_kept_without_padding_and_padded_on_the_right(blip, batch_of, name):
    vlm = blip(name)
    batch = batch_of(vlm)
    key = vlm.parts.qformer.instruction
    lengths = [row[key].shape[1] for row in batch.image_rows]
    tokenizer = vlm.processor.wrapped.qformer_tokenizer
    assert len(set(lengths)) == 3
    assert all(row["qformer_attention_mask"].all() for row in batch.image_rows)
    for question, row in zip(QUESTIONS, batch.image_rows, strict=True):
        assert (
            tokenizer.decode(row[key][0]).split()
            == "[CLS]"
            f" {tokenizer.decode(tokenizer(question, add_special_tokens=False)['input_ids'])}"
            " [SEP]".split()
        )
    joined = batch.image_inputs
    assert joined[key].shape == joined["qformer_attention_mask"].shape == (3, max(lengths))
    assert joined["qformer_attention_mask"].sum(1).tolist() == lengths
    assert joined["qformer_attention_mask"][:, 0].all()
    with torch.no_grad():
        right = vlm.vision(batch).pooler_output
        for row, length in enumerate(lengths):
            alone = vlm.vision(batch_of(vlm, (row,))).pooler_output[0]
            assert torch.allclose(right[row], alone, atol=1e-5)
            # what padding on the left would give: positions count from the left
            if length < max(lengths):
                moved = {
                    name: value.roll(max(lengths) - length, 1) if name != "pixel_values" else value
                    for name, value in joined.items()
                }
                assert not torch.allclose(
                    vlm.model.get_image_features(**moved).pooler_output[row], alone, atol=1e-4
                )


@pytest.mark.parametrize("name", NAMES)
def test_the_q_former_reads_special_strings_as_text_and_no_more_than_it_has_positions(blip, name):
    vlm = blip(name)
    key, tokenizer = vlm.parts.qformer.instruction, vlm.processor.wrapped.qformer_tokenizer
    picture = Image.new("RGB", (60, 50))

    def ids(question):
        batch = vlm.encode([Sample("0", None, question)], [picture])
        with torch.no_grad():
            assert prefill(vlm, batch).logits.isfinite().all()
        return batch.image_rows[0][key][0].tolist()

    typed = ids("Is [SEP] or </s> or <image> [CLS] red?")
    assert [i for i in typed if i in tokenizer.all_special_ids] == [
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    ]
    assert "".join(tokenizer.decode(typed[1:-1]).split()) == "is[sep]or</s>or<image>[cls]red?"
    assert len(ids("red " * 600)) == vlm.model.config.qformer_config.max_position_embeddings


def test_keys_of_a_picture_are_not_taken_to_another_question(blip, batch_of):
    vlm = blip("instructblip-llama")
    with torch.no_grad():
        cache = prefill(vlm, batch_of(vlm, (0,))).past_key_values
    assert first_positions(vlm, cache, 3) is None


def test_rounds_of_questions_about_one_picture_get_each_its_own_vision_tokens(blip, pictures):
    """Volcano's loop asks several questions about a batch of pictures, and fewer in later rounds:
    each answer must be that of the question alone."""
    vlm = blip("instructblip-llama")
    args = SimpleNamespace(
        hidden_top_k=2, full_tensors=False, sample=False, temperature=1.0, seed=0, max_new_tokens=4
    )
    samples = [Sample(str(i), None, question) for i, question in enumerate(QUESTIONS[:2])]
    ask = Asker(args, vlm, samples, pictures[:2])
    for rows, questions in (([0, 1], QUESTIONS[:2]), ([0, 1], QUESTIONS[1:]), ([1], QUESTIONS[2:])):
        for row, question, answer in zip(
            rows, questions, ask(rows, questions, "x", True), strict=True
        ):
            alone = Asker(args, vlm, [samples[row]], [pictures[row]])([0], [question], "x", True)[0]
            assert answer.ids == alone.ids
            assert np.allclose(answer.attention["mean"], alone.attention["mean"], atol=1e-5)
    assert len(ask.grids) == 2


def test_the_swap_analysis_gives_each_question_its_own_vision_tokens(blip, blip_folders, tmp_path):
    shapes = tmp_path / "set"
    swap = in_process(ROOT / "swap_analysis" / "swap_analysis.py")
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(shapes),
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
    table = (
        "--data_path",
        shapes / "swap_pairs_ready.tsv",
        "--bbox_file",
        shapes / "bboxes.json",
        "--max_samples_per_category",
        2,
    )
    scale = (
        "--scales",
        f"base={blip_folders('instructblip-llama')}",
        "--stage",
        "pairs",
        "states",
        "--state_dtype",
        "float32",
        "--batch_size",
        3,
    )
    done = swap(
        "--model_type",
        "x",
        *scale,
        *table,
        "--out_root",
        tmp_path,
        "--output_dir",
        tmp_path / "results",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = rundirs.read_run(tmp_path / "swap_analysis" / "x_base", "swap_analysis")
    states = np.load(run.path / "states.npy")
    vlm = blip("instructblip-llama")
    images = [load_image(path) for path in (shapes / "val2017").iterdir()]
    assert len(states) == len(run.ids()) > 3
    for id in run.ids():
        alone = []
        for question in run.record(id)["questions"]:
            batch = vlm.encode([Sample("0", None, question)] * len(images), images)
            with torch.no_grad(), capture(vlm, [probe := LastStates(range(len(vlm.parts.layers)))]):
                prefill(vlm, batch)
            alone.append(probe.states.numpy())
        alone = np.stack(alone, 1)  # (pictures, 2, layers, d): one of them is this pair's
        assert np.abs(states[:, None] - alone).max((2, 3, 4)).min() < 1e-3, (
            "no row of states.npy is that of the questions asked alone"
        )


def test_logits_in_half_precision_are_those_of_transformers_own_class(blip_folders, batch_of):
    """The Q-Former's queries stay in float32; what the decoder reads is cast. Without the
    self-check: a random T5 is chaotic in bfloat16, 0.36 from its own float32 (relative), so two
    pictures in a batch differ as much from each alone."""
    for name in NAMES:
        vlm = common.load_model(blip_folders(name), dtype="bfloat16", self_check=False)
        model = InstructBlipForConditionalGeneration.from_pretrained(
            blip_folders(name), dtype=torch.bfloat16
        ).eval()
        batch = batch_of(vlm, (1,))
        inputs = {
            key: value.to(torch.bfloat16) if value.is_floating_point() else value
            for key, value in batch.image_inputs.items()
        }
        more = (
            {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
            if name.endswith("t5")
            else {}
        )
        with torch.no_grad():
            theirs = (
                model(
                    **inputs, input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more
                )
                .logits[:, -1]
                .float()
            )
            ours = prefill(vlm, batch).logits[:, -1].float()
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_the_tiny_llama_tokenizer_keeps_its_chat_template_out_of_the_prompt(blip, blip_folders):
    assert (ROOT / "checkpoints" / "tiny-llava" / "chat_template.jinja").exists() == (
        blip_folders("instructblip-llama") / "chat_template.jinja"
    ).exists()
    assert (
        AutoProcessor.from_pretrained(
            blip_folders("instructblip-llama"), backend="pil"
        ).qformer_tokenizer
        is not None
    )
    batch = blip("instructblip-llama").encode(
        [Sample("0", None, "Why?")], [Image.new("RGB", (60, 50))]
    )
    assert batch.prompts == ["Why?"]

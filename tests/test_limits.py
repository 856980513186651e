"""Prompts and answers are no longer than what the model reads, pictures no larger than what its
processor can take, and nothing is allocated for more."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from transformers import LlamaConfig

import common
from tests.conftest import ROOT
from vlmdiag.model import limits
from vlmdiag.model.decoding import generate
from vlmdiag.model.limits import ANSWER_LIMIT, check_scaled, context_of, steps_that_fit
from vlmdiag.pictures.samples import AT_HAND, Sample

TINY = ROOT / "checkpoints" / "tiny-llava"


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            16384,
        ),
        (
            {
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
    ],
)
def test_the_context_is_what_the_config_says(settings, positions):
    assert context_of(LlamaConfig(**settings)) == positions


@pytest.fixture(scope="module")
def vlm():
    return common.load_model(TINY, self_check=False)


def encoded(vlm, picture, question="Describe the image."):
    return vlm.encode([Sample("0", AT_HAND, question)], [picture])


def test_a_prompt_past_the_context_is_refused_with_both_numbers(vlm, pictures):
    reads = context_of(vlm.model.config)
    with pytest.raises(ValueError, match=rf"the prompt has \d+ tokens, the model reads {reads}"):
        encoded(vlm, pictures[0], "circle " * reads)
    assert encoded(vlm, pictures[0]).lengths[0] < reads


def test_no_answer_goes_past_the_context(vlm, pictures, monkeypatch):
    batch = encoded(vlm, pictures[0])
    length = batch.lengths[0]
    assert steps_that_fit(vlm, batch, 5) == 5
    assert steps_that_fit(vlm, batch, 10**8) == context_of(vlm.model.config) - length
    text = vlm.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", length + 3)
    assert len(generate(vlm, batch, 10**8).ids[0]) == 3
    monkeypatch.setattr(limits, "context_of", lambda config: None)
    assert steps_that_fit(vlm, batch, 10**8) == ANSWER_LIMIT


def test_a_strip_that_the_processor_would_make_huge_is_refused(vlm, monkeypatch):
    processor = vlm.processor.image_processor
    edge = processor.size["shortest_edge"]
    assert processor.do_pad  # to a square, which is no strip
    check_scaled(vlm, (1000, 1))
    monkeypatch.setattr(processor, "do_pad", False)
    ratio = limits.SCALED_LIMIT // edge**2
    for size in ((ratio * 4, 4), (4, ratio * 4)):
        check_scaled(vlm, size)
    for size in ((ratio * 4 + 8, 4), (4, ratio * 4 + 8)):
        with pytest.raises(ValueError, match=f"brings the shorter side to {edge}"):
            check_scaled(vlm, size)
        with pytest.raises(ValueError, match="million pixels"):
            encoded(vlm, Image.new("RGB", size))


def test_a_question_that_is_too_long_is_a_failure_of_its_own(pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    entries = [
        {"image": "a.png", "question": "Is there a circle? Answer with only one word."},
        {"image": "a.png", "question": "Is there a circle? " * 1000},
    ]
    for entry in entries:
        entry["answer"] = "Yes"
    (tmp_path / "q.json").write_text(json.dumps(entries))
    flags = f"--model_path {TINY} --questions {tmp_path / 'q.json'} --num_permutations 1"
    flags += f" --out_root {tmp_path / 'runs'} --max_new_tokens 100000000"
    script = ROOT / "diagnostic_tools" / "psi.py"
    done = subprocess.run(
        [sys.executable, str(script), *flags.split()], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr[-500:]
    failures = list((tmp_path / "runs/psi/tiny-llava/failures").iterdir())
    assert len(failures) == 1 and "the model reads" in failures[0].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--max_new_tokens 100000000", "--system_prompt LONG"])
def test_absurd_lengths_of_the_coco_diagnostics_take_no_memory(pictures, tmp_path, flag):
    (tmp_path / "val").mkdir()
    pictures[0].save(tmp_path / "val/a.png")
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    words = flag.replace("LONG", "word" * 25_000).split()
    flags = f"--model_path {TINY} --image_dir {tmp_path / 'val'}"
    flags += f" --ann_file {tmp_path / 'captions.json'} --out_root {tmp_path / 'runs'}"
    script = ROOT / "diagnostic_tools" / "run_coco_diagnostics.py"
    code = (
        "import resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);"
        "print(done.stderr[-600:])"
    )
    command = [sys.executable, "-c", code, sys.executable, str(script), *flags.split(), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    code, peak = map(int, done.stdout.split()[:2])
    assert code == (0 if "new_tokens" in flag else 2), done.stdout
    assert "Traceback" not in done.stdout
    assert peak < 2 * 2**20  # KiB

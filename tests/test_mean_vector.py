"""save_post_adapter_acts.py, calculate_mean_vector.py and estimate_acts_size.py against plain numpy
over all vectors, killed, resumed, sharded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import common
from data import make_shapes
from tests.conftest import ROOT, in_process
from tests.test_llava_original import (
    sources,  # noqa: F401 -- a fixture
    to_original,
    write_tower,
)
from vlmdiag.interp import mean_vector as sums_of
from vlmdiag.interp import targets
from vlmdiag.model import identity
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import disk
from vlmdiag.runs.rundirs import open_run

SCRIPTS = ROOT / "scripts"
TINY = ROOT / "checkpoints" / "tiny-llava"
ENDINGS = ("jpg", "JPEG", "png", "webp", "jpeg", "PNG")
save, mean_vector, estimate = (
    in_process(SCRIPTS / f"{name}.py")
    for name in ("save_post_adapter_acts", "calculate_mean_vector", "estimate_acts_size")
)


def module_of(command):
    """The globals of a script that in_process loaded."""
    return next(
        cell.cell_contents for cell in command.__closure__ if hasattr(cell.cell_contents, "main")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """70 pictures of generated scenes under every suffix, so three blocks, the last one of six; and
    what is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    make_shapes.main(
        [
            "--out_dir",
            str(root / "shapes"),
            "--num_images",
            "70",
            "--num_train",
            "0",
            "--num_workers",
            "1",
        ]
    )
    (root / "in").mkdir()
    for n, file in enumerate(sorted((root / "shapes" / "val2017").iterdir())):
        ending = ENDINGS[n % len(ENDINGS)]
        with Image.open(file) as picture:
            picture.save(
                root / "in" / f"{n:03d}.{ending}",
                format={"jpg": "JPEG"}.get(ending.lower(), ending.upper()),
            )
    (root / "in" / "notes.txt").write_text("no picture")
    (root / "in" / "subfolder").mkdir()
    return root / "in"


@pytest.fixture(scope="module")
def tiny():
    return common.load_model(TINY, self_check=False)


def pictures_of(folder):
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower().strip(".") in {ending.lower() for ending in ENDINGS}
    )


@torch.inference_mode()
def all_tokens(vlm, files):
    """Every vision token of the pictures by the whole model, one picture at a time: [(P, d)
    float64]."""
    return [
        vlm.vision(vlm.encode([Sample("0", None, "What?")], [load_image(file)]))
        .pooler_output[0]
        .double()
        .numpy()
        for file in files
    ]


@pytest.fixture(scope="module")
def truth(tiny, folder):
    tokens = np.concatenate(all_tokens(tiny, pictures_of(folder)))
    return tokens.mean(0), tokens.var(0), len(tokens)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An uninterrupted run, and the mean vector of it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = save("--model_path", TINY, "--image_dir", folder, "--save_path", out)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = mean_vector(out)
    assert (done.returncode, done.stderr) == (0, "") and "of 70 pictures, d = 128" in done.stdout
    return out


def sums(out):
    return {file.name: file.read_bytes() for file in sorted((out / "per_image").iterdir())}


def results(out):
    return [(out / name).read_bytes() for name in ("mean_vector.pt", "variance_vector.pt")]


# --- the mean -------------------------------------------------------------------------------------


def test_the_mean_and_variance_are_those_of_all_vectors(finished, truth):
    mean, variance, count = truth
    vector = torch.load(finished / "mean_vector.pt", weights_only=True)
    assert vector.dtype == torch.float32 and vector.shape == (128,)
    assert np.abs(vector.numpy() - mean).max() < 1e-5
    assert np.allclose(
        torch.load(finished / "variance_vector.pt", weights_only=True).numpy(), variance, rtol=1e-4
    )
    facts = json.loads((finished / "mean_vector.json").read_text())
    assert (
        facts["vectors"] == count == 70 * 144
        and facts["images"] == 70
        and facts["unreadable"] == []
        and facts["width"] == 128
    )
    assert (
        facts["settings"]["fingerprint"] == identity.fingerprint(TINY)
        and facts["settings"]["dtype"] == "float32"
        and facts["versions"]["torch"]
    )
    assert facts["summary"]["norm"] == pytest.approx(np.linalg.norm(mean), rel=1e-5)
    assert facts["summary"]["total_variance"] == pytest.approx(variance.sum(), rel=1e-5)
    assert not (finished / "acts").exists() and sorted(sums(finished)) == [
        f"block-00000{n}.{ending}" for n in range(3) for ending in ("json", "npz")
    ]


def test_a_second_mean_of_the_same_folder_is_the_same(finished):
    before = [*results(finished), (finished / "mean_vector.json").read_bytes()]
    assert mean_vector(finished).returncode == 0
    assert [*results(finished), (finished / "mean_vector.json").read_bytes()] == before


def test_the_decoder_is_not_loaded(folder):
    module = module_of(save)
    args = module.parse_args(["--model_path", str(TINY), "--image_dir", "x", "--save_path", "y"])
    vlm = module.load_tower(args)
    assert len(vlm.parts.layers) == 0 and sum(p.numel() for p in vlm.model.parameters()) < 800_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 99),
    st.sampled_from([0, 1e6]),
)
def test_sums_of_parts_are_the_sums_of_the_whole(sizes, seed, offset):
    vectors = np.random.default_rng(seed).standard_normal((sum(sizes), 3)) + offset
    parts = np.split(vectors, np.cumsum(sizes)[:-1])
    script = module_of(mean_vector)
    told = [
        script.Sums(len(part), part.mean(0), ((part - part.mean(0)) ** 2).sum(0))
        if len(part)
        else script.Sums(0, np.zeros(3), np.zeros(3))
        for part in parts
    ]
    count, mean, m2 = script.merged(told)
    assert count == len(vectors)
    total = None
    for part in parts:
        total = sums_of.add(total, torch.from_numpy(part)) if len(part) else total
    if count:
        for found_mean, found_m2 in ((mean, m2), (total[1].numpy(), total[2].numpy())):
            assert np.allclose(found_mean, vectors.mean(0), rtol=1e-12, atol=1e-9) and np.allclose(
                found_m2 / count, vectors.var(0), rtol=1e-8, atol=1e-8
            )


def test_pictures_with_more_tokens_weigh_more(folders, folder, tmp_path, load):
    (tmp_path / "in").mkdir()
    for n, size in enumerate([(28, 28), (300, 100), (140, 84)]):
        Image.open(pictures_of(folder)[n]).convert("RGB").resize(size).save(
            tmp_path / "in" / f"{n}.png"
        )
    assert (
        save(
            "--model_name",
            folders["qwen"],
            "--image_dir",
            tmp_path / "in",
            "--save_path",
            tmp_path / "run",
            "--keep_acts",
        ).returncode
        == 0
    )
    assert mean_vector(tmp_path / "run").returncode == 0
    each = all_tokens(load("qwen"), pictures_of(tmp_path / "in"))
    assert len({len(tokens) for tokens in each}) == 3
    assert (
        np.abs(
            torch.load(tmp_path / "run" / "mean_vector.pt", weights_only=True).numpy()
            - np.concatenate(each).mean(0)
        ).max()
        < 1e-5
    )
    kept = load_file(tmp_path / "run" / "acts" / "block-000000.safetensors")
    assert list(kept) == ["0.png", "1.png", "2.png"] and all(
        np.abs(kept[f"{n}.png"].numpy() - each[n]).max() < 1e-5 for n in range(3)
    )


# --- interrupted, sharded, repaired ---------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(finished, folder, tmp_path, warm_python):
    """The real command line, SIGKILL after the first block."""
    command = [
        sys.executable,
        "-W",
        "error",
        str(SCRIPTS / "save_post_adapter_acts.py"),
        "--model-name",
        str(TINY),
        "--image-dir",
        str(folder),
    ]
    command += ["--save-path", str(tmp_path / "run"), "--keep-acts"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
    )
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "per_image" / "block-000000.json").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(sums(tmp_path / "run")) < 6
    done = mean_vector(tmp_path / "run")
    assert (
        done.returncode == 2
        and "of 3 blocks of pictures are missing; run save_post_adapter_acts.py again"
        in done.stderr
    )
    assert (
        save(
            "--model_name",
            TINY,
            "--image_dir",
            folder,
            "--save_path",
            tmp_path / "run",
            "--keep_acts",
        ).returncode
        == 0
    )
    assert sums(tmp_path / "run") == sums(finished)
    command = [
        warm_python,
        "-W",
        "error",
        str(SCRIPTS / "calculate_mean_vector.py"),
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "") and results(tmp_path / "run") == results(
        finished
    )
    kept = [load_file(file) for file in sorted((tmp_path / "run" / "acts").iterdir())]
    assert [len(part) for part in kept] == [32, 32, 6] and kept[0]["000.jpg"].shape == (144, 128)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.name.endswith(".tmp")]


@pytest.mark.parametrize("stage", ["acts", "npz", "json"])
def test_a_run_that_dies_while_it_writes_goes_on(finished, folder, tmp_path, monkeypatch, stage):
    """In the second block's file: half of it is there under its temporary name, or none of it."""
    write, save_file = disk.write, sums_of.save_file
    written = []

    def dies():
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt

    def dying_write(path, *rest, **more):
        if path.name.startswith("block") and path.suffix == f".{stage}":
            dies()
        return write(path, *rest, **more)

    def dying_save(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:1000])
        dies()
        save_file(tensors, path)

    monkeypatch.setattr(disk, "write", dying_write)
    if stage == "acts":
        monkeypatch.setattr(sums_of, "save_file", dying_save)
    command = (
        "--model_path",
        TINY,
        "--image_dir",
        folder,
        "--save_path",
        tmp_path / "run",
        "--keep_acts",
    )
    assert save(*command).returncode == 130
    monkeypatch.undo()
    assert save(*command).returncode == 0 and sums(tmp_path / "run") == sums(finished)
    kept = sorted((tmp_path / "run" / "acts").iterdir())
    assert [len(load_file(file)) for file in kept] == [32, 32, 6]  # nothing else, no temporary file


def test_shards_merge_to_the_same_bytes(finished, folder, tmp_path):
    for index in (1, 0):
        assert (
            save(
                "--model_path",
                TINY,
                "--image_dir",
                folder,
                "--save_path",
                tmp_path / "run",
                "--shard",
                f"{index}/2",
            ).returncode
            == 0
        )
        assert mean_vector(tmp_path / "run").returncode == (2 if index else 0)
    assert sums(tmp_path / "run") == sums(finished) and results(tmp_path / "run") == results(
        finished
    )


@pytest.mark.parametrize("size", [5, 64])
def test_another_batch_size_changes_rounding_only_and_may_go_on(finished, folder, tmp_path, size):
    shutil.copytree(finished, tmp_path / "run")
    for ending in ("json", "npz"):
        (tmp_path / "run" / "per_image" / f"block-000001.{ending}").unlink()
    assert (
        save(
            "--model_path",
            TINY,
            "--image_dir",
            folder,
            "--save_path",
            tmp_path / "run",
            "--batch_size",
            size,
        ).returncode
        == 0
    )
    assert mean_vector(tmp_path / "run").returncode == 0
    found, expected = (
        torch.load(out / "mean_vector.pt", weights_only=True)
        for out in (tmp_path / "run", finished)
    )
    assert (found - expected).abs().max() < 1e-5


def test_a_batch_that_runs_out_of_memory_is_halved_to_blocks(
    finished, folder, tmp_path, monkeypatch
):
    vision_tokens, sizes = sums_of.vision_tokens, []

    def short(vlm, part):
        sizes.append(len(part))
        if len(part) > 32:
            raise torch.OutOfMemoryError("out of memory")
        return vision_tokens(vlm, part)

    monkeypatch.setattr(sums_of, "vision_tokens", short)
    assert (
        save(
            "--model_path",
            TINY,
            "--image_dir",
            folder,
            "--save_path",
            tmp_path / "run",
            "--batch_size",
            64,
        ).returncode
        == 0
    )
    assert sizes == [64, 32, 32, 6] and sums(tmp_path / "run") == sums(finished)


def test_unreadable_pictures_are_left_out_noted_and_tried_again(finished, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    good = next(file.name for file in pictures_of(tmp_path / "in") if file.name.startswith("033"))
    content = (tmp_path / "in" / good).read_bytes()
    (tmp_path / "in" / good).write_bytes(b"no picture")
    command = (
        "--model_path",
        TINY,
        "--image_dir",
        tmp_path / "in",
        "--save_path",
        tmp_path / "run",
    )
    for _ in range(2):  # tried again, fails again
        done = save(*command)
        assert done.returncode == 3 and f"1 pictures cannot be used, such as {good}" in done.stdout
        failure = json.loads((tmp_path / "run" / "failures" / f"picture-{good}.json").read_text())
        assert "not a readable picture" in failure["message"] and failure["facts"][
            "image"
        ].endswith(good)
    done = mean_vector(tmp_path / "run")
    assert done.returncode == 0 and "left out: 1 pictures" in done.stdout
    facts = json.loads((tmp_path / "run" / "mean_vector.json").read_text())
    assert (facts["images"], facts["unreadable"], facts["vectors"]) == (69, [good], 69 * 144)
    (tmp_path / "in" / good).write_bytes(content)
    assert save(*command).returncode == 0 and not list((tmp_path / "run" / "failures").iterdir())
    assert sums(tmp_path / "run") == sums(finished)


def test_a_picture_that_the_processor_refuses_is_one_failure(folders, folder, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (1, 900)).save(
        tmp_path / "in" / "a.png"
    )  # Qwen takes sides up to 200 times the other
    Image.new("RGB", (60, 60), "red").save(tmp_path / "in" / "b.png")
    done = save(
        "--model_path",
        folders["qwen"],
        "--image_dir",
        tmp_path / "in",
        "--save_path",
        tmp_path / "run",
    )
    assert done.returncode == 3 and [
        file.name for file in (tmp_path / "run" / "failures").iterdir()
    ] == ["picture-a.png.json"]
    assert (
        json.loads((tmp_path / "run" / "per_image" / "block-000000.json").read_text())["pictures"]
        == 1
    )


def test_no_usable_picture_is_no_mean(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("no picture")
    assert (
        save(
            "--model_path", TINY, "--image_dir", tmp_path / "in", "--save_path", tmp_path / "run"
        ).returncode
        == 3
    )
    done = mean_vector(tmp_path / "run")
    assert done.returncode == 2 and "holds no vision token" in done.stderr


# --- the published cache --------------------------------------------------------------------------


def test_a_cache_of_the_published_form_has_the_mean_of_its_vectors(tmp_path):
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((size, 9, 4)).astype(np.float32) * 3 + 100 for size in (5, 2, 1)]
    for n, batch in zip((2, 10, 0), batches, strict=True):
        torch.save(torch.from_numpy(batch), tmp_path / f"batch_{n}.pt")
    torch.save(
        [torch.ones(3, 4), torch.zeros(2, 4, dtype=torch.bfloat16)], tmp_path / "batch_11.pt"
    )  # a grid that depends on the picture
    (tmp_path / "results_dict.pkl").write_bytes(b"never opened")
    vectors = np.concatenate(
        [*(batch.reshape(-1, 4) for batch in batches), np.ones((3, 4)), np.zeros((2, 4))]
    ).astype(float)
    for _ in range(2):  # does not take its own output for input
        done = mean_vector(tmp_path)
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "mean_vector.pt", weights_only=True)
        assert found.dtype == torch.float32 and np.allclose(
            found.numpy(), vectors.mean(0), rtol=1e-6
        )
        assert np.allclose(
            torch.load(tmp_path / "variance_vector.pt", weights_only=True).numpy(),
            vectors.var(0),
            rtol=1e-5,
        )
    facts = json.loads((tmp_path / "mean_vector.json").read_text())
    assert (facts["images"], facts["vectors"], facts["files"], facts["source"]) == (
        10,
        len(vectors),
        4,
        "batch_<n>.pt",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"damaged", "batch_1.pt cannot be read"),
        (torch.ones(4), "batch_1.pt: tensors of shape"),
        (torch.ones(2, 3, 5), "width 5, those before have 4"),
        ({"a": torch.ones(3)}, "batch_1.pt: tensors of shape"),
        (torch.full((1, 2, 4), torch.nan), "not finite"),
        (torch.ones(1, 2, 4, dtype=torch.long), "shape"),
    ],
)
def test_a_broken_cache_is_named(tmp_path, content, words):
    torch.save(torch.ones(1, 2, 4), tmp_path / "batch_0.pt")
    (
        (tmp_path / "batch_1.pt").write_bytes(content)
        if isinstance(content, bytes)
        else torch.save(content, tmp_path / "batch_1.pt")
    )
    done = mean_vector(tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "mean_vector.pt").exists()


# --- wrong usage ----------------------------------------------------------------------------------


def test_wrong_usage_is_one_line(finished, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    run = ("--model_path", TINY, "--image_dir", folder, "--save_path", tmp_path / "run")
    for command, arguments, words in [
        (
            save,
            ("--model_path", TINY, "--image_dir", tmp_path / "none", "--save_path", "x"),
            "no such image folder",
        ),
        (
            save,
            ("--model_path", TINY, "--image_dir", tmp_path / "empty", "--save_path", "x"),
            "has no picture",
        ),
        (save, (*run, "--batch_size", "0"), "--batch_size"),
        (save, (*run, "--overwrite", "--shard", "0/2"), "--overwrite removes"),
        (
            save,
            (
                "--model_path",
                tmp_path / "empty",
                "--image_dir",
                folder,
                "--save_path",
                tmp_path / "x",
            ),
            "no config.json in this folder",
        ),
        (save, (*run[:-1], finished, "--image_aspect", "pad"), "image_aspect: now"),
        (save, ("--image_dir", folder), "--save_path"),
        (mean_vector, (tmp_path / "none",), "no such folder"),
        (mean_vector, (tmp_path / "empty",), "has no batch_<n>.pt"),
        (mean_vector, (), "directory"),
        (estimate, ("--model_path", TINY, "--image_dir", tmp_path / "empty"), "has no picture"),
        (
            estimate,
            ("--model_path", TINY, "--image_dir", folder, "--sample_size", "0"),
            "--sample_size",
        ),
    ]:
        done = command(*arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (
            arguments,
            done.stderr,
        )


def test_another_list_of_pictures_is_refused_and_overwrite_starts_again(finished, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "000.jpg").rename(tmp_path / "in" / "extra.jpg")
    shutil.copytree(finished, tmp_path / "run")
    command = (
        "--model_path",
        TINY,
        "--image_dir",
        tmp_path / "in",
        "--save_path",
        tmp_path / "run",
    )
    done = save(*command)
    assert (
        done.returncode == 2 and "list_digest: now" in done.stderr and "--overwrite" in done.stderr
    )
    (tmp_path / "run" / "acts").mkdir()
    assert (
        save(*command, "--overwrite").returncode == 0 and not (tmp_path / "run" / "acts").exists()
    )
    assert mean_vector(tmp_path / "run").returncode == 0


def test_the_documented_name_of_a_model_is_a_folder_of_checkpoints_or_a_hub_id(
    tmp_path, monkeypatch
):
    for command in (save, estimate):
        module = module_of(command)
        monkeypatch.setattr(targets, "CHECKPOINTS", TINY.parent)
        assert (
            module.model_of("tiny-llava") == str(TINY)
            and module.model_of("checkpoints/tiny-llava") == "checkpoints/tiny-llava"
        )
        assert (
            module.model_of("llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
            and module.model_of("xtuner/llava-phi-3-mini-hf") == "xtuner/llava-phi-3-mini-hf"
        )
        monkeypatch.setattr(targets, "CHECKPOINTS", tmp_path)
        (tmp_path / "llava-1.5-7b-hf").mkdir(exist_ok=True)
        assert module.parse_args(
            ["--image_dir", "x", *(["--save_path", "y"] if command is save else [])]
        ).model_path == str(tmp_path / "llava-1.5-7b-hf")


def test_documented_defaults_stand():
    args = module_of(save).parse_args(["--image_dir", "x", "--save_path", "y"])
    assert (args.batch_size, args.dtype, args.keep_acts) == (32, "float32", False)
    assert (
        module_of(mean_vector).parse_args([str(SCRIPTS)]).device == "cpu"
        and module_of(estimate).parse_args(["--image_dir", "x"]).sample_size == 1
    )


# --- the estimate ---------------------------------------------------------------------------------


def numbers(text):
    return {line[:34].strip(): line[34:] for line in text.splitlines()}


def test_the_estimate_of_a_fixed_grid_is_what_the_cache_takes(folder, finished):
    rows = numbers(
        estimate("--model_name", TINY, "--image_dir", folder, "--sample_size", "3").stdout
    )
    assert (
        rows["vision tokens of a picture"] == "144; d = 128, float32"
        and rows["pictures"] == "70 (3 looked at)"
    )
    assert (
        rows["activations of a picture"] == "73.73 KB"
        and rows["activations of all (--keep_acts)"] == "5.161 MB"
    )
    assert rows["sums for the mean alone"] == "6.168 KB"
    assert (
        numbers(
            estimate("--model_name", TINY, "--image_dir", folder, "--dtype", "bfloat16").stdout
        )["activations of a picture"]
        == "36.86 KB"
    )


def test_the_estimate_of_a_dynamic_grid_has_the_tokens_of_the_sample(folders, tmp_path, load):
    for n, size in enumerate([(28, 28), (300, 100), (140, 84)]):
        Image.new("RGB", size).save(tmp_path / f"{n}.png")
    rows = numbers(
        estimate(
            "--model_path", folders["qwen"], "--image_dir", tmp_path, "--sample_size", "9"
        ).stdout
    )
    counts = [len(tokens) for tokens in all_tokens(load("qwen"), pictures_of(tmp_path))]
    assert (
        rows["vision tokens of a picture"]
        == f"{min(counts)} to {max(counts)}, mean {np.mean(counts):.1f}; d = 64, float32"
        and rows["pictures"] == "3 (3 looked at)"
    )
    assert rows["activations of all (--keep_acts)"].startswith(
        f"{sum(counts) * 64 * 4 / 1000:.4g} KB +- "
    )


def test_the_estimate_reads_no_weights(folders, tmp_path, folder):
    shutil.copytree(folders["llava"], tmp_path / "llava")
    (tmp_path / "llava" / "model.safetensors").write_bytes(b"")
    done = estimate("--model_path", tmp_path / "llava", "--image_dir", folder)
    assert done.returncode == 0 and "144; d =" in done.stdout


def test_the_authors_checkpoints_have_a_mean_and_an_estimate(sources, folder, tmp_path):  # noqa: F811
    model = to_original(sources["multilayerNorm"], tmp_path / "original")
    write_tower(sources["base"], tmp_path / "tiny-tower")  # its config
    (tmp_path / "in").mkdir()
    for file in pictures_of(folder)[:3]:
        shutil.copy(file, tmp_path / "in")
    done = estimate("--model_path", model, "--image_dir", tmp_path / "in")
    assert done.returncode == 0, done.stderr
    assert (
        save(
            "--model_path", model, "--image_dir", tmp_path / "in", "--save_path", tmp_path / "run"
        ).returncode
        == 0
    )
    assert mean_vector(tmp_path / "run").returncode == 0
    tokens = np.concatenate(
        all_tokens(common.load_model(model, self_check=False), pictures_of(tmp_path / "in"))
    )
    assert (
        np.abs(
            torch.load(tmp_path / "run" / "mean_vector.pt", weights_only=True).numpy()
            - tokens.mean(0)
        ).max()
        < 1e-5
    )
    assert numbers(done.stdout)["vision tokens of a picture"].startswith(
        f"{len(tokens) // 3}; d = {tokens.shape[1]}"
    )


def test_the_real_command_line_of_the_estimate(folder, warm_python):
    command = [
        warm_python,
        "-W",
        "error",
        str(SCRIPTS / "estimate_acts_size.py"),
        "--model-name",
        "tiny-llava",
        "--image-dir",
        str(folder),
        "--sample-size",
        "2",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "") and "activations of a picture" in done.stdout


def test_activations_of_equal_pictures_and_of_names_that_are_no_text_are_kept(tmp_path):
    from vlmdiag.interp.mean_vector import Block, has_acts, write_acts

    run = open_run(tmp_path / "run", "mean_vector", {})
    names = (os.fsdecode(b"\xff.jpg"), "x" * 251 + ".jpg", "é.jpg")
    tensors = {name: torch.full((2, 3), float(n)) for n, name in enumerate(names)}
    tensors["copy of é.jpg"] = tensors["é.jpg"]
    names = (*names, "copy of é.jpg")
    write_acts(run.path / "acts" / "block-000000.safetensors", tensors)
    block = Block("block-000000", names)
    assert has_acts(run, block, set(names)) and not has_acts(run, block, set(names[1:]))
    kept = load_file(run.path / "acts" / "block-000000.safetensors")
    assert kept["\\udcff.jpg"].eq(0).all()
    assert kept["é.jpg"].eq(2).all() and kept["copy of é.jpg"].eq(2).all()

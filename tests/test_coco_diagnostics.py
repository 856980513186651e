"""The COCO driver by its real command line, on small random models: numbers recomputed from what it
stores, resume, shards, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.conftest import in_process
from vlmdiag.model import prompts
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import rundirs

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "diagnostic_tools" / "run_coco_diagnostics.py"
PROBES = [
    "--restrict_to_past",
    "--probe_hidden_norms",
    "--max_new_tokens",
    "5",
    "--delta_steps",
    "1",
    "2",
]


@pytest.fixture(scope="module")
def command():
    """The driver's main() in this process, ended as its command line ends."""
    return in_process(DRIVER)


def test_the_real_command_line_gives_the_same_bytes(run, coco, folders, tmp_path):
    more = arguments(coco, folders["llava"], tmp_path, "--batch_size", 3, "--save_hidden_grid")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(DRIVER), *map(str, more)],
        capture_output=True,
        text=True,
        cwd=ROOT / "diagnostic_tools",
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    assert files(tmp_path / "llava__sp-0") == files(run)


@pytest.fixture(scope="module")
def coco(tmp_path_factory, pictures):
    """A COCO folder of six pictures, one of them broken."""
    root = tmp_path_factory.mktemp("coco")
    (root / "val").mkdir()
    images = []
    for i in range(6):
        name = f"{i + 1:012d}.jpg"
        pictures[i % 3].save(root / "val" / name, quality=95)
        images.append({"id": i + 1, "file_name": name, "width": 1, "height": 1})
    (root / "val" / images[4]["file_name"]).write_bytes(
        (root / "val" / images[0]["file_name"]).read_bytes()[:900]
    )
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": []}))
    return root


def arguments(coco, model, out, *more, images=4):
    where = [
        "--image_dir",
        coco / "val",
        "--ann_file",
        coco / "captions.json",
        "--out_root",
        out,
        "--max_images",
        images,
        "--no_self_check",
    ]
    return ["--model_path", model, *where, *PROBES, *more]


def files(run):
    """Of per_image, but for what a killed process left (runs.leases)."""
    return {
        path.name: path.read_bytes()
        for path in sorted((run / "per_image").iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def run(coco, folders, tmp_path_factory, command):
    out = tmp_path_factory.mktemp("runs")
    done = command(*arguments(coco, folders["llava"], out, "--batch_size", 3, "--save_hidden_grid"))
    assert done.returncode == 0, done.stderr
    return out / "llava__sp-0"


def test_the_run_holds_what_the_contract_says(run):
    meta = json.loads((run / "meta.json").read_text())
    assert meta["settings"]["strip_system_prompt"] is False and meta["settings"]["delta_steps"] == [
        1.0,
        2.0,
    ]
    preds = json.loads((run / "preds.json").read_text())
    assert [p["image_id"] for p in preds] == [1, 2, 3, 4]
    arrays = dict(np.load(run / "per_image" / "000000000001.npz"))
    assert (
        arrays["head_vision_share"].shape == (6, 4)
        and arrays["delta_gv_all"].shape == (2, 6, 4)
        and arrays["hidden_norms_vision"].shape == (7,)
    )
    assert np.array_equal(arrays["delta_gv"], arrays["delta_gv_all"][0])
    assert np.allclose(arrays["group_mass"].sum(0), 1, atol=1e-5) and np.allclose(
        arrays["layer_shares"].sum(0), 1, atol=1e-5
    )


def test_anyone_can_recompute_the_numbers_from_what_is_stored(run, load, coco):
    """Prompt, generated ids and spans of the JSON -> plain eager pass -> the NPZ's numbers."""
    vlm = load("llava")
    for path in sorted((run / "per_image").glob("*.json")):
        record, arrays = json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))
        image = load_image(coco / "val" / record["file_name"])
        inputs = vlm.processor(images=image, text=record["prompt"], return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([record["generated_ids"]])], 1)
        vlm.parts.decoder.set_attn_implementation("eager")
        with torch.no_grad():
            out = vlm.model(
                input_ids=ids,
                pixel_values=inputs["pixel_values"],
                output_attentions=True,
                output_hidden_states=True,
            )
        vlm.parts.decoder.set_attn_implementation("sdpa")
        total, steps = inputs["input_ids"].shape[1], record["n_steps"]
        maps = torch.stack(out.attentions)[:, 0].double().numpy()
        where = {
            name: [i for start, end in parts for i in range(start, end)]
            for name, parts in record["spans"].items()
        }
        rows = maps[:, :, total - 1 : total - 1 + steps]  # (L, H, steps, K)
        vision, user = (
            rows[..., where["vision"]].sum(-1),
            rows[..., where["user"] + where["template"]].sum(-1),
        )
        system = rows[..., where["system"]].sum(-1)
        assert np.allclose(
            arrays["head_vision_share"], (vision / (vision + user)).mean(-1), atol=1e-5
        )
        mass = dict(zip(record["groups"], arrays["group_mass"], strict=True))
        assert np.allclose(mass["system"], system.mean(-1), atol=1e-5)
        assert np.allclose(mass["bos"], rows[..., 0].mean(-1), atol=1e-5)
        # shares: heads averaged, BOS zeroed and the row renormalised per layer, layers averaged
        row = rows.mean(1)
        row[..., 0] = 0
        row = (row / row.sum(-1, keepdims=True)).mean(0)
        v, u, s = (row[:, where[name]].sum(-1) for name in ("vision", "user", "system"))
        u = u + row[:, where["template"]].sum(-1)
        for name, value in {
            "vision": v / (v + u),
            "text": u / (v + u),
            "sys": s / (v + u + s),
            "vision_withsys": v / (v + u + s),
        }.items():
            assert np.allclose(record["shares"][name], value, atol=1e-5)
            assert record[f"mean_{name}_share"] == pytest.approx(value.mean(), abs=1e-5)
        layers = np.stack([part.mean(1) for part in (system, vision, user)])
        assert np.allclose(arrays["layer_shares"], (layers / layers.sum(0)).mean(-1), atol=1e-5)
        assert record["chance_vision_share"] == pytest.approx(
            len(where["vision"]) / len(where["vision"] + where["user"] + where["template"])
        )
        norms = (
            torch.stack(out.hidden_states)[:-1, 0, :total].norm(dim=-1).numpy()
        )  # the last one is after the final norm
        assert np.allclose(arrays["hidden_norms_grid"][:-1], norms, rtol=1e-4)
        assert np.allclose(
            arrays["hidden_norms_vision"][:-1], norms[:, where["vision"]].mean(-1), rtol=1e-4
        )
        assert np.allclose(
            arrays["hidden_norms_sys"][:-1], norms[:, where["system"]].mean(-1), rtol=1e-4
        )
        # RoPE probe, the query row's own key left out
        last = maps[:, :, total - 1, :total].copy()
        last[..., -1] = 0
        alpha = (last / last.sum(-1, keepdims=True))[..., where["vision"]].sum(-1)
        assert np.allclose(arrays["alphaV"], alpha, atol=1e-5)


def test_interrupted_sharded_and_resumed_runs_give_the_same_bytes(
    run, coco, folders, tmp_path, command
):
    more = ["--batch_size", 3, "--save_hidden_grid"]
    for i in (1, 0):
        assert (
            command(
                *arguments(coco, folders["llava"], tmp_path / "shards", *more, "--shard", f"{i}/2")
            ).returncode
            == 0
        )
    assert files(tmp_path / "shards" / "llava__sp-0") == files(run)
    process = subprocess.Popen(
        [
            sys.executable,
            str(DRIVER),
            *map(str, arguments(coco, folders["llava"], tmp_path / "killed", *more)),
        ],
        stdout=subprocess.DEVNULL,
    )
    target = tmp_path / "killed" / "llava__sp-0" / "per_image"
    for _ in range(600):
        if target.exists() and any(target.iterdir()) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command(*arguments(coco, folders["llava"], tmp_path / "killed", *more)).returncode == 0
    assert files(tmp_path / "killed" / "llava__sp-0") == files(run)


def test_another_batch_size_gives_the_same_numbers(run, coco, folders, tmp_path, command):
    assert (
        command(
            *arguments(coco, folders["llava"], tmp_path, "--batch_size", 1, "--save_hidden_grid")
        ).returncode
        == 0
    )
    for path in sorted((run / "per_image").glob("*.npz")):
        a, b = np.load(path), np.load(tmp_path / "llava__sp-0" / "per_image" / path.name)
        for key in a.files:
            assert np.allclose(a[key], b[key], atol=1e-5, rtol=1e-5), key


def test_a_run_grows_and_bad_pictures_are_failures(coco, folders, tmp_path, command):
    out = arguments(coco, folders["qwen"], tmp_path, "--num_workers", 0)
    assert (
        command(
            *out[: out.index("--max_images")],
            "--max_images",
            2,
            *out[out.index("--max_images") + 2 :],
        ).returncode
        == 0
    )
    first = files(tmp_path / "qwen__sp-0")
    grown = command(*arguments(coco, folders["qwen"], tmp_path, images=6))
    assert grown.returncode == 3 and "1 of 6 items failed" in grown.stdout, grown.stderr
    after = files(tmp_path / "qwen__sp-0")
    assert len(after) == 10 and first.items() <= after.items()
    failure = json.loads((tmp_path / "qwen__sp-0" / "failures" / "000000000005.json").read_text())
    assert "000000000005.jpg" in failure["message"]
    whole = tmp_path / "mended"
    shutil.copytree(coco, whole)
    shutil.copy(whole / "val" / "000000000001.jpg", whole / "val" / "000000000005.jpg")
    retried = command(*arguments(whole, folders["qwen"], tmp_path, images=6))
    assert retried.returncode == 0 and not list((tmp_path / "qwen__sp-0" / "failures").iterdir())


def test_the_folder_is_named_by_what_the_prompt_contains(coco, folders, tmp_path, command):
    assert (
        command(
            *arguments(coco, folders["llava"], tmp_path, "--strip_system_prompt", images=1)
        ).returncode
        == 0
    )
    record = json.loads((tmp_path / "llava__sp-1" / "per_image" / "000000000001.json").read_text())
    assert "system" not in record["spans"] and record["mean_sys_share"] == 0
    nothing = command(
        *arguments(
            coco,
            folders["llava"],
            tmp_path,
            "--strip_system_prompt",
            "--prompt_template",
            "USER: {image} {question} ASSISTANT:",
            images=1,
        )
    )
    assert nothing.returncode == 2 and "no system prompt to leave out" in nothing.stderr


def one_line(done, *words):
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]


def test_wrong_usage_is_one_clear_line(run, coco, folders, tmp_path, command):
    base = arguments(coco, folders["llava"], run.parent, "--batch_size", 3, "--save_hidden_grid")
    one_line(command(*base, "--prompt_text", "Why?"), "prompt_text", "--overwrite")
    other = tmp_path / "llava"
    shutil.copytree(folders["llava"], other)
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    one_line(
        command(*arguments(coco, other, run.parent, "--batch_size", 3, "--save_hidden_grid")),
        "fingerprint",
    )
    one_line(command(*arguments(coco, tmp_path / "nowhere", tmp_path)), "no such folder")
    one_line(
        command(
            "--model_path",
            folders["llava"],
            "--image_dir",
            tmp_path,
            "--ann_file",
            folders["llava"] / "config.json",
        ),
        "not a COCO annotation file",
    )
    (tmp_path / "file").write_text("")
    one_line(
        command(*arguments(coco, folders["llava"], tmp_path / "file" / "runs")), "cannot write"
    )
    lacking = tmp_path / "lacking"
    shutil.copytree(folders["llava"], lacking)
    from safetensors.torch import load_file, save_file

    weights = load_file(lacking / "model.safetensors")
    name = next(key for key in weights if "linear_2" in key)
    del weights[name]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    one_line(command(*arguments(coco, lacking, tmp_path)), "in no file", "linear_2")
    sharded = tmp_path / "sharded"
    LlavaForConditionalGeneration.from_pretrained(folders["llava"]).save_pretrained(
        sharded, max_shard_size="2MB"
    )
    for name in (
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copy(folders["llava"] / name, sharded / name)
    assert command(*arguments(coco, sharded, tmp_path, images=1)).returncode == 0
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    one_line(command(*arguments(coco, sharded, tmp_path)), shard.name)
    one_line(command("--model_path", "x"), "--image_dir")


def test_given_answers_are_measured_as_generated_ones_are(run, coco, folders, tmp_path, command):
    preds = [json.loads(path.read_text()) for path in sorted((run / "per_image").glob("*.json"))]
    given = tmp_path / "answers.json"
    given.write_text(
        json.dumps(
            [{"image_id": p["image_id"], "generated_ids": p["generated_ids"]} for p in preds]
        )
    )
    done = command(
        *arguments(
            coco,
            folders["llava"],
            tmp_path,
            "--batch_size",
            3,
            "--answers",
            given,
            "--run_name",
            "given",
            "--save_hidden_grid",
        )
    )
    assert done.returncode == 0, done.stderr
    for path in sorted((run / "per_image").glob("*.npz")):
        a, b = np.load(path), np.load(tmp_path / "llava__given__sp-0" / "per_image" / path.name)
        for key in a.files:
            assert np.allclose(a[key], b[key], atol=1e-6), key
    given.write_text(json.dumps([{"image_id": 1, "caption": "a red circle"}]))
    one_line(
        command(
            *arguments(coco, folders["llava"], tmp_path, "--answers", given, "--run_name", "other")
        ),
        "no caption for 3 of 4 images",
    )


@pytest.fixture
def given_to(coco, folders, tmp_path, command):
    """given_to(name, entries, flags) -> the folder of a run with these entries as FLAG's file."""

    def run(name, entries, flag, *more):
        given = tmp_path / f"{name}.json"
        given.write_text(json.dumps(entries))
        more = ["--run_name", name, flag, given, "--batch_size", 2, *more]
        done = command(*arguments(coco, folders["llava"], tmp_path, *more))
        return done, tmp_path / f"llava__{name}__sp-0"

    return run


def test_drafts_change_no_number_and_are_counted(run, folders, coco, given_to, command, tmp_path):
    """Right answers, those of another scale, of another model, and ids that are none of it."""
    plain = [json.loads(path.read_text()) for path in sorted((run / "per_image").glob("*.json"))]
    entries = [{key: p[key] for key in ("image_id", "caption", "generated_ids")} for p in plain]
    done, drafted = given_to("own", entries, "--drafts", "--save_hidden_grid")
    assert done.returncode == 0, done.stderr
    counters = rundirs.read_run(drafted, rundirs.COCO).counters()
    assert counters["draft_agreed"] >= 4 * 3 and counters["draft_passes"] == 2
    texts = [{"image_id": p["image_id"], "caption": "a red circle"} for p in plain]
    _, wrong = given_to("wrong", texts, "--drafts", "--save_hidden_grid")
    foreign = [entry | {"generated_ids": [10**6, 3]} for entry in entries]
    _, foreign = given_to("foreign", foreign, "--drafts", "--save_hidden_grid")
    for other in (drafted, wrong, foreign):
        for path in sorted((run / "per_image").glob("*.npz")):
            a, b = np.load(path), np.load(other / "per_image" / path.name)
            for key in a.files:
                assert np.allclose(a[key], b[key], atol=1e-5, equal_nan=True), key
            record = json.loads((other / "per_image" / path.with_suffix(".json").name).read_text())
            expected = json.loads(path.with_suffix(".json").read_text())
            assert record["generated_ids"] == expected["generated_ids"]
    meta = json.loads((drafted / "meta.json").read_text())
    assert meta["settings"]["drafts"] == "own.json"

    more = ["--vision_scale", 0.3]
    scaled = command(*arguments(coco, folders["llava"], tmp_path, *more, "--run_name", "scaled"))
    assert scaled.returncode == 0, scaled.stderr
    _, both = given_to("both", entries, "--drafts", *more)
    for path in sorted((both / "per_image").glob("*.json")):
        expected = tmp_path / "llava__scaled__sp-0" / "per_image" / path.name
        a, b = json.loads(path.read_text()), json.loads(expected.read_text())
        assert a["generated_ids"] == b["generated_ids"]
        assert np.allclose(a["shares"]["vision"], b["shares"]["vision"], atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [("--answers", "x.json"), ("--do_sample",), ("--pos_only",)],
    ids=lambda flags: flags[0],
)
def test_drafts_are_of_greedy_answers(coco, folders, tmp_path, command, flags):
    more = arguments(coco, folders["llava"], tmp_path, "--drafts", "y.json", *flags)
    one_line(command(*more), "--drafts are of greedy answers")


def test_paper_compat_and_scaling_change_what_they_say(run, coco, folders, tmp_path, command):
    first = "000000000001.npz"
    plain = dict(np.load(run / "per_image" / first))
    assert (
        command(*arguments(coco, folders["llava"], tmp_path, "--paper_compat", images=1)).returncode
        == 0
    )
    compat = dict(np.load(tmp_path / "llava__sp-0" / "per_image" / first))
    assert np.allclose(
        compat["head_vision_share"], plain["head_vision_share"], atol=1e-5
    )  # no head without vision and text here
    assert not np.allclose(
        compat["alphaV"], plain["alphaV"], atol=1e-3
    )  # the query row is an EOS token
    assert np.allclose(
        compat["hidden_norms_vision"][:-1], plain["hidden_norms_vision"][:-1], rtol=1e-4
    )
    assert not np.allclose(
        compat["hidden_norms_vision"][-1], plain["hidden_norms_vision"][-1], rtol=1e-2
    )  # after the final norm
    assert (
        command(
            *arguments(
                coco,
                folders["llava"],
                tmp_path,
                "--vision_scale",
                "3",
                "--run_name",
                "x3",
                images=1,
            )
        ).returncode
        == 0
    )
    scaled = dict(np.load(tmp_path / "llava__x3__sp-0" / "per_image" / first))
    assert np.allclose(
        scaled["hidden_norms_vision"][0], 3 * plain["hidden_norms_vision"][0], rtol=1e-4
    )
    assert np.allclose(
        scaled["hidden_norms_user_text"][0], plain["hidden_norms_user_text"][0], rtol=1e-4
    )


def test_every_picture_format_goes_through(coco, folders, tmp_path, command):
    shutil.copytree(coco, tmp_path / "coco")
    odd = [
        Image.new("CMYK", (40, 30)),
        Image.new("P", (33, 20)),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (4000, 6)),
        Image.new("I;16", (30, 30)),
    ]
    content = json.loads((tmp_path / "coco" / "captions.json").read_text())
    content["images"] = []
    for i, image in enumerate(odd):
        name = f"odd{i}.{'jpg' if image.mode == 'CMYK' else 'png'}"
        image.save(tmp_path / "coco" / "val" / name)
        content["images"].append({"id": 100 + i, "file_name": name})
    (tmp_path / "coco" / "captions.json").write_text(json.dumps(content))
    done = command(*arguments(tmp_path / "coco", folders["llava"], tmp_path, images=9))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_shows_images_per_second_and_help_shows_defaults(
    coco, folders, tmp_path, command
):
    done = command("--help")
    assert (
        done.returncode == 0
        and "(default: 64)" in done.stdout
        and "--max-new-tokens" in done.stdout
    )


def test_one_image_measured_alone_from_the_library(load, coco):
    """The functions behind the script, without it."""
    vlm = load("llava")
    batch = vlm.encode(
        [Sample("0", None, "Describe the image.")], [load_image(coco / "val" / "000000000001.jpg")]
    )
    assert prompts.prompt_for(vlm, "Describe the image.")[0] == batch.prompts[0]

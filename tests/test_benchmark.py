"""The benchmark by its real command line on a very small model, and that it compares before it
measures. Nothing is asserted about time."""

import itertools
import json
import mmap
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_growth,
    bench_peers,
    cases,
    gpu_row,
    measuring,
    variants_diagnostics,
    variants_peers,
    variants_relevancy,
    variants_swap,
)
from benchmarks.variants_growth import EXPERIMENTS
from tests.conftest import command_module
from vlmdiag import cli

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "bench_diagnostics.py"


@pytest.fixture(scope="module")
def on_gpu(warm_python, tmp_path_factory):
    """(folder, what was printed) of gpu.sh with QUICK=1, which runs most benchmarks by their
    command lines."""
    folder = tmp_path_factory.mktemp("gpu")
    variables = {"QUICK": "1", "OUT": str(folder), "PYTHON": warm_python}
    variables["PYTHONWARNINGS"] = "error"
    done = gpu_script(variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def gpu_script(variables):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


@pytest.fixture
def quick(on_gpu, warm_python, tmp_path):
    """quick(name, flags) -> (report, what was printed) of a benchmark by its command line."""

    def run(name, *flags):
        out = on_gpu[0] / f"{name}.json"
        if out.is_file():
            error = out.with_suffix(".err").read_text()
            assert not error.strip(), error
            return json.loads(out.read_text()), out.with_suffix(".txt").read_text()
        out = tmp_path / "bench.json"
        command = [warm_python, "-W", "error", str(ROOT / "benchmarks" / f"bench_{name}.py")]
        command += ["--quick", "--threads", "1", "--out", str(out), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not done.stderr.strip(), done.stderr
        return json.loads(out.read_text()), done.stdout

    return run


# The commands of benchmarks/README.md are run here once each; its other ones need hours.
SCRIPTS = (
    "diagnostics",
    "interventions",
    "known_answers",
    "volcano",
    "swap",
    "relevancy",
    "fits",
    "peers",
    "growth",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interventions", "known_answers", "volcano"])
def test_a_quick_benchmark_gives_a_table_and_a_report(quick, name):
    report, printed = quick(name)
    assert report["size"] == "quick"
    assert report["machine"]["threads"] == 1
    assert len(table_of(printed)) > 3


def table_of(printed):
    """The lines of the Markdown table."""
    return [line for line in printed.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def bench():
    return command_module(FILE)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    vlm = cases.build("quick", 100, "cpu", folder)
    return cases.Case(vlm, cases.make_samples(folder, 2), 3, folder)


@pytest.mark.slow
def test_the_command_line_gives_a_table_and_a_report(quick):
    report, printed = quick("diagnostics")
    assert report["size"] == "quick"
    assert report["dtype"] == "float32"
    assert report["new_tokens"] == 4
    assert report["repeats"] == 1
    names = {"cpu", "cores", "threads", "gpu", "python", "torch", "transformers", "date"}
    assert set(report["machine"]) == names
    assert report["machine"]["threads"] == 1
    (equal,) = report["equal_outputs"].values()
    compared = {
        "alphaV",
        "share_prod_notV",
        "delta_gv",
        "delta_alphaV",
        "head_vision_share",
        "hidden_norms_vision",
        "hidden_norms_user_text",
        "hidden_norms_sys",
        "mean_vision_share",
        "mean_text_share",
        "mean_sys_share",
    }
    assert {f"{name} (--paper_compat)" for name in compared} <= set(equal)
    timed = {"head_vision_share", "hidden_norms_vision", "mean_sys_share"}
    assert {f"{name} (as timed)" for name in timed} <= set(equal)
    assert 0 <= max(equal.values()) <= report["tolerance"] == 1e-4
    floor, ours, published = report["rows"]
    assert [row["variant"] for row in report["rows"]] == ["floor", "ours", "published"]
    for row in report["rows"]:
        assert (row["prompt_tokens"], row["vision_tokens"], row["batch"]) == (121, 81, 2)
        assert len(row["seconds"]) == 1
        assert row["median_seconds"] > 0
    assert floor["x_floor"] == published["published_to_this"] == 1
    assert floor["extra_mib"] in (0, None)
    assert ours["x_floor"] * ours["published_to_this"] == pytest.approx(published["x_floor"])
    table = table_of(printed)
    assert len(table) == 5
    assert len({line.count("|") for line in table}) == 1
    assert "equal outputs: all captions" in printed
    assert report["machine"]["cpu"] in printed


PLAIN = {
    name: getattr(variants_diagnostics.diagnostics, name)
    for name in ("head_vision_share", "group_norms", "step_shares", "RopeShift")
}


def other_answers(case):
    """A floor whose second answer is reversed."""
    answers, run = PLAIN_FLOOR(case)

    def wrong():
        run()
        answers[1].reverse()

    return answers, wrong


PLAIN_FLOOR = variants_diagnostics.floor
# what is wrong -> (name of a function of the diagnostics, what stands in its place)
MUTANTS = {
    "head_vision_share": (
        "head_vision_share",
        lambda *args: PLAIN["head_vision_share"](*args) + 2e-4,
    ),
    "hidden_norms": (
        "group_norms",
        lambda norms, groups: PLAIN["group_norms"](norms, groups.roll(1, 1)),
    ),
    "mean_vision_share": (
        "step_shares",
        lambda mass, compat: PLAIN["step_shares"](mass.roll(1, -1), compat),
    ),
    "NaN": ("head_vision_share", lambda *args: PLAIN["head_vision_share"](*args) + float("nan")),
    "delta_gv": (
        "RopeShift",
        lambda batch, rotary, deltas, past: PLAIN["RopeShift"](batch, rotary, [2.0], past),
    ),
    "alphaV": (
        "RopeShift",
        lambda batch, rotary, deltas, past: PLAIN["RopeShift"](batch, rotary, deltas, not past),
    ),
}
MESSAGES = {"NaN": "head_vision_share .* differ by nan"}


def test_equal_outputs_pass(case):
    assert max(variants_diagnostics.check(case).values()) < 1e-5


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_output_stops_the_benchmark(case, mutant, monkeypatch):
    name, replacement = MUTANTS[mutant]
    monkeypatch.setattr(variants_diagnostics.diagnostics, name, replacement)
    with pytest.raises(AssertionError, match=MESSAGES.get(mutant, mutant)):
        variants_diagnostics.check(case)


def test_other_captions_stop_the_benchmark(case, monkeypatch):
    monkeypatch.setattr(variants_diagnostics, "floor", other_answers)
    with pytest.raises(AssertionError, match="other captions"):
        variants_diagnostics.check(case)


def test_outputs_are_compared_before_anything_is_measured(bench, monkeypatch):
    def compared(case):
        raise AssertionError("compared")

    monkeypatch.setattr(variants_diagnostics, "check", compared)
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(AssertionError, match="compared"):
        bench.main(["--quick", "--threads", "1"])


def test_ratios_are_medians_within_rounds_of_alternating_order(bench, case, monkeypatch):
    calls = []
    # the first of each is the warm-up
    planted = {"floor": [9, 1, 2, 10], "ours": [9, 1.1, 2.4, 10], "published": [9, 3, 8, 20]}

    def seconds(case, name):
        calls.append(name)
        return planted[name][calls.count(name) - 1]

    monkeypatch.setattr(bench, "seconds_of", seconds)
    monkeypatch.setattr(
        bench, "peaks", lambda *args: {"floor": 10.0, "ours": 11.5, "published": None}
    )
    floor, ours, published = bench.measure(bench.parse_args(["--repeats", "3"]), case, 100)
    order = ["floor", "ours", "published"]
    assert calls == order + order + order[::-1] + order
    assert ours["x_floor"] == pytest.approx(1.1)
    assert published["x_floor"] == 3
    assert ours["median_seconds"] == 2.4  # 2.4 / 2 would be 1.2
    assert ours["published_to_this"] == pytest.approx(np.median([3 / 1.1, 8 / 2.4, 2]))
    assert ours["extra_mib"] == 1.5
    assert "not measured" in measuring.table([published], "image", ("batch",))


def hold(mebibytes):
    """Take memory from the kernel and give it back, whatever an allocator keeps."""
    with mmap.mmap(-1, mebibytes * 2**20) as memory:
        for page in range(0, len(memory), 4096):
            memory[page] = 1


def test_the_peak_is_the_memory_in_use(bench, case, monkeypatch):
    # the smaller one second: an earlier peak must not count
    for mebibytes in (128, 64):
        monkeypatch.setitem(
            variants_diagnostics.VARIANTS,
            "planted",
            lambda case, size=mebibytes: (None, lambda: hold(size)),
        )
        # a kernel that takes pages back meanwhile lowers some
        peaks = [bench.peak_of(case, "planted") for _ in range(5)]
        assert None in peaks or any(mebibytes - 1 < peak < mebibytes + 12 for peak in peaks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_seven_billion_parameters_need_a_gpu(bench, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: bench.main(["--size", "7b"]))
    assert end.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_wrong_numbers_are_refused(bench, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args(["--prompt", "20"])
    assert end.value.code == 2
    assert "from 50 to" in capsys.readouterr().err


# --- the states of swap pairs ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_swap_benchmark_gives_a_table_and_a_report(quick):
    report, printed = quick("swap")
    assert report["size"] == "quick"
    assert report["dtype"] == "float32"
    assert report["repeats"] == 1
    assert 0 <= report["worst"] <= report["tolerance"] == 1e-4
    kinds = [(row["answer"], row["work"], row["variant"]) for row in report["rows"]]
    variants = ("floor", "ours", "published")
    wanted = itertools.product(("ends", "goes on"), ("pair", "pair + quad"), variants)
    assert kinds == list(wanted)
    for row in report["rows"]:
        assert row["batch"] == 2
        assert len(row["seconds"]) == 1
        assert row["median_seconds"] > 0
        if row["variant"] == "published":
            assert row["published_to_this"] == 1
        if row["variant"] == "floor":
            assert row["x_floor"] == 1
            assert row["extra_mib"] in (0, None)
    table = table_of(printed)
    assert len(table) == 14
    assert len({line.count("|") for line in table}) == 1
    assert "equal outputs: all read answers" in printed
    assert report["machine"]["cpu"] in printed


@pytest.fixture(scope="module")
def swap(tmp_path_factory):
    """The case of the swap benchmark."""
    case = variants_swap.make_case("quick", 100, 2, "cpu", tmp_path_factory.mktemp("swap"))
    case.answer_by("ends")
    return case


SWAP_MUTANTS = {
    "quad states differ": lambda pairs, quads, answers: (pairs, quads[:, [1, 0, 2, 3]], answers),
    "states differ by .* in layer": lambda pairs, quads, answers: (
        pairs[:, :, ::-1],
        quads,
        answers,
    ),
    "states differ by nan": lambda pairs, quads, answers: (pairs * np.nan, quads, answers),
    "other answers": lambda pairs, quads, answers: (pairs, quads, [("close", "far")] * 2),
}


@pytest.mark.parametrize("message", SWAP_MUTANTS)
def test_a_wrong_state_or_answer_stops_the_swap_benchmark(swap, message, monkeypatch):
    plain = variants_swap.ours
    assert variants_swap.check(swap, "ends") < 1e-5
    with pytest.raises(AssertionError, match="was to go on"):
        variants_swap.check(swap, "goes on")
    monkeypatch.setattr(
        variants_swap, "ours", lambda case, quad: SWAP_MUTANTS[message](*plain(case, quad))
    )
    with pytest.raises(AssertionError, match=message):
        variants_swap.check(swap, "ends")


def test_answers_of_the_swap_benchmark_are_the_planted_ones(swap):
    variants = (variants_swap.ours, variants_swap.published)
    ours, published = (variant(swap, False).answers for variant in variants)
    assert ours == published == [("far", "far")] * 2
    swap.answer_by("goes on")
    ours, published = (variant(swap, False).answers for variant in variants)
    swap.answer_by("ends")
    assert ours == [("far.", "far.")] * 2
    for both in published:
        for text in both:
            assert text.startswith("far.")
            assert len(swap.vlm.tokenizer(text).input_ids) > 12


# --- relevancy ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_relevancy_benchmark_compares_and_reports(quick):
    report, printed = quick("relevancy")
    assert [row["variant"] for row in report["rows"]] == ["floor", "ours", "published"]
    assert report["new_tokens"] == 4
    assert report["rows"][0]["x_floor"] == 1
    assert report["rows"][2]["published_to_this"] == 1
    assert "equal outputs: image relevancy" in printed
    assert len(table_of(printed)) == 5


def test_other_relevancy_stops_its_benchmark(monkeypatch):
    maps = np.random.default_rng(0).random((3, 2, 9))
    monkeypatch.setattr(variants_relevancy, "published", lambda case: maps)
    for other, same in ((maps * (1 + 1e-5), True), (maps[::-1], False), (maps * 1.01, False)):
        monkeypatch.setattr(variants_relevancy, "ours", lambda case, other=other: other)
        if same:
            assert variants_relevancy.check(None) < 1e-4
        else:
            with pytest.raises(AssertionError, match="relevancy differs"):
                variants_relevancy.check(None)


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_of_peers_says_who_is_not_installed(quick):
    report, printed = quick("peers")
    assert 0 <= report["worst"] <= variants_peers.TOLERANCE
    kinds = [(row["job"], row["variant"]) for row in report["rows"]]
    assert kinds == list(itertools.product(variants_peers.JOBS, variants_peers.VARIANTS))
    for row in report["rows"]:
        assert (row["prompt"], row["batch"]) == (121, 2)
        if package := bench_peers.missing(row["variant"]):
            assert row["why_not"] == f"{package} is not installed"
            assert report["packages"][package] is None
        else:
            (seconds,), (of_floor,) = row["cpu_seconds"], row["floor_cpu_seconds"]
            assert row["x_floor"] == seconds / of_floor > 0
    assert report["packages"]["transformers"] == report["machine"]["transformers"]
    assert "equal outputs: all jobs of all variants" in printed
    table = table_of(printed)
    assert len(table) == 2 + len(kinds)
    assert len({line.count("|") for line in table}) == 1


@pytest.fixture(scope="module")
def outputs(case):
    """{variant: {job: {quantity: array}}} of those without further packages."""
    model = variants_peers.Model(case.vlm, cases.encode_samples(case.vlm, case.samples))
    outputs = {}
    with torch.no_grad():
        for name in ("floor", "ours", "transformers"):
            for job, work in variants_peers.VARIANTS[name](model).items():
                arrays = {quantity: of_job.numpy() for quantity, of_job in work().items()}
                outputs.setdefault(name, {})[job] = arrays
    return outputs


def test_only_the_maps_of_a_peer_need_eager_attention(case, monkeypatch):
    model = variants_peers.Model(case.vlm, cases.encode_samples(case.vlm, case.samples))
    config = case.vlm.parts.decoder.config
    ran = []
    plain = model.forward

    def forward(**options):
        ran.append(config._attn_implementation)
        return plain(**options)

    monkeypatch.setattr(model, "forward", forward)
    with torch.no_grad():
        for work in variants_peers.transformers(model).values():
            work()
    assert ran == ["eager", "sdpa", "sdpa"]


def test_peers_agree_with_ours(outputs):
    assert variants_peers.check(outputs) < 1e-5
    layers, pictures, heads, shares = outputs["ours"][variants_peers.ATTENTION]["shares"].shape
    assert (layers, pictures, heads, shares) == (2, 2, 2, 2)
    of_picture = outputs["ours"][variants_peers.ATTENTION]["shares"][..., 0]
    assert 0 < of_picture.min() < of_picture.max() < 1


@pytest.mark.parametrize(
    ("job", "quantity", "mutant"),
    [
        (variants_peers.ATTENTION, "shares", lambda shares: shares[..., ::-1]),
        (variants_peers.ATTENTION, "shares", lambda shares: shares[:, :, ::-1]),
        (variants_peers.NORMS, "norms", lambda norms: norms[::-1]),
        (variants_peers.NORMS, "norms", lambda norms: norms[..., 1:]),
        (variants_peers.LENS, "ids", lambda ids: ids[::-1]),
        (variants_peers.LENS, "probabilities", lambda values: values * np.nan),
    ],
)
def test_a_peer_with_other_outputs_stops_the_benchmark(outputs, job, quantity, mutant):
    of_job = outputs["transformers"][job]
    wrong = {**outputs["transformers"], job: {**of_job, quantity: mutant(of_job[quantity])}}
    with pytest.raises(AssertionError, match=f"{quantity} of transformers .* differ from ours"):
        variants_peers.check({**outputs, "transformers": wrong})


def test_peers_are_compared_before_they_are_timed(monkeypatch):
    def compared(outputs):
        raise AssertionError("compared")

    calls = []
    monkeypatch.setattr(measuring, "in_processes", lambda *args: calls.append(args))
    monkeypatch.setattr(bench_peers, "read_outputs", lambda path: {})
    monkeypatch.setattr(variants_peers, "check", compared)
    with pytest.raises(AssertionError, match="compared"):
        bench_peers.main(["--quick", "--threads", "1"])
    assert len(calls) == 1


# --- growth ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_of_growth_gives_exponents_and_a_figure(quick, tmp_path):
    figure = tmp_path / "growth.png"
    # PSI grows with everything; the other experiments run in bench_fits.py too
    only = ["token norms", "PSI"]
    report, printed = quick("growth", "--only", *only, "--figure", str(figure))
    assert figure.stat().st_size > 20_000
    of_time = [row for row in report["rows"] if row["quantity"] == "seconds"]
    kinds = [(row["experiment"], row["axis"]) for row in of_time]
    assert kinds == [(name, axis) for name in only for axis in EXPERIMENTS[name][1]]
    for row in report["rows"]:
        assert row["sizes"] == bench_growth.QUICK[row["axis"]][1]
        assert row["expected"] in (1, 2)
    assert len(table_of(printed)) >= 4


@pytest.mark.slow
def test_every_experiment_of_the_growth_runs(quick):
    report, _ = quick("fits")
    kinds = [(row["weights"], row["experiment"]) for row in report["rows"]]
    assert kinds == list(itertools.product(("bfloat16", "4 bits"), EXPERIMENTS))
    assert all(row["seconds"] > 0 for row in report["rows"])


def test_growth_above_what_the_work_asks_for_is_marked():
    sizes = [100, 200, 400]
    curves = {
        "PSI": {
            "picture": {
                "size": sizes,
                "seconds": [1 + (size / 100) ** 2 for size in sizes],
                "mib": [float(size) ** 1.5 for size in sizes],
            },
            "layers": {"size": sizes, "seconds": [2.0, 4.0, 8.0], "mib": [None, None, None]},
        },
        "relevancy": {
            "picture": {"size": sizes, "seconds": sizes, "mib": [size**2 for size in sizes]}
        },
    }
    rows = bench_growth.rows_of(curves)
    found = {(row["experiment"], row["axis"], row["quantity"]): row for row in rows}
    assert len(found) == 5
    time = found["PSI", "picture", "seconds"]
    assert time["exponent"] == pytest.approx(np.log2(17 / 5))
    assert time["expected"] == 2 and not time["above"]
    memory = found["PSI", "picture", "mib"]
    assert memory["exponent"] == pytest.approx(1.5)
    assert memory["expected"] == 1 and memory["above"]
    assert not found["PSI", "layers", "seconds"]["above"]
    assert found["relevancy", "picture", "mib"]["above"]
    assert bench_growth.table(rows).count("**1.50 of 1**") == 1


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_for_a_gpu_ends_with_a_row(on_gpu):
    _, printed = on_gpu
    header, _, row = table_of(printed)[-3:]
    assert header.startswith("| card | diagnosis, x floor |")
    assert header.count("|") == row.count("|")
    assert "not measured" not in row
    assert "exit code" not in printed


def test_the_parts_for_a_gpu_fit_into_five_minutes():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    parts = re.findall(r"^part (\d+) (\w+)", script, re.M)
    assert len(parts) == 7
    assert sum(int(limit) for limit, _ in parts) < 300
    for _, name in parts:
        assert (ROOT / "benchmarks" / f"bench_{name}.py").is_file()


def test_without_a_gpu_the_script_says_so(fake_python, tmp_path):
    python = fake_python("exit 1")
    done = gpu_script({"PYTHON": python, "OUT": str(tmp_path / "out"), "QUICK": ""})
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    assert "no GPU is visible here" in done.stderr


def test_a_part_that_fails_does_not_stop_the_others(fake_python, tmp_path):
    python = fake_python('case "$1" in *swap*) echo "no room" >&2; exit 1;; esac; echo "ran $1"')
    done = gpu_script({"PYTHON": python, "OUT": str(tmp_path / "out"), "QUICK": ""})
    assert done.returncode == 3
    assert "swap: exit code 1" in done.stdout and "no room" in done.stdout
    ran = re.findall(r"ran benchmarks/(\w+)", done.stdout)
    assert ran[-3:] == ["bench_volcano", "bench_relevancy", "gpu_row"]


@pytest.fixture
def fake_python(tmp_path):
    """fake_python(what it does) -> path of a program in Python's place."""

    def make(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_the_row_for_a_gpu_is_what_the_reports_say_of_ours(tmp_path, capsys):
    machine = {"gpu": "NVIDIA X"}
    rows = [
        {"experiment": "36 knockouts", "variant": "ours", "published_to_this": 21.0},
        {"experiment": "36 knockouts", "variant": "published", "published_to_this": 1.0},
        {"experiment": "18 ablations", "variant": "ours", "published_to_this": 5.5},
    ]
    reports = {
        "interventions": rows,
        "fits": [
            {"weights": "bfloat16", "experiment": "swap", "peak_gb": 15.5},
            {"weights": "bfloat16", "experiment": "PSI", "peak_gb": 15.25},
            {"weights": "4 bits", "experiment": "PSI", "peak_gb": None},
        ],
    }
    for name, of_part in reports.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"machine": machine, "rows": of_part}))
    assert gpu_row.main([str(tmp_path)]) == 0
    header, _, row = table_of(capsys.readouterr().out)
    cells = dict(zip(header.split(" | "), row.split(" | ")))
    assert cells["36 knockouts"] == "21.00"
    assert cells["18 ablations"] == "5.50"
    assert cells["GB, bfloat16"] == "15.50"
    assert cells["swap pair"] == cells["diagnosis"] == "not measured"
    assert row.startswith("| NVIDIA X |") and row.endswith(" not measured |")

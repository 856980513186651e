"""The benchmark by its real command line on a very small model, and that it compares before it
measures. Nothing is asserted about time."""

import itertools
import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import command_module
from vlmdiag import cli

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "bench_diagnostics.py"


@pytest.fixture(scope="module")
def bench():
    return command_module(FILE)


@pytest.fixture(scope="module")
def case(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    return bench.Case(
        bench.build("quick", 100, "cpu", folder), bench.make_samples(folder, 2), 3, folder
    )


def test_the_command_line_gives_a_table_and_a_report(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            str(FILE),
            "--quick",
            "--threads",
            "1",
            "--out",
            str(tmp_path / "bench.json"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (
        report["size"] == "quick"
        and report["dtype"] == "float32"
        and report["new_tokens"] == 4
        and report["repeats"] == 1
    )
    assert (
        set(report["machine"])
        == {"cpu", "cores", "threads", "gpu", "python", "torch", "transformers", "date"}
        and report["machine"]["threads"] == 1
    )
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
    }
    assert {
        f"{name} (--paper_compat)"
        for name in compared | {f"mean_{name}_share" for name in ("vision", "text", "sys")}
    } <= set(equal)
    assert {
        "head_vision_share (as timed)",
        "hidden_norms_vision (as timed)",
        "mean_sys_share (as timed)",
    } <= set(equal)
    assert 0 <= max(equal.values()) <= report["tolerance"] == 1e-4
    floor, ours, published = report["rows"]
    assert [row["variant"] for row in report["rows"]] == ["floor", "ours", "published"]
    for row in report["rows"]:
        assert (
            (row["prompt_tokens"], row["vision_tokens"], row["batch"]) == (121, 81, 2)
            and len(row["seconds"]) == 1
            and row["median_seconds"] > 0
        )
    assert floor["x_floor"] == published["published_to_this"] == 1 and floor["extra_mib"] in (
        0,
        None,
    )
    assert ours["x_floor"] * ours["published_to_this"] == pytest.approx(published["x_floor"])
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert "equal outputs: all captions" in done.stdout and report["machine"]["cpu"] in done.stdout


MUTANTS = {
    "head_vision_share": lambda bench, put: put(
        bench.diagnostics, "head_vision_share", shifted(bench.diagnostics.head_vision_share)
    ),
    "hidden_norms": lambda bench, put: put(
        bench.diagnostics,
        "group_norms",
        lambda norms, groups: ORIGINAL["group_norms"](norms, groups.roll(1, 1)),
    ),
    "mean_vision_share": lambda bench, put: put(
        bench.diagnostics,
        "step_shares",
        lambda mass, compat: ORIGINAL["step_shares"](mass.roll(1, -1), compat),
    ),
    "NaN": lambda bench, put: put(
        bench.diagnostics,
        "head_vision_share",
        shifted(bench.diagnostics.head_vision_share, float("nan")),
    ),
    "delta_gv": lambda bench, put: put(
        bench.diagnostics,
        "RopeShift",
        lambda batch, rotary, deltas, past: ORIGINAL["RopeShift"](batch, rotary, [2.0], past),
    ),
    "alphaV": lambda bench, put: put(
        bench.diagnostics,
        "RopeShift",
        lambda batch, rotary, deltas, past: ORIGINAL["RopeShift"](batch, rotary, deltas, not past),
    ),
    "other captions": lambda bench, put: put(bench, "floor", other_answers(bench.floor)),
}
WORDS = {"NaN": "head_vision_share .* differ by nan"}
ORIGINAL = {}


def shifted(function, by=2e-4):
    return lambda *args: function(*args) + by


def other_answers(floor):
    def wrong(case):
        answers, work = floor(case)
        return answers, lambda: (work(), answers[1].reverse())

    return wrong


def test_equal_outputs_pass(bench, case):
    assert max(bench.check(case).values()) < 1e-5


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_output_stops_the_benchmark(bench, case, mutant, monkeypatch):
    ORIGINAL.update(
        {
            name: getattr(bench.diagnostics, name)
            for name in ("group_norms", "step_shares", "RopeShift")
        }
    )
    MUTANTS[mutant](bench, monkeypatch.setattr)
    with pytest.raises(AssertionError, match=WORDS.get(mutant, mutant)):
        bench.check(case)


def test_outputs_are_compared_before_anything_is_measured(bench, monkeypatch):
    monkeypatch.setattr(
        bench, "check", lambda case: (_ for _ in ()).throw(AssertionError("compared"))
    )
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(AssertionError, match="compared"):
        bench.main(["--quick", "--threads", "1"])


def test_ratios_are_medians_within_rounds_of_alternating_order(bench, case, monkeypatch):
    calls, planted = (
        [],
        {"floor": [9, 1, 2, 10], "ours": [9, 1.1, 2.4, 10], "published": [9, 3, 8, 20]},
    )  # the first of each is the warm-up

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
    assert (
        ours["x_floor"] == pytest.approx(1.1)
        and published["x_floor"] == 3
        and ours["median_seconds"] == 2.4
    )  # 2.4 / 2 would be 1.2
    assert (
        ours["published_to_this"] == pytest.approx(np.median([3 / 1.1, 8 / 2.4, 2]))
        and ours["extra_mib"] == 1.5
    )
    assert "not measured" in bench.measuring.table([published], "image", ("batch",))


def test_the_peak_is_the_memory_in_use(bench, case, monkeypatch):
    def hold(mebibytes):
        with mmap.mmap(
            -1, mebibytes * 2**20
        ) as memory:  # from the kernel and back to it, whatever an allocator keeps
            for page in range(0, len(memory), 4096):
                memory[page] = 1

    for mebibytes in (128, 64):  # the smaller one second: an earlier peak must not count
        monkeypatch.setitem(
            bench.VARIANTS, "planted", lambda case, n=mebibytes: (None, lambda: hold(n))
        )
        peaks = [
            bench.peak_of(case, "planted") for _ in range(5)
        ]  # a kernel that takes pages back meanwhile lowers some
        assert None in peaks or any(mebibytes - 1 < peak < mebibytes + 12 for peak in peaks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_seven_billion_parameters_need_a_gpu(bench, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: bench.main(["--size", "7b"]))
    assert end.value.code == 2 and "needs a GPU" in capsys.readouterr().err


def test_wrong_numbers_are_refused(bench, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args(["--prompt", "20"])
    assert end.value.code == 2 and "50 at least" in capsys.readouterr().err


# --- the states of swap pairs ---------------------------------------------------------------------

SWAP = ROOT / "benchmarks" / "bench_swap.py"


def test_the_swap_benchmark_gives_a_table_and_a_report(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        str(SWAP),
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "bench.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (
        report["size"] == "quick"
        and report["dtype"] == "float32"
        and report["repeats"] == 1
        and 0 <= report["worst"] <= report["tolerance"] == 1e-4
    )
    kinds = [(row["answer"], row["work"], row["variant"]) for row in report["rows"]]
    assert kinds == list(
        itertools.product(
            ("ends", "goes on"), ("pair", "pair + quad"), ("floor", "ours", "published")
        )
    )
    for row in report["rows"]:
        assert row["batch"] == 2 and len(row["seconds"]) == 1 and row["median_seconds"] > 0
        if row["variant"] == "published":
            assert row["published_to_this"] == 1
        if row["variant"] == "floor":
            assert row["x_floor"] == 1 and row["extra_mib"] in (0, None)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 14 and len({line.count("|") for line in table}) == 1
    assert (
        "equal outputs: all read answers" in done.stdout and report["machine"]["cpu"] in done.stdout
    )


@pytest.fixture(scope="module")
def swap(bench, tmp_path_factory):
    """(module, case) of the swap benchmark."""
    module = command_module(SWAP)
    case = module.make_case("quick", 100, 2, "cpu", tmp_path_factory.mktemp("swap"))
    case.answer_by("ends")
    return module, case


SWAP_MUTANTS = {
    "quad states differ": lambda kept, quads, texts: (kept, quads[:, [1, 0, 2, 3]], texts),
    "states differ by .* in layer": lambda kept, quads, texts: (kept[:, :, ::-1], quads, texts),
    "states differ by nan": lambda kept, quads, texts: (kept * np.nan, quads, texts),
    "other answers": lambda kept, quads, texts: (kept, quads, [("close", "far")] * 2),
}


@pytest.mark.parametrize("message", SWAP_MUTANTS)
def test_a_wrong_state_or_answer_stops_the_swap_benchmark(swap, message, monkeypatch):
    module, case = swap
    plain = module.ours
    assert module.check(case, "ends") < 1e-5
    with pytest.raises(AssertionError, match="was to go on"):
        module.check(case, "goes on")
    monkeypatch.setattr(
        module, "ours", lambda case, quad: SWAP_MUTANTS[message](*plain(case, quad))
    )
    with pytest.raises(AssertionError, match=message):
        module.check(case, "ends")


def test_answers_of_the_swap_benchmark_are_the_planted_ones(swap):
    module, case = swap
    ours, published = (variant(case, False)[2] for variant in (module.ours, module.published))
    assert ours == published == [("far", "far")] * 2
    case.answer_by("goes on")
    ours, published = (variant(case, False)[2] for variant in (module.ours, module.published))
    case.answer_by("ends")
    assert ours == [("far.", "far.")] * 2
    assert all(
        text.startswith("far.") and len(case.vlm.tokenizer(text).input_ids) > 12
        for both in published
        for text in both
    )


# --- relevancy ------------------------------------------------------------------------------------


def test_the_relevancy_benchmark_compares_and_reports(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        str(ROOT / "benchmarks" / "bench_relevancy.py"),
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "bench.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["floor", "ours", "published"] and report[
        "new_tokens"
    ] == 4
    assert report["rows"][0]["x_floor"] == 1 and report["rows"][2]["published_to_this"] == 1
    assert (
        "equal outputs: image relevancy" in done.stdout
        and len([line for line in done.stdout.splitlines() if line.startswith("|")]) == 5
    )


def test_other_relevancy_stops_its_benchmark(monkeypatch):
    module = command_module(ROOT / "benchmarks" / "bench_relevancy.py")
    maps = np.random.default_rng(0).random((3, 2, 9))
    monkeypatch.setattr(module, "published", lambda case: maps)
    for other, same in ((maps * (1 + 1e-5), True), (maps[::-1], False), (maps * 1.01, False)):
        monkeypatch.setattr(module, "ours", lambda case, other=other: other)
        if same:
            assert module.check(None) < 1e-4
        else:
            with pytest.raises(AssertionError, match="relevancy differs"):
                module.check(None)

"""What all tests share. Models are built in building.py, which imports torch; nothing here does, so
that tests of arithmetic start at once."""

import contextlib
import importlib
import io
import os
import random
import re
import shutil
import subprocess
import warnings
from pathlib import Path

# tiny models: more threads cost more than they bring, and several test processes share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests import warm
from vlmdiag import cli
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes.scene import floor_scene, render

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [
    "Is there a red circle in the image?",
    "Describe the image.",
    "Compared to blue square, is red circle far or close from you? Answer with only one word.",
]


# Files whose tests run whole commands: with two processes, each of which takes a file at a time,
# the long ones begin first, so that none is left over for one process alone.
LONG = ("readmes", "ray", "kills", "benchmark", "demo", "loading", "evaluate_relevancy", "swap_cli")


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)


def embeddings(vlm, batch, features=None):
    """(B, T, d): what a decoder without deepstack reads."""
    from vlmdiag.model.vision import entered, entering

    vision = entered(vlm, vlm.vision(batch) if features is None else features)
    with entering(vlm, batch, vision) as embeds:
        return embeds


def command_module(path):
    """A command of the checkout as a module."""
    return importlib.import_module(".".join(Path(path).relative_to(ROOT).with_suffix("").parts))


def in_process(path):
    """command(*arguments) -> CompletedProcess of a script run in this process, with warnings as
    errors and the exit code of its command line."""
    module = command_module(path)

    def command(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            # transformers' GLM-4V processor, with NumPy 2
            warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept")
            try:
                cli.run(lambda: module.main([str(a) for a in arguments]))
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess(
            [str(path), *map(str, arguments)], code, out.getvalue(), err.getvalue()
        )

    command.module = module
    return command


@pytest.fixture(scope="session")
def warm_python():
    """A program that runs scripts as sys.executable does, without the seconds of importing
    torch."""
    with warm.interpreter() as program:
        yield program


def without_picture_at_the_edges(question, placeholder="<image>"):
    """What is asked where the picture's placeholder stands at an edge of the question."""
    marks = rf"(?:\s*(?:<image>|{re.escape(placeholder)}))+\s*"
    bare = re.sub(rf"^{marks}", "", re.sub(rf"{marks}$", "", question))
    return bare if bare.strip() else question


@pytest.fixture(scope="session")
def blip_folders(tmp_path_factory):
    """get(name) -> folder of a random model: blip2-opt, blip2-t5, instructblip-llama,
    instructblip-t5; built once a session."""
    from tests.building import build_blip

    root = tmp_path_factory.mktemp("blips")
    built = {}

    def get(name):
        if name not in built:
            kind, text = name.split("-")
            built[name] = build_blip(root / name, kind == "instructblip", text)
        return built[name]

    return get


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{name: folder} of the random models: LLaVA with as many key as query heads, with grouped
    queries, Qwen2.5-VL, and Qwen3-VL with deepstack."""
    from tests.building import build_llava, build_qwen
    from tests.random_models import qwen_vl

    root = tmp_path_factory.mktemp("models")
    return {
        "llava": build_llava(root / "llava"),
        "llava-gqa": build_llava(root / "llava-gqa", num_key_value_heads=2),
        "qwen": build_qwen(root / "qwen"),
        "qwen3": qwen_vl.MODELS["qwen3_vl"](root / "qwen3"),
    }


@pytest.fixture(scope="session")
def load(folders):
    """load(name) -> VLM, loaded once a session."""
    import common

    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = common.load_model(folders[name], self_check=False)
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def pictures():
    rng = random.Random(3)
    return [render(floor_scene(rng, 3, square=square)) for square in (True, False, False)]


@pytest.fixture(scope="session")
def batch_of(pictures):
    """batch_of(vlm, rows) -> Batch of the demo questions, of different lengths so that rows are
    padded."""

    def make(vlm, rows=(0, 1, 2), **options):
        return vlm.encode(
            [Sample(str(i), None, QUESTIONS[i]) for i in rows],
            [pictures[i] for i in rows],
            **options,
        )

    return make


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory):
    """open_browser(window, logs) -> a new headless browser, closed after the file's tests, because
    a page whose server is gone goes on trying to reach it. Chrome, Chromium or Edge: the
    environment's BROWSER (tests/browser.sh finds one), else one on the PATH; without one the test
    is skipped, or fails where BROWSER_TESTS=required."""
    from selenium import webdriver

    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge")
    path = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if not path:
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(
                "a browser is needed here (Debian: apt-get install chromium chromium-driver)"
            )
        pytest.skip("needs Chrome, Chromium or Edge (Debian: apt-get install chromium)")
    beside = "msedgedriver" if "edge" in path.lower() else "chromedriver"
    driver = os.environ.get("BROWSER_DRIVER") or shutil.which(beside)  # None: selenium finds one
    is_edge = "edge" in path.lower()
    opened = []

    def make(window, logs):
        options = webdriver.EdgeOptions() if is_edge else webdriver.ChromeOptions()
        options.binary_location = path
        for flag in (
            "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run"
            " --disable-background-networking --disable-component-update --disable-sync"
            f" --disable-dev-shm-usage --window-size={window}"
        ).split():
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
        options.set_capability("goog:loggingPrefs", logs)
        if is_edge:
            opened.append(webdriver.Edge(options, webdriver.EdgeService(driver)))
        else:
            opened.append(webdriver.Chrome(options, webdriver.ChromeService(driver)))
        return opened[-1]

    yield make
    for browser in opened:
        browser.quit()

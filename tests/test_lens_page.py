"""The pages of the logit lens hold the data they are given, show it rightly in a real browser, and
run nothing that comes from a prompt, a token or a name.

The browser is Debian's Chromium; without it these tests fail. What is planted: every probability,
so that the right tooltip, map, bar and count are known.
"""

import base64
import functools
import http.server
import json
import os
import random
import re
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from selenium.common.exceptions import JavascriptException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import in_process
from vlmdiag.cli import UsageError
from vlmdiag.figures.layers import state_name, state_tick
from vlmdiag.interp import lens_page as page
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.scenes.scene import floor_scene, render

LENS = Path(__file__).resolve().parents[1] / "scripts" / "logit_lens"
overview = in_process(LENS / "generate_overview.py")

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "\"'`",
    "\u2028\u2029",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "\\u003cb\\u003e",
    "@@DATA@@",
    "@@POLICY@@",
    "{{x}}",
    "<0x0A>",
    "\n",
    "",
    " ",
    "  lead",
    "trail ",
    "\u202etxt.exe",
    "שלום",
    "سلام",
    "\ud800",
    "\x00\x07",
    "😀",
    "▁cat",
    "\\",
    "null",
]


# --- planted pages --------------------------------------------------------------------------------


def planted(rows=3, columns=4, layers=4, k=3, text=(5, 3), seed=0, size=(160, 120), vocabulary=200):
    """Arguments of write_page without the path: random distinct ids, falling probabilities, one
    vision token without a box at the end of the image."""
    rng = np.random.default_rng(seed)
    grid = PatchGrid.regular(rows, columns, (0, 0, *size), size)
    grid = PatchGrid(np.vstack([grid.boxes, np.full((1, 4), np.nan)]), grid.shape, grid.size)
    patches, T = len(grid.boxes), sum(text) + len(grid.boxes)
    groups = (
        ["bos"]
        + ["system"] * (text[0] - 1)
        + ["vision"] * patches
        + ["user"] * (text[1] - 1)
        + ["template"]
    )
    labels = [f" t{i}" if group != "vision" else "<image>" for i, group in enumerate(groups)]
    ids = (
        np.argsort(rng.random((layers + 1, T, vocabulary)), -1)[..., :k]
        if vocabulary < 1000
        else rng.integers(0, vocabulary, (layers + 1, T, k))
    )
    probs = np.sort(rng.random((layers + 1, T, k)), -1)[..., ::-1] * 0.9
    words = {i: f" w{i}x" for i in range(vocabulary)}
    facts = {
        "model": "tiny",
        "picture": "scene.png",
        "prompt": "USER: <image>\nWhat? ASSISTANT:",
        "question": "What?",
        "layers": layers,
        "seed": 0.5,
    }
    return [
        render(floor_scene(random.Random(seed), 3)).resize(size),
        grid,
        labels,
        groups,
        ids,
        probs,
        words,
        facts,
    ]


def blocks(path):
    """(facts, data) embedded in a page, as its script reads them."""
    text = Path(path).read_text(encoding="utf-8")
    return [
        json.loads(
            re.search(
                f'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL
            )[1]
        )
        for name in ("facts", "data")
    ]


def arrays(data):
    """ids (L+1, T, k) in the full vocabulary, probs, boxes."""
    local = np.frombuffer(base64.b64decode(data["ids"]), "<u4" if data["wide"] else "<u2").reshape(
        data["shape"]
    )
    probs = np.frombuffer(base64.b64decode(data["probs"]), "<f4").reshape(data["shape"])
    boxes = (
        None
        if data["boxes"] is None
        else np.frombuffer(base64.b64decode(data["boxes"]), "<f4").reshape(-1, 4)
    )
    return np.array(data["vocabulary_ids"])[local], probs, boxes


def test_a_page_holds_what_it_was_given(tmp_path):
    given = planted()
    image, grid, labels, groups, ids, probs, words, facts = given
    assert page.write_page(tmp_path / "new" / "a.html", *given) == tmp_path / "new" / "a.html"
    head, data = blocks(tmp_path / "new" / "a.html")
    got_ids, got_probs, boxes = arrays(data)
    assert (
        np.array_equal(got_ids, ids)
        and np.allclose(got_probs, probs, atol=1e-7)
        and np.array_equal(boxes, grid.boxes.astype("f4"), equal_nan=True)
    )
    assert (
        data["vocabulary"] == [words[i] for i in data["vocabulary_ids"]]
        and data["labels"] == labels
        and data["grid"] == [3, 4]
        and data["size"] == [160, 120]
    )
    assert [data["groups"][i] for i in data["group"]] == groups and dict(data["facts"]) == facts
    assert (head["model"], head["title"]) == ("tiny", "scene.png · tiny") and page.read_facts(
        tmp_path / "new" / "a.html"
    ) == head
    assert os.listdir(tmp_path / "new") == ["a.html"]  # no temporary file stays


def test_more_tokens_than_two_bytes_can_count(tmp_path):
    given = planted(layers=30, rows=24, columns=24, k=5, vocabulary=200_000)
    page.write_page(tmp_path / "a.html", *given)
    _, data = blocks(tmp_path / "a.html")
    assert (
        data["wide"]
        and len(data["vocabulary"]) > 65536
        and np.array_equal(arrays(data)[0], given[4])
    )


def test_equal_input_gives_equal_bytes_in_one_step(tmp_path, monkeypatch):
    page.write_page(tmp_path / "a.html", *planted())
    first = (tmp_path / "a.html").read_bytes()
    page.write_page(tmp_path / "a.html", *planted())
    assert (tmp_path / "a.html").read_bytes() == first

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="disk is full .*No space left on device.*a.html"):
        page.write_page(tmp_path / "a.html", *planted(seed=1))
    assert (tmp_path / "a.html").read_bytes() == first and os.listdir(tmp_path) == ["a.html"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({4: np.zeros((5, 9, 3), int)}, "wanted"),
        ({2: ["a"]}, "wanted"),
        ({6: {0: "a"}}, "not in the vocabulary"),
        ({1: PatchGrid.regular(2, 2, (0, 0, 160, 120), (160, 120))}, "another prompt or picture"),
        ({0: Image.new("RGB", (9, 9))}, "another prompt or picture"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, change, message):
    given = planted()
    for index, value in change.items():
        given[index] = value
    with pytest.raises(ValueError, match=message):
        page.write_page(tmp_path / "a.html", *given)


@given(
    st.recursive(
        st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_json_in_a_script_element_never_ends_it(value):
    text = page.json_block(value)
    assert json.loads(text) == value and text.isascii() and not set("<>&") & set(text)


def hostile():
    """A planted page whose every string is hostile somewhere."""
    image, grid, labels, groups, ids, probs, _, _ = planted(vocabulary=len(HOSTILE))
    labels = [HOSTILE[i % len(HOSTILE)] for i in range(len(labels))]
    text = "".join(HOSTILE)
    return [
        image,
        grid,
        labels,
        groups,
        ids,
        probs,
        dict(enumerate(HOSTILE)),
        {
            "title": text,
            "model": text,
            "picture": text,
            "prompt": text,
            "question": text,
            text: text,
        },
    ]


def test_hostile_strings_survive_unchanged_and_stay_inside_their_blocks(tmp_path):
    page.write_page(tmp_path / "a.html", *hostile())
    head, data = blocks(tmp_path / "a.html")
    assert (
        data["vocabulary"] == HOSTILE
        and set(data["labels"]) <= set(HOSTILE)
        and head["prompt"] == "".join(HOSTILE) == dict(data["facts"])["".join(HOSTILE)]
    )
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    plain = page.TEMPLATE.read_text(encoding="utf-8")
    assert [text.count(tag) for tag in ("<script", "</script>", "<img", "<!--")] == [
        plain.count(tag) for tag in ("<script", "</script>", "<img", "<!--")
    ]
    policy = re.search('Content-Security-Policy" content="(.*?)"', text)[1]
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and "http" not in policy
        and policy.count("sha256-") == 2
    )
    assert (
        "innerHTML" not in plain and "insertAdjacent" not in plain and "document.write" not in plain
    )


def test_a_page_of_a_7b_model_is_small(tmp_path, big):
    assert big.stat().st_size < 8e6
    print(f"\n626 positions x 33 layers x top 5: {big.stat().st_size / 1e6:.2f} MB")


def test_a_large_picture_is_scaled_down_and_the_thumbnail_is_small():
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    )
    kind, data = page.picture_uri(noise).split(";base64,")
    assert kind == "data:image/jpeg" and len(data) < 2e6 and len(page.thumbnail_uri(noise)) <= 6000
    assert page.picture_uri(Image.new("RGB", (50, 50))).startswith("data:image/png")
    assert page.picture_uri(Image.new("RGB", (1, 4000)))


def test_top_words_count_positions_of_the_last_layers():
    words = {
        0: "▁cat",
        1: " Cat",
        2: "<s>",
        3: ",",
        4: "dog",
        5: "a",
        6: "猫",
        7: "12",
        8: "late",
        9: "<0x0A>",
    }
    ids = np.zeros((9, 5, 1), int)
    ids[:, 0], ids[:, 1], ids[:, 2], ids[:, 3], ids[:, 4] = 8, 1, 3, 6, 2
    ids[7, 2], ids[6, 2], ids[8, 1] = 0, 4, 5  # layers 7 and 8 of 8 count: dog at 6 does not
    assert page.top_words(ids, ["user"] + ["vision"] * 4, words) == [("cat", 2), ("猫", 1)]


# --- overview, without a browser ------------------------------------------------------------------

ODD = [
    "a b#1?.html",
    "ü 100%.html",
    "<img src=x onerror=alert(1)>.html",
    "\"q'.html",
    "javascript:alert(1).html",
    os.fsdecode(b"\xff\xfe.html"),
    "p10.html",
    "p9.html",
    "%41.html",
]


def entries(index):
    return json.loads(
        re.search('id="data">(.*?)</script>', index.read_text(encoding="utf-8"), re.DOTALL)[1]
    )["entries"]


@pytest.mark.parametrize("target", [".", "over", "../elsewhere/é #", "pages/deep"])
def test_overview_links_lead_to_the_pages_from_any_folder(tmp_path, target):
    source = tmp_path / "in" / "pa ges"
    source.mkdir(parents=True)
    for name in ODD + ["index.html"]:
        (source / name).write_text("x")
    (source / "folder.html").mkdir()
    out = source / target
    done = overview(source, out)
    assert done.returncode == 0 and "index.html" in done.stdout
    links = [entry["link"] for entry in entries(out / "index.html")]
    assert {
        os.path.realpath(
            os.path.join(
                os.fsencode(out),
                unquote(link, "utf-8", "surrogateescape").encode("utf-8", "surrogateescape"),
            )
        )
        for link in links
    } == {os.path.realpath(os.fsencode(source / name)) for name in ODD}
    assert not any(re.search("[:#?<>\"' ]", link) for link in links)
    names = [entry["name"] for entry in entries(out / "index.html")]
    assert names.index("p9.html") < names.index("p10.html")


def test_overview_reads_only_the_facts_of_our_pages(tmp_path):
    page.write_page(tmp_path / "a2.html", *planted())
    page.write_page(tmp_path / "a10.html", *hostile())
    (tmp_path / "b.html").write_text(
        '<script type="application/json" id="facts">{"prompt": 3, "thumbnail": "http://x/y.png",'
        ' "top_words": [1, [2], ["w", 1]]}</script>'
    )
    (tmp_path / "c.html").write_text(
        '<script type="application/json" id="facts">[' * 3000 + "</script>"
    )
    (tmp_path / "d.html").write_bytes(b"\xff" * 10)
    assert overview(tmp_path, tmp_path).returncode == 0
    got = entries(tmp_path / "index.html")
    assert [entry["name"] for entry in got] == ["a2.html", "a10.html", "b.html", "c.html", "d.html"]
    assert (
        got[0]["model"] == "tiny"
        and got[0]["thumbnail"].startswith("data:image/jpeg")
        and got[1]["prompt"] == "".join(HOSTILE)
    )
    assert (
        got[2]["prompt"] == got[2]["thumbnail"] == ""
        and got[2]["words"] == ["w"]
        and got[3]["title"] == ""
    )
    first = (tmp_path / "index.html").read_bytes()
    assert (
        overview(tmp_path, tmp_path).returncode == 0
        and (tmp_path / "index.html").read_bytes() == first
    )


def test_overview_without_pages_is_wrong_usage(tmp_path):
    (tmp_path / "index.html").write_text("x")
    for arguments, message in [
        ((tmp_path / "none", tmp_path), "no folder"),
        ((tmp_path, tmp_path), "no .html file"),
        ((tmp_path, tmp_path, "--per_page", 0), "--per_page"),
    ]:
        done = overview(*arguments)
        assert (
            done.returncode == 2
            and message in done.stderr
            and done.stderr.count("\n") == 1
            and not done.stdout
        )


# --- in the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(open_browser):
    return open_browser("1500,950", {"browser": "ALL", "performance": "ALL"})


@pytest.fixture
def show(browser):
    """show(path or address): opens a page and waits until it is ready. Afterwards: no console
    message, nothing asked from the network, nothing injected ran."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    allowed = ["file:", "data:", "chrome:", "chrome-untrusted:"]  # the last: its start page

    def get(address, ready="return document.body.dataset.ready === 'true'"):
        address = address.as_uri() if isinstance(address, Path) else address
        if address.startswith("http"):
            allowed.append(address.split("/index", 1)[0])
        browser.get(address)
        WebDriverWait(browser, 30, 0.02).until(lambda driver: driver.execute_script(ready))
        return browser

    yield get
    assert browser.execute_script("return window.pwned") is None
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked and not [
        url for url in asked if not url.startswith(tuple(allowed)) or url.endswith("/favicon.ico")
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, its arguments) of the small planted page."""
    given = planted()
    return page.write_page(tmp_path_factory.mktemp("small") / "small.html", *given), given


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """626 positions x 33 layers x top 5 over 32,000 tokens."""
    given = planted(
        rows=24, columns=24, layers=32, k=5, text=(30, 19), vocabulary=32_000, size=(640, 480)
    )
    return page.write_page(tmp_path_factory.mktemp("big") / "big.html", *given)


def one(driver, css):
    return driver.find_element(By.CSS_SELECTOR, css)


def many(driver, css):
    return driver.find_elements(By.CSS_SELECTOR, css)


def hover(driver, css):
    ActionChains(driver, duration=20).move_to_element(one(driver, css)).perform()


def keys(driver, *pressed):
    ActionChains(driver).send_keys(*pressed).perform()


def bars(driver, css):
    """[(token, probability)] of a list of bars."""
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' .bar')].map(b =>"
        " [b.querySelector('.token').textContent, b.querySelector('.n').textContent])",
        css,
    )


def top(given, layer, position):
    """What a tooltip should list."""
    ids, probs, words = given[4], given[5], given[6]
    return [
        [
            words[int(i)].replace(" ", "·"),
            f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}".replace("e-0", "e-"),
        ]
        for i, p in zip(ids[layer, position], probs[layer, position])
    ]


def panel_position(driver):
    return one(driver, "#panel").get_attribute("data-position")


def test_hovering_a_patch_shows_its_top_tokens_and_all_its_layers(show, small):
    path, given = small
    driver = show(path)
    for position in (5, 11, 16):
        hover(driver, f".box[data-position='{position}']")
        assert bars(driver, "#tooltip") == bars(driver, "#panel-top") == top(given, 4, position)
        assert bars(driver, "#panel-list") == [top(given, layer, position)[0] for layer in range(5)]
        outline = one(driver, "#current-outline")
        assert [
            float(outline.get_attribute(name)) for name in ("x", "y", "width", "height")
        ] == list(
            given[1].boxes[position - 5]
            @ [[1, 0, -1, 0], [0, 1, 0, -1], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
    assert [name.text for name in many(driver, "#table tr.current .label")] == ["image 12"]
    hover(driver, "#title")
    assert not one(driver, "#tooltip").is_displayed() and panel_position(driver) == "16"


def test_hovering_a_cell_shows_its_layer_and_outlines_its_patch(show, small):
    path, given = small
    driver = show(path)
    hover(driver, "tr[data-position='9'] td[data-layer='2']")
    assert (
        bars(driver, "#tooltip") == top(given, 2, 9) and "layer 1" in one(driver, "#tooltip").text
    )
    assert (
        one(driver, "#current-outline").get_attribute("data-position") == "9"
        and one(driver, "#current-outline").is_displayed()
    )
    hover(driver, "tr[data-position='17'] td[data-layer='0']")  # the vision token without a box
    assert (
        bars(driver, "#tooltip") == top(given, 0, 17)
        and "embeddings" in one(driver, "#tooltip").text
    )
    assert (
        not one(driver, "#current-outline").is_displayed()
        and "no place in the picture" in one(driver, "#panel-place").text
    )
    assert not many(driver, ".box[data-position='17']")


def test_a_lock_keeps_the_panel_and_leaves_the_cells_to_inspect(show, small):
    path, given = small
    driver = show(path)
    hover(driver, ".box[data-position='7']")
    one(driver, ".box[data-position='7']").click()
    hover(driver, ".box[data-position='12']")
    assert panel_position(driver) == "7" and bars(driver, "#tooltip") == top(given, 4, 12)
    hover(driver, "tr[data-position='7'] td[data-layer='1']")
    assert (
        panel_position(driver) == "7"
        and bars(driver, "#tooltip") == top(given, 1, 7)
        and one(driver, "#locked-outline").get_attribute("data-position") == "7"
    )
    one(driver, ".box[data-position='7']").click()  # again: unlocked
    hover(driver, ".box[data-position='12']")
    assert panel_position(driver) == "12" and not one(driver, "#locked-outline").is_displayed()
    one(driver, "tr[data-position='9'] th").click()  # a row locks as well, Escape unlocks
    hover(driver, ".box[data-position='12']")
    assert (
        panel_position(driver) == "9"
        and one(driver, "#lock-state").get_attribute("aria-pressed") == "true"
    )
    keys(driver, Keys.ESCAPE)
    hover(driver, ".box[data-position='13']")
    assert panel_position(driver) == "13"


def test_the_slider_changes_the_map_and_says_which_layer_it_is(show, small):
    path, given = small
    driver = show(path)

    def shown():
        return driver.execute_script(
            "return [...document.querySelectorAll('.box')].map(b => [Number(b.dataset.position),"
            " b.dataset.token])"
        )

    for layer, words in (
        (4, "Output of layer 3 (hidden state 4 of 4)"),
        (0, "Embeddings (hidden state 0)"),
        (2, "Output of layer 1 (hidden state 2 of 4)"),
    ):
        driver.execute_script(
            "let s = document.getElementById('layer'); s.value = arguments[0]; s.dispatchEvent(new"
            " Event('input'))",
            layer,
        )
        assert shown() == [
            [position, top(given, layer, position)[0][0]] for position in range(5, 17)
        ]
        assert one(driver, "#layer-label").text == words
        assert float(
            driver.execute_script(
                "return document.querySelector('.box').style.getPropertyValue('--c')"
            )
        ) == pytest.approx(given[5][layer, 5, 0] ** 0.5, abs=1e-3)
        assert one(driver, ".word").text.strip() == top(given, layer, 5)[0][0].strip("·")
    one(driver, "#show-words").click()
    assert not one(driver, ".word").is_displayed()
    box = one(driver, ".box")
    shade = given[5][2, 5, 0] ** 0.5  # of the layer shown
    assert box.value_of_css_property("fill-opacity") == "0"  # the picture keeps its colours
    assert float(box.value_of_css_property("stroke-opacity")) == pytest.approx(
        0.06 + 0.8 * shade, abs=2e-3
    )
    one(driver, "#show-colors").click()
    assert float(box.value_of_css_property("fill-opacity")) == pytest.approx(0.62 * shade, abs=2e-3)
    one(driver, "#show-colors").click()
    assert box.value_of_css_property("fill-opacity") == "0"
    one(driver, "#table thead button[data-layer='3']").click()
    assert one(driver, "#layer").get_attribute("value") == "3"


def test_everything_works_without_a_mouse(show, small):
    path, given = small
    driver = show(path)
    keys(driver, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert (
        panel_position(driver) == "6"
        and bars(driver, "#panel-top") == top(given, 3, 6)
        and one(driver, "#current-outline").is_displayed()
    )
    keys(driver, Keys.ENTER, Keys.ARROW_UP, Keys.ARROW_RIGHT)
    assert one(driver, "#locked-outline").get_attribute("data-position") == "5" and bars(
        driver, "#panel-top"
    ) == top(given, 4, 5)
    keys(driver, Keys.ESCAPE)
    assert one(driver, "#lock-state").get_attribute("aria-pressed") == "false"
    keys(driver, "/", "w1")
    assert (
        driver.switch_to.active_element.get_attribute("id") == "search"
        and one(driver, "#search").get_attribute("value") == "w1"
    )
    keys(
        driver, Keys.ARROW_LEFT, Keys.ARROW_LEFT, "·"
    )  # the arrows move in the text, not through the layers
    assert one(driver, "#layer").get_attribute("value") == "4"
    keys(driver, Keys.ESCAPE, Keys.ARROW_LEFT)
    assert (
        one(driver, "#search").get_attribute("value") == ""
        and one(driver, "#layer").get_attribute("value") == "3"
    )
    reached = set()
    for _ in range(40):
        keys(driver, Keys.TAB)
        reached.add(driver.switch_to.active_element.get_attribute("id"))
    assert {
        "layer",
        "map",
        "show-words",
        "show-colors",
        "enlarge",
        "lock-state",
        "search",
        "search-mode",
        "scroller",
    } <= reached


@pytest.mark.parametrize("mode, depth", [("topk", 3), ("top1", 1)])
def test_search_marks_and_counts_the_cells(show, small, mode, depth):
    path, given = small
    driver = show(path)
    one(driver, f"#search-mode option[value='{mode}']").click()
    one(driver, "#search").send_keys("W1")  # case is ignored
    hits = np.vectorize(lambda i: "w1" in given[6][i])(given[4])[..., :depth].any(-1)
    image = hits[:, 5:18]
    layers = np.flatnonzero(image.any(1))
    WebDriverWait(driver, 5).until(lambda d: many(d, "#search-bars button"))
    assert [
        int(button.get_attribute("data-count")) for button in many(driver, "#search-bars button")
    ] == image.sum(1).tolist()
    summary = one(driver, "#search-summary").text
    most = int(image.sum(1).argmax())
    assert (
        summary.startswith(f"In {image.any(0).sum()} of 13 image positions")
        and f"most in {state_name(most)} ({image.sum(1).max()})" in summary
    )
    assert state_tick(layers[0]) in summary

    def found():
        return {
            (int(p), int(layer))
            for p, layer in driver.execute_script(
                "return [...document.querySelectorAll('td.found')].map(c =>"
                " [c.parentNode.dataset.position, c.dataset.layer])"
            )
        }

    assert found() == {
        (position, layer) for layer, position in np.argwhere(hits) if 5 <= position < 18
    }
    assert {int(b.get_attribute("data-position")) for b in many(driver, ".box.found")} == {
        p for p in range(5, 17) if hits[4, p]
    }
    one(driver, "[data-filter='text']").click()
    text = np.delete(hits, np.s_[5:18], 1)
    assert [
        int(button.get_attribute("data-count")) for button in many(driver, "#search-bars button")
    ] == text.sum(1).tolist()
    one(driver, "#search").send_keys("nothing")
    WebDriverWait(driver, 5).until(
        lambda d: "none of the 8 text positions" in one(d, "#search-summary").text
    )
    assert not found()


def test_search_goes_to_the_first_hit_and_steps_through_all(show, big):
    driver = show(big)
    _, data = blocks(big)
    ids = arrays(data)[0]
    rare = [i for i in np.unique(ids) if 3 <= (ids[:, 30:606] == i).any((0, 2)).sum() <= 6]
    word = next(f"w{i}x" for i in rare if (ids[:, 30:606] == i).any((0, 2)).nonzero()[0][0] > 100)
    wanted = 30 + np.flatnonzero((ids[:, 30:606] == int(word[1:-1])).any((0, 2)))
    one(driver, "#search").send_keys(word)

    def at_hit(i):
        count = f"{i + 1} of {len(wanted)} positions"
        WebDriverWait(driver, 5).until(lambda d: one(d, "#search-count").text == count)
        assert panel_position(driver) == str(wanted[i])
        seen = driver.execute_script(
            "let s = document.getElementById('scroller').getBoundingClientRect(), r ="
            " document.querySelector(`tr[data-position='${arguments[0]}']`)"
            ".getBoundingClientRect(); return s.top <= r.top && r.bottom <= s.bottom",
            int(wanted[i]),
        )
        assert seen, wanted[i]
        assert [*map(int, driver.execute_script(FOUND, int(wanted[i])))] == np.flatnonzero(
            (ids[:, wanted[i]] == int(word[1:-1])).any(1)
        ).tolist()

    at_hit(0)
    for i in [*range(1, len(wanted)), 0]:  # after the last one comes the first
        keys(driver, Keys.ENTER)
        at_hit(i)
    ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    at_hit(len(wanted) - 1)
    one(driver, "#search-back").click()
    at_hit(len(wanted) - 2)
    assert one(driver, "#layer").get_attribute("value") == "32"  # the layer stays


FOUND = (
    "return [...document.querySelectorAll(`tr[data-position='${arguments[0]}'] td.found`)].map(c =>"
    " c.dataset.layer)"
)


def answered(**changes):
    """Arguments of write_page with an answer of four tokens, three of them read."""
    given = planted(text=(5, 6), **changes)
    given[3][-3:] = ["generated"] * 3
    return [*given, None, [" red", " circle", HOSTILE[1], "</s>"]]


def test_the_answer_is_shown_at_the_positions_that_predict_it(show, tmp_path):
    given = answered()
    T = len(given[2])
    driver = show(page.write_page(tmp_path / "a.html", *given))
    chips = many(driver, "#answer button")
    assert [chip.text for chip in chips] == ["·red", "·circle", HOSTILE[1], "</s>"]
    assert [int(chip.get_attribute("data-answer")) for chip in chips] == [*range(T - 4, T)]
    assert panel_position(driver) == str(T - 4)  # the end of the prompt predicts the first token
    assert bars(driver, "#panel-top") == top(given, 4, T - 4)
    assert many(driver, "#answer .now") == chips[:1]
    chips[2].click()
    assert panel_position(driver) == str(T - 2) and many(driver, "#answer .now") == [chips[2]]
    assert one(driver, f"tr[data-position='{T - 2}'] .dot").get_attribute("data-group") == (
        "generated"
    )


def test_a_page_without_an_answer_begins_at_the_last_position(show, small):
    driver = show(small[0])
    assert panel_position(driver) == "20" and not one(driver, "#answer").is_displayed()


def test_a_word_is_followed_by_rank_and_probability_through_the_layers(show, small):
    path, given = small
    ids, probs = given[4], given[5]
    driver = show(path)
    hover(driver, ".box[data-position='9']")
    one(driver, ".box[data-position='9']").click()

    def ranks():
        return driver.execute_script(
            "return [...document.querySelectorAll('#panel-list .rank')].map(n => n.textContent)"
        )

    def wanted(id):
        texts = []
        for layer in range(5):
            where = np.flatnonzero(ids[layer, 9] == id)
            known = f"{where[0] + 1}. {probs[layer, 9, where[0]]:.3f}" if len(where) else None
            texts.append(known or "below top 3")
        return texts

    assert ranks() == wanted(ids[4, 9, 0])  # unchosen: the likeliest at the end
    assert "below top 3" in ranks()
    many(driver, "#panel-top button")[2].click()
    assert ranks() == wanted(ids[4, 9, 2]) != wanted(ids[4, 9, 0])
    assert one(driver, "#panel-word").text == given[6][ids[4, 9, 2]].replace(" ", "·")
    many(driver, "#panel-top button")[2].click()  # again: no longer
    assert ranks() == wanted(ids[4, 9, 0])


@pytest.mark.parametrize("name", ["small", "big"])
def test_the_embeddings_column_is_whole_when_the_page_opens(show, name, request):
    made = request.getfixturevalue(name)
    driver = show(made if name == "big" else made[0])
    label, cell = (
        driver.execute_script(
            "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", css
        )
        for css in ("#body tr[data-position] th", "#body tr[data-position] td[data-layer='0']")
    )
    assert cell["left"] >= label["right"] - 1
    for _ in range(3):  # and no column is cut at the left when the layer moves
        keys(driver, Keys.ARROW_LEFT)
    scrolled, width = driver.execute_script(
        "return [document.getElementById('scroller').scrollLeft,"
        " document.querySelector('td[data-layer]').getBoundingClientRect().width]"
    )
    assert scrolled % width == pytest.approx(0, abs=1) or scrolled % width > width - 1


def test_rows_are_filtered_and_only_those_in_view_exist(show, small, big):
    driver = show(small[0])
    for name, wanted in (
        ("image", range(5, 18)),
        ("text", [*range(5), *range(18, 21)]),
        ("all", range(21)),
    ):
        one(driver, f"[data-filter='{name}']").click()
        assert [
            int(row.get_attribute("data-position"))
            for row in many(driver, "#body tr[data-position]")
        ] == list(wanted)
        assert one(driver, f"[data-filter='{name}']").get_attribute("aria-pressed") == "true"
    assert one(driver, "tr[data-position='1'] .label").text == "·t1"
    show(big)
    for share in (0, 0.5, 1):
        driver.execute_script(
            "let s = document.getElementById('scroller'); s.scrollTop = arguments[0] *"
            " s.scrollHeight",
            share,
        )
        time.sleep(0.2)
        seen = driver.execute_script(
            "let s = document.getElementById('scroller').getBoundingClientRect(); return [s.top +"
            " 60, s.bottom - 40].map(y => Number(document.elementFromPoint(s.left + 20,"
            " y).closest('tr').dataset.position))"
        )
        assert abs(seen[0] - (30 + share * 577)) < 60 and seen[1] > seen[0]
        assert len(many(driver, "#body tr[data-position]")) < 80


def test_header_and_first_column_stay_in_view(show, big):
    driver = show(big)
    driver.execute_script(
        "let s = document.getElementById('scroller'); s.scrollTop = 3000; s.scrollLeft = 900"
    )
    time.sleep(0.2)
    corner, scroller = (
        driver.execute_script(
            "let b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.left,"
            " b.top]",
            css,
        )
        for css in ("#table .corner", "#scroller")
    )
    assert np.allclose(corner, scroller, atol=2)
    assert driver.execute_script(
        "return document.querySelector('#body tr[data-position] th').getBoundingClientRect().left"
    ) == pytest.approx(scroller[0], abs=2)


def move(driver, x, y):
    """The pointer on the picture at shares x, y of its width and height -> the position that the
    panel shows, as a string."""
    driver.execute_script(
        "let m = document.getElementById('map'), b = m.getBoundingClientRect();m.dispatchEvent(new"
        " PointerEvent('pointermove', {clientX: b.left + arguments[0] * b.width, clientY: b.top +"
        " arguments[1] * b.height, bubbles: true}))",
        x,
        y,
    )
    return panel_position(driver)


def test_the_edge_of_the_picture_belongs_to_the_patches_along_it(show, small):
    driver = show(small[0])
    assert [move(driver, *spot) for spot in ((0, 0), (1, 0), (0, 1), (1, 1), (1, 0.5))] == [
        "5",
        "8",
        "13",
        "16",
        "12",
    ]
    move(driver, 0.01, 0.01)
    for x, y in ((1.01, 0.5), (0.5, 1.01), (-0.01, 0.5)):  # beyond it nothing is pointed at
        assert move(driver, x, y) == "5" or move(driver, x, y) == ""


def test_of_overlapping_boxes_the_smallest_wins(show, tmp_path):
    given = planted(rows=1, columns=5, text=(2, 2))
    whole, tiles = (
        [0, 0, 160, 120],
        [[0, 0, 80, 60], [80, 0, 160, 60], [0, 60, 80, 120], [60, 50, 160, 120]],
    )
    given[1] = PatchGrid(np.array([whole, *tiles, [np.nan] * 4], float), None, (160, 120))
    driver = show(page.write_page(tmp_path / "a.html", *given))
    assert [
        move(driver, *spot)
        for spot in ((0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9), (0.45, 0.45))
    ] == ["3", "4", "5", "6", "3"]
    assert [box.get_attribute("data-position") for box in many(driver, ".box")] == [
        "3",
        "4",
        "5",
        "6",
    ] and len(many(driver, "#body tr[data-position]")) == 6
    hover(
        driver, "tr[data-position='2'] td[data-layer='1']"
    )  # the coarse tile is outlined from the table
    assert one(driver, "#current-outline").get_attribute("width") == "160"


def test_boxes_beyond_the_picture_can_be_pointed_at(show, tmp_path):
    given = planted(rows=2, columns=2)
    boxes = np.vstack(
        [PatchGrid.regular(2, 2, (0, -20, 160, 140), (160, 120)).boxes, np.full((1, 4), np.nan)]
    )
    given[1] = PatchGrid(boxes, (2, 2), (160, 120))
    driver = show(page.write_page(tmp_path / "a.html", *given))
    assert (
        one(driver, "#map").get_dom_attribute("viewBox") == "0 -20 160 160"
        and move(driver, 0.9, 0.05) == "6"
    )


@pytest.mark.parametrize("change", [{1: None}, {3: ["user"] * 21, 1: None}])
def test_a_page_without_boxes_or_without_an_image_still_has_its_table(show, tmp_path, change):
    given = planted()
    for index, value in change.items():
        given[index] = value
    driver = show(page.write_page(tmp_path / "a.html", *given))
    one(driver, "[data-filter='all']").click()
    assert (
        len(many(driver, "#body tr[data-position]")) == 21
        and not many(driver, ".box")
        and move(driver, 0.5, 0.5) == ""
    )


def test_probabilities_that_are_no_numbers_are_named(show, tmp_path):
    given = planted()
    given[5] = given[5].copy()
    given[5][4, 5, 0], given[5][4, 5, 1:] = np.nan, [2e-9, 0]
    driver = show(page.write_page(tmp_path / "a.html", *given))
    hover(driver, ".box[data-position='5']")
    assert [p for _, p in bars(driver, "#tooltip")] == ["n/a", "2e-9", "0"]


def test_injected_markup_is_shown_and_never_run(show, tmp_path):
    given = hostile()
    driver = show(page.write_page(tmp_path / "a</b>.html", *given))
    one(driver, "[data-filter='all']").click()
    for row in many(driver, "#body tr[data-position]"):
        ActionChains(driver, duration=0).move_to_element(
            row.find_element(By.CSS_SELECTOR, "td[data-layer='2']")
        ).perform()
    one(driver, "#search").send_keys("<img")
    time.sleep(0.3)
    tags = driver.execute_script(
        "return [...document.querySelectorAll('body *')].map(n => n.tagName.toLowerCase())"
    )
    assert set(tags) <= set(
        "header h1 h2 span kbd main section div output input svg image rect text label button table"
        " tbody thead colgroup col tr th td ol li p bdi i select option script".split()
    )
    assert tags.count("script") == 2
    assert one(driver, "#title").text.startswith(
        "</script><script>window.pwned=1</script><img"
    ) and '<img src=x onerror="window.pwned=1">' in driver.execute_script(
        "return [...document.querySelectorAll('#body .label')].map(n => n.textContent)"
    )
    shown = set(
        driver.execute_script(
            "return [...document.querySelectorAll('#body td[data-layer]')].map(n => n.textContent)"
        )
    )
    assert {
        "∅",
        "·",
        "··lead",
        "trail·",
        "↵",
        "⟨U+2028⟩⟨U+2029⟩",
        "⟨U+202E⟩txt.exe",
        "⟨U+0000⟩⟨U+0007⟩",
        "⟨U+D800⟩",
        "@@DATA@@",
        "<0x0A>",
        "▁cat",
        "שלום",
    } <= shown


def test_the_policy_stops_a_script_that_got_in(browser, small):
    browser.get(small[0].as_uri())
    for attack in (
        (
            "let s = document.createElement('script'); s.textContent = 'window.pwned = 1';"
            " document.body.append(s)"
        ),
        "document.body.innerHTML = '<p>'",
        "fetch('data:,x')",
    ):
        try:
            browser.execute_script(attack)
        except JavascriptException as error:
            assert "TrustedScript" in error.msg or "TrustedHTML" in error.msg
    assert browser.execute_script("return window.pwned") is None and many(browser, "#map")


def test_the_page_of_a_7b_model_opens_at_once(show, big):
    driver = show(big)
    ready = float(one(driver, "body").get_attribute("data-ready-ms"))
    print(f"\n626 positions x 33 layers x top 5: ready after {ready / 1000:.2f} s")
    assert ready < 6000
    assert (
        one(driver, "#table").get_attribute("aria-rowcount") == "578"
        and len(many(driver, ".box")) == 576
    )


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder of 43 pages, three of them ours, and the index in another folder."""
    root = tmp_path_factory.mktemp("collection")
    for i, question in enumerate(("Is there a zebra?", "What is it?", "".join(HOSTILE))):
        given = planted(seed=i)
        given[7] = given[7] | {"question": question, "prompt": question, "picture": f"scene{i}.png"}
        page.write_page(root / "pages" / f"our {i}#.html", *given)
    for i in range(40):
        (root / "pages" / f"page{i}.html").write_text(f"<title>x</title><p id='it'>page {i}</p>")
    assert overview(root / "pages", root / "index folder").returncode == 0
    return root


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


LISTED = "return document.querySelectorAll('#list a').length > 0"


@pytest.mark.parametrize("way", ["file", "http"])
def test_the_overview_lists_searches_and_opens_pages(show, collection, way):
    server = None
    if way == "http":
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(collection))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
    address = (
        f"http://127.0.0.1:{server.server_port}/index%20folder/index.html"
        if server
        else collection / "index folder" / "index.html"
    )
    driver = show(address, LISTED)
    try:
        check_overview(driver)
    finally:
        if server:
            server.shutdown()
            server.server_close()


def check_overview(driver):
    def names():
        return driver.execute_script(
            "return [...document.querySelectorAll('#list .name')].map(n => n.textContent)"
        )

    def inside(script):
        driver.switch_to.frame("viewer")
        try:
            WebDriverWait(driver, 20).until(lambda d: d.execute_script(script))
        finally:
            driver.switch_to.default_content()

    first = names()
    assert (
        len(first) == 20
        and first[:4] == ["scene0.png", "scene1.png", "scene2.png", "page0.html"]
        and "43 pages" in one(driver, "#count").text
    )
    assert len(many(driver, "#list img")) == 3 and driver.execute_script(
        "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
    )
    inside(
        "return document.body.dataset.ready === 'true' &&"
        " document.getElementById('title').textContent.startsWith('scene0')"
    )
    one(driver, "#next").click()
    assert (
        names() == [f"page{i}.html" for i in range(17, 37)] and one(driver, "#page").text == "2 / 3"
    )
    one(driver, "#list li:nth-child(3) a").click()
    inside("return document.getElementById('it')?.textContent === 'page 19'")
    assert [link.get_attribute("title") for link in many(driver, "#list a[aria-current]")] == [
        "page19.html"
    ] and one(driver, "#open").get_attribute("href").endswith("page19.html")
    keys(driver, Keys.ARROW_RIGHT)
    assert len(names()) == 3 and not one(driver, "#next").is_enabled()
    keys(driver, "/", "ZEBRA tiny")
    assert (
        names() == ["scene0.png"]
        and one(driver, "#count").text == "1 of 43 pages"
        and not one(driver, "#pages").is_displayed()
    )
    keys(driver, Keys.ESCAPE, "page3", Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    inside("return document.getElementById('it')?.textContent === 'page 30'")
    keys(driver, "/", "onerror")
    assert names() == ["scene2.png"] and set(
        driver.execute_script(
            "return [...document.querySelectorAll('#list *')].map(n => n.tagName)"
        )
    ) <= set("LI A IMG BDI SPAN".split())
    keys(driver, Keys.BACKSPACE * 7, "no such thing")
    assert names() == [] and one(driver, "#count").text == "0 of 43 pages"

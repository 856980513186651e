"""Commands about several pictures and turns, by their command lines on a tiny model: what they
write, what they read, what they refuse."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

import common
from tests.conftest import ROOT, in_process
from vlmdiag.cli import UsageError
from vlmdiag.interp.lens_page import write_page
from vlmdiag.pictures.chats import read_messages, recorded_sources
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.mosaic import side_by_side
from vlmdiag.pictures.samples import load_pictures
from vlmdiag.pictures.video import frames_of, read_frames

TINY = ROOT / "checkpoints" / "tiny-llava"
TOOLS = ROOT / "diagnostic_tools"
coco = in_process(TOOLS / "run_coco_diagnostics.py")
relevancy = in_process(TOOLS / "relevancy_maps.py")
figures = in_process(TOOLS / "viz_relevancy.py")
attention = in_process(TOOLS / "viz_attention_image.py")
check = in_process(TOOLS / "check_model.py")
lens = in_process(ROOT / "scripts" / "logit_lens" / "create_logit_lens.py")
MESSAGES = [
    {
        "id": "two",
        "images": ["a.png", "b.png"],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "image"},
                    {"type": "text", "text": "Is there a red circle in the image?"},
                ],
            },
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Describe the image."},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": "c.png"},
                    {"type": "image", "path": "a.png"},
                    {"type": "image", "path": "b.png"},
                    {"type": "text", "text": "Describe the image."},
                ],
            }
        ]
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """Three pictures, messages about them, a video of ten frames of their own grey each."""
    root = tmp_path_factory.mktemp("chats")
    for name, picture in zip("abc", pictures):
        picture.save(root / f"{name}.png")
    (root / "chats.json").write_text(json.dumps(MESSAGES))
    with av.open(str(root / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (96, 64), (20 * index,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return root


def run(command, *arguments):
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(folder):
    """The run of the messages by run_coco_diagnostics.py."""
    flags = ("--model_path", TINY, "--messages", folder / "chats.json", "--batch_size", 2)
    run(coco, *flags, "--out_root", folder / "runs", "--max_new_tokens", 3, "--probe_hidden_norms")
    return folder / "runs" / "tiny-llava__sp-0"


def item(path, id):
    return (
        json.loads((path / "per_image" / f"{id}.json").read_text()),
        dict(np.load(path / "per_image" / f"{id}.npz")),
    )


@pytest.mark.parametrize("id", ["two", "c-1"])
def test_mass_by_picture_and_turn_is_that_of_the_eager_maps(measured, id):
    record, arrays = item(measured, id)
    vlm = common.load_model(TINY, self_check=False)
    pictures = list(load_pictures(recorded_sources(record["images"])))
    ids = record["generated_ids"]
    inputs = vlm.processor(images=pictures, text=record["prompt"], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    answer = torch.tensor([ids[:-1]], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    vlm.parts.decoder.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = torch.stack(vlm.model(**inputs, output_attentions=True).attentions)[:, 0]
    steps = maps[:, :, length - 1 :]  # (L, H, N, K)

    def mass(spans):
        return sum(steps[..., start:end].sum(-1) for start, end in spans).mean(-1)

    groups = record["groups"]
    for picture, found in zip(record["pictures"], arrays["picture_mass"], strict=True):
        assert np.allclose(mass(picture["spans"]), found, atol=1e-5)
    assert not np.allclose(arrays["picture_mass"][0], arrays["picture_mass"][1], atol=1e-3)
    total = arrays["group_mass"]
    assert np.allclose(arrays["picture_mass"].sum(0), total[groups.index("vision")], atol=1e-5)
    assert np.allclose(arrays["turn_mass"].sum(0), total, atol=1e-5)
    record["turns"][-1]["spans"].append([length, maps.shape[-1]])
    for turn, found in zip(record["turns"], arrays["turn_mass"], strict=True):
        assert np.allclose(mass(turn["spans"]), found.sum(0), atol=1e-5)
    assert sum(record["mean_vision_by_picture"]) == pytest.approx(record["mean_vision_share"])
    assert sum(record["mean_text_by_turn"]) == pytest.approx(record["mean_text_share"])


def test_records_say_which_pictures_and_turns_their_arrays_are_of(measured):
    for id, names, roles in (
        ("two", "ab", ["", "user", "assistant", "user", "assistant"]),
        ("c-1", "cab", ["", "user", "assistant"]),
    ):
        record, arrays = item(measured, id)
        assert [name.rsplit("/", 1)[-1] for name in record["images"]] == [f"{n}.png" for n in names]
        assert len(record["pictures"]) == len(arrays["picture_mass"]) == len(names)
        assert [turn["role"] for turn in record["turns"]] == roles
        assert len(arrays["turn_mass"]) == len(roles)
    settings = json.loads((measured / "meta.json").read_text())["settings"]
    assert settings["messages"] == "chats.json" and "ann_file" not in settings


def test_a_run_of_other_pictures_is_refused(folder):
    flags = ("--model_path", TINY, "--out_root", folder / "other", "--max_new_tokens", 2)
    run(coco, *flags, "--images", folder / "a.png", folder / "b.png")
    assert (folder / "other" / "tiny-llava__sp-0" / "per_image" / "a+1.npz").exists()
    done = coco(*flags, "--images", folder / "a.png", folder / "c.png")
    assert done.returncode == 2 and "images" in done.stderr


def test_relevancy_and_its_figures_are_over_all_pictures(folder):
    flags = ("--model_path", TINY, "--messages", folder / "chats.json", "--max_new_tokens", 3)
    run(relevancy, *flags, "--out_root", folder / "runs")
    path = folder / "runs" / "relevancy" / "tiny-llava"
    record, arrays = item(path, "c-1")
    assert arrays["picture"].tolist() == [0] * 144 + [1] * 144 + [2] * 144
    assert len(arrays["boxes"]) == arrays["cells"].shape[-1] == 432
    sizes = [tuple(grid["size"]) for grid in record["grids"]]
    assert sizes == [picture.size for picture in load_pictures(recorded_sources(record["images"]))]
    shares, total = np.array(record["picture_share"]), np.array(record["visual_share"])
    assert shares.shape[-1] == 3 and np.allclose(shares.max(-1), total, atol=1e-6)
    run(figures, "--run_dir", path)
    run(figures, "--run_dir", path, "--image_key", "two", "--token", 0)
    assert {file.name for file in (path / "analysis").glob("*.png")} == {
        "two_tokens.png",
        "c-1_tokens.png",
        "two_token0.png",
    }


def test_a_lens_page_has_the_pictures_and_turns(folder):
    flags = ("--model_path", TINY, "--messages", folder / "chats.json", "--top_k", 2)
    run(lens, *flags, "--out_root", folder / "runs", "--save_folder", folder / "pages")
    page = (folder / "pages" / "tiny-llava_two_logit_lens.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [count for count, _ in data["pictures"]] == [144, 144]
    assert sorted(set(data["turns"])) == [-1, 0, 1, 2, 3]
    assert len(data["turns"]) == len(data["labels"]) == data["shape"][1]


def test_an_overlay_is_over_all_pictures(folder):
    out = folder / "overlay"
    two = ("--images", folder / "a.png", folder / "b.png")
    run(attention, "--model_path", TINY, *two, "--token_position", 1, "--out_dir", out)
    record = json.loads((out / "attention_tiny-llava.json").read_text())
    arrays = np.load(out / "attention_tiny-llava.npz")
    parts = [arrays["map"][arrays["picture"] == number].sum() for number in (0, 1)]
    assert np.allclose(record["sum_by_picture"], parts) and len(record["images"]) == 2
    assert len(arrays["boxes"]) == len(arrays["map"]) == 288
    assert (out / "attention_comparison.png").exists()


def test_check_model_says_picture_and_turn_of_every_token(folder):
    (folder / "one.json").write_text(json.dumps(MESSAGES[0]))
    files = ("--out", folder / "grid.png", "--json", folder / "report.json")
    out = run(check, TINY, "--messages", folder / "one.json", *files)
    prompt = json.loads((folder / "report.json").read_text())["prompt"]
    assert prompt["chat"]["pictures"][1]["spans"] == [[178, 322]]
    assert len(prompt["numbers"]) == len(prompt["turns"]) == prompt["length"]
    assert "picture 1     [178, 322), in turn 0" in out and "turn 1, assistant" in out
    assert "288 vision tokens, 288 with a box" in out and "passed" in out
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > grid.height


def test_the_page_names_picture_and_turn_of_a_chosen_position(tmp_path, open_browser):
    size = (80, 60)
    regular = PatchGrid.regular(2, 2, (0, 0, *size), size)
    grids = [regular, PatchGrid(np.array([[0, 0, 40, 60], [np.nan] * 4]), None, size)]
    canvas, mosaic = side_by_side([Image.new("RGB", size)] * 2, grids)
    groups = ["bos", *["vision"] * 4, "user", "generated", *["vision"] * 2, "template"]
    turns = [-1, 0, 0, 0, 0, 0, 1, 2, 2, 3]
    ids = np.zeros((2, len(groups), 1), int)
    labels = [str(position) for position in range(len(groups))]
    facts = {"title": "t", "model": "m", "picture": "p", "prompt": "", "question": ""}
    page = tmp_path / "page.html"
    write_page(page, canvas, mosaic, labels, groups, ids, ids / 1.0, {0: "x"}, facts, turns)
    browser = open_browser("1300,700", {"browser": "ALL"})
    browser.get(page.as_uri())
    browser.execute_script("document.querySelector('[data-filter=all]').click()")
    for position, said in (
        (0, "position 0 · bos"),
        (3, "position 3 · picture 0, row 2, column 1 · turn 0"),
        (6, "position 6 · generated · turn 1"),
        (7, "position 7 · picture 1 · turn 2"),
        (8, "position 8 · picture 1 · turn 2 · no place in the picture"),
        (9, "position 9 · template · turn 3"),
    ):
        row = f'tbody tr[data-position="{position}"] th'
        browser.execute_script(f"document.querySelector('{row}').click()")
        place = "return document.getElementById('panel-place').textContent"
        assert browser.execute_script(place) == said
    assert not browser.get_log("browser")


# --- reading --------------------------------------------------------------------------------------


def asked(tmp_path, entry):
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    return read_messages(tmp_path / "list.json", frames=2)[0]


USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}
IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}


def test_pictures_without_a_place_stand_in_front_of_the_first_words(tmp_path):
    sample = asked(tmp_path, {"images": ["x.jpg", "y.jpg"], "messages": [USER, ANSWER, USER]})
    assert sample.chat.turns[0].parts == (None, None, "Why?")
    assert [path.name for path in sample.chat.images] == ["x.jpg", "y.jpg"]
    assert sample.id == "x-0" and sample.question == "Why?" and sample.answer is None


def test_a_last_answer_and_a_system_message_are_read(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    sample = asked(tmp_path, {"images": ["x.jpg"], "messages": [system, IMAGE, ANSWER], "id": 7})
    assert sample.answer == "So." and sample.chat.system == "Be brief."
    assert len(sample.chat.turns) == 1 and sample.id == f"{7:012d}"


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"messages": [USER]}, "it has no picture"),
        ({"messages": [IMAGE]}, "lists 0 images"),
        ({"images": ["x", "y"], "messages": [IMAGE]}, "lists 2 images"),
        ({"images": ["x"], "messages": [IMAGE, USER]}, "in turn"),
        ({"images": ["x"], "messages": [ANSWER, IMAGE]}, "in turn"),
        ({"images": ["x"], "messages": "Why?"}, "no list"),
        ({"images": ["x"], "messages": [{"role": "tool", "content": ""}]}, "no message of"),
        (
            {"images": ["x"], "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "no part",
        ),
        (
            {"images": ["x"], "messages": [USER, ANSWER | IMAGE | {"role": "assistant"}]},
            "belong to",
        ),
    ],
)
def test_another_form_is_named(tmp_path, entry, why):
    with pytest.raises(UsageError, match="entry 0") as error:
        asked(tmp_path, entry)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_commands_of_one_picture_name_those_that_take_several(folder, tmp_path):
    from vlmdiag.pictures.questions import read_questions

    with pytest.raises(UsageError, match="run_coco_diagnostics.py"):
        read_questions(folder / "chats.json")
    done = in_process(TOOLS / "psi.py")(
        "--model_path", TINY, "--questions", folder / "chats.json", "--out_root", tmp_path
    )
    assert done.returncode == 2 and "several pictures or turns" in done.stderr


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ((), "are required: --image_dir, --ann_file"),
        (("--images", "x.png", "--video", "y.mp4"), "different pictures"),
        (("--video", "y.mp4", "--frames", "0"), "from 1 to"),
        (("--images", "x.png", "--ann_file", "z.json"), "different pictures"),
    ],
)
def test_pictures_are_named_in_one_way(flags, why):
    done = coco("--model_path", TINY, *flags)
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1


# --- videos ---------------------------------------------------------------------------------------


def test_frames_are_those_of_their_numbers(folder):
    frames = frames_of(folder / "clip.mp4", 4)
    assert [frame.index for frame in frames] == [0, 2, 5, 7]
    greys = [np.asarray(picture).mean() for picture in load_pictures(frames)]
    assert np.allclose(greys, [20 * frame.index for frame in frames], atol=6)
    assert recorded_sources([str(frame) for frame in frames]) == frames


def test_a_video_is_a_list_of_frames(folder):
    flags = ("--model_path", TINY, "--out_root", folder / "video", "--max_new_tokens", 2)
    run(coco, *flags, "--video", folder / "clip.mp4", "--frames", 3)
    record, arrays = item(folder / "video" / "tiny-llava__sp-0", "clip+2")
    assert [name.rsplit("#")[-1] for name in record["images"]] == ["0", "3", "6"]
    assert len(arrays["picture_mass"]) == 3


def test_what_is_wrong_with_a_video_is_one_line(folder, monkeypatch):
    (folder / "broken.mp4").write_bytes(b"no video" * 20)
    for path, count, why in (
        (folder / "none.mp4", 2, "no such file"),
        (folder / "broken.mp4", 2, "not a readable video"),
        (folder / "clip.mp4", 11, "has 10 frames"),
    ):
        with pytest.raises(UsageError, match=why):
            frames_of(path, count)
    with pytest.raises(UsageError, match="no frame 12"):
        read_frames(folder / "clip.mp4", [1, 12])
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(
        UsageError, match=r"pip install av, or this package with its extra \[video\]"
    ):
        frames_of(folder / "clip.mp4", 2)


# --- side by side ---------------------------------------------------------------------------------


def test_a_mosaic_paints_each_picture_in_its_place():
    pictures = [
        Image.new("RGB", size) for size in ((40, 40), (80, 40), (20, 20), (40, 40), (40, 40))
    ]
    grids = [PatchGrid.regular(2, 2, (0, 0, *picture.size), picture.size) for picture in pictures]
    canvas, mosaic = side_by_side(pictures, grids)
    assert canvas.size == mosaic.size and len(mosaic.parts) == 5
    values = np.repeat(np.arange(5.0), 4)
    for smooth in (True, False):
        painted = mosaic.paint(values, smooth)
        assert painted.shape == canvas.size[::-1] and np.isnan(painted).any()
        for number, (grid, (x, y)) in enumerate(mosaic.parts):
            width, height = grid.size
            assert (painted[y : y + height, x : x + width] == number).all()
    half = mosaic.rescaled((canvas.width // 2, canvas.height // 2))
    assert np.allclose(half.boxes * 2, mosaic.boxes, atol=2)
    assert mosaic.parts[4][1][1] > mosaic.parts[3][1][1]  # the second row


def test_a_box_on_padding_does_not_reach_into_the_next_picture():
    region = (-10, 0, 30, 40)  # of a picture 20 wide, padded to 40
    grid = PatchGrid.regular(1, 4, region, (20, 40))
    _, mosaic = side_by_side([Image.new("RGB", (20, 40))] * 2, [grid, grid])
    for start, (part, (x, _)) in zip((0, 4), mosaic.parts):
        boxes = mosaic.boxes[start : start + 4]
        assert np.isnan(boxes[[0, 3]]).all()
        assert boxes[1:3, 0].min() >= x and boxes[1:3, 2].max() <= x + part.size[0]

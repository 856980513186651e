"""Lists of images and questions, and pictures of every kind."""

import io
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.conftest import ROOT
from vlmdiag.cli import UsageError
from vlmdiag.pictures import deferred, samples
from vlmdiag.pictures.coco import read_coco
from vlmdiag.pictures.questions import read_mmhal, read_questions
from vlmdiag.pictures.samples import Sample, annotated_as, load_image, picture_header, turn_of
from vlmdiag.runs.rundirs import open_run

pytestmark = pytest.mark.filterwarnings("error")


def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- lists ----


def coco(folder, images, files=("a.jpg",)):
    (folder / "images").mkdir()
    for file in files:
        (folder / "images" / file).touch()
    return folder / "images", put(folder / "ann.json", {"images": images, "annotations": []})


def test_coco_pictures_come_in_file_order_each_once(tmp_path):
    listed = [(6818, "a.jpg"), (139, "b.jpg"), (6818, "a.jpg"), ("x1", "d.jpg")]
    images = [{"id": id, "file_name": name, "width": 4, "height": 3} for id, name in listed]
    folder, file = coco(tmp_path, images)
    found = read_coco(folder, file, question="What is this?")
    assert [sample.id for sample in found] == ["000000006818", "000000000139", "x1"]
    assert found[0] == Sample(
        "000000006818",
        folder / "a.jpg",
        "What is this?",
        None,
        {"image_id": 6818, "width": 4, "height": 3},
    )
    assert [sample.id for sample in read_coco(folder, file, max_images=1)] == ["000000006818"]
    assert len(read_coco(folder, file, max_images=100)) == 3 and len({*found}) == 3


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not readable JSON"),
        ("[]", "not a COCO annotation file"),
        ({"annotations": []}, "not a COCO annotation file"),
        ({"images": {}}, "a list of objects was wanted"),
        ({"images": []}, "the list is empty"),
        ({"images": [3]}, "image 0 is a int"),
        ({"images": [{"id": 0, "file_name": "a.jpg"}, {"id": 1}]}, "image 1 has no file_name"),
        ({"images": [{"file_name": "a.jpg"}]}, "image 0 has no id"),
    ],
)
def test_a_file_that_is_not_coco_is_named(tmp_path, content, words):
    file = put(tmp_path / "captions.json", content)
    with pytest.raises(UsageError, match=words) as caught:
        read_coco(tmp_path, file)
    assert "captions.json" in str(caught.value) and "\n" not in str(caught.value)


def test_coco_without_its_pictures_is_a_usage_error(tmp_path):
    folder, file = coco(tmp_path, [{"id": 1, "file_name": "missing.jpg"}])
    for call in (
        lambda: read_coco(folder, file),
        lambda: read_coco(tmp_path / "no", file),
        lambda: read_coco(folder, tmp_path / "no.json"),
    ):
        with pytest.raises(UsageError, match="none of the 1 pictures|no such"):
            call()
    with pytest.raises(UsageError, match="--max_images 0"):
        read_coco(folder, file, max_images=0)


def test_questions_are_numbered_within_their_image(tmp_path):
    entries = [
        {"image_id": 7, "question": "Left or right?", "answer": "left", "kind": "left_right"},
        {"image": "b/cat.png", "question": "What?", "answer": None},
        {"image_id": 7, "image": "x.jpg", "question": "How many?", "answer": 3},
    ]
    file = put(tmp_path / "q.json", entries)
    found = read_questions(file)
    assert [sample.id for sample in found] == ["000000000007-0", "cat-0", "000000000007-1"]
    assert [sample.image for sample in found] == [
        tmp_path / "000000000007.jpg",
        tmp_path / "b/cat.png",
        tmp_path / "x.jpg",
    ]
    assert [sample.answer for sample in found] == ["left", None, "3"]
    assert found[0].extra == {"image_id": 7, "kind": "left_right"} and found[1].extra == {
        "image_id": "cat"
    }
    assert read_questions(file, tmp_path / "pics")[1].image == tmp_path / "pics/b/cat.png"


def test_mmhal_keeps_its_urls_and_takes_both_names_of_the_answer(tmp_path):
    entries = [
        {
            "image_id": "ab12",
            "image_src": "https://host/2/9_o%20x.jpg?size=3",
            "question": "Which?",
            "gold_answer": "white",
            "question_type": "attribute",
        },
        {"image_id": "cd34", "image_src": "pics/b.jpg", "question": "Where?", "gt_answer": "here"},
        {"image_id": "ab12", "image_src": "/abs/c.jpg", "question": "Why?"},
    ]
    found = read_mmhal(put(tmp_path / "mmhal.json", entries), tmp_path / "base")
    assert [sample.id for sample in found] == ["ab12", "cd34", "ab12-1"]
    assert [str(sample.image) for sample in found] == [
        f"{tmp_path}/base/9_o x.jpg",
        f"{tmp_path}/base/pics/b.jpg",
        "/abs/c.jpg",
    ]
    assert [sample.answer for sample in found] == ["white", "here", None]
    assert found[0].extra == {
        "image_id": "ab12",
        "image_src": "https://host/2/9_o%20x.jpg?size=3",
        "question_type": "attribute",
    }


def test_a_list_entry_without_a_field_is_named(tmp_path):
    with pytest.raises(UsageError, match="q.json: entry 1 has no question"):
        read_questions(
            put(tmp_path / "q.json", [{"image_id": 1, "question": "a"}, {"image_id": 1}])
        )
    with pytest.raises(UsageError, match="entry 0 has no image_id or image"):
        read_questions(put(tmp_path / "q.json", [{"question": "a"}]))
    with pytest.raises(UsageError, match="entry 0 has no .*image_src"):
        read_mmhal(put(tmp_path / "m.json", [{"question": "a"}]))


# ---- pictures ----


def saved(path, image, **options):
    image.save(path, **options)
    return path


def gradient(mode="RGB", size=(8, 6)):
    width, height = size
    values = np.stack(
        np.broadcast_arrays(
            np.linspace(0, 255, width)[None], np.linspace(255, 0, height)[:, None], 90
        ),
        -1,
    ).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


MODES = "RGB.png RGB.bmp L.png 1.png P.png P.gif CMYK.tif YCbCr.tif RGBA.png LA.png"


@pytest.mark.parametrize("kind", MODES.split())
def test_every_mode_loads_as_the_rgb_that_pil_converts_to(tmp_path, kind):
    mode, ending = kind.split(".")
    options = (
        {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    )  # Pillow 12 cannot read an uncompressed one that it wrote
    path = saved(tmp_path / f"a.{ending}", gradient(mode), **options)
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (8, 6)
    with Image.open(path) as raw:
        assert np.array_equal(image, raw.convert("RGB"))


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    assert (
        np.abs(
            np.asarray(load_image(saved(tmp_path / "a.jpg", red.convert("CMYK"), quality=95)), int)
            - [250, 10, 10]
        ).max()
        < 12
    )


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = gradient("P", (16, 16))
    for transparency in (3, bytes(range(256))):
        path = saved(tmp_path / "a.png", image, transparency=transparency)
        assert np.array_equal(load_image(path), image.convert("RGB"))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    expected = np.round(values / 257).astype(int)
    for ending, stored in (("png", values), ("tif", values), ("tif", values.astype(">u2"))):
        Image.fromarray(stored).save(tmp_path / f"a.{ending}")
        assert np.array_equal(np.asarray(load_image(tmp_path / f"a.{ending}"))[..., 0], expected)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "i.tif")
    assert np.array_equal(np.asarray(load_image(tmp_path / "i.tif"))[..., 0], expected)


def test_values_of_unknown_range_are_refused(tmp_path):
    for values in (
        np.ones((2, 2), np.float32),
        np.full((2, 2), 70000, np.int32),
        np.full((2, 2), -1, np.int32),
    ):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="a.tif: .*range of values is unknown"):
            load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", gradient(), exif=exif)
    image = load_image(path)
    with Image.open(path) as raw:
        assert np.array_equal(image, ImageOps.exif_transpose(raw))
    assert np.array_equal(ImageOps.exif_transpose(image), image)  # as a processor may do again


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    for exif in (
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0",
    ):
        path = saved(tmp_path / "a.jpg", gradient(), exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow may say that the EXIF data are corrupt
            assert load_image(path).size == (8, 6)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 1000), (6000, 10), (10, 6000), (4000, 4000)])
def test_pictures_of_extreme_shape_load(tmp_path, size):
    path = saved(tmp_path / "a.png", gradient(size=size))
    assert load_image(path).size == size
    assert picture_header(path) == (size, 1)


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ((1001, 1), "one side more than 1000 times the other"),
        ((2, 60000), "one side more than 1000 times the other"),
        ((20000, 1), "one side more than 1000 times the other"),
        ((10001, 10000), "more than 100 million"),
    ],
)
def test_a_picture_that_would_take_the_memory_is_refused_before_it_is_decoded(tmp_path, size, why):
    path = saved(tmp_path / "a.png", Image.new("1", size))
    for read in (load_image, picture_header):
        with pytest.raises(ValueError, match=f"a.png: .*{size[0]} x {size[1]} pixels, {why}"):
            read(path)


@pytest.mark.parametrize("size", [(500, 400), (401, 400), (900, 40), (40, 900)])
@pytest.mark.parametrize("kind", ["RGB.png", "L.png", "P.png", "RGBA.png", "CMYK.jpg", "I;16.png"])
def test_a_large_picture_is_kept_smaller_in_its_shape(tmp_path, monkeypatch, size, kind):
    monkeypatch.setattr(samples, "KEPT_PIXELS", 160_000)
    monkeypatch.setattr(samples, "KEPT_SIDE", 600)
    mode, ending = kind.split(".")
    picture = gradient("RGB" if ending == "png" and mode != "L" else mode, size)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    elif mode != "CMYK":
        picture = picture.convert(mode)
    path = saved(tmp_path / f"a.{ending}", picture)
    image = load_image(path)
    assert image.mode == "RGB" and image.size == picture_header(path)[0]
    assert image.width * image.height <= samples.KEPT_PIXELS * 1.001
    assert max(image.size) <= samples.KEPT_SIDE
    assert annotated_as(size, image.size, 1) == "shown"
    whole = picture.convert("L").convert("RGB") if mode == "I;16" else picture.convert("RGB")
    if mode == "I;16":
        whole = gradient("L", size).convert("RGB")
    small = np.asarray(whole.resize((4, 4), Image.Resampling.BOX), int)
    found = np.asarray(image.resize((4, 4), Image.Resampling.BOX), int)
    assert np.abs(small - found).max() <= 4


def test_a_large_turned_picture_is_upright_and_smaller(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", gradient(size=(5000, 4000)), exif=exif)
    image = load_image(path)
    assert image.size == picture_header(path)[0] == (3578, 4472) and turn_of(image) == 6
    assert annotated_as((5000, 4000), image.size, 6) == "stored"


WORST = """
import resource, sys
from pathlib import Path
from vlmdiag.pictures.samples import Sample, with_picture
from vlmdiag.runs.engine import run_items
from vlmdiag.runs.rundirs import open_run
files = sorted(Path(sys.argv[1]).iterdir())
items = [Sample(str(n), file, "?") for n, file in enumerate(files)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = open_run(sys.argv[2], "worst", {})
counts = run_items(run, items, with_picture, lambda batch: [({}, {})] * len(batch), num_workers=4)
assert counts["done"] == len(items), counts
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in KiB")
def test_the_largest_pictures_take_less_than_one_and_a_half_gigabytes(tmp_path):
    """Four threads that decode ahead, pictures at the limit of every kind of mode."""
    (tmp_path / "pictures").mkdir()
    square = (10000, 10000)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture in {
        "one bit.png": Image.new("1", square),
        "sixteen.png": Image.fromarray(np.zeros(square, np.uint16)),
        "alpha.png": Image.new("RGBA", square),
        "palette.png": Image.new("P", square),
        "strip.png": Image.new("L", (100000, 1000)),
    }.items():
        saved(tmp_path / "pictures" / name, picture, compress_level=1, exif=exif)
    done = subprocess.run(
        [sys.executable, "-c", WORST, str(tmp_path / "pictures"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout.split()[-1]) < 1.5 * 2**20


BATCH = """
import resource, sys
from pathlib import Path
import common
from vlmdiag.pictures.samples import Sample, with_picture
from vlmdiag.runs.engine import run_items
from vlmdiag.runs.rundirs import open_run
files = sorted(Path(sys.argv[1]).iterdir())
vlm = common.load_model(sys.argv[3], self_check=False)
items = [Sample(str(n), file, "What is it?") for n, file in enumerate(files)]
def process(batch):
    samples, images = zip(*batch)
    vlm.encode(samples, images)
    return [({}, {})] * len(batch)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = open_run(sys.argv[2], "worst", {})
counts = run_items(run, items, with_picture, process, batch_size=20, num_workers=4)
assert counts["done"] == len(items), counts
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in KiB")
def test_a_batch_of_many_large_pictures_takes_no_more_than_a_few(tmp_path):
    """20 pictures of 64 MB each as they are kept, 1.3 GB, and the beginning of another batch."""
    (tmp_path / "pictures").mkdir()
    first = saved(tmp_path / "pictures" / "00.png", Image.new("1", (6000, 5000)))
    for n in range(1, 24):
        os.link(first, tmp_path / "pictures" / f"{n:02d}.png")
    folders = [str(tmp_path / name) for name in ("pictures", "run")]
    done = subprocess.run(
        [sys.executable, "-c", BATCH, *folders, str(ROOT / "checkpoints/tiny-llava")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout.split()[-1]) < 1.0 * 2**20


def test_pixels_that_were_let_go_are_decoded_again(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", gradient(size=(1600, 1200)), exif=None)
    plain = load_image(path)
    monkeypatch.setattr(deferred, "HELD", 0)
    for source in (path, io.BytesIO(path.read_bytes())):
        later = load_image(source)
        assert isinstance(later, deferred.Deferred) and not isinstance(plain, deferred.Deferred)
        for _ in range(2):
            assert later._im is None and later.size == plain.size
            assert np.array_equal(np.asarray(later), np.asarray(plain))
            assert np.array_equal(later.resize((9, 9)), plain.resize((9, 9)))
            assert later._im is not None
            deferred.let_go(later)
    assert np.array_equal(later.convert("L"), plain.convert("L"))
    with pytest.raises(ValueError, match="not a readable picture"):
        load_image(io.BytesIO(path.read_bytes()[:3000]))  # known at once, not when it is used


def test_unreadable_pictures_are_named_in_one_line(tmp_path):
    buffer = io.BytesIO()
    gradient(size=(64, 64)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:400])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("cut", "text", "empty", "folder"):
        with pytest.raises(ValueError, match=rf"{name}\.jpg: not a readable picture") as caught:
            load_image(tmp_path / f"{name}.jpg")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: no such picture"):
        load_image(tmp_path / "none.jpg")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_picture_loads_or_raises_one_of_the_two_errors(tmp_path_factory, data):
    ending = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    buffer = io.BytesIO()
    gradient(size=(24, 16)).save(buffer, ending)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(path).mode == "RGB"
        except (ValueError, FileNotFoundError) as error:
            assert "fuzzed" in str(error)


# ---- names of pictures ----


def long_and_odd():
    """Names that a folder may hold and that cannot name other files."""
    yield from ("x" * 251 + ".jpg", "é" * 125 + ".png", "y" * 180 + ".jpg", "a\\b.jpg")
    yield os.fsdecode(b"\xff\xfe.jpg")


def test_pictures_of_any_name_are_items_whose_ids_name_files(tmp_path):
    names = ["a.jpg", "a.png", "b c'd.jpg", *long_and_odd()]
    for name in names:
        (tmp_path / name).touch()
    run = open_run(tmp_path / "run", "demo", {})
    found = samples.samples_of(tmp_path, "What?")
    assert sorted(sample.image.name for sample in found) == sorted(names)
    for sample in found:
        run.write(sample.id, {"name": sample.image.name})
    assert len(run.ids()) == len(names)
    assert {sample.id for sample in found} >= {"a.jpg", "a.png", "b c'd"}
    assert samples.samples_of(tmp_path, "What?", 3) == found[:3]  # ids of a run that grows


def test_a_question_about_a_picture_of_a_long_name_has_an_id(tmp_path):
    entries = [{"image": name, "question": "What?"} for name in long_and_odd()]
    found = read_questions(put(tmp_path / "q.json", entries))
    run = open_run(tmp_path / "run", "demo", {})
    for sample in found:
        run.fail(sample.id, ValueError(sample.image.name))
    assert len(run.failed()) == len(entries)


# ---- orientation ----


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff", "tiff_lzw"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_of_any_format_is_upright_and_its_header_says_so(tmp_path, form, turn):
    blocks = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4, 3), np.uint8))
    stored = blocks.resize((80, 60), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[samples.ORIENTATION] = turn
    path = tmp_path / "picture"
    if form.startswith("tiff"):
        compression = form.removeprefix("tiff_") if "_" in form else None
        options = {"compression": f"tiff_{compression}"} if compression else {}
        stored.save(path, "tiff", tiffinfo={samples.ORIENTATION: turn}, **options)
    else:
        stored.save(path, form, exif=exif, quality=100)
    upright = stored.transpose(samples.TURN[turn]) if turn in samples.TURN else stored
    found = load_image(path)
    assert picture_header(path) == (found.size, turn) and turn_of(found) == turn
    distance = np.abs(np.asarray(found, int) - np.asarray(upright, int))
    assert found.size == upright.size and distance.mean() < 4  # JPEG and WebP lose a little
    if turn > 1:  # and not as it is stored, nor turned twice
        for other in (stored, upright.transpose(samples.TURN[turn])):
            wrong = other.size != found.size
            assert wrong or np.abs(np.asarray(found, int) - np.asarray(other, int)).mean() > 10


@pytest.mark.parametrize(
    ("mode", "largest"), [("I", 1), ("I", 255), ("I", 10**6), ("F", 1), ("F", 255), ("F", 65535)]
)
def test_a_picture_of_32_bits_is_refused_where_its_white_is_unknown(tmp_path, mode, largest):
    levels = np.linspace(0, largest, 64).reshape(8, 8)
    numbers = levels.astype(np.int32 if mode == "I" else np.float32)
    Image.fromarray(numbers).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="32-bit picture"):
        load_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("ending", ["pgm", "png", "tif"])
def test_16_bits_are_read_alike_from_every_format(tmp_path, ending):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / f"deep.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    expected = ((levels.astype(int) + 128) // 257).astype(np.uint8)
    assert np.array_equal(np.asarray(load_image(path))[..., 0], expected)


def test_no_picture_runs_a_program(tmp_path, monkeypatch):
    """PostScript under the name of a photograph."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("it ran"))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.eps")
    (tmp_path / "photo.eps").rename(tmp_path / "photo.jpg")
    for read in (load_image, picture_header):
        with pytest.raises(ValueError, match="PostScript is a program"):
            read(tmp_path / "photo.jpg")


def test_pictures_whose_names_differ_in_their_endings_have_ids_of_their_own(tmp_path):
    for name in ("a.jpg", "a.png", "a.jpg.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = [sample.id for sample in samples.samples_of(tmp_path, "?")]
    assert len(set(found)) == 4 and "b" in found

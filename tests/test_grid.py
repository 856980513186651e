"""Boxes of vision tokens in the original picture: painting, coverage, and LLaVA's preprocessing
geometry against the real image processor."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.building import clip_processor
from vlmdiag.families import llava
from vlmdiag.pictures.grid import PatchGrid

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
floats = st.floats(-40, 130, allow_nan=False, width=32)
regions = st.tuples(floats, floats, st.floats(1, 150, width=32), st.floats(1, 150, width=32)).map(
    lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3])
)


def random_values(count, seed=0):
    return np.random.default_rng(seed).random(count)


def pixel_centres(size):
    ys, xs = np.mgrid[: size[1], : size[0]] + 0.5
    return xs, ys


@quick
@given(sizes, shapes, regions)
def test_cells_tile_the_region_in_row_major_order(size, shape, region):
    grid = PatchGrid.regular(*shape, region, size)
    x0, y0, x1, y1 = grid.boxes.reshape(*shape, 4).transpose(2, 0, 1)
    assert np.allclose(x0[:, 1:], x1[:, :-1])
    assert np.allclose(y0[1:], y1[:-1])
    assert (x1 > x0).all()
    assert (y1 > y0).all()
    assert np.allclose([x0.min(), y0.min(), x1.max(), y1.max()], region)
    assert grid.has_box.all()
    assert grid.shape == shape
    assert grid.size == size


@quick
@given(sizes, shapes, regions, st.booleans())
def test_a_picture_is_painted_exactly_where_tokens_lie(size, shape, region, smooth):
    painted = PatchGrid.regular(*shape, region, size).paint(random_values(math.prod(shape)), smooth)
    xs, ys = pixel_centres(size)
    edge = min(
        np.abs(xs[..., None] - [region[0], region[2]]).min(),
        np.abs(ys[..., None] - [region[1], region[3]]).min(),
    )
    assume(edge > 1e-3)  # a pixel centre on the region's edge may fall on either side
    inside = (xs > region[0]) & (xs < region[2]) & (ys > region[1]) & (ys < region[3])
    assert painted.shape == (size[1], size[0])
    assert np.array_equal(~np.isnan(painted), inside)


@quick
@given(sizes, shapes, regions)
def test_smooth_painting_is_the_bilinear_interpolation_between_cell_centres(size, shape, region):
    values = random_values(math.prod(shape))
    painted = PatchGrid.regular(*shape, region, size).paint(values)
    xs, ys = pixel_centres(size)
    column = np.clip((xs - region[0]) / (region[2] - region[0]) * shape[1] - 0.5, 0, shape[1] - 1)
    row = np.clip((ys - region[1]) / (region[3] - region[1]) * shape[0] - 0.5, 0, shape[0] - 1)
    j = np.minimum(column.astype(int), max(shape[1] - 2, 0))
    i = np.minimum(row.astype(int), max(shape[0] - 2, 0))
    b = column - j
    a = row - i
    cells = np.pad(values.reshape(shape), ((0, 1), (0, 1)), mode="edge")
    expected = (1 - a) * ((1 - b) * cells[i, j] + b * cells[i, j + 1]) + a * (
        (1 - b) * cells[i + 1, j] + b * cells[i + 1, j + 1]
    )
    seen = ~np.isnan(painted)
    assert np.allclose(painted[seen], expected[seen], atol=2e-3)


@quick
@given(sizes, shapes, regions)
def test_flat_painting_gives_each_pixel_the_token_over_its_centre(size, shape, region):
    grid = PatchGrid.regular(*shape, region, size)
    values = random_values(len(grid.boxes))
    painted = grid.paint(values, smooth=False)
    for x, y in {
        (0, 0),
        (size[0] - 1, size[1] - 1),
        (size[0] // 2, size[1] // 2),
        (size[0] // 3, size[1] * 2 // 3),
    }:
        x0, y0, x1, y1 = grid.boxes.T
        # several where the centre is on an edge
        near = (
            (x0 - 1e-6 <= x + 0.5)
            & (x + 0.5 <= x1 + 1e-6)
            & (y0 - 1e-6 <= y + 0.5)
            & (y + 0.5 <= y1 + 1e-6)
        )
        assert painted[y, x] in values[near] if near.any() else np.isnan(painted[y, x])


@quick
@given(
    st.tuples(st.integers(24, 90), st.integers(24, 90)),
    shapes,
    st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    st.data(),
)
def test_the_hottest_pixel_lies_in_the_only_token_with_weight(size, shape, shift, data):
    grid = PatchGrid.regular(
        *shape, (shift[0], shift[1], size[0] + shift[0], size[1] + shift[1]), size
    )
    x0, y0, x1, y1 = grid.boxes.T
    wide = np.minimum(x1, size[0]) - np.maximum(x0, 0) >= 1.01
    high = np.minimum(y1, size[1]) - np.maximum(y0, 0) >= 1.01  # holds a pixel centre
    token = data.draw(st.sampled_from(np.flatnonzero(wide & high).tolist()))
    for smooth in (True, False):
        painted = grid.paint(np.eye(len(grid.boxes))[token], smooth)
        y, x = np.unravel_index(np.nanargmax(painted), painted.shape)
        assert x0[token] <= x + 0.5 <= x1[token] and y0[token] <= y + 0.5 <= y1[token]


def test_overlapping_tokens_are_averaged_and_tokens_without_a_box_are_left_out():
    boxes = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [np.nan] * 4, [-9, 0, -2, 4]])
    painted = PatchGrid(boxes, None, (6, 4)).paint([1, 3, 100, 100])
    assert np.array_equal(painted[0], [1, 1, 2, 2, 3, 3])
    with pytest.raises(ValueError, match="3 vision tokens|4 vision tokens"):
        PatchGrid(boxes, None, (6, 4)).paint([1, 2, 3])


@quick
@given(sizes, shapes, regions, st.integers(0, 5))
def test_coverage_is_the_share_of_a_box_under_the_mask(size, shape, region, seed):
    grid = PatchGrid.regular(*shape, region, size)
    mask = np.random.default_rng(seed).random((size[1], size[0])) < 0.4
    found = grid.coverage(mask)
    assert (found >= -1e-9).all() and (found <= 1 + 1e-9).all()
    x = np.arange(size[0])
    y = np.arange(size[1])
    for token in {0, len(found) // 2, len(found) - 1}:
        x0, y0, x1, y1 = grid.boxes[token]
        across = np.clip(np.minimum(x + 1, x1) - np.maximum(x, x0), 0, None)
        down = np.clip(np.minimum(y + 1, y1) - np.maximum(y, y0), 0, None)
        assert found[token] == pytest.approx(
            down @ mask @ across / ((x1 - x0) * (y1 - y0)), abs=1e-6
        )


@quick
@given(sizes, shapes)
def test_covered_areas_of_a_grid_over_the_whole_picture_add_up_to_the_mask(size, shape):
    grid = PatchGrid.regular(*shape, (0, 0, *size), size)
    mask = np.random.default_rng(0).random((size[1], size[0])) < 0.5
    x0, y0, x1, y1 = grid.boxes.T
    assert (grid.coverage(mask) * (x1 - x0) * (y1 - y0)).sum() == pytest.approx(mask.sum())
    assert np.allclose(grid.coverage(np.ones_like(mask)), 1)


def test_coverage_of_tokens_without_a_box_is_zero_and_a_mask_of_another_size_is_refused():
    grid = PatchGrid(
        np.array([[0, 0, 2, 2], [np.nan] * 4, [-4, -4, 0, 0], [1, 1, 3, 3]]), None, (2, 2)
    )
    assert np.allclose(grid.coverage(np.ones((2, 2), bool)), [1, 0, 0, 0.25])
    with pytest.raises(ValueError, match="2 x 2"):
        grid.coverage(np.ones((2, 3), bool))


# --- LLaVA's preprocessing ------------------------------------------------------------------------

SIDE, PATCH = 112, 14
PROCESSORS = {  # pad colour 0 = image_mean 0, so that the background is the darkest
    "crop": {"size": {"shortest_edge": SIDE}},
    "crop-margin": {"size": {"shortest_edge": SIDE + 40}},
    "crop-beyond": {"size": {"shortest_edge": SIDE - 41}},
    "pad": {"size": {"shortest_edge": SIDE}, "do_pad": True},
    "stretch": {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
}


def preprocess(name, picture):
    """(brightness of each patch after preprocessing (P,), its grid)."""
    processor = LlavaImageProcessorPil(
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
        **PROCESSORS[name],
    )
    inputs = processor(images=picture, return_tensors="pt")
    grid = llava.grid(
        SimpleNamespace(processor=clip_processor(processor, PATCH)), picture.size, inputs
    )
    cells = (
        inputs["pixel_values"][0]
        .mean(0)
        .numpy()
        .reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
        .mean((1, 3))
    )
    return cells.ravel(), grid


@pytest.mark.parametrize("name", PROCESSORS)
@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), data=st.data())
def test_a_bright_square_is_brightest_in_the_patch_whose_box_holds_its_centre(name, size, data):
    assume(max(size) <= 12 * min(size))
    _, grid = preprocess(name, Image.new("RGB", size))
    x0, y0, x1, y1 = grid.boxes.T
    whole = (np.floor(np.minimum(x1, size[0])) - np.ceil(np.maximum(x0, 0)) >= 1) & (
        np.floor(np.minimum(y1, size[1])) - np.ceil(np.maximum(y0, 0)) >= 1
    )
    assume(whole.any())  # a token with at least one whole pixel
    token = data.draw(st.sampled_from(np.flatnonzero(whole).tolist()))
    left = max(0, math.ceil(x0[token]))
    right = min(size[0], math.floor(x1[token]))
    top = max(0, math.ceil(y0[token]))
    bottom = min(size[1], math.floor(y1[token]))
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    brightness, grid = preprocess(name, Image.fromarray(pixels))
    ties = np.flatnonzero(brightness >= brightness.max() - 1e-6)
    assert token in ties
    boxes = grid.boxes[ties]
    centre = (left + right) / 2, (top + bottom) / 2
    assert (
        (boxes[:, 0] <= centre[0])
        & (centre[0] <= boxes[:, 2])
        & (boxes[:, 1] <= centre[1])
        & (centre[1] <= boxes[:, 3])
    ).any()


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (7, 1), (2, 1), (200, 3), (3, 200), (640, 480), (101, 67)]
)
def test_the_grid_of_any_picture_shows_its_middle_and_no_token_lies_elsewhere(name, size):
    _, grid = preprocess(name, Image.new("RGB", size, "white"))
    x0 = grid.boxes[:, 0].min()
    y0 = grid.boxes[:, 1].min()
    x1 = grid.boxes[:, 2].max()
    y1 = grid.boxes[:, 3].max()
    assert x0 <= size[0] / 2 <= x1 and y0 <= size[1] / 2 <= y1
    painted = grid.paint(np.ones(len(grid.boxes)))
    assert painted.shape == size[::-1] and (np.isnan(painted) | (painted == 1)).all()
    if name in ("pad", "stretch"):
        assert max(x0, y0) < 1e-6
        assert x1 > size[0] - 1e-6
        assert y1 > size[1] - 1e-6
    inside = grid.coverage(np.ones(size[::-1], bool))
    if name == "pad":  # every pixel of the picture is seen, once
        assert (
            inside * (grid.boxes[:, 2] - grid.boxes[:, 0]) * (grid.boxes[:, 3] - grid.boxes[:, 1])
        ).sum() == pytest.approx(size[0] * size[1])
    if name in ("crop", "crop-margin"):
        assert np.allclose(inside, 1, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (301, 200), (57, 91)])
def test_each_patch_boundary_is_found_to_a_pixel_where_it_falls_in_the_original(size):
    """Half-bright pictures: the share of a patch that is bright tells where its box lies against
    the edge."""
    for name in ("crop", "crop-margin", "pad", "stretch"):
        for edge in (size[0] // 2, size[0] // 2 - 5):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[:, edge:] = 255
            brightness, grid = preprocess(name, Image.fromarray(pixels))
            expected = grid.coverage(pixels[..., 0] > 0)
            step = (grid.boxes[:, 2] - grid.boxes[:, 0])[0]
            assert np.abs(brightness - expected).max() < 0.6 / step + 0.06, name

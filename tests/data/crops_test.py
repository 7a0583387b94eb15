"""crops.py, and crops of images that were decoded at a reduced scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import crops, decode
from tests.support import small_sets

SIZE = 32


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4),
    st.sampled_from([0.08, 0.5, 0.99]),
)
def test_random_boxes_fit(height, width, draws, min_area):
    top, left, h, w = crops.random_box(height, width, draws, min_area)
    assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
    if min(h, w) > 20:  # rounding to pixels moves small boxes further
        assert 0.7 < w / h < 1.42


def test_random_boxes_cover_the_published_ranges():
    """Area uniform in 8-100% and aspect log-uniform in 3/4-4/3, where the image leaves room."""
    u = np.random.default_rng(0).random((4000, 4))
    boxes = np.array([crops.random_box(1000, 1000, tuple(row), 0.08) for row in u], float)
    area, aspect = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    small = area < 0.5  # larger ones may be cut by the image's edges
    assert area.min() < 0.085 and area.max() > 0.97
    # Expected share below 0.5: (0.5 - 0.08)/0.92 = 0.457; standard error 0.008, five of them.
    assert abs(small.mean() - 0.457) < 0.04
    assert abs(aspect[small].min() - 0.75) < 0.01 and abs(aspect[small].max() - 4 / 3) < 0.01
    assert abs(np.log(aspect[small]).mean()) < 0.02  # standard error 0.004


@pytest.mark.parametrize("axis", [0, 1])
def test_random_boxes_lie_everywhere(axis):
    """The position is uniform from the first to the last row and column, these included."""
    draws = (np.arange(3000) + 0.5) / 3000
    places = []
    for u in draws:
        position = (u, 0.5) if axis == 0 else (0.5, u)
        top, left, height, width = crops.random_box(60, 60, (0.5, 0.5, *position), 0.08)
        places.append((top, left)[axis])
    last = 60 - (height, width)[axis]
    assert last > 10
    counts = np.bincount(places)
    assert len(counts) == last + 1  # the last row is reached
    assert counts.min() >= 3000 // (last + 1) and counts.max() <= 3000 // (last + 1) + 1
    assert abs(np.mean(places) - last / 2) < 0.01


def test_center_box():
    assert crops.center_box(256, 256) == (16, 16, 224, 224)
    assert crops.center_box(375, 500) == (23, 86, 328, 328)
    assert crops.center_box(1, 1) == (0, 0, 1, 1)


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_reduced_decoding_shows_the_same_crop(reduce):
    """Decoding at a reduced scale and cropping shows what cropping the whole image shows."""
    photo = np.repeat(np.repeat(small_sets.photo(64, 80), 8, axis=0), 8, axis=1)
    data = small_sets.encode(photo, quality=95)
    found = decode.frame(data)
    box = (101, 53, 300, 260)
    whole, reduced = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    decode.resized_crop(decode.pixels(data, found), box, 1, whole)
    decode.resized_crop(decode.pixels(data, found, reduce=reduce), box, reduce, reduced)
    # Measured: 0, 0.8, 1.0, 2.2 levels in the mean; half an output pixel off would be 2.7.
    assert np.abs(whole.astype(int) - reduced).mean() < 2.5


def test_reduction_leaves_enough_pixels():
    for side, expected in ((223, 1), (447, 1), (448, 2), (896, 4), (5000, 8)):
        assert decode.reduction((0, 0, side, side + 10), 224) == expected

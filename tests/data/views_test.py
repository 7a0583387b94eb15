"""Views of 10 and 144 crops: where they lie, what they show, that every example counts once."""

import collections

import cv2
import numpy as np
import pytest

from bn_jax.data import crops, distort, load, memory, pipeline, sources, views
from bn_jax.errors import ConfigError, DataError
from tests.support.small_sets import encode, photo

# Offsets of the corners and the centre of 224 pixels in squares of 256, 288, 320, 352 pixels.
CORNERS = {
    256: {(0, 0), (0, 32), (32, 0), (32, 32), (16, 16), None},
    288: {(0, 0), (0, 64), (64, 0), (64, 64), (32, 32), None},
    320: {(0, 0), (0, 96), (96, 0), (96, 96), (48, 48), None},
    352: {(0, 0), (0, 128), (128, 0), (128, 128), (64, 64), None},
}


@pytest.mark.parametrize(
    ("height", "width", "squares"),
    [
        (375, 500, [(0, 0, 375, 375), (0, 62, 375, 375), (0, 125, 375, 375)]),  # landscape
        (500, 375, [(0, 0, 375, 375), (62, 0, 375, 375), (125, 0, 375, 375)]),  # portrait
        (300, 300, [(0, 0, 300, 300)]),
        (2, 9, [(0, 0, 2, 2), (0, 3, 2, 2), (0, 7, 2, 2)]),  # tiny
    ],
)
def test_googlenets_144_boxes(height, width, squares):
    found = crops.views(height, width, 144, 224, True)
    assert sum(found.values()) == 144
    expected = {
        crops.Crop(square, side, corner, mirror)
        for side, corners in CORNERS.items()
        for square in squares
        for corner in corners
        for mirror in (False, True)
    }
    assert found.keys() == expected
    # What coincides is counted: the three squares of a square image are one.
    assert set(found.values()) == {3 // len(squares)}


def test_the_10_crops_are_of_the_centre_square_at_the_smallest_size():
    found = crops.views(375, 500, 10, 224, True)
    assert sum(found.values()) == len(found) == 10
    assert {v.square for v in found} == {(0, 62, 375, 375)} and {v.side for v in found} == {256}
    assert {v.corner for v in found} == CORNERS[256] - {None}


@pytest.mark.parametrize(
    ("size", "sides"),
    [(224, [256, 288, 320, 352]), (64, [73, 82, 91, 101]), (28, [32, 36, 40, 44])],
)
def test_sizes_keep_their_ratio(size, sides):
    found = crops.views(64, 64, 144, size, False)
    assert sorted({v.side for v in found}) == sides and sum(found.values()) == 72
    for v in found:
        assert v.corner is None or max(v.corner) + size <= v.side


def literal(image: np.ndarray, size: int) -> list[np.ndarray]:
    """The 144 views in GoogLeNet's own words: the whole image is resized, then cut."""
    found = []
    height, width, _ = image.shape
    for side in (round(s * size / 224) for s in (256, 288, 320, 352)):
        scale = side / min(height, width)
        shape = (round(width * scale), round(height * scale))
        resized = cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR)
        spare = max(resized.shape) - side
        for place in (0, spare // 2, spare):
            part = resized[:, place:][:, :side] if width >= height else resized[place:][:side]
            low, mid = side - size, (side - size) // 2
            cut = [part[t : t + size, x : x + size] for t in (0, low) for x in (0, low)]
            cut.append(part[mid : mid + size, mid : mid + size])
            cut.append(cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR))
            found += [v for c in cut for v in (c, c[:, ::-1])]
    return found


@pytest.mark.parametrize("shape", [(60, 80), (80, 60)])
def test_pixels_are_those_of_resizing_the_whole_image(shape):
    image = photo(*shape)
    looks = crops.views(*shape, 144, 56, True)
    found = views.render(lambda reduce: image, looks, 56, 3)
    expected = np.stack(literal(image, 56))
    assert found.shape == expected.shape
    # Squares are cut before resizing, so one may lie a fraction of a pixel elsewhere: up to 2.2
    # levels here, median 0.5. A box that is 2 pixels off makes 7 and 1.2, a wrong mirror 33.
    difference = np.abs(found.astype(int) - expected).mean(axis=(1, 2, 3))
    assert difference.max() < 3 and np.median(difference) < 0.7


def test_a_png_of_any_shape_gives_all_views():
    for shape in ((1, 40), (40, 1), (3, 3), (500, 20)):
        image, weight = views.of_file(encode(photo(*shape), "PNG"), 144, 32, True, [])
        assert image.shape[1:] == (32, 32, 3) and weight.sum() == 144


def test_one_crop_is_the_crop_of_evaluation():
    data = encode(photo(60, 80))
    image, weight = views.of_file(data, 1, 32, True, [])
    held = data_of([load.Record(data, 0, "a")], size=32)
    np.testing.assert_array_equal(image, next(held.evaluation(1, slice(0, 1)))["image"])
    assert weight.tolist() == [1]


class Listed(sources.Records):
    """Records of a list."""

    def __init__(self, records: list[load.Record]):
        super().__init__(len(records), num_classes=5)
        self.records = records

    def __getitem__(self, index: int) -> load.Record:
        return self.records[index]


def data_of(records, size: int = 24, mirror: bool = True) -> pipeline.Data:
    listed = Listed(records)
    source = sources.Source(listed, listed, num_classes=5, channels=3, description="few")
    return pipeline.Data(source, distort.Augmentation(size, mirror=mirror), shuffle="none")


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("number", views.CROPS)
def test_every_example_comes_once_under_all_its_views(number, mirror):
    shapes = [(30, 40), (40, 30), (30, 30), (31, 90), (24, 24)]
    records = [load.Record(encode(photo(*s, k)), k, str(k)) for k, s in enumerate(shapes)]
    seen: collections.Counter[int] = collections.Counter()
    labels, batch = {}, 37
    for rows in views.batches(data_of(records, mirror=mirror), number, batch):
        assert rows.image.shape == (batch, 24, 24, 3)
        for example, weight, label in zip(rows.example, rows.weight, rows.label, strict=True):
            seen[int(example)] += int(weight)
            labels[int(example)] = int(label)
            assert (example == -1) == (weight == 0)  # a row without an example has no label to give
    padding = seen.pop(-1, 0)
    assert padding == 0  # padded rows weigh nothing
    total = number if number == 1 or mirror else number // 2
    assert seen == dict.fromkeys(range(5), total) and total == views.total_weight(number, mirror)
    assert all(labels[k] == k for k in range(5))


def test_digits_are_not_mirrored_and_stay_grey():
    digits = memory.digits()
    data = pipeline.Data(digits, distort.Augmentation(28), shuffle="none")
    rows = next(views.batches(data, 144, 24))  # 24 different views of a square image
    assert rows.image.shape == (24, 28, 28, 1) and set(rows.weight) == {3} and not any(rows.example)
    image = digits.evaluation.images[0]
    square = cv2.resize(image[..., 0], (32, 32), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(rows.image[0, ..., 0], square[:28, :28])


def test_a_bad_picture_is_named_and_a_wrong_number_refused():
    records = [load.Record(encode(photo()), 0, "good"), load.Record(b"junk", 1, "bad.jpg")]
    with pytest.raises(DataError, match=r"bad\.jpg: not a JPEG.*leaves nothing out"):
        list(views.batches(data_of(records), 10, 8))
    with pytest.raises(ConfigError, match="--crops=7 is not one of 1, 10, 144"):
        views.check_crops(7)

"""distort.py: shifts, mirrors and colours, against their definitions."""

import numpy as np
import pytest

from bn_jax.data import distort, order
from bn_jax.data.distort import Draw
from tests.support import small_sets


def draws(n: int, seed: int = 0) -> np.ndarray:
    return order.uniforms(seed, 0, slice(0, n), distort.DRAWS)


def by_definition(image: np.ndarray, u: np.ndarray, strength: float) -> np.ndarray:
    """The operations one after another on every pixel, without clipping between them."""
    x = image.astype(float)
    luma = distort.LUMA if x.shape[-1] == 3 else np.ones(1)
    for operation in distort.ORDERS[int(u[Draw.ORDER] * 6)]:
        f = 1 + strength * 0.5 * (2 * u[Draw.FACTORS + operation] - 1)
        if operation == 0:
            x = f * x
        elif operation == 1:
            mean = (x @ luma).mean()
            x = f * (x - mean) + mean
        else:
            grey = (x @ luma)[..., None]
            x = f * (x - grey) + grey
    if x.shape[-1] == 3:
        x = x + distort.lighting(u[None], strength)[0]
    return np.clip(np.rint(x), 0, 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_photometric_is_the_composition_of_its_parts(channels, strength):
    images = np.stack([small_sets.photo(24, 32, k)[..., :channels] for k in range(12)])
    u = draws(12)
    assert len({int(x * 6) for x in u[:, Draw.ORDER]}) > 3  # several orders
    found = distort.photometric(images.copy(), u, strength)
    expected = np.stack([by_definition(i, row, strength) for i, row in zip(images, u, strict=True)])
    # One level: OpenCV rounds fixed-point products of 8-bit images, halves may go either way.
    assert np.abs(found - expected).max() <= 1


def test_strength():
    images = np.stack([small_sets.photo(24, 32, k) for k in range(40)])
    changes = [
        np.abs(distort.photometric(images.copy(), draws(40), s).astype(int) - images).mean()
        for s in (0.0, 0.25, 0.5, 1.0)
    ]
    assert changes[0] == 0
    assert changes[1] < changes[2] < changes[3]
    assert 1.5 < changes[3] / changes[2] < 2.5  # nearly linear; clipping bends it


def test_masked_rows_stay_empty():
    images = np.full((2, 8, 8, 3), 50, np.uint8)
    mask = np.array([True, False])
    distort.photometric(images, np.full((2, distort.DRAWS), 0.01), 1.0, mask)
    assert (images[0] != 50).all() and (images[1] == 50).all()


def test_lighting_is_normal():
    """Along its principal axes the colour has the published deviations (Krizhevsky et al.)."""
    u = draws(20_000)
    axes = distort.lighting(u, 1.0) / 255 @ distort.PCA_VECTORS
    expected = 0.1 * np.array([0.2175, 0.0188, 0.0045])
    # Standard error of a deviation from 20,000 draws: 0.5%; the printed vectors are orthonormal to
    # 1e-3.
    assert np.allclose(axes.std(axis=0), expected, rtol=0.03)
    assert np.abs(np.corrcoef(axes.T) - np.eye(3)).max() < 0.04
    kurtosis = (axes[:, 0] ** 4).mean() / (axes[:, 0] ** 2).mean() ** 2
    assert abs(kurtosis - 3) < 0.3  # of a normal distribution 3, standard error 0.035


def test_shift_moves_by_whole_pixels():
    images = np.zeros((200, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 255
    moved = distort.shift(images, draws(200), 2)
    places = np.argwhere(moved[..., 0] == 255)[:, 1:] - 4
    assert len(places) == 200
    for axis in (0, 1):
        assert set(places[:, axis].tolist()) == {-2, -1, 0, 1, 2}
    assert len({tuple(p) for p in places.tolist()}) == 25
    edge = np.zeros((1, 9, 9, 1), np.uint8)
    edge[:, 0] = 255
    up = draws(1)
    up[0, [Draw.SHIFT_DOWN, Draw.SHIFT_RIGHT]] = (
        0.99,
        0.5,
    )  # a window further down: content moves up
    assert not distort.shift(edge, up, 2).any()  # what leaves is gone, what enters is 0


def test_mirror():
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    u = np.full((2, distort.DRAWS), 0.9)
    u[1, Draw.MIRROR] = 0.1
    mirrored = distort.mirror(images.copy(), u)
    assert np.array_equal(mirrored[0], images[0])
    assert np.array_equal(mirrored[1], images[1, :, ::-1])
    u[:, Draw.MIRROR] = 0.5, 0.49  # one half of all draws
    mirrored = distort.mirror(images.copy(), u)
    assert np.array_equal(mirrored, np.stack([images[0], images[1, :, ::-1]]))

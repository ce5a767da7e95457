"""CIEDE2000 against the published test pairs and scikit-image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sdvae.metrics.colour import ciede2000, mean_ciede2000, srgb_to_lab

# Sharma, Wu & Dalal 2005, table 1: L, a, b of both colours, Delta E 2000.
SHARMA = [
    (50.0000, 2.6772, -79.7751, 50.0000, 0.0000, -82.7485, 2.0425),
    (50.0000, 3.1571, -77.2803, 50.0000, 0.0000, -82.7485, 2.8615),
    (50.0000, 2.8361, -74.0200, 50.0000, 0.0000, -82.7485, 3.4412),
    (50.0000, -1.3802, -84.2814, 50.0000, 0.0000, -82.7485, 1.0000),
    (50.0000, -1.1848, -84.8006, 50.0000, 0.0000, -82.7485, 1.0000),
    (50.0000, -0.9009, -85.5211, 50.0000, 0.0000, -82.7485, 1.0000),
    (50.0000, 0.0000, 0.0000, 50.0000, -1.0000, 2.0000, 2.3669),
    (50.0000, -1.0000, 2.0000, 50.0000, 0.0000, 0.0000, 2.3669),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0009, 7.1792),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0010, 7.1792),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0011, 7.2195),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0012, 7.2195),
    (50.0000, -0.0010, 2.4900, 50.0000, 0.0009, -2.4900, 4.8045),
    (50.0000, -0.0010, 2.4900, 50.0000, 0.0010, -2.4900, 4.8045),
    (50.0000, -0.0010, 2.4900, 50.0000, 0.0011, -2.4900, 4.7461),
    (50.0000, 2.5000, 0.0000, 50.0000, 0.0000, -2.5000, 4.3065),
    (50.0000, 2.5000, 0.0000, 73.0000, 25.0000, -18.0000, 27.1492),
    (50.0000, 2.5000, 0.0000, 61.0000, -5.0000, 29.0000, 22.8977),
    (50.0000, 2.5000, 0.0000, 56.0000, -27.0000, -3.0000, 31.9030),
    (50.0000, 2.5000, 0.0000, 58.0000, 24.0000, 15.0000, 19.4535),
    (50.0000, 2.5000, 0.0000, 50.0000, 3.1736, 0.5854, 1.0000),
    (50.0000, 2.5000, 0.0000, 50.0000, 3.2972, 0.0000, 1.0000),
    (50.0000, 2.5000, 0.0000, 50.0000, 1.8634, 0.5757, 1.0000),
    (50.0000, 2.5000, 0.0000, 50.0000, 3.2592, 0.3350, 1.0000),
    (60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644),
    (63.0109, -31.0961, -5.8663, 62.8187, -29.7946, -4.0864, 1.2630),
    (61.2901, 3.7196, -5.3901, 61.4292, 2.2480, -4.9620, 1.8731),
    (35.0831, -44.1164, 3.7933, 35.0232, -40.0716, 1.5901, 1.8645),
    (22.7233, 20.0904, -46.6940, 23.0331, 14.9730, -42.5619, 2.0373),
    (36.4612, 47.8580, 18.3852, 36.2715, 50.5065, 21.2231, 1.4146),
    (90.8027, -2.0831, 1.4410, 91.1528, -1.6435, 0.0447, 1.4441),
    (90.9257, -0.5406, -0.9208, 88.6381, -0.8985, -0.7239, 1.5381),
    (6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377),
    (2.0776, 0.0795, -1.1350, 0.9033, -0.0636, -0.5514, 0.9082),
]


def test_the_published_pairs_have_the_published_differences_both_ways() -> None:
    table = torch.tensor(SHARMA, dtype=torch.float64).T
    first, second, published = (table[0], table[1], table[2]), (table[3], table[4], table[5]), table[6]
    for result in (ciede2000(first, second), ciede2000(second, first)):
        torch.testing.assert_close(result, published, rtol=0, atol=5.1e-5)  # four decimals are printed


def test_the_formula_equals_scikit_image_over_the_whole_space() -> None:
    colour = pytest.importorskip("skimage.color")
    rng = np.random.default_rng(0)
    low, high = np.array([0, -100, -100]), np.array([100, 100, 100])
    a, b = rng.uniform(low, high, (2, 20000, 3))
    b[::2] = a[::2] + rng.normal(0, 2, a[::2].shape)  # half of them near each other
    first, second = (tuple(torch.from_numpy(each).unbind(dim=1)) for each in (a, b))
    np.testing.assert_allclose(ciede2000(first, second), colour.deltaE_ciede2000(a, b), rtol=0, atol=1e-8)  # type: ignore[arg-type]


def test_lab_is_that_of_scikit_image_up_to_the_digits_of_the_matrix() -> None:
    colour = pytest.importorskip("skimage.color")
    grid = np.array(list(itertools.product(range(0, 256, 15), repeat=3)), dtype=np.float64) / 255
    lab = torch.stack(srgb_to_lab(torch.from_numpy(grid.T)), dim=1)
    np.testing.assert_allclose(lab, colour.rgb2lab(grid), rtol=0, atol=0.06)


def test_known_colours_of_srgb() -> None:
    white, black, red = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 0]], dtype=torch.float64).unbind(dim=1)
    for rgb, lab in ((white, (100, 0, 0)), (black, (0, 0, 0)), (red, (53.24, 80.09, 67.20))):
        assert [float(value) for value in srgb_to_lab(rgb)] == pytest.approx(lab, abs=0.05)


def test_greys_have_no_chroma() -> None:
    _, a, b = srgb_to_lab((torch.arange(256.0) / 255).expand(3, 256))
    assert float(torch.hypot(a, b).max()) < 1e-3


def test_float32_is_near_float64_and_equal_images_differ_by_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 40, 50), generator=generator) / 255
    near = (image + torch.randint(-3, 4, image.shape, generator=generator) / 255).clamp(0, 1)
    torch.testing.assert_close(
        mean_ciede2000(near, image), mean_ciede2000(near.double(), image.double()), rtol=0, atol=1e-4
    )
    assert mean_ciede2000(image, image).tolist() == [0.0, 0.0]

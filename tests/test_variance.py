import itertools
import math
import numpy as np
import pytest
import reference
import torch

from agvm_d2.variance import lr_gain, lr_ratio, noise_scale, pairwise_variance, split_variance


@pytest.mark.parametrize("k", [2, 3, 8])
def test_orthogonal_gradients_have_variance_one_and_equal_ones_zero(k):
    assert pairwise_variance(1.0, 1 / k, k) == pytest.approx(1.0)
    assert pairwise_variance(1.0, 1.0, k) == 0.0


def test_opposite_gradients_have_variance_two():
    assert pairwise_variance(1.0, 0.0, 2) == 2.0
    assert split_variance(1.0, 1.0, 0.0) == 2.0


def test_two_units_give_one_minus_2ab_over_squares():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])  # ab = 1, |a|^2 = 5, |b|^2 = 10
    assert pairwise_variance(7.5, float(((a + b) / 2).square().sum()), 2) == pytest.approx(
        1 - 2 / 15
    )


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_pairwise_equals_the_sum_over_all_pairs(k):
    g = torch.Generator().manual_seed(k)
    vectors = list(torch.randn(k, 20, generator=g, dtype=torch.float64) + 0.3)
    s1, s2 = reference.moments(vectors)
    assert pairwise_variance(s1, s2, k) == pytest.approx(reference.pairwise_variance(vectors))


def test_pairwise_is_what_split_expects_over_all_halvings():
    g = torch.Generator().manual_seed(0)
    vectors = list(torch.randn(6, 500, generator=g, dtype=torch.float64) + 0.3)
    dots, squares = [], []
    for half in itertools.combinations(range(6), 3):
        a = sum(vectors[i] for i in half) / 3
        b = sum(vectors[i] for i in range(6) if i not in half) / 3
        dots.append(float(a.dot(b)))
        squares.append(float(a.dot(a)))
    expected = 1 - np.mean(dots) / np.mean(squares)
    assert pairwise_variance(*reference.moments(vectors), 6) == pytest.approx(expected)


def test_split_equals_one_minus_cosine():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 30, generator=g, dtype=torch.float64)
    mean = (a + b) / 2
    found = split_variance(float(a.dot(a)), float(b.dot(b)), float(mean.dot(mean)))
    assert found == pytest.approx(reference.split_variance([a], [b]))


def test_split_of_unequal_halves():
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 30, generator=g, dtype=torch.float64)
    mean = (2 * a + b) / 3
    found = split_variance(float(a.dot(a)), float(b.dot(b)), float(mean.dot(mean)), share=2 / 3)
    assert found == pytest.approx(reference.split_variance([a], [b]))


def test_variance_is_never_negative_and_never_capped_above():
    assert pairwise_variance(1.0, 1.0 + 1e-12, 4) == 0.0
    assert split_variance(1.0, 1.0, 1.0 + 1e-12) == 0.0
    assert pairwise_variance(1.0, 0.01, 4) > 1


def test_no_gradient_gives_nan_and_one_unit_an_error():
    assert math.isnan(pairwise_variance(0.0, 0.0, 4))
    assert math.isnan(split_variance(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="at least 2 gradients; num_units = 1"):
        pairwise_variance(1.0, 1.0, 1)


def test_lr_ratio_is_one_for_the_anchor_and_clipped():
    assert lr_ratio(0.8, 0.8) == 1.0
    assert lr_ratio(0.2, 0.8) == pytest.approx(4.0, rel=1e-4)
    assert lr_ratio(0.0, 0.8) == 10.0
    assert lr_ratio(2.0, 0.2) == 0.5
    assert lr_ratio(0.0, 1.0, ratio_range=(0.25, 3.0)) == 3.0
    assert lr_ratio(0.0, 0.0) == 1.0  # no noise in either


def test_gain_is_one_for_equal_gradients_and_k_for_orthogonal_ones():
    # Four orthogonal unit vectors: S1 = 1, S2 = 1/4; means of two of them have 1/2.
    assert lr_gain(1.0, 1.0, 4) == 1.0
    assert lr_gain(1.0, 0.25, 4) == 4.0
    assert lr_gain(1.0, 0.25, 4, 2) == pytest.approx(2.0)
    assert lr_gain(1.0, 0.25, 4, 8) == pytest.approx(0.5)  # the learning rate is for more than this
    assert lr_gain(1.0, 0.01, 4) == 4.0 and lr_gain(1.0, 1.0 + 1e-12, 4) == 1.0
    assert lr_gain(1.0, 0.0, 4, 2) == 2.0
    assert math.isnan(lr_gain(0.0, 0.0, 4))
    with pytest.raises(ValueError, match="at least 2 gradients; num_units = 1"):
        lr_gain(1.0, 1.0, 1)


@pytest.mark.parametrize("base_units", [1, 2, 3, 6])
def test_gain_equals_the_mean_over_all_choices_of_a_small_batch(base_units):
    g = torch.Generator().manual_seed(3)
    vectors = list(torch.randn(6, 40, generator=g, dtype=torch.float64) + 0.3)
    found = lr_gain(*reference.moments(vectors), 6, base_units)
    assert found == pytest.approx(reference.gain(vectors, base_units))


def test_gain_follows_from_the_noise_scale():
    # AdaScale's gain is (1 + B/base)/(1 + B/batch): here 8 units of 4 images, 16 images as base.
    b = noise_scale(3.0, 1.5, 8, 4)
    assert lr_gain(3.0, 1.5, 8, 16 / 4) == pytest.approx((1 + b / 16) / (1 + b / 32))


def test_noise_scale_by_hand():
    # K = 2: spread = (2 - 1.5)/1 = 0.5, |G|^2 = 1.5 - 0.5 = 1, tr = 16 * 2 * 0.5 = 16 images.
    assert noise_scale(2.0, 1.5, 2, 16) == 16.0
    assert math.isnan(noise_scale(2.0, 0.9, 2, 16))  # |G|^2 = -0.2: drowned
    assert noise_scale(1.0, 1.0 + 1e-12, 4, 16) == 0.0  # rounding is no noise


def test_noise_scale_estimates_trace_over_squared_mean():
    # 100 dimensions of standard deviation 2 an image, |G|^2 = 25, 4 images a unit: 400/25 = 16.
    g = torch.Generator().manual_seed(0)
    mean = torch.full((100,), 0.5, dtype=torch.float64)
    s1 = s2 = 0.0
    for _ in range(2000):
        units = mean + torch.randn(8, 100, generator=g, dtype=torch.float64) * 2 / math.sqrt(4)
        s1 += float(units.square().sum(1).mean()) / 2000
        s2 += float(units.mean(0).square().sum()) / 2000
    assert noise_scale(s1, s2, 8, 4) == pytest.approx(16, rel=0.02)


def test_tensors_give_tensors_and_numbers_numbers():
    s1 = torch.tensor([1.0, 2.0, 0.0])
    out = pairwise_variance(s1, torch.tensor([0.5, 2.0, 0.0]), 4)
    assert out.dtype == torch.float64 and out.shape == (3,)
    assert out[1] == 0 and out[2].isnan()
    assert isinstance(pairwise_variance(1, 1, 2), float)
    assert isinstance(lr_ratio(0.5, 0.5), float)

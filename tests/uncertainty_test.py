"""Intervals and verdicts: closed forms, another implementation's numbers, simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from bn_jax import uncertainty
from bn_jax.uncertainty import Effect


def ratio(*values: float) -> Effect:
    return Effect(values, values, values, ratio=True)


@pytest.mark.parametrize(("count", "examples"), [(0, 60), (60, 60), (1, 60), (21, 1000), (9, 18)])
def test_wilson_is_scipys(count, examples):
    expected = stats.binomtest(count, examples).proportion_ci(0.95, method="wilson")
    assert uncertainty.wilson(count, examples) == pytest.approx((expected.low, expected.high))


def test_none_of_60_is_not_exactly_none():
    # One end is exact, the other z^2 / (n + z^2).
    assert uncertainty.wilson(0, 60).high == pytest.approx(1.959964**2 / (60 + 1.959964**2))
    assert uncertainty.counted(0.0, 60) == "0.00% (0.00 to 6.02)"
    assert uncertainty.counted(0.021, 1000) == "2.10% (1.38 to 3.19)"


def test_a_difference_is_paired_by_seed():
    # Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, t(2) = 4.3027.
    ours = {0: 0.51, 1: 0.62, 2: 0.73, 7: 0.9}
    theirs = {0: 0.5, 1: 0.6, 2: 0.7, 8: 0.1}
    found = uncertainty.difference(ours, theirs)
    assert (found.n, found.bound) == (3, "")
    assert found.value == pytest.approx(0.02)
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert found.interval == pytest.approx((0.02 - half, 0.02 + half), rel=1e-6)
    expected = stats.ttest_1samp([0.01, 0.02, 0.03], 0.005)
    assert found.p_value(0.005) == pytest.approx(expected.pvalue)


def test_a_ratio_is_averaged_on_the_log_scale():
    found = ratio(2.0, 8.0)
    assert found.value == pytest.approx(4.0)
    # Logarithms log 2 and log 8: mean log 4, standard error log 2; t(1) = 12.706.
    low, high = found.interval
    assert low == pytest.approx(4 * 2**-12.7062, rel=1e-4)
    assert low * high == pytest.approx(16)
    expected = stats.ttest_1samp(np.log([2, 8]), math.log(3))
    assert found.p_value(3) == pytest.approx(expected.pvalue)
    # The other way round the effect is the inverse: an arithmetic mean would not be.
    inverse = ratio(1 / 2, 1 / 8)
    assert inverse.value == pytest.approx(1 / 4)
    assert inverse.interval == pytest.approx((1 / high, 1 / low))


def test_one_seed_has_no_interval():
    found = uncertainty.difference({0: 0.5}, {0: 0.4})
    assert found.interval is None and found.p_value(0) is None
    assert uncertainty.written(found, ".1f", factor=100, sign=True) == "+10.0 (one seed)"
    assert uncertainty.difference({0: 0.5}, {1: 0.4}).n == 0


def test_what_is_known_of_a_seed_only_roughly_widens_the_interval():
    exact = ratio(4.0, 5.0)
    rough = Effect((3.6, 4.5), (4.0, 5.0), (4.4, 5.5), ratio=True)
    assert rough.value == exact.value
    low, high = exact.interval
    assert rough.interval == pytest.approx((0.9 * low, 1.1 * high))


def test_a_bound_is_said_and_has_one_end():
    least = Effect((4.0, 5.0), (4.0, 5.0), (4.0, math.inf), ratio=True)
    assert (least.bound, least.interval.high) == ("at least", math.inf)
    assert least.interval.low == ratio(4.0, 5.0).interval.low
    assert uncertainty.written(least, ".1f", unit="x") == "at least 4.5x (1.1 or more)"
    most = Effect((0.0, 0.2), (0.25, 0.2), (0.25, 0.2), ratio=True)
    assert (most.bound, most.interval.low) == ("at most", 0.0)
    assert uncertainty.written(most, ".2f", unit="x") == "at most 0.22x (0.92 or less)"
    both = Effect((0.0, 4.0), (0.25, 4.0), (0.25, math.inf), ratio=True)
    assert both.bound == "unknown" and both.interval == (0, math.inf)
    assert uncertainty.written(both, ".1f") == "unknown: bounds on both sides"
    assert both.p_value(1) == 1


@pytest.mark.parametrize("n", [2, 3, 5])
def test_t_intervals_cover_95_percent(n):
    """4,000 simulated experiments: the standard error of the coverage is 0.34 points."""
    generator = np.random.Generator(np.random.PCG64(n))
    draws = generator.normal(0.3, 2.0, (4000, n))
    covered = 0
    for values in draws:
        low, high = uncertainty.single(values).interval
        covered += low <= 0.3 <= high
    assert covered / 4000 == pytest.approx(0.95, abs=4 * 0.0034)


def test_intervals_of_censored_ratios_cover_at_least_95_percent():
    """Times are log-normal; the reference's are cut at 20: the ratio is then only bounded."""
    generator = np.random.Generator(np.random.PCG64(0))
    covered = 0
    bounds = 0
    for _ in range(2000):
        reference = np.exp(generator.normal(math.log(16), 0.5, 5))
        ours = np.exp(generator.normal(math.log(4), 0.5, 5))
        cut = np.minimum(reference, 20) / ours
        found = Effect(tuple(cut), tuple(cut), tuple(np.where(reference > 20, np.inf, cut)), True)
        bounds += found.bound == "at least"
        covered += found.interval.low <= 4 <= found.interval.high
    assert bounds > 1000
    assert covered / 2000 >= 0.95 - 4 * 0.0049


@pytest.mark.parametrize("apart", [1.1, 2.0])
def test_intervals_of_coarse_steps_cover_at_least_95_percent(apart):
    """Times are known to lie between two evaluations, which are a tenth or a factor of 2 apart."""
    generator = np.random.Generator(np.random.PCG64(3))
    covered = 0
    for _ in range(2000):
        reference = np.exp(generator.normal(math.log(1600), 0.3, 5))
        ours = np.exp(generator.normal(math.log(400), 0.3, 5))
        ends = []
        for times in (reference, ours):
            first = np.floor(np.log(times) / math.log(apart))
            ends.append((apart**first, apart ** (first + 1)))
        lows = ends[0][0] / ends[1][1]
        highs = ends[0][1] / ends[1][0]
        found = Effect(tuple(lows), tuple(np.sqrt(lows * highs)), tuple(highs), ratio=True)
        covered += found.interval.low <= 4 <= found.interval.high
    assert covered / 2000 >= 0.95 - 4 * 0.0049


def test_the_bootstrap_of_images_covers_95_percent():
    """Gains of 400 images, each +1, 0 or -1 with known chances; 1,000 simulated test splits."""
    generator = np.random.Generator(np.random.PCG64(1))
    chances = [0.05, 0.85, 0.10]
    truth = chances[2] - chances[0]
    covered = 0
    for seed in range(1000):
        gains = generator.choice([-1.0, 0.0, 1.0], size=400, p=chances)
        low, high = uncertainty.paired_bootstrap(gains, draws=1000, seed=seed)
        covered += low <= truth <= high
    assert covered / 1000 == pytest.approx(0.95, abs=4 * 0.0069)


def test_the_bootstrap_is_paired_and_repeatable():
    # The two networks err on the same images but for one: the difference is nearly certain.
    gains = np.zeros(1000)
    gains[0] = 1
    low, high = uncertainty.paired_bootstrap(gains)
    assert 0 <= low <= 0.001 <= high <= 0.004
    assert uncertainty.paired_bootstrap(gains) == (low, high)
    assert uncertainty.paired_bootstrap(np.zeros(10)) == (0, 0)


def test_holms_correction():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to the one before), 0.5 * 1.
    found = uncertainty.holm([0.02, None, 0.5, 0.01, 0.03])
    assert found == [pytest.approx(0.06), None, 0.5, pytest.approx(0.04), pytest.approx(0.06)]
    assert uncertainty.holm([0.9, 0.9]) == [1.0, 1.0]


def judge(effect, threshold=0.0, **options) -> str:
    return uncertainty.verdict(effect, threshold, effect.p_value(threshold), **options)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ((2.0, 2.1, 1.9), "supported"),
        ((-2.0, -2.1, -1.9), "contradicted"),
        ((0.1, 0.12, 0.08), "no effect"),  # better than none at all, but within half a point
        ((0.0, 2.0), "undecided (about 11 seeds would decide)"),
        ((0.5,), "undecided (one seed has no interval)"),
        ((), "not run"),
    ],
)
def test_verdicts(points, said):
    assert judge(uncertainty.single([p / 100 for p in points])) == said


def test_seeds_that_would_decide():
    """Mean 1 and deviation sqrt 2: t(9) sqrt(2 / 10) = 1.01 contains 0, t(10) sqrt(2 / 11) = 0.95
    does not."""
    effect = uncertainty.single([0.0, 0.02])
    n = uncertainty.seeds_to_decide(effect, 0.0)

    def half(n: int) -> float:
        return stats.t.ppf(0.975, n - 1) * math.sqrt(2 / n)

    assert n == 11 and half(n) < 1 < half(n - 1)
    # A mean at the threshold itself is decided by no number of seeds.
    assert uncertainty.seeds_to_decide(effect, 0.01) is None


def test_a_claim_of_less_than_half_the_steps_has_its_threshold_at_two():
    assert judge(ratio(2.9, 3.0, 3.1), 2.0) == "supported"
    assert judge(ratio(1.4, 1.5, 1.6), 2.0) == "contradicted"
    assert judge(ratio(1.01, 1.02, 1.0), 2.0) == "no effect"  # within 10% of as many steps


def test_what_may_be_left_out_must_not_cost_more_than_the_margin():
    without = uncertainty.single([-0.001, 0.0, 0.001])
    assert judge(without, -uncertainty.MARGIN_POINTS, harmless=True) == "supported"
    costly = uncertainty.single([-0.021, -0.02, -0.019])
    assert judge(costly, -uncertainty.MARGIN_POINTS, harmless=True) == "contradicted"


def test_several_comparisons_are_corrected_for():
    effect = uncertainty.single([0.02, 0.021, 0.012])
    p = effect.p_value(0.0)
    assert uncertainty.verdict(effect, 0.0, p) == "supported"
    assert "correction" in uncertainty.verdict(effect, 0.0, 20 * p)


def test_bounds_are_not_decided_by_more_seeds():
    bound = Effect((1.5, 2.5), (1.5, 2.5), (math.inf, math.inf), ratio=True)
    assert judge(bound, 2.0) == "undecided (some seeds give only a bound)"


def test_the_quotient_is_geometric_and_leaves_out_what_is_not_finite():
    found = uncertainty.quotient({0: 8.0, 1: 2.0, 2: np.inf, 3: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert found.values == (8.0, 2.0) and found.value == pytest.approx(4)

"""Says how certain a number is: intervals of counts, effects over seeds, verdicts on a claim.

Every interval is a 95% interval. Those over seeds are Student's t with n - 1 degrees of freedom, of
values paired by seed. They hold for other seeds on the same images, not for other images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

TAIL = 0.025  # probability on each side of an interval

# An effect within these margins counts as none. They were fixed before any run was compared.
MARGIN_POINTS = 0.005  # of accuracy: half a point
MARGIN_RATIO = 1.1  # of steps: 10%

MOST_SEEDS = 1000  # a question that more seeds would be needed for counts as undecidable


class Interval(NamedTuple):
    """The two ends of a 95% interval."""

    low: float
    high: float


# ----------------------------------------------------------------------------------------------
# Counts
# ----------------------------------------------------------------------------------------------


def wilson(count: int, examples: int) -> Interval:
    """Computes Wilson's score interval of the share behind a count (E. B. Wilson, JASA 22, 1927).

    Unlike p +- sqrt(p (1 - p) / n), it is wider than 0 at a count of 0, too.
    """
    z = float(special.ndtri(1 - TAIL))
    n = examples
    share = count / n

    scale = 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / scale
    variance = share * (1 - share) / n
    half = z / scale * math.sqrt(variance + z**2 / (4 * n**2))

    # At 0 of n and n of n one end is exact, up to rounding.
    low = 0.0 if count == 0 else middle - half
    high = 1.0 if count == examples else middle + half
    return Interval(low, high)


def counted(share: float, examples: int) -> str:
    """Writes a share of `examples` in percent with Wilson's interval: '2.10% (1.38 to 3.19)'."""
    low, high = wilson(round(share * examples), examples)
    return f"{100 * share:.2f}% ({100 * low:.2f} to {100 * high:.2f})"


def counted_difference(ours: float, theirs: float, examples: int) -> Interval:
    """Computes the interval of ours - theirs, two shares of `examples`, as if independent.

    This is Newcombe's method 10 (Statistics in Medicine 17, 1998), from the Wilson intervals of
    both. It does not account for other seeds.
    """
    own = wilson(round(ours * examples), examples)
    other = wilson(round(theirs * examples), examples)

    below = math.hypot(ours - own.low, other.high - theirs)
    above = math.hypot(own.high - ours, theirs - other.low)
    value = ours - theirs
    return Interval(value - below, value + above)


# ----------------------------------------------------------------------------------------------
# Effects over seeds
# ----------------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """A difference or ratio that was measured once for each seed.

    The true value of seed i lies between lows[i] and highs[i]; for accuracies both are values[i]. A
    ratio of steps is only known to the distance between evaluations. If a network never reaches a
    level, only one end is known, and the other is 0 or infinite.

    Ratios are averaged on the logarithmic scale: the mean is geometric.
    """

    lows: tuple[float, ...]
    values: tuple[float, ...]
    highs: tuple[float, ...]
    ratio: bool = False

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.values)

    @property
    def value(self) -> float:
        """The mean over seeds; if some seeds only give a bound (see `bound`), the mean bound."""
        values = self.values
        if self.bound == "at least":
            values = self.lows
        elif self.bound == "at most":
            values = self.highs
        return _mean(values, self.ratio)

    @property
    def bound(self) -> str:
        """What the seeds give: '' for a value, 'at least' or 'at most' for a bound, or 'unknown'.

        It is 'unknown' if there are bounds on both sides.
        """
        below = any(high == math.inf for high in self.highs)
        above = self.ratio and any(low == 0 for low in self.lows)
        if below and above:
            return "unknown"
        if below:
            return "at least"
        if above:
            return "at most"
        return ""

    @property
    def interval(self) -> Interval | None:
        """The 95% interval of the mean; None with fewer than two seeds.

        It goes from the low end of the lows' interval to the high end of the highs' interval, so
        that it also covers what is not known of each seed. If some seeds have only a bound, an end
        is 0 or infinite.
        """
        if self.n < 2:
            return None
        low = _limit(self.lows, -1, self.ratio)
        high = _limit(self.highs, +1, self.ratio)
        return Interval(low, high)

    def p_value(self, threshold: float) -> float | None:
        """Returns the two-sided p that the mean is `threshold`; None with fewer than two seeds."""
        if self.n < 2:
            return None
        above = _tail(self.lows, threshold, +1, self.ratio)
        below = _tail(self.highs, threshold, -1, self.ratio)
        return min(1.0, 2 * min(above, below))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Effect:
    """Takes ours - theirs, both {seed: value}, for each seed that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    values = tuple(ours[seed] - theirs[seed] for seed in seeds)
    return Effect(values, values, values)


def quotient(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Effect:
    """Divides ours by theirs, both {seed: value}; leaves out pairs with 0 or infinite values."""
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        above = ours[seed]
        below = theirs[seed]
        if 0 < above < math.inf and 0 < below < math.inf:
            found.append(above / below)
    values = tuple(found)
    return Effect(values, values, values, ratio=True)


def bounded(found: Sequence[tuple[float, float, float]]) -> Effect:
    """Makes an Effect of ratios or steps, known as (lowest, estimate, highest) for each seed."""
    lows = tuple(low for low, _, _ in found)
    values = tuple(value for _, value, _ in found)
    highs = tuple(high for _, _, high in found)
    return Effect(lows, values, highs, ratio=True)


def single(values: Sequence[float]) -> Effect:
    """Makes an Effect of a single quantity, such as the accuracy of each seed."""
    each = tuple(values)
    return Effect(each, each, each)


def _mean(values: Sequence[float], ratio: bool) -> float:
    if not ratio:
        return float(np.mean(values))
    logarithms = [math.log(value) for value in values]
    return math.exp(float(np.mean(logarithms)))


def _moments(values: Sequence[float], ratio: bool) -> tuple[float, float]:
    """Returns the mean and its standard error, on the scale on which values are averaged."""
    scaled = np.log(values) if ratio else np.asarray(values, float)
    mean = float(np.mean(scaled))
    deviation = float(np.std(scaled, ddof=1))
    return mean, deviation / math.sqrt(len(scaled))


def _known(values: Sequence[float], ratio: bool) -> bool:
    """Whether this end is known for every seed; 0 and infinity stand for an unknown end."""
    if not all(value < math.inf for value in values):
        return False
    return not (ratio and 0 in values)


def _limit(values: Sequence[float], side: int, ratio: bool) -> float:
    """Returns one end (side -1, +1) of the mean's t interval; 0 or infinite if it is unknown."""
    if not _known(values, ratio):
        return math.inf if side > 0 else 0.0
    return _end(values, len(values), side, ratio)


def _tail(values: Sequence[float], threshold: float, side: int, ratio: bool) -> float:
    """Returns the one-sided p of 'the mean is not above (side +1) or below (-1) `threshold`'."""
    if not _known(values, ratio):
        return 1.0
    mean, error = _moments(values, ratio)
    limit = math.log(threshold) if ratio else threshold
    distance = side * (mean - limit)
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(special.stdtr(len(values) - 1, -distance / error))


def _quantile(n: int) -> float:
    """Returns the value of Student's t, with n - 1 degrees of freedom, above which 2.5% lie."""
    return float(special.stdtrit(n - 1, 1 - TAIL))


def written(
    effect: Effect,
    form: str,
    *,
    factor: float = 1,
    unit: str = "",
    sign: bool = False,
) -> str:
    """Writes an effect for a table: '+0.4 (-0.7 to 1.4)', 'at least 5.3x (3.1 or more)'.

    form: of a number, such as '.2f'; factor: 100 for points; sign: whether a plus is written.
    """
    if not effect.n:
        return "not run"
    bound = effect.bound
    if bound == "unknown":
        return "unknown: bounds on both sides"

    plus = "+" if sign else ""
    text = f"{factor * effect.value:{plus}{form}}{unit}"
    if bound:
        text = f"{bound} {text}"

    interval = effect.interval
    if interval is None:
        return f"{text} (one seed)"
    low = f"{factor * interval.low:{form}}"
    high = f"{factor * interval.high:{form}}"
    if bound == "at least":
        return f"{text} ({low} or more)"
    if bound == "at most":
        return f"{text} ({high} or less)"
    return f"{text} ({low} to {high})"


# ----------------------------------------------------------------------------------------------
# Several comparisons
# ----------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Computes Holm's adjusted p values (Scand. J. Statist. 6, 1979), in order; None stays None.

    A comparison with an adjusted value below 0.05 holds even though several were made.
    """
    known = [(p, place) for place, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(sorted(known)):
        remaining = len(known) - rank
        largest = max(largest, min(1.0, remaining * p))
        adjusted[place] = largest
    return adjusted


# ----------------------------------------------------------------------------------------------
# An ensemble's gain
# ----------------------------------------------------------------------------------------------


def paired_bootstrap(gains: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> Interval:
    """Computes a percentile interval, over other images, of the mean of `gains` [N], one per image.

    Both networks see the same images, so the difference of each image is drawn again, not each
    network's accuracy. Images of equal gain are interchangeable, so only their numbers are drawn.
    """
    images = len(gains)
    values, counts = np.unique(np.asarray(gains, float), return_counts=True)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.multinomial(images, counts / images, size=draws)
    means = drawn @ values / images
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return Interval(float(low), float(high))


# ----------------------------------------------------------------------------------------------
# Verdicts
# ----------------------------------------------------------------------------------------------

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
NO_EFFECT = "no effect"
UNDECIDED = "undecided"
NOT_RUN = "not run"
NOT_TESTABLE = "not testable here"


def margin(ratio: bool) -> Interval:
    """Returns the interval within which an effect counts as none: 0.5 points, or 10% of steps."""
    if ratio:
        return Interval(1 / MARGIN_RATIO, MARGIN_RATIO)
    return Interval(-MARGIN_POINTS, MARGIN_POINTS)


def _within_margin(interval: Interval, ratio: bool) -> bool:
    none = margin(ratio)
    return none.low <= interval.low and interval.high <= none.high


def verdict(
    effect: Effect,
    threshold: float,
    adjusted_p: float | None,
    *,
    harmless: bool = False,
) -> str:
    """Judges the claim that an effect is above `threshold`.

    Args:
      effect: measured, with the sign that the claim gives it.
      threshold: 0 or 1 for 'more', 2 for 'less than half the steps', ...
      adjusted_p: of `effect.p_value(threshold)` by `holm`, over all claims.
      harmless: whether the claim is that something may be left out, i.e. that the effect is not
        below the margin. An effect within the margin then supports it.

    Returns:
      One of the words above; UNDECIDED with its reason.
    """
    if not effect.n:
        return NOT_RUN
    interval = effect.interval
    if interval is None or adjusted_p is None:
        return f"{UNDECIDED} (one seed has no interval)"
    if not harmless and _within_margin(interval, effect.ratio):
        return NO_EFFECT

    above = interval.low > threshold
    below = interval.high < threshold
    if above or below:
        if adjusted_p >= 2 * TAIL:
            return f"{UNDECIDED} (not after the correction for several comparisons)"
        return SUPPORTED if above else CONTRADICTED

    if effect.bound:
        return f"{UNDECIDED} (some seeds give only a bound)"
    enough = seeds_to_decide(effect, threshold, harmless=harmless)
    if enough is None:
        return f"{UNDECIDED} ({MOST_SEEDS:,} seeds would not decide)"
    return f"{UNDECIDED} (about {enough} seeds would decide)"


def seeds_to_decide(effect: Effect, threshold: float, *, harmless: bool = False) -> int | None:
    """Returns how many seeds would decide, if mean and spread stayed as they are.

    It is None for more than MOST_SEEDS, and if it cannot be known: from fewer than two seeds, or
    from a bound. The correction for several comparisons is not applied.
    """
    if effect.n < 2 or effect.bound:
        return None

    for n in range(2, MOST_SEEDS + 1):
        low = _end(effect.lows, n, -1, effect.ratio)
        high = _end(effect.highs, n, +1, effect.ratio)
        if low > threshold or high < threshold:
            return n
        if not harmless and _within_margin(Interval(low, high), effect.ratio):
            return n
    return None


def _end(values: Sequence[float], n: int, side: int, ratio: bool) -> float:
    """Returns an end of the interval that n seeds of the same mean and spread would have."""
    mean, error = _moments(values, ratio)
    half = _quantile(n) * error * math.sqrt(len(values) / n)
    end = mean + side * half
    return math.exp(end) if ratio else end

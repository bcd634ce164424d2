"""Whether two settings differ by more than their seeds do: the paired t-test, by hand.

    found = paired([-0.021, -0.018, -0.025])        # variant minus base, a number for each seed
    found.mean, (found.low, found.high), found.p    # -0.0213, (-0.0301, -0.0126), 0.009
    holm([0.01, 0.04, 0.03])                        # [0.03, 0.06, 0.06]: three looks, three chances
    seeds_needed(spread=0.01, effect=0.01)          # 10, to see it in four of five comparisons

Pairs share their seed, so what a seed does to both (its batches, its draws) cancels. Student 1908;
Holm 1979. The distribution is the regularised incomplete beta function by its continued fraction
(Press et al., Numerical Recipes, section 6.4).
"""
import bisect
import functools
import math
import statistics
from dataclasses import dataclass
from typing import Sequence

CONFIDENCE, POWER = 0.95, 0.8
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Paired:
    """What the differences of n pairs say of their mean: 95% interval, p that it is none."""
    n: int
    mean: float
    spread: float                                   # standard deviation of a difference
    low: float
    high: float
    p: float


def paired(differences: Sequence[float]) -> Paired:
    """The paired t-test of finite differences, one a pair, of two or more."""
    n, mean = len(differences), statistics.fmean(differences)
    spread = statistics.stdev(differences)
    error = spread / math.sqrt(n)
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    if error > 0:
        p = two_sided_p(mean / error, n - 1)
    else:
        p = 1.0 if mean == 0 else 0.0               # equal to the last bit, or a constant apart
    return Paired(n, mean, spread, mean - half, mean + half, p)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected so that 5% is the chance of any false alarm."""
    order, corrected, largest = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = largest
    return corrected


def seeds_needed(spread: float, effect: float) -> int:
    """Pairs of seeds after which an effect is called one at the 5% level in 80% of comparisons.

    spread: standard deviation of a difference. The usual approximation: the effect must be as many
    standard errors as the two quantiles together. At most MOST_SEEDS.
    """
    def enough(n: int) -> bool:
        quantiles = t_quantile((1 + CONFIDENCE) / 2, n - 1) + t_quantile(POWER, n - 1)
        return effect * math.sqrt(n) >= quantiles * spread

    return 2 + bisect.bisect_left(range(2, MOST_SEEDS), True, key=enough)


def two_sided_p(t: float, df: int) -> float:
    """The probability that Student's t with df degrees of freedom is as far from 0 as t."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


@functools.cache
def t_quantile(probability: float, df: int) -> float:
    """The t that Student's distribution is below with a probability of at least one half."""
    low, high = 0.0, 1.0
    while 1 - two_sided_p(high, df) / 2 < probability:
        high *= 2
    for _ in range(60):                             # halves the interval to the last bit
        middle = (low + high) / 2
        if 1 - two_sided_p(middle, df) / 2 < probability:
            low = middle
        else:
            high = middle
    return high


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), x in [0, 1]."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):                   # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                     + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))     # Lentz 1976
    value = d
    for m in range(1, 300):
        for factor in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                       -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d, c = 1 / (1 + factor * d), 1 + factor / c
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value

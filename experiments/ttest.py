"""Whether two settings differ by more than their seeds do: the paired t-test, by hand.

    found = paired([-0.021, -0.018, -0.025])        # variant minus base, a number for each seed
    found.mean, (found.low, found.high), found.p    # -0.0213, (-0.0301, -0.0126), 0.009
    holm([0.01, 0.04, 0.03])                        # [0.03, 0.06, 0.06]: three looks, three chances
    seeds_needed(spread=0.01, effect=0.01)          # 10, to see it in four of five comparisons

Pairs share their seed, so what a seed does to both (its batches, its draws) cancels. Student 1908;
Holm 1979.
"""
import bisect
import functools
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Sequence

import numpy as np

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
    order = sorted(range(len(p)), key=p.__getitem__)
    corrected = itertools.accumulate(
        (min(1.0, (len(p) - place) * p[i]) for place, i in enumerate(order)), max)
    return [value for _, value in sorted(zip(order, corrected))]


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
    # Where t = sqrt(df) tan(angle), the angle's density is cos(angle)^(df - 1) but for a factor:
    # its integral up to 90 degrees, by 200 points to some 1e-10 of itself.
    low = math.atan(abs(t) / math.sqrt(df))
    half, (points, weights) = (math.pi / 2 - low) / 2, gauss_legendre(200)      # in [-1, 1]
    area = half * (weights @ np.cos(low + half * (1 + points)) ** (df - 1))
    factor = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
    return min(1.0, float(factor * area))


gauss_legendre = functools.cache(np.polynomial.legendre.leggauss)


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

"""The arithmetic of `act_rules.divided`: a quotient corrected by its remainder twice is the correctly rounded one.

Fused multiply-adds are exact rational arithmetic here, rounded once: no machine's own is trusted.
"""

from __future__ import annotations

import random
from fractions import Fraction

import pytest


def fp32(x: Fraction) -> Fraction:
    """The nearest fp32 number, ties to even; magnitudes are below its largest."""
    if x == 0:
        return x
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / unit) * unit  # Python's own rounding takes ties to even


def divided(v: Fraction, by: Fraction) -> Fraction:
    r = fp32(1 / by)
    q = fp32(v * r)
    for _ in range(2):
        q = fp32(fp32(v - q * by) * r + q)
    return q


def number(g: random.Random, low: int, high: int) -> Fraction:
    """Any fp32 number, many with few or with all bits set, where approximations go wrong."""
    bits = g.choice((g.getrandbits(23), (1 << 23) - 1 - g.getrandbits(3), g.getrandbits(3)))
    return Fraction((1 << 23) + bits, 1 << 23) * Fraction(2) ** g.randint(low, high)


def test_rounding_is_that_of_fp32() -> None:
    for value, expected in (
        (1 + 2**-24, 1.0),
        (1 + 3 * 2**-24, 1 + 2**-22),
        (2.0**-149 * 0.6, 2.0**-149),
        (-0.75, -0.75),
    ):
        assert fp32(Fraction(value)) == Fraction(expected)


@pytest.mark.parametrize("scale", [(-80, -70), (-20, 20), (80, 89)])
def test_the_quotient_is_correctly_rounded(scale: tuple[int, int]) -> None:
    g = random.Random(0)
    for _ in range(3000):
        by = number(g, *scale)
        if by <= Fraction(2) ** -80:
            continue
        q = number(g, -18, 15)
        v = fp32(q * by)
        assert divided(v, by) == fp32(v / by), (float(v), float(by))


def test_what_is_small_stays_small() -> None:
    """Below 2**-18, where remainders may underflow, a quotient is far below half of every format's smallest step."""
    g = random.Random(1)
    for _ in range(3000):
        by, v = number(g, -80, -75), number(g, -126, -99)
        if v / by < Fraction(2) ** -18:
            assert abs(divided(v, by)) < Fraction(2) ** -17

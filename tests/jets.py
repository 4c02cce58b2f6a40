"""Values and two derivatives of a formula in arithmetic of 250 digits: what the losses are compared with.

A jet a + b x + c y + d x y (x^2 = y^2 = 0) carries a value, its derivatives along two directions and the mixed one.
With the directions e_i and v they are the i-th entry of the gradient and of the Hessian times v.
"""

from __future__ import annotations

import mpmath as mp

mp.mp.dps = 250


class Jet:
    """A number with its derivatives by x, by y and by both."""

    def __init__(self, a, b=0, c=0, d=0):
        self.parts = tuple(mp.mpf(part) for part in (a, b, c, d))

    def __add__(self, other):
        return Jet(*(p + q for p, q in zip(self.parts, jet(other).parts, strict=True)))

    def __mul__(self, other):
        (a, b, c, d), (p, q, r, s) = self.parts, jet(other).parts
        return Jet(a * p, a * q + b * p, a * r + c * p, a * s + b * r + c * q + d * p)

    def __neg__(self):
        return Jet(*(-p for p in self.parts))

    def __sub__(self, other):
        return self + -jet(other)

    def __rsub__(self, other):
        return jet(other) - self

    def __truediv__(self, other):
        x = jet(other).parts[0]
        return self * jet(other).through(1 / x, -1 / x**2, 2 / x**3)

    def __rtruediv__(self, other):
        return jet(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def through(self, f, f1, f2):
        """A function with this value, slope and curvature, of this jet."""
        _, b, c, d = self.parts
        return Jet(f, f1 * b, f1 * c, f1 * d + f2 * b * c)

    def __float__(self):
        return float(self.parts[0])


def jet(x):
    """A constant as a jet."""
    return x if isinstance(x, Jet) else Jet(x)


def exp(x):
    e = mp.exp(x.parts[0])
    return x.through(e, e, e)


def log(x):
    a = x.parts[0]
    return x.through(mp.log(a), 1 / a, -1 / a**2)


def power(x, gamma):
    a, g = x.parts[0], mp.mpf(gamma)
    return x.through(a**g, g * a ** (g - 1), g * (g - 1) * a ** (g - 2))


def sigmoid(x):
    return 1 / (1 + exp(-x))


def softmax(s, t):
    return exp(s[t]) / sum(exp(x) for x in s)


def derivatives(f, s, v):
    """f at the numbers s, its gradient, and its Hessian times v: a number and two lists."""
    rows = [f([Jet(x, i == j, w) for j, (x, w) in enumerate(zip(s, v, strict=True))]).parts for i in range(len(s))]
    return rows[0][0], [r[1] for r in rows], [r[3] for r in rows]


def bounds(f, s, v):
    """By how much each of the three moves when every number moves by its own size: the conditioning, entry by entry."""
    step = mp.mpf(10) ** -60
    base = flat(derivatives(f, s, v))
    total = [abs(x) for x in base]
    for which in (s, v):
        for j in range(len(s)):
            moved = [mp.mpf(x) * (1 + step * (i == j)) for i, x in enumerate(which)]
            near = flat(derivatives(f, moved, v) if which is s else derivatives(f, s, moved))
            total = [t + abs(a - b) / step for t, a, b in zip(total, near, base, strict=True)]
    return total


def flat(parts):
    """A number and two lists as one list."""
    value, gradient, curvature = parts
    return [value, *gradient, *curvature]

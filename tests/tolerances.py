"""Every tolerance of the tests, with its reason. Differences are relative to the largest entry."""

FP32_PARITY = 1e-5
"""Against a reference or another cut of the same sequence: rounding of sums in another order.
Measured: 1e-6 to 4e-6 on the tiny models."""

FAST_SCAN = 1e-6
"""A fast fp32 scan against a float64 loop (max norm). Measured: 6e-7 at worst, decay near 1."""

SLOW_SCAN_NEAR_ONE = 1e-5
"""The fp32 loop itself against a float64 loop, where decays are within 1e-5 of 1."""

FINITE_DIFFERENCE = 1e-5
"""Gradient against a central difference, both in float64 with a step of 1e-6: the difference's
own error. Measured: 1e-8 to 1e-6."""

BF16 = 0.03
"""Whole tiny models in bfloat16 (8 bits of mantissa) with operations in another order. The
references differ from each other by 0.06 to 0.10 on logits of up to 5."""

"""How far two computations may be apart: every bound on `tests.models.relative`, with its reason.

`relative` is the largest difference over the largest entry. A test holds these bounds by name
(`test_tolerances.py`). What is compared in another way (a figure as it is printed, a float64 sum by
`assert_close`, a share of correct tokens) has its bound there, with what it is a bound of.
"""

FP32_PARITY = 1e-5
"""Against a reference or another cut of the same sequence: rounding of sums in another order.
Measured: 1e-6 to 4e-6 on the tiny models."""

FAST_SCAN = 1e-6
"""A fast fp32 scan against a float64 loop (max norm). Measured: 6e-7 at worst, decay near 1."""

PATTERN_OF_SCAN = 2e-6
"""A Mamba-2 head as a matrix over positions against its scan, both fp32: sums of other lengths.
Measured: 2e-7 to 1e-6."""

SLOW_SCAN_NEAR_ONE = 1e-5
"""The fp32 loop itself against a float64 loop, where decays are within 1e-5 of 1."""

FINITE_DIFFERENCE = 1e-5
"""Gradient against a central difference, both in float64 with a step of 1e-6: the difference's
own error. Measured: 1e-8 to 1e-6."""

FLOAT64 = 1e-12
"""The same sums in float64, in another order."""

FLOAT64_LONG = 1e-10
"""Gradients through a whole sequence in float64, first and second ones."""

FLOAT64_ONE_STEP = 1e-14
"""One function of each entry in float64, by another formula."""

FP32_COUNTS = 1e-6
"""Counts over counts in fp32: no sum, one division."""

FP32_EIGENVALUES = 1e-4
"""Eigenvalues of a matrix that is not normal: they lose a digit more than its entries."""

FP32_CANCELLED = 1e-3
"""What is left of a matrix when a direction a hundred times as large is taken out of it in fp32."""

HALF_LIFE_BY_MASK = 0.1
"""A Mamba layer's half-life over padding, unmasked against masked: padding lets
hardly any time pass."""

BF16 = 0.03
"""Whole tiny models in bfloat16 (8 bits of mantissa) with operations in another order. The
references differ from each other by 0.06 to 0.10 on logits of up to 5."""

BF16_ONE_STEP = 2**-7
"""One rounding to bfloat16 or float16, of a sum of a few entries."""

INT8 = 0.05
"""Logits of a random tiny model, int8 weights against its own: one part in 254 a weight."""

QUANTIZED_BF16 = 0.1
"""A tiny model with quantised weights in bfloat16 against the plain one of the same values: the
products are rounded at other places."""

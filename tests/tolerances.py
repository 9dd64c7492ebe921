"""One tolerance table, by what is compared. A test that needs more is wrong, or the code is; never loosen one in the
commit that needs it.

Each value is relative to the largest magnitude of the reference (see `assert_close`).
"""

import numpy as np

TOLERANCE = {
    # float32 sums of up to a few thousand terms in another order: sqrt(K) * 2^-24, with head room for cancellation
    "float32": 2e-5,
    # a whole model in float32 against another implementation: the demand on parity
    "logits_float32": 1e-4,
    # one rounding of an operand to bfloat16 (2^-9) or float16 (2^-12)
    "bfloat16": 4e-3,
    "float16": 5e-4,
    # a whole model whose activations are rounded to bfloat16 in every layer against float32
    "logits_bfloat16": 5e-2,
}


def assert_close(actual: np.ndarray, expected: np.ndarray, kind: str = "float32") -> None:
    """Largest absolute difference, relative to the reference's largest magnitude, within TOLERANCE[kind]."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape} is not {expected.shape}"
    assert np.isfinite(actual).all(), f"{(~np.isfinite(actual)).sum()} values are not finite"
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-30)
    worst = float(np.abs(actual - expected).max(initial=0.0)) / scale
    assert worst <= TOLERANCE[kind], f"relative error {worst:.2e} is above {TOLERANCE[kind]:.0e} ({kind})"

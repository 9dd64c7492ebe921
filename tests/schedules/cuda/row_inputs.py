"""Random rows on a GPU for the tests of small kernels, with NaN behind the last one, and the comparison of results."""

from typing import Any

import numpy as np

from tests.tolerances import assert_close

NOT_READ = 67  # rows of NaN behind the others


class RandomRows:
    """Fresh values for a test, from a seed that is printed."""

    def __init__(self) -> None:
        import torch

        self.seed = int(np.random.default_rng().integers(2**31))
        print(f"{self.seed=}")
        self.generator = torch.Generator("cuda").manual_seed(self.seed)

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
        """Normally distributed values; memory behind the first extent's last row is NaN."""
        import torch

        held = torch.full((shape[0] + NOT_READ, *shape[1:]), float("nan"), device="cuda", dtype=getattr(torch, dtype))
        held[: shape[0]] = torch.randn(*shape, generator=self.generator, device="cuda") * scale
        return held[: shape[0]]

    def integers(self, low: int, high: int, count: int) -> Any:
        """int32 in low..high-1, followed by numbers that are no index."""
        import torch

        held = torch.full((count + NOT_READ,), -(2**31), device="cuda", dtype=torch.int32)
        held[:count] = torch.randint(low, high, (count,), generator=self.generator, device="cuda")
        return held[:count]


def compare(actual: Any, expected: Any, dtype: str) -> None:
    """A result of `dtype` with float64 values that were rounded nowhere."""
    assert str(actual.dtype) == f"torch.{dtype}"
    assert_close(actual.double().cpu().numpy(), expected.double().cpu().numpy(), dtype)

"""`tilewright` in a process of its own, where every artifact loads as the device of tests/server/serving.py.

TEST_STEP_S in the environment: what a step takes. TEST_BREAK_AFTER: the device fails after so many steps.
TEST_BREAK_REAL_AFTER: artifacts load as what they are, and the first of them fails after so many steps.
"""

import os
from typing import Any

from tests.server.serving import LIMITS, TOKENIZER, PacedModel
from tilewright import cli
from tilewright.runtime import model

REAL_STEPS = int(os.environ.get("TEST_BREAK_REAL_AFTER", "0"))


class Breaking(PacedModel):
    manifest = None
    floor = None

    def step(self, batch: Any) -> Any:
        self.broken = len(self.steps) >= int(os.environ.get("TEST_BREAK_AFTER", "1000000"))
        return super().step(batch)


def load(*_: Any, **__: Any) -> Breaking:
    loaded = Breaking(LIMITS, TOKENIZER)
    loaded.step_s = float(os.environ.get("TEST_STEP_S", "0"))
    return loaded


class BreakingModel(model.Model):
    """The first one that is made breaks."""

    steps_left: list[int] = [REAL_STEPS]  # noqa: RUF012  shared by all

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._left = self.steps_left.pop() if self.steps_left else None

    def launch(self, batch: Any) -> Any:
        if self._left is not None:
            if self._left == 0:
                raise MemoryError("the device is gone")
            self._left -= 1
        return super().launch(batch)


if __name__ == "__main__":
    if REAL_STEPS:
        model.Model = BreakingModel  # type: ignore[misc]
    else:
        model.load = load  # type: ignore[assignment]
    cli.main()

"""`tilewright` in a process of its own, where every artifact loads as the device of tests/server/serving.py.

TEST_STEP_S in the environment: what a step takes. TEST_BREAK_AFTER: the device fails after so many steps.
"""

import os
from typing import Any

from tests.server.serving import LIMITS, TOKENIZER, PacedModel
from tilewright import cli
from tilewright.runtime import model


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


if __name__ == "__main__":
    model.load = load  # type: ignore[assignment]
    cli.main()

"""What steps of each size take under chats: python bench/step_sizes.py ARTIFACT [REQUESTS]

A row for steps of so many tokens, apart for those that only decode and those with prompts in them. A size that takes
longer than a larger one shows a kernel, or a tile, that does not suit it.
"""

import sys
from bisect import bisect_left
from collections import defaultdict
from statistics import mean
from typing import Any

import gpu_model

from tilewright import Engine, load
from tilewright.runtime.step_costs import StepCosts
from tilewright.runtime.types import Work

SIZES = (*(1, 2, 4, 8, 16, 24, 32, 48), *range(64, 257, 32), *range(320, 513, 64), *range(640, 1025, 128), 1280, 1536)


class Log(StepCosts):
    """Keeps what the engine's own costs learn from."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Work, float]] = []

    def observe(self, work: Work, seconds: float) -> None:
        self.steps.append((work, seconds))
        super().observe(work, seconds)


def main() -> None:
    model, log = load(sys.argv[1]), Log()
    requests = int(sys.argv[2]) if len(sys.argv) > 2 else gpu_model.REQUESTS
    with Engine(model, costs=log) as engine:
        for _ in range(2):  # the first time graphs are captured
            log.steps.clear()
            gpu_model.time_chat(engine, model.limits, tell, requests)
    show(log.steps)


def tell(_: str, samples: list[float], **__: Any) -> None:
    print(f"{samples[0]:.0f} tokens/s", flush=True)


def show(steps: list[tuple[Work, float]]) -> None:
    rows = defaultdict(list)
    for work, seconds in steps:
        tokens = work.decodes + work.prompt_tokens
        most = SIZES[bisect_left(SIZES, tokens)] if tokens <= SIZES[-1] else sys.maxsize
        rows[work.prompt_tokens > 0, most].append((tokens, work.keys, seconds))
    print("steps        up to  count  tokens   keys    ms  all, s")
    for (mixed, most), found in sorted(rows.items()):
        tokens, keys, seconds = (mean(column) for column in zip(*found, strict=True))
        kind, bound = "with prompts" if mixed else "decode", "more" if most == sys.maxsize else most
        whole_s = seconds * len(found)
        print(f"{kind:12} {bound:>5} {len(found):6} {tokens:7.0f} {keys:6.0f} {1e3 * seconds:5.2f} {whole_s:7.2f}")


if __name__ == "__main__":
    main()

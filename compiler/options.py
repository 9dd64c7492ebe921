"""What a user can choose about a compile."""

from dataclasses import dataclass
from pathlib import Path

from tilewright.compiler.errors import CompileError
from tilewright.compiler.targets.base import Target

DEFAULT_MAX_BATCH = 16
DEFAULT_MAX_TOKENS = 512
DEFAULT_PAGE_SIZE = 16
TOP_LOGPROBS = 20  # alternatives that a step returns, the most a request can ask for
DECODE_BUCKETS = (1,)  # batch sizes with a step of their own


@dataclass(frozen=True)
class Options:
    """What a user can choose about a compile; sizes in sequences and tokens."""

    target: Target
    weights: str = "auto"  # or random:SEED
    quant: str = "auto"
    max_batch: int = DEFAULT_MAX_BATCH
    max_tokens: int = DEFAULT_MAX_TOKENS
    page_size: int = DEFAULT_PAGE_SIZE
    dump: Path | None = None

    def __post_init__(self) -> None:
        kind, _, seed = self.weights.partition(":")
        if self.weights != "auto" and (kind != "random" or not seed.isdecimal()):
            raise CompileError(f"--weights is {self.weights!r}; use auto or random:SEED, such as random:0")
        for name in ("max_batch", "max_tokens", "page_size"):
            value = getattr(self, name)
            if not 1 <= value <= 65536:
                raise CompileError(f"--{name.replace('_', '-')} is {value}; give a number from 1 to 65536")
        if self.max_batch > self.max_tokens:
            raise CompileError(
                f"--max-batch {self.max_batch} is more than --max-tokens {self.max_tokens}, but a step holds a token "
                "of every sequence; raise --max-tokens or lower --max-batch"
            )

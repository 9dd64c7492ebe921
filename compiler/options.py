"""What a user can choose about a compile, and what each kind of target takes where nothing was chosen."""

from dataclasses import dataclass
from pathlib import Path

from tilewright.compiler.errors import CompileError
from tilewright.compiler.targets.base import Target

DEFAULT_PAGE_SIZE = 16
POOLINGS = ("last", "mean")  # the last token's state is the only one that has seen all of a text
TOP_LOGPROBS = 20  # alternatives that a step returns, the most a request can ask for


@dataclass(frozen=True)
class Defaults:
    """What a kind of target takes: limits; dtypes between kernels and in pages; steps with sizes of their own.

    decode_buckets: batch sizes with a static step or, on a GPU, a graph; those up to max_batch count.
    """

    max_batch: int
    max_tokens: int
    activations: str
    kv_dtype: str
    k_transposed: bool
    decode_buckets: tuple[int, ...]


# A batch is padded to the next: by half its size at most from 16 on, by a quarter from 128 on.
_GRAPHS = (
    *(1, 2, 4, 8, 16, 24, 32, 48),
    *range(64, 256, 32),
    *range(256, 512, 64),
    *range(512, 1024, 128),
    *range(1024, 4097, 256),
)

DEFAULTS = {
    "cpu": Defaults(16, 512, "float32", "float32", True, (1,)),
    "cuda": Defaults(1024, 2048, "bfloat16", "bfloat16", False, _GRAPHS),
}


@dataclass(frozen=True)
class Options:
    """What a user can choose about a compile; sizes in sequences and tokens, 0 where the target's default is meant."""

    target: Target
    weights: str = "auto"  # or random:SEED
    quant: str = "auto"
    max_batch: int = 0
    max_tokens: int = 0
    page_size: int = DEFAULT_PAGE_SIZE
    strict: bool = False  # the same bits for a token whether it was generated or stands in a prompt
    pooling: str = "last"  # of hidden states to a text's embedding: mean or last
    dump: Path | None = None
    logs: Path | None = None  # tuning records; None: the usual place

    def __post_init__(self) -> None:
        kind, _, seed = self.weights.partition(":")
        if self.weights != "auto" and (kind != "random" or not seed.isdecimal()):
            raise CompileError(f"--weights is {self.weights!r}; use auto or random:SEED, such as random:0")
        for name in ("max_batch", "max_tokens"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(self.defaults, name))
        for name in ("max_batch", "max_tokens", "page_size"):
            value = getattr(self, name)
            if not 1 <= value <= 65536:
                raise CompileError(f"--{name.replace('_', '-')} is {value}; give a number from 1 to 65536")
        if self.pooling not in POOLINGS:
            raise CompileError(f"--pooling is {self.pooling!r}; use {' or '.join(POOLINGS)}")
        if self.max_batch > self.max_tokens:
            raise CompileError(
                f"--max-batch {self.max_batch} is more than --max-tokens {self.max_tokens}, but a step holds a token "
                "of every sequence; raise --max-tokens or lower --max-batch"
            )

    @property
    def seed(self) -> int:
        """That of random weights."""
        return int(self.weights.removeprefix("random:"))

    @property
    def defaults(self) -> Defaults:
        return DEFAULTS[self.target.kind]

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Batch sizes that a decode batch is padded to; on a GPU, where larger ones have no step, up to max_batch."""
        sizes = [size for size in self.defaults.decode_buckets if size <= self.max_batch]
        if self.target.kind == "cuda" and self.max_batch not in sizes:
            sizes.append(self.max_batch)
        return tuple(sizes)

    @property
    def any_decode(self) -> bool:
        """Whether one function runs decode batches of all sizes, of which it picks kernels as it is captured."""
        return self.target.kind == "cuda"

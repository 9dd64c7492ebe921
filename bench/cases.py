"""Named workloads. A case is what is run, on which model, and in what unit its figure stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Case:
    """One figure. `higher` says whether more is better."""

    name: str
    what: str
    unit: str
    higher: bool = False


IMPORT = Case("import", "fresh interpreter, `import tilewright`", "ms")
LOAD = Case("load", "artifact to ready model, checksums included", "ms")
COMPILE_COLD = Case("compile-cold", "`tilewright compile`, empty kernel cache", "s")
COMPILE_WARM = Case("compile-warm", "`tilewright compile`, warm kernel cache", "s")
COMPILE_MEMORY = Case("compile-memory", "peak memory of the cold compile", "MiB")
PREFILL = Case("prefill-512", "one prompt of 512 tokens to its last row's logits", "ms")
DECODE_4 = Case("decode-4", "one token at position 4 and on, batch 1", "ms")
DECODE_512 = Case("decode-512", "one token at position 512 and on, batch 1", "ms")
STREAMS_1 = Case(
    "streams-1", "greedy generation of 128 tokens after 32, 1 stream, prefill included", "tokens/s", higher=True
)
STREAMS_8 = Case("streams-8", "the same, 8 streams at once", "tokens/s", higher=True)
MEMORY = Case("memory", "peak memory of load, prefill of 512 and decode", "MiB")
BANDWIDTH = Case("read-bandwidth", "sum over 1 GiB on all threads", "GB/s", higher=True)

COMPILE_CASES = {c.name: c for c in (COMPILE_COLD, COMPILE_MEMORY, COMPILE_WARM)}

HTTP_OVERHEAD = Case(
    "http-overhead",
    "99 % of the times between tokens of 100 streams, by HTTP less in the engine; a stub of a step",
    "ms",
)
PREFIX_COLD = Case("prefix-cold", "first token by HTTP after a system prompt of 2000 tokens, nothing kept", "ms")
PREFIX_WARM = Case("prefix-warm", "the same, with what an earlier request left", "ms")
CHATS_ENGINE = Case("chats-engine", "64 chats of 64 tokens by Engine.generate", "tokens/s", higher=True)
CHATS_HTTP = Case("chats-http", "the same by HTTP", "tokens/s", higher=True)
CHATS_PEER = Case(
    "chats-peer", "the same chats by HTTP from servers of their own, beside llama.cpp's", "tokens/s", higher=True
)

LONG_PROMPT = Case(
    "long-prompt-p99",
    "p99 between tokens of 4 streams: with a prompt of 4096 tokens arriving / without",
    "×",
)
LONG_PROMPT_FIRST = Case("long-prompt-first", "first token of that prompt beside the streams", "ms")
SERVING_CASES = {
    c.name: c
    for c in (
        HTTP_OVERHEAD,
        PREFIX_COLD,
        PREFIX_WARM,
        CHATS_ENGINE,
        CHATS_HTTP,
        CHATS_PEER,
        LONG_PROMPT,
        LONG_PROMPT_FIRST,
    )
}

SOAK = Case("soak", "what a server's memory grew by under hundreds of good and bad clients, nothing leaked", "MiB")
SOAK_CASES = {SOAK.name: SOAK}

CPU_CASES = {
    c.name: c
    for c in (
        IMPORT,
        LOAD,
        COMPILE_COLD,
        COMPILE_WARM,
        COMPILE_MEMORY,
        PREFILL,
        DECODE_4,
        DECODE_512,
        STREAMS_1,
        STREAMS_8,
        MEMORY,
        BANDWIDTH,
    )
}

SMOLLM2 = "smollm2-135m"

STEP = Case("step", "one step of decoding, greedy, all streams running", "ms")
FIRST = Case("first", "one prompt, submission to first token", "ms")
CHAT = Case("chat", "1000 requests of chat-like lengths at once", "tokens/s", higher=True)
START = Case("start", "start of a process to the first token of a prompt of one, files in the system's cache", "s")
HOST = Case("host", "an eager step of 64 mixed tokens: the host's time for each kernel", "us")
IDLE = Case("idle", "share of the time between decode steps of one stream in which the GPU runs none", "%")
MODEL_CASES = {c.name: c for c in (STEP, FIRST, CHAT, START, HOST, IDLE)}

SEARCH = Case(
    "search", "candidates of a task measured until one is within 5 % of the best of its whole space", "trials"
)
GAIN = Case("gain", "a call with the best tile; of the default one it is told besides", "us")
KILLS = Case(
    "kills", "what a sweep killed many times found best, over the best of one left alone, as measured there", "ratio"
)
RACE = Case(
    "race",
    "seconds from nothing until a candidate is within 5 % of the best of all searches, or all that there were",
    "s",
)
FRESH = Case(
    "fresh",
    "a task of a fresh sweep: the best committed time over the sweep's; tile_ratio: both as measured now",
    "ratio",
)
FRESH_SWEEP = Case(
    "fresh-sweep", "the same of all tasks of a sweep that have a committed record of their space", "ratio"
)
TUNE_CASES = {c.name: c for c in (SEARCH, GAIN, KILLS, RACE, FRESH, FRESH_SWEEP)}


@dataclass(frozen=True)
class LinearShape:
    """`tokens` rows of `depth` values times a weight [outputs, depth]. gated: the product's halves are gate and up, and
    the result is silu(gate) * up."""

    tokens: int
    outputs: int
    depth: int
    out_dtype: str = "bfloat16"
    gated: bool = False


@dataclass(frozen=True)
class AttentionShape:
    """`batch` sequences of `length` tokens: each one query over all its keys (decode), or a causal prompt."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16


@dataclass(frozen=True)
class SampleShape:
    rows: int
    vocab: int
    top_k: int
    top_p: float


@dataclass(frozen=True, kw_only=True)
class KernelCase(Case):
    """table: the cases whose ratios are averaged."""

    table: str
    shape: LinearShape | AttentionShape | SampleShape


LAYERS = {  # outputs, depth: the linears of an 8B Llama
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
TOKENS = (1, 4, 16, 64, 128, 256, 512, 2048, 8192)
MOST_LOGITS = 256  # rows that a step draws from
DECODES = (
    (1, 1024),
    (1, 8192),
    (1, 65536),
    (8, 1024),
    (16, 1024),
    (16, 8192),
    (64, 1024),
    (64, 4096),
    (128, 1024),
    (128, 2048),
    (256, 1024),
)
PREFILLS = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (8, 1024), (16, 2048))


CEILINGS = {
    "read-bandwidth": Case("read-bandwidth", "sum over 2 GiB", "TB/s", higher=True),
    "matrix-rate": Case("matrix-rate", "bfloat16 product of 8192 x 8192 matrices", "TFLOP/s", higher=True),
}


def _kernel_cases() -> Iterator[KernelCase]:
    for layer, (outputs, depth) in LAYERS.items():
        for tokens in (t for t in TOKENS if layer != "lm_head" or t <= MOST_LOGITS):
            table = f"linears, M {'up to 64' if tokens <= 64 else '128 to 512' if tokens <= 512 else '2048 and 8192'}"
            out_dtype = "float32" if layer == "lm_head" else "bfloat16"
            what = f"{layer} of an 8B Llama, {tokens} tokens"
            shape = LinearShape(tokens, outputs, depth, out_dtype)
            yield KernelCase(f"{layer}-{tokens}", what, "us", table=table, shape=shape)
    for tokens in TOKENS:
        shape = LinearShape(tokens, *LAYERS["gate_up"], gated=True)
        what = f"gate_up and its gate in one, {tokens} tokens; the peer's figure is the product alone"
        yield KernelCase(f"gated-{tokens}", what, "us", table="gate_up with its gate", shape=shape)
    for batch, length in DECODES:
        what = f"attention of {batch} queries, each over {length} keys in pages of 16"
        attention = AttentionShape(batch, length)
        yield KernelCase(f"decode-{batch}x{length}", what, "us", table="decode attention", shape=attention)
    for batch, length in PREFILLS:
        what = f"causal attention of {batch} prompts of {length} tokens in pages of 16"
        attention = AttentionShape(batch, length)
        yield KernelCase(f"prefill-{batch}x{length}", what, "us", table="prefill attention", shape=attention)
    what = "top-k 50, top-p 0.9 at temperature 1"
    yield KernelCase("sample-128", what, "us", table="sampling", shape=SampleShape(128, 128256, 50, 0.9))


KERNEL_CASES = {c.name: c for c in _kernel_cases()}


def chosen(patterns: list[str] | None) -> list[KernelCase]:
    """The kernels' cases whose names match one of the patterns ("qkv-*"); all without any. Raises SystemExit for a
    pattern that none matches."""
    cases = list(KERNEL_CASES.values())
    unknown = [p for p in patterns or () if not any(fnmatch(c.name, p) for c in cases)]
    if unknown:
        raise SystemExit(f"no case is named {unknown[0]!r}; there are {', '.join(c.name for c in cases)}")
    return [c for c in cases if not patterns or any(fnmatch(c.name, p) for p in patterns)]

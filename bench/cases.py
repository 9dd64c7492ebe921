"""Named workloads. A case is what is run, on which model, and in what unit its figure stands."""

from dataclasses import dataclass


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

CASES = {
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

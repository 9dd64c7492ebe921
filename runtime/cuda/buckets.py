"""Which compiled step runs a batch, and how large it has to be made for it."""

from collections.abc import Sequence

from tilewright.compiler.artifact import Bucket
from tilewright.runtime.types import StepBatch


def choose(buckets: Sequence[Bucket], batch: StepBatch) -> Bucket:
    """A batch of generated tokens, one a sequence and all of them wanted, goes into the smallest static step that holds
    it; any other, and one that is too large, into the smallest step of open size. A prompt's last token alone is still
    a prompt's."""
    most = max(len(batch.tokens), len(batch.kv_len), len(batch.rows))
    decoding = batch.one_each and bool(batch.phases.all())
    fitting = [b for b in buckets if b.tokens >= most and (decoding or not b.static)]
    return min(fitting, key=lambda b: (not b.static, b.tokens))


def padded(bucket: Bucket, batch: StepBatch) -> dict[str, int]:
    """Tokens, sequences and rows that the step is run with: at least one row, since a kernel without work is none."""
    if bucket.static:
        return dict.fromkeys("tbr", bucket.tokens)
    return {"t": len(batch.tokens), "b": len(batch.kv_len), "r": max(1, len(batch.rows))}


def most(bucket: Bucket, max_batch: int) -> dict[str, int]:
    """The most of each that the bucket takes."""
    sequences = bucket.tokens if bucket.static else min(max_batch, bucket.tokens)
    return {"t": bucket.tokens, "b": sequences, "r": sequences}

"""How large things are made when an artifact is loaded."""

from tilewright.compiler.artifact import Manifest
from tilewright.compiler.errors import RequestError
from tilewright.runtime.types import DeviceLimits


def device_limits(manifest: Manifest, num_pages: int) -> DeviceLimits:
    """What the artifact was compiled for, with a pool of so many pages."""
    limits = manifest.limits
    return DeviceLimits(
        max_batch=limits["max_batch"],
        max_tokens=limits["max_tokens"],
        max_context=limits["max_context"],
        page_size=limits["page_size"],
        num_pages=num_pages,
        vocab_size=manifest.model["vocab"],
        top_logprobs=manifest.step["top_logprobs"],
        pooling=manifest.embedding.get("pooling"),
        hidden=manifest.embedding.get("dimensions"),
    )


def pool_pages(manifest: Manifest, kv_tokens: int | None, memory_bytes: int) -> int:
    """Pages of the KV pool: room for `kv_tokens` if given, else what `memory_bytes` hold; never more than can be used.

    0 where not even one page fits. Raises RequestError where fewer tokens than a page's are asked for.
    """
    limits = manifest.limits
    page_size = limits["page_size"]
    most = limits["max_batch"] * -(-limits["max_context"] // page_size)
    if kv_tokens is None:
        return max(0, min(most, memory_bytes // manifest.memory["page_bytes"]))
    if kv_tokens < page_size:
        raise RequestError(f"room for {kv_tokens} KV tokens is less than one page of {page_size}; give more")
    return min(most, kv_tokens // page_size)


def pages_shape(manifest: Manifest, count: int) -> tuple[int, ...]:
    """Of a pool of `count` pages: layers, pages, K and V, heads, slots of one head."""
    kv = manifest.kv
    return kv["layers"], count, 2, kv["kv_heads"], kv["page_size"] * kv["head_dim"]

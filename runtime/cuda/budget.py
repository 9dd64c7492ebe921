"""What of the GPU's memory goes to KV pages, or why the model does not fit."""

from tilewright.compiler.artifact import Manifest
from tilewright.compiler.errors import TargetError
from tilewright.runtime.sizes import pool_pages

# The rest of the memory is left to other processes, kernels, captured graphs and results of open size.
_SHARE = 0.9
_SHARE_ASKED = 0.97  # where the size of the pool was asked for
_CUDAS_OWN = 1 << 30  # bytes at most that are gone before anything is allocated


def plan_pages(manifest: Manifest, kv_tokens: int | None, weights: int, free: int, total: int) -> int:
    """Pages of the pool, beside `weights` bytes and a step's workspace. free, total: bytes, before the weights are
    there. Raises TargetError where they do not fit, and RequestError as `pool_pages` does."""
    page, tokens = manifest.memory["page_bytes"], manifest.limits["page_size"]
    share = _SHARE if kv_tokens is None else _SHARE_ASKED
    usable = free - int((1 - share) * total)
    fixed = weights + manifest.memory["workspace_bytes"]
    room = (usable - fixed) // page
    if room < 1:
        raise TargetError(
            f"{manifest.name} needs {_gb(fixed + page)} of GPU memory ({_gb(weights)} weights, the rest for a step and "
            f"one page of KV cache) and {_gb(max(usable, 0))} of {_gb(total)} are free for it{_held(free, total)}; "
            "end what else runs there, take a larger GPU, or compile the model with smaller --max-tokens"
        )
    pages = pool_pages(manifest, kv_tokens, room * page)
    if pages > room:
        length = min(manifest.limits["max_context"], room * tokens)
        raise TargetError(
            f"{kv_tokens} KV tokens need {_gb(pages * page)} of GPU memory and {_gb(room * page)} are left beside "
            f"{_gb(fixed)} for weights and a step{_held(free, total)}; {room} pages of {tokens} tokens fit, "
            f"{room * tokens} tokens in all, such as {max(1, room * tokens // length)} sequences of {length}"
        )
    return pages


def _held(free: int, total: int) -> str:
    """Words on what others hold, where that is more than CUDA itself takes."""
    held = total - free
    return f", since {_gb(held)} are held by other processes and CUDA itself" if held > _CUDAS_OWN else ""


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

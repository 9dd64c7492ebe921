"""The bulk tensor copy engine (TMA) of Hopper GPUs: tensor maps and loads of tiles in the layout that wgmma reads.

A tile's rows hold 64 values of 16 bits, 128 bytes, swizzled by their address: the 16-byte chunks of a row are exchanged
by the row's number modulo 8. Tiles therefore start at a multiple of 1024 bytes. What lies outside of a tensor is filled
with zeros.
"""

from typing import Any

from tvm.script import tirx as T

ROW = 64  # values of a tile's row
ROW_BYTES = 128
ATOM_BYTES = 1024  # 8 rows, after which the swizzle repeats

# Policies of the second-level cache, as createpolicy encodes them: read once, or read by all blocks.
EVICT_FIRST = 0x12F0000000000000
EVICT_LAST = 0x14F0000000000000

_SWIZZLE_128B = 3
_PROMOTE_256B = 3
_LOAD = "cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"


def tensor_map(handle: Any, data: Any, dtype: str, dims: tuple, strides: tuple, box: tuple) -> Any:
    """Encodes a tensor map on the host. dims: extents, innermost first; strides: bytes of each but the innermost; box:
    the extents of a load, whose innermost is ROW."""
    rank = len(dims)
    extents = [T.cast(d, "int64") for d in dims]
    return T.tensormap_encode_tiled(
        handle,
        data,
        *extents,
        *strides,
        *box,
        *([1] * rank),
        descriptor_dtype=dtype,
        rank=rank,
        swizzle=_SWIZZLE_128B,
        l2_promotion=_PROMOTE_256B,
    )


def load_tile(shared: Any, tensor_map: Any, coordinates: tuple, barrier: Any, policy: int = 0, mask: int = 0) -> Any:
    """One box into shared memory. policy: of the second-level cache; mask: blocks of the cluster that all get it, each
    at the same place, and its bytes counted by its own barrier."""
    name = _LOAD.format(rank=len(coordinates)) + ".multicast::cluster" * bool(mask) + ".L2::cache_hint" * bool(policy)
    more = ([T.uint16(mask)] if mask else []) + ([T.uint64(policy)] if policy else [])
    return T.ptx[name](shared, T.address_of(tensor_map), *coordinates, barrier, *more)

"""Addressed random numbers: the same as the engine's on the CPU (engine/src/philox.cpp)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., 2011): counters and keys uint32 -> four uint32 of the counters' shape."""
    for _ in tl.static_range(10):
        low_a, low_b = 0xD2511F53 * c0.to(tl.uint64), 0xCD9E8D57 * c2.to(tl.uint64)
        c0, c1 = (low_b >> 32).to(tl.uint32) ^ c1 ^ k0, low_b.to(tl.uint32)
        c2, c3 = (low_a >> 32).to(tl.uint32) ^ c3 ^ k1, low_a.to(tl.uint32)
        k0, k1 = (k0 + 0x9E3779B9).to(tl.uint32), (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _pair(a, b):
    """Box-Muller in float64, so that both machines round the same value: two uint32 -> two float32."""
    u = (a.to(tl.float64) + 0.5) * 2.0**-32
    v = (b.to(tl.float64) + 0.5) * 2.0**-32
    radius = tl.sqrt(-2.0 * tl.log(u))
    angle = 6.283185307179586 * v
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def normals(block, stream, particle, item, k0, k1):
    """Elements 4 block .. 4 block + 3 of the standard normal vector at (seed, item, particle, stream).

    block: int32 [B]. stream, particle, item, and the seed's low and high half k0, k1: uint32 scalars or [B].
    Returns four float32 [B].
    """
    zero = block.to(tl.uint32) * 0
    c0, c1, c2, c3 = philox(block.to(tl.uint32), zero + stream, zero + particle, zero + item, zero + k0, zero + k1)
    a, b = _pair(c0, c1)
    c, d = _pair(c2, c3)
    return a, b, c, d

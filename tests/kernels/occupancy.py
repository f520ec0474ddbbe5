# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a kernel run together on one multiprocessor.

Limits: CUDA C++ Programming Guide, "Compute Capabilities". How registers and shared memory are
given out is known from NVIDIA's cuda_occupancy.h, which the tests compare with.
"""

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536
REGISTER_UNIT = 256  # a warp gets a multiple of it
PARTITIONS = 4  # of a multiprocessor, each with its own registers and warps
SHARED_UNIT = 128
SHARED_SYSTEM = 1024  # the system takes this much of every block's shared memory


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at most; shared memory in bytes."""

    gpu: str
    warps: int
    blocks: int
    shared: int


LIMITS = {
    "sm_80": Limits("A100", warps=64, blocks=32, shared=164 << 10),
    "sm_90a": Limits("H200", warps=64, blocks=32, shared=228 << 10),
    "sm_100": Limits("B200", warps=64, blocks=32, shared=228 << 10),
    "sm_100a": Limits("B200", warps=64, blocks=32, shared=228 << 10),
}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of `threads` threads that fit together, 0 if not even one does.

    Args:
        arch: one of `LIMITS`.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
    """
    limits = LIMITS[arch]
    warps = -(-threads // WARP)
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    # A block is placed only if its registers suffice with its warps spread evenly.
    if per_warp * _round_up(warps, PARTITIONS) > REGISTERS:
        return 0
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = limits.shared // _round_up(shared + SHARED_SYSTEM, SHARED_UNIT)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)

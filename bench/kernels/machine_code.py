"""What the compiler made of each kernel, read from its machine code; needs no GPU.

    python -m rlsd.bench.kernels.machine_code [--arch 90] [KERNEL ...]

A kernel that memory is to bound must not spill, must access 16 bytes at a time, and must not issue more instructions
than there is time for while its bytes pass. Needs Triton, whose `cuobjdump` is used.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rlsd.kernels.aot import ARCHITECTURES, Kernel, compile_kernel, kernels

REGISTERS, RESERVED = 65536, 1 << 10  # of a multiprocessor; bytes of shared memory that a block takes besides its own
# Warps, KiB of shared memory and blocks of a multiprocessor at most, by the CUDA C++ programming guide.
LARGE, SMALL = (64, 228, 32), (48, 100, 24)
LIMITS = {80: (64, 164, 32), 86: (48, 100, 16), 89: SMALL, 90: LARGE, 100: LARGE, 103: LARGE, 120: SMALL, 121: SMALL}
ACCESS = re.compile(r"(LDGSTS|LDG|STG|LD|ST)\b")


@dataclass(frozen=True)
class MachineCode:
    """registers a thread; spilled: bytes of a thread's stack and local memory, a slow path's included.

    blocks: how many fit on a multiprocessor. accesses: instructions that reach global memory, by name. loop:
    instructions of the longest loop, None without loops; values: how many values of a tile a thread has.
    """

    registers: int
    spilled: int
    blocks: int
    accesses: dict[str, int]
    loop: int | None
    values: int | None


def machine_code(kernel: Kernel, arch: int) -> MachineCode:
    """Compiles `kernel` for compute capability arch / 10 and reads the result.

    Raises ValueError for an architecture that is not known; CalledProcessError where cuobjdump cannot read it.
    """
    cubin = compile_kernel(kernel, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / cubin.file
        path.write_bytes(cubin.binary)
        used = re.search(
            r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", _tool("cuobjdump", "--dump-resource-usage", str(path))
        )
        code = _instructions(_tool("cuobjdump", "-sass", str(path)))
    assert used is not None, "cuobjdump says this of every kernel"
    registers, *spilled = map(int, used.groups())
    names = Counter(text.split()[0] for _, text in code)
    per_block = -(-registers // 8) * 8 * 32 * kernel.warps  # given out 8 a thread at a time
    warps, shared, blocks = LIMITS[arch]
    fitting = (REGISTERS // per_block, warps // kernel.warps, (shared << 10) // (cubin.shared + RESERVED), blocks)
    tile = kernel.constants.get("ROWS"), kernel.constants.get("BLOCK")
    values = int(tile[0]) * int(tile[1]) // (32 * kernel.warps) if None not in tile else None  # type: ignore[call-overload]
    accesses = {name: count for name, count in sorted(names.items()) if ACCESS.match(name)}
    return MachineCode(registers, sum(spilled), min(fitting), accesses, _longest_loop(code), values)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> list[tuple[int, str]]:
    """(address, text without its predicate) of each instruction."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", listing, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def _longest_loop(code: list[tuple[int, str]]) -> int | None:
    """Instructions between a branch and the earlier place that it goes to; a branch to itself ends the code."""
    lengths = []
    for address, text in code:
        target = re.search(r"^BRA.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            lengths.append(sum(int(target[1], 16) <= at <= address for at, _ in code))
    return max(lengths, default=None)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=ARCHITECTURES, help="compute capability times 10")
    parser.add_argument("names", nargs="*", metavar="KERNEL", help="default: all")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    print(f"{'kernel':34s} registers spilled blocks  instructions a value  accesses")
    for kernel in kernels(precise=True):
        if args.names and kernel.name not in args.names:
            continue
        found = machine_code(kernel, args.arch)
        each = f"{found.loop / found.values:.1f}" if found.loop and found.values else ""
        accesses = ", ".join(f"{count} {name}" for name, count in found.accesses.items())
        print(f"{kernel.name:34s} {found.registers:9d} {found.spilled:7d} {found.blocks:6d}  {each:>20s}  {accesses}")


if __name__ == "__main__":
    main()

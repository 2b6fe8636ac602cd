"""Ahead of time: Triton kernels to cubins, with all that a launch through the driver API needs to know.

    python -m rlsd.kernels.aot --arch 80,90,100 --out FOLDER

No GPU is needed. Every cubin comes with one line in FOLDER/kernels.txt, which a bundle's manifest takes over:

    kernel NAME ARCH FILE ENTRY WARPS SHARED ARGUMENT... CONSTANT...

An ARGUMENT is `name:type`, in the order of the launch; pointers begin with `*` and must be 16-byte aligned. The last
two are Triton's scratch pointers, null where their size is 0, which is checked here. A block has 32 WARPS threads and
SHARED bytes of dynamic shared memory. A CONSTANT is `NAME=value`, fixed at compile time: tile sizes, which say how many
blocks a launch needs, and variants.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOMS = ("repulsion", "norm", "narrow", "step")
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 121)


@dataclass(frozen=True)
class Kernel:
    """A Triton function and one choice of its compile-time constants.

    name: unique, what a bundle calls it. signature: run-time argument -> Triton type ("*fp16", "fp32", "i32"; a suffix
    ":16" promises divisibility by 16), in the function's order; pointers are promised to be aligned in any case.
    constants: compile-time argument -> value.
    """

    name: str
    function: Any  # triton.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel; `arguments` are (name, type), the two scratch pointers included."""

    kernel: Kernel
    arch: int
    binary: bytes
    entry: str
    shared: int
    arguments: Sequence[tuple[str, str]]

    @property
    def file(self) -> str:
        """Its name in a bundle."""
        return f"{self.kernel.name}.sm{self.arch}.cubin"

    @property
    def line(self) -> str:
        """Its line in kernels.txt and in a bundle's manifest."""
        given = " ".join(f"{name}:{kind}" for name, kind in self.arguments)
        chosen = " ".join(f"{name}={int(value)}" for name, value in self.kernel.constants.items())  # type: ignore[call-overload]
        launch = f"{self.entry} {self.kernel.warps} {self.shared} {given} {chosen}".rstrip()
        return f"kernel {self.kernel.name} {self.arch} {self.file} {launch}"


def arguments(kernel: Kernel) -> list[tuple[str, str]]:
    """What a launch passes: (name, Triton type) in the function's order, then the two scratch pointers."""
    order = [name for name in kernel.function.arg_names if name in kernel.signature]
    types = [(name, kernel.signature[name].removesuffix(":16")) for name in order]
    return [*types, ("global_scratch", "*i8"), ("profile_scratch", "*i8")]


def kernels(precise: bool = False) -> list[Kernel]:
    """Every kernel of this package that a bundle carries; with those that only graphs with float32 parts need."""
    found = [kernel for room in ROOMS for kernel in importlib.import_module(f"rlsd.kernels.{room}").KERNELS]
    if precise:
        found += importlib.import_module("rlsd.kernels.norm").PRECISE_KERNELS
    names = [kernel.name for kernel in found]
    assert len(set(names)) == len(names), f"two kernels share a name: {sorted(names)}"
    return found


def compile_kernel(kernel: Kernel, arch: int) -> Cubin:
    """Compile for compute capability arch / 10. Raises ValueError for an architecture that is not known here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if arch not in ARCHITECTURES:
        raise ValueError(f"arch {arch} is not known: {', '.join(map(str, ARCHITECTURES))}")
    order = kernel.function.arg_names
    passed = arguments(kernel)
    types = dict(passed[:-2])
    signature = {name: types.get(name, "constexpr") for name in order}
    promised = [n for n in types if types[n].startswith("*") or kernel.signature[n].endswith(":16")]
    source = ASTSource(
        kernel.function,
        signature,
        dict(kernel.constants),
        {(order.index(n),): [["tt.divisibility", 16]] for n in promised},
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    facts = compiled.metadata
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise RuntimeError(f"kernel {kernel.name} wants scratch memory, which the engine does not give")
    return Cubin(kernel, arch, compiled.asm["cubin"], facts.name, facts.shared, passed)


def write(out: Path, architectures: Sequence[int], names: Sequence[str] = (), precise: bool = False) -> list[Cubin]:
    """Compile the named kernels, default all, and write cubins and kernels.txt to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [kernel for kernel in kernels(precise) if not names or kernel.name in names]
    cubins = [compile_kernel(kernel, arch) for kernel in chosen for arch in architectures]
    for cubin in cubins:
        (out / cubin.file).write_bytes(cubin.binary)
    (out / "kernels.txt").write_text("".join(cubin.line + "\n" for cubin in cubins))
    return cubins


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities, comma-separated (80 is 8.0)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precise", action="store_true", help="also the kernels for values in float32")
    parser.add_argument("names", nargs="*", metavar="KERNEL", help="default: all")
    args = parser.parse_args()
    for cubin in write(args.out, [int(arch) for arch in args.arch.split(",")], args.names, args.precise):
        print(f"{cubin.file}: {len(cubin.binary)} bytes, {cubin.shared} bytes of shared memory")


if __name__ == "__main__":
    main()

"""Corrupted copies of bundles: the engine must refuse each with one clear sentence, at once, and keep no memory of it.

python tests/corrupted_bundles.py [--count 2000] [--seed 0]      prints the figures; 1 as exit status if one is not met

Damage (DAMAGE) leaves the manifest as it was; lies (LIES) are sealed again, so that only what the lines say is wrong.
Case i of a seed is always the same.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bundle_factory import GraphWriter, manifest, pack_weights, write_bundle
from tiny import HIDDEN, IMAGE, LATENT, M, P, make_nets, submit_zeros

from rlsd.engine import Engine, RlsdError, Status

Change = Callable[[Path, random.Random], str]  # alters the copy, and says how
FASHION = Path(__file__).parents[1] / "models/fashion/bundle"
NUMBERS = ("0", "-1", "7", "65536", "4294967296", "9223372036854775807", "18446744073709551616", "1e3", "0x10", "n", "")
MUST = ("name", "target", "latent", "image", "context", "timesteps", "alphas_cumprod", "null_context", "weights")
SHAPED = ("latent", "image", "context", "timesteps", "feature_dim", "operator", "operator_param")
SECONDS, GROWTH = 1.0, 8 << 20  # what is allowed: for one case; bytes of resident memory over all cases


@dataclass(frozen=True)
class Verdict:
    """One case: how the bundle was altered, what the engine said (None: nothing), and the seconds that took."""

    kind: str
    detail: str
    status: Status | None
    message: str
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with the engine's answer, None if nothing is."""
        if self.status not in (Status.BAD_BUNDLE, Status.OUT_OF_MEMORY):
            return f"the answer is {self.status}"
        if not self.message.isprintable() or not 10 < len(self.message) < 1000:
            return f"the message is no clear sentence: {self.message!r}"
        return f"it took {self.seconds:.2f} s" if self.seconds > SECONDS else None


# ------------------------------------------------------------ damage


def a_file(bundle: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(bundle.iterdir()))


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()  # it may be a hard link
    path.write_bytes(data)


def flip_bits(bundle: Path, rng: random.Random) -> str:
    path = a_file(bundle, rng)
    data, bits = bytearray(path.read_bytes()), set()
    for _ in range(rng.randint(1, 8)):
        bits.add(rng.randrange(8 * len(data)))
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    rewrite(path, bytes(data))
    return f"{path.name} bits {sorted(bits)}"


def truncate(bundle: Path, rng: random.Random) -> str:
    path = a_file(bundle, rng)
    data = path.read_bytes()
    rewrite(path, data[: rng.randrange(len(data))])
    return f"{path.name} to {path.stat().st_size}"


def lengthen(bundle: Path, rng: random.Random) -> str:
    path = a_file(bundle, rng)
    rewrite(path, path.read_bytes() + rng.randbytes(rng.randint(1, 5000)))
    return f"{path.name} to {path.stat().st_size}"


def blank(bundle: Path, rng: random.Random) -> str:
    path = a_file(bundle, rng)
    rewrite(path, bytes([rng.choice((0, 255))]) * path.stat().st_size)
    return path.name


def swap(bundle: Path, rng: random.Random) -> str:
    first, second = a_file(bundle, rng), a_file(bundle, rng)
    while first.read_bytes() == second.read_bytes():
        second = a_file(bundle, rng)
    data = first.read_bytes()
    rewrite(first, second.read_bytes())
    rewrite(second, data)
    return f"{first.name} and {second.name}"


def remove(bundle: Path, rng: random.Random) -> str:
    path = a_file(bundle, rng)
    path.unlink()
    return path.name


def no_file(bundle: Path, rng: random.Random) -> str:
    """A folder, a pipe, a loop, an endless device or an enormous sparse file where a file should be."""
    path, kind = a_file(bundle, rng), rng.choice(("folder", "pipe", "loop", "device", "sparse"))
    size = path.stat().st_size
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, size + 2 ** rng.randint(31, 42))
    else:
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    return f"{path.name} a {kind}"


# ------------------------------------------------------------ lies


def lines_of(bundle: Path) -> list[str]:
    """The facts, without the first line, those about files, and the last."""
    lines = (bundle / "manifest.txt").read_text().splitlines()[1:-1]
    return [line for line in lines if not line.startswith("file ")]


def seal(bundle: Path, facts: Sequence[str]) -> None:
    files = {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "manifest.txt"}
    rewrite(bundle / "manifest.txt", manifest(list(facts), files))


def replace_line(bundle: Path, old: str, *new: str) -> str:
    facts: list[str] = []
    for line in lines_of(bundle):
        facts += new if line == old else [line]
    seal(bundle, facts)
    return f"{old!r} -> {[line[:200] for line in new]}"


def starting(bundle: Path, keys: Sequence[str]) -> list[str]:
    return [line for line in lines_of(bundle) if line.split()[0] in keys]


def wrong_number(bundle: Path, rng: random.Random) -> str:
    """One dimension of a shape, or one number, becomes another."""
    old = rng.choice(starting(bundle, SHAPED))
    words = old.split(" ")
    at = rng.choice([i for i, word in enumerate(words) if word.isdigit()])
    words[at] = rng.choice([each for each in NUMBERS if each != words[at]])
    return replace_line(bundle, old, " ".join(words))


def wrong_rank(bundle: Path, rng: random.Random) -> str:
    old = rng.choice(starting(bundle, SHAPED))
    more = rng.choice(([], ["2"], ["1"] * 6, ["65536"] * 6))
    return replace_line(bundle, old, " ".join(old.split(" ") + more if more else old.split(" ")[:-1]))


def missing_line(bundle: Path, rng: random.Random) -> str:
    return replace_line(bundle, rng.choice(starting(bundle, (*MUST, "graph", "operator"))))


def doubled_line(bundle: Path, rng: random.Random) -> str:
    old = rng.choice(starting(bundle, (*MUST, "graph", "operator", "operator_param", "named_context")))
    return replace_line(bundle, old, old, old)


def garbled_line(bundle: Path, rng: random.Random) -> str:
    old = rng.choice(starting(bundle, (*MUST, *SHAPED, "graph")))
    at = rng.randrange(len(old) + 1)
    junk = rng.choice(("\0", "\t", "  ", "\x1b[31m", "é", "\r", "/", " 1 2 3 4 5 6 7 ", "../", "%s%n", "A" * 100_000))
    return replace_line(bundle, old, old[:at] + junk + old[at:])


def unknown_key(bundle: Path, rng: random.Random) -> str:
    seal(
        bundle, [*lines_of(bundle), rng.choice(("colour blue", "kernel x", "kernel a 1 b c d e f g", "end", "Name x"))]
    )
    return "a line more"


def exchanged_graphs(bundle: Path, rng: random.Random) -> str:
    first, second = rng.sample([line for line in starting(bundle, ["graph"]) if "forward" not in line], 2)
    while first.split()[1] == second.split()[1]:
        second = rng.choice(starting(bundle, ["graph"]))
    (a, b), (c, d) = first.rsplit(" ", 1), second.rsplit(" ", 1)
    facts = [{first: f"{a} {d}", second: f"{c} {b}"}.get(line, line) for line in lines_of(bundle)]
    seal(bundle, facts)
    return f"{b} and {d}"


def bad_values(bundle: Path, rng: random.Random) -> str:
    """A table of timesteps or a context with a number that is not possible."""
    name, kind, values = rng.choice(
        (
            ("alphas_cumprod.f64", "<d", (0.0, -1.0, 1.5, float("nan"), float("inf"), 1e300)),
            ("null_context.f32", "<f", (float("nan"), float("inf"), float("-inf"))),
        )
    )
    data, value = bytearray((bundle / name).read_bytes()), rng.choice(values)
    at = rng.randrange(len(data) // struct.calcsize(kind)) * struct.calcsize(kind)
    data[at : at + struct.calcsize(kind)] = struct.pack(kind, value)
    rewrite(bundle / name, bytes(data))
    seal(bundle, lines_of(bundle))
    return f"{name} {value} at {at}"


def short_file(bundle: Path, rng: random.Random) -> str:
    """A file that is cut, with a digest that fits: what reads it has to notice."""
    path = bundle / rng.choice(("weights.bin", "alphas_cumprod.f64", "null_context.f32"))
    data = path.read_bytes()
    rewrite(path, data[: rng.randrange(len(data) // 2)])
    seal(bundle, lines_of(bundle))
    return f"{path.name} to {path.stat().st_size}"


def no_graph(bundle: Path, rng: random.Random) -> str:
    """A graph that is cut, empty or noise, with a digest that fits."""
    path = bundle / rng.choice([line.split()[3] for line in starting(bundle, ["graph"])])
    data = path.read_bytes()
    rewrite(path, rng.choice((b"", data[: rng.randrange(1, len(data) // 2)], rng.randbytes(500), b"\xff" * 64)))
    seal(bundle, lines_of(bundle))
    return f"{path.name} {path.stat().st_size} bytes"


def huge_tensor(bundle: Path, rng: random.Random) -> str:
    """A decoder that keeps an enormous activation, all of it as the manifest wants."""
    nets, size = make_nets(), rng.randrange(2**35, 2**63)
    g = GraphWriter(nets, 1, pack_weights(nets)[1])
    hidden = g.act(g("Add", g.times(g.reshaped("z", (M,)), "V1"), g.weight("b1")), out="hidden")
    g.reshaped(g.act(g("Add", g.times(hidden, "V2"), g.weight("b2")), out="pixels"), IMAGE, out="image")
    g("Expand", hidden, g.constant(np.array([1, size], np.int64)), out="huge")
    outputs = {"image": IMAGE, "hidden": (HIDDEN,), "pixels": (P,), "huge": (size,)}
    rewrite(bundle / "decoder.b1.onnx", g.model({"z": LATENT}, outputs))
    seal(bundle, lines_of(bundle))
    return f"{size} numbers"


def huge_file(bundle: Path, rng: random.Random) -> str:
    """Weights that are larger than any machine's memory, as the manifest says."""
    size = 2 ** rng.randint(38, 50)
    lines = (bundle / "manifest.txt").read_text().splitlines()[1:-1]
    known = next(line for line in lines if line.startswith("file weights.bin "))
    words = known.split()
    rewrite(bundle / "weights.bin", b"")
    os.truncate(bundle / "weights.bin", min(size, 2**43))
    facts = [f"file weights.bin {size} {words[3]}" if line == known else line for line in lines]
    rewrite(bundle / "manifest.txt", manifest(facts, {}))
    return f"{size} bytes"


DAMAGE: Sequence[Change] = (flip_bits, truncate, lengthen, blank, swap, remove, no_file)
LIES: Sequence[Change] = (
    wrong_number, wrong_rank, missing_line, doubled_line, garbled_line, unknown_key, exchanged_graphs, bad_values,
    short_file, no_graph, huge_tensor, huge_file,
)  # fmt: skip


# ------------------------------------------------------------ the engine's answer


def ask(bundle: Path) -> tuple[Status | None, str]:
    """What the engine says to the bundle: when it is opened, or when an operator is first used."""
    try:
        with Engine(bundle, threads=1) as engine:
            for operator in engine.operators:
                submit_zeros(engine, operator)
                params = {name: np.zeros(shape) for name, shape in engine.operators[operator].params.items()}
                for count in (1, 2):
                    engine.measure(operator, np.zeros((count, *engine.image_shape), np.float32), **params)
    except RlsdError as error:
        return error.status, str(error)
    return None, ""


def judge(source: Path, work: Path, change: Change, rng: random.Random) -> Verdict:
    """Alters a copy of the bundle `source` in the folder `work`, and asks the engine."""
    copy = work / "bundle"
    shutil.copytree(source, copy, copy_function=os.link)
    detail = change(copy, rng)
    start = time.perf_counter()
    status, message = ask(copy)
    verdict = Verdict(change.__name__, detail, status, message, time.perf_counter() - start)
    shutil.rmtree(copy)
    return verdict


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def campaign(count: int, seed: int, work: Path) -> Iterator[Verdict]:
    """`count` cases: of every eight one on the shipped bundle, damaged, and seven on a tiny one, damaged or lying."""
    tiny = write_bundle(work / "tiny", make_nets(), 1, 2)
    shipped = shutil.copytree(FASHION, work / "shipped")  # on the same file system, so that it can be linked
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        source, changes = (shipped, DAMAGE) if i % 8 == 7 else (tiny, (*DAMAGE, *LIES))
        yield judge(source, work, changes[i % len(changes)], rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    kinds: Counter[str] = Counter()
    slowest, faults, memory = 0.0, 0, []
    with tempfile.TemporaryDirectory() as work:
        for i, verdict in enumerate(campaign(given.count, given.seed, Path(work))):
            kinds[verdict.kind] += 1
            slowest = max(slowest, verdict.seconds)
            memory.append(resident())
            if verdict.fault:
                faults += 1
                print(f"case {i}: {verdict.kind} {verdict.detail}: {verdict.fault}")
    tenth = max(1, len(memory) // 10)  # in the first, ONNX Runtime makes its own lasting structures
    early, late = (statistics.median(part) for part in (memory[tenth : 2 * tenth] or memory, memory[-tenth:]))
    print(
        f"{given.count} corrupted bundles, {given.count - faults} refused clearly; slowest {slowest:.3f} s; resident "
        f"memory {early / 2**20:.1f} MiB in the second tenth, {late / 2**20:.1f} in the last, at most "
        f"{max(memory) / 2**20:.1f}"
    )
    print(", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())))
    return int(faults > 0 or late - early > GROWTH)


if __name__ == "__main__":
    sys.exit(main())

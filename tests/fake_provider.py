"""ONNX Runtime's own CUDA provider without a GPU: over stand-ins for NVIDIA's libraries, whose kernels do nothing.

What only the provider can tell is seen so: whether it takes the graphs and the operators of ours, which kernels it
chooses and on which stream they are queued, what it allocates and when, whether a run can be recorded. Nothing is
computed: results are what lay in the memory.

report = run({"bundle": "...", "jobs": [{"operator": "inpainting", "particles": 4}], "ticks": 3})

python tests/fake_provider.py BUNDLE [--particles N]    prints what is launched; the bundle was made for CUDA

ONNX Runtime for GPUs lies in build/onnxruntime-gpu (`make provider`), or where RLSD_ONNXRUNTIME_GPU says: in the folder
with libonnxruntime_providers_cuda.so.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fake_cuda

SOURCES = fake_cuda.SOURCES / "provider"
LIBRARIES = {  # soname: source
    "libcuda.so.1": "driver",
    "libcudart.so.13": "runtime",
    "libcublas.so.13": "blas",
    "libcublasLt.so.13": "blas",
    "libcudnn.so.9": "dnn",
    "libcurand.so.10": None,  # needed, but nothing of it is called
}
ROOT = Path(__file__).resolve().parents[1]
PROVIDER = "libonnxruntime_providers_cuda.so"


def onnxruntime() -> Path | None:
    """The library of an ONNX Runtime that has the CUDA provider beside it; None where there is none."""
    named = os.environ.get("RLSD_ONNXRUNTIME_GPU")
    folder = Path(named) if named else ROOT / "build" / "onnxruntime-gpu" / "onnxruntime" / "capi"
    found = sorted(folder.glob("libonnxruntime.so*"))
    return found[0] if found and (folder / PROVIDER).is_file() else None


def build() -> Path:
    """The folder with the libraries, compiled unless these sources have been before."""
    command = [*fake_cuda.compiler(), *fake_cuda.FLAGS, "-shared"]
    contents = [path.read_bytes() for path in sorted(fake_cuda.SOURCES.rglob("*")) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*contents, " ".join(command).encode()])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"rlsd-fake-provider-{os.getuid()}-{key}"
    if not folder.is_dir():
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        for library, source in LIBRARIES.items():
            version = fresh / f"{library}.map"  # their symbols carry the library's name as a version
            version.write_text(f"{library} {{ global: *; }};\n")
            options = ["-o", fresh / library, f"-Wl,-soname,{library}", "-Wl,--no-as-needed"]
            if source != "driver":
                options += [f"-Wl,--version-script={version}", f"-L{fresh}", "-l:libcuda.so.1"]
            inputs = [SOURCES / f"{source}.cpp"] if source else ["-xc++", os.devnull]
            subprocess.run([*command, *inputs, *options], check=True)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return folder


def run(scenario: dict[str, Any], seconds: float = 600) -> dict[str, Any]:
    """What provider_process.py says of the scenario, in a process whose loader finds the stand-ins first."""
    library = onnxruntime()
    assert library is not None, __doc__
    folder = build()
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "RLSD_LIBCUDA": str(folder / "libcuda.so.1"),
    }
    command = [sys.executable, Path(__file__).parent / "provider_process.py", library]
    done = subprocess.run(
        command, input=json.dumps(scenario), env=environment, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process with the provider ended with {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


def with_fake_cubins(bundle: Path, target: Path) -> Path:
    """A bundle whose cubins are replaced by the lines that the fake driver reads; large files are shared."""
    target.mkdir(parents=True)
    lines = (bundle / "manifest.txt").read_text().splitlines()[:-1]
    cubins = {line.split()[3]: f"fake cubin\n{line}\n".encode() for line in lines if line.startswith("kernel ")}
    for i, line in enumerate(lines):
        if not line.startswith("file "):
            continue
        name = line.split()[1]
        if name in cubins:
            (target / name).write_bytes(cubins[name])
            lines[i] = f"file {name} {len(cubins[name])} {hashlib.sha256(cubins[name]).hexdigest()}"
        else:
            try:
                os.link(bundle / name, target / name)
            except OSError:  # another file system
                shutil.copyfile(bundle / name, target / name)
    text = "".join(line + "\n" for line in lines)
    (target / "manifest.txt").write_text(text + f"end {hashlib.sha256(text.encode()).hexdigest()}\n")
    return target


LAUNCHES = ("work", "cuLaunchKernel", "cuMemcpy", "cuMemset", "cuLaunchHostFunc")


def recordings(log: list[str]) -> list[list[str]]:
    """What each capture that went well has recorded: kernels, copies and fills, in the order of the log."""
    found: list[list[str]] = []
    inside: list[str] | None = None
    for line in log:
        if line.startswith("cuStreamBeginCapture"):
            inside = []
        elif line.startswith("cuStreamEndCapture"):
            if inside is not None and " graph " in line:
                found.append(inside)
            inside = None
        elif inside is not None and line.startswith(LAUNCHES):
            inside.append(line)
    return found


def kernel(line: str) -> str:
    """The kernel or library's call of a line, without its sizes."""
    words = line.split()
    if words[0] == "cuLaunchKernel":
        return f"{words[1]} (ours)"
    if words[0] != "work":
        return words[0]
    return _plain(" ".join(words[3:5]) if words[3] == "cudnn" else words[3])


@functools.cache
def _plain(name: str) -> str:
    plain = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True).stdout.strip() or name
    return re.sub(r"\(anonymous namespace\)::|onnxruntime::|contrib::|cuda::|<.*", "", plain).removeprefix("void ")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--particles", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = with_fake_cubins(given.bundle, Path(folder) / "bundle")
        operator = next(line.split()[1] for line in (bundle / "manifest.txt").read_text().splitlines()
                        if line.startswith("operator "))  # fmt: skip
        jobs = [{"operator": operator, "particles": given.particles}]
        report = run({"bundle": str(bundle), "jobs": jobs, "ticks": 3, "poison_up_to": 1 << 20})
    names = {line: kernel(line) for tick in report["ticks"] for line in tick}
    for number, recording in enumerate(recordings(report["ticks"][0]), 1):
        print(f"recorded graph {number}: {len(recording)} launches")
        for name, count in collections.Counter(names[line] for line in recording).most_common():
            print(f"{count:6} {name}")
    print("a tick afterwards:")
    for name, count in collections.Counter(names[line] for line in report["ticks"][-1]).most_common():
        print(f"{count:6} {name}")
    print(f"device memory: {report['used'] / 1e9:.2f} GB with {given.particles} particles")
    print("graphs not recorded:", report["stats"]["not_recorded"])
    print(report["faults"], end="")


if __name__ == "__main__":
    main()

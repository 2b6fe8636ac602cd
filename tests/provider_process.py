"""The process of fake_provider.run: an engine on ONNX Runtime's CUDA provider, over the stand-ins.

python provider_process.py LIBRARY < scenario.json > report.json

It imports neither torch nor onnxruntime, whose libraries would be taken for the stand-ins or the provider's host.

scenario: bundle; jobs, each with operator, particles and fields of Params; ticks. Further on request: memory (bytes of
the device), poison_up_to (bytes: see control.h), fail ([function, which call, code] from the first tick on), parallel
(first so many engines at once, each with the first job; `parallel` in the report has their stats, or `failed`),
in_turns (so do two engines that were opened by the main thread, and whose threads change).
report: ticks (the log of each), open (that of the opening), messages of the jobs ("" where one went well), stats, used
(device memory in bytes at the end), faults, live.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rlsd.engine import Engine, Job, Params, RlsdError, native

CONTEXTS = ("cuCtxGetCurrent", "cuCtxSetCurrent")


class Driver:
    """The stand-in's controls."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["RLSD_LIBCUDA"])
        for name in ("log", "faults", "live"):
            getattr(self.library, f"fake_cuda_{name}").restype = ctypes.c_char_p

    def text(self, name: str) -> str:
        return getattr(self.library, f"fake_cuda_{name}")().decode()

    def take_log(self) -> list[str]:
        lines = [line for line in self.text("log").splitlines() if not line.startswith(CONTEXTS)]
        self.library.fake_cuda_clear_log()
        return lines

    def used(self) -> int:
        free, total, context = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
        assert self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert self.library.cuCtxSetCurrent(context) == 0
        assert self.library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
        assert self.library.cuCtxSetCurrent(None) == self.library.cuDevicePrimaryCtxRelease_v2(0) == 0
        return total.value - free.value


def job(engine: Engine, operator: str, particles: int, **params: Any) -> Job:
    info = engine.operators[operator]
    ones = {name: np.ones(shape, np.float32) for name, shape in info.params.items()}
    given = {"steps": 20, "gamma": 2.0, **params}
    return Job(np.zeros(info.measurement_shape, np.float32), operator, ones, particles, params=Params(**given))


def in_parallel(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """An engine in each of so many threads at the same time: its stats, and what went wrong."""
    count = scenario["parallel"]
    begin, found = threading.Barrier(count), [{} for _ in range(count)]

    def work(place: int) -> None:
        try:
            for _ in range(3):
                begin.wait()
                with Engine(scenario["bundle"], device="cuda:0", onnxruntime=sys.argv[1]) as engine:
                    handle = engine.submit(job(engine, **scenario["jobs"][0]))
                    engine.run()
                    handle.result()
                    found[place] = engine.stats()
        except Exception as error:
            begin.abort()
            found[place] = {"failed": str(error)}

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def in_turns(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """Two engines opened and used here, then at the same time in threads that they change: as `in_parallel`."""
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(Engine(scenario["bundle"], device="cuda:0", onnxruntime=sys.argv[1])) for _ in range(2)
        ]
        for engine in engines:
            engine.reconstruct([job(engine, **scenario["jobs"][0])])
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            for turn in range(scenario["in_turns"]):
                threads = (first, second) if turn % 2 else (second, first)
                running = [
                    thread.submit(engine.reconstruct, [job(engine, **scenario["jobs"][0])])
                    for thread, engine in zip(threads, engines)
                ]
                errors = [str(each.exception()) for each in running if each.exception()]
                if errors:
                    return [{"failed": error} for error in errors]
        return [engine.stats() for engine in engines]


def main() -> None:
    """Command line."""
    scenario, driver = json.load(sys.stdin), Driver()
    if "memory" in scenario:
        driver.library.fake_cuda_set_memory(ctypes.c_size_t(scenario["memory"]))
    driver.library.fake_cuda_poison_up_to(ctypes.c_size_t(scenario.get("poison_up_to", 2**64 - 1)))
    native.preload_cuda = lambda: ()  # NVIDIA's own libraries stay out
    report: dict[str, Any] = {"ticks": [], "messages": []}
    if "parallel" in scenario:
        report["parallel"] = in_parallel(scenario)
    if "in_turns" in scenario:
        report["parallel"] = in_turns(scenario)
    with Engine(scenario["bundle"], device="cuda:0", onnxruntime=sys.argv[1]) as engine:
        report["open"] = driver.take_log()
        handles = [engine.submit(job(engine, **given)) for given in scenario.get("jobs", [])]
        for function, call, code in scenario.get("fail", []):
            driver.library.fake_cuda_fail(function.encode(), ctypes.c_long(call), code)
        for _ in range(scenario.get("ticks", 0)):
            with contextlib.suppress(RlsdError):  # the job has it as well
                engine.tick()
            report["ticks"].append(driver.take_log())
        for handle in handles:
            try:
                handle.result()
                report["messages"].append("")
            except RuntimeError as error:  # RlsdError is one; so is that it is not done
                report["messages"].append(str(error))
        report |= {"stats": engine.stats(), "used": driver.used()}
    report |= {"faults": driver.text("faults"), "live": driver.text("live")}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()

"""Why an operator cannot become a graph, in one sentence instead of the exporter's pages."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from rlsd.export.check import CheckError

_alone = threading.RLock()  # standard error and the logs belong to the process


@contextmanager
def exporting(name: str) -> Iterator[None]:
    """ValueError that says why the operator `name` cannot be exported, for whatever is raised but CheckError.

    Meanwhile the process says nothing on standard error and in its logs; one thread at a time.
    """
    with _alone:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # the tracer's own account of what is then said in one sentence
        try:
            with redirect_stderr(io.StringIO()):
                yield
        except (CheckError, OSError, MemoryError):
            raise
        except Exception as error:  # of torch.export, the ONNX exporter or ONNX Runtime: they raise of every kind
            raise ValueError(f"operator {name!r} cannot be exported: {why(error)}") from error
        finally:
            logging.disable(before)


def why(error: BaseException) -> str:
    """The reason of an error of torch's exporters, with the operation that it is about."""
    errors = [error]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    said = " ".join(map(str, errors))
    first = (str(errors[-1]).strip().splitlines() or [""])[0][:200]
    if any(isinstance(each, GuardOnDataDependentSymNode) for each in errors):
        return "it decides by the values of an image (an if, an item(), a mask made on the way), which a graph cannot"
    if "to FakeTensors first" in first:
        found = re.search(r"Found in (?:aten\.)?(\w+)", said)
        place = f" in {found[1]}" if found else ""
        return f"it uses a tensor{place} that is no buffer of its module: keep constants with register_buffer"
    missing = re.search(r"No ONNX function found for <OpOverload\(op='(?:aten\.)?([\w.]+)'", said)
    if missing:
        complex_too = " of complex numbers" if "complex-valued" in said else ""
        return f"torch's {missing[1]}{complex_too} has no form in ONNX"
    kernel = re.search(r"Could not find an implementation for (\w+)", said)
    if kernel:
        return f"ONNX Runtime has no {kernel[1]} for numbers of this type; compute in x's own"
    node = re.search(r"target=torch\.ops\.(?:aten\.)?([\w.]+?)(?:\.default)?\]", said)
    operation = f"torch's {node[1]}: " if node else ""
    return f"{operation}{type(errors[-1]).__name__}{': ' if first else ''}{first}"

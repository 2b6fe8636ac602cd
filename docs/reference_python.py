"""Modules as a page: classes, methods and functions with their signatures and docstrings, read from the sources."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

Names = Mapping[str, Sequence[str] | None]  # module below rlsd -> what of it; None: what it exports
Function = ast.FunctionDef | ast.AsyncFunctionDef
WIDTH = 100
INNER = ("Handle",)  # classes whose objects only the library makes


def page(root: Path, names: Names) -> str:
    """The sections of all these names. ValueError for one that is not there or has no docstring."""
    parts = []
    for module, chosen in names.items():
        for name in exported(root, module) if chosen is None else chosen:
            parts += section(f"rlsd.{module}", name, definition(root, module, name))
    return "\n".join(parts)


def source(root: Path, module: str) -> ast.Module:
    path = root / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def exported(root: Path, module: str) -> list[str]:
    """The module's __all__."""
    for node in source(root, module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"rlsd.{module} has no __all__")


def definition(root: Path, module: str, name: str) -> ast.ClassDef | Function:
    """Where the name is defined, there or in a module of ours from which it is imported there."""
    for node in source(root, module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return definition(root, (node.module or "").removeprefix("rlsd."), name)
    raise ValueError(f"rlsd.{module} has no {name}")


def section(module: str, name: str, node: ast.ClassDef | Function) -> list[str]:
    """Heading, signature and text of a class with its public methods, or of a function."""
    heading = f"## `{module}.{name}`\n"
    if not isinstance(node, ast.ClassDef):
        return [heading, code(signature(name, node)), text(node, name)]
    parts = [heading, "" if name in INNER else code(constructor(name, node)), text(node, name)]
    for method in node.body:
        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and not method.name.startswith("_"):
            label = f"{name}.{method.name}"
            parts += [f"### `{label}`\n", code(member(label, method)), text(method, None)]
    return [part for part in parts if part]


def constructor(name: str, node: ast.ClassDef) -> str:
    """How an object is made: __init__'s arguments or a dataclass's fields; for others, bases and the class's values."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return signature(name, method)
    if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return wrapped(f"{name}(", [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)], ")")
    values = [each for each in node.body if isinstance(each, (ast.Assign, ast.AnnAssign))]
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return "\n".join([f"class {name}({bases})", *(f"    {ast.unparse(each)}" for each in values)])


def member(label: str, method: Function) -> str:
    """A method's signature; a property is shown as an attribute."""
    kinds = {ast.unparse(each) for each in method.decorator_list}
    if "property" in kinds:
        return f"{label}: {ast.unparse(method.returns) if method.returns else 'Any'}"
    return signature(label, method)


def signature(label: str, node: Function) -> str:
    arguments = node.args
    listed = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(listed) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [argument(*pair) for pair in zip(listed, defaults) if pair[0].arg not in ("self", "cls")]
    if arguments.vararg:
        shown.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        shown.append(f"**{ast.unparse(arguments.kwarg)}")
    gives = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return wrapped(f"{label}(", shown, f"){gives}")


def argument(each: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(each) + (f" = {ast.unparse(default)}" if default is not None else "")


def wrapped(begin: str, parts: Sequence[str], end: str) -> str:
    """On one line if it fits, else one part a line."""
    line = begin + ", ".join(parts) + end
    return line if len(line) <= WIDTH else "\n".join([begin, *(f"    {part}," for part in parts), end])


def text(node: ast.ClassDef | Function, needed: str | None) -> str:
    """The docstring as Markdown. ValueError when `needed`, the name, has none."""
    found = ast.get_docstring(node)
    if found is None:
        if needed:
            raise ValueError(f"{needed} has no docstring")
        return ""
    return escaped(inspect.cleandoc(found)) + "\n"


def escaped(prose: str) -> str:
    """Prose in which Markdown sees no markup but `code` and indented lines."""
    parts = re.split(r"(`[^`]*`|^ {4}.*$)", prose, flags=re.M)
    return "".join(part if i % 2 else re.sub(r"([*<>])", r"\\\1", part) for i, part in enumerate(parts))


def code(signature: str) -> str:
    return f"```python\n{signature}\n```\n"

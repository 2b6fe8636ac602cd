"""The binary interface of rlsd.h as a table: `python tests/abi.py` writes it to tests/abi.txt.

It has, as on 64-bit systems, the size of every struct with offset, size and name of its fields, the values of the
enums, and the functions and callbacks as they are declared. Only what is appended is accepted: programs that were
compiled before have to go on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HEADER = Path(__file__).parent.parent / "engine" / "include" / "rlsd.h"
TABLE = Path(__file__).parent / "abi.txt"


@dataclass(frozen=True)
class Struct:
    """fields: name -> (offset, bytes), in order."""

    size: int
    fields: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Abi:
    """values: "enum.CONSTANT" -> value. declared: function or callback -> its declaration."""

    structs: dict[str, Struct]
    values: dict[str, int]
    declared: dict[str, str]

    def table(self) -> str:
        lines = []
        for name, struct in self.structs.items():
            lines.append(f"struct {name} {struct.size}")
            lines += [f"  field {offset} {size} {field}" for field, (offset, size) in struct.fields.items()]
        lines += [f"value {name} {value}" for name, value in self.values.items()]
        lines += [f"declared {name} {text}" for name, text in self.declared.items()]
        return "\n".join(lines) + "\n"


def from_table(text: str) -> Abi:
    """Abi.table() read again."""
    abi = Abi({}, {}, {})
    fields: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        kind, first, rest = line.split(maxsplit=2)
        if kind == "struct":
            fields = {}
            abi.structs[first] = Struct(int(rest), fields)
        elif kind == "field":
            size, name = rest.split()
            fields[name] = (int(first), int(size))
        elif kind == "value":
            abi.values[first] = int(rest)
        else:
            abi.declared[first] = rest
    return abi


def from_header(text: str) -> Abi:
    """What a C compiler makes of the header."""
    plain = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    structs = dict(re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", plain, re.S))
    enums = re.findall(r"typedef enum (\w+) \{(.*?)\} \1;", plain, re.S)
    prints = []
    for name, body in structs.items():
        prints.append(f'printf("struct {name} %zu\\n", sizeof({name}));')
        fields = [field for part in body.split(";") for field in re.findall(r"(\w+)\s*(?=,|$)", part.strip())]
        for field in fields:
            at = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            prints.append(f'printf("  field %zu %zu {field}\\n", {at});')
    constants = {f"{enum}.{name}": name for enum, body in enums for name in re.findall(r"(\w+)\s*=", body)}
    for label, name in {**constants, "RLSD_STREAM_USER": "RLSD_STREAM_USER"}.items():
        prints.append(f'printf("value {label} %lld\\n", (long long){name});')
    abi = from_table(compiled(text, "\n".join(prints)))
    functions = re.findall(r"RLSD_API\s+([^;{]*?(\w+)\([^;]*\));", plain)
    callbacks = re.findall(r"typedef\s+([^;{]*?\(\*(\w+)\)\([^;]*\));", plain)
    abi.declared.update({name: " ".join(declared.split()) for declared, name in functions + callbacks})
    return abi


def compiled(header: str, body: str) -> str:
    """What a C program with this header and body prints."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rlsd.h").write_text(header)
        Path(folder, "abi.c").write_text(f'#include "rlsd.h"\n#include <stdio.h>\nint main(void) {{\n{body}\n}}\n')
        subprocess.run(["cc", "-std=c11", "-Wpedantic", "-Werror", "abi.c", "-o", "abi"], cwd=folder, check=True)
        return subprocess.run([f"{folder}/abi"], check=True, capture_output=True, text=True).stdout


def breaks(old: Abi, new: Abi) -> list[str]:
    """Why programs that were compiled with the old one would not run with the new one."""
    found = []
    for name, struct in old.structs.items():
        now = new.structs.get(name, Struct(0, {}))
        if list(now.fields.items())[: len(struct.fields)] != list(struct.fields.items()):
            found.append(f"struct {name} does not begin with the fields that it had")
        added = [field for field in now.fields if field not in struct.fields]
        if "size" not in struct.fields and now.size != struct.size:
            found.append(f"struct {name} has no size, so it can never grow")
        # One in the padding at the old end would be read from memory that older programs never wrote.
        found += [f"{name}.{field} lies in the old struct" for field in added if now.fields[field][0] < struct.size]
    for kind, was, now in (("value", old.values, new.values), ("declaration", old.declared, new.declared)):
        found += [f"the {kind} of {name} is another or gone" for name in was if now.get(name) != was[name]]
    return found


def main() -> None:
    new = from_header(HEADER.read_text())
    reasons = breaks(from_table(TABLE.read_text()), new) if TABLE.exists() else []
    if reasons:
        sys.exit("\n".join(reasons))
    TABLE.write_text(new.table())


if __name__ == "__main__":
    main()

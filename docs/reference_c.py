"""rlsd.h as a page: every declaration with the comment above it."""

from __future__ import annotations

import re
from pathlib import Path


def page(header: Path) -> str:
    """The header's own introduction, then its sections."""
    comment, *rest = blocks(header.read_text())
    parts = [f"```text\n{comment_text(comment)}\n```\n"]
    for block in rest:
        section = re.fullmatch(r"/\* -{3,} (\w+) \*/", block)
        if section:
            parts.append(f"## {section[1].capitalize()}\n")
        else:
            parts.append(shown(block))
    return "\n".join(parts)


def blocks(text: str) -> list[str]:
    """Comments and declarations, which blank lines part; what only steers the preprocessor is left out."""
    plain = re.sub(r"^#(?!define RLSD_(?:VERSION|STREAM)).*$", "", text, flags=re.M)
    found = [block.strip() for block in re.split(r"\n\s*\n", plain)]
    return [block for block in found if block and block not in ('extern "C" {', "}")]


def shown(block: str) -> str:
    """A block: its names as a heading, the comment as prose, the declarations as code."""
    comment, code = re.fullmatch(r"(/\*.*?\*/)?\n?(.*)", block, re.S).groups()
    prose = f"{escaped(' '.join(comment_text(comment).split()))}\n" if comment else ""
    if not code:
        return prose
    names = ", ".join(f"`{name}`" for name in declared(code))
    if "RLSD_API " in code:
        code = re.sub("^(RLSD_API | {9})", "", code, flags=re.M)
    return f"### {names}\n\n{prose}\n```c\n{code}\n```\n".replace("\n\n\n", "\n\n")


def declared(code: str) -> list[str]:
    """What the declarations declare."""
    plain = re.sub(r"/\*.*?\*/", "", code, flags=re.S)
    found = re.findall(
        r"^#define (\w+)|^typedef (?:struct|enum) (\w+)|\(\*(\w+)\)|^RLSD_API [^;(]*?(\w+)\(", plain, re.M
    )
    return [next(filter(None, groups)) for groups in found]


def comment_text(comment: str) -> str:
    """The comment without its frame."""
    inner = comment.removeprefix("/*").removesuffix("*/").rstrip()
    return "\n".join(re.sub(r"^ \* ?", "", line).rstrip() for line in inner.splitlines()).strip()


def escaped(text: str) -> str:
    """Prose in which Markdown sees no markup."""
    return re.sub(r"([*<>])", r"\\\1", text)

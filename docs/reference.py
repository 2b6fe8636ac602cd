"""Writes the API reference, docs/api/*.md, from docstrings and from the comments of rlsd.h: `python docs/reference.py`.

Nothing is imported: the sources are read, so that no page needs torch, deepinv or a built library.
"""

from __future__ import annotations

from pathlib import Path

import reference_c
import reference_python
from reference_python import Names

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
NOTE = "Made by `python docs/reference.py`; the tests compare it with the sources and run the example.\n"

# Page -> module, beginning of the page, and what it shows; None is all that the module itself exports.
PYTHON: dict[str, tuple[str, Names]] = {
    "engine": ("rlsd.engine", {"engine": None}),
    "pipeline": (
        "rlsd.pipeline",
        {
            "pipeline.model": ["find_bundle", "open_model"],
            "pipeline.tasks": ["Task", "find_task"],
            "pipeline.settings": ["Settings", "settings_for"],
            "pipeline.images": ["Picture", "read_image"],
            "pipeline.items": ["Source", "Item", "Plan", "name_sources", "load_items"],
            "pipeline.reconstruct": ["Outcome", "reconstruct_items"],
            "pipeline.metrics": ["psnr", "ssim", "cosine_similarity", "deviation", "residual"],
            "pipeline.batch": ["Batch", "run_batch"],
            "pipeline.batch_work": ["Work"],
            "pipeline.distributed": ["reconstruct_together", "finish_together"],
            "pipeline.group": ["Group"],
            "pipeline.deepinv": ["RLSD"],
        },
    ),
    "export": (
        "rlsd.export",
        {
            "export": None,
            "export.extend": ["extend"],
            "export.deepinv": ["from_physics"],
        },
    ),
}


def pages() -> dict[str, str]:
    """All pages: file name -> text."""
    found = {"c.md": f"# rlsd.h\n\n{NOTE}\n{example('c.c')}\n{reference_c.page(ROOT / 'engine/include/rlsd.h')}"}
    for name, (title, names) in PYTHON.items():
        found[f"{name}.md"] = f"# {title}\n\n{NOTE}\n{example(f'{name}.py')}\n{reference_python.page(ROOT, names)}"
    return {name: text.rstrip() + "\n" for name, text in found.items()}


def example(file: str) -> str:
    """The snippet of a page, as code."""
    return f"```{file.partition('.')[2].replace('py', 'python')}\n{(API / 'snippets' / file).read_text()}```\n"


def main() -> None:
    for name, text in pages().items():
        (API / name).write_text(text)


if __name__ == "__main__":
    main()

"""What the site needs beside its settings: pages from outside of docs/, and docstrings as Markdown.

A hook of mkdocs: README and others are pages too, and links hold both here and in the repository.
An extension of griffe: a comment after a field documents it, Sphinx's roles become code, and headed blocks of modules
(``Math``, ``Shapes``) get a heading.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Attribute, Docstring, Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages above, and the pictures of the benchmarks."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links between files of the repository as links between pages."""
    for source, page in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({page}", markdown)
    return re.sub(r"\]\((?:\.\./)*(?:docs|benchmarks)/", "](", markdown)


class Docstrings(Extension):
    """Docstrings as this package writes them, in Markdown."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        comment = attr.source.splitlines()[-1].partition("  # ")[2]
        if attr.docstring is None and comment and not comment.startswith(("type:", "noqa")):
            attr.docstring = Docstring(comment, lineno=attr.lineno, parent=attr)

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
        text = text.replace("::\n\n", ":\n\n")
        if obj.is_module:
            text = re.sub(r"^([A-Z][\w ]*)\n((?:    .*\n?)+)", r"\n**\1**\n\n\2\n", text, flags=re.MULTILINE)
        obj.docstring.value = text

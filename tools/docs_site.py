"""MkDocs hooks: the site gets the pages as on GitHub, and a reference made from docstrings.

Pages of the repository outside of ``docs``, and files that pages link to, become files of the site, and links to them
are rewritten. So the Markdown needs nothing that GitHub does not support.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):(<code>~?([\w.]+)</code>)")
SEAMS = ("networks.Network", "samplers.Sampler", "samplers.Rounds", "engine.Engine", "checkpoint.Reader")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of ``docs``, files linked from any page, and the reference."""
    waiting = [ROOT / page for page in PAGES] + [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if path.suffix == ".md":
            linked = {(path.parent / target).resolve() for target in LINK.findall(path.read_text())}
            waiting += sorted(one for one in linked - seen if one.is_file())
            seen |= linked
        if not path.is_relative_to(ROOT / "docs"):
            files.append(File.generated(config, _site_path(path), abs_src_path=str(path)))
    files.append(File.generated(config, "reference.md", content=_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the repository's links to the site's."""
    source = page.file.abs_src_path
    if source is None:  # the reference
        return markdown
    at = posixpath.dirname(page.file.src_uri)
    return LINK.sub(
        lambda match: posixpath.relpath(_site_path((Path(source).parent / match[1]).resolve()), at or "."), markdown
    )


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Replace Sphinx roles in docstrings by links if the reference has their target, otherwise by text."""
    return ROLE.sub(
        lambda match: f'<a href="#{match[2]}">{match[1]}</a>' if f'id="{match[2]}"' in html else match[1], html
    )


def _site_path(path: Path) -> str:
    if path == ROOT / "README.md":
        return "index.md"
    inside = ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT
    return path.relative_to(inside).as_posix()


def _reference() -> str:
    (names,) = (ast.literal_eval(node.value) for node in _statements("__init__.py") if isinstance(node, ast.Assign))
    samplers = [
        f"samplers.{alias.name}"
        for node in _statements("samplers/__init__.py")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parapolicy.samplers.")
        for alias in node.names
        if f"samplers.{alias.name}" not in SEAMS and alias.name not in ("DenoiserLike", "Sample")
    ]
    sections = {
        "Functions": [name for name in names if name[0].islower()],
        "Classes": [name for name in names if not name[0].islower()],
        "Samplers": samplers,
        "Seams for extensions": SEAMS,
    }
    lines = [
        "# Reference",
        "",
        "From docstrings. The first two sections are the names in `import parapolicy`.",
    ]
    for title, members in sections.items():
        lines += ["", f"## {title}", *(f"\n::: parapolicy.{name}" for name in members)]
    return "\n".join(lines) + "\n"


def _statements(file: str) -> list[ast.stmt]:
    return ast.parse((ROOT / "parapolicy" / file).read_text()).body

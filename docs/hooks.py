"""What the documentation site needs beyond MkDocs and its plugins, so that it opens without a network.

1. The notebooks of the course, which lie outside `docs/`, become pages.
2. Formulas between dollar signs become MathML, which browsers draw themselves.
3. The reference is made from the modules that the package has.
4. Links to files of the repository lead to the page about them, or to the repository's address where pyproject.toml
   names one; without either they become text.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "p0circuit"
SCRATCH = ROOT / ".cache" / "docs"

# Pages of the reference, and the modules and packages on each, from the top of the package.
AREAS: dict[str, tuple[str, ...]] = {
    "models": ("models", "hooked_model", "resources"),
    "measurements": ("text", "prompts", "recording", "sink", "stats"),
    "interventions": ("interventions",),
    "experiments": ("experiments",),
    "training": ("training",),
    "reports": ("results", "figures", "report", "io", "log", "errors"),
    "applications": ("reproduction", "advice", "sweep", "course", "cli"),
}

_FORMULA = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<ticks>`+)[^`].*?(?P=ticks))"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\\w])\$(?P<inline>[^$\s](?:[^$\n]*(?:\n(?!\n)[^$\n]*)*?[^$\s])?)\$(?!\w)",
    re.DOTALL | re.MULTILINE,
)
_OUTSIDE_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<to>(?:\.\./)+(?!\.\.)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_formulas: list[str] = []


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Takes the repository's address from the one place where it is set."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if address := project.get("urls", {}).get("Repository"):
        config.repo_url = address
    return config


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebooks."""
    notebooks = SCRATCH / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _with_marks(cell.source, source.name)
        nbformat.write(notebook, notebooks / source.name)
        files.append(File(f"notebooks/{source.name}", str(SCRATCH), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills the reference, marks formulas, and makes links to files outside `docs/` hold in the site."""

    def link(match: re.Match[str]) -> str:
        target = (ROOT / "docs" / page.file.src_uri).parent / match["to"]
        address = _address(target.resolve(), page, config)
        text = match["text"]
        if address is None:
            return match.group() if target.resolve().is_relative_to(ROOT / "docs") else text
        return f"[{text}]({address}{match['anchor'] or ''})"

    if page.file.src_uri.endswith(".ipynb"):
        return markdown
    if page.file.src_uri.startswith("api/"):
        return markdown + _reference(page.file.name)
    return _with_marks(_OUTSIDE_LINK.sub(link, markdown), page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the formulas in, and takes out of a notebook what would be asked of another host."""
    if page.file.src_uri.endswith(".ipynb"):
        html = _offline_notebook(html, page, config)
    return re.sub(r"FORMULA(\d+)FORMULA", lambda match: _formulas[int(match[1])], html)


def on_post_build(config: MkDocsConfig) -> None:
    """Removes the page for missing addresses: its own are absolute, and a site on disk has no server to send it."""
    Path(config.site_dir, "404.html").unlink(missing_ok=True)


def _with_marks(source: str, name: str) -> str:
    """Markdown with a mark in the place of each formula, so that nothing in a formula is taken for markup."""

    def mark(match: re.Match[str]) -> str:
        if match["code"]:
            return match.group()
        latex = (match["block"] or match["inline"]).strip()
        formula = convert(latex, display="block" if match["block"] else "inline")
        if unknown := re.search(r"\\\w+", formula):
            raise ValueError(f"{name}: {unknown.group()} in the formula {latex!r} is not known to latex2mathml")
        _formulas.append(formula)
        return f"FORMULA{len(_formulas) - 1}FORMULA"

    return _FORMULA.sub(mark, source)


def _address(target: Path, page: Page, config: MkDocsConfig) -> str | None:
    """Where a link to a file of the repository leads in the site; None for a file that has no place there."""
    up = "../" * page.file.src_uri.count("/")
    if target.parent == ROOT / "notebooks" and target.suffix == ".ipynb":
        return f"{up}notebooks/{target.name}"
    if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
        return None
    if config.repo_url:
        return f"{config.repo_url.rstrip('/')}/blob/main/{target.relative_to(ROOT).as_posix()}"
    return None


def _offline_notebook(html: str, page: Page, config: MkDocsConfig) -> str:
    html = re.sub(r"<script[^>]*\bsrc=\"https?:[^>]*>\s*</script>", "", html)
    html = re.sub(r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", "", html, flags=re.DOTALL)
    html = re.sub(r"<script type=\"module\">(?:(?!</script>).)*mermaid.*?</script>", "", html, flags=re.DOTALL)

    def link(match: re.Match[str]) -> str:
        to, anchor, text = match["to"], match["anchor"] or "", match["text"]
        target = (ROOT / "notebooks" / to).resolve()
        if target.parent == ROOT / "notebooks" and target.suffix == ".ipynb":
            return f'<a href="{target.stem}.html{anchor}">{text}</a>'
        if target == ROOT / "README.md":
            return f'<a href="../index.html">{text}</a>'
        if target.is_relative_to(ROOT / "docs") and target.suffix == ".md":
            return (
                f'<a href="../{target.relative_to(ROOT / "docs").with_suffix(".html").as_posix()}{anchor}">{text}</a>'
            )
        if target.is_relative_to(ROOT / PACKAGE) and target.suffix == ".py" and target.is_file():
            parts = target.relative_to(ROOT).with_suffix("").parts
            area = next((name for name, tops in AREAS.items() if parts[1] in tops), None)
            if area is not None:
                return f'<a href="../api/{area}.html#{".".join(parts)}">{text}</a>'
        address = _address(target, page, config)
        return f'<a href="{address}">{text}</a>' if address else text

    return re.sub(
        r'<a href="(?P<to>(?![a-z]+:|#)[^"#]+)(?P<anchor>#[^"]*)?"[^>]*>(?P<text>.*?)</a>', link, html, flags=re.DOTALL
    )


@functools.cache
def _package() -> Any:
    return griffe.load(PACKAGE, search_paths=[ROOT], resolve_aliases=True)


def _reference(name: str) -> str:
    """What the reference adds to one of its pages: the names of the package's face, or the modules of an area."""
    if name == "index":
        return _face(_package())
    modules = [module for top in AREAS[name] for module in _documented_modules(_package().modules.get(top))]
    return "\n".join(["", *(f"::: {module.path}\n" for module in modules)])


def _documented_modules(module: Any) -> Iterator[griffe.Module]:
    """A module and those below it, in their order, as far as they are public and have a docstring."""
    if module is None or module.is_alias or module.name.startswith("_"):
        return
    if module.docstring is not None:
        yield module
    for _, inner in sorted(module.modules.items()):
        yield from _documented_modules(inner)


def _face(package: Any) -> str:
    """The names that `import p0circuit` offers, by area, each with its first line and a link."""
    area_of = {top: name for name, tops in AREAS.items() for top in tops}
    shown: dict[str, list[str]] = {name: [] for name in AREAS}
    for name, home in _public_names(package):
        try:
            target = package[home][name]
            target = target.final_target if target.is_alias else target
        except (KeyError, griffe.AliasResolutionError):
            continue
        top = target.canonical_path.split(".")[1]
        if top not in area_of:
            continue
        first = target.docstring.value.strip().split("\n\n")[0].replace("\n", " ") if target.docstring else ""
        label = f"[`{name}`][{target.canonical_path}]" if target.docstring else f"`{name}`"
        shown[area_of[top]].append(f"| {label} | {first.replace('|', chr(92) + '|')} |")
    lines = [""]
    for area, rows in shown.items():
        if rows:
            lines += [f"## {area.capitalize()}", "", "| name | what it is |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def _public_names(package: Any) -> Iterator[tuple[str, str]]:
    """The names of the package's face, each with the module that it comes from (relative to the package)."""
    for name, member in package.members.items():
        if member.is_alias and not name.startswith("_") and member.target_path.startswith(f"{PACKAGE}."):
            home, _, original = member.target_path.removeprefix(f"{PACKAGE}.").rpartition(".")
            if home and original == name:
                yield name, home
    homes = package.members.get("_HOMES")
    if homes is not None and getattr(homes, "value", None) is not None:
        yield from re.findall(r"'(\w+)': '([\w.]+)'", str(homes.value))

"""Tables of the documentation that are filled from benchmarks, between two marks that Markdown does not show."""

from __future__ import annotations

from pathlib import Path


def write_between(path: Path, name: str, table: str) -> None:
    """Put a table between the marks `<!-- name: begin -->` and `<!-- name: end -->` of a file.

    Raises:
        ValueError: the file lacks the marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{path} lacks the marks {begin} and {end}, between which the table goes")
    path.write_text(f"{text[: text.index(begin)]}{begin}\n{table}\n{text[text.index(end) :]}")

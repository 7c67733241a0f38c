"""Names in the package are the field's nouns: neither the words of CONTRIBUTING that were given up, nor participles.

A name is checked where it is bound: modules, classes, functions, arguments, variables, attributes. Words are compared
whole, with the words of a longer name where they have no other sense there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "p0circuit"

REJECTED = {
    # participles and bare adjectives
    *("found", "told", "said", "saying", "kept", "drawn", "chosen", "shown", "dealt", "lent", "looked", "heard"),
    *("opened", "turned", "some", "few", "whole", "beside", "behind", "news", "readable", "drawable", "waiting"),
    # words of our own for things that have a name in the field
    *("HooksByRow", "Contrast", "contrast", "Clause", "Changes", "change_hf", "changed", "ThePath", "replacements"),
    *("Course", "courses", "Remedies", "remedies", "lenders", "readable_by_seeds", "one_row", "beginner", "forecast"),
    *("Forecast", "Screen", "screen", "isolate", "mix", "redirect", "hear", "tell", "slots", "place"),
    *("head_size", "kv_heads", "why"),
}
"""Compared with a name as it stands, without leading underscores."""
WORDS = {"told", "heard", "lent", "lenders", "beginner", "remedies", "courses", "drawable", "readable", "behind"}
"""Compared with each word of a name, as in `told_by`."""


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Every name that a module binds, and every attribute that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def is_rejected(name: str) -> bool:
    bare = name.strip("_")
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", bare)
    return bare in REJECTED or name in REJECTED or any(word.lower() in WORDS for word in words)


def rejected_names(path: Path) -> set[tuple[str, str]]:
    file = path.relative_to(PACKAGE).as_posix()
    names = {path.stem, *bound_names(ast.parse(path.read_text(encoding="utf-8")))}
    return {(file, name) for name in names if is_rejected(name)}


@pytest.mark.parametrize("name", ["found", "_found", "told_by", "Contrast", "attn_lenders", "courses", "place"])
def test_the_words_are_rejected(name: str) -> None:
    assert is_rejected(name)


@pytest.mark.parametrize("name", ["foundation", "sink_heads", "placement", "unfound", "PromptPair", "find_sink"])
def test_others_are_not(name: str) -> None:
    assert not is_rejected(name)


def test_names_are_seen_where_they_are_bound() -> None:
    source = "import a as one\nclass Two:\n    three: int\n    def four(self, five): self.six = seven = five.eight\n"
    assert {"one", "Two", "three", "four", "five", "six", "seven"} <= set(bound_names(ast.parse(source)))
    assert "eight" not in set(bound_names(ast.parse(source)))


def test_names_of_the_package_are_the_fields_nouns() -> None:
    rejected = set().union(*(rejected_names(path) for path in sorted(PACKAGE.rglob("*.py"))))
    assert sorted(rejected) == []

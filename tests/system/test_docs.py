"""The documents name only what exists: files, functions, make targets, links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("clients/*/README.md")])


def names_in(path: Path) -> set[str]:
    """Every name a `path::name` may point at: Python's classes, functions, `Class.method`; elsewhere any word after def-like keywords."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\b(?:function\*?|class|const|let)\s+(\w+)", text)) | set(
            re.findall(r"^\s*(?:async\s+)?\*?\s*(\w+)\(", text, re.M)
        )
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_and_name_a_page_points_at_exists(page: Path) -> None:
    for path, name in re.findall(r"`([\w./-]+\.\w+)::([\w.]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} points at {path}, which does not exist"
        assert name in names_in(ROOT / path), f"{page.name} points at {path}::{name}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_local_link_and_docs_path_in_a_page_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target in re.findall(r"\b(docs/[\w/-]+\.md)\b", text):
        assert (ROOT / target).exists(), f"{page.name} names {target}"


def test_architecture_walks_name_real_functions() -> None:
    assert len(re.findall(r"`[\w./-]+\.\w+::[\w.]+`", (ROOT / "docs/architecture.md").read_text())) >= 30


def test_every_make_target_named_in_a_page_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text())) | set(re.findall(r"^make ([a-z-]+)$", page.read_text(), re.M))
        assert named <= targets, f"{page.name} names {named - targets}"


def test_readme_tree_names_every_top_level_folder() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    named = set(re.findall(r"^(\w+)/", tree, re.M))
    assert named == {"server", "worker", "clients", "benchmark", "frontend", "tests", "docs"}
    assert all((ROOT / name).is_dir() for name in named)


def test_decisions_are_at_most_sixty_lines() -> None:
    for page in (ROOT / "docs/decisions").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 60, page.name


def test_the_fault_matrix_has_every_row_and_each_names_a_test() -> None:
    """That each test named there exists is held above, for every page."""
    rows = re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", (ROOT / "docs/reliability.md").read_text(), re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 41))
    for number, _, shown_by in rows:
        tests = re.findall(r"`tests/[\w./-]+::(\w+)`", shown_by)
        assert tests, f"row {number} names no test"
        assert all(name.startswith("test_") for name in tests), f"row {number} names {tests}"

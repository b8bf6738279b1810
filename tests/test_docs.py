"""The documentation against what it speaks of: files, headings, commands, options' names, Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from calm_pl.cli import COMMANDS
from calm_pl.conf import GROUPS, config_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*/*.md"), ROOT / "benchmarks/README.md"])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for language, code in fenced if language in languages]


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*/*.md") if f"({page.relative_to(ROOT)})" not in readme] == []


@each_page
def test_commands_and_the_names_given_to_them_are_known(page: Path) -> None:
    lines = "\n".join(blocks(page, "bash", "sh", "")).replace("\\\n", " ").splitlines()
    for line in lines:
        if command := re.match(r"\s*(?:\$ )?calm ([a-z]\S*)", line):
            assert command[1] in COMMANDS, line
        for option, name in re.findall(r"(--data|--model|--trainer|--logger) ([\w-]+)(?=\s|$)", line):
            assert name in config_names(GROUPS[option]), line


@each_page
def test_python_is_python(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


def test_every_command_is_in_the_reference() -> None:
    reference = (ROOT / "docs/reference/command-line.md").read_text()
    assert [name for name in COMMANDS if f"`calm {name}" not in reference] == []

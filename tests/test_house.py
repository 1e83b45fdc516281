"""The house itself: names that stand once, and a map that shows what is there."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "sdwn"
MAP = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def definitions() -> Iterator[tuple[str, Path]]:
    """Yield the classes and public functions of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public or isinstance(node, ast.ClassDef):
                yield node.name, path.relative_to(REPOSITORY)


def test_no_class_and_no_public_function_has_the_name_of_another() -> None:
    found = defaultdict(list)
    for name, path in definitions():
        found[name].append(str(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_the_map_shows_every_package_and_only_files_that_are_there() -> None:
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            assert f"{folder.name}/ " in MAP, folder
    folders = "sdwn|tests|slurm|configs|benchmarks|tools|docs"
    for named in re.findall(rf"`((?:{folders})/[\w./*-]+)`", MAP):
        assert list(REPOSITORY.glob(named.rstrip("/"))), named


def test_functions_that_the_map_names_are_there() -> None:
    names = {name for name, _ in definitions()}
    constants = set(re.findall(r"^([A-Z][A-Z_]+)\b", all_code(), re.MULTILINE))
    for named in re.findall(r"`(\w+)\(`|`([A-Z][A-Z_]{3,})`", MAP):
        function, constant = named
        assert not function or function in names, function
        assert not constant or constant in constants, constant


def test_links_between_documents_lead_somewhere() -> None:
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("[dsb]*/*.md")):
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)|<img src=\"([^\"]+)\"", text)
        for link in map("".join, links):
            assert (path.parent / link).exists(), f"{path}: {link}"


def all_code() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))

"""The two indexes, lectures/EQUATIONS.md and lectures/ERRATA.md: nothing dangles, nothing is missing."""

import ast
import importlib
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LECTURES = ROOT / "lectures"
EQUATIONS_SO_FAR = {f"{source}{i:02d}" for source, last in (("L", 22), ("G", 10), ("C", 20), ("U", 4))
                    for i in range(1, last + 1)} | {"G12"}
MISPRINTS_SO_FAR = {f"E{i:02d}" for i in (*range(1, 15), *range(18, 26), *range(29, 33))}
TO_COME = ("10", "11")
"""Lectures that are not written yet; whatever belongs to another one is derived in it."""


def rows(markdown, columns):
    """The rows of a markdown text's tables that start with an equation's id: dictionaries by column."""
    found = []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"[A-Z]\d\d", cells[0]):
            assert len(cells) == len(columns), f"{cells[0]} has {len(cells)} cells, not {len(columns)}"
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def functions_named(cell):
    return re.findall(r"`((?:nn|ddpm)\.[\w.]+)`", cell)


def named_tests(cell):
    return re.findall(r"`([\w/]+\.py)::(\w+)`", cell)


def resolve(name):
    """The object that a dotted name stands for; AttributeError where there is none."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@cache
def defined_tests(path):
    """Names of the test functions in a file."""
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@cache
def text_of(notebook):
    """The markdown cells of a lecture."""
    cells = json.loads((LECTURES / notebook).read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def ids(text):
    return set(re.findall(r"\b([LGCUE]\d\d)\b", text))


EQUATIONS = rows((LECTURES / "EQUATIONS.md").read_text(), ("id", "statement", "function", "test", "lecture"))
ERRATA = rows((LECTURES / "ERRATA.md").read_text(), ("id", "source", "printed", "correct", "test", "lecture"))
INDEX = EQUATIONS + ERRATA
each_row = pytest.mark.parametrize("row", INDEX, ids=[row["id"] for row in INDEX])


def test_the_checks_see_what_they_should():
    row, = rows("| id | x |\n|---|---|\n| L01 | `p(x \\| y)`, `ddpm.no.such`, `a/test_b.py::test_c` |\n", ("id", "x"))
    assert functions_named(row["x"]) == ["ddpm.no.such"] and named_tests(row["x"]) == [("a/test_b.py", "test_c")]
    for name in ("ddpm.gddm.no_such", "ddpm.schedule.NoiseSchedule.no_such"):
        with pytest.raises(AttributeError):
            resolve(name)
    assert resolve("ddpm.gddm.step_kl").__name__ == "step_kl"
    assert "test_the_checks_see_what_they_should" in defined_tests("test_lectures_index.py")
    with pytest.raises(AssertionError, match="L01 has 3"):
        rows("| L01 | a | b |", ("id", "x"))


def test_every_id_has_one_row_in_order():
    for table in (EQUATIONS, ERRATA):
        named = [row["id"] for row in table]
        assert len(named) == len(set(named))
    order = [row["id"] for row in INDEX]
    assert order == sorted(order, key=lambda i: ("LGCUE".index(i[0]), i))
    assert (EQUATIONS_SO_FAR | MISPRINTS_SO_FAR) - set(order) == set()


@each_row
def test_cells_are_filled(row):
    assert all(row.values())
    assert named_tests(row["test"]) and (row["id"][0] == "E" or functions_named(row["function"]))


@pytest.mark.parametrize("row", EQUATIONS, ids=[row["id"] for row in EQUATIONS])
def test_functions_exist_and_are_documented(row):
    for name in functions_named(row["function"]):
        assert resolve(name).__doc__, name


@each_row
def test_tests_exist_and_carry_the_id(row):
    named = named_tests(row["test"])
    for path, test in named:
        assert test in defined_tests(path), f"{path} has no {test}"
    carrying = {test for path in TEST_FILES for test in defined_tests(path) if row["id"] in ids(test.replace("_", " "))}
    assert not carrying or carrying & {test for _, test in named}, "a test is named after it, and not listed"


@each_row
def test_the_lecture_derives_it_or_is_to_come(row):
    links = re.findall(r"\]\(([\w.]+\.ipynb)\)", row["lecture"])
    assert links or row["lecture"] in {f"{number}, planned" for number in TO_COME}, row["lecture"]
    for notebook in links:
        assert (LECTURES / notebook).exists(), notebook
        assert row["id"] in ids(text_of(notebook)), f"{notebook} never says {row['id']}"


def test_lectures_to_come_are_not_there_yet():
    assert {path.name[:2] for path in LECTURES.glob("*.ipynb")} & set(TO_COME) == set()


TEST_FILES = sorted(path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
SOURCES = sorted(path for folder in ("nn", "ddpm") for path in (ROOT / folder).rglob("*.py"))
KNOWN = {row["id"] for row in INDEX}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_code_cites_is_in_the_index(path):
    assert ids(path.read_text()) - KNOWN == set()


@pytest.mark.parametrize("path", TEST_FILES)
def test_what_tests_are_named_after_is_in_the_index(path):
    assert {i for test in defined_tests(path) for i in ids(test.replace("_", " "))} - KNOWN == set()


@pytest.mark.parametrize("notebook", sorted(path.name for path in LECTURES.glob("*.ipynb")))
def test_what_lectures_cite_is_in_the_index(notebook):
    assert ids(text_of(notebook)) - KNOWN == set()


@pytest.mark.parametrize("name", ["EQUATIONS.md", "ERRATA.md", *sorted(path.name for path in LECTURES.glob("*.ipynb"))])
def test_links_lead_somewhere(name):
    text = text_of(name) if name.endswith("ipynb") else (LECTURES / name).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("http") or (LECTURES / target).exists(), target

"""The lists of changes that no test notices, and the tool that writes them."""

import pytest
import tomllib

from tools.mutants import FOLDER, SLUGS, mutants, type_hints


@pytest.mark.parametrize("slug", SLUGS)
def test_every_survivor_has_a_reason_and_few_are_open(slug):
    """At least 95 of 100 changes that change a result are noticed."""
    record = tomllib.loads((FOLDER / f"{slug}.toml").read_text(encoding="utf-8"))
    survivors = record["survivor"]
    assert record["noticed"] + len(survivors) == record["mutants"]
    equivalent = sum(survivor["equivalent"] for survivor in survivors)
    assert record["noticed"] >= 0.95 * (record["mutants"] - equivalent)
    for survivor in survivors:
        assert survivor["before"] != survivor["after"]
        assert len(survivor["reason"].split()) >= 4


def test_annotations_are_found_and_nothing_else():
    source = "def f(a: int | None = 1) -> list[int]:\n    b: float = 2\n    return cast('int', a | b)\n"
    lines = source.splitlines()
    assert [lines[start[0] - 1][start[1] : end[1]] for start, end in sorted(type_hints(source))] == [
        "int | None",
        "list[int]",
        "float",
        "'int'",
    ]


def test_mutants_change_the_code_once_and_leave_types_alone():
    pytest.importorskip("cosmic_ray", reason="cosmic-ray is installed by `make mutants` only")
    source = "def f(a: int | None, /, b=1):\n    return a - 2 if b < 3 else 1e30\n"
    found = {(m.line, m.after) for m in mutants(source)}
    assert (2, "return a + 2 if b < 3 else 1e30") in found
    assert (2, "return a - 2 if b <= 3 else 1e30") in found
    assert (1, "def f(a: int | None, /, b= 2):") in found
    assert not any("int & None" in after for _, after in found)
    assert not any("1e+30" in after for _, after in found)

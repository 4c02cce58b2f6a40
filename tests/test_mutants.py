"""The list of changes that no test notices: each has a reason, and still speaks of the code as it is."""

import pytest
import tomllib

from tools.mutants import FOLDER, ROOT, SLUGS, mutants, type_hints


@pytest.mark.parametrize("slug", SLUGS)
def test_every_survivor_has_a_reason_and_they_are_few(slug):
    record = tomllib.loads((FOLDER / f"{slug}.toml").read_text(encoding="utf-8"))
    assert record["noticed"] + len(record["survivor"]) == record["mutants"]
    assert record["noticed"] >= 0.95 * record["mutants"]
    lines = {line.strip() for line in (ROOT / "lossbook" / f"{slug}.py").read_text(encoding="utf-8").splitlines()}
    for survivor in record["survivor"]:
        assert survivor["before"] in lines, "the line has changed: python -m tools.mutants " + slug
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

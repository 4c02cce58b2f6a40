"""The lists of changes that no test notices, and the tool that writes them."""

import subprocess
import sys
import tomllib

import pytest

from tools.mutants import FOLDER, ROOT, SLUGS, judges, modules, mutants, type_hints


@pytest.mark.parametrize("module", modules())
def test_every_survivor_has_a_reason_and_few_are_open(module):
    """At least 95 of 100 changes that change a result are noticed."""
    path = FOLDER / f"{module}.toml"
    if module not in SLUGS and not path.exists():
        pytest.skip(f"not tried yet: python -m tools.mutants {module}")
    record = tomllib.loads(path.read_text(encoding="utf-8"))
    survivors = record["survivor"]
    assert record["noticed"] + len(survivors) == record["mutants"]
    equivalent = sum(survivor["equivalent"] for survivor in survivors)
    assert record["noticed"] >= 0.95 * (record["mutants"] - equivalent)
    for survivor in survivors:
        assert survivor["before"] != survivor["after"]
        assert len(survivor["reason"].split()) >= 4


def test_fast_roads_and_shared_code_are_changed_too(tmp_path):
    package = ["__init__", "_checks", "focal", "emo", "_fast/__init__", "_fast/focal", "_fast/rows"]
    tests = ["interface", "focal", "emo"]
    for name in [*(f"lossbook/{name}" for name in package), *(f"tests/test_{name}" for name in tests)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    assert modules(tmp_path) == (*SLUGS, "_fast/focal", "_fast/rows", "_checks")
    assert judges("focal", tmp_path) == ["tests/test_interface.py", "tests/test_focal.py", "lossbook/focal.py"]
    assert judges("_fast/focal", tmp_path) == judges("focal", tmp_path)
    for shared in ("_fast/rows", "_checks"):
        assert {"tests/test_focal.py", "tests/test_emo.py", "lossbook/emo.py"} <= set(judges(shared, tmp_path))
    for module in modules():
        assert (ROOT / f"lossbook/{module}.py").exists()


def test_a_changed_module_is_what_everybody_imports(tmp_path):
    """Also its own package, which imports it before anybody asks for it, and the loss, which copies its names."""
    package = tmp_path / "fake/_fast"
    package.mkdir(parents=True)
    (tmp_path / "fake/__init__.py").touch()
    (package / "__init__.py").write_text("from fake._fast._function import ONE\n")
    (package / "_function.py").write_text("ONE = 1\n")
    (tmp_path / "fake/loss.py").write_text("from fake._fast import ONE\n\n\ndef f():\n    return ONE\n")
    code = (
        "import sys, pathlib\n"
        "from tools.mutants import Finder\n"
        "name, path = 'fake._fast._function', pathlib.Path('fake/_fast/_function.py').resolve()\n"
        "sys.meta_path.insert(0, Finder(name, path, 'ONE = 2'))\n"
        "sys.path.insert(0, '.')\n"
        "import fake.loss, fake._fast._function as changed\n"
        "print(fake.loss.f(), changed.__file__ == str(path), changed.__package__)\n"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "2 True fake._fast\n", done.stderr


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


def test_what_is_no_program_or_the_same_one_is_no_mutant():
    pytest.importorskip("cosmic_ray", reason="cosmic-ray is installed by `make mutants` only")
    assert not list(mutants("def f(a):\n    return {*a, ''}\n"))
    assert {m.after for m in mutants("def f(a):\n    return {**a, 'b': a['c'] * 2}\n")} >= {
        "return {**a, 'b': a['c'] / 2}"
    }

"""The project around the book: one place for its addresses, README on the package index, releases, workflows."""

import datetime
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from tools import project, release
from tools.chapters import ROOT, Chapter, all_chapters, read, toc_pages
from tools.provenance import changed_benchmark
from tools.reader import setup_cell

README = read(ROOT / "README.md")
BOOK, REPOSITORY = project.urls()["Documentation"], project.urls()["Repository"]
# What must hold an address in full; `python -m tools.project` writes the first two.
NAMED_IN = {"README.md", "CITATION.cff", "pyproject.toml"}


@pytest.fixture
def copy(tmp_path):
    """The files that hold the project's name, version and addresses."""
    names = "pyproject.toml README.md CITATION.cff CHANGELOG.md _config.yml lossbook/__init__.py"
    for name in [*names.split(), "chapters/speed.md", "chapters/speed.ipynb"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def tracked():
    """The files that are committed or will be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


# ---------------------------------------------------------------- addresses


def test_readme_and_citation_have_the_addresses_the_version_and_the_speed_of_now():
    assert project.readme() == README, "python -m tools.project"
    assert read(ROOT / "CITATION.cff") == project.citation(), "python -m tools.project"


def test_no_other_file_names_the_address():
    addresses = [re.escape(url.rstrip("/").partition("//")[2]) for url in (BOOK, REPOSITORY)]
    named = re.compile("|".join(addresses).encode())
    files = [name for name in tracked() if (ROOT / name).is_file() and name not in NAMED_IN]
    assert len(files) > 150
    found = {name: len(named.findall((ROOT / name).read_bytes())) for name in files}
    # the first cell of a reader's notebook installs from the repository; the tools wrote it
    notebooks = {name: 1 for name in files if name.endswith(".ipynb")}
    assert {name: count for name, count in found.items() if count} == notebooks


def test_another_address_reaches_everything(copy):
    declared = read(copy / "pyproject.toml")
    declared = declared.replace(BOOK, "https://book.example.org/").replace(REPOSITORY, "https://code.example.org/here")
    (copy / "pyproject.toml").write_text(declared)
    assert 'URL, REF = "https://code.example.org/here", ' in setup_cell(Chapter("speed", None, copy)).source
    project.main(copy)
    for name in ("README.md", "CITATION.cff"):
        text = read(copy / name)
        assert BOOK not in text
        assert REPOSITORY not in text
        assert "https://code.example.org/here" in text
        assert "https://book.example.org/" in text
    assert "git clone https://code.example.org/here && cd lossbook" in read(copy / "README.md")


# ---------------------------------------------------------------- README.md


def test_links_and_picture_work_on_the_package_index():
    """There README.md stands alone: every link names a host, and leads to a file or page that is there."""
    definitions = dict(re.findall(r"^\[(\w+)\]: (\S+)$", README, re.MULTILINE))
    used = set(re.findall(r"\]\[(\w+)\]", README))
    assert used == definitions.keys() - {"repository"}, "repository is there for the tool"
    pages = {f"{name}.html" for name, _ in toc_pages()} | {""}
    targets = [*definitions.values(), *re.findall(r"\]\(([^)]+)\)", README)]
    for target in targets:
        if target.startswith(BOOK):
            assert target.removeprefix(BOOK) in pages
            continue
        if not target.startswith(REPOSITORY):
            assert re.match(r"https://[\w.]+(/|$)", target), target
            continue
        file = re.sub(r"^/((blob|raw|tree)/main|actions/workflows)/", "", target.removeprefix(REPOSITORY))
        file = f".github/workflows/{file.removesuffix('/badge.svg')}" if "/actions/" in target else file
        assert (ROOT / file).exists(), target


def test_what_readme_says_the_losses_are_is_what_there_is():
    table = set(re.findall(r"^\| `lossbook\.(\w+)` \|", README, re.MULTILINE))
    assert table >= {chapter.slug for chapter in all_chapters()}
    assert not [slug for slug in table if not (ROOT / f"lossbook/{slug}.py").exists()]


# ---------------------------------------------------------------- a release


def classifiers(root=ROOT):
    """What pyproject.toml says of how far the package is."""
    declared = tomllib.loads(read(root / "pyproject.toml"))["project"]["classifiers"]
    return [one for one in declared if one.startswith("Development Status")]


def test_the_index_is_told_beta_before_1_0_and_stable_from_then_on(copy):
    assert classifiers() == [release.status(project.version())]
    release.set_version("0.2.0.dev0", copy)
    assert classifiers(copy) == ["Development Status :: 4 - Beta"]
    release.set_version("1.0.0", copy)
    assert classifiers(copy) == ["Development Status :: 5 - Production/Stable"]


def test_one_command_makes_a_release_and_another_goes_on(copy):
    log = copy / "CHANGELOG.md"
    log.write_text("# Changelog\n\n## Unreleased\n\n### Added\n\n- Much.\n\n## 0.1.0 - 2020-01-01\n\n- First.\n")
    release.set_version("7.0.0", copy)
    today = datetime.date.today().isoformat()
    assert read(log).split("\n\n")[1:4] == ["## Unreleased", f"## 7.0.0 - {today}", "### Added"]
    assert (project.version(copy), project.ref(copy), project.released(copy)) == ("7.0.0", "v7.0.0", today)
    cited = yaml.safe_load(read(copy / "CITATION.cff"))
    assert (cited["version"], cited["date-released"]) == ("7.0.0", today)
    assert release.notes(read(log), "7.0.0") == "### Added\n\n- Much."
    assert classifiers(copy) == ["Development Status :: 5 - Production/Stable"]
    release.set_version("7.1.0.dev0", copy)
    assert (project.ref(copy), project.released(copy)) == ("main", None)
    assert classifiers(copy) == ["Development Status :: 5 - Production/Stable"], "1.0 promised it for good"
    assert "date-released" not in read(copy / "CITATION.cff")
    assert release.notes(read(log), "0.1.0") == "- First."
    for version, said in {
        "7.1.0": "nothing under Unreleased",
        "7.1": "is no version",
        "v7.1.0": "is no version",
    }.items():
        with pytest.raises(release.FailedError, match=said):
            release.set_version(version, copy)


def test_the_check_prints_each_step_and_names_those_that_fail(monkeypatch, capsys):
    def good():
        """All is well."""
        return "3 things"

    def bad():
        """All is well here, too."""
        raise release.FailedError("one thing\nanother")

    monkeypatch.setattr(release, "STEPS", (bad, good))
    assert release.check([]) == 1
    assert capsys.readouterr().out == (
        "bad: All is well here, too.\n  FAILED: one thing\n    another\n"
        "good: All is well.\n  passed in 0 s: 3 things\nNot ready: bad\n"
    )
    assert release.check(["good"]) == 0
    assert capsys.readouterr().out.endswith("Ready. Tag it and push the tag.\n")


def test_what_is_not_committed_and_a_tag_of_another_version_stop_a_release(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    run = release.run
    monkeypatch.setattr(release, "run", lambda *command: run(*command, cwd=tmp_path))
    git("init", "--initial-branch=main")
    (tmp_path / "file").touch()
    with pytest.raises(release.FailedError, match=r"not committed:\n\?\? file"):
        release.tree()
    git("add", ".")
    git("commit", "-m", "all")
    assert re.fullmatch(r"[0-9a-f]{7,}", release.tree())
    git("tag", f"v{project.version()}")
    assert release.tree()
    git("tag", "v99.0.0")
    with pytest.raises(release.FailedError, match=r"the tag .*v99.0.0 is not"):
        release.tree()


def test_tests_that_travel_with_the_sdist_do_not_read_what_stays():
    """Or they say so by the fixture ``book_sources``."""
    sdist = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["sdist"]
    travels = "|".join(sdist["include"])
    stays = re.compile(
        rf'(?:\bROOT|\bparents\[1\])\)?\s*/\s*"(?!(?:{travels})\b)|\ball_(?:chapters|notebooks)\((?!root|tmp)'
    )
    files = [path for path in (ROOT / "tests").glob("*.py") if f"tests/{path.name}" not in sdist["exclude"]]
    assert len(files) > 40
    for path in files:
        for block in re.split(r"\n\n\n", read(path)):
            assert not stays.search(block) or "book_sources" in block, f"{path.name}: {block[:200]}"


def test_a_benchmark_of_older_code_is_known_by_its_commit(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    for name, text in {"benchmarks/one.py": "SIZE = 1\n", "lossbook/one.py": "def one():\n    return 1\n"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    git("init", "--initial-branch=main")
    git("add", ".")
    git("commit", "-m", "all")
    record = {"slug": "one", "commit": git("rev-parse", "HEAD")}
    assert changed_benchmark(record, tmp_path) == []
    (tmp_path / "lossbook/one.py").write_text('def one():\n    """One."""\n    return 1  # as ever\n')
    assert changed_benchmark(record, tmp_path) == []
    (tmp_path / "lossbook/one.py").write_text("def one():\n    return 2\n")
    assert changed_benchmark(record, tmp_path) == ["lossbook/one.py"]


# ---------------------------------------------------------------- workflows

WORKFLOWS = {path.name: yaml.safe_load(read(path)) for path in (ROOT / ".github/workflows").glob("*.yml")}


def test_workflows_are_there_and_take_no_more_than_they_need():
    assert WORKFLOWS.keys() == {"links.yml", "pages.yml", "release.yml", "test.yml", "versions.yml"}
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for job in workflow["jobs"].values():
            assert "uses" in job or job["timeout-minutes"] <= 180, name
            for step in job.get("steps", []):
                assert "uses" not in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), f"{name}: pinned by commit"


def test_workflows_call_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    steps = [
        step["run"]
        for w in WORKFLOWS.values()
        for j in w["jobs"].values()
        for step in j.get("steps", [])
        if "run" in step
    ]
    called = {match[1] for step in steps if (match := re.match(r"make ([a-z-]+)", step))}
    assert called == {"book", "compat", "fresh", "links", "losses", "pdf", "release-check"}
    assert called <= targets
    assert [step for step in steps if not step.startswith("make ")] == [
        step
        for step in steps
        if step.startswith((".ci/run", ".venv/bin/python -m tools.release --notes", "gh release create"))
    ]
    assert read(ROOT / ".ci/run").splitlines()[-1] == "make test"

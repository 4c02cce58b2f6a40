"""What a user gets with ``pip install``, and what the first cell of a notebook does on Colab."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser

import pytest

import lossbook
from tools import OLDEST, compat, project
from tools.chapters import ROOT, all_chapters, all_notebooks, code_cells, imported_modules
from tools.reader import setup_cell

SOURCES = ("lossbook", "data", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (path,) = folder.glob("lossbook-*.whl")
    return path


def test_the_package_needs_torch_and_numpy_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in needed) == ["numpy", "torch"]
    assert {"book", "data", "notebook", "plots", "test"} <= set(metadata.get_all("Provides-Extra"))


def test_the_versions_that_are_admitted_are_those_that_are_tested():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, OLDEST))
    assert declared["requires-python"] == f">={oldest}"
    assert f"Programming Language :: Python :: {oldest}" in declared["classifiers"]
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    record = ROOT / compat.RECORD
    if record.exists():
        tried = json.loads(record.read_text())
        (torch,) = (name for name in declared["dependencies"] if name.startswith("torch"))
        assert min(tried["torch"], key=compat.key).startswith(torch.removeprefix("torch>="))
        assert tried["python"].startswith(oldest)


def test_the_wheel_has_the_types_and_the_data_of_the_chapters(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "lossbook/py.typed" in names
    for path in sorted((ROOT / "data").rglob("*.json")):
        assert f"lossbook/_data/{path.relative_to(ROOT / 'data').as_posix()}" in names
    assert not [n for n in names if n.startswith(("tests", "tools", "chapters"))]


def test_the_tests_of_the_losses_run_in_the_unpacked_sdist(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("lossbook-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (folder,) = (path for path in tmp_path.glob("lossbook-*") if path.is_dir())
    (folder / "tests/test_here.py").write_text(
        "import lossbook, pathlib\n\n\ndef test_it_is_this_one():\n"
        "    assert pathlib.Path(lossbook.__file__).parents[1] == pathlib.Path(__file__).parents[1]\n"
    )
    imported = [imported_modules(path.read_text()) for path in (folder / "tests").glob("*.py")]
    assert len(imported) > 30
    for name in {name.split(".")[0] for names in imported for name in names}:
        assert (folder / name).is_dir() or not (ROOT / name).is_dir(), f"a test imports {name}, which does not travel"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", "not compile"]
    files = ["tests/test_here.py", "tests/test_soft_labels.py", "lossbook/soft_labels.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*command, *files], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# ---------------------------------------------------------------- the first cell of a notebook


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """An environment like Colab's: torch, numpy and what the chapters need, a ``google.colab``, no lossbook.

    The repository that the notebooks name is redirected to a clone of the working tree.
    """
    if not shutil.which("git"):
        pytest.skip("git is missing; the setup cell installs from a repository")
    folder = tmp_path_factory.mktemp("colab")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    # All of the present environment but lossbook, whose editable install is a .pth file that is not read from here.
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").touch()

    repository = folder / "repository"
    repository.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, repository / name)
    shutil.rmtree(repository / "lossbook/__pycache__", ignore_errors=True)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], cwd=repository, check=True)
    commit(repository)
    if project.ref() != "main":  # a release
        subprocess.run(["git", "tag", project.ref()], cwd=repository, check=True)
    return environment / "bin/python", repository, site


def commit(repository):
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "all"], cwd=repository, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()


def run_setup(colab, tmp_path, source, *words, repository=None):
    python, repository = colab[0], repository or colab[1]
    environment = {
        **os.environ,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": project.urls()["Repository"],
        "PIP_NO_BUILD_ISOLATION": "0",  # "0" means no isolation: hatchling is at hand, a network may not be
        "LOSSBOOK_DEVICE": "cpu",
    }
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, *(words or ("-c", source))], cwd=tmp_path, env=environment, capture_output=True, text=True
    )


def test_a_repository_that_cannot_be_reached_is_told_in_one_sentence(colab, tmp_path):
    """Run first: lossbook is not installed yet."""
    done = run_setup(colab, tmp_path, setup_cell(all_chapters()[0]).source, repository=tmp_path / "nowhere")
    assert done.returncode != 0
    told = f"lossbook cannot be installed: {project.ref()} of {project.urls()['Repository']} cannot be reached."
    assert done.stderr.splitlines()[-1] == f"RuntimeError: {told} Is the network on?"
    assert "CalledProcessError" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chapter", all_chapters()[:1], ids=lambda c: c.slug)
def test_the_setup_cell_installs_on_colab_checks_and_refuses(colab, chapter, tmp_path):
    source = setup_cell(chapter).source
    first = run_setup(colab, tmp_path, source)
    assert first.returncode == 0, first.stderr
    assert f"lossbook {lossbook.__version__}" in first.stdout
    installed = {path.name.split("-")[0] for path in colab[2].glob("*.dist-info")}
    assert installed == {"lossbook"}, "torch, numpy and all the rest stay as they are"
    assert not list(tmp_path.iterdir()), "the list of what must stay is removed again"

    second = run_setup(colab, tmp_path, source)
    assert second.returncode == 0, second.stderr

    other = source.replace(f'DIGEST = "{chapter.package_digest}"', 'DIGEST = "0123456789abcdef"')
    assert other != source
    refused = run_setup(colab, tmp_path, other)
    assert refused.returncode != 0
    assert "is not the one this notebook was made with" in refused.stderr
    assert f"No commit that {project.urls()['Repository']} shows has its modules" in refused.stderr
    assert refused.stderr.endswith(f'@{project.ref()}", and take the notebook from {project.ref()}, too.\n')


def test_a_saved_notebook_is_told_which_commit_it_needs(colab, tmp_path):
    """The repository has moved on since; what the message says makes the notebook run."""
    chapter, repository = all_chapters()[0], colab[1]
    then = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    module = repository / chapter.modules[-1]
    module.write_text(module.read_text() + "\nNEW = 1\n")
    commit(repository)
    pip = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps"]
    source = f"lossbook @ git+{project.urls()['Repository']}@"
    assert run_setup(colab, tmp_path, "", *pip, source + "main").returncode == 0
    refused = run_setup(colab, tmp_path, setup_cell(chapter).source)
    assert f"is not the one this notebook was made with ({lossbook.__version__}, commit {then[:10]})" in refused.stderr
    assert f'pip install --force-reinstall --no-deps "{source}{then}"' in refused.stderr.splitlines()[-1]
    assert run_setup(colab, tmp_path, "", *pip, source + then).returncode == 0
    done = run_setup(colab, tmp_path, setup_cell(chapter).source)
    assert done.returncode == 0, done.stderr


def test_the_cells_on_records_run_on_colab(colab, tmp_path):
    """The page of the records needs nothing but the installed package: they travel with it."""
    (page,) = [page for page in all_notebooks() if page.slug == "results"]
    cells = "\n".join(cell.source for cell in code_cells(page.source))
    head = "import matplotlib\nmatplotlib.use('agg')\ndisplay = print\n"
    tail = "\nimport lossbook.records\nprint(lossbook.records.__file__)"
    done = run_setup(colab, tmp_path, setup_cell(page).source + "\n" + head + cells + tail)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓") >= 8
    assert str(colab[2]) in done.stdout.splitlines()[-1]


def test_without_colab_the_setup_cell_says_how_to_install(colab, tmp_path):
    """Run last: it takes Colab and lossbook away."""
    site = colab[2]
    shutil.rmtree(site / "google")
    for path in site.glob("lossbook*"):
        shutil.rmtree(path)
    done = run_setup(colab, tmp_path, setup_cell(all_chapters()[0]).source)
    assert done.returncode != 0
    assert "lossbook is not installed. In a clone: `make book`; elsewhere: pip install" in done.stderr

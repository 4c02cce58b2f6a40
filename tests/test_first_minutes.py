"""The first five minutes of a stranger: README's commands on a machine that knows nothing of the project.

The clone lies on a path with spaces and letters of other alphabets, the home is empty, git has no identity, none of the
project's variables is set and nothing lies beside the clone. Packages are not downloaded again: the environment sees
those of the present one, so that pip finds them all there. Tests marked ``fresh`` download everything; ``make fresh``
runs them.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import types
import venv
from pathlib import Path

import pytest
import yaml

import lossbook
import tools
from tools import install, pdf
from tools.chapters import ROOT, read

pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make")
README = read(ROOT / "README.md")
NOWHERE = "http://127.0.0.1:9"  # nobody answers there
NEWER = ("python3.12", "python3.13", "python3.14")
BESIDE = Path(sys.base_prefix).parent  # where pyenv keeps the others
OTHERS = [path for name in NEWER for path in [*map(str, BESIDE.glob(f"*/bin/{name}")), f"/usr/bin/{name}"][:1]]
OTHERS = [path for path in OTHERS if os.access(path, os.X_OK)]


def environment(home, **more):
    """The variables of somebody who has just logged in; nothing outside this machine can be reached."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), NOWHERE)
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "PIP_NO_INDEX": "1", **proxies, **more}


class Stranger:
    """A clone of the last commit, and what happens in it."""

    def __init__(self, folder):
        self.home, self.root = folder / "home", folder / "Bücher und 书" / "loss book"
        self.home.mkdir()
        self.root.parent.mkdir()
        subprocess.run(["git", "clone", "--quiet", ROOT, self.root], check=True)
        see_packages(self.root / ".venv")

    def command(self, *words):
        return {"args": words, "cwd": self.root, "env": environment(self.home), "text": True}

    def run(self, *words):
        return subprocess.run(**self.command(*words), capture_output=True)

    def make(self, target):
        return self.run("make", f"PYTHON={sys.executable}", target)

    def interrupt(self, target, sign):
        """Press Ctrl-C as soon as the sign is there; what was printed."""
        command = self.command("make", f"PYTHON={sys.executable}", target)
        command |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # a shell's background jobs hear no Ctrl-C, nor do those that they start
        command["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(**command, start_new_session=True) as process:
            deadline = time.monotonic() + 300
            while not sign():
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            told = process.communicate(timeout=60)[0]
        assert process.returncode != 0
        return told


def see_packages(folder):
    """An environment that sees the packages of this one, without lossbook: its editable install is a .pth file."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin/python"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Stranger(tmp_path_factory.mktemp("first"))


def test_readme_has_no_command_that_is_not_tried_here():
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in fences if not language]
    commands = {line.partition("#")[0].strip() for block in blocks for line in block.splitlines()}
    tried_here = {"pip install lossbook", "make book", 'pip install "lossbook[data]"'}
    data = ("list", "list banking77", "fetch banking77", "verify")
    tried_here |= {f"python -m lossbook.data {words}" for words in data}
    tried_elsewhere = {"make test"}  # by CI, or nothing is
    cloned = {command for command in commands if command.startswith("git clone https://")}
    assert commands - cloned == tried_here | tried_elsewhere


# ---------------------------------------------------------------- make book, in the order in which a stranger meets it


def an_install_that_is_interrupted_says_so(stranger):
    settings = stranger.root / ".venv/pyvenv.cfg"
    before = settings.stat().st_mtime_ns
    told = stranger.interrupt("book", lambda: settings.stat().st_mtime_ns > before)  # Python has begun with .venv
    assert "Interrupted. The same command goes on from here." in told
    assert "Traceback" not in told
    assert not (stranger.root / ".venv/.ready").exists()


def a_build_that_is_interrupted_says_so(stranger):
    stale = subprocess.run([sys.executable, "-m", "tools.execute", "--check"], cwd=stranger.root)
    assert stale.returncode == 0, "the last commit has stale notebooks; executing them here would take too long"
    told = stranger.interrupt("book", lambda: (stranger.root / "_build/html/_static").exists())
    assert "Interrupted. The same command goes on from here." in told
    assert "Traceback" not in told


def make_book_builds_the_pages_and_changes_nothing(stranger):
    done = stranger.make("book")
    assert done.returncode == 0, done.stderr
    page = stranger.root / "_build/html/index.html"
    assert done.stdout.splitlines()[-1] == f"The book is built. Open {page}"
    assert "executing" not in done.stderr
    assert "cross-entropy" in read(page)
    assert stranger.run("git", "status", "--porcelain").stdout == ""
    # pip asks for the version of Rust, and rustup, where it is installed, then makes its folder
    left = {path.name for path in stranger.home.iterdir()} - {".cache", ".config", ".local", ".rustup"}
    assert not left, "what programs keep, they keep in the folders for that"


def a_second_one_ends_at_once_also_where_the_folder_moved(stranger):
    assert "Nothing has changed since the book was built." in stranger.make("book").stdout
    moved = stranger.root.rename(stranger.root.with_name("renamed"))
    try:
        stranger.root, here = moved, stranger.root
        assert f"Open {moved}/_build/html/index.html" in stranger.make("book").stdout
    finally:
        stranger.root = moved.rename(here)


def test_make_book_from_the_first_try_on(stranger):
    """One test, since each step needs the one before."""
    an_install_that_is_interrupted_says_so(stranger)
    a_build_that_is_interrupted_says_so(stranger)
    make_book_builds_the_pages_and_changes_nothing(stranger)
    a_second_one_ends_at_once_also_where_the_folder_moved(stranger)


def test_make_help_lists_every_target(stranger):
    told = stranger.make("help").stdout
    assert all(f"make {target} " in told for target in ("book", "test", "live", "gpu", "fresh", "pdf"))


# ---------------------------------------------------------------- pip install, and the three lines


@pytest.fixture(scope="module")
def user(stranger, tmp_path_factory):
    """Somebody who installed the package and has no clone; runs commands as README writes them."""
    folder = tmp_path_factory.mktemp("user")
    python = see_packages(folder / "environment")
    command = [python, "-m", "pip", "install", "--quiet", f"{stranger.root}[data]"]
    done = subprocess.run(command, env=environment(folder, PIP_NO_BUILD_ISOLATION="0"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(*words):
        return subprocess.run([python, *words], cwd=folder, env=environment(folder), capture_output=True, text=True)

    return run


def test_the_lines_of_readme_run_without_a_clone(user, tmp_path):
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    done = user("-m", "doctest", tmp_path / "README.md")
    assert done.returncode == 0, done.stdout


def test_public_data_without_network_and_without_files(user):
    told = user("-m", "lossbook.data", "list")
    assert told.returncode == 0
    assert "banking77" in told.stdout
    assert "LOSSBOOK_DATA: not set" in told.stdout
    assert "SHA-256" in user("-m", "lossbook.data", "list", "banking77").stdout
    for command in (("fetch", "banking77"), ("verify",)):
        done = user("-m", "lossbook.data", *command)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    sentence = user("-c", "from lossbook.data import banking77; banking77()").stderr.splitlines()[-1]
    assert "LOSSBOOK_DATA" in sentence


# ---------------------------------------------------------------- what may be missing, each in one sentence


def main_of_install(before, **options):
    """Run tools/install.py after some lines that take something away."""
    code = f"import sys\n{before}\nfrom tools import install\ninstall.main()"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def sentence(done):
    """The one line that a failed command leaves on stderr."""
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    return line


def test_an_old_python():
    told = sentence(main_of_install("sys.version_info = (3, 10, 4); sys.version = '3.10.4 (main)'"))
    assert told == "lossbook needs Python 3.11 or newer, this is 3.10.4. Use: make PYTHON=python3.12"


def test_no_python(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "PYTHON=python9", "book"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[0] == (
        "There is no python9 here. Install Python 3.11 or newer, or name one that you have: make PYTHON=python3.12"
    )


@pytest.fixture
def clone(tmp_path):
    """What an installation needs, and nothing to install."""
    (tmp_path / "requirements.lock").touch()
    return tmp_path


def test_a_python_without_venv(clone, monkeypatch):
    monkeypatch.setitem(sys.modules, "venv", None)
    told = install.install(clone)
    assert (
        told == "Python could not make .venv: a part of venv is missing. On Debian and Ubuntu: apt install python3-venv"
    )


def test_a_python_whose_venv_has_no_pip(clone, monkeypatch):
    def fails(*_, **options):
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(venv, "create", fails)
    assert "apt install python3-venv" in install.install(clone)


def test_a_full_disk(clone, monkeypatch):
    def fails(*_, **options):
        raise subprocess.CalledProcessError(1, "ensurepip")  # which does not say why

    monkeypatch.setattr(venv, "create", fails)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    assert install.install(clone) == f"Python could not make .venv: {install.FULL}"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", install.FULL),
        ("WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by ...", "Is the network on?"),
        ("ERROR: ResolutionImpossible", "its reason stands above."),
    ],
)
def test_what_pip_says_becomes_a_sentence(clone, monkeypatch, capsys, told, reason):
    """A program that speaks like pip."""
    (clone / "speaks/pip").mkdir(parents=True)
    (clone / "speaks/pip/__init__.py").touch()
    (clone / "speaks/pip/__main__.py").write_text(f"import sys\nprint({told!r}, file=sys.stderr)\nsys.exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(clone / "speaks"))
    found = install.install(clone)
    assert found.startswith("pip could not install everything that requirements.lock names")
    assert reason in found
    assert (told in capsys.readouterr().err) == ("above" in reason), "what is understood is not repeated"


def test_no_network(clone, monkeypatch):
    """The real pip, and an index that does not answer."""
    (clone / "requirements.lock").write_text("no-such-package-of-lossbook==1.0\n")
    for name, value in {"PIP_INDEX_URL": NOWHERE, "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    assert "the package index cannot be reached. Is the network on?" in install.install(clone)


def test_a_checkout_that_cannot_be_written_to():
    """As somebody else's: a superuser may write everywhere, so the commands run as nobody."""
    superuser = os.getuid() == 0
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") if superuser else sys.executable
    if not python:
        pytest.skip("a superuser may write everywhere, and there is no Python that another user may run")
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to others
    try:
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        folder.chmod(0o555)
        options = {"user": 65534, "group": 65534, "extra_groups": []} if superuser else {}
        for module in ("tools.install", "tools.book"):
            command = [python, "-B", "-m", module]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)
            assert sentence(done) == (
                f"{folder.resolve()} cannot be written to; copy it to a folder of your own and run the command there."
            )
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_no_chromium(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LOSSBOOK_CHROMIUM", raising=False)
    assert pdf.main() == 1
    assert capsys.readouterr().err == (
        "Chromium is missing: apt-get install chromium, or name it in LOSSBOOK_CHROMIUM\n"
    )


@pytest.mark.skipif(not OTHERS, reason="no other Python is installed")
@pytest.mark.parametrize("name", OTHERS, ids=lambda path: Path(path).name)
def test_another_python_takes_over_the_environment(name, clone, monkeypatch):
    """As after an upgrade of Python: the environment of the old one would hold half of each."""
    see_packages(clone / ".venv")
    code = f"import pathlib; from tools import install; install.install(pathlib.Path({str(clone)!r}))"
    subprocess.run([name, "-c", code], cwd=ROOT, env=environment(clone), capture_output=True, text=True)
    found = subprocess.run([clone / ".venv/bin/python", "--version"], capture_output=True, text=True).stdout
    assert found.startswith(f"Python {Path(name).name.removeprefix('python')}.")


# ---------------------------------------------------------------- Binder and pre-commit


def test_binder_installs_the_torch_and_python_that_the_package_asks_for(stranger):
    wanted = yaml.safe_load(read(ROOT / ".binder/environment.yml"))["dependencies"]
    package = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert "python=" + ".".join(map(str, tools.OLDEST)) in wanted
    assert next(line.replace("torch", "pytorch-cpu") for line in package["dependencies"] if "torch" in line) in wanted
    # pip as mybinder.org calls it; the present environment has what it needs
    last = read(ROOT / ".binder/postBuild").splitlines()[-1]
    words = last.removeprefix("exec python").replace('"', "").split()
    command = stranger.command(".venv/bin/python", *words, "--dry-run")
    command["env"]["PIP_NO_BUILD_ISOLATION"] = "0"
    done = subprocess.run(**command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f"Would install lossbook-{lossbook.__version__}" in done.stdout


def test_pre_commit_runs_what_lint_runs():
    (repo,) = yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local", "nothing is fetched"
    assert [hook["entry"] for hook in repo["hooks"]] == ["make lint"]


# ---------------------------------------------------------------- everything downloaded anew


@pytest.mark.fresh
@pytest.mark.parametrize("name", [sys.executable, *OTHERS], ids=lambda path: Path(path).name)
def test_everything_from_the_package_index(name, tmp_path):
    """`pip install .` under each Python that is here; with the lock's own also `make book`."""
    stranger = Stranger(tmp_path)
    shutil.rmtree(stranger.root / ".venv")
    env = {key: value for key, value in environment(stranger.home).items() if "proxy" not in key and "PIP" not in key}
    env |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "http", "HTTP"))}
    env["PIP_CACHE_DIR"] = str(tmp_path / "cache")

    def run(*words, folder=stranger.root):
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    if name == sys.executable:
        assert "The book is built." in run("make", f"PYTHON={name}", "book")
    run(name, "-m", "venv", tmp_path / "user")
    python = tmp_path / "user/bin/python"
    run(python, "-m", "pip", "install", "--quiet", stranger.root)
    run(python, "-m", "doctest", stranger.root / "README.md", folder=tmp_path)

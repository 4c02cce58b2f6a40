"""What the project is called, how old it is and where it is.

``[project.urls]`` of ``pyproject.toml`` is the one place that names the addresses; pages, notebooks, ``README.md`` and
``CITATION.cff`` take them from there. Those two must hold them in full: ``python -m tools.project`` writes them, and
the line on speed, which comes from the notebook of the page "Speed and memory".
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tools.chapters import ROOT, config, read

VERSION = re.compile(r'^__version__ = "(.+?)"$', re.MULTILINE)
SPEED = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- end of speed -->)", re.DOTALL)


def urls(root: Path = ROOT) -> dict[str, str]:
    """The addresses: ``Documentation`` (the book, with a slash at its end), ``Repository`` and more."""
    found: dict[str, str] = tomllib.loads(read(root / "pyproject.toml"))["project"]["urls"]
    return found


def version(root: Path = ROOT) -> str:
    """The version of the package."""
    found = VERSION.search(read(root / "lossbook/__init__.py"))
    assert found is not None
    return found[1]


def ref(root: Path = ROOT) -> str:
    """Where the repository has this version: the tag of a release, else the branch."""
    branch: str = config(root)["repository"]["branch"]
    return branch if "dev" in version(root) else f"v{version(root)}"


def released(root: Path = ROOT) -> str | None:
    """The date that the changelog gives this version, or None."""
    found = re.search(rf"^## {re.escape(version(root))} - (\S+)$", read(root / "CHANGELOG.md"), re.MULTILINE)
    return found[1] if found else None


def citation(root: Path = ROOT) -> str:
    """``CITATION.cff`` with version, date and addresses."""
    date = released(root)
    facts = {
        "version": version(root),
        "date-released": f'"{date}"' if date else "",
        "url": urls(root)["Documentation"],
        "repository-code": urls(root)["Repository"],
    }
    lines = [line for line in read(root / "CITATION.cff").splitlines() if line.partition(":")[0] not in facts]
    return "\n".join([*lines, *(f"{key}: {fact}" for key, fact in facts.items() if fact)]) + "\n"


def readme(root: Path = ROOT) -> str:
    """``README.md`` with addresses and the line on speed.

    The old addresses are those of its links ``[book]`` and ``[repository]``.
    """
    text = read(root / "README.md")
    for name, key in {"book": "Documentation", "repository": "Repository"}.items():
        found = re.search(rf"^\[{name}\]: (\S+)$", text, re.MULTILINE)
        assert found is not None, f"README.md has no line [{name}]: address"
        text = text.replace(found[1], urls(root)[key])
    return SPEED.sub(lambda _: speed(root), text)


def speed(root: Path = ROOT) -> str:
    """What the page "Speed and memory" found, in one sentence."""
    from tools.reader import bound_value

    losses, faster, leaner, name, peer, time, memory = (
        bound_value(f"speed:{key}", root, "README.md")
        for key in ("losses", "faster", "leaner", "best_name", "best_peer", "best_time", "best_memory")
    )
    return (
        f"On one CPU thread, at its largest shape, the package is faster than the plain formula for {faster} of "
        f"{losses} measured losses and needs less memory for {leaner}. At best, `{name}` takes {time} of the time and "
        f"{memory} of the memory of {peer} ([all tables][speed]).\n"
    )


def main(root: Path = ROOT) -> None:
    """Entry point."""
    for name, made in {"README.md": readme, "CITATION.cff": citation}.items():
        path = root / name
        if path.exists() and read(path) != (text := made(root)):
            path.write_text(text, encoding="utf-8")
            print(f"{name} renewed")


if __name__ == "__main__":
    main()

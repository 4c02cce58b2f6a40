"""Who imports whom: losses import nothing of the book, the book's rooms import no loss, neither needs an extra."""

import subprocess
import sys
from pathlib import Path

import pytest

import lossbook

ROOMS = {"advice", "claims", "data", "devices", "exercises", "metrics", "models", "plotting", "records", "touch"}
ROOMS |= {"training"}
MODULES = {path.stem for path in Path(lossbook.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
LOSSES = MODULES - ROOMS

# Modules set to None cannot be imported: as on a machine with torch and numpy only.
IMPORT = """
import sys
sys.modules.update(dict.fromkeys(["sklearn", "matplotlib", "tqdm", "IPython", "scipy", "pandas"]))
import importlib
for name in sys.argv[1:]:
    importlib.import_module("lossbook." + name)
print(*sorted(name.removeprefix("lossbook.") for name in sys.modules if name.startswith("lossbook.")))
"""


@pytest.mark.parametrize(("these", "never"), [(LOSSES, ROOMS), (ROOMS, LOSSES)], ids=["losses", "rooms"])
def test_imports(these, never):
    done = subprocess.run([sys.executable, "-c", IMPORT, *sorted(these)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert these <= imported
    assert not imported & never

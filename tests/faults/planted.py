"""Faults inside a rank: a module of the test's that Python imports at its start and that changes another one then."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

HOOK = """
import importlib.util, os, sys

class AfterImport:
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            change(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, AfterImport())
"""


def plant(folder: Path, code: str, module: str = "") -> dict[str, str]:
    """Environment of a run in which every process runs `code` at its start.

    With `module`: code that defines `change(module)`, called once that module has been imported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hook = HOOK.format(module=module) if module else "import os, sys\n"
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code) + hook if module else hook + textwrap.dedent(code))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

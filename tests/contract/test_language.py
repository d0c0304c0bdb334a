"""What no file of the project may say: code that runs from data, unfinished work, places on someone's machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PRODUCT = sorted((ROOT / "distft").rglob("*.py"))
CODE = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py")), ROOT / "train.py", ROOT / "setup.py"]
FOLDERS = ("conf", "docs", "distft", "tests", "launch", "benchmarks", ".ci")
TEXTS = [
    *(path for path in sorted(ROOT.iterdir()) if path.suffix in {".md", ".py", ".toml", ".txt", ".in"}),
    ROOT / "Makefile",
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*")) if path.is_file()),
]
PROSE = [path for path in TEXTS if path.suffix not in {".pyc", ".png", ".safetensors", ".parquet"}]
LONGEST_FILE = 360  # lines: a file is read in a sitting

RUNS_CODE_FROM_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "eval", "exec"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
# Put together here, so that this file does not say them.
UNFINISHED = [re.compile(pattern) for pattern in (r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bX" + r"XX\b")]
PLACES = [re.compile(pattern) for pattern in (r"(?<![\w.])/wo" + r"rk/", r"/roo" + r"t/", r"/ho" + r"me/(?!me/)\w+/")]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    """Imports and calls through which a data or weight file, or a value in a configuration, could run code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in RUNS_CODE_FROM_DATA)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE_FROM_DATA:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (f"torch.{name.name}" for name in node.names if name.name in ("load", "save"))
        elif isinstance(node, ast.Call):
            called, words = dotted(node.func), {word.arg for word in node.keywords}
            if called in FORBIDDEN_CALLS | SHELLS:
                yield called
            yield from words & {"allow_pickle", "shell"}
            loads = called.startswith("AutoModel") and called.endswith(".from_pretrained")
            if loads and "use_safetensors" not in words:
                yield called  # else a pickle is read where there is no safetensors file


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from keys_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def told(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_no_file_of_data_can_run_code() -> None:
    assert len(PRODUCT) > 40
    found = {str(path.relative_to(ROOT)): list(dangers(told(path))) for path in PRODUCT}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from dill import loads", "dill"),
        ("state = torch.load(path)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("os.system(command)", "os.system"),
        ("subprocess.run(command, shell=True)", "shell"),
        ("AutoModelForCausalLM.from_pretrained(folder)", "AutoModelForCausalLM.from_pretrained"),
        ("value = eval(text)", "eval"),
        ("numpy.load(path, allow_pickle=False)", "allow_pickle"),
    ],
)
def test_dangers_are_seen(source: str, danger: str) -> None:
    assert list(dangers(source)) == [danger]
    assert list(dangers("model.eval(); yaml.safe_load(text); safetensors.torch.load_file(path)")) == []


def test_configuration_names_no_code() -> None:
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert len(files) > 20
    for path in files:
        code = [key for key in keys_of(yaml.safe_load(told(path))) if re.fullmatch(r"_\w+_", key) and key != "_self_"]
        assert code == [], path
    assert list(keys_of(yaml.safe_load("a: [{_target_: os.system}]"))) == ["a", "_target_"]


def test_nothing_is_left_unfinished() -> None:
    for path in CODE:
        text = told(path)
        assert not [found.group() for pattern in UNFINISHED if (found := pattern.search(text))], path
    for path in PRODUCT:
        raised = [node for node in ast.walk(ast.parse(told(path))) if isinstance(node, ast.Raise) and node.exc]
        names = [dotted(node.exc.func if isinstance(node.exc, ast.Call) else node.exc) for node in raised]
        assert "NotImplemented" + "Error" not in names, path
    assert UNFINISHED[0].search("# TO" + "DO: later")


def test_nothing_names_a_place_on_one_machine() -> None:
    assert len(PROSE) > 80
    for path in PROSE:
        found = [match.group() for pattern in PLACES for match in pattern.finditer(told(path))]
        assert not found, (path, found)
    assert PLACES[0].search("cd /wo" + "rk/main")
    assert not PLACES[0].search("docs/wo" + "rk/x")


def test_tests_use_the_real_thing() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        imported = {
            name
            for node in ast.walk(ast.parse(told(path)))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        }
        assert not {name for name in imported if "mock" in name.lower()}, path


def test_modules_read_well() -> None:
    for path in PRODUCT:
        text = told(path)
        assert path.stem not in {"utils", "util", "common", "helpers", "helper", "manager", "misc"}, path
        assert text.count("\n") <= LONGEST_FILE, f"{path}: {text.count(chr(10))} lines"
        if text.strip() and path.name not in {"__init__.py", "__main__.py"}:
            assert "from __future__ import annotations" in text, path

"""The commands of README.md: `bash` blocks after `<!-- run -->` are run as they stand, the others are composed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config.load import compose
from distft.errors import UserMistake

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCK = re.compile(r"^(<!-- run -->\n)?```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")


def runnable(text: str) -> str:
    """One script of all blocks that are to be run, in order."""
    return "\n".join(block for mark, block in BLOCK.findall(text) if mark)


def commands(text: str) -> list[list[str]]:
    """The words of every command in a block that is not run, and of every command that stands in a line of prose."""
    blocks = [block.replace("\\\n", " ") for mark, block in BLOCK.findall(text) if not mark]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [span for span in SPAN.findall(BLOCK.sub("", text)) if " " in span]
    found = [shlex.split(line, comments=True) for line in lines]
    starters = ("make", "python", "deepspeed", "torchrun", "distft")
    return [[word for word in words if word != "…"] for words in found if words and words[0] in starters]


def problem_of(words: list[str]) -> str | None:
    """Why a command would be refused before it did anything; None if it would not."""
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        dry = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        return dry.stderr if dry.returncode else None
    if words[0] == "distft":
        verb, *rest = words[1:]
        if verb not in ("train", "generate", "data", "check", "doctor", "report", "verify"):
            return f"unknown verb {verb}"
        if verb == "check":
            return refusal([word for word in rest if not word.startswith("run=")], "check")
        if verb == "doctor":
            return refusal(rest, verb)
        if verb in ("generate", "report", "verify"):
            return refusal(rest[1:], verb)
        rest = [word for word in rest if not word.startswith("show.")]
        return refusal(rest[1:] if verb == "data" else rest, "train")
    if words[0] == "torchrun" and words[-3:] == ["-m", "distft", "doctor"]:
        return None
    if "train.py" not in words:
        return None if words[0] == "python" else f"{words[0]} starts no train.py"
    return refusal(words[words.index("train.py") + 1 :], "train")


def refusal(argv: list[str], verb: str) -> str | None:
    if any("<" in word for word in argv):  # a place for the reader's own folder
        argv = argv[: next(index for index, word in enumerate(argv) if "<" in word) - 1]
    try:
        compose(argv, verb)
    except UserMistake as mistake:
        return str(mistake)
    return None


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a copy of the project; what it writes under /tmp goes below `folder`."""
    scratch = folder / "distft"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "multirun", "build", "*.egg-info", "tests")
    shutil.copytree(ROOT, scratch, ignore=ignored)
    (scratch / ".venv").symlink_to(sys.prefix)
    own = folder / "tmp"
    own.mkdir()
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("/tmp/", f"{own}/")],
        cwd=scratch,
        env={**os.environ, "PYTHONPATH": str(scratch), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_blocks_that_are_run(tmp_path: Path) -> None:
    script = runnable(README)
    assert "train.py" in script, "README.md has no block to run"
    finished = run(script, tmp_path)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    text = "<!-- run -->\n```bash\nsource .venv/bin/activate\nfalse\ntrue\n```\n```bash\nexit 7\n```\n"
    assert runnable(text) == "source .venv/bin/activate\nfalse\ntrue\n"
    assert run(runnable(text), tmp_path).returncode == 1


def test_every_other_command_composes() -> None:
    found = commands(README)
    assert len(found) > 5
    problems = {" ".join(words): problem for words in found if (problem := problem_of(words))}
    assert problems == {}


@pytest.mark.parametrize(
    "command",
    [
        "make trian",
        "deepspeed train.py optim.lrr=1",
        "torchrun --nproc_per_node 8 train.py strategy=zero9",
        "python train.py optim.lr=1e-3,1e-4",
        "distft trian",
        "distft data show data.pth=x",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    (words,) = commands(f"```bash\n{command}   # a comment\n```\n")
    assert problem_of(words)
    (words,) = commands(f"Say `{command}` to it.")
    assert problem_of(words)

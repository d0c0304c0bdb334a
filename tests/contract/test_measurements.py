"""The benchmarks of distft's own parts run at toy size, and the verdict on growth can be a negative one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One process for all: what costs most is importing torch and its friends.
RUN = """
import runpy, sys
sys.path.insert(0, "benchmarks")
for name, *words in (("scaling",), ("gpu", "--device", "cpu"), ("engines",), ("answers",)):
    sys.argv = [name, "--toy", "--out", f"{sys.argv[-1].rpartition('/')[0]}/{name}.json", *words]
    folder = sys.argv[3]
    try:
        runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
    sys.argv = ["", folder]
"""


def run(code: str, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    finished = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]


def test_they_run_at_toy_size(tmp_path: Path) -> None:
    run(RUN, str(tmp_path / "first"))
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("scaling", "gpu", "engines")}
    assert {case["engine"] for case in records["engines"]["cases"]} == {"bare", "ddp", "zero2", "fsdp"}
    assert [case["tuning"] for case in records["gpu"]["cases"]] == ["full", "lora"]
    grown = {(case["axis"], case["cost"]): case["found"] for case in records["scaling"]["cases"]}
    assert grown["length, documents alike", "operations"] == 1
    assert 1 < grown["length of one document", "operations"] <= 2
    assert grown["documents in a row", "operations"] < 0
    assert grown["vocabulary", "calls"] == 0
    for record in records.values():
        assert record["exceeding"] == [] if "exceeding" in record else record["left_out"] == []
        assert record["versions"]["torch"]
    answers = json.loads((tmp_path / "answers.json").read_text())["rows"]
    assert [row["answer"] for row in answers] == ["unknown key", "broken rule", "help"]
    assert all(row["seconds"] > 0.05 for row in answers), "no Python composes a config sooner"


def test_growth_beyond_its_bound_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from scaling import Costs, exponent, judged  # type: ignore[import-not-found]

    assert exponent((1, 2, 4), [3.0, 12.0, 48.0]) == pytest.approx(2)
    sizes, bounds = (1, 2, 4), {"operations": 1.0, "logits": 0.0}
    assert judged("axis", sizes, bounds, [Costs(n, n, n, 1, n) for n in sizes], True)[1] == []
    first, second = judged("axis", sizes, bounds, [Costs(n * n, n, n, n, n) for n in sizes], True)[1]
    assert "operations grows with an exponent of 2.00, 1 is" in first
    assert "logits grows with an exponent of 1.00, 0 is" in second

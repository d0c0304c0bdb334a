"""Each rule between knobs: what it refuses, and that its neighbour passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from distft.config.check import check, settle
from distft.config.given import all_knobs
from distft.config.ranges import RANGES
from distft.config.schema import Run, Source


def run_with(**knobs: Any) -> Run:
    """A run with these knobs; `__` stands for the dot. The data is the embedded set unless told otherwise."""
    run = Run()
    run.data.format = "python_docs"
    for name, value in knobs.items():
        *path, last = name.split("__")
        section: Any = run
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, last), name
        setattr(section, last, value)
    return run


def test_the_default_has_no_problem() -> None:
    assert check(run_with()) == []


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("model.path", {"model__name": "hf"}),
    ("no such folder", {"model__name": "hf", "model__path": "/nowhere/model"}),
    ("model.path", {"model__path": "/tmp"}),
    ("model.revision", {"model__revision": "main"}),
    ("model.tiny.num_layers", {"model__name": "hf", "model__path": "a/b", "model__tiny__num_layers": 2}),
    ("model.trust_remote_code", {"model__trust_remote_code": True}),
    ("model.tiny.hidden_size", {"model__tiny__hidden_size": 100, "model__tiny__num_heads": 4}),
    ("model.tiny.num_kv_heads", {"model__tiny__num_kv_heads": 3}),
    ("strategy=fsdp or zero2", {"model__compile": True, "strategy__name": "zero3"}),
    ("model.kernels=auto", {"model__compile": True, "model__kernels": "liger"}),
    ("activation.mode=selective", {"model__compile": True, "activation__mode": "selective"}),
    ("Add data=csv", {"data__path": "rows.csv"}),
    ("data.exclude_ids", {"data__exclude_ids": "ids.txt"}),
    ("needs rows", {"data__format": "jsonl"}),
    ("exclude each other", {"data__format": "auto", "data__path": "a/b", "data__sources": [Source(path="c/d")]}),
    ("data.subset", {"data__format": "csv", "data__path": __file__, "data__subset": "x"}),
    ("data.split", {"data__format": "csv", "data__path": __file__, "data__split": "test"}),
    ("data.eval_split", {"data__eval_split": "validation"}),
    ("weight for all", {"data__sources": [Source(path="a/b", weight=1), Source(path="c/d")]}),
    ("called rows", {"data__sources": [Source(path="a/rows"), Source(path="b/rows")]}),
    ("a positive number", {"data__sources": [Source(path="a/b", weight=-1)]}),
    ("[0].path is missing", {"data__sources": [Source(format="jsonl")]}),
    ("Did you mean jsonl", {"data__sources": [Source(path="a/b", format="jsnl")]}),
    ("no such file", {"data__format": "jsonl", "data__path": "/nowhere/rows.jsonl"}),
    (
        "data.eval_fraction",
        {"data__format": "auto", "data__path": "a/b", "data__eval_path": "c/d", "data__eval_fraction": 0.2},
    ),
    ("data.workers", {"data__workers": "many"}),
    ("data.packing", {"data__packing": "yes"}),
    ("Did you mean truncate", {"data__too_long": "trunacte"}),
    ("tuning.lora_rank", {"tuning__lora_rank": 8}),
    ("tuning.dora", {"tuning__dora": True}),
    ("tuning.target", {"tuning__method": "lora", "tuning__target": [1]}),
    ("data.train_on", {"objective__name": "lm", "data__train_on": "all"}),
    ("strategy.deepspeed", {"strategy__name": "fsdp", "strategy__deepspeed": {"a": 1}}),
    ("strategy.shard_size", {"strategy__shard_size": 2}),
    ("strategy.reshard_after_forward", {"strategy__name": "zero3", "strategy__reshard_after_forward": False}),
    ("number of ranks from 2", {"strategy__name": "fsdp", "strategy__reshard_after_forward": 1}),
    ("strategy.gradient_sync", {"strategy__name": "ddp", "strategy__gradient_sync": "each"}),
    ("strategy.communication", {"strategy__name": "hsdp", "strategy__communication": "bf16"}),
    ("does not divide", {"strategy__name": "hsdp", "strategy__shard_size": 3, "launch__ranks": 4}),
    ("optim.betas", {"optim__name": "sgd", "optim__betas": (0.8, 0.9)}),
    ("optim.betas", {"optim__betas": (0.9,)}),
    ("optim.betas", {"optim__betas": (0.9, 1.0)}),
    ("optim.lr", {"optim__lr": float("nan")}),
    ("schedule.decay", {"schedule__decay": 0.3}),
    ("schedule.final", {"schedule__name": "constant", "schedule__final": 0.1}),
    ("more than 1", {"schedule__name": "wsd", "schedule__warmup": 0.6, "schedule__decay": 0.5}),
    ("schedule.warmup", {"schedule__warmup": 1.5}),
    ("as long as the run", {"schedule__warmup": 10, "max_steps": 10}),
    ("batch.micro_size", {"batch__micro_size": 16}),
    ("early_stopping.patience", {"early_stopping__patience": 2}),
    ("no rows to evaluate", {"data__eval_fraction": 0, "eval__every": 5}),
    ("checkpoint.best", {"checkpoint__best": "loss"}),
    ("checkpoint.mode", {"checkpoint__mode": "max"}),
    ("eval.max_new_tokens", {"eval__samples": 0, "eval__max_new_tokens": 5}),
    ("epochs", {"epochs": 2, "max_steps": 5}),
    ("log.tags", {"log__tracker": "none", "log__tags": ["a"]}),
    ("Did you mean optim.lr", {"resume_allow": ["optim.lrr"]}),
    ("resume_allow", {"resume": "never", "resume_allow": ["optim.lr"]}),
    ("no such run folder", {"resume": "/nowhere/run"}),
    ("run.name", {"run__name": "a/b"}),
    ("launch.ranks", {"launch__ranks": "all"}),
    ("Did you mean torchrun", {"launch__engine": "torchrunn"}),
    ("Did you mean bf16", {"precision": "bf-16"}),
]


@pytest.mark.parametrize(("words", "knobs"), REFUSED, ids=[f"{index}-{case[0]}" for index, case in enumerate(REFUSED)])
def test_refused(words: str, knobs: dict[str, Any]) -> None:
    found = check(run_with(**knobs))
    assert len(found) == 1, found
    assert words in found[0]


TAKEN: list[dict[str, Any]] = [
    {"model__compile": True, "strategy__name": "fsdp", "activation__mode": "full", "activation__budget": 8.0},
    {"model__name": "hf", "model__path": "owner/name", "model__revision": "main"},
    {"data__format": "csv", "data__path": __file__, "data__eval_path": __file__, "data__eval_fraction": 0},
    {"data__sources": [Source(path="a/b", weight=1), Source(path="c/d", weight=2)]},
    {"data__sources": [Source(format="python_docs", name="docs"), Source(path="a/b")]},
    {"data__packing": False},
    {"data__workers": 4},
    {"tuning__method": "lora", "tuning__lora_rank": 8, "tuning__target": ["q_proj"], "tuning__dora": True},
    {"strategy__name": "hsdp", "strategy__shard_size": 2, "launch__ranks": 4},
    {"strategy__name": "fsdp", "strategy__reshard_after_forward": 2, "strategy__gradient_sync": "each"},
    {"strategy__communication": "bf16"},
    {"optim__name": "sgd", "optim__lr": 0},
    {"schedule__name": "wsd", "schedule__decay": 0.3},
    {"schedule__warmup": 10, "max_steps": 100},
    {"early_stopping__patience": 2, "eval__every": 5},
    {"checkpoint__best": "eval/other", "checkpoint__mode": "max"},
    {"data__eval_fraction": 0},
    {"max_steps": 5},
    {"log__tags": ["a"]},
    {"resume_allow": ["optim.lr", "data"]},
    {"run__name": "first-run_2"},
    {"launch__ranks": 8, "launch__engine": "torchrun"},
]


@pytest.mark.parametrize("knobs", TAKEN)
def test_taken(knobs: dict[str, Any]) -> None:
    assert check(run_with(**knobs)) == []


def test_all_problems_at_once() -> None:
    found = check(run_with(batch__global_size=0, optim__lr=-1, strategy__name="zero9", epochs=0, seed=-1))
    assert len(found) >= 5


@pytest.mark.parametrize("name", RANGES)
def test_every_range_refuses_a_negative_number_and_names_its_knob(name: str) -> None:
    found = check(run_with(**{name.replace(".", "__"): -1}))
    assert any(problem.startswith(f"{name}=-1: ") for problem in found), found


def test_every_number_of_the_schema_has_a_range() -> None:
    numbers = {name for name, knob in all_knobs().items() if isinstance(knob.default, int | float)}
    numbers -= {name for name in numbers if isinstance(all_knobs()[name].default, bool)}
    assert numbers - set(RANGES) == set()


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    [found] = check(run_with(data__format="jsonl", data__path=str(tmp_path / "trian.jsonl")))
    assert f"Did you mean {tmp_path / 'train.jsonl'}?" in found
    assert check(run_with(data__format="jsonl", data__path=str(tmp_path / "*.jsonl"))) == []


def test_settle_leaves_no_auto_that_the_config_decides() -> None:
    assert settle(run_with()).data.too_long == "truncate"
    assert settle(run_with(objective__name="lm")).data.too_long == "split"
    assert settle(run_with(objective__name="lm", data__too_long="drop")).data.too_long == "drop"


def test_settle_makes_local_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    run = settle(run_with(data__format="jsonl", data__path="rows.jsonl", model__path="owner/name"))
    assert run.data.path == str(tmp_path / "rows.jsonl")
    assert run.model.path == "owner/name", "a hub id is no path"
    run = settle(run_with(data__sources=[Source(path="rows.jsonl"), Source(path="*.jsonl")]))
    assert [source.path for source in run.data.sources] == [str(tmp_path / "rows.jsonl"), str(tmp_path / "*.jsonl")]


def test_settle_changes_nothing_else() -> None:
    run = run_with()
    again = dataclasses.replace(settle(run), data=dataclasses.replace(settle(run).data, too_long="auto"))
    assert again == run

"""What may change between two halves of a run: told, refused, or allowed by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from distft.checkpoint.resume import compare, fresh_state, identity_of
from distft.checkpoint.state import TrainState
from distft.config.given import all_knobs
from distft.config.resuming import classes_of, compared
from distft.config.schema import Run, Source
from distft.errors import UserMistake
from distft.prepared import Prepared


def state(identity: dict[str, Any] | None = None, **knobs: Any) -> TrainState:
    """Of a default run with some knobs set (`optim__lr=1`)."""
    run = Run()
    for name, value in knobs.items():
        section, _, knob = name.rpartition("__")
        setattr(getattr(run, section) if section else run, knob, value)
    hashes = {"data": "d", "tokenizer": "t", "model": "m"}
    return TrainState(config=json.loads(json.dumps(compared(run))), identity={**hashes, **(identity or {})})


def test_every_knob_is_in_one_class() -> None:
    undecided = {name: found for name in all_knobs() if len(found := classes_of(name)) != 1}
    assert undecided == {}, "say in config/resuming.py what becomes of it where a run goes on"


def test_a_knob_that_nobody_has_decided_about_would_be_seen() -> None:
    """Negative control."""
    assert classes_of("optim.momentum") == []
    assert classes_of("seedling") == []
    assert classes_of("tuning.target") == ["harmful"]


def test_nothing_changed_says_nothing() -> None:
    assert compare(state(), state(), []) == []


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"optim__lr": 1e-5}, "optim.lr was 0.0002, is 1e-05"),
        ({"max_steps": 7}, "max_steps was null, is 7"),
        ({"batch__micro_size": 4}, "batch.micro_size was 1, is 4"),
        ({"data__packing": False}, "data.packing was auto, is false"),
        ({"data__path": "moved.jsonl"}, "data.path was null, is moved.jsonl"),
        ({"optim__betas": (0.9, 0.95)}, "optim.betas was [0.9, 0.999], is [0.9, 0.95]"),
    ],
)
def test_a_harmless_change_is_listed(knobs: dict[str, Any], told: str) -> None:
    assert compare(state(), state(**knobs), []) == [told]


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("seed", state(seed=5)),
        ("batch.global_size", state(batch__global_size=2)),
        ("data.sequence_length", state(data__sequence_length=64)),
        ("tuning.lora_alpha", state(tuning__lora_alpha=64)),
        ("tuning.method", state(tuning__method="lora")),
        ("objective.name", state(objective__name="lm")),
        ("data", state({"data": "x"})),
        ("tokenizer", state({"tokenizer": "x"})),
        ("model", state({"model": "x"})),
    ],
)
def test_a_harmful_change_is_refused_unless_named(name: str, now: TrainState) -> None:
    with pytest.raises(UserMistake, match=rf"{name} was .*resume_allow=\[{name}\]") as refused:
        compare(state(), now, ["optim.lr"])
    assert "resume=never" in str(refused.value)
    (told,) = compare(state(), now, [name])
    assert told.startswith(f"{name} was ")
    assert compare(state(), now, [name.partition(".")[0]]) == [told], "a section stands for its knobs"


def test_what_may_be_behind_a_hash_is_told() -> None:
    now = state({"data": "x"}, data__path="other.jsonl", seed=3)
    with pytest.raises(
        UserMistake, match=r"data was d, is x; seed was 0, is 3 \(also changed: data.path was null"
    ) as e:
        compare(state(), now, [])
    assert "resume_allow=[data,seed]" in str(e.value)


def test_knobs_of_another_version_say_nothing() -> None:
    old = state()
    del old.config["seed"]
    old.config["gone.knob"] = 1
    assert compare(old, state(seed=9), []) == []


def test_no_secret_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_TOKEN", "abcdefghijkl")
    run = Run()
    run.data.sources = [Source(path="https://me:secret-word@host/rows?abcdefghijkl")]
    text = json.dumps(compared(run))
    assert "host/rows" in text
    assert "abcdefghijkl" not in text
    assert "secret-word" not in text


def test_what_the_hashes_are_of(tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    model.mkdir()
    tokenizer.mkdir()
    (model / "config.json").write_text('{"rope_theta": 1.0, "_name_or_path": "a", "transformers_version": "5"}')
    (tokenizer / "tokenizer.json").write_text("{}")
    prepared = Prepared(str(model), str(tokenizer), "data", "hash of the data", True, "sdpa", ())
    before = identity_of(prepared)
    assert fresh_state(Run(), prepared, {"base": "x"}).identity == before
    assert before["data"] == "hash of the data"
    (model / "config.json").write_text('{"_name_or_path": "b", "rope_theta": 1.0}')
    assert identity_of(prepared) == before
    (model / "config.json").write_text('{"rope_theta": 2.0}')
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    after = identity_of(dataclasses.replace(prepared, data_hash="another"))
    assert [name for name in before if before[name] != after[name]] == ["data", "tokenizer", "model"]

"""The parts of `distft check`: its words, the run in small, and that its proofs can fail."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, MixtralConfig, Qwen3Config

from distft.checkpoint import layout
from distft.checkpoint.layout import FileRecord, Manifest
from distft.checkpoint.ranges import hash_file
from distft.config.check import check as problems_of
from distft.config.load import compose, write_snapshot
from distft.config.schema import Run, Source
from distft.config.schema.check import Check
from distft.errors import UserMistake
from distft.model.miniature import experts_of, miniature
from distft.objective.trainee import Trainee
from distft.prepared import Prepared
from distft.proofs import invariance, packing, resume, small
from distft.proofs.trial import Trial
from distft.verbs import check as verb
from tests.small_run import SMALL, write_rows

# --- words -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_stands_for_its_words(tmp_path: Path) -> None:
    run = compose([*SMALL, "strategy=fsdp", "tuning=lora", "data=jsonl", f"data.path={tmp_path}"]).run
    write_snapshot(run, tmp_path / "config.yaml")
    for named in (tmp_path, tmp_path / "config.yaml"):
        source, words = verb.overrides_of([f"run={named}", "strategy=ddp", "check.steps=4"])
        assert source == tmp_path
        asked = compose(words, verb="check").run
        assert (asked.strategy.name, asked.tuning.method, asked.model.tiny.hidden_size) == ("ddp", "lora", 32)
        assert asked.check == Check(steps=4)
    assert verb.overrides_of(["strategy=ddp"]) == (None, ["strategy=ddp"])
    for wrong in (["run=nowhere"], [f"run={tmp_path}", f"run={tmp_path}"], [f"run={__file__}"]):
        with pytest.raises(UserMistake, match="run="):
            verb.overrides_of(wrong)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Check(proofs=["packin"]), "Did you mean packing"),
        (Check(proofs=[]), "proves nothing"),
        (Check(full="yes"), "check.full=yes"),
        (Check(steps=1), "check.steps=1"),
        (Check(sequence_length=1), "check.sequence_length=1"),
    ],
)
def test_settings_that_prove_nothing_are_refused(asked: Check, told: str) -> None:
    [problem] = verb.check(asked)
    assert told in problem
    assert verb.check(Check()) == []


# --- the run in small ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=hsdp", "strategy.shard_size=2", "early_stopping.patience=3", "eval.every=5"],
        ["strategy=zero3", "tuning=lora", "schedule=wsd", "schedule.warmup=100", "max_steps=1000"],
        ["strategy=fsdp", "strategy.reshard_after_forward=2", "objective=lm", "log.project=mine", "batch.micro_size=8",
         "batch.global_size=64"],
        ["epochs=3", "optim=sgd", "model.revision=main", "data.too_long=refuse", "data.max_rejected=0", "resume=never"],
    ],
)  # fmt: skip
def test_a_run_in_small_keeps_the_rules(words: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    given = ["model=hf", "model.path=owner/name", "data=jsonl", f"data.path={rows}"]
    run = compose([*given, *words], verb="check").run
    model = small.TrialModel(tmp_path, "a model", 1, is_copy=False)
    sources = [Source(path=str(rows), name="rows", format="jsonl")]
    own = small.in_small(run, run.check, model, sources, tmp_path)
    assert type(own) is Run
    for size, micro in ((2, 1), (1, 1), (1, 4)):
        assert problems_of(small.on_ranks(own, size, micro)) == []
    kept = ("strategy.name", "tuning.method", "optim.name", "objective.name", "seed", "schedule.name")
    for name in kept:
        section, _, field = name.partition(".")
        assert getattr(getattr(own, section), field, own.seed) == getattr(getattr(run, section), field, run.seed)
    assert own.optim.lr == (small.LORA_RATE if run.tuning.method == "lora" else run.optim.lr)


def test_the_shortest_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"question": "x" * n, "answer": "y", "extra": n} for n in range(100, 0, -1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    run = compose(["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}"]).run
    [source] = small.sample_rows(run, tmp_path / "out")
    taken = [json.loads(line) for line in Path(str(source.path)).read_text().splitlines()]
    assert taken == sorted(rows, key=lambda row: row["extra"])[: small.ROWS_TAKEN]


def test_a_copy_keeps_the_words_and_little_else(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=5000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = miniature(config, keep_words=True)
    assert model.get_input_embeddings().num_embeddings == 5000
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 256)
    assert experts_of(config) == experts_of(model.config) == 1
    assert experts_of(MixtralConfig(num_local_experts=4)) == 4
    assert miniature(config).get_input_embeddings().num_embeddings == 64  # type: ignore[union-attr,operator]


def test_dropout_of_a_model_is_found_and_taken_away(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    GPT2Config().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    still = small.divisible(folder, tmp_path / "still")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, still))
    assert {name for _, name in small.indivisible(before)} >= {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    assert small.indivisible(after) == []
    assert before.keys() == after.keys()
    assert (still / "model.safetensors").read_bytes() == b"weights"
    assert small.divisible(still, tmp_path / "again") == still


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Prepared]:
    """A small run after its preflight."""
    from distft.config.check import settle
    from distft.verbs.preflight import preflight

    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", 40)
    words = [*SMALL, "data=jsonl", f"data.path={rows}", f"data.cache_dir={folder / 'cache'}", "data.eval_fraction=0"]
    run = settle(compose(words).run)
    preflight(run, folder)
    return run, Prepared.read(folder)


def test_packed_documents_are_isolated(readied: tuple[Run, Prepared]) -> None:
    outcome = packing.prove(*readied, "fp32")
    assert outcome.passed, outcome
    assert outcome.value == 0
    assert readied[1].packed


def test_naive_packing_fails_its_proof(readied: tuple[Run, Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainee, "boundaries", lambda self, batch: {})
    outcome = packing.prove(*readied, "fp32")
    assert not outcome.passed
    assert (outcome.value or 0) > 1000
    assert "FAIL" in outcome.line()


# --- invariance ------------------------------------------------------------------------------------------------------

RECORDS = [
    {"step": step, "loss": 6.0 / step, "grad_norm": 0.5 * step, "tokens": 100, "supervised_tokens": 40}
    for step in (1, 2, 3)
]


@pytest.mark.parametrize(
    ("step", "name", "factor", "difference"),
    [
        (0, "loss", 1 + 3e-6, 3e-6),
        (2, "grad_norm", 1.5, 0.5),
        (1, "tokens", 2, float("inf")),
        (1, "grad_norm", float("nan"), float("inf")),
    ],
)
def test_what_is_apart(step: int, name: str, factor: float, difference: float) -> None:
    other = copy.deepcopy(RECORDS)
    other[step][name] *= factor
    value, where = invariance.apart(RECORDS, other)
    assert value == pytest.approx(difference, rel=1e-3)
    assert name in where
    assert f"step {step + 1}" in where
    assert invariance.apart(RECORDS, RECORDS)[0] == 0
    assert invariance.apart(RECORDS, RECORDS[:2])[0] == invariance.apart([], [])[0] == float("inf")
    assert invariance.apart(RECORDS, [{**record, "loss": "NaN"} for record in RECORDS])[0] == float("inf")


@pytest.mark.parametrize(
    ("precision", "step", "factor", "passed", "told"),
    [
        ("fp32", 2, 1 + 3e-6, True, "3.0e-06 apart in 3 steps (bound 1e-05). pass"),
        ("fp32", 2, 1 + 3e-5, False, "3.0e-05 apart (2x2x2: grad_norm of step 3: 1.5 and 1.50005) (bound 1e-05). FAIL"),
        ("bf16", 0, 1 + 1e-4, True, "1.0e-04 apart in the first step (bound 0.001). pass"),
        ("bf16", 0, 1 + 4e-3, False, "4.0e-03 apart (2x2x2: grad_norm of step 1: 0.5 and 0.502) (bound 0.001). FAIL"),
        ("bf16", 2, 1 + 3e-2, True, "3.0e-02 apart in the steps behind it (bound 0.1). pass"),
        ("bf16", 2, 1.3, False, "3.0e-01 apart (2x2x2: grad_norm of step 3: 1.5 and 1.95) (bound 0.1). FAIL"),
        ("bf16", 1, float("nan"), False, "FAIL"),
    ],
)
def test_bf16_is_held_to_more_before_the_first_update(
    tmp_path: Path, precision: str, step: int, factor: float, passed: bool, told: str
) -> None:
    """A mean of means is 4e-3 away in the first step, and rounding alone 3e-2 after a few updates (tiny models)."""
    other = copy.deepcopy(RECORDS)
    other[step]["grad_norm"] *= factor
    run = compose([*SMALL, "launch.ranks=2", "batch.micro_size=2", "batch.global_size=8"]).run
    trials = []
    for name, records in (("one", RECORDS), ("other", other)):
        trials.append(Trial(tmp_path / name, run))
        (tmp_path / name).mkdir()
        lines = [json.dumps({**record, "split": "train"}) for record in records]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    outcome = invariance.prove(trials, {"one": "", "other": ""}, precision)
    assert outcome.passed == passed
    assert outcome.line().endswith(told)


# --- resume ----------------------------------------------------------------------------------------------------------


def write_checkpoint(run_dir: Path, tensors: dict[str, torch.Tensor], cursor: dict[str, Any]) -> Path:
    folder = layout.step_folder(run_dir, 4)
    folder.mkdir(parents=True)
    path = folder / layout.rank_file(0)
    save_file(tensors, path)
    record = {path.name: FileRecord(path.stat().st_size, hash_file(path))}
    manifest = Manifest(4, "ddp", 1, ["param"], {}, record, {"step": 4, "num_updates": 4, "cursor": cursor})
    (folder / layout.MANIFEST).write_text(manifest.text())
    return folder


def test_every_bit_of_two_checkpoints_is_compared(tmp_path: Path) -> None:
    tensors = {"param/a": torch.randn(30), "exp_avg/a": torch.zeros(30)}
    one = write_checkpoint(tmp_path / "one", tensors, {"epoch": 0})
    assert resume.differing_values(one, write_checkpoint(tmp_path / "same", tensors, {"epoch": 0})) == (0, 60)
    assert resume.differing_values(one, write_checkpoint(tmp_path / "cursor", tensors, {"epoch": 1})) == (1, 60)
    minus = {**tensors, "exp_avg/a": torch.cat([torch.zeros(29), -torch.zeros(1)])}
    assert resume.differing_values(one, write_checkpoint(tmp_path / "sign", minus, {"epoch": 0})) == (1, 60)
    less = {"param/a": tensors["param/a"]}
    assert resume.differing_values(one, write_checkpoint(tmp_path / "less", less, {"epoch": 0})) == (30, 60)

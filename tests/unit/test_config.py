"""Composition, refusals in our own words, what foreign files may not do, snapshots and hashes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from distft.config.load import compose, computed, conf_dir, config_hash, read_snapshot, whole_hash, write_snapshot
from distft.config.other_words import BY_KNOB, HERE
from distft.config.schema import Run
from distft.config.words import knobs, nearest, sections
from distft.errors import Mistakes, UserMistake


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserMistake) as caught:
        compose(list(argv))
    error = caught.value
    return error.problems if isinstance(error, Mistakes) else [str(error)]


def test_the_embedded_default_is_the_schema_and_the_groups() -> None:
    run = compose([]).run
    assert isinstance(run, Run)
    assert (run.model.name, run.data.format, run.strategy.name, run.log.tracker) == (
        "tiny",
        "python_docs",
        "zero2",
        "wandb",
    )
    assert run.optim.betas == (0.9, 0.999)
    assert isinstance(run.optim.betas, tuple)


def test_the_shipped_defaults_are_those_of_the_design() -> None:
    tiny = compose([]).run
    assert (tiny.optim.lr, tiny.batch.global_size) == (3e-3, 2)
    run = compose(["model=hf", "model.path=somewhere"]).run
    expected = {
        "data.sequence_length": 1024,
        "tuning.lora_rank": 16,
        "tuning.lora_alpha": 32,
        "batch.global_size": 8,
        "optim.lr": 2e-4,
        "optim.clip": 1.0,
        "schedule.warmup": 0.03,
        "guard.stall_seconds": 600,
        "epochs": 1,
        "max_steps": None,
        "checkpoint.keep": 2,
    }
    for name, value in expected.items():
        found = run
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name


def test_overrides_reach_the_typed_run() -> None:
    run = compose(["optim.lr=1e-3", "optim.betas=[0.9,0.95]", "strategy=fsdp", "data.packing=false", "+seed=3"]).run
    assert (run.optim.lr, run.optim.betas, run.strategy.name, run.data.packing, run.seed) == (
        1e-3,
        (0.9, 0.95),
        "fsdp",
        False,
        3,
    )


def test_mappings_of_the_users_own_keys_need_no_plus() -> None:
    run = compose(
        [
            "data.columns.user='{{ question }} in {{ place }}'",
            "data.columns={assistant: '{{ answer }}'}",
            "strategy.deepspeed.zero_optimization.reduce_bucket_size=5",
        ]
    ).run
    assert run.data.columns == {"user": "{{ question }} in {{ place }}", "assistant": "{{ answer }}"}
    assert run.strategy.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}


def test_sources_are_typed() -> None:
    run = compose(["data.sources=[{path: a.jsonl, weight: 3}, {path: b.csv, weight: 1, name: other}]"]).run
    assert [(source.path, source.weight, source.name) for source in run.data.sources] == [
        ("a.jsonl", 3.0, None),
        ("b.csv", 1.0, "other"),
    ]


def test_unknown_keys_come_together_with_the_nearest_name() -> None:
    found = problems("optim.lrr=1", "modle=hf", "data.sources=[{path: a, wieght: 2}]", "log.evry=3")
    assert len(found) == 4
    text = "\n".join(found)
    for word in ("optim.lr?", "model?", "data.sources[].weight?", "log.every?"):
        assert f"Did you mean {word}" in text
    assert "+" not in text, "Hydra's advice to add unknown keys"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learning_rate=1e-4"], "Unknown key learning_rate. Did you mean optim.lr?"),
        (["bf16=true"], "Unknown key bf16. Did you mean precision?"),
        (["tuning=lora", "tuning.r=8"], "Unknown key tuning.r. Did you mean tuning.lora_rank?"),
        (["lora_alpha=8"], "Unknown key lora_alpha. Did you mean tuning.lora_alpha?"),
        (["output_dir"], "`output_dir` is not key=value. Did you mean run.dir=…?"),
        (["--learning-rate", "1e-4"], "--learning-rate. Knobs have no dashes: write optim.lr=…"),
        (["--lr=1e-4"], "--lr=1e-4. Knobs have no dashes: write optim.lr=…"),
        (["--confg-name=config"], "--confg-name=config. Did you mean --config-name?"),
        (["model=meta/llama"], "One of your own: model=hf model.path=meta/llama. Choices: hf, tiny."),
        (["data=rows.csv"], "One of your own: data=csv data.path=rows.csv. Choices:"),
        (["data=tatsu-lab/alpaca"], "One of your own: data=hub data.path=tatsu-lab/alpaca. Choices:"),
    ],
)
def test_words_of_other_trainers_are_understood(words: list[str], told: str) -> None:
    found = problems(*words)
    assert len(found) == 1
    assert told in found[0]


def test_what_other_trainers_words_mean_is_there() -> None:
    names = {knob.name for knob in knobs(Run)}
    assert set(BY_KNOB) <= names | {*sections(Run)}
    assert len(HERE) == sum(len(words.split()) for words in BY_KNOB.values()), "no word means two things"
    ends = {name.rpartition(".")[2] for name in names}
    assert ends.isdisjoint(HERE), "words that distft has itself need no entry"


@pytest.mark.parametrize("word", ["+optim.lrr=1", "++optim.lrr=1", "optim.lrr=1"])
def test_no_plus_adds_a_knob(word: str) -> None:
    assert problems(word) == ["Unknown key optim.lrr. Did you mean optim.lr?"]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("optim.lr=fast", "a number"),
        ("seed=1.5", "a whole number"),
        ("launch.dry_run=maybe", "true or false"),
        ("max_steps=ten", "a whole number or null"),
        ("log.tags=a", "a list"),
        ("data.columns=3", "a mapping"),
        ("data.sources=a.jsonl", "a list of sources"),
    ],
)
def test_a_wrong_type_names_knob_value_and_the_type_wanted(word: str, wanted: str) -> None:
    [found] = problems(word)
    name, _, value = word.partition("=")
    assert found.startswith(f"{name}={value}: ")
    assert wanted in found


def test_wrong_types_and_unknown_keys_and_choices_come_together() -> None:
    found = problems("strategy=zero4", "optim.lrr=1", "optim.eps=x")
    assert len(found) == 3
    assert "strategy=zero3?" in found[0]
    assert "Choices: ddp, fsdp, hsdp, zero1, zero2, zero3, zero3_offload." in found[0]


def test_a_section_is_not_a_value() -> None:
    assert problems("batch=3") == [
        "batch=3: batch is a section. Set one of batch.global_size, batch.micro_size, batch.pass_tokens."
    ]


def test_several_values_need_the_sweep_flag() -> None:
    [found] = problems("optim.lr=1e-3,1e-4")
    assert "-m" in found
    assert "[1e-3,1e-4]" in found
    composed = compose(["-m", "optim.lr=1e-3,1e-4"])
    assert composed.run.optim.lr == 1e-3
    assert composed.sweep_dir is not None
    assert composed.sweep_dir.startswith("multirun/")


def test_every_value_of_a_sweep_is_checked_before_its_first_job() -> None:
    assert problems("-m", "optim.lr=1e-3,abc") == ["optim.lr=abc: a number is wanted."]
    [found] = problems("-m", "strategy=zero2,zero22")
    assert "strategy=zero22: no such choice." in found


@pytest.mark.parametrize("word", ["optim.lr", "eval.evry", "data.columns={a", "~optim"])
def test_what_is_no_override_is_told(word: str) -> None:
    assert len(problems(word)) == 1


def test_unknown_flags_and_those_that_run_code_are_refused() -> None:
    assert "--config-dir" in problems("--confg-dir=x")[0]
    assert "pickle" in problems("--experimental-rerun=x.pickle")[0]
    assert "--config-dir" in problems("--config-path=/tmp")[0]
    assert "_target_" in problems("strategy.deepspeed={_target_: os.system}")[0]
    assert "--config-dir" in problems("hydra.searchpath=[/tmp]")[0]
    assert "use run.dir" in problems("hydra.run.dir=/tmp")[0]


FOREIGN = {
    "a hydra key": "hydra:\n  callbacks:\n    x:\n      _target_: os.system\n",
    "a target at any depth": "data:\n  columns:\n    user:\n      _target_: os.system\n",
    "a key that hides behind an escape": 'data:\n  columns:\n    "\\x5ftarget_": os.system\n',
    "a package header": "# @package hydra.callbacks\nx:\n  y: 1\n",
    "a defaults entry": "defaults:\n  - override hydra/launcher: basic\n",
    "a defaults entry placed below hydra": "defaults:\n  - other@hydra.callbacks: x\n",
    "a merge key": "x: &a\n  hydra: {run: {dir: /tmp}}\n<<: *a\n",
    "a way out of the folder": "defaults:\n  - /train\n  - ../elsewhere/bad\n  - _self_\n",
    "an absolute way out": "defaults:\n  - /train\n  - //tmp/elsewhere/bad\n  - _self_\n",
    "a value that would stop a typed reader": "when: 2020-99-99\nhydra: {run: {dir: /tmp}}\n",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_cannot_bring_code(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    [found, *_] = problems(f"--config-dir={tmp_path}")
    assert str(tmp_path / "mine.yaml") in found


def test_a_foreign_folder_cannot_be_a_group_of_hydra(tmp_path: Path) -> None:
    (tmp_path / "hydra" / "callbacks").mkdir(parents=True)
    (tmp_path / "hydra" / "callbacks" / "mine.yaml").write_text("a: 1\n")
    assert "group `hydra`" in problems(f"--config-dir={tmp_path}")[0]


def test_links_are_followed(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    (other / "bad.yaml").write_text("hydra: {run: {dir: /tmp}}\n")
    (mine / "experiment").symlink_to(other)
    (mine / "loop").symlink_to(mine)
    [found] = problems(f"--config-dir={mine}")
    assert "bad.yaml has a `hydra` key" in found


def test_what_slips_past_the_reading_is_seen_in_the_composition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line of defence, with the first one taken away."""
    (tmp_path / "mine.yaml").write_text("defaults:\n  - /train\n  - _self_\nhydra:\n  job:\n    env_set: {A: b}\n")
    monkeypatch.setattr("distft.config.load.refuse_code", lambda folder: None)
    assert "hydra.job" in problems(f"--config-dir={tmp_path}", "--config-name=mine")[0]
    (tmp_path / "mine.yaml").write_text("defaults:\n  - /train\n  - _self_\nseed: 3\n")
    assert compose([f"--config-dir={tmp_path}", "--config-name=mine", "++hydra.job.env_set.A=b"]).run.seed == 3
    assert "--config-dir" in problems(f"--config-dir={tmp_path}", "--config-name=../mine")[0]


def test_a_harmless_foreign_folder_is_taken(tmp_path: Path) -> None:
    """The negative control of the refusals above."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /tuning: lora\noptim:\n  lr: 0.5\n"
    )
    run = compose([f"--config-dir={tmp_path}", "experiment=mine"]).run
    assert (run.tuning.method, run.optim.lr) == ("lora", 0.5)


def test_unknown_keys_in_files_are_told_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lrr: 0.5\nlgo: {}\n")
    found = problems(f"--config-dir={tmp_path}", "experiment=mine", "seed=x")
    assert len(found) == 3
    assert "Unknown key optim.lrr. Did you mean optim.lr?" in found


def test_a_missing_primary_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("defaults: [schema]\n")
    assert "Did you mean config?" in problems(f"--config-dir={tmp_path}", "--config-name=confg")[0]
    assert "no such folder" in problems(f"--config-dir={tmp_path / 'nothing'}")[0]


def snapshot(folder: Path, *argv: str) -> Run:
    run = compose(list(argv)).run
    write_snapshot(run, folder / "config.yaml")
    return run


def test_a_snapshot_repeats_the_run(tmp_path: Path) -> None:
    run = snapshot(tmp_path, "optim=sgd", "optim.lr=0.3", "data.columns.user='{{ a }}'", "run.dir=/somewhere/else")
    again = compose([f"--config-dir={tmp_path}", "--config-name=config"]).run
    assert again.run.dir is None, "a repeated run gets a folder of its own"
    expected = dataclasses.replace(run, run=dataclasses.replace(run.run, dir=None))
    assert again == expected
    assert read_snapshot(tmp_path / "config.yaml") == expected


def test_a_snapshot_takes_further_words(tmp_path: Path) -> None:
    snapshot(tmp_path, "tuning=lora", "tuning.lora_rank=4", "optim.lr=0.3", "strategy.deepspeed.x=1")
    words = [f"--config-dir={tmp_path}", "--config-name=config"]
    again = compose([*words, "optim.lr=0.2", "strategy=fsdp"]).run
    assert (again.optim.lr, again.strategy.name, again.tuning.lora_rank) == (0.2, "fsdp", 4)
    assert again.strategy.deepspeed == {}, "a group that is chosen anew starts from its defaults"
    assert compose([*words, "tuning=full"]).run.tuning.lora_rank == Run().tuning.lora_rank
    assert compose([*words, "optim.lr=0.2"]).run.strategy.deepspeed == {"x": 1}


def test_a_wrong_snapshot_is_told(tmp_path: Path) -> None:
    snapshot(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("  lr: ", "  lrr: "))
    with pytest.raises(UserMistake, match=r"Unknown key optim\.lrr"):
        read_snapshot(path)
    with pytest.raises(UserMistake, match="no snapshot"):
        read_snapshot(tmp_path / "nothing.yaml")


def test_the_hash_is_over_what_is_computed() -> None:
    run = compose([]).run
    other_log = dataclasses.replace(run, log=dataclasses.replace(run.log, tracker="none"))
    other_rate = dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=1.0))
    assert config_hash(run) == config_hash(other_log)
    assert config_hash(run) != config_hash(other_rate)
    assert whole_hash(run) != whole_hash(other_log)
    assert "log.tracker" not in computed(run)
    assert computed(run)["optim.lr"] == run.optim.lr


def test_knobs_have_a_text_each() -> None:
    documented = [knob for knob in knobs(Run, docs=True) if not knob.name.startswith("model.tiny.")]
    assert [knob.name for knob in documented if not knob.doc] == []
    assert len(documented) > 60


def test_nearest() -> None:
    assert nearest("fdsp", ["ddp", "fsdp", "zero1"]) == "fsdp"
    assert nearest("lr", ["optim.lr", "optim.eps"]) == "optim.lr"
    assert nearest("quite-another", ["ddp", "fsdp"]) is None


def test_conf_is_found() -> None:
    assert (conf_dir() / "train.yaml").is_file()

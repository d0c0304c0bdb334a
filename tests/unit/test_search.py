"""A search: what overrides mean to a sampler, what a seed decides, what an interrupted study does when it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from distft.config.check import check
from distft.config.load import compose, knobs_of
from distft.config.schema import Run
from distft.config.schema.sweep import Sweep
from distft.errors import Mistakes, UserMistake
from distft.launch import prune
from distft.launch.jobs import compose_sweep
from distft.sweep import rules
from distft.sweep.lease import leases
from distft.sweep.side_by_side import Job
from distft.sweep.space import Choice, Dimension, Real, Whole, size, split
from distft.sweep.study import Search, held
from distft.sweep.sweeper import base_of, in_a_row
from distft.sweep.watch import Reader, Watch


def space(*words: str) -> list[Dimension]:
    return split(OverridesParser.create().parse_overrides(list(words)), knobs_of("train"))[0]


@pytest.mark.parametrize(
    ("word", "dimension"),
    [
        ("optim.lr=tag(log, interval(1e-5, 1e-3))", Real("optim.lr", 1e-5, 1e-3, log=True)),
        ("schedule.final=interval(0, 1)", Real("schedule.final", 0.0, 1.0)),  # not the whole numbers 0 and 1
        ("tuning.lora_rank=interval(4, 64)", Whole("tuning.lora_rank", 4, 64)),
        ("tuning.lora_rank=tag(log, interval(4, 64))", Whole("tuning.lora_rank", 4, 64, log=True)),
        ("launch.ranks=int(interval(1, 4))", Whole("launch.ranks", 1, 4)),
        ("max_steps=range(10, 40, 10)", Whole("max_steps", 10, 30, 10)),  # Hydra's range leaves its end out
        ("seed=shuffle(range(1, 2))", Choice("seed", ("1",))),
        ("schedule.final=range(0.25, 0.6, 0.25)", Choice("schedule.final", ("0.25", "0.5"))),
        ("optim.lr=1e-3,1e-4,1e-3", Choice("optim.lr", ("0.001", "0.0001"))),
        ("strategy=choice(ddp, zero2)", Choice("strategy", ("ddp", "zero2"))),
        ("optim.betas=[0.9,0.95],[0.8,0.99]", Choice("optim.betas", ("[0.9,0.95]", "[0.8,0.99]"))),
    ],
)
def test_an_override_of_several_values_is_a_dimension(word: str, dimension: Dimension) -> None:
    [found] = space(word)
    assert (found.name, vars(found) | {"words": ()}) == (dimension.name, vars(dimension) | {"words": ()})
    if isinstance(found, Choice) and isinstance(dimension, Choice):
        assert sorted(found.words) == sorted(dimension.words)


def test_what_cannot_be_drawn_is_told_together() -> None:
    words = ["optim.lr=interval(1, 0)", "optim.eps=tag(log, interval(0, 1))", "seed=tag(log, range(1, 9))"]
    with pytest.raises(Mistakes) as caught:
        space(*words, "max_steps=interval(1.5, 3)", "optim.clip=tag(big, interval(0, 1))")
    assert len(caught.value.problems) == 5


def test_the_space_counts_its_combinations() -> None:
    assert size(space("seed=1,2,3", "max_steps=range(10, 40, 10)")) == 9
    assert size(space("seed=1,2,3", "optim.lr=interval(0, 1)")) is None


def searched(search: Search, count: int) -> list[tuple[int, list[str]]]:
    """So many trials, each told a value that its learning rate decides."""
    trials = []
    for _ in range(count):
        proposal = search.ask()
        assert proposal is not None
        trials.append((proposal.number, proposal.words))
        rate = float(proposal.words[0].partition("=")[2])
        search.tell(proposal.number, "done", (rate - 0.3) ** 2)
    return trials


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str) -> None:
    words = ["optim.lr=range(0, 1, 0.25)" if sampler == "grid" else "optim.lr=interval(0, 1)", "seed=1,2,3"]
    sweep = Sweep(sampler=sampler, trials=12 if sampler == "grid" else 14, seed=5)
    whole = searched(Search(None, sweep, space(*words), {}, "min"), sweep.trials or 0)
    first = Search(tmp_path, sweep, space(*words), {}, "min")
    half = searched(first, 5)
    lost = first.ask()  # it runs when the process is killed
    again = Search(tmp_path, sweep, space(*words), {}, "min")
    taken_up = again.ask()
    assert lost is not None
    assert taken_up is not None
    assert (taken_up.number, taken_up.words, taken_up.goes_on) == (5, lost.words, True)
    again.tell(5, "done", (float(lost.words[0].partition("=")[2]) - 0.3) ** 2)
    rest = searched(again, (sweep.trials or 0) - 6)
    assert [*half, (5, lost.words), *rest] == whole
    assert again.ask() is None
    assert Search(tmp_path, sweep, space(*words), {}, "min").ask() is None
    other = searched(Search(None, Sweep(sampler=sampler, trials=sweep.trials, seed=6), space(*words), {}, "min"), 5)
    assert other != whole[:5], "the seed decides"
    if sampler == "grid":
        assert len({tuple(trial) for _, trial in whole}) == 12, "every combination once"


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    searched(Search(tmp_path, Sweep(trials=3), space("optim.lr=interval(0, 1)"), {"max_steps": 5}, "min"), 1)
    for word, steps in (("optim.lr=interval(0, 2)", 5), ("optim.lr=interval(0, 1)", 6)):
        with pytest.raises(UserMistake, match="another search"):
            Search(tmp_path, Sweep(trials=3), space(word), {"max_steps": steps}, "min")
    more = Search(tmp_path, Sweep(trials=9), space("optim.lr=interval(0, 1)"), {"max_steps": 5}, "min")
    assert more.standing() == "1 of 9 trials: 1 complete"


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserMistake, match="another process"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def evaluations(folder: Path, *values: tuple[int, float]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as lines:
        for step, value in values:
            lines.write(json.dumps({"step": step, "split": "train", "loss": 9.0}) + "\n")
            lines.write(json.dumps({"step": step, "split": "eval", "loss": value}) + "\n")


@pytest.mark.parametrize("pruner", ["median", "none"])
def test_the_worse_half_is_asked_to_end(tmp_path: Path, pruner: str) -> None:
    sweep = Sweep(trials=4, pruner=pruner, prune_after_trials=2, prune_after_steps=2)
    search = Search(tmp_path, sweep, space("optim.lr=interval(0, 1)"), {}, "min")
    watch = Watch(search, "loss")
    for number, loss in enumerate((1.0, 2.0)):
        search.ask()
        watch.follow(number, tmp_path / str(number))
        evaluations(tmp_path / str(number), (1, loss), (2, loss), (3, loss))
        watch.look()
        watch.leave(number)
        search.tell(number, "done", loss)
    search.ask()
    watch.follow(2, tmp_path / "2")
    evaluations(tmp_path / "2", (0, 99.0), (1, 9.0))
    watch.look()
    assert not (tmp_path / "2" / prune.REQUEST).exists(), "before prune_after_steps"
    evaluations(tmp_path / "2", (2, 9.0))
    watch.look()
    assert (tmp_path / "2" / prune.REQUEST).exists() == (pruner == "median")
    flag = prune.PruneFlag(tmp_path / "2", active=True)
    assert flag() == (pruner == "median")
    if pruner == "median":
        assert "9 at step 2" in str(prune.withdraw(tmp_path / "2", "pruned"))
    assert not prune.PruneFlag(tmp_path / "2", active=True)()
    watch.leave(2)
    search.tell(2, "pruned", None)
    assert "1 pruned" in search.standing()


def test_evaluations_are_read_once_and_as_they_are_written(tmp_path: Path) -> None:
    reader = Reader(tmp_path, "loss")
    assert reader.new() == []
    evaluations(tmp_path, (0, 5.0), (2, 4.0))
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "split": "eval", "lo')
    assert reader.new() == [(2, 4.0)]
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('ss": "NaN"}\n')
    [(step, value)] = reader.new()
    assert (step, value != value) == (4, True)
    (tmp_path / "metrics.jsonl").write_text("")  # the run went on from its checkpoint of step 2
    evaluations(tmp_path, (2, 4.0), (6, 3.0))
    assert reader.new() == [(6, 3.0)]


@pytest.mark.parametrize(
    ("jobs", "ranks", "gpus", "cores", "expected"),
    [
        (2, "auto", "0123", 8, ["GPU 0,1", "GPU 2,3"]),
        ("auto", "auto", "0123", 8, ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]),
        ("auto", 2, "01234", 8, ["GPU 0,1", "GPU 2,3"]),
        (2, 1, "", 4, ["cores 0,1", "cores 2,3"]),
        ("auto", 2, "", 4, ["cores 0,1", "cores 2,3"]),
        ("auto", 4, "", 2, ["cores 0,1"]),
    ],
)
def test_devices_are_leased(jobs: int | str, ranks: int | str, gpus: str, cores: int, expected: list[str]) -> None:
    found = leases(jobs, ranks, list(gpus), range(cores))
    assert [str(lease) for lease in found] == expected
    taken = [gpu for lease in found for gpu in lease.environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    assert len(set(taken)) == len(taken), "no device twice"


@pytest.mark.parametrize(("jobs", "ranks", "gpus", "cores"), [(3, 2, "0123", 64), (5, "auto", "", 4), (2, 2, "", 3)])
def test_more_jobs_than_devices_are_refused(jobs: int, ranks: int | str, gpus: str, cores: int) -> None:
    with pytest.raises(UserMistake, match=r"do not fit on .* Set sweep\.jobs="):
        leases(jobs, ranks, list(gpus), range(cores))


OPTUNA = ["-m", "hydra/sweeper=optuna"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*OPTUNA], "nothing to search"),
        ([*OPTUNA, "optim.lr=interval(-1, 1)"], r"optim\.lr=-1.0: a number from 0"),
        ([*OPTUNA, "optim.lr=interval(0, 1)", "sweep.sampler=grid"], "needs values to count"),
        ([*OPTUNA, "seed=1,2", "sweep.trials=3"], "more than the search space has combinations: 2"),
        ([*OPTUNA, "seed=1,2", "sweep.pruner=median"], r"Set eval\.every"),
        ([*OPTUNA, "seed=1,2", "sweep.prune_after_steps=3"], r"with sweep\.pruner=none"),
        ([*OPTUNA, "seed=1,2", "data.eval_fraction=0"], "this run has none"),
        ([*OPTUNA, "seed=1,2", "resume=never"], "a run of its own"),
        ([*OPTUNA, "checkpoint.mode=min,max"], "decides what is compared"),
        (["-m", "optim.lr=interval(0, 1)"], "no end of values"),
        (["-m", "seed=1,2", "sweep.sampler=random"], "without hydra/sweeper=optuna"),
        (["-m", "seed=1,2", "sweep.jobs=0"], "auto or a whole number"),
        (["-m", "seed=1,2", "sweep.jobs=1000"], "do not fit"),
        (["-m", "sweep.jobs=1,2"], "decides about the sweep itself"),
        (["-m", "seed=1,2", "run.dir=x"], "each job of a sweep needs its own"),
        (["sweep.trials=3"], "no effect on a single run"),
        (["hydra/sweeper=optuna"], "no effect on a single run"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_before_its_first_job(words: list[str], told: str) -> None:
    composed = compose_sweep(words)
    [problem, *_] = [*check(composed.run), *rules.problems(composed)]
    assert re.search(told, problem)


def test_a_search_that_makes_sense_is_not_refused() -> None:
    words = [*OPTUNA, "optim.lr=tag(log, interval(1e-5, 1e-3))", "tuning=lora", "tuning.lora_rank=interval(4, 64)"]
    assert rules.problems(compose_sweep([*words, "sweep.pruner=halving", "eval.every=5"])) == []
    with pytest.raises(UserMistake, match=r"Did you mean optim\.lr\?"):
        compose_sweep([*OPTUNA, "optim.lrr=interval(0, 1)"])
    with pytest.raises(UserMistake, match=r"Say sweep\.trials"):
        compose_sweep([*OPTUNA, "hydra.sweeper.n_trials=3"])


def test_an_experiment_file_may_hold_the_space(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    space_lines = "    optim.lr: tag(log, interval(1e-5, 1e-3))\n    seed: [1, 2]\n"
    text = f"# @package _global_\nsweep:\n  trials: 7\n  space:\n{space_lines}"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    words = [f"--config-dir={tmp_path}", "experiment=mine"]
    composed = compose_sweep([*words, *OPTUNA, "seed=3,4"])
    assert space(*composed.line.overrides) == [Choice("seed", ("3", "4")), Real("optim.lr", 1e-5, 1e-3, log=True)]
    assert composed.run.sweep.trials == 7
    assert rules.problems(composed) == []
    assert rules.problems(compose_sweep(words)) == [], "the experiment by itself is one run"
    (tmp_path / "experiment" / "mine.yaml").write_text(text.replace("optim.lr", "optim.lrr"))
    with pytest.raises(UserMistake, match=r"Did you mean optim\.lr\?"):
        compose_sweep([*words, *OPTUNA])


def test_the_launcher_of_jobs_side_by_side_is_chosen() -> None:
    chosen = rules.settled(compose_sweep(["-m", "seed=1,2", "sweep.jobs=2"])).hydra_argv
    assert "hydra/launcher=side_by_side" in chosen
    assert not any("side_by_side" in word for word in rules.settled(compose(["-m", "seed=1,2"])).hydra_argv)


def test_trials_are_handed_to_hydra_in_a_row(tmp_path: Path) -> None:
    """Its launchers number jobs from a first one; trials that were interrupted leave gaps."""
    jobs = [Job(number, [], Run(), tmp_path) for number in (7, 2, 3, 8, 5)]
    assert [[job.number for job in group] for group in in_a_row(jobs)] == [[2, 3], [5], [7, 8]]


def test_a_trial_without_a_value_has_failed(tmp_path: Path) -> None:
    search = Search(tmp_path, Sweep(trials=3), space("optim.lr=interval(0, 1)"), {}, "max")
    for status, value in (("done", None), ("failed", 1.0), ("early_stopped", 0.5)):
        proposal = search.ask()
        assert proposal is not None
        search.tell(proposal.number, status, value)
    assert search.standing() == "3 of 3 trials: 1 complete, 2 failed"


def test_what_trials_share_leaves_out_what_is_searched() -> None:
    run = compose([]).run
    base = base_of(run, space("optim.lr=1,2", "strategy=ddp,zero2"))
    assert "optim.lr" not in base
    assert not any(name.startswith(("strategy.", "sweep.", "launch.")) for name in base)
    assert base["optim.clip"] == 1.0

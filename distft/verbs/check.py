"""`distft check`: what distft promises, proved on a run's own model, data and strategy with trials of a few steps."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.check import check as problems_of
from distft.config.check import settle
from distft.config.schema import Run
from distft.config.schema.check import PROOFS, Check, CheckedRun
from distft.config.words import unlisted
from distft.errors import DONE, Mistakes, NegativeVerdict, UserMistake
from distft.launch.topology import count_gpus, place_of
from distft.prepared import Prepared

if TYPE_CHECKING:
    from distft.config.load import Composed
    from distft.proofs.outcome import Outcome
    from distft.proofs.small import TrialModel

RESULT = "check.json"
Preflight = Callable[[Run, Path], None]


def overrides_of(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run folder that `run=` names, if it stands there, and the command line with its config.yaml in its place.

    Raises:
        UserMistake: it names no run folder and no configuration file.
    """
    named = [word.removeprefix("run=") for word in argv if word.startswith("run=")]
    words = [word for word in argv if not word.startswith("run=")]
    if not named:
        return None, words
    path = Path(named[0]).expanduser().absolute()
    path = path / "config.yaml" if path.is_dir() else path
    if len(named) > 1 or path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UserMistake(f"{' '.join(named)}: run=<folder of one run, with config.yaml> or its config.yaml is wanted.")
    return path.parent, [f"--config-dir={path.parent}", f"--config-name={path.stem}", *words]


def main(composed: Composed, source: Path | None, preflight: Preflight) -> int:
    """Make the proofs that `check.proofs` names, print a line each and the verdict. Returns exit code 0.

    `source`: the run folder that the configuration came from, if it did. `preflight`: the verb, which readies the
    trials' data and settles their layout.

    Raises:
        Mistakes, UserMistake: the run or the check cannot be made as it is configured.
        NegativeVerdict: a proof fails.
    """
    started = time.perf_counter()
    asked: CheckedRun = dataclasses.replace(composed.run, resume="never", resume_allow=[])  # it begins anew
    if composed.line.sweep or place_of(os.environ) is not None:
        raise UserMistake("distft check takes one run and starts its ranks itself: no -m, no launcher.")
    problems = check(asked.check) + problems_of(asked)
    if problems:
        raise Mistakes(problems)
    with room(asked) as folder:
        trials = Trials.ready(settle(asked), asked.check, folder, preflight)
        print(trials.heading(), flush=True)
        outcomes = []
        for outcome in trials.outcomes():
            print(outcome.line(), flush=True)
            outcomes.append(outcome)
        seconds = time.perf_counter() - started
        write(result_file(asked, source), trials, outcomes, seconds)
        wrong = [outcome.proof for outcome in outcomes if not outcome.passed]
        if wrong:
            raise NegativeVerdict(
                f"{len(wrong)} of {len(outcomes)} proofs fail: {', '.join(wrong)}. The trials lie in {folder}."
            )
    print(f"{len(outcomes)} of {len(outcomes)} proofs pass ({seconds:.0f} s)")
    return DONE


def check(asked: Check) -> list[str]:
    """Every problem of the section `check`."""
    problems = list(unlisted("check.proofs", asked.proofs, PROOFS, "is no proof"))
    if not asked.proofs:
        problems.append(f"check.proofs=[] proves nothing. There are: {', '.join(PROOFS)}.")
    if not (asked.full == "auto" or isinstance(asked.full, bool)):
        problems.append(f"check.full={asked.full}: auto, true or false is wanted.")
    if asked.steps < 2:
        problems.append(f"check.steps={asked.steps}: a whole number from 2 is wanted, one step on each side of a save.")
    if asked.sequence_length < 2:
        problems.append(f"check.sequence_length={asked.sequence_length}: a whole number from 2 is wanted.")
    return problems


@contextlib.contextmanager
def room(asked: CheckedRun) -> Iterator[Path]:
    """The folder of the trials: `run.dir`, which stays, or a temporary one, which goes when all proofs pass."""
    if asked.run.dir is not None:
        folder = Path(asked.run.dir).expanduser().absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserMistake(f"run.dir={asked.run.dir} is where the trials would lie. Name a new or an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="distft-check-"))
    try:
        yield folder
    except NegativeVerdict:  # whoever reads it wants to look at the trials
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def result_file(asked: CheckedRun, source: Path | None) -> Path | None:
    if asked.check.output is not None:
        return Path(asked.check.output).expanduser()
    folder = source or (Path(asked.run.dir).expanduser() if asked.run.dir is not None else None)
    return folder / RESULT if folder else None


@dataclass
class Trials:
    """The runs that the proofs look at."""

    run: Run  # in small, on one rank
    even: Run  # the same with nothing by which the division of a step decides its loss, such as dropout
    prepared: Prepared
    model: TrialModel
    check: Check
    folder: Path
    num_ranks: int
    precision: str

    @classmethod
    def ready(cls, run: Run, check: Check, folder: Path, preflight: Preflight) -> Trials:
        """Cut the run down, and do its preflight once for all trials."""
        from functools import partial

        from distft.data.sources import texts
        from distft.model.folder import resolve
        from distft.proofs import small

        with quietly():
            resolved = resolve(run, partial(texts, run))
            model = small.trial_model(resolved, run, check.full, folder / "model")
            sources = small.sample_rows(run, folder / "rows")
            own = settle(small.in_small(run, check, model, sources, folder / "cache"))
            even = small.divided(own, small.divisible(model.folder, folder / "model-divisible"))
            num_ranks = ranks_of(run)
            problems = problems_of(small.on_ranks(own, num_ranks))
            if problems:
                raise Mistakes(problems)
            preparation = folder / "preflight"
            preparation.mkdir()
            try:
                preflight(own, preparation)
            except UserMistake as mistake:
                raise UserMistake(
                    f"{mistake}\n(Of each source its {small.ROWS_TAKEN} shortest rows were taken, in bins of "
                    f"check.sequence_length={own.data.sequence_length}.)"
                ) from None
        precision = run.precision
        if precision == "auto":
            precision = "bf16" if count_gpus() else "fp32"
        return cls(own, even, Prepared.read(preparation), model, check, folder, num_ranks, precision)

    def heading(self) -> str:
        from distft.proofs.small import LARGEST

        model = f"{self.model.name} ({self.model.num_parameters:,} parameters)"
        if self.model.is_copy:
            why = "" if self.check.full is False else f": it has over {LARGEST:,} (check.full=true takes it whole)"
            model = f"a narrow copy of {model} with few layers and random weights{why}"
        run = self.run
        where = f"{count_gpus()} GPU(s)" if count_gpus() else "the CPU"
        return (
            f"Checking {model}, {run.tuning.method}, {run.strategy.name}, {self.precision} on {where}; "
            f"{self.check.steps} steps of {run.batch.global_size} bins of {run.data.sequence_length}"
        )

    def outcomes(self) -> Iterator[Outcome]:
        """The proofs, one after another, each as soon as its trials are done."""
        from distft.proofs import invariance, packing, reload, resume
        from distft.proofs.small import on_ranks
        from distft.proofs.trial import Trial, carry_out

        wanted = self.check.proofs
        if "packing" in wanted:
            yield packing.prove(self.run, self.prepared, self.precision)
        whole = Trial(self.folder / "whole", on_ranks(self.run, self.num_ranks))
        checkpoint = whole.checkpoint(self.check.steps // 2)
        resumed = Trial(self.folder / "resumed", on_ranks(self.run, self.num_ranks), checkpoint)
        differ = self.even != self.run  # else one trial serves two proofs
        base = Trial(self.folder / "divisible", on_ranks(self.even, self.num_ranks)) if differ else whole
        others = [
            Trial(self.folder / f"1-rank-micro-{micro}", on_ranks(self.even, 1, micro))
            for micro in (1, 4)
            if (self.num_ranks, micro) != (1, 1)
        ]
        places = 1 if count_gpus() else len(os.sched_getaffinity(0))  # ranks of two trials would share a GPU
        failures: dict[str, str] = {}
        if {"resume", "reload"} & {*wanted} or ("invariance" in wanted and not differ):
            failures |= carry_out([whole], self.prepared, places)
        if "invariance" in wanted:
            failures |= carry_out([*([base] if differ else []), *others], self.prepared, places)
            yield invariance.prove([base, *others], failures, self.precision)
        if "resume" in wanted:
            if not failures[whole.folder.name]:
                failures |= carry_out([resumed], self.prepared, places)
            yield resume.prove(whole, resumed, failures)
        if "reload" in wanted:
            yield reload.prove(whole, failures, self.prepared, self.precision)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What readying says of rows and caches is the trials' own affair."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def ranks_of(run: Run) -> int:
    """Ranks that one rank is compared with: `launch.ranks` from 2 on, else 2; no more than there are GPUs, or cores."""
    wanted = run.launch.ranks if isinstance(run.launch.ranks, int) and run.launch.ranks > 1 else 2
    return min(wanted, count_gpus() or max(2, len(os.sched_getaffinity(0))))


def write(path: Path | None, trials: Trials, outcomes: list[Outcome], seconds: float) -> None:
    """The result as JSON, at once or not at all."""
    if path is None:
        return
    result = {
        "passed": all(outcome.passed for outcome in outcomes),
        "proofs": [dataclasses.asdict(outcome) for outcome in outcomes],
        "model": trials.model.name,
        "copy": trials.model.is_copy,
        "tuning": trials.run.tuning.method,
        "strategy": trials.run.strategy.name,
        "precision": trials.precision,
        "ranks": trials.num_ranks,
        "steps": trials.check.steps,
        "seconds": round(seconds, 1),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.tmp")
        staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise UserMistake(f"check.output={path} cannot be written: {error.strerror}. Name another file.") from None

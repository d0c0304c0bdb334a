"""`hydra/sweeper=optuna`: a sweep whose jobs a sampler proposes from the results before, and a pruner may end early."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from distft import errors
from distft.config.check import check
from distft.config.load import computed, knobs_of, to_run
from distft.config.schema import Run
from distft.errors import Mistakes
from distft.launch import prune
from distft.launch.jobs import jobs_noted, note_job
from distft.sweep.side_by_side import Job, SideBySide, job_of, run_dir_of
from distft.sweep.space import Dimension, split
from distft.sweep.study import STUDY, Search, held
from distft.sweep.watch import Watch


def base_of(run: Run, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """The knobs that all trials of a search share: another value would make their losses incomparable."""
    swept = {dimension.name.lstrip("+") for dimension in dimensions}
    return {
        name: value
        for name, value in computed(run).items()
        if name not in swept and name.partition(".")[0] not in swept
    }


def metric_of(run: Run) -> str:
    """The name under which an evaluation's record holds the objective."""
    return run.checkpoint.best.removeprefix("eval/")


class OptunaSweeper(Sweeper):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """All trials. What may be refused was refused before Hydra was given the word (see rules.py).

        Raises:
            SystemExit: a signal stopped the sweep.
        """
        parsed = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(arguments)
        self.dimensions, self.fixed = split(parsed, knobs_of("train"))
        self.run: Run = to_run(self.config)
        self.folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        if self.run.launch.dry_run:
            self.show()
            return
        with held(self.folder):
            self.search = self.open(self.folder)
            print(f"distft: {self.search.standing()} in {self.folder / STUDY}", flush=True)
            try:
                with Watch(self.search, metric_of(self.run)) as self.watch:
                    self.go()
            except SystemExit:
                sys.stdout.flush()
                sys.stderr.write(
                    f"distft: {self.search.standing()}. Go on with the same command and hydra.sweep.dir={self.folder}\n"
                )
                raise

    def open(self, folder: Path | None) -> Search:
        run, together = self.run, isinstance(self.launcher, SideBySide) or self.run.sweep.jobs != 1
        base = base_of(run, self.dimensions)
        return Search(folder, run.sweep, self.dimensions, base, run.checkpoint.mode, together)

    def show(self) -> None:
        """What would be tried, and the first trial's commands."""
        search, sweep = self.open(None), self.run.sweep
        print(f"# {search.total} trials of sweep.sampler={sweep.sampler}, sweep.pruner={sweep.pruner}. The first:")
        first = search.ask()
        assert first is not None
        print(f"# {' '.join(first.words)}", flush=True)
        self.launcher.launch([[*self.fixed, *first.words]], initial_job_idx=0)

    def go(self) -> None:
        if isinstance(self.launcher, SideBySide):
            self.launcher.carry_out(self.next, self.note)
            return
        at_once = self.run.sweep.jobs if isinstance(self.run.sweep.jobs, int) else 1
        while batch := self.several(at_once):
            for jobs in in_a_row(batch):
                self.launcher.launch([job.overrides for job in jobs], initial_job_idx=jobs[0].number)
            for job in batch:
                self.ended(job)

    def several(self, count: int) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < count and (job := self.next()):
            jobs.append(job)
        return jobs

    def next(self) -> Job | None:
        """The next trial whose values pass the rules, ready to be started."""
        while (proposal := self.search.ask()) is not None:
            job = job_of(self.context, self.config, proposal.number, [*self.fixed, *proposal.words])
            job.told = " ".join(proposal.words)
            problems = check(job.run)
            if not problems:
                if proposal.goes_on:
                    print(f"distft: trial {job.number} was interrupted; it goes on", flush=True)
                self.watch.follow(job.number, run_dir_of(job))
                return job
            sys.stdout.flush()
            sys.stderr.write(f"distft: trial {job.number} ({job.told}): {Mistakes(problems)}\n")
            note_job(self.folder, job.number, job.overrides, run_dir_of(job), errors.USER_MISTAKE)
            self.search.tell(job.number, "failed", None)
        return None

    def note(self, job: Job, code: int) -> None:
        """A job that the launcher beside us started has ended."""
        note_job(self.folder, job.number, job.overrides, run_dir_of(job), code)
        self.ended(job)

    def ended(self, job: Job) -> None:
        """Tell the search how a job ended, by the note of it; one that was interrupted stays open in the study."""
        record = next((note for note in jobs_noted(self.folder) if note["job"] == job.number), None)
        status = str(record["status"]) if record else "failed"
        self.watch.leave(job.number)
        if status == "interrupted":
            return
        prune.withdraw(run_dir_of(job), status)
        self.search.tell(job.number, status, record["objective"] if record else None)


def in_a_row(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs grouped so that their numbers follow each other, as Hydra's launchers number them."""
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: job.number):
        if groups and groups[-1][-1].number + 1 == job.number:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups

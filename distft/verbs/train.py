"""`distft train`: the only wiring of a run, done by every rank alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distft import errors, heartbeat
from distft.config.schema import Run
from distft.errors import NegativeVerdict, Stalled, Stop, UserMistake
from distft.launch.deadline import Clock
from distft.launch.prune import PruneFlag, withdraw
from distft.launch.stop import StopFlag
from distft.prepared import Prepared
from distft.result import summary_of, tell_the_end, write_result

if TYPE_CHECKING:
    from torch.distributed import Store

    from distft.checkpoint.state import TrainState
    from distft.data.batches import Plan
    from distft.data.cache import PreparedData
    from distft.log import Log
    from distft.perf import Cost
    from distft.strategy.base import Strategy
    from distft.world import World


def work(run: Run, run_dir: Path, store: Store | None = None) -> int:
    """Train as one rank of the world that the environment names, after preflight. Returns exit code 0.

    `store`: the rendezvous store where ranks were started one by one.

    Raises:
        Stop: GuardStop, SignalStop, or a UserMistake that only shows on the device; `result.json` tells which.
    """
    from distft.launch.blame import Patience
    from distft.launch.stall import OwnWatch
    from distft.pulse import Pulse

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    patience = Patience(run.guard.stall_seconds, run.launch.start_timeout)
    watch = OwnWatch(run_dir, rank, size, patience)
    with Pulse(run_dir, rank, size, watch):
        try:
            return train_as_a_rank(run, run_dir, store)
        except Exception:
            if watch.knows():  # the others were ended: what this rank meets follows from that
                watch.follow()
            raise


def train_as_a_rank(run: Run, run_dir: Path, store: Store | None) -> int:
    from distft.log import Log
    from distft.world import join, leave, longest_wait

    world = join(store, longest_wait(run.guard.stall_seconds))
    stalled = False
    try:
        job = Job.assemble(run, run_dir, world)
        state, resumed = job.restore()
        with Log(run, run_dir, world, job.num_steps, resumed, state.tracker_run) as log:
            state.tracker_run = log.wandb_id
            job.train(state, log, StopFlag())
    except RuntimeError as error:
        stalled = timed_out(error)
        if not stalled:
            raise
        raise Stalled(
            f"Rank {world.rank} waited {longest_wait(run.guard.stall_seconds):g} s for another, and no heartbeat told "
            f"which one hangs. Look at {run_dir / 'logs'}, then go on with resume={run_dir}."
        ) from error
    finally:
        if not stalled:  # a group whose collective hangs cannot be left in good order
            leave()
    return errors.DONE


def timed_out(error: RuntimeError) -> bool:
    """Whether a collective gave up waiting: gloo's and c10d's words for it, since they have no exception type."""
    return any(words in str(error) for words in ("Timed out waiting", "timed out", "timeout"))


@dataclass
class Job:
    """The rooms of a run, furnished: what the parts of its life share."""

    run: Run
    run_dir: Path
    world: World
    precision: str
    prepared: Prepared
    data: PreparedData
    plan: Plan
    eval_plan: Plan | None
    num_steps: int
    strategy: Strategy
    cost: Cost
    num_trained: int
    notes: list[str]
    base_hashes: dict[str, str]

    @classmethod
    def assemble(cls, run: Run, run_dir: Path, world: World) -> Job:
        """Open the data, build the model on meta, lay it over the ranks and stream its weights in."""
        from distft.cache import cache_folder
        from distft.checkpoint.state import hash_base
        from distft.data.batches import Plan
        from distft.data.cache import open_prepared
        from distft.model import activation, adapters, head_trial, kernels, tuning
        from distft.model.load import blocks, build
        from distft.model.mapping import open_weights
        from distft.objective import budget
        from distft.objective.trainee import Trainee, chunk_on
        from distft.optim import make_optimizer
        from distft.perf import cost_of, give_back
        from distft.strategy import make_strategy
        from distft.strategy.numbers import numbers_of
        from distft.world import products_note

        heartbeat.mark("start")
        prepared = Prepared.read(run_dir)
        data = open_prepared(Path(prepared.data_folder))
        length, layout = run.data.sequence_length, (prepared.packed, world.data_rank, world.data_size)
        plan = Plan(data.train, run.batch, length, run.seed, *layout)
        precision = settled_precision(run, world)

        folder = Path(prepared.model_folder)
        strategy = make_strategy(run, world, precision)
        with strategy.born():
            model = build(folder, run, prepared.attention)
        model, weights = tuning.apply(model, run.tuning, open_weights(folder, model), run.seed)
        layers = blocks(model)
        notes = adapters.apply(model, run.model.compile)
        if not run.model.compile:  # which fuses more, and would compile every block anew for kernels of its own
            notes += kernels.apply(model, run.model.kernels, world.device)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        cost = cost_of(model, layers)
        trainee = Trainee(model, chunk_on(world.device, model.config))
        numbers = numbers_of(run.strategy.name, precision, model)
        again = budget.choose(trainee, layers, run, plan, world.device, numbers)
        notes += again.notes
        if run.model.compile:
            from distft.model import compile

            compile.enable(layers, world.device)
        activation.enable(model, again.blocks, again.mode)
        micro_tokens, cache = length * run.batch.micro_size, cache_folder(run.data)
        several = len(data.train) > 1
        head_notes = head_trial.settle(trainee, run.model.head, world, precision, micro_tokens, several, cache)
        heartbeat.mark("start")
        give_back()  # of preflight, where it ran here, and of the small copies
        strategy.prepare(trainee, layers, weights, partial(make_optimizer, shapes=shapes, optim=run.optim))
        return cls(
            run=run,
            run_dir=run_dir,
            world=world,
            precision=precision,
            prepared=prepared,
            data=data,
            plan=plan,
            eval_plan=Plan(data.eval, run.batch, length, run.seed, *layout) if data.eval else None,
            num_steps=plan.num_steps(run.epochs, run.max_steps),
            strategy=strategy,
            cost=cost,
            num_trained=num_trained,
            notes=[*prepared.notes, *products_note(world, precision), *notes, *head_notes, *trainee.notes],
            base_hashes=hash_base(folder, world) if run.tuning.method == "lora" else {},
        )

    def restore(self) -> tuple[TrainState, int | None]:
        """The state to start from, and the step of the checkpoint that it came from (None: a fresh start)."""
        from distft.checkpoint.resume import restore

        heartbeat.mark("start")
        state, resumed = restore(
            self.run, self.run_dir, self.prepared, self.base_hashes, self.strategy, self.world, say=print
        )
        if resumed is not None:
            self.pass_over(state)
        return state, resumed

    def pass_over(self, state: TrainState) -> None:
        """Leave out of the plan what the run has stepped over, also where it did so after this checkpoint."""
        from distft.checkpoint.layout import run_folder
        from distft.checkpoint.ranks import Ranks
        from distft.guard import read_skipped

        source = self.run_dir if self.run.resume == "auto" else Path(self.run.resume)
        known = Ranks(self.world).gather(read_skipped(run_folder(source)) if self.world.is_main else [])[0]
        if len(known) > len(state.rollbacks):
            state.rollbacks = [record["back_to"] for record in known]
        self.plan.skipped = {record["step"] - 1 for record in known}
        self.plan.skipped |= {step - 1 for step in state.cursor.get("skipped", [])}

    def train(self, state: TrainState, log: Log, stop_requested: StopFlag) -> None:
        """Fit, then write and check what was trained. `result.json` tells the end, whatever it was."""
        from distft.checkpoint.behind import WriteBehind
        from distft.data.batches import Prefetch
        from distft.loop import Fit
        from distft.perf import peak_flops

        ranks = f"{self.world.size} rank{'s' if self.world.size > 1 else ''}"
        engine = f"{self.run.strategy.name} on {ranks}, {self.precision}"
        for note in self.notes:
            log.say(note)
        log.say(f"{engine}, {self.num_trained:,} trained parameters; {self.run_dir}")
        if state.step:
            log.say(f"Going on after step {state.step} of {self.num_steps}")
        peak = peak_flops(self.world.device, self.precision)
        checkpoints = WriteBehind(self.run, self.run_dir, self.strategy, self.world, log.say, self.prove)
        fit = Fit(
            config=self.run,
            world=self.world,
            strategy=self.strategy,
            plan=self.plan,
            evaluation_steps=self.eval_plan.eval_steps if self.eval_plan else None,
            steps=partial(Prefetch, self.plan),
            num_steps=self.num_steps,
            source_names=[source.name for source in self.data.train],
            eval_source_names=[source.name for source in self.data.eval],
            log=log,
            state=state,
            checkpoints=checkpoints,
            stop_requested=stop_requested,
            prune_requested=PruneFlag(self.run_dir, self.world.is_main),
            clock=Clock.of(self.run, self.world.is_main, self.num_trained / self.world.size, self.run_dir),
            flops=self.cost.of_step,
            peak_flops=peak * self.world.size if peak else None,
        )
        try:
            with checkpoints:
                status = fit.run()
            samples = [] if status == "pruned" else self.finish(status, state, log)
        except Stop as stop:
            heartbeat.mark("closing")
            if self.world.is_main:
                write_result(self.run_dir, stop.status, state, None, self.data.hash, str(stop))
            log.finish(stop.status, summary_of(state), str(stop))
            raise
        heartbeat.mark("closing")
        final = None if status == "pruned" else self.run_dir / "final"
        if self.world.is_main:
            write_result(self.run_dir, status, state, final, self.data.hash, withdraw(self.run_dir, status))
        log.finish(status, summary_of(state))
        if self.world.is_main:
            tell_the_end(self.run, self.run_dir, state, samples, final)

    def prove(self) -> dict[str, Any]:
        """What a checkpoint records to be verified by: its tokenizer, and logits of a few short prompts. Collective."""
        from distft.evaluation.samples import take_probe
        from distft.model.probe import prompt_ids
        from distft.model.proof import prove

        words, model = Path(self.prepared.tokenizer_folder), Path(self.prepared.model_folder)
        probe = take_probe(self.strategy, prompt_ids(self.tokenizer), self.world)
        return prove(self.tokenizer, words, model, probe, self.precision)

    @cached_property
    def tokenizer(self) -> Any:
        from distft.model.folder import read_tokenizer

        return read_tokenizer(Path(self.prepared.tokenizer_folder), self.run.model.trust_remote_code)

    def finish(self, status: str, state: TrainState, log: Log) -> list[dict[str, str]]:
        """Write `final/` and compare it with what was trained, then sample answers. Collective."""
        from distft.checkpoint.layout import step_folder
        from distft.checkpoint.ranks import Ranks
        from distft.checkpoint.state import load
        from distft.checkpoint.verify import memory_bound
        from distft.evaluation.samples import sample_answers, take_probe
        from distft.model.decode import stop_ids
        from distft.model.final import check_final, save_final
        from distft.model.probe import prompt_ids
        from distft.perf import give_back

        heartbeat.mark("final")
        run, strategy, world = self.run, self.strategy, self.world
        if status == "early_stopped" and state.best_step not in (None, state.step):
            best = step_folder(self.run_dir, state.best_step)
            if Ranks(world).first(best.is_dir()):
                load(best, strategy, world, say=log.say)
                log.say(f"Early stopping: the best weights, those of step {state.best_step}, become the final ones")
            else:  # checkpoint.on_full=skip
                log.say(f"The best weights, those of step {state.best_step}, were not saved: the last ones are final")
        strategy.release()
        strategy.trainee.room.release()
        give_back()  # the model is written, and read back, beside the trained one
        tokenizer = self.tokenizer
        probe = take_probe(strategy, prompt_ids(tokenizer), world)
        gathered = strategy.gather()
        verdict = Verdict()
        if world.is_main:
            with verdict:
                base = Path(self.prepared.model_folder)
                written = (run, ((name, tensor) for name, tensor in gathered if tensor is not None), tokenizer, probe)
                hashes = save_final(self.run_dir / "final", base, *written, self.precision, self.base_hashes)
        for _ in gathered:  # the other ranks' part; and the rest of it where writing failed
            pass
        if world.is_main and verdict.stop is None:
            give_back()
            with verdict:
                room = memory_bound(run.verify.max_memory)
                check_final(self.run_dir / "final", hashes, probe, run, self.precision, None, room, log.say)
        verdict.agree(world)
        if not run.eval.samples or not self.data.eval:
            return []
        samples = sample_answers(
            strategy,
            self.data.eval,
            tokenizer,
            stop_ids(tokenizer, Path(self.prepared.model_folder)),
            run.eval.samples,
            run.eval.max_new_tokens,
            run.data.sequence_length,
            world,
        )
        log.samples(state.step, samples)
        return samples


class Verdict:
    """What went wrong on rank 0 while the others wait: caught, so that all ranks end alike and none hangs."""

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, OSError):
            error = UserMistake(f"run.dir: the final folder could not be written: {error}. Free space, then resume.")
        if isinstance(error, Stop):
            self.stop = error
            return True
        return False

    def agree(self, world: World) -> None:
        """Raise on every rank what rank 0 has caught."""
        import torch

        from distft.world import sum_over

        failed = sum_over(world, torch.tensor([self.stop is not None], dtype=torch.int32))
        if failed.item():
            raise self.stop or NegativeVerdict("rank 0 could not write the final folder or found it wrong")


def settled_precision(run: Run, world: World) -> str:
    if run.precision != "auto":
        return run.precision
    return "bf16" if world.device.type == "cuda" else "fp32"

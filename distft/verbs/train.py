"""`distft train`: the only wiring of a run, done by every rank alike."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distft import errors
from distft.config.load import config_hash
from distft.config.schema import Run
from distft.errors import NegativeVerdict, Stop, UserMistake
from distft.prepared import Prepared

if TYPE_CHECKING:
    from torch.distributed import Store

    from distft.checkpoint.state import TrainState
    from distft.data.batches import Plan
    from distft.data.cache import PreparedData
    from distft.log import Log
    from distft.perf import Cost
    from distft.strategy.base import Strategy
    from distft.world import World

RESULT = "result.json"


class SignalFlag:
    """SIGTERM and SIGINT ask for a checkpoint and an end; the loop looks at the flag once a step."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        self.raised = True

    def __call__(self) -> bool:
        return self.raised


def work(run: Run, run_dir: Path, store: Store | None = None) -> int:
    """Train as one rank of the world that the environment names, after preflight. Returns exit code 0.

    `store`: the rendezvous store where ranks were started one by one.

    Raises:
        Stop: GuardStop, SignalStop, or a UserMistake that only shows on the device; `result.json` tells which.
    """
    from distft.log import Log
    from distft.world import join, leave

    stop_requested = SignalFlag()
    world = join(store, run.guard.stall_seconds)
    try:
        job = Job.assemble(run, run_dir, world)
        state, resumed = job.restore()
        with Log(run, run_dir, world, job.num_steps, resumed, state.tracker_run) as log:
            state.tracker_run = log.wandb_id
            job.train(state, log, stop_requested)
    finally:
        leave()
    return errors.DONE


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
    compared_a_checkpoint: bool = False

    @classmethod
    def assemble(cls, run: Run, run_dir: Path, world: World) -> Job:
        """Open the data, build the model on meta, lay it over the ranks and stream its weights in."""
        from distft.checkpoint.state import hash_base
        from distft.data.batches import Plan
        from distft.data.cache import open_prepared
        from distft.model import activation, kernels, tuning
        from distft.model.load import blocks, build
        from distft.model.mapping import open_weights
        from distft.objective.trainee import Trainee
        from distft.optim import make_optimizer
        from distft.perf import cost_of
        from distft.strategy import make_strategy

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
        kernel_notes = kernels.apply(model, run.model.kernels, world.device)
        activation.enable(model, layers, run.activation.mode)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        cost = cost_of(model, layers)
        trainee = Trainee(model)
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
            notes=[*prepared.notes, *kernel_notes, *trainee.notes],
            base_hashes=hash_base(folder, world) if run.tuning.method == "lora" else {},
        )

    def restore(self) -> tuple[TrainState, int | None]:
        """The state to start from, and the step of the checkpoint that it came from (None: a fresh start)."""
        from distft.checkpoint import layout, state

        run = self.run
        fresh = state.TrainState(config_hash=config_hash(run), identity=self.identity(), base_hashes=self.base_hashes)
        source = self.run_dir if run.resume == "auto" else Path(run.resume)
        if run.resume == "never" or (run.resume == "auto" and not layout.candidates(source)):
            return fresh, None
        if saved := state.peek(source):
            refuse_another_run(saved.identity, fresh.identity, run.resume_allow)
            state.check_base(saved, self.base_hashes, Path(self.prepared.model_folder))
        saved = state.load(source, self.strategy, self.world, say=print)
        saved.config_hash, saved.identity = fresh.config_hash, fresh.identity
        return saved, saved.step

    def identity(self) -> dict[str, Any]:
        """What must not change between two halves of a run, by the knob that changes it."""
        run = self.run
        return {
            "data": self.prepared.data_hash,
            "data.sequence_length": run.data.sequence_length,
            "batch.global_size": run.batch.global_size,
            "seed": run.seed,
        }

    def train(self, state: TrainState, log: Log, stop_requested: SignalFlag) -> None:
        """Fit, then write and check what was trained. `result.json` tells the end, whatever it was."""
        from distft.data.batches import Prefetch
        from distft.loop import Fit
        from distft.perf import peak_flops

        for note in self.notes:
            log.say(note)
        log.say(
            f"{self.run.strategy.name} on {self.world.size} rank{'s' if self.world.size > 1 else ''}, {self.precision}, "
            f"{self.num_trained:,} trained parameters; {self.run_dir}"
        )
        if state.step:
            log.say(f"Going on after step {state.step} of {self.num_steps}")
        peak = peak_flops(self.world.device, self.precision)
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
            save=self.save,
            stop_requested=stop_requested,
            flops=self.cost.of_step,
            peak_flops=peak * self.world.size if peak else None,
        )
        try:
            status = fit.run()
            samples = self.finish(status, state, log)
        except Stop as stop:
            self.write_result(stop.status, state)
            log.finish(stop.status, summary_of(state))
            raise
        self.write_result(status, state, final=self.run_dir / "final")
        log.finish(status, summary_of(state))
        if self.world.is_main:
            tell_the_end(self.run, self.run_dir, state, samples)

    def save(self, state: TrainState) -> None:
        """A checkpoint; the first one of a process is read again and compared bit for bit with what is trained."""
        from distft.checkpoint.state import save, verify_saved

        keep, engine = self.run.checkpoint.keep, self.run.strategy.name
        folder = save(self.run_dir, self.strategy, state, self.world, keep=keep, engine=engine)
        if not self.compared_a_checkpoint:
            verify_saved(folder, self.strategy, self.world)
            self.compared_a_checkpoint = True

    def finish(self, status: str, state: TrainState, log: Log) -> list[dict[str, str]]:
        """Write `final/` and compare it with what was trained, then sample answers. Collective."""
        from distft.checkpoint.layout import step_folder
        from distft.checkpoint.state import load
        from distft.data.template import stop_ids
        from distft.evaluation.samples import sample_answers, take_probe
        from distft.model.final import check_final, save_final
        from distft.model.folder import read_tokenizer

        run, strategy, world = self.run, self.strategy, self.world
        if status == "early_stopped" and state.best_step not in (None, state.step):
            load(step_folder(self.run_dir, state.best_step), strategy, world, say=log.say)
            log.say(f"Early stopping: the best weights, those of step {state.best_step}, become the final ones")
        tokenizer = read_tokenizer(Path(self.prepared.tokenizer_folder), run.model.trust_remote_code)
        probe = take_probe(strategy, self.data.eval or self.data.train, len(tokenizer), world)
        gathered = strategy.gather()
        verdict = Verdict()
        if world.is_main:
            with verdict:
                tensors = ((name, tensor) for name, tensor in gathered if tensor is not None)
                hashes = save_final(self.run_dir / "final", Path(self.prepared.model_folder), run, tensors, tokenizer)
        for _ in gathered:  # the other ranks' part; and the rest of it where writing failed
            pass
        if world.is_main and verdict.stop is None:
            with verdict:
                check_final(self.run_dir / "final", hashes, probe, run, self.precision)
        verdict.agree(world)
        if not run.eval.samples or not self.data.eval:
            return []
        samples = sample_answers(
            strategy,
            self.data.eval,
            tokenizer,
            sorted(stop_ids(tokenizer)),
            run.eval.samples,
            run.eval.max_new_tokens,
            run.data.sequence_length,
            world,
        )
        log.samples(state.step, samples)
        return samples

    def write_result(self, status: str, state: TrainState, final: Path | None = None) -> None:
        """`result.json`, written at once or not at all."""
        if not self.world.is_main:
            return
        result = {
            "status": status,
            "steps": state.step,
            "metrics": summary_of(state),
            "final": str(final) if final else None,
            "sources": {
                name: {"tokens": tokens, "supervised_tokens": state.source_supervised[name]}
                for name, tokens in state.source_tokens.items()
            },
            "config_hash": state.config_hash,
            "data_hash": self.prepared.data_hash,
        }
        staged = self.run_dir / f"{RESULT}.tmp"
        staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        staged.replace(self.run_dir / RESULT)


class Verdict:
    """What went wrong on rank 0 while the others wait: caught, so that all ranks end alike and none hangs."""

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
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


def refuse_another_run(saved: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> None:
    """A resumed run must see the same bins in the same order."""
    changed = [f"{knob} was {saved[knob]}, is {now[knob]}" for knob in now if saved.get(knob) != now[knob] and knob not in allowed]
    if changed:
        raise UserMistake(
            f"resume: the checkpoint belongs to another run: {'; '.join(changed)}. Set the knob back, start anew with "
            f"resume=never and another run.dir, or accept the change with resume_allow=[{changed[0].split()[0]}]."
        )


def summary_of(state: TrainState) -> dict[str, Any]:
    """`best`: the best value of checkpoint.best; evaluation before training and at the end."""
    return {
        "best": state.best,
        "best_step": state.best_step,
        "first": state.first_evaluation,
        "last": state.last_evaluation,
        "skipped": state.skipped,
    }


def tell_the_end(run: Run, run_dir: Path, state: TrainState, samples: Sequence[dict[str, str]]) -> None:
    """The last lines: what changed, one answer, where the model lies, what to type next."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    first, last = state.first_evaluation, state.last_evaluation
    console.print()
    if first and last:
        console.print(f"Evaluation loss {first['loss']:.4f} -> {last['loss']:.4f} after {state.step} steps")
    elif last:
        console.print(f"Evaluation loss {last['loss']:.4f} after {state.step} steps")
    if samples:
        sample = samples[0]
        console.print(Text(f"Asked     {one_line(sample['prompt'])}"))
        console.print(Text(f"Answered  {one_line(sample['answer'])}"))
        console.print(Text(f"Reference {one_line(sample['reference'])}"))
    console.print(f"The model lies in {run_dir / 'final'}")
    console.print(f'Ask it:   distft generate {shlex.quote(str(run_dir / "final"))} prompt="…"')
    if run.data.format == "python_docs":
        console.print("Yours:    deepspeed train.py model=hf model.path=<folder or hub id> data=jsonl data.path=<rows.jsonl> tuning=lora")


def one_line(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"

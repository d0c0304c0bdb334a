"""`distft <verb> [sub-verb] [paths…] key=value…`. The verbs are imported when they are called."""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import __version__, errors
from distft.config.redact import redact
from distft.deferred import defer
from distft.errors import Mistakes, Stop, UserMistake
from distft.rank import be_rank, in_process, told

if TYPE_CHECKING:
    from distft.config.load import Composed

USAGE = """\
distft fine-tunes Hugging Face language models with DDP, DeepSpeed ZeRO or FSDP2.

  distft train [key=value …] [-m]        fine-tune; with -m and several values, a sweep
  distft data prepare [key=value …]      read and tokenise the data of a run, on any machine
  distft data show [key=value …]         rows as the model sees them (show.rows=3)
  distft generate <folder> [key=value …] answer a prompt with a trained model
  distft verify <folder> [key=value …]   tell whether a checkpoint, model or adapter is what was saved
  distft report <sweep folder>           compare the jobs of a sweep: a table, a page, and whether there is a winner
  distft check run=<run folder>          prove what distft promises on a run's own model and data; or [key=value …]
  distft doctor [key=value …]            tell whether a run would start on these machines, and what would slow it down
  distft preflight <config.yaml>         check a run's snapshot without a GPU

distft train --help lists every knob. Exit codes: 0 done, 1 a bug, 2 your mistake, 3 a check said no,
4 stopped by a guard, 5 stalled, 137 ended at once, 143 saved after a signal.
"""

typed = list(sys.argv)  # before Hydra is given another
swept: set[str] = set()  # knobs that a sweep gives several values
ended_with = errors.DONE  # of the last job that Hydra ran in this process


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit code; a deliberate end prints its message alone."""
    argv = list(sys.argv[1:] if argv is None else argv)
    defer()
    gc.set_threshold(50_000)  # what imports make lives on: looking it over again and again is a tenth of the start
    try:
        return verb_of(argv)(argv)
    except Stop as stop:
        return told(stop)
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.DONE
    except KeyboardInterrupt:
        sys.stderr.write("distft: interrupted\n")
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return errors.BUG


def verb_of(argv: list[str]) -> Callable[[list[str]], int]:
    """The verb that a command line names; the word is taken off it. Launchers' `--local_rank=N` may stand before it."""
    words = [word for word in argv if not word.startswith("-")]
    if "--version" in argv:
        return version
    if any(word in ("-sc", "--shell-completion") for word in argv[:1]):
        return train
    if not words or (argv[0] in ("-h", "--help")):
        return usage
    verb = words[0]
    if verb not in VERBS:
        from distft.config.words import nearest

        near = nearest(verb, VERBS)
        raise UserMistake(
            f"{verb} is no verb of distft." + (f" Did you mean {near}?" if near else f" There are: {', '.join(VERBS)}.")
        )
    argv.remove(verb)
    return VERBS[verb]


def usage(argv: list[str]) -> int:
    print(USAGE, end="")
    return errors.DONE


def version(argv: list[str]) -> int:
    print(f"distft {__version__}")
    return errors.DONE


def train(argv: list[str]) -> int:
    """As a rank if a launcher made this process one, else as the controller."""
    from distft.launch.topology import place_of

    place = place_of(os.environ)
    if place is None or shows_only(argv):
        return control(argv)
    if "-m" in argv or "--multirun" in argv:
        from distft.launch.sweep import run_sweep

        return run_sweep(argv, place)
    return be_rank(argv, place, command_of())


def shows_only(argv: list[str]) -> bool:
    flags = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
    return any(word.partition("=")[0] in flags for word in argv)


def command_of() -> list[str]:
    """The command line as it was typed, as far as a process can know it."""
    from distft.launch.array import COMMAND
    from distft.launch.worker import without_local_rank

    if told := os.environ.get(COMMAND):  # a job of a sweep, in a process that another program has started
        return shlex.split(told)
    words = without_local_rank(typed)
    if words[0].endswith("__main__.py"):
        return ["python", "-m", "distft", *words[1:]]
    return ["python", *words] if words[0].endswith(".py") else words


def control(argv: list[str]) -> int:
    """The controller: compose with our errors, then hand over to Hydra's main, which knows help, sweeps and plugins."""
    global ended_with
    from distft.config.check import check
    from distft.launch import array
    from distft.launch.jobs import compose_sweep, sweep_verdict
    from distft.launch.worker import read_arguments
    from distft.parent import follow_controller
    from distft.sweep import plugins, rules

    if any(word.startswith("--snapshot") for word in argv):
        return run_snapshot(argv)
    follow_controller()  # a sweep whose jobs run side by side
    composed = compose_sweep(read_arguments(argv).overrides)
    if not composed.line.shows_only:
        problems = check(composed.run) + rules.problems(composed) + array.problems(composed)
        if problems:
            raise Mistakes(list(dict.fromkeys(problems)))
        composed = rules.settled(composed)
    ended_with = errors.DONE
    if composed.line.sweep:
        plugins.register()
    swept.update(override.key_or_group for override in composed.line.parsed if override.is_sweep_override())
    with array.handed_over(composed, command_of()):
        hand_over(composed, "train")
    if composed.sweep_dir is not None and not composed.line.shows_only:
        array.note_lost(composed)
        return sweep_verdict(Path(composed.sweep_dir))
    return ended_with


def run_snapshot(argv: list[str]) -> int:
    """`distft train --snapshot=…` outside any launcher: the world is this process."""
    from distft.config.check import settle
    from distft.launch import lock, output, worker

    arguments = worker.read_arguments(argv)
    assert arguments.snapshot is not None
    run_dir = arguments.snapshot.absolute().parent
    run = settle(worker.read_run(arguments))
    lock.take(run_dir)
    output.keep(run_dir, 0)
    return in_process(run, run_dir, arguments.prepared)


def hand_over(composed: Composed, verb: str) -> None:
    """Let Hydra's own main run: it shows, or calls `job` once or once a job of a sweep. The help is our own."""
    from distft.config.load import conf_dir, help_of

    if composed.line.flags.help:
        print(help_of(composed, verb))
        return
    import hydra

    before = sys.argv
    sys.argv = [before[0], *composed.hydra_argv]
    try:
        hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")(job)()
    finally:
        sys.argv = before


def job(cfg: Any) -> float | None:
    """One run under Hydra. A job of a sweep never raises: the others go on; its value is the sweeper's objective."""
    global ended_with
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from distft.config.load import to_run
    from distft.launch import lock
    from distft.launch.controller import start_run
    from distft.launch.jobs import note_job

    hydra_config = HydraConfig.get()
    sweeps = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.runtime.output_dir) if sweeps else None
    overrides = list(hydra_config.overrides.task)
    if sweeps:
        chosen = [word for word in overrides if word.partition("=")[0].lstrip("+") in swept] or overrides
        print(redact(f"distft: job {hydra_config.job.num}: {' '.join(chosen)}"), flush=True)
    try:
        ended_with = start_run(to_run(cfg), command_of(), in_process, folder)
    except Stop as stop:
        ended_with = told(stop)
    except Exception:
        traceback.print_exc()
        ended_with = errors.BUG
    finally:
        lock.release()
    if folder is None:
        return None
    value = note_job(Path(hydra_config.sweep.dir), int(hydra_config.job.num), overrides, folder, ended_with)
    if ended_with == errors.SAVED_AFTER_SIGNAL:
        raise SystemExit(ended_with)  # the signal meant the sweep
    return value


def preflight(argv: list[str]) -> int:
    """`distft preflight <config.yaml>`: of a run folder, as the controller has it done."""
    from distft.config.check import settle
    from distft.config.load import read_snapshot
    from distft.launch import lock
    from distft.parent import follow_controller
    from distft.verbs.preflight import preflight as verb

    follow_controller()
    paths = [word for word in argv if not word.startswith("-")]
    if len(paths) != 1:
        raise UserMistake("distft preflight takes one path: the config.yaml of a run folder.")
    snapshot = Path(paths[0]).absolute()
    if snapshot.is_dir():
        snapshot = snapshot / "config.yaml"
    run = settle(read_snapshot(snapshot))
    lock.take(snapshot.parent)
    verb(run, snapshot.parent)
    return errors.DONE


def data(argv: list[str]) -> int:
    """`distft data prepare|show`."""
    from distft.config.check import check, settle
    from distft.config.load import compose
    from distft.verbs.data import main as verb
    from distft.verbs.data import words_of

    sub, rows, rest = words_of(argv)
    composed = compose(rest)
    if composed.line.shows_only:
        hand_over(composed, "train")
        return errors.DONE
    problems = check(composed.run)
    if problems:
        raise Mistakes(problems)
    return verb(settle(composed.run), sub, rows)


def of_folder(name: str, kinds: str, argv: list[str]) -> int:
    """A verb that takes one folder and the knobs of its own schema."""
    from distft.config.load import compose

    folders = [word for word in argv if not word.startswith("-") and "=" not in word]
    if len(folders) != 1 and not shows_only(argv):
        raise UserMistake(f"distft {name} takes one folder: {kinds}.")
    composed = compose([literal(word) for word in argv if word not in folders], verb=name)
    if composed.line.shows_only:
        hand_over(composed, name)
        return errors.DONE
    return int(importlib.import_module(f"distft.verbs.{name}").main(composed.run, folders[0]))


def check(argv: list[str]) -> int:
    """`distft check run=<run folder> [key=value …]` or `distft check [key=value …]`."""
    from distft.config.load import compose
    from distft.verbs.check import main as verb
    from distft.verbs.check import overrides_of
    from distft.verbs.preflight import preflight

    source, words = overrides_of(argv)
    composed = compose(words, verb="check")
    if composed.line.shows_only:
        hand_over(composed, "check")
        return errors.DONE
    return verb(composed, source, preflight)


def doctor(argv: list[str]) -> int:
    """`distft doctor [key=value …]`: as a rank if a launcher made this process one, else it starts ranks itself."""
    from distft.config.load import compose
    from distft.launch.topology import place_of
    from distft.launch.worker import without_local_rank
    from distft.verbs.doctor import main as verb

    words = without_local_rank(argv)
    composed = compose(words, verb="doctor")
    if composed.line.shows_only:
        hand_over(composed, "doctor")
        return errors.DONE
    return verb(composed, words, place_of(os.environ))


def literal(word: str) -> str:
    """A question as it was typed: its commas and quotes mean nothing to Hydra's grammar."""
    from distft.launch.start import quoted

    name, _, text = word.partition("=")
    if name not in ("prompt", "system") or (text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1):
        return word
    return f"{name}={quoted(text)}"


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "data": data,
    "generate": partial(of_folder, "generate", "the final/ of a run, or any model's folder"),
    "verify": partial(of_folder, "verify", "a run's, a checkpoint, a model or an adapter"),
    "report": partial(of_folder, "report", "a sweep's, such as multirun/2030-01-31_18-00-00"),
    "check": check,
    "doctor": doctor,
    "preflight": preflight,
}

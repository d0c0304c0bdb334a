"""Start the ranks of one machine, watch them, pass signals on, and say how it ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from distft import errors
from distft.launch.topology import environment_of, free_port

Process = subprocess.Popen[bytes]

CRASH_SECONDS = 6.0  # what the other ranks get to fail by themselves once one has crashed, then they are killed
STOP_SECONDS = 60.0  # the same after a deliberate end: rank 0 may still be writing a checkpoint or its tracker's files
DELIBERATE = (
    errors.USER_MISTAKE,
    errors.NEGATIVE_VERDICT,
    errors.STOPPED_BY_GUARD,
    errors.STALLED,
    errors.SAVED_AFTER_SIGNAL,
)
STATUS_FOLDER = "DISTFT_STATUS"  # where ranks under another launcher leave their process id and exit code
PARENT = "DISTFT_PARENT"  # the controller's process id: a rank ends when it does


@dataclass(frozen=True)
class Command:
    """One process to start: its arguments and what is added to the environment."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """In the form that a shell takes."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.argv)])


def quoted(text: str) -> str:
    """Text as a value in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def package_path() -> dict[str, str]:
    """What children need to import this very distft, also when it is run from a checkout that is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "")
    if "site-packages" in root or root in paths.split(os.pathsep):
        return {}
    return {"PYTHONPATH": os.pathsep.join([root, paths]) if paths else root}


def verb_command(*words: str) -> Command:
    """`distft …` in a process of its own."""
    return Command([sys.executable, "-m", "distft", *words], package_path())


def worker_commands(engine: str, size: int, snapshot: Path, resume: str | None) -> list[Command]:
    """The processes of one run: a command for each rank, or the one of a foreign launcher that starts them.

    `resume`: a checkpoint or run folder that is not written in the snapshot.
    """
    port = free_port()
    words = ["train", f"--snapshot={snapshot}", "--prepared", *([f"--resume={resume}"] if resume else [])]
    if engine == "direct":
        return [
            Command([sys.executable, "-m", "distft", *words], {**package_path(), **environment_of(rank, size, port)})
            for rank in range(size)
        ]
    settings = environment_of(0, size, port)
    shared = {name: value for name, value in settings.items() if name.startswith(("OMP_", "GLOO_"))}
    if engine == "deepspeed":
        launcher = ["-m", "deepspeed.launcher.runner", f"--num_gpus={size}", f"--master_port={port}", "--no_local_rank"]
        launcher += ["--module", "distft"]
    else:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--master-addr=127.0.0.1"]
        launcher += [f"--master-port={port}", "-m", "distft"]
    return [Command([sys.executable, *launcher, *words], {**package_path(), **shared})]


class Signals:
    """SIGTERM and SIGINT of the controller while ranks run: noted, to be passed on."""

    def __init__(self) -> None:
        self.received: list[int] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def start(commands: list[Command], logs: Path, quiet: bool, environment: dict[str, str]) -> list[Process]:
    """Start the processes. Rank 0 has the terminal; with `quiet` the others write into logs/rank-N.log alone.

    Each process leads a group of its own, so that a terminal's Ctrl-C reaches the controller alone, which passes it
    on once.
    """
    processes = []
    with ExitStack() as files:
        for rank, command in enumerate(commands):
            output = files.enter_context((logs / f"rank-{rank}.log").open("ab")) if quiet and rank > 0 else None
            processes.append(
                subprocess.Popen(
                    command.argv,
                    env={**os.environ, **command.environment, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    process_group=0,
                )
            )
    return processes


def watch(
    processes: list[Process],
    signals: Signals,
    send: Callable[[int], None],
    kill: Callable[[], None],
) -> tuple[list[int], int | None]:
    """Wait for all processes. Returns their exit codes and the rank that failed first, if one did.

    The first signal is passed on with `send`, a second one a second later or more ends everything. When one process
    has failed, the others get a few seconds to end by themselves: whoever waits for a dead rank never comes back.
    """
    first_failure: int | None = None
    deadline = float("inf")
    passed_on, passed_on_at = 0, 0.0
    while any(process.poll() is None for process in processes):
        if len(signals.received) > passed_on:
            if passed_on == 0:
                send(signals.received[0])
                passed_on_at = time.monotonic()
            elif time.monotonic() - passed_on_at > 1:
                deadline = 0
            passed_on = len(signals.received)
        for rank, process in enumerate(processes):
            code = process.poll()
            if code not in (None, 0) and first_failure is None:
                first_failure = rank
                orderly = code in DELIBERATE and code != errors.STALLED  # nobody comes back from a stall
                deadline = time.monotonic() + (STOP_SECONDS if orderly else CRASH_SECONDS)
        if time.monotonic() > deadline:
            kill()
            deadline = float("inf")
        time.sleep(0.05)
    codes = [process.wait() for process in processes]
    if first_failure is None:
        first_failure = next((rank for rank, code in enumerate(codes) if code), None)
    return codes, first_failure


def kill_groups(processes: list[Process]) -> None:
    """End what is still there, with its own children: each process leads its group."""
    for process in processes:
        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def run_direct(commands: list[Command], run_dir: Path, signals: Signals) -> int:
    """Start the ranks ourselves. Returns the exit code of the run."""
    logs = run_dir / "logs"
    with signals.caught():
        processes = start(commands, logs, quiet=True, environment={PARENT: str(os.getpid())})

        def send(number: int) -> None:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        codes, failed = watch(processes, signals, send, lambda: kill_groups(processes))
    by_signal = {-signal.SIGTERM, -signal.SIGINT, errors.SAVED_AFTER_SIGNAL, 0}
    if signals.received and failed is not None and by_signal.issuperset(codes):
        return errors.SAVED_AFTER_SIGNAL
    return verdict(dict(enumerate(codes)), failed, logs)


def run_launcher(command: Command, run_dir: Path, signals: Signals, status: Path) -> int:
    """Start the ranks through deepspeed or torchrun.

    These lose signals and change exit codes, so each rank leaves its process id and its exit code in `status`: signals
    go to the ranks themselves, and rank 0's own code is the run's.
    """
    with signals.caught():
        processes = start([command], run_dir / "logs", quiet=False, environment={STATUS_FOLDER: str(status)})

        def send(number: int) -> None:
            for pid in numbers_in(status, "pid").values():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

        def kill() -> None:
            send(signal.SIGKILL)
            kill_groups(processes)

        [code], _ = watch(processes, signals, send, kill)
    if code == 0:
        return errors.DONE
    codes = numbers_in(status, "exit")
    failed = 0 if codes.get(0) else next((rank for rank, value in codes.items() if value), None)
    return verdict(codes, failed, run_dir / "logs") if failed is not None else errors.BUG


def numbers_in(status: Path, kind: str) -> dict[int, int]:
    """Process ids or exit codes that ranks left behind, by rank."""
    found = {}
    for path in status.glob(f"rank-*.{kind}"):
        text = path.read_text()
        if text:
            found[int(path.stem.removeprefix("rank-"))] = int(text)
    return dict(sorted(found.items()))


def verdict(codes: dict[int, int], failed: int | None, logs: Path) -> int:
    """The run's exit code from those of its ranks. What rank 0 has not said itself is said here."""
    if failed is None:
        return errors.DONE
    if codes.get(0) in DELIBERATE:
        return codes[0]
    code = codes[failed]
    if failed != 0:
        sys.stderr.write(f"distft: rank {failed} {how(code)}.\n")
        tail = last_lines(logs / f"rank-{failed}.log")
        if tail and code > 0:
            sys.stderr.write(f"The last lines of {logs / f'rank-{failed}.log'}:\n{tail}\n")
    elif code < 0:
        sys.stderr.write(f"distft: rank 0 {how(code)}.\n")
    return code if code in DELIBERATE else errors.BUG


def how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = ": often the kernel, when memory has run out (see dmesg)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{cause}"


def last_lines(path: Path, count: int = 20) -> str:
    if not path.is_file():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])

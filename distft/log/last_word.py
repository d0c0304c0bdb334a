"""The word about a run whose own tracker can say nothing any more: a stall, or the end of a rank 0 that was killed.

Whoever saw it starts this module as a process of its own, which opens the same W&B run, sends the alert and leaves.
It has LONGEST seconds: a server that does not answer keeps nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from distft.heartbeat import this_machine

LONGEST = 40.0  # seconds
SERVICE_SECONDS = 5.0  # that W&B gets to send what it still has
ANSWER_SECONDS = 15.0  # to reach the server; then the alert is recorded offline
SESSION = "distft.json"  # in the run's wandb/: the W&B run's id, what it wants to be told, whether it said its own end


def session_file(run_dir: Path) -> Path:
    return run_dir / "wandb" / SESSION


def read_session(run_dir: Path) -> dict[str, Any]:
    """What the tracker noted of its W&B run; empty where there is none."""
    try:
        return dict(json.loads(session_file(run_dir).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def note_session(run_dir: Path, session: Mapping[str, Any]) -> None:
    path = session_file(run_dir)
    staged = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(session), encoding="utf-8")
        staged.replace(path)


def of_stall(run_dir: Path, sentence: str, environment: Mapping[str, str], wait: bool = True) -> None:
    """`environment`: what a process needs to import distft. Without `wait` it goes on beside whatever follows."""
    speak(run_dir, {"kind": "stall", "status": "stalled", "sentence": sentence}, environment, wait)


def of_end(run_dir: Path, status: str, sentence: str, environment: Mapping[str, str]) -> None:
    """Nothing where the run's own tracker has said its end, or a stall was told already."""
    if not read_session(run_dir).get("ended", True):
        kind = "stall" if status == "stalled" else "end"
        speak(run_dir, {"kind": kind, "status": status, "sentence": sentence}, environment, wait=True)


def end_service(session: Mapping[str, Any]) -> None:
    """End what W&B left behind of a process that was killed: about a dead server it would go on for hours."""
    if session.get("machine") != this_machine() or psutil.pid_exists(session["process"]):
        return
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if words and words[0].endswith("wandb-core") and str(session["process"]) in words:
                process.wait(SERVICE_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
        except psutil.Error:
            continue


def speak(run_dir: Path, what: Mapping[str, str], environment: Mapping[str, str], wait: bool) -> None:
    """Have it said by a process of its own."""
    session = read_session(run_dir)
    if not session:
        return
    if wait:
        end_service(session)
    process = subprocess.Popen(
        [sys.executable, "-m", "distft.log.last_word", str(run_dir), json.dumps(what)],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    if not wait:
        return
    try:
        process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):  # W&B's own process too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(folder: str, what: str) -> int:
    """Open the W&B run of this run folder, say it, and close it as failed."""
    signal.alarm(int(LONGEST))  # the kernel ends this process, whatever it is in
    from distft.config.load import read_snapshot
    from distft.log.wandb import WandbTracker

    run_dir, told = Path(folder), json.loads(what)
    session = read_session(run_dir)
    tracker = WandbTracker(read_snapshot(run_dir / "config.yaml"), run_dir, {}, session["id"], 0, lambda text: None)
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(ANSWER_SECONDS))
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(ANSWER_SECONDS))
    tracker.load()
    tracker.start()
    if told["kind"] in session.get("alerts", []):
        tracker.alert(f"{'Stalled' if told['kind'] == 'stall' else 'Ended'}: {tracker.name}", told["sentence"], "ERROR")
    tracker.finish(told["status"], {"reason": told["sentence"]})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""What a run leaves behind and shows, read back as a viewer would."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distft.config.redact import HIDDEN, redact, redact_tree
from distft.config.schema import Run
from distft.log import Log, background
from distft.log.background import Background
from distft.log.lines import Lines
from distft.log.screen import clock, short, told
from distft.world import World
from tests.unit.wandb_offline import read

ROOT = Path(__file__).parents[2]
FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"
FAKE_HF = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEF"

# A run in a process of its own: its folder, then which step it goes on from and the W&B run's id.
SESSION = """
import os, sys, time
from pathlib import Path
from distft.config.schema import Run
from distft.log import Log
from distft.world import World

folder, tracker, resumed, wandb_id = sys.argv[1:5]
run = Run()
run.log.tracker, run.log.group, run.log.tags = tracker, "a-sweep", ["one", "two"]
run.optim.lr = 1e-3
run.strategy.deepspeed = {"note": "https://someone:passphrase@host/path", "token": "FAKE_HF"}
first = int(resumed) if resumed else 0
log = Log(run, Path(folder), World(0, 1, 0, 0, 1, None), 6, int(resumed) if resumed else None, wandb_id or None)
print("id", log.wandb_id)
slowest = 0.0
for step in range(first, 7):
    started = time.perf_counter()
    if step > first:
        log.train(step, {"loss": 1 / step, "grad_norm": float("nan") if step == 2 else 0.5, "seconds": 0.01, "mfu": 0.4,
                         "tokens_per_second": 1000 * step, "memory_peak_bytes": 2**30, "source/docs/loss": 0.1 * step})
    if step in (0, 3, 6):
        log.evaluation(step, {"loss": 3.0 - step / 6, "source/docs/loss": 1.5})
        log.samples(step, [{"prompt": "p", "answer": f"a{step}"}, {"prompt": "q", "answer": "b"}])
    if step == 4 and "CRASHES" not in os.environ:
        log.spike("the loss leapt")
    slowest = max(slowest, time.perf_counter() - started)
    if str(step) == os.environ.get("CRASHES"):
        while not log.tracker.queue.empty():
            time.sleep(0.1)
        time.sleep(4)  # W&B's process writes every two seconds
        os._exit(0)
    time.sleep(0.2 * (tracker == "wandb"))
log.say("the end is near")
log.finish("done", {"eval/best": 2.0, "eval/last": 2.0})
log.finish("failed", {})
print("slowest", slowest)
""".replace("FAKE_HF", FAKE_HF)


def session(folder: Path, tracker: str, resumed: str = "", wandb_id: str = "", **environment: str) -> str:
    """Run SESSION with fake secrets around; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    finished = subprocess.run(
        [sys.executable, "-c", SESSION, str(folder), tracker, resumed, wandb_id],
        env={**clean, "HF_TOKEN": FAKE_HF, "HOME": str(folder), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def world(rank: int = 0) -> World:
    import torch

    return World(rank, 2, rank, rank, 2, torch.device("cpu"))


def untracked() -> Run:
    run = Run()
    run.log.tracker = "none"
    return run


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


# metrics.jsonl


def test_numbers_keep_every_bit_and_stay_json(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-45, 2.0**-1074, 1e308, 3.0000000000000004, -0.0]
    log = Log(untracked(), tmp_path, world(), 10)
    log.train(1, {"loss": float("nan"), "grad_norm": float("inf"), "other": -float("inf"), "values": values})
    log.finish("done", {})
    (record,) = records(tmp_path / "metrics.jsonl")
    assert record == {
        "step": 1,
        "split": "train",
        "loss": "NaN",
        "grad_norm": "Infinity",
        "other": "-Infinity",
        "values": values,
    }
    assert [value.hex() for value in record["values"]] == [value.hex() for value in values]
    assert float(record["grad_norm"]) == float("inf")
    with pytest.raises(ValueError, match="NaN is not JSON"):  # what json.dumps writes by itself
        json.loads(json.dumps(float("nan")), parse_constant=refuse_constant)


def test_records_are_there_before_the_run_ends(tmp_path: Path) -> None:
    log = Log(untracked(), tmp_path, world(), 10)
    log.train(1, {"loss": 1.0})
    assert len(records(tmp_path / "metrics.jsonl")) == 1
    log.finish("done", {})


def test_resume_moves_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": split}) for step in range(5) for split in ("train", "eval")]
    path.write_text("\n".join(lines) + '\n{"step": 5, "spl')  # killed while writing
    log = Log(untracked(), tmp_path, world(), 10, resumed_step=3)
    assert path.read_text().splitlines() == lines[:8]
    abandoned = tmp_path / "metrics.abandoned.jsonl"
    assert abandoned.read_text().splitlines() == [*lines[8:], '{"step": 5, "spl']
    log.train(4, {"loss": 1.0})
    log.finish("done", {})
    assert [record["step"] for record in records(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_a_second_resume_adds_to_what_was_abandoned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        file = Lines(path, resumed_step=1)
        for step in (2, 3):
            file.write({"step": step})
        file.close()
    assert Lines(path, resumed_step=3).num_before == 4  # nothing lies past step 3: nothing moves
    assert [record["step"] for record in records(path)] == [2, 3]
    assert [record["step"] for record in records(tmp_path / "metrics.abandoned.jsonl")] == [2, 3]


def test_starting_anew_abandons_everything(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "split": "eval"}\n')
    log = Log(untracked(), tmp_path, world(), 10)
    log.finish("done", {})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert len(records(tmp_path / "metrics.abandoned.jsonl")) == 1


def test_other_ranks_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(untracked(), tmp_path, world(rank=1), 10) as log:
        log.train(1, {"loss": 1.0})
        log.evaluation(1, {"loss": 1.0})
        log.samples(1, [{"prompt": "p"}])
        log.say("not heard")
    assert log.wandb_id is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# the screen


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(untracked(), tmp_path, world(), 400) as log:
        log.say("a note with [brackets] that stay")
        log.evaluation(0, {"loss": 8.25, "source/a/loss": 8.0, "source/b/loss": 8.5, "supervised_tokens": 3})
        record = {"loss": 2.5, "grad_norm": 1.25, "learning_rate": 2e-4, "tokens_per_second": 12345.0, "seconds": 2.0}
        log.train(10, {**record, "memory_peak_bytes": 3 << 30, "mfu": 0.4125, "skipped": 2})
    assert capsys.readouterr().out.splitlines() == [
        "a note with [brackets] that stay",
        "evaluation after step 0: loss 8.2500 (a 8.0000, b 8.5000)",
        "step  10/400  loss 2.5000  norm 1.25  lr 2.00e-04  12.3k tokens/s  41.2% MFU  3.0 GiB  2 skipped  13:00 left",
    ]


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(tmp_path), "none", "", ""],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "160"},
        stdout=terminal,
    )
    os.close(terminal)
    seen = b""
    while child.poll() is None or select.select([main], [], [], 0.2)[0]:
        if select.select([main], [], [], 0.2)[0]:
            try:
                seen += os.read(main, 65536)
            except OSError:  # the other end is closed
                break
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "6/6" in text
    assert re.search(r"━+ +loss 0\.1667 .* 40\.0% MFU +1\.0 GiB", text)
    assert "0:00 left" in text
    assert "evaluation after step 3" in text
    assert "the end is near" in text
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l") > -1  # the cursor is back


def test_words_for_numbers() -> None:
    words = ["0", "7.25", "999", "12.3k", "2.5M", "3.1T"]
    assert [short(number) for number in (0, 7.25, 999, 12345, 2_500_000, 3.1e12)] == words
    assert [clock(seconds) for seconds in (-3, 5, 65, 3725)] == ["0:00", "0:05", "1:05", "1:02:05"]


def test_a_narrow_terminal_shows_less() -> None:
    record = {"loss": 2.5, "grad_norm": 1.25, "learning_rate": 2e-4, "tokens_per_second": 1e3, "mfu": 0.5}
    assert told(record) == "loss 2.5000  norm 1.25  lr 2.00e-04  1k tokens/s  50.0% MFU"
    assert told(record, 50) == "loss 2.5000  lr 2.00e-04  1k tokens/s  50.0% MFU"
    assert told(record, 40) == "loss 2.5000  lr 2.00e-04  1k tokens/s"
    assert told(record, 3) == "loss 2.5000"


# W&B


def assert_no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        for secret in (FAKE_KEY, FAKE_HF, "passphrase"):
            assert secret.encode() not in content, f"{secret} in {path}"


def test_wandb_offline_without_a_key_and_again_on_resume(tmp_path: Path) -> None:
    first = session(tmp_path, "wandb")
    wandb_id = re.findall(r"id (\w{8})", first)[0]
    second = session(tmp_path, "wandb", "3", wandb_id)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    one, two = (read(folder) for folder in folders)

    for run, printed, folder in zip((one, two), (first, second), folders, strict=True):
        assert run.id == wandb_id
        assert (run.name, run.project, run.group, run.tags) == (tmp_path.name, "distft", "a-sweep", ["one", "two"])
        assert run.config["optim"]["lr"] == 1e-3
        assert run.config["world_size"] == 1
        assert run.config["strategy"]["deepspeed"] == {"note": f"https://{HIDDEN}@host/path", "token": HIDDEN}
        assert run.step_metrics == {"step": "", "train/*": "step", "eval/*": "step", "system/*": "step"}
        assert run.exit_code == 0
        assert {"status": "done", "eval/best": 2.0, "eval/last": 2.0}.items() <= run.summary.items()
        lines = [line for line in printed.splitlines() if "wandb" in line.lower() or "w&b" in line.lower()]
        assert lines == [f"W&B records offline. To send it: wandb sync {folder}"]

    def curve(run: Any, key: str) -> list[tuple[int, float]]:
        return [(row["step"], row[key]) for row in run.history if key in row]

    assert curve(one, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert curve(two, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(4, 7)]
    assert [step for step, _ in curve(one, "eval/loss")] == [0, 3, 6]
    for key in ("train/mfu", "train/memory_peak_bytes", "train/source/docs/loss", "train/tokens_per_second"):
        assert len(curve(one, key)) == 6, key
    # W&B drops records whose own number is not new; the second session must go on where the first one ended.
    numbers = [row["_step"] for run in (one, two) for row in run.history]
    assert len(set(numbers)) == len(numbers)
    assert numbers == sorted(numbers)

    tables = [row for row in one.history if "eval/samples.path" in row]
    assert [row["step"] for row in tables] == [0, 3, 6]
    table = json.loads((folders[0] / "files" / tables[1]["eval/samples.path"]).read_text())
    assert table == {"columns": ["step", "prompt", "answer"], "data": [[3, "p", "a3"], [3, "q", "b"]]}

    assert_no_secret(tmp_path)
    written = [path for path in tmp_path.iterdir() if path.name not in ("wandb", "metrics.jsonl", "samples.jsonl")]
    assert [path.name for path in sorted(written)] == ["logs", "metrics.abandoned.jsonl", "samples.abandoned.jsonl"]


def test_wandb_that_never_answers_stops_nothing(tmp_path: Path) -> None:
    """A key, and a server that accepts and stays silent: training is not held up and nothing is lost."""
    server = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        try:
            while True:
                held.append(server.accept()[0])
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    printed = session(tmp_path, "wandb", WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=address, WANDB_INIT_TIMEOUT="2")
    server.close()
    assert held, "W&B never tried"
    assert "W&B could not be reached" in printed
    assert float(re.findall(r"slowest (\S+)", printed)[0]) < 1.5, "no call waits: that would take 2 s and more"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["step"] for row in read(folder).history if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert_no_secret(tmp_path)


# TensorBoard


def test_tensorboard_curves_go_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session(tmp_path, "tensorboard")
    time.sleep(1.1)  # event files are named by the second
    session(tmp_path, "tensorboard", "3")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in events.Scalars("eval/loss")] == [0, 3, 3, 6]
    assert [point.value for point in events.Scalars("train/mfu")] == [pytest.approx(0.4)] * 6
    text = events.Tensors("eval/samples/0/text_summary")[-1]
    assert text.step == 6
    assert b"a6" in text.tensor_proto.string_val[0]


# a tracker that fails or hangs


class Recorder:
    """A tracker that keeps what it is told, and breaks or hangs where it is told to."""

    def __init__(self, fails_at: str = "", hangs_at: str = "") -> None:
        self.calls: list[str] = []
        self.abandoned = False
        self.fails_at, self.hangs_at = fails_at, hangs_at
        self.released = threading.Event()

    def note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise OSError("no network")
        if name == self.hangs_at:
            self.released.wait()

    def load(self) -> None:
        self.note("load")

    def start(self) -> None:
        self.note("start")

    def metrics(self, split: str, step: int, record: dict[str, Any]) -> None:
        self.note(f"{split} {step}")

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.note(f"samples {step}")

    def abandon(self) -> None:
        self.abandoned = True

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self.note(status)


def tracked(recorder: Recorder) -> list[str]:
    """Three records and the end; returns what was said."""
    said: list[str] = []
    tracker = Background(recorder, "It", said.append)
    for step in range(3):
        tracker.call("metrics", "train", step, {})
    tracker.close("done", {})
    return said


def test_calls_arrive_in_order() -> None:
    recorder = Recorder()
    assert tracked(recorder) == []
    assert recorder.calls == ["load", "start", "train 0", "train 1", "train 2", "done"]
    assert not recorder.abandoned


@pytest.mark.parametrize("where", ["load", "start", "train 1"])
def test_a_failure_is_said_once_and_ends_the_tracker(where: str) -> None:
    recorder = Recorder(fails_at=where)
    said = tracked(recorder)
    assert said == ["It is off for the rest of this run (OSError: no network). Training and metrics.jsonl go on."]
    assert recorder.calls[-1] == where
    assert recorder.abandoned


def test_a_tracker_that_hangs_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LONGEST_END", 0.2)
    recorder = Recorder(hangs_at="train 0")
    started = time.perf_counter()
    said = tracked(recorder)
    assert time.perf_counter() - started < 2
    assert len(said) == 1
    assert "did not finish in time" in said[0]
    recorder.released.set()


def test_a_full_queue_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LONGEST_QUEUE", 2)
    recorder = Recorder(hangs_at="start")
    said: list[str] = []
    tracker = Background(recorder, "It", said.append)
    for step in range(10):
        tracker.call("metrics", "train", step, {})
    assert len(said) == 1
    assert "does not answer" in said[0]
    recorder.released.set()


# secrets


def test_secrets_are_hidden_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id_ed25519")
    assert redact(f"key={FAKE_KEY} and {FAKE_HF}") == f"key={HIDDEN} and {HIDDEN}"
    assert redact("s3://id:secretword@bucket/x") == f"s3://{HIDDEN}@bucket/x"
    harmless = "89abcdef0123456789abcdef0123456789abcdef false-but-long /home/me/.ssh/id_ed25519 task-12 sk-learn"
    assert redact(harmless) == harmless
    tree = {"a": [FAKE_KEY, 3, None], FAKE_HF: ("x", 2.5), "b": {"c": True}}
    assert redact_tree(tree) == {"a": [HIDDEN, 3, None], HIDDEN: ("x", 2.5), "b": {"c": True}}
    monkeypatch.delenv("WANDB_API_KEY")
    assert redact(FAKE_KEY) == FAKE_KEY  # bare hex is a secret only where the environment says so

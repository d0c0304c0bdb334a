"""Every way in, with real processes: the same run whatever started it, one folder, the exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distft import errors
from tests.small_run import SMALL, write_rows

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "train.py")
BIN = Path(sys.executable).parent
PYTHON = [sys.executable, TRAIN]
DISTFT = [sys.executable, "-m", "distft", "train"]
DEEPSPEED_1 = [str(BIN / "deepspeed"), TRAIN]
DEEPSPEED_2 = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29717", TRAIN]
TORCHRUN_2 = [str(BIN / "torchrun"), "--nproc_per_node", "2", TRAIN]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    place: Path  # the working folder

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def folder(self) -> Path:
        """The one run folder."""
        folders = sorted((self.place / "runs").iterdir())
        assert len(folders) == 1, folders
        return folders[0]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and a cache that all runs here share."""
    folder = tmp_path_factory.mktemp("ways")
    write_rows(folder / "rows.jsonl")
    return folder


def environment(shop: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_"))
    }
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DISTFT_CACHE": str(shop / "cache"),
        "TORCH_EXTENSIONS_DIR": str(shop / "compiled"),
    }


def words(shop: Path, *more: str) -> list[str]:
    given = [f"data.path={shop / 'rows.jsonl'}", "data=jsonl", "data.eval_fraction=0.2", *more]
    if not any(word.startswith("max_steps") for word in more):
        given.append("max_steps=2")
    return [*SMALL, *given]


Runner = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Run a command in a folder of its own."""

    def once(command: list[str]) -> Ended:
        place = tmp_path_factory.mktemp("place")
        answer = subprocess.run(
            command, cwd=place, env=environment(shop), capture_output=True, text=True, timeout=240, check=False
        )
        return Ended(answer.returncode, answer.stdout, answer.stderr, place)

    return once


def losses(folder: Path) -> list[float]:
    """Training losses by step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["split"] == "train"]


def assert_whole(folder: Path, num_ranks: int) -> None:
    """A run folder as documented, of one run that ended well."""
    for name in (
        "config.yaml",
        "command.txt",
        "environment.txt",
        "metrics.jsonl",
        "result.json",
        "final",
        "checkpoints",
    ):
        assert (folder / name).exists(), name
    assert sorted(path.name for path in (folder / "logs").iterdir()) == [
        f"rank-{rank}.log" for rank in range(num_ranks)
    ]
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    assert not list(folder.glob(".shared-*"))
    assert "local_rank" not in (folder / "command.txt").read_text()


@pytest.fixture(scope="module")
def one_rank(run: Runner, shop: Path) -> Ended:
    return run([*DISTFT, *words(shop)])


@pytest.fixture(scope="module")
def two_ranks(run: Runner, shop: Path) -> Ended:
    return run([*PYTHON, *words(shop, "launch.ranks=2")])


def test_one_rank_runs_in_the_controllers_process(one_rank: Ended) -> None:
    assert one_rank.code == 0, one_rank.err
    assert_whole(one_rank.folder, 1)
    assert sorted(path.name for path in one_rank.place.iterdir()) == ["runs"], "Hydra leaves nothing behind"


def test_a_snapshot_repeats_the_run(run: Runner, one_rank: Ended) -> None:
    again = run([*PYTHON, "--config-dir", str(one_rank.folder), "--config-name", "config"])
    assert again.code == 0, again.err
    assert_whole(again.folder, 1)
    assert losses(again.folder) == losses(one_rank.folder)
    results = [json.loads((folder / "result.json").read_text()) for folder in (again.folder, one_rank.folder)]
    assert results[0]["config_hash"] == results[1]["config_hash"]


def test_the_controller_starts_two_ranks(one_rank: Ended, two_ranks: Ended) -> None:
    assert two_ranks.code == 0, two_ranks.err
    assert_whole(two_ranks.folder, 2)
    assert losses(two_ranks.folder) == pytest.approx(losses(one_rank.folder), rel=1e-5)
    assert (two_ranks.folder / "logs" / "rank-0.log").read_text() != ""


@pytest.mark.parametrize("engine", ["torchrun", "deepspeed"])
def test_the_controller_starts_other_launchers(run: Runner, shop: Path, two_ranks: Ended, engine: str) -> None:
    ended = run([*PYTHON, *words(shop, "launch.ranks=2", f"launch.engine={engine}")])
    assert ended.code == 0, ended.err
    assert_whole(ended.folder, 2)
    assert losses(ended.folder) == losses(two_ranks.folder)


@pytest.mark.parametrize("launcher", [DEEPSPEED_2, TORCHRUN_2], ids=["deepspeed", "torchrun"])
def test_launchers_start_two_ranks(run: Runner, shop: Path, two_ranks: Ended, launcher: list[str]) -> None:
    ended = run([*launcher, *words(shop)])
    assert ended.code == 0, ended.err
    assert_whole(ended.folder, 2)
    assert losses(ended.folder) == losses(two_ranks.folder)
    assert not (shop / "compiled").exists() or not list((shop / "compiled").rglob("*.so")), "nothing is compiled"


def test_plain_deepspeed(run: Runner, shop: Path, one_rank: Ended) -> None:
    ended = run([*DEEPSPEED_1, *words(shop)])
    assert ended.code == 0, ended.err
    assert losses(ended.folder) == pytest.approx(losses(one_rank.folder), rel=1e-5)


def jobs_of(sweep: Path) -> list[tuple[int, int]]:
    records = [json.loads(line) for line in (sweep / "jobs.jsonl").read_text().splitlines()]
    return [(record["job"], record["exit_code"]) for record in records]


@pytest.mark.parametrize("launcher", [PYTHON, DEEPSPEED_2], ids=["python", "deepspeed"])
def test_a_sweep_goes_on_after_a_failed_job(run: Runner, shop: Path, launcher: list[str]) -> None:
    """Three bins in a micro-batch do not fit a step of two."""
    ended = run([*launcher, "-m", *words(shop, "batch.micro_size=1,3,2")])
    assert ended.code == errors.USER_MISTAKE, ended.text
    [sweep] = (ended.place / "multirun").iterdir()
    assert jobs_of(sweep) == [(0, 0), (1, errors.USER_MISTAKE), (2, 0)]
    assert "1 of 3 jobs of the sweep failed: job 1" in ended.err
    assert "batch.micro_size=3" in ended.err
    for job in ("0", "2"):
        assert_whole(sweep / job, 1 if launcher is PYTHON else 2)
    assert losses(sweep / "0") == pytest.approx(losses(sweep / "2"), rel=1e-5)
    assert not (ended.place / "runs").exists()


@pytest.mark.parametrize(
    ("launcher", "code"),
    [(PYTHON, 2), (DISTFT, 2), (DEEPSPEED_2, 2), (TORCHRUN_2, 1)],
    ids=["python", "distft", "deepspeed", "torchrun"],
)
def test_a_typo_is_told_once(run: Runner, launcher: list[str], code: int) -> None:
    """torchrun makes every failure a 1."""
    ended = run([*launcher, "optim.lrr=1"])
    assert ended.code == code
    assert ended.text.count("Unknown key optim.lrr. Did you mean optim.lr?") == 1
    assert "distft/config" not in ended.text, "no traceback of ours"
    assert list(ended.place.iterdir()) == []


@pytest.mark.parametrize("more", [["optim.lrr=1"], ["--help"], ["batch.micro_size=99"]], ids=["typo", "help", "rule"])
def test_answers_come_within_a_second_and_without_torch(run: Runner, more: list[str]) -> None:
    ended = run([sys.executable, "-X", "importtime", TRAIN, *more])
    assert ended.code == (0 if more == ["--help"] else errors.USER_MISTAKE)
    imported = set(re.findall(r"\|\s+(\w+)", ended.err))
    assert "hydra" in imported, "the list of imports is read right"
    assert imported.isdisjoint({"torch", "transformers", "deepspeed", "peft", "datasets", "wandb"})
    # Seconds of the processor, so that what else runs on the machine does not count; the best of three.
    assert min(processor_seconds([*PYTHON, *more]) for _ in range(3)) < 1


def processor_seconds(command: list[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    usage = os.wait4(process.pid, 0)[2]
    return usage.ru_utime + usage.ru_stime


def test_verbs_are_listed(run: Runner) -> None:
    listed = run([sys.executable, "-m", "distft"])
    assert listed.code == 0
    assert all(word in listed.out for word in ("distft train", "distft data show", "distft generate"))
    wrong = run([sys.executable, "-m", "distft", "trian"])
    assert wrong.code == errors.USER_MISTAKE
    assert "Did you mean train?" in wrong.err


def test_a_preflight_that_fails_starts_no_rank(run: Runner, shop: Path) -> None:
    (shop / "broken.jsonl").write_text("{\n" * 20)
    ended = run([*PYTHON, *words(shop, "launch.ranks=2", f"data.path={shop / 'broken.jsonl'}")])
    assert ended.code == errors.USER_MISTAKE, ended.text
    assert "Traceback" not in ended.text
    assert not (ended.folder / "logs" / "rank-1.log").exists()


def test_dry_run_prints_commands_that_can_be_copied(run: Runner, shop: Path, two_ranks: Ended) -> None:
    dry = run([*PYTHON, *words(shop, "launch.ranks=2", "launch.engine=torchrun", "launch.dry_run=true")])
    assert dry.code == 0, dry.err
    assert not (dry.folder / "metrics.jsonl").exists()
    commands = [line for line in dry.out.splitlines() if line and not line.startswith("#")]
    assert len(commands) == 2
    assert "preflight" in commands[0]
    for command in commands:
        assert run(["sh", "-c", command]).code == 0
    assert losses(dry.folder) == losses(two_ranks.folder)


def test_sigterm_saves_on_all_ranks(shop: Path, tmp_path: Path) -> None:
    command = [
        *PYTHON,
        *words(shop, "launch.ranks=2", "max_steps=100000", f"run.dir={tmp_path / 'run'}", "log.every=1"),
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(shop), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"train"') >= 2:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == errors.SAVED_AFTER_SIGNAL, text
    assert "checkpoint" in text
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "saved_after_signal"
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert shlex.quote(str(tmp_path / "run")) not in left, "no rank is left"

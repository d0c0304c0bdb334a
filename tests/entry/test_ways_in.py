"""Every way in, with real processes: the same run whatever started it, one folder, the exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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


@pytest.fixture(scope="module")
def broken(shop: Path) -> Path:
    """Rows that no run can read."""
    path = shop / "broken.jsonl"
    path.write_text("{\n" * 20)
    return path


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
    """A run's words; of those given twice, the last counts. DDP starts fastest."""
    rows = f"data.path={shop / 'rows.jsonl'}"
    return [*SMALL, "data=jsonl", rows, "data.eval_fraction=0.2", "strategy=ddp", "max_steps=2", *more]


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
    assert sorted(path.name for path in (folder / "logs").glob("*.*")) == [
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


@pytest.mark.parametrize(
    ("launcher", "strategy"), [(DEEPSPEED_2, "zero2"), (TORCHRUN_2, "ddp")], ids=["deepspeed", "torchrun"]
)
def test_launchers_start_two_ranks(
    run: Runner, shop: Path, two_ranks: Ended, launcher: list[str], strategy: str
) -> None:
    ended = run([*launcher, *words(shop, f"strategy={strategy}")])
    assert ended.code == 0, ended.err
    assert_whole(ended.folder, 2)
    assert losses(ended.folder) == pytest.approx(losses(two_ranks.folder), rel=1e-5)
    assert not (shop / "compiled").exists() or not list((shop / "compiled").rglob("*.so")), "nothing is compiled"


def test_plain_deepspeed(run: Runner, shop: Path, one_rank: Ended) -> None:
    ended = run([*DEEPSPEED_1, *words(shop, "strategy=zero2")])
    assert ended.code == 0, ended.err
    assert losses(ended.folder) == pytest.approx(losses(one_rank.folder), rel=1e-5)


def jobs_of(sweep: Path) -> list[tuple[int, int]]:
    records = [json.loads(line) for line in (sweep / "jobs.jsonl").read_text().splitlines()]
    return [(record["job"], record["exit_code"]) for record in records]


@pytest.mark.parametrize("launcher", [PYTHON, DEEPSPEED_2], ids=["python", "deepspeed"])
def test_a_sweep_goes_on_after_a_failed_job(run: Runner, shop: Path, broken: Path, launcher: list[str]) -> None:
    paths = f"data.path={broken},{shop / 'rows.jsonl'}"
    ended = run([*launcher, "-m", *words(shop)[:-1], paths, "max_steps=2"])
    assert ended.code == errors.USER_MISTAKE, ended.text
    [sweep] = (ended.place / "multirun").iterdir()
    assert jobs_of(sweep) == [(0, errors.USER_MISTAKE), (1, 0)]
    assert "1 of 2 jobs of the sweep failed: job 0" in ended.err
    assert_whole(sweep / "1", 1 if launcher is PYTHON else 2)
    assert not (ended.place / "runs").exists()
    assert "Traceback (most recent call last)" not in ended.text


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
def test_answers_import_nothing_heavy(run: Runner, more: list[str]) -> None:
    """What makes them come within a second; the second itself is measured by benchmarks/answers.py."""
    ended = run([sys.executable, "-X", "importtime", TRAIN, *more])
    assert ended.code == (0 if more == ["--help"] else errors.USER_MISTAKE)
    modules = re.findall(r"\|\s+([\w.]+)$", ended.err, re.MULTILINE)  # the last column
    imported = {name.partition(".")[0] for name in modules}
    assert len(modules) < 600, "five hundred, nearly all of them Hydra's and Python's own"
    assert "hydra" in imported, "the list of imports is read right"
    assert imported.isdisjoint({"torch", "transformers", "deepspeed", "peft", "datasets", "wandb", "optuna", "numpy"})


def test_verbs_are_listed(run: Runner) -> None:
    listed = run([sys.executable, "-m", "distft"])
    assert listed.code == 0
    assert all(word in listed.out for word in ("distft train", "distft data show", "distft generate"))
    wrong = run([sys.executable, "-m", "distft", "trian"])
    assert wrong.code == errors.USER_MISTAKE
    assert "Did you mean train?" in wrong.err


def test_a_preflight_that_fails_starts_no_rank(run: Runner, shop: Path, broken: Path) -> None:
    ended = run([*PYTHON, *words(shop, "launch.ranks=2", f"data.path={broken}")])
    assert ended.code == errors.USER_MISTAKE, ended.text
    assert "Traceback" not in ended.text
    assert not (ended.folder / "logs" / "rank-1.log").exists()


def test_dry_run_prints_commands_that_can_be_copied(run: Runner, shop: Path, one_rank: Ended) -> None:
    dry = run([*PYTHON, *words(shop, "launch.dry_run=true")])
    assert dry.code == 0, dry.err
    assert not (dry.folder / "metrics.jsonl").exists()
    commands = [line for line in dry.out.splitlines() if line and not line.startswith("#")]
    assert len(commands) == 2
    assert "preflight" in commands[0]
    for command in commands:
        copied = run(["sh", "-c", command])
        assert copied.code == 0, copied.err
    assert losses(dry.folder) == losses(one_rank.folder)

"""Who a process is, where a run lies, and what ranks settle before they train."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft import errors
from distft.config.load import compose, read_snapshot
from distft.config.schema import Run
from distft.errors import Stalled, Stop, UserMistake
from distft.launch import agree
from distft.launch.folder import make_folder, place_run
from distft.launch.jobs import note_job, sweep_verdict
from distft.launch.output import Tee
from distft.launch.start import Command
from distft.launch.sweep import jobs_of
from distft.launch.topology import Place, count_gpus, free_port, hosts_of, place_of, slurm_environment, tasks_per_node
from distft.launch.worker import read_arguments, without_local_rank


def test_only_a_started_rank_is_a_rank() -> None:
    assert place_of({}) is None
    assert place_of({"RANK": "1", "WORLD_SIZE": "4"}) is None
    assert place_of({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == Place(1, 4, 0, 0)
    with pytest.raises(UserMistake, match="RANK=x"):
        place_of({"RANK": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})


def test_a_slurm_step_of_several_tasks_is_a_launcher() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4,2",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "123",
        "SLURM_STEP_ID": "0",
    }
    place = place_of(step)
    assert place == Place(4, 6, 0, 2)
    environment = slurm_environment(place, step)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert environment["RANK"] == "4"
    assert 15000 <= int(environment["MASTER_PORT"]) < 30000
    # The shell of a batch job has a rank too, but it is one task: there the controller runs.
    assert place_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) is None
    assert place_of({**step, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_slurm_lists_are_written_out() -> None:
    assert hosts_of("node[01-03,7],login") == ["node01", "node02", "node03", "node7", "login"]
    assert hosts_of("r[1-2]n[1,3]-ib") == ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]
    assert hosts_of("a,b") == ["a", "b"]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_gpus_are_counted_as_cuda_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: GPU-aa)\\nGPU 1: A (UUID: GPU-bb)\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for visible, count in ((None, 2), ("0", 1), ("1,0", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-bb", 1), ("7", 0)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_gpus() == count, visible
    monkeypatch.setenv("PATH", "")
    assert count_gpus() == 0


def test_the_launchers_own_word_is_dropped() -> None:
    words = ["--local_rank=1", "optim.lr=1", "--local-rank", "3", "--local_rank", "0", "seed=2"]
    assert without_local_rank(words) == ["optim.lr=1", "seed=2"]
    arguments = read_arguments(["--snapshot=/x/config.yaml", "--prepared", "--local_rank=1"])
    assert (arguments.snapshot, arguments.prepared, arguments.resume) == (Path("/x/config.yaml"), True, None)
    with pytest.raises(UserMistake, match=r"--config-dir /x --config-name config optim\.lr=1"):
        read_arguments(["--snapshot=/x/config.yaml", "optim.lr=1"])


def with_dir(folder: Path | None, resume: str = "auto") -> Run:
    run = Run()
    run.run.dir = None if folder is None else str(folder)
    run.resume = resume
    return run


def test_run_folders_are_new_even_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    folders = [
        make_folder(with_dir(None), ["python", "train.py", "a='b c'", "0123456789abcdef"], None, "77") for _ in range(3)
    ]
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "runs" for folder in folders)
    assert all("-77" in folder.name for folder in folders)
    written = folders[0] / "command.txt"
    assert "'a='\"'\"'b c'\"'\"''" in written.read_text()
    for path in folders[0].rglob("*.*"):
        assert "0123456789abcdef" not in path.read_text(), path
    assert "torch: " in (folders[0] / "environment.txt").read_text()


def test_where_a_run_goes(tmp_path: Path) -> None:
    assert place_run(with_dir(None))[0] is None
    assert place_run(with_dir(tmp_path / "new"))[0] == tmp_path / "new"
    old = make_folder(with_dir(tmp_path / "old"), ["x"], tmp_path / "old")
    checkpoint = old / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    assert place_run(with_dir(old))[0] == old
    for source in (old, checkpoint):
        folder, run = place_run(with_dir(None, resume=str(source)))
        assert (folder, run.resume) == (old, str(source))
        assert place_run(with_dir(tmp_path / "new", resume=str(source)))[0] == tmp_path / "new"
    with pytest.raises(UserMistake, match="resume=never"):
        place_run(with_dir(old, resume="never"))
    with pytest.raises(UserMistake, match="is no run folder"):
        place_run(with_dir(tmp_path))
    with pytest.raises(UserMistake, match="neither a run folder"):
        place_run(with_dir(None, resume=str(tmp_path)))


def test_going_on_keeps_how_the_run_began(tmp_path: Path) -> None:
    folder = make_folder(with_dir(tmp_path / "run"), ["first"], tmp_path / "run")
    run = dataclasses.replace(with_dir(None, resume=str(folder)), seed=5)
    make_folder(run, ["second"], folder)
    assert (folder / "command.txt").read_text() == "first\nsecond\n"
    assert len(list(folder.glob("config-*.yaml"))) == 1
    again = read_snapshot(folder / "config.yaml")
    assert (again.seed, again.resume) == (5, "auto"), "repeating a run must not go on in its folder"


def ranks(size: int, part: Callable[[agree.Agreement, Place], Any], seconds: float = 20.0) -> list[Any]:
    """`part` on every rank, each a thread with its own connection; returns what it returned or raised."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
    results: list[Any] = [None] * size
    stores = []  # a rank that trains keeps its store, and rank 0's serves the others

    def one(rank: int) -> None:
        place = Place(rank, size, rank, size)
        try:
            store = agree.connect(place, seconds)
            stores.append(store)
            results[rank] = part(agree.Agreement(place, store, seconds), place)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")


def test_ranks_agree_on_folder_and_preflight(tmp_path: Path) -> None:
    done: list[int] = []

    def part(agreement: agree.Agreement, place: Place) -> Path:
        agreement.same_config("abc")
        folder = agreement.folder(lambda: tmp_path)
        agreement.preflight(lambda: done.append(place.rank))
        return folder

    assert ranks(3, part) == [tmp_path] * 3
    assert done == [0]
    assert list(tmp_path.iterdir()) == [], "the token file is gone"


def test_another_configuration_is_refused_by_all_and_told_once(tmp_path: Path) -> None:
    first, second = ranks(2, lambda agreement, place: agreement.same_config(f"hash{place.rank}"))
    assert isinstance(first, UserMistake)
    assert "Ranks 1 on" in str(first)
    assert isinstance(second, agree.Elsewhere)
    assert (str(second), second.exit_code) == ("", errors.USER_MISTAKE)


@pytest.mark.parametrize(("error", "code"), [(UserMistake("no"), errors.USER_MISTAKE), (ValueError("bug"), errors.BUG)])
def test_a_failed_preflight_ends_all_ranks_with_its_code(error: Exception, code: int) -> None:
    def fail() -> None:
        raise error

    results = ranks(3, lambda agreement, place: agreement.preflight(fail))
    assert results[0] is error
    assert [(type(result), result.exit_code) for result in results[1:]] == [(agree.Elsewhere, code)] * 2


def test_missing_ranks_are_named() -> None:
    def part(agreement: agree.Agreement, place: Place) -> None:
        if place.rank != 2:
            agreement.same_config("abc")

    results = ranks(3, part, seconds=3)
    assert isinstance(results[0], Stalled)
    assert "1 of 3 ranks did not arrive within launch.start_timeout=3 s: 2." in str(results[0])
    assert isinstance(results[1], Stop)


def test_a_rank_that_cannot_read_its_configuration_is_heard() -> None:
    def part(agreement: agree.Agreement, place: Place) -> None:
        if place.rank == 1:
            agree.report(place, "no such file")
        else:
            agreement.same_config("abc")

    results = ranks(2, part)
    assert isinstance(results[0], UserMistake)
    assert "Rank 1 on" in str(results[0])
    assert "no such file" in str(results[0])


BLIND = """
import sys
import threading
from pathlib import Path
from distft.launch import agree
from distft.launch.sweep import jobs_of
from distft.launch.topology import Place
place = Place(int(sys.argv[1]), 2, 0, 1)
agreement = agree.Agreement(place, agree.connect(place, 16), 16)
try:
    agreement.folder(lambda: Path(sys.argv[2]))
except agree.Stop as stop:
    print(stop, end="")
    sys.exit(stop.exit_code)
"""


def test_a_folder_that_another_host_does_not_see_is_refused(tmp_path: Path) -> None:
    """Rank 1 has a file system of its own over the folder, as a second host would."""
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount (root)")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": os.getcwd()}
    for prefix, code in ((hidden, errors.USER_MISTAKE), ([], errors.DONE)):
        processes = [
            subprocess.Popen(
                [*(prefix if rank else []), sys.executable, "-c", BLIND, str(rank), str(tmp_path)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        texts = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [code, code]
        assert ("all nodes need one file system" in texts[0]) == bool(prefix)
        assert texts[1] == ""


def test_a_sweep_tells_its_jobs_and_the_sweeper_its_objective(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job, best in enumerate((0.5, None)):
        (tmp_path / str(job)).mkdir()
        (tmp_path / str(job) / "result.json").write_text(json.dumps({"metrics": {"best": best}}))
    assert note_job(tmp_path, 1, ["seed=1", "log=none"], tmp_path / "1", errors.DONE) is None
    assert note_job(tmp_path, 0, ["seed=0", "log=none"], tmp_path / "0", errors.DONE) == 0.5
    assert sweep_verdict(tmp_path) == errors.DONE
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/0  seed=0  done  0.5",
        f"{tmp_path}/1  seed=1  done",
        f"Compare them: distft report {tmp_path}",
    ]
    assert note_job(tmp_path, 2, ["seed=2", "log=none"], tmp_path / "0", errors.STOPPED_BY_GUARD) is None
    assert sweep_verdict(tmp_path) == errors.STOPPED_BY_GUARD
    assert "1 of 3 jobs of the sweep failed: job 2 (seed=2): 4" in capsys.readouterr().err
    note_job(tmp_path, 3, ["seed=3", "log=none"], tmp_path / "3", errors.USER_MISTAKE)
    assert sweep_verdict(tmp_path) == errors.BUG, "jobs that failed in different ways"


def test_jobs_of_a_sweep_under_a_launcher() -> None:
    composed = compose(["-m", "strategy=glob(zero3*)", "optim.lr=1,2", "hydra.sweep.dir=/x"])
    assert jobs_of(composed) == [
        ["strategy=zero3", "optim.lr=1"],
        ["strategy=zero3", "optim.lr=2"],
        ["strategy=zero3_offload", "optim.lr=1"],
        ["strategy=zero3_offload", "optim.lr=2"],
    ]
    with pytest.raises(UserMistake, match=r"python train\.py -m"):
        jobs_of(compose(["-m", "optim.lr=1,2", "hydra/sweeper=basic"]))


def test_a_command_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    command = Command([sys.executable, "-c", "import os; print(os.environ['WORD'])"], {"WORD": "a 'quoted' $word"})
    answer = subprocess.run(["sh", "-c", str(command)], capture_output=True, text=True, check=True)
    assert answer.stdout == "a 'quoted' $word\n"


def test_a_log_keeps_lines_and_leaves_the_bar_out() -> None:
    screen, log = io.StringIO(), io.StringIO()
    tee = Tee(screen, log)
    tee.write("plain\n")
    tee.write("\x1b[31mred\x1b[0m\n")
    tee.write("\x1b[?25lloss 2.0 ━━━━")
    tee.write("\r\x1b[2Kloss 1.0 ━━━━")
    tee.write("\r\x1b[2Knote above the bar\nloss 0.9 ━━━━")
    assert log.getvalue() == "plain\nred\nnote above the bar\n"
    assert screen.getvalue().count("━") == 12

"""The script of a Slurm job, what is refused before Slurm is asked, and what Slurm's answers mean."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config.check import check
from distft.config.load import compose
from distft.config.schema import Run
from distft.errors import Mistakes, SignalStop
from distft.launch import queue, slurm
from distft.launch.sbatch import render
from distft.launch.slurm import Partition, read_partitions
from distft.launch.start import STATUS_FOLDER
from tests.unit.test_deadline import program

ROOT = Path(__file__).resolve().parents[2]
EIGHT = ["launch=slurm", "launch.gpus_per_node=8"]
NASTY = "a 'b' \"c\" $HOME `id` ; # %j \N{EM DASH}"


def run_of(*words: str) -> Run:
    return compose(list(words)).run


def of_python(script: str) -> str:
    """A script without what belongs to this machine."""
    kept = [line for line in script.splitlines() if not line.startswith(("#SBATCH --chdir=", "export PYTHONPATH="))]
    return "\n".join(kept).replace(shlex.quote(sys.executable), "python") + "\n"


def test_the_file_to_copy_is_what_distft_writes() -> None:
    """But for the output's place and the start of a rank; its comment has the words that the script comes from."""
    copied = (ROOT / "launch" / "slurm.sbatch").read_text()
    said = copied[copied.index("# Copy") : copied.index("\n\n# Submitted") + 1]
    words = shlex.split(said[said.index("train.py") :].replace("#", " "))[1:]
    run = run_of(*words)
    assert check(run) == []
    folder = Path(str(run.run.dir))
    written = of_python(render(run, folder))
    written = written.replace(f"--output={folder}/logs/slurm-%j.log", "--output=slurm-%j.log")
    written = written.replace('-m distft train --snapshot="$run/config.yaml"', 'train.py strategy=zero3 run.dir="$run"')
    assert copied.replace(said + "\n", "") == written


def test_a_job_asks_for_what_the_knobs_say() -> None:
    run = run_of("launch=slurm", "launch.ranks=6", "launch.nodes=3", "launch.qos=night", "launch.requeue=false")
    script = render(run, Path("/runs/x"), resume="/runs/y/checkpoints/step-000002")
    for line in ("--nodes=3", "--ntasks-per-node=2", "--qos=night", "--no-requeue", "--export=ALL", "--job-name=x"):
        assert f"\n#SBATCH {line}\n" in script
    assert "gpus" not in script
    assert "--requeue" not in script.replace("--no-requeue", "")
    assert "srun --nodes=3 --ntasks-per-node=2 --export=ALL" in script
    assert '--snapshot="$run/config.yaml" --resume=/runs/y/checkpoints/step-000002 || code=$?' in script


def test_images_of_pyxis_and_of_apptainer() -> None:
    words = [*EIGHT, "launch.mounts=['/data','/a b:/c']"]
    pyxis = render(run_of(*words, "launch.container=nvcr.io/nvidia/pytorch:25.09-py3"), Path("/runs/x"))
    assert (
        "--container-image=nvcr.io/nvidia/pytorch:25.09-py3 --container-mounts=\"$run:$run\"',/data:/data,/a b:/c' \\\n"
        in pyxis
    )
    assert "    python -m distft train --snapshot" in pyxis
    apptainer = render(run_of(*words, "launch.container=/images/distft.sif"), Path("/runs/x"))
    assert "apptainer exec --nv --bind=\"$run\" --bind=/data --bind='/a b:/c' /images/distft.sif \\\n" in apptainer


def test_nothing_in_a_knob_becomes_shell(tmp_path: Path) -> None:
    """The script runs under bash with programs that write down what they are given in place of Slurm's."""
    folder = tmp_path / NASTY
    run = run_of(*EIGHT)
    run.run.name, run.launch.partition, run.launch.container, run.launch.mounts = NASTY, NASTY, NASTY, [NASTY]
    run.launch.sbatch = [f"--comment={NASTY}"]
    script = tmp_path / "script"
    script.write_text(render(run, folder, resume=NASTY))
    seen = tmp_path / "seen"
    program(tmp_path / "bin", "srun", f'printf "%s\\n" "$@" > {seen}; exit 7')
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    words = seen.read_text().splitlines()
    assert f"--container-image={NASTY}" in words
    assert f"--container-mounts={folder}:{folder},{NASTY}:{NASTY}" in words
    assert words[-2:] == [f"--snapshot={folder}/config.yaml", f"--resume={NASTY}"]
    assert f"#SBATCH --comment={shlex.quote(NASTY)}" in script.read_text()
    output = shlex.quote(str(folder / "logs").replace("%", "%%") + "/slurm-%j.log")
    assert f"#SBATCH --output={output}\n" in script.read_text(), "sbatch replaces %j in names of files"


@pytest.mark.parametrize(
    ("left", "of_srun", "code"),
    [({}, 137, 137), ({0: 0, 1: 0}, 0, 0), ({0: 143, 1: 143}, 143, 143), ({1: 1}, 137, 1), ({0: 2, 1: 1}, 1, 2)],
)
def test_a_job_ends_with_the_code_of_its_ranks(left: dict[int, int], of_srun: int, code: int, tmp_path: Path) -> None:
    lines = [f'printf {value} > "$DISTFT_STATUS/rank-{rank}.exit"' for rank, value in left.items()]
    program(tmp_path / "bin", "srun", "\n".join([*lines, 'touch "$DISTFT_REQUEUE"', f"exit {of_srun}"]))
    program(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path}/asked')
    (tmp_path / "script").write_text(render(run_of(*EIGHT), tmp_path / "run"))
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    assert subprocess.run(["bash", str(tmp_path / "script")], env=environment, check=False).returncode == code
    assert (tmp_path / "asked").read_text() == "requeue 12\n"


def test_a_rank_leaves_the_queue_to_its_script(tmp_path: Path) -> None:
    note = tmp_path / "requeue"
    said = slurm.requeue("auto", SignalStop("USR1", by_slurm=True), {"SLURM_JOB_ID": "7", slurm.REQUEUE: str(note)})
    assert "goes back into the queue" in said
    assert note.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launch=slurm"], r"launch\.gpus_per_node=N"),
        (["launch=slurm", "launch.ranks=3", "launch.nodes=2"], "Give a multiple"),
        ([*EIGHT, "launch.ranks=4"], r"Drop launch\.ranks"),
        ([*EIGHT, "launch.engine=torchrun"], "srun starts the ranks"),
        ([*EIGHT, "launch.max_restarts=2"], r"launch\.requeue"),
        ([*EIGHT, "launch.time=240"], r"\[days-\]HH:MM:SS is wanted"),
        ([*EIGHT, "launch.time=00:03:59"], "leaves no time for a step"),
        ([*EIGHT, "launch.sbatch=['--nodes=3']"], r"Use launch\.nodes"),
        ([*EIGHT, "launch.sbatch=['-x']"], "no long option"),
        ([*EIGHT, "launch.mounts=['/data']"], r"without launch\.container"),
        (["launch.partition=gpu"], "no effect with launch=local"),
    ],
)
def test_what_no_job_can_be(words: list[str], told: str) -> None:
    assert re.search(told, "\n".join(check(run_of(*words))))
    assert check(run_of(*EIGHT, "launch.time=00:05:00", "launch.sbatch=['--mem=0','--exclusive']")) == []


def test_a_line_break_would_end_a_line_of_the_script() -> None:
    run = run_of(*EIGHT)
    run.launch.account = "a\n#SBATCH --nodes=99"
    assert "launch.account holds a line break" in "\n".join(check(run))
    run.launch.account, run.run.dir = None, "runs/a\\b"  # sbatch drops it, even in quotes
    assert "run.dir holds a line break, a backslash" in "\n".join(check(run))


def test_partitions_are_read_as_sinfo_writes_them() -> None:
    lines = ["gpu*|2-00:00:00|4|gpu:h100:8(S:0-1),nvme:1", "gpu*|2-00:00:00|2|gpu:a100:4", "cpu|infinite|9|(null)"]
    assert read_partitions("\n".join([*lines, "x|30:00|1|gpu:2"])) == [
        Partition("gpu", True, 172800.0, 6, 8),
        Partition("cpu", False, None, 9, 0),
        Partition("x", False, 1800.0, 1, 2),
    ]
    assert read_partitions("") == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launch.partition=gpus"], "Did you mean gpu[?] There are: gpu, cpu"),
        (["launch.nodes=7"], "partition gpu has 6"),
        (["launch.partition=cpu"], "no node of partition cpu has more than 0"),
        (["launch.time=3-00:00:00"], "ends jobs after 48:00:00"),
    ],
)
def test_what_the_cluster_does_not_have(words: list[str], told: str) -> None:
    there = read_partitions("gpu*|2-00:00:00|6|gpu:8\ncpu|infinite|9|(null)\n")
    assert re.search(told, "\n".join(queue.beyond(run_of(*EIGHT, *words).launch, there)))
    fitting = run_of(*EIGHT, "launch.nodes=6", "launch.time=2-00:00:00", "launch.partition=gpu")
    assert list(queue.beyond(fitting.launch, there)) == []


def test_a_machine_without_slurm_and_an_allocation_of_another_size() -> None:
    run = run_of(*EIGHT)
    with pytest.raises(Mistakes, match="no sbatch on PATH"):
        queue.refuse(run, None, {"PATH": ""})
    with pytest.raises(Mistakes, match="this allocation has 2"):
        queue.refuse(run, None, {**os.environ, "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"})


def test_nodes_that_slurm_gives_a_process() -> None:
    allocation = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}
    assert queue.nodes_here({}) == 1
    assert queue.nodes_here(allocation) == 2
    assert queue.nodes_here({**allocation, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1"}) == 1
    shell = {**allocation, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1"}
    assert queue.nodes_here(shell) == 2, "salloc's own step, from which the job's nodes are used"
    assert "launch=local would use this one alone" in "\n".join(queue.half(run_of().launch, allocation))
    assert list(queue.half(run_of("launch.ranks=2").launch, allocation)) == []
    assert list(queue.half(run_of().launch, {})) == []


def test_a_mistake_that_shows_late_ends_a_rank_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from distft.launch.worker import end_by_mistake as end\n"
    code += "end(Path(sys.argv[1]), 'too short')"
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", STATUS_FOLDER: str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "distft: too short\n")
    assert (tmp_path / "rank-0.exit").read_text() == "2"
    assert '"reason": "too short"' in (tmp_path / "result.json").read_text()


def test_slurms_refusals_come_with_a_cure() -> None:
    said = "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n"
    told = queue.refusal(said)
    assert told.startswith(
        "Slurm refuses the job: invalid partition specified: x; Invalid partition name specified. Set"
    )
    assert "launch.account" in queue.refusal(
        "sbatch: error: Invalid account or account/partition combination specified"
    )

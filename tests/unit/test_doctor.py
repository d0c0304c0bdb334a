"""`distft doctor`: each judgement with what it must not say, and real looks at machines with something broken."""

from __future__ import annotations

import dataclasses
import http.server
import json
import math
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from distft.config.load import compose
from distft.doctor import disk, kernels, limits, links, machine, services, trials, versions
from distft.doctor.bounded import bounded
from distft.doctor.examine import labels_of
from distft.doctor.links import Link
from distft.doctor.together import judge_clocks, judge_shared
from distft.doctor.verdict import FAILS, OK, SKIPPED, WARN, Verdict, merged, verdict_line, would_fail
from distft.errors import Mistakes
from distft.launch.topology import Place
from distft.verbs.doctor import check

ROOT = Path(__file__).parents[2]
GOOD_KEY = "0123456789abcdef0123456789abcdef01234567"


def states(verdicts: list[Verdict]) -> list[str]:
    return [verdict.state for verdict in verdicts]


# verdicts


def test_hosts_that_say_the_same_are_one_line() -> None:
    well = Verdict("limits", OK, "1024 files")
    bad = Verdict("limits", FAILS, "64 files", "ulimit -n")
    lines = merged({"a": [well, Verdict("cache", OK, "fast")], "b": [well], "c": [bad]})
    assert [(line.what, line.state, line.where) for line in lines] == [
        ("limits", OK, "a, b"),
        ("limits", FAILS, "c"),
        ("cache", OK, ""),
    ]
    assert str(lines[1]) == "fails     limits on c: 64 files\n           ulimit -n"
    assert "ulimit" not in str(dataclasses.replace(bad, state=OK))


def test_the_last_line_says_whether_a_run_would_fail() -> None:
    found = [Verdict("a", OK, ""), Verdict("b", WARN, ""), Verdict("c", SKIPPED, "")]
    assert verdict_line(found) == "A run can start; 1 ok, 1 to be warned of, 1 skipped"
    assert not would_fail(found)
    found.append(Verdict("d", FAILS, ""))
    assert verdict_line(found).startswith("A run would fail: d; ")
    assert would_fail(found)


def test_what_raises_is_a_verdict_and_what_hangs_is_left() -> None:
    assert bounded("it", lambda: [Verdict("it", OK, "")], 5) == [Verdict("it", OK, "")]

    def breaks() -> list[Verdict]:
        raise OSError("no such thing\nand more")

    assert bounded("it", breaks, 5) == [Verdict("it", FAILS, "OSError: no such thing")]
    started, release = time.monotonic(), threading.Event()
    [found] = bounded("it", lambda: [Verdict("it", OK, str(release.wait()))], 0.2, WARN)
    release.set()
    assert (found.state, found.said) == (WARN, "no answer within 0.2 s (doctor.seconds)")
    assert time.monotonic() - started < 3


# links


def table(bandwidths: dict[tuple[int, int], float], latency: float = 1e-4) -> list[Link]:
    return [Link(a, b, bandwidth, latency) for (a, b), bandwidth in bandwidths.items()]


HOSTS = [f"node{number}" for number in range(4)]


def judged(found: list[Link], hosts: list[str] = HOSTS, floor: float | None = None) -> list[Verdict]:
    return links.judge(found, hosts, 3.0, floor, "gloo")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_pair_is_measured_once_and_no_rank_twice_at_a_time(count: int) -> None:
    ranks = [10 * rank for rank in range(count)]
    found = links.rounds(ranks)
    pairs = [pair for pairs in found for pair in pairs]
    assert sorted(pairs) == [(a, b) for a in ranks for b in ranks if a < b]
    for pairs in found:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))


def test_of_many_ranks_one_a_host_is_measured() -> None:
    few = [Place(rank, 16, rank % 8, 8) for rank in range(16)]
    assert links.taking_part(few) == list(range(16))
    many = [Place(rank, 128, rank % 8, 8) for rank in range(128)]
    assert links.taking_part(many) == list(range(0, 128, 8))


def test_the_one_slow_link_is_named() -> None:
    rates = {(a, b): 1e9 for a in range(4) for b in range(a + 1, 4)}
    assert states(judged(table(rates))) == [OK]
    assert states(judged(table(rates | {(1, 3): 0.5e9}))) == [OK]  # twice as slow is not three times
    [found] = judged(table(rates | {(1, 3): 0.02e9}))
    assert found.state == WARN
    assert found.said.startswith("the link rank 1 on node1 - rank 3 on node3: 20 MB/s, 50 times slower")


def test_of_three_hosts_the_slow_pair_or_the_slow_host_is_named() -> None:
    rates = {(0, 1): 1e9, (0, 2): 1e9, (1, 2): 1e9}
    [pair] = judged(table(rates | {(0, 2): 1e8}))
    assert "the link rank 0 on node0 - rank 2 on node2" in pair.said
    [host] = judged(table(rates | {(0, 2): 1e8, (1, 2): 1.1e8}))
    assert host.said.startswith("all 2 links of node2: 100 MB/s to 110 MB/s")


def test_pairs_inside_a_host_are_no_measure_for_those_between_hosts() -> None:
    hosts = ["a", "a", "b", "b"]
    rates = {(0, 1): 20e9, (2, 3): 20e9, (0, 2): 1e9, (0, 3): 1e9, (1, 2): 1e9, (1, 3): 1e9}
    assert states(judged(table(rates), hosts)) == [OK, OK]
    found = judged(table(rates | {(2, 3): 1e9}), hosts)
    assert [(one.state, one.said.partition(":")[0]) for one in found if one.state != OK] == [
        (WARN, "the link rank 2 on b - rank 3 on b")
    ]


def test_a_single_pair_is_held_to_a_floor() -> None:
    assert states(judged([Link(0, 1, 0.2e9, 1e-4)])) == [OK]
    [slow] = judged([Link(0, 1, 0.05e9, 1e-4)])
    assert slow.state == WARN
    assert "less than gigabit Ethernet moves" in slow.said
    [asked] = judged([Link(0, 1, 0.2e9, 1e-4)], floor=1e9)
    assert asked.state == FAILS
    assert "doctor.min_bandwidth=1" in asked.said


def test_a_late_or_dead_link_is_named() -> None:
    rates = {(a, b): 1e9 for a in range(4) for b in range(a + 1, 4)}
    late = [dataclasses.replace(link, latency=5e-3 if link.second == 3 else 1e-4) for link in table(rates)]
    [found] = judged(late)
    assert found.state == WARN
    assert found.said == "all 3 links of node3: an all-reduce takes 5.0 ms, of the quick pairs between hosts 100 µs"
    dead = [dataclasses.replace(link, dead="RuntimeError: timeout" * (link.first == 0)) for link in table(rates)]
    found = judged(dead)
    assert states(found) == [FAILS, OK]
    assert found[0].said == "all 3 links of node0 without an answer (RuntimeError: timeout)"
    assert states(judged([])) == [SKIPPED]


# versions


def test_versions_out_of_range_fail_and_those_of_extras_warn() -> None:
    wanted = [Requirement("torch>=2.11,<2.14"), Requirement("peft>=0.21"), Requirement('flash-attn>=2.8; extra == "x"')]

    def judge(python: str = "3.11.4", **installed: str | None) -> list[Verdict]:
        named = {name.replace("_", "-"): version for name, version in installed.items()}
        return versions.judge(wanted, named, ">=3.11,<3.13", python)

    assert states(judge(torch="2.13.0+cpu", peft="0.21.2", flash_attn=None)) == [OK]
    [old] = judge(torch="2.9.1", peft="0.21.2")
    assert (old.state, old.said) == (FAILS, "torch 2.9.1 is not <2.14,>=2.11")
    [missing] = judge(torch="2.11", peft=None)
    assert (missing.state, missing.said) == (FAILS, "peft is not installed")
    assert states(judge(torch="2.11", peft="0.21", flash_attn="2.1")) == [WARN]
    assert states(judge("3.10.1", torch="2.11", peft="0.21")) == [FAILS]


def test_ranks_that_compile_what_they_import_are_warned_of(tmp_path: Path) -> None:
    bytecode = tmp_path / "site-packages" / "torch" / "__pycache__" / "__init__.cpython-311.pyc"
    [found] = versions.compiled(bytecode, never_written=True)
    assert found.state == WARN
    assert f"compileall -q {tmp_path / 'site-packages'}." in found.cure
    assert versions.compiled(bytecode, never_written=False) == []
    bytecode.parent.mkdir(parents=True)
    bytecode.touch()
    assert versions.compiled(bytecode, never_written=True) == []


def test_versions_that_differ_between_hosts_are_told() -> None:
    same = {"python": "3.11.4", "torch": "2.13.0"}
    assert versions.compare({"a": same, "b": same}) == []
    [found] = versions.compare({"a": same, "b": same, "c": {**same, "torch": "2.12.0"}})
    assert (found.state, found.said) == (FAILS, "torch is 2.13.0 on a, b; 2.12.0 on c")


# the host

ROOMY = limits.Limits(1 << 20, math.inf, math.inf, math.inf, math.inf, 0)


@pytest.mark.parametrize(
    ("change", "size", "state", "word"),
    [
        ({}, 64, OK, "open files 1,048,576"),
        ({"open_files": 1024}, 8, OK, ""),
        ({"open_files": 1024}, 512, FAILS, "1024 open files"),
        ({"open_files": 300}, 1, WARN, "300 open files"),
        ({"open_files": 128}, 1, FAILS, "128 open files"),
        ({"processes": 500, "num_threads": 400}, 8, FAILS, "500 processes"),
        ({"processes": 5000, "num_threads": 400}, 8, OK, ""),
        ({"file_size": 1 << 20}, 1, FAILS, "a file may have"),
        ({"locked": 1 << 16}, 8, OK, ""),
        ({"locked": 1 << 16, "has_infiniband": True}, 8, FAILS, "InfiniBand"),
        ({"core": math.inf, "core_is_a_file": True}, 8, WARN, "core file"),
        ({"core": math.inf}, 8, OK, ""),
        ({"address_space": 1 << 34}, 1, WARN, "16.0 GiB"),
    ],
)
def test_limits(change: dict[str, float], size: int, state: str, word: str) -> None:
    [found] = limits.judge(dataclasses.replace(ROOMY, **change), min(size, 8), size)
    assert found.state == state
    assert word in found.said


CPU = machine.Hardware(8, 32 << 30, 16 << 30, (), 0)
GPU = machine.Gpu("H100", 80 << 30, 80 << 30)
TWO = dataclasses.replace(CPU, gpus=(GPU, GPU), listed=2, driver="550.1", torch="2.13.0", cuda="12.8")


@pytest.mark.parametrize(
    ("hardware", "state", "word"),
    [
        (CPU, OK, "no GPU"),
        (TWO, OK, "2 x H100, driver 550.1, CUDA 12.8"),
        (dataclasses.replace(CPU, listed=8, torch="2.13.0+cpu"), FAILS, "torch 2.13.0+cpu is built for no GPU"),
        (dataclasses.replace(TWO, gpus=(GPU,)), FAILS, "2 ranks for 1 GPUs"),
        (dataclasses.replace(TWO, gpus=(GPU, dataclasses.replace(GPU, works="ECC error"))), FAILS, "GPU 1 (H100)"),
        (dataclasses.replace(TWO, gpus=(GPU, dataclasses.replace(GPU, free=20 << 30))), WARN, "60 of 80 GiB"),
        (dataclasses.replace(CPU, memory=1 << 30), FAILS, "1.0 GiB of memory"),
        (dataclasses.replace(CPU, cores=1), WARN, "1 cores for 2 ranks"),
        (dataclasses.replace(CPU, shared_memory=0), FAILS, "/dev/shm has 0 bytes free"),
        (dataclasses.replace(CPU, shared_memory=None), FAILS, "/dev/shm is missing"),
        (dataclasses.replace(TWO, shared_memory=64 << 20), WARN, "little for NCCL"),
        (dataclasses.replace(CPU, shared_memory=64 << 20), OK, ""),
    ],
)
def test_devices(hardware: machine.Hardware, state: str, word: str) -> None:
    [found] = machine.judge(hardware, 2)
    assert found.state == state, found
    assert word in found.said


def test_programs_count_where_they_are_needed() -> None:
    def judge(there: set[str], target: str = "local", engine: str = "direct", compiles: bool = False) -> str:
        [found] = machine.judge_programs(there, target, engine, compiles)
        return found.state

    assert judge(set()) == OK
    assert judge(set(), compiles=True) == FAILS
    assert judge({"ssh"}, "ssh", "torchrun") == OK
    assert judge({"ssh"}, "ssh", "deepspeed") == FAILS
    assert judge({"ssh", "pdsh"}, "slurm") == FAILS
    assert judge({"sbatch", "srun", "scontrol"}, "slurm") == OK


RUNS = disk.Place("run folder", "run.dir", Path("/data"))
FAST = disk.DiskFacts("/data", 1e9, 2e9, 1 << 40, 1 << 20)


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, OK, "1.0 GB/s with fsync"),
        ({"free_files": None}, OK, ""),
        ({"sound": False}, FAILS, "does not give back"),
        ({"renames": False}, FAILS, "half written"),
        ({"locks": False}, WARN, "flock"),
        ({"drops": False}, WARN, "cached pages"),
        ({"free": 1 << 29}, WARN, "537 MB free"),
        ({"free_files": 3}, FAILS, "3 more files"),
        ({"written": 1e7}, WARN, "slow"),
    ],
)
def test_file_systems(change: dict[str, float], state: str, word: str) -> None:
    [found] = disk.judge(RUNS, dataclasses.replace(FAST, **change))
    assert found.state == state
    assert word in found.said
    assert "run.dir" in found.cure or state == OK


def test_a_real_folder_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LARGEST", 8 << 20)
    facts = disk.probe(tmp_path)
    assert facts.sound
    assert facts.renames
    assert facts.locks
    assert facts.drops
    assert min(facts.written, facts.read) > 0
    assert list(tmp_path.iterdir()) == []
    assert disk.existing(tmp_path / "not" / "there") == tmp_path
    places = [RUNS, dataclasses.replace(RUNS, what="cache"), disk.Place("other", "TMPDIR", Path("/proc/self"))]
    found = disk.look([dataclasses.replace(place, path=tmp_path) for place in places[:2]] + places[2:])
    assert states(found) == [OK, OK, FAILS]
    assert found[1].said == f"{tmp_path} is on the file system of the run folder"
    assert "cannot be written" in found[2].said


def test_clocks_and_shared_folders() -> None:
    assert states(judge_clocks({"b": 0.02, "c": -0.3}, 0.001)) == [OK]
    assert states(judge_clocks({"b": 2.0}, 1.5)) == [OK]  # the network hides more than that
    [found] = judge_clocks({"b": 2.0, "c": -5.0, "d": 0.1}, 0.01)
    assert (found.state, found.said) == (WARN, "b is 2.0 s ahead, c is 5.0 s behind")
    assert states(judge_clocks({"b": -3600.0}, 0.01)) == [FAILS]
    assert states(judge_shared(Path("/runs"), [], 2)) == [OK]
    [found] = judge_shared(Path("/runs"), ["b"], 2)
    assert (found.state, found.said) == (FAILS, "what rank 0 writes into /runs is not seen on b")


def test_hosts_of_one_name_are_told_apart() -> None:
    places = [Place(rank, 4, rank % 2, 2) for rank in range(4)]
    assert labels_of(places, dict.fromkeys(range(4), "box")) == ["box (rank 0)"] * 2 + ["box (rank 2)"] * 2
    assert labels_of(places, {0: "a", 1: "a", 2: "b", 3: "b"}) == ["a", "a", "b", "b"]


# kernels


def test_a_kernel_that_crashes_or_hangs_costs_its_own_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two trials are broken in the child, as a package built for another torch breaks them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'distft.doctor.trials' in ' '.join(sys.orig_argv):\n"
        "    import distft.doctor.trials as trials\n"
        "    class Broken(dict):\n"
        "        pass\n"
        "    def look(*_):\n"
        "        return None\n"
        "    trials_main = trials.main\n"
        "    trials.TRIALS.update({'sdpa': os.abort, 'varlen': lambda: time.sleep(60), 'AdamW': lambda: 'runs'})\n"
        "    trials.TRIALS['flash-attn'] = lambda: 1 / 0\n"
        "    sys.exit(trials_main(sys.orig_argv[-1:]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(kernels, "START_SECONDS", 5.0)
    monkeypatch.setattr(kernels, "TRIALS", dict.fromkeys(("sdpa", "varlen", "flash-attn", "AdamW")))
    found = kernels.look(["sdpa", "AdamW"], 1.5)
    assert [(one.what, one.state) for one in found] == [
        ("sdpa", FAILS),
        ("varlen", WARN),
        ("flash-attn", WARN),
        ("AdamW", OK),
    ]
    assert "SIGABRT" in found[0].said
    assert found[1].said == "no answer within 1.5 s (doctor.seconds)"
    assert found[2].said == "ZeroDivisionError: division by zero"


def test_what_every_run_computes_with_is_right_here_and_a_wrong_kernel_would_be_seen() -> None:
    import torch

    for name in set(trials.ALWAYS) - {"varlen"}:  # which has tests of its own, and takes long to import
        assert trials.tried(name, trials.ALWAYS).state == OK
    with pytest.raises(ValueError, match="away from attention written out"):
        trials.agrees(lambda q, k, v: trials.by_hand(q, k, v) * 1.01, torch.float32)
    with pytest.raises(ValueError, match="gradient of the key"):
        trials.agrees(lambda q, k, v: trials.by_hand(q, k.detach() + 0 * k, v), torch.float32)
    missing = trials.tried("flash-attn", [])
    assert missing.state in (SKIPPED, OK)


# W&B and the hub


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that knows one key."""

    def do_POST(self) -> None:
        import base64

        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Basic " + base64.b64encode(f"api:{GOOD_KEY}".encode()).decode()
        self.send_response(200 if known else 401)
        self.end_headers()
        if known:
            self.wfile.write(b'{"data": {"viewer": {"username": "ada", "entity": "lab"}}}')

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def asked(address: str, key: str) -> Verdict:
    return services.judge_answer(address, *services.ask(f"{address}/graphql", services.WHO, key))


def test_the_trackers_server_is_asked_and_no_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as address:
        well = asked(address, GOOD_KEY)
        assert (well.state, well.said) == (OK, f"{address} accepts the key of ada")
        wrong = asked(address, "f" * 40)
        assert (wrong.state, wrong.said) == (WARN, f"{address} does not accept the key")
        assert "offline" in wrong.cure
    refused = asked(address, GOOD_KEY)
    assert refused.state == WARN
    assert "Connection refused" in refused.said
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(services, "ANSWER_SECONDS", 0.3)
        quiet = asked(f"http://127.0.0.1:{silent.getsockname()[1]}", GOOD_KEY)
    assert quiet.state == WARN
    assert "timed out" in quiet.said
    for one in (well, wrong, refused, quiet):
        assert GOOD_KEY not in str(one)
    assert services.judge_answer("x", 200, "<html>").state == WARN
    assert services.ask("file:///etc/passwd", None)[0] == 0
    assert states(services.tracker("none")) == [SKIPPED]


def test_the_hub_is_a_warning_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert states(services.hub()) == [SKIPPED]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert states(services.hub()) == [WARN]


# the command


def test_what_cannot_be_looked_at_is_refused() -> None:
    def problems(*words: str) -> list[str]:
        return check(compose(list(words), verb="doctor").run, None)

    assert problems() == []
    assert "Did you mean links?" in problems("doctor.checks=[link]")[0]
    assert "looks at nothing" in problems("doctor.checks=[]")[0]
    assert "doctor.seconds=0.0" in problems("doctor.seconds=0")[0]
    assert "doctor.slow_link=1.0" in problems("doctor.slow_link=1")[0]
    assert "doctor.min_bandwidth" in problems("doctor.min_bandwidth=-1")[0]
    assert "its folder does not exist" in problems("doctor.output=/nowhere/x.json")[0]
    assert "torchrun" in problems("launch.engine=torchrun")[0]
    with pytest.raises(Mistakes, match="doctor"):
        compose(["doctor.secs=1"], verb="doctor")


def examine(folder: Path, *words: str, before: Callable[[], None] | None = None) -> tuple[int, dict[str, Verdict], str]:
    """`distft doctor` as a person types it: exit code, verdicts by what they are about, and what was printed."""
    output = folder / "verdicts.json"
    finished = subprocess.run(
        [sys.executable, "-m", "distft", "doctor", f"doctor.output={output}", "log=none", f"run.dir={folder}", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DISTFT_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False, preexec_fn=before,
    )  # fmt: skip
    assert output.exists(), finished.stdout
    found = json.loads(output.read_text())
    assert found["exit_code"] == finished.returncode, finished.stdout
    return finished.returncode, {one["what"]: Verdict(**one) for one in found["verdicts"]}, finished.stdout


def test_two_ranks_look_at_a_machine_that_is_well(tmp_path: Path) -> None:
    code, found, text = examine(tmp_path, "launch.ranks=2", "doctor.checks=[versions,limits,disk,links,clock]")
    assert code == 0, text
    assert set(found) == {"versions", "limits", "run folder", "cache", "scratch", "links"}
    assert found["links"].said.startswith("inside a host, 1 pair by gloo: ")
    assert text.splitlines()[0] == "distft doctor looks at versions, limits, disk, links, clock"
    assert text.splitlines()[-1].startswith("A run can start; ")
    assert list(tmp_path.iterdir()) == [tmp_path / "verdicts.json"]


def test_too_few_open_files_fail(tmp_path: Path) -> None:
    def fewer() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))

    code, found, text = examine(tmp_path, "doctor.checks=[limits]", before=fewer)
    assert code == 3, text
    assert found["limits"].state == FAILS
    assert "150 open files" in found["limits"].said
    assert "ulimit -n" in text
    assert "Traceback" not in text

"""A process that follows another: it ends when that one does, whatever way it came to be its descendant."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

CHILD = """
import sys, time
{before}
from distft.parent import follow
follow(int(sys.argv[1]))
print("follows", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {middle!r}, str(os.getpid())]).pid, flush=True)
sys.stdin.read()
"""
THROUGH_ANOTHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"


@pytest.mark.parametrize("way", ["child", "through a launcher", "too late", "control"])
def test_a_follower_ends_with_the_process_that_it_follows(way: str) -> None:
    child = CHILD.format(before="time.sleep(2)" if way == "too late" else "")
    if way == "through a launcher":
        child = THROUGH_ANOTHER.format(child=child)
    if way == "control":
        child = child.replace("follow(int(sys.argv[1]))", "")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(middle=child)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    middle = psutil.Process(int(parent.stdout.readline()))
    if way != "too late":
        assert parent.stdout.readline() == "follows\n"
    family = [middle, *middle.children(recursive=True)]
    parent.kill()
    parent.wait()
    gone, left = psutil.wait_procs(family, timeout=1.5 if way == "control" else 10)
    for process in left:
        process.kill()
    assert bool(left) == (way == "control")
    assert len(gone) + len(left) == (2 if way == "through a launcher" else 1)

"""The devices that a test of this folder runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from distft.world import World, join, leave

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])
ELSEWHERE = pytest.mark.skipif(torch.cuda.is_available(), reason="a rank of a machine with a GPU is on the GPU")
EVERYWHERE = [pytest.param("cpu", marks=ELSEWHERE), GPU]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@contextmanager
def world_of_one(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """This process as the only rank, on `device`."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    world = join()
    try:
        assert world.device.type == device
        yield world
    finally:
        leave()

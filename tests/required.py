"""Trials that a machine may not be able to do: skipped with a reason, but a failure where they are required.

`DISTFT_REQUIRE=faults,cluster` names what is; the CI does.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def is_required(kind: str) -> bool:
    return kind in os.environ.get("DISTFT_REQUIRE", "").split(",")


def cannot(kind: str, reason: str) -> NoReturn:
    """This machine lacks what a test of this kind needs."""
    if is_required(kind):
        pytest.fail(f"this machine cannot do a trial that is required (DISTFT_REQUIRE={kind}): {reason}")
    pytest.skip(reason)

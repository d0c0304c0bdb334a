"""Which cluster tests run: their hosts are network namespaces, their Slurm and their browser are real ones.

They need root and packages of Debian, so they run where DISTFT_REQUIRE names `cluster`, as in `.ci/run`, which installs
those; elsewhere they are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.required import is_required

NEEDS = "iproute2, openssh-server, pdsh, slurm-wlm, munge and chromium of Debian, and root"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.cluster)
            if not is_required("cluster"):
                item.add_marker(pytest.mark.skip(reason=f"needs {NEEDS}: DISTFT_REQUIRE=cluster runs it"))

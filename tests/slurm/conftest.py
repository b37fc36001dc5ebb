"""A Slurm cluster of two nodes on this machine, and the small data set of the integration tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT, environment

SCRIPT = str(ROOT / "tests" / "slurm" / "cluster.sh")
_CANNOT_BE_HAD = 3  # exit status of cluster.sh on a machine that cannot run Slurm


@dataclass
class Cluster:
    """Runs Slurm's commands as on the login node."""

    folder: Path

    def __call__(self, *command: str, **extra: str) -> str:
        """Run a command, which must succeed; returns what it printed."""
        done = subprocess.run(
            ["bash", SCRIPT, "in", str(self.folder), *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(PYTHON=sys.executable, **extra),
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The controller's record of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self("scontrol", "show", "job", "--oneliner", number)))

    def wait(self, number: str) -> dict[str, str]:
        """Wait until the job has ended for good; returns its record."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return wait_for(lambda: self.has_state(number, *ended), f"the end of job {number}")

    def has_state(self, number: str, *states: str) -> dict[str, str] | None:
        """The job's record if it is in one of `states`."""
        found = self.job(number)
        return found if found["JobState"] in states else None


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 400) -> Any:
    """Poll until `condition` returns a true value; returns that value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running cluster, which is stopped afterwards together with everything that runs in it."""
    done = subprocess.run(["bash", SCRIPT, "install"], capture_output=True, text=True, timeout=900)
    if done.returncode == _CANNOT_BE_HAD:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    # a short path, because the length of a socket's name is limited
    with tempfile.TemporaryDirectory(prefix="evomoe-") as parent:
        folder = Path(parent) / f"slurm-{os.getpid()}"
        folder.mkdir()
        # The server has its own session, so that it does not get an interrupt of the tests; it stops when its
        # standard input closes.
        server = subprocess.Popen(
            ["bash", SCRIPT, "serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            said = server.stdout.readline()
            if said != "ready\n":
                pytest.fail(f"Slurm did not start: {said}{server.communicate()[1]}")
            yield Cluster(folder)
        finally:
            server.communicate(timeout=120)
        left = [p.name for p in Path("/run/netns").glob(f"{folder.name}-*")]
        assert not left, f"network namespaces left behind: {left}"

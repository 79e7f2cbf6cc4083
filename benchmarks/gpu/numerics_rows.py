"""A pytest plugin (``-p numerics_rows``): a JSON line per failed test, written when it fails.

The file is named by ``FUSED_LORA_ROWS``. A test of float32 results that misses its bound by less
than a factor of two is marked as near: the bounds hold for exact sums, and a GPU's tensor cores
truncate their accumulator (simulated, one case of 324 then misses by 3 %).
"""

from __future__ import annotations

import json
import os
import re

import pytest

from harness import processes

NEAR = 2.0
PROGRESS = 25  # reports between two rows of the counts so far
_MISSED = re.compile(r"relative RMS (\S+), bound (\S+), torch\.float32")

_counts = {"passed": 0, "failed": 0, "near": 0, "skipped": 0}


def is_near(message: str) -> bool:
    """Whether ``support.assert_error`` said that a float32 result is within NEAR bounds."""
    found = _MISSED.search(message)
    return bool(found) and float(found[1]) <= NEAR * float(found[2])


def _write(row: dict) -> None:
    with open(os.environ["FUSED_LORA_ROWS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def pytest_configure() -> None:
    processes.die_with_the_parent()  # the controller with the step, a worker with the controller


def pytest_runtest_logreport(report) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # its controller sees every report
        return
    if report.skipped:
        _counts["skipped"] += 1
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        near = is_near(message)
        _counts["near" if near else "failed"] += 1
        first_lines = " ".join(message.split())[:500]
        _write({"case": report.nodeid, "passed": False, "near": near, "failures": [first_lines]})
    elif report.when == "call":
        _counts["passed"] += 1
        if _counts["passed"] % PROGRESS == 0:
            _write({"case": "tests so far", "tests": _counts})


def pytest_sessionfinish(session, exitstatus) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)  # else it was not run to its end
    passed = exitstatus in ended and _counts["passed"] > 0 and _counts["failed"] == 0
    row = {"case": "all tests", "passed": passed, "tests": _counts}
    _write(row if passed else row | {"failures": [f"pytest's status is {int(exitstatus)}"]})


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node, call, report) -> None:
    """End a worker whose device is unusable: another takes its place, and only this test fails."""
    from fused_lora.ops.triton_impl import is_sticky

    if "PYTEST_XDIST_WORKER" in os.environ and is_sticky(call.excinfo.value):
        os._exit(70)

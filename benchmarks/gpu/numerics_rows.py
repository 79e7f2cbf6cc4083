"""A pytest plugin (``-p gpu.numerics_rows``): a JSON line per failed test, written when it fails.

``FUSED_LORA_ROWS`` names the file. A float32 result that misses its bound by less than a factor of
two is marked as near: the bounds hold for exact sums, but a GPU's tensor cores truncate their
accumulator (in a simulation of this, one case of 324 misses its bound, by 3 %).
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
    """Whether ``support.assert_error`` reports a float32 error of at most NEAR times its bound."""
    found = _MISSED.search(message)
    return bool(found) and float(found[1]) <= NEAR * float(found[2])


def _write(row: dict) -> None:
    with open(os.environ["FUSED_LORA_ROWS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def pytest_configure() -> None:
    # The controller ends with the step that started it, and a worker with its controller.
    processes.die_with_the_parent()


def pytest_runtest_logreport(report) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller gets every report
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
    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)  # otherwise the run is incomplete
    passed = exitstatus in ended and _counts["passed"] > 0 and _counts["failed"] == 0
    row = {"case": "all tests", "passed": passed, "tests": _counts}
    _write(row if passed else row | {"failures": [f"pytest's status is {int(exitstatus)}"]})


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node, call, report) -> None:
    """End a worker whose device is unusable: xdist replaces it, and only this test fails."""
    from fused_lora.ops.triton_impl import is_sticky

    if "PYTEST_XDIST_WORKER" in os.environ and is_sticky(call.excinfo.value):
        os._exit(70)

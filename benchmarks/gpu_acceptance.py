"""Check, tune and benchmark the library on a GPU: ``python benchmarks/gpu_acceptance.py``.

Runs from a bare checkout, in eight minutes by default (``--budget``): checks the kernels against
float64, times every candidate tile beside the vendor's products, runs the kernels' tests, repeats
results bit for bit, captures CUDA graphs, tunes, and benchmarks against eager PyTorch and PEFT, the
largest shapes first. Every step runs in a process of its own with a time limit, and every row is
written as soon as it is computed: a hang, a broken device or a kill loses only unfinished work.

Writes into ``--out``: ``rows.jsonl`` (a JSON line per result), ``summary.md``, ``tuned.json`` (to
use it, set ``FUSED_LORA_CACHE`` to the folder) and ``log.txt``. The last line printed is PASS, or
what failed or was not checked. The exit status is 0 for PASS, 2 if nothing could be run, else 1.
Without a GPU, ``TRITON_INTERPRET=1`` rehearses everything on small shapes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from gpu import summary
from gpu.budget import BUDGET, SOFT, STEPS
from harness import processes

LEAST_SECONDS = 5.0  # a step with a lower limit is skipped: starting its process takes seconds
PREFLIGHT_SECONDS = 120.0  # minimum: as the first step it reads every file and library from disk
TRACE_SECONDS = 2.0  # before its limit, a step dumps its stack to the log
FAILED, NO_DEVICE = 10, 2  # exit statuses of a step's process besides 0; any other is a crash


def run_step(step: str, path: Path, seconds: float) -> int:
    """Run one step in this process, and append each row to ``path`` once it is computed."""
    processes.die_with_the_parent()
    faulthandler.dump_traceback_later(max(1.0, seconds - TRACE_SECONDS))
    from gpu import steps  # imports torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        gpu = steps.Rehearsal(steps.torch.device("cpu"))
    elif steps.torch.cuda.is_available():
        cuda = steps.torch.cuda
        gpu = steps.Gpu(steps.torch.device("cuda", cuda.current_device()))
    else:
        return NO_DEVICE
    start, rows = time.monotonic(), []
    for row in getattr(steps, step)(gpu, steps.Allowance(SOFT * seconds)):
        rows.append({"step": step, "seconds": round(time.monotonic() - start, 2)} | row)
        append(path, rows[-1])
    return FAILED if summary.failed(rows) else 0


def append(path: Path, row: dict) -> None:
    """Append one row to the file as a whole line."""
    line = json.dumps(row, default=str) + "\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut off the previous line
                line = "\n" + line
        file.write(line.encode())


class Run:
    """All steps, each in a process of its own.

    Args:
        out: the folder for the results.
        budget: seconds for all steps together.
    """

    def __init__(self, out: Path, budget: float):
        self.out, self.end = out, time.monotonic() + budget
        self.rows = out / "rows.jsonl"
        self.process: subprocess.Popen | None = None
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.environment.setdefault("FUSED_LORA_CACHE", str(out))

    def steps(self, names: list[str]) -> Iterator[tuple[str, int | None]]:
        """Run ``names`` in order; yield each with its exit status, None if stopped or skipped."""
        for at, name in enumerate(names):
            left = self.end - time.monotonic()
            limit = left * STEPS[name] / sum(STEPS[later] for later in names[at:])
            if name == "preflight":
                limit = max(limit, min(left, PREFLIGHT_SECONDS))
            if limit < LEAST_SECONDS:
                append(self.rows, {"step": name, "skipped": f"{left:.0f} s of the budget left"})
                yield name, None
                continue
            status = self._step(name, limit)
            if status is None:
                failure = f"stopped after {limit:.0f} s, its limit"
                append(self.rows, {"step": name, "passed": False, "failures": [failure]})
            elif status not in (0, FAILED) and (status, at) != (NO_DEVICE, 0):
                failure = f"ended with status {status}: {self._last_line()}"
                append(self.rows, {"step": name, "passed": False, "failures": [failure]})
            yield name, status

    def _step(self, name: str, limit: float) -> int | None:
        command = [sys.executable, __file__, "--step", name, "--rows", self.rows]
        with (self.out / "log.txt").open("a") as log:
            log.write(f"== {name}\n")
            log.flush()
            self.process = subprocess.Popen(
                [*map(str, command), "--seconds", str(limit)],
                stdout=log, stderr=log, env=self.environment, start_new_session=True,
            )  # fmt: skip
            try:
                return self.process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                self.stop()

    def stop(self) -> None:
        """Kill the running step and every process that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # it may hang in the driver
                self.process.wait(10)
            self.process = None

    def _last_line(self) -> str:
        lines = (self.out / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 for PASS, 2 without a GPU, else 1."""
    options = parse(arguments)
    if options.step:
        return run_step(options.step, options.rows, options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out.resolve(), options.budget)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    heading = {"step": "run", "date": date, "budget": options.budget, "commit": options.commit}
    append(run.rows, heading)
    first = len(summary.load(run.rows)) - 1

    def interrupted(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        for name, status in run.steps(options.only):
            rows = summary.load(run.rows)[first:]
            print(summary.line(name, rows), flush=True)
            if status == NO_DEVICE and name == options.only[0]:
                print(
                    "expected a GPU, got a machine without one: nothing was run;"
                    " TRITON_INTERPRET=1 rehearses it on a CPU",
                    file=sys.stderr,
                )
                return NO_DEVICE
            summary.write(run.out / "summary.md", rows)
            if name == "preflight" and status != 0:
                print("the preflight failed: the other steps would be meaningless", flush=True)
                break
    except KeyboardInterrupt:
        run.stop()
        append(run.rows, {"step": "run", "passed": False, "failures": ["interrupted"]})
    rows = summary.load(run.rows)[first:]
    summary.write(run.out / "summary.md", rows)
    print(f"{run.rows} and summary.md")
    print(summary.verdict(rows))
    return 0 if summary.verdict(rows).startswith("PASS") else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; the hidden options are for the steps' own processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=_seconds, default=BUDGET, metavar="SECONDS", help="for all steps together"
    )
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
        help=f"only these of {', '.join(STEPS)}",
    )  # fmt: skip
    parser.add_argument("--commit", help="of the code, for a checkout without a .git folder")
    parser.add_argument(
        "--out", type=Path, default=Path("results") / "gpu", help="folder for the results"
    )
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=_seconds, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = [name for name in STEPS if name in options.only]
    return options


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())

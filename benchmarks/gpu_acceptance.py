"""One command for whoever has a GPU: ``python benchmarks/gpu_acceptance.py``.

Runs every kernel against float64, repeats results bit for bit, captures and replays CUDA graphs
with dropout, tunes, benchmarks against the frozen layer, eager PyTorch, PEFT and torch.compile, and
sets what was measured beside what was modelled. Writes ``results/<gpu>.json`` and ``.md``, and ends
with one line: PASS, or what failed. Status 0, 1, or 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import acceptance
from acceptance import Gpu, Step
from fused_lora.tune import Layer
from shapes import GPU_QUICK, GPU_TARGETS

RESULTS = Path(__file__).with_name("results")
SMALL = [(63, 300, 123, 8), (48, 1024, 2048, 16), (512, 1024, 1024, 64), (2048, 2048, 512, 128)]


def layers(quick: bool) -> list[Layer]:
    """What is tuned and timed."""
    shapes = GPU_QUICK if quick else GPU_TARGETS
    return [Layer(*shape, p=p) for shape in shapes for p in (0.0, 0.1)]


def steps(gpu: Gpu, quick: bool, seconds: float) -> dict[str, Callable[[], Step]]:
    """What is run, by name, in order."""
    timed = layers(quick)
    return {
        "numerics": partial(acceptance.numerics, gpu),
        "bitwise repeatability": partial(acceptance.repeatability, gpu, SMALL),
        "CUDA graphs": partial(acceptance.graphs, gpu, SMALL),
        "tuning": partial(acceptance.tuning, gpu, timed),
        "benchmark": partial(acceptance.benchmark, gpu, timed, seconds),
        "measured over modelled": partial(acceptance.comparison, gpu, timed),
    }


def accept(planned: dict[str, Callable[[], Step]]) -> dict[str, Step]:
    """Run every step; one that raises has failed, and the others run nevertheless."""
    done = {}
    for name, run in planned.items():
        print(f"{name} ...", flush=True)
        try:
            done[name] = run()
        except Exception as error:
            traceback.print_exc()
            first_line = str(error).strip().partition("\n")[0]
            done[name] = Step("did not finish", [f"{type(error).__name__}: {first_line}"])
        print(f"  {'passed' if done[name].passed else 'FAILED'}: {done[name].summary}", flush=True)
    return done


def verdict(done: dict[str, Step]) -> str:
    """PASS, or what failed."""
    failed = [f"{name} ({len(s.failures)})" for name, s in done.items() if not s.passed]
    return f"FAIL: {', '.join(failed)}" if failed else "PASS"


def write(folder: Path, environment: dict, done: dict[str, Step]) -> Path:
    """Both files, named after the GPU; returns the JSON one."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", environment["device_name"].lower()).strip("-")
    found = {
        step: {"passed": s.passed, "summary": s.summary, "failures": s.failures}
        | ({} if s.details is None else {"details": s.details})
        for step, s in done.items()
    }
    content = {"environment": environment, "verdict": verdict(done), "steps": found}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(environment, done), encoding="utf-8")
    return path


def markdown(environment: dict, done: dict[str, Step]) -> str:
    """The summary; every time in it was measured on the GPU that it names."""
    lines = [f"# {environment['device_name']}", "", f"**{verdict(done)}**", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    lines += ["", "| step | | |", "|---|---|---|"]
    lines += [
        f"| {name} | {'passed' if step.passed else 'failed'} | {step.summary} |"
        for name, step in done.items()
    ]
    for name, step in done.items():
        if step.failures:
            lines += ["", f"## What failed: {name}", "", *(f"- {line}" for line in step.failures)]
        if step.details:
            lines += ["", f"## {name.capitalize()}", "", *_table(step.details)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict]) -> list[str]:
    """``rows`` with nested numbers spread over columns."""
    flat = [
        {
            (key if inner is None else f"{inner}" if key == "ratios" else f"{key}: {inner}"): value
            for key, given in row.items()
            for inner, value in (given.items() if isinstance(given, dict) else [(None, given)])
            if key != "left out"
        }
        for row in rows
    ]
    heads = list(dict.fromkeys(head for row in flat for head in row))
    body = [" | ".join(_cell(row.get(head, "")) for head in heads) for row in flat]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {row} |" for row in body)]


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="tune and time four shapes only")
    parser.add_argument("--seconds", type=float, default=10.0, help="of benchmark, a layer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("expected a GPU, got a machine without one: nothing was run", file=sys.stderr)
        return 2
    gpu = Gpu(torch.device("cuda", torch.cuda.current_device()))
    done = accept(steps(gpu, options.quick, options.seconds))
    path = write(options.out, gpu.environment(), done)
    for name, step in done.items():
        for line in step.failures[:10]:
            print(f"{name}: {line}")
    print(f"{path} and {path.with_suffix('.md').name}")
    print(verdict(done))
    return 0 if verdict(done) == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())

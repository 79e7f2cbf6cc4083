"""Compile the kernels for GPUs that are not present, and check the shipped configs.

    python benchmarks/compile_report.py --slice                     two minutes: what CI runs
    python benchmarks/compile_report.py --json rows.jsonl --write   everything: two hours on 2 cores
    python benchmarks/compile_report.py --arch sm_90 --kernel lora_gemm --rank 16 64
    python benchmarks/compile_report.py --search --arch sm_80 --kernel lora_gemm --dtype bf16

Kernels are compiled but not run: no GPU is needed and nothing is timed. Exits with 1 if a shipped
config spills registers, exceeds shared or tensor memory, compiles to nothing but traps, lacks its
architecture's matrix instructions, or has a main loop that is not pipelined. ``--json`` skips the
cases whose rows are in the file already and appends the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import triton

from compiled import render, run, search, sweep
from compiled.cases import DTYPES, PRODUCTS, SIZES

RESULTS = Path(__file__).parent / "results" / "compiled"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=sweep.ARCHS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rank", nargs="+", type=int, default=list(sweep.RANKS))
    parser.add_argument("--kernel", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--dropout", choices=("on", "off", "both"), default="both")
    parser.add_argument(
        "--slice",
        nargs="*",
        choices=sweep.SLICE_PARTS,
        help="a subset: for some calls, the first and the last candidate, or one of them",
    )
    parser.add_argument("--search", action="store_true", help="all candidates, not the shipped")
    parser.add_argument("--rows", choices=SIZES, default="even", help="alignment, with --search")
    parser.add_argument("--json", type=Path, metavar="F", help="JSON lines, one per case")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write results/{RESULTS.name}/ARCH.txt, search-ARCH.txt",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def wanted(options: argparse.Namespace) -> list:
    """The cases that the options select."""
    if options.search:
        kernels = [kernel for kernel in options.kernel if kernel in search.PROBES]
        return [
            case
            for arch in options.arch or sweep.ARCHS
            for kernel in kernels
            for dtype in options.dtype
            for case in search.cases(arch, kernel, dtype, options.rows)
        ]
    if options.slice is not None:
        parts = options.slice or sweep.SLICE_PARTS
        return list(sweep.slice_of(options.arch or sweep.SLICE_ARCHS, parts))
    dropout = {"on": (True,), "off": (False,), "both": (False, True)}[options.dropout]
    return list(
        sweep.full(
            options.arch or sweep.ARCHS, options.dtype, options.rank, options.kernel, dropout
        )
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a shipped config is unfit, or 2 under TRITON_INTERPRET."""
    options = parse(arguments)
    if triton.knobs.runtime.interpret:
        print("expected TRITON_INTERPRET to be unset: nothing would be compiled", file=sys.stderr)
        return 2
    cases = wanted(options)
    done = dict(render.load(options.json)) if options.json else {}
    missing = [case for case in cases if repr(case) not in done]
    with options.json.open("a") if options.json else nullcontext() as file:
        for case, row in run.compile_cases(missing, options.jobs):
            done[repr(case)] = row
            if file is not None:
                render.append(file, case, row)
    rows = [(case, done[repr(case)]) for case in cases]
    for arch in dict.fromkeys(case.arch for case in cases):
        of_arch = [(case, row) for case, row in rows if case.arch == arch]
        text = search.table(of_arch) if options.search else render.arch_table(arch, of_arch)
        print(text, end="\n\n")
        if options.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            name = f"search-{arch}.txt" if options.search else f"{arch}.txt"
            (RESULTS / name).write_text(text + "\n")
    if options.search:
        return 0
    unfit = [(case, row) for case, row in rows if row.faults]
    for case, row in unfit:
        print(f"{case}: {'; '.join(row.faults)}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(unfit)} unfit", file=sys.stderr)
    return int(bool(unfit))


if __name__ == "__main__":
    sys.exit(main())

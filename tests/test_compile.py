"""The shipped tiles, compiled for GPUs that need not be present: they fit, and none spills."""

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compiled import limits, machine_code, pipeline, sources, sweep
from compiled.cases import DTYPES, MEMBERS, PRODUCTS
from fused_lora.kernels import select_config
from fused_lora.kernels.config import SINGLE_PASS_MAX_RANK, Target, is_valid
from support import by_default, swept

ROOT = Path(__file__).parents[1]


def script(*command) -> subprocess.CompletedProcess:
    """A script in a process whose kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


@swept
@pytest.mark.parametrize("arch", sweep.SLICE_ARCHS)
@pytest.mark.parametrize("part", sweep.SLICE_PARTS)
def test_a_slice_of_the_shipped_tiles_compiles_clean(arch, part, tmp_path):
    rows = tmp_path / "rows.jsonl"
    report = ROOT / "benchmarks" / "compile_report.py"
    done = script(report, "--slice", part, "--arch", arch, "--jobs", 1, "--json", rows)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == len(list(sweep.slice_of([arch], [part])))
    for row in found:
        assert row["spill"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert row["registers"] > 0, row


STREAMING = {"shrink", "rank_grad"}
# A file, an edit of it, the kernels whose rows it invalidates.
EDITS = [
    ("kernels/shrink.py", ("# The blocks of one row", "# All blocks of one row"), set()),
    ("kernels/shrink.py", ("    acc *= factor", "    acc *= 1 * factor"), {"shrink"}),
    ("kernels/dropout.py", ("z >> 30", "z >> 29"), {"shrink", "dropout_mask"}),
    ("kernels/common.py", ("last = tl.atomic_add", "last = 0 + tl.atomic_add"), STREAMING),
    ("kernels/thin_pair.py", ("block = 1024 //", "block = 512 //"), {"thin_pair", "sum_pair"}),
    ("kernels/tile_tables.py", ("_HOPPER = (", "_HOPPER = 1 * ("), set()),
    ("compiled/cases.py", ("rank_grad(B.t(), u,", "rank_grad(B.t(), u + 0,"), {"rank_grad"}),
    ("compiled/report.py", ("spill=code.spill", "spill=code.stack"), set(PRODUCTS)),
]


@pytest.mark.parametrize(
    "case", by_default(EDITS[1:4], EDITS), ids=[f"{file} {edit[0]:.30}" for file, edit, _ in EDITS]
)
def test_an_edit_invalidates_the_rows_of_the_kernels_that_it_reaches(case, tmp_path, monkeypatch):
    file, edit, invalid = case
    before = {kernel: sources.digest(kernel) for kernel in PRODUCTS}
    folders = {package: tmp_path / package.rpartition(".")[2] for package in sources.FOLDERS}
    for package, copy in folders.items():
        shutil.copytree(sources.FOLDERS[package], copy)
    text = (tmp_path / file).read_text()
    assert text.count(edit[0]) == 1
    (tmp_path / file).write_text(text.replace(*edit))
    monkeypatch.setattr(sources, "FOLDERS", folders)
    monkeypatch.setattr(sources, "_module", lru_cache(sources._Module))
    after = {kernel: sources.digest.__wrapped__(kernel) for kernel in PRODUCTS}
    assert {kernel for kernel in PRODUCTS if after[kernel] != before[kernel]} == invalid


def test_a_report_continues_from_its_rows(tmp_path):
    """A second run adds no rows and prints the same, for a kernel with tiles and one without."""
    rows = tmp_path / "rows.jsonl"
    kernels = ["dropout_mask", "thin_pair"]
    part = ("--arch", "sm_90", "--dtype", "bf16", "--rank", 8, "--dropout", "off", "--kernel")
    report = ROOT / "benchmarks" / "compile_report.py"
    command = (report, *part, *kernels, "--jobs", 1, "--json", rows)
    first = script(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    written = rows.read_text()
    found = [json.loads(line) for line in written.splitlines()]
    assert len(found) == len(list(sweep.full(["sm_90"], ["bf16"], [8], kernels, [False])))
    assert all(row["spill"] == 0 < row["registers"] for row in found)
    again = script(*command)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert rows.read_text() == written


@swept
def test_planted_faults_are_found():
    done = script(ROOT / "tests" / "planted_kernels.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: " ".join(faults) for name, faults in json.loads(done.stdout).items()}
    assert found.pop("clean") == ""
    said = {
        "spills": "spills",
        "shared memory": "of shared memory",
        "own iteration": "consumes a load in its own iteration",
        "own iteration, descriptors": "consumes a load in its own iteration",
        "waits for all, sm_100": "waits for all matrix groups",
        "own iteration, AMD": "consumes a load in its own iteration",
        "waits for all": "waits for all matrix groups",
        "does not compile": "does not compile",
        "traps": "a body of traps",
        "no matrix": "no HMMA",
    }
    assert found.keys() == said.keys()
    for name, words in said.items():
        assert words in found[name], (name, found[name])


# architecture, registers per thread, then per block: shared bytes, warps, tensor memory columns;
# occupancy, from the CUDA occupancy calculator, for AMD from the arithmetic of the CDNA guides
OCCUPANCY = [
    ("sm_80", 64, 0, 8, 0, 0.5),
    ("sm_80", 255, 98_304, 8, 0, 8 / 64),
    ("sm_80", 32, 40_960, 4, 0, 16 / 64),
    ("sm_86", 40, 0, 8, 0, 48 / 48),
    ("sm_90", 168, 0, 4, 0, 12 / 64),
    ("sm_90", 16, 0, 1, 0, 32 / 64),
    ("sm_80", 255, 200_000, 8, 0, 0.0),
    ("sm_100", 64, 0, 8, 256, 16 / 64),
    ("gfx942", 128, 16_384, 4, 0, 16 / 32),
    ("gfx942", 512, 0, 8, 0, 0.0),
]


@pytest.mark.parametrize("case", OCCUPANCY, ids=str)
def test_occupancy(case):
    *of, expected = case
    assert limits.occupancy(*of) == expected


def target_of(arch: str) -> Target:
    return select_config.INTERPRETER if arch == "interpreter" else limits.target(arch)


@pytest.mark.parametrize("arch", [*sweep.ARCHS, "interpreter"])
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100, 256, 1000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_gets_a_config_that_fits(arch, rank, itemsize):
    target = target_of(arch)
    for M in (1, 64, 512, 32_768):
        for N in (17, 1024, 16_384):
            chosen = [
                select_config.gemm_config(target, itemsize, M, N, rank, aligned=N != 17),
                select_config.shrink_config(target, itemsize, M, N, rank, describable=N != 17),
                select_config.rank_grad_config(target, itemsize, M, N, rank, describable=N != 17),
                select_config.add_config(target, itemsize, M, N, rank),
                select_config.gemm_config(
                    target, itemsize, M, N, rank, aligned=N != 17, segments=8
                ),
            ]
            if rank <= SINGLE_PASS_MAX_RANK:
                chosen.append(
                    select_config.single_pass_config(
                        target, itemsize, M, N, rank, describable=N != 17
                    )
                )
            for config in chosen:
                assert is_valid(config, target, itemsize, rank), config


@pytest.mark.parametrize("arch", sweep.ARCHS)
@pytest.mark.parametrize("rank", [8, 64])
def test_large_shapes_get_large_tiles(arch, rank):
    target = limits.target(arch)
    config = select_config.gemm_config(target, 2, 8192, 4096, rank, aligned=True)
    assert config.block_m >= 128, config
    assert config.block_n >= 128, config


@pytest.mark.parametrize("arch", sweep.ARCHS)
@pytest.mark.parametrize("kernel", [name for name in PRODUCTS if name not in sweep.THIN])
def test_three_tiles_a_key(arch, kernel):
    """For every kind of call there are at least three tiles to choose from."""
    kinds = (1, False), (MEMBERS, False), (1, kernel == "lora_gemm")
    calls = product(DTYPES, sweep.RANKS, ("even", "narrow"), kinds)
    for dtype, rank, rows, of in calls:
        if candidates := sweep.shipped(arch, kernel, dtype, rank, rows, *of):
            tiles = {config.tile(rank) for config in candidates}
            assert len(tiles) >= 3, (dtype, rank, rows, candidates)


@pytest.mark.parametrize("arch", sweep.ARCHS)
def test_tiles_that_leave_fewer_slots_idle_are_chosen(arch):
    """With a narrow weight and few rows, the largest tile would leave most SMs idle."""
    target = limits.target(arch)
    largest = select_config.gemm_candidates(target, 2, 16, aligned=True)[0]
    for M, N in ((512, 1024), (128, 4096)):
        config = select_config.gemm_config(target, 2, M, N, 16, aligned=True)
        assert select_config.fill(config, target, M, N) >= 2 * select_config.fill(
            largest, target, M, N
        )


def test_an_unknown_gpu_gets_the_conservative_tile():
    target = Target("sm_75", sms=40, shared_bytes=select_config.DEFAULT_SHARED_BYTES)
    config = select_config.gemm_config(target, 2, 4096, 4096, 16, aligned=True)
    assert (config.block_m, config.block_n, config.num_warps) == (64, 64, 4)
    assert not config.descriptors


def test_an_unknown_gpu_has_a_tile_for_every_rank():
    target = Target("sm_103", sms=148, shared_bytes=select_config.DEFAULT_SHARED_BYTES)
    for itemsize, describable, rank in product((2, 4), (True, False), range(1, 257)):
        for choose in (select_config.shrink_config, select_config.rank_grad_config):
            for segments in (0, 64):
                sizes = 4096, 2048, rank
                choose(target, itemsize, *sizes, describable=describable, segments=segments)


# A loop over the steps of several tiles: products, and a tile's end that a jump skips.
STEPS = """
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17], R14 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24 ;
{wait}
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR40], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/               @P0 BRA 0x90 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR40], RZ, !UPT, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   UTMASTG.2D [UR16], [UR4] ;
        /*0090*/                   UTMALDG.2D [UR12], [UR20] ;
        /*00a0*/               @P1 BRA 0x0 ;
"""


def test_serial_products_and_the_end_of_a_tile():
    for wait, serial in (("", False), ("/*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", True)):
        text = STEPS.format(wait=" " * 8 + wait)
        loop = machine_code.Code(0, 0, machine_code.parse_sass(text)).main_loop()
        assert not any(i.name.startswith("UTMASTG") for i in loop)
        assert len(loop) == 7 + serial
        assert machine_code.are_serial(loop) is serial


TILES = """
  scf.for %step = %c0 to %steps step %c1 iter_args(%acc = %zero) -> (tensor<64x64xf32>) {
    %next = ttng.warp_group_dot %p, %q, %acc : !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32>
    %end = scf.if %last -> (tensor<64x64xf32>) {
      %all = ttng.warp_group_dot_wait %next {pendings = 0 : i32} : tensor<64x64xf32>
      STORE
      scf.yield %zero : tensor<64x64xf32>
    } else {
      scf.yield %next : tensor<64x64xf32>
    }
    scf.yield %end : tensor<64x64xf32>
  }
"""


def test_the_end_of_a_tile_may_wait():
    for store, found in (
        ("ttng.async_tma_copy_local_to_global %o[%m, %n] %s", []),
        ("", ["waits for all matrix groups"]),
    ):
        (loop,) = pipeline.main_loops(TILES.replace("STORE", store))
        assert pipeline.faults(loop) == found

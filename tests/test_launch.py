"""Repeated launches pass the driver what Triton's do; launches under hooks go through Triton."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support import by_default, swept

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
HEADERS = (  # needed to build Triton's launcher
    Path(sysconfig.get_path("include")) / "Python.h",
    Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda.h",
)

builds = pytest.mark.skipif(
    shutil.which("gcc") is None or not all(map(Path.is_file, HEADERS)),
    reason="builds a stub of the driver: needs gcc, Python.h and cuda.h",
)


def run(*command) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", by_default(["gfx942"], ["sm_80", "sm_90", "gfx942"]))
def test_the_driver_gets_the_same_binary_and_arguments(arch):
    result = run(HERE / "launch_cases.py", arch)
    check(result)
    assert result["in C"] == 0  # no launcher of Triton's: the binary's own function is called


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="its launcher is compiled C")
@pytest.mark.parametrize("arch", by_default(["sm_90"], ["sm_90", "gfx942"]))
def test_the_function_below_the_launcher_gets_the_same_arguments(arch):
    result = run(HERE / "launch_cases.py", arch, "launcher")
    check(result)
    assert result["in C"] == result["plans"] > 0


def check(result: dict) -> None:
    assert result["different"] == []
    assert result["not repeated"] == []
    # Cases run on two devices, and most compile a binary of their own; otherwise they prove little.
    assert result["binaries"] > result["cases"]


@swept
@builds
def test_the_real_launcher_gets_the_same_bytes(tmp_path):
    result = run(HERE / "launch_real.py", tmp_path)
    check(result)
    assert result["cases"] >= 42
    assert result["above C"] == 0
    # On two devices, each case is launched by Triton once and repeated twice. Most cases launch one
    # kernel; the three "thin" ones, the two pairs and the four activations two, the three of
    # members three and the three of segments four.
    assert result["launches"] == 2 * 3 * (result["cases"] + 3 + 2 + 4 + 2 * 3 + 3 * 3)
    # Triton encodes all three descriptors of a launch. Repeated launches encode each address once.
    assert result["maps"] == [3, 3, 0, 1, 0]
    planted = result["planted"]
    assert len(planted) == 11
    for fault, found in planted.items():
        assert found == (fault != "nothing"), fault


@pytest.fixture(scope="module")
def limits():
    return run(HERE / "launch_limits.py")


def test_a_watched_launch_is_plain(limits):
    watched = limits["watched"]
    for name, passes in watched.items():
        assert passes == (0 if name == "nothing" or name.startswith("after ") else 1), name
    assert len(watched) == 15


def test_a_tensor_on_another_device_is_not_taken_for_one_of_an_earlier_launch(limits):
    assert limits["moved"] == 1


def test_a_launcher_in_an_unknown_form_is_called_itself(limits):
    below = {name for name, called in limits["below"].items() if called}
    assert below == {"as in 3.6", "as in 3.7"}


def test_nothing_is_kept_alive_and_tables_are_bounded(limits):
    assert limits["kept"] == {"freed": True, "plans bounded": True, "addresses bounded": True}


@swept
@pytest.mark.parametrize("flags", [(), pytest.param(("--launcher",), marks=builds)])
def test_the_benchmark_of_host_time_prints_both_tables(flags):
    script = HERE.parent / "benchmarks" / "launch_overhead.py"
    command = sys.executable, script, "--seconds", "0.2", *flags
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]  # 1: a target was missed, allowed here
    for name in ("lora_gemm, 3 descriptors", "step", "bare Function", "FusedLoRALinear"):
        assert name in done.stdout

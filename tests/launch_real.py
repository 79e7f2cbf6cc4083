"""Compares repeated launches and Triton's own in a CUDA driver: ``launch_real.py FOLDER``.

Like ``launch_cases.py``, but with Triton's compiler and its launcher in C, on top of
``stub_cuda.c``. The stub records everything that a launch passes to the driver, down to the bytes
of every parameter. Only ptxas is left out, since a driver accepts PTX too. Build products go to
FOLDER, which should be empty. Needs gcc, Python's headers, and TRITON_INTERPRET to be unset.

Prints, as JSON, the cases that differ, and whether each fault planted in repeated launches was
found.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from fake_driver import FakeDriver
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

STUB = Path(__file__).parent / "stub_cuda.c"
MOST_LAUNCHES = 16  # per case; the same limit as in stub_cuda.c


class Stub:
    """``stub_cuda.c``, built and loaded."""

    def __init__(self, folder: Path):
        path, headers = folder / "libcuda.so.1", Path(nvidia.__file__).parent / "include"
        flags = "-O1", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{headers}"
        subprocess.run(["gcc", *flags, STUB, "-o", path], check=True)
        ctypes.CDLL(str(path))
        library = ctypes.CDLL(path.name)  # by name, as Triton opens it: the library loaded above
        room = ctypes.c_char * ctypes.c_size_t.in_dll(library, "launch_bytes").value
        self._launches = (room * MOST_LAUNCHES).in_dll(library, "launches")
        self._count = ctypes.c_int.in_dll(library, "launch_count")
        self.ever = ctypes.c_long.in_dll(library, "launches_ever")
        self._describe = library.describe_parameters
        self._describe.argtypes = ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_int)

    def describe(self, function: int, sizes: list[int]) -> None:
        """Tell the stub the size in bytes of each parameter of ``function``."""
        self._describe(function, len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def caught(self, run) -> list[tuple]:
        """The launches that reach the driver during ``run``: (function handle, whole record)."""
        self._count.value = 0
        run()
        launches = [launch.raw for launch in self._launches[: self._count.value]]
        return [(all_of_it[:8], all_of_it) for all_of_it in launches]


class StubDriver(FakeDriver):
    """A simulated GPU, driven by Triton's real launcher and its helpers in C."""

    def __init__(self, stub: Stub):
        super().__init__("sm_90")
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        load_binary = self.utils.load_binary

        def load(name, image, *rest):
            handles = load_binary(name, image, *rest)
            stub.describe(handles[1], parameter_sizes(image.decode()))
            return handles

        self.utils.load_binary = load


def parameter_sizes(ptx: str) -> list[int]:
    """The size in bytes of every parameter of the kernel in ``ptx``."""
    (declared,) = re.findall(r"\.entry[^(]*\(([^)]*)\)", ptx)
    sizes = re.findall(r"\.param\b.*?\.[busf](\d+)\b[^,[]*(?:\[(\d+)\])?", declared)
    assert len(sizes) == declared.count(".param")
    return [int(bits) // 8 * int(count or 1) for bits, count in sizes]


# Position of an argument of the launcher, and the change planted in it. The positions are those for
# a gemm with descriptors: its seven operands are arguments 9 to 15.
FAULTS = {
    "nothing": (0, lambda programs: programs),
    "grid": (0, lambda programs: programs + 1),
    "stream": (3, lambda stream: stream + 1),
    "warps": (5, lambda metadata: (2 * metadata[0], *metadata[1:])),
    "shared memory": (5, lambda metadata: (*metadata[:2], metadata[2] + 16)),
    "descriptor": (9, lambda descriptor: replace(descriptor, padding="nan")),
    "tensor": (12, lambda tensor: tensor[1:]),
    "scalar": (16, lambda scalar: scalar + 1),
    "number": (17, lambda number: number + 1),
}


def with_fault(plan: type, at: int, change) -> type:
    """A plan class that applies ``change`` to the launcher's argument number ``at``."""

    class Faulty(plan):
        def __init__(self, *args):
            super().__init__(*args)
            run = self.run
            self.run = lambda *args: run(*args[:at], change(args[at]), *args[at + 1 :])

    return Faulty


def main(folder: Path) -> None:
    """Print the cases that differ, and which planted faults are found."""
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    CUDABackend.make_cubin = lambda self, ptx, *args: ptx.encode()
    stub = Stub(folder)
    # Imports PyTorch, whose libraries load libcuda.so.1 and keep it: the stub must come first.
    from launch_cases import cases, compare, gemm

    from fused_lora.kernels import launch

    active = StubDriver(stub)
    driver.set_active(active)
    result = compare(cases("sm_90", folder), active, stub.caught) | {"launches": stub.ever.value}
    planted = {}
    for name, fault in FAULTS.items():
        launch.forget()
        with patch.object(launch, "_Plan", with_fault(launch._Plan, *fault)):
            found = compare({name: gemm(descriptors=True)}, active, stub.caught)
        planted[name] = bool(found["different"])
    print(json.dumps(result | {"planted": planted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

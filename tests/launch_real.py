"""Compares repeated launches and Triton's own in a CUDA driver: ``launch_real.py FOLDER``.

Like ``launch_cases.py``, but with Triton's compiler and its launcher in C, on top of
``stub_cuda.c``. The stub records everything that a launch passes to the driver, down to the bytes
of every parameter. Only ptxas is left out, since a driver accepts PTX too. Build products go to
FOLDER, which should be empty. Needs gcc, Python's headers, and TRITON_INTERPRET to be unset.

Prints, as JSON, the cases that differ, and whether each fault planted in repeated launches was
found.
"""

import ctypes
import inspect
import json
import os
import re
import subprocess
import sys
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
        self.maps = ctypes.c_long.in_dll(library, "maps_ever")
        self.recording = ctypes.c_int.in_dll(library, "recording")
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


# The part of a launch, the place in it, and the change planted there. The places in "given" are
# those of a gemm with descriptors: three of five arguments each (map, shape, strides), six
# pointers, the scalar and the numbers.
FAULTS = {
    "nothing": ("before", 0, lambda programs: programs),
    "grid": ("before", 0, lambda programs: programs + 1),
    "stream": ("stream", 0, lambda stream: stream + 1),
    "launch attribute": ("after", 2, lambda dependent: not dependent),
    "warps": ("metadata", 0, lambda warps: 2 * warps),
    "shared memory": ("metadata", 2, lambda size: size + 16),
    "maps": ("given", slice(0, 6, 5), lambda maps: maps[::-1]),
    "shape of a descriptor": ("given", 1, lambda rows: rows + 1),
    "pointer": ("given", 15, lambda address: address + 2),
    "scalar": ("given", 21, lambda scalar: scalar + 1),
    "number": ("given", 22, lambda number: number + 1),
}


def with_fault(plan: type, part: str, at: int | slice, change) -> type:
    """A plan class that applies ``change`` to what stands at ``at`` in one part of a launch."""

    class Faulty(plan):
        def __init__(self, compiled, *args):
            super().__init__(compiled, *args)
            function, before, after, packed = self.entry
            metadata = after.index(compiled.packed_metadata)

            def faulty(*arguments):
                parts = {
                    "before": list(before),
                    "stream": [arguments[len(before)]],
                    "after": list(after),
                    "metadata": list(after[metadata]),
                    "given": arguments[len(before) + 1 + len(after) :],
                }
                parts["given"] = list(parts["given"][0] if packed else parts["given"])
                parts[part][at] = change(parts[part][at])
                parts["after"][metadata] = tuple(parts["metadata"])
                given = [parts["given"]] if packed else parts["given"]
                function(*parts["before"], *parts["stream"], *parts["after"], *given)

            self.entry = self.entry._replace(function=faulty)

    return Faulty


def maps_encoded(stub: Stub, gemm, view) -> list[int]:
    """Tensor maps encoded by launches of a gemm of three descriptors.

    By Triton, which makes the plan; repeated twice; with another ``p``; with the first again.
    """
    first, other = view(64, 64), view(64, 64)
    o = {"o": view(64, 128), "q": view(128, 64).t()}
    counts = []
    for p in (first, first, first, other, first):
        run = gemm(descriptors=True, tensors=o | {"p": p})
        before = stub.maps.value
        stub.caught(run)
        counts.append(stub.maps.value - before)
    return counts


def make_driver(folder: Path) -> tuple[Stub, StubDriver]:
    """Build the stub in ``folder`` and activate its driver.

    PyTorch's libraries load libcuda.so.1 and keep it: import PyTorch after the call.
    """
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    CUDABackend.make_cubin = lambda self, ptx, *args: ptx.encode()
    stub = Stub(folder)
    active = StubDriver(stub)
    driver.set_active(active)
    return stub, active


def main(folder: Path) -> None:
    """Print the cases that differ, and which planted faults are found."""
    stub, active = make_driver(folder)
    from launch_cases import cases, compare, gemm, view

    from fused_lora.kernels import launch

    result = compare(cases("sm_90", folder), active, stub.caught) | {"launches": stub.ever.value}
    functions = [plan.entry.function for plan in launch._plans.values()]
    result["above C"] = sum(not inspect.isbuiltin(function) for function in functions)
    planted = {}
    for name, fault in FAULTS.items():
        launch.forget()
        with patch.object(launch, "_Plan", with_fault(launch._Plan, *fault)):
            found = compare({name: gemm(descriptors=True)}, active, stub.caught)
        planted[name] = bool(found["different"])
    launch.forget()
    result["maps"] = maps_encoded(stub, gemm, view)
    print(json.dumps(result | {"planted": planted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

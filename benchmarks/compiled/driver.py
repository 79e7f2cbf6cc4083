"""Compile what the launchers would launch, for a GPU that is not present.

The launchers run on CPU tensors over a fake driver, so specialisation, alignment and configs are
those of a real call; nothing is executed. A process can handle only one architecture, since Triton
and the launchers cache what they compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lora.kernels import select_config

from . import limits


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: its name, Triton's metadata, and the files that Triton wrote."""

    name: str
    arch: str
    metadata: dict
    files: dict[str, Path]  # by kind: "ttgir", "cubin", "amdgcn"

    def text(self, kind: str) -> str:
        """The content of one of the text files."""
        return self.files[kind].read_text()


class FakeDriver:
    """A GPU of ``arch`` that accepts every binary and runs nothing."""

    def __init__(self, arch: str):
        self.arch = arch
        self.binaries: dict[str, Binary] = {}
        self.launched: list[Binary] = []
        # Unlimited, so that the launch is not refused: the report checks the shared memory.
        properties = {"max_shared_mem": 1 << 30}
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: properties,
        )

    def compile(self, call: Callable[[], object]) -> list[Binary]:
        """The kernels that ``call`` would run, in order; needs :func:`activate` first."""
        self.launched = []
        call()
        return self.launched

    def _loaded(self, module, function, name, files, digest) -> None:
        paths = {Path(path).suffix[1:]: Path(path) for path in files.values()}
        metadata = json.loads(paths["json"].read_text())
        self.binaries[digest] = Binary(name, self.arch, metadata, paths)

    # The interface that Triton expects of a driver.

    def launcher_cls(self, source, metadata):
        return lambda *args: self.launched.append(self.binaries[metadata.hash])

    def get_current_target(self):
        if limits.is_nvidia(self.arch):
            return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.arch, 64)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def activate(arch: str) -> FakeDriver:
    """Make this process compile every launch for ``arch``."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("expected TRITON_INTERPRET to be unset: nothing would be compiled")
    fake, target = FakeDriver(arch), limits.target(arch)
    triton.knobs.runtime.kernel_load_end_hook.add(fake._loaded)
    driver.set_active(fake)
    select_config.target_of = lambda device: target
    return fake

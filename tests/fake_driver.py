"""A GPU for Triton that is not there: it takes every binary and runs nothing."""

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget


class FakeDriver:
    """What Triton asks of a driver, answered for ``arch`` ("sm_90", "gfx942").

    Attributes:
        device: the current one.
        shared_bytes: the shared memory that a block may have.
    """

    def __init__(self, arch: str, shared_bytes: int = 1 << 30):
        nvidia = arch.startswith("sm_")
        number = int(arch.removeprefix("sm_")) if nvidia else arch
        self.target = GPUTarget("cuda" if nvidia else "hip", number, 32 if nvidia else 64)
        self.device = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": shared_bytes},
        )

    def launcher_cls(self, source, metadata):
        return lambda *args: None

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 100 + device

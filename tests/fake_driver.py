"""A simulated GPU driver for Triton: it accepts every binary and runs nothing."""

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget


class FakeDriver:
    """The driver interface that Triton uses.

    Args:
        arch: "sm_90" or "gfx942", for example.
        shared_bytes: most shared memory per block.

    Attributes:
        device: index of the current device.
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

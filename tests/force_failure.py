"""Two training steps under "auto" where Triton cannot run: ``force_failure.py KIND``.

Triton itself raises each error: there is no driver; no C compiler for its launcher; too little
shared memory for the kernels; or a GPU that it cannot compile for. Prints the warnings and the
largest difference from ``impl="torch"`` as JSON. Needs TRITON_INTERPRET to be unset.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from fake_driver import FakeDriver
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from fused_lora import fused_lora_linear
from fused_lora.kernels import select_config
from fused_lora.kernels.config import Target
from fused_lora.ops import dispatch


def no_driver() -> None:
    """Nothing to change: a machine without a GPU has no driver."""


def no_compiler() -> None:
    """A GPU with its driver, but no C compiler to build Triton's launcher."""
    folder = Path(tempfile.mkdtemp())
    (folder / "libcuda.so.1").touch()
    os.environ |= {"PATH": "", "TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder)}
    os.environ.pop("CC", None)
    CudaDriver.is_active = staticmethod(lambda: True)


def no_room() -> None:
    """A GPU with one kilobyte of shared memory."""
    driver.set_active(FakeDriver("sm_90", shared_bytes=1024))


def too_old() -> None:
    """A GPU that Triton's assembler does not support."""
    driver.set_active(FakeDriver("sm_35"))


def step(impl: str) -> list[torch.Tensor]:
    """Output and gradients of one call."""
    torch.manual_seed(0)
    x, A, B = (torch.randn(shape, requires_grad=True) for shape in ((70, 40), (4, 40), (24, 4)))
    y = fused_lora_linear(x.bfloat16(), torch.randn(24, 40).bfloat16(), A, B, impl=impl)
    return [y, *torch.autograd.grad(y.float().sum(), (x, A, B))]


def main(kind: str) -> None:
    """Force the failure ``kind`` and print the outcome."""
    {f.__name__: f for f in (no_driver, no_compiler, no_room, too_old)}[kind]()
    dispatch._may_run_triton = lambda x, weight: True
    dispatch._not_worth_it = dispatch.triton_problem = lambda device: None
    select_config.target_of = lambda device: Target("sm_90", 132, 232_448)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [step("auto") for _ in range(2)]
    expected = step("torch")
    off = max((a - b).abs().max().item() for r in results for a, b in zip(r, expected, strict=True))
    print(json.dumps({"warnings": [str(w.message) for w in caught], "difference": off}))


if __name__ == "__main__":
    main(sys.argv[1])

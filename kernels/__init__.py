"""Triton kernels of fused-lora; importable as ``fused_lora.kernels``.

Nothing is imported here, so Triton is loaded only with the first module that defines a kernel.

Some libraries import any top-level module named ``kernels`` and read its ``__version__``. With the
repository's root as the current directory they find this package, so it has one.
"""

__version__ = "0"

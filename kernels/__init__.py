"""Triton kernels of fused-lora; importable as ``fused_lora.kernels``.

Nothing is imported here: Triton is loaded only when a kernel is. ``__version__`` stands for
libraries that import any top-level module named ``kernels`` and ask for its version, which happens
when the repository's root is the current directory.
"""

__version__ = "0"

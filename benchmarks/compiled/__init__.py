"""What the kernels compile to, for GPUs that are not here: see ``benchmarks/compile_report.py``."""

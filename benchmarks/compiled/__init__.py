"""What the kernels compile to, for GPUs that are not here: see ``benchmarks/compile_report.py``.

``driver`` compiles what a launcher launches, ``machine_code`` and ``pipeline`` read it, ``report``
judges it. ``cases`` names the calls, ``sweep`` those of the shipped tables, ``search`` those of
the whole space; ``run`` compiles many, and ``render`` writes them down.
"""

"""Compile the kernels for GPUs that are not present: see ``benchmarks/compile_report.py``.

``driver`` compiles what a launcher launches, ``machine_code`` and ``pipeline`` parse the result,
``report`` checks it. ``cases`` defines the calls; ``sweep`` lists those of the shipped tables,
``search`` those of the whole space. ``run`` compiles many cases, ``render`` formats the rows, and
``sources`` decides which rows of an earlier run are still valid.
"""

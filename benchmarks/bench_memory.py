"""Bytes kept for backward, and a step's peak; what is timed is a step, in passing."""

from memory import peak_bytes, saved_bytes
from timing import synchronised


def test_memory(layer, provider, benchmark, memory_lines):
    saved, peak = saved_bytes(layer), peak_bytes(layer)
    benchmark.extra_info |= {"saved_bytes": saved, "peak_bytes": peak}
    benchmark.pedantic(synchronised(layer.step, layer.x.device), rounds=3)
    x_bytes = layer.x.nbytes
    peaks = "" if peak is None else f", peak of a step {peak / x_bytes:6.2f}"
    memory_lines.append(
        f"{benchmark.group:<52} {provider:<18} kept for backward {saved / x_bytes:5.2f}{peaks}"
    )

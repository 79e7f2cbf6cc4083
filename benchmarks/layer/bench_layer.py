"""One layer: its forward, recorded for backward; its forward and backward; its memory."""

import pytest

from harness.timing import synchronised
from layer.memory import peak_bytes, saved_bytes


@pytest.mark.benchmark(max_time=0.4)
def test_forward(layer, row, benchmark):
    shape = row[0]
    benchmark(synchronised(layer.forward, layer.x.device))
    _note_rates(benchmark, layer, shape.forward_flops, shape.forward_elements)


@pytest.mark.benchmark(max_time=0.4)
def test_training_step(layer, row, benchmark):
    shape = row[0]
    benchmark(synchronised(layer.step, layer.x.device))
    _note_rates(benchmark, layer, shape.step_flops, shape.step_elements)


def _note_rates(benchmark, layer, flops: int, elements: int) -> None:
    if benchmark.stats:
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "tflops_per_second": flops / median / 1e12,
            "least_bytes": elements * layer.x.element_size(),
        }


def test_memory(layer, provider, benchmark, memory_lines):
    """Bytes kept for backward and a step's peak; without timed steps nothing would be saved."""
    saved, peak = saved_bytes(layer), peak_bytes(layer)
    benchmark.extra_info |= {"saved_bytes": saved, "peak_bytes": peak}
    benchmark.pedantic(synchronised(layer.step, layer.x.device), rounds=3)
    x_bytes = layer.x.nbytes
    peaks = "" if peak is None else f", peak of a step {peak / x_bytes:6.2f}"
    memory_lines.append(
        f"{benchmark.group:<52} {provider:<18} kept for backward {saved / x_bytes:5.2f}{peaks}"
    )

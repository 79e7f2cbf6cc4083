"""Forward and backward of one layer."""

import pytest

from timing import synchronised

pytestmark = pytest.mark.benchmark(max_time=0.4)


def test_training_step(layer, row, benchmark):
    shape = row[0]
    benchmark(synchronised(layer.step, layer.x.device))
    if benchmark.stats:
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "tflops_per_second": shape.step_flops / median / 1e12,
            "least_bytes": shape.step_elements * layer.x.element_size(),
        }

"""Forward of one layer, recorded for backward."""

import pytest

from timing import synchronised

pytestmark = pytest.mark.benchmark(max_time=0.4)


def test_forward(layer, row, benchmark):
    shape = row[0]
    benchmark(synchronised(layer.forward, layer.x.device))
    if benchmark.stats:
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "tflops_per_second": shape.forward_flops / median / 1e12,
            "least_bytes": shape.forward_elements * layer.x.element_size(),
        }

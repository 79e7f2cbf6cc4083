"""The table of GPUs, and the properties of a GPU that is not in it."""

from types import SimpleNamespace

import pytest
import torch

from fused_lora.kernels.config import Target
from fused_lora.kernels.select_config import INTERPRETER as INTERPRETER_TARGET
from fused_lora.strategy import cost, devices
from fused_lora.strategy.devices import INTERPRETER, KNOWN, device_of, from_properties

# Dense bfloat16 TFLOPS of the data sheets.
PEAKS = {
    "a100": 312,
    "a100-pcie": 312,
    "rtx3090": 71,
    "rtx4090": 165.2,
    "h100": 989,
    "h100-pcie": 756,
    "h100-nvl": 835,
    "h200": 989,
    "b200": 2250,
    "rtx5090": 209.5,
    "mi300x": 1307,
    "mi325x": 1307,
    "mi355x": 2516,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_those_of_the_data_sheets(name):
    assert KNOWN[name].flops / 1e12 == pytest.approx(PEAKS[name], rel=0.01)


def properties(name: str, **changes) -> SimpleNamespace:
    """The properties that torch reports for an L40S, under ``name``."""
    told = {
        "name": name,
        "L2_cache_size": 96 << 20,
        "clock_rate": 2_520_000,
        "memory_clock_rate": 9_001_000,
        "memory_bus_width": 384,
    }
    return SimpleNamespace(**told | changes)


def test_a_known_name_has_its_row_and_the_queried_target():
    target = Target("sm_90", 130, 232_448)
    device = from_properties(properties("NVIDIA H100 80GB HBM3"), target)
    assert device.bandwidth == KNOWN["h100"].bandwidth
    assert device.target == target


def test_names_are_matched_in_full():
    """A laptop's GPU of the same name, or a slice of a large GPU, is a different GPU."""
    target = Target("sm_89", 76, 101_376)
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        assert from_properties(properties(name), target).name == name
    assert set(devices._NAMES.values()) == set(KNOWN)


def test_an_unknown_gpu_is_what_it_tells():
    device = from_properties(properties("NVIDIA L40S"), Target("sm_89", 142, 101_376))
    assert device.bandwidth == pytest.approx(864e9, rel=1e-3)  # its data sheet's
    assert device.cache == 96 << 20
    assert device.clock == 2.52e9


def test_a_gpu_that_tells_nothing_keeps_the_vendors_gemm():
    """Even for a shape where a known GPU of its architecture uses the fused one."""
    silent = properties(
        "unheard of", L2_cache_size=0, clock_rate=0, memory_clock_rate=0, memory_bus_width=0
    )
    shape = {"M": 65_536, "N": 4096, "L": 1024, "rank": 16}
    flags = {"masked": None, "aligned": True}
    known = KNOWN["h100"]
    unknown = from_properties(silent, known.target)
    assert cost.choose_strategy(known, 2, **shape, **flags)[0] == "split"
    assert cost.choose_strategy(unknown, 2, **shape, **flags)[0] == "seeded"


def test_a_cpu_is_the_interpreter():
    assert device_of(torch.device("cpu")) is INTERPRETER
    assert INTERPRETER.target is INTERPRETER_TARGET

"""Forward and backward of one layer against its peers: ``python benchmarks/layer.py``.

Every variant has the same weights, and its output is checked against the textbook formula before it
is timed.
Rounds are interleaved; a number is a variant's median over that of the bare frozen layer in the
same run, so that it carries from machine to machine better than milliseconds do. ``saved`` is what
autograd keeps for backward beside the parameters, over the bytes of x.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # unbound threads add outliers of milliseconds

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fused_lora import FusedLoRALinear

# M, K, N, rank
SHAPES = [(512, 768, 768, 8), (1024, 768, 3072, 16), (512, 2048, 2048, 16), (960, 4096, 4096, 64)]


class Textbook(nn.Module):
    """``x Wᵀ + b + s·B(A(D(x)))`` in eager autograd, adapters in the layer's dtype."""

    def __init__(self, linear: nn.Linear, lora_A, lora_B, scaling: float, p: float):
        super().__init__()
        self.linear, self.scaling, self.p = linear, scaling, p
        self.lora_A, self.lora_B = (nn.Parameter(t.clone()) for t in (lora_A, lora_B))

    def forward(self, x):
        dropped = F.dropout(x, self.p) if self.p else x
        return self.linear(x) + self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)


def variants(K: int, N: int, R: int, dtype, device: str, p: float) -> dict[str, nn.Module]:
    """The same layer by every provider that is installed."""
    linear = nn.Linear(K, N, device=device, dtype=dtype).requires_grad_(False)
    A = torch.randn(R, K, device=device, dtype=dtype) / K**0.5
    B = torch.randn(N, R, device=device, dtype=dtype) / R**0.5
    made = {"frozen": linear, "eager": Textbook(linear, A, B, 2.0, p)}
    if importlib.util.find_spec("peft"):
        import peft

        for name, autocast in (("peft", True), ("peft-lowp", False)):
            if not autocast and dtype == torch.float32:
                continue  # the same layer
            base = nn.Sequential(nn.Linear(K, N, device=device, dtype=dtype))
            base[0].load_state_dict(linear.state_dict())
            config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=2 * R, lora_dropout=p)
            model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast)
            layer = model.base_model.model[0]
            layer.lora_A["default"].weight.data.copy_(A)
            layer.lora_B["default"].weight.data.copy_(B)
            made[name] = layer
    for name, adapter_dtype in (("fused", None), ("fused-lowp", dtype)):
        if adapter_dtype is not None and dtype == torch.float32:
            continue
        layer = FusedLoRALinear.from_linear(
            linear, rank=R, alpha=2 * R, dropout=p, adapter_dtype=adapter_dtype
        )
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
        made[name] = layer
    return made


def check(layers: dict[str, nn.Module], x) -> None:
    """Every adapted layer computes the textbook's output, dropout aside."""
    expected = layers["eager"].eval()
    p, expected.p = expected.p, 0.0
    y = expected(x)
    for name, layer in layers.items():
        if name != "frozen":
            error = ((layer.eval()(x) - y).float().norm() / y.float().norm()).item()
            assert error < 4 * torch.finfo(x.dtype).eps, f"{name}: relative error {error:.1e}"
        layer.train()
    expected.p = p


def saved_bytes(layer: nn.Module, x) -> int:
    """Bytes that autograd keeps for backward, the parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so addresses stay unique
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(size for size, _ in kept.values())


def step(layer: nn.Module, x, dy) -> float:
    """Seconds of one forward and backward."""
    x.grad = None
    layer.zero_grad()
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    layer(x).backward(dy)
    synchronize()
    return time.perf_counter() - start


def measure(shape: tuple, dtype, device: str, p: float, seconds: float) -> dict[str, tuple]:
    """Median time over frozen's, and saved bytes over those of x, by variant."""
    M, K, N, R = shape
    layers = variants(K, N, R, dtype, device, p)
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(M, N, device=device, dtype=dtype)
    check(layers, x)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        step(layer, x, dy)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["frozen"]) < 5:
        for name, layer in layers.items():
            times[name].append(step(layer, x, dy))
    floor = statistics.median(times["frozen"])
    return {
        name: (statistics.median(times[name]) / floor, saved_bytes(layer, x) / x.nbytes)
        for name, layer in layers.items()
    }


def device_name(device: str) -> str:
    """What the table was measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["bfloat16", "float32"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--seconds", type=float, default=4.0, help="a table row")
    args = parser.parse_args()
    print(f"measured on {device_name(args.device)} ({args.device}), ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("forward + backward over the frozen layer's, and in brackets bytes saved over those of x")
    for dtype in (getattr(torch, d) for d in args.dtype):
        for p in args.dropout:
            print(f"\n{dtype}, dropout {p}")
            for row, shape in enumerate(SHAPES):
                result = measure(shape, dtype, args.device, p, args.seconds)
                if row == 0:
                    head = "".join(f"{name:>18}" for name in result)
                    print(f"{'M, K, N, R':<22}{head}")
                cells = (f"{time:.2f} ({saved:.2f})" for time, saved in result.values())
                print(f"{', '.join(map(str, shape)):<22}" + "".join(f"{c:>18}" for c in cells))


if __name__ == "__main__":
    main()

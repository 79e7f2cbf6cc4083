"""Time the strategies on the GPU at hand and keep the winners for ``impl="auto"``.

    python -m fused_lora.tune 8192x4096x4096x16 llama3-8b --dropout 0 0.1

A shape is ``MxKxNxR`` (tokens, inputs, outputs, rank); a model's name stands for its projections.
:func:`tune_model` reads the shapes from a model in memory. Only strategies are tuned, including
PyTorch's operators; ``kernels/select_config.py`` chooses the tiles of every candidate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .distributed.sharding import is_shard
from .kernels.config import is_aligned
from .kernels.operands import BackwardOperands, ForwardOperands
from .layers.base import LoRALayer
from .layers.parameter import LoRAParameter
from .ops import dispatch, dropout, torch_impl
from .ops.triton_impl import is_sticky, run_backward, run_forward
from .ops.validation import check_dropout
from .strategy import tuning_cache
from .strategy.timing import Times, call_times
from .strategy.tuning_cache import Call, Entry

# Published configurations: (K, N) of q and o, of k and v, of gate and up, and of down.
MODELS = {
    "llama3.2-1b": ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)),
    "llama3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "qwen2.5-7b": ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
    "qwen2.5-32b": ((5120, 5120), (5120, 1024), (5120, 27648), (27648, 5120)),
    "llama3-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
}
_SHAPES = f"MxKxNxR, for example 8192x4096x4096x16, or one of {', '.join(MODELS)}"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED_ROWS = 256  # rows compared with float64: all of them would take longer than the timing
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Times]]


class Layer(NamedTuple):
    """A layer to tune in both directions: its sizes, dtype and dropout probability ``p``."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.0


def tune(
    layers: Iterable[Layer],
    device: torch.device | str = "cuda",
    *,
    timer: Timer | None = None,
    report: Callable[[str], object] = lambda line: None,
    graphs: bool = False,
) -> dict[Call, Entry]:
    """Time every strategy of every layer, and store the best (:mod:`.strategy.tuning_cache`).

    Each candidate is checked first: its relative RMS error may be at most twice eager PyTorch's in
    the same dtype, plus one unit round-off. It replaces the strategy that would run without tuning
    only if it was faster in three of four rounds. The time of an eager call is the longer one of
    device and host; both are stored. A layer's entries are stored as soon as it is tuned.

    Args:
        device: a GPU that the kernels run on; it need not be the current one.
        timer: maps callables by name to their :class:`.strategy.timing.Times`, one value per
            round; by default :func:`.strategy.timing.call_times`.
        report: called with one line of text per direction.
        graphs: choose for replays of CUDA graphs, by device time only.

    Returns:
        The stored entries, by call.

    Raises:
        ValueError: the kernels cannot run on ``device``.
        OSError: the file cannot be written.
    """
    device = _checked_device(torch.device(device))
    timer = partial(call_times, device=device) if timer is None else timer
    entries = {}
    # Triton launches on the current device, whatever the tensors' device is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for layer in dict.fromkeys(layers):
            found = {}
            for call, candidates, problem in _directions(layer, device):
                modelled, _ = dispatch.modelled(call, device, call.strategies)
                entry, line = _winner(call, candidates, problem, modelled, timer, graphs)
                report(f"{call.key}: {line}")
                if entry is not None:
                    found[call] = entry
            if found:
                tuning_cache.store(found, device)
                dispatch.clear_decisions()
            entries |= found
    return entries


def tune_model(model: nn.Module, tokens: int = 8192, **options) -> dict[Call, Entry]:
    """Tune for the linear LoRA layers of ``model``, this package's or PEFT's, at ``tokens`` rows.

    The rank and dropout of a layer are those of its active adapter, or of each of its adapters in
    PEFT. Options and result are those of :func:`tune`.

    Raises:
        ValueError: no such layer, layers on several devices, or the kernels cannot run there.
    """
    found = [(weight.device, Layer(tokens, *rest)) for weight, *rest in _adapted(model)]
    devices = {device for device, _ in found}
    if len(devices) != 1:
        raise ValueError(f"expected LoRA layers on one device, got {len(devices)} devices")
    return tune([layer for _, layer in found], devices.pop(), **options)


def _adapted(model: nn.Module) -> Iterator[tuple]:
    """``(weight, K, N, R, dtype, p)`` of each linear layer with an adapter."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            tuned = module.no_kernel is None and not isinstance(module, LoRAParameter)
            if tuned and not module.use_dora:
                weight = module.weight_like(module)
                weight = weight.to_local() if is_shard(weight) else weight
                N, K = module.to_matrix(weight).shape
                yield weight, K, N, module.rank, weight.dtype, module.dropout
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict):  # PEFT's
            weight = module.get_base_layer().weight
            for name, lora_A in module.lora_A.items():
                if isinstance(lora_A, nn.Linear) and weight.is_floating_point():
                    K, N, p = module.in_features, module.out_features, module.lora_dropout[name]
                    yield weight, K, N, lora_A.out_features, weight.dtype, getattr(p, "p", 0.0)


def _checked_device(device: torch.device) -> torch.device:
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("expected a GPU to tune for, got a machine without one")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    if problem := dispatch.triton_problem(device):
        raise ValueError(f"expected a device for the kernels, got {device}: {problem}")
    return device


def _directions(layer: Layer, device: torch.device):
    """``(call, candidates, problem)`` per direction; ``problem(output)`` is its error, or None.

    Backward computes all three gradients; only ``dx`` is checked.
    """
    from .kernels import strategies

    M, K, N, R, dtype, p = layer
    scale = torch.tensor(2.0, device=device)  # as in layers on a GPU
    make = partial(torch.randn, device=device)
    x, dy = make(M, K).to(dtype), make(M, N).to(dtype)
    weight, bias = (make(N, K) / K**0.5).to(dtype), make(N).to(dtype)
    A, B = (make(R, K) / K**0.5).to(dtype), (make(N, R) / R**0.5).to(dtype)
    keep_count = dropout.keep_count(p)
    seed, keep_bits, inv_keep = None, None, dropout.KEEP_ALL / keep_count
    if keep_count < dropout.KEEP_ALL:
        seed = torch.zeros((), dtype=torch.int64, device=device)
        keep_bits = dropout.make_keep_bits(seed, M, K, keep_count)
    rows = torch.arange(0, M, max(1, M // CHECKED_ROWS), device=device)
    mask = (
        None
        if keep_bits is None
        else dropout.keep_mask(keep_bits[rows], K, torch.float64) * inv_keep
    )

    def y(wide):
        low = _masked(x[rows].to(wide), mask) @ A.to(wide).t() @ B.to(wide).t()
        return x[rows].to(wide) @ weight.to(wide).t() + bias.to(wide) + scale * low

    def dx(wide):
        low = _masked(scale * (dy[rows].to(wide) @ B.to(wide)) @ A.to(wide), mask)
        return dy[rows].to(wide) @ weight.to(wide) + low

    forth = ForwardOperands(x, weight, A, B, bias, scale, seed, keep_count)
    _, S, _ = torch_impl.forward(forth)
    back = BackwardOperands(dy, x, weight, A, B, S, scale, keep_bits, inv_keep)

    def forward(strategy):
        return run_forward(strategies, strategy, forth)[0]

    def backward(strategy):
        return run_backward(strategies, strategy, back)[0]

    aligned = is_aligned(K * dtype.itemsize, N * dtype.itemsize)
    for name, run, exact in (("forward", forward, y), ("backward", backward, dx)):
        call = Call(name, dtype, M, K, N, R, keep_bits is not None, aligned)
        candidates = {strategy: partial(run, strategy) for strategy in call.strategies}
        yield call, candidates, _yardstick(exact, rows, dtype)


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t * mask.to(t.dtype)


def _yardstick(exact: Callable, rows: Tensor, dtype: torch.dtype) -> Callable[[Tensor], str | None]:
    expected = exact(torch.float64)
    bound = 2 * _error(exact(dtype), expected) + UNIT_ROUNDOFF[dtype]

    def problem(output: Tensor) -> str | None:
        error = _error(output[rows], expected)
        if error <= bound:  # false for NaN
            return None
        return f"relative RMS error {error:.1e}, expected at most {bound:.1e}"

    return problem


def _error(actual: Tensor, expected: Tensor) -> float:
    """The relative RMS error: that of the difference over that of ``expected``."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _winner(
    call, candidates, problem, modelled: str, timer: Timer, graphs: bool
) -> tuple[Entry | None, str]:
    """The entry for ``call``, or None if every candidate failed; and a line for the report."""
    failed = {}
    for name, run in candidates.items():
        try:
            reason = problem(run())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it does not compile or launch here
            if is_sticky(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason is not None:
            failed[name] = reason
    able = {name: run for name, run in candidates.items() if name not in failed}
    said = "".join(f"; {name} left out ({reason})" for name, reason in failed.items())
    if not able:
        return None, f"nothing to keep{said}"
    both = timer(able)
    times = {name: t.device if graphs else t.call_time() for name, t in both.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = modelled if modelled in able else min(medians, key=medians.get)
    better = [name for name in able if _faster(times[name], times[base])]
    strategy = min(better, key=medians.get) if better else base
    entry = Entry(
        strategy,
        {name: 1e6 * statistics.median(t.device) for name, t in both.items()},
        {name: 1e6 * statistics.median(t.host) for name, t in both.items()},
        graphs,
    )
    kept = "as modelled" if strategy == modelled else f"in place of the modelled {modelled}"
    return entry, f"{entry}, {kept}{said}"


def _faster(times: list[float], base: list[float]) -> bool:
    """Whether ``times`` beat ``base`` in three of four rounds.

    With thirty rounds, chance alone does so once in 380 times (binomial distribution).
    """
    wins = sum(time < other for time, other in zip(times, base, strict=True))
    return 4 * wins >= 3 * len(base)


def parse(text: str, tokens: int, rank: int) -> list[tuple[int, int, int, int]]:
    """``(M, K, N, R)`` of each shape that ``text`` names.

    Raises:
        ValueError: neither four positive integers joined by x nor a model of :data:`MODELS`; or
            ``tokens`` or ``rank`` is under 1.
    """
    if text in MODELS:
        if tokens < 1 or rank < 1:
            raise ValueError(f"expected tokens >= 1 and rank >= 1, got {tokens} and {rank}")
        return [(tokens, K, N, rank) for K, N in MODELS[text]]
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected {_SHAPES}; got {text!r}")
    return [tuple(map(int, parts))]


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit status: 1 if nothing was stored, 2 if there is no GPU to tune for."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.tune", description=__doc__.partition(" and keep")[0]
    )
    parser.add_argument("shapes", nargs="+", metavar="SHAPE", help=_SHAPES)
    parser.add_argument("--tokens", type=int, default=8192, help="M of the shapes of a named model")
    parser.add_argument("--rank", type=int, default=16, help="R of the shapes of a named model")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument(
        "--graphs", action="store_true", help="choose for CUDA graphs, by device time only"
    )
    options = parser.parse_args(arguments)
    try:
        for p in options.dropout:
            check_dropout(p)
        shapes = [s for text in options.shapes for s in parse(text, options.tokens, options.rank)]
    except ValueError as error:
        parser.error(str(error))
    dtypes = [DTYPES[name] for name in options.dtype]
    layers = [Layer(*s, dtype, p) for s, dtype, p in product(shapes, dtypes, options.dropout)]
    try:
        device = _checked_device(torch.device("cuda"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        kept = tune(layers, device, report=partial(print, flush=True), graphs=options.graphs)
    except OSError as error:
        print(f"nothing was kept: {error}; FUSED_LORA_CACHE names another folder", file=sys.stderr)
        return 1
    print(f"{len(kept)} entries in {tuning_cache.cache_path()}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compares what repeated launches and Triton's own pass to the driver: ``launch_cases.py ARCH``.

Nothing is compiled: a binary is an object that Triton creates per specialisation. Each case is
launched plainly, then twice through ``kernels/launch.py``. The second of these must pass the driver
the same binary, grid and arguments without running Triton's launch code. Needs TRITON_INTERPRET to
be unset. Prints the cases that differ, as JSON.

With ``launch_cases.py ARCH launcher`` a binary has the launcher of Triton's backend for ARCH, and
what is compared is its call of a function in C. Triton 3.6 compiles that function: not for it.
"""

import json
import random
import sys
import tempfile
from collections.abc import Hashable
from functools import lru_cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton.compiler
from fake_driver import FakeDriver
from triton.backends.amd import driver as amd
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.kernels import dropout, launch
from fused_lora.kernels.config import (
    AddConfig,
    GatedConfig,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
    SinglePassConfig,
    ThinPairConfig,
)
from fused_lora.kernels.gated import gated, gated_backward
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.segments import Segments
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.single_pass import single_pass
from fused_lora.kernels.thin_pair import thin_pair

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
launched: list[tuple] = []  # (binary, grid, stream, metadata, arguments)


class Binary(triton.compiler.CompiledKernel):
    """A stand-in for a compiled kernel that records its launches."""

    recorded = True
    launcher = None  # the class of a launcher to use, not to record only

    def __init__(self, src):
        self.src, self.name, self.module, self.function = src, src.fn.__name__, object(), object()
        self.packed_metadata, self.metadata = object(), LAUNCHER_METADATA
        self._run = self._record if self.recorded else lambda *arguments: None
        if self.launcher is not None:
            self._run = self.launcher(src, self.metadata)
            binaries[self.function] = self

    def _record(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        assert (function, packed) == (self.function, self.packed_metadata)
        launched.append((self, (x, y, z), stream, tuple(map(described, arguments))))

    def __del__(self):
        self.module = None


# What the launchers of Triton's backends read of a binary.
LAUNCHER_METADATA = SimpleNamespace(
    num_ctas=1, warp_size=32, launch_cooperative_grid=False, launch_pdl=False,
    global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
    tensordesc_meta=[],
)  # fmt: skip
binaries: dict[object, Binary] = {}  # by function


def record_in_c(*arguments) -> None:
    """Stands in for a backend's function in C; the kernel's arguments are its last."""
    *before, given = arguments
    binary = next(binaries[a] for a in before if isinstance(a, Hashable) and a in binaries)
    hooks = before.index(binary.packed_metadata) + 1
    del before[hooks : hooks + 3]  # with the launch's metadata: nothing is observed
    launched.append((binary, tuple(before), tuple(map(described, given))))


def described(argument):
    """An argument as the driver sees it, whichever Python object holds it."""
    if isinstance(argument, torch.Tensor):
        return int, argument.data_ptr()
    if isinstance(argument, launch._Address):
        return int, argument.address
    if isinstance(argument, TensorDescriptor):
        base, shape, strides = argument.base, tuple(argument.shape), tuple(argument.strides)
        place = base.data_ptr(), base.dtype, shape, strides, tuple(argument.block_shape)
        return "descriptor", *place, argument.padding, getattr(argument, "round_f32_to_tf32", None)
    return type(argument), argument


def make_driver(arch: str) -> FakeDriver:
    """Activate a :class:`FakeDriver`, and replace Triton's compiler with :class:`Binary`."""
    made = FakeDriver(arch)
    triton.compiler.compile = lambda src, **options: Binary(src)
    triton.runtime.driver.set_active(made)
    return made


def use_launcher(arch: str, active: FakeDriver) -> None:
    """Give binaries the launcher of Triton's backend, above :func:`record_in_c`."""
    backend = nvidia if arch.startswith("sm_") else amd
    backend.PyKernelArg = SimpleNamespace
    active.utils.launch, active.utils.build_signature_metadata = record_in_c, bytes_of
    Binary.launcher = backend.CudaLauncher if backend is nvidia else backend.HIPLauncher


def bytes_of(signature) -> bytes:
    return repr(signature).encode()


@lru_cache
def the(kind, *args, **kwargs):
    """A config, the same object for equal arguments: launches are looked up by its ``id``."""
    return kind(*args, **kwargs)


_buffers = {}
_empty = torch.empty


def same_buffer(*shape, **kwargs):
    """``torch.empty``, but equal arguments return the same memory."""
    return _buffers.setdefault((shape, *kwargs.items()), _empty(*shape, **kwargs))


def view(rows, columns, dtype=BF16, *, offset=0, pitch=None):
    """A matrix with the given start and row pitch, in elements."""
    pitch = pitch or columns
    flat = torch.zeros(offset + rows * pitch + 64, dtype=dtype)
    return flat[offset : offset + rows * pitch].view(rows, pitch)[:, :columns]


def gemm(M=64, K=64, N=128, R=16, dtype=BF16, *, adapter=BF16, bias=True, keep_bits=False,
         inv_keep=1.0, tensors=(), descriptors=False, warps=4, stages=3,
         transposed=True):  # fmt: skip
    """A launch of ``lora_gemm``; ``tensors`` replaces operands by name."""
    q = view(N, K, dtype).t() if transposed else view(K, N, dtype)
    operands = {"o": view(M, N, dtype), "p": view(M, K, dtype), "q": q, "u": view(M, R, FP32),
                "v": view(N, R, adapter).t(), "scale": torch.ones(())} | dict(tensors)  # fmt: skip
    config = the(GemmConfig, warps, stages, descriptors, block_m=32, block_n=64, block_l=32)
    options = {"bias": view(1, N, FP32)[0] if bias else None, "inv_keep": inv_keep}
    if keep_bits:
        options["keep_bits"] = view(M, 4 * (-(-N // 128)), torch.int32)
    return lambda: lora_gemm(*operands.values(), config, **options)


def add(M=64, N=128, R=16, *, base="in place", dot_dtype=None):
    """A launch of ``lora_add``; ``base`` is o itself, another tensor or None."""
    o = view(M, N)
    given = {"in place": o, "beside": view(M, N), "none": None}[base]
    u, v, config = view(M, R, FP32), view(R, N), the(AddConfig, 4, 1)
    scale = torch.ones(())
    return lambda: lora_add(o, u, v, scale, config, base=given, dot_dtype=dot_dtype)


def thin(M=64, K=64, R=16, splits=1, *, p=None):
    """Launches of ``shrink`` and ``rank_grad``."""
    p = view(M, K) if p is None else p
    u, q, o, scale = view(M, R, FP32), view(K, R), view(R, K), torch.ones(())
    shrink_config = the(ShrinkConfig, 4, 2, block_m=16, block_l=32, splits=splits)
    grad_config = the(RankGradConfig, 4, 2, block_m=16, block_l=32, splits=splits)

    tickets = torch.zeros(shrink_config.blocks(M, R, R), dtype=torch.int32)

    def both():
        shrink(u, p, q, scale, shrink_config, tickets=tickets)
        rank_grad(o, u, p, scale, grad_config, tickets=tickets)

    return both


def masked_shrink(M=304, K=256, R=16):
    """A launch of ``shrink`` that makes the mask."""
    u, p, q, scale = view(M, R), view(M, K), view(K, R), torch.ones(())
    keep_bits, seed = view(M, K // 32, torch.int32), torch.zeros((), dtype=torch.int64)
    config = the(ShrinkConfig, 4, 2, block_m=16, block_l=128)
    masking = {"keep_bits": keep_bits, "inv_keep": 2.0, "seed": seed, "keep_count": 32_768}
    return lambda: shrink(u, p, q, scale, config, scale_u=False, **masking)


def pair(M=304, N=256, R=16):
    """Launches of ``thin_pair``: the partial sums, and their sum, which clears tickets."""
    tensors = view(M, R), view(N, R, FP32), view(M, N), view(N, R), view(M, R), torch.ones(())
    config, tickets = the(ThinPairConfig, 4, 2, splits=2), torch.ones(64, dtype=torch.int32)
    return lambda: thin_pair(*tensors, config, tickets=tickets)


def gradient(M=304, K=256, R=16):
    """A launch of ``rank_grad`` with dropout and split rows."""
    o, u, p, keep_bits = view(R, K, FP32), view(M, R), view(M, K), view(M, K // 32, torch.int32)
    config = the(RankGradConfig, 4, 2, block_m=16, block_l=64, splits=2)
    options = {"keep_bits": keep_bits, "inv_keep": 2.0}
    tickets = torch.zeros(config.blocks(R, K, R), dtype=torch.int32)
    return lambda: rank_grad(o, u, p, None, config, **options, tickets=tickets)


def members(n=2, M=304, K=256, R=16):
    """Launches for ``n`` projections of one input, each with its own mask."""
    x, A, u, dx, dA = view(M, K), view(n * R, K), view(M, n * R), view(M, K), view(n * R, K)
    keep_bits = view(n * M, K // 32, torch.int32).view(n, M, K // 32)
    shrink_config = the(ShrinkConfig, 4, 2, block_m=16, block_l=128)
    grad_config = the(RankGradConfig, 4, 2, block_m=16, block_l=64)
    add_config, seeds, scale = (
        the(AddConfig, 4, 1),
        torch.zeros(n, dtype=torch.int64),
        torch.ones(()),
    )
    making = {"scale_u": False, "seed": seeds, "keep_count": 32_768}

    def all_three():
        shrink(u, x, A.t(), scale, shrink_config, keep_bits=keep_bits, **making)
        rank_grad(dA, u, x, None, grad_config, keep_bits=keep_bits)
        lora_add(dx, u, A, None, add_config, base=dx, keep_bits=keep_bits)

    return all_three


def segments(n=3, M=304, K=256, R=16):
    """Launches for rows sorted into ``n`` segments, each with its own adapter, scale and weight."""
    x, u, dx, keep_bits = view(M, K), view(M, R), view(M, K), view(M, K // 32, torch.int32)
    A, dA = (view(n * R, K).view(n, R, K) for _ in range(2))
    shrink_config = the(ShrinkConfig, 4, 2, block_m=16, block_l=128)
    grad_config, add_config = (
        the(RankGradConfig, 4, 2, block_m=16, block_l=64),
        the(AddConfig, 4, 1),
    )
    scale, rows, seed = torch.ones(n), torch.arange(M), torch.zeros((), dtype=torch.int64)
    making = {"scale_u": False, "seed": seed, "keep_count": 32_768, "rows": rows}
    weight, gemm_config = (
        view(n * 64, K).view(n, 64, K),
        the(GemmConfig, 4, 2, block_m=16, block_n=64, block_l=32),
    )
    y, B, bias = view(M, 64), view(n * 64, R, FP32).view(n, 64, R), view(n, 64, FP32)
    of = Segments(torch.arange(1, n + 1) * 100, M)

    def all_four():
        table = of.blocks(16)
        shrink(u, x, A.mT, scale, shrink_config, keep_bits=keep_bits, **making, segments=table)
        rank_grad(dA, u, x, None, grad_config, keep_bits=keep_bits, segments=of.items())
        table = of.blocks(add_config.block_m)
        lora_add(dx, u, A, scale, add_config, base=dx, keep_bits=keep_bits, segments=table)
        table = of.blocks(gemm_config.block_m)
        lora_gemm(y, x, weight.mT, u, B.mT, scale, gemm_config, bias=bias, segments=table)

    return all_four


def activation(name="silu", R=16, in_place=True):
    """A launch in each direction of a gated MLP's activation."""
    gate, up, dh, h, *others = (view(304, 256) for _ in range(6))
    low_rank = {"u": view(304, R), "v": view(R, 256, FP32)} if R else {}
    results = {} if in_place else dict(zip(("dgate", "dup", "h"), (*others, h), strict=True))
    config = the(GatedConfig, 4, 1)

    def both():
        gated(h, gate, up, config, activation=name)
        gated_backward(gate, up, dh, config, activation=name, **results, **low_rank)

    return both


def single(M=16, K=64, N=64, R=16, descriptors=False):
    """A launch of ``single_pass``."""
    tensors = view(M, N), view(M, R, FP32), view(M, K), view(N, K).t(), view(K, R), view(R, N)
    config, scale = the(SinglePassConfig, 4, 2, descriptors), torch.ones(())
    return lambda: single_pass(*tensors, scale, config)


def mask(keep, M=64):
    """A launch of ``dropout_mask``."""
    keep_bits, seed = view(M, 8, torch.int32), torch.zeros((), dtype=torch.int64)
    return lambda: dropout.dropout_mask(keep_bits, seed, keep, 16)


def cases(arch: str, folder: str) -> dict[str, object]:
    """Launches by name. Neighbours differ in one property, which changes the binary or a value."""
    made = {
        "gemm": gemm(),
        "p starts off 16 bytes": gemm(tensors={"p": view(64, 64, offset=1)}),
        "p starts on 16 bytes again": gemm(tensors={"p": view(64, 64, offset=8)}),
        "v starts off 16 bytes": gemm(tensors={"v": view(128, 16, offset=4).t()}),
        "pitch of p divisible by 8": gemm(tensors={"p": view(64, 64, pitch=72)}),
        "pitch of p odd": gemm(tensors={"p": view(64, 64, pitch=65)}),
        "rows": gemm(M=63),
        "one row": gemm(M=1),
        "N divisible by 8": gemm(N=136),
        "one column": gemm(N=1),
        "rank 1": gemm(R=1),
        "rank 8": gemm(R=8),
        "K ragged": gemm(K=60),
        "fp16": gemm(dtype=FP16),
        "fp32 adapter": gemm(adapter=FP32),
        "no bias": gemm(bias=False),
        "keep_bits": gemm(keep_bits=True),
        "another keep": gemm(keep_bits=True, inv_keep=1.25),
        "an integer for a float": gemm(keep_bits=True, inv_keep=1),
        "weight not transposed": gemm(transposed=False),
        "warps": gemm(warps=8),
        "stages": gemm(stages=2),
        "in place": add(),
        "beside": add(base="beside"),
        "no base": add(base="none"),
        "dot dtype": add(dot_dtype=FP16),
        "thin": thin(),
        "thin, split": thin(M=300, K=256, splits=2),
        "shrink with a mask": masked_shrink(),
        "pair": pair(),
        "pair, another width": pair(N=248),
        "gradient with a mask": gradient(),
        "thin, off 16 bytes": thin(p=view(64, 64, offset=1)),
        "single pass": single(),
        "two members": members(),
        "three members": members(3),
        "members of rank 8": members(R=8),
        "segments": segments(),
        "segments of rank 8": segments(R=8),
        "one segment": segments(1, M=100),
        "activation": activation(),
        "another activation": activation("gelu_tanh"),
        "activation without an adapter": activation(R=0),
        "activation out of place": activation(in_place=False),
        "mask": mask(32_768),
        "another keep count": mask(1),
    }
    if arch.startswith("sm_"):
        made |= {
            "descriptors": gemm(descriptors=True),
            "descriptors elsewhere": gemm(descriptors=True),
            "descriptors of the weight": gemm(descriptors=True, transposed=False),
            "descriptors of fp16": gemm(descriptors=True, dtype=FP16),
            "descriptors of wide rows": gemm(
                descriptors=True, tensors={"p": view(64, 64, pitch=128)}
            ),
            "single pass with descriptors": single(descriptors=True),
        }
    else:  # Triton specialises on whether a buffer is below 2 GiB
        size = 1 << 30  # elements of 2 bytes
        flat = torch.from_file(f"{folder}/big", shared=True, size=size + 64, dtype=BF16)
        made["in a large buffer"] = gemm(tensors={"p": flat[: 64 * 64].view(64, 64)})
    return made


def caught(run) -> list[tuple]:
    """The launches that reach the driver during ``run``."""
    launched.clear()
    run()
    return list(launched)


def plainly(run, caught=caught) -> list[tuple]:
    """The launches of ``run`` through Triton alone."""
    launch.REPEATS = False
    try:
        return caught(run)
    finally:
        launch.REPEATS = True


def compare(made: dict[str, object], active: FakeDriver, caught=caught) -> dict[str, object]:
    """Launch every case plainly and twice through ``kernels/launch.py``, on each of two devices.

    Args:
        made: launches by name.
        active: the active driver.
        caught: returns the launches that reach the driver, as tuples that start with the binary.

    Returns:
        The number of cases and of binaries, the names of the cases that differ, and of those whose
        launch was not repeated: it went through Triton again.
    """
    result = {"cases": len(made), "different": [], "not repeated": []}
    binaries, counted, run = set(), [], JITFunction.run

    def counting(self, *args, **kwargs):
        counted.append(self)
        return run(self, *args, **kwargs)

    with patch.object(JITFunction, "run", counting), patch.object(torch, "empty", same_buffer):
        for device in (0, 1):
            active.device = device
            expected = {name: plainly(case, caught) for name, case in made.items()}
            binaries |= {binary for records in expected.values() for binary, *_ in records}
            for case in made.values():
                caught(case)
            order = list(made)
            random.Random(0).shuffle(order)
            for name in order:
                counted.clear()
                if caught(made[name]) != expected[name]:
                    result["different"].append(name)
                if counted:
                    result["not repeated"].append(name)
    return result | {"binaries": len(binaries)}


def main(arch: str, above: str = "") -> None:
    """Print the result of :func:`compare` for all cases, as JSON."""
    active = make_driver(arch)
    launch._BUFFERS_HAVE_SIZES = arch.startswith("gfx")
    if above == "launcher":
        use_launcher(arch, active)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(cases(arch, folder), active)
    in_c = [plan.entry.function is record_in_c for plan in launch._plans.values()]
    print(json.dumps(result | {"plans": len(in_c), "in C": sum(in_c)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

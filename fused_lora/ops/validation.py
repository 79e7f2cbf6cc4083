"""Checks of public arguments; each error states what was expected and what it got."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..distributed.sharding import is_shard
from .segments import Segments

IMPLEMENTATIONS = (
    "auto",
    "triton",
    "triton:split",
    "triton:seeded",
    "triton:addmm",
    "triton:single_pass",
    "torch",
    "reference",
)
OF_SEGMENTS = ("triton:split", "triton:addmm")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_META_CURE = (
    "it has no values there; load them (load_state_dict with assign=True, load_adapter), or"
    " initialise an adapter by moving the model to its device (model.to)"
)
_PLAIN = (nn.Parameter, Tensor)


def check_dropout(p: float) -> None:
    """Check a dropout probability: a number in [0, 1)."""
    # isinstance() with an abstract base class costs more than all other checks of a call.
    if type(p) is not float and (not isinstance(p, Real) or isinstance(p, bool)):
        raise TypeError(f"expected dropout to be a number, got {p!r} ({type(p).__name__})")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"expected dropout in [0, 1), got {p}")


def check_impl(impl: str) -> None:
    """Check the name of an implementation."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"expected impl to be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def check_options(impl: str, dropout_p: float) -> None:
    """:func:`check_impl` and :func:`check_dropout`, in one call on the hot path."""
    if impl not in IMPLEMENTATIONS:
        check_impl(impl)
    if type(dropout_p) is not float or not 0.0 <= dropout_p < 1.0:
        check_dropout(dropout_p)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Check a dtype argument; None selects the default."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"expected {name} to be one of {_names(FLOATS)}, got {dtype}")


def check_tensors(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
) -> bool:
    """Check the tensors of one call against each other.

    Returns:
        True for plain tensors on one CPU or CUDA device, with ``x``, ``weight`` and ``bias`` in one
        dtype. False for other valid tensors, which may need special treatment.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be used.
        ValueError: shapes or devices that do not fit, or a weight that requires grad.
    """
    # Fast check of valid tensors of the common kind. If it fails, _check_each decides.
    try:
        is_plain = (
            type(x) in _PLAIN
            and type(weight) in _PLAIN
            and type(lora_A) in _PLAIN
            and type(lora_B) in _PLAIN
            and (bias is None or type(bias) in _PLAIN)
            # Single sizes: slicing and comparing torch.Size objects takes twice as long.
            and len(W := weight.shape) == len(A := lora_A.shape) == len(B := lora_B.shape) == 2
            and len(X := x.shape) > 0
            and X[-1] == W[1] == A[1]
            and B[0] == W[0]
            and B[1] == A[0] > 0
            and (bias is None or (len(b := bias.shape) == 1 and b[0] == W[0]))
            and (dtype := x.dtype) in FLOATS
            and weight.dtype is dtype
            and lora_A.dtype in FLOATS
            and lora_B.dtype in FLOATS
            and (bias is None or bias.dtype is dtype)
            and not weight.requires_grad
            and (
                weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu and (bias is None or bias.is_cpu)
                if x.is_cpu
                else _are_on_one_gpu(x, weight, lora_A, lora_B, bias)
            )
        )
    except RuntimeError:  # a strided nested tensor has no shape
        is_plain = False
    if not is_plain:
        _check_each(x, weight, lora_A, lora_B, bias)
    if type(scaling) is not float:
        _check_scale(scaling, x)
    return is_plain


def _check_each(x, weight, lora_A, lora_B, bias) -> None:
    tensors = (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B))
    _check_kinds(x, tensors if bias is None else (*tensors, ("bias", bias)))
    if weight.dim() == 2:
        _check_adapter(x, lora_A, lora_B, *weight.shape)
    _check_weight(weight, bias)


def _check_frozen(weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError(
            "expected a frozen weight, got one that requires grad: no gradient is computed for it;"
            " call weight.requires_grad_(False), or pass weight.detach()"
        )


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"expected weight of shape (out, in), got {_shape(weight)}")
    _check_frozen(weight)
    N = weight.shape[0]
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias of shape ({N},), got {_shape(bias)}")


def _are_on_one_gpu(x, weight, lora_A, lora_B, bias) -> bool:
    device = x.device
    return (
        x.is_cuda
        and weight.device == device
        and lora_A.device == device
        and lora_B.device == device
        and (bias is None or bias.device == device)
    )


def check_projection(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float | Tensor,
) -> None:
    """:func:`check_tensors`, for a layer that may have no adapter.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be used.
        ValueError: shapes or devices that do not fit, half an adapter, or a weight that requires
            grad.
    """
    if lora_A is not None and lora_B is not None:
        check_tensors(x, weight, lora_A, lora_B, bias, scaling)
        return
    if lora_A is not None or lora_B is not None:
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"expected lora_A and lora_B, or neither, got no {missing}")
    tensors = (("x", x), ("weight", weight))
    _check_kinds(x, tensors if bias is None else (*tensors, ("bias", bias)))
    _check_weight(weight, bias)
    _check_nested("x", x)
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"expected x of shape (..., {weight.shape[1]}), got {_shape(x)}")


def check_impl_of_segments(impl: str) -> None:
    """Check the requested implementation of a call over segments."""
    check_impl(impl)
    if impl.startswith("triton:") and impl not in OF_SEGMENTS:
        able = " or ".join(OF_SEGMENTS)
        raise ValueError(f"impl={impl!r} cannot run here: expected {able} for segments")


def is_plain(tensor: Tensor | None) -> bool:
    """Whether this is a strided tensor of no subclass, or None."""
    return tensor is None or (type(tensor) in _PLAIN and tensor.layout == torch.strided)


def check_segmented(x, weight, lora_A, lora_B, bias, scaling, dropout_p, impl, segments) -> tuple:
    """Check the arguments of a call over segments.

    Returns:
        ``lora_A`` and ``lora_B`` as stacks or tuples; the scales and dropouts of all segments.

    Raises:
        TypeError: an argument of the wrong type, or a dtype that cannot be used.
        ValueError: shapes, devices or values that do not fit; an ``impl`` without segments.
    """
    if not isinstance(segments, Segments):
        raise TypeError(f"expected segments to be Segments, got {type(segments).__name__}")
    check_impl_of_segments(impl)
    G = len(segments)
    halves = [_one_each(name, t, G) for name, t in (("lora_A", lora_A), ("lora_B", lora_B))]
    is_stack = isinstance(lora_A, Tensor)
    if is_stack is not isinstance(lora_B, Tensor):
        raise TypeError(
            "expected lora_A and lora_B both as stacks or both as sequences, got"
            f" {type(lora_A).__name__} and {type(lora_B).__name__}"
        )
    scales = _of_segments("scaling", scaling, G)
    dropouts = _of_segments("dropout_p", dropout_p, G)
    for p in dropouts:
        check_dropout(p)
    _check_kinds(
        x, (("x", x), ("weight", weight), *((("bias", bias),) if bias is not None else ()))
    )
    if weight.dim() not in (2, 3) or (weight.dim() == 3 and weight.shape[0] != G):
        raise ValueError(
            f"expected weight of shape (out, in) or ({G}, out, in), got {_shape(weight)}"
        )
    N = weight.shape[-2]
    if bias is not None and bias.shape not in ((N,), (G, N)):
        raise ValueError(f"expected bias of shape ({N},) or ({G}, {N}), got {_shape(bias)}")
    _check_frozen(weight)
    one = (weight[0] if weight.dim() == 3 else weight).detach()
    checked: set[tuple[int, int, int]] = set()
    for g, scale in enumerate(scales):
        # The matrices of a stack are alike, and one adapter or scale may serve many segments.
        key = id(scale), *(0 if is_stack else id(half[g]) for half in halves)
        if key in checked:
            continue
        checked.add(key)
        A, B = (half[g] for half in halves)
        try:
            check_projection(x, one, A, B, None, scale)
        except (TypeError, ValueError) as error:
            raise type(error)(f"segment {g}: {error}") from error
    adapters = halves if is_stack else (*halves[0], *halves[1])
    if not all(map(is_plain, (x, weight, bias, *adapters))):
        raise TypeError("expected plain tensors, got a subclass, or a sparse or nested tensor")
    M = x.shape[:-1].numel()
    if segments.offsets.device != x.device:
        raise ValueError(
            f"expected segments on x's device {x.device}, got {segments.offsets.device}"
        )
    if segments.rows is not None and len(segments.rows) != M:
        raise ValueError(f"expected segments of {M} rows, as x has, got {len(segments.rows)}")
    if x.is_cpu and (last := segments.bounds[-1][1]) > M:
        raise ValueError(f"expected offsets up to x's {M} rows, got {last}")
    if x.is_cpu and segments.whole and last < M:
        raise ValueError(f"expected segments of all {M} rows, as whole=True says, got {last}")
    return *halves, scales, dropouts


def _one_each(name: str, adapters, G: int):
    """A stack, or a tuple of one matrix or None per segment."""
    if isinstance(adapters, Tensor):
        if adapters.dim() != 3 or adapters.shape[0] != G:
            raise ValueError(
                f"expected {name} of three dimensions, the first of size {G} as there are {G}"
                f" segments, got {_shape(adapters)}"
            )
        return adapters
    if not isinstance(adapters, Sequence):
        raise TypeError(
            f"expected {name} to be a Tensor or a sequence of them, got {type(adapters).__name__}"
        )
    if len(adapters) != G:
        raise ValueError(f"expected {name} of {G} segments, got {len(adapters)}")
    return tuple(adapters)


def _of_segments(name: str, value, G: int) -> tuple:
    """One value for each segment."""
    if isinstance(value, Tensor) and value.dim() == 1:
        value = value.unbind()
    if not isinstance(value, Sequence):
        return (value,) * G
    if len(value) != G:
        raise ValueError(f"expected {name} of {G} segments, got {len(value)}")
    return tuple(value)


def check_base(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> None:
    """Check the tensors of a call that adds to a given ``base``.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be used.
        ValueError: shapes or devices that do not fit.
    """
    _check_kinds(x, (("x", x), ("base", base), ("lora_A", lora_A), ("lora_B", lora_B)))
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        shapes = f"{_shape(lora_A)} and {_shape(lora_B)}"
        raise ValueError(f"expected lora_A (rank, in) and lora_B (out, rank), got {shapes}")
    N, K = lora_B.shape[0], lora_A.shape[1]
    _check_adapter(x, lora_A, lora_B, N, K)
    if type(scaling) is not float:
        _check_scale(scaling, x)
    _check_nested("base", base)
    if base.shape != (*x.shape[:-1], N):
        expected = (*x.shape[:-1], N)
        raise ValueError(f"expected base of shape {expected}, got {_shape(base)}")


def _check_kinds(x: Tensor, tensors: tuple[tuple[str, Tensor], ...]) -> None:
    """Check that each is a floating-point tensor on x's device."""
    device = getattr(x, "device", None)
    on_cpu = isinstance(x, Tensor) and x.is_cpu  # comparing devices costs more than is_cpu
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            kind = "a Tensor or None" if name == "bias" else "a Tensor"
            cure = (
                ": torch.fx.wrap makes this function one call of the graph"
                if isinstance(tensor, Proxy)
                else ""
            )
            raise TypeError(f"expected {name} to be {kind}, got {type(tensor).__name__}{cure}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"expected {name} in one of {_names(FLOATS)}, got {tensor.dtype}")
        if not (on_cpu and tensor.is_cpu) and tensor.device != device:
            cure = f": {_META_CURE}" if tensor.is_meta else ""
            raise ValueError(f"expected {name} on x's device {device}, got {tensor.device}{cure}")


def _check_adapter(x: Tensor, lora_A: Tensor, lora_B: Tensor, N: int, K: int) -> None:
    _check_nested("x", x)
    if x.shape[-1:] != (K,):
        raise ValueError(f"expected x of shape (..., {K}), got {_shape(x)}")
    shape = lora_A.shape
    if shape[1:] != (K,):
        raise ValueError(f"expected lora_A of shape (rank, {K}), got {_shape(lora_A)}")
    R = shape[0]
    if R < 1:
        raise ValueError(f"expected lora_A of rank >= 1, got {_shape(lora_A)}")
    if lora_B.shape != (N, R):
        raise ValueError(f"expected lora_B of shape ({N}, {R}), got {_shape(lora_B)}")


def _check_nested(name: str, tensor: Tensor) -> None:
    if tensor.is_nested and tensor.layout != torch.jagged:
        raise TypeError(
            f"expected {name} to be dense or a jagged nested tensor, got a strided nested tensor:"
            f" pass torch.nested.as_nested_tensor(list({name}.unbind()), layout=torch.jagged)"
        )


def _check_scale(scaling: float | Tensor, x: Tensor) -> None:
    if isinstance(scaling, Tensor):
        _check_scaling_tensor(scaling, x)
    elif type(scaling) is not float and not isinstance(scaling, Real):
        raise TypeError(
            f"expected scaling to be a float or a 0-d Tensor, got {type(scaling).__name__}"
        )


def multiplies_itself(weight: Tensor) -> bool:
    """Whether a weight is of a tensor subclass that has its own product, such as a quantised one.

    DTensors have their own rules; the fake tensors of compilers stand for plain ones.
    """
    kind = type(weight)
    if kind in _PLAIN or is_shard(weight):
        return False
    return not kind.__module__.startswith("torch._subclasses.")


def check_passes_gradient(x: Tensor, y: Tensor, name: str) -> None:
    """Check that ``y``, which a frozen layer or weight computed of ``x``, has a gradient for it.

    Raises:
        RuntimeError: it has none, although ``x`` requires grad.
    """
    if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
        raise RuntimeError(
            f"expected a base layer that passes gradients on to its input, got a {name} that drops"
            " them, so the layers before it would train on wrong ones: use a weight-only"
            " quantisation, or torch.no_grad() for inference"
        )


def check_same_dtype(x: Tensor, weight: Tensor) -> None:
    """Without autocast ``x`` must have the weight's dtype, as in ``F.linear``."""
    if x.dtype != weight.dtype:
        raise TypeError(f"expected x in the weight's dtype {weight.dtype}, got {x.dtype}")


def _check_scaling_tensor(scaling: Tensor, x: Tensor) -> None:
    if scaling.dim() != 0:
        raise ValueError(f"expected scaling of shape (), got {_shape(scaling)}")
    if scaling.dtype not in FLOATS:
        raise TypeError(f"expected scaling in one of {_names(FLOATS)}, got {scaling.dtype}")
    if scaling.device != x.device:
        raise ValueError(f"expected scaling on x's device {x.device}, got {scaling.device}")
    if scaling.requires_grad:
        raise ValueError("expected a constant scaling, got one that requires grad")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def listed(names: Sequence[str], most: int = 5) -> str:
    """``names`` for a message: at most ``most``, and the number of the others."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

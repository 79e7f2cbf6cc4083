"""The experts of a mixture with an adapter each, as one call over segments.

For the tokens ``x_e`` that an expert ``e`` gets, with its own adapters of both matrices:

    h_e = gate(x_e W_eᵀ + bias_e + s·D(x_e) A_eᵀ B_eᵀ)      gate_up_proj, or up_proj
    y_e = h_e V_eᵀ + bias_e + s·D(h_e) A_eᵀ B_eᵀ            down_proj

The module is one of transformers 5, which holds the matrices of all experts as one Parameter
``(E, out, in)``. No matrix of an expert's size is computed, and no gradient of one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import fused_lora_linear
from ..ops.modes import without_autocast
from ..ops.segments import Segments


class ExpertAdapter(NamedTuple):
    """The adapters of one Parameter of all experts.

    Attributes:
        lora_A: ``(E, rank, in)``.
        lora_B: ``(E, out, rank)``.
        scaling: a float or a 0-d tensor.
        dropout_p: probability that an entry of the adapters' input is dropped.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout_p: float = 0.0

    @classmethod
    def of(
        cls, lora_A: Tensor, lora_B: Tensor, experts: int, scaling, dropout_p: float = 0.0
    ) -> ExpertAdapter:
        """Of matrices in PEFT's layout; see :func:`stacks`."""
        return cls(*stacks(lora_A, lora_B, experts), scaling, dropout_p)


def stacks(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """``(E, rank, in)`` and ``(E, out, rank)``: views of matrices in PEFT's layout.

    Args:
        lora_A: ``(E·rank, in)``, the expert slowest.
        lora_B: ``(out, rank·E)``, the expert fastest.
    """
    A = lora_A.reshape(experts, -1, lora_A.shape[1])
    return A, lora_B.reshape(len(lora_B), -1, experts).permute(2, 0, 1)


def matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`stacks`, contiguous."""
    return A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()


def experts_forward(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, ExpertAdapter],
    impl: str = "auto",
) -> Tensor:
    """The forward of transformers' experts with adapters.

    Tokens are sorted by expert once, for all products. A token's dropout mask does not depend on
    where it is sorted to. Differentiable in ``hidden_states``, ``top_k_weights``, the adapters and
    the biases.

    Args:
        experts: a module for which :func:`unsupported` returns None.
        hidden_states: ``(T, in)``.
        top_k_index: ``(T, k)``, the experts of each token; those from ``E`` on, which are others'
            under expert parallelism, add nothing.
        top_k_weights: ``(T, k)``, their shares.
        adapters: by the name of a Parameter, such as ``gate_up_proj``; any may be missing.
        impl: as for :func:`fused_lora.fused_lora_linear`.

    Returns:
        ``(T, out)`` in the dtype of ``hidden_states``.
    """
    order = _Order.of(top_k_index)
    each = torch.arange(experts.num_experts, dtype=order.ids.dtype, device=order.ids.device)
    offsets = torch.searchsorted(order.ids, each, right=True)  # waits for no GPU, unlike bincount
    whole = not getattr(experts, "_is_expert_parallel", False)
    drops = any(adapter.dropout_p for adapter in adapters.values())
    segments = Segments(offsets, order.permutation if drops else None, whole=whole)
    product = functools.partial(_product, experts, segments, adapters, impl)
    h = product(_SortTokens.apply(hidden_states, order), first_matrix(experts))
    h = experts._apply_gate(h) if is_gated(experts) else experts.act_fn(h)
    h = product(h, "down_proj")  # rows of no segment are zeros, so they need no mask
    if getattr(experts, "has_post_expert_norm", False):
        h = experts.post_expert_norm(h)
    return _WeighTokens.apply(h, top_k_weights, order).to(hidden_states.dtype)


def is_gated(experts: nn.Module) -> bool:
    """Whether the first product computes a gate too."""
    return getattr(experts, "has_gate", True)


def first_matrix(experts: nn.Module) -> str:
    """The name of the Parameter of the first product."""
    return "gate_up_proj" if is_gated(experts) else "up_proj"


def weight_of(experts: nn.Module, name: str) -> Tensor:
    """A Parameter of the experts as ``(E, out, in)``."""
    weight = getattr(experts, name)
    return weight.mT if experts.is_transposed else weight


def follows_autocast(experts: nn.Module) -> bool:
    """Whether the experts' products follow autocast: ``grouped_mm`` keeps the weight's dtype."""
    return experts.config._experts_implementation != "grouped_mm"


def _product(experts, segments, adapters, impl, x: Tensor, name: str) -> Tensor:
    weight = weight_of(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    none = [None] * len(segments)
    lora_A, lora_B, scaling, p = adapters.get(name, (none, none, 1.0, 0.0))
    call = functools.partial(
        fused_lora_linear, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, scaling=scaling,
        dropout_p=p, segments=segments, impl=impl,
    )  # fmt: skip
    if follows_autocast(experts):
        return call(x)
    with without_autocast(x):
        return call(x.to(weight.dtype))


class _Order(NamedTuple):
    """Where the rows of tokens, one for each of their experts, are sorted to."""

    shape: tuple[int, int]  # tokens, experts of each
    ids: Tensor  # of the experts, sorted
    permutation: Tensor  # the place that each sorted row had before
    places: Tensor  # its inverse
    tokens: Tensor  # of the sorted rows

    @classmethod
    def of(cls, top_k_index: Tensor) -> _Order:
        ids, permutation = top_k_index.reshape(-1).sort(stable=True)
        places = torch.empty_like(permutation)
        places[permutation] = torch.arange(len(permutation), device=permutation.device)
        tokens = permutation // top_k_index.shape[1]
        return cls(tuple(top_k_index.shape), ids, permutation, places, tokens)


class _SortTokens(torch.autograd.Function):
    """``(T, H)`` to ``(T·k, H)``: a row for each expert of each token, sorted by expert.

    The gradient is the sum of a token's rows; autograd would add them one by one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.tokens)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _SumTokens.apply(dy, ctx.order), None


class _SumTokens(torch.autograd.Function):
    """``(T·k, H)`` to ``(T, H)``: the sum of each token's rows, the adjoint of sorting."""

    @staticmethod
    def forward(ctx, y: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        return _sums(y, order.places.view(order.shape))

    @staticmethod
    def backward(ctx, dx: Tensor):
        return _SortTokens.apply(dx, ctx.order), None


class _WeighTokens(torch.autograd.Function):
    """``(T·k, H)`` to ``(T, H)``: the sum of each token's rows by their shares ``(T, k)``.

    As one step it needs half of the memory that it takes in autograd's.
    """

    @staticmethod
    def forward(ctx, h: Tensor, shares: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        need_h, need_shares = ctx.needs_input_grad[:2]
        ctx.save_for_backward(h if need_shares else None, shares if need_h else None)
        return _sums(h, order.places.view(order.shape), shares)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (h, shares), order, d_shares = ctx.saved_tensors, ctx.order, None
        if shares is not None:
            factors = shares.reshape(-1)[order.permutation].unsqueeze(-1)
        if h is None and not torch.is_grad_enabled():
            return _sums(dy, order.tokens.unsqueeze(-1), factors), None, None
        d_rows = _SortTokens.apply(dy, order)
        if h is not None:
            d_shares = (d_rows * h).sum(-1)
            d_shares = d_shares[order.places].view(order.shape)
        if shares is None:
            return None, d_shares, None
        if torch.is_grad_enabled():  # create_graph
            return d_rows * factors, d_shares, None
        return _times(d_rows, factors), d_shares, None


def _sums(rows: Tensor, places: Tensor, shares: Tensor | None = None) -> Tensor:
    """``(n, H)``: the sums of the rows at ``places (n, k)``, times their ``shares (n, k)``.

    On a CPU ``embedding_bag`` needs a tenth of the time of other operators (measured on a Xeon),
    and no temporary.
    """
    if rows.is_cpu and places.shape[1] and (shares is None or shares.dtype == rows.dtype):
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=shares)
    rows = rows[places]
    if shares is not None:
        rows = _times(rows, shares.unsqueeze(-1))
    return rows.squeeze(1) if places.shape[1] == 1 else rows.sum(1)


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """``rows · factors``, in place if the dtype allows."""
    if torch.promote_types(rows.dtype, factors.dtype) != rows.dtype:
        return rows * factors
    return rows.mul_(factors)


# What the functions that transformers 5.24 runs read of the module. Another word would be something
# that experts_forward does not compute.
_READ = {
    "num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm",
    "_is_expert_parallel", "_apply_gate", "act_fn", "post_expert_norm", "gate_up_proj",
    "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias",
}  # fmt: skip
# What a forward of a module's own calls and reads, if it is transformers' loop over the experts.
_LOOP = {
    "torch", "nn", "functional", "no_grad", "zeros_like", "dtype", "device", "float32", "one_hot",
    "permute", "greater", "sum", "nonzero", "squeeze", "item", "numel", "where", "linear", "chunk",
    "index_add_", "to",
}  # fmt: skip
_MOE = "transformers.integrations.moe"


def unsupported(experts: nn.Module) -> str | None:
    """Why :func:`experts_forward` is not what a module computes, as a noun phrase; None if it is.

    Its class must run one of transformers' functions for experts, of which it has settings and
    Parameters. Hooks, and what the Parameters are, are not checked here.
    """
    if not is_experts(experts):
        return f"a parameter of a {type(experts).__name__}"
    forward = type(experts).forward
    cells = (cell.cell_contents for cell in forward.__closure__)
    outer = dict(zip(forward.__code__.co_freevars, cells, strict=True))
    name = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if name == "eager":
        return _loop_reason(outer["original_forward"])
    function = outer["experts_interface"].get(name)
    return _function_reason(name, function)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' experts, with any implementation."""
    known = _interface_code(sys.modules.get(_MOE))
    # A scripted module's class computes its forward when it is read.
    forward = inspect.getattr_static(type(module), "forward", None)
    settings = vars(module).keys() >= {"num_experts", "has_bias", "is_transposed"}
    return known is not None and getattr(forward, "__code__", None) is known and settings


@functools.cache
def _interface_code(moe):
    """The code of the forward that transformers gives to every class of experts, or None."""
    if moe is None:
        return None
    try:
        made = moe.use_experts_implementation(type("Experts", (), {"forward": print}))
        return made.forward.__code__
    except Exception:  # another version of transformers: no module has such a forward
        return None


@functools.cache
def _function_reason(name: str | None, function: Callable | None) -> str | None:
    known = f"{name}_experts_forward" if name in ("grouped_mm", "batched_mm") else None
    found = getattr(function, "__module__", None), getattr(function, "__name__", None)
    if found != (_MOE, known):
        return f"the experts implementation {name}"
    of_self, _ = _words(function)
    return None if of_self <= _READ else f"experts that read {_listed(of_self - _READ)}"


@functools.cache
def _loop_reason(forward: Callable) -> str | None:
    of_self, others = _words(forward)
    if not forward.__module__.startswith("transformers.models."):
        return "an eager forward of another library"
    strange = (of_self - _READ) | (others - _LOOP)
    return f"an eager forward with {_listed(strange)}" if strange else None


def _words(function: Callable) -> tuple[set[str], set[str]]:
    """The attributes that a function reads: those of ``self``, and of anything else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return {"what has no source"}, set()
    body = ast.Module(tree.body[0].body, [])  # without the types of its arguments
    found = [node for node in ast.walk(body) if isinstance(node, ast.Attribute)]
    own = [isinstance(n.value, ast.Name) and n.value.id == "self" for n in found]
    return (
        {n.attr for n, is_own in zip(found, own, strict=True) if is_own},
        {n.attr for n, is_own in zip(found, own, strict=True) if not is_own},
    )


def _listed(words: set[str]) -> str:
    return ", ".join(sorted(words))

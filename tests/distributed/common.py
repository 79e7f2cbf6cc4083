"""Training on the same global batches in one process and in several, and the error bound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import train_like
from torch import Tensor, nn

from fused_lora import apply_lora, lora_parameters
from support import UNIT_ROUNDOFF, relative_rms

STEPS = 20
ROWS = 16  # of a global batch


def network() -> nn.Sequential:
    """Linear layers at two depths, wide enough for a sample of rounding errors."""
    inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), inner)


def adapted(dtype: torch.dtype = torch.float32, **arguments) -> nn.Sequential:
    """A network with non-zero adapters, the same in every process."""
    torch.manual_seed(1)
    model = network().to(dtype)
    apply_lora(model, **{"rank": 3, **arguments})
    return train_like(model)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def batches(split: bool) -> list[tuple[Tensor, Tensor]]:
    """Inputs exact in bfloat16, with learnable classes: all rows, or those of this process."""
    draw = torch.Generator().manual_seed(2)
    teacher = torch.randn(24, 5, generator=draw)
    found = []
    for _ in range(STEPS):
        x = torch.randn(ROWS, 24, generator=draw).bfloat16().float()
        pair = x, (x @ teacher).argmax(1)
        if split:
            pair = tuple(t.chunk(dist.get_world_size())[dist.get_rank()] for t in pair)
        found.append(pair)
    return found


def loss_of(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(
        model(x.to(dtype)).to(torch.promote_types(dtype, torch.float32)), classes
    )


def backward(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Backpropagate the mean loss; returns the loss."""
    loss = loss_of(model, x, classes)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    backward: Callable[[nn.Module, Tensor, Tensor], Tensor] = backward,
    max_norm: float | None = None,
    split: bool = False,
) -> Tensor:
    """Train the adapters with AdamW; returns the loss of every step over the global batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for x, classes in batches(split):
        optimizer.zero_grad()
        losses.append(backward(model, x, classes))
        if max_norm is not None:
            norm = whole(nn.utils.clip_grad_norm_(lora_parameters(model), max_norm))
            assert norm > max_norm  # else nothing is clipped
        optimizer.step()
    losses = torch.stack(losses)
    if split:
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return losses


def adapters_of(model: nn.Module) -> Tensor:
    """The active adapters' parameters as one vector."""
    return torch.cat([whole(p.detach()).flatten() for p in lora_parameters(model)])


def assert_trains_alike(
    wrap: Callable[[nn.Module], nn.Module],
    start: nn.Module,
    backward: Callable[[nn.Module, Tensor, Tensor], Tensor] = backward,
    max_norm: float | None = None,
    gathered: Callable = nullcontext,
) -> None:
    """20 steps split over processes err at most twice as much as in one, plus a unit round-off.

    Errors are those of the losses and of the trained adapters, against float64.
    """
    unit = UNIT_ROUNDOFF[next(start.parameters()).dtype]
    exact, single = copy.deepcopy(start).double(), copy.deepcopy(start)
    split = wrap(start)
    expected, alone = train(exact, max_norm=max_norm), train(single, max_norm=max_norm)
    losses = train(split, backward, max_norm, split=True)
    with gathered(split):
        became = adapters_of(split).clone()
    for name, got, one, true in (
        ("losses", losses, alone, expected),
        ("adapters", became, adapters_of(single), adapters_of(exact)),
    ):
        error, bound = relative_rms(got, true), 2 * relative_rms(one, true) + unit
        assert error <= bound, f"{name}: relative RMS {error:.2e}, bound {bound:.2e}"
    assert expected[-5:].mean() < 0.7 * expected[:5].mean()  # it learns

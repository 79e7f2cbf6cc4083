"""One process of a launch: ``worker.py MODULE.CHECK...`` runs these functions in turn."""

import gc
import importlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main(*checks: str) -> None:
    torch.set_num_threads(1)
    launched = "RANK" in os.environ  # by torchrun
    if launched:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for check in checks:
        module, name = check.split(".")
        torch.manual_seed(0)
        getattr(importlib.import_module(module), name)()
        if launched:
            dist.barrier()
        if os.environ.get("RANK", "0") == "0":
            print("passed", check, flush=True)
    if launched:
        dist.destroy_process_group()
        gc.collect()  # frees groups that models held: gloo's threads must end before Python does


if __name__ == "__main__":
    main(*sys.argv[1:])

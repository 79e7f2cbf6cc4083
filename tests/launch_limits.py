"""When launches are not repeated, and what repeating keeps alive; see ``launch_cases.py``.

Prints, as JSON, the launches that went through Triton per setting, and what is kept.
"""

import gc
import json
import weakref
from types import SimpleNamespace

import torch
from launch_cases import add, caught, gemm, launched, make_driver
from triton import knobs
from triton.runtime.jit import JITFunction

from fused_lora.kernels import launch
from fused_lora.kernels.lora_add import _lora_add


def passed_through(run) -> int:
    """The number of calls of Triton's own launch during ``run``."""
    count, original = [], JITFunction.run

    def counting(self, *args, **kwargs):
        count.append(self)
        return original(self, *args, **kwargs)

    JITFunction.run = counting
    try:
        run()
    finally:
        JITFunction.run = original
    return len(count)


def while_watched() -> dict[str, int]:
    """Calls of Triton's launch by a repeatable launch: with each setting on, and off again."""
    run, seen = add(), []

    def hook(*args, **kwargs):
        seen.append(args)

    def enter(on):
        (knobs.runtime.launch_enter_hook.add if on else knobs.runtime.launch_enter_hook.remove)(
            hook
        )

    def leave(on):
        (knobs.runtime.launch_exit_hook.add if on else knobs.runtime.launch_exit_hook.remove)(hook)

    def debug(on):
        knobs.runtime.debug = on

    def before(on):
        _lora_add.pre_run_hooks[:] = [hook] if on else []

    def instrumented(on):
        knobs.compilation.instrumentation_mode = "consan" if on else ""

    def stages(on):
        knobs.runtime.add_stages_inspection_hook = (lambda *args: ("a", "b")) if on else None

    def unknown(on):
        launch.REPEATS = not on

    run()
    result = {"nothing": passed_through(run)}
    for switch in (enter, leave, debug, before, instrumented, stages, unknown):
        switch(True)
        result[switch.__name__] = passed_through(run)
        switch(False)
        result[f"after {switch.__name__}"] = passed_through(run)
    return result


def what_is_kept() -> dict[str, bool]:
    """Whether tensors of repeated launches are freed, and whether the tables stay bounded."""
    p = torch.zeros(64, 64, dtype=torch.bfloat16)
    run = gemm(descriptors=True, tensors={"p": p})
    run()
    run()
    alive = weakref.ref(p)
    launched.clear()
    del p, run
    gc.collect()
    freed = alive() is None
    launch._MOST_PLANS, launch._MOST_ADDRESSES = 8, 8
    runs = [gemm(M=M) for M in range(1, 30)] + [gemm(descriptors=True) for _ in range(30)]
    for run in runs:
        caught(run)
    descriptors = [d for plan in launch._plans.values() for _, d in plan.operands if d is not None]
    return {
        "freed": freed,
        "plans bounded": len(launch._plans) <= 8,
        "addresses bounded": bool(descriptors) and all(len(d) <= 8 for d in descriptors),
    }


class Elsewhere(torch.Tensor):
    """A tensor of another device with the same shape, strides, dtype and alignment."""

    def get_device(self):
        return 1


def on_another_device() -> int:
    """Calls of Triton's launch by a repeatable launch, one of whose tensors then moves."""
    p = torch.zeros(64, 64, dtype=torch.bfloat16)
    gemm(tensors={"p": p})()
    return passed_through(gemm(tensors={"p": p.as_subclass(Elsewhere)}))


class Launcher:
    """A launcher in the form of Triton's, that passes the kernel's arguments with ``pack``."""

    def __init__(self, pack, scratch: int = 0):
        self.pack, self.global_scratch_size = pack, scratch
        self.launch = launched.append

    def __call__(self, *arguments):
        self.launch(*arguments[:9], *self.pack(arguments[9:]))


def called_below() -> dict[str, bool]:
    """Whether the function below a launcher would be called, for several launchers."""
    launchers = {
        "as in 3.6": Launcher(lambda given: given),
        "as in 3.7": Launcher(lambda given: (given,)),
        "with scratch memory": Launcher(lambda given: given, scratch=16),
        "in an unknown form": Launcher(lambda given: (len(given), *given, 0)),
        "a function": lambda *arguments: None,
    }
    result = {}
    for name, run in launchers.items():
        compiled = SimpleNamespace(run=run, function=1, packed_metadata=(4, 1, 0))
        result[name] = launch._entry(compiled, (1, 1, 1)).function is not run
    return result


if __name__ == "__main__":
    make_driver("sm_90")
    results = {"watched": while_watched(), "moved": on_another_device()}
    results |= {"kept": what_is_kept(), "below": called_below()}
    print(json.dumps(results))

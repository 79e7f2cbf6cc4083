"""Sharded models in two processes: merging, switching and the patch, correct or refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from common import whole as _whole
from models import stack, train_like
from special_bases import Doubled
from torch import nn

from fused_lora import (
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    disable_lora,
    load_adapter,
    merge_lora,
    patch_peft,
    save_adapter,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from support import UNIT_ROUNDOFF, relative_rms, watch_patch

PROCESSES = 2


def two_models(**arguments) -> tuple[nn.Module, nn.Module]:
    """The same model whole and sharded; the outermost layer stays gathered after a forward."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = stack()
    apply_lora(whole, **{"rank": 2, **arguments})
    add_adapter(train_like(whole), "second", rank=2)
    sharded = copy.deepcopy(whole)
    fully_shard(sharded[2])
    return whole, fully_shard(sharded)


def check_merge():
    merge({}, True)


def check_final_merge():
    merge({}, False)


def check_merge_dora():
    merge({"use_dora": True}, True)


def merge(arguments: dict, keep_base: bool):
    whole, sharded = two_models(**arguments)
    x = torch.randn(4, 8)
    with torch.no_grad():
        on = sharded(x)
        assert not hasattr(sharded[0].weight, "full_tensor")  # gathered: a temporary copy
        assert hasattr(sharded[2][0].weight, "full_tensor")
        for model in (whole, sharded):
            merge_lora(model, keep_base)
        merged = whole(x)
        torch.testing.assert_close(on, merged)
        torch.testing.assert_close(sharded(x), merged)
        torch.testing.assert_close(sharded(x), merged)
        state = {name: _whole(tensor) for name, tensor in sharded.state_dict().items()}
        torch.testing.assert_close(state, dict(whole.state_dict()))
        if keep_base:
            with disable_lora(whole), disable_lora(sharded):
                assert torch.equal(sharded(x), whole(x))
            with pytest.raises(ValueError, match="of shape"):
                sharded(torch.randn(4, 5))  # a forward that fails leaves its layers gathered
            unmerge_lora(sharded)
            assert torch.equal(sharded(x), on)
            with pytest.raises(ValueError, match="of shape"):
                sharded(torch.randn(4, 5))
            sharded[0].merge()
            torch.testing.assert_close(sharded(x), merged)


def check_an_overflow_is_refused_by_every_rank():
    """peft#1001: only one rank's shard of the merged weight overflows."""
    whole, sharded = two_models()
    with torch.no_grad():
        for model in (whole.half(), sharded.half()):
            model[2][0].lora_A.fill_(10)
            _write_last_row(model[2][0].lora_B, 6e4)
    before = {name: _whole(tensor).clone() for name, tensor in sharded.state_dict().items()}
    attempts = (merge_lora, lambda model: merge_lora(model, keep_base=False))
    for attempt in attempts:
        for model in (whole, sharded):
            with pytest.raises(ValueError, match=r"2\.0: expected a merged weight within"):
                attempt(model)
        assert not any(getattr(module, "merged", False) for module in sharded.modules())
    state = {name: _whole(tensor) for name, tensor in sharded.state_dict().items()}
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def _write_last_row(parameter: nn.Parameter, value: float) -> None:
    """Write the last row, which the last rank holds if the Parameter is sharded."""
    if not hasattr(parameter, "to_local"):
        parameter[-1].fill_(value)
    elif dist.get_rank() == dist.get_world_size() - 1:
        parameter.to_local()[-1].fill_(value)


def check_a_layer_that_computes_itself():
    """Quantised and otherwise special bases run their own forward, beside a sharded adapter."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = nn.Sequential(Doubled(8, 8), nn.Linear(8, 3))
    apply_lora(whole, rank=2)
    sharded = fully_shard(copy.deepcopy(train_like(whole)))
    x = torch.randn(4, 8)
    for model in (whole, sharded):
        model(x).sum().backward()
        with pytest.raises(TypeError, match="0: expected a plain layer to merge into"):
            merge_lora(model)
    for name in ("lora_A", "lora_B"):
        gradients = (getattr(model[0], name).grad for model in (sharded, whole))
        torch.testing.assert_close(*map(_whole, gradients))
    torch.testing.assert_close(sharded(x), whole(x))
    with pytest.raises(ValueError, match="expected a whole model to adapt"):
        apply_lora(nn.Sequential(fully_shard(Doubled(8, 8))))


def check_switching():
    whole, sharded = two_models()
    x = torch.randn(4, 8)
    with torch.no_grad():
        for name in ("second", "default"):
            for model in (sharded, whole):
                model(x)  # leaves the outermost layer gathered
                assert set_adapter(model, name) == []
            torch.testing.assert_close(sharded(x), whole(x))
    whole(x).sum().backward()
    sharded(x).sum().backward()
    torch.testing.assert_close(_whole(sharded[0].lora_A.grad), whole[0].lora_A.grad)


def check_life_cycle_under_ddp():
    whole, _ = two_models()
    x = torch.randn(4, 8)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(whole))
    if dist.get_rank() == 0:
        save_adapter(wrapped, "adapter")
    dist.barrier()
    for model in (whole, wrapped):
        set_adapter(model, "second")
        add_adapter(model, "third", rank=2)
        load_adapter(model, "adapter", "fourth")
        set_adapter(model, "fourth")
        model(x).sum().backward()
    torch.testing.assert_close(wrapped.module[0].lora_A.grad, whole[0].lora_A.grad)
    with torch.no_grad():
        on = whole(x)
        merge_lora(wrapped)
        torch.testing.assert_close(wrapped(x), on)
        unmerge_lora(wrapped)
        assert torch.equal(wrapped(x), on)
        torch.testing.assert_close(unload_lora(wrapped)(x), on)
    with pytest.raises(ValueError, match="to adapt, got one in DistributedDataParallel"):
        load_adapter(nn.parallel.DistributedDataParallel(stack()), "adapter")


def check_switching_keeps_what_mixed_precision_rounds():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole, _ = two_models()
    expected = whole[0].lora_A.detach().clone()
    sharded = fully_shard(whole, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        sharded(torch.randn(4, 8))
        assert sharded[0].lora_A.dtype == torch.bfloat16  # gathered, for the forward
        set_adapter(sharded, "second")
        set_adapter(sharded, "default")
    assert torch.equal(_whole(sharded[0].lora_A), expected)


def check_switching_to_other_shapes_is_refused():
    from torch.distributed.fsdp import fully_shard

    whole, _ = two_models()
    add_adapter(whole, "wide", rank=3)
    for wrapped in (nn.parallel.DistributedDataParallel(whole), fully_shard(whole)):
        with pytest.raises(ValueError, match="to switch to an adapter of other shapes, got"):
            set_adapter(wrapped, "wide")
        assert wrapped.get_submodule("module.0" if wrapped is not whole else "0").rank == 2


def peft_model() -> nn.Module:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(stack(), peft.LoraConfig(target_modules=["0", "2.0", "2.1"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def check_patched_peft():
    from torch.distributed.fsdp import fully_shard

    whole, x = peft_model(), torch.randn(4, 8)
    sharded = copy.deepcopy(whole)
    layers = sharded.base_model.model
    fully_shard(layers[2])
    fully_shard(sharded)
    calls = watch_patch()
    report = patch_peft(sharded)
    assert "lora_A: sharded, unless FSDP2 gathers it for the call" in str(report)
    for model in (whole, sharded):
        model(x).square().sum().backward()
    assert calls == ["_fused"] * 3
    for name, parameter in sharded.named_parameters():
        expected = whole.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            error = relative_rms(_whole(parameter.grad), expected)
            assert error <= 8 * UNIT_ROUNDOFF[torch.float32], name


def check_patched_fsdp1():
    patched_fsdp1(False)


def check_patched_fsdp1_of_parts():
    patched_fsdp1(True)


def patched_fsdp1(wrap_parts: bool):
    """The model in one flat parameter, or one per trainable part as in PEFT's wrapping policy.

    PEFT's own forward runs: the parameters are views of the flat one, or belong to wrappers.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    whole, x = peft_model(), torch.randn(4, 8)
    policy = None
    if wrap_parts:

        def trains(module):
            return type(module) is nn.Linear and module.weight.requires_grad

        policy = partial(lambda_auto_wrap_policy, lambda_fn=trains)
    sharded = FullyShardedDataParallel(
        copy.deepcopy(whole),
        auto_wrap_policy=policy,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    calls = watch_patch()
    patch_peft(sharded)
    whole(x).square().sum().backward()
    sharded(x).square().sum().backward()
    assert not calls
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        seen = 0
        for name, parameter in sharded.named_parameters():
            expected = whole.get_parameter(name.replace("_fsdp_wrapped_module.", "")).grad
            if expected is not None:
                seen += 1
                error = relative_rms(parameter.grad, expected)
                assert error <= 8 * UNIT_ROUNDOFF[torch.float32], name
    assert seen == 6


def check_patched_tensor_parallel():
    """Beside parallel bases; PEFT itself adds to an output that is still being communicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    whole, x = peft_model(), torch.randn(4, 8)
    parallel = copy.deepcopy(whole)
    plan = {
        "base_model.model.0.base_layer": ColwiseParallel(output_layouts=Replicate()),
        "base_model.model.2.0.base_layer": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(parallel, init_device_mesh("cpu", (PROCESSES,)), plan)

    def gradients(y, model):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(y.square().sum(), list(trained.values()))
        return dict(zip(trained, map(_whole, found), strict=True))

    exact = gradients((wide := copy.deepcopy(whole).double())(x.double()), wide)
    outputs = [model(x) for model in (whole, parallel)]
    torch.testing.assert_close(*outputs)
    pefts = gradients(outputs[1], parallel)
    calls = watch_patch()
    patch_peft(parallel)
    y = parallel(x)
    torch.testing.assert_close(y, outputs[0])
    assert calls == ["_added", "_fused"]
    for name, value in gradients(y, parallel).items():
        assert relative_rms(value, exact[name]) <= 2 * relative_rms(pefts[name], exact[name]), name


def check_refusals():
    from torch.distributed.fsdp import fully_shard

    _, sharded = two_models()
    before = {name: _whole(tensor) for name, tensor in sharded.state_dict().items()}
    for call in (
        lambda: unload_lora(sharded),
        lambda: add_adapter(sharded, "third"),
        lambda: add_weighted_adapter(sharded, "third", {"second": 1.0}),
        lambda: load_adapter(sharded, "adapter"),
        lambda: apply_lora(fully_shard(stack())),
    ):
        with pytest.raises(ValueError, match=r"expected a whole model to .* before fully_shard"):
            call()
    with pytest.raises(ValueError, match="without wrapper to adapt, got one in Distributed"):
        apply_lora(nn.parallel.DistributedDataParallel(stack()))
    after = {name: _whole(tensor) for name, tensor in sharded.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

"""Linear layers that compute themselves, each of a kind that public reports name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

K, N = 64, 32


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Packed(nn.Module):
    """A quantised layer that does not derive from nn.Linear, as HQQ's and GPTQ's."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("codes", torch.randint(-9, 9, (N, K), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype) / 64)


class OnlyLinear(torch.Tensor):
    """A weight that supports F.linear and its backward, and no other product, as torchao's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        assert function not in (torch.mm, torch.addmm, torch.matmul, torch.Tensor.t), function
        if function is F.linear:
            return F.linear(*plain, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def linear(dtype) -> nn.Linear:
    return nn.Linear(K, N, dtype=dtype)


def special_weight(dtype):
    layer = linear(dtype)
    weight = layer.weight.detach().as_subclass(OnlyLinear)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert type(layer.weight) is OnlyLinear
    return layer


def torchao(config: str):
    def make(dtype):
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(linear(dtype))
        quantization.quantize_(model, getattr(quantization, config)())
        return model[0]

    return make


def bitsandbytes(kind: str, **options):
    def make(dtype):
        made = getattr(pytest.importorskip("bitsandbytes").nn, kind)(K, N, **options)
        made.load_state_dict(linear(dtype).state_dict())
        return made.to("cpu")  # this quantises

    return make


def hooked(dtype):
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(linear(dtype), hooks.AlignDevicesHook("cpu"))


def offloaded(dtype):
    layer = linear(dtype)
    pytest.importorskip("accelerate").cpu_offload(layer, execution_device="cpu")
    assert layer.weight.is_meta
    return layer


def conv1d(dtype):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K).to(dtype)
    layer.forward = partial(layer.forward)  # as accelerate replaces it
    return layer


# Each: what makes the base, and whether the adapted layer is a FusedLoRALinear.
BASES = {
    # diffusers#11752: a LoRA fails to load on torchao's int8 weights
    "torchao int8": (torchao("Int8WeightOnlyConfig"), True),
    # diffusers#10621: the same on float8 weights
    "torchao float8": (torchao("Float8WeightOnlyConfig"), True),
    "tensor subclass": (special_weight, True),
    # peft#851, peft#2321: adapters on bitsandbytes' layers
    "bitsandbytes nf4": (bitsandbytes("Linear4bit", quant_type="nf4"), False),
    "bitsandbytes int8": (bitsandbytes("Linear8bitLt", has_fp16_weights=False), False),
    # peft#1997: quanto's QLinear is a subclass of nn.Linear
    "subclass": (lambda dtype: Doubled(K, N, dtype=dtype), False),
    # peft#1616: HQQ's layer is none, and "is not supported"
    "not nn.Linear": (lambda dtype: Packed(), False),
    # peft#868: accelerate's hooks replace forward; the weights may be on meta between calls
    "hooked": (hooked, False),
    "offloaded": (offloaded, False),
    "weight norm": (lambda dtype: weight_norm(linear(dtype)), False),
    "Conv1D": (conv1d, False),
}


class Net(nn.Module):
    def __init__(self, base, dtype=torch.float32):
        super().__init__()
        self.before = nn.Linear(K, K, dtype=dtype)
        self.base = base
        self.after = nn.Linear(N, 4, dtype=dtype)

    def forward(self, x):
        return self.after(torch.tanh(self.base(torch.tanh(self.before(x)))))

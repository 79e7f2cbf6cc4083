"""Repairs to Triton's interpreter, which silently returns wrong results for bfloat16.

These faults of Triton 3.6 to 3.9 are repaired if kernels are interpreted (``TRITON_INTERPRET=1``):

* bfloat16 is stored in uint16 arrays, whose bit patterns ``tl.dot`` multiplies as integers.
* Casts from float32 to bfloat16 truncate; the GPUs round to nearest even.
* ``int()`` of a scalar fails in 3.6 with NumPy 2.4 or newer: the array behind it is not 0-d.

The repairs apply to every kernel interpreted in the process, other libraries' included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# ``triton.jit`` reads this when a kernel's module is imported: a later change has no effect.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def repair() -> None:
    """Replace the faulty methods of Triton's interpreter; a second call changes nothing."""
    import numpy as np  # the interpreter itself needs it, the rest of the library does not
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_repaired_by_fused_lora", False):
        return
    create_dot, cast_impl = builder.create_dot, builder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def to_float(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        # bfloat16 is the upper half of a float32.
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, to_float(a), to_float(b), d, input_precision, max_num_imprecise_acc)

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            data = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.create_dot = dot
    builder.cast_impl = cast
    # Both must call the replaced method, in every version of Triton.
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    interpreter._patch_lang_tensor = patch
    builder._repaired_by_fused_lora = True


if INTERPRETED:
    repair()

"""Triton's interpreter without repeated work: kernels take about 0.6 of the time.

* A call of a device function replaces the functions of ``triton.language`` again, although the
  launch of the kernel has replaced them.
* Each launch searches all names of ``triton.language`` for the functions to replace.
* Each look-up of a NumPy dtype builds the table of all dtypes.

Results do not change. The package does not do this: it is for tests and rehearsals.
"""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter

PACKAGES = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


def install() -> None:
    """Replace the three functions of the interpreter; a second call changes nothing."""
    if getattr(interpreter, "_fast", False):
        return
    interpreter._fast = True
    is_builtin = tl.core.is_builtin
    patch_lang, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    names = {p: [n for n in dir(p) if is_builtin(getattr(p, n, None))] for p in PACKAGES}
    dtypes = {}

    def patch_once(fn):
        languages = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
        if not languages or any(is_builtin(language.load) for language in languages):
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    def patch_names(package, builder, scope):
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def known_dtype(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = np_dtype(dtype)
        return dtypes[dtype.name]

    interpreter._patch_lang = patch_once
    interpreter._patch_builtin = patch_names
    interpreter._get_np_dtype = known_dtype

"""Triton's interpreter, mended where it differs from the compiler.

Interpreted kernels run in numpy on a CPU. Three of its habits would make a right kernel fail, or a wrong one pass:

- bfloat16 and FP8 conversions truncate, or round without carry; the compiler rounds to nearest even.
- a dot product of bfloat16 multiplies the raw bits, as numpy has no such type.
- a scalar as a loop bound raises with numpy 2.4 and Triton before 3.9.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Any

import numpy as np
import torch

_TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_HALF_BITS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def import_interpreted() -> None:
    """Import every kernel so that it is interpreted, whatever the process runs later. To be called once.

    Triton decides when a function is decorated. Its own library may have been imported before, for the compiler
    (`transformers` does); then it is decorated once more.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        importlib.import_module("triton.experimental.gluon")  # the first launch would import it
        _interpret_library(interpreter.InterpretedFunction)
        package = importlib.import_module("engine.kernels")
        for module in pkgutil.iter_modules(package.__path__, "engine.kernels."):
            importlib.import_module(module.name)
        _mend(interpreter)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _interpret_library(interpreted: Any) -> None:
    """Turn what `triton.language` compiles into what it interprets, wherever its modules name it."""
    compiled = importlib.import_module("triton.runtime.jit").JITFunction
    for name, module in list(sys.modules.items()):
        if name.startswith("triton.language"):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, compiled):
                    setattr(module, attribute, interpreted(value.fn))


def _mend(interpreter: Any) -> None:
    """Replace the three habits."""
    handle_type, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    patch_tensor = interpreter._patch_lang_tensor

    def convert(data: np.ndarray, source: Any, target: Any, _rounding: object = None) -> np.ndarray:
        converted = _to_torch(data, source).to(_TYPES[target.name])
        return _to_numpy(converted).reshape(data.shape)

    def cast(_builder: Any, handle: Any, target: Any, *_rest: object) -> Any:
        source, wanted = handle.dtype.scalar, target.scalar
        if source.name in _TYPES and wanted.name in _TYPES:
            return handle_type(convert(handle.data, source, wanted), wanted)
        return handle_type(handle.data.astype(interpreter._get_np_dtype(target)), wanted)

    def dot(_builder: Any, left: Any, right: Any, start: Any, *_rest: object) -> Any:
        operands = [_to_torch(one.data, one.dtype.scalar).to(torch.float32).numpy() for one in (left, right)]
        return handle_type(np.matmul(*operands) + start.data, start.dtype.scalar)

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index
    builder.cast_impl = cast
    builder.create_fp_to_fp = cast
    builder.create_dot = dot


def _to_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
    """The numbers that a handle's bits mean."""
    torch_dtype = _TYPES[dtype.name]
    contiguous = torch.from_numpy(np.ascontiguousarray(data))
    return contiguous.view(torch_dtype) if torch_dtype in _HALF_BITS else contiguous


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    """Bits as the interpreter keeps them."""
    if values.dtype is torch.bfloat16:
        return values.view(torch.uint16).numpy()
    if values.dtype in _HALF_BITS:
        return values.view(torch.uint8).numpy()
    return values.numpy()

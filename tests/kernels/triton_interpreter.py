"""Runs the Triton kernels of a module in Triton's interpreter, without a GPU and without torch.

The interpreter replaces `triton.jit` when the process starts, so this is a program of its own: it reads a pickled list
of calls (function name, positional arguments as NumPy arrays) from standard input and writes the pickled results.
"""

import importlib
import os
import pickle
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class HostTensor:
    """A NumPy array with those parts of torch.Tensor's surface that the interpreter asks for."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = f"torch.{array.dtype.name}"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        return self

    def cpu(self) -> "HostTensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "HostTensor":
        return HostTensor(self.array)

    def set_(self, *_: Any) -> None:
        """The copy made by `new_empty` already is the tensor."""

    def copy_(self, _: Any) -> None:
        """Host and device memory are one."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def launch(
    kernel: Any,
    operands: tuple[Any, ...],
    out_shape: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    constants: dict[str, Any],
    *,
    aliases: dict[int, int] | None = None,
    stages: int = 1,
    warps: int = 4,
) -> tuple[jax.Array, ...]:
    """Stands in for `triton_launch.launch`. Outputs that alias no input hold a number that would be noticed."""
    inputs = [HostTensor(np.array(x)) for x in operands]
    sources = {output: source for source, output in (aliases or {}).items()}
    outputs = [
        inputs[sources[i]] if i in sources else HostTensor(np.full(s.shape, 77, s.dtype))
        for i, s in enumerate(out_shape)
    ]
    kernel[grid](*inputs, *outputs, **constants)
    return tuple(jnp.asarray(x.array) for x in outputs)


def widen_bf16_dots() -> None:
    """Teaches the interpreter, which keeps bf16 as bare 16-bit integers, to multiply bf16 tiles."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1 before Python starts")
    module = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "pallas_kernels.lightning.triton")
    widen_bf16_dots()
    module._launch = launch
    results = []
    for function, arguments in pickle.load(sys.stdin.buffer):
        arguments = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
        results.append(jax.tree.map(np.asarray, getattr(module, function)(*arguments)))
    pickle.dump(results, sys.stdout.buffer)


if __name__ == "__main__":
    main()

"""Runs the Triton kernels of softmax attention and of the grouped matmul in Triton's interpreter, without a GPU.

A program of its own, as `triton_interpreter` is and for the same reason: it reads a pickled list of calls (module,
function, arguments as NumPy arrays) from standard input and writes the pickled results.
"""

import importlib
import os
import pickle
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from tests.kernels import triton_interpreter


def take_loop_bounds() -> None:
    """Teaches the interpreter, whose numbers are arrays of one element, to count from and to one of them."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1 before Python starts")
    triton_interpreter.widen_bf16_dots()
    take_loop_bounds()
    results = []
    for module, function, arguments in pickle.load(sys.stdin.buffer):
        implementation = importlib.import_module(module)
        implementation._launch = triton_interpreter.launch
        with dispatch.target("gpu", 9.0):
            values = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, arguments)
            results.append(jax.tree.map(np.asarray, getattr(implementation, function)(*values)))
    pickle.dump(results, sys.stdout.buffer)


if __name__ == "__main__":
    main()

"""The checkpoint-name column of the parameter spec as a map of tensors, used in both directions (INV-03).

One stored tensor is one slice of one parameter with its dimensions merged and permuted: [N * 3 * H, D] on disk is
[D, N, 3, H] here. Both directions work on row ranges of the stored tensor as well, so that nobody needs one whole.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mmx_jax.config import LIGHTNING, SOFTMAX, ModelConfig
from mmx_jax.convert.errors import ConvertError
from mmx_jax.model import parameter_spec
from mmx_jax.model.lightning import layer_slopes

STRIP = 256
CRUMBS = 8
TEXT_PREFIX = "language_model."
"""Of MiniMax-VL-01, whose other tensors are its vision part."""
VISION_TENSORS = re.compile(r"(vision_tower\.|multi_modal_projector\.|image_newline$)")
DECAY_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$")
"""Persistent buffers that transformers writes; they follow from the configuration and are never read."""


@dataclass(frozen=True)
class TensorSlice:
    """One tensor of the published checkpoint and the slice of the parameter that it is."""

    name: str
    path: str
    index: tuple[int, ...]
    """Place among the stacked axes (and experts) of the parameter."""
    part: tuple[int, ...]
    """Shape of the slice without those axes."""
    dims: tuple[tuple[int, ...], ...]
    """For each dimension of the stored tensor, the dimensions of the slice that are merged into it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(math.prod(self.part[d] for d in group) for group in self.dims)

    @property
    def row_dim(self) -> int:
        """Dimension of the slice that moves slowest along the stored rows; a row range is a range of it."""
        return self.dims[0][0]

    @property
    def row_units(self) -> int:
        """Size of `row_dim`."""
        return self.part[self.row_dim]

    @property
    def rows_per_unit(self) -> int:
        """Stored rows that one index of `row_dim` stands for."""
        return self.shape[0] // self.row_units

    def with_units(self, units: int) -> tuple[int, ...]:
        """Shape of the slice when only `units` indices of `row_dim` are taken."""
        return (*self.part[: self.row_dim], units, *self.part[self.row_dim + 1 :])

    @property
    def _transposed(self) -> bool:
        """Whether the stored matrix is the transpose of our slice seen as a matrix; if not, the orders are equal."""
        order = [d for group in self.dims for d in group]
        if order == sorted(order):
            return False
        assert [*self.dims[1], *self.dims[0]] == sorted(order), f"{self.path}: no transpose of a matrix"
        return True

    def from_stored(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows (a range that starts and ends on a unit) as the part of our slice, in C order."""
        part = self.with_units(rows.shape[0] // self.rows_per_unit)
        return (transpose(rows) if self._transposed else rows).reshape(part)

    def to_stored(self, values: np.ndarray) -> np.ndarray:
        """A part of our slice with a range of `row_dim` as stored rows, in C order; the inverse of `from_stored`."""
        rows = values.shape[self.row_dim] * self.rows_per_unit
        if not self._transposed:
            return values.reshape(rows, *self.shape[1:])
        return transpose(values.reshape(self.shape[1], rows))

    def units_per_piece(self, itemsize: int, limit: int) -> int:
        """The largest divisor of `row_units` whose rows fit in `limit` bytes (1 when a single row does not).

        Where that makes more than `CRUMBS` times the pieces that are needed (a prime number of rows), the pieces are
        larger than the limit instead: the smallest ones that are not too many.
        """
        row_bytes = math.prod(self.shape) // self.row_units * itemsize
        pieces = min(-(-self.row_units // max(1, limit // row_bytes)), self.row_units)
        more = range(pieces, min(CRUMBS * pieces, self.row_units) + 1)
        return self.row_units // next(n for n in (*more, *range(pieces, 0, -1)) if self.row_units % n == 0)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transpose of a matrix in C order; copied in strips that stay in the cache, three times as fast as numpy."""
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    for start in range(0, rows, STRIP):
        out[:, start : start + STRIP] = matrix[start : start + STRIP].T
    return out


def tensor_map(config: ModelConfig) -> dict[str, TensorSlice]:
    """All tensors of the published checkpoint of a model by name, in layer order.

    Raises: ConvertError when a parameter has no published name (low-rank gate, dense FFN), or when the column is not
    a bijection: every element of every parameter must belong to exactly one tensor.
    """
    tensors: dict[str, TensorSlice] = {}
    for path, spec in parameter_spec(config).items():
        if spec.names is None:
            raise ConvertError(
                f"parameter {path!r} has no tensor in the published checkpoint: conversion is impossible"
            )
        indices = []
        for index, name in spec.checkpoint_slices():
            if name in tensors:
                raise ConvertError(f"tensor {name!r} would hold parts of both {tensors[name].path!r} and {path!r}")
            tensors[name] = TensorSlice(name, path, index, spec.shape[len(index) :], spec.names.dims)
            indices.append(index)
        stack = spec.shape[: len(indices[0])]
        permutes = sorted(d for group in spec.names.dims for d in group) == list(range(len(spec.shape) - len(stack)))
        if len(set(indices)) != math.prod(stack) or not permutes:
            raise ConvertError(f"parameter {path!r}: its tensors do not cover every element exactly once")
    return {name: tensors[name] for name in sorted(tensors, key=_layer_order)}


def _layer_order(name: str) -> list[tuple[int, int | str]]:
    """Names with their numbers compared as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def names_sha256(names: Iterable[str]) -> str:
    """SHA-256 of the sorted names joined by newlines, the fingerprint that model.md 11 gives."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def expected_tensors(config: ModelConfig) -> int:
    """How many tensors the published table lists for a model of this shape, counted without the parameter spec."""
    lightning, softmax = (config.layers.count(kind) for kind in (LIGHTNING, SOFTMAX))
    return 3 + config.num_layers * (2 + 1 + 3 * config.num_experts) + 4 * lightning + 4 * softmax


def text_names(names: Iterable[str]) -> dict[str, str]:
    """The text model's tensors among the names in a folder: our name -> the name there.

    MiniMax-VL-01's prefix is taken off and its vision tensors are left out, as are transformers' decay buffers.
    Raises: ConvertError for one tensor that is there with and without the prefix.
    """
    names = list(names)
    prefix = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in names) else ""
    if prefix:
        names = [name for name in names if not VISION_TENSORS.match(name)]
    found: dict[str, str] = {}
    for name in names:
        ours = name.removeprefix(prefix)
        if ours in found:
            raise ConvertError(f"{found[ours]!r} and {name!r} are both there; only one of them can be the model's")
        found[ours] = name
    return {ours: theirs for ours, theirs in found.items() if not DECAY_BUFFERS.match(ours)}


def decay_buffers(config: ModelConfig, block: int) -> Iterator[tuple[str, np.ndarray]]:
    """transformers' decay buffers of every lightning layer, fp32, from the exact slopes (model.md 4.3, 4.5)."""
    steps = np.arange(1, block + 1, dtype=np.float64)
    distance = steps[:, None] - steps[None, :]
    slopes = layer_slopes(config.num_heads, config.num_layers)
    for layer, kind in enumerate(config.layers):
        if kind != LIGHTNING:
            continue
        rate = slopes[layer].astype(np.float64)[:, None, None]
        # Above the diagonal the exponent would be positive and the weight is 0.
        weight = np.where(distance >= 0, np.exp(-rate * np.maximum(distance, 0)), 0.0)
        buffers: Mapping[str, np.ndarray] = {
            "slope_rate": rate,
            "query_decay": np.exp(-rate * steps[:, None]),
            "key_decay": np.exp(-rate * (block - steps[:, None])),
            "diagonal_decay": weight[None],
        }
        for name, value in buffers.items():
            yield f"model.layers.{layer}.self_attn.{name}", value.astype(np.float32)

"""Reads the text of a compiled program: instructions in the order of the schedule, their bytes and arithmetic."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5}
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_VIEWS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
_READS_PART = ("dynamic-slice", "slice", "gather")
_WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}
"""Those that change a part of their first operand in place, and which operand says to what."""


@dataclass
class Instruction:
    """One instruction."""

    name: str
    shape: str
    opcode: str
    arguments: str
    """What stands in its parentheses."""
    attributes: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it reads."""
        return tuple(_NAME.findall(self.arguments))

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under these attributes (`body=`, `calls=`, ...)."""
        found = []
        for key in keys:
            if match := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes):
                found += _NAME.findall(match[1])
        return found

    @cached_property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass
class Computation:
    """A list of instructions in the order in which they run."""

    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    def operand_shapes(self, instruction: Instruction) -> list[str]:
        """Shapes of an instruction's operands."""
        return [self.by_name[name].shape for name in instruction.operands if name in self.by_name]


@dataclass
class Module:
    """A program of one device."""

    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text` gives.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], Computation())
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            current.instructions.append(_instruction(line))
    if entry is None:
        raise ValueError("the text is no compiled program: it has no ENTRY computation")
    for computation in computations.values():
        computation.instructions = _started_with_operands(computation)
    return Module(entry, computations)


def _started_with_operands(computation: Computation) -> list[Instruction]:
    """Instructions, where what is started empty and given its operands by an update begins with the update."""
    updates = {item.operands[0]: item for item in computation.instructions if item.opcode.endswith("-update")}
    kept = []
    for item in computation.instructions:
        if item.name in updates and not item.arguments:
            continue
        if item.opcode.endswith("-update") and not (start := computation.by_name[item.operands[0]]).arguments:
            operands = item.arguments.partition(",")[2]
            item = Instruction(item.name, item.shape, start.opcode, operands, start.attributes)
        kept.append(item)
    vars(computation).pop("by_name", None)
    return kept


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opening = right.index("(", end)
    closing = _closing(right, opening)
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(
        name, right[:end], right[end:opening].strip(), right[opening + 1 : closing], right[closing + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def array_bytes(shape: str, *, main_memory: bool = False) -> float:
    """Bytes of all arrays of a shape; with `main_memory` only of those that are in the chip's main memory."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if main_memory and "S(" in layout:
            continue
        size = _BYTES.get(dtype) or (1 if dtype.startswith("f8") else int(dtype[1:]) / 8)
        total += size * math.prod(map(int, filter(None, dims.split(","))))
    return total


def dimensions(shape: str) -> list[int]:
    """Sizes of a shape that is one array."""
    match = _ARRAY.search(shape)
    return [int(size) for size in match[2].split(",") if size] if match else []


def trip_count(loop: Instruction, module: Module) -> int | None:
    """How often a `while` runs: as the compiler says, or up from 0 to a constant; None for one that ends otherwise."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]].instructions
    limits = [item for item in condition if item.opcode == "constant" and item.shape.startswith("s32[]")]
    counts = any("direction=LT" in item.attributes for item in condition)
    return int(limits[0].arguments) if counts and len(limits) == 1 else None


def collective(instruction: Instruction, module: Module) -> Instruction | None:
    """The collective that an instruction is or starts, maybe in what it calls; None for all others."""
    if instruction.opcode in ("async-start", "call-start"):
        inner = [module.computations[name] for name in instruction.called("calls", "to_apply")]
        found = (collective(item, module) for computation in inner for item in computation.instructions)
        return next((item for item in found if item), None)
    return instruction if collective_kind(instruction) in COLLECTIVES else None


def collective_kind(instruction: Instruction) -> str:
    """The opcode of a collective, whether it waits for its result or not."""
    return instruction.opcode.removesuffix("-start")


def first_group(instruction: Instruction, devices: int) -> list[int]:
    """Devices, by place in the mesh, of the first group of a collective; (source, target) of a permutation."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", instruction.attributes):
        return [int(match[1]), int(match[2])]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.attributes):
        ids = _transposed(match[3], match[4])
        return ids.reshape(int(match[1]), int(match[2]))[0].tolist()
    named = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *\{([^}]*)\}"
    if match := re.search(named, instruction.attributes):
        axes = re.findall(r"'(\w+)'=(\d+)", match[1])
        ids = (_transposed(match[2], match[3]) if match[2] else np.arange(devices)).reshape([int(n) for _, n in axes])
        taken = re.findall(r"'(\w+)'", match[4])
        return ids[tuple(slice(None) if axis in taken else 0 for axis, _ in axes)].reshape(-1).tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.attributes)
    return [int(n) for n in listed[1].split(",")] if listed else list(range(devices))


def _transposed(sizes: str, order: str | None) -> np.ndarray:
    """Device numbers in an array of these sizes with its axes in another order."""
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def flops(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Arithmetic of the matrix products in an instruction and in what it is fused with, a multiply-add as two."""
    if instruction.opcode in ("dot", "convolution"):
        out = math.prod(dimensions(instruction.shape))
        return 2.0 * out * _contracted(instruction, computation)
    inner = instruction.called("calls", "to_apply") if instruction.opcode in ("fusion", "call", "async-start") else []
    parts = (module.computations[name] for name in inner)
    return math.fsum(flops(item, part, module) for part in parts for item in part.instructions)


def _contracted(instruction: Instruction, computation: Computation) -> float | int:
    """Products summed into one element of a dot's or convolution's result."""
    left, right = (dimensions(shape) for shape in computation.operand_shapes(instruction)[:2])
    if instruction.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return math.prod(left[int(place)] for place in match[1].split(",") if place) if match else 1
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 1
    out, count = dimensions(instruction.shape), 1.0
    for place, label in enumerate(labels[2]):
        if label == "i":
            count *= right[place]
        elif label.isdecimal():
            sizes = left[labels[1].index(label)], right[place], out[labels[3].index(label)]
            count *= _products(instruction.attributes, int(label), *sizes) / max(sizes[2], 1)
    return count


def _products(attributes: str, axis: int, read: int, window: int, written: int) -> int:
    """Products of one spatial axis that meet an element and no padding; products of matrices are written so as well."""

    def option(name: str, default: str) -> str:
        match = re.search(rf"\b{name}=([\d_x\-]+)", attributes)
        return match[1].split("x")[axis] if match else default

    stride, spread, step = (int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(option("pad", "0_0").split("_")[0])
    place = np.arange(written)[:, None] * stride - low + np.arange(window)[None] * step
    return int(((place >= 0) & (place < (read - 1) * spread + 1) & (place % spread == 0)).sum())


def moved_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that an instruction reads from and writes to main memory; slices of large arrays count as slices."""
    if instruction.opcode in _VIEWS or instruction.opcode.endswith(("-start", "-done")):
        return 0.0
    shapes = computation.operand_shapes(instruction)
    if instruction.opcode == "fusion":
        return _fusion_bytes(instruction, shapes, module.computations[instruction.called("calls")[0]], module)
    written = array_bytes(instruction.shape, main_memory=True)
    if instruction.opcode in _READS_PART:
        return 2 * written
    if instruction.opcode in _WRITES_PART:
        return 2 * array_bytes(shapes[_WRITES_PART[instruction.opcode]], main_memory=True)
    return written + sum(array_bytes(shape, main_memory=True) for shape in shapes)


def _fusion_bytes(fusion: Instruction, shapes: list[str], inner: Computation, module: Module) -> float:
    written = array_bytes(fusion.shape, main_memory=True)
    read = 0.0
    parameters = _parameters(inner)
    for place, shape in enumerate(shapes):
        users = [item for item in inner.instructions if parameters.get(place) in item.operands]
        whole = array_bytes(shape, main_memory=True)
        updates = [u for u in users if u.opcode in _WRITES_PART and u.operands[0] == parameters.get(place)]
        if users and len(updates) == len(users):
            # Written in place: neither read nor written as a whole.
            changed = sum(array_bytes(inner.by_name[u.operands[_WRITES_PART[u.opcode]]].shape) for u in updates)
            written += min(changed, whole) - whole
        else:
            read += min(whole, _read_bytes(parameters.get(place, ""), inner, module))
    return max(written, 0.0) + read


def _parameters(computation: Computation) -> dict[int, str]:
    """Names of a computation's parameters by their place."""
    return {int(item.arguments): item.name for item in computation.instructions if item.opcode == "parameter"}


def _read_bytes(name: str, inner: Computation, module: Module) -> float:
    """Bytes that fused instructions read of an array: of one that they only cut slices from, the slices."""
    total = 0.0
    for user in inner.instructions:
        if name not in user.operands:
            continue
        if user.opcode in _READS_PART:
            total += array_bytes(user.shape)
        elif user.opcode == "bitcast":
            total += _read_bytes(user.name, inner, module)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")[0]]
            names = _parameters(nested)
            places = (place for place, operand in enumerate(user.operands) if operand == name)
            total += sum(_read_bytes(names.get(place, ""), nested, module) for place in places)
        else:
            return math.inf
    return total

"""What a compiled program does, read from the text of its optimised HLO.

Everything here is a function of text. A program's instructions are those of its entry computation,
and those inside `while`, `call` and `conditional` as often as they run. What a fusion contains is
not looked into: it is one kernel.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
SLICES = {"slice", "dynamic-slice", "gather"}  # read no more of their first operand than they give
WINDOWS = {
    "convolution", "dot", "dynamic-update-slice", "reduce-window", "scatter", "select-and-scatter",
    "sort",
}  # fmt: skip
HEADING = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
LARGEST = 20


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Item(NamedTuple):
    """An instruction that the program executes."""

    instruction: Instruction
    kind: str
    times: int
    bytes: int  # of one execution: distinct operands and results
    touched: int  # the same, but of operands that are only sliced no more than the slices
    operands: tuple[str, ...]  # their shapes
    layer: str


def size(shape: str) -> int:
    """Bytes of an array's or a tuple's shape, such as (f32[3,4]{1,0}, bf16[8]{0}).

    Tokens have none. Raises KeyError for a number format that is not in BYTES.
    """
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        if dtype != "token":
            total += BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)
    return total


def elements(shape: str) -> int:
    """Elements of an array, or of all in a tuple."""
    arrays = re.findall(r"\b[a-z]\w*\[([\d,]*)\]", shape)
    return sum(math.prod(int(dim) for dim in dims.split(",") if dim) for dims in arrays)


def computations(hlo: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The entry computation's name; the instructions of every computation by name, in order."""
    entry = ""
    found: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        heading = HEADING.match(line)
        if heading and not line.startswith("HloModule"):
            current = found.setdefault(heading[2], {})
            if heading[1]:
                entry = heading[2]
        elif match := INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            end = closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            current[name] = Instruction(name, shape, opcode, operands, rest[end + 1 :])
    return entry, found


def closing(text: str) -> int:
    """Where the parenthesis closes that was opened before this text. Raises ValueError."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is never closed: ({text[:80]}")


def executed(hlo: str) -> list[Item]:
    """What the program executes, in order. Raises ValueError for HLO without entry computation."""
    entry, parts = computations(hlo)
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program's HLO")
    return list(_executed(parts[entry], 1, parts))


def _executed(
    instructions: dict[str, Instruction], times: int, parts: dict[str, dict[str, Instruction]]
) -> Iterator[Item]:
    layers = {name: layer(found, parts) for name, found in instructions.items()}
    for name, instruction in reversed(instructions.items()):
        for operand in instruction.operands:  # what has no layer of its own serves its user's
            layers[operand] = layers.get(operand) or layers[name]

    for instruction in instructions.values():
        if instruction.opcode in NO_KERNEL:
            continue
        inside = list(_called(instruction, parts))
        for name, runs in inside:
            yield from _executed(parts[name], times * runs, parts)
        if inside:
            continue  # control flow itself computes nothing

        shapes = tuple(instructions[name].shape for name in dict.fromkeys(instruction.operands))
        result = size(_result(instruction))
        moved = result + sum(map(size, shapes))
        touched = result + _read(instruction, instructions, parts)
        kind = _kind(instruction, parts)
        yield Item(instruction, kind, times, moved, touched, shapes, layers[instruction.name])


def _called(
    instruction: Instruction, parts: dict[str, dict[str, Instruction]]
) -> Iterator[tuple[str, int]]:
    """(computation, how often it runs) for the computations that control flow hands over to.

    A loop whose number of iterations XLA does not know is counted as one. Of the branches of a
    conditional the one with the most instructions is counted.
    """
    attributes = instruction.attributes
    if instruction.opcode == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes)
        trips = int(known[1]) if known else 1
        yield _named(attributes, "condition"), trips + 1
        yield _named(attributes, "body"), trips
    elif instruction.opcode == "call":
        yield _named(attributes, "to_apply"), 1
    elif instruction.opcode == "conditional":
        listed = re.search(r"branch_computations=\{(.*?)\}", attributes)
        if listed:
            branches = re.findall(r"%?([\w.\-]+)", listed[1])
        else:
            branches = [_named(attributes, f"{case}_computation") for case in ("true", "false")]
        yield max(branches, key=lambda name: len(parts[name])), 1


def _named(attributes: str, attribute: str) -> str:
    """The computation that an attribute names."""
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", attributes)
    assert match is not None, attributes
    return match[1]


def _result(instruction: Instruction) -> str:
    """The shape of the result, without the scratch memory that a library's call asks for."""
    if instruction.opcode == "custom-call" and "__cu" in _target(instruction):
        return re.sub(r", (?:/\*index=\d+\*/)?[su]8\[\d*\](\{0\})?\)$", ")", instruction.shape)
    return instruction.shape


def _target(instruction: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    return match[1] if match else ""


def _kind(instruction: Instruction, parts: dict[str, dict[str, Instruction]]) -> str:
    """The opcode; of a fusion also its kind, of a custom call its target."""
    if instruction.opcode == "custom-call":
        return _target(instruction)
    if instruction.opcode != "fusion":
        return instruction.opcode
    words = ["fusion"]
    words += re.findall(r"\bkind=(\w+)", instruction.attributes)
    words += re.findall(r'"kind":"(\w+)"', instruction.attributes)
    if any(inner.opcode == "sort" for inner in _fused(instruction, parts)):
        words.append("sort")
    return " ".join(words)


def _fused(instruction: Instruction, parts: dict[str, dict[str, Instruction]]) -> list[Instruction]:
    """What a fusion contains, nothing for other instructions."""
    match = re.search(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
    return list(parts[match[1]].values()) if match else []


def _read(
    instruction: Instruction,
    instructions: dict[str, Instruction],
    parts: dict[str, dict[str, Instruction]],
) -> int:
    """Bytes that an instruction reads: of an operand that is only sliced, the slices."""
    operands = list(dict.fromkeys(instruction.operands))
    sizes = [size(instructions[name].shape) for name in operands]
    inside = _fused(instruction, parts)
    if instruction.opcode in SLICES:
        return size(instruction.shape) + sum(sizes[1:])
    if not inside:
        return sum(sizes)

    needed = _needed(inside)
    read = 0
    for inner in inside:
        if inner.opcode == "parameter":
            share = needed[inner.name] / max(elements(inner.shape), 1)
            read += round(share * size(inner.shape))
    return min(read, sum(sizes))


def _needed(inside: list[Instruction]) -> Counter[str]:
    """How many elements of each array a fusion needs, at most; slices that overlap count twice."""
    shapes = {inner.name: inner.shape for inner in inside}
    needed = Counter({inside[-1].name: elements(inside[-1].shape)})
    for inner in reversed(inside):
        here = min(needed[inner.name], elements(inner.shape))
        needed[inner.name] = here
        for place, operand in enumerate(inner.operands):
            whole = elements(shapes[operand])
            sliced = inner.opcode in SLICES and place == 0
            each = whole == elements(inner.shape) and inner.opcode not in WINDOWS
            needed[operand] += here if sliced or each else whole
    return needed


def layer(instruction: Instruction, parts: dict[str, dict[str, Instruction]]) -> str:
    """The layer that an instruction comes from, "backward" before it for its gradient, or "".

    That is the path in jax's name of the operation. A fusion without a name has the name that is
    most frequent inside it.
    """
    names = _paths(instruction.attributes)
    if not names:
        inside = [_paths(inner.attributes) for inner in _fused(instruction, parts)]
        names = [name for found in inside for name in found]
    return Counter(names).most_common(1)[0][0] if names else ""


def _paths(attributes: str) -> list[str]:
    """The layers in an instruction's `op_name`, of which a fusion may have several."""
    match = re.search(r'op_name="([^"]*)"', attributes)
    if not match:
        return []
    found = []
    for name in match[1].split(";"):
        steps = re.sub(r"^jit\(\w+\)/", "", name).split("/")
        backward = steps[0].startswith("transpose(")
        path = [step for step in steps[1:-1] if "(" not in step]
        found.append(("backward " if backward else "") + "/".join(path or steps[-1:]))
    return found


def convolutions(items: list[Item]) -> dict[str, int]:
    """How many convolutions there are of a type and a layout.

    As "convForward bf16 x bf16 -> bf16, b01f_o01i->b01f".
    """
    found: Counter[str] = Counter()
    for item in items:
        attributes = item.instruction.attributes
        if "dim_labels=" not in attributes:
            continue
        labels = re.search(r"dim_labels=([\w?]+->[\w?]+)", attributes)
        inputs = " x ".join(_dtype(shape) for shape in item.operands[:2])
        name = item.kind.rpartition("$")[2]
        layout = labels[1] if labels else "?"
        found[f"{name} {inputs} -> {_dtype(item.instruction.shape)}, {layout}"] += item.times
    return dict(found.most_common())


def _dtype(shape: str) -> str:
    """The number format of an array, or of a tuple's first."""
    match = re.search(r"[a-z]\w*", shape)
    return match[0] if match else "?"


def summary(hlo: str, images: int) -> dict[str, Any]:
    """What a program does, whose device is given so many images.

    kernels: instructions, less those that need no kernel: parameters, constants, tuples, their
    elements and bitcasts. bytes_an_image: operands and results of the same instructions, without
    the scratch memory of convolutions, by images. touched_an_image: the same, but of an operand of
    which a kernel reads only slices no more than these. convolutions: see there. copies:
    instructions that copy. kinds: kernels and bytes by kind (a sort launches more than the one
    kernel that is counted). largest: the twenty that move most.
    """
    items = executed(hlo)
    kernels: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for item in items:
        kernels[item.kind] += item.times
        moved[item.kind] += item.times * item.bytes
    largest = sorted(items, key=lambda item: -item.times * item.bytes)[:LARGEST]
    return {
        "kernels": kernels.total(),
        "bytes_an_image": moved.total() // images,
        "touched_an_image": sum(item.times * item.touched for item in items) // images,
        "convolutions": convolutions(items),
        "copies": kernels["copy"] + kernels["copy-start"],
        "kinds": {
            kind: {"kernels": kernels[kind], "bytes_an_image": total // images}
            for kind, total in moved.most_common()
        },
        "largest": [
            {
                "name": item.instruction.name,
                "kind": item.kind,
                "times": item.times,
                "bytes_an_image": item.times * item.bytes // images,
                "layer": item.layer,
            }
            for item in largest
        ],
    }

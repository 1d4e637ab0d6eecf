"""What a compiled program says of itself: loops, collectives and the TPU compiler's cycles."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s})\]])([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|bf16|c\d+|[fsu]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


class Shape(NamedTuple):
  """Of one array."""

  dtype: str
  sizes: tuple[int, ...]

  @property
  def elements(self) -> int:
    """How many numbers."""
    return math.prod(self.sizes)

  @property
  def bytes(self) -> int:
    """Without a layout's padding."""
    digits = re.match(r"[fsu](\d+)", self.dtype)
    bits = _BITS.get(self.dtype) or (int(digits[1]) if digits else 0)
    return self.elements * bits // 8


class Collective(NamedTuple):
  """One collective of a program."""

  kind: str
  shapes: tuple[Shape, ...]  # what it gives each device; of a reduce-scatter what it takes
  group: int  # devices that take part together; 0: all
  times: int  # how often a call of the program runs it
  known: bool  # False: in a loop of unknown length, and `times` counts one iteration of that

  @property
  def bytes(self) -> int:
    """Each time."""
    return sum(shape.bytes for shape in self.shapes)

  def sent(self, devices: int) -> float:
    """Bytes that a device sends each time, in a ring."""
    group = self.group or devices
    share = (group - 1) / group
    if self.kind in ("collective-permute", "collective-broadcast"):
      return self.bytes
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Instruction(NamedTuple):
  """A line of a computation."""

  name: str
  result: tuple[Shape, ...]
  operation: str
  text: str  # from the operation on


class Program(NamedTuple):
  """A module's computations, and how often each runs in a call."""

  computations: dict[str, list[Instruction]]
  times: dict[str, tuple[int, bool]]  # (iterations, whether they are known)


def parse(text: str) -> Program:
  """Read what `compiled.as_text()` gives."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      current = computations.setdefault(start[2], [])
      entry = start[2] if start[1] else entry
    elif (
      current is not None
      and (found := _INSTRUCTION.match(line))
      and (operation := _OPERATION.search(found[2]))
    ):
      at = operation.start(1)
      current.append(Instruction(found[1], shapes_in(found[2][:at]), operation[1], found[2][at:]))
  if not entry:
    raise ValueError("text: no ENTRY computation; expected the text of a compiled program.")
  return Program(computations, _times(computations, entry))


def shapes_in(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, in order.

  >>> shapes_in("(bf16[8,384]{1,0:T(8,128)}, u32[])")[0].bytes
  6144
  """
  sizes = lambda digits: tuple(int(size) for size in digits.split(",") if size)
  return tuple(Shape(dtype, sizes(digits)) for dtype, digits in _ARRAY.findall(text))


def trip_count(instruction: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
  """How often a `while` runs its body: the compiler's note, or the bound of its counter."""
  if noted := re.search(r"known_trip_count\D+(\d+)", instruction.text):
    return int(noted[1])
  condition = re.search(r"condition=%?([\w.\-]+)", instruction.text)
  lines = computations.get(condition[1], []) if condition else []
  constants = {
    line.name: found[1] for line in lines if (found := re.match(r"constant\((-?\d+)\)", line.text))
  }
  for line in lines:
    if line.operation == "compare" and "direction=LT" in line.text:
      operands = re.findall(r"%([\w.\-]+)", line.text.split(")")[0])
      if len(operands) == 2 and operands[1] in constants:
        return int(constants[operands[1]])
  return None


def collectives(program: Program) -> list[Collective]:
  """All that a call of the program runs.

  The TPU compiler splits one collective over several fusions that work beside it: instructions in
  fusions that have one channel are one collective.
  """
  found: dict[Any, Collective] = {}
  for name, (times, known) in program.times.items():
    for line in program.computations[name]:
      kind = line.operation.removesuffix("-start")
      if kind not in KINDS:
        continue
      shapes = line.result
      if line.operation.endswith("-start") and kind != "all-reduce":
        arrays = [shape for shape in shapes if shape.elements > 1] or list(shapes)
        shapes = tuple(arrays[len(arrays) // 2 :])  # operands first, then results
      group = group_size(line.text)
      if (
        kind == "all-reduce" and "reduce-scatter" in name
      ):  # a fusion that keeps a slice of the sum
        kind = "reduce-scatter"
      elif kind == "reduce-scatter":
        shapes = tuple(Shape(shape.dtype, (*shape.sizes, group)) for shape in shapes)
      channel = re.search(r"channel_id=(\d+)", line.text)
      key = (kind, channel[1]) if channel and "fus" in name else (name, line.name)
      if key not in found or found[key].times < times:
        found[key] = Collective(kind, shapes, group, times, known)
  return list(found.values())


def group_size(text: str) -> int:
  """Devices of one replica group; 0 where the instruction names none.

  >>> group_size("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}")
  4
  >>> group_size("replica_groups=[2,8]<=[16]")
  8
  >>> group_size("replica_groups=mesh['a'=2,'b'=8] {'b'}, channel_id=1")
  8
  """
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
    return int(found[2])
  if found := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}", text
  ):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", found[2]))
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return len(found[1].split(","))
  return 0


class Leaf(NamedTuple):
  """A param that is split over devices."""

  sizes: tuple[int, ...]
  share: tuple[int, ...]  # what a device has of it
  stacked: bool  # whether it has an axis of layers in front


def whole(program: Program, leaves: Sequence[Leaf]) -> list[str]:
  """Say what gives every device a whole stack of layers, or half of all params or more, at once.

  That is a collective, or a loop that gathers layer after layer and keeps them all. A stack that
  looks like a device's share of another one is passed over.
  """
  key = lambda sizes: tuple(
    sorted(size for size in sizes if size > 1)
  )  # a compiler transposes, and drops axes of 1
  grouped = lambda sizes: (
    key(sizes),
    key((2, *sizes)),
  )  # Fishers have an axis of two groups in front
  elements = {shape: math.prod(leaf.sizes) for leaf in leaves for shape in grouped(leaf.sizes)}
  stacks = {shape for leaf in leaves if leaf.stacked for shape in grouped(leaf.sizes)}
  stacks -= {shape for leaf in leaves for shape in grouped(leaf.share)}
  half = sum(math.prod(leaf.sizes) for leaf in leaves) / 2
  found = []
  for one in collectives(program):
    of_leaves = [shape for shape in one.shapes if key(shape.sizes) in elements]
    total = sum(elements[key(shape.sizes)] for shape in of_leaves)
    some = [shape for shape in of_leaves if key(shape.sizes) in stacks]
    if len(of_leaves) > 1 and total >= half:
      some = of_leaves
    if some and one.kind in ("all-gather", "all-reduce"):
      found.append(f"one {one.kind} makes {names(some)}")
  for name in program.times:
    for line in program.computations[name]:
      if line.operation == "while" and (
        some := [shape for shape in line.result if key(shape.sizes) in stacks]
      ):
        found.append(f"the loop {line.name} keeps {names(some)}")
  return found


def names(shapes: Sequence[Shape]) -> str:
  """The first three of some shapes, and how many more there are."""
  more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
  return ", ".join(f"{shape.dtype}{list(shape.sizes)}" for shape in shapes[:3]) + more


def estimated_cycles(program: Program) -> dict[str, int]:
  """Cycles that the TPU compiler expects of a call, by operation of the source.

  An operation is the last part of its path, and what it gives. Without collectives; loops of
  unknown length count once.
  """
  found: dict[str, int] = defaultdict(int)
  for name, (times, _) in program.times.items():
    for line in program.computations[name]:
      if cycles := re.search(r'"estimated_cycles":"(\d+)"', line.text):
        path = re.search(r'op_name="([^"]*)"', line.text)
        operation = "/".join(path[1].split("/")[-2:]) if path else line.operation
        found[f"{operation} {names(line.result)}"] += times * int(cycles[1])
  return dict(found)


def _times(computations: dict[str, list[Instruction]], entry: str) -> dict[str, tuple[int, bool]]:
  """How often each computation runs; of all that call it the one that does so most."""
  times: dict[str, tuple[int, bool]] = defaultdict(lambda: (0, True))
  waiting = [(entry, 1, True)]
  while waiting:
    name, count, known = waiting.pop()
    if name not in computations or (name in times and times[name][0] >= count):
      continue
    times[name] = (count, known)
    for line in computations[name]:
      if line.operation == "while":
        trips = trip_count(line, computations)
        for role in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line.text):
          waiting.append((role, count * (trips or 1), known and trips is not None))
        continue
      names = _CALLED.findall(line.text)
      for listed in _BRANCHES.findall(line.text):
        names += re.findall(r"[\w.\-]+", listed)
      waiting += [(called, count, known) for called in names]
  return dict(times)

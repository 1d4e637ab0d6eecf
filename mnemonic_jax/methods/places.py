"""Find where a model can be cut: the arrays that its kernels write into.

A kernel's result goes through operations that keep every channel to itself (bias, BatchNorm in
evaluation mode, casts, reshapes) and through additions, up to the first other operation. The array
that this operation takes is a site: a hidden layer's pre-activation, the sum of a residual block, a
residual stream. An edit of the kernels, of their biases or of BatchNorm's offset can apply any
linear map to what they have written there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax.fisher import plan
from mnemonic_jax.fisher.plan import Plan, Step


class Channels(NamedTuple):
  """The axes of one example's array, start to stop, that count the channels of a kernel."""

  start: int
  stop: int


# What an atom of one example's jaxpr is: the same for all examples, an example's own, a
# rearrangement of params, or what kernels have written.
Kind = Any  # str, plan.Params or Channels

UNCHANGED = frozenset(
  {"neg", "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint"}
  | {"copy", "copy_p"}
)
RESHAPING = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
ADDING = frozenset({"add", "add_any", "sub"})
SCALING = frozenset({"mul", "div"})


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
  """Where kernels write in one plan.

  Attributes:
    channels: of every variable that kernels write into.
    sites: variable -> its place in the order of the data, among those of this plan.
    kernels: of each site of this plan, the leaves of params that write into it.
    main: of each site, whether all that the model knows of its input goes through it.
    ends: the variables at which writing ends, sites or not.
    inner: id of an equation -> the places inside it.
    alone: the rearrangements of params of which no element is used in two operations.
    count: the number of sites, those inside included.
  """

  channels: dict[Any, Channels]
  sites: dict[Any, int]
  kernels: dict[Any, tuple[int, ...]]
  main: dict[Any, bool]
  ends: frozenset[Any]
  inner: dict[int, Inside]
  alone: frozenset[Any]
  count: int


class Inside(NamedTuple):
  """The places in the body of a step."""

  first: int  # its first site, among those of the plan around it
  iterations: int
  scanned: bool
  places: Places


class Known(NamedTuple):
  """What is known of one site before any array is."""

  leaves: tuple[int, ...]  # the kernels that write into it
  main: bool  # whether nothing bypasses it


def find(
  planned: Plan,
  without: frozenset[int] = frozenset(),
  *,
  inside: Collection[int] | None = None,
  main: bool = True,
) -> Places:
  """Find the sites of a plan.

  Args:
    planned: the plan of the function of one example.
    without: leaves of params, those of the head; what they write into is no site.
    inside: given if the plan is of the body of a scan or a remat, so that what it returns is a site
      too: those of its inputs of which no element is used twice.
    main: nothing bypasses that body.
  """
  mine = alone(planned, inside)
  all_kinds, _ = _kinds(planned, frozenset(), mine)
  consumers = _consumers(planned)
  returned = {var for var in planned.jaxpr.outvars if not isinstance(var, jex.Literal)}

  def is_site(var: Any) -> bool:
    used = consumers.get(var, [])
    if var in returned:
      return inside is not None
    goes_on = len(used) == 1 and isinstance(_result(used[0], all_kinds, mine), Channels)
    return bool(used) and not goes_on

  found = {var for var, kind in all_kinds.items() if isinstance(kind, Channels) and is_site(var)}
  left, writers = _kinds(planned, frozenset(found), mine)
  on_all_paths, steps_on_all = _main(planned)
  count, sites, inner = 0, {}, {}
  for index, step in enumerate(planned.steps or ()):
    if step.how in (plan.SCAN, plan.REMATERIALISED):
      atoms = enumerate(step.equation.invars)
      own = [i for i, a in atoms if not isinstance(a, jex.Literal) and a in mine]
      on_all = main and index in steps_on_all
      body = find(step.inner[0], without, inside=own, main=on_all)
      if body.count:
        inner[id(step.equation)] = Inside(count, _iterations(step), step.how == plan.SCAN, body)
        count += body.count * _iterations(step)
    for var in step.equation.outvars:
      if var in found and writers.get(var) and not set(writers[var]) & without:
        sites[var] = count
        count += 1
  return Places(
    channels={var: kind for var, kind in left.items() if isinstance(kind, Channels)},
    sites=sites,
    kernels={var: writers[var] for var in sites},
    main={var: main and var in on_all_paths for var in sites},
    ends=frozenset(found),
    inner=inner,
    alone=mine,
    count=count,
  )


def known(places: Places) -> Iterator[Known]:
  """What is known of each site, in the order of the data."""
  starts: list[tuple[int, Any]] = [(at, var) for var, at in places.sites.items()]
  starts += [(inside.first, inside) for inside in places.inner.values()]
  for _, what in sorted(starts, key=lambda start: start[0]):
    if not isinstance(what, Inside):
      yield Known(places.kernels[what], places.main[what])
      continue
    for _ in range(what.iterations):
      yield from known(what.places)


def _iterations(step: Step) -> int:
  return step.equation.params["length"] if step.how == plan.SCAN else 1


def written(step: Step) -> Channels | None:
  """Where the result of a contraction has its channels; None where kernels are mixed."""
  rule = step.rule
  if not rule.written or (rule.name == "product" and rule.groups > 1):
    return None
  return Channels(min(rule.written), max(rule.written) + 1)


def result(step: Step, kinds: Sequence[Kind]) -> Channels | None:
  """The channels of the result of an operation that leaves each of them to itself, or None."""
  equation = step.equation
  name, out = equation.primitive.name, equation.outvars[0].aval
  written = [kind for kind in kinds if isinstance(kind, Channels)]
  if not written:
    return None
  shapes = [tuple(atom.aval.shape) for atom in equation.invars]
  (first, *others), at = written, kinds.index(written[0])
  if name in UNCHANGED:
    return first if jnp.issubdtype(out.dtype, jnp.floating) else None
  if name in RESHAPING:
    return reshaped(shapes[0], first, tuple(out.shape))
  if name == "transpose":
    return _transposed(first, equation.params["permutation"])
  if name not in ADDING | SCALING or tuple(out.shape) != shapes[at]:
    return None
  if others:
    return first if name in ADDING and others == [first] and shapes[0] == shapes[1] else None
  if name in ADDING:
    return first
  other = 1 - at
  is_factor = kinds[other] not in ("data",) and not (name == "div" and at == 1)
  return first if is_factor and is_per_channel(shapes[other], first) else None


def is_per_channel(shape: Sequence[int], channels: Channels) -> bool:
  """Whether an array that broadcasts against another is the same at all its positions."""
  axes = range(channels.start, channels.stop)
  return not shape or all(size == 1 for axis, size in enumerate(shape) if axis not in axes)


def reshaped(old: Sequence[int], channels: Channels, new: Sequence[int]) -> Channels | None:
  """Where the channels are after a reshape; None where they are mixed with other axes."""
  before, width = math.prod(old[: channels.start]), math.prod(old[slice(*channels)])
  if math.prod(old) != math.prod(new) or width == 1:
    return None
  for start in range(len(new)):
    for stop in range(start + 1, len(new) + 1):
      same = math.prod(new[:start]) == before and math.prod(new[start:stop]) == width
      if same and new[start] > 1 and new[stop - 1] > 1:
        return Channels(start, stop)
  return None


def _transposed(channels: Channels, permutation: Sequence[int]) -> Channels | None:
  moved = [permutation.index(axis) for axis in range(*channels)]
  in_order = all(b == a + 1 for a, b in itertools.pairwise(moved))
  return Channels(moved[0], moved[-1] + 1) if in_order else None


def _result(step: Step, kinds: dict[Any, Kind], alone: frozenset[Any] | None) -> Kind:
  """What the results of an operation are; a kernel that is not `alone` cannot be edited."""
  read = lambda atom: "const" if isinstance(atom, jex.Literal) else kinds[atom]
  operands = [read(atom) for atom in step.equation.invars]
  if step.how == plan.CONTRACTED:
    kernel = step.equation.invars[step.rule.index]
    return "data" if alone is not None and kernel not in alone else written(step) or "data"
  if step.how in (plan.SCAN, plan.COND, plan.REMATERIALISED, plan.TIED):
    return "data"
  weights = [kind for kind in operands if isinstance(kind, plan.Params)]
  if weights and plan.gives_params(step.equation, operands):
    return plan.Params(frozenset().union(*(kind.indices for kind in weights)))
  if (channels := result(step, operands)) is not None:
    return channels
  return "data" if any(k == "data" or isinstance(k, Channels) for k in operands) else "const"


def kinds(planned: Plan) -> dict[Any, Kind]:
  """The kind of every variable."""
  return _kinds(planned, frozenset())[0]


def _kinds(
  planned: Plan, sites: frozenset[Any], alone: frozenset[Any] | None = None
) -> tuple[dict[Any, Kind], dict[Any, tuple[int, ...]]]:
  """The kind of every variable, and the leaves of params that have written into it.

  What has been looked at as a site goes on as data.
  """
  kinds: dict[Any, Kind] = dict.fromkeys(planned.jaxpr.constvars, "const")
  writers: dict[Any, tuple[int, ...]] = {}
  for index, (var, kind) in enumerate(zip(planned.jaxpr.invars, planned.inputs, strict=True)):
    kinds[var] = plan.Params(frozenset([index])) if isinstance(kind, plan.Params) else kind
  seen: dict[Any, Kind] = dict(kinds)  # what later operations see
  for step in planned.steps or ():
    kind = _result(step, seen, alone)
    for var in step.equation.outvars:
      kinds[var] = kind
      seen[var] = "data" if var in sites else kind
      if isinstance(kind, Channels):
        atoms = [atom for atom in step.equation.invars if not isinstance(atom, jex.Literal)]
        before = [writers[atom] for atom in atoms if isinstance(seen.get(atom), Channels)]
        own = [tuple(sorted(planned.leaves(step.params)))] if step.how == plan.CONTRACTED else []
        writers[var] = tuple(dict.fromkeys(leaf for leaves in before + own for leaf in leaves))
  return kinds, writers


def _consumers(planned: Plan) -> dict[Any, list[Step]]:
  found: dict[Any, list[Step]] = {}
  for step in planned.steps or ():
    for atom in step.equation.invars:
      if not isinstance(atom, jex.Literal):
        found.setdefault(atom, []).append(step)
  return found


def alone(planned: Plan, inputs: Collection[int] | None = None) -> frozenset[Any]:
  """The rearrangements of params of which no element is used in two operations.

  `inputs`: the inputs of the plan for which that is so outside; None: all.
  """
  found, consumers, known = set(), _consumers(planned), kinds(planned)

  def is_alone(var: Any) -> bool:
    used = [step.equation for step in consumers.get(var, [])]
    return len(used) <= 1 or plan.read_apart(used)

  for index, var in enumerate(planned.jaxpr.invars):
    here = isinstance(known[var], plan.Params) and (inputs is None or index in inputs)
    found |= {var} if here and is_alone(var) else set()
  for step in planned.steps or ():
    atoms = [atom for atom in step.equation.invars if not isinstance(atom, jex.Literal)]
    for var in step.equation.outvars:
      if isinstance(known[var], plan.Params) and found.issuperset(atoms) and is_alone(var):
        found.add(var)
  return frozenset(found)


def _main(planned: Plan) -> tuple[set[Any], set[int]]:
  """The variables, and the indices of steps, that every path from data to results goes through.

  A variable is on all paths if the paths through it are as many as there are.
  """
  jaxpr, steps = planned.jaxpr, planned.steps or ()
  atoms = lambda step: [a for a in step.equation.invars if not isinstance(a, jex.Literal)]
  to: dict[Any, int] = {
    var: int(kind == "data") for var, kind in zip(jaxpr.invars, planned.inputs, strict=True)
  }
  into = []
  for step in steps:
    into.append(sum(to.get(atom, 0) for atom in atoms(step)))
    to.update(dict.fromkeys(step.equation.outvars, into[-1]))
  results = [var for var in jaxpr.outvars if not isinstance(var, jex.Literal)]
  after: dict[Any, int] = {}
  for var in results:
    after[var] = after.get(var, 0) + 1
  out_of = [0] * len(steps)
  for index in reversed(range(len(steps))):
    out_of[index] = sum(after.get(var, 0) for var in steps[index].equation.outvars)
    for atom in atoms(steps[index]):
      after[atom] = after.get(atom, 0) + out_of[index]
  total = sum(to.get(var, 0) for var in results)
  on_all = {var for var, count in to.items() if count and count * after.get(var, 0) == total}
  return on_all, {i for i, _ in enumerate(steps) if into[i] and into[i] * out_of[i] == total}

"""Find the head of a model in its program, and drop the forgotten classes' rows of it.

The head is the contraction that makes the logits: one leaf of params that nothing else reads, then
only operations that cannot change which class is the largest, and a bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from mnemonic_jax.fisher import plan
from mnemonic_jax.fisher.jaxprs import bind
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.methods import places
from mnemonic_jax.methods.places import Channels

_LAST_PLACES = 8  # by how many a bias is less at least


class NoHead(ValueError):
  """Why the head of a model cannot be dropped."""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """A leaf of params with one entry, or one row, for each class."""

  leaf: int  # its index
  shape: tuple[int, ...]  # of the leaf
  steps: list[Any]  # the equations that rearrange it, first to last
  axis: int  # that counts classes, after them

  def arranged(self, leaf: jax.Array) -> jax.Array:
    """The leaf as the model uses it, float32."""
    leaf = leaf.astype(jnp.float32)
    for equation in self.steps:
      name = equation.primitive.name
      if name in places.SCALING:
        (factor,) = (atom.val for atom in equation.invars if isinstance(atom, jex.Literal))
        leaf = leaf * factor if name == "mul" else leaf / factor
      elif name == "neg":
        leaf = -leaf
      elif name not in places.UNCHANGED:
        (leaf,) = bind(equation)(leaf)
    return leaf

  def put(self, leaf: jax.Array, classes: jax.Array, entry: jax.Array) -> jax.Array:
    """The leaf with `entry` (one slice of the arranged leaf) for each of `classes` (C,) bool."""
    arranged = jax.eval_shape(self.arranged, jax.ShapeDtypeStruct(self.shape, jnp.float32))
    along = [1] * len(arranged.shape)
    along[self.axis] = -1
    chosen = jnp.broadcast_to(classes.reshape(along), arranged.shape)
    values = self.restored(jnp.where(chosen, entry, 0))
    return jnp.where(self.restored(chosen) != 0, values.astype(leaf.dtype), leaf)

  def restored(self, arranged: jax.Array) -> jax.Array:
    """The inverse of `arranged`, float32."""
    wide = jax.ShapeDtypeStruct(self.shape, jnp.float32)
    back = jax.linear_transpose(self.arranged, wide)(arranged.astype(jnp.float32))[0]
    # `arranged` is a permutation times a number c, so its transpose is its inverse times c^2.
    scale = self.arranged(jnp.ones(self.shape, jnp.float32)).reshape(-1)[0]
    return back / scale**2

  def mean(self, leaf: jax.Array, classes: jax.Array) -> jax.Array:
    """The mean of the arranged leaf over classes (C,) bool; the axis of classes has size 1."""
    share = classes.astype(jnp.float32) / jnp.maximum(classes.sum(dtype=jnp.float32), 1)
    arranged = self.arranged(leaf)
    mean = jnp.tensordot(share, arranged, (0, self.axis), precision=jax.lax.Precision.HIGHEST)
    return jnp.expand_dims(mean, self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
  """The head of a model in the plan of one example."""

  kernel: Row
  bias: Row | None
  step: Step  # the contraction

  def dropped(
    self, leaves: Sequence[jax.Array], forget: jax.Array, remain: jax.Array
  ) -> dict[int, jax.Array]:
    """The new kernel and bias, by the index of their leaf.

        w_f <- mean of the kept rows        b_f <- mean of the kept biases - 1

    for every class f that is not kept, those forgotten earlier too. Without a class to forget, or
    one to keep, nothing changes. Where biases are so large that their dtype would lose the 1, it is
    eight of its last places.

    Guarantees:
      With a bias, a forgotten class's score is the mean kept score less one (times the factor that
      follows), so it is never the largest, and the kept classes keep their order.
    """
    gone = ~remain & jnp.any(forget) & jnp.any(remain)
    kernel = leaves[self.kernel.leaf]
    new = {self.kernel.leaf: self.kernel.put(kernel, gone, self.kernel.mean(kernel, remain))}
    if self.bias is not None:
      bias = leaves[self.bias.leaf]
      last_place = float(jnp.finfo(bias.dtype).eps) * jnp.max(jnp.abs(bias)).astype(jnp.float32)
      less = jnp.maximum(1, _LAST_PLACES * last_place)
      new[self.bias.leaf] = self.bias.put(bias, gone, self.bias.mean(bias, remain) - less)
    return new


def find(planned: Plan) -> Head:
  """Find the head by following the logits back.

  Raises:
    NoHead: there is none that can be dropped; the message says why.
  """
  made = {var: step for step in planned.steps or () for var in step.equation.outvars}
  kinds, alone = places.kinds(planned), places.alone(planned)
  (var,) = planned.jaxpr.outvars
  axis, biases = len(var.aval.shape) - 1, []
  while (step := made.get(var)) is not None and step.how != plan.CONTRACTED:
    var, axis, bias = _before(step, axis, kinds, planned)
    biases += [(bias, axis)] if bias is not None else []
  if step is None:
    raise NoHead("the logits do not come from a kernel")
  channels = places.written(step)
  if channels is None or not channels.start <= axis < channels.stop:
    raise NoHead("several kernels make the logits in one operation")
  if len(biases) > 1:
    raise NoHead("it has several biases")
  rule = step.rule
  classes = rule.leaf_axes[1][axis - channels.start]
  kernel = row(step.equation.invars[rule.index], classes, made, planned, alone)
  return Head(kernel, row(*biases[0], made, planned, alone) if biases else None, step)


def row(var: Any, axis: int, made: dict[Any, Step], planned: Plan, alone: frozenset[Any]) -> Row:
  """Follow an operand back to its leaf."""
  steps, operand = [], var
  while (step := made.get(var)) is not None:
    atoms = [atom for atom in step.equation.invars if not isinstance(atom, jex.Literal)]
    if len(atoms) != 1 or step.equation.primitive.name in plan.IN_PARTS:
      raise NoHead("its kernel or bias is made of parts of leaves")
    steps.append(step.equation)
    (var,) = atoms
  index = list(planned.jaxpr.invars).index(var)
  if operand not in alone:
    raise NoHead("its kernel or bias is used elsewhere too")
  return Row(index, tuple(var.aval.shape), steps[::-1], axis)


def _before(
  step: Step, axis: int, kinds: dict[Any, places.Kind], planned: Plan
) -> tuple[Any, int, Any]:
  """Go back over one operation that keeps the order of the classes; the bias that it adds."""
  equation, name = step.equation, step.equation.primitive.name
  atoms, shape = equation.invars, equation.outvars[0].aval.shape
  kind = lambda atom: "const" if isinstance(atom, jex.Literal) else kinds[atom]
  data = [i for i, a in enumerate(atoms) if kind(a) == "data" or isinstance(kind(a), Channels)]
  floating = all(
    jnp.issubdtype(x.aval.dtype, jnp.floating) for x in (atoms[0], equation.outvars[0])
  )
  if name in places.UNCHANGED - {"neg"} and floating:
    return atoms[0], axis, None
  if name in places.RESHAPING or name == "transpose":
    back = _axis_before(equation, axis)
    if back is not None:
      return atoms[0], back, None
  if name == "reduce_sum":
    before = [i for i in range(len(atoms[0].aval.shape)) if i not in equation.params["axes"]]
    return atoms[0], before[axis], None
  if name in places.SCALING and len(data) == 1 and not (name == "div" and data == [1]):
    factor = _constant(atoms[1 - data[0]], planned)
    if factor is not None and factor.size == 1 and float(factor.reshape(())) > 0:
      return atoms[data[0]], axis, None
  if name in places.ADDING:
    wide = [i for i in data if atoms[i].aval.shape == shape and _varies(atoms[i], axis)]
    same = [i for i in data if not _varies(atoms[i], axis)]
    if len(data) == 2 and len(wide) == 1 and len(same) == 1 and not (name == "sub" and wide == [1]):
      return atoms[wide[0]], axis, None
    if data == [0] or (data == [1] and name != "sub"):
      bias = atoms[1 - data[0]]
      if not _varies(bias, axis):
        return atoms[data[0]], axis, None
      if name != "sub" and isinstance(kind(bias), plan.Params):
        return atoms[data[0]], axis, bias
      raise NoHead("its bias is no leaf of params that may change")
  raise NoHead(f"the logits go through {name}, which may change the order of the classes")


def _varies(atom: Any, axis: int) -> bool:
  """Whether an operand may differ between classes."""
  shape = atom.aval.shape
  return bool(shape) and shape[axis] != 1


def _axis_before(equation: Any, axis: int) -> int | None:
  """The class axis of the operand of a reshape or transpose."""
  old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  if equation.primitive.name == "transpose":
    return int(equation.params["permutation"][axis])
  found = places.reshaped(new, Channels(axis, axis + 1), old)
  return found.start if found and found.stop == found.start + 1 else None


def _constant(atom: Any, planned: Plan) -> np.ndarray | None:
  """The value of a literal, or of a constant of the program."""
  if isinstance(atom, jex.Literal):
    return np.asarray(atom.val)
  values = dict(zip(planned.jaxpr.constvars, planned.consts, strict=True))
  value = values.get(atom)
  return None if value is None or isinstance(value, jax.core.Tracer) else np.asarray(value)

"""A leaf that several contractions use: its gradients of all uses are added up, then squared.

The data and cotangents of all uses must meet in one place of the backward pass. That is the first
use, whose turn comes last there. It returns zeros beside its result, the carriers, of the shapes of
the data and results of the later uses. Each of these takes its own carrier, and on the way back
makes its data and its cotangent that of the carrier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax import _mesh, _trees
from mnemonic_jax.fisher import sums
from mnemonic_jax.fisher.jaxprs import bind
from mnemonic_jax.fisher.rules import Contractor
from mnemonic_jax.fisher.sums import Groups

# Row numbers below this are float32 numbers, as they are carried.
_MOST_ROWS = 2**24


class Contracting(NamedTuple):
  """One use of the leaf."""

  equation: Any
  rule: Contractor

  @property
  def is_carried(self) -> bool:
    """Whether floating numbers can carry its data, of which there are some."""
    data = self.equation.invars[self.rule.data_index].aval
    atoms = (*self.equation.invars, *self.equation.outvars)
    floating = bool(jnp.issubdtype(data.dtype, jnp.floating))
    small = self.rule.name == "lookup" and self.rule.shape[0] < _MOST_ROWS
    return (floating or small) and all(math.prod(atom.aval.shape) for atom in atoms)

  def carrier(self, groups: Groups, like: Any) -> tuple[jax.Array, jax.Array]:
    """Zeros shaped like the data (N, ...) and the result (N, ...)."""
    num, out = groups.weights.shape[1], self.equation.outvars[0].aval
    batched = lambda aval: jax.ShapeDtypeStruct((num, *aval.shape), aval.dtype)
    data = jax.eval_shape(
      self.rule.data_of, batched(self.equation.invars[self.rule.data_index].aval)
    )
    zeros = [_mesh.zeros(x.shape, _carried(x.dtype), like) for x in (data, batched(out))]
    return tuple(  # type: ignore[return-value]
      groups.spread.examples(x) if groups.spread else x for x in zeros
    )


def _carried(dtype: Any) -> Any:
  return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


@dataclasses.dataclass(frozen=True, eq=False)
class Tie:
  """The equations that a leaf is in: those that rearrange or scale it, and its uses, in order."""

  leaf: Any  # its variable
  rearranging: Sequence[Any]
  uses: Sequence[Contracting]

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the leaf."""
    return tuple(self.leaf.aval.shape)

  @property
  def held(self) -> int:
    """Numbers held at a time, whatever the microbatch: the gradient of each use, and the sum."""
    return (1 + len(self.uses)) * math.prod(self.shape)

  def operands(self, leaf: jax.Array) -> list[jax.Array]:
    """What each use makes of the leaf, in whatever dtype that is."""
    env = {self.leaf: leaf}
    for equation in self.rearranging:
      (x,) = (env[atom] for atom in equation.invars if not isinstance(atom, jex.Literal))
      env.update(zip(equation.outvars, _linear(equation, x), strict=True))
    return [env[use.equation.invars[use.rule.index]] for use in self.uses]

  def gradients(self, data: Any, g: jax.Array) -> jax.Array:
    """(of the first use and of later ones) -> (n, *shape), the gradient of each example."""
    first, later = data
    wide = _trees.at_least_float32(g.dtype)
    as_wide = lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x
    pairs = zip(self.uses, [(first, g), *later], strict=True)
    made = [as_wide(use.rule.gradients(as_wide(data), as_wide(g))) for use, (data, g) in pairs]
    _, pull_back = jax.vjp(self.operands, _mesh.zeros(self.shape, wide, made))
    return jax.vmap(lambda *each: pull_back(list(each))[0])(*made)

  def contract(
    self, fixed: bool, data: Any, g: jax.Array, groups: Groups
  ) -> tuple[jax.Array, jax.Array]:
    """Sums (G, *shape), and their unit; each example's uses are brought to one scale."""
    pairs, unit = [(data[0], g), *data[1]], jnp.zeros((), jnp.int32)
    if not fixed:
      brought = [sums.brought(*pair) for pair in pairs]
      largest = jnp.max(jnp.stack([unit for *_, unit in brought]), axis=0)
      pairs = [(data, sums.shrunk(g, unit - largest)) for data, g, unit in brought]
      groups, unit = sums.weighed_in(groups, largest)
    (first, g), *later = pairs
    bytes_each = self.held * groups.weights.dtype.itemsize
    total = sums.accumulate(self.gradients, (first, later), g, groups, self.shape, bytes_each)
    return total, unit


def _linear(equation: Any, x: jax.Array) -> list[jax.Array]:
  name = equation.primitive.name
  if name in ("mul", "div"):
    (factor,) = (float(atom.val) for atom in equation.invars if isinstance(atom, jex.Literal))
    return [x * factor if name == "mul" else x / factor]
  if name == "neg":
    return [-x]
  if x.shape == equation.outvars[0].aval.shape and name not in ("transpose", "rev"):
    return [x]  # a cast, or a placement
  return bind(equation)(x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def first(
  tie: Tie,
  contract: Any,
  output: jax.Array,
  data: jax.Array,
  squares: Any,
  unit: Any,
  groups: Groups,
) -> tuple[jax.Array, list[Any]]:
  """Return `output` of the first use, and a carrier for each later one."""
  return output, [use.carrier(groups, squares) for use in tie.uses[1:]]


def _first_forward(
  tie: Tie, contract: Any, output: Any, data: Any, squares: Any, unit: Any, groups: Groups
) -> tuple[Any, Any]:
  outputs = output, [use.carrier(groups, squares) for use in tie.uses[1:]]
  groups = dataclasses.replace(groups, weights=groups.weights.astype(squares.dtype))
  return outputs, (data, groups, jnp.shape(unit))


def _first_backward(tie: Tie, contract: Any, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
  data, groups, shape = residuals
  g, carried = cotangents
  rows = lambda use, x: x.astype(jnp.int32) if use.rule.name == "lookup" else x
  pairs = zip(tie.uses[1:], carried, strict=True)
  later = [(rows(use, data), g) for use, (data, g) in pairs]
  total, unit = contract((data, later), g, groups)
  return g, None, total, sums.as_cotangent(unit, shape, g), None


first.defvjp(_first_forward, _first_backward)


@jax.custom_vjp
def later(output: jax.Array, data: jax.Array, carrier: Any) -> jax.Array:
  """Return `output` of a later use; on the way back the carrier gets its data and cotangent."""
  return output


def _later_forward(output: jax.Array, data: jax.Array, carrier: Any) -> tuple[jax.Array, Any]:
  return output, data


def _later_backward(data: jax.Array, g: jax.Array) -> tuple[Any, ...]:
  carried = _mesh.varying(data.astype(_carried(data.dtype)), _mesh.varying_axes(g))
  return g, None, (carried, g)


later.defvjp(_later_forward, _later_backward)

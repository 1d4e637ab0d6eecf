"""The features of each example at every stage of any model, averaged over positions.

Without a function that gives them they are the arrays at the sites of `Projection`, and what the
head reads: all found in the traced program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax import _trees
from mnemonic_jax._functions import Static
from mnemonic_jax.fisher import plan, sites, sums
from mnemonic_jax.fisher.evaluate import Data, Engine, on_batch
from mnemonic_jax.fisher.plan import Step
from mnemonic_jax.learning import reads
from mnemonic_jax.methods import network
from mnemonic_jax.methods.network import Network
from mnemonic_jax.methods.places import Channels, Inside, Places
from mnemonic_jax.methods.problem import plan_of_logits

PyTree = Any
HEAD_INPUT = "head input"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stages:
  """Features by stage, in the order of the data; names are static, so that `jit` returns them."""

  names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
  arrays: tuple[jax.Array, ...]  # (N, F) each


def of_function(static: Static, arrays: Any, params: PyTree, inputs: jax.Array) -> Stages:
  """The features that a function (params, inputs) -> {name: (N, ..., F)} gives.

  >>> static = Static(lambda params, x: {"pixels": x})
  >>> of_function(static, [], None, jnp.ones((2, 3, 3, 1))).arrays[0].shape
  (2, 1)
  """
  named = static(arrays)(params, inputs)
  found = reads.averaged(named, len(inputs))
  return Stages(tuple(named), tuple(found))


def of_program(static: Static, arrays: Any, params: PyTree, inputs: jax.Array) -> Stages:
  """The arrays at the sites of the program of a logits function, and what its head reads.

  >>> model = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["output"]
  >>> params = {"hidden": jnp.ones((4, 3)), "output": jnp.ones((3, 2))}
  >>> of_program(Static(model), [], params, jnp.ones((5, 4))).names
  ('hidden', 'head input')
  """
  model = look(static, arrays, params, inputs)
  walk = _Walk(model.places, model.reader, len(inputs))
  leaves = jax.tree.leaves((params, arrays))
  walk.evaluate(model.planned, [*leaves, Data(jnp.expand_dims(inputs, 1)), _labels(inputs)])
  names, found = [site.name for site in model.sites], walk.in_order()
  if walk.read is not None:
    names, found = [*names, HEAD_INPUT], [*found, walk.read]
  return Stages(tuple(names), tuple(found))


def look(static: Static, arrays: Any, params: PyTree, inputs: Any) -> Network:
  """Find sites and head of a logits function; nothing is computed, and inputs may be abstract."""
  mask = _trees.mask_leaves(None, params)
  return network.of_plan(plan_of_logits(static, arrays, params, inputs, mask), params)


def _labels(inputs: jax.Array) -> Data:
  return Data(jnp.zeros((len(inputs), 1), jnp.int32))


class _Walk(Engine):
  """Follows the plan of one example on all of them, with params as plain arrays.

  It keeps what stands at sites, each (N, F).
  """

  def __init__(self, found: Places, reader: Step | None, count: int) -> None:
    super().__init__(sums.Groups(jnp.zeros((1, count))))
    self.places, self.reader = found, reader
    self.found: dict[int, list[jax.Array]] = {}  # from a place on
    self.read: jax.Array | None = None

  def in_order(self) -> list[jax.Array]:
    """What was kept, in the order of the sites."""
    return [array for at in sorted(self.found) for array in self.found[at]]

  def tracks(self, step: Step, env: Any) -> bool:
    """Operations that make a site are followed one by one."""
    return any(var in self.places.sites for var in step.equation.outvars)

  def copied(self, param: Any) -> Any:
    """A param is a plain array, whatever it is used for."""
    return param

  def tie(self, tie: Any, param: Any) -> Any:
    """One that is read at several places too."""
    return _Plain()

  def follow(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one equation, and keep its result where that is a site."""
    if self.reader is not None and step.equation is self.reader.equation and step.rule.read:
      data = args[step.rule.data_index].value
      self.read = sites.mean_over_positions(data, step.rule.read)
    inside = self.places.inner.get(id(step.equation))
    outs = on_batch(run, args) if inside is None else self._inside(step, inside, args)
    for var, out in zip(step.equation.outvars, outs, strict=True):
      if var in self.places.sites:
        self.found[self.places.sites[var]] = [_means(out.value, self.places.channels[var])]
    return outs

  def _inside(self, step: Step, inside: Inside, args: list[Any]) -> list[Any]:
    """Follow the body of a scan or a remat, which holds sites of its own."""
    walk = _Walk(inside.places, None, self.groups.weights.shape[1])
    if step.how == plan.SCAN:
      outs = walk.scan(step, None, args)
      length, backward = step.equation.params["length"], step.equation.params["reverse"]
      order = reversed(range(length)) if backward else range(length)
      self.found[inside.first] = [array[i] for i in order for array in walk.stacked]
      return outs
    outs = list(map(Data, walk.evaluate_all(step.inner[0], *args)))
    self.found[inside.first] = walk.in_order()
    return outs

  def harvest(self) -> Any:
    """What an iteration of a scan has kept."""
    found = self.in_order()
    self.found = {}
    return found

  def keep(self, found: Any) -> None:
    """All iterations' arrays, with a first axis of iterations."""
    self.stacked: list[jax.Array] = found


class _Plain:
  def use(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one of the uses of a tied param."""
    return on_batch(run, args)


def _means(x: jax.Array, channels: Channels) -> jax.Array:
  """(N, *shape) -> (N, F), averaged over positions."""
  return sites.mean_over_positions(x, range(*channels))

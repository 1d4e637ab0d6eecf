"""Which params a model uses behind a site: those that may change without changing what comes first.

"Behind" is meant in the order of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core as jex

from mnemonic_jax.fisher import plan
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.methods.places import Inside, Places

_REARRANGED = (plan.SAME, plan.REARRANGED, plan.SCALED)


def sites_before(planned: Plan, places: Places) -> dict[int, np.ndarray]:
  """For each input of a plan that is used: how many sites come before its first use.

  An array () int; or (layers,), for each slice of a leaf that is scanned along its first axis.
  """
  found: dict[int, np.ndarray] = {}
  inputs = {var: frozenset([index]) for index, var in enumerate(planned.jaxpr.invars)}
  count = 0
  for step in planned.steps or ():
    used = [inputs.get(a, frozenset()) for a in map(_variable, step.equation.invars)]
    if step.how in _REARRANGED:
      inputs.update(dict.fromkeys(step.equation.outvars, frozenset().union(*used)))
      continue
    inside = places.inner.get(id(step.equation))
    for position, indices in enumerate(used):
      for index in indices if inside is None else ():
        _note(found, index, np.asarray(count))
    if inside is not None:
      for position, first in _inside(step, inside):
        for index in used[position]:
          _note(found, index, first)
      count += inside.places.count * inside.iterations
    count += sum(var in places.sites for var in step.equation.outvars)
  return found


def _inside(step: Step, inside: Inside) -> Iterator[tuple[int, np.ndarray]]:
  """The same for the operands of a step, from the uses inside it."""
  (body,) = step.inner
  for position, first in sites_before(body, inside.places).items():
    if not inside.scanned:
      yield position, inside.first + first
      continue
    params, kind = step.equation.params, body.inputs[position]
    each = inside.first + inside.places.count * np.arange(inside.iterations) + first.min()
    each = each[::-1] if params["reverse"] else each
    own = step.kinds[position]
    is_slice = position >= params["num_consts"] + params["num_carry"]
    apart = is_slice and isinstance(kind, plan.Params) and isinstance(own, plan.Params)
    yield position, each if apart and own.whole else each.min()


def _note(found: dict[int, np.ndarray], index: int, first: Any) -> None:
  found[index] = np.minimum(found[index], first) if index in found else np.asarray(first)


def _variable(atom: Any) -> Any:
  return None if isinstance(atom, jex.Literal) else atom

"""Dampen the weights that matter to the forgotten classes more than to the kept ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.methods import search
from mnemonic_jax.methods.perturbation import amplitude
from mnemonic_jax.methods.problem import Problem
from mnemonic_jax.methods.protocol import Info, method

PyTree = Any

# Tried by a search, the weakest first: how many of a million weights lie above the quantile.
_SHARES = (100, 300, 1_000, 3_000, 10_000, 20_000, 50_000, 100_000, 200_000, 300_000, 500_000)


@method
@dataclasses.dataclass(frozen=True)
class Dampening:
  """Shrink the weights whose Fisher is large for a forgotten class beside the kept ones.

      eta_c = F_c / F_kept        t_c = quantile of eta_c over all weights that may move
      w <- w min over the forgotten classes c of min(t_c / eta_c, 1)

  Edge cases:
    eta_c = 0 (see `amplitude`): the weight stays.
    without a class to forget, or to keep: nothing changes.

  Attributes:
    quantile: in (0, 1); the share of the weights that one class leaves alone. None: searched by
      judges.

  Raises:
    TypeError, ValueError: not a number in (0, 1).

  >>> Dampening(quantile=0.99)
  Dampening(quantile=0.99)

  Source: this project, after selective synaptic dampening (Foster, Schoepf, Brintrup, 2024), which
  needs the training data.
  """

  quantile: Any = None

  def __post_init__(self) -> None:
    if self.quantile is not None and _checks.is_concrete(self.quantile):
      _checks.require_finite_number("quantile", self.quantile)
      if not 0 < float(self.quantile) < 1:
        raise ValueError(f"quantile: got {self.quantile}; expected a number in (0, 1).")

  @property
  def to_search(self) -> tuple[str, ...]:
    """The settings that a search chooses."""
    return ("quantile",) if self.quantile is None else ()

  def step(self, problem: Problem) -> tuple[PyTree, Info]:
    """Forget; `info` holds the "method" and the predicted "curve" of a search."""
    if self.quantile is None:
      search.require_judges(problem, "quantile")
    classes, ratios = self._ratios(problem)
    dampened = lambda quantile: _dampened(problem.params, ratios, classes, quantile)
    if self.quantile is not None:
      return dampened(self.quantile), {}
    quantiles = 1 - np.asarray(_SHARES, np.float32) / 1e6
    index, curve = search.best(problem, "quantile", quantiles, dampened, _SHARES)
    found = Dampening(float(quantiles[index]))
    return dampened(found.quantile), {"method": found, **curve}

  def _ratios(self, problem: Problem) -> tuple[jax.Array, PyTree]:
    """Which classes count, (G,), and their eta, every leaf (G, *shape)."""
    some = problem.forget & jnp.any(problem.remain)
    classes = np.eye(problem.request.num_classes, dtype=bool)
    if _checks.is_concrete(problem.forget):
      chosen = np.flatnonzero(np.asarray(problem.forget))
      classes, some = classes[chosen], some[chosen]
    groups = jnp.concatenate([jnp.asarray(classes), problem.remain[None]])
    return some, _ratios(problem.fishers(groups))


@jax.jit
def _ratios(fishers: PyTree) -> PyTree:
  of_class = lambda f: jax.tree.map(lambda x: x[:-1], f)
  kept = jax.tree.map(lambda x: jnp.broadcast_to(x[-1:], x[:-1].shape), fishers)
  return amplitude(of_class(fishers), kept, layer_axis=0 if jax.tree.leaves(fishers) else None)


@jax.jit
def _dampened(params: PyTree, ratios: PyTree, classes: jax.Array, quantile: Any) -> PyTree:
  flat = jnp.concatenate([x.reshape(len(classes), -1) for x in jax.tree.leaves(ratios)], axis=1)
  limits = jnp.quantile(flat, quantile, axis=1)

  def factor(eta: jax.Array) -> jax.Array:
    along = (-1, *(1,) * (eta.ndim - 1))
    ratio = limits.reshape(along) / jnp.where(eta > 0, eta, 1)
    ratio = jnp.where((eta > 0) & classes.reshape(along), jnp.minimum(ratio, 1), 1)
    return ratio.min(0)

  leaves, treedef = _trees.flatten(params)
  new = [
    leaf if eta is None else (leaf * factor(eta)).astype(leaf.dtype)
    for leaf, eta in zip(leaves, _trees.require_like("eta", ratios, "params", params), strict=True)
  ]
  return treedef.unflatten(new)

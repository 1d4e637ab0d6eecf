"""The cut of an array: which directions the forgotten classes go, and what to take out of them.

P = 1 - D W        moves a forgotten class's mean to the mean of the kept ones
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_TIE = 0.1  # times the largest singular value: how far W may grow to keep the kept means
_SMALLEST = 1e-5  # eigenvalues of R D below this part of the largest count as 0
_ROUNDING = 2e-6  # times the largest entry of B: a class's mean is the kept one
_HIGHEST = jax.lax.Precision.HIGHEST


class Cut(NamedTuple):
  """The cut of an array of G groups of F channels."""

  directions: jax.Array  # D, (G, F, C); columns of classes that are not forgotten are 0
  weights: jax.Array  # W, (G, C, F); rows of classes that are not forgotten are 0
  rank: jax.Array  # (G,) int32, of D

  def taken(self, x: jax.Array) -> jax.Array:
    """D W x, of x (..., G * F)."""
    return _through(x, self.weights, jnp.swapaxes(self.directions, 1, 2))

  def taken_back(self, x: jax.Array) -> jax.Array:
    """(D W)^T x, of x (..., G * F)."""
    return _through(x, jnp.swapaxes(self.directions, 1, 2), self.weights)


def _through(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
  """second^T first x for each group; both are (G, C, F)."""
  parts = x.reshape(*x.shape[:-1], first.shape[0], first.shape[2])
  share = jnp.einsum("...gf,gcf->...gc", parts, first, precision=_HIGHEST)
  return jnp.einsum("...gc,gcf->...gf", share, second, precision=_HIGHEST).reshape(x.shape)


def cut(means: jax.Array, forget: jax.Array, remain: jax.Array, groups: int = 1) -> Cut:
  """Make the cut that moves the forgotten classes' means and leaves the kept ones where they are.

      mu = mean of M over the kept classes
      B[:, c] = M_c - mu if forgotten, M_c if kept, else 0        D = B, forgotten columns alone
      R = (B^T B + (0.1 s)^2)^-1 B^T, forgotten rows alone        s^2 = largest eigenvalue of B^T B
      W = pinv(R D) R

  W minimises ||W M_kept||^2 + (0.1 s)^2 ||W||^2 under D W D = D.

  Guarantees:
    D W D = D, also where columns of D are equal or dependent. Traceable in all arguments.

  Edge cases:
    no forgotten class, no kept one, or D = 0 (up to rounding): D and W are 0.
    a group whose D has rank F: nothing would be left of it, so its D and W are 0; `rank` says so.

  Args:
    means: M (C, G * F), the mean array of each class.
    forget, remain: (C,) bool; a class of neither side has no say.
    groups: G, that no map may mix: each is cut by itself.

  Source: this project. DAMP (Hatami, Aalishah, Monosov, 2026, arXiv 2604.15166) projects
  orthogonally, with prototypes of real data.
  """
  kept, gone = remain.astype(jnp.float32), (forget & jnp.any(remain)).astype(jnp.float32)
  parts = means.astype(jnp.float32).reshape(len(means), groups, -1)
  return jax.vmap(_cut_of_group, (1, None, None))(parts, gone, kept)


def _cut_of_group(means: jax.Array, gone: jax.Array, kept: jax.Array) -> Cut:
  num_classes, width = means.shape
  mu = (kept @ means) / jnp.maximum(kept.sum(), 1)
  columns = gone[:, None] * (means - mu) + kept[:, None] * means  # B^T
  largest = jnp.max(jnp.abs(columns))
  unit = jnp.where(largest > 0, largest, 1)
  columns = columns / unit
  gone = gone * (jnp.max(jnp.abs(gone[:, None] * columns), axis=1) > _ROUNDING)
  columns = jnp.where((gone + kept > 0)[:, None], columns, 0)
  directions = gone[:, None] * columns  # D^T
  product = lambda a, b: jnp.matmul(a, b, precision=_HIGHEST)
  gram = product(columns, columns.T)
  tie = _TIE**2 * jnp.linalg.eigvalsh(gram)[-1] + jnp.finfo(gram.dtype).tiny
  ridge = gone[:, None] * jnp.linalg.solve(gram + tie * jnp.eye(num_classes), columns)
  values, vectors = jnp.linalg.eigh(_symmetric(product(ridge, directions.T)))
  counts = values > _SMALLEST * values[-1]
  inverse = jnp.where(counts, 1 / jnp.where(counts, values, 1), 0)
  weights = product(vectors * inverse, product(vectors.T, ridge))
  rank = counts.sum(dtype=jnp.int32)
  whole = rank < width
  return Cut(jnp.where(whole, directions.T * unit, 0), jnp.where(whole, weights / unit, 0), rank)


def _symmetric(x: jax.Array) -> jax.Array:
  return (x + x.T) / 2

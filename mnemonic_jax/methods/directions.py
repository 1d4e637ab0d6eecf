"""The cut of an array: which directions the forgotten classes go, and what to take out of them.

P = 1 - D W        moves a forgotten class's mean to the mean of the kept ones
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_TIE = 0.1  # times the largest singular value: how far W may grow to keep the kept codes
_SMALLEST = 1e-5  # eigenvalues of R D below this part of the largest count as 0
_ROUNDING = 2e-6  # times the largest entry of B: a class's mean is the kept one
_HIGHEST = jax.lax.Precision.HIGHEST


class Weights(NamedTuple):
  """What each vector counts for; not negative."""

  mean: jax.Array  # (C, N), in the mean of a class
  spread: jax.Array  # (C, N), among those that show how a class spreads


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


def cut(
  vectors: jax.Array, weights: Weights, forget: jax.Array, remain: jax.Array, groups: int = 1
) -> Cut:
  """Make the cut that moves the forgotten classes' means and leaves the kept vectors alone.

      M_c = sum_n mean[c, n] z_n        mu = mean of M over the kept classes
      D[:, c] = M_c - mu if c is forgotten, else 0
      Z[:, n] = sqrt(sum of spread[c, n] over the kept classes) z_n        B = [D, Z]
      R = D^T (B B^T + (0.1 s)^2)^-1        s^2 = largest eigenvalue of B B^T
      W = pinv(R D) R

  W minimises ||W Z||^2 + (0.1 s)^2 ||W||^2 under D W D = D. Where Z shows how the kept classes
  spread, not their means alone, less of them is lost.

  Guarantees:
    D W D = D, also where columns of D are equal or dependent. Traceable in all arguments.

  Edge cases:
    no forgotten class, no kept one, or D = 0 (up to rounding): D and W are 0.
    a group whose D has rank F: nothing would be left of it, so its D and W are 0; `rank` says so.

  Args:
    vectors: z (N, G * F), the array of each code and judge.
    weights: what each counts for.
    forget, remain: (C,) bool; a class of neither side has no say.
    groups: G, that no map may mix: each is cut by itself.

  Source: this project. DAMP (Hatami, Aalishah, Monosov, 2026, arXiv 2604.15166) projects
  orthogonally, with prototypes of real data.
  """
  kept, gone = remain.astype(jnp.float32), (forget & jnp.any(remain)).astype(jnp.float32)
  parts = vectors.astype(jnp.float32).reshape(len(vectors), groups, -1)
  return jax.vmap(_cut_of_group, (1, None, None, None))(parts, weights, gone, kept)


def _cut_of_group(vectors: jax.Array, weights: Weights, gone: jax.Array, kept: jax.Array) -> Cut:
  width = vectors.shape[1]
  means = _product(weights.mean, vectors)
  apart = gone[:, None] * (means - _product(kept, means) / jnp.maximum(kept.sum(), 1))  # D^T
  shown = jnp.sqrt(_product(kept, weights.spread))[:, None] * vectors  # Z^T
  largest = jnp.maximum(jnp.max(jnp.abs(apart)), jnp.max(jnp.abs(shown)))
  unit = jnp.where(largest > 0, largest, 1)
  apart, shown = apart / unit, shown / unit
  gone = gone * (jnp.max(jnp.abs(apart), axis=1) > _ROUNDING)
  apart = gone[:, None] * apart
  ridge = gone[:, None] * _ridge(apart, jnp.concatenate([apart, shown]))
  values, basis = jnp.linalg.eigh(_symmetric(_product(ridge, apart.T)))
  counts = values > _SMALLEST * values[-1]
  inverse = jnp.where(counts, 1 / jnp.where(counts, values, 1), 0)
  found = _product(basis * inverse, _product(basis.T, ridge))
  rank = counts.sum(dtype=jnp.int32)
  whole = rank < width
  return Cut(jnp.where(whole, apart.T * unit, 0), jnp.where(whole, found / unit, 0), rank)


def _ridge(apart: jax.Array, columns: jax.Array) -> jax.Array:
  """R = D^T (B B^T + tie)^-1 from D^T (C, F) and B^T (N, F), by the smaller of two systems."""
  count, width = columns.shape
  gram = _product(columns, columns.T) if count < width else _product(columns.T, columns)
  tie = _TIE**2 * jnp.linalg.eigvalsh(gram)[-1] + jnp.finfo(gram.dtype).tiny
  gram = gram + tie * jnp.eye(len(gram))
  if count < width:  # (B B^T + tie)^-1 B = B (B^T B + tie)^-1
    return jnp.linalg.solve(gram, columns)[: len(apart)]
  return jnp.linalg.solve(gram, apart.T).T


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=_HIGHEST)


def _symmetric(x: jax.Array) -> jax.Array:
  return (x + x.T) / 2

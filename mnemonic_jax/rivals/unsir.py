"""UNSIR (FastMU): noise that the model takes for anything but the class, then repair."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import _functions, losses
from mnemonic_jax.rivals import descent
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import KEPT, Examples, Request

PyTree = Any

_PER_CLASS = 1000  # examples of each kept class, and of noise
_NOISES, _STEPS, _NOISE_RATE, _SMALL = 128, 40, 0.1, 0.1
_ADAM = optax.adam(_NOISE_RATE)


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Impair for one epoch at `rate`, then repair for one at half of it.

      noise: minimise -(cross-entropy of N as the forgotten class) + 0.1 ||N||^2

  by 40 steps of Adam (0.1) from N(0, 1), 128 a class. Impairing trains on noise as the forgotten
  class and on up to 1,000 examples of each kept class, repairing on these alone; SGD, momentum 0.9.
  A class has as many noises, by repetition, as the largest kept class has examples.
  """
  kept = some(request)
  count = int(np.bincount(kept.labels).max())
  impair = [kept]
  for c in classes:
    made = np.asarray(noise(request, c))
    rows = np.arange(count) % len(made)
    impair.append(Examples(made[rows].astype(kept.inputs.dtype), np.full(count, c, np.int32)))
  mixed = tuple(map(np.concatenate, zip(*impair, strict=True)))
  program = descent.Descent(descent.cross_entropy)
  learner = descent.epoch(request, program, descent.begin(request), mixed, rate)
  learner = descent.epoch(request, program, learner, tuple(kept), rate / 2)
  return descent.end(request, learner)


def some(request: Request) -> Examples:
  """At most 1,000 examples of each kept class, drawn at random."""
  inputs, labels = request.side(KEPT)
  order = np.asarray(jax.random.permutation(request.key, len(labels)))
  rows = np.concatenate([order[labels[order] == c][:_PER_CLASS] for c in np.unique(labels)])
  return Examples(inputs[rows], labels[rows])


def noise(request: Request, label: int) -> jax.Array:
  """Noise (128, *shape) that the model takes for anything but a class."""
  static, arrays = _functions.split(request.logits_fn)
  key = jax.random.fold_in(request.key, label)
  found = jax.random.normal(key, (_NOISES, *request.shape))
  adam = _ADAM.init(found)
  for _ in range(_STEPS):
    found, adam = _noisier(static, arrays, request.params, found, adam, jnp.int32(label))
  return found


@partial(jax.jit, static_argnums=0)
def _noisier(
  static: Any, arrays: Any, params: PyTree, noise: jax.Array, adam: Any, label: jax.Array
) -> tuple[jax.Array, Any]:
  """One step of the noise."""

  def loss(noise: jax.Array) -> jax.Array:
    logits = static(arrays)(params, noise)
    wrong = losses.softmax_cross_entropy(logits, jnp.full(len(noise), label))
    size = jnp.sum(jnp.square(noise).reshape(len(noise), -1), axis=1)
    return jnp.mean(_SMALL * size - wrong)

  update, adam = _ADAM.update(jax.grad(loss)(noise), adam)
  return optax.apply_updates(noise, update), adam


RIVAL = Rival(
  name="unsir",
  source="Tarun et al. (2023), arXiv 2111.08947",
  reads=Reads(KEPT, "1,000 a class, twice"),
  strengths=(1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.1),
  forget_fn=forget,
  trains=True,
  reconstruction=True,
  default=2e-2,
)

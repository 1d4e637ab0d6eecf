"""The prototype attack: do five examples of the class bring it back at the head?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _trees
from mnemonic_jax.auditing.intervals import Estimate, of_variance
from mnemonic_jax.methods.network import Network

PyTree = Any

SHOTS = 5  # examples of each forgotten class
DRAWS = 10  # of these examples


def prototype_rows(rows: Any, shots: Mapping[int, Any]) -> np.ndarray:
  """Return the head's rows (C, F) as the attack has them.

      w_f <- w_f / 2 + (m / 2) mu_f / |mu_f|

  with mu_f the mean features of the shots of class f, and m the mean length of the kept rows. A
  mean of zeros leaves the row at half. The attacker also sets the forgotten biases to the mean of
  the kept ones: else an edit of one bias would defeat it.

  Cost: a pass over five examples a class, and one over the test examples of the class for each
  draw. Pitfalls: five examples are few, so several draws are needed. Retrain is recovered too, to
  half of the class and more, since its features also group a class that it never saw; only the
  distance to it counts.

  Args:
    rows: (C, F), one row of the head a class.
    shots: forgotten class -> (k, F), features that the head reads of k of its examples.

  >>> prototype_rows([[2.0, 0.0], [0.0, 4.0]], {0: [[0.0, 3.0], [0.0, 5.0]]})
  array([[1., 2.],
         [0., 4.]])
  """
  rows = np.array(rows, np.float64)
  kept = [label for label in range(len(rows)) if label not in shots]
  length = np.linalg.norm(rows[kept], axis=1).mean()
  for label, features in shots.items():
    mean = np.asarray(features, np.float64).mean(0)
    size = np.linalg.norm(mean)
    rows[label] = rows[label] / 2 + (length / 2) * (mean / size if size else mean)
  return rows


def attacked(model: Network, params: PyTree, shots: Mapping[int, Any]) -> PyTree:
  """Return params with the head as the attack has it; new ones, the others are as given.

  Args:
    model: of a program with a head.
    params: its params.
    shots: as in `prototype_rows`.

  Raises:
    ValueError: a head that reads more than the features of one position.
  """
  assert model.head is not None
  kernel, bias = model.head.kernel, model.head.bias
  leaves, treedef = _trees.flatten(params)
  arranged = np.asarray(kernel.arranged(jnp.asarray(leaves[kernel.leaf])))
  axes = (kernel.axis, *model.head.step.rule.leaf_axes[0])
  moved = np.moveaxis(arranged, axes, range(len(axes)))
  rows = moved.reshape(len(moved), -1)
  width = np.shape(next(iter(shots.values())))[1]
  if rows.shape[1] != width:
    raise ValueError(
      f"the head: its rows have {rows.shape[1]} entries and it reads {width} features; expected as "
      "many. A convolution with several taps cannot be attacked."
    )
  new = prototype_rows(rows, shots).astype(np.float32).reshape(moved.shape)
  entry = jnp.asarray(np.moveaxis(new, range(len(axes)), axes))
  gone = jnp.asarray([label in shots for label in range(len(rows))])
  leaves[kernel.leaf] = kernel.put(jnp.asarray(leaves[kernel.leaf]), gone, entry)
  if bias is not None:
    old = jnp.asarray(leaves[bias.leaf])
    leaves[bias.leaf] = bias.put(old, gone, bias.mean(old, ~gone))
  return treedef.unflatten(leaves)


def draw(labels: Any, classes: Any, seed: int, shots: int = SHOTS) -> dict[int, np.ndarray]:
  """Draw examples of each class without replacement: class -> positions in `labels`.

  Raises:
    ValueError: a class with fewer examples than `shots`.

  >>> {label: sorted(rows.tolist()) for label, rows in draw([1, 0, 1], [1], 0, shots=2).items()}
  {1: [0, 2]}
  """
  labels, rng = np.asarray(labels), np.random.default_rng(seed)
  found = {}
  for label in classes:
    own = np.flatnonzero(labels == label)
    if len(own) < shots:
      raise ValueError(
        f"train: holds {len(own)} examples of class {label}; expected at least {shots}, which the "
        "attack draws."
      )
    found[int(label)] = rng.choice(own, shots, replace=False)
  return found


def recovered(right: Any) -> Estimate:
  """Estimate the accuracy that the attack recovers, over draws of its examples.

  The mean over draws and test examples; its variance is that between draws over their number, plus
  that between test examples over theirs.

  Args:
    right: (D, M) bool: in each of D draws, whether each of M test examples of the forgotten classes
      is classified right.

  >>> round(recovered(np.ones((10, 100), bool)).low, 3)
  0.963
  """
  right = np.asarray(right, np.float64)
  between = lambda means: means.var(ddof=1) / len(means) if len(means) > 1 else 0.0
  variance = between(right.mean(1)) + between(right.mean(0))
  return of_variance(float(right.mean()), float(variance), right.shape[1])

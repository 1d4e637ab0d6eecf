"""What judges stand for: clusters of a class's examples, by k-means, none of them small."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mnemonic_jax.learning.measure import Reservoir

_ROUNDS = 50  # of k-means


class Centroids(NamedTuple):
  """The centroids of all classes, those of most examples first; zeros in places without one."""

  vectors: np.ndarray  # (C, J, F)
  weights: np.ndarray  # (C, J), shares of the class's examples
  accuracy: np.ndarray  # (C, J), the share of them that the model classifies right
  spread: np.ndarray  # (C, J), the standard deviation of their margins

  @property
  def are_there(self) -> np.ndarray:
    """Which places have a centroid, (C, J) bool."""
    return self.weights > 0


def centroids(
  reservoir: Reservoir, width: int, num_judges: int, min_members: int, rng: np.random.Generator
) -> Centroids:
  """Cluster the examples of each class that the reservoir has, by the last `width` channels.

  A class of n examples has min(num_judges, n // min_members) centroids; one with fewer than
  `min_members` examples joins the nearest. A class of fewer than `min_members` has none.
  """
  num_classes, _, channels = reservoir.vectors.shape
  found = Centroids(
    np.zeros((num_classes, num_judges, channels), np.float32),
    *(np.zeros((num_classes, num_judges), np.float32) for _ in range(3)),
  )
  for label in range(num_classes):
    vectors, margins = reservoir.of(label)
    count = min(num_judges, len(vectors) // min_members)
    if not count:
      continue
    vectors = vectors.astype(np.float64)
    last = vectors[:, -width:]
    cluster = joined(last, k_means(last, count, rng), min_members)
    sizes = np.bincount(cluster)
    for place, member in enumerate(np.argsort(-sizes, kind="stable")[: np.sum(sizes > 0)]):
      rows = cluster == member
      found.vectors[label, place] = vectors[rows].mean(0)
      found.weights[label, place] = rows.mean()
      found.accuracy[label, place] = np.mean(margins[rows] > 0)
      found.spread[label, place] = margins[rows].std()
  return found


def k_means(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """Cluster vectors (n, F) by Lloyd's rounds, from a start drawn as k-means++ does.

  Returns:
    (n,) int, the cluster of each vector, below `count`. A cluster may be empty.

  >>> k_means(np.array([[0.0], [9.0], [0.1], [9.1]]), 2, np.random.default_rng(0)).tolist()
  [1, 0, 1, 0]

  Source: Arthur and Vassilvitskii (2007).
  """
  centres = vectors[rng.integers(len(vectors), size=1)]
  for _ in range(1, count):
    nearest = _distances(vectors, centres).min(1)
    total = nearest.sum()
    rows = rng.choice(len(vectors), size=1, p=nearest / total if total > 0 else None)
    centres = np.concatenate([centres, vectors[rows]])
  cluster = np.full(len(vectors), -1)
  for _ in range(_ROUNDS):
    before, cluster = cluster, _distances(vectors, centres).argmin(1)
    if np.array_equal(before, cluster):
      break
    for index in np.unique(cluster):
      centres[index] = vectors[cluster == index].mean(0)
  return cluster


def joined(vectors: np.ndarray, cluster: np.ndarray, min_members: int) -> np.ndarray:
  """Let each cluster of fewer than `min_members` join the one with the nearest centre.

  >>> joined(np.array([[0.0], [0.1], [5.0], [9.0], [9.1]]), np.array([0, 0, 1, 2, 2]), 2).tolist()
  [0, 0, 2, 2, 2]
  """
  cluster = cluster.copy()
  while True:
    names, sizes = np.unique(cluster, return_counts=True)
    if len(names) == 1 or sizes.min() >= min_members:
      return cluster
    centres = np.stack([vectors[cluster == name].mean(0) for name in names])
    smallest = int(sizes.argmin())
    distances = _distances(centres, centres[[smallest]])[:, 0]
    distances[smallest] = np.inf
    cluster[cluster == names[smallest]] = names[distances.argmin()]


def _distances(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """Squared distances, (n, F) and (k, F) -> (n, k), rounding aside."""
  squares = np.sum(vectors**2, axis=1)[:, None] + np.sum(centres**2, axis=1)[None]
  return np.maximum(squares - 2 * vectors @ centres.T, 0)

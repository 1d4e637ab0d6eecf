"""What `learn_codes` returns."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedCodes:
  """Codes of a trained model, and what judges its forgetting; a pytree of arrays.

  They are secrets of the model: codes hold the mean features of their class.

  Attributes:
    codes: (C, K, *shape), K codes for each class.
    judges: (C, J, *shape), each for a cluster of its class's examples; zeros in places without one.
      J is 0 where no data was read.
    judge_weights: (C, J), the share of the class's examples in each cluster. They sum to 1, or are
      all 0 for a class without a judge.
    judge_accuracy: (C, J), the share of a cluster's examples that the model classified right.
    judge_spread: (C, J), the standard deviation of their margins, the logit of the right class over
      the best other.
    recalled: (C, R, *shape), codes recalled from the model alone.
  """

  codes: jax.Array
  judges: jax.Array
  judge_weights: jax.Array
  judge_accuracy: jax.Array
  judge_spread: jax.Array
  recalled: jax.Array

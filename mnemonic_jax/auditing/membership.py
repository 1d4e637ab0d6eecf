"""Membership by loss: does the model treat forgotten training examples unlike test examples?"""

from __future__ import annotations

from typing import Any

import numpy as np

from mnemonic_jax.auditing import intervals
from mnemonic_jax.auditing.intervals import Estimate
from mnemonic_jax.evaluation import Predictions


def loss_attack(train: Predictions, test: Predictions, classes: Any) -> Estimate:
  """Estimate the AUC of the attack that takes examples of small loss for training examples.

  Positives are the training examples of the forgotten classes, negatives their test examples; the
  score is minus the loss, so every threshold counts.

  Cost: none beyond the answers. Pitfalls: the average over examples hides a few that are known for
  certain; the likelihood-ratio attack finds more. Below 0.5 is a trace too: a method that pushes
  the loss of training examples up gives them away. Retrain gets 0.5 up to noise, since it saw
  neither kind. A forgotten bias far below all logits swallows them (float32 has 24 bits), and the
  attack sees ties.

  Args:
    train, test: answers to training and to test examples.
    classes: the forgotten classes.

  Raises:
    ValueError: fewer than two forgotten examples of a kind.

  >>> made = lambda losses: Predictions(np.zeros(3), np.array(losses), np.zeros(3, int))
  >>> loss_attack(made([0.0, 0.1, 0.2]), made([1.0, 2.0, 3.0]), [0]).value
  1.0

  Source: Yeom et al. (2018).
  """
  score = lambda found: -found.losses[np.isin(found.labels, list(classes))]
  return intervals.auc(score(train), score(test))

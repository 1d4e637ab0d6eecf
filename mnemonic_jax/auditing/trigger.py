"""Codes as a backdoor: do the codes of a forgotten class still trigger it?"""

from __future__ import annotations

from typing import Any

import numpy as np

from mnemonic_jax.auditing.intervals import Estimate, wilson


def trigger_rate(predictions: Any, classes: Any) -> Estimate:
  """Estimate the share of codes of the forgotten classes that are still classified as theirs.

  Cost: a pass over the codes. Pitfalls: codes are what the method reads, so this is the easiest
  test of all; with few codes a class the interval is wide. Retrain gets 0, since it cannot answer
  a class that it never saw.

  Args:
    predictions: (C, K), the class predicted for each of K codes of each class.
    classes: the forgotten classes.

  >>> trigger_rate([[0, 1], [1, 1]], [0]).value
  0.5
  """
  chosen = np.asarray(list(classes))
  found = np.asarray(predictions)[chosen]
  return wilson(int((found == chosen[:, None]).sum()), found.size)

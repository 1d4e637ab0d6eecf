"""Synthetic reports: made-up numbers of the right form, for the tests of the report only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def class_names(num_classes: int) -> list[str]:
  """Name the classes: digits, or kinds where they are more than ten."""
  return DIGITS[:num_classes] if num_classes <= 10 else [f"kind {c}" for c in range(num_classes)]


def make_report(
  num_classes: int, classes: list[int], *, error: float = 1.0, loss: float = 0.005
) -> dict[str, Any]:
  """Make a forget JSON: `error` is its test error after, `loss` what the kept classes lose."""
  rng = np.random.default_rng(num_classes)
  before = np.round(rng.uniform(0.93, 1.0, num_classes), 3)
  after = np.clip(before - rng.uniform(-0.01, 0.02, num_classes), 0, 1)
  after[classes] = 1 - error
  names = class_names(num_classes)
  verdict = "forgotten" if error >= 0.95 else "not forgotten"
  return {
    "requested": list(classes),
    "classes": list(classes),
    "class_names": [names[c] for c in classes],
    "time": "2026-01-02T03:04:05+00:00",
    "read": {"forget": ["params", "codes"], "score": "test"},
    "method": {"name": "perturbation", "lambda1": 1e-3, "lambda2": 10.0},
    "info": {"sign": 1},
    "retain_accuracy_before": 0.976,
    "retain_accuracy_after": 0.976 - loss,
    "forget_error_before": 0.012,
    "forget_error_after": error,
    "per_class_accuracy_before": before.tolist(),
    "per_class_accuracy_after": after.tolist(),
    "verdict": verdict,
    "verdicts": {
      names[c]: {"verdict": verdict, "evidence": "test", "error": error} for c in classes
    },
    "seconds": {"compile": 0.61, "fisher": 0.034, "perturb": 0.019, "total": 0.71},
    "checkpoint": "runs/digits/checkpoints/200",
    "codes_sha256": "c0de" * 16,
    "params_sha256_before": "be40" * 16,
    "params_sha256_after": "af7e" * 16,
    "versions": {"python": "3.11.2", "jax": "0.10.2", "mnemonic-jax": "0.1.0", "numpy": "2.4.6"},
  }


def make_evidence(num_classes: int, classes: list[int]) -> dict[str, Any]:
  """Make the evidence beside it: confusions, losses, layers, controls."""
  rng = np.random.default_rng(num_classes + 1)
  before = np.diag(rng.integers(33, 37, num_classes)) + rng.binomial(
    1, min(0.1, 3 / num_classes**1.5), (num_classes,) * 2
  )
  after = before + rng.binomial(1, 0.03 / num_classes**0.5, (num_classes,) * 2)
  kept = [c for c in range(num_classes) if c not in classes]
  after[:, classes] = 0
  for c in classes:
    after[c, kept] = rng.multinomial(before[c].sum(), rng.dirichlet(np.full(len(kept), 0.4)))
  return {
    "class_names": class_names(num_classes),
    "config": "digits",
    "dataset": "digits",
    "model": "mlp",
    "num_test_examples": int(before.sum()),
    "confusion_before": before.tolist(),
    "confusion_after": after.tolist(),
    "losses": {
      "train_before": np.exp(rng.normal(-5.5, 1.6, 142)).tolist(),
      "train_after": np.exp(rng.normal(2.6, 0.35, 142)).tolist(),
      "test_before": np.exp(rng.normal(-5.0, 1.9, 36)).tolist(),
      "test_after": np.exp(rng.normal(2.5, 0.4, 36)).tolist(),
    },
    "layers": [
      _layer("['hidden']['bias']", [1000], 1.9, 0.004, 0.0009, 0.02),
      _layer("['hidden']['kernel']", [64, 1000], 31.2, 0.9, 0.061, 0.134),
      _layer("['output']['bias']", [num_classes], 0.84, 0.31, 0.29, 0.3),
      _layer("['output']['kernel']", [1000, num_classes], 14.6, 5.2, 0.42, 0.412),
    ],
    "controls": [
      {
        "name": "Head edit",
        "retain_accuracy": 0.976,
        "forget_error": 1.0,
        "note": "output bias of the class set very low",
      },
      {
        "name": "Retrain",
        "retain_accuracy": 0.9741,
        "forget_error": 1.0,
        "note": "trained without the class, 3 seeds",
      },
    ],
  }


def make_codes(num_classes: int, shape: tuple[int, ...], per_class: int = 1) -> np.ndarray:
  """Make codes (C, K, *shape), uniform."""
  return np.random.default_rng(7).uniform(size=(num_classes, per_class, *shape)).astype(np.float32)


def _layer(
  path: str, shape: list[int], norm: float, change: float, largest: float, share: float
) -> dict[str, Any]:
  return {
    "path": path,
    "shape": shape,
    "size": math.prod(shape),
    "norm_before": norm,
    "norm_change": change,
    "max_change": largest,
    "share_changed": share,
  }

"""`mnemonic evaluate`: the trained and the latest forgotten params on the test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mnemonic_jax import evaluation
from mnemonic_jax.data import Dataset
from mnemonic_jax.runs.checkpoints import restore_params
from mnemonic_jax.runs.classes import resolve
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.inference import predict_each
from mnemonic_jax.runs.records import require_forgotten_from, require_reported
from mnemonic_jax.runs.trained import restore


def evaluate(run: RunFolder, dataset: Dataset, classes: Sequence[int | str] = ()) -> dict[str, Any]:
  """Score the trained params, and those of the latest forget if any; "..._ema" are their averages.

  `classes` count as forgotten; by default those that the run forgot, else those of its config.
  """
  asked = list(classes) or run.forgotten_classes() or run.config.forget.classes
  chosen = resolve(asked, dataset.class_names)
  num_classes = len(dataset.class_names)
  trained = restore(run, dataset)
  finished = run.forgets()
  models, places = {"trained": trained.params}, {"trained": trained.checkpoint}
  if finished:
    report = run.report_of(finished[-1])
    require_forgotten_from(trained.checkpoint, trained.params, report, finished[-1])
    places["forgotten"] = finished[-1] / "params"
    models["forgotten"] = restore_params(places["forgotten"], trained.params)
    require_reported(places["forgotten"], models["forgotten"], report)
  if trained.ema_params is not None:  # a copy that may be served too
    models["trained_ema"], places["trained_ema"] = trained.ema_params, trained.checkpoint
    if finished:
      places["forgotten_ema"] = finished[-1] / "ema_params"
      models["forgotten_ema"] = restore_params(places["forgotten_ema"], trained.params)
      require_reported(
        places["forgotten_ema"], models["forgotten_ema"], report.get("copies", {}).get("ema", {})
      )
  result: dict[str, Any] = {
    "run": str(run.path),
    "classes": chosen,
    "trained": None,
    "forgotten": None,
  }
  every = predict_each(trained.logits_fn, list(models.values()), dataset.test, dataset.preprocess)
  for name, seen in zip(models, every, strict=True):
    scores = evaluation.scores(seen, num_classes, chosen)
    result[name] = {
      "retain_accuracy": scores.retain_accuracy,
      "forget_error": scores.forget_error,
      "per_class_accuracy": scores.per_class.tolist(),
      "accuracy": float(np.mean(seen.predictions == seen.labels)),
      "params": str(places[name]),
    }
  return result

"""`mnemonic forget`: from the trained checkpoint and every class asked for so far to a new forgets/NNNN."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from mnemonic_jax import evaluation, forgetting, training
from mnemonic_jax import report as reports
from mnemonic_jax.checkpoints import save_params
from mnemonic_jax.config import Config
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.evaluation import Scores
from mnemonic_jax.fisher import Execution
from mnemonic_jax.forgetting import ForgetResult
from mnemonic_jax.perturbation import Strength
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import files, setup
from mnemonic_jax.runs.folder import RunFolder, versions
from mnemonic_jax.runs.hashing import params_sha256
from mnemonic_jax.runs.inference import Predictions, predict
from mnemonic_jax.runs.trained import Trained, restore

_SHOWN_LOSSES = 2000  # per distribution in the report
_MOVED = 0.01  # a weight counts as moved when it changed by more than this part of its layer's RMS weight


def forget(run: RunFolder, dataset: Dataset, requested: Sequence[int]) -> dict[str, Any]:
  """Forget `requested` and everything that this run was asked to forget before, and write forgets/NNNN.

  The result is derived from the trained checkpoint and the union of all classes, so the order of requests cannot matter,
  and no checkpoint is touched.
  """
  settings = run.config.forget
  with run.locked():
    classes = check_request(run.config, requested, len(dataset.class_names), run.forgotten_classes())
    trained = restore(run, dataset)
    logits_fn, before = trained.logits_fn, trained.state.params
    one_shot = partial(
      forgetting.forget,
      logits_fn,
      codes=trained.codes,
      classes=classes,
      strength=Strength(settings.lambda1, settings.lambda2),
      layer_axis=trained.model.layer_axis,
      precision=settings.precision,
      execution=Execution(microbatch=run.config.execution.microbatch or None),
    )
    result = one_shot(before)
    scored = {
      name: _Scored(trained, params, dataset, classes)
      for name, params in (("before", before), ("after", result.params))
    }
    hidden = _Scored(trained, head_edit(before, trained.model.head, classes), dataset, classes)
    report = {
      "requested": list(requested),
      "classes": classes,
      **_outcome(before, result, scored),
      "lambda1": settings.lambda1,
      "lambda2": settings.lambda2,
      "checkpoint": str(trained.checkpoint),
      "codes_sha256": setup.array_sha256(trained.codes),
      "versions": versions(),
    }
    copies = {"params": result.params}
    if (average := training.ema_params(trained.state)) is not None:  # a copy that may be served too
      ema = one_shot(average)
      copies["ema_params"] = ema.params
      pair = {"before": average, "after": ema.params}
      ema_scored = {name: _Scored(trained, params, dataset, classes) for name, params in pair.items()}
      report["copies"] = {"params": _outcome(before, result, scored), "ema": _outcome(average, ema, ema_scored)}
    evidence = {
      "class_names": list(dataset.class_names),
      "config": run.config.name,
      "dataset": dataset.name,
      "model": run.config.model.name,
      "num_test_examples": len(dataset.test.labels),
      "confusion_before": scored["before"].confusion,
      "confusion_after": scored["after"].confusion,
      "losses": {
        f"{split}_{name}": getattr(s, f"{split}_losses") for split in ("train", "test") for name, s in scored.items()
      },
      "layers": _layer_changes(before, result.params),
      "controls": [
        {
          "name": "Head edit",
          "retain_accuracy": hidden.scores.retain_accuracy,
          "forget_error": hidden.scores.forget_error,
          "note": "output bias of the forgotten classes set to -1e9; removes nothing from the features",
        }
      ],
    }

    codes = np.asarray(trained.codes)

    def fill(folder: pathlib.Path) -> None:
      for name, params in copies.items():
        save_params(folder / name, params)
      files.write_json(folder / "evidence.json", evidence)
      files.write_json(folder / "report.json", report)
      files.write_text(folder / "report.html", reports.render(files.plain(report), files.plain(evidence), codes))

    folder = run.add_forget(fill)
  return {**report, "folder": str(folder), "report": str(folder / "report.html")}


def _outcome(before: Any, result: ForgetResult, scored: dict[str, _Scored]) -> dict[str, Any]:
  """What a copy of the params was before the forget and is after it."""
  return {
    **{
      f"{key}_{name}": getattr(s.scores, field)
      for key, field in (("retain_accuracy",) * 2, ("forget_error",) * 2, ("per_class_accuracy", "per_class"))
      for name, s in scored.items()
    },
    "sign": result.sign,
    "code_retain_accuracy": result.code_retain_accuracy,
    "code_forget_error": result.code_forget_error,
    "seconds": dict(result.seconds),
    "params_sha256_before": params_sha256(jax.device_get(before)),
    "params_sha256_after": params_sha256(jax.device_get(result.params)),
  }


class _Scored:
  """One set of params on the real data: scores and confusion on test, losses of the forgotten classes on both splits."""

  def __init__(self, trained: Trained, params: Any, dataset: Dataset, classes: Sequence[int]) -> None:
    num_classes = len(dataset.class_names)
    test = predict(trained.logits_fn, params, dataset.test, dataset.preprocess)
    self.confusion = evaluation.confusion_matrix(dataset.test.labels, test.predictions, num_classes)
    self.scores: Scores = evaluation.scores_from_counts(self.confusion.diagonal(), self.confusion.sum(axis=1), classes)
    self.test_losses = _of_classes(test, dataset.test.labels, classes)
    rows = np.flatnonzero(np.isin(dataset.train.labels, classes))[:_SHOWN_LOSSES]
    part = Split(dataset.train.images[rows], dataset.train.labels[rows])
    self.train_losses = predict(trained.logits_fn, params, part, dataset.preprocess).losses if len(rows) else rows


def _of_classes(predictions: Predictions, labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
  return predictions.losses[np.isin(labels, classes)][:_SHOWN_LOSSES]


def _layer_changes(before: Any, after: Any) -> list[dict[str, Any]]:
  """How far each layer moved."""
  layers = []
  pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
  for (path, old), new in pairs:
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    change = np.abs(new - old)
    rms = np.sqrt(np.mean(old**2))
    layers.append(
      {
        "path": jax.tree_util.keystr(path),
        "shape": list(old.shape),
        "size": old.size,
        "norm_before": float(np.linalg.norm(old)),
        "norm_change": float(np.linalg.norm(change)),
        "max_change": float(change.max(initial=0.0)),
        "share_changed": float(np.mean(change > _MOVED * rms)),
      }
    )
  return layers


def check_request(config: Config, requested: Sequence[int], num_classes: int, earlier: Sequence[int] = ()) -> list[int]:
  """Refuse what a run of this config cannot forget, before anything is computed; return all classes to forget."""
  check_classes(requested, num_classes)
  classes = sorted({*requested, *earlier})
  if len(classes) == num_classes:
    raise UsageError(f"classes: {list(requested)} with those forgotten before are all {num_classes}; one must stay.")
  if config.codes.rate == 0:
    raise MnemonicError(
      "codes.rate: got 0, a training without codes, which then say nothing about the classes. Train with "
      "--codes.rate 0.1 into a new folder."
    )
  return classes


def check_classes(requested: Sequence[int], num_classes: int) -> None:
  """Refuse classes that the data set has not, before anything is loaded."""
  for index in requested:
    if not 0 <= index < num_classes:
      raise UsageError(f"classes: got {index}; expected integers from 0 to {num_classes - 1}.")
  if len(set(requested)) < len(requested):
    raise UsageError(f"classes: got {list(requested)}; expected each class once.")
  if not requested:
    raise UsageError("classes: got none; expected at least one, for example --classes 0.")

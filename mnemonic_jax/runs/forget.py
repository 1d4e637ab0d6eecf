"""`mnemonic forget`: from a run's checkpoint to a new forgets/NNNN, or from a plain checkpoint to a folder like it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mnemonic_jax import evaluation, forgetting
from mnemonic_jax import report as reports
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.data.stream import Stream
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.evaluation import Scores
from mnemonic_jax.fisher import Execution
from mnemonic_jax.forgetting import ForgetResult
from mnemonic_jax.methods.perturbation import Strength
from mnemonic_jax.report import wording
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import files, setup
from mnemonic_jax.runs.checkpoints import require_plain, save_params
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder, versions
from mnemonic_jax.runs.hashing import params_sha256, to_host
from mnemonic_jax.runs.inference import Predictions, predict_each
from mnemonic_jax.runs.trained import Trained, restore, restore_plain

_SHOWN_LOSSES = 2000  # per distribution in the report
_MOVED = (
  0.01  # a weight counts as moved when it changed by more than this part of its layer's RMS weight
)


def forget(run: RunFolder, dataset: Dataset, requested: Sequence[int]) -> dict[str, Any]:
  """Forget `requested` and everything that this run was asked to forget before, and write forgets/NNNN.

  The result is derived from the trained checkpoint and the union of all classes, so the order of requests cannot matter,
  and no checkpoint is touched.
  """
  require_plain(run.path)
  with run.locked():
    classes = check_request(
      run.config, requested, len(dataset.class_names), run.forgotten_classes()
    )
    report, fill = described(restore(run, dataset), run.config, dataset, requested, classes)
    folder = run.add_forget(fill)
  return _placed(report, folder)


def forget_plain(
  checkpoint: epath.Path,
  out: epath.Path,
  config: Config,
  dataset: Dataset,
  requested: Sequence[int],
) -> dict[str, Any]:
  """Forget `requested` in a checkpoint of a training loop of the user's own; see `trained.restore_plain`.

  `out`, a new folder, gets what forgets/NNNN of a run has; the checkpoint is not touched. Each call starts from the
  checkpoint alone: name all classes to forget, earlier ones too.
  """
  require_plain(out)
  classes = _union(requested, len(dataset.class_names))
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise MnemonicError(
      f"{out}: is there already, and not empty. Nothing was changed; choose a new folder for --out."
    )
  if os.path.realpath(out).startswith(os.path.join(os.path.realpath(checkpoint), "")):
    raise MnemonicError(
      f"{out}: lies in the checkpoint, which is not to be touched. Choose another folder for --out."
    )
  report, fill = described(
    restore_plain(checkpoint, config, dataset), config, dataset, requested, classes
  )
  files.make_folder(out, fill)
  return _placed(report, out)


def require_forgotten_from(
  checkpoint: epath.Path, params: Any, report: dict[str, Any], folder: epath.Path
) -> None:
  """Refuse a checkpoint whose params are not those that the forget in `folder` started from."""
  if params_sha256(params) != report.get("params_sha256_before"):
    raise MnemonicError(
      f"{checkpoint}: is not the checkpoint that was forgotten from in {folder}: the SHA-256 of its params is not the report's "
      "params_sha256_before. Put that one back, or forget again."
    )


def require_reported(where: epath.Path, params: Any, copy: dict[str, Any]) -> None:
  """Refuse forgotten params that are not those of their report, or of what it says of this copy."""
  if params_sha256(params) != copy.get("params_sha256_after"):
    raise MnemonicError(
      f"{where}: is not what report.json says; its SHA-256 differs. Forget again to make new, whole files."
    )


def _placed(report: dict[str, Any], folder: epath.Path) -> dict[str, Any]:
  return {**report, "folder": str(folder), "report": str(folder / "report.html")}


OneShot = Callable[[Any], ForgetResult]  # the params before -> the forgotten ones
Predict = Callable[[list[Any], Split | Stream], list[Predictions]]  # several params on one split


def described(
  trained: Trained,
  config: Config,
  dataset: Dataset,
  requested: Sequence[int],
  classes: list[int],
  one_shot: OneShot | None = None,
  predict: Predict | None = None,
) -> tuple[dict[str, Any], Callable[[epath.Path], None]]:
  """Forget `classes` and score it: the report, and what writes all files into a folder.

  `one_shot` and `predict` are those of one process on one device if not given.
  """
  settings, before = config.forget, trained.params
  if one_shot is None:
    one_shot = partial(
      forgetting.forget,
      trained.logits_fn,
      codes=trained.codes,
      classes=classes,
      strength=Strength(settings.lambda1, settings.lambda2),
      layer_axis=trained.model.layer_axis,
      precision=settings.precision,
      execution=Execution(microbatch=config.execution.microbatch or None),
    )
  if predict is None:
    predict = lambda candidates, split: predict_each(
      trained.logits_fn, candidates, split, dataset.preprocess
    )
  result = one_shot(before)
  candidates = [before, result.params, head_edit(before, trained.model.head, classes)]
  copies = {"params": result.params}
  if (average := trained.ema_params) is not None:  # a copy that may be served too
    ema = one_shot(average)
    copies["ema_params"] = ema.params
    candidates += [average, ema.params]
  before_scores, after_scores, hidden, *of_average = _scored(predict, candidates, dataset, classes)
  scored = {"before": before_scores, "after": after_scores}
  report = {
    "requested": list(requested),
    "classes": classes,
    **_outcome(before, result, scored),
    "lambda1": float(result.strength.lambda1),
    "lambda2": float(result.strength.lambda2),
    "checkpoint": str(trained.checkpoint),
    "codes_sha256": setup.array_sha256(trained.codes),
    "versions": versions(),
  }
  if average is not None:
    ema_scored = dict(zip(("before", "after"), of_average, strict=True))
    report["copies"] = {
      "params": _outcome(before, result, scored),
      "ema": _outcome(average, ema, ema_scored),
    }
  # Of each copy, in words, from the test data.
  report["verdicts"] = {
    name: wording.verdict(report | copy, dataset.class_names).label
    for name, copy in report.get("copies", {"params": {}}).items()
  }
  evidence = {
    "class_names": list(dataset.class_names),
    "config": config.name,
    "dataset": dataset.name,
    "model": config.model.name,
    "num_test_examples": dataset.test.num_examples,
    "confusion_before": scored["before"].confusion,
    "confusion_after": scored["after"].confusion,
    "unanswered": {name: int(s.counts.sum() - s.confusion.sum()) for name, s in scored.items()},
    "losses": {
      f"{split}_{name}": getattr(s, f"{split}_losses")
      for split in ("train", "test")
      for name, s in scored.items()
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

  def fill(folder: epath.Path) -> None:
    page = reports.render(files.plain(report), files.plain(evidence), to_host(trained.codes))
    for name, params in copies.items():
      save_params(folder / name, params)
    # In one line: the confusions of 1000 classes are two million counts.
    files.write_text(folder / "evidence.json", files.dumps(evidence))
    files.write_text(folder / "report.html", page)
    files.write_json(folder / "report.json", report)  # last: with it the forget is finished

  return report, fill


def _outcome(before: Any, result: ForgetResult, scored: dict[str, _Scored]) -> dict[str, Any]:
  """What a copy of the params was before the forget and is after it."""
  return {
    **{
      f"{key}_{name}": getattr(s.scores, field)
      for key, field in (
        ("retain_accuracy",) * 2,
        ("forget_error",) * 2,
        ("per_class_accuracy", "per_class"),
      )
      for name, s in scored.items()
    },
    "sign": result.sign,
    "code_retain_accuracy": result.code_retain_accuracy,
    "code_forget_error": result.code_forget_error,
    "seconds": dict(result.seconds),
    "params_sha256_before": params_sha256(before),
    "params_sha256_after": params_sha256(result.params),
  }


class _Scored(NamedTuple):
  """One set of params on the real data: scores and confusion on test, losses of the forgotten classes on both splits."""

  confusion: np.ndarray
  counts: np.ndarray  # of test examples of each class, those without an answer (NaN) too
  scores: Scores
  test_losses: np.ndarray
  train_losses: np.ndarray


def _scored(
  predict: Predict, candidates: list[Any], dataset: Dataset, classes: Sequence[int]
) -> list[_Scored]:
  """Score each of several params, in one pass over the data."""
  num_classes = len(dataset.class_names)
  part = dataset.train.of_classes(classes, _SHOWN_LOSSES)
  on_test, on_train = (predict(candidates, split) for split in (dataset.test, part))
  found = []
  for test, train in zip(on_test, on_train, strict=True):
    confusion = evaluation.confusion_matrix(test.labels, test.predictions, num_classes)
    counts = np.bincount(test.labels, minlength=num_classes)
    scores = evaluation.scores_from_counts(confusion.diagonal(), counts, classes)
    losses = test.losses[np.isin(test.labels, classes)][:_SHOWN_LOSSES]
    found.append(_Scored(confusion, counts, scores, losses, train.losses))
  return found


def _layer_changes(before: Any, after: Any) -> list[dict[str, Any]]:
  """How far each layer moved."""
  layers = []
  pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
  for (path, old), new in pairs:
    old, new = to_host(old).astype(np.float64), to_host(new).astype(np.float64)
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


def check_request(
  config: Config, requested: Sequence[int], num_classes: int, earlier: Sequence[int] = ()
) -> list[int]:
  """Refuse what a run of this config cannot forget, before anything is computed; return all classes to forget."""
  classes = _union(requested, num_classes, earlier)
  if config.codes.rate == 0:
    raise MnemonicError(
      "codes.rate: got 0, a training without codes, which then say nothing about the classes. Train with "
      "--codes.rate 0.1 into a new folder."
    )
  return classes


def _union(requested: Sequence[int], num_classes: int, earlier: Sequence[int] = ()) -> list[int]:
  """All classes to forget, of which one must stay."""
  check_classes(requested, num_classes)
  classes = sorted({*requested, *earlier})
  if len(classes) == num_classes:
    before = " with those forgotten before" if earlier else ""
    raise UsageError(f"classes: {list(requested)}{before} are all {num_classes}; one must stay.")
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

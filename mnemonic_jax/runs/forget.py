"""`mnemonic forget`: write forgets/NNNN of a run, or a folder like it for a plain checkpoint."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from etils import epath

from mnemonic_jax import forgetting, methods
from mnemonic_jax import report as reports
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.fisher import Execution
from mnemonic_jax.forgetting import ForgetResult
from mnemonic_jax.report import verdicts
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import classes as run_classes
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import evidence, files, setup
from mnemonic_jax.runs.checkpoints import require_plain, save_params
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.evidence import Predict, Scored
from mnemonic_jax.runs.folder import RunFolder, versions
from mnemonic_jax.runs.hashing import params_sha256, to_host
from mnemonic_jax.runs.inference import predict_each
from mnemonic_jax.runs.trained import Trained, restore, restore_plain

OneShot = Callable[[Any], ForgetResult]  # the params before -> the forgotten ones


class Asked(NamedTuple):
  """Name what a forget was asked for."""

  requested: list[int]  # by this request
  classes: list[int]  # by earlier ones too, sorted
  method: Any


def check_request(
  config: Config,
  requested: Sequence[int | str],
  class_names: Sequence[str],
  earlier: Sequence[int] = (),
) -> Asked:
  """Refuse what a run of this config cannot forget, before anything is computed.

  Raises:
    UsageError: bad classes, or a method that is missing or has bad settings.
    MnemonicError: the run was trained without codes.
  """
  asked = _asked(config, requested, class_names, earlier)
  if config.codes.rate == 0:
    raise MnemonicError(
      "codes.rate: got 0; the model was trained without codes, so codes tell nothing about its "
      "classes. Train with --codes.rate 0.1 into a new folder."
    )
  return asked


def _asked(
  config: Config,
  requested: Sequence[int | str],
  class_names: Sequence[str],
  earlier: Sequence[int] = (),
) -> Asked:
  found = run_classes.resolve(requested, class_names)
  classes = run_classes.union(found, earlier, class_names)
  return Asked(found, classes, configs.make_method(config.forget))


def forget(run: RunFolder, dataset: Dataset, requested: Sequence[int | str]) -> dict[str, Any]:
  """Forget `requested` and all that this run was asked to forget before; write forgets/NNNN.

  It starts from the trained checkpoint and the union of all classes, so the order of requests
  cannot matter. No checkpoint is changed.
  """
  require_plain(run.path)
  with run.locked():
    earlier = run.forgotten_classes()
    asked = check_request(run.config, requested, dataset.class_names, earlier)
    report, fill = described(restore(run, dataset), run.config, dataset, asked)
    folder = run.add_forget(fill)
  return _placed(report, folder)


def forget_plain(
  checkpoint: epath.Path,
  out: epath.Path,
  config: Config,
  dataset: Dataset,
  requested: Sequence[int | str],
) -> dict[str, Any]:
  """Forget `requested` in a checkpoint that the user's own training loop wrote.

  `out`, a new folder, gets what forgets/NNNN of a run has. The checkpoint is not changed. Each call
  starts from the checkpoint alone: name all classes to forget, earlier ones too.
  """
  require_plain(out)
  asked = _asked(config, requested, dataset.class_names)
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise MnemonicError(
      f"{out}: is there already, and not empty. Nothing was changed; choose a new folder for --out."
    )
  if os.path.realpath(out).startswith(os.path.join(os.path.realpath(checkpoint), "")):
    raise MnemonicError(
      f"{out}: lies inside the checkpoint, which must not be changed. Choose another folder for "
      "--out."
    )
  trained = restore_plain(checkpoint, config, dataset)
  report, fill = described(trained, config, dataset, asked)
  files.make_folder(out, fill)
  return _placed(report, out)


def _placed(report: dict[str, Any], folder: epath.Path) -> dict[str, Any]:
  return {**report, "folder": str(folder), "report": str(folder / "report.html")}


def described(
  trained: Trained,
  config: Config,
  dataset: Dataset,
  asked: Asked,
  one_shot: OneShot | None = None,
  predict: Predict | None = None,
) -> tuple[dict[str, Any], Callable[[epath.Path], None]]:
  """Forget and score; return the report, and a function that writes all files into a folder.

  `one_shot` forgets in one copy of the params, and `predict` runs the model over a split; by
  default both use one process and one device.
  """
  one_shot = one_shot or _on_one_device(trained, config, asked)
  if predict is None:
    predict = lambda candidates, split: predict_each(
      trained.logits_fn, candidates, split, dataset.preprocess
    )
  before, average = trained.params, trained.ema_params
  result = one_shot(before)
  candidates = [before, result.params, head_edit(before, trained.model.head, asked.classes)]
  kept = {"params": result.params}
  if average is not None:  # a copy that may be served too
    of_average = one_shot(average)
    kept["ema_params"] = of_average.params
    candidates += [average, of_average.params]
  scores = evidence.scored(predict, candidates, dataset, asked.classes)
  names = dataset.class_names
  report = {
    "requested": asked.requested,
    "classes": asked.classes,
    "class_names": [names[c] for c in asked.classes],
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "read": {
      "forget": ["params", "codes"],
      "score": "test" if dataset.test.num_examples else None,
    },
    **_outcome(before, result, scores[:2], asked, names),
    "checkpoint": str(trained.checkpoint),
    "codes_sha256": setup.array_sha256(trained.codes),
    "versions": versions(),
  }
  if average is not None:
    report["copies"] = {"ema": _outcome(average, of_average, scores[3:], asked, names)}
  report["verdict"] = verdicts.all_of([report, *report.get("copies", {}).values()])
  shown = evidence.gather(config, dataset, before, result.params, scores[:3])

  def fill(folder: epath.Path) -> None:
    page = reports.render(files.plain(report), files.plain(shown), to_host(trained.codes))
    for name, params in kept.items():
      save_params(folder / name, params)
    # In one line: the confusions of 1000 classes are two million counts.
    files.write_text(folder / "evidence.json", files.dumps(shown))
    files.write_text(folder / "report.html", page)
    files.write_json(folder / "report.json", report)  # last: with it the forget is finished

  return report, fill


def _on_one_device(trained: Trained, config: Config, asked: Asked) -> OneShot:
  return partial(
    forgetting.forget,
    trained.logits_fn,
    codes=trained.codes,
    classes=asked.classes,
    method=asked.method,
    layer_axis=trained.model.layer_axis,
    precision=config.forget.precision,
    execution=Execution(microbatch=config.execution.microbatch or None),
  )


def _outcome(
  before: Any, result: ForgetResult, scores: list[Scored], asked: Asked, names: Sequence[str]
) -> dict[str, Any]:
  """Say what a copy of the params was before the forget and is after it; see `schema.COPY`."""
  outcome: dict[str, Any] = {
    "method": {"name": methods.name_of(result.method), **methods.settings(result.method)},
    "info": dict(result.info),
    "code_retain_accuracy": result.code_retain_accuracy,
    "code_forget_error": result.code_forget_error,
  }
  for when, scored in zip(("before", "after"), scores, strict=True):
    outcome[f"retain_accuracy_{when}"] = scored.scores.retain_accuracy
    outcome[f"forget_error_{when}"] = scored.scores.forget_error
    outcome[f"per_class_accuracy_{when}"] = scored.scores.per_class
  after = outcome["per_class_accuracy_after"]
  return outcome | {
    "verdicts": verdicts.by_name(after, asked.classes, names),
    "seconds": dict(result.seconds),
    "params_sha256_before": params_sha256(before),
    "params_sha256_after": params_sha256(result.params),
  }

"""`mnemonic evaluate`, `report` and `export`: what can be done with a finished forget.

Its records are read and checked first, and its params are checked against them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mnemonic_jax import _trees, evaluation
from mnemonic_jax import report as reports
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.runs import files, format1, learned, ledger
from mnemonic_jax.runs.checkpoints import (
  is_checkpoint,
  newest,
  restore_codes,
  restore_params,
  restore_parts,
  stored_shapes,
)
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.forget import resolve
from mnemonic_jax.runs.scoring import predict_each
from mnemonic_jax.runs.trained import restore

_REMEDY = "Forget again to make new, whole files."


def read(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return the report and the evidence of a forget, checked; old ones in today's form."""
  report, evidence = (
    files.read_json(folder / f"{name}.json", _REMEDY) for name in ("report", "evidence")
  )
  if format1.is_report(report):
    try:
      report = format1.report(report, evidence["class_names"])
    except (KeyError, IndexError, TypeError) as error:
      raise MnemonicError(
        f"{folder / 'report.json'}: was edited, or half-written ({error!r}). {_REMEDY}"
      ) from error
  reports.validate(report, evidence)
  return report, evidence


def require_forgotten_from(
  checkpoint: epath.Path, params: Any, report: dict[str, Any], folder: epath.Path
) -> None:
  """Refuse a checkpoint whose params are not those that the forget in `folder` started from."""
  if files.params_sha256(params) != report.get("params_sha256_before"):
    raise MnemonicError(
      f"{checkpoint}: is not the checkpoint that was forgotten from in {folder}: the SHA-256 of "
      "its params is not params_sha256_before of the report. Put that one back, or forget again."
    )


def require_reported(where: epath.Path, params: Any, copy: dict[str, Any]) -> None:
  """Refuse forgotten params that are not those that the report, or its part `copy`, is about."""
  if files.params_sha256(params) != copy.get("params_sha256_after"):
    raise MnemonicError(
      f"{where}: is not what report.json says; its SHA-256 differs. Forget again to make new, "
      "whole files."
    )


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


def _codes_of(run: RunFolder, report: dict[str, Any]) -> Any:
  """The codes that a forget used: learned ones, or those of the training."""
  path = learned.path_in(run)
  candidates = [restore_codes(run.checkpoints)]
  if path.exists():
    candidates.append(learned.read_codes(path))
  for codes in candidates:
    if files.array_sha256(codes) == report["codes_sha256"]:
      return codes
  raise MnemonicError(
    f"{run.path}: holds other codes than this forget used: their SHA-256 is not codes_sha256 of "
    "the report. Put the file of learned codes back, or leave the codes out with --hide-codes."
  )


def write_page(
  run: RunFolder, number: int | None = None, *, hide_codes: bool = False
) -> epath.Path:
  """Write the page of a finished forget again, and return its path.

  Args:
    number: which forget; by default the latest.
    hide_codes: leave the codes out: they trigger their classes.
  """
  folder = run.finished_forget(number)
  report, evidence = read(folder)
  codes = None
  if not hide_codes:
    if not files.children(run.checkpoints, "[0-9]*"):
      raise MnemonicError(
        f"{run.path}: has no checkpoint, so the codes are missing. Leave them out with "
        "--hide-codes."
      )
    codes = _codes_of(run, report)
  page = folder / "report.html"
  with run.locked():
    files.write_text(page, reports.render(report, evidence, codes))
    ledger.record_page(run, page)
  return page


def export(
  source: epath.Path, out: epath.Path, number: int | None = None, *, ema: bool = False
) -> dict[str, Any]:
  """Write params, and the model state where there is one, to the new file `out`.

  Arrays are named by dotted paths ("hidden.kernel", "model_state.stem_norm.mean"). The metadata are
  "config", "classes" (JSON) and "params_sha256". `pretrained.load` reads the file back.

  Args:
    source: a run folder, or a folder that `forget_plain` made.
    out: a new .safetensors file.
    number: the number of a forget of the run; by default the latest.
    ema: export the moving average of the params, where the training kept one.

  Raises:
    MnemonicError, ValueError: there is nothing to export, files are damaged, or `out` exists.
  """
  if out.suffix != ".safetensors":
    raise UsageError(f"--out: got {out}; expected a name that ends in .safetensors.")
  if out.exists():
    raise MnemonicError(f"{out}: is there already. Nothing was changed; choose another --out.")
  run = None if (source / "report.json").is_file() else RunFolder.open(source)
  if run is None and number is not None:
    raise UsageError(f"--number: got {number}; {source} is the folder of one forget.")
  folder = source if run is None else run.finished_forget(number)
  report, evidence = read(folder)
  checkpoint = epath.Path(report["checkpoint"]) if run is None else newest(run.checkpoints)
  if not is_checkpoint(checkpoint):
    raise MnemonicError(
      f"{folder}: comes from {checkpoint}, which is gone. Put it back: it holds the model state."
    )
  if ema and "ema" not in report.get("copies", {}):
    raise UsageError(
      f"--ema: {folder} has no moving average; train with --train.ema 0.999 to keep one."
    )
  where = folder / ("ema_params" if ema else "params")
  copy = report["copies"]["ema"] if ema else report
  params = restore_parts(where, stored_shapes(where))
  require_reported(where, params, copy)
  arrays = _trees.by_path(params)
  stored = stored_shapes(checkpoint)
  if _trees.by_path(stored.get("model_state")):
    found = restore_parts(checkpoint, {name: stored[name] for name in ("params", "model_state")})
    require_forgotten_from(checkpoint, found["params"], report, folder)
    arrays |= _trees.by_path({"model_state": found["model_state"]})
  metadata = {
    "config": evidence["config"],
    "classes": json.dumps(report["classes"]),
    "params_sha256": copy["params_sha256_after"],
  }
  with files.written(out) as temporary:
    try:
      save_file(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary, metadata
      )
    except SafetensorError as error:
      raise OSError(str(error)) from error
  return {
    "file": str(out),
    "forget": str(folder),
    "arrays": len(arrays),
    **metadata,
    "classes": report["classes"],
  }

"""`mnemonic export`: write the params of a finished forget to one safetensors file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mnemonic_jax import _trees
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.runs import files, records
from mnemonic_jax.runs.checkpoints import is_checkpoint, newest, restore_parts, stored_shapes
from mnemonic_jax.runs.folder import RunFolder


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
  report, evidence = records.read(folder)
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
  records.require_reported(where, params, copy)
  arrays = _trees.by_path(params)
  stored = stored_shapes(checkpoint)
  if _trees.by_path(stored.get("model_state")):
    found = restore_parts(checkpoint, {name: stored[name] for name in ("params", "model_state")})
    records.require_forgotten_from(checkpoint, found["params"], report, folder)
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

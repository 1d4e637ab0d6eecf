"""Read the records of a finished forget, and check params against them."""

from __future__ import annotations

from typing import Any

from etils import epath

from mnemonic_jax import report as reports
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import files, format1
from mnemonic_jax.runs.hashing import params_sha256

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
  if params_sha256(params) != report.get("params_sha256_before"):
    raise MnemonicError(
      f"{checkpoint}: is not the checkpoint that was forgotten from in {folder}: the SHA-256 of "
      "its params is not params_sha256_before of the report. Put that one back, or forget again."
    )


def require_reported(where: epath.Path, params: Any, copy: dict[str, Any]) -> None:
  """Refuse forgotten params that are not those that the report, or its part `copy`, is about."""
  if params_sha256(params) != copy.get("params_sha256_after"):
    raise MnemonicError(
      f"{where}: is not what report.json says; its SHA-256 differs. Forget again to make new, "
      "whole files."
    )

"""Read records of format 1, which knew one method: the only place that knows the old fields.

    config.json   forget.lambda1, forget.lambda2      -> forget.method, forget.settings
    report.json   lambda1, lambda2, sign, no verdicts -> method, info, class_names, read, verdict(s)

Files are never rewritten: what an old run holds stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mnemonic_jax.report import wording

_LAMBDAS = ("lambda1", "lambda2")


def config(tables: Mapping[str, Any]) -> dict[str, Any]:
  """Return the config of an old config.json with the forget fields of today."""
  forget = tables.get("forget")
  if not isinstance(forget, Mapping) or not set(_LAMBDAS) <= set(forget):
    return dict(tables)
  kept = {name: value for name, value in forget.items() if name not in _LAMBDAS}
  settings = {name: forget[name] for name in _LAMBDAS}
  return {**tables, "forget": {**kept, "method": "perturbation", "settings": settings}}


def is_report(report: Any) -> bool:
  """Tell whether a report.json is of format 1."""
  return isinstance(report, Mapping) and "sign" in report and "method" not in report


def report(old: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
  """Return an old forget JSON as one of today; its time was not recorded."""
  settings = {name: old[name] for name in _LAMBDAS}
  scored = any(value is not None for value in old["per_class_accuracy_after"])

  def copy(of: Mapping[str, Any]) -> dict[str, Any]:
    after = of["per_class_accuracy_after"]
    return {
      **{key: value for key, value in of.items() if key not in ("sign", *_LAMBDAS)},
      "method": {"name": "perturbation", **settings},
      "info": {"sign": of["sign"]},
      "verdicts": wording.verdicts(after, old["classes"], class_names),
    }

  new = {
    **copy({key: value for key, value in old.items() if key != "copies"}),
    "class_names": [class_names[c] for c in old["classes"]],
    "time": None,
    "read": {"forget": ["params", "codes"], "score": "test" if scored else None},
  }
  if "copies" in old:
    new["copies"] = {"ema": copy(old["copies"]["ema"])}
  new["verdict"] = wording.worst([new, *new.get("copies", {}).values()])
  return new

"""Fill the plain tables: scores beside controls, layers, seconds, and what identifies a run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mnemonic_jax.report.schema import moving_average, number
from mnemonic_jax.report.wording import UNIT, clean, duration, named_values, percent, scientific

LAYERS_SHOWN = 24  # with more, the most moved ones

_KEYS = re.compile(r"(\['[^'\]]*'\])+")


@dataclasses.dataclass(frozen=True)
class ScoreRow:
  """One model's scores beside the others'."""

  name: str
  this: bool
  retain: str
  error: str
  note: str


@dataclasses.dataclass(frozen=True)
class LayerRow:
  """One parameter tensor; bars in percent of the track's width."""

  path: str
  shape: str
  relative: str
  relative_bar: float
  share: str
  share_bar: float
  largest: str


@dataclasses.dataclass(frozen=True)
class LayerTable:
  """The rows to draw, and one sentence about the layers left out ("" if none is)."""

  rows: tuple[LayerRow, ...]
  others: str


@dataclasses.dataclass(frozen=True)
class TimeRow:
  """One part of the time; its bar in percent of the total."""

  name: str
  time: str
  bar: float


def score_rows(
  report: Mapping[str, Any], controls: Sequence[Mapping[str, Any]]
) -> tuple[ScoreRow, ...]:
  """Return the scores of the trained model, this forget, the moving average and every control."""
  rows = [
    _score_row("Before", report, "_before", "the trained model"),
    _score_row("This forget", report, "_after", f"from {_listed(report['read']['forget'])}", True),
  ]
  if (average := moving_average(report)) is not None:
    note = "a copy of the params that may be served too"
    rows.append(_score_row("Moving average, before", average, "_before", note))
    rows.append(_score_row("Moving average, after", average, "_after", "the same forget of it"))
  rows += [_score_row(control["name"], control, "", control["note"]) for control in controls]
  return tuple(rows)


def _score_row(
  name: str, scores: Mapping[str, Any], when: str, note: str, this: bool = False
) -> ScoreRow:
  retain, error = (number(scores[f"{key}{when}"]) for key in ("retain_accuracy", "forget_error"))
  return ScoreRow(clean(name), this, percent(retain), percent(error), clean(note, 300))


def layer_table(layers: Sequence[Mapping[str, Any]]) -> LayerTable:
  """Return every layer in the model's order, or the 24 most moved ones of a deep model."""
  changes = [relative_change(layer) for layer in layers]
  finite = [change for change in changes if math.isfinite(change)]
  scale = max(finite, default=0.0) or 1.0
  ranked = sorted(
    range(len(layers)), key=lambda i: (-changes[i] if changes[i] == changes[i] else -math.inf, i)
  )
  shown, rest = sorted(ranked[:LAYERS_SHOWN]), ranked[LAYERS_SHOWN:]
  others = ""
  if rest:
    most = max(changes[i] for i in rest)
    others = (
      f"{len(rest)} more layers moved less, each by at most {percent_of_norm(most)} of its norm."
    )
  return LayerTable(tuple(_layer_row(layers[i], changes[i], scale) for i in shown), others)


def relative_change(layer: Mapping[str, Any]) -> float:
  """Return |change| / |weights before|.

  It is 0 where nothing moved, inf where a layer was zero before, NaN where a norm is not finite.
  """
  change, norm = number(layer["norm_change"]), number(layer["norm_before"])
  if not (math.isfinite(change) and math.isfinite(norm)):
    return math.nan
  return 0.0 if change == 0 else change / norm if norm else math.inf


def percent_of_norm(change: float) -> str:
  """Return a relative change in percent, with three digits however small it is."""
  if math.isnan(change):
    return "not finite"
  return (
    "was zero"
    if math.isinf(change)
    else "none"
    if change == 0
    else f"{scientific(100 * change)}{UNIT}"
  )


def pretty_path(path: str) -> str:
  """Return "['hidden']['kernel']" as "hidden / kernel"; any other path as it is."""
  if _KEYS.fullmatch(path):
    path = " / ".join(re.findall(r"\['([^'\]]*)'\]", path))
  return clean(path, 120)


def time_rows(seconds: Mapping[str, Any]) -> tuple[TimeRow, ...]:
  """Return compilation, the method's own steps, what is left of the total, and the total."""
  steps = ["compile", *(name for name in seconds if name not in ("compile", "total"))]
  named = [(_title(name), number(seconds[name])) for name in steps]
  total = number(seconds["total"])
  rest = total - sum(value for _, value in named if math.isfinite(value))
  if rest > 0.005 * total:
    named.append(("Everything else", rest))
  named.append(("Total", total))
  return tuple(TimeRow(name, duration(value), _bar(value, total)) for name, value in named)


def facts(report: Mapping[str, Any], evidence: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
  """Return what was run, as (term, value)."""
  method = dict(report["method"])
  read = report["read"]
  return (
    ("Config", clean(evidence["config"], 120)),
    ("Data set", clean(evidence["dataset"], 120)),
    ("Model", clean(evidence["model"], 120)),
    ("Test examples", f"{evidence['num_test_examples']:,}"),
    ("Method", clean(method.pop("name"))),
    ("Its settings", named_values(method)),
    ("What it reports", named_values(report["info"])),
    ("Predicted by judges", _prediction(report.get("predicted"))),
    ("Read to forget", _listed(read["forget"])),
    ("Read to score", "nothing" if read["score"] is None else f"{clean(read['score'])} examples"),
    ("Time", "not recorded" if report["time"] is None else clean(report["time"])),
    (
      "Versions",
      ", ".join(f"{clean(str(k))} {clean(str(v))}" for k, v in sorted(report["versions"].items())),
    ),
  )


def _title(name: str) -> str:
  return clean(name.replace("_", " ").capitalize())


def _listed(names: Sequence[str]) -> str:
  return " and ".join(clean(name) for name in names)


def _prediction(predicted: Mapping[str, Any] | None) -> str:
  """What judges foresaw, beside which the measured scores stand."""
  if predicted is None:
    return "not predicted"
  retain, error = (percent(number(predicted[k])) for k in ("retain_accuracy", "forget_error"))
  return f"accuracy of kept classes {retain}, error of forgotten ones {error}"


def fingerprints(report: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
  """Return what identifies the files, as (term, value)."""
  copies = {"Params": report, "Moving average": moving_average(report)}
  return (
    ("Checkpoint", clean(report["checkpoint"], 400)),
    ("Codes, SHA-256", clean(report["codes_sha256"], 128)),
    *(
      (f"{name} {when}, SHA-256", clean(copy[f"params_sha256_{when}"], 128))
      for name, copy in copies.items()
      for when in ("before", "after")
      if copy is not None
    ),
  )


def _layer_row(layer: Mapping[str, Any], change: float, scale: float) -> LayerRow:
  share = number(layer["share_changed"])
  shape = " × ".join(str(n) for n in layer["shape"]) or "scalar"
  return LayerRow(
    path=pretty_path(layer["path"]),
    shape=f"{shape} = {layer['size']:,}" if len(layer["shape"]) > 1 else f"{layer['size']:,}",
    relative=percent_of_norm(change),
    relative_bar=_bar(change, scale),
    share="–" if math.isnan(share) else percent(share),
    share_bar=_bar(share, 1.0),
    largest=scientific(number(layer["max_change"])),
  )


def _bar(value: float, full: float) -> float:
  if math.isinf(value) and value > 0:
    return 100.0
  if not (math.isfinite(value) and math.isfinite(full)) or full <= 0:
    return 0.0
  return round(100 * min(1.0, max(0.0, value / full)), 2)

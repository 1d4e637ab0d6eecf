"""The plain tables: scores beside controls, layers, seconds, and the facts that identify a run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mnemonic_jax.report.schema import moving_average, number
from mnemonic_jax.report.wording import UNIT, clean, duration, percent, scientific

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
  """Return the trained model, this forget, both of the moving average where there is one, and every control, in one form."""
  before = (
    "Before",
    False,
    report["retain_accuracy_before"],
    report["forget_error_before"],
    "the trained model",
  )
  this = (
    "This forget",
    True,
    report["retain_accuracy_after"],
    report["forget_error_after"],
    "from the codes alone",
  )
  others = [
    (c["name"], False, c["retain_accuracy"], c["forget_error"], str(c["note"])) for c in controls
  ]
  if (average := moving_average(report)) is not None:
    others[:0] = (
      (
        f"Moving average, {when}",
        False,
        average[f"retain_accuracy_{when}"],
        average[f"forget_error_{when}"],
        note,
      )
      for when, note in (
        ("before", "a copy of the params that may be served too"),
        ("after", "the same forget of it"),
      )
    )
  return tuple(
    ScoreRow(
      clean(str(name)), marked, percent(number(retain)), percent(number(error)), clean(note, 300)
    )
    for name, marked, retain, error, note in (before, this, *others)
  )


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
  """Return |change| / |weights before|: 0 where nothing moved, inf where a layer left zero, NaN where not finite."""
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
  """Return the parts of the time, what is left of the total, and the total."""
  parts = {name: number(seconds[name]) for name in ("compile", "fisher", "perturb")}
  total = number(seconds["total"])
  rest = total - sum(value for value in parts.values() if math.isfinite(value))
  named = [
    ("Compile", parts["compile"]),
    ("Fishers", parts["fisher"]),
    ("Perturb and choose the sign", parts["perturb"]),
  ]
  if rest > 0.005 * total:
    named.append(("Everything else", rest))
  named.append(("Total", total))
  return tuple(TimeRow(name, duration(value), _bar(value, total)) for name, value in named)


def facts(report: Mapping[str, Any], evidence: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
  """Return what was run, as (term, value)."""
  sign = "+1: along the amplitude" if report["sign"] == 1 else "−1: against the amplitude"
  return (
    ("Config", clean(evidence["config"], 120)),
    ("Data set", clean(evidence["dataset"], 120)),
    ("Model", clean(evidence["model"], 120)),
    ("Test examples", f"{evidence['num_test_examples']:,}"),
    ("Strength", f"λ₁ = {report['lambda1']:g}, λ₂ = {report['lambda2']:g}"),
    ("Sign", sign),
    (
      "Versions",
      ", ".join(f"{clean(str(k))} {clean(str(v))}" for k, v in sorted(report["versions"].items())),
    ),
  )


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

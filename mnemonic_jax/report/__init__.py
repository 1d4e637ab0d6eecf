"""The report: one self-contained HTML page per forget.

    report (the forget JSON) + evidence (confusions, losses, layers) + codes -> render -> HTML

It is made of plain data and does not import jax. `schema` describes what goes in, `wording` says
what counts as forgotten. Checks, words and geometry are in Python, markup is in the template.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from mnemonic_jax.report import by_class, histograms, pictures, tables, wording
from mnemonic_jax.report.schema import moving_average, number, validate

__all__ = ["render", "validate"]


def render(report: Mapping[str, Any], evidence: Mapping[str, Any], codes: np.ndarray | None) -> str:
  """Make one self-contained HTML page of a forget: no script, no network, no other file.

  Guarantees: a pure function; the same input gives the same bytes. All text is escaped.

  Edge cases:
    NaN and None are shown as "no examples"; infinite and huge losses are counted in the last bar.
    Above 30 classes the tables are cut, and say what they leave out.
    Codes of a shape that is no picture are drawn as strips.

  Args:
    report: the forget JSON, see `schema.REPORT`.
    evidence: what is shown beyond it, see `schema.EVIDENCE`.
    codes: (C, K, *shape) floats, or None to hide them: codes trigger their classes.

  Returns:
    The HTML text, to be written as UTF-8.

  Raises:
    ValueError: a key is missing, or a value has the wrong type, length or range; the message
      names it.
  """
  validate(report, evidence)
  names, classes = evidence["class_names"], sorted(report["classes"])
  verdict = wording.verdict(report, names)
  return _template().render(
    title=f"Forgetting {wording.class_list(sorted(report['requested']), names)}",
    verdict=verdict,
    tiles=_tiles(report, names),
    forgotten=wording.class_list(classes, names),
    one=len(classes) == 1,
    tag="forgotten" if verdict.kind in ("good", "costly") else "to forget",
    scores=tables.score_rows(report, evidence["controls"]),
    controlled=bool(evidence["controls"]),
    accuracy=by_class.accuracy_table(report, names),
    confusion=by_class.confusion(report, evidence),
    histograms=histograms.histograms(evidence["losses"], len(names)),
    gallery=None if codes is None else pictures.gallery(codes, classes, names),
    layers=tables.layer_table(evidence["layers"]),
    seconds=tables.time_rows(report["seconds"]),
    facts=tables.facts(report, evidence),
    fingerprints=tables.fingerprints(report),
    alarms=_alarms(report, evidence, verdict, names),
  )


def _tiles(report: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str, str]]:
  """Return the four figures at the top as (label, value, note)."""
  error = [number(report[f"forget_error_{when}"]) for when in ("before", "after")]
  kept = [number(report[f"retain_accuracy_{when}"]) for when in ("before", "after")]
  drop, whose = by_class.worst_drop(report, names)
  return [
    (
      "Error on what was to be forgotten",
      wording.percent(error[1]),
      f"before: {wording.percent(error[0])}",
    ),
    (
      "Accuracy on what was kept",
      wording.percent(kept[1]),
      f"before: {wording.percent(kept[0])}, change: {wording.points(kept[1] - kept[0])} points",
    ),
    ("Worst change of a kept class", drop, whose),
    ("Time for the forget", *_times(report)),
  ]


def _alarms(
  report: Mapping[str, Any],
  evidence: Mapping[str, Any],
  verdict: wording.Verdict,
  names: Sequence[str],
) -> list[str]:
  """Return warnings: params that did not change, an average unlike the badge, answers of NaN."""
  average, alarms = moving_average(report), []
  for whose, copy in ("", report), (" of the moving average", average):
    if copy is not None and copy["params_sha256_before"] == copy["params_sha256_after"]:
      alarms.append(
        f"The weights{whose} after are the weights{whose} before: both have the same SHA-256. "
        "Nothing was changed."
      )
  unanswered = evidence.get("unanswered", {}).get("after", 0)
  if unanswered:
    examples = "example gets" if unanswered == 1 else "examples get"
    alarms.append(
      f"{wording.count(unanswered).capitalize()} test {examples} no answer after the forget: the "
      "outputs are not numbers (NaN). They count as wrong, and are not in the table of answers."
    )
  if average is not None:
    its = wording.verdict({**report, **average}, names)
    if its.kind != verdict.kind:
      alarms.append(
        "The moving average of the params, which may be served too, came out differently: "
        f"{its.label}."
      )
  return alarms


def _times(report: Mapping[str, Any]) -> tuple[str, str]:
  total, compiling = (
    wording.duration(number(report["seconds"][key])) for key in ("total", "compile")
  )
  return total, f"compiling: {compiling}"


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("mnemonic_jax", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template("template.html.j2")

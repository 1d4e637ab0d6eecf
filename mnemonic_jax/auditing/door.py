"""The door: audit what a model still knows about the classes that it forgot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from mnemonic_jax._records import array_sha256, params_sha256, plain
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.auditing import checks, questions
from mnemonic_jax.auditing.panel import Panel, Result
from mnemonic_jax.auditing.report import AuditReport
from mnemonic_jax.auditing.subjects import FeaturesFn, Reader
from mnemonic_jax.auditing.verdicts import Threshold, judge

PyTree = Any
_REQUEST = "request"
_THRESHOLDS = "thresholds"


def audit(
  logits_fn: LogitsFn,
  before: PyTree,
  after: PyTree,
  *,
  train: Iterable[Any],
  test: Iterable[Any],
  classes: Iterable[int],
  retrained: Sequence[PyTree] = (),
  features_fn: FeaturesFn | None = None,
  codes: Any = None,
  metrics: Iterable[str] | None = None,
  done: Mapping[str, Any] | None = None,
  on_metric: Callable[[str, Result], None] | None = None,
) -> AuditReport:
  """Audit a forgetting: the panel of metrics, and for each question whether Retrain does as well.

  docs/metrics.md defines each metric. A verdict is "as retrained" where the value is one that a
  further Retrain would have with 95 % probability, judged by the Retrains alone ("not as retrained"
  else); "cannot tell" where the model before would pass too; "no reference" with fewer than three
  Retrains. Thresholds are fixed before anything is read of `after`.

  Guarantees:
    Works for any function. Features of as many stages as fit in 1 GiB are held at once. Draws are
    seeded, so the same arguments give the same report. Nothing is read from disk or written.

  Edge cases:
    too few examples for an attack, or a head that cannot be attacked: that metric is left out, and
    `AuditReport.skipped` says why.

  Args:
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode.
    before, after: the model before and after forgetting: params of `logits_fn`, or a `mj.Subject`.
    train, test: yield (inputs, labels) or (inputs, labels, mask), the same each time they are
      iterated: a list, say. Both hold examples of every class in `classes`. train is read several
      times; a sample of the training data will do.
    classes: the forgotten classes.
    retrained: models that were trained without these classes, from other seeds: params or
      `mj.Subject`s.
    features_fn: (params, inputs) -> {name: (N, ..., F)}, features by stage, for the models that are
      no `mj.Subject`. None: the arrays at the sites of `mj.Projection`, and the head's input.
    codes: (C, K, *shape), or `mj.LearnedCodes`: codes of `before`, tried as triggers.
    metrics: those to measure, out of outputs, features, prototype, relearn, routing, membership,
      tow, distance and codes; None: all. Outputs are always measured.
    done: results of an audit that was interrupted, as `on_metric` was given them; they are not
      measured again.
    on_metric: called with name and result, plain values as JSON has them, when a metric is done.

  Returns:
    `AuditReport`.

  Raises:
    TypeError, ValueError: see the message; among others a Retrain of another architecture, one that
      saw the class, NaN logits, a class without examples, `done` of another audit.

  >>> w, data = 9 * jnp.eye(3), [(jnp.tile(jnp.eye(3), (4, 1)), np.tile(np.arange(3), 4))]
  >>> forgotten = w - 18 * jnp.eye(3)[:, :1] * jnp.eye(3)[:1]
  >>> report = audit(
  ...   lambda w, x: x @ w, w, forgotten, train=data, test=data, classes=[0], metrics=["outputs"]
  ... )
  >>> report.verdict("forget error"), report.results["after/outputs"]["forget_error"][0]
  ('no reference', 1.0)
  """
  chosen = checks.require_metrics(metrics)
  models = checks.require_models(logits_fn, before, after, retrained, features_fn)
  data, inputs = checks.require_data(models["before"], train, test, classes)
  readers = {name: Reader(name, model, data) for name, model in models.items()}
  checks.require_outputs(readers, inputs)
  stages = checks.require_stages(readers, inputs) if "features" in chosen else ()
  arrays = checks.require_codes(codes, inputs, data.num_classes)
  panel = Panel(data, readers["before"], inputs, arrays)
  record = _Record({} if done is None else done, on_metric)
  request = _request(readers, chosen, stages, arrays)
  checks.require_distinct(request["params"])
  record.require_request(request)
  others = [name for name in readers if name not in ("before", "after")]

  for name in (*others, "before"):
    _measure(record, panel, readers[name], chosen, stages)
    if name in others:
      checks.require_unseen(name, record.results[f"{name}/outputs"], data)
  compared = others if "routing" in chosen else []
  for index, name in enumerate(compared):
    for other in ("before", *others[:index]):
      record.step(f"{other} & {name}", partial(panel.pair, readers[other], readers[name]))
  fixed = questions.thresholds(record.results, stages, others)
  record.step(_THRESHOLDS, lambda: {each.question.name: _ends(each) for each in fixed})

  _measure(record, panel, readers["after"], chosen, stages)
  for name in compared:
    record.step(f"after & {name}", partial(panel.pair, readers["after"], readers[name]))
  found = [
    judge(each, questions.after(record.results, each.question, stages, others)) for each in fixed
  ]
  left = questions.probe_left(record.results, stages, others)
  results = {key: value for key, value in record.results.items() if key != _REQUEST}
  return AuditReport(data.classes, len(others), tuple(stages), tuple(found), left, results)


class _Record:
  """What is done, and who is told of it."""

  def __init__(self, done: Mapping[str, Any], told: Callable[..., None] | None) -> None:
    self.results, self.told = checks.require_done(done), told

  def add(self, name: str, result: Result) -> None:
    """Keep a result."""
    self.results[name] = result
    if self.told is not None:
      self.told(name, result)

  def step(self, name: str, measure: Callable[[], Result]) -> None:
    """Measure what is not done."""
    if name not in self.results:
      self.add(name, measure())

  def require_request(self, request: Result) -> None:
    """Refuse results of another audit."""
    if self.results and self.results.get(_REQUEST) != request:
      old = self.results.get(_REQUEST, {})
      other = [key for key in request if old.get(key) != request[key]]
      raise ValueError(
        f"done: is of another audit: {', '.join(other)} differ. Expected the results that "
        "on_metric was given by a call with the same arguments; pass None to begin anew."
      )
    self.step(_REQUEST, lambda: request)


def _measure(
  record: _Record, panel: Panel, reader: Reader, chosen: tuple[str, ...], stages: Sequence[str]
) -> None:
  """Measure one model, metric by metric."""
  record.step(f"{reader.name}/outputs", partial(panel.outputs, reader))
  missing = [name for name in stages if f"{reader.name}/features/{name}" not in record.results]
  for name, result in panel.features(reader, missing):
    record.add(f"{reader.name}/features/{name}", result)
  for name, way in panel.of_one(chosen).items():
    if not (name == "distance" and reader.name == "before"):
      record.step(f"{reader.name}/{name}", partial(way, reader))


def _ends(fixed: Threshold) -> Result:
  found = {"low": fixed.low, "high": fixed.high, "retrains_that_pass": fixed.passed}
  return plain(found)


def _request(
  readers: dict[str, Reader], chosen: tuple[str, ...], stages: Sequence[str], codes: Any
) -> Result:
  """What tells one audit from another."""
  data = readers["before"].data
  return {
    "classes": list(data.classes),
    "metrics": list(chosen),
    "stages": list(stages),
    "test": array_sha256(data.test_labels),
    "train": array_sha256(data.train_labels),
    "codes": None if codes is None else array_sha256(codes),
    "params": {name: params_sha256(reader.subject.params) for name, reader in readers.items()},
  }

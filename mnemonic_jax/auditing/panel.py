"""The panel: what is measured of one model, and of a pair of models; plain values, as JSON has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from mnemonic_jax._records import plain
from mnemonic_jax.auditing import (
  distance,
  linear_probe,
  membership,
  nearest_mean,
  outputs,
  prototype,
  relearn,
  routing,
  stages,
  subjects,
  tow,
  trigger,
)
from mnemonic_jax.auditing.intervals import Estimate, of_variance, wilson
from mnemonic_jax.auditing.subjects import Data, Reader

Result = dict[str, Any]

SHOTS = 10  # of each forgotten class, to relearn from
_KEPT = 1000  # examples of kept classes to relearn from
_FEATURE_BYTES = 2**30  # of features that are held at once
_SEED = 0  # of all draws

# What may be chosen; "outputs" is always measured.
METRICS = (
  "outputs",
  "features",
  "prototype",
  "relearn",
  "routing",
  "membership",
  "tow",
  "distance",
  "codes",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
  """The examples of an audit, and what its metrics draw from them.

  Attributes:
    data: the examples.
    before: the model before.
    inputs: the first batch of test inputs, for shapes.
    codes: (C, K, *shape), or None.
  """

  data: Data
  before: Reader
  inputs: Any
  codes: Any = None

  def outputs(self, reader: Reader) -> Result:
    """A_R, E_F, each class, the worst kept class, and the head-only control."""
    data, before = self.data, self.before.test.found
    score = lambda found: outputs.output_scores(found, data.num_classes, data.classes, before)
    found = dataclasses.asdict(score(reader.test.found))
    head_only = score(reader.test.head_only)
    found["head_only"] = {
      name: getattr(head_only, name) for name in ("retain_accuracy", "forget_error", "worst_drop")
    }
    return plain(found)

  def features(self, reader: Reader, names: list[str]) -> Iterator[tuple[str, Result]]:
    """The probe and the nearest class mean at some stages, of which few are held at once."""
    if not names:
      return
    data, widths = self.data, reader.widths(self.inputs)
    rows = len(data.train_labels) + len(data.test_labels)
    for group in grouped({name: 4 * rows * widths[name] for name in names}, _FEATURE_BYTES):
      train, test = (reader.features(split, group) for split in ("train", "test"))
      for name in group:
        whole = train.pop(name), data.train_labels, test.pop(name), data.test_labels
        yield name, self._readable(*whole)

  def _readable(self, *whole: Any) -> Result:
    count = self.data.num_classes
    probe = linear_probe.linear_probe(*whole, num_classes=count)
    nearest = nearest_mean.nearest_mean_accuracy(*whole, num_classes=count)
    return plain(
      {
        "probe": self._of_forgotten(probe.accuracy),
        "probe_per_class": probe.accuracy,
        "probe_converged": probe.converged,
        "probe_steps": probe.steps,
        "nearest_mean": self._of_forgotten(nearest),
        "nearest_mean_per_class": nearest,
      }
    )

  def _of_forgotten(self, accuracy: np.ndarray) -> Estimate:
    """The share of right answers among the test examples of the forgotten classes."""
    gone = list(self.data.classes)
    totals = np.bincount(self.data.test_labels, minlength=self.data.num_classes)[gone]
    return wilson(float(np.round(accuracy[gone] * totals).sum()), float(totals.sum()))

  def prototype(self, reader: Reader) -> Result:
    """The prototype attack, over several draws of its examples."""
    static, arrays = reader.logits_fn
    model = stages.look(static, arrays, reader.subject.params, self.inputs)
    if model.head is None:
      return skipped(f"the head cannot be attacked: {model.why}")
    draws, inputs = self._shots
    features = np.concatenate([reader.head_input(batch) for batch in self._batches(inputs)])
    test, right, at = self._forgotten_test, [], 0
    for draw in draws:
      shots = {}
      for label, rows in draw.items():
        shots[label], at = features[at : at + len(rows)], at + len(rows)
      params = prototype.attacked(model, reader.subject.params, shots)
      found = reader.answers(*test, params)
      right.append(found.predictions == found.labels)
    return plain(
      {"recovered": prototype.recovered(right), "each_draw": np.mean(right, axis=1).tolist()}
    )

  @cached_property
  def _shots(self) -> tuple[list[dict[int, np.ndarray]], np.ndarray]:
    """The positions of each draw, and their inputs one after the other."""
    labels = self.data.train_labels
    draws = [
      prototype.draw(labels, self.data.classes, _SEED + index) for index in range(prototype.DRAWS)
    ]
    rows = np.concatenate([rows for draw in draws for rows in draw.values()])
    return draws, self._train_inputs(rows)

  def relearn(self, reader: Reader) -> Result:
    """Both relearn curves: accuracy on the forgotten classes after some steps."""
    shots, kept = self._relearning
    inputs, labels = self._forgotten_test
    found: Result = {"steps": list(relearn.STEPS)}
    for name, some in (("shots", shots), ("kept", None)):
      batch_of = relearn.batches_from(kept, some, _SEED)
      models = relearn.fine_tuned(reader.subject.logits_fn, reader.subject.params, batch_of)
      answers = [reader.answers(inputs, labels, params) for _, params in models]
      right = np.stack([each.predictions == each.labels for each in answers])
      mean = right.mean(0)
      found[name] = [wilson(float(row.sum()), row.size) for row in right]
      variance = float(mean.var(ddof=1) / mean.size) if mean.size > 1 else 0.0
      found[f"{name}_mean"] = of_variance(float(mean.mean()), variance, mean.size)
    return plain(found)

  @cached_property
  def _relearning(self) -> tuple[Any, Any]:
    """(inputs, labels) of shots of the forgotten classes, and of kept ones."""
    labels, rng = self.data.train_labels, np.random.default_rng(_SEED)
    draw = prototype.draw(labels, self.data.classes, _SEED, SHOTS)
    others = np.flatnonzero(~np.isin(labels, self.data.classes))
    kept = rng.choice(others, min(_KEPT, len(others)), replace=False)
    shots = np.concatenate(list(draw.values()))
    return (self._train_inputs(shots), labels[shots]), (self._train_inputs(kept), labels[kept])

  def routing(self, reader: Reader) -> Result:
    """Where the forgotten classes' test examples go."""
    test, data = reader.test, self.data
    found = test.forgotten_logits.argmax(1)
    routes = routing.routes(found, test.forgotten_labels, data.classes, data.num_classes)
    return plain({"routes": routes})

  def membership(self, reader: Reader) -> Result:
    """The loss attack."""
    return plain(
      {"auc": membership.loss_attack(reader.train, reader.test.found, self.data.classes)}
    )

  def tow(self, reader: Reader) -> Result:
    """The accuracies that ToW compares."""
    data = self.data
    found = tow.accuracies(reader.train, reader.test.found, data.num_classes, list(data.classes))
    return plain(found._asdict())

  def distance(self, reader: Reader) -> Result:
    """How far the params are from those of the model before."""
    found = distance.parameter_distance(self.before.subject.params, reader.subject.params)
    return plain(found)

  def trigger(self, reader: Reader) -> Result:
    """The forgotten classes' codes as triggers."""
    per_class, shape = self.codes.shape[1], self.codes.shape[2:]
    inputs = self._batches(np.asarray(self.codes).reshape(-1, *shape))
    found = np.concatenate([reader.logits(batch).argmax(1) for batch in inputs])
    found = found[: self.data.num_classes * per_class].reshape(-1, per_class)
    return plain({"triggered": trigger.trigger_rate(found, self.data.classes)})

  def pair(self, first: Reader, second: Reader) -> Result:
    """What compares a model with a Retrain on the forgotten classes' test examples."""
    one, other, data = first.test, second.test, self.data
    pair, labels = (one.forgotten_logits, other.forgotten_logits), one.forgotten_labels
    goes = [logits.argmax(1) for logits in pair]
    distance_of = routing.routing_distance
    found = {"routing": distance_of(goes[0], goes[1], labels, data.classes, data.num_classes)}
    if len(labels) >= routing.FOLDS:
      found["separability"] = routing.separability(*pair, data.classes)
    return plain(found)

  @cached_property
  def _forgotten_test(self) -> tuple[list[Any], np.ndarray]:
    """The forgotten classes' test inputs in batches, and their labels."""
    labels = self.data.test_labels
    rows = np.flatnonzero(np.isin(labels, self.data.classes))
    inputs = subjects.gathered(self.data.test, labels, rows, "test")
    return self._batches(inputs), labels[rows]

  def _train_inputs(self, rows: np.ndarray) -> np.ndarray:
    return subjects.gathered(self.data.train, self.data.train_labels, rows, "train")

  def _batches(self, inputs: Any) -> list[Any]:
    """Batches as large as the first of the test examples, so that one program serves all."""
    size = len(self.inputs)
    cuts = range(0, len(inputs), size)
    return [subjects.filled(inputs[at : at + size], size) for at in cuts]

  def of_one(self, chosen: tuple[str, ...]) -> dict[str, Callable[[Reader], Result]]:
    """The metrics of one model but "outputs" and "features", by name."""
    ways: dict[str, Callable[[Reader], Result]] = {
      "prototype": self.prototype,
      "relearn": self.relearn,
      "routing": self.routing,
      "membership": self.membership,
      "tow": self.tow,
      "distance": self.distance,
    }
    if self.codes is not None:
      ways["codes"] = self.trigger
    found = {name: way for name, way in ways.items() if name in chosen}
    counts = np.bincount(self.data.train_labels, minlength=self.data.num_classes)
    fewest = int(counts[list(self.data.classes)].min())
    for name, needed in (("prototype", prototype.SHOTS), ("relearn", SHOTS), ("membership", 2)):
      if name in found and fewest < needed:
        why = f"train has {fewest} examples of a forgotten class; it needs {needed}"
        found[name] = lambda reader, why=why: skipped(why)  # type: ignore[misc]
    return found


def skipped(why: str) -> Result:
  """The result of what could not be measured."""
  return {"skipped": why}


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
  """Put names together, in order, as long as their sizes stay below a limit; one at least.

  >>> grouped({"a": 3, "b": 3, "c": 9, "d": 1}, 6)
  [['a', 'b'], ['c'], ['d']]
  """
  groups: list[list[str]] = []
  room = 0
  for name, size in sizes.items():
    if not groups or size > room:
      groups.append([])
      room = limit
    groups[-1].append(name)
    room -= size
  return groups

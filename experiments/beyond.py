"""Forget models that were trained without codes: every method, beside Retrain and the head edit.

Command:  python experiments/beyond.py CONFIG --data-dir DIR [--seeds 0] [--cases 0 3 0,1,2]
          [--retrain 0 3] [--heal 0 3] [--relearn 0] [--paths 0 3] [--sources 0]
          [--depth 8] [--equinox] [--runs FOLDER]

Trains what is missing with codes.rate 0 (a training that was stopped resumes), learns codes from
the training data and recalls others from the model alone, and forgets each case by each method.
One line a row goes to experiments/results/beyond_NAME.jsonl as soon as it is measured; a row that
is there already is not measured again. Figures are on the test split, in %; settings are chosen
without it. A probe is fitted only where the case has a Retrain (--retrain). --heal and --relearn
name the cases that get rows of healing and of the last stages learned anew; --paths those whose
judges are compared with test data along whole paths of strengths. --equinox trains the CNN of
equinox_cnn.py on the config's data instead of the config's model:
`python experiments/beyond.py mnist_mlp --data.name fashion_mnist --equinox`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import common
import equinox_cnn
import jax
import numpy as np
import paper_tables
from etils import epath

import mnemonic_jax as mj
from mnemonic_jax import evaluation, methods
from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.learning import LearnedCodes
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, learned, renewal, setup
from mnemonic_jax.runs.trained import Trained

CASES = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "0,1,2", "3,4,5", "2,4,8"]
CASES += ["0,2,4,6,8", "1,3,5,7,9"]
# Codes recalled a class: few, and as many as healing and stages that are learned anew want.
FEW, MANY = 8, 64
HEAL_STEPS, RELEARN_STEPS = 150, 800
SHARES = (0.01, 0.1)
QUANTILES = (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)
STRENGTHS = tuple((a, b) for a in (1e-3, 1e-2, 1e-1) for b in (1e-1, 1e0, 1e1, 1e2))


def codes_of(
  model: Trained, config: Any, dataset: Dataset, folder: pathlib.Path
) -> dict[str, LearnedCodes]:
  """Learn and recall the codes of a model, or read those that are there."""
  requests = {"learned": learned.Request()}
  for count in (FEW, MANY):
    requests[f"recalled {count}"] = learned.Request(from_model=True, per_class=count)
  named = {name: name.replace(" ", "_") for name in requests}
  return {
    name: codes_in(folder, named[name], model, config, dataset, request)
    for name, request in requests.items()
  }


def codes_in(
  folder: pathlib.Path, name: str, model: Trained, config: Any, dataset: Dataset, request: Any
) -> LearnedCodes:
  """Learn or recall codes into a file of that name, or read those that are there."""
  path = epath.Path(folder) / f"{name}.safetensors"
  if not path.exists():
    told = learned.learn(model, config, dataset, path, request)
    print(f"{name} codes in {told['seconds']:.1f} s", file=sys.stderr, flush=True)
  sha256 = files.params_sha256(model.params)
  return learned.load(path, sha256, len(dataset.class_names), dataset.shape)


def of_sources(
  model: Trained, config: Any, dataset: Dataset, folder: pathlib.Path
) -> dict[str, LearnedCodes]:
  """Codes learned from a share of the training data, and random ones that nothing was told of."""
  found, train = {}, dataset.train
  order = np.random.default_rng(config.train.seed).permutation(train.num_examples)
  for share in SHARES:
    rows = np.sort(order[: int(share * train.num_examples)])
    part = dataclasses.replace(dataset, train=train.part(rows))
    name = f"learned from {share:.0%}"
    found[name] = codes_in(folder, name, model, config, part, learned.Request())
  inputs = jax.random.uniform(jax.random.key(0), (len(dataset.class_names), 1, *dataset.shape))
  codes = dataset.preprocess(dataset.levels * inputs)
  none = np.zeros((len(codes), 0), np.float32)
  found["random"] = LearnedCodes(codes, codes[:, :0], none, none, none, codes[:, :0])
  return found


def ways(depths: int) -> Iterator[tuple[str, str, Any]]:
  """The rows of a case: a name, which codes, and the method; None for the default."""
  yield "drop_row", "learned", mj.DropRow()
  for name in ("learned", f"recalled {FEW}", f"recalled {MANY}"):
    yield f"default, {name}", name, None
    for depth in range(1, depths + 1):
      yield f"projection {depth}, {name}", name, mj.Projection(depth=depth)
  for depth in range(depths + 1):
    method = mj.Projection(depth=depth, drop_row=False)
    yield f"projection {depth}, row kept, learned", "learned", method
  yield "dampening, searched", "learned", mj.Dampening()
  yield "perturbation, searched", "learned", mj.Perturbation()


def deeper(
  depths: int, case: str, arguments: Any, model: Trained, shape: Any
) -> Iterator[tuple[str, Any]]:
  """The rows with healing, and with stages learned anew, both from many recalled codes."""
  for depth in range(1, depths + 1) if case in arguments.heal else ():
    yield f"projection {depth}, healed", mj.Projection(depth=depth, heal=HEAL_STEPS)
  for depth in (1, 2) if case in arguments.relearn else ():
    wanted = mj.Relearn(depth, None, RELEARN_STEPS)
    yield f"relearn {depth}", renewal.completed(wanted, model, shape)


def paths() -> Iterator[tuple[str, Any]]:
  """The rows that tell whether judges predict: strengths from none to too much."""
  for quantile in QUANTILES:
    yield f"path: dampening {quantile}", mj.Dampening(quantile)
  for strength in STRENGTHS:
    yield f"path: perturbation {strength}", mj.Perturbation(*strength)


class Study:
  """One model of one seed, scored on test data."""

  def __init__(self, model: Trained, dataset: Dataset, out: pathlib.Path, seed: int) -> None:
    self.model, self.dataset, self.out, self.seed = model, dataset, out, seed
    lines = out.read_text().splitlines() if out.exists() else []
    self.done = {(row["seed"], row["case"], row["method"]) for row in map(json.loads, lines)}
    self.right = self._right(model.params)

  def _right(self, params: Any) -> np.ndarray:
    seen = paper_tables.answers(self.model, params, self.dataset)
    return evaluation.scores(seen, len(self.dataset.class_names), [0]).per_class

  def has(self, case: str, name: str) -> bool:
    """Whether a row is there already."""
    return (self.seed, case, name) in self.done

  def add(self, case: str, name: str, params: Any, probe: bool, **more: Any) -> None:
    """Score params, and write the row."""
    classes = [int(c) for c in case.split(",")]
    kept = [c for c in range(len(self.right)) if c not in classes]
    right = self._right(params)
    row = {
      **{"seed": self.seed, "case": case, "method": name},
      "retain_accuracy": 100 * float(right[kept].mean()),
      "forget_error": 100 * float(1 - right[classes].mean()),
      "worst_drop": 100 * float((self.right[kept] - right[kept]).max()),
      **more,
    }
    if probe:
      row["probe"] = float(paper_tables.probe(self.model, params, self.dataset)[classes].mean())
    with self.out.open("a") as file:
      file.write(files.dumps(row) + "\n")
    told = f"{row['retain_accuracy']:.1f} / {row['forget_error']:.1f}"
    told += f" / probe {row['probe']:.1f}" if probe else ""
    print(f"seed {self.seed}, {case}, {name}: {told}", file=sys.stderr, flush=True)

  def forget(self, case: str, name: str, codes: LearnedCodes, method: Any, probe: bool) -> None:
    """Forget a case, and write the row; a search that finds nothing is a row too."""
    classes, started = [int(c) for c in case.split(",")], time.perf_counter()
    try:
      result = mj.forget(
        self.model.logits_fn,
        self.model.params,
        codes,
        classes,
        method=method,
        layer_axis=self.model.model.layer_axis,
      )
    except mj.CannotForget as error:
      row = {"seed": self.seed, "case": case, "method": name, "refused": str(error)}
      with self.out.open("a") as file:
        file.write(files.dumps(row) + "\n")
      print(f"seed {self.seed}, {case}, {name}: refused", file=sys.stderr, flush=True)
      return
    predicted = None if result.predicted is None else result.predicted._asdict()
    self.add(
      case,
      name,
      result.params,
      probe,
      seconds=time.perf_counter() - started,
      predicted=predicted,
      settings=methods.settings(result.method),
    )


def study(
  model: Trained, config: Any, dataset: Dataset, folder: pathlib.Path, arguments: Any, out: Any
) -> None:
  """All rows of one seed that are missing."""
  seed = config.train.seed
  rows, codes = Study(model, dataset, out, seed), codes_of(model, config, dataset, folder)
  others = of_sources(model, config, dataset, folder) if arguments.sources else {}
  images = jax.ShapeDtypeStruct((1, *dataset.shape), "float32")
  plan = mj.explain_projection(model.logits_fn, model.params, images)
  depths = min(arguments.depth, max((site.depth or 0 for site in plan.sites), default=0))
  for case in arguments.cases:
    classes, probe = [int(c) for c in case.split(",")], case in arguments.retrain
    if not rows.has(case, "before"):
      rows.add(case, "before", model.params, probe)
    if not rows.has(case, "head edit"):
      hidden = head_edit(model.params, model.model.head, classes)
      rows.add(case, "head edit", hidden, False)
    for name, source, method in ways(depths):
      if not rows.has(case, name):
        probed = probe and ("projection" in name or "dampening" in name) and "kept" not in name
        rows.forget(case, name, codes[source], method, probed)
    for name, method in deeper(depths, case, arguments, model, dataset.shape):
      if not rows.has(case, name):
        rows.forget(case, name, codes[f"recalled {MANY}"], method, probe)
    for source, own in others.items() if case in arguments.sources else ():
      for depth in range(min(depths, 3) + 1):
        for kept in (False, True) if depth < 2 else (False,):
          name = f"projection {depth}{', row kept' * kept}, {source}"
          if not rows.has(case, name):
            method = mj.Projection(depth=depth, drop_row=not kept)
            rows.forget(case, name, own, method, probe and depth > 0 and not kept)
    for name, method in paths() if case in arguments.paths else ():
      if not rows.has(case, name):
        rows.forget(case, name, codes["learned"], method, False)
    if probe and not rows.has(case, "retrain"):
      retrained = folder / f"without_{case.replace(',', '_')}"
      again = arguments.train(retrained, dataset.without(tuple(classes)), config)
      Study(again, dataset, out, seed).add(case, "retrain", again.params, True)


def table(lines: list[dict[str, Any]]) -> str:
  """Means over seeds and cases of one size, as Markdown."""
  shown = [
    "| classes | method | A_R | E_F | probe | worst drop | cases x seeds |",
    "|---" * 7 + "|",
  ]
  singles = lambda row: "," not in row["case"]
  lines = [row for row in lines if not row["method"].startswith("path")]
  groups = {"singles": [row for row in lines if singles(row)]}
  for case in dict.fromkeys(row["case"] for row in lines if not singles(row)):
    groups[case] = [row for row in lines if row["case"] == case]
  for title, rows in groups.items():
    for name in dict.fromkeys(row["method"] for row in rows):
      own = [row for row in rows if row["method"] == name]
      good = [row for row in own if "refused" not in row]
      refused = f", {len(own) - len(good)} refused" if len(good) < len(own) else ""
      mean = lambda key, good=good: [row[key] for row in good if key in row]
      cells = [
        f"{np.mean(found):.2f}" if (found := mean(key)) else "-"
        for key in ("retain_accuracy", "forget_error", "probe", "worst_drop")
      ]
      shown.append(f"| {title} | {name} | " + " | ".join(cells) + f" | {len(good)}{refused} |")
  return "\n".join(shown)


class Followed(NamedTuple):
  """One strength of one method, in %: what was measured and what judges foresaw."""

  row: dict[str, Any]
  forget_error: tuple[float, float]
  cost: tuple[float, float]  # A_R less the dropped row's


def followed(lines: list[dict[str, Any]]) -> Iterator[Followed]:
  """The rows that follow judges along whole paths, as far as they foresaw anything."""
  heads = {(row["seed"], row["case"]): row for row in lines if row["method"] == "drop_row"}
  for row in lines:
    on_path = row["method"].startswith("path") or "row kept" in row["method"]
    if not on_path or not row.get("predicted") or None in row["predicted"].values():
      continue
    head, foreseen = heads[row["seed"], row["case"]], row["predicted"]
    cost = foreseen["retain_accuracy"] - head["predicted"]["retain_accuracy"]
    yield Followed(
      row,
      (row["forget_error"], 100 * foreseen["forget_error"]),
      (row["retain_accuracy"] - head["retain_accuracy"], 100 * cost),
    )


def of_judges(lines: list[dict[str, Any]]) -> str:
  """How well judges foretell, along whole paths; each point is one strength of one method."""
  points = list(followed(lines))
  costs = np.array([foreseen - measured for _, _, (measured, foreseen) in points])
  errors = np.array([foreseen - real for _, (real, foreseen), _ in points if 5 <= real <= 95])
  if not len(errors):
    return ""
  size = np.abs(errors)
  return (
    f"Judges, {len(size)} points with E_F between 5 and 95: off by {size.mean():.1f} on average "
    f"(bias {errors.mean():+.1f}), at most 10 in {100 * np.mean(size <= 10):.0f} %. A_R against "
    f"the head edit's, {len(costs)} points: off by {np.abs(costs).mean():.1f} on average, at most "
    f"2 in {100 * np.mean(np.abs(costs) <= 2):.0f} %."
  )


def main() -> None:
  """Train what is missing, measure what is missing, print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("config", help="a named config or a TOML file")
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument("--runs", type=pathlib.Path, help="where trainings and codes go")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  parser.add_argument("--cases", nargs="*", default=CASES, help="classes, joined by commas")
  parser.add_argument(
    "--retrain", nargs="*", default=[], help="cases that get a Retrain and probes"
  )
  parser.add_argument("--depth", type=int, default=8, help="the deepest projection that is tried")
  for name, what in (("heal", "rows of healing"), ("relearn", "stages learned anew")):
    parser.add_argument(f"--{name}", nargs="*", default=[], help=f"cases that get {what}")
  help = "cases with codes from 1 %% and 10 %% of the data, and random ones"
  parser.add_argument("--sources", nargs="*", default=[], help=help)
  parser.add_argument("--paths", nargs="*", default=[], help="cases whose judges are followed")
  parser.add_argument("--equinox", action="store_true", help="the CNN of equinox_cnn.py")
  overrides, rest = dotted_overrides(sys.argv[1:])
  arguments = parser.parse_args(rest)
  arguments.train = equinox_cnn.trained if arguments.equinox else paper_tables.trained
  config = configs.load(arguments.config, {"codes.rate": 0.0, **overrides})
  dataset = setup.load_data(config, arguments.data_dir)
  name = f"beyond_{common.study_name(config, overrides)}{'_equinox' * arguments.equinox}"
  folder = arguments.runs or pathlib.Path("runs") / name
  out = common.RESULTS / f"{name}.jsonl"
  for seed in arguments.seeds:
    seeded = configs.build(config.name, configs.as_dict(config), {"train.seed": seed})
    model = arguments.train(folder / f"seed{seed}", dataset, seeded)
    study(model, seeded, dataset, folder / f"codes{seed}", arguments, out)
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  print(table(lines), of_judges(lines), sep="\n\n")


if __name__ == "__main__":
  main()

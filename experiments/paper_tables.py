"""The paper's tables for any config: one class over training seeds, and every class alone.

Command:  python experiments/paper_tables.py CONFIG --data-dir DIR [--seeds 0 1 2] [--also 1e-3 1]

Other fields of the config can be overridden (--data.name cifar100). Trains what is missing (a
training that was stopped resumes, one that is done is not repeated): with codes, without them, and
without the forgotten class, each seed. Strength, class and recipe are the config's, `--also` adds
another strength (one that strength_grid.py chose, say); figures are on the test split.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import common
import jax
import numpy as np

import mnemonic_jax as mj
from mnemonic_jax import evaluation
from mnemonic_jax.auditing.linear_probe import probe_accuracy
from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.data import Dataset, Split
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup
from mnemonic_jax.runs import train as train_run
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.forget import resolve
from mnemonic_jax.runs.scoring import Predictions, predict_each
from mnemonic_jax.runs.trained import Trained


class Scores(NamedTuple):
  """In percent, on test data."""

  retain_accuracy: float
  forget_error: float


def answers(model: Trained, params: Any, dataset: Dataset) -> Predictions:
  """What the model answers on the test set."""
  return predict_each(model.logits_fn, [params], dataset.test, dataset.preprocess)[0]


def trained(folder: pathlib.Path, dataset: Dataset, config: Config) -> Trained:
  """Train into `folder`, or resume, or take what is there."""
  run = RunFolder.create(folder, config)
  train_run.train(run, dataset)
  return trained_run.restore(run, dataset)


def score(model: Trained, params: Any, dataset: Dataset, classes: list[int]) -> Scores:
  """A_R and E_F of `params` on the test set."""
  return scores_of(answers(model, params, dataset), len(dataset.class_names), classes)


def scores_of(seen: Predictions, num_classes: int, classes: list[int]) -> Scores:
  """A_R and E_F of one model's answers, for any classes."""
  found = evaluation.scores(seen, num_classes, classes)
  return Scores(100 * found.retain_accuracy, 100 * found.forget_error)


def probe(model: Trained, params: Any, dataset: Dataset) -> np.ndarray:
  """Per-class test accuracy, in percent, of a linear head refitted on all training features."""
  compute = jax.jit(
    lambda images: model.model.features(params, model.model_state, dataset.preprocess(images))
  )

  def features(split: Split) -> np.ndarray:
    return np.concatenate([compute(images) for images, _ in split.batches(2500)])

  return 100 * probe_accuracy(
    features(dataset.train), dataset.train.labels, features(dataset.test), dataset.test.labels
  )


def one_class(
  runs: dict[str, pathlib.Path],
  dataset: Dataset,
  config: Config,
  strengths: list[mj.Perturbation],
  seeds: list[int],
) -> dict[str, list[tuple[float, float, float]]]:
  """Method -> for each seed A_R, E_F and the probe of the forgotten class.

  `runs` gives the folders of each kind of training.
  """
  (index,) = resolve(config.forget.classes, dataset.class_names)
  rows: dict[str, list[tuple[float, float, float]]] = {}

  def add(name: str, model: Trained, params: Any) -> None:
    row = (*score(model, params, dataset, [index]), float(probe(model, params, dataset)[index]))
    rows.setdefault(name, []).append(row)
    print(f"{name}: " + " ".join(f"{value:.2f}" for value in row), flush=True)

  for seed in seeds:
    seeded = configs.build(config.name, configs.as_dict(config), {"train.seed": seed})
    model = trained(runs["codes"] / str(seed), dataset, seeded)
    add("Before", model, model.params)
    for strength in strengths:
      result = mj.forget(model.logits_fn, model.params, model.codes, [index], method=strength)
      add(
        "Mnemonic code" + (f" {shown(strength)}" if len(strengths) > 1 else ""),
        model,
        result.params,
      )
    add("Head edit", model, head_edit(model.params, model.model.head, [index]))
    again = trained(runs["retrain"] / str(seed), dataset.without((index,)), seeded)
    add("Retrain", again, again.params)
    if "plain" in runs:
      without = configs.build(config.name, configs.as_dict(seeded), {"codes.rate": 0.0})
      plain = trained(runs["plain"] / str(seed), dataset, without)
      add("Before, trained without codes", plain, plain.params)
  return rows


def shown(strength: mj.Perturbation) -> str:
  """A strength in a table."""
  return f"({strength.lambda1:g}, {strength.lambda2:g})"


def every_class(
  model: Trained, dataset: Dataset, strength: mj.Perturbation
) -> list[dict[str, float]]:
  """Each class forgotten alone from one model."""
  rows = []
  seen, num_classes = answers(model, model.params, dataset), len(dataset.class_names)
  for index in range(num_classes):
    result = mj.forget(model.logits_fn, model.params, model.codes, [index], method=strength)
    before = scores_of(seen, num_classes, [index])
    after = score(model, result.params, dataset, [index])
    hidden = score(model, head_edit(model.params, model.model.head, [index]), dataset, [index])
    rows.append(
      {
        "class": index,
        "retain_before": before.retain_accuracy,
        "retain_after": after.retain_accuracy,
        "forget_error": after.forget_error,
        "head_edit_retain": hidden.retain_accuracy,
        "sign": result.info["sign"],
      }
    )
  return rows


def print_one_class(title: str, rows: dict[str, list[tuple[float, float, float]]]) -> None:
  """Means and standard deviations over the seeds, as a markdown table."""
  print(f"\n| {title} | A_R % | E_F % | probe % |\n|---|---|---|---|")
  for name, values in rows.items():
    cells = (
      f"{np.mean(column):.2f} ± {np.std(column):.2f}" for column in zip(*values, strict=True)
    )
    print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
  """Train what is missing, print the tables, save the figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("config", help="a named config or a TOML file")
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument(
    "--runs", type=pathlib.Path, help="where the run folders go (default: runs/CONFIG)"
  )
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--also", type=float, nargs=2, metavar=("LAMBDA1", "LAMBDA2"), help="a second strength"
  )
  parser.add_argument("--plain", action="store_true", help="also train without codes")
  overrides, rest = dotted_overrides(sys.argv[1:])
  arguments = parser.parse_args(rest)
  if "train.seed" in overrides:
    parser.error("--train.seed: is varied here; use --seeds.")
  config = configs.load(arguments.config, overrides)
  if len(config.forget.classes) != 1:
    parser.error(f"--forget.classes: got {list(config.forget.classes)}; expected one class.")
  dataset = setup.load_data(config, arguments.data_dir)
  name = common.study_name(config, overrides)
  folder = arguments.runs or pathlib.Path("runs") / name
  kinds = ("codes", "retrain", "plain") if arguments.plain else ("codes", "retrain")
  runs = {kind: folder / kind for kind in kinds}
  strengths = [configs.make_method(config.forget)]
  strengths += [mj.Perturbation(*arguments.also)] if arguments.also else []
  if len(set(map(shown, strengths))) < len(strengths):
    parser.error(
      f"--also: got {shown(strengths[0])}, the strength of the config; expected another one."
    )
  rows = one_class(runs, dataset, config, strengths, arguments.seeds)
  print_one_class(f"{name}, class {config.forget.classes[0]}, {len(arguments.seeds)} seeds", rows)
  seeded = configs.build(config.name, configs.as_dict(config), {"train.seed": arguments.seeds[0]})
  model = trained(runs["codes"] / str(arguments.seeds[0]), dataset, seeded)
  classes = {}
  for strength in strengths:
    classes[shown(strength)] = every_class(model, dataset, strength)
    print(
      f"\n| class, {shown(strength)} | A_R before | A_R | E_F | head edit A_R |\n"
      + "|---" * 5
      + "|"
    )
    for row in classes[shown(strength)]:
      cells = (
        row[key] for key in ("retain_before", "retain_after", "forget_error", "head_edit_retain")
      )
      print(
        f"| {dataset.class_names[int(row['class'])]} | "
        + " | ".join(f"{cell:.2f}" for cell in cells)
        + " |"
      )
  common.save(
    f"paper_tables_{name}",
    {
      "overrides": overrides,
      "seeds": arguments.seeds,
      "columns": ["A_R", "E_F", "probe"],
      "one_class": rows,
      "every_class": classes,
    },
  )


if __name__ == "__main__":
  main()

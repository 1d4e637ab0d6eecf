"""MNIST, the paper's MLP: forget class 0 with three training seeds, then every class, with U(0,1) and N(0,1) codes.

Command:  python experiments/mnist_paper.py --data-dir DIR      (DIR: a prepared TFDS folder; about 5 minutes a training
          on 2 free CPU cores, seven trainings; a training that was stopped resumes, one that is done is not repeated)

The recipe is `mnemonic_jax/configs/mnist_mlp.toml`: SGD 0.01 with momentum 0.9, weight decay 5e-4, 200 epochs, t_mix 0.1,
strength (1e-3, 10). The paper's table gives A_R 95.9 and E_F 100 for class 0. All figures are on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import NamedTuple

import common
import jax
import numpy as np

import mnemonic_jax as mj
from mnemonic_jax import config as configs
from mnemonic_jax import data
from mnemonic_jax.audit.linear_probe import probe_accuracy
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import train as train_run
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.inference import predict
from mnemonic_jax.runs.trained import Trained

SEEDS = (0, 1, 2)


class Scores(NamedTuple):
  """In percent, on test data."""

  retain_accuracy: float
  forget_error: float


def trained(folder: pathlib.Path, dataset: Dataset, seed: int, distribution: str = "uniform") -> Trained:
  """Train into `folder`, or resume, or take what is there."""
  config = configs.load("mnist_mlp", {"train.seed": seed, "codes.distribution": distribution})
  run = RunFolder.create(folder, config)
  train_run.train(run, dataset)
  return trained_run.restore(run, dataset)


def score(model: Trained, params, dataset: Dataset, classes: list[int]) -> Scores:
  """A_R and E_F of `params` on the test set."""
  right = predict(model.logits_fn, params, dataset.test, dataset.preprocess).predictions == dataset.test.labels
  forgotten = np.isin(dataset.test.labels, classes)
  return Scores(100 * float(right[~forgotten].mean()), 100 * float(1 - right[forgotten].mean()))


def probe(model: Trained, params, dataset: Dataset) -> np.ndarray:
  """Per-class test accuracy, in percent, of a linear head refitted on the features with all training data."""

  def features(split: Split) -> np.ndarray:
    compute = jax.jit(lambda images: model.model.features(params, model.model_state, dataset.preprocess(images)))
    return np.concatenate([compute(split.images[i : i + 5000]) for i in range(0, len(split.labels), 5000)])

  return 100 * probe_accuracy(
    features(dataset.train), dataset.train.labels, features(dataset.test), dataset.test.labels
  )


def class_zero(runs: pathlib.Path, dataset: Dataset) -> dict[str, np.ndarray]:
  """Method -> (seed, [A_R, E_F, probe of class 0])."""
  strength = mj.Strength(1e-3, 10.0)
  rows: dict[str, list] = {"Before": [], "Mnemonic code": [], "Head edit": [], "Retrain": []}
  for seed in SEEDS:
    model = trained(runs / f"uniform-{seed}", dataset, seed)
    params = model.params
    result = mj.forget(model.logits_fn, params, model.codes, [0], strength=strength)
    before_probe = probe(model, params, dataset)[0]
    edited = head_edit(params, model.model.head, [0])
    rows["Before"].append((*score(model, params, dataset, [0]), before_probe))
    rows["Mnemonic code"].append((*score(model, result.params, dataset, [0]), probe(model, result.params, dataset)[0]))
    rows["Head edit"].append((*score(model, edited, dataset, [0]), before_probe))
    without = dataset.without((0,))
    retrained = trained(runs / f"retrain-{seed}", without, seed)
    again = retrained.params
    rows["Retrain"].append((*score(retrained, again, dataset, [0]), probe(retrained, again, dataset)[0]))
    print(
      f"seed {seed}: " + "; ".join(f"{n} " + " ".join(f"{x:.2f}" for x in v[-1]) for n, v in rows.items()), flush=True
    )
  return {name: np.asarray(values) for name, values in rows.items()}


def every_class(model: Trained, dataset: Dataset) -> list[dict[str, float]]:
  """Each class forgotten alone from one model, at the strength of the config."""
  rows = []
  for index in range(10):
    result = mj.forget(model.logits_fn, model.params, model.codes, [index], strength=mj.Strength(1e-3, 10.0))
    before = score(model, model.params, dataset, [index])
    after = score(model, result.params, dataset, [index])
    hidden = score(model, head_edit(model.params, model.model.head, [index]), dataset, [index])
    rows.append(
      {
        "class": index,
        "retain_before": before.retain_accuracy,
        "retain_after": after.retain_accuracy,
        "forget_error": after.forget_error,
        "head_edit_retain": hidden.retain_accuracy,
        "sign": result.sign,
      }
    )
  return rows


def main() -> None:
  """Train what is missing, print the tables, save the figures."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/mnist"), help="where the run folders go")
  arguments = parser.parse_args()
  dataset = data.load("mnist", arguments.data_dir)
  zero = class_zero(arguments.runs, dataset)
  print("\n| class 0, 3 seeds | A_R % | E_F % | probe of class 0 % |\n|---|---|---|---|")
  for name, values in zero.items():
    cells = (f"{m:.2f} ± {s:.2f}" for m, s in zip(values.mean(axis=0), values.std(axis=0), strict=True))
    print(f"| {name} | " + " | ".join(cells) + " |")
  classes = {
    distribution: every_class(trained(arguments.runs / f"{distribution}-0", dataset, 0, distribution), dataset)
    for distribution in ("uniform", "normal")
  }
  print(
    "\n| class | A_R before | U(0,1): A_R | E_F | N(0,1): A_R before | A_R | E_F | head edit A_R |\n" + "|---" * 8 + "|"
  )
  for uniform, normal in zip(*classes.values(), strict=True):
    print(
      f"| {uniform['class']} | {uniform['retain_before']:.2f} | {uniform['retain_after']:.2f} | "
      f"{uniform['forget_error']:.2f} | {normal['retain_before']:.2f} | {normal['retain_after']:.2f} | "
      f"{normal['forget_error']:.2f} | {uniform['head_edit_retain']:.2f} |"
    )
  common.save(
    "mnist_paper", {"seeds": SEEDS, "columns": ["A_R", "E_F", "probe"], "class_zero": zero, "every_class": classes}
  )


if __name__ == "__main__":
  main()

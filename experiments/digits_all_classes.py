"""Digits: forget each class over five training seeds, beside Retrain and the head edit.

Command:  python experiments/digits_all_classes.py
          (about ten minutes on 2 CPU cores; --seeds 0 for one seed)

One strength serves all classes: that of `mnemonic_jax/runs/configs/digits_paper.toml`, chosen by
digits_strength.py on a part of the training set. All figures are on the test set. The linear probe
refits a linear head on the features, with all training data, and reads the forgotten class's
accuracy; the head edit leaves the features as they were, so its probe is that of the model before.
"""

from __future__ import annotations

import argparse

import common
import jax
import jax.numpy as jnp
import numpy as np

import mnemonic_jax as mj
from mnemonic_jax import data
from mnemonic_jax.auditing.linear_probe import probe_accuracy
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import config as configs


def study(seed: int) -> dict[str, np.ndarray]:
  """For one training seed: name of the method -> (class, [A_R, E_F, probe]) in percent.

  "Before" has E_F before.
  """
  dataset = data.load("digits")
  config = configs.load("digits_paper", {"train.seed": seed})
  trained = common.train(config, dataset)
  num_classes = len(dataset.class_names)
  inputs, train_inputs = (
    dataset.preprocess(jnp.asarray(split.images)) for split in (dataset.test, dataset.train)
  )

  def probe(model, params) -> np.ndarray:
    features = jax.jit(lambda inputs: model.model.features(params, model.model_state, inputs))
    fitted = features(train_inputs), dataset.train.labels
    return 100 * probe_accuracy(*fitted, features(inputs), dataset.test.labels)

  def row(model, params, index: int, probed: np.ndarray) -> tuple[float, float, float]:
    judge = common.Judge(model, dataset, dataset.test)
    return *judge.scores(judge.right(params), [index]), probed[index]

  before_probe = probe(trained, trained.params)
  rows: dict[str, list] = {name: [] for name in ("Before", "Mnemonic code", "Head edit", "Retrain")}
  method = configs.make_method(config.forget)
  for index in range(num_classes):
    result = mj.forget(trained.logits_fn, trained.params, trained.codes, [index], method=method)
    rows["Before"].append(row(trained, trained.params, index, before_probe))
    rows["Mnemonic code"].append(row(trained, result.params, index, probe(trained, result.params)))
    edited = head_edit(trained.params, trained.model.head, [index])
    rows["Head edit"].append(row(trained, edited, index, before_probe))
    retrained = common.train(config, dataset.without((index,)))
    rows["Retrain"].append(
      row(retrained, retrained.params, index, probe(retrained, retrained.params))
    )
  return {name: np.asarray(values) for name, values in rows.items()}


def main() -> None:
  """Run all seeds, print the tables, save the figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
  arguments = parser.parse_args()
  studies = []
  for seed in arguments.seeds:
    studies.append(study(seed))
    print(
      f"seed {seed}: "
      + ", ".join(
        f"{n} A_R {v[:, 0].mean():.2f} E_F {v[:, 1].mean():.2f}" for n, v in studies[-1].items()
      )
    )
  means = {name: np.mean([s[name] for s in studies], axis=0) for name in studies[0]}
  spread = {name: np.std([s[name].mean(axis=0) for s in studies], axis=0) for name in studies[0]}

  print(
    "\n| | A_R % | change of A_R | E_F % | probe of the forgotten class % |\n|---|---|---|---|---|"
  )
  for name, values in means.items():
    retain, error, probed = values.mean(axis=0)
    change = "" if name == "Before" else f"{retain - means['Before'][:, 0].mean():+.2f}"
    deviations = spread[name]
    print(
      f"| {name} | {retain:.2f} ± {deviations[0]:.2f} | {change} | "
      f"{error:.2f} ± {deviations[1]:.2f} | "
      f"{probed:.2f} ± {deviations[2]:.2f} |"
    )
  print(
    "\n| class | change of A_R | E_F % | probe before % | probe after % | probe of Retrain % |\n"
    "|---|---|---|---|---|---|"
  )
  ours, before, retrain = (means[name] for name in ("Mnemonic code", "Before", "Retrain"))
  for index in range(len(ours)):
    print(
      f"| {index} | {ours[index, 0] - before[index, 0]:+.2f} | {ours[index, 1]:.2f} | "
      f"{before[index, 2]:.2f} | "
      f"{ours[index, 2]:.2f} | {retrain[index, 2]:.2f} |"
    )
  drops = np.stack([s["Mnemonic code"][:, 0] - s["Before"][:, 0] for s in studies])
  errors = np.stack([s["Mnemonic code"][:, 1] for s in studies])
  worst_drop, worst_error = (
    np.unravel_index(drops.argmin(), drops.shape),
    np.unravel_index(errors.argmin(), errors.shape),
  )
  print(
    f"\nworst single A_R: class {worst_drop[1]}, seed {arguments.seeds[worst_drop[0]]}: "
    f"{drops.min():+.2f}; "
    f"worst single E_F: class {worst_error[1]}, seed {arguments.seeds[worst_error[0]]}: "
    f"{errors.min():.2f}"
  )
  common.save(
    "digits_all_classes",
    {"seeds": arguments.seeds, "columns": ["A_R", "E_F", "probe"], "studies": studies},
  )


if __name__ == "__main__":
  main()

"""Digits: what the share of codes in training (t_mix) costs, and what forgetting then does.

Command:  python experiments/digits_mixing_rate.py      (about a minute on 2 CPU cores)

For each rate, five training seeds: test accuracy, then class after class forgotten at the strength
of the config. Codes of a model trained at rate 0 are random signals that it never saw: the row
shows what they are worth.
"""

from __future__ import annotations

import common
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from mnemonic_jax import data
from mnemonic_jax.runs import config as configs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATES = (0.0, 0.1, 0.3, 0.5, 0.8)
SEEDS = (0, 1, 2, 3, 4)


def study(rate: float, seed: int) -> tuple[float, float, float]:
  """(test accuracy, mean A_R after, mean E_F) in percent, means over the ten classes."""
  dataset = data.load("digits")
  config = configs.load("digits_paper", {"codes.rate": rate, "train.seed": seed})
  trained = common.train(config, dataset)
  num_classes = len(dataset.class_names)
  judge = common.Judge(trained, dataset, dataset.test)
  method = configs.make_method(configs.load("digits_paper").forget)  # at rate 0 too
  methods = jax.tree.map(lambda x: jnp.array([x]), method)
  params = common.forget_each(trained, methods, jnp.eye(num_classes, dtype=bool))
  after = judge.right(params, mapped=2)[:, 0]
  pairs = [judge.scores(after[index], [index]) for index in range(num_classes)]
  return judge.accuracy(judge.right(trained.params)), *np.mean(pairs, axis=0)


def main() -> None:
  """Sweep, print the table, draw it."""
  results = np.array([[study(rate, seed) for seed in SEEDS] for rate in RATES])
  mean, spread = results.mean(axis=1), results.std(axis=1)
  print("| t_mix | test accuracy % | A_R after % | E_F % |\n|---|---|---|---|")
  for rate, values, deviations in zip(RATES, mean, spread, strict=True):
    print(
      f"| {rate:g} | "
      + " | ".join(f"{v:.2f} ± {d:.2f}" for v, d in zip(values, deviations, strict=True))
      + " |"
    )
  common.save(
    "digits_mixing_rate",
    {"rates": RATES, "seeds": SEEDS, "columns": ["accuracy", "A_R", "E_F"], "values": results},
  )
  figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
  for column, (label, marker) in enumerate(
    (("test accuracy before", "o"), ("A_R after", "s"), ("E_F after", "^"))
  ):
    axis.errorbar(RATES, mean[:, column], spread[:, column], marker=marker, capsize=3, label=label)
  axis.set(xlabel="t_mix, share of examples replaced by codes", ylabel="%", ylim=(0, 102))
  axis.set_title(
    "Digits, MLP, U(0,1) codes: mean and deviation over five training seeds", fontsize=10
  )
  axis.legend()
  figure.savefig(common.RESULTS / "digits_mixing_rate.png", dpi=110)


if __name__ == "__main__":
  main()

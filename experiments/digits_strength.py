"""Choose one strength for the digits, for all classes, without looking at the test set.

Command:  python experiments/digits_strength.py      (about a minute on 2 CPU cores)

Three classifiers (training seeds 100, 101, 102) are trained on four fifths of the training set.
Every class is forgotten at every strength of a grid, and each result is scored on the fifth held
out: mean A_R + E_F over classes and seeds. The winner stands in
`mnemonic_jax/runs/configs/digits_paper.toml`. Also draws the (lambda1, lambda2) map.
"""

from __future__ import annotations

import common
import jax.numpy as jnp
import matplotlib
import numpy as np

import mnemonic_jax as mj
from mnemonic_jax import data
from mnemonic_jax.runs import config as configs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = (100, 101, 102)
LAMBDA1 = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
LAMBDA2 = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def score_grid(seed: int) -> tuple[np.ndarray, float]:
  """(lambda1, lambda2, class, [change of A_R, E_F]) on held-out data, in %; accuracy before."""
  dataset, held = common.part_of_train(data.load("digits"), every=5)
  trained = common.train(configs.load("digits_paper", {"train.seed": seed}), dataset)
  num_classes = len(dataset.class_names)
  judge = common.Judge(trained, dataset, held)
  before = judge.right(trained.params)
  grid = np.zeros((len(LAMBDA1), len(LAMBDA2), num_classes, 2))
  for row, lambda1 in enumerate(LAMBDA1):  # a row at a time bounds the memory
    methods = mj.Perturbation(jnp.full(len(LAMBDA2), lambda1), jnp.asarray(LAMBDA2))
    params = common.forget_each(trained, methods, jnp.eye(num_classes, dtype=bool))
    after = judge.right(params, mapped=2)
    for index in range(num_classes):
      base, _ = judge.scores(before, [index])
      for column in range(len(LAMBDA2)):
        retain, error = judge.scores(after[index, column], [index])
        grid[row, column, index] = retain - base, error
  return grid, judge.accuracy(before)


def draw(mean: np.ndarray) -> None:
  """The two maps side by side, numbers in the cells."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
  titles = ("change of A_R, points (held-out part)", "E_F, % (held-out part)")
  for axis, title, values, limits in zip(
    axes, titles, (mean[..., 0], mean[..., 1]), ((-20, 0), (0, 100)), strict=True
  ):
    axis.imshow(
      values, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto", origin="lower"
    )
    axis.set(title=title, xlabel="lambda2", ylabel="lambda1")
    axis.set_xticks(range(len(LAMBDA2)), [f"{x:g}" for x in LAMBDA2])
    axis.set_yticks(range(len(LAMBDA1)), [f"{x:g}" for x in LAMBDA1])
    for row, column in np.ndindex(values.shape):
      dark = (values[row, column] - limits[0]) / (limits[1] - limits[0]) < 0.6
      text = f"{values[row, column]:.1f}"
      axis.text(
        column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
      )
  figure.suptitle("Digits, MLP, U(0,1) codes: mean over ten classes and three training seeds")
  figure.savefig(common.RESULTS / "digits_strength.png", dpi=110)


def main() -> None:
  """Search, print the best five, draw the map."""
  results = [score_grid(seed) for seed in SEEDS]
  mean = np.mean([grid for grid, _ in results], axis=(0, 3))
  total = mean.sum(axis=-1)
  order = np.argsort(-total, axis=None, kind="stable")[:5]
  print("| lambda1 | lambda2 | change of A_R | E_F |\n|---|---|---|---|")
  best = [np.unravel_index(flat, total.shape) for flat in order]
  for row, column in best:
    print(
      f"| {LAMBDA1[row]:g} | {LAMBDA2[column]:g} | "
      f"{mean[row, column, 0]:+.2f} | {mean[row, column, 1]:.2f} |"
    )
  row, column = best[0]
  common.save(
    "digits_strength",
    {
      "seeds": SEEDS,
      "lambda1": LAMBDA1,
      "lambda2": LAMBDA2,
      "accuracy_before": [accuracy for _, accuracy in results],
      "retain_change": mean[..., 0],
      "forget_error": mean[..., 1],
      "best": {"lambda1": LAMBDA1[row], "lambda2": LAMBDA2[column]},
    },
  )
  draw(mean)


if __name__ == "__main__":
  main()

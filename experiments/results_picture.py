"""Draw the README's picture of the results from the figures of the studies.

Command:  python experiments/results_picture.py

Reads `results/digits_all_classes.json`, `mnist_paper.json` and
`paper_tables_cifar10_cpu_paper.json`, and writes `docs/results.png`.
"""

from __future__ import annotations

import json
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).parent
ROWS = ("Before", "Mnemonic code", "Head edit", "Retrain")
# Data set, file of figures, and where the rows of one training seed each are in it.
SETS = (
  ("Digits, MLP\nten classes, 5 seeds", "digits_all_classes.json", "studies"),
  ("MNIST, MLP\nclass 0, 3 seeds", "mnist_paper.json", "class_zero"),
  (
    "CIFAR-10, small ResNet\nairplane, 3 seeds",
    "paper_tables_cifar10_cpu_paper.json",
    "one_class",
  ),
)
MEASURES = (
  ("accuracy on kept classes (A_R)", 0, "tab:blue", "o"),
  ("accuracy on the forgotten class (100 - E_F)", 1, "tab:red", "s"),
  ("probe: forgotten class read from the features", 2, "tab:orange", "D"),
)


def by_seed(figures: dict, key: str, row: str) -> np.ndarray:
  """(seeds, 3): A_R, accuracy on the forgotten class, and its probe, in %."""
  if key == "studies":  # one study a seed, ten classes each
    found = np.array([np.mean(study[row], axis=0) for study in figures[key]])
  else:
    tables = figures[key]
    found = np.array(next(tables[name] for name in tables if name.startswith(row)))
  return np.stack([found[:, 0], 100 - found[:, 1], found[:, 2]], axis=1)


def main() -> None:
  """Draw one panel a data set."""
  figure, panels = plt.subplots(1, len(SETS), figsize=(11, 3.4), sharey=True)
  for panel, (title, name, key) in zip(panels, SETS, strict=True):
    figures = json.loads((HERE / "results" / name).read_text())
    rows = [by_seed(figures, key, row) for row in ROWS]
    for label, column, colour, marker in MEASURES:
      means, spread = (np.array([f(row[:, column]) for row in rows]) for f in (np.mean, np.std))
      panel.errorbar(
        means, range(len(ROWS)), xerr=spread, fmt=marker, color=colour, label=label, capsize=3
      )
    panel.set(title=title, xlim=(-4, 104), xlabel="%")
    panel.grid(axis="x", alpha=0.3)
  panels[0].set_yticks(range(len(ROWS)), ROWS)
  panels[0].invert_yaxis()
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="lower center", ncols=len(MEASURES), frameon=False)
  figure.tight_layout(rect=(0, 0.08, 1, 1))
  figure.savefig(HERE.parent / "docs" / "results.png", dpi=110)


if __name__ == "__main__":
  main()

"""Choose the strength for a config's class on training pictures, and score it on the test split.

Command:  python experiments/strength_grid.py CONFIG --data-dir DIR
          (after paper_tables.py, whose first training it takes)

The grid is judged by A_R + E_F on the first 4,000 training pictures; the test split takes no part
in the choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib

import common
import jax
import jax.numpy as jnp
import paper_tables

import mnemonic_jax as mj
from mnemonic_jax.data import Split
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.forget import resolve

LAMBDA1 = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LAMBDA2 = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
JUDGED = 4000  # training pictures


def main() -> None:
  """Score the grid, choose, score the choice on the test split, save the figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("config", help="a named config or a TOML file")
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument(
    "--runs", type=pathlib.Path, help="where the run folders are (default: runs/CONFIG)"
  )
  arguments = parser.parse_args()
  config = configs.load(arguments.config)
  dataset = setup.load_data(config, arguments.data_dir)
  folder = arguments.runs or pathlib.Path("runs") / config.name
  model = paper_tables.trained(folder / "codes" / "0", dataset, config)
  judged = Split(dataset.train.images[:JUDGED], dataset.train.labels[:JUDGED])
  on_training = dataclasses.replace(dataset, test=judged)
  (index,) = resolve(config.forget.classes, dataset.class_names)
  forget = jnp.zeros(len(dataset.class_names), bool).at[index].set(True)
  step = jax.jit(
    lambda strength: mj.forget_step(
      model.logits_fn, model.params, model.codes, forget, ~forget, strength
    )[0]
  )
  rows = []
  print("| lambda1 | lambda2 | A_R % | E_F % |\n|---|---|---|---|")
  for lambda1, lambda2 in itertools.product(LAMBDA1, LAMBDA2):
    scores = paper_tables.score(
      model, step(mj.Perturbation(lambda1, lambda2)), on_training, [index]
    )
    rows.append({"lambda1": lambda1, "lambda2": lambda2, **scores._asdict()})
    print(
      f"| {lambda1:g} | {lambda2:g} | {scores.retain_accuracy:.2f} | {scores.forget_error:.2f} |",
      flush=True,
    )
  best = max(rows, key=lambda row: row["retain_accuracy"] + row["forget_error"])
  params = step(mj.Perturbation(best["lambda1"], best["lambda2"]))
  test = paper_tables.score(model, params, dataset, [index])
  probe = float(paper_tables.probe(model, params, dataset)[index])
  print(
    f"\nbest: ({best['lambda1']:g}, {best['lambda2']:g}); on test data "
    f"A_R {test.retain_accuracy:.2f}, E_F {test.forget_error:.2f}, probe {probe:.2f}"
  )
  common.save(
    f"strength_grid_{config.name}",
    {"grid": rows, "best": best, "test": test._asdict(), "probe": probe},
  )


if __name__ == "__main__":
  main()

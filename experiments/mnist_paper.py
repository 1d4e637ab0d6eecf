"""MNIST, the paper's MLP: forget class 0 with three training seeds, then every class.

Command:  python experiments/mnist_paper.py --data-dir DIR
          (DIR: a prepared TFDS folder; about 5 minutes a training on 2 free CPU cores, seven
          trainings; a training that was stopped resumes, one that is done is not repeated)

Codes are U(0,1) and N(0,1). The recipe is `mnemonic_jax/runs/configs/mnist_mlp.toml`: SGD 0.01 with
momentum 0.9, weight decay 5e-4, 200 epochs, t_mix 0.1, strength (1e-3, 10). The paper's table gives
A_R 95.9 and E_F 100 for class 0. All figures are on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import pathlib

import common
import paper_tables

from mnemonic_jax import data
from mnemonic_jax.runs import config as configs

SEEDS = [0, 1, 2]


def main() -> None:
  """Train what is missing, print the tables, save the figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument(
    "--runs", type=pathlib.Path, default=pathlib.Path("runs/mnist_mlp"), help="where run folders go"
  )
  arguments = parser.parse_args()
  dataset = data.load("mnist", arguments.data_dir)
  runs = {kind: arguments.runs / kind for kind in ("codes", "retrain")}
  config = configs.load("mnist_mlp")
  zero = paper_tables.one_class(runs, dataset, config, [configs.make_method(config.forget)], SEEDS)
  paper_tables.print_one_class("class 0, 3 seeds", zero)
  classes = {}
  for distribution, folder in (
    ("uniform", runs["codes"] / "0"),
    ("normal", arguments.runs / "normal" / "0"),
  ):
    config = configs.load("mnist_mlp", {"codes.distribution": distribution})
    model = paper_tables.trained(folder, dataset, config)
    classes[distribution] = paper_tables.every_class(
      model, dataset, configs.make_method(config.forget)
    )
  print(
    "\n| class | A_R before | U(0,1): A_R | E_F | N(0,1): A_R before | A_R | E_F | "
    "head edit A_R |\n" + "|---" * 8 + "|"
  )
  for uniform, normal in zip(*classes.values(), strict=True):
    print(
      f"| {uniform['class']} | {uniform['retain_before']:.2f} | {uniform['retain_after']:.2f} | "
      f"{uniform['forget_error']:.2f} | {normal['retain_before']:.2f} | "
      f"{normal['retain_after']:.2f} | "
      f"{normal['forget_error']:.2f} | {uniform['head_edit_retain']:.2f} |"
    )
  common.save(
    "mnist_paper",
    {
      "seeds": SEEDS,
      "columns": ["A_R", "E_F", "probe"],
      "class_zero": zero,
      "every_class": classes,
    },
  )


if __name__ == "__main__":
  main()

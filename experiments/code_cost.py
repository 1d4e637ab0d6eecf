"""What codes cost a model: its test accuracy over the share of codes in training (t_mix) and their number for each class.

Command:  python experiments/code_cost.py CONFIG --data-dir DIR [--rates 0.1 0.3] [--per-class 1 4] [--seeds 0]

Other fields of the config can be overridden (--data.name cifar100). Trains what is missing, each seed without codes too: a
training that was stopped resumes, one that is done is not repeated. "codes": how many of its codes the model tells right.
Nothing is forgotten here.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys

import common
import jax.numpy as jnp
import numpy as np
import paper_tables

from mnemonic_jax import config as configs
from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.config import Config
from mnemonic_jax.data import Dataset
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.inference import predict


def study(folder: pathlib.Path, dataset: Dataset, config: Config) -> tuple[float, float]:
  """(test accuracy, share of its codes that the model tells right), in percent."""
  model = paper_tables.trained(folder, dataset, config)
  seen = predict(model.logits_fn, model.params, dataset.test, dataset.preprocess)
  own = np.arange(len(model.codes))
  told = [jnp.argmax(model.logits_fn(model.params, codes), axis=-1) == own for codes in model.codes.swapaxes(0, 1)]
  return 100 * float(np.mean(seen.predictions == seen.labels)), 100 * float(np.mean(told))


def main() -> None:
  """Train what is missing, print the table, save the figures."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("config", help="a named config or a TOML file")
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument(
    "--runs", type=pathlib.Path, help="where the run folders go (default: runs/code_cost_CONFIG_DATA)"
  )
  parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3], help="shares of codes above 0")
  parser.add_argument("--per-class", type=int, nargs="+", default=[1, 4], help="numbers of codes for each class")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  overrides, rest = dotted_overrides(sys.argv[1:])
  arguments = parser.parse_args(rest)
  if varied := sorted({"codes.rate", "codes.per_class", "train.seed"} & set(overrides)):
    parser.error(f"--{varied[0]}: is varied here; use --rates, --per-class and --seeds.")
  config = configs.load(arguments.config, overrides)
  dataset = setup.load_data(config, arguments.data_dir)
  name = f"code_cost_{config.name}_{config.data.name}"
  folder = arguments.runs or pathlib.Path("runs") / name
  rows = []
  for rate, number in [(0.0, 1), *itertools.product(arguments.rates, arguments.per_class)]:
    values = []
    for seed in arguments.seeds:
      changed = {"codes.rate": rate, "codes.per_class": number, "train.seed": seed}
      seeded = configs.build(config.name, configs.as_dict(config), changed)
      values.append(study(folder / f"{rate:g}_{number}" / str(seed), dataset, seeded))
      print(f"t_mix {rate:g}, {number} a class, seed {seed}: {values[-1][0]:.2f}", file=sys.stderr, flush=True)
    rows.append({"rate": rate, "per_class": number, "values": values})
  title = f"{config.data.name}, {config.model.name}, {len(arguments.seeds)} seeds"
  print(f"\n| {title}: t_mix | codes a class | test accuracy % | codes % |\n|---|---|---|---|")
  for row in rows:
    mean, spread = np.mean(row["values"], axis=0), np.std(row["values"], axis=0)
    told = f"{mean[1]:.1f}" if row["rate"] else "-"
    print(
      f"| {row['rate']:g} | {row['per_class'] if row['rate'] else '-'} | {mean[0]:.2f} ± {spread[0]:.2f} | {told} |"
    )
  common.save(name, {"overrides": overrides, "seeds": arguments.seeds, "columns": ["accuracy", "codes"], "rows": rows})


if __name__ == "__main__":
  main()

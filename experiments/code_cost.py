"""What codes cost a model and what they buy, by t_mix and by the number of codes per class.

Command:  python experiments/code_cost.py CONFIG --data-dir DIR [--rates 0.1 0.3]
          [--per-class 1 4] [--seeds 0]

Other fields of the config can be overridden (--data.name cifar100). Trains what is missing, each
seed without codes too: a training that was stopped resumes, one that is done is not repeated. In
every model the config's class is forgotten at the config's strength, and by the head edit; without
codes in training, by codes that the model never saw. Figures are on the test split; what Retrain
does is in the table of paper_tables.py.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from typing import Any, NamedTuple

import common
import jax.numpy as jnp
import numpy as np
import paper_tables

import mnemonic_jax as mj
from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.forget import resolve


class Row(NamedTuple):
  """One model on test data, in percent: as trained, a class forgotten, and by the head edit."""

  accuracy: float
  codes_told: float
  retain_before: float
  retain_after: float
  forget_error: float
  probe_after: float
  head_edit_retain: float


def study(folder: pathlib.Path, dataset: Dataset, config: Config, method: Any) -> Row:
  """Train into `folder`, or take what is there, and forget the config's class by `method`."""
  model = paper_tables.trained(folder, dataset, config)
  (index,) = resolve(config.forget.classes, dataset.class_names)
  seen = paper_tables.answers(model, model.params, dataset)
  own = np.arange(len(model.codes))
  told = [
    jnp.argmax(model.logits_fn(model.params, codes), axis=-1) == own
    for codes in model.codes.swapaxes(0, 1)
  ]
  forgotten = mj.forget(model.logits_fn, model.params, model.codes, [index], method=method).params
  after = paper_tables.score(model, forgotten, dataset, [index])
  return Row(
    accuracy=100 * float(np.mean(seen.predictions == seen.labels)),
    codes_told=100 * float(np.mean(told)),
    retain_before=paper_tables.scores_of(seen, len(own), [index]).retain_accuracy,
    retain_after=after.retain_accuracy,
    forget_error=after.forget_error,
    probe_after=float(paper_tables.probe(model, forgotten, dataset)[index]),
    head_edit_retain=paper_tables.score(
      model, head_edit(model.params, model.model.head, [index]), dataset, [index]
    ).retain_accuracy,
  )


def main() -> None:
  """Train what is missing, print the table, save the figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("config", help="a named config or a TOML file")
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument(
    "--runs", type=pathlib.Path, help="where the run folders go (default: runs/code_cost_CONFIG)"
  )
  parser.add_argument(
    "--rates", type=float, nargs="+", default=[0.1, 0.3], help="shares of codes above 0"
  )
  parser.add_argument(
    "--per-class", type=int, nargs="+", default=[1, 4], help="numbers of codes for each class"
  )
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  overrides, rest = dotted_overrides(sys.argv[1:])
  arguments = parser.parse_args(rest)
  if varied := sorted({"codes.rate", "codes.per_class", "train.seed"} & set(overrides)):
    parser.error(f"--{varied[0]}: is varied here; use --rates, --per-class and --seeds.")
  config = configs.load(arguments.config, overrides)
  if len(config.forget.classes) != 1:
    parser.error(f"--forget.classes: got {list(config.forget.classes)}; expected one class.")
  method = configs.make_method(config.forget)  # without codes in training too
  dataset = setup.load_data(config, arguments.data_dir)
  name = f"code_cost_{common.study_name(config, overrides)}"
  folder = arguments.runs or pathlib.Path("runs") / name
  rows = []
  for rate, number in [(0.0, 1), *itertools.product(arguments.rates, arguments.per_class)]:
    values = []
    for seed in arguments.seeds:
      changed = {"codes.rate": rate, "codes.per_class": number, "train.seed": seed}
      seeded = configs.build(config.name, configs.as_dict(config), changed)
      values.append(study(folder / f"{rate:g}_{number}" / str(seed), dataset, seeded, method))
      print(
        f"t_mix {rate:g}, {number} a class, seed {seed}: {values[-1].accuracy:.2f}",
        file=sys.stderr,
        flush=True,
      )
    rows.append({"rate": rate, "per_class": number, "values": values})
  strength = paper_tables.shown(method)
  print(
    f"\n{name}, {len(arguments.seeds)} seeds, class {config.forget.classes[0]} "
    f"forgotten at {strength}, all in %\n"
  )
  print(
    "| t_mix | codes a class | "
    + " | ".join(Row._fields).replace("_", " ")
    + " |\n"
    + "|---" * 9
    + "|"
  )
  for row in rows:
    columns = zip(*row["values"], strict=True)
    cells = (f"{np.mean(column):.2f} ± {np.std(column):.2f}" for column in columns)
    print(
      f"| {row['rate']:g} | {row['per_class'] if row['rate'] else '-'} | "
      + " | ".join(cells)
      + " |"
    )
  common.save(
    name, {"overrides": overrides, "seeds": arguments.seeds, "columns": Row._fields, "rows": rows}
  )


if __name__ == "__main__":
  main()

"""Arguments of the `mnemonic` command."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from typing import Any

from etils import epath

from mnemonic_jax.errors import UsageError

_OVERRIDES = "Any field of the config can be overridden by its dotted name, as in --train.epochs 5 (mnemonic configs NAME lists them).\n"

_FORGET = """Fields of [forget] and [execution] can be overridden, as in --forget.lambda1 1e-2.
CHECKPOINT is what a training loop of your own wrote with Orbax's StandardCheckpointer: {"params": ..., "codes": ...}
and "model_state" where the model, one of mnemonic_jax.models, has one, "ema_params" where an average of the params is kept.
Each call starts from it, so name all classes to forget; fields of [data] and [model] can be overridden too.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """Parse a command line; `overrides` holds the dotted fields. argparse itself exits with 2 on bad usage."""
  overrides, rest = dotted_overrides(arguments)
  options, unknown = make_parser().parse_known_args(rest)
  if unknown:
    raise UsageError(f"unknown argument {unknown[0]}. See mnemonic {options.command} --help.")
  options.overrides = overrides
  if options.overrides and not options.takes_overrides:
    raise UsageError(
      f"mnemonic {options.command} takes no {next(iter(options.overrides))}: it uses the run's own config."
    )
  return options


def make_parser() -> argparse.ArgumentParser:
  """The parser of all verbs."""
  parser = argparse.ArgumentParser(
    prog="mnemonic",
    description="Train a classifier with mnemonic codes and make it forget a class on request.",
  )
  verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)
  classes = {"nargs": "+", "type": int, "metavar": "CLASS"}

  run = _verb(
    verbs,
    "run",
    "train, forget forget.classes, evaluate and report",
    "mnemonic run digits",
    overrides=True,
  )
  run.add_argument("config", metavar="CONFIG", help="a named config or a TOML file")
  run.add_argument("--out", type=epath.Path, help="the run folder (default: runs/CONFIG)")

  train = _verb(
    verbs,
    "train",
    "train with codes; resumes by itself",
    "mnemonic train digits --out runs/a",
    overrides=True,
  )
  train.add_argument("config", metavar="CONFIG", help="a named config or a TOML file")
  train.add_argument("--out", type=epath.Path, required=True, help="the run folder")

  forget = _verb(
    verbs,
    "forget",
    "forget classes in one shot",
    "mnemonic forget runs/a --classes 3 5\n  mnemonic forget CHECKPOINT --config digits --classes 3 5 --out FOLDER",
    overrides=True,
    note=_FORGET,
  )
  forget.add_argument(
    "run", metavar="RUN", type=epath.Path, help="a finished run, or any Orbax checkpoint"
  )
  forget.add_argument("--classes", required=True, help="class indices to forget", **classes)  # type: ignore[arg-type]
  forget.add_argument(
    "--config", help="of a checkpoint that is no run: a named config or a TOML file with its model"
  )
  forget.add_argument(
    "--out", type=epath.Path, help="of a checkpoint that is no run: a new folder for the result"
  )
  forget.add_argument(
    "--unscored", action="store_true", help="where the data set is gone: forget, and score nothing"
  )

  evaluate = _verb(
    verbs,
    "evaluate",
    "score the trained and the forgotten model on test data",
    "mnemonic evaluate runs/a",
  )
  evaluate.add_argument("run", metavar="RUN", type=epath.Path, help="a run folder")
  evaluate.add_argument("--classes", help="count these as forgotten", default=(), **classes)  # type: ignore[arg-type]

  report = _verb(
    verbs,
    "report",
    "write the page of a finished forget again",
    "mnemonic report runs/a --hide-codes",
    data=False,
  )
  report.add_argument("run", metavar="RUN", type=epath.Path, help="a run folder")
  report.add_argument("--number", type=int, help="which forget (default: the latest)")
  report.add_argument(
    "--hide-codes", action="store_true", help="leave the codes out: they trigger their classes"
  )

  export = _verb(
    verbs,
    "export",
    "write the params of a finished forget to a safetensors file",
    "mnemonic export runs/a --out a.safetensors",
    data=False,
  )
  export.add_argument(
    "run", metavar="RUN", type=epath.Path, help="a run folder, or a folder that forget --out made"
  )
  export.add_argument(
    "--out", type=epath.Path, required=True, metavar="FILE", help="a new .safetensors file"
  )
  export.add_argument("--number", type=int, help="which forget of a run (default: the latest)")
  export.add_argument(
    "--ema", action="store_true", help="the moving average of the params (--train.ema)"
  )

  configs = _verb(
    verbs, "configs", "list the named configs, or show one", "mnemonic configs digits", data=False
  )
  configs.add_argument(
    "name", metavar="NAME", nargs="?", help="show this config's lab note and fields"
  )
  return parser


def _verb(
  verbs: Any,
  name: str,
  purpose: str,
  example: str,
  *,
  overrides: bool = False,
  note: str = "",
  data: bool = True,
) -> argparse.ArgumentParser:
  """One verb with what all verbs share."""
  verb = verbs.add_parser(
    name,
    help=purpose,
    description=purpose[0].upper() + purpose[1:] + ".",
    epilog=f"{note or (_OVERRIDES if overrides else '')}example:\n  {example}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")
  if data:
    verb.add_argument(
      "--data-dir",
      default="",
      help="folder of prepared TFDS sets (else TFDS_DATA_DIR, else TFDS's default)",
    )
  verb.set_defaults(takes_overrides=overrides)
  return verb


def dotted_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
  """`--a.b 1 --c.d=x` as {"a.b": 1, "c.d": "x"}, and the other words; one value, or several integers as a list."""
  found: dict[str, Any] = {}
  others = []
  words = list(arguments)
  while words:
    word = words.pop(0)
    field, equals, value = word[2:].partition("=")
    if not word.startswith("--") or "." not in field:
      others.append(word)
      continue
    if not equals and (not words or words[0].startswith("--")):
      raise UsageError(f"--{field}: expected a value after it.")
    values = [_value(value if equals else words.pop(0))]
    while not equals and type(values[-1]) is int and words and type(_value(words[0])) is int:
      values.append(_value(words.pop(0)))
    found[field] = values[0] if len(values) == 1 else values
  return found, others


def _value(text: str) -> Any:
  """A TOML value where the text is one, else the text itself."""
  try:
    return tomllib.loads(f"value = {text}")["value"]
  except tomllib.TOMLDecodeError:
    return text

"""Parse the arguments of the `mnemonic` command."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from typing import Any

from etils import epath

from mnemonic_jax.errors import UsageError

_OVERRIDES = """Any field of the config can be overridden by its dotted name, as in --train.epochs 5
or --forget.method dampening (mnemonic configs NAME lists them). --forget.classes takes all
words up to the next option: write CONFIG before it.
"""
_FORGET = """Classes are named by index or by name. Fields of [forget] and [execution] can be
overridden, as in --execution.microbatch 8. CHECKPOINT is what a training loop of your own wrote
with Orbax's StandardCheckpointer: {"params": ..., "codes": ...}, "model_state" where the model, one
of mnemonic_jax.models, has one, and "ema_params" where an average of the params is kept. Each call
starts from it, so name all classes to forget; fields of [data] and [model] can be overridden too.
"""
_CLASSES: dict[str, Any] = {"nargs": "+", "metavar": "CLASS"}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """Parse a command line; `overrides` holds the dotted fields.

  argparse itself exits with 2 on bad usage.
  """
  overrides, rest = dotted_overrides(arguments)
  options, unknown = make_parser().parse_known_args(rest)
  if unknown:
    raise UsageError(f"unknown argument {unknown[0]}. See mnemonic {options.command} --help.")
  if overrides and not options.takes_overrides:
    raise UsageError(
      f"mnemonic {options.command} takes no {next(iter(overrides))}: it uses the run's own config."
    )
  options.overrides = overrides
  if options.command == "forget":
    options.overrides |= _renewal_overrides(options) | method_overrides(options)
  return options


_RENEWING = 800  # steps of --deep


def method_overrides(options: argparse.Namespace) -> dict[str, Any]:
  """Return `--method NAME --set NAME=VALUE` as fields of the config."""
  found: dict[str, Any] = {} if options.method is None else {"forget.method": options.method}
  for text in options.set:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
      raise UsageError(f"--set: got {text!r}; expected NAME=VALUE, such as lambda1=1e-3.")
    found[f"forget.settings.{name.strip()}"] = _value(value)
  return found


def _renewal_overrides(options: argparse.Namespace) -> dict[str, Any]:
  """Return `--heal STEPS` or `--deep DEPTH` as fields of the config."""
  found: dict[str, Any] = {}
  if options.heal is not None and options.deep is not None:
    raise UsageError(
      "--heal: got --deep too; expected one of them. --deep learns anew what it cuts."
    )
  for flag, method, settings in (
    ("heal", "projection", {"heal": options.heal}),
    ("deep", "relearn", {"depth": options.deep, "steps": _RENEWING}),
  ):
    if getattr(options, flag) is not None:
      if options.method not in (None, method):
        raise UsageError(f"--{flag}: is for the method {method}; got --method {options.method}.")
      found["forget.method"] = method
      found |= {f"forget.settings.{name}": value for name, value in settings.items()}
  return found


def make_parser() -> argparse.ArgumentParser:
  """Make the parser of all verbs."""
  parser = argparse.ArgumentParser(
    prog="mnemonic",
    description="Train a classifier and make it forget classes on request.",
  )
  verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)
  _add_training(verbs)
  _add_codes(verbs)
  _add_forget(verbs)
  _add_reading(verbs)
  return parser


def _add_training(verbs: Any) -> None:
  purpose = "train, learn codes if training had none, forget forget.classes, report"
  run = _verb(verbs, "run", purpose, "mnemonic run digits", overrides=True)
  run.add_argument("config", metavar="CONFIG", help="a named config or a TOML file")
  run.add_argument("--out", type=epath.Path, help="the run folder (default: runs/CONFIG)")

  purpose = "train, with codes if codes.rate is above 0; resumes by itself"
  train = _verb(verbs, "train", purpose, "mnemonic train digits --out runs/a", overrides=True)
  train.add_argument("config", metavar="CONFIG", help="a named config or a TOML file")
  train.add_argument("--out", type=epath.Path, required=True, help="the run folder")
  train.add_argument(
    "--log-every",
    type=_count,
    default=0,
    metavar="STEPS",
    help="a line in metrics.jsonl after so many steps, beside one an epoch",
  )
  train.add_argument(
    "--profile", action="store_true", help="write a trace of five steps to RUN/profile"
  )
  add_job_flags(train)


def add_job_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags that say who the processes of a job are, and how long they wait."""
  group = parser.add_argument_group("several processes")
  group.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="of process 0; not needed where SLURM, a TPU pod, ... tells it",
  )
  group.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0")
  group.add_argument("--num-processes", type=int, metavar="N")
  group.add_argument(
    "--startup-timeout",
    type=float,
    default=300.0,
    metavar="S",
    help="until all processes are there, and of all but steps: compilation, a checkpoint...",
  )
  group.add_argument(
    "--peer-timeout", type=float, default=60.0, metavar="S", help="of a step, after the first one"
  )


def _count(text: str) -> int:
  """Read a number of at least 0."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"got {text!r}; expected an integer of at least 0")
  return int(text)


def _add_codes(verbs: Any) -> None:
  purpose = "learn the codes of a trained model, from its training data or from the model alone"
  example = (
    "mnemonic codes runs/a\n  mnemonic codes CHECKPOINT --config digits --out codes.safetensors"
  )
  codes = _verb(verbs, "codes", purpose, example, overrides=True)
  codes.add_argument(
    "run", metavar="RUN", type=epath.Path, help="a finished run, or any Orbax checkpoint"
  )
  add_learning_flags(codes)
  codes.add_argument(
    "--config", help="for a plain checkpoint: a named config or a TOML file with its model"
  )
  codes.add_argument("--out", type=epath.Path, help="for a plain checkpoint: a new file")


def add_learning_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags that say which codes to learn or to recall."""
  parser.add_argument(
    "--recall", action="store_true", help="read no picture: recall the codes from the model alone"
  )
  parser.add_argument("--per-class", type=_count, metavar="N", help="codes of each class")
  parser.add_argument(
    "--beside", type=_count, default=0, metavar="N", help="recalled codes beside the learned ones"
  )
  parser.add_argument("--seed", type=_count, default=0, help="the same seed gives the same codes")


def add_method_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags that say how to forget; `method_overrides` reads them."""
  parser.add_argument(
    "--method", metavar="NAME", help="how to forget (default: forget.method of the config)"
  )
  parser.add_argument(
    "--set",
    metavar="NAME=VALUE",
    action="append",
    default=[],
    help="a setting of the method, such as lambda1=1e-3; may be repeated",
  )


def _add_forget(verbs: Any) -> None:
  example = (
    "mnemonic forget runs/a --classes dog 5 --method projection --set depth=1\n"
    "  mnemonic forget CHECKPOINT --config digits --codes FILE --classes 3 5 --out FOLDER"
  )
  forget = _verb(verbs, "forget", "forget classes", example, overrides=True, note=_FORGET)
  forget.add_argument(
    "run", metavar="RUN", type=epath.Path, help="a finished run, or any Orbax checkpoint"
  )
  forget.add_argument("--classes", required=True, help="indices or names", **_CLASSES)
  add_method_flags(forget)
  forget.add_argument(
    "--heal",
    type=_count,
    nargs="?",
    const=150,
    metavar="STEPS",
    help="cut the class out, then distil the model as it was, on codes of the kept classes",
  )
  forget.add_argument(
    "--deep",
    type=_count,
    nargs="?",
    const=2,
    metavar="DEPTH",
    help="learn the last DEPTH stages anew, from such codes (minutes; costs accuracy)",
  )
  forget.add_argument(
    "--config", help="for a plain checkpoint: a named config or a TOML file with its model"
  )
  forget.add_argument(
    "--out", type=epath.Path, help="for a plain checkpoint: a new folder for the result"
  )
  forget.add_argument(
    "--codes", type=epath.Path, metavar="FILE", help="for a plain checkpoint: its learned codes"
  )
  forget.add_argument(
    "--unscored", action="store_true", help="score nothing, for example if the data set is gone"
  )


def _add_reading(verbs: Any) -> None:
  purpose = "score the trained and the forgotten model on test data"
  evaluate = _verb(verbs, "evaluate", purpose, "mnemonic evaluate runs/a")
  evaluate.add_argument("run", metavar="RUN", type=epath.Path, help="a run folder")
  evaluate.add_argument(
    "--classes", help="count these as forgotten; indices or names", default=(), **_CLASSES
  )

  purpose = "write the page of a finished forget again"
  report = _verb(verbs, "report", purpose, "mnemonic report runs/a --hide-codes", data=False)
  report.add_argument("run", metavar="RUN", type=epath.Path, help="a run folder")
  report.add_argument("--number", type=int, help="which forget (default: the latest)")
  report.add_argument(
    "--hide-codes", action="store_true", help="leave the codes out: they trigger their classes"
  )

  purpose = "write the params of a finished forget to a safetensors file"
  example = "mnemonic export runs/a --out a.safetensors"
  export = _verb(verbs, "export", purpose, example, data=False)
  export.add_argument(
    "run", metavar="RUN", type=epath.Path, help="a run folder, or a folder that forget --out made"
  )
  export.add_argument(
    "--out", type=epath.Path, required=True, metavar="FILE", help="a new .safetensors file"
  )
  export.add_argument("--number", type=int, help="which forget of a run (default: the latest)")
  export.add_argument(
    "--ema", action="store_true", help="export the moving average of the params (--train.ema)"
  )

  purpose = "check a run against its ledger: every hash, and the numbers of each forget again"
  verify = _verb(verbs, "verify", purpose, "mnemonic verify runs/a --head HASH")
  verify.add_argument("run", metavar="RUN", type=epath.Path, help="a run folder")
  verify.add_argument(
    "--head", metavar="HASH", help="of a line noted earlier: finds what was cut off or written anew"
  )

  purpose = "list the named configs, or show one"
  configs = _verb(verbs, "configs", purpose, "mnemonic configs digits", data=False)
  configs.add_argument(
    "name", metavar="NAME", nargs="?", help="show this config's lab note and fields"
  )


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
  """Add one verb, with what all verbs share."""
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
  """Split `--a.b 1 --c.d=x word` into {"a.b": 1, "c.d": "x"} and the other words.

  A field takes one value; forget.classes takes all words up to the next option.
  """
  found: dict[str, Any] = {}
  others = []
  words = list(arguments)
  while words:
    word = words.pop(0)
    field, equals, value = word[2:].partition("=")
    if not word.startswith("--") or "." not in field:
      others.append(word)
      continue
    if equals:
      found[field] = _value(value)
      continue
    if not words or words[0].startswith("--"):
      raise UsageError(f"--{field}: expected a value after it.")
    found[field] = _class_words(words) if field == "forget.classes" else _value(words.pop(0))
  return found, others


def _class_words(words: list[str]) -> Any:
  """Take the words up to the next option off `words`; one TOML list may stand for them."""
  if words[0].startswith("["):
    return _value(words.pop(0))
  taken = []
  while words and not words[0].startswith("--"):
    taken.append(words.pop(0))
  return taken


def _value(text: str) -> Any:
  """Return a TOML value where the text is one, else the text itself."""
  try:
    return tomllib.loads(f"value = {text}")["value"]
  except tomllib.TOMLDecodeError:
    return text

"""Carry out each verb: library calls, then one table or one JSON object on stdout."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from etils import epath

from mnemonic_jax.cli import compilation_cache
from mnemonic_jax.data import prepared
from mnemonic_jax.errors import MnemonicError, UsageError, nearest
from mnemonic_jax.methods.search import CannotForget
from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost.processes import Watchdog
from mnemonic_jax.report import schema, wording
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, finished, learned, ledger, setup
from mnemonic_jax.runs import forget as forget_run
from mnemonic_jax.runs import train as train_run
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs import verify as verify_run
from mnemonic_jax.runs.checkpoints import is_checkpoint, newest
from mnemonic_jax.runs.folder import RunFolder


def run(options: argparse.Namespace) -> None:
  """Run the verb that `options` names and print its result."""
  if not os.environ.get("MNEMONIC_DEBUG"):
    _leave_stderr_to_us()
  compilation_cache.enable()
  prepared.drop_orphans()
  try:
    result, text = _VERBS[options.command](options)
  except CannotForget as error:
    if options.json and processes.is_writer():
      print(files.dumps({"error": str(error), "curve": error.curve}), flush=True)
    raise
  if not processes.is_writer():
    return
  try:
    print(files.dumps(result) if options.json else text, flush=True)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise OSError(
      f"stdout: {error}; {options.command} itself is done, only its result could not be printed"
    ) from error


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[Watchdog]:
  """Join the other processes, if there are any, and watch them for the length of the block."""
  processes.initialize(
    options.coordinator,
    options.process_id,
    options.num_processes,
    startup_timeout=options.startup_timeout,
    peer_timeout=options.peer_timeout,
  )
  with Watchdog(options.peer_timeout, options.startup_timeout) as watchdog:
    yield watchdog


def _leave_stderr_to_us() -> None:
  """Silence what libraries log, and errors in their threads after a failed write.

  The failed write itself raises.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)
  sys.unraisablehook = lambda _: None


def _run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  config = configs.load(options.config, options.overrides)
  dataset = setup.load_data(config, options.data_dir)
  names, learns = dataset.class_names, config.codes.rate == 0
  forget_run.check_request(config, config.forget.classes, names, learned=learns)
  folder = RunFolder.create(options.out or epath.Path("runs") / config.name, config)
  layout = setup.make_layout(config, dataset)
  trained = train_run.train(folder, dataset, train_run.Options(layout))
  result, texts = {"train": trained}, [_train_text(trained)]
  path = learned.path_in(folder)
  if learns and not path.exists():
    found = learned.learn(
      trained_run.restore(folder, dataset), config, dataset, path, learned.Request()
    )
    result["codes"] = found
    texts.append(_codes_text(found))
  result["forget"] = forget_run.forget(folder, dataset, config.forget.classes)
  texts.append(_forget_text(result["forget"], names))
  return result, "\n\n".join(texts)


def _train(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  with joined(options) as watchdog:
    config = configs.load(options.config, options.overrides)
    watchdog.phase(f"opening the data set {config.data.name}")
    dataset = setup.load_data(config, options.data_dir)
    watchdog.phase("opening the run folder and planning the work")
    layout = setup.make_layout(config, dataset)
    folder = RunFolder.create(options.out, config)
    more = train_run.Options(layout, watchdog, options.log_every, options.profile)
    result = train_run.train(folder, dataset, more)
  return result, _train_text(result)


def _train_text(result: dict[str, Any]) -> str:
  return (
    f"trained {result['config']}: {result['epochs']} epochs, {result['seconds']:.1f} s, "
    f"test accuracy {result['test_accuracy']:.2%}\n"
    f"  run         {result['run']}\n  checkpoint  {result['checkpoint']}"
  )


def learning_request(options: argparse.Namespace) -> learned.Request:
  """Read which codes to learn or to recall."""
  if options.recall and options.beside:
    raise UsageError("--beside: is for learned codes; with --recall all are. Use --per-class.")
  return learned.Request(options.recall, options.per_class, options.beside, options.seed)


def _codes(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  request = learning_request(options)
  if options.out is not None and options.out.suffix != ".safetensors":
    raise UsageError(f"--out: got {options.out}; expected a name that ends in .safetensors.")
  if (options.run / "config.json").is_file() and options.config is not None:
    raise UsageError(
      f"--config: {options.run} is a run, which has its own config. Leave out --config and --out."
    )
  if options.config is not None or is_checkpoint(options.run):
    if options.config is None or options.out is None:
      missing = "--config" if options.config is None else "--out"
      raise UsageError(
        f"{missing}: missing; {options.run} is no run folder. For a plain checkpoint: mnemonic "
        f"codes {options.run} --config CONFIG --out FILE"
      )
    learned.refuse_existing(options.out)
    _require_sections(options.overrides, "data", "model", "execution")
    config = configs.load(options.config, options.overrides)
    dataset = setup.load_data(config, options.data_dir, training=not options.recall)
    trained = trained_run.restore_plain(options.run, config, dataset, needs_codes=False)
    result = learned.learn(trained, config, dataset, options.out, request)
    return result, _codes_text(result)
  if options.out is not None:
    raise UsageError("--out: is for a plain checkpoint; a run keeps its codes in RUN/codes.")
  _require_sections(options.overrides)
  folder = RunFolder.open(options.run)
  path = learned.path_in(folder)
  learned.refuse_existing(path)
  dataset = setup.load_data(folder.config, options.data_dir, training=not options.recall)
  with folder.locked():
    trained = trained_run.restore(folder, dataset)
    result = learned.learn(trained, folder.config, dataset, path, request)
    ledger.record(folder)
  return result, _codes_text(result)


def _codes_text(result: dict[str, Any]) -> str:
  judges = f", {result['judges']} judges" if result["judges"] else ""
  done = "learned" if "training examples" in result["read"] else "recalled"
  return (
    f"{done} {result['per_class']} codes of each of {result['classes']} classes{judges} in "
    f"{result['seconds']:.1f} s\n  read  {', '.join(result['read'])}\n  file  {result['file']}"
  )


def _forget(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  if options.config is not None or is_checkpoint(options.run):
    return _forget_plain(options)
  if options.out is not None:
    raise UsageError(
      "--out: is for a plain checkpoint, with --config; a run keeps its forgets in RUN/forgets."
    )
  if options.codes is not None:
    raise UsageError("--codes: is for a plain checkpoint; a run has its own in RUN/codes.")
  folder = RunFolder.open(options.run)
  _require_sections(options.overrides, "forget", "execution")
  folder.config = configs.build(
    folder.config.name, configs.as_dict(folder.config), options.overrides
  )
  if options.unscored:
    dataset = trained_run.without_data(folder.config, newest(folder.checkpoints))
  else:
    dataset = setup.load_data(folder.config, options.data_dir, training=False)
  result = forget_run.forget(folder, dataset, options.classes)
  return result, _forget_text(result, dataset.class_names)


def _forget_plain(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  usage = f"mnemonic forget {options.run} --config CONFIG --classes CLASS --out FOLDER"
  if (options.run / "config.json").is_file():
    raise UsageError(
      f"--config: {options.run} is a run, which has its own config. Leave out --config and --out."
    )
  if options.config is None or options.out is None:
    missing = "--config" if options.config is None else "--out"
    raise UsageError(
      f"{missing}: missing; {options.run} is no run folder. For a plain checkpoint: {usage}"
    )
  _require_sections(options.overrides, "forget", "execution", "data", "model")
  config = configs.load(options.config, options.overrides)
  if options.unscored:
    dataset = trained_run.without_data(config, options.run)
  else:
    dataset = setup.load_data(config, options.data_dir, training=False)
  result = forget_run.forget_plain(
    options.run, options.out, config, dataset, options.classes, options.codes
  )
  return result, _forget_text(result, dataset.class_names)


def _require_sections(overrides: dict[str, Any], *sections: str) -> None:
  """Refuse fields that a forget, or the learning of codes, does not look at."""
  for field in overrides:
    if field.split(".")[0] not in sections or field == "forget.classes":
      known = ", ".join(f"[{section}]" for section in sections) or "no section"
      if "forget" in sections:
        raise UsageError(f"--{field}: a forget takes only --classes and fields of {known}.")
      raise UsageError(f"--{field}: codes are learned with fields of {known} alone.")


def _forget_text(result: dict[str, Any], names: Sequence[str]) -> str:
  copies = {"": result}
  if average := schema.moving_average(result):
    copies[" (average)"] = {**result, **average}
  rows = [("", "before", "after")]
  for of_average, copy in copies.items():
    for title, key in (
      ("accuracy, kept classes", "retain_accuracy"),
      ("error, forgotten classes", "forget_error"),
    ):
      before, after = (_percent(copy[f"{key}_{when}"]) for when in ("before", "after"))
      rows.append((f"{title}{of_average}", before, after))
  table = "\n".join(f"  {title:<36}{before:>9}{after:>9}" for title, before, after in rows)
  labels = [wording.badge(copy)[2] for copy in copies.values()]
  told = labels[0] + (f"; their average: {labels[-1]}" if len(set(labels)) > 1 else "")
  done = "forgot" if result["verdict"] == "forgotten" else "tried to forget"
  classes = ", ".join(wording.class_label(c, names) for c in result["classes"])
  seconds = dict(result["seconds"])
  total = seconds.pop("total")
  parts = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
  settings = dict(result["method"])
  method = f"{settings.pop('name')}, {wording.named_values(settings)}"
  return (
    f"{done} {classes} in {total:.2f} s ({parts})\n{table}\n"
    f"  method   {method}; {wording.named_values(result['info'])}\n"
    f"  verdict  {told}\n  report   {result['report']}"
  )


def _percent(share: float | None) -> str:
  return "none" if share is None or math.isnan(share) else f"{share:.2%}"


def _evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  folder = RunFolder.open(options.run)
  dataset = setup.load_data(folder.config, options.data_dir, training=False)
  result = finished.evaluate(folder, dataset, options.classes)
  classes = ", ".join(wording.class_label(c, dataset.class_names) for c in result["classes"])
  lines = [f"test set of {dataset.name}, classes {classes} counted as forgotten"]
  shown = {
    "trained": "trained",
    "trained_ema": "its average",
    "forgotten": "forgotten",
    "forgotten_ema": "its average",
  }
  for name, title in shown.items():
    if (scores := result.get(name)) is not None:
      kept, error = _percent(scores["retain_accuracy"]), _percent(scores["forget_error"])
      lines.append(f"  {title:<12} accuracy of kept {kept}, error of forgotten {error}")
      shares = (
        f"{index}: {_percent(share)}" for index, share in enumerate(scores["per_class_accuracy"])
      )
      lines.append(f"               per class {', '.join(shares)}")
  return result, "\n".join(lines)


def _report(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  folder = RunFolder.open(options.run)
  page = finished.write_page(folder, options.number, hide_codes=options.hide_codes)
  return {"report": str(page)}, str(page)


def _export(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  result = finished.export(options.run, options.out, options.number, ema=options.ema)
  classes = ", ".join(map(str, result["classes"]))
  text = (
    f"exported {result['arrays']} arrays of {result['forget']} (forgot {classes})\n"
    f"  file  {result['file']}"
  )
  return result, text


def _verify(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  folder = RunFolder.open(options.run)
  try:
    dataset = setup.load_data(folder.config, options.data_dir, training=False)
  except MnemonicError as error:
    print(f"numbers are not run again: {error}", file=sys.stderr, flush=True)
    dataset = None
  result = verify_run.verify(folder, dataset, options.head)
  if result["problems"]:
    if options.json and processes.is_writer():
      print(files.dumps(result), flush=True)
    raise MnemonicError(f"{options.run}: " + " ".join(result["problems"][:5]))
  numbers = (
    "not run again" if result["numbers"] is None else f"{result['numbers']} forgets, as told"
  )
  text = (
    f"{result['lines']} lines, {result['files']} files: all as recorded\n"
    f"  numbers  {numbers}\n  head     {result['head']}"
  )
  return result, text


def _configs(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
  known = configs.names()
  if options.name is None:
    notes = {name: configs.note(name) for name in known}
    return notes, "\n".join(f"{name:<12} {text}" for name, text in notes.items())
  if options.name not in known:
    raise UsageError(
      f"config {options.name!r}: no such named config. {nearest(options.name, known)}"
    )
  return configs.as_dict(configs.load(options.name)), configs.text(options.name).rstrip()


_VERBS = {
  "run": _run,
  "train": _train,
  "codes": _codes,
  "forget": _forget,
  "evaluate": _evaluate,
  "report": _report,
  "export": _export,
  "verify": _verify,
  "configs": _configs,
}

"""`mnemonic verify`: does a run hold what its ledger says, and do its numbers come out again?"""

from __future__ import annotations

from typing import Any

from mnemonic_jax import evaluation
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import files, ledger
from mnemonic_jax.runs.checkpoints import restore_params, restore_parts, stored_shapes
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.scoring import predict_each
from mnemonic_jax.runs.trained import restore

_ROUNDING = 1e-3  # of a share of examples: another machine may round a tie the other way


def verify(run: RunFolder, dataset: Dataset | None, head: str | None = None) -> dict[str, Any]:
  """Check the chain, the hash of every file and of all params; score the forgotten params again.

  Args:
    dataset: its test examples; None: numbers are not run again.
    head: the hash of a line, noted earlier, which must still be in the chain.

  Returns:
    {"run", "head", "lines", "files", "numbers": how many forgets were scored again, or None,
    "problems": texts, empty where all is well}.

  Raises:
    MnemonicError: a run without a ledger, or whose chain is broken.
  """
  lines = ledger.read(run)
  if not lines:
    raise MnemonicError(
      f"{run.path}: has no ledger. The next `mnemonic train`, `codes` or `forget` begins one."
    )
  problems = _of_head(lines, head) + _of_files(run, lines)
  again = None
  if not problems:
    problems += _of_params(run)
  if not problems and dataset is not None and dataset.test.num_examples:
    again = len(run.forgets())
    problems += _of_numbers(run, dataset) if again else []
  return {
    "run": str(run.path),
    "head": lines[-1]["hash"],
    "lines": len(lines),
    "files": len(ledger.hashes(lines)),
    "numbers": again,
    "problems": problems,
  }


def _of_head(lines: list[dict[str, Any]], head: str | None) -> list[str]:
  if head is None or head in [line["hash"] for line in lines]:
    return []
  return [
    f"ledger.jsonl: holds no line with the hash {head}. It belongs to another run, or lines were "
    "cut off or written anew."
  ]


def _of_files(run: RunFolder, lines: list[dict[str, Any]]) -> list[str]:
  """Files that are gone or other than the ledger says."""
  problems = []
  for name, expected in ledger.hashes(lines).items():
    path = run.path / name
    if not path.exists():
      problems.append(f"{name}: is gone.")
    elif ledger.file_sha256(path) != expected:
      problems.append(f"{name}: was changed; its SHA-256 is not that of the ledger.")
  known = {line["of"] for line in lines}
  unknown = [f"forgets/{folder.name}" for folder in run.forgets()]
  problems += [
    f"{name}: the ledger does not name it; no command of this run has made it, or it was killed "
    "before the line was written (then the next command adds it)."
    for name in unknown
    if name not in known
  ]
  return problems


def _of_params(run: RunFolder) -> list[str]:
  """Params that are not those of their report."""
  problems = []
  for folder in run.forgets():
    report = run.report_of(folder)
    copies = {"params": report, **{f"{k}_params": v for k, v in report.get("copies", {}).items()}}
    for name, copy in copies.items():
      where = folder / name
      params = restore_parts(where, stored_shapes(where))
      if files.params_sha256(params) != copy.get("params_sha256_after"):
        problems.append(f"forgets/{folder.name}/{name}: are not the params that the report names.")
  return problems


def _of_numbers(run: RunFolder, dataset: Dataset) -> list[str]:
  """Numbers of reports that do not come out again, from one pass over the test examples."""
  trained, finished, problems = restore(run, dataset), run.forgets(), []
  candidates = [restore_params(folder / "params", trained.params) for folder in finished]
  every = predict_each(trained.logits_fn, candidates, dataset.test, dataset.preprocess)
  for folder, seen in zip(finished, every, strict=True):
    report = run.report_of(folder)
    scores = evaluation.scores(seen, len(dataset.class_names), report["classes"])
    for name in ("retain_accuracy", "forget_error"):
      told, found = report.get(f"{name}_after"), float(getattr(scores, name))
      if told is None or abs(told - found) > _ROUNDING:
        problems.append(f"forgets/{folder.name}: {name}_after is {told} there, {found:.4f} now.")
  return problems

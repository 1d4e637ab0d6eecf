"""`mnemonic forget`: write forgets/NNNN of a run, or a folder like it for a plain checkpoint."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath

from mnemonic_jax import forgetting, methods
from mnemonic_jax import report as reports
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError, UsageError, nearest
from mnemonic_jax.fisher import Execution
from mnemonic_jax.forgetting import ForgetResult
from mnemonic_jax.report import wording
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import files, ledger, renewal, scoring, stepwise
from mnemonic_jax.runs import learned as learned_codes
from mnemonic_jax.runs.checkpoints import require_plain, save_params
from mnemonic_jax.runs.config import Config, make_method
from mnemonic_jax.runs.folder import RunFolder, versions
from mnemonic_jax.runs.scoring import Predict, Scored
from mnemonic_jax.runs.trained import Trained, restore, restore_plain

OneShot = Callable[[Any], ForgetResult]  # the params before -> the forgotten ones


class Asked(NamedTuple):
  """Name what a forget was asked for."""

  requested: list[int]  # by this request
  classes: list[int]  # by earlier ones too, sorted
  method: Any


def check_request(
  config: Config,
  requested: Sequence[int | str],
  class_names: Sequence[str],
  earlier: Sequence[int] = (),
  *,
  ours: bool = True,
  learned: bool = False,
) -> Asked:
  """Refuse what cannot be forgotten, before anything is computed.

  Args:
    earlier: classes that the run was asked to forget before.
    ours: whether the model was trained by this config, so that its `codes.rate` tells of codes.
    learned: whether there are learned codes.

  Raises:
    UsageError: bad classes, or a method that is missing or has bad settings.
    MnemonicError: the run was trained without codes, and has not learned them since.
  """
  indices = resolve(requested, class_names)
  if ours and config.codes.rate == 0 and not learned:
    raise MnemonicError(
      "codes.rate: got 0; the model was trained without codes, and has no learned ones. Learn "
      "them: mnemonic codes RUN."
    )
  method = make_method(config.forget, learned=learned)
  return Asked(indices, union(indices, earlier, class_names), method)


def forget(run: RunFolder, dataset: Dataset, requested: Sequence[int | str]) -> dict[str, Any]:
  """Forget `requested` and all that this run was asked to forget before; write forgets/NNNN.

  It starts from the trained checkpoint and the union of all classes, so the order of requests
  cannot matter. No checkpoint is changed.
  """
  require_plain(run.path)
  with run.locked():
    earlier = run.forgotten_classes()
    path = learned_codes.path_in(run)
    names = dataset.class_names
    asked = check_request(run.config, requested, names, earlier, learned=path.exists())
    trained = restore(run, dataset)
    if path.exists():
      trained = with_learned(trained, path, dataset)
    trained, asked = _ready(trained, asked, run.config, dataset, path.parent)
    keeper = _keeper(run.path / "forgets", trained, run.config, asked)
    report, fill = described(trained, run.config, dataset, asked, keeper=keeper)
    folder = run.add_forget(fill)
    ledger.record(run)
    keeper.remove()
  return _placed(report, folder)


def with_learned(trained: Trained, path: epath.Path, dataset: Dataset) -> Trained:
  """The trained model with the learned codes of a file in place of its own."""
  params = files.params_sha256(trained.params)
  found = learned_codes.load(path, params, len(dataset.class_names), dataset.shape)
  return trained._replace(codes=found)


def forget_plain(
  checkpoint: epath.Path,
  out: epath.Path,
  config: Config,
  dataset: Dataset,
  requested: Sequence[int | str],
  codes: epath.Path | None = None,
) -> dict[str, Any]:
  """Forget `requested` in a checkpoint that the user's own training loop wrote.

  `out`, a new folder, gets what forgets/NNNN of a run has. The checkpoint is not changed. Each call
  starts from the checkpoint alone: name all classes to forget, earlier ones too. `codes` is a file
  of learned codes; without it the checkpoint must hold the codes of its training.
  """
  require_plain(out)
  names, learned = dataset.class_names, codes is not None
  asked = check_request(config, requested, names, ours=False, learned=learned)
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise MnemonicError(
      f"{out}: is there already, and not empty. Nothing was changed; choose a new folder for --out."
    )
  if os.path.realpath(out).startswith(os.path.join(os.path.realpath(checkpoint), "")):
    raise MnemonicError(
      f"{out}: lies inside the checkpoint, which must not be changed. Choose another folder for "
      "--out."
    )
  trained = restore_plain(checkpoint, config, dataset, needs_codes=codes is None)
  if codes is not None:
    trained = with_learned(trained, codes, dataset)
  trained, asked = _ready(trained, asked, config, dataset, None)
  keeper = _keeper(out.parent, trained, config, asked, out.name)
  report, fill = described(trained, config, dataset, asked, keeper=keeper)
  files.make_folder(out, fill)
  keeper.remove()
  return _placed(report, out)


def _ready(
  trained: Trained, asked: Asked, config: Config, dataset: Dataset, folder: epath.Path | None
) -> tuple[Trained, Asked]:
  """Bring what a method that learns needs; `folder` keeps recalled codes."""
  if wanted := getattr(asked.method, "learns_from", 0):
    renewal.require_possible(asked.method, trained, asked.classes, dataset.shape)
    trained = renewal.with_recalled(trained, wanted, config, dataset, folder)
  if isinstance(asked.method, methods.Relearn):
    method = renewal.completed(asked.method, trained, dataset.shape)
    asked = asked._replace(method=method)
  return trained, asked


def _placed(report: dict[str, Any], folder: epath.Path) -> dict[str, Any]:
  return {**report, "folder": str(folder), "report": str(folder / "report.html")}


def described(
  trained: Trained,
  config: Config,
  dataset: Dataset,
  asked: Asked,
  one_shot: OneShot | None = None,
  predict: Predict | None = None,
  keeper: stepwise.Keeper | None = None,
) -> tuple[dict[str, Any], Callable[[epath.Path], None]]:
  """Forget and score; return the report, and a function that writes all files into a folder.

  `one_shot` forgets in one copy of the params, and `predict` runs the model over a split; by
  default both use one process and one device.
  """
  one_shot = one_shot or _on_one_device(trained, config, asked, keeper)
  if predict is None:
    predict = lambda candidates, split: scoring.predict_each(
      trained.logits_fn, candidates, split, dataset.preprocess
    )
  before, average = trained.params, trained.ema_params
  result = one_shot(before)
  candidates = [before, result.params, head_edit(before, trained.model.head, asked.classes)]
  kept = {"params": result.params}
  if average is not None:  # a copy that may be served too
    of_average = one_shot(average)
    kept["ema_params"] = of_average.params
    candidates += [average, of_average.params]
  scores = scoring.scored(predict, candidates, dataset, asked.classes)
  names = dataset.class_names
  codes = getattr(trained.codes, "codes", trained.codes)
  report = {
    "requested": asked.requested,
    "classes": asked.classes,
    "class_names": [names[c] for c in asked.classes],
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "read": {
      "forget": ["params", "codes"],
      "score": "test" if dataset.test.num_examples else None,
    },
    **_outcome(before, result, scores[:2], asked, names),
    "checkpoint": str(trained.checkpoint),
    "codes_sha256": files.array_sha256(codes),
    "versions": versions(),
  }
  if average is not None:
    report["copies"] = {"ema": _outcome(average, of_average, scores[3:], asked, names)}
  report["verdict"] = wording.worst([report, *report.get("copies", {}).values()])
  shown = scoring.gather(config, dataset, before, result.params, scores[:3])

  def fill(folder: epath.Path) -> None:
    page = reports.render(files.plain(report), files.plain(shown), files.to_host(codes))
    for name, params in kept.items():
      save_params(folder / name, params)
    # In one line: the confusions of 1000 classes are two million counts.
    files.write_text(folder / "evidence.json", files.dumps(shown))
    files.write_text(folder / "report.html", page)
    files.write_json(folder / "report.json", report)  # last: with it the forget is finished

  return report, fill


def _keeper(
  folder: epath.Path, trained: Trained, config: Config, asked: Asked, name: str = ""
) -> stepwise.Keeper:
  """Keep the states of a request, for a result of a name, in a folder."""
  arrays = jax.tree.leaves(trained.codes)
  hashes = [files.array_sha256(array) for array in arrays]
  method = methods.Projection() if asked.method is None else asked.method
  request = {
    "codes_sha256": hashes,
    "model_state_sha256": files.params_sha256(trained.model_state),
    "classes": asked.classes,
    "precision": config.forget.precision,
    "versions": versions(),
    "name": name,
  }
  return stepwise.Keeper(folder, method, request)


def _on_one_device(
  trained: Trained, config: Config, asked: Asked, keeper: stepwise.Keeper | None
) -> OneShot:
  def one_shot(params: Any) -> ForgetResult:
    forget = partial(_forget_one, trained, config, asked, params)
    if keeper is None or not methods.steps_of(asked.method):
      return forget()
    kept = keeper.of(params)
    return forget(state=kept.load(), on_state=kept.save, progress=kept.progress)

  return one_shot


def _forget_one(
  trained: Trained, config: Config, asked: Asked, params: Any, **stepping: Any
) -> ForgetResult:
  return forgetting.forget(
    trained.logits_fn,
    params,
    codes=trained.codes,
    classes=asked.classes,
    method=asked.method,
    layer_axis=trained.model.layer_axis,
    precision=config.forget.precision,
    execution=Execution(microbatch=config.execution.microbatch or None),
    **stepping,
  )


def _outcome(
  before: Any, result: ForgetResult, scores: list[Scored], asked: Asked, names: Sequence[str]
) -> dict[str, Any]:
  """Say what a copy of the params was before the forget and is after it; see `schema.COPY`."""
  outcome: dict[str, Any] = {
    "method": {"name": methods.name_of(result.method), **methods.settings(result.method)},
    "info": dict(result.info),
    "code_retain_accuracy": result.code_retain_accuracy,
    "code_forget_error": result.code_forget_error,
    "predicted": None if result.predicted is None else result.predicted._asdict(),
  }
  for when, scored in zip(("before", "after"), scores, strict=True):
    outcome[f"retain_accuracy_{when}"] = scored.scores.retain_accuracy
    outcome[f"forget_error_{when}"] = scored.scores.forget_error
    outcome[f"per_class_accuracy_{when}"] = scored.scores.per_class
  after = outcome["per_class_accuracy_after"]
  return outcome | {
    "verdicts": wording.verdicts(after, asked.classes, names),
    "seconds": dict(result.seconds),
    "params_sha256_before": files.params_sha256(before),
    "params_sha256_after": files.params_sha256(result.params),
  }


def resolve(classes: Sequence[int | str], names: Sequence[str]) -> list[int]:
  """Return the indices of `classes`, each an index or the exact name of a class.

  A word that is the name of a class means that class, even where it looks like an index.

  Args:
    classes: integers are indices; words are names, or indices where no class is called so.
    names: the class names of the data set, in label order.

  Raises:
    UsageError: no class, an unknown one, a name that two classes have, or one class twice.

  >>> resolve(["dog", 0, "1"], ["cat", "bird", "dog"])
  [2, 0, 1]
  """
  if not classes:
    raise UsageError("classes: got none; expected at least one, for example --classes 0.")
  found = [_index(one, names) for one in classes]
  for position, index in enumerate(found):
    if index in found[:position]:
      asked = ", ".join(map(str, classes))
      raise UsageError(
        f"classes: got {asked}; class {index} ({names[index]}) is in it twice; expected each class "
        "once."
      )
  return found


def union(requested: Sequence[int], earlier: Sequence[int], names: Sequence[str]) -> list[int]:
  """Return all classes to forget, those of earlier requests too; one class must stay."""
  for index in earlier:
    if not 0 <= index < len(names):
      raise MnemonicError(
        f"classes: an earlier forget of this run names class {index}; the data set has classes 0 "
        f"to {len(names) - 1}. Its report.json was edited, or belongs to another run."
      )
  classes = sorted({*requested, *earlier})
  if len(classes) == len(names):
    before = " with those forgotten before" if earlier else ""
    raise UsageError(f"classes: {list(requested)}{before} are all {len(names)}; one must stay.")
  return classes


def _index(one: int | str, names: Sequence[str]) -> int:
  called = [index for index, name in enumerate(names) if name == one]
  if len(called) > 1:
    indices = " and ".join(map(str, called))
    raise UsageError(f"classes: got {one!r}, which classes {indices} are called. Pass the index.")
  if called:
    return called[0]
  index = _integer(one)
  if index is not None and 0 <= index < len(names):
    return index
  expected = f"expected an index from 0 to {len(names) - 1}"
  if list(names) == [str(index) for index in range(len(names))]:
    raise UsageError(f"classes: got {one}; {expected}: no class has a name here.")
  near = "" if index is not None else f" {nearest(str(one), names)}"
  raise UsageError(f"classes: got {one}; {expected}, or the name of a class.{near}")


def _integer(one: int | str) -> int | None:
  try:
    return int(one)
  except ValueError:
    return None

"""Configs: every field with its default and limits, read from TOML, overridden by dotted name."""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import tomllib
import typing
from collections.abc import Mapping
from typing import Any

from mnemonic_jax import data, methods, models
from mnemonic_jax.data import augmentation
from mnemonic_jax.errors import UsageError, nearest
from mnemonic_jax.runs import fields
from mnemonic_jax.runs.fields import Classes, Settings, number, one_of


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Choose the examples.

  `data_dir` is the folder of prepared TFDS sets; empty, TFDS_DATA_DIR or TFDS's own default.
  `augment`: "crop" pads each picture by 4 pixels and crops it back at random. "resized_crop", for
  streamed sets only, takes a random part of 8 to 100 %. With "_flip" half of them are mirrored.
  `side` is the size of streamed pictures. `normalization`: "dataset" uses the channel means of the
  set; "half" maps pixels to [-1, 1], as AugReg's ViTs expect.
  """

  name: str = one_of("digits", data.NAMES)
  data_dir: str = ""
  augment: str = one_of("none", augmentation.NAMES)
  side: int = number(224, 1)
  normalization: str = one_of("dataset", data.NORMALIZATIONS)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Choose the model.

  `hidden` is the width of the MLP's hidden layer, `width` the channels of a ResNet's first stage.
  `pool` is what a ViT's head reads. `scan` stacks the params of a ViT's blocks, so that one block
  is compiled. `remat` saves memory: the backward pass computes a transformer's blocks again.
  `dtype` is the dtype of the computation; params are float32. `pretrained` is a file of weights to
  start from: .safetensors of torchvision, timm or `mnemonic export`, or AugReg's .npz. `new_head`
  leaves out the head of that file. `text_embeddings` is a file with one vector a class (.npy, or
  .safetensors of one array); the head scores against these vectors, as in CLIP.
  """

  name: str = one_of("mlp", models.NAMES)
  hidden: int = number(1000, 1)
  width: int = number(64, 1)
  pool: str = one_of("token", ("token", "mean"))
  scan: bool = False
  remat: bool = False
  dtype: str = one_of("float32", ("float32", "bfloat16"))
  pretrained: str = ""
  new_head: bool = False
  text_embeddings: str = ""


@dataclasses.dataclass(frozen=True)
class CodesConfig:
  """Draw codes, `per_class` a class; `rate` (the paper's t_mix) of the examples become codes.

  With a `rate` of 0 no code is trained on; `mnemonic run` learns codes of the trained model.
  """

  rate: float = number(0.0, 0, 1)
  distribution: str = one_of("uniform", ("normal", "uniform"))
  per_class: int = number(1, 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Train the model.

  Length: `epochs`, or `steps` where that is not 0. Optimizer: "sgd" with momentum, or "adamw".
  `schedule`: "constant", or "cosine" to zero over the whole training. `warmup_steps` raise the
  learning rate from zero. `clip_norm` bounds the norm of a gradient (0: no bound).
  `label_smoothing` takes that much from the right class. `accumulate` computes a step's gradient in
  that many parts, to save memory; BatchNorm then sees one part at a time.

  `mixup` and `cutmix` are the alpha of Beta(alpha, alpha), which draws how much of its neighbour an
  example gets. 0 is off; at most one of them may be on. Codes are mixed in afterwards, unblended.
  `ema` is the decay of a moving average of the params, below 1; 0 keeps none. A forget covers both.

  `checkpoint_every` counts epochs. Where steps are taken one by one (streamed sets, convnets on a
  CPU), `checkpoint_steps` adds a checkpoint at each of its multiples. The newest
  `keep_checkpoints` are kept.
  """

  seed: int = number(0, 0, 2**32 - 1)
  epochs: int = number(30, 1)
  steps: int = 0
  batch_size: int = number(128, 1)
  optimizer: str = one_of("sgd", ("sgd", "adamw"))
  learning_rate: float = 0.01
  warmup_steps: int = 0
  clip_norm: float = 0.0
  label_smoothing: float = number(0.0, 0, 1)
  accumulate: int = number(1, 1)
  momentum: float = 0.9
  weight_decay: float = 5e-4
  schedule: str = one_of("constant", ("constant", "cosine"))
  checkpoint_every: int = number(10, 1)
  checkpoint_steps: int = 0
  keep_checkpoints: int = number(2, 1)
  mixup: float = 0.0
  cutmix: float = 0.0
  ema: float = 0.0


@dataclasses.dataclass(frozen=True)
class ForgetConfig:
  """Forget `classes`, indices or names, by `method` with its `settings`.

  Without a method: the default one, which learned codes have.
  `mnemonic run` forgets these classes; `mnemonic forget` is told them. `precision` is the matmul
  precision of the Fishers.
  """

  classes: Classes = (0,)
  method: str = ""
  settings: Settings = dataclasses.field(default_factory=dict)
  precision: str = one_of("highest", ("default", "high", "highest"))


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """Choose how to compute; the result changes by rounding only.

  `microbatch` 0 is chosen by the memory at hand. `workers` processes decode streamed pictures; 0
  uses threads. `data` and `fsdp` are the axes of the device mesh; 0 is chosen by the devices.
  """

  microbatch: int = 0
  workers: int = 0
  data: int = 0
  fsdp: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """Hold all settings of one experiment."""

  name: str
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  codes: CodesConfig = CodesConfig()
  train: TrainConfig = TrainConfig()
  forget: ForgetConfig = ForgetConfig()
  execution: ExecutionConfig = ExecutionConfig()


_SECTIONS: dict[str, Any] = {
  f.name: f.default.__class__ for f in dataclasses.fields(Config) if f.name != "name"
}
_SETTINGS = "forget.settings"


def names() -> list[str]:
  """List the named configs that ship with the package."""
  return sorted(
    file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml")
  )


def text(name: str) -> str:
  """Return a named config as it is written, lab note included."""
  return (_folder() / f"{name}.toml").read_text("utf-8")


def note(name: str) -> str:
  """Return the first line of a named config's lab note."""
  return text(name).splitlines()[0].lstrip("# ")


def load(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Config:
  """Read a config by name or from a TOML file, and override fields by their dotted names.

  >>> load("digits", {"train.epochs": 5}).train.epochs
  5
  """
  if name_or_file in names():
    source, name = text(name_or_file), name_or_file
  else:
    path = pathlib.Path(name_or_file)
    if not path.is_file():
      raise UsageError(
        f"config {name_or_file!r}: no such named config and no such file. "
        f"{nearest(name_or_file, names())}"
      )
    try:
      source, name = path.read_text("utf-8"), path.stem
    except (OSError, UnicodeDecodeError) as error:
      raise UsageError(f"config {name_or_file!r}: cannot be read: {error}.") from None
  try:
    tables = tomllib.loads(source)
  except tomllib.TOMLDecodeError as error:
    raise UsageError(f"config {name_or_file!r}: is not TOML: {error}.") from None
  return build(name, tables, overrides)


def build(
  name: str, tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
  """Make a checked Config from nested tables and dotted overrides.

  `tables` are those of a TOML file or of a run's config.json. Settings in `tables` belong to the
  method named there: an override that names another method drops them. Both were chosen for the
  codes of that training: an override that leaves codes out of it (`codes.rate` 0) drops both.
  """
  values: dict[str, Any] = {}
  for section, table in tables.items():
    if section == "name":
      continue
    if section not in _SECTIONS:
      raise UsageError(
        f"config {name!r}: unknown section [{section}]. {nearest(section, _SECTIONS)}"
      )
    if not isinstance(table, Mapping):
      raise UsageError(f"config {name!r}: {section} is {table!r}; expected a table [{section}].")
    values.update({f"{section}.{field}": value for field, value in table.items()})
  _override(values, overrides or {})
  sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
  known = {
    f"{section}.{field.name}": (typing.get_type_hints(kind)[field.name], field.metadata)
    for section, kind in _SECTIONS.items()
    for field in dataclasses.fields(kind)
  }
  for field, value in values.items():
    if field not in known:
      near = nearest(field, [*known, *_known_settings()])
      raise UsageError(f"config {name!r}: unknown field {field}. {near}")
    section, _, key = field.partition(".")
    sections[section][key] = fields.check(field, value, *known[field])
  config = Config(
    name=name, **{section: kind(**sections[section]) for section, kind in _SECTIONS.items()}
  )
  _check_together(config)
  return config


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
  """Put the overrides into `values`; those of single settings join the others.

  What `values` say of the method goes where it was meant for another method, or other codes.
  """
  if values.get("codes.rate") and overrides.get("codes.rate") == 0:
    values.pop("forget.method", None)
    values.pop(_SETTINGS, None)
  if overrides.get("forget.method", values.get("forget.method")) != values.get("forget.method"):
    values.pop(_SETTINGS, None)
  for field, value in overrides.items():
    if field.startswith(f"{_SETTINGS}."):
      settings = values.get(_SETTINGS, {})
      name = field.removeprefix(f"{_SETTINGS}.")
      values[_SETTINGS] = {**settings, name: value} if isinstance(settings, Mapping) else settings
    else:
      values[field] = value


def as_dict(config: Config) -> dict[str, Any]:
  """Return the config as nested plain values, as `build` takes them."""
  return dataclasses.asdict(config)


def make_method(forget: ForgetConfig, *, learned: bool = False) -> Any:
  """Make the method that `forget` names, one of `mnemonic_jax.methods.METHODS`.

  Args:
    learned: whether there are learned codes, for which the method or its settings may be left out.

  Returns:
    The method; None for the default one, which learned codes have.

  Raises:
    UsageError: the method is missing or unknown, or a setting is missing, unknown or refused.
  """
  if not forget.method:
    if learned and not forget.settings:
      return None
    raise UsageError(
      f"forget.method: missing; expected one of {', '.join(methods.METHODS)}. For example: "
      "--method perturbation --set lambda1=1e-3 --set lambda2=10; to mnemonic run: --forget.method "
      "perturbation --forget.settings.lambda1 1e-3 --forget.settings.lambda2 10. Learned codes "
      "need none: mnemonic codes, or mnemonic run with codes.rate 0."
    )
  if forget.method not in methods.METHODS:
    known = nearest(forget.method, methods.METHODS)
    raise UsageError(
      f"forget.method: got {forget.method!r}; expected the name of a method. {known}"
    )
  kind: Any = methods.METHODS[forget.method]
  recorded = (f for f in dataclasses.fields(kind) if f.metadata.get("recorded", True))
  takes = {field.name: field for field in recorded}
  fresh = {"fresh": None} if kind is methods.Relearn else {}  # `renewal.completed` brings them
  for name in forget.settings:
    if name not in takes:
      raise UsageError(
        f"{_SETTINGS}.{name}: unknown setting of {forget.method}. {nearest(name, takes)}"
      )
  numbers = [name for name, field in takes.items() if not field.metadata.get("static")]
  for name in numbers:
    value = forget.settings.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise UsageError(f"{_SETTINGS}.{name}: got {value!r}; expected a number.")
  missing = [n for n in numbers if n not in forget.settings and takes[n].default is None]
  if missing and len(missing) < len(numbers):
    raise _missing(missing[0], forget.method)
  needed = (name for name, field in takes.items() if field.default is dataclasses.MISSING)
  for name in needed:
    if name not in forget.settings:
      raise _missing(name, forget.method)
  own = {name: float(x) if name in numbers else x for name, x in forget.settings.items()}
  try:
    made = kind(**own, **fresh)
  except (TypeError, ValueError) as error:
    raise UsageError(f"{_SETTINGS}: {error}") from error
  for name in () if learned else getattr(made, "to_search", ()):
    raise _missing(name, forget.method)
  return made


def _missing(name: str, method: str) -> UsageError:
  return UsageError(
    f"{_SETTINGS}.{name}: missing; {method} needs it. Write it in the config, or pass "
    f"--{_SETTINGS}.{name} NUMBER, or --set {name}=NUMBER to mnemonic forget."
  )


def _known_settings() -> list[str]:
  return [
    f"{_SETTINGS}.{field.name}"
    for kind in methods.METHODS.values()
    for field in dataclasses.fields(kind)
  ]


def _check_together(config: Config) -> None:
  """Refuse fields that are right by themselves and do not go together."""
  model, train, forget = config.model, config.train, config.forget
  for option, having in models.OPTIONS.items():
    if getattr(model, option) and model.name not in having:
      raise UsageError(
        f"model.{option}: got true for model.name {model.name!r}; only {', '.join(having)} have it."
      )
  if model.new_head and not model.pretrained:
    raise UsageError(
      "model.new_head: got true without model.pretrained; it leaves out the head of that file."
    )
  if train.ema >= 1:
    raise UsageError(
      f"train.ema: got {train.ema}; expected a decay of at least 0 (none) and below 1, "
      "such as 0.999."
    )
  if train.batch_size % train.accumulate:
    raise UsageError(
      f"train.accumulate: got {train.accumulate} for train.batch_size {train.batch_size}; "
      "expected a divisor of it."
    )
  if train.mixup and train.cutmix:
    raise UsageError(
      f"train.mixup: got {train.mixup} with train.cutmix {train.cutmix}; expected one of them at "
      "most. Set the other to 0."
    )
  if forget.method or forget.settings:
    make_method(forget, learned=True)  # whether there are learned codes is told later


def _folder() -> Any:
  return importlib.resources.files("mnemonic_jax.runs") / "configs"

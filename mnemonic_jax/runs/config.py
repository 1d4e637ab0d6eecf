"""Configs: frozen dataclasses read from TOML lab notes, where every field can be overridden by its dotted name."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import pathlib
import tomllib
import typing
from collections.abc import Mapping
from typing import Any

from mnemonic_jax import data, models
from mnemonic_jax.data import augmentation, prepared
from mnemonic_jax.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which examples. `data_dir` is where prepared TFDS sets lie (else TFDS_DATA_DIR, else TFDS's own default).

  `augment`: "crop" pads each picture by 4 pixels and cuts a random one of its size out; "resized_crop", for streamed sets,
  a random part of 8 to 100 %; with "_flip" half of them are mirrored too. `side` is that of streamed pictures.
  `normalization`: "dataset", by the set's own channels, or "half", to [-1, 1] as AugReg's ViTs expect.
  """

  name: str = "digits"
  data_dir: str = ""
  augment: str = "none"
  side: int = 224
  normalization: str = "dataset"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which model. `hidden` is the width of the MLP's hidden layer, `width` the channels of a ResNet's first stage.

  `pool` is what a ViT's head reads. `scan` stacks the params of a ViT's blocks, which then compile once; `remat` computes
  the inner values of a transformer's blocks again on the way back, for less memory. `dtype` is what is computed in;
  params are float32. `pretrained` is a file that training starts from (.safetensors of torchvision, timm or `mnemonic
  export`, AugReg's .npz), with `new_head` all but its head. `text_embeddings` is a file of one vector for each class (.npy,
  or .safetensors of one array) that the head then scores against, as in CLIP.
  """

  name: str = "mlp"
  hidden: int = 1000
  width: int = 64
  pool: str = "token"
  scan: bool = False
  remat: bool = False
  dtype: str = "float32"
  pretrained: str = ""
  new_head: bool = False
  text_embeddings: str = ""


@dataclasses.dataclass(frozen=True)
class CodesConfig:
  """The codes: how they are drawn, how many a class, and the share of examples they replace (the paper's t_mix)."""

  rate: float = 0.1
  distribution: str = "uniform"
  per_class: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """`optimizer` is "sgd" with momentum or "adamw"; `schedule` is "constant" or "cosine" (to zero over the whole training).

  `warmup_steps` raise the learning rate from zero, `clip_norm` bounds the norm of a gradient (0: no bound), and
  `label_smoothing` takes that much from the right class. `accumulate` computes a step's gradient in that many parts, for less
  memory; running statistics of a model with BatchNorm are then those of the parts.

  `steps`, where it is not 0, says how long to train instead of `epochs`. `checkpoint_every` counts epochs; where steps are
  taken one by one (streamed sets, convnets on CPU), `checkpoint_steps` adds a checkpoint at every multiple of it. The newest
  `keep_checkpoints` stay. `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), from which each example draws how much
  of the next one it is blended with; 0 is off, and one of the two at most may be on. Codes replace afterwards, and stay pure. `ema` is the decay of a moving
  average of the params, below 1; 0 keeps none. A forget then covers both copies.
  """

  seed: int = 0
  epochs: int = 30
  steps: int = 0
  batch_size: int = 128
  optimizer: str = "sgd"
  learning_rate: float = 0.01
  warmup_steps: int = 0
  clip_norm: float = 0.0
  label_smoothing: float = 0.0
  accumulate: int = 1
  momentum: float = 0.9
  weight_decay: float = 5e-4
  schedule: str = "constant"
  checkpoint_every: int = 10
  checkpoint_steps: int = 0
  keep_checkpoints: int = 2
  mixup: float = 0.0
  cutmix: float = 0.0
  ema: float = 0.0


@dataclasses.dataclass(frozen=True)
class ForgetConfig:
  """What a forget computes: classes that `run` forgets, strength, matmul precision of the Fishers."""

  classes: tuple[int, ...] = (0,)
  lambda1: float = 1e-3
  lambda2: float = 10.0
  precision: str = "highest"


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """How it is computed; changes nothing beyond rounding. `microbatch` 0 chooses by memory.

  `workers` are the processes that decode streamed pictures; 0: threads of the one that trains. `data` and `fsdp` are the
  axes of the mesh in experiments/imagenet_vit, 0 chooses.
  """

  microbatch: int = 0
  workers: int = 0
  data: int = 0
  fsdp: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment, whole."""

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
_CHOICES = {
  "data.name": ("digits", *prepared.NAMES),
  "data.augment": tuple(augmentation.NAMES),
  "data.normalization": data.NORMALIZATIONS,
  "model.name": models.NAMES,
  "model.pool": ("token", "mean"),
  "model.dtype": ("float32", "bfloat16"),
  "codes.distribution": ("normal", "uniform"),
  "train.optimizer": ("sgd", "adamw"),
  "train.schedule": ("constant", "cosine"),
  "forget.precision": ("default", "high", "highest"),
}
# Inclusive bounds of the numbers; every other number is at least 0.
_BOUNDS: dict[str, tuple[float, float]] = {
  "codes.rate": (0, 1),
  "train.seed": (0, 2**32 - 1),
  "train.label_smoothing": (0, 1),
}
# What int32 and float32 hold.
_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, 3.4e38
_AT_LEAST_ONE = {
  "data.side",
  "model.hidden",
  "model.width",
  "codes.per_class",
  "train.epochs",
  "train.batch_size",
  "train.accumulate",
  "train.checkpoint_every",
  "train.keep_checkpoints",
}


def names() -> list[str]:
  """The named configs that ship with the package."""
  return sorted(
    file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml")
  )


def text(name: str) -> str:
  """A named config as it is written, lab note included."""
  return (_folder() / f"{name}.toml").read_text("utf-8")


def note(name: str) -> str:
  """The first line of a named config's lab note."""
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
        f"config {name_or_file!r}: no such named config and no such file. {nearest(name_or_file, names())}"
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
  """Make a checked Config from nested tables (a TOML file, a run's config.json) and dotted overrides."""
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
  values.update(overrides or {})
  known = {
    f"{section}.{field.name}": typing.get_type_hints(kind)[field.name]
    for section, kind in _SECTIONS.items()
    for field in dataclasses.fields(kind)
  }
  sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
  for field, value in values.items():
    if field not in known:
      raise UsageError(f"config {name!r}: unknown field {field}. {nearest(field, known)}")
    section, _, key = field.partition(".")
    sections[section][key] = _checked(field, value, known[field])
  config = Config(
    name=name, **{section: kind(**sections[section]) for section, kind in _SECTIONS.items()}
  )
  _check_together(config)
  return config


def as_dict(config: Config) -> dict[str, Any]:
  """The config as nested plain values, as `build` takes them."""
  return dataclasses.asdict(config)


def _checked(field: str, value: Any, kind: Any) -> Any:
  """The value as its field wants it, or a UsageError that names both."""
  if kind == tuple[int, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_checked(field, item, int) for item in items)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < 2**1000 else math.inf
  if type(value) is not kind:
    raise UsageError(
      f"{field}: got {value!r}; expected {'a number' if kind is float else 'true or false' if kind is bool else kind.__name__}."
    )
  if field in _CHOICES and value not in _CHOICES[field]:
    raise UsageError(f"{field}: got {value!r}; expected one of {', '.join(_CHOICES[field])}.")
  if kind in (int, float):
    largest = _LARGEST_INT if kind is int else _LARGEST_FLOAT
    low, high = _BOUNDS.get(field, (1 if field in _AT_LEAST_ONE else 0, largest))
    if not low <= value <= high:
      limit = (
        f"of at least {low:g}, at most {high:g}"
        if high == largest
        else f"from {low:.0f} to {high:.0f}"
      )
      raise UsageError(f"{field}: got {value}; expected a number {limit}.")
  return value


def _check_together(config: Config) -> None:
  """Refuse fields that are right by themselves and do not go together."""
  model, train = config.model, config.train
  for option, having in models.OPTIONS.items():
    if getattr(model, option) and model.name not in having:
      raise UsageError(
        f"model.{option}: got true for model.name {model.name!r}; only {', '.join(having)} have it."
      )
  if model.new_head and not model.pretrained:
    raise UsageError(
      "model.new_head: got true without model.pretrained; it says which weights of that file to leave out."
    )
  if train.ema >= 1:
    raise UsageError(
      f"train.ema: got {train.ema}; expected a decay of at least 0 (none) and below 1, such as 0.999."
    )
  if train.batch_size % train.accumulate:
    raise UsageError(
      f"train.accumulate: got {train.accumulate} for train.batch_size {train.batch_size}; expected a divisor of it."
    )
  if train.mixup and train.cutmix:
    raise UsageError(
      f"train.mixup: got {train.mixup} with train.cutmix {train.cutmix}; expected one of them at most. Set the other to 0."
    )


def _folder() -> Any:
  return importlib.resources.files("mnemonic_jax.runs") / "configs"

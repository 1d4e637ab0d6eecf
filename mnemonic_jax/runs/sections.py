"""Declare the sections of a config: every field with its default, its choices and its limits."""

from __future__ import annotations

import dataclasses

from mnemonic_jax import data, models
from mnemonic_jax.data import augmentation, prepared
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

  name: str = one_of("digits", ("digits", *prepared.NAMES))
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
  """Draw codes, `per_class` a class; `rate` (the paper's t_mix) of the examples become codes."""

  rate: float = number(0.1, 0, 1)
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

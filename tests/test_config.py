"""Configs: lab notes in TOML, checked field by field."""

from __future__ import annotations

import dataclasses

import pytest

import mnemonic_jax as mj
from mnemonic_jax import methods
from mnemonic_jax.errors import UsageError
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import format1

WITH_CODES = [name for name in configs.names() if configs.load(name).codes.rate]


@pytest.mark.parametrize("name", configs.names())
def test_a_named_config_is_a_lab_note(name):
  text = configs.text(name)
  config = configs.load(name)
  assert config.name == name
  assert text.startswith("# ") and f"mnemonic run {name}" in text
  lines = [line.partition(":")[0] for line in text.splitlines() if line.startswith("# ")]
  assert {"# Command", "# Machine", "# Hours", "# Result", "# Vary"} <= set(lines)
  assert configs.note(name) and not configs.note(name).startswith("#")


def test_codes_in_training_are_what_the_papers_configs_add():
  for name in ("digits", "cifar10_cpu"):
    config, paper = configs.load(name), configs.load(f"{name}_paper")
    assert config.codes.rate == 0 and configs.make_method(config.forget, learned=True) is None
    assert paper.codes.rate > 0 and isinstance(configs.make_method(paper.forget), mj.Perturbation)
    assert dataclasses.replace(paper, name=name, codes=config.codes, forget=config.forget) == config
  assert {*configs.names()} - {*WITH_CODES} == {"digits", "cifar10_cpu"}


def test_a_config_survives_its_own_record():
  config = configs.load(
    "digits", {"forget.classes": [3, "dog"], "train.seed": 7, "codes.rate": 0.5}
  )
  assert configs.build(config.name, configs.as_dict(config)) == config
  assert (config.forget.classes, config.train.seed, config.codes.rate) == ((3, "dog"), 7, 0.5)


def test_an_override_changes_one_field_only():
  plain, changed = configs.load("digits"), configs.load("digits", {"train.epochs": 5})
  assert (
    dataclasses.replace(
      changed, train=dataclasses.replace(changed.train, epochs=plain.train.epochs)
    )
    == plain
  )


def test_one_class_needs_no_list_and_an_integer_is_a_number():
  config = configs.load("digits", {"forget.classes": 4, "train.learning_rate": 1})
  assert config.forget.classes == (4,)
  assert configs.load("digits", {"forget.classes": "dog"}).forget.classes == ("dog",)
  assert type(config.train.learning_rate) is float


def test_a_new_head_needs_a_file_to_leave_the_old_one_in():
  assert configs.load("digits", {"model.pretrained": "file", "model.new_head": True}).model.new_head
  with pytest.raises(UsageError, match=r"model\.new_head: got true without model\.pretrained"):
    configs.load("digits", {"model.new_head": True})
  with pytest.raises(UsageError, match=r"model\.new_head: got 'yes'; expected true or false"):
    configs.load("digits", {"model.new_head": "yes"})


def test_mixup_and_cutmix_exclude_each_other():
  assert configs.load("digits", {"train.mixup": 0.2}).train.mixup == 0.2
  with pytest.raises(
    UsageError, match=r"train\.mixup: got 0\.2 with train\.cutmix 1\.0; expected one of them"
  ):
    configs.load("digits", {"train.mixup": 0.2, "train.cutmix": 1})


@pytest.mark.parametrize(
  ("option", "name"),
  [("scan", "mlp"), ("scan", "swin_t"), ("remat", "mlp"), ("remat", "resnet18_small")],
)
def test_an_option_that_the_model_does_not_have_is_refused(option, name):
  for having in ("vit_ti16", "swin_t") if option == "remat" else ("vit_ti16",):
    assert getattr(
      configs.load("digits", {"model.name": having, f"model.{option}": True}).model, option
    )
  with pytest.raises(
    UsageError,
    match=rf"model\.{option}: got true for model\.name '{name}'; only vit_ti16, .* have it",
  ):
    configs.load("digits", {"model.name": name, f"model.{option}": True})


def test_the_decay_of_an_average_is_below_one():
  assert configs.load("digits", {"train.ema": 0.9999}).train.ema == 0.9999
  with pytest.raises(UsageError, match=r"train\.ema: got 1\.0; expected a decay of at least 0"):
    configs.load("digits", {"train.ema": 1})


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    configs.load("digits").train.epochs = 3  # type: ignore[misc]


def test_every_section_refuses_fields_it_has_not():
  for section in configs.as_dict(configs.load("digits")):
    if section != "name":
      with pytest.raises(UsageError, match=rf"unknown field {section}\.nonsense"):
        configs.build("x", {section: {"nonsense": 1}})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("train.epochs", 0),
    ("train.epochs", True),
    ("train.epochs", 1.0),
    ("train.seed", 2**32),
    ("train.seed", -1),
    ("train.keep_checkpoints", 0),
    ("train.learning_rate", -0.1),
    ("train.learning_rate", "fast"),
    ("codes.rate", 1.0001),
    ("codes.rate", float("nan")),
    ("codes.per_class", 0),
    ("train.mixup", -0.2),
    ("train.cutmix", float("inf")),
    ("forget.settings.lambda1", float("inf")),
    ("forget.settings.lambda1", 1e39),
    ("forget.settings.lambda1", -0.5),
    ("forget.settings.lambda1", "1e-3x"),
    ("forget.settings.lambda2", True),
    ("forget.settings", 3),
    ("forget.method", "scissors"),
    ("forget.precision", "float16"),
    ("forget.classes", [1.5]),
    ("data.name", 3),
    ("execution.microbatch", -1),
  ],
)
def test_a_bad_value_names_field_and_value(field, value):
  shown = value[0] if isinstance(value, list) else value
  with pytest.raises(UsageError, match=f"^{field}: got ") as caught:
    configs.load("digits_paper", {field: value})
  assert str(shown) in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
  ("field", "value"), [("codes.rate", 0), ("codes.rate", 1), ("train.seed", 2**32 - 1)]
)
def test_bounds_are_inclusive(field, value):
  section, _, name = field.partition(".")
  assert getattr(getattr(configs.load("digits", {field: value}), section), name) == value


@dataclasses.dataclass(frozen=True)
class Scissors:
  """A method of one setting that must be given and one that need not."""

  depth: float
  width: float = 2.0

  def __post_init__(self) -> None:
    if self.depth > self.width:
      raise ValueError(f"depth: got {self.depth}; expected at most width, {self.width}.")


@pytest.fixture
def scissors(monkeypatch):
  monkeypatch.setitem(methods.METHODS, "scissors", Scissors)


def test_a_method_has_the_settings_of_the_config():
  config = configs.load("digits_paper", {"forget.settings.lambda1": 1})
  method = configs.make_method(config.forget)
  assert isinstance(method, methods.METHODS["perturbation"])
  assert (float(method.lambda1), float(method.lambda2)) == (1.0, 0.3)
  assert dict(config.forget.settings) == {"lambda1": 1.0, "lambda2": 0.3}


def test_settings_belong_to_their_method(scissors):
  """Another method drops those of the config; the same one keeps them."""
  words = {"forget.method": "scissors", "forget.settings.depth": 1}
  other = configs.load("digits_paper", words)
  assert configs.make_method(other.forget) == Scissors(1.0, 2.0)
  words = {"forget.method": "perturbation", "forget.settings.lambda1": 1}
  assert dict(configs.load("digits_paper", words).forget.settings) == {
    "lambda1": 1.0,
    "lambda2": 0.3,
  }


@pytest.mark.parametrize(
  ("forget", "message"),
  [
    (
      {"method": "perturbation", "settings": {"lambda1": 1}},
      r"settings\.lambda2: missing; .* --set lambda2=NUMBER",
    ),
    (
      {"method": "scissors", "settings": {"depht": 1}},
      r"settings\.depht: unknown setting of scissors\. Did you mean depth\? Known: depth, width",
    ),
    (
      {"method": "scissors", "settings": {"depth": 3}},
      r"settings: depth: got 3\.0; expected at most",
    ),
    ({"method": "perturb"}, r"method: got 'perturb'; .*Did you mean perturbation\?"),
    ({"settings": {"lambda1": 1}}, r"method: missing; expected one of .*, scissors\."),
  ],
)
def test_a_method_that_cannot_be_made(forget, message, scissors):
  with pytest.raises(UsageError, match=rf"^forget\.{message}"):
    configs.build("x", {"forget": forget})


@pytest.mark.parametrize("name", WITH_CODES)
def test_without_codes_in_training_a_config_forgets_by_the_default(name):
  config = configs.load(name, {"codes.rate": 0})
  assert configs.make_method(config.forget, learned=True) is None
  named = {"codes.rate": 0.0, "forget.method": "perturbation"}
  assert configs.make_method(configs.load(name, named).forget, learned=True) == mj.Perturbation()
  kept = configs.load(name, {"codes.rate": 0.2, "forget.settings.lambda1": 1}).forget
  assert configs.make_method(kept).lambda2 == configs.load(name).forget.settings["lambda2"]


def test_a_method_beside_a_rate_of_0_is_meant():
  forget = {"method": "projection", "settings": {"depth": 1}}
  for codes in ({"rate": 0}, {}):
    config = configs.build("x", {"codes": codes, "forget": forget}, {"codes.rate": 0})
    assert configs.make_method(config.forget, learned=True) == mj.Projection(depth=1)


def test_numbers_may_be_left_out_where_codes_are_learned():
  config = configs.build("x", {"forget": {"method": "perturbation"}})
  assert configs.make_method(config.forget, learned=True) == mj.Perturbation()
  with pytest.raises(UsageError, match=r"settings\.lambda1: missing; perturbation needs it"):
    configs.make_method(config.forget)


def test_settings_that_are_no_numbers_keep_their_type():
  settings = {"depth": 2, "drop_row": False}
  config = configs.build("x", {"forget": {"method": "projection", "settings": settings}})
  assert configs.make_method(config.forget) == mj.Projection(depth=2, drop_row=False)


def test_a_setting_outside_its_table_is_shown_where_it_belongs():
  with pytest.raises(UsageError, match=r"forget\.lambda1\. Did you mean forget\.settings\.lambda1"):
    configs.load("digits", {"forget.lambda1": 1})


def test_a_config_without_a_method_can_train_and_cannot_forget():
  config = configs.build("x", {"model": {"hidden": 8}})
  with pytest.raises(UsageError, match=r"forget\.method: missing; .* --set lambda2=10"):
    configs.make_method(config.forget)


def test_a_config_of_format_1_is_read():
  old = configs.as_dict(configs.load("digits"))
  old["forget"] = {"classes": [3], "lambda1": 0.5, "lambda2": 7.0, "precision": "high"}
  kept = dict(old["forget"])
  forget = configs.build("digits", format1.config(old)).forget
  assert (forget.method, dict(forget.settings)) == (
    "perturbation",
    {"lambda1": 0.5, "lambda2": 7.0},
  )
  assert (forget.classes, forget.precision) == ((3,), "high")
  assert old["forget"] == kept  # the record itself is left alone


def test_every_field_is_declared_with_a_type_that_is_checked():
  for section, table in configs.as_dict(configs.load("digits")).items():
    for field in table if section != "name" else ():
      with pytest.raises(UsageError, match=rf"^{section}\.{field}: got .*; expected"):
        configs.load("digits", {f"{section}.{field}": [3.5, None]})

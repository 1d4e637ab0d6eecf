"""Bad input of the core: each case is refused by type.

The message names the argument, its value and what was expected.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import make_batch, make_codes, make_params, mlp, mlp_loss, regression

import mnemonic_jax as mj

KEY = jax.random.key(0)
PARAMS, CODES = make_params("regression"), make_codes()
IMAGES, LABELS = make_batch()
STRENGTH = mj.Perturbation(1e-3, 10.0)
COPIED = jax.sharding.NamedSharding(
  jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), jax.sharding.PartitionSpec()
)
HALF = jnp.array([True, True, False, False])


def make_codes_with(**change):
  arguments = {"key": KEY, "num_classes": 4, "shape": (5,)} | change
  return lambda: mj.make_codes(**arguments)


def mix_with(**change):
  arguments = {"key": KEY, "images": IMAGES, "labels": LABELS, "codes": CODES, "rate": 0.1} | change
  return lambda: mj.mix(**arguments)


def fisher_with(loss_fn=None, **change):
  loss_fn = loss_fn or (lambda p, x, y: mj.softmax_cross_entropy(regression(p, x), y))
  arguments = {"loss_fn": loss_fn, "params": PARAMS, "inputs": IMAGES, "labels": LABELS} | change
  return lambda: mj.diagonal_fisher(**arguments)


def forget_with(**change):
  arguments = {
    "logits_fn": regression,
    "params": PARAMS,
    "codes": CODES,
    "classes": [0],
    "method": STRENGTH,
  } | change
  return lambda: mj.forget(**arguments)


def step_with(**change):
  arguments = {
    "logits_fn": regression,
    "params": PARAMS,
    "codes": CODES,
    "forget": HALF,
    "remain": ~HALF,
    "method": STRENGTH,
  } | change
  return lambda: mj.forget_step(**arguments)


def evaluate_with(*batch, batches=None, logits_fn=regression, classes=(0,), params=PARAMS):
  return lambda: mj.evaluate(logits_fn, params, [batch] if batches is None else batches, classes)


def train_step_with(**change):
  import optax

  return lambda: mj.make_train_step(
    **({"apply": regression, "optimizer": optax.sgd(1.0), "rate": 0.1} | change)
  )


def pieces(function, *arguments, **options):
  return lambda: function(*arguments, **options)


NAN_PARAMS = PARAMS | {"bias": PARAMS["bias"].at[1].set(jnp.nan)}
INF_PARAMS = PARAMS | {"kernel": PARAMS["kernel"].at[1].set(jnp.inf)}
NAN_LOGITS = lambda p, x: jnp.log(regression(p, x) - 100)

# (case, what is called, exception, what the message holds: argument, value, expectation)
CASES = [
  # classes
  ("classes above the range", forget_with(classes=[4]),
   ValueError, r"classes: got 4; expected integers in \[0, 4\)"),
  ("classes below the range", forget_with(classes=[-1]),
   ValueError, r"classes: got -1; expected integers in \[0, 4\)"),
  ("classes repeated", forget_with(classes=[1, 2, 1]),
   ValueError, r"classes: class 1 is repeated in \[1, 2, 1\]; expected each"),
  ("classes repeated in a generator", forget_with(classes=iter([1, 1])),
   ValueError, r"repeated in \[1, 1\]"),
  ("classes float", forget_with(classes=[1.0]),
   TypeError, r"classes: got 1.0 of type float; expected integer class indices"),
  ("classes bool", forget_with(classes=[True]),
   TypeError, r"classes: got True of type bool; expected integer"),
  ("classes numpy bools", forget_with(classes=np.array([True, False])),
   TypeError, r"classes: got .*True.*expected integer"),
  ("classes jax bools", forget_with(classes=HALF),
   TypeError, r"classes: got .*True.*expected integer"),
  ("classes string", forget_with(classes="01"),
   TypeError, r"classes: got '01'; expected a list of class indices"),
  ("classes strings", forget_with(classes=["0"]),
   TypeError, r"classes: got '0' of type str; expected integer"),
  ("classes one int", forget_with(classes=0),
   TypeError, r"classes: got 0; expected a list of class indices, such as \[0\]"),
  ("classes None", forget_with(classes=None), TypeError, r"classes: got None; expected a list"),
  ("classes none", forget_with(classes=[]),
   ValueError, r"classes: got none; expected at least one class"),
  ("classes all", forget_with(classes=range(4)),
   ValueError, r"classes: got all 4 classes; expected at least one class to keep"),
  ("forgotten out of range", forget_with(forgotten=[7]),
   ValueError, r"forgotten: got 7; expected integers in \[0, 4\)"),
  ("forgotten also in classes", forget_with(forgotten=[0]),
   ValueError, r"forgotten: classes \[0\] are also in classes"),
  ("none left to keep", forget_with(classes=[0, 1], forgotten=[2, 3]),
   ValueError, r"classes: \[0, 1\] and forgotten \[2, 3\] are all 4"),
  ("evaluate classes out of range", evaluate_with(IMAGES, LABELS, classes=[4]),
   ValueError, r"classes: got 4; expected"),
  ("evaluate classes bool", evaluate_with(IMAGES, LABELS, classes=[False]),
   TypeError, r"classes: got False"),
  ("evaluate classes none", evaluate_with(IMAGES, LABELS, classes=[]),
   ValueError, r"classes: got none"),
  ("evaluate classes all", evaluate_with(IMAGES, LABELS, classes=range(4)),
   ValueError, r"classes: got all 4"),
  ("forget mask no class", step_with(forget=jnp.zeros(4, bool)),
   ValueError, r"forget: got no class; expected at least one True"),
  ("remain mask no class", step_with(remain=np.zeros(4, bool)),
   ValueError, r"remain: got no class"),
  ("masks overlap", step_with(remain=jnp.ones(4, bool)),
   ValueError, r"remain: classes \[0, 1\] are also in forget"),
  ("mask of ints", step_with(forget=jnp.array([1, 0, 0, 0])),
   ValueError, r"forget: got .*int32.*expected a bool mask of shape \(4,\)"),
  ("mask of the wrong length", step_with(remain=jnp.array([False, True])),
   ValueError, r"remain: got .*\(2,\).*expected a bool mask of shape \(4,\)"),
  # codes
  ("codes of the wrong input shape", forget_with(codes=make_codes(features=6)),
   ValueError, r"codes: logits_fn fails on codes of shape \(4, 1, 6\).*Pass the codes"),
  ("codes of the wrong count", forget_with(codes=make_codes(classes=5)),
   ValueError, r"logits_fn: returned shape \(5, 4\).*codes \(5, 1, 5\) hold 5 classes"),
  ("codes without the K axis", forget_with(codes=CODES[:, 0]),
   ValueError, r"codes: got shape \(4, 5\); expected \(C, K, \*shape\).*make_codes"),
  ("codes empty", forget_with(codes=CODES[:, :0]), ValueError, r"codes: got shape \(4, 0, 5\)"),
  ("codes of one class", forget_with(codes=CODES[:1]),
   ValueError, r"codes: got shape \(1, 1, 5\) with one class; expected at least two"),
  ("codes of integers", forget_with(codes=CODES.astype(jnp.int32)),
   TypeError, r"codes: got .*int32.*expected a floating array"),
  ("codes a list", forget_with(codes=[[1.0]]),
   TypeError, r"codes: got \[\[1.0\]\] of type list; expected a floating array"),
  ("codes None", forget_with(codes=None), TypeError, r"codes: got None.*make_codes"),
  ("codes with nan", forget_with(codes=CODES.at[1].set(jnp.nan)),
   ValueError, r"codes: got NaN or inf; expected finite"),
  ("codes with inf", forget_with(codes=CODES.at[1].set(-jnp.inf)),
   ValueError, r"codes: got NaN or inf"),
  ("mix codes of another shape", mix_with(codes=make_codes(features=6)),
   ValueError, r"images: got shape \(7, 5\); expected \(N, \*\(6,\)\)"),
  ("mix codes of integers", mix_with(codes=CODES.astype(jnp.int8)),
   TypeError, r"codes: got .*int8"),
  # params
  ("params with nan", forget_with(params=NAN_PARAMS),
   ValueError, r"params: NaN or inf in \['bias'\]; expected finite params. Restore"),
  ("params with inf", forget_with(params=INF_PARAMS),
   ValueError, r"params: NaN or inf in \['kernel'\]"),
  ("params without leaves", forget_with(params={}),
   ValueError, r"params: got a tree without leaves; expected at least one"),
  ("params with integer leaves", forget_with(params=PARAMS | {"n": jnp.arange(2)}),
   TypeError, r"params\['n'\]: got dtype int32; expected floating.*mask"),
  ("params with a python number", forget_with(params=PARAMS | {"n": 3.0}),
   TypeError, r"params\['n'\]: got 3.0 of type float; expected floating"),
  ("params in float64 without x64", forget_with(params=PARAMS | {"bias": np.zeros(4)}),
   TypeError, r"params\['bias'\]: got dtype float64.*x64"),
  ("fisher params without leaves", fisher_with(params=()),
   ValueError, r"params: got a tree without leaves"),
  ("fisher params of integers", fisher_with(params=jnp.arange(3)),
   TypeError, r"params: got dtype int32; expected floating"),
  ("fisher params of bools", fisher_with(params=HALF), TypeError, r"params: got dtype bool"),
  ("fisher params complex", fisher_with(params=jnp.ones(2, jnp.complex64)),
   TypeError, r"params: got dtype complex64"),
  # logits
  ("logits nan", forget_with(logits_fn=NAN_LOGITS),
   ValueError, r"logits_fn: NaN or inf in the logits on the codes; expected finite"),
  ("logits of the wrong rank", forget_with(logits_fn=lambda p, x: regression(p, x)[..., None]),
   ValueError, r"logits_fn: returned shape \(4, 4, 1\).*expected floating logits \(4, 4\)"),
  ("logits of one example", forget_with(logits_fn=lambda p, x: regression(p, x)[0]),
   ValueError, r"logits_fn: returned shape \(4,\)"),
  ("logits of too few classes", forget_with(logits_fn=lambda p, x: regression(p, x)[:, :3]),
   ValueError, r"logits_fn: returned shape \(4, 3\)"),
  ("logits integers", forget_with(logits_fn=lambda p, x: regression(p, x).astype(jnp.int32)),
   ValueError, r"logits_fn: returned .*int32; expected floating"),
  ("logits a tuple", forget_with(logits_fn=lambda p, x: (regression(p, x), 0)),
   ValueError, r"logits_fn: returned tuple; expected floating logits"),
  ("logits_fn not a function", forget_with(logits_fn=3),
   TypeError, r"logits_fn: got 3 of type int; expected a function"),
  ("evaluate logits of the wrong rank",
   evaluate_with(IMAGES, LABELS, logits_fn=lambda p, x: x[:, 0]),
   ValueError, r"logits_fn: returned \(7,\); expected logits of shape \(7, C\)"),
  ("evaluate logits a dict", evaluate_with(IMAGES, LABELS, logits_fn=lambda p, x: {}),
   ValueError, r"logits_fn: returned dict; expected logits"),
  ("evaluate logits of another class count",
   evaluate_with(batches=[(jnp.ones((1, 3)), np.array([0])), (jnp.ones((1, 4)), np.array([0]))],
                 logits_fn=lambda p, x: x),
   ValueError, r"logits_fn: returned 4 classes; expected 3"),
  ("evaluate logits_fn not a function", evaluate_with(IMAGES, LABELS, logits_fn=None),
   TypeError, r"logits_fn: got None"),
  # rate
  ("rate below 0", mix_with(rate=-0.1),
   ValueError, r"rate: got -0.1; expected a probability in \[0, 1\]"),
  ("rate above 1", mix_with(rate=1.5),
   ValueError, r"rate: got 1.5; expected a probability in \[0, 1\]"),
  ("rate nan", mix_with(rate=math.nan), ValueError, r"rate: got nan"),
  ("rate a string", mix_with(rate="0.1"), TypeError, r"rate: got '0.1'; expected one number"),
  ("rate None", mix_with(rate=None), TypeError, r"rate: got None; expected one number"),
  ("rate a bool", mix_with(rate=True), TypeError, r"rate: got True; expected one number"),
  ("rate an array", mix_with(rate=jnp.ones(7)), TypeError, r"rate: got .*expected one number"),
  ("rate a traced array", lambda: jax.jit(lambda rate: mix_with(rate=rate)())(jnp.ones(7)),
   TypeError, r"rate: got .*expected one number"),
  ("train step rate", train_step_with(rate=2), ValueError, r"rate: got 2.0; expected"),
  # strength
  ("method negative", lambda: mj.Perturbation(-1.0, 1.0),
   ValueError, r"lambda1: got -1.0; expected a number, finite .*not negative"),
  ("method nan", lambda: mj.Perturbation(1.0, math.nan), ValueError, r"lambda2: got nan"),
  ("method inf", lambda: mj.Perturbation(1.0, math.inf), ValueError, r"lambda2: got inf"),
  ("method above float32", lambda: mj.Perturbation(1e39, 1.0),
   ValueError, r"lambda1: got 1e\+39.*finite in float32"),
  ("method negative in a batch", lambda: mj.Perturbation(jnp.array([1.0, -1.0]), 1.0),
   ValueError, r"lambda1: got "),
  ("method a string", lambda: mj.Perturbation("1", 1.0),
   TypeError, r"lambda1: got '1'; expected a number"),
  ("method None", lambda: mj.Perturbation(None, 1.0), TypeError, r"lambda1: got None"),
  ("method a bool", lambda: mj.Perturbation(1.0, True), TypeError, r"lambda2: got True"),
  ("method complex", lambda: mj.Perturbation(1j, 1.0),
   TypeError, r"lambda1: got 1j; expected a real number"),
  ("method with an unknown name", lambda: mj.Perturbation(lambda1=1.0, lambda3=1.0),
   TypeError, r"lambda3"),
  ("a name of a method", forget_with(method="strong"),
   TypeError,
   r"method: got 'strong' of type str; expected a method, such as mnemonic_jax.Perturbation"),
  ("method a tuple", forget_with(method=(1e-3, 10.0)),
   TypeError, r"method: got \(0.001, 10.0\) of type tuple; expected a method"),
  ("method a dict", step_with(method={"lambda1": 1}), TypeError, r"method: got \{'lambda1': 1\}"),
  ("method of no pairs", lambda: mj.Perturbation(jnp.ones(2), 1.0),
   ValueError, r"lambda1, lambda2: got shapes \(2,\) and \(\); expected two numbers"),
  ("method a class", forget_with(method=mj.Perturbation),
   TypeError, r"method: got .*Perturbation.*expected a method"),
  ("no method", lambda: mj.forget(regression, PARAMS, CODES, [0]), ValueError,
   r"method: got None with plain codes.*learn_codes.*Perturbation"),
  ("layer_scale method", pieces(mj.layer_scale, jnp.ones(2), 1.0),
   TypeError, r"method: got 1.0; expected mnemonic_jax.Perturbation"),
  # make_codes
  ("unknown distribution", make_codes_with(distribution="gauss"),
   ValueError, r"distribution: got 'gauss'; expected one of \['normal', 'uniform'\]"),
  ("distribution None", make_codes_with(distribution=None), ValueError, r"distribution: got None"),
  ("distribution a list", make_codes_with(distribution=["normal"]),
   ValueError, r"distribution: got \['normal'\]"),
  ("num_classes zero", make_codes_with(num_classes=0),
   ValueError, r"num_classes: got 0; expected an integer of at least 1"),
  ("num_classes negative", make_codes_with(num_classes=-3), ValueError, r"num_classes: got -3"),
  ("num_classes float", make_codes_with(num_classes=3.0),
   TypeError, r"num_classes: got 3.0; expected an integer"),
  ("num_classes bool", make_codes_with(num_classes=True), TypeError, r"num_classes: got True"),
  ("per_class zero", make_codes_with(per_class=0), ValueError, r"per_class: got 0"),
  ("shape with a zero", make_codes_with(shape=(5, 0)),
   ValueError, r"shape: got 0; expected an integer of at least 1"),
  ("shape with a float", make_codes_with(shape=(5.0,)), TypeError, r"shape: got 5.0"),
  ("shape an int", make_codes_with(shape=5),
   TypeError, r"shape: got 5; expected the shape of one input"),
  ("shape empty", make_codes_with(shape=()),
   TypeError, r"shape: got \(\); expected the shape of one input"),
  ("dtype integer", make_codes_with(dtype=jnp.int32),
   TypeError, r"dtype: got .*int32.*expected a floating dtype"),
  ("dtype unknown", make_codes_with(dtype="float99"),
   TypeError, r"dtype: got 'float99'; expected a floating dtype"),
  ("dtype float64 without x64", make_codes_with(dtype=jnp.float64),
   TypeError, r"dtype: got float64.*x64"),
  ("key an int", make_codes_with(key=0),
   TypeError, r"key: got 0 of type int; expected a typed PRNG key. Make one with jax.random.key"),
  ("key untyped", make_codes_with(key=jax.random.PRNGKey(0)),
   TypeError, r"key: got .*uint32.*wrap_key_data"),
  ("keys", make_codes_with(key=jax.random.split(KEY)),
   ValueError, r"key: got an array of \(2,\) keys; expected one"),
  ("mix key untyped", mix_with(key=jax.random.PRNGKey(0)), TypeError, r"key: got .*uint32"),
  # images and labels
  ("mix labels float", mix_with(labels=LABELS.astype(jnp.float32)),
   TypeError, r"labels: got .*float32.*expected an integer array of shape \(7,\)"),
  ("mix labels bool", mix_with(labels=LABELS > 0), TypeError, r"labels: got .*bool"),
  ("mix labels a list", mix_with(labels=[0] * 7),
   TypeError, r"labels: got \[0.*expected an integer array"),
  ("mix labels one-hot", mix_with(labels=jax.nn.one_hot(LABELS, 4, dtype=jnp.int32)),
   ValueError, r"labels: got shape \(7, 4\); expected \(7,\)"),
  ("mix labels too few", mix_with(labels=LABELS[:3]),
   ValueError, r"labels: got shape \(3,\); expected \(7,\), one label per image"),
  ("mix labels too large", mix_with(labels=LABELS.at[0].set(4)),
   ValueError, r"labels: got values from \d to 4; expected integers in \[0, 4\)"),
  ("mix labels negative", mix_with(labels=LABELS.at[0].set(-1)),
   ValueError, r"labels: got values from -1 to \d"),
  ("mix images integers", mix_with(images=jnp.ones((7, 5), jnp.uint8)),
   TypeError, r"images: got .*uint8.*normalise"),
  ("mix images a list", mix_with(images=[[0.0]]), TypeError, r"images: got "),
  ("mix images of another shape", mix_with(images=jnp.ones((7, 5, 1))),
   ValueError, r"images: got shape \(7, 5, 1\); expected"),
  ("mix one image without batch axis", mix_with(images=jnp.ones(5)),
   ValueError, r"images: got shape \(5,\); expected"),
  ("mix empty batch", mix_with(images=jnp.ones((0, 5)), labels=LABELS[:0]),
   ValueError, r"images: got shape \(0, 5\), an empty batch; expected at least one"),
  ("evaluate labels float", evaluate_with(IMAGES, np.zeros(7)),
   TypeError, r"labels: got .*float64.*expected an integer array"),
  ("evaluate labels of another length", evaluate_with(IMAGES, LABELS[:3]),
   ValueError, r"labels: got shape \(3,\); expected \(7,\)"),
  ("evaluate labels too large", evaluate_with(IMAGES, LABELS.at[0].set(9)),
   ValueError, r"labels: got values from \d to 9; expected integers in \[0, 4\)"),
  ("evaluate labels negative", evaluate_with(IMAGES, LABELS.at[0].set(-1)),
   ValueError, r"labels: got values from -1"),
  ("evaluate no batches", evaluate_with(batches=[]),
   ValueError, r"batches: yielded nothing; expected at least one batch"),
  ("evaluate empty batch", evaluate_with(IMAGES[:0], LABELS[:0]),
   ValueError, r"batches: an empty batch; expected at least one example"),
  ("evaluate batch of one", evaluate_with(IMAGES),
   ValueError, r"batches: yielded tuple; expected \(inputs, labels\)"),
  ("evaluate mask of ints", evaluate_with(IMAGES, LABELS, np.ones(7, int)),
   ValueError, r"mask: got dtype int64.*expected bool of shape \(7,\)"),
  ("evaluate mask of another length", evaluate_with(IMAGES, LABELS, np.ones(3, bool)),
   ValueError, r"mask: got .*\(3,\); expected bool of shape \(7,\)"),
  ("evaluate batches no iterable", evaluate_with(batches=3),
   TypeError, r"batches: got 3.*expected"),
  # fisher
  ("weights of another length", fisher_with(weights=jnp.ones(6)),
   ValueError, r"weights: got shape \(6,\); expected \(7,\), or \(G, 7\)"),
  ("weights transposed", fisher_with(weights=jnp.ones((7, 2))),
   ValueError, r"weights: got shape \(7, 2\); expected"),
  ("weights of rank 3", fisher_with(weights=jnp.ones((1, 1, 7))),
   ValueError, r"weights: got shape \(1, 1, 7\)"),
  ("weights of no group", fisher_with(weights=jnp.ones((0, 7))),
   ValueError, r"weights: got shape \(0, 7\)"),
  ("weights a number", fisher_with(weights=1.0), ValueError, r"weights: got shape \(\)"),
  ("weights bools", fisher_with(weights=jnp.ones(7, bool)), TypeError, r"weights: got dtype bool"),
  ("weights nan", fisher_with(weights=jnp.ones(7).at[2].set(jnp.nan)),
   ValueError, r"weights: got NaN or inf; expected finite"),
  ("fisher empty batch", fisher_with(inputs=IMAGES[:0], labels=LABELS[:0]),
   ValueError, r"inputs.*empty batch; expected at least one"),
  ("fisher nothing at all", fisher_with(inputs=None, labels=None),
   ValueError, r"inputs.*empty batch"),
  ("fisher lengths differ", fisher_with(labels=LABELS[:3]),
   ValueError, r"inputs, labels: leading axes differ.*'inputs': 7.*'labels': 3"),
  ("fisher scalar input", fisher_with(inputs={"x": IMAGES, "t": jnp.float32(1)}),
   ValueError, r"inputs\['t'\]: got a scalar; expected a leading axis"),
  ("loss a scalar", fisher_with(lambda p, x, y: regression(p, x).mean()),
   ValueError,
   r"loss_fn: returned shape \(\).*expected floating losses of shape \(7,\).*Drop the mean"),
  ("loss of the wrong shape", fisher_with(lambda p, x, y: regression(p, x)),
   ValueError, r"loss_fn: returned shape \(7, 4\)"),
  ("loss of integers", fisher_with(lambda p, x, y: y),
   ValueError, r"loss_fn: returned .*int32; expected floating"),
  ("loss a tuple", fisher_with(lambda p, x, y: (y, y)),
   ValueError, r"loss_fn: returned tuple; expected floating losses"),
  ("loss whose examples depend",
   fisher_with(lambda p, x, y: mlp_loss(make_params("mlp"), x - x.mean(0), y) + 0 * p["bias"][0]),
   ValueError, r"loss_fn: examples depend on each other: a loss changes by \d+%.*Likely causes"),
  ("loss not a function", fisher_with(loss_fn=3),
   TypeError, r"loss_fn: got 3 of type int; expected a function \(params, inputs, labels\)"),
  ("forget loss a scalar", forget_with(loss=lambda logits, labels: logits.mean()),
   ValueError, r"loss.*: returned shape \(\).*expected floating losses of shape \(4,\)"),
  ("forget loss not a function", forget_with(loss="ce"),
   TypeError, r"loss: got 'ce' of type str; expected a function"),
  ("forget logits that depend on the batch",
   forget_with(logits_fn=lambda p, x: regression(p, x - x.mean(0, keepdims=True))),
   ValueError, r"examples depend on each other.*BatchNorm"),
  ("forget inside jit", lambda: jax.jit(lambda p: forget_with(params=p)())(PARAMS),
   TypeError, r"params: got traced values.*forget_step"),
  ("forget with a traced method",
   lambda: jax.jit(lambda s: forget_with(method=mj.Perturbation(s, 1.0))())(1.0),
   TypeError, r"method: got traced values.*forget_step"),
  ("precision unknown", fisher_with(precision="best"),
   ValueError, r"precision: got 'best'; expected for example 'highest'"),
  ("precision unknown in forget", forget_with(precision=7),
   ValueError, r"precision: got 7; expected"),
  ("microbatch zero", lambda: mj.Execution(0),
   ValueError, r"execution.microbatch: got 0; expected an integer of at least 1"),
  ("shardings that are none", lambda: mj.Execution(shardings={"a": 1}),
   TypeError, r"execution.shardings: got \{'a': 1\}; expected a tree like params of NamedSharding"),
  ("shardings of other params", fisher_with(execution=mj.Execution(shardings=[COPIED] * 5)),
   ValueError, r"execution.shardings: got 5 for 2 leaves of params; expected one for each"),
  ("microbatch float", lambda: mj.Execution(2.0), TypeError, r"execution.microbatch: got 2.0"),
  ("execution a number", forget_with(execution=4),
   TypeError, r"execution: got 4; expected mnemonic_jax.Execution"),
  # masks, layer axes and trees that do not match
  ("mask of another tree", forget_with(mask={"kernel": True}),
   ValueError, r"mask: got \{'kernel': True\}; expected one value, or a tree prefix of params"),
  ("mask of ints", fisher_with(mask={"kernel": 1, "bias": 0}),
   TypeError, r"mask: got .; expected bools"),
  ("mask None inside", fisher_with(mask={"kernel": None, "bias": True}),
   TypeError, r"mask: got None; expected bools"),
  ("mask leaves out all", forget_with(mask=False),
   ValueError, r"mask: leaves out every leaf of params; expected True for at least one"),
  ("layer_axis of another tree", forget_with(layer_axis={"x": 0}),
   ValueError, r"layer_axis: got \{'x': 0\}; expected"),
  ("layer_axis out of range", forget_with(layer_axis=1),
   ValueError, r"layer_axis: got 1 for params\['bias'\] of shape \(4,\); expected an axis"),
  ("layer_axis a bool", forget_with(layer_axis=True),
   TypeError, r"layer_axis: got True; expected an int or None"),
  ("amplitude trees differ", pieces(mj.amplitude, {"a": jnp.ones(2)}, {"b": jnp.ones(2)}),
   ValueError, r"fisher_remain: its tree does not match that of fisher_forget"),
  ("amplitude shapes differ", pieces(mj.amplitude, {"a": jnp.ones(2)}, {"a": jnp.ones(3)}),
   ValueError, r"fisher_remain\['a'\]: got shape \(3,\); expected shape \(2,\)"),
  ("amplitude None on one side", pieces(mj.amplitude, {"a": jnp.ones(2)}, {"a": None}),
   ValueError, r"fisher_remain\['a'\]: got None; expected shape \(2,\)"),
  ("perturb trees differ", pieces(mj.perturb, {"a": jnp.ones(2)}, {"b": jnp.ones(2)}, 1.0, 1),
   ValueError, r"eta: its tree does not match that of params"),
  ("perturb shapes differ", pieces(mj.perturb, jnp.ones(2), jnp.ones(3), jnp.float32(1), 1),
   ValueError, r"eta: got shape \(3,\).*expected \(2,\)"),
  ("perturb scale too large", pieces(mj.perturb, jnp.ones(2), jnp.ones(2), jnp.ones((3, 1)), 1),
   ValueError, r"eta: .*scale: \(3, 1\).*broadcasts"),
  ("perturb scale missing",
   pieces(mj.perturb, {"a": jnp.ones(2)}, {"a": jnp.ones(2)}, {"a": None}, 1),
   ValueError, r"eta\['a'\]: .*scale: None"),
  ("perturb sign zero", pieces(mj.perturb, jnp.ones(2), jnp.ones(2), jnp.float32(1), 0),
   ValueError, r"sign: got 0; expected \+1 or -1"),
  ("perturb sign a string", pieces(mj.perturb, jnp.ones(2), jnp.ones(2), jnp.float32(1), "+"),
   ValueError, r"sign: got '\+'; expected"),
  ("perturb integers", pieces(mj.perturb, jnp.arange(2), jnp.ones(2), jnp.float32(1), 1),
   TypeError, r"params: got dtype int32; expected floating"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("call", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input_is_refused_with_its_name_value_and_remedy(call, error, message):
  with pytest.raises(error, match=f"(?s){message}"):
    call()


def test_an_unhashable_model_is_refused_by_name():
  class Model:
    __hash__ = None

    def __call__(self, params, inputs):
      return regression(params, inputs)

  for call in (forget_with(logits_fn=Model()), evaluate_with(IMAGES, LABELS, logits_fn=Model())):
    with pytest.raises(
      TypeError, match=r"logits_fn: got an unhashable Model.*Wrap it in a def or lambda"
    ):
      call()


@pytest.mark.parametrize("name", ["params", "codes"])
def test_traced_values_are_not_looked_at_but_shapes_are(name):
  bad = {"params": NAN_PARAMS, "codes": CODES.at[0].set(jnp.nan)}[name]
  jax.jit(lambda value: step_with(**{name: value})())(bad)
  with pytest.raises(ValueError, match=r"codes: got shape \(4, 5\)"):
    jax.jit(lambda codes: step_with(codes=codes)())(CODES[:, 0])
  with pytest.raises(TypeError, match=r"labels: got .*float32"):
    jax.jit(lambda labels: mix_with(labels=labels)())(jnp.ones(7))
  with pytest.raises(ValueError, match=r"weights: got shape"):
    jax.jit(lambda weights: fisher_with(weights=weights)())(jnp.ones(3))


def test_good_input_passes():
  """The defaults of every table row are good, so that a row can fail only for what it changes."""
  for call in (
    make_codes_with(),
    mix_with(),
    fisher_with(),
    forget_with(),
    step_with(),
    train_step_with(),
    evaluate_with(IMAGES, LABELS),
  ):
    call()
  mj.forget(mlp, make_params("mlp"), CODES, np.array([0, 2], np.int8), method=STRENGTH)
  mj.forget(regression, PARAMS, CODES, jnp.array([1]), method=STRENGTH, forgotten=(0,))

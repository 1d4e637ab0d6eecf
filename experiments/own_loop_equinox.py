"""An Equinox classifier in a training loop of your own: train with codes, forget class 3, compare.

Command:  python experiments/own_loop_equinox.py
          (seconds on 2 CPU cores; needs `pip install equinox`)

An Equinox model is a tree of arrays and other things. Its arrays are the params; the rest, and the
batching, go into the function (params, inputs) -> logits that the library asks for.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mnemonic_jax as mj
from mnemonic_jax import data

FORGET = [3]


def main(steps: int = 1500) -> dict[str, mj.Scores]:
  """Train, forget, print the table; return the scores."""
  digits = data.load("digits")
  images = np.asarray(digits.preprocess(jnp.asarray(digits.train.images)))
  labels = digits.train.labels
  model = eqx.nn.MLP(
    64, 10, width_size=256, depth=1, activation=jax.nn.sigmoid, key=jax.random.key(0)
  )
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def logits_fn(params, images):
    return jax.vmap(eqx.combine(params, static))(images.reshape(len(images), -1))

  # 1. Codes: one random picture for each class, drawn once. Save them with the params.
  codes = mj.make_codes(
    jax.random.key(1), num_classes=10, shape=digits.shape, distribution="uniform"
  )

  # As `mnemonic configs digits_paper`. Trained with AdamW, most models of a trial kept the class at
  # every strength tried.
  schedule = optax.cosine_decay_schedule(0.2, steps)
  optimizer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(schedule, momentum=0.9))

  @jax.jit
  def step(params, optimizer_state, index, images, labels):
    key = jax.random.fold_in(jax.random.key(2), index)
    images = mj.mix(
      key, images, labels, codes, rate=0.1
    )  # 2. one image in ten becomes the code of its class
    loss = lambda params: mj.softmax_cross_entropy(logits_fn(params, images), labels).mean()
    updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state

  optimizer_state, order = optimizer.init(params), np.random.default_rng(0)
  for index in range(steps):
    rows = order.choice(len(labels), 64, replace=False)
    params, optimizer_state = step(params, optimizer_state, index, images[rows], labels[rows])

  # 3. Forget: one shot, no data. digits_strength.py shows how to choose a strength.
  method = mj.Perturbation(lambda1=1e-2, lambda2=1.0)
  forgotten = mj.forget(logits_fn, params, codes, FORGET, method=method)

  # What it did, on test images, beside the head edit, which leaves the class in the features.
  test = [(digits.preprocess(digits.test.images), digits.test.labels)]
  head_edit = eqx.tree_at(
    lambda model: model.layers[-1].bias,
    params,
    replace_fn=lambda b: b.at[jnp.array(FORGET)].set(-1e9),
  )
  candidates = {"before": params, "mnemonic code": forgotten.params, "head edit": head_edit}
  scores = {
    name: mj.evaluate(logits_fn, candidate, test, FORGET) for name, candidate in candidates.items()
  }
  print(f"| Equinox, digits, class {FORGET[0]} | A_R % | E_F % |\n|---|---|---|")
  for name, score in scores.items():
    print(f"| {name} | {score.retain_accuracy:.2%} | {score.forget_error:.2%} |")

  # `eqx.combine(forgotten.params, static)` is the model to serve.
  return scores


if __name__ == "__main__":
  main()

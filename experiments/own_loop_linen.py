"""A Flax Linen classifier in a training loop of your own: train with codes, forget class 3, compare.

Command:  python experiments/own_loop_linen.py      (seconds on 2 CPU cores)

The library asks three things of your code: keep codes beside the params, mix them into each batch, and have a function
(params, inputs) -> logits.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mnemonic_jax as mj
from mnemonic_jax import data
from mnemonic_jax.rivals.head_edit import head_edit

FORGET = [3]


class Classifier(nn.Module):
  """One convolution and two dense layers."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """(N, 8, 8, 1) -> (N, 10) logits."""
    x = nn.relu(nn.Conv(32, (3, 3))(images))
    x = nn.sigmoid(nn.Dense(256)(x.reshape(len(x), -1)))
    return nn.Dense(10, name="output")(x)


def main(epochs: int = 30) -> dict[str, mj.Scores]:
  """Train, forget, print the table; return the scores."""
  digits = data.load("digits")
  images, labels = digits.preprocess(jnp.asarray(digits.train.images)), jnp.asarray(digits.train.labels)
  model = Classifier()
  params = model.init(jax.random.key(0), images[:1])["params"]
  logits_fn = lambda params, inputs: model.apply({"params": params}, inputs)

  # 1. Codes: one random picture for each class, drawn once. Save them with the params.
  codes = mj.make_codes(jax.random.key(1), num_classes=10, shape=digits.shape, distribution="uniform")

  optimizer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))

  @jax.jit
  def step(params, optimizer_state, key, images, labels):
    images = mj.mix(key, images, labels, codes, rate=0.1)  # 2. one image in ten becomes the code of its class
    loss = lambda params: mj.softmax_cross_entropy(logits_fn(params, images), labels).mean()
    updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state

  optimizer_state, key = optimizer.init(params), jax.random.key(2)
  for _ in range(epochs):
    key, order_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(labels))
    for rows in order[: len(labels) // 64 * 64].reshape(-1, 64):
      key, mix_key = jax.random.split(key)
      params, optimizer_state = step(params, optimizer_state, mix_key, images[rows], labels[rows])

  # 3. Forget: no data, one shot. A strength is chosen once for a model, on images held out; see digits_strength.py.
  forgotten = mj.forget(logits_fn, params, codes, FORGET, strength=mj.Strength(lambda1=3e-3, lambda2=0.3))

  # What it did, on test images; beside it the trivial way, which leaves all knowledge in the features.
  test = [(digits.preprocess(digits.test.images), digits.test.labels)]
  candidates = {"before": params, "mnemonic code": forgotten.params, "head edit": head_edit(params, ["output"], FORGET)}
  scores = {name: mj.evaluate(logits_fn, candidate, test, FORGET) for name, candidate in candidates.items()}
  print(f"| Linen, digits, class {FORGET[0]} | A_R % | E_F % |\n|---|---|---|")
  for name, score in scores.items():
    print(f"| {name} | {score.retain_accuracy:.2%} | {score.forget_error:.2%} |")
  return scores


if __name__ == "__main__":
  main()

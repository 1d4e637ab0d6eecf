"""Augmentation: what an image may become, and that its key decides."""

from __future__ import annotations

import jax
import numpy as np

from mnemonic_jax.data import augmentation


def some_images(num=64):
  return np.random.default_rng(0).integers(1, 256, (num, 6, 5, 3), dtype=np.uint8)


def keys(num=64, seed=0):
  return jax.random.split(jax.random.key(seed), num)


def test_a_crop_is_a_window_of_the_padded_image_and_all_of_them_come_up():
  images = some_images(1000)
  cropped = np.asarray(jax.jit(augmentation.crop)(keys(1000), images))
  assert cropped.dtype == np.uint8 and cropped.shape == images.shape
  found = set()
  for image, ours in zip(images, cropped, strict=True):
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {(y, x): padded[y : y + 6, x : x + 5] for y in range(9) for x in range(9)}
    places = {place for place, window in windows.items() if np.array_equal(window, ours)}
    assert places
    found |= places
  assert len(found) == 81


def test_half_of_the_images_are_mirrored():
  images = some_images(1000)
  ours = np.asarray(jax.jit(augmentation.flip)(keys(1000), images))
  mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(ours, images, strict=True)]
  assert all(m or np.array_equal(a, b) for m, a, b in zip(mirrored, ours, images, strict=True))
  assert 430 < sum(mirrored) < 570


def test_an_image_depends_on_its_own_key_alone():
  images = some_images()
  augment = jax.jit(augmentation.crop_and_flip)
  whole = np.asarray(augment(keys(), images))
  order = np.random.default_rng(1).permutation(64)
  np.testing.assert_array_equal(augment(keys()[order], images[order]), whole[order])
  assert not np.array_equal(augment(keys(seed=1), images), whole)
  assert np.any(whole != images)

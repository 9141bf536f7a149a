"""Named streams of random numbers: a word for each use, so that no two uses ever share their numbers."""
from collections.abc import Sequence
from numbers import Integral
import numpy as np

# A stream's place here is part of its seed: new words go to the end. (The network's initial weights, which unet.py
# draws without this file, are a stream of their own as well.)
USES = ("", "x_T", "z", "latents", "interpolated images", "order of classes", "order of images", "flip",
        "training step", "noise of the bound", "times of the bound", "evaluated images", "dequantization", "probes",
        "directions", "other images", "held-out images", "LeNet", "samples")

def stream(seed:int, use:str, *index:int) -> np.random.Generator:
  """The generator of one `use` (a word of USES) of a seed; index: the image, step or epoch that it is for.

  Every use has always the same number of indices: numpy takes missing ones for zeros. ValueError for another seed than
  0, 1, 2, …, and for an unknown use."""
  if not isinstance(seed, Integral) or seed < 0: raise ValueError(f"a seed must be a whole number from 0, not {seed!r}")
  return np.random.default_rng([seed, 0x5A, USES.index(use), *map(int, index)])

def normals(rngs:Sequence[np.random.Generator], shape:Sequence) -> np.ndarray:
  """The next N(0, I) of each generator: float32 (N, *shape)."""
  return np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])

"""Section 4, the experiments' set-up: a name, a path or an array in, batches of images out.

Images are uint8 (N, C, H, W) on the host; the device alone sees x / 127.5 - 1. Images of floats are
float32 in [-1, 1] already. Whatever is wrong with a name, a file or a download is said in one
sentence, by a ValueError or an OSError, which the programs print.
"""
from __future__ import annotations
import functools, os, sys
from pathlib import Path
from typing import Any
import numpy as np
from engine.streams import stream
from files import dataset, images as image_files, mirrors
from files.dataset import Dataset

DATASETS = tuple(mirrors.CLASSES)

def load(source:Any, split:str="train", data_dir:str|os.PathLike|None=None,
         **how:Any) -> tuple[np.ndarray, np.ndarray]:
  """The images and the labels of `read`. What had to be left out is said on stderr."""
  found = read(source, split, data_dir, **how)
  if found.left: print(f"data.py: {'; '.join(found.left)}", file=sys.stderr)
  return found.images, found.labels

def read(source:Any, split:str="train", data_dir:str|os.PathLike|None=None,
         size:Any=None, fit:str="crop", mode:str|None=None, multiple:int=1,
         labels:Any=None) -> Dataset:
  """A dataset: images (N, C, H, W), uint8 or float32 in [-1, 1], labels, int32 (N,), and more.

  source, one of:
  - "glyphs" (16x16x1, drawn on the spot), "mnist", "fashion_mnist" (28x28x1), "cifar10" (32x32x3).
    Files are looked for in data_dir, then $DATA_DIR, then the cache ($XDG_CACHE_HOME/ddpm or
    ~/.cache/ddpm). What is nowhere is downloaded into the cache and checked by its SHA-256.
  - A folder or a .zip of images, with all sub-folders. The class is the first sub-folder's name;
    numbers come in numeric order, other names sorted. Without sub-folders it is the letters before
    a "_", as in cat_1.png, if all names begin so. A dataset.json says it otherwise. Transparent
    pixels become white, an animation gives its first frame; C is 1 if every image is gray, else 3.
  - A .npy or an .npz file (arr_0 and arr_1; images and labels; or x and y), or an array and its
    `labels`. `files.dataset.channels_first` says how the axes are told apart. Floats of any finite
    range are scaled to [-1, 1].
  split: "train" or "test". A folder or .zip with train/ beside test/, val/, valid/, validation/ or
    dev/ has both; elsewhere both are the whole, and `heldout` is False.
  size: a number or (height, width), for what has no name. Without it, images of one shape keep it,
    and others get the shape of `files.dataset.plan`.
  fit: how they get there: "crop" (the central part), "pad" (with black) or "stretch".
  mode: "gray" or "rgb", for files of images.
  multiple: what has to divide height and width, for the network's levels; else they are cut.

  ValueError for an unknown name, damaged or missing images; OSError for a failed download."""
  for word, value, choices in (("split", split, ("train", "test")), ("fit", fit, dataset.FITS),
                               ("mode", mode or "gray", ("gray", "rgb"))):
    if value not in choices: raise ValueError(f"no {word} {value!r}: choose {', '.join(choices)}")
  if size is not None: size = (size,) * 2 if np.ndim(size) == 0 else tuple(size)
  if size is not None and (len(size) != 2 or any(side not in range(1, 4097) for side in size)):
    raise ValueError(f"a size of {'x'.join(map(str, size))}: choose 1 to 4096 whole pixels")
  size = size and tuple(map(int, size))
  if not isinstance(source, str | os.PathLike):
    if mode: raise ValueError(f"mode {mode} is for files of images: an array keeps its channels")
    return dataset.from_array(source, labels, size, fit, multiple)
  if labels is not None: raise ValueError("labels go with an array: a name or a path has its own")
  name = os.path.expanduser(str(source))
  if name in DATASETS:
    if size or mode: raise ValueError(f"{name} comes in its own size and mode")
    return dataset.trimmed(mirrors.published(name, split, data_dir), multiple)
  if "\0" in name or not os.path.exists(name):
    raise ValueError(f"unknown dataset {name[:200]!r}: choose {', '.join(DATASETS)}, or a folder "
                     "of images, a .zip, a .npy or an .npz file")
  return image_files.read(Path(name), split, size, fit, mode, multiple)

def batch_at(images:np.ndarray, labels:np.ndarray, step:int, batch:int, seed:int,
             flip:bool=False) -> tuple[np.ndarray, np.ndarray]:
  """Algorithm 1, line 2, x_0 ~ q(x_0): one step's images (batch, C, H, W) and labels (batch,).

  It depends on seed and step (0, 1, ...) alone, so a resumed run gets the batches it would have
  had. Steps read on through one permutation of the images after another, an epoch each: every image
  comes once in an epoch, for any batch size. flip: mirrored left to right with probability 1/2
  (Appendix B: CIFAR-10, and all the others but LSUN Bedroom)."""
  n = len(images)
  if batch < 1 or step < 0 or seed < 0 or n == 0:
    raise ValueError(f"no batch of {batch} at step {step} with seed {seed} from {n} images")
  places, index = np.arange(step * batch, (step + 1) * batch), np.empty(batch, np.int64)
  for epoch in range(places[0] // n, places[-1] // n + 1):
    here = places // n == epoch
    index[here] = permutation(seed, int(epoch), n)[places[here] % n]
  x = images[index]
  dataset.release(images)
  if flip:
    mirrored = stream(seed, "flip", step).random(batch) < 0.5
    x[mirrored] = x[mirrored][..., ::-1]
  return x, labels[index]

@functools.lru_cache(maxsize=4)
def permutation(seed:int, epoch:int, n:int) -> np.ndarray:
  return stream(seed, "order of images", epoch).permutation(n)

def scaled(k:np.ndarray) -> np.ndarray:
  """Section 3.3: the levels k = 0..255 as k / 127.5 - 1, float32 in [-1, 1]. Floats already are."""
  x = k.astype(np.float32)
  return x if k.dtype.kind == "f" else x / 127.5 - 1

def unscaled(x:np.ndarray, limits:tuple[float, float]|None) -> np.ndarray:
  """The inverse of `read`'s scaling: uint8 or, for images of floats, float32 between the limits."""
  if limits is None: return to_uint8(x)
  half, middle = limits[1] / 2 - limits[0] / 2, limits[1] / 2 + limits[0] / 2
  return (in_range(x) * half + middle).astype(np.float32)

def to_uint8(x:np.ndarray) -> np.ndarray:
  """round((x + 1) 127.5), clipped to 0..255: the inverse of `scaled`."""
  return np.rint((in_range(x) + 1) * 127.5).astype(np.uint8)

def in_range(x:np.ndarray) -> np.ndarray:
  """x, clipped to [-1, 1]. ValueError for NaN, which is no colour."""
  x = np.asarray(x, np.float64)
  if np.isnan(x).any():
    raise ValueError("the images hold NaN: the model or the sampler has diverged")
  return x.clip(-1, 1)

def levels(x:Any) -> np.ndarray:
  """Images as uint8 (n, C, H, W), from uint8 or levels k / 127.5 - 1, an array or a Tensor.

  ValueError for anything else: the decoder of Eq. 13 is for 256 levels."""
  if hasattr(x, "numpy"): x = x.numpy()
  x = np.asarray(x)
  if x.ndim != 4 or 0 in x.shape:
    raise ValueError(f"x0 must be images (n, C, H, W), not of shape {x.shape}")
  if x.dtype == np.uint8: return x
  k = to_uint8(x)
  if np.abs(scaled(k) - x).max() > 1e-3:
    raise ValueError("x0 must lie on the 256 levels k/127.5 - 1 of uint8 images, as in Eq. 13")
  return k

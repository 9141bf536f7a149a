"""How samples and outliers are told from images. evaluate.py's --against and --samples."""
import argparse
from collections.abc import Callable
from pathlib import Path
import numpy as np
from PIL import Image
import data
from engine import hosts
from engine.batches import choose, mean_error
from engine.device import open_device
from engine.streams import stream
from engine.terminal import number, table
from extras import lenet
from extras.editing import keep_all, read_set, say
from files import checkpoint
from files.atomic import write_json
from files.pictures import picture

def flags(add:Callable):
  add("--against", nargs="+", default=[], metavar="SET", help="inverted, shifted, or a dataset")
  add("--samples", metavar="FILE.npz", help="only compare these samples with the images")
  add("--lenet", action="store_true", help="--samples by three LeNets, trained on the images' classes (some minutes)")
  add("--nearest", type=number(int, 1, 64), metavar="K",
      help="--samples: picture K and the nearest training images, with classes also in a LeNet's features")

# *** outliers ***

def auc(inside:np.ndarray, outside:np.ndarray) -> float:
  """Area under the ROC curve of a score that should be larger outside: P(outside > inside), ties count half."""
  inside = np.sort(inside)
  return float((np.searchsorted(inside, outside) + np.searchsorted(inside, outside, "right")).mean() / 2 / len(inside))

def contrast(name:str, images:np.ndarray, split:str="test", seed:int=0, data_dir:str|None=None) -> np.ndarray:
  """As many images to tell from `images`: "inverted", "shifted" (a quarter to the right and down, around the edge), or
  from another dataset, resized and in gray or colour as these. uint8 (n, C, H, W), or fewer if there are no more."""
  n, c, h, w = images.shape
  if name == "inverted": return 255 - images
  if name == "shifted": return np.roll(images, (h // 4, w // 4), (2, 3))
  others = data.load(name, split, data_dir)[0]
  if not {c, others.shape[1]} <= {1, 3} or others.dtype != np.uint8:
    raise ValueError(f"{name} has {others.dtype} of {others.shape[1]} channels, these images {c}: only gray and colour "
                     "of 8 bits can be told apart")
  pictures = [picture(others[i]).convert("L" if c == 1 else "RGB").resize((w, h), Image.Resampling.BICUBIC)
              for i in choose(len(others), n, seed, "other images")]
  return np.stack([np.asarray(x).reshape(h, w, c).transpose(2, 0, 1) for x in pictures])

# *** the quality of samples ***

def sliced_wasserstein(a:np.ndarray, b:np.ndarray, directions:int=1000, seed:int=0) -> float:
  """How far two sets of images (n, C, H, W) are apart: 0 if alike, on the scale of their values.

  √ of the mean of W₂² over random directions and dimensions (Bonneel et al. 2015): along a direction both sets are
  numbers, and W₂ compares their sorted values, here 500 quantiles of each. It sees pixels, not meaning: FID, by tools
  that read sample.py's --npz, is what papers quote.
  """
  v = stream(seed, "directions").standard_normal((a[0].size, directions)).astype(np.float32)
  v /= np.linalg.norm(v, axis=0)
  def along(x:np.ndarray) -> np.ndarray:
    return np.quantile(x.reshape(len(x), -1).astype(np.float32) @ v, (np.arange(500) + 0.5) / 500, axis=0)
  return float(np.sqrt(np.square(along(a) - along(b)).mean()))

def compare_samples(a:argparse.Namespace):
  """--samples at the terminal: their distance to the images and, where these are apart from the training images, that
  of as many training images, if there are as many; --lenet, --nearest.

  a: the command line of evaluate.py. Without --dataset the images are those of the checkpoint. With one, --checkpoint
  says how they are read.
  ValueError for samples that are no such images, and for LeNets without classes to learn."""
  if not Path(a.samples).expanduser().exists(): raise ValueError(f"--samples: there is no {a.samples}")
  made, meta, path = data.read(a.samples), {}, None
  say(a.samples, made)
  if a.checkpoint or a.lenet or a.nearest or not a.dataset: open_device(a.tf32)
  if (a.n or 0) > len(made.images): raise ValueError(f"--n {a.n}: {a.samples} has {len(made.images)}")
  if a.checkpoint or not a.dataset: meta = checkpoint.load(path := checkpoint.find(a.checkpoint))[1]
  keep_all(a, path, meta, a.nearest and beside(a.samples))
  if not (name := a.dataset or meta.get("dataset")):
    raise ValueError("the checkpoint does not name its images: say which by --dataset")
  found, known = (read_set(name, split, a.data_dir, made.images.shape[2:], meta) for split in (a.split, "train"))
  say(name, found, a.split)
  samples, images, real = values(made), values(found), values(known)
  if a.n: samples = samples[choose(len(samples), a.n, a.seed, "samples")]
  if samples.shape[1:] != images.shape[1:] or samples.dtype != images.dtype:
    raise ValueError(f"--samples takes images of the dataset's type and shape: {a.samples} holds {samples.dtype} "
                     f"{samples.shape[1:]}, {name} {images.dtype} {images.shape[1:]}")
  apart = a.split == "test" and found.heldout  # from the training images, whose distance then says something
  real = real[choose(len(real), len(samples), a.seed, "other images")]
  if (a.lenet or a.nearest) and found.limits:
    raise ValueError(f"--lenet and --nearest are for 8 bits, but {name} has floats")
  if a.lenet and (len(known.classes) < 2 or len(samples) < 2):
    raise ValueError(f"--lenet needs classes and two samples or more: {name} has {len(known.classes)} classes")
  low, high = found.limits or (0, 255)
  result:dict = {"n": len(samples), "sliced_wasserstein": sliced_wasserstein(samples, images, seed=a.seed)}
  table(sliced_Wasserstein_distance=(result["sliced_wasserstein"],
                                     f"of {high - low:g}, {len(samples)} samples to {len(images)} {a.split} images"))
  if apart:
    result["sliced_wasserstein_of_training_images"] = sliced_wasserstein(real, images, seed=a.seed)
    table(of_training_images=(result["sliced_wasserstein_of_training_images"], f"{len(real)} of them"))
  if a.lenet: result["lenet"] = lenet.report_lenet(samples, real if apart else None, found, known, a.split)
  if a.nearest:
    tests = images[choose(len(images), len(samples), a.seed, "evaluated images")] if apart else None
    result["nearest"] = lenet.report_nearest(samples, known, tests, a.nearest, beside(a.samples))
  if a.json and not hosts.rank(): write_json(a.json, result)

def beside(samples:str) -> str:
  """Where the picture of --nearest goes."""
  path = Path(samples)
  if path.is_dir(): return f"{path.resolve()}.nearest.png"
  return str(path.with_suffix(".nearest.png"))

def values(found:data.Dataset) -> np.ndarray:
  """The images as they were before `data.read` scaled them."""
  return found.images if found.limits is None else data.unscaled(found.images, found.limits)

def report_against(inside:np.ndarray, outside:dict[str, np.ndarray]) -> dict:
  """--against at the terminal: how well bits/dim tell each set's images from those inside; the numbers by name."""
  found = {}
  for name, bpd in outside.items():
    area = auc(inside, bpd)
    table(**{f"bits_per_dim_of_{name}": (bpd.mean(),),
             "area_under_the_ROC_curve": (area, "(1: always less likely, 0.5: no difference, 0: always likelier)")})
    found[name] = {"auc": area, "bits_per_dim": bpd.mean(), "n": len(bpd)}
  return found

def report_naive(index:int, b) -> dict:
  """--naive at the terminal: Eq. 3 against Eq. 5 on evaluate.py's `Trajectories` of one image; the numbers by name."""
  (x, dx), (y, dy), eq5 = mean_error(b.eq3), mean_error(b.kl.sum(1)), b.kl.sum(1)
  spread = {"eq3": b.eq3.var(ddof=1), "eq5": eq5.var(ddof=1),
            "drawn": b.sampled.var(0, ddof=1).sum(), "kl": b.kl.var(0, ddof=1).sum()}
  fall = spread["drawn"] / spread["kl"] if spread["kl"] else None
  table(Eq_3=(x, f"± {dx:.5f}, {len(b.eq3)} trajectories of image {index}"), Eq_5=(y, f"± {dy:.5f}"),
        variance_of_Eq_3=(spread["eq3"],), variance_of_Eq_5=(spread["eq5"],),
        of_the_terms_drawn_alone=(spread["drawn"],), of_their_KLs=(spread["kl"],))
  return {"n": len(b.eq3), "index": int(index), "eq3": x, "eq3_error": dx, "eq5": y,
          "eq5_error": dy, "variance": spread, "variance_falls": fall}

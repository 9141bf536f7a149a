"""How samples and outliers are told from images, without another network. evaluate.py's --against and --samples."""
import os
import numpy as np
from PIL import Image
import data
from engine.batches import choose
from engine.streams import stream
from files.pictures import picture

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
  pictures = [picture(others[i]).convert("L" if c == 1 else "RGB").resize((w, h), Image.Resampling.BICUBIC)
              for i in choose(len(others), n, seed, "other images")]
  return np.stack([np.asarray(x).reshape(h, w, c).transpose(2, 0, 1) for x in pictures])

# *** the quality of samples ***

def sliced_wasserstein(a:np.ndarray, b:np.ndarray, directions:int=1000, seed:int=0) -> float:
  """How far two sets of images (n, C, H, W) uint8 are apart: 0 if alike, on the scale 0..255.

  √ of the mean of W₂² over random directions and dimensions (Bonneel et al. 2015): along a direction both sets are
  numbers, and W₂ compares their sorted values, here 500 quantiles of each. It sees pixels, not meaning: FID, by tools
  that read sample.py's --npz, is what papers quote.
  """
  v = stream(seed, "directions").standard_normal((a[0].size, directions)).astype(np.float32)
  v /= np.linalg.norm(v, axis=0)
  def along(x:np.ndarray) -> np.ndarray:
    return np.quantile(x.reshape(len(x), -1).astype(np.float32) @ v, (np.arange(500) + 0.5) / 500, axis=0)
  return float(np.sqrt(np.square(along(a) - along(b)).mean()))

def read_npz(path:str|os.PathLike) -> np.ndarray:
  """The images (n, C, H, W) of sample.py's --npz. ValueError, in one sentence, for any other file."""
  try: x = np.load(path, allow_pickle=False)["arr_0"]
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or 'it is no .npz file'}") from e
  except Exception as e: raise ValueError(f"{path} is no .npz file with the array arr_0: {e}") from e
  if x.ndim != 4 or x.dtype != np.uint8 or not len(x): raise ValueError(f"{path} holds no uint8 images (n, H, W, C)")
  return x.transpose(0, 3, 1, 2)

"""What may be changed in L_simple: which times are drawn, what each counts for, and where no error counts. None of it
is in the paper. c: the `Config` of train.py."""
import dataclasses, sys
from numbers import Integral, Real
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Tensor
import data
from ddpm import DDPM
from engine.streams import stream
from unet import UNet

def min_snr_weight(ddpm:DDPM, gamma:float) -> np.ndarray:
  """--min-snr: min(SNR, γ)/SNR of each t, SNR = ᾱ_t/(1−ᾱ_t): Hang et al. 2023 (arXiv:2303.09556). (T+1,)."""
  return np.minimum(1, gamma * (1 - ddpm.alpha_bar) / ddpm.alpha_bar)

def vlb_share(ddpm:DDPM) -> np.ndarray:
  """What the squared error of the network's answer at each t counts for in L_vlb: (T+1,), the sum is 1.

  For ε it is Eq. 12's factor. An error e of x̂_0 is one of √(ᾱ/(1−ᾱ)) e in ε, one of v is √ᾱ times that in ε, and an
  error of μ is √ᾱ_{t−1} β_t/(1−ᾱ_t) times that of x̂_0."""
  t, a = np.arange(1, ddpm.T + 1), ddpm.alpha_bar[1:]
  of_x0 = a / (1 - a)
  share = ddpm.vlb_weight(t) * {"eps": 1, "x0": of_x0, "v": a, "mu": of_x0 / ddpm.mu_x0[1:]**2}[ddpm.predict]
  return np.append(0, share / share.sum())

def chances(ddpm:DDPM, min_snr:float=0, times:str="weighted") -> tuple[np.ndarray, np.ndarray]:
  """--times weighted and importance: what each t should count for in the mean loss, and how often it is drawn, a
  distribution: (T+1,) each. min_snr weights the times by `min_snr_weight` as well.

  It is importance sampling. weighted: each t counts as in L_vlb. Drawn uniformly, t = 1, with up to half of the bound,
  would come once in T. Drawn as Eq. 12 weights it, of the linear schedule a third of all draws would be times at which
  nothing of x_0 is left and ε is easy. So where the signal is weaker than the noise, t is drawn √(ᾱ/(1−ᾱ)) times as
  often, and counts for more when it is. Of min_snr's weight it is drawn by the root.

  importance: each t counts as when drawn uniformly. The gradient's variance is least where t is drawn in proportion to
  the root mean square of its gradient: about SNR^¼, measured on MNIST for t from 10 to 1000."""
  snr = ddpm.alpha_bar / (1 - ddpm.alpha_bar).clip(1e-12)
  clear = min_snr_weight(ddpm, min_snr) if min_snr else np.ones(ddpm.T + 1)
  if times == "importance":
    share = np.append(0, clear[1:] / ddpm.T)
    drawn = share * snr**0.25
  else:
    share = vlb_share(ddpm) * clear
    share /= share.sum()
    drawn = np.append(0, ddpm.vlb_weight(np.arange(1, ddpm.T + 1))) * np.sqrt(np.minimum(1, snr) * clear)
  return share, drawn / drawn.sum()

def weighted_times(drawn:np.ndarray, n:int, rng:np.random.Generator) -> np.ndarray:
  """n times drawn from the distribution `drawn`, one from each of n equal strata: int32 (n,)."""
  at = (rng.random() + np.arange(n)) / n
  return rng.permutation(np.searchsorted(drawn.cumsum(), at, "right").clip(1, len(drawn) - 1)).astype(np.int32)

def time_weights(ddpm:DDPM, c) -> Tensor|None:
  """What the loss of each t is multiplied by, (T+1,), None for 1: with --times weighted and importance the share that
  it should have over how often it is drawn, else --min-snr's weight."""
  if c.times != "uniform":
    share, drawn = chances(ddpm, c.min_snr, c.times)
    if c.loss == "vlb": share = np.full(ddpm.T + 1, 1 / ddpm.T)
    return Tensor((share / drawn.clip(1e-12)).astype(np.float32)).realize()
  if c.min_snr: return Tensor(min_snr_weight(ddpm, c.min_snr).astype(np.float32)).realize()
  return None

def without_clipped(ddpm:DDPM, x0:Tensor, x_t:Tensor, t:Tensor, eps:Tensor, out:Tensor) -> Tensor:
  """--clip-x0: the network's answer, replaced by its target wherever the clipped x̂_0 already equals x_0. Those pixels
  give no gradient."""
  exact, answer = (ddpm.predict_x0(x_t, t, out).clip(-1, 1) - x0).abs() < 1e-5, ddpm.answer(x0, out)
  kept = exact.where(ddpm.target(x0, x_t, t, eps), answer)
  return kept if ddpm.sigma != "learned" else kept.cat(out[:, x0.shape[1]:], dim=1)  # log σ² stays

def held_out(c, null:int, how:dict, drawn:np.ndarray|None) -> tuple[np.ndarray, ...]|None:
  """Up to 512 images apart from the training set, with t (evenly spread, or as `drawn` for training), ε and labels,
  always the same: what a held-out loss is measured on. None where there are no such images; the glyphs are not worth
  the time."""
  if c.dataset in (None, "glyphs"): return None
  found = data.read(c.dataset, "test", c.data_dir, **how)
  if not found.heldout: return None
  rng, n = stream(c.seed, "held-out images"), min(512, len(found.images))
  index = np.sort(rng.choice(len(found.images), n, replace=False))
  t = rng.permutation(1 + (2 * np.arange(n) + 1) * c.T // (2 * n)).astype(np.int32)  # the middles of n strata
  if drawn is not None: t = weighted_times(drawn, n, rng)
  y = found.labels[index] if c.class_conditional else np.full(n, null, np.int32)
  return found.images[index], t, rng.standard_normal((n, *found.images.shape[1:]), np.float32), y

def check(c):
  """ValueError for settings out of their range, and for those that do not go together."""
  for f in dataclasses.fields(c):
    v, (low, high, choices) = getattr(c, f.name), (f.metadata.get(k) for k in ("low", "high", "choices"))
    if f.name == "schedule" and isinstance(v, list | tuple): continue  # one's own, which ddpm.py checks
    kind, known, what = type(f.default), True, ""
    if choices: known, what = isinstance(v, str) and v in choices or v is f.default, f"one of {', '.join(choices)}"
    elif kind is bool: known, what = isinstance(v, bool | np.bool_), "True or False"
    elif kind is tuple:
      known = isinstance(v, list | tuple | range | np.ndarray) and all(isinstance(i, Integral) for i in v)
      what = f"whole numbers, as {f.default}"
    elif kind in (int, float):
      known, what = isinstance(v, Integral if kind is int else Real) and low <= v <= high, f"from {low:g} to {high:g}"
      if kind is int: what = f"whole, {what}"
    if not known: raise ValueError(f"--{f.name.replace('_', '-')} must be {what}, not {repr(v)[:60]}")
  begun, photos = Path(c.out, "last.safetensors").exists(), Path(c.dataset or "").expanduser()
  if c.dataset in data.DATASETS:
    if c.fit != "crop" and not begun:
      raise ValueError(f"--fit is for images of your own: {c.dataset} comes in its own size")
  elif c.dataset and photos.is_dir() and Path(c.out).resolve().is_relative_to(photos.resolve()) and not begun:
    raise ValueError(f"--out {c.out} is in the dataset's own folder, where its pictures would become training images")
  if not len(c.channel_mult): raise ValueError("--channel-mult needs one level or more, such as 1,2,2")
  if c.batch % c.accum: raise ValueError(f"--batch {c.batch} is no multiple of --accum {c.accum}")
  if (c.min_snr or c.times == "importance") and (c.predict, c.loss) != ("eps", "simple"):
    raise ValueError("--min-snr and --times importance are for L_simple of ε: --predict eps, --loss simple")
  if c.sigma == "learned" and c.loss == "simple":
    raise ValueError("--sigma learned needs --loss vlb: L_simple does not depend on the variance")
  if c.schedule == "cosine" and (c.beta_1, c.beta_T) != (1e-4, 0.02):
    raise ValueError("--schedule cosine has no use for --beta-1 and --beta-T")

def check_data(c, net:Any, found:data.Dataset):
  """ValueError for one class alone, for floats where levels are needed, and for a UNet for images of another shape.
  Says so where attention is asked for at a size that no level of a UNet has."""
  if c.class_conditional and len(found.classes) == 1: raise ValueError(f"there is but one class of images: {LAYOUTS}")
  if c.loss == "vlb" and found.limits: raise ValueError("--loss vlb needs images of 8 bits, not floats: L_0 is Eq. 13")
  if not isinstance(net, UNet): return
  own = net.config["in_channels"], *np.broadcast_to(net.config["image_size"], 2).tolist()
  if own != (shape := found.images.shape[1:]):
    raise ValueError(f"the network is for images of {own}, these are {shape}: channels, height, width")
  classes = len(found.classes) * c.class_conditional
  if net.config["num_classes"] != classes:
    raise ValueError(f"the network is for {net.config['num_classes']} classes, this training for {classes}")
  levels = [max(own[1:]) >> i for i in range(len(net.config["channel_mult"]))]
  if nowhere := sorted(set(net.config["attn_resolutions"]) - set(levels)):
    print(f"no self-attention at {', '.join(map(str, nowhere))} (--attn): the network's levels are "
          f"{', '.join(map(str, levels))} pixels wide", file=sys.stderr)

LAYOUTS = ("classes are sub-folders, the beginnings of names such as cat_1.png, a dataset.json, or the labels of an "
           "array")

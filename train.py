"""Algorithm 1: training. python train.py --dataset mnist   (see --help; run it again to go on where it stopped)

From top to bottom: what is trained by default; Algorithm 1 as one step; what may be changed in it (not in the paper);
the numbers that it changes; a run and its folder; the command line.
"""
from __future__ import annotations
import argparse, contextlib, functools, itertools, json, math, os, sys, time, zlib
from collections.abc import Callable, Iterator
from pathlib import Path
import numpy as np
from tinygrad import Device, Tensor, dtypes, nn
from tinygrad.dtype import DType
import data, sample
from ddpm import DDPM
from files import checkpoint, pictures
from engine.folder import claim
from files.atomic import atomic
from engine.capture import captured, inside, placed
from engine.device import open_device
from engine.streams import stream
from engine.terminal import clock, number, run, stoppable
from files.weights import read_tensors, write_tensors
from unet import DTYPES, UNet

# What differs by dataset; --help says what each is. cifar10 is the paper's Appendix B (warmup and groups the authors'
# code's). The others are sized for some minutes on two CPU cores, by the trials of BENCHMARKS.md: little of the work at
# the full resolution, labels, less weight for the finest detail, and a learning rate that is high and falls to 0.
PRESETS:dict[str, dict] = {
  "cifar10": dict(steps=800_000, batch=128, lr=2e-4, ema=0.9999, channels=128, channel_mult=(1, 2, 2, 2),
                  num_res_blocks=2, attn=(16,), dropout=0.1, norm_groups=32,
                  warmup=5000, save_every=1000, sample_every=5000, flip=True,
                  anneal=0, min_snr=0, class_conditional=False)}
PRESETS["mnist"] = PRESETS["cifar10"] | dict(
  steps=6000, batch=32, lr=2e-3, ema=0.998, channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, attn=(7,),
  dropout=0., norm_groups=8, warmup=200, save_every=500, sample_every=1000, flip=False,
  anneal=6000, min_snr=5, class_conditional=True)
PRESETS["glyphs"] = PRESETS["mnist"] | dict(steps=2500, channel_mult=(1, 4), attn=(8,), anneal=2500, sample_every=500)
PRESETS["fashion_mnist"] = PRESETS["mnist"] | dict(flip=True)
PRESETS["folder"] = PRESETS["cifar10"] | dict(steps=100_000, batch=32, channels=64, warmup=1000)

# *** Algorithm 1 ***

def draw(a:argparse.Namespace, images:np.ndarray, labels:np.ndarray, null:int, n:int) -> tuple[np.ndarray, ...]:
  """Lines 2-4, for step n (from 1), from (seed, n) alone: x_0 as 0..255 (B,C,H,W), t (B,), ε (B,C,H,W); and the labels
  (B,), `null` for none, and seeds of the dropout (B,)."""
  x, y = data.batch_at(images, labels, n-1, a.batch, a.seed, a.flip)  # x₀ ~ q(x₀)
  rng = stream(a.seed, "training step", n)
  t = rng.integers(1, a.T+1, a.batch, np.int32)                       # t ~ Uniform({1, …, T})
  eps = rng.standard_normal(x.shape, np.float32)                      # ε ~ N(0, I)
  # not in the paper: other times, levels spread over their bins, and labels, some of which are dropped, because
  # classifier-free guidance needs a network that knows "no class" as well
  if a.times == "weighted": t = weighted_times(a, rng)
  if a.dequantize: x = x + (rng.random(x.shape, np.float32) - 0.5)
  y = np.where(rng.random(a.batch) < a.drop_labels, null, y).astype(np.int32)
  return x, t, eps, y, rng.integers(0, 2**32, a.batch, np.uint32)

def hyper(a:argparse.Namespace, n:int) -> list[float]:
  """Learning rate, Adam's two corrections and the decay of the average at step n (from 1)."""
  lr = a.lr * min(1, n/max(a.warmup, 1))  # the authors' code
  if a.anneal: lr *= max(0, 1 - (n-1)/a.anneal)  # not in the paper
  decay = min(a.ema, (1+n) / (10+n))  # not in the paper: a young average must forget the initialization
  return [lr, 1-0.9**n, 1-0.999**n, decay]

def make_step(state:State, ddpm:DDPM, a:argparse.Namespace) -> Callable[..., list[Tensor]]:
  """Algorithm 1, lines 2-5, as one graph: step(*state.given(h, x, t, eps, y, seeds)) -> [‖∇θ‖, the loss of each example
  (on each device)].

  x, t, eps, y, seeds are a part of what `draw` gives. h (5,): 1 if it is the last part of its batch, else 0; and
  `hyper`. The weights change after the last part."""
  losses, accum, clip = functools.partial(loss_terms, ddpm, a, time_weights(ddpm, a)), a.accum, a.clip
  # loss scaling: the gradient of a mean over so many numbers would fall below the least one that float16 has
  scale = a.batch//a.accum * state.model.config["in_channels"] * state.model.config["image_size"]**2 \
    if state.dtype == dtypes.float16 else 1
  def step(h:Tensor, *shares:Tensor) -> list[Tensor]:
    last, lr, c1, c2, decay = [h[i] for i in range(5)]
    m, v, w, e, grads = [state.flat[k] for k in ("m", "v", "raw", "ema", "grad")]
    each = []
    for i, (model, parts) in enumerate(zip(state.models, state.parts["grad"], strict=True)):  # each device, its images
      x, t, eps, y, seeds = shares[5*i:5*i+5]
      x0 = x.cast(dtypes.float32) / 127.5 - 1
      each.append(losses(model, x0, t, eps, y, seeds))                      # ‖ε − ε_θ(√ᾱₜ x₀ + √(1−ᾱₜ) ε, t)‖²
      gradient = (each[i].mean() * scale).gradient(*nn.state.get_parameters(model))  # ∇θ
      for part, g in zip(parts, gradient, strict=True):
        g = g.reshape(part.shape).float() / (scale * accum)
        part.assign(part + g if accum > 1 else g)
    Tensor.realize(*each, *(p for parts in state.parts["grad"] for p in parts))  # all, before they are read as one
    grad = grads.mean(0)                        # over the devices
    norm = total(grad.square()).sqrt()
    g = grad * (clip / norm.maximum(clip))      # clipping: the authors' code, not in the paper
    # Adam
    m.assign(m + last * 0.1 * (g - m))          # m ← β₁ m + (1−β₁) g
    v.assign(v + last * 0.001 * (g * g - v))    # v ← β₂ v + (1−β₂) g²
    # θ ← θ − lr m̂/(√v̂ + 1e-8), m̂ = m/(1−β₁ⁿ), v̂ = v/(1−β₂ⁿ)
    w.assign(w - last * lr * (m / c1) / ((v / c2).sqrt() + 1e-8))
    e.assign(e + last * (1 - decay) * (w - e))  # EMA: θ̄ ← d θ̄ + (1−d) θ
    low = [state.flat["low"].assign(w.cast(state.dtype))] if "low" in state.flat else []
    Tensor.realize(norm, m, v, w, e, *low)
    if accum > 1: grads.assign(grads * (1 - last)).realize()  # the next batch begins at 0
    return [norm, *each]
  return captured(step)

def loss_terms(ddpm:DDPM, a:argparse.Namespace, weights:Tensor|None, net:UNet,
               x0:Tensor, t:Tensor, eps:Tensor, y:Tensor, seeds:Tensor) -> Tensor:
  """The loss of each example (B,): L_simple (Eq. 14) or its term of L_vlb (Eq. 5), times what its t counts for."""
  def model(x_t:Tensor, t:Tensor) -> Tensor:
    out = net(x_t, t, y if a.class_conditional else None, seeds if a.dropout else None)
    return mended(ddpm, x0, x_t, t, eps, out) if a.clip_x0 else out
  if a.loss == "simple": loss = ddpm.loss_terms(model, x0, t, eps)
  else: loss = ddpm.vlb_term(model, x0, t, eps, clip=False)  # an estimate of Σₜ Lₜ₋₁ / T, whichever way t is drawn
  return loss if weights is None else loss * weights.to(t.device)[t]

def total(v:Tensor) -> Tensor:
  """The sum, in two stages: a float32 sum of millions would drift."""
  return v.reshape(-1, 4096).sum(0).sum()

def take(step:Callable, state:State, a:argparse.Namespace, n:int, x:np.ndarray, t:np.ndarray, eps:np.ndarray,
         y:np.ndarray, seeds:np.ndarray) -> tuple[np.ndarray, float]:
  """Step n with what `draw` gave for it, in --accum parts: loss of each example (B,), norm of the gradient."""
  each, size = [], a.batch//a.accum
  for k in range(a.accum):
    part, h = slice(k*size, (k+1)*size), np.array([k == a.accum-1, *hyper(a, n)], np.float32)
    norm, *losses = step(*state.given(h, *(v[part] for v in (x, t, eps, y, seeds))))
    each += [loss.numpy() for loss in losses]
  return np.concatenate(each), float(state.fetch(norm))

# *** what may be changed in it: not in the paper ***

def mended(ddpm:DDPM, x0:Tensor, x_t:Tensor, t:Tensor, eps:Tensor, out:Tensor) -> Tensor:
  """--clip-x0: the model's output, or what it should be, where clipping x̂_0 to [-1, 1] leaves no error.

  Clipping brings an x̂_0 beyond ±1 to an x_0 at ±1. Any other is seen unclipped: the gradient of a clipped one is 0."""
  exact = (ddpm.predict_x0(x_t, t, out).clip(-1, 1) - x0).abs() < 1e-5
  return exact.where(ddpm.target(x0, x_t, t, eps), out)

def min_snr_weight(ddpm:DDPM, gamma:float) -> np.ndarray:
  """--min-snr: min(SNR, γ)/SNR of each t, SNR = ᾱ_t/(1−ᾱ_t): Hang et al. 2023 (arXiv:2303.09556)."""
  return np.minimum(1, gamma * (1-ddpm.alpha_bar) / ddpm.alpha_bar)

@functools.cache
def chances(T:int, beta_1:float, beta_T:float, schedule:str, min_snr:float=0) -> tuple[np.ndarray, np.ndarray]:
  """Each t's weight in Eq. 12 with σ_t² = β_t, β_t/(2 α_t (1−ᾱ_t)), and how often --times weighted draws it; sums: 1.

  Drawn evenly, t = 1, with up to half of the bound, would come once in T. Drawn as the weights, a third would be times
  at which nothing of x_0 is left, and ε easy: where ᾱ_t < 1−ᾱ_t, √(ᾱ_t/(1−ᾱ_t)) as many are drawn, and count for more.
  min_snr = γ makes the weight min(SNR, γ)/SNR of that, and as at the other end its root as many are drawn. Row 0 is not
  drawn."""
  d = DDPM(T, beta_1, beta_T, schedule)
  weight = np.append(0, d.beta[1:] / (d.alpha[1:] * (1 - d.alpha_bar[1:])))
  clear = min_snr_weight(d, min_snr) if min_snr else 1
  drawn = weight * np.sqrt(np.minimum(1, d.alpha_bar / (1 - d.alpha_bar).clip(1e-12)) * clear)
  weight = weight * clear
  return weight / weight.sum(), drawn / drawn.sum()

def weighted_times(a:argparse.Namespace, rng:np.random.Generator) -> np.ndarray:
  """--times weighted: t (B,) as often as `chances` has it, one from each of B equal strata."""
  at = (rng.random() + np.arange(a.batch)) / a.batch
  p = chances(a.T, a.beta_1, a.beta_T, a.schedule, a.min_snr)[1]
  return rng.permutation(np.searchsorted(p.cumsum(), at, "right").clip(1, a.T)).astype(np.int32)

def time_weights(ddpm:DDPM, a:argparse.Namespace) -> Tensor|None:
  """What the loss of each t counts for (T+1,), if not 1: with --times weighted the share that it should have over that
  drawn, else --min-snr's weight."""
  if a.times == "weighted":
    weight, drawn = chances(a.T, a.beta_1, a.beta_T, a.schedule, a.min_snr)
    return Tensor(((weight if a.loss == "simple" else 1/a.T) / drawn.clip(1e-12)).astype(np.float32)).realize()
  return Tensor(min_snr_weight(ddpm, a.min_snr).astype(np.float32)).realize() if a.min_snr else None

# *** what it changes ***

class State:
  """Weights, their average (EMA), Adam's two moments and the gradient, each one flat buffer; weights in `dtype` too.

  So a handful of kernels update all parameters at once. The networks' weights lie inside these buffers: nothing is
  copied, and the average is never an alias of the weights. Each of several devices has all of it, a network and the
  gradient of its own images; one sum of these flat gradients over the devices makes their steps the same."""
  def __init__(self, config:dict, devices:tuple[str, ...], dtype:DType=dtypes.float32):
    self.models, self.average = [UNet(**config) for _ in devices], UNet(**config)
    self.model, self.devices, self.dtype = self.models[0], tuple(map(Device.canonicalize, devices)), dtype
    for model in self.models: model.dtype = dtype
    weights = {k: v.numpy() for k, v in nn.state.get_state_dict(self.model).items()}
    self.shapes, self.size = {k: v.shape for k, v in weights.items()}, sum(v.size for v in weights.values())
    # each parameter begins at a multiple of 256 numbers, where OpenCL too can have a buffer begin
    self.starts = [0, *itertools.accumulate(v.size + -v.size % 256 for v in weights.values())]
    self.start(weights)

  def start(self, weights:dict[str, np.ndarray]):
    """Takes the weights, by name, for their average as well; the moments are 0."""
    named = {f"{key}.{k}": v for key in ("raw", "ema") for k, v in weights.items()}
    self.put(named | {f"adam.{key}": np.zeros(self.size, np.float32) for key in ("m", "v")})

  def put(self, arrays:dict[str, np.ndarray]):
    """Takes what `arrays` gives."""
    ends = list(itertools.accumulate(map(math.prod, self.shapes.values())))
    named = {key: [arrays[f"{key}.{k}"] for k in self.shapes] for key in ("raw", "ema")}
    named |= {key: np.split(arrays[f"adam.{key}"], ends[:-1]) for key in ("m", "v")}
    self.flat = {"grad": self.lay(self.pack([])[None].repeat(len(self.devices), 0), axis=0).realize()}
    self.flat |= {key: self.lay(self.pack(parts)).realize() for key, parts in named.items()}
    if self.dtype != dtypes.float32: self.flat["low"] = self.flat["raw"].cast(self.dtype).contiguous().realize()
    self.parts = {key: [[inside(flat, device, i, shape) for i, shape in zip(self.starts, self.shapes.values())]
                        for device in self.devices] for key, flat in self.flat.items() if key not in "mv"}
    # scales, shifts and biases are not rounded to dtype
    weights = [[w if w.ndim == 1 else l for w, l in zip(*both, strict=True)]
               for both in zip(self.parts["raw"], self.parts.get("low", self.parts["raw"]))]
    for model, parts in zip([*self.models, self.average], [*weights, self.parts["ema"][0]], strict=True):
      for p, part in zip(nn.state.get_parameters(model), parts, strict=True): p.replace(part)

  def pack(self, arrays:list[np.ndarray]) -> np.ndarray:
    """One flat array of each parameter's; zeros between them and for those that are not given."""
    flat = np.zeros(self.starts[-1] + -self.starts[-1] % 4096, np.float32)
    for i, v in zip(self.starts, arrays): flat[i:i+v.size] = v.reshape(-1)
    return flat

  def arrays(self) -> dict[str, np.ndarray]:
    """For the checkpoint: the weights by name, the moments flat, one parameter after the other."""
    def cut(key:str) -> list[np.ndarray]:
      flat = self.fetch(self.flat[key])
      return [flat[i:i+math.prod(s)].reshape(s) for i, s in zip(self.starts, self.shapes.values())]
    named = {f"{key}.{k}": v for key in ("raw", "ema") for k, v in zip(self.shapes, cut(key))}
    return named | {f"adam.{key}": np.concatenate([v.reshape(-1) for v in cut(key)]) for key in ("m", "v")}

  def lay(self, array:np.ndarray, axis:int|None=None) -> Tensor:
    """On the device or whole on all devices or, cut along `axis`, a part on each."""
    t = placed(array, self.devices[0])
    return t if len(self.devices) == 1 else t.shard(self.devices, axis)

  def given(self, h:np.ndarray, *arrays:np.ndarray) -> list[Tensor]:
    """What a captured step takes: h, then for each device in turn its share of the images of each array."""
    shares = zip(*(np.split(v, len(self.devices)) for v in arrays), strict=True)
    on_each = (placed(v, d) for d, share in zip(self.devices, shares, strict=True) for v in share)
    return [self.lay(h).realize(), *on_each]

  def fetch(self, t:Tensor) -> np.ndarray: return t.to(self.devices[0]).numpy()

# *** a run: what fixes it, and where it begins ***

def network(a:argparse.Namespace, in_channels:int, image_size:int, num_classes:int=0) -> dict:
  """The arguments of `UNet`."""
  return dict(in_channels=in_channels, channels=a.channels, channel_mult=a.channel_mult,
              num_res_blocks=a.num_res_blocks, attn_resolutions=a.attn, dropout=a.dropout, image_size=image_size,
              norm_groups=a.norm_groups, num_classes=num_classes, seed=a.seed)

def diffusion(a:argparse.Namespace) -> dict:
  """The arguments of `DDPM`."""
  return dict(T=a.T, beta_1=a.beta_1, beta_T=a.beta_T, schedule=a.schedule, sigma=a.sigma, predict=a.predict)

def load_images(a:argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """Images (N,C,H,H) and labels (N,). ValueError, in one sentence, for what cannot be trained on."""
  images, labels = data.load(a.dataset, "train", a.data_dir, a.image_size, multiple=2**(len(a.channel_mult)-1))
  H, W = images.shape[2:]
  if H != W: raise ValueError(f"images of {H}x{W} are not square")
  return images, labels

def warn_if_clear(ddpm:DDPM):
  """Says so if the forward process ends before nothing of the image is left."""
  if (left := ddpm.alpha_bar[-1]) > 1e-2:
    print(f"train.py: warning: with T = {ddpm.T} the last x_T still holds {left**.5:.0%} of the image, "
          "but sampling starts from pure noise", file=sys.stderr)

def open_devices(device:str, n:int) -> tuple[str, ...]:
  """The names of n devices of one kind. ValueError unless they are there."""
  names = (device,) if n == 1 else tuple(f"{device.split(':')[0]}:{i}" for i in range(n))
  for name in names:
    try: Device[name]
    except Exception as e: raise ValueError(f"--gpus {n}: there is no device {name}") from e
  return names

def settings(a:argparse.Namespace, config:dict, images:np.ndarray) -> dict:
  """All that fixes the numbers of a run. A run goes on only with the same."""
  keys = ("dataset", "batch", "accum", "lr", "warmup", "clip", "ema", "seed",
          "T", "beta_1", "beta_T", "schedule", "predict", "loss", "times", "min_snr", "dequantize", "clip_x0", "sigma",
          "flip", "class_conditional", "drop_labels", "init", "anneal", "dtype", "tf32")
  return {k: getattr(a, k) for k in keys} | {
    "network": json.loads(json.dumps(config)), "images": list(images.shape), "data": zlib.crc32(images.tobytes())}

def begin(state:State, a:argparse.Namespace, out:Path, fixed:dict) -> tuple[int, float]:
  """Takes over the state of the run in the folder or, if there is none, the weights of --init, if given: (steps behind
  it, smoothed loss). ValueError if that run had other settings, or --init is another network's."""
  if (out/"last.safetensors").exists() and not a.restart: return resume(state, a, out/"last.safetensors", fixed)
  if a.init:
    path = checkpoint.find(a.init)
    given = {k: v.numpy() for k, v in nn.state.get_state_dict(checkpoint.load(path)[0]).items()}
    if {k: v.shape for k, v in given.items()} != state.shapes:
      raise ValueError(f"--init {path} is another network than this one")
    state.start(given)
  return 0, 0.

def resume(state:State, a:argparse.Namespace, last:Path, fixed:dict) -> tuple[int, float]:
  """Takes over what `save` left in `last`. ValueError unless it is the state of a run with the same settings.

  The steps after which its learning rate is 0 it knows itself, unless --anneal says otherwise."""
  anew, default = "--restart to begin anew", arguments(["--dataset", "cifar10"])
  tensors, metadata = read_tensors(last)
  try:
    meta = json.loads(metadata["ddpm"])
    step, smooth, before = int(meta["step"]), float(meta["smooth"]), vars(default) | meta["train"]
    # a flag that is younger than the run: as in the paper
    before["network"] = json.loads(json.dumps(network(default, 0, 0))) | before["network"]
    before["network"].pop("fourier", None)  # and one that is no more
    if not a.anneal_is_asked: a.anneal = fixed["anneal"] = int(before["anneal"])
  except (KeyError, ValueError, TypeError, RecursionError):
    raise ValueError(f"{last} is not the state of a run: use {anew}") from None
  if a.steps > a.anneal > 0 and not a.anneal_is_asked:
    raise ValueError(f"{last.parent} was begun with a learning rate that is 0 from step {a.anneal} on, and more steps "
                     f"would change nothing: begin a longer run with another --out, --init {last.parent}, or {anew}")
  for k, v in fixed.items():
    if (was := before.get(k)) != v:
      raise ValueError(f"{last.parent} was trained with {k} = {was}, not {v}: use the same, another --out, or {anew}")
  want = {f"{key}.{k}": shape for key in ("raw", "ema") for k, shape in state.shapes.items()}
  if {k: v.shape for k, v in tensors.items()} != want | {"adam.m": (state.size,), "adam.v": (state.size,)}:
    raise ValueError(f"{last} does not hold the state of this network: use {anew}")
  if any(not np.isfinite(v).all() for v in tensors.values()):
    raise ValueError(f"{last} holds numbers that are not finite: use {anew}")
  state.put(tensors)
  return step, smooth

# *** its log, pictures and checkpoints ***

Point = tuple[int, float, float]  # of the picture of the loss: step, loss, smoothed loss

def add_point(curve:list[Point], point:Point, most:int=2000):
  """Adds a step to the curve, which keeps every step up to `most`, then every second, every fourth, ...

  What it keeps depends on the steps alone, so that a run that was stopped gets the picture it would have had."""
  every = 1 << ((point[0]-1) // most).bit_length()
  if (point[0]-1) % every == 0: curve.append(point)
  if len(curve) > most: curve[:] = [p for p in curve if (p[0]-1) % every == 0]

def read_log(path:Path, last:int) -> Iterator[tuple[bytes, Point]]:
  """The lines of a log for the steps up to `last`, one at a time; it ends at the first that is damaged."""
  with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError), open(path, "rb") as f:
    for line in f:
      entry = json.loads(line)
      point = int(entry["step"]), float(entry["loss"]), float(entry["smooth"])
      if point[0] <= last: yield line.rstrip() + b"\n", point

def cut_log(path:Path, last:int) -> list[Point]:
  """Drops what a killed run logged beyond its last checkpoint. The curve of what is left."""
  curve:list[Point] = []
  with atomic(path) as f:
    for line, point in read_log(path, last):
      f.write(line)
      add_point(curve, point)
  return curve

def check_finite(n:int, each:np.ndarray, norm:float, out:Path):
  """ValueError, with the name of the last good state, unless the losses and the norm of the gradient are numbers."""
  if math.isfinite(loss := float(each.mean())) and math.isfinite(norm): return
  last = out/"last.safetensors"
  good = f"the last good state is {last}" if last.exists() else "there was no checkpoint before"
  raise ValueError(f"at step {n} the loss is {loss} and the gradient's norm {norm}: "
                   f"stopped before anything of it was saved; {good}")

def entry_of(a:argparse.Namespace, n:int, t:np.ndarray, each:np.ndarray, norm:float, smooth:float, rate:float) -> dict:
  """Step n in the log; rate: images per second, 0 if unknown."""
  # the loss in each quarter of 1..T: a total that stands still can hide bands that do not
  bands = [float(each[q].mean()) if (q := (t-1)*4//a.T == i).any() else None for i in range(4)]
  return {"step": n, "loss": float(each.mean()), "smooth": smooth, "grad_norm": norm, "lr": hyper(a, n)[0],
          "bands": bands, "images_per_s": round(rate, 1)}

def say(entry:dict, steps:int, seconds:float):
  """The line of a step at the terminal."""
  n, left = entry["step"], clock((steps-entry["step"]) * seconds) if seconds else "-:--:--"
  print(f"step {n:>6}/{steps}  loss {entry['smooth']:.4f}  grad {entry['grad_norm']:7.3f}  "
        f"{entry['images_per_s']:7.1f} images/s  {left} left",
        end="\r" if sys.stderr.isatty() and n < steps else "\n", file=sys.stderr, flush=True)

def save(out:Path, state:State, a:argparse.Namespace, curve:list[Point], fixed:dict, n:int, smooth:float):
  """The picture of the loss, the averaged weights, and all that `resume` needs."""
  pictures.loss_curve(out/"loss.png", *np.reshape(curve, (-1, 3)).T)
  arrays = state.arrays()
  about = {"ddpm": diffusion(a), "dataset": a.dataset, "step": n, "unet": state.model.config}
  write_tensors(out/"ema.safetensors", {k[4:]: v for k, v in arrays.items() if k.startswith("ema.")}, about)
  # last of all, so that a run stopped in between makes the others anew
  write_tensors(out/"last.safetensors", arrays, about | {"train": fixed, "smooth": smooth})

def make_show(out:Path, state:State, ddpm:DDPM, a:argparse.Namespace) -> Callable[[int], None]:
  """show(step) draws images with the averaged weights, the same latents each time, so that pictures compare.

  DDIM with 50 steps (not in the paper) takes a 20th of Algorithm 2's time."""
  config, device = state.model.config, state.devices[0]
  size, null = config["image_size"], config["num_classes"]
  jits:dict = {}
  x_T = sample.draw_x_T(36, (config["in_channels"], size, size), a.seed).to(device).realize()
  y = Tensor(np.arange(36, dtype=np.int32) % null, device=device).realize() if null else None  # each class in turn
  def model(x:Tensor, t:Tensor) -> Tensor: return state.average(x, t, y)
  def show(step:int):
    for _, _, x0_hat in sample.SAMPLERS["ddim"](ddpm, model, x_T, min(50, a.T), a.seed, jits=jits): x0 = x0_hat
    images = data.to_uint8(x0.numpy())
    for path in (out/"samples.png", out/"samples"/f"{step:06d}.png"): pictures.save_png(path, pictures.grid(images))
    if sys.stdout.isatty(): print(pictures.to_terminal(images[:8]))
  return show

# *** the command ***

def arguments(argv:list[str]|None) -> argparse.Namespace:
  """The command line, filled up from the dataset's preset.

  ValueError, in one sentence, for a value out of its range."""
  def ints(text:str) -> tuple[int, ...]:
    try: values = tuple(int(v) for v in text.split(",") if v)
    except ValueError: values = (0,)
    if min(values, default=1) >= 1: return values
    raise argparse.ArgumentTypeError(f"it takes whole numbers from 1 up, such as 1,2,2, not {text!r}")
  def refuse(message:str): raise ValueError(message)
  p = argparse.ArgumentParser(
    description="Train a DDPM (Algorithm 1). Each default comes from the dataset's preset; run again to resume.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS)
  p.error = refuse  # type: ignore[method-assign, assignment]

  add = p.add_argument_group("the run").add_argument
  add("--dataset", default="glyphs", help="glyphs, mnist, fashion_mnist, cifar10 or a folder of images")
  add("--data-dir", default=None, help="where the dataset's files are; else $DATA_DIR, else downloaded")
  add("--image-size", type=number(int, 1, 4096), default=None,
      help="images of a folder are cropped and resized to it; else it is their own, at most 64")
  add("--out", default="runs/<dataset>", help="the run's folder")
  add("--init", default=None, help="a checkpoint whose weights to begin with, of the same network")
  add("--restart", action="store_true", default=False, help="begin anew where --out holds a run already")
  add("--steps", type=number(int, 1, 10**9), help="optimizer steps in all")
  add("--seed", type=number(int, 0, 2**31-1), default=0, help="fixes every random number")
  add("--accum", type=number(int, 1, 2**20), default=1, help="parts into which a batch is cut, to save memory")
  add("--gpus", type=number(int, 1, 1024), default=1, help="devices that share a batch")
  add("--save-every", type=number(int, 1, 10**9), help="steps between checkpoints")
  add("--sample-every", type=number(int, 0, 10**9), help="steps between grids of samples; 0: never")

  add = p.add_argument_group("the paper's").add_argument
  add("--T", type=number(int, 1, 100_000), default=1000, help="steps of the diffusion")
  add("--schedule", choices=("linear", "cosine", "quad", "const", "geometric"), default="linear",
      help="of the betas; linear is the paper's")
  add("--beta-1", type=float, default=1e-4, help="the first of them")
  add("--beta-T", type=float, default=0.02, help="the last of them")
  add("--sigma", choices=("beta", "beta_tilde"), default="beta", help="variance of the reverse steps (Section 3.2)")
  add("--predict", choices=("eps", "x0", "mu"), default="eps", help="what the network predicts (Table 2)")
  add("--loss", choices=("simple", "vlb"), default="simple", help="L_simple or the variational bound (Table 2)")
  add("--batch", type=number(int, 1, 2**20), help="images per step")
  add("--lr", type=number(float, 1e-12, 10), help="Adam's learning rate")
  add("--ema", type=number(float, 0, 1-1e-9), help="decay of the averaged weights")
  add("--no-flip", dest="flip", action="store_false", help="no random horizontal flips")
  add("--channels", type=number(int, 1, 2**14), help="of the first level")
  add("--channel-mult", type=ints, help="their factor at each level, such as 1,2,2")
  add("--num-res-blocks", type=number(int, 1, 100), help="residual blocks at each level")
  add("--attn", type=ints, help="resolutions with self-attention, such as 16,8")
  add("--dropout", type=number(float, 0, 0.999), help="probability")

  add = p.add_argument_group("the authors' code's, not in the paper").add_argument
  add("--warmup", type=number(int, 0, 10**9), help="steps over which the learning rate rises from 0")
  add("--clip", type=number(float, 1e-9, 1e9), default=1., help="largest norm of the gradient")
  add("--norm-groups", type=number(int, 1, 2**14), help="groups of GroupNorm")

  add = p.add_argument_group("not in the paper").add_argument
  add("--dtype", choices=DTYPES, default="float32",
      help="of activations and the operands of products; weights, average, Adam and the diffusion stay in float32")
  add("--tf32", action="store_true", default=False, help="NVIDIA: products of float32 in TF32, on tensor cores")
  add("--anneal", type=number(int, 0, 10**9),
      help="steps over which the learning rate falls to 0 in a straight line; 0: it does not (glyphs, mnist: the "
           "preset's steps, or --steps if more)")
  add("--times", choices=("uniform", "weighted"), default="uniform",
      help="how t is drawn: evenly, or as its weight in L_vlb: L_vlb is then less noisy, and L_simple weights the "
           "times as L_vlb does")
  add("--min-snr", type=number(float, 0, 1e30), metavar="GAMMA",
      help="weight the error of ε by min(SNR, GAMMA)/SNR, SNR = ᾱ_t/(1-ᾱ_t): more for the shape of samples, less for "
           "their finest detail; 0: no (glyphs, mnist: 5)")
  add("--dequantize", action="store_true", default=False,
      help="spread each of the 256 levels over its bin, for densities (evaluate.py --ode)")
  add("--clip-x0", action="store_true", default=False,
      help="count no error where clipping x̂_0 to [-1, 1] mends it, for densities")
  add("--class-conditional", action=argparse.BooleanOptionalAction, help="train with labels")
  add("--drop-labels", type=number(float, 0, 1), default=0.1,
      help="how often such a model is shown no label (its null class)")

  given = vars(p.parse_args(argv))
  a = argparse.Namespace(**PRESETS.get(given["dataset"], PRESETS["folder"]) | given)
  a.anneal_is_asked = "anneal" in given
  if a.anneal and not a.anneal_is_asked: a.anneal = max(a.anneal, a.steps)
  if "min_snr" not in given and (a.predict, a.loss, a.times) != ("eps", "simple", "uniform"): a.min_snr = 0
  if not a.channel_mult: p.error("--channel-mult needs one level or more, such as 1,2,2")
  if a.batch % (a.accum*a.gpus):
    p.error(f"--batch {a.batch} must be a multiple of --accum {a.accum} times --gpus {a.gpus}")
  if a.min_snr and (a.predict, a.loss) != ("eps", "simple"):
    p.error("--min-snr weights L_simple of ε: it goes with --predict eps and --loss simple")
  if a.dequantize and a.loss == "vlb": p.error("--dequantize goes with --loss simple: L_0 of L_vlb needs exact levels")
  if a.dequantize and a.clip_x0: p.error("--dequantize does not go with --clip-x0, which needs exact levels")
  if a.out == "runs/<dataset>": a.out = f"runs/{Path(a.dataset).name or 'folder'}"
  return a

def main(argv:list[str]|None=None):
  a = arguments(argv)
  device, out = open_device(a.tf32), Path(a.out)
  images, labels = load_images(a)
  N, C, H, W = images.shape
  null = int(labels.max())+1 if a.class_conditional else 0
  config, ddpm = network(a, C, H, null), DDPM(**diffusion(a))
  warn_if_clear(ddpm)
  state = State(config, open_devices(device, a.gpus), DTYPES[a.dtype])
  fixed = settings(a, config, images)
  with claim(out):
    begun, smooth = begin(state, a, out, fixed)
    curve = cut_log(out/"log.jsonl", begun)
    print(f"{a.dataset}: {N:,} images of {C}x{H}x{W}; {state.size:,} parameters; batch {a.batch}; "
          f"on {', '.join(state.devices)}; to {out}" + (f", from step {begun} on" if begun else ""), file=sys.stderr)
    if begun >= a.steps:
      print(f"{out} has {begun} steps already: --steps {a.steps} asks for no more", file=sys.stderr)
      return
    print("compiling the step (the first time some 20 s on two cores) ...", file=sys.stderr)
    step, show = make_step(state, ddpm, a), make_show(out, state, ddpm, a)
    seconds, spoken = 0., -math.inf
    with open(out/"log.jsonl", "a", buffering=1) as log, stoppable() as asked:
      for n in range(begun+1, a.steps+1):
        before = time.monotonic()
        x, t, eps, y, seeds = draw(a, images, labels, null, n)
        each, norm = take(step, state, a, n, x, t, eps, y, seeds)
        check_finite(n, each, norm, out)
        smooth += max(0.01, 1/n) * (float(each.mean()) - smooth)
        now = time.monotonic()
        if n > begun+1: seconds += (0.05 if seconds else 1) * (now-before - seconds)  # the first step compiles
        entry = entry_of(a, n, t, each, norm, smooth, a.batch/seconds if seconds else 0.)
        log.write(json.dumps(entry)+"\n")
        add_point(curve, (n, entry["loss"], smooth))
        if sys.stderr.isatty() or now-spoken > 10 or n == a.steps:
          say(entry, a.steps, seconds)
          spoken = now
        if a.sample_every and (n % a.sample_every == 0 or n == a.steps) and not asked: show(n)
        stop = bool(asked)
        if n % a.save_every == 0 or n == a.steps or stop:
          os.fsync(log.fileno())
          save(out, state, a, curve, fixed, n, smooth)
        if stop: break
    if asked:
      print(f"\nstopped at step {n} and saved: run the same command again to go on", file=sys.stderr)
      sys.exit(128 + asked[0])
    made = ("samples.png", "loss.png", "ema.safetensors")[0 if a.sample_every else 1:]
    print("done:", ", ".join(f"{out}/{name}" for name in made), file=sys.stderr)

if __name__ == "__main__": run(main)

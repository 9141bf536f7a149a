"""Algorithm 1: training. python train.py --dataset mnist   (--help; run it again to go on)

From top to bottom: what can be set; Algorithm 1's batch, loss and step; its loop; the command."""
from __future__ import annotations
import argparse, dataclasses, inspect, os, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
from tinygrad import Tensor, dtypes
import data, sample
from ddpm import CHOICES, DDPM
from engine import folder, hosts
from engine.batches import ahead
from engine.capture import captured, placed
from engine.device import open_device
from engine.state import State
from engine.streams import stream
from engine.terminal import field_flag, parser
from extras import objectives
from extras.guidance import trained
from files import checkpoint, pictures
from unet import DTYPES, UNet

def flag(default:Any, about:str, low:float=0, high:float=1e9, choices:tuple|None=None) -> Any:
  metadata = dict(help=about, low=low, high=high, choices=choices)
  return dataclasses.field(default=default, metadata=metadata)

@dataclasses.dataclass
class Config:
  """Everything that can be set; each field is a flag. What the paper sets is set as for CIFAR-10,
  but for flip: see PRESETS."""
  # the run
  dataset:str|None = flag("glyphs", "glyphs, mnist, fashion_mnist, cifar10 or folder, .zip, .npy")
  data_dir:str|None = flag(None, "where the dataset's files are; else $DATA_DIR, else downloaded")
  image_size:int|tuple|None = flag(None, "64 or 64x128 (height x width); else the images' own")
  fit:str = flag("crop", "how images of other shapes get there", choices=("crop", "pad", "stretch"))
  mode:str|None = flag(None, "gray or colour; else as the images are", choices=("gray", "rgb"))
  out:str = flag("runs/<dataset>", "the run's folder")
  init:str|None = flag(None, "a checkpoint whose network and weights to begin with")
  restart:bool = flag(False, "begin anew where --out holds a run already")
  change:bool = flag(False, "go on with another lr, batch, ema, anneal or min-snr")
  steps:int = flag(800_000, "optimizer steps in all", 1)
  seed:int = flag(0, "fixes every random number", 0, 2**31 - 1)
  accum:int = flag(1, "parts into which a batch is cut, to save memory", 1, 2**20)
  save_every:int = flag(1000, "steps between checkpoints", 1)
  keep_every:int = flag(0, "steps between averaged weights that are kept; 0: only the last ones")
  sample_every:int = flag(5000, "steps between grids of samples; 0: never")
  # the paper: Sections 2 to 4 and Appendix B
  T:int = flag(1000, "steps of the diffusion", 1, 100_000)
  schedule:str|tuple = flag("linear", "of betas; linear: the paper's", choices=CHOICES["schedule"])
  beta_1:float = flag(1e-4, "the first beta (not for cosine, const)", 1e-12, 1)
  beta_T:float = flag(0.02, "the last beta (not for cosine; geometric: 1 − SNR_t/SNR_{t-1})", 0, 1)
  sigma:str = flag("beta", "variance of p, Section 3.2, Table 2", choices=CHOICES["sigma"])
  predict:str = flag("eps", "what the network predicts, Section 3.2", choices=CHOICES["predict"])
  loss:str = flag("simple", "L_simple or the variational bound, Table 2", choices=("simple", "vlb"))
  batch:int = flag(128, "images per step", 1, 2**20)
  lr:float = flag(2e-4, "Adam's learning rate", 1e-12, 10)
  ema:float = flag(0.9999, "decay of the averaged weights", 0, 1 - 1e-9)
  flip:bool = flag(False, "mirror images left to right at random (Appendix B: not for bedrooms)")
  channels:int = flag(128, "of the first level", 1, 2**14)
  channel_mult:tuple = flag((1, 2, 2, 2), "their factor at each level, such as 1,2,2")
  num_res_blocks:int = flag(2, "residual blocks at each level", 1, 100)
  attn:tuple = flag((16,), "resolutions with self-attention, such as 16,8")
  dropout:float = flag(0.1, "probability", 0, 0.999)
  # the authors' code, not in the paper
  warmup:int = flag(5000, "steps over which the learning rate rises from 0")
  clip:float = flag(1.0, "largest norm of the gradient", 1e-9)
  norm_groups:int = flag(32, "groups of GroupNorm", 1, 2**14)
  # not in the paper
  dtype:str = flag("float32", "of activations and products", choices=tuple(DTYPES))
  tf32:bool = flag(False, "NVIDIA: products of float32 in TF32, on tensor cores")
  anneal:int = flag(0, "steps over which the learning rate falls to 0 in a line; 0: it does not")
  times:str = flag("uniform", "importance: t drawn where ∇ is large; weighted: counts as in L_vlb",
                   choices=("uniform", "importance", "weighted"))
  min_snr:float = flag(0.0, "weight the error by min(SNR, GAMMA)/SNR; 0: no", 0, 1e30)
  clip_x0:bool = flag(False, "no error where the clipped x̂_0 is exactly x_0: for likelihood")
  class_conditional:bool = flag(False, "train with labels")
  drop_labels:float = flag(0.1, "probability that an image's label is not shown", 0, 1)

# Defaults by dataset. Images up to 28x28 train in minutes on two cores: the first level is narrow,
# the network is told labels, min-SNR gives small t less weight, t is drawn more often where the
# gradient is large, and the learning rate falls to 0.
PRESETS:dict[str, dict] = {"cifar10": dict(flip=True)}
PRESETS["mnist"] = dict(
  steps=7500, batch=32, lr=4e-3, ema=0.998, channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
  attn=(7,), dropout=0.0, norm_groups=8, warmup=200, save_every=500, sample_every=1500, anneal=7500,
  times="importance", min_snr=1.0, class_conditional=True)
PRESETS["glyphs"] = PRESETS["mnist"] | dict(
  steps=2500, channel_mult=(1, 4), attn=(8,), anneal=2500, sample_every=500, min_snr=5.0)
PRESETS["fashion_mnist"] = PRESETS["mnist"] | dict(flip=True)
OTHERS = dict(steps=100_000, batch=32, channels=64, warmup=1000)

# *** Algorithm 1 ***
class Batch(NamedTuple):
  x:np.ndarray      # x_0 (B, C, H, W), uint8 or, of images of floats, in [-1, 1]
  t:np.ndarray      # (B,) int32
  eps:np.ndarray    # (B, C, H, W) float32
  y:np.ndarray      # labels (B,) int32; one more than the last class is "no class"
  seeds:np.ndarray  # of the dropout (B,) uint32

def draw(c:Config, images:np.ndarray, labels:np.ndarray, null:int, n:int,
         chances:np.ndarray|None=None) -> Batch:
  """Algorithm 1, lines 2-4, for step n (from 1): it depends on (seed, n) alone. Not in the paper:
  chances, how often each t is drawn; null, "no class", put on some images for guidance."""
  x, y = data.batch_at(images, labels, n-1, c.batch, c.seed, c.flip)  # x₀ ~ q(x₀)
  rng = stream(c.seed, "training step", n)
  t = rng.integers(1, c.T+1, c.batch, np.int32)                       # t ~ Uniform({1, …, T})
  eps = rng.standard_normal(x.shape, np.float32)                      # ε ~ N(0, I)
  if chances is not None: t = objectives.weighted_times(chances, c.batch, rng)
  y = np.where(rng.random(c.batch) < c.drop_labels, null, y).astype(np.int32)
  return Batch(x, t, eps, y, rng.integers(0, 2**32, c.batch, np.uint32))

def make_loss(ddpm:DDPM, c:Config) -> Callable[..., Tensor]:
  """loss(model, x, t, ε, y[, seeds of the dropout]) of each example, (B,): line 5, Eq. 14."""
  weights = objectives.time_weights(ddpm, c)
  def loss(model:Callable, x:Tensor, t:Tensor, eps:Tensor, y:Tensor, *seeds:Tensor) -> Tensor:
    x0 = x if dtypes.is_float(x.dtype) else x.cast(dtypes.float32) / 127.5 - 1  # Section 3.3
    x_t = ddpm.q_sample(x0, t, eps)                           # √ᾱₜ x₀ + √(1−ᾱₜ) ε
    given = (y,) if c.class_conditional else ()
    seeded = isinstance(model, UNet) and "seed" in inspect.signature(model).parameters
    out = model(x_t, t, *given, **({"seed": seeds[0]} if seeds and seeded else {}))
    if c.clip_x0: out = objectives.without_clipped(ddpm, x0, x_t, t, eps, out)
    if c.loss == "simple": each = ddpm.squared_error(x0, x_t, t, eps, out)  # ‖ε − ε_θ(xₜ, t)‖²
    else: each = ddpm.vlb_term(x0, x_t, t, out, clip=False)   # Σₜ Lₜ₋₁ / T on average
    return each if weights is None else each * weights.to(t.device)[t]
  return loss

def rates(c:Config, n:int) -> list[float]:
  """Learning rate, Adam's two corrections and the decay of the average at step n (from 1)."""
  lr = c.lr * min(1, n / max(c.warmup, 1))                    # the authors' code
  if c.anneal: lr *= max(0, 1 - (n-1) / c.anneal)             # not in the paper
  decay = min(c.ema, (1+n) / (10+n))  # not in the paper: the initial weights fade sooner
  return [lr, 1 - BETA1**n, 1 - BETA2**n, decay]

BETA1, BETA2 = 0.9, 0.999  # Adam's β₁ and β₂, not the schedule's

def make_update(state:State, c:Config) -> Callable[[Tensor], Tensor]:
  """update(rates) takes the gradient step of Algorithm 1, line 5, and returns ‖∇_θ L‖."""
  grad, m, v, w, e = [state.flat[k] for k in ("grad", "m", "v", "raw", "ema")]
  def update(rates:Tensor) -> Tensor:
    lr, correct1, correct2, decay = [rates[i] for i in range(4)]
    norm = grad.square().reshape(4096, -1).sum(1).sum().sqrt()  # one float32 sum would drift
    g = grad * (c.clip / norm.maximum(c.clip))                # clipping: the authors' code
    m.assign(m + (1 - BETA1) * (g - m))                       # m ← β₁ m + (1−β₁) g
    v.assign(v + (1 - BETA2) * (g * g - v))                   # v ← β₂ v + (1−β₂) g²
    w.assign(w - lr * (m / correct1) / ((v / correct2).sqrt() + 1e-8))  # θ ← θ − lr m̂/(√v̂ + 10⁻⁸)
    e.assign(e + (1 - decay) * (w - e))                       # EMA: θ̄ ← d θ̄ + (1−d) θ
    low = [state.flat["low"].assign(w.cast(state.dtype))] if "low" in state.flat else []
    Tensor.realize(norm, m, v, w, e, *low)
    return norm
  return captured(update)

# *** a run ***
def fit(config:Config, images:Any, labels:np.ndarray|None=None, model:Any=None) -> Path:
  """Algorithm 1: trains a network on images and returns the run's folder. Called again, it resumes.
  On Ctrl-C or SIGTERM it ends the step, saves, and raises KeyboardInterrupt or SystemExit.

  images: what `data.read` takes: a name, a path, or an array (N, C, H, W) with its labels (N,).
  model: any object with tensors as attributes, called as model(x_t, t), or as model(x_t, t, y) with
  class_conditional; of K classes y = K is "no class". Without one it is config's U-Net."""
  name = str(images) if isinstance(images, str | os.PathLike) else None
  c = dataclasses.replace(config, dataset=name, out=folder.place(config.out, name))
  objectives.check(c)
  open_device(c.tf32)
  hosts.share(c.batch, c.accum)
  multiple = 2**(len(c.channel_mult) - 1) if model is None else 1
  how:dict[str, Any] = {"size": c.image_size, "fit": c.fit, "mode": c.mode, "multiple": multiple}
  found, out = data.read(images, "train", c.data_dir, labels=labels, **how), Path(c.out)
  classes = found.classes if c.class_conditional else []
  ddpm = DDPM(**{k: getattr(c, k) for k in DIFFUSION})
  net = UNet(**network(c, found.images.shape, len(classes))) if model is None else model
  objectives.check_data(c, net, found)
  about = description(c, net, found, classes) | {"how": how}
  state, null = State(net, DTYPES[c.dtype]), len(found.classes)
  fixed = folder.settings(c, about.get("unet"), found)
  with folder.claim(out):
    begun, smooth = folder.begin(c, state, fixed)
    folder.introduce(c, state, found, begun, float(ddpm.alpha_bar[-1]))
    if begun >= c.steps: return out
    loss, update = make_loss(ddpm, c), make_update(state, c)
    show = make_show(c, ddpm, state, found.images.shape[1:], trained(len(classes), about))
    chances = objectives.chances(ddpm, c.min_snr, c.times)[1] if c.times != "uniform" else None
    held_out = objectives.held_out(c, null, how, chances)
    with folder.Record(c, state, loss, held_out, show, about, fixed, begun, smooth) as record:
      def drawn(n:int) -> Batch: return draw(c, found.images, found.labels, null, n, chances)
      for n, batch in ahead(drawn, range(begun + 1, c.steps + 1)):       # 1: repeat; 2-4: x₀, t, ε
        each = state.gradient(loss, batch, c.accum)                      # 5: ∇_θ ‖ε − ε_θ(xₜ, t)‖²
        rate = rates(c, n)                                               #    and a step against it
        norm = float(update(placed(np.array(rate, np.float32), state.device)).numpy())
        if record.step(n, batch.t, each, norm, rate[0]): break           # 6: until converged
  return out

DIFFUSION = ("T", "beta_1", "beta_T", "schedule", "sigma", "predict")  # the arguments of DDPM
NETWORK = {"attn": "attn_resolutions"} | {k: k for k in (              # and some of UNet
  "channels", "channel_mult", "num_res_blocks", "dropout", "norm_groups")}

def network(c:Config, shape:tuple[int, ...], classes:int) -> dict:
  """The arguments of `UNet` for images of a shape (N, C, H, W). What c does not set is --init's."""
  _, C, H, W = shape
  more = checkpoint.load(folder.origin(c.out, c.init, c.restart))[0].config if c.init else {}
  return more | {theirs: getattr(c, ours) for ours, theirs in NETWORK.items()} | dict(
    in_channels=C, image_size=H if H == W else (H, W), num_classes=classes, seed=c.seed,
    out_channels=2*C if c.sigma == "learned" else None)

def description(c:Config, net:Any, found:data.Dataset, classes:list[str]) -> dict:
  """What a checkpoint says of itself."""
  about = {"ddpm": {k: getattr(c, k) for k in DIFFUSION}, "dataset": c.dataset,
           "limits": found.limits, "span": found.span, "classes": classes,
           "untrained": np.setdiff1d(range(len(classes)), found.labels).tolist(),
           "null_class": not c.class_conditional or c.drop_labels > 0}  # is "no class" known?
  return about | ({"unet": net.config} if type(net) is UNet else {})

def make_show(c:Config, ddpm:DDPM, state:State, shape:tuple[int, ...],
              classes:np.ndarray) -> Callable[[int], None]:
  """show(step) draws 36 images with the averaged weights, from the same x_T each time, by DDIM in
  50 steps: a twentieth of the paper's 1000."""
  x_T, jits = sample.draw_x_T(36, shape, c.seed), dict[tuple, Callable]()
  y = [Tensor(np.resize(classes, 36)).realize()] if len(classes) else []  # each class in turn
  def model(x:Tensor, t:Tensor) -> Tensor: return state.average(x, t, *y)
  def show(step:int):
    *_, (_, x0, _) = sample.SAMPLERS["ddim"](ddpm, model, x_T, min(50, c.T), c.seed, jits=jits)
    images = data.to_uint8(x0.numpy())
    for path in (Path(c.out, "samples.png"), Path(c.out, "samples", f"{step:06d}.png")):
      pictures.save_png(path, pictures.grid(images))
    if sys.stdout.isatty(): print(pictures.to_terminal(images[:8]))
  return show

# *** the command ***
def arguments(argv:list[str]|None=None) -> Config:
  """The command line, filled up from --init's checkpoint and from the dataset's preset."""
  p = parser("train.py", "Train a DDPM (Algorithm 1). Run again to resume. Defaults: the dataset's "
             "preset, else the paper's (in brackets).", argument_default=argparse.SUPPRESS)
  for f in dataclasses.fields(Config): field_flag(p, f.name, str(f.type), f.default, **f.metadata)
  given = vars(p.parse_args(argv))
  source = given.get("dataset", "glyphs")
  preset = PRESETS.get(source, OTHERS) | {"out": folder.place(Config.out, source)}
  if given.get("init"): preset |= of_checkpoint(preset | given, given)
  c = Config(**preset | given)
  return dataclasses.replace(c, **folder.own(c, given, preset))

def of_checkpoint(c:dict, given:dict) -> dict:
  """The network and the diffusion of --init's checkpoint. Says where the flags `given` differ."""
  open_device(given.get("tf32", False), silent=True)
  net, meta = checkpoint.load(folder.origin(c["out"], c["init"], c.get("restart", False)))
  checkpoint.diffusion(meta, c["init"])  # refuses what DDPM does not know
  found = {ours: net.config[theirs] for ours, theirs in NETWORK.items()} | meta.get("ddpm", {})
  if found.get("schedule") == "cosine": found |= dict(beta_1=1e-4, beta_T=0.02)  # unused
  found = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
  for k in [k for k in found if given.get(k, found[k]) != found[k]]:
    print(f"{given['init']} has {k} = {found[k]}; here it is {given[k]}", file=sys.stderr)
  return found

def main(argv:list[str]|None=None):
  c = arguments(argv)
  out = fit(c, c.dataset)
  made = [name for name in ("samples.png", "loss.png", "ema.safetensors") if (out/name).exists()]
  print("done:", ", ".join(f"{out}/{name}" for name in made), file=sys.stderr)

if __name__ == "__main__": hosts.run(main)

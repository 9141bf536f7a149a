"""Algorithm 1: training. python train.py --dataset mnist   (see --help; run it again to go on where it stopped)"""
import argparse, functools, itertools, json, math, pathlib, signal, sys, time, zlib
import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes, nn
import data, sample, unet
from ddpm import DDPM

# What differs by dataset. cifar10 is the paper's Appendix B; the others are sized for two CPU cores.
PRESETS = {
  "glyphs":  dict(steps=2000,    batch=32,  lr=1e-3, ema=0.999,  channels=32,  channel_mult=(1, 2),
                  num_res_blocks=1, attn=(8,),  dropout=0.,  norm_groups=8,
                  warmup=200,  save_every=500,  sample_every=1000, flip=False),
  "mnist":   dict(steps=4000,    batch=32,  lr=1e-3, ema=0.999,  channels=32,  channel_mult=(1, 2, 2),
                  num_res_blocks=1, attn=(7,),  dropout=0.,  norm_groups=8,
                  warmup=200,  save_every=500,  sample_every=1000, flip=False),
  "cifar10": dict(steps=800_000, batch=128, lr=2e-4, ema=0.9999, channels=128, channel_mult=(1, 2, 2, 2),
                  num_res_blocks=2, attn=(16,), dropout=0.1, norm_groups=32,
                  warmup=5000, save_every=1000, sample_every=5000, flip=True)}
PRESETS["fashion_mnist"] = PRESETS["mnist"] | dict(flip=True)
PRESETS["folder"] = PRESETS["cifar10"] | dict(steps=100_000, batch=32, channels=64, warmup=1000)

def arguments(argv:list[str]|None) -> argparse.Namespace:
  """The command line, filled up from the dataset's preset.

  ValueError, in one sentence, for a value out of its range."""
  def ints(s:str) -> tuple[int, ...]: return tuple(int(v) for v in s.split(",") if v)
  p = argparse.ArgumentParser(
    description="Train a DDPM (Algorithm 1). Each default comes from the dataset's preset; run again to resume.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS)
  p.add_argument("--dataset", default="glyphs", help="glyphs, mnist, fashion_mnist, cifar10 or a folder of images")
  p.add_argument("--data-dir", help="where the dataset's files are; else $DATA_DIR, else downloaded", default=None)
  p.add_argument("--out", help="the run's folder", default="runs/<dataset>")
  p.add_argument("--init", help="a checkpoint whose weights to begin with, of the same network", default=None)
  p.add_argument("--restart", action="store_true", help="begin anew where --out holds a run already", default=False)
  p.add_argument("--steps", type=int, help="optimizer steps in all")
  p.add_argument("--batch", type=int, help="images per step")
  p.add_argument("--accum", type=int, help="parts into which a batch is cut to save memory", default=1)
  p.add_argument("--gpus", type=int, help="devices that share a batch", default=1)
  p.add_argument("--lr", type=float, help="Adam's learning rate")
  p.add_argument("--warmup", type=int, help="steps over which it rises from 0 (not in the paper, but in its code)")
  p.add_argument("--anneal", type=int, help="steps over which it falls to 0 in a straight line (not in the paper)",
                 default=0)
  p.add_argument("--clip", type=float, help="largest norm of the gradient (not in the paper, but in its code)",
                 default=1.0)
  p.add_argument("--ema", type=float, help="decay of the averaged weights")
  p.add_argument("--seed", type=int, help="fixes every random number", default=0)
  p.add_argument("--T", type=int, help="steps of the diffusion", default=1000)
  p.add_argument("--schedule", choices=("linear", "cosine", "quad", "const"), help="of the betas", default="linear")
  p.add_argument("--beta-1", type=float, help="the first of them", default=1e-4)
  p.add_argument("--beta-T", type=float, help="the last of them", default=0.02)
  p.add_argument("--predict", choices=("eps", "x0", "mu"), help="what the network predicts (Table 2)", default="eps")
  p.add_argument("--loss", choices=("simple", "vlb"), help="L_simple or the variational bound (Table 2)",
                 default="simple")
  p.add_argument("--times", choices=("uniform", "weighted"), default="uniform",
                 help="how t is drawn: evenly, or as its weight in L_vlb (not in the paper): L_vlb is then less noisy, "
                      "and L_simple weights the times as L_vlb does")
  p.add_argument("--min-snr", type=float, metavar="GAMMA", default=0,
                 help="weight the error of ε by min(SNR, GAMMA)/SNR, SNR = ᾱ_t/(1-ᾱ_t): more for the shape of samples, "
                      "less for their finest detail; 0: no (not in the paper)")
  p.add_argument("--dequantize", action="store_true", default=False,
                 help="spread each of the 256 levels over its bin, for densities (evaluate.py --ode; not in the paper)")
  p.add_argument("--clip-x0", action="store_true", default=False,
                 help="count no error where clipping x̂_0 to [-1, 1] mends it, for densities (not in the paper)")
  p.add_argument("--sigma", choices=("beta", "beta_tilde"), help="variance of the reverse steps (Section 3.2)",
                 default="beta")
  p.add_argument("--channels", type=int, help="of the first level")
  p.add_argument("--channel-mult", type=ints, help="their factor at each level, such as 1,2,2")
  p.add_argument("--num-res-blocks", type=int, help="residual blocks at each level")
  p.add_argument("--attn", type=ints, help="resolutions with self-attention, such as 16,8")
  p.add_argument("--norm-groups", type=int, help="groups of GroupNorm")
  p.add_argument("--dropout", type=float, help="probability")
  p.add_argument("--no-flip", dest="flip", action="store_false", help="no random horizontal flips")
  p.add_argument("--class-conditional", action="store_true", help="train with labels", default=False)
  p.add_argument("--drop-labels", type=float, help="how often such a model is shown no label (its null class)",
                 default=0.1)
  p.add_argument("--save-every", type=int, help="steps between checkpoints")
  p.add_argument("--sample-every", type=int, help="steps between grids of samples; 0: never")
  given = vars(p.parse_args(argv))
  a = argparse.Namespace(**PRESETS.get(given["dataset"], PRESETS["folder"]) | given)
  for flag, low, high in (
      ("steps", 1, 10**9), ("batch", 1, 2**20), ("accum", 1, 2**20), ("gpus", 1, 1024), ("warmup", 0, 10**9),
      ("anneal", 0, 10**9),
      ("seed", 0, 2**31-1), ("T", 1, 100_000), ("channels", 1, 2**14), ("num_res_blocks", 1, 100),
      ("norm_groups", 1, 2**14), ("save_every", 1, 10**9), ("sample_every", 0, 10**9)):
    if not low <= getattr(a, flag) <= high:
      raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)} is out of range: "
                       f"it must lie in {low}..{high}")
  for flag, ok, want in (("lr", 0 < a.lr < 10, "above 0 and below 10"),
                         ("clip", 0 < a.clip < math.inf, "above 0"),
                         ("ema", 0 <= a.ema < 1, "from 0 up to below 1"),
                         ("dropout", 0 <= a.dropout < 1, "from 0 up to below 1"),
                         ("min_snr", 0 <= a.min_snr < math.inf, "0 or more"),
                         ("drop_labels", 0 <= a.drop_labels <= 1, "from 0 to 1")):
    if not ok: raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)} is out of range: it must be {want}")
  for flag, least in (("channel_mult", 1), ("attn", 0)):
    if len(getattr(a, flag)) < least or any(v < 1 for v in getattr(a, flag)):
      raise ValueError(f"--{flag.replace('_', '-')} needs whole numbers from 1 up, such as 1,2,2")
  if a.min_snr and (a.predict, a.loss) != ("eps", "simple"):
    raise ValueError("--min-snr weights L_simple of ε: it goes with --predict eps and --loss simple")
  if a.batch % (a.accum*a.gpus):
    raise ValueError(f"--batch {a.batch} must be a multiple of --accum {a.accum} times --gpus {a.gpus}")
  if a.out == "runs/<dataset>": a.out = f"runs/{pathlib.Path(a.dataset).name or 'folder'}"
  return a

# ***** the step *****

class State:
  """Weights, their average (EMA) and Adam's two moments, each one flat buffer.

  So a handful of kernels update all parameters at once. The two networks' weights are views into the buffers, so
  nothing is copied and the average is never an alias of the weights."""
  def __init__(self, config:dict, devices:tuple[str, ...]):
    self.model, self.average = unet.UNet(**config), unet.UNet(**config)
    self.shapes = {k: v.shape for k, v in nn.state.get_state_dict(self.model).items()}
    self.size = sum(math.prod(s) for s in self.shapes.values())
    flat = np.concatenate([v.numpy().reshape(-1) for v in nn.state.get_state_dict(self.model).values()])
    self.flat = {k: np.zeros(self.size + -self.size % 4096, np.float32) for k in ("raw", "ema", "m", "v", "grad")}
    self.flat["raw"][:self.size] = self.flat["ema"][:self.size] = flat
    self.devices = devices
    self.put(self.flat)

  def put(self, arrays:dict[str, np.ndarray]):
    self.flat = {k: self.lay(v, axis=None).realize() for k, v in arrays.items()}
    for model, key in ((self.model, "raw"), (self.average, "ema")):
      for p, view in zip(nn.state.get_parameters(model), self.views(key)): p.replace(view)

  def lay(self, array:np.ndarray, axis:int|None=0) -> Tensor:
    """On the device or, cut along `axis` (or whole, for None), on all devices."""
    t = Tensor(array, device=self.devices[0])
    return t if len(self.devices) == 1 else t.shard(self.devices, axis)

  def cut(self, flat) -> dict:
    """A flat buffer's part for each parameter, by name."""
    ends = itertools.accumulate(map(math.prod, self.shapes.values()))
    return {k: flat[end-math.prod(s):end].reshape(s) for (k, s), end in zip(self.shapes.items(), ends)}

  def begin(self, path):
    """Takes the weights of a checkpoint, and for their average as well. ValueError if it is another network's."""
    given = {k: v.numpy() for k, v in nn.state.get_state_dict(unet.load(path)[0]).items()}
    if {k: v.shape for k, v in given.items()} != self.shapes:
      raise ValueError(f"--init {path} is another network than this one")
    zeros = np.zeros(self.size, np.float32)
    self.restore({f"{key}.{k}": v for key in ("raw", "ema") for k, v in given.items()}
                 | {"adam.m": zeros, "adam.v": zeros}, path)

  def views(self, key:str) -> list[Tensor]: return list(self.cut(self.flat[key]).values())

  def fetch(self, t:Tensor) -> np.ndarray: return (t if len(self.devices) == 1 else t.to(self.devices[0])).numpy()

  def arrays(self) -> dict[str, np.ndarray]:
    """For the checkpoint: the weights by name, the moments flat."""
    flat = {k: self.fetch(t)[:self.size] for k, t in self.flat.items()}
    named = {f"{key}.{k}": v for key in ("raw", "ema") for k, v in self.cut(flat[key]).items()}
    return named | {"adam.m": flat["m"], "adam.v": flat["v"]}

  def restore(self, tensors:dict[str, np.ndarray], path):
    want = {f"{key}.{k}": s for key in ("raw", "ema") for k, s in self.shapes.items()} | {
      "adam.m": (self.size,), "adam.v": (self.size,)}
    if {k: v.shape for k, v in tensors.items()} != want:
      raise ValueError(f"{path} does not hold the state of this network: use --restart to begin anew")
    if any(not np.isfinite(v).all() for v in tensors.values()):
      raise ValueError(f"{path} holds numbers that are not finite: use --restart to begin anew")
    pad = np.zeros(-self.size % 4096, np.float32)
    flat = {key: np.concatenate([*(tensors[f"{key}.{k}"].reshape(-1) for k in self.shapes), pad])
            for key in ("raw", "ema")}
    self.put(flat | {k: np.concatenate([tensors[f"adam.{k}"], pad]) for k in ("m", "v")}
                  | {"grad": np.zeros(self.size+len(pad), np.float32)})

def make_step(state:State, ddpm:DDPM, a:argparse.Namespace):
  """Algorithm 1, lines 2-5, as one graph.

  step(x, t, eps, y, seed, h) -> (loss of each example (B/accum,), norm of the gradient)."""
  # in two stages: a float32 sum of millions would drift
  def total(v:Tensor) -> Tensor: return v.reshape(-1, 4096).sum(0).sum()
  share = None  # what the loss of time t counts for, if not 1
  if a.times == "weighted":  # the share that it should have over the share drawn
    weight, drawn = chances(a.T, a.beta_1, a.beta_T, a.schedule, a.min_snr)
    share = (weight if a.loss == "simple" else 1/a.T) / drawn.clip(1e-12)
  elif a.min_snr: share = min_snr_weight(ddpm, a.min_snr)
  if share is not None: share = Tensor(share.astype(np.float32), device=state.devices[0]).realize()

  @TinyJit
  def step(x:Tensor, t:Tensor, eps:Tensor, y:Tensor, seed:Tensor, h:Tensor) -> tuple[Tensor, Tensor]:
    keep, last, lr, c1, c2, decay = [h[i] for i in range(6)]
    x0 = x.cast(dtypes.float32) / 127.5 - 1
    def model(x_t, t):
      out = state.model(x_t, t, y if a.class_conditional else None, seed if a.dropout else None)
      if not a.clip_x0: return out
      # Clipping brings an x̂_0 beyond ±1 to an x_0 at ±1: no error is left. Any other is seen unclipped: the gradient
      # of a clipped one is 0.
      exact = (ddpm.predict_x0(x_t, t, out).clip(-1, 1) - x0).abs() < 1e-5
      return exact.where(ddpm.target(x0, x_t, t, eps), out)
    if a.loss == "simple": loss = ddpm.loss_terms(model, x0, t, eps)
    else: loss = ddpm.vlb_term(model, x0, t, eps, clip=False)  # an estimate of Σₜ Lₜ₋₁ / T, in either case:
    if share is not None: loss = loss * share.to(t.device)[t]
    grad = state.flat["grad"]
    for view, g in zip(state.views("grad"), loss.mean().gradient(*nn.state.get_parameters(state.model))):
      view.assign(view * keep + g.reshape(view.shape) / a.accum if a.accum > 1 else g.reshape(view.shape))
    # gradient clipping: not in the paper, but in the authors' code
    norm = total(grad.square()).sqrt()
    g = grad * (a.clip / norm.maximum(a.clip))
    # Adam; `last` is 0 for all but the last part of a batch
    m, v, w, e = [state.flat[k] for k in ("m", "v", "raw", "ema")]
    m.assign(m + last * 0.1 * (g - m))          # m ← β₁ m + (1−β₁) g
    v.assign(v + last * 0.001 * (g * g - v))    # v ← β₂ v + (1−β₂) g²
    # θ ← θ − lr m̂/(√v̂ + 1e-8), m̂ = m/(1−β₁ⁿ), v̂ = v/(1−β₂ⁿ)
    w.assign(w - last * lr * (m / c1) / ((v / c2).sqrt() + 1e-8))
    e.assign(e + last * (1 - decay) * (w - e))  # EMA
    Tensor.realize(loss, norm, m, v, w, e, grad)
    return loss, norm
  step.cnt = 1  # everything is realized already, so the first call can be the one that is captured
  return step

def min_snr_weight(ddpm:DDPM, gamma:float) -> np.ndarray:
  """min(SNR, γ)/SNR of each t, SNR = ᾱ_t/(1−ᾱ_t): Hang et al. 2023 (arXiv:2303.09556), not in the paper."""
  return np.minimum(1, gamma * (1-ddpm.alpha_bar) / ddpm.alpha_bar)

@functools.cache
def chances(T:int, beta_1:float, beta_T:float, schedule:str, min_snr:float=0) -> tuple[np.ndarray, np.ndarray]:
  """Each t's weight in Eq. 12 with σ_t² = β_t, β_t/(2 α_t (1−ᾱ_t)), and how often --times weighted draws it; sums: 1.

  Not in the paper. Drawn evenly, t = 1, with up to half of the bound, would come once in T. Drawn as the weights, a
  third would be times at which nothing of x_0 is left, and ε easy: where ᾱ_t < 1−ᾱ_t, √(ᾱ_t/(1−ᾱ_t)) as many are
  drawn, and count for more. min_snr = γ makes the weight min(SNR, γ)/SNR of that, and as at the other end its root as
  many are drawn. Row 0 is not drawn."""
  d = DDPM(T, beta_1, beta_T, schedule)
  weight = np.append(0, d.beta[1:] / (d.alpha[1:] * (1 - d.alpha_bar[1:])))
  clear = min_snr_weight(d, min_snr) if min_snr else 1
  drawn = weight * np.sqrt(np.minimum(1, d.alpha_bar / (1 - d.alpha_bar).clip(1e-12)) * clear)
  weight = weight * clear
  return weight / weight.sum(), drawn / drawn.sum()

def draw(a:argparse.Namespace, images:np.ndarray, labels:np.ndarray, null:int, n:int):
  """What step n (from 1) needs, from (seed, n) alone: images, t, eps, labels and the seed of the dropout."""
  x, y = data.batch_at(images, labels, n-1, a.batch, a.seed, a.flip)
  rng = np.random.default_rng([a.seed, 1, n])
  t, eps = rng.integers(1, a.T+1, a.batch, np.int32), rng.standard_normal(x.shape, np.float32)
  if a.times == "weighted":
    at = (rng.random() + np.arange(a.batch)) / a.batch  # one from each of equal strata
    p = chances(a.T, a.beta_1, a.beta_T, a.schedule, a.min_snr)[1]
    t = rng.permutation(np.searchsorted(p.cumsum(), at, "right").clip(1, a.T)).astype(np.int32)
  if a.dequantize: x = x + (rng.random(x.shape, np.float32) - 0.5)
  # classifier-free guidance needs a network that knows "no class" as well
  y = np.where(rng.random(a.batch) < a.drop_labels, null, y).astype(np.int32)
  return x, t, eps, y, rng.integers(0, 2**32, (a.accum, 1), np.uint32)

def hyper(a:argparse.Namespace, n:int) -> list[float]:
  """Learning rate, Adam's two corrections and the decay of the average at step n (from 1)."""
  decay = min(a.ema, (1+n) / (10+n))  # not in the paper: a young average must forget the initialisation
  left = max(0, 1 - (n-1)/a.anneal) if a.anneal else 1
  return [a.lr * min(1, n/max(a.warmup, 1)) * left, 1-0.9**n, 1-0.999**n, decay]

# ***** the run *****

def settings(a:argparse.Namespace, config:dict, images:np.ndarray) -> dict:
  """All that fixes the numbers of a run. A run goes on only with the same."""
  keys = ("dataset", "batch", "accum", "lr", "warmup", "clip", "ema", "seed",
          "T", "beta_1", "beta_T", "schedule", "predict", "loss", "times", "min_snr", "dequantize", "clip_x0", "sigma",
          "flip", "class_conditional", "drop_labels", "init", "anneal")
  return {k: getattr(a, k) for k in keys} | {
    "network": json.loads(json.dumps(config)), "images": list(images.shape), "data": zlib.crc32(images.tobytes())}

def read_log(path:pathlib.Path, step:int) -> list[dict]:
  """The lines of the log up to `step`; what a killed run wrote beyond its last checkpoint is dropped."""
  lines = []
  try:
    for line in path.read_text().splitlines():
      if (entry := json.loads(line))["step"] <= step: lines.append(entry)
  except (ValueError, KeyError, TypeError): pass  # the last line may be cut off
  except OSError: pass
  return lines

def draw_curve(path:pathlib.Path, log:list[dict]):
  steps, smooth = [e["step"] for e in log], [e["smooth"] for e in log]
  data.save_png(path, data.plot({"loss": (steps, [e["loss"] for e in log]), "smoothed": (steps, smooth)},
                                "Training loss", "step", "loss", log_y=True))

def main(argv:list[str]|None=None):
  a = arguments(argv)
  device = unet.device()
  images, labels = data.load(a.dataset, "train", a.data_dir)
  N, C, H, W = images.shape
  if H != W: raise ValueError(f"images of {H}x{W} are not square")
  classes = int(labels.max())+1 if a.class_conditional else 0
  config = dict(in_channels=C, channels=a.channels, channel_mult=a.channel_mult, num_res_blocks=a.num_res_blocks,
                attn_resolutions=a.attn, dropout=a.dropout, image_size=H, norm_groups=a.norm_groups,
                num_classes=classes, seed=a.seed)
  ddpm_args = dict(T=a.T, beta_1=a.beta_1, beta_T=a.beta_T, schedule=a.schedule, sigma=a.sigma, predict=a.predict)
  ddpm, out = DDPM(**ddpm_args), pathlib.Path(a.out)
  if ddpm.alpha_bar[-1] > 1e-2:
    print(f"train.py: warning: with T = {a.T} the last x_T still holds {ddpm.alpha_bar[-1]**.5:.0%} of the image, "
          "but sampling starts from pure noise", file=sys.stderr)
  devices = (device,) if a.gpus == 1 else tuple(f"{device.split(':')[0]}:{i}" for i in range(a.gpus))
  try:
    for d in devices: Device[d]
  except Exception as e: raise ValueError(f"--gpus {a.gpus}: there is no device {d}") from e

  # start, or go on
  fixed, begun, smooth = settings(a, config, images), 0, None
  last = out/"last.safetensors"
  state = State(config, devices)
  if last.exists() and not a.restart:
    tensors, metadata = unet.read_tensors(last)
    try:
      meta = json.loads(metadata["ddpm"])
      begun, smooth, before = int(meta["step"]), float(meta["smooth"]), dict(meta["train"])
    except (KeyError, ValueError, TypeError, RecursionError):
      raise ValueError(f"{last} is not the state of a run: use --restart to begin anew") from None
    default = vars(arguments(["--dataset", a.dataset]))  # of a flag that is younger than the run
    for k, v in fixed.items():
      if (was := before.get(k, default.get(k))) != v:
        raise ValueError(f"{out} was trained with {k} = {was}, not {v}: "
                         "use the same, another --out, or --restart to begin anew")
    state.restore(tensors, last)
    print(f"going on from step {begun} of {out}", file=sys.stderr)
  elif a.init: state.begin(unet.find_checkpoint(a.init))
  try: out.mkdir(parents=True, exist_ok=True)
  except OSError as e: raise OSError(f"cannot write to --out {out}: {e.strerror or e}") from e
  log = read_log(out/"log.jsonl", begun)
  with data.atomic(out/"log.jsonl") as f: f.write("".join(json.dumps(e)+"\n" for e in log).encode())
  parameters = f"{state.size:,} parameters"
  print(f"{a.dataset}: {N:,} images of {C}x{H}x{W}; {parameters}; batch {a.batch}; on {', '.join(devices)}; to {out}",
        file=sys.stderr)
  if begun >= a.steps:
    return print(f"{out} has {begun} steps already: --steps {a.steps} asks for no more", file=sys.stderr)

  # the same latents each time, so that pictures compare;
  # DDIM with 50 steps (not in the paper) takes a 20th of Algorithm 2's time
  shown = max(1, 36//a.gpus) * a.gpus
  x_T = state.lay(sample.draw_x_T(shown, (C, H, W), a.seed).numpy()).realize()
  null, jits = state.lay(np.full(shown, classes, np.int32)).realize() if classes else None, {}

  def save(step:int):
    meta = {"ddpm": ddpm_args, "dataset": a.dataset, "step": step}
    draw_curve(out/"loss.png", log)
    arrays = state.arrays()
    unet.write_tensors(out/"ema.safetensors", {k[4:]: v for k, v in arrays.items() if k.startswith("ema.")},
                       meta | {"unet": config})
    # last of all, so that a run stopped in between makes the others anew
    unet.write_tensors(last, arrays, meta | {"unet": config, "train": fixed, "smooth": smooth})
  def show(step:int):
    for _, _, x0 in sample.SAMPLERS["ddim"](ddpm, lambda x, t: state.average(x, t, null), x_T,
                                            min(50, a.T), a.seed, jits=jits): pass
    grid = data.to_uint8(state.fetch(x0))
    for path in (out/"samples.png", out/"samples"/f"{step:06d}.png"): data.save_png(path, data.grid(grid))
    if sys.stdout.isatty(): print(data.to_terminal(grid[:8]))

  stop:list[int] = []
  def interrupt(*_):
    stop.append(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
  signal.signal(signal.SIGINT, interrupt)

  step, tty = make_step(state, ddpm, a), sys.stderr.isatty()
  print("compiling the step (the first time about a minute on two cores) ...", file=sys.stderr)
  seconds, spoken, n, part = None, 0., begun, a.batch//a.accum
  with open(out/"log.jsonl", "a", buffering=1) as f:
    while n < a.steps and not stop:
      n, clock = n+1, time.monotonic()
      x, t, eps, y, seeds = draw(a, images, labels, classes, n)
      each = np.zeros(a.batch, np.float32)
      for k in range(a.accum):
        cut, h = slice(k*part, (k+1)*part), np.array([float(k > 0), float(k == a.accum-1), *hyper(a, n)], np.float32)
        loss, norm = step(*(state.lay(v[cut]).realize() for v in (x, t, eps, y)),
                          state.lay(seeds[k], None).realize(), state.lay(h, None).realize())
        each[cut] = state.fetch(loss)
      loss, norm = float(each.mean()), float(state.fetch(norm))
      if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(f"at step {n} the loss is {loss} and the gradient's norm {norm}: "
                         "stopped before anything of it was saved; "
                         + (f"the last good state is {last}" if last.exists() else "there was no checkpoint before"))
      smooth = loss if smooth is None else smooth + max(0.01, 1/n) * (loss-smooth)
      now = time.monotonic()
      # the first step compiles
      if n > begun+1: seconds = now-clock if seconds is None else seconds + 0.05 * (now-clock-seconds)
      rate = a.batch/seconds if seconds else 0.
      # the loss in each quarter of 1..T: a total that stands still can hide bands that do not
      bands = [float(each[q].mean()) if (q := (t-1)*4//a.T == i).any() else None for i in range(4)]
      log.append({"step": n, "loss": loss, "smooth": smooth, "grad_norm": norm, "lr": hyper(a, n)[0],
                  "bands": bands, "images_per_s": round(rate, 1)})
      f.write(json.dumps(log[-1])+"\n")
      if tty or now-spoken > 10 or n == a.steps:
        left = time.strftime("%H:%M:%S", time.gmtime((a.steps-n)*seconds)) if seconds else "--:--:--"
        print(f"step {n:>6}/{a.steps}  loss {smooth:.4f}  grad {norm:7.3f}  {rate:7.1f} images/s  {left} left",
              end="\r" if tty and n < a.steps else "\n", file=sys.stderr, flush=True)
        spoken = now
      if a.sample_every and (n % a.sample_every == 0 or n == a.steps) and not stop: show(n)
      if n % a.save_every == 0 or n == a.steps or stop: save(n)
  if stop:
    print(f"\nstopped at step {n} and saved: run the same command again to go on", file=sys.stderr)
    sys.exit(130)
  made = ("samples.png", "loss.png", "ema.safetensors") if a.sample_every else ("loss.png", "ema.safetensors")
  print("done:", ", ".join(f"{out}/{name}" for name in made), file=sys.stderr)

if __name__ == "__main__":
  try: main()
  except (ValueError, OSError, RuntimeError) as e: sys.exit(f"train.py: {e}")
  except KeyboardInterrupt: sys.exit(130)

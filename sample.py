"""Algorithm 2 of DDPM (Ho, Jain, Abbeel 2020, arXiv:2006.11239), the samplers that grew from it, the paper's figures.

  python sample.py                                    # 16 images of the newest run, by Algorithm 2, into samples.png
  python sample.py --sampler ddim --steps 50 --n 64   # the same in a twentieth of the time
  python sample.py --progressive                      # Figure 6; --shared 7: Figure 7; --interpolate 500: Figure 8

A sampler is a function (ddpm, model, x_T, steps, seed=0, ...) that returns an iterator over the steps. A step goes from
t to s < t and gives (s, x_s, x̂_0): where it arrived, and the x_0 that the model saw from x_t. The first step starts at
T, the last arrives at 0. They differ in the step alone; `walk` is the loop of all. They share these arguments:

  model   any callable model(x_t, t) on tensors, as in ddpm.py
  x_T     (B, C, H, W), see draw_x_T
  steps   how many, 1..T, evenly spread; or the times to visit, decreasing (see timesteps): the first is x_T's own time
  seed    image i draws from (seed, i) alone, so it is the same in a batch of any size
  first   the index i of the first image, 0 by default, or one index for each image
  clip    whether x̂_0 is brought into [-1, 1], where the data are, before it is used (the authors' code, not the paper)
  jits    a dict that keeps the compiled step for the next call with the same ddpm, model and options
"""
import argparse, functools, math, os, sys
from pathlib import Path
import numpy as np
import unet  # first, because it tells tinygrad how to compile
import data
from ddpm import DDPM, column
from tinygrad import Tensor, TinyJit

# *** what the samplers are made of ***

def timesteps(T, steps, spacing="linear"):
  """τ of Song, Meng, Ermon 2021, Appendix D.2: [T, ..., 0], `steps` steps, τᵢ ∝ i ("linear") or i² ("quadratic").

  Where the squares are closer than 1 near the data, the times are 0, 1, 2, ... ValueError unless 1 <= steps <= T.
  """
  if not 1 <= steps <= T: raise ValueError(f"steps must be from 1 to T = {T}, not {steps}")
  if spacing not in ("linear", "quadratic"): raise ValueError(f"spacing must be linear or quadratic, not {spacing!r}")
  times = [0]
  power = 2 if spacing == "quadratic" else 1
  for i in range(1, steps + 1): times.append(max(times[-1] + 1, round(T * (i / steps) ** power)))
  return times[::-1]

def generators(seed, stream, index):
  """A numpy generator for each image. x_T, z and the latents of --interpolate are streams 1, 2, 3: independent."""
  if seed < 0: raise ValueError(f"a seed must be 0 or more, not {seed}")
  return [np.random.default_rng([seed, 0x5A, stream, int(i)]) for i in index]

def normals(rngs, shape): return np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])

def draw_x_T(n, shape, seed, first=0):
  """Algorithm 2, line 1, x_T ~ N(0, I): (n, *shape), the images first .. first + n − 1 of this seed."""
  return Tensor(normals(generators(seed, 1, range(first, first + n)), shape)).realize()

def denoise(ddpm, model, x_t, t, clip=True):
  """(x̂_0, ε̂) as the model sees them in x_t, whatever it predicts. ε̂ leads from x̂_0, clipped or not, to x_t."""
  out = model(x_t, t)
  x0_hat = ddpm.predict_x0(x_t, t, out)
  if clip: x0_hat = x0_hat.clip(-1, 1)
  return x0_hat, out if ddpm.predict == "eps" and not clip else ddpm.predict_eps(x_t, t, x0_hat)

def guided(model, y, w, null):
  """Classifier-free guidance, Ho & Salimans 2021, Eq. 6: model(x_t, t, y) with labels y (B,) -> a model(x_t, t).

  w = 1 is the plain conditional model, 0 the unconditional one (label `null`), more than 1 guides: the paper's w + 1.
  What the model predicts, ε, x_0 or μ, is linear in ε with one and the same x_t, so the formula holds for each.
  """
  nulls = y.full_like(null).contiguous().realize()
  if w in (0, 1): return lambda x, t: model(x, t, y if w else nulls)
  def both(x, t):
    labelled, free = model(x.cat(x), t.cat(t), y.cat(nulls)).chunk(2)
    return free + w * (labelled - free)                      # ε̃ = ε(x, ∅) + w (ε(x, y) − ε(x, ∅))
  return both

def as_tensor(x): return (x if isinstance(x, Tensor) else Tensor(np.asarray(x))).float().clone().realize()

def all_at(t, x): return np.full(x.shape[0], t, np.int32)

def compiled(step, model, x, t):
  """The step as one TinyJit, for every t and s. A model that leaves the device (to numpy, say) stays as it is: the jit
  would repeat its first answer for ever. It shows in the model's output, in which x_t or t does not appear."""
  t = Tensor(all_at(t, x)).shard_like(x).realize()
  if not {x.uop, t.uop} <= model(x, t).uop.toposort().keys(): return step
  jit = TinyJit(step)
  jit.cnt = 1  # captures in its first call; a fresh TinyJit would compile and run everything once more before
  return jit

def walk(ddpm, model, x, steps, step, seed=0, first=0, jits=None, noisy=True, repeat=1):
  """Algorithm 2, lines 2-5, with step(x_t, t, s, z) -> (x_s, x̂_0) for line 4: an iterator of (s, x_s, x̂_0).

  noisy: whether the step takes z; where s = 0, no step uses it. repeat: how many steps there are at each time, all but
  the last of them with s = t. ValueError for wrong steps, seed or first.
  """
  times = timesteps(ddpm.T, steps) if isinstance(steps, (int, np.integer)) else [int(t) for t in steps]
  if len(times) < 2 or times[0] > ddpm.T or times[-1] < 0 or min(a - b for a, b in zip(times, times[1:])) < 1:
    raise ValueError(f"the times must decrease within {ddpm.T}..0, but they are {times}")
  x = as_tensor(x)
  index = range(first, first + x.shape[0]) if np.ndim(first) == 0 else first
  if len(index) != x.shape[0]: raise ValueError(f"first has {len(index)} indices, but there are {x.shape[0]} images")
  rngs, jits = generators(seed, 2, index) if noisy else [], {} if jits is None else jits
  def run(x):
    if (key := (step.__code__, x.shape)) not in jits: jits[key] = compiled(step, model, x, times[0])
    path = [t for t in times[:-1] for _ in range(repeat)] + times[-1:]
    for t, s in zip(path, path[1:]):
      z = [normals(rngs, x.shape[1:])] if noisy else []
      out = jits[key](x, *[Tensor(a).shard_like(x).realize() for a in (all_at(t, x), all_at(s, x), *z)])
      x, x0_hat = copies = [v.clone() for v in out]  # because the jit writes its next output over this one
      Tensor.realize(*copies)
      if s < t: yield s, x, x0_hat
  return run(x)

# *** the samplers ***

def sample_ddpm(ddpm, model, x_T, steps, seed=0, clip=True, **walking):
  """Algorithm 2: x_{t-1} ~ p_θ(x_{t-1} | x_t), σ_t as ddpm has it; x_s ~ p_θ(x_s | x_t) where steps are left out."""
  def step(x, t, s, z):
    out = model(x, t).contiguous()  # evaluated once, used twice
    same = lambda x, t: out
    return ddpm.p_sample(same, x, t, z, s, clip), denoise(ddpm, same, x, t, clip)[0]
  return walk(ddpm, model, x_T, steps, step, seed, **walking)

def ddim_step(ddpm, eps_hat, x_t, t, s, eta=0.0, noise=None):
  """Eq. 12 of DDIM (Song, Meng, Ermon 2021, arXiv:2010.02502): x_s from x_t and ε̂ (B, C, H, W); x̂_0 at s = 0.

  It is Eq. 4 at time s with x̂_0 for x_0, and for ε a mixture of the old noise ε̂ and a new one: with σ² = η² β̃_{t|s},
  Eq. 16, and κ² = σ²/(1−ᾱ_s), √(1−ᾱ_s−σ²) ε̂ + σ z = √(1−ᾱ_s) (√(1−κ²) ε̂ + κ z). At η = 0, s may also be above t.
  """
  t, s = ddpm.time(x_t, t, 0), ddpm.time(x_t, s, 0)
  sqrt_alpha_bar, var = ddpm.jump(x_t, t)
  x0_hat = (x_t - var.sqrt() * eps_hat) / sqrt_alpha_bar     # x̂₀ = (xₜ − √(1−ᾱₜ) ε̂) / √ᾱₜ
  if eta:
    if noise is None or not 0 <= eta <= 1: raise ValueError(f"eta must be within 0..1, with noise, not {eta}")
    sqrt_alpha, beta = ddpm.jump(x_t, t, s)
    old = (sqrt_alpha.square() * ddpm.jump(x_t, s)[1] + (1 - eta**2) * beta) / var  # 1−κ², without a difference
    eps_hat = old.sqrt() * eps_hat + eta * (beta / var).sqrt() * noise               # κ² = η² β_{t|s} / (1−ᾱₜ)
  return ddpm.q_sample(x0_hat, s, eps_hat)                   # x_s = √ᾱ_s x̂₀ + √(1−ᾱ_s) ε

def sample_ddim(ddpm, model, x_T, steps, seed=0, eta=0.0, clip=True, **walking):
  """DDIM, Song, Meng, Ermon 2021, Eq. 12. η = 0 has no noise; η = 1 is Algorithm 2 with σ_t² = β̃_t."""
  if not 0 <= eta <= 1: raise ValueError(f"eta must be within 0..1, not {eta}")
  def step(x, t, s, *z):
    x0_hat, eps_hat = denoise(ddpm, model, x, t, clip)
    return ddim_step(ddpm, eps_hat, x, t, s, eta, *z), x0_hat
  return walk(ddpm, model, x_T, steps, step, seed, noisy=eta > 0, **walking)

def ddim_encode(ddpm, model, x0, steps, iterations=2):
  """The x_T from which DDIM (η = 0, no clipping, the same steps) draws x0: Song, Meng, Ermon 2021, Section 4.3.

  iterations = 1 goes up from s to t with ε̂ of x_s, so that x0 comes back but for a first-order error. More repeat the
  step with ε̂ of the x_t just found (not in the paper): at the fixed point DDIM leads from x_t to x_s exactly, and with
  steps as small as at T = 1000 five iterations are there. The model is asked at t, never at 0, where it is not trained.
  """
  def step(x_t, x_s, s, t): return (ddim_step(ddpm, denoise(ddpm, model, x_t, t, clip=False)[1], x_s, s, t),)
  times, x = timesteps(ddpm.T, steps)[::-1], as_tensor(x0)
  call = compiled(step, model, x, times[1])
  for s, t in zip(times, times[1:]):
    x_t, at = x.clone().realize(), [Tensor(all_at(i, x)).shard_like(x).realize() for i in (s, t)]
    for _ in range(iterations): x_t = call(x_t, x, *at)[0].clone().realize()
    x = x_t
  return x

def reverse_sde(ddpm, x, eps_hat, t, s, z):
  """One Euler-Maruyama step of the reverse-time VP-SDE, Song et al. 2021 (arXiv:2011.13456), Eq. 6 and 11, from t to s.

  dx = −½ β(t) x dt + √β(t) dw, reversed: dx = [−½ β(t) x − β(t) ∇log q(x)] dt + √β(t) dw̄, where the noise of the step,
  ∫ₛᵗ β(τ) dτ = log ᾱ_s − log ᾱ_t, and the score −ε̂/√(1−ᾱ_t) are those of the discrete chain.
  """
  beta = -(1 - ddpm.jump(x, t, s)[1]).log()
  score = -eps_hat / ddpm.jump(x, t)[1].sqrt()
  return x + beta * (x / 2 + score) + beta.sqrt() * z        # x_s = xₜ + B (½ xₜ + ∇log q) + √B z

def langevin_step(ddpm, x, eps_hat, t, r, z):
  """Langevin dynamics at time t with the step size r (1−ᾱ_t): x + r (1−ᾱ_t) ∇log q(x) + √(2 r (1−ᾱ_t)) z."""
  var = ddpm.jump(x, t)[1]
  return x - r * var.sqrt() * eps_hat + (2 * r * var).sqrt() * z

def sample_sde(ddpm, model, x_T, steps, seed=0, clip=True, **walking):
  """The reverse-time VP-SDE by Euler-Maruyama, Song et al. 2021, Eq. 6. The last step goes to x̂_0, without noise."""
  def step(x, t, s, z):
    x0_hat, eps_hat = denoise(ddpm, model, x, t, clip)
    return column(s > 0, x).where(reverse_sde(ddpm, x, eps_hat, t, s, z), x0_hat), x0_hat
  return walk(ddpm, model, x_T, steps, step, seed, **walking)

def sample_pc(ddpm, model, x_T, steps, seed=0, clip=True, snr=0.16, **walking):
  """Predictor-corrector, Song et al. 2021, Algorithms 3 and 5: at each t a Langevin step, then the reverse SDE to s.

  The corrector comes first, as in the authors' code. Its step is ε = 2 α_t (snr ‖z‖/‖score‖)², where √(1−ᾱ_t) stands
  for the ratio of the norms, which it is if ε̂ has unit variance: so no image depends on its batch, and no step's size
  on its start. The predictor is sample_sde's (Algorithm 3 has another discretization, the same to first order).
  """
  if not snr > 0: raise ValueError(f"snr must be above 0, not {snr}")
  def step(x, t, s, z):
    x0_hat, eps_hat = denoise(ddpm, model, x, t, clip)
    corrected = langevin_step(ddpm, x, eps_hat, t, 2 * snr**2 * ddpm.jump(x, t, t - 1)[0].square(), z)
    predicted = column(s > 0, x).where(reverse_sde(ddpm, x, eps_hat, t, s, z), x0_hat)
    return column(s == t, x).where(corrected, predicted), x0_hat
  return walk(ddpm, model, x_T, steps, step, seed, repeat=2, **walking)

def sample_ode(ddpm, model, x_T, steps, seed=0, clip=True, **walking):
  """The probability-flow ODE, Song et al. 2021, Eq. 13, by Heun's method: no noise, seed is not used.

  In x̄ = x/√ᾱ and σ̄ = √((1−ᾱ)/ᾱ) it is dx̄ = ε̂ dσ̄ (DDIM, Eq. 14), with nothing singular at t = 0. There ddim_step is
  Euler's step, and Heun's is ddim_step with the mean of ε̂ at both ends. The last step, to 0, is Euler's, to x̂_0.
  """
  def step(x, t, s):
    x0_hat, eps_t = denoise(ddpm, model, x, t, clip)
    x_s = ddim_step(ddpm, eps_t, x, t, s).contiguous()
    eps_s = denoise(ddpm, model, x_s, s.maximum(1), clip)[1]
    return ddim_step(ddpm, column(s > 0, x).where((eps_t + eps_s) / 2, eps_t), x, t, s), x0_hat
  return walk(ddpm, model, x_T, steps, step, seed, noisy=False, **walking)

def sample_langevin(ddpm, model, x_T, steps, seed=0, clip=True, inner=5, r=0.2, **walking):
  """Annealed Langevin dynamics, NCSN (Song & Ermon 2019, arXiv:1907.05600), Algorithm 1: `inner` steps at each level.

  The levels are the times, and α_i/2 = r (1−ᾱ_t). NCSN has r = 2e-5/(2 · 0.01²) = 0.1 and 100 steps at each of 10
  levels; with more levels and fewer steps a larger r mixes better. As there, x stays as it is from level to level: its
  variance, which grows with the noise there, is nearly the same at all of these. The last step goes to x̂_0.
  """
  if not (inner >= 1 and 0 < r < 1): raise ValueError(f"inner must be 1 or more and r within 0..1, not {inner} and {r}")
  def step(x, t, s, z):
    x0_hat, eps_hat = denoise(ddpm, model, x, t, clip)
    return column(s > 0, x).where(langevin_step(ddpm, x, eps_hat, t, r, z), x0_hat), x0_hat
  return walk(ddpm, model, x_T, steps, step, seed, repeat=inner, **walking)

SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "sde": sample_sde, "pc": sample_pc, "ode": sample_ode,
            "langevin": sample_langevin}

# *** the paper's figures: each gives images (N, C, H, W) and the number of columns. draw is main's ***

def progressive(draw, x_T, times, columns=10):
  """Figure 6: x̂_0 over time, a row for each image."""
  seen = sorted({times[round(i)] for i in np.linspace(1, len(times) - 1, columns)}, reverse=True)
  out = draw(x_T, times, keep=seen)
  return np.stack([out[t][1] for t in seen], 1).reshape(-1, *x_T.shape[1:]), len(seen)

def shared(draw, x_T, times, k):
  """Figure 7: k images from one x_t, for the times nearest to T, 3T/4, T/2 and T/4. A row: x_t, then what it became."""
  levels = sorted({min(times[:-1], key=lambda t: abs(t - times[0] * q / 4)) for q in (1, 2, 3, 4)}, reverse=True)
  latents = {times[0]: (x_T, None)}
  if levels[1:]: latents |= draw(x_T, times[:times.index(levels[-1]) + 1], keep=levels[1:])
  rows = []
  for i, t in ((i, t) for i in range(len(x_T)) for t in levels):
    x, index = latents[t][0][i:i + 1], len(x_T) + len(rows) * k + np.arange(k)  # noise that no other image has
    rows.append(np.concatenate([x, draw(x.repeat(k, 0), [s for s in times if s <= t], index=index)[0][0]]))
  return np.concatenate(rows), k + 1

def interpolate(draw, ddpm, images, T0, times, seed):
  """Figure 8: x_t, x'_t ~ q(x_t | x_0) of two images at t = T0, mixed and decoded. A row: x_0, λ = 0, 0.1 .. 1, x'_0.

  The text of Section 4.3 mixes x_0 where x_t is meant: x̄_t = (1−λ) x_t + λ x'_t, x̄_0 ~ p(x_0 | x̄_t). As there, one
  noise makes x_t for all λ; here that of the decoding is one too.
  """
  n, x0 = len(images) // 2, images.astype(np.float32) / 127.5 - 1
  eps = Tensor(normals(generators(seed, 3, range(2 * n)), x0.shape[1:]))
  x_t = ddpm.q_sample(Tensor(x0), T0, eps).numpy().reshape(n, 2, 1, *x0.shape[1:])
  mix = np.linspace(0, 1, 11, dtype=np.float32).reshape(-1, 1, 1, 1)
  x_t = (1 - mix) * x_t[:, 0] + mix * x_t[:, 1]              # x̄ₜ = (1−λ) xₜ + λ x′ₜ
  out = draw(x_t.reshape(-1, *x0.shape[1:]), [T0] + [t for t in times if t < T0], index=np.repeat(np.arange(n), 11))
  x0 = x0.reshape(n, 2, 1, *x0.shape[1:])
  rows = np.concatenate([x0[:, 0], out[0][0].reshape(n, 11, *x0.shape[3:]), x0[:, 1]], 1)
  return rows.reshape(-1, *x0.shape[3:]), 13

# *** the command ***

def number(kind, low, high=math.inf):
  """An argparse type: int or float within low..high."""
  def parse(text):
    try: value = kind(text)
    except ValueError: value = math.nan
    if low <= value <= high: return value
    limits = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
    raise argparse.ArgumentTypeError(f"it takes {'a whole ' if kind is int else 'a '}number {limits}, not {text!r}")
  return parse

def arguments(argv):
  p = argparse.ArgumentParser(prog="sample.py", description="Draws images from a trained model.", allow_abbrev=False)
  p.add_argument("--checkpoint", help="file, run folder, or name on the hub (default: the newest of runs/*)")
  p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
  p.add_argument("--sampler", choices=SAMPLERS, default="ddpm")
  p.add_argument("--steps", type=number(int, 1), help="1 to T (default: T)")
  p.add_argument("--spacing", choices=("linear", "quadratic"), default="linear", help="how the steps lie in 1..T")
  p.add_argument("--eta", type=number(float, 0, 1), help="ddim's noise: 0, none, to 1, Algorithm 2's")
  p.add_argument("--no-clip", action="store_true", help="leave x̂_0 as it is, not brought into [-1, 1]")
  p.add_argument("--n", type=number(int, 1), help="images (default: 16); rows of a figure; images of each class (8)")
  p.add_argument("--seed", type=number(int, 0), default=0)
  p.add_argument("--batch", type=number(int, 1), default=64, help="images at once: a matter of memory, not of result")
  p.add_argument("--class", dest="label", type=number(int, 0), metavar="K",
                 help="of a class-conditional model (default: all of them equally)")
  p.add_argument("--guidance", type=number(float, 0, 100), metavar="W", help="0: no label, 1: plain (default), more")
  figure = p.add_mutually_exclusive_group()
  figure.add_argument("--classes", action="store_true", help="a row of images for each class")
  figure.add_argument("--progressive", action="store_true", help="Figure 6: x̂_0 over time")
  figure.add_argument("--shared", type=number(int, 1, 100), metavar="K", help="Figure 7: K images from one latent x_t")
  figure.add_argument("--interpolate", type=number(int, 1), metavar="T0", help="Figure 8: from image to image, at T0")
  p.add_argument("--dataset", help="where --interpolate takes its images (default: what the model was trained on)")
  p.add_argument("--data-dir", help="where that dataset's files are")
  p.add_argument("--out", default="samples.png", help="the picture (default: %(default)s)")
  p.add_argument("--npz", help="also the images as they are: arr_0, uint8 (N, H, W, C)")
  p.add_argument("--gif", help="also the reverse process as an animation")
  p.error = lambda message: sys.exit(f"sample.py: {message}")
  args = p.parse_args(argv)
  if args.eta is not None and args.sampler != "ddim": p.error(f"--eta is for --sampler ddim, not for {args.sampler}")
  if args.label is not None and args.classes: p.error("--class is one class and --classes all of them: choose one")
  if (args.npz or args.gif) and (args.progressive or args.shared or args.interpolate):
    p.error("--npz and --gif are for samples, not for a figure")
  if args.shared and (args.sampler == "ode" or args.sampler == "ddim" and not args.eta):
    p.error(f"--shared needs noise in every step: all {args.shared} images of {args.sampler} would be the same")
  if (args.dataset or args.data_dir) and not args.interpolate: p.error("--dataset and --data-dir are for --interpolate")
  for path in filter(None, (args.out, args.npz, args.gif)):  # better now than after an hour
    there = Path(path).absolute()
    folder = next(f for f in (there.parent, *there.parents) if f.exists())
    if there.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK): p.error(f"cannot write {path}")
  return args

def main(argv=None):
  args = arguments(argv)
  device, checkpoint = unet.device(), unet.find_checkpoint(args.checkpoint, args.raw)
  net, meta = unet.load(checkpoint, raw=args.raw)
  ddpm, config = DDPM(**meta.get("ddpm", {})), net.config
  shape, null = (config["in_channels"], config["image_size"], config["image_size"]), config["num_classes"]
  times = timesteps(ddpm.T, ddpm.T if args.steps is None else args.steps, args.spacing)
  if not null and (args.classes or args.label is not None or args.guidance is not None):
    raise ValueError(f"{checkpoint} is trained without classes")
  if null and args.label is not None and args.label >= null:
    raise ValueError(f"--class must be from 0 to {null - 1} for this model, not {args.label}")
  if args.interpolate and args.interpolate > ddpm.T:
    raise ValueError(f"--interpolate must be from 1 to T = {ddpm.T}, not {args.interpolate}")
  rows = args.n or (8 if args.classes or args.progressive else 1 if args.shared else 4 if args.interpolate else 16)
  total = rows * (args.shared or (11 if args.interpolate else null if args.classes else 1))  # images in one draw
  size = math.ceil(total / math.ceil(total / args.batch))  # all batches have this size: one compilation serves them

  y, jits = Tensor(np.full(size, null, np.int32)).realize(), {}
  model = guided(net, y, 1 if args.guidance is None else args.guidance, null) if null else net
  sampler, options = SAMPLERS[args.sampler], {"clip": not args.no_clip and meta.get("clip", True)}
  if args.eta is not None: options["eta"] = args.eta
  def draw(x, times, keep=(0,), index=None, labels=None):
    """Runs the sampler down `times` for all of x (N, C, H, W), in batches: {t: (x_t, x̂_0)} for the t in keep."""
    out, n, index = {t: ([], []) for t in keep}, len(x), np.arange(len(x)) if index is None else index
    labels = np.full(n, null if args.label is None else args.label, np.int32) if labels is None else labels
    for i in range(0, n, size):
      batch = np.arange(i, i + size) % n  # the last one is filled up with images that are then dropped
      y.assign(Tensor(labels[batch])).realize()
      steps = sampler(ddpm, model, x[batch], times, args.seed, first=index[batch], jits=jits, **options)
      for t, *pair in data.progress(steps, f"images {i + 1}-{min(i + size, n)} of {n}", len(times) - 1):
        if t in out:
          for kept, v in zip(out[t], pair): kept.append(v.numpy())
    return {t: tuple(np.concatenate(v)[:n] for v in pair) for t, pair in out.items()}

  print(f"{checkpoint}: {args.sampler}, {len(times) - 1} steps on {device}", file=sys.stderr)
  frames = []
  if args.interpolate:
    name = args.dataset or meta.get("dataset") or ""
    if not name: raise ValueError(f"{checkpoint} does not say what it was trained on: name a --dataset")
    images, _ = data.load(name, "test", args.data_dir, **({} if name in data.DATASETS else {"size": shape[1]}))
    if images.shape[1:] != shape: raise ValueError(f"the images of {name} are {images.shape[1:]}, the model's {shape}")
    if len(images) < 2 * rows: raise ValueError(f"{name} has {len(images)} images, too few for {rows} pairs: lower --n")
    chosen = np.random.default_rng([args.seed, 0x5A, 4]).choice(len(images), 2 * rows, replace=False)
    x0, ncols = interpolate(draw, ddpm, images[chosen], args.interpolate, times, args.seed)
  else:
    x_T = draw_x_T(rows * null if args.classes else rows, shape, args.seed).numpy()
    labels, ncols = None, None
    if args.classes: labels, ncols = np.repeat(np.arange(null, dtype=np.int32), rows), rows
    # Without a class all K of them equally, x ~ Σ_y p(x | y) / K: each once among K images, in any order. Better than
    # the null class, which --guidance 0 gives.
    elif null and args.label is None:
      orders = [g.permutation(null) for g in generators(args.seed, 5, range(math.ceil(rows / null)))]
      labels = np.concatenate(orders)[:rows].astype(np.int32)
    if args.progressive: x0, ncols = progressive(functools.partial(draw, labels=labels), x_T, times)
    elif args.shared: x0, ncols = shared(draw, x_T, times, args.shared)
    else:
      shown = {times[round(i)] for i in np.linspace(1, len(times) - 1, 50)} if args.gif else {0}
      out = draw(x_T, times, keep=shown, labels=labels)
      x0 = out[0][0]
      if args.gif: frames = [data.grid(data.to_uint8(v), ncols) for v in (x_T, *(out[t][0] for t in sorted(out)[::-1]))]
  images = data.to_uint8(x0)
  if args.npz: data.save_npz(args.npz, images)
  if args.gif: data.save_gif(args.gif, frames)
  data.save_png(args.out, data.grid(images, ncols))
  if sys.stdout.isatty(): print(data.to_terminal(images))
  print("wrote " + ", ".join(filter(None, (args.out, args.npz, args.gif))), file=sys.stderr)

if __name__ == "__main__":
  try: main()
  except KeyboardInterrupt:
    print("\nsample.py: stopped, nothing was written", file=sys.stderr)
    sys.exit(130)
  except (ValueError, OSError, RuntimeError, MemoryError) as e:
    sys.exit(f"sample.py: {' '.join(str(e).split()) or type(e).__name__}")

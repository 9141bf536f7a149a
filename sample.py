"""Algorithm 2 of DDPM (Ho, Jain, Abbeel 2020, arXiv:2006.11239), the samplers that grew from it, the paper's figures.

  python sample.py                                    # 16 images of the newest run, by Algorithm 2, into samples.png
  python sample.py --sampler ddim --steps 50 --n 64   # the same in a twentieth of the time
  python sample.py --progressive                      # Figure 6; --shared 7: Figure 7; --interpolate 500: Figure 8

A sampler is a function (ddpm, model, x_T, steps, seed=0, ...) that returns an iterator over its steps. A step goes from
t to s < t and gives (s, x_s, x̂_0): where it arrived, and the x_0 that the model saw from x_t. The first step starts at
T, the last arrives at 0. What is wrong with the arguments is said at the call. They share these:

  model   any callable model(x_t, t) on tensors, as in ddpm.py
  x_T     (B, C, H, W), see draw_x_T
  steps   how many, 1..T, evenly spread; or the times to visit, decreasing (see timesteps): the first is x_T's own time
  seed    image i draws from (seed, i) alone, so it is the same in a batch of any size
  clip    whether x̂_0 is brought into [-1, 1], where the data are, before it is used (the authors' code, not the paper)
  first   the index i of the first image, 0 by default, or one index for each image
  jits    a dict that keeps the captured step for the next call with the same ddpm, model and options
"""
from __future__ import annotations
import argparse, functools, math, os, sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
import numpy as np
from tinygrad import Tensor
import data
from ddpm import DDPM, Model, Time, column
from files import checkpoint, pictures
from engine.capture import captured, placed
from engine.device import open_device
from engine.streams import stream
from engine.terminal import number, run
from files.bar import progress
from unet import DTYPES, UNet, lower

Steps = int | Sequence[int]
Visits = Iterator[tuple[int, Tensor, Tensor]]
Draw = Callable[..., dict[int, tuple[np.ndarray, ...]]]  # see `drawing`
Figure = tuple[np.ndarray, int | None]  # images (N, C, H, W) in [-1, 1] and the number of columns

# *** what the samplers are made of ***

def timesteps(T:int, steps:int, spacing:str="linear") -> list[int]:
  """τ of Song, Meng, Ermon 2021, Appendix D.2: [T, ..., 0], `steps` steps, τᵢ ∝ i ("linear") or i² ("quadratic").

  Where the squares are closer than 1 near the data, the times are 0, 1, 2, ... ValueError unless 1 <= steps <= T.
  """
  if not 1 <= steps <= T: raise ValueError(f"steps must be from 1 to T = {T}, not {steps}")
  if spacing not in ("linear", "quadratic"): raise ValueError(f"spacing must be linear or quadratic, not {spacing!r}")
  times, power = [0], 2 if spacing == "quadratic" else 1
  for i in range(1, steps + 1): times.append(max(times[-1] + 1, round(T * (i / steps) ** power)))
  return times[::-1]

def normals(rngs:Sequence[np.random.Generator], shape:Sequence) -> np.ndarray:
  """The next N(0, I) of each generator: (N, *shape)."""
  return np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])

def draw_x_T(n:int, shape:tuple[int, ...], seed:int, first:int=0) -> Tensor:
  """Algorithm 2, line 1, x_T ~ N(0, I): (n, *shape), the images first .. first + n − 1 of this seed."""
  return Tensor(normals([stream(seed, "x_T", i) for i in range(first, first + n)], shape)).realize()

def denoise(ddpm:DDPM, model:Model, x_t:Tensor, t:Tensor, clip:bool=True) -> tuple[Tensor, Tensor]:
  """(x̂_0, ε̂) as the model sees them in x_t, whatever it predicts. ε̂ leads from x̂_0, clipped or not, to x_t."""
  out = model(x_t, t)
  x0_hat = ddpm.predict_x0(x_t, t, out)
  if clip: x0_hat = x0_hat.clip(-1, 1)
  return x0_hat, out if ddpm.predict == "eps" and not clip else ddpm.predict_eps(x_t, t, x0_hat)

def guided(model:Callable[[Tensor, Tensor, Tensor], Tensor], y:Tensor, w:float, null:int) -> Model:
  """Classifier-free guidance, Ho & Salimans 2021, Eq. 6: model(x_t, t, y) with labels y (B,) -> a model(x_t, t).

  w = 1 is the plain conditional model, 0 the unconditional one (label `null`), more than 1 guides: the paper's w + 1.
  What the model predicts, ε, x_0 or μ, is linear in ε with one and the same x_t, so the formula holds for each.
  """
  nulls = y.full_like(null).contiguous().realize()
  if w in (0, 1): return lambda x, t: model(x, t, y if w else nulls)
  def both(x:Tensor, t:Tensor) -> Tensor:
    labelled, free = model(x.cat(x), t.cat(t), y.cat(nulls)).chunk(2)
    return free + w * (labelled - free)                      # ε̃ = ε(x, ∅) + w (ε(x, y) − ε(x, ∅))
  return both

def begin(ddpm:DDPM, x_T:Tensor|np.ndarray, steps:Steps, seed:int=0, first:int|Sequence[int]=0,
          jits:dict|None=None) -> tuple[Tensor, list[tuple[int, int]], Callable[[], np.ndarray], Callable]:
  """What each sampler begins with: x_T as a tensor of its own; (t, s) of each step; noise(), which draws the next
  z ~ N(0, I) of every image; and on_device, which makes of a step on tensors one that is captured, where a time may be
  an int and z an array. ValueError for wrong steps, seed or first.
  """
  times = timesteps(ddpm.T, steps) if isinstance(steps, (int, np.integer)) else [int(t) for t in steps]
  if len(times) < 2 or times[0] > ddpm.T or times[-1] < 0 or min(a - b for a, b in zip(times, times[1:])) < 1:
    raise ValueError(f"the times must decrease within {ddpm.T}..0, but they are {times}")
  x_T = (x_T if isinstance(x_T, Tensor) else Tensor(np.asarray(x_T))).float().clone().realize()
  n, shape = x_T.shape[0], x_T.shape[1:]
  index = range(first, first + n) if isinstance(first, (int, np.integer)) else first
  if len(index) != n: raise ValueError(f"first has {len(index)} indices, but there are {n} images")
  rngs = [stream(seed, "z", i) for i in index]
  def tensor(a:Tensor|np.ndarray|int) -> Tensor:
    if isinstance(a, Tensor): return a
    values = a if isinstance(a, np.ndarray) else np.full(n, a, np.int32)
    return placed(values, x_T.device) if isinstance(x_T.device, str) else Tensor(values).shard_like(x_T).realize()
  def on_device(step:Callable) -> Callable:
    jit = captured(step, jits, x_T.shape, x_T.device)
    def call(*args:Tensor|np.ndarray|int) -> list[Tensor]:
      out = [v.clone() for v in jit(*map(tensor, args))]  # because the jit writes its next output over this one
      Tensor.realize(*out)
      return out
    return call
  return x_T, list(zip(times, times[1:])), lambda: normals(rngs, shape), on_device

# *** the samplers ***

def sample_ddpm(ddpm:DDPM, model:Model, x_T:Tensor, steps:Steps, seed:int=0, clip:bool=True, **common) -> Visits:
  """Algorithm 2: x_{t-1} ~ p_θ(x_{t-1} | x_t), σ_t as ddpm has it; x_s ~ p_θ(x_s | x_t) where steps are left out."""
  x_T, jumps, noise, on_device = begin(ddpm, x_T, steps, seed, **common)
  @on_device
  def step(x_t:Tensor, t:Tensor, s:Tensor, z:Tensor) -> tuple[Tensor, Tensor]:
    out = model(x_t, t).contiguous()       # evaluated once, used twice
    def same(x:Tensor, t:Tensor) -> Tensor: return out
    return ddpm.p_sample(same, x_t, t, z, s, clip), denoise(ddpm, same, x_t, t, clip)[0]
  def loop(x_t:Tensor) -> Visits:          # 1: x_T ~ N(0, I)
    for t, s in jumps:                     # 2: for t = T, ..., 1 do
      z = noise() * (s > 0)                # 3:   z ~ N(0, I) if t > 1, else z = 0
      x_t, x0_hat = step(x_t, t, s, z)     # 4:   xₜ₋₁ = 1/√αₜ (xₜ − (1−αₜ)/√(1−ᾱₜ) ε_θ(xₜ, t)) + σₜ z
      yield s, x_t, x0_hat                 # 5: end for
  return loop(x_T)                         # 6: return x_0, which the last step gives

def ddim_step(ddpm:DDPM, eps_hat:Tensor, x_t:Tensor, t:Time, s:Time, eta:float=0.0, noise:Tensor|None=None) -> Tensor:
  """Eq. 12 of DDIM (Song, Meng, Ermon 2021, arXiv:2010.02502): x_s from x_t and ε̂ (B, C, H, W); x̂_0 at s = 0.

  It is Eq. 4 at time s with x̂_0 for x_0, and for ε a mixture of the old noise ε̂ and a new one: with σ² = η² β̃_{t|s},
  Eq. 16, and κ² = σ²/(1−ᾱ_s), √(1−ᾱ_s−σ²) ε̂ + σ z = √(1−ᾱ_s) (√(1−κ²) ε̂ + κ z). At η = 0, s may also be above t.
  ValueError for an η outside of 0..1 or without noise.
  """
  t, s = ddpm.time(x_t, t, 0), ddpm.time(x_t, s, 0)
  sqrt_alpha_bar, var = ddpm.jump(x_t, t)
  x0_hat = (x_t - var.sqrt() * eps_hat) / sqrt_alpha_bar     # x̂₀ = (xₜ − √(1−ᾱₜ) ε̂) / √ᾱₜ
  if eta:
    if noise is None or not 0 <= eta <= 1: raise ValueError(f"eta must be within 0..1, with noise, not {eta}")
    sqrt_alpha, beta = ddpm.jump(x_t, t, s)
    old = (sqrt_alpha.square() * ddpm.jump(x_t, s)[1] + (1 - eta**2) * beta) / var  # 1−κ², without a difference
    eps_hat = old.sqrt() * eps_hat + eta * (beta / var).sqrt() * noise              # κ² = η² β_{t|s} / (1−ᾱₜ)
  return ddpm.q_sample(x0_hat, s, eps_hat)                   # x_s = √ᾱ_s x̂₀ + √(1−ᾱ_s) ε

def sample_ddim(ddpm:DDPM, model:Model, x_T:Tensor, steps:Steps, seed:int=0, clip:bool=True,
                eta:float=0.0, **common) -> Visits:
  """DDIM, Song, Meng, Ermon 2021, Eq. 12. η = 0 has no noise; η = 1 is Algorithm 2 with σ_t² = β̃_t."""
  if not 0 <= eta <= 1: raise ValueError(f"eta must be within 0..1, not {eta}")
  x_T, jumps, noise, on_device = begin(ddpm, x_T, steps, seed, **common)
  @on_device
  def step(x_t:Tensor, t:Tensor, s:Tensor, *z:Tensor) -> tuple[Tensor, Tensor]:
    x0_hat, eps_hat = denoise(ddpm, model, x_t, t, clip)
    return ddim_step(ddpm, eps_hat, x_t, t, s, eta, *z), x0_hat
  def loop(x_t:Tensor) -> Visits:
    for t, s in jumps:
      z = [noise()] if eta else []
      x_t, x0_hat = step(x_t, t, s, *z)
      yield s, x_t, x0_hat
  return loop(x_T)

def ddim_encode(ddpm:DDPM, model:Model, x0:Tensor, steps:Steps, iterations:int=2) -> Tensor:
  """The x_T from which DDIM (η = 0, no clipping, the same steps) draws x0: Song, Meng, Ermon 2021, Section 4.3.

  iterations = 1 goes up from s to t with ε̂ of x_s, so that x0 comes back but for a first-order error. More repeat the
  step with ε̂ of the x_t just found (not in the paper): at the fixed point DDIM leads from x_t to x_s exactly, and with
  steps as small as at T = 1000 five iterations are there. The model is asked at t, never at 0, where it is not trained.
  """
  x_s, jumps, _, on_device = begin(ddpm, x0, steps)
  @on_device
  def step(x_t:Tensor, x_s:Tensor, t:Tensor, s:Tensor) -> tuple[Tensor]:
    return (ddim_step(ddpm, denoise(ddpm, model, x_t, t, clip=False)[1], x_s, s, t),)
  for t, s in reversed(jumps):
    x_t = x_s.clone().realize()
    for _ in range(iterations): x_t, = step(x_t, x_s, t, s)
    x_s = x_t
  return x_s

def reverse_sde(ddpm:DDPM, x_t:Tensor, eps_hat:Tensor, t:Tensor, s:Tensor, z:Tensor) -> Tensor:
  """One Euler-Maruyama step of the reverse-time VP-SDE, Song et al. 2021 (arXiv:2011.13456), Eq. 6 and 11, from t to s.

  dx = −½ β(t) x dt + √β(t) dw, reversed: dx = [−½ β(t) x − β(t) ∇log q(x)] dt + √β(t) dw̄, where the noise of the step,
  ∫ₛᵗ β(τ) dτ = log ᾱ_s − log ᾱ_t, and the score −ε̂/√(1−ᾱ_t) are those of the discrete chain.
  """
  beta = -(1 - ddpm.jump(x_t, t, s)[1]).log()
  score = -eps_hat / ddpm.jump(x_t, t)[1].sqrt()
  return x_t + beta * (x_t / 2 + score) + beta.sqrt() * z    # x_s = xₜ + B (½ xₜ + ∇log q) + √B z

def langevin_step(ddpm:DDPM, x_t:Tensor, eps_hat:Tensor, t:Tensor, r:float|Tensor, z:Tensor) -> Tensor:
  """Langevin dynamics at time t with the step size r (1−ᾱ_t): x + r (1−ᾱ_t) ∇log q(x) + √(2 r (1−ᾱ_t)) z."""
  var = ddpm.jump(x_t, t)[1]
  return x_t - r * var.sqrt() * eps_hat + (2 * r * var).sqrt() * z

def sample_sde(ddpm:DDPM, model:Model, x_T:Tensor, steps:Steps, seed:int=0, clip:bool=True, **common) -> Visits:
  """The reverse-time VP-SDE by Euler-Maruyama, Song et al. 2021, Eq. 6. The last step goes to x̂_0, without noise."""
  x_T, jumps, noise, on_device = begin(ddpm, x_T, steps, seed, **common)
  @on_device
  def step(x_t:Tensor, t:Tensor, s:Tensor, z:Tensor) -> tuple[Tensor, Tensor]:
    x0_hat, eps_hat = denoise(ddpm, model, x_t, t, clip)
    return reverse_sde(ddpm, x_t, eps_hat, t, s, z), x0_hat
  def loop(x_t:Tensor) -> Visits:
    for t, s in jumps:
      x_t, x0_hat = step(x_t, t, s, noise())
      yield s, x_t if s > 0 else x0_hat, x0_hat
  return loop(x_T)

def sample_pc(ddpm:DDPM, model:Model, x_T:Tensor, steps:Steps, seed:int=0, clip:bool=True,
              snr:float=0.16, **common) -> Visits:
  """Predictor-corrector, Song et al. 2021, Algorithms 3 and 5: at each t a Langevin step, then the reverse SDE to s.

  The corrector comes first, as in the authors' code. Its step is ε = 2 α_t (snr ‖z‖/‖score‖)², where √(1−ᾱ_t) stands
  for the ratio of the norms, which it is if ε̂ has unit variance: so no image depends on its batch, and no step's size
  on its start. The predictor is sample_sde's (Algorithm 3 has another discretization, the same to first order).
  """
  if not snr > 0: raise ValueError(f"snr must be above 0, not {snr}")
  x_T, jumps, noise, on_device = begin(ddpm, x_T, steps, seed, **common)
  @on_device
  def step(x_t:Tensor, t:Tensor, s:Tensor, z:Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x0_hat, eps_hat = denoise(ddpm, model, x_t, t, clip)
    r = 2 * snr**2 * ddpm.jump(x_t, t, t - 1)[0].square()    # ε/(1−ᾱₜ) = 2 αₜ snr²
    return langevin_step(ddpm, x_t, eps_hat, t, r, z), reverse_sde(ddpm, x_t, eps_hat, t, s, z), x0_hat
  def loop(x_t:Tensor) -> Visits:
    for t, s in jumps:
      x_t, _, _ = step(x_t, t, s, noise())                   # the corrector
      _, x_t, x0_hat = step(x_t, t, s, noise())              # the predictor
      yield s, x_t if s > 0 else x0_hat, x0_hat
  return loop(x_T)

def sample_ode(ddpm:DDPM, model:Model, x_T:Tensor, steps:Steps, seed:int=0, clip:bool=True, **common) -> Visits:
  """The probability-flow ODE, Song et al. 2021, Eq. 13, by Heun's method: no noise, seed is not used.

  In x̄ = x/√ᾱ and σ̄ = √((1−ᾱ)/ᾱ) it is dx̄ = ε̂ dσ̄ (DDIM, Eq. 14), with nothing singular at t = 0. There ddim_step is
  Euler's step, and Heun's is ddim_step with the mean of ε̂ at both ends. The last step, to 0, is Euler's, to x̂_0.
  """
  x_T, jumps, _, on_device = begin(ddpm, x_T, steps, seed, **common)
  @on_device
  def step(x_t:Tensor, t:Tensor, s:Tensor) -> tuple[Tensor, Tensor]:
    x0_hat, eps_t = denoise(ddpm, model, x_t, t, clip)
    x_s = ddim_step(ddpm, eps_t, x_t, t, s).contiguous()
    eps_s = denoise(ddpm, model, x_s, s.maximum(1), clip)[1]
    return ddim_step(ddpm, column(s > 0, x_t).where((eps_t + eps_s) / 2, eps_t), x_t, t, s), x0_hat
  def loop(x_t:Tensor) -> Visits:
    for t, s in jumps:
      x_t, x0_hat = step(x_t, t, s)
      yield s, x_t, x0_hat
  return loop(x_T)

def sample_langevin(ddpm:DDPM, model:Model, x_T:Tensor, steps:Steps, seed:int=0, clip:bool=True,
                    inner:int=5, r:float=0.2, **common) -> Visits:
  """Annealed Langevin dynamics, NCSN (Song & Ermon 2019, arXiv:1907.05600), Algorithm 1: `inner` steps at each level.

  The levels are the times, and α_i/2 = r (1−ᾱ_t). NCSN has r = 2e-5/(2 · 0.01²) = 0.1 and 100 steps at each of 10
  levels; with more levels and fewer steps a larger r mixes better. As there, x stays as it is from level to level: its
  variance, which grows with the noise there, is nearly the same at all of these. The last step goes to x̂_0.
  """
  if not (inner >= 1 and 0 < r < 1): raise ValueError(f"inner must be 1 or more and r within 0..1, not {inner} and {r}")
  x_T, jumps, noise, on_device = begin(ddpm, x_T, steps, seed, **common)
  @on_device
  def step(x_t:Tensor, t:Tensor, z:Tensor) -> tuple[Tensor, Tensor]:
    x0_hat, eps_hat = denoise(ddpm, model, x_t, t, clip)
    return langevin_step(ddpm, x_t, eps_hat, t, r, z), x0_hat
  def loop(x_t:Tensor) -> Visits:
    for t, s in jumps:
      for _ in range(inner): x_t, x0_hat = step(x_t, t, noise())
      yield s, x_t if s > 0 else x0_hat, x0_hat
  return loop(x_T)

SAMPLERS:dict[str, Callable[..., Visits]] = {
  "ddpm": sample_ddpm, "ddim": sample_ddim, "sde": sample_sde, "pc": sample_pc, "ode": sample_ode,
  "langevin": sample_langevin}

# *** the paper's figures ***

def progressive(draw:Draw, x_T:np.ndarray, labels:np.ndarray, times:list[int], columns:int=10) -> Figure:
  """Figure 6: x̂_0 over time, a row for each image."""
  seen = sorted({times[round(i)] for i in np.linspace(1, len(times) - 1, columns)}, reverse=True)
  out = draw(x_T, labels, times, keep=seen)
  return np.stack([out[t][1] for t in seen], 1).reshape(-1, *x_T.shape[1:]), len(seen)

def shared(draw:Draw, x_T:np.ndarray, labels:np.ndarray, times:list[int], k:int) -> Figure:
  """Figure 7: k images from one x_t, for the times nearest to T, 3T/4, T/2 and T/4. A row: x_t, then what it became."""
  n, *shape = x_T.shape
  levels = sorted({min(times[:-1], key=lambda t: abs(t - times[0] * q / 4)) for q in (1, 2, 3, 4)}, reverse=True)
  latents = draw(x_T, labels, times[:times.index(levels[-1]) + 1], keep=levels[1:]) if levels[1:] else {}
  rows = []
  for i, t in enumerate(levels):                             # all images of a level together
    index = n + (np.arange(n)[:, None] * len(levels) + i) * k + np.arange(k)  # noise that no other image has
    x_t = latents[t][0] if t in latents else x_T
    out = draw(x_t.repeat(k, 0), labels.repeat(k), [s for s in times if s <= t], index=index.ravel())
    rows.append(np.concatenate([x_t[:, None], out[0][0].reshape(n, k, *shape)], 1))
  return np.stack(rows, 1).reshape(-1, *shape), k + 1

def interpolate(draw:Draw, ddpm:DDPM, images:np.ndarray, labels:np.ndarray, T0:int, times:list[int],
                seed:int) -> Figure:
  """Figure 8: x_t, x'_t ~ q(x_t | x_0) of two images at t = T0, mixed and decoded. A row: x_0, λ = 0, 0.1 .. 1, x'_0.

  images: uint8 (2N, C, H, W), labels (N,) of the rows. The text of Section 4.3 mixes x_0 where x_t is meant:
  x̄_t = (1−λ) x_t + λ x'_t, x̄_0 ~ p(x_0 | x̄_t). As there, one noise makes x_t for all λ; here that of the decoding is
  one too.
  """
  n, shape, x0 = len(labels), images.shape[1:], data.scaled(images)
  eps = Tensor(normals([stream(seed, "latents", i) for i in range(2 * n)], shape))
  x_t = ddpm.q_sample(Tensor(x0), T0, eps).numpy().reshape(n, 2, 1, *shape)
  mix = np.linspace(0, 1, 11, dtype=np.float32).reshape(-1, 1, 1, 1)
  x_t = (1 - mix) * x_t[:, 0] + mix * x_t[:, 1]              # x̄ₜ = (1−λ) xₜ + λ x′ₜ
  out = draw(x_t.reshape(-1, *shape), labels.repeat(11), [T0] + [t for t in times if t < T0],
             index=np.arange(n).repeat(11))
  x0 = x0.reshape(n, 2, 1, *shape)
  rows = np.concatenate([x0[:, 0], out[0][0].reshape(n, 11, *shape), x0[:, 1]], 1)
  return rows.reshape(-1, *shape), 13

# *** the command ***

def arguments(argv:list[str]|None) -> argparse.Namespace:
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
  p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network's activations and products")
  p.add_argument("--tf32", action="store_true", help="NVIDIA: products of float32 in TF32, on tensor cores")
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
  p.error = lambda message: sys.exit(f"sample.py: {message}")  # type: ignore[method-assign]
  args = p.parse_args(argv)
  if args.eta is not None and args.sampler != "ddim": p.error(f"--eta is for --sampler ddim, not for {args.sampler}")
  if args.label is not None and args.classes: p.error("--class is one class and --classes all of them: choose one")
  if (args.npz or args.gif) and (args.progressive or args.shared or args.interpolate):
    p.error("--npz and --gif are for samples, not for a figure")
  if args.shared and (args.sampler == "ode" or args.sampler == "ddim" and not args.eta):
    p.error(f"--shared needs noise in every step: all {args.shared} images of {args.sampler} would be the same")
  if args.interpolate and args.guidance and args.label is None:
    p.error("--guidance leads to a class, and between two images there is none: name a --class, or leave it out")
  if (args.dataset or args.data_dir) and not args.interpolate: p.error("--dataset and --data-dir are for --interpolate")
  for path in filter(None, (args.out, args.npz, args.gif)):  # better now than after an hour
    there = Path(path).absolute()
    folder = next(f for f in (there.parent, *there.parents) if f.exists())
    if there.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK): p.error(f"cannot write {path}")
  return args

def check(args:argparse.Namespace, path:str, T:int, classes:int):
  """ValueError for what this model cannot do."""
  if not classes and (args.classes or args.label is not None or args.guidance is not None):
    raise ValueError(f"{path} is trained without classes")
  if classes and args.label is not None and args.label >= classes:
    raise ValueError(f"--class must be from 0 to {classes - 1} for this model, not {args.label}")
  if args.interpolate and args.interpolate > T:
    raise ValueError(f"--interpolate must be from 1 to T = {T}, not {args.interpolate}")

def what_to_draw(args:argparse.Namespace, classes:int) -> np.ndarray:
  """The label of each image or, in a figure, of each row: int32 (N,). `classes`, one more than the last, is none."""
  n = args.n or (8 if args.classes or args.progressive else 1 if args.shared else 4 if args.interpolate else 16)
  if args.classes: return np.arange(classes, dtype=np.int32).repeat(n)
  if args.label is not None: return np.full(n, args.label, np.int32)
  if args.interpolate or not classes: return np.full(n, classes, np.int32)
  # Without a class all K of them equally, x ~ Σ_y p(x | y) / K: each once among K images, in any order. Better than the
  # null class, which --guidance 0 gives.
  orders = [stream(args.seed, "order of classes", i).permutation(classes) for i in range(math.ceil(n / classes))]
  return np.concatenate(orders)[:n].astype(np.int32)

def labelling(net:UNet, guidance:float) -> Callable[[np.ndarray], Model]:
  """labels (B,) -> the network as a model of these labels: one for each B, so that its captured step reads the next."""
  null = net.config["num_classes"]
  @functools.cache
  def sized(n:int) -> tuple[Tensor, Model]:
    y = Tensor(np.full(n, null, np.int32)).realize()
    return y, guided(net, y, guidance, null)
  def labelled(labels:np.ndarray) -> Model:
    y, model = sized(len(labels))
    y.assign(Tensor(labels)).realize()
    return model
  return labelled if null else lambda labels: net

def drawing(args:argparse.Namespace, ddpm:DDPM, net:UNet, clip:bool) -> Draw:
  """draw(x, labels, times, keep=(0,), index=None), which runs the sampler down `times` for all of x (N, C, H, W), in
  batches: {t: (x_t, x̂_0)} for the t in keep. index: that of each image, whose noise it gets; 0 .. N − 1 by default."""
  sampler = functools.partial(SAMPLERS[args.sampler], ddpm, seed=args.seed, clip=clip, jits={},
                              **{} if args.eta is None else {"eta": args.eta})
  labelled = labelling(net, 1 if args.guidance is None else args.guidance)
  def draw(x:np.ndarray, labels:np.ndarray, times:list[int], keep:Sequence[int]=(0,), index:np.ndarray|None=None):
    n = len(x)
    out:dict[int, tuple[list, list]] = {t: ([], []) for t in keep}
    index = np.arange(n) if index is None else index
    size = math.ceil(n / math.ceil(n / args.batch))          # all batches have this size: one captured step serves them
    for i in range(0, n, size):
      batch = np.arange(i, i + size) % n                     # the last one is filled up with images, dropped below
      steps = sampler(labelled(labels[batch]), x[batch], times, first=index[batch])
      for t, *pair in progress(steps, f"images {i + 1}-{min(i + size, n)} of {n}", len(times) - 1):
        if t in out:
          for kept, v in zip(out[t], pair): kept.append(v.numpy())
    return {t: tuple(np.concatenate(v)[:n] for v in pair) for t, pair in out.items()}
  return draw

def pairs(args:argparse.Namespace, name:str, n:int, shape:tuple[int, ...]) -> np.ndarray:
  """2 n test images for --interpolate, uint8. ValueError if the dataset `name` has none that fit the model."""
  images, _ = data.load(name, "test", args.data_dir, size=None if name in data.DATASETS else shape[1])
  if images.shape[1:] != shape: raise ValueError(f"the images of {name} are {images.shape[1:]}, the model's {shape}")
  if len(images) < 2 * n: raise ValueError(f"{name} has {len(images)} images, too few for {n} pairs: lower --n")
  return images[stream(args.seed, "interpolated images").choice(len(images), 2 * n, replace=False)]

def write(args:argparse.Namespace, x0:np.ndarray, ncols:int|None, movie:list[np.ndarray]):
  """The files that were asked for, of images and of the moments of an animation, each (N, C, H, W) in [-1, 1]."""
  images, frames = data.to_uint8(x0), [pictures.grid(data.to_uint8(x), ncols) for x in movie]
  if args.npz: pictures.save_npz(args.npz, images)
  if args.gif: pictures.save_gif(args.gif, frames)
  pictures.save_png(args.out, pictures.grid(images, ncols))
  if sys.stdout.isatty(): print(pictures.to_terminal(images))
  print("wrote " + ", ".join(filter(None, (args.out, args.npz, args.gif))), file=sys.stderr)

def main(argv:list[str]|None=None):
  args = arguments(argv)
  open_device(args.tf32)
  path = checkpoint.find(args.checkpoint, args.raw)
  net, meta = checkpoint.load(path, raw=args.raw)
  ddpm, config = DDPM(**meta.get("ddpm", {})), lower(net, DTYPES[args.dtype]).config
  check(args, path, ddpm.T, config["num_classes"])
  times = timesteps(ddpm.T, ddpm.T if args.steps is None else args.steps, args.spacing)
  labels, shape = what_to_draw(args, config["num_classes"]), (config["in_channels"], *[config["image_size"]] * 2)
  draw = drawing(args, ddpm, net, clip=not args.no_clip and meta.get("clip", True))
  x_T, movie = draw_x_T(len(labels), shape, args.seed).numpy(), []
  print(f"{path}: {args.sampler}, {len(times) - 1} steps", file=sys.stderr)
  if args.progressive: x0, ncols = progressive(draw, x_T, labels, times)
  elif args.shared: x0, ncols = shared(draw, x_T, labels, times, args.shared)
  elif args.interpolate:
    name = args.dataset or meta.get("dataset") or ""
    if not name: raise ValueError(f"{path} does not say what it was trained on: name a --dataset")
    images = pairs(args, name, len(labels), shape)
    x0, ncols = interpolate(draw, ddpm, images, labels, args.interpolate, times, args.seed)
  else:
    seen = [times[round(i)] for i in np.linspace(1, len(times) - 1, 50)] if args.gif else [0]
    out = draw(x_T, labels, times, keep=seen)
    x0, ncols = out[0][0], len(labels) // config["num_classes"] if args.classes else None
    if args.gif: movie = [x_T, *(out[t][0] for t in sorted(out, reverse=True))]
  write(args, x0, ncols, movie)

if __name__ == "__main__": run(main)

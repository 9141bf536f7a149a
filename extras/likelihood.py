"""Bits/dim by the probability-flow ODE, Song et al. 2021 (arXiv:2011.13456): not in the paper; evaluate.py's --ode."""
import argparse, itertools, math
from collections.abc import Callable
import numpy as np
from tinygrad import Tensor
import data
from ddpm import DDPM
from engine.batches import asked, in_batches, mean_error, tensors
from engine.capture import captured
from engine.streams import stream
from engine.terminal import table

def ode_log_density(ddpm:DDPM, model:Callable, x:np.ndarray|Tensor, steps:int, seed:int=0, batch:int=32,
                    labels:np.ndarray|None=None, desc:str="", start:float=0.0, discrete:bool=False) -> Tensor:
  """log p(x) of points x (n, C, H, W) in [-1, 1], by the instantaneous change of variables along the probability-flow
  ODE (Song et al. 2021, arXiv:2011.13456, Eq. 13 and 39): a Tensor (n,), nats. Twice `steps` calls of the model.

  In y = x/√ᾱ and s = √(1−ᾱ)/√ᾱ, the noise's deviation in y, the ODE is dy/ds = ε_θ = (y − x̂_0)/s, and log p changes by
  −tr ∂ε_θ/∂y ds = (tr ∂x̂_0/∂y − D) d log s: the trapezoidal rule in log s for log p, `between` for y, both exact where
  x̂_0 stands still. The grid: see `ode_grid`. From start = 0 the first step leads to t = 1, or T if there is no other
  (the slope is 0 at s = 0 for any bounded score); a higher start says that x bears noise of that deviation. discrete:
  see `on_levels`. The trace is estimated by vᵀ(∂x̂_0/∂y)v with random signs v (Hutchinson), drawn anew for each image
  and call, so that their errors average out over the steps. ValueError unless 1 <= steps <= T."""
  x = np.asarray(x.numpy() if isinstance(x, Tensor) else x, np.float64)
  if x.ndim != 4 or 0 in x.shape: raise ValueError(f"x must be points (n, C, H, W), not of shape {x.shape}")
  if not 1 <= steps <= ddpm.T: raise ValueError(f"steps must be a whole number from 1 to T = {ddpm.T}, not {steps}")
  shape, D = x.shape[1:], x[0].size
  grid, model = ode_grid(ddpm, steps, start), asked(ddpm, model)
  (first, _), (last, _) = grid[0], grid[-1]

  def step(x:Tensor, s:Tensor, t:Tensor, v:Tensor, *y:Tensor) -> tuple[Tensor, Tensor]:
    x0_hat = ddpm.predict_x0(x, t, model(x, t, *y))
    if discrete: x0_hat = on_levels(x0_hat, s)
    vJ = (v * x0_hat).sum().gradient(x)[0]
    return x0_hat.realize(), (v * vJ).flatten(1).sum(1).realize()
  ask = captured(step)

  def signs(i:int, call:int) -> np.ndarray:
    return stream(seed, "probes", i, call).integers(0, 2, shape) * 2.0 - 1

  def flow(i:np.ndarray, tick:Callable) -> np.ndarray:
    label, calls = None if labels is None else labels[i], itertools.count()
    def slopes(y:np.ndarray, s:float, t:int) -> tuple[np.ndarray, np.ndarray]:  # dy/ds, −d log p/d log s
      if s == 0: return 0 * y, np.zeros(len(y))
      root = math.sqrt(1 + s * s)  # 1/√ᾱ
      call = next(calls)
      v = np.stack([signs(j, call) for j in i])
      x0_hat, trace = ask(*tensors(y / root, np.array([s]), np.full(len(y), t), v, label))
      tick(1)
      return (y - x0_hat.numpy()) / s, D - trace.numpy().astype(np.float64) / root
    y, log_p = x[i] * math.sqrt(1 + first**2), np.zeros(len(i))
    for (s, t), (s_next, t_next) in zip(grid, grid[1:]):
      eps, fall = slopes(y, s, t)
      euler = y + (s_next - s) * eps
      eps_next, fall_next = slopes(euler, s_next, t_next)
      y = between(y, euler, eps, eps_next, s, s_next)
      # the first step, from s = 0, is ∫ tr ∂ε_θ/∂y ds = s·½ slope
      log_p = log_p + (fall + fall_next) / 2 * (math.log(s_next / s) if s else 1)
    # log p(x) = log N(x_T; 0, I) + ∫, and the volumes of x in y
    x_T, volume = y / math.sqrt(1 + last**2), D / 2 * math.log((1 + first**2) / (1 + last**2))
    return log_p + volume - ((x_T**2).reshape(len(x_T), -1).sum(1) + D * math.log(2 * math.pi)) / 2
  log_p = in_batches(flow, len(x), batch, desc, 2 * (len(grid) - 1) - (not start))
  if not np.isfinite(log_p).all(): raise ValueError("the log-density is not finite: the ODE has diverged")
  return Tensor(log_p.astype(np.float32))

def between(y:np.ndarray, euler:np.ndarray, eps:np.ndarray, eps_next:np.ndarray, s:float, s_next:float) -> np.ndarray:
  """y at s_next from its slopes ε at both ends of a step, the second at Euler's y: the mean of Heun's step and of the
  same in x̂_0 = y − s ε, y' = (s'/s) y + (1 − s'/s) (x̂_0 + x̂_0')/2. Both are of second order, and for a normal pixel
  their errors have opposite signs: Heun's alone makes p too large by 0.009 bits in 50 steps, the mean too small by
  0.0006. Beyond s' = 5 s, where the second is the worse one, it is Heun's alone."""
  heun = y + (s_next - s) / 2 * (eps + eps_next)
  if s_next > 5 * s: return heun
  x0 = (y - s * eps + euler - s_next * eps_next) / 2
  return (heun + s_next / s * y + (1 - s_next / s) * x0) / 2

def ode_grid(ddpm:DDPM, steps:int, start:float) -> list[tuple[float, int]]:
  """The ODE's steps from noise of the deviation `start` in x to time T, where x is N(0, I): (s, t), the deviation in y
  and the time at which the model is asked there.

  The times are whole, and as equally spaced in log s as whole times allow. No model knows times below 1: up to the
  first whole time above `start` it is asked for x̂_0 at that time."""
  at, s_0 = np.sqrt(1 / ddpm.alpha_bar - 1), start / math.sqrt(1 - start**2)
  first = max(1, int(np.searchsorted(at, s_0)))
  below = max(1, round(steps * math.log(at[first] / s_0) / math.log(at[-1] / s_0))) if start else 1  # to time `first`
  whole = np.array([ddpm.T])
  if (n := min(steps - below, ddpm.T - first)) > 0:
    # the largest step in log s with which n steps suffice; a wider one between two whole times is a step by itself
    width = np.diff(np.log(at[first:]))
    most = (np.sort(width).cumsum()[::-1][:n] / np.arange(n, 0, -1)).min()  # Σ min(width, most) = n most
    place = np.append(0, np.minimum(width, most).cumsum())
    whole = first + np.searchsorted(place, most * np.arange(n + 1) * (1 - 1e-9))
  before = np.geomspace(s_0, at[first], below + 1)[:-1].tolist() if start else [0.0]
  return list(zip([*before, *at[whole]], [first] * below + whole.tolist()))

def on_levels(x0_hat:Tensor, s:Tensor) -> Tensor:
  """x̂_0, the mean of x_0 given y = x_0 + s ε, where x_0 is known to be one of the 256 levels: a Tensor (B, C, H, W).

  If log p(x_0) is straight across a few levels, p(x_0 | y) is N(x̂_0, s²), and on the levels the mean of those that it
  weights. Nothing changes for s beyond a level's width; for a small s it is the nearest level. Within [-1, 1]."""
  k, width = (x0_hat + 1) * 127.5, 127.5 * s
  nearest = k.detach().round()
  j = Tensor(np.arange(-4, 5, dtype=np.float32), device=k.device)
  weight = (-((k - nearest).unsqueeze(-1) - j).square() / (2 * width.square())).softmax(-1)
  k = (width < 0.75).where(nearest + (weight * j).sum(-1), k)
  return (k / 127.5 - 1).clip(-1, 1)

def dequantized(k:np.ndarray, seed:int=0, discrete:bool=False) -> tuple[np.ndarray, float, np.ndarray]:
  """Points x (n, C, H, W) in the bins of the levels k, the deviation of what was added, log q(x | k) (n,), nats.

  The bin of a level is 2/255 wide. Evenly over it or, if discrete, by N(0, (1/765)²) kept within it, where the bins
  of 0 and 255 are open to the outside, as in Eq. 13 (not in the paper; Zheng et al. 2023, arXiv:2305.03935)."""
  draws = [stream(seed, "dequantization", i) for i in range(len(k))]
  if not discrete:
    u = np.stack([draw.random(k.shape[1:]) for draw in draws]) * 2 - 1
    return data.scaled(k) + u / 255, 1 / 255 / math.sqrt(3), np.full(len(k), -k[0].size * math.log(2 / 255))
  sd, u = 1 / 765, np.zeros(k.shape)
  for v, level, draw in zip(u, k, draws):
    wrong = np.ones(v.shape, bool)
    while wrong.any():
      v[wrong] = draw.standard_normal(wrong.sum())
      wrong = (v > 3) & (level < 255) | (v < -3) & (level > 0)
  inside = np.where((k == 0) | (k == 255), (1 + math.erf(4.5**0.5)) / 2, math.erf(4.5**0.5))  # its mass in the bin
  log_q = -u**2 / 2 - math.log(math.sqrt(2 * math.pi) * sd) - np.log(inside)
  return data.scaled(k) + sd * u, sd, log_q.reshape(len(k), -1).sum(1)

def ode_bpd(ddpm:DDPM, model:Callable, x0:np.ndarray|Tensor, steps:int, seed:int=0, discrete:bool=False,
            **options) -> Tensor:
  """bits/dim of uint8 images by the probability-flow ODE with dequantization: a Tensor (n,).

  x0 uint8, or float on the 256 levels. A level's probability is that of its bin: as log ∫ p >= ∫ q log p/q, the mean
  over draws of log q(x) − log p(x) is an upper bound on the discrete model's bits/dim, whatever q: see `dequantized`.
  The flow starts at the noise level of this spreading. discrete: the flow knows of the 256 levels, as the decoder of
  Eq. 13 does: see `on_levels`. options: of ode_log_density."""
  x, start, log_q = dequantized(k := data.levels(x0), seed, discrete)
  log_p = ode_log_density(ddpm, model, x, steps, seed, start=start, discrete=discrete, **options)
  return (Tensor(log_q.astype(np.float32)) - log_p) / (k[0].size * math.log(2))

def report_ode(a:argparse.Namespace, ddpm:DDPM, model:Callable, images:np.ndarray, labels:np.ndarray|None) -> dict:
  """--ode at the terminal, and its numbers by name. a: the command line of evaluate.py."""
  bpd = ode_bpd(ddpm, model, images, a.ode, a.seed, a.ode_levels, batch=a.batch, labels=labels, desc="ODE").numpy()
  value, error = mean_error(bpd)
  levels = ", on the levels" * a.ode_levels
  table(probability_flow_ODE=(value, f"± {error or math.nan:.4f}, {a.ode} steps{levels}"))
  return {"bits_per_dim": value, "standard_error": error, "steps": a.ode, "levels": a.ode_levels}

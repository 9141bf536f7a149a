"""Section 4 of the paper in numbers: bits/dim by the variational bound, Eq. 5 and Eq. 3.

  python evaluate.py --checkpoint runs/mnist --n 256 --json bound.json

Images are uint8 (n, C, H, W), and every result is divided by their D = C·H·W dimensions. The noise
of image i at time t has a stream of its own, so no result depends on the size of the batches."""
from __future__ import annotations
import argparse, math, sys
from collections.abc import Callable
from typing import NamedTuple
import numpy as np
from tinygrad import Tensor
import data
from ddpm import DDPM
from engine import hosts
from engine.batches import asked, choose, geometric, in_batches, mean_error, tensors
from engine.capture import captured
from engine.streams import stream
from engine.terminal import number, parser, table
from extras import quality
from extras.editing import keep
from extras.guidance import told
from extras.likelihood import report_ode
from files.atomic import write_json
from sample import check_places, model_flags, open_images, open_model

# *** Eq. 5 ***
def variational_bound(ddpm:DDPM, model:Callable, x0:Tensor, noise:Callable[[int], Tensor],
                      clip:bool=True) -> Tensor:
  """The variational bound, Eq. 5: L_T + Σ_{t>1} L_{t-1} + L_0 of each image, (B,) bits/dim.
  noise(t) is the ε of x_t. This is the bound as the paper writes it; `bound` estimates it."""
  total, model = ddpm.prior_kl(x0), asked(ddpm, model)               # L_T
  for t in range(ddpm.T, 0, -1):                                     # L_{t-1}; at t = 1 L_0
    x_t = ddpm.q_sample(x0, at := ddpm.time(x0, t), noise(t))
    total = (total + ddpm.vlb_term(x0, x_t, at, model(x_t, at), clip)).realize()
  return total

class Bound(NamedTuple):  # total, L_T and L in bits/dim; errors for each dimension
  total:np.ndarray    # (n,) L_T + L @ weight
  L_T:np.ndarray      # (n,)
  t:np.ndarray        # (n, m) the times whose terms were computed; the first is 1
  weight:np.ndarray   # (m,) how many times each of them stands for
  L:np.ndarray        # (n, m) their terms
  mse_eps:np.ndarray  # (n, m) squared error of the noise, without clipping
  mse_x0:np.ndarray   # (n, m) squared error of x̂_0, on the scale [-1, 1]

def bound(ddpm:DDPM, model:Callable, x0:np.ndarray|Tensor, seed:int=0, samples_t:int|None=None,
          batch:int=32, clip:bool=True, labels:np.ndarray|None=None, desc:str="") -> Bound:
  """Eq. 5 for images x0 (n, C, H, W), uint8 or on the 256 levels, with the terms of `times`.
  labels (n,), if given, become the model's third argument. Each image has its own noise and times,
  so the standard error of `total` includes both. ValueError for answers that are not finite."""
  x0, model = data.levels(x0), asked(ddpm, model)
  t, weight = times(ddpm.T, len(x0), seed, samples_t)
  def step(x0:Tensor, t:Tensor, eps:Tensor, *y:Tensor) -> Tensor:
    x_t = ddpm.q_sample(x0, t, eps)
    out = model(x_t, t, *y).contiguous()
    free = ddpm.predict_x0(x_t, t, out)
    x0_hat = free.clip(-1, 1) if clip else free
    errors = eps - ddpm.predict_eps(x_t, t, free), x0 - x0_hat
    squared = [e.square().flatten(1).mean(1) for e in errors]
    return Tensor.stack(ddpm.vlb_term(x0, x_t, t, out, clip), *squared).realize()
  terms_of = captured(step)
  def terms(k:np.ndarray, tick:Callable) -> np.ndarray:
    i, j = np.divmod(k, t.shape[1])
    eps = noise(seed, i, t[i, j], x0.shape[1:])
    y = None if labels is None else labels[i]
    found = terms_of(*tensors(data.scaled(x0[i]), t[i, j], eps, y)).numpy()
    tick(1)
    return found.astype(np.float64)
  def prior(i:np.ndarray, tick:Callable) -> np.ndarray:
    return ddpm.prior_kl(*tensors(data.scaled(x0[i]))).numpy().astype(np.float64)
  L, mse_eps, mse_x0 = in_batches(terms, t.size, batch, desc).reshape(3, *t.shape)
  L_T = in_batches(prior, len(x0), 1024)
  total = L_T + L @ weight
  if not np.isfinite(total).all():
    raise ValueError("the bound is not finite: the model's answers are not numbers")
  return Bound(total, L_T, t, weight, L, mse_eps, mse_x0)

def times(T:int, n:int, seed:int=0, samples_t:int|None=None) -> tuple[np.ndarray, np.ndarray]:
  """Terms of Eq. 5 to compute: t (n, m), and the number of terms each column stands for, (m,).
  The first column is t = 1, L_0. The others are all of 2..T or, for each image, one draw from each
  of samples_t strata: an unbiased estimate. Strata are wider at larger t, as terms shrink."""
  width = np.diff(edges := geometric(T, min(samples_t or T, T - 1)))
  u = [stream(seed, "times of the bound", i).random(len(width)) for i in range(n)]
  t = edges[:-1] + 1 + (np.array(u).reshape(n, -1) * width).astype(int)
  return np.insert(t, 0, 1, axis=1), np.insert(width.astype(float), 0, 1)

def noise(seed:int, i:np.ndarray, t:np.ndarray|int, shape:tuple[int, ...]) -> np.ndarray:
  """ε ~ N(0, I) of the images i at the times t, both (B,): float32 (B, C, H, W)."""
  pairs = zip(i, np.broadcast_to(t, len(i)))
  draws = [stream(seed, "noise of the bound", *pair) for pair in pairs]
  return np.stack([rng.standard_normal(shape, np.float32) for rng in draws])

# *** Eq. 3 ***
class Trajectories(NamedTuple):
  eq3:np.ndarray      # (n,) bits/dim
  sampled:np.ndarray  # (n, T+1) log q(x_{t-1}|x_t,x_0)/p_θ(x_{t-1}|x_t), t = 1..T, and L_T's draw
  kl:np.ndarray       # (n, T+1) the same in closed form, the terms of Eq. 5

def trajectory_bound(ddpm:DDPM, model:Callable, x0:np.ndarray|Tensor, seed:int=0, batch:int=32,
                     clip:bool=True, labels:np.ndarray|None=None, desc:str="") -> Trajectories:
  """The bound by naive Monte Carlo, Eq. 3: −log [p_θ(x_{0:T}) / q(x_{1:T} | x_0)] on one trajectory
  of each image; and Eq. 5 on the same one ("Rao-Blackwellized", Section 2).
  The means agree: `sampled` sums to eq3 and `kl` to Eq. 5, with L_0 in the first column of both.
  Each KL varies less than the draw it replaces. Yet their sum may vary more than that of the draws,
  which are anticorrelated along a trajectory. x0, labels: see `bound`."""
  x0, model = data.levels(x0), asked(ddpm, model)
  def step(x0:Tensor, x_t:Tensor, t:Tensor, *y:Tensor) -> tuple[Tensor, ...]:
    out = model(x_t, t, *y).contiguous()
    mean, var, _ = ddpm.p_mean_var(x_t, t, out, clip)
    return tuple(v.realize() for v in (mean, mean*0 + var, ddpm.vlb_term(x0, x_t, t, out, clip)))
  ask = captured(step)
  def walk(i:np.ndarray, tick:Callable) -> np.ndarray:
    start = data.scaled(x0[i]).astype(np.float64)
    y = None if labels is None else labels[i]
    x, eq3, sampled, kl = start, np.zeros(len(i)), [], []
    for t in range(1, ddpm.T + 1):
      eps = noise(seed, i, t, x0.shape[1:])
      x_t = ddpm.sqrt_alpha[t] * x + ddpm.sqrt_beta[t] * eps         # x_t ~ q(x_t | x_{t-1})
      mean, var, L = (v.numpy() for v in ask(*tensors(start, x_t, np.full(len(i), t), y)))
      mean_q = ddpm.mu_x0[t] * start + ddpm.mu_xt[t] * x_t           # Eq. 7
      log_p = -L if t == 1 else log_density(x, mean, var)             # L_0 is −log p_θ(x_0 | x_1)
      log_q = 0.0 if t == 1 else log_density(x, mean_q, ddpm.beta_tilde[t])
      eq3 += log_density(x_t, ddpm.sqrt_alpha[t] * x, ddpm.beta[t]) - log_p
      sampled.append(log_q - log_p)
      kl.append(L)
      x = x_t
      tick(1)
    a = ddpm.alpha_bar[-1]
    sampled.append(log_density(x, math.sqrt(a) * start, 1 - a) - log_density(x, 0, 1))
    kl.append(ddpm.prior_kl(*tensors(start)).numpy())
    return np.stack([eq3 - log_density(x, 0, 1), *sampled, *kl])      # −log p(x_T) − Σ log p_θ/q
  eq3, *terms = in_batches(walk, len(x0), batch, desc, ddpm.T)
  return Trajectories(eq3, *np.array(terms).reshape(2, -1, len(x0)).swapaxes(1, 2))

def log_density(x:np.ndarray, mean:np.ndarray|float, var:np.ndarray|float) -> np.ndarray:
  """log N(x; mean, var I) in bits/dim, (B,)."""
  nats = -(np.square(x - mean) / var + np.log(2 * np.pi * var)) / 2
  return nats.reshape(len(x), -1).mean(1, dtype=np.float64) / math.log(2)

# *** the command ***
def arguments(argv:list[str]|None) -> argparse.Namespace:
  p = parser("evaluate.py", "Bits/dim of images under a model, and more.")
  model_flags(add := p.add_argument)
  add("--dataset", help="default: the checkpoint's")
  add("--split", default="test", choices=("train", "test"))
  add("--data-dir", help="where the dataset's files are")
  add("--n", type=number(int, 1), help="images drawn from the split (256) or --samples (all)")
  add("--samples-t", type=number(int, 0), metavar="M", help="random terms per image (20); 0: all")
  add("--labels", action="store_true", help="give the model each image's class instead of none")
  add("--no-clip", action="store_true", help="do not clip x̂_0 to [-1, 1]")
  add("--json", metavar="FILE", help="all numbers")
  add("--naive", type=number(int, 2), metavar="N", help="Eq. 3 on N trajectories of one image")
  add = p.add_argument_group("not in the paper").add_argument
  quality.flags(add)
  add("--ode", type=number(int, 1), metavar="STEPS", help="also by the probability-flow ODE")
  add("--ode-levels", action="store_true", help="--ode knows of the 256 levels from -1 to 1")
  a = p.parse_args(argv)
  if (a.lenet or a.nearest) and not a.samples: p.error("--lenet, --nearest: add --samples FILE.npz")
  if a.ode_levels and not a.ode: p.error("--ode-levels: add --ode STEPS")
  unused = [k for k in "labels no_clip naive against ode samples_t raw dtype".split()
            if vars(a)[k] != p.get_default(k)]
  if a.samples and unused: p.error(f"--samples: leave out --{unused[0].replace('_', '-')}")
  check_places(a.json, a.nearest and quality.beside(a.samples))
  keep([a.samples], a.json, a.nearest and quality.beside(a.samples))
  return a

def report_bound(T:int, b:Bound, how:str) -> dict:
  """Eq. 5 at the terminal; its numbers by name."""
  (bpd, error), L_T, L_0 = mean_error(b.total), b.L_T.mean(), b.L[:, 0].mean()
  rmse, mse_t = 127.5 * math.sqrt(b.mse_x0[:, 0].mean()), b.mse_eps.mean(0)
  table(L_T=(L_T, "bits/dim"), L_1_to_L_T_minus_1=(bpd - L_0 - L_T, f"({how})"),
        rate=(bpd - L_0, "(the two together)"), distortion=(L_0, f"(L_0; RMSE {rmse:.3f} of 255)"),
        total=(bpd, f"± {error or math.nan:.6f}, the standard error over images"),
        squared_error_of_eps=(mse := mse_t @ b.weight / T, "(mean over t = 1..T)"))
  if L_T >= 1e-3:
    print(f"evaluate.py: warning: L_T = {L_T:.2g} bits/dim is not close to 0: x_T still shows x_0, "
          "but samples start from N(0, I); train with a larger T or betas", file=sys.stderr)
  return {"bits_per_dim": bpd, "standard_error": error, "rate": bpd - L_0, "distortion": L_0,
          "rmse": rmse, "mse": mse, "L_T": L_T, "L_0": L_0,
          "t": b.t.mean(0).tolist(), "weight": b.weight.tolist(), "L_t": b.L.mean(0).tolist(),
          "mse_t": mse_t.tolist(), "estimator": how, "per_image": b.total.tolist()}

def main(argv:list[str]|None=None):
  a = arguments(argv)
  if a.samples: return quality.compare_samples(a)
  path, net, ddpm, meta = open_model(a)
  if a.samples_t is None: a.samples_t = min(20, ddpm.T - 1)
  if max(a.samples_t, a.ode or 0) > ddpm.T: raise ValueError(f"this model has but {ddpm.T} times")
  name, found = open_images(a, a.split, path, net, meta)
  if found.limits: raise ValueError(f"{name} is not made of the 256 levels that Eq. 13 needs")
  if (a.n or 0) > len(found.images): raise ValueError(f"--n {a.n}: {name} has {len(found.images)}")
  index = choose(len(found.images), a.n or 256, a.seed, "evaluated images")
  images, D, c = found.images[index], found.images[0].size, net.config
  if a.labels and set(a.against) - {"inverted", "shifted"}: raise ValueError("--labels: --against "
    "another dataset has other classes than the model")
  own = found.labels[index] if a.labels else None
  labels = told(own, found.classes, c["num_classes"], meta, len(index))
  common = {"seed": a.seed, "batch": a.batch, "clip": meta.get("clip", True) and not a.no_clip}
  how = "all t" if a.samples_t in (0, ddpm.T - 1, ddpm.T) else f"{a.samples_t} random t: unbiased"
  def measure(x0:np.ndarray, desc:str) -> Bound:
    y = None if labels is None else labels[:len(x0)]
    return bound(ddpm, net, x0, samples_t=a.samples_t or None, labels=y, desc=desc, **common)
  print(f"{name} ({a.split}), {len(images)} images of {D} dimensions, under {path}")
  others = {s: quality.contrast(s, images, a.split, a.seed, a.data_dir) for s in a.against}
  b = measure(images, "bound")
  result = report_bound(ddpm.T, b, how) | common | dict(
    dims=D, n=len(images), T=ddpm.T, checkpoint=str(path), raw=a.raw, step=meta.get("step"),
    dataset=name, split=a.split, labels=a.labels, index=index.tolist())
  outside = {s: measure(other, s).total for s, other in others.items()}
  if outside: result["against"] = quality.report_against(b.total, outside)
  if a.ode: result["ode"] = report_ode(a, ddpm, net, images, labels)
  if a.naive:
    y = None if labels is None else labels[:1].repeat(a.naive)
    x0 = images[:1].repeat(a.naive, 0)
    drawn = trajectory_bound(ddpm, net, x0, labels=y, desc="trajectories", **common)
    result["naive"] = quality.report_naive(index[0], drawn)
  if a.json and not hosts.rank(): write_json(a.json, result)

if __name__ == "__main__": hosts.run(main)

"""Section 4 of the paper in numbers: bits/dim by the variational bound (Eq. 5), rate and distortion, outliers; and, not
in the paper, bits/dim by the probability-flow ODE.

  python evaluate.py --checkpoint runs/mnist/ema.safetensors --n 256 --json bound.json

Images are uint8 (n, C, H, W); D = C·H·W is the number of dimensions everything is divided by. Every random number of
image i and time t comes from a generator of its own, so that no result depends on the size of the batches.
"""
import argparse, functools, json, math, sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tinygrad import Tensor, TinyJit
from tinygrad.engine.jit import JitError
from tinygrad.helpers import tqdm
import data, unet
from ddpm import DDPM, bits_per_dim

# *** what all estimates share ***

def rng(seed, i, t=0, use=0):
  """The generator of image i at time t. At t = 0, which has no noise, `use` tells several draws of an image apart."""
  return np.random.default_rng((seed, int(i), int(t), use))

def noise(seed, i, t, shape):
  """eps ~ N(0, I) for the images i at the times t, both (B,): float32 (B, C, H, W)."""
  return np.stack([rng(seed, *it).standard_normal(shape, np.float32) for it in zip(i, np.broadcast_to(t, len(i)))])

def levels(x0):
  """x0 as uint8 (n, C, H, W), from that or from the levels k/127.5 − 1. ValueError for anything else."""
  x0 = x0.numpy() if isinstance(x0, Tensor) else np.asarray(x0)
  if x0.ndim != 4 or 0 in x0.shape: raise ValueError(f"x0 must be images (n, C, H, W), not of shape {x0.shape}")
  if x0.dtype == np.uint8: return x0
  k = data.to_uint8(x0)
  if np.abs(scaled(k) - x0).max() > 1e-3: raise ValueError("x0 must lie on the 256 levels k/127.5 - 1 of uint8 images")
  return k

def scaled(k): return k.astype(np.float32) / 127.5 - 1

def given(labels, i): return () if labels is None else (labels[i].astype(np.int32),)

def jitted(step):
  """step, captured by TinyJit at its first call. A model that reads a tensor's values on the host runs as it is."""
  fast = TinyJit(step)
  fast.cnt = 1  # call 0 would run uncaptured, to let lazy state settle: here there is none
  def call(*arrays):
    nonlocal fast
    tensors = [Tensor(a).realize() for a in arrays]
    if fast is not None:
      try: return [out.numpy() for out in fast(*tensors)]
      except JitError: fast = None
    return [out.numpy() for out in step(*tensors)]
  return call

def in_batches(step, n, size, desc=None, rounds=1):
  """step(i, tick) -> (..., size) over all i of 0..n-1, `size` at a time: (..., n). The last batch, filled up with n-1,
  is cut. desc: a bar with the time left, if stderr is a terminal; step calls tick(1) `rounds` times."""
  size = min(size, n)
  starts = range(0, n, size)
  with tqdm(total=len(starts) * rounds, desc=desc or "", disable=None if desc else True) as bar:
    parts = [step(np.minimum(np.arange(k, k + size), n - 1), bar.update) for k in starts]
  return np.concatenate(parts, -1)[..., :n]

def geometric(T, n, first=1):
  """n + 1 whole numbers from `first` to T, each above the one before, in a constant ratio as far as that allows."""
  g = [first]
  for left in range(n, 0, -1): g.append(max(g[-1] + 1, round(g[-1] * (T / g[-1]) ** (1 / left))))
  return np.array(g)

def mean_error(v):
  """The mean and its standard error, NaN for a single value."""
  return float(np.mean(v)), float(np.std(v, ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan

# *** Section 3.3, Eq. 5: the bound ***

def times(T, n, seed=0, every=1, samples_t=None):
  """The terms of Eq. 5 to compute: times t (n, m), and how many times each column stands for (m,).

  The first column is t = 1, L_0. Of t = 2..T: all, exact; every K-th and T, summed along straight lines between them
  (not unbiased: too large where the curve is convex); or one uniform draw from each of samples_t strata for each image
  (unbiased). The strata widen with t, as the terms fall."""
  if T == 1: return np.ones((n, 1), int), np.ones(1)
  if samples_t:
    edges = geometric(T, samples_t)
    weight = np.diff(edges)
    t = edges[:-1] + 1 + (np.stack([rng(seed, i).random(samples_t) for i in range(n)]) * weight).astype(int)
  else:
    grid = np.unique(np.append(np.arange(2, T + 1, every), T))
    weight = [np.interp(np.arange(2, T + 1), grid, hat).sum() for hat in np.eye(len(grid))]
    t = np.tile(grid, (n, 1))
  return np.insert(t, 0, 1, axis=1), np.insert(np.asarray(weight, float), 0, 1)

def bound(ddpm, model, x0, seed=0, every=1, samples_t=None, batch=32, clip=True, labels=None, desc=None):
  """-log p_θ(x_0) from above, Eq. 5: L_T + Σ_{t>1} L_{t-1} + L_0, bits/dim, for each of the images x0 (n, C, H, W).

  Which terms: see `times`. labels (n,) int32, if given, become the model's third argument. -> a dict of
    total, L_T (n,)    t (n, m), weight (m,)    L (n, m) the terms: total = L_T + L @ weight
    mse_eps (n, m) of the noise, without clipping    mse_x0 (n, m) of x̂_0, on the scale [-1, 1]
  Each image's eps and times are drawn anew, so the scatter of `total` over images holds the scatter of both. Raises
  ValueError for images off the 256 levels, and where the model's answer is not finite."""
  x0 = levels(x0)
  n, shape = len(x0), x0.shape[1:]
  t, weight = times(ddpm.T, n, seed, every, samples_t)

  def step(x0, t, eps, *y):
    x_t = ddpm.q_sample(x0, t, eps)
    out = model(x_t, t, *y).contiguous()
    known = lambda x_t, t: out  # the network runs once
    eps_hat = ddpm.predict_eps(x_t, t, ddpm.predict_x0(x_t, t, out))
    x0_hat = ddpm.p_mean_var(known, x_t, t, clip=clip)[2]
    mse = lambda a, b: (a - b).square().flatten(1).mean(1)
    return Tensor.stack(ddpm.vlb_term(known, x0, t, eps, clip), mse(eps, eps_hat), mse(x0, x0_hat)).realize(),
  step = jitted(step)

  def terms(k, tick):
    i, j = np.divmod(k, t.shape[1])
    out, = step(scaled(x0[i]), t[i, j].astype(np.int32), noise(seed, i, t[i, j], shape), *given(labels, i))
    tick(1)
    return out.astype(np.float64)
  L, mse_eps, mse_x0 = in_batches(terms, t.size, batch, desc).reshape(3, *t.shape)
  L_T = in_batches(lambda i, _: ddpm.prior_kl(Tensor(scaled(x0[i]))).numpy().astype(np.float64), n, 1024)
  total = L_T + L @ weight
  if not np.isfinite(total).all(): raise ValueError("the bound is not finite: the model's answers are not numbers")
  return {"total": total, "L_T": L_T, "t": t, "weight": weight, "L": L, "mse_eps": mse_eps, "mse_x0": mse_x0}

def trajectory_bound(ddpm, model, x0, seed=0, batch=32, clip=True, labels=None, desc=None):
  """The bound by naive Monte Carlo, Eq. 3: -log p_θ(x_{0:T}) / q(x_{1:T} | x_0) on one trajectory of each image of x0,
  and by Eq. 5 on the same trajectory. Their means agree. -> bits/dim, as three arrays:
    eq3 (n,)
    sampled (n, T+1): log q(x_{t-1} | x_t, x_0) / p_θ(x_{t-1} | x_t), one draw of each KL of Eq. 5; they sum to eq3
    kl (n, T+1): the KLs in closed form ("Rao-Blackwellized", Section 2); they sum to Eq. 5
  Columns: t = 1 (L_0, the same in both), 2, .., T and L_T. Each KL varies less than its draw. The sums need not: draws
  along one trajectory make up for each other, and where p_θ is the true reverse process eq3 is constant. For the
  scatter of the estimators alone, repeat one image. x0, labels: as in `bound`."""
  x0 = levels(x0)

  def step(x0, x_prev, t, eps, *y):
    x_t = ddpm.q_step(x_prev, t, eps)
    out = model(x_t, t, *y).contiguous()
    known = lambda x_t, t: out
    log_normal = lambda mean, var: -bits_per_dim((x_prev - mean).square() / var + (2 * math.pi * var).log()) / 2
    L = ddpm.vlb_term(known, x0, t, ddpm.predict_eps(x_t, t, x0), clip)
    log_p = (t == 1).where(-L, log_normal(*ddpm.p_mean_var(known, x_t, t, clip=clip)[:2]))  # L₀ is −log p(x₀ | x₁)
    log_q = (t == 1).where(0.0, log_normal(*ddpm.q_posterior(x0, x_t, t)))
    return x_t.realize(), Tensor.stack(log_p, log_q - log_p, L).realize()
  step = jitted(step)

  def log_normal(x, var):  # log N(x; 0, var), bits/dim
    square = np.square(x, dtype=np.float64).reshape(len(x), -1).mean(1)
    return -(square / var + math.log(2 * math.pi * var)) / math.log(4)
  def walk(i, tick):
    x, eq3, terms = scaled(x0[i]), 0.0, []
    for t in range(1, ddpm.T + 1):
      eps = noise(seed, i, t, x0.shape[1:])
      x, (log_p, *term) = step(scaled(x0[i]), x, np.full(len(i), t, np.int32), eps, *given(labels, i))
      eq3 += log_normal(eps, 1) - math.log2(ddpm.beta[t]) / 2 - log_p  # xₜ − √αₜ xₜ₋₁ is √βₜ ε
      terms.append(term)
      tick(1)
    left = ddpm.alpha_bar[-1]
    sampled = log_normal(x - math.sqrt(left) * scaled(x0[i]), 1 - left) - log_normal(x, 1)
    terms.append([sampled, ddpm.prior_kl(Tensor(scaled(x0[i]))).numpy()])
    return np.stack([eq3 - log_normal(x, 1), *np.swapaxes(terms, 0, 1).reshape(-1, len(i))]).astype(np.float64)
  eq3, *terms = in_batches(walk, len(x0), batch, desc, ddpm.T)
  return eq3, *np.array(terms).reshape(2, -1, len(x0)).swapaxes(1, 2)

# *** Section 4.3, Figure 5: rate and distortion ***

def rate_distortion(T, b):
  """Progressive coding, Section 4.3 and Figure 5, from what `bound` returned: rows, first step of the reverse process
  first, of (reverse step T-t+1, t, rate, distortion).

  rate: bits/dim spent until x_t is known, L_T and the terms of all later times; distortion: RMSE of x̂_0(x_t) on the
  scale 0..255. The last row's rate plus L_0 is the bound. With strata, a row is the average over one of them."""
  later = np.bincount(b["t"].ravel(), (b["L"] * b["weight"]).ravel() / len(b["t"]), T + 2)[::-1].cumsum()[::-1]
  t, rate = b["t"].mean(0), (b["L_T"].mean() + later[b["t"] + 1]).mean(0)
  return np.stack([T + 1 - t, t, rate, 127.5 * np.sqrt(b["mse_x0"].mean(0))], 1)[::-1]

def save_rate_distortion(path, rows):
  """The rows as CSV and, beside it, Figure 5: distortion and rate against the step, distortion against rate."""
  with data.atomic(path) as f:
    np.savetxt(f, rows, "%.8g", ",", header="reverse_step,t,rate_bits_per_dim,distortion_rmse", comments="")
  step, _, rate, distortion = rows.T
  s, r, d = "reverse process steps (T-t+1)", "rate (bits/dim)", "RMSE (of 255)"
  plots = [data.plot({name: xy}, "", *axes) for xy, name, axes in (((step, distortion), "distortion", (s, d)),
           ((step, rate), "rate", (s, r)), ((rate, distortion), "distortion against rate", (r, d)))]
  sheet = Image.new("RGB", (sum(p.width for p in plots), plots[0].height))
  for i, p in enumerate(plots): sheet.paste(p, (i * p.width, 0))
  data.save_png(Path(path).with_suffix(".png"), sheet)

# *** outliers (not in the paper) ***

def auc(inside, outside):
  """Area under the ROC curve of a score that should be larger outside: P(outside > inside), ties count half."""
  inside = np.sort(inside)
  return float((np.searchsorted(inside, outside) + np.searchsorted(inside, outside, "right")).mean() / 2 / len(inside))

def contrast(name, images, split="test", seed=0, data_dir=None):
  """As many images to tell from `images`: "inverted", "shifted" (a quarter to the right and down, around the edge), or
  from another dataset, resized and in gray or colour as these. uint8 (n, C, H, W), or fewer if there are no more."""
  n, c, h, w = images.shape
  if name == "inverted": return 255 - images
  if name == "shifted": return np.roll(images, (h // 4, w // 4), (2, 3))
  others = data.load(name, split, data_dir)[0]
  others = [picture(others[i]).convert("L" if c == 1 else "RGB").resize((w, h), Image.Resampling.BICUBIC)
            for i in choose(len(others), min(n, len(others)), seed)]
  return np.stack([np.atleast_3d(x).transpose(2, 0, 1) for x in others])

def choose(total, n, seed):
  """n of the indices below `total`, in order."""
  return np.sort(np.random.default_rng(seed).choice(total, n, replace=False))

def picture(x): return Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0))

def captioned(images, captions):
  """A PIL image: a grid of the images (n, C, H, W), a caption under each."""
  (_, _, h, w), tiles, font = images.shape, [], ImageFont.load_default(size=12)
  scale = max(1, round(84 / w))
  for image, caption in zip(images, captions):
    tile = Image.new("RGB", (max(w * scale, 56), h * scale + 16), "white")
    tile.paste(picture(image.repeat(scale, 1).repeat(scale, 2)), ((tile.width - w * scale) // 2, 0))
    ImageDraw.Draw(tile).text((tile.width / 2, h * scale + 1), caption, "black", font, anchor="ma")
    tiles.append(np.asarray(tile).transpose(2, 0, 1))
  return data.grid(np.stack(tiles), scale=1)

# *** not in the paper: the likelihood of the probability-flow ODE ***

def ode_log_density(ddpm, model, x, steps, seed=0, probes=1, batch=32, labels=None, desc=None, start=0.0,
                    discrete=False):
  """log p(x) of points x (n, C, H, W) in [-1, 1], by the instantaneous change of variables along the probability-flow
  ODE (Song et al. 2021, arXiv:2011.13456, Eq. 13 and 39): a Tensor (n,), nats. Twice `steps` calls of the model.

  In y = x/√ᾱ and s = √(1−ᾱ)/√ᾱ, the noise's deviation in y, the ODE is dy/ds = ε_θ = (y − x̂_0)/s, and log p changes by
  −tr ∂ε_θ/∂y ds = (tr ∂x̂_0/∂y − D) d log s: Heun's method for y, the trapezoidal rule in log s for log p, both exact
  where x̂_0 stands still. The grid are whole times that widen in a constant ratio, to time T, where x is N(0, I). No
  model knows times below t = 1. From start = 0 one step leads there (the slope is 0 at s = 0 for any bounded score). A
  higher start says that x bears noise of that deviation; up to the next whole time the model is asked for x̂_0 at that
  time. discrete: see `on_levels`. The trace: by Hutchinson's estimator with `probes` fixed signs for each image;
  exactly with probes=0, which costs D of them. ValueError unless 1 <= steps <= T."""
  x = (x.numpy() if isinstance(x, Tensor) else np.asarray(x)).astype(np.float64)
  if x.ndim != 4 or 0 in x.shape: raise ValueError(f"x must be points (n, C, H, W), not of shape {x.shape}")
  if not 1 <= steps <= ddpm.T: raise ValueError(f"steps must be a whole number from 1 to T = {ddpm.T}, not {steps}")
  shape, D = x.shape[1:], x[0].size
  if not (0 < probes or 0 == probes and D <= 64): raise ValueError("probes must be 1 or more, or 0 if D is at most 64")
  # the grid: noise levels, and the times at which the model is asked there
  at, s_0 = np.sqrt(1 / ddpm.alpha_bar - 1), start / math.sqrt(1 - start**2)
  first = max(1, int(np.searchsorted(at, s_0)))
  below = max(1, round(steps * math.log(at[first] / s_0) / math.log(at[-1] / s_0))) if start else 1  # to time `first`
  whole = geometric(ddpm.T, min(steps - below, ddpm.T - first), first) if steps > below else [ddpm.T]
  grid = list(zip([*(np.geomspace(s_0, at[first], below + 1)[:-1] if start else [0.0]), *at[whole]],
                  [first] * below + list(whole)))

  def step(x, s, t, vs, *y):
    x0_hat = ddpm.predict_x0(x, t, model(x, t, *y))
    if discrete: x0_hat = on_levels(x0_hat, s)
    # E vᵀJv = tr J, and vᵀJ is the gradient of v·x̂₀
    traces = [(v * (v * x0_hat).sum().gradient(x)[0]).flatten(1).sum(1) for v in (vs[k] for k in range(vs.shape[0]))]
    return x0_hat.realize(), (functools.reduce(Tensor.add, traces) / len(traces)).realize()
  step = jitted(step)

  def signs(i): return rng(seed, i, use=2).integers(0, 2, (probes, *shape)) * 2 - 1
  unit = math.sqrt(D) * np.eye(D).reshape(D, *shape)
  def flow(i, tick):
    vs = np.stack([signs(j) if probes else unit for j in i], 1).astype(np.float32)
    def slopes(y, s, t):  # dy/ds, −d log p/d log s
      if s == 0: return 0 * y, 0.0
      root = math.sqrt(1 + s * s)  # 1/√ᾱ
      x0_hat, trace = step((y / root).astype(np.float32), np.array([s], np.float32), np.full(len(y), t, np.int32), vs,
                           *given(labels, i))
      tick(1)
      return (y - x0_hat) / s, D - trace.astype(np.float64) / root
    y, log_p = x[i] * math.sqrt(1 + s_0**2), 0.0
    for (s, t), (s_next, t_next) in zip(grid, grid[1:]):
      eps, fall = slopes(y, s, t)
      eps_next, fall_next = slopes(y + (s_next - s) * eps, s_next, t_next)
      y = y + (s_next - s) / 2 * (eps + eps_next)
      log_p = log_p + (fall + fall_next) / 2 * (math.log(s_next / s) if s else 1)  # from 0: ∫ tr ∂ε_θ/∂y ds, s·½ slope
    # log p(x) = log N(x_T; 0, I) + ∫, and the volumes of x in y
    x_T, volume = y / math.sqrt(1 + at[-1]**2), D / 2 * math.log((1 + s_0**2) / (1 + at[-1]**2))
    return log_p + volume - ((x_T**2).reshape(len(x_T), -1).sum(1) + D * math.log(2 * math.pi)) / 2
  log_p = in_batches(flow, len(x), batch, desc, 2 * (len(grid) - 1) - (not start))
  if not np.isfinite(log_p).all(): raise ValueError("the log-density is not finite: the ODE has diverged")
  return Tensor(log_p.astype(np.float32))

def on_levels(x0_hat, s):
  """x̂_0, the mean of x_0 given y = x_0 + s ε, where x_0 is known to be one of the 256 levels: a Tensor (B, C, H, W).

  If log p(x_0) is straight across a few levels, p(x_0 | y) is N(x̂_0, s²), and on the levels the mean of those that it
  weights. Nothing changes for s beyond a level's width; for a small s it is the nearest level. Within [-1, 1]."""
  k, width = (x0_hat + 1) * 127.5, 127.5 * s
  nearest = k.detach().round()
  j = Tensor(np.arange(-4, 5, dtype=np.float32), device=k.device)
  weight = (-((k - nearest).unsqueeze(-1) - j).square() / (2 * width.square())).softmax(-1)
  k = (width < 0.75).where(nearest + (weight * j).sum(-1), k)
  return (k / 127.5 - 1).clip(-1, 1)

def dequantized(k, seed=0, discrete=False):
  """Points x (n, C, H, W) in the bins of the levels k, the deviation of what was added, log q(x | k) (n,), nats.

  The bin of a level is 2/255 wide. Evenly over it or, if discrete, by N(0, (1/765)²) kept within it, where the bins
  of 0 and 255 are open to the outside, as in Eq. 13 (not in the paper; Zheng et al. 2023, arXiv:2305.03935)."""
  draws = [rng(seed, i, use=1) for i in range(len(k))]
  if not discrete:
    u = np.stack([draw.random(k.shape[1:]) for draw in draws]) * 2 - 1
    return scaled(k) + u / 255, 1 / 255 / math.sqrt(3), np.full(len(k), -k[0].size * math.log(2 / 255))
  sd, u = 1 / 765, np.zeros(k.shape)
  for v, level, draw in zip(u, k, draws):
    wrong = np.ones(v.shape, bool)
    while wrong.any():
      v[wrong] = draw.standard_normal(wrong.sum())
      wrong = (v > 3) & (level < 255) | (v < -3) & (level > 0)
  inside = np.where((k == 0) | (k == 255), (1 + math.erf(4.5**0.5)) / 2, math.erf(4.5**0.5))  # its mass in the bin
  log_q = -u**2 / 2 - math.log(math.sqrt(2 * math.pi) * sd) - np.log(inside)
  return scaled(k) + sd * u, sd, log_q.reshape(len(k), -1).sum(1)

def ode_bpd(ddpm, model, x0, steps, seed=0, discrete=False, **options):
  """bits/dim of uint8 images by the probability-flow ODE with dequantization: a Tensor (n,).

  x0 uint8, or float on the 256 levels. A level's probability is that of its bin: as log ∫ p >= ∫ q log p/q, the mean
  over draws of log q(x) − log p(x) is an upper bound on the discrete model's bits/dim, whatever q: see `dequantized`.
  The flow starts at the noise level of this spreading. discrete: the flow knows of the 256 levels, as the decoder of
  Eq. 13 does: see `on_levels`. options: of ode_log_density."""
  x, start, log_q = dequantized(k := levels(x0), seed, discrete)
  log_p = ode_log_density(ddpm, model, x, steps, seed, start=start, discrete=discrete, **options)
  return (Tensor(log_q.astype(np.float32)) - log_p) / (k[0].size * math.log(2))

# *** not in the paper: the quality of samples without another network ***

def sliced_wasserstein(a, b, directions=1000, seed=0):
  """How far two sets of images (n, C, H, W) uint8 are apart: 0 if alike, on the scale 0..255.

  √ of the mean of W₂² over random directions and dimensions (Bonneel et al. 2015): along a direction both sets are
  numbers, and W₂ compares their sorted values, here 500 quantiles of each. It sees pixels, not meaning: FID, by tools
  that read sample.py's --npz, is what papers quote.
  """
  v = rng(seed, 0).standard_normal((a[0].size, directions)).astype(np.float32)
  v /= np.linalg.norm(v, axis=0)
  along = lambda x: np.quantile(x.reshape(len(x), -1).astype(np.float32) @ v, (np.arange(500) + 0.5) / 500, axis=0)
  return float(np.sqrt(np.square(along(a) - along(b)).mean()))

def read_npz(path):
  """The images (n, C, H, W) of sample.py's --npz. ValueError, in one sentence, for any other file."""
  try: x = np.load(path, allow_pickle=False)["arr_0"]
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or 'it is no .npz file'}") from e
  except Exception as e: raise ValueError(f"{path} is no .npz file with the array arr_0: {e}") from e
  if x.ndim != 4 or x.dtype != np.uint8 or not len(x): raise ValueError(f"{path} holds no uint8 images (n, H, W, C)")
  return x.transpose(0, 3, 1, 2)

# *** the program ***

def whole(low, high):
  def parse(text):
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
      raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)
  return parse

def arguments(argv):
  p = argparse.ArgumentParser(prog="evaluate.py", description="Bits/dim of images under a model, and more.")
  p.error = lambda message: sys.exit(f"evaluate.py: {message}")
  some, add = 10**9, p.add_argument
  add("--checkpoint", help="default: the newest of runs/, else the one shipped")
  add("--dataset", help="default: the checkpoint's")
  add("--split", default="test", choices=("train", "test"))
  add("--data-dir", help="where the dataset's files lie")
  add("--n", type=whole(1, some), help="images, drawn from the split (default 256, or all if fewer)")
  which = p.add_mutually_exclusive_group()
  which.add_argument("--every", type=whole(1, some), metavar="K", help="every K-th t; 1: all T terms, exact in t")
  which.add_argument("--samples-t", type=whole(1, some), metavar="M",
                     help="M random t for each image, unbiased (default 20)")
  add("--seed", type=whole(0, 2**32 - 1), default=0)
  add("--batch", type=whole(1, 65536), default=32)
  add("--raw", action="store_true", help="the weights as trained, not their moving average")
  add("--labels", action="store_true", help="give the model each image's class instead of none")
  add("--no-clip", action="store_true", help="do not clip x̂_0 to [-1, 1]")
  add("--json", metavar="FILE", help="all numbers")
  add("--rate-distortion", metavar="FILE.csv", help="Figure 5 as numbers, and as FILE.png")
  add("--outliers", type=whole(1, 10000), metavar="K", help="a picture of the K least likely images")
  add("--out", metavar="FILE.png", default="outliers.png", help="where --outliers draws")
  add("--against", nargs="+", default=[], metavar="SET", help="inverted, shifted, a dataset: more bits/dim there?")
  add("--samples", metavar="FILE.npz", help="only compare these samples with the images, without a model")
  add("--ode", type=whole(1, some), metavar="STEPS", help="bits/dim by the probability-flow ODE as well")
  add("--ode-levels", action="store_true", help="--ode knows that images have 256 levels from -1 to 1")
  add("--naive", type=whole(2, some), metavar="N", help="Eq. 3 against Eq. 5 on N trajectories of the first image")
  a = p.parse_args(argv)
  for flag, name, end in (("--rate-distortion", a.rate_distortion, ".csv"), ("--out", a.out, ".png")):
    if name and not name.endswith(end): p.error(f"{flag} {name}: choose a name that ends in {end}")
  return a

def main(argv=None):
  a = arguments(argv)
  if a.samples:
    samples, (images, _) = read_npz(a.samples), data.load(a.dataset or "mnist", a.split, a.data_dir)
    if samples.shape[1:] != images.shape[1:]:
      raise ValueError(f"{a.samples} holds images of {samples.shape[1:]}, not {images.shape[1:]}")
    real = data.load(a.dataset or "mnist", "train", a.data_dir)[0]
    real = real[choose(len(real), min(len(samples), len(real)), a.seed)]
    print(f"{a.samples}: sliced Wasserstein distance {sliced_wasserstein(samples, images, seed=a.seed):.3f} of 255 to "
          f"{len(images)} {a.split} images; as many training images: "
          f"{sliced_wasserstein(real, images, seed=a.seed):.3f}")
    return
  unet.device()
  for path in filter(None, (a.json, a.rate_distortion, a.outliers and a.out)):  # before the work, not after it
    if Path(path).is_dir(): raise OSError(f"cannot write {path}: it is a folder")
    try: Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise OSError(f"cannot write {path}: {e.strerror}") from e
  path = unet.find_checkpoint(a.checkpoint, a.raw)
  model, meta = unet.load(path, a.raw)
  try: ddpm = DDPM(**meta["ddpm"])
  except (KeyError, TypeError) as e: raise ValueError(f"{path} does not describe its diffusion: {e}") from e
  size, channels, classes = (model.config[k] for k in ("image_size", "in_channels", "num_classes"))
  def limit(flag, value, most, why):
    if value and value > most: raise ValueError(f"{flag} {value}: {why}, so choose 1 to {most}")
  why = f"this model has T = {ddpm.T}"
  limit("--every", a.every, ddpm.T, why)
  limit("--samples-t", a.samples_t, max(1, ddpm.T - 1), why)
  limit("--ode", a.ode, ddpm.T, why)
  if not a.every and not a.samples_t: a.samples_t = min(20, ddpm.T - 1)

  dataset = a.dataset or meta.get("dataset")
  if not dataset: raise ValueError(f"{path} does not say what it was trained on: name the images by --dataset")
  images, labels = data.load(dataset, a.split, a.data_dir, None if dataset in data.DATASETS else size)
  if images.shape[1:] != (channels, size, size):
    raise ValueError("--dataset {}: its images are {}x{}x{}, but {} was made for {}x{}x{}".format(
                     dataset, *images.shape[1:], path, channels, size, size))
  limit("--n", a.n, len(images), f"{dataset} has {len(images)} images to {a.split}")
  chosen = choose(len(images), a.n or min(256, len(images)), a.seed)
  images, labels = images[chosen], labels[chosen]
  n, D = len(images), images[0].size
  limit("--outliers", a.outliers, n, f"there are {n} images")
  if a.labels:
    foreign = [s for s in a.against if s not in ("inverted", "shifted")]
    if not classes: raise ValueError(f"--labels: {path} was trained without classes")
    if labels.max() >= classes: raise ValueError(f"--labels: {dataset} has more classes than the {classes} of {path}")
    if foreign: raise ValueError(f"--against {foreign[0]}: its classes are others, so leave out --labels")
  else: labels = np.full(n, classes, np.int32) if classes else None  # one more than the last class: none
  others = {name: contrast(name, images, a.split, a.seed, a.data_dir) for name in a.against}  # a wrong name ends here

  shared = {"seed": a.seed, "batch": a.batch, "clip": not a.no_clip}
  measure = functools.partial(bound, ddpm, model, every=a.every or 1, samples_t=a.samples_t, **shared)
  how = f"{a.samples_t} random t for each image: unbiased" if a.samples_t else "all t" if a.every in (None, 1) else \
        f"every {a.every}-th t, along straight lines: not unbiased"
  shape = "x".join(map(str, images.shape[1:]))
  print(f"{dataset} ({a.split}), {n} images of {shape} = {D} dimensions, under {path}")
  b = measure(images, labels=labels, desc="bound")
  (bpd, error), L_T, L_0 = mean_error(b["total"]), b["L_T"].mean(), b["L"][:, 0].mean()
  rows, L_t, mse_t = rate_distortion(ddpm.T, b), b["L"].mean(0), b["mse_eps"].mean(0)
  mse = mse_t @ b["weight"] / ddpm.T
  result = {
    "bits_per_dim": bpd, "standard_error": error, "rate": bpd - L_0, "distortion": L_0, "rmse": rows[-1, 3], "mse": mse,
    "L_T": L_T, "L_0": L_0, "t": b["t"].mean(0).tolist(), "weight": b["weight"].tolist(), "L_t": L_t.tolist(),
    "mse_t": mse_t.tolist(), "dims": D, "n": n, "T": ddpm.T, "estimator": how, "checkpoint": str(path), "raw": a.raw,
    "step": meta.get("step"), "dataset": dataset, "split": a.split, "labels": a.labels, **shared,
    "index": chosen.tolist(), "per_image": b["total"].tolist()}
  print(f"""  L_T                      {L_T:10.6f}  bits/dim
  L_1 + … + L_T-1          {bpd - L_0 - L_T:10.6f}  ({how})
  rate (the two together)  {bpd - L_0:10.6f}
  distortion: L_0          {L_0:10.6f}  (RMSE {rows[-1, 3]:.3f} of 255)
  total                    {bpd:10.6f}  ± {error:.6f}, the standard error over images
  squared error of eps     {mse:10.6f}  (mean over t = 1..T)""")
  if L_T >= 1e-4:
    print(f"evaluate.py: warning: L_T = {L_T:.2g} bits/dim is not close to 0: x_T still shows x_0, so samples that "
          "start from N(0, I) start from the wrong place; train with more steps T or larger betas", file=sys.stderr)

  if a.rate_distortion: save_rate_distortion(a.rate_distortion, rows)
  if a.outliers:
    worst = b["total"].argsort()[::-1][:a.outliers]
    data.save_png(a.out, captioned(images[worst], [f"{v:.3f}" for v in b["total"][worst]]))
    result["outliers"] = chosen[worst].tolist()
    print(f"  the {a.outliers} least likely images are in {a.out}")
  for name, other in others.items():
    score = measure(other, labels=labels if labels is None else labels[:len(other)], desc=name)["total"]
    area = auc(b["total"], score)
    result.setdefault("against", {})[name] = {"auc": area, "bits_per_dim": score.mean(), "n": len(other)}
    print(f"  against {name}: {score.mean():.4f} bits/dim, area under the ROC curve {area:.4f} "
          "(1: always less likely, 0.5: no difference, 0: always likelier)")
  if a.ode:
    ode = ode_bpd(ddpm, model, images, a.ode, a.seed, a.ode_levels, batch=a.batch, labels=labels, desc="ODE")
    value, error = mean_error(ode.numpy())
    result["ode"] = {"bits_per_dim": value, "standard_error": error, "steps": a.ode, "levels": a.ode_levels}
    print(f"  probability-flow ODE, {a.ode} steps{', on the levels' * a.ode_levels}: "
          f"{value:.4f} ± {error:.4f} bits/dim")
  if a.naive:
    first = np.zeros(a.naive, int)
    eq3, sampled, kl = trajectory_bound(ddpm, model, images[first], labels=None if labels is None else labels[first],
                                        desc="trajectories", **shared)
    (x, dx), (y, dy), var = mean_error(eq3), mean_error(kl.sum(1)), functools.partial(np.var, axis=0, ddof=1)
    spread = {"eq3": var(eq3), "eq5": var(kl.sum(1)), "drawn": var(sampled).sum(), "kl": var(kl).sum()}
    fall = spread["drawn"] / spread["kl"] if spread["kl"] else None
    result["naive"] = {"n": a.naive, "index": int(chosen[0]), "eq3": x, "eq3_error": dx, "eq5": y, "eq5_error": dy,
                       "variance": spread, "variance_falls": fall}
    print(f"""  image {chosen[0]}, {a.naive} trajectories: Eq. 3 {x:.5f} ± {dx:.5f}, Eq. 5 {y:.5f} ± {dy:.5f} bits/dim
    variance along one trajectory: Eq. 3 {spread['eq3']:.3g}, Eq. 5 {spread['eq5']:.3g}
    variance of terms drawn alone: draws {spread['drawn']:.3g}, KLs {spread['kl']:.3g}, {fall or 0:.3g} times less""")
  if a.json:
    if n == 1: result["standard_error"] = None  # JSON knows no NaN
    if n == 1 and a.ode: result["ode"]["standard_error"] = None
    with data.atomic(a.json) as f: f.write(json.dumps(result, indent=1, default=float).encode() + b"\n")

if __name__ == "__main__":
  try: main()
  except (ValueError, OSError, RuntimeError) as e: sys.exit(f"evaluate.py: {e}")
  except KeyboardInterrupt: sys.exit(130)

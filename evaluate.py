"""Section 4 of the paper in numbers: bits/dim by the variational bound (Eq. 3 and 5), rate and distortion (Figure 5).

  python evaluate.py --checkpoint runs/mnist/ema.safetensors --n 256 --json bound.json

Images are uint8 (n, C, H, W); D = C·H·W is the number of dimensions everything is divided by. Every random number of
image i and time t comes from a stream of its own, so that no result depends on the size of the batches. What the paper
does not measure is in beyond.py.
"""
import argparse, functools, json, math, sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
from PIL import Image
from tinygrad import Tensor
import data
from extras.likelihood import ode_bpd
from extras.quality import auc, contrast, read_npz, sliced_wasserstein
from ddpm import DDPM, Model, bits_per_dim
from files import checkpoint, pictures
from files.atomic import atomic
from engine.capture import captured
from engine.device import open_device
from engine.batches import choose, geometric, in_batches, tensors
from engine.streams import stream
from engine.terminal import number, run
from unet import DTYPES, UNet, lower

# *** Section 3.3, Eq. 5: the bound ***

def times(T:int, n:int, seed:int=0, every:int=1, samples_t:int|None=None) -> tuple[np.ndarray, np.ndarray]:
  """The terms of Eq. 5 to compute: times t (n, m), and how many times each column stands for (m,).

  The first column is t = 1, L_0. Of t = 2..T: all, exact; every K-th and T, summed along straight lines between them
  (not unbiased: too large where the curve is convex); or one uniform draw from each of samples_t strata for each image
  (unbiased). The strata widen with t, as the terms fall."""
  if T == 1: return np.ones((n, 1), int), np.ones(1)
  if samples_t:
    edges = geometric(T, samples_t)
    weight = np.diff(edges)
    u = np.stack([stream(seed, "times of the bound", i).random(samples_t) for i in range(n)])
    t = edges[:-1] + 1 + (u * weight).astype(int)
  else:
    grid = np.unique(np.append(np.arange(2, T + 1, every), T))
    weight = np.array([np.interp(np.arange(2, T + 1), grid, hat).sum() for hat in np.eye(len(grid))])
    t = np.tile(grid, (n, 1))
  return np.insert(t, 0, 1, axis=1), np.insert(weight.astype(float), 0, 1)

def noise(seed:int, i:np.ndarray, t:np.ndarray|int, shape:tuple[int, ...]) -> np.ndarray:
  """eps ~ N(0, I) for the images i at the times t, both (B,): float32 (B, C, H, W)."""
  return np.stack([stream(seed, "noise of the bound", *it).standard_normal(shape, np.float32)
                   for it in zip(i, np.broadcast_to(t, len(i)))])

def bound(ddpm:DDPM, model:Model, x0:np.ndarray|Tensor, seed:int=0, every:int=1, samples_t:int|None=None, batch:int=32,
          clip:bool=True, labels:np.ndarray|None=None, desc:str="") -> dict[str, np.ndarray]:
  """-log p_θ(x_0) from above, Eq. 5: L_T + Σ_{t>1} L_{t-1} + L_0, bits/dim, for each of the images x0 (n, C, H, W).

  Which terms: see `times`. labels (n,) int32, if given, become the model's third argument. -> a dict of
    total, L_T (n,)    t (n, m), weight (m,)    L (n, m) the terms: total = L_T + L @ weight
    mse_eps (n, m) of the noise, without clipping    mse_x0 (n, m) of x̂_0, on the scale [-1, 1]
  Each image's eps and times are drawn anew, so the scatter of `total` over images holds the scatter of both. Raises
  ValueError for images off the 256 levels, and where the model's answer is not finite."""
  x0 = data.levels(x0)
  n, shape = len(x0), x0.shape[1:]
  t, weight = times(ddpm.T, n, seed, every, samples_t)

  def step(x0:Tensor, t:Tensor, eps:Tensor, *y:Tensor) -> Tensor:
    x_t = ddpm.q_sample(x0, t, eps)
    out = model(x_t, t, *y).contiguous()
    def known(x_t:Tensor, t:Tensor) -> Tensor: return out  # the network runs once
    def mse(a:Tensor, b:Tensor) -> Tensor: return (a - b).square().flatten(1).mean(1)
    eps_hat = ddpm.predict_eps(x_t, t, ddpm.predict_x0(x_t, t, out))
    x0_hat = ddpm.p_mean_var(known, x_t, t, clip=clip)[2]
    return Tensor.stack(ddpm.vlb_term(known, x0, t, eps, clip), mse(eps, eps_hat), mse(x0, x0_hat)).realize()
  terms_of = captured(step)

  def terms(k:np.ndarray, tick:Callable) -> np.ndarray:
    i, j = np.divmod(k, t.shape[1])
    label = None if labels is None else labels[i]
    out = terms_of(*tensors(data.scaled(x0[i]), t[i, j], noise(seed, i, t[i, j], shape), label)).numpy()
    tick(1)
    return out.astype(np.float64)
  L, mse_eps, mse_x0 = in_batches(terms, t.size, batch, desc).reshape(3, *t.shape)
  L_T = in_batches(lambda i, _: ddpm.prior_kl(*tensors(data.scaled(x0[i]))).numpy().astype(np.float64), n, 1024)
  total = L_T + L @ weight
  if not np.isfinite(total).all(): raise ValueError("the bound is not finite: the model's answers are not numbers")
  return {"total": total, "L_T": L_T, "t": t, "weight": weight, "L": L, "mse_eps": mse_eps, "mse_x0": mse_x0}

# *** Eq. 3: the same without closed forms ***

def trajectory_bound(ddpm:DDPM, model:Model, x0:np.ndarray|Tensor, seed:int=0, batch:int=32, clip:bool=True,
                     labels:np.ndarray|None=None, desc:str="") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The bound by naive Monte Carlo, Eq. 3: -log p_θ(x_{0:T}) / q(x_{1:T} | x_0) on one trajectory of each image of x0,
  and by Eq. 5 on the same trajectory. Their means agree. -> bits/dim, as three arrays:
    eq3 (n,)
    sampled (n, T+1): log q(x_{t-1} | x_t, x_0) / p_θ(x_{t-1} | x_t), one draw of each KL of Eq. 5; they sum to eq3
    kl (n, T+1): the KLs in closed form ("Rao-Blackwellized", Section 2); they sum to Eq. 5
  Columns: t = 1 (L_0, the same in both), 2, .., T and L_T. Each KL varies less than its draw. The sums need not: draws
  along one trajectory make up for each other, and where p_θ is the true reverse process eq3 is constant. For the
  scatter of the estimators alone, repeat one image. x0, labels: as in `bound`."""
  x0 = data.levels(x0)

  def step(x0:Tensor, x_prev:Tensor, t:Tensor, eps:Tensor, *y:Tensor) -> tuple[Tensor, Tensor]:
    x_t = ddpm.q_step(x_prev, t, eps)
    out = model(x_t, t, *y).contiguous()
    def known(x_t:Tensor, t:Tensor) -> Tensor: return out
    def log_normal(mean:Tensor, var:Tensor) -> Tensor:
      return -bits_per_dim((x_prev - mean).square() / var + (2 * math.pi * var).log()) / 2
    L = ddpm.vlb_term(known, x0, t, ddpm.predict_eps(x_t, t, x0), clip)
    log_p = (t == 1).where(-L, log_normal(*ddpm.p_mean_var(known, x_t, t, clip=clip)[:2]))  # L₀ is −log p(x₀ | x₁)
    log_q = (t == 1).where(0.0, log_normal(*ddpm.q_posterior(x0, x_t, t)))
    return x_t.realize(), Tensor.stack(log_p, log_q - log_p, L).realize()
  onward = captured(step)

  def log_normal(x:np.ndarray, var:float) -> np.ndarray:  # log N(x; 0, var), bits/dim
    square = np.square(x, dtype=np.float64).reshape(len(x), -1).mean(1)
    return -(square / var + math.log(2 * math.pi * var)) / math.log(4)
  def walk(i:np.ndarray, tick:Callable) -> np.ndarray:
    x, eq3, terms = (start := data.scaled(x0[i])), np.zeros(len(i)), []
    label = None if labels is None else labels[i]
    for t in range(1, ddpm.T + 1):
      eps = noise(seed, i, t, x0.shape[1:])
      x, (log_p, *term) = (v.numpy() for v in onward(*tensors(start, x, np.full(len(i), t), eps, label)))
      eq3 += log_normal(eps, 1) - math.log2(ddpm.beta[t]) / 2 - log_p  # xₜ − √αₜ xₜ₋₁ is √βₜ ε
      terms.append(term)
      tick(1)
    left = ddpm.alpha_bar[-1]
    sampled = log_normal(x - math.sqrt(left) * start, 1 - left) - log_normal(x, 1)
    terms.append([sampled, ddpm.prior_kl(*tensors(start)).numpy()])
    return np.stack([eq3 - log_normal(x, 1), *np.swapaxes(terms, 0, 1).reshape(-1, len(i))]).astype(np.float64)
  eq3, *terms = in_batches(walk, len(x0), batch, desc, ddpm.T)
  sampled, kl = np.array(terms).reshape(2, -1, len(x0)).swapaxes(1, 2)
  return eq3, sampled, kl

# *** Section 4.3, Figure 5: rate and distortion ***

def rate_distortion(T:int, b:dict[str, np.ndarray]) -> np.ndarray:
  """Progressive coding, Section 4.3 and Figure 5, from what `bound` returned: rows, first step of the reverse process
  first, of (reverse step T-t+1, t, rate, distortion).

  rate: bits/dim spent until x_t is known, L_T and the terms of all later times; distortion: RMSE of x̂_0(x_t) on the
  scale 0..255. The last row's rate plus L_0 is the bound. With strata, a row is the average over one of them."""
  later = np.bincount(b["t"].ravel(), (b["L"] * b["weight"]).ravel() / len(b["t"]), T + 2)[::-1].cumsum()[::-1]
  t, rate = b["t"].mean(0), (b["L_T"].mean() + later[b["t"] + 1]).mean(0)
  return np.stack([T + 1 - t, t, rate, 127.5 * np.sqrt(b["mse_x0"].mean(0))], 1)[::-1]

def save_rate_distortion(path:str|Path, rows:np.ndarray):
  """The rows as CSV and, beside it, Figure 5: distortion and rate against the step, distortion against rate."""
  with atomic(path) as f:
    np.savetxt(f, rows, "%.8g", ",", header="reverse_step,t,rate_bits_per_dim,distortion_rmse", comments="")
  step, _, rate, distortion = rows.T
  s, r, d = "reverse process steps (T-t+1)", "rate (bits/dim)", "RMSE (of 255)"
  plots = [pictures.plot({name: xy}, "", *axes) for xy, name, axes in (((step, distortion), "distortion", (s, d)),
           ((step, rate), "rate", (s, r)), ((rate, distortion), "distortion against rate", (r, d)))]
  sheet = Image.new("RGB", (sum(p.width for p in plots), plots[0].height))
  for i, p in enumerate(plots): sheet.paste(p, (i * p.width, 0))
  pictures.save_png(Path(path).with_suffix(".png"), sheet)

# *** the program ***

def arguments(argv:list[str]|None) -> argparse.Namespace:
  """The command line. ValueError, in one sentence, for a wrong one."""
  def refuse(message:str): raise ValueError(message)
  p = argparse.ArgumentParser(prog="evaluate.py", description="Bits/dim of images under a model, and more.")
  p.error = refuse  # type: ignore[method-assign, assignment]
  some, add = number(int, 1), p.add_argument
  add("--checkpoint", help="default: the newest of runs/, else the one shipped")
  add("--dataset", help="default: the checkpoint's")
  add("--split", default="test", choices=("train", "test"))
  add("--data-dir", help="where the dataset's files lie")
  add("--n", type=some, help="images, drawn from the split (default 256, or all if fewer)")
  which = p.add_mutually_exclusive_group()
  which.add_argument("--every", type=some, metavar="K", help="every K-th t; 1: all T terms, exact in t")
  which.add_argument("--samples-t", type=some, metavar="M", help="M random t for each image, unbiased (default 20)")
  add("--seed", type=number(int, 0, 2**32 - 1), default=0)
  add("--batch", type=number(int, 1, 65536), default=32)
  add("--dtype", choices=DTYPES, default="float32", help="of the network's activations and products")
  add("--tf32", action="store_true", help="NVIDIA: products of float32 in TF32, on tensor cores")
  add("--raw", action="store_true", help="the weights as trained, not their moving average")
  add("--labels", action="store_true", help="give the model each image's class instead of none")
  add("--no-clip", action="store_true", help="do not clip x̂_0 to [-1, 1]")
  add("--json", metavar="FILE", help="all numbers")
  add("--rate-distortion", metavar="FILE.csv", help="Figure 5 as numbers, and as FILE.png")
  add("--naive", type=number(int, 2), metavar="N", help="Eq. 3 against Eq. 5 on N trajectories of the first image")
  add = p.add_argument_group("not in the paper").add_argument
  add("--outliers", type=number(int, 1, 10000), metavar="K", help="a picture of the K least likely images")
  add("--out", metavar="FILE.png", default="outliers.png", help="where --outliers draws")
  add("--against", nargs="+", default=[], metavar="SET", help="inverted, shifted, a dataset: more bits/dim there?")
  add("--samples", metavar="FILE.npz", help="only compare these samples with the images, without a model")
  add("--ode", type=some, metavar="STEPS", help="bits/dim by the probability-flow ODE as well")
  add("--ode-levels", action="store_true", help="--ode knows that images have 256 levels from -1 to 1")
  a = p.parse_args(argv)
  for flag, name, end in (("--rate-distortion", a.rate_distortion, ".csv"), ("--out", a.out, ".png")):
    if name and not name.endswith(end): p.error(f"{flag} {name}: choose a name that ends in {end}")
  return a

def limit(flag:str, value:int|None, most:int, why:str):
  """ValueError for a flag's value above `most`."""
  if value and value > most: raise ValueError(f"{flag} {value}: {why}, so choose 1 to {most}")

def make_folders(*paths:str|None):
  """The folders of the files to be written. OSError, before the work and not after it, for what cannot be one."""
  for path in filter(None, paths):
    if Path(path).is_dir(): raise OSError(f"cannot write {path}: it is a folder")
    try: Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise OSError(f"cannot write {path}: {e.strerror}") from e

def open_model(a:argparse.Namespace) -> tuple[str, UNet, DDPM, dict]:
  """The checkpoint's path, network, diffusion and description; fits `a` to its T."""
  path = checkpoint.find(a.checkpoint, a.raw)
  model, meta = checkpoint.load(path, a.raw)
  lower(model, DTYPES[a.dtype])
  try: ddpm = DDPM(**meta["ddpm"])
  except (KeyError, TypeError) as e: raise ValueError(f"{path} does not describe its diffusion: {e}") from e
  why = f"this model has T = {ddpm.T}"
  limit("--every", a.every, ddpm.T, why)
  limit("--samples-t", a.samples_t, max(1, ddpm.T - 1), why)
  limit("--ode", a.ode, ddpm.T, why)
  if not a.every and not a.samples_t: a.samples_t = min(20, ddpm.T - 1)
  return path, model, ddpm, meta

def open_images(a:argparse.Namespace, path:str, model:UNet, meta:dict
                ) -> tuple[str, np.ndarray, np.ndarray|None, np.ndarray]:
  """The dataset's name; the images to evaluate, their labels for the model and their places in it."""
  size, channels, classes = (model.config[k] for k in ("image_size", "in_channels", "num_classes"))
  dataset = a.dataset or meta.get("dataset")
  if not dataset: raise ValueError(f"{path} does not say what it was trained on: name the images by --dataset")
  images, labels = data.load(dataset, a.split, a.data_dir, None if dataset in data.DATASETS else size)
  if images.shape[1:] != (channels, size, size):
    raise ValueError("--dataset {}: its images are {}x{}x{}, but {} was made for {}x{}x{}".format(
                     dataset, *images.shape[1:], path, channels, size, size))
  limit("--n", a.n, len(images), f"{dataset} has {len(images)} images to {a.split}")
  index = choose(len(images), a.n or 256, a.seed, "evaluated images")
  limit("--outliers", a.outliers, len(index), f"there are {len(index)} images")
  if not a.labels:  # one more than the last class: none
    return dataset, images[index], np.full(len(index), classes, np.int32) if classes else None, index
  foreign = [s for s in a.against if s not in ("inverted", "shifted")]
  if not classes: raise ValueError(f"--labels: {path} was trained without classes")
  if labels.max() >= classes: raise ValueError(f"--labels: {dataset} has more classes than the {classes} of {path}")
  if foreign: raise ValueError(f"--against {foreign[0]}: its classes are others, so leave out --labels")
  return dataset, images[index], labels[index], index

def mean_error(v:np.ndarray) -> tuple[float, float]:
  """The mean and its standard error, NaN for a single value."""
  return float(np.mean(v)), float(np.std(v, ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan

def report_bound(T:int, b:dict[str, np.ndarray], how:str) -> dict:
  """Eq. 5 at the terminal; its numbers by name."""
  (bpd, error), L_T, L_0 = mean_error(b["total"]), b["L_T"].mean(), b["L"][:, 0].mean()
  rmse, mse_t = rate_distortion(T, b)[-1, 3], b["mse_eps"].mean(0)
  mse = mse_t @ b["weight"] / T
  print(f"""  L_T                      {L_T:10.6f}  bits/dim
  L_1 + … + L_T-1          {bpd - L_0 - L_T:10.6f}  ({how})
  rate (the two together)  {bpd - L_0:10.6f}
  distortion: L_0          {L_0:10.6f}  (RMSE {rmse:.3f} of 255)
  total                    {bpd:10.6f}  ± {error:.6f}, the standard error over images
  squared error of eps     {mse:10.6f}  (mean over t = 1..T)""")
  if L_T >= 1e-4:
    print(f"evaluate.py: warning: L_T = {L_T:.2g} bits/dim is not close to 0: x_T still shows x_0, so samples that "
          "start from N(0, I) start from the wrong place; train with more steps T or larger betas", file=sys.stderr)
  return {"bits_per_dim": bpd, "standard_error": error if len(b["total"]) > 1 else None,  # JSON knows no NaN
          "rate": bpd - L_0, "distortion": L_0, "rmse": rmse, "mse": mse, "L_T": L_T, "L_0": L_0,
          "t": b["t"].mean(0).tolist(), "weight": b["weight"].tolist(), "L_t": b["L"].mean(0).tolist(),
          "mse_t": mse_t.tolist(), "estimator": how, "per_image": b["total"].tolist()}

def report_naive(index:int, eq3:np.ndarray, sampled:np.ndarray, kl:np.ndarray) -> dict:
  """Eq. 3 against Eq. 5 on trajectories of one image, from what `trajectory_bound` returned."""
  (x, dx), (y, dy), var = mean_error(eq3), mean_error(kl.sum(1)), functools.partial(np.var, axis=0, ddof=1)
  spread = {"eq3": var(eq3), "eq5": var(kl.sum(1)), "drawn": var(sampled).sum(), "kl": var(kl).sum()}
  fall = spread["drawn"] / spread["kl"] if spread["kl"] else None
  print(f"""  image {index}, {len(eq3)} trajectories: Eq. 3 {x:.5f} ± {dx:.5f}, Eq. 5 {y:.5f} ± {dy:.5f} bits/dim
    variance along one trajectory: Eq. 3 {spread['eq3']:.3g}, Eq. 5 {spread['eq5']:.3g}
    variance of terms drawn alone: draws {spread['drawn']:.3g}, KLs {spread['kl']:.3g}, {fall or 0:.3g} times less""")
  return {"n": len(eq3), "index": int(index), "eq3": x, "eq3_error": dx, "eq5": y, "eq5_error": dy, "variance": spread,
          "variance_falls": fall}

def report_ode(a:argparse.Namespace, ddpm:DDPM, model:UNet, images:np.ndarray, labels:np.ndarray|None) -> dict:
  """Bits/dim by the probability-flow ODE (not in the paper)."""
  bpd = ode_bpd(ddpm, model, images, a.ode, a.seed, a.ode_levels, batch=a.batch, labels=labels, desc="ODE").numpy()
  value, error = mean_error(bpd)
  print(f"  probability-flow ODE, {a.ode} steps{', on the levels' * a.ode_levels}: {value:.4f} ± {error:.4f} bits/dim")
  return {"bits_per_dim": value, "standard_error": error if len(bpd) > 1 else None, "steps": a.ode,
          "levels": a.ode_levels}

def report_contrast(name:str, inside:np.ndarray, outside:np.ndarray) -> dict:
  """How well bits/dim tell the images of `name` from the others (not in the paper)."""
  area = auc(inside, outside)
  print(f"  against {name}: {outside.mean():.4f} bits/dim, area under the ROC curve {area:.4f} "
        "(1: always less likely, 0.5: no difference, 0: always likelier)")
  return {"auc": area, "bits_per_dim": outside.mean(), "n": len(outside)}

def draw_outliers(a:argparse.Namespace, images:np.ndarray, bpd:np.ndarray, index:np.ndarray) -> list[int]:
  """A picture of the least likely images (not in the paper); their places in the dataset."""
  worst = bpd.argsort()[::-1][:a.outliers]
  pictures.save_png(a.out, pictures.captioned(images[worst], [f"{v:.3f}" for v in bpd[worst]]))
  print(f"  the {a.outliers} least likely images are in {a.out}")
  return index[worst].tolist()

def compare_samples(a:argparse.Namespace):
  """Samples beside the images, and as many training images beside them (not in the paper)."""
  name = a.dataset or "mnist"
  samples, (images, _) = read_npz(a.samples), data.load(name, a.split, a.data_dir)
  if samples.shape[1:] != images.shape[1:]:
    raise ValueError(f"{a.samples} holds images of {samples.shape[1:]}, not {images.shape[1:]}")
  real = data.load(name, "train", a.data_dir)[0]
  real = real[choose(len(real), len(samples), a.seed, "other images")]
  near, least = (sliced_wasserstein(x, images, seed=a.seed) for x in (samples, real))
  print(f"{a.samples}: sliced Wasserstein distance {near:.3f} of 255 to {len(images)} {a.split} images; "
        f"as many training images: {least:.3f}")

def main(argv:list[str]|None=None):
  a = arguments(argv)
  if a.samples: return compare_samples(a)
  open_device(a.tf32)
  make_folders(a.json, a.rate_distortion, a.out if a.outliers else None)
  path, model, ddpm, meta = open_model(a)
  dataset, images, labels, index = open_images(a, path, model, meta)
  others = {name: contrast(name, images, a.split, a.seed, a.data_dir) for name in a.against}  # a wrong name ends here
  n, shape, D = len(images), "x".join(map(str, images.shape[1:])), images[0].size
  print(f"{dataset} ({a.split}), {n} images of {shape} = {D} dimensions, under {path}")
  how = f"{a.samples_t} random t for each image: unbiased" if a.samples_t else "all t" if a.every in (None, 1) else \
        f"every {a.every}-th t, along straight lines: not unbiased"
  options = {"seed": a.seed, "batch": a.batch, "clip": not a.no_clip}
  def measure(images:np.ndarray, desc:str) -> dict[str, np.ndarray]:
    y = None if labels is None else labels[:len(images)]
    return bound(ddpm, model, images, every=a.every or 1, samples_t=a.samples_t, labels=y, desc=desc, **options)
  b = measure(images, "bound")
  result = report_bound(ddpm.T, b, how) | options | {
    "dims": D, "n": n, "T": ddpm.T, "checkpoint": str(path), "raw": a.raw, "step": meta.get("step"), "dataset": dataset,
    "split": a.split, "labels": a.labels, "index": index.tolist()}
  if a.rate_distortion: save_rate_distortion(a.rate_distortion, rate_distortion(ddpm.T, b))
  if a.outliers: result["outliers"] = draw_outliers(a, images, b["total"], index)
  for name, other in others.items():
    result.setdefault("against", {})[name] = report_contrast(name, b["total"], measure(other, name)["total"])
  if a.ode: result["ode"] = report_ode(a, ddpm, model, images, labels)
  if a.naive:
    first = np.zeros(a.naive, int)
    terms = trajectory_bound(ddpm, model, images[first], labels=None if labels is None else labels[first],
                             desc="trajectories", **options)
    result["naive"] = report_naive(index[0], *terms)
  if a.json:
    with atomic(a.json) as f: f.write(json.dumps(result, indent=1, default=float).encode() + b"\n")

if __name__ == "__main__": run(main)

"""The paper's figures and tables from a trained model: python figures.py 5 (rate and distortion), 6
(progressive generation), 7 (shared latents), 8 (interpolation), table4 (Figure 5 as a table), and
table2, which trains six small models: what is predicted, with which loss."""
import argparse, functools, itertools, math, sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
from tinygrad import Tensor
import data, evaluate, sample, train
from engine.batches import choose, drawing, mean_error
from engine.streams import normals, stream
from engine.terminal import number, parser, run
from extras import editing, guidance
from files import pictures
from files.atomic import atomic

class Model:  # a trained model; draw() is Algorithm 2 for the n rows of a figure
  def __init__(self, a:argparse.Namespace, n:int):
    self.path, self.net, self.ddpm, self.meta = sample.open_model(a)
    self.shape, self.classes = sample.image_shape(self.net), self.net.config["num_classes"]
    self.n, self.clip = a.n or n, self.meta.get("clip", True)
    self.labels = guidance.all_equally(self.n, guidance.trained(self.classes, self.meta), a.seed)
    self.times = sample.timesteps(self.ddpm.T, a.steps or self.ddpm.T)
    sampler = functools.partial(sample.sample_ddpm, self.ddpm, seed=a.seed, clip=self.clip, jits={})
    self.labelled = guidance.labelling(self.net, 1, self.meta.get("null_class", True))
    self.draw = drawing(sampler, self.labelled, a.batch)
  def save(self, a:argparse.Namespace, x:np.ndarray, columns:int):  # images in [-1, 1], row by row
    pictures.save_png(a.out, pictures.grid(data.to_uint8(x.reshape(-1, *self.shape)), columns))
  def images(self, a:argparse.Namespace) -> data.Dataset:
    return sample.open_images(a, "test", self.path, self.net, self.meta)[1]

def measured(a:argparse.Namespace, n:int) -> tuple[Model, evaluate.Bound]:  # of n test images
  m = Model(a, n)
  found = m.images(a)
  x = found.images[index := choose(len(found.images), m.n, a.seed, "evaluated images")]
  own = None if m.meta.get("null_class", True) else found.labels[index]
  y = guidance.told(own, found.classes, m.classes, m.meta, len(index))
  return m, evaluate.bound(m.ddpm, m.net, x, a.seed, 200, a.batch, m.clip, y, "bound")
def rate_distortion(T:int, b:evaluate.Bound) -> np.ndarray:
  """Section 4.3, Figure 5: rows (t, rate, distortion) of `bound`, from t = T down. rate: bits/dim
  sent once x_t is known: L_T and the terms of all times above t. distortion: the RMSE of x̂_0,
  estimated from x_t, on the scale 0..255. With strata, each row is the mean of one stratum."""
  spent = np.zeros(T + 2)                                  # the average image's term of each time
  np.add.at(spent, b.t, b.L * b.weight / len(b.t))
  above = b.L_T.mean() + spent[:0:-1].cumsum()[::-1]       # at t: L_T and the terms of times > t
  return np.stack([b.t.mean(0), above[b.t].mean(0), 127.5 * np.sqrt(b.mse_x0.mean(0))], 1)[::-1]
def figure_5(a:argparse.Namespace):
  """Figure 5: distortion and rate against the steps T−t, and distortion against rate."""
  m, b = measured(a, 64)
  t, rate, distortion = rate_distortion(m.ddpm.T, b).T
  steps, head = m.ddpm.T - t, "reverse_steps,rate_bits_per_dim,distortion_rmse"
  with atomic(Path(a.out).with_suffix(".csv")) as f:
    np.savetxt(f, np.stack([steps, rate, distortion], 1), "%.8g", ",", header=head, comments="")
  s, r, d = "reverse process steps (T-t)", "rate (bits/dim)", "RMSE (of 255)"
  curves = (steps, distortion, s, d), (steps, rate, s, r), (rate, distortion, r, d)
  plots = [pictures.plot({y_name: (x, y)}, "", x_name, y_name) for x, y, x_name, y_name in curves]
  pictures.save_png(a.out, pictures.joined(plots))
def table_4(a:argparse.Namespace):
  """Table 4: rate and distortion at every tenth of the reverse process."""
  m, b = measured(a, 64)
  T, rows = m.ddpm.T, rate_distortion(m.ddpm.T, b)
  print("T − t + 1    rate, bits/dim  distortion, RMSE")
  for tenth in range(10, 0, -1):
    t, rate, distortion = rows[np.abs(T - rows[:, 0] + 1 - T * tenth / 10).argmin()]
    print(f"{T - t + 1:>9.0f}{rate:>18.5f}{distortion:>18.5f}")
def figure_6(a:argparse.Namespace):
  """Figure 6: x̂_0 over time, a row for each image."""
  m = Model(a, 8)
  seen = {m.times[round(i)] for i in np.linspace(1, len(m.times) - 1, 10)}
  out = m.draw(sample.draw_x_T(m.n, m.shape, a.seed).numpy(), m.labels, m.times, keep=seen)
  m.save(a, np.stack([out[t][1] for t in sorted(seen, reverse=True)], 1), len(seen))
def figure_7(a:argparse.Namespace):
  """Figure 7: --k images from one x_t, for t near T, 3T/4, T/2, T/4. A row: x_t and its images."""
  m, k = Model(a, 1), a.k or 7
  near = [min(m.times[:-1], key=lambda t: abs(t - m.ddpm.T * q / 4)) for q in (4, 3, 2, 1)]
  levels, x_T = sorted(set(near), reverse=True), sample.draw_x_T(m.n, m.shape, a.seed).numpy()
  latents = m.draw(x_T, m.labels, m.times, keep=levels[1:]) | {levels[0]: (x_T, x_T)}
  rows, copies, labels = [], np.arange(m.n * k), m.labels.repeat(k)
  for i, t in enumerate(levels):
    x_t, rest = latents[t][0], [s for s in m.times if s <= t]
    index = m.n + (copies // k * len(levels) + i) * k + copies % k  # noise that no other image has
    x_0 = m.draw(x_t.repeat(k, 0), labels, rest, index=index)[0][0].reshape(m.n, k, *m.shape)
    rows.append(np.concatenate([x_t[:, None], x_0], 1))
  m.save(a, np.stack(rows, 1), k + 1)
def figure_8(a:argparse.Namespace):
  """Figure 8: x_t, x'_t ~ q(x_t | x_0) of two images at t = --at, mixed and decoded. A row: x_0,
  λ = 0, 0.1 .. 1, x'_0. In a row all λ share the noise of x_t and x'_t, and that of the decoding.
  (Section 4.4 prints x_0, x'_0 for x_t, x'_t.) --ddim: with DDIM's x_T, not in the paper."""
  m = Model(a, 4)
  at = a.at or (m.ddpm.T if a.ddim else (m.ddpm.T + 1) // 2)
  if at > m.ddpm.T: raise ValueError(f"--at {at}: choose 1 to T = {m.ddpm.T}")
  x0 = data.scaled(pairs(a, m))
  if len(x0) % 2 or not len(x0): raise ValueError("Figure 8 takes two images for each row")
  n, lam = len(x0) // 2, np.linspace(0, 1, 11, dtype=np.float32).reshape(-1, 1, 1, 1)
  eps = normals([stream(a.seed, "latents", i) for i in range(2 * n)], m.shape)
  x_t = m.ddpm.q_sample(Tensor(x0), at, Tensor(eps)).numpy().reshape(n, 2, 1, *m.shape)
  mixed = (1 - lam) * x_t[:, 0] + lam * x_t[:, 1]          # x̄ₜ = (1−λ) xₜ + λ x′ₜ
  none, times = np.full(11 * n, m.classes, np.int32), [at, *(t for t in m.times if t < at)]
  if a.ddim:
    mixed, m.draw = editing.between(m.ddpm, sample.SAMPLERS["ddim"], m.labelled, x0, none, times,
                                    lam, a.batch)
  x_0 = m.draw(mixed.reshape(-1, *m.shape), none, times, index=np.arange(n).repeat(11))[0][0]
  ends = x0.reshape(n, 2, 1, *m.shape)
  m.save(a, np.concatenate([ends[:, 0], x_0.reshape(n, 11, *m.shape), ends[:, 1]], 1), 13)
def pairs(a:argparse.Namespace, m:Model) -> np.ndarray:  # of --images or test images, for Figure 8
  if a.images: return editing.read(a.images, m.shape, m.meta.get("how"), m.meta.get("span"))
  x, rng = m.images(a).images, stream(a.seed, "interpolated images")
  return x[rng.choice(len(x), min(2 * m.n, len(x) // 2 * 2), replace=False)]
def table_2(a:argparse.Namespace):
  """Table 2's rows on a small budget, in bits/dim (the paper's columns are IS and FID)."""
  name, given = a.dataset or "glyphs", {"steps": a.steps, "seed": a.seed, "data-dir": a.data_dir}
  more = ["--no-class-conditional", "--min-snr=0", "--times=uniform", "--sample-every=0"]
  rows = itertools.product(("mu", "eps"), (("vlb", "learned"), ("vlb", "beta"), ("simple", "beta")))
  for predict, (loss, sigma) in rows:
    out = f"runs/table2/{Path(name).stem}-{predict}-{loss}-{sigma}"
    train.main(["--dataset", name, "--out", out, "--predict", predict, "--loss", loss, "--sigma",
                sigma, "--dtype", a.dtype, *more, *(f"--{k}={v}" for k, v in given.items() if v)])
    asked = argparse.Namespace(**vars(a) | {"checkpoint": out, "dataset": name, "steps": None})
    value, error = mean_error(measured(asked, 500)[1].total)
    print(f"{predict:>4}  L_{loss:<7}  {sigma:>8}  {value:9.4f} ± {error or math.nan:.4f} bits/dim")
FIGURES:dict[str, Callable[[argparse.Namespace], None]] = {
  "5": figure_5, "6": figure_6, "7": figure_7, "8": figure_8, "table2": table_2, "table4": table_4}

def main(argv:list[str]|None=None):
  p = parser("figures.py", "The paper's figures and tables.")
  p.add_argument("which", choices=FIGURES)
  sample.model_flags(add := p.add_argument)
  add("--n", type=number(int, 1), help="rows, or images that are measured")
  add("--steps", type=number(int, 1), help="of sampling (default: T); table2: of training")
  add("--k", type=number(int, 1, 100), help="7: images from one latent x_t (7)")
  add("--at", type=number(int, 1), help="8: the time of the latents (T/2; with --ddim T)")
  add("--ddim", action="store_true", help="8: along DDIM's latents, without noise")
  add("--images", nargs="+", metavar="FILE", help="8: two for each row, else test images")
  add("--dataset", help="default: the checkpoint's; table2: glyphs")
  add("--data-dir", help="where the dataset's files are")
  add("--out", help="the picture (figure.png); 5: beside it a .csv")
  a = p.parse_args(argv)
  of = dict(k="7", at="8", ddim="8", images="8", steps="6 7 8 table2", checkpoint="5 6 7 8 table4",
            dataset="5 8 table2 table4", data_dir="5 8 table2 table4", out="5 6 7 8")
  for flag, which in of.items():
    if vars(a)[flag] and a.which not in which.split():
      raise ValueError(f"--{flag.replace('_', '-')} is for figures.py {which.replace(' ', ', ')}")
  if a.images and (a.n or a.dataset): raise ValueError("--images: leave out --n and --dataset")
  places = [out := a.out or "figure.png"] + [str(Path(out).with_suffix(".csv"))] * (a.which == "5")
  editing.keep(a.images or (), *places)
  sample.check_places(*places)
  FIGURES[a.which](argparse.Namespace(**vars(a) | {"out": out}))
  if a.which.isdigit(): print("wrote " + ", ".join(places), file=sys.stderr)

if __name__ == "__main__": run(main)

"""The figures and tables of the paper, one command each, from a trained model.

  python figures.py 5        # rate and distortion: figure-5.png and .csv     table4: as a table
  python figures.py 6        # progressive generation     7: shared latents     8: interpolation
  python figures.py table2   # trains six small models: what is predicted, with which loss
"""
from __future__ import annotations
import argparse, functools, sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
from PIL import Image
from tinygrad import Tensor
import data, evaluate, train
from ddpm import DDPM
from engine import folder
from engine.batches import choose, drawing
from engine.streams import normals, stream
from engine.terminal import number, parser, run
from extras.guidance import all_equally, labelling
from files import pictures
from files.atomic import atomic
from sample import (SAMPLERS, check_places, draw_x_T, image_shape, model_flags, open_images,
                    open_model, timesteps)
from unet import UNet

class Model:
  """A trained model, and how figures draw with it. labels: of the images or the rows of a figure."""
  def __init__(self, a:argparse.Namespace, n:int):
    self.path, self.net, self.ddpm, self.meta = open_model(a)
    self.shape, classes = image_shape(self.net), self.net.config["num_classes"]
    self.clip, self.n = self.meta.get("clip", True), a.n or n
    self.labels = all_equally(self.n, classes, a.seed)
    sampler = functools.partial(SAMPLERS["ddpm"], self.ddpm, seed=a.seed, clip=self.clip, jits={})
    self.draw = drawing(sampler, labelling(self.net, 1), a.batch)
    self.times = timesteps(self.ddpm.T, min(a.steps or self.ddpm.T, self.ddpm.T))

# *** Section 4.3, Figure 5 and Table 4: rate and distortion ***

def rate_distortion(T:int, b:evaluate.Bound) -> np.ndarray:
  """Section 4.3, Figure 5, from `bound`: rows (t, rate, distortion), the first of the reverse
  process first.

  rate: bits/dim spent until x_t is known, which is L_T and the terms of all later times.
  distortion: the RMSE of x̂_0(x_t) on the scale 0..255. With strata a row averages over one."""
  spent = np.zeros(T + 2)                                  # the average image's term of each time
  np.add.at(spent, b.t, b.L * b.weight / len(b.t))
  later = b.L_T.mean() + np.array([spent[t + 1:].sum() for t in range(T + 1)])
  distortion = 127.5 * np.sqrt(b.mse_x0.mean(0))
  return np.stack([b.t.mean(0), later[b.t].mean(0), distortion], 1)[::-1]

def measured(a:argparse.Namespace) -> tuple[int, np.ndarray]:
  m = Model(a, 64)
  name, found = open_images(a, "test", m.path, m.net, m.meta)
  index = choose(len(found.images), m.n, a.seed, "evaluated images")
  classes = m.net.config["num_classes"]
  labels = np.full(len(index), classes, np.int32) if classes else None
  strata = min(200, max(1, m.ddpm.T - 1))
  b = evaluate.bound(m.ddpm, m.net, found.images[index], a.seed, strata, a.batch, m.clip, labels,
                     "bound")
  return m.ddpm.T, rate_distortion(m.ddpm.T, b)

def figure_5(a:argparse.Namespace):
  """Figure 5: distortion and rate against the steps T−t, and distortion against rate."""
  T, rows = measured(a)
  t, rate, distortion = rows.T
  with atomic(Path(a.out).with_suffix(".csv")) as f:
    np.savetxt(f, np.stack([T - t, rate, distortion], 1), "%.8g", ",", comments="",
               header="reverse_steps,rate_bits_per_dim,distortion_rmse")
  s, r, d = "reverse process steps (T−t)", "rate (bits/dim)", "RMSE (of 255)"
  curves = (("distortion", T - t, distortion, s, d), ("rate", T - t, rate, s, r),
            ("distortion against rate", rate, distortion, r, d))
  plots = [pictures.plot({name: (x, y)}, "", *axes) for name, x, y, *axes in curves]
  sheet = Image.new("RGB", (sum(p.width for p in plots), plots[0].height))
  for i, p in enumerate(plots): sheet.paste(p, (i * p.width, 0))
  pictures.save_png(a.out, sheet)

def table_4(a:argparse.Namespace):
  """Table 4: rate and distortion after every tenth of the reverse process."""
  T, rows = measured(a)
  print(f"{'T − t + 1':>10}{'rate, bits/dim':>18}{'distortion, RMSE':>18}")
  for tenth in range(10, 0, -1):
    t, rate, distortion = rows[np.abs(T - rows[:, 0] + 1 - T * tenth / 10).argmin()]
    print(f"{T - t + 1:>10.0f}{rate:>18.5f}{distortion:>18.5f}")

# *** Section 4.3, Figures 6 to 8 ***

def figure_6(a:argparse.Namespace):
  """Figure 6: x̂_0 over time, a row for each image."""
  m = Model(a, 8)
  last = len(m.times) - 1
  seen = sorted({m.times[round(i)] for i in np.linspace(1, last, 10)}, reverse=True)
  out = m.draw(draw_x_T(m.n, m.shape, a.seed).numpy(), m.labels, m.times, keep=seen)
  rows = np.stack([out[t][1] for t in seen], 1)
  pictures.save_png(a.out, pictures.grid(data.to_uint8(rows.reshape(-1, *m.shape)), len(seen)))

def figure_7(a:argparse.Namespace):
  """Figure 7: --k images from one x_t, for t near T, 3T/4, T/2 and T/4. A row: x_t, its images."""
  m, k = Model(a, 1), a.k
  quarters = [m.times[0] * q / 4 for q in (4, 3, 2, 1)]
  levels = sorted({min(m.times[:-1], key=lambda t: abs(t - q)) for q in quarters}, reverse=True)
  x = draw_x_T(m.n, m.shape, a.seed).numpy()
  latents = {levels[0]: (x, x)}
  if levels[1:]:
    down = m.times[:m.times.index(levels[-1]) + 1]
    latents |= m.draw(x, m.labels, down, keep=levels[1:])
  rows, labels = [], m.labels.repeat(k)
  for i, t in enumerate(levels):
    x_t, copies = latents[t][0], np.arange(m.n * k)
    index = m.n + (copies // k * len(levels) + i) * k + copies % k  # noise that no other image has
    x_0 = m.draw(x_t.repeat(k, 0), labels, [s for s in m.times if s <= t], index=index)[0][0]
    rows.append(np.concatenate([x_t[:, None], x_0.reshape(m.n, k, *m.shape)], 1))
  images = np.stack(rows, 1).reshape(-1, *m.shape)
  pictures.save_png(a.out, pictures.grid(data.to_uint8(images), k + 1))

def figure_8(a:argparse.Namespace):
  """Figure 8: x_t, x'_t ~ q(x_t | x_0) of two images at t = --at, mixed and decoded. A row: x_0, the
  images for λ = 0, 0.1 .. 1, x'_0.

  Section 4.3's text mixes x_0 where x_t is meant: x̄_t = (1−λ) x_t + λ x'_t, x̄_0 ~ p(x_0 | x̄_t). As
  there, one noise makes x_t for all λ; here that of the decoding is one too."""
  m = Model(a, 4)
  if not 1 <= a.at <= m.ddpm.T: raise ValueError(f"--at {a.at}: choose 1 to T = {m.ddpm.T}")
  x0 = data.scaled(pairs(a, m))
  n = len(x0) // 2
  eps = Tensor(normals([stream(a.seed, "latents", i) for i in range(2 * n)], m.shape))
  x_t = m.ddpm.q_sample(Tensor(x0), a.at, eps).numpy().reshape(n, 2, 1, *m.shape)
  mix = np.linspace(0, 1, 11, dtype=np.float32).reshape(-1, 1, 1, 1)
  mixed = (1 - mix) * x_t[:, 0] + mix * x_t[:, 1]          # x̄ₜ = (1−λ) xₜ + λ x′ₜ
  null = np.full(11 * n, m.net.config["num_classes"], np.int32)
  x_0 = m.draw(mixed.reshape(-1, *m.shape), null, [a.at, *(t for t in m.times if t < a.at)],
               index=np.arange(n).repeat(11))[0][0]
  ends = x0.reshape(n, 2, 1, *m.shape)
  rows = np.concatenate([ends[:, 0], x_0.reshape(n, 11, *m.shape), ends[:, 1]], 1)
  pictures.save_png(a.out, pictures.grid(data.to_uint8(rows.reshape(-1, *m.shape)), 13))

def pairs(a:argparse.Namespace, m:Model) -> np.ndarray:
  """The 2 n images of Figure 8: those of --images, or test images."""
  if a.images: return pictures.read(a.images, m.shape, m.meta.get("how") or {})
  name, found = open_images(a, "test", m.path, m.net, m.meta)
  if len(found.images) < 2 * m.n: raise ValueError(f"{name} has too few images for {m.n} pairs")
  index = stream(a.seed, "interpolated images").choice(len(found.images), 2 * m.n, replace=False)
  return found.images[index]

"""Algorithm 2 of DDPM (Ho, Jain, Abbeel 2020, arXiv:2006.11239): drawing images.

  python sample.py                             # 16 images of the newest run into samples.png
  python sample.py --sampler ddim --steps 50   # in a twentieth of the steps

SAMPLERS[name](ddpm, model, x_T, steps, seed=0, ...) yields (t, x_t, x̂_0) after each step: the time
that it reached, the image there, and the model's x̂_0. The last t is 0, or the last of `steps`."""
from __future__ import annotations
import argparse, functools, inspect, math, os, sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
import numpy as np
from tinygrad import Tensor
import data
from ddpm import DDPM
from engine import hosts
from engine.batches import asked, drawing
from engine.capture import captured, copied, identity, placed
from engine.device import open_device
from engine.folder import claim
from engine.streams import normals, stream
from engine.terminal import number, parser
from extras import editing
from extras.guidance import all_equally, labelling, trained
from extras.samplers import MOVES, Moves
from files import checkpoint, parts
from unet import DTYPES, UNet, lower

Visits = Iterator[tuple[int, Tensor, Tensor]]

def timesteps(T:int, steps:int) -> list[int]:
  """[T, ..., 0]: `steps` evenly spaced steps (DDIM, Appendix D.2). ValueError unless 1..T."""
  if not 1 <= steps <= T: raise ValueError(f"steps must be from 1 to T = {T}, not {steps}")
  return [round(T * i / steps) for i in range(steps, -1, -1)]

def draw_x_T(n:int, shape:tuple[int, ...], seed:int, first:int=0) -> Tensor:
  """Algorithm 2, line 1: x_T ~ N(0, I) of images first .. first + n − 1 of a seed, (n, *shape)."""
  return Tensor(normals([stream(seed, "x_T", i) for i in range(first, first + n)], shape)).realize()

# *** Algorithm 2 ***
def ancestral(ddpm:DDPM, chain:DDPM) -> Moves:
  """The paper's own sampler: one move, which needs noise."""
  return [ancestral_move], True

def ancestral_move(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, z:Tensor, clip:bool):
  """Algorithm 2, line 4: x_{t-1} ~ p_θ(x_{t-1} | x_t), with σ_t as the chain has it."""
  return d.p_sample(x_t, t, model(x_t, t).contiguous(), z, clip)

def sample_ddpm(ddpm:DDPM, model:Callable, x_T:Tensor|np.ndarray, steps:int|Sequence[int],
                seed:int=0, clip:bool=True, first:int|Sequence[int]=0, jits:dict|None=None,
                moves:Callable[..., Moves]=ancestral, **options) -> Visits:
  """Algorithm 2. Another sampler has other moves in the place of line 4, see extras/samplers.py.

  model: any model(x_t, t) on tensors. x_T: (B, C, H, W). steps: how many, evenly spread; or times
  [T_0, ..., T_n], x_T being at T_0; T_n may be above 0. Fewer than T are a shorter chain, `every`.
  seed, first: image i draws from (seed, i) alone, whatever the batch; first is the i of the first
  image, or a list of them all. clip: x̂_0 is brought into [-1, 1] (the authors' code, not in the
  paper). jits: a dict that keeps captured steps for the next call.
  ValueError for wrong steps, seeds, indices and options."""
  even = isinstance(steps, (int, np.integer))
  times = timesteps(ddpm.T, int(steps)) if even else list(np.atleast_1d(steps))  # type: ignore
  if len(times) < 2: raise ValueError(f"a sampler needs two times or more, not {times}")
  whole = times if times[-1] == 0 else [*times, 0]
  last = 1 + len(whole) - len(times)  # times that end above 0 leave out the last step of the chain
  chain = ddpm.every(whole)
  for name in set(options) - set(inspect.signature(moves).parameters):
    raise ValueError(f"the sampler {moves.__name__} has no option {name!r}")
  made, noisy = moves(ddpm, chain, **options)
  start = x_T.float() if isinstance(x_T, Tensor) else Tensor(np.asarray(x_T, np.float32))
  index = first + np.arange(len(x_T)) if isinstance(first, (int, np.integer)) else np.array(first)
  if index.shape != (len(x_T),) or index.dtype.kind not in "iu":
    raise ValueError(f"first must be a whole number, or one for each of {len(x_T)} images")
  rngs = [stream(seed, "z", int(i)) for i in index]
  key = (ddpm, *identity(model), *times, clip, moves, *options.items(), start.shape, start.device)
  step = {m: on_device(m, chain, model, clip, jits, (*key, i)) for i, m in enumerate(made)}
  def loop(x_t:Tensor) -> Visits:                  # 1: x_T ~ N(0, I)
    x0_hat = placed(np.zeros(x_t.shape, np.float32), str(x_t.device))
    for t in range(chain.T, last - 1, -1):         # 2: for t = T, ..., 1 do
      for move in made:
        z = normals(rngs, x_t.shape[1:]) if noisy else x0_hat  # 3: z ~ N(0, I), unused at t = 1
        x_t, x0_hat = step[move](x_t, t, z)        # 4: xₜ₋₁ = 1/√αₜ (xₜ − βₜ/√(1−ᾱₜ) ε_θ) + σₜ z
      if t == 1: x_t = x0_hat                      # every sampler: x_0 = μ_θ(x_1, 1), Section 3.3
      yield int(chain.times[t - 1]), x_t, x0_hat   # 5: end for
  return loop(start.clone().realize())             # 6: return x_0

def on_device(move:Callable, chain:DDPM, model:Callable, clip:bool, jits:dict|None,
              key:tuple) -> Callable[[Tensor, int, np.ndarray|Tensor], list[Tensor]]:
  """A move as one captured step: (x_t, t as the chain counts, noise z) -> x_{t-1} and x̂_0."""
  network = asked(chain, model)
  def step(x_t:Tensor, t:Tensor, z:Tensor) -> tuple[Tensor, ...]:
    return move(chain, network, x_t, t, z, clip)
  jit = captured(step, jits, key)
  def call(x_t:Tensor, t:int, z:np.ndarray|Tensor) -> list[Tensor]:
    at = placed(np.full(x_t.shape[0], t, np.int32), str(x_t.device))
    if not isinstance(z, Tensor): z = placed(z, str(x_t.device))
    return [copied(v, str(v.device)) for v in jit(x_t, at, z)]  # its next call writes over its own
  return call

SAMPLERS:dict[str, Callable[..., Visits]] = {"ddpm": sample_ddpm} | {
  name: functools.partial(sample_ddpm, moves=moves) for name, moves in MOVES.items()}

# *** a trained model ***
def open_model(a:argparse.Namespace) -> tuple[str, UNet, DDPM, dict]:
  """What --checkpoint means: its file, network, diffusion, and description. Opens the device."""
  open_device(a.tf32)
  path = checkpoint.find(a.checkpoint, a.raw)
  net, meta = checkpoint.load(path, a.raw)
  editing.keep_all(a, path, meta)
  return path, lower(net, DTYPES[a.dtype]), checkpoint.diffusion(meta, path), meta

def open_images(a:argparse.Namespace, split:str, path:str, net:UNet,
                meta:dict) -> tuple[str, data.Dataset]:
  """The name and the images of --dataset, or of what the model was trained on, read as those were.
  ValueError unless they fit the network."""
  name, shape = a.dataset or meta.get("dataset"), image_shape(net)
  if not name: raise ValueError(f"{path} does not name its images: say which by --dataset")
  found = editing.read_set(name, split, a.data_dir, shape[1:], meta)
  editing.say(name, found, split)
  if found.images.shape[1:] == shape: return name, found
  raise ValueError(f"the images of {name} are {found.images.shape[1:]}, those of {path} {shape}")

def image_shape(net:UNet) -> tuple[int, int, int]:
  """(C, H, W) of the network's images."""
  H, W = np.broadcast_to(net.config["image_size"], 2).tolist()
  return net.config["in_channels"], H, W

# *** the command ***
def model_flags(add:Callable):
  """The flags of every program that opens a trained model."""
  add("--checkpoint", help="file, run's folder, or name on the hub (default: the newest of runs/)")
  add("--raw", action="store_true", help="the weights as trained, not their moving average")
  add("--dtype", choices=DTYPES, default="float32", help="of activations and products")
  add("--tf32", action="store_true", help="NVIDIA: float32 products in TF32, on tensor cores")
  add("--seed", type=number(int, 0, 2**31 - 1), default=0)
  add("--batch", type=number(int, 1, 65536), default=64, help="images at once: memory, not result")

def arguments(argv:list[str]|None) -> argparse.Namespace:
  p = parser("sample.py", "Draws images from a trained model.")
  model_flags(add := p.add_argument)
  add("--sampler", choices=SAMPLERS, default="ddpm")
  add("--steps", type=number(int, 1), help="1 to T (default: T)")
  add("--eta", type=number(float, 0, 1), help="ddim's noise: 0 is none, 1 is σ² = beta_tilde")
  add("--no-clip", action="store_true", help="leave x̂_0 as it is, not brought into [-1, 1]")
  add("--n", type=number(int, 1), help="images (default: 16), or images of each class (8)")
  add("--first", type=number(int, 0, 2**53), default=0, help="the number of the first image (0)")
  add("--class", dest="label", metavar="K", help="by name or number (default: all classes equally)")
  add("--classes", action="store_true", help="a row of images for each class")
  add("--guidance", type=number(float, 0, 100), help="0: no label, 1: plain (default), >1: guided")
  add("--out", default="samples.png", help="a picture of the first 256 (default: %(default)s)")
  add("--npz", help="also the images as they are: arr_0, (N, H, W, C), and their labels, arr_1")
  add("--png", metavar="FOLDER", help="also a file for each image: 000000.png ...")
  add("--gif", help="also the reverse process of the first 256 as an animation")
  editing.flags(add)
  a = editing.check(p.parse_args(argv))
  if a.eta is not None and a.sampler != "ddim": p.error(f"--eta is for ddim, not for {a.sampler}")
  if a.label is not None and a.classes: p.error("--class is one class, --classes all: choose one")
  check_places(a.out, a.npz, a.gif, a.png and f"{a.png}/.png")
  return a

def check_places(*paths:str|None):
  """OSError for a file that cannot be written: better now than after an hour."""
  for path in (path for path in paths if path is not None):
    there = Path(path).absolute()
    folder = next(f for f in there.parents if f.exists())
    file = path and there.exists() == there.is_file()  # it is one, or is not there yet
    if not (file and folder.is_dir() and os.access(folder, os.W_OK)):
      raise OSError(f"cannot write {path or 'a file without a name'}")

def labels_of(a:argparse.Namespace, classes:int, meta:dict, path:str) -> np.ndarray:
  """The label of each image to draw. ValueError for a class that the model was not shown."""
  names, own, asked = meta.get("classes", []), trained(classes, meta), a.classes or a.label
  if not classes and (asked or a.guidance is not None):
    raise ValueError(f"{path} is trained without classes")
  if asked and a.guidance == 0: raise ValueError("--guidance 0 draws without a class: leave it out")
  if a.classes: return own.repeat(a.n or 8)
  if a.label is None and editing.asked(a): return np.full(a.n, classes, np.int32)
  if a.label is None: return all_equally(a.n or 16, own, a.seed, a.first)
  numbers = [] if any(map(str.isdecimal, names)) else [*map(str, range(classes))]
  known = {name: i for words in (numbers, names) for i, name in enumerate(words) if i in own}
  if a.label in known: return np.full(a.n or 16, known[a.label], np.int32)
  shown = ", ".join(name for i, name in enumerate(names) if i in own) or f"0 to {classes - 1}"
  raise ValueError(f"--class {a.label}: {path} knows {shown}")

def main(argv:list[str]|None=None):
  a = arguments(argv)
  path, net, ddpm, meta = open_model(a)
  classes, names = net.config["num_classes"], meta.get("classes", [])
  labels = labels_of(a, classes, meta, path)
  times, n = timesteps(ddpm.T, a.steps or ddpm.T), len(labels)
  options = {} if a.eta is None else {"eta": a.eta}
  sampler = functools.partial(SAMPLERS[a.sampler], ddpm, seed=a.seed, jits={}, **options,
                              clip=meta.get("clip", True) and not a.no_clip)
  guidance = 1 if a.guidance is None else a.guidance
  labelled = labelling(net, guidance, meta.get("null_class", True))
  if editing.edit(a, ddpm, sampler, labelled, image_shape(net), meta, labels, times): return
  draw = drawing(sampler, labelled, a.batch)
  print(f"{path}: {a.sampler}, {len(times) - 1} steps", file=sys.stderr)
  seen = [times[round(i)] for i in np.linspace(1, len(times) - 1, 50)] if a.gif else [0]
  size = math.ceil(n / math.ceil(n / min(a.batch, math.ceil(n / hosts.size()))))
  def batch(start:int) -> tuple[np.ndarray, np.ndarray]:  # the images, and what is shown of them
    x_T = draw_x_T(size, image_shape(net), a.seed, a.first + start).numpy()
    i = np.arange(start, start + size)
    keep = seen if start < parts.SHOWN else [0]
    out = draw(x_T, labels[i % n], times, keep, a.first + i, f"images {start + 1} on, of {n}")
    shown = [x_T, *(out[t][0] for t in sorted(out, reverse=True))]
    movie = np.stack([data.to_uint8(x[:n - start]) for x in shown])
    return data.unscaled(shown[-1][:n - start], meta.get("limits")), movie
  facts = {k: v for k, v in vars(a).items() if k not in ("checkpoint", "batch", "out", "npz")}
  place = parts.place(a.npz or a.png or a.out, net, meta, labels, size, facts)
  index = range(a.first, a.first + n)
  if hosts.rank() == 0: parts.check(place, a.png, index, a.out, a.npz, a.gif)
  with claim(place), parts.kept(place, a.png, index, hosts.rank() == 0):
    starts = range(0, n, size)
    hosts.same(missing := parts.missing(place, starts, a.png, a.first))
    for start in np.array(starts)[missing][hosts.rank()::hosts.size()]:
      parts.save(place, start, *batch(start), a.png, a.first)
    hosts.gather(missing)  # waits for all
    if hosts.rank() == 0: parts.write(a, place, labels, classes, names)

if __name__ == "__main__": hosts.run(main)

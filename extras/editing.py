"""What a trained model does with images of one's own: it mends, changes and encodes them. Not in the paper.

  python sample.py --inpaint photo.png --mask mask.png   # draws anew what is white in the mask
  python sample.py --from a.png b.png --at 500           # 500 steps of noise, then Algorithm 2 from there
  python sample.py --encode photo.png                    # DDIM's x_T of it, and the way back
"""
import argparse, functools, itertools, os, sys, warnings
from collections.abc import Callable, Sequence
from pathlib import Path
import numpy as np
from tinygrad import Tensor
import data
from ddpm import DDPM, column
from engine.batches import drawing
from engine.capture import captured, identity, placed
from engine.streams import normals, stream
from engine.terminal import number
from extras.samplers import Moves, at_time, denoise
from files import pictures
from files.bar import progress
from files.dataset import plan
from files.images import brightness, decode, measure, reason

# *** inpainting ***

def inpaint(ddpm:DDPM, chain:DDPM, x0:Tensor, drawn:Tensor, resample:int=0) -> Moves:
  """RePaint, Lugmayr et al. 2022 (arXiv:2201.09865), Algorithm 1, with the model as it is: moves for sample.py's loop.

  x0 (1, C, H, W): an image; drawn (1, 1, H, W), bool: the pixels to draw, the others are kept. At each t > 1 the step
  is taken and undone `resample` times before it stands. One step alone knows what is kept only through its noise; the
  more there are, the nearer the drawn pixels come to their law given the kept ones."""
  step, undone = (functools.partial(inpaint_move, x0=x0, drawn=drawn, least=least) for least in (1, 2))
  moves:list[Callable] = [undone, step_back] * resample
  return [*moves, step], True

def inpaint_move(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, z:Tensor, clip:bool, x0:Tensor, drawn:Tensor, least:int):
  """x_{t-1}: drawn pixels of p_θ(x_{t-1} | x_t), kept ones of q(x_{t-1} | x_0), Eq. 4: x_0 itself at t = 1. Below the
  time `least` x_t stays."""
  x, x0_hat = d.p_sample(x_t, t, model(x_t, t).contiguous(), z, clip)
  x = drawn.where(x, at_time(d, x0.expand(x.shape), z, t - 1))
  return column(t >= least, x).where(x, x_t), drawn.where(x0_hat, x0)

def step_back(d:DDPM, model:Callable, x:Tensor, t:Tensor, z:Tensor, clip:bool):
  """q(x_t | x_{t-1}), Eq. 2: undoes a step. At t = 1 none was taken."""
  return column(t > 1, x).where(d.q_step(x, t, z), x), x

# *** DDIM's latents ***

def ddim_encode(ddpm:DDPM, model:Callable, x0:Tensor, times:Sequence[int], rounds:int=2,
                jits:dict|None=None) -> Tensor:
  """The x_t from which DDIM (η = 0, unclipped) draws x_0 along times = [t, ..., 0]: Song, Meng, Ermon 2021
  (arXiv:2010.02502), Section 4.3.

  A step up solves DDIM's Eq. 12 for x_t, with ε̂ of x_t: (x_t−√(1−ᾱ_t) ε̂)/√ᾱ_t = (x_{t−1}−√(1−ᾱ_{t−1}) ε̂)/√ᾱ_{t−1}
  It begins at x_{t−1} and takes ε̂ of what it finds, `rounds` times; the model is never asked about time 0."""
  chain = ddpm.every(times)
  told = Tensor(chain.times.astype(np.int32)).realize()
  def network(x:Tensor, t:Tensor) -> Tensor: return model(x, told.to(x.device)[t])
  def step(x_t:Tensor, before:Tensor, t:Tensor) -> tuple[Tensor]:
    eps = denoise(chain, network, x_t, t, False)[1]
    start = before - chain.at(chain.noise_std, t - 1, x_t) * eps
    return (at_time(chain, start / chain.at(chain.sqrt_alpha_bar, t - 1, x_t), eps, t),)
  up = captured(step, jits, ("encode", ddpm, *identity(model), tuple(times), x0.shape, x0.device))
  x_t = x0.float()
  for t in progress(range(1, chain.T + 1), "encoding", chain.T):
    before, x_t = x_t.clone().realize(), x_t.clone().realize()  # a captured step takes no tensor twice
    time = placed(np.full(x0.shape[0], t, np.int32), str(x_t.device))
    for _ in range(rounds): x_t = up(x_t, before, time)[0].clone().realize()
  return x_t

def encode_all(ddpm:DDPM, labelled:Callable, x0:np.ndarray, labels:np.ndarray, times:list[int], most:int) -> np.ndarray:
  """`ddim_encode` for images x0 (N, C, H, W) with their labels, at most `most` at once; labelled: see `drawing`."""
  jits:dict = {}
  return np.concatenate([
    ddim_encode(ddpm, labelled(labels[i:i+most]), Tensor(x0[i:i+most]), times, jits=jits).numpy()
    for i in range(0, len(x0), most)])

def between(ddpm:DDPM, ddim:Callable, labelled:Callable, x0:np.ndarray, labels:np.ndarray, times:list[int],
            mix:np.ndarray, most:int) -> tuple[np.ndarray, Callable]:
  """DDIM's latents of the pairs x0 (2 n, C, H, W), mixed, (n, λ, C, H, W), and the `drawing` that decodes them: what
  Figure 8 becomes without noise. ddim: the sampler; labels: of n λ images."""
  x = encode_all(ddpm, labelled, x0, labels[:len(x0)], times, most).reshape(-1, 2, 1, *x0.shape[1:])
  return spherical(x[:, 0], x[:, 1], mix), drawing(functools.partial(ddim, ddpm, clip=False, jits={}), labelled, most)

def spherical(a:np.ndarray, b:np.ndarray, mix:np.ndarray) -> np.ndarray:
  """(sin((1−λ)θ) a + sin(λθ) b)/sin θ, with θ the angle between a and b: from latents (..., C, H, W) to others, which
  have their length all the way (DDIM, Appendix D.5)."""
  dot = lambda u, v: (u * v).sum((-3, -2, -1), keepdims=True)
  cosine = dot(a, b) / np.maximum(np.sqrt(dot(a, a) * dot(b, b)), 1e-30)
  angle = np.arccos(cosine.astype(np.float64).clip(-1, 1)).clip(1e-6, np.pi - 1e-6)
  return ((np.sin((1 - mix) * angle) * a + np.sin(mix * angle) * b) / np.sin(angle)).astype(np.float32)

# *** images of one's own ***

def read(paths:Sequence[str], shape:tuple[int, ...], how:dict|None=None, span:Sequence[float]|None=None) -> np.ndarray:
  """Image files as uint8 (N, C, H, W) of a shape (C, H, W), fitted as the model's own set was: how, its meta["how"];
  span, its meta["span"], which values of more than 8 bits are black and white.

  What this changes is said on stderr. ValueError for a file that is no image."""
  return np.stack([read_one(path, shape, how or {}, span)[0] for path in paths])

def read_set(name:str, split:str, data_dir:str|None, size:tuple[int, ...], meta:dict) -> data.Dataset:
  """A dataset, read as the set of a model was, and in the height and width `size` if it is another. meta: what the
  model's checkpoint says of itself."""
  how, own = meta.get("how", {}), meta.get("dataset") or ""
  if name in data.DATASETS: return data.read(name, split, data_dir, **how if name == own else {})
  if "size" not in how or os.path.realpath(os.path.expanduser(name)) != os.path.realpath(os.path.expanduser(own)):
    how = how | {"size": size}
  if name.lower().endswith((".npy", ".npz")): how = how | {"mode": None}
  return data.read(name, split, data_dir, **how)

def read_one(path:str, shape:tuple[int, ...], how:dict,
             span:Sequence[float]|None=None) -> tuple[np.ndarray, tuple[int, int]]:
  """One image, and the height and width that its file has."""
  C, *size = shape
  if C not in (1, 3): raise ValueError(f"{path} cannot have the {C} channels of the model's images, only 1 or 3")
  try:
    with open(path, "rb") as f, warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
      found, multiple = measure(f), how.get("multiple", 1)
      cut = how.get("size") is None and [side // multiple * multiple for side in found.shape] == size
      asked_size = None if cut else (size[0], size[1])
      to = plan([found.shape], asked_size, multiple, how.get("fit", "crop"))
      known, words = brightness([d for d in [found.depth] if d], span)
      f.seek(0)
      x, _ = decode(to._replace(gray=C == 1, span=known), f)
  except Exception as e:  # Pillow raises nearly anything on a damaged file
    raise ValueError(f"{path} cannot be read as an image: {reason(e)}") from e
  said = [text.removeprefix("1 of 1 images ") for text in (*to.said, *words)]
  if found.clear: said.append("with transparency, put on white")
  if found.deep: said.append("16 bits in each of several channels, of which the upper 8 are read")
  if found.frames > 1: said.append(f"the first of {found.frames} pages or frames")
  if C == 1 and not found.gray: said.append("made gray")
  if C == 3 and found.gray: said.append("gray in three equal channels")
  if said: print(f"{path}: {', '.join(said)}", file=sys.stderr)
  return x, found.shape

def read_mask(path:str, photo:str, shape:tuple[int, ...], how:dict,
              span:Sequence[float]|None=None) -> tuple[np.ndarray, np.ndarray]:
  """A photo, uint8 (1, C, H, W), and where its mask is white, bool (1, 1, H, W). ValueError for a mask of another size,
  and for one that has all or nothing white."""
  (x, size), (mask, mask_size) = read_one(photo, shape, how, span), read_one(path, (1, *shape[1:]), how)
  if mask_size != size:
    raise ValueError(f"{path} is {mask_size[0]}x{mask_size[1]}, but {photo} is {size[0]}x{size[1]}")
  drawn, fitted = mask > 127, "" if size == shape[1:] else f" as {shape[1]}x{shape[2]}, the size of the model's images"
  if not drawn.any(): raise ValueError(f"{path} has nothing white in it{fitted}: what is white is drawn anew")
  if drawn.all(): raise ValueError(f"{path} is all white{fitted}: nothing of {photo} would be kept")
  return x[None], drawn[None]

# *** sample.py's flags ***

def flags(add:Callable):
  add("--inpaint", metavar="IMAGE", help="draw a part of it anew, what is white in --mask")
  add("--mask", metavar="IMAGE", help="for --inpaint, of the same size")
  add("--resample", type=number(int, 0, 1000), metavar="U", help="for --inpaint: undo each step U times (5)")
  add("--from", dest="start", nargs="+", metavar="IMAGE", help="draw from these, with the noise of time --at")
  add("--encode", nargs="+", metavar="IMAGE", help="DDIM's x_T of these (or x_t, --at t), and the way back")
  add("--at", type=number(int, 1), metavar="t", help="for --from and --encode: 1 to T")

def keep(given:Sequence[str|None], *outs:str|None):
  """ValueError if a file given would be written over, or two files to be written have one name."""
  for path, out in itertools.product(filter(None, given), filter(None, outs)):
    if Path(path).resolve() == Path(out).resolve(): raise ValueError(f"{path} would be written over by {out}")
  names = [Path(out).resolve() for out in filter(None, outs)]
  if len({*names}) < len(names): raise ValueError("two of the files to be written have one name: choose another")

def keep_all(a:argparse.Namespace, path:str|None, meta:dict, *outs:str|None):
  """`keep` for what a command reads: a model, with the run's folder that it lies in, and datasets. meta: the model's;
  outs: what is written besides what the flags a name."""
  outs = *outs, *(vars(a).get(k) for k in ("out", "npz", "gif", "png", "json"))
  run = [Path(path).with_name(k) for k in ("log.jsonl", "last.safetensors", "ema.safetensors")] if path else []
  keep([path, *(str(file) for file in run if file.exists())], *outs)
  for name in (meta.get("dataset"), vars(a).get("dataset"), *vars(a).get("against", ())): keep_set(name, *outs)

def keep_set(name:str|None, *outs:str|None):
  """`keep` for a dataset of one's own; ValueError also if a file would be written into its folder."""
  if not name or name in data.DATASETS: return
  keep([path := os.path.expanduser(name)], *outs)
  for out in filter(None, outs if os.path.isdir(path) else ()):
    if Path(out).resolve().is_relative_to(Path(path).resolve()):
      raise ValueError(f"{out} would lie among the images of {name}: choose another place")

def say(name:str, found:data.Dataset, split:str="train"):
  """Says on stderr how a dataset was read, what it left out, and whether images for testing were asked of one that has
  none apart."""
  said = [*found.said, *found.left]
  if split == "test" and not found.heldout: said.append("it is not split into train and test: all of it is taken")
  if said: print(f"{name}: {'; '.join(said)}", file=sys.stderr)

def asked(a:argparse.Namespace) -> list[str]:
  """The image files that are to be edited, none without such a flag."""
  return [a.inpaint] if a.inpaint else a.start or a.encode or []

def check(a:argparse.Namespace) -> argparse.Namespace:
  """The flags, with what an edit means: 8 images, or for --encode DDIM without clipping. ValueError for flags that do
  not go together."""
  edits, given = bool(a.inpaint) + bool(a.start) + bool(a.encode), asked(a)
  labelled, unused = a.label is not None or a.classes, a.n or a.classes or a.npz or a.eta is not None
  for wrong, sentence in (
    (edits > 1, "--inpaint, --from and --encode: choose one"),
    (bool(a.inpaint) != bool(a.mask), "--inpaint and --mask need each other"),
    (a.resample is not None and not a.inpaint, "--resample is for --inpaint"),
    (a.at and not (a.start or a.encode), "--at is for --from and --encode"),
    (a.start and not a.at, "--from needs --at, the time whose noise the image gets"),
    (given and (a.gif or a.png or a.first), "--gif, --png and --first are not for --inpaint, --from or --encode"),
    (given and a.guidance and not labelled, "--guidance needs --class or --classes here"),
    (a.inpaint and a.sampler != "ddpm", "--inpaint is for Algorithm 2: leave out --sampler"),
    (a.encode and a.sampler not in ("ddpm", "ddim"), "--encode is by DDIM: leave out --sampler"),
    (a.encode and unused, "--n, --classes, --npz and --eta are not for --encode")):
    if wrong: raise ValueError(sentence)
  keep([*given, a.mask], a.out, a.npz)
  if given: a.n = a.n or 8
  if a.resample is None: a.resample = 5
  if a.encode: a.n, a.sampler, a.no_clip = 1, "ddim", True
  return a

def edit(a:argparse.Namespace, ddpm:DDPM, sampler:Callable, labelled:Callable, shape:tuple[int, ...], meta:dict,
         labels:np.ndarray, times:list[int]) -> bool:
  """Draws and writes what the flags ask for; False if that is no edit. In the picture each row is led by its image.

  sampler and labelled: see `drawing`. labels: of the images that are drawn from each of those given."""
  if not asked(a): return False
  how, span, drawn = meta.get("how") or {}, meta.get("span"), None
  if a.inpaint: photos, drawn = read_mask(a.mask, a.inpaint, shape, how, span)
  else: photos = read(asked(a), shape, how, span)
  repeats, labels = len(labels), np.tile(labels, len(photos))
  x0 = data.scaled(photos).repeat(repeats, 0)
  x = normals([stream(a.seed, "x_T", i) for i in range(len(x0))], shape)
  given = [photos]
  if drawn is not None:
    sampler = functools.partial(sampler, moves=inpaint, resample=a.resample, x0=Tensor(x0[:1]).realize(),
                                drawn=Tensor(drawn).realize())
    given = [np.where(drawn, np.uint8(128), photos)]
  else:
    at = a.at or ddpm.T
    if at > ddpm.T: raise ValueError(f"--at {at}: choose 1 to T = {ddpm.T}")
    times = [at, *(t for t in times if t < at)]
    if a.encode:
      x = encode_all(ddpm, labelled, x0, labels, times, a.batch)
      given.append(data.to_uint8(x))
    else: x = ddpm.q_sample(Tensor(x0), at, Tensor(x)).numpy()
  x = drawing(sampler, labelled, a.batch)(x, labels, times)[0][0]
  known = labels if a.classes or a.label is not None else None
  if a.npz: pictures.save_npz(a.npz, data.unscaled(x, meta.get("limits")), known)
  rows = len(x) // a.n
  left = np.stack(given, 1).repeat(rows // len(photos), 0)
  images = np.concatenate([left, data.to_uint8(x).reshape(rows, a.n, *shape)], 1)
  pictures.save_png(a.out, pictures.grid(images.reshape(-1, *shape), images.shape[1]))
  for path, back, photo in zip(a.encode or (), x, x0):
    error = 127.5 * np.sqrt(np.square(back.clip(-1, 1) - photo).mean())
    print(f"{path} comes back with an error of {error:.2f} of 255 (root mean square)", file=sys.stderr)
  print("wrote " + ", ".join(filter(None, (a.out, a.npz))), file=sys.stderr)
  return True

"""Section 4, the experiments' set-up: datasets as uint8 arrays, and batches of them.

Images are uint8 (N, C, H, W) everywhere on the host; the device alone sees x / 127.5 - 1. Whatever is wrong with a
name, a file or the network is said in one sentence, by a ValueError or an OSError that the scripts print as it is.
"""
from __future__ import annotations
import contextlib, functools, gzip, hashlib, http.client, io, math, os, sys, tarfile
import urllib.request, warnings, zipfile, zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from files.atomic import atomic
from engine.streams import stream
from files.bar import progress

DATASETS = ("glyphs", "mnist", "fashion_mnist", "cifar10")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow opens more kinds, some by other programs
Item = tuple[int, str, Callable[[], IO]]  # an image: label, name to show, function that opens it
LIMIT = 1 << 28  # bytes: no file of these datasets is as large, so nothing larger is fetched, unpacked or believed

# Where a dataset may lie inside a data folder, and its mirrors: the first one that answers with the right bytes wins.
PLACES = {"mnist": ("mnist", "MNIST/raw"), "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
          "cifar10": ("cifar10", "cifar-10-batches-bin", "cifar10-jpg-train", "cifar10-jpg-test")}
MIRRORS = {
  "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
  "fashion_mnist": ("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
  "cifar10": ("https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
              "https://www.cs.toronto.edu/~kriz/",  # the origin, but slow
              "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/")}
SHA256 = {  # of the file as published or, for MNIST (repacked by its mirrors), of what the gzip holds
  "mnist": {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
  "fashion_mnist": {
    "train-images-idx3-ubyte.gz": "08dc20ab1689590a0bcd66e874647b6ee8464e2d501b5a3f1f78831db19a3fdc",
    "train-labels-idx1-ubyte.gz": "b0197879cbda89f3dc7b894f9fd52b858e68ea4182b6947c9d8c2b67e5f18dcc",
    "t10k-images-idx3-ubyte.gz": "78dcbbfb5a27efaf1b6c1d616caca68560be8766c5bffcb2791df9273a534229",
    "t10k-labels-idx1-ubyte.gz": "42bd18137a62d5998cdeae52bf3a0676ac6b706f5cf8439b47bb5b151ae3dccf"},
  "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}}

# *** datasets ***

def load(name:str|os.PathLike, split:str="train", data_dir:str|os.PathLike|None=None, size:int|None=None,
         multiple:int=8) -> tuple[np.ndarray, np.ndarray]:
  """A dataset's images, uint8 (N, C, H, W), and labels, int32 (N,), for split "train" or "test".

  name: "glyphs" (16x16x1, drawn on the spot), "mnist", "fashion_mnist" (28x28x1), "cifar10" (32x32x3), or the path of
  a folder of images. Files are looked for in data_dir, then $DATA_DIR, then the cache ($XDG_CACHE_HOME/ddpm or
  ~/.cache/ddpm); what is nowhere is downloaded into the cache and checked by its SHA-256.

  A folder is read with all its sub-folders; the class is the sub-folder's name, numbered in sorted order, and images
  directly in it form a class of their own, the first. With sub-folders train/ and test/ the split picks one of them
  (and the class is the folder inside); without, both splits are the whole folder. What Pillow cannot read is skipped
  and named on stderr. Transparent pixels become white, as on a page; an animation gives its first frame; C is 1 if
  every image is gray, else 3. `size` (a folder only): images are cropped to the central square and resized to it; by
  default the size most of the images have, if it is square, else the median of their shorter sides, at most 64, down
  to a multiple of `multiple`, which is that of the network's levels.

  Raises ValueError for an unknown name or split and for damaged or missing images, OSError for a failed download."""
  if split not in ("train", "test"): raise ValueError(f"there is no split {split!r}: choose train or test")
  name = os.path.expanduser(str(name))
  if name in DATASETS:
    if size is not None: raise ValueError(f"a size fits a folder of images only: {name} comes in its own size")
    if name == "glyphs": return glyphs(split)
    if data_dir is not None and not os.path.isdir(data_dir): raise FileNotFoundError(f"{data_dir} is no data folder")
    return cifar10(split, data_dir) if name == "cifar10" else mnist(name, split, data_dir)
  if not os.path.isdir(name):
    raise ValueError(f"unknown dataset {name!r}: choose {', '.join(DATASETS)} or a folder of images")
  if size is not None and not 1 <= size <= 4096: raise ValueError(f"a size of {size}: choose 1 to 4096 pixels")
  halves = all(os.path.isdir(os.path.join(name, half)) for half in ("train", "test"))
  classes:set[str] = set()
  found:list[tuple[str, Path]] = []
  for path in image_files(Path(name)):
    half, *inner = path.parts if halves else (split, *path.parts)
    if half not in ("train", "test") or not inner: continue
    classes.add(label := inner[0] if len(inner) > 1 else "")
    if half == split: found.append((label, path))
  number = {c: i for i, c in enumerate(sorted(classes))}  # over both halves: a class missing from one shifts nothing
  items:list[Item] = [(number[c], str(path), functools.partial(open, Path(name, path), "rb")) for c, path in found]
  return read_images(items, f"{name}/{split}" if halves else name, size, multiple)

def glyphs(split:str="train") -> tuple[np.ndarray, np.ndarray]:
  """Digits in Pillow's own font, white on black, in random place, size, slant, weight and noise: uint8 (N, 1, 16, 16)
  and int32 (N,), N = 10,000 ("train") or 2,000 ("test"). The same bytes every time with the same Pillow and numpy."""
  n, seed = (10_000, 1) if split == "train" else (2_000, 2)
  rng, font = np.random.default_rng(seed), ImageFont.load_default(size=48)
  stencils = {}
  for digit in range(10):
    for weight in range(3):
      x0, y0, x1, y1 = font.getbbox(str(digit), stroke_width=weight)
      canvas = Image.new("L", (80, 80))
      ImageDraw.Draw(canvas).text((40 - (x0 + x1) / 2, 40 - (y0 + y1) / 2), str(digit), 255, font, stroke_width=weight)
      stencils[digit, weight] = canvas, y1 - y0
  labels = rng.permutation(np.arange(n, dtype=np.int32) % 10)
  images = np.empty((n, 16, 16), np.float32)
  for i, (weight, slant, height, dx, dy) in enumerate(zip(rng.integers(0, 3, n), rng.uniform(-0.15, 0.35, n),
                                                          rng.uniform(9.5, 14, n), *rng.uniform(-1, 1, (2, n)))):
    canvas, ink = stencils[int(labels[i]), int(weight)]
    # drawn at twice the size, then averaged; a = stencil pixels per drawn pixel, (cx, cy) = the digit's middle
    a, cx, cy = ink / (2 * height), 16 + dx * (16 - height) * 0.7, 16 + dy * (16 - height) * 0.9
    affine = a, a * slant, 40 - a * cx - a * slant * cy, 0, a, 40 - a * cy
    small = canvas.transform((32, 32), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(2)
    images[i] = np.asarray(small)
  noisy = images * rng.uniform(0.8, 1, (n, 1, 1)) + rng.normal(0, 4, images.shape)
  return np.rint(noisy.clip(0, 255)).astype(np.uint8)[:, None], labels

def places(name:str, data_dir:str|os.PathLike|None) -> Iterator[Path]:
  """The folders in which a dataset's files may lie, in the order of the contract: data_dir, $DATA_DIR, the cache."""
  for base in (data_dir, os.environ.get("DATA_DIR"), cache()):
    if not base: continue
    yield from (Path(base, place) for place in PLACES[name])
    # MNIST and Fashion-MNIST share their file names, so a bare folder of them is told apart by the folder's name
    if name == "cifar10" or ("fashion" in Path(base).resolve().name.lower()) == (name == "fashion_mnist"):
      yield Path(base)

def cache() -> Path: return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ddpm")

def mnist(name:str, split:str, data_dir:str|os.PathLike|None) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of "mnist" or "fashion_mnist": IDX files, gzipped or not."""
  part = {"train": "train", "test": "t10k"}[split]
  wanted = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
  for folder in places(name, data_dir):
    pair = [folder / (file if os.path.isfile(folder / file) else f"{file}.gz") for file in wanted]
    if all(map(os.path.isfile, pair)): break
  else: pair = [download(name, f"{file}.gz") for file in wanted]
  images, labels = read_idx(pair[0], 3), read_idx(pair[1], 1)
  if len(images) != len(labels):
    raise ValueError(f"{pair[0]} holds {len(images)} images but {pair[1]} {len(labels)} labels: fetch both again")
  if labels.max() > 9: raise ValueError(f"{pair[1]} holds the label {labels.max()}, not 0 to 9: fetch it again")
  return images[:, None], labels.astype(np.int32)

def read_idx(path:Path, ndim:int) -> np.ndarray:
  """The array of an IDX file of bytes with `ndim` dimensions; ValueError unless every byte is where it should be."""
  try:
    with open(path, "rb") as raw:
      f:gzip.GzipFile|io.BufferedReader = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
      head = f.read(4 + 4 * ndim)
      if len(head) < 4 + 4 * ndim or head[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(f"{path} is not an IDX file of bytes in {ndim} dimensions: fetch it again")
      shape = [int.from_bytes(head[i:i + 4], "big") for i in range(4, 4 + 4 * ndim, 4)]
      count, blob = math.prod(shape), bytearray()
      if not 0 < count < LIMIT: raise ValueError(f"{path} claims an impossible size of {shape}: fetch it again")
      while len(blob) <= count and (chunk := f.read(1 << 20)): blob += chunk  # piecewise: the claim allocates nothing
  except (OSError, EOFError, zlib.error) as e: raise ValueError(f"{path} cannot be read ({e}): fetch it again") from e
  if len(blob) != count:
    raise ValueError(f"{path} holds {'less' if len(blob) < count else 'more'} than its header says: fetch it again")
  return np.frombuffer(blob, np.uint8).reshape(shape)

def cifar10(split:str, data_dir:str|os.PathLike|None) -> tuple[np.ndarray, np.ndarray]:
  """CIFAR-10 from its binary version, in a .tar.gz or unpacked, or from JPEG copies, zipped or in folders."""
  batches = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
  for folder in places("cifar10", data_dir):
    tar, jpegs = folder / "cifar-10-binary.tar.gz", folder / f"cifar10-jpg-{split}.zip"
    if all(os.path.isfile(folder / file) for file in batches): return cifar_binary(folder, batches)
    if os.path.isfile(tar): return cifar_binary(tar, batches)
    if os.path.isfile(jpegs): return cifar_jpegs(jpegs)
    if os.path.isdir(folder / split / "airplane"): return cifar_jpegs(folder / split)
  return cifar_binary(download("cifar10", tar.name), batches)

def cifar_binary(source:Path, batches:list[str]) -> tuple[np.ndarray, np.ndarray]:
  """Files of records, at most 10,000 in each: a label byte and 3 x 32 x 32 pixels."""
  try:
    with contextlib.ExitStack() as stack:
      archive = None if source.is_dir() else stack.enter_context(tarfile.open(source, "r:gz"))
      files = [archive.extractfile(f"cifar-10-batches-bin/{file}") if archive else
               stack.enter_context(open(source / file, "rb")) for file in batches]
      blobs = [f.read(30_730_001) if f else b"" for f in files]  # one byte too many shows a longer file
  except Exception as e:  # a damaged archive raises nearly anything
    raise ValueError(f"{source} cannot be read ({e}): fetch it again") from e
  for file, blob in zip(batches, blobs):
    if not blob or len(blob) % 3073:
      raise ValueError(f"{file} in {source} is not 1 to 10,000 records of 3,073 bytes: fetch it again")
  records = np.frombuffer(bytearray().join(blobs), np.uint8).reshape(-1, 3073)
  if records[:, 0].max() > 9: raise ValueError(f"{source} holds a label that is not 0 to 9: fetch it again")
  return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int32)

def cifar_jpegs(source:Path) -> tuple[np.ndarray, np.ndarray]:
  """CIFAR-10 as JPEG files, a folder for each class, in a zip file or unpacked."""
  print(f"note: {source} is CIFAR-10 as JPEG, which is lossy: no bits/dim of it compares with others", file=sys.stderr)
  with contextlib.ExitStack() as stack:
    if source.is_dir():
      found:list[tuple[str, str, Callable[[], IO]]] = [
        (path.parts[0], str(path), functools.partial(open, source / path, "rb")) for path in image_files(source)]
    else:
      try: archive = stack.enter_context(zipfile.ZipFile(source))
      except Exception as e:  # a damaged directory raises nearly anything
        raise ValueError(f"{source} cannot be read ({e}): fetch it again") from e
      found = [(PurePosixPath(entry.filename).parent.name, entry.filename, functools.partial(unzip, archive, entry))
               for entry in sorted(archive.infolist(), key=lambda entry: entry.filename)
               if entry.filename.lower().endswith(EXTENSIONS)]
    if {c for c, _, _ in found} != set(CIFAR10_CLASSES):
      raise ValueError(f"{source} should hold ten folders of images, {', '.join(CIFAR10_CLASSES)}")
    items:list[Item] = [(CIFAR10_CLASSES.index(c), shown, opener) for c, shown, opener in found]
    return read_images(items, source, size=32, channels=3)

def unzip(archive:zipfile.ZipFile, entry:zipfile.ZipInfo) -> IO:
  if entry.file_size > LIMIT: raise ValueError("too large")
  return io.BytesIO(archive.read(entry))

def image_files(root:Path) -> list[Path]:
  """Paths of the images under `root`, relative to it and sorted; hidden ones are left out, links are followed."""
  found, seen = [], set()
  for folder, inner, files in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    inner[:] = [] if real in seen else [d for d in inner if not d.startswith((".", "__MACOSX"))]
    if real not in seen:  # a link may lead back up
      found += [Path(folder, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    seen.add(real)
  return sorted(path.relative_to(root) for path in found if os.path.isfile(path))

def read_images(items:list[Item], where:str|Path, size:int|None=None, multiple:int=8,
                channels:int|None=None) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of the items: see `load`."""
  if not items: raise ValueError(f"{where} holds no images: it or its sub-folders should hold {', '.join(EXTENSIONS)}")
  labels:list[int] = []
  broken:list[str] = []
  gray = True
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    if size is None:
      sizes = []
      for _, _, open_file in progress(items, f"measuring {where}", len(items)):
        with contextlib.suppress(Exception), open_file() as f: sizes.append(Image.open(f, formats=FORMATS).size)
      (w, h), most = Counter(sizes).most_common(1)[0] if sizes else ((8, 8), 1)
      median = int(np.median([min(s) for s in sizes] or [8]))
      side = w if w == h and 2 * most > len(sizes) else median
      size = max(multiple, min(64, side) // multiple * multiple)
    if len(items) * 3 * size**2 > 1 << 34:
      raise ValueError(f"{where} holds {len(items)} images, too many at {size}x{size}: choose a smaller size")
    images = np.empty((len(items), 3, size, size), np.uint8)
    for label, name, open_file in progress(items, f"reading {where}", len(items)):
      try:
        with open_file() as f: image = decode(f, size)
      except Exception: broken.append(name)  # Pillow raises nearly anything on a damaged file
      else:
        images[len(labels)] = image
        labels.append(label)
        gray = gray and (image == image[:1]).all()
  if broken:
    names = ", ".join(map(repr, broken[:10])) + (f" and {len(broken) - 10} more" if len(broken) > 10 else "")
    print(f"{where}: skipped {len(broken)} of {len(items)} images, which cannot be read: {names}", file=sys.stderr)
  if not labels: raise ValueError(f"{where} holds no image that can be read: all {len(items)} are broken")
  return np.ascontiguousarray(images[:len(labels), :channels or (1 if gray else 3)]), np.array(labels, np.int32)

def decode(f:IO, size:int) -> np.ndarray:
  """One image file as people see it: uint8 (3, size, size)."""
  img = ImageOps.exif_transpose(Image.open(f, formats=FORMATS))
  if img.mode[0] in "IF":  # 16 bits or floats, which Pillow would clip, not scale
    x = np.nan_to_num(np.asarray(img, np.float64))
    x = x / 257 if img.mode[0] == "I" else x * 255 if x.max() <= 1 else x
    img = Image.fromarray(np.rint(x.clip(0, 255)).astype(np.uint8))
  if img.has_transparency_data:
    img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA"))
  img = img.convert("RGB")
  if img.size != (size, size): img = ImageOps.fit(img, (size, size), Image.Resampling.LANCZOS)
  return np.asarray(img).transpose(2, 0, 1)

def download(name:str, file:str) -> Path:
  """The path in the cache of a dataset's file, fetched from the first mirror that has the right bytes."""
  path, failures = cache() / name / file, []
  if path.is_file(): return path
  for mirror in MIRRORS[name]:
    try:
      with atomic(path) as f:  # so what fails the check never has a name in the cache
        for chunk in fetch(mirror + file): f.write(chunk)
        if not has_digest(f, SHA256[name][file]): raise ValueError("its SHA-256 is not the published one")
      return path
    except (OSError, ValueError) as e: failures.append(f"{mirror.split('/')[2]}: {e}")
  raise OSError(f"{file} of {name} could not be downloaded ({'; '.join(failures)}): put it into {path.parent} or set "
                "DATA_DIR to the folder that has it")

def fetch(url:str) -> Iterator[bytes]:
  """The bytes at an address, in pieces. ValueError if it does not answer or sends too many."""
  try:
    with urllib.request.urlopen(url, timeout=30) as reply:
      total, length = 0, int(reply.headers.get("Content-Length") or 0)
      for chunk in progress(iter(lambda: reply.read(1 << 18), b""), url.rsplit("/", 1)[1], length, weigh=len):
        if (total := total + len(chunk)) > LIMIT: raise ValueError("it is far too long")
        yield chunk
  except (OSError, http.client.HTTPException) as e: raise ValueError(f"no answer ({e})") from e

def has_digest(f:IO, sha256:str) -> bool:
  """Whether the file's bytes, or what they hold when unpacked by gzip, have this SHA-256."""
  for unpacked in (f, gzip.GzipFile(fileobj=f, mode="rb")):
    f.seek(0)
    digest = hashlib.sha256()
    with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
      for _ in range(LIMIT >> 20): digest.update(unpacked.read(1 << 20))
      if digest.hexdigest() == sha256: return True
  return False

# *** batches ***

def batch_at(images:np.ndarray, labels:np.ndarray, step:int, batch:int, seed:int,
             flip:bool=False) -> tuple[np.ndarray, np.ndarray]:
  """Algorithm 1, line 2, x_0 ~ q(x_0): the batch of one training step, uint8 (batch, C, H, W) and int32 (batch,).

  It depends on seed and step (0, 1, ...) alone, so training resumes with the batches it would have had. The steps
  read an endless row of permutations, an epoch each: every image comes once in an epoch, for any batch size.
  flip: each image is mirrored left to right with probability 1/2 (Appendix B, CIFAR-10)."""
  if batch < 1 or step < 0 or seed < 0 or len(images) == 0:
    raise ValueError(f"no batch of {batch} at step {step} with seed {seed} from {len(images)} images")
  places, index = np.arange(step * batch, (step + 1) * batch), np.empty(batch, np.int64)
  for epoch in range(places[0] // len(images), places[-1] // len(images) + 1):
    here = places // len(images) == epoch
    index[here] = permutation(seed, int(epoch), len(images))[places[here] % len(images)]
  x = images[index]
  if flip:
    mirrored = stream(seed, "flip", step).random(batch) < 0.5
    x[mirrored] = x[mirrored][..., ::-1]
  return x, labels[index]

@functools.lru_cache(maxsize=4)
def permutation(seed:int, epoch:int, n:int) -> np.ndarray: return stream(seed, "order of images", epoch).permutation(n)

def scaled(k:np.ndarray) -> np.ndarray:
  """Section 3.3: the levels k = 0..255 as k / 127.5 - 1, float32 in [-1, 1]."""
  return k.astype(np.float32) / 127.5 - 1

def to_uint8(x:np.ndarray) -> np.ndarray:
  """round((x + 1) 127.5), clipped to 0..255: the inverse of `scaled`. ValueError for NaN, which is no colour."""
  x = np.asarray(x, np.float64)
  if np.isnan(x).any(): raise ValueError("the images hold NaN: the model or the sampler has diverged")
  return np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)

def levels(x) -> np.ndarray:
  """Images as uint8 (n, C, H, W), from those or from their levels k / 127.5 - 1, an array or a Tensor.

  ValueError for anything else."""
  x = np.asarray(x.numpy() if hasattr(x, "numpy") else x)
  if x.ndim != 4 or 0 in x.shape: raise ValueError(f"x0 must be images (n, C, H, W), not of shape {x.shape}")
  if x.dtype == np.uint8: return x
  k = to_uint8(x)
  if np.abs(scaled(k) - x).max() > 1e-3: raise ValueError("x0 must lie on the 256 levels k/127.5 - 1 of uint8 images")
  return k

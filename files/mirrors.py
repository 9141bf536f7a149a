"""The published datasets and their mirrors, and glyphs, drawn on the spot."""
from __future__ import annotations
import contextlib, gzip, hashlib, http.client, io, math, os, sys, tarfile, urllib.request, zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from files.atomic import atomic
from files.bar import progress
from files.dataset import Dataset, cache, dataset
from files.images import read

DIGITS = tuple("0123456789")
CLASSES = {
  "glyphs": DIGITS, "mnist": DIGITS,
  "fashion_mnist": ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
  "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")}
LIMIT = 1 << 28  # bytes: no file of these datasets is as large, so nothing larger is fetched, unpacked or believed

# Where a dataset may lie inside a data folder, and its mirrors: the first one that answers with the right bytes wins.
PLACES = {"mnist": ("mnist", "MNIST/raw"), "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
          "cifar10": ("cifar10", "cifar-10-batches-bin")}
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

def published(name:str, split:str, data_dir:str|os.PathLike|None) -> Dataset:
  """A split of "glyphs" or of a published dataset, from data_dir, $DATA_DIR, the cache or a mirror."""
  if name == "glyphs": return dataset(*glyphs(split), list(CLASSES[name]), heldout=True)
  if data_dir is not None and not os.path.isdir(data_dir): raise FileNotFoundError(f"{data_dir} is no data folder")
  if (given := os.environ.get("DATA_DIR")) and not os.path.isdir(given):
    print(f"DATA_DIR: {given} is no folder", file=sys.stderr)
  if name == "cifar10": return cifar10(split, data_dir)
  return dataset(*mnist(name, split, data_dir), list(CLASSES[name]), heldout=True)

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

def cifar10(split:str, data_dir:str|os.PathLike|None) -> Dataset:
  """CIFAR-10 from its binary version, in a .tar.gz or unpacked, or from an archive of JPEG copies."""
  batches = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
  names = list(CLASSES["cifar10"])
  for folder in places("cifar10", data_dir):
    tar, jpegs = folder / "cifar-10-binary.tar.gz", folder / f"cifar10-jpg-{split}.zip"
    if all(os.path.isfile(folder / file) for file in batches):
      return dataset(*cifar_binary(folder, batches), names, heldout=True)
    if os.path.isfile(tar): break
    if os.path.isfile(jpegs):
      found = read(jpegs, "train", (32, 32), "crop", "rgb", 1)
      if found.classes != names: raise ValueError(f"{jpegs} should hold ten folders of images, {', '.join(names)}")
      lossy = f"{jpegs} holds JPEGs, which are lossy: no bits/dim of it compares with others"
      return found._replace(heldout=True, left=(lossy, *found.left))
  else: tar = download("cifar10", tar.name)
  return dataset(*cifar_binary(tar, batches), names, heldout=True)

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
  raise OSError(f"{file} of {name} could not be downloaded ({'; '.join(failures)}): put it into {path.parent}, or "
                f"into a folder {name} and set DATA_DIR to what holds that folder")

def fetch(url:str) -> Iterator[bytes]:
  """The bytes at an address, in pieces. ValueError if it does not answer or sends too many."""
  try:
    with urllib.request.urlopen(url, timeout=30) as reply:
      total, length = 0, int(reply.headers.get("Content-Length") or 0)
      for chunk in progress(iter(lambda: reply.read(1 << 18), b""), url.rsplit("/", 1)[1], length, weigh=len):
        if (total := total + len(chunk)) > LIMIT: raise ValueError("it is far too long")
        yield chunk
    if total < length: raise ValueError("the connection broke off")
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


"""Section 4, the experiments' set-up: datasets as uint8 arrays, batches, images in and out.

Images are uint8 (N, C, H, W) everywhere on the host; the device alone sees x / 127.5 - 1. Whatever is wrong with a
name, a file or the network is said in one sentence, by a ValueError or an OSError that the scripts print as it is.
"""
import contextlib, functools, gzip, hashlib, http.client, io, math, os, secrets, shutil, sys, tarfile, time
import urllib.request, warnings, zipfile, zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

DATASETS = ("glyphs", "mnist", "fashion_mnist", "cifar10")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow opens more kinds, some by other programs
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

# ---------------------------------------------------------------------------------------------------- datasets

def load(name, split="train", data_dir=None, size=None):
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
  to a multiple of 8.

  Raises ValueError for an unknown name or split and for damaged or missing images, OSError for a failed download."""
  if split not in ("train", "test"): raise ValueError(f"there is no split {split!r}: choose train or test")
  name = os.path.expanduser(str(name))
  if name in DATASETS:
    if size is not None: raise ValueError(f"a size fits a folder of images only: {name} comes in its own size")
    if name == "glyphs": return glyphs(split)
    if data_dir is not None and not os.path.isdir(data_dir): raise FileNotFoundError(f"{data_dir} is no data folder")
    return _cifar10(split, data_dir) if name == "cifar10" else _mnist(name, split, data_dir)
  if not os.path.isdir(name):
    raise ValueError(f"unknown dataset {name!r}: choose {', '.join(DATASETS)} or a folder of images")
  if size is not None and not 1 <= size <= 4096: raise ValueError(f"a size of {size}: choose 1 to 4096 pixels")
  halves = all(os.path.isdir(os.path.join(name, half)) for half in ("train", "test"))
  items, classes = [], {}
  for path in _image_files(Path(name)):
    half, *inner = path.parts if halves else (split, *path.parts)
    if half not in ("train", "test") or not inner: continue
    classes[inner[0] if len(inner) > 1 else ""] = None
    if half == split: items.append((inner[0] if len(inner) > 1 else "", str(path), Path(name, path)))
  number = {c: i for i, c in enumerate(sorted(classes))}  # over both halves: a class missing from one shifts nothing
  items = [(number[c], shown, functools.partial(open, path, "rb")) for c, shown, path in items]
  return _read_images(items, f"{name}/{split}" if halves else name, size)

def glyphs(split="train"):
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
    images[i] = canvas.transform((32, 32), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(2)
  images = images * rng.uniform(0.8, 1, (n, 1, 1)) + rng.normal(0, 4, images.shape)
  return np.rint(images.clip(0, 255)).astype(np.uint8)[:, None], labels

def _places(name, data_dir):
  """The folders in which a dataset's files may lie, in the order of the contract: data_dir, $DATA_DIR, the cache."""
  for base in (data_dir, os.environ.get("DATA_DIR"), _cache()):
    if not base: continue
    yield from (Path(base, place) for place in PLACES[name])
    # MNIST and Fashion-MNIST share their file names, so a bare folder of them is told apart by the folder's name
    if name == "cifar10" or ("fashion" in Path(base).resolve().name.lower()) == (name == "fashion_mnist"):
      yield Path(base)

def _cache(): return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ddpm")

def _mnist(name, split, data_dir):
  """Images and labels of "mnist" or "fashion_mnist": IDX files, gzipped or not."""
  part = {"train": "train", "test": "t10k"}[split]
  wanted = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
  for folder in _places(name, data_dir):
    found = [next(filter(os.path.isfile, (folder / file, folder / f"{file}.gz")), None) for file in wanted]
    if all(found): break
  else: found = [_download(name, f"{file}.gz") for file in wanted]
  images, labels = _read_idx(found[0], 3), _read_idx(found[1], 1)
  if len(images) != len(labels):
    raise ValueError(f"{found[0]} holds {len(images)} images but {found[1]} {len(labels)} labels: fetch both again")
  if labels.max() > 9: raise ValueError(f"{found[1]} holds the label {labels.max()}, not 0 to 9: fetch it again")
  return images[:, None], labels.astype(np.int32)

def _read_idx(path, ndim):
  """The array of an IDX file of bytes with `ndim` dimensions; ValueError unless every byte is where it should be."""
  try:
    with open(path, "rb") as raw:
      f = gzip.GzipFile(fileobj=raw, mode="rb") if raw.peek(2)[:2] == b"\x1f\x8b" else raw
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

def _cifar10(split, data_dir):
  """CIFAR-10 from its binary version, in a .tar.gz or unpacked, or from JPEG copies, zipped or in folders."""
  batches = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
  for folder in _places("cifar10", data_dir):
    tar, jpegs = folder / "cifar-10-binary.tar.gz", folder / f"cifar10-jpg-{split}.zip"
    if all(os.path.isfile(folder / file) for file in batches): return _cifar_binary(folder, batches)
    if os.path.isfile(tar): return _cifar_binary(tar, batches)
    if os.path.isfile(jpegs): return _cifar_jpegs(jpegs)
    if os.path.isdir(folder / split / "airplane"): return _cifar_jpegs(folder / split)
  return _cifar_binary(_download("cifar10", tar.name), batches)

def _cifar_binary(source, batches):
  """Files of records, at most 10,000 in each: a label byte and 3 x 32 x 32 pixels."""
  try:
    with contextlib.ExitStack() as stack:
      if source.is_dir(): files = [stack.enter_context(open(source / file, "rb")) for file in batches]
      else:
        archive = stack.enter_context(tarfile.open(source, "r:gz"))
        files = [archive.extractfile(f"cifar-10-batches-bin/{file}") for file in batches]
      blobs = [f.read(30_730_001) for f in files]  # a byte more than 10,000 records, which shows any longer file
  except Exception as e:  # a damaged archive raises nearly anything
    raise ValueError(f"{source} cannot be read ({e}): fetch it again") from e
  for file, blob in zip(batches, blobs):
    if not blob or len(blob) % 3073:
      raise ValueError(f"{file} in {source} is not 1 to 10,000 records of 3,073 bytes: fetch it again")
  records = np.frombuffer(bytearray().join(blobs), np.uint8).reshape(-1, 3073)
  if records[:, 0].max() > 9: raise ValueError(f"{source} holds a label that is not 0 to 9: fetch it again")
  return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int32)

def _cifar_jpegs(source):
  """CIFAR-10 as JPEG files, a folder for each class, in a zip file or unpacked."""
  print(f"note: {source} is CIFAR-10 as JPEG, which is lossy: no bits/dim of it compares with others", file=sys.stderr)
  with contextlib.ExitStack() as stack:
    if source.is_dir():
      items = [(path.parts[0], str(path), functools.partial(open, source / path, "rb"))
               for path in _image_files(source)]
    else:
      try: archive = stack.enter_context(zipfile.ZipFile(source))
      except Exception as e:  # a damaged directory raises nearly anything
        raise ValueError(f"{source} cannot be read ({e}): fetch it again") from e
      items = [(PurePosixPath(entry.filename).parent.name, entry.filename, functools.partial(_unzip, archive, entry))
               for entry in sorted(archive.infolist(), key=lambda entry: entry.filename)
               if entry.filename.lower().endswith(EXTENSIONS)]
    if {item[0] for item in items} != set(CIFAR10_CLASSES):
      raise ValueError(f"{source} should hold ten folders of images, {', '.join(CIFAR10_CLASSES)}")
    return _read_images([(CIFAR10_CLASSES.index(c), *rest) for c, *rest in items], source, size=32, channels=3)

def _unzip(archive, entry):
  if entry.file_size > LIMIT: raise ValueError("too large")
  return io.BytesIO(archive.read(entry))

def _image_files(root):
  """Paths of the images under `root`, relative to it and sorted; hidden ones are left out, links are followed."""
  found, seen = [], set()
  for folder, inner, files in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    inner[:] = [] if real in seen else [d for d in inner if not d.startswith((".", "__MACOSX"))]
    if real not in seen:  # a link may lead back up
      found += [Path(folder, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    seen.add(real)
  return sorted(path.relative_to(root) for path in found if os.path.isfile(path))

def _read_images(items, where, size=None, channels=None):
  """Images and labels of items (label, name to show, function that opens the file): see `load`."""
  if not items: raise ValueError(f"{where} holds no images: it or its sub-folders should hold {', '.join(EXTENSIONS)}")
  labels, broken, gray = [], [], True
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    if size is None:
      sizes = []
      for _, _, open_file in progress(items, f"measuring {where}", len(items)):
        with contextlib.suppress(Exception), open_file() as f: sizes.append(Image.open(f, formats=FORMATS).size)
      (w, h), most = Counter(sizes).most_common(1)[0] if sizes else ((8, 8), 1)
      median = int(np.median([min(s) for s in sizes] or [8]))
      size = w if w == h and 2 * most > len(sizes) else max(8, min(64, median) // 8 * 8)
    if len(items) * 3 * size**2 > 1 << 34:
      raise ValueError(f"{where} holds {len(items)} images, too many at {size}x{size}: choose a smaller size")
    images = np.empty((len(items), 3, size, size), np.uint8)
    for label, name, open_file in progress(items, f"reading {where}", len(items)):
      try:
        with open_file() as f: image = _decode(f, size)
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

def _decode(f, size):
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

def _download(name, file):
  """The path in the cache of a dataset's file, fetched from the first mirror that has the right bytes."""
  path, failures = _cache() / name / file, []
  if path.is_file(): return path
  for mirror in MIRRORS[name]:
    try:
      with atomic(path) as f:  # so what fails the check never has a name in the cache
        for chunk in _fetch(mirror + file): f.write(chunk)
        if not _has_digest(f, SHA256[name][file]): raise ValueError("its SHA-256 is not the published one")
      return path
    except (OSError, ValueError) as e: failures.append(f"{mirror.split('/')[2]}: {e}")
  raise OSError(f"{file} of {name} could not be downloaded ({'; '.join(failures)}): put it into {path.parent} or set "
                "DATA_DIR to the folder that has it")

def _fetch(url):
  try:
    with urllib.request.urlopen(url, timeout=30) as reply:
      total, length = 0, int(reply.headers.get("Content-Length") or 0)
      for chunk in progress(iter(lambda: reply.read(1 << 18), b""), url.rsplit("/", 1)[1], length, weigh=len):
        if (total := total + len(chunk)) > LIMIT: raise ValueError("it is far too long")
        yield chunk
  except (OSError, http.client.HTTPException) as e: raise ValueError(f"no answer ({e})") from e

def _has_digest(f, sha256):
  """Whether the file's bytes, or what they hold when unpacked by gzip, have this SHA-256."""
  for stream in (f, gzip.GzipFile(fileobj=f, mode="rb")):
    f.seek(0)
    digest = hashlib.sha256()
    with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
      for _ in range(LIMIT >> 20): digest.update(stream.read(1 << 20))
      if digest.hexdigest() == sha256: return True
  return False

def progress(items, desc, total=0, weigh=lambda item: 1):
  """Yields the items and shows on stderr how far they are: a bar on a terminal, elsewhere a line every few seconds.
  total: the sum of weigh(item) over all items, 0 if unknown."""
  tty, done, shown, begun = sys.stderr.isatty(), 0, time.monotonic(), False
  try:
    for item in items:
      yield item
      done, now = done + weigh(item), time.monotonic()
      if now - shown < (0.2 if tty else 5): continue
      shown, begun, part = now, True, min(1, done / total) if total else 0
      bar = f"[{'#' * int(20 * part):20}] {part:4.0%}" if total else f"{done:,}"
      text = f"{bar} {desc}"[:shutil.get_terminal_size().columns - 1]
      print(f"\r\033[K{text}" if tty else text, end="" if tty else "\n", file=sys.stderr, flush=True)
  finally:
    if tty and begun: print("\r\033[K", end="", file=sys.stderr, flush=True)

# ---------------------------------------------------------------------------------------------------- batches

def batch_at(images, labels, step, batch, seed, flip=False):
  """Algorithm 1, line 2, x_0 ~ q(x_0): the batch of one training step, uint8 (batch, C, H, W) and int32 (batch,).

  It depends on seed and step (0, 1, ...) alone, so training resumes with the batches it would have had. The steps
  read an endless row of permutations, an epoch each: every image comes once in an epoch, for any batch size.
  flip: each image is mirrored left to right with probability 1/2 (Appendix B, CIFAR-10)."""
  if batch < 1 or step < 0 or seed < 0 or len(images) == 0:
    raise ValueError(f"no batch of {batch} at step {step} with seed {seed} from {len(images)} images")
  places, index = np.arange(step * batch, (step + 1) * batch), np.empty(batch, np.int64)
  for epoch in range(places[0] // len(images), places[-1] // len(images) + 1):
    here = places // len(images) == epoch
    index[here] = _permutation(seed, int(epoch), len(images))[places[here] % len(images)]
  x = images[index]
  if flip:
    mirrored = np.random.default_rng([seed, 1, step]).random(batch) < 0.5
    x[mirrored] = x[mirrored][..., ::-1]
  return x, labels[index]

@functools.lru_cache(maxsize=4)
def _permutation(seed, epoch, n): return np.random.default_rng([seed, 0, epoch]).permutation(n)

# ---------------------------------------------------------------------------------------------------- images out

@contextlib.contextmanager
def atomic(path):
  """A binary file, open for writing and reading, that gets its name when all is written: whatever happens, `path` is
  the whole new file or what it was before. Makes the folder. OSError if the place cannot be written."""
  target = Path(os.path.realpath(path))  # through a link, which stays
  temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
  try:
    if target.exists() and not target.is_file(): raise OSError("it is not a regular file")
    if target.parent.is_file(): raise OSError(f"{target.parent} is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "x+b") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, target)
  except OSError as e: raise OSError(f"cannot write {path}: {e.strerror or e}") from e
  finally:
    with contextlib.suppress(OSError): temporary.unlink()

def save_png(path, img):
  with atomic(path) as f: img.save(f, format="PNG")

def save_gif(path, frames, ms=60):
  """An endless animation of PIL images, `ms` milliseconds each, that rests on its last frame for two seconds."""
  if not frames: raise ValueError(f"no frames to write to {path}")
  with atomic(path) as f:
    frames[0].save(f, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[ms] * (len(frames) - 1) + [2000])

def save_npz(path, images):
  """Samples for the field's evaluation programs: `arr_0`, uint8 (N, H, W, C)."""
  _check(images)
  with atomic(path) as f: np.savez(f, arr_0=np.ascontiguousarray(images.transpose(0, 2, 3, 1)))

def to_uint8(x):
  """round((x + 1) 127.5), clipped to 0..255: the inverse of x / 127.5 - 1. ValueError for NaN, which is no colour."""
  x = np.asarray(x, np.float64)
  if np.isnan(x).any(): raise ValueError("the images hold NaN: the model or the sampler has diverged")
  return np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)

def _check(images):
  if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
    raise ValueError(f"images should be uint8 (N, 1 or 3, H, W), not {images.dtype} {images.shape}")

def grid(images, ncols=None, scale=None):
  """A PIL image of uint8 (N, C, H, W) images in rows of `ncols` (default: a square), with 2 pixels between and around.
  Each pixel is enlarged `scale` times; by default to see small images at 56 pixels, in at most 1600 together."""
  _check(images)
  n, c, h, w = images.shape
  ncols = math.ceil(math.sqrt(n)) if ncols is None else ncols
  if ncols < 1: raise ValueError(f"a grid of {ncols} columns: choose 1 or more")
  ncols = min(n, ncols)
  nrows = math.ceil(n / ncols)
  if scale is None: scale = max(1, min(math.ceil(56 / min(h, w)), (1598 // ncols - 2) // w, (1598 // nrows - 2) // h))
  if scale < 1: raise ValueError(f"a grid enlarged {scale} times: choose 1 or more")
  h, w = h * scale + 2, w * scale + 2
  canvas = np.full((nrows * h + 2, ncols * w + 2, c), 128, np.uint8)
  for i, image in enumerate(images):
    y, x = i // ncols * h + 2, i % ncols * w + 2
    canvas[y:y + h - 2, x:x + w - 2] = image.repeat(scale, 1).repeat(scale, 2).transpose(1, 2, 0)
  return Image.fromarray(canvas[..., 0] if c == 1 else canvas)

def to_terminal(images, columns=None):
  """A string that shows the first of the uint8 (N, C, H, W) images side by side, as many as fit into `columns`
  (default: the terminal's), at two pixels a character: upper half block, 24-bit colours."""
  _check(images)
  n, c, h, w = images.shape
  n = max(1, min(n, ((columns or shutil.get_terminal_size().columns) + 1) // (w + 1)))
  canvas = np.zeros((h + h % 2, n * (w + 1) - 1, 3), np.uint8)
  for i in range(n): canvas[:h, i * (w + 1):i * (w + 1) + w] = images[i].transpose(1, 2, 0)
  lines = []
  for upper, lower in zip(canvas[::2].tolist(), canvas[1::2].tolist()):
    before, line = None, ""
    for colours in zip(upper, lower):
      if colours != before: line += "\033[38;2;{};{};{};48;2;{};{};{}m".format(*colours[0], *colours[1])
      before, line = colours, line + "▀"
    lines.append(line + "\033[0m")
  return "\n".join(lines)

def plot(series, title="", xlabel="", ylabel="", log_y=False):
  """A PIL image, 720x440, of the curves {name: (xs, ys)}. A curve is broken where it is not finite (or, with log_y,
  not positive); a lone point is a dot. ValueError if xs and ys differ in length."""
  k = 3  # drawn at three times the size, for smooth lines
  width, height = 720 * k, 440 * k
  font, big = ImageFont.load_default(size=13 * k), ImageFont.load_default(size=16 * k)
  curves = []
  for name, (xs, ys) in series.items():
    xs, ys = np.asarray(xs, np.float64).ravel(), np.asarray(ys, np.float64).ravel()
    if xs.shape != ys.shape: raise ValueError(f"the curve {name!r} has {len(xs)} xs but {len(ys)} ys")
    with np.errstate(all="ignore"): ys = np.log10(ys) if log_y else ys
    curves.append((str(name), xs, ys, np.isfinite(xs) & np.isfinite(ys)))
  (x0, x1), (y0, y1) = [_span(np.concatenate([c[axis][c[3]] for c in curves] or [[]])) for axis in (1, 2)]
  xticks, yticks = _ticks(x0, x1), _log_ticks(y0, y1) if log_y else _ticks(y0, y1)
  y0, y1 = y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)

  img = Image.new("RGB", (width, height), "white")
  d = ImageDraw.Draw(img)
  left = 24 * k + max((font.getlength(text) for _, text in yticks), default=0) + (22 * k if ylabel else 0)
  right, top, bottom = width - 20 * k, (64 if curves else 40) * k, height - (52 if xlabel else 34) * k
  across = lambda x: left + (x - x0) / (x1 - x0) * (right - left)
  down = lambda y: bottom - (y - y0) / (y1 - y0) * (bottom - top)
  for x, text in xticks:
    d.line((across(x), top, across(x), bottom), "#e6e6e6", k)
    d.text((across(x), bottom + 6 * k), text, "black", font, anchor="ma")
  for y, text in yticks:
    d.line((left, down(y), right, down(y)), "#e6e6e6", k)
    d.text((left - 6 * k, down(y)), text, "black", font, anchor="rm")
  d.line((left, top, left, bottom, right, bottom), "#555555", k)
  d.text((width / 2, 10 * k), title, "black", big, anchor="ma")
  d.text(((left + right) / 2, height - 10 * k), xlabel, "black", font, anchor="md")
  if ylabel:
    upright = Image.new("RGB", (math.ceil(font.getlength(ylabel)), 20 * k), "white")
    ImageDraw.Draw(upright).text((0, 10 * k), ylabel, "black", font, anchor="lm")
    img.paste(upright.rotate(90, expand=True), (8 * k, int((top + bottom - upright.width) / 2)))
  x = left
  for i, (name, xs, ys, ok) in enumerate(curves):
    colour = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")[i % 8]
    d.line((x, top - 16 * k, x + 20 * k, top - 16 * k), colour, 3 * k)
    d.text((x + 26 * k, top - 16 * k), name, "black", font, anchor="lm")
    x += 46 * k + font.getlength(name)
    for run in np.split(np.arange(len(xs)), np.flatnonzero(~ok)):  # each run but the first begins with a bad point
      points = [(float(across(xs[j])), float(down(ys[j]))) for j in run if ok[j]]
      if len(points) > 1: d.line(points, colour, 2 * k, joint="curve" if len(points) < 1000 else None)
      elif points: d.circle(points[0], 3 * k, colour)
  return img.resize((width // k, height // k), Image.Resampling.LANCZOS)

def _span(values):
  """Ends of an axis, never equal."""
  lo, hi = (float(np.min(values)), float(np.max(values))) if len(values) else (0.0, 1.0)
  return (lo, hi) if hi - lo > 1e-9 * max(abs(lo), abs(hi)) else (lo - (abs(lo) * 0.1 or 1), hi + (abs(hi) * 0.1 or 1))

def _ticks(lo, hi, most=7):
  """(value, text) at round steps of 1, 2 or 5 times a power of ten."""
  step = 10.0 ** math.floor(math.log10((hi - lo) / most))
  step *= next(m for m in (1, 2, 5, 10) if (hi - lo) / (step * m) <= most)
  values = [i * step for i in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]
  plain = 1e-4 <= max(abs(lo), abs(hi)) < 1e7
  return [(v, f"{v:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if plain else f"{v:.4g}") for v in values]

def _log_ticks(lo, hi):
  """(log10 of value, text): powers of ten; 1, 2, 5 times them where those are few; else round numbers."""
  decades = range(math.floor(lo), math.ceil(hi) + 1)
  for factors in ((1,), (1, 2, 5)):
    ticks = [(e + math.log10(m), f"{m * 10.0**e:g}") for e in decades for m in factors if lo <= e + math.log10(m) <= hi]
    if len(ticks) > 2: return ticks[::math.ceil(len(ticks) / 9)]
  return [(math.log10(v), text) for v, text in _ticks(10.0**lo, 10.0**hi) if v > 0]

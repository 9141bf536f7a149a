"""Folders and archives of images as people have them, read whole and told in words. Other datasets: `files.dataset`."""
from __future__ import annotations
import contextlib, errno, functools, hashlib, io, json, math, os, re, stat, warnings, zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO, NamedTuple
import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError, features
from files.bar import progress
from files.dataset import Dataset, Plan, Size, convert_all, fitted, keep, numbered, plan, write_array

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]  # Pillow opens more kinds, some by other programs
HELD_OUT = ("test", "val", "valid", "validation", "dev")  # beside train/, the first of them is the split "test"
LIMIT = 1 << 28  # bytes: no single file in an archive is unpacked beyond it
FORM = 4  # of what is kept in the cache

def read(path:Path, split:str, size:Size|None, fit:str, mode:str|None, multiple:int) -> Dataset:
  """A folder, a .zip, a .npy or an .npz file: see `data.read`."""
  kind, options = path.suffix.lower(), (size, fit, mode, multiple)
  images = path.is_dir() or kind == ".zip"
  if not images and kind not in (".npy", ".npz"):
    raise ValueError(f"{path} is no dataset: choose a folder of images, a .zip, a .npy or an .npz file")
  if mode and not images: raise ValueError(f"mode {mode} is for files of images: {path} keeps the channels it has")
  with contextlib.ExitStack() as stack:
    source = Source(path, stack) if images else None
    stamps = (source.stamps, dict(source.left)) if source else (path.stat().st_size, path.stat().st_mtime_ns)
    key = hashlib.sha256(repr((FORM, options, stamps)).encode()).hexdigest()
    if source: write = functools.partial(decode_all, source, *options)
    else: write = functools.partial(convert_all, path, size, fit, multiple)
    return keep(path, split, options, key, write)

# *** what there is ***

class Source:
  """What lies in a folder or an archive: the names of images, the others by suffix, and how to open an image.

  stamps: what changes if the images do. left: names of what is not read, by the reason."""
  def __init__(self, path:Path, stack:contextlib.ExitStack):
    self.path, self.others, self.left = path, Counter[str](), defaultdict[str, list[str]](list)
    self.entries:dict[PurePath, zipfile.ZipInfo] = {}
    if path.is_dir():
      self.stamps = sorted(self.walk())
      found = [name for name, *_ in self.stamps]
    else:
      self.stamps = [(PurePath(), path.stat().st_size, path.stat().st_mtime_ns)]
      try: self.archive = stack.enter_context(zipfile.ZipFile(path))
      except Exception as e: raise ValueError(f"{path} cannot be read as a zip file: {reason(e)}") from e
      for info in self.archive.infolist():
        if info.is_dir(): continue
        if (name := entry(info)) in self.entries:
          self.left["files whose name a later one has, left out"].append(str(name))
        self.entries[name] = info
      found = sorted(name for name in self.entries if not any(map(hidden, name.parts)))
    self.tables = [name for name in found if name.name == "dataset.json"]
    self.names = [name for name in found if name.suffix.lower() in EXTENSIONS]
    for name in set(found) - set(self.names) - set(self.tables): self.others[name.suffix.lower() or "no suffix"] += 1

  def walk(self) -> Iterator[tuple[PurePath, int, int]]:
    """Name, size and time of change of the files of a folder and its sub-folders; links are followed, after what is
    no link."""
    seen:set[str] = set()
    def closed(e:OSError): self.left["folders that cannot be entered"].append(f"{e.filename} ({e.strerror})")
    for folder, inner, files in os.walk(self.path, followlinks=True, onerror=closed):
      real, place = os.path.realpath(folder), Path(folder).relative_to(self.path)
      if real in seen:  # a link may lead to what another name has, or back up
        self.left["folders that are read by another name, left out"].append(str(place))
        inner.clear()
        continue
      seen.add(real)
      inner[:] = sorted((d for d in inner if not hidden(d)), key=lambda d: (os.path.islink(os.path.join(folder, d)), d))
      for file in sorted(file for file in files if not hidden(file)):
        try: about = os.stat(os.path.join(folder, file))
        except OSError: self.left["links to nowhere, left out"].append(str(place / file))
        else:
          if stat.S_ISREG(about.st_mode): yield place / file, about.st_size, about.st_mtime_ns

  def open(self, name:PurePath) -> IO[bytes]:
    if not self.entries: return open(self.path / name, "rb")
    if self.entries[name].file_size > LIMIT: raise ValueError("too large")
    return io.BytesIO(self.archive.read(self.entries[name]))

def entry(e:zipfile.ZipInfo) -> PurePath:
  """The name of a file in an archive. Without a flag for UTF-8 it is in CP437 by the standard; most programs write
  UTF-8 all the same."""
  name = e.filename.replace("\\", "/")
  with contextlib.suppress(UnicodeError): name = name if e.flag_bits & 0x800 else name.encode("cp437").decode()
  return PurePath(*(part for part in PurePath(name).parts if part != ".."))

def some(names:list[str]) -> str: return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)

def hidden(name:str) -> bool: return name.startswith((".", "__MACOSX"))

class Item(NamedTuple):
  name:PurePath
  label:int
  half:int  # 0: for training, 1: held out

def arrange(source:Source) -> tuple[list[Item], list[str], list[str], list[str]]:
  """The images for training, then those held out; the names of the classes; what is to be said; what is left out."""
  said:list[str] = []
  left:list[str] = []
  where = [name.parts for name in source.names]
  n = around(where)
  where = [p[n:] for p in where]
  tops = {p[0].lower() for p in where if len(p) > 1}
  held = next((name for name in HELD_OUT if name in tops), None) if "train" in tops else None
  halves = [0] * len(where)
  if held:
    halves = [{"train": 0, held: 1}.get(p[0].lower(), -1) for p in where]
    n = 1 + around([p[1:] for p, half in zip(where, halves) if half >= 0])
    where = [p[n:] or p for p in where]
    said.append(f"{halves.count(0)} in train, {halves.count(1)} held out in {held}")
    if outside := halves.count(-1): left.append(f"{outside} images outside of train and {held} left out")
  words = [p[0] if len(p) > 1 else "" for p in where]
  if source.tables: labels, classes = listed(source)
  else:
    prefixes = [re.match(r"(?:([^\W\d_]+)_)?", p[-1])[1] or "" for p in where]  # type: ignore[index]
    if set(words) == {""} and "" not in prefixes and 1 < len(set(prefixes)) <= len(prefixes) / 2:
      words = prefixes
      said.append("classes from the beginnings of the names")
    names = {word for word, half in zip(words, halves) if half >= 0}
    classes = sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (bool(name), 0, name))
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(word, -1) for word in words]
    if "" in names and len(names) > 1: said.append(f"a class for the {words.count('')} images in no sub-folder")
  items = [Item(*row) for row in zip(source.names, labels, halves) if row[2] >= 0]
  return sorted(items, key=lambda item: item.half), classes, said, left

def around(where:list[tuple[str, ...]]) -> int:
  """How many folders, one in the other, there are around all images."""
  n, lengths = 0, [*map(len, where)]
  while min(lengths) > n + 1 and max(lengths) > n + 2 and len({p[n] for p in where}) == 1: n += 1
  return n

def listed(source:Source) -> tuple[list[int], list[str]]:
  """The labels that a dataset.json gives, {"labels": [[name, number], ...] or null}, as StyleGAN's and EDM's tools
  write it."""
  table:dict[PurePath, Any] = {}
  try:
    for file in source.tables:
      with source.open(file) as f: rows = json.load(f)["labels"] or ()
      table |= {file.parent / name: label for name, label in rows if label is not None}
    if not table: return [0] * len(source.names), [""]
    if missing := [str(name) for name in source.names if name not in table]:
      raise ValueError(f"no label for {len(missing)} of {len(source.names)} images, as {missing[0]!r}")
    labels, classes = numbered(np.array([table[name] for name in source.names], object), len(source.names))
    return labels.tolist(), classes
  except Exception as e:  # as damaged as a file can be
    raise ValueError(f'{source.path / source.tables[0]} is no {{"labels": [[name, label], ...]}}: {e}') from e

# *** one image ***

class Measured(NamedTuple):
  shape:Size
  gray:bool  # by its kind, whatever its pixels
  depth:tuple[float, float, float]|None  # of more than 8 bits: the least, the greatest and the greatest possible value
  frames:int
  reduced:bool  # read at an eighth of its size
  deep:bool  # 16 bits in each of several channels: Pillow gives the upper 8
  clear:bool  # has an alpha channel or a transparent colour

def open_image(f:IO[bytes]) -> tuple[Image.Image, bool]:
  """A Pillow image, and whether it is so large that it is read at an eighth of its size, as JPEG alone can be."""
  try: img:Image.Image = Image.open(f, formats=[*FORMATS, "AVIF"] if features.check("avif") else FORMATS)
  except Image.DecompressionBombError:
    f.seek(0)
    if f.read(3) != b"\xff\xd8\xff": raise ValueError("too large") from None
    f.seek(0)
    img = JpegImagePlugin.JpegImageFile(f)
  if img.width * img.height <= (Image.MAX_IMAGE_PIXELS or math.inf): return img, False
  if not isinstance(img, JpegImagePlugin.JpegImageFile) or img.info.get("progressive"): raise ValueError("too large")
  img.draft(None, (1, 1))
  return img, True

def measure(f:IO[bytes]) -> Measured:
  img, reduced = open_image(f)
  (h, w), depth, frames = (img.height, img.width), None, getattr(img, "n_frames", 1)
  deep = any(";16" in str(tile[3]) for tile in getattr(img, "tile", []))
  if may_be_turned(img, f) and img.getexif().get(0x0112, 1) > 4: h, w = w, h
  if img.mode[0] in "IF":
    x, top = values(img), {"I;": 65535., "I": 2.**31 - 1, "F": math.inf}[img.mode[:2]]
    depth = float(x.min()), float(x.max()), top
  if img.format == "MPO": frames = 1  # a camera's: the others are previews
  return Measured((h, w), bool(depth) or img.mode in ("1", "L", "LA"), depth, frames, reduced, deep and not depth,
                  not depth and img.has_transparency_data)

def may_be_turned(img:Image.Image, f:IO[bytes]) -> bool:
  """Whether there may be an orientation to follow: Pillow has turned a TIFF already. That of a PNG may lie behind the
  pixels, and Pillow decodes them to find it, so here the file is looked through first."""
  if img.format != "PNG" or "exif" in img.info: return img.format != "TIFF"
  at = f.tell()
  f.seek(0)
  whole = f.read()
  f.seek(at)
  return any(word in whole for word in (b"eXIf", b"Raw profile", b"adobe.xmp"))

def values(img:Image.Image) -> np.ndarray:
  x = np.asarray(img, np.float64)
  if not np.isfinite(x).all(): raise ValueError("numbers that are not finite")
  return x

def brightness(depths:list[tuple[float, float, float]],
               span:Sequence[float]|None=None) -> tuple[tuple[float, float], tuple[str, ...]]:
  """The values that become black and white, of all images of more than 8 bits, and what is to be said. span: those of
  the set that a model was trained on, which are then taken.

  White is the greatest possible value, or the greatest that there is if that is below half of it. Of floats the
  greatest possible value is 1 or 255, if none is beyond. Black is 0, or the least value if that is below."""
  if not depths: return (0, 255), ()
  if span: return (span[0], span[1]), (f"values from {span[0]:g} to {span[1]:g} made 0 to 255, as for training",)
  lo, hi, top = (pick(row) for pick, row in zip((min, max, max), zip(*depths)))
  if math.isinf(top): top = next((t for t in (1, 255) if hi <= t), hi)
  if hi < top / 2: top = hi
  lo = min(lo, 0)
  return (lo, max(top, lo + 1e-9)), (f"values from {lo:g} to {top:g} made 0 to 255",)

def decode(to:Plan, f:IO[bytes]) -> tuple[np.ndarray, int]:
  """One image as people see it: uint8 (1 or 3, height, width), and how many of its pixels are coloured."""
  img, reduced = open_image(f)
  if not reduced and to.how != "cut" and isinstance(img, JpegImagePlugin.JpegImageFile):
    img.draft(None, (4 * max(to.height, to.width),) * 2)  # a large photograph is decoded smaller, in less time
  img = ImageOps.exif_transpose(img)
  if img.mode[0] in "IF":  # Pillow would clip the values, not scale them
    lo, hi = to.span
    img = Image.fromarray(np.rint(((values(img) - lo) * (255 / (hi - lo))).clip(0, 255)).astype(np.uint8))
  if img.has_transparency_data:  # as on a white page
    img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA"))
  x = np.asarray(fitted(img.convert("L" if to.gray else "RGB"), to))
  if to.gray: return x[None].copy(), 0
  x = np.ascontiguousarray(x.transpose(2, 0, 1))
  return x, int(np.count_nonzero((x[0] != x[1]) | (x[0] != x[2])))

def reason(e:Exception) -> str:
  if isinstance(e, UnidentifiedImageError): return "not an image of its kind"
  if isinstance(e, OSError) and e.strerror: return e.strerror
  if "encrypted" in str(e): return "encrypted"
  return re.sub(r" ?\(\d.*\)| ?'.*'", "", str(e).split("\n")[0]) or type(e).__name__  # no sizes, no names

# *** all images ***

def each(call:Callable, source:Source, items:list[Item], broken:dict[str, list[str]], what:str) -> Iterator:
  """(item, call(its file)) for the images in their order, on all cores; those that cannot be read go to `broken`,
  by reason."""
  def attempt(item:Item) -> Any:
    try:
      with source.open(item.name) as f: return call(f)
    except Exception as e: return reason(e)  # Pillow raises nearly anything on a damaged file
  def results() -> Iterator[tuple[Item, Any]]:
    workers, waiting = os.cpu_count() or 1, deque[Any]()
    with ThreadPoolExecutor(workers) as pool:
      for item in progress(items, f"{what} {source.path}", len(items)):
        waiting.append((item, pool.submit(attempt, item)))
        if len(waiting) > 4 * workers: yield waiting.popleft()
      yield from waiting
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
    for item, future in results():
      if isinstance(result := future.result(), str): broken.setdefault(result, []).append(str(item.name))
      else: yield item, result

def decode_all(source:Source, size:Size|None, fit:str, mode:str|None, multiple:int, f:BinaryIO) -> dict:
  """Reads a folder or an archive into the array file f: the text behind it, see `keep`."""
  path, (items, classes, said, left) = source.path, arrange(source) if source.names else ([], [], [], [])
  kinds = ", ".join(f"{n} of {kind}" for kind, n in source.others.most_common())
  if kinds: left.append(f"{source.others.total()} files of other kinds left out ({kinds})")
  left += [f"{what}: {some(names)}" for what, names in source.left.items()]
  if not items: raise ValueError("; ".join([f"{path} holds no images ({', '.join(EXTENSIONS)})", *left]))
  broken:dict[str, list[str]] = {}
  found = list(each(measure, source, items, broken, "measuring"))
  of = [measured for _, measured in found]
  kept:list[Item] = []
  colours = brightest = 0
  if found:
    to = plan([m.shape for m in of], size, multiple, fit)
    span, words = brightness(depths := [m.depth for m in of if m.depth])
    to = to._replace(span=span, gray=mode == "gray" or mode is None and all(m.gray for m in of))
    said += [*to.said, *words]
  def rows() -> Iterator[tuple[int, np.ndarray]]:
    nonlocal colours, brightest
    for item, (x, coloured) in each(functools.partial(decode, to), source, [i for i, _ in found], broken, "reading"):
      kept.append(item)
      colours, brightest = colours + coloured, max(brightest, int(x.max()))
      yield item.half, x
  crcs = write_array(f, rows(), len(found), (1 if to.gray else 3, to.height, to.width), "|u1") if found else []
  train = sum(item.half == 0 for item in kept)
  if not train: raise ValueError(f"{path} holds no image that can be read: all {len(items)} are broken "
                                 f"({'; '.join(broken)})")
  if mode is None and not to.gray and not colours:
    f.truncate(f.seek(0))  # or its room counts as taken
    return decode_all(source, size, fit, "gray", multiple, f)
  if mode is None and 0 < (share := colours / (len(kept) * to.height * to.width)) <= 1e-3:
    said.append(f"nearly gray, {share:.2g} of the pixels are coloured: mode gray makes one channel of the three")
  if brightest <= 1: said.append(f"all but black: no pixel is above {brightest} of 255")
  if n := sum(m.deep for m in of): said.append(f"of {n} images of several channels of 16 bits, the upper 8 are read")
  if n := sum(m.clear for m in of): said.append(f"{n} images with transparency put on white")
  if n := sum(m.reduced for m in of): said.append(f"{n} images above {Image.MAX_IMAGE_PIXELS} pixels read at an eighth")
  if n := sum(m.frames > 1 for m in of):
    left.append(f"{sum(m.frames - 1 for m in of)} further pages or frames in {n} of the files left out")
  for why, names in broken.items():
    left.append(f"{len(names)} of {len(items)} images cannot be read, {why}: {some(names)}")
  again = {"key": ""} if set(broken) & set(map(os.strerror, errno.errorcode)) else {}  # a disk may answer the next time
  return {"train": train, "labels": [item.label for item in kept], "classes": classes, "crc": crcs, "limits": None,
          "span": span if depths else None, "said": said, "left": left} | again

"""A dataset in one array file of the cache, and datasets from arrays.

What is read from files is converted once and mapped into memory from then on, so a dataset may be larger than the
memory and the next start takes no time.
"""
from __future__ import annotations
import contextlib, json, math, mmap, os, shutil, tempfile, zipfile, zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
import numpy as np
from PIL import Image, ImageOps
from files.atomic import atomic
from files.bar import progress

KEYS = (("arr_0", "arr_1"), ("images", "labels"), ("x", "y"))  # images and labels in an .npz file
FITS = {"crop": "cropped and resized", "pad": "resized and padded with black", "stretch": "stretched"}
Size = tuple[int, int]  # height, width

class Dataset(NamedTuple):
  """The images and labels of one split, and what there is to say of them."""
  images:np.ndarray  # (N, C, H, W): uint8, or float32 in [-1, 1]; of a file in the cache, mapped and read-only
  labels:np.ndarray  # int32 (N,)
  classes:list[str]  # the name of each class
  digest:str  # of the images (the first 8 hex digits: their zlib.crc32) and of labels, names of classes and limits
  limits:tuple[float, float]|None = None  # for floats: the numbers that -1 and 1 stand for
  heldout:bool = False  # whether the split "test" is apart from "train"; if not, both are the whole
  said:tuple[str, ...] = ()  # how the dataset was read
  left:tuple[str, ...] = ()  # what was left out
  span:tuple[float, float]|None = None  # of image files of more than 8 bits: the values that became 0 and 255

  @property
  def about(self) -> str:
    """One line: number, shape and classes, how the dataset was read, and what was left out."""
    n, c, h, w = self.images.shape
    classes = f" in {len(self.classes)} classes" if len(self.classes) > 1 else ""
    if classes and (empty := np.setdiff1d(np.arange(len(self.classes)), self.labels)).size:
      some = ", ".join(self.classes[i] for i in empty[:5]) + ", ..." * (len(empty) > 5)
      classes += f", {len(empty)} of them without an image ({some})"
    return "; ".join([f"{n} images of {c} x {h} x {w}{classes}", *self.said, *self.left])

def dataset(images:np.ndarray, labels:np.ndarray, classes:list[str], checksum:int|None=None, **rest:Any) -> Dataset:
  """A Dataset with its digest. checksum: the images' CRC, if it is known."""
  checksum = crc(images) if checksum is None else checksum
  others = zlib.crc32(labels.astype("<i4").tobytes() + json.dumps([classes, rest.get("limits")]).encode())
  return Dataset(images, labels, classes, f"{checksum:08x}{others:08x}", **rest)

def crc(images:np.ndarray) -> int:
  """zlib.crc32 of the images' bytes, without a copy of the whole."""
  value = 0
  for part in parts(images): value = zlib.crc32(np.ascontiguousarray(part).data, value)
  return value

def parts(x:np.ndarray) -> Iterator[np.ndarray]:
  """The array in pieces of some 16 MB."""
  step = max(1, (1 << 24) // x[:1].nbytes)
  for i in range(0, len(x), step):
    yield x[i:i + step]
    release(x)

def release(x:np.ndarray) -> None:
  """Gives the pages of a mapped file back to the system, which would count them as this program's memory."""
  mapped = getattr(x, "_mmap", None)
  if mapped is not None and hasattr(mmap, "MADV_DONTNEED"): mapped.madvise(mmap.MADV_DONTNEED)

def trimmed(found:Dataset, multiple:int) -> Dataset:
  """The dataset, cut to a height and width that `multiple` divides."""
  to = plan([found.images.shape[2:]], None, multiple, "crop")
  if not to.said: return found
  images = np.ascontiguousarray(centre(found.images, to.height, to.width))
  return dataset(images, found.labels, found.classes, heldout=found.heldout, said=to.said, left=found.left)

# *** one shape for all ***

class Plan(NamedTuple):
  """What every image of a dataset becomes."""
  height:int
  width:int
  how:str  # crop, pad, stretch, or cut: without resizing
  said:tuple[str, ...] = ()
  gray:bool = False
  span:tuple[float, float] = (0, 255)  # the values that become black and white, of images of more than 8 bits

def plan(shapes:list[Size], size:Size|None, multiple:int, fit:str) -> Plan:
  """The one shape for images of these shapes. A shape that all have stays, but for the smallest crop that `multiple`
  divides. Of several it is the one that more than half have, else the square of the median of the shorter sides, at
  most 64; down to a multiple."""
  (shape, most), n = Counter(shapes).most_common(1)[0], len(shapes)
  if size is None and most == n:
    h, w = (side // multiple * multiple for side in shape)
    if not h or not w: raise ValueError(f"images of {shape[0]}x{shape[1]} are smaller than the {multiple}x{multiple} "
                                        "that the network's levels need: ask for a size or for fewer levels")
    said = f"cut from {shape[0]}x{shape[1]} to {h}x{w}, which {multiple} divides"
    return Plan(h, w, "cut", (said,) if (h, w) != shape else ())
  if size is None:
    side = min(64, int(np.median([min(s) for s in shapes])))
    h, w = (max(multiple, s // multiple * multiple) for s in (shape if 2 * most > n else (side, side)))
  else: h, w = size
  touched = [s for s in shapes if s != (h, w)]
  done = "resized" if all(s[0] * w == s[1] * h for s in touched) else FITS[fit]
  return Plan(h, w, fit, (f"{len(touched)} of {n} images {done} to {h}x{w}",) if touched else ())

def centre(x:np.ndarray, h:int, w:int) -> np.ndarray:
  top, left = (x.shape[-2] - h) // 2, (x.shape[-1] - w) // 2
  return x[..., top:top + h, left:left + w]

def fitted(img:Image.Image, to:Plan, black:int=0) -> Image.Image:
  w, h = to.width, to.height
  if img.size == (w, h): return img
  if to.how == "cut":
    left, top = (img.width - w) // 2, (img.height - h) // 2
    return img.crop((left, top, left + w, top + h))
  if to.how == "stretch": return img.resize((w, h), Image.Resampling.LANCZOS)
  if to.how == "pad": return ImageOps.pad(img, (w, h), Image.Resampling.LANCZOS, color=black)
  return ImageOps.fit(img, (w, h), Image.Resampling.LANCZOS)

# *** the array file in the cache ***

def cache() -> Path: return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ddpm")

def keep(path:Path, split:str, options:tuple, key:str, write) -> Dataset:
  """A split of the dataset at a path, read with these options: from its array file or, if there is none with this key,
  from what write(f) writes into a new one.

  The file is an .npy file (the images for training, then those held out), and behind it a text in JSON and the text's
  length. One name for each path and options: a changed dataset takes the place of the one before."""
  whole = path.resolve()
  name = os.fsencode(whole.name)[:200].decode(errors="ignore")  # a file's name has at most 255 bytes
  file = cache() / "decoded" / f"{name}-{zlib.crc32(repr((whole, options)).encode()):08x}.npy"
  try:
    with open(file, "rb") as f: images, text = unpack(f)
    fresh = text["key"] != key
  except (OSError, ValueError, KeyError, TypeError): fresh = True  # none there, or a damaged one
  if fresh:
    with atomic(file) as f:
      blob = json.dumps({"key": key} | write(f)).encode()
      f.write(blob + len(blob).to_bytes(8, "little"))
      f.flush()
      images, text = unpack(f)
  n, labels = text["train"], np.array(text["labels"], np.int32)
  heldout = n < len(labels)
  half = int(heldout and split == "test")
  part = slice(n, None) if half else slice(n)
  limits, span = [tuple(v) if (v := text.get(k)) else None for k in ("limits", "span")]
  return dataset(images[part], labels[part], text["classes"], text["crc"][half], limits=limits, heldout=heldout,
                 said=tuple(text["said"]), left=tuple(text["left"]), span=span)

def unpack(f:BinaryIO) -> tuple[np.ndarray, dict]:
  """The images, mapped, and the text of an array file. ValueError if it is damaged."""
  end = f.seek(-8, os.SEEK_END)
  length = int.from_bytes(f.read(8), "little")
  if length > end: raise ValueError("damaged")
  f.seek(end - length)
  text = json.loads(f.read(length))
  f.seek(0)
  images = mapped(f)
  if images.offset + images.nbytes + length != end or len(images) != len(text["labels"]): raise ValueError("damaged")
  return images, text

def mapped(f:BinaryIO) -> np.memmap:
  """The array of an open .npy file, mapped into memory."""
  version = np.lib.format.read_magic(f)
  header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, fortran, dtype = header(f)
  if dtype.hasobject: raise ValueError("it holds Python objects")
  if not math.prod(shape): raise ValueError(f"it is empty, of shape {shape}")
  return np.memmap(f, dtype, "r", f.tell(), shape, "F" if fortran else "C")

def write_array(f:BinaryIO, rows:Iterable[tuple[int, np.ndarray]], n:int, shape:tuple[int, ...],
                dtype:str) -> list[int]:
  """Writes an .npy file of rows of images of this shape, at most n, each with its half, 0 or 1: the CRC of each half.

  OSError, before anything is written, if there is too little room."""
  need, free = n * math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(Path(f.name).parent).free
  if need > free: raise OSError(f"the images need {need / 1e9:.1f} GB there and {free / 1e9:.1f} GB are free "
                                "(XDG_CACHE_HOME may name another folder)")
  def header(count:int) -> None:  # of the same length for any count
    f.seek(0)
    np.lib.format.write_array_header_1_0(f, {"descr": dtype, "fortran_order": False, "shape": (count, *shape)})
  header(n)
  count, crcs = 0, [0, 0]
  for half, row in rows:
    f.write(row.data)
    crcs[half] = zlib.crc32(row.data, crcs[half])
    count += row.size // math.prod(shape)
  f.truncate()
  header(count)
  f.seek(0, os.SEEK_END)
  return crcs

# *** arrays ***

def channels_first(x:np.ndarray) -> tuple[np.ndarray, str]:
  """The array seen as (N, C, H, W), and how its axes were told apart.

  Three axes are N, H, W. Of four, two equal neighbours are H and W; else the channels are the smaller of the second and
  the last, and the second if they are equal."""
  if x.ndim not in (3, 4) or 0 in x.shape:
    raise ValueError(f"images should be (N, H, W), (N, H, W, C) or (N, C, H, W), not of shape {x.shape}")
  if x.dtype.kind not in "buif": raise ValueError(f"images should be uint8 or floats, not {x.dtype}")
  if x.ndim == 3: return x[:, None], "read as N, H, W"
  _, a, b, c = x.shape
  if a == b != c or (a == b) == (b == c) and c < a: return x.transpose(0, 3, 1, 2), "read as N, H, W, C"
  return x, "read as N, C, H, W"

def limits_of(x:np.ndarray) -> tuple[float, float]|None:
  """The least and the greatest number, or None if the array holds the levels of uint8: bytes, truth values, or whole
  numbers of another type from 0 to a greatest one of 128 to 255."""
  if x.dtype in (np.uint8, bool): return None
  ends, bad = [], 0
  for part in parts(x):
    bad += int(np.count_nonzero(~np.isfinite(part)))
    ends += [float(part.min()), float(part.max())]
  if bad: raise ValueError(f"{bad} of its {x.size} numbers are not finite")
  lo, hi = min(ends), max(ends)
  if x.dtype.kind in "iu" and lo >= 0 and 128 <= hi <= 255: return None
  if lo == hi: raise ValueError(f"all its numbers are {lo:g}")
  return lo, hi

def converted(x:np.ndarray, limits:tuple[float, float]|None, to:Plan) -> np.ndarray:
  """Images (N, C, H, W) as uint8, or as float32 with the limits at -1 and 1, in their new shape."""
  if to.how == "cut": x = centre(x, to.height, to.width)
  if x.dtype == bool: x = x * np.uint8(255)
  if limits is None: x = x.astype(np.uint8, copy=False)
  else:
    middle, half = limits[0] / 2 + limits[1] / 2, limits[1] / 2 - limits[0] / 2
    x = ((x.astype(np.float64) - middle) / half).astype(np.float32)
  if x.shape[2:] == (to.height, to.width): return x
  black = 0 if limits is None else -1
  planes = [np.asarray(fitted(Image.fromarray(plane), to, black)) for plane in x.reshape(-1, *x.shape[2:])]
  x = np.reshape(planes, (*x.shape[:2], to.height, to.width))
  return x if limits is None else x.clip(-1, 1)  # LANCZOS goes a little beyond

def numbered(labels:Any, n:int) -> tuple[np.ndarray, list[str]]:
  """Labels as int32 (n,), and the names of the classes. Whole numbers stay as they are, words are numbered in order."""
  if labels is None: return np.zeros(n, np.int32), [""]
  labels = np.asarray(labels.numpy() if hasattr(labels, "numpy") else labels)
  if labels.shape not in ((n,), (n, 1)): raise ValueError(f"labels of shape {labels.shape} for {n} images")
  labels = labels.reshape(n)
  if labels.dtype.kind == "S" or all(isinstance(label, str) for label in labels):
    if labels.dtype.kind == "S": labels = np.char.decode(labels, "utf-8", "replace")
    names, labels = np.unique(labels.astype(str), return_inverse=True)
    return labels.astype(np.int32), names.tolist()
  try:
    with np.errstate(invalid="ignore"): whole = labels.astype(np.int64)
  except (ValueError, TypeError, OverflowError): whole = np.full(n, -1)
  if not (whole == labels).all() or whole.min() < 0 or whole.max() > 99_999:
    raise ValueError("labels should be whole numbers from 0 to 99999, or words")
  return whole.astype(np.int32), [str(i) for i in range(whole.max() + 1)]

def surveyed(x:np.ndarray, labels:Any, size:Size|None, fit:str, multiple:int) -> tuple:
  """What an array is: (as (N, C, H, W), limits, plan, labels, names of the classes, what is to be said)."""
  x, layout = channels_first(x)
  limits, to, said = limits_of(x), plan([x.shape[2:]] * len(x), size, multiple, fit), [layout]
  given, classes = numbered(labels, len(x))
  if limits: said.append(f"{x.dtype} from {limits[0]:g} to {limits[1]:g} scaled to [-1, 1]")
  elif x.dtype not in (np.uint8, bool): said.append(f"{x.dtype} read as levels from 0 to 255")
  elif x.dtype == np.uint8 and all(part.max() <= 1 for part in parts(x)) and x.any():
    x = x.view(bool)
    said.append("0 and 1 read as black and white")
  return x, limits, to, given, classes, [*said, *to.said]

def from_array(x:Any, labels:Any=None, size:Size|None=None, fit:str="crop", multiple:int=1) -> Dataset:
  """An array, or anything with a method numpy(), as a dataset in memory. uint8 is not copied."""
  try: x = np.asarray(x.numpy() if hasattr(x, "numpy") else x)
  except ValueError as e: raise ValueError(f"this is no array of images: {e}") from e
  x, limits, to, given, classes, said = surveyed(x, labels, size, fit, multiple)
  images = converted(x, limits, to) if limits is None else np.concatenate([converted(p, limits, to) for p in parts(x)])
  return dataset(images, given, classes, limits=limits, said=tuple(said))

def convert_all(path:Path, size:Size|None, fit:str, multiple:int, f:BinaryIO) -> dict:
  """Reads a .npy or an .npz file into the array file f: the text behind it, see `keep`."""
  with contextlib.ExitStack() as stack:
    try:
      found, labels, said = open_arrays(path, Path(f.name).parent, stack)
      x, limits, to, given, classes, more = surveyed(found, labels, size, fit, multiple)
    except Exception as e:  # a damaged file raises nearly anything
      raise ValueError(f"{path} cannot be read: {e}".split("\n")[0]) from e
    shape, dtype = (x.shape[1], to.height, to.width), "|u1" if limits is None else "<f4"
    rows = ((0, np.ascontiguousarray(converted(part, limits, to))) for part in progress(parts(x), f"reading {path}"))
    crcs = write_array(f, rows, len(x), shape, dtype)
    return {"train": len(x), "labels": given.tolist(), "classes": classes, "crc": crcs, "limits": limits,
            "said": said + more, "left": []}

def open_arrays(path:Path, room:Path, stack:contextlib.ExitStack) -> tuple[np.ndarray, np.ndarray|None, list[str]]:
  """Images, labels or None, and what is to be said. An array in an .npz file is unpacked into a nameless file."""
  if path.suffix.lower() == ".npy": return mapped(stack.enter_context(open(path, "rb"))), None, []
  archive = stack.enter_context(zipfile.ZipFile(path))
  names = [name.removesuffix(".npy") for name in archive.namelist()]
  def member(name:str) -> np.ndarray:
    unpacked = stack.enter_context(tempfile.TemporaryFile(dir=room))
    with archive.open(name + ".npy") as packed: shutil.copyfileobj(packed, unpacked, 1 << 20)
    unpacked.seek(0)
    return mapped(unpacked)
  for images, labels in KEYS:
    if images in names:
      said = [f"images from {images}", *(f"{name} not read" for name in names if name not in (images, labels))]
      return member(images), member(labels) if labels in names else None, said
  raise ValueError(f"it holds {', '.join(names) or 'nothing'}, and none of {', '.join(name for name, _ in KEYS)}")

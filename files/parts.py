"""Finished batches of images on disk: any number needs the memory of one batch, and what was stopped goes on."""
import argparse, contextlib, hashlib, json, shutil, sys, zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Device, nn
from files import pictures
from files.atomic import atomic

SHOWN = 256  # images in a picture

def place(path:str, model:Any, *facts:Any) -> Path:
  """The folder of the batches for a file. All that fixes the images is in its name: the kind of device, the weights of
  a model, and facts, arrays or what JSON can say. Another command has another folder."""
  digest = hashlib.sha256(Device.DEFAULT.split(":")[0].encode())
  for tensor in nn.state.get_state_dict(model).values(): digest.update(tensor.float().numpy().tobytes())
  for fact in facts:
    digest.update(fact.tobytes() if isinstance(fact, np.ndarray) else json.dumps(fact, default=str).encode())
  return Path(f"{path}.{digest.hexdigest()[:12]}.parts")

def check(folder:Path, png:str|None, index:range, *outs:str|None):
  """OSError if drawing begins anew and the folder `png` has pictures of these numbers: they are another command's.
  ValueError if one of them has the name of another file to be written."""
  for i in index if png else ():
    path = numbered(png, i)
    if path.exists() and not (folder/"begun").exists(): raise OSError(f"{path} is there already: name another folder")
    for out in filter(None, outs):
      if path.name == Path(out).name and path.resolve() == Path(out).resolve():
        raise ValueError(f"{out} would be written over by image {i} of --png")

def numbered(png:str|None, i:int) -> Path:
  """The file of image i in the folder `png`."""
  return Path(str(png), f"{i:06d}.png")

@contextlib.contextmanager
def kept(folder:Path, png:str|None, index:range, first:bool) -> Iterator[None]:
  """Keeps the folder if something goes wrong and a batch is finished, or one of the files `index` in the folder `png`;
  else removes it. Only the first process does."""
  done = False
  try:
    yield
    done = True
  finally:
    begun = finished(folder) or any(numbered(png, i).exists() for i in (index if png else ()))
    if first and (done or not begun): shutil.rmtree(folder, ignore_errors=True)
    elif first: print(f"what is finished is in {folder}: the same command goes on", file=sys.stderr)

def missing(folder:Path, starts:range, png:str|None, first:int) -> np.ndarray:
  """Which of the batches that begin at these images are not finished, or lack one of their files in the folder `png`:
  (len(starts),) bool. Says how many are."""
  def done(start:int) -> bool:
    index = range(start, min(start + starts.step, starts.stop)) if png else ()
    return (folder/f"{start:09d}.npz").exists() and all(numbered(png, first + i).exists() for i in index)
  found = np.array([not done(start) for start in starts])
  if not found.all(): print(f"{len(found) - found.sum()} of {len(found)} batches are in {folder}", file=sys.stderr)
  return found

def finished(folder:Path) -> list[Path]:
  """The batches, in order: each is named by its first image."""
  return sorted(folder.glob("*.npz"))

def save(folder:Path, start:int, images:np.ndarray, shown:np.ndarray, png:str|None, first:int):
  """Images (n, C, H, W) as a batch that begins at `start`, and what is shown of them, uint8 (frames, n, C, H, W), of
  which the last frame goes into files 000000.png ... of the folder `png`; their numbers begin at first + start."""
  if png: (folder/"begun").touch()  # from here on there may be pictures in it
  for i, image in enumerate(pictures.visible(shown[-1]) if png else ()):
    pictures.save_png(numbered(png, first + start + i), pictures.picture(image))
  with atomic(folder/f"{start:09d}.npz") as f:  # last, so that all of a finished batch is there
    np.savez(f, images=images, shown=shown[:, :max(0, SHOWN - start)])

def write(a:argparse.Namespace, folder:Path, labels:np.ndarray, classes:int, names:list[str]):
  """The files that sample.py's command line asks for, from all batches."""
  shown, columns, rows = {*labels.tolist()}, None, None
  if a.classes: columns, rows = len(labels) // len(shown), [k for i, k in enumerate(names) if i in shown] or None
  movie = np.concatenate([np.load(path)["shown"] for path in finished(folder) if int(path.stem) < SHOWN], 1)
  if a.npz: write_npz(a.npz, folder, labels, classes > 0 and a.guidance != 0)
  if a.gif: pictures.save_gif(a.gif, [pictures.grid(x, columns, row_names=rows) for x in movie])
  pictures.save_png(a.out, pictures.grid(movie[-1], columns, row_names=rows))
  if sys.stdout.isatty(): print(pictures.to_terminal(movie[-1]))
  said = (a.out, a.npz, a.png, a.gif, pictures.remark(movie.shape[2]))
  print("wrote " + ", ".join(filter(None, said)), file=sys.stderr)

def write_npz(path:str, folder:Path, labels:np.ndarray, labelled:bool):
  """`pictures.save_npz` of all batches, one at a time. labels: one for each image, which `labelled` writes as arr_1."""
  with atomic(path) as f, zipfile.ZipFile(f, "w") as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as out:
      for i, part in enumerate(finished(folder)):
        images = np.load(part)["images"].transpose(0, 2, 3, 1)
        about = {"descr": images.dtype.str, "fortran_order": False, "shape": (len(labels), *images.shape[1:])}
        if i == 0: np.lib.format.write_array_header_1_0(out, about)
        out.write(images.tobytes())
    if labelled:
      with archive.open("arr_1.npy", "w", force_zip64=True) as out: np.lib.format.write_array(out, labels)

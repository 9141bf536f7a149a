"""Work in batches of one size, so that one captured step serves them all; and which images and times are taken."""
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
import numpy as np
from tinygrad import Device, Tensor
from tinygrad.helpers import tqdm
from engine import hosts
from engine.capture import placed
from engine.streams import stream
from files.bar import progress

T = TypeVar("T")

def choose(total:int, n:int, seed:int, use:str) -> np.ndarray:
  """n of the indices below `total`, in order, or all if there are fewer. use: a word of `stream`."""
  return np.sort(stream(seed, use).choice(total, min(n, total), replace=False))

def tensors(*arrays:np.ndarray|None) -> list[Tensor]:
  """The arrays, but for those that are None, as realized float32 or int32 tensors: what a captured step takes."""
  kinds = [(a, np.float32 if a.dtype.kind == "f" else np.int32) for a in arrays if a is not None]
  return [placed(a.astype(kind), Device.DEFAULT) for a, kind in kinds]

def asked(chain:Any, model:Callable[..., Tensor]) -> Callable[..., Tensor]:
  """model(x_t, t, …) as a DDPM asks it: at step t of a shorter chain (`every`) it is told the time of the whole one."""
  if chain.times[-1] == chain.T: return model
  times = Tensor(chain.times.astype(np.int32)).realize()
  return lambda x, t, *y: model(x, times.to(x.device)[t], *y)

def in_batches(step:Callable[[np.ndarray, Callable], np.ndarray], n:int, size:int, desc:str="",
               rounds:int=1) -> np.ndarray:
  """step(i, tick) -> (..., size) over all i of 0..n-1, `size` at a time: (..., n). What is beyond n-1, to fill up the
  last batch, is cut. desc: a bar with the time left, if stderr is a terminal; step calls tick(1) `rounds` times.

  Each of several processes does as many batches, and gets the results of all. ValueError for a size below 1."""
  if size < 1: raise ValueError(f"a batch of {size} images: choose 1 or more")
  size = min(size, math.ceil(n / hosts.size()))
  mine = math.ceil(math.ceil(n / size) / hosts.size()) * size
  starts = range(hosts.rank() * mine, (hosts.rank() + 1) * mine, size)
  with tqdm(total=len(starts) * rounds, desc=desc, disable=None if desc else True) as bar:
    parts = [step(np.minimum(np.arange(k, k + size), n - 1), bar.update) for k in starts]
  return hosts.gather(np.concatenate(parts, -1))[..., :n]

def ahead(make:Callable[[int], T], items:Iterable[int]) -> Iterator[tuple[int, T]]:
  """(i, make(i)) of each item. The next one is made in a thread meanwhile, so that no device waits for it."""
  before = None
  with ThreadPoolExecutor(1) as pool:
    for i in items:
      made = i, pool.submit(make, i)
      if before: yield before[0], before[1].result()
      before = made
    if before: yield before[0], before[1].result()

def mean_error(v:np.ndarray) -> tuple[float, float|None]:
  """The mean and its standard error, None for a single value."""
  return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None

def geometric(T:int, n:int) -> np.ndarray:
  """n + 1 whole numbers from 1 to T, each above the one before, in a constant ratio as far as that allows."""
  if n < 0 or n % 1: raise ValueError(f"{n} random times: choose a whole number, 0 or more")
  g = [1]
  for left in range(n, 0, -1): g.append(max(g[-1] + 1, round(g[-1] * (T / g[-1]) ** (1 / left))))
  return np.array(g)

def drawing(sampler:Callable, labelled:Callable, most:int) -> Callable[..., dict]:
  """draw(x, labels, times, keep=(0,), index=None) takes x (N, C, H, W) down `times`, at most `most` images at once:
  {t: (x_t, x̂_0)} for the t in keep. index: whose noise each image gets, 0 .. N−1 by default.

  sampler(model, x, times, first=index) as in sample.py; labelled(labels) is a model of these labels."""
  def draw(x:np.ndarray, labels:np.ndarray, times:list[int], keep:Sequence[int]=(0,),
           index:np.ndarray|None=None, desc:str="") -> dict[int, tuple[np.ndarray, np.ndarray]]:
    n, index = len(x), np.arange(len(x)) if index is None else index
    size = math.ceil(n / math.ceil(n / most))
    out:dict[int, tuple[list, list]] = {t: ([], []) for t in keep}
    for i in range(0, n, size):
      at = np.arange(i, i + size) % n  # the last batch is filled up, and cut again below
      visits = sampler(labelled(labels[at]), x[at], times, first=index[at])
      said = desc or f"images {i + 1}-{min(i + size, n)} of {n}"
      for t, *pair in progress(visits, said, len(times) - 1):
        for kept, v in zip(out.get(t, ()), pair): kept.append(v.numpy())
    return {t: (np.concatenate(x)[:n], np.concatenate(x0)[:n]) for t, (x, x0) in out.items()}
  return draw

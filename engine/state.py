"""The numbers that training changes: weights, their average (EMA), Adam's two moments and the gradient."""
from __future__ import annotations
import copy, itertools, math
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any
import numpy as np
from tinygrad import Device, Tensor, dtypes, nn
from tinygrad.dtype import DType
from tinygrad.engine.jit import JitError
from tinygrad.helpers import Context
from engine import hosts
from engine.capture import captured, inside, placed

class State:
  """Each of these is one flat buffer, in flat["raw"], ["ema"], ["m"], ["v"] and ["grad"], so that a handful of kernels
  update all parameters at once. The network's own tensors lie inside flat["raw"], or in 16 bits inside flat["low"];
  those of `average`, a copy of the network, lie inside flat["ema"]. Nothing is copied after a step.

  model: any object with tensors as attributes, at any depth. Those of floats are trained, but for those that
  `is_param_(False)` takes out; `kept` are the others, which the average shares. ValueError if there is none to train,
  or the model cannot be copied."""
  def __init__(self, model, dtype:DType=dtypes.float32):
    weights, self.kept, seen = {}, {}, set()
    for k, v in nn.state.get_state_dict(model).items():
      if id(v) in seen: continue  # a tensor that has two names counts once
      if v.is_param and dtypes.is_float(v.dtype): weights[k] = v.numpy().astype(np.float32)
      else: self.kept[k] = v.replace(v.to(Device.DEFAULT)).realize()
      seen.add(id(v))
    if not weights: raise ValueError("the model has no tensors of floats that could be trained")
    for array in weights.values(): hosts.same(array)
    for v in self.kept.values() if hosts.size() > 1 else ():
      hosts.same(array := np.array(v.numpy()))
      v.replace(Tensor(array, device=v.device).cast(v.dtype).realize())
    self.shapes = {k: v.shape for k, v in weights.items()}
    own = getattr(model, "__dict__", {})  # a UNet has a type for its activations: perhaps that of another run
    if isinstance(own.get("dtype"), DType) and "config" in own: model.dtype = dtypes.float32
    self.model, self.average, self.dtype, self.device = model, twin(model, self.kept), dtype, Device.DEFAULT
    if dtype != dtypes.float32 and "dtype" in own: model.dtype = dtype
    self.size = sum(v.size for v in weights.values())
    # each parameter begins at a multiple of 256 numbers, where every device can have a buffer begin
    self.starts = [0, *itertools.accumulate(v.size + -v.size % 256 for v in weights.values())]
    self.jits:dict = {}
    self.start(weights)

  def start(self, weights:dict[str, np.ndarray]):
    """Takes the weights, by name, for their average as well; the moments are 0."""
    named = {f"{key}.{k}": v for key in ("raw", "ema") for k, v in weights.items()}
    self.put(named | {f"adam.{key}": np.zeros(self.size, np.float32) for key in ("m", "v")})

  def put(self, arrays:dict[str, np.ndarray]):
    """Takes what `arrays` gave."""
    ends = list(itertools.accumulate(map(math.prod, self.shapes.values())))
    self.jits.clear()  # they know the buffers of before
    self.flat = {"grad": placed(self.pack([]), self.device)}
    for key in ("raw", "ema"):
      self.flat[key] = placed(self.pack([arrays[f"{key}.{k}"] for k in self.shapes]), self.device)
    for key in ("m", "v"): self.flat[key] = placed(self.pack(np.split(arrays[f"adam.{key}"], ends[:-1])), self.device)
    if self.dtype != dtypes.float32: self.flat["low"] = self.flat["raw"].cast(self.dtype).contiguous().realize()
    self.weights, self.gradients = self.views("raw"), self.views("grad")
    if "low" in self.flat:  # scales, shifts and biases are not rounded
      self.weights = [w if w.ndim == 1 else low for w, low in zip(self.weights, self.views("low"), strict=True)]
    for network, parts in ((self.model, self.weights), (self.average, self.views("ema"))):
      tensors = nn.state.get_state_dict(network)
      for k, part in zip(self.shapes, parts, strict=True): tensors[k].replace(part)
    for k, v in self.kept.items():
      if f"kept.{k}" in arrays: v.replace(Tensor(arrays[f"kept.{k}"], device=v.device).cast(v.dtype).realize())

  def views(self, key:str) -> list[Tensor]:
    """Each parameter's part of a flat buffer."""
    return [inside(self.flat[key], i, shape) for i, shape in zip(self.starts, self.shapes.values())]

  def pack(self, arrays:Sequence[np.ndarray]) -> np.ndarray:
    """One flat array of each parameter's; zeros between them and for those that are not given."""
    flat = np.zeros(self.starts[-1] + -self.starts[-1] % 4096, np.float32)
    for i, v in zip(self.starts, arrays): flat[i:i+v.size] = v.reshape(-1)
    return flat

  def arrays(self) -> dict[str, np.ndarray]:
    """For the checkpoint: the weights by name, the moments flat, one parameter after the other."""
    cut = {}
    for key in ("raw", "ema", "m", "v"):
      flat = self.flat[key].numpy()
      cut[key] = [flat[i:i+math.prod(s)].reshape(s) for i, s in zip(self.starts, self.shapes.values())]
    named = {f"{key}.{k}": v for key in ("raw", "ema") for k, v in zip(self.shapes, cut[key])}
    named |= {f"kept.{k}": v.numpy() for k, v in self.kept.items()}
    return named | {f"adam.{key}": np.concatenate([v.reshape(-1) for v in cut[key]]) for key in ("m", "v")}

  def gradient(self, loss:Callable[..., Tensor], batch:Sequence[np.ndarray], parts:int=1) -> np.ndarray:
    """∇θ of the mean over a batch of loss(model, *batch) -> (B,), into flat["grad"]. Returns the losses (B,).

    Each of several processes does its share of the batch. parts: into how many that is cut, one after the other, to
    save memory. In float16 the loss is scaled up: the gradient of a mean over so many numbers would fall below the
    least number that float16 has."""
    mine = hosts.share(len(batch[0]), parts)
    size = (mine.stop - mine.start) // parts
    scale = size * batch[0][0].size if self.dtype == dtypes.float16 else 1
    def step(*given:Tensor) -> Tensor:
      before = [(v, v.uop) for v in self.kept.values()]
      try: each = loss(self.model, *given)
      except JitError:  # it reads the host and runs once more: what it gave to these is taken back
        for v, uop in before: v.uop = uop
        raise
      found = (each.mean() * scale).gradient(*self.weights)
      for part, g in zip(self.gradients, found, strict=True):
        g = g.reshape(part.shape).float() / (scale * parts * hosts.size())
        part.assign(part + g if parts > 1 else g)
      Tensor.realize(each, *self.gradients, *self.kept.values())
      return each
    def clear() -> Tensor: return self.flat["grad"].assign(self.flat["grad"] * 0).realize()
    self.graph = captured(step, self.jits, ("gradient", id(loss), parts))
    if parts > 1: captured(clear, self.jits, ("clear",))()
    with Context(TRAINING=1):
      cuts = (slice(i, i + size) for i in range(mine.start, mine.stop, size))
      each = [self.graph(*(placed(v[cut], self.device) for v in batch)).numpy() for cut in cuts]
    hosts.total(self.flat["grad"])
    return hosts.gather(np.concatenate(each))

  def losses(self, loss:Callable[..., Tensor], batch:Sequence[np.ndarray], size:int) -> np.ndarray:
    """The losses of a batch (n,) under the averaged weights, `size` examples at a time; the last are filled up."""
    graph = captured(lambda *given: loss(self.average, *given).realize(), self.jits, ("losses", id(loss)))
    n, found = len(batch[0]), []
    for i in range(0, n, size):
      at = np.arange(i, i + size) % n
      found.append(graph(*(placed(v[at], self.device) for v in batch)).numpy())
    return np.concatenate(found)[:n]

def held(model) -> dict[int, Any]:
  """All that a model holds, at any depth, by id."""
  waiting, found = [model], dict[int, Any]()
  while waiting:
    if id(v := waiting.pop()) in found: continue
    found[id(v)] = v
    if isinstance(v, dict | list | tuple): waiting += v.values() if isinstance(v, dict) else v
    elif not isinstance(v, Tensor | type | FunctionType | ModuleType): waiting += getattr(v, "__dict__", {}).values()
  return found

def twin(model, kept:dict[str, Tensor]):
  """A copy of a model, whose tensors are other objects but for those that are `kept`. The numbers are the same ones.
  ValueError if it cannot be copied; functions never are, so that one which knows the model's tensors would go on with
  them."""
  parts = held(model)
  for f in parts.values():
    cells = f.__closure__ or () if isinstance(f, FunctionType) else ()
    if any(id(c.cell_contents) in parts and nn.state.get_state_dict(c.cell_contents) for c in cells):
      raise ValueError(f"the model holds a function, {f.__qualname__}, that uses its tensors: the average of its "
                       "weights needs a method or a class instead")
  memo = {id(v): Tensor(v.uop) for v in nn.state.get_state_dict(model).values()} | {id(v): v for v in kept.values()}
  try: return copy.deepcopy(model, memo)
  except Exception as e: raise ValueError(f"the model cannot be copied for the average of its weights: {e}") from e

"""How a step is captured, and how arrays are put where it reads them."""
from __future__ import annotations
import contextlib, math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast
import numpy as np
from tinygrad import Device, Tensor, TinyJit, nn
from tinygrad.device import Allocator, Buffer
from tinygrad.engine.jit import JitError, _TinyJit
from tinygrad.uop.ops import UOp
try: from fast import copied, placed, prepare, scope
except ImportError:
  scope = contextlib.nullcontext  # type: ignore[assignment]
  def prepare(device:str): pass
  def copied(v:Tensor, device:str) -> Tensor: return v.clone(device).realize()
  def placed(array:np.ndarray, device:str) -> Tensor: return copied(Tensor(array, device="NPY"), device)

def captured(step:Callable, kept:dict|None=None, key:Hashable=()) -> Callable:
  """step(*tensors) -> tensors, as one TinyJit that its first call captures. Each later call writes its outputs over
  those of the call before. A step that cannot be captured in its first call, because it reads a tensor's values on
  the host, as a model in numpy does, or is given one tensor twice, always runs as it is.

  kept: a dict that keeps the captured step for the next caller with the same key. The key names all that makes it
  another step: what it does, its options, the id of each object that it uses. The dict also keeps these objects alive,
  so that no other object gets such an id."""
  if kept is not None and key in kept: return kept[key]
  def copying(*tensors:Tensor):
    out, bases = step(*tensors), {t.uop.base for t in tensors}  # an input would come back, of the first call for ever
    return tuple(v.clone() if v.uop.base in bases else v for v in out) if isinstance(out, tuple) else out
  jit = TinyJit(copying)
  jit.cnt = 1  # a fresh one would run call 0 uncaptured, for the sake of lazy state; here nothing is lazy
  runs:list[Callable] = [jit]
  def call(*tensors:Tensor):
    if jit.captured is not None: return jit(*tensors)
    with scope(), joined(jit):
      for device in {Device.DEFAULT, *(t.device for t in tensors if isinstance(t.device, str))}: started(device)
      try: return runs[0](*tensors)
      except JitError: runs[0] = step
      return step(*tensors)
  call.jit = jit  # type: ignore[attr-defined]  # its kernels can be counted
  if kept is not None: kept[key] = call
  return call

@contextlib.contextmanager
def joined(own:_TinyJit) -> Iterator[None]:
  """Inside of it every other TinyJit, as a model may be one, runs its function, which becomes a part of this one."""
  call = _TinyJit.__call__
  def plainly(jit:_TinyJit, *args, **named):
    return call(jit, *args, **named) if jit is own or jit.fxn is None else jit.fxn(*args, **named)
  _TinyJit.__call__ = plainly  # type: ignore[assignment,method-assign]
  try: yield
  finally: _TinyJit.__call__ = call  # type: ignore[method-assign]

def identity(model:Any) -> tuple:
  """A model in the key of a captured step: itself, and where its tensors lie, for others may take their place. (What a
  function uses is not seen: with other weights it needs another dict of steps.)"""
  try: return id(model), *(v.uop for v in nn.state.get_state_dict(model).values())
  except RecursionError: return (id(model),)  # it holds itself

def started(device:str):
  """Makes sure that tinygrad's generator of random numbers, of which a model's own dropout may draw, has its counter
  already: one that is made inside of a captured step begins anew in each call."""
  if device not in Tensor._device_seeds: Tensor._next_counter(device, 0)
  Tensor.realize(*Tensor._device_seeds.values(), *Tensor._device_rng_counters.values())

def inside(flat:Tensor, start:int, shape:tuple[int, ...]) -> Tensor:
  """The part of a flat tensor that begins at `start`, as a buffer of its own within flat's buffer.

  The place of a slice would be written into each kernel that touches it, and each part would need its own kernels.
  On a device without such buffers (WebGPU) the part is a slice. tinygrad does not know that a part and `flat` share
  memory: realize what writes to one before building what reads from the other."""
  size, whole = math.prod(shape), cast(Buffer, flat.uop.base.buffer)
  prepare(whole.device)
  if type(Device[whole.device].allocator)._offset is Allocator._offset:
    return flat.reshape(-1)[start:start+size].reshape(shape)
  part = whole.ensure_allocated().view(size, flat.dtype, start*flat.dtype.itemsize)
  return Tensor(UOp.from_buffer(part, whole.device)).reshape(shape)

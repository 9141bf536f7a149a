"""How a step is captured, and arrays put where it reads them."""
from __future__ import annotations
import math
from collections.abc import Callable
import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.device import Allocator, Buffer
from tinygrad.engine.jit import JitError
from tinygrad.uop.ops import UOp

def captured(step:Callable, kept:dict|None=None, *key) -> Callable:
  """step(*tensors) -> tensors as one TinyJit, captured in its first call: a fresh TinyJit's call 0 runs uncaptured, to
  let lazy state settle, and here there is none. The next call writes its outputs over those of the call before.

  A step that reads a tensor's values on the host, as a model in numpy does, cannot be captured and runs as it is.
  kept: a dict that keeps the captured step for the next caller with the same code, `key` and enclosed variables."""
  kept = {} if kept is None else kept
  # all that the step encloses is a part of the key: with another eta or model it is another step
  full = (step.__code__, *key, *(cell.cell_contents for cell in step.__closure__ or ()))
  if full in kept: return kept[full]
  jit = TinyJit(step)
  jit.cnt = 1
  runs:list[Callable] = [jit]
  def call(*tensors:Tensor):
    if runs[0] is jit and jit.cnt == 1:
      try: return jit(*tensors)
      except JitError: runs[0] = step
    return runs[0](*tensors)
  call.jit = jit  # type: ignore[attr-defined]  # for who counts its kernels
  kept[full] = call
  return call

def placed(array:np.ndarray, device:str) -> Tensor:
  """The array on the device. `Tensor(array).realize()` plans a copy and looks through all tensors that there are, which
  takes milliseconds where a step may take ten."""
  source = Tensor(np.ascontiguousarray(array), device="NPY").uop.base.buffer
  assert isinstance(source, Buffer)
  made = Buffer(device, source.size, source.dtype).allocate().copy_from(source)
  return Tensor(UOp.from_buffer(made, device)).reshape(array.shape)

def inside(flat:Tensor, device:str, start:int, shape:tuple[int, ...]) -> Tensor:
  """The part of a flat tensor that begins at `start` on this device, with a buffer of its own that lies within flat's.

  A slice would have its place written into each kernel that touches it, and each of these be compiled by itself. It is
  one where the device knows no such buffers (WebGPU). To tinygrad the two are strangers: realize what writes the one
  before what reads the other is made."""
  size, buffer = math.prod(shape), flat.uop.base.buffer
  if isinstance(buffer, Buffer) and type(Device[device].allocator)._offset is Allocator._offset:
    return flat.reshape(-1)[start:start+size].reshape(shape)
  whole = buffer if isinstance(buffer, Buffer) else next(b for b in buffer.bufs if b.device == device)
  part = whole.ensure_allocated().view(size, flat.dtype, start*flat.dtype.itemsize)
  return Tensor(UOp.from_buffer(part, device)).reshape(shape)

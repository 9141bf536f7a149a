"""What makes tinygrad quick here: the network's operations as kernels of our own, all CPU cores, a quick start.

Nothing in this folder changes a number beyond rounding. It works inside of `scope`, in which captured steps are made:
outside of it unet.py runs its own operations, and other networks in the same program find tinygrad as it was. (What
stays, as opencl.py, webgpu.py, opening.py and threads.py say, changes nothing for them.) PLAIN=1 leaves all of it out
but opening.py, threads.py, the processes of workers.py and how compiler.py keeps bfloat16, and everything works without
this folder. It knows tinygrad alone. Each change to tinygrad's own behaviour is here, with what it gains and what in
tinygrad would make it unnecessary.
"""
from __future__ import annotations
import contextlib, functools, os, threading
from collections.abc import Callable, Iterator
import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.dtype import _from_np_dtype
from tinygrad.uop.ops import Ops, UOp

def plain() -> bool: return os.environ.get("PLAIN", "0") not in ("", "0")

def prepare(device:str):
  """What OpenCL and WebGPU need before their buffers are used; it stays (see opencl.py, webgpu.py)."""
  if plain(): return
  if device.startswith("CL"):
    from fast import opencl
    opencl.install()
  if device.startswith("WEBGPU"):
    from fast import webgpu
    webgpu.install()

@functools.cache
def changes(device:str, plainly:bool) -> list[tuple]:
  """(object, name of its attribute, value) of each change that makes the device quick."""
  from fast import compiler, workers
  found = workers.changes() + compiler.always()
  if plainly: return found
  from fast import cores, gpu, quickstart
  if device.startswith("CPU"): found += compiler.changes() + cores.changes()
  if device.startswith(("CL", "WEBGPU")):
    from fast import memory
    found += memory.changes()
  return found + gpu.changes() + quickstart.changes()

def copied(v:Tensor, device:str) -> Tensor:
  """A copy on the device; of a tensor that is one whole buffer, at once."""
  source = v.uop.base.realized if v.uop.has_buffer_identity() else None
  return at_once(source, v.shape, device) if isinstance(source, Buffer) else v.clone(device).realize()

def placed(array:np.ndarray, device:str) -> Tensor:
  """A copy of an array on the device, at once."""
  return at_once(Buffer("NPY", array.size, _from_np_dtype(array.dtype), opaque=array), array.shape, device)

def at_once(source:Buffer, shape:tuple[int, ...], device:str) -> Tensor:
  """A copy of a buffer on the device, made as tinygrad's exec_copy makes it. Before, tinygrad makes a graph of each
  copy, plans it and looks through all tensors that there are: half a millisecond, seven times in a training step."""
  made = Buffer(device, source.size, source.dtype).allocate()
  to = made.allocator
  if made.device.split(":")[0] == source.device.split(":")[0] and hasattr(to, "_transfer") and to.supports_transfer:
    to._transfer(made._buf, source._buf, made.nbytes, src_dev=source.allocator.dev, dest_dev=to.dev)
  elif hasattr(to, "_as_buffer"): source.allocator._copyout(made.as_memoryview(force_zero_copy=True), source._buf)
  else: to._copyin(made._buf, source.as_memoryview(allow_zero_copy=True))
  # CUDA and OpenCL keep the host's side of each copy until it is waited for
  if len(getattr(Device[device], "pending_copyin", ())) > 16: Device[device].synchronize()
  return Tensor(UOp.from_buffer(made, device)).reshape(shape)

def realize(weights:list[Tensor]):
  """Copies `Tensor(array)`s to their device. tinygrad's own `realize` plans these copies first, which takes most of the
  time in which a network is made: 0.3 of 0.4 s for the mnist preset's."""
  if plain() or any(w.uop.op is not Ops.COPY for w in weights): Tensor.realize(*weights)
  else:
    for w in weights: w.replace(copied(Tensor(w.uop.src[0]), str(w.device)))

entered, lock = False, threading.RLock()

@contextlib.contextmanager
def scope() -> Iterator[None]:
  """Inside of it the network and tinygrad are quick on the default device; after it tinygrad is as it was before. Of
  several threads one is inside at a time."""
  global entered
  with contextlib.ExitStack() as undo:
    undo.enter_context(lock)
    if entered:
      yield
      return
    try: device = Device[Device.DEFAULT].device
    except Exception: device = ""  # whatever uses the device says what is wrong with it
    prepare(device)
    for owner, name, value in changes(device, plain()):
      if name in vars(owner): undo.callback(setattr, owner, name, vars(owner)[name])
      else: undo.callback(delattr, owner, name)
      setattr(owner, name, value)
    entered = True
    try: yield
    finally: entered = False

def quick(plainly:Callable) -> Callable:
  """Inside of `scope`, runs cpu.py's or gpu.py's operation of this name in the place of unet.py's own; not for tensors
  that lie on several devices."""
  @functools.wraps(plainly)
  def operation(*args, **options):
    x, name = args[0], plainly.__name__
    if plain() or not entered or isinstance(x.device, tuple): return plainly(*args, **options)
    from fast import compiler, cpu, gpu
    if not x.device.startswith("CPU"): return getattr(gpu, name)(*args, **options)
    low = x.dtype == dtypes.bfloat16 and name == "convolve" and compiler.pairs_of_bfloat16(x.device)
    if low or x.dtype == dtypes.float32: return getattr(cpu, name)(*args, **options)
    # a processor has no quicker arithmetic for the others: round to the type, compute in float32
    wide = [a.float() if isinstance(a, Tensor) else a for a in args]
    return getattr(cpu, name)(*wide, **options).cast(x.dtype)
  return operation

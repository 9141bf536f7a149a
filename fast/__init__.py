"""What makes tinygrad quick here: operations of the network as kernels of our own, all CPU cores, a quick start.

Nothing in this folder changes a number beyond rounding. PLAIN=1 leaves all of it out, and so does deleting the folder:
unet.py then runs its own operations. One file for each purpose; each change to tinygrad's own behaviour stands in
`compiler.py`, `cores.py`, `opencl.py` or `quickstart.py`, with what it gains and what in tinygrad would make it
unnecessary. They are made by `setup`, never by an import.
"""
from __future__ import annotations
import functools, os
from collections.abc import Callable
from engine.device import find_compiler
from tinygrad import Device, Tensor, dtypes

def plain() -> bool: return os.environ.get("PLAIN", "0") not in ("", "0")

def setup():
  """Called where a program opens its device, where a network is built, and by each operation; once is enough."""
  compiler_is_found()
  if not plain(): install()

@functools.cache
def compiler_is_found() -> bool: return find_compiler() is not None

@functools.cache
def install():
  from fast import compiler, cores, opencl, quickstart
  try: device = Device[Device.DEFAULT].device
  except Exception: return  # no device: whoever opens it says so
  if device.startswith("CPU"):
    compiler.install()
    cores.install()
  if device.startswith("CL"): opencl.install()
  quickstart.install()

def quick(plainly:Callable) -> Callable:
  """Runs the operation of this name in cpu.py or gpu.py in the place of unet.py's own, unless PLAIN=1 is set."""
  @functools.wraps(plainly)
  def operation(*args, **options):
    setup()
    if plain(): return plainly(*args, **options)
    from fast import cpu, gpu
    x, name = args[0], plainly.__name__
    if not gpu.first(x).startswith("CPU"): return getattr(gpu, name)(*args, **options)
    if x.dtype == dtypes.float32: return getattr(cpu, name)(*args, **options)
    # a processor has no quicker arithmetic for the others: they are rounded to the type and computed with in float32
    wide = [a.float() if isinstance(a, Tensor) else a for a in args]
    return getattr(cpu, name)(*wide, **options).cast(x.dtype)
  return operation

"""The device a program runs on, and how a step is captured for it."""
from __future__ import annotations
import ctypes, functools, math, os, shutil, signal, sys
from collections.abc import Callable
import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.device import Allocator, Buffer
from tinygrad.engine import worker
from tinygrad.engine.jit import JitError
from tinygrad.helpers import ALLOW_TF32, DEV
from tinygrad.uop.ops import UOp

@functools.cache
def clang(named:str|None=None) -> str|None:
  """The C compiler for tinygrad's CPU device: `named` ($CC), else the newest clang, which Debian calls clang-19."""
  names = [named] if named else [*(f"clang-{v}" for v in range(30, 13, -1)), "clang"]
  return next((c for n in names if (c := shutil.which(n))), None)

def find_compiler() -> str|None:
  """Sets $CC, which tinygrad reads, to the path of `clang`, if there is one."""
  if found := clang(os.environ.get("CC")): os.environ["CC"] = found
  return found

def is_processor(device:str) -> bool:
  """Whether an OpenCL device is the processor itself, as PoCL's is, and no GPU."""
  from tinygrad.runtime.autogen import opencl as cl
  kind = ctypes.c_uint64()
  cl.clGetDeviceInfo(Device[device].cl_dev, cl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None)  # type: ignore[attr-defined]
  return not kind.value & cl.CL_DEVICE_TYPE_GPU and bool(kind.value & cl.CL_DEVICE_TYPE_CPU)

initializer = worker._init_worker

def start_worker():
  """What each of tinygrad's compiling processes begins with. They ignore Ctrl-C, and here SIGTERM as well: the main one
  stops when its step is done, and would wait for ever for what a killed one owes it. (`timeout`, say, signals all.)"""
  initializer()
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

def open_device(tf32:bool=False) -> str:
  """Opens the device that $DEV names, else the first that tinygrad finds, sets up fast/ and says on stderr which it is.

  tf32: NVIDIA's tensor cores may round the operands of float32 products to 10 bits.
  An OpenCL device that is the processor itself comes after tinygrad's own CPU device, which is quicker to start.
  RuntimeError, in one sentence, when there is none, $DEV names one that is not there, or its compiler is missing."""
  if tf32: os.environ["ALLOW_TF32"], ALLOW_TF32.value = "1", 1
  asked, compiler = os.environ.get("DEV", ""), find_compiler()
  os.environ.setdefault("POCL_EXTRA_BUILD_FLAGS", "-w")  # PoCL prints its compiler's warnings, which no user can act on
  missing = ("" if asked else "no GPU was found and ") + "the CPU device needs clang: install it (Debian, Ubuntu: " \
    "apt-get install clang; macOS: xcode-select --install) or set CC to where it is"
  try:
    device = Device[Device.DEFAULT].device
    if not asked and device == "CL" and compiler and is_processor(device):
      os.environ["DEV"] = DEV.value = "CPU"
      device = Device["CPU"].device
    uses_clang = device.startswith("CPU") and type(Device[device].renderer).__name__ == "ClangRenderer"
  except Exception as e:
    if (asked or "CPU").upper().startswith("CPU") and not compiler: raise RuntimeError(missing) from e
    raise RuntimeError(f"tinygrad cannot open the device DEV={asked} "
                       f"({(str(e).splitlines() or [type(e).__name__])[0][:200]})") from e
  # tinygrad would not miss it before the first kernel that its cache does not hold
  if uses_clang and not compiler: raise RuntimeError(missing)
  if worker.worker_pool is None:  # those of a pool that runs would no longer find what they begin with
    worker._init_worker = start_worker
    worker._WorkerProcess.terminate = worker._WorkerProcess.kill  # type: ignore[method-assign]  # tinygrad ends them so
  try: from fast import setup
  except ImportError: pass
  else: setup()
  print(f"device: {device}" + ("" if asked else "  (another: DEV=CUDA, METAL, AMD, CL, CPU)"), file=sys.stderr)
  return device

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

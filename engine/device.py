"""The device a program runs on."""
from __future__ import annotations
import ctypes, functools, os, shutil, signal, sys
from tinygrad import Device
from tinygrad.engine import worker
from tinygrad.helpers import ALLOW_TF32, DEV

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

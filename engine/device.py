"""The device a program runs on."""
from __future__ import annotations
import contextlib, ctypes, dataclasses, os, shutil, sqlite3, sys
from pathlib import Path
from typing import Any
from tinygrad import Device, helpers
from tinygrad.helpers import ALLOW_TF32, DEV
from engine import hosts

GIVEN = ALLOW_TF32.value  # $ALLOW_TF32

def find_compiler() -> str|None:
  """The C compiler for tinygrad's CPU device: $CC, if that is a clang, else the newest. Sets $CC, which tinygrad reads,
  to it."""
  named = os.environ.get("CC")
  try: from fast.clang import newest
  except ImportError: found = shutil.which(named or "clang")
  else: found = newest(named)
  if found: os.environ["CC"] = found
  return found

def is_processor(device:str) -> bool:
  """Whether an OpenCL device is the processor itself, as PoCL's is, and no GPU."""
  from tinygrad.runtime.autogen import opencl as cl
  kind = ctypes.c_uint64()
  opened:Any = Device[device]
  cl.clGetDeviceInfo(opened.cl_dev, cl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None)
  return not kind.value & cl.CL_DEVICE_TYPE_GPU and bool(kind.value & cl.CL_DEVICE_TYPE_CPU)

def own(kind:str, k:int) -> str:
  """Opens device k of a kind, modulo their number. Of cards no other is opened: one may be for one process alone, and
  tinygrad's own driver of NVIDIA's wants any two to reach each other."""
  if k and kind in ("CUDA", "NV", "AMD", "HIP"):
    with contextlib.suppress(Exception): return Device[f"{kind}:{k}"].device
  k %= Device[kind].count()
  return Device[f"{kind}:{k}" if k else kind].device

def preferred(k:int) -> str:
  """The kind of device where $DEV names none: CUDA, which heeds CUDA_VISIBLE_DEVICES, as tinygrad's own driver of these
  cards does not; else the first that tinygrad finds."""
  try: own("CUDA", k)
  except Exception: return Device.DEFAULT
  return "CUDA"

def open_device(tf32:bool=False, silent:bool=False) -> str:
  """Opens the device that $DEV names, else `preferred`, and says on stderr which it is: in process k of a host, device
  k of that kind. For programs: it sets environment variables, which processes that compile inherit.

  tf32: NVIDIA's tensor cores may round the operands of float32 products to 10 bits.
  tinygrad's CPU device is preferred to an OpenCL device that is the processor itself, because it starts sooner.
  RuntimeError, in one sentence, if there is no device, $DEV names one that is not there, or its compiler is missing;
  OSError or ValueError if tinygrad's cache cannot be opened."""
  with contextlib.suppress(ImportError):
    from fast import opening, threads
    opening.install()
    threads.install()
  ALLOW_TF32.value = int(tf32 or GIVEN)
  os.environ["ALLOW_TF32"] = str(ALLOW_TF32.value)
  asked, compiler = os.environ.get("DEV", ""), find_compiler()
  if os.sep not in helpers.CACHEDB:  # tinygrad would make a folder of that name
    raise ValueError(f"CACHEDB={helpers.CACHEDB}: give the file's whole path")
  try:
    if helpers.CACHELEVEL >= 1: helpers.db_connection()
  except (OSError, sqlite3.Error) as e:
    raise OSError(f"tinygrad's cache {helpers.CACHEDB} cannot be opened ({e}): set CACHEDB to a file elsewhere") from e
  # no user can act on the warnings of a kernel's compiler: clang, also inside of PoCL
  os.environ.setdefault("CCC_OVERRIDE_OPTIONS", "#+-w")
  os.environ.setdefault("POCL_EXTRA_BUILD_FLAGS", "-w")
  # on a weak card one graph may take longer than the 30 s after which tinygrad's own drivers give up
  os.environ.setdefault("HCQDEV_WAIT_TIMEOUT_MS", "600000")
  missing = ("" if asked else "no GPU was found and ") + "the CPU device needs clang: install it (Debian, Ubuntu: " \
    "apt-get install clang; macOS: xcode-select --install) or set CC to where it is"
  k = hosts.local_rank()
  os.umask(mask := os.umask(0o22))
  try:
    kind = (DEV.device or preferred(k)).split(":")[0]
    device = own(kind, k)
    if not asked and kind == "CL" and compiler and is_processor(device): kind = device = Device["CPU"].device
    renderer = type(Device[device].renderer).__name__
    needed = {"NVCCRenderer": "nvcc", "HIPCCRenderer": "hipcc"}.get(renderer)
    if needed and not shutil.which(needed): raise RuntimeError(f"no compiler was found, not even {needed}")
  except Exception as e:
    if (asked or "CPU").upper().startswith("CPU") and not compiler: raise RuntimeError(missing) from e
    numbered = asked.partition(":")[2].isdecimal()
    which = "; a card is chosen by CUDA_VISIBLE_DEVICES=1 with DEV=CUDA, else by DEV=:1+AMD" * numbered
    raise RuntimeError(f"tinygrad cannot open the device DEV={asked} ({reason(e)[:400]}){which}") from e
  finally: os.umask(mask)  # tinygrad's search for cards on the bus sets it to 0
  if not asked: os.environ["DEV"] = kind
  if DEV.device != device: DEV.value = [dataclasses.replace(DEV.value[0], device=device), *DEV.value]
  # tinygrad would not miss it before the first kernel that its cache does not hold
  if device.startswith("CPU") and renderer == "ClangRenderer" and not compiler: raise RuntimeError(missing)
  if silent: return device
  opened = Device[device]
  name = f", {opened.device_name}" if hasattr(opened, "device_name") else ""
  another = "" if asked else "  (another: DEV=CUDA, METAL, AMD, CL, CPU)"
  print(f"device: {device}{name}{another}", file=sys.stderr)
  if type(opened.renderer).__name__ == "PTXRenderer" and "PTX" not in asked.upper():
    found = next((str(f.parent) for p in sys.path for f in Path(p).glob("nvidia/*/lib/libnvrtc.so*")), "its folder")
    print("NVIDIA's compiler, libnvrtc, was not found, so it will be slow, and 16 bits without tensor cores: set "
          f"LD_LIBRARY_PATH to {found}", file=sys.stderr)
  return device

def reason(e:BaseException) -> str:
  """Why a device does not open, in a line."""
  if isinstance(e, BaseExceptionGroup): return "; ".join(map(reason, e.exceptions))
  if isinstance(e, StopIteration): return "tinygrad's own driver does not know this card: NVIDIA's is DEV=CUDA"
  return (str(e).splitlines() or [type(e).__name__])[0]

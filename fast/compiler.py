"""The C compiler behind tinygrad's CPU device: how wide its vectors are, and what keeps it from using them."""
from __future__ import annotations
import functools, os, pathlib, re, subprocess
from files.device import clang
from tinygrad import helpers

@functools.cache
def wide_vectors() -> bool:
  """Whether the processor has vectors of 512 bits."""
  try: return "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
  except OSError: return False

@functools.cache
def outdated_clang() -> bool:
  """Whether clang is older than 18 and so uses a quarter of such vectors: training takes three times as long."""
  named = os.environ.get("CC")
  version = subprocess.run([clang(named) or "clang", "--version"], capture_output=True, text=True).stdout
  return wide_vectors() and int((re.search(r"version (\d+)", version) or [0, 0])[1]) < 18

def vector_lanes(device:str) -> int:
  """float32 numbers in a vector of the CPU, where tinygrad renders C and kernels are tiled by hand. 0 elsewhere."""
  if not device.startswith("CPU"): return 0
  return 16 if wide_vectors() and not outdated_clang() else 8

def install():
  """No float4 loads (DMC) and no guessed unrolling (NOOPT) on the CPU: before the first kernel is compiled, and in the
  environment as well, so that the processes that compile agree.

  tinygrad loads four neighbours at once, which holds clang to vectors of 128 bits; left alone, it takes the full width.
  A convolution runs three times as fast. A CPU renderer without float4, and kernels that bring their own schedule
  everywhere, would make this unnecessary. A compiling process lives for all kernels instead of 16 of them."""
  os.environ.update(DMC="1", NOOPT="1")
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")
  helpers.getenv.cache_clear()
  helpers.NOOPT.value = 1

"""The C compiler behind tinygrad's CPU device: how wide its vectors are, and what keeps it from using them."""
from __future__ import annotations
import functools, os, pathlib
from tinygrad import Device, helpers
from tinygrad.helpers import Target
from tinygrad.renderer import cstyle
from tinygrad.runtime import ops_cpu
from tinygrad.runtime.support.compiler_cpu import ClangCompiler
from tinygrad.uop.ops import AxisType, Ops, PatternMatcher, UOp, UPat

@functools.cache
def wide_vectors() -> bool:
  """Whether the processor has vectors of 512 bits."""
  try: return "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
  except OSError: return False

def vector_lanes(device:str) -> int:
  """float32 numbers in a vector of the CPU, where tinygrad renders C and kernels are tiled by hand. 0 elsewhere."""
  if not device.startswith("CPU") or not helpers.NOOPT.value: return 0
  return 16 if wide_vectors() else 8

VECTOR = 99  # ends the number of the loop over a tile's vectors

def render_tile_loop(ctx:ClangRenderer, x:UOp) -> str|None:
  """A loop over a kernel's tile (`kernel` in kernels.py) as clang makes it vectors in registers, or unrolls it."""
  if x.arg[-1] is not AxisType.LOOP: return None
  one = x.arg[0] % 100 == VECTOR and (size := x.vmax+1) in (4, 8, 16, 32)  # one vector, of several registers if need be
  way = f"vectorize_width({size}) interleave_count(1) unroll(disable)" if one else "unroll(full)"
  return f"#pragma clang loop {way}\n{cstyle.ClangRenderer.string_rewrite.rewrite(x, ctx)}"

class ClangRenderer(cstyle.ClangRenderer):
  """Leaves the loops over a kernel's tile to clang. Written out by tinygrad, as an UPCAST, 8 x 16 numbers are 1,800
  nodes, which take 0.4 s to lower, and clang must find the vectors in them: the mnist preset's first step came after
  33 s, now after 17. Loops that tinygrad's own renderer leaves to the compiler would make this unnecessary."""
  string_rewrite = PatternMatcher([(UPat(Ops.RANGE, name="x"), render_tile_loop)]) + cstyle.ClangRenderer.string_rewrite

  def __init__(self, target:Target):
    super().__init__(target)
    # clang halves the vectors of 512 bits on Intel's processors, for the sake of programs that need few of them
    if wide_vectors(): self.compiler = ClangCompiler([*target.arch.split(","), "prefer-vector-width=512"])

  def render_index(self, x:UOp, buf:UOp, idx:UOp) -> str:
    """The place in a tile apart from where the tile begins: or clang does not see that neighbours are neighbours."""
    terms = list(idx.split_uop(Ops.ADD))
    own = [u for u in terms if any(r.arg[-1] is AxisType.LOOP for r in u.ranges)]
    if not own or len(own) == len(terms): return super().render_index(x, buf, idx)
    begin, place = ("+".join(self[u] for u in terms if (u in own) == inside) for inside in (False, True))
    return f"({self[buf]}+({begin})+({place}))"

def install():
  """No float4 loads (DMC) and no guessed unrolling (NOOPT) on the CPU: before the first kernel is compiled, and in the
  environment as well, so that the processes that compile agree.

  tinygrad loads four neighbours at once, which holds clang to vectors of 128 bits; left alone, it takes the full width.
  A convolution runs three times as fast. A CPU renderer without float4, and kernels that bring their own schedule
  everywhere, would make this unnecessary. A compiling process lives for all kernels instead of 16 of them."""
  if type(Device["CPU"].renderer) is not cstyle.ClangRenderer: return
  os.environ.update(DMC="1", NOOPT="1")
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")
  helpers.getenv.cache_clear()
  helpers.NOOPT.value = 1
  ours = [ClangRenderer if r is cstyle.ClangRenderer else r for r in Device["CPU"].renderers]
  ops_cpu.ClangRenderer, Device["CPU"].renderers = ClangRenderer, ours  # of CPU:1 and so on, and of that which is open

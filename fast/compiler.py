"""The renderer of tinygrad's CPU device: how wide its vectors are, and what keeps clang from using them."""
from __future__ import annotations
import functools, os, pathlib, subprocess
import numpy as np
from fast.clang import Clang
from fast.opening import ops_cpu
from tinygrad import Device, dtypes, helpers
from tinygrad.device import Compiled
from tinygrad.dtype import float_to_bf16
from tinygrad.helpers import Context, Target
from tinygrad.renderer import Renderer, cstyle
from tinygrad.uop.ops import AxisType, Ops, PatternMatcher, UOp, UPat

@functools.cache
def wide_vectors() -> bool:
  """Whether the processor has vectors of 512 bits."""
  try: return "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
  except OSError: return False

@functools.cache
def vector_lanes(device:str) -> int:
  """float32 numbers in a vector of the CPU; 0 where tinygrad renders no C, and kernels are not tiled by hand."""
  if not device.startswith("CPU"): return 0
  with Context(ALLOW_DEVICE_USAGE=1):
    if not isinstance(Device[device].renderer, cstyle.ClangRenderer): return 0
  return 16 if wide_vectors() else 8

VECTOR = 99  # ends the number of the loop over a tile's vectors

def render_tile_loop(ctx:ClangRenderer, x:UOp) -> str|None:
  """A loop over a kernel's tile (`kernel` in kernels.py): clang makes it vectors in registers, or unrolls it."""
  if x.arg[-1] is not AxisType.LOOP: return None
  one = x.arg[0] % 100 == VECTOR and (size := x.vmax+1) in (4, 8, 16, 32)  # one vector, in several registers if need be
  way = f"vectorize_width({size}) interleave_count(1) unroll(disable)" if one else "unroll(full)"
  return f"#pragma clang loop {way}\n{cstyle.ClangRenderer.string_rewrite.rewrite(x, ctx)}"

def render_bits(c:UOp) -> str:
  """A constant of bfloat16: the upper half of float32's bits."""
  return f"{np.float32(float_to_bf16(c.val)).view(np.uint32) >> 16}u"

# bfloat16, which tinygrad converts by hand, is kept as its bits. Of clang's own type, where the processor has no
# instructions for it, some loads and stores call a function of libgcc that is there from GCC 13 on. tinygrad's OpenCL
# renderer keeps bits as well; if the one for the CPU did, this would be unnecessary.
TYPES = cstyle.ClangRenderer.type_map | {dtypes.bfloat16: "unsigned short"}
RULES = PatternMatcher([(UPat.cvar("c").cast(dtypes.bfloat16), render_bits)]) + cstyle.ClangRenderer.string_rewrite

def always() -> list[tuple]:
  """What `scope` changes with PLAIN=1 as well: tinygrad's own renderer keeps bfloat16 as its bits."""
  return [(cstyle.ClangRenderer, "type_map", TYPES), (cstyle.ClangRenderer, "string_rewrite", RULES)]

class ClangRenderer(cstyle.ClangRenderer):
  """Leaves the loops over a kernel's tile to clang, and loads single numbers.

  Written out by tinygrad, as an UPCAST, a tile of 8 x 16 numbers is 1,800 nodes. They take 0.4 s to lower, and clang
  must find the vectors in them: the mnist preset's first step came after 33 s, now after 17. Loads of four neighbours
  would hold clang to vectors of 128 bits; without them it takes the full width, and a convolution runs three times as
  fast. Loops that tinygrad's own renderer leaves to the compiler would make this class unnecessary."""
  supports_float4 = False
  string_rewrite = PatternMatcher([(UPat(Ops.RANGE, name="x"), render_tile_loop)]) + RULES

  def __init__(self, target:Target):
    super().__init__(target)
    # for programs that need few of them, clang halves the vectors of 512 bits on Intel's processors
    self.compiler = Clang([*target.arch.split(","), *(["prefer-vector-width=512"] if wide_vectors() else [])])

  def render_index(self, x:UOp, buf:UOp, idx:UOp) -> str:
    """The place in a tile is kept apart from where the tile begins, so that clang sees neighbours as neighbours."""
    terms = list(idx.split_uop(Ops.ADD))
    own = [u for u in terms if any(r.arg[-1] is AxisType.LOOP for r in u.ranges)]
    if not own or len(own) == len(terms): return super().render_index(x, buf, idx)
    begin, place = ("+".join(self[u] for u in terms if (u in own) == inside) for inside in (False, True))
    return f"({self[buf]}+({begin})+({place}))"

quick_renderer = functools.cache(ClangRenderer)

@functools.cache
def pairs_of_bfloat16(device:str) -> bool:
  """Whether the processor multiplies two pairs of bfloat16 and sums in float32, at twice float32's rate, and clang
  knows both (from version 16 on)."""
  if vector_lanes(device) < 16: return False
  with Context(ALLOW_DEVICE_USAGE=1): clang = quick_renderer(Device[device].renderer.target).compiler
  macros = subprocess.check_output([clang.clang, "-w", "-E", "-dM", "-x", "c", *clang.args, os.devnull])
  return b"__AVX512BF16__" in macros and int(macros.split(b"__clang_major__")[1].split()[0]) > 15

def renderer(device:Compiled) -> Renderer:
  """In the place of tinygrad's `renderer` of a CPU device, which finds the one that $DEV names."""
  found = device._select_renderer()
  return quick_renderer(found.target) if type(found) is cstyle.ClangRenderer else found

def changes() -> list[tuple]:
  """What `scope` changes: the renderer, and that tinygrad guesses no unrolling (NOOPT), since our kernels bring their
  own schedule and clang unrolls the others."""
  if not isinstance(Device["CPU"].renderer, cstyle.ClangRenderer): return []
  return [(ops_cpu.CPUDevice, "renderer", property(renderer)), (helpers.NOOPT, "value", 1)]

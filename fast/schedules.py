"""How a device runs the loops of kernels.py. A CPU: in tiles of its registers, with its cores sharing the rounds of an
outer loop. A GPU: on tensor cores (NVIDIA, Apple, AMD) if it has some for the type and the loops fit them, else as
tinygrad chooses."""
from __future__ import annotations
import dataclasses, functools, math
from fast.compiler import vector_lanes
from tinygrad import Device, codegen
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.dtype import dtypes
from tinygrad.helpers import ALLOW_TF32, Context
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import AxisType, Ops, UOp, graph_rewrite

def divisor(n:int, most:int) -> int: return max(d for d in range(1, most+1) if n % d == 0)

# *** the CPU ***

Tiles = tuple[tuple[int, ...], tuple[int, ...]]  # how much of each loop stays in registers; which the cores share

LARGE = 2**18   # products that are worth the cores' sharing them
CACHED = 2**17  # numbers that fit a core's second cache beside others

def block(device:str, channels:int) -> int:
  """How many channels lie together, and are computed together: two vectors, if they divide the channels."""
  lanes = vector_lanes(device) or 16
  return n if (n := math.gcd(channels, 2*lanes)) >= lanes else divisor(channels, lanes)

def conv_tiles(device:str, sizes:tuple[int, ...], depth:int) -> Tiles|None:
  """For y (B,H,W,O), each number a sum of `depth` products.

  Two vectors of channels times half as many pixels as a vector has numbers fill half of the registers, or of 16 more,
  and need few loads. Weights that do not fit a core's second cache: the blocks of channels are the outer loop, so that
  those of one do."""
  if not (lanes := vector_lanes(device)): return None
  B, H, W, O = sizes
  th = divisor(H, lanes//2//(tw := divisor(W, lanes//2)))
  tb = divisor(B, lanes//2//(tw*th))
  shared = () if B*H*W*O*depth < LARGE else (0,) if B//tb >= 8 else (1,)
  return (tb, th, tw, block(device, O)), (3, *shared) if shared and depth*O > CACHED else shared

def product_tiles(device:str, sizes:tuple[int, ...], depth:int) -> Tiles|None:
  """For y (N,I,J): a convolution of one row."""
  if not (made := conv_tiles(device, (sizes[0], 1, *sizes[1:]), depth)): return None
  (tn, _, ti, tj), shared = made
  return (tn, ti, tj), tuple(min(a, 1) for a in shared[-1:])

def weight_tiles(device:str, sizes:tuple[int, ...], macs:int) -> Tiles|None:
  """For dw (G,k,k,C,O), made of `macs` products in all."""
  if not (lanes := vector_lanes(device)): return None
  to = block(device, sizes[4])
  return (1, 1, 1, divisor(sizes[3], lanes//2 if to > 4 else 2*lanes), to), (0, 4, 3) if macs > LARGE else ()

def block_tiles(device:str, sizes:tuple[int, ...]) -> Tiles|None:
  """For numbers that are only moved, to (B,C/l,H,W,l)."""
  if not vector_lanes(device): return None
  return (1, 1, 1, 1, sizes[4]), (0, 1) if math.prod(sizes) > 2**16 else ()

def column_tiles(device:str, sizes:tuple[int, int], rows:int) -> Tiles|None:
  """For y (A,C), each number a sum over `rows`."""
  if not (lanes := vector_lanes(device)): return None
  return (1, divisor(sizes[1], lanes)), (0,) if sizes[0]*sizes[1]*rows > LARGE else ()

# *** GPUs ***

# The most that a warp keeps of a product, in tiles of its tensor core; the warps of a block, each way; and how many
# warps there must be before each keeps more than one tile: a hundred multiprocessors of a card want about eight each.
TILES_N, TILES_M, WARPS, ENOUGH = 8, 4, 2, 1024
LOAD = 4      # the most neighbours that tinygrad makes one load
PARTS = 1000  # numbers of loops over such neighbours begin here

@functools.cache
def renderer(device:str) -> Renderer:
  with Context(ALLOW_DEVICE_USAGE=1): return Device[device].renderer

def on_tensor_cores(kernel:UOp, device:str) -> UOp|None:
  """The kernel, a sum of products, with its schedule for the device's tensor cores; None where they do not fit."""
  ren = renderer(device)
  if not ren.tensor_cores or not any(u.op is Ops.REDUCE for u in kernel.backward_slice): return None
  if (found := tensor_core_schedule(seen := merged(kernel), ren)) is None: return None
  (opts, neighbours), inner = found, {}
  for r, tiles in neighbours:  # one load, if a thread has them all: each goes to another of its tiles
    if (most := divisor(tiles, LOAD)) > 1 and (r.vmax+1) % most == 0:  # not where r is filled up
      part = UOp.range(most, PARTS + r.arg[0], AxisType.GLOBAL)  # of another type than r, or they are merged again
      inner[r] = r.replace(src=(r.src[0]//most,))*most + part
  parted = graph_rewrite(seen.substitute(inner), codegen.pm_flatten_range)
  if inner and (again := tensor_core_schedule(merged(parted), ren)): kernel, opts = parted, again[0]
  return kernel.replace(arg=dataclasses.replace(kernel.arg, opts_to_apply=opts))

def merged(kernel:UOp) -> UOp:
  """The loops as tinygrad will see them: it merges those that run on from one another."""
  kernel = graph_rewrite(kernel, codegen.pm_mops, bottom_up=True)
  kernel = graph_rewrite(kernel, codegen.sym + codegen.pm_flatten_range)
  return graph_rewrite(kernel, codegen.pm_flatten_range + codegen.pm_simplify_ranges, ctx={})

def tensor_core_schedule(kernel:UOp, ren:Renderer) -> tuple[tuple[Opt, ...], list[tuple[UOp, int]]]|None:
  """Which loops are the tensor core's N, M and K: of all choices that fit, the one that pads least, then the one with
  the largest tile and the longest K. A warp then keeps several tiles, so that a number it loads is used several times.
  Beside these options: of N and M, how many tiles of a loop are kept whose numbers are neighbours in memory.

  N and M are not padded on AMD: LLVM 19 makes wrong code for the padded operands of RDNA4's WMMA."""
  s = Scheduler(kernel, ren)
  s.convert_loop_to_global()
  reduce = s.reduceops[0]
  product = reduce.src[0].src[0] if reduce.src[0].op is Ops.CAST else reduce.src[0]
  x, w = product.src
  tf32 = x.dtype == dtypes.float32 and s.ren.target.device in ("CUDA", "NV")
  number = next((i for i, c in enumerate(s.ren.tensor_cores)
                 if c.dtype_in == x.dtype == w.dtype and c.dtype_out == reduce.dtype and (not tf32 or ALLOW_TF32)),
                None)
  if number is None: return None
  # tinygrad numbers the choices in this order: w's own loops, x's own, the summed ones; each from the last to the first
  down = lambda ranges: sorted(ranges, key=lambda r: r.arg[0], reverse=True)
  x_own, w_own = down(r for r in x.ranges if r not in w.ranges), down(r for r in w.ranges if r not in x.ranges)
  choices = [(n, m, k) for n in w_own for m in x_own for k in down(reduce.src[1:])]
  dims, best = s.ren.tensor_cores[number].dims, None
  for i, ranges in enumerate(choices):
    sizes = [r.vmax+1 for r in ranges]
    waste = 1.
    for size, dim in zip(sizes, dims): waste *= -(-size//dim)*dim / size
    rank = (waste, -min(sizes[0], TILES_N*dims[0]) * min(sizes[1], TILES_M*dims[1]), -sizes[2])
    fits = all(size > dim//4 for size, dim in zip(sizes, dims)) and all(r.arg[0] < PARTS for r in ranges)
    if s.ren.target.arch.startswith("gfx") and (sizes[0] % dims[0] or sizes[1] % dims[1]): fits = False
    if fits and (best is None or rank < best[0]): best = rank, i, ranges
  if best is None: return None
  _, choice, (n, m, _) = best
  outputs = math.prod(r.vmax+1 for r in s.rngs if r not in reduce.src[1:])
  try:
    s.apply_opt(Opt(OptOps.TC, choice, (number, 2, 1)))
    left = lambda r: next(((i, u.vmax+1) for i, u in enumerate(s.rngs) if u.arg[:-1] == r.arg[:-1]), (0, 1))
    def split(r:UOp, op:OptOps, most:int) -> int:
      axis, size = left(r)
      if (amount := divisor(size, most)) > 1: s.apply_opt(Opt(op, axis, amount))
      return amount
    given = [math.prod(split(r, OptOps.UPCAST, LOAD) for r in own if r.arg[0] >= PARTS) for own in (w_own, x_own)]
    # a thread has some 256 registers, half of them for what it keeps
    most = 128 // s.ren.tensor_cores[number].elements_per_thread[2]
    keep = max(1, min(most, outputs // (dims[0]*dims[1]*ENOUGH)))
    across = given[0] * split(n, OptOps.UPCAST, min(TILES_N, 1 << math.isqrt(2*keep).bit_length()-1) // given[0])
    down_by = max(1, min(TILES_M, keep//across))
    kept = rows = given[1] * split(m, OptOps.UPCAST, down_by // given[1])
    for r in x_own:
      if rows < down_by and r is not m and r.arg[0] < PARTS: rows *= split(r, OptOps.UPCAST, down_by//rows)
    for r in (n, m): split(r, OptOps.LOCAL, WARPS)
  except KernelOptError: return None
  loops = {r.arg[0]: r for r in kernel.backward_slice if r.op is Ops.RANGE}
  return tuple(s.applied_opts), [(loops[r.arg[0]], amount) for v, r, amount in ((w, n, across), (x, m, kept))
                                 if r in v.src[1].get_idx().split_uop(Ops.ADD)]

def group_opts(device:str, rows:int, channels:int=0) -> tuple|None:
  """For few sums, each over `rows`: up to 16 threads share a sum, on devices whose threads share memory in earnest."""
  return None if device.startswith("CL") or not renderer(device).has_local else grouped(rows, channels)

def grouped(rows:int, channels:int=0) -> tuple:
  """channels: of y (B,2,channels), whose neighbours then belong to neighbouring threads, which load them together."""
  by = (OptOps.LOCAL, 2, divisor(channels or 1, 16)), (OptOps.GROUPTOP, 0, divisor(rows, 16))
  return tuple(Opt(*opt) for opt in by if opt[2] > 1)

"""How a device runs a kernel's loops: beside the kernels, which are loops alone. Tensor cores (NVIDIA, Apple, AMD) where
the device has some for the type and the loops fit them, else tinygrad's own choice. The CPU's register tile is in kernels.py."""
from __future__ import annotations
import dataclasses, functools
from tinygrad import Device, codegen
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.dtype import DType, dtypes
from tinygrad.helpers import ALLOW_TF32, Context
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import AxisType, Ops, UOp, graph_rewrite

TILES_N, TILES_M, WARPS = 8, 4, 2  # what a thread keeps of a product, in tiles of its tensor core; warps of a block, each way

@functools.cache
def renderer(device:str) -> Renderer:
  with Context(ALLOW_DEVICE_USAGE=1): return Device[device].renderer

def scheduled(kernel:UOp, device:str) -> UOp|None:
  """The kernel, a sum of products, with its schedule for the device's tensor cores; None where they do not fit."""
  opts = schedule(kernel, renderer(device))
  return None if opts is None else kernel.replace(arg=dataclasses.replace(kernel.arg, opts_to_apply=opts))

@functools.cache
def schedule(kernel:UOp, ren:Renderer) -> tuple[Opt, ...]|None:
  if not ren.tensor_cores or not any(u.op is Ops.REDUCE for u in kernel.backward_slice): return None
  # the loops as tinygrad will see them: it merges those that run on from one another
  for matcher, ctx in ((codegen.multi_pm, None), (codegen.pm_mops, None), (codegen.sym + codegen.pm_flatten_range, None),
                       (codegen.pm_flatten_range + codegen.pm_simplify_ranges, {})):
    kernel = graph_rewrite(kernel, matcher, ctx=ctx, bottom_up=matcher is codegen.pm_mops)
  s = Scheduler(kernel, ren)
  s.convert_loop_to_global()
  return tensor_core_schedule(s)

def divisor(n:int, most:int) -> int: return max(d for d in range(1, most+1) if n % d == 0)

def tensor_core_schedule(s:Scheduler) -> tuple[Opt, ...]|None:
  """Which loop is the tensor core's N, M and K: of all choices that fit, the one that pads least, then that with the longest
  K. A thread then keeps TILES_N x TILES_M tiles, so that each number it loads serves several."""
  reduce = s.reduceops[0]
  product = reduce.src[0].src[0] if reduce.src[0].op is Ops.CAST else reduce.src[0]
  x, w = product.src
  number = next((i for i, c in enumerate(s.ren.tensor_cores) if c.dtype_in == x.dtype == w.dtype and c.dtype_out == reduce.dtype
                 and (x.dtype != dtypes.float32 or s.ren.target.device not in ("CUDA", "NV") or ALLOW_TF32)), None)
  if number is None: return None
  # tinygrad numbers the choices in this order: w's own loops, x's own, those summed over, each from the last loop down
  down = lambda ranges: sorted(ranges, key=lambda r: r.arg[0], reverse=True)
  choices = [(n, m, k) for n in down(r for r in w.ranges if r not in x.ranges) for m in down(r for r in x.ranges if r not in w.ranges)
             for k in down(reduce.src[1:])]
  dims, best = s.ren.tensor_cores[number].dims, None
  for i, ranges in enumerate(choices):
    sizes = [r.vmax+1 for r in ranges]
    waste = 1.
    for size, dim in zip(sizes, dims): waste *= -(-size//dim)*dim / size
    rank = (waste, -min(sizes[0], TILES_N*dims[0]) * min(sizes[1], TILES_M*dims[1]), -sizes[2])
    if all(size > dim//4 for size, dim in zip(sizes, dims)) and (best is None or rank < best[0]): best = rank, i, ranges
  if best is None: return None
  _, choice, (n, m, _) = best
  try:
    s.apply_opt(Opt(OptOps.TC, choice, (number, 2, 1)))
    left = lambda r: next(((i, u.vmax+1) for i, u in enumerate(s.rngs) if u.arg[:-1] == r.arg[:-1]), (0, 1))
    def split(r:UOp, op:OptOps, most:int) -> int:
      axis, size = left(r)
      if (amount := divisor(size, most)) > 1: s.apply_opt(Opt(op, axis, amount))
      return amount
    across = split(n, OptOps.UPCAST, TILES_N)
    rows = split(m, OptOps.UPCAST, TILES_N*TILES_M//max(across, TILES_M))
    for r in down(r for r in x.ranges if r not in w.ranges and r is not m and r not in reduce.src[1:]):
      if rows < TILES_M: rows *= split(r, OptOps.UPCAST, TILES_M//rows)
    for r in (n, m): split(r, OptOps.LOCAL, WARPS)
  except KernelOptError: return None
  return tuple(s.applied_opts)

def group_opts(device:str, rows:int) -> tuple|None:
  """A sum over `rows` for few outputs: 16 threads of a block share each, where blocks are real."""
  if device.startswith("CL") or not renderer(device).has_local: return None
  return (Opt(OptOps.GROUPTOP, 0, 16),) if rows % 16 == 0 else ()

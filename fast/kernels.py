"""The plain loops of each operation. How a device runs them, in tiles of a CPU's registers or of tensor cores, is in
schedules.py, as numbers. Kernels that differ have names that differ."""
from __future__ import annotations
import math
from collections.abc import Callable
from fast.compiler import VECTOR
from fast.schedules import Tiles, block_tiles, column_tiles, conv_tiles, group_opts, on_tensor_cores, product_tiles
from fast.schedules import weight_tiles
from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp, identity_element

Sizes = tuple[int, ...]

def shared_round(n:int) -> UOp:
  """The number, below n, of a round that any core may take: tinygrad's core_id.

  With "&", since clang makes no vectors where the number could be negative."""
  return (UOp.variable("core_id", 0, n-1, dtypes.int, param=True) & 2**16-1).cast(dtypes.weakint)

def rounds(counts:list[int], shared:tuple[int, ...]) -> tuple[list[UOp], list[UOp]]:
  """Loops of so many rounds: the number of the round of each, and their ranges. The cores share the rounds of all
  `shared` loops together, of which the first is outermost."""
  number:list[UOp|None] = [None]*len(counts)
  if 1 < (n := math.prod(counts[a] for a in shared)) <= 2**16:
    one = shared_round(n)
    for a in shared:
      n //= counts[a]
      number[a] = one // n % counts[a]
  each = [UOp.range(n, a) if n > 1 else UOp.const(0, dtypes.weakint) for a, n in enumerate(counts)]
  return [i if i is not None else r for i, r in zip(number, each)], [r for i, r in zip(number, each)
                                                                     if i is None and r.op is Ops.RANGE]

def kernel(name:str, y:UOp, reduced:Sizes, term:Callable, after:Callable=lambda at, total: total,
           tiles:Tiles|None=None, opts:tuple|None=None, op:Ops=Ops.ADD, pairs:bool=False) -> UOp:
  """y[at] = after(at, Σ term(at, inner)) for all `at` below y's sizes, inner below `reduced`; the sum is in float32.

  tiles: for each loop over y the amount kept in registers, and which loops the cores share; or opts: tinygrad's.
  pairs: term gives two pairs of bfloat16 instead, with which `dot_pairs` takes the place of the tile's last loop.
  Numbers of the loops: a for those over y, then those summed over; 100 k + a, or 100 k + VECTOR, for the k-th pass over
  the tile: 1 sets it to zero, 2 adds to it, 3 writes it to y."""
  amounts, shared = tiles or ((1,)*len(y.shape), ())
  starts, outer = rounds([n//amount for n, amount in zip(y.shape, amounts)], shared)
  begin = [i*amount for i, amount in zip(starts, amounts)]
  ranges = [UOp.range(n, len(y.shape)+a, AxisType.REDUCE) if n > 1 else None for a, n in enumerate(reduced)]
  summed = [r for r in ranges if r is not None]
  inner = [UOp.const(0, dtypes.weakint) if r is None else r for r in ranges]
  def tile(k:int) -> tuple[list[UOp], list[UOp], UOp]:  # the k-th pass: its ranges, the place in y, and in the tile
    sizes = [*amounts[:-1], 1] if pairs and k == 2 else amounts
    each = [UOp.range(n, 100*k + (VECTOR if summed and a+1 == len(amounts) else a), AxisType.LOOP) if n > 1
            else UOp.const(0, dtypes.weakint) for a, n in enumerate(sizes)]
    flat = sum((i*math.prod(amounts[a+1:]) for a, i in enumerate(each)), start=UOp.const(0, dtypes.weakint))
    return [i for i in each if i.op is Ops.RANGE], [b+i for b, i in zip(begin, each)], flat
  own, at, flat = tile(3)
  if not tiles or not (summed or pairs):
    value = term(at, inner).cast(dtypes.float32)
    total = value.reduce(*summed, arg=op) if summed else value
  else:  # the compiler unrolls the tile's loops: see compiler.ClangRenderer
    registers = UOp.placeholder((math.prod(amounts),), dtypes.float32, 0, AddrSpace.REG)
    zeroed, _, i = tile(1)
    acc = registers.after(*outer)
    acc = acc.after(acc[i].store(UOp.const(identity_element(op, dtypes.float32), dtypes.float32)).end(*zeroed))
    added, place, i = tile(2)
    acc_in = acc.after(*summed)
    if pairs: step = UOp(Ops.CUSTOM, src=(acc_in[i], *term(place, inner)), arg=dot_pairs(amounts[-1]))
    else: step = acc_in[i].store(acc_in[i].alu(op, term(place, inner).cast(dtypes.float32)))
    total = acc.after(step.end(*added).end(*summed))[flat]
  sink = y[tuple(at)].store(after(at, total).cast(y.dtype)).end(*own, *outer).sink(
    arg=KernelInfo(name, opts_to_apply=() if tiles else opts))
  if not pairs: return sink
  # tinygrad counts no operations in C; tagged, the kernel keeps our numbers
  moved = sum(u.max_numel()*u.dtype.itemsize for u in sink.toposort() if u.op is Ops.PARAM)
  return sink.replace(arg=KernelInfo(name, estimates=Estimates(4*y.numel()*math.prod(reduced), moved, moved)), tag=1)

def dot_pairs(n:int) -> str:
  """C: sums[o] += x[0] w[o,0] + x[1] w[o,1], o < n, of bfloat16, 16 o in one instruction. {0}: sums, {1}: x, {2}: w."""
  one = "*(sums*)({0}+%d) = __builtin_ia32_dpbf16ps_512(*(sums*)({0}+%d), x, *(pairs*)((word*)({2})+%d));"
  types = ["typedef float sums __attribute__((vector_size(64), aligned(4), may_alias));",
           "typedef __bf16 pairs __attribute__((vector_size(64), aligned(2), may_alias));",
           "typedef int word __attribute__((aligned(2), may_alias)), words __attribute__((vector_size(64)));"]
  return "\n".join(["{{", *types, "pairs x = (pairs)((words){{}} + *(word*)({1}));",
                    *(one % (o, o, o) for o in range(0, n, 16)), "}}"])

def product_of(name:str, device:str, y:UOp, reduced:Sizes, pair:Callable, after:Callable, tiles:Tiles|None,
               pairs:bool=False) -> UOp:
  """y[at] = after(at, Σ a · b), a, b = pair(at, inner): in tiles, on tensor cores or, if neither fits, plainly."""
  if pairs: return kernel(name + "_pairs", y, reduced, pair, after, tiles, pairs=True)
  def low(at, inner): return (p := pair(at, inner))[0] * p[1]
  def full(at, inner): return (p := pair(at, inner))[0].cast(dtypes.float32) * p[1].cast(dtypes.float32)
  made = None if tiles else on_tensor_cores(kernel(name, y, reduced, low, after), device)
  return kernel(name, y, reduced, full, after, tiles) if made is None else made

# *** products ***

def at_pixel(x:UOp, b:UOp, h:UOp, v:UOp, c:UOp) -> UOp:
  """x[b,h,v,c], also where x lies in blocks of channels, (B,C/l,H,W,l)."""
  return x[b, c//x.shape[4], h, v, c%x.shape[4]] if len(x.shape) == 5 else x[b, h, v, c]

def conv_kernel(y:UOp, x:UOp, w:UOp, *adds:UOp, stride:int, flipped:bool, device:str) -> UOp:
  """y[b,h,v,o] = Σ_ijc x[b, s·h+i, s·v+j, c] w[i,j,c,o] + Σ adds[b,h,v,o], x with its border.

  x may lie in blocks of channels, as `block_kernel` makes them, and then w as (O/m,C/l,k,k,l,m); or both in bfloat16,
  w in pairs of input channels as (O/m,C/l,k,k,l/2,m,2).
  flipped: with w[k−1−i, k−1−j, o, c], turned around and its input and output exchanged: the gradient of x."""
  (_, H, W, O), k, l, pairs = y.shape, w.shape[0 if len(w.shape) == 4 else 2], x.shape[-1], len(w.shape) == 7
  C = l * (x.shape[1] if len(x.shape) == 5 else 1)
  def pair(at, inner):
    (b, h, v, o), (q, i, j, c) = at, inner
    if pairs: return at_pixel(x, b, h*stride+i, v*stride+j, q*l+2*c), w[o//w.shape[5], q, i, j, c, o%w.shape[5], 0]
    if len(w.shape) == 6: weight = w[o//w.shape[5], q, i, j, c, o%w.shape[5]]
    else: weight = w[k-1-i, k-1-j, o, c] if flipped else w[i, j, q*l+c, o]
    return at_pixel(x, b, h*stride+i, v*stride+j, q*l+c), weight
  def plus(at, total):
    for a in adds: total = total + a[tuple(i if n > 1 else 0 for i, n in zip(at, a.shape))].cast(dtypes.float32)
    return total
  # what is added: numbers of a channel (c), of an image's channel (bc) or of every place (bhwc)
  added = ["".join(axis for axis, n in zip("bhwc", a.shape) if n > 1) for a in adds]
  name = "_".join([f"conv{k}_{H}x{W}_{C}_{O}", *["stride"]*(stride > 1), *["flipped"]*flipped, *added])
  reduced = (C//l, k, k, l//2 if pairs else l)
  return product_of(name, device, y, reduced, pair, plus, conv_tiles(device, y.shape, k*k*C), pairs)

def weight_kernel(dw:UOp, x:UOp, g:UOp, stride:int, p:int, device:str) -> UOp:
  """dw[n,i,j,c,o] = Σ_bhv x[b, s·h+i, s·v+j, c] g[b,h,v,o], b the images of group n; g has a border of p to skip.

  x and g may be words, as cpu.neighbours makes them: of pixels s·v and s·(v+1), and of v and v+1."""
  (G, k, _, C, O), B, pairs = dw.shape, g.shape[0], g.dtype == dtypes.uint32
  H, W = g.shape[-3]-2*p, g.shape[-2]+pairs-2*p
  def pair(at, inner):
    (n, i, j, c, o), (b, h, v) = at, inner
    if pairs: v *= 2
    return at_pixel(x, n*(B//G)+b, h*stride+i, v*stride+j, c), at_pixel(g, n*(B//G)+b, h+p, v+p, o)
  name = f"weight{k}_{H}x{W}_{C}_{O}" + "_stride"*(stride > 1)
  return product_of(name, device, dw, (B//G, H, W//2 if pairs else W), pair, lambda at, total: total,
                    weight_tiles(device, dw.shape, B*H*W*k*k*C*O), pairs)

def product_kernel(y:UOp, a:UOp, b:UOp, rows:bool, cols:bool, scale:float, device:str) -> UOp:
  """y[n,i,j] = scale · Σ_r a[n,i,r] b[n,r,j]; rows: a lies as [n,r,i]; cols: b lies as [n,j,r]. b may lie in blocks of
  columns, (N,J/m,R,m)."""
  (_, I, J), R = y.shape, a.shape[1 if rows else 2]
  def pair(at, inner):
    (n, i, j), (r,) = at, inner
    if len(b.shape) == 4: factor = b[n, j//b.shape[3], r, j%b.shape[3]]
    else: factor = b[n, j, r] if cols else b[n, r, j]
    return a[n, r, i] if rows else a[n, i, r], factor
  name = f"product_{I}_{J}_{R}" + "_rows"*rows + "_cols"*cols + "_scaled"*(scale != 1) + f"_{y.dtype.name}"
  return product_of(name, device, y, (R,), pair, lambda at, total: total * scale, product_tiles(device, y.shape, R))

# *** sums over the pixels, r ***

def column_kernel(y:UOp, *xs:UOp, op:Ops, device:str) -> UOp:
  """y[a,c] = Σ_r Π x[a,r,c], or the maximum over r."""
  A, R, C = xs[0].shape
  def term(at, inner):
    v = xs[0][at[0], inner[0], at[1]]
    for x in xs[1:]: v = v * x[at[0], inner[0], at[1]]
    return v
  name = f"column_{A}_{R}_{C}" + "_max"*(op is Ops.MAX) + f"_{len(xs)}"*(len(xs) > 1) + f"_{xs[0].dtype.name}"
  return kernel(name, y, (R,), term, tiles=column_tiles(device, (A, C), R), op=op)

def statistic_kernel(y:UOp, x:UOp, *mean:UOp, eps:float, device:str) -> UOp:
  """μ[b,g] of the group's channels and pixels or, if it is given, 1/√(σ² + eps)."""
  (_, R, C), n = x.shape, x.shape[2]//y.shape[1]
  def term(at, inner):
    v = x[at[0], inner[0], at[1]*n + inner[1]].cast(dtypes.float32)
    return v if not mean else (v - mean[0][at[0], at[1]]) * (v - mean[0][at[0], at[1]])
  def after(at, total): return total / (R*n) if not mean else (total / (R*n) + eps).rsqrt()
  return kernel(f"{'deviation' if mean else 'mean'}_{R}_{C}", y, (R, n), term, after, opts=group_opts(device, R))

def silu_slope(z): return (s := z.sigmoid()) * (1 + z * (1 - s))

def norm_gradient_kernel(y:UOp, g:UOp, x:UOp, mean:UOp, rstd:UOp, *affine:UOp, device:str) -> UOp:
  """y[b,0,c] = Σ_r g f'(z), y[b,1,c] = Σ_r g f'(z) d, d = (x − μ)/σ: with affine = (weight, bias), f is SiLU and
  z = d · weight + bias; else f' is 1. A kernel must read all its inputs: tinygrad's graphs pass them by position."""
  (_, R, C), n = x.shape, x.shape[2]//mean.shape[1]
  def term(at, inner):
    (b, q, c), (r,) = at, inner
    d = (x[b, r, c].cast(dtypes.float32) - mean[b, c//n]) * rstd[b, c//n]
    v = g[b, r, c].cast(dtypes.float32)
    if affine: v = v * silu_slope(d * affine[0][c] + affine[1][c])
    return v * q.eq(0).where(UOp.const(1.0, dtypes.float32), d)
  return kernel(f"norm_gradient_{R}_{C}" + "_silu"*bool(affine), y, (R,), term, opts=group_opts(device, R, C))

# *** movement ***

def block_kernel(y:UOp, x:UOp, lo:int, device:str) -> UOp:
  """y (B,C/l,H',W',l) = x (B,H,W,C) with a border of zeros, in blocks of l channels."""
  (_, _, H, _, l), (_, h, w, C) = y.shape, x.shape
  def term(at, inner):
    b, q, i, j, c = at
    ok = (i >= lo) & (i < h+lo) & (j >= lo) & (j < w+lo)
    v = x[b, (i-lo).valid(ok), (j-lo).valid(ok), q*l+c]
    return ok.where(v, v.const_like(0)) if 1 in (h, w) else v  # tinygrad forgets `valid` where an axis has size 1
  return kernel(f"block_{h}x{w}_{C}_{lo}_{H-h-lo}", y, (), term, tiles=block_tiles(device, y.shape))

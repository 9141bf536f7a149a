"""The plain loops of each operation, and how many of their numbers a kernel keeps in registers."""
from __future__ import annotations
import functools
from tinygrad import dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

def divisor(n:int, most:int) -> int: return max(d for d in range(1, most+1) if n % d == 0)

def shared_round(n:int) -> UOp:
  """The number, below n, of a round that any core may take: tinygrad's core_id.

  "&" because clang makes no vectors where the number could be negative."""
  return (UOp.variable("core_id", 0, n-1, dtypes.int, param=True) & 2**16-1).cast(dtypes.weakint)

def tile(size:int, amount:int, axis:int, shared:bool=False) -> tuple[UOp, list[UOp]]:
  """A loop over `size` whose innermost `amount` are unrolled into registers: (index, its ranges).

  If shared, the cores share its rounds."""
  inner = [UOp.range(amount, 100+axis, AxisType.UPCAST)] if amount > 1 else []
  start = inner[0] if inner else UOp.const(0, dtypes.weakint)
  if shared and amount < size <= 2**16: return shared_round(size//amount)*amount + start, inner
  outer = [UOp.range(size//amount, axis)] if amount < size or not inner else []
  return sum((r*amount if inner else r for r in outer), start=start), outer+inner

def summed(sizes:tuple[int, ...], axis:int, value, op:Ops=Ops.ADD) -> UOp:
  """The sum (or maximum) of value(i, j, ...) over i < sizes[0], j < sizes[1], ..."""
  ranges = [UOp.range(n, axis+a, AxisType.REDUCE) if n > 1 else None for a, n in enumerate(sizes)]
  v = value(*(UOp.const(0, dtypes.weakint) if r is None else r for r in ranges))
  return v.reduce(*loops, arg=op) if (loops := [r for r in ranges if r is not None]) else v

def register_tile(macs:int, lanes:int) -> tuple[int, int]:
  """How many channels and how many pixels a kernel keeps in registers.

  Eight vectors run at near the processor's peak, but take 0.4 s to compile: only much work is worth it. Processors with
  vectors of 256 bits have 16 registers: 2 vectors times 4 pixels need the fewest loads."""
  across, pixels = (1, 8) if lanes > 8 else (2, 4)
  return max(1, across*lanes) if macs > 2**16 else 1, pixels if lanes and macs > 2**24 else 1

def sink(out:UOp, value:UOp, ranges:list[list[UOp]], name:str, lanes:int) -> UOp:
  return out.store(value).end(*(r for rs in ranges for r in rs)).sink(
    arg=KernelInfo(name, opts_to_apply=() if lanes else None))

def conv_kernel(y:UOp, x:UOp, w:UOp, *adds:UOp, stride:int, lanes:int) -> UOp:
  """y[b,h,v,o] = Σ add[b,h,v,o] + Σ_ijc x[b, s·h+i, s·v+j, c] w[b,i,j,c,o]: channels last, x padded already."""
  (B, H, W, O), (n, k, _, C, _) = y.shape, w.shape
  channels, pixels = register_tile(B*H*W*O*k*k*C, lanes)
  th = divisor(H, pixels//(tw := divisor(W, pixels)))
  tb = divisor(B, pixels//(tw*th))
  shared = -1 if not lanes or B*H*W*O*k*k*C < 2**18 else 0 if B//tb >= 8 else 1  # which axis the cores share
  (b, rb), (h, rh), (v, rv), (o, ro) = [tile(n, t, i, i == shared) for i, (n, t) in
    enumerate(((B, tb), (H, th), (W, tw), (O, divisor(O, channels))))]
  acc = summed((k, k, C), 4, lambda i, j, c: x[b, h*stride+i, v*stride+j, c] * w[b if n > 1 else 0, i, j, c, o])
  for a in adds: acc = acc + a[tuple(idx if n > 1 else 0 for idx, n in zip((b, h, v, o), a.shape))]
  return sink(y[b, h, v, o], acc, [rb, rh, rv, ro], f"conv{k}_{H}x{W}_{C}_{O}", lanes)

def weight_kernel(dw:UOp, x:UOp, g:UOp, stride:int, p:int, lanes:int) -> UOp:
  """dw[n,i,j,c,o] = Σ_bhv x[b, s·h+i, s·v+j, c] g[b,h,v,o] over the images b of group n.

  g has a border of p to skip."""
  (G, k, _, C, O), (B, H, W, _) = dw.shape, g.shape
  channels, rows = register_tile(B*(H-2*p)*(W-2*p)*O*k*k*C, lanes)
  to = divisor(O, channels)
  shared = lanes and B*H*W*O*k*k*C > 2**18
  (n, rn), (i, ri), (j, rj), (c, rc), (o, ro) = [tile(s, t, a, shared and a == 0) for a, (s, t) in
    enumerate(((G, 1), (k, 1), (k, 1), (C, divisor(C, rows if to > 4 else 4*rows)), (O, to)))]
  acc = summed((B//G, H-2*p, W-2*p), 5,
    lambda b, h, v: x[n*(B//G)+b, h*stride+i, v*stride+j, c] * g[n*(B//G)+b, h+p, v+p, o])
  return sink(dw[n, i, j, c, o], acc, [rn, ri, rj, rc, ro], f"weight{k}_{H}x{W}_{C}_{O}", lanes)

def column_kernel(y:UOp, *xs:UOp, op:Ops, lanes:int) -> UOp:
  """y[a,c] = Σ_r Π x[a,r,c], or the maximum over r."""
  A, R, C = xs[0].shape
  (a, ra), (c, rc) = tile(A, 1, 0, lanes and A*R*C > 2**18), tile(C, divisor(C, lanes or 1), 1)
  acc = summed((R,), 2, lambda r: functools.reduce(UOp.mul, (x[a, r, c] for x in xs)), op)
  return sink(y[a, c], acc, [ra, rc], f"column_{A}_{R}_{C}", lanes)

def pad_kernel(y:UOp, x:UOp, lo:int) -> UOp:
  """y = x with a border of zeros."""
  (B, H, W, C), (_, h, w, _) = y.shape, x.shape
  (b, rb), (i, ri), (j, rj), (c, rc) = [tile(n, t, a, a == 0 and B*H*W*C > 2**16) for a, (n, t) in
    enumerate(((B, 1), (H, 1), (W, 1), (C, divisor(C, 16))))]
  ok = (i >= lo) & (i < h+lo) & (j >= lo) & (j < w+lo)
  return sink(y[b, i, j, c], x[b, (i-lo).valid(ok), (j-lo).valid(ok), c], [rb, ri, rj, rc], f"pad_{H}x{W}_{C}", True)

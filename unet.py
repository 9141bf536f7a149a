"""The network of DDPM, Appendix B: a U-Net that sees the noisy image x_t and the time t and returns an image."""
from __future__ import annotations
import concurrent.futures, ctypes, functools, hashlib, importlib.metadata, itertools, json, math, os, pathlib, re
import shutil, subprocess, sys, time, urllib.error
import numpy as np
import tinygrad.codegen, tinygrad.engine.realize, tinygrad.schedule
from tinygrad import Device, Tensor, dtypes, function, helpers, nn
from tinygrad.device import TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.engine.realize import get_call_arg_uops
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.autogen import libc
from tinygrad.uop.ops import AxisType, CallInfo, KernelInfo, Ops, UOp

# ***** 1. the network *****

class UNet:
  """eps_theta(x_t, t), Appendix B. x (B,C,H,W), t (B,) int32 in 1..T, labels y (B,), num_classes for "no class"."""
  def __init__(self, in_channels:int=3, channels:int=128, channel_mult:tuple[int, ...]=(1, 2, 2, 2),
               num_res_blocks:int=2, attn_resolutions:tuple[int, ...]=(16,), dropout:float=0.1, image_size:int=32,
               norm_groups:int=32, num_classes:int=0, seed:int=0):
    """Raises ValueError, in one sentence, for sizes that do not fit each other."""
    self.config, halvings = {k: v for k, v in locals().items() if k != "self"}, len(channel_mult)-1
    if (min(in_channels, channels, num_res_blocks, image_size, norm_groups, *channel_mult) < 1
        or num_classes < 0 or not channel_mult):
      raise ValueError("every size of the network must be 1 or more")
    if image_size % 2**halvings:
      raise ValueError(f"images of {image_size}x{image_size} do not divide by 2 for each of {halvings} levels: "
                       f"crop or pad them to a multiple of {2**halvings}, or take fewer levels (channel_mult)")
    if channels % norm_groups:
      raise ValueError(f"{channels} channels do not divide into {norm_groups} groups (norm_groups)")
    if channels % 2 or channels < 4:
      raise ValueError(f"channels must be even and at least 4, not {channels}: half of the embedding are sines")
    if not 0 <= dropout < 1: raise ValueError(f"dropout must be from 0 up to below 1, not {dropout}")
    rng, emb = np.random.default_rng(seed), 4*channels
    count = itertools.count()
    block = lambda c, o: ResBlock(rng, c, o, emb, norm_groups, dropout, next(count))
    attend = lambda c, size: [Attention(rng, c, norm_groups)] if size in attn_resolutions else []
    self.time1, self.time2 = Dense(rng, channels, emb), Dense(rng, emb, emb)
    if num_classes: self.label = fan_average(rng, num_classes+1, emb)
    self.conv_in = Conv(rng, in_channels, channels)
    c, size, skips, self.down, self.up = channels, image_size, [channels], [], []
    for i, m in enumerate(channel_mult):
      for _ in range(num_res_blocks):
        self.down.append([block(c, c := channels*m), *attend(c, size)])
        skips.append(c)
      if i < len(channel_mult)-1:
        self.down.append([Conv(rng, c, c, stride=2)])
        skips.append(c)
        size //= 2
    self.mid = [block(c, c), Attention(rng, c, norm_groups), block(c, c)]
    for i, m in reversed(list(enumerate(channel_mult))):
      for j in range(num_res_blocks+1):
        self.up.append([block(c+skips.pop(), c := channels*m), *attend(c, size)])
      if i > 0:
        self.up[-1].append(Conv(rng, c, c))
        size *= 2
    self.norm_out, self.conv_out = GroupNorm(c, norm_groups), Conv(rng, c, in_channels, scale=1e-10)
    Tensor.realize(*nn.state.get_parameters(self))

  def embed(self, t:Tensor, y:Tensor|None) -> Tensor:
    """sin and cos of (t-1) · 10000^(-i/(half-1)), then two linear layers: (B,4·channels).

    The authors count time from 0."""
    half = self.config["channels"]//2
    freq = Tensor(np.exp(-math.log(10000) * np.arange(half) / (half-1)).astype(np.float32), device=t.device)
    angle = (t-1).cast(dtypes.float32).reshape(-1, 1) * freq
    emb = self.time2(self.time1(angle.sin().cat(angle.cos(), dim=1)).silu())
    if null := self.config["num_classes"]:
      y = y if y is not None else Tensor(np.full(t.shape, null, np.int32), device=t.device)
      emb = emb + y.one_hot(null+1).float() @ self.label
    return emb.silu().contiguous()

  def __call__(self, x:Tensor, t:Tensor, y:Tensor|None=None, seed:Tensor|None=None) -> Tensor:
    """Dropout is on when a `seed` for it is given, uint32 (1,).

    The same seed drops the same numbers on every device."""
    emb = self.embed(t, y)
    apply = lambda layer, h: layer(h, emb, seed) if isinstance(layer, ResBlock) else layer(h)
    h = self.conv_in(x.permute(0, 2, 3, 1))
    skips = [h]
    for layers in self.down:
      for layer in layers: h = apply(layer, h)
      skips.append(h)
    for layer in self.mid: h = apply(layer, h)
    for layers in self.up:
      h = h.cat(skips.pop(), dim=-1).contiguous()
      for layer in layers: h = layer(upsample(h)) if isinstance(layer, Conv) else apply(layer, h)
    return self.conv_out(self.norm_out(h)).permute(0, 3, 1, 2)

def upsample(x:Tensor) -> Tensor:
  """Each pixel twice in both directions: (B,H,W,C) -> (B,2H,2W,C)."""
  B, H, W, C = x.shape
  return x.reshape(B, H, 1, W, 1, C).expand(B, H, 2, W, 2, C).reshape(B, 2*H, 2*W, C)

# ***** 2. the layers *****

def fan_average(rng:np.random.Generator, *shape:int, scale:float=1.) -> Tensor:
  """The authors' initialisation: uniform with variance scale · 2/(fan_in + fan_out)."""
  limit = math.sqrt(6 * scale / (math.prod(shape[:-1]) + math.prod(shape[:-2])*shape[-1]))
  return Tensor(rng.uniform(-limit, limit, shape).astype(np.float32))

class Dense:
  """x (B,C) -> x w + b (B,O)."""
  def __init__(self, rng, c:int, o:int):
    self.weight, self.bias = fan_average(rng, c, o), Tensor(np.zeros(o, np.float32))
  def __call__(self, x:Tensor) -> Tensor:
    return convolve(x.reshape(x.shape[0], 1, 1, -1), self.weight[None, None],
                    self.bias.reshape(1, 1, 1, -1)).reshape(x.shape[0], -1)

class Conv:
  """x (B,H,W,C) -> (B,H',W',O): k x k, padded to keep the size; with stride 2 padded by (0,1,0,1) to halve it."""
  def __init__(self, rng, c:int, o:int, k:int=3, stride:int=1, scale:float=1.):
    self.weight, self.bias, self.stride = \
      fan_average(rng, k, k, c, o, scale=scale), Tensor(np.zeros(o, np.float32)), stride
  def __call__(self, x:Tensor, *adds:Tensor) -> Tensor:
    k = self.weight.shape[0]
    lo, hi = (k//2, k//2) if self.stride == 1 else (0, 1)
    return convolve(x, self.weight, self.bias.reshape(1, 1, 1, -1), *adds, stride=self.stride, lo=lo, hi=hi)

class GroupNorm:
  """x (B,H,W,C): mean 0 and variance 1 over each group of C/groups channels, then each channel's scale and shift."""
  def __init__(self, c:int, groups:int):
    self.weight, self.bias, self.groups = Tensor(np.ones(c, np.float32)), Tensor(np.zeros(c, np.float32)), groups
  def __call__(self, x:Tensor, silu:bool=True) -> Tensor:
    return norm_function(self.groups, silu)(x, self.weight, self.bias)[0]

def dropout(x:Tensor, p:float, seed:Tensor) -> Tensor:
  """x with each number zeroed with probability p and the others divided by 1-p.

  The mask is a hash of seed and position."""
  h = Tensor.arange(x.numel(), dtype=dtypes.uint32) * 0x9E3779B1 ^ (seed.to(first_device(x)) * 0x85EBCA77)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)): h = (h ^ (h >> shift)) * factor
  keep = (h >= int(p * 2**32)).reshape(x.shape)
  return (keep if isinstance(x.device, str) else keep.contiguous().shard(x.device, 0)).where(x, 0) / (1-p)

class ResBlock:
  """GroupNorm, SiLU, convolution; the time's projection added; GroupNorm, SiLU, dropout, convolution; x added."""
  def __init__(self, rng, c:int, o:int, emb:int, groups:int, dropout:float, index:int):
    self.index = index
    self.norm1, self.conv1, self.temb = GroupNorm(c, groups), Conv(rng, c, o), Dense(rng, emb, o)
    self.norm2, self.conv2, self.dropout = GroupNorm(o, groups), Conv(rng, o, o, scale=1e-10), dropout
    if c != o: self.shortcut = Conv(rng, c, o, k=1)
  def __call__(self, x:Tensor, emb:Tensor, seed:Tensor|None) -> Tensor:
    x = x.contiguous_backward()
    h = self.conv1(self.norm1(x), self.temb(emb).reshape(x.shape[0], 1, 1, -1))
    h = self.norm2(h)
    if seed is not None and self.dropout: h = dropout(h, self.dropout, seed + self.index)
    return self.conv2(h, self.shortcut(x) if hasattr(self, "shortcut") else x)

class Attention:
  """Single-head self-attention over the H·W positions: x + out(softmax(q kᵀ / √C) v)."""
  def __init__(self, rng, c:int, groups:int):
    self.norm, self.q, self.k, self.v = \
      GroupNorm(c, groups), Conv(rng, c, c, k=1), Conv(rng, c, c, k=1), Conv(rng, c, c, k=1)
    self.out = Conv(rng, c, c, k=1, scale=1e-10)
  def __call__(self, x:Tensor) -> Tensor:
    B, H, W, C = x.shape
    x = x.contiguous_backward()
    h = self.norm(x, silu=False)
    q, k, v = [f(h).reshape(B, 1, 1, H*W, C) for f in (self.q, self.k, self.v)]
    # a product of matrices is a 1x1 convolution in which each image has a kernel of its own
    a = softmax(convolve(q[:, 0] * C**-0.5, k.transpose(3, 4)))
    return self.out(convolve(a, v).reshape(B, H, W, C), x)

# ***** 3. what is written for speed: convolution, sums, normalisation and softmax, with their gradients *****

def first_device(x:Tensor) -> str: return x.device if isinstance(x.device, str) else x.device[0]

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

def launch(kernel, shape:tuple[int, ...], *inputs:Tensor, grad_fxn=None) -> Tensor:
  """The output, of `shape`, of a kernel.

  It lies like the first input, on one device or along its first axis on several."""
  device = inputs[0].device
  out = Tensor.empty(*shape, device=device) if isinstance(device, str) else \
    Tensor(Tensor.empty(shape[0]//len(device), *shape[1:], device=device).uop.unshard(axis=0))
  return out.custom_kernel(*(x.contiguous() for x in inputs), fxn=kernel, grad_fxn=grad_fxn)[0]

def pad(x:Tensor, lo:int, hi:int) -> Tensor:
  """x (B,H,W,C) with a border of zeros.

  On its own: fused with what makes x, the test for the border is made for each number."""
  if lo == hi == 0: return x.contiguous()
  if not vector_lanes(first_device(x)): return x.pad((None, (lo, hi), (lo, hi), None)).contiguous()
  B, H, W, C = x.shape
  return launch(functools.partial(pad_kernel, lo=lo), (B, H+lo+hi, W+lo+hi, C), x,
                grad_fxn=lambda g, call: (None, g.shrink((None, (lo, lo+H), (lo, lo+W), None))))

def column_sum(*xs:Tensor, op:Ops=Ops.ADD) -> Tensor:
  """(A,R,C) each -> (A,C): the sum (or maximum) over r of their product."""
  return launch(functools.partial(column_kernel, op=op, lanes=vector_lanes(first_device(xs[0]))),
                (xs[0].shape[0], xs[0].shape[2]), *xs)

def row_sum(*xs:Tensor, op:Ops=Ops.ADD) -> Tensor:
  """(...,N) each -> (...,1): as columns first, which vectorise."""
  shape, l = xs[0].shape, divisor(xs[0].shape[-1], 16)
  part = column_sum(*(x.reshape(-1, shape[-1]//l, l) for x in xs), op=op).reshape(*shape[:-1], l)
  return part.max(-1, keepdim=True) if op is Ops.MAX else part.sum(-1, keepdim=True)

def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, lo:int=0, hi:int=0) -> Tensor:
  """x (B,H,W,C), padded by lo and hi, convolved with w (k,k,C,O), plus each of `adds`: (B,H',W',O).

  The axes of size 1 of `adds` broadcast. With w (B,k,k,C,O) every image has a kernel of its own.
  The gradients are convolutions as well: autodiff's take 4 times as long."""
  B, k, own = x.shape[0], w.shape[-3], w.ndim == 5
  H, W = [(n+lo+hi-k)//stride+1 for n in x.shape[1:3]]
  lanes = vector_lanes(first_device(x))

  def grad(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    _, xp, w, *adds = [Tensor(u) for u in call.src[1:]]
    gp, p = pad(g := Tensor(g).contiguous(), k-1-lo, k-1-hi), k-1-lo
    assert p == k-1-hi or stride == 2
    # dx at stride 1: g convolved with the flipped, transposed kernel
    if stride == 1: dx = convolve(gp, w.flip((1, 2)).transpose(3, 4) if own else w.flip((1, 2)).transpose(3, 4)[0])
    else:  # dx[2u+p] = Σₐ g[u−a] w[2a+p]: a convolution with 2x2 taps whose output channels are the 2x2 phases p
      w2 = w[0].pad(((0, 4-k), (0, 4-k), None, None)).reshape(2, 2, 2, 2, *w.shape[3:]).flip((0, 2))
      dx = convolve(pad(g, 1, 0), w2.permute(0, 2, 5, 1, 3, 4).reshape(2, 2, w.shape[4], -1))
      dx = dx.reshape(B, H, W, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(B, 2*H, 2*W, -1)
      gp, p = g, 0
    # dw: a sum for each of 16 groups of images, then over the groups: many short sums instead of one long one, and
    # each group stays in the cache
    dw = launch(functools.partial(weight_kernel, stride=stride, p=p, lanes=lanes),
                (B if own else divisor(B, 16), *w.shape[1:]), xp, gp)
    if not own:
      dw = column_sum(dw.reshape(1, dw.shape[0], -1)).reshape(w.shape) if isinstance(dw.device, str) else \
        dw.sum(0, keepdim=True)
    def da(a:Tensor) -> UOp:
      if a.shape == g.shape: return g.uop
      per_image = column_sum(g.reshape(B, H*W, -1))
      return (per_image if a.shape[0] == B else per_image.sum(0)).reshape(a.shape).uop
    return None, dx.pad((None, (lo, hi), (lo, hi), None)).uop, dw.uop, *map(da, adds)

  return launch(functools.partial(conv_kernel, stride=stride, lanes=lanes), (B, H, W, w.shape[-1]),
                pad(x, lo, hi), w if own else w.unsqueeze(0), *adds, grad_fxn=grad)

@functools.cache
def norm_function(groups:int, silu:bool):
  """GroupNorm, then SiLU. y = f(z), z = (x − μ)/σ · weight + bias."""
  def group_mean(v:Tensor, n:int) -> Tensor:  # (B,C) sums over the pixels -> (B,1,1,C) means over group and pixels
    B, C = v.shape
    v = v.reshape(B, groups, -1).sum(-1, keepdim=True) / (n*C//groups)
    return v.expand(B, groups, C//groups).reshape(B, 1, 1, C).contiguous()
  def sums(*xs:Tensor) -> Tensor: return column_sum(*(x.reshape(x.shape[0], -1, x.shape[-1]) for x in xs))

  def backward(g:UOp, call:UOp):
    (x, weight, bias), d, rstd = map(Tensor, call.src[1:4]), Tensor(call.gettuple(1)), Tensor(call.gettuple(2))
    g, n, w = Tensor(g), x.shape[1]*x.shape[2], weight.reshape(1, 1, 1, -1)
    if silu:
      z = d * (rstd*w) + bias
      g = g * (s := z.sigmoid()) * (1 + z*(1-s))
    g = g.contiguous()
    s1, s2 = sums(g), sums(g, d)
    m1, m2 = group_mean(s1*weight, n), group_mean(s2*weight, n)
    dx = g * (rstd*w).contiguous() - (rstd*m1).contiguous() - d * (rstd*rstd*rstd*m2).contiguous()
    return dx.uop, (s2 * rstd.reshape(s2.shape)).sum(0).uop, s1.sum(0).uop, *(None for _ in call.src[4:])

  def forward(x:Tensor, weight:Tensor, bias:Tensor) -> tuple[Tensor, ...]:
    n = x.shape[1]*x.shape[2]
    d = (x - group_mean(sums(x), n)).contiguous()
    rstd = (group_mean(sums(d, d), n) + 1e-6).rsqrt().contiguous()
    z = d * (rstd * weight.reshape(1, 1, 1, -1)).contiguous() + bias
    return (z.silu() if silu else z).contiguous(), d, rstd
  return function(forward, precompile=True, allow_implicit=True, grad_fxn=backward)

def softmax_backward(g:UOp, call:UOp):
  p, g = Tensor(call.gettuple(0)), Tensor(g).contiguous()
  return (p * (g - row_sum(g, p).contiguous())).uop, *(None for _ in call.src[2:])

@functools.partial(function, precompile=True, allow_implicit=True, grad_fxn=softmax_backward)
def softmax(s:Tensor) -> Tensor:
  """exp(s) / Σ exp(s) along the last axis."""
  s = s.contiguous()
  e = (s - row_sum(s, op=Ops.MAX).contiguous()).exp().contiguous()
  return (e / row_sum(e).contiguous()).contiguous()

# ***** 4. the device *****

def clang() -> str|None:
  """The C compiler for tinygrad's CPU device: $CC, else the newest clang.

  Debian and Ubuntu install it as clang-19 and the like."""
  names = [os.environ["CC"]] if "CC" in os.environ else [*(f"clang-{v}" for v in range(30, 13, -1)), "clang"]
  return next((c for n in names if (c := shutil.which(n))), None)

def device() -> str:
  """The device in use. RuntimeError, in one sentence, when tinygrad finds none or $DEV names one that is not there."""
  if clang(): os.environ["CC"] = clang()
  try: return Device[Device.DEFAULT].device
  except Exception as e:
    if os.environ.get("DEV", "CPU").upper().startswith("CPU") and not clang():
      raise RuntimeError("no GPU was found and the CPU device needs clang: install it "
                         "(Debian, Ubuntu: apt-get install clang; macOS: xcode-select --install) "
                         "or set CC to where it is") from e
    raise RuntimeError(f"tinygrad cannot open the device DEV={os.environ.get('DEV', '')} "
                       f"({(str(e).splitlines() or [type(e).__name__])[0][:200]})") from e

@functools.cache
def wide_vectors() -> bool:
  """Whether the processor has vectors of 512 bits."""
  try: return "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
  except OSError: return False

@functools.cache
def outdated_clang() -> bool:
  """Whether clang is older than 18 and so uses a quarter of such vectors: training takes three times as long."""
  version = subprocess.run([clang() or "clang", "--version"], capture_output=True, text=True).stdout
  return wide_vectors() and int((re.search(r"version (\d+)", version) or [0, 0])[1]) < 18

@functools.cache
def vector_lanes(device:str) -> int:
  """Numbers in a vector where kernels are tiled by hand: on the CPU, which tinygrad renders as C. 0 elsewhere."""
  if not device.startswith("CPU"): return 0
  # no float4 loads: they hold clang to 128-bit vectors, without them it takes the full width;
  # and no guessed unrolling elsewhere
  os.environ.update(DMC="1", NOOPT="1")
  helpers.getenv.cache_clear()
  helpers.NOOPT.value = 1
  return 16 if wide_vectors() and not outdated_clang() else 8

os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")  # a compiling process lives for all kernels, not for 16
TEAM = """
typedef unsigned long long word;
void run(word *command, word n, word me, word team, word *arrived, void (*give_way)(void)) {
  for (word i = 1; i <= n; i++, command += 35) {
    word a[32];
    for (int k = 0; k < 32; k++) a[k] = command[3+k];
    void (*kernel)(%s) = (void*)command[0];
    for (word task = me; task < command[1]; task += team) { a[command[2]] = task; kernel(%s); }
    __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
    for (word spins = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < i*team; spins++) {
      if (__atomic_load_n(arrived+1, __ATOMIC_RELAXED)) return;
      if (spins > 1000) give_way();
    }
  }
}""" % (", ".join(["word"]*32), ", ".join(f"a[{k}]" for k in range(32)))

@functools.cache
def cores() -> int:
  """How many cores share a kernel: those that the process may use, $NUM_CPU_THREADS if given, at most 16."""
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 16
  return max(1, min(16, helpers.NUM_CPU_THREADS.value, allowed))

@functools.cache
def team() -> tuple:
  """What runs the kernels: the compiled function, and the threads that call it beside the main one."""
  from tinygrad.runtime.ops_cpu import CPUProgram
  cpu = Device["CPU"]
  code = TinyELF(cpu.renderer.compiler.compile_cached(TEAM), "run", cpu.renderer.target, (), b"")
  return CPUProgram(cpu, code), concurrent.futures.ThreadPoolExecutor(max(1, cores()-1))

class Team(GraphRunner):
  """The kernels that a TinyJit has captured, as one call in which the cores share the rounds of each one's outer loop.

  tinygrad's own CPU device runs those rounds one after another on one core. Between kernels the cores wait for each
  other. One kernel is a row of `commands`: address, rounds, which argument is the round, then its arguments."""
  @staticmethod
  def supports_uop(devices:list, call:UOp) -> bool:
    args = get_call_arg_uops(call)
    return (GraphRunner.supports_uop(devices, call) and len(args) < 32
            and {v.expr for v in call.src[0].arg.vars} <= {"core_id"}
            and all(u.op is Ops.PARAM or not u.op_in_backward_slice_with_self(Ops.PARAM) for u in args))

  def __init__(self, linear:UOp, input_uops:tuple[UOp, ...]=()):
    super().__init__(linear, input_uops)
    self.commands, self.inputs = np.zeros((len(self.calls), 35), np.uint64), []
    for command, call, runtime, replace in zip(self.commands, self.calls, self.runtimes, self.uop_replace):
      _, program, bufs, _ = call
      info = program.arg
      command[:3] = runtime.addr, info.global_size[0] if info.vars else 1, len(info.globals) if info.vars else 31
      command[3:3+len(info.globals)] = [bufs[i]._buf.va_addr for i in info.globals]
      self.inputs += [(command, 3+info.globals.index(i), slot) for i, slot in replace if i in info.globals]

  def __call__(self, input_uops:tuple[UOp, ...], var_vals:dict[str, int], wait:bool=False) -> float:
    start, (program, pool), arrived = time.perf_counter(), team(), np.zeros(2, np.uint64)
    for command, i, slot in self.inputs: command[i] = input_uops[slot].buffer._buf.va_addr
    give_way = ctypes.cast(libc.dll.sched_yield, ctypes.c_void_p).value
    def work(me:int):
      program.fxn(*map(ctypes.c_uint64, (self.commands.ctypes.data, len(self.commands), me, cores(),
                                         arrived.ctypes.data, give_way)))
    try:
      others = [pool.submit(work, me) for me in range(1, cores())]
      work(0)
      for other in others: other.result()
    except BaseException:  # Ctrl-C: let nobody wait for one who does not come
      arrived[1] = 1
      raise
    return time.perf_counter() - start

def share(linear:UOp) -> UOp:
  """A schedule in which the cores share the outer loop of tinygrad's own kernels too, where they are large."""
  def shared(kernel:UOp) -> UOp:
    store, first, *others = kernel.src[0].src
    n = divisor(size := first.vmax+1, 64)
    rest = [first.replace(src=(UOp.const(size//n, dtypes.weakint),))] if n < size else []
    i = shared_round(n)*(size//n) + (rest[0] if rest else 0)
    return kernel.replace(src=(store.substitute({first: i}).end(*rest, *others),))
  def large(call:UOp) -> bool:
    kernel = call.src[0]
    return (kernel.op is Ops.SINK and getattr(kernel.arg, "opts_to_apply", 0) is None and kernel.src[0].op is Ops.END
            and all(u.device == "CPU" for u in call.src[1:]) and divisor(kernel.src[0].src[1].vmax+1, 64) > 1
            and math.prod(r.vmax+1 for r in kernel.src[0].src[1:]) > 2**17)
  return linear.replace(src=tuple(c.replace(src=(shared(c.src[0]), *c.src[1:])) if large(c) else c for c in linear.src))

class Kept(dict):
  """A dict of tinygrad's that lives as long as the process, kept in tinygrad's cache on the disk as well.

  Of a first step's time nearly all goes into scheduling and lowering in Python, and that cache spares the C compiler
  alone. The keys are digests of what is scheduled or lowered, and of tinygrad's version and settings. (The cache holds
  machine code and pickles anyway: who can write to it needs no more.)"""
  def __init__(self, table:str, shrink=lambda v: v, restore=lambda k, v: v):
    settings = sorted((k, str(v.value)) for k, v in helpers.ContextVar._cache.items())
    self.table, self.shrink, self.restore = table, shrink, restore
    self.settings = repr((importlib.metadata.version("tinygrad"), os.environ.get("DMC"), settings))
    self.missing, self.made, self.told = set(), 0, time.monotonic()
  def digest(self, key) -> str: return hashlib.sha256(repr((self.settings, key)).encode()).hexdigest()
  def __contains__(self, key) -> bool:
    if (found := self.get(key)) is None: self.missing.add(key)
    return found is not None
  def get(self, key, default=None):
    if not super().__contains__(key) and (v := helpers.diskcache_get(self.table, self.digest(key))) is not None:
      super().__setitem__(key, self.restore(key, v))
    return super().get(key, default)
  def __setitem__(self, key, value):
    super().__setitem__(key, value)
    helpers.diskcache_put(self.table, self.digest(key), self.shrink(value))
    # a first step takes a minute: show that it goes on
    self.missing.discard(key)
    if not self.made: self.told = time.monotonic()
    self.made, tty = self.made+1, sys.stderr.isatty()
    if not self.missing and self.made: self.told, self.made = time.monotonic(), 0
    elif time.monotonic()-self.told > (0.2 if tty else 10):
      self.told, text = time.monotonic(), f"compiling: {self.made} of {self.made+len(self.missing)} kernels"
      print(f"\r\033[K{text}\r" if tty else text, end="" if tty else "\n", file=sys.stderr, flush=True)

def without_code(program:UOp) -> UOp:
  """Of a lowered kernel what a launch reads: its parameters and its source, which the compiler's own cache knows."""
  sink, linear, source, _ = program.src
  params = tuple(u for u in linear.src if u.op is Ops.PARAM)
  return program.replace(src=(UOp(Ops.SINK, src=params, arg=sink.arg), UOp(Ops.LINEAR, src=params), source))

def with_code(key:tuple, program:UOp) -> UOp:
  compiler = Device[key[2].device].renderer.compiler
  return program.replace(src=(*program.src, UOp(Ops.BINARY, arg=compiler.compile_cached(program.src[2].arg))))

# tinygrad's own holds an address, and so would make a new key each time
CallInfo.__repr__ = lambda c: f"CallInfo({c.name!r}, {c.precompile})"
try:
  vector_lanes(device())  # before the first kernel is compiled, so that all processes that compile agree
  if device() == "CPU" and os.name == "posix" and cores() > 1 and isinstance(Device["CPU"].renderer, ClangRenderer):
    Device["CPU"].graph, create_schedule = Team, tinygrad.schedule.create_schedule
    tinygrad.schedule.create_schedule = lambda sink: share(create_schedule(sink))
except RuntimeError: pass  # a program calls device() itself and says so
tinygrad.schedule.schedule_cache = Kept("ddpm_schedules")
tinygrad.codegen.to_program_cache = tinygrad.engine.realize.to_program_cache = \
  Kept("ddpm_programs", without_code, with_code)

# ***** 5. checkpoints: one safetensors file that carries the network's arguments *****

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}

def write_tensors(path:str|os.PathLike, tensors:dict[str, np.ndarray], meta:dict):
  """A safetensors file with `meta` as JSON in its header. The old file stays whole until the new one is on the disk."""
  names = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}
  header, offset = {"__metadata__": {"ddpm": json.dumps(meta)}}, 0
  for k, v in tensors.items():
    header[k] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [offset, offset := offset+v.nbytes]}
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as f:
      for part in (len(head).to_bytes(8, "little"), head, *(np.ascontiguousarray(v).data for v in tensors.values())):
        f.write(part)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except OSError as e: raise OSError(f"cannot write {path}: {e.strerror or e}") from e
  finally:
    try: temporary.unlink(missing_ok=True)
    except OSError: pass

def read_tensors(path:str|os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The tensors and the metadata of a safetensors file.

  ValueError unless every length, type, shape and offset is right."""
  def check(ok:bool, what:str):
    if not ok: raise ValueError(f"{path} is damaged or no safetensors file: {what}")
  try: raw = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  check(len(raw) >= 8, "it is too short")
  n = int.from_bytes(raw[:8].tobytes(), "little")
  check(2 <= n <= min(len(raw)-8, 100_000_000), "its header does not fit into it")
  try: header = json.loads(raw[8:8+n].tobytes())
  except (ValueError, RecursionError): check(False, "its header is not JSON")
  check(isinstance(header, dict), "its header is not a table")
  meta, data, end, tensors = header.pop("__metadata__", None) or {}, raw[8+n:], 0, {}
  check(isinstance(meta, dict) and all(isinstance(v, str) for v in meta.values()), "its metadata are not text")
  whole = lambda v, least: isinstance(v, list) and len(v) >= least and all(type(i) is int and 0 <= i < 2**48 for i in v)
  for spec in header.values():
    check(isinstance(spec, dict) and str(spec.get("dtype")) in DTYPES and
          whole(spec.get("shape"), 0) and len(spec["shape"]) <= 8 and
          whole(spec.get("data_offsets"), 2) and len(spec["data_offsets"]) == 2,
          "a tensor has no valid type, shape or place")
  for name, spec in sorted(header.items(), key=lambda kv: kv[1]["data_offsets"]):
    (a, b), dtype, shape = spec["data_offsets"], np.dtype(DTYPES[spec["dtype"]]), spec["shape"]
    check(a == end and b <= len(data) and b-a == math.prod(shape)*dtype.itemsize,
          f"the tensor {name[:80]!r} does not lie where it should")
    v = np.frombuffer(data[a:b].tobytes(), dtype).reshape(shape)
    tensors[name], end = (v.astype(np.uint32) << 16).view(np.float32) if spec["dtype"] == "BF16" else v, b
  check(end == len(data), "bytes are left over or missing")
  return tensors, meta

def fill(model:UNet, tensors:dict[str, np.ndarray], path) -> UNet:
  """Puts the tensors into the model. ValueError naming the first that is missing, unknown or of another shape."""
  state = nn.state.get_state_dict(model)
  for names, what in ((state.keys()-tensors.keys(), "lacks"), (tensors.keys()-state.keys(), "has an unknown")):
    if names:
      raise ValueError(f"{path} {what} tensor {min(names)!r}{f' (and {len(names)-1} more)' if len(names) > 1 else ''}")
  for k, v in state.items():
    if v.shape != tensors[k].shape:
      raise ValueError(f"{path}: tensor {k!r} has shape {tensors[k].shape}, the network needs {v.shape}")
    if not np.isfinite(tensors[k]).all(): raise ValueError(f"{path}: tensor {k!r} holds numbers that are not finite")
    v.replace(Tensor(tensors[k].astype(np.float32), device=v.device))
  Tensor.realize(*state.values())
  return model

def build(config:dict, path) -> UNet:
  """The network of a checkpoint's arguments."""
  try: return UNet(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
  except (TypeError, AttributeError) as e:
    raise ValueError(f"{path} does not describe a network of this program: {e}") from e

def save(path:str|os.PathLike, model:UNet, meta:dict|None=None, layout:str="ddpm", dtype:type=np.float32):
  """Writes weights and arguments to one file, or with layout="diffusers" to a folder that diffusers reads.

  OSError if it cannot."""
  tensors = {k: v.numpy().astype(dtype) for k, v in nn.state.get_state_dict(model).items()}
  if layout == "ddpm": return write_tensors(path, tensors, {**(meta or {}), "unet": model.config})
  if layout != "diffusers": raise ValueError(f"layout must be 'ddpm' or 'diffusers', not {layout!r}")
  config, scheduler = to_diffusers(model, meta or {})
  renamed = {}
  for ours, theirs in diffusers_names(model):
    v = tensors.pop(ours)
    renamed[theirs] = to_theirs(v, theirs)
  if tensors: raise ValueError(f"the diffusers layout has no place for the tensor {min(tensors)!r}")
  write_tensors(pathlib.Path(path)/"diffusion_pytorch_model.safetensors", renamed, {"format": "pt"})
  for name, content in (("config.json", config), ("scheduler_config.json", scheduler)):
    temporary = pathlib.Path(path)/f".{name}.tmp"
    temporary.write_text(json.dumps(content, indent=2)+"\n")
    os.replace(temporary, pathlib.Path(path)/name)

def load(path:str|os.PathLike, raw:bool=False) -> tuple[UNet, dict]:
  """(model, meta) from a file of `save` or of train.py (its averaged weights, or with `raw` those being trained),
  from a folder in diffusers' layout, or from the name of such a model on the hub, like google/ddpm-cifar10-32.

  Raises OSError or ValueError, in one sentence, for what cannot be read, is damaged, or is no network of this
  program."""
  if os.path.isdir(path): return load_diffusers(pathlib.Path(path))
  if (not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
      and not str(path).endswith(".safetensors")):
    return load_diffusers(download(str(path)))
  if str(path).endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
    raise ValueError(f"{path} is a pickle, which can run any program when read: only safetensors files are loaded")
  tensors, metadata = read_tensors(path)
  try: config = (meta := json.loads(metadata["ddpm"]))["unet"]
  except (KeyError, ValueError, TypeError, RecursionError):
    raise ValueError(f"{path} carries no description of its network: it was not saved by this program") from None
  if not isinstance(config, dict): raise ValueError(f"{path} carries no description of its network")
  if raw and not any(k.startswith("raw.") for k in tensors):
    raise ValueError(f"{path} holds only averaged weights: the raw ones are in last.safetensors")
  if any(k.startswith("ema.") for k in tensors):  # train.py's state: both sets of weights, and Adam's moments
    tensors = {k[4:]: v for k, v in tensors.items() if k.startswith("raw." if raw else "ema.")}
  return fill(build(config, path), tensors, path), meta

def find_checkpoint(path:str|None, raw:bool=False) -> str:
  """The file that a program's --checkpoint means: that of a run's folder.

  Without one, that of the newest run, or the one shipped."""
  name = "last.safetensors" if raw else "ema.safetensors"
  if path: return str(run) if (run := pathlib.Path(path, name)).is_file() else str(path)
  if runs := sorted(pathlib.Path("runs").glob(f"*/{name}"), key=lambda f: f.stat().st_mtime): return str(runs[-1])
  shipped = pathlib.Path(__file__).parent/"checkpoints"/"mnist.safetensors"
  if shipped.is_file() and not raw: return str(shipped)
  raise ValueError(f"there is no runs/*/{name} here yet: train a model first (make train) or name a --checkpoint")

# the layout of diffusers: other names, and (O,I,k,k) where we have (k,k,I,O)

PARTS = {"temb": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm",
         "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_PARTS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

def diffusers_names(model:UNet) -> list[tuple[str, str]]:
  """(our name, diffusers' name) of every tensor."""
  prefixes = [
    ("conv_in", "conv_in"), ("time1", "time_embedding.linear_1"), ("time2", "time_embedding.linear_2"),
    ("mid.0", "mid_block.resnets.0"), ("mid.1", "mid_block.attentions.0"), ("mid.2", "mid_block.resnets.1"),
    ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]
  for side, stack, sampler in (("down", model.down, "downsamplers"), ("up", model.up, "upsamplers")):
    level = j = 0
    for n, layers in enumerate(stack):
      for i, layer in enumerate(layers):
        kind = "resnets" if isinstance(layer, ResBlock) else "attentions"
        prefixes.append((f"{side}.{n}.{i}", f"{side}_blocks.{level}.{sampler}.0.conv" if isinstance(layer, Conv) else
                                            f"{side}_blocks.{level}.{kind}.{j}"))
      if isinstance(layers[-1], Conv): level, j = level+1, 0
      else: j += 1
  table, names = dict(prefixes), []
  for ours in nn.state.get_state_dict(model):
    prefix = next((p for p in sorted(table, key=len, reverse=True) if ours.startswith(p+".")), None)
    if prefix is None: continue  # the labels' embedding has no counterpart
    *parts, leaf = ours[len(prefix)+1:].split(".")
    names.append((ours, ".".join([table[prefix], *(PARTS.get(p, p) for p in parts), leaf])))
  return names

def to_theirs(v:np.ndarray, name:str) -> np.ndarray:
  if v.ndim == 4 and ".attentions." in name: v = v[0, 0]
  return v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T if v.ndim == 2 else v

def to_ours(v:np.ndarray, ndim:int) -> np.ndarray:
  if v.ndim == 4: v = v.transpose(2, 3, 1, 0)
  elif v.ndim == 2: v = v.T
  return v[None, None] if v.ndim == 2 and ndim == 4 else v[0, 0] if v.ndim == 4 and ndim == 2 else v

FIXED = {
  "act_fn": "silu", "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False,
  "downsample_padding": 0, "downsample_type": "conv", "upsample_type": "conv",
  "time_embedding_type": "positional", "resnet_time_scale_shift": "default", "mid_block_scale_factor": 1,
  "center_input_sample": False, "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
  "attention_head_dim": None, "attn_norm_num_groups": None, "time_embedding_dim": None}
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
SIGMAS = {"fixed_large": "beta", "fixed_small": "beta_tilde"}
PREDICTS = {"epsilon": "eps", "sample": "x0"}

def to_diffusers(model:UNet, meta:dict) -> tuple[dict, dict]:
  """config.json and scheduler_config.json of a model."""
  c, d = model.config, meta.get("ddpm", {})
  if c["num_classes"]: raise ValueError("the diffusers layout cannot hold a model with class labels")
  attn = [c["image_size"] >> i in c["attn_resolutions"] for i in range(len(c["channel_mult"]))]
  back = lambda table, v: next(k for k, w in table.items() if w == v)
  try:
    scheduler = {
      "_class_name": "DDPMScheduler", "num_train_timesteps": d.get("T", 1000),
      "beta_start": d.get("beta_1", 1e-4), "beta_end": d.get("beta_T", 0.02),
      "beta_schedule": back(SCHEDULES, d.get("schedule", "linear")),
      "variance_type": back(SIGMAS, d.get("sigma", "beta")),
      "prediction_type": back(PREDICTS, d.get("predict", "eps")), "clip_sample": True}
  except StopIteration: raise ValueError("the diffusers layout has no name for this schedule or prediction") from None
  return {
    "_class_name": "UNet2DModel", **FIXED,
    "sample_size": c["image_size"], "in_channels": c["in_channels"], "out_channels": c["in_channels"],
    "block_out_channels": [c["channels"]*m for m in c["channel_mult"]],
    "layers_per_block": c["num_res_blocks"], "norm_num_groups": c["norm_groups"], "dropout": c["dropout"],
    "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attn],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attn)]}, scheduler

def read_json(path:pathlib.Path) -> dict:
  try: value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, RecursionError): raise ValueError(f"{path} is not JSON") from None
  if not isinstance(value, dict): raise ValueError(f"{path} is not a JSON object")
  return value

def from_diffusers(config:dict, path) -> dict:
  """UNet's arguments from a config.json. ValueError naming what this network does not have."""
  for key, value in FIXED.items():
    if config.get(key, value) not in (value, *({"act_fn": ["swish"]}.get(key, []))):
      raise ValueError(f"{path}: {key} = {config[key]!r} is not supported, only {value!r}")
  for key in ("in_channels", "layers_per_block", "norm_num_groups", "sample_size"):
    if type(config.get(key)) is not int: raise ValueError(f"{path}: {key} = {config.get(key)!r} is no whole number")
  try:
    widths, size, down, up = (config["block_out_channels"], config["sample_size"],
                              list(config["down_block_types"]), list(config["up_block_types"]))
    args = dict(in_channels=int(config["in_channels"]), channels=int(widths[0]),
                num_res_blocks=int(config["layers_per_block"]), dropout=float(config.get("dropout") or 0),
                norm_groups=int(config["norm_num_groups"]), image_size=int(size))
    for kind in down+up:
      if kind not in ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"):
        raise ValueError(f"{path}: the block type {kind!r} is not supported")
    attn = [d == "AttnDownBlock2D" for d in down]
    if config.get("mid_block_type", "UNetMidBlock2D") != "UNetMidBlock2D":
      raise ValueError(f"{path}: mid_block_type = {config['mid_block_type']!r} is not supported")
    if attn != [u == "AttnUpBlock2D" for u in reversed(up)] or len(widths) != len(down):
      raise ValueError(f"{path}: block_out_channels, down_block_types and up_block_types do not mirror each other")
    if config["out_channels"] != config["in_channels"]:
      raise ValueError(f"{path}: out_channels = {config['out_channels']} differs from in_channels")
    if any(w % widths[0] for w in widths):
      raise ValueError(f"{path}: block_out_channels = {widths} are not multiples of the first")
    return args | dict(channel_mult=tuple(w//widths[0] for w in widths),
                       attn_resolutions=tuple(size >> i for i, a in enumerate(attn) if a))
  except (KeyError, TypeError, IndexError, ZeroDivisionError, OverflowError) as e:
    raise ValueError(f"{path} lacks or garbles an entry: {e}") from e

def load_diffusers(folder:pathlib.Path) -> tuple[UNet, dict]:
  if (folder/"unet"/"config.json").exists(): folder = folder/"unet"
  if not (folder/"config.json").exists():
    raise ValueError(f"{folder} holds no config.json: it is no model in the diffusers layout")
  single, index = (folder/"diffusion_pytorch_model.safetensors",
                   folder/"diffusion_pytorch_model.safetensors.index.json")
  config = from_diffusers(read_json(folder/"config.json"), folder/"config.json")
  if single.exists(): files = [single]
  elif index.exists():
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(v, str) and os.path.basename(v) == v for v in parts.values()):
      raise ValueError(f"{index} has no valid weight_map")
    files = [folder/f for f in sorted(set(parts.values()))]
  elif any(folder.glob("*.bin")):
    raise ValueError(f"{folder} holds a pickle (.bin), which can run any program when read: "
                     "only safetensors files are loaded")
  else: raise ValueError(f"{folder} holds no diffusion_pytorch_model.safetensors")
  found = {k: v for f in files for k, v in read_tensors(f)[0].items()}
  model = build(config, folder)
  state, tensors = nn.state.get_state_dict(model), {}
  for ours, theirs in diffusers_names(model):
    old = functools.reduce(lambda s, kv: s.replace(f".{kv[0]}.", f".{kv[1]}."), OLD_PARTS.items(), theirs)
    name = theirs if theirs in found else old
    if name not in found: raise ValueError(f"{folder} lacks the tensor {theirs!r}")
    tensors[ours] = to_ours(found.pop(name), state[ours].ndim)
  if found:
    raise ValueError(f"{folder} has an unknown tensor {min(found)!r}"
                     f"{f' (and {len(found)-1} more)' if len(found) > 1 else ''}")
  meta:dict = {"unet": model.config, "ddpm": {}, "source": str(folder)}
  for s in (folder/"scheduler_config.json", folder/"scheduler"/"scheduler_config.json",
            folder.parent/"scheduler"/"scheduler_config.json"):
    if not s.exists(): continue
    d = read_json(s)
    for key, table in (("beta_schedule", SCHEDULES), ("variance_type", SIGMAS), ("prediction_type", PREDICTS)):
      if str(d.get(key, next(iter(table)))) not in table: raise ValueError(f"{s}: {key} = {d[key]!r} is not supported")
    meta["ddpm"] = dict(
      T=d.get("num_train_timesteps", 1000), beta_1=d.get("beta_start", 1e-4), beta_T=d.get("beta_end", 0.02),
      schedule=SCHEDULES[d.get("beta_schedule", "linear")], sigma=SIGMAS[d.get("variance_type", "fixed_large")],
      predict=PREDICTS[d.get("prediction_type", "epsilon")])
    meta["clip"] = bool(d.get("clip_sample", True))
    break
  return fill(model, tensors, folder), meta

def download(name:str) -> pathlib.Path:
  """The folder of a model on the hub, fetched into tinygrad's cache. OSError, in one sentence, when that fails."""
  folder = pathlib.Path(helpers.cache_dir)/"downloads"/name
  for file, needed in (("config.json", True), ("scheduler_config.json", False),
                       ("diffusion_pytorch_model.safetensors", True)):
    try: helpers.fetch(f"https://huggingface.co/{name}/resolve/main/{file}", folder/file)
    except urllib.error.HTTPError as e:
      if needed:
        raise OSError(f"the hub has no {file} for {name!r} ({e.code} {e.reason}), "
                      "and there is no file or folder of that name here") from e
    except OSError as e:
      raise OSError(f"{name!r} is neither a file nor a folder here, and it could not be downloaded: "
                    f"{getattr(e, 'reason', e)}") from e
  return folder

"""The operations that unet.py marks `@quick`, for the CPU: sums and products as kernels of their own, which vectorize
and which all cores share. The rest is left to tinygrad, in passes over memory."""
from __future__ import annotations
import functools
from fast.gpu import first, groups_of, launch, phase_taps
from fast.kernels import block_kernel, column_kernel, conv_kernel, product_kernel, silu_slope, weight_kernel
from fast.schedules import block, divisor
from tinygrad import Tensor, dtypes, function
from tinygrad.uop.ops import Ops, UOp

def blocks(x:Tensor, lo:int=0, hi:int=0) -> Tensor:
  """x (B,H,W,C) with a border of zeros, in blocks of channels (B,C/l,H',W',l): what a core reads lies together."""
  B, H, W, C = x.shape
  part, l = functools.partial(block_kernel, lo=lo, device=first(x)), block(first(x), C)
  return launch(part, (B, C//l, H+lo+hi, W+lo+hi, l), x.dtype, x.contiguous())

def column_sum(*xs:Tensor, op:Ops=Ops.ADD) -> Tensor:
  """(A,R,C) each -> (A,C): the sum (or maximum) over r of their product."""
  return launch(functools.partial(column_kernel, op=op, device=first(xs[0])), (xs[0].shape[0], xs[0].shape[2]),
                dtypes.float32, *(x.contiguous() for x in xs))

def row_sum(*xs:Tensor, op:Ops=Ops.ADD) -> Tensor:
  """(...,N) each -> (...,1): first 16 partial sums, as columns, which vectorize."""
  shape, l = xs[0].shape, divisor(xs[0].shape[-1], 16)
  part = column_sum(*(x.reshape(-1, shape[-1]//l, l) for x in xs), op=op).reshape(*shape[:-1], l)
  return part.max(-1, keepdim=True) if op is Ops.MAX else part.sum(-1, keepdim=True)

# *** convolution ***

def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, pad:int=0) -> Tensor:
  """unet.convolve."""
  return conv_function(stride, pad, len(adds))(x, w, *adds)[0]

def windows(x:Tensor, w:Tensor, shape:tuple[int, ...], *adds:Tensor, stride:int=1) -> Tensor:
  """x, with its border, perhaps in blocks, convolved with w (k,k,C,O), plus each of `adds`, whose axes of size 1
  broadcast: `shape` (B,H,W,O). For several pixels w is laid in the order in which it is read."""
  k, _, C, O = w.shape
  if shape[1]*shape[2] > 1:
    m, l = block(first(x), O), x.shape[-1]
    w = w.reshape(k, k, C//l, l, O//m, m).permute(4, 2, 0, 1, 3, 5)
  part = functools.partial(conv_kernel, stride=stride, flipped=False, device=first(x))
  return launch(part, shape, x.dtype, x, w.contiguous(), *(a.contiguous() for a in adds))

@functools.cache
def conv_function(stride:int, pad:int, n:int):
  """(x, w, n adds) -> y and x with its border. The gradients are convolutions: autodiff's take 4 times as long."""
  def forward(x:Tensor, w:Tensor, *adds:Tensor) -> tuple[Tensor, Tensor]:
    (B, H, W, _), k, O = x.shape, w.shape[0], w.shape[3]
    lo, hi = (k//2, k//2) if stride == 1 else (pad, 1-pad)
    xp = x.contiguous() if k == 1 else blocks(x, lo, hi)
    return windows(xp, w, (B, H//stride, W//stride, O), *adds, stride=stride), xp

  def backward(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    (x, w, *adds), xp, g = [Tensor(u) for u in call.src[1:3+n]], Tensor(call.gettuple(1)), Tensor(g).contiguous()
    (B, H, W, C), k = x.shape, w.shape[0]
    p = k//2 if stride == 1 else 0
    gp = g if k == 1 else blocks(g, p, p)
    # dx at stride 1: g convolved with the flipped, transposed kernel
    if stride == 1: dx = windows(gp, w.flip((0, 1)).transpose(2, 3), x.shape)
    else:
      dx = windows(blocks(g, 1-pad, pad), phase_taps(w, pad, 1-pad), (B, H//2, W//2, 4*C))
      dx = dx.reshape(B, H//2, W//2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
    # dw: a sum for each group of images, then over the groups: the sums are short, and a group fits the cache
    groups = groups_of(g, min(16, -(-B*H*W//2048)))
    dw = launch(functools.partial(weight_kernel, stride=stride, p=p, device=first(xp)), (groups, *w.shape),
                dtypes.float32, xp, gp)
    if groups == 1: dw = dw[0]
    else: dw = column_sum(dw.reshape(1, groups, -1)).reshape(w.shape) if isinstance(dw.device, str) else dw.sum(0)
    def da(a:Tensor) -> UOp:
      if a.shape == g.shape: return g.uop
      per_image = column_sum(g.reshape(B, -1, g.shape[3]))
      return (per_image if a.shape[0] == B else per_image.sum(0)).reshape(a.shape).uop
    return dx.uop, dw.uop, *map(da, adds), *(None for _ in call.src[3+n:])  # what the function itself allocates
  return function(forward, allow_implicit=True, grad_fxn=backward)

def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
  """unet.linear, as a convolution of one pixel."""
  return convolve(x.reshape(x.shape[0], 1, 1, -1), w[None, None], b.reshape(1, 1, 1, -1)).reshape(x.shape[0], -1)

# *** attention ***

def product(a:Tensor, b:Tensor) -> Tensor:
  """a (B,N,R), b (B,R,M) -> a b (B,N,M); b is laid in the order in which it is read."""
  (B, R, M), m = b.shape, block(first(b), b.shape[2])
  part = functools.partial(product_kernel, rows=False, cols=False, scale=1., device=first(a))
  return launch(part, (*a.shape[:2], M), a.dtype, a.contiguous(), b.reshape(B, R, M//m, m).transpose(1, 2).contiguous())

def softmax(s:Tensor) -> Tensor:
  """exp(s) / Σ exp(s) along the last axis."""
  e = (s - row_sum(s, op=Ops.MAX).contiguous()).exp().contiguous()
  return (e / row_sum(e).contiguous()).contiguous()

def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  """unet.attention."""
  return attention_function(q, k, v)[0]

def attention_backward(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
  (q, k, v), p, g = [Tensor(u) for u in call.src[1:4]], Tensor(call.gettuple(1)), Tensor(g).contiguous()
  dp, scale = product(g, v.transpose(1, 2)), q.shape[2]**-0.5
  ds = (p * (dp - row_sum(dp, p).contiguous()) * scale).contiguous()
  return (product(ds, k).uop, product(ds.transpose(1, 2), q).uop, product(p.transpose(1, 2), g).uop,
          *(None for _ in call.src[4:]))

@functools.partial(function, allow_implicit=True, grad_fxn=attention_backward)
def attention_function(q:Tensor, k:Tensor, v:Tensor) -> tuple[Tensor, Tensor]:
  """-> the output and p = softmax(q kᵀ / √C), (B,N,N)."""
  p = softmax(product(q * q.shape[2]**-0.5, k.transpose(1, 2)))
  return product(p, v), p

# *** GroupNorm ***

def group_norm(x:Tensor, weight:Tensor, bias:Tensor, groups:int, eps:float=1e-6, silu:bool=False) -> Tensor:
  """unet.group_norm."""
  return norm_function(groups, eps, silu)(x, weight, bias)[0]

@functools.cache
def norm_function(groups:int, eps:float, silu:bool):
  """(x, weight, bias) -> f(z), x − μ and 1/σ: z = (x − μ)/σ · weight + bias, f SiLU or nothing."""
  def group_mean(v:Tensor, n:int) -> Tensor:  # (B,C) sums over the pixels -> (B,1,1,C) means over group and pixels
    B, C = v.shape
    v = v.reshape(B, groups, -1).sum(-1, keepdim=True) / (n*C//groups)
    return v.expand(B, groups, C//groups).reshape(B, 1, 1, C).contiguous()
  def sums(*xs:Tensor) -> Tensor: return column_sum(*(x.reshape(x.shape[0], -1, x.shape[-1]) for x in xs))

  def backward(g:UOp, call:UOp):
    (x, weight, bias), d, rstd = map(Tensor, call.src[1:4]), Tensor(call.gettuple(1)), Tensor(call.gettuple(2))
    g, n, w = Tensor(g), x.shape[1]*x.shape[2], weight.reshape(1, 1, 1, -1)
    if silu: g = g * silu_slope(d * (rstd*w) + bias)
    g = g.contiguous()
    s1, s2 = sums(g), sums(g, d)
    m1, m2 = group_mean(s1*weight, n), group_mean(s2*weight, n)
    dx = g * (rstd*w).contiguous() - (rstd*m1).contiguous() - d * (rstd*rstd*rstd*m2).contiguous()
    return dx.uop, (s2 * rstd.reshape(s2.shape)).sum(0).uop, s1.sum(0).uop, *(None for _ in call.src[4:])

  def forward(x:Tensor, weight:Tensor, bias:Tensor) -> tuple[Tensor, ...]:
    n = x.shape[1]*x.shape[2]
    d = (x - group_mean(sums(x), n)).contiguous()
    rstd = (group_mean(sums(d, d), n) + eps).rsqrt().contiguous()
    z = d * (rstd * weight.reshape(1, 1, 1, -1)).contiguous() + bias
    return (z.silu() if silu else z).contiguous(), d, rstd
  return function(forward, precompile=True, allow_implicit=True, grad_fxn=backward)

"""The operations that unet.py marks `@quick`, for the CPU: sums and products as kernels of their own, which vectorize
and which all cores share. The rest is left to tinygrad, in passes over memory."""
from __future__ import annotations
import functools
from fast.gpu import groups_of, launch, phase_taps
from fast.kernels import block_kernel, column_kernel, conv_kernel, product_kernel, silu_slope, weight_kernel
from fast.schedules import block, divisor
from tinygrad import Tensor, dtypes, function
from tinygrad.uop.ops import Ops, UOp

def blocks(x:Tensor, lo:int=0, hi:int=0) -> Tensor:
  """x (B,H,W,C) with a border of zeros, in blocks of channels, (B,C/l,H',W',l): what a core reads lies together."""
  (B, H, W, C), l = x.shape, block(x.device, x.shape[3])
  def grad(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    inside = Tensor(g).shrink((None, None, (lo, lo+H), (lo, lo+W), None))
    return None, inside.permute(0, 2, 3, 1, 4).reshape(B, H, W, C).uop
  part = functools.partial(block_kernel, lo=lo, device=x.device)
  return launch(part, (B, C//l, H+lo+hi, W+lo+hi, l), x.dtype, x.contiguous(), grad_fxn=grad)

def column_sum(*xs:Tensor, op:Ops=Ops.ADD) -> Tensor:
  """(A,R,C) each -> (A,C): the sum (or maximum) over r of their product."""
  return launch(functools.partial(column_kernel, op=op, device=xs[0].device), (xs[0].shape[0], xs[0].shape[2]),
                dtypes.float32, *(x.contiguous() for x in xs))

def row_sum(*xs:Tensor, op:Ops=Ops.ADD) -> Tensor:
  """(...,N) each -> (...,1): first 16 partial sums, as columns, which vectorize."""
  shape, l = xs[0].shape, divisor(xs[0].shape[-1], 16)
  part = column_sum(*(x.reshape(-1, shape[-1]//l, l) for x in xs), op=op).reshape(*shape[:-1], l)
  return part.max(-1, keepdim=True) if op is Ops.MAX else part.sum(-1, keepdim=True)

# *** convolution ***

def paired(x:Tensor, numbers:int, channels:int) -> bool:
  """Whether sums over so many numbers, for so many channels, are sums over pairs: AVX512-BF16 takes two at once."""
  return x.dtype == dtypes.bfloat16 and numbers % 2 == 0 and block(x.device, channels) % 16 == 0

def laid(w:Tensor, l:int, pairs:bool) -> Tensor:
  """w (k,k,C,O) in the order in which a convolution of blocks of l channels, or of pairs of them, reads it."""
  (k, _, C, O), m = w.shape, block(w.device, w.shape[3])
  if pairs: return w.reshape(k, k, C//l, l//2, 2, O//m, m).permute(5, 2, 0, 1, 3, 6, 4)
  return w.reshape(k, k, C//l, l, O//m, m).permute(4, 2, 0, 1, 3, 5)

def neighbours(x:Tensor, s:int) -> Tensor:
  """Words of two numbers in bfloat16 each: of every pixel of x (...,W,C) and of the one s columns to its right."""
  low, high = (v.bitcast(dtypes.uint16).cast(dtypes.uint32) for v in (x[..., :-s, :], x[..., s:, :]))
  return (low | high << 16).contiguous()

def windows(x:Tensor, w:Tensor, shape:tuple[int, ...], *adds:Tensor, stride:int=1, grad_fxn=None) -> Tensor:
  """x, with its border and in blocks, convolved with w, plus each of `adds`, whose axes of size 1 broadcast."""
  if shape[1]*shape[2] > 1:  # of a single pixel each number of w is read once
    w = laid(w.cast(x.dtype) if (pairs := paired(x, x.shape[-1], shape[3])) else w, x.shape[-1], pairs)
  part = functools.partial(conv_kernel, stride=stride, flipped=False, device=x.device)
  return launch(part, shape, x.dtype, x, w.contiguous(), *(a.contiguous() for a in adds), grad_fxn=grad_fxn)

def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, pad:int=0) -> Tensor:
  """unet.convolve. The gradients are convolutions as well: autodiff's take 4 times as long."""
  (B, H, W, C), k = x.shape, w.shape[0]
  lo, hi = (k//2, k//2) if stride == 1 else (pad, 1-pad)
  xp = blocks(x, lo, hi) if k > 1 else x.contiguous()

  def grad(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    xp, g, p = Tensor(call.src[2]), Tensor(g).contiguous(), k//2 if stride == 1 else 0
    gp = blocks(g, p, p) if k > 1 else g
    # dx at stride 1: g convolved with the flipped, transposed kernel
    if stride == 1: dx = windows(gp, w.flip((0, 1)).transpose(2, 3), x.shape)
    else:
      dx = windows(blocks(g, hi, lo), phase_taps(w, lo, hi), (B, H//2, W//2, 4*C))
      dx = dx.reshape(B, H//2, W//2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
    dx = dx.pad((None, (lo, hi), (lo, hi), None))
    if k > 1: dx = dx.reshape(*dx.shape[:3], *xp.shape[1::3]).permute(0, 3, 1, 2, 4)
    # dw: a sum for each group of images, then over the groups: the sums are short, and a group fits the cache
    groups = groups_of(B, min(16, -(-B*H*W//2048)))
    xw, gw = (neighbours(xp, stride), neighbours(gp, 1)) if paired(g, *g.shape[2:]) else (xp, gp)
    dw = launch(functools.partial(weight_kernel, stride=stride, p=p, device=xp.device), (groups, *w.shape),
                dtypes.float32, xw, gw)
    dw = dw[0] if groups == 1 else column_sum(dw.reshape(1, groups, -1)).reshape(w.shape)
    def da(a:Tensor) -> UOp:
      if a.shape == g.shape: return g.uop
      per_image = column_sum(g.reshape(B, -1, g.shape[3]))
      return (per_image if a.shape[0] == B else per_image.sum(0)).reshape(a.shape).uop
    if (n := len(call.src[3].shape)) > 4: dw = laid(dw, xp.shape[-1], n == 7)
    return None, dx.uop, dw.uop, *map(da, adds)

  return windows(xp, w, (B, H//stride, W//stride, w.shape[3]), *adds, stride=stride, grad_fxn=grad)

def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
  """unet.linear, as a convolution of one pixel."""
  return convolve(x.reshape(x.shape[0], 1, 1, -1), w[None, None], b.reshape(1, 1, 1, -1)).reshape(x.shape[0], -1)

# *** attention ***

def matmul(a:Tensor, b:Tensor) -> Tensor:
  """a (B,N,R), b (B,R,M) -> a b (B,N,M)."""
  (B, R, M), m = b.shape, block(b.device, b.shape[2])
  def laid(b:Tensor) -> Tensor: return b.reshape(B, R, M//m, m).transpose(1, 2)  # in the order in which it is read
  def grad(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    return None, matmul(d := Tensor(g).contiguous(), b.transpose(1, 2)).uop, laid(matmul(a.transpose(1, 2), d)).uop
  part = functools.partial(product_kernel, rows=False, cols=False, scale=1., device=a.device)
  return launch(part, (*a.shape[:2], M), a.dtype, a.contiguous(), laid(b).contiguous(), grad_fxn=grad)

def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  """unet.attention."""
  return matmul(softmax(matmul(q * q.shape[2]**-0.5, k.transpose(1, 2))), v)

def softmax_backward(g:UOp, call:UOp):
  p, g = Tensor(call.gettuple(0)), Tensor(g).contiguous()
  return (p * (g - row_sum(g, p).contiguous())).uop, *(None for _ in call.src[2:])

@functools.partial(function, precompile=True, allow_implicit=True, grad_fxn=softmax_backward)
def softmax(s:Tensor) -> Tensor:
  """exp(s) / Σ exp(s) along the last axis."""
  s = s.contiguous()
  e = (s - row_sum(s, op=Ops.MAX).contiguous()).exp().contiguous()
  return (e / row_sum(e).contiguous()).contiguous()

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

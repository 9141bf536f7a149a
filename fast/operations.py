"""The operations that unet.py marks `@quick`, with their gradients, by the kernels of kernels.py."""
from __future__ import annotations
import functools
from fast.compiler import vector_lanes
from fast.kernels import column_kernel, conv_kernel, divisor, pad_kernel, weight_kernel
from tinygrad import Tensor, function
from tinygrad.uop.ops import Ops, UOp

def first_device(x:Tensor) -> str: return x.device if isinstance(x.device, str) else x.device[0]

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

def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1) -> Tensor:
  """unet.convolve."""
  lo, hi = (w.shape[0]//2, w.shape[0]//2) if stride == 1 else (0, 1)
  return windows(x, w, *adds, stride=stride, lo=lo, hi=hi)

def windows(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, lo:int=0, hi:int=0) -> Tensor:
  """x (B,H,W,C), padded by lo and hi, convolved with w (k,k,C,O), plus each of `adds`: (B,H',W',O).

  The axes of size 1 of `adds` broadcast. With w (B,k,k,C,O) every image has a kernel of its own. The gradients are
  convolutions as well: autodiff's take 4 times as long."""
  B, k, own = x.shape[0], w.shape[-3], w.ndim == 5
  H, W = [(n+lo+hi-k)//stride+1 for n in x.shape[1:3]]
  lanes = vector_lanes(first_device(x))

  def grad(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    _, xp, w, *adds = [Tensor(u) for u in call.src[1:]]
    gp, p = pad(g := Tensor(g).contiguous(), k-1-lo, k-1-hi), k-1-lo
    assert p == k-1-hi or stride == 2
    # dx at stride 1: g convolved with the flipped, transposed kernel
    if stride == 1: dx = windows(gp, w.flip((1, 2)).transpose(3, 4) if own else w.flip((1, 2)).transpose(3, 4)[0])
    else:  # dx[2u+p] = Σₐ g[u−a] w[2a+p]: a convolution with 2x2 taps whose output channels are the 2x2 phases p
      w2 = w[0].pad(((0, 4-k), (0, 4-k), None, None)).reshape(2, 2, 2, 2, *w.shape[3:]).flip((0, 2))
      dx = windows(pad(g, 1, 0), w2.permute(0, 2, 5, 1, 3, 4).reshape(2, 2, w.shape[4], -1))
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

def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
  """unet.linear, as a convolution of one pixel."""
  return windows(x.reshape(x.shape[0], 1, 1, -1), w[None, None], b.reshape(1, 1, 1, -1)).reshape(x.shape[0], -1)

def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  """unet.attention: a product of matrices is a 1x1 convolution in which each image has a kernel of its own."""
  q, k, v = q.unsqueeze(1), k[:, None, None], v[:, None, None]
  return windows(softmax(windows(q * q.shape[3]**-0.5, k.transpose(3, 4))), v).squeeze(1)

def group_norm(x:Tensor, weight:Tensor, bias:Tensor, groups:int, silu:bool=True) -> Tensor:
  """unet.group_norm."""
  return norm_function(groups, silu)(x, weight, bias)[0]

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

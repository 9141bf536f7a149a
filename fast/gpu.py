"""The operations that unet.py marks `@quick`, for devices with thousands of threads: products on tensor cores where
there are some, in few kernels and few passes over memory. Padding, SiLU and additions are left to tinygrad, which fuses
them with the kernels before and after. Sums are in float32, whatever the type of x."""
from __future__ import annotations
import copy, functools
from fast.kernels import column_kernel, conv_kernel, norm_gradient_kernel, product_kernel, silu_slope
from fast.kernels import statistic_kernel, weight_kernel
from tinygrad import Tensor, dtypes, function
from tinygrad.codegen.late import coalesce
from tinygrad.dtype import DType
from tinygrad.helpers import ALLOW_TF32
from tinygrad.renderer import cstyle
from tinygrad.uop.ops import Ops, UOp

def launch(fxn, shape:tuple[int, ...], dtype:DType, *inputs:Tensor, grad_fxn=None) -> Tensor:
  """The output of a kernel, on the device of its inputs."""
  out = Tensor.empty(*shape, dtype=dtype, device=inputs[0].device)
  uops = [t.uop for t in (out, *inputs)]
  arrays = tuple((u.shape, u.dtype) for u in uops)
  made = body(fxn.func, tuple(fxn.keywords.items()), arrays, ALLOW_TF32.value)
  return Tensor(out.uop.after(made.call(*uops, grad_fxn=grad_fxn)))

@functools.cache
def body(part, options:tuple, arrays:tuple, tf32:int) -> UOp:
  """The kernel that `part` makes of arrays of these shapes and types: a network has many a convolution twice. tf32: on
  tensor cores it is another."""
  return part(*(UOp.placeholder(*array, slot=i) for i, array in enumerate(arrays)), **dict(options))

def groups_of(images:int, most:int, least:int=1) -> int:
  """Into how many equal groups the images are cut: at most `most`, of `least` images or more."""
  return max(n for n in range(1, most+1) if images % n == 0 and (n == 1 or images//n >= least))

# *** convolution ***

def phase_taps(w:Tensor, lo:int, hi:int) -> Tensor:
  """The taps (2,2,O,4C) that lead from g, with `hi` zeros before and `lo` behind, to the gradient of x at stride 2.

  dx[2u+p] = Σₐ g[u−a+lo] w[2a+p−lo]: a convolution with 2x2 taps whose output channels are the 2x2 phases p."""
  taps = w.pad(((lo, hi), (lo, hi), None, None)).reshape(2, 2, 2, 2, *w.shape[2:]).flip((0, 2))
  return taps.permute(0, 2, 5, 1, 3, 4).reshape(2, 2, w.shape[3], -1)

def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, pad:int=0) -> Tensor:
  """unet.convolve."""
  return conv_function(stride, pad, len(adds))(x, w, *adds)[0]

@functools.cache
def conv_function(stride:int, pad:int, n:int):
  """(x, w, n adds) -> y and x with its border, which the gradient of w needs."""
  def forward(x:Tensor, w:Tensor, *adds:Tensor) -> tuple[Tensor, Tensor]:
    (B, H, W, _), k, O = x.shape, w.shape[0], w.shape[3]
    lo, hi = (k//2, k//2) if stride == 1 else (pad, 1-pad)
    xp = x.pad((None, (lo, hi), (lo, hi), None))
    part = functools.partial(conv_kernel, stride=stride, flipped=False, device=x.device)
    return launch(part, (B, H//stride, W//stride, O), x.dtype, xp, w.cast(x.dtype), *adds), xp

  def backward(g:UOp, call:UOp) -> tuple[UOp|None, ...]:
    x, w, *adds = [Tensor(u) for u in call.src[1:3+n]]
    xp, g, device = Tensor(call.gettuple(1)), Tensor(g).cast(x.dtype), x.device
    B, H, W, C = x.shape
    k, low = w.shape[0], w.cast(x.dtype)
    p = k//2 if stride == 1 else 0
    gp = g.pad((None, (p, p), (p, p), None))
    if stride == 1:
      dx = launch(functools.partial(conv_kernel, stride=1, flipped=True, device=device), x.shape, x.dtype, gp, low)
    else:
      lo, hi = pad, 1-pad
      dx = launch(functools.partial(conv_kernel, stride=1, flipped=False, device=device), (B, H//2, W//2, 4*C), x.dtype,
                  g.pad((None, (hi, lo), (hi, lo), None)), phase_taps(low, lo, hi))
      dx = dx.reshape(B, H//2, W//2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
    # sums of groups of images, then over the groups: enough threads for every shape; 16 images or more if rows are few
    groups = groups_of(B, 8, 1 if g.shape[1] > 4 else 16)
    part = functools.partial(weight_kernel, stride=stride, p=p, device=device)
    dw = launch(part, (groups, *w.shape), dtypes.float32, xp, gp)
    images = columns(gp)    # the border is zeros
    def da(a:Tensor) -> UOp:
      if a.shape == g.shape: return g.uop
      return (images if a.shape[0] == B and B > 1 else images.sum(0)).reshape(a.shape).cast(a.dtype).uop
    return dx.uop, dw.sum(0).uop, *map(da, adds), *(None for _ in call.src[3+n:])  # what the function itself allocates
  return function(forward, allow_implicit=True, grad_fxn=backward)

def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
  """unet.linear, as a convolution of one pixel."""
  return convolve(x.reshape(x.shape[0], 1, 1, -1), w[None, None], b.reshape(1, 1, 1, -1)).reshape(x.shape[0], -1)

def columns(x:Tensor) -> Tensor:
  """(B,H,W,C) -> (B,C): sums over the pixels."""
  B, H, W, C = x.shape
  part = functools.partial(column_kernel, op=Ops.ADD, device=x.device)
  return launch(part, (B, C), dtypes.float32, x.reshape(B, H*W, C))

# *** GroupNorm ***

def group_norm(x:Tensor, weight:Tensor, bias:Tensor, groups:int, eps:float=1e-6, silu:bool=False) -> Tensor:
  """unet.group_norm."""
  return norm_function(groups, eps, silu)(x, weight, bias)[0]

@functools.cache
def norm_function(groups:int, eps:float, silu:bool):
  """(x, weight, bias) -> f(z), μ and 1/σ: z = (x − μ)/σ · weight + bias, f SiLU or nothing."""
  def spread(v:Tensor, C:int) -> Tensor:  # (B,G) -> (B,1,1,C)
    B = v.shape[0]
    return v.reshape(B, 1, 1, groups, 1).expand(B, 1, 1, groups, C//groups).reshape(B, 1, 1, C)
  def forward(x:Tensor, weight:Tensor, bias:Tensor) -> tuple[Tensor, ...]:
    (B, H, W, C), part = x.shape, functools.partial(statistic_kernel, eps=eps, device=x.device)
    flat = x.reshape(B, H*W, C)
    mean = launch(part, (B, groups), dtypes.float32, flat)
    rstd = launch(part, (B, groups), dtypes.float32, flat, mean)
    z = (x.float() - spread(mean, C)) * (spread(rstd, C) * weight) + bias
    return (z.silu() if silu else z).cast(x.dtype), mean, rstd
  def backward(g:UOp, call:UOp) -> tuple[UOp, ...]:
    x, weight, bias = [Tensor(u) for u in call.src[1:4]]
    g, mean, rstd = Tensor(g).cast(x.dtype), Tensor(call.gettuple(1)), Tensor(call.gettuple(2))
    B, H, W, C = x.shape
    affine = (weight, bias) if silu else ()
    sums = launch(functools.partial(norm_gradient_kernel, device=x.device), (B, 2, C), dtypes.float32,
                  g.reshape(B, H*W, C), x.reshape(B, H*W, C), mean, rstd, *affine)
    means = ((sums * weight).reshape(B, 2, groups, -1).sum(3) / (H*W*C//groups)).contiguous()
    d, v = (x.float() - spread(mean, C)) * spread(rstd, C), g.float()
    if silu: v = v * silu_slope(d * weight + bias)
    dx = (v * weight - spread(means[:, 0], C) - d * spread(means[:, 1], C)) * spread(rstd, C)
    return dx.cast(x.dtype).uop, sums[:, 1].sum(0).uop, sums[:, 0].sum(0).uop, *(None for _ in call.src[4:])
  return function(forward, allow_implicit=True, grad_fxn=backward)

# *** attention ***

def product(a:Tensor, b:Tensor, dtype:DType, rows:bool=False, cols:bool=False, scale:float=1., grad_fxn=None) -> Tensor:
  """scale · a b, (B,I,R) and (B,R,J); rows: a lies as (B,R,I); cols: b lies as (B,J,R)."""
  shape = (a.shape[0], a.shape[2 if rows else 1], b.shape[1 if cols else 2])
  part = functools.partial(product_kernel, rows=rows, cols=cols, scale=scale, device=a.device)
  return launch(part, shape, dtype, a, b, grad_fxn=grad_fxn)

def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  """unet.attention."""
  return attention_function(q, k, v)[0]

def attention_backward(g:UOp, call:UOp) -> tuple[UOp, ...]:
  (q, k, v), p = [Tensor(u) for u in call.src[1:4]], Tensor(call.gettuple(1))
  g, scale = Tensor(g).cast(q.dtype), q.shape[2]**-0.5
  dp = product(g, v, dtypes.float32, cols=True)
  ds = (p.float() * (dp - (dp * p.float()).sum(2, keepdim=True).contiguous())).cast(q.dtype)  # of softmax's argument
  return (product(ds, k, q.dtype, scale=scale).uop, product(ds, q, q.dtype, rows=True, scale=scale).uop,
          product(p, g, q.dtype, rows=True).uop, *(None for _ in call.src[4:]))

@functools.partial(function, allow_implicit=True, grad_fxn=attention_backward)
def attention_function(q:Tensor, k:Tensor, v:Tensor) -> tuple[Tensor, Tensor]:
  """-> the output and p = softmax(q kᵀ / √C), (B,N,N)."""
  s = product(q, k, dtypes.float32, cols=True, scale=q.shape[2]**-0.5)
  e = (s - s.max(2, keepdim=True).contiguous()).exp()
  p = (e / e.sum(2, keepdim=True).contiguous()).cast(q.dtype)
  return product(p, v, q.dtype), p

# *** loads of bfloat16 ***

def render_kernel(renderer:cstyle.CUDARenderer, *args, render=cstyle.CUDARenderer.render_kernel, **options) -> str:
  """In the place of CUDARenderer's: with CUDA's name of what makes a pair of two numbers. Where a warp keeps many tiles
  its loops are not unrolled: of four rounds at once NVIDIA's compiler spilled registers."""
  code = "#define make_nv_bfloat162 make_bfloat162\n" + render(renderer, *args, **options)
  return code.replace("for (", "\n#pragma unroll 1\nfor (") if code.count("= __WMMA") > 16 else code

def changes() -> list[tuple]:
  """What `scope` changes: four or two neighbours of bfloat16 are loaded and stored at once, as those of float16 are.
  One by one, the loads of a product on tensor cores took twice as long as its arithmetic. bfloat16 in tinygrad's own
  list of what may be joined would make this unnecessary."""
  joined = copy.copy(dtypes)
  joined.fp8s = (*dtypes.fp8s, dtypes.bfloat16)                                              # type: ignore[misc]
  return [(coalesce, "dtypes", joined), (cstyle.CUDARenderer, "render_kernel", render_kernel)]

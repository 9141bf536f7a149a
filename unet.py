"""The network of DDPM, Appendix B: a U-Net that sees the noisy image x_t and the time t and returns an image.

Inside, images are channels last, x (B,H,W,C), and a k x k convolution has weights (k,k,C,O). Every operation is written
in plain tinygrad, to be checked against the paper. fast/ has those that are marked `@quick` as kernels of its own,
which give the same numbers; they run instead unless PLAIN=1 is set or the folder is not there.
"""
import math
import numpy as np
from tinygrad import Tensor, dtypes, nn
from tinygrad.dtype import DType
try: from fast import quick, setup
except ImportError: quick, setup = (lambda f: f), (lambda: None)

# *** the network ***

class UNet:
  """ε_θ(x_t, t), Appendix B: x_t (B,C,H,W), t (B,) int32 in 1..T -> as x_t. The defaults are CIFAR-10's network.

  channels, channel_mult: of the first level, and each level's multiple of it; each has half the size of the one before
  num_res_blocks: residual blocks at each level, one more on the way up
  attn_resolutions: image sizes at which self-attention follows each of them
  dropout: probability inside the residual blocks; norm_groups: groups of GroupNorm
  num_classes: 0 for no labels (the paper); else y (B,) in 0..num_classes, the last for "no class" (not in the paper)
  seed: of the initial weights. Raises ValueError, in one sentence, for sizes that do not fit each other.
  """
  def __init__(self, in_channels:int=3, channels:int=128, channel_mult:tuple[int, ...]=(1, 2, 2, 2),
               num_res_blocks:int=2, attn_resolutions:tuple[int, ...]=(16,), dropout:float=0.1, image_size:int=32,
               norm_groups:int=32, num_classes:int=0, seed:int=0):
    self.config, self.dtype = {k: v for k, v in locals().items() if k != "self"}, dtypes.float32
    check(self.config)
    setup()
    rng, emb = np.random.default_rng([seed, *b"weights"]), 4*channels
    def level(c:int, o:int, size:int) -> list:
      block = ResBlock(rng, c, o, emb, norm_groups, dropout)
      return [block, Attention(rng, o, norm_groups)] if size in attn_resolutions else [block]

    self.time1, self.time2 = Dense(rng, channels, emb), Dense(rng, emb, emb)
    if num_classes: self.label = fan_average(rng, num_classes+1, emb)
    self.conv_in = Conv(rng, in_channels, channels)
    c, size, skips, self.down, self.up = channels, image_size, [channels], [], []
    for i, m in enumerate(channel_mult):
      for _ in range(num_res_blocks):
        self.down.append(level(c, c := channels*m, size))
        skips.append(c)
      if i < len(channel_mult)-1:
        self.down.append([Downsample(rng, c, c)])
        skips.append(c)
        size //= 2
    self.mid = [*level(c, c, 0), Attention(rng, c, norm_groups), *level(c, c, 0)]
    for i, m in reversed(list(enumerate(channel_mult))):
      for _ in range(num_res_blocks+1): self.up.append(level(c+skips.pop(), c := channels*m, size))
      if i > 0:
        self.up[-1].append(Upsample(rng, c, c))
        size *= 2
    self.norm_out, self.conv_out = GroupNorm(c, norm_groups), Conv(rng, c, in_channels, scale=1e-10)
    Tensor.realize(*nn.state.get_parameters(self))

  def embed(self, t:Tensor, y:Tensor|None=None) -> Tensor:
    """The time as sines and cosines of (t−1) · 10000^(−i/(half−1)), then two linear layers: (B, 4·channels)."""
    half, null = self.config["channels"]//2, self.config["num_classes"]
    freq = Tensor(np.exp(-math.log(10000) * np.arange(half) / (half-1)).astype(np.float32), device=t.device)
    angle = (t-1).cast(dtypes.float32).reshape(-1, 1) * freq  # t−1: the authors count time from 0
    emb = self.time2(self.time1(angle.sin().cat(angle.cos(), dim=1)).silu())
    if null:  # not in the paper
      emb = emb + (t*0 + null if y is None else y).one_hot(null+1).float() @ self.label.float()
    return emb.silu().contiguous()

  def __call__(self, x:Tensor, t:Tensor, y:Tensor|None=None, seed:Tensor|None=None) -> Tensor:
    """Dropout is on when seeds for it are given, uint32 (B,): what is dropped of an image depends on its seed alone.

    Activations and the operands of products are in self.dtype; sums, softmax and GroupNorm in float32 in any case."""
    x = x.permute(0, 2, 3, 1)
    emb, h = self.embed(t, y).cast(self.dtype), self.conv_in(x.cast(self.dtype))
    skips = [h]
    for layers in self.down:
      for layer in layers: h, seed = layer(h, emb, seed), following(seed)
      skips.append(h)
    for layer in self.mid: h, seed = layer(h, emb, seed), following(seed)
    for layers in self.up:
      h = h.cat(skips.pop(), dim=-1).contiguous()
      for layer in layers: h, seed = layer(h, emb, seed), following(seed)
    return self.conv_out(self.norm_out(h)).permute(0, 3, 1, 2).float()

DTYPES = {"float32": dtypes.float32, "bfloat16": dtypes.bfloat16, "float16": dtypes.float16}

def lower(model:UNet, dtype:DType) -> UNet:
  """The model with activations and the operands of products in `dtype`, its answers in float32 (not in the paper)."""
  if dtype == dtypes.float32: return model
  model.dtype = dtype
  for p in nn.state.get_parameters(model):
    if p.ndim > 1: p.replace(p.cast(dtype).realize())  # scales, shifts and biases stay as they are
  return model

# *** its layers: those of a level are called with (x, emb, seed), of which all but ResBlock need x alone ***

class ResBlock:
  """GroupNorm, SiLU, convolution; the time's projection added; GroupNorm, SiLU, dropout, convolution; x added."""
  def __init__(self, rng:np.random.Generator, c:int, o:int, emb:int, groups:int, dropout:float):
    self.norm1, self.conv1, self.temb = GroupNorm(c, groups), Conv(rng, c, o), Dense(rng, emb, o)
    self.norm2, self.conv2, self.dropout = GroupNorm(o, groups), Conv(rng, o, o, scale=1e-10), dropout
    if c != o: self.shortcut = Conv(rng, c, o, k=1)

  def __call__(self, x:Tensor, emb:Tensor, seed:Tensor|None) -> Tensor:
    x = x.contiguous_backward()
    h = self.conv1(self.norm1(x), self.temb(emb).reshape(x.shape[0], 1, 1, -1))
    h = self.norm2(h)
    if seed is not None and self.dropout: h = dropout(h, self.dropout, seed)
    return self.conv2(h, self.shortcut(x) if hasattr(self, "shortcut") else x)

class Attention:
  """Single-head self-attention over the H·W positions: x + out(softmax(q kᵀ / √C) v)."""
  def __init__(self, rng:np.random.Generator, c:int, groups:int):
    self.norm, self.q, self.k, self.v = GroupNorm(c, groups), *(Conv(rng, c, c, k=1) for _ in "qkv")
    self.out = Conv(rng, c, c, k=1, scale=1e-10)

  def __call__(self, x:Tensor, *_) -> Tensor:
    x, (B, H, W, C) = x.contiguous_backward(), x.shape
    h = self.norm(x, silu=False)
    q, k, v = [f(h).reshape(B, H*W, C) for f in (self.q, self.k, self.v)]
    return self.out(attention(q, k, v).reshape(B, H, W, C), x)

class Dense:
  """x (B,C) -> x w + b (B,O)."""
  def __init__(self, rng:np.random.Generator, c:int, o:int):
    self.weight, self.bias = fan_average(rng, c, o), Tensor(np.zeros(o, np.float32))
  def __call__(self, x:Tensor) -> Tensor: return linear(x, self.weight, self.bias)

class Conv:
  """A k x k convolution, x (B,H,W,C) -> (B,H,W,O), to which its bias and each of `adds` are added."""
  def __init__(self, rng:np.random.Generator, c:int, o:int, k:int=3, scale:float=1.):
    self.weight, self.bias = fan_average(rng, k, k, c, o, scale=scale), Tensor(np.zeros(o, np.float32))
  def __call__(self, x:Tensor, *adds:Tensor) -> Tensor:
    return convolve(x, self.weight, self.bias.reshape(1, 1, 1, -1), *adds)

class Downsample(Conv):
  """A 3x3 convolution with stride 2: (B,H,W,C) -> (B,H/2,W/2,C)."""
  def __call__(self, x:Tensor, *_) -> Tensor: return convolve(x, self.weight, self.bias.reshape(1, 1, 1, -1), stride=2)

class Upsample(Conv):
  """Each pixel twice in both directions, then a 3x3 convolution: (B,H,W,C) -> (B,2H,2W,C)."""
  def __call__(self, x:Tensor, *_) -> Tensor: return super().__call__(upsample(x))

class GroupNorm:
  """`group_norm` with a scale (weight) and a shift (bias) for each channel."""
  def __init__(self, c:int, groups:int):
    self.weight, self.bias, self.groups = Tensor(np.ones(c, np.float32)), Tensor(np.zeros(c, np.float32)), groups
  def __call__(self, x:Tensor, silu:bool=True) -> Tensor:
    return group_norm(x, self.weight, self.bias, self.groups, silu)

def fan_average(rng:np.random.Generator, *shape:int, scale:float=1.) -> Tensor:
  """The authors' initialisation: uniform with variance scale · 2/(fan_in + fan_out); the last axes are (C,O)."""
  fans = math.prod(shape[:-1]) + math.prod(shape[:-2])*shape[-1]
  limit = math.sqrt(6 * scale / fans)
  return Tensor(rng.uniform(-limit, limit, shape).astype(np.float32))

# *** their operations ***

@quick
def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
  """x w + b: x (B,C), w (C,O), b (O,)."""
  return (x @ w.cast(x.dtype) + b).cast(x.dtype)

@quick
def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1) -> Tensor:
  """y[b,h,v,o] = Σ_ijc x[b, s·h+i, s·v+j, c] w[i,j,c,o] + Σ adds: x (B,H,W,C), w (k,k,C,O); adds broadcast.

  Zeros around x keep the size at stride 1; stride 2 halves it, with zeros at the right and the bottom alone."""
  lo, hi = (w.shape[0]//2, w.shape[0]//2) if stride == 1 else (0, 1)
  x = x.pad((None, (lo, hi), (lo, hi), None)).contiguous()  # or what makes x is made anew for every tap
  y = x.permute(0, 3, 1, 2).conv2d(w.cast(x.dtype).permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)
  return sum(adds, start=y).cast(x.dtype)

@quick
def group_norm(x:Tensor, weight:Tensor, bias:Tensor, groups:int, silu:bool=True) -> Tensor:
  """z = (x − μ)/√(σ² + 10⁻⁶) · weight + bias, μ and σ² of a group of C/groups channels; then SiLU, z · sigmoid(z)."""
  d = x.float().reshape(x.shape[0], -1, groups, x.shape[3]//groups)
  d = (d - d.mean((1, 3), keepdim=True)).contiguous()
  z = (d * (d.square().mean((1, 3), keepdim=True) + 1e-6).rsqrt()).reshape(x.shape) * weight + bias
  return (z.silu() if silu else z).cast(x.dtype)

@quick
def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  """softmax(q kᵀ / √C) v: each (B,N,C)."""
  s = q.matmul(k.transpose(1, 2), dtype=dtypes.float32) / math.sqrt(q.shape[2])
  return s.softmax(-1).cast(q.dtype).contiguous() @ v

def upsample(x:Tensor) -> Tensor:
  """Each pixel twice in both directions: (B,H,W,C) -> (B,2H,2W,C)."""
  B, H, W, C = x.shape
  return x.reshape(B, H, 1, W, 1, C).expand(B, H, 2, W, 2, C).reshape(B, 2*H, 2*W, C)

def following(seed:Tensor|None) -> Tensor|None:
  """The next layer's seed: each drops other numbers. Made by itself, or each layer's kernel would be another one."""
  return None if seed is None else (seed + 1).contiguous()

def dropout(x:Tensor, p:float, seed:Tensor) -> Tensor:
  """x with numbers zeroed with probability p, where a hash of seed and place is small, the others divided by 1−p."""
  place = Tensor.arange(x[0].numel(), dtype=dtypes.uint32).to(seed.device)
  h = place * 0x9E3779B1 ^ (seed.reshape(-1, 1) * 0x85EBCA77)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)): h = (h ^ (h >> shift)) * factor
  return (h >= int(p * 2**32)).reshape(x.shape).where(x, 0) / (1-p)

def check(c:dict):
  """ValueError, in one sentence, for arguments of UNet that do not fit each other."""
  channels, groups, size, halvings = c["channels"], c["norm_groups"], c["image_size"], len(c["channel_mult"])-1
  sizes = (c["in_channels"], channels, c["num_res_blocks"], size, groups, *c["channel_mult"])
  if min(sizes) < 1 or c["num_classes"] < 0 or halvings < 0:
    raise ValueError("every size of the network must be 1 or more")
  if size % 2**halvings:
    raise ValueError(f"images of {size}x{size} do not divide by 2 for each of {halvings} levels: "
                     f"crop or pad them to a multiple of {2**halvings}, or take fewer levels (channel_mult)")
  if channels % groups: raise ValueError(f"{channels} channels do not divide into {groups} groups (norm_groups)")
  if channels % 2 or channels < 4:
    raise ValueError(f"channels must be even and at least 4, not {channels}: half of the embedding are sines")
  if not 0 <= c["dropout"] < 1: raise ValueError(f"dropout must be from 0 up to below 1, not {c['dropout']}")

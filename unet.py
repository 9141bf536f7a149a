"""The network of DDPM, Appendix B: a U-Net that sees the noisy image x_t and the time t.

Inside, images are channels last, x (B,H,W,C), and a k x k convolution has weights (k,k,C,O). All is
plain tinygrad, to be checked against the paper. In captured (JIT-compiled) steps fast/ replaces
what is marked `@quick` by something quicker, equal up to rounding, unless PLAIN=1."""
import functools, math
import numpy as np
from tinygrad import Context, Tensor, dtypes, nn
from tinygrad.dtype import DType
try: from fast import quick, realize
except ImportError: quick, realize = lambda f: f, lambda weights: Tensor.realize(*weights)
Rng = np.random.Generator
class UNet:
  """ε_θ(x_t, t), Appendix B: x_t (B,C,H,W), t (B,) int32 in 1..T -> as x_t. Defaults: CIFAR-10's.

  channels, channel_mult: level i has channels · channel_mult[i] channels, at 1/2^i of the size
  num_res_blocks: per level on the way down; one more on the way up. norm_groups: of GroupNorm
  attn_resolutions: levels whose larger side is one of these have self-attention (the middle always)
  dropout: a probability. image_size: one int, or (height, width). seed: of the initial weights
  num_classes (not in the paper): labels y (B,) are 0..num_classes, the last is "no class"; 0: none
  out_channels (not in the paper): of the output, if not in_channels, as for a learned variance
  head_channels (not in the paper): of each head of self-attention; 0: a single head
  norm_eps (not in the paper): what GroupNorm adds to a variance
  down_pad (not in the paper): where a convolution of stride 2 pads with zeros: 0: right and bottom
    (the authors'); 1: left and top (what PyTorch's padding=1 amounts to for even sizes)
  freq_shift (not in the paper): frequencies 10000^(−i/(half − freq_shift)); the authors' is 1
  ValueError for sizes that do not fit each other."""
  def __init__(self, in_channels:int=3, channels:int=128, channel_mult:tuple[int, ...]=(1, 2, 2, 2),
               num_res_blocks:int=2, attn_resolutions:tuple[int, ...]=(16,), dropout:float=0.1,
               image_size:int|tuple[int, int]=32, norm_groups:int=32, num_classes:int=0, seed:int=0,
               out_channels:int|None=None, head_channels:int=0, norm_eps:float=1e-6, down_pad:int=0,
               freq_shift:float=1):
    self.config = {k: v for k, v in dict(locals()).items() if k != "self"}  # all of the arguments
    check(self.config)
    rng, emb, self.dtype = np.random.default_rng([seed, *b"weights"]), 4*channels, dtypes.float32
    norm = functools.partial(GroupNorm, groups=norm_groups, eps=norm_eps)
    def block(c:int, o:int) -> object: return ResBlock(rng, c, o, emb, norm, dropout)
    def attend(c:int) -> object: return Attention(rng, c, norm, head_channels)
    self.time1, self.time2 = Dense(rng, channels, emb), Dense(rng, emb, emb)
    if num_classes: self.label = fan_average(rng, num_classes+1, emb)
    self.conv_in = Conv(rng, in_channels, channels)
    c, size, skips, self.down, self.up = channels, int(np.max(image_size)), [channels], [], []
    for i, m in enumerate(channel_mult):
      for _ in range(num_res_blocks):
        self.down.append([block(c, channels*m)])
        c = channels*m
        if size >> i in attn_resolutions: self.down[-1].append(attend(c))
        skips.append(c)
      if i < len(channel_mult)-1:
        self.down.append([Conv(rng, c, c, stride=2, pad=down_pad)])
        skips.append(c)
    self.mid = [block(c, c), attend(c), block(c, c)]
    for i, m in reversed(list(enumerate(channel_mult))):
      for _ in range(num_res_blocks+1):
        self.up.append([block(c+skips.pop(), channels*m)])
        c = channels*m
        if size >> i in attn_resolutions: self.up[-1].append(attend(c))
      if i > 0: self.up[-1].append(Upsample(rng, c, c))
    self.norm_out, self.conv_out = norm(c), Conv(rng, c, out_channels or in_channels, scale=1e-10)
    realize(nn.state.get_parameters(self))

  def embed(self, t:Tensor, y:Tensor|None=None) -> Tensor:
    """Sines and cosines of (t−1) · frequency (the authors count from 0), through two layers."""
    half, null = self.config["channels"]//2, self.config["num_classes"]
    angle = (t.float() - 1).reshape(-1, 1) * frequencies(half, self.config["freq_shift"], t.device)
    emb = self.time2(self.time1(angle.sin().cat(angle.cos(), dim=1)).silu())
    if null:  # not in the paper: plus row y of a table, as a product
      if y is None: y = t.full_like(null)
      emb = emb + y.one_hot(null+1).float() @ self.label.float()
    return emb.silu().contiguous()

  def __call__(self, x:Tensor, t:Tensor|int, y:Tensor|None=None, seed:Tensor|None=None) -> Tensor:
    """Dropout is on if `seed` is given, uint32 (B,): what an image drops depends on its seed alone.
    Activations and operands of products are in self.dtype; sums, softmax, GroupNorm in float32."""
    if not isinstance(t, Tensor): t = x[:, 0, 0, 0].full_like(int(t), dtype=dtypes.int32)
    emb = self.embed(t, y).cast(self.dtype)
    def through(layers:list, h:Tensor) -> Tensor:
      nonlocal seed
      for layer in layers:
        h = layer(h, emb, seed)
        if seed is not None: seed = (seed + 1).contiguous()  # so that all layers share one kernel
      return h
    skips = [self.conv_in(x.permute(0, 2, 3, 1).cast(self.dtype))]
    for layers in self.down: skips.append(through(layers, skips[-1]))
    h = through(self.mid, skips[-1])
    for layers in self.up: h = through(layers, h.cat(skips.pop(), dim=-1).contiguous())
    return self.conv_out(self.norm_out.silu(h)).permute(0, 3, 1, 2).float()

DTYPES = {"float32": dtypes.float32, "bfloat16": dtypes.bfloat16, "float16": dtypes.float16}
def lower(model:UNet, dtype:DType) -> UNet:
  """Changes the model to compute with activations and operands in `dtype` (not in the paper)."""
  model.dtype = dtype
  for p in nn.state.get_parameters(model):  # but scales, shifts and biases stay as they are
    if p.ndim > 1 and p.dtype != dtype: p.replace(p.cast(dtype).realize())
  return model

# *** its layers: each is called with (x, emb, seed), and all but ResBlock need x alone ***

class ResBlock:
  """GroupNorm, SiLU, convolution, plus the time; GroupNorm, SiLU, dropout, convolution, plus x."""
  def __init__(self, rng:Rng, c:int, o:int, emb:int, norm:functools.partial, dropout:float):
    self.norm1, self.conv1, self.temb = norm(c), Conv(rng, c, o), Dense(rng, emb, o)
    self.norm2, self.conv2, self.dropout = norm(o), Conv(rng, o, o, scale=1e-10), dropout
    if c != o: self.shortcut = Conv(rng, c, o, k=1)
  def __call__(self, x:Tensor, emb:Tensor, seed:Tensor|None) -> Tensor:
    x = x.contiguous_backward()
    h = self.conv1(self.norm1.silu(x), add=self.temb(emb).reshape(x.shape[0], 1, 1, -1))
    h = self.norm2.silu(h)
    if seed is not None and self.dropout: h = dropout(h, self.dropout, seed)
    skip = self.shortcut(x) if hasattr(self, "shortcut") else x
    return self.conv2(h, add=skip)

class Attention:
  """x + out(softmax(q kᵀ/√C) v) over the H·W positions; q, k, v of GroupNorm(x), C of each head."""
  def __init__(self, rng:Rng, c:int, norm:functools.partial, head_channels:int=0):
    if c % (head_channels or c): raise ValueError(f"{c} channels do not divide by head_channels")
    self.norm, self.heads = norm(c), c // (head_channels or c)
    self.q, self.k, self.v = Conv(rng, c, c, k=1), Conv(rng, c, c, k=1), Conv(rng, c, c, k=1)
    self.out = Conv(rng, c, c, k=1, scale=1e-10)
  def __call__(self, x:Tensor, *_) -> Tensor:
    x, n, (B, H, W, C) = x.contiguous_backward(), self.heads, x.shape
    def split(h:Tensor) -> Tensor:  # each head sees its own channels, as if it were an image
      if n == 1: return h.reshape(B, H*W, C)
      return h.reshape(B, H*W, n, C//n).transpose(1, 2).reshape(B*n, H*W, C//n)
    h = self.norm(x)
    h = attention(split(self.q(h)), split(self.k(h)), split(self.v(h)))
    if n > 1: h = h.reshape(B, n, H*W, C//n).transpose(1, 2)
    return self.out(h.reshape(B, H, W, C), add=x)  # x + out(h)

class Dense:
  """x (B,C) -> x w + b (B,O)."""
  def __init__(self, rng:Rng, c:int, o:int):
    self.weight, self.bias = fan_average(rng, c, o), Tensor(np.zeros(o, np.float32))
  def __call__(self, x:Tensor) -> Tensor: return linear(x, self.weight, self.bias)
class Conv:
  """A k x k convolution of x (B,H,W,C), plus its bias, plus `add`; stride 2 halves H and W."""
  def __init__(self, rng:Rng, c:int, o:int, k:int=3, scale:float=1., **how:int):
    self.weight, self.how = fan_average(rng, k, k, c, o, scale=scale), how
    self.bias = Tensor(np.zeros(o, np.float32))
  def __call__(self, x:Tensor, *_, add:Tensor|None=None) -> Tensor:
    adds = [self.bias.reshape(1, 1, 1, -1)] + [add]*(add is not None)
    return convolve(x, self.weight, *adds, **self.how)
class Upsample(Conv):
  """Each pixel twice in both directions, then a 3x3 convolution: (B,H,W,C) -> (B,2H,2W,C)."""
  def __call__(self, x:Tensor, *_, add:Tensor|None=None) -> Tensor:
    B, H, W, C = x.shape
    x = x.reshape(B, H, 1, W, 1, C).expand(B, H, 2, W, 2, C).reshape(B, 2*H, 2*W, C)
    return super().__call__(x, add=add)
class GroupNorm:
  """`group_norm` with a scale (weight) and a shift (bias) of each channel, without or with SiLU."""
  def __init__(self, c:int, groups:int, eps:float):
    self.weight, self.bias = Tensor(np.ones(c, np.float32)), Tensor(np.zeros(c, np.float32))
    self.norm = functools.partial(group_norm, groups=groups, eps=eps)
  def __call__(self, x:Tensor) -> Tensor: return self.norm(x, self.weight, self.bias)
  def silu(self, x:Tensor) -> Tensor: return self.norm(x, self.weight, self.bias, silu=True)
def fan_average(rng:Rng, *shape:int, scale:float=1.) -> Tensor:
  """The authors' initialisation: uniform, of variance scale · 2/(fan_in + fan_out)."""
  limit = math.sqrt(6*scale / (math.prod(shape[:-1]) + math.prod(shape[:-2])*shape[-1]))
  return Tensor(rng.uniform(-limit, limit, shape).astype(np.float32))

@quick
def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
  """x w + b: x (B,C), w (C,O), b (O,)."""
  return (x @ w.cast(x.dtype) + b).cast(x.dtype)
@quick
def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, pad:int=0) -> Tensor:
  """y[b,h,v,o] = Σ_ijc x[b, s·h+i, s·v+j, c] w[i,j,c,o] + Σ adds, x padded: (B,H,W,C), w (k,k,C,O).
  The zeros: on all sides at stride 1; at stride 2 right and bottom or, pad=1, left and top."""
  lo, hi = (w.shape[0]//2, w.shape[0]//2) if stride == 1 else (pad, 1-pad)
  x = x.pad((None, (lo, hi), (lo, hi), None)).contiguous()  # made once, not for each of k² taps
  y = x.permute(0, 3, 1, 2).conv2d(w.cast(x.dtype).permute(3, 2, 0, 1), stride=stride)
  return sum(adds, start=y.permute(0, 2, 3, 1)).cast(x.dtype)
@quick
def group_norm(x:Tensor, w:Tensor, b:Tensor, groups:int, eps:float=1e-6, silu:bool=False) -> Tensor:
  """z = (x − μ)/√(σ² + eps) · w + b, μ and σ² of a group of channels; and SiLU, z · sigmoid(z)."""
  d = x.float().reshape(x.shape[0], -1, groups, x.shape[3]//groups)
  d = (d - d.mean((1, 3), keepdim=True)).contiguous()
  z = (d * (d.square().mean((1, 3), keepdim=True) + eps).rsqrt()).reshape(x.shape) * w + b
  return (z.silu() if silu else z).cast(x.dtype)
@quick
def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  """softmax(q kᵀ / √C) v: each (B,N,C)."""
  s = q.matmul(k.transpose(1, 2), dtype=dtypes.float32) / math.sqrt(q.shape[2])
  return s.softmax(-1).cast(q.dtype).contiguous() @ v
@functools.cache
def frequencies(half:int, shift:float, device:str|tuple[str, ...]) -> Tensor:
  """10000^(−i/(half − shift)), i = 0 .. half−1: made once, and not again by each captured step."""
  values = np.exp(-math.log(10000) * np.arange(half) / (half-shift)).astype(np.float32)
  with Context(CAPTURING=0): return Tensor(values, device=device).realize()
def dropout(x:Tensor, p:float, seed:Tensor) -> Tensor:
  """x/(1−p), but 0 with probability p: where a hash of the image's seed and the place is small."""
  place = Tensor.arange(x[0].numel()).cast(dtypes.uint32).to(seed.device)
  h = place * 0x9E3779B1 ^ (seed.reshape(-1, 1) * 0x85EBCA77)
  for n, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)): h = (h ^ (h >> n)) * factor
  return (h >= int(p * 2**32)).reshape(x.shape).where(x, 0) / (1-p)

def check(c:dict):
  """ValueError, in one sentence, for arguments of UNet that do not fit each other."""
  channels, mult, groups = c["channels"], c["channel_mult"], c["norm_groups"]
  (H, W), part, head = np.broadcast_to(c["image_size"], 2), 2**len(mult)//2, c["head_channels"]
  sizes = (c["in_channels"], c["out_channels"] or 1, c["num_res_blocks"], H, W, channels, groups)
  sizes = np.array([*sizes, *mult, c["num_classes"]+1, head+1])
  if not mult or sizes.dtype.kind not in "iu" or sizes.min() < 1:
    raise ValueError("every size of the network must be a whole number, 1 or more")
  if H % part or W % part:
    raise ValueError(f"images of {H}x{W} do not divide by {part}: crop, pad or take fewer levels")
  if channels % 2 or channels < 4 or channels % groups:
    raise ValueError("channels must be even, 4 or more, and divide into norm_groups")
  if not 0 <= c["dropout"] < 1 or c["norm_eps"] <= 0 or c["down_pad"] not in (0, 1):
    raise ValueError("dropout must be from 0 up to below 1, norm_eps above 0, and down_pad 0 or 1")

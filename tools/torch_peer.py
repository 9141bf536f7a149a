"""The same network in PyTorch, and the speed of the same training step and sampling step with it: what to compare
tools/bench.py with. Each step is measured in both layouts of memory, contiguous and channels_last, and the better one
counts. Nothing else of the project is used here, and nothing of the project needs it.

  python -m tools.torch_peer --dtype bfloat16 --compile
"""
import argparse, json, math, statistics, sys, time
from collections.abc import Callable
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# *** the network: names and order of the parameters are unet.py's ***

class ResBlock(nn.Module):
  def __init__(self, c:int, o:int, emb:int, groups:int, dropout:float):
    super().__init__()
    self.norm1, self.conv1 = nn.GroupNorm(groups, c, 1e-6), nn.Conv2d(c, o, 3, padding=1)
    self.temb = nn.Linear(emb, o)
    self.norm2, self.conv2, self.dropout = nn.GroupNorm(groups, o, 1e-6), nn.Conv2d(o, o, 3, padding=1), dropout
    self.shortcut = nn.Conv2d(c, o, 1) if c != o else nn.Identity()
  def forward(self, x:Tensor, emb:Tensor) -> Tensor:
    h = self.conv1(F.silu(self.norm1(x))) + self.temb(emb)[:, :, None, None]
    return self.conv2(F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)) + self.shortcut(x)

class Attention(nn.Module):
  def __init__(self, c:int, groups:int):
    super().__init__()
    self.norm, self.q, self.k, self.v, self.out = nn.GroupNorm(groups, c, 1e-6), *(nn.Conv2d(c, c, 1) for _ in range(4))
  def forward(self, x:Tensor, emb:Tensor) -> Tensor:
    B, C, H, W = x.shape
    h = self.norm(x)
    q, k, v = [f(h).permute(0, 2, 3, 1).reshape(B, 1, H*W, C) for f in (self.q, self.k, self.v)]
    return x + self.out(F.scaled_dot_product_attention(q, k, v).reshape(B, H, W, C).permute(0, 3, 1, 2))

class Downsample(nn.Conv2d):
  def forward(self, x:Tensor, emb:Tensor) -> Tensor: return super().forward(F.pad(x, (0, 1, 0, 1)))

class Upsample(nn.Conv2d):
  def forward(self, x:Tensor, emb:Tensor) -> Tensor: return super().forward(F.interpolate(x, scale_factor=2.))

PAPER = dict(out_channels=None, head_channels=0, norm_eps=1e-6, down_pad=0, freq_shift=1)

class UNet(nn.Module):
  """x (B,C,H,W), t (B,) in 1..T -> as x. The arguments are unet.py's, without labels; `others` must be the paper's."""
  def __init__(self, in_channels:int=3, channels:int=128, channel_mult:tuple[int, ...]=(1, 2, 2, 2),
               num_res_blocks:int=2, attn_resolutions:tuple[int, ...]=(16,), dropout:float=0.1, image_size:int=32,
               norm_groups:int=32, num_classes:int=0, seed:int=0, **others):
    super().__init__()
    if PAPER | others != PAPER or num_classes: raise ValueError("the peer knows the paper's network alone")
    emb, c, size, skips = 4*channels, channels, image_size, [channels]
    def level(c:int, o:int, size:int) -> list[nn.Module]:
      block = ResBlock(c, o, emb, norm_groups, dropout)
      return [block, Attention(o, norm_groups)] if size in attn_resolutions else [block]
    self.time1, self.time2 = nn.Linear(channels, emb), nn.Linear(emb, emb)
    self.conv_in, down, up = nn.Conv2d(in_channels, c, 3, padding=1), [], []
    for i, m in enumerate(channel_mult):
      for _ in range(num_res_blocks):
        down.append(level(c, c := channels*m, size))
        skips.append(c)
      if i < len(channel_mult)-1:
        down.append([Downsample(c, c, 3, stride=2)])
        skips.append(c)
        size //= 2
    mid = [*level(c, c, 0), Attention(c, norm_groups), *level(c, c, 0)]
    for i, m in reversed(list(enumerate(channel_mult))):
      for _ in range(num_res_blocks+1): up.append(level(c+skips.pop(), c := channels*m, size))
      if i > 0:
        up[-1].append(Upsample(c, c, 3, padding=1))
        size *= 2
    self.down, self.up = (nn.ModuleList(map(nn.ModuleList, levels)) for levels in (down, up))
    self.mid = nn.ModuleList(mid)
    self.norm_out, self.conv_out = nn.GroupNorm(norm_groups, c, 1e-6), nn.Conv2d(c, in_channels, 3, padding=1)
    self.register_buffer("freq", torch.exp(-math.log(10000) * torch.arange(channels//2) / (channels//2-1)), False)
  def forward(self, x:Tensor, t:Tensor) -> Tensor:
    angle = (t-1).float()[:, None] * self.freq
    emb = F.silu(self.time2(F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], 1)))))
    h = self.conv_in(x)
    skips = [h]
    for layers in self.down:
      for layer in layers: h = layer(h, emb)
      skips.append(h)
    for layer in self.mid: h = layer(h, emb)
    for layers in self.up:
      h = torch.cat([h, skips.pop()], 1)
      for layer in layers: h = layer(h, emb)
    return self.conv_out(F.silu(self.norm_out(h)))

# *** the two steps ***

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

def steps(model:nn.Module, shape:tuple[int, ...], device:str, dtype:str, layout:str,
          compiled:bool) -> tuple[Callable, Callable]:
  """(Algorithm 1 with clipping, Adam and EMA; Algorithm 2, line 4): each a function that takes one step."""
  beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
  ab = (1-beta).cumprod(0)
  before = torch.cat([torch.ones(1), ab[:-1]])
  tables = (ab.sqrt(), (1-ab).sqrt(), before.sqrt()*beta/(1-ab), (1-beta).sqrt()*(1-before)/(1-ab), beta.sqrt())
  a, b, c0, c1, sigma = (v.float().to(device)[:, None, None, None] for v in tables)
  low = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
  model.to(device, memory_format=LAYOUTS[layout])
  net, weights = torch.compile(model) if compiled else model, list(model.parameters())
  adam, average = torch.optim.Adam(weights, 2e-4, **{adam_of(device): True}), [p.detach().clone() for p in weights]
  T, x = torch.full(shape[:1], 1000, device=device), torch.randn(shape, device=device)
  x = x.to(memory_format=LAYOUTS[layout])
  images = (x*64 + 128).clamp(0, 255).byte()
  def training():
    model.train()
    t, x0, eps = torch.randint(1, 1001, shape[:1], device=device), images / 127.5 - 1, torch.randn_like(x)
    with low: out = net(a[t-1]*x0 + b[t-1]*eps, t)
    F.mse_loss(out.float(), eps).backward()
    nn.utils.clip_grad_norm_(weights, 1.)
    adam.step()
    adam.zero_grad()
    torch._foreach_lerp_(average, [p.detach() for p in weights], 1e-4)
  @torch.no_grad()
  def sampling() -> Tensor:
    model.eval()
    with low: eps = net(x, T).float()
    x0 = ((x - b[T-1]*eps) / a[T-1]).clamp(-1, 1)
    return c0[T-1]*x0 + c1[T-1]*x + sigma[T-1]*torch.randn_like(x)
  return training, sampling

def adam_of(device:str) -> str:
  """Which of PyTorch's implementations of Adam takes the step."""
  return "fused" if device == "cuda" else "foreach"

def measure(once:Callable, device:str, repeats:int) -> tuple[float, float]:
  """Seconds of the first call, and the median of `repeats` after three more."""
  def timed() -> float:
    start = time.perf_counter()
    once()
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start
  seconds = [timed() for _ in range(4 + repeats)]
  return seconds[0], statistics.median(seconds[4:])

def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--batch", type=int, default=128)
  p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
  p.add_argument("--compile", action="store_true", help="by torch.compile")
  p.add_argument("--repeats", type=int, default=10, help="steps measured; the median counts (10)")
  p.add_argument("--network", type=json.loads, default={}, help="arguments of UNet as JSON (the paper's CIFAR-10)")
  p.add_argument("--parameters", type=int, default=35_746_307, help="how many it must have")
  a = p.parse_args()
  device, cuda = ("cuda", True) if torch.cuda.is_available() else ("cpu", False)
  torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
  shape = (a.batch, a.network.get("in_channels", 3), *[a.network.get("image_size", 32)]*2)
  count = sum(v.numel() for v in UNet(**a.network).parameters())
  if count != a.parameters: sys.exit(f"torch_peer.py: {count:,} parameters are not {a.parameters:,}")
  def both(layout:str) -> list[tuple[float, float]]:
    both_steps = steps(UNet(**a.network), shape, device, a.dtype, layout, a.compile)
    return [measure(once, device, a.repeats) for once in both_steps]
  found = {layout: both(layout) for layout in LAYOUTS}
  layout, sample_layout = [min(LAYOUTS, key=lambda k: found[k][i][1]) for i in range(2)]
  (first, step), (sample_first, sample_step) = found[layout][0], found[sample_layout][1]
  print(json.dumps(dict(
    torch=torch.__version__, device=torch.cuda.get_device_name() if cuda else device, batch=a.batch, dtype=a.dtype,
    compiled=a.compile, adam=adam_of(device), layout=layout, sample_layout=sample_layout, parameters=count,
    first_step_s=first, step_s=step, train_images_per_s=a.batch/step,
    sample_first_step_s=sample_first, sample_step_s=sample_step, sample_images_per_s=a.batch/sample_step,
    peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
    step_s_by_layout={k: training[1] for k, (training, _) in found.items()},
    sample_step_s_by_layout={k: sampling[1] for k, (_, sampling) in found.items()})))

if __name__ == "__main__": main()

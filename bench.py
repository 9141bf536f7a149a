"""The speed of one training step (Algorithm 1) and of one sampling step (Algorithm 2).

python bench.py --preset mnist --batch 32"""
import argparse, json, statistics, sys, time
import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, helpers
from tinygrad.uop.ops import Ops
import train, unet
from ddpm import DDPM

SHAPES = {"glyphs": (1, 16), "mnist": (1, 28), "cifar10": (3, 32)}

def forward_flops(model:unet.UNet, batch:int) -> int:
  """Multiplications and additions of all convolutions and matrix products of one forward pass.

  Counted from their shapes alone."""
  count, convolve = [0], unet.convolve
  def counted(x, w, *adds, stride=1, lo=0, hi=0):
    H, W = [(n+lo+hi-w.shape[-3])//stride+1 for n in x.shape[1:3]]
    count[0] += 2 * x.shape[0]*H*W * w.shape[-3]**2 * w.shape[-2]*w.shape[-1]
    return convolve(x, w, *adds, stride=stride, lo=lo, hi=hi)
  unet.convolve = counted
  try: model(Tensor.empty(batch, model.config["in_channels"], *(model.config["image_size"],)*2),
             Tensor.ones(batch, dtype="int32"))
  finally: unet.convolve = convolve
  return count[0]

def measure(call, jit:TinyJit, repeats:int, desc:str) -> dict:
  """Seconds of the first call and the median of `repeats` later ones; kernels and executed operations of one."""
  def timed() -> float:
    GlobalCounters.reset()
    start = time.perf_counter()
    call()
    Device[Device.DEFAULT].synchronize()
    return time.perf_counter() - start
  print(f"{desc}: compiling ...", file=sys.stderr)
  first = timed()
  timed()
  later = [timed() for _ in helpers.trange(repeats, desc=desc)]
  # a call is one kernel or, where the device runs them in batches, a graph of several
  kernels = sum(len(c.src[0].src[0].src) if c.src[0].op is Ops.CUSTOM_FUNCTION else 1 for c in jit.captured.linear.src)
  return dict(first=first, median=statistics.median(later), fastest=min(later), slowest=max(later),
              kernels=kernels, ops=GlobalCounters.global_ops)

def main(argv:list[str]|None=None):
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  p.add_argument("--preset", choices=SHAPES, default="mnist", help="the network of train.py's preset")
  p.add_argument("--batch", type=int, default=32, help="images per step")
  p.add_argument("--repeats", type=int, default=10, help="steps measured; the median counts")
  p.add_argument("--json", action="store_true", help="end with one line of JSON")
  b = p.parse_args(argv)
  for flag in ("batch", "repeats"):
    if not 1 <= getattr(b, flag) <= 2**20:
      raise ValueError(f"--{flag} {getattr(b, flag)} is out of range: it must lie in 1..{2**20}")
  device, (C, S) = unet.device(), SHAPES[b.preset]
  a = train.arguments(["--dataset", b.preset, "--batch", str(b.batch)])
  config = dict(in_channels=C, channels=a.channels, channel_mult=a.channel_mult, num_res_blocks=a.num_res_blocks,
                attn_resolutions=a.attn, dropout=a.dropout, image_size=S, norm_groups=a.norm_groups,
                num_classes=0, seed=0)
  start = time.perf_counter()
  ddpm, state = DDPM(), train.State(config, (device,))
  setup = time.perf_counter() - start
  rng = np.random.default_rng(0)
  lay = lambda v: state.lay(v).realize()
  images = rng.integers(0, 256, (b.batch, C, S, S), np.uint8)
  step = train.make_step(state, ddpm, a)
  n = [0]
  def train_step():
    n[0] += 1
    x, t, eps, y, seeds = train.draw(a, images, np.zeros(b.batch, np.int32), 0, n[0])
    step(*map(lay, (x, t, eps, y, seeds[0], np.array([0, 1, *train.hyper(a, n[0])], np.float32))))[1].item()
  training = measure(train_step, step, b.repeats, "training step")
  memory = GlobalCounters.mem_used

  def one(x:Tensor, t:Tensor, z:Tensor) -> Tensor: return ddpm.p_sample(state.average, x, t, z).realize()
  jit = TinyJit(one)
  jit.cnt = 1  # see train.make_step
  x, t = lay(rng.standard_normal(images.shape, np.float32)), lay(np.full(b.batch, ddpm.T, np.int32))
  sampling = measure(lambda: jit(x, t, lay(rng.standard_normal(images.shape, np.float32))), jit, b.repeats,
                     "sampling step")

  flops = forward_flops(state.model, b.batch)
  result = dict(
    preset=b.preset, batch=b.batch, device=device, setup_s=setup,
    first_step_s=training["first"], step_s=training["median"],
    step_fastest_s=training["fastest"], step_slowest_s=training["slowest"],
    train_images_per_s=b.batch/training["median"], train_gflops=3*flops/training["median"]/1e9,
    executed_over_needed=training["ops"]/(3*flops), kernels=training["kernels"],
    sample_first_step_s=sampling["first"], sample_step_s=sampling["median"],
    sample_images_per_s=b.batch/sampling["median"], sample_gflops=flops/sampling["median"]/1e9,
    sample_kernels=sampling["kernels"], peak_memory_bytes=max(memory, GlobalCounters.mem_used),
    parameters=state.size, unet=config)
  print(f"{b.preset}: {state.size:,} parameters, batch {b.batch}, on {device}; "
        f"{3*flops/1e9:.1f} GFLOP a training step by the network's shapes\n"
        f"set-up           {setup:8.2f} s\n"
        f"training step    {training['median']*1e3:8.1f} ms   first {training['first']:.1f} s   "
        f"{result['train_images_per_s']:.1f} images/s   {result['train_gflops']:.1f} GFLOP/s   "
        f"{training['kernels']} kernels   executed/needed {result['executed_over_needed']:.2f}\n"
        f"sampling step    {sampling['median']*1e3:8.1f} ms   first {sampling['first']:.1f} s   "
        f"{result['sample_images_per_s']:.1f} images/s   {result['sample_gflops']:.1f} GFLOP/s   "
        f"{sampling['kernels']} kernels\n"
        f"device memory    {result['peak_memory_bytes']/2**20:8.1f} MiB")
  if b.json: print(json.dumps(result))

if __name__ == "__main__":
  try: main()
  except (ValueError, OSError, RuntimeError) as e: sys.exit(f"bench.py: {e}")
  except KeyboardInterrupt: sys.exit(130)

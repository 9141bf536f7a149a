"""The speed of one training step (Algorithm 1) and of one sampling step (Algorithm 2) on the device that is here.

  python -m tools.bench --preset mnist --batch 32
  python -m tools.bench --preset cifar10 --batch 128 --dtype bfloat16 --kernels 10 --json
"""
from __future__ import annotations
import argparse, itertools, json, os, statistics, subprocess, sys, time
from collections.abc import Callable
from unittest import mock
import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, helpers
from tinygrad.engine.realize import estimate_uop, time_call
from tinygrad.uop.ops import Ops, UOp
import sample, train, unet
from ddpm import DDPM
from engine.batches import ahead
from engine.capture import captured, placed
from engine.device import open_device
from engine.state import State
from engine.terminal import number, parser, run
from files.bar import progress

Shape = tuple[int, ...]
Step = Callable[[], list[Callable]]  # takes one step, and returns the captured graphs that it ran

# The networks of train.py's presets, and the published one for images of 256x256: settings, and an image's shape.
NETWORKS:dict[str, tuple[dict, Shape]] = {
  "glyphs": (train.PRESETS["glyphs"], (1, 16, 16)), "mnist": (train.PRESETS["mnist"], (1, 28, 28)),
  "cifar10": (train.PRESETS["cifar10"], (3, 32, 32)),
  "256": (train.PRESETS["cifar10"] | dict(channel_mult=(1, 1, 2, 2, 4, 4), dropout=0.0), (3, 256, 256))}

# *** what is measured or counted: one training step, one sampling step ***

def training_step(state:State, c:train.Config, shape:Shape) -> Step:
  """Algorithm 1, line 5: the gradient of a batch is one graph, the update another. The next one is drawn meanwhile."""
  loss, update = train.make_loss(DDPM(), c), train.make_update(state, c)
  images, labels = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.zeros(shape[0], np.int32)
  drawn = ahead(lambda n: train.draw(c, images, labels, 0, n), itertools.count(1))
  def once() -> list[Callable]:
    n, batch = next(drawn)
    state.gradient(loss, batch)
    update(placed(np.array(train.rates(c, n), np.float32), state.device))
    return [state.graph, update]
  return once

def sampling_step(state:State, c:train.Config, shape:Shape) -> Step:
  """Algorithm 2, line 4; and line 3 of the next step, meanwhile if a card computes this one."""
  ddpm, model, rng = DDPM(), unet.lower(state.average, unet.DTYPES[c.dtype]), np.random.default_rng(0)
  def step(x_t:Tensor, t:Tensor, z:Tensor): return sample.ancestral_move(ddpm, model, x_t, t, z, True)
  graph = captured(step)
  def noise() -> np.ndarray: return rng.standard_normal(shape, np.float32)
  x_T, T = placed(noise(), state.device), placed(np.full(shape[0], ddpm.T, np.int32), state.device)
  drawn = [noise()]
  def once() -> list[Callable]:
    graph(x_T, T, placed(drawn.pop(), state.device))
    drawn.append(noise())
    return [graph]
  return once

def calls(graphs:list[Callable]) -> list[UOp]:
  """The calls of captured graphs in their order; where the device runs them in batches, those inside."""
  whole = [call for graph in graphs for call in graph.jit.captured.linear.src]            # type: ignore[attr-defined]
  return [c for call in whole for c in (call.src[0].src[0].src if call.src[0].op is Ops.CUSTOM_FUNCTION else [call])]

def kernels(graphs:list[Callable]) -> list[UOp]: return [c.src[0] for c in calls(graphs) if c.src[0].op is Ops.PROGRAM]

def source(program:UOp) -> str: return next(u.arg for u in program.src if u.op is Ops.SOURCE)

def forward_flops(model:unet.UNet, shape:Shape) -> int:
  """Multiplications and additions of all products of one forward pass, counted from their shapes alone."""
  count:list = []
  def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1, pad:int=0) -> Tensor:
    B, H, W, _ = x.shape
    count.append(2 * B * (H//stride) * (W//stride) * w.numel())
    return Tensor.empty(B, H//stride, W//stride, w.shape[3], dtype=x.dtype)
  def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
    count.append(2 * x.shape[0] * w.numel())
    return Tensor.empty(x.shape[0], w.shape[1], dtype=x.dtype)
  def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
    count.append(4 * q.shape[0] * q.shape[1]**2 * q.shape[2])
    return q
  with mock.patch.multiple(unet, convolve=convolve, linear=linear, attention=attention):
    model(Tensor.empty(*shape), Tensor.ones(shape[0], dtype="int32"))
  return sum(count)

# *** each kernel by itself ***

PRODUCT = """if True:
  import time, numpy as np
  rates = []
  for n in [256, 512, 1024] * 5:
    a, b = np.ones((2, n, n), np.float32)
    start = time.perf_counter()
    a @ b
    rates.append(2*n**3 / (time.perf_counter() - start))
  print(max(rates) / 1e9)"""

def peak() -> float:
  """GFLOP/s of numpy's product of two matrices on one core."""
  one = {f"{name}_THREADS": "1" for name in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")}
  said = subprocess.run([sys.executable, "-c", PRODUCT], env=os.environ | one, capture_output=True, check=True)
  return float(said.stdout)

def filled(call:UOp) -> UOp:
  """The call with zeros in the place of the step's own inputs."""
  params = [u for s in call.src[1:] for u in s.toposort() if u.op is Ops.PARAM]
  inputs = {u: Tensor.zeros(*u.shape, dtype=u.dtype, device=u.device).clone().realize().uop.base for u in params}
  return call.replace(src=(call.src[0], *(s.substitute(inputs) for s in call.src[1:])))

def slowest(graphs:list[Callable], most:int) -> str:
  """A table of a step's slowest kernels, each waited for, on a CPU on one core: the best of three rounds."""
  made, on_cpu = [c for c in calls(graphs) if c.src[0].op is Ops.PROGRAM], Device.DEFAULT.startswith("CPU")
  timers = [time_call(filled(call)) for call in made]
  seconds = np.min([[next(timer) for timer in timers] for _ in range(3)], axis=0)
  sums:dict[str, np.ndarray] = {}  # of a name: its number, seconds, GFLOP, GB
  for call, s in zip(made, seconds):
    e, name = estimate_uop(call), helpers.ansistrip(call.src[0].arg.name)
    sums[name] = sums.get(name, 0) + np.array([1, s, whole(e.ops)/1e9, whole(e.mem)/1e9])
  ranked = sorted(sums.items(), key=lambda named: -named[1][1])[:most]
  best = peak() if on_cpu else 0.
  lines = [f"a training step's {len(made)} kernels, each by itself: {sum(seconds)*1e3:.1f} ms" +
           f"; a product of matrices by numpy: {best:.0f} GFLOP/s" * on_cpu,
           f"{'':40s} times        ms   share  GFLOP/s     GB/s" + "  of numpy's" * on_cpu]
  for name, (n, s, flop, moved) in ranked:
    lines.append(f"{name[:40]:40s} {n:5.0f} {s*1e3:9.3f} {s/sum(seconds):7.1%} {flop/s:8.0f} {moved/s:8.1f}" +
                 (f" {flop/s/best:11.1%}" if on_cpu else ""))
  return "\n".join(lines)

def whole(v) -> int:
  """An estimate, which is symbolic where a kernel's rounds are shared."""
  return int(getattr(v, "vmax", v))

# *** the command ***

def measure(once:Step, repeats:int, desc:str) -> tuple[dict, list[Callable]]:
  """Seconds of the first call and the median of `repeats` later ones; kernels and executed operations of one."""
  def timed() -> float:
    GlobalCounters.reset()
    start = time.perf_counter()
    once()
    Device[Device.DEFAULT].synchronize()
    return time.perf_counter() - start
  print(f"{desc}: compiling ...", file=sys.stderr)
  first = timed()
  timed()
  later = [timed() for _ in progress(range(repeats), desc, repeats)]
  ops, graphs = GlobalCounters.global_ops, once()
  made = kernels(graphs)
  return dict(first=first, median=statistics.median(later), fastest=min(later), slowest=max(later), ops=ops,
              kernels=len(made), distinct=len(set(map(source, made)))), graphs

def flags(program:str, description:str|None) -> argparse.ArgumentParser:
  """Which step: the flags that bench and target share."""
  p = parser(program, description or "", formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--preset", choices=NETWORKS, default="mnist", help="whose network (mnist); 256: for 256x256 images")
  p.add_argument("--batch", type=number(int, 1, 2**20), default=32, help="images per step (32)")
  p.add_argument("--dtype", choices=unet.DTYPES, default="float32", help="of activations and products (float32)")
  p.add_argument("--tf32", action="store_true", help="NVIDIA: products of float32 in TF32, on tensor cores")
  p.add_argument("--json", action="store_true", help="end with one line of JSON")
  return p

def chosen(b:argparse.Namespace) -> tuple[train.Config, dict, Shape]:
  """What the flags ask for: settings, the network's arguments and the batch's shape. No network has labels."""
  preset, image = NETWORKS[b.preset]
  c = train.Config(**preset | dict(batch=b.batch, dtype=b.dtype, class_conditional=False))
  return c, train.network(c, (b.batch, *image), 0), (b.batch, *image)

def main(argv:list[str]|None=None):
  p = flags("bench.py", __doc__)
  p.add_argument("--repeats", type=number(int, 1, 2**20), default=10, help="steps measured; the median counts (10)")
  p.add_argument("--kernels", type=number(int, 0, 10**6), default=0, help="also so many of the slowest kernels (0)")
  b = p.parse_args(argv)
  (c, config, shape), device = chosen(b), open_device(b.tf32)
  start = time.perf_counter()
  state = State(unet.UNet(**config), unet.DTYPES[b.dtype])
  setup = time.perf_counter() - start
  training, graphs = measure(training_step(state, c, shape), b.repeats, "training step")
  memory = GlobalCounters.mem_used
  sampling, _ = measure(sampling_step(state, c, shape), b.repeats, "sampling step")
  flops = forward_flops(state.average, shape)
  result = dict(
    preset=b.preset, batch=b.batch, dtype=b.dtype, device=device, setup_s=setup,
    first_step_s=training["first"], step_s=training["median"],
    step_fastest_s=training["fastest"], step_slowest_s=training["slowest"],
    train_images_per_s=b.batch/training["median"], train_gflops=3*flops/training["median"]/1e9,
    executed_over_needed=training["ops"]/(3*flops), kernels=training["kernels"], distinct_kernels=training["distinct"],
    sample_first_step_s=sampling["first"], sample_step_s=sampling["median"],
    sample_images_per_s=b.batch/sampling["median"], sample_gflops=flops/sampling["median"]/1e9,
    sample_kernels=sampling["kernels"], peak_memory_bytes=max(memory, GlobalCounters.mem_used),
    parameters=state.size, unet=config)
  print(f"{b.preset}: {state.size:,} parameters, batch {b.batch}, {b.dtype}, on {device}; "
        f"{3*flops/1e9:.1f} GFLOP a training step by the network's shapes\n"
        f"set-up           {setup:8.2f} s\n"
        f"training step    {training['median']*1e3:8.1f} ms   first {training['first']:.1f} s   "
        f"{result['train_images_per_s']:.1f} images/s   {result['train_gflops']:.1f} GFLOP/s   "
        f"{training['kernels']} kernels, {training['distinct']} distinct   "
        f"executed/needed {result['executed_over_needed']:.2f}\n"
        f"sampling step    {sampling['median']*1e3:8.1f} ms   first {sampling['first']:.1f} s   "
        f"{result['sample_images_per_s']:.1f} images/s   {result['sample_gflops']:.1f} GFLOP/s   "
        f"{sampling['kernels']} kernels\n"
        f"device memory    {result['peak_memory_bytes']/2**20:8.1f} MiB")
  if b.kernels: print(slowest(graphs, b.kernels))
  if b.json: print(json.dumps(result))

if __name__ == "__main__": run(main)

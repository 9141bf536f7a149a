"""The speed of one training step (Algorithm 1) and of one sampling step (Algorithm 2), on the device that is here; or,
with --target, what both would be on a card that is not: compiled whole, counted, and nothing executed.

  python bench.py --preset mnist --batch 32
  python bench.py --preset cifar10 --batch 128 --dtype bfloat16 --target CUDA:sm_90 --json
"""
from __future__ import annotations
import argparse, concurrent.futures, contextlib, dataclasses, importlib.util, io, json, os, re, statistics, subprocess
import sys, tempfile, time
from collections.abc import Callable
from pathlib import Path
import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, helpers
from tinygrad.uop.ops import Ops, UOp
import train, unet
from ddpm import DDPM
from engine.capture import captured, placed
from engine.device import open_device
from engine.terminal import number, run

# The networks of train.py's presets, and the published one for images of 256x256: flags, channels and size of images.
NETWORKS:dict[str, tuple[list[str], int, int]] = {
  "glyphs": (["--dataset", "glyphs"], 1, 16), "mnist": (["--dataset", "mnist"], 1, 28),
  "cifar10": (["--dataset", "cifar10"], 3, 32),
  "256": (["--dataset", "cifar10", "--channel-mult", "1,1,2,2,4,4", "--dropout", "0"], 3, 256)}
# What a card can do at best, by its data sheet (NVIDIA H100 SXM, A100 SXM; dense): operations a second on tensor cores
# in 16 bits and in TF32, operations a second outside of them, bytes a second.
RATES = {"sm_90": (989e12, 494e12, 67e12, 3.35e12), "sm_80": (312e12, 156e12, 19.5e12, 2.04e12)}

# *** what is measured or counted: one training step, one sampling step ***

Shape = tuple[int, ...]
Steps = tuple[Callable, Callable]

def training_step(state:train.State, ddpm:DDPM, a:argparse.Namespace, shape:Shape) -> Steps:
  """(the captured step, a function that takes one) of Algorithm 1."""
  step, n = train.make_step(state, ddpm, a), iter(range(1, 10**9))
  images, labels = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.zeros(shape[0], np.int32)
  def once():
    x, t, eps, y, seeds = train.draw(a, images, labels, 0, i := next(n))
    step(*state.given(np.array([1, *train.hyper(a, i)], np.float32), x, t, eps, y, seeds))
  return step, once

def sampling_step(state:train.State, ddpm:DDPM, a:argparse.Namespace, shape:Shape) -> Steps:
  """The same of Algorithm 2, line 4."""
  model = unet.lower(state.average, unet.DTYPES[a.dtype])
  def step(x:Tensor, t:Tensor, z:Tensor) -> Tensor: return ddpm.p_sample(model, x, t, z).realize()
  jit, rng = captured(step), np.random.default_rng(0)
  def noise() -> Tensor: return placed(rng.standard_normal(shape, np.float32), state.devices[0])
  x, t = noise(), placed(np.full(shape[0], ddpm.T, np.int32), state.devices[0])
  return jit, lambda: jit(x, t, noise())

def forward_flops(model:unet.UNet, batch:int) -> int:
  """Multiplications and additions of all products of one forward pass, counted from their shapes alone."""
  count, operations = [0], {name: getattr(unet, name) for name in ("convolve", "linear", "attention")}
  def convolve(x:Tensor, w:Tensor, *adds:Tensor, stride:int=1) -> Tensor:
    count[0] += 2 * x.shape[0] * (x.shape[1]//stride)**2 * w.numel()
    return operations["convolve"](x, w, *adds, stride=stride)
  def linear(x:Tensor, w:Tensor, b:Tensor) -> Tensor:
    count[0] += 2 * x.shape[0] * w.numel()
    return operations["linear"](x, w, b)
  def attention(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
    count[0] += 4 * q.shape[0] * q.shape[1]**2 * q.shape[2]
    return operations["attention"](q, k, v)
  vars(unet).update(convolve=convolve, linear=linear, attention=attention)
  c = model.config
  try: model(Tensor.empty(batch, c["in_channels"], c["image_size"], c["image_size"]), Tensor.ones(batch, dtype="int32"))
  finally: vars(unet).update(operations)
  return count[0]

def kernels(step:Callable, op:Ops=Ops.PROGRAM) -> list[UOp]:
  """The compiled kernels (or the copies) of a captured step in their order; where the device runs them in batches,
  those inside."""
  calls = [c for call in step.jit.captured.linear.src                                 # type: ignore[attr-defined]
           for c in (call.src[0].src[0].src if call.src[0].op is Ops.CUSTOM_FUNCTION else [call])]
  return [c.src[0] for c in calls if c.src[0].op is op]

# *** each kernel by itself ***

LINE = re.compile(r"^\*\*\* \S+ +(\d+) (.+?) +arg +\d+ mem .* tm +([\d.]+)(us|ms|s )/.*"
                  r"\( *(\d+) ([GT])FLOPS +(\d+)\|\d+ +([GT])B/s\)$", re.M)

def logged(log:str) -> list[list[tuple]]:
  """From the lines that tinygrad prints with DEBUG=2: of each step its kernels (name, seconds, GFLOP, GB)."""
  steps:list[list[tuple]] = []
  last = 0
  for n, name, took, unit, flops, of_flops, rate, of_bytes in LINE.findall(re.sub(r"\x1b\[\d*m", "", log)):
    if not steps or int(n) <= last: steps.append([])  # numbers begin anew with each step
    s, giga, last = float(took) * {"us": 1e-6, "ms": 1e-3, "s ": 1}[unit], {"G": 1, "T": 1000}, int(n)
    steps[-1].append((name, s, s*float(flops)*giga[of_flops], s*float(rate)*giga[of_bytes]))
  return steps

def by_name(step:list[tuple]) -> list[tuple[str, np.ndarray]]:
  """(name, its number, seconds, GFLOP and GB in all) of a step's kernels, the slowest first."""
  sums:dict[str, np.ndarray] = {}
  for name, *numbers in step: sums[name] = np.add(sums.get(name, 0), [1, *numbers])
  return sorted(sums.items(), key=lambda named: -named[1][1])

PRODUCT = """if True:
  import time, numpy as np
  rates = []
  for n in [256, 512, 1024] * 5:
    a, b = np.ones((2, n, n), np.float32)
    start = time.perf_counter()
    a @ b
    rates.append(2*n**3 / (time.perf_counter() - start))
  print(max(rates) / 1e9)"""

def slowest(once:Callable, most:int) -> str:
  """A table of a step's slowest kernels, each waited for; on a CPU on one core, beside what numpy's product of two
  matrices reaches on one."""
  with helpers.Context(JIT=2, DEBUG=2), contextlib.redirect_stdout(io.StringIO()) as log:
    for _ in range(3):
      GlobalCounters.reset()
      once()
  step, peak = max(reversed(logged(log.getvalue())), key=len), 0.
  if Device.DEFAULT.startswith("CPU"):
    one = {f"{name}_THREADS": "1" for name in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")}
    said = subprocess.run([sys.executable, "-c", PRODUCT], env=os.environ | one, capture_output=True, check=True)
    peak = float(said.stdout)
  whole = sum(k[1] for k in step)
  lines = [f"{k[:40]:40s} {n:5.0f} {s*1e3:9.2f} {s/whole:7.1%} {f/s:8.0f}" + (f" {f/s/peak:7.1%}" if peak else "")
           for k, (n, s, f, _) in by_name(step)[:most]]
  return "\n".join([f"a training step's {len(step)} kernels, each by itself: {whole*1e3:.1f} ms" +
                    (f"; a product of matrices by numpy: {peak:.0f} GFLOP/s" if peak else ""),
                    f"{'':40s} times        ms   share  GFLOP/s" + ("  of that" if peak else ""), *lines])

# *** on the device that is here ***

def measure(step:Callable, once:Callable, repeats:int, desc:str) -> dict:
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
  later = [timed() for _ in helpers.trange(repeats, desc=desc)]
  made = kernels(step)
  return dict(first=first, median=statistics.median(later), fastest=min(later), slowest=max(later), kernels=len(made),
              distinct=len({sources(p) for p in made}), ops=GlobalCounters.global_ops)

def here(b:argparse.Namespace, a:argparse.Namespace, config:dict, shape:Shape):
  device = open_device(b.tf32)
  start = time.perf_counter()
  ddpm, state = DDPM(), train.State(config, (device,), unet.DTYPES[b.dtype])
  setup = time.perf_counter() - start
  training = measure(*training_step(state, ddpm, a, shape), b.repeats, "training step")
  memory = GlobalCounters.mem_used
  sampling = measure(*sampling_step(state, ddpm, a, shape), b.repeats, "sampling step")
  flops = forward_flops(unet.UNet(**config), b.batch)
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
  if b.kernels: print(slowest(training_step(state, ddpm, a, shape)[1], b.kernels))
  if b.json: print(json.dumps(result))

# *** on a card that is not here ***

def open_target(target:str, gpus:int) -> tuple[str, Path]:
  """Makes tinygrad's NULL devices, which compile and run nothing, compile for CUDA: (architecture, path of ptxas).

  The compiler comes from the wheels of requirements-gpu.txt. RuntimeError where they are missing."""
  kind, _, arch = target.partition(":")
  if kind != "CUDA" or arch not in RATES:
    known = " and ".join(f"CUDA:{a}" for a in RATES)
    raise ValueError(f"--target {target}: only {known} can be compiled for without a card")
  spec = importlib.util.find_spec("nvidia")
  found = [Path(p, "cu13") for p in (spec.submodule_search_locations if spec else None) or ()]
  folder = next((f for f in found if (f/"bin"/"ptxas").is_file() and list(f.glob("lib/libnvrtc.so.*"))), None)
  if not folder:
    raise RuntimeError("--target needs NVIDIA's compiler, though no card: pip install -r requirements-gpu.txt")
  os.environ.update(NVRTC_PATH=str(next(folder.glob("lib/libnvrtc.so.*"))), CUDA_PATH=str(folder))
  os.environ["DEV"] = helpers.DEV.value = f"NULL:{target}"
  os.environ["CACHELEVEL"], helpers.CACHELEVEL.value = "0", 0  # compile_s is that of an empty cache
  helpers.NULL_ALLOW_COPYOUT.value = 1
  for i in range(gpus):
    renderer = Device[f"NULL:{i}"].renderer
    renderer.target = dataclasses.replace(renderer.target, device="CUDA")  # where TF32 is not taken unasked
    renderer.compiler.ptx = True
  return arch, folder/"bin"/"ptxas"

def sources(program:UOp) -> str: return next(u.arg for u in program.src if u.op is Ops.SOURCE)

def assembled(program:UOp, arch:str, ptxas:Path) -> tuple[int, int]:
  """Registers of a thread and bytes that it spills, by ptxas."""
  with tempfile.NamedTemporaryFile(suffix=".ptx") as f:
    f.write(next(u.arg for u in program.src if u.op is Ops.BINARY).rstrip(b"\0"))
    f.flush()
    said = subprocess.run([ptxas, "-v", f"-arch={arch}", "-o", "/dev/null", f.name], capture_output=True, text=True)
  if said.returncode: raise RuntimeError(f"ptxas refuses {program.arg.name}: {said.stderr[:200]}")
  return int(re.search(r"Used (\d+) registers", said.stderr)[1]), \
         sum(map(int, re.findall(r"(\d+) bytes spill", said.stderr)))                  # type: ignore[index]

def count(step:Callable, arch:str, ptxas:Path, seconds:float, b:argparse.Namespace) -> dict:
  """What the kernels of a captured step are, from the compiled kernels themselves."""
  tensor_16, tensor_32, plain, bandwidth = RATES[arch]
  made, tensor, limit = kernels(step), tensor_32 if b.dtype == "float32" else tensor_16, 0.
  distinct = list({sources(p): p for p in made}.values())
  whole = lambda v: int(getattr(v, "vmax", v))
  total, on_cores, moved, by_products, loaded = 0, 0, 0, 0, 0
  for p in made:
    e, cores = p.src[0].arg.estimates, "__WMMA" in sources(p)
    ops, mem, lds = whole(e.ops), whole(e.mem), whole(e.lds)
    total, moved, on_cores = total+ops, moved+mem, on_cores + ops*cores
    if cores: by_products, loaded = by_products+ops, loaded+lds
    limit += max(ops/(tensor if cores else plain), mem/bandwidth)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    registers, spills = zip(*pool.map(lambda p: assembled(p, arch, ptxas), distinct))
  return dict(kernels=len(made), distinct_kernels=len(distinct), copies=len(kernels(step, Ops.COPY)), gflop=total/1e9,
              tensor_core_share=on_cores/max(1, total), gigabytes_moved=moved/1e9,
              flop_per_byte_loaded=by_products/max(1, loaded), registers_max=max(registers), spill_bytes=sum(spills),
              compile_s=seconds, roofline_s=limit)

def elsewhere(b:argparse.Namespace, a:argparse.Namespace, config:dict, shape:Shape):
  helpers.ALLOW_TF32.value = int(b.tf32)
  arch, ptxas = open_target(b.target, b.gpus)
  unet.setup()
  ddpm, state = DDPM(), train.State(config, tuple(f"NULL:{i}" for i in range(b.gpus)), unet.DTYPES[b.dtype])
  result:dict = dict(target=b.target, dtype=b.dtype, batch=b.batch, gpus=b.gpus)
  for name, make in (("training", training_step), ("sampling", sampling_step)):
    step, once = make(state, ddpm, a, shape)
    print(f"{name} step: compiling for {b.target} ...", file=sys.stderr)
    start = time.perf_counter()
    once()
    c = count(step, arch, ptxas, time.perf_counter() - start, b)
    result |= c if name == "training" else {"sampling": c}
    print(f"{name} step, {b.preset}, batch {b.batch}, {b.dtype}, for {b.target}: {c['kernels']} kernels, "
          f"{c['distinct_kernels']} distinct, {c['copies']} copies, compiled in {c['compile_s']:.0f} s\n"
          f"  {c['gflop']:.0f} GFLOP, {c['tensor_core_share']:.1%} on tensor cores, "
          f"{c['flop_per_byte_loaded']:.1f} for each byte that threads load there\n"
          f"  {c['gigabytes_moved']:.2f} GB moved; {c['registers_max']} registers at most, "
          f"{c['spill_bytes']} bytes spilled\n"
          f"  no less than {c['roofline_s']*1e3:.1f} ms by the data sheet's rates")
  result["memory_bytes"] = GlobalCounters.mem_used
  if b.json: print(json.dumps(result))

def main(argv:list[str]|None=None):
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.error = lambda message: sys.exit(f"bench.py: {message}")                           # type: ignore[assignment]
  p.add_argument("--preset", choices=NETWORKS, default="mnist", help="whose network (mnist); 256: for 256x256 images")
  p.add_argument("--batch", type=number(int, 1, 2**20), default=32, help="images per step (32)")
  p.add_argument("--dtype", choices=unet.DTYPES, default="float32", help="of activations and products (float32)")
  p.add_argument("--tf32", action="store_true", help="NVIDIA: products of float32 in TF32, on tensor cores")
  p.add_argument("--repeats", type=number(int, 1, 2**20), default=10, help="steps measured; the median counts (10)")
  p.add_argument("--kernels", type=number(int, 0, 10**6), default=0,
                 help="also so many of the slowest kernels, and what share each has of a plain product's rate (0)")
  p.add_argument("--gpus", type=number(int, 1, 64), default=1, help="with --target: cards that share a batch (1)")
  p.add_argument("--target", help="a card that need not be here, like CUDA:sm_90: compile and count, execute nothing")
  p.add_argument("--json", action="store_true", help="end with one line of JSON")
  b = p.parse_args(argv)
  flags, channels, size = NETWORKS[b.preset]
  a = train.arguments([*flags, "--batch", str(b.batch), "--dtype", b.dtype, "--gpus", str(b.gpus)])
  (elsewhere if b.target else here)(b, a, train.network(a, channels, size), (b.batch, channels, size, size))

if __name__ == "__main__": run(main)

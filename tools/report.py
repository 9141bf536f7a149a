"""What a card can do, in one file, for whoever has one and would send it to us: make gpu-report (8 minutes at most).

Each part runs in processes of its own with a time limit, and the file is written anew after each: what fails or hangs
is said there and costs nothing else. A second run finds what the first has compiled, and comes further.
"""
from __future__ import annotations
import argparse, contextlib, dataclasses, json, os, platform, re, shutil, signal, subprocess, sys, tempfile, time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from engine.terminal import number, parser, run
from files.atomic import atomic

ROOT = Path(__file__).parent.parent
PY = sys.executable

@dataclasses.dataclass
class Report:
  """What the parts know of each other."""
  small:bool                                                         # sizes that a processor manages
  ends:float = 0.                                                    # when the part that runs is cut off
  failures:list[str] = dataclasses.field(default_factory=list)       # of the part that runs
  results:list[dict] = dataclasses.field(default_factory=list)       # what bench.py measured

# *** a program, a table ***

def call(r:Report, *command:str, share:float=1., **env:str) -> str|None:
  """What a program prints; or None, and why in r.failures, if it fails or takes more than that share of the time."""
  said = " ".join([*(f"{k}={v}" for k, v in env.items()), *("python" if c == PY else c for c in command)])[:160]
  if (limit := share * (r.ends - time.monotonic())) < 1:
    r.failures.append(f"No time was left for `{said}`.")
    return None
  p = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | env, text=True, errors="replace",
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
  why = ""
  try: out, err = p.communicate(timeout=limit)
  except subprocess.TimeoutExpired: why = f"was cut off after {limit:.0f} s"
  finally:
    with contextlib.suppress(OSError): os.killpg(p.pid, signal.SIGKILL)  # and all that it has started
  if why: out, err = p.communicate()
  elif p.returncode == 0: return out
  else: why = f"ended with status {p.returncode}"
  lines = [re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line.split("\r")[-1])[:200] for line in (out + err).rstrip().split("\n")]
  r.failures.append("\n".join([f"`{said}` {why}:", "```", *lines[-12:], "```"]))
  return None

def table(head:list[str], rows:Iterable[Iterable]) -> str:
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))

def last_json(out:str) -> dict: return json.loads(out.splitlines()[-1])

# *** the parts ***

def device(r:Report) -> str:
  facts = last_json(call(r, PY, "-c", "from tools import report; report.about()") or "{}")
  r.small |= facts.pop("processor", False)
  if facts: os.environ.setdefault("DEV", facts["device"])
  packages = ", ".join(f"{p} {metadata.version(p)}" for p in ("tinygrad", "numpy", "pillow"))
  facts |= {"DEV": os.environ.get("DEV", ""), "sizes": "small" if r.small else "full", "platform": platform.platform(),
            "processors": os.cpu_count(), "python": f"{platform.python_version()}, {packages}"}
  commands = {"commit": "git rev-parse HEAD"} if (ROOT/".git").exists() and shutil.which("git") else {}
  if shutil.which("nvidia-smi"): commands |= {
    "cards": "nvidia-smi -L", "driver": "nvidia-smi --query-gpu=driver_version,memory.total,power.limit --format=csv"}
  if shutil.which("rocm-smi"): commands |= {"AMD's cards": "rocm-smi --showproductname --csv"}
  if sys.platform == "darwin": commands |= {"chip": "sysctl -n machdep.cpu.brand_string"}
  for name, command in commands.items(): facts[name] = (call(r, *command.split()) or "").strip().replace("\n", "; ")
  return "\n".join(f"- {k}: {v}" for k, v in facts.items())

def about():
  """Prints what tinygrad says of the device, as JSON."""
  from engine.device import is_processor, open_device
  from tinygrad import Device
  name = open_device()
  d = Device[name]
  print(json.dumps({"device": name, "processor": name.startswith("CPU") or name.startswith("CL") and is_processor(name),
                    "compiled by": f"{type(d.renderer).__name__} for {d.renderer.target}"[:100],
                    **{k: getattr(d, k) for k in ("device_name", "driver_version") if hasattr(d, k)}}))

def tests(r:Report) -> str:
  chosen = [["tests/test_unet.py", "-k", "linear"]] if r.small else [["tests/test_unet.py"], ["test_ddpm.py"]]
  said = []
  for c in chosen:
    out = call(r, PY, "-m", "pytest", "-q", "-p", "no:cacheprovider", *c, POCL_EXTRA_BUILD_FLAGS="-w")
    if out: said.append(f"- {' '.join(c)}: {out.splitlines()[-1]}")
  return "\n".join(said)

def speed(r:Report, beam:str="0") -> str:
  if r.small and beam != "0": return "Not with small sizes."
  rows, few = list[list](), ["--repeats", "2"] if r.small else []
  types = ["float32"] if r.small else ["bfloat16", "float32", "float16"]
  if os.environ.get("DEV", "").upper().startswith(("CUDA", "NV")): types.append("float32 --tf32")
  for dtype in types:
    for preset, batch in (("glyphs", 4),) if r.small else (("cifar10", 128), ("mnist", 32)):
      flags = ["--preset", preset, "--batch", str(batch), "--dtype", *dtype.split(), *few]
      # the first counts most; each other leaves something for those behind it
      out = call(r, PY, "-m", "tools.bench", *flags, "--json", BEAM=beam, BEAM_MAX_TASKS_PER_CHILD="999",
                 share=2/3 if rows else 1.)
      if not out: continue
      b = last_json(out)
      if beam == "0" and dtype == b["dtype"]: r.results.append(b)
      rate = b["sample_images_per_s"]
      rows.append([preset, batch, dtype, f"{b['train_images_per_s']:.1f}", f"{b['train_gflops']:.0f}",
                   f"{b['first_step_s']:.1f}", f"{b['kernels']}, {b['distinct_kernels']}", f"{rate:.1f}",
                   f"{b['sample_gflops']:.0f}", f"{b['sample_first_step_s']:.1f}", b["sample_kernels"],
                   f"{b['peak_memory_bytes']/2**20:.0f}", f"{256*1000/rate:.1f}"])
  return table(["network", "batch", "type", "training images/s", "GFLOP/s", "first step s", "kernels, distinct",
                "sampling images/s", "GFLOP/s", "first step s", "kernels", "memory MiB",
                "256 samples of 1,000 steps at that rate, s"], rows)

def searched(r:Report) -> str: return speed(r, "2")

def slowest(r:Report) -> str:
  preset, batch, dtype = ("glyphs", "4", "float32") if r.small else ("cifar10", "128", "bfloat16")
  out = call(r, PY, "-m", "tools.bench", "--preset", preset, "--batch", batch, "--dtype", dtype, "--repeats", "2",
             "--kernels", "10", BEAM="0")
  return f"```\n{out}```" if out else ""

def samples(r:Report) -> str:
  n, steps = (4, 10) if r.small else (256, 1000)
  rows = []
  for dtype in ("float32", "bfloat16")[:1 if r.small else 2]:
    out = call(r, PY, "-c", f"from tools import report; report.draw({dtype!r}, {n}, {steps})")
    if not out: continue
    first, short, long = last_json(out)["seconds"]
    rows.append([dtype, f"{first:.1f}", f"{long:.1f}", f"{(long-short) / (steps-2) * steps:.2f}"])
  return f"sample.py, checkpoints/mnist.safetensors: {n} images of {steps} steps. The paper's figure, for 256 images " \
    "of 1,000 steps with its CIFAR-10 network on its hardware, is 17 s.\n\n" + table(
      ["type", "2 steps, the first time, s", f"{steps} steps, s", "the steps alone, s"], rows)

def draw(dtype:str, n:int, steps:int):
  """Draws n samples three times, of 2, 2 and `steps` steps; prints the seconds as JSON."""
  import sample
  seconds = []
  with tempfile.TemporaryDirectory() as folder:
    for k in (2, 2, steps):
      start = time.perf_counter()
      sample.main(["--checkpoint", "checkpoints/mnist.safetensors", "--n", str(n), "--batch", str(n), "--steps", str(k),
                   "--dtype", dtype, "--out", f"{folder}/samples.png"])
      seconds.append(time.perf_counter() - start)
  print(json.dumps({"seconds": seconds}))

def training(r:Report) -> str:
  from files.mirrors import places
  there = any((p/f"train-images-idx3-ubyte{z}").is_file() for p in places("mnist", None) for z in ("", ".gz"))
  steps, more = (5, ["--batch", "4"]) if r.small else (200, [])
  logs:dict[str, dict[int, dict]] = {}
  for dataset in ("glyphs", "mnist") if there and not r.small else ("glyphs",):
    for dtype in ("float32", "bfloat16")[:1 if r.small else 2]:
      with tempfile.TemporaryDirectory() as folder:
        call(r, PY, "train.py", "--dataset", dataset, "--steps", str(steps), "--dtype", dtype, "--sample-every", "0",
             "--out", folder, *more)
        with contextlib.suppress(FileNotFoundError):
          lines = Path(folder, "log.jsonl").read_text().splitlines()
          logs[f"{dataset}, {dtype}"] = {e["step"]: e for e in map(json.loads, lines)}
  rows = [[n, *(f"{log[n]['smooth']:.5f}" if n in log else "" for log in logs.values())]
          for n in range(steps//4, steps+1, steps//4)]
  rates = ["images/s", *(log[max(log)]["images_per_s"] if log else "" for log in logs.values())]
  return f"The smoothed loss{'' if there else '; MNIST is not here'}:\n\n" + table(["step", *logs], [*rows, rates])

def peer(r:Report) -> str:
  if os.environ.get("DEV", "").upper() == "METAL": return "tools/torch_peer.py knows CUDA and processors alone."
  found = "import importlib.util as u; print(u.find_spec('torch') is not None)"
  pythons = [p for p in dict.fromkeys((PY, shutil.which("python3"))) if p and "True" in (call(r, p, "-c", found) or "")]
  if not pythons: return "Not here."
  rows, few = [], ["--repeats", "2"] if r.small else []
  for compiled in ([], ["--compile"])[:1 if r.small else 2]:
    for ours in r.results:
      if ours["dtype"] == "float16" or compiled and ours["dtype"] == "float32": continue
      out = call(r, pythons[0], "-m", "tools.torch_peer", "--dtype", ours["dtype"], "--batch", str(ours["batch"]), *few,
                 *compiled, "--parameters", str(ours["parameters"]), "--network", json.dumps(ours["unet"]), share=2/3)
      if not out: continue
      t = last_json(out)
      rates = [(t[k], ours[k]/t[k]) for k in ("train_images_per_s", "sample_images_per_s")]
      rows.append([ours["preset"], t["batch"], t["dtype"], "yes" if t["compiled"] else "no", t["device"],
                   f"{t['layout']}, {t['sample_layout']}", t["adam"],
                   f"{t['first_step_s']:.1f}", f"{t['peak_memory_bytes']/2**20:.0f}",
                   *(text for rate, times in rates for text in (f"{rate:.1f}", f"{times:.2f}"))])
  return table(["network", "batch", "type", "compiled", "on", "layouts", "Adam", "first step s", "memory MiB",
                "training images/s", "ours, times that", "sampling images/s", "ours, times that"], rows)

# what each is called, its seconds of 480; the last has what the others leave
PARTS:list[tuple[str, float, Callable[[Report], str]]] = [
  ("Device", 20, device), ("Speed", 150, speed), ("Tests", 60, tests), ("The ten slowest kernels", 40, slowest),
  ("Samples", 60, samples), ("Training", 60, training), ("PyTorch beside it", 90, peer),
  ("Speed with BEAM=2", 480, searched)]

def main(argv:list[str]|None=None):
  p = parser("report.py", __doc__ or "", formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--out", default="gpu-report.md", help="the file (gpu-report.md)")
  p.add_argument("--small", action="store_true", help="small sizes, as by themselves on a processor")
  p.add_argument("--minutes", type=number(float, 0.01, 10_000), default=8., help="for all of it; BEAM=2 likes more (8)")
  a = p.parse_args(argv)
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # a part that runs is ended by either
  start, r = time.monotonic(), Report(a.small)
  text = f"# ddpm on a device, {time.strftime('%Y-%m-%d %H:%M')}\n"
  for i, (title, seconds, part) in enumerate(PARTS, 1):
    with atomic(a.out) as f: f.write(text.encode())
    begun = time.monotonic()
    r.failures, r.ends = [], min(begun + seconds*a.minutes/8, start + 60*a.minutes)
    try: made = part(r)
    except Exception as e:  # whatever it is
      made = ""
      r.failures.append(f"{type(e).__name__}: {e}")
    took, bad = time.monotonic() - begun, f", {len(r.failures)} failed" if r.failures else ""
    text += f"\n## {i}. {title} ({took:.0f} s{bad})\n\n" + "\n\n".join([*filter(None, [made]), *r.failures]) + "\n"
    print(f"{i}/{len(PARTS)} {title}: {took:.0f} s{bad}", file=sys.stderr)
  with atomic(a.out) as f: f.write(text.encode())
  print(f"wrote {a.out}", file=sys.stderr)

if __name__ == "__main__": run(main)

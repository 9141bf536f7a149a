"""What one training step and one sampling step would be on a card that is not here: compiled whole and counted. Nothing
is executed. It needs NVIDIA's compiler, but no card: pip install -r requirements-gpu.txt

  python -m tools.target --preset cifar10 --batch 128 --dtype bfloat16 --device CUDA:sm_90 --json
"""
from __future__ import annotations
import concurrent.futures, dataclasses, functools, importlib.util, json, math, os, re, subprocess, sys, tempfile, time
from pathlib import Path
from typing import NamedTuple
from tinygrad import Device, GlobalCounters, helpers
from tinygrad.uop.ops import Ops, UOp
import unet
from engine.state import State
from engine.terminal import run
from tools.bench import Step, calls, chosen, flags, kernels, sampling_step, source, training_step, whole

class Card(NamedTuple):
  """What a card can do at best, by its data sheet."""
  tensor_16:float    # operations a second on tensor cores, in 16 bits
  tensor_32:float    # the same in TF32
  plain:float        # operations a second outside of them
  bandwidth:float    # bytes a second
  processors:int     # multiprocessors
  clock:float        # of the rates above, a second

# NVIDIA H100 SXM, A100 SXM; dense
CARDS = {"sm_90": Card(989e12, 494e12, 67e12, 3.35e12, 132, 1.83e9),
         "sm_80": Card(312e12, 156e12, 19.5e12, 2.04e12, 108, 1.41e9)}
# How many clocks an instruction of a warp, 32 threads, keeps a pipe of a multiprocessor busy. There are 32 units that
# load and store, 64 lanes of integer arithmetic, 64 that multiply integers; four instructions are issued in a clock.
# (NVIDIA's whitepapers of both cards; CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions")
PIPES = {"load": (re.compile(r"(LD|ST)([GSL]|SM)?\b|ATOM|RED|SHFL"), 1.), "multiply": (re.compile("IMAD"), 1/2),
         "integer": (re.compile(r"V?IADD|LOP|LEA|SHF\b|ISETP|PRMT|SEL"), 1/2), "issue": (re.compile(""), 1/4)}

def open_target(device:str, tf32:bool) -> tuple[str, Path]:
  """Makes tinygrad's NULL device, which compiles and runs nothing, compile for CUDA: (architecture, NVIDIA's programs).

  The compiler comes from the wheels of requirements-gpu.txt. RuntimeError where they are missing."""
  kind, _, arch = device.partition(":")
  if kind != "CUDA" or arch not in CARDS:
    known = " and ".join(f"CUDA:{a}" for a in CARDS)
    raise ValueError(f"--device {device}: only {known} can be compiled for without a card")
  spec = importlib.util.find_spec("nvidia")
  found = [Path(p, "cu13") for p in (spec.submodule_search_locations if spec else None) or ()]
  needed = "bin/ptxas", "bin/nvdisasm", "lib/libnvrtc.so.*"
  folder = next((f for f in found if all(list(f.glob(name)) for name in needed)), None)
  if not folder: raise RuntimeError("NVIDIA's compiler is missing: pip install -r requirements-gpu.txt")
  os.environ.update(NVRTC_PATH=str(next(folder.glob("lib/libnvrtc.so.*"))), CUDA_PATH=str(folder))
  os.environ["DEV"] = helpers.DEV.value = f"NULL:{device}"
  os.environ["CACHELEVEL"], helpers.CACHELEVEL.value = "0", 0  # compile_s is that of an empty cache
  helpers.NULL_ALLOW_COPYOUT.value, helpers.ALLOW_TF32.value = 1, int(tf32)
  renderer = Device["NULL"].renderer
  renderer.target = dataclasses.replace(renderer.target, device="CUDA")  # where TF32 is not taken unasked
  renderer.compiler.ptx = True                                                         # type: ignore[attr-defined]
  return arch, folder/"bin"

class Assembled(NamedTuple):
  registers:int      # of a thread
  spilled:int        # bytes
  loop:list[str]     # the instructions of the innermost loop

def assembled(program:UOp, arch:str, programs:Path) -> Assembled:
  """What ptxas makes of a kernel."""
  def call(name:str, *flags:str) -> str:
    said = subprocess.run([programs/name, *flags], capture_output=True, text=True)
    if said.returncode: raise RuntimeError(f"{name} refuses {program.arg.name}: {said.stderr[:200]}")
    return said.stdout + said.stderr
  with tempfile.TemporaryDirectory() as folder:
    ptx, cubin = f"{folder}/kernel.ptx", f"{folder}/kernel.cubin"
    Path(ptx).write_bytes(next(u.arg for u in program.src if u.op is Ops.BINARY).rstrip(b"\0"))
    said = call("ptxas", "-v", f"-arch={arch}", "-o", cubin, ptx)
    code = call("nvdisasm", "-c", cubin) if "__WMMA" in source(program) else ""
  registers, spills = [[int(n) for n in re.findall(p, said)] for p in (r"Used (\d+) registers", r"(\d+) bytes spill")]
  return Assembled(max(registers), sum(spills), innermost(code))

INSTRUCTION = re.compile(r"(?:@!?U?P\w+ +)?([A-Z]\w*(?:\.\w+)*)(.*);$")

def innermost(code:str) -> list[str]:
  """The instructions of the loop with the largest share of tensor instructions; all, if no loop has one."""
  made:list[str] = []
  labels:dict[str, int] = {}
  loops = [made]
  for line in code.splitlines():
    line = re.sub(r"/\*.*?\*/", "", line).strip()
    if label := re.match(r"(\.L_x_\d+):", line): labels[label[1]] = len(made)
    elif found := INSTRUCTION.match(line):
      made.append(found[1])
      to = re.search(r"\.L_x_\d+", found[2])
      if found[1].startswith("BRA") and to and to[0] in labels: loops.append(made[labels[to[0]]:])
  return max(loops, key=lambda loop: sum(map(tensor_flop, loop)) / max(1, len(loop)))

def tensor_flop(instruction:str) -> int:
  """Operations of an instruction such as HMMA.16816.F32.BF16, whose shape is 16 x 8 x 16; 0 of all others."""
  shape = re.match(r"HMMA\.168(\d+)", instruction)
  return 2*16*8*int(shape[1]) if shape else 0

def clocks(loop:list[str], card:Card, tensor:float) -> dict[str, float]:
  """How long a warp's pass through the loop keeps each pipe of a multiprocessor busy."""
  def width(instruction:str) -> int:  # in 128 bytes, four for each thread: what is loaded in a clock
    return 4 if ".128" in instruction else 2 if ".64" in instruction else 1
  busy = {"tensor": sum(map(tensor_flop, loop)) * card.processors * card.clock / tensor}
  for name, (pattern, each) in PIPES.items():
    busy[name] = each * sum(width(i) if name == "load" else 1 for i in loop if pattern.match(i))
  return busy

def count(once:Step, arch:str, programs:Path, dtype:str) -> dict:
  """What the kernels of a step are, from the compiled kernels themselves. Two of the numbers are times that a card with
  the data sheet's rates cannot beat. roofline_s: of each kernel its arithmetic or its bytes, whichever takes longer.
  pipes_s: the same, but of a kernel on tensor cores the time of the pipe that its innermost loop keeps busy the
  longest, on the multiprocessor with the most blocks, if that is longer. pipes says which one it was.

  Both leave out waiting (latency, too few warps, barriers), loads of a warp that lie apart, caches that miss, all code
  outside of the innermost loop, and launches; and that Hopper's tensor cores reach the data sheet's rate by other
  instructions than HMMA alone (Luo et al., arXiv:2402.13499)."""
  start = time.perf_counter()
  graphs = once()
  seconds, card = time.perf_counter() - start, CARDS[arch]
  made, copies = kernels(graphs), sum(c.src[0].op is Ops.COPY for c in calls(graphs))
  distinct = {source(program): program for program in made}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    found = pool.map(functools.partial(assembled, arch=arch, programs=programs), distinct.values())
    codes = dict(zip(distinct, found))
  tensor = card.tensor_32 if dtype == "float32" else card.tensor_16
  flop = moved = roofline = on_cores = loaded = loads = products = 0.
  slowest:dict[str, float] = {}
  for program in made:
    e, loop = program.src[0].arg.estimates, codes[source(program)].loop
    own, times = whole(e.ops), {"memory": whole(e.mem) / card.bandwidth}
    if loop: times["tensor"] = own / tensor
    else: times["arithmetic"] = own / card.plain
    flop, moved, roofline = flop + own, moved + whole(e.mem), roofline + max(times.values())
    if loop:
      passes, blocks = own / sum(map(tensor_flop, loop)), math.prod(program.arg.global_size)
      on_one = passes * math.ceil(blocks / card.processors) / blocks
      for name, n in clocks(loop, card, tensor).items(): times[name] = n * on_one / card.clock
      on_cores, loaded = on_cores + own, loaded + whole(e.lds)
      loads += passes * sum(PIPES["load"][0].match(i) is not None for i in loop)
      products += passes * sum(tensor_flop(i) > 0 for i in loop)
    pipe = max(times, key=times.__getitem__)
    slowest[pipe] = slowest.get(pipe, 0) + times[pipe]
  return dict(kernels=len(made), distinct_kernels=len(distinct), copies=copies, gflop=flop/1e9,
              tensor_core_share=on_cores/flop, gigabytes_moved=moved/1e9, flop_per_byte_loaded=on_cores/max(1, loaded),
              registers_max=max(code.registers for code in codes.values()),
              spill_bytes=sum(code.spilled for code in codes.values()), compile_s=seconds, roofline_s=roofline,
              pipes_s=sum(slowest.values()), pipes=slowest, loads_per_tensor_instruction=loads/max(1, products))

def main(argv:list[str]|None=None):
  p = flags("target.py", __doc__)
  p.add_argument("--device", required=True, help="the card, like CUDA:sm_90")
  b = p.parse_args(argv)
  (c, config, shape), (arch, programs) = chosen(b), open_target(b.device, b.tf32)
  state = State(unet.UNet(**config), unet.DTYPES[b.dtype])
  result:dict = dict(target=b.device, dtype=b.dtype, batch=b.batch)
  for name, step in (("training", training_step), ("sampling", sampling_step)):
    print(f"{name} step: compiling for {b.device} ...", file=sys.stderr)
    k = count(step(state, c, shape), arch, programs, b.dtype)
    result |= k if name == "training" else {"sampling": k}
    print(f"{name} step, {b.preset}, batch {b.batch}, {b.dtype}, for {b.device}: {k['kernels']} kernels, "
          f"{k['distinct_kernels']} distinct, {k['copies']} copies, compiled in {k['compile_s']:.0f} s\n"
          f"  {k['gflop']:.0f} GFLOP, {k['tensor_core_share']:.1%} on tensor cores, "
          f"{k['flop_per_byte_loaded']:.1f} for each byte that threads load there\n"
          f"  {k['gigabytes_moved']:.2f} GB moved; {k['registers_max']} registers at most, "
          f"{k['spill_bytes']} bytes spilled\n"
          f"  no less than {k['roofline_s']*1e3:.2f} ms by the data sheet's rates\n"
          f"  no less than {k['pipes_s']*1e3:.2f} ms by the slowest pipe of each kernel: " +
          ", ".join(f"{name} {s*1e3:.2f}" for name, s in k["pipes"].items()) +
          f"; {k['loads_per_tensor_instruction']:.2f} loads for each tensor instruction")
  result["memory_bytes"] = GlobalCounters.mem_used
  if b.json: print(json.dumps(result))

if __name__ == "__main__": run(main)

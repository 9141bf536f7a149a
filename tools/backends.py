"""Which of tinygrad's backends are on this machine, and whether each computes what DEV=CPU does: two steps of a small
training, three steps of sampling, the tests of each operation. Nothing is installed.

  python -m tools.backends                                # all that are here
  python -m tools.backends WEBGPU Oclgrind --types float32
"""
from __future__ import annotations
import argparse, ctypes.util, json, os, platform, sys, sysconfig, tempfile, time
from importlib import metadata
from pathlib import Path
import numpy as np
from engine.terminal import number, parser, run
from tools.report import PY, Report, call, last_json, table

# The greatest difference from DEV=CPU that is rounding, over the greatest value. The first step of sampling magnifies.
BOUNDS = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}
MEASURES = {"losses": 1, "norms": 1, "samples": 10}
CARDS = ["METAL", "AMD", "NV", "CUDA", "QCOM"]
INSTALL = {  # what brings each backend that needs no card
  "PoCL": "apt-get install ocl-icd-libopencl1 pocl-opencl-icd",
  "rusticl": "apt-get install ocl-icd-libopencl1 mesa-opencl-icd",
  "Oclgrind": "apt-get install ocl-icd-libopencl1 oclgrind",
  "Intel": "pip install intel-opencl-rt, whose licence is proprietary; apt-get install ocl-icd-libopencl1",
  "WEBGPU": "pip install -r requirements-backends.txt; apt-get install libvulkan1 mesa-vulkan-drivers",
  "AMD-emulated": f"git clone --branch v{metadata.version('tinygrad')} https://github.com/tinygrad/tinygrad FOLDER, "
                  "and TINYGRAD=FOLDER; apt-get install libllvm19"}

# *** what is here: for each backend the environment that opens it ***

def find(folder:Path) -> dict[str, dict[str, str]]:
  """All but cards. What the environments name is put into the folder."""
  found = {"CPU": {"DEV": "CPU"}} | {name: opencl(folder, name, library) for name, library in drivers().items()}
  ending, wheels = {"darwin": "dylib"}.get(sys.platform, "so"), Path(sysconfig.get_paths()["purelib"])
  dawn = [*wheels.glob(f"pydawn/lib/*_{platform.machine()}.{ending}")]
  if dawn and (sys.platform == "darwin" or any(Path("/usr/share/vulkan/icd.d").glob("*.json"))):
    found["WEBGPU"] = {"DEV": "WEBGPU", "WEBGPU_PATH": str(dawn[0])}
  clone = Path(os.environ.get("TINYGRAD") or "none").resolve()
  if (clone/"test"/"mockgpu").is_dir():  # the emulator is in tinygrad's repository alone: these two folders of it
    (folder/"emulator").mkdir()
    for part in ("test", "extra"): (folder/"emulator"/part).symlink_to(clone/part)
    found["AMD-emulated"] = {"DEV": "MOCKKFD+AMD:LLVM:gfx1100", "PYTHONPATH": str(folder/"emulator")}
  return found

def drivers() -> dict[str, str]:
  """OpenCL's drivers: of each its name and its library."""
  libraries = [f.read_text().strip() for f in Path("/etc/OpenCL/vendors").glob("*.icd")]
  libraries += map(str, [*Path(sys.prefix, "lib").glob("libintelocl.so"), *Path("/usr/lib").glob("oclgrind/*icd.so")])
  known = {"pocl": "PoCL", "rusticl": "rusticl", "intelocl": "Intel", "oclgrind": "Oclgrind"}
  def name(library:str) -> str: return next((v for k, v in known.items() if k in library.lower()), Path(library).name)
  if not ctypes.util.find_library("OpenCL"): libraries.clear()  # what tinygrad opens them with
  return {name(library): library for library in sorted(libraries) if "MesaOpenCL" not in library}  # it has no device

def opencl(folder:Path, name:str, library:str) -> dict[str, str]:
  """tinygrad takes the first driver that it finds, so it finds one alone."""
  (folder/name).mkdir()
  (folder/name/"driver.icd").write_text(library)
  more = {"rusticl": {"RUSTICL_ENABLE": "llvmpipe", "RUSTICL_DEVICE_TYPE": "gpu"}, "Oclgrind": {
    "OCLGRIND_DATA_RACES": "1", "OCLGRIND_CHECK_API": "1", "OCLGRIND_LOG": str(folder/name/"log")}}
  return {"DEV": "CL", "OCL_ICD_VENDORS": str(folder/name), **more.get(name, {})}

# *** what runs in processes of its own ***

def cards():
  """Prints which cards tinygrad opens."""
  from tinygrad import Device
  print(json.dumps([name for name in Device.get_available_devices() if name in CARDS]))

def let_threads_share():
  """On Oclgrind, which looks for races, also run kernels whose threads share memory: fast/ has them for GPUs alone."""
  from fast import kernels, schedules
  if "OCLGRIND_LOG" in os.environ: kernels.group_opts = lambda device, *sizes: schedules.grouped(*sizes)

def work(part:str):
  """Runs the "tests" of each operation; or, in a type, prints losses, norms and samples of a small network, as JSON."""
  import ddpm, pytest, sample, train, unet
  from engine.capture import placed
  from engine.device import find_compiler, open_device
  from engine.state import State
  from tinygrad import Device, nn
  let_threads_share()
  if part == "tests":
    chosen = "test_dropout or fast and (convolution or linear or norm or attention)"
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_unet.py", "-k", chosen]))
  device = Device[open_device()]
  c = train.Config(batch=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, attn=(4,), dropout=0.1, norm_groups=4,
                   class_conditional=True, warmup=0, dtype=part)
  images, labels = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), np.uint8), np.arange(8, dtype=np.int32)
  model, rng = unet.UNet(**train.network(c, images.shape, 8)), np.random.default_rng(1)
  for p in nn.state.get_parameters(model):  # no layer is near 0, so each matters from the first step on
    p.replace(placed(p.numpy() + 0.1 * rng.standard_normal(p.shape).astype(np.float32), device.device))
  state, diffusion, losses, norms = State(model, unet.DTYPES[part]), ddpm.DDPM(), [], []
  loss, update = train.make_loss(diffusion, c), train.make_update(state, c)
  for n in (1, 2):
    losses += state.gradient(loss, train.draw(c, images, labels, 8, n)).tolist()
    norms.append(float(update(placed(np.array(train.rates(c, n), np.float32), state.device)).numpy()))
  net, x_T = unet.lower(state.average, state.dtype), sample.draw_x_T(2, images.shape[1:], 0)
  *_, (_, x_0, _) = sample.SAMPLERS["ddpm"](diffusion, net, x_T, 3)
  by = getattr(device, "device_name", None) or type(device.renderer).__name__.removesuffix("Renderer")
  by = Path(find_compiler() or "").name if by == "Clang" else by[:40]
  print(json.dumps(dict(by=by, losses=losses, norms=norms, samples=x_0.numpy().ravel().tolist())))

# *** the command ***

def compare(name:str, env:dict[str, str], parts:list[str], known:dict[str, dict], seconds:float) -> list[str]:
  """Prints a line for each part, a type or "tests"; returns those that fail. `known` takes DEV=CPU's numbers."""
  wrong, by, log = [], "", Path(env.get("OCLGRIND_LOG", "none"))
  for part in parts:
    r, start, cells = Report(False, ends=time.monotonic() + seconds), time.monotonic(), [""] * 4
    out = call(r, PY, "-c", f"from tools import backends; backends.work({part!r})", share=1., **env)
    if not out: cells[3] = "failed"
    elif part == "tests": cells[3] = out.splitlines()[-1].split(" in ")[0]
    else:
      made = last_json(out)
      by = made["by"]
      if name == "CPU": known[part] = made
      if (ref := known.get(part)) is None: r.failures.append("DEV=CPU has no numbers to compare with")
      else:
        apart = [float(np.abs(np.subtract(made[k], ref[k])).max() / np.abs(ref[k]).max()) for k in MEASURES]
        cells[:3] = [f"{d:.0e}" for d in apart]
        near = np.max(np.divide(apart, [*MEASURES.values()])) < BOUNDS[part]
        if not near: r.failures.append("too far from DEV=CPU's")
    if log.exists() and (said := log.read_text(errors="replace").strip()):
      r.failures.append(f"Oclgrind says: {said[:2000]}")
      log.unlink()
    if r.failures: wrong.append(f"{name} {part}")
    row = " | ".join([name, by, part.replace("tests", ""), *cells, f"{time.monotonic() - start:.0f}"])
    print(f"| {row} |", *r.failures, sep="\n", flush=True)
  return wrong

def main(argv:list[str]|None=None):
  p = parser("backends.py", __doc__ or "", formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("names", nargs="*", metavar="NAME", help=f"CPU, {', '.join(INSTALL)}, or a card (all that are here)")
  p.add_argument("--types", nargs="*", choices=BOUNDS, default=[*BOUNDS], help="(all); none: the tests alone")
  p.add_argument("--minutes", type=number(float, 0.01, 10_000), default=10., help="at most, for each process (10)")
  a = p.parse_args(argv)
  known, wrong = dict[str, dict](), list[str]()
  with tempfile.TemporaryDirectory() as folder:
    opened = call(Report(False, ends=time.monotonic() + 60), PY, "-c", "from tools import backends; backends.cards()")
    found, asked = find(Path(folder)), [name.lower() for name in a.names]
    found |= {name: {"DEV": name} for name in last_json(opened or "[]")}
    for name in set(asked) - {n.lower() for n in (*found, *INSTALL, *CARDS)}: p.error(f"there is no backend {name}")
    print(table(["backend", "compiled by", "type", *MEASURES, "tests", "seconds"], []), flush=True)
    for name, env in found.items():
      slow = name in ("Oclgrind", "AMD-emulated")  # and that emulator stores numbers of 16 bits at wrong addresses
      parts = [t for t in a.types if t == "float32" or not slow] + ["tests"] * (not asked or name.lower() in asked)
      if name == "CPU" or "tests" in parts: wrong += compare(name, env, parts, known, 60*a.minutes)
  for name, command in INSTALL.items():
    if name not in found: print(f"not here: {name} ({command})")
  if not {*CARDS} & {*found}: print(f"not here: a card that tinygrad opens ({', '.join(CARDS)})")
  if wrong: raise RuntimeError(f"not as it should be: {', '.join(wrong)}")

if __name__ == "__main__": run(main)

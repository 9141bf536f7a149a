"""make backends: what it compares and says; and a training step for cards that are not here, rendered and counted."""
import json, os, subprocess, sys
import pytest
from common import ROOT
from tools import backends
pytestmark = pytest.mark.slow

NUMBERS = dict(by="a compiler", losses=[2., 4.], norms=[1.], samples=[0.5, -1.])

def compared(monkeypatch, capsys, *said, parts=("float32",), **env):
  """compare's cells and what is wrong, where each process prints what is said, or fails if that is None."""
  left = iter(said)
  def call(r, *command, **given):
    made = next(left)
    if made is None: r.failures.append("it was cut off")
    return made
  monkeypatch.setattr(backends, "call", call)
  wrong = backends.compare("one", env, list(parts), {"float32": NUMBERS}, 5)
  out = capsys.readouterr().out
  return [line.split(" | ")[1:] for line in out.splitlines() if line[0] == "|"], wrong, out

def test_differences_are_over_the_greatest_value_of_the_processors(monkeypatch, capsys):
  near = NUMBERS | dict(losses=[2.000004, 4.], samples=[0.5, -1.00001])
  rows, wrong, _ = compared(monkeypatch, capsys, "\nnoise\n" + json.dumps(near), "18 passed, 3 deselected in 9.1s\n",
                            parts=("float32", "tests"))
  assert rows[0][:5] == ["a compiler", "float32", "1e-06", "0e+00", "1e-05"] and not wrong
  assert rows[1][5] == "18 passed, 3 deselected"
  for far in (dict(norms=[1.00001]), dict(samples=[0.5, float("nan")])):
    _, wrong, out = compared(monkeypatch, capsys, json.dumps(NUMBERS | far))
    assert wrong == ["one float32"] and "too far from DEV=CPU's" in out

def test_a_process_that_fails_and_what_oclgrind_says_are_wrong(monkeypatch, capsys, tmp_path):
  rows, wrong, out = compared(monkeypatch, capsys, None)
  assert rows[0][5] == "failed" and wrong == ["one float32"] and "it was cut off" in out
  log = tmp_path/"log"
  for text, number in (("", 0), ("Read-write data race at local memory", 1)):
    log.write_text(text)
    _, wrong, out = compared(monkeypatch, capsys, json.dumps(NUMBERS), OCLGRIND_LOG=str(log))
    assert len(wrong) == number == out.count("data race")

def test_what_is_not_here_is_named_and_nothing_that_is_unknown_runs(monkeypatch, capsys):
  monkeypatch.setattr(backends, "find", lambda folder: {"CPU": {}})
  monkeypatch.setattr(backends, "call", lambda *args, **env: "[]")
  monkeypatch.setattr(backends, "compare", lambda *args: [])
  backends.main(["webgpu"])
  said = capsys.readouterr().out
  for name, command in backends.INSTALL.items(): assert f"not here: {name} ({command})" in said
  with pytest.raises(ValueError, match="no backend"): backends.main(["abacus"])
  monkeypatch.setattr(backends, "compare", lambda name, *args: [f"{name} tests"])
  with pytest.raises(RuntimeError, match="CPU tests"): backends.main([])

def test_drivers_are_found_one_at_a_time(tmp_path):
  env = backends.opencl(tmp_path, "PoCL", "/lib/libpocl.so")
  assert [f.read_text() for f in (tmp_path/"PoCL").iterdir()] == ["/lib/libpocl.so"]
  assert env == {"DEV": "CL", "OCL_ICD_VENDORS": str(tmp_path/"PoCL")}

RENDERED = """if True:
  import functools, re, sys, types
  import numpy as np
  from tinygrad.device import Compiler
  class Source(Compiler):  # the vendors' compilers are not here
    def __init__(self, *args, **options): super().__init__()
    def compile(self, src): return src.encode()
  names = {"ops_metal": "Metal", "support.compiler_amd": "HIP HIPCC", "support.compiler_llvm": "AMDLLVM CPULLVM",
           "support.compiler_cuda": "NVRTC NVCC NVPTX PTX"}
  for module, kinds in names.items():
    sys.modules["tinygrad.runtime." + module] = types.SimpleNamespace(**{f"{k}Compiler": Source for k in kinds.split()})
  import unet
  from engine.capture import captured
  from tinygrad import Tensor, dtypes, nn
  from tools.bench import kernels, source
  rng, norm = np.random.default_rng(0), functools.partial(unet.GroupNorm, groups=8, eps=1e-6)
  layers = [unet.Conv(rng, 1, 16), unet.ResBlock(rng, 16, 16, 16, norm, 0.), unet.Attention(rng, 16, norm),
            unet.Conv(rng, 16, 1)]
  weights = [p for p in nn.state.get_parameters(layers) if p.ndim > 1]
  for p in weights: p.replace(Tensor.empty(*p.shape, dtype=dtypes.bfloat16).realize())
  def step(x, emb):
    for layer in layers: x = layer(x, add=None) if isinstance(layer, unet.Conv) else layer(x, emb, None)
    return x.float().square().mean().gradient(*weights)
  graph = captured(step)
  graph(*(Tensor.empty(16, *shape, dtype=dtypes.bfloat16).realize() for shape in ((4, 4, 1), (16,))))
  print(sum(re.search("__WMMA_|llvm.amdgcn.(wmma|mfma)", source(p)) is not None for p in kernels([graph])))"""

@pytest.mark.parametrize("device,without", [
  ("NULL:METAL:Apple7", 2), ("NULL:CUDA:sm_90", 2 + 3), ("NULL:HIP:gfx1100", 2 + 3), ("NULL:HIP:gfx942", 2 + 3),
  ("NULL:AMDLLVM:gfx1100", 2 + 3)])
def test_a_training_step_for_cards_that_are_not_here(device, without):
  """Each kind of layer and their gradients, rendered: all products are on tensor cores, but for a few. Of one channel:
  the last layer's and its weights' gradient; on NVIDIA and AMD, whose cores sum 16 terms, also the first layer's, its
  weights' gradient, and what the last one hands back."""
  r = subprocess.run([sys.executable, "-c", RENDERED], cwd=ROOT, capture_output=True, text=True,
                     env=os.environ | {"DEV": device, "PLAIN": "0", "PARALLEL": "0", "CACHELEVEL": "0"})
  assert r.returncode == 0, r.stderr[-2000:]
  # the first layer, a block (2 convolutions, the time), attention's four, the last layer; each has two
  # gradients, but two have no input to be derived; attention's two products, each with two gradients
  layers = 1 + 3 + 4 + 1
  assert int(r.stdout) == 3*layers - 2 + 3*2 - without

RACE = """if True:
  import sys
  from tinygrad import Device, dtypes
  from tinygrad.device import Buffer, TinyELF
  d, b = Device["CL"], Buffer("CL", 16, dtypes.int).allocate()
  source = "kernel void k(global int* o) { local int l[16]; int i = get_local_id(0); " + sys.argv[1] + " }"
  program = d.runtime(TinyELF(source.encode(), "k", d.renderer.target, (("o", 0, dtypes.int, ()),)))
  program(b._buf, global_size=(1, 1, 1), local_size=(16, 1, 1))
  d.synchronize()"""

@pytest.mark.skipif("Oclgrind" not in backends.drivers(), reason="Oclgrind is not installed")
def test_oclgrind_finds_what_it_is_to_find(tmp_path):
  env = backends.opencl(tmp_path, "Oclgrind", backends.drivers()["Oclgrind"])
  wait = "barrier(CLK_LOCAL_MEM_FENCE);"
  for code, words in (("o[i] = i;", ""), ("o[0] = i;", "data race"), ("l[i] = i; o[i] = l[15-i];", "data race"),
                      (f"l[i] = i; {wait} o[i] = l[15-i];", ""), ("o[i+1] = i;", "Invalid write")):
    subprocess.run([sys.executable, "-c", RACE, code], check=True, env=os.environ | env)
    said = (tmp_path/"Oclgrind"/"log").read_text()
    assert words in said and bool(words) == bool(said), (code, said)

"""What fast/ does to tinygrad: all cores, the quick start, and that none of it is needed or happens by an import."""
import ctypes, os, re, shutil, subprocess, sys
import numpy as np
import pytest
import bench, unet
from common import ROOT, arr, close
from fast import cores, cpu, quickstart, setup
from test_unet import conv_by_hand, softmax
from tinygrad import Device, Tensor, TinyJit

setup()
shared_cores = pytest.mark.skipif(getattr(Device[Device.DEFAULT], "graph", None) is not cores.Team,
                                  reason="for the CPU with 2 cores or more")

def python(program, cwd=ROOT, **env):
  r = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
  assert r.returncode == 0, r.stderr
  return r.stdout

# *** the rooms ***

def test_importing_does_nothing_but_define_names():
  """In any order: no environment variable, no attribute of a tinygrad module, no thread, no device."""
  names = ["ddpm", "unet", "data", "train", "sample", "evaluate", "beyond", "bench", "files.checkpoint", "files.hub",
           "files.device", "fast", "fast.cpu", "fast.gpu", "fast.cores", "fast.quickstart", "fast.compiler"]
  program = """if True:
    import os, sys, threading, importlib, pkgutil, tinygrad
    for m in pkgutil.walk_packages(tinygrad.__path__, "tinygrad."):
      if m.name in {names}: importlib.import_module(m.name)
    def state():
      modules = [(n, m) for n, m in sys.modules.items() if n.split(".")[0] == "tinygrad"]
      classes = [(f"{{n}}.{{k}}", c) for n, m in modules for k, c in vars(m).items() if isinstance(c, type)]
      return {{(n, k): id(v) for n, m in modules + classes for k, v in list(vars(m).items())
               if k not in ("__dict__", "__weakref__", "__annotations__", "__annotations_cache__", "_abc_impl",
                            "__dataclass_fields__", "__abstractmethods__", "__static_attributes__")
               and not isinstance(v, type(sys)) and k not in ("DEV",)}}
    before, env = state(), dict(os.environ)
    for name in {order}: importlib.import_module(name)
    after = state()
    assert dict(os.environ) == env
    assert [k for k in before if before[k] != after.get(k)] == []
    assert threading.active_count() == 1
    assert not tinygrad.Device._opened_devices, tinygrad.Device._opened_devices
    print("ok")"""
  inside = ["tinygrad.codegen", "tinygrad.engine.realize", "tinygrad.engine.jit", "tinygrad.schedule",
            "tinygrad.uop.ops", "tinygrad.helpers", "tinygrad.device", "tinygrad.renderer.cstyle", "tinygrad.tensor",
            "tinygrad.nn", "tinygrad.codegen.opt.postrange", "tinygrad.runtime.ops_cpu"]
  for order in (names, names[::-1]): assert python(program.format(names=inside, order=order)) == "ok\n"

def test_without_the_folder_everything_still_works(tmp_path):
  left_out = shutil.ignore_patterns(".*", "fast", "runs", "assets", "checkpoints", "__pycache__")
  shutil.copytree(ROOT, tmp_path/"copy", ignore=left_out)
  small = "--dataset glyphs --channels 4 --channel-mult 1 --attn 4 --norm-groups 2 --T 20".split()
  def program(name, *flags):
    r = subprocess.run([sys.executable, name, *flags], cwd=tmp_path/"copy", capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout
  program("train.py", *small, "--steps", "1", "--batch", "2", "--sample-every", "0")
  program("sample.py", "--n", "1", "--steps", "1", "--npz", "a.npz")
  assert np.load(tmp_path/"copy"/"a.npz")["arr_0"].shape == (1, 16, 16, 1)
  assert "bits/dim" in program("evaluate.py", "--n", "1", "--samples-t", "1")

# *** the operations' parts ***

def test_softmax_and_its_gradient():
  s, r = arr(2, 1, 5, 28, scale=30), arr(2, 1, 5, 28, seed=1)
  p, t = softmax(s.astype(np.float64)), Tensor(s).realize()
  out = cpu.softmax(t)
  close(out.numpy(), p, atol=1e-6)
  g, = (out * Tensor(r)).sum().gradient(t)
  close(g.numpy(), p * (r - (p * r).sum(-1, keepdims=True)), atol=1e-5)

# *** all cores ***

@shared_cores
@pytest.mark.parametrize("members", (1, 2, 5))
def test_captured_kernels_are_shared_among_cores(members, monkeypatch):
  monkeypatch.setattr(cores, "cores", lambda: members)
  cores.team.cache_clear()
  x, w, full = arr(24, 16, 16, 16), arr(3, 3, 16, 16, seed=1), arr(24, 16, 16, 16, seed=2)
  @TinyJit
  def f(x, w, full):
    y = unet.convolve(x, w, full)
    dx, dw = (y * full).sum().gradient(x, w)
    return y.realize(), dx.realize(), dw.realize(), (full.exp() + x).realize()
  f.cnt = 1
  try:
    for shift in (0, 1, 2):  # with other buffers each time
      y, dx, dw, e = [v.numpy() for v in f(*(Tensor(a + np.float32(shift)).realize() for a in (x, w, full)))]
      xs, ws, fs = x + np.float32(shift), w + np.float32(shift), full + np.float32(shift)
      close(y, conv_by_hand(xs, ws, 1, 1, 1) + fs, rtol=1e-4, atol=1e-2)
      close(dx, conv_by_hand(fs, ws[::-1, ::-1].transpose(0, 1, 3, 2), 1, 1, 1), rtol=1e-4, atol=1e-2)
      padded = np.pad(xs.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
      want = np.stack([[np.einsum("bhwc,bhwo->co", padded[:, i:i+16, j:j+16], fs) for j in range(3)] for i in range(3)])
      close(dw, want, rtol=1e-4, atol=0.1)
      close(e, np.exp(fs.astype(np.float64)) + xs, rtol=1e-5, atol=1e-4)
    graphs = [c for c in f.captured.linear.src if c.src[0].arg == "graph"]
    assert max(call.src[0].arg.global_size[0] for c in graphs for call in c.src[0].src[0].src) >= 8
  finally:
    monkeypatch.undo()
    cores.team.cache_clear()

def alone(rounds:int, taken:int, stop:int) -> tuple[list[int], list[int]]:
  """A kernel of so many rounds given to the first of two cores, the other never comes: the rounds it ran, its state."""
  ran:list[int] = []
  kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64]*32)(lambda *args: ran.append(args[31]))
  command, state = np.zeros((1, 35), np.uint64), np.array([stop, 0, taken, taken], np.uint64)
  command[0, :3] = ctypes.cast(kernel, ctypes.c_void_p).value, rounds, 31
  sleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value
  cores.team()[0].fxn(*map(ctypes.c_uint64, (command.ctypes.data, 1, 0, 2, state.ctypes.data, sleep)))
  return ran, state.tolist()

@shared_cores
def test_a_core_that_is_taken_away_is_not_waited_for():
  ran, state = alone(rounds=5, taken=0, stop=0)
  assert ran == [0, 2, 4, 1, 3] and state[1] == 5

@shared_cores
def test_a_core_does_not_wait_for_one_that_was_interrupted():
  assert alone(rounds=5, taken=3, stop=1) == ([], [1, 0, 4, 4])  # the other had taken all rounds and done none

@shared_cores
def test_a_kernel_beside_a_plain_product_of_matrices():
  x, w = [Tensor(a).realize() for a in (arr(8, 16, 16, 32), arr(3, 3, 32, 32, seed=1))]
  first, _, *lines = bench.slowest(lambda: unet.convolve(x, w).realize(), 9).splitlines()
  peak = float(re.search(r"numpy: (\d+) GFLOP/s", first)[1])
  conv = next(line.split() for line in lines if "conv3_16x16_32_32" in line)
  rate, of_that = float(conv[-2]), float(conv[-1].rstrip("%"))
  # y has 8 · 16 · 16 · 32 numbers, each a sum of 288 products
  assert peak > 1 and rate == pytest.approx(2*288*8*16*16*32 / float(conv[2]) / 1e6, rel=0.2)
  assert of_that == pytest.approx(100*rate/peak, rel=0.05)

@pytest.mark.parametrize("text,n", [
  ("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_share_of_the_processor(text, n, tmp_path):
  (tmp_path/"cpu.max").write_text(text + "\n")
  assert cores.quota(str(tmp_path/"cpu.max")) == n and cores.quota(str(tmp_path/"none")) == 16

# *** the quick start ***

def test_what_lies_below_a_node_is_what_sorting_finds():
  a, b, c = [Tensor(arr(4, seed=i)).realize() for i in range(3)]
  y = (a + 1) * (c - b.exp())
  below, all_of_it = y.uop.toposort(enter_calls=False), list(quickstart.toposort(y.uop, enter_calls=False))
  assert type(below) is quickstart.Below and list(below) == all_of_it and all(u in below for u in all_of_it)
  other = Tensor(arr(4, seed=3)).realize()
  assert other.uop.base not in below and (a + 2).uop not in below and (other + 1).uop not in below

SECOND = """if True:
  import sys, numpy as np, unet
  from fast import quickstart
  made, put = [], quickstart.Kept.__setitem__
  quickstart.Kept.__setitem__ = lambda cache, key, value: (made.append(key), put(cache, key, value))
  from tinygrad import Tensor
  model = unet.UNet(1, 8, (1,), 1, (), 0., 8, 4)
  x = Tensor(np.arange(2*8*8*8, dtype=np.float32).reshape(2, 8, 8, 8) % 7).realize()
  y = model.down[0][0](x, Tensor(np.ones((2, 32), np.float32)).realize(), None)
  total = y.sum().item() if OTHER else y.square().sum().item()
  print(len(made) > 0, total, y.numpy().tobytes().hex())"""

def test_a_second_program_schedules_and_lowers_nothing(tmp_path):
  def call(other=0, **env):
    own = dict(CACHEDB=str(tmp_path/"cache.db"), CACHELEVEL="2", PLAIN="0") | env
    return python(SECOND.replace("OTHER", str(other)), **own).split()
  first, second, other = call(), call(), call(1)
  assert first[0] == "True" and second[0] == "False" and first[1:] == second[1:]
  assert other[0] == "True" and other[2] == first[2]  # what is new is made
  assert call(TRANSCENDENTAL="2")[0] == "True"        # and under another setting all of it

def test_kept_schedules_know_the_kernels_code(tmp_path):
  """After an edit of a kernel nothing that was made with the old one is used."""
  for name in ("unet.py", "files", "fast"):
    copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy
    copy(ROOT/name, tmp_path/name)
  def call():
    own = dict(CACHEDB=str(tmp_path/"cache.db"), CACHELEVEL="2", PLAIN="0")
    return python(SECOND.replace("OTHER", "0"), tmp_path, **own).split()
  first = call()
  assert call()[0] == "False"
  with open(tmp_path/"fast"/"kernels.py", "a") as f: f.write("\n# edited\n")
  edited = call()
  assert edited[0] == "True" and edited[1:] == first[1:]

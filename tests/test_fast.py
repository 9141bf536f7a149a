"""What fast/ does to tinygrad: all cores, the quick start, and that none of it is needed or stays behind."""
import contextlib, ctypes, os, platform, shutil, signal, sqlite3, subprocess, sys, threading, time
from types import SimpleNamespace
import numpy as np
import pytest
import engine.capture, engine.device, fast, tinygrad.device, tinygrad.schedule
import unet
from common import ROOT, arr, close, rng
from engine.capture import captured
from engine.device import find_compiler, open_device
from fast import clang, cores, cpu, gpu, memory, opencl, quickstart, scope, threads, webgpu, workers
from test_unet import conv_by_hand, kernels, softmax
from tinygrad import Device, Tensor, dtypes, helpers
from tinygrad.runtime.support.elf import elf_loader
from tinygrad.uop.ops import Ops, UOp

with scope():
  shared_cores = pytest.mark.skipif(getattr(Device[Device.DEFAULT], "graph", None) is not cores.Team,
                                    reason="for the CPU with 2 cores or more")
with_clang = pytest.mark.skipif(Device.DEFAULT != "CPU" or not sys.platform.startswith("linux"), reason="for clang")

def python(program, cwd=ROOT, **env):
  r = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
  assert r.returncode == 0, r.stderr
  return r.stdout

# *** the rooms ***

@pytest.mark.slow
def test_without_the_folder_everything_still_works(tmp_path):
  left_out = shutil.ignore_patterns(".*", "fast", "runs", "assets", "checkpoints", "__pycache__")
  shutil.copytree(ROOT, tmp_path/"copy", ignore=left_out)
  small = "--dataset glyphs --channels 4 --channel-mult 1 --attn 4 --norm-groups 2 --T 20".split()
  def program(name, *flags):
    r = subprocess.run([sys.executable, name, *flags], cwd=tmp_path/"copy", env=os.environ | {"NOOPT": "1"},
                       capture_output=True, text=True)  # kernels as they are written compile in less time
    assert r.returncode == 0, r.stderr
    return r.stdout
  program("train.py", *small, "--steps", "1", "--batch", "2", "--sample-every", "0")
  program("sample.py", "--n", "1", "--steps", "1", "--npz", "a.npz")
  assert np.load(tmp_path/"copy"/"a.npz")["arr_0"].shape == (1, 16, 16, 1)
  assert "bits/dim" in program("evaluate.py", "--n", "1", "--samples-t", "1")

# *** the scope ***

USER = """if True:
  import importlib, os, re, sys
  import numpy as np
  import tinygrad
  from tinygrad import Device, Tensor, TinyJit, helpers, nn
  for name in {inside}: importlib.import_module(name)
  Tensor.manual_seed(1)
  conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8*6*6, 4)
  x = Tensor(np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)).realize()
  Tensor.realize(*nn.state.get_parameters([conv, linear]))
  def network():
    # a user's own: what is compiled for it, how it is run, and its numbers
    for cache in (tinygrad.schedule.schedule_cache, tinygrad.codegen.to_program_cache): cache.clear()
    f = TinyJit(lambda x: linear(conv(x).relu().flatten(1)).realize())
    out = [f(x).numpy() for _ in range(3)]
    calls = f.captured.linear.src
    return [c.src[0].src[2].arg for c in calls], [c.src[0].arg.name for c in calls], out[2].tobytes()
  def state():
    modules = [(n, m) for n, m in sys.modules.items() if n.split(".")[0] == "tinygrad"]
    classes = [(n + "." + k, c) for n, m in modules for k, c in vars(m).items() if isinstance(c, type)]
    found = {{(n, k): id(v) for n, m in modules + classes for k, v in list(vars(m).items()) if callable(v) or
              isinstance(v, (dict, property, str)) and k[:2] != "__"}}
    found |= {{("context", k): v.value for k, v in helpers.ContextVar._cache.items()}}
    cpu = Device["CPU"]
    return found | {{"env": dict(os.environ), "renderer": type(cpu.renderer), "list": cpu.renderers, "graph": cpu.graph,
                     "flags": cpu.renderer.compiler.args}}
  def same(what):
    global before
    assert network() == alone, what
    now = state()
    assert not (changed := [k for k in before if before[k] != now.get(k)]), (what, changed)
    before = state()
  alone, before = network(), state()
  import unet
  from engine import capture, device
  from fast import scope
  same("imports")
  model = unet.UNet(1, 8, (1,), 1, (8,), 0., 8, 4)
  same("a network")
  t, y = Tensor([1, 2]).realize(), x[:2, :1].contiguous().realize()
  step = capture.captured(lambda y, t: model(y, t).square().mean().gradient(*nn.state.get_parameters(model)))
  step(y, t)
  assert type(next(iter(step.jit.captured.linear.src)).src[0].arg) is str  # a graph: ours
  same("a captured step")
  step(y, t)
  same("a second step")
  try: capture.captured(lambda y: 1/0)(y)
  except ZeroDivisionError: pass
  same("a step that fails")
  with scope():
    with scope(): pass
    assert tinygrad.helpers.NOOPT.value == 1
    lazy = unet.convolve(y.permute(0, 2, 3, 1), model.conv_in.weight, model.conv_in.bias.reshape(1, 1, 1, -1))
    grads = lazy.square().sum().gradient(model.conv_in.weight)
    inside = [v.numpy() for v in (lazy + 0, *grads)]
    lazy = unet.convolve(y.permute(0, 2, 3, 1), model.conv_in.weight, model.conv_in.bias.reshape(1, 1, 1, -1))
    grads = lazy.square().sum().gradient(model.conv_in.weight)
  # kernels that were made inside and are compiled outside
  for a, b in zip(inside, (lazy + 0, *grads)): np.testing.assert_allclose(a, b.numpy(), atol=1e-5 * abs(a).max())
  same("kernels of ours that are compiled outside")
  close = abs(model(y, t).numpy() - capture.captured(lambda y, t: model(y, t))(y, t).numpy()).max()
  assert close < 1e-5, close
  print("ok")"""

@pytest.mark.slow
@with_clang
def test_a_users_own_network_finds_tinygrad_as_it_was():
  """Kernels, switches, environment, renderer, scheduler, sorting, graph: before, between and after captured steps."""
  inside = ["tinygrad.codegen", "tinygrad.engine.realize", "tinygrad.engine.jit", "tinygrad.schedule", "tinygrad.nn",
            "tinygrad.uop.ops", "tinygrad.helpers", "tinygrad.device", "tinygrad.renderer.cstyle", "tinygrad.tensor",
            "tinygrad.codegen.opt.postrange", "tinygrad.engine.worker", "tinygrad.codegen.late.coalesce",
            "tinygrad.runtime.ops_cpu", "tinygrad.runtime.support.compiler_cpu"]
  assert python(USER.format(inside=inside), PLAIN="0") == "ok\n"

def test_parts_of_opencl_buffers_are_used_by_nobody_else(monkeypatch):
  """The one change that stays: tinygrad asks for no part of a buffer on CL, before it and after it."""
  ops_cl = pytest.importorskip("tinygrad.runtime.ops_cl", exc_type=(ImportError, OSError))
  from tinygrad.schedule import memory
  buffer = UOp.new_buffer("CL", 64, unet.dtypes.float32)
  def asked(): return memory._can_plan(buffer, set()), buffer[16:32].contiguous_view()
  monkeypatch.setattr(ops_cl.CLAllocator, "_offset", lambda *args: 1/0)
  before = asked()
  opencl.install()
  assert asked() == before == (False, None) and ops_cl.CLAllocator._offset is opencl.offset

# *** captured steps ***

class Unhashable:
  """A model as a dataclass is: callable, equal to others, without a hash."""
  def __init__(self, a): self.a = a
  def __eq__(self, other): return True
  __hash__ = None
  def __call__(self, x): return x * self.a

def test_a_captured_step_is_kept_under_its_key():
  kept, calls = {}, []
  def make(model, key):
    def step(x):
      calls.append(key)
      return model(x) + 1
    return captured(step, kept, key)
  x, models = Tensor(arr(4)).realize(), [Unhashable(2.0), Unhashable(3.0)]
  for _ in range(2):
    for i, model in enumerate(models): close(make(model, ("step", id(model)))(x).numpy(), x.numpy() * (2 + i) + 1)
  assert len(calls) == len(kept) == 2
  assert captured(lambda x: x + 5) is not captured(lambda x: x + 5)  # without a dict nothing is kept
  import gc, weakref
  alive = [weakref.ref(model) for model in models]
  del models, model
  gc.collect()
  assert all(ref() is not None for ref in alive)  # or another object could have the id of one of them
  kept.clear()
  gc.collect()
  assert all(ref() is None for ref in alive)

def test_a_step_that_reads_on_the_host_runs_as_it_is():
  step = captured(lambda x: Tensor(np.sort(x.numpy())))
  for seed in (0, 1, 2): assert np.array_equal(step(Tensor(v := arr(5, seed=seed)).realize()).numpy(), np.sort(v))

# *** compiling ***

STEP = """if True:
  import os, sys, time
  import numpy as np
  def main():
    from engine.capture import captured
    from engine.device import open_device
    open_device()
    from tinygrad import Tensor
    import unet
    x, w, b = [Tensor(np.ones(s, np.float32)).realize() for s in ((2, 8, 8, 4), (3, 3, 4, 8), (1, 1, 1, 8))]
    ones = Tensor(np.ones(8, np.float32)).realize()
    step = captured(lambda x: (unet.group_norm(unet.convolve(x, w, b), ones, ones, 2) * 2).realize())
    print(step(x).numpy().shape)
    if len(sys.argv) > 1:
      import multiprocessing
      print(*[p.pid for p in multiprocessing.active_children()], flush=True)
      time.sleep(100)
  from engine.terminal import run
  run(main)"""

def compiler(tmp_path, text):
  """A shell script in the place of clang."""
  (tmp_path/"clang").write_text(f'#!/bin/sh\n{text}\nexec {clang.newest() or "clang"} "$@"\n')
  (tmp_path/"clang").chmod(0o755)
  return dict(CC=str(tmp_path/"clang"), CACHEDB=str(tmp_path/"cache.db"), DEV="CPU")

def start(program, *args, **env):
  """Without what a program of ours that ran in this process before told clang to keep to itself."""
  kept = {k: v for k, v in os.environ.items() if k != "CCC_OVERRIDE_OPTIONS"}
  return subprocess.Popen([sys.executable, "-c", program, *args], cwd=ROOT, env=kept | env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

@pytest.mark.slow
@with_clang
@pytest.mark.parametrize("plain", ["0", "1"])
def test_a_compiling_process_that_crashes_ends_the_program(plain, tmp_path):
  """With one sentence, at once. (The script crashes the process that started it, if tinygrad started that one.)"""
  crash = "tr '\\0' ' ' < /proc/$PPID/cmdline | grep -q spawn_main && kill -ABRT $PPID"
  p = start(STEP, **compiler(tmp_path, crash), PLAIN=plain)
  try: out, err = p.communicate(timeout=120)
  finally: p.kill()
  assert p.returncode == 1 and "a process that compiles kernels died" in err.splitlines()[-1] and "Trace" not in err

@pytest.mark.slow
@with_clang
def test_compiling_processes_outlive_sigterm_and_end_with_their_program(tmp_path):
  p = start(STEP, "stay", **compiler(tmp_path, ""), PLAIN="0")
  assert p.stdout.readline() == "(2, 8, 8, 8)\n"
  workers = [int(n) for n in p.stdout.readline().split()]
  def alive(): return [n for n in workers if os.path.exists(f"/proc/{n}")]
  assert workers
  for n in workers: os.kill(n, signal.SIGTERM)
  time.sleep(0.5)
  assert alive() == workers
  p.kill()
  p.communicate()
  until = time.monotonic() + 20
  while alive() and time.monotonic() < until: time.sleep(0.1)
  assert not alive()

SEARCHED = """if True:
  from engine.capture import captured
  from fast import workers
  from tinygrad import Tensor, helpers
  from tinygrad.engine import worker
  x = Tensor([1., 2., 3.]).realize()
  step = captured(lambda x: ((x * 2).exp2().contiguous(),))
  with helpers.Context(BEAM=1): found = [step(x)[0].tolist() for _ in range(3)]
  print(found[-1], workers.pool is not None, worker.worker_pool)
"""

@with_clang
def test_beam_searches_with_the_processes_that_compile(tmp_path):
  """Those of tinygrad would measure other code than is run: they know nothing of what is changed here."""
  assert python(SEARCHED, CACHEDB=str(tmp_path/"cache.db"), PLAIN="0") == "[4.0, 16.0, 64.0] True None\n"

@pytest.mark.parametrize("end", ("sys.stdin.read()", "workers.terminate()", "0"))
def test_compiling_processes_leave_no_temporary_files(tmp_path, end):
  """Killed, out of patience, or at its end: what clang reads and writes goes with the program."""
  code = ("import sys, tempfile; from fast import workers; workers.pool = workers.Pool(); "
          f"print(workers.pool.executor.submit(tempfile.mkdtemp).result(), flush=True); {end}")
  p = start(code, TMPDIR=str(tmp_path))
  assert p.stdout.readline().startswith(str(tmp_path))
  if "read" in end: p.kill()
  p.communicate(timeout=60)
  until = time.monotonic() + 20
  while list(tmp_path.iterdir()) and time.monotonic() < until: time.sleep(0.1)
  assert not list(tmp_path.iterdir())

@pytest.mark.slow
@with_clang
def test_a_compiling_process_outlives_sigterm_while_it_starts(tmp_path):
  """Sent as early as there is a Python that can send it."""
  early = "import os, sys\nif 'spawn_main' in ' '.join(sys.orig_argv): os.kill(os.getpid(), 15)"
  (tmp_path/"sitecustomize.py").write_text(early)
  p = start(STEP, **compiler(tmp_path, ""), PLAIN="0", PYTHONPATH=str(tmp_path))
  out, err = p.communicate(timeout=300)
  assert (out, p.returncode) == ("(2, 8, 8, 8)\n", 0), err

@pytest.mark.slow
@with_clang
@pytest.mark.parametrize("plain", ["0", "1"])
def test_no_warning_of_the_compiler_is_seen(plain, tmp_path):
  env = compiler(tmp_path, 'set -- -Weverything "$@"')
  p = start(STEP, **env, PLAIN=plain)
  out, err = p.communicate(timeout=300)
  assert out == "(2, 8, 8, 8)\n" and err.startswith("device: CPU\n") and "warning" not in err, err
  p = start("from tinygrad import Tensor; Tensor([1.5]).sin().tolist()", **env | {"CACHEDB": str(tmp_path/"other.db")})
  assert "warning" in p.communicate(timeout=100)[1]  # the script does bring some

PADDED = """if True:
  import numpy as np
  from engine.capture import captured
  from engine.device import open_device
  from tinygrad import Tensor, dtypes
  open_device(silent=True)
  x = Tensor((np.arange(384, dtype=np.float32) % 256).reshape(2, 3, 8, 8) / 8).cast(dtypes.bfloat16).realize()
  ends = 0, -2.5, 0.3, float("-inf")
  def step(x):
    padded = [x.pad((1, 1, 1, 1), value=v).contiguous() for v in ends]
    return padded + [Tensor.full((3,), v, dtype=dtypes.bfloat16).contiguous() for v in ends]
  for made in captured(step)(x): print(*made.float().numpy().ravel())"""

@with_clang
@pytest.mark.parametrize("plain,parallel", [("0", "2"), ("1", "2"), ("0", "0"), ("1", "0")])
def test_padding_and_constants_in_bfloat16_on_a_processor_without_instructions_for_it(plain, parallel, tmp_path):
  env = compiler(tmp_path, 'set -- "$@" -mno-avx512bf16' if platform.machine() == "x86_64" else "")
  p = start(PADDED, **env, PLAIN=plain, PARALLEL=parallel, NOOPT="1")
  out, err = p.communicate(timeout=300)
  assert p.returncode == 0, err
  found, ends = [[float(v) for v in line.split()] for line in out.splitlines()], (0, -2.5, 0.30078125, -np.inf)
  images, border = np.arange(384).reshape(2, 3, 8, 8) % 256 / 8, ((0, 0), (0, 0), (1, 1), (1, 1))
  for padded, end in zip(found[:4], ends, strict=True):  # 0.3 has 8 bits there
    close(padded, np.pad(images, border, constant_values=end).ravel(), rtol=0)
  assert found[4:] == [[end] * 3 for end in ends]

@with_clang
def test_errors_of_the_compiler_are_seen_and_warnings_are_not(capfd):
  clang.Clang(["x86_64", "native"]).compile("int f(void) { int missing; }")
  assert capfd.readouterr().err == ""
  with pytest.raises(subprocess.CalledProcessError): clang.Clang(["x86_64", "native"]).compile("int f( {")
  assert "error" in capfd.readouterr().err

@with_clang
def test_what_is_compiled_together_is_what_is_compiled_alone(tmp_path, monkeypatch, capfd):
  """The same machine code by one start of clang; of one that is wrong the error is seen; and where -cc1 fails or -###
  says nothing, each by itself."""
  loop = "for (int i = 0; i < n; i++) s += x[i] * 0.1f;"
  sources = [f"float {name}(float *x, int n) {{ float s = {begin}; {body} return s; }}"
             for name, begin, body in (("a", "1.5f", ""), ("b", "x[n]", loop), ("a", "2", loop), ("c", "0", ""))]
  arch, starts = Device["CPU"].renderer.target.arch.split(","), tmp_path/"starts"
  def images(text):
    """The machine code, compiled together; and how often the script was started."""
    monkeypatch.setenv("CC", compiler(tmp_path, f"{text}\necho start >> {starts}")["CC"])
    clang.said.cache_clear()
    starts.write_text("")
    libs = clang.Clang(arch).compile_all(sources)
    return {src: bytes(elf_loader(lib)[0]) for src, lib in libs.items()}, starts.read_text().count("start")
  own = clang.Clang(arch)
  alone = {src: bytes(elf_loader(own.compile(src))[0]) for src in sources}
  assert len(set(alone.values())) == 4 and images("") == (alone, 1)  # -### alone: what it prints is clang itself
  for fails in ("exit 1", "echo ' \"false\" \"-cc1\" \"-o\"' >&2; exit"):
    assert images(f'case "$*" in *-###*) {fails};; esac') == (alone, 4)
  with pytest.raises(subprocess.CalledProcessError): own.compile_all([*sources, "int f( {"])
  assert "error" in capfd.readouterr().err

@with_clang
def test_a_compiler_that_is_no_clang_is_not_taken(tmp_path, monkeypatch):
  (tmp_path/"gcc").write_text("#!/bin/sh\necho 'gcc (Debian 12) 12.2.0'")
  (tmp_path/"gcc").chmod(0o755)
  monkeypatch.setenv("CC", str(tmp_path/"gcc"))
  assert find_compiler() == os.environ["CC"] == clang.newest()
  env = compiler(tmp_path, "")
  monkeypatch.setenv("CC", env["CC"])
  assert find_compiler() == env["CC"]

@with_clang
def test_compiled_kernels_are_another_processors_or_compilers_own(tmp_path, monkeypatch):
  """The name under which they are kept follows what clang says of the processor, of its version and of its flags."""
  def name(text, *arch):
    monkeypatch.setenv("CC", compiler(tmp_path, text)["CC"])
    clang.said.cache_clear()
    return clang.Clang(["x86_64", *arch]).cachekey
  same, haswell, older = name("", "native"), name("", "haswell"), name("echo clang version 3 >&2", "native")
  assert len({same, haswell, older}) == 3 and name("", "native") == same
  monkeypatch.chdir(tmp_path)
  assert name("", "native") == same

@with_clang
def test_a_cache_and_a_folder_that_cannot_be_written_are_done_without(monkeypatch):
  def full(*given): raise sqlite3.OperationalError("database or disk is full")
  own = clang.Clang(Device["CPU"].renderer.target.arch.split(","))
  sources = ["int f(void) { return 5; }", "int g(void) { return 6; }"]
  for module in (clang, quickstart.helpers, tinygrad.device): monkeypatch.setattr(module, "diskcache_put", full)
  images = [bytes(elf_loader(own.compile(src))[0]) for src in sources]
  def compiled(): return [bytes(elf_loader(lib)[0]) for lib in own.compile_all(sources).values()]
  assert compiled() == images
  own.cachekey += str(time.time())
  assert bytes(elf_loader(own.compile_cached(sources[0]))[0]) == images[0]
  kept = quickstart.Kept("nothing")
  kept["a"] = 1
  assert kept["a"] == 1
  def nowhere(*given): raise OSError(28, "No space left on device")
  monkeypatch.setattr(clang.tempfile, "mkdtemp", nowhere)
  assert compiled() == images

@with_clang
def test_what_is_kept_is_for_these_settings_and_this_compiler(monkeypatch):
  """Also those that tinygrad asks the environment for, and where its own cache of what is compiled is off."""
  digests = [quickstart.Kept("nothing").digest(1)]
  monkeypatch.setenv("REDUCEOP_SPLIT_THRESHOLD", "7")
  digests += [quickstart.Kept("nothing").digest(1)]
  with helpers.Context(CCACHE=0): own = [clang.Clang(["x86_64", cpu]) for cpu in ("x86-64-v2", "x86-64-v3")]
  for c in own:
    assert c.cachekey is None
    monkeypatch.setattr(Device["CPU"].renderer, "compiler", c)
    digests += [quickstart.Kept("nothing").digest(1)]
  assert len({*digests}) == 4

def test_of_two_threads_one_is_in_the_scope(monkeypatch):
  """And tinygrad is as it was when both have left."""
  monkeypatch.setenv("PLAIN", "0")
  inside, seen, before = threading.Event(), [], dict(vars(UOp))
  def other():
    inside.wait()
    with scope(): seen.append(hasattr(UOp, "buffers_below"))
    seen.append(hasattr(UOp, "buffers_below"))
  (thread := threading.Thread(target=other)).start()
  with scope():
    inside.set()
    time.sleep(0.2)
    assert not seen
    with scope(): pass
  thread.join()
  assert seen == [True, False] and dict(vars(UOp)) == before

def test_the_cache_is_opened_by_many_threads_at_once(monkeypatch, tmp_path):
  def slowly(open_it=threads.first):
    made = open_it()
    time.sleep(0.01)  # the others see what is in the meantime
    return made
  monkeypatch.setattr(threads, "first", slowly)
  monkeypatch.setattr(threads.helpers, "CACHEDB", str(tmp_path/"cache.db"))
  wrong, start = [], threading.Barrier(8)
  def use():
    start.wait()
    try:
      for _ in range(20): threads.connection().execute("select 1").fetchone()
    except Exception as e: wrong.append(e)
  for _ in range(5):
    many = [threading.Thread(target=use) for _ in range(8)]
    for t in many: t.start()
    for t in many: t.join()
  assert not wrong

def test_processes_that_died_while_they_waited_are_replaced(monkeypatch):
  monkeypatch.setattr(workers, "pool", None)
  monkeypatch.setattr(workers.PARALLEL, "value", 2)
  for _ in range(2):
    assert sorted(workers.get().imap_unordered(abs, [-1, 2])) == [1, 2]
    for process in list(workers.pool.executor._processes.values()): process.kill()
    until = time.monotonic() + 20
    while not workers.pool.executor._broken and time.monotonic() < until: time.sleep(0.05)
    with pytest.raises(RuntimeError, match="a process that compiles kernels died"):
      list(workers.get().imap_unordered(abs, [-1, 2]))
    assert workers.pool is None

def test_copies_are_waited_for_before_they_fill_the_hosts_memory(monkeypatch):
  """Where a device keeps the host's side of each until then, as CUDA and OpenCL do."""
  class Card:
    pending_copyin = []
    def synchronize(self): waited.append(len(self.pending_copyin)) or self.pending_copyin.clear()
  card, waited = Card(), []
  monkeypatch.setattr(fast, "Device", {Device.DEFAULT: card})
  for _ in range(40):
    card.pending_copyin.append(0)
    engine.capture.placed(arr(3), Device.DEFAULT)
  assert len(waited) == 2 and max(waited) == 17

@pytest.mark.parametrize("a", [np.array(3.), arr(2, 3).T, np.arange(9, dtype=np.uint8)[::2], np.array([True, False]),
                               np.broadcast_to(np.float32(2), (3, 4))])
@pytest.mark.parametrize("card", (False, True))
def test_a_copy_is_the_same_numbers_in_a_buffer_of_its_own(a, card, monkeypatch):
  """card: the device copies between its own buffers itself."""
  allocator, want, moved = Device["CPU"].allocator, np.array(a), []
  def transfer(dest, src, size, src_dev, dest_dev):
    assert src_dev is dest_dev is Device["CPU"]
    moved.append(size)
    allocator._copyin(dest, allocator._as_buffer(src)[:size])
  monkeypatch.setattr(allocator, "_transfer", transfer, raising=False)
  monkeypatch.setattr(allocator, "supports_transfer", card)
  monkeypatch.setattr(tinygrad.engine.realize, "run_linear", None)  # no graph is planned
  first = fast.placed(a := a.copy(order="K"), "CPU")
  a[...] = 0
  second = fast.copied(first, "CPU")
  assert moved == [want.nbytes] * card
  monkeypatch.undo()
  for t in (first, second): assert t.shape == want.shape and np.array_equal(t.numpy(), want)
  first.assign((first != first).cast(first.dtype)).realize()
  assert np.array_equal(second.numpy(), want)

@pytest.mark.parametrize("plain", "01")
def test_the_weights_of_a_new_network_are_copied(monkeypatch, plain):
  """Arrays on the host, and one that is computed: whatever they are, each has a buffer of its own then."""
  monkeypatch.setenv("PLAIN", plain)
  arrays, planned, realized = [arr(3, 4), np.zeros(5, np.float32), arr(1)], [], Tensor.realize
  monkeypatch.setattr(Tensor, "realize", lambda *weights: planned.append(len(weights)) or realized(*weights))
  for more in ([], [Tensor(arr(2)) * 2]):
    weights = [*map(Tensor, arrays), *more]
    planned.clear()
    fast.realize(weights)
    assert planned == [len(weights)] * (plain == "1" or len(more))
    for w, want in zip(weights, [*arrays, arr(2) * 2]):
      assert w.device == Device.DEFAULT and w.uop.has_buffer_identity() and w.uop.base.is_realized
      assert np.array_equal(w.numpy(), want)
    assert len({w.uop.base.buffer for w in weights}) == len(weights)

@pytest.mark.parametrize("error,says", [
  (StopIteration(), "does not know this card"), (ValueError("a\nb"), "(a)"), (KeyError(), "KeyError"),
  (ExceptionGroup("none", [OSError("no /dev/kfd"), ValueError("no comgr")]), "no /dev/kfd; no comgr")])
def test_why_a_device_does_not_open(error, says, monkeypatch):
  class Devices(dict):
    DEFAULT = "NV"
    def __missing__(self, name): raise error
  monkeypatch.setenv("DEV", "NV")
  monkeypatch.setattr(engine.device, "Device", Devices())
  with pytest.raises(RuntimeError) as e: open_device(silent=True)
  assert says in str(e.value) and "DEV=NV" in str(e.value)

def test_a_card_without_a_compiler_is_one_sentence(monkeypatch):
  """tinygrad would miss it at the first kernel."""
  class HIPCCRenderer: pass
  card = SimpleNamespace(device="AMD", count=lambda: 1, renderer=HIPCCRenderer())
  monkeypatch.setattr(engine.device, "Device", {"AMD": card})
  monkeypatch.setattr(engine.device, "shutil", SimpleNamespace(which=lambda name: None if name == "hipcc" else "x"))
  with helpers.Context(DEV="AMD"), pytest.raises(RuntimeError, match="no compiler .* hipcc"): open_device(silent=True)

def test_tf32_is_of_the_run_that_asks_for_it(monkeypatch):
  """A kernel for tensor cores is another with it."""
  for name in ("ALLOW_TF32", "CC", "CCC_OVERRIDE_OPTIONS", "POCL_EXTRA_BUILD_FLAGS"):
    monkeypatch.setenv(name, os.environ.get(name, ""))  # as they are now, afterwards
  monkeypatch.setattr(engine.device, "GIVEN", 0)
  seen = []
  def part(*placeholders): return seen.append(gpu.ALLOW_TF32.value)
  for asked in (False, True, False):
    open_device(asked, silent=True)
    gpu.body(part, (), (), gpu.ALLOW_TF32.value)
    assert gpu.ALLOW_TF32.value == asked and os.environ["ALLOW_TF32"] == str(int(asked))
  assert seen == [0, 1]

@with_clang
def test_a_kernel_of_two_outputs_keeps_both(monkeypatch):
  seen, share, x = [], cores.share, Tensor(arr(2**18)).realize()
  monkeypatch.setattr(cores, "share", lambda linear: seen.append(linear) or share(linear))
  with scope(): (x + time.time() % 1).realize()  # a new number, so that its schedule is in no cache
  (call,) = seen[0].src
  assert share(seen[0]).src[0] is not call
  two = call.replace(src=(call.src[0].replace(src=call.src[0].src * 2), *call.src[1:]))
  assert len(share(UOp(Ops.LINEAR, src=(two,))).src[0].src[0].src) == 2

@with_clang
def test_a_kernel_that_cannot_be_lowered_leaves_none_without_its_code(monkeypatch, tmp_path):
  """Of those before it in the same process, which would be taken for finished the next time."""
  cache, own = {}, clang.Clang(Device["CPU"].renderer.target.arch.split(","))
  monkeypatch.setattr(workers.realize, "to_program_cache", cache)
  def lower(task):
    cache[task] = own.compile_cached(f"int f(void) {{ return {task}; }} // {tmp_path}")
    if task == 2: raise ZeroDivisionError
  with pytest.raises(ZeroDivisionError): workers.compiled(lower, [1, 2])
  assert not cache
  lower(1)
  assert cache[1][:4] == b"\x7fELF"

# *** the operations' parts ***

def test_softmax():
  s = arr(2, 5, 28, scale=30)
  with scope(): close(cpu.softmax(Tensor(s)).numpy(), softmax(s.astype(np.float64)), atol=1e-6)

def test_attention_of_many_positions_and_its_gradients():
  q, k, v, r = [arr(2, 32, 64, seed=i) for i in range(4)]
  p = softmax(q.astype(np.float64) @ k.transpose(0, 2, 1) / 8)
  dp = r @ v.transpose(0, 2, 1).astype(np.float64)
  ds = p * (dp - (dp*p).sum(-1, keepdims=True)) / 8
  with scope():
    out = cpu.attention(*(ts := [Tensor(a).realize() for a in (q, k, v)]))
    found = [g.numpy() for g in (out * Tensor(r)).sum().gradient(*ts)]
    close(out.numpy(), p @ v, atol=1e-5)
  for g, want in zip(found, (ds @ k, ds.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ r)): close(g, want, atol=1e-5)

@pytest.mark.parametrize("H,C,O,k,stride", [
  (4, 64, 96, 3, 1), (4, 96, 64, 1, 1), (4, 128, 64, 3, 2), (2, 256, 128, 3, 1), (2, 64, 64, 3, 2), (1, 32, 64, 3, 1)])
def test_a_convolution_of_many_channels_and_its_gradients(H, C, O, k, stride):
  """Of several blocks of channels; at 256 the blocks are the outer loop. By numpy in float64."""
  B, (lo, hi) = 5, (k//2, k//2) if stride == 1 else (0, 1)
  x, w, b = arr(B, H, H, C), arr(k, k, C, O, seed=1), arr(1, 1, 1, O, seed=2)
  r = arr(B, H//stride, H//stride, O, seed=3)
  xp = np.pad(x, ((0, 0), (lo, hi), (lo, hi), (0, 0))).astype(np.float64)
  dxp, dw = np.zeros(xp.shape), np.zeros(w.shape)
  for i in range(k):
    for j in range(k):
      at = np.s_[:, i:i+H:stride, j:j+H:stride]
      dxp[at] += r.astype(np.float64) @ w[i, j].T
      dw[i, j] = np.einsum("bhwc,bhwo->co", xp[at], r)
  with scope():
    y = cpu.convolve(*(ts := [Tensor(a).realize() for a in (x, w, b)]), stride=stride)
    dx, g, db = [v.numpy() for v in (y * Tensor(r)).sum().gradient(*ts)]
  for ours, want in ((y.numpy(), conv_by_hand(x, w, stride, lo, hi) + b), (dx, dxp[:, lo:lo+H, lo:lo+H]), (g, dw),
                     (db[0, 0, 0], r.sum((0, 1, 2), dtype=np.float64))): close(ours, want, atol=1e-5*abs(want).max())

# *** all cores ***

@shared_cores
@pytest.mark.parametrize("members", (1, 2, 5))
def test_captured_kernels_are_shared_among_cores(members, monkeypatch):
  monkeypatch.setattr(cores, "cores", lambda: members)
  cores.team.cache_clear()
  x, w, full = arr(24, 16, 16, 16), arr(3, 3, 16, 16, seed=1), arr(24, 16, 16, 16, seed=2)
  def step(x, w, full):
    y = unet.convolve(x, w, full)
    dx, dw = (y * full).sum().gradient(x, w)
    return y.realize(), dx.realize(), dw.realize(), (full.exp() + x).realize()
  f = captured(step)
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
    assert max(call.src[0].arg.global_size[0] for call in kernels(f)) >= 8
  finally:
    monkeypatch.undo()
    cores.team.cache_clear()

def alone(rounds:int, taken:int, stop:int, late:bool=False) -> tuple[list[int], list[int]]:
  """A kernel of so many rounds given to the first of two cores, the other never comes: the rounds it ran, its state.
  late: it is told to stop after a while."""
  ran:list[int] = []
  kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64]*32)(lambda *args: ran.append(args[31]))
  command, state = np.zeros((1, 35), np.uint64), np.array([stop, 0, taken, taken], np.uint64)
  command[0, :3] = ctypes.cast(kernel, ctypes.c_void_p).value, rounds, 31
  sleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value
  if late: threading.Timer(0.2, state.__setitem__, (0, 1)).start()
  cores.team()[0].fxn(*map(ctypes.c_uint64, (command.ctypes.data, 1, 0, 2, state.ctypes.data, sleep)))
  return ran, state.tolist()

@shared_cores
def test_a_core_that_is_taken_away_is_not_waited_for():
  ran, state = alone(rounds=5, taken=0, stop=0)
  assert ran == [0, 2, 4, 1, 3] and state[1] == 5

@shared_cores
def test_a_core_does_not_wait_for_one_that_was_interrupted():
  assert alone(rounds=5, taken=3, stop=0, late=True) == ([], [1, 0, 4, 4])  # the other had taken all and done none

@shared_cores
def test_a_core_does_not_go_on_after_one_was_interrupted():
  assert alone(rounds=5, taken=0, stop=1) == ([], [1, 0, 0, 0])

@pytest.mark.parametrize("text,n", [
  ("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_share_of_the_processor(text, n, tmp_path):
  (tmp_path/"cpu.max").write_text(text + "\n")
  assert cores.quota(str(tmp_path/"cpu.max")) == n and cores.quota(str(tmp_path/"none")) == 16

def test_no_more_processes_compile_than_a_container_has_cores(monkeypatch):
  for share, asked, n in ((2, 4, 2), (16, 3, 3)):
    monkeypatch.setattr(workers, "quota", lambda share=share: share)
    with helpers.Context(PARALLEL=asked): assert workers.Pool().executor._max_workers == n

# *** OpenCL and WebGPU ***

@pytest.mark.parametrize("device,fewer", (("CL", True), ("WEBGPU:1", True), ("QCOM", False)))
def test_buffers_are_used_again_when_nothing_needs_them_any_more(device, fewer, monkeypatch):
  """A program of random calls computes what it did, each call being a sum of hashes here, in fewer buffers."""
  monkeypatch.setattr(memory, "before", lambda linear, held: linear)
  r, sink = rng(4), UOp(Ops.SINK)
  held = [UOp.new_buffer(device, 4 + i, dtypes.float32) for i in range(3)]
  made, calls = list(held), []
  for i in range(60):
    read = [made[j] for j in r.integers(max(0, len(made) - 12), len(made), 2)] + [held[0]]
    kind = r.choice([dtypes.int32, dtypes.float32])
    written = held[1] if i in (3, 8) else UOp.new_buffer(device, int(r.integers(4, 7)), kind)
    made.append(written)
    calls.append(UOp(Ops.CALL, src=(sink, written, *read)))
  calls.append(UOp(Ops.CALL, src=(sink, held[2], *made[-3:])))
  def run(linear):
    values = {b: i for i, b in enumerate(held)}
    for call in linear.src: values[call.src[1]] = hash(tuple(values[b] for b in call.src[2:]))
    return [values[b] for b in held], len(values)
  linear = UOp(Ops.LINEAR, src=tuple(calls))
  planned = memory.plan(linear, set(held))
  (before, many), (after, few) = run(linear), run(planned)
  assert before == after and (few < many / 2 if fewer else planned is linear)
  kinds = [[(b.max_numel(), b.dtype, b.device) for b in call.src[1:]] for call in linear.src]
  assert kinds == [[(b.max_numel(), b.dtype, b.device) for b in call.src[1:]] for call in planned.src]

def test_a_number_for_webgpu_gets_one_buffer(monkeypatch):
  class WebGpuDevice:
    def create_uniform(self, val): return [val]
  monkeypatch.setattr(webgpu, "Device", SimpleNamespace(get_class={"WEBGPU": WebGpuDevice}.get))
  one, other = WebGpuDevice(), WebGpuDevice()
  made, kept = [], set()
  for _ in range(2):
    webgpu.install()
    kept.add(WebGpuDevice.create_uniform)
    made.append([device.create_uniform(v) for device in (one, other) for v in (1, 1.0, float("inf"), 2)])
  assert all(a is b for a, b in zip(*made)) and len(set(map(id, made[0]))) == 8 and made[0][2] == [float("inf")]
  assert len(kept) == 1

# *** the quick start ***

OPENED = """if True:
  import sys
  from engine.device import open_device
  from fast import opening
  made, lower = [], opening.do_to_program
  opening.do_to_program = lambda *args: made.append(args) or lower(*args)
  try: open_device()
  except RuntimeError as e: assert "mesa" in str(e)  # the library, which may not be there
  else:
    from tinygrad import Tensor
    print(len(made), (Tensor([1.0])+1).tolist(), end=" ")
  print("tinygrad.runtime.autogen.mesa" in sys.modules)"""

@with_clang
def test_the_processor_opens_without_what_it_does_not_need(tmp_path):
  """Its own kernels, which HCQ2=1 runs, are lowered once; and Mesa's declarations are imported for Mesa alone."""
  env = {"CACHEDB": str(tmp_path/"cache.db"), "HCQ2": "1"}
  assert [python(OPENED, DEV="CPU", **env) for _ in range(2)] == ["4 [2.0] False\n", "0 [2.0] False\n"]
  assert python(OPENED, DEV="CPU:LVP", **env).endswith("True\n")
  full = ("import sqlite3, tinygrad.device\ndef full(*given): raise sqlite3.OperationalError('readonly database')\n"
          "tinygrad.helpers.diskcache_put = tinygrad.device.diskcache_put = full\n")
  code = full + "from engine.device import open_device; open_device(silent=True); print('open')"
  assert python(code, DEV="CPU", CACHEDB=str(tmp_path/"new.db")) == "open\n"

def test_what_lies_below_a_node_is_what_sorting_finds():
  a, b, c = [Tensor(arr(4, seed=i)).realize() for i in range(3)]
  y, other = (a + 1) * (c - b.exp()), Tensor(arr(4, seed=3)).realize()
  all_of_it = list(y.uop.toposort(enter_calls=False))
  with scope():
    below = y.uop.toposort(enter_calls=False)
    assert type(below) is quickstart.Below and list(below) == all_of_it and all(u in below for u in all_of_it)
    assert other.uop.base not in below and (a + 2).uop not in below and (other + 1).uop not in below

@with_clang
def test_what_is_found_at_once_is_what_rewriting_finds():
  """Where views of 24 numbers begin in their buffer, by hand, None if they do not lie one after another; the rest by
  tinygrad's own ways, outside of `scope`."""
  flat = Tensor(arr(24)).realize().uop.base
  a, n = flat.reshape(4, 6), UOp.variable("n", 1, 4)
  rows, part, padded = flat.reshape(1, 24), flat[6:12].reshape(2, 3), a.pad(((1, 0), (0, 0)))
  views = {flat: 0, a: 0, a.permute((1, 0)): None, a.flip(0): None, rows.permute((1, 0)): 0, rows.flip(0): 0,
           part: 6, part.permute((1, 0)): None, flat[8:16].reshape(8, 1).permute((1, 0)): 8,
           padded: None, padded.flip(0): None, flat.pad(((1, 0),)): None, flat[8:16].bitcast(dtypes.int32): 8,
           a.shrink(((1, 3), (0, 6))): 6, a.shrink(((0, 4), (0, 3))): None, a.reshape(24, 1).expand(24, 2): None}
  def found():
    kernel = (a * 2 + n).contiguous()
    return [u.contiguous_view() for u in views], [flat[2:9], flat[:], flat[-3:], flat[::2], a[1]], kernel.variables(), \
      [a.shrink_to(s) for s in ((4, 6), (2, 6), (None, 3))], [u.shape for u in (kernel, *views)], (n*0 + 3).simplify()
  own = found()
  assert own[0] == [None if begin is None else (flat, begin) for begin in views.values()]
  with scope(): assert found() == own

SECOND = """if True:
  import sys, numpy as np, unet
  from fast import quickstart, scope
  made, put = [], quickstart.Kept.__setitem__
  quickstart.Kept.__setitem__ = lambda cache, key, value: (made.append(key), put(cache, key, value))
  from tinygrad import Tensor
  model = unet.UNet(1, 8, (1,), 1, (), 0., 8, 4)
  x = Tensor(np.arange(2*8*8*8, dtype=np.float32).reshape(2, 8, 8, 8) % 7).realize()
  with scope():
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
  assert call(TRAINING="1") == second                 # but not where no kernel depends on it

def test_kept_schedules_know_the_kernels_code(tmp_path):
  """After an edit of a kernel nothing that was made with the old one is used."""
  for name in ("unet.py", "fast"):
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

@with_clang
def test_schedules_of_captured_steps_are_kept_also_after_steps_of_ones_own(tmp_path):
  """tinygrad's pattern copies its module's globals at its first use, which here is not within a captured step."""
  program = """if True:
    from tinygrad import Tensor
    from engine.capture import captured
    x = (Tensor([1.0, 2.0]).realize() + 1).realize()
    print(captured(lambda x: (x * 2 + 1).realize())(x).tolist())"""
  env = os.environ | {"CACHEDB": str(tmp_path/"c.db"), "DEV": "CPU", "PLAIN": "0"}
  p = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
  assert p.stdout == "[5.0, 7.0]\n", p.stderr
  with contextlib.closing(sqlite3.connect(tmp_path/"c.db")) as db:
    names = [n for n, in db.execute("select name from sqlite_master where name like 'ddpm_schedules%'")]
    assert [db.execute(f"select count(*) from '{n}'").fetchone()[0] > 0 for n in names] == [True]

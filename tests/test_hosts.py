"""Several processes: what they exchange, and that two of them draw, train and measure what one does."""
import ctypes, importlib.util, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from common import ROOT, close, random_model, refused, rng
from tinygrad import Context, Device, Tensor
from tinygrad.helpers import DEV
import engine.device
from engine import hosts
from engine.device import open_device
from files import checkpoint
import evaluate, sample, train
from test_train import cache  # noqa: F401
from tools import scale
pytestmark = pytest.mark.slow

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
several = pytest.mark.skipif(not MPIRUN or not importlib.util.find_spec("mpi4py"), reason="needs mpi4py and mpirun")
SMALL = ["--batch", "8", "--channels", "8", "--channel-mult", "1", "--attn", "", "--norm-groups",
         "4", "--sample-every", "0", "--T", "50", "--dropout", "0.1",
         "--lr", "1e-3", "--warmup", "10", "--num-res-blocks", "1", "--accum", "2"]

def start(n, *command):
  launch = [MPIRUN, "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", n]
  return subprocess.Popen([*map(str, (*launch, sys.executable, *command))], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

def run(n, *command, fails=False):
  """A program in n processes; one of the house in this process for n = 1."""
  if n == 1: return {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}[command[0]].main(
    [*map(str, command[1:])])
  program = start(n, *command)
  said = program.communicate(timeout=300)[0]
  assert (program.returncode != 0) == fails, said
  return said

def train_to(step, n, out, images):
  return run(n, "train.py", *SMALL, "--dataset", images, "--out", out, "--steps", step, "--save-every", 20)

@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A file of bright images of 8x8."""
  path = tmp_path_factory.mktemp("data")/"images.npy"
  np.save(path, rng().integers(180, 220, (64, 8, 8), np.uint8))
  return path

def log(out): return [json.loads(line) for line in (out/"log.jsonl").read_text().splitlines()]
def losses(out): return [line["loss"] for line in log(out) if "loss" in line]
def norms(out): return [line["grad_norm"] for line in log(out) if "loss" in line]

# *** what they exchange ***

EXCHANGE = """
import json, sys
import numpy as np
from tinygrad import Tensor
from engine import hosts
from engine.state import State
class Model:
  def __init__(self, me):
    self.w, self.order = Tensor([1.0 + me]), Tensor([me, 7]).realize()
    self.level = Tensor([1.5 + me]).half().is_param_(False).realize()
def main():
  me, found = hosts.rank(), {"size": hosts.size()}
  state = State(Model(me))
  found["model"] = [*state.model.w.tolist(), *state.average.order.tolist(), *state.average.level.tolist()]
  found["share"] = [hosts.share(6).start, hosts.share(6).stop]
  found["gather"] = hosts.gather(np.arange(4.).reshape(2, 2) + 10 * me).tolist()
  hosts.same(array := np.array([me, 5 + me], np.float32))
  found["same"] = array.tolist()
  for device in ("CPU", "PYTHON"):
    flat = Tensor(np.array([1, 2.5, -me], np.float32), device=device).contiguous().realize()
    buffer = flat.uop.base.buffer
    hosts.total(flat)
    assert buffer is flat.uop.base.buffer
    found[device] = flat.numpy().tolist()
  print("the first alone speaks", flush=True)
  open(f"{sys.argv[1]}/{me}", "w").write(json.dumps(found))
hosts.run(main)
"""

@several
def test_what_processes_exchange(tmp_path):
  assert run(2, "-c", EXCHANGE, tmp_path).count("the first alone speaks") == 1
  for me in (0, 1):
    found = json.loads((tmp_path/str(me)).read_text())
    assert found == {"size": 2, "share": [3 * me, 3 * me + 3], "gather": [[0, 1, 10, 11], [2, 3, 12, 13]],
                     "same": [0, 5], "CPU": [2, 5, -1], "PYTHON": [2, 5, -1], "model": [1, 0, 7, 1.5]}

def test_a_device_of_cuda_is_summed_where_it_is(monkeypatch):
  """With the processor's memory for CUDA's: MPI gets its address, and no copy is made."""
  there, given = np.array([1, 2, 3], np.float32), []
  buffer = SimpleNamespace(device="CUDA:1", size=3, _buf=SimpleNamespace(value=there.ctypes.data))
  world = SimpleNamespace(Allreduce=lambda how, what: given.append(what.__cuda_array_interface__))
  monkeypatch.setattr(hosts, "mpi", lambda: SimpleNamespace(__file__="", COMM_WORLD=world, IN_PLACE=None))
  monkeypatch.setattr(hosts, "Device", {"CUDA:1": SimpleNamespace(synchronize=lambda: given.append("waited"))})
  library = SimpleNamespace(MPIX_Query_cuda_support=lambda: 1)
  monkeypatch.setattr(hosts, "ctypes", SimpleNamespace(CDLL=lambda path: library))
  hosts.total(SimpleNamespace(uop=SimpleNamespace(base=SimpleNamespace(buffer=buffer))))
  assert given[0] == "waited" and len(given) == 2
  seen = np.ctypeslib.as_array((ctypes.c_float * 3).from_address(given[1]["data"][0]))
  assert (seen == there).all() and given[1]["shape"] == (3,) and np.dtype(given[1]["typestr"]) == np.float32

def test_alone_nothing_is_imported(monkeypatch):
  code = "import sys; from engine import hosts; assert hosts.size() == 1 and 'mpi4py' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
  values = np.arange(3)
  hosts.same(values)
  assert hosts.gather(values) is values and hosts.share(7) == slice(0, 7)
  with pytest.raises(ValueError, match="8 .* 1 processes x 3 parts"): hosts.share(8, 3)

@pytest.mark.parametrize("variable", ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
def test_a_missing_or_another_mpi_is_one_sentence(variable, monkeypatch):
  alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1))
  for kind, word in ((None, "requirements-mpi.txt"), (alone, "4 processes MPI sees 1")):
    monkeypatch.setitem(sys.modules, "mpi4py", kind and SimpleNamespace(MPI=kind))
    monkeypatch.setenv(variable, "4")
    hosts.mpi.cache_clear()
    with pytest.raises(RuntimeError, match=word): hosts.mpi()
  monkeypatch.undo()
  hosts.mpi.cache_clear()

def test_each_process_of_a_host_has_a_device(monkeypatch):
  before = DEV.value
  for me, count, name in ((0, 4, "PYTHON"), (3, 4, "PYTHON:3"), (3, 2, "PYTHON:1"), (5, 1, "PYTHON")):
    DEV.value = "PYTHON"
    world = SimpleNamespace(Split_type=lambda kind, me=me: SimpleNamespace(rank=me))
    monkeypatch.setattr(hosts, "mpi", lambda world=world: SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=0))
    monkeypatch.setattr(Device["PYTHON"], "count", lambda count=count: count, raising=False)
    try:
      for _ in range(2):  # a program may open its device twice
        assert open_device(silent=True) == Device.DEFAULT == name
        assert Tensor([1.0]).device == name and (Tensor([1.0]) + 1).item() == 2
    finally: DEV.value = before

@pytest.mark.parametrize("me,count,opened", ((0, 4, "CUDA"), (3, 4, "CUDA:3"), (3, 2, "CUDA:3 CUDA CUDA:1")))
def test_a_process_opens_no_card_but_its_own(me, count, opened, monkeypatch):
  """Without $DEV as well, where there is one of NVIDIA's."""
  seen = []
  class Devices(dict):
    DEFAULT = "NV"
    def __missing__(self, name):
      seen.append(name)
      os.umask(0)
      kind, _, k = name.partition(":")
      if kind != "CUDA" or int(k or 0) >= count: raise RuntimeError("no such card")
      self[name] = SimpleNamespace(device=name, count=lambda: count, renderer=None)
      return self[name]
  monkeypatch.delenv("DEV", raising=False)
  monkeypatch.setattr(engine.device, "Device", Devices())
  monkeypatch.setattr(hosts, "local_rank", lambda: me)
  os.umask(mask := os.umask(0o27))
  with Context(DEV=""):
    assert open_device(silent=True) == DEV.device == opened.split()[-1] and os.environ["DEV"] == "CUDA"
  assert list(dict.fromkeys(seen)) == opened.split() and os.umask(mask) == mask

def test_a_step_on_paper():
  job, a = scale.Job(0.003, 25e6, 128), SimpleNamespace(fixed=2, bandwidth=25, latency=5, copy=20)
  close(scale.step(job, 1, a), 0.002 + 0.384)
  close(scale.step(job, 8, a), 0.002 + 0.048 + 0.01 + 0.007 + 0.00007)           # 100 MB: 10 ms copied, 7/4 · 4 ms
  close(scale.step(job, 8, a, 2), 0.002 + 0.048 + 0.005 + 0.0035 + 0.00007)
  close(scale.step(job, 8, a, overlap=True), 0.002 + 0.048)
  close(scale.step(job, 128, a, overlap=True), 0.002 + 0.001 + 0.01 + 0.0079375 + 0.00127)
  a.copy = 0
  close(scale.step(job, 8, a), 0.002 + 0.048 + 0.007 + 0.00007)
  refused(lambda: scale.main(["--batch", "512"]), "--batch", "--image")

# *** the programs ***

@several
def test_training_and_going_on_with_another_number(tmp_path, images, capfd):
  one, other = tmp_path/"one", tmp_path/"other"
  train_to(10, 1, one, images)
  shutil.copytree(one, other)
  train_to(40, 1, one, images)
  assert "processes from 1 to 2, sums in another order" in train_to(30, 2, other, images)
  train_to(40, 1, other, images)
  assert "processes from 2 to 1, sums in another order" in capfd.readouterr().err
  want = losses(one)
  assert len(want) == 40 and np.mean(want[-5:]) < np.mean(want[:5]) - 0.1
  close(losses(other), want, rtol=0, atol=1e-5)
  close(norms(other), norms(one), rtol=1e-4)
  assert {f.name for f in other.iterdir()} == {f.name for f in one.iterdir()}
  assert [line["note"][10:21] for line in log(other) if "note" in line] == ["from 1 to 2", "from 2 to 1"]
  text = run(3, "train.py", *SMALL, "--dataset", images, "--out", one, "--restart", fails=True)
  assert text.count("a batch of 8 is no multiple of 3 processes x 2 parts") == 1 and losses(one) == want

@several
@pytest.mark.parametrize("how", ("killed", "stopped"))
def test_a_process_that_ends_ends_all_and_the_run_goes_on(tmp_path, images, capfd, how):
  program = start(2, "train.py", *SMALL, "--dataset", images, "--out", tmp_path, "--steps", 100_000, "--save-every", 5)
  until = time.time() + 200
  while not (tmp_path/"last.safetensors").exists() and time.time() < until: time.sleep(0.05)
  children = [p.name for p in Path("/proc").glob("[0-9]*") if parent(p) == program.pid]
  assert len(children) == 2
  os.kill(int(max(children, key=int)), signal.SIGKILL if how == "killed" else signal.SIGTERM)
  said = program.communicate(timeout=60)[0]
  assert program.returncode != 0
  step = max(line["step"] for line in log(tmp_path))
  if how == "stopped": assert f"stopped at step {step} and saved" in said
  train_to(step + 3, 1, tmp_path, images)
  assert losses(tmp_path) and log(tmp_path)[-1]["step"] == step + 3 and "from step" in capfd.readouterr().err

def parent(process):
  try: return int((process/"stat").read_text().rsplit(")", 1)[1].split()[1])
  except OSError: return 0

@several
@pytest.mark.parametrize("who", ("me == 1", "True"))
def test_the_sentence_of_a_process_that_fails(who):
  code = f"""
import numpy as np
from engine import hosts
def main():
  me = hosts.rank()
  if {who}: raise ValueError("no such thing")
  hosts.gather(np.zeros(1))
hosts.run(main)"""
  said = run(2, "-c", code, fails=True)
  assert said.count("no such thing") == 1 and "Traceback" not in said

@several
def test_drawing_and_measuring(tmp_path, images):
  checkpoint.save(tmp_path/"a.safetensors", random_model(num_classes=2, channel_mult=(1,), attn_resolutions=()),
                  {"ddpm": {"T": 4, "beta_T": 0.5}, "dataset": str(images)})
  for n in (1, 2):
    flags, out = ["--checkpoint", tmp_path/"a.safetensors", "--batch", 3], tmp_path/f"{n}"
    run(n, "sample.py", *flags, "--n", 17, "--npz", f"{out}.npz", "--out", f"{out}.png", "--png", out)
    run(n, "evaluate.py", *flags, "--n", 10, "--samples-t", 2, "--ode", 2, "--json", f"{out}.json")
  for name in ("{}.npz", "{}.png", "{}/000000.png", "{}/000016.png"):
    assert (tmp_path/name.format(1)).read_bytes() == (tmp_path/name.format(2)).read_bytes(), name
  assert not list(tmp_path.glob("*.parts")) and len(os.listdir(tmp_path/"2")) == 17
  same(*(json.loads((tmp_path/f"{n}.json").read_text()) for n in (1, 2)))

def same(a, b):
  if isinstance(a, dict):
    assert a.keys() == b.keys()
    for k in a: same(a[k], b[k])
  elif isinstance(a, str) or a is None: assert a == b
  else: close(a, b, rtol=1e-6, atol=1e-6)

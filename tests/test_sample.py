"""sample.py as a program: files, batches, classes, figures, and what it refuses. Its samplers are in test_ddpm.py."""
import math, os, signal, subprocess, sys, time
import numpy as np
import pytest
from PIL import Image
from common import ROOT, TINY, close, f32
from tinygrad import Tensor
import data, sample
from ddpm import DDPM, column
from files import checkpoint, pictures
from engine.terminal import run
from sample import SAMPLERS, draw_x_T, guided
from unet import UNet

MODE, SD = 0.6, 0.1

@pytest.fixture
def command(monkeypatch, tmp_path):
  """sample.main in an empty folder, with the exact model for a network: classes 0 and 1 are its two modes."""
  meta = {"ddpm": dict(T=12, beta_1=0.1 / 12, beta_T=0.9), "dataset": "glyphs"}
  class Net:
    config = {"in_channels": 1, "image_size": 16, "num_classes": 2}
    def __call__(self, x, t, y=None):
      d = DDPM(**meta["ddpm"])
      a = column(f32(d.alpha_bar)[t], x)
      var, m = a * SD**2 + 1 - a, a.sqrt() * MODE
      side = ((x * m / var).tanh() if y is None
              else (column(y, x) == 2).where((x * m / var).tanh(), column(y, x) * 2. - 1))
      return (1 - a).sqrt() * (x - m * side) / var
  loaded, drawn, grids, ddpm, grid = [], [], [], SAMPLERS["ddpm"], pictures.grid
  monkeypatch.setattr(checkpoint, "load", lambda path, raw=False: loaded.append((path, raw)) or (Net(), meta))
  monkeypatch.setattr(pictures, "grid", lambda images, ncols=None: grids.append((images, ncols)) or grid(images, ncols))
  def counting(d, model, x_T, times, *seed, **options):
    drawn.append((len(x_T), len(times) - 1))
    return ddpm(d, model, x_T, times, *seed, **options)
  monkeypatch.setitem(SAMPLERS, "ddpm", counting)
  monkeypatch.chdir(tmp_path)
  def command(line): sample.main(["--checkpoint", "model", *line.split()])
  command.loaded, command.drawn, command.grids, command.net, command.meta = loaded, drawn, grids, Net, meta
  return command

def read(path): return np.load(path)["arr_0"]

def plain(command, n, y, w=1):
  """The images that Algorithm 2 gives without the command."""
  model = guided(command.net(), Tensor(np.asarray(y, np.int32)), w, 2)
  *_, (_, x, _) = SAMPLERS["ddpm"](DDPM(**command.meta["ddpm"]), model, draw_x_T(n, (1, 16, 16), 0), range(12, -1, -1))
  return data.to_uint8(x.numpy()).transpose(0, 2, 3, 1)

# *** samples ***

@pytest.mark.quick
def test_the_files(command):
  command("--n 5 --npz a.npz --gif a.gif --out pictures/a.png")
  a = read("a.npz")
  assert a.shape == (5, 16, 16, 1) and a.dtype == np.uint8
  close(np.asarray(Image.open("pictures/a.png")), np.asarray(pictures.grid(a.transpose(0, 3, 1, 2))), rtol=0)
  gif = Image.open("a.gif")
  assert gif.n_frames == 13
  gif.seek(12)
  close(np.asarray(gif.convert("L"), int), np.asarray(Image.open("pictures/a.png"), int), atol=3)
  kinds = (a > 127).reshape(5, -1)
  assert (kinds == kinds[:, :1]).all()                       # without a class each image has one of its own
  assert (plain(command, 5, kinds[:, 0]) == a).all()
  command("--n 5 --npz b.npz --guidance 0")
  assert (plain(command, 5, [2] * 5) == read("b.npz")).all()

def test_batch_and_n_change_no_image(command):
  for i, line in enumerate(("--n 7", "--n 7 --batch 3", "--n 4")): command(f"{line} --seed 5 --steps 6 --npz {i}.npz")
  a, b, c = map(read, ("0.npz", "1.npz", "2.npz"))
  assert a.tobytes() == b.tobytes() and a[:4].tobytes() == c.tobytes() and len({v.tobytes() for v in a}) == 7

def test_classes(command):
  command("--classes --n 3 --batch 4 --npz a.npz")
  assert [v.mean() > 127 for v in read("a.npz")] == [False] * 3 + [True] * 3
  for label in (0, 1):
    command(f"--class {label} --n 2 --npz a.npz --guidance 2")
    assert ((read("a.npz") > 127) == label).all()
  command("--n 2 --npz a.npz --guidance 0")                  # by the null label: both modes
  assert 0.3 < (read("a.npz") > 127).mean() < 0.7
  command("--n 61 --npz a.npz")                              # without a class: unmixed, both among two, in any order
  share = (read("a.npz") > 127).mean((1, 2, 3))
  assert (abs(share - 0.5) > 0.45).all()
  pairs = (share[:60] > 0.5).reshape(30, 2)
  assert (pairs.sum(1) == 1).all() and 5 < pairs[:, 0].sum() < 25

# *** figures ***

def test_figure_6(command):
  command("--progressive --n 2 --guidance 0")
  images, ncols = command.grids[-1]
  assert images.shape == (20, 1, 16, 16) and ncols == 10
  edge = np.abs(images.astype(float) - 127.5).mean((1, 2, 3)).reshape(2, 10)
  assert (edge[:, -1] > edge[:, 0] + 20).all()               # x̂_0 is grey at T and black and white at 0

def test_figure_7(command):
  command("--shared 3 --n 2 --guidance 0")
  images, ncols = command.grids[-1]
  assert images.shape == (2 * 4 * 4, 1, 16, 16) and ncols == 4
  assert len({v.tobytes() for v in images}) == len(images)
  signs = (images.reshape(2, 4, 4, 256) > 127).astype(float)
  same = [(signs[:, row, 1] == signs[:, row, 2]).mean() for row in range(4)]
  assert same[0] < 0.6 and same[3] > 0.7                     # from x_T they share nothing, from x_{T/4} most modes
  assert (signs[:, 3, 0] == signs[:, 3, 1]).mean() > 0.75    # and the first image of a row is their latent

@pytest.mark.parametrize("batch", (64, 20))
def test_figure_7_draws_no_image_twice(command, batch):
  command(f"--shared 7 --n 8 --batch {batch}")
  # the latents at T go down to T/4, then seven images from each latent at T = 12, 9, 6 and 3; batches of 19 make 57
  assert sum(n * steps for n, steps in command.drawn) == 8 * 9 + (56 if batch == 64 else 57) * (12 + 9 + 6 + 3)
  assert max(n for n, _ in command.drawn) <= batch

@pytest.mark.parametrize("guidance", ("", "--guidance 2"))
def test_each_latent_of_figure_7_has_a_class(command, guidance):
  command(f"--shared 3 --n 2 {guidance}")
  kinds = (command.grids[-1][0].reshape(2, 4, 4, 256) > 127)[:, :, 1:].reshape(2, -1)
  assert (kinds == kinds[:, :1]).all() and kinds[0, 0] != kinds[1, 0]

def test_figure_8(command):
  command("--interpolate 1 --n 2")
  images, ncols = command.grids[-1]
  assert images.shape == (26, 1, 16, 16) and ncols == 13
  glyphs = {v.tobytes() for v in data.load("glyphs", "test")[0]}
  assert [v.tobytes() in glyphs for v in images] == ([True] + [False] * 11 + [True]) * 2
  command("--interpolate 12 --n 1 --class 1 --guidance 2")
  assert (command.grids[-1][0][1:12] > 127).all()
  command("--interpolate 12 --n 1 --sampler ode --guidance 0")
  assert command.grids[-1][0].shape == (13, 1, 16, 16)
  with pytest.raises(ValueError, match="from 1 to T = 12"): command("--interpolate 13")
  with pytest.raises(ValueError, match="unknown dataset"): command("--interpolate 3 --dataset nothing")

def test_interpolation_mixes_latents_of_one_noise(command):
  d, images = DDPM(**command.meta["ddpm"]), data.load("glyphs", "test")[0][:4]
  def draw(x, labels, times, index):                          # a decoder that does nothing
    assert times == [7, 4, 0] and (index == np.repeat([0, 1], 11)).all() and (labels == np.repeat([5, 6], 11)).all()
    return {0: (x, None)}
  rows, _ = sample.interpolate(draw, d, images, np.array([5, 6]), 7, [12, 8, 7, 4, 0], 3)
  rows, x0 = rows.reshape(2, 13, 256), images.reshape(2, 2, 256) / 127.5 - 1
  close(rows[:, [0, 12]], x0, atol=1e-6)
  close(rows[:, 1:12], rows[:, [1]] + np.linspace(0, 1, 11)[:, None] * (rows[:, [11]] - rows[:, [1]]), atol=1e-5)
  eps = (rows[:, [1, 11]] - math.sqrt(d.alpha_bar[7]) * x0) / math.sqrt(1 - d.alpha_bar[7])
  assert abs(eps.std() - 1) < 0.1 and np.abs(np.corrcoef(eps.reshape(4, 256)) - np.eye(4)).max() < 0.3

# *** which weights, and what is refused ***

def test_raw_weights_and_the_newest_run(command, tmp_path):
  with pytest.raises(ValueError, match="no runs"): checkpoint.find(None, True)
  for i, name in enumerate(("old", "new")):
    for file in ("ema", "last"):
      (path := tmp_path / "runs" / name / f"{file}.safetensors").parent.mkdir(parents=True, exist_ok=True)
      path.touch()
      os.utime(path, (i, i))
  assert checkpoint.find(None, False) == "runs/new/ema.safetensors"
  assert checkpoint.find(None, True) == "runs/new/last.safetensors"
  assert checkpoint.find("runs/old", True) == "runs/old/last.safetensors"
  assert checkpoint.find("owner/name", False) == "owner/name"
  command("--n 1 --raw --steps 2")
  assert command.loaded[-1] == ("model", True)

@pytest.mark.parametrize("line", (
  "--n 0", "--n x", "--steps 0", "--seed -1", "--batch 0", "--eta 0.5", "--guidance -1", "--sampler ddim --eta 1.5",
  "--sampler nothing", "--class 0 --guidance nan", "--class 0 --classes", "--shared 2 --sampler ode",
  "--shared 2 --gif a.gif", "--classes --progressive", "--interpolate 3 --guidance 2", "--out /",
  "--npz /proc/version/a.npz", "--dataset mnist", "--unknown"))
def test_wrong_arguments_are_one_sentence(command, line):
  with pytest.raises(SystemExit) as e: command(line)
  assert str(e.value).startswith("sample.py: ") and "\n" not in str(e.value) and not command.loaded

def test_wrong_for_this_model(command):
  for line in ("--steps 13", "--class 2"):
    with pytest.raises(ValueError, match="must be from"): command(line)
  command.net.config = {**command.net.config, "num_classes": 0}
  for line in ("--class 0", "--classes", "--guidance 2"):
    with pytest.raises(ValueError, match="without classes"): command(line)
  command("--n 1 --steps 2 --npz a.npz")
  assert read("a.npz").shape == (1, 16, 16, 1)

def test_ctrl_c_is_one_sentence_and_writes_nothing(tmp_path):
  program = subprocess.Popen([sys.executable, ROOT/"sample.py", "--checkpoint", ROOT/"checkpoints"/"mnist.safetensors"],
                             cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
  for line in program.stderr:
    if "1000 steps" in line: break
  os.killpg(program.pid, signal.SIGINT)                       # as a terminal does
  text = program.communicate(timeout=60)[1]
  assert program.returncode == 130 and text.endswith("\nsample.py: stopped\n") and "Traceback" not in text
  assert not list(tmp_path.iterdir())

def test_ctrl_c_that_a_lock_turns_into_an_error():
  def main():
    try: raise KeyboardInterrupt
    finally: raise RuntimeError("release unlocked lock")
  with pytest.raises(SystemExit) as e: run(main)
  assert e.value.code == 130

@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_a_del_swallows():
  class Object:
    def __del__(self): signal.raise_signal(signal.SIGINT)
  def main():
    Object()
    time.sleep(30)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell's background
  try:
    with pytest.raises(SystemExit) as e: run(main)
    assert e.value.code == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
  finally: signal.signal(signal.SIGINT, before)

@pytest.mark.parametrize("code", (
  "open_device(); pool().apply_async(time.sleep, (999,)); time.sleep(2); worker.terminate_worker_pool()",  # a busy one
  "pool(); open_device(); pool().map(abs, range(100), chunksize=1)"))                      # some of them are replaced
def test_compiling_processes_end_with_their_program(code):
  code = f"""import time
from tinygrad.engine import worker
from engine.device import open_device
pool = worker.get_worker_pool
{code}"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PARALLEL": "2"}, timeout=60, check=True)

def test_sampling_needs_the_memory_of_one_batch(tmp_path, monkeypatch):
  checkpoint.save(tmp_path / "a.safetensors", UNet(**TINY), {"ddpm": {"T": 4, "beta_T": 0.5}})
  seen, call = [], UNet.__call__
  monkeypatch.setattr(UNet, "__call__", lambda self, x, *rest: seen.append(x.shape[0]) or call(self, x, *rest))
  sample.main(["--checkpoint", str(tmp_path / "a.safetensors"), "--n", "10", "--batch", "4",
               "--out", str(tmp_path / "a.png"), "--npz", str(tmp_path / "a.npz")])
  assert set(seen) <= {4} and len(np.load(tmp_path / "a.npz")["arr_0"]) == 10

# *** words ***

@pytest.mark.parametrize("f, number", [
  (sample.sample_ddpm, "Algorithm 2"), (sample.sample_ddim, "Eq. 12"), (sample.ddim_step, "Eq. 12"),
  (sample.sample_sde, "Eq. 6"), (sample.sample_pc, "Algorithms 3 and 5"), (sample.sample_ode, "Eq. 13"),
  (sample.sample_langevin, "Algorithm 1"), (sample.guided, "Eq. 6"), (sample.progressive, "Figure 6"),
  (sample.shared, "Figure 7"), (sample.interpolate, "Figure 8")])
def test_docstrings_begin_with_the_number(f, number):
  assert number in f.__doc__.split("\n")[0]

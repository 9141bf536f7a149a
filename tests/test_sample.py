"""sample.py: its samplers as functions, and the program: files, batches, classes, and what it refuses. test_ddpm.py has
what the samplers compute."""
import dataclasses, math, os, signal, subprocess, sys, time
import numpy as np
import pytest
from PIL import Image
from common import ROOT, TINY, close, f32, refused, rng
from tinygrad import Device, Tensor, TinyJit, dtypes
import data, sample
from ddpm import DDPM, column
from engine.streams import normals, stream
from engine.terminal import run
from extras.guidance import all_equally, guided
from extras.samplers import sde
from files import checkpoint, pictures
from sample import SAMPLERS, draw_x_T, timesteps
from test_ddpm import at_times, everywhere, exact, last, short
from unet import UNet

MODE, SD = 0.6, 0.1

# *** the samplers as functions ***

@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_refuse_at_the_call(name):
  d, x = short(10), f32(np.zeros((2, 1, 1, 1)))
  for steps in (0, -1, 11, [11, 5, 0], [5], [5, 5, 0], [0, 5], [5, -1], []):
    refused(lambda steps=steps: SAMPLERS[name](d, None, x, steps))
  wrong = {"ddim": {"eta": (-0.1, 1.1, math.nan)}, "pc": {"snr": (0, -1, math.nan)},
           "langevin": {"inner": (0,), "r": (0, 1, math.nan)}}.get(name, {})
  wrong |= {"seed": (-1, 1.5, None), "first": ([1, 2, 3], [0.5, 1], 1.5, None), "nothing": (1,)}
  for option, values in wrong.items():
    for value in values: refused(lambda o={option: value}: SAMPLERS[name](d, None, x, 5, **o),
                                 *["no option 'nothing'"] * (option == "nothing"))
  if name != "ddim": refused(lambda: SAMPLERS[name](d, None, x, 5, eta=0.5), "no option 'eta'")

def test_stdout_and_stderr_may_be_closed():
  code = "from engine.terminal import run; import sys; run(lambda: print(sys.stdout.isatty(), sys.stderr.isatty()))"
  assert subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$0" >&- 2>&-', code], cwd=ROOT).returncode == 0

def test_options_may_be_numbers_of_numpy():
  d, x_T, y = short(4), draw_x_T(2, (1, 2, 2), 0), at_times(1, 2)
  def net(x, t, y): return x * 0.5 + column(y, x) / 4
  def run(number): return last(SAMPLERS["ddim"](d, guided(net, y, number(2), 3), x_T, 4, eta=number(0.5)))
  close(run(float), run(np.float64))
  close(run(float), run(np.float32))

@everywhere
def test_image_i_is_the_same_bytes_in_any_batch(name, options):
  d, jits = short(12), {}
  model, x_T = exact(d), draw_x_T(8, (2, 3, 3), 3)
  def run(x, seed=3, **kw): return last(SAMPLERS[name](d, model, x, 6, seed=seed, jits=jits, **kw, **options)).tobytes()
  assert draw_x_T(5, (2, 3, 3), 3, first=3).numpy().tobytes() == x_T.numpy()[3:].tobytes()
  whole = run(x_T)
  assert run(x_T[:3]) + run(x_T[3:], first=3) == whole == run(x_T.numpy())
  assert run(x_T[:3], first=np.arange(3)) == run(x_T[:3])
  if name not in ("ode", "dpm") and (name, options) != ("ddim", {}):
    assert run(x_T, first=1) != whole
    assert run(x_T, seed=4) != whole

@everywhere
def test_what_was_given_stays_as_it_was(name, options):
  d, x_T = short(9), draw_x_T(3, (1, 2, 2), 0)
  before, model = x_T.numpy().copy(), exact(d)
  def run(): return SAMPLERS[name](d, model, x_T, 9, **options)
  kept = [(x.numpy().copy(), x0_hat.numpy().copy()) for _, x, x0_hat in run()]
  for (x, x0_hat), (_, x_late, x0_late) in zip(kept, list(run())):
    assert (x == x_late.numpy()).all() and (x0_hat == x0_late.numpy()).all()
  assert (x_T.numpy() == before).all()

@pytest.mark.parametrize("name", ("ddpm", "ddim", "pc"))
def test_a_model_may_leave_the_device(name):
  d, n, x_T = short(4), 4, draw_x_T(4, (1, 2, 2), 0)
  def host(x, t): return f32(exact(d)(f32(x.numpy()), Tensor(t.numpy())).numpy())
  def half_host(x, t): return x * float(t.numpy()[0]) / n     # a jit would keep the first t for ever
  def run(model): return last(SAMPLERS[name](d, model, x_T, n, clip=False))
  close(run(host), run(exact(d)), atol=1e-4)
  close(run(half_host), run(lambda x, t: x * column(t, x) / n), rtol=1e-5, atol=1e-6)

def test_a_model_may_be_any_object():
  @dataclasses.dataclass
  class Model:                                                # with __eq__ it has no hash
    k:float
    def __call__(self, x, t): return x * self.k
  d, x_T, jits = short(4), draw_x_T(2, (1, 2, 2), 0), {}
  with pytest.raises(TypeError): hash(Model(0.5))
  for k in (0.5, 0.1, 0.5):
    for kept in (None, jits):
      ours = last(SAMPLERS["ddpm"](d, Model(k), x_T, 4, jits=kept))
      close(ours, last(SAMPLERS["ddpm"](d, lambda x, t, k=k: x * k, x_T, 4)), rtol=1e-6)

@everywhere
def test_clipping_is_a_switch(name, options):
  d, x_T = short(8), draw_x_T(4, (1, 4, 4), 0)
  for clip in (True, False):
    out = [x0_hat.numpy() for _, _, x0_hat in SAMPLERS[name](d, exact(d, 3.0), x_T, 8, clip=clip, **options)]
    assert (np.abs(out).max() <= 1) == clip and (np.abs(out[-1]).max() > 2) != clip

def test_the_captured_step_is_kept_for_the_next_call_and_reads_new_labels():
  d, jits, y, calls = short(8, predict="x0"), {}, at_times(1, 1), []
  def net(x, t, y): return calls.append(0) or x * 0 + column(t, x) * 0 + column(y, x) / 4
  model, x_T = guided(net, y, 1, 3), draw_x_T(2, (1, 1, 1), 0)
  close(last(SAMPLERS["ddpm"](d, model, x_T, 8, jits=jits)), 0.25)
  n = len(calls)
  y.assign(at_times(2, 2)).realize()
  close(last(SAMPLERS["ddpm"](d, model, x_T, 8, jits=jits)), 0.5)
  assert len(calls) == n and len(jits) == 1

@pytest.mark.parametrize("name, one, other", [
  ("ddpm", {"clip": True}, {"clip": False}), ("ddim", {"eta": 0.2}, {"eta": 0.9}), ("pc", {"snr": 0.1}, {"snr": 0.4}),
  ("langevin", {"r": 0.1}, {"r": 0.4}), ("ddpm", {"steps": 6}, {"steps": 4}),
  ("ddpm", {"steps": [6, 5, 2, 0]}, {"steps": [6, 3, 2, 0]})])
def test_a_kept_step_is_not_taken_with_other_options(name, one, other):
  d, jits, x_T = short(6), {}, draw_x_T(2, (1, 2, 2), 0)
  model = exact(d, 1.5)
  def run(options, **kept):
    return [x.tolist() for _, x, _ in SAMPLERS[name](d, model, x_T, **{"steps": 6, **options}, **kept)]
  assert [run(one, jits=jits), run(other, jits=jits)] == [run(one), run(other)] and run(one) != run(other)

def test_timesteps_run_from_T_to_0():
  for T in (1, 2, 3, 50, 1000):
    for steps in range(1, T + 1) if T < 1000 else (1, 2, 10, 31, 32, 33, 500, 999, 1000):
      visits = timesteps(T, steps)
      assert len(visits) == steps + 1 and visits[0] == T and visits[-1] == 0
      assert set(np.diff(visits)) <= {-math.ceil(T / steps), -(T // steps)}
  assert timesteps(1000, 4) == [1000, 750, 500, 250, 0]

def test_noise_is_independent_of_x_T_of_other_steps_and_of_other_images():
  d, n, shape = short(10, predict="x0"), 400, (1, 8, 8)
  ratio = d.beta_tilde[1:] / d.beta[1:]
  x_T = draw_x_T(n, shape, 7)
  xs = [x_T.numpy()] + [x.numpy() for _, x, _ in SAMPLERS["ddpm"](d, lambda x, t: x * 0 + column(t, x) * 0, x_T, 10, 7)]
  z = [(x_s - math.sqrt(d.alpha[t]) * ratio[t - 1] * x_t) / math.sqrt(d.beta[t])  # Algorithm 2 with x̂_0 = 0, for z
       for t, x_t, x_s in zip(range(10, 1, -1), xs, xs[1:])]
  draws = [xs[0], *z[:3], np.roll(z[0], 1, 0), np.roll(xs[0], 1, 0), draw_x_T(n, shape, 8).numpy(),
           normals([stream(7, "latents", i) for i in range(n)], shape)]
  corr = np.corrcoef([a.ravel() for a in draws])
  assert np.abs(corr - np.eye(len(draws))).max() < 5 / math.sqrt(n * 64)
  for a in draws: assert abs(a.mean()) < 5 / math.sqrt(n * 64) and abs(a.std() - 1) < 5 / math.sqrt(2 * n * 64)

def test_all_classes_equally_from_any_image_on():
  whole = all_equally(40, 3, 5)
  assert (np.sort(whole[:39].reshape(-1, 3)) == [0, 1, 2]).all() and len({*map(tuple, whole[:39].reshape(-1, 3))}) > 3
  for first, n in ((0, 1), (1, 5), (7, 30), (39, 1)):
    assert (all_equally(n, 3, 5, first) == whole[first:first + n]).all()
  assert sorted(all_equally(3, 3, 5, 3 * 10**12)) == [0, 1, 2]  # none of those before is made

def test_guidance_0_and_1_are_identities():
  calls, t, y = [], at_times(*[5] * 4), at_times(0, 1, 2, 1)
  x = f32(rng(0).standard_normal((4, 1, 2, 2)))
  def net(x, t, y): return calls.append(x.shape[0]) or x * (column(y, x) + 1) + column(t, x) + column(y, x).sin()
  labelled, free = net(x, t, y).numpy(), net(x, t, at_times(*[3] * 4)).numpy()
  assert (guided(net, y, 1, 3)(x, t).numpy() == labelled).all() and (guided(net, y, 0, 3)(x, t).numpy() == free).all()
  assert calls == [4] * 4                                     # one evaluation, not two
  close(guided(net, y, 3.5, 3)(x, t).numpy(), 3.5 * labelled - 2.5 * free, rtol=1e-5)

def test_the_reverse_sdes_steps_are_right_where_they_are_tiny():
  """β = 8.6e-8 and α is 1 − 6e-8 or 1 − 1.2e-7 in float32. With ε̂ = 0 and z = 1 the step is √B = √−log α."""
  d = DDPM(1000, 4e-6, 0.021, schedule="geometric")
  (move,), _ = sde(d, d)
  x = f32(np.zeros((1, 1, 1, 1)))
  assert d.beta[2] < 1e-7
  moved = move(d, lambda x, t: x * 0, x, at_times(2), x + 1, True)[0].item()
  assert moved == pytest.approx(math.sqrt(d.beta[2]), rel=1e-5)

model = lambda x, t: x * (t.reshape(-1, 1, 1, 1) * 1e-3)

def test_jitted_equals_eager_for_new_t():
  d = DDPM()
  def both(x, t, z):
    out = model(x, t)
    return d.p_sample(x, t, out, z)[0] + d.vlb_term(x, z, t, out).reshape(-1, 1, 1, 1)
  jitted = TinyJit(lambda *args: both(*args).realize())
  for i in range(4):
    x, z = rng(i).standard_normal((2, 3, 1, 2, 2)) * 0.5
    args = f32(x), at_times(1, *rng(i).integers(1, 1001, 2)), f32(z)
    got = jitted(*args).numpy()
  close(got, both(*args).numpy(), rtol=1e-6)

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="names two CPU devices")
def test_sharded_equals_single_device():
  x, z = rng().standard_normal((2, 2, 1, 2, 2)).astype(np.float32)
  two = lambda a: f32(a).shard(("CPU:0", "CPU:1"), 0)
  want = DDPM().p_sample(f32(x), at_times(1, 600), f32(0.6 * x), f32(z))[0].numpy()
  close(DDPM().p_sample(two(x), at_times(1, 600), two(0.6 * x), two(z))[0].numpy(), want, rtol=1e-6)

# *** the program ***

class ExactNet:
  """The exact model in a network's place: of its classes 0 and 1 each is one of the two modes."""
  meta = {"ddpm": dict(T=12, beta_1=0.1 / 12, beta_T=0.9), "dataset": "glyphs"}
  config = {"in_channels": 1, "image_size": 16, "num_classes": 2}
  def __call__(self, x, t, y=None):
    a = column(f32(DDPM(**self.meta["ddpm"]).alpha_bar)[t], x)
    var, m = a * SD**2 + 1 - a, a.sqrt() * MODE
    side = (x * m / var).tanh()
    if y is not None: side = (column(y, x) == 2).where(side, column(y, x) * 2. - 1)
    return (1 - a).sqrt() * (x - m * side) / var

def in_the_box(monkeypatch, folder, main, **config):
  """main's command line in an empty folder, with ExactNet in --checkpoint. .loaded, .grids, .meta: what it used."""
  net, meta, grid = ExactNet(), dict(ExactNet.meta), pictures.grid
  net.config = {**net.config, **config}
  def command(line, which=()): main([*which, "--checkpoint", "model", *line.split()])
  command.loaded, command.grids, command.net, command.meta = [], [], net, meta
  def load(path, raw=False): return command.loaded.append((path, raw)) or (net, meta)
  def seen(images, columns=None, **names):
    command.grids.append((images, columns))
    return grid(images, columns, **names)
  monkeypatch.setattr(checkpoint, "load", load)
  monkeypatch.setattr(pictures, "grid", seen)
  monkeypatch.chdir(folder)
  return command

@pytest.fixture
def command(monkeypatch, tmp_path): return in_the_box(monkeypatch, tmp_path, sample.main)

def read(path, name="arr_0"): return np.load(path)[name]

def plain(command, n, y, w=1):
  """The images that Algorithm 2 gives without the command."""
  model = guided(command.net, Tensor(np.asarray(y, np.int32)), w, 2)
  *_, (_, x, _) = SAMPLERS["ddpm"](DDPM(**command.meta["ddpm"]), model, draw_x_T(n, (1, 16, 16), 0), range(12, -1, -1))
  return data.to_uint8(x.numpy()).transpose(0, 2, 3, 1)

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
  assert (read("a.npz", "arr_1") == kinds[:, 0]).all()
  command("--n 5 --npz b.npz --guidance 0")
  assert (plain(command, 5, [2] * 5) == read("b.npz")).all()

def test_batch_and_n_change_no_image(command):
  for i, line in enumerate(("--n 7", "--n 7 --batch 3", "--n 4", "--n 3 --first 2")):
    command(f"{line} --seed 5 --steps 6 --npz {i}.npz")
  a, b, c, d = [read(f"{i}.npz") for i in range(4)]
  assert a.tobytes() == b.tobytes() and a[:4].tobytes() == c.tobytes() and a[2:5].tobytes() == d.tobytes()
  assert len({v.tobytes() for v in a}) == 7

def test_the_flags_reach_the_sampler_and_the_network(command, monkeypatch):
  seen, ddim = [], SAMPLERS["ddim"]
  monkeypatch.setitem(SAMPLERS, "ddim", lambda *a, **options: seen.append(options) or ddim(*a, **options))
  def draw(line): command(f"--sampler ddim --steps 2 --n 1 {line}")
  for line, clip, eta in (("", True, None), ("--no-clip", False, None), ("--eta 0.3", True, 0.3)):
    draw(line)
    assert (seen[-1]["clip"], seen[-1].get("eta")) == (clip, eta)
  assert command.net.dtype == dtypes.float32
  command.meta["clip"] = False
  draw("--dtype bfloat16")
  assert seen[-1]["clip"] is False and command.net.dtype == dtypes.bfloat16

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

@pytest.mark.parametrize("names,asked,k", [
  (["1", "2"], "1", 0), (["1", "2"], "2", 1), (["1", "2"], "0", None), (["10", "20"], "1", None),
  (["cat", "dog"], "1", 1), (["cat", "dog"], "dog", 1), (["cat", "dog"], "2", None), (["cat", "7"], "0", None),
  ([], "1", 1), ([], "2", None)])
def test_a_class_is_asked_by_name_or_where_no_name_is_a_number_by_number(names, asked, k):
  def found(): return sample.labels_of(sample.arguments(["--class", asked, "--n", "3"]), 2, {"classes": names}, "model")
  if k is None: refused(found, f"--class {asked}", ", ".join(names) or "0 to 1")
  else: assert found().tolist() == [k] * 3

# *** which weights, and what is refused ***

def test_raw_weights_and_the_newest_run(command, tmp_path):
  with pytest.raises(ValueError, match="no runs"): checkpoint.find(None, True)
  assert os.path.samefile(checkpoint.find(), ROOT / "checkpoints" / "mnist.safetensors")
  for i, name in enumerate(("old", "new")):
    for file in ("ema", "last"):
      (path := tmp_path / "runs" / name / f"{file}.safetensors").parent.mkdir(parents=True, exist_ok=True)
      path.touch()
      os.utime(path, (i, i))
  assert checkpoint.find(None, False) == "runs/new/ema.safetensors"
  assert checkpoint.find(None, True) == "runs/new/last.safetensors"
  assert checkpoint.find("runs/old", True) == "runs/old/last.safetensors"
  assert checkpoint.find("owner/name", False) == "owner/name"
  (tmp_path / "runs" / "begun").mkdir()
  (tmp_path / "runs" / "begun" / "log.jsonl").touch()
  refused(lambda: checkpoint.find("runs/begun"), "runs/begun", "has no ema.safetensors yet")
  command("--n 1 --raw --steps 2")
  assert command.loaded[-1] == ("model", True)

@pytest.mark.parametrize("line", (
  "--n 0", "--n x", "--n", "--steps 0", "--seed -1", "--batch 0", "--eta 0.5", "--guidance -1", "--dtype float64",
  "--sampler ddim --eta 1.5", "--sampler nothing", "--class 0 --guidance nan", "--class 0 --classes",
  "--out /proc/version/a.png", "--npz /proc/version/a.npz", "--gif /proc/version/a.gif", "--unknown", "image.png"))
def test_wrong_arguments_are_one_sentence(command, line):
  refused(lambda: command(line))
  assert not command.loaded

def test_wrong_for_this_model(command):
  refused(lambda: command("--steps 13"), "steps must be from 1 to T = 12, not 13")
  refused(lambda: command("--class 2"), "--class 2", "0 to 1")
  for line in ("--class 1", "--classes"): refused(lambda line=line: command(f"{line} --guidance 0"), "--guidance 0")
  command.meta["classes"] = ["cat", "dog"]
  refused(lambda: command("--class cow"), "--class cow", "cat, dog")
  refused(lambda: command("--class ²"), "--class ²", "cat, dog")
  for line in ("--out model", "--npz ./model", "--out a.gif --gif ./a.gif", "--out b.npz --npz b.npz",
               "--npz q --png q"):
    refused(lambda line=line: command(line), "model would be written over" if "model" in line else "one name")
  refused(lambda: sample.check_places(""), "cannot write")
  refused(lambda: sample.check_places("/dev/null"), "cannot write /dev/null")
  refused(lambda: command("--n 3 --png q --out q/000002.png"), "q/000002.png would be written over by image 2")
  refused(lambda: command(f"--first {10**20}"), "--first")
  command("--class dog --n 1 --npz a.npz")
  assert (read("a.npz") > 127).all()
  command.net.config["num_classes"] = 0
  for line in ("--class 0", "--classes", "--guidance 2"): refused(lambda line=line: command(line), "without classes")
  command("--n 1 --steps 2 --npz a.npz")
  assert read("a.npz").shape == (1, 16, 16, 1) and "arr_1" not in np.load("a.npz")
  command.meta["ddpm"] = {"T": 12, "nothing": 1}
  refused(lambda: command("--n 1"), "model does not describe its diffusion")

def test_the_images_of_the_model_are_not_written_over(command, tmp_path):
  np.savez("set.npz", images=np.zeros((2, 16, 16), np.uint8))
  (tmp_path/"photos").mkdir()
  Image.new("L", (16, 16)).save("photos/a.png")
  for name, line in (("set.npz", "--npz ./set.npz"), ("photos/", "--out photos/a.png"), ("photos", "--png photos"),
                     ("photos", "--gif photos/deep/a.gif"), (str(tmp_path/"photos"), "--png photos/more")):
    command.meta["dataset"] = name
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    refused(lambda line=line: command(f"--n 1 --steps 2 {line}"), line.split()[1])
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
  command.meta["dataset"] = "photos"
  command("--n 1 --steps 2 --png photos-2 --out a.png")

def test_classes_of_which_there_were_no_images_are_not_drawn(command):
  """Labels counted from 1: of class 0 the network knows nothing."""
  command.meta |= {"classes": ["0", "1"], "untrained": [0]}
  for flags in ("--n 5", "--classes --n 5"):
    command(f"{flags} --npz a.npz")
    assert (read("a.npz") > 127).all() and read("a.npz", "arr_1").tolist() == [1] * 5
  assert command.grids[-1][0].shape[0] == 5 and command.grids[-1][1] == 5
  refused(lambda: command("--class 0"), "--class 0: model knows 1")

def test_ctrl_c_is_one_sentence_and_writes_nothing(tmp_path):
  program = subprocess.Popen([sys.executable, ROOT/"sample.py", "--checkpoint", ROOT/"checkpoints"/"mnist.safetensors"],
                             cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
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

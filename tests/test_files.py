"""What serves the scripts: random streams, atomic writing, pictures, the terminal, checkpoints, diffusers' layout."""
import argparse, contextlib, functools, json, os, re, shutil, stat, subprocess, sys
import numpy as np
import pytest
import train, unet
from common import GOLDEN, ROOT, TINY, arr, random_model, refused
from files import checkpoint, hub, pictures, terminal
from files.atomic import atomic, sweep
from engine.streams import USES, stream
from files.weights import read_tensors, write_tensors
from PIL import Image
from tinygrad import nn

# *** streams of random numbers ***

def test_no_two_uses_share_a_stream():
  """Whatever their indices: the first four numbers of every stream of a use differ from those of all other uses."""
  owner:dict[tuple[float, ...], str] = {}
  indices = ((), *((i,) for i in range(40)), *((i, j) for i in range(8) for j in range(8)))
  for seed in (0, 1, 7):
    for use in USES:
      for index in indices: assert owner.setdefault(tuple(stream(seed, use, *index).random(4)), use) == use
  numbers = np.array(list(owner))
  for seed in (0, 1, 7):  # nor do the network's initial weights, numpy's own streams and the glyphs (1 and 2)
    weights = unet.UNet(**TINY, seed=seed).time1.weight.numpy().ravel()[:4] / np.sqrt(6 / (8 + 32))  # uniform in -1..1
    for first in ((weights + 1) / 2, np.random.default_rng(seed).random(4), np.random.default_rng(2).random(4)):
      assert np.abs(numbers - first).max(1).min() > 1e-3
  for bad in (lambda: stream(-1, "z", 0), lambda: stream(0, "unheard of")):
    with pytest.raises(ValueError): bad()

def test_flips_know_nothing_of_the_times():
  """Image i was once flipped at step n + 1 if and only if t of image 2i + 1 at step n was at most T/2."""
  images = np.tile(np.arange(8, dtype=np.uint8), (256, 1, 1, 1))
  a = argparse.Namespace(T=1000, batch=256, seed=3, flip=True, times="uniform", dequantize=False, drop_labels=0.0,
                         accum=1)
  drawn = [train.draw(a, images, np.zeros(256, np.int32), 0, n)[:2] for n in range(1, 61)]
  agree = [(x[:128, 0, 0, 0] > 0) == (t[1::2] <= 500) for (_, t), (x, _) in zip(drawn, drawn[1:])]
  assert 0.45 < np.mean(agree) < 0.55  # of 59 x 128; its deviation is 0.006

# *** atomic writing ***

def half_written(path):
  """A program in the middle of writing a file."""
  program = """if True:
    import sys
    from files.atomic import atomic
    with atomic(sys.argv[1]) as f:
      f.write(b"half of it")
      f.flush()
      print("ready", flush=True)
      f.write(sys.stdin.buffer.read())"""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  writer = subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT, **pipes)
  assert writer.stdout.readline() == b"ready\n"
  return writer

def test_what_killed_programs_left_is_removed(tmp_path):
  (tmp_path / "mine.tmp").write_bytes(b"a user's")
  (tmp_path / ".0123.tmp").write_bytes(b"a user's")
  killed, live = half_written(tmp_path / "a"), half_written(tmp_path / "b")
  killed.kill()
  killed.wait()
  left = set(os.listdir(tmp_path))
  assert len(left) == 4
  with atomic(tmp_path / "c") as f: f.write(b"c")
  rest = left & set(os.listdir(tmp_path))
  assert len(rest) == 3 and {"mine.tmp", ".0123.tmp"} < rest  # the live program's stays
  live.communicate(b", all of it")
  assert live.returncode == 0 and (tmp_path / "b").read_bytes() == b"half of it, all of it"
  assert sorted(os.listdir(tmp_path)) == [".0123.tmp", "b", "c", "mine.tmp"]

def test_two_programs_write_one_file(tmp_path):
  """And each removes over and over what nobody holds: whoever reads finds one program's bytes, whole."""
  program = """if True:
    import sys
    from files.atomic import atomic, sweep
    for _ in range(50):
      sweep.cache_clear()
      with atomic(sys.argv[1]) as f: f.write(sys.argv[2].encode() * 100_000)"""
  path = tmp_path / "file"
  writers = [subprocess.Popen([sys.executable, "-c", program, path, letter], cwd=ROOT) for letter in "ab"]
  while any(w.poll() is None for w in writers):
    if path.exists(): assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    sweep.cache_clear()
    sweep(tmp_path)
  assert [w.returncode for w in writers] == [0, 0] and os.listdir(tmp_path) == ["file"]

def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  synced, named, fsync, replace = set(), [], os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
  def rename(old, new):
    assert os.stat(old).st_ino in synced
    named.append(os.path.basename(new))
    replace(old, new)
  monkeypatch.setattr(os, "replace", rename)
  images, model = np.zeros((2, 1, 8, 8), np.uint8), unet.UNet(**TINY)
  pictures.save_png(tmp_path / "a.png", pictures.grid(images))
  pictures.save_gif(tmp_path / "a.gif", [pictures.grid(images)])
  pictures.save_npz(tmp_path / "a.npz", images)
  pictures.loss_curve(tmp_path / "b.png", [1, 2], [1.0, 0.5], [1.0, 0.8])
  checkpoint.save(tmp_path / "a.safetensors", model)
  hub.save(tmp_path / "folder", model)
  files = [p.name for p in tmp_path.rglob("*") if p.is_file()]
  assert len(files) == 8 and sorted(files) == sorted(named)

@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, error):
  path = tmp_path / "file"
  path.write_bytes(b"old")
  with pytest.raises(error), atomic(path) as f:
    f.write(b"half of the new")
    f.flush()
    assert path.read_bytes() == b"old"
    raise error
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
  with atomic(path) as f: f.write(b"new")
  assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]

def test_a_new_file_is_like_any_other(tmp_path):
  (tmp_path / "plain").write_bytes(b"")
  with atomic(tmp_path / "file") as f: f.write(b"1")
  assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)
  (tmp_path / "link").symlink_to(tmp_path / "file")
  with atomic(tmp_path / "link") as f: f.write(b"2")
  assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"2"

def test_places_that_cannot_be_written(tmp_path):
  picture = Image.new("L", (4, 4))
  (tmp_path / "file").write_bytes(b"old")
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path, tmp_path / "file" / "a.png", tmp_path / "pipe", tmp_path / ("x" * 300), "/", "/proc/no/a.png"):
    refused(lambda: pictures.save_png(path, picture), "cannot write", path)
  refused(lambda: pictures.save_png(tmp_path / "file" / "a.png", picture), "is a file, not a folder")
  refused(lambda: pictures.save_png(tmp_path / ("x" * 300), picture), "too long")
  assert (tmp_path / "file").read_bytes() == b"old" and {p.name for p in tmp_path.iterdir()} == {"file", "pipe"}

# *** pictures ***

@pytest.mark.parametrize("shape, ncols, scale, size", [
  ((5, 3, 4, 6), 3, 2, (3 * 14 + 2, 2 * 10 + 2)), ((1, 1, 8, 8), 9, 1, (12, 12)),
  ((16, 1, 28, 28), None, None, (234, 234)), ((64, 3, 32, 32), None, None, (530, 530)),
  ((2, 1, 300, 200), None, None, (406, 304))])
def test_grid_geometry(shape, ncols, scale, size):
  images = np.random.default_rng(0).integers(0, 128, shape, np.uint8)
  picture = pictures.grid(images, ncols, scale)
  assert picture.size == size and picture.mode == ("L" if shape[1] == 1 else "RGB")
  pixels = np.asarray(picture).reshape(size[1], size[0], -1)
  columns = ncols and min(ncols, shape[0]) or int(np.ceil(shape[0] ** 0.5))
  cell = (size[0] - 2) // columns - 2
  k = cell // shape[3]
  seen = np.zeros(pixels.shape[:2], bool)
  for i in range(shape[0]):
    top, left = 2 + i // columns * (shape[2] * k + 2), 2 + i % columns * (cell + 2)
    area = slice(top, top + shape[2] * k), slice(left, left + cell)
    assert np.array_equal(pixels[area][::k, ::k].transpose(2, 0, 1), images[i])
    assert np.array_equal(pixels[area][k - 1::k, k - 1::k].transpose(2, 0, 1), images[i])
    seen[area] = True
  assert (pixels[~seen] == 128).all()

def test_grid_is_seen_and_fits():
  assert pictures.grid(np.zeros((1, 1, 16, 16), np.uint8)).size[0] >= 56 + 4
  for n in (1000, 5000): assert max(pictures.grid(np.zeros((n, 1, 16, 16), np.uint8)).size) <= 1600
  assert max(pictures.grid(np.zeros((50, 1, 16, 16), np.uint8), 2).size) <= 1600
  for bad in (np.zeros((0, 1, 8, 8), np.uint8), np.zeros((2, 2, 8, 8), np.uint8), np.zeros((2, 1, 8, 8))):
    for call in (pictures.grid, pictures.to_terminal, functools.partial(pictures.save_npz, "/nowhere/x.npz")):
      refused(lambda: call(bad), str(bad.shape))
  refused(lambda: pictures.grid(np.zeros((2, 1, 8, 8), np.uint8), 0), "0 columns")
  refused(lambda: pictures.grid(np.zeros((2, 1, 8, 8), np.uint8), 2, 0), "0 times")

@pytest.mark.parametrize("c, h", [(3, 4), (1, 5)])
def test_the_terminal_shows_the_pixels(c, h):
  images = np.random.default_rng(0).integers(0, 256, (3, c, h, 5), np.uint8)
  images[0] //= 128  # long runs of one colour
  text = pictures.to_terminal(images, columns=11)  # room for two of five and a gap
  rows = []
  for line in text.split("\n"):
    assert line.endswith("\033[0m") and line.count("▀") == 11
    upper, lower, now = [], [], None
    for codes, block in re.findall(r"\033\[38;2;([\d;]+)m|(▀)", line):
      if codes: now = [int(v) for v in codes.replace("48;2;", "").split(";")]
      if block: upper.append(now[:3]), lower.append(now[3:])
    rows += [upper, lower]
  shown = np.array(rows).transpose(2, 0, 1)
  for i in range(2): assert (shown[:, :h, 6 * i:6 * i + 5] == images[i]).all()
  assert not shown[:, :, 5].any() and not shown[:, h:].any()
  assert pictures.to_terminal(images, columns=2).split("\n")[0].count("▀") == 5  # at least one

def test_captions_under_images():
  k = np.full((3, 1, 28, 28), 40, np.uint8)
  sheet = np.asarray(pictures.captioned(k, ["1.234", "5", ""]))
  assert sheet.shape[2] == 3 and (sheet == 40).all(2).sum() >= 3 * 84 * 84
  tiles = [sheet[2 + r * 102:102 + r * 102, 2 + c * 86:86 + c * 86] for r, c in ((0, 0), (0, 1), (1, 0))]
  ink = [(tile[84:] < 128).sum() for tile in tiles]
  assert ink[0] > ink[1] > ink[2] == 0

def test_files_hold_what_was_saved(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 9), np.uint8)
  pictures.save_png(tmp_path / "new" / "folder" / "a.png", pictures.grid(images, 3, 1))
  assert np.array_equal(np.asarray(Image.open(tmp_path / "new/folder/a.png")), np.asarray(pictures.grid(images, 3, 1)))
  pictures.save_npz(tmp_path / "a.npz", images[:, :1])
  with np.load(tmp_path / "a.npz", allow_pickle=False) as z:
    assert z.files == ["arr_0"] and z["arr_0"].dtype == np.uint8
    assert np.array_equal(z["arr_0"], images[:, 0, :, :, None])
  pictures.save_gif(tmp_path / "a.gif", [pictures.grid(image[None], scale=1) for image in images], ms=50)
  gif = Image.open(tmp_path / "a.gif")
  times = []
  for i in range(gif.n_frames):
    gif.seek(i)
    times.append(gif.info["duration"])
  assert times == [50, 50, 2000] and gif.info["loop"] == 0
  refused(lambda: pictures.save_gif(tmp_path / "b.gif", []), "b.gif")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.npz", "new"]

BLUE, RED = (31, 119, 180), (214, 39, 40)  # the first curves' colours

def where(picture, colour):
  """Rows and columns of the pixels of a curve, below the legend."""
  near = np.abs(np.asarray(picture).astype(int) - colour).sum(2) < 60
  y, x = np.nonzero(near[64:])
  return y + 64, x

def test_plot_draws_what_it_is_given():
  xs = np.arange(101)
  y, x = where(pictures.plot({"up": (xs, xs**2)}, "title", "x", "y"), BLUE)
  at = lambda column: y[np.abs(x - column) < 2].mean()
  left, right = x.min(), x.max()
  assert right - left > 600 and abs(at(left) - y.max()) < 5 and abs(at(right) - y.min()) < 5
  half = at((left + right) / 2)
  assert abs((y.max() - half) / (y.max() - y.min()) - 0.25) < 0.02  # (1/2)^2
  y, x = where(pictures.plot({"e": (xs, np.exp(xs / 5.0))}, log_y=True), BLUE)
  assert abs(y[np.abs(x - (x.min() + x.max()) / 2) < 2].mean() - (y.min() + y.max()) / 2) < 3  # a straight line
  y, x = where(pictures.plot({"two": (xs, xs), "parts": (xs, np.where(abs(xs - 50) < 20, np.nan, -xs))}), RED)
  assert len(x) and not ((x > x.min() + 0.35 * (x.max() - x.min())) & (x < x.min() + 0.65 * (x.max() - x.min()))).any()

@pytest.mark.parametrize("log_y", [False, True])
def test_plot_of_nearly_nothing(log_y):
  for series in ({}, {"a": ([], [])}, {"a": ([1], [np.nan])}, {"a": ([1, 2], [5, 5])}, {"a": ([0, 1], [-1, 0])},
                 {"a": ([0, 1e-12], [1e9, 1e9 + 1])}, {"a": ([0, 1e12], [1e-300, 1e300])},
                 {"a": ([1, 2], [np.inf, 3])}):
    assert pictures.plot(series, "title", "x", "y", log_y).size == (720, 440)
  y, x = where(pictures.plot({"dot": ([3, 4, 5], [7, np.nan, np.nan])}, log_y=log_y), BLUE)
  assert 10 < len(x) < 60 and abs(x.mean() - 370) < 40 and abs(y.mean() - 235) < 40  # a dot in the middle
  refused(lambda: pictures.plot({"uneven": ([1, 2], [1])}), "uneven")

def test_ticks_are_round_numbers():
  assert [text for _, text in pictures.ticks(0, 1)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
  assert [text for _, text in pictures.ticks(0, 20000)] == ["0", "5,000", "10,000", "15,000", "20,000"]
  assert [text for _, text in pictures.log_ticks(-2, 1)] == ["0.01", "0.1", "1", "10"]
  for lo, hi in ((-0.3, 0.7), (2.9, 3.1), (1e-7, 3e-7), (-5e8, 4e9)):
    ticks = pictures.ticks(lo, hi)
    assert 3 <= len(ticks) <= 8 and all(lo <= v <= hi for v, _ in ticks)
    assert all(abs(float(text.replace(",", "")) - v) <= 1e-3 * (hi - lo) for v, text in ticks)

# *** the terminal ***

def test_progress_passes_everything_on(capsys, monkeypatch):
  assert list(terminal.progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4] and capsys.readouterr().err == ""
  clock = iter(range(0, 1000, 6))
  monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
  assert list(terminal.progress(["ab", "cd"], "counting", 4, len)) == ["ab", "cd"]
  assert re.findall(r"(\d+)%.*counting", capsys.readouterr().err) == ["50", "100"]

@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_shows_nothing_that_a_user_cannot_act_on():
  """pip's warnings (-qq leaves its errors) and PoCL's (-w); what ARGS says reaches pytest."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
  command = ["make", "-C", ROOT, "-n", "-B", "test", "ARGS=-k eq7"]
  lines = subprocess.run(command, env=env, capture_output=True, text=True).stdout.splitlines()
  installs = [line for line in lines if "pip install" in line]
  assert installs and all(" -qq " in line for line in installs)
  assert any("POCL_EXTRA_BUILD_FLAGS=-w" in line and line.endswith("-k eq7") for line in lines)

# *** checkpoints ***

@pytest.mark.parametrize("case", ["diffusers_tiny", "diffusers_tiny_old_names"])
def test_diffusers_layout_round_trip(case, tmp_path):
  if not (GOLDEN/case).exists(): pytest.skip("the known answers are not on this machine")
  model, _ = checkpoint.load(GOLDEN/case)
  hub.save(tmp_path/"copy", model, {"ddpm": {"T": 50}})
  theirs, ours = [read_tensors(f/"diffusion_pytorch_model.safetensors")[0] for f in (GOLDEN/case, tmp_path/"copy")]
  assert sorted(v.tobytes() for v in theirs.values()) == sorted(v.tobytes() for v in ours.values())
  again, meta = checkpoint.load(tmp_path/"copy")
  assert meta["ddpm"]["T"] == 50 and again.config == model.config
  for (k, v), w in zip(nn.state.get_state_dict(model).items(), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy()), k

def test_checkpoint_round_trip_and_refusals(tmp_path):
  model = random_model(num_classes=3)
  checkpoint.save(tmp_path/"a.safetensors", model, {"ddpm": {"T": 7}, "dataset": "x"})
  again, meta = checkpoint.load(tmp_path/"a.safetensors")
  assert meta["ddpm"] == {"T": 7} and tuple(again.config["channel_mult"]) == (1, 2)
  for v, w in zip(nn.state.get_parameters(model), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy())
  tensors, _ = read_tensors(tmp_path/"a.safetensors")
  for fourier in ((), (7, 8)):  # an argument of earlier versions
    write_tensors(tmp_path/"old.safetensors", tensors, {"unet": {**model.config, "fourier": fourier}})
    with contextlib.nullcontext() if not fourier else pytest.raises(ValueError, match="fourier"):
      assert checkpoint.load(tmp_path/"old.safetensors")[0].config == model.config
  with pytest.raises(OSError): checkpoint.load(tmp_path/"missing.safetensors")
  (tmp_path/"p.bin").write_bytes(b"\x80\x04")
  with pytest.raises(ValueError, match="pickle"): checkpoint.load(tmp_path/"p.bin")
  for change, match in ((lambda t: t.pop("mid.1.q.bias"), "lacks tensor 'mid.1.q.bias'"),
                        (lambda t: t.update(extra=np.zeros(1, np.float32)), "unknown tensor 'extra'"),
                        (lambda t: t.update({"conv_in.bias": np.zeros(9, np.float32)}), "conv_in.bias.*shape"),
                        (lambda t: t.update({"conv_in.bias": np.full(8, np.nan, np.float32)}), "not finite")):
    changed = dict(tensors)
    change(changed)
    write_tensors(tmp_path/"b.safetensors", changed, {"unet": model.config})
    with pytest.raises(ValueError, match=match): checkpoint.load(tmp_path/"b.safetensors")
  for key, value, match in (("act_fn", "relu", "act_fn"),
                            ("down_block_types", ["ResnetDownsampleBlock2D", "DownBlock2D"], "ResnetDownsampleBlock2D"),
                            ("norm_eps", 1e-5, "norm_eps")):
    config, _ = hub.to_diffusers(unet.UNet(**TINY), {})
    (tmp_path/"d").mkdir(exist_ok=True)
    (tmp_path/"d"/"config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=match): checkpoint.load(tmp_path/"d")
  with pytest.raises(ValueError, match="class labels"): hub.save(tmp_path/"none", unet.UNet(**TINY, num_classes=3))
  assert not (tmp_path/"none").exists()
  with pytest.raises(ValueError, match="divide"): unet.UNet(**{**TINY, "image_size": 9})
  with pytest.raises(ValueError, match="groups"): unet.UNet(**{**TINY, "norm_groups": 3})

def test_damaged_checkpoints_are_read_right_or_refused(tmp_path):
  write_tensors(tmp_path/"a.safetensors", {"x": arr(3, 4), "y": np.arange(5, dtype=np.int32)}, {"unet": {}})
  good, rng, read = (tmp_path/"a.safetensors").read_bytes(), np.random.default_rng(0), 0
  n = int.from_bytes(good[:8], "little")
  cases = [(2**60).to_bytes(8, "little") + good[8:], b"", good[:7], good[:8+n], good + b"\0"]
  for i in range(1200):
    b, at = bytearray(good), int(rng.integers(len(good) if i % 3 else 8+n))
    kind = i % 4
    if kind < 2: b[at] ^= 1 << int(rng.integers(8))
    elif kind == 2: del b[at:at+int(rng.integers(1, 40))]
    else: b[at:at] = rng.integers(0, 256, int(rng.integers(1, 40)), np.uint8).tobytes()
    cases.append(bytes(b))
  for c in cases:
    (tmp_path/"b.safetensors").write_bytes(c)
    try: tensors, _ = read_tensors(tmp_path/"b.safetensors")
    except (ValueError, OSError) as e: assert "\n" not in str(e)
    else:
      read += 1
      assert sum(v.nbytes for v in tensors.values()) <= len(c)
  assert 0 < read < len(cases)/2  # flipped bits of a weight cannot be seen

def test_tensors_that_overlap_or_lie_outside_are_refused(tmp_path):
  write_tensors(tmp_path/"a.safetensors", {"x": arr(4), "y": arr(4, seed=1)}, {})
  good = (tmp_path/"a.safetensors").read_bytes()
  for places in (b"[00,16]", b"[32,48]", b"[20,36]"):  # where y's [16,32] should stand
    (tmp_path/"b.safetensors").write_bytes(good.replace(b"[16,32]", places))
    with pytest.raises(ValueError, match="b.safetensors"): read_tensors(tmp_path/"b.safetensors")
  (tmp_path/"b.safetensors").write_bytes(good.replace(b"[0,16]", b"[8,24]").replace(b"[16,32]", b"[24,40]") + bytes(8))
  with pytest.raises(ValueError, match="does not lie"): read_tensors(tmp_path/"b.safetensors")
  (tmp_path/"b.safetensors").write_bytes(good.replace(b"[16,32]", b"[ 0,16]"))  # the same place twice
  with pytest.raises(ValueError, match="does not lie"): read_tensors(tmp_path/"b.safetensors")

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  write_tensors(tmp_path/"a.safetensors", {"x": arr(3)}, {})
  before = (tmp_path/"a.safetensors").read_bytes()
  def full(*_): raise OSError(28, "No space left on device")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="a.safetensors.*No space left"):
    write_tensors(tmp_path/"a.safetensors", {"x": arr(30)}, {})
  assert (tmp_path/"a.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]

def test_sharded_files_are_put_together(tmp_path):
  hub.save(tmp_path, model := random_model())
  whole = tmp_path / "diffusion_pytorch_model.safetensors"
  tensors, _ = read_tensors(whole)
  names = {k: f"part-{i % 2}.safetensors" for i, k in enumerate(tensors)}
  for part in set(names.values()):
    write_tensors(tmp_path / part, {k: v for k, v in tensors.items() if names[k] == part}, {})
  (tmp_path / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
  whole.unlink()
  again, _ = hub.load(tmp_path)
  for v, w in zip(nn.state.get_parameters(model), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy())
  (tmp_path / "part-1.safetensors").unlink()
  with pytest.raises(OSError, match="part-1"): hub.load(tmp_path)

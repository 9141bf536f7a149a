"""What is read and written: random streams, atomic writing, pictures, the bar, checkpoints."""
import json, math, os, re, shutil, stat, subprocess, sys, tracemalloc, types
import numpy as np
import pytest
import unet
from common import ROOT, TINY, arr, random_model, refused
from files import bar, checkpoint, hub, pictures
from files.atomic import atomic, sweep
from engine.streams import USES, stream
from files.weights import fill, open_tensors, read_tensors, write_tensors
from PIL import Image
from tinygrad import Tensor, nn

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
  assert len(files) == 9 and sorted(files) == sorted(named)

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

@pytest.mark.parametrize("value, words", [(np.int8(3), "int8"), (np.float64(1e300), "not finite")])
def test_weights_that_are_no_float32_are_refused(tmp_path, value, words, recwarn):
  model = unet.UNet(**TINY)
  checkpoint.save(tmp_path / "a.safetensors", model)
  tensors, _ = read_tensors(tmp_path / "a.safetensors")
  tensors["conv_in.bias"] = np.full(tensors["conv_in.bias"].shape, value)
  write_tensors(tmp_path / "b.safetensors", tensors, {"unet": model.config})
  refused(lambda: checkpoint.load(tmp_path / "b.safetensors"), "conv_in.bias", words)
  assert not [w for w in recwarn if w.category is RuntimeWarning]

# *** what a user sees ***

def test_progress_passes_everything_on(capsys, monkeypatch):
  assert list(bar.progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4] and capsys.readouterr().err == ""
  clock = iter(range(0, 1000, 6))
  monkeypatch.setattr(bar.time, "monotonic", lambda: next(clock))
  assert list(bar.progress(["ab", "cd"], "counting", 4, len)) == ["ab", "cd"]
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

@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("target, name", (("box", "mnist"), ("density", "mnist-density")))
def test_make_takes_a_models_folder_by_out_alone(target, name):
  env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
  def make(*more):
    return subprocess.run(["make", "-n", target, *more], cwd=ROOT, env=env, capture_output=True, text=True)
  for folder, more in ((f"runs/{target}", ()), ("my runs/b", ("OUT=my runs/b", "ARGS=--steps 3"))):
    *_, train, half = make(*more).stdout.splitlines()
    assert train.endswith(f'{" --steps 3" * bool(more)} --out "{folder}"') and f'"{folder}/{name}.safetensors"' in half
  for said in ("--out x", "--out=x"):
    r = make(f"ARGS=--restart {said}")  # which would begin runs/… anew
    assert r.returncode and "OUT=" in r.stderr and "train.py" not in r.stdout, (r.stdout, r.stderr)

# *** checkpoints ***

def test_checkpoint_round_trip_and_refusals(tmp_path):
  model = random_model(num_classes=3)
  checkpoint.save(tmp_path/"a.safetensors", model, {"ddpm": {"T": 7}, "dataset": "x"})
  again, meta = checkpoint.load(tmp_path/"a.safetensors")
  assert meta["ddpm"] == {"T": 7} and tuple(again.config["channel_mult"]) == (1, 2)
  for v, w in zip(nn.state.get_parameters(model), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy())
  checkpoint.save(tmp_path/"ema.safetensors", model)
  assert checkpoint.load(tmp_path)[0].config == model.config  # a run's folder
  (tmp_path/"ema.safetensors").unlink()
  tensors, _ = read_tensors(tmp_path/"a.safetensors")
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
  for config, match in (({**TINY, "image_size": 9}, "divide"), ({**TINY, "channel": 3}, "channel"), ([], "carries no")):
    write_tensors(tmp_path/"b.safetensors", tensors, {"unet": config})
    with pytest.raises(ValueError, match=match): checkpoint.load(tmp_path/"b.safetensors")
  with pytest.raises(ValueError, match="averaged"): checkpoint.load(tmp_path/"a.safetensors", raw=True)

def test_the_refusal_of_a_pickle_says_what_to_do(tmp_path):
  """The command in it is a whole program, which makes a file of another name."""
  for name in ("a.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl"):
    (tmp_path/name).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pickle") as caught: checkpoint.load(tmp_path/name)
    program = re.search('python -c "(.*)"', str(caught.value)).group(1)
    compile(program, "command", "exec")
    assert f"'{tmp_path/name}'" in program and f"'{tmp_path/'a.safetensors'}'" in program
    assert "weights_only=True" in program and "\n" not in str(caught.value)

class Own:
  """A user's network."""
  def __init__(self): self.layers, self.count = [nn.Linear(3, 4)], Tensor([7])

def test_a_network_of_the_users_own(tmp_path):
  saved, other, path = Own(), Own(), tmp_path/"own.safetensors"
  checkpoint.save(path, saved, {"dataset": "x"})
  refused(lambda: checkpoint.load(path), path, "no description", "load_state_dict")
  nn.state.load_state_dict(other, nn.state.safe_load(path), verbose=False)
  assert np.array_equal(other.layers[0].weight.numpy(), saved.layers[0].weight.numpy())
  assert other.count.tolist() == [7] and json.loads(read_tensors(path)[1]["ddpm"]) == {"dataset": "x"}

@pytest.mark.parametrize("wrong", [
  {"limits": [1]}, {"limits": "0, 1"}, {"limits": [0, "b"]}, {"limits": [0, math.nan]}, {"how": 3},
  {"how": {"sizes": 8}}, {"classes": [1, 2]}, {"classes": "ab"}, {"dataset": ["a"]}, {"how": {"multiple": 0}},
  {"how": {"multiple": "x"}}, {"how": {"size": {"a": 1}}}, {"how": {"size": [None, 8]}}, {"how": {"size": 1.5}},
  {"how": {"fit": ["crop"]}}, {"how": None}, {"classes": None}, {"span": [1, 1]}, {"span": 9}, {"untrained": 1}])
def test_what_a_file_says_of_its_images_is_looked_at(wrong, tmp_path):
  right = {"limits": [0, 1.5], "how": {"size": [8, 8], "fit": "pad"}, "classes": ["a", "b"], "dataset": "a/b"}
  model = random_model()
  checkpoint.save(tmp_path/"a.safetensors", model, right)
  assert checkpoint.load(tmp_path/"a.safetensors")[1].items() >= right.items()
  checkpoint.save(tmp_path/"a.safetensors", model, right | wrong)
  refused(lambda: checkpoint.load(tmp_path/"a.safetensors"), "a.safetensors", *wrong)
  if not wrong.keys() & {"limits", "classes"} or None in wrong.values(): return  # their config's null is no key
  hub.save(tmp_path/"folder", model, right)
  config = tmp_path/"folder"/"unet"/"config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | {f"_{k}": v for k, v in wrong.items()}))
  refused(lambda: checkpoint.load(tmp_path/"folder"), "config.json", *wrong)

@pytest.mark.parametrize("wrong", [
  {"image_size": 8.0}, {"image_size": [8.0, 8.0]}, {"channel_mult": [1] * 2000}, {"channels": None}, {"channels": [4]}])
def test_a_description_of_no_network_is_refused(wrong, tmp_path):
  checkpoint.save(tmp_path/"a.safetensors", model := random_model())
  tensors = read_tensors(tmp_path/"a.safetensors")[0]
  write_tensors(tmp_path/"a.safetensors", tensors, {"unet": model.config | wrong})
  refused(lambda: checkpoint.load(tmp_path/"a.safetensors"))

def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
  head = b'{"x":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}}  '
  (tmp_path/"a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes.fromhex("803F 20C0 4940"))
  assert read_tensors(tmp_path/"a.safetensors")[0]["x"].tolist() == [1, -2.5, 3.140625]

def test_low_precision_is_kept_and_read(tmp_path):
  """float16 as asked for; the weights of a network in bfloat16 as float32 of the same value."""
  model = unet.lower(random_model(), unet.DTYPES["bfloat16"])
  want = {k: v.float().numpy() for k, v in nn.state.get_state_dict(model).items()}
  for dtype, tolerance in ((np.float32, 0), (np.float16, 1e-3)):
    checkpoint.save(tmp_path/"a.safetensors", model, dtype=dtype)
    assert {v.dtype for v in read_tensors(tmp_path/"a.safetensors")[0].values()} == {np.dtype(dtype)}
    for k, v in nn.state.get_state_dict(checkpoint.load(tmp_path/"a.safetensors")[0]).items():
      np.testing.assert_allclose(v.numpy(), want[k], rtol=tolerance, atol=tolerance)

def test_a_file_is_read_one_tensor_at_a_time(tmp_path):
  """And it is the file that was opened, even if another has got its name since."""
  tensors = {f"x{i}": arr(200_000, seed=i) for i in range(8)}
  write_tensors(tmp_path/"a.safetensors", tensors, {})
  model = types.SimpleNamespace(**{k: Tensor(np.zeros_like(v)).realize() for k, v in tensors.items()})
  readers, _ = open_tensors(tmp_path/"a.safetensors")
  write_tensors(tmp_path/"a.safetensors", {k: -v for k, v in tensors.items()}, {})
  tracemalloc.start()
  fill(nn.state.get_state_dict(model), readers, "a")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 4 * 800_000  # of eight: one in the file's bytes, one as an array, and what tinygrad keeps beside them
  for k, v in tensors.items(): assert np.array_equal(getattr(model, k).numpy(), v)

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

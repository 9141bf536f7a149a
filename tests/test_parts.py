"""Drawing many images: what is on disk meanwhile, how it goes on, and that another command does not take it over."""
import errno, os, signal, subprocess, sys, time
import numpy as np
import pytest
from common import ROOT, close, random_model, refused, rng
from PIL import Image
import sample
from engine.folder import claim
from files import checkpoint, parts, pictures

SMALL = dict(channel_mult=(1,), attn_resolutions=())

@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")/"a.safetensors"
  checkpoint.save(path, random_model(num_classes=3, **SMALL),
                  {"ddpm": {"T": 4, "beta_T": 0.5}, "classes": ["x", "y", "z"]})
  return path

@pytest.fixture
def draw(model, tmp_path, monkeypatch):
  """draw("a", flags): the bytes of a.npz, drawn by sample.main without a network; draw.batches: their sizes."""
  monkeypatch.chdir(tmp_path)
  def images(x, labels, times, keep, index, desc):
    return {t: (x / (2 + t) + labels.reshape(-1, 1, 1, 1) / 9, x) for t in keep}
  monkeypatch.setattr(sample, "drawing", lambda *given: images)
  save, batches = parts.save, []
  monkeypatch.setattr(parts, "save", lambda folder, start, images, *rest:
                      batches.append(len(images)) or save(folder, start, images, *rest))
  def draw(name, flags="", path=model):
    batches.clear()
    sample.main(["--checkpoint", str(path), "--batch", "4", "--n", "10", "--npz", f"{name}.npz", *flags.split()])
    return (tmp_path/f"{name}.npz").read_bytes()
  draw.batches = batches
  return draw

def arrays(name): return np.load(f"{name}.npz")

def stop_after(monkeypatch, batches, error):
  """The next batches are saved; then the error."""
  save = parts.save
  def stopping(*given):
    if stopping.left == 0: raise error
    stopping.left -= 1
    return save(*given)
  stopping.left = batches
  monkeypatch.setattr(parts, "save", stopping)
  return lambda: monkeypatch.setattr(parts, "save", save)

@pytest.mark.parametrize("kind", (np.uint8, np.float32))
@pytest.mark.parametrize("labelled", (False, True))
def test_an_npz_put_together_is_that_of_numpy(tmp_path, kind, labelled):
  images, labels = (rng().random((7, 3, 2, 5)) * 255).astype(kind), np.arange(7, dtype=np.int32)
  for start in (0, 3, 6):
    parts.save(tmp_path/"parts", start, images[start:start+3], np.zeros((1, 3, 3, 2, 5), np.uint8), None, 0)
  parts.write_npz(tmp_path/"a.npz", tmp_path/"parts", labels, labelled)
  np.savez(tmp_path/"b.npz", np.ascontiguousarray(images.transpose(0, 2, 3, 1)), *[labels] * labelled)
  assert (tmp_path/"a.npz").read_bytes() == (tmp_path/"b.npz").read_bytes()

def test_the_batches_the_labels_and_the_first_image(draw, tmp_path):
  whole = draw("a", "--batch 64")
  assert draw.batches == [10] and draw("a") == whole and draw.batches == [4, 4, 2]
  a = arrays("a")
  assert a["arr_0"].shape == (10, 8, 8, 1) and sorted(a["arr_1"][:9]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  draw("c", "--first 7 --n 3 --png c")
  for k in ("arr_0", "arr_1"): assert (arrays("c")[k] == a[k][7:]).all()
  assert sorted(os.listdir("c")) == [f"{i:06d}.png" for i in (7, 8, 9)]
  assert (np.asarray(Image.open("c/000008.png")) == a["arr_0"][8, ..., 0]).all()
  assert not list(tmp_path.glob("*.parts"))

@pytest.mark.parametrize("error", (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")))
def test_what_is_finished_is_not_drawn_again(draw, tmp_path, monkeypatch, error):
  whole = draw("whole", "--png whole --gif whole.gif")
  go_on = stop_after(monkeypatch, 2, error)
  with pytest.raises(type(error)): draw("a", "--png a --gif a.gif")
  assert len(list(tmp_path.glob("a.npz.*.parts"))) == 1 and not (tmp_path/"a.npz").exists()
  go_on()
  assert draw("a", "--png a --gif a.gif") == whole and draw.batches == [2]
  assert (tmp_path/"a.gif").read_bytes() == (tmp_path/"whole.gif").read_bytes()
  for i in range(10): assert (tmp_path/f"a/{i:06d}.png").read_bytes() == (tmp_path/f"whole/{i:06d}.png").read_bytes()

def test_a_command_that_was_killed_before_its_first_picture_has_none(tmp_path):
  """Those in its folder are another command's."""
  (tmp_path/"a.parts").mkdir()
  (tmp_path/"png").mkdir()
  (tmp_path/"png"/"000001.png").touch()
  refused(lambda: parts.check(tmp_path/"a.parts", tmp_path/"png", range(3)), "000001.png is there already")
  parts.save(tmp_path/"a.parts", 0, np.zeros((1, 1, 4, 4), np.uint8), np.zeros((1, 1, 1, 4, 4), np.uint8),
             tmp_path/"png", 0)
  parts.check(tmp_path/"a.parts", tmp_path/"png", range(3))

def test_a_file_that_is_gone_is_drawn_again(draw, tmp_path, monkeypatch):
  draw("whole", "--png whole")
  go_on = stop_after(monkeypatch, 2, KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt): draw("a", "--png a")
  go_on()
  (tmp_path/"a"/"000005.png").unlink()
  draw("a", "--png a")
  assert draw.batches == [4, 2]
  for i in range(10): assert (tmp_path/f"a/{i:06d}.png").read_bytes() == (tmp_path/f"whole/{i:06d}.png").read_bytes()

@pytest.mark.slow
def test_another_command_does_not_take_them_over(draw, tmp_path, monkeypatch, model):
  checkpoint.save(tmp_path/"other.safetensors", random_model(num_classes=3, norm_eps=1e-5, **SMALL),
                  {"ddpm": {"T": 4, "beta_T": 0.5}, "classes": ["x", "y", "z"]})
  whole = draw("whole")
  go_on = stop_after(monkeypatch, 2, KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt): draw("a")
  go_on()
  for flags in ("--seed 1", "--steps 3", "--sampler ddim", "--guidance 2", "--class x", "--first 1", "--no-clip",
                "--dtype bfloat16", "--n 9", "--png p"):
    draw("a", flags)
    assert sum(draw.batches) == (9 if flags == "--n 9" else 10), flags
  draw("a", path=tmp_path/"other.safetensors")
  assert sum(draw.batches) == 10
  assert draw("a") == whole and draw.batches == [2]          # it is still there for its own
  assert not list(tmp_path.glob("*.parts"))

def test_nothing_is_left_where_no_batch_was_finished(draw, tmp_path, monkeypatch):
  stop_after(monkeypatch, 0, KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt): draw("a")
  assert not list(tmp_path.iterdir())

def test_pictures_of_a_batch_that_was_not_finished_are_its_own(draw, tmp_path, monkeypatch):
  """Stopped between a batch's pictures and the batch: the same command goes on."""
  whole, save = draw("whole"), np.savez
  def stopped(*given, **named): raise KeyboardInterrupt
  monkeypatch.setattr(parts.np, "savez", stopped)
  with pytest.raises(KeyboardInterrupt): draw("a", "--png a")
  assert (tmp_path/"a"/"000003.png").exists()
  monkeypatch.setattr(parts.np, "savez", save)
  assert draw("a", "--png a") == whole and len(list((tmp_path/"a").iterdir())) == 10

def test_labels_are_written_of_images_that_had_one(draw):
  draw("a", "--guidance 0")
  draw("b", "--guidance 2")
  assert arrays("a").files == ["arr_0"] and arrays("b").files == ["arr_0", "arr_1"]

def test_a_folder_in_use_is_left_alone(draw, tmp_path, monkeypatch):
  go_on = stop_after(monkeypatch, 1, KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt): draw("a")
  go_on()
  (batch,) = tmp_path.glob("a.npz.*.parts/*.npz")
  with claim(batch.parent):
    refused(lambda: draw("a"), "in use")
    batch.unlink()                                           # also while the other has not finished one
    refused(lambda: draw("a"), "in use")
    assert batch.parent.exists() and not draw.batches
  draw("a")

def test_pictures_of_others_are_not_written_over(draw, tmp_path):
  (tmp_path/"p").mkdir()
  (tmp_path/"p"/"000009.png").write_bytes(b"mine")
  refused(lambda: draw("a", "--png p"), "000009.png", "there already")
  assert (tmp_path/"p"/"000009.png").read_bytes() == b"mine" and not draw.batches
  draw("a", "--png p --n 9")

def test_the_picture_shows_the_first_256(draw, monkeypatch):
  grids, grid = [], pictures.grid
  monkeypatch.setattr(pictures, "grid", lambda images, *rest, **named: grids.append((images, *rest, named)) or
                      grid(images, *rest, **named))
  draw("a", "--n 270 --batch 50 --gif a.gif --steps 2")
  assert {len(images) for images, *_ in grids} == {256}
  assert (grids[-1][0].transpose(0, 2, 3, 1) == arrays("a")["arr_0"][:256]).all()
  assert Image.open("a.gif").n_frames == 3
  draw("b", "--classes --n 2")
  assert grids[-1][1] == 2 and grids[-1][2] == {"row_names": ["x", "y", "z"]} and len(grids[-1][0]) == 6
  assert list(arrays("b")["arr_1"]) == [0, 0, 1, 1, 2, 2]

def test_floats_are_in_the_range_of_their_set(draw, tmp_path):
  meta = {"ddpm": {"T": 4, "beta_T": 0.5}, "limits": [-3.0, 5.0]}
  checkpoint.save(tmp_path/"floats.safetensors", random_model(), meta)
  checkpoint.save(tmp_path/"bytes.safetensors", random_model(), meta | {"limits": None})
  draw("a", path=tmp_path/"floats.safetensors")
  draw("b", "--png b", path=tmp_path/"bytes.safetensors")
  a, b = arrays("a"), arrays("b")
  assert a["arr_0"].dtype == np.float32 and b["arr_0"].dtype == np.uint8 and a.files == b.files == ["arr_0"]
  close(a["arr_0"], b["arr_0"] / 255 * 8 - 3, atol=8 / 255 / 2 * 1.01)

@pytest.mark.slow
def test_a_killed_program_ends_in_the_same_bytes(model, tmp_path):
  def start(name):
    flags = ["--n", "60", "--batch", "4", "--npz", f"{name}.npz", "--png", name]
    return subprocess.Popen([sys.executable, ROOT/"sample.py", "--checkpoint", model, *flags], cwd=tmp_path,
                            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
  assert start("whole").wait(200) == 0
  for least in (2, 5):
    program, until = start("a"), time.monotonic() + 100
    while len(list(tmp_path.glob("a.npz.*/*.npz"))) < least and time.monotonic() < until: time.sleep(0.002)
    os.kill(program.pid, signal.SIGKILL)
    program.wait(10)
  assert not (tmp_path/"a.npz").exists()
  assert start("a").wait(200) == 0
  assert (tmp_path/"a.npz").read_bytes() == (tmp_path/"whole.npz").read_bytes()
  for i in range(60): assert (tmp_path/f"a/{i:06d}.png").read_bytes() == (tmp_path/f"whole/{i:06d}.png").read_bytes()
  assert not list(tmp_path.glob("*.parts"))

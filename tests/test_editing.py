"""extras/editing.py: inpainting, drawing from an image, DDIM's latents; what the programs make of them and refuse."""
import math
import numpy as np
import pytest
from PIL import Image
from common import close, f32, refused, rng
from tinygrad import Tensor
import data, figures, sample
from ddpm import DDPM, column
from extras import editing
from extras.guidance import guided
from sample import SAMPLERS, draw_x_T, timesteps
from test_ddpm import at_times, exact, last, short
from test_sample import in_the_box

# *** inpainting ***

def correlated(d, m, s, rho):
  """The exact ε for pairs of pixels, the last axis, that are N(±(m, m), s² [[1, ρ], [ρ, 1]]), either sign as often."""
  table = f32(d.alpha_bar)
  def model(x, t):
    a = column(table[t], x)
    p, q = a * s * s + 1 - a, a * s * s * rho                # x_t's covariance of each mode: [[p, q], [q, p]]
    solve = lambda x: (p * x - q * x.flip(-1)) / (p * p - q * q)
    side = (solve(x) * a.sqrt() * m).sum(-1, keepdim=True).tanh()
    return (1 - a).sqrt() * solve(x - a.sqrt() * m * side)
  return model

def test_the_drawn_pixel_has_its_law_given_the_kept_one():
  m, s, rho, k, n = 0.3, 0.3, 0.6, 0.3, 2000                 # n pairs are the rows of one image
  weight = 1 / (1 + math.exp(-2 * k * m / s**2))             # of the mode +m, by Bayes' rule for the kept pixel
  means = np.array([m + rho * (k - m), -m + rho * (k + m)])
  mean = float(np.dot([weight, 1 - weight], means))
  var = s**2 * (1 - rho**2) + float(np.dot([weight, 1 - weight], (means - mean)**2))
  d = DDPM(50, 0.001, 0.1)
  def draw(resample):
    x0 = f32(np.full((1, 1, n, 2), k))
    options = dict(moves=editing.inpaint, x0=x0, drawn=Tensor([True, False]).reshape(1, 1, 1, 2), resample=resample)
    x = last(SAMPLERS["ddpm"](d, correlated(d, m, s, rho), draw_x_T(1, (1, n, 2), 0), 50, clip=False, **options))
    assert (x[..., 1] == np.float32(k)).all()
    return x[..., 0]
  x, once = draw(20), draw(0)
  assert abs(x.mean() - mean) < 4 * math.sqrt(var / n) and abs(x.var() - var) < 4 * var * math.sqrt(2 / n)
  assert once.mean() < mean - 0.05                           # one step at each t has hardly seen the kept pixel

def test_a_move_is_algorithm_2_where_drawn_and_eq4_where_kept():
  d, shape = short(10), (3, 2, 4, 4)
  x_t, z, x0 = (rng(i).standard_normal(shape).astype(np.float32) for i in range(3))
  x0, drawn, t = x0[:1], rng(3).random((1, 1, 4, 4)) < 0.5, np.array([7, 2, 1])
  times, model, a = at_times(*t), exact(d), d.alpha_bar[t - 1].reshape(-1, 1, 1, 1)
  own, own_x0 = d.p_sample(f32(x_t), times, model(f32(x_t), times), f32(z), True)
  kept = np.sqrt(a) * x0 + np.sqrt(1 - a) * z
  *moves, (step, noisy) = [*editing.inpaint(d, d, f32(x0), Tensor(drawn), 2)[0], (None, True)]
  assert len(moves) == 5 and moves[0] is moves[2] and noisy and step is None
  x, x0_hat = moves[4](d, model, f32(x_t), times, f32(z), True)
  close(x.numpy(), np.where(drawn, own.numpy(), kept), atol=1e-6)
  assert (np.where(drawn, x0, x0_hat.numpy()) == x0).all() and (np.where(drawn, x0, x.numpy())[2] == x0[0]).all()
  close(np.where(drawn, x0_hat.numpy(), 0), np.where(drawn, own_x0.numpy(), 0))
  x, _ = moves[0](d, model, f32(x_t), times, f32(z), True)  # a step that is undone: none at t = 1
  close(x.numpy(), np.where(t.reshape(-1, 1, 1, 1) > 1, np.where(drawn, own.numpy(), kept), x_t), atol=1e-6)
  back, _ = moves[1](d, model, x, times, f32(z), True)
  b = d.beta[t].reshape(-1, 1, 1, 1)
  close(back.numpy(), np.where(b > d.beta[1], np.sqrt(1 - b) * x.numpy() + np.sqrt(b) * z, x.numpy()), atol=1e-6)

# *** DDIM's latents ***

@pytest.mark.parametrize("T, steps, predict", ((50, 50, "eps"), (200, 40, "v")))
def test_ddim_draws_an_image_from_its_latent(T, steps, predict):
  d, answer = short(T, predict=predict), exact(short(T), 0.0, 0.5)
  def model(x, t):
    a = column(f32(d.alpha_bar)[t], x)                       # v = (ε − √(1−ᾱ) x_t)/√ᾱ
    return answer(x, t) if predict == "eps" else (answer(x, t) - (1 - a).sqrt() * x) / a.sqrt()
  x0, times = 0.5 * f32(rng(0).standard_normal((4, 1, 4, 4))), timesteps(T, steps)
  def error(rounds):
    x = editing.ddim_encode(d, model, x0, times, rounds)
    return x.numpy(), np.abs(last(SAMPLERS["ddim"](d, model, x, times, clip=False)) - x0.numpy()).max()
  (_, one), (x_T, three), (_, six) = error(1), error(3), error(6)
  assert one > 5 * three and six < 2e-5 + three / 10
  want = x0.numpy() * math.sqrt(d.alpha_bar[-1] + (1 - d.alpha_bar[-1]) / 0.25)  # the ODE keeps x/its deviation
  close(x_T, want, rtol=6 / steps)

def test_between_two_latents_is_a_great_circle():
  a, b = rng(0).standard_normal((2, 3, 1, 4, 8, 8)).astype(np.float32)
  b -= a * (a * b).sum((2, 3, 4), keepdims=True) / (a * a).sum((2, 3, 4), keepdims=True)  # at a right angle
  b *= np.sqrt((a * a).sum((2, 3, 4), keepdims=True) / (b * b).sum((2, 3, 4), keepdims=True))
  lam = np.array([0, 0.25, 0.5, 1], np.float32).reshape(-1, 1, 1, 1)
  angle = np.pi / 2 * lam
  close(editing.spherical(a, b, lam), np.cos(angle) * a + np.sin(angle) * b, atol=1e-5)
  close(editing.spherical(a, a, lam), np.broadcast_to(a, (3, 4, 4, 8, 8)), atol=1e-5)

# *** the programs ***

@pytest.fixture
def command(monkeypatch, tmp_path): return in_the_box(monkeypatch, tmp_path, sample.main)

def photos(*names, shape=(16, 16)):
  """Files of images that are data of the exact model, ±0.6 with deviation 0.1; and their pixels, uint8 (N, 1, H, W)."""
  x = 0.6 * np.sign(rng(1).random((len(names), 1, 1, 1)) - 0.5) + 0.1 * rng(2).standard_normal((len(names), 1, *shape))
  images = data.to_uint8(x)
  for name, image in zip(names, images): Image.fromarray(image[0]).save(name)
  return images

def mask(name, drawn): Image.fromarray(np.where(drawn, 255, 0).astype(np.uint8)).save(name)

def read(path, name="arr_0"): return np.load(path)[name]

def unlabelled(command, n): return guided(command.net, Tensor(np.full(n, 2, np.int32)), 1, 2)

def test_inpaint_keeps_every_byte_that_is_black_in_the_mask(command):
  image, drawn = photos("a.png"), np.zeros((16, 16), bool)
  drawn[8:, 3:] = True
  mask("mask.png", drawn)
  command("--inpaint a.png --mask mask.png --n 3 --batch 2 --npz a.npz --resample 2")
  a = read("a.npz")
  assert a.shape == (3, 16, 16, 1) and (a[:, ~drawn, 0] == image[0, 0][~drawn]).all()
  assert len({v.tobytes() for v in a}) == 3 and (a[:, drawn, 0] != image[0, 0][drawn]).mean() > 0.9
  shown, columns = command.grids[-1]
  assert columns == 4 and (shown[0, 0] == np.where(drawn, 128, image[0, 0])).all()
  assert (shown[1:].transpose(0, 2, 3, 1) == a).all() and list(np.load("a.npz")) == ["arr_0"]
  command("--inpaint a.png --mask mask.png --classes --n 2 --npz a.npz --guidance 2")
  assert [(v[drawn] > 127).all() for v in read("a.npz")] == [False, False, True, True]
  assert (read("a.npz", "arr_1") == [0, 0, 1, 1]).all()
  assert command.grids[-1][0].shape[0] == 6 and command.grids[-1][1] == 3

@pytest.mark.parametrize("at, steps", ((12, 12), (7, 3)))
def test_from_is_eq4_then_plain_sampling(command, at, steps):
  d, x0 = DDPM(**command.meta["ddpm"]), photos("a.png", "b.png").repeat(2, 0) / 127.5 - 1
  command(f"--from a.png b.png --at {at} --n 2 --steps {steps} --seed 3 --npz a.npz")
  x = math.sqrt(d.alpha_bar[at]) * x0 + math.sqrt(1 - d.alpha_bar[at]) * draw_x_T(4, (1, 16, 16), 3).numpy()
  times = [at, *(t for t in timesteps(12, steps) if t < at)]
  want = data.to_uint8(last(SAMPLERS["ddpm"](d, unlabelled(command, 4), f32(x), times, 3)))
  assert np.abs(read("a.npz").transpose(0, 3, 1, 2).astype(int) - want).max() <= 1
  images, columns = command.grids[-1]
  assert columns == 3 and (images[[0, 3]] == data.to_uint8(x0[::2])).all()

def test_from_time_1_gives_the_image_to_within_beta_1(command):
  image = photos("a.png")
  command("--from a.png --at 1 --n 4 --npz a.npz")
  error = np.square((read("a.npz").transpose(0, 3, 1, 2) - image.astype(float)) / 127.5).mean()
  assert 1e-4 < error < command.meta["ddpm"]["beta_1"]
  command("--from a.png --at 12 --class 1 --npz a.npz")
  assert (read("a.npz") > 127).all() and len(read("a.npz")) == 8

@pytest.mark.parametrize("line, times", (("", range(12, -1, -1)), ("--at 6 --steps 4 --class 0", [6, 3, 0])))
def test_encode_shows_the_latent_and_what_came_back(command, capsys, line, times):
  images = photos("a.png", "b.png")
  command(f"--encode a.png b.png {line}")
  labels = np.full(2, 0 if line else 2, np.int32)
  d, model, times = DDPM(**command.meta["ddpm"]), guided(command.net, Tensor(labels), 1, 2), list(times)
  x = editing.ddim_encode(d, model, f32(images / 127.5 - 1), times)
  back = last(SAMPLERS["ddim"](d, model, x, times, clip=False))
  shown, columns = command.grids[-1]
  for got, want in zip(shown.reshape(2, 3, 1, 16, 16).swapaxes(0, 1), (images, *map(data.to_uint8, (x.numpy(), back)))):
    assert np.abs(got.astype(int) - want).max() <= 1
  error, said = np.sqrt(np.square(127.5 * (back + 1) - images).mean((1, 2, 3))), capsys.readouterr().err
  for name, e in zip("ab", error): assert f"{name}.png comes back with an error of {e:.2f} of 255" in said
  assert columns == 3

def test_images_are_fitted_as_the_models_own(command, capsys):
  x = rng(0).integers(0, 256, (20, 40, 3), np.uint8)
  Image.fromarray(x).save("a.png")
  shape, how = (1, 16, 16), {"size": 16, "fit": "stretch", "multiple": 1}
  gray = Image.fromarray(x).convert("L").resize((16, 16), Image.Resampling.LANCZOS)
  assert (editing.read(["a.png"], shape, how)[0, 0] == np.asarray(gray)).all()
  assert "a.png: stretched to 16x16, made gray" in capsys.readouterr().err
  got = editing.read(["a.png", "a.png"], (3, 16, 40), {"size": None, "fit": "crop", "multiple": 8})
  assert (got == x[2:18].transpose(2, 0, 1)).all()            # cut, as images of this size were for training
  assert "cut from 20x40 to 16x40" in capsys.readouterr().err
  assert (editing.read(["a.png"], (3, 20, 40)) == x.transpose(2, 0, 1)).all() and not capsys.readouterr().err
  refused(lambda: editing.read(["a.png"], (2, 20, 40)), "a.png", "2 channels")
  drawn = np.zeros((20, 40), bool)
  drawn[:, 20:] = True
  mask("m.png", drawn)
  photo, fitted = editing.read_mask("m.png", "a.png", (3, 10, 10), {"size": 10, "fit": "stretch"})
  assert photo.shape == (1, 3, 10, 10) and (fitted == (np.arange(10) > 4)).all()

@pytest.mark.parametrize("line, words", (
  ("--inpaint a.png", "need each other"), ("--mask m.png", "need each other"), ("--resample 3", "--resample"),
  ("--inpaint a.png --mask m.png --from a.png --at 3", "choose one"), ("--at 3", "--at is for"),
  ("--from a.png", "needs --at"), ("--from a.png --at 0", "1 or more"), ("--from a.png --at 13", "1 to T = 12"),
  ("--encode a.png --at 13", "1 to T = 12"), ("--from a.png --at 3 --gif a.gif", "--gif"),
  ("--from a.png --at 3 --png folder", "--png"), ("--from a.png --at 3 --guidance 2", "--class"),
  ("--inpaint a.png --mask m.png --sampler ddim", "--sampler"), ("--encode a.png --sampler sde", "--sampler"),
  ("--encode a.png --n 2", "--n"), ("--encode a.png --classes", "--classes"), ("--encode a.png --npz a.npz", "--npz"),
  ("--from a.png --at 3 --out a.png", "a.png"), ("--from a.png --at 3 --npz ./a.png", "a.png would be written over"),
  ("--inpaint a.png --mask m.png --npz m.png", "m.png would be written over"), ("--encode a.png --eta 0", "--eta"),
  ("--inpaint photo.png --mask thin.png", "nothing white in it as 16x16"),
  ("--from none.png --at 3", "none.png"),
  ("--from text.png --at 3", "text.png cannot be read"), ("--encode half.png", "half.png cannot be read"),
  ("--inpaint a.png --mask text.png", "text.png cannot be read"), ("--inpaint a.png --mask large.png", "32x16"),
  ("--inpaint a.png --mask black.png", "nothing white"), ("--inpaint a.png --mask white.png", "all white")))
def test_refused_in_a_sentence(command, line, words):
  photos("a.png")
  before = open("a.png", "rb").read()
  for name, drawn in (("m", np.eye(16) > 0), ("large", np.ones((32, 16))), ("black", np.zeros((16, 16))),
                      ("white", np.ones((16, 16)))): mask(f"{name}.png", drawn)
  Image.new("L", (300, 500)).save("photo.png")
  mask("thin.png", np.arange(500 * 300).reshape(500, 300) == 75150)  # one pixel of them
  open("text.png", "w").write("no image")
  open("half.png", "wb").write(before[:len(before) // 2])
  refused(lambda: command(line), words)
  assert open("a.png", "rb").read() == before and not command.grids

def test_a_network_without_no_class_needs_one(command, monkeypatch, tmp_path):
  figure = in_the_box(monkeypatch, tmp_path, figures.main)
  for c in (command, figure): c.meta["null_class"] = False
  photos("a.png", "b.png")
  for line in ("--from a.png --at 3", "--encode a.png"):
    refused(lambda line=line: command(line), "always shown a class")
  for line in ("--at 3", "--at 3 --ddim"):
    refused(lambda line=line: figure(f"--images a.png b.png {line}", ["8"]), "always shown a class")
  refused(lambda: figure("--dataset glyphs", ["table4"]), "other classes")

@pytest.mark.parametrize("ddim", ("", " --ddim"))
def test_figure_8_of_ones_own_images(monkeypatch, tmp_path, ddim):
  command = in_the_box(monkeypatch, tmp_path, figures.main)
  images = photos("a.png", "b.png")
  command(f"--images a.png b.png a.png a.png --at 6{ddim}", ["8"])
  shown, columns = command.grids[-1]
  shown = shown.reshape(2, 13, 1, 16, 16)
  assert columns == 13 and (shown[:, [0, 12]] == images[[[0, 1], [0, 0]]]).all()
  between = shown[1, 1:12].astype(int)
  if ddim:
    assert np.abs(between - between[0]).max() <= 1            # nothing lies between an image and itself
    d, times = DDPM(**command.meta["ddpm"]), list(range(6, -1, -1))
    x = editing.ddim_encode(d, unlabelled(command, 2), f32(images / 127.5 - 1), times).numpy()
    middle = editing.spherical(x[:1], x[1:], np.float32(0.5))
    want = last(SAMPLERS["ddim"](d, unlabelled(command, 1), f32(middle), times, clip=False))
    assert np.abs(shown[0, 6].astype(int) - data.to_uint8(want)[0]).max() <= 1
  else: assert np.abs(between - between[0]).max() > 1         # each x_t has its noise
  refused(lambda: command("--images a.png --at 6", ["8"]), "two images")
  before = open("a.png", "rb").read()
  refused(lambda: command("--images a.png b.png --at 6 --out a.png", ["8"]), "a.png would be written over")
  assert open("a.png", "rb").read() == before

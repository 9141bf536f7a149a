"""figures.py: what each figure shows, with the exact model in the network's place."""
import math
import numpy as np
import pytest
from common import close, refused
import data, evaluate
from ddpm import DDPM
from engine.streams import stream
from PIL import ImageFont
from test_sample import in_the_box

figures = pytest.importorskip("figures", reason="figures.py")

@pytest.fixture
def command(monkeypatch, tmp_path): return in_the_box(monkeypatch, tmp_path, figures.main)

@pytest.fixture
def unlabelled(monkeypatch, tmp_path): return in_the_box(monkeypatch, tmp_path, figures.main, num_classes=0)

@pytest.fixture
def drawn(monkeypatch):
  """How many images, and in how many steps, each call of the sampler draws."""
  calls, sampler = [], figures.sample.sample_ddpm
  def counting(d, model, x_T, steps, *args, **options):
    calls.append((len(x_T), len(steps) - 1))
    return sampler(d, model, x_T, steps, *args, **options)
  monkeypatch.setattr(figures.sample, "sample_ddpm", counting)
  return calls

def test_figure_5_counts_what_is_spent_beyond_each_time():
  L, zero = np.array([[3., 2, 1]] * 2), np.zeros((2, 3))
  b = evaluate.Bound(np.full(2, 6.5), np.full(2, 0.5), np.array([[1, 2, 3]] * 2), np.ones(3), L, zero, zero + 0.04)
  assert figures.rate_distortion(3, b) == pytest.approx(np.array([[3, 0.5, 25.5], [2, 1.5, 25.5], [1, 3.5, 25.5]]))

def test_figure_5_is_a_picture_whose_font_has_every_letter_and_a_table(command, monkeypatch):
  said, plot = [], figures.pictures.plot
  monkeypatch.setattr(figures.pictures, "plot", lambda curves, *texts: said.extend(texts) or plot(curves, *texts))
  command("--n 4", ["5"])
  font = ImageFont.load_default(size=20)
  unknown = bytes(font.getmask("\uffff"))
  assert "reverse process steps (T-t)" in said
  assert not [c for c in set("".join(said)) if bytes(font.getmask(c)) == unknown]
  table = np.genfromtxt("figure.csv", delimiter=",", names=True)
  assert (np.diff(table["reverse_steps"]) > 0).all() and (np.diff(table["rate_bits_per_dim"]) >= 0).all()

def test_figure_6(unlabelled):
  unlabelled("--n 2", ["6"])
  images, columns = unlabelled.grids[-1]
  assert images.shape == (20, 1, 16, 16) and columns == 10
  edge = np.abs(images.astype(float) - 127.5).mean((1, 2, 3)).reshape(2, 10)
  assert (edge[:, -1] > edge[:, 0] + 20).all()               # x̂_0 is grey at T and black and white at 0

def test_figure_7(unlabelled):
  unlabelled("--k 3 --n 2", ["7"])
  images, columns = unlabelled.grids[-1]
  assert images.shape == (2 * 4 * 4, 1, 16, 16) and columns == 4
  assert len({v.tobytes() for v in images}) == len(images)
  signs = (images.reshape(2, 4, 4, 256) > 127).astype(float)
  same = [(signs[:, row, 1] == signs[:, row, 2]).mean() for row in range(4)]
  assert same[0] < 0.6 and same[3] > 0.7                     # from x_T they share nothing, from x_{T/4} most modes
  assert (signs[:, 3, 0] == signs[:, 3, 1]).mean() > 0.75    # and the first image of a row is their latent

@pytest.mark.parametrize("batch", (64, 20))
def test_figure_7_draws_no_image_twice(command, drawn, batch):
  command(f"--k 7 --n 8 --batch {batch}", ["7"])
  # the latents at T go down to T/4, then seven images from each latent at T = 12, 9, 6 and 3; batches of 19 make 57
  copies = (56 if batch == 64 else 57) * (12 + 9 + 6 + 3)
  assert sum(n * steps for n, steps in drawn) in (8 * 9 + copies, 8 * 12 + copies)  # or the latents go on to 0
  assert max(n for n, _ in drawn) <= batch

def test_each_latent_of_figure_7_has_a_class(command):
  command("--k 3 --n 2", ["7"])
  kinds = (command.grids[-1][0].reshape(2, 4, 4, 256) > 127)[:, :, 1:].reshape(2, -1)
  assert (kinds == kinds[:, :1]).all() and kinds[0, 0] != kinds[1, 0]

def test_figure_8(command, tmp_path):
  command("--at 1 --n 2", ["8"])
  images, columns = command.grids[-1]
  assert images.shape == (26, 1, 16, 16) and columns == 13
  glyphs = {v.tobytes() for v in data.load("glyphs", "test")[0]}
  assert [v.tobytes() in glyphs for v in images] == ([True] + [False] * 11 + [True]) * 2
  refused(lambda: command("--at 13", ["8"]), "--at 13", "T = 12")
  command("--n 1", ["8"])                                    # by default at T/2
  refused(lambda: command("--at 3 --dataset nothing", ["8"]), "nothing")
  np.save(tmp_path/"one.npy", np.zeros((1, 16, 16), np.uint8))
  refused(lambda: command(f"--at 3 --dataset {tmp_path}/one.npy", ["8"]), "two images")

def test_figure_8_mixes_latents_of_one_noise(command, monkeypatch):
  d, n = DDPM(**command.meta["ddpm"]), 2
  saved, drawn = [], []
  def decoder(sampler, labelled, most):                      # that does nothing
    def draw(x, labels, times, index):
      drawn.append((labels, times, index))
      return {0: (x, None)}
    return draw
  monkeypatch.setattr(figures, "drawing", decoder)
  monkeypatch.setattr(figures.Model, "save", lambda self, a, x, columns: saved.append((x, columns)))
  command(f"--at 7 --n {n} --steps 3 --seed 3", ["8"])
  (rows, columns), (labels, times, index) = saved[0], drawn[0]
  assert columns == 13 and times == [7, 4, 0] and (index == np.repeat([0, 1], 11)).all() and (labels == 2).all()
  rows = rows.reshape(n, 13, 256)
  x0 = rows[:, [0, 12]]
  found = data.load("glyphs", "test")[0]
  picked = stream(3, "interpolated images").choice(len(found), 2 * n, replace=False)
  close(x0, found[picked].reshape(n, 2, 256) / 127.5 - 1, atol=1e-6)
  close(rows[:, 1:12], rows[:, [1]] + np.linspace(0, 1, 11)[:, None] * (rows[:, [11]] - rows[:, [1]]), atol=1e-5)
  eps = (rows[:, [1, 11]] - math.sqrt(d.alpha_bar[7]) * x0) / math.sqrt(1 - d.alpha_bar[7])
  assert abs(eps.std() - 1) < 0.1 and np.abs(np.corrcoef(eps.reshape(4, 256)) - np.eye(4)).max() < 0.3

@pytest.mark.parametrize("known", (True, False))
def test_a_model_that_always_needs_a_class_is_told_those_of_the_images(command, monkeypatch, tmp_path, known):
  y, told, bound = np.arange(12) % 2, [], evaluate.bound
  np.savez(tmp_path / "set.npz", images=(9 + y).astype(np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2), labels=y)
  def noted(d, net, x0, *rest):
    told.append((x0[:, 0, 0, 0] - 9, rest[-2]))
    return bound(d, net, x0, *rest)
  monkeypatch.setattr(evaluate, "bound", noted)
  command.meta["null_class"] = known
  command("--dataset set.npz --n 7", ["table4"])
  (x, labels), = told
  assert len(x) == 7 and labels.tolist() == ([2] * 7 if known else x.tolist())

@pytest.mark.parametrize("line", (
  "6 --n 0", "9", "", "7 --k 0", "8 --at 0", "6 --out /proc/version/a.png", "6 --shared 2", "5 --steps x",
  "7 --at 3", "6 --ddim", "5 --images a.png b.png", "table4 --at 1", "table2 --ddim", "6 --k 7", "8 --k 2",
  "5 --steps 3", "6 --dataset glyphs", "7 --data-dir .", "table2 --checkpoint a",
  "8 --images a.png b.png --n 2", "8 --images a.png b.png --dataset glyphs", "5 --out a.csv"))
def test_wrong_arguments_are_one_sentence(command, line):
  which, *rest = line.split() or [""]
  refused(lambda: command(" ".join(rest), [which]))
  assert not command.loaded

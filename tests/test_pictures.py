"""Pictures: grids, the terminal, animations, samples for other programs, plots."""
import functools, re
import numpy as np
import pytest
from common import refused
from files import pictures
from PIL import Image

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
  for bad in (np.zeros((0, 1, 8, 8), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 1, 8, 8))):
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

@pytest.mark.parametrize("name,kind", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG"),
                                       ("a.npz", "PNG")])
def test_a_picture_is_what_its_name_says(name, kind, tmp_path):
  pictures.save_png(tmp_path/name, pictures.grid(np.zeros((1, 1, 8, 8), np.uint8)))
  assert Image.open(tmp_path/name).format == kind

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

def test_any_number_of_channels():
  images = np.random.default_rng(0).integers(0, 256, (4, 5, 8, 8), np.uint8)
  for c, seen in ((4, images[:, :3]), (5, images[:, :3]),
                  (2, np.concatenate([images[:, :2], np.zeros_like(images[:, :1])], 1))):
    assert np.array_equal(pictures.visible(images[:, :c]), seen)
    assert np.array_equal(np.asarray(pictures.grid(images[:, :c])), np.asarray(pictures.grid(seen)))
    assert pictures.to_terminal(images[:, :c], 30) == pictures.to_terminal(seen, 30)
  assert [pictures.remark(c) for c in (1, 3)] == ["", ""]
  assert "red and green" in pictures.remark(2) and "first three of 5" in pictures.remark(5)

def test_names_beside_the_rows():
  images = np.full((6, 1, 28, 28), 40, np.uint8)
  sheet = np.asarray(pictures.grid(images, 2, row_names=["airplane", "1", ""]))
  plain = np.asarray(pictures.grid(images, 2))
  margin = sheet.shape[1] - plain.shape[1]
  assert margin > 40 and (sheet[:, margin:] == plain[..., None]).all()
  ink = [(sheet[2 + 58 * i:58 + 58 * i, :margin].min(2) < 128).sum(1) for i in range(3)]
  assert ink[0].sum() > ink[1].sum() > ink[2].sum() == 0
  assert all(abs(np.average(np.arange(56), weights=row) - 28) < 6 for row in ink[:2])  # in the middle of the row
  assert not (sheet[:2, :margin] < 128).any()

def test_samples_for_other_programs(tmp_path):
  floats = np.random.default_rng(0).normal(0, 9, (3, 5, 4, 6)).astype(np.float32)
  pictures.save_npz(tmp_path / "a.npz", floats, [3, 1, 2])
  with np.load(tmp_path / "a.npz", allow_pickle=False) as z:
    assert np.array_equal(z["arr_0"], floats.transpose(0, 2, 3, 1)) and z["arr_0"].dtype == np.float32
    assert z["arr_1"].tolist() == [3, 1, 2]

def test_the_loss_of_held_out_images_is_drawn(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(pictures, "plot", lambda series, *a, **kw: seen.append(series) or Image.new("L", (9, 9)))
  pictures.loss_curve(tmp_path / "a.png", [1, 2], [1.0, 0.5], [1.0, 0.8])
  pictures.loss_curve(tmp_path / "a.png", [1, 2], [1.0, 0.5], [1.0, 0.8], ([2], [0.7]))
  assert [list(series) for series in seen] == [["loss", "smoothed"], ["loss", "smoothed", "held out"]]
  assert seen[1]["held out"] == ([2], [0.7])

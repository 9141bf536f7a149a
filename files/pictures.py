"""Pictures of uint8 images, (N, C, H, W): grids, animations, the terminal, and plots of curves."""
import math, os, shutil
from collections.abc import Mapping, Sequence
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from files.atomic import atomic

def save_png(path:str|os.PathLike, img:Image.Image):
  """As PNG; or, where the name ends in another format that Pillow writes, such as .jpg, in that."""
  kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower(), "PNG")
  with atomic(path) as f: img.save(f, format=kind if kind in Image.SAVE else "PNG")

def save_gif(path:str|os.PathLike, frames:list[Image.Image], ms:int=60):
  """An endless animation of PIL images, `ms` milliseconds each, that rests on its last frame for two seconds."""
  if not frames: raise ValueError(f"no frames to write to {path}")
  with atomic(path) as f:
    frames[0].save(f, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[ms] * (len(frames) - 1) + [2000])

def save_npz(path:str|os.PathLike, images:np.ndarray, labels:np.ndarray|None=None):
  """Samples for the field's evaluation programs: `arr_0`, uint8 or float32 (N, H, W, C), and `arr_1`, the labels."""
  check(images, (np.uint8, np.float32))
  if labels is not None and len(labels) != len(images): raise ValueError(f"{len(labels)} labels, {len(images)} images")
  arrays = [np.ascontiguousarray(images.transpose(0, 2, 3, 1))] + ([] if labels is None else [np.asarray(labels)])
  with atomic(path) as f: np.savez(f, *arrays)

def check(images:np.ndarray, kinds:tuple=(np.uint8,)):
  if images.dtype not in kinds or images.ndim != 4 or 0 in images.shape:
    raise ValueError(f"images should be {kinds[0].__name__} (N, C, H, W), not {images.dtype} {images.shape}")

def visible(images:np.ndarray) -> np.ndarray:
  """uint8 images (N, C, H, W) with 1 or 3 channels: two become red and green, of more than three the first three."""
  check(images)
  n, c, h, w = images.shape
  return np.concatenate([images, np.zeros((n, 1, h, w), np.uint8)], 1) if c == 2 else images[:, :3]

def remark(channels:int) -> str:
  """What a picture of so many channels does not show, in a sentence; "" if it shows all."""
  if channels == 2: return "pictures show the two channels as red and green"
  return f"pictures show the first three of {channels} channels" if channels > 3 else ""

def grid(images:np.ndarray, ncols:int|None=None, scale:int|None=None,
         row_names:Sequence[str]|None=None) -> Image.Image:
  """A PIL image of uint8 (N, C, H, W) images in rows of `ncols` (default: a square), with 2 pixels between and around.
  Each pixel is enlarged `scale` times; by default to see small images at 56 pixels, in at most 1600 together.
  row_names: a text beside each row."""
  images = visible(images)
  n, c, h, w = images.shape
  ncols = math.ceil(math.sqrt(n)) if ncols is None else ncols
  if ncols < 1: raise ValueError(f"a grid of {ncols} columns: choose 1 or more")
  ncols = min(n, ncols)
  nrows = math.ceil(n / ncols)
  if scale is None: scale = max(1, min(math.ceil(56 / min(h, w)), (1598 // ncols - 2) // w, (1598 // nrows - 2) // h))
  if scale < 1: raise ValueError(f"a grid enlarged {scale} times: choose 1 or more")
  h, w = h * scale + 2, w * scale + 2
  canvas = np.full((nrows * h + 2, ncols * w + 2, c), 128, np.uint8)
  for i, image in enumerate(images):
    y, x = i // ncols * h + 2, i % ncols * w + 2
    canvas[y:y + h - 2, x:x + w - 2] = image.repeat(scale, 1).repeat(scale, 2).transpose(1, 2, 0)
  sheet = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
  if row_names is None: return sheet
  font = ImageFont.load_default(size=min(14, h))
  margin = math.ceil(max(font.getlength(name) for name in row_names)) + 8
  named = Image.new("RGB", (sheet.width + margin, sheet.height), "white")
  named.paste(sheet, (margin, 0))
  for i, name in enumerate(row_names[:nrows]):
    ImageDraw.Draw(named).text((margin - 4, 1 + (i + 0.5) * h), name, "black", font, anchor="rm")
  return named

def to_terminal(images:np.ndarray, columns:int|None=None) -> str:
  """A string that shows the first of the uint8 (N, C, H, W) images side by side, as many as fit into `columns`
  (default: the terminal's), at two pixels a character: upper half block, 24-bit colours."""
  images = visible(images)
  n, c, h, w = images.shape
  n = max(1, min(n, ((columns or shutil.get_terminal_size().columns) + 1) // (w + 1)))
  canvas = np.zeros((h + h % 2, n * (w + 1) - 1, 3), np.uint8)
  for i in range(n): canvas[:h, i * (w + 1):i * (w + 1) + w] = images[i].transpose(1, 2, 0)
  lines = []
  for upper, lower in zip(canvas[::2].tolist(), canvas[1::2].tolist()):
    before, line = None, ""
    for colours in zip(upper, lower):
      if colours != before: line += "\033[38;2;{};{};{};48;2;{};{};{}m".format(*colours[0], *colours[1])
      before, line = colours, line + "▀"
    lines.append(line + "\033[0m")
  return "\n".join(lines)

def picture(x:np.ndarray) -> Image.Image:
  """One uint8 image (C, H, W) as a PIL image."""
  return Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0))

def joined(images:Sequence[Image.Image], down:bool=False) -> Image.Image:
  """PIL images side by side or, with `down`, one below the other, on white."""
  widths, heights = [img.width for img in images], [img.height for img in images]
  size = (max(widths), sum(heights)) if down else (sum(widths), max(heights))
  sheet, at = Image.new("RGB", size, "white"), 0
  for img in images:
    sheet.paste(img, (0, at) if down else (at, 0))
    at += img.height if down else img.width
  return sheet

def plot(series:Mapping[str, tuple[ArrayLike, ArrayLike]], title:str="", xlabel:str="", ylabel:str="",
         log_y:bool=False) -> Image.Image:
  """A PIL image, 720x440, of the curves {name: (xs, ys)}. A curve is broken where it is not finite (or, with log_y,
  not positive); a lone point is a dot. ValueError if xs and ys differ in length."""
  k = 3  # drawn at three times the size, for smooth lines
  width, height = 720 * k, 440 * k
  font, big = ImageFont.load_default(size=13 * k), ImageFont.load_default(size=16 * k)
  curves:list = []
  for name, pair in series.items():
    xs, ys = (np.asarray(v, np.float64).ravel() for v in pair)
    if xs.shape != ys.shape: raise ValueError(f"the curve {name!r} has {len(xs)} xs but {len(ys)} ys")
    with np.errstate(all="ignore"): ys = np.log10(ys) if log_y else ys
    curves.append((str(name), xs, ys, np.isfinite(xs) & np.isfinite(ys)))
  (x0, x1), (y0, y1) = [span(np.concatenate([c[axis][c[3]] for c in curves] or [[]])) for axis in (1, 2)]
  xticks, yticks = ticks(x0, x1), log_ticks(y0, y1) if log_y else ticks(y0, y1)
  y0, y1 = y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)

  img = Image.new("RGB", (width, height), "white")
  d = ImageDraw.Draw(img)
  left = 24 * k + max((font.getlength(text) for _, text in yticks), default=0) + (22 * k if ylabel else 0)
  right, top, bottom = width - 20 * k, (64 if curves else 40) * k, height - (52 if xlabel else 34) * k
  across = lambda x: left + (x - x0) / (x1 - x0) * (right - left)
  down = lambda y: bottom - (y - y0) / (y1 - y0) * (bottom - top)
  for x, text in xticks:
    d.line((across(x), top, across(x), bottom), "#e6e6e6", k)
    d.text((across(x), bottom + 6 * k), text, "black", font, anchor="ma")
  for y, text in yticks:
    d.line((left, down(y), right, down(y)), "#e6e6e6", k)
    d.text((left - 6 * k, down(y)), text, "black", font, anchor="rm")
  d.line((left, top, left, bottom, right, bottom), "#555555", k)
  d.text((width / 2, 10 * k), title, "black", big, anchor="ma")
  d.text(((left + right) / 2, height - 10 * k), xlabel, "black", font, anchor="md")
  if ylabel:
    upright = Image.new("RGB", (math.ceil(font.getlength(ylabel)), 20 * k), "white")
    ImageDraw.Draw(upright).text((0, 10 * k), ylabel, "black", font, anchor="lm")
    img.paste(upright.rotate(90, expand=True), (8 * k, int((top + bottom - upright.width) / 2)))
  x = left
  for i, (name, xs, ys, ok) in enumerate(curves):
    colour = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")[i % 8]
    d.line((x, top - 16 * k, x + 20 * k, top - 16 * k), colour, 3 * k)
    d.text((x + 26 * k, top - 16 * k), name, "black", font, anchor="lm")
    x += 46 * k + font.getlength(name)
    for run in np.split(np.arange(len(xs)), np.flatnonzero(~ok)):  # each run but the first begins with a bad point
      points = [(float(across(xs[j])), float(down(ys[j]))) for j in run if ok[j]]
      if len(points) > 1: d.line(points, colour, 2 * k, joint="curve" if len(points) < 1000 else None)
      elif points: d.circle(points[0], 3 * k, colour)
  return img.reduce(k)

def span(values:np.ndarray) -> tuple[float, float]:
  """Ends of an axis, never equal."""
  lo, hi = (float(np.min(values)), float(np.max(values))) if len(values) else (0.0, 1.0)
  return (lo, hi) if hi - lo > 1e-9 * max(abs(lo), abs(hi)) else (lo - (abs(lo) * 0.1 or 1), hi + (abs(hi) * 0.1 or 1))

def ticks(lo:float, hi:float, most:int=7) -> list[tuple[float, str]]:
  """(value, text) at round steps of 1, 2 or 5 times a power of ten."""
  step = 10.0 ** math.floor(math.log10((hi - lo) / most))
  step *= next(m for m in (1, 2, 5, 10) if (hi - lo) / (step * m) <= most)
  values = [i * step for i in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]
  plain = 1e-4 <= max(abs(lo), abs(hi)) < 1e7
  return [(v, f"{v:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if plain else f"{v:.4g}") for v in values]

def log_ticks(lo:float, hi:float) -> list[tuple[float, str]]:
  """(log10 of value, text): powers of ten; 1, 2, 5 times them where those are few; else round numbers."""
  decades = range(math.floor(lo), math.ceil(hi) + 1)
  for factors in ((1,), (1, 2, 5)):
    marks = [(e + math.log10(m), f"{m * 10.0**e:g}") for e in decades for m in factors if lo <= e + math.log10(m) <= hi]
    if len(marks) > 2: return marks[::math.ceil(len(marks) / 9)]
  return [(math.log10(v), text) for v, text in ticks(10.0**lo, 10.0**hi) if v > 0]

def loss_curve(path:str|os.PathLike, steps:ArrayLike, loss:ArrayLike, smooth:ArrayLike,
               held_out:tuple[ArrayLike, ArrayLike]|None=None):
  """The loss of each step, its smoothed form and, as (steps, losses), the loss of held-out images."""
  curves = {"loss": (steps, loss), "smoothed": (steps, smooth)}
  if held_out is not None: curves["held out"] = held_out
  save_png(path, plot(curves, "Training loss", "step", "loss", log_y=True))

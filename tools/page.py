"""A trained model as one page, to look at before one reads: a file that draws images in a browser, on the GPU behind it
by WebGPU, and asks no other address for anything.

  python tools/page.py --checkpoint runs/mnist --out digits.html

It is page.template.html, which has Algorithm 2 in JavaScript, with the network as tinygrad's kernels in WGSL, its
weights in 16 bits and the tables of ddpm.py. With #test behind its address, the page compares itself with Python."""
from __future__ import annotations
import base64, json, sys
from pathlib import Path
import numpy as np
if not __package__: sys.path.insert(0, str(Path(__file__).parents[1]))  # started as a file, not by -m
from tinygrad import Tensor, dtypes, helpers, nn
from tinygrad.uop.ops import Ops, UOp
import unet
from ddpm import DDPM
from engine.capture import captured, placed
from engine.streams import normals, stream
from engine.terminal import parser, run
from extras.guidance import labelling, trained
from files.atomic import atomic
from sample import SAMPLERS, check_places, draw_x_T, image_shape, open_model, timesteps
from tools.bench import calls, source

BATCH, TESTED, STEPS = 8, 2, 10  # the images of the page; how many of them #test compares, and after how many steps
UNIFORM = "@group(0) @binding(0)\nvar<uniform> INFINITY : f32;"  # tinygrad's, for the first value of a maximum
WGSL = """const INFINITY = 3.4e38f;  // and a sine of any angle: WGSL promises nothing of sin beyond -π..π
fn sine(x:f32) -> f32 { let k = round(x / 6.2831853); return sin(x - k * 6.28125 - k * 0.0019353072); }"""

def text(array:np.ndarray) -> str: return base64.b64encode(array.tobytes()).decode()

def network(net:unet.UNet) -> dict:
  """ε_θ(x_t, t, y) of a batch: kernels in WGSL, and a plan: which of them, in how many groups of threads, on which
  parts of one memory, which begins with the weights. tinygrad's NULL device renders them and runs nothing: no WebGPU is
  needed here. The network's weights move there."""
  params, waves = nn.state.get_parameters(net), (net.config["channels"]//2, net.config["freq_shift"])
  weights = [p.numpy().astype(np.float16).ravel() for p in params]
  frequencies = unet.frequencies(*waves, net.conv_in.weight.device).numpy()
  with helpers.Context(DEV="NULL:WGSL"):
    for p in params: p.replace(p.to("NULL").realize())
    x, t, y = Tensor.empty(BATCH, *image_shape(net)), *(Tensor.empty(BATCH, dtype=dtypes.int32) for _ in "ty")
    call = captured(lambda: net(x, t, y).contiguous())
    out, table = call(), unet.frequencies(*waves, "NULL")
  places, size = dict[UOp, int](), 0
  def place(u:UOp) -> int:  # where a buffer begins; WebGPU wants multiples of 256
    nonlocal size
    if u not in places: places[u], size = size, size + helpers.round_up(u.max_numel() * u.dtype.itemsize, 256)
    return places[u]
  def part(u:UOp) -> tuple[int, int]:  # its place and its bytes
    base, first = u.contiguous_view() or (u, 0)
    if base.op is not Ops.BUFFER or (start := place(base) + first * base.dtype.itemsize) % 256:
      raise RuntimeError("a kernel reads a part of a buffer that WebGPU cannot bind")
    return start, helpers.round_up(u.max_numel() * u.dtype.itemsize, 4)
  for p in params: place(p.uop.base)
  codes, plan = dict[str, int](), []
  for kernel, *buffers in (c.src for c in calls([call])):
    if kernel.op is not Ops.PROGRAM: raise RuntimeError(f"a browser has no {kernel.op.name} between its kernels")
    number = codes.setdefault(source(kernel).replace(" sin(", " sine(").replace(UNIFORM, WGSL), len(codes))
    plan.append([number, kernel.arg.global_size, [part(buffers[i]) for i in kernel.arg.globals]])
  given, packed = [place(v.uop.base) for v in (table, x, t, y)], [np.pad(w, (0, -w.size % 64)) for w in weights]
  return dict(kernels=[*codes], plan=plan, places=given, out=part(out.uop), memory=size,
              frequencies=frequencies.tolist(), weights=text(np.hstack(packed)))

def chain(ddpm:DDPM, sampler:str, steps:int) -> dict:
  """A sampler's steps: the tables of their chain."""
  d = ddpm.every(timesteps(ddpm.T, steps))
  tables = dict(a=d.sqrt_alpha_bar, b=d.noise_std, mu_x0=d.mu_x0, mu_xt=d.mu_xt, sigma=np.sqrt(d.var))
  return dict(sampler=sampler, steps=steps, times=d.times.tolist()) | {
    name: [float(f"{v:.9g}") for v in table.astype(np.float32)] for name, table in tables.items()}

def answers(ddpm:DDPM, net:unet.UNet, clip:bool, known:bool, classes:np.ndarray) -> dict:
  """For #test: what Python draws by both samplers, with guidance if the network knows it; its x_T and each step's z."""
  w, steps, x_T, made = 2 if known else 1, min(STEPS, ddpm.T), draw_x_T(TESTED, image_shape(net), seed=0), []
  model = labelling(net, w, known)(np.resize(classes, TESTED))
  for sampler in ("ddpm", "ddim"):
    *_, (_, x_0, _) = SAMPLERS[sampler](ddpm, model, x_T, steps, clip=clip)
    made.append(chain(ddpm, sampler, steps) | dict(w=w, x_0=text(x_0.numpy())))
  rngs = [stream(0, "z", i) for i in range(TESTED)]
  return dict(tests=made, noise=text(np.stack([x_T.numpy(), *(normals(rngs, x_T.shape[1:]) for _ in range(steps))])))

def description(net:unet.UNet, ddpm:DDPM, meta:dict) -> str:
  """The model by its own account, in words."""
  (_, H, W), trained, own = image_shape(net), Path(str(meta.get("dataset") or "")).name, meta.get("ddpm", {})
  return (f"Trained on {trained}, {meta.get('step', 0):,} steps. " * bool(trained) + f"Images of {H} × {W} pixels. " +
    f"{sum(p.numel() for p in nn.state.get_parameters(net)):,} parameters, here in 16 bits. T = {ddpm.T}, βₜ " +
    f"{own.get('schedule')} " * isinstance(own.get("schedule"), str) + f"from {ddpm.beta[1]:g} to {ddpm.beta[-1]:g}. " +
    "The network predicts " + {"eps": "ε, the noise; ", "x0": "x₀, the image; ", "v": "v, a mixture of both; "}[
      ddpm.predict] + {"beta": "σₜ² = βₜ.", "beta_tilde": "σₜ² = β̃ₜ."}[ddpm.sigma])

def make(net:unet.UNet, ddpm:DDPM, meta:dict) -> str:
  """The page. ValueError, in one sentence, for a model that it does not know. The network is spent afterwards."""
  if ddpm.predict == "mu": raise ValueError("the page knows networks that predict eps, x0 or v, not mu")
  if ddpm.sigma == "learned": raise ValueError("the page knows the sigmas beta and beta_tilde, not a learned one")
  if (C := image_shape(net)[0]) not in (1, 3): raise ValueError(f"the page shows images of 1 or 3 channels, not of {C}")
  for p in nn.state.get_parameters(net):  # as the page has them, for Python's answers too
    if not np.abs(w := p.numpy()).max() < 65520: raise ValueError("there are weights that 16 bits cannot hold")
    p.replace(placed(w.astype(np.float16).astype(np.float32), str(p.device)))
  classes, clip, here = net.config["num_classes"], meta.get("clip", True), Path(__file__)
  known = classes > 0 and meta.get("null_class", True)
  chains = dict.fromkeys((name, max(1, ddpm.T // part)) for name, part in (("ddpm", 4), ("ddpm", 1), ("ddim", 20)))
  model = dict(shape=image_shape(net), T=ddpm.T, predict=ddpm.predict, clip=clip, known=known,
               classes=meta.get("classes") or [*map(str, range(classes))], chains=[chain(ddpm, *c) for c in chains],
               about=description(net, ddpm, meta), licence=Path(here.parents[1], "LICENSE").read_text(),
               own=(own := trained(classes, meta)).tolist(), **answers(ddpm, net, clip, known, own), **network(net))
  filling = json.dumps(model, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
  return here.with_suffix(".template.html").read_text().replace("MODEL", filling)

def main(argv:list[str]|None=None):
  p = parser("page.py", "Writes a trained model as one page that draws in a browser.")
  p.add_argument("--checkpoint", help="file, run's folder, or name on the hub (default: the newest of runs/)")
  p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
  p.add_argument("--out", default="page.html", help="(default: %(default)s)")
  p.set_defaults(dtype="float32", tf32=False)
  check_places((a := p.parse_args(argv)).out)
  path, net, ddpm, meta = open_model(a)
  page = make(net, ddpm, meta).encode()
  with atomic(a.out) as f: f.write(page)
  print(f"{a.out}: the model of {path}, {len(page)/1e6:.2f} MB")

if __name__ == "__main__": run(main)

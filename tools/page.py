"""A trained model as one page: a file that draws images in a browser, on the GPU behind it (WebGPU), and needs nothing
else. Students look before they read.

  python tools/page.py --checkpoint runs/mnist --out digits.html

The page has the network as tinygrad's kernels in WGSL, its weights in 16 bits and the tables of ddpm.py; the steps of
Algorithm 2 are its own JavaScript, see page.html. It draws the same noise as sample.py does, so that each seed leads to
the same images. With #test behind its address it compares itself with Python."""
from __future__ import annotations
import base64, json, math, sys
from pathlib import Path
import numpy as np
if not __package__: sys.path.insert(0, str(Path(__file__).parents[1]))  # started as a file, not by -m
from tinygrad import Tensor, dtypes, helpers, nn
from tinygrad.uop.ops import Ops, UOp
import unet
from ddpm import DDPM
from engine.capture import captured, placed
from engine.terminal import parser, run
from extras.guidance import labelling
from files.atomic import atomic
from sample import SAMPLERS, check_places, draw_x_T, image_shape, open_model, timesteps
from tools.bench import calls, source

BATCH = 8     # the images of the page
TESTED = 2    # of which #test compares these, after this many steps
STEPS = 10

def text(array:np.ndarray) -> str: return base64.b64encode(array.tobytes()).decode()

def network(net:unet.UNet) -> dict:
  """ε_θ(x_t, t, y) of a batch: kernels in WGSL, and a plan of which of them reads and writes which parts of one memory.

  tinygrad's NULL device renders them and runs nothing: no WebGPU is needed here. The network's weights move there."""
  params, waves = nn.state.get_parameters(net), (net.config["channels"]//2, net.config["freq_shift"])
  numbers = [p.numpy().astype(np.float16).ravel() for p in params]
  frequencies = unet.frequencies(*waves, net.conv_in.weight.device).numpy()
  with helpers.Context(DEV="NULL:WGSL"):
    for p in params: p.replace(p.to("NULL").realize())
    x, t, y = Tensor.empty(BATCH, *image_shape(net)), *(Tensor.empty(BATCH, dtype=dtypes.int32) for _ in "ty")
    call = captured(lambda: net(x, t, y).contiguous())
    out, constants = call(), unet.frequencies(*waves, "NULL")
  places:dict[UOp, int] = {}
  size = 0
  def place(u:UOp) -> int:  # where a buffer begins; WebGPU wants multiples of 256
    nonlocal size
    if u not in places: places[u], size = size, size + helpers.round_up(u.max_numel() * u.dtype.itemsize, 256)
    return places[u]
  def part(u:UOp) -> tuple[int, int]:  # where it begins and how many bytes it has
    if (view := u.contiguous_view()) is None: raise RuntimeError("a kernel reads what does not lie in one piece")
    return place(view[0]) + view[1] * view[0].dtype.itemsize, helpers.round_up(u.max_numel() * u.dtype.itemsize, 4)
  for p in params: place(p.uop.base)  # in the order of `weights`
  codes:dict[str, int] = {}
  plan = []
  for c in calls([call]):
    if c.src[0].op is not Ops.PROGRAM: raise RuntimeError(f"a browser has no {c.src[0].op.name} between its kernels")
    info = c.src[0].arg
    parts = [part(c.src[1+i]) for i in info.globals]
    if any(start % 256 for start, _ in parts): raise RuntimeError("a kernel reads a part that WebGPU cannot bind")
    plan.append([codes.setdefault(source(c.src[0]), len(codes)), info.global_size, parts])
  weights = text(np.concatenate([np.pad(n, (0, -n.size % 64)) for n in numbers]))
  places_of = [place(v.uop.base) for v in (constants, x, t, y)]
  return dict(kernels=[*codes], plan=plan, weights=weights, frequencies=frequencies.tolist(), places=places_of,
              out=part(out.uop), memory=size)

def chain(ddpm:DDPM, sampler:str, steps:int) -> dict:
  """The tables of the steps that a sampler takes."""
  d = ddpm.every(timesteps(ddpm.T, steps))
  tables = dict(a=d.sqrt_alpha_bar, b=d.sqrt_noise, mu_x0=d.mu_x0, mu_xt=d.mu_xt, sigma=np.sqrt(d.var))
  return dict(sampler=sampler, steps=steps, times=d.times.tolist()) | {
    name: [float(f"{v:.9g}") for v in table.astype(np.float32)] for name, table in tables.items()}

def answers(ddpm:DDPM, net:unet.UNet, clip:bool, known:bool) -> list[dict]:
  """What Python draws with a seed, for #test: in a few steps, with guidance where the network knows it."""
  classes, w, made = net.config["num_classes"], 2 if known else 1, []
  model = labelling(net, w, known)(np.arange(TESTED) // math.ceil(BATCH / classes) if classes else np.zeros(TESTED))
  x_T, steps = draw_x_T(TESTED, image_shape(net), seed=0), min(STEPS, ddpm.T)
  for sampler in ("ddpm", "ddim"):
    *_, (_, x_0, _) = SAMPLERS[sampler](ddpm, model, x_T, steps, clip=clip)
    made.append(chain(ddpm, sampler, steps) | dict(w=w, x_0=text(x_0.numpy())))
  return made

def description(net:unet.UNet, ddpm:DDPM, meta:dict) -> dict[str, str]:
  """The model in words, by its own account."""
  (C, H, W), m = image_shape(net), {"beta_1": 1e-4, "beta_T": 0.02, "schedule": "linear"} | meta.get("ddpm", {})
  facts = {"Trained on": Path(str(meta.get("dataset") or "images it does not name")).name,
           "Training steps": f"{meta['step']:,}" if "step" in meta else "",
           "Parameters": f"{sum(p.numel() for p in nn.state.get_parameters(net)):,}, here in 16 bits",
           "Images": f"{H} × {W}, " + ("grey" if C == 1 else "colour"),
           "Classes": f"{net.config['num_classes']}" if net.config["num_classes"] else "none",
           "Forward process": f"T = {ddpm.T}, β {m['schedule']}" + f" from {m['beta_1']:g} to {m['beta_T']:g}",
           "The network answers": {"eps": "ε, the noise", "x0": "x₀, the image", "v": "v, of both"}[ddpm.predict],
           "σₜ²": {"beta": "βₜ", "beta_tilde": "β̃ₜ"}[ddpm.sigma]}
  return {k: v for k, v in facts.items() if v}

def make(net:unet.UNet, ddpm:DDPM, meta:dict) -> str:
  """The page. ValueError, in one sentence, for a model that it does not know. The network is spent afterwards."""
  if ddpm.predict == "mu": raise ValueError("the page knows networks that predict eps, x0 or v, not mu")
  if ddpm.sigma == "learned": raise ValueError("the page knows the sigmas beta and beta_tilde, not a learned one")
  if (C := image_shape(net)[0]) not in (1, 3): raise ValueError(f"the page shows images of 1 or 3 channels, not of {C}")
  for p in nn.state.get_parameters(net):  # as the page has them, also for Python's answers
    half = p.numpy().astype(np.float16)
    if not np.isfinite(half).all(): raise ValueError("the weights do not fit into 16 bits")
    p.replace(placed(half.astype(np.float32), str(p.device)))
  classes, T, clip, here = net.config["num_classes"], ddpm.T, meta.get("clip", True), Path(__file__)
  known = bool(classes) and meta.get("null_class", True)
  chains = {(name, max(1, T // part)): () for name, part in (("ddpm", 1), ("ddpm", 4), ("ddim", 20))}
  names = meta.get("classes") or [str(k) for k in range(classes)]
  model = dict(shape=image_shape(net), T=T, predict=ddpm.predict, clip=clip, classes=names[:classes], known=known,
               chains=[chain(ddpm, *c) for c in chains], tests=answers(ddpm, net, clip, known),
               about=description(net, ddpm, meta), licence=Path(here.parents[1], "LICENSE").read_text(), **network(net))
  filling = json.dumps(model, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
  html, script = (here.with_suffix(kind).read_text() for kind in (".html", ".js"))
  return html.replace("SCRIPT", script).replace("MODEL", filling)

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
  print(f"{a.out}: {path} in {len(page)/1e6:.2f} MB; open it in a browser")

if __name__ == "__main__": run(main)

"""A run's folder: which program has it, its log, and the state from which it goes on."""
from __future__ import annotations
import contextlib, dataclasses, fcntl, inspect, json, math, os, sys, time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import nn
from engine import hosts
from engine.state import State
from engine.terminal import clock, stoppable
from files import checkpoint, pictures
from files.atomic import atomic
from files.weights import open_tensors, read_tensors, write_tensors

def place(out:str|os.PathLike, dataset:str|None) -> str:
  """A run's folder, with the dataset's name for <dataset>."""
  return str(out).replace("<dataset>", Path(dataset or "array").stem.strip(".") or "folder")

@contextlib.contextmanager
def claim(folder:Path) -> Iterator[None]:
  """Makes the folder, and keeps every other program that claims it out until this one ends, however it ends.

  OSError if the folder cannot be written or another has it; ValueError if it holds files of a run's names but is not a
  run's folder. Where the file system knows no locks, none is kept out. Of several processes the first does it for all,
  as everything that is written to a run's folder."""
  if hosts.rank():
    yield
    return
  try:
    own = ".lock", "last.safetensors", "ema.safetensors", "ema-[0-9]*.safetensors"
    if not any(any(folder.glob(k)) for k in own):
      for k in ("log.jsonl", "loss.png", "samples", "samples.png"):
        if (folder/k).exists(): raise ValueError(f"{folder} holds {k} but is not a run's folder: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder/".lock", "wb")  # noqa: SIM115
  except OSError as e: raise OSError(f"cannot write {folder}: {e.strerror or e}") from e
  with lock:
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise OSError(f"{folder} is in use by another program: wait for its end, or name another") from None
    except OSError: pass
    yield

# *** the log: a line of JSON for each step that is written down ***

def entries(log:Path) -> Iterator[dict]:
  """The log's entries, up to the first line that is damaged."""
  with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError), open(log, "rb") as f:
    for line in f:
      entry = json.loads(line)
      for name in ("step", *(("loss", "smooth") if "loss" in entry else ())): float(entry[name])
      yield entry

def cut(log:Path, last:int, note:str=""):
  """Drops what a killed run logged beyond its last checkpoint, step `last`; then adds the note, if there is one."""
  if hosts.rank(): return
  with atomic(log) as f:
    for entry in entries(log):
      if entry["step"] <= last: f.write(json.dumps(entry).encode() + b"\n")
    if note: f.write(json.dumps({"step": last, "note": note}).encode() + b"\n")

def curve(log:Path, *names:str) -> np.ndarray:
  """The steps whose entries have all of these names, and their values: (1 + len(names), n)."""
  rows = [[entry["step"], *(entry[k] for k in names)] for entry in entries(log) if all(k in entry for k in names)]
  return np.array(rows, float).reshape(-1, 1 + len(names)).T

# *** where a run begins, and what it leaves ***

def describe(last:Path) -> dict:
  """What a run's last.safetensors says of itself. ValueError if it is not the state of a run."""
  try:
    meta = json.loads(open_tensors(last)[1]["ddpm"])
    int(meta["step"]), float(meta["smooth"]), dict(meta["train"])
  except (KeyError, ValueError, TypeError, RecursionError):
    raise ValueError(f"{last} is not the state of a run: use --restart to begin anew") from None
  return meta

def resume(last:Path, state:State, fixed:dict, defaults:dict, may_change:tuple[str, ...]=()) -> tuple[int, float]:
  """Takes over the state that a run left: the number of its last step, and the smoothed loss there.

  fixed: all that fixes the numbers of the run; it goes on with the same. defaults: what a run had before a setting
  existed. may_change: settings that may be new, which the log then notes. ValueError for any other difference, by name,
  and for a state that does not fit."""
  meta, changed = describe(last), []
  before = defaults | meta["train"]
  if isinstance(before["network"], dict) and isinstance(defaults["network"], dict):
    before["network"] = defaults["network"] | {k: v for k, v in before["network"].items() if k in defaults["network"]}
  for k, v in fixed.items():
    was = before.get(k)
    if was == v or k == "labels" and was is None or was == str(v): continue  # numpy's numbers were written as words
    if k not in may_change:
      hint = "--change to go on with another, " if k in CHANGEABLE else ""
      if k == "network" and was and v: was, v = ({n: d.get(n) for n in v if was.get(n) != v[n]} for d in (was, v))
      how = f"other {SUMS[k]}" if k in SUMS else f"{k} = {was}, not {v}"
      raise ValueError(f"{last.parent} was trained with {how}: use the same, {hint}another --out, or --restart to "
                       "begin anew")
    changed.append(f"{k} from {was} to {v}" + ", sums in another order" * (k == "processes"))
  for k in before.keys() - fixed.keys() - FREE - {"labels"}:
    if before[k]: raise ValueError(f"{last.parent} was trained with {k} = {before[k]}, which is gone: use another "
                                   "--out, or --restart to begin anew")
  tensors = read_tensors(last)[0]
  want = {f"{key}.{k}": shape for key in ("raw", "ema") for k, shape in state.shapes.items()}
  want |= {f"kept.{k}": v.shape for k, v in state.kept.items()}
  if {k: v.shape for k, v in tensors.items()} != want | {"adam.m": (state.size,), "adam.v": (state.size,)}:
    raise ValueError(f"{last} does not hold the state of this network: use --restart to begin anew")
  if any(not np.isfinite(v).all() for v in tensors.values()):
    raise ValueError(f"{last} holds numbers that are not finite: use --restart to begin anew")
  state.put(tensors)
  note = f"{', '.join(changed)}: from here on not bit for bit a run of one piece" if changed else ""
  if note: print(f"{last.parent}: {note}", file=sys.stderr)
  cut(last.parent/"log.jsonl", meta["step"], note)
  return meta["step"], meta["smooth"]

SUMS = {"data": "images, or images read in another way", "labels": "labels"}  # of which checksums are kept

def settings(c, network:dict|None, found:Any) -> dict:
  """All that fixes the numbers of a run, from train.py's `Config`, the arguments of a UNet and the `data.Dataset`."""
  fixed = {k: v for k, v in dataclasses.asdict(c).items() if k not in FREE}
  more = {"network": network, "images": found.images.shape, "data": int(found.digest[:8], 16),
          "processes": hosts.size()}  # which fix the order of the sums
  if c.class_conditional: more["labels"] = found.digest[8:]  # of the labels and the names of the classes
  return json.loads(json.dumps(fixed | more, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))

# settings that fix no number, or only by way of the network and the images
FREE = {"dataset", "data_dir", "image_size", "fit", "mode", "out", "restart", "change", "steps", "save_every",
        "keep_every", "sample_every", "channels", "channel_mult", "num_res_blocks", "attn", "dropout", "norm_groups"}

def begin(c, state:State, fixed:dict) -> tuple[int, float]:
  """Where a run begins, with the weights that belong there: (steps behind it, smoothed loss)."""
  out = Path(c.out)
  if (last := out/"last.safetensors").exists() and not c.restart:
    network = None
    if fixed["network"]: network = {k: p.default for k, p in inspect.signature(type(state.model)).parameters.items()}
    defaults = dataclasses.asdict(type(c)()) | {"network": json.loads(json.dumps(network, default=str)), "processes": 1}
    return resume(last, state, fixed, defaults, ("processes", *(CHANGEABLE if c.change else ())))
  if (ema := out/"ema.safetensors").exists() and not c.restart and step_of(ema) > c.save_every:
    raise ValueError(f"{out} has weights but no last.safetensors, from which a run goes on: use another --out, or "
                     "--restart to write over them")
  old = [*out.glob("ema-[0-9]*.safetensors"), *out.glob("samples/*.png")] if c.restart else []
  if old: print(f"{out}: {len(old)} files of the run before stay, as {old[0].relative_to(out)}", file=sys.stderr)
  if c.init:
    path = checkpoint.find(c.init)
    given = nn.state.get_state_dict(checkpoint.load(path)[0])
    said = begin_with(state, {k: v.numpy() for k, v in given.items()}, path)
    print(f"begins with the weights of {path}" + f"; {said}" * bool(said), file=sys.stderr)
  cut(out/"log.jsonl", 0)
  return 0, 0.0

def step_of(ema:Path) -> float:
  """The step of averaged weights; ∞ if the file does not say. (A run that was killed in its first save left those of
  its first `save_every` steps, and no state.)"""
  try: return float(json.loads(open_tensors(ema)[1]["ddpm"])["step"])
  except (KeyError, ValueError, TypeError, RecursionError): return math.inf

def origin(out:str|os.PathLike, init:str, restart:bool) -> str:
  """The checkpoint that says what network a run with --init has: its own, if it has one already."""
  last = Path(out, "last.safetensors")
  return str(last) if last.exists() and not restart else checkpoint.find(init)

def own(c, given:dict, preset:dict) -> dict:
  """The settings that come before the preset's where no flag (`given`) says them. The preset's min_snr is for L_simple
  of ε, not for t counted as in L_vlb; its times too are for L_simple of ε. Its lr is for its times: where t is drawn
  otherwise, the gradient has more noise, and half of it is better. A new run of more steps than the preset's: anneal,
  the step at which the learning rate reaches 0, is its last. A run that resumes, perhaps begun with an older preset:
  its own min_snr, times, lr, anneal, and no steps beyond that. Of a new run it says what is not the preset's.

  ValueError for a flag that would change nothing, as one that asks for such steps."""
  last, found = Path(c.out, "last.safetensors"), dict[str, Any]()
  was = None if c.restart or not last.exists() else describe(last)["train"]
  for key, plain in (("min_snr", 0.0), ("times", "uniform")):
    if getattr(c, key) == plain or key in given: continue
    if (c.predict, c.loss) != ("eps", "simple") or key == "min_snr" and c.times == "weighted": found[key] = plain
    elif was: found[key] = type(plain)(was.get(key, plain))
  if "times" in preset and "lr" not in given:
    if was: found["lr"] = float(was["lr"])
    elif preset["times"] != found.get("times", c.times): found["lr"] = c.lr / 2
  if not was:
    if c.schedule == "const" and "beta_1" in given: raise ValueError("--schedule const has no use for --beta-1")
    if "drop_labels" in given and not c.class_conditional: raise ValueError("--drop-labels is for --class-conditional")
    if found:
      print("with these flags, instead of the preset's: " + ", ".join(f"--{k.replace('_', '-')} {v}"
            for k, v in found.items()), file=sys.stderr)
  if not c.anneal or "anneal" in given: return found
  if not was: return found | {"anneal": max(c.anneal, c.steps)}
  end = int(was.get("anneal", 0))
  if end and "steps" not in given: return found | {"anneal": end, "steps": min(end, c.steps)}
  if c.steps > end > 0:
    raise ValueError(f"{c.out} was begun with a learning rate that is 0 from step {end + 1} on, so more steps would "
                     f"change nothing: use --change --anneal {c.steps} to let it rise again, or begin a longer run "
                     f"with another --out, --init {c.out}, or with --restart")
  return found | {"anneal": end}

CHANGEABLE = ("lr", "batch", "ema", "anneal", "min_snr")  # by --change

def begin_with(state:State, given:dict[str, np.ndarray], path:str) -> str:
  """Takes the weights of another run (--init), and says what it could not take: the table of the labels is made anew
  for another number of classes, and left out for none. ValueError if they are another network's."""
  own = state.shapes
  said = "the table of the labels is left out" if "label" in given and "label" not in own else ""
  if {k for k in own if own[k] != getattr(given.get(k), "shape", None)} == {"label"}:
    given, said = {**given, "label": state.arrays()["raw.label"]}, "the table of the labels is made anew"
  if {k: v.shape for k, v in given.items() if k in own} != own or given.keys() - own.keys() - {"label"}:
    raise ValueError(f"--init {path} is another network than this one")
  state.start({k: given[k] for k in own})
  return said

def write(out:Path, state:State, about:dict, fixed:dict, step:int, smooth:float, keep:bool=False):
  """The averaged weights, and all that `resume` needs."""
  arrays, about = state.arrays(), about | {"step": step}
  average = {k[4:]: v for k, v in arrays.items() if k.startswith("ema.")}
  whole = nn.state.get_state_dict(state.average).items()  # and tensors that are not trained, or have a second name
  average |= {k: v.numpy() for k, v in whole if k not in average}
  write_tensors(out/"ema.safetensors", average, about)
  if keep: write_tensors(out/f"ema-{step:06d}.safetensors", average, about)
  # last of all, so that a run that is stopped in between makes the others anew
  write_tensors(out/"last.safetensors", arrays, about | {"train": fixed, "smooth": smooth})

def check_finite(step:int, loss:float, norm:float, out:Path):
  """ValueError, with the name of the last good state, unless the loss and the norm of the gradient are numbers."""
  if math.isfinite(loss) and math.isfinite(norm): return
  last = out/"last.safetensors"
  good = f"the last good state is {last}" if last.exists() else "there was no checkpoint before"
  raise ValueError(f"at step {step} the loss is {loss} and the gradient's norm {norm}: "
                   f"stopped before anything of it was saved; {good}")

# *** what a run says ***

def entry(step:int, t:np.ndarray, T:int, each:np.ndarray, norm:float, smooth:float, lr:float, rate:float) -> dict:
  """A step in the log. each: the loss of each example; bands: the loss in each quarter of 1..T, as a total that stands
  still can hide bands that do not; rate: images per second, 0 if unknown."""
  bands:list[float|None] = []
  for i in range(4):
    here = (t - 1) * 4 // T == i
    bands.append(float(each[here].mean()) if here.any() else None)
  return {"step": step, "loss": float(each.mean()), "smooth": smooth, "grad_norm": norm, "lr": float(lr),
          "bands": bands, "images_per_s": round(rate, 1)}

def introduce(c, state:State, found:Any, begun:int, left:float):
  """A run's first lines. left: ᾱ_T, what is left of the image's variance at the end of the forward process."""
  about = found.about + "; the classes are not used" * (len(found.classes) > 1 and not c.class_conditional)
  print(f"{c.dataset or 'an array'}: {about}; flips {'on' if c.flip else 'off'}; {state.size:,} parameters; "
        f"batch {c.batch}; to {c.out}" + f", from step {begun} on" * bool(begun), file=sys.stderr)
  if left > 1e-2:
    print(f"train.py: warning: with T = {c.T} the last x_T still holds {left**.5:.0%} of the image, but sampling "
          "starts from pure noise", file=sys.stderr)
  if 0 < c.anneal < c.steps:
    print(f"train.py: warning: the learning rate is 0 after step {c.anneal} (--anneal): the steps from there to "
          f"{c.steps} change the average of the weights alone", file=sys.stderr)
  if begun >= c.steps: print(f"{c.out} has {begun} steps already: --steps {c.steps} asks for no more", file=sys.stderr)
  else: print("compiling the step (the first time some 20 s on two cores) ...", file=sys.stderr)

class Record:
  """What a run writes while it goes: its log, the picture of its loss, its samples, its checkpoints.

  loss, held_out: the loss of these images is measured at each save, if there are any; show(step) draws samples.
  Inside of `with` Ctrl-C and SIGTERM do not end the program: `asked` holds them, the next step is the last, and at the
  end KeyboardInterrupt or SystemExit is raised."""
  def __init__(self, c, state:State, loss:Callable, held_out:tuple|None, show:Callable[[int], None], about:dict,
               fixed:dict, begun:int, smooth:float):
    self.c, self.state, self.loss, self.held_out, self.show = c, state, loss, held_out, show
    self.about, self.fixed, self.begun, self.smooth, self.out = about, fixed, begun, smooth, Path(c.out)
    self.seconds, self.spoken, self.before = 0.0, -math.inf, time.monotonic()

  def __enter__(self) -> Record:
    self.exits = contextlib.ExitStack()
    if not hosts.rank(): self.log = self.exits.enter_context(open(self.out/"log.jsonl", "a", buffering=1))
    self.asked = self.exits.enter_context(stoppable())
    return self

  def __exit__(self, *error): self.exits.__exit__(*error)

  def step(self, n:int, t:np.ndarray, each:np.ndarray, norm:float, lr:float) -> bool:
    """Takes down step n: its times and losses (B,), the norm of its gradient. Returns whether it is the last.

    ValueError, before anything is saved, unless the loss and the norm are numbers."""
    c, loss, now = self.c, float(each.mean()), time.monotonic()
    check_finite(n, loss, norm, self.out)
    asked = hosts.gather(np.array([sum(self.asked[:1])])).max()  # of any process
    if asked and not self.asked: self.asked.append(int(asked))
    last = n == c.steps or bool(asked)
    if hosts.rank(): return last
    if n > self.begun + 1: self.seconds += (0.05 if self.seconds else 1) * (now - self.before - self.seconds)
    self.smooth += max(0.01, 1/n) * (loss - self.smooth)
    rate = c.batch / self.seconds if self.seconds else 0.0
    line = entry(n, t, c.T, each, norm, self.smooth, lr, rate)
    if sys.stderr.isatty() or now - self.spoken > 10 or last:
      say(line, c.steps, self.seconds)
      self.spoken = now
    if c.sample_every and (n % c.sample_every == 0 or n == c.steps) and not asked: self.show(n)
    keep = bool(c.keep_every) and n % c.keep_every == 0
    saving = last or keep or n % c.save_every == 0
    if saving and self.held_out:
      line["held_out"] = float(self.state.losses(self.loss, self.held_out, c.batch // c.accum).mean())
    if saving or n % max(1, c.steps // 2000) == 0: self.log.write(json.dumps(line) + "\n")
    if saving: self.save(n, keep)
    if asked: print(f"\nstopped at step {n} and saved: run the same command again to go on", file=sys.stderr)
    self.before = time.monotonic()
    return last

  def save(self, n:int, keep:bool):
    os.fsync(self.log.fileno())
    held_out:tuple|None = tuple(curve(self.out/"log.jsonl", "held_out")) if self.held_out else None
    steps, loss, smooth = curve(self.out/"log.jsonl", "loss", "smooth")
    pictures.loss_curve(self.out/"loss.png", steps, loss, smooth, held_out)
    write(self.out, self.state, self.about, self.fixed, n, self.smooth, keep)

def say(entry:dict, steps:int, seconds:float):
  """The line of a step at the terminal."""
  n, left = entry["step"], clock((steps - entry["step"]) * seconds) if seconds else "-:--:--"
  print(f"step {n:>6}/{steps}  loss {entry['smooth']:.4f}  grad {entry['grad_norm']:7.3f}  "
        f"{entry['images_per_s']:7.1f} images/s  {left} left",
        end="\r" if sys.stderr.isatty() and n < steps else "\n", file=sys.stderr, flush=True)

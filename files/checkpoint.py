"""A checkpoint: one safetensors file that carries the network's arguments."""
import json, os, re
from pathlib import Path
import numpy as np
from tinygrad import nn
from files import hub
from files.weights import build, fill, read_tensors, write_tensors
from unet import UNet

def save(path:str|os.PathLike, model:UNet, meta:dict|None=None, dtype:type=np.float32):
  """Writes weights and arguments to one file. OSError if it cannot."""
  state = nn.state.get_state_dict(model)
  write_tensors(path, {k: v.numpy().astype(dtype) for k, v in state.items()}, {**(meta or {}), "unet": model.config})

def load(path:str|os.PathLike, raw:bool=False) -> tuple[UNet, dict]:
  """(model, meta) from a file of `save` or of train.py (its averaged weights, or with `raw` those being trained),
  from a folder in diffusers' layout, or from the name of such a model on the hub, like google/ddpm-cifar10-32.

  OSError or ValueError, in one sentence, for what cannot be read, is damaged, or is no network of this program."""
  if os.path.isdir(path): return hub.load(path)
  if (not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
      and not str(path).endswith(".safetensors")):
    return hub.load(hub.download(str(path)))
  if str(path).endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
    raise ValueError(f"{path} is a pickle, which can run any program when read: only safetensors files are loaded")
  tensors, metadata = read_tensors(path)
  try: config = (meta := json.loads(metadata["ddpm"]))["unet"]
  except (KeyError, ValueError, TypeError, RecursionError):
    raise ValueError(f"{path} carries no description of its network: it was not saved by this program") from None
  if not isinstance(config, dict): raise ValueError(f"{path} carries no description of its network")
  if raw and not any(k.startswith("raw.") for k in tensors):
    raise ValueError(f"{path} holds only averaged weights: the raw ones are in last.safetensors")
  if any(k.startswith("ema.") for k in tensors):  # train.py's state: both sets of weights, and Adam's moments
    tensors = {k[4:]: v for k, v in tensors.items() if k.startswith("raw." if raw else "ema.")}
  return fill(build(config, path), tensors, path), meta

def find(path:str|None=None, raw:bool=False) -> str:
  """The file that a program's --checkpoint means: that of a run's folder. Without one, that of the newest run, or the
  one shipped. ValueError if there is neither."""
  name = "last.safetensors" if raw else "ema.safetensors"
  if path: return str(run) if (run := Path(path, name)).is_file() else str(path)
  if runs := sorted(Path("runs").glob(f"*/{name}"), key=lambda f: f.stat().st_mtime): return str(runs[-1])
  shipped = Path(__file__).parent.parent/"checkpoints"/"mnist.safetensors"
  if shipped.is_file() and not raw: return str(shipped)
  raise ValueError(f"there is no runs/*/{name} here yet: train a model first (make train) or name a --checkpoint")

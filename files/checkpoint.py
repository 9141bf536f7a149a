"""A checkpoint: one safetensors file that carries the network's arguments."""
import json, os
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import dtypes, nn
from ddpm import DDPM
from files import download, hub
from files.weights import fill, open_tensors, refuse_pickle, write_tensors
from unet import UNet

def save(path:str|os.PathLike, model:Any, meta:dict|None=None, dtype:type=np.float32):
  """Writes weights to one file and, if they are a UNet's, its arguments. OSError if it cannot.

  model: any object with tensors as its parameters; `load` knows only UNet."""
  tensors:dict[str, np.ndarray] = {}
  for name, v in nn.state.get_state_dict(model).items():
    if dtypes.is_float(v.dtype): tensors[name] = v.float().numpy().astype(dtype, copy=False)
    else: tensors[name] = v.numpy()
  meta = dict(meta or {})
  if type(model) is UNet: meta["unet"] = model.config
  write_tensors(path, tensors, meta)

def load(path:str|os.PathLike, raw:bool=False) -> tuple[UNet, dict]:
  """(model, meta) from a file of `save`; a file or the folder of a run of train.py (its averaged weights, or with `raw`
  those being trained); a folder in diffusers' layout; or such a model's name on the hub: google/ddpm-cifar10-32, or
  name@revision.

  OSError or ValueError, in one sentence, for what cannot be read, is damaged, or is no network of this program."""
  path = find(str(path) or ".", raw)
  if os.path.isdir(path): return hub.load(path, raw)
  if path.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) and os.path.exists(path): refuse_pickle(path)
  if not os.path.exists(path) and not path.endswith(".safetensors") and download.is_name(path):
    return hub.load(download.model(path, raw), raw)
  readers, metadata = open_tensors(path)
  try: meta = json.loads(metadata["ddpm"])
  except (KeyError, ValueError, RecursionError): meta = {}
  if not isinstance(meta, dict) or not isinstance(meta.get("unet"), dict):
    raise ValueError(f"{path} carries no description of a network of this program: tinygrad.nn.state.load_state_dict "
                     "loads it into your own")
  if raw and not any(k.startswith("raw.") for k in readers):
    raise ValueError(f"{path} holds only averaged weights: the raw ones are in last.safetensors")
  if any(k.startswith("ema.") for k in readers):  # train.py's state: both sets of weights, and Adam's moments
    readers = {k[4:]: v for k, v in readers.items() if k.startswith("raw." if raw else "ema.")}
  hub.check_images(meta, path)
  model = build(meta["unet"], path)
  fill(nn.state.get_state_dict(model), readers, path)
  return model, meta

def build(config:dict, path:str) -> UNet:
  """The network of a checkpoint's arguments."""
  args:dict = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
  try: return UNet(**args)
  except (TypeError, AttributeError, ArithmeticError) as e:
    raise ValueError(f"{path} does not describe a network of this program: {e}") from e

def diffusion(meta:dict, path:str) -> DDPM:
  """The forward and reverse process that a checkpoint describes. ValueError if it does not."""
  try: return DDPM(**meta.get("ddpm", {}))
  except TypeError as e: raise ValueError(f"{path} does not describe its diffusion: {e}") from e

def find(path:str|None=None, raw:bool=False) -> str:
  """The file that a program's --checkpoint means: that of a run's folder. Without one, that of the newest run, or the
  one shipped. ValueError if there is neither."""
  name = "last.safetensors" if raw else "ema.safetensors"
  if path: path = os.path.expanduser(path)
  if path and Path(path, "log.jsonl").is_file() and not Path(path, name).is_file():
    raise ValueError(f"{path} is the folder of a run that has no {name} yet")
  if path: return str(run) if (run := Path(path, name)).is_file() else str(path)
  if runs := sorted(Path("runs").glob(f"*/{name}"), key=lambda f: f.stat().st_mtime): return str(runs[-1])
  shipped = Path(__file__).parent.parent/"checkpoints"/"mnist.safetensors"
  if shipped.is_file() and not raw: return str(shipped)
  raise ValueError(f"there is no runs/*/{name} here yet: train a model first (make train) or name a --checkpoint")

"""Tensors in safetensors files, written and read in full, and put into a network."""
import json, math, os
import numpy as np
from tinygrad import Tensor, nn
from files.atomic import atomic
from unet import UNet

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}

def write_tensors(path:str|os.PathLike, tensors:dict[str, np.ndarray], meta:dict):
  """A safetensors file with `meta` as JSON in its header. OSError if it cannot be written."""
  names = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}
  header:dict[str, dict] = {"__metadata__": {"ddpm": json.dumps(meta)}}
  offset = 0
  for k, v in tensors.items():
    header[k] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [offset, offset := offset+v.nbytes]}
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  with atomic(path) as f:
    f.write(len(head).to_bytes(8, "little") + head)
    for v in tensors.values(): f.write(v.tobytes())

def read_tensors(path:str|os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The tensors and the metadata of a safetensors file.

  ValueError unless every length, type, shape and offset is right."""
  def check(ok:bool, what:str):
    if not ok: raise ValueError(f"{path} is damaged or no safetensors file: {what}")
  try: raw = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  check(len(raw) >= 8, "it is too short")
  n = int.from_bytes(raw[:8].tobytes(), "little")
  check(2 <= n <= min(len(raw)-8, 100_000_000), "its header does not fit into it")
  try: header = json.loads(raw[8:8+n].tobytes())
  except (ValueError, RecursionError): check(False, "its header is not JSON")
  check(isinstance(header, dict), "its header is not a table")
  meta, data, end, tensors = header.pop("__metadata__", None) or {}, raw[8+n:], 0, {}
  check(isinstance(meta, dict) and all(isinstance(v, str) for v in meta.values()), "its metadata are not text")
  whole = lambda v, least: isinstance(v, list) and len(v) >= least and all(type(i) is int and 0 <= i < 2**48 for i in v)
  for spec in header.values():
    check(isinstance(spec, dict) and str(spec.get("dtype")) in DTYPES and
          whole(spec.get("shape"), 0) and len(spec["shape"]) <= 8 and
          whole(spec.get("data_offsets"), 2) and len(spec["data_offsets"]) == 2,
          "a tensor has no valid type, shape or place")
  for name, spec in sorted(header.items(), key=lambda kv: kv[1]["data_offsets"]):
    (a, b), dtype, shape = spec["data_offsets"], np.dtype(DTYPES[spec["dtype"]]), spec["shape"]
    check(a == end and b <= len(data) and b-a == math.prod(shape)*dtype.itemsize,
          f"the tensor {name[:80]!r} does not lie where it should")
    v = np.frombuffer(data[a:b].tobytes(), dtype).reshape(shape)
    tensors[name], end = (v.astype(np.uint32) << 16).view(np.float32) if spec["dtype"] == "BF16" else v, b
  check(end == len(data), "bytes are left over or missing")
  return tensors, meta

def fill(model:UNet, tensors:dict[str, np.ndarray], path:str|os.PathLike) -> UNet:
  """Puts the tensors into the model. ValueError naming the first that is missing, unknown or of another shape."""
  state = nn.state.get_state_dict(model)
  for names, what in ((state.keys()-tensors.keys(), "lacks"), (tensors.keys()-state.keys(), "has an unknown")):
    if names:
      raise ValueError(f"{path} {what} tensor {min(names)!r}{f' (and {len(names)-1} more)' if len(names) > 1 else ''}")
  for k, v in state.items():
    if v.shape != tensors[k].shape:
      raise ValueError(f"{path}: tensor {k!r} has shape {tensors[k].shape}, the network needs {v.shape}")
    if not np.isfinite(tensors[k]).all(): raise ValueError(f"{path}: tensor {k!r} holds numbers that are not finite")
    v.replace(Tensor(tensors[k].astype(np.float32), device=v.device))
  Tensor.realize(*state.values())
  return model

def build(config:dict, path:str|os.PathLike) -> UNet:
  """The network of a checkpoint's arguments."""
  try:
    args:dict = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    if not args.get("fourier", True): del args["fourier"]  # written by earlier versions, for networks without it
    return UNet(**args)
  except (TypeError, AttributeError) as e:
    raise ValueError(f"{path} does not describe a network of this program: {e}") from e

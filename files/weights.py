"""Tensors in safetensors files: written, read one at a time, and put into a network."""
import functools, json, math, os
from collections.abc import Callable, Mapping
from typing import BinaryIO
import numpy as np
from tinygrad import Device, Tensor
from files.atomic import atomic

Readers = Mapping[str, Callable[[], np.ndarray]]  # a tensor's name -> a function that reads it
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
          "BOOL": np.bool_}

def write_tensors(path:str|os.PathLike, tensors:dict[str, np.ndarray], meta:dict):
  """A safetensors file with `meta` as JSON in its header. OSError if it cannot be written."""
  names = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}
  about = json.dumps(meta, default=plainly)
  header:dict[str, dict] = {"__metadata__": {"format": "pt", "ddpm": about}}
  offset = 0
  for k, v in tensors.items():
    header[k] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [offset, offset := offset+v.nbytes]}
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  with atomic(path) as f:
    f.write(len(head).to_bytes(8, "little") + head)
    for v in tensors.values(): f.write(v.tobytes())

def plainly(v:object) -> object:
  """What JSON has for numpy's numbers and arrays, such as a schedule, and for paths."""
  return str(v) if isinstance(v, os.PathLike) else np.asarray(v).tolist()

def read_tensors(path:str|os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The tensors and the metadata of a safetensors file, all in memory. Errors as those of `open_tensors`."""
  readers, meta = open_tensors(path)
  return {k: read() for k, read in readers.items()}, meta

def open_tensors(path:str|os.PathLike) -> tuple[Readers, dict[str, str]]:
  """A function for each tensor that reads it, and the metadata, so that only one tensor need be in memory.

  The file stays open: what is read later is the same file, even if another has got its name. OSError if it cannot be
  read; ValueError unless every length, type, shape and offset is right."""
  def check(ok:object, what:str):
    if not ok: raise ValueError(f"{path} is damaged or no safetensors file: {what}")
  try:
    check(os.path.getsize(path) >= 8, "it is too short")
    f = open(path, "rb")  # noqa: SIM115
    size, n = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
    check(2 <= n <= min(size-8, 100_000_000), "its header does not fit into it")
    header = json.loads(f.read(n))
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError): check(False, "its header is not JSON")
  check(isinstance(header, dict), "its header is not a table")
  meta, end, readers = header.pop("__metadata__", None) or {}, 0, dict[str, Callable[[], np.ndarray]]()
  check(isinstance(meta, dict) and all(isinstance(v, str) for v in meta.values()), "its metadata are not text")
  whole = lambda v, least: isinstance(v, list) and len(v) >= least and all(type(i) is int and 0 <= i < 2**48 for i in v)
  for spec in header.values():
    check(isinstance(spec, dict), "a tensor is not described")
    check((kind := str(spec.get("dtype"))) in DTYPES, f"a tensor has the type {kind[:20]!r}, which is not read here")
    check(whole(spec.get("shape"), 0) and len(spec["shape"]) <= 8 and
          whole(spec.get("data_offsets"), 2) and len(spec["data_offsets"]) == 2,
          "a tensor has no valid shape or place")
  for name, spec in sorted(header.items(), key=lambda kv: kv[1]["data_offsets"]):
    (a, b), shape = spec["data_offsets"], spec["shape"]
    check(a == end and 8+n+b <= size and b-a == math.prod(shape)*np.dtype(DTYPES[spec["dtype"]]).itemsize,
          f"the tensor {name[:80]!r} does not lie where it should")
    readers[name], end = functools.partial(read_tensor, f, 8+n+a, b-a, spec["dtype"], shape), b
  check(8+n+end == size, "bytes are left over or missing")
  return readers, meta

def read_tensor(f:BinaryIO, start:int, size:int, dtype:str, shape:list[int]) -> np.ndarray:
  """One tensor of an open file; bfloat16 as float32, which numpy knows."""
  f.seek(start)
  data = bytearray(f.read(size))  # not bytes: OpenCL takes a buffer only if it can be written to
  if len(data) != size: raise ValueError(f"{f.name} was cut off while it was read")
  v:np.ndarray = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
  return (v.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else v

def fill(state:dict[str, Tensor], readers:Readers, path:str|os.PathLike):
  """Puts the tensors into those of a network. ValueError naming the first that is missing, unknown or does not fit."""
  for names, what in ((state.keys()-readers.keys(), "lacks"), (readers.keys()-state.keys(), "has an unknown")):
    if names:
      raise ValueError(f"{path} {what} tensor {min(names)!r}{f' (and {len(names)-1} more)' if len(names) > 1 else ''}")
  for k, v in state.items():
    if (new := readers[k]()).dtype.kind != "f": raise ValueError(f"{path}: tensor {k!r} is {new.dtype}, not floats")
    with np.errstate(over="ignore"): new = new.astype(np.float32, copy=False)
    if v.shape != new.shape:
      raise ValueError(f"{path}: tensor {k!r} has shape {new.shape}, the network needs {v.shape}")
    if not np.isfinite(new).all(): raise ValueError(f"{path}: tensor {k!r} holds numbers that are not finite")
    host = Tensor(np.ascontiguousarray(new), device="NPY")
    v.uop.base.buffer.copy_from(host.uop.base.buffer)  # type: ignore[union-attr, arg-type]
    Device[str(v.device)].synchronize()  # until then CUDA and OpenCL keep the host's side

def converting(path:str|os.PathLike) -> str:
  """The command that makes a safetensors file of a file of PyTorch, where PyTorch is at hand."""
  new = os.path.splitext(path)[0] + ".safetensors"
  return ('python -c "import torch, safetensors.torch as s; '
          f's.save_file(torch.load({str(path)!r}, \'cpu\', weights_only=True), {new!r})"')

def refuse_pickle(path:str|os.PathLike):
  """ValueError for a file of PyTorch."""
  raise ValueError(f"{path} is a pickle, which can run any program when read: where PyTorch is at hand, "
                   f"{converting(path)} makes a file of it that can be loaded")

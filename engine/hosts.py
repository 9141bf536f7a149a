"""Several processes of one program, started by mpirun or srun, one for each device: not in the paper. MPI joins them,
through mpi4py, which is imported only then. All call the functions below at the same places, and see the same files."""
from __future__ import annotations
import ctypes, functools, os, sys, time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
import numpy as np
from tinygrad import Device, Tensor
from engine import terminal

@functools.cache
def mpi() -> Any:
  """mpi4py.MPI if there are several processes, else None. From here on all but the first are silent.
  RuntimeError if mpi4py is missing, or belongs to another MPI than the one that started the processes."""
  n = max(int(os.environ.get(k) or 1) for k in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
  if n == 1: return None
  os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # a process that waits leaves its core to others
  try: from mpi4py import MPI
  except (ImportError, RuntimeError) as e:
    raise RuntimeError(f"{n} processes need MPI: pip install -r requirements-mpi.txt ({e})") from e
  if (seen := MPI.COMM_WORLD.size) != n:
    raise RuntimeError(f"of {n} processes MPI sees {seen}: start them by this MPI's own mpirun, or by srun --mpi=pmix")
  if MPI.COMM_WORLD.rank: sys.stdout = sys.stderr = open(os.devnull, "w")
  return MPI

def rank() -> int: return mpi().COMM_WORLD.rank if mpi() else 0
def size() -> int: return mpi().COMM_WORLD.size if mpi() else 1

def run(main:Callable[[], None]):
  """`terminal.run` for a program of several processes: one that fails ends them all, with its sentence."""
  def start():
    mpi()
    main()
  try: terminal.run(start)
  except BaseException as e:
    MPI, stopped = sys.modules.get("mpi4py.MPI"), isinstance(e, SystemExit) and not isinstance(e.code, str)
    if MPI is None or MPI.COMM_WORLD.size == 1 or stopped: raise
    if MPI.COMM_WORLD.rank: time.sleep(1)  # where all fail alike, the first says it
    sys.stderr = sys.__stderr__
    if isinstance(e, SystemExit): print(e.code, file=sys.stderr, flush=True)
    else: sys.excepthook(type(e), e, e.__traceback__)
    MPI.COMM_WORLD.Abort(1)

def local_rank() -> int:
  """Which of its host's processes this is, from 0."""
  return MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).rank if (MPI := mpi()) else 0

def share(n:int, parts:int=1) -> slice:
  """This process's share of n examples. ValueError unless all get as many, in so many equal parts."""
  if n % (size() * parts): raise ValueError(f"a batch of {n} is no multiple of {size()} processes x {parts} parts")
  return slice(rank() * n // size(), (rank() + 1) * n // size())

def gather(values:np.ndarray) -> np.ndarray:
  """The arrays (..., n) of all processes, one behind the other: (..., n · size)."""
  if (MPI := mpi()) is None: return values
  found = np.empty((size(), *values.shape), values.dtype)
  MPI.COMM_WORLD.Allgather(np.ascontiguousarray(values), found)
  return np.concatenate(found, -1)

def same(array:np.ndarray):
  """Writes the first process's array into everyone's."""
  if MPI := mpi(): MPI.COMM_WORLD.Bcast(array.reshape(-1).view(np.uint8))  # whatever its type

def total(flat:Tensor):
  """Sums a realized float32 tensor over all processes, in its place: where MPI reaches it, on the processor and, if MPI
  was built for that, on CUDA; else by way of a copy on the host."""
  if (MPI := mpi()) is None: return
  buffer:Any = flat.uop.base.buffer
  if buffer.device.startswith("CUDA") and getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", int)():
    Device[buffer.device].synchronize()
    there = {"shape": (buffer.size,), "typestr": "<f4", "data": (buffer._buf.value, False), "version": 3}
    return MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, SimpleNamespace(__cuda_array_interface__=there))
  near = buffer.device.startswith(("CPU", "METAL"))
  array = np.frombuffer(buffer.as_memoryview(allow_zero_copy=near), np.float32)
  MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)
  if not near: buffer.copy_from(Tensor(array, device="NPY").uop.base.buffer)

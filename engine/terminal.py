"""A program at the terminal: numbers of its command line, and how it ends."""
from __future__ import annotations
import argparse, contextlib, math, signal, sys
from collections.abc import Callable, Iterator
from pathlib import Path

def number(kind:type, low:float, high:float=math.inf) -> Callable[[str], float]:
  """An argparse type: an int or a float within low..high."""
  def parse(text:str):
    try: value = kind(text)
    except ValueError: value = math.nan
    if low <= value <= high: return value
    limits = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
    raise argparse.ArgumentTypeError(f"it takes {'a whole ' if kind is int else 'a '}number {limits}, not {text!r}")
  return parse

def clock(seconds:float) -> str:
  """h:mm:ss, with as many hours as it takes."""
  minutes, s = divmod(round(seconds), 60)
  return f"{minutes//60}:{minutes%60:02}:{s:02}"

@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
  """A list that stays empty until Ctrl-C or SIGTERM asks to stop, and then holds the signal. A second Ctrl-C stops at
  once; a second SIGTERM does not: programs such as timeout send two."""
  asked:list[int] = []
  def ask(signum:int, frame:object):
    asked.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)
  before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
  try: yield asked
  finally:
    for s, handler in before.items(): signal.signal(s, handler)

def insist(signum:int, frame:object):
  """Ctrl-C ends a program, and again after three seconds if it still runs: Python drops what is raised inside a
  `__del__`, and each node of tinygrad's graphs has one."""
  signal.setitimer(signal.ITIMER_REAL, 3)
  raise KeyboardInterrupt

def run(main:Callable[[], None]):
  """Runs a program's main. What goes wrong is one sentence on stderr and exit status 1; Ctrl-C is 130."""
  program, before = Path(sys.argv[0]).name, {}
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in a shell's background
    before = {s: signal.signal(s, insist) for s in (signal.SIGINT, signal.SIGALRM)}
  try: main()
  except (KeyboardInterrupt, ValueError, OSError, RuntimeError, MemoryError) as e:
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(e, KeyboardInterrupt) or isinstance(e.__context__, KeyboardInterrupt):  # or what a lock made of it
      print(f"\n{program}: stopped", file=sys.stderr)
      sys.exit(130)
    sys.exit(f"{program}: {' '.join(str(e).split()) or type(e).__name__}")
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for s, handler in before.items(): signal.signal(s, handler)

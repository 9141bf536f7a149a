"""A program at the terminal: numbers of its command line, and how it ends."""
from __future__ import annotations
import argparse, contextlib, math, os, signal, sqlite3, sys, threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from tinygrad.device import CompileError

def parser(program:str, description:str, **options) -> argparse.ArgumentParser:
  """A command line that says what is wrong with it by a ValueError, as everything else does."""
  p = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False, **options)
  def refuse(message:str): raise ValueError(message)
  p.error = refuse  # type: ignore[method-assign, assignment]
  return p

def field_flag(p:argparse.ArgumentParser, name:str, kind:str, default:Any, help:str, low:float, high:float,
               choices:tuple|None):
  """A flag for a field of a dataclass: its name with hyphens. A bool is --name or --no-name."""
  options:dict = {"dest": name, "help": help if default is None else f"{help} ({show(default)})"}
  if kind == "bool": options["action"] = argparse.BooleanOptionalAction
  elif choices: options["choices"] = choices
  elif kind == "tuple": options["type"] = numbers
  elif kind in ("int", "float"): options["type"] = number({"int": int, "float": float}[kind], low, high)
  elif "tuple" in kind: options["type"] = size  # int | tuple | None
  p.add_argument("--" + name.replace("_", "-"), **options)

def show(value:Any) -> str: return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

def numbers(text:str) -> tuple[int, ...]:
  """An argparse type: whole numbers from 1 up, such as 1,2,2; none for an empty text."""
  try: values = tuple(int(v) for v in text.split(",") if v)
  except ValueError: values = (0,)
  if min(values, default=1) >= 1: return values
  raise argparse.ArgumentTypeError(f"it takes whole numbers from 1 up, such as 1,2,2, not {text!r}")

def size(text:str) -> int|tuple[int, ...]:
  """An argparse type: 64, or 64x128, height first."""
  sides = text.split("x")
  if len(sides) > 2 or not all(s.isdecimal() and 1 <= int(s) <= 4096 for s in sides):
    raise argparse.ArgumentTypeError(f"it takes 1 to 4096 pixels, such as 64 or 64x128, not {text!r}")
  return int(text) if len(sides) == 1 else tuple(map(int, sides))

def number(kind:type, low:float, high:float=math.inf) -> Callable[[str], float]:
  """An argparse type: an int or a float within low..high."""
  def parse(text:str):
    try: value = kind(text)
    except ValueError: value = math.nan
    if low <= value <= high: return value
    limits = f"from {low:.15g} to {high:.15g}" if high < math.inf else f"of {low:.15g} or more"
    raise argparse.ArgumentTypeError(f"it takes {'a whole ' if kind is int else 'a '}number {limits}, not {text!r}")
  return parse

def table(**rows:tuple):
  """Prints a line for each row: its name, its number, and remarks."""
  for name, (value, *remarks) in rows.items():
    print(f"  {name.replace('_', ' '):<32}{value:>12.6f}  {' '.join(map(str, remarks))}")

def clock(seconds:float) -> str:
  """h:mm:ss, with as many hours as it takes."""
  minutes, s = divmod(round(seconds), 60)
  return f"{minutes//60}:{minutes%60:02}:{s:02}"

@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
  """A list that stays empty until Ctrl-C or SIGTERM asks to stop, and then holds the signal. A second Ctrl-C stops at
  once; a second SIGTERM does not: programs such as timeout send two. Outside of the main thread nothing asks.

  At the end of what was asked to stop, KeyboardInterrupt or, of SIGTERM, SystemExit."""
  asked:list[int] = []
  def ask(signum:int, frame:object):
    asked.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(RuntimeError):  # where the signal came amid a line to stderr
      print("\nstopping after this step (Ctrl-C again: at once, and nothing is saved)", file=sys.stderr)
  main = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be set
  before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM) if main}
  try: yield asked
  finally:
    for s, handler in before.items(): signal.signal(s, handler)
  if asked: raise KeyboardInterrupt("asked to stop") if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])

def insist(signum:int, frame:object):
  """Ctrl-C ends a program, and again after three seconds if it still runs: Python drops what is raised inside a
  `__del__`, and each node of tinygrad's graphs has one."""
  signal.setitimer(signal.ITIMER_REAL, 3)
  raise KeyboardInterrupt

def run(main:Callable[[], None]):
  """Runs a program's main. What goes wrong is one sentence on stderr and exit status 1; Ctrl-C is 130."""
  program, before = Path(sys.argv[0]).name, {}
  sys.stdout, sys.stderr = (f or open(os.devnull, "w") for f in (sys.stdout, sys.stderr))  # they may be closed
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in a shell's background
    before = {s: signal.signal(s, insist) for s in (signal.SIGINT, signal.SIGALRM)}
  try: main()
  except (KeyboardInterrupt, ValueError, OSError, RuntimeError, MemoryError, sqlite3.Error) as e:
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(e, KeyboardInterrupt) or isinstance(e.__context__, KeyboardInterrupt):  # or what a lock made of it
      if not e.args: print(f"\n{program}: stopped", file=sys.stderr)  # else it was said
      sys.exit(130)
    sys.exit(f"{program}: {' '.join(str(e).split()) or type(e).__name__}")
  except CompileError as e:
    hint = ": set CUDA_PATH to the folder of NVIDIA's toolkit" if "cannot open source file" in str(e) else ""
    sys.exit(f"{program}: the compiler of kernels says {' '.join(str(e).split())[:500]}{hint}")
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for s, handler in before.items(): signal.signal(s, handler)

"""A program at the terminal: numbers of its command line, a progress bar, and how it ends."""
from __future__ import annotations
import argparse, math, shutil, sys, time
from collections.abc import Callable, Iterable, Iterator
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

def run(main:Callable[[], None]):
  """Runs a program's main. What goes wrong is one sentence on stderr and exit status 1; Ctrl-C is 130."""
  program = Path(sys.argv[0]).name
  try: main()
  except (ValueError, OSError, RuntimeError, MemoryError) as e:
    sys.exit(f"{program}: {' '.join(str(e).split()) or type(e).__name__}")
  except KeyboardInterrupt:
    print(f"\n{program}: stopped", file=sys.stderr)
    sys.exit(130)

"""tinygrad's CPU device, opened in 0.1 s instead of 0.4."""
from __future__ import annotations
import contextlib, importlib, importlib.metadata, sqlite3, sys, types
from fast.quickstart import launched
from tinygrad import helpers
from tinygrad.codegen import do_to_program, to_program_key
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import UOp

class LVPRenderer:
  """tinygrad's renderer of this name, imported where DEV=CPU:LVP asks for it: half of the time went into the import of
  all that Mesa, a compiler that tinygrad's CPU device can do without, declares."""
  def __new__(cls, *args, **options): return importlib.import_module(NIR).LVPRenderer(*args, **options)

NIR = "tinygrad.renderer.nir"

def program(ast:UOp, renderer:Renderer) -> UOp:
  """A lowered kernel, kept in tinygrad's cache on the disk."""
  if (compiler := renderer.compiler) is None or compiler.cachekey is None: return do_to_program(ast, renderer)
  key = repr((importlib.metadata.version("tinygrad"), compiler.cachekey, to_program_key(ast, renderer)))
  with contextlib.suppress(sqlite3.Error):
    if (found := helpers.diskcache_get("ddpm_opening", key)) is not None: return found
  made = do_to_program(ast, renderer)
  with contextlib.suppress(sqlite3.Error): helpers.diskcache_put("ddpm_opening", key, launched(made))
  return made

# without Mesa, if nothing has imported it before
if NIR in sys.modules: ops_cpu = importlib.import_module("tinygrad.runtime.ops_cpu")
else:
  sys.modules[NIR] = types.SimpleNamespace(LVPRenderer=LVPRenderer)  # type: ignore[assignment]
  try: ops_cpu = importlib.import_module("tinygrad.runtime.ops_cpu")
  finally: del sys.modules[NIR]

def install():
  """The other half went into four kernels that the device brings with itself, lowered each time. This stays: to whoever
  opens the device nothing else changes. An import where it is used, and a `to_program` that keeps what it makes, in
  tinygrad would make it unnecessary."""
  ops_cpu.do_to_program = program
